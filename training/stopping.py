"""SIGTERM and SIGINT as a request to stop. This room knows nothing of what is stopped."""

from __future__ import annotations

import os
import signal
import time
from typing import Any

from .errors import Stopped


class StopSignal:
    """The first signal asks: finish the step, save, exit with 75. A second one ends the process at once.

    SIGTERMs within five seconds are one: a scheduler that stops a process group (SLURM, systemd) reaches torchrun too,
    which passes the signal on. A second Ctrl-C always counts, unless torchrun has sent it within a second.

    Attributes:
        name: of the signal that was received; "" while none was.
        interrupts: whether the first signal raises Stopped wherever the main thread is: true until training proper,
            because there is nothing to save before it.
    """

    def __init__(self) -> None:
        self.name = ""
        self.interrupts = True
        self._first_s = 0.0
        under_torchrun = "TORCHELASTIC_RUN_ID" in os.environ
        self._same_s: dict[int, float] = {signal.SIGTERM: 5.0, signal.SIGINT: 1.0 if under_torchrun else 0.0}
        self._previous = {s: signal.signal(s, self._receive) for s in (signal.SIGTERM, signal.SIGINT)}

    def early(self) -> Stopped | None:
        """What a signal that came before training proper raises; None if none did."""
        if not self.interrupts or not self.name:
            return None
        return Stopped(f"{self.name} before the first step; start again with the same command")

    def _receive(self, number: int, frame: Any) -> None:
        if self.name:
            if time.monotonic() - self._first_s < self._same_s[number]:
                return
            signal.signal(number, signal.SIG_DFL)
            signal.raise_signal(number)
        self.name, self._first_s = signal.Signals(number).name, time.monotonic()
        if not self._same_s[signal.SIGINT]:
            signal.signal(signal.SIGINT, signal.SIG_DFL)  # counts even where the main thread is in the middle of C code
        if early := self.early():
            raise early

    def restore(self) -> None:
        """Put the handlers back that were there before."""
        for number, handler in self._previous.items():
            signal.signal(number, handler)
