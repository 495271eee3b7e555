"""Train every arm of a grid of settings, evaluate each, and say which is best: a sweep on this machine.

    python -m sweep --config config.yaml --grid "training.lr=1e-5,5e-5,1e-4 training.kl_weight=10,1"
    python -m sweep --config config.yaml --grid grid.example.yaml --jobs 4 --seeds 3     # a GPU each, 3 seeds per arm
    python -m sweep --config sim/demo.yaml --grid "model.chunk_size=15,30,60" --override training.steps=600
    python -m sweep ... --dry-run                                                        # only print the commands

Each arm is a plain train.py command, which is printed and can be run by hand; then ur10e_deploy.offline_eval on the
episodes that it held out, and, where its bags are of the simulated UR10e, sim.rollout. All arms share the frame cache
that the config names. Run the same command again after an interruption: what is finished is not done again, and a
training goes on from its last checkpoint. An arm that fails ends neither the others nor the table.

--output gets runs/, evaluations/, rollouts/ and logs/ with an entry per run, and in the end comparison.png, sweep.md
and results.json; offline.png is what ur10e_deploy.compare draws.

Exit code 0: all done; 1: an arm failed, or bad input, with one line each; 75: stopped by a signal, and saved.

This file runs commands and reads what they write. It imports nothing that trains or evaluates.
"""

from __future__ import annotations

import argparse
import ctypes
import fcntl
import hashlib
import json
import math
import os
import re
import shlex
import signal
import statistics
import subprocess
import sys
import time
from collections import deque
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from glob import glob
from pathlib import Path
from typing import Any, NoReturn

from tqdm import tqdm

from rosbag_dataset import available_cores
from training.errors import ConfigError
from training.grid import Arm, parse_grid
from training.stopping import StopSignal

ROOT = Path(__file__).resolve().parent
EXIT_STOPPED = 75  # as train.py's: run the same again
OURS = ("training.output_dir", "training.resume", "training.seed")  # settings that this program gives
SCENES = 50  # roll-outs of each run, where the bags are the simulator's
# Student's t, 97.5 %, by degrees of freedom from 1 on; behind these the normal distribution's will do.
STUDENT_95 = (12.706, 4.303, 3.182, 2.776, 2.571, 2.447, 2.365, 2.306, 2.262)
SUMMARY, ROLLOUTS = "summary.json", "rollouts.json"  # what a training and an evaluation, and a roll-out, write last


# -- what is run ----------------------------------------------------------------------------------------------------


