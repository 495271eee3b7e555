"""All that a GPU has to answer, in one command and a few minutes: a step, its batch, feeding it, the whole run.

    python -m benchmarks.gpu --peak-tflops 989                           # an H100; see --help for what is optional
    python -m benchmarks.gpu --lerobot-python ENVIRONMENT/bin/python     # and lerobot-train beside it

Needs torch and what train.py needs, nothing else. Parts follow each other, what matters most first; one for which the
time (--budget-s) is over is named as not measured. Writes OUT/gpu.json, and OUT/gpu.md: the table of
benchmarks/README.md.
"""

from __future__ import annotations

import argparse
import functools
import shutil
import statistics
import sys
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode

import train
from benchmarks import common, run, versus_lerobot
from benchmarks.common import BenchmarkError, Report, say
from training import feed

COUNT_ALONE = 20  # batches of the loader that are timed
AT_BATCH_8, AT_BATCH_64, OF_SYNTHETIC = 1500, 2600, 0.9  # the targets on an H100, samples/s, and a share of them


def gpu(options: argparse.Namespace) -> None:
    """A step, its batch, feeding it, the whole run, more GPUs, LeRobot."""
    report, begin_s = Report("gpu"), time.monotonic()
    missing = []
    for part in (steps, whole_run, batches, feeding, ranks, beside_lerobot, inference):
        left_s = options.budget_s - (time.monotonic() - begin_s)
        if left_s <= 0:
            missing.append(part.__name__)
            continue
        say(f"{part.__name__}: {(part.__doc__ or '').splitlines()[0]} ({left_s:.0f} s left)")
        part(report, options)
    if missing:
        report.note(f"Not measured, since --budget-s {options.budget_s:g} was over: {', '.join(missing)}.")
    report.note(
        f"{options.height}x{options.width}, batch {options.batch_size} where no other is named, {options.steps} steps "
        f"a measurement, {options.run_steps} a run, {options.rounds} rounds; {time.monotonic() - begin_s:.0f} s in all."
    )
    report.finish(options)
    (options.out / "gpu.md").write_text(report.markdown())


# -- the step -----------------------------------------------------------------------------------------------------


def ways(options: argparse.Namespace) -> Iterator[tuple[str, dict[str, str]]]:
    """(name, settings) of each precision and each value of training.compile that works here."""
    for precision in run.precisions(options):
        for value in options.compile:
            yield f"{precision}, compile {value}", {"training__precision": precision, "training__compile": value}


def steps(report: Report, options: argparse.Namespace) -> None:
    """Forward, backward, optimizer on a batch that is there, in each way; and the operations that one launches."""
    measures: dict[str, Callable[[], float]] = {}
    folders = []
    flops = None
    for name, settings in ways(options):
        folder = options.out / f"gpu-{name.replace(', ', '-').replace(' ', '-')}"
        try:
            trainer = run.make_trainer(options, folder, **settings)
            batch = run.synthetic_batch(trainer, options.batch_size)
            run.time_steps(trainer, batch, 1)
        except (train.ConfigError, RuntimeError) as error:  # what is not installed, what this card cannot do
            report.note(f"{name}: not measured: {str(error).splitlines()[0]}")
            continue
        folders.append(folder)
        flops = flops or run.flops_per_sample(trainer)
        if settings["training__compile"] == "false":
            operations = operations_of_a_step(trainer, batch)
            report.row(f"{name}: operations launched by a step", [operations.total()], "")
            report.row(f"{name}: of them casts", [operations["aten._to_copy"]], "")
        measures[name] = functools.partial(run.time_steps, trainer, batch, options.steps)
    if not measures or flops is None:
        raise BenchmarkError("no way of making a step works here; see --compile")
    for name, times_s in common.alternate(options.rounds, measures).items():
        report.row(f"{name}: step", [1e3 * t for t in times_s], "ms")
        rates = [options.batch_size / t for t in times_s]
        target = {"at_least": AT_BATCH_8} if options.batch_size == 8 and name.startswith("bf16") else {}
        report.row(f"{name}: speed", rates, "samples/s", **target)
        if options.peak_tflops and name.startswith("bf16"):
            report.row(f"{name}: share of {options.peak_tflops:g} TFLOP/s", share(options, flops, rates), "")
    report.note(f"{flops / 1e9:.1f} GFLOP a sample, forward and backward.")
    for folder in folders:
        shutil.rmtree(folder)


