"""The tests that hold us to real LeRobot, under another LeRobot than 0.4.4: `make test-lerobot-0.6`.

    python -m tests.with_lerobot .venv-lerobot-0.6/bin/python [PYTEST OPTIONS]

Our checkpoints are loaded by it and give our actions, its own ones run in our runner, the datasets that it writes (AV1,
H.264, MPEG-4, images) are read equal, those that we export load in it and are equal, and its lerobot-train goes on from
our checkpoint on one of them. Not a part of `make test`, because LeRobot 0.5 and newer need Python 3.12.
"""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
TESTS = {
    "test_lerobot_files.py": (
        "test_lerobot_acts_on_our_checkpoint_as_we_do", "test_we_act_on_lerobots_own_checkpoint_as_it_does",
    ),
    "test_act_parity.py": ("test_same_actions_loss_and_gradients",),
    "test_deploy_policy.py": (
        "test_our_runner_under_lerobot_044_gives_the_same_actions",
        "test_lerobots_own_checkpoints_act_as_that_lerobot_acts",
    ),
    "test_deploy_dataset.py": ("test_every_frame_equals_what_lerobot_reads",),
    "test_exporting.py": (
        "test_lerobot_reads_the_frames_that_a_training_has", "test_our_own_reader_reads_what_lerobot_reads",
        "test_a_gap_and_a_sidecar_begin_another_episode", "test_statistics_are_those_that_lerobot_computes",
        "test_lerobot_trains_on_it",
    ),
}  # fmt: skip
FACTS = (
    "import platform; from importlib.metadata import version as v; "
    "print(f\"LeRobot {v('lerobot')}, Python {platform.python_version()}, torch {v('torch')}, av {v('av')}, \""
    " f\"datasets {v('datasets')}\")"
)


def main(arguments: list[str]) -> int:
    if not arguments or not os.access(arguments[0], os.X_OK):
        print("error: expected the python of an environment with lerobot; make one with: make test-lerobot-0.6",
              file=sys.stderr)  # fmt: skip
        return 2
    python = Path(arguments[0]).absolute()  # not resolved: a venv's python is a link
    if code := subprocess.run([python, "-c", FACTS], env={**os.environ, "PYTHONPATH": ""}).returncode:
        return code
    command = [
        sys.executable, "-m", "pytest", *(f"tests/{file}::{test}" for file, tests in TESTS.items() for test in tests),
        "-k", "not 0.3.2]", "-v", "-p", "no:xdist", "--timeout=900", *arguments[1:],
    ]  # fmt: skip
    return subprocess.run(command, cwd=ROOT, env={**os.environ, "LEROBOT_044_PYTHON": str(python)}).returncode


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
