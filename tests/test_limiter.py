"""Joint limits: no command breaks one whatever is asked for, and a stream that keeps them is passed on as it is."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from ur10e_deploy.config import PolicyError
from ur10e_deploy.limiter import Limiter, LimitError
from ur10e_deploy.limits import Limits, arm_points, default_limits, read_limits

from sim.expert import random_episode
from ur10e import SPEED_LIMIT_RAD_S, inverse_kinematics, link_frames, tool_tip

LIMITS = default_limits()
HOME = inverse_kinematics((-0.55, 0.0, 0.45))


def assert_kept(path_rad: np.ndarray, period_s: float, limits: Limits = LIMITS) -> None:
    """Commands (N, 6) from rest: positions and three differences, and where link_frames says that the arm is."""
    at_rest = np.concatenate([np.repeat(path_rad[:1], 3, axis=0), path_rad])
    assert np.isfinite(path_rad).all()
    assert (path_rad >= limits.low_rad).all() and (path_rad <= limits.high_rad).all()
    rows = at_rest
    for limit in (limits.speed_rad_s, limits.acceleration_rad_s2, limits.jerk_rad_s3):
        rows = np.diff(rows, axis=0) / period_s
        assert (np.abs(rows) <= limit).all(), np.abs(rows).max(axis=0)
    tip_m, frames = tool_tip(path_rad), link_frames(path_rad)
    assert ((tip_m >= limits.tool_low_m - 1e-9) & (tip_m <= limits.tool_high_m + 1e-9)).all()
    assert frames[:, 2:6, 2, 3].min() >= limits.arm_above_m - 1e-9


def hostile(rng: np.random.Generator, count: int) -> list[np.ndarray | None]:
    """Targets that no policy should give: jumps, noise, NaN, spikes, huge numbers, and nothing."""
    targets: list[np.ndarray | None] = []
    centre = HOME.copy()
    while len(targets) < count:
        kind, length = rng.integers(7), int(rng.integers(1, 60))
        if kind == 0:
            centre = HOME + rng.uniform(-3, 3, 6)
        rows = np.tile(centre, (length, 1))
        if kind == 1:
            rows = rows + rng.normal(0, 0.05, rows.shape)
        elif kind == 2:
            rows[rng.integers(length), rng.integers(6)] = rng.choice([np.nan, np.inf, -np.inf])
        elif kind == 3:
            rows = rows + np.cumsum(rng.normal(0, 0.01, rows.shape), axis=0)
        elif kind == 4:
            rows[:, rng.integers(6)] = rng.choice([1e9, -1e300, 7.0])
        elif kind == 5:
            rows = rng.uniform(-np.pi, np.pi, rows.shape)
        targets += [None] * length if kind == 6 else list(rows)
    return targets[:count]


def follow(limiter: Limiter, targets: list[np.ndarray | None]) -> tuple[np.ndarray, np.ndarray]:
    """-> commands (N, 6), which of them were limited (N,)."""
    steps = [limiter.step(target) for target in targets]
    return np.array([s.command_rad for s in steps]), np.array([s.limited for s in steps])


def test_the_parts_are_where_the_kinematics_say():
    """limits.arm_points, written out for speed, is ur10e.link_frames and tool_tip."""
    q_rad = np.random.default_rng(0).uniform(-4, 4, (200, 6))
    points_m, frames = arm_points(q_rad), link_frames(q_rad)
    np.testing.assert_allclose(points_m[:, :4], frames[:, 2:6, :3, 3], atol=1e-12)
    np.testing.assert_allclose(points_m[:, 4], tool_tip(q_rad), atol=1e-12)


@pytest.mark.parametrize("command_hz", [125, 500])
def test_no_command_breaks_a_limit_whatever_is_asked(command_hz: int):
    """Jumps, noise, NaN, infinities: position, speed, acceleration, jerk and workspace hold in every period."""
    limiter = Limiter(LIMITS, 1 / command_hz)
    limiter.reset(HOME)
    path_rad, limited = follow(limiter, hostile(np.random.default_rng(command_hz), 2 * command_hz + 250))
    assert_kept(np.concatenate([HOME[None], path_rad]), 1 / command_hz)
    assert limited.mean() > 0.5 and np.ptp(path_rad, axis=0).max() > 0.3  # it was asked for the impossible, and moved


def test_the_end_of_a_joint_and_of_the_box_are_reached_and_kept():
    """A target beyond an end is followed up to it: near, and never past."""
    tight = replace(LIMITS, high_rad=np.where(np.arange(6) == 5, 0.5, LIMITS.high_rad))
    limiter = Limiter(tight, 0.008)
    limiter.reset(HOME)
    path_rad, _ = follow(limiter, [HOME + [0, 0, 0, 0, 0, 2.0]] * 250)
    assert_kept(np.concatenate([HOME[None], path_rad]), 0.008, tight)
    assert 0.4 < path_rad[-1, 5] <= 0.5
    below = inverse_kinematics((-0.55, 0.0, -0.1))  # the tip in the table
    limiter.reset(HOME)
    path_rad, _ = follow(limiter, [below] * 300)
    assert_kept(np.concatenate([HOME[None], path_rad]), 0.008)
    assert LIMITS.tool_low_m[2] <= tool_tip(path_rad[-1])[2] < 0.1


def test_a_stream_within_the_limits_is_passed_on_bit_by_bit():
    """The limiter is not a filter: an expert's motion at full speed comes out as it went in."""
    expert = random_episode(5, 0)[1]
    targets = expert.position(np.arange(0, expert.duration_s, 0.004))
    limiter = Limiter(LIMITS, 0.004)
    limiter.reset(targets[0])
    path_rad, limited = follow(limiter, list(targets[1:]))
    np.testing.assert_array_equal(path_rad, targets[1:])
    assert not limited.any()


