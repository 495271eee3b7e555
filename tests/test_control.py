"""The control loop over the simulated arm: it does its task, and when something fails it stops as it says."""

from __future__ import annotations

import numpy as np
import pytest
from ur10e_deploy.config import PolicyError
from ur10e_deploy.control import HALTED, HOLDING
from ur10e_deploy.run_report import shadow_errors
from ur10e_deploy.thinking import ArmContract

from sim.faults import CAMERA, CONTROLLER, EMERGENCY, HELD, JOINTS, PROGRAM, PROTECTIVE, SLOWED, Fault
from tests.robots import CHUNK, HZ, contract, make_loop
from tests.test_limiter import assert_kept

MODES = ("absolute", "relative", "delta")


def sent(robot) -> np.ndarray:
    """(N, 6) the commands that the simulator got, from where it stood."""
    return np.concatenate([robot.world.path_rad[:1], [q for _, q in robot.sent]])


def test_the_expert_does_its_task_through_the_loop_and_the_same_every_time():
    """At full speed no command has to be limited, the arm touches the block, and lock step repeats bit by bit."""
    paths = []
    for _ in range(2):
        loop, robot = make_loop(contract(), seconds=4.5)
        loop.run()
        assert loop.orderly and loop.ended == "the 4.5 s are over"
        assert robot.world.outcome().success and not any(loop.log.limited)
        paths.append(sent(robot))
    np.testing.assert_array_equal(*paths)
    assert_kept(paths[0], 1 / HZ)


@pytest.mark.parametrize("mode", MODES)
def test_all_action_modes_lead_to_the_same_place_with_a_gripper(mode: str):
    """Deltas add up from the command, positions are taken, in the policy's order and sign; a gripper goes along."""
    loop, robot = make_loop(contract(mode, others=("gripper",)), seconds=4.5)
    loop.run()
    assert loop.orderly and robot.world.outcome().success
    np.testing.assert_allclose(robot.world.path_rad[-1], robot.world.expert.goal_rad, atol=5e-3)
    assert robot.joints().others["gripper"] > 0.1 and (mode == "delta" or robot.joints().others["gripper"] <= 1.0)


def test_a_speed_fraction_plays_the_same_path_slower():
    """A quarter of the speed and a sixteenth of the acceleration, on the same way: nothing is clipped."""
    paths, speeds = [], []
    for fraction, seconds in ((1.0, 4.5), (0.5, 9.0)):
        loop, robot = make_loop(contract(), seconds, speed_fraction=fraction)
        loop.run()
        path = sent(robot)
        paths.append(path[np.abs(np.diff(path, axis=0)).max(axis=1).cumsum().searchsorted([0.1, 0.3, 0.5])])
        speeds.append(np.abs(np.diff(path, axis=0)).max())
        assert robot.world.outcome().success
    assert speeds[1] / speeds[0] == pytest.approx(0.5, abs=0.05)
    np.testing.assert_allclose(paths[0], paths[1], atol=0.02)


@pytest.mark.parametrize("seam", ["cross-fade", "ensemble"])
def test_latency_costs_late_actions_and_not_the_task(seam: str):
    """300 ms at every inference: the arm never stops for it, late actions are dropped, and the block is touched."""
    loop, robot = make_loop(contract(), seconds=5, seam=seam, latency_s=lambda _: 0.3, replan_frames=5)
    loop.run()
    assert loop.orderly and robot.world.outcome().success
    assert loop.playback.late > 20 and [stop.kind for stop in loop.log.stops] == ["ending"]
    moving = np.abs(np.diff(sent(robot), axis=0)).max(axis=1) > 1e-5
    first, last = np.flatnonzero(moving)[[0, -1]]
    assert moving[first : int(2.5 * HZ)].all() and last > 2.5 * HZ


def test_a_policy_that_is_too_late_holds_the_arm_and_goes_on():
    """When a chunk is played and the next is not there, the arm brakes; the answer starts it again from there."""
    slow = {2: 1.9}
    loop, robot = make_loop(contract(), seconds=7, latency_s=lambda n: slow.get(n, 0.0))
    loop.run()
    assert loop.orderly and robot.world.outcome().success
    hold = loop.log.stops[0]
    assert hold.kind == HOLDING and "its last chunk is played" in hold.why and hold.resumed_s is not None
    assert_kept(sent(robot), 1 / HZ)


