"""`--robot ros2` over real middleware: the runner in one process, sim.ros2_arm in another, on loopback."""

from __future__ import annotations

import json
import re
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from ur10e_deploy import run
from ur10e_deploy.config import PolicyError
from ur10e_deploy.recording import camera_topics, recorded_topics
from ur10e_deploy.robot import RobotOptions, open_robot
from ur10e_deploy.ros2_robot import order_of, read_options

from tests.robots import contract
from tests.ros2 import Arm, needs_ros2, start_in_ros2
from tests.test_limiter import assert_kept
from ur10e import JOINT_NAMES

HZ = 125.0
SMALL = ("--seed", "11", "--height", "32", "--width", "48")  # as tests/ros2_runner.py's expert
FAULT_S = 1.1  # after the arm began to move: in the middle of the first stroke
SCENES = {  # what happens in each scene, one after the other
    "nothing": [],
    "camera dies": [f"camera:{FAULT_S}"],
    "joint states away and back": [f"joints:{FAULT_S}:{FAULT_S + 0.5}"],
    "protective stop and release": [f"protective stop:{FAULT_S}:{FAULT_S + 0.3}"],
    "second publisher": [f"joint publisher:{FAULT_S}"],
    "trained by header stamps": [],
    "another controller": [],
}
pytestmark = pytest.mark.xdist_group("ros2")  # one worker runs them: real time, and one domain


@dataclass
class Scene:
    """What the runner said of a scene, and the arm's own log."""

    said: dict[str, Any]
    log: dict[str, np.ndarray]

    @property
    def commands(self) -> np.ndarray:
        """(N, 6) as they came, from where the arm stood."""
        return np.concatenate([self.log["path_rad"][:1], self.log["command_rad"]])

    def moving(self) -> np.ndarray:
        """(T,) whether the arm moved, by more than 1 mrad/s."""
        return np.abs(np.diff(self.log["path_rad"], axis=0)).max(axis=1) * self.log["path_hz"] > 1e-3


@pytest.fixture(scope="module")
def scenes(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Scene]:
    """All of SCENES in lock step: what happens does not depend on how busy the machine is."""
    folder = tmp_path_factory.mktemp("ros2")
    faults = [f"{scene}:{fault}" for scene, of in enumerate(SCENES.values()) for fault in of]
    options = ["--joints", ",".join(reversed(JOINT_NAMES)), *(word for fault in faults for word in ("--fault", fault))]
    with Arm(folder, "--lock-step", *SMALL, *options) as arm:
        by_header, absent = list(SCENES).index("trained by header stamps"), list(SCENES).index("another controller")
        program = ["-m", "tests.ros2_runner", "--lock-step", "--scenes", str(len(SCENES)), "--seconds", "5.5"]
        program += ["--by-header", f"{by_header}:-0.05"]  # pictures newer than the joints: these are 0.016 s older
        runner = start_in_ros2([*program, "--absent-controller", str(absent)], arm.domain)
        try:
            output, _ = runner.communicate(timeout=290)
        finally:
            runner.kill()  # one that did not end in time
        assert runner.returncode == 0, output
        arm.stop()
        said = [json.loads(line) for line in output.splitlines() if line.startswith("{")]
        return {what: Scene(said[i], arm.log(i)) for i, what in enumerate(SCENES)}


@needs_ros2
def test_the_expert_does_its_task_over_ros_2(scenes: dict[str, Scene]):
    """Joint states and pictures in, commands out, through a controller with an order of its own: the block is touched,
    no command is lost or doubled, and what is not watched is said."""
    scene = scenes["nothing"]
    assert scene.said["orderly"] and scene.said["outcome"]["success"], scene.said
    assert scene.said["limited"] == 0
    assert len(scene.log["command_rad"]) == scene.said["periods"]  # none lost, none doubled
    assert_kept(scene.commands, 1 / HZ)
    notes = "\n".join(scene.said["notes"])
    assert "not watched: safety mode (protective and emergency stop): ur_dashboard_msgs cannot be imported" in notes
    assert "not watched: whether forward_position_controller is active: controller_manager_msgs cannot" in notes
    assert "nobody" not in notes and "order" not in notes  # all else is there, and watched


