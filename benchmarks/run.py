"""Measure every part between the bags and the trained policy.

    python -m benchmarks.run                        # all stages, at the sizes of the README's tables
    python -m benchmarks.run ingest loader          # only these
    python -m benchmarks.run step --peak-tflops 989 --largest-batch

What each stage measures, and how to read it: benchmarks/README.md. Each stage prints a table and writes
OUT/<stage>.json as soon as it is done.
"""

from __future__ import annotations

import argparse
import contextlib
import difflib
import functools
import json
import math
import os
import re
import shutil
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import torch
from rosbags.rosbag2 import Reader, ReaderError
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

import train
from act_model import ACT, loss_terms
from benchmarks import common
from benchmarks.common import BenchmarkError, Report, say
from lerobot_checkpoint import load_policy
from rosbag_dataset import COMPRESSED_TYPE, IMAGE_TYPE, Bag, BagSettings, find_bags, load_episodes, typestore_for
from training import feed, graphs, metrics, trackers
from training.device import has_fast_bf16

WARM_UP_STEPS = 3
WARM_UP_INFERENCES = 10
BATCH_MS = 0.6  # of the training process, that a batch of 8 from the cache may take
COMPUTES = "import hashlib\nwhile True: hashlib.sha256(bytes(2**24))"  # a program that keeps a core busy, in C


# -- ingest -------------------------------------------------------------------------------------------------------


def ingest(options: argparse.Namespace) -> None:
    """Bags to the frame cache, beside reading the files raw and beside `rosbags` and OpenCV alone."""
    report = Report("ingest")
    for storage in ("sqlite3", "mcap") if options.bags is None else ("your bags",):
        _ingest(report, options, storage)
    report.note(
        f"Images are resized to {options.height}x{options.width}. All files were read once before: times are with a "
        "warm page cache. Ours also checks, writes and flushes the cache; rosbags alone keeps nothing."
    )
    report.finish(options)


def _ingest(report: Report, options: argparse.Namespace, storage: str) -> None:
    bag_dir, cache = common.sample_bags(options, storage), options.out / "ingest-cache"
    cfg = common.config(options, data__bag_dir=bag_dir, data__cache_dir=cache, data__frames="cache")
    settings = train.bag_settings(cfg)
    bags = find_bags(bag_dir)
    bags_mb = sum(file.stat().st_size for bag in bags for file in bag.files) / 1e6
    common.read_bags(bag_dir)
    frames, pixels = rosbags_and_resize(settings)

    def ours(cores: int) -> float:
        """Seconds to decode all bags into a fresh cache on this many cores."""
        shutil.rmtree(cache, ignore_errors=True)
        with common.on_cores(cores):
            took_s = common.seconds(lambda: load_episodes(settings, progress=False))
        stored = sum(file.stat().st_size for file in cache.glob("*/*.rgb"))
        if stored != pixels:
            raise BenchmarkError(f"ingest: the cache holds {stored} bytes of pixels, `rosbags` gave {pixels}")
        return took_s

    def rosbags() -> float:
        with common.on_cores(1):
            return common.seconds(lambda: rosbags_and_resize(settings))

    measures: dict[str, Callable[[], float]] = {
        "read() alone": lambda: common.seconds(lambda: common.read_bags(bag_dir)),
        "rosbags and resize alone, 1 core": rosbags,
    }
    cores = len(os.sched_getaffinity(0))
    for workers in sorted({1, 2, cores}):
        if workers <= min(cores, len(bags)):
            measures[f"ours, {workers} core{'s' * (workers > 1)}"] = functools.partial(ours, workers)
    measures["writing the cache's bytes alone"] = lambda: write_alone(options.out / "ingest-write", pixels)
    took_s = common.alternate(options.rounds, measures)
    shutil.rmtree(cache)

    for name, times_s in took_s.items():
        report.row(f"{storage}: {name}", [frames / t for t in times_s], "frames/s")
        megabytes, of_what = (pixels / 1e6, "cache") if "writing" in name else (bags_mb, "bags")
        report.row(f"{storage}: {name}", [megabytes / t for t in times_s], f"MB/s of {of_what}")
    one, alone = took_s["ours, 1 core"], took_s["rosbags and resize alone, 1 core"]
    report.ratio(f"{storage}: time of ours to rosbags', 1 core", one, alone, at_most=1.3)
    if "ours, 2 cores" in took_s:
        report.ratio(f"{storage}: speed on 2 cores to 1", one, took_s["ours, 2 cores"], at_least=1.7)
    report.note(f"{storage}: {frames} frames, {bags_mb:.0f} MB in {len(bags)} bags; {pixels / 1e6:.0f} MB of pixels.")