def test_a_policy_that_hangs_is_not_followed_to_the_end_of_its_chunk():
    """Played slowly, a chunk lasts for seconds: what it saw is too old before, and the arm is held."""
    loop, robot = make_loop(contract(), 20, latency_s=lambda n: 99.0 if n == 1 else 0.0, speed_fraction=0.25)
    loop.run()
    hold = loop.log.stops[0]
    assert hold.why.startswith("policy: the last is 3.6") and "expected 3.67 s at most" in hold.why
    assert hold.rest_s is not None and "not well again within 2 s: policy: the last is" in loop.ended
    assert loop.playback.end_frame > loop._frame + 10  # there was more to play


def nan_once(number: int, chunk: np.ndarray) -> np.ndarray:
    return np.full_like(chunk, np.nan) if number == 2 else chunk


def nan_always(number: int, chunk: np.ndarray) -> np.ndarray:
    return np.full_like(chunk, np.nan) if number >= 2 else chunk


def bug(number: int, chunk: np.ndarray) -> np.ndarray:
    raise IndexError("somewhere in a library")


# what fails -> (make_loop's arguments, how the run ends, whether it goes on in between)
RECOVERABLE = {
    "camera dies": (dict(faults=[Fault(CAMERA, 1.0)]), "not well again within 2 s: camera color: the last is", False),
    "camera away for 1 s": (dict(faults=[Fault(CAMERA, 1.0, 2.0)]), "the 6 s are over", True),
    "joints away for 0.05 s": (dict(faults=[Fault(JOINTS, 1.0, 1.05)]), "the 6 s are over", None),
    "joints away for 0.5 s": (dict(faults=[Fault(JOINTS, 1.0, 1.5)]), "the 6 s are over", True),
    "joints away for 3 s": (dict(faults=[Fault(JOINTS, 1.0, 4.0)]), "not well again within 2 s: joint states", False),
    "NaN once": (dict(spoil=nan_once), "the 6 s are over", True),
    "NaN always": (
        dict(spoil=nan_always),
        "not well again within 2 s: the policy: the policy's actions are not",
        False,
    ),
    "a fault in the policy": (dict(spoil=bug), "not well again within 2 s: the policy: IndexError: somewhere", False),
}


@pytest.mark.parametrize("what", RECOVERABLE)
def test_what_falls_silent_stops_the_arm_within_its_limits(what: str):
    """Brake, hold, say why; go on from where the arm is when it speaks in time, else end. Never past a limit."""
    arguments, ended, goes_on = RECOVERABLE[what]
    loop, robot = make_loop(contract(), seconds=6, **arguments)
    loop.run()
    assert ended in loop.ended, loop.ended
    holds = [stop for stop in loop.log.stops if stop.kind == HOLDING]
    if goes_on is None:
        assert not holds
    else:
        assert len(holds) == 1 and (holds[0].resumed_s is not None) == goes_on
        assert holds[0].rest_s is not None and holds[0].rest_s < 0.6
    assert loop.orderly == (goes_on is not False) == robot.world.outcome().success
    assert_kept(sent(robot), 1 / HZ)


@pytest.mark.parametrize("kind", [PROTECTIVE, EMERGENCY, PROGRAM, CONTROLLER, SLOWED])
def test_a_robot_that_stops_by_itself_is_never_moved_again(kind: str):
    """Also when it is well again at once: halt, and not one command more."""
    loop, robot = make_loop(contract(), seconds=6, faults=[Fault(kind, 1.2, 1.3)])
    loop.run()
    assert not loop.orderly and loop.log.stops[-1].kind == HALTED
    assert max(t for t, _ in robot.sent) < 1.2 and robot.clock.now_s() > 1.7
    path = np.array(robot.world.path_rad)
    np.testing.assert_array_equal(path[-1], path[-20])


