"""Would a sweep be cheaper if one task decoded the bags, and handed the frame cache over to all of its runs?

    python -m benchmarks.decode_once outputs/demo-bags --config sim/demo.yaml       # after make demo
    python -m benchmarks.decode_once my_bags --arms 6

Each run of a sweep decodes the bags itself, all at the same time, each on its own node. With one decoding task they
would wait for that task, for the upload of the cache, and for their download of it, which is as large as the decoded
frames. This decodes the bags into a fresh cache, on all cores, and computes both ways for some speeds of the network:
how long a run waits for its frames, and how many seconds of nodes all of them take together. What a run downloads
anyway, the bags, is in neither.
"""

from __future__ import annotations

import argparse
import dataclasses
import os
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path

from rosbag_dataset import load_episodes
from train import bag_settings, load_config

ROOT = Path(__file__).resolve().parent.parent
SPEEDS_MB_S = (100, 300, 1000)  # of one upload or download; 1 Gbit/s is 125 MB/s
MB = 1e6


def costs_s(decode_s: float, transfer_s: float, arms: int) -> dict[str, tuple[float, float]]:
    """(how long a run waits for its frames, seconds of all nodes together), both in s, of each way.

    Args:
        decode_s: decoding the bags on one node.
        transfer_s: one upload or one download of the cache.
        arms: the sweep's runs.
    """
    return {
        "each decodes": (decode_s, arms * decode_s),
        "one decodes": (decode_s + 2 * transfer_s, decode_s + (1 + arms) * transfer_s),
    }


def size_of(folder: Path) -> int:
    """Bytes of all files in a folder and below."""
    return sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())


def main(arguments: Sequence[str] | None = None) -> None:
    """Decode, and print a table."""
    parser = argparse.ArgumentParser(description="Seconds that decoding once would save a sweep, or cost it.")
    parser.add_argument("bags", type=Path, help="folder of bags")
    parser.add_argument("--config", type=Path, default=ROOT / "config.yaml", help="how to read them")
    parser.add_argument("--arms", type=int, default=6, help="runs of the sweep (default: 6)")
    args = parser.parse_args(arguments)
    with tempfile.TemporaryDirectory(prefix="decode-once-") as folder:
        settings = dataclasses.replace(
            bag_settings(load_config(args.config)), bag_dir=args.bags, cache_dir=Path(folder), frames="cache"
        )
        began_s = time.perf_counter()
        episodes, _ = load_episodes(settings, progress=False)
        decode_s, cache_mb = time.perf_counter() - began_s, size_of(Path(folder)) / MB
    frames = sum(len(episode.time_ns) for episode in episodes)
    print(
        f"{len(episodes)} bags of {size_of(args.bags) / MB:,.0f} MB: {frames:,} frames decoded in {decode_s:.1f} s on "
        f"{os.cpu_count()} cores, a cache of {cache_mb:,.0f} MB ({cache_mb / decode_s:,.0f} MB/s)\n"
    )
    print(f"| {args.arms} runs, network | each decodes: wait, all nodes | one decodes: wait, all nodes | saved |")
    print("|---|---|---|---|")
    for speed in SPEEDS_MB_S:
        (wait, every), (wait_once, once) = costs_s(decode_s, cache_mb / speed, args.arms).values()
        print(
            f"| {speed} MB/s | {wait:.0f} s, {every:.0f} s | {wait_once:.0f} s, {once:.0f} s | {every - once:.0f} s |"
        )


if __name__ == "__main__":
    main()
