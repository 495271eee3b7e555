"""Damage bags in every way at random and read them: each is read, or refused with a BagError of one line.

    python -m tests.soak_fuzz                      # 12,000 mutated bags, about 4 minutes on one core
    python -m tests.soak_fuzz --count 100000 --seed 1

Kinds of damage: bytes flipped, blocks overwritten, cut, repeated or moved, the file truncated, metadata.yaml damaged;
and valid bags of nonsense: messages reordered, time stamps wild, CDR payloads damaged. A case that takes longer than
20 s, another exception, or memory beyond 1 GiB fails the run and keeps the bag.
"""

from __future__ import annotations

import argparse
import collections
import itertools
import resource
import shutil
import signal
import struct
import tempfile
import time
import traceback
from pathlib import Path

import numpy as np
from rosbags.rosbag2 import StoragePlugin, Writer
from tqdm import tqdm

from rosbag_dataset import BagError, compute_stats, find_bags, read_bag, synchronise
from tests import bags
from tests.test_video import stream

SOURCES = {  # name -> (storage, compression, header stamps, pictures)
    "sqlite3": ("sqlite3", "none", "receive", "raw"),
    "sqlite3, zstd messages": ("sqlite3", "message", "receive", "raw"),
    "sqlite3, zstd file": ("sqlite3", "file", "receive", "raw"),
    "mcap": ("mcap", "none", "header", "raw"),
    "mcap, zstd chunks": ("mcap", "storage", "receive", "raw"),
    "mcap, jpeg": ("mcap", "none", "receive", "jpeg"),
    "mcap, h264": ("mcap", "none", "receive", "h264"),
    "sqlite3, hevc": ("sqlite3", "none", "header", "hevc"),
    "mcap, av1": ("mcap", "none", "receive", "av1"),
}


def messages(pictures: str) -> list[bags.Message]:
    take = bags.make_take(seconds=0.4, size=(12, 16))
    if pictures == "raw":
        return take.messages()
    packets = itertools.cycle(stream(pictures)) if pictures != "jpeg" else None
    made = []
    for i, (topic, t, message) in enumerate(take.messages()):
        if topic == bags.CAMERA_TOPIC and packets:
            message = bags.compressed_video(t, next(packets)[0], pictures)
        elif topic == bags.CAMERA_TOPIC:
            message = bags.compressed(t, bags.encode(take.images[i % 8], ".jpg"))
        made.append((topic, t, message))
    return made


def damage_bytes(content: bytes, rng: np.random.Generator) -> bytes:
    """A few random edits of a file's bytes."""
    data = bytearray(content)
    for _ in range(rng.integers(1, 4)):
        at, size = int(rng.integers(len(data))), int(rng.integers(1, 200))
        match rng.integers(6):
            case 0:
                data[at] ^= 1 << int(rng.integers(8))
            case 1:
                data[at : at + size] = rng.bytes(size)
            case 2:
                del data[at : at + size]
            case 3:
                data[at:at] = data[at : at + size]
            case 4:  # a length field full of ones, or a huge one
                value = int(rng.choice([0, 0xFFFFFFFF, 0x7FFFFFFF, 1 << 20]))
                data[at : at + 4] = struct.pack("<I", value)
            case 5:
                del data[max(1, at) :]
        if not data:
            break
    return bytes(data)


def nonsense(path: Path, source: list[bags.Message], storage: str, rng: np.random.Generator) -> None:
    """A whole bag with wild contents: order, receive stamps, payloads."""
    store = bags.STORE
    writer = Writer(path, version=9, storage_plugin=StoragePlugin[storage.upper()])
    order = rng.permutation(len(source)) if rng.random() < 0.5 else np.arange(len(source))
    wild = rng.random() < 0.6
    with writer:
        links = {}
        for i in order:
            topic, time_ns, message = source[i]
            kind = message.__msgtype__
            if topic not in links:
                links[topic] = writer.add_connection(topic, kind, typestore=store)
            raw = bytes(store.serialize_cdr(message, kind))
            if rng.random() < 0.05:
                raw = damage_bytes(raw, rng)
            if wild and rng.random() < 0.3:
                time_ns = int(rng.choice([0, time_ns // 2, time_ns + 10**12, 2**62, int(rng.integers(2**63 - 1))]))
            writer.write(links[topic], time_ns, raw)


def read(folder: Path, time_source: str) -> str:
    """Everything the trainer does with a bag, short of the cache; -> "read" or the refusal."""
    settings = bags.settings(folder, time_source=time_source)
    try:
        for bag in find_bags(folder):
            bag.content_hash()
            recording = read_bag(bag, settings, lambda camera, image: None)
            episode = synchronise(bag.name, recording, settings)
            compute_stats([episode], "imagenet", 8)
        return "read"
    except BagError as error:
        assert "\n" not in str(error), error
        return str(error)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--count", type=int, default=12_000)
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    rng = np.random.default_rng(args.seed)
    # A hang or a memory hog must end as a failure: SIGALRM raises in the case, and memory is capped.
    signal.signal(signal.SIGALRM, lambda *_: (_ for _ in ()).throw(TimeoutError("20 s")))
    resource.setrlimit(resource.RLIMIT_AS, (6 << 30, 6 << 30))
    outcomes: collections.Counter[str] = collections.Counter()
    slowest_s, began = 0.0, time.monotonic()
    with tempfile.TemporaryDirectory() as temporary:
        originals = {}
        for name, (storage, compression, _, pictures) in SOURCES.items():
            path = Path(temporary) / "originals" / name.replace(" ", "").replace(",", "-") / "bag"
            originals[name] = bags.write_bag(path, messages(pictures), storage, compression)
            assert read(path.parent, SOURCES[name][2]) == "read", "undamaged, it must be read"
        before_kib = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        for i in tqdm(range(args.count), unit="bag"):
            name = list(SOURCES)[i % len(SOURCES)]
            storage, _, time_source, pictures = SOURCES[name]
            folder = Path(temporary) / "case"
            shutil.rmtree(folder, ignore_errors=True)
            if rng.random() < 0.3:
                folder.mkdir()
                nonsense(folder / "bag", messages(pictures), storage, rng)
            else:
                shutil.copytree(originals[name], folder / "bag")
                files = sorted(p for p in (folder / "bag").iterdir())
                target = files[0] if rng.random() < 0.15 else next(f for f in files if f.name != "metadata.yaml")
                target.write_bytes(damage_bytes(target.read_bytes(), rng))
            case_began = time.monotonic()
            signal.alarm(20)
            try:
                outcome = read(folder, time_source)
            except BaseException:
                kept = Path(tempfile.mkdtemp(prefix="fuzz-")) / "bag"
                shutil.copytree(folder, kept)
                traceback.print_exc()
                raise SystemExit(f"FAILED: case {i} of seed {args.seed}, {name}; the bag is in {kept}") from None
            finally:
                signal.alarm(0)
            slowest_s = max(slowest_s, time.monotonic() - case_began)
            outcomes["read" if outcome == "read" else "refused"] += 1
        grown_mib = (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before_kib) / 1024
    if grown_mib > 1024:
        raise SystemExit(f"FAILED: memory grew by {grown_mib:.0f} MiB")
    print(
        f"OK: {args.count} bags, {outcomes['read']} read, {outcomes['refused']} refused in one line, nothing else; "
        f"slowest {slowest_s:.2f} s, memory grew by {grown_mib:.0f} MiB; {time.monotonic() - began:.0f} s"
    )


if __name__ == "__main__":
    main()