def share(options: argparse.Namespace, flops: float, rates: Sequence[float]) -> list[float]:
    """Of the chip's rate that these samples/s are."""
    return [flops * rate / 1e12 / options.peak_tflops for rate in rates]


def operations_of_a_step(trainer: train.Trainer, batch: dict[str, torch.Tensor]) -> Counter[str]:
    """{aten operation: how often one train_step calls it}; a GPU is given each of them by the host, one by one."""
    counts: Counter[str] = Counter()

    class Counting(TorchDispatchMode):
        def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            counts[str(func.overloadpacket)] += 1
            return func(*args, **(kwargs or {}))

    with Counting():
        trainer.train_step(batch)
    return counts


def batches(report: Report, options: argparse.Namespace) -> None:
    """The fastest precision as the trainer chooses it, at twice the batch again and again, until it does not fit."""
    trainer = run.make_trainer(options, options.out / "gpu-batches")
    device, flops = trainer.world.device, run.flops_per_sample(trainer)
    size = options.batch_size
    while size <= options.largest_batch:
        if device.type == "cuda":
            torch.cuda.empty_cache()
            torch.cuda.reset_peak_memory_stats(device)
        try:
            batch, at_this_size = run.synthetic_batch(trainer, size), max(5, 8 * options.steps // size)
            took_s = [run.time_steps(trainer, batch, at_this_size) for _ in range(options.rounds)]
        except torch.OutOfMemoryError:
            report.note(f"A batch of {size} does not fit.")
            break
        rates = [size / t for t in took_s]
        target = {"at_least": AT_BATCH_64} if size == 64 else {}
        report.row(f"batch {size}: speed", rates, "samples/s", **target)
        if options.peak_tflops:
            report.row(f"batch {size}: share of {options.peak_tflops:g} TFLOP/s", share(options, flops, rates), "")
        if device.type == "cuda":
            report.row(f"batch {size}: memory at most", [torch.cuda.max_memory_allocated(device) / 1e9], "GB")
        size *= 2
    shutil.rmtree(trainer.output_dir)


# -- feeding ------------------------------------------------------------------------------------------------------


def feeding(report: Report, options: argparse.Namespace) -> None:
    """What a batch costs the training process's own time: of indices, where frames fit on the GPU, and of pixels."""
    trainers = {
        name: run.make_trainer(options, options.out / f"gpu-{name}", data__frames_on_device=value)
        for name, value in (("frames on the GPU", "auto"), ("pixels", "never"))
    }

    def cpu_ms(trainer: train.Trainer) -> float:
        """Of this process, per batch, with the trainer's own loader, until the batch is what the network takes."""
        batches = iter(trainer.start())
        try:
            for _ in range(COUNT_ALONE):
                trainer.prepare(next(batches))
            common.synchronize(trainer.world.device)
            begin_s = time.process_time()
            for _ in range(COUNT_ALONE):
                trainer.prepare(next(batches))
            return 1e3 * (time.process_time() - begin_s) / COUNT_ALONE
        finally:
            feed.end_loader(batches)

    measures = {name: functools.partial(cpu_ms, trainer) for name, trainer in trainers.items()}
    for name, took_ms in common.alternate(options.rounds, measures).items():
        report.row(f"feeding, {name}: a batch", took_ms, "CPU ms of the training process")
    if trainers["frames on the GPU"].frames is None:
        report.note("Frames were not on the GPU: they do not fit, or there is none. Both rows of feeding are pixels.")
    for trainer in trainers.values():
        shutil.rmtree(trainer.output_dir)


# -- whole runs ---------------------------------------------------------------------------------------------------


def run_of(options: argparse.Namespace, ranks: int = 1) -> dict[str, Any]:
    """train.py as it comes, in processes of its own; see common.train_ours."""
    bag_dir = common.sample_bags(options)
    return common.train_ours(
        options, options.out / "gpu-run", options.run_steps, ranks=ranks, data__bag_dir=bag_dir,
        training__val_fraction=0,
    )  # fmt: skip


def whole_run(report: Report, options: argparse.Namespace) -> None:
    """train.py beside the same step on a synthetic batch, in turn."""
    trainer = run.make_trainer(options, options.out / "gpu-synthetic")
    batch = run.synthetic_batch(trainer, options.batch_size)
    measures: dict[str, Callable[[], Any]] = {
        "train.py": lambda: run_of(options),
        "synthetic": lambda: options.batch_size / run.time_steps(trainer, batch, options.steps),
    }
    runs, synthetic = common.alternate(options.rounds, measures).values()
    rates = [one["samples_per_s"] for one in runs]
    report.row("train.py", rates, "samples/s")
    report.ratio("train.py to its step on a synthetic batch", rates, synthetic, at_least=OF_SYNTHETIC)
    report.row("train.py: waiting for data", [one["data_wait_fraction"] for one in runs], "of the time", at_most=0.01)
    shutil.rmtree(trainer.output_dir)


def ranks(report: Report, options: argparse.Namespace) -> None:
    """torchrun over all GPUs (NCCL), beside one; on a CPU over --ranks processes (gloo)."""
    there = torch.cuda.device_count() if torch.cuda.is_available() and options.device != "cpu" else options.ranks
    if there < 2:
        report.note("One GPU: torchrun over several was not measured.")
        return
    measures = {count: functools.partial(run_of, options, count) for count in (1, there)}
    alone, together = common.alternate(options.rounds, measures).values()
    rates = [[one["samples_per_s"] for one in runs] for runs in (together, alone)]
    report.row(f"torchrun, {there} ranks, batch {options.batch_size} each", rates[0], "samples/s")
    report.ratio(f"{there} ranks to one", *rates)


def beside_lerobot(report: Report, options: argparse.Namespace) -> None:
    """lerobot-train on the same frames, from a dataset that LeRobot's own writer made."""
    if options.lerobot_python is None:
        report.note("lerobot-train was not measured: no --lerobot-python.")
        return
    options = argparse.Namespace(**vars(options) | {"steps": options.run_steps})
    lerobot = versus_lerobot.LeRobot(options)
    cfg, frames = versus_lerobot.prepared(options)
    converted_s = lerobot.convert(frames)
    root = str(options.out / "lerobot-dataset")
    runs = common.alternate(
        options.rounds, {"lerobot-train": lambda: lerobot.train(cfg, root), "train.py": lambda: run_of(options)}
    )
    theirs, ours = ([one["samples_per_s"] for one in each] for each in runs.values())
    report.row("lerobot-train", theirs, "samples/s")
    waits = [one["data_wait_fraction"] for one in runs["lerobot-train"]]
    report.row("lerobot-train: waiting for data", waits, "of the time")
    report.row("lerobot-train: its conversion", [converted_s], "s")
    report.ratio("speed of train.py to lerobot-train's", ours, theirs, at_least=4)
    report.note(versus_lerobot.about(lerobot))


def inference(report: Report, options: argparse.Namespace) -> None:
    """One observation, batch 1, to a chunk of actions on the host."""
    took_ms, _ = run.inference_times_ms(options)
    report.row("inference, batch 1: p50", [statistics.median(times) for times in took_ms], "ms")


# -- the command --------------------------------------------------------------------------------------------------


def main(argv: Sequence[str] | None = None) -> int:
    """The command line; returns the exit status. A missed target is not an error: it is in the table."""
    parser = common.Parser(prog="python -m benchmarks.gpu", description="All that a GPU has to answer, in one command.")
    common.add_options(parser)
    parser.set_defaults(frames=400, height=480, width=640, rounds=3, steps=50)
    add, whole = parser.add_argument, common.whole_number
    add("--budget-s", type=float, default=450.0, help="no part begins later than this, s (default: %(default)s)")
    add("--peak-tflops", type=float, help="the chip's dense bf16 rate, to say the share that is reached; H100: 989")
    add(
        "--compile", nargs="+", default=["false", "graph"], metavar="VALUE",
        help="values of training.compile to measure (default: false graph)",
    )  # fmt: skip
    add("--run-steps", type=whole(2), default=500, help="steps of a run of train.py (default: %(default)s)")
    add("--largest-batch", type=whole(1), default=1024, help="where doubling ends at last (default: %(default)s)")
    add("--ranks", type=whole(1), default=1, help="processes where there is no GPU (default: %(default)s)")
    add("--lerobot-python", type=Path, help="the interpreter of an environment with lerobot 0.4.4")
    add("--lerobot-workers", type=int, default=4, help="lerobot-train's loader processes (default: 4, its own)")
    options = parser.parse_args(argv)
    options.lerobot_python = options.lerobot_python and options.lerobot_python.absolute()  # a venv's is a link
    options.lerobot_streaming_encoding = False
    return common.run_stages(options, [gpu])


if __name__ == "__main__":
    sys.exit(main())