@dataclass
class Run:
    """One training of an arm with one seed, and the evaluations that follow it.

    Attributes:
        arm: its place in the grid.
        seed: training.seed, None for the config's.
        out: the sweep's folder.
        failure: why it went wrong, in one line; "" while it has not.
        process: what runs of it now.
        stage: which of its stages that is.
        words: the command of that stage.
        log_start: where that stage begins in the log, bytes.
    """

    arm: Arm
    seed: int | None
    out: Path
    failure: str = ""
    process: subprocess.Popen = field(init=False, repr=False)
    stage: str = ""
    words: list[str] = field(default_factory=list, repr=False)
    log_start: int = field(default=0, repr=False)

    @property
    def name(self) -> str:
        """What its folders and its log are called."""
        return self.arm.name if self.seed is None else f"{self.arm.name}-seed{self.seed}"

    @property
    def folder(self) -> Path:
        """Its training.output_dir."""
        return self.out / "runs" / self.name

    @property
    def log(self) -> Path:
        """What its commands print."""
        return self.out / "logs" / f"{self.name}.log"

    def result(self, stage: str) -> Path:
        """The file that a stage writes last."""
        folders = {"evaluation": self.out / "evaluations" / self.name, "roll-out": self.out / "rollouts" / self.name}
        return folders.get(stage, self.folder) / (ROLLOUTS if stage == "roll-out" else SUMMARY)

    def contract(self) -> dict[str, Any]:
        """The train_config.json of its last checkpoint: on what it was trained, and on what not."""
        return json.loads((self.folder / "last/pretrained_model/train_config.json").read_text())

    def command(self, stage: str, args: argparse.Namespace) -> list[str] | None:
        """The command of a stage, without the interpreter; None when there is nothing for it to do."""
        if stage == "training":
            settings = [*args.override, *self.arm.settings, f"training.output_dir={self.folder}"]
            settings += [] if self.seed is None else [f"training.seed={self.seed}"]
            overrides = [word for setting in settings for word in ("--override", setting)]
            return [os.path.relpath(ROOT / "train.py"), "--config", str(args.config), "--resume", *overrides]
        contract = self.contract()
        bags, output = Path(contract["config"]["data"]["bag_dir"]), self.result(stage).parent
        if stage == "evaluation":
            words = ["-m", "ur10e_deploy.offline_eval", "--bags", str(bags)]
            return [*words, *self._where(output)] if contract["held_out_episodes"] else None
        scenes = (SCENES if is_simulated(bags) else 0) if args.rollouts is None else args.rollouts
        words = ["-m", "sim.rollout", "--episodes", str(scenes), "--no-pictures"]
        return [*words, *self._where(output)] if scenes else None

    def _where(self, output: Path) -> list[str]:
        return ["--checkpoint", str(self.folder), "--output", str(output)]


STAGES = ("training", "evaluation", "roll-out")


def is_simulated(bags: Path) -> bool:
    """Whether sim.record wrote these bags: only then can a policy of theirs do its task here."""
    from sim.record import MANIFEST

    return (bags / MANIFEST).is_file()


class Done:
    """What is finished, by the command that did it: OUT/done.json. Another command, or another config, is to be run."""

    def __init__(self, out: Path, config: Path) -> None:
        self._path, self._config = out / "done.json", hashlib.sha256(config.read_bytes()).hexdigest()
        self._done: dict[str, dict[str, str]] = json.loads(self._path.read_text()) if self._path.exists() else {}

    def has(self, run: Run, stage: str, command: Sequence[str]) -> bool:
        """Whether a stage is finished, and its result still there."""
        there = run.result(stage).is_file() and (run.folder / "last").exists()
        return there and self._done.get(run.name, {}).get(stage) == self._key(command)

    def add(self, run: Run) -> None:
        """The stage that a run was in is finished."""
        self._done.setdefault(run.name, {})[run.stage] = self._key(run.words)
        partial = self._path.with_name(f".{self._path.name}.partial")
        partial.write_text(json.dumps(self._done, indent=2) + "\n")
        os.replace(partial, self._path)

    def _key(self, command: Sequence[str]) -> str:
        return hashlib.sha256(json.dumps([self._config, *command]).encode()).hexdigest()


# -- running --------------------------------------------------------------------------------------------------------


