"""Run reference.py's jobs under LeRobot 0.4.4, once per test run."""

import json
import os
import subprocess
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.once import once

ROOT = Path(__file__).resolve().parents[2]
PYTHON = Path(os.environ.get("LEROBOT_044_PYTHON", ROOT / ".venv-lerobot-0.4.4" / "bin" / "python"))


def run_once(tmp_path_factory, name: str, prepare: Callable[[Path], list]) -> Path:
    """Have `prepare(folder)` write inputs and return jobs, run them, and return the folder they ran in."""
    if not PYTHON.exists():
        pytest.fail(f"no LeRobot 0.4.4 at {PYTHON}: `make test` creates it (or set LEROBOT_044_PYTHON)", pytrace=False)

    def make(folder: Path) -> None:
        (folder / "jobs.json").write_text(json.dumps(prepare(folder)))
        command = [str(PYTHON), str(Path(__file__).with_name("reference.py")), str(folder)]
        subprocess.run(command, env={**os.environ, "PYTHONPATH": ""}, check=True, timeout=240)

    return once(tmp_path_factory, name, make)