def test_a_stream_that_jumped_is_caught_again():
    """After a jump the targets are followed exactly again: being limited ends."""
    expert = random_episode(5, 1)[1]
    targets = expert.position(np.arange(0, expert.duration_s, 0.004))
    targets[200:] += 0.05
    limiter = Limiter(LIMITS, 0.004)
    limiter.reset(targets[0])
    path_rad, limited = follow(limiter, [*targets[1:], *[targets[-1]] * 400])
    assert_kept(np.concatenate([targets[:1], path_rad]), 0.004)
    assert not limited[:190].any() and limited[199] and not limited[-100:].any()
    np.testing.assert_array_equal(path_rad[-1], targets[-1])


def test_a_stop_is_short_and_stays():
    """None brakes at once, with a good part of what the limits allow, and then nothing moves."""
    limiter = Limiter(LIMITS, 0.004)
    limiter.reset(HOME)
    turning = HOME + np.array([1.0, 0, 0, 0, 0, 0]) * (0.8 * np.clip(np.arange(1, 400) * 0.004 - 0.3, 0, None))[:, None]
    moving, _ = follow(limiter, list(turning))
    speed = (moving[-1] - moving[-2])[0] / 0.004
    assert speed == pytest.approx(0.8, abs=1e-3)
    stopping, limited = follow(limiter, [None] * 200)
    assert limited.all() and limiter.at_rest
    assert_kept(np.concatenate([HOME[None], moving, stopping]), 0.004)
    rest = int(np.argmax((np.diff(stopping, axis=0) == 0).all(axis=1)))
    # The shortest possible with these limits takes speed / acceleration + acceleration / jerk.
    best_s = 0.8 / LIMITS.acceleration_rad_s2[0] + LIMITS.acceleration_rad_s2[0] / LIMITS.jerk_rad_s3[0]
    assert rest * 0.004 < 1.7 * best_s


def test_other_states_follow_at_once_and_must_be_finite():
    """A gripper after the six joints has no limits of the arm; NaN stops all."""
    limiter = Limiter(LIMITS, 0.004, others=1)
    limiter.reset(np.append(HOME, 0.1))
    assert limiter.step(np.append(HOME, 0.9)).command_rad[6] == 0.9
    assert not limiter.step(np.append(HOME, 0.2)).limited
    step = limiter.step(np.append(HOME, np.nan))
    assert step.limited and np.isfinite(step.command_rad).all()


def test_a_start_outside_the_limits_is_refused():
    """From there no command keeps them: the error says which part is where."""
    limiter = Limiter(LIMITS, 0.004)
    with pytest.raises(LimitError, match="tool's tip at z -0.100 m, outside 0.01"):
        limiter.reset(inverse_kinematics((-0.55, 0.0, -0.1)))
    with pytest.raises(LimitError, match="outside the limits"):
        limiter.reset(np.full(6, 7.0))


BAD_FILES = {
    "jerk: 3": "found jerk; expected some of low_rad",
    "jerk_rad_s3: fast": "jerk_rad_s3 is 'fast'; expected a finite number, or 6 of them",
    "speed_rad_s: [1, 2]": "expected a finite number, or 6 of them",
    "acceleration_rad_s2: 0": "expected more than 0",
    "speed_rad_s: 4": "beyond what the UR10e can do",
    "high_rad: 7": "beyond what the UR10e can do",
    "tool_low_m: [0, 0, 2]": "tool_low_m is not below tool_high_m",
    "- 1": "found list; expected",
    "a: [": "cannot be read",
}


@pytest.mark.parametrize("text", BAD_FILES)
def test_a_file_of_limits_is_read_or_refused(tmp_path: Path, text: str):
    """--limits: names of Limits, one number or six; unknown keys and what the robot cannot do are one line."""
    file = tmp_path / "limits.yaml"
    file.write_text("jerk_rad_s3: 50\nspeed_rad_s: [1, 1, 1, 2, 2, 2]\ntracking_rad: 0.1\n")
    limits = read_limits(file)
    assert limits.jerk_rad_s3.tolist() == [50] * 6 and limits.speed_rad_s[5] == 2 and limits.tracking_rad == 0.1
    np.testing.assert_array_equal(read_limits(None).speed_rad_s, SPEED_LIMIT_RAD_S)
    file.write_text(text)
    with pytest.raises(PolicyError) as caught:
        read_limits(file)
    assert BAD_FILES[text] in str(caught.value) and "\n" not in str(caught.value)
