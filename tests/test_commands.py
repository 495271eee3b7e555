"""Actions of what was commanded: which command is in force at a frame, what a chunk of them means, who executes it."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from ur10e_deploy import offline_eval
from ur10e_deploy.policy_runner import PolicyRunner

import train
from rosbag_dataset import (
    ChunkDataset,
    cache,
    compute_stats,
    find_bags,
    inspection,
    load_episodes,
    read_bag,
    wrap_to_pi,
)
from rosbag_dataset.commands import delay_s, followed, held
from tests.bags import JOINTS, T0_NS, clock, joint_state, make_take, number, numbers, settings, trajectory, write_bag
from tests.checks import both_storages, error_of
from tests.once import once
from tests.tiny import arguments, assert_same_run, run

LAG_S = 0.1
SOURCE = "/commands"


def ns(seconds):
    return np.rint(np.asarray(seconds, float) * 1e9).astype(np.int64)


def path(t):
    """Six joints that never rest; the fourth goes over pi."""
    return np.stack([0.2 * j + 0.5 * np.sin((1 + 0.3 * j) * t + j) for j in range(6)], axis=1) + [0, 0, 0, 2.5, 0, 0]


def asked(t, kind="leader"):
    """What is commanded when: where the arm is LAG_S later; the fourth joint's on the turn from -pi to pi.

    On a trajectory, which counts on, it is a turn further.
    """
    rad = path(np.asarray(t) + LAG_S)
    rad[:, 3] = rad[:, 3] + 2 * np.pi if kind == "trajectory" else wrap_to_pi(rad[:, 3])
    return rad


COMMAND_NS = clock(1.97, 50, 0.03)


def command_messages(kind, time_ns=COMMAND_NS, names=JOINTS):
    t = (time_ns - T0_NS) / 1e9
    if kind == "leader":
        made = [joint_state(int(n), q[::-1].copy(), names[::-1]) for n, q in zip(time_ns, asked(t), strict=True)]
    elif kind == "controller":
        made = [numbers(q) for q in asked(t)]
    else:  # each goes to where the last one ended, and then further
        made = [trajectory(int(n), [0.02, 0.04], asked([s + 0.02, s + 0.04], kind), names)
                for n, s in zip(time_ns, t, strict=True)]  # fmt: skip
    return [(SOURCE, int(n), message) for n, message in zip(time_ns, made, strict=True)]


def in_force(kind, ticks_ns, time_ns=COMMAND_NS):
    """(T, 6): the command at each tick, written out."""
    last = np.array([max(n for n in time_ns.tolist() if n <= tick) for tick in ticks_ns.tolist()])
    if kind != "trajectory":
        return asked((last - T0_NS) / 1e9)
    begin, end = asked((last - T0_NS) / 1e9, kind), asked((last - T0_NS) / 1e9 + 0.02, kind)
    return begin + (end - begin) * ((ticks_ns - last) / 20e6)[:, None]


def write(folder, kind, storage="sqlite3", commands=None, more=(), seed=0, size=(6, 8)):
    take = make_take(seconds=2.0, path=path, seed=seed, size=size)
    messages = take.messages() + (command_messages(kind) if commands is None else commands) + list(more)
    return write_bag(folder, sorted(messages, key=lambda m: m[1]), storage)


def only(bag_dir, **changes):
    (episode,), _ = load_episodes(settings(bag_dir, action_source=SOURCE, command_max_age_ms=100, **changes), 1, False)
    return episode


# -- series of commands -------------------------------------------------------------------------------------------


def test_a_command_holds_until_the_next():
    """Before the first there is none; of two at one time the later message counts; late ones are put in order."""
    commands = held(ns([1, 3, 2, 2]), [10, 30, 20, 21])
    values, age_ns = commands.at(ns([0.5, 1, 1.5, 2, 2.9, 9]))
    np.testing.assert_array_equal(values, [np.nan, 10, 10, 21, 21, 30])
    np.testing.assert_array_equal(age_ns, [np.inf, 0, 5e8, 0, 9e8, 6e9])


def test_a_trajectory_is_what_is_commanded_over_time():
    """Lines between its points, the last one holds; a later one begins where the command is, and replaces the rest."""
    first = (0, ns([1, 3]), np.array([2.0, 6.0]))
    commands = followed([first])
    values, age_ns = commands.at(ns([-1, 0, 0.5, 1, 2, 3, 4]))
    np.testing.assert_array_equal(values, [np.nan, 2, 2, 2, 4, 6, 6])
    np.testing.assert_array_equal(age_ns, [np.inf, 0, 0, 0, 0, 0, 1e9])
    for order in ([0, 1], [1, 0]):  # in whichever order the file has them
        both = [first, (int(2e9), ns([1]), np.array([0.0]))]
        values, _ = followed([both[i] for i in order]).at(ns([1, 2, 2.5, 3, 9]))
        np.testing.assert_array_equal(values, [2, 4, 2, 0, 0])
    jump = followed([first, (int(2e9), ns([0, 1]), np.array([7.0, 8.0]))])  # a point at once
    np.testing.assert_array_equal(jump.at(ns([2, 2.5, 5]))[0], [7, 7.5, 8])


@pytest.mark.parametrize("lag", [0.0, 0.034, 0.12, 0.4, -0.05])
def test_the_delay_is_found(lag):
    """Rates differ, joints that rest do not matter, and an arm that only went one way will do."""
    t, asked_s = np.arange(0, 8, 1 / 125), np.arange(0.01, 8, 1 / 30)
    for f in (lambda t: np.sin(t) + 0.3 * np.sin(2.3 * t), lambda t: 0.4 * t + 0.1 * np.sin(3 * t)):
        found = delay_s([(ns(asked_s), f(asked_s)), (ns(asked_s), 0 * asked_s)], [(ns(t), f(t - lag)), (ns(t), 0 * t)])
        assert found == pytest.approx(lag, abs=2e-3)
    assert delay_s([(ns(t), 0 * t)], [(ns(t), np.sin(t))]) is None


# -- on the grid --------------------------------------------------------------------------------------------------


@both_storages
@pytest.mark.parametrize("kind", ["leader", "controller", "trajectory"])
def test_actions_are_the_commands_in_force(tmp_path, kind, storage, monkeypatch):
    """The k-th action of a chunk from frame t is the command in force at frame t+k-1, in each of the three kinds, on
    the states' turn; the last frame of a segment has one, too. The second start reads no bag."""
    write(tmp_path / "bags" / "a", kind, storage)
    for mode in ("absolute", "relative", "delta"):
        episode = only(tmp_path / "bags", action_mode=mode)
        if mode == "absolute":
            monkeypatch.setattr(cache, "read_bag", None)
        t, state = episode.time_ns, episode.path_rad
        command = in_force(kind, t)
        command = state + wrap_to_pi(command - state)
        assert np.abs(command - state).max() < 0.5 and np.abs(command - state).max() > 0.03
        sample = ChunkDataset([episode], 6)[9]
        turn = episode.state[0] - state[0]
        want = {"absolute": command[9:15] + turn, "relative": command[9:15] - state[9],
                "delta": np.diff(command[9:15], axis=0, prepend=state[9][None])}[mode]  # fmt: skip
        np.testing.assert_allclose(sample["action"], want, atol=2e-6)
        first = {"absolute": command + turn}.get(mode, command - state)
        np.testing.assert_allclose(episode.action, first, atol=2e-6)
        assert episode.action_stop[-1] == len(t) and len(ChunkDataset([episode], 6)) == len(t)
        if mode == "delta":  # what the runner does: it adds them up from the measured state
            np.testing.assert_allclose(state[9] + np.cumsum(sample["action"], axis=0), command[9:15], atol=1e-5)
    report = episode.sync_report
    assert report["frames_without_action"] == 0 and report["dropped_without_command"] == 1  # before the first command
    # Two seconds are short, of which a trajectory's first 20 ms do not move: nothing was commanded before.
    tolerance_s = 15e-3 if kind == "trajectory" else 5e-3
    assert report["commands"]["joints_lag_s"] == pytest.approx(LAG_S, abs=tolerance_s)
    assert report["commands"]["of"]["elbow_joint"] == {"messages": 98, "rate_hz": 50.0}
    assert "the joints lag their commands by 0." in inspection.sync_table([report])


