"""What a reader of recorded episodes gives, and how it says that it cannot.

Knows: nothing of how episodes are stored: bags are read as the same (deploy/ur10e_deploy/sources.py).
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np


class SourceError(Exception):
    """A dataset or bag that cannot be evaluated: one line saying where, what, and what to do."""

    def __init__(self, message: str) -> None:
        super().__init__(" ".join(message.splitlines()))  # names inside damaged files may hold line breaks


class AbsentVideo(SourceError):
    """An episode without its pictures, as in a dataset of which a part was copied."""


@dataclass(frozen=True)
class Frame:
    """One moment of an episode, with its pixels.

    Attributes:
        index: position within the episode, from 0.
        timestamp_s: seconds since the episode's start.
        state_rad: (S,) float32, joints in rad.
        images: camera -> (H, W, 3) uint8 RGB, the caller's to keep (never a view of a buffer that is used again).
    """

    index: int
    timestamp_s: float
    state_rad: np.ndarray
    images: dict[str, np.ndarray]


@dataclass(frozen=True)
class EpisodeData:
    """Everything of an episode but its pixels, for n frames.

    Attributes:
        index: the episode's number in its source.
        name: the bag's name, with "@" and a time if it is a part of the bag, or "episode_000003".
        timestamp_s: (n,) float64, seconds since the episode's start.
        state_rad: (n, S) float32, all finite, joints in rad.
        action: (n, A) float32, rad (absolute) or rad per frame (delta); a row is NaN where none was recorded
            (the last frame of a bag's segment).
        segment: (n,) int64, which uninterrupted piece a frame belongs to; no chunk, no delta and no rollout crosses
            a change (frames were dropped there).
    """

    index: int
    name: str
    timestamp_s: np.ndarray
    state_rad: np.ndarray
    action: np.ndarray
    segment: np.ndarray


def frame_range(name: str, count: int, start: int, stop: int | None) -> range:
    """The frames start <= i < stop of an episode of `count`.

    Raises:
        SourceError: the range leaves the episode.
    """
    stop = count if stop is None else stop
    if not 0 <= start <= stop <= count:
        raise SourceError(f"{name}: frames {start} to {stop} asked for, it has {count} (0 to {count})")
    return range(start, stop)
