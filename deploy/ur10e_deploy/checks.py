"""May this policy be evaluated on this recording, on which episodes, and what should a person know beforehand?

Numbers are comparable only when both mean the same: joints in the same order, actions of the same kind at the same
rate, images of the same cameras. What can be told is checked, what cannot is said.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from act_model import STATE
from rosbag_dataset import UR_JOINTS

from .config import RobotContract
from .policy_runner import PolicyRunner
from .sources import BagSource, EpisodeData, EpisodeSource

FAR_SIGMA = 6  # a joint so many standard deviations from the training data's mean is not what the policy knows


class EvalError(Exception):
    """An evaluation that cannot be done as asked: one line, with what to do."""

    def __init__(self, message: str) -> None:
        super().__init__(" ".join(message.split()))


# -- choosing episodes ---------------------------------------------------------------------------------------------


def choose_episodes(
    source: EpisodeSource, contract: RobotContract, asked: Sequence[int] | None, skip_missing: bool
) -> tuple[list[int], list[str]]:
    """Which episodes to evaluate: -> (their numbers, notes).

    Without `asked`: of bags those that training held out, of a dataset all.

    Raises:
        EvalError: an episode that is not there, or no held-out bag among these.
    """
    there, where = source.episode_indices(), source.identity["path"]
    has = f"{len(there)} episodes" + (f", {there[0]} to {there[-1]}" if there else "")
    if not there:
        raise EvalError(f"{where}: no episode in it")
    if asked is not None:
        if len(set(asked)) != len(asked):
            raise EvalError(f"--episode {' '.join(map(str, asked))}: a number is given twice")
        missing = [index for index in asked if index not in there]
        if missing and not skip_missing:
            raise EvalError(
                f"--episode: no episode {', '.join(map(str, missing))} in {where}; it has {has}; ask for these, or add "
                "--skip-missing-episodes"
            )
        chosen = [index for index in asked if index in there]
        if not chosen:
            raise EvalError(f"--episode: none of {', '.join(map(str, asked))} is in {where}; it has {has}")
        notes = [f"episodes {', '.join(map(str, missing))} are skipped: {where} has {has}"] if missing else []
        return chosen, notes
    if not isinstance(source, BagSource):
        return there, []
    held_out = [index for index in there if source.episode_name(index) in contract.held_out_episodes]
    if held_out:
        return held_out, [f"episodes {', '.join(map(str, held_out))} of {len(there)}: those that training held out"]
    if not any(source.episode_name(index) in contract.training_episodes for index in there):
        return there, [f"all {len(there)} episodes: by their names, training saw none of them"]
    raise EvalError(
        f"{where}: no held-out episode of the checkpoint is in it (it held out "
        f"{', '.join(contract.held_out_episodes) or 'none'}), and some were trained on; choose with --episode"
    )


# -- do the data fit the policy? -----------------------------------------------------------------------------------


def check_source(source: EpisodeSource, contract: RobotContract) -> list[str]:
    """Refuse recordings that mean something else than the policy does; -> notes on what was taken for granted.

    Raises:
        EvalError: cameras, image size, joints or rate differ.
    """
    notes, where = [], source.identity["path"]
    if missing := [camera for camera in contract.cameras if camera not in source.cameras]:
        raise EvalError(
            f"{where}: no camera {', '.join(missing)}; the policy needs it, found {', '.join(source.cameras) or 'none'}"
        )
    if unused := [camera for camera in source.cameras if camera not in contract.cameras]:
        notes.append(f"cameras {', '.join(unused)} are not the policy's and are left out")
    for camera, seen in contract.cameras.items():
        (height, width), (new_height, new_width) = source.cameras[camera], seen
        if (height, width) == seen:
            continue
        if contract.image_resize is None:
            raise EvalError(
                f"{where}: images of camera {camera} are {height}x{width}; the policy was trained on "
                f"{new_height}x{new_width} (HxW) and never resized; for a checkpoint without train_config.json "
                f"--image-resize {new_height} {new_width} says that it was"
            )
        squeezed = abs(new_width / new_height / (width / height) - 1) > 0.01
        notes.append(
            f"images of camera {camera} are resized from {height}x{width} to {new_height}x{new_width} (HxW), as in "
            f"training{': that changes the aspect ratio' if squeezed else ''}"
        )
    if contract.fps and abs(source.fps / contract.fps - 1) > 0.01:
        raise EvalError(
            f"{where}: recorded at {source.fps:g} frames per second; the policy was trained at {contract.fps:g}, and "
            "its actions are per frame; resample the recording, or evaluate on its bags with --bags"
        )
    if contract.fps is None:
        notes.append(
            f"the checkpoint does not say its rate: taken to be the recording's {source.fps:g} frames per second"
        )

    names, expected = source.joint_names, contract.state_names
    if names and len(names) != len(contract.joint_sign):
        raise EvalError(f"{where}: {len(names)} joints ({', '.join(names)}); the policy has {len(contract.joint_sign)}")
    if names and expected and list(names) != list(expected):
        meant = _ur_joints(names)
        if any(meant) and (meant != _ur_joints(expected) or set(names) == set(expected)):
            raise EvalError(
                f"{where}: joints are {', '.join(names)}; the policy's are {', '.join(expected)}: other joints, or "
                "another order, which would be evaluated as if it were the policy's"
            )
        notes.append(f"joints {', '.join(names)} are taken to be the policy's {', '.join(expected)}")
    elif not names:
        notes.append("the recording does not name its joints: they are taken to be in the policy's order")
    return notes


def _ur_joints(names: Sequence[str]) -> list[str | None]:
    """Which of the UR arm's joints each name means: "wrist_1.pos" and "left_wrist_1_joint" mean wrist_1_joint."""
    stems = {joint: joint.removesuffix("_joint") for joint in UR_JOINTS}
    return [next((joint for joint, stem in stems.items() if stem in name), None) for name in names]


