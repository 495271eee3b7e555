"""`--robot rtde`: the real ur_rtde against sim.rtde_arm as the controller, in a process of its own, whose log says what
the arm did."""

from __future__ import annotations

import importlib.util
import multiprocessing
import os
import re
import sys
import time
from contextlib import closing
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import pytest
from ur10e_deploy import run
from ur10e_deploy.cameras import RETRY_S, Cameras
from ur10e_deploy.config import PolicyError
from ur10e_deploy.control import HALTED
from ur10e_deploy.robot import RobotOptions, open_robot

from sim.rtde_arm import LOST, PROTECTIVE, SLOWED, WATCHED
from sim.scene import Renderer
from sim.world import World, judge
from tests.robots import HZ, RtdeArm, contract, make_rtde_loop, open_rtde
from tests.test_limiter import assert_kept
from ur10e import tool_tip

MISSING = importlib.util.find_spec("rtde_control") is None and not (os.environ.get("CI") and sys.version_info < (3, 13))
needs_ur_rtde = pytest.mark.skipif(MISSING, reason="no ur_rtde: it has wheels for Python 3.10 to 3.12")
pytestmark = pytest.mark.xdist_group("rtde")  # real time: one at a time


def assert_within_limits(arm: RtdeArm) -> None:
    assert len(arm.received) > 20
    assert_kept(np.concatenate([arm.path_rad[:1], arm.targets_rad]), 1 / HZ)


@needs_ur_rtde
def test_the_expert_does_its_task_through_rtde(tmp_path: Path):
    """In real time: every command arrives bit by bit, none breaks a limit, pictures are the scene's, the block is
    touched, and at the end nothing runs on the controller."""
    with RtdeArm(tmp_path) as arm:
        loop, robot = make_rtde_loop(arm, {"servo_lookahead_s": 0.05, "servo_gain": 500.0})
        with closing(robot):
            with pytest.raises(PolicyError, match="a program runs on the robot; stop it"):
                open_rtde(arm)
            loop.run()
            seen = robot.pictures()["color"].rgb
    assert loop.orderly and loop.ended == "it is there"
    np.testing.assert_array_equal(arm.targets_rad, np.array(loop.log.command_rad)[loop.log.sent])
    np.testing.assert_array_equal(arm.received[:, 7:], np.broadcast_to([0.05, 500.0], (len(arm.received), 2)))
    assert_within_limits(arm)
    world = World(11, 0, 32, 48)
    there = Renderer(world.scene, 32, 48).render(arm.path_rad[-1])
    assert np.abs(seen.astype(int) - there).mean() < 8  # JPEG and noise; red for blue is 30
    assert judge(world.scene, tool_tip(arm.path_rad), 500).success
    assert list(arm.events)[0] == "program started" and list(arm.events)[-1].startswith("program stopped")


# the fault -> (options of the controller, why the run ended, as a pattern, what the controller did for it)
FAULTS: dict[str, tuple[list[str], str, str]] = {
    PROTECTIVE: (["--lasts-s", "1.5"], "protective stop", "program stopped: by the dashboard"),
    SLOWED: ([], "speed scaling is 50%, expected 100 %", "stopl(4)"),
    LOST: ([], " is lost: (it was closed|Timeout connecting)", "program stopped: the watchdog heard nothing"),
}


@needs_ur_rtde
@pytest.mark.parametrize("fault", FAULTS)
def test_a_fault_while_it_moves_halts_the_arm_for_good(fault: str, tmp_path: Path):
    """Not one command more, the program on the robot ended so that nobody's "play" moves the arm on, and it stands."""
    options, why, done = FAULTS[fault]
    with RtdeArm(tmp_path, "--fault", fault, "--at-rad-s", "0.15", *options) as arm:
        loop, robot = make_rtde_loop(arm)
        with closing(robot):
            loop.run()
            assert re.search(why, loop.ended) and loop.log.stops[-1].kind == HALTED, loop.ended
        if fault == PROTECTIVE:
            arm.wait_for("released")
        elif fault == LOST:
            arm.wait_for(done)
    assert done in arm.events and "somebody pressed play" not in arm.events, arm.events
    at_s = arm.events[f"fault: {fault}"]
    assert (arm.received[:, 0] < at_s + 1.0).all() and arm.received[-1, 0] < len(arm.path_rad) / 500 - 0.4
    assert_within_limits(arm)
    assert arm.moving()[round(at_s * 500) - 1] > 0.15 and not arm.moving()[-5:].any()


