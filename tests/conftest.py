"""What several test files share: sample bags of the simulated UR10e, recorded once per test run."""

from __future__ import annotations

import fcntl
import os
from pathlib import Path

os.environ["OMP_NUM_THREADS"] = "1"  # before torch: two pytest workers share two cores

import pytest  # noqa: E402

from sim.record import record  # noqa: E402


@pytest.fixture(scope="session")
def sample_bags(tmp_path_factory: pytest.TempPathFactory, worker_id: str) -> Path:
    """A folder with six short episodes of the simulated UR10e at 96x128, the same for all pytest workers."""
    base = tmp_path_factory.getbasetemp()
    folder = (base if worker_id == "master" else base.parent) / "sample-bags"
    with folder.with_suffix(".lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not (folder / "recording.json").exists():
            record(folder, episodes=6, seed=7, storage="mcap", height=96, width=128)
    return folder
