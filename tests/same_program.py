"""Does this tree train exactly as another commit does? python -m tests.same_program COMMIT

For changes that must not change what is learned (files moved, functions split): both trees train 20 steps of the demo
in float32 on the same bags, from one thread; each then forgets its last checkpoint and resumes; and this tree resumes
the other's checkpoint on the other's frame cache, which it must not decode again. The SHA-256 of model.safetensors
and every line of metrics.jsonl have to be equal, speeds aside. Prints a Markdown table; exit code 1 on a difference.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

from tests.tiny import ROOT

SPEEDS = {"samples_per_s", "samples_per_s_wall", "data_wait_fraction"}  # of metrics.jsonl: what no two runs share
STEPS, HALF = 20, 10


def train(tree: Path, bags: Path, cache: Path, output: Path, flag: str) -> str:
    """Train the demo's model in `tree`; -> what it printed. Ends this program if training fails."""
    settings = {
        "data.bag_dir": bags,
        "data.cache_dir": cache,
        "training.output_dir": output,
        "training.precision": "fp32",
        "training.device": "cpu",
        "training.steps": STEPS,
        "training.save_freq": HALF,
        "training.log_freq": 1,
        "training.warmup_steps": 4,
    }
    command = [sys.executable, "train.py", "--config", "sim/demo.yaml", flag]
    command += [f"--override={name}={value}" for name, value in settings.items()]
    done = subprocess.run(
        command, cwd=tree, env={**os.environ, "OMP_NUM_THREADS": "1"}, stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
        text=True,
    )  # fmt: skip
    if done.returncode:
        sys.exit(f"{tree}: {done.stdout}")
    return done.stdout


def forget_second_half(output: Path) -> None:
    """Leave what a run had when it was killed after step 10, and lines of metrics that a resume has to cut."""
    shutil.rmtree(output / f"checkpoint_{STEPS:06d}")
    for link in ("last", "best"):
        (output / link).unlink(missing_ok=True)
        (output / link).symlink_to(f"checkpoint_{HALF:06d}")


def result(output: Path) -> tuple[str, str]:
    """-> SHA-256 of the weights at the last step, and of the metrics without speeds."""
    weights = (output / f"checkpoint_{STEPS:06d}/pretrained_model/model.safetensors").read_bytes()
    lines = [json.loads(line) for line in (output / "metrics.jsonl").read_text().splitlines()]
    metrics = json.dumps([{k: v for k, v in line.items() if k not in SPEEDS} for line in lines])
    return hashlib.sha256(weights).hexdigest(), hashlib.sha256(metrics.encode()).hexdigest()


def main() -> int:
    """Entry of `python -m tests.same_program`."""
    parser = argparse.ArgumentParser(description="Compare what this tree and another commit train, to the last bit.")
    parser.add_argument("commit", help="what to compare with, as git names it")
    commit = parser.parse_args().commit
    results: dict[str, tuple[str, str]] = {}
    with tempfile.TemporaryDirectory() as folder:
        work, other = Path(folder), Path(folder) / "other"
        subprocess.run(["git", "worktree", "add", "--quiet", "--detach", other, commit], cwd=ROOT, check=True)
        try:
            record = [sys.executable, "-m", "sim.record", f"--out={work / 'bags'}", "--episodes=8", "--seed=1"]
            subprocess.run([*record, "--storage=mcap", "--height=240", "--width=320"], cwd=ROOT, check=True)
            for name, tree in ((commit, other), ("this tree", ROOT)):
                cache, output = work / f"cache {name}", work / f"run {name}"
                train(tree, work / "bags", cache, output, "--overwrite")
                results[f"{name}, {STEPS} steps"] = result(output)
                if tree is other:
                    shutil.copytree(output, work / "taken up", symlinks=True)
                forget_second_half(output)
                train(tree, work / "bags", cache, output, "--resume")
                results[f"{name}, {HALF} steps and a resume"] = result(output)
            forget_second_half(work / "taken up")
            printed = train(ROOT, work / "bags", work / f"cache {commit}", work / "taken up", "--resume")
            results[f"this tree, from {commit}'s checkpoint and frame cache"] = result(work / "taken up")
        finally:
            subprocess.run(["git", "worktree", "remove", "--force", other], cwd=ROOT, check=True)
    print("| Run | SHA-256 of model.safetensors | of metrics.jsonl without speeds |\n|---|---|---|")
    for name, (weights, metrics) in results.items():
        print(f"| {name} | `{weights[:16]}` | `{metrics[:16]}` |")
    same = len(set(results.values())) == 1
    decoded = "decoding" in printed
    print(
        "equal" if same else "DIFFERENT", "; the other's frame cache was", "DECODED AGAIN" if decoded else "used as is"
    )
    return 0 if same and not decoded else 1


if __name__ == "__main__":
    sys.exit(main())
