"""What several test files share: sample bags of the simulated UR10e, recorded once per test run; a small disk."""

from __future__ import annotations

import os
import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path

os.environ["OMP_NUM_THREADS"] = "1"  # before torch: two pytest workers share two cores

import pytest  # noqa: E402

from sim.record import record  # noqa: E402
from tests.bags import make_take, write_bag  # noqa: E402
from tests.checks import TAKE  # noqa: E402
from tests.mlflow_server import MlflowServer  # noqa: E402
from tests.once import once  # noqa: E402


@pytest.fixture(scope="session")
def sample_bags(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with six short episodes of the simulated UR10e at 96x128, the same for all pytest workers.

    SAMPLE_BAGS, where it is set, names a folder that has them already (tests/mutants.py runs pytest a hundred times).
    """

    def make(folder: Path) -> None:
        if recorded := os.environ.get("SAMPLE_BAGS"):
            shutil.copytree(recorded, folder / "bags")
            return
        record(folder / "bags", episodes=6, seed=7, storage="mcap", height=96, width=128)

    return once(tmp_path_factory, "sample", make) / "bags"


@pytest.fixture(scope="session")
def running_mlflow(tmp_path_factory: pytest.TempPathFactory) -> Iterator[MlflowServer]:
    """An MLflow server, for tests with the mark xdist_group("mlflow"), of which one worker runs all."""
    with MlflowServer(tmp_path_factory.mktemp("mlflow")) as server:
        yield server


@pytest.fixture
def mlflow_server(running_mlflow: MlflowServer, monkeypatch: pytest.MonkeyPatch) -> MlflowServer:
    """The same, with the name and the password that it asks for in this test's environment."""
    for name, value in running_mlflow.credentials.items():
        monkeypatch.setenv(name, value)
    return running_mlflow


@pytest.fixture
def bag_dir(tmp_path: Path) -> Path:
    """A folder with two bags, one of each storage."""
    write_bag(tmp_path / "bags" / "a", TAKE.messages())
    write_bag(tmp_path / "bags" / "b", make_take(seconds=0.4, seed=1).messages(), "mcap")
    return tmp_path / "bags"


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A disk of 1 MiB."""
    disk = tmp_path / "disk"
    disk.mkdir()
    done = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=1m", "none", disk], capture_output=True)
    if done.returncode:
        pytest.skip("mounting needs root")
    yield disk
    subprocess.run(["umount", "--lazy", disk], check=True)
