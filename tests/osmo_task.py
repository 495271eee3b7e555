"""A task of a workflow run as OSMO runs it: its own command, on the folders of its pod, with nothing but its files.

    box = TaskBox(tmp_path / "node-0", task, inputs={0: bags})     # task: from osmo_spec.place()
    done = box.run()                                               # its command, verbatim; exit code, output

The command sees a file system of its own (a mount namespace and a chroot): /workspace with the injected files only,
/osmo/data/input/N laid out as OSMO downloads each kind of input, the command `osmo` (osmo_data.py) at the end of PATH,
and empty /osmo/data/output, /data and /output, which stay between runs of the same box, as in a pod that is restarted
in place. Everything else is this machine's.
"""

from __future__ import annotations

import os
import re
import shutil
import signal
import subprocess
import sys
import sysconfig
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from rosbag_dataset import load_episodes, open_pixels
from tests import osmo_data
from tests.azurite import NODE_BIN
from tests.bags import settings
from tests.lerobot_044.launch import ROOT, run_script

WORKFLOWS = ROOT / "osmo"
RUN_DIR, OUTPUT = "output/train-rosbag-act", "osmo/data/output"  # below a box's folder

# mount a new root at $1, give it this machine's top level and the box's own folders ($2), and become the command
ENTER = r"""
set -euo pipefail
root=$1 box=$2
shift 2
mount -t tmpfs tmpfs "$root"
for path in /*; do
  name=${path#/}
  if [ -L "$path" ]; then cp -P "$path" "$root/$name"; continue; fi
  [ -d "$path" ] || continue
  case $name in workspace | osmo | data | output | lost+found) continue ;; esac
  mkdir "$root/$name"
  mount --rbind "$path" "$root/$name"
done
for name in workspace osmo data output; do
  mkdir "$root/$name"
  mount --bind "$box/$name" "$root/$name"
done
[ ! -e "$box/hosts" ] || mount --bind "$box/hosts" "$root/etc/hosts"
[ -z "$SHM_MIB" ] || mount -t tmpfs -o "size=${SHM_MIB}m" tmpfs "$root/dev/shm"
# installed in development mode, our modules could be imported from anywhere: the task must not see that
for path in "$SITE_PACKAGES"/__editable__*.pth; do
  [ ! -e "$path" ] || mount --bind /dev/null "$root$path"
done
exec chroot "$root" /usr/bin/env -C /workspace -u SHM_MIB -u SITE_PACKAGES "$@"
"""


def unavailable(*programs: str) -> str | None:
    """Why boxes cannot run here, or None."""
    if os.geteuid() != 0:
        return "not root: mount and network namespaces need it (CI runs these tests)"
    missing = [p for p in ("unshare", "chroot", *programs) if not (shutil.which(p) or (NODE_BIN / p).exists())]
    return f"not installed: {', '.join(missing)}; `make test` installs them on Debian as root" if missing else None


def require(*programs: str) -> None:
    """Skip, saying why, where boxes cannot run; in CI that is a failure."""
    if reason := unavailable(*programs):
        (pytest.fail if os.environ.get("CI") else pytest.skip)(reason)


def tiny(**changes: object) -> str:
    """What --set takes to make a run small: overrides=..., with changes given as training__steps=4."""
    from tests.tiny import TINY  # with torch, without which tests/osmo_cluster.py does

    settings = {**TINY, **{name.replace("__", "."): value for name, value in changes.items()}}
    return "overrides=" + " ".join(f"{name}={value}".replace(" ", "") for name, value in settings.items())


