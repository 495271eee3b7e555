"""Run this folder's scripts under LeRobot 0.4.4, in one process for all tests of a worker (preloaded.py)."""

import functools
import json
import os
import subprocess
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path

import pytest

from tests.once import once

ROOT = Path(__file__).resolve().parents[2]
PYTHON = Path(os.environ.get("LEROBOT_044_PYTHON", ROOT / ".venv-lerobot-0.4.4" / "bin" / "python"))
HERE = Path(__file__).parent


@functools.cache
def _preloaded() -> subprocess.Popen:
    """It ends when this process does, which closes its stdin."""
    if not PYTHON.exists():
        pytest.fail(f"no LeRobot 0.4.4 at {PYTHON}: `make test` creates it (or set LEROBOT_044_PYTHON)", pytrace=False)
    return subprocess.Popen(
        [PYTHON, HERE / "preloaded.py"], env={**os.environ, "PYTHONPATH": ""}, stdin=subprocess.PIPE,
        stdout=subprocess.PIPE, text=True,
    )  # fmt: skip


def run_script(script: str, *arguments: object, path: Sequence[Path] = ()) -> None:
    """Run a script of this folder, with modules from `path` too; fails the test with what it printed when it fails."""
    server = _preloaded()
    with tempfile.NamedTemporaryFile("r", prefix="lerobot-") as log:
        asked = dict(script=str(HERE / script), arguments=[*map(str, arguments)], path=[*map(str, path)], log=log.name)
        server.stdin.write(json.dumps(asked) + "\n")
        server.stdin.flush()
        code = server.stdout.readline()
        assert code == "0\n", f"{script}: exit code {code}{log.read()[-3000:]}"


def version() -> str:
    """Of the LeRobot in that environment: 0.4.4, unless LEROBOT_044_PYTHON names another (tests/with_lerobot.py)."""
    (folder,) = (PYTHON.parents[1] / "lib").glob("python3*/site-packages/lerobot-*.dist-info")
    return folder.name.split("-")[1].removesuffix(".dist")


def run_once(tmp_path_factory, name: str, prepare: Callable[[Path], list]) -> Path:
    """Have `prepare(folder)` write inputs and return reference.py's jobs, run them once per test run; -> the folder."""

    def make(folder: Path) -> None:
        (folder / "jobs.json").write_text(json.dumps(prepare(folder)))
        run_script("reference.py", folder)

    return once(tmp_path_factory, name, make)
