"""The workflows' own commands, rendered as OSMO renders them, run for real on sample bags: base, wandb, chain.

A task sees what its pod would: its injected files, its inputs where OSMO puts them, and nothing of this repository
(osmo_task.py). A sweep is in test_osmo_guide.py, several nodes are in test_osmo_ddp.py, downloads from blob storage in
test_osmo_blob.py.
"""

from __future__ import annotations

import json
import os
import re
import runpy
import shutil
import signal
import subprocess
from pathlib import Path
from typing import Any

import pytest
import torch
from ur10e_deploy import offline_eval

from lerobot_checkpoint import list_checkpoints, load_policy, set_score, verify_checkpoint
from tests.mlflow_server import MlflowServer
from tests.once import once
from tests.osmo_spec import place, submit
from tests.osmo_task import (
    OUTPUT,
    RUN_DIR,
    WORKFLOWS,
    TaskBox,
    add_image,
    require,
    tiny,
    write_evaluation_dataset,
)  # fmt: skip
from tests.tiny import metrics

STORAGE = "storage_url=azure://account/container/prefix"
LENGTH = dict(training__steps=9, training__save_freq=3, training__log_freq=1)


@pytest.fixture(autouse=True)
def boxes_can_run() -> None:
    require()


def task(workflow: str, *assignments: str, name: str = "train-act", **changes: object) -> dict[str, Any]:
    """One task of a workflow, made small, as it reaches its pod."""
    return place(submit(WORKFLOWS / workflow, tiny(**{**LENGTH, **changes}), *assignments), "workflow-7")[name]


def weights(run_dir: Path) -> dict[str, torch.Tensor]:
    """Of the last checkpoint, which has to be whole."""
    last = list_checkpoints(run_dir)[-1]
    verify_checkpoint(last)
    return load_policy(last).model.state_dict()


def same_weights(ours: Path, theirs: Path) -> bool:
    a, b = weights(ours), weights(theirs)
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


def error_line(box: TaskBox) -> str:
    """The one line of a failed command."""
    lines = [line for line in box.log().replace("\r", "\n").splitlines() if line.startswith("error: ")]
    assert len(lines) == 1 and "Traceback" not in box.log(), box.log()
    return lines[0]


@pytest.fixture
def nothing(tmp_path: Path) -> Path:
    """What a first attempt finds at its storage url."""
    folder = tmp_path / "nothing"
    folder.mkdir()
    return folder


