"""Stands in for the `osmo` command and a cluster behind it, so that the guide's commands run as they are written.

    environment = install(folder)              # puts an `osmo` first in PATH; datasets and urls are folders in `folder`
    subprocess.run(["osmo", "workflow", "submit", ...], env=environment)

What OSMO does to a workflow file, and what it refuses, is osmo_spec.py's; the tasks' commands run for real, on the
folders that their pods would have (osmo_task.py), one after the other, before `submit` comes back. TASKS=no leaves them
out. A failed task ends the workflow: as on OSMO, nobody who submits is told by an exit code, but there is no result.

Every call is a line of calls.txt. BROKEN, where it is set, is what every call says before it fails.
"""

from __future__ import annotations

import json
import os
import shlex
import shutil
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent


def install(folder: Path, tasks: bool = True) -> dict[str, str]:
    """The environment in which `osmo` is this file."""
    program = folder / "bin/osmo"
    program.parent.mkdir(parents=True)
    program.write_text(f'#!/bin/sh\nexec "{sys.executable}" -m tests.osmo_cluster "$@"\n')
    program.chmod(0o755)
    return {
        **os.environ,
        "PATH": f"{program.parent}:{os.environ['PATH']}",
        "PYTHONPATH": f"{ROOT}:{ROOT / 'deploy'}",
        "CLUSTER": str(folder),
        "TASKS": "yes" if tasks else "no",
    }


def calls(folder: Path) -> list[list[str]]:
    """What `osmo` was called with, as words."""
    path = folder / "calls.txt"
    return [shlex.split(line) for line in path.read_text().splitlines()] if path.exists() else []


class Cluster:
    """What `osmo` reads and writes, below `folder`: datasets/NAME/VERSION, blobs/ACCOUNT/..., workflows/ID/TASK."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def dataset(self, name: str) -> Path | None:
        """The folder of a version NAME:TAG, or of the newest of NAME."""
        name, _, tag = name.partition(":")
        versions = sorted((self.folder / "datasets" / name).glob(tag or "*"), key=lambda path: path.stat().st_mtime_ns)
        return versions[-1] if versions else None

    def blobs(self, url: str) -> Path:
        """The folder that stands for what is below a url."""
        return self.folder / "blobs" / url.partition("://")[2].strip("/")

    def store(self, source: Path, output: dict) -> None:
        """Upload a task's {{output}}."""
        if "url" in output:
            shutil.copytree(source, self.blobs(output["url"]), dirs_exist_ok=True)
        else:
            name = output["dataset"]["name"]
            shutil.copytree(source, self.folder / "datasets" / name / str(len(self.versions(name)) + 1))

    def versions(self, name: str) -> list[Path]:
        """All versions of a dataset."""
        return sorted((self.folder / "datasets" / name).glob("*"))

    def source(self, source: dict, outputs: dict[str, Path]) -> Path:
        """The folder that an input comes from; `outputs` are those of earlier tasks."""
        if "task" in source:
            return outputs[source["task"]]
        if "url" in source:
            folder = self.blobs(source["url"])
            folder.mkdir(parents=True, exist_ok=True)  # a prefix without blobs is no error
            return folder
        version = self.dataset(source["dataset"]["name"])
        if version is None:
            raise SystemExit(f"error: exit code 2010: no dataset {source['dataset']['name']}")
        (uploaded,) = version.iterdir()  # the folder that was uploaded
        return uploaded

    def run(self, spec: dict) -> str:
        """Run all tasks of a workflow; -> its id."""
        name = spec["workflow"]["name"]
        workflow_id = f"{name}-{len(list((self.folder / 'workflows').glob(f'{name}-*'))) + 1}"
        if os.environ["TASKS"] != "yes":
            (self.folder / "workflows" / workflow_id).mkdir(parents=True)
            return workflow_id
        from tests.osmo_spec import place, tasks
        from tests.osmo_task import TaskBox, add_image

        outputs: dict[str, Path] = {}
        placed = place(spec, workflow_id)
        for task in tasks(spec):
            task = placed[task["name"]]
            inputs = {n: self.source(source, outputs) for n, source in enumerate(task.get("inputs", []))}
            secrets = {variable: "a-secret" for c in task.get("credentials", {}).values() for variable in c}
            box = TaskBox(
                self.folder / "workflows" / workflow_id / task["name"], task, inputs, None, None, 512, **secrets
            )
            add_image(box)
            code = box.run(timeout_s=240)
            print(f"{task['name']}: exit code {code}")
            if code:
                print(box.log()[-3000:])
                break
            outputs[task["name"]] = box.delivered
            for output in task.get("outputs", []):
                self.store(box.delivered, output)
        return workflow_id


def copy_files(source: str, target: Path) -> None:
    """`PATH` goes into a folder named like it, `PATH/*` directly; links to folders are left out, as OSMO does."""
    folder = Path(source.removesuffix("/*"))
    target = target if source.endswith("/*") else target / folder.resolve().name
    for root, _, files in os.walk(folder):
        for name in files:
            path = target / Path(root, name).relative_to(folder)
            path.parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(Path(root, name), path)


def main(words: list[str]) -> int:
    """One call of `osmo`."""
    cluster = Cluster(Path(os.environ["CLUSTER"]))
    with (cluster.folder / "calls.txt").open("a") as file:
        file.write(shlex.join(words) + "\n")
    if broken := os.environ.get("BROKEN"):
        print(broken)
        return 2
    from tests.osmo_spec import SpecError, check, parse_cli, submit

    command, positional, options = parse_cli(["osmo", *words])
    first = positional[0] if positional else ""
    if command in ("workflow submit", "workflow validate"):
        try:
            spec = submit(Path(first), *options.get("--set", []), strings=tuple(options.get("--set-string", [])))
            check(spec, "6.3.1")
        except SpecError as error:
            print(f"Error message: {error}")
            return 1
        if command == "workflow submit":
            print(
                f"Workflow submit successful.\nWorkflow ID        - {cluster.run(spec)}\nWorkflow Overview  - http://x"
            )
    elif command == "dataset info":
        version = cluster.dataset(first)
        if version is None:
            print(json.dumps({"message": f"Could not find dataset or collection {first} in bucket b", "code": 400}))
            return 2
        print(json.dumps({"versions": [{"version": "1", "status": "READY", "tags": [version.name]}]}))
    elif command == "dataset upload":
        name, _, tag = first.partition(":")
        copy_files(positional[1], cluster.folder / "datasets" / name / (tag or str(len(cluster.versions(name)) + 1)))
    elif command == "data upload":
        copy_files(positional[1], cluster.blobs(first))
    elif command == "data list":
        container = cluster.blobs(first.rstrip("/")).parents[0]
        keys = sorted(path for path in cluster.blobs(first).rglob("*") if path.is_file())
        print("\n".join(str(key.relative_to(container.parent)) for key in keys))
        print(f"\nTotal {len(keys)} objects found")
    elif command in ("dataset download", "data download"):
        source = cluster.dataset(first) if command == "dataset download" else cluster.blobs(first)
        target = Path(positional[1])
        if source is None or not target.is_dir():
            print(f"{first}: not there, or {target} is not a valid path")
            return 2
        target = target / first.partition(":")[0] if command == "dataset download" else target
        shutil.copytree(source, target, dirs_exist_ok=True)
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
