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


def version() -> str:
    """Of the LeRobot in that environment: 0.4.4, unless LEROBOT_044_PYTHON names another (tests/with_lerobot.py)."""
    (folder,) = (PYTHON.parents[1] / "lib").glob("python3*/site-packages/lerobot-*.dist-info")
    return folder.name.split("-")[1].removesuffix(".dist")


def run_once(tmp_path_factory, name: str, prepare: Callable[[Path], list]) -> Path:
    """Have `prepare(folder)` write inputs and return jobs, run them, and return the folder they ran in."""
    if not PYTHON.exists():
        pytest.fail(f"no LeRobot 0.4.4 at {PYTHON}: `make test` creates it (or set LEROBOT_044_PYTHON)", pytrace=False)

    def make(folder: Path) -> None:
        (folder / "jobs.json").write_text(json.dumps(prepare(folder)))
        command = [str(PYTHON), str(Path(__file__).with_name("reference.py")), str(folder)]
        subprocess.run(command, env={**os.environ, "PYTHONPATH": ""}, check=True, timeout=900)

    return once(tmp_path_factory, name, make)
