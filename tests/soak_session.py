"""A session of three hours in one bag: 100 demonstrations, cut, trained on and evaluated. python -m tests.soak_session

Joints at 500 Hz, one camera at 30 Hz, an arm that rests between demonstrations, which data.episodes: still separates;
pictures of 32x48 pixels, so that it is the frames that are many and not the bytes. Prints what each program took: time,
and the peak of the memory of all its processes (what the kernel cannot drop: anonymous and shared).
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

import numpy as np
from rosbags.rosbag2 import StoragePlugin, Writer

from benchmarks.run import memory_bytes, processes_below
from tests.bags import CAMERA_TOPIC, JOINT_TOPIC, STORE, T0_NS, image, joint_state, moving_in
from tests.tiny import ROOT, arguments

REST_S, SIZE, FPS = 12.0, (32, 48), 30


def write_session(path: Path, demonstrations: int, each_s: float, joint_hz: float) -> None:
    """The bag: every demonstration begins at rest and ends at rest, REST_S apart."""
    stretches = [(REST_S + i * (each_s + REST_S), (i + 1) * (each_s + REST_S)) for i in range(demonstrations)]
    seconds = stretches[-1][1] + REST_S
    path_of = moving_in(*stretches)

    def messages() -> Iterator[tuple[str, int, object]]:
        background = np.random.default_rng(0).integers(0, 100, (*SIZE, 3), np.uint8)
        for minute in range(int(seconds // 60) + 1):
            span = (minute * 60.0, min(seconds, minute * 60.0 + 60.0))
            joint_s, camera_s = (np.arange(*np.ceil(np.array(span) * hz)) / hz for hz in (joint_hz, FPS))
            joints, poses = path_of(joint_s), path_of(camera_s)
            for t, q in zip(joint_s, joints, strict=True):
                yield JOINT_TOPIC, int(t * 1e9), joint_state(T0_NS + int(t * 1e9), q)
            for t, q in zip(camera_s, poses, strict=True):
                picture = background.copy()
                row, column = (int((np.sin(q[i]) + 1) / 2 * (SIZE[i] - 8)) for i in range(2))
                picture[row : row + 8, column : column + 8] = 255
                yield CAMERA_TOPIC, int(t * 1e9), image(T0_NS + int(t * 1e9), picture)

    with Writer(path, version=9, storage_plugin=StoragePlugin.MCAP) as writer:
        links = {}
        for topic, later_ns, message in messages():
            kind = message.__msgtype__
            if topic not in links:
                links[topic] = writer.add_connection(topic, kind, typestore=STORE)
            writer.write(links[topic], T0_NS + later_ns, STORE.serialize_cdr(message, kind))


def watched(command: list[str]) -> tuple[float, float, str]:
    """Run a program; -> (seconds, peak memory in MB, what it printed). Ends this one if it fails."""
    with tempfile.TemporaryFile("w+") as output:
        began_s, peak = time.monotonic(), 0
        process = subprocess.Popen(command, cwd=ROOT, stdout=output, stderr=subprocess.STDOUT)
        while process.poll() is None:
            peak = max(peak, memory_bytes(processes_below(process.pid))["RSS minus page cache"])
            time.sleep(0.2)
        output.seek(0)
        printed = output.read()
    if process.returncode:
        sys.exit(f"{' '.join(command)[:200]}: exit code {process.returncode}\n{printed[-3000:]}")
    return time.monotonic() - began_s, peak / 1e6, printed


def main() -> int:
    """Entry of `python -m tests.soak_session`."""
    parser = argparse.ArgumentParser(description="Record, cut, train and evaluate a long session.")
    parser.add_argument("--demonstrations", type=int, default=100)
    parser.add_argument("--each-s", type=float, default=96.0, help="how long a demonstration is")
    parser.add_argument("--joint-hz", type=float, default=500.0)
    parser.add_argument("--steps", type=int, default=200)
    args = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="session-") as name:
        folder = Path(name)
        began_s = time.monotonic()
        (folder / "bags").mkdir()
        write_session(folder / "bags" / "session", args.demonstrations, args.each_s, args.joint_hz)
        size = sum(file.stat().st_size for file in (folder / "bags").rglob("*") if file.is_file())
        print(f"the bag: {size / 1e6:.0f} MB, written in {time.monotonic() - began_s:.0f} s", flush=True)
        settings = {
            "conventions__image_resize": "null", "data__episodes": "still", "data__episode_pause_s": 3,
            "training__steps": args.steps, "training__save_freq": args.steps, "training__log_freq": 50,
        }  # fmt: skip
        train = [sys.executable, str(ROOT / "train.py"), *arguments(folder / "bags", folder, **settings)]
        evaluate = [sys.executable, "-m", "ur10e_deploy.offline_eval", "--bags", str(folder / "bags"), "--checkpoint"]
        evaluate += [str(folder / "run"), "--device", "cpu", "--backend", "native", "--output", str(folder / "eval")]
        done = {"train.py, nothing cached": watched(train), "train.py once more": watched([*train, "--overwrite"])}
        done["evaluation of the held-out ones"] = watched(evaluate)
        report = json.loads((folder / "run/sync_report.json").read_text())
        evaluated = json.loads((folder / "eval/summary.json").read_text())
        frames = sum(episode["frames"] for episode in report["episodes"])
        assert len(report["episodes"]) == args.demonstrations, [e["episode"] for e in report["episodes"]]
        assert [e["name"] for e in evaluated["episodes"]] == report["held_out"] and report["held_out"]
        print(f"{len(report['episodes'])} episodes of {frames} frames, {len(report['held_out'])} held out\n")
        print("| Program | s | peak memory, MB |\n|---|---|---|")
        for program, (took_s, peak_mb, _) in done.items():
            print(f"| {program} | {took_s:.0f} | {peak_mb:.0f} |")
    return 0


if __name__ == "__main__":
    sys.exit(main())
