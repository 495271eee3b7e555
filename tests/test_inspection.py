"""python -m rosbag_dataset: what it shows, what it finds wrong, and that it writes nothing."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys

import pytest
import yaml

from rosbag_dataset.inspection import main
from tests.bags import CAMERA_TOPIC, JOINT_TOPIC, compressed, joint_state, make_take, storage_file, write_bag
from tests.checks import ROOT, TAKE
from train import load_config
from training.errors import ConfigError


def inspect(capsys, *args):
    """-> (exit code, stdout, stderr) of the inspection."""
    code = main([str(a) for a in args])
    return code, *capsys.readouterr()


def files_below(folder):
    return {p: p.stat().st_mtime_ns for p in folder.rglob("*")}


@pytest.mark.parametrize("verify", [[], ["--verify"]], ids=["plain", "verify"])
def test_inspection_writes_nothing(bag_dir, verify, tmp_path):
    """As a command of its own, in the folder of the bags: topics, the table, exit code 0, and no file anywhere."""
    before = files_below(tmp_path)
    done = subprocess.run(
        [sys.executable, "-m", "rosbag_dataset", bag_dir, *verify],
        cwd=tmp_path, env=os.environ | {"PYTHONPATH": str(ROOT), "PYTHONDONTWRITEBYTECODE": "1"},
        capture_output=True, text=True,
    )  # fmt: skip
    assert (done.returncode, done.stderr) == (0, "")
    assert f"    {CAMERA_TOPIC}  sensor_msgs/msg/Image  11\n" in done.stdout
    assert f"    {JOINT_TOPIC}  sensor_msgs/msg/JointState  50\n" in done.stdout
    assert "2 episodes, 22 frames kept, 0 dropped, 2 segments" in done.stdout
    assert files_below(tmp_path) == before


def test_inspection_report(bag_dir, tmp_path, capsys):
    """--json holds what the table is made of, and each bad bag with the reason; exit code 1 then."""
    os.truncate(storage_file(bag_dir / "b"), 5000)
    code, out, err = inspect(capsys, bag_dir, "--json", tmp_path / "report.json")
    assert code == 1 and "error: b: b.mcap is damaged" in err and len(err.splitlines()) == 1
    report = json.loads((tmp_path / "report.json").read_text())
    assert [e["episode"] for e in report["episodes"]] == ["a"] and report["episodes"][0]["frames"] == 11
    assert [b["bag"] for b in report["bad"]] == ["b"] and report["bad"][0]["why"] in err
    assert "1 episodes, 11 frames kept" in out


def test_inspection_verifies_pixels_when_asked(tmp_path, capsys):
    """A JPEG that does not decode is found by --verify; without it only headers are looked at."""
    frames = [(CAMERA_TOPIC, int(t), compressed(0, b"not a picture")) for t in TAKE.camera_ns]
    write_bag(tmp_path / "bags" / "a", [m for m in TAKE.messages() if m[0] == JOINT_TOPIC] + frames)
    assert inspect(capsys, tmp_path / "bags")[0] == 0
    code, _, err = inspect(capsys, tmp_path / "bags", "--verify")
    assert code == 1 and "do not decode" in err


def test_inspection_finds_copies(bag_dir, tmp_path, capsys):
    """Copies are pointed out by what they hold: a comment in the metadata makes no other recording of one."""
    shutil.copytree(bag_dir / "a", bag_dir / "c")
    with (bag_dir / "c" / "metadata.yaml").open("a") as metadata:
        metadata.write("# a comment\n")
    for options in ([], ["--verify"]):
        out = inspect(capsys, bag_dir, *options)[1]
        assert "c is a copy of a" in out and out.count("is a copy of") == 1


def test_inspection_says_which_joint_messages_are_ignored(bag_dir, tmp_path, capsys):
    """Messages of a gripper that is not wanted are counted in one line, and in the report; a joint of theirs can be."""
    gripper = [(JOINT_TOPIC, int(t), joint_state(int(t), [0.1], ["finger_joint"])) for t in TAKE.joint_ns[::2]]
    write_bag(bag_dir / "c", TAKE.messages() + gripper)
    code, out, _ = inspect(capsys, bag_dir, "--json", tmp_path / "report.json")
    lines = [line for line in out.splitlines() if "ignored" in line]
    assert (code, len(lines)) == (0, 1)
    assert "25 messages of data.joint_topic, in 1 of 3 episodes, have none of data.joint_names" in lines[0]
    episodes = json.loads((tmp_path / "report.json").read_text())["episodes"]
    assert [episode["ignored_joint_messages"] for episode in episodes] == [0, 0, 25]


def test_inspection_finds_sizes_that_differ(bag_dir, capsys):
    """What training would refuse, the inspection refuses."""
    write_bag(bag_dir / "c", make_take(seconds=0.4, size=(10, 12)).messages())
    code, _, err = inspect(capsys, bag_dir)
    assert code == 1 and "c: images of color are 10x12, those of a are 6x8" in err


def test_inspection_with_a_config(bag_dir, tmp_path, capsys):
    """--config brings topics and joints; what it does not hold is as in config.yaml."""
    config = tmp_path / "my.yaml"
    config.write_text(yaml.safe_dump({"data": {"fps": 10, "camera_topic": "/nope"}, "model": {"chunk_size": 3}}))
    code, _, err = inspect(capsys, bag_dir, "--config", config)
    assert code == 1 and f"no topic /nope; set it to one of the topics in this bag: {CAMERA_TOPIC}" in err
    config.write_text(yaml.safe_dump({"data": {"fps": 10}}))
    code, out, _ = inspect(capsys, bag_dir, "--config", config)
    assert code == 0 and "8 frames kept" in out


@pytest.mark.parametrize(
    ("text", "fact"),
    [
        ("data: [1", "not valid YAML"),
        ("data:\n\tfps: 3", "indent with spaces, not tabs"),
        ("data: {fps: fast}", "'fast'"),
    ],
    ids=["not-yaml", "tab", "wrong-type"],
)
def test_inspection_with_a_bad_config(bag_dir, tmp_path, capsys, text, fact):
    """One line, exit code 1."""
    (tmp_path / "bad.yaml").write_text(text)
    code, _, err = inspect(capsys, bag_dir, "--config", tmp_path / "bad.yaml")
    assert code == 1 and err.startswith("error: ") and fact in err and len(err.splitlines()) == 1


WRONG_SETTINGS = [
    ("data", "fps", 0), ("data", "max_offset_ms", -1), ("data", "joint_names", []), ("data", "joint_resample", "cubic"),
    ("data", "time_source", "both"), ("data", "on_bad_bag", "ignore"), ("conventions", "joint_sign", [1, -1]),
    ("conventions", "joint_sign", [2] * 6), ("conventions", "image_resize", [30]), ("data", "fsp", 30),
    ("data", "min_used_share", 1.5), ("conventions", "action_mode", "both"),
    ("data", "camera_topics", {"a": "/x", "b": "/x"}),
    ("data", "episodes", "some"), ("data", "episode_pause_s", 0), ("data", "trim_still_s", -1),
    ("data", "min_episode_s", -1),
]  # fmt: skip


@pytest.mark.parametrize(("section", "key", "value"), WRONG_SETTINGS, ids=[f"{k}={v}" for _, k, v in WRONG_SETTINGS])
def test_inspection_refuses_what_the_trainer_refuses(bag_dir, tmp_path, capsys, section, key, value):
    """One line that names the config, the key, what was found and what was expected, in the trainer's words."""
    path = tmp_path / "wrong.yaml"
    path.write_text(yaml.safe_dump({"conventions": {"apply_joint_sign": True}} | {section: {key: value}}))
    if key == "joint_sign":
        path.write_text(yaml.safe_dump({"conventions": {"apply_joint_sign": True, key: value}}))
    code, out, err = inspect(capsys, bag_dir, "--config", path)
    assert (code, out) == (1, "") and err.startswith(f"error: {path}: ") and len(err.splitlines()) == 1, err
    with pytest.raises(ConfigError) as refused:
        load_config(path)
    trainer = str(refused.value)
    if key == "fsp":
        assert f"unknown key {section}.{key}" in err and f"unknown key {section}.{key}" in trainer
    else:
        assert f"{section}.{key}: found " in err and f"{section}.{key}: found " in trainer
        assert err.strip().rsplit("expected ")[-1] in trainer


