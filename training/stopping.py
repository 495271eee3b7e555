"""SIGTERM and SIGINT as a request to stop. This room knows nothing of what is stopped."""

from __future__ import annotations

import signal
from typing import Any

from .errors import Stopped


class StopSignal:
    """The first signal asks: finish the step, save, exit with 75. A second one ends the process at once.

    Attributes:
        name: of the signal that was received; "" while none was.
        interrupts: whether the first signal raises Stopped wherever the main thread is: true until training proper,
            because there is nothing to save before it.
    """

    def __init__(self) -> None:
        self.name = ""
        self.interrupts = True
        self._previous = {s: signal.signal(s, self._receive) for s in (signal.SIGTERM, signal.SIGINT)}

    def early(self) -> Stopped | None:
        """What a signal that came before training proper raises; None if none did."""
        if not self.interrupts or not self.name:
            return None
        return Stopped(f"{self.name} before the first step; start again with the same command")

    def _receive(self, number: int, frame: Any) -> None:
        self.name = signal.Signals(number).name
        for each in self._previous:
            signal.signal(each, signal.SIG_DFL)
        if early := self.early():
            raise early

    def restore(self) -> None:
        """Put the handlers back that were there before."""
        for number, handler in self._previous.items():
            signal.signal(number, handler)