class Machine:
    """What this machine gives to so many jobs at a time: a GPU each, or a share of the cores.

    Attributes:
        free: the places that no job has.
        notes: how they share, where they have to.
    """

    def __init__(self, jobs: int) -> None:
        all_gpus = ",".join(str(i) for i in range(len(glob("/dev/nvidia[0-9]*"))))
        self._gpus = [gpu for gpu in os.environ.get("CUDA_VISIBLE_DEVICES", all_gpus).split(",") if gpu]
        self._threads = None  # that a job may have, where it is for this program to say
        self.free, self.notes = list(range(jobs)), []
        if self._gpus and jobs > len(self._gpus):
            self.notes.append(f"{jobs} jobs share {len(self._gpus)} GPUs")
        if not self._gpus and jobs > 1 and "OMP_NUM_THREADS" not in os.environ:
            cores = available_cores()
            self._threads = max(1, cores // jobs)
            self.notes.append(
                f"{jobs} jobs share {cores} cores, {self._threads} threads each, and slow each other down"
            )

    def environment(self, place: int) -> dict[str, str]:
        """The variables that a job there gets beside this process's own."""
        added = {"CUDA_VISIBLE_DEVICES": self._gpus[place % len(self._gpus)]} if self._gpus else {}
        return added | ({"OMP_NUM_THREADS": str(self._threads)} if self._threads else {})


def train_all(runs: Sequence[Run], args: argparse.Namespace, stop: StopSignal) -> None:
    """Run what is not finished of every run, --jobs at a time, until all have ended or a signal asks to stop.

    A run that fails says why in its `failure`. After a signal every job has ended, trainings in good order.
    """
    machine, done = Machine(args.jobs), Done(args.output, args.config)
    for note in machine.notes:
        print(f"note: {note}", flush=True)
    waiting = deque(runs)
    active: dict[int, Run] = {}
    asked, quiet = False, not sys.stderr.isatty()
    with tqdm(total=len(runs), desc="sweep", unit="run", miniters=0, mininterval=10.0 if quiet else 0.5) as bar:
        while active or (waiting and not stop.name):
            while waiting and machine.free and not stop.name:
                run, place = waiting.popleft(), machine.free.pop(0)
                if advance(run, machine.environment(place), args, done, bar):
                    active[place] = run
                else:  # all of it was done before
                    machine.free.insert(0, place)
                    bar.update()
            if stop.name and not asked:
                asked = True
                for run in active.values():
                    run.process.terminate()
            for place, run in list(active.items()):
                if (code := run.process.poll()) is None:
                    continue
                if code == 0:
                    done.add(run)
                elif not asked:
                    run.failure = f"{run.stage}: {last_words(run, code)}"
                    say(bar, f"{run.name}: FAILED, {run.failure}")
                if asked or run.failure or not advance(run, machine.environment(place), args, done, bar):
                    del active[place]
                    machine.free.append(place)
                    bar.update(not asked)
            bar.set_postfix_str(", ".join(map(progress, active.values())), refresh=False)
            bar.update(0)
            time.sleep(0.2)


def advance(run: Run, added: Mapping[str, str], args: argparse.Namespace, done: Done, bar: tqdm) -> bool:
    """Start the first stage of a run that is not finished, and print its command; -> whether there was one."""
    for stage in STAGES:
        command = run.command(stage, args)
        if command is None or done.has(run, stage, command):
            continue
        words = " ".join(f"{name}={value}" for name, value in added.items())
        say(bar, f"{run.name}, {stage}: {words}{' ' * bool(words)}python {shlex.join(command)}")
        for outdated in STAGES[STAGES.index(stage) + 1 :]:  # it is of the policy of before
            run.result(outdated).unlink(missing_ok=True)
        run.log.parent.mkdir(parents=True, exist_ok=True)
        with run.log.open("ab") as log:
            run.log_start, run.stage, run.words = log.tell(), stage, command
            run.process = subprocess.Popen(
                [sys.executable, *command],
                env={**environment(), **added},
                stdout=log, stderr=subprocess.STDOUT, stdin=subprocess.DEVNULL,
                start_new_session=True,  # Ctrl-C reaches this process alone, which passes it on, once
                preexec_fn=end_with_parent if sys.platform == "linux" else None,
            )  # fmt: skip
        return True
    return False


def say(bar: tqdm, line: str) -> None:
    """Print a line above the progress bar, at once, also into a file."""
    bar.write(line)
    sys.stdout.flush()


def environment() -> dict[str, str]:
    """The variables of this process, with this project's packages to import wherever it runs."""
    path = os.pathsep.join(filter(None, (str(ROOT), str(ROOT / "deploy"), os.environ.get("PYTHONPATH"))))
    return {**os.environ, "PYTHONPATH": path, "PYTHONUNBUFFERED": "1"}


def end_with_parent() -> None:
    """In a job, before its program: have it asked to stop when the sweep is gone, whatever ended that."""
    ctypes.CDLL(None).prctl(1, signal.SIGTERM)  # PR_SET_PDEATHSIG


def last_words(run: Run, code: int) -> str:
    """What a stage that failed said: its error line, or else the last that it printed."""
    with run.log.open("rb") as log:
        log.seek(run.log_start)
        lines = [line.strip() for line in log.read().decode(errors="replace").replace("\r", "\n").splitlines()]
    lines = [line for line in lines if line]
    errors = [line.removeprefix("error: ") for line in lines if line.startswith("error: ")]
    return (errors or lines or ["it printed nothing"])[-1] + (f" (exit code {code})" if code != 1 else "")


def progress(run: Run) -> str:
    """Where a run is, in few words: how many steps of its training, or which other stage."""
    if run.stage != "training":
        return f"{run.name} {run.stage}"
    steps = re.findall(r'^\{"step": (\d+)', read_end(run.folder / "metrics.jsonl"), re.MULTILINE)
    of = re.findall(r"^training .* for (\d+) steps", read_end(run.log, 65536), re.MULTILINE)
    return f"{run.name} {steps[-1] if steps else 0}" + (f"/{of[-1]}" if of else "")


def read_end(path: Path, size: int = 4096) -> str:
    """The last bytes of a file, "" if there is none."""
    if not path.exists():
        return ""
    with path.open("rb") as file:
        file.seek(max(0, path.stat().st_size - size))
        return file.read().decode(errors="replace")


# -- comparing ------------------------------------------------------------------------------------------------------


@dataclass
class Row:
    """An arm in the table; values are one per seed that finished, in order.

    Attributes:
        arm: its name.
        seeds: their names, "" for the config's own.
        successes, scenes: roll-outs that touched the block, and all; [] where none were made.
        mae: mean absolute errors on what was held out, in `unit`.
        unit: of the action.
        val_l1: the last L1 of the training on what was held out.
    """

    arm: str
    seeds: list[str] = field(default_factory=list)
    successes: list[int] = field(default_factory=list)
    scenes: list[int] = field(default_factory=list)
    mae: list[float] = field(default_factory=list)
    unit: str = ""
    val_l1: list[float] = field(default_factory=list)

    @property
    def rates(self) -> list[float]:
        """Success rate of each seed."""
        return [s / n for s, n in zip(self.successes, self.scenes, strict=True)]

    @property
    def success(self) -> tuple[float, float, float] | None:
        """(rate over all scenes, low, high): the wider of Wilson's interval over scenes and Student's over seeds."""
        if not self.scenes:
            return None
        from sim.rollout_measures import wilson

        low, high = wilson(sum(self.successes), sum(self.scenes))
        if over_seeds := interval(self.rates):
            low, high = max(0.0, min(low, over_seeds[0])), min(1.0, max(high, over_seeds[1]))
        return sum(self.successes) / sum(self.scenes), low, high

    @property
    def order(self) -> tuple[Any, ...]:
        """What sorts the table: success, where it was measured; errors of one unit are compared with each other."""
        return (-self.success[0] if self.success else 1, self.unit, statistics.mean(self.mae) if self.mae else math.inf)


def interval(values: Sequence[float]) -> tuple[float, float] | None:
    """The 95 % interval of the mean over seeds (Student's t); None of a single one, which says nothing of others."""
    if len(values) < 2:
        return None
    t = STUDENT_95[len(values) - 2] if len(values) - 2 < len(STUDENT_95) else 1.96
    half = t * statistics.stdev(values) / math.sqrt(len(values))
    mean = statistics.mean(values)
    return mean - half, mean + half


def read_rows(runs: Sequence[Run]) -> list[Row]:
    """What the runs that did not fail have measured, best first."""
    rows: dict[str, Row] = {}
    for run in [run for run in runs if not run.failure]:
        row = rows.setdefault(run.arm.name, Row(run.arm.name))
        row.seeds.append("" if run.seed is None else str(run.seed))
        if (val_l1 := json.loads(run.result("training").read_text())["val_l1_last"]) is not None:
            row.val_l1.append(val_l1)
        if run.result("evaluation").is_file():
            summary = json.loads(run.result("evaluation").read_text())
            row.mae.append(summary["error"]["policy"]["mae"])
            row.unit = summary["unit"]
        if run.result("roll-out").is_file():
            success = json.loads(run.result("roll-out").read_text())["success"]
            row.successes.append(success["successes"])
            row.scenes.append(success["episodes"])
    return sorted(rows.values(), key=lambda row: row.order)


def table(rows: Sequence[Row]) -> str:
    """The rows as Markdown."""
    header = ("", "Arm", "Success (95 %)", "Each seed", "Error, held out (95 % over seeds)", "L1, held out")
    lines = [f"| {' | '.join(header)} |", "|---" * len(header) + "|"]
    for place, row in enumerate(rows, 1):
        success = "" if row.success is None else "**{:.0%}** ({:.0%} to {:.0%})".format(*row.success)
        each = ", ".join(f"{rate:.0%}" for rate in row.rates)
        over = interval(row.mae)
        error = f"{statistics.mean(row.mae):.5f} {row.unit}" if row.mae else ""
        error += f" ({max(0.0, over[0]):.5f} to {over[1]:.5f})" if over else ""
        val_l1 = f"{statistics.mean(row.val_l1):.3f}" if row.val_l1 else ""
        lines.append(f"| {place} | {row.arm} | {success} | {each} | {error} | {val_l1} |")
    return "\n".join(lines) + "\n"


def compare(runs: Sequence[Run], args: argparse.Namespace) -> None:
    """Print compare's table and this sweep's, and write sweep.md, results.json and comparison.png."""
    evaluated = [run.result("evaluation") for run in runs if not run.failure and run.result("evaluation").is_file()]
    if evaluated:
        folders = [str(file.parent) for file in evaluated]
        words = ["-m", "ur10e_deploy.compare", *folders, "--output", str(args.output / "offline.png")]
        subprocess.run([sys.executable, *words], env=environment())
    elif any(not run.failure for run in runs):
        print("note: nothing was held out, so that no error is compared (training.val_fraction)")
    rows = read_rows(runs)
    if not rows:
        return
    text = table(rows)
    (args.output / "sweep.md").write_text(text)
    results = [{"arm": row.arm, "success": row.success, **vars(row)} for row in rows]
    (args.output / "results.json").write_text(json.dumps(results, indent=2) + "\n")
    by = (
        "success in closed loop" if rows[0].scenes else "the error on held-out episodes, which does not predict success"
    )
    print(f"\nbest first, by {by}:\n\n{text}", flush=True)
    if any(row.scenes or row.mae for row in rows):
        draw(rows, args.output / "comparison.png")


def draw(rows: Sequence[Row], path: Path) -> None:
    """The table as a picture, by the evaluation's drawing."""
    from ur10e_deploy import report

    if not report.can_draw():
        print("picture: none, matplotlib is not installed (pip install matplotlib)")
        return
    partial = path.with_name(f".{path.name}.partial")
    report.draw_arms(
        partial,
        [
            {"arm": row.arm, "success": row.success, "rates": row.rates, "mae": row.mae,
             "mae_interval": interval(row.mae), "unit": row.unit} for row in rows
        ],
    )  # fmt: skip
    os.replace(partial, path)
    print(f"picture: {path}")


# -- the command ----------------------------------------------------------------------------------------------------


class Parser(argparse.ArgumentParser):
    """argparse exits 2 and prints the usage first; bad input here is one line and 1."""

    def error(self, message: str) -> NoReturn:
        """Print the message as one line on stderr and exit with 1."""
        self.exit(1, f"error: {message}; see --help\n")


def parse(argv: Sequence[str] | None) -> argparse.Namespace:
    """The command line, with `runs`, in which the first seed of all arms comes first.

    Raises:
        ConfigError: what contradicts itself, in one line.
    """
    parser = Parser(prog="python -m sweep", description="Train every arm of a grid, evaluate each, say which is best.")
    add = parser.add_argument
    add("--config", type=Path, required=True, help="what all arms share: a config of train.py")
    add("--grid", required=True, metavar="GRID", help='"key=value,value,... key=value,..." or a YAML file of lists')
    add("--override", action="append", default=[], metavar="KEY=VALUE", help="of every arm; repeatable")
    add(
        "--seeds", type=int, metavar="N", help="train each arm with the seeds 1 to N (default: once, with the config's)"
    )
    add("--jobs", type=int, default=1, metavar="N", help="arms at a time, each on a GPU of its own (default: 1)")
    add("--rollouts", type=int, metavar="N", help=f"simulated scenes per run (default: {SCENES}, of simulated bags)")
    add("--output", type=Path, default=Path("outputs/sweep"), help="default: outputs/sweep")
    add("--dry-run", action="store_true", help="print the commands of the trainings, and do nothing")
    args = parser.parse_args(argv)
    args.output = args.output.resolve()
    for option, value, low in (("--seeds", args.seeds, 1), ("--jobs", args.jobs, 1), ("--rollouts", args.rollouts, 0)):
        if value is not None and value < low:
            raise ConfigError(f"{option}: found {value}, expected {low} or more")
    if not args.config.is_file():
        raise ConfigError(
            f"--config: {args.config}: not a file; expected a config of train.py, for example config.yaml"
        )
    arms = parse_grid(args.grid, osmo=False)
    swept = {setting.partition("=")[0] for setting in arms[0].settings}
    given = [setting.partition("=")[0] for setting in args.override]
    for key in (*swept, *given):
        if key in OURS[: 3 if key in swept or args.seeds else 2]:
            hint = "--seeds N trains each arm with several" if key == "training.seed" else "the sweep gives it itself"
            raise ConfigError(f"{key}: found it in {'--grid' if key in swept else '--override'}; leave it out: {hint}")
    if twice := [key for key in given if key in swept]:
        raise ConfigError(f"{twice[0]}: found it in --grid and in --override, expected it once")
    seeds = [None] if args.seeds is None else range(1, args.seeds + 1)
    args.runs = [Run(arm, seed, args.output) for seed in seeds for arm in arms]
    return args


def main(argv: Sequence[str] | None = None) -> int:
    """Entry of `python -m sweep`. Exit codes: see the top of this file."""
    try:
        args = parse(argv)
        if args.dry_run:
            for run in args.runs:
                print(f"python {shlex.join(run.command('training', args))}")
            return 0
        args.output.mkdir(parents=True, exist_ok=True)
        lock = (args.output / ".lock").open("w")
        try:
            fcntl.lockf(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise ConfigError(f"--output: {args.output}: another sweep runs there now") from None
    except ConfigError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    except OSError as error:
        print(f"error: --output: {args.output}: {error.strerror}", file=sys.stderr)
        return 1
    sys.path.append(str(ROOT / "deploy"))  # where the package is not installed
    stop = StopSignal()
    stop.interrupts = False  # it asks; nothing is broken off in the middle
    try:
        train_all(args.runs, args, stop)
        if stop.name:
            print(f"stopped by {stop.name}: trainings have saved; run the same again to go on", file=sys.stderr)
            return EXIT_STOPPED
        compare(args.runs, args)
    finally:
        stop.restore()
        lock.close()
    failed = [run for run in args.runs if run.failure]
    for run in failed:
        print(f"error: {run.name}: {run.failure} (all of it: {run.log})", file=sys.stderr, flush=True)
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
