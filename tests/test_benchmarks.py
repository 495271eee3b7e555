"""The benchmarks run, measure what they say, and compare like with like.

At tiny sizes: that every stage runs and its JSON is whole. No figure is asserted here, a test machine is too busy for
that; but what a figure is made of is: the order of measuring, the arithmetic, what counts as memory, and that both
sides get the same frames.
"""

from __future__ import annotations

import json
import math
import os
import re
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pyarrow.parquet
import pytest

import train
from benchmarks import common, decode_once, frames_in_place, gpu, int8, run, versus_lerobot
from rosbag_dataset import load_episodes
from tests import tiny
from tests.lerobot_044 import launch
from tests.policies import trained

__all__ = ["trained"]  # a fixture

MODEL = [f"--override={key}={value}" for key, value in tiny.TINY.items() if key.startswith("model.")]


def arguments(out: Path, *more: object) -> list[str]:
    """Arguments of either command for the smallest of everything, into `out`."""
    sizes = "--frames=150 --bag-height=48 --bag-width=64 --height=32 --width=48 --batch-size=2 --steps=4 --rounds=1"
    return [*sizes.split(), "--device=cpu", f"--out={out}", *MODEL, *map(str, more)]


def results(out: Path, stage: str) -> dict:
    """A stage's JSON, checked to be whole."""
    content = json.loads((out / f"{stage}.json").read_text())
    assert content["stage"] == stage and content["notes"] and content["rows"]
    for row in content["rows"]:
        assert row["low"] <= row["value"] <= row["high"] and len(row["rounds"]) == 1, row
        assert all(math.isfinite(value) and value >= 0 for value in row["rounds"]), row
        assert ("target" in row) == ("met" in row)
    machine = content["machine"]
    assert machine["cpu"] and machine["cpus"] >= 1 and machine["torch"] and len(machine["source_sha256"]) == 64
    assert content["settings"]["batch_size"] == 2
    return content


def value(content: dict, what: str) -> float:
    (row,) = [row for row in content["rows"] if row["what"] == what]
    return row["value"]


def targets(content: dict) -> set[str]:
    return {row["what"] for row in content["rows"] if "target" in row}


# -- every stage --------------------------------------------------------------------------------------------------


