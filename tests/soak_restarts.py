"""torchrun restarts a run whose rank dies; it must complete by itself with the exact weights, every time.

python -m tests.soak_restarts        # 5 x (two ranks, --max-restarts=3, one rank killed twice); about 6 minutes
"""

from __future__ import annotations

import argparse
import os
import random
import signal
import subprocess
import tempfile
import time
from pathlib import Path

from tests import soak_common as soak
from tests.test_ddp import ranks_of
from tests.tiny import ROOT, arguments, assert_same_run, torchrun, wait_for_step


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--times", type=int, default=5)
    times = parser.parse_args().times
    rng, began = random.Random(0), time.monotonic()
    settings = {"training__steps": 60, "training__log_freq": 1, "training__save_freq": 4}
    with tempfile.TemporaryDirectory() as folder:
        bags = soak.sample_bags(Path(folder))
        undisturbed = Path(folder) / "undisturbed"
        launch(bags, undisturbed, settings).communicate()
        for i in range(times):
            disturbed = Path(folder) / f"disturbed{i}"
            process = launch(bags, disturbed, settings, "--max-restarts=3")
            for step in (rng.randint(5, 20), rng.randint(30, 50)):
                wait_for_step(disturbed / "run", step, process)
                os.kill(rng.choice(ranks_of(process)), signal.SIGKILL)
                time.sleep(3)  # metrics.jsonl still shows the killed round until the next one has cut it back
            _, stderr = process.communicate(timeout=300)
            assert process.returncode == 0, stderr[-3000:]
            assert_same_run(disturbed / "run", undisturbed / "run")
            print(f"{i + 1}: killed twice, completed by itself, weights exact", flush=True)
    print(f"OK: {times} of {times}; {time.monotonic() - began:.0f} s")


def launch(bags: Path, folder: Path, settings: dict, *options: str) -> subprocess.Popen:
    command = [*torchrun(2, *options), str(ROOT / "train.py"), *arguments(bags, folder, ("--overwrite",), **settings)]
    return subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


if __name__ == "__main__":
    main()
