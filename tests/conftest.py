"""What several test files share: sample bags of the simulated UR10e, recorded once per test run."""

from __future__ import annotations

import os
from pathlib import Path

os.environ["OMP_NUM_THREADS"] = "1"  # before torch: two pytest workers share two cores

import pytest  # noqa: E402

from sim.record import record  # noqa: E402
from tests.once import once  # noqa: E402


@pytest.fixture(scope="session")
def sample_bags(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with six short episodes of the simulated UR10e at 96x128, the same for all pytest workers."""

    def make(folder: Path) -> None:
        record(folder / "bags", episodes=6, seed=7, storage="mcap", height=96, width=128)

    return once(tmp_path_factory, "sample", make) / "bags"
