"""The contract between a policy and its robot: what goes in, what comes out, how fast.

Our trainer writes it into the checkpoint (train_config.json). A checkpoint that LeRobot wrote says nothing about
angles or deltas, so a person has to: `said` below, flags on the command line.

Everything here is in the policy's convention: states in the policy's order, sign applied, angles wrapped when the
policy was trained so. state_from_robot() and to_robot() are the two doors to the robot's own; between them and
PolicyRunner, which wraps, angles are on the robot's turns.

A policy has S states: the robot's joints, and what other topics say (a gripper, a force). A of them are acted on, as a
rule all; the others are only observed.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import yaml

from lerobot_checkpoint import CONFIG_FILE, TRAIN_CONFIG_FILE, LoadedPolicy, find_pretrained, read_json
from rosbag_dataset import CHOICES, NEXT_STATE, UR_JOINTS, action_unit, wrap_to_pi
from ur10e import JOINT_NAMES, POSITION_LIMIT_RAD

CONTROL_HZ = 30.0  # the rate at which the robot is commanded: what "real-time" is decided on
ENSEMBLE_M = 0.01  # of temporal ensembling when the checkpoint has no coefficient of its own (arXiv 2304.13705)
WARM_UP_INFERENCES = 3  # the first ones allocate, choose kernels and compile: measured apart
ACTION_MODES = CHOICES["action_mode"]
FLOAT32_ROUNDING_RAD = 1e-6  # of angles of a few turns: a state that training stored just below pi stays there


class PolicyError(Exception):
    """A policy that cannot be run, or an observation it must not be given: one line, with what to do."""

    def __init__(self, message: str) -> None:
        super().__init__(" ".join(message.split()))


@dataclass(frozen=True)
class RobotContract:
    """What a policy expects and means, for S states, of which A are in its actions.

    Attributes:
        action_mode: what the network predicts: "delta" (rad per frame), "absolute" (rad), or "relative" (rad, offsets
            from the state in which a chunk was predicted). PolicyRunner turns the last into positions at once.
        state_names: the S states, in order: joints first; None when neither checkpoint nor dataset names them.
        state_topics: name -> TOPIC:FIELD of the states that are no joints of data.joint_topic.
        units: the S states' units: "rad", what data.state_units says, or "".
        acted: the A states, as numbers, that the action is of, in order.
        of_commands: actions are of what was commanded, not of what was measured a frame later.
        joint_sign: S factors of +1 or -1 that were applied to the robot's joints before training.
        wrap_angles: revolute joints were wrapped, to within half a turn of angle_reference_rad.
        revolute: (S,) which states are angles; all False when it is not known and nothing is wrapped.
        angle_reference_rad: (S,) see rosbag_dataset's refer_angles(); 0 in checkpoints that do not say.
        fps: frames per second of the training data, None when the checkpoint does not say.
        rest_at_start_s: how long the joints are still at the start of a training episode (median); None as above.
        image_age_s: camera -> {"median", "most"}: how much older than the state images were in training, by the clock
            of data.time_source; below 0 they were newer. {} when the checkpoint does not say.
        start_states: (N, S) how training episodes began, as the policy sees states; () as above.
        start_brightness: camera -> mean grey level of the darkest and of the brightest first picture; {} as above.
        recorded_shapes: camera -> the sizes (H, W) that its pictures had before they were resized; {} as above.
        image_resize: (H, W) that camera images were resized to, None when they were used as they came.
        cameras: camera -> (H, W) of what the network sees, in its order.
        training_episodes, held_out_episodes: names of the bags it was trained on and of those it was not.
        data_settings: the trainer's `data` and `conventions`, for decoding bags as in training; {} without.
        code: version and hash of the trainer; {} when the checkpoint does not say.
        source: where all this is from, for the report.
    """

    action_mode: str
    state_names: tuple[str, ...] | None
    state_topics: dict[str, str]
    units: tuple[str, ...]
    acted: tuple[int, ...]
    of_commands: bool
    joint_sign: tuple[float, ...]
    wrap_angles: bool
    revolute: tuple[bool, ...]
    angle_reference_rad: tuple[float, ...]
    fps: float | None
    rest_at_start_s: float | None
    image_age_s: dict[str, dict[str, float]]
    start_states: tuple[tuple[float, ...], ...]
    start_brightness: dict[str, tuple[float, float]]
    recorded_shapes: dict[str, tuple[tuple[int, int], ...]]
    image_resize: tuple[int, int] | None
    cameras: dict[str, tuple[int, int]]
    training_episodes: tuple[str, ...]
    held_out_episodes: tuple[str, ...]
    data_settings: dict[str, Any]
    code: dict[str, str]
    source: str

    @property
    def action_kind(self) -> str:
        """What PolicyRunner's actions are: "delta", or "absolute" positions.

        Deltas of commands are positions, too: a chunk's first one is from the measured state to the command.
        """
        return "delta" if self.action_mode == "delta" and not self.of_commands else "absolute"

    @property
    def action_units(self) -> list[str]:
        """The A units of PolicyRunner's actions: of joints "rad per frame" (delta) or "rad" (absolute)."""
        return [action_unit(self.units[i], self.action_kind) for i in self.acted]

    @property
    def in_rad(self) -> np.ndarray:
        """(A,) bool: the actions whose errors are averaged into one figure; all if none is in rad."""
        in_rad = np.array([self.units[i] == "rad" for i in self.acted])
        return in_rad if in_rad.any() else ~in_rad

    @property
    def action_unit(self) -> str:
        """The unit of that figure: "rad per frame" (delta) or "rad" (absolute)."""
        return self.action_units[int(self.in_rad.argmax())]

    @property
    def state_labels(self) -> list[str]:
        """Short names of the states, for columns and pictures: "shoulder_pan"; "0", "1", ... when they have none."""
        if self.state_names is None:
            return [str(j) for j in range(len(self.joint_sign))]
        return [name.removesuffix("_joint") for name in self.state_names]

    @property
    def action_names(self) -> list[str] | None:
        """The names of the A states that actions, and so commands, are of, in order."""
        return None if self.state_names is None else [self.state_names[i] for i in self.acted]

    @property
    def action_labels(self) -> list[str]:
        """The same as short names."""
        return [self.state_labels[i] for i in self.acted]

    @property
    def wrapped(self) -> np.ndarray:
        """(S,) bool: the states that are wrapped angles."""
        return np.array(self.revolute) & self.wrap_angles

    @property
    def action_wrapped(self) -> np.ndarray:
        """(A,) bool: the actions of wrapped angles."""
        return self.wrapped[list(self.acted)]

    def acted_on(self, state: np.ndarray) -> np.ndarray:
        """(..., A) of states (..., S): those that actions are of."""
        return state[..., list(self.acted)]

    def wrap(self, angle_rad: np.ndarray) -> np.ndarray:
        """States (..., S) as in training: angles within half a turn of their reference, if training wrapped them.

        Other states, and angles that already lie in that range, up to float32's rounding, are returned unchanged.
        """
        reference = np.array(self.angle_reference_rad)
        outside = np.abs(angle_rad - reference) > np.pi + FLOAT32_ROUNDING_RAD
        return np.where(outside & self.wrapped, wrap_to_pi(angle_rad, reference), angle_rad)

    def difference(self, a_rad: np.ndarray, b_rad: np.ndarray) -> np.ndarray:
        """(..., A) a - b; for wrapped joints the shortest way around."""
        return np.where(self.action_wrapped, wrap_to_pi(a_rad - b_rad), a_rad - b_rad)

    def beside(self, action: np.ndarray, other_rad: np.ndarray) -> np.ndarray:
        """Actions (..., A) on the turn nearest to `other_rad`: whole turns are added to wrapped joints' positions.

        A pose is the same a turn further, for the robot and for an error. Deltas are returned as they are.
        """
        if self.action_kind == "delta":
            return action
        turns = np.round((other_rad - action) / (2 * np.pi)) * self.action_wrapped
        return np.where(turns == 0, action, action + 2 * np.pi * turns)

    def state_from_robot(
        self,
        names: Sequence[str],
        position_rad: Sequence[float] | np.ndarray,
        others: Mapping[str, float] | None = None,
    ) -> np.ndarray:
        """A JointState's names and positions, in any order, and other states -> (S,) float64 for PolicyRunner.

        `others` has the states of data.state_topics by their names, in the units that they were recorded in.

        Angles stay on the turns that the robot's joints are on: the runner wraps them for the policy, and its commands
        come back on these turns.

        Raises:
            PolicyError: the contract names no states; one of them is missing, there twice or not finite; it cannot be
                told which position is whose; or `others` has a state that is not known.
        """
        if self.state_names is None:
            raise PolicyError(
                f"{self.source}: names no joints, so that the robot's cannot be put in the policy's order"
            )
        if len(names) != len(position_rad):
            raise PolicyError(
                f"the robot sent {len(names)} joint names but {len(position_rad)} positions, expected one each"
            )
        if twice := sorted({name for name in self.state_names if list(names).count(name) > 1}):
            raise PolicyError(f"joints {', '.join(twice)} are there more than once; the robot sent {', '.join(names)}")
        by_name, others = dict(zip(names, position_rad, strict=True)), others or {}
        if missing := [name for name in self.state_names if name not in self.state_topics and name not in by_name]:
            raise PolicyError(f"joints {', '.join(missing)} are missing; the robot sent {', '.join(names)}")
        if set(others) != set(self.state_topics):
            expected = ", ".join(
                f"{name} ({' in '.join(filter(None, (field, self.units[self.state_names.index(name)])))})"
                for name, field in self.state_topics.items()
            )
            raise PolicyError(
                f"states {', '.join(others) or 'none'} were given beside the joints; the policy's are "
                f"{expected or 'none'}"
            )
        by_name |= others
        if wrong := [f"{name} {by_name[name]}" for name in self.state_names if not np.isfinite(by_name[name])]:
            raise PolicyError(f"the robot's state is not finite: {', '.join(wrong)}; the policy was not asked")
        return np.array([by_name[name] for name in self.state_names], np.float64) * self.joint_sign

    def to_robot(self, position_rad: np.ndarray) -> np.ndarray:
        """(A,) positions to command, in the policy's signs -> the same in the robot's own; of `action_names`.

        Raises:
            PolicyError: one lies outside the joint's limits.
        """
        low, high = self.joint_limits_rad
        for j in np.flatnonzero((position_rad < low) | (position_rad > high)):
            raise PolicyError(
                f"{self.action_labels[j]} would go to {position_rad[j]:.3f} rad, outside its limits {low[j]:.3f} to "
                f"{high[j]:.3f} rad (in the policy's sign); it must not reach a robot"
            )
        return position_rad * self.acted_on(np.asarray(self.joint_sign))

    def joint_command(self, action: np.ndarray, here_rad: np.ndarray, last_command_rad: np.ndarray) -> np.ndarray:
        """What to command for an action: (A,) float64 positions, of joints in rad, in the policy's order and signs.

        A delta is the difference of two measured states one frame apart. It is added to the last command, not to the
        measured state: an arm that lags would otherwise make only a part of every step, and the sum of a chunk's
        deltas would be lost. At an episode's start the last command is the measured state.

        An absolute action names a pose, which a joint that turns on has at many angles: of those inside the joint's
        limits the one nearest to where the joint is, is taken, so that no joint is sent around.

        Args:
            action: (A,) of PolicyRunner.
            here_rad: (A,) where the joints are, on the robot's own turns.
            last_command_rad: (A,) what was commanded one frame ago.
        """
        if self.action_kind == "delta":
            return last_command_rad + action
        low, high = self.joint_limits_rad
        target, turn = self.beside(action.astype(np.float64), here_rad), 2 * np.pi * self.action_wrapped
        return np.where(target > high, target - turn, np.where(target < low, target + turn, target))

    @cached_property  # it is asked for in every control step
    def joint_limits_rad(self) -> tuple[np.ndarray, np.ndarray]:
        """(lowest, highest), each (A,): the UR10e's own joint limits, and none for what is not the arm's.

        They are the same in both signs.
        """
        limits = dict(zip(JOINT_NAMES, POSITION_LIMIT_RAD, strict=True))
        names = self.action_names or ("",) * len(self.acted)
        of = [[limit for joint, limit in limits.items() if name.endswith(joint)] for name in names]
        high = np.array([found[0] if found else np.inf for found in of])
        return -high, high

    @property
    def recorded_cameras(self) -> dict[str, tuple[int, int]]:
        """Camera -> the size (H, W) of its pictures in training's recordings; the policy's where it is not known."""
        return {c: next(iter(self.recorded_shapes.get(c, ())), shape) for c, shape in self.cameras.items()}


