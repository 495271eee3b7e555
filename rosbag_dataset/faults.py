"""Pictures that show no scene: black, white, torn, or frozen while the arm moves.

Knows: what such pictures look like, once they are 8-bit RGB.
Must not know: why they came, and what is done about them: they are counted and said.
"""

from __future__ import annotations

import cv2
import numpy as np

Faults = dict[str, tuple[int, int, int]]  # kind -> (how many, time in ns of the first, of the last)

BLACK_BELOW, WHITE_ABOVE = 16, 239  # no pixel is brighter, or none darker
# A picture is torn if this share of its rows, from below, is of one colour or those of the picture before. Where a
# camera has that often (a bar below, a scene that stands still in a video), it is how its pictures are.
TORN_ROWS, TORN_OFTEN = 1 / 16, 0.05
TORN_LEVELS = 8  # the mean change above rows that stayed: a scene that moves, and not only an arm in it
SPARSE, ROWS = 16, 64  # what is looked at first of a picture: every 16th row; 64 rows from below
FROZEN_RAD = 0.05  # pictures that are equal bit by bit are frozen if a joint turns by more meanwhile: no camera's are


class PictureWatch:
    """Looks at the pictures of one camera, one after the other as they are stored."""

    def __init__(self) -> None:
        self._before: np.ndarray | None = None
        self._times_ns: list[int] = []
        self._kinds: list[tuple[bool, bool, bool, bool]] = []  # black, white, torn, the same as before

    def add(self, time_ns: int, image: np.ndarray) -> None:
        """Look at the next one, (H, W, 3) uint8; it must not be changed afterwards."""
        some = image[::SPARSE]  # nearly every picture shows here already that it is neither
        black = int(some.max()) < BLACK_BELOW and int(image.max()) < BLACK_BELOW
        white = int(some.min()) > WHITE_ABOVE and int(image.min()) > WHITE_ABOVE
        before = self._before if self._before is not None else ~image
        same = _rows_from_below(image, before)
        torn = _rows_from_below(image, image[-1:, -1:]) >= TORN_ROWS * len(image)
        if not torn and len(image) * TORN_ROWS <= same < len(image):
            above = image[:-same]
            torn = cv2.norm(above, before[:-same], cv2.NORM_L1) / above.size > TORN_LEVELS
        self._times_ns.append(time_ns)
        self._kinds.append((black, white, torn and not (black or white), same == len(image)))
        self._before = image

    def faults(self, joint_time_ns: np.ndarray, joint_rad: np.ndarray) -> Faults:
        """What was found; the joints, (M,) and (M, J) with NaN where there is none, tell whether the arm moved."""
        times = np.array(self._times_ns, np.int64)
        black, white, torn, same = np.array(self._kinds, bool).reshape(-1, 4).T
        torn &= ~same & (torn.mean() <= TORN_OFTEN if len(torn) else False)
        frozen = np.zeros(len(times), bool)
        edges = np.flatnonzero(np.diff(np.concatenate(([0], same.view(np.int8), [0])))).reshape(-1, 2)
        order = np.argsort(joint_time_ns, kind="stable")  # so that a run costs nothing of the rest: there may be many
        sorted_ns = joint_time_ns[order]
        for first, stop in edges:  # the picture before a run is the one that it shows
            begin = np.searchsorted(sorted_ns, times[first - 1])
            end = np.searchsorted(sorted_ns, times[stop - 1], side="right")
            frozen[first:stop] = _turned(joint_rad[order[begin:end]]) > FROZEN_RAD
        found = {"black": black, "white": white, "torn": torn, "frozen": frozen & ~black & ~white}
        return {
            kind: (int(which.sum()), int(times[which].min()), int(times[which].max()))
            for kind, which in found.items()
            if which.any()
        }


def _rows_from_below(image: np.ndarray, other: np.ndarray) -> int:
    """How many of an image's last rows are equal to those of another one, or to its only pixel."""
    if not (image[-1] == other[-1]).all():
        return 0
    for stop in range(len(image), 0, -ROWS):
        first = max(0, stop - ROWS)
        differ = image[first:stop] != (other if len(other) == 1 else other[first:stop])
        rows = np.flatnonzero(differ.reshape(stop - first, -1).any(axis=1))
        if len(rows):
            return len(image) - 1 - first - int(rows[-1])
    return len(image)


def _turned(joint_rad: np.ndarray) -> float:
    """The range of the joint that turns most, rad; not more for a joint that is counted from -pi on again."""
    ranges = [np.ptp(np.unwrap(column[~np.isnan(column)])) for column in joint_rad.T if not np.isnan(column).all()]
    return float(max(ranges, default=0.0))
