"""Submit a workflow in one command: check here what can be checked, upload the bags once, run `osmo workflow submit`.

    cp osmo/submit.example.yaml osmo/submit.yaml           # once: your pool, images, bags
    python -m osmo.submit base                             # or ddp, blob, train-eval, sweep, wandb
    python -m osmo.submit base steps=20000 training.lr=5e-5
    python -m osmo.submit sweep sweep="training.lr=2e-5,4e-5 training.batch_size=4,8"
    python -m osmo.submit base --dry-run                   # check, show the commands, and end

Words are key=value: a name with a dot is a setting of config.yaml, one without is a --set name of the workflow
(README.md), or pool, priority or bags. submit.yaml has the same keys, for every workflow; a word wins over it.

The tasks' own scripts say what is wrong with a submission (train-entrypoint.sh --check, eval-entrypoint.sh
--check=options), train.py's reader what is wrong with a setting, rosbag_dataset what is wrong with a bag. Bags are
uploaded under a name that is a hash of what they hold, and found again by it. Exit code 0, or 1 with one line; what
OSMO refuses it says itself. Needs the trainer's packages (jinja2, which renders the workflow, comes with torch).
"""

from __future__ import annotations

import argparse
import dataclasses
import difflib
import hashlib
import json
import os
import re
import shlex
import subprocess
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NoReturn

import jinja2
import yaml

from rosbag_dataset import (
    Bag,
    BagError,
    BagSettings,
    find_bags,
    left_out_notes,
    parse_yaml,
    split_episodes,
    sync_table,
)
from rosbag_dataset.inspection import inspect_bags
from train import Config, bag_settings, load_config
from training.errors import ConfigError
from training.grid import parse_grid

OSMO = Path(__file__).resolve().parent
NAMES = ("base", "ddp", "blob", "train-eval", "sweep", "wandb")
OWN = ("pool", "priority", "bags")  # keys of submit.yaml that are no --set name
PRIORITIES = ("HIGH", "NORMAL", "LOW")
TOKEN = re.compile(r"\{\{(?:uuid|workflow_id|output|input:[^}]+|host:[^}]+)\}\}")  # OSMO's own, which stay
RUN = "{{workflow_id}}"  # the name of a run, as long as OSMO has given it none
UPLOAD = "--upload-to="  # the option of train-entrypoint.sh
UNSAFE = re.compile(r"[\"'\\\s]")  # would end a text in the workflow, or the setting


class SubmitError(Exception):
    """A submission that would fail: one line, with what was found, what was expected and what to do."""


# -- what is asked for --------------------------------------------------------------------------------------------


@dataclass
class Submission:
    """One `osmo workflow submit`.

    Attributes:
        path: the workflow file.
        pool: the pool's name.
        priority: HIGH, NORMAL or LOW; "" is OSMO's default.
        bags: the folder of recordings, None where they are uploaded already.
        defaults: the workflow's own value of each --set name.
        values: --set names and their values, as they were typed.
    """

    path: Path
    pool: str
    priority: str
    bags: Path | None
    defaults: dict[str, Any]
    values: dict[str, str]

    def value(self, name: str) -> str:
        """What a --set name is in the end; "" where the workflow has no such name."""
        return str(self.values.get(name, self.defaults.get(name, "")))

    def command(self, verb: str = "submit") -> list[str]:
        """`osmo workflow submit ...`, or validate, as words."""
        words = ["osmo", "workflow", verb, os.path.relpath(self.path), "--pool", self.pool]
        if self.priority and verb == "submit":
            words += ["--priority", self.priority]
        for option in ("--set", "--set-string"):
            given = [f"{k}={v}" for k, v in self.values.items() if (option == "--set-string") is _is_changed(v)]
            words += [option, *given] if given else []
        return words


def _typed(text: str) -> int | float | str:
    """What --set makes of a value."""
    for kind in (int, float):
        try:
            return kind(text)
        except ValueError:
            continue
    return text


def _is_changed(text: str) -> bool:
    """--set makes another text of it: 1.1 of 1.10, 10000.0 of 1e4."""
    return str(_typed(text)) != text


def workflow_file(name: str) -> Path:
    """The file of a workflow's short name."""
    return OSMO / ("osmo-workflow.yaml" if name == "base" else f"osmo-workflow-{name}.yaml")


