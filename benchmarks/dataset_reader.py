"""The evaluation's dataset reader on one long episode, beside LeRobot's own loader: frames per second and memory.

    python -m benchmarks.dataset_reader --lerobot-python .venv-lerobot-0.4.4/bin/python

Real LeRobot writes the dataset, once: one episode in AV1, as its recorder does. Then both read it in turn, each in a
process of its own that does nothing else: ours from the first frame to the last, LeRobot's LeRobotDataset item by item
over a part in the middle, because it opens and seeks the video for every item. Pixels of both are compared.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import subprocess
import sys
import time
import zlib
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

# This file also runs under LeRobot's interpreter, where nothing of ours is installed: ours is imported further down.

CAMERA = "color"
FPS = 30
COMPARED_EVERY = 10  # frames; each of these has to be the same for both
MIB = 1 << 20


def write(root: Path, frames: int, height: int, width: int) -> None:
    """Under LeRobot: an episode of `frames` in which a lit floor slides by and a box moves over it, with some noise."""
    import numpy as np
    from lerobot.datasets.lerobot_dataset import LeRobotDataset

    joints = {"dtype": "float32", "shape": (6,), "names": [f"joint_{j}" for j in range(6)]}
    image = {"dtype": "video", "shape": (height, width, 3), "names": ["height", "width", "channels"]}
    features = {"observation.state": joints, "action": joints, f"observation.images.{CAMERA}": image}
    dataset = LeRobotDataset.create("local/x", FPS, features, root=root, streaming_encoding=True)
    rng = np.random.default_rng(0)
    y, x = np.mgrid[:height, : 2 * width]
    floor = 90 + 60 * np.sin(x / 40)[..., None] * np.array([1.0, 0.7, 0.4]) + 40 * np.cos(y / 30)[..., None]
    noise = rng.normal(0, 4, (8, height, width, 1))
    for t in range(frames):
        left = t % width
        picture = floor[:, left : left + width] + noise[t % 8]
        top, side = int((height // 2) * (1 + np.sin(t / 50)) / 1.3), height // 6
        picture[top : top + side, width // 3 : width // 3 + side] = (200, 60, 50)
        state = np.sin(t / 100 + np.arange(6)).astype(np.float32)
        dataset.add_frame(
            {
                "observation.state": state,
                "action": state,
                "task": "slide",
                f"observation.images.{CAMERA}": picture.clip(0, 255).astype(np.uint8),
            }
        )
    dataset.save_episode()
    dataset.finalize()


def read_ours(root: Path, first: int, count: int) -> dict[str, Any]:
    """Under our interpreter: the whole episode, in order."""
    from ur10e_deploy.lerobot_dataset import LeRobotDatasetSource

    source = LeRobotDatasetSource(root)
    frames = source.frames(source.episode_indices()[0], first, first + count)
    return _measured((frame.index, lambda frame=frame: frame.images[CAMERA]) for frame in frames)


def read_lerobot(root: Path, first: int, count: int) -> dict[str, Any]:
    """Under LeRobot: one item after the other. Undoing its scaling to [0, 1] is timed for compared frames only."""
    import numpy as np
    from lerobot.datasets.lerobot_dataset import LeRobotDataset

    dataset = LeRobotDataset("local/x", root=root, video_backend="pyav")

    def pixels(item: dict[str, Any]) -> Any:
        image = item[f"observation.images.{CAMERA}"].numpy()
        return np.ascontiguousarray(np.rint(image * 255).astype(np.uint8).transpose(1, 2, 0))

    items = ((i, dataset[i]) for i in range(first, first + count))
    return _measured((i, lambda item=item: pixels(item)) for i, item in items)


def _measured(frames: Iterable[tuple[int, Callable[[], Any]]]) -> dict[str, Any]:
    """Run through the frames; -> how long it took and what memory this process had on the way."""
    began_s, count, early_rss, checks = time.perf_counter(), 0, 0, {}
    for index, pixels in frames:
        if index % COMPARED_EVERY == 0:
            checks[str(index)] = zlib.crc32(pixels())
        count += 1
        if count == 100:
            early_rss = _status("VmRSS")
    took_s = time.perf_counter() - began_s
    rss = {"early_rss": early_rss or _status("VmRSS"), "late_rss": _status("VmRSS"), "peak_rss": _status("VmHWM")}
    return {"frames": count, "seconds": took_s, "checks": checks, **rss}


def _status(field: str) -> int:
    """Bytes, from the kernel's account of this process."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(1024 * int(line.split()[1]) for line in lines if line.startswith(f"{field}:"))


# -- the command, under our interpreter ---------------------------------------------------------------------------


