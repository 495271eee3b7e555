"""What the benchmarks share: bags to measure on, measurements that alternate, watched processes, tables and JSON.

A shared machine is never twice the same, so that two figures from different minutes say little about each other.
Whatever is compared is therefore measured in turn, A B A B ..., and a ratio is that of the medians, printed with the
smallest and the largest ratio of a single round.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import platform
import re
import shlex
import shutil
import signal
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NoReturn, TypeVar

import torch

import train
from lerobot_checkpoint import CheckpointError, save_checkpoint
from rosbag_dataset import BagError, find_bags
from sim.record import plan_episode
from training.identity import source_version

ROOT = Path(__file__).resolve().parent.parent
SEED = 0  # of the recorded bags and of the models' random weights
T = TypeVar("T")


class BenchmarkError(Exception):
    """A benchmark that cannot be taken: one line saying what was found, what was expected and what to do."""


def say(line: str) -> None:
    """Progress, on stderr; stdout has the tables."""
    print(line, file=sys.stderr, flush=True)


# -- options ------------------------------------------------------------------------------------------------------


class Parser(argparse.ArgumentParser):
    """argparse with errors in one line, without the usage."""

    def error(self, message: str) -> NoReturn:
        """Print the message as one line on stderr and exit with 2."""
        self.exit(2, f"error: {message}\n")


def whole_number(low: int) -> Callable[[str], int]:
    """An argparse type: a whole number from `low` on."""

    def convert(text: str) -> int:
        value = int(text)
        if value < low:
            raise argparse.ArgumentTypeError(f"found {value}, expected at least {low}")
        return value

    convert.__name__ = "whole number"  # what argparse calls it when int() refuses the text
    return convert


def add_options(parser: argparse.ArgumentParser) -> None:
    """The options that every benchmark takes: where, on which bags, at which sizes."""
    add = parser.add_argument
    add("--out", type=Path, default=Path("outputs/benchmarks"), help="bags, caches and results (default: %(default)s)")
    add("--bags", type=Path, help="bags of yours; without it the simulated UR10e records some, once")
    add("--frames", type=whole_number(1), default=3000, help="camera frames to record, at least (default: %(default)s)")
    add("--bag-height", type=int, default=480, help="of the recorded images, pixels (default: %(default)s)")
    add("--bag-width", type=int, default=640, help="of the recorded images, pixels (default: %(default)s)")
    add("--height", type=int, default=240, help="of the images the model sees, pixels (default: %(default)s)")
    add("--width", type=int, default=320, help="of the images the model sees, pixels (default: %(default)s)")
    add("--batch-size", type=whole_number(1), default=8, help="samples per step (default: %(default)s)")
    add("--steps", type=whole_number(2), default=100, help="optimizer steps of one training run (default: %(default)s)")
    add("--rounds", type=whole_number(1), default=5, help="how often each measurement is taken (default: %(default)s)")
    add("--device", default="auto", help="auto, cpu or cuda (default: %(default)s)")
    add(
        "--override", action="append", default=[], metavar="KEY=VALUE",
        help="a setting of train.py, for example data.camera_topic=/wrist/image; repeatable",
    )  # fmt: skip


def overrides(options: argparse.Namespace, **settings: Any) -> list[str]:
    """key=value texts for train.py: the sizes, then the user's, then `settings`, given as training__steps=4."""
    first = {
        "data.cache_dir": options.out / "cache",
        "data.frames": "cache",  # what all of these measure; the other way has a benchmark of its own
        "conventions.image_resize": f"[{options.height}, {options.width}]",
        "model.pretrained_backbone": "false",  # no download; the speed is the same
        "training.batch_size": options.batch_size,
        "training.device": options.device,
        "training.seed": SEED,
    }
    last = {name.replace("__", "."): "null" if value is None else value for name, value in settings.items()}
    for override in options.override:
        name, _, value = override.partition("=")
        if str(last.get(name.strip(), value)) != value:
            raise BenchmarkError(f"--override {override}: here it has to be {last[name.strip()]}; leave it out")
    texts = [f"{name}={value}" for name, value in first.items()]
    return texts + list(options.override) + [f"{name}={value}" for name, value in last.items()]


def config(options: argparse.Namespace, **settings: Any) -> train.Config:
    """train.py's configuration for a measurement. Raises ConfigError or BenchmarkError."""
    return train.load_config(ROOT / "config.yaml", overrides(options, **settings))


