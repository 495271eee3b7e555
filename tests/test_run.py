"""`python -m ur10e_deploy.run`: what it refuses, what it leaves, and that its bag is one that training reads."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
from rosbags.highlevel import AnyReader
from ur10e_deploy import recording, run
from ur10e_deploy.policy_runner import PolicyRunner
from ur10e_deploy.sources import BagSource

from tests.checkpoints import edit_json
from tests.policies import contract_of, trained, trained_absolute, trained_relative
from ur10e import JOINT_NAMES

__all__ = ["trained", "trained_absolute", "trained_relative"]  # fixtures
# The scenes and starts of sample_bags; a policy that was trained for a moment jumps about, which is not the point here.
SCENE = ["--seed", "7", "--episode", "1", "--max-beyond-rad", "9", "--max-limited-s", "99", "--command-hz", "125"]


def start(checkpoint: Path, output: Path, *options: str) -> int:
    return run.main(["--checkpoint", str(checkpoint), "--robot", "sim", "--output", str(output), *SCENE, *options])


def test_the_contract_says_how_training_episodes_began(trained: Path, sample_bags: Path, tmp_path: Path):
    """train_config.json: the first state of each training episode, brightness of first pictures, recorded sizes."""
    written, contract = contract_of(trained), PolicyRunner(trained, backend="native").contract
    values = written["config"]["data"] | written["config"]["conventions"]
    source = BagSource(sample_bags, values, tmp_path / "cache", written["angle_reference_rad"])
    episodes = [source.episode(i) for i in source.episode_indices() if source.episode_name(i) in
                written["training_episodes"]]  # fmt: skip
    np.testing.assert_allclose(contract.start_states, [e.state_rad[0] for e in episodes], atol=1e-4)
    assert contract.recorded_shapes == {"color": ((96, 128),)}
    levels = [next(iter(source.frames(e.index, 0, 1))).images["color"].mean() for e in episodes]
    assert contract.start_brightness["color"] == pytest.approx((min(levels), max(levels)), abs=0.1)


@pytest.mark.parametrize("policy", ["trained", "trained_absolute", "trained_relative"])
def test_a_run_leaves_a_report_and_a_bag_that_training_reads(policy: str, request, tmp_path: Path, capsys):
    """All action modes: exit code 0, one screen, a report, and in the bag the very states, pictures and commands."""
    checkpoint = request.getfixturevalue(policy)
    assert start(checkpoint, tmp_path / "out", "--duration-s", "1.5") == 0
    screen = capsys.readouterr().out
    assert "start pose 0.000 rad from the nearest start of training" in screen and "ended         the 1.5 s" in screen
    numbers = json.loads((tmp_path / "out/run.json").read_text())
    assert numbers["orderly"] and numbers["chunks"] > 0 and numbers["periods"] > 180
    for what, peak in numbers["peaks"].items():
        assert all(0 <= found <= limit for found, limit in peak.values()), what
    assert 0 < max(found for found, _ in numbers["peaks"]["speed_rad_s"].values())
    page = (tmp_path / "out/report.html").read_text()
    assert "the 1.5 s are over" in page and "data:image/png;base64" in page

    written = contract_of(checkpoint)
    values = written["config"]["data"] | written["config"]["conventions"] | {"min_used_share": 0.1}
    source = BagSource(tmp_path / "out", values, tmp_path / "cache", written["angle_reference_rad"])
    (index,) = source.episode_indices()
    episode = source.episode(index)
    assert 35 < len(episode.timestamp_s) < 60
    image = next(iter(source.frames(index, 0, 1))).images["color"]
    assert image.shape == (32, 48, 3) and 20 < image.mean() < 235

    with AnyReader([tmp_path / "out/bag"]) as reader:
        commands = [
            reader.deserialize(raw, c.msgtype).data
            for c, _, raw in reader.messages()
            if c.topic == "/forward_position_controller/commands"
        ]
        events = [reader.deserialize(raw, c.msgtype).data for c, _, raw in reader.messages() if "event" in c.topic]
        topics = set(reader.topics)
    assert len(commands) >= 180 and events[0] == "waiting for the policy" and "the 1.5 s are over" in events[-1]
    assert {"/joint_states", "/camera/color/image_raw", "/runner/chunk"} <= topics
    order = [written["joint_names"].index(name) for name in JOINT_NAMES]
    acceleration = np.abs(np.diff(np.array(commands)[:, order], 2, axis=0)).max() * 125**2
    assert acceleration == pytest.approx(max(p for p, _ in numbers["peaks"]["acceleration_rad_s2"].values()), rel=1e-6)

    # The commands can be trained on, too: actions of what was commanded.
    commanded = values | {"action_source": "/forward_position_controller/commands"}
    source = BagSource(tmp_path / "out", commanded, tmp_path / "cache", written["angle_reference_rad"])
    assert np.isfinite(source.episode(0).action).all()


def test_dry_run_and_shadow_move_nothing(trained_absolute: Path, tmp_path: Path, capsys):
    """Exit code 0, a report that says so; the shadow compares with the person's way."""
    assert start(trained_absolute, tmp_path / "dry", "--dry-run", "--duration-s", "0.6") == 0
    assert start(trained_absolute, tmp_path / "shadow", "--shadow", "--duration-s", "1.2", "--no-bag") == 0
    assert "nothing was commanded" in (tmp_path / "dry/report.html").read_text()
    with AnyReader([tmp_path / "dry/bag"]) as reader:  # what was not sent is no action to learn from
        assert {"/runner/not_sent/commands", "/joint_states"} <= set(reader.topics)
        assert "/forward_position_controller/commands" not in reader.topics
    assert not (tmp_path / "shadow/bag").exists()
    numbers = json.loads((tmp_path / "shadow/run.json").read_text())
    assert not numbers["commanding"] and [row["ahead_s"] for row in numbers["shadow"]] == [0.033]  # a chunk of 8
    assert "rad from what the arm did" in capsys.readouterr().out