def dataset_reader(options: argparse.Namespace) -> None:
    """The evaluation's dataset reader beside LeRobot's own loader, on one long episode."""
    from benchmarks import common

    report = common.Report("dataset_reader")
    root = options.out / f"lerobot-episode-{options.frames}x{options.height}x{options.width}"
    if not (root / "written").exists():
        common.say(f"  writing {options.frames} frames with LeRobot (once)")
        shutil.rmtree(root, ignore_errors=True)
        _child(options.lerobot_python, "write", root, options.frames, options.height, options.width)
        (root / "written").touch()
    count = min(options.lerobot_frames, options.frames)
    first = (options.frames - count) // 2
    measures = {
        "ours": lambda: _child(Path(sys.executable), "read_ours", root, 0, options.frames),
        "LeRobot": lambda: _child(options.lerobot_python, "read_lerobot", root, first, count),
    }
    results = common.alternate(options.rounds, measures)
    ours, theirs = results["ours"], results["LeRobot"]
    different = [i for i, check in theirs[0]["checks"].items() if ours[0]["checks"][i] != check]
    if different:
        raise common.BenchmarkError(f"frames {', '.join(different)}: the two read other pixels; nothing to compare")
    speed = {name: [r["frames"] / r["seconds"] for r in rounds] for name, rounds in results.items()}
    for name, rounds in results.items():
        report.row(f"{name}: speed", speed[name], "frames/s")
        report.row(f"{name}: memory after 100 frames", [r["early_rss"] / MIB for r in rounds], "MiB")
        report.row(f"{name}: memory after the last", [r["late_rss"] / MIB for r in rounds], "MiB")
        report.row(f"{name}: peak memory", [r["peak_rss"] / MIB for r in rounds], "MiB")
    report.ratio("speed of ours to LeRobot's", speed["ours"], speed["LeRobot"])
    report.ratio(
        "memory of ours, after the last frame to after 100",
        [r["late_rss"] for r in ours],
        [r["early_rss"] for r in ours],
        at_most=1.05,
    )
    size_mb = sum(file.stat().st_size for file in root.glob("videos/**/*.mp4")) / 1e6
    report.note(
        f"One episode of {options.frames} frames of {options.height}x{options.width}, AV1, {size_mb:.0f} MB; LeRobot "
        f"reads {count} of them, from {first} on, with its pyav decoder. {len(theirs[0]['checks'])} frames were "
        "compared: equal. Memory is resident size (VmRSS, VmHWM), the interpreter and its libraries included."
    )
    report.finish(options)


def _child(python: Path, job: str, *arguments: object) -> dict[str, Any]:
    """Run one of the jobs above in a process of its own; -> what it measured.

    Raises BenchmarkError with its last words when it fails.
    """
    from benchmarks import common

    command = [str(python), __file__, job, *map(str, arguments)]
    path = os.pathsep.join([str(common.ROOT), str(common.ROOT / "deploy")]) if job == "read_ours" else ""
    env = {**os.environ, "PYTHONPATH": path, "HF_HUB_OFFLINE": "1", "SVT_LOG": "1"}
    result = subprocess.run(command, env=env, capture_output=True, text=True)
    if result.returncode:
        raise common.BenchmarkError(f"{job} under {python} failed: {common.last_words(result.stderr)}")
    return json.loads(result.stdout.splitlines()[-1]) if job != "write" else {}


def main(argv: Sequence[str] | None = None) -> int:
    """The command line; returns the exit status. A missed target is not an error: it is in the table."""
    from benchmarks import common

    parser = common.Parser(
        prog="python -m benchmarks.dataset_reader", description="Our dataset reader beside LeRobot's."
    )
    add, whole = parser.add_argument, common.whole_number
    add("--lerobot-python", type=Path, required=True, help="the interpreter of an environment with lerobot 0.4.4")
    add("--out", type=Path, default=Path("outputs/benchmarks"), help="dataset and results (default: %(default)s)")
    add("--frames", type=whole(10), default=10_000, help="length of the episode (default: %(default)s)")
    add("--lerobot-frames", type=whole(1), default=500, help="frames that LeRobot reads (default: %(default)s)")
    add("--height", type=whole(16), default=480, help="of the images, pixels (default: %(default)s)")
    add("--width", type=whole(16), default=640, help="of the images, pixels (default: %(default)s)")
    add("--rounds", type=whole(1), default=5, help="how often each measurement is taken (default: %(default)s)")
    options = parser.parse_args(argv)
    options.bags = None
    options.lerobot_python = options.lerobot_python.absolute()  # not resolved: a venv's python is a link
    return common.run_stages(options, [dataset_reader])


if __name__ == "__main__":
    jobs = {"write": write, "read_ours": read_ours, "read_lerobot": read_lerobot}
    if len(sys.argv) > 2 and sys.argv[1] in jobs:
        print(json.dumps(jobs[sys.argv[1]](Path(sys.argv[2]), *map(int, sys.argv[3:]))))
    else:
        sys.exit(main())
