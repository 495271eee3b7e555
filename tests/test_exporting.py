"""python -m rosbag_dataset export: what real LeRobot 0.4.4 reads of it, what a stop leaves, what is refused.

All that LeRobot does here is done in one process of its own (tests/lerobot_044/exported.py), which takes 20 s to import
it: loading every dataset item by item, computing statistics, and a few steps of lerobot-train.
"""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest
import torch
from safetensors.torch import load_file
from ur10e_deploy.lerobot_dataset import LeRobotDatasetSource

from rosbag_dataset import ChunkDataset, Episode, angle_references, exporting, load_episodes, refer_angles
from rosbag_dataset.exporting import main
from tests import bags
from tests.bags import make_take, write_bag
from tests.checks import ROOT, wait_for
from tests.episodes import without
from tests.lerobot_044 import launch
from tests.once import once
from tests.policies import trained

__all__ = ["trained"]  # a fixture

COLOR = "observation.images.color"
SIDECAR = "- {start_s: 0, stop_s: 0.5, task: pick}\n- {start_s: 0.5, stop_s: 1.6, task: place}\n"
TRAIN = {
    "dataset.repo_id": "local/x", "dataset.video_backend": "pyav", "policy.device": "cpu",
    "policy.push_to_hub": "false", "steps": 2, "batch_size": 2, "num_workers": 0, "save_freq": 2, "log_freq": 1,
    "wandb.enable": "false",
}  # fmt: skip


def export(bag_dir: Path, out: Path, *options: str, **overrides: object) -> int:
    pairs = [f"--override={name.replace('__', '.')}={value}" for name, value in overrides.items()]
    cache = f"--override=data.cache_dir={bag_dir.parent / 'cache'}"
    return main(["--format=lerobot-v3", str(bag_dir), str(out), cache, *pairs, *options])


def ours(bag_dir: Path, **changes: object) -> list[Episode]:
    """The episodes that the export has, by the way of a training."""
    settings = bags.settings(bag_dir, bag_dir.parent / "cache", action_mode="absolute", **changes)
    episodes, _ = load_episodes(settings, progress=False)
    for episode in episodes:
        refer_angles(episode, angle_references(episodes), settings)
    return episodes


def gap_bags(folder: Path) -> Path:
    """A recording with a gap of the camera, and one without; a sidecar cuts each into two tasks."""
    take = make_take(seconds=1.6, size=(64, 64))
    write_bag(folder / "bags/a", without(take, camera=(0.7, 1.0)).messages())
    write_bag(folder / "bags/b", make_take(seconds=1.6, size=(64, 64), seed=1).messages())
    for name in "ab":
        (folder / "bags" / name / "episodes.yaml").write_text(SIDECAR)
    return folder / "bags"


def two_of(sample_bags: Path, folder: Path) -> Path:
    """Two of the sample bags: LeRobot opens a video anew for each frame."""
    for name in ("episode_000", "episode_001"):
        (folder / "two").mkdir(exist_ok=True)
        if not (folder / "two" / name).exists():
            (folder / "two" / name).symlink_to(sample_bags / name)
    return folder / "two"