@pytest.fixture(scope="session")
def finished(sample_bags: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of the base workflow's task, run to its end without interruption."""
    require()

    def make(folder: Path) -> None:
        box = TaskBox(folder, task("osmo-workflow.yaml"), {0: sample_bags})
        assert box.run() == 0, box.log()

    return once(tmp_path_factory, "osmo-finished", make)


def test_base_trains_and_hands_over(finished: Path):
    """{{output}} gets the run: whole checkpoints that load, the summary, and the names that links would lose."""
    handed = finished / OUTPUT / "train-rosbag-act"
    assert os.listdir(finished / OUTPUT) == ["train-rosbag-act"]
    names = {path.name for path in handed.iterdir()}
    assert {"checkpoint_000009", "metrics.jsonl", "summary.json", "sync_report.json", "last.txt", "best.txt"} <= names
    assert not any(name.startswith(".") for name in names)
    assert (handed / "last.txt").read_text() == "checkpoint_000009\n"
    assert same_weights(handed, finished / RUN_DIR)
    contract = json.loads((handed / "checkpoint_000009/pretrained_model/train_config.json").read_text())
    assert contract["config"]["data"]["bag_dir"] == "/data/rosbags"
    episodes = contract["training_episodes"] + contract["held_out_episodes"]
    assert sorted(episodes) == [f"episode_{i:03d}" for i in range(6)], "named as at home"


@pytest.mark.parametrize("storage", [(), (STORAGE,)], ids=["datasets", "storage_url"])
def test_episodes_are_named_as_at_home(storage: tuple[str, ...], sample_bags: Path, nothing: Path, tmp_path: Path):
    """Their names decide what counts as held out. A dataset's own two folders are not in them, and one that all the
    recordings share is, as at home and from blob storage."""
    for name in ("episode_000", "episode_001"):
        shutil.copytree(sample_bags / name, tmp_path / "local_bags/day1" / name)
    box = TaskBox(
        tmp_path / "box", task("osmo-workflow.yaml", *storage, training__steps=1),
        {0: tmp_path / "local_bags", 1: nothing},
    )  # fmt: skip
    assert box.run() == 0, box.log()
    contract = json.loads((box.run_dir / "last/pretrained_model/train_config.json").read_text())
    named = contract["training_episodes"] + contract["held_out_episodes"]
    assert sorted(named) == ["day1/episode_000", "day1/episode_001"]


def test_an_evicted_run_goes_on_on_another_node(finished: Path, sample_bags: Path, nothing: Path, tmp_path: Path):
    """SIGTERM: 75, and nothing handed over. What was uploaded, torn in its newest checkpoint, is taken up by a pod
    that has nothing else, to the same weights as without the interruption; `best` is found again."""
    base = task("osmo-workflow.yaml", STORAGE)
    first = TaskBox(tmp_path / "first", base, {0: sample_bags, 1: nothing})
    process = first.start()
    first.wait_for(first.run_dir / "checkpoint_000003")
    process.send_signal(signal.SIGTERM)
    assert first.wait(process) == 75, first.log()
    assert "no checkpoint of an earlier attempt" in first.log()
    assert not any(first.delivered.iterdir())

    checkpoints = list_checkpoints(first.stored / "train-rosbag-act")
    assert len(checkpoints) >= 2 and not (first.stored / "train-rosbag-act/last").exists()
    torn = checkpoints[-1] / "training_state/training_state.pt"
    torn.write_bytes(torn.read_bytes()[:-100])
    second = TaskBox(tmp_path / "second", base, {0: sample_bags, 1: first.stored}, storage=first.storage)
    assert second.run() == 0, second.log()
    assert f"taking up {checkpoints[-2].name} of an earlier attempt" in second.log()
    assert "passed over" in second.log() and "truncated" in second.log()
    assert same_weights(second.run_dir, finished / RUN_DIR)
    assert [m["step"] for m in metrics(second.run_dir)] == list(range(1, 10)), "the curve has no gap"
    assert [m["loss"] for m in metrics(second.run_dir)] == [m["loss"] for m in metrics(finished / RUN_DIR)]
    assert os.readlink(second.run_dir / "best") == os.readlink(finished / RUN_DIR / "best")
    handed = second.stored / "train-rosbag-act"
    assert same_weights(handed, finished / RUN_DIR) and (handed / "summary.json").exists()
    assert (handed / "best.txt").read_text().strip() == os.readlink(second.run_dir / "best")
    assert not any(second.delivered.iterdir()), "OSMO would upload all of it again"


def test_the_best_checkpoint_is_found_again(finished: Path, sample_bags: Path, tmp_path: Path):
    """Links are not uploaded: the lowest score in the checkpoints tells which it was, and only that one and the newest
    are taken up. (The run is complete: no later checkpoint can become the best.)"""
    stored = tmp_path / "stored"
    left_out = shutil.ignore_patterns(".*", "last", "best")
    shutil.copytree(finished / RUN_DIR, stored / "train-rosbag-act", ignore=left_out)
    for step, score in {3: 2.0, 6: 1.0, 9: 3.0}.items():
        set_score(stored / f"train-rosbag-act/checkpoint_{step:06d}", score)
    box = TaskBox(tmp_path / "box", task("osmo-workflow.yaml", STORAGE), {0: sample_bags, 1: stored})
    assert box.run() == 0, box.log()
    assert [each.name for each in list_checkpoints(box.run_dir)] == ["checkpoint_000006", "checkpoint_000009"]
    assert os.readlink(box.run_dir / "best") == "checkpoint_000006"
    assert (box.stored / "train-rosbag-act/best.txt").read_text() == "checkpoint_000006\n"


def test_a_stop_before_the_training_is_run_again(sample_bags: Path, nothing: Path, tmp_path: Path):
    """SIGTERM while Python still imports (here: a module that takes long), so that train.py cannot heed it yet: 75 all
    the same."""
    box = TaskBox(tmp_path / "box", task("osmo-workflow.yaml", STORAGE), {0: sample_bags, 1: nothing})
    (box.folder / "workspace/training/augment.py").write_text(
        "import time\nprint('importing', flush=True)\ntime.sleep(60)\n"
    )
    process = box.start()
    box.wait_for("importing")
    process.send_signal(signal.SIGTERM)
    assert box.wait(process) == 75, box.log()
    assert not list_checkpoints(box.run_dir) and not any(box.delivered.iterdir())


def test_a_stop_during_the_checks_is_run_again(nothing: Path, tmp_path: Path):
    """SIGTERM while the settings are checked before a download: 75, and nothing is downloaded."""
    box = TaskBox(tmp_path / "box", task("osmo-workflow-blob.yaml", STORAGE), {0: nothing})
    (box.folder / "workspace/train.py").write_text(
        "import time\nprint('importing', flush=True)\ntime.sleep(1)\ndef load_config(*given): ...\n"
    )
    process = box.start()
    box.wait_for("importing")
    process.send_signal(signal.SIGTERM)
    assert box.wait(process) == 75, box.log()
    assert "stopped before the training began" in box.log() and "download-blob" not in box.log()


def test_a_restart_in_place_goes_on_from_its_own_checkpoints(
    finished: Path, sample_bags: Path, nothing: Path, tmp_path: Path
):
    """SIGKILL to the process group, as OSMO restarts a command: the same pod's next start needs no input for it."""
    base = task("osmo-workflow.yaml", STORAGE)
    box = TaskBox(tmp_path / "node", base, {0: sample_bags, 1: nothing})
    box.start()
    box.wait_for(box.run_dir / "checkpoint_000003")
    box.kill()
    assert box.run() == 0, box.log()
    assert "resuming from /output/train-rosbag-act/checkpoint_" in box.log()
    assert same_weights(box.run_dir, finished / RUN_DIR)


REFUSALS = {
    "a setting that does not exist": ({"training__stepz": 3}, "unknown key training.stepz"),
    "a GPU that is not there": ({"training__device": "cuda"}, "training.device: cuda is not available"),
    "another output directory": (
        {"training__output_dir": "/output/mine"},
        "training.output_dir=/output/mine: this sett",
    ),
    "other recordings": ({"data__bag_dir": "/data/mine"}, "data.bag_dir=/data/mine: this setting is fixed on OSMO"),
    "another cache": ({"data__cache_dir": "/data/mine"}, "data.cache_dir=/data/mine: this setting is fixed on OSMO"),
    "another way to resume": ({"training__resume": "never"}, "training.resume=never: this setting is fixed on OSMO"),
    "wandb without a key": ({"wandb__enabled": "True"}, "wandb.enabled: true, but there is no key (WANDB_API_KEY)"),
}


@pytest.mark.parametrize("changes, message", REFUSALS.values(), ids=list(REFUSALS))
def test_refused_in_one_line(changes: dict[str, object], message: str, sample_bags: Path, tmp_path: Path):
    if torch.cuda.is_available() and "device" in str(changes):
        pytest.skip("there is a GPU here")
    box = TaskBox(tmp_path, task("osmo-workflow.yaml", **changes), {0: sample_bags})
    assert box.run() == 1
    assert message in error_line(box)
    assert not any(box.delivered.iterdir())


SWEEP, EVAL, DDP = "osmo-workflow-sweep.yaml", "osmo-workflow-train-eval.yaml", "osmo-workflow-ddp.yaml"
LEROBOT, NATIVE = "eval_dataset=ur10e-eval-dataset", "eval_args=--backend native"
WRONG = {  # the workflow, its task, what --set says, the message
    "run, which --set makes a number": ("", "", [STORAGE, "run=1e5"], "run: found '100000.0', expected a letter, then"),
    "run, empty": ("", "", [STORAGE, "run="], "run: found '', expected a letter"),
    "run, a folder": ("", "", [STORAGE, "run=mine/yours"], "run: found 'mine/yours', expected a letter"),
    "run without a storage url": (
        "",
        "",
        ["run=workflow-6"],
        "run: found 'workflow-6', but no storage_url, and without",
    ),
    "a storage url with a slash at its end": ("", "", [f"{STORAGE}/"], "prefix/', expected azure://ACCOUNT/CONTAINER"),
    "a storage url without container": (
        "",
        "",
        ["storage_url=azure://acc"],
        "storage_url: found 'azure://acc', expected",
    ),
    "a storage url that is a path": ("", "", ["storage_url=/mnt/share"], "storage_url: found '/mnt/share', expected"),
    "four GPUs for one process": ("", "", ["gpu=4"], "osmo-workflow-ddp.yaml with n_nodes=1 gpus_per_node=4"),
    "steps twice": ("", "", ["steps=10"], "overrides: training.steps=9: training.steps is given twice"),
    "a sweep over what is held out": (
        SWEEP,
        "train-seed1",
        ["sweep=seed1:training.seed=1 seed2:training.seed=2"],
        "sweep: training.seed=1: each run would hold out other recordings",
    ),
    "what the sweep varies": (SWEEP, "train-lr1e5-kl1", [], "training.lr=0.0001: training.lr is given twice: in"),
    "no GPU on a node": (
        DDP,
        "train-act-ddp",
        ["gpus_per_node=0"],
        "gpus_per_node: found '0', expected a whole number",
    ),
    "an episode twice": (
        EVAL,
        "",
        ["eval_episodes=0 1 01"],
        "EVAL_EPISODES: found 01 twice, expected each number once",
    ),
    "a range of episodes": (EVAL, "", ["eval_episodes=0-3"], "EVAL_EPISODES: found 0-3, expected episode numbers"),
    "no such episode": (EVAL, "", ["eval_episodes=3 4"], "expected at least one of the dataset's 3 episodes, 0 to 2"),
    "a device of another machine": (EVAL, "", ["eval_device=mps"], "EVAL_DEVICE: found 'mps', expected cuda or cpu"),
    "an option that is none": (EVAL, "", ["eval_args=--roll-out"], "eval_args: found --roll-out, expected --rollout,"),
    "an option of the script": (
        EVAL,
        "",
        ["eval_args=--output=/x"],
        "eval_args: found --output=/x, expected --rollout",
    ),
    "a gate that is no number": (
        EVAL,
        "",
        ["eval_args=--max-mae 2mm"],
        "eval_args: --max-mae: found '2mm', expected a n",
    ),
    "a gate without a number": (EVAL, "", ["eval_args=--max-mae"], "eval_args: --max-mae: found '', expected a number"),
    "no words, a number": (EVAL, "", ["eval_args=7"], "eval_args: found 7, expected --rollout"),
}


@pytest.mark.parametrize("workflow, name, assignments, message", WRONG.values(), ids=list(WRONG))
def test_what_set_says_is_checked_first(
    workflow: str, name: str, assignments: list[str], message: str, sample_bags: Path, tmp_path: Path
):
    """Through the real script, in one line, before a recording is decoded or Python has imported torch."""
    data = [LEROBOT] if workflow == EVAL else []
    wrong = task(workflow or "osmo-workflow.yaml", *assignments, *data, name=name or "train-act")
    box = TaskBox(tmp_path / "box", wrong, dict.fromkeys(range(3), write_metadata(tmp_path / "dataset")))
    assert box.run(timeout_s=20) == 1
    assert message in error_line(box)
    assert not box.run_dir.exists() and not any((box.folder / "data").iterdir()), "it had begun"


def test_peer_wait_s_is_checked_first(sample_bags: Path, tmp_path: Path):
    box = TaskBox(tmp_path, task(DDP, name="train-act-ddp-1"), {0: sample_bags}, PEER_WAIT_S="10m")
    assert box.run(timeout_s=20) == 1
    assert "PEER_WAIT_S: found '10m', expected a whole number of seconds" in error_line(box)


def write_metadata(folder: Path, stats: list[float] | None = None, **changes: object) -> Path:
    """The metadata of a LeRobot v3 dataset that fits tiny(): `stats` are its actions' means (6,), `changes` those of
    info.json; -> its folder."""
    cameras = {"observation.images.color": {"dtype": "video", "shape": [32, 48, 3]}}
    joints = {"observation.state": {"dtype": "float32", "shape": [6]}, "action": {"dtype": "float32", "shape": [6]}}
    info = {"codebase_version": "v3.0", "fps": 30, "total_episodes": 3, "features": joints | cameras}
    (folder / "meta").mkdir(parents=True)
    (folder / "meta/info.json").write_text(json.dumps(info | changes))
    means = {"observation.state": {"mean": [1.0] * 6}, "action": {"mean": stats or [0.001] * 6}}
    (folder / "meta/stats.json").write_text(json.dumps(means))
    return folder


DATASETS = {  # what is asked of the training, what is changed in the dataset, the message
    "another rate": ({}, {"fps": 15}, "fps is 15, expected data.fps 30"),
    "another format": ({}, {"codebase_version": "v2.1"}, "codebase_version is v2.1, expected v3.0, the format of LeR"),
    "positions instead of differences": (
        {"conventions__action_mode": "absolute"}, {}, "actions are delta, expected absolute ones, as conventions.act",
    ),
    "differences instead of positions": ({}, {"stats": [0.98] * 6}, "actions are absolute, expected delta ones, as"),
    "no such camera": ({}, {"features": {"action": {"shape": [6]}}}, "expected observation.images.color among them"),
    "another number of joints": (
        {"data__joint_names": "[a,b]", "model__state_dim": 2, "model__action_dim": 2}, {}, "action is [6], expected [2]"
    ),
    "a setting that does not exist": ({"training__stepz": 3}, {}, "unknown key training.stepz"),
}  # fmt: skip


@pytest.mark.parametrize("changes, damage, message", DATASETS.values(), ids=list(DATASETS))
def test_an_evaluation_dataset_that_does_not_fit_is_refused(
    changes: dict[str, object], damage: dict[str, object], message: str, tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str],
):  # fmt: skip
    """The evaluation would refuse it, after the training. (check_settings.py, run here: torch is imported once; the
    next test and the chain below run it from the script.)"""
    folder = write_metadata(tmp_path / "dataset", **damage)
    words = [a for a in task(EVAL, LEROBOT, **changes)["args"] if a.startswith("--override=")]
    config = f"--config={WORKFLOWS / 'osmo-config.yaml'}"
    monkeypatch.setattr("sys.argv", ["-", str(folder), "", "python", "train.py", config, *words])
    with pytest.raises(SystemExit) as end:
        runpy.run_path(str(WORKFLOWS / "check_settings.py"), run_name="__main__")
    assert end.value.code == 1
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("error: ") and message in line