@pytest.mark.parametrize(
    "override", ["data.fsp=3", "fps=3", "daat.fps=3", "training.lrr=1", "data.fps", "conventions.image_resize=[240, 3"]
)
def test_inspection_refuses_overrides_in_the_words_of_train(bag_dir, capsys, override):
    """The reader is the same; training's keys are known, too."""
    code, out, err = inspect(capsys, bag_dir, "--override", override)
    with pytest.raises(ConfigError) as refused:
        load_config(ROOT / "config.yaml", [override])
    assert (code, out, err) == (1, "", f"error: {refused.value}\n")


@pytest.mark.parametrize(
    "text",
    ["dta: {fps: 3}", "- 1", "data: 3", "data: {fps: 3, fps: 4}", "training: {steps: 4, stepz: 4}", "data: {a: 1}"],
)
def test_inspection_refuses_files_in_the_words_of_train(bag_dir, tmp_path, capsys, text):
    """Unknown sections and keys, what is no section, keys given twice: as training says it."""
    (tmp_path / "my.yaml").write_text(text)
    code, out, err = inspect(capsys, bag_dir, "--config", tmp_path / "my.yaml")
    with pytest.raises(ConfigError) as refused:
        load_config(tmp_path / "my.yaml")
    assert (code, out, err) == (1, "", f"error: {refused.value}\n")


