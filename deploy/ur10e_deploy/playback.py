"""Chunks of actions become one smooth path over time, whenever they arrive.

    playback = Playback(seam="cross-fade")
    playback.restart(position)                      # at rest, at frame 0
    playback.accept(observed_frame, positions, now_frame)
    target = playback.at(now_frame)

Time is counted in *frames* of the policy: at full speed 1/fps seconds each, at a speed fraction of 0.25 four times as
long. Action i of a chunk that was predicted from an observation at frame n is where to be at frame n + 1 + i.

Between frames the path is the uniform cubic B-spline with the actions as control points: position, speed and
acceleration are continuous, and none exceeds that of the actions themselves, because the curve lies within their hull.
(A line through the actions has a step in speed at each, which at 250 Hz is an acceleration of tens of rad/s^2; a cubic
through them has a step in acceleration, and overshoots.) The price is that it passes beside an action by a sixth of its
second difference, 0.2 mm of the expert's 1.4 rad/s^2 at 30 Hz and a metre's reach.

The spline between frames k and k+1 takes points up to k+2. Those are fixed once it is entered: a new chunk changes what
lies behind them, so no seam can be a jump, and an action that would have to be before them is late, and dropped.

A policy's chunks are rough: of the demo's, consecutive actions have second differences that at 30 Hz are 50 rad/s^2,
where the expert's are 1.4. So each chunk's joints are smoothed over time first, by a Gaussian of SMOOTH_FRAMES, which
moves the expert's path by 3 mrad at its hardest acceleration and not at all at even speed.

Knows: frames, chunks, seams.
Must not know: clocks, limits, robots, what a position is.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np

SEAMS = ("cross-fade", "ensemble", "none")
SMOOTH_FRAMES = 2.0  # standard deviation
FADE_FRAMES = 10  # 0.33 s at 30 fps


def smooth(positions: np.ndarray, frames: float) -> np.ndarray:
    """(N, J) positions with the first six columns, joints, smoothed over time; a gripper's stay as they are.

    Beyond its ends a chunk is continued by its reflection through the end, which keeps an even motion even.
    """
    reach = min(math.ceil(3 * frames), len(positions) - 1)
    if reach < 1:
        return positions
    joints = positions[:, :6]
    before, behind = 2 * joints[0] - joints[reach:0:-1], 2 * joints[-1] - joints[-2 : -reach - 2 : -1]
    weights = np.exp(-0.5 * (np.arange(-reach, reach + 1) / frames) ** 2)
    padded = np.concatenate([before, joints, behind])
    smoothed = np.stack([np.convolve(column, weights / weights.sum(), "valid") for column in padded.T], axis=1)
    return np.concatenate([smoothed, positions[:, 6:]], axis=1)


class Playback:
    """The path that is being played, over A positions.

    Args:
        seam: what becomes of two chunks that speak of the same frame. "cross-fade" goes over from the old to the new
            within `fade_frames`, and so from rest to the first; "ensemble" averages all chunks, weights exp(-m i),
            i = 0 the oldest (temporal ensembling, arXiv 2304.13705); "none" takes the new one.
        fade_frames: of a cross-fade.
        smooth_frames: standard deviation of the Gaussian, in frames; 0 plays chunks as they are.
        ensemble_m: of an ensemble.

    Attributes:
        late: how many actions of all chunks were late.
        jumps: of each chunk but the first, how far its first action that is played is from what would have been
            played there: (A,) each.
    """

    def __init__(
        self,
        seam: str = "cross-fade",
        fade_frames: int = FADE_FRAMES,
        ensemble_m: float = 0.01,
        smooth_frames: float = SMOOTH_FRAMES,
    ) -> None:
        if seam not in SEAMS:
            raise ValueError(f"seam is {seam!r}; expected one of {', '.join(SEAMS)}")
        self._seam, self._fade_frames, self._m = seam, fade_frames, ensemble_m
        self._smooth_frames = smooth_frames
        self.late, self.jumps = 0, []

    def restart(self, position: np.ndarray) -> None:
        """Stand at (A,) `position`, at frame 0, until a chunk is accepted."""
        self._first = -1  # frame of the first point that is kept
        self._points: list[np.ndarray] = [np.array(position, np.float64)] * 2  # frames -1 and 0
        self._chunks: list[tuple[int, np.ndarray]] = []  # of an ensemble: frame of the first action, actions

    @property
    def end_frame(self) -> int:
        """The last frame that a point is known of."""
        return self._first + len(self._points) - 1

    def point(self, frame: int) -> np.ndarray:
        """(A,) the point of a frame; behind the last one, the last one."""
        return self._points[min(max(frame - self._first, 0), len(self._points) - 1)]

    def at(self, frame: float) -> np.ndarray:
        """(A,) the position at a frame and a fraction."""
        k = math.floor(frame)
        u = frame - k
        weights = ((1 - u) ** 3, 3 * u**3 - 6 * u**2 + 4, -3 * u**3 + 3 * u**2 + 3 * u + 1, u**3)
        return sum(w * self.point(k - 1 + i) for i, w in enumerate(weights)) / 6  # ty: ignore[invalid-explicit-return]

    def accept(self, observed_frame: int, positions: np.ndarray, now_frame: float) -> int:
        """Play a chunk (N, A) that was predicted from an observation at `observed_frame`; -> how many were late.

        Late are actions for frames that are over. The one or two behind those are dropped, too: their points are fixed.
        A chunk of which no action is left changes nothing.
        """
        start, positions = observed_frame + 1, smooth(positions, self._smooth_frames)
        whole = math.floor(now_frame)
        free = whole + 2 if now_frame == whole else whole + 3  # the first point that may still change
        late = min(max(whole + 1 - start, 0), len(positions))
        self.late += late
        if self._seam == "ensemble":
            self._chunks = [c for c in self._chunks if c[0] + len(c[1]) > free] + [(start, positions)]
        first = max(start, free)
        if first >= start + len(positions):
            return late
        if self.end_frame > 0:
            self.jumps.append(positions[first - start] - self.point(first))
        merged = []
        for frame in range(first, start + len(positions)):
            new, old = positions[frame - start], self.point(frame)
            if self._seam == "ensemble":
                new = self._ensemble(frame)
            elif self._seam == "cross-fade":
                share = min((frame - first + 1) / (self._fade_frames + 1), 1.0)
                new = old + share**2 * (3 - 2 * share) * (new - old)  # begins and ends without a step in speed
            merged.append(new)
        keep_from = max(whole - 2 - self._first, 0)  # points that are over
        kept = [self.point(f) for f in range(self._first + keep_from, first)]  # up to it, held where nothing was known
        self._first += keep_from
        self._points = kept + merged
        return late

    def _ensemble(self, frame: int) -> np.ndarray:
        speak: Sequence[np.ndarray] = [c[frame - start] for start, c in self._chunks if 0 <= frame - start < len(c)]
        weights = np.exp(-self._m * np.arange(len(speak)))
        return np.tensordot(weights / weights.sum(), np.array(speak), axes=1)