def test_commands_follow_sign_and_reference(tmp_path):
    """The project's sign counts for commands as for states; absolute ones are on the turn around the reference."""
    write(tmp_path / "bags" / "a", "leader")
    signs = [1, -1, 1, -1, 1, 1]
    signed = dict(action_mode="absolute", joint_sign=signs)
    plain, turned = (only(tmp_path / "bags", **signed, apply_joint_sign=apply) for apply in (False, True))
    off = turned.action - plain.action * signs
    np.testing.assert_allclose(off - 2 * np.pi * np.round(off / (2 * np.pi)), 0, atol=1e-5)
    assert np.abs(turned.action - turned.state).max(axis=0).min() > 0.01
    assert np.abs(wrap_to_pi((turned.action - turned.state).astype(float))).max() < 0.5


def test_frames_without_a_command_are_dropped_and_counted(tmp_path):
    """A command that is too old, or absent, has no action: the frame goes, the episode is cut, the report says so."""
    silent = [(0, 0.2), (0.8, 1.2)]
    t = (COMMAND_NS - T0_NS) / 1e9
    there = COMMAND_NS[~np.any([(a <= t) & (t < b) for a, b in silent], axis=0)]
    write(tmp_path / "bags" / "a", "leader", commands=command_messages("leader", there))
    episode = only(tmp_path / "bags")
    ticks = make_take(seconds=2.0, path=path).camera_ns
    age = np.array([tick - max([n for n in there.tolist() if n <= tick], default=0) for tick in ticks.tolist()])
    np.testing.assert_array_equal(episode.time_ns, ticks[age <= 100e6])
    report = episode.sync_report
    assert report["dropped"] == report["dropped_without_command"] == (age > 100e6).sum() > 10
    assert report["segments"] == 2
    assert f"{report['dropped']} frames dropped without a command" in inspection.sync_table([report])
    (episode,), _ = load_episodes(
        settings(tmp_path / "bags", action_source=SOURCE, command_max_age_ms=None), 1, False
    )  # one never gets old
    assert episode.sync_report["dropped"] == (ticks < there[0]).sum() and episode.sync_report["segments"] == 1
    assert "no frame has a command of each of these states" in error_of(
        lambda: load_episodes(settings(tmp_path / "bags", action_source=SOURCE, command_max_age_ms=1e-6), 1, False)
    )


