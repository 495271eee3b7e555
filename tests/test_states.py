"""States from other topics than the joints': read by TOPIC:FIELD, on the same grid, in a policy, and on the robot."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest
from ur10e_deploy import offline_eval
from ur10e_deploy.config import PolicyError
from ur10e_deploy.policy_runner import PolicyRunner

import train
from rosbag_dataset import ChunkDataset, cache, compute_stats, find_bags, inspection, load_episodes, no_motion, read_bag
from rosbag_dataset.reading import Samples
from tests.bags import (
    T0_NS,
    clock,
    io_states,
    joint_state,
    make_take,
    number,
    numbers,
    settings,
    wrench,
    write_bag,
)
from tests.checks import both_storages, error_of, sql
from tests.once import once
from tests.test_synchronisation import by_hand
from tests.tiny import arguments, assert_same_run, run
from training import identity

STATES = {
    "gripper": "/gripper/state:position[finger]",
    "force_z": "/ft/wrench:wrench.force.z",
    "force_x": "/ft/wrench:wrench.force.x",
    "vacuum": "/vacuum:data",
    "valve": "/io_states:digital_out_states[3].state",
    "dial": "/dials:data[1]",
}


def seconds(time_ns):
    return (np.asarray(time_ns) - T0_NS) / 1e9


def gripper_m(t):
    return 0.04 + 0.03 * np.sin(2 * t)


def force_n(t):
    return np.stack([5 * np.sin(t), 0 * t, -40 + 10 * np.cos(3 * t)], axis=-1)


def valve_is_open(t):
    return (t * 4).astype(int) % 2 == 1


TIMES = {"gripper": clock(1.2, 50), "ft": clock(1.2, 100, 0.001), "switch": clock(1.2, 25, 0.003)}


def other_messages():
    """What a cell records beside arm and camera: gripper, force, bits, an array."""
    messages = [("/gripper/state", int(n), joint_state(int(n), [9.0, gripper_m(seconds(n))], ["other", "finger"]))
                for n in TIMES["gripper"]]  # fmt: skip
    messages += [("/gripper/state", T0_NS + 7, joint_state(T0_NS + 7, [9.0], ["other"]))]  # without the finger
    messages += [("/ft/wrench", int(n), wrench(int(n), force_n(seconds(n)))) for n in TIMES["ft"]]
    for n in TIMES["switch"]:
        is_open = bool(valve_is_open(seconds(n)))
        messages += [("/vacuum", int(n), number("Bool", is_open))]
        messages += [("/io_states", int(n), io_states([0, 0, 0, is_open]))]
        messages += [("/dials", int(n), numbers([7, 100 * seconds(n)]))]
    return messages


def write_cell(path, storage="sqlite3", take=None, without=()):
    take = take or make_take(seconds=1.2)
    messages = take.messages() + [m for m in other_messages() if m[0] not in without]
    return write_bag(path, sorted(messages, key=lambda m: m[1]), storage)


@both_storages
def test_other_topics_are_states(tmp_path, storage, monkeypatch):
    """Each beside the joints, by its own messages: numbers interpolated, bits held, and from the cache the same.

    IOStates is no type of rosbags' humble: both storages bring its definition.
    """
    take = make_take(seconds=1.2)
    write_cell(tmp_path / "bags" / "a", storage, take)
    wanted = settings(tmp_path / "bags", state_topics=STATES, observed_only=["force_x", "force_z"])
    (episode,), _ = load_episodes(wanted, 1, False)
    t, state = episode.time_ns, dict(zip(wanted.state_names, episode.state.T, strict=True))
    for j in range(6):
        np.testing.assert_allclose(episode.state[:, j], by_hand(t, take.joint_ns, take.joint_rad[:, j]), atol=1e-6)
    forces = force_n(seconds(TIMES["ft"]))
    between = {
        "gripper": ("gripper", gripper_m(seconds(TIMES["gripper"]))), "force_z": ("ft", forces[:, 2]),
        "force_x": ("ft", forces[:, 0]), "dial": ("switch", 100 * seconds(TIMES["switch"])),
    }  # fmt: skip
    for name, (messages, values) in between.items():
        np.testing.assert_allclose(state[name], by_hand(t, TIMES[messages], values), rtol=1e-6, atol=1e-7)
    before = [max(n for n in TIMES["switch"].tolist() if n <= tick) for tick in t.tolist()]
    assert 0 < valve_is_open(seconds(before)).mean() < 1
    for name in ("vacuum", "valve"):
        np.testing.assert_array_equal(state[name], valve_is_open(seconds(before)))

    acted = [*range(7), 9, 10, 11]  # all but the forces
    assert not wanted.revolute[6:].any() and [wanted.state_names[i] for i in acted[6:]] == [
        "gripper", "vacuum", "valve", "dial"
    ]  # fmt: skip
    np.testing.assert_array_equal(episode.acted, acted)
    np.testing.assert_allclose(episode.action[:-1], np.diff(episode.state, axis=0)[:, acted], atol=2e-5)
    report = episode.sync_report
    assert report["dropped"] == 0 and report["segments"] == 1 and report["states_never_changed"] == []
    assert report["ignored_messages"] == {"data.state_topics.gripper": 1}  # the one without the finger
    assert "note: 1 messages of the topic of data.state_topics.gripper, in 1 of 1 ep" in inspection.sync_table([report])
    streams = [name for name in report["topics"] if "(" in name]
    assert streams == [
        "/gripper/state (gripper)", "/ft/wrench (force_z, force_x)", "/vacuum (vacuum)", "/io_states (valve)",
        "/dials (dial)",
    ]  # fmt: skip
    assert report["topics"][streams[1]] | {"messages": 120, "rate_hz": 100.0} == report["topics"][streams[1]]

    monkeypatch.setattr(cache, "read_bag", None)  # the second start reads no bag
    (again,), _ = load_episodes(wanted, 1, False)
    np.testing.assert_array_equal(again.state, episode.state)
    assert again.sync_report == report


def test_a_state_added_later_moves_no_episode(tmp_path):
    """Which recording is held out, and which are copies, is decided by what is the same with and without it."""
    write_cell(tmp_path / "bags" / "a")
    plain, more = (settings(tmp_path / "bags", state_topics=topics) for topics in (None, STATES))
    (one,), _ = load_episodes(plain, 1, False)
    (other,), _ = load_episodes(more, 1, False)
    assert one.recording_hash == other.recording_hash and one.entry != other.entry


@pytest.mark.parametrize("resample", ["linear", "nearest"])
@pytest.mark.parametrize("name", ["gripper", "valve"])
def test_a_gap_of_a_state_drops_the_frames_in_it(tmp_path, name, resample):
    """Offsets and gaps count per stream: frames go in which one is silent, and the report says how many."""
    take = make_take(seconds=1.2)
    silent = (0.4, 0.8)
    messages = [m for m in other_messages() if not silent[0] <= seconds(m[1]) < silent[1]] + take.messages()
    write_bag(tmp_path / "bags" / "a", sorted(messages, key=lambda m: m[1]))
    wanted = settings(tmp_path / "bags", state_topics={name: STATES[name]}, joint_resample=resample)
    (episode,), _ = load_episodes(wanted, 1, False)
    samples = TIMES["gripper" if name == "gripper" else "switch"]
    kept = samples[(seconds(samples) < silent[0]) | (seconds(samples) >= silent[1])]
    before, after = kept[seconds(kept) < 0.4][-1], kept[seconds(kept) >= 0.8][0]
    ticks = take.camera_ns[(take.camera_ns >= samples[0]) & (take.camera_ns <= samples[-1])]
    gone = (ticks > before) & (ticks < after)
    if resample == "nearest" and name == "gripper":  # one that is near enough will do, as of joints
        gone &= np.abs(ticks[:, None] - kept).min(axis=1) > 50e6
    np.testing.assert_array_equal(episode.time_ns, ticks[~gone])
    report = episode.sync_report
    assert report["segments"] == 2 and report["dropped_in_joint_gaps"] == 0
    near = np.abs(ticks[:, None] - kept).min(axis=1) <= 50e6
    assert report["dropped_in_state_gaps"] == (gone & near).sum()
    assert ("frames dropped in gaps of data.state_topics" in inspection.sync_table([report])) == (gone & near).any()


def test_nothing_is_known_of_other_units(tmp_path):
    """A force of 300 N is no angle, and one that steps no jump; but an arm that does not move is still refused."""
    take = make_take(seconds=1.2)
    forces = [("/ft/wrench", int(n), wrench(int(n), (0, 0, 300 * (i % 2)))) for i, n in enumerate(TIMES["ft"])]
    write_bag(tmp_path / "bags" / "a", take.messages() + forces)
    wanted = settings(
        tmp_path / "bags", state_topics={"force_z": STATES["force_z"], "force_y": "/ft/wrench:wrench.force.y"}
    )
    (episode,), _ = load_episodes(wanted, 1, False)
    report = episode.sync_report
    assert report["joint_jumps"] == 0 and report["states_never_changed"] == ["force_y"]
    assert "note: a: never changed: force_y" in inspection.sync_table([report])
    still = [(t, n, joint_state(n, np.ones(6)) if t == "/joint_states" else m) for t, n, m in take.messages()]
    write_bag(tmp_path / "still" / "a", still + forces)
    wanted = settings(tmp_path / "still", state_topics={"force_z": STATES["force_z"]})
    assert "no joint moves" in error_of(lambda: load_episodes(wanted, 1, False))


@pytest.mark.parametrize(
    ("field", "line"),
    [
        ("/nothing:data", "a: data.state_topics.x: no topic /nothing; set it to one of the topics in this bag: /"),
        ("/vacuum:value", "a: /vacuum, message 1: value: no field value; fields there: data"),
        ("/gripper/state:position[thumb]", "a: data.state_topics.x: position[thumb] is in none of the 61 messages on "
         "/gripper/state; names that are: other, finger"),
        ("/dials:data[5]", "a: /dials, message 1: data[5]: [5] of a list of 2"),
        ("/ft/wrench:wrench.force", "a: /ft/wrench, message 1: wrench.force: expected a number, found a message"),
    ],
)  # fmt: skip
def test_a_field_that_is_not_there_is_said_before_any_pixel(tmp_path, field, line):
    """One line: bag, key, what was found and what there is; before images are decoded."""
    write_cell(tmp_path / "bags" / "a")
    (bag,) = find_bags(tmp_path / "bags")
    pixels = []
    wanted = settings(tmp_path / "bags", state_topics={"x": field})
    assert error_of(lambda: read_bag(bag, wanted, lambda *image: pixels.append(image))).startswith(line)
    assert not pixels


def test_a_type_without_a_definition_is_said(tmp_path):
    """sqlite3 bags from before ROS 2 Iron bring no definitions: one line that says so, and what to do."""
    path = write_cell(tmp_path / "bags" / "a")
    sql(path, "DROP TABLE message_definitions")
    wanted = settings(tmp_path / "bags", state_topics={"valve": STATES["valve"]})
    line = error_of(lambda: load_episodes(wanted, 1, False))
    assert "/io_states has type ur_msgs/msg/IOStates, which ROS 2 humble's common messages do not have" in line
    assert "brings no definition of it" in line and "-s mcap" in line
    sql(path, "CREATE TABLE message_definitions(topic_type, encoding, encoded_message_definition)",
        "INSERT INTO message_definitions VALUES('ur_msgs/msg/IOStates', 'ros2idl', 'module ur_msgs {')")  # fmt: skip
    assert "of kind 'ros2idl', expected 'ros2msg'" in error_of(lambda: load_episodes(wanted, 1, False))
    (episode,), _ = load_episodes(settings(tmp_path / "bags", state_topics={"vacuum": STATES["vacuum"]}), 1, False)
    assert episode.state.shape[1] == 7


def test_a_message_without_a_header_has_no_header_time(tmp_path):
    write_cell(tmp_path / "bags" / "a")
    wanted = settings(tmp_path / "bags", state_topics={"vacuum": STATES["vacuum"]}, time_source="header")
    line = error_of(lambda: load_episodes(wanted, 1, False))
    assert line.startswith("a: /vacuum, message 1: a std_msgs/msg/Bool has no header") and "receive" in line


def test_statistics_of_other_units(tmp_path):
    """A floor that fits any unit: a hundredth of the largest magnitude, or 1 for what never changes in training."""
    take = make_take(seconds=1.2)
    nearly = [("/n", int(n), number("Float64", 8.0 + 1e-4 * (i % 2))) for i, n in enumerate(TIMES["ft"])]
    never = [("/c", int(n), number("Float64", 0.04)) for n in TIMES["ft"]]
    write_bag(tmp_path / "bags" / "a", take.messages() + nearly + never)
    topics = {"nearly": "/n:data", "never": "/c:data"}
    for mode, of_action in (("absolute", 1.0), ("delta", 0.01)):
        wanted = settings(tmp_path / "bags", state_topics=topics, action_mode=mode)
        episodes, _ = load_episodes(wanted, 1, False)
        stats, floored = compute_stats(episodes, "imagenet", 4)
        np.testing.assert_allclose(stats["observation.state"]["std"][6:], [0.08, 1.0], rtol=1e-4)
        np.testing.assert_allclose(stats["action"]["std"][6:], [0.08 * of_action, of_action], rtol=1e-4)
        assert sum("raised to its floor" in line and " rad" not in line for line in floored) == 4


@pytest.mark.parametrize("mode", ["delta", "absolute", "relative"])
def test_chunks_have_the_acted_states_alone(tmp_path, mode):
    """The three kinds of action describe one motion of a gripper, too; what is only observed is in no action."""
    write_cell(tmp_path / "bags" / "a")
    topics = {name: STATES[name] for name in ("force_z", "gripper")}
    wanted = settings(tmp_path / "bags", state_topics=topics, observed_only=["force_z"], action_mode=mode)
    (episode,), _ = load_episodes(wanted, 1, False)
    sample = ChunkDataset([episode], 5)[3]
    assert sample["observation.state"].shape == (8,) and sample["action"].shape == (5, 7)
    gripper = {"delta": np.cumsum(sample["action"][:, 6]) + episode.state[3, 7], "absolute": sample["action"][:, 6],
               "relative": sample["action"][:, 6] + episode.state[3, 7]}[mode]  # fmt: skip
    np.testing.assert_allclose(gripper, episode.state[4:9, 7], atol=1e-6)


# -- settings -----------------------------------------------------------------------------------------------------

GRIPPER = {"data__state_topics": "{gripper: '/gripper/state:position[finger]', force_z: /ft/wrench:wrench.force.z}"}


@pytest.mark.parametrize(
    ("overrides", "line"),
    [
        (GRIPPER, "model.state_dim: found 6, expected 8, the number of data.joint_names (6) and data.state_topics (2)"),
        (GRIPPER | {"model__state_dim": 8, "data__observed_only": "[force_z]"},
         "model.action_dim: found 6, expected 7, the number of data.joint_names (6) and data.state_topics (2) without "
         "data.observed_only (1)"),
        ({"data__state_topics": "{g: /gripper/state}"}, "data.state_topics: found ['/gripper/state'], expected "
         "TOPIC:FIELD, for example /gripper/state:position[0], of each"),
        ({"data__state_topics": "{elbow_joint: /a:data}"}, "data.state_topics: found ['elbow_joint'], expected names"),
        ({"data__state_topics": "{a: /a:data, b: /a:data}"}, "data.state_topics: found ['/a:data', '/a:data']"),
        ({"data__state_topics": "{a: '/joint_states:position[elbow_joint]'}"}, "data.state_topics: found "
         "['/joint_states:position[elbow_joint]'], expected a topic without pictures, and no joint's position"),
        ({"data__state_topics": "{a: /camera/color/image_raw:height}"}, "data.state_topics: found"),
        ({"data__observed_only": "[force]"}, "data.observed_only: found ['force'], expected names of states"),
        ({"data__state_units": "{force: N}"}, "data.state_units: found ['force'], expected names of states"),
    ],
)  # fmt: skip
def test_settings_that_do_not_fit(tmp_path, capsys, overrides, line):
    """One line with the numbers: what was found, and what follows from which keys."""
    assert train.main(arguments(tmp_path, tmp_path, **overrides)) == 1
    assert line in capsys.readouterr().err


def test_the_inspection_uses_the_same(tmp_path, capsys):
    """`python -m rosbag_dataset` shows the states' streams, and refuses in the trainer's words."""
    write_cell(tmp_path / "bags" / "a", "mcap")
    config = tmp_path / "my.yaml"
    config.write_text(json.dumps({"data": {"state_topics": STATES}}))
    assert inspection.main([str(tmp_path / "bags"), "--config", str(config)]) == 0
    assert "125.0/50.0/100.0/25.0/25.0/25.0" in capsys.readouterr().out
    config.write_text(json.dumps({"data": {"state_topics": {"x": "/gripper"}}}))
    assert inspection.main([str(tmp_path / "bags"), "--config", str(config)]) == 1
    assert "error: " in (err := capsys.readouterr().err) and "expected TOPIC:FIELD" in err and err.count("\n") == 1


# -- a policy with a gripper that it acts on, and a force that it only feels --------------------------------------

POLICY = GRIPPER | {
    "data__observed_only": "[force_z]", "data__state_units": "{gripper: m, force_z: N}", "model__state_dim": 8,
    "model__action_dim": 7, "training__val_fraction": 0.4, "training__steps": 4, "training__save_freq": 2,
}  # fmt: skip


@pytest.fixture(scope="session")
def cell(tmp_path_factory) -> Path:
    """Three recordings of a cell with a gripper and a force, and run/, trained on them."""

    def make(folder: Path) -> None:
        for seed in range(3):
            take = make_take(seconds=1.2, size=(32, 48), seed=seed)
            take.joint_rad += 0.01 * seed
            write_cell(folder / "bags" / f"episode_{seed}", ("mcap", "sqlite3")[seed % 2], take)
        run(folder / "bags", folder, **POLICY)

    return once(tmp_path_factory, "cell", make)


def test_the_contract_names_all_states(cell):
    """Fields, units, which are angles and which are acted on: in the checkpoint, in the states' order."""
    contract = json.loads((cell / "run/last/pretrained_model/train_config.json").read_text())
    assert contract["state_names"] == [*contract["joint_names"], "gripper", "force_z"]
    assert contract["action_names"] == [*contract["joint_names"], "gripper"]
    assert contract["state_topics"] == {name: STATES[name] for name in ("gripper", "force_z")}
    assert contract["units"] == ["rad"] * 6 + ["m", "N"] and contract["revolute"] == [True] * 6 + [False] * 2
    summary = json.loads((cell / "run/summary.json").read_text())
    assert summary["units"]["gripper"] == "m per frame" and set(summary["mae_per_other_state"]["policy"]) == {"gripper"}
    assert len(summary["mae_rad_per_joint"]["policy"]) == 6
    assert summary["mae_rad"]["policy"] == pytest.approx(np.mean(list(summary["mae_rad_per_joint"]["policy"].values())))


