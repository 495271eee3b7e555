"""How a training task's attempts end on OSMO, and what the next one makes of it: memory, uploads, missing recordings.

heartbeat.py and uploads.py alone, then train-entrypoint.sh with both in the pod's folders (osmo_task.py), where a
script stands in for train.py: it is the ends that matter here. soak_uploads.py has OSMO's own `osmo data`, and a blob
server.
"""

from __future__ import annotations

import hashlib
import importlib.util
import json
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from types import ModuleType

import pytest

from lerobot_checkpoint import set_score, verify_checkpoint
from lerobot_checkpoint.layout import LISTED_FILES, MANIFEST_FILE
from rosbag_dataset import find_bags
from rosbag_dataset.listing import list_files
from tests import osmo_data
from tests.osmo_spec import place, submit
from tests.osmo_task import WORKFLOWS, TaskBox, require, write_cgroup

STORAGE = "storage_url=azure://account/container/prefix"
GIB = 2**30


def script(name: str) -> ModuleType:
    """One of osmo/'s Python files, as a module of its own."""
    spec = importlib.util.spec_from_file_location(f"osmo_{name}", WORKFLOWS / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


heartbeat, uploads = script("heartbeat"), script("uploads")

# -- the heartbeat ----------------------------------------------------------------------------------------------------


@pytest.fixture
def attempt(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable:
    """A function that makes one attempt of a task: how the last one left it, how this one ends; -> begin's exit code.

    In a pod of its own, or in place, in the last one's. `code` None: killed without a word.
    """
    cgroup = tmp_path / "cgroup"
    monkeypatch.setenv("CGROUP_DIR", str(cgroup))
    pods = [tmp_path / "no pod"]

    def run(used: int, code: int | None = None, in_place=False, kills=0, limit: int | None = 32, cache=0, v1=False,
            command="c") -> int:  # fmt: skip
        earlier = pods[-1]
        if not in_place:
            pods.append(tmp_path / f"pod-{len(pods)}")
        run_dir = pods[-1] / "train-rosbag-act"
        run_dir.mkdir(parents=True, exist_ok=True)
        limit = limit and limit * GIB
        write_cgroup(cgroup, GIB, limit, kills=0 if not in_place else kills, v1=v1)
        given = {"command": command, "earlier": str(earlier)}
        begun = heartbeat.Heartbeat(str(run_dir), **given)
        exit_code = begun.begin()
        if exit_code:
            code = exit_code
        (run_dir / "metrics.jsonl").write_text('{"step": 7}\n{"st')  # half a line, as it may be
        write_cgroup(cgroup, used * GIB, limit, cache=cache * GIB, kills=kills, v1=v1)
        begun.write()
        if code is not None:
            heartbeat.Heartbeat(str(run_dir), code=str(code), **given).end()
        return exit_code

    return run


FULL = {"used": 31}
KILLED = {"used": 3, "kills": 1, "code": 137}
ENDS = {  # how attempts ended, what is another at the next one, its exit code
    "twice": ([FULL, FULL], {}, 1),
    "twice, version 1": ([{**FULL, "v1": True}] * 2, {"v1": True}, 1),
    "one process killed, twice": ([KILLED, KILLED], {}, 1),
    "once": ([{"used": 20}, FULL], {}, 0),
    "preempted twice, early": ([{"used": 1}, {"used": 20}], {}, 0),
    "full of file cache": ([{"used": 20, "cache": 12}] * 2, {}, 0),
    "no limit": ([{**FULL, "limit": None}] * 2, {"limit": None}, 0),
    "no limit, version 1": ([{**FULL, "limit": None, "v1": True}] * 2, {"limit": None, "v1": True}, 0),
    "stopped after saving": ([{**FULL, "code": 75}] * 2, {}, 0),
    "failed with a line of its own": ([{**FULL, "code": 1}] * 2, {}, 0),
    "preempted in between": ([FULL, {"used": 20}, FULL], {}, 0),
    "restarted in place, with the others": ([FULL, {**FULL, "in_place": True}], {"in_place": True}, 0),
    "more memory since": ([FULL, FULL], {"limit": 40}, 0),
    "another submission": ([FULL, FULL], {"command": "d"}, 0),
}


@pytest.mark.parametrize("ends, change, exit_code", ENDS.values(), ids=list(ENDS))
def test_out_of_memory_twice_in_a_row_is_the_end(ends: list[dict], change: dict, exit_code: int, attempt, capsys):
    """A task that dies for want of memory is not run again for ever; whatever else ends it is no such end."""
    for end in ends:
        assert attempt(**end) == 0
    capsys.readouterr()
    assert attempt(used=1, code=0, **change) == exit_code
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) == exit_code
    if exit_code:
        assert lines[0] == (
            "error: heartbeat: for the second time out of memory: the last attempt ended at step 7 with "
            f"{ends[-1]['used']}.0 of 32.0 GiB in use; raise `memory`, or lower training.num_workers or "
            "training.batch_size"
        )
        assert attempt(used=1, code=0, **change) == 0, "submitted again, it begins"


def test_the_first_time_is_said(attempt, capsys):
    attempt(**FULL)
    assert attempt(used=1, code=0) == 0
    assert (
        "note: most likely out of memory: the last attempt ended at step 7 with 31.0 of 32.0" in capsys.readouterr().out
    )
    assert attempt(used=1, code=0) == 0
    assert capsys.readouterr().out == ""


# -- the uploads -------------------------------------------------------------------------------------------------------


@pytest.fixture
def storage(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """What the storage url stands for, with an `osmo` that puts things there."""
    osmo_data.install(tmp_path / "bin")
    monkeypatch.setenv("PATH", f"{os.environ['PATH']}:{tmp_path / 'bin'}")
    monkeypatch.setenv("OSMO_STORAGE", str(tmp_path / "storage"))
    (tmp_path / "storage").mkdir()
    return tmp_path / "storage"


def write_checkpoint(run_dir: Path, step: int) -> int:
    """Files of 100 bytes with the names of a checkpoint's, whole by its manifest, there at once; -> bytes in all."""
    folder, final = run_dir / f".tmp-{step}", run_dir / f"checkpoint_{step:06d}"
    content = bytes([step]) * 100
    for name in LISTED_FILES:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(content)
    listed = dict(bytes=100, sha256=hashlib.sha256(content).hexdigest())
    manifest = json.dumps({"step": step, "files": dict.fromkeys(LISTED_FILES, listed)})
    (folder / MANIFEST_FILE).write_text(manifest)
    folder.rename(final)
    verify_checkpoint(final)
    return 100 * len(LISTED_FILES) + len(manifest)


def run_of(tmp_path: Path, name: str = "pod") -> uploads.Uploads:
    run_dir = tmp_path / name / "train-rosbag-act"
    run_dir.mkdir(parents=True, exist_ok=True)
    return uploads.Uploads(run_dir, "azure://a/c/run")


def stored(storage: Path) -> set[str]:
    """What there is directly below the run's url."""
    folder = storage / "a/c/run/train-rosbag-act"
    return {path.relative_to(folder).parts[0] for path in folder.rglob("*") if path.is_file()}


def calls(storage: Path) -> list[dict]:
    return [json.loads(line) for line in (storage / ".calls").read_text().splitlines()]


def test_each_checkpoint_is_sent_once_and_removed_with_the_runs(tmp_path: Path, storage: Path):
    """Five checkpoints, of which the run keeps three; what grows beside them is sent again each time."""
    run, size = run_of(tmp_path), 0
    for step in range(1, 6):
        size += write_checkpoint(run.run_dir, step) + 10 * step
        (run.run_dir / "metrics.jsonl").write_text("x" * 10 * step)
        (run.run_dir / ".lock").touch()
        if step > 3:
            shutil.rmtree(run.run_dir / f"checkpoint_{step - 3:06d}")
        (run.run_dir / "last").unlink(missing_ok=True)
        (run.run_dir / "last").symlink_to(f"checkpoint_{step:06d}")
        again = uploads.Uploads(run.run_dir, run.url)  # a process that was restarted in place knows what it sent
        assert again.send() == "" and again.send() == ""
    assert sum(call["bytes"] for call in calls(storage)) == size
    assert stored(storage) == {f"checkpoint_{step:06d}" for step in (3, 4, 5)} | {"metrics.jsonl"}
    set_score(run.run_dir / "checkpoint_000004", 1.0)
    assert uploads.Uploads(run.run_dir, run.url).send() == ""
    assert calls(storage)[-1]["names"] == [f"train-rosbag-act/checkpoint_000004/{MANIFEST_FILE}"]


def test_what_did_not_arrive_does_not_count(tmp_path: Path, storage: Path):
    """OSMO's upload ends with 0 when it has failed: nothing is taken as sent, nothing older is removed for it."""
    run = run_of(tmp_path)
    write_checkpoint(run.run_dir, 1)
    assert run.send() == ""
    shutil.rmtree(run.run_dir / "checkpoint_000001")
    size, files = write_checkpoint(run.run_dir, 2), len(LISTED_FILES) + 1
    (storage / ".fail").touch()
    problem = run.send()
    assert problem.startswith(f"0 of {files} files arrived, 0 of {size} bytes: ") and "no such container" in problem
    assert stored(storage) == {"checkpoint_000001"}
    (storage / ".fail").unlink()
    assert run.send() == "" and stored(storage) == {"checkpoint_000002"}


def test_what_earlier_attempts_left_goes_when_it_is_old(tmp_path: Path, storage: Path):
    """Not before the run itself removes a newer one; what is newer stays, and so does what the run goes on from."""
    run = run_of(tmp_path)
    for step in (1, 2, 9):
        write_checkpoint(run.run_dir, step)
    run.send()
    run = run_of(tmp_path, "another pod")
    write_checkpoint(run.run_dir, 2)  # taken up; 9 was torn
    here = uploads.stamps(run.run_dir)
    run.remember({name: here.get(name) for name in uploads.stamps(storage / "a/c/run/train-rosbag-act")})
    write_checkpoint(run.run_dir, 3)
    before = len(calls(storage))
    assert run.send() == "" and len(calls(storage)) == before + 1, "not what was taken up"
    assert stored(storage) == {f"checkpoint_{step:06d}" for step in (1, 2, 3, 9)}
    shutil.rmtree(run.run_dir / "checkpoint_000002")
    write_checkpoint(run.run_dir, 4)
    assert run.send() == "" and stored(storage) == {f"checkpoint_{step:06d}" for step in (3, 4, 9)}


def test_the_uploads_go_on_after_a_failure(tmp_path: Path, storage: Path):
    """Beside the training, as a process: a failure is said once, and tried again. A full disk (here: what it writes
    down has no place) is no reason to send the same again."""
    run = run_of(tmp_path)
    (run.run_dir / ".uploaded.tmp").mkdir()
    (storage / ".fail").touch()
    write_checkpoint(run.run_dir, 1)
    command = [sys.executable, WORKFLOWS / "uploads.py", "watch", run.run_dir, f"--to={run.url}"]
    environment = {**os.environ, "UPLOAD_RETRY_S": "0.1"}
    with subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, text=True) as process:
        try:
            assert "note: not uploaded, trying again every 0.1 s: 0 of " in process.stdout.readline()
            (storage / ".fail").unlink()
            assert process.stdout.readline() == "uploads: uploaded checkpoint_000001\n"
            write_checkpoint(run.run_dir, 2)
            assert process.stdout.readline() == "uploads: uploaded checkpoint_000002\n"
        finally:
            process.terminate()
    assert process.returncode == 0 and len(calls(storage)[-1]["names"]) == len(LISTED_FILES) + 1


# -- both, with the script --------------------------------------------------------------------------------------------

TRAIN = """
import json, os, pathlib, shutil, sys, time
run_dir = pathlib.Path("/output/train-rosbag-act")
steps = [int(path.name[-6:]) for path in run_dir.glob("checkpoint_*")]
print("training from", *sorted(steps), flush=True)
with (run_dir / "metrics.jsonl").open("a") as file:
    file.write(json.dumps(dict(step=max(steps, default=0) + 1)) + chr(10))
for name in os.environ.get("CHECKPOINTS", "-").split():
    if name != "-":
        shutil.copytree(pathlib.Path(os.environ["FROM"], name), run_dir / (".tmp-" + name))
        os.rename(run_dir / (".tmp-" + name), run_dir / name)
    while "GO" in os.environ and not os.path.exists(os.environ["GO"]):
        time.sleep(0.05)
time.sleep(float(os.environ.get("TRAINS_S", "0")))
sys.exit(int(os.environ.get("ENDS", "0")))
"""


@pytest.fixture
def pod(tmp_path: Path) -> Callable[..., TaskBox]:
    """A function that makes a pod for the base workflow's task with a storage url, with what is stored of the run."""
    require()
    (tmp_path / "bags/episode_000").mkdir(parents=True)
    (tmp_path / "bags/episode_000/a.mcap").write_bytes(b"abc")
    task = place(submit(WORKFLOWS / "osmo-workflow.yaml", STORAGE), "workflow-7")["train-act"]
    made: list[TaskBox] = []

    def make(memory: tuple[int, int] = (1, 100), **environment: str) -> TaskBox:
        earlier = tmp_path / "storage/account/container/prefix/ur10e-act-checkpoint/workflow-7"
        earlier.mkdir(parents=True, exist_ok=True)
        made.append(TaskBox(
            tmp_path / f"pod-{len(made)}", task, {0: tmp_path / "bags", 1: earlier}, storage=tmp_path / "storage",
            memory=memory, UPLOAD_RETRY_S="0", **environment,
        ))  # fmt: skip
        (made[-1].folder / "workspace/train.py").write_text(TRAIN)
        return made[-1]

    yield make
    for box in made:
        box.lose()


def heard(box: TaskBox) -> dict:
    """The heartbeat in the storage url."""
    return json.loads((box.stored / "train-rosbag-act/.heartbeat.json").read_text())


def lose_at(box: TaskBox, used: int) -> None:
    """It trains, its memory fills, and its node, or its container, is gone."""
    box.start()
    box.wait_for("training from")
    box.use_memory(used, 100)
    for _ in range(200):
        if heard(box)["used"] == used or used < 90:
            break
        time.sleep(0.05)
    box.lose()


def test_the_third_attempt_after_two_without_memory_ends_with_1(pod):
    """Through the script and the storage url: said after the first time, refused after the second, in one line; and a
    submission after that begins."""
    first = pod(TRAINS_S="60")
    lose_at(first, 97)
    assert heard(first) == heard(first) | {"used": 97, "limit": 100, "step": 1, "code": None}
    second = pod(TRAINS_S="60")
    lose_at(second, 97)
    assert "most likely out of memory: the last attempt ended at step 1 with" in second.log()
    third = pod()
    assert third.run() == 1
    (line,) = [line for line in third.log().splitlines() if line.startswith("error: ")]
    assert (
        "for the second time out of memory" in line
        and "Traceback" not in third.log()
        and "training from" not in third.log()
    )
    assert heard(third)["code"] == 1
    fourth = pod()
    assert fourth.run() == 0, fourth.log()
    assert "out of memory" not in fourth.log() and heard(fourth)["code"] == 0


def test_preempted_again_and_again_it_goes_on(pod):
    """Also right at the start: no end without a word is taken for want of memory where there was enough."""
    for _ in range(3):
        box = pod(TRAINS_S="60")
        lose_at(box, 60)
    assert "out of memory" not in box.log()
    assert pod().run() == 0


WORDS = {"complete": ("0", 0), "failed": ("1", 1), "stopped after saving": ("75", 75), "killed alone": ("137", 137)}


@pytest.mark.parametrize("ends, code", WORDS.values(), ids=list(WORDS))
def test_every_end_but_a_kill_leaves_a_word(ends: str, code: int, pod):
    box = pod(ENDS=ends)
    assert box.run() == code
    assert heard(box)["code"] == code
    assert ("the training was killed, most likely for want of memory" in box.log()) is (code == 137)
    assert ("complete: the run is in azure://account/" in box.log()) is (code == 0)


def test_a_run_that_does_not_arrive_is_no_success(pod, tmp_path: Path):
    """75: the next attempt goes on from what did arrive, and sends the rest."""
    box = pod(GO=str(tmp_path / "go"))
    process = box.start()
    box.wait_for("training from")
    (box.storage / ".fail").touch()
    (tmp_path / "go").touch()
    assert box.wait(process) == 75
    assert (
        "error: uploads: azure://account/container/prefix/ur10e-act-checkpoint/workflow-7: the run could not"
        in box.log()
    )
    (box.storage / ".fail").unlink()
    assert pod().run() == 0


def test_a_storage_url_that_cannot_be_written_to_is_said_at_once(pod):
    """Before a recording is decoded, and not after the first checkpoint."""
    box = pod()
    (box.storage / ".fail").touch()
    assert box.run() == 1
    (line,) = {line for line in box.log().splitlines() if line.startswith("error: heartbeat")}
    assert "storage_url: cannot write to azure://account/" in line and "no such container" in line
    assert "training from" not in box.log()


def test_a_node_lost_between_two_uploads(pod, tmp_path: Path):
    """The newest checkpoint is half there: the next attempt goes on from the one before, which is whole."""
    names, made, go = "checkpoint_000003 checkpoint_000006", str(tmp_path / "made"), tmp_path / "go"
    lost = pod(CHECKPOINTS=names, FROM=made, GO=str(go), TRAINS_S="60")
    for step in (3, 6):
        write_checkpoint(tmp_path / "made", step)
    (lost.storage / ".hold").write_text("checkpoint_000006/pretrained_model/model.safetensors")
    lost.start()
    lost.wait_for("uploaded checkpoint_000003")
    go.touch()
    lost.wait_for(lost.stored / "train-rosbag-act/checkpoint_000006/pretrained_model/config.json")
    lost.lose()
    (lost.storage / ".hold").unlink()
    box = pod()
    assert box.run() == 0, box.log()
    assert "passed over" in box.log() and "taking up checkpoint_000003 of an earlier attempt" in box.log()
    assert "\ntraining from 3\n" in box.log()


# -- recordings --------------------------------------------------------------------------------------------------------


def lose_one(bags: Path) -> None:
    shutil.rmtree(bags / "episode_000")


def cut_one(bags: Path) -> None:
    (bags / "episode_000/a.mcap").write_bytes(b"ab")


ARRIVED = {
    "all": (lambda bags: None, None),
    "a folder is missing": (lose_one, "1 of the 2 files in bags.txt did not arrive whole: episode_000/a.mcap; list"),
    "a file is cut": (cut_one, "1 of the 2 files in bags.txt did not arrive whole: episode_000/a.mcap; list"),
}


@pytest.mark.parametrize("damage, message", ARRIVED.values(), ids=list(ARRIVED))
def test_recordings_that_did_not_arrive_are_missed(damage, message: str | None, pod, tmp_path: Path):
    """OSMO's uploads leave out linked folders, and fail with exit code 0: what arrived is compared with the list."""
    bags = tmp_path / "bags"
    (bags / "a bag.db3").write_bytes(b"defg")
    (bags / "bags.txt").write_text("".join(f"{size}\t{name}\n" for size, name in list_files(find_bags(bags), bags)))
    box = pod()
    damage(box.folder / "osmo/data/input/0")
    assert box.run() == (1 if message else 0), box.log()
    assert "no bags.txt" not in box.log()
    if message:
        (line,) = [line for line in box.log().splitlines() if line.startswith("error: ")]
        assert line.startswith("error: train-entrypoint: /data/rosbags: ") and message in line


def test_without_a_list_it_is_said(pod):
    box = pod()
    assert box.run() == 0
    assert "note: no bags.txt with the recordings, so nobody knows whether all of them arrived" in box.log()


def test_python_files_of_the_scripts_need_nothing_but_python():
    """Beside hours of training, they start in a moment: torch is imported for a checkpoint that is there, only."""
    assert not {"torch", "numpy", "lerobot_checkpoint"} & {*vars(heartbeat), *vars(uploads)}
    assert sys.version_info >= (3, 10)