def told_action_mode(episodes: Sequence[EpisodeData], contract: RobotContract) -> tuple[str | None, str]:
    """What the recorded actions are, told from the numbers: a LeRobot dataset does not say.

    An absolute action is near the next state; a delta is near the difference to the next state. Neither fits exactly,
    because recorded commands are a little ahead of the measured joints. So the one that fits better must do so by a
    factor of five.

    Returns:
        ("delta", "absolute" or None when neither is, what was measured).
    """
    as_delta, as_absolute, count = 0.0, 0.0, 0
    for data in episodes:
        pairs = np.flatnonzero((np.diff(data.segment) == 0) & np.isfinite(data.action[:-1]).all(axis=1))
        acted_on, action = contract.acted_on(data.state_rad), data.action[pairs]
        state, following = acted_on[pairs], acted_on[pairs + 1]
        as_delta += float(np.abs(contract.difference(action, contract.difference(following, state))).sum())
        as_absolute += float(np.abs(contract.difference(action, following)).sum())
        count += action.size
    measured = f"mean |action - (next state - state)| {as_delta / max(1, count):.2g} rad, |action - next state| "
    measured += f"{as_absolute / max(1, count):.2g} rad"
    if as_delta * 5 < as_absolute:
        return "delta", measured
    if as_absolute * 5 < as_delta:
        return "absolute", measured
    return None, measured


def check_data(episodes: Sequence[EpisodeData], source: EpisodeSource, runner: PolicyRunner) -> list[str]:
    """Refuse actions of the other kind; -> notes on what the numbers look like beside the training data.

    Raises:
        EvalError: number of joints or kind of action is not the policy's.
    """
    contract, where, notes = runner.contract, source.identity["path"], []
    states, actions = len(contract.joint_sign), len(contract.acted)
    for data in episodes:
        sizes = (("state", data.state_rad.shape[1], states), ("action", data.action.shape[1], actions))
        for what, found, expected in sizes:
            if found != expected:
                raise EvalError(f"{where}: {data.name}: {found} joints in the {what}; the policy has {expected}")
    mode, measured = (source.action_mode, "its settings say so")
    if mode is None:
        mode, measured = told_action_mode(episodes, contract)
        if mode is None:
            notes.append(f"whether the recorded actions are {contract.action_kind} cannot be told: {measured}")
        else:
            notes.append(f"the recorded actions are {mode}, told from the numbers: {measured}")
    if mode is not None and mode != contract.action_kind:
        raise EvalError(
            f"{where}: its actions are {mode} ({measured}); the policy's are {contract.action_kind}: not comparable; "
            f"evaluate on a dataset with {contract.action_kind} actions, or on the bags with --bags"
        )
    state = np.concatenate([data.state_rad for data in episodes])
    stats = runner.policy.stats[STATE]
    far = (np.abs(contract.wrap(state) - stats["mean"]) > FAR_SIGMA * stats["std"]).mean(axis=0)
    for j in np.flatnonzero(far > 0.1):
        notes.append(
            f"{contract.state_labels[j]} is more than {FAR_SIGMA} standard deviations from the training data in "
            f"{far[j]:.0%} of the frames: another task, or other units, signs or joint order?"
        )
    return notes
