"""Chunks become one smooth path: seams, late actions, what smoothing does and does not do."""

from __future__ import annotations

import numpy as np
import pytest
from ur10e_deploy.playback import SEAMS, Playback, smooth

FRAMES = np.arange(0.0, 40.0, 0.05)


def ramp(first: int, count: int, offset: float = 0.0, slope: float = 0.01) -> np.ndarray:
    """(count, 1) actions of an even motion, the first for frame `first`."""
    return slope * np.arange(first, first + count)[:, None] + offset


def play(playback: Playback, frames: np.ndarray) -> np.ndarray:
    return np.array([playback.at(f)[0] for f in frames])


def hardest(path: np.ndarray) -> float:
    """The largest second difference, per frame^2."""
    return float(np.abs(np.diff(path, 2)).max() / 0.05**2)


def with_jump(seam: str) -> np.ndarray:
    """The path of two chunks that differ by 0.1, the second of which comes at frame 12."""
    playback = Playback(seam, smooth_frames=0)
    playback.restart(np.zeros(1))
    playback.accept(0, ramp(1, 30), 0.0)
    before = play(playback, FRAMES[FRAMES < 12.3])
    playback.accept(10, ramp(11, 30, offset=0.1), 12.3)
    return np.concatenate([before, play(playback, FRAMES[FRAMES >= 12.3])])


@pytest.mark.parametrize("seam", SEAMS)
def test_a_seam_has_no_step_in_speed_or_acceleration(seam: str):
    """Whatever the new chunk says, what was entered is not changed: the path's third difference stays bounded."""
    path = with_jump(seam)
    limit = 0.15 * 0.05**3 * 6  # the jump as a third difference of points, and some
    assert np.abs(np.diff(path, 3)).max() < limit + 1e-12


def test_blending_makes_a_seam_softer():
    """Against no blending, a cross-fade and an ensemble need less acceleration, and the fade ends on the new chunk."""
    none, fade, ensemble = (hardest(with_jump(seam)) for seam in ("none", "cross-fade", "ensemble"))
    assert fade < 0.1 * none and ensemble < 0.6 * none
    np.testing.assert_allclose(with_jump("cross-fade")[-100:-60], 0.01 * FRAMES[-100:-60] + 0.1, atol=1e-9)


def test_at_rest_the_first_chunk_begins_gently():
    """Frame 0 is where the arm stands, with no speed."""
    playback = Playback("none", smooth_frames=0)
    playback.restart(np.full(1, 0.5))
    playback.accept(0, ramp(1, 20, offset=0.7), 0.0)
    path = play(playback, FRAMES[:60])
    assert path[0] == 0.5 and abs(path[1] - path[0]) < 1e-4
    assert path[-1] == pytest.approx(0.7 + 0.01 * FRAMES[59], abs=1e-5)


def test_late_actions_are_dropped_and_counted():
    """An answer from frame 10 that comes at frame 14.5 has lost its actions for frames 11 to 14."""
    playback = Playback("none", smooth_frames=0)
    playback.restart(np.zeros(1))
    assert playback.accept(0, ramp(1, 30), 0.0) == 0
    assert playback.accept(10, ramp(11, 20, offset=0.1), 14.5) == 4 and playback.late == 4
    assert playback.point(16)[0] == pytest.approx(0.16) and playback.point(17)[0] == pytest.approx(0.27)
    assert playback.jumps[0][0] == pytest.approx(0.1) and len(playback.jumps) == 1


def test_a_chunk_that_is_late_as_a_whole_changes_nothing():
    """The path goes on as it was."""
    playback = Playback("none")
    playback.restart(np.zeros(1))
    playback.accept(0, ramp(1, 30), 0.0)
    before = play(playback, FRAMES)
    assert playback.accept(2, ramp(3, 5, offset=9.0), 20.0) == 5
    np.testing.assert_array_equal(play(playback, FRAMES[FRAMES > 20]), before[FRAMES > 20])


def test_behind_the_last_action_the_path_stays_there():
    """A policy that says no more leaves the arm at its last action, and the loop is told where that is."""
    playback = Playback("none", smooth_frames=0)
    playback.restart(np.zeros(1))
    playback.accept(0, ramp(1, 10), 0.0)
    assert playback.end_frame == 10
    assert playback.at(12.0)[0] == pytest.approx(0.1) and playback.at(1000.7)[0] == pytest.approx(0.1)


def test_an_ensemble_weights_the_oldest_most():
    """Weights exp(-m i), i = 0 the oldest of the chunks that speak of a frame: temporal ensembling."""
    playback = Playback("ensemble", ensemble_m=0.5, smooth_frames=0)
    playback.restart(np.zeros(1))
    for asked, offset in ((0, 0.0), (1, 1.0), (2, 5.0)):
        playback.accept(asked, ramp(asked + 1, 10, offset, slope=0.0), float(asked))
    weights = np.exp(-0.5 * np.arange(3))
    assert playback.point(8)[0] == pytest.approx(weights @ [0.0, 1.0, 5.0] / weights.sum())
    assert playback.point(11)[0] == pytest.approx(weights[:2] @ [1.0, 5.0] / weights[:2].sum())  # the first is over


def test_smoothing_leaves_an_even_motion_and_a_gripper_alone():
    """Joints lose their noise, an even motion nothing, at its ends neither; the seventh column is as it was."""
    rng = np.random.default_rng(0)
    even = np.arange(30)[:, None] * np.linspace(-0.02, 0.02, 7)
    np.testing.assert_allclose(smooth(even, 2.0), even, atol=1e-12)
    noisy = even + rng.normal(0, 0.002, even.shape)
    noisy[:, 6] = rng.integers(0, 2, 30)
    smoothed = smooth(noisy, 2.0)
    np.testing.assert_array_equal(smoothed[:, 6], noisy[:, 6])
    rough, fine = (np.abs(np.diff(rows[:, :6], 3, axis=0)).max() for rows in (noisy, smoothed))
    assert fine < 0.1 * rough
    assert smooth(even[:1], 2.0).shape == (1, 7)
    np.testing.assert_array_equal(smooth(noisy, 0.0), noisy)