@pytest.fixture(scope="module")
def exported(sample_bags: Path, trained: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with datasets, what LeRobot reads of each, and train/, where lerobot-train went on from our policy."""
    if not launch.PYTHON.exists():
        pytest.fail(f"no LeRobot 0.4.4 at {launch.PYTHON}: `make test` creates it", pytrace=False)

    def make(folder: Path) -> None:
        for name, options in (("av1", ["--codec=av1"]), ("h264", ["--codec=h264"]), ("images", ["--images"])):
            assert export(two_of(sample_bags, folder), folder / name, "--task=reach", *options) == 0
        cut = gap_bags(folder)
        assert export(cut, folder / "cut", "--images", data__episodes="file", data__fps=12, data__max_offset_ms=40,
                      data__min_used_share=0) == 0  # fmt: skip
        arguments = [f"--{key}={value}" for key, value in TRAIN.items()]
        arguments += [f"--dataset.root={folder / 'av1'}", f"--output_dir={folder / 'train'}"]
        arguments += [f"--policy.path={trained / 'last/pretrained_model'}"]
        script = ROOT / "tests/lerobot_044/exported.py"
        result = subprocess.run(
            [launch.PYTHON, script, folder, "av1", "h264", "images", "cut", "--", *arguments],
            env={**os.environ, "PYTHONPATH": "", "HF_HOME": str(folder / "home")}, capture_output=True, text=True,
            timeout=1800,
        )  # fmt: skip
        assert result.returncode == 0, result.stderr[-3000:]

    return once(tmp_path_factory, "exported", make)


def read(exported: Path, name: str) -> tuple[dict[str, np.ndarray], dict]:
    return dict(np.load(exported / f"{name}.npz")), json.loads((exported / f"{name}.json").read_text())


@pytest.mark.parametrize("name", ["images", "av1", "h264"])
def test_lerobot_reads_the_frames_that_a_training_has(exported: Path, name: str) -> None:
    """State and action bit for bit, pictures too, or, in a video, as near as its codec keeps them."""
    found, said = read(exported, name)
    wanted = ChunkDataset(ours(exported / "two"), 1)
    samples = wanted.__getitems__(range(len(wanted)))
    assert np.array_equal(found["observation.state"], samples["observation.state"])
    assert np.array_equal(found["action"], samples["action"][:, 0])
    off = np.abs(found[COLOR].astype(int) - samples[COLOR])
    assert off.max() == 0 if name == "images" else off.mean() < 4
    shifted = np.abs(found[COLOR][1:].astype(int) - samples[COLOR][:-1]).mean()
    assert off.mean() < shifted, "each frame is nearest to its own"
    names = [wanted.locate(i)[0] for i in range(len(wanted))]
    assert [f"episode_{i:03d}" for i in found["episode_index"]] == names
    assert np.array_equal(found["index"], np.arange(len(wanted)))
    assert (said["fps"], said["robot_type"], set(said["tasks"])) == (30, "ur10e", {"reach"})
    assert said["names"]["action"] == said["names"]["observation.state"] == list(bags.JOINTS)


@pytest.mark.parametrize("name", ["images", "av1", "h264", "cut"])
def test_our_own_reader_reads_what_lerobot_reads(exported: Path, name: str) -> None:
    """Pixel by pixel, with nothing to note; and it learns what only our exports say."""
    found, _ = read(exported, name)
    source = LeRobotDatasetSource(exported / name)
    frames = [(index, frame) for index in source.episode_indices() for frame in source.frames(index)]
    assert [index for index, _ in frames] == found["episode_index"].tolist()
    assert np.array_equal([frame.images["color"] for _, frame in frames], found[COLOR])
    assert np.array_equal([frame.state_rad for _, frame in frames], found["observation.state"])
    assert np.array_equal(np.concatenate([source.episode(i).action for i in source.episode_indices()]), found["action"])
    assert (source.notes, source.action_mode, source.units) == ([], "absolute", ["rad"] * 6)
    assert source.recorded(0)[0] in ("a", "episode_000")


def test_a_gap_and_a_sidecar_begin_another_episode(exported: Path) -> None:
    """Segments are episodes: no action leads across frames that were dropped. Each has the task of its sidecar."""
    found, said = read(exported, "cut")
    parts = ours(exported / "bags", episodes="file", fps=12, max_offset_ms=40)
    assert [len(part.segments) for part in parts] == [1, 2, 1, 1]
    lengths = [stop - start - 1 for part in parts for start, stop in part.segments]
    assert np.bincount(found["episode_index"]).tolist() == lengths
    at = np.flatnonzero(np.diff(found["episode_index"]) == 0)
    assert np.array_equal(found["action"][at], found["observation.state"][at + 1])
    tasks = [task for part, task in zip(parts, ["pick", "place"] * 2, strict=True) for _ in part.segments]
    assert [said["tasks"][i] for i in np.cumsum([0, *lengths[:-1]])] == tasks
    assert np.array_equal(found["timestamp"], (found["frame_index"] / 12).astype(np.float32))


def test_statistics_are_those_that_lerobot_computes(exported: Path) -> None:
    """Least, largest, quantiles and counts are LeRobot's; means and deviations are exact, where it sums in float32 (and
    0.4.4 squares pictures in 8 bits)."""
    found, theirs = read(exported, "images")
    stats = json.loads((exported / "images/meta/stats.json").read_text())
    assert stats.keys() == theirs["stats"].keys()
    for key, of in theirs["stats"].items():
        assert of.keys() == stats[key].keys(), key
        rows = found[key].astype(np.float64).reshape(-1, 3 if key == COLOR else found[key][0].size)
        exact = {"mean": rows.mean(axis=0), "std": rows.std(axis=0)}
        for name in of:
            what = f"{key} {name}"
            if name in exact:
                scale = 255 if key == COLOR else 1
                np.testing.assert_allclose(np.ravel(stats[key][name]), exact[name] / scale, rtol=1e-6, err_msg=what)
                near = np.abs(np.subtract(stats[key][name], of[name])).max() < 0.02 * max(1, np.max(stats[key][name]))
                assert near or (what == f"{COLOR} std" and theirs["lerobot"].startswith("0.4.")), what
            else:
                np.testing.assert_allclose(stats[key][name], of[name], rtol=1e-4, atol=1e-5, err_msg=what)
    assert json.loads((exported / "av1/meta/stats.json").read_text()) == stats, "of the pictures before the codec"


def test_lerobot_trains_on_it(exported: Path, trained: Path) -> None:
    """lerobot-train went on from our checkpoint, took two steps on the videos, and saved."""
    after = load_file(exported / "train/checkpoints/last/pretrained_model/model.safetensors")
    before = load_file(trained / "last/pretrained_model/model.safetensors")
    changed = {name for name in after if not torch.equal(after[name], before[name])}
    assert "model.action_head.weight" in changed
    assert all((after[name] - before[name]).abs().max() < 1e-3 for name in changed), "from there, not from scratch"


# -- a stop, and a rerun --------------------------------------------------------------------------------------------


def contents(out: Path) -> dict[str, bytes]:
    return {str(p.relative_to(out)): p.read_bytes() for p in sorted(out.rglob("*")) if p.is_file()}


def test_a_killed_process_leaves_no_dataset_and_a_rerun_goes_on(
    sample_bags: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    """Files that were finished are not written again; the end is byte for byte that of an unbroken export."""
    from rosbag_dataset import lerobot_v3

    monkeypatch.setattr(exporting, "MIN_FILE_FRAMES", 100)
    real = lerobot_v3.write_file
    out = tmp_path / "out"

    def killed(dataset, number, parts, count):
        if number == 2:
            wait_for(lambda: (out / ".export/000000.json").exists() and (out / ".export/000001.json").exists())
            os.kill(os.getpid(), signal.SIGKILL)
        return real(dataset, number, parts, count)

    monkeypatch.setattr(lerobot_v3, "write_file", killed)
    assert export(sample_bags, out, "--codec=h264") == 1
    assert "a process that writes the dataset was killed" in capsys.readouterr().err
    assert not (out / "meta/info.json").exists()
    (out / "data/chunk-000/.file-002.parquet.1.parquet").write_bytes(b"half")
    before = {file: file.stat().st_mtime_ns for file in out.rglob("file-00[01].*")}
    monkeypatch.setattr(lerobot_v3, "write_file", real)
    assert export(sample_bags, out, "--codec=h264") == 0
    assert "going on: " in capsys.readouterr().out
    assert {file: file.stat().st_mtime_ns for file in before} == before and before
    assert export(sample_bags, tmp_path / "unbroken", "--codec=h264") == 0
    assert contents(out) == contents(tmp_path / "unbroken")
    assert export(sample_bags, out, "--codec=h264") == 0
    assert "is whole already" in capsys.readouterr().out
    assert contents(out) == contents(tmp_path / "unbroken")


def test_a_stop_is_one_line(sample_bags: Path, tmp_path: Path) -> None:
    """SIGTERM: exit code 130, what to do, and no process is left."""
    out = tmp_path / "out"
    code = (
        "import sys, time; from rosbag_dataset import exporting, lerobot_v3\n"
        "lerobot_v3.write_file = lambda *rest: time.sleep(60)\n"
        "sys.exit(exporting.main(sys.argv[1:]))"
    )
    cache = f"--override=data.cache_dir={sample_bags.parent / 'cache'}"
    process = subprocess.Popen(
        [sys.executable, "-c", code, "--format=lerobot-v3", sample_bags, out, cache],
        cwd=ROOT, stderr=subprocess.PIPE, text=True,
    )  # fmt: skip
    wait_for(lambda: (out / ".export/job.json").exists(), 60)
    process.send_signal(signal.SIGTERM)
    _, err = process.communicate(timeout=20)
    assert process.returncode == 130
    assert f"stopped; run the same again to go on in {out}" in err.splitlines() and "Traceback" not in err
    assert not (out / "meta").exists()


# -- what is refused ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("overrides", "said"),
    [
        (
            {"conventions__action_mode": "relative"},
            "conventions.action_mode: found relative, expected absolute or delta",
        ),
        ({"conventions__apply_joint_sign": "true"}, "conventions.apply_joint_sign: found true, expected false"),
        ({"data__fsp": 3}, "unknown key data.fsp; did you mean data.fps?"),
        ({"conventions__image_resize": "[33, 48]"}, "are 33x48 (HxW), and a video's height and width are even"),
    ],
)
def test_settings_that_a_dataset_cannot_have(sample_bags, tmp_path, capsys, overrides, said) -> None:
    """One line, exit code 1, and no folder."""
    assert export(sample_bags, tmp_path / "out", **overrides) == 1
    err = capsys.readouterr().err
    assert said in err and err.splitlines()[-1].startswith("error: ")
    assert not (tmp_path / "out/meta").exists()


def test_a_folder_with_something_else_is_left_alone(exported: Path, tmp_path: Path, capsys) -> None:
    """Neither a stranger's file nor another export is written over."""
    (tmp_path / "mine").write_text("x")
    assert export(exported / "two", tmp_path) == 1
    assert "expected an empty folder, or one that an export has begun, found mine" in capsys.readouterr().err
    root = Path(shutil.copytree(exported / "images", tmp_path / "other"))
    assert export(exported / "two", root, "--images", "--task=another") == 1
    assert "export of other bags or with other settings (segments)" in capsys.readouterr().err
    assert export(exported / "two", root, "--task=reach") == 1
    assert "(pictures)" in capsys.readouterr().err
    assert contents(root) == contents(exported / "images")
    assert [p.name for p in tmp_path.iterdir() if p.is_file()] == ["mine"]