@pytest.mark.parametrize("backend", ["native", "lerobot"])
def test_the_runner_takes_states_by_name(cell, backend):
    """Joints from a JointState, others by name; commands are of what is acted on, the force is looked at."""
    runner = PolicyRunner(cell / "run", backend=backend, device="cpu")
    contract = runner.contract
    names, position = [*reversed(contract.state_names[:6]), "other"], [0.6, 0.5, 0.4, 0.3, 0.2, 0.1, 9.0]
    state = contract.state_from_robot(names, position, {"force_z": -40.0, "gripper": 0.03})
    np.testing.assert_allclose(state, [0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.03, -40.0])
    images = {"color": np.full((32, 48, 3), 99, np.uint8)}
    step = runner.step(state, images)
    assert step.command_rad.shape == step.action.shape == (7,)
    np.testing.assert_allclose(step.command_rad, state[:7] + step.action, atol=1e-6)
    np.testing.assert_array_equal(contract.to_robot(step.command_rad), step.command_rad)
    assert contract.action_names == [*contract.state_names[:6], "gripper"]
    runner.reset()
    assert np.abs(runner.step(state + [*[0] * 7, 8.0], images).action - step.action).max() > 1e-9
    for others in (None, {"gripper": 0.03}, {"gripper": 0.03, "force_z": 0.0, "force_x": 0.0}):
        with pytest.raises(PolicyError) as refused:
            contract.state_from_robot(names, position, others)
        expected = "gripper (/gripper/state:position[finger] in m), force_z (/ft/wrench:wrench.force.z in N)"
        assert str(refused.value).endswith(f"beside the joints; the policy's are {expected}")