def rosbags_and_resize(settings: BagSettings) -> tuple[int, int]:
    """What nobody who uses `rosbags` can do without: read, deserialise and resize; in this process, on one thread.

    Returns the number of images and the bytes of the resized ones. Raises BenchmarkError on an image encoding other
    than rgb8, bgr8 and compressed.
    """
    typestore = typestore_for(settings.ros_distro)
    frames = pixels = 0
    threads = cv2.getNumThreads()
    cv2.setNumThreads(1)
    topics = {settings.joint_topic, *settings.camera_topics.values()}
    for bag in find_bags(settings.bag_dir):
        with _opened(bag) as reader:
            connections = [c for c in reader.connections if c.topic in topics]
            for connection, _, raw in reader.messages(connections):
                message = typestore.deserialize_cdr(raw, connection.msgtype)
                if connection.msgtype == COMPRESSED_TYPE:
                    image = cv2.imdecode(message.data, cv2.IMREAD_COLOR)
                elif connection.msgtype == IMAGE_TYPE:
                    if message.encoding not in ("rgb8", "bgr8"):
                        raise BenchmarkError(
                            f"{bag.name}: {connection.topic}: found {message.encoding}, expected rgb8, bgr8 or a "
                            "compressed image: only for these is it plain what to compare with; leave out `ingest`"
                        )
                    rows = message.data.reshape(message.height, message.step)[:, : 3 * message.width]
                    image = rows.reshape(message.height, message.width, 3)
                else:
                    continue
                height, width = settings.image_resize or image.shape[:2]
                image = cv2.resize(image, (width, height), interpolation=cv2.INTER_AREA)
                frames, pixels = frames + 1, pixels + image.nbytes
    cv2.setNumThreads(threads)
    return frames, pixels


def _opened(bag: Bag) -> Reader:
    try:
        return Reader(bag.path)
    except ReaderError as error:  # it refuses bags that we read
        raise BenchmarkError(f"{bag.name}: `rosbags` cannot open it ({error}); leave out `ingest`") from None


def write_alone(folder: Path, size_bytes: int) -> float:
    """Seconds to write and flush as many bytes as the cache has pixels: the disk's share of ingest."""
    folder.mkdir(parents=True, exist_ok=True)
    block = np.random.default_rng(0).integers(0, 256, 1 << 20, np.uint8).tobytes()

    def write() -> None:
        with (folder / "pixels").open("wb") as file:
            for first in range(0, size_bytes, len(block)):
                file.write(block[: size_bytes - first])
            file.flush()
            os.fsync(file.fileno())

    took_s = common.seconds(write)
    shutil.rmtree(folder)
    return took_s


# -- loader -------------------------------------------------------------------------------------------------------