def test_actions_can_be_changes_per_frame(sample_bags: Path, tmp_path: Path, capsys) -> None:
    """If asked for; the metadata and the last line say so."""
    out = tmp_path / "out"
    assert export(sample_bags, out, "--codec=h264", conventions__action_mode="delta") == 0
    assert "actions are changes per frame (conventions.action_mode: delta)" in capsys.readouterr().out
    action = json.loads((out / "meta/info.json").read_text())["features"]["action"]
    assert action["action_mode"] == "delta" and action["units"] == ["rad per frame"] * 6
    rows = pq.read_table(out / "data", columns=["observation.state", "action"]).slice(0, 2).to_pydict()
    state, moved = np.array(rows["observation.state"]), rows["action"][0]
    np.testing.assert_allclose(state[1] - state[0], moved, atol=1e-6)


def test_files_are_filled_and_never_longer_than_lerobots_tolerance_allows() -> None:
    """Segments stay whole and in order; one that is longer than a file has one to itself."""
    of = [exporting.Segment(0, 0, length, "") for length in (40, 60, 1, 500, 30, 30, 50)]
    assert exporting.divide_into_files(of, 100) == [2, 1, 1, 2, 1]
    assert exporting.MAX_FILE_S < 1024, "float32 seconds are coarser than 1e-4 from there on"


def test_looking_at_bags_needs_no_pyarrow() -> None:
    """`python -m rosbag_dataset` imports what the export needs only for an export."""
    code = "import sys, rosbag_dataset.exporting; sys.exit(any(m in sys.modules for m in ('pyarrow', 'av')))"
    assert subprocess.run([sys.executable, "-c", code], cwd=ROOT).returncode == 0