def read_options_file(option: str, path: Path, known: Sequence[str]) -> dict[str, Any]:
    """The mapping that a YAML file for `--option FILE` holds; {} for an empty one.

    Raises:
        PolicyError: it cannot be read, is no mapping, or has a key that is not `known`.
    """
    try:
        content = yaml.safe_load(path.read_text(encoding="utf-8")) or {}
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
        raise PolicyError(f"{option} {path}: cannot be read ({error})") from None
    if not isinstance(content, dict) or (unknown := [str(k) for k in content if k not in known]):
        raise PolicyError(
            f"{option} {path}: found {', '.join(unknown) if isinstance(content, dict) else type(content).__name__}; "
            f"expected some of {', '.join(known)}"
        )
    return content


def has_contract(checkpoint: Path) -> bool:
    """Whether our trainer wrote into this checkpoint what its robot must know.

    LeRobot's own trainer writes a file of the same name, which says nothing about the robot.

    Raises:
        CheckpointError: there is no checkpoint.
    """
    file = find_pretrained(checkpoint) / TRAIN_CONFIG_FILE
    return file.exists() and "action_mode" in read_json(file)


def read_contract(policy: LoadedPolicy, said: Mapping[str, Any]) -> RobotContract:
    """The contract of a loaded checkpoint.

    Args:
        policy: the checkpoint.
        said: what a person says with flags, None where nothing was said: "action_mode", "wrap_angles" (bool),
            "image_resize" ((H, W)), "joint_names". Needed for a checkpoint that does not say itself; where it does,
            they may only repeat it.

    Raises:
        PolicyError: a flag contradicts the checkpoint, or one is needed and was not given.
    """
    shapes, state_dim = policy.image_shapes, policy.act_config.state_dim
    if has_contract(policy.path):
        assert policy.train_config is not None  # has_contract has read it
        return _from_trainer(policy, policy.train_config, said)
    if policy.act_config.action_dim != state_dim:
        raise PolicyError(
            f"{policy.path / CONFIG_FILE}: {state_dim} joints in the state, {policy.act_config.action_dim} in the "
            "action; expected the same joints in both, to which actions are positions or deltas: no contract says more"
        )

    missing = [
        f"--action-mode ({' or '.join(ACTION_MODES)})" if name == "action_mode" else "--wrap or --no-wrap"
        for name in ("action_mode", "wrap_angles")
        if said.get(name) is None
    ]
    if missing:
        raise PolicyError(
            f"{policy.path}: no contract of train.py in it, so that it is not known what its actions mean or whether "
            "angles were wrapped: "
            f"say {' and '.join(missing)}"
        )
    names = said.get("joint_names")
    revolute = tuple(name.endswith(UR_JOINTS) for name in names) if names else (False,) * state_dim
    if said["wrap_angles"] and not any(revolute):
        raise PolicyError(
            "--wrap: the dataset does not name the UR arm's joints "
            f"({', '.join(names) if names else 'it names none'}), so that it is not known which are angles; "
            "use --no-wrap with data that need no wrapping, or name the joints in the dataset"
        )
    resize = said.get("image_resize")
    if resize and (wrong := {c: s for c, s in shapes.items() if s != tuple(resize)}):
        raise PolicyError(f"--image-resize {resize[0]} {resize[1]}: {policy.path / CONFIG_FILE} says {wrong} (H, W)")
    return RobotContract(
        action_mode=said["action_mode"],
        state_names=tuple(names) if names else None,
        state_topics={},
        units=("rad",) * state_dim,
        acted=tuple(range(state_dim)),
        of_commands=False,
        joint_sign=(1.0,) * state_dim,
        wrap_angles=said["wrap_angles"],
        revolute=revolute,
        angle_reference_rad=(0.0,) * state_dim,
        fps=None,
        rest_at_start_s=None,
        image_age_s={},
        start_states=(),
        start_brightness={},
        recorded_shapes={},
        image_resize=tuple(resize) if resize else None,
        cameras=shapes,
        training_episodes=(),
        held_out_episodes=(),
        data_settings={},
        code={},
        source="flags",
    )