@pytest.mark.parametrize(
    "recordings, fraction, message",
    [
        (6, 0, "found training.val_fraction 0 and 6 recordings, expected more than 0"),
        (4, 0.5, "and 4 recordings, expec"),
    ],
)
def test_without_held_out_recordings_nothing_is_trained_for_an_evaluation(
    recordings: int, fraction: float, message: str, sample_bags: Path, tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str],
):  # fmt: skip
    """The evaluation would find that out, after the training. (check_settings.py alone, as above.)"""
    for number in range(recordings):
        shutil.copytree(sample_bags / f"episode_{number:03d}", tmp_path / f"dataset/local_bags/episode_{number:03d}")
    words = [a for a in task(EVAL, training__val_fraction=fraction)["args"] if a.startswith("--override=")]
    config = f"--config={WORKFLOWS / 'osmo-config.yaml'}"
    monkeypatch.setattr("sys.argv", ["-", "", str(tmp_path / "dataset"), "python", "train.py", config, *words])
    with pytest.raises(SystemExit) as end:
        runpy.run_path(str(WORKFLOWS / "check_settings.py"), run_name="__main__")
    (line,) = capsys.readouterr().err.splitlines()
    assert end.value.code == 1 and line.startswith("error: ") and message in line


def test_the_evaluation_dataset_is_checked_before_the_training(sample_bags: Path, tmp_path: Path):
    """By the script, with nothing but the two files of metadata that the task's input brings."""
    dataset = write_metadata(tmp_path / "dataset", fps=15)
    (dataset / "data").mkdir()
    (dataset / "data/file-000.parquet").write_text("gigabytes")
    box = TaskBox(tmp_path / "box", task(EVAL, LEROBOT), {0: sample_bags, 1: dataset})
    found = {path.name for path in (box.folder / "osmo/data/input/1").rglob("*") if path.is_file()}
    assert found == {"info.json", "stats.json"}
    assert box.run() == 1
    assert "dataset: the evaluation dataset does not fit the training: fps is 15, expected" in error_line(box)
    assert not box.run_dir.exists() and not any((box.folder / "data").iterdir()), "it had begun"


