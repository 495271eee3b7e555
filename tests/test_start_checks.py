"""Before a robot moves: a start, pictures and rates unlike training's are refused, each in one line that says what."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
from ur10e_deploy.config import PolicyError
from ur10e_deploy.robot import Picture
from ur10e_deploy.start_checks import check_contract, check_pictures, check_pose, check_rates, check_start

from sim.expert import random_episode
from sim.faults import CAMERA, JOINTS, PROTECTIVE, Fault
from tests.robots import HZ, SIGNS, contract, make_loop

ORDER = [5, 4, 3, 2, 1, 0]  # the contract's
STARTS = np.array([random_episode(3, i)[1].start_rad for i in range(20)])[:, ORDER] * SIGNS
KNOWN = contract(start_states=tuple(map(tuple, STARTS)))
GREY = np.full((32, 48, 3), 100, np.uint8)
SEEN = replace(KNOWN, start_brightness={"color": (90.0, 120.0)}, recorded_shapes={"color": ((32, 48),)})


def pictures(rgb: np.ndarray, stamp_s: float = 1.0) -> dict[str, Picture]:
    return {"color": Picture(stamp_s, rgb)}


def test_a_start_like_training_is_taken_and_one_far_away_refused():
    """The error names the joint, how far it is and from what; a turn more of a wrapped joint is the same place."""
    assert "from the nearest start" in check_pose(KNOWN, STARTS[3] + 0.02, False)[0]
    far = STARTS[3] + [0, 0, 0.9, 0, 0, 0]
    with pytest.raises(PolicyError, match=r"wrist_1 is at .* rad away, expected 0\.\d+ rad at most") as caught:
        check_pose(KNOWN, far, True)  # --allow-unknown-start is for what is not known
    assert "0.8" in str(caught.value) or "0.9" in str(caught.value)
    wrapped = replace(KNOWN, wrap_angles=True)
    assert check_pose(wrapped, STARTS[3] + [2 * np.pi, 0, 0, 0, 0, 0], False)
    with pytest.raises(PolicyError, match="wrist_3"):
        check_pose(KNOWN, STARTS[3] + [2 * np.pi, 0, 0, 0, 0, 0], False)


def test_every_start_of_training_is_near_the_others():
    """The tolerance counts from how far training's own starts are apart: a new one of the same kind passes."""
    for i in range(20, 40):
        start = random_episode(3, i)[1].start_rad[ORDER] * SIGNS
        check_pose(KNOWN, start, False)


def test_a_checkpoint_that_knows_no_starts_needs_a_word():
    """Older ones: said, and refused without --allow-unknown-start."""
    with pytest.raises(PolicyError, match="does not say from where training episodes began .* --allow-unknown-start"):
        check_pose(contract(), STARTS[0], False)
    assert "was not checked" in check_pose(contract(), STARTS[0], True)[0]


PICTURES = {
    "another size": (np.full((64, 48, 3), 100, np.uint8), "camera color: pictures are 64x48 (HxW), in training 32x48"),
    "black": (GREY * 0, "camera color: its picture is black"),
    "white": (GREY * 0 + 255, "camera color: its picture is white"),
    "dark": (GREY // 3, "its mean grey level is 33, episodes of training began with 90 to 120"),
    "bright": (GREY * 2 + 10, "its mean grey level is 210"),
}


@pytest.mark.parametrize("what", PICTURES)
def test_a_picture_unlike_training_is_refused(what: str):
    """Size, black, white, and far darker or brighter than what episodes began with."""
    rgb, message = PICTURES[what]
    assert check_pictures(SEEN, pictures(GREY), pictures(GREY, 2.0), False) == []
    with pytest.raises(PolicyError) as caught:
        check_pictures(SEEN, pictures(rgb), pictures(rgb, 2.0), False)
    assert message in str(caught.value)


def test_a_frozen_camera_is_refused():
    """No new picture; or a new time with the very same pixels, from a camera that has noise."""
    for last, noisy in ((pictures(GREY, 1.0), False), (pictures(GREY, 2.0), True)):
        with pytest.raises(PolicyError, match="camera color: its picture is frozen"):
            check_pictures(SEEN, pictures(GREY, 1.0), last, noisy)
    with pytest.raises(PolicyError, match="camera color: no picture; the robot has wrist"):
        check_pictures(SEEN, pictures(GREY), {"wrist": Picture(1.0, GREY)}, False)
    unknown = check_pictures(KNOWN, pictures(GREY), pictures(GREY, 2.0), False)
    assert unknown == ["camera color: how bright training was is not in the checkpoint, and was not checked"]
    with pytest.raises(PolicyError, match="in training 32x48"):  # never resized: the size is known all the same
        check_pictures(KNOWN, pictures(GREY[:16]), pictures(GREY[:16], 2.0), False)


def test_wrong_rates_and_no_contract_are_refused():
    """A camera or joints slower than the policy's frames; a checkpoint that says no rate."""
    check_rates(KNOWN, 30.0, 125.0, {"color": 29.9})
    with pytest.raises(PolicyError, match="camera color: pictures come at 15.0 Hz, expected about the policy's 30 Hz"):
        check_rates(KNOWN, 30.0, 125.0, {"color": 15.0})
    with pytest.raises(PolicyError, match="joint states come at 10 Hz"):
        check_rates(KNOWN, 30.0, 10.0, {"color": 30.0})
    with pytest.raises(PolicyError, match="no contract of train.py"):
        check_contract(replace(KNOWN, fps=None), True)
    assert check_contract(KNOWN, True) == 30.0


AT_THE_ROBOT = {
    "nothing wrong": ([], None),
    "no camera": ([Fault(CAMERA, 0.0)], "camera color: pictures come at 1.0 Hz"),
    "no joints": ([Fault(JOINTS, 0.0)], "joint states come at 1 Hz"),
    "stopped": ([Fault(PROTECTIVE, 0.0)], "the robot is not ready: protective stop"),
}


@pytest.mark.parametrize("what", AT_THE_ROBOT)
def test_the_robot_is_looked_at_before_it_moves(what: str):
    """For a second, without a command, through the interface that the loop uses."""
    faults, message = AT_THE_ROBOT[what]
    _, robot = make_loop(contract(), seconds=1, faults=faults)
    if message is None:
        assert len(check_start(robot, contract(), 30.0, 1 / HZ, allow_unknown=True)) == 2
    else:
        with pytest.raises(PolicyError) as caught:
            check_start(robot, contract(), 30.0, 1 / HZ, allow_unknown=True)
        assert message in str(caught.value)
    assert robot.sent == []


def test_an_arm_that_moves_is_not_started():
    """Somebody moves it: let it come to rest; a shadow may begin then."""
    _, robot = make_loop(contract(), seconds=1, person=True)
    with pytest.raises(PolicyError, match="a joint moved by"):
        check_start(robot, contract(), 30.0, 1 / HZ, allow_unknown=True)
    check_start(robot, contract(), 30.0, 1 / HZ, allow_unknown=True, still=False)