class TaskBox:
    """One task on one node. `inputs` are the folders that its inputs come from, by number; in the folder `storage` is
    what its storage url holds. `memory`: what its cgroup says is in use, and is the limit."""

    def __init__(
        self,
        folder: Path,
        task: dict[str, Any],
        inputs: dict[int, Path] | None = None,
        network: str | None = None,
        hosts: dict[str, str] | None = None,
        shm_mib: int | None = 512,
        storage: Path | None = None,
        memory: tuple[int, int] | None = None,
        **environment: str,
    ) -> None:
        self.folder, self.task, self._network = folder, task, network
        self._processes: list[subprocess.Popen] = []
        for name in ("workspace", "osmo/data/input", "osmo/data/output", "data", "output"):
            (folder / name).mkdir(parents=True, exist_ok=True)
        for file in task["files"]:
            path = folder / file["path"].lstrip("/")
            path.parent.mkdir(parents=True, exist_ok=True)  # as the container runtime makes mount points
            path.write_text(file["contents"], encoding="utf-8")
            path.chmod(0o644)  # OSMO sets no exec bit
        osmo_data.install(folder / "osmo/usr/bin")
        self.storage = storage or folder / "storage"
        self.use_memory(*(memory or (1, 100)))
        for number, source in enumerate(task.get("inputs", [])):
            place_input(folder / f"osmo/data/input/{number}", source, (inputs or {})[number])
        if hosts:
            lines = [f"{address} {name}" for name, address in hosts.items()]
            (folder / "hosts").write_text("\n".join(["127.0.0.1 localhost", *lines]) + "\n")
        bins = f"{Path(sys.executable).parent}:{NODE_BIN}"
        self._environment = {
            "PATH": f"{bins}:/usr/local/bin:/usr/bin:/bin:/usr/sbin:/sbin:/osmo/usr/bin",
            "OSMO_STORAGE": str(self.storage),
            "CGROUP_DIR": str(folder / "cgroup"),
            "HOME": os.environ.get("HOME", "/root"),
            "OMP_NUM_THREADS": "1",
            "SHM_MIB": str(shm_mib or ""),
            "SITE_PACKAGES": str(Path(sysconfig.get_paths()["purelib"]).resolve()),  # .venv may be a link
            **task.get("environment", {}),
            **environment,
        }

    @property
    def run_dir(self) -> Path:
        """The trainer's output directory, where this test can see it."""
        return self.folder / RUN_DIR

    @property
    def delivered(self) -> Path:
        """{{output}}: what OSMO would upload."""
        return self.folder / OUTPUT

    @property
    def stored(self) -> Path:
        """What its storage url holds of its run: the input that the next attempt gets."""
        (url,) = (word.partition("=")[2] for word in self.task["args"] if word.startswith("--upload-to="))
        return self.storage / url.partition("://")[2]

    def use_memory(self, used: int, limit: int, kills: int = 0) -> None:
        """What the box's cgroup, of version 2, says from now on."""
        write_cgroup(self.folder / "cgroup", used, limit, kills=kills)

    def log(self) -> str:
        """All that the runs have printed so far."""
        path = self.folder / "log.txt"
        return path.read_text(errors="replace") if path.exists() else ""

    def start(self) -> subprocess.Popen:
        """Start the task's command in a process group of its own, as osmo_exec does; its output goes to log()."""
        root = self.folder / "root"
        root.mkdir(exist_ok=True)
        enter = ["unshare", "--mount", "--propagation", "private", "bash", "-c", ENTER, "enter", root, self.folder]
        if self._network:
            enter = ["ip", "netns", "exec", self._network, *enter]
        command = [*map(str, enter), *self.task["command"], *self.task.get("args", [])]
        with (self.folder / "log.txt").open("ab") as log:
            process = subprocess.Popen(
                command, env=self._environment, stdin=subprocess.DEVNULL, stdout=log, stderr=log, start_new_session=True
            )
        self._processes.append(process)
        return process

    def wait(self, process: subprocess.Popen, timeout_s: float = 120) -> int:
        """The command's exit code."""
        try:
            return process.wait(timeout_s)
        except subprocess.TimeoutExpired:
            self.lose()
            raise AssertionError(f"{self.folder.name} still runs after {timeout_s} s:\n{self.log()[-3000:]}") from None

    def run(self, timeout_s: float = 120) -> int:
        """Start it, wait, and return its exit code."""
        return self.wait(self.start(), timeout_s)

    def wait_for(self, text_or_path: str | Path, timeout_s: float = 90) -> None:
        """Until the log holds a text, or a path exists (with * in its name: any such path)."""
        end = time.monotonic() + timeout_s
        while time.monotonic() < end:
            if isinstance(text_or_path, str):
                if text_or_path in self.log():
                    return
            elif any(text_or_path.parent.glob(text_or_path.name)):
                return
            assert any(p.poll() is None for p in self._processes), f"ended early:\n{self.log()[-3000:]}"
            time.sleep(0.05)
        raise AssertionError(f"{text_or_path} did not come:\n{self.log()[-3000:]}")

    def kill(self) -> None:
        """SIGKILL to the command's process group: how OSMO restarts a command in its pod. What has left the group, as
        torchrun's ranks have, lives on."""
        for process in self._processes:
            try:
                os.killpg(process.pid, signal.SIGKILL)
            except ProcessLookupError:
                continue
            process.wait()

    def lose(self) -> None:
        """SIGKILL to all that runs in the box: the node is gone."""
        for folder in Path("/proc").iterdir():
            try:
                if folder.name.isdigit() and os.readlink(folder / "root") == str(self.folder / "root"):
                    os.kill(int(folder.name), signal.SIGKILL)
            except OSError:
                continue  # it ended by itself
        for process in self._processes:
            process.wait()