# -- bags ---------------------------------------------------------------------------------------------------------


def sample_bags(options: argparse.Namespace, storage: str = "sqlite3", frames: int | None = None) -> Path:
    """The bags to measure on: --bags, or at least `frames` (--frames if None) camera frames of the simulated UR10e.

    Recorded once below --out; a second run with the same sizes finds them. Raises BenchmarkError.
    """
    if options.bags is not None:
        return options.bags
    return record_bags(options, storage, frames or options.frames)


def record_bags(options: argparse.Namespace, storage: str, frames: int, jpeg: bool = False) -> Path:
    """At least `frames` camera frames of the simulated UR10e, whole episodes of about 100 frames each."""
    episodes, planned = 0, 0
    while planned < frames:
        planned += sum(event[3] == "camera" for event in plan_episode(SEED, episodes)[2])
        episodes += 1
    folder = options.out / f"bags-{episodes}-{options.bag_height}x{options.bag_width}-{storage}{'-jpeg' * jpeg}"
    if not (folder / "recording.json").exists():
        say(f"recording {planned} frames of {options.bag_height}x{options.bag_width} in {episodes} bags ({storage})")
    command = [
        sys.executable, "-m", "sim.record", f"--out={folder.absolute()}", f"--episodes={episodes}", f"--seed={SEED}",
        f"--storage={storage}", f"--height={options.bag_height}", f"--width={options.bag_width}",
    ] + ["--compressed"] * jpeg  # fmt: skip
    result = subprocess.run(command, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    if result.returncode:
        raise BenchmarkError(f"recording bags failed: {last_words(result.stdout).removeprefix('error: ')}")
    return folder


def read_bags(bag_dir: Path) -> None:
    """Read every byte of the bags and drop it: from then on the page cache holds them, as far as memory goes."""
    buffer = bytearray(1 << 20)
    for bag in find_bags(bag_dir):
        for file in bag.files:
            with file.open("rb", buffering=0) as stream:
                while stream.readinto(buffer):
                    pass


def random_checkpoint(cfg: train.Config, folder: Path, image_shape: tuple[int, int]) -> Path:
    """A checkpoint with random weights, as train.py writes it; speed does not depend on what was learned."""
    act = train.act_config(cfg)
    torch.manual_seed(SEED)
    neutral = {"observation.state": (act.state_dim,), "action": (act.action_dim,)}
    neutral |= {f"observation.images.{camera}": (3, 1, 1) for camera in act.cameras}
    stats = {name: {"mean": torch.zeros(s).numpy(), "std": torch.ones(s).numpy()} for name, s in neutral.items()}
    return save_checkpoint(
        folder,
        0,
        model_state=train.ACT(act).state_dict(),
        act_config=act,
        image_shapes=dict.fromkeys(act.cameras, image_shape),
        stats=stats,
        policy_fields={
            "n_action_steps": cfg.model.n_action_steps,
            "temporal_ensemble_coeff": cfg.model.temporal_ensemble_coeff,
            "kl_weight": cfg.training.kl_weight,
            "optimizer_lr": cfg.training.lr,
            "optimizer_weight_decay": cfg.training.weight_decay,
            "optimizer_lr_backbone": cfg.training.lr_backbone,
        },
        train_config={"random weights": True},
        training_state={"step": 0},
    )


def random_observation(cfg: train.Config, image_shape: tuple[int, int]) -> dict[str, torch.Tensor]:
    """One raw observation: state (1, J) and images (1, 3, H, W) in [0, 1], float32, on the CPU."""
    generator = torch.Generator().manual_seed(SEED)
    images = {f"observation.images.{c}": torch.rand(1, 3, *image_shape, generator=generator) for c in cfg.cameras}
    return {"observation.state": torch.rand(1, cfg.model.state_dim, generator=generator), **images}


# -- measuring ----------------------------------------------------------------------------------------------------


def alternate(rounds: int, measures: Mapping[str, Callable[[], T]]) -> dict[str, list[T]]:
    """Take the measures in turn, `rounds` times over; -> what each returned, round by round."""
    results: dict[str, list[T]] = {name: [] for name in measures}
    for i in range(rounds):
        for name, measure in measures.items():
            say(f"  round {i + 1}/{rounds}: {name}")
            results[name].append(measure())
    return results


def seconds(work: Callable[[], Any]) -> float:
    """How long `work` takes, s."""
    before_s = time.perf_counter()
    work()
    return time.perf_counter() - before_s


def synchronize(device: torch.device) -> None:
    """Wait until a GPU has done what was asked of it; nothing to wait for elsewhere."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


@contextlib.contextmanager
def on_cores(count: int) -> Iterator[None]:
    """Run this thread, and the processes it starts, on `count` CPUs: on different physical cores as far as possible.

    Raises BenchmarkError when there are fewer.
    """
    allowed = os.sched_getaffinity(0)
    if len(allowed) < count:
        raise BenchmarkError(f"this measurement needs {count} CPU cores, this process may use {len(allowed)}")
    by_core: dict[str, list[int]] = {}
    for cpu in sorted(allowed):
        by_core.setdefault(_siblings(cpu), []).append(cpu)
    ordered = [cpu for turn in range(len(allowed)) for cpus in by_core.values() for cpu in cpus[turn : turn + 1]]
    os.sched_setaffinity(0, ordered[:count])
    try:
        yield
    finally:
        os.sched_setaffinity(0, allowed)


def _siblings(cpu: int) -> str:
    """The hardware threads that share a core with `cpu`, in the kernel's notation, such as "0,64"."""
    try:
        return Path(f"/sys/devices/system/cpu/cpu{cpu}/topology/thread_siblings_list").read_text().strip()
    except OSError:
        return str(cpu)


# -- watching other processes -------------------------------------------------------------------------------------


def last_words(log: str) -> str:
    """What a failed program said: its last line that begins with "error:", else its last line."""
    lines = [line.strip() for line in re.split(r"[\r\n]", log) if line.strip()]
    return ([line for line in lines if line.startswith("error: ")] or lines or ["nothing was printed"])[-1]


class Lines:
    """The complete lines of a file that another process is writing, each with the moment when it was first seen."""

    def __init__(self, path: Path) -> None:
        self.path, self.seen = path, list[tuple[float, str]]()  # (time.perf_counter(), line)
        self._offset = 0

    def poll(self) -> list[tuple[float, str]]:
        """Read on; -> all lines so far."""
        if self.path.exists():
            with self.path.open("rb") as file:
                file.seek(self._offset)
                whole, newline, _ = file.read().rpartition(b"\n")
            self._offset += len(whole) + len(newline)
            now_s = time.perf_counter()
            self.seen += [(now_s, line) for line in whole.decode(errors="replace").split("\n") if newline]
        return self.seen


def run_watched(
    command: Sequence[str | os.PathLike[str]],
    log: Path,
    done: Callable[[int], bool],
    interval_s: float = 0.01,
    env: Mapping[str, str] | None = None,
) -> float:
    """Run a program, calling done(process id) every `interval_s`; end it as soon as that is true.

    Its output goes to `log`, `env` is set on top of this process's environment.

    Returns:
        When it was launched, as time.perf_counter() gives it (a clock that all processes share).

    Raises:
        BenchmarkError: it failed; or it ended by itself before done() was true.
    """
    log.parent.mkdir(parents=True, exist_ok=True)
    with log.open("wb") as output:
        launched_s = time.perf_counter()
        process = subprocess.Popen(
            command, cwd=ROOT, stdin=subprocess.DEVNULL, stdout=output, stderr=subprocess.STDOUT,
            env={**os.environ, **(env or {})}, start_new_session=True,
        )  # fmt: skip
    try:
        while process.poll() is None and not done(process.pid):
            time.sleep(interval_s)
        ended = process.poll()
    finally:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)  # its own session: the program and what it started, nothing else
        process.wait()
    if ended or (ended == 0 and not done(process.pid)):
        what = f"exit code {ended}" if ended else "ended too early"
        raise BenchmarkError(
            f"{shlex.join(map(str, command))[:120]} ...: {what}: {last_words(log.read_text())}; all of it: {log}"
        )
    return launched_s