def test_an_arm_that_does_not_follow_is_halted():
    """A joint 0.2 rad from its command: something holds the arm, or it is not the arm that listens."""
    loop, robot = make_loop(contract(), seconds=4, replan_frames=30, faults=[Fault(HELD, 1.0)])
    loop.run()
    assert "rad from its command, expected 0.2 at most" in loop.ended and loop.log.stops[-1].kind == HALTED


def test_a_stream_that_starved_is_not_taken_up_again():
    """A moving arm that got no command for longer than its driver waits was stopped by it: halt."""
    loop, robot = make_loop(contract(), seconds=4)
    wait_until = robot.clock.wait_until
    robot.clock.wait_until = lambda time_s: wait_until(time_s + (0.06 if 1.3 < time_s < 1.306 else 0.0))
    loop.run()
    assert loop.ended.startswith("no command for 0.0") and loop.log.stops[-1].kind == HALTED
    assert loop.log.missed_periods >= 6 and max(t for t, _ in robot.sent) < 1.31


def test_jumps_are_limited_counted_and_end_the_run():
    """By much: at once. A little, for long: when the time for that is over."""
    rng = np.random.default_rng(0)
    loop, robot = make_loop(contract(), seconds=6, spoil=lambda _, chunk: chunk + rng.uniform(-2, 2, chunk.shape))
    loop.run()
    assert "a command had to be limited by" in loop.ended and not loop.orderly
    assert_kept(sent(robot), 1 / HZ)
    loop, robot = make_loop(
        contract(), seconds=6, seam="none", max_limited_s=0.5, max_beyond_rad=5.0,
        spoil=lambda _, chunk: chunk + rng.uniform(-0.2, 0.2, chunk.shape),
    )  # fmt: skip
    loop.run()
    assert loop.ended == "commands were limited for more than 0.5 s"
    assert sum(loop.log.limited) == pytest.approx(0.5 * HZ, abs=2)
    assert_kept(sent(robot), 1 / HZ)


def test_dry_run_commands_nothing_and_shadow_compares():
    """The arm is moved by a person meanwhile: nothing is sent, and the expert's predictions are where it went."""
    loop, robot = make_loop(contract(), seconds=3, person=True, commanding=False)
    loop.run()
    assert loop.orderly and robot.sent == [] and len(loop.log.answers) > 5
    rows = shadow_errors(loop.log, 30.0)
    assert [row["ahead_s"] for row in rows] == [0.033, 0.533, 1.033] and all(row["mean_rad"] < 0.02 for row in rows)


def test_a_fault_of_the_loop_halts_the_robot():
    """An exception on the way never leaves a command standing."""
    loop, robot = make_loop(contract(), seconds=3)
    loop._watchdog.stale = lambda *_: 1 / 0  # ty: ignore[invalid-assignment]
    with pytest.raises(ZeroDivisionError):
        loop.run()
    assert robot._halted


def test_ctrl_c_brakes_and_ends():
    """stop() ends the run in order: at rest, within the limits."""
    loop, robot = make_loop(contract(), seconds=6)
    advance, loop_stopped = robot._advance, []

    def advance_and_stop():
        advance()
        if robot.world.time_s > 1.5 and not loop_stopped:
            loop_stopped.append(loop.stop("ended by hand"))

    robot._advance = advance_and_stop
    loop.run()
    assert loop.orderly and loop.ended == "ended by hand" and loop.limiter.at_rest and robot.clock.now_s() < 2.2
    assert_kept(sent(robot), 1 / HZ)


def test_a_policy_of_another_arm_is_refused():
    """All six joints, once each, and nothing that is neither a joint nor a named state."""
    with pytest.raises(PolicyError, match="the policy acts on joint_0, .*; expected all of shoulder_pan_joint"):
        ArmContract(contract(state_names=tuple(f"joint_{i}" for i in range(6))))
    with pytest.raises(PolicyError, match="acts on finger_joint, which are no joints of a UR"):
        ArmContract(contract(others=("finger_joint",), state_topics={}))


def test_the_chunk_is_long_enough_for_these_tests():
    """They rely on a chunk that outlasts 300 ms of latency at full speed."""
    assert CHUNK / 30 > 0.3 + 10 / 30
