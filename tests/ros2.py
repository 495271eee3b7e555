"""ROS 2 for tests: rclpy's wheels in .ros2/, loopback only, and sim.ros2_arm in a process of its own.

    with Arm(tmp_path, "--lock-step") as arm:
        run_in_ros2(["-m", "tests.ros2_runner", ...], arm.domain)
        arm.stop(); arm.log(0)["command_rad"]

    python -m tests.ros2 .venv/bin/python -m sim.ros2_arm      # a command in that environment, for a person

The wheels (`make .ros2/installed`) are built for Python 3.11 on x86-64, and lie beside the environment that the tests
run in: numpy and all else comes from there.
"""

from __future__ import annotations

import os
import platform
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from tests.checks import ROOT

ROS2 = Path(os.environ.get("ROS2_PACKAGES", ROOT / ".ros2"))  # tests/mutants.py names a checkout's
INSTALLED = (ROS2 / "installed").exists()
WHEELS_EXIST = sys.version_info[:2] == (3, 11) and platform.machine() == "x86_64"
# CI has them where they exist: there a test that cannot run fails.
needs_ros2 = pytest.mark.skipif(
    not INSTALLED and not (WHEELS_EXIST and os.environ.get("CI")),
    reason="no rclpy: `make .ros2/installed` gets it where wheels exist (Python 3.11, x86-64)",
)


def own_domain() -> int:
    """A ROS_DOMAIN_ID that other test runs on this machine do not have, with some luck; above 101 ports may collide."""
    return 1 + os.getpid() % 101


def environment(domain: int) -> dict[str, str]:
    """What sourcing ROS 2's setup file would set, for the wheels; and that nobody else is talked to."""
    libraries = [ROS2 / "lib", *sorted(ROS2.glob("ros_*.libs"))]
    modules = [ROOT, ROOT / "deploy", ROS2 / "lib/python3.11/site-packages", ROS2]
    return os.environ | {
        "PYTHONPATH": os.pathsep.join(map(str, modules)),
        "LD_LIBRARY_PATH": os.pathsep.join(map(str, libraries)),
        "AMENT_PREFIX_PATH": str(ROS2),
        "RMW_IMPLEMENTATION": "rmw_fastrtps_cpp",
        "ROS_AUTOMATIC_DISCOVERY_RANGE": "LOCALHOST",
        "FASTDDS_BUILTIN_TRANSPORTS": "UDPv4",  # who is killed leaves no shared memory behind
        "ROS_DOMAIN_ID": str(domain),
        "ROS_LOG_DIR": str(ROS2 / "log"),
        "OMP_NUM_THREADS": "1",
    }


def start_in_ros2(arguments: list[str], domain: int, **how: object) -> subprocess.Popen[str]:
    """A Python program in that environment, its output in a pipe."""
    return subprocess.Popen(  # ty: ignore[no-matching-overload]
        [sys.executable, *arguments], cwd=ROOT, env=environment(domain), text=True, stdout=subprocess.PIPE, **how
    )


class Arm:
    """sim.ros2_arm as a context manager; its log is there after stop().

    Args:
        folder: for its log.
        options: of its command line.
    """

    def __init__(self, folder: Path, *options: str) -> None:
        self.folder, self.domain = folder, own_domain()
        self._options = ["-m", "sim.ros2_arm", "--log", str(folder), *options]

    def __enter__(self) -> Arm:
        self._process = start_in_ros2(self._options, self.domain)
        assert self._process.stdout is not None
        said = self._process.stdout.readline()
        assert said == "ready\n", f"sim.ros2_arm: {said}{self._process.stdout.read()}"
        return self

    def __exit__(self, *exception: object) -> None:
        self.stop()

    def stop(self) -> None:
        """End it; its log is complete."""
        self._process.terminate()
        assert self._process.wait(20) == 0

    def log(self, scene: int) -> dict[str, np.ndarray]:
        """What it wrote of a scene: see the head of sim/ros2_arm.py."""
        with np.load(self.folder / f"scene_{scene:03d}.npz") as file:
            return dict(file)


if __name__ == "__main__":
    if not INSTALLED:
        sys.exit("error: no .ros2/: `make .ros2/installed` gets rclpy, for Python 3.11 on x86-64")
    domain = int(os.environ.get("ROS_DOMAIN_ID", own_domain()))
    os.execvpe(sys.argv[1], sys.argv[1:], environment(domain))