def add_image(box: TaskBox) -> None:
    """What Dockerfile.eval copies into its image, for a task that has that image; another's files are injected."""
    if "act-eval" not in box.task["image"]:
        return
    lines = (WORKFLOWS / "Dockerfile.eval").read_text().splitlines()
    for *sources, target in (line.split()[1:] for line in lines if line.startswith("COPY") and "/workspace" in line):
        for source in sources:
            path = WORKFLOWS.parent / source
            if path.is_dir():
                shutil.copytree(path, box.folder / target[1:], ignore=shutil.ignore_patterns("__pycache__"))
            else:
                shutil.copy(path, box.folder / target[1:])


def place_input(target: Path, source: dict[str, Any], folder: Path) -> None:
    """Download `folder` as OSMO does this kind of input. A dataset was uploaded by `osmo dataset upload NAME FOLDER`,
    and lies in a folder named after it, below that in one named like FOLDER (see real_osmo.py). A `regex` chooses files
    by their path below the url or the dataset."""
    regex = source.get("dataset", source).get("regex", "")
    if "dataset" in source:
        target = target / source["dataset"]["name"].partition(":")[0] / folder.name  # the tag is not in it

    def not_asked_for(path: str, names: list[str]) -> set[str]:
        below = Path(path).relative_to(folder.parent if "dataset" in source else folder)
        files = {name for name in names if not Path(path, name).is_dir()}
        return {name for name in files if not re.match(regex, (below / name).as_posix())}

    target.parent.mkdir(parents=True, exist_ok=True)
    shutil.copytree(folder, target, symlinks=False, dirs_exist_ok=True, ignore=not_asked_for)


def write_cgroup(folder: Path, used: int, limit: int | None, cache: int = 0, kills: int = 0, v1: bool = False) -> None:
    """The files of a memory cgroup, of version 2 or 1: bytes in use, file cache beside, limit, processes killed."""
    folder = folder / "memory" if v1 else folder
    folder.mkdir(parents=True, exist_ok=True)
    if v1:
        none, prefix = 9223372036854771712, "total_"
        names = ("memory.usage_in_bytes", "memory.limit_in_bytes", "memory.oom_control")
    else:
        none, prefix, names = "max", "", ("memory.current", "memory.max", "memory.events")
    stat = f"anon {used}\n{prefix}inactive_file {cache // 2}\n{prefix}active_file {cache - cache // 2}\n"
    content = {
        names[0]: used + cache,
        names[1]: limit or none,
        names[2]: f"oom 0\noom_kill {kills}",
        "memory.stat": stat,
    }
    for name, text in content.items():
        partial = folder / f".{name}"
        partial.write_text(f"{text}\n")
        partial.replace(folder / name)


def write_evaluation_dataset(bags: Path, folder: Path, episodes: int, frames: int) -> Path:
    """The first frames of some recorded episodes as a LeRobot v3 dataset, by real LeRobot 0.4.4; -> its folder."""
    recorded, _ = load_episodes(settings(bags, folder / "cache"), workers=1, progress=False)
    arrays: dict[str, np.ndarray] = {}
    for number, episode in enumerate(recorded[:episodes]):
        kept = np.flatnonzero(episode.action_stop > np.arange(len(episode.time_ns)))[:frames]
        arrays[f"state_{number}"], arrays[f"action_{number}"] = episode.state[kept], episode.action[kept]
        arrays[f"color_{number}"] = open_pixels(episode, "color")[episode.image_index["color"][kept]]
    np.savez(folder / "episodes.npz", **arrays)
    target = folder / "my-lerobot-dataset"
    run_script("osmo_dataset.py", folder / "episodes.npz", target)
    for path in target.rglob("*"):  # OSMO downloads files that every user may read; LeRobot's videos are not such
        path.chmod(path.stat().st_mode | 0o444)
    return target
