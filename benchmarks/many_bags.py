"""How a start grows with the number of bags and of frames: time of each stage, memory, and what a worker is sent.

    python -m benchmarks.many_bags 200 2000                         # bags of a second, decoded first
    python -m benchmarks.many_bags 1000 10000 --frames 5400         # entries of three minutes: 54 million frames

Each measurement is a process of its own that does what a rank of train.py does before its first step, less torch and
the model: once on an empty cache (cold), then twice more (warm; the last one counts). Bags of a second are written by
rosbags, with 125 Hz joints and 30 small images. With --frames nothing is decoded: the cache is given entries whose
pixels are holes in a file, and bags of a few bytes that nobody opens; cold is then synchronising.
"""

from __future__ import annotations

import json
import pickle
import shutil
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import yaml

import rosbag_dataset
from benchmarks import common
from rosbag_dataset import (
    ChunkDataset,
    angle_references,
    cache_key,
    compute_stats,
    data_notes,
    find_bags,
    load_episodes,
    refer_angles,
    split_episodes,
    sync_table,
)
from tests.bags import CAMERA_TOPIC, JOINT_TOPIC, T0_NS, make_take, settings, smooth_path, write_bag
from training.feed import SampleStream

SIZE = (32, 48)  # of the images, pixels
TAKES = 50  # that are made up; bags beyond take one of them at another time
CHUNK = 100


def write_short_bags(folder: Path, count: int) -> None:
    """So many bags of a second, each with a start of its own."""
    take = make_take(seconds=1.0, size=SIZE)
    for i in range(count):
        later_ns = i * 10**10
        messages = [(topic, time_ns + later_ns, message) for topic, time_ns, message in take.messages()]
        write_bag(folder / "bags" / f"bag_{i:05d}", messages)


def write_entries(folder: Path, count: int, frames: int) -> None:
    """So many bags that are no more than a name, with an entry of so many frames each in the cache."""
    wanted = settings(folder / "bags")
    topics = [{"topic_metadata": {"name": t}, "message_count": frames} for t in (JOINT_TOPIC, CAMERA_TOPIC)]
    said = {"relative_file_paths": ["bag.mcap"], "compression_mode": "", "topics_with_message_count": topics}
    metadata = yaml.safe_dump({"rosbag2_bagfile_information": said})
    times_ns = T0_NS + np.rint(np.arange(frames) * (1e9 / 30)).astype(np.int64)
    paths = [smooth_path(np.arange(frames) / 30 + i) for i in range(TAKES)]
    for i in range(count):
        bag = folder / "bags" / f"bag_{i:05d}"
        bag.mkdir(parents=True)
        (bag / "metadata.yaml").write_text(metadata)
        (bag / "bag.mcap").write_text(str(i))
    for i, bag in enumerate(find_bags(folder / "bags")):
        entry = wanted.cache_dir / cache_key(bag, bag.content_hash(), wanted)
        entry.mkdir(parents=True)
        later_ns = times_ns + i * 10**13
        np.save(entry / "joint_time_ns.npy", later_ns)
        np.save(entry / "joint_rad.npy", paths[i % TAKES])
        np.save(entry / "color.time_ns.npy", later_ns)
        with (entry / "color.rgb").open("wb") as pixels:
            pixels.truncate(frames * SIZE[0] * SIZE[1] * 3)
        meta = {"bag": bag.name, "image_shape": {"color": SIZE}, "source_shape": {"color": SIZE}}
        (entry / "meta.json").write_text(json.dumps(meta | {"first_image": {"color": f"{i:064x}"}}))