@needs_ros2
def test_a_camera_that_dies_holds_the_arm(scenes: dict[str, Scene]):
    """Within its limits, and the run ends when the camera does not come back."""
    scene = scenes["camera dies"]
    assert "not well again within 2 s: camera color: the last is" in scene.said["ended"]
    assert [stop["kind"] for stop in scene.said["stops"]] == ["holding", "ending"]
    assert not scene.said["outcome"]["success"]
    stopped_s = np.flatnonzero(scene.moving())[-1] / scene.log["path_hz"] - scene.log["moved_s"] - FAULT_S
    assert 0.2 < stopped_s < 0.8  # its age of 0.25 s, braking, the lag
    assert_kept(scene.commands, 1 / HZ)


@needs_ros2
def test_joint_states_that_come_back_go_on(scenes: dict[str, Scene]):
    """The arm stands meanwhile, and does its task from there."""
    scene = scenes["joint states away and back"]
    assert scene.said["orderly"] and scene.said["outcome"]["success"], scene.said
    (hold,) = [stop for stop in scene.said["stops"] if stop["kind"] == "holding"]
    assert hold["why"].startswith("joint states: the last is 0.1") and 0.3 < hold["resumed_s"] - hold["at_s"] < 1.0
    assert_kept(scene.commands, 1 / HZ)


@needs_ros2
@pytest.mark.parametrize("what", ["protective stop and release", "second publisher"])
def test_a_halt_ends_the_robots_program(what: str, scenes: dict[str, Scene]):
    """Nothing is commanded any more, and the controller's last command is not gone on to when the stop is released."""
    scene = scenes[what]
    why = "speed scaling is 0%" if "stop" in what else "2 nodes publish /joint_states, expected 1"
    assert why in scene.said["ended"] and scene.said["stops"][-1]["kind"] == "halted"
    assert not scene.log["program_running"], "the robot's program would follow the last command"
    path, hz = scene.log["path_rad"], scene.log["path_hz"]
    halted = int(scene.log["command_s"][-1] * hz) + 1
    assert len(path) - halted > 0.5 * hz  # released 0.3 s after the stop: that is in the log
    assert not scene.moving()[halted + int(0.45 * hz) :].any()
    assert np.abs(path[-1] - path[halted]).max() < 0.05
    assert_kept(scene.commands, 1 / HZ)


@needs_ros2
def test_pictures_older_than_in_training_are_refused(scenes: dict[str, Scene]):
    """By header stamps, if training paired by them; before any command."""
    scene = scenes["trained by header stamps"]
    said = r"camera color: by header stamps its pictures are 0\.0[01]\d s older than the joint states when they arrive"
    assert re.match(said, scene.said["error"]) and not len(scene.log["command_rad"])


@needs_ros2
def test_commands_that_nobody_takes_are_refused(scenes: dict[str, Scene]):
    """A controller that is not loaded: before the arm is thought to move."""
    said = scenes["another controller"].said["error"]
    assert said.startswith("nobody listens to /absent_position_controller/commands; load and activate absent_position")