@pytest.mark.parametrize(
    ("override", "words"),
    [
        ("data.fps=fast", "data.fps: found 'fast', expected a number"),
        ("conventions.apply_joint_sign=yes", "found 'yes', expected true or false"),
        ("data.joint_names=elbow", "found 'elbow', expected a list of texts"),
        ("data.camera_topics=[/a]", "expected a mapping of names to texts or null"),
        ("model.chunk_size=1.5", "model.chunk_size: found '1.5', expected a whole number"),
        ("data.fps=0", "config.yaml with --override: data.fps: found 0.0, expected at least 0.1"),
    ],
)
def test_inspection_refuses_values_of_a_wrong_type(bag_dir, capsys, override, words):
    """What training refuses, but for the end of the line, which there says what the setting is for."""
    code, out, err = inspect(capsys, bag_dir, "--override", override)
    with pytest.raises(ConfigError):
        load_config(ROOT / "config.yaml", [override])
    assert (code, out) == (1, "") and words in err and len(err.splitlines()) == 1


def test_inspection_with_overrides(bag_dir, tmp_path, capsys):
    """They come after the config, in the order given, as for training, whose notes are there, too."""
    (tmp_path / "my.yaml").write_text("data: {fps: 15, camera_topic: /nope}\nmodel: {chunk_size: 3}\n")
    overrides = ["data.fps=5", "data.fps=1.0e1", f"data.camera_topics={{color: {CAMERA_TOPIC}}}"]
    overrides += ["conventions.image_resize=[32, 32]", "training.steps=3", "wandb.run_name=001"]
    options = [option for override in overrides for option in ("--override", override)]
    code, out, err = inspect(capsys, bag_dir, "--config", tmp_path / "my.yaml", *options)
    assert (code, err) == (0, "") and "2 episodes, 8 frames kept" in out
    assert "note: conventions.image_resize 32x32 changes the aspect ratio of camera color (6x8, HxW)" in out
    assert "padding" not in out
    out = inspect(capsys, bag_dir, "--override", "model.chunk_size=50")[1]
    assert "of the actions in chunks are padding" in out and "lower model.chunk_size to about 10" in out


def test_inspection_of_nothing(bag_dir, tmp_path, capsys):
    """A folder that is not there, and a report that cannot be written: one line each."""
    code, _, err = inspect(capsys, tmp_path / "absent")
    assert code == 1 and err.startswith("error: data.bag_dir: ") and len(err.splitlines()) == 1
    code, _, err = inspect(capsys, bag_dir, "--json", tmp_path / "absent" / "report.json")
    assert code == 1 and "--json" in err and "No such file" in err and len(err.splitlines()) == 1