def default_values(name: str) -> dict[str, Any]:
    """The --set names of a workflow, with its own values."""
    return yaml.safe_load(workflow_file(name).read_text())["default-values"]


def read_submission(name: str, words: Sequence[str], file: Path) -> Submission:
    """The keys of `file`, and the words, which win.

    Raises:
        SubmitError: a key that nothing has, a word that is none, a value that would not arrive as it is.
        SettingError: the file is not YAML.
        ConfigError: a grid is none.
    """
    defaults = default_values(name)
    try:
        content = parse_yaml(file.read_text(), str(file)) or {}
    except OSError as error:
        raise SubmitError(
            f"{file}: {error.strerror}; copy {os.path.relpath(OSMO / 'submit.example.yaml')} there, and edit it"
        ) from None
    if not isinstance(content, dict):
        raise SubmitError(f"{file}: found {content!r:.40}, expected keys, as in submit.example.yaml")
    everywhere = {key for each in NAMES for key in default_values(each)}
    given: dict[str, str] = {}
    for key, value in content.items():
        _check_key(str(file), key, {*everywhere, *OWN})
        if key in (*OWN, *defaults) or "." in key:  # another workflow's: it is no mistake in a file for all
            given[key] = _as_text(value)
    seen = set()
    for word in words:
        key, equals, value = word.partition("=")
        if not equals:
            raise SubmitError(f"{word}: expected key=value, for example steps=20000 or training.lr=5e-5")
        if key in seen:
            raise SubmitError(f"{word}: {key} is given twice; give it once")
        _check_key(word, key, {*defaults, *OWN})
        seen.add(key)
        given[key] = value
    overrides = {key: value for key, value in given.items() if "." in key}
    for key, value in overrides.items():
        if unsafe := UNSAFE.search(value):
            raise SubmitError(f"{key}: found {unsafe[0]!r} in {value}, expected a value without spaces, quotes and \\")
    values = {key: value for key, value in given.items() if key not in (*OWN, *overrides)}
    if "sweep" in values:
        values["sweep"] = " ".join(map(str, parse_grid(values["sweep"])))
    if overrides:
        values["overrides"] = " ".join(f"{key}={value}" for key, value in overrides.items())
    bags = Path(given["bags"]).expanduser() if given.get("bags") else None
    if bags and "recordings" not in defaults:
        print(f"note: bags: {bags} is not uploaded; {name} reads its recordings from elsewhere")
        bags = None
    return Submission(workflow_file(name), given.get("pool", ""), given.get("priority", ""), bags, defaults, values)


def _check_key(where: str, key: str, known: set[str]) -> None:
    if "." in key:  # train.py's reader knows them
        return
    if key == "overrides":
        raise SubmitError(f"{where}: overrides: give the settings themselves, for example training.lr=5e-5")
    if key not in known:
        near = difflib.get_close_matches(key, known, 1, 0.6)
        settings = [f"{s.name}.{key}" for s in dataclasses.fields(Config) if key in _keys_of(s.name)]
        hint = (settings or near or [""])[0]
        raise SubmitError(f"{where}: unknown key {key}" + (f"; did you mean {hint}?" if hint else ""))


def _keys_of(section: str) -> set[str]:
    return {f.name for f in dataclasses.fields(getattr(Config(), section))}


def _as_text(value: Any) -> str:
    """A value of the file as a word would have it: [240, 320] is [240,320]."""
    if isinstance(value, list):
        return f"[{','.join(map(_as_text, value))}]"
    if isinstance(value, dict):
        return f"{{{','.join(f'{k}: {_as_text(v)}' for k, v in value.items())}}}"
    return value


# -- what can be checked here -------------------------------------------------------------------------------------