def start(folder: Path) -> dict[str, float]:
    """A rank's start, less torch and the model: seconds of each stage, and sizes."""
    figures: dict[str, float] = {}

    def timed(name: str, work: Callable[..., Any]) -> Callable[..., Any]:
        def run(*args: Any, **options: Any) -> Any:
            before_s, cpu_before_s = time.perf_counter(), time.process_time()
            try:
                return work(*args, **options)
            finally:
                figures[name] = figures.get(name, 0.0) + time.perf_counter() - before_s
                if name == "loading, s":
                    figures["loading, s of this process's CPU"] = time.process_time() - cpu_before_s

        return run

    wanted, began_s = settings(folder / "bags"), time.perf_counter()
    stages = {"find_bags": "finding bags, s", "build_entries": "decoding, s", "kept_episodes": "episodes, s"}
    for function, name in stages.items():
        setattr(rosbag_dataset.episodes, function, timed(name, getattr(rosbag_dataset.episodes, function)))
    loaded, _ = timed("loading, s", load_episodes)(wanted, progress=False)
    figures["hashes and keys, s"] = figures["loading, s"] - sum(figures.get(name, 0.0) for name in stages.values())
    training, held_out = split_episodes(loaded, 0.1, 0)
    references = timed("where angles are wrapped, s", angle_references)(training)

    def refer() -> None:
        for episode in loaded:
            refer_angles(episode, references, wanted)

    timed("wrapping, s", refer)()
    timed("statistics, s", compute_stats)(training, "imagenet", CHUNK)
    dataset = timed("samples, s", ChunkDataset)(training, CHUNK)
    ChunkDataset(held_out, CHUNK)

    def report() -> None:
        reports = [episode.sync_report for episode in loaded]
        json.dumps(reports, indent=2)
        "\n".join([sync_table(reports), *data_notes(loaded, CHUNK, wanted)])

    timed("report and notes, s", report)()
    stream = SampleStream(len(dataset), 8, 0, 1, 0)
    timed("order and a batch, s", lambda: dataset.__getitems__(next(iter(stream))))()
    figures["all of it, s"] = time.perf_counter() - began_s
    figures["all of it and imports, s of this process's CPU"] = time.process_time()
    figures["sent to a worker, MB"] = len(pickle.dumps(dataset)) / 1e6
    status = dict(line.split(":", 1) for line in Path("/proc/self/status").read_text().splitlines())
    for name, key in (("peak memory, MB", "VmHWM"), ("memory less files, MB", "RssAnon")):
        figures[name] = int(status[key].split()[0]) * 1024 / 1e6
    figures["frames"] = sum(len(episode.time_ns) for episode in loaded)
    return figures


def measure(folder: Path) -> dict[str, float]:
    """start(), in a process of its own. Raises BenchmarkError when it fails."""
    command = [sys.executable, "-m", "benchmarks.many_bags", "--start", folder]
    done = subprocess.run(command, cwd=common.ROOT, capture_output=True, text=True)
    if done.returncode:
        raise common.BenchmarkError(f"a start over {folder}: {common.last_words(done.stderr)}")
    return json.loads(done.stdout.splitlines()[-1])


def main(argv: Sequence[str] | None = None) -> int:
    """Measure, print a table, write OUT/many_bags.json; returns the exit status."""
    parser = common.Parser(prog="python -m benchmarks.many_bags", description="How a start grows with the bags.")
    add = parser.add_argument
    add("counts", type=common.whole_number(1), nargs="*", default=[200, 2000], help="numbers of bags")
    add("--frames", type=common.whole_number(2), help="entries of so many frames, and nothing to decode")
    add("--out", type=Path, default=Path("outputs/benchmarks"), help="bags, caches and results (default: %(default)s)")
    add("--start", type=Path, help="measure in this process, on the bags in here, and print JSON (for itself)")
    parser.set_defaults(bags=None)
    options = parser.parse_args(argv)
    if options.start:
        print(json.dumps(start(options.start)))
        return 0

    def many_bags(options: Any) -> None:
        """Starts over generated bags."""
        report = common.Report("many_bags")
        for count in options.counts:
            folder = options.out / "many-bags"
            shutil.rmtree(folder, ignore_errors=True)
            common.say(f"  {count} bags")
            if options.frames:
                write_entries(folder, count, options.frames)
            else:
                write_short_bags(folder, count)
            time.sleep(2.1)  # bags that were changed just now are not known again: bags.SETTLED_NS
            cold, _, warm = (measure(folder) for _ in range(3))
            for name, figures in (("cold", cold), ("warm", warm)):
                for stage, value in figures.items():
                    what, _, unit = stage.partition(", ")
                    target = {"at_most": 3.0} if (name, what, count) == ("warm", "loading", 2000) else {}
                    report.row(f"{count} bags, {name}: {what}", [value], unit, **target)
            shutil.rmtree(folder)
        report.finish(options)

    return common.run_stages(options, [many_bags])


if __name__ == "__main__":
    sys.exit(main())