@pytest.mark.parametrize("number", [0, 2], ids=["no dataset", "two datasets"])
def test_there_is_one_evaluation_dataset(number: int, sample_bags: Path, nothing: Path, tmp_path: Path):
    for each in range(number):
        write_metadata(tmp_path / f"datasets/{each}")
    (tmp_path / "datasets").mkdir(exist_ok=True)
    box = TaskBox(
        tmp_path / "box", task(EVAL, STORAGE, LEROBOT), {0: sample_bags, 1: nothing, 2: tmp_path / "datasets"}
    )
    assert box.run(timeout_s=20) == 1
    assert ("several LeRobot datasets" if number else "no LeRobot dataset below it") in error_line(box)


def test_a_download_comes_after_the_check_of_every_setting(nothing: Path, tmp_path: Path):
    """Hours of azcopy, and then an unknown key: not so. --set makes 10000.0 of 1e4, which is no number of steps."""
    blob = task("osmo-workflow-blob.yaml", "steps=1e4")
    blob["args"].remove("--override=training.steps=9")  # tiny()'s
    box = TaskBox(tmp_path, blob)
    assert box.run() == 1
    assert "training.steps: found '10000.0', expected a whole number" in error_line(box)
    assert not any((box.folder / "data").iterdir())


def test_a_module_that_is_not_injected_is_missed(sample_bags: Path, tmp_path: Path):
    """The box holds nothing of this repository: what the tests above ran on were the injected files alone. (Each file
    in its turn: test_osmo_modules.py.)"""
    short = task("osmo-workflow.yaml")
    short["files"] = [file for file in short["files"] if file["path"] != "/workspace/act_model.py"]
    box = TaskBox(tmp_path, short, {0: sample_bags})
    assert box.run() == 1 and "No module named 'act_model'" in box.log()


