"""`osmo data upload` and `osmo data delete` as a pod has them, onto folders: azure://A/B is $OSMO_STORAGE/A/B.

Like OSMO's own (soak_uploads.py runs that one against a blob server): a folder's files go below the folder's name,
links to folders are left out, a regex is matched against the path from the folder's name on, and an upload that fails
ends with exit code 0 as well. A file appears whole or not at all, as a blob does. Tests can make uploads fail (a file
.fail in $OSMO_STORAGE), and hold them up at a file (.hold: its name). Each upload leaves a line in .calls.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import shutil
import sys
import time
from pathlib import Path

STORAGE = Path(os.environ.get("OSMO_STORAGE", "/nonexistent"))


def place(url: str) -> Path:
    """The folder that an url stands for."""
    return STORAGE / url.split("://")[1].rstrip("/")


def walk(path: Path) -> list[tuple[Path, str]]:
    """The files below a path, or itself; with their names from its own on."""
    if path.is_file():
        return [(path, path.name)]
    found = [Path(root, name) for root, _, names in os.walk(path) for name in sorted(names)]
    return [(file, file.relative_to(path.parent).as_posix()) for file in found]


def upload(args: argparse.Namespace) -> None:
    """Copy what the regex matches."""
    files = [pair for path in args.paths for pair in walk(path) if re.match(args.regex, pair[1])]
    sent: list[str] = []
    size = 0
    for file, name in files:
        hold = STORAGE / ".hold"
        while hold.exists() and name.endswith(hold.read_text().strip()):
            time.sleep(0.05)
        if (STORAGE / ".fail").exists():
            print(f"Data has been uploaded\nUpload Failed on files:\n{file}: ResourceNotFoundError: no such container")
            break
        target = place(args.url) / name
        target.parent.mkdir(parents=True, exist_ok=True)
        partial = target.with_name(f".partial-{os.getpid()}-{target.name}")
        shutil.copyfile(file, partial)
        os.replace(partial, target)
        sent.append(name)
        size += target.stat().st_size
    with (STORAGE / ".calls").open("a") as calls:
        calls.write(json.dumps({"bytes": size, "names": sent}) + "\n")
    if args.benchmark_out:
        counts = {"total_bytes_transferred": size, "total_number_of_files": len(sent)}
        Path(args.benchmark_out, f"upload_{os.getpid()}.json").write_text(json.dumps(counts))


def delete(args: argparse.Namespace) -> None:
    """Remove what the regex matches; it is matched against the path below the url."""
    folder = place(args.url)
    names = [name.partition("/")[2] for _, name in walk(folder)]
    gone = [name for name in names if re.match(args.regex, name)]
    for name in gone:
        (folder / name).unlink()
    print(f"Data has been deleted, success_count={len(gone)}, failures=0", file=sys.stderr)


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("data", choices=["data"])
    parser.add_argument("action", choices=["upload", "delete"])
    parser.add_argument("url")
    parser.add_argument("paths", type=Path, nargs="*")
    parser.add_argument("--regex", default="")
    parser.add_argument("--processes", type=int)
    parser.add_argument("--benchmark-out")
    args = parser.parse_args()
    STORAGE.mkdir(parents=True, exist_ok=True)
    (upload if args.action == "upload" else delete)(args)


def install(folder: Path) -> None:
    """Put the command `osmo` into a folder, which has to be in PATH."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "osmo").write_text(f'#!/bin/sh\nexec "{sys.executable}" -S -E "{Path(__file__).resolve()}" "$@"\n')
    (folder / "osmo").chmod(0o755)


if __name__ == "__main__":
    main()
