"""Run reference.py's jobs under LeRobot 0.4.4, once per test session although two xdist workers may ask for it."""

import fcntl
import json
import os
import subprocess
from collections.abc import Callable
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
PYTHON = Path(os.environ.get("LEROBOT_044_PYTHON", ROOT / ".venv-lerobot-0.4.4" / "bin" / "python"))


def run_once(tmp_path_factory, name: str, prepare: Callable[[Path], list]) -> Path:
    """Have `prepare(folder)` write inputs and return jobs, run them, and return the folder they ran in."""
    if not PYTHON.exists():
        pytest.fail(f"no LeRobot 0.4.4 at {PYTHON}: `make test` creates it (or set LEROBOT_044_PYTHON)", pytrace=False)
    base = tmp_path_factory.getbasetemp()
    # Under xdist every worker has a folder of its own, inside one that they share.
    shared = base.parent if os.environ.get("PYTEST_XDIST_WORKER") else base
    folder = shared / name
    with open(shared / f"{name}.lock", "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not (folder / "done").exists():
            folder.mkdir()
            (folder / "jobs.json").write_text(json.dumps(prepare(folder)))
            subprocess.run(
                [str(PYTHON), str(Path(__file__).with_name("reference.py")), str(folder)],
                env={**os.environ, "PYTHONPATH": ""},
                check=True,
                timeout=240,
            )
            (folder / "done").touch()
    return folder