def run_until_killed(arm: RtdeArm) -> None:
    make_rtde_loop(arm)[0].run()


@needs_ur_rtde
def test_a_killed_runner_leaves_an_arm_that_stands_and_no_program(tmp_path: Path):
    """SIGKILL while it moves: the arm goes to its last command and no further, and the watchdog ends the program."""
    with RtdeArm(tmp_path, "--fault", WATCHED, "--at-rad-s", "0.15") as arm:
        runner = multiprocessing.get_context("fork").Process(target=run_until_killed, args=(arm,))
        runner.start()
        arm.wait_for("fault")
        runner.kill()
        arm.wait_for("program stopped: the watchdog heard nothing")
        runner.join()
    assert runner.exitcode == -9
    assert_within_limits(arm)
    np.testing.assert_allclose(arm.path_rad[-1], arm.targets_rad[-1], atol=1e-3)
    assert not arm.moving()[-5:].any()


@needs_ur_rtde
def test_a_dry_run_uploads_no_program_and_what_is_wrong_is_one_line(tmp_path: Path):
    """A person's program goes on running beside a dry run; who cannot be asked, and what cannot be, is named."""
    command = ["--checkpoint", "x", "--robot", "rtde", "--servo-gain", "400", "--camera", "color=2"]
    args = run.parser().parse_args([*command, "--host", "h", "--dry-run"])
    said = run.robot_options(args, contract(), ()).extra
    assert (said["host"], said["servo_gain"], said["camera"], said["commanding"]) == ("h", 400, ["color=2"], False)
    assert run.robot_options(run.parser().parse_args(command), contract(), ()).extra["commanding"]
    with RtdeArm(tmp_path) as arm:
        wrong: dict[str, dict[str, Any]] = {
            "--host is missing": dict(host=None),
            "--host 127.0.0.1: nobody answers at port 30004 (RTDE)": dict(host="127.0.0.1"),
            "--camera: found none; expected one for each of color": dict(camera=None),
            "--camera color: expected NAME=SOURCE": dict(camera=["color"]),
            "color is a already": dict(camera=["color=a", "color=b"]),
            "--camera color=/dev/none: OpenCV cannot open it": dict(camera=["color=/dev/none"]),
            "--servo-gain is 5; expected 100 to 2000": dict(servo_gain=5.0),
            "the policy has gripper, and RTDE brings joints alone": dict(others=("gripper",)),
        }
        for message, changes in wrong.items():
            with pytest.raises(PolicyError) as caught:
                open_rtde(arm, commanding=False, **changes)
            assert message in str(caught.value) and "\n" not in str(caught.value)
        with closing(open_rtde(arm, commanding=False)) as robot:
            assert robot.status().troubles() == []
    assert not arm.events and not len(arm.received)


def test_without_ur_rtde_one_line_says_what_to_install(monkeypatch: pytest.MonkeyPatch):
    """Nothing else of the robot side needs it."""
    monkeypatch.setitem(sys.modules, "rtde_control", None)
    with pytest.raises(PolicyError, match="pip install ur-rtde==1.6.5"):
        open_robot("rtde", RobotOptions(HZ, True, {}))


def test_a_camera_that_ends_is_opened_again(tmp_path: Path):
    """Whatever the reason: the watchdog sees its age meanwhile. A film of three pictures goes on for ever."""
    film = tmp_path / "film.avi"
    writer = cv2.VideoWriter(str(film), cv2.VideoWriter.fourcc(*"MJPG"), 30, (48, 32))
    for _ in range(3):
        writer.write(np.full((32, 48, 3), (200, 50, 0), np.uint8))  # BGR
    writer.release()
    cameras = Cameras({"color": str(film)}, {"color": (32, 48)}, time.perf_counter)
    began_s = time.perf_counter()
    while cameras.stamps().get("color", 0.0) < began_s + 2 * RETRY_S:
        assert time.perf_counter() < began_s + 20
        time.sleep(0.05)
    red, _, blue = cameras.pictures()["color"].rgb.mean(axis=(0, 1))
    cameras.close()
    assert red < 40 and blue > 160
