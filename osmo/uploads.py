"""Between a run and its storage url: take up what an earlier attempt left there, and send what is new.

    python uploads.py take-up RUN_DIR EARLIER        # EARLIER: the url's content, where OSMO downloaded it
    python uploads.py watch RUN_DIR --to=URL         # beside the training, until SIGTERM
    python uploads.py send RUN_DIR --to=URL          # what is left; exit code 1: it did not arrive

A file is sent once, and again when it has changed: a checkpoint when it is complete, the rest every ten minutes. It
counts as sent when as many files and bytes have arrived, because `osmo data upload` ends with 0 when it failed, too.
Only then is removed there what the run has removed (training.keep_checkpoints), and what is older and was left by
earlier attempts. RUN_DIR/.uploaded.json is what is there: size and time of what was sent, null for what was left.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path

EVERY_S, RETRY_S, TIMEOUT_S = 600, float(os.environ.get("UPLOAD_RETRY_S", 30)), 3600
CHECKPOINT = re.compile(r"checkpoint_(\d{6,})/")


def say(message: str) -> None:
    """A line of the log."""
    print(f"uploads: {message}", flush=True)


def stamps(folder: Path) -> dict[str, list[int]]:
    """Size and time of every file below `folder` by its name, but for hidden ones and links to folders."""
    found = {}
    for root, folders, files in os.walk(folder):
        folders[:] = [name for name in folders if not name.startswith(".") and not name.endswith(".old")]
        for path in (Path(root, name) for name in files if not name.startswith(".")):
            with contextlib.suppress(FileNotFoundError):  # removed meanwhile
                stat = path.stat()
                found[path.relative_to(folder).as_posix()] = [stat.st_size, stat.st_mtime_ns]
    return found


def take_up(earlier: Path, run_dir: Path) -> None:
    """Copy the newest whole checkpoint of an earlier attempt, and the best one."""
    if not any(earlier.glob("checkpoint_*")):
        return say(f"no checkpoint of an earlier attempt in {earlier}: starting at step 0")
    from lerobot_checkpoint import CheckpointError, best_checkpoint, newest_checkpoint, verify_checkpoint

    def fetch(checkpoint: Path) -> None:
        partial = run_dir / f".tmp-{checkpoint.name}"
        shutil.rmtree(partial, ignore_errors=True)
        shutil.copytree(checkpoint, partial)
        os.rename(partial, run_dir / checkpoint.name)

    newest = newest_checkpoint(earlier, on_bad=lambda line: say(f"passed over {line}"))
    if newest is None:
        say(f"no complete checkpoint of an earlier attempt in {earlier}: starting at step 0")
    else:
        if (earlier / "metrics.jsonl").exists():
            shutil.copy(earlier / "metrics.jsonl", run_dir)
        fetch(newest)
        say(f"taking up {newest.name} of an earlier attempt")
        best = best_checkpoint(earlier)  # train.py points `best` at it again: links are not uploaded
        if best is not None and best.name != newest.name:
            try:
                verify_checkpoint(best)
                fetch(best)
            except CheckpointError as error:
                say(f"the best checkpoint so far is lost: {error}")
    here = stamps(run_dir)
    Uploads(run_dir, "").remember({name: here.get(name) for name in stamps(earlier)})


class Uploads:
    """A run directory, and what of it is at `url`."""

    def __init__(self, run_dir: Path, url: str) -> None:
        self.run_dir, self.url, self.path = run_dir, url, run_dir / ".uploaded.json"
        self.sent = json.loads(self.path.read_text()) if self.path.exists() else {}

    def remember(self, sent: dict[str, list[int] | None]) -> None:
        """Write down what is there, for a process that is restarted in place; on a full disk it sends all again."""
        self.sent = sent
        with contextlib.suppress(OSError):
            self.path.with_suffix(".tmp").write_text(json.dumps(sent))
            os.replace(self.path.with_suffix(".tmp"), self.path)

    def unsent(self) -> dict[str, list[int]]:
        """What is new or has changed."""
        return {name: stamp for name, stamp in stamps(self.run_dir).items() if self.sent.get(name) != stamp}

    def send(self) -> str:
        """Send what is new, then remove what the run has removed; -> what went wrong, or ""."""
        new = list(self.unsent().items())
        for first in range(0, len(new), 500):  # their names are one word of a command line
            some = dict(new[first : first + 500])
            if problem := self.upload(some):
                return problem
            self.remember(self.sent | some)
        if checkpoints := sorted({match[0][:-1] for name, _ in new if (match := CHECKPOINT.match(name))}):
            say(f"uploaded {', '.join(checkpoints)}")
        if problem := self.remove():
            say(f"note: checkpoints that the run has removed are still there: {problem}")
        return ""

    def upload(self, new: dict[str, list[int]]) -> str:
        """Send these; -> what went wrong, or ""."""
        regex = f"{re.escape(self.run_dir.name)}/({'|'.join(map(re.escape, new))})$"
        with tempfile.TemporaryDirectory() as counts:
            words = [self.url, str(self.run_dir), "--regex", regex, "--processes", "1", "--benchmark-out", counts]
            told, problem = self.osmo("upload", *words)
            arrived = [json.loads(path.read_text()) for path in Path(counts).iterdir()]
        files = sum(each["total_number_of_files"] for each in arrived)
        size, expected = sum(each["total_bytes_transferred"] for each in arrived), sum(size for size, _ in new.values())
        if not problem and (files != len(new) or size < expected):
            problem = f"{files} of {len(new)} files arrived, {size} of {expected} bytes: {told}"
        return problem

    def remove(self) -> str:
        """Remove there what the run has removed, and older checkpoints that never were here; -> what went wrong."""
        steps = {match[0]: int(match[1]) for name in self.sent if (match := CHECKPOINT.match(name))}
        gone = {folder for folder in steps if not (self.run_dir / folder).exists()}
        were_here = {match[0] for name, stamp in self.sent.items() if stamp and (match := CHECKPOINT.match(name))}
        newest = max((steps[folder] for folder in gone & were_here), default=-1)
        old = tuple(sorted(folder for folder in gone if steps[folder] <= newest))
        if not old:
            return ""
        told, problem = self.osmo("delete", f"{self.url}/{self.run_dir.name}/", "--regex", f"({'|'.join(old)}).*")
        if problem or "failures=0" not in told:
            return problem or told
        self.remember({name: stamp for name, stamp in self.sent.items() if not name.startswith(old)})
        return ""

    def osmo(self, *words: str) -> tuple[str, str]:
        """`osmo data WORDS`; -> the line of its output that says most, and what went wrong or ""."""
        try:
            done = subprocess.run(
                ["osmo", "data", *words], stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
                text=True, errors="replace", timeout=TIMEOUT_S,
            )  # fmt: skip
        except (OSError, subprocess.TimeoutExpired) as error:
            return "", str(error)
        lines = [line.strip() for line in re.split(r"[\r\n]+", done.stdout) if line.strip()] or ["it said nothing"]
        told = next((line for line in lines if re.search("Error|cannot|failures=", line)), lines[-1])
        return told, f"osmo data {words[0]}: exit code {done.returncode}: {told}" if done.returncode else ""


def watch(uploads: Uploads) -> None:
    """Send each checkpoint when it is there, and all that is new every ten minutes, until SIGTERM."""
    stop, parent = threading.Event(), os.getppid()
    signal.signal(signal.SIGTERM, lambda *_: stop.set())
    due_s, failed = time.monotonic() + EVERY_S, ""
    while not stop.wait(RETRY_S if failed else 1) and os.getppid() == parent:
        if not (failed or time.monotonic() >= due_s or any(map(CHECKPOINT.match, uploads.unsent()))):
            continue
        try:
            problem = uploads.send()
        except OSError as error:  # the disk is full
            problem = str(error)
        if problem and not failed:
            say(f"note: not uploaded, trying again every {RETRY_S:g} s: {problem}")
        failed, due_s = problem, time.monotonic() + EVERY_S


def main() -> int:
    """Entry; -> exit code."""
    parser = argparse.ArgumentParser(description="Uploads of a run; see the head of this file.")
    parser.add_argument("action", choices=("take-up", "watch", "send"))
    parser.add_argument("run_dir", type=Path)
    parser.add_argument("earlier", type=Path, nargs="?")
    parser.add_argument("--to", default="")
    args = parser.parse_args()
    if args.action == "take-up":
        take_up(args.earlier, args.run_dir)
        return 0
    uploads = Uploads(args.run_dir, args.to)
    if args.action == "watch":
        watch(uploads)
        return 0
    for pause_s in (0, RETRY_S, RETRY_S):
        time.sleep(pause_s)
        problem = uploads.send()
        if not problem:
            return 0
    print(f"error: uploads: {args.to}: the run could not be uploaded: {problem}", file=sys.stderr)
    return 1


if __name__ == "__main__":
    sys.exit(main())
