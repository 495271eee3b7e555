"""What running a policy on recorded episodes leaves behind: arrays, from which everything else is computed.

offline_eval.py fills these, results.py computes numbers from them, report.py draws them. Nothing here knows of files,
pictures or summaries.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

HORIZONS_S = (0.5, 1.0)  # how far ahead of the observation a chunk's positions are compared


@dataclass
class EpisodeResult:
    """The policy on the N evaluated frames of an episode; S states, A of them acted on; in the contract's units."""

    index: int
    name: str
    frame: np.ndarray  # (N,) int64, position in the episode
    timestamp_s: np.ndarray  # (N,) float64, since the episode's start
    state_rad: np.ndarray  # (N, S) float32, recorded
    predicted: np.ndarray  # (N, A) float32, the policy's actions
    recorded: np.ndarray  # (N, A) float32, the recorded actions
    seconds: np.ndarray  # (N,) float64, what the control step took
    inferred: np.ndarray  # (N,) bool; False: the action came from the queue
    segment: np.ndarray  # (N,) int64
    rollout_rad: np.ndarray | None  # (N, A) float64: where the policy's own actions have led by this frame
    without_action: int  # frames in the range that have no recorded action, and were left out
    thumbnails: list[tuple[float, dict[str, np.ndarray]]]  # (seconds, camera -> image)


class ChunkErrors:
    """How far ahead can the policy see? Inferred chunks against what was recorded from there on.

    Args:
        chunk_size: actions of a chunk.
        joints: the number of states that are acted on, A.
        fps: frames per second.
        deltas: the actions are deltas, which add up to positions; else they are positions.

    Attributes:
        total: (chunk, A) float64, the sum of |predicted - recorded| by position in the chunk.
        count: (chunk,) int64, of how many chunks.
        ahead: {seconds: list of (predicted, recorded) positions (A,) float64, rad}, from the observation on; only for
            horizons that a chunk reaches.
    """

    def __init__(self, chunk_size: int, joints: int, fps: float, deltas: bool) -> None:
        self.total, self.count = np.zeros((chunk_size, joints)), np.zeros(chunk_size, np.int64)
        self._frames = {s: round(s * fps) for s in HORIZONS_S if 1 <= round(s * fps) <= chunk_size}
        self._deltas = deltas
        self.ahead: dict[float, list[tuple[np.ndarray, np.ndarray]]] = {s: [] for s in self._frames}

    def add(self, chunk: np.ndarray, recorded: np.ndarray, state_rad: np.ndarray) -> None:
        """Add an inferred chunk (chunk, A), the actions (n, A), n <= chunk, recorded, and the state (A,) acted on."""
        n = len(recorded)
        self.total[:n] += np.abs(chunk[:n].astype(np.float64) - recorded)
        self.count[:n] += 1
        for seconds, k in self._frames.items():
            if k <= n:
                pair = [
                    state_rad + actions[:k].sum(axis=0, dtype=np.float64) if self._deltas else actions[k - 1]
                    for actions in (chunk, recorded)
                ]
                self.ahead[seconds].append((pair[0], pair[1]))