def test_no_bags_in_the_input(tmp_path: Path):
    (tmp_path / "empty").mkdir()
    box = TaskBox(tmp_path / "box", task("osmo-workflow.yaml"), {0: tmp_path / "empty"})
    assert box.run() == 1
    assert "/data/rosbags" in error_line(box)


def test_a_full_output_volume_fails(finished_output: TaskBox):
    """A run that cannot be handed over is no success, and says where it still is."""
    assert finished_output.run() == 1
    assert "could not copy the run there; it is still in /output/train-rosbag-act" in error_line(finished_output)


@pytest.fixture
def finished_output(sample_bags: Path, tmp_path: Path) -> TaskBox:
    """A box whose {{output}} has no room: a file stands where the run's folder is due."""
    box = TaskBox(tmp_path, task("osmo-workflow.yaml", training__steps=1), {0: sample_bags})
    box.delivered.rmdir()
    box.delivered.write_text("")
    return box


@pytest.mark.parametrize("shm_mib, workers", [(64, 0), (512, 2)])
def test_loader_processes_only_with_shared_memory(shm_mib: int, workers: int, sample_bags: Path, tmp_path: Path):
    """Kubernetes' 64 MiB of /dev/shm: batches are loaded in the training process, and it is said."""
    small = task("osmo-workflow.yaml", training__steps=1)
    small["args"].remove("--override=training.num_workers=0")
    box = TaskBox(tmp_path, small, {0: sample_bags}, shm_mib=shm_mib)
    assert box.run() == 0, box.log()
    config = json.loads((box.run_dir / "last/pretrained_model/train_config.json").read_text())["config"]
    assert config["training"]["num_workers"] == workers
    assert (f"/dev/shm has {shm_mib} MiB" in box.log()) is (workers == 0)


def test_each_gpu_needs_shared_memory_of_its_own(sample_bags: Path, tmp_path: Path):
    """What is enough for one process's loaders is not for two."""
    both = task("osmo-workflow-ddp.yaml", "n_nodes=1", "gpus_per_node=2", name="train-act-ddp")
    both["args"].remove("--override=training.num_workers=0")
    box = TaskBox(tmp_path, both, {0: sample_bags}, shm_mib=400)
    box.start()
    try:
        box.wait_for("/dev/shm has 400 MiB for 2 GPUs: batches are loaded in the training process")
    finally:
        box.lose()


