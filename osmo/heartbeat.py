"""How much memory a task has, told to its next attempt: `python heartbeat.py begin|watch|end RUN_DIR NAME=VALUE...`.

A container without memory is killed as a whole, and OSMO runs its task again, as after an eviction. The next attempt
can tell by RUN_DIR/.heartbeat.json, a name that the trainer and the hand-over pass over. `begin` judges what the last
attempt left (exit code 1: out of memory for the second time). `watch` writes it every second, and uploads it when
memory passes 90 or 95 % of the limit, up or down, and every ten minutes. `end` writes the exit code.
"""

from __future__ import annotations

import contextlib
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

EVERY_S = 600
ADVICE = "raise `memory`, or lower training.num_workers or training.batch_size"


def numbers(path: Path) -> dict[str, int]:
    """A cgroup's file: lines of `NAME NUMBER`, or a number alone, then under ""; {} if there is none."""
    with contextlib.suppress(OSError):
        lines = [line.rpartition(" ") for line in path.read_text().splitlines()]
        return {name: int(value) for name, _, value in lines if value.isdigit()}
    return {}


def memory() -> dict:
    """Of this container: bytes in use without file cache, which the kernel takes back; limit; processes killed."""
    root = Path(os.environ.get("CGROUP_DIR", "/sys/fs/cgroup"))
    names, prefix = ("current", "max", "events"), ""
    if not (root / "memory.current").exists():  # cgroup version 1
        root, names, prefix = root / "memory", ("usage_in_bytes", "limit_in_bytes", "oom_control"), "total_"
    used, limit, events, stat = (numbers(root / f"memory.{name}") for name in (*names, "stat"))
    cache = sum(stat.get(prefix + name, 0) for name in ("active_file", "inactive_file", "slab_reclaimable"))
    most = limit.get("", 0)  # version 2 says "max" for none, version 1 a huge number
    return {
        "used": max(0, used.get("", 0) - cache),
        "limit": most if most < 2**60 else 0,
        "kills": events.get("oom_kill", 0),
    }


def level(beat: dict) -> int:
    """0; 1 from 90 % of the limit on; 2 from 95 % on. Without a limit 0."""
    return sum(beat["limit"] > 0 and beat["used"] >= share * beat["limit"] for share in (0.9, 0.95))


def ran_out(last: dict, kills: int, same_container: bool) -> bool:
    """Whether the attempt that left `last` died for want of memory; one that was preempted or drained did not."""
    if not last or last["code"] in (0, 75):
        return False
    if same_container:  # it has outlived the attempt, and so has the kernel's count
        return kills > last["kills_before"]
    return last["kills"] > last["kills_before"] or (last["code"] is None and level(last) == 2)


class Heartbeat:
    """What is written: `memory`, `step`, and of the attempt `code` (null until it ends), `command`, `kills_before` it.

    And how many in a row before it died `out_of_memory`.
    """

    def __init__(self, run_dir: str, node="0", command="", earlier="", upload_to="", code="0") -> None:
        self.path = Path(run_dir, f".heartbeat-{node}.json" if node != "0" else ".heartbeat.json")
        self.earlier = Path(earlier, self.path.parent.name, self.path.name)
        self.command, self.upload_to, self.code = command, upload_to, int(code)
        self.beat = self.read(self.path)

    def read(self, path: Path) -> dict:
        """An earlier one; {} if there is none."""
        with contextlib.suppress(OSError, ValueError, TypeError):
            beat = json.loads(path.read_text())
            return beat if "out_of_memory" in beat else {}
        return {}

    def write(self, **more: object) -> None:
        """As it is now."""
        self.beat |= {**memory(), **more}
        with contextlib.suppress(OSError, ValueError, LookupError, TypeError):  # no line yet
            with self.path.with_name("metrics.jsonl").open("rb") as file:
                file.seek(max(0, file.seek(0, os.SEEK_END) - 2000))
                self.beat["step"] = json.loads(file.read().rpartition(b"\n")[0].splitlines()[-1])["step"]
        self.path.with_suffix(".tmp").write_text(json.dumps(self.beat))
        os.replace(self.path.with_suffix(".tmp"), self.path)

    def upload(self) -> subprocess.Popen:
        """Begin to. The file is read a second later, as it is then."""
        words = ["osmo", "data", "upload", self.upload_to, str(self.path), "--processes", "1"]
        return subprocess.Popen(words, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.STDOUT)

    def begin(self) -> int:
        """Judge the last attempt, and start over; -> exit code."""
        last, now, count = self.beat or self.read(self.earlier), memory(), 0
        if ran_out(last, now["kills"], same_container=bool(self.beat)):
            same = last["command"] == self.command and 0 < now["limit"] <= last["limit"]
            count = 1 + (last["out_of_memory"] if same else 0)
        self.beat = {"command": self.command, "step": 0, "kills_before": now["kills"], "out_of_memory": count}
        self.write(code=None)
        how = "out of memory: the last attempt ended at step {step} with {used:.1f} of {limit:.1f} GiB in use"
        how = how.format(**{**last, **{name: last[name] / 2**30 for name in ("used", "limit")}}) if count else ""
        if count > 1:
            print(f"error: heartbeat: for the second time {how}; {ADVICE}", file=sys.stderr)
            return 1
        if count:
            print(f"heartbeat: note: most likely {how}; the second time is the last; {ADVICE}", flush=True)
        return self.must_upload() if self.upload_to else 0

    def must_upload(self) -> int:
        """See whether the storage url can be written to; -> exit code."""
        try:
            process = self.upload()
            told = " ".join(process.communicate()[0].decode(errors="replace").split())
            if not process.returncode and "Upload Failed" not in told:  # which ends with 0, too
                return 0
        except OSError as error:
            told = f"{error}; OSMO puts its command line into the pod"
        print(f"error: heartbeat: storage_url: cannot write to {self.upload_to}: {told[-400:]}", file=sys.stderr)
        return 1

    def watch(self) -> int:
        """Until SIGTERM; -> exit code."""
        stop: list[int] = []
        signal.signal(signal.SIGTERM, lambda number, _: stop.append(number))
        parent, sent_level, sent_s, sending = os.getppid(), 0, time.monotonic(), None
        while not stop and os.getppid() == parent:
            with contextlib.suppress(OSError):  # the disk is full
                self.write()
            if self.upload_to and (sending is None or sending.poll() is not None):
                if level(self.beat) != sent_level or time.monotonic() - sent_s >= EVERY_S:
                    sent_level, sent_s, sending = level(self.beat), time.monotonic(), self.upload()
            time.sleep(1)
        if sending is not None:
            sending.communicate()  # what it read must not arrive after the last word
        return 0

    def end(self) -> int:
        """Say the word; -> exit code."""
        self.write(code=self.code)
        if self.upload_to:
            with contextlib.suppress(OSError):  # no `osmo`, which `begin` has said
                self.upload().communicate()
        return 0


def main(action: str, run_dir: str, *options: str) -> int:
    """Entry; -> exit code."""
    return getattr(Heartbeat(run_dir, **dict(word.split("=", 1) for word in options)), action)()


if __name__ == "__main__":
    sys.exit(main(*sys.argv[1:]))