def rendered(submission: Submission) -> list[dict[str, Any]]:
    """The tasks as OSMO would render them, its own tokens left as they are.

    Raises:
        SubmitError: a value of another kind than the workflow expects.
    """
    text = submission.path.read_text().partition("\nworkflow:")[2].partition("\ndefault-values:")[0]
    text = TOKEN.sub(r"{% raw %}\g<0>{% endraw %}", "workflow:" + text)
    values = submission.defaults | {key: _typed(value) for key, value in submission.values.items()}
    values |= {key: value for key, value in submission.values.items() if _is_changed(value)}
    try:
        spec = yaml.safe_load(jinja2.Environment(undefined=jinja2.StrictUndefined).from_string(text).render(values))
        workflow = spec["workflow"]
        return workflow.get("tasks") or [task for group in workflow["groups"] for task in group["tasks"]]
    except (jinja2.TemplateError, yaml.YAMLError, TypeError, ValueError) as error:
        reason = " ".join(str(error).split())
        raise SubmitError(f"{submission.path.name}: cannot be rendered with these values: {reason}") from None


def check(submission: Submission) -> tuple[list[Config], list[dict[str, Any]]]:
    """All that can be told without data and without OSMO; -> (each training task's configuration, all tasks).

    Raises:
        SubmitError, ConfigError: the first thing that is wrong.
    """
    if not submission.pool:
        raise SubmitError("pool: found nothing, expected the pool's name; `osmo pool list` shows yours")
    if submission.priority not in ("", *PRIORITIES):
        raise SubmitError(f"priority: found {submission.priority}, expected one of {', '.join(PRIORITIES)}")
    tasks = rendered(submission)
    for name in ("image", "eval_image"):
        image = submission.value(name)
        if any(task["image"] == image for task in tasks):
            _check_image(name, image)
    configs = []
    for task in tasks:
        script = Path(task["command"][-1]).name
        local = {file["path"]: OSMO / file["localpath"] for file in task.get("files", [])}
        words = [word.replace(RUN, "the-workflow-id") for word in task["args"]]
        config = local.get("/workspace/config.yaml")
        if config is not None:
            words = [word.replace("/workspace/config.yaml", str(config)) for word in words]
        _ask_script(script, words, task)
        if config is not None:
            configs.append(load_config(config, [w.partition("=")[2] for w in words if w.startswith("--override=")]))
            if dataset := configs[-1].data.lerobot_dataset:
                raise SubmitError(f"data.lerobot_dataset: found {dataset}, expected null: workflows train on bags")
    return configs, tasks


def _check_image(name: str, image: str) -> None:
    """An image that a node can pull, and of which one can later tell which it was."""
    registry, slash, rest = image.partition("/")
    example = "192.168.1.100:5000/ur10e-act-train:1"
    if not slash or not re.search(r"[.:]|^localhost$", registry):
        raise SubmitError(f"{name}: found {image}, expected it with its registry (else it is Docker Hub's): {example}")
    if "@" not in rest and re.fullmatch(r"[^:]*(:latest)?", rest):
        raise SubmitError(
            f"{name}: found {image}, expected a tag of its own, not latest: nobody could tell later which image a run "
            f"had; for example {example}"
        )


def _ask_script(script: str, words: list[str], task: dict[str, Any]) -> None:
    """The checks that the task itself would begin with."""
    secrets = {variable: "from-the-credential" for c in task.get("credentials", {}).values() for variable in c}
    environment = {"PATH": os.environ["PATH"], **task.get("environment", {}), **secrets}
    only = "--check" if script == "train-entrypoint.sh" else "--check=options"  # what it evaluates is not here
    command = ["bash", str(OSMO / script), only, *words]
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    if done.returncode:
        line = (done.stderr.strip().splitlines() or [f"{script} ended with {done.returncode}"])[-1]
        raise SubmitError(line.removeprefix("error: "))


# -- the bags -----------------------------------------------------------------------------------------------------