def test_wandb_offline(sample_bags: Path, nothing: Path, tmp_path: Path):
    """The run is logged under the workflow's id; the key, an environment variable from a credential, is not shown."""
    key = "0123456789abcdef" * 2 + "01234567"
    box = TaskBox(
        tmp_path, task("osmo-workflow-wandb.yaml", STORAGE, training__steps=3), {0: sample_bags, 1: nothing},
        WANDB_MODE="offline", WANDB_API_KEY=key,
    )  # fmt: skip
    assert box.run() == 0, box.log()
    (record,) = (box.run_dir / "wandb").glob("offline-run-*/run-*.wandb")
    content = record.read_bytes()
    assert b"workflow-7" in content and b"ur10e-act-train" in content and b"l1_loss" in content
    assert key not in box.log() and key.encode() not in content


@pytest.mark.xdist_group("mlflow")
def test_mlflow_instead(sample_bags: Path, nothing: Path, tmp_path: Path, mlflow_server: MlflowServer):
    """With mlflow_uri the same workflow logs there, under the workflow's id; name and password are a credential's."""
    server = (f"mlflow_uri={mlflow_server.uri}", "mlflow_credential=mlflow")
    made = task("osmo-workflow-wandb.yaml", STORAGE, *server, training__steps=3)
    assert set(made["credentials"]["mlflow"]) == set(mlflow_server.credentials)
    box = TaskBox(tmp_path, made, {0: sample_bags, 1: nothing}, **mlflow_server.credentials)  # as OSMO sets them
    assert box.run() == 0, box.log()
    assert mlflow_server.credentials["MLFLOW_TRACKING_PASSWORD"] not in box.log()
    (logged,) = [each for each in mlflow_server.runs() if each.info.run_name == "workflow-7"]
    assert logged.info.status == "FINISHED" and logged.data.params["training.output_dir"] == "/output/train-rosbag-act"


# -- the chain ----------------------------------------------------------------------------------------------------