def gripper_messages():
    t = clock(2.0, 50)
    width = [("/width", int(n), number("Float64", 0.04 + 0.03 * np.sin((n - T0_NS) / 1e9))) for n in t]
    return width + [("/grip", int(n), number("Bool", (n - T0_NS) % 10**9 > 5 * 10**8)) for n in t]


@pytest.mark.parametrize("mode", ["delta", "absolute", "relative"])
def test_a_gripper_has_its_command_or_its_next_value(tmp_path, mode):
    """With data.command_topics a state's own command, without the next measured value, as in recordings without any."""
    write(tmp_path / "bags" / "a", "leader", more=gripper_messages())
    gripper = dict(state_topics={"width": "/width:data"}, action_mode=mode)
    measured = only(tmp_path / "bags", **gripper)
    assert measured.sync_report["frames_without_action"] == 1 and measured.action_stop[-1] == len(measured.time_ns) - 1
    sample = ChunkDataset([measured], 4)[5]["action"][:, 6]
    want, here = measured.path_rad[6:10, 6], measured.path_rad[5, 6]
    want = {"absolute": want, "relative": want - here, "delta": np.diff(want, prepend=here)}[mode]
    np.testing.assert_allclose(sample, want, atol=1e-7)
    commanded = only(tmp_path / "bags", **gripper, command_topics={"width": "/grip:data"})
    assert commanded.sync_report["frames_without_action"] == 0
    sample = ChunkDataset([commanded], 4)[5]["action"][:, 6]
    closed = (clock(2.0, 50) - T0_NS) % 10**9 > 5 * 10**8
    last = np.searchsorted(clock(2.0, 50), commanded.time_ns, side="right") - 1
    want, here = closed[last][5:9].astype(float), commanded.path_rad[5, 6]
    want = {"absolute": want, "relative": want - here, "delta": np.diff(want, prepend=here)}[mode]
    np.testing.assert_allclose(sample, want, atol=1e-7)