def inspect(folder: Path, configs: Sequence[Config], evaluated: bool) -> list[Bag]:
    """Read all bags in `folder` as the training will, and print what they hold; those held out may be `evaluated`.

    Raises:
        BagError: no bags, or one that the training would refuse.
        SubmitError: something that OSMO would not upload, or nothing to evaluate.
    """
    bags = find_bags(folder)
    for parent, folders, _ in os.walk(folder):
        if links := [name for name in folders if Path(parent, name).is_symlink()]:
            raise SubmitError(
                f"bags: {Path(parent, links[0])} is a link to a folder, which OSMO leaves out without a word; put the "
                "recordings themselves there"
            )
    asked: list[BagSettings] = []  # a sweep may vary how bags are read
    for config in configs:
        settings = dataclasses.replace(bag_settings(config), bag_dir=folder)
        if settings in asked:
            continue
        asked.append(settings)
        episodes, problems, left_out = inspect_bags(bags, settings)
        for problem in problems:
            if settings.on_bad_bag != "skip" or not episodes:
                raise BagError(problem["why"])
            print(f"note: {problem['why']}; skipped, as data.on_bad_bag says")
        print(sync_table([episode.sync_report for episode in episodes]))
        for note in left_out_notes(left_out):
            print(f"note: {note}")
        training = config.training
        _, held_out = split_episodes(episodes, training.val_fraction, training.seed, training.hold_out)
        print(f"held out: {', '.join(episode.name for episode in held_out) or 'none'}", flush=True)
        enough = len(bags) >= 5 or settings.episodes != "bag"  # of fewer, train-entrypoint.sh cannot tell
        if evaluated and not (held_out and enough):
            raise SubmitError(
                f"bags: {folder}: found {len(bags)} recordings, of which the training holds {len(held_out)} out, "
                "expected at least 5 and 1 to evaluate; add some, raise training.val_fraction, or give eval_dataset"
            )
    return bags


def content_tag(bags: Sequence[Bag]) -> str:
    """The name under which these recordings are stored, bags- and 12 hex digits: a hash of their names and all bytes.

    Raises:
        SubmitError: a file cannot be read.
    """
    digest = hashlib.sha256()
    for file, name in _files(bags):
        digest.update(f"{name}\0{file.stat().st_size}\0".encode())
        with file.open("rb") as stream:
            while block := stream.read(1 << 20):
                digest.update(block)
    return f"bags-{digest.hexdigest()[:12]}"


def _files(bags: Sequence[Bag]) -> Iterator[tuple[Path, str]]:
    """(file, its path below the folder of bags), of all that the bags are made of."""
    for bag in bags:
        files = list(bag.files) + ([bag.path / "metadata.yaml"] if bag.claimed is not None else [])
        for file in sorted(files):
            yield file, bag.name if file == bag.path else f"{bag.name}/{file.name}"


class Store:
    """Where the workflow looks for recordings: a version of a dataset, or a folder below the storage url."""

    def __init__(self, submission: Submission, folder: Path, bags: Sequence[Bag]) -> None:
        self._url, self._folder = submission.value("storage_url"), folder
        self._names = {name for _, name in _files(bags)}
        separator = "/" if self._url else ":"
        self.recordings = f"{submission.value('recordings')}{separator}{content_tag(bags)}"  # of the workflow
        self._place = f"{self._url}/{self.recordings}/"

    def upload_command(self) -> list[str]:
        """The command that uploads the bags."""
        if self._url:
            return ["osmo", "data", "upload", self._place, f"{self._folder}/*"]
        return ["osmo", "dataset", "upload", self.recordings, str(self._folder)]

    def has_it(self) -> bool:
        """Whether these bags are there, all of them.

        Raises:
            SubmitError: OSMO does not say.
        """
        if self._url:
            listed = _answer(["osmo", "data", "list", self._place, "--recursive", "--no-pager"])
            there = {line.rpartition(f"{self.recordings}/")[2] for line in listed.splitlines()}
            return self._names <= there
        words = ["osmo", "dataset", "info", self.recordings, "--format-type", "json"]
        answer = _answer(words, absent=("Could not find dataset", "does not have any entry"))
        versions = json.loads(answer[answer.index("{") :])["versions"] if answer else []
        return any(version["status"] == "READY" for version in versions)