def _from_trainer(policy: LoadedPolicy, content: Mapping[str, Any], said: Mapping[str, Any]) -> RobotContract:
    where = policy.path / TRAIN_CONFIG_FILE
    try:
        config = content["config"]
        joints = tuple(content["joint_names"])
        names = tuple(content.get("state_names", joints))  # older checkpoints have joints alone, all acted on
        contract = RobotContract(
            action_mode=content["action_mode"],
            state_names=names,
            state_topics=dict(content.get("state_topics", {})),
            units=tuple(content.get("units", ["rad"] * len(names))),
            acted=tuple(names.index(name) for name in content.get("action_names", names)),
            of_commands=content.get("action_source", NEXT_STATE) != NEXT_STATE or bool(content.get("command_topics")),
            joint_sign=tuple(float(sign) for sign in content["joint_sign"]),
            wrap_angles=content["wrap_angles"],
            revolute=tuple(content["revolute"]),
            angle_reference_rad=tuple(content.get("angle_reference_rad", [0.0] * len(names))),
            fps=float(content["fps"]),
            rest_at_start_s=content.get("rest_at_start_s"),
            image_age_s=content.get("image_age_s", {}),
            start_states=tuple(tuple(map(float, state)) for state in content.get("start_states", ())),
            start_brightness={c: (float(a), float(b)) for c, (a, b) in content.get("start_brightness", {}).items()},
            recorded_shapes={
                c: tuple((int(h), int(w)) for h, w in shapes)
                for c, shapes in content.get("recorded_shapes", {}).items()
            },
            image_resize=tuple(content["image_resize"]) if content["image_resize"] else None,
            cameras=policy.image_shapes,
            training_episodes=tuple(content["training_episodes"]),
            held_out_episodes=tuple(content["held_out_episodes"]),
            data_settings={**config["data"], **config["conventions"]},
            code=dict(content["code"]),
            source=TRAIN_CONFIG_FILE,
        )
    except (KeyError, TypeError, ValueError) as error:
        raise PolicyError(
            f"{where}: not the contract that train.py writes ({error!r}); use a complete checkpoint"
        ) from None
    shape = policy.act_config
    expected = dict.fromkeys(("state_names", "units", "joint_sign", "revolute", "angle_reference_rad"), shape.state_dim)
    found = {name: len(getattr(contract, name)) for name in expected}
    found |= {"joint_names": len(joints), "action_names": len(contract.acted)}
    if wrong := [state for state in contract.start_states if len(state) != len(names)]:
        raise PolicyError(f"{where}: a start state of {len(wrong[0])} values; expected one for each of {len(names)}")
    expected |= {"joint_names": shape.state_dim - len(contract.state_topics), "action_names": shape.action_dim}
    for name, count in expected.items():
        if found[name] != count:
            what = "joints in the state" if name == "joint_names" else "states"
            raise PolicyError(f"{where}: {found[name]} {name}; {CONFIG_FILE} has {count} {what}")
    if names != (*joints, *contract.state_topics):
        raise PolicyError(f"{where}: state_names are not joint_names and state_topics; use a complete checkpoint")
    if contract.action_mode not in ACTION_MODES:
        raise PolicyError(f"{where}: action_mode is {contract.action_mode!r}; expected {' or '.join(ACTION_MODES)}")
    if contract.image_resize and any(shape != contract.image_resize for shape in contract.cameras.values()):
        raise PolicyError(
            f"{where}: image_resize is {contract.image_resize}; {CONFIG_FILE} says {contract.cameras} (H, W)"
        )
    for name, flag in (("action_mode", "--action-mode"), ("wrap_angles", "--wrap"), ("image_resize", "--image-resize")):
        value, written = said.get(name), getattr(contract, name)
        if value is not None and value != written:
            raise PolicyError(f"{flag}: found {value}, but {where} says {name} {written}; leave the flag out")
    return contract