@pytest.mark.parametrize("mode", ["delta", "absolute", "relative"])
@pytest.mark.parametrize("with_gripper", [False, True])
def test_statistics_of_commands(tmp_path, mode, with_gripper):
    """Those of all actions of all chunks, as training sees them; absolute ones of every frame, as without commands."""
    write(tmp_path / "bags" / "a", "controller", more=gripper_messages())
    episode = only(tmp_path / "bags", action_mode=mode, state_topics={"width": "/width:data"} if with_gripper else None)
    stats, _ = compute_stats([episode], "imagenet", 5)
    samples = ChunkDataset([episode], 5)
    batch = samples.__getitems__(range(len(samples)))
    rows = batch["action"][~batch["action_is_pad"]] if mode != "absolute" else batch["action"][:, 0]
    np.testing.assert_allclose(stats["action"]["mean"], rows.mean(axis=0, dtype=float), rtol=1e-4, atol=1e-7)
    np.testing.assert_allclose(stats["action"]["std"], np.maximum(rows.std(axis=0, dtype=float), 1e-4), rtol=1e-3)


# -- mistakes -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("commands", "line"),
    [
        ([(SOURCE, T0_NS, trajectory(T0_NS, [], []))], "a: data.action_source: /commands: no message says where"),
        ([], "a: data.action_source: no topic /commands; this bag has none of type sensor_msgs/msg/JointState or "),
        ([(SOURCE, T0_NS, number("Bool", True))], "a: data.action_source: topic /commands has type std_msgs/msg/Bool"),
        ([(SOURCE, T0_NS, numbers([1, 2]))], "a: /commands, message 1: 2 values (1, 2), expected a finite one"),
        (command_messages("leader", names=("q1", *JOINTS[1:])), "a: data.joint_names: joint shoulder_pan_joint is in "
         "none of the 98 messages on /commands; joints that are: wrist_3_joint"),
        (command_messages("trajectory", names=("q1", *JOINTS[1:])), "a: data.joint_names: joint shoulder_pan_joint is "
         "in none of the 98 messages on /commands; joints that are: q1"),
        ([(SOURCE, T0_NS, trajectory(T0_NS, [1, 0.5], np.zeros((2, 6))))], "a: /commands, message 1: its points are"),
        ([(SOURCE, T0_NS, trajectory(T0_NS, [1], np.zeros((1, 5))))], "a: /commands, message 1: 6 joint names but [5]"),
        ([(SOURCE, T0_NS, trajectory(T0_NS, [1], [[np.nan] * 6]))], "a: /commands, message 1: a position is not"),
    ],
    ids=["no points", "no topic", "type", "length", "leader", "trajectory", "times", "positions", "nan"],
)  # fmt: skip
def test_commands_that_cannot_be_used(tmp_path, commands, line):
    """One line: bag, key or message, what was found, what was expected."""
    write(tmp_path / "bags" / "a", "leader", commands=commands)
    (bag,) = find_bags(tmp_path / "bags")
    assert error_of(lambda: read_bag(bag, settings(tmp_path / "bags", action_source=SOURCE), None)).startswith(line)


@pytest.mark.parametrize(
    ("overrides", "line"),
    [
        ({"data__action_source": "commands"}, "data.action_source: found commands, expected next_state, or a topic"),
        ({"data__action_source": "/joint_states"}, "data.action_source: found /joint_states, expected next_state"),
        (
            {"data__command_topics": "{grip: /grip:data}"},
            "data.command_topics: found ['grip'], expected names of states",
        ),
        (
            {"data__command_topics": "{elbow_joint: /grip}"},
            "data.command_topics: found ['/grip'], expected TOPIC:FIELD",
        ),
        ({"data__command_max_age_ms": "0"}, "data.command_max_age_ms: found 0.0, expected above 0, or null"),
    ],
)
def test_settings_that_do_not_fit(tmp_path, capsys, overrides, line):
    assert train.main(arguments(tmp_path, tmp_path, **overrides)) == 1
    assert line in capsys.readouterr().err