@pytest.mark.parametrize("mode", ["absolute", "relative"])
def test_other_kinds_of_action_of_a_gripper(cell, tmp_path, mode):
    """Absolute and relative actions are commanded as positions of the gripper, not turned, and have no limits."""
    output = run(cell / "bags", tmp_path, **POLICY | {"training__steps": 1}, conventions__action_mode=mode)
    runner = PolicyRunner(output, backend="native", device="cpu")
    state = np.array([0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 40.0, -40.0])  # as a gripper in mm, more than a turn
    chunk = runner.predict_chunk(state, {"color": np.full((32, 48, 3), 99, np.uint8)})
    command = runner.command(state, {"color": np.full((32, 48, 3), 99, np.uint8)})
    assert command[6] == chunk[0, 6] and abs(command[6] - (40 if mode == "relative" else 0)) < 3
    assert runner.contract.to_robot(command)[6] == command[6]


def test_the_evaluation_keeps_units_apart(cell, tmp_path):
    """The one figure is of the joints, in rad; the gripper has its own, in m; a rollout keeps the recorded force."""
    flags = ["--checkpoint", str(cell / "run"), "--bags", str(cell / "bags"), "--output", str(tmp_path / "out")]
    assert offline_eval.main([*flags, "--episode", "0", "--rollout", "--backend", "native", "--device", "cpu"]) == 0
    summary = json.loads((tmp_path / "out/summary.json").read_text())
    error = summary["error"]["policy"]
    joints = [of["mae"] for name, of in error["per_joint"].items() if name != "gripper"]
    assert (
        len(joints) == 6 and error["mae"] == pytest.approx(np.mean(joints)) and error["per_joint"]["gripper"]["mae"] > 0
    )
    assert summary["unit"] == "rad per frame" and summary["units"]["gripper"] == "m per frame"
    assert set(summary["rollout"]["per_other_state"]) == {"gripper"} and len(summary["rollout"]["per_joint"]) == 6
    assert "gripper, m per frame (not in all)" in (tmp_path / "out/report.html").read_text()
    schema = pq.read_schema(tmp_path / "out/episode_000.parquet")
    assert schema.field("joint_position_force_z").metadata[b"unit"] == b"N" and "gt_action_force_z" not in schema.names
    assert schema.field("gt_action_gripper").metadata[b"unit"] == b"m per frame"
    (episode, *_), _ = load_episodes(train.bag_settings(train.load_config(Path(arguments(cell / "bags", cell)[1]), [
        a.removeprefix("--override=") for a in arguments(cell / "bags", cell, **POLICY)[2:]])), 1, False)  # fmt: skip
    still = no_motion(episode.state[:, :7], episode.action, np.zeros(7, bool), "delta")
    moved = np.abs(still - episode.action)[:-1, 6].mean()
    assert summary["error"]["no motion"]["per_joint"]["gripper"]["mae"] == pytest.approx(moved, rel=1e-5)