def loader(options: argparse.Namespace) -> None:
    """Samples per second out of the cache with nothing consuming them."""
    report = Report("loader")
    trainer = make_trainer(options, options.out / "loader", data__frames_on_device="never")

    def load(loader: Callable[..., Iterable[Any]], workers: int) -> tuple[float, float]:
        trainer.start()
        batches = iter(loader(trainer.dataset, trainer.stream, workers, pinned=False))
        try:
            return samples_per_s(batches, options)
        finally:
            feed.end_loader(batches)

    def bare() -> tuple[float, float]:
        trainer.start()
        return samples_per_s(map(trainer.dataset.__getitems__, trainer.stream), options)

    measures = {
        "bare __getitems__": bare,
        "0 workers": functools.partial(load, feed.processes, 0),
        "2 threads": functools.partial(load, feed.Threads, 2),
        "2 processes": functools.partial(load, feed.processes, 2),
    }
    for name, found in common.alternate(options.rounds, measures).items():
        rates, cpu_ms = ([one[i] for one in found] for i in (0, 1))
        report.row(name, rates, "samples/s")
        most = {"at_most": BATCH_MS} if "threads" in name else {}
        report.row(f"{name}: a batch", cpu_ms, "CPU ms of the training process", **most)
    report.note(
        f"Batches of {options.batch_size}, {options.height}x{options.width}, in the shuffled order of training, from "
        f"{len(trainer.dataset)} samples; the cache's pixels are in the page cache."
    )
    report.finish(options)


def samples_per_s(batches: Iterator[Any], options: argparse.Namespace) -> tuple[float, float]:
    """The rate at which an endless iterator yields, over --seconds, after its first 20 batches; CPU ms of a batch.

    The CPU time is that of this process, all its threads.
    """
    for _ in range(20):
        next(batches)
    begin_s, begin_cpu_s, count = time.perf_counter(), time.process_time(), 0
    while (elapsed_s := time.perf_counter() - begin_s) < options.seconds:
        next(batches)
        count += 1
    return options.batch_size * count / elapsed_s, 1e3 * (time.process_time() - begin_cpu_s) / count


# -- step ---------------------------------------------------------------------------------------------------------


def make_trainer(options: argparse.Namespace, folder: Path, bags: Path | None = None, **settings: Any) -> train.Trainer:
    """A real Trainer in this process, ready for train_step(); its output goes to `folder`, what it says beside it.

    `bags`: those to train on, if they are not the sample ones.
    """
    bag_dir = bags or common.sample_bags(options)
    cfg = common.config(options, data__bag_dir=bag_dir, training__output_dir=folder, **settings)
    world = train.detect_ddp()
    train.join_ddp(world, cfg.training.device)
    stop = train.StopSignal()
    stop.restore()  # Ctrl-C ends a benchmark at once
    with folder.with_suffix(".log").open("w") as log, contextlib.redirect_stdout(log):
        trainer = train.Trainer(cfg, world, stop, overwrite=True)
        trainer.start()
    trainer.say = lambda *values, **options: None
    return trainer


def synthetic_batch(trainer: train.Trainer, batch_size: int) -> dict[str, torch.Tensor]:
    """Random samples of the shapes that the loader gives, on the device and normalised."""
    generator = torch.Generator().manual_seed(common.SEED)
    model, episode = trainer.cfg.model, trainer.episodes[0]
    raw = {
        "observation.state": torch.randn(batch_size, model.state_dim, generator=generator),
        "action": 0.01 * torch.randn(batch_size, model.chunk_size, model.action_dim, generator=generator),
        "action_is_pad": torch.zeros(batch_size, model.chunk_size, dtype=torch.bool),
        "index": torch.arange(batch_size),
    }
    for camera, shape in episode.image_shape.items():
        size = (batch_size, *shape, 3)
        raw[f"observation.images.{camera}"] = torch.randint(256, size, generator=generator, dtype=torch.uint8)
    return feed.to_model(feed.to_device(raw, trainer.world.device), trainer.normalizer)


def time_steps(trainer: train.Trainer, batch: dict[str, torch.Tensor], steps: int) -> float:
    """Seconds per optimizer step on one batch that is there already."""
    device = trainer.world.device
    repeated = isinstance(trainer.step_on_device, graphs.Repeated)
    for _ in range(graphs.WARM_UP + graphs.TIMED + 2 if repeated else WARM_UP_STEPS):  # all that is not as later ones
        trainer.train_step(batch)
    common.synchronize(device)
    begin_s = time.perf_counter()
    for _ in range(steps):
        trainer.train_step(batch)
    common.synchronize(device)
    return (time.perf_counter() - begin_s) / steps