# -- a policy of commands -----------------------------------------------------------------------------------------

POLICY = {
    "data__action_source": SOURCE, "data__command_max_age_ms": 100, "training__val_fraction": 0.4,
    "training__steps": 4, "training__save_freq": 2,
}  # fmt: skip


@pytest.fixture(scope="session")
def led(tmp_path_factory) -> Path:
    """Three recordings with a leader, and run/, trained on its commands as deltas."""

    def make(folder: Path) -> None:
        for seed in range(3):
            write(folder / "bags" / f"e{seed}", "leader", ("mcap", "sqlite3")[seed % 2], seed=seed, size=(32, 48),
                  commands=command_messages("leader", COMMAND_NS[: 98 - seed]))  # fmt: skip
        run(folder / "bags", folder, **POLICY)

    return once(tmp_path_factory, "led", make)


def test_the_runner_commands_what_was_commanded(led):
    """Each chunk's deltas are added up from the measured state: a lagging arm is sent to the command, not beyond."""
    contract = json.loads((led / "run/last/pretrained_model/train_config.json").read_text())
    assert contract["action_source"] == SOURCE and contract["joints_lag_commands_s"] == pytest.approx(LAG_S, abs=5e-3)
    runner = PolicyRunner(led / "run", backend="native", device="cpu")
    assert (runner.contract.action_mode, runner.contract.action_kind) == ("delta", "absolute")
    images = {"color": np.full((32, 48, 3), 99, np.uint8)}
    state = np.array([0.1, 0.2, 0.3, 2.9, 0.5, 0.6])
    batch = {"observation.state": runner.contract.wrap(state).astype(np.float32), "observation.images.color": 99 / 255}
    for _ in range(2):  # the second chunk begins at the measured state, too
        steps = [runner.step(state, images if k == 0 else {}) for k in range(8)]
        deltas = runner._infer(batch["observation.state"], images)
        np.testing.assert_allclose([s.command_rad for s in steps], state + np.cumsum(deltas, axis=0), atol=1e-5)


def test_the_evaluation_compares_commands(led, tmp_path):
    """Recorded are the commands in force, as positions, at each frame and along each chunk."""
    flags = ["--checkpoint", str(led / "run"), "--bags", str(led / "bags"), "--output", str(tmp_path / "out")]
    assert offline_eval.main([*flags, "--episode", "0", "--backend", "native", "--device", "cpu"]) == 0
    summary = json.loads((tmp_path / "out/summary.json").read_text())
    (episode, *_), _ = load_episodes(
        settings(led / "bags", led / "cache", action_source=SOURCE, command_max_age_ms=100, action_mode="absolute",
                 image_resize=[32, 48]), 1, False)  # fmt: skip
    still = np.abs(wrap_to_pi((episode.action - episode.state).astype(float)))
    assert summary["unit"] == "rad" and summary["frames"] == len(episode.time_ns)
    assert summary["error"]["no motion"]["mae"] == pytest.approx(still.mean(), rel=1e-4)
    assert max(summary["error_by_chunk_position"]["mae"]) < 1  # on one turn all along the chunk


def test_a_resumed_run_has_the_same_commands(led, tmp_path, capsys):
    """Stopped and resumed it is the same run; with another source or another limit it is refused."""
    run(led / "bags", tmp_path, **POLICY | {"training__steps": 2})
    run(led / "bags", tmp_path, "--resume", **POLICY)
    assert_same_run(tmp_path / "run", led / "run")
    capsys.readouterr()
    changed = POLICY | {"data__action_source": "next_state", "training__steps": 6}
    assert train.main(arguments(led / "bags", tmp_path, ("--resume",), **changed)) == 1
    error = capsys.readouterr().err
    assert "cannot resume, the run has changed: data.action_source (was /commands, is None)" in error
    assert "data.command_max_age_ms (was 100.0, is None)" in error