def _answer(words: list[str], absent: Sequence[str] = ()) -> str:
    """What a command of OSMO prints; "" where it fails because something is not there yet.

    Raises:
        SubmitError: it is not installed, or fails otherwise.
    """
    done = _run(words, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    printed = done.stdout + done.stderr
    if done.returncode and not any(text in printed for text in absent):
        if "invalid choice" in printed:
            raise SubmitError(f"{shlex.join(words[:2])}: this OSMO has no datasets any more (6.4); give a storage_url")
        reason = " ".join(printed.split())[-300:] or f"exit code {done.returncode}"
        raise SubmitError(f"{shlex.join(words)}: {reason}")
    return done.stdout if not done.returncode else ""


def _run(words: list[str], **options: Any) -> subprocess.CompletedProcess[str]:
    try:
        return subprocess.run(words, **options)
    except FileNotFoundError:
        raise SubmitError("osmo: not installed here, or not in PATH; see https://nvidia.github.io/OSMO/") from None


# -- the command --------------------------------------------------------------------------------------------------


def show(words: list[str]) -> None:
    """Print a command so that it can be copied."""
    print(f"$ {shlex.join(words)}", flush=True)


def submit(submission: Submission, dry_run: bool) -> int:
    """Check, upload, submit; -> exit code.

    Raises:
        SubmitError, ConfigError, BagError: one line each.
    """
    configs, tasks = check(submission)
    store = None
    if submission.bags:
        evaluated = any(word.startswith("--eval-held-out") for task in tasks for word in task["args"])
        store = Store(submission, submission.bags, inspect(submission.bags, configs, evaluated))
        submission.values["recordings"] = store.recordings
    elif "recordings" in submission.defaults:
        print(f"note: no bags are given: what is in {submission.value('recordings')} is used, and not looked at here")
    if dry_run:
        if store:
            print("unless they are there already:")
            show(store.upload_command())
        show(submission.command())
        return 0
    if store and not store.has_it():
        show(submission.command("validate"))  # before an upload that may take hours
        _done(submission.command("validate"))
        show(store.upload_command())
        _done(store.upload_command())
        if not store.has_it():
            raise SubmitError(f"{shlex.join(store.upload_command())}: it says that all is well, but not all is there")
    elif store:
        print(f"the bags are there already, as {store.recordings}")
    show(submission.command())
    done = _run(submission.command(), stdout=subprocess.PIPE, text=True)
    print(done.stdout, end="", flush=True)
    if done.returncode:
        raise SubmitError(f"osmo workflow submit: exit code {done.returncode}; what it says is above")
    found = re.search(r"Workflow ID\s*-\s*(\S+)", done.stdout)
    print("then:")
    for words in next_commands(found[1] if found else "WORKFLOW_ID", tasks):
        show(words)
    return 0


def _done(words: list[str]) -> None:
    if code := _run(words).returncode:
        raise SubmitError(f"{shlex.join(words[:3])}: exit code {code}; what it says is above")


def next_commands(workflow_id: str, tasks: Sequence[dict[str, Any]]) -> Iterator[list[str]]:
    """How to watch the first task, and to fetch what the last one with an output makes."""
    yield ["osmo", "workflow", "logs", workflow_id, "--task", tasks[0]["name"]]
    yield ["mkdir", "-p", "results"]
    uploads = [word.removeprefix(UPLOAD) for task in tasks for word in task["args"] if word.startswith(UPLOAD)]
    outputs = [task["outputs"][0] for task in tasks if task.get("outputs")]
    if outputs and "dataset" in outputs[-1]:
        yield ["osmo", "dataset", "download", outputs[-1]["dataset"]["name"], "./results"]
    else:  # with a storage url a training uploads by itself, and what comes after it has an output
        url = outputs[-1]["url"] if outputs else f"{uploads[-1]}/"
        yield ["osmo", "data", "download", url.replace(RUN, workflow_id), "./results"]


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        self.exit(1, f"error: {message}; see --help\n")


def main(arguments: Sequence[str]) -> int:
    """Entry of `python -m osmo.submit`. Exit code 0, or 1 with one line."""
    parser = _Parser(
        prog="python -m osmo.submit", description="Check, upload the bags once, submit a workflow to OSMO."
    )
    parser.add_argument("workflow", choices=NAMES, help="which workflow of osmo/")
    parser.add_argument("words", nargs="*", metavar="key=value", help="--set names, and settings of config.yaml")
    parser.add_argument("--file", type=Path, default=OSMO / "submit.yaml", help="default: osmo/submit.yaml")
    parser.add_argument("--dry-run", action="store_true", help="check, show the commands, and end")
    args = parser.parse_intermixed_args(arguments)
    try:
        return submit(read_submission(args.workflow, args.words, args.file), args.dry_run)
    except (SubmitError, ConfigError, BagError) as error:
        line = " ".join(str(error).split())
    except OSError as error:
        line = f"{error.filename}: {error.strerror}"
    print(f"error: {line}", file=sys.stderr, flush=True)
    return 1


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
