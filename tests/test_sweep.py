"""python -m sweep: real arms, one after the other, of which one fails and one is interrupted; and their table."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import yaml

import sweep
from tests.tiny import ROOT, TINY, metrics
from training.grid import Arm

GRID = "model.n_heads=2,4,7"  # 7 does not divide model.dim_model: that arm fails


def config(folder: Path, bags: Path, **changes: object) -> Path:
    """A config of tiny runs on these bags."""
    sections: dict[str, dict] = {"data": {"bag_dir": str(bags), "cache_dir": str(bags.parent / "tiny-cache")}}
    for key, value in (TINY | {name.replace("__", "."): value for name, value in changes.items()}).items():
        section, name = key.split(".")
        sections.setdefault(section, {})[name] = yaml.safe_load(value) if isinstance(value, str) else value
    (folder / "tiny.yaml").write_text(yaml.safe_dump(sections))
    return folder / "tiny.yaml"


def start(folder: Path, *options: str) -> subprocess.Popen:
    command = [sys.executable, "-m", "sweep", "--config", str(folder / "tiny.yaml"), "--output", str(folder / "out")]
    environment = {name: value for name, value in os.environ.items() if name != "CUDA_VISIBLE_DEVICES"}
    return subprocess.Popen(
        [*command, *options], cwd=ROOT, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )


def finish(process: subprocess.Popen) -> tuple[int, str, list[str]]:
    """-> (exit code, stdout, error lines)."""
    stdout, stderr = process.communicate()
    assert "Traceback" not in stderr, stderr
    return process.returncode, stdout, [x for x in stderr.replace("\r", "\n").splitlines() if x.startswith("error: ")]


def test_three_arms_of_which_one_fails_and_one_is_interrupted(sample_bags: Path, tmp_path: Path):
    """SIGTERM stops the arm that trains, which saves. The same command goes on from there, does not do again what was
    finished, survives the arm that fails, compares what there is, and exits with 1."""
    config(tmp_path, sample_bags, training__steps=60, training__save_freq=60, training__log_freq=1, training__seed=24)
    options, second = ("--grid", GRID, "--rollouts", "0"), tmp_path / "out/runs/n_heads4"
    process = start(tmp_path, *options)
    while not (second / "metrics.jsonl").exists() or not metrics(second):
        assert process.poll() is None, finish(process)
        time.sleep(0.02)
    process.send_signal(signal.SIGTERM)
    code, stdout, _ = finish(process)
    stopped_at = int((second / "last").readlink().name.removeprefix("checkpoint_"))
    assert code == 75 and 0 < stopped_at < 60
    assert json.loads((second / "stopped.json").read_text())["exit_code"] == 75
    assert not (tmp_path / "out/runs/n_heads7").exists()
    command = f"python train.py --config {tmp_path}/tiny.yaml --resume --override model.n_heads=4 --override "
    assert f"n_heads4, training: {command}training.output_dir={second}\n" in stdout

    code, stdout, errors = finish(start(tmp_path, *options))
    assert code == 1
    (line,) = errors
    assert line.startswith("error: n_heads7: training: model.dim_model: found 32, expected a multiple of 4 and")
    assert "n_heads2, " not in stdout
    assert f"at step {stopped_at}\n" in (tmp_path / "out/logs/n_heads4.log").read_text()  # resumed, not begun again
    assert "episodes 3: " in stdout and "of baseline" in stdout  # ur10e_deploy.compare's table
    table = [line.split("|") for line in stdout.splitlines() if line.startswith("|")]
    assert [row[1].strip() for row in table[2:]] == ["1", "2"]
    assert {row[2].strip() for row in table[2:]} == {"n_heads2", "n_heads4"}
    assert "rad per frame" in table[2][5] and table[2][5] < table[3][5]
    assert "\n".join("|".join(row) for row in table) + "\n" == (tmp_path / "out/sweep.md").read_text()
    for name in ("comparison.png", "offline.png", "results.json"):
        assert (tmp_path / "out" / name).stat().st_size > 100


def test_simulated_bags_end_in_closed_loop(sample_bags: Path, tmp_path: Path):
    """Two seeds of one arm, at the same time; nothing held out. Their success is measured, and what was not is said."""
    config(tmp_path, sample_bags, training__steps=2, training__val_fraction=0.0)
    options = ("--grid", "training.lr=1e-4", "--seeds", "2", "--jobs", "2", "--rollouts", "1")
    code, stdout, errors = finish(start(tmp_path, *options))
    assert (code, errors) == (0, [])
    (row,) = json.loads((tmp_path / "out/results.json").read_text())
    assert row["scenes"] == [1, 1] and row["mae"] == [] and row["seeds"] == ["1", "2"]
    assert "note: nothing was held out" in stdout and "best first, by success in closed loop" in stdout
    assert {f.name for f in (tmp_path / "out/runs").iterdir()} == {"lr1e4-seed1", "lr1e4-seed2"}
    for seed in (1, 2):
        assert f"--override training.seed={seed}" in stdout
        assert len(json.loads((tmp_path / f"out/rollouts/lr1e4-seed{seed}/rollouts.json").read_text())["episodes"]) == 1
    assert "threads each" not in stdout  # conftest.py says how many they may have


REFUSED = {
    "no such config": (["--config", "/nowhere.yaml", "--grid", "training.lr=1"], "--config: /nowhere.yaml: not a file"),
    "no grid": (["--grid", "lr"], "grid: found lr, expected section.key=value,value,..."),
    "a setting of its own": (["--grid", "training.output_dir=/a,/b"], "training.output_dir: found it in --grid; leave"),
    "seeds in the grid": (["--grid", "training.seed=1,2"], "training.seed: found it in --grid; leave it out: --seeds"),
    "seeds and a seed": (["--grid", "training.lr=1", "--seeds", "2", "--override", "training.seed=3"],
                         "training.seed: found it in --override; leave it out"),
    "a key twice": (["--grid", "training.lr=1,2", "--override", "training.lr=3"],
                    "training.lr: found it in --grid and in --override, expected it once"),
    "no jobs": (["--grid", "training.lr=1", "--jobs", "0"], "--jobs: found 0, expected 1 or more"),
}  # fmt: skip


@pytest.mark.parametrize("options, message", REFUSED.values(), ids=list(REFUSED))
def test_bad_input_is_one_line(tmp_path: Path, capsys: pytest.CaptureFixture[str], options: list[str], message: str):
    """Before anything is trained."""
    given = [] if "--config" in options else ["--config", str(ROOT / "config.yaml")]
    assert sweep.main([*given, *options, "--output", str(tmp_path / "out")]) == 1
    error = capsys.readouterr().err
    assert error.startswith(f"error: {message}") and error.count("\n") == 1
    assert not (tmp_path / "out").exists()


def test_the_commands_alone(capsys: pytest.CaptureFixture[str], tmp_path: Path):
    """--dry-run: the documents' six arms as plain train.py commands, the first seed of all of them first."""
    argv = ["--config", "config.yaml", "--grid", "grid.example.yaml", "--seeds", "2", "--output", str(tmp_path / "out")]
    assert sweep.main([*argv, "--override", "data.bag_dir=my bags", "--dry-run"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == 12 and all("training.seed=1" in line for line in lines[:6]) and not (tmp_path / "out").exists()
    assert lines[0] == (
        "python train.py --config config.yaml --resume --override 'data.bag_dir=my bags' --override training.lr=1e-5 "
        f"--override training.kl_weight=10 --override training.output_dir={tmp_path}/out/runs/lr1e5-kl10-seed1 "
        "--override training.seed=1"
    )


def test_two_sweeps_do_not_share_a_folder(sample_bags: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    """The second is refused while the first one runs."""
    lock = "import fcntl, sys; f = open(sys.argv[1], 'w'); fcntl.lockf(f, fcntl.LOCK_EX); print(flush=True); input()"
    (tmp_path / "out").mkdir()
    with subprocess.Popen(
        [sys.executable, "-c", lock, str(tmp_path / "out/.lock")], stdin=subprocess.PIPE, stdout=subprocess.PIPE
    ) as other:
        other.stdout.readline()
        argv = ["--config", str(config(tmp_path, sample_bags)), "--grid", "training.lr=1"]
        assert sweep.main([*argv, "--output", str(tmp_path / "out")]) == 1
        assert "another sweep runs there now" in capsys.readouterr().err
        other.communicate(b"\n")


def test_each_job_has_a_gpu_of_its_own_or_a_share_of_the_cores(monkeypatch: pytest.MonkeyPatch):
    """By CUDA_VISIBLE_DEVICES, of those that this process may use; without any, each has its part of the threads."""
    monkeypatch.delenv("OMP_NUM_THREADS")
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "3,5")
    machine = sweep.Machine(3)
    assert [machine.environment(place) for place in range(3)] == [{"CUDA_VISIBLE_DEVICES": g} for g in ("3", "5", "3")]
    assert machine.notes == ["3 jobs share 2 GPUs"]
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    cores = len(os.sched_getaffinity(0))
    assert sweep.Machine(2).environment(1) == {"OMP_NUM_THREADS": str(max(1, cores // 2))}
    assert f"2 jobs share {cores} cores" in sweep.Machine(2).notes[0]
    assert sweep.Machine(1).environment(0) == {} and sweep.Machine(1).notes == []


def test_the_order_is_that_of_success_and_intervals_are_over_seeds(tmp_path: Path):
    """The error ranks the arms the other way round; three seeds that differ say less than their scenes alone would."""
    arms, runs = {"a": ([9, 10, 2], 0.001), "b": ([40, 42, 41], 0.003)}, []
    for name, (successes, mae) in arms.items():
        for seed, count in enumerate(successes, 1):
            runs.append(sweep.Run(Arm(name, ("x.y=1",)), seed, tmp_path))
            contents = {
                "training": {"val_l1_last": 0.5},
                "evaluation": {"error": {"policy": {"mae": mae * (1 + 0.1 * seed)}}, "unit": "rad"},
                "roll-out": {"success": {"successes": count, "episodes": 50}},
            }
            for stage, content in contents.items():
                runs[-1].result(stage).parent.mkdir(parents=True, exist_ok=True)
                runs[-1].result(stage).write_text(json.dumps(content))
    first, second = sweep.read_rows(runs)
    assert (first.arm, second.arm) == ("b", "a") and first.rates == [0.8, 0.84, 0.82]
    rate, low, high = first.success
    assert rate == pytest.approx(0.82) and 0.74 < low < 0.76 and 0.86 < high < 0.88  # Wilson's: seeds hardly differ
    rate, low, high = second.success
    assert rate == pytest.approx(0.14) and low == 0 and 0.35 < high < 0.37  # Student's: 18, 20, 4 %
    assert sweep.interval([1.0]) is None
    assert sweep.interval([1.0, 2.0, 3.0]) == pytest.approx((2 - 2.484, 2 + 2.484), abs=1e-3)
    row = sweep.table([first, second]).splitlines()[2]
    assert row == "| 1 | b | **82%** (75% to 87%) | 80%, 84%, 82% | 0.00360 rad (0.00285 to 0.00435) | 0.500 |"
    runs[0].failure = "training: no"
    assert [len(row.rates) for row in sweep.read_rows(runs)] == [3, 2]