@needs_ros2
def test_a_runner_that_is_killed_leaves_an_arm_that_goes_to_its_last_command_and_stands(tmp_path: Path):
    """SIGKILL in the middle of a stroke, by the wall clock, through a trajectory controller, with JPEG as pictures: in
    the arm's own log."""
    camera = ("--camera-topic", "/wrist/image_raw/compressed")
    with Arm(tmp_path, *SMALL, *camera) as arm:
        busy = ["--max-gap-s", "99", "--max-age-s", "20"]  # a test beside others
        runner = start_in_ros2(
            ["-m", "tests.ros2_runner", "--controller", "joint_trajectory_controller", *camera, *busy], arm.domain
        )
        assert runner.stdout is not None
        said = []
        while not (said and said[-1].rstrip().endswith("running")):
            assert (line := runner.stdout.readline()), said
            said.append(line)
        time.sleep(1.5)
        runner.kill()
        runner.communicate()
        time.sleep(1.0)
        arm.stop()
        scene = Scene({}, arm.log(0))
    moving = scene.moving()
    killed = int(scene.log["command_s"][-1] * scene.log["path_hz"])
    assert moving[: killed + 1].any() and not moving[-50:].any()
    np.testing.assert_allclose(scene.log["path_rad"][-1], scene.log["command_rad"][-1], atol=1e-4)
    assert_kept(scene.commands, 1 / HZ)


def test_without_rclpy_one_line_says_what_to_source(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
):
    """And states that are no joints are refused; --ros2 is for no other robot."""
    monkeypatch.setitem(sys.modules, "rclpy", None)
    extra = {"contract": contract(), "commanding": True}
    with pytest.raises(PolicyError) as caught:
        open_robot("ros2", RobotOptions(HZ, True, {"color": (32, 48)}, (), extra))
    assert re.match(
        r"--robot ros2: rclpy cannot be imported by this Python \(3\.\d+\): .*; source ROS 2", str(caught.value)
    )
    monkeypatch.setattr("ur10e_deploy.ros2_robot.import_ros", lambda: None)
    with pytest.raises(PolicyError, match=r"the policy has states that are no joints \(gripper\)"):
        open_robot("ros2", RobotOptions(HZ, True, {"color": (32, 48)}, ("gripper",), extra))
    assert run.main(["--checkpoint", "none", "--robot", "sim", "--ros2", "x.yaml"]) == 1
    assert "error: --ros2: is of --robot ros2, not of sim" in capsys.readouterr().err


def test_topics_are_those_that_training_read():
    """Compressed ones, too; a recording of the run has whole pictures, on a topic whose name promises no others."""
    compressed = contract(data_settings={"camera_topic": "/wrist/image_raw/compressed"})
    assert recorded_topics(compressed) == {"color": "/wrist/image_raw/compressed"}
    assert camera_topics(compressed) == {"color": "/wrist/image_raw"}
    assert recorded_topics(contract()) == {"color": "/camera/color/image_raw"}


def test_options_are_read_and_mistakes_named(tmp_path: Path):
    """Controllers by their names, joints in the controller's order with its prefix; else one line with the key."""
    file = tmp_path / "ros2.yaml"
    assert read_options(None).command_topic == "/forward_position_controller/commands"
    file.write_text("controller: scaled_joint_trajectory_controller\njoint_publishers: 2")
    assert read_options(file).command_topic == "/scaled_joint_trajectory_controller/joint_trajectory"
    file.write_text(f"joints: {[f'left_{name}' for name in reversed(JOINT_NAMES)]}")
    assert order_of(read_options(file).joints) == [5, 4, 3, 2, 1, 0]
    assert order_of([*JOINT_NAMES[:5], JOINT_NAMES[0]]) == [] == order_of([*JOINT_NAMES, "finger_joint"])
    for text, said in (
        ("controler: x", "found controler; expected some of controller, joints"),
        ("controller: forward_velocity_controller", "expected a name that ends with position_controller or traj"),
        ("joints: [elbow_joint]", "joints is ['elbow_joint']; expected a list of shoulder_pan_joint"),
        ("camera_topics: {color: image}", "expected camera: topic"),
        ("joint_publishers: 0", "joint_publishers is 0; expected 1 or more"),
        ("lock_step: 1", "lock_step is 1; expected true or false"),
        ("- a", "found list; expected some of"),
    ):
        file.write_text(text)
        with pytest.raises(PolicyError) as caught:
            read_options(file)
        assert said in str(caught.value) and str(file) in str(caught.value)
