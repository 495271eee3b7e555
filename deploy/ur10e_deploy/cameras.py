"""Pictures from whatever OpenCV can open, for robots that bring none: a device, a stream's address.

    cameras = Cameras(parse_sources(["color=/dev/video0"]), {"color": (480, 640)}, clock.now_s)
    cameras.stamps()["color"], cameras.pictures()["color"].rgb

Each camera is read in a thread of its own, as fast as it sends, so that what is there is the last picture; reading
releases Python's lock. A camera that fails is opened again until it is there; how old its last picture is meanwhile,
and what that means, is the watchdog's business.

Knows: OpenCV's captures.
Must not know: what pictures should look like (start_checks.py), what their age means (watchdog.py).
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Mapping, Sequence

import cv2

from .config import PolicyError
from .robot import Picture

OPEN_MS, READ_MS = 5000, 2000  # of a stream: OpenCV would wait for 30 s
RETRY_S = 0.3  # between two tries to open a camera that failed


def parse_sources(said: Sequence[str]) -> dict[str, str]:
    """["color=/dev/video0"] -> {"color": "/dev/video0"}.

    Raises:
        PolicyError: not NAME=SOURCE, or a name twice.
    """
    sources: dict[str, str] = {}
    for text in said:
        name, _, source = text.partition("=")
        if not name or not source:
            raise PolicyError(f"--camera {text}: expected NAME=SOURCE, for example color=/dev/video0")
        if name in sources:
            raise PolicyError(f"--camera {text}: {name} is {sources[name]} already")
        sources[name] = source
    return sources


class Cameras:
    """The last picture of each camera.

    Args:
        sources: camera -> a device (/dev/video0, or its number) or an address (rtsp://, http://).
        shapes: camera -> (H, W) that a device is asked for; an address sends what it sends.
        now_s: the clock.

    Raises:
        PolicyError: one cannot be opened.
    """

    def __init__(
        self, sources: Mapping[str, str], shapes: Mapping[str, tuple[int, int]], now_s: Callable[[], float]
    ) -> None:
        self._now_s, self._closed = now_s, threading.Event()
        self._last: dict[str, Picture] = {}
        captures = {}
        for name, source in sources.items():
            captures[name] = _open(source, shapes[name])
            if not captures[name].isOpened():
                for capture in captures.values():
                    capture.release()
                raise PolicyError(f"--camera {name}={source}: OpenCV cannot open it; is it there, and in nobody's use?")
        self._threads = [
            threading.Thread(
                target=self._read, args=(name, source, captures[name], shapes[name]), name=f"camera {name}", daemon=True
            )
            for name, source in sources.items()
        ]
        for thread in self._threads:
            thread.start()

    def stamps(self) -> dict[str, float]:
        """Camera -> when its last picture arrived, s; one that never sent any is not there."""
        return {name: picture.stamp_s for name, picture in dict(self._last).items()}

    def pictures(self) -> dict[str, Picture]:
        """Camera -> its last picture."""
        return dict(self._last)

    def close(self) -> None:
        """Let go of them; a read that hangs is left to the end of the process."""
        self._closed.set()
        for thread in self._threads:
            thread.join(1.0)

    def _read(self, name: str, source: str, capture: cv2.VideoCapture, shape: tuple[int, int]) -> None:
        while not self._closed.is_set():
            there, bgr = capture.read()
            if there:
                self._last[name] = Picture(self._now_s(), cv2.cvtColor(bgr, cv2.COLOR_BGR2RGB))
            elif not self._closed.wait(RETRY_S):
                capture.release()
                capture = _open(source, shape)
        capture.release()


def _open(source: str, shape: tuple[int, int]) -> cv2.VideoCapture:
    if "://" in source:
        waits = [cv2.CAP_PROP_OPEN_TIMEOUT_MSEC, OPEN_MS, cv2.CAP_PROP_READ_TIMEOUT_MSEC, READ_MS]
        return cv2.VideoCapture(source, cv2.CAP_FFMPEG, waits)
    capture = cv2.VideoCapture(int(source) if source.isdigit() else source)
    capture.set(cv2.CAP_PROP_BUFFERSIZE, 1)  # the last picture, not the oldest
    capture.set(cv2.CAP_PROP_FRAME_HEIGHT, shape[0])
    capture.set(cv2.CAP_PROP_FRAME_WIDTH, shape[1])
    return capture