def log_freq(steps: int) -> int:
    """Steps between lines of a run's log: ten lines or a few more, the last of them at the last step."""
    return max(n for n in range(1, max(1, steps // 10) + 1) if steps % n == 0)


def train_ours(
    options: argparse.Namespace, folder: Path, steps: int, ranks: int = 1, **settings: Any
) -> dict[str, Any]:
    """Run train.py in a process of its own (`ranks` of them, by torchrun) until metrics.jsonl has its last step.

    Returns:
        {"to_last_step_s": from launch to that line, "samples_per_s" and "data_wait_fraction": over all steps but those
        of the first line}. Speed is by train.py's own clock, which stops for validation and saving.
    """
    shutil.rmtree(folder, ignore_errors=True)
    texts = overrides(
        options, training__output_dir=folder.absolute(), training__steps=steps, training__log_freq=log_freq(steps),
        training__save_freq=steps, **settings,
    )  # fmt: skip
    torchrun = ["-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={ranks}"] if ranks > 1 else []
    command = [sys.executable, *torchrun, ROOT / "train.py", f"--config={ROOT / 'config.yaml'}"]
    command += [f"--override={text}" for text in texts]
    metrics = Lines(folder / "metrics.jsonl")

    def logged() -> list[tuple[float, dict[str, Any]]]:
        lines = [(when_s, json.loads(line)) for when_s, line in metrics.poll()]
        return [(when_s, line) for when_s, line in lines if "samples_per_s" in line]

    def done(pid: int) -> bool:
        return any(line["step"] == steps for _, line in logged())

    launched_s = run_watched(command, folder.with_suffix(".log"), done)
    (_, first), *rest = logged()
    last_s = logged()[-1][0]
    busy_s = waited_s = 0.0
    before = first
    for _, line in rest:
        window_s = (line["step"] - before["step"]) * line["effective_batch"] / line["samples_per_s"]
        busy_s, waited_s, before = busy_s + window_s, waited_s + window_s * line["data_wait_fraction"], line
    samples = (before["step"] - first["step"]) * first["effective_batch"]
    shutil.rmtree(folder, ignore_errors=True)
    return {
        "to_last_step_s": last_s - launched_s,
        "samples_per_s": samples / busy_s,
        "data_wait_fraction": waited_s / busy_s,
    }


def run_stages(options: argparse.Namespace, stages: Sequence[Callable[[argparse.Namespace], None]]) -> int:
    """Take the stages; -> the exit status: 0, or 1 after one line on stderr that says what cannot be measured."""
    options.out = options.out.absolute()
    options.bags = options.bags and options.bags.absolute()
    try:
        options.out.mkdir(parents=True, exist_ok=True)
        for stage in stages:
            say(f"{stage.__name__}: {(stage.__doc__ or '').splitlines()[0]}")
            stage(options)
        return 0
    except (BenchmarkError, BagError, CheckpointError, train.ConfigError, train.TrainingError) as error:
        print(f"error: {error}", file=sys.stderr)
    except OSError as error:
        print(f"error: {error.filename or options.out}: {error.strerror or error}", file=sys.stderr)
    except KeyboardInterrupt:
        print("interrupted; stages that were finished are written", file=sys.stderr)
        return 130
    return 1


# -- reporting ----------------------------------------------------------------------------------------------------


class Report:
    """The figures of one stage: printed as a table, written as JSON."""

    def __init__(self, stage: str) -> None:
        self.stage = stage
        self.machine = machine()  # before it is busy with us
        self.rows: list[dict[str, Any]] = []
        self.notes: list[str] = []

    def row(
        self,
        what: str,
        values: Sequence[float],
        unit: str,
        *,
        at_most: float | None = None,
        at_least: float | None = None,
    ) -> None:
        """A measured quantity: its median, its range, and whether the median meets a target."""
        self._add(what, statistics.median(values), values, unit, at_most, at_least)

    def ratio(
        self,
        what: str,
        of: Sequence[float],
        to: Sequence[float],
        *,
        at_most: float | None = None,
        at_least: float | None = None,
    ) -> None:
        """`of` / `to`, both measured in the same rounds: the ratio of the medians, and the range over the rounds."""
        rounds = [a / b for a, b in zip(of, to, strict=True)]
        self._add(what, statistics.median(of) / statistics.median(to), rounds, "x", at_most, at_least)

    def _add(
        self, what: str, value: float, values: Sequence[float], unit: str, at_most: float | None, at_least: float | None
    ) -> None:
        row = {"what": what, "value": value, "low": min(values), "high": max(values), "unit": unit}
        row["rounds"] = list(values)
        if at_most is not None:
            row |= {"target": f"at most {at_most:g}", "met": value <= at_most}
        if at_least is not None:
            row |= {"target": f"at least {at_least:g}", "met": value >= at_least}
        self.rows.append(row)

    def note(self, text: str) -> None:
        """A sentence that a reader of the figures needs."""
        self.notes.append(text)

    def table(self) -> str:
        """The rows as text."""
        header = (self.stage, "median", "lowest", "highest", "", "target")
        lines = [header]
        for row in self.rows:
            numbers = tuple(number(row[name]) for name in ("value", "low", "high"))
            target = f"{row['target']}: {'met' if row['met'] else 'MISSED'}" if "target" in row else ""
            lines.append((row["what"], *numbers, row["unit"], target))
        widths = [max(len(line[i]) for line in lines) for i in range(len(header))]
        text = [
            "  ".join(
                c.rjust(w) if 1 <= i <= 3 else c.ljust(w) for i, (c, w) in enumerate(zip(line, widths, strict=True))
            )
            for line in lines
        ]
        text.insert(1, "-" * max(map(len, text)))
        return "\n".join([line.rstrip() for line in text] + [f"  {note}" for note in self.notes])

    def markdown(self) -> str:
        """The rows and notes for a page: what, the median with its range, the target."""
        lines = ["| | value | target |", "|---|---|---|"]
        for row in self.rows:
            value = f"{number(row['value'])} {row['unit']}".rstrip()
            if len(row["rounds"]) > 1:
                value += f" ({number(row['low'])} .. {number(row['high'])})"
            target = f"{row['target']}: {'met' if row['met'] else '**missed**'}" if "target" in row else ""
            lines.append(f"| {row['what']} | {value} | {target} |")
        return "\n".join([*lines, "", *self.notes]) + "\n"

    def finish(self, options: argparse.Namespace) -> None:
        """Print the table and write OUT/<stage>.json."""
        print(f"\n{self.table()}\n", flush=True)
        content = {
            "stage": self.stage,
            "rows": self.rows,
            "notes": self.notes,
            "machine": self.machine,
            "settings": {name: str(v) if isinstance(v, Path) else v for name, v in sorted(vars(options).items())},
        }
        path = options.out / f"{self.stage}.json"
        path.write_text(json.dumps(content, indent=2) + "\n")
        say(f"written: {path}")


def number(value: float) -> str:
    """Four digits, and thousands set apart."""
    return f"{value:,.0f}" if abs(value) >= 1000 else f"{value:.4g}"


def machine() -> dict[str, Any]:
    """What the figures depend on besides the code: the CPU, the GPU, the versions, and how busy it all was."""
    cpu = Path("/proc/cpuinfo").read_text()
    flags = set((re.search(r"^(?:flags|Features)\s*:(.*)$", cpu, re.M) or [0, ""])[1].split())
    name = (re.search(r"^model name\s*:\s*(.*)$", cpu, re.M) or [0, platform.processor() or platform.machine()])[1]
    cpus = os.sched_getaffinity(0)
    memory_kb = re.search(r"^MemTotal:\s*(\d+)", Path("/proc/meminfo").read_text(), re.M)
    has_gpu = torch.cuda.is_available()
    return {
        "cpu": name,
        "cpus": len(cpus),
        "physical_cores": len({_siblings(cpu) for cpu in cpus}),
        "instruction_set": torch.backends.cpu.get_cpu_capability(),
        "bf16_instructions": sorted(flag for flag in flags if "bf16" in flag),
        "memory_gb": round(int(memory_kb[1]) / 1e6, 1) if memory_kb else None,
        "gpu": torch.cuda.get_device_name() if has_gpu else None,
        "load_average_1min": os.getloadavg()[0],
        "kernel": platform.release(),
        "python": platform.python_version(),
        "torch": str(torch.__version__),
        "torch_threads": torch.get_num_threads(),
        "commit": _git("rev-parse", "HEAD"),
        "uncommitted_changes": bool(_git("status", "--porcelain")),
        **source_version(),
    }


def _git(*arguments: str) -> str | None:
    """The output of a git command on this repository, or None where there is no git or no history."""
    try:
        result = subprocess.run(["git", "-C", str(ROOT), *arguments], capture_output=True, text=True)
    except OSError:
        return None
    return result.stdout.strip() if result.returncode == 0 else None
