"""Training from pictures that stay in the bags (data.frames: bags), beside training from a copy of them (cache).

    python -m benchmarks.frames_in_place                                  # raw mcap, raw sqlite3, JPEG, all at 480x640
    python -m benchmarks.frames_in_place --kinds jpeg --height 480 --width 640

For each kind of recording: what is written on disk, the first start, the CPU time that a frame takes to load, and the
speed of training with the real network, its loader and its step, both ways in turn.
"""

from __future__ import annotations

import argparse
import resource
import shutil
import sys
import time
from collections.abc import Sequence
from pathlib import Path

import numpy as np

import train
from benchmarks import common
from benchmarks.common import Report
from benchmarks.run import make_trainer
from rosbag_dataset import ChunkDataset, Episode, load_episodes
from training import feed

KINDS = {"mcap": ("mcap", False), "sqlite3": ("sqlite3", False), "jpeg": ("mcap", True)}  # storage, JPEG
JPEG_TOPIC = "/camera/color/image_raw/compressed"
WARM_UP_STEPS = 5  # more than the batches that two workers load ahead: these cost the measured steps nothing
WAYS = ("cache", "bags")


def frames_in_place(options: argparse.Namespace) -> None:
    """Pictures in the bags beside a copy of them."""
    report = Report("frames_in_place")
    for kind in options.kinds:
        _compare(report, options, kind)
    report.note(
        f"Pictures of {options.bag_height}x{options.bag_width}, samples of {options.height}x{options.width}, batches "
        f"of {options.batch_size}, {options.workers} loader processes, {options.steps} steps a round. All files are in "
        "the page cache. CPU ms are those of the process that loads, one frame being a sample with one camera."
    )
    report.finish(options)


def _compare(report: Report, options: argparse.Namespace, kind: str) -> None:
    storage, jpeg = KINDS[kind]
    topic = {"data__camera_topic": JPEG_TOPIC} if jpeg else {}
    bag_dir = common.record_bags(options, storage, options.frames, jpeg)
    caches = {way: options.out / f"frames-{kind}-{way}" for way in WAYS}
    common.read_bags(bag_dir)

    def load(way: str) -> list[Episode]:
        settings = {"data__bag_dir": bag_dir, "data__cache_dir": caches[way], "data__frames": way, **topic}
        return load_episodes(train.bag_settings(common.config(options, **settings)), progress=False)[0]

    def first_start(way: str) -> float:
        shutil.rmtree(caches[way], ignore_errors=True)
        return common.seconds(lambda: load(way))

    starts = common.alternate(options.rounds, {way: lambda way=way: first_start(way) for way in WAYS})
    for way, times_s in starts.items():
        report.row(f"{kind}: first start, {way}", times_s, "s")
    for way, folder in caches.items():
        pixels = sum(file.stat().st_size for file in folder.rglob("*.rgb"))
        report.row(f"{kind}: pixels written, {way}", [pixels], "bytes")
        report.row(f"{kind}: all that is written, {way}", [size_of(folder)], "bytes")

    # Angles are not wrapped here, as training would: what a sample costs does not depend on it.
    datasets = {way: ChunkDataset(load(way), options.chunk) for way in WAYS}
    order = np.random.default_rng(common.SEED).permutation(len(datasets["bags"]))[: options.loaded].tolist()

    def cpu_ms(way: str) -> float:
        """Of one core, per frame, to load samples in random order; nothing else runs in this process."""
        begin_s = time.process_time()
        for first in range(0, len(order), options.batch_size):
            datasets[way].__getitems__(order[first : first + options.batch_size])
        return 1e3 * (time.process_time() - begin_s) / len(order)

    for way in WAYS:  # what is opened and made at the first frame's cost
        datasets[way].__getitems__(order[: options.batch_size])
    costs = common.alternate(options.rounds, {way: lambda way=way: cpu_ms(way) for way in WAYS})
    for way in WAYS:
        report.row(f"{kind}: loading a frame, {way}", costs[way], "CPU ms")
    report.ratio(f"{kind}: loading a frame, bags to cache", costs["bags"], costs["cache"])
    if not options.only_loading:
        trainer = make_trainer(
            options, options.out / f"frames-{kind}", bags=bag_dir, data__cache_dir=caches["cache"], **topic
        )
        _train(report, options, kind, trainer, datasets)
    report.note(f"{kind}: {len(datasets['bags'])} samples.")
    for folder in caches.values():
        shutil.rmtree(folder)


