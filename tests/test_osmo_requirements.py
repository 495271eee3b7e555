"""install-requirements.sh with the real pip, in environments of its own, on packages that are made here.

What both images really hold is tested in tests/test_osmo_images.py.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

from tests.osmo_task import WORKFLOWS

PACKAGES = {  # (name, version): what it needs
    ("torch", "2.8.0a0"): ["filelock"],
    ("torchvision", "0.22"): ["torch", "numpy"],
    ("filelock", "3.1"): [],
    ("filelock", "4.0"): [],
    ("numpy", "1.26.4"): [],
    ("numpy", "2.4"): [],
    ("opencv", "4.11"): ["numpy>=1.21"],
    ("opencv", "5.0"): ["numpy>=2"],
    ("rosbags", "0.10"): ["numpy", "lz4"],
    ("rosbags", "0.11"): ["numpy", "lz4"],
    ("rosbags", "0.12"): ["numpy", "lz4"],
    ("lz4", "1.0"): [],
    ("lz4", "1.1"): [],
    ("wandb", "0.30"): [],
    ("wandb", "0.31"): [],
}
PROJECT = """
[project]
dependencies = ["torch>=2.6", "opencv>=4.5", "rosbags>=0.10", "numpy>=1.26"]
[project.optional-dependencies]
wandb = ["wandb>=0.17"]
azure = ["azure-identity"]
"""
CONSTRAINTS = """torch==2.13.0
torchvision==0.28
filelock==4.0
numpy==2.2 ; python_full_version < '3.10'
numpy==2.4 ; python_full_version >= '3.10'
opencv==5.0
rosbags==0.11
lz4==1.0
wandb==0.30
"""


@pytest.fixture(scope="module")
def wheels(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a wheel of each of PACKAGES."""
    folder = tmp_path_factory.mktemp("wheels")
    for (name, version), needs in PACKAGES.items():
        with zipfile.ZipFile(folder / f"{name}-{version}-py3-none-any.whl", "w") as wheel:
            info = f"{name}-{version}.dist-info"
            lines = [
                f"Metadata-Version: 2.1\nName: {name}\nVersion: {version}",
                *(f"Requires-Dist: {n}" for n in needs),
            ]
            wheel.writestr(f"{info}/METADATA", "\n".join(lines) + "\n")
            wheel.writestr(
                f"{info}/WHEEL", "Wheel-Version: 1.0\nGenerator: test\nRoot-Is-Purelib: true\nTag: py3-none-any\n"
            )
            wheel.writestr(f"{info}/RECORD", "")
    return folder


@pytest.fixture(scope="module")
def empty(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("empty") / "venv"
    subprocess.run([sys.executable, "-m", "venv", str(folder)], check=True)
    return folder


def install(empty: Path, wheels: Path, folder: Path, base: dict[str, str], constraint: str) -> tuple[int, str, dict]:
    """Run the script in an environment that holds `base`; -> (exit code, what it printed, name -> version after)."""
    python = folder / "venv" / "bin" / "python3"
    shutil.copytree(empty, folder / "venv", symlinks=True)
    environment = {k: v for k, v in os.environ.items() if not k.startswith(("PIP_", "PYTHON", "VIRTUAL"))}
    environment |= {
        "PIP_NO_INDEX": "1", "PIP_FIND_LINKS": str(wheels), "PIP_DISABLE_PIP_VERSION_CHECK": "1",
        "PATH": f"{python.parent}:{os.environ['PATH']}",
    }  # fmt: skip
    words = [f"{name}=={version}" for name, version in base.items()]
    subprocess.run([python, "-m", "pip", "install", "--quiet", "--no-deps", *words], env=environment, check=True)
    build = folder / "build"
    build.mkdir()
    (build / "pyproject.toml").write_text(PROJECT)
    (build / "constraints.txt").write_text(CONSTRAINTS)
    shutil.copy(WORKFLOWS / "install-requirements.sh", build)
    (folder / "constraint.txt").write_text(constraint)
    as_in_the_image = environment | {"PIP_CONSTRAINT": str(folder / "constraint.txt")}
    done = subprocess.run(
        [build / "install-requirements.sh", "wandb"], env=as_in_the_image, stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT, text=True, timeout=120,
    )  # fmt: skip
    listed = subprocess.run(
        [python, "-m", "pip", "list", "--format=freeze"], env=environment, capture_output=True, text=True, check=True
    ).stdout
    found = dict(line.split("==") for line in listed.splitlines())
    return done.returncode, done.stdout, {name: v for name, v in found.items() if name not in ("pip", "setuptools")}


TORCH = {"torch": "2.8.0a0", "torchvision": "0.22", "filelock": "3.1"}


def test_the_pins_are_installed(empty: Path, wheels: Path, tmp_path: Path):
    """Not the newest that a range allows; torch and what it needs stay as they are."""
    code, printed, found = install(empty, wheels, tmp_path, TORCH, "")
    assert code == 0, printed
    assert found == TORCH | {"numpy": "2.4", "opencv": "5.0", "rosbags": "0.11", "lz4": "1.0", "wandb": "0.30"}
    assert "note:" not in printed


def test_what_the_base_image_pins_stays(empty: Path, wheels: Path, tmp_path: Path):
    """As NVIDIA's numpy, which rules out the OpenCV that is pinned: that one is another version, which is said."""
    base = TORCH | {"numpy": "1.26.4"}
    code, printed, found = install(empty, wheels, tmp_path, base, "numpy==1.26.4\n# a remark\nlz4==1.1\n")
    assert code == 0, printed
    assert found == base | {"opencv": "4.11", "rosbags": "0.11", "lz4": "1.1", "wandb": "0.30"}
    notes = [line for line in printed.splitlines() if line.startswith("note:")]
    assert notes == ["note: opencv is not installed as pinned: 5.0 needs numpy>=2, the base image has 1.26.4"]