def test_real_time_keeps_its_rate(trained: Path, tmp_path: Path):
    """The same command by the wall clock: as many periods as it says, however busy the machine, and none broken."""
    slow = ("--max-joint-age-s", "5", "--max-camera-age-s", "5", "--recover-s", "20", "--max-gap-ms", "9999")
    assert start(trained, tmp_path / "out", "--real-time", "--duration-s", "1.5", *slow) == 0
    numbers = json.loads((tmp_path / "out/run.json").read_text())
    assert numbers["clock"] == "real time"
    assert numbers["periods"] + numbers["missed_periods"] == pytest.approx(1.5 * 125, abs=60)
    assert (tmp_path / "out/bag/metadata.yaml").exists()


WRONG = {
    "far": (["--episode", "0", "--seed", "0"], "the arm is far from every start of training"),
    "rate": (["--command-hz", "1000"], "--command-hz is 1000; expected 125 to 500"),
    "fraction": (["--speed-fraction", "2"], "--speed-fraction is 2; expected 0.01 to 1"),
    "both": (["--dry-run", "--shadow"], "--dry-run --shadow: expected one of them"),
    "replan": (["--replan", "9"], "--replan 9: expected at most 8 (chunk_size)"),
    "latency": (["--real-time", "--latency-ms", "9"], "--latency-ms: is for lock step"),
    "limits": (["--limits", "no.yaml"], "--limits no.yaml: cannot be read"),
    "of another": (["--servo-gain", "500"], "--servo-gain: is of --robot rtde, not of sim"),
}


@pytest.mark.parametrize("what", WRONG)
def test_what_cannot_be_is_one_line(what: str, trained: Path, tmp_path: Path, capsys):
    """Exit code 1, one line that names the option, and no output directory."""
    options, message = WRONG[what]
    if what == "far":  # not the sample bags' scenes, and a tolerance that does not forgive it
        checkpoint = tmp_path / "copy"
        shutil.copytree(trained / "last/pretrained_model", checkpoint)
        edit_json(checkpoint / "train_config.json", lambda c: c.update(start_states=[[1.0, -1, 1, -1, -1, 0]]))
    else:
        checkpoint = trained
    assert start(checkpoint, tmp_path / "out", *options) == 1
    error = capsys.readouterr().err.strip()
    assert error.startswith("error: ") and message in error and "\n" not in error
    assert not (tmp_path / "out").exists()


def test_no_contract_no_start_and_no_second_run(trained: Path, tmp_path: Path, capsys):
    """Without a contract: refused. Without starts in it: refused, unless said. Never over another run."""
    checkpoint = tmp_path / "copy"
    shutil.copytree(trained / "last/pretrained_model", checkpoint)
    forget = ("start_states", "start_brightness", "recorded_shapes")
    edit_json(checkpoint / "train_config.json", lambda c: [c.pop(name) for name in forget])
    assert start(checkpoint, tmp_path / "out") == 1
    assert "add --allow-unknown-start" in capsys.readouterr().err
    assert start(checkpoint, tmp_path / "out", "--allow-unknown-start", "--duration-s", "0.3", "--no-bag") == 0
    assert "whether this is such a pose was not checked" in capsys.readouterr().out
    assert start(trained, tmp_path / "out") == 1
    assert "is there already, and no run is written over" in capsys.readouterr().err
    (checkpoint / "train_config.json").unlink()
    assert start(checkpoint, tmp_path / "other") == 1
    assert "no contract of train.py in it" in capsys.readouterr().err


def test_a_disk_that_fails_stops_no_arm(trained: Path, tmp_path: Path, capsys, monkeypatch: pytest.MonkeyPatch):
    """The run goes on to its end, and says that the bag is not complete."""

    def full(*_, **__):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(recording.Writer, "write", full)
    assert start(trained, tmp_path / "out", "--duration-s", "0.4") == 0
    assert "note: the bag is not complete: OSError: [Errno 28] No space left" in capsys.readouterr().out
    assert "the bag is not complete" in (tmp_path / "out/report.html").read_text()
