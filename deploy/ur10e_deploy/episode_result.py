"""What running a policy on recorded episodes leaves behind: arrays, from which everything else is computed.

offline_eval.py fills these, results.py computes numbers from them, report.py draws them. Nothing here knows of files,
pictures or summaries.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np


@dataclass
class EpisodeResult:
    """The policy on the N evaluated frames of an episode; J joints. Actions are in the contract's action_unit."""

    index: int
    name: str
    frame: np.ndarray  # (N,) int64, position in the episode
    timestamp_s: np.ndarray  # (N,) float64, since the episode's start
    state_rad: np.ndarray  # (N, J) float32, recorded
    predicted: np.ndarray  # (N, J) float32, the policy's actions
    recorded: np.ndarray  # (N, J) float32, the recorded actions
    seconds: np.ndarray  # (N,) float64, what the control step took
    inferred: np.ndarray  # (N,) bool; False: the action came from the queue
    segment: np.ndarray  # (N,) int64
    rollout_rad: np.ndarray | None  # (N, J) float64: where the policy's own actions have led by this frame
    without_action: int  # frames in the range that have no recorded action, and were left out
    thumbnails: list[tuple[float, dict[str, np.ndarray]]]  # (seconds, camera -> image)


@dataclass
class ChunkErrors:
    """How far ahead can the policy see? |predicted - recorded| by position in the chunk, over all inferred chunks."""

    total: np.ndarray  # (chunk, J) float64, the sum
    count: np.ndarray  # (chunk,) int64, of how many chunks

    def add(self, chunk: np.ndarray, recorded: np.ndarray) -> None:
        """Add an inferred chunk (chunk, J) and the actions (n, J), n <= chunk, that were recorded from there on."""
        n = len(recorded)
        self.total[:n] += np.abs(chunk[:n].astype(np.float64) - recorded)
        self.count[:n] += 1
