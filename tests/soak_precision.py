"""Does bfloat16 train the same policy? The demo over three seeds, in fp32 and in bf16: the last validation L1 of each.

    make demo && .venv/bin/python -m tests.soak_precision         # six runs, about 15 minutes on 2 cores

Exit code 0 if bf16's mean is within 2 % of fp32's, or differs by less than the seeds do. The seed also chooses the
held-out episodes, so that the pairs of one seed are what is comparable best.
"""

from __future__ import annotations

import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from tests.tiny import ROOT, metrics

SEEDS = (1, 2, 3)


def last_validation_l1(folder: Path, precision: str, seed: int) -> float:
    """Train the demo; -> L1 on the held-out episodes, normalised units."""
    settings = {"precision": precision, "seed": seed, "output_dir": folder / f"{precision}-{seed}"}
    overrides = [f"--override=training.{name}={value}" for name, value in settings.items()]
    command = [sys.executable, "train.py", "--config", "sim/demo.yaml", *overrides]
    subprocess.run(command, cwd=ROOT, check=True, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    return metrics(settings["output_dir"], "val_l1_loss")[-1]["val_l1_loss"]


def main() -> None:
    began = time.monotonic()
    l1: dict[str, list[float]] = {"fp32": [], "bf16": []}
    with tempfile.TemporaryDirectory() as folder:
        for seed in SEEDS:
            for precision, values in l1.items():
                values.append(last_validation_l1(Path(folder), precision, seed))
            full, half = l1["fp32"][-1], l1["bf16"][-1]
            print(f"seed {seed}: fp32 {full:.4f}, bf16 {half:.4f} ({half / full - 1:+.1%})", flush=True)
    full, half = (statistics.mean(values) for values in l1.values())
    spread = max(l1["fp32"]) - min(l1["fp32"])
    print(
        f"mean: fp32 {full:.4f}, bf16 {half:.4f} ({half / full - 1:+.1%}); fp32's seeds differ by {spread:.4f} "
        f"({spread / full:.1%}); {time.monotonic() - began:.0f} s"
    )
    assert abs(half - full) <= max(0.02 * full, spread), "bf16 trains another policy than fp32"
    print("OK")


if __name__ == "__main__":
    main()