def test_stages_in_this_process(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    """ingest (on bags of its own recording), loader, step, saving, inference: tables and JSON are there and agree."""
    stages = ["ingest", "loader", "step", "saving", "inference"]
    assert run.main([*stages, *arguments(tmp_path, "--seconds=0.05", "--peak-tflops=1")]) == 0
    printed = capsys.readouterr().out
    contents = {stage: results(tmp_path, stage) for stage in stages}
    for content in contents.values():
        assert all(row["what"] in printed for row in content["rows"])
    assert {what.partition(":")[0] for what in targets(contents["ingest"])} == {"sqlite3", "mcap"}
    assert value(contents["step"], "fp32, batch 2: step") > 0
    assert value(contents["inference"], "p50") <= value(contents["inference"], "p99")
    # A second run with the same sizes finds the bags and caches again: bags are not recorded twice.
    recorded = {path: path.stat().st_mtime_ns for path in tmp_path.glob("bags-*/recording.json")}
    assert run.main(["loader", *arguments(tmp_path, "--seconds=0.01")]) == 0
    assert {path: path.stat().st_mtime_ns for path in tmp_path.glob("bags-*/recording.json")} == recorded
    assert len(recorded) == 2


def test_frames_in_place(tmp_path: Path) -> None:
    """Of JPEG: pixels are written one way and not the other, and both ways are loaded and trained on."""
    options = arguments(tmp_path, "--kinds=jpeg", "--workers=1", "--loaded=8")
    assert frames_in_place.main(options) == 0
    content = results(tmp_path, "frames_in_place")
    assert value(content, "jpeg: pixels written, bags") == 0 < value(content, "jpeg: pixels written, cache")
    assert targets(content) == {"jpeg: speed of training, bags to cache", "jpeg: the same by CPU time"}


def test_gpu_on_a_cpu(tmp_path: Path, sample_bags: Path) -> None:
    """Every part but LeRobot's runs to its end without a GPU, two ranks included, and gives one file and one table."""
    sizes = ["--run-steps=4", "--largest-batch=4", "--ranks=2", "--peak-tflops=1", "--compile", "false"]
    assert gpu.main(arguments(tmp_path, f"--bags={sample_bags}", *sizes)) == 0
    content = results(tmp_path, "gpu")
    assert value(content, "fp32, compile false: operations launched by a step") > 500
    assert value(content, "fp32, compile false: of them casts") < 50, "bf16 casts, fp32 does not"
    rows = {row["what"] for row in content["rows"]}
    assert {
        "batch 2: speed", "batch 4: speed", "feeding, pixels: a batch", "train.py", "torchrun, 2 ranks, batch 2 each",
        "inference, batch 1: p50",
    } <= rows and "batch 8: speed" not in rows  # fmt: skip
    assert len((tmp_path / "gpu.md").read_text().splitlines()) == 2 + len(rows) + 1 + len(content["notes"])


def test_gpu_without_time(tmp_path: Path, sample_bags: Path) -> None:
    """A part for which the time is over is named."""
    assert gpu.main(arguments(tmp_path, f"--bags={sample_bags}", "--budget-s=0")) == 0
    content = json.loads((tmp_path / "gpu.json").read_text())
    assert content["rows"] == [] and "steps, whole_run, batches" in content["notes"][0]


def test_train_stage(tmp_path: Path, sample_bags: Path) -> None:
    """The real loop in its own process, and all phases of a start, which add up to it."""
    assert run.main(["train", *arguments(tmp_path, f"--bags={sample_bags}", "--cache-gb=0.001")]) == 0
    content = results(tmp_path, "train")
    big = "start, warm, 0.00174 GB of cache"  # two episodes of 48x64, not resized
    for name in ("start, cold", "start, warm", big):
        phases = ["interpreter", "import torch", "other imports", "model", "bags and loader"]
        spent_s = [value(content, f"{name}: {phase}") for phase in phases]
        assert sum(spent_s) == pytest.approx(value(content, f"{name}: launch to first step"))
        less_s = value(content, f"{name}: the same less torch and model")
        assert less_s == pytest.approx(spent_s[0] + spent_s[2] + spent_s[4])
    assert value(content, "start, cold: first step") > 0
    assert targets(content) == {
        "train.py to the synthetic batch", "waiting for data", f"{big}: the same less torch and model",
    }  # fmt: skip


def test_memory_stage(tmp_path: Path, sample_bags: Path) -> None:
    """Runs over two amounts of data, each to its end; memory counted three ways that have a fixed order."""
    assert run.main(["memory", *arguments(tmp_path, f"--bags={sample_bags}"), "--multiples", "1", "2"]) == 0
    content = results(tmp_path, "memory")
    for multiple in ("1x", "2x"):
        kinds = [value(content, f"{kind}, {multiple}") for kind in ("USS", "RSS")]
        assert 100 < kinds[0] < kinds[1]  # MiB; importing torch alone takes more
    assert targets(content) == {"RSS minus page cache, 2x to 1x"}


def test_versus_lerobot(tmp_path: Path, sample_bags: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Against the real LeRobot 0.4.4: all stages; and its dataset holds exactly the samples that we train on."""
    if not launch.PYTHON.exists():
        pytest.fail(f"no LeRobot 0.4.4 at {launch.PYTHON}: `make test` creates it", pytrace=False)
    monkeypatch.setattr(versus_lerobot, "has_fast_bf16", lambda device: False)  # one run of ours less
    command = [
        f"--lerobot-python={launch.PYTHON}",
        *arguments(tmp_path, f"--bags={sample_bags}", "--lerobot-workers=0"),
    ]
    assert versus_lerobot.main(["train", "inference", *command]) == 0
    # `train` has just converted with the real writer; ten seconds of importing LeRobot once more would add nothing.
    monkeypatch.setattr(versus_lerobot.LeRobot, "convert", lambda self, frames, **changes: 100.0)
    assert versus_lerobot.main(["convert", "export", *command]) == 0
    training, inference, converting, exporting = (
        results(tmp_path, f"versus_lerobot_{stage}") for stage in ("train", "inference", "convert", "export")
    )
    assert targets(exporting) == {"speed of ours to LeRobot's, each as it comes"}
    assert targets(training) == {
        "training speed of ours, fp32, to LeRobot's", "speed of ours, fp32, from bags to step 4",
    }  # fmt: skip
    assert targets(inference) == {"speed of ours to select_action", "speed of ours, onnx, to select_action"}
    ours_s = next(row["value"] for row in converting["rows"] if row["what"] == "bags to ready to train, ours")
    assert value(converting, "speed of ours to LeRobot's") == pytest.approx(100.0 / ours_s)

    written = pyarrow.parquet.read_table(tmp_path / "lerobot-dataset" / "data")
    options = run_options(tmp_path, sample_bags)
    episodes, _ = load_episodes(train.bag_settings(common.config(options, data__bag_dir=sample_bags)))
    for column, name in (("observation.state", "state"), ("action", "action")):
        ours = np.concatenate([getattr(e, name)[versus_lerobot.frames_with_action(e)] for e in episodes])
        assert np.array_equal(np.array(written[column].to_pylist(), np.float32), ours)


def test_int8(tmp_path: Path, trained: Path) -> None:
    """What is quantised is smaller, gives other actions, and drives the simulated arm all the same."""
    assert int8.main([*arguments(tmp_path), f"--checkpoint={trained}", "--episodes=1"]) == 0
    content = results(tmp_path, "int8")
    for kind in int8.KINDS:
        assert value(content, f"{kind}: processor time") > 0 and value(content, f"{kind}: success") in (0, 100)
        if kind != "float32":
            assert value(content, f"{kind}: largest error") > 1e-4 > value(content, "float32: largest error")
            assert value(content, f"{kind}: file") < value(content, "float32: file")


def run_options(out: Path, bags: Path):  # noqa: ANN201 - argparse's own type
    parser = common.Parser()
    common.add_options(parser)
    return parser.parse_args(arguments(out, f"--bags={bags}"))


# -- what a figure is made of -------------------------------------------------------------------------------------


def test_measurements_alternate() -> None:
    """A B A B, never A A B B: a machine that slows down half-way must slow both sides down."""
    order = []
    found = common.alternate(3, {"a": lambda: order.append("a") or len(order), "b": lambda: order.append("b") or 0})
    assert order == list("ababab")
    assert found == {"a": [1, 3, 5], "b": [0, 0, 0]}


def test_ratios_and_targets() -> None:
    """A ratio is of the medians, its range is over single rounds; targets are bounds on the right side."""
    report = common.Report("x")
    report.ratio("r", [1.0, 4.0, 100.0], [2.0, 2.0, 10.0], at_least=1.5)
    report.ratio("s", [1.0, 4.0, 100.0], [2.0, 2.0, 10.0], at_most=1.9)
    report.row("t", [3.0, 1.0, 2.0], "s", at_most=2)
    r, s, t = report.rows
    assert (r["value"], r["low"], r["high"], r["met"]) == (2.0, 0.5, 10.0, True)
    assert (s["met"], s["target"]) == (False, "at most 1.9")
    assert (t["value"], t["rounds"], t["met"]) == (2.0, [3.0, 1.0, 2.0], True)
    table = report.table()
    assert "at least 1.5: met" in table and "at most 1.9: MISSED" in table
    with pytest.raises(ValueError):
        report.ratio("not from the same rounds", [1.0, 2.0], [1.0])


def test_speed_of_a_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """train.py's lines become one speed and one share of waiting, weighted by time; the first line is warm-up."""
    lines = [
        {"step": 2, "samples_per_s": 1.0, "data_wait_fraction": 0.9, "effective_batch": 4},
        {"step": 4, "samples_per_s": 8.0, "data_wait_fraction": 0.1, "effective_batch": 4},  # 8 samples, 1 s
        {"step": 4, "val_l1_loss": 1.0, "val_samples": 3},
        {"step": 6, "samples_per_s": 4.0, "data_wait_fraction": 0.4, "effective_batch": 4},  # 8 samples, 2 s
    ]

    def pretend(command: list, log: Path, done, **kwargs) -> float:
        launched_s = time.perf_counter()
        folder = log.with_suffix("")
        folder.mkdir()
        text = "".join(json.dumps(line) + "\n" for line in lines)
        (folder / "metrics.jsonl").write_text(text[:-20])
        assert not done(0)  # the last line is not whole yet
        (folder / "metrics.jsonl").write_text(text)
        assert done(0)
        return launched_s

    monkeypatch.setattr(common, "run_watched", pretend)
    found = common.train_ours(run_options(tmp_path, tmp_path), tmp_path / "run", 6, data__bag_dir=tmp_path)
    assert found["samples_per_s"] == pytest.approx(16 / 3)
    assert found["data_wait_fraction"] == pytest.approx((0.1 * 1 + 0.4 * 2) / 3)
    assert found["to_last_step_s"] > 0


HOLD_MEMORY = """
import mmap, os, sys
size = 64 << 20
private = bytearray(os.urandom(1 << 20) * 64)                      # anonymous
file = open(sys.argv[1], "rb")
mapped = mmap.mmap(file.fileno(), size, prot=mmap.PROT_READ)       # page cache
shared = mmap.mmap(-1, size // 2)                                  # anonymous, shared with the child: counted once
shared[:] = b"x" * (size // 2)
child = os.fork()
assert sum(mapped[::4096]) > 0 and len(set(shared[::4096])) == 1   # both processes map every page
if child:
    print("ready", flush=True)
sys.stdin.read()
"""


def test_what_counts_as_memory(tmp_path: Path) -> None:
    """Page cache is not the run's memory; shared memory is, once; children count too."""
    file = tmp_path / "file"
    file.write_bytes(os.urandom(64 << 20))
    command = [sys.executable, "-c", HOLD_MEMORY, str(file)]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout.readline() == "ready\n"
        deadline_s = time.monotonic() + 20
        while time.monotonic() < deadline_s:  # until the child has touched its pages, too
            pids = run.processes_below(process.pid)
            found = {kind: size / 2**20 for kind, size in run.memory_bytes(pids).items()}
            if found["RSS"] > 64 + 2 * (64 + 32):
                break
            time.sleep(0.05)
        process.stdin.close()
    assert len(pids) == 2
    assert found["RSS"] > 64 + 2 * (64 + 32)  # MiB
    assert 64 + 32 <= found["RSS minus page cache"] < 64 + 32 + 30  # the rest: two Python interpreters
    assert found["USS"] < found["RSS minus page cache"]


def test_watched_programs(tmp_path: Path) -> None:
    """A program is ended as soon as it has done its part, with what it started; one that fails is quoted."""
    script = "import subprocess, sys; p = subprocess.Popen(['sleep', '300']); print(p.pid, flush=True); p.wait()"
    log = tmp_path / "log"
    lines = common.Lines(log)
    before_s = time.perf_counter()
    launched_s = common.run_watched([sys.executable, "-c", script], log, lambda pid: bool(lines.poll()))
    assert before_s <= launched_s <= lines.seen[0][0] < before_s + 60
    for _ in range(200):  # killed it is, but it may take a moment to go
        if not Path(f"/proc/{lines.seen[0][1]}/exe").exists():  # gone, or nobody has collected it
            break
        time.sleep(0.05)
    else:
        pytest.fail("the program's child lives on")

    failing = [sys.executable, "-c", "import sys; print('error: no such thing'); print('more'); sys.exit(3)"]
    with pytest.raises(common.BenchmarkError, match="exit code 3: error: no such thing"):
        common.run_watched(failing, log, lambda pid: False)
    with pytest.raises(common.BenchmarkError, match="ended too early: all is well"):
        common.run_watched([sys.executable, "-c", "print('all is well')"], log, lambda pid: False)


def test_lines_are_whole(tmp_path: Path) -> None:
    """A line that is still being written is not taken for one; each keeps the moment it was first seen."""
    path = tmp_path / "log"
    lines = common.Lines(path)
    assert lines.poll() == []
    with path.open("w") as file:
        print("one\ntw", end="", file=file, flush=True)
        assert [line for _, line in lines.poll()] == ["one"]
        first_seen_s = lines.seen[0][0]
        print("o\n\nthree\n", end="", file=file, flush=True)
        assert [line for _, line in lines.poll()] == ["one", "two", "", "three"]
    assert lines.seen[0][0] == first_seen_s < lines.seen[1][0]


@pytest.mark.parametrize("count", [1, 2])
def test_on_cores(count: int) -> None:
    """One core means one, for child processes too; afterwards all are there again."""
    allowed = os.sched_getaffinity(0)
    if len(allowed) < count:
        with pytest.raises(common.BenchmarkError, match="needs 2 CPU cores"), common.on_cores(count):
            pass
        return
    with common.on_cores(count):
        script = "import os; print(len(os.sched_getaffinity(0)))"
        assert int(subprocess.check_output([sys.executable, "-c", script])) == count
    assert os.sched_getaffinity(0) == allowed


def test_log_lines_end_on_the_last_step() -> None:
    """Else a run would be waited for in vain: its last line comes before its last step."""
    for steps in range(2, 300):
        every = common.log_freq(steps)
        assert steps % every == 0 and steps // every >= 2


# -- refusals -----------------------------------------------------------------------------------------------------


def test_refusals(tmp_path: Path, sample_bags: Path, capsys: pytest.CaptureFixture) -> None:
    """What cannot be measured is one line on stderr that names it, and a status that is not zero."""
    bags = f"--bags={sample_bags}"
    cases = [
        (run, ["inges"], "no stage inges; did you mean ingest?"),
        (run, ["step", "--steps=1"], "--steps: found 1, expected at least 2"),
        (run, ["step", "--steps=few"], "--steps: invalid whole number value: 'few'"),
        (run, ["loader", "--bags=/nowhere"], "/nowhere: expected a folder of ROS 2 bags"),
        (run, ["step", bags, "--override=model.dim_modle=8"], "unknown key model.dim_modle"),
        (run, ["ingest", bags, "--override=data.cache_dir=x"], "data.cache_dir=x: here it has to be"),
        (run, ["memory", bags], "found 6 bags, expected at least 8"),
        (versus_lerobot, ["--lerobot-python=/nowhere"], "/nowhere: expected the python of an environment"),
        (versus_lerobot, [f"--lerobot-python={sys.executable}"], "its lerobot is missing or too old"),  # 0.3.2
    ]
    for command, extra, expected in cases:
        try:
            status = command.main([*arguments(tmp_path, *extra)])
        except SystemExit as exited:  # argparse's way
            status = exited.code
        errors = [line for line in capsys.readouterr().err.splitlines() if "error: " in line]
        assert status in (1, 2) and len(errors) == 1 and expected in errors[0], (extra, errors)


def test_decoding_once(bag_dir: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """A run waits longer, and nodes are saved where transfers are quicker than decoding; the table is of real bags."""
    each, once = decode_once.costs_s(decode_s=10, transfer_s=2, arms=6).values()
    assert each == (10, 60) and once == (14, 24)
    slow = decode_once.costs_s(decode_s=10, transfer_s=20, arms=6)["one decodes"]
    assert slow == (50, 150)
    decode_once.main([str(bag_dir)])
    lines = capsys.readouterr().out.splitlines()
    assert re.match(r"2 bags of \d+ MB: \d+ frames decoded in ", lines[0]) and len(lines) == 7
