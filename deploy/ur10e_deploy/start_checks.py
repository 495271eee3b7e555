"""May this policy move this arm now? Looked at before the first command, each refusal in one line.

Knows: what training saw of starts, pictures and rates (the contract), and what the robot shows now.
Must not know: how an arm is moved.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from rosbag_dataset import BLACK_BELOW, WHITE_ABOVE, wrap_to_pi

from .config import PolicyError, RobotContract
from .robot import Picture, Robot

LOOK_S = 1.0  # how long the robot is looked at
# Beyond how far training's own starts lie from each other: a centimetre or two at the UR10e's reach.
START_TOLERANCE_RAD = 0.1
DARKER, BRIGHTER = 0.6, 1.6  # times the darkest and the brightest picture that an episode of training began with
RATE_SHARE = 0.8  # of the policy's fps, that a camera must send


@dataclass(frozen=True)
class Seen:
    """What the robot showed within `seconds`, while it stood.

    Attributes:
        joint_hz: rate of joint readings.
        picture_hz: camera -> rate of its pictures.
        first, last: camera -> its picture at the start and at the end.
        state: (S,) the policy's state at the end.
        moved_rad: how far a joint moved meanwhile.
    """

    joint_hz: float
    picture_hz: dict[str, float]
    first: Mapping[str, Picture]
    last: Mapping[str, Picture]
    state: np.ndarray
    moved_rad: float


def look(robot: Robot, contract: RobotContract, period_s: float, seconds: float = LOOK_S) -> Seen:
    """Watch the robot for some time, without a command.

    Raises:
        PolicyError: nothing comes, or not what the policy needs.
    """
    clock = robot.clock
    began_s = clock.now_s()
    joints: set[float] = set()
    stamps: dict[str, set[float]] = {camera: set() for camera in contract.cameras}
    first: dict[str, Picture] = {}
    positions = []
    for period in range(1, max(2, round(seconds / period_s)) + 1):
        clock.wait_until(began_s + period * period_s)
        if (reading := robot.joints()) is not None and reading.stamp_s not in joints:
            joints.add(reading.stamp_s)
            positions.append(reading.position_rad)
        for camera, stamp_s in robot.picture_stamps().items():
            if camera in stamps:
                stamps[camera].add(stamp_s)
        if not first and all(stamps.values()):
            first = dict(robot.pictures())
    reading = robot.joints()
    if reading is None:
        raise PolicyError(f"no joint state within {seconds:g} s; is the robot's driver running?")
    if silent := [camera for camera, times in stamps.items() if not times]:
        raise PolicyError(f"no picture of camera {', '.join(silent)} within {seconds:g} s; is it running?")
    took_s = clock.now_s() - began_s
    return Seen(
        joint_hz=len(joints) / took_s,
        picture_hz={camera: len(times) / took_s for camera, times in stamps.items()},
        first=first,
        last=robot.pictures(),
        state=contract.state_from_robot(reading.names, reading.position_rad, reading.others),
        moved_rad=float(np.ptp(np.array(positions), axis=0).max()) if positions else 0.0,
    )


def check_contract(contract: RobotContract, has_contract: bool) -> float:
    """The policy's frames per second.

    Raises:
        PolicyError: the checkpoint has no contract, or one that names no rate.
    """
    if not has_contract or contract.fps is None:
        raise PolicyError(
            f"{contract.source}: the checkpoint has no contract of train.py: in which order joints are, what actions "
            "mean and how fast they follow each other is not known, and no arm is moved by guesses"
        )
    return contract.fps


def check_pose(contract: RobotContract, state: np.ndarray, allow_unknown: bool) -> list[str]:
    """Refuse a start far from all of training's; -> notes.

    Far is further from the nearest of them, in its worst joint, than START_TOLERANCE_RAD beyond the largest such
    distance between those starts themselves.

    Raises:
        PolicyError: it is far, or training's starts are not known and `allow_unknown` is not set.
    """
    if not contract.start_states:
        said = "the checkpoint does not say from where training episodes began"
        if not allow_unknown:
            raise PolicyError(
                f"{contract.source}: {said} (older ones do not); bring the arm to such a pose and add "
                "--allow-unknown-start, or train again"
            )
        return [f"{said}: whether this is such a pose was not checked"]
    angles = np.array([unit == "rad" for unit in contract.units])
    starts, here = np.array(contract.start_states)[:, angles], contract.wrap(state)[angles]
    wrapped = contract.wrapped[angles]

    def apart(a: np.ndarray, b: np.ndarray) -> np.ndarray:
        return np.abs(np.where(wrapped, wrap_to_pi(a - b), a - b))

    between = apart(starts[:, None], starts[None]).max(axis=2)
    np.fill_diagonal(between, np.inf)
    spacing = float(between.min(axis=1).max()) if len(starts) > 1 else 0.0
    away = apart(starts, here)
    nearest = int(away.max(axis=1).argmin())
    joint = int(away[nearest].argmax())
    allowed, found = spacing + START_TOLERANCE_RAD, float(away[nearest, joint])
    if found > allowed:
        name = np.array(contract.state_labels)[angles][joint]
        raise PolicyError(
            f"the arm is far from every start of training: {name} is at {here[joint]:.3f} rad, at the nearest start "
            f"{starts[nearest, joint]:.3f} rad, {found:.3f} rad away, expected {allowed:.3f} rad at most; move it there"
        )
    return [f"start pose {found:.3f} rad from the nearest start of training (at most {allowed:.3f})"]


def check_pictures(
    contract: RobotContract, first: Mapping[str, Picture], last: Mapping[str, Picture], noisy: bool
) -> list[str]:
    """Refuse pictures unlike training's: another size, black, white, frozen, much darker or brighter; -> notes.

    Args:
        contract: what training saw.
        first: a picture of each camera.
        last: one of each, some time later.
        noisy: a camera whose two pictures are equal bit by bit is frozen.

    Raises:
        PolicyError: camera and what is wrong with it.
    """
    notes = []
    for camera, seen in contract.cameras.items():
        if camera not in last:
            raise PolicyError(f"camera {camera}: no picture; the robot has {', '.join(last) or 'none'}")
        rgb = last[camera].rgb
        shape = (rgb.shape[0], rgb.shape[1])
        shapes: Sequence[tuple[int, int]] = contract.recorded_shapes.get(camera, ())
        if not shapes and contract.image_resize is None:
            shapes = (seen,)
        if shapes and shape not in shapes:
            expected = " or ".join(f"{h}x{w}" for h, w in shapes)
            raise PolicyError(f"camera {camera}: pictures are {shape[0]}x{shape[1]} (HxW), in training {expected}")
        if int(rgb.max()) < BLACK_BELOW or int(rgb.min()) > WHITE_ABOVE:
            raise PolicyError(f"camera {camera}: its picture is {'black' if rgb.max() < BLACK_BELOW else 'white'}")
        if last[camera].stamp_s == first[camera].stamp_s or (noisy and np.array_equal(rgb, first[camera].rgb)):
            raise PolicyError(f"camera {camera}: its picture is frozen; start the camera again")
        level = float(rgb.mean())
        if camera not in contract.start_brightness:
            notes.append(f"camera {camera}: how bright training was is not in the checkpoint, and was not checked")
            continue
        darkest, brightest = contract.start_brightness[camera]
        if not DARKER * darkest <= level <= BRIGHTER * brightest:
            raise PolicyError(
                f"camera {camera}: its mean grey level is {level:.0f}, episodes of training began with {darkest:.0f} "
                f"to {brightest:.0f}; see to the light, the lens and the exposure"
            )
    return notes


def check_rates(contract: RobotContract, fps: float, joint_hz: float, picture_hz: Mapping[str, float]) -> None:
    """Refuse joints or cameras that are slower than the policy's frames.

    Raises:
        PolicyError: what comes how often, and what is expected.
    """
    if joint_hz < fps:
        raise PolicyError(f"joint states come at {joint_hz:.0f} Hz, expected the policy's {fps:g} Hz or more")
    for camera in contract.cameras:
        if picture_hz[camera] < RATE_SHARE * fps:
            raise PolicyError(
                f"camera {camera}: pictures come at {picture_hz[camera]:.1f} Hz, expected about the policy's {fps:g} Hz"
            )


def check_start(
    robot: Robot, contract: RobotContract, fps: float, period_s: float, allow_unknown: bool, still: bool = True
) -> list[str]:
    """All of the above but check_contract, on what the robot shows within LOOK_S; -> notes.

    Raises:
        PolicyError: with `still`, also an arm that moves.
    """
    seen = look(robot, contract, period_s)
    check_rates(contract, fps, seen.joint_hz, seen.picture_hz)
    said = robot.check()
    if troubles := robot.status().troubles():
        raise PolicyError(f"the robot is not ready: {'; '.join(troubles)}")
    if still and seen.moved_rad > 0.01:
        raise PolicyError(f"a joint moved by {seen.moved_rad:.3f} rad while the arm was looked at; let it come to rest")
    notes = check_pictures(contract, seen.first, seen.last, robot.cameras_are_noisy)
    return said + check_pose(contract, seen.state, allow_unknown) + notes