@pytest.fixture(scope="session")
def evaluation_dataset(sample_bags: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Three of the sample episodes as a LeRobot v3 dataset."""

    def make(folder: Path) -> None:
        write_evaluation_dataset(sample_bags, folder, episodes=3, frames=20)

    return once(tmp_path_factory, "osmo-evaluation", make) / "my-lerobot-dataset"


def evaluation_box(folder: Path, checkpoint: Path, data: Path, *assignments: str) -> TaskBox:
    """The task eval-act, on what Dockerfile.eval copies into its image; `data` is a dataset, or, with LEROBOT taken
    back by another eval_dataset=, the recordings. NATIVE spares it the import of LeRobot."""
    values = task(EVAL, "eval_device=cpu", LEROBOT, NATIVE, *assignments, name="eval-act")
    box = TaskBox(folder, {**values, "files": []}, {0: checkpoint, 1: data})
    add_image(box)
    return box


def test_the_chain_ends_in_parquet_files(sample_bags: Path, nothing: Path, evaluation_dataset: Path, tmp_path: Path):
    """Both of its tasks: train-act's output on eval-act: the newest checkpoint, the episodes there are, the results."""
    import pyarrow.parquet as pq

    training = task(EVAL, STORAGE, LEROBOT, training__steps=4)
    trained = TaskBox(tmp_path / "train", training, {0: sample_bags, 1: nothing, 2: evaluation_dataset})
    assert trained.run() == 0, trained.log()
    box = evaluation_box(tmp_path / "eval", trained.delivered, evaluation_dataset, "eval_args=")
    assert box.run() == 0, box.log()
    assert json.loads((box.delivered / "summary.json").read_text())["policy"]["backend"] == "lerobot"
    assert "evaluating /osmo/data/input/0/train-rosbag-act/checkpoint_000004" in box.log()
    names = {path.name for path in box.delivered.iterdir()}
    assert {*(f"episode_{i:03d}.parquet" for i in range(3)), "all_episodes.parquet", "summary.json"} <= names
    assert "episodes 3 are skipped" in box.log(), "EVAL_EPISODES asks for one too many"
    assert "eval/report.html" in box.log() and "/tmp/" not in box.log(), "a folder is named that is gone"
    table = pq.read_table(box.delivered / "all_episodes.parquet")
    assert table.num_rows > 20 and "inference_time_s" in table.column_names
    assert any(name.startswith("abs_error_") for name in table.column_names)


def test_without_a_dataset_the_held_out_recordings_are_evaluated(finished: Path, sample_bags: Path, tmp_path: Path):
    """Found by their names, however OSMO lays them out: below the dataset's own two folders (test_osmo_guide.py), or
    at once, as here."""
    box = evaluation_box(tmp_path, finished / OUTPUT, sample_bags, "eval_dataset=", STORAGE)
    assert box.run() == 0, box.log()
    contract = json.loads((finished / RUN_DIR / "last/pretrained_model/train_config.json").read_text())
    summary = json.loads((box.delivered / "summary.json").read_text())
    assert [episode["name"] for episode in summary["episodes"]] == contract["held_out_episodes"] != []
    assert "those that training held out" in box.log() and "training saw" not in box.log()
    assert not list(box.delivered.rglob("*.rgb")), "decoded frames are no result"


def test_other_recordings_than_the_trainings_are_not_evaluated(finished: Path, sample_bags: Path, tmp_path: Path):
    """As when a newer version of the dataset lacks some: what is named held out would be something else."""
    shutil.copytree(sample_bags / "episode_000", tmp_path / "bags/another")
    box = evaluation_box(tmp_path / "box", finished / OUTPUT, tmp_path / "bags", "eval_dataset=")
    assert box.run() == 1
    assert "/osmo/data/input/1: not the recordings of /osmo/data/input/0/train-rosbag-act/checkpoint" in error_line(box)


def test_a_gate_fails_the_chain_with_its_results(finished: Path, evaluation_dataset: Path, tmp_path: Path):
    gate = f"{NATIVE} --max-mae=1e-9"
    box = evaluation_box(tmp_path, finished / OUTPUT, evaluation_dataset, gate, "eval_episodes=1")
    assert box.run() == 3, box.log()
    assert "a gate was exceeded" in box.log()
    assert {"episode_001.parquet", "summary.json"} <= {path.name for path in box.delivered.iterdir()}


def empty(checkpoint: Path, dataset: Path) -> None:
    shutil.rmtree(checkpoint / "train-rosbag-act")


def no_checkpoint(checkpoint: Path, dataset: Path) -> None:
    for path in list_checkpoints(checkpoint / "train-rosbag-act"):
        shutil.rmtree(path)


def torn(checkpoint: Path, dataset: Path) -> None:
    path = list_checkpoints(checkpoint / "train-rosbag-act")[-1] / "pretrained_model/model.safetensors"
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


def half_uploaded(checkpoint: Path, dataset: Path) -> None:
    (list_checkpoints(checkpoint / "train-rosbag-act")[-1] / "training_state/manifest.json").unlink()


def two_runs(checkpoint: Path, dataset: Path) -> None:
    shutil.copytree(checkpoint / "train-rosbag-act", checkpoint / "another")


def no_input(checkpoint: Path, dataset: Path) -> None:
    shutil.rmtree(dataset)


def no_dataset(checkpoint: Path, dataset: Path) -> None:
    shutil.rmtree(next(dataset.rglob("meta")))


def two_datasets(checkpoint: Path, dataset: Path) -> None:
    root = next(dataset.rglob("meta")).parent
    shutil.copytree(root, root.with_name("another"))


INPUTS = {
    "empty": (empty, "0: empty; the training task uploaded nothing"),
    "no checkpoint": (no_checkpoint, "no checkpoint_NNNNNN below it"),
    "torn": (torn, "the newest checkpoint arrived torn"),
    "half uploaded": (half_uploaded, "manifest.json: missing"),
    "two runs": (two_runs, "0: checkpoints of several runs (/osmo/data/input/0/another, /osmo/data/input/0/train-"),
    "no input": (no_input, "/osmo/data/input/1: no such directory; the evaluation dataset's input is not there"),
    "no dataset": (no_dataset, "no LeRobot dataset below it"),
    "two datasets": (two_datasets, "several LeRobot datasets"),
}


@pytest.mark.parametrize("damage, message", INPUTS.values(), ids=list(INPUTS))
def test_the_evaluation_refuses(damage, message: str, finished: Path, evaluation_dataset: Path, tmp_path: Path):
    """OSMO can report an upload as complete that was not: no such input becomes a result."""
    box = evaluation_box(tmp_path, finished / OUTPUT, evaluation_dataset)
    damage(box.folder / "osmo/data/input/0", box.folder / "osmo/data/input/1")
    assert box.run() == 1, box.log()
    assert message in error_line(box)
    assert not any(box.delivered.iterdir())


@pytest.mark.parametrize("part", ["data/**/*.parquet", "videos/**/*.mp4"])
def test_the_evaluation_refuses_a_torn_dataset(part: str, finished: Path, evaluation_dataset: Path, tmp_path: Path):
    """The evaluator's own line names the file, a last one says what failed."""
    box = evaluation_box(tmp_path, finished / OUTPUT, evaluation_dataset)
    (file,) = (box.folder / "osmo/data/input/1").rglob(part)
    os.truncate(file, file.stat().st_size // 2)
    assert box.run() == 1, box.log()
    own, last = [line for line in box.log().replace("\r", "\n").splitlines() if line.startswith("error: ")]
    assert f"{file.name}: is " in own and "cut short" in own
    assert last == "error: eval-entrypoint: the evaluation failed with exit code 1; its own line is above"
    assert "Traceback" not in box.log() and not any(box.delivered.iterdir())


OUTPUTS = {
    "a file in its place": (lambda output: (output.rmdir(), output.touch()), "/osmo/data/output: cannot be made"),
    "no place for a result": (lambda output: (output / "summary.json").mkdir(), "could not copy the results there"),
}


@pytest.mark.parametrize("damage, message", OUTPUTS.values(), ids=list(OUTPUTS))
def test_results_that_cannot_be_written_are_a_failure(
    damage, message: str, finished: Path, evaluation_dataset: Path, tmp_path: Path
):
    """OSMO would report the task as completed, and its output would be without them."""
    box = evaluation_box(tmp_path, finished / OUTPUT, evaluation_dataset, "eval_episodes=1")
    damage(box.delivered)
    assert box.run() == 1, box.log()
    assert message in error_line(box)


DIRECTORIES = ["--checkpoint=/nowhere/c", "--dataset=/nowhere/d", "--output=/nowhere/o"]
ARGUMENTS = {
    "none": ([], {}, "expected --checkpoint=DIR, --bags=DIR or --dataset=DIR, --output=DIR"),
    "no output": (DIRECTORIES[:2], {}, "expected --checkpoint=DIR, --bags=DIR or --dataset=DIR, --output=DIR"),
    "an empty option": (
        [*DIRECTORIES[:2], "--output="],
        {},
        "expected --checkpoint=DIR, --bags=DIR or --dataset=DIR, --output=DIR",
    ),
    "a folder twice": ([*DIRECTORIES, "--dataset=/x"], {}, "eval_args: found --dataset=/x, expected --rollout"),
    "bags and a dataset": (
        [DIRECTORIES[0], "--bags=/x", *DIRECTORIES[1:]],
        {},
        "expected --checkpoint=DIR, --bags=DIR or --dataset=DIR, --output=DIR",
    ),
    "an option that is none": ([*DIRECTORIES, "--roll-out"], {}, "eval_args: found --roll-out, expected --rollout"),
    "a value for a switch": ([*DIRECTORIES, "--rollout=yes"], {}, "eval_args: --rollout=yes: found 'yes', expected no"),
    "a gate that is no number": (
        [*DIRECTORIES, "--max-mae=nan"],
        {},
        "eval_args: --max-mae=nan: found 'nan', expected",
    ),
    "no steps": (
        [*DIRECTORIES, "--num-steps=0"],
        {},
        "eval_args: --num-steps=0: found '0', expected a whole number of",
    ),
    "another backend": (
        [*DIRECTORIES, "--backend", "tensorrt"],
        {},
        "eval_args: --backend: found 'tensorrt', expected auto, le",
    ),
    "a second word": ([*DIRECTORIES, "--rollout", "1"], {}, "eval_args: found 1, expected --rollout"),
    "an episode twice": (DIRECTORIES, {"EVAL_EPISODES": "1 01"}, "EVAL_EPISODES: found 01 twice, expected each"),
    "no episodes": (DIRECTORIES, {"EVAL_EPISODES": ""}, "EVAL_EPISODES is empty; expected episode numbers"),
    "a range of episodes": (DIRECTORIES, {"EVAL_EPISODES": "0-3"}, "EVAL_EPISODES: found 0-3, expected"),
    "blank episodes": (DIRECTORIES, {"EVAL_EPISODES": " "}, "EVAL_EPISODES is empty; expected episode numbers"),
    "no device": (DIRECTORIES, {"EVAL_DEVICE": ""}, "EVAL_DEVICE: found '', expected cuda or cpu"),
    "another device": (DIRECTORIES, {"EVAL_DEVICE": "gpu"}, "EVAL_DEVICE: found 'gpu', expected cuda or cpu"),
    "no checkpoint": (DIRECTORIES, {}, "/nowhere/c: no such directory; the checkpoint's input is not there"),
}


@pytest.mark.parametrize("arguments, environment, message", ARGUMENTS.values(), ids=list(ARGUMENTS))
def test_the_evaluation_refuses_arguments(arguments: list[str], environment: dict[str, str], message: str):
    """Before Python starts; one line for each."""
    complete = {"PATH": os.environ["PATH"], "EVAL_EPISODES": "0 1", "EVAL_DEVICE": "cpu"}
    command = ["bash", str(WORKFLOWS / "eval-entrypoint.sh"), *arguments]
    done = subprocess.run(command, env=complete | environment, capture_output=True, text=True, timeout=20)
    assert done.returncode == 1 and done.stdout == ""
    assert done.stderr.startswith(f"error: eval-entrypoint: {message}") and done.stderr.count("\n") == 1


def test_the_script_knows_the_options_of_the_evaluator():
    """Each is taken as the evaluator takes it, but those that the script gives itself or that a checkpoint of train.py
    and a dataset have no use for."""
    own = {"--help", "--checkpoint", "--dataset", "--episode", "--skip-missing-episodes", "--device", "--output"}
    of_bags_and_lerobot = {"--bags", "--cache-dir", "--action-mode", "--wrap", "--no-wrap", "--image-resize"}
    script = (WORKFLOWS / "eval-entrypoint.sh").read_text()
    taken = set(
        re.findall(r"--[a-z0-9-]+", script[script.index("case ${1%%=*} in") : script.index('*) die "eval_args')])
    )
    actions = [action for action in offline_eval.parser()._actions if action.option_strings]
    assert taken == {each for a in actions for each in a.option_strings if each != "-h"} - own - of_bags_and_lerobot
    for action in actions:
        if action.choices and taken & set(action.option_strings):
            assert f"pattern='({'|'.join(action.choices)})'" in script, action.option_strings