def _train(
    report: Report, options: argparse.Namespace, kind: str, trainer: train.Trainer, datasets: dict[str, ChunkDataset]
) -> None:
    """The trainer's loop, on either kind of samples in turn: its loader, the way of a batch to the device, its step."""

    def turn(way: str) -> tuple[float, float]:
        """(samples per s without the first steps; CPU s a sample, with them, of this process and the loader's)."""
        before_s = cpu_s()
        stream = feed.SampleStream(len(datasets[way]), options.batch_size, 0, 1, common.SEED)
        batches = iter(feed.make_loader(datasets[way], stream, options.workers, trainer.world.device))
        try:
            for _ in range(WARM_UP_STEPS):
                trainer.train_step(trainer.prepare(next(batches)))
            common.synchronize(trainer.world.device)
            begin_s = time.perf_counter()
            for _ in range(options.steps):
                trainer.train_step(trainer.prepare(next(batches)))
            common.synchronize(trainer.world.device)
            took_s = time.perf_counter() - begin_s
        finally:
            feed.end_loader(batches)
        of_all = (WARM_UP_STEPS + options.steps) * options.batch_size
        return options.steps * options.batch_size / took_s, (cpu_s() - before_s) / of_all

    turns = common.alternate(options.rounds, {way: lambda way=way: turn(way) for way in WAYS})
    rates, work = ({way: [one[i] for one in turns[way]] for way in WAYS} for i in (0, 1))
    for way in WAYS:
        report.row(f"{kind}: training, {way}", rates[way], "samples/s")
        report.row(f"{kind}: training by CPU time, {way}", work[way], "CPU s a sample")
    report.ratio(f"{kind}: speed of training, bags to cache", rates["bags"], rates["cache"], at_least=0.95)
    report.ratio(f"{kind}: the same by CPU time", work["cache"], work["bags"], at_least=0.95)
    report.note(f"{kind}: the network of {trainer.cfg.model.dim_model} and {trainer.precision}.")


def cpu_s() -> float:
    """CPU time of this process so far, and of its children that have ended."""
    of = [resource.getrusage(who) for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)]
    return sum(usage.ru_utime + usage.ru_stime for usage in of)


def size_of(folder: Path) -> int:
    """Bytes of all files below a folder."""
    return sum(file.stat().st_size for file in folder.rglob("*") if file.is_file())


def main(argv: Sequence[str] | None = None) -> int:
    """The command line; returns the exit status. A missed target is not an error: it is in the table."""
    parser = common.Parser(
        prog="python -m benchmarks.frames_in_place", description="Pictures in the bags beside a copy of them."
    )
    common.add_options(parser)
    add, whole = parser.add_argument, common.whole_number
    add("--kinds", nargs="+", choices=KINDS, default=list(KINDS), help="recordings to measure (default: all)")
    add("--workers", type=whole(0), default=2, help="processes that load samples (default: %(default)s)")
    add("--loaded", type=whole(1), default=500, help="frames of a measurement of CPU time (default: %(default)s)")
    add("--only-loading", action="store_true", help="leave out the training, which takes most of the time")
    options = parser.parse_args(argv)
    options.chunk = common.config(options).model.chunk_size
    return common.run_stages(options, [frames_in_place])


if __name__ == "__main__":
    sys.exit(main())