def test_a_resumed_run_has_the_same_states(cell, tmp_path, capsys):
    """Stopped and resumed it is the same run; with its states in another order it is refused."""
    run(cell / "bags", tmp_path, **POLICY | {"training__steps": 2})
    run(cell / "bags", tmp_path, "--resume", **POLICY)
    assert_same_run(tmp_path / "run", cell / "run")
    swapped = "{force_z: /ft/wrench:wrench.force.z, gripper: '/gripper/state:position[finger]'}"
    changed = POLICY | {"data__state_topics": swapped, "training__steps": 6}
    assert train.main(arguments(cell / "bags", tmp_path, ("--resume",), **changed)) == 1
    assert "cannot resume, the run has changed: data.state_topics" in capsys.readouterr().err


def test_states_are_part_of_what_a_run_is():
    """Another field or another observed state is another run; a checkpoint from before these keys goes on without."""

    def fingerprint(**data):
        return identity.fingerprint(
            None, dataclasses.asdict(train.Config(data=train.DataConfig(**data))), act, {}, [], [], []
        )

    act = train.act_config(train.Config())
    plain = fingerprint()
    before = {name: value for name, value in plain.items() if not name.endswith(("state_topics", "observed_only"))}
    assert len(before) == len(plain) - 2 and identity.differences(before, plain) == []
    assert identity.differences(plain, fingerprint(state_units={"elbow_joint": "rad"})) == []
    one, other = (fingerprint(state_topics={"g": f"/g:position[{place}]"}) for place in (0, 1))
    for was, now in ((one, other), (plain, one), (one, plain)):
        assert [line.split(" ")[0] for line in identity.differences(was, now)] == ["data.state_topics"]
    assert identity.differences(plain, fingerprint(observed_only=["elbow_joint"]))[0].startswith("data.observed_only")


@pytest.mark.parametrize(("held", "times_ns"), [(True, [10, 20]), (False, [20])])
def test_a_part_of_a_recording_knows_what_held_at_its_beginning(held: bool, times_ns: list[int]):
    """A switch that was last said before an episode began holds in it; of what is interpolated nothing lies before."""
    samples = Samples(np.array([0, 10, 20, 30]), np.array([0.0, 1.0, 2.0, 3.0]), held)
    part = samples.between(12, 30)
    assert part.time_ns.tolist() == times_ns and part.value.tolist() == [time / 10 for time in times_ns]
