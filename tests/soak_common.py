"""What the soak tests share: sample bags, a comparison to the last bit, and ranks that start fast.

Each run is a process of its own, forked from one that has imported torch already: a start costs a second instead of
eight, so that fifty kills fit in minutes. Nothing of torch but the store that torchrun would keep runs before the fork.
"""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

os.environ.setdefault("OMP_NUM_THREADS", "1")

import torch.distributed as dist  # noqa: E402

import train  # noqa: E402
from lerobot_checkpoint import list_checkpoints, load_policy, verify_checkpoint  # noqa: E402
from tests.tiny import ROOT, arguments  # noqa: E402

LONG = {
    "training__steps": 200,
    "training__log_freq": 1,
    "training__save_freq": 3,
    "training__keep_checkpoints": 3,
    "training__val_fraction": 0,
}


def sample_bags(folder: Path) -> Path:
    """Six short episodes below `folder`, and a frame cache beside them that every run shares.

    Recorded in another process: OpenCV's threads, once started in this one, would not survive the forks.
    """
    what = ["--episodes=6", "--seed=7", "--storage=mcap", "--height=96", "--width=128"]
    subprocess.run([sys.executable, "-m", "sim.record", f"--out={folder / 'bags'}", *what], check=True, cwd=ROOT)
    return folder / "bags"


class Run:
    """One start of the trainer, as one or several ranks."""

    def __init__(
        self, bags: Path, folder: Path, ranks: int, flags: tuple[str, ...] = ("--resume",), **settings
    ) -> None:
        self.output = folder / "run"
        self.log = folder / "log.txt"
        folder.mkdir(parents=True, exist_ok=True)
        argv = arguments(bags, folder, flags, **{**LONG, **settings})
        self._store = dist.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)  # torchrun's agent has it
        self.pids = [self._fork(argv, rank, ranks, str(self._store.port)) for rank in range(ranks)]

    def _fork(self, argv: list[str], rank: int, ranks: int, port: str) -> int:
        sys.stdout.flush()
        sys.stderr.flush()
        pid = os.fork()
        if pid:
            return pid
        code = 1
        try:
            log = os.open(self.log, os.O_CREAT | os.O_APPEND | os.O_WRONLY)
            os.dup2(log, 1)
            os.dup2(log, 2)
            if ranks > 1:
                os.environ.update(RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE=str(ranks))
                os.environ.update(GROUP_RANK="0", GROUP_WORLD_SIZE="1", MASTER_ADDR="127.0.0.1", MASTER_PORT=port)
                os.environ.update(TORCHELASTIC_USE_AGENT_STORE="True")
            code = train.main(argv)
        except BaseException:
            import traceback

            traceback.print_exc()
        finally:
            sys.stdout.flush()
            sys.stderr.flush()
            os._exit(code)

    def steps(self) -> int:
        """Steps logged so far."""
        path = self.output / "metrics.jsonl"
        return path.read_text().count('"loss"') if path.exists() else 0

    def alive(self) -> bool:
        return any(os.waitid(os.P_PID, p, os.WEXITED | os.WNOHANG | os.WNOWAIT) is None for p in self.pids)

    def send(self, number: int, pids: list[int] | None = None) -> None:
        for pid in pids or self.pids:
            os.kill(pid, number)

    def wait(self, timeout_s: float = 120) -> list[int]:
        """Exit codes of all ranks; negative for a signal. Kills and fails when they take too long."""
        deadline = time.monotonic() + timeout_s
        while self.alive():
            if time.monotonic() > deadline:
                self.send(signal.SIGKILL)
                raise SystemExit(f"FAILED: still running after {timeout_s} s; see {self.log}")
            time.sleep(0.02)
        return [os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) for pid in self.pids]


def check_loadable(output: Path) -> str:
    """The newest checkpoint, and `last`, must verify and load at any time; -> its name."""
    checkpoints = list_checkpoints(output)
    if not checkpoints:
        return "none"
    for path in (checkpoints[-1], output / "last"):
        if path.exists() or path.is_symlink():
            verify_checkpoint(path)
            load_policy(path)
    return checkpoints[-1].name