def step(options: argparse.Namespace) -> None:
    """Forward, backward, optimizer: what the machine's arithmetic allows."""
    report = Report("step")
    trainers = {
        precision: make_trainer(options, options.out / f"step-{precision}", training__precision=precision)
        for precision in precisions(options)
    }
    steps = max(1, options.steps // 10)
    measures = {
        precision: functools.partial(time_steps, trainer, synthetic_batch(trainer, options.batch_size), steps)
        for precision, trainer in trainers.items()
    }
    took_s = common.alternate(options.rounds, measures)
    flops = flops_per_sample(next(iter(trainers.values())))
    for precision, times_s in took_s.items():
        _report_step(report, options, precision, options.batch_size, flops, times_s)
    if "bf16" in took_s:
        report.ratio("speed of bf16 to fp32", took_s["fp32"], took_s["bf16"])
    if options.largest_batch:
        _largest_batch(report, options, trainers, flops)
    for trainer in trainers.values():
        shutil.rmtree(trainer.output_dir)
    report.note(
        f"{flops / 1e9:.2f} GFLOP a sample, forward and backward, a multiplication and an addition counted as two; "
        f"{options.height}x{options.width}, on {next(iter(trainers.values())).world.device}."
    )
    report.finish(options)


def _report_step(
    report: Report, options: argparse.Namespace, precision: str, batch_size: int, flops: float, times_s: list[float]
) -> None:
    what = f"{precision}, batch {batch_size}"
    tflops = [flops * batch_size / 1e12 / t for t in times_s]
    report.row(f"{what}: step", [t * 1e3 for t in times_s], "ms")
    report.row(f"{what}: speed", [batch_size / t for t in times_s], "samples/s")
    report.row(f"{what}: arithmetic", tflops, "TFLOP/s")
    if options.peak_tflops and precision == "bf16":
        report.row(f"{what}: share of {options.peak_tflops:g} TFLOP/s", [t / options.peak_tflops for t in tflops], "")


def _largest_batch(
    report: Report, options: argparse.Namespace, trainers: dict[str, train.Trainer], flops: float
) -> None:
    """The same at the largest batch that fits the GPU's memory beside these trainers, by doubling --batch-size."""
    precision, trainer = list(trainers.items())[-1]
    fits, batch_size = 0, options.batch_size
    while True:
        try:
            time_steps(trainer, synthetic_batch(trainer, batch_size), 1)
        except torch.OutOfMemoryError:
            break
        fits, batch_size = batch_size, 2 * batch_size
        say(f"  batch {fits} fits")
    if not fits:
        raise BenchmarkError(f"--batch-size {options.batch_size}: does not fit the GPU's memory; lower it")
    torch.cuda.empty_cache()
    batch = synthetic_batch(trainer, fits)
    steps = max(1, options.steps // 10)
    times_s = [time_steps(trainer, batch, steps) for _ in range(options.rounds)]
    _report_step(report, options, precision, fits, flops, times_s)


def precisions(options: argparse.Namespace) -> list[str]:
    """fp32, and bf16 where the hardware has it (training.precision: auto)."""
    cfg = common.config(options)
    world = train.detect_ddp()
    train.join_ddp(world, cfg.training.device)
    return ["fp32", "bf16"] if has_fast_bf16(world.device) else ["fp32"]


def flops_per_sample(trainer: train.Trainer) -> float:
    """Floating-point operations of one sample's forward and backward pass, counted on the CPU in fp32.

    Attention is counted in its plain form: fused kernels do the same sums and are not all known to the counter.
    """
    model = ACT(trainer.act)
    shapes, chunk = trainer.episodes[0].image_shape, (1, trainer.act.chunk_size, trainer.act.action_dim)
    batch = {"observation.state": torch.zeros(1, trainer.act.state_dim), "action": torch.zeros(chunk)}
    batch["action_is_pad"] = torch.zeros(chunk[:2], dtype=torch.bool)
    batch |= {f"observation.images.{camera}": torch.zeros(1, 3, *shape) for camera, shape in shapes.items()}
    with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
        prediction, (mu, log_sigma_x2) = model(batch)
        l1_sum, _, kl_sum = loss_terms(prediction, batch["action"], batch["action_is_pad"], mu, log_sigma_x2)
        (l1_sum + kl_sum).backward()
    return counter.get_total_flops()


# -- train --------------------------------------------------------------------------------------------------------


def train_stage(options: argparse.Namespace) -> None:
    """The real loop: its speed beside the same step on a synthetic batch, its waiting for data, its start."""
    report = Report("train")
    bag_dir = common.sample_bags(options)
    _loop(report, options, bag_dir)
    _starts(report, options, bag_dir)
    report.finish(options)


def _loop(report: Report, options: argparse.Namespace, bag_dir: Path) -> None:
    folder = options.out / "train"
    trainer = make_trainer(options, options.out / "train-synthetic")  # also fills the cache that the loop starts from
    batch = synthetic_batch(trainer, options.batch_size)
    steps = max(1, options.steps // 2)
    measures: dict[str, Callable[[], Any]] = {
        "train.py": lambda: common.train_ours(options, folder, options.steps, data__bag_dir=bag_dir),
        "the same step on a synthetic batch": lambda: options.batch_size / time_steps(trainer, batch, steps),
    }
    runs, synthetic = common.alternate(options.rounds, measures).values()
    real = [run["samples_per_s"] for run in runs]
    report.row("train.py", real, "samples/s")
    report.row("the same step on a synthetic batch", synthetic, "samples/s")
    at_least = 0.90 if trainer.world.device.type == "cuda" else 0.95
    report.ratio("train.py to the synthetic batch", real, synthetic, at_least=at_least)
    waits = [run["data_wait_fraction"] for run in runs]
    report.row("waiting for data", waits, "of the time", at_most=0.01)
    shutil.rmtree(trainer.output_dir)
    precision = str(trainer.precision).removeprefix("torch.")
    report.note(f"{precision} on {trainer.world.device}, batch {options.batch_size}, {options.steps} steps a run.")


def _starts(report: Report, options: argparse.Namespace, bag_dir: Path) -> None:
    """From launch to the first optimizer step: with no cache, with a cache, and with a cache of --cache-gb."""
    cold_cache = options.out / "cold-cache"

    def cold() -> dict[str, float]:
        shutil.rmtree(cold_cache, ignore_errors=True)
        return first_step(options, "after", data__bag_dir=bag_dir, data__cache_dir=cold_cache)

    measures = {
        "cold": cold,
        "warm": lambda: first_step(options, "after", data__bag_dir=bag_dir, data__cache_dir=cold_cache),
    }
    big = ""
    if options.cache_gb:
        frames = math.ceil(options.cache_gb * 1e9 / (options.bag_height * options.bag_width * 3))
        settings = {
            "data__bag_dir": common.record_bags(options, "sqlite3", frames),
            "data__cache_dir": options.out / "big-cache",
            "conventions__image_resize": None,
        }
        say(f"caching {options.cache_gb:g} GB of frames")
        cfg = common.config(options, **settings)
        load_episodes(train.bag_settings(cfg))
        size_gb = sum(f.stat().st_size for f in Path(cfg.data.cache_dir).glob("*/*.rgb")) / 1e9
        big = f"warm, {size_gb:.3g} GB of cache"
        measures[big] = lambda: first_step(options, "before", **settings)
    starts = common.alternate(options.rounds, measures)
    shutil.rmtree(cold_cache, ignore_errors=True)
    for name, runs in starts.items():
        for phase in runs[0]:
            report.row(f"start, {name}: {phase}", [run[phase] for run in runs], "s")
        until = [sum(s for phase, s in run.items() if phase != "first step") for run in runs]
        own = [u - run["import torch"] - run["model"] for u, run in zip(until, runs, strict=True)]
        report.row(f"start, {name}: launch to first step", until, "s")
        target = {"at_most": 1.0} if name == big else {}
        report.row(f"start, {name}: the same less torch and model", own, "s", **target)


def first_step(options: argparse.Namespace, stop: str, **settings: Any) -> dict[str, float]:
    """Seconds of each phase of a start of train.py (see first_step.py)."""
    out = options.out / "first-step"
    shutil.rmtree(out, ignore_errors=True)
    out.mkdir()
    texts = common.overrides(options, training__output_dir=out / "run", **settings)
    arguments = [f"--config={common.ROOT / 'config.yaml'}", *(f"--override={text}" for text in texts)]
    command = [sys.executable, "-m", "benchmarks.first_step", out / "phases.json", str(time.perf_counter()), stop]
    phases = out / "phases.json"
    common.run_watched([*command, *arguments], out / "log", lambda pid: phases.exists() and phases.stat().st_size > 0)
    return json.loads(phases.read_text())


# -- memory -------------------------------------------------------------------------------------------------------


def memory(options: argparse.Namespace) -> None:
    """Peak memory of a whole run, from bags to summary, over data of 1x, 2x, 4x, 8x."""
    report = Report("memory")
    bags = find_bags(common.sample_bags(options))
    if len(bags) < max(options.multiples):
        raise BenchmarkError(
            f"memory: found {len(bags)} bags, expected at least {max(options.multiples)}; see --frames"
        )
    once = len(bags) // max(options.multiples)
    measures = {}
    for multiple in options.multiples:
        subset = options.out / f"memory-bags-{multiple}"
        shutil.rmtree(subset, ignore_errors=True)
        subset.mkdir()
        for i, bag in enumerate(bags[: once * multiple]):
            (subset / f"{i:04d}-{bag.path.name}").symlink_to(bag.path.absolute())
        measures[f"{multiple}x"] = functools.partial(peak_memory, options, subset)
    peaks = common.alternate(options.rounds, measures)
    for kind in next(iter(peaks.values()))[0]:
        for name, runs in peaks.items():
            report.row(f"{kind}, {name}", [run[kind] / 2**20 for run in runs], "MiB")
    smallest, *_, largest = peaks
    for kind, target in (("RSS minus page cache", {"at_most": 1.05}), ("RSS", {}), ("USS", {})):
        of, to = ([run[kind] for run in peaks[name]] for name in (largest, smallest))
        report.ratio(f"{kind}, {largest} to {smallest}", of, to, **target)
    report.note(
        f"1x is {once} bags. Peaks of the sums over all processes of train.py, sampled every 50 ms from "
        "/proc/PID/smaps_rollup: RSS counts a page once for each process that maps it; USS is what is private to one "
        "process; RSS minus page cache is anonymous and shared memory, each page counted once (Pss_Anon + Pss_Shmem)."
    )
    report.finish(options)


def peak_memory(options: argparse.Namespace, bag_dir: Path) -> dict[str, int]:
    """{kind: bytes} of a short train.py from a cold cache to its end, summary included."""
    folder = options.out / "memory-run"
    shutil.rmtree(folder, ignore_errors=True)
    steps = max(2, options.steps // 10)
    texts = common.overrides(
        options, data__bag_dir=bag_dir, data__cache_dir=folder / "cache", training__output_dir=folder / "run",
        training__steps=steps, training__log_freq=1, training__save_freq=steps,
    )  # fmt: skip
    command = [sys.executable, common.ROOT / "train.py", f"--config={common.ROOT / 'config.yaml'}"]
    peak: dict[str, int] = {}

    def sample(pid: int) -> bool:
        now = memory_bytes(processes_below(pid))
        for kind, size in now.items():
            peak[kind] = max(peak.get(kind, 0), size)
        return (folder / "run" / "summary.json").exists()

    arguments = [f"--override={text}" for text in texts]
    common.run_watched([*command, *arguments], folder / "log", sample, interval_s=0.05)
    shutil.rmtree(folder, ignore_errors=True)
    return peak


def processes_below(pid: int) -> list[int]:
    """`pid` and everything that descends from it, now."""
    children: dict[int, list[int]] = {}
    for entry in Path("/proc").iterdir():
        if entry.name.isdigit():
            try:  # "pid (name) state parent ...": the name may hold spaces and brackets
                parent = int((entry / "stat").read_text().rpartition(")")[2].split()[1])
            except (OSError, IndexError):  # gone meanwhile
                continue
            children.setdefault(parent, []).append(int(entry.name))
    found = [pid]
    for known in found:
        found += children.get(known, [])
    return found


def memory_bytes(pids: Sequence[int]) -> dict[str, int]:
    """{kind: bytes} summed over processes; what has ended meanwhile counts nothing."""
    total = dict.fromkeys(("RSS minus page cache", "RSS", "USS"), 0)
    for pid in pids:
        try:
            text = Path(f"/proc/{pid}/smaps_rollup").read_text()
        except OSError:
            continue
        kb = {name: int(value) for name, value in re.findall(r"^(\w+):\s+(\d+) kB$", text, re.M)}
        if not kb:  # a process that has ended and is not yet collected
            continue
        if "Pss_Shmem" not in kb:
            raise BenchmarkError("memory: /proc/PID/smaps_rollup has no Pss_Shmem; this needs Linux 5.10 or newer")
        total["RSS minus page cache"] += 1024 * (kb["Pss_Anon"] + kb["Pss_Shmem"])
        total["RSS"] += 1024 * kb["Rss"]
        total["USS"] += 1024 * (kb["Private_Clean"] + kb["Private_Dirty"])
    return total


# -- inference ----------------------------------------------------------------------------------------------------


def inference(options: argparse.Namespace) -> None:
    """From one raw observation to a chunk of actions on the host: batch 1, as on the robot."""
    report = Report("inference")
    took_ms, device = inference_times_ms(options)
    for percent in (50, 99):
        report.row(f"p{percent}", [float(np.percentile(times, percent)) for times in took_ms], "ms")
    report.row("rate", [1e3 / statistics.median(times) for times in took_ms], "chunks/s")
    report.note(
        f"{options.rounds} rounds of {options.steps} inferences on {device}; normalisation, network, actions in "
        f"the robot's units, copied to the host; {options.height}x{options.width}."
    )
    report.finish(options)


def inference_times_ms(options: argparse.Namespace) -> tuple[list[list[float]], torch.device]:
    """(ms of --steps inferences, --rounds times; on which device): raw observation there to actions on the host."""
    cfg = common.config(options)
    world = train.detect_ddp()
    train.join_ddp(world, cfg.training.device)
    size = (options.height, options.width)
    policy = load_policy(common.random_checkpoint(cfg, options.out / "inference", size), world.device)
    observation = {k: v.to(world.device) for k, v in common.random_observation(cfg, size).items()}
    for _ in range(WARM_UP_INFERENCES):
        policy.predict_chunk(observation).cpu()
    took_ms = [
        [1e3 * common.seconds(lambda: policy.predict_chunk(observation).cpu()) for _ in range(options.steps)]
        for _ in range(options.rounds)
    ]
    shutil.rmtree(options.out / "inference")
    return took_ms, world.device


# -- saving -------------------------------------------------------------------------------------------------------


def saving(options: argparse.Namespace) -> None:
    """What a checkpoint costs the loop: how long it stands, and how much slower its thread is while one is written."""
    report = Report("saving")
    trainer = make_trainer(options, options.out / "saving", data__frames_on_device="never")
    trainer.train_step(synthetic_batch(trainer, options.batch_size))  # the optimizer has no state before
    trainer.pace, trainer.trackers = metrics.Pace(), trackers.Trackers(trackers.NoTracker(), trackers.NoTracker())
    small = torch.ones(64, device=trainer.world.device)

    def launch(goes_on: Callable[[], bool]) -> tuple[float, float]:
        """Small operations one by one, as a loop over a GPU launches them; -> (rate per s, longest pause in s)."""
        times_s = [time.perf_counter()]
        while len(times_s) == 1 or goes_on():
            for _ in range(20):
                small.add(1)
            times_s.append(time.perf_counter())
        return (len(times_s) - 1) / (times_s[-1] - times_s[0]), max(np.diff(times_s))

    def alone() -> float:
        until_s = time.perf_counter() + options.seconds
        return launch(lambda: time.perf_counter() < until_s)[0]

    def one() -> tuple[float, ...]:
        before = alone()
        with subprocess.Popen([sys.executable, "-c", COMPUTES]) as other:
            time.sleep(0.2)  # until it does
            beside = alone()
            other.kill()
        trainer.step += 1
        begin_s = time.perf_counter()
        stands_s = common.seconds(lambda: trainer._save(validate=False))
        rate, longest_s = launch(lambda: trainer.saver.busy)
        trainer.saver.wait()
        return stands_s, time.perf_counter() - begin_s, rate / before, rate / beside, longest_s

    one()  # fresh memory, where later copies find theirs
    stands_s, took_s, of_before, of_beside, longest_s = zip(*[one() for _ in range(options.rounds)], strict=True)
    report.row("the loop stands", stands_s, "s")
    report.row("longest pause of its thread while the checkpoint is written", [1e3 * s for s in longest_s], "ms")
    report.row("its speed meanwhile, to that before", of_before, "x")
    report.row("its speed meanwhile, to that beside another process that computes", of_beside, "x", at_least=0.95)
    report.row("until the checkpoint is there", took_s, "s")
    report.note(f"{trainer.parameters / 1e6:.1f} M parameters and AdamW's state, on {trainer.world.device}.")
    shutil.rmtree(trainer.output_dir)
    report.finish(options)


# -- the command --------------------------------------------------------------------------------------------------

STAGES: dict[str, Callable[[argparse.Namespace], None]] = {
    "ingest": ingest, "loader": loader, "step": step, "train": train_stage, "memory": memory, "saving": saving,
    "inference": inference,
}  # fmt: skip


def main(argv: Sequence[str] | None = None) -> int:
    """The command line; returns the exit status. A missed target is not an error: it is in the table."""
    parser = common.Parser(prog="python -m benchmarks.run", description="Measure each part of training.")
    add = parser.add_argument
    add("stages", nargs="*", metavar="STAGE", help=f"of {', '.join(STAGES)} (default: all)")
    common.add_options(parser)
    add("--seconds", type=float, default=3.0, help="loader: length of a measurement, s (default: %(default)s)")
    add(
        "--cache-gb", type=float, default=1.0, help="train: cache of the warm start, GB; 0: none (default: %(default)s)"
    )
    add("--peak-tflops", type=float, help="step: the chip's dense bf16 rate, to say the share that is reached")
    add("--largest-batch", action="store_true", help="step: also at the largest batch that fits (GPU only)")
    add(
        "--multiples", type=common.whole_number(1), nargs="+", default=[1, 2, 4, 8], metavar="N",
        help="memory: amounts of data, as multiples of the smallest (default: 1 2 4 8)",
    )  # fmt: skip
    options = parser.parse_args(argv)
    for name in options.stages:
        if name not in STAGES:
            near = difflib.get_close_matches(name, STAGES, 1, 0.5) or list(STAGES)
            parser.error(f"no stage {name}; did you mean {', '.join(near)}?")
    if options.largest_batch and not torch.cuda.is_available():
        parser.error("--largest-batch: found no CUDA GPU; on a CPU memory does not bound the batch")
    return common.run_stages(options, [STAGES[name] for name in options.stages or STAGES])


if __name__ == "__main__":
    sys.exit(main())
