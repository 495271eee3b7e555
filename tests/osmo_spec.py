"""What OSMO does with a workflow file before a task runs, and a strict model of what it accepts.

    spec = submit(Path("osmo/osmo-workflow.yaml"), "steps=10")    # as `osmo workflow submit FILE --set steps=10`
    check(spec, "6.3.1")                                          # raises SpecError where that version would refuse
    task = place(spec)["train-act"]                               # tokens replaced, as the task's pod gets it

Written from NVIDIA OSMO's public documentation (workflow specification, templates and special tokens) and from how
6.2.8, 6.3.1 and 6.4 (development) behave. Stricter than they are where they let something pass that cannot be meant:
a token that names nothing stays literal in OSMO, and is an error here.
"""

from __future__ import annotations

import copy
import hashlib
import json
import re
import shlex
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jinja2
import jinja2.sandbox
import yaml

from training.grid import parse_grid

VERSIONS = ("6.2.8", "6.3.1", "6.4")
DATA = "/osmo/data"  # {{input:N}} is DATA/input/N, {{output}} is DATA/output
MAX_TASKS = 20
MAX_FILE_BYTES = 2**20  # each injected file becomes a Kubernetes secret of its own
LOADER = getattr(yaml, "CSafeLoader", yaml.SafeLoader)  # a hundred times faster, where PyYAML was built with it
DUMPER = getattr(yaml, "CDumper", yaml.Dumper)
TOKEN = re.compile(r"{{(uuid|workflow_id|output|input:[^}]+|host:[^}]+)}}")


class SpecError(Exception):
    """OSMO would refuse the workflow, or run something else than what is meant."""


# -- submitting ---------------------------------------------------------------------------------------------------


def submit(path: Path, *assignments: str, strings: tuple[str, ...] = ()) -> dict[str, Any]:
    """The spec that arrives at the service: rendered, local files read in, rendered again.

    `assignments` are those of --set (numbers become numbers), `strings` those of --set-string.

    Raises:
        SpecError: what the CLI or the service would refuse, and an injected file that rendering would change.
    """
    text, values = filled_in(path, *assignments, strings=strings)
    final = load(render(text, values))
    if final != load(text):
        raise SpecError(f"{path.name}: the second rendering changes the spec")
    return final


def filled_in(path: Path, *assignments: str, strings: tuple[str, ...] = ()) -> tuple[str, dict[str, Any]]:
    """What OSMO renders last: the spec with the local files in it, contents, tokens and all; and the values for it."""
    workflow, defaults = sections(path.read_text(encoding="utf-8"))
    values = {**defaults, **dict(cast(a) for a in assignments), **dict(a.split("=", 1) for a in strings)}
    spec = load(render(workflow, values))
    inputs = [source for task in tasks(spec) for source in task.get("inputs", [])]
    if any("localpath" in source.get("dataset", {}) for source in inputs) and any(t.get("files") for t in tasks(spec)):
        # Before the folder is uploaded, the file is validated as it is written: the contents are not filled in yet.
        raise SpecError(
            f"{path.name}: a dataset's localpath and injected files in one workflow: OSMO refuses the files (contents: "
            "field required, localpath: not permitted); upload the folder before, with `osmo dataset upload`"
        )
    for task in tasks(spec):
        for file in task.get("files", []):
            if "localpath" not in file:  # an alias of another task's, in which it was filled in
                continue
            local = path.parent / file.pop("localpath")
            if not local.is_file():
                raise SpecError(f"{path.name}: {local}: no such file")
            file["contents"] = local.read_text(encoding="utf-8")
    return sections(yaml.dump(spec, Dumper=DUMPER))[0], values


def load(text: str) -> Any:
    return yaml.load(text, Loader=LOADER)  # noqa: S506 - a safe loader


def sections(text: str) -> tuple[str, dict[str, Any]]:
    """The text of `workflow:` and the values of `default-values:`; OSMO splits at keys in the first column."""
    parts = re.split(r"^(?=[a-zA-Z][a-zA-Z0-9_-]*:)", text, flags=re.MULTILINE)[1:]
    named = {part.split(":", 1)[0]: part for part in parts}
    unknown = set(named) - {"version", "workflow", "default-values"}
    if unknown or len(named) != len(parts) or "workflow" not in named:
        raise SpecError(f"top-level keys: found {[p.split(':', 1)[0] for p in parts]}")
    if len(re.findall(r"^\s*default-values:", text, flags=re.MULTILINE)) > 1:
        raise SpecError("default-values: given twice")
    default_values = yaml.safe_load(named.get("default-values", "default-values: {}"))["default-values"]
    return named["workflow"], default_values


def cast(assignment: str) -> tuple[str, int | float | str]:
    """One argument of --set."""
    name, equals, text = assignment.partition("=")
    if not equals:
        raise SpecError(f"--set {assignment}: expected name=value")
    for kind in (int, float):
        try:
            return name, kind(text)
        except ValueError:
            continue
    return name, text


def render(text: str, values: dict[str, Any]) -> str:
    """Jinja, strict about names; OSMO's own tokens pass through it unharmed."""
    values = dict(values)
    for token in set(TOKEN.findall(text)):
        name = "hash" + str(int(hashlib.md5(token.encode()).hexdigest(), 16))  # noqa: S324 - as OSMO does
        values[name] = "{{" + token + "}}"
        text = text.replace("{{" + token + "}}", "{{" + name + "}}")
    environment = jinja2.sandbox.SandboxedEnvironment(undefined=jinja2.StrictUndefined)
    try:
        return environment.from_string(text).render(values)
    except jinja2.TemplateError as error:
        raise SpecError(f"rendering: {error}") from error


def groups(spec: dict[str, Any]) -> list[dict[str, Any]]:
    """The groups; a task outside any group is a group of its own."""
    workflow = spec["workflow"]
    alone = [{"name": f"{task['name']}-group", "tasks": [task]} for task in workflow.get("tasks", [])]
    return workflow.get("groups", []) + alone


def tasks(spec: dict[str, Any]) -> list[dict[str, Any]]:
    """All tasks, in order."""
    return [task for group in groups(spec) for task in group["tasks"]]


# -- what users are told to type ----------------------------------------------------------------------------------

ROOT = Path(__file__).resolve().parent.parent
OSMO = ROOT / "osmo"
GUIDE = OSMO / "README.md"
GUIDES = (ROOT / "README.md", GUIDE)


def readme_commands(*guides: Path) -> list[list[str]]:
    """Every command in the shell blocks of these guides, or of all, as words; a backslash at a line's end goes on with
    it, && begins the next command."""
    texts = [with_grids(guide.read_text()) for guide in guides or GUIDES]
    blocks = [block for text in texts for block in re.findall(r"```bash\n(.*?)```", text, re.DOTALL)]  # may be indented
    lines = "\n".join(blocks).replace("\\\n", " ").replace(" && ", "\n").splitlines()
    return [words for line in lines if (words := shlex.split(line, comments=True))]


def with_grids(text: str) -> str:
    """The text with what a shell puts in the place of "$(python -m training.grid ...)"."""
    command = r"\$\(python -m training[.]grid ([^)]*)\)"
    return re.sub(command, lambda match: " ".join(map(str, parse_grid(match[1]))), text)


def inline_settings(name: str) -> list[str]:
    """The values that the guides' prose and tables give to a --set name, each in backticks: `name="VALUE"`."""
    prose = "".join(re.sub(r"```.*?```", "", guide.read_text(), flags=re.DOTALL) for guide in GUIDES)
    found = [span for span in re.findall(r"`([^`]+)`", prose) if span.startswith(f"{name}=")]
    require(len(found) == prose.count(f"{name}="), "guides", found, f"each {name}= to begin what stands in backticks")
    return [word.removeprefix(f"{name}=") for span in found for word in shlex.split(span)]


def head_commands(workflow: Path) -> list[list[str]]:
    """The `osmo` commands in the comment at a workflow's head."""
    lines = with_grids(workflow.read_text().replace("\\\n#", " ")).splitlines()
    return [shlex.split(line[1:], comments=True) for line in lines if line.startswith("#   osmo ")]


def osmo_commands(root: Path = ROOT) -> list[list[str]]:
    """Those of the guides' commands that call `osmo`, and those at the workflows' heads; of another checkout, too."""
    guides = readme_commands(root / "README.md", root / "osmo/README.md")
    heads = [words for path in sorted(root.glob("osmo/osmo-workflow*.yaml")) for words in head_commands(path)]
    return [words for words in guides if words[0] == "osmo"] + heads


# Options of the CLI's subcommands that we use, as documented for 6.2.8 and 6.3.1; + takes several values.
CLI = {
    "login": {},
    "credential set": {"--type": 1, "--payload": "+"},
    "workflow submit": {"--pool": 1, "--priority": 1, "--set": "+", "--set-string": "+", "--set-env": "+",
                        "--dry-run": 0},
    "workflow validate": {"--pool": 1, "--set": "+", "--set-string": "+"},
    "pool list": {},
    "workflow list": {},
    "workflow query": {"--verbose": 0},
    "workflow logs": {"--task": 1, "-n": 1},
    "workflow cancel": {},
    "dataset upload": {},
    "dataset info": {"--format-type": 1},
    "dataset download": {},
    "data upload": {},
    "data list": {"--recursive": 0, "--no-pager": 0},
    "data download": {},
    "data delete": {"--regex": 1},
    "data check": {"--access-type": 1},
}  # fmt: skip


def parse_cli(words: list[str]) -> tuple[str, list[str], dict[str, list[str]]]:
    """(subcommand, positional arguments, options) of an osmo command; SpecError for what the CLI does not document."""
    name = next((n for n in CLI if words[1:][: len(n.split())] == n.split()), None)
    require(name is not None, "osmo", " ".join(words), "a subcommand that it has")
    rest, positional, options, current = words[1 + len(name.split()) :], [], {}, None
    for word in rest:
        if word.startswith("-"):
            require(word in CLI[name], name, word, f"one of {', '.join(CLI[name])}")
            require(word not in options, name, " ".join(words), f"{word} once: of two only the last counts")
            options[word], current = [], word
        elif current and (CLI[name][current] == "+" or len(options[current]) < CLI[name][current]):
            options[current].append(word)
        else:
            positional.append(word)
    return name, positional, options


# -- what is accepted ---------------------------------------------------------------------------------------------

Check = Callable[[Any, str], None]
NAME = r"[a-zA-Z]([a-zA-Z0-9_-]*[a-zA-Z0-9])?"
URL = r"(azure://[^/,;*]+|s3:/)(/[^/,;*]+)+/*"
CODES = r"\d+(-\d+)?(,\d+(-\d+)?)*"


def require(holds: bool, where: str, found: Any, expected: str) -> None:
    if not holds:
        raise SpecError(f"{where}: found {found!r}, expected {expected}")


def text(pattern: str = r"(?s).*", expected: str = "text") -> Check:
    """A string that matches; YAML's unquoted numbers and booleans are no strings in every version."""

    def check_text(value: Any, where: str) -> None:
        require(isinstance(value, str) and re.fullmatch(pattern, value) is not None, where, value, expected)

    return check_text


def whole(value: Any, where: str) -> None:
    require(
        re.fullmatch(r"\d+", str(value)) is not None and not isinstance(value, bool), where, value, "a whole number"
    )


def boolean(value: Any, where: str) -> None:
    require(isinstance(value, bool), where, value, "true or false")


def many(item: Check) -> Check:
    def check_list(value: Any, where: str) -> None:
        require(isinstance(value, list), where, value, "a list")
        for index, each in enumerate(value):
            item(each, f"{where}[{index}]")

    return check_list


def mapping(item: Check, names: str = r".+") -> Check:
    def check_mapping(value: Any, where: str) -> None:
        require(isinstance(value, dict), where, value, "a mapping")
        for key, each in value.items():
            text(names, f"a name matching {names}")(key, where)
            item(each, f"{where}.{key}")

    return check_mapping


def fields(required: dict[str, Check], optional: dict[str, Check] | None = None) -> Check:
    """A mapping of exactly these fields: an unknown one is refused."""
    known = required | (optional or {})

    def check_fields(value: Any, where: str) -> None:
        require(isinstance(value, dict), where, value, f"a mapping of {', '.join(known)}")
        for name in required:
            require(name in value, where, sorted(value), f"{name} in it")
        for name, each in value.items():
            require(name in known, where, name, f"one of {', '.join(known)}")
            known[name](each, f"{where}.{name}")

    return check_fields


def one_of(**kinds: Check) -> Check:
    """A mapping whose kind is the one key it has."""

    def check_kind(value: Any, where: str) -> None:
        require(isinstance(value, dict), where, value, f"one of {', '.join(kinds)}")
        kind = [name for name in kinds if name in value]
        require(len(kind) == 1, where, sorted(value), f"one of {', '.join(kinds)}")
        fields({kind[0]: kinds[kind[0]]}, {"regex": text()} if kind[0] != "dataset" else {})(value, where)

    return check_kind


NAMED = text(NAME, "a letter, then letters, digits, - and _")
DATASET = text(r"([\w-]+/)?[\w-]+(:[\w-]+)?", "[BUCKET/]NAME[:TAG]")
SIZE = text(r"\d+(\.\d+)?(Ki|Mi|Gi|Ti)", "a size such as 32Gi")
DURATION = text(r"\d+[dhms]", "one whole number with one unit, such as 24h")
CREDENTIAL = mapping(text(r"[A-Za-z][\w-]*", "a payload key"), r"[A-Za-z_]\w*")


def model(version: str) -> Check:
    """The whole file as this version of OSMO accepts it."""
    inputs: dict[str, Check] = {"url": text(URL, "azure://ACCOUNT/CONTAINER/PATH or s3://BUCKET/PATH"), "task": NAMED}
    outputs: dict[str, Check] = {"url": inputs["url"]}
    if version != "6.4":  # which takes urls only
        inputs["dataset"] = fields({"name": DATASET}, {"localpath": text(r".+"), "regex": text()})
        outputs["dataset"] = fields({"name": DATASET})
    task = fields(
        {"name": NAMED, "image": text(r"\S+", "an image"), "command": many(text())},
        {
            "args": many(text()),
            "lead": boolean,
            "inputs": many(one_of(**inputs)),
            "outputs": many(one_of(**outputs)),
            "environment": mapping(text(), r"[A-Za-z_]\w*"),
            "credentials": mapping(CREDENTIAL, r"[A-Za-z][\w-]*"),
            "files": many(fields({"path": text(r"/(?!osmo/).+", "a path outside /osmo"), "contents": text()})),
            "exitActions": mapping(text(CODES, "exit codes such as 75,3004"), "COMPLETE|FAIL|RESCHEDULE"),
            "checkpoint": many(
                fields({"path": text(r"/.+"), "url": inputs["url"], "frequency": DURATION}, {"regex": text()})
            ),
        },
    )
    group = fields({"name": NAMED, "tasks": many(task)}, {"ignoreNonleadStatus": boolean, "barrier": boolean})
    resource = fields({}, {"gpu": whole, "cpu": whole, "memory": SIZE, "storage": SIZE, "platform": text(r".+")})
    workflow = fields(
        {"name": NAMED, "resources": mapping(resource)},
        {
            "tasks": many(task),
            "groups": many(group),
            "timeout": fields({}, {"exec_timeout": DURATION, "queue_timeout": DURATION}),
        },
    )
    return fields({"workflow": workflow})


def check(spec: dict[str, Any], version: str) -> None:
    """Raise SpecError, naming the field, where this version of OSMO would refuse the spec or not do what it says."""
    model(version)(spec, "spec")
    workflow = spec["workflow"]
    require(("tasks" in workflow) != ("groups" in workflow), "workflow", sorted(workflow), "tasks or groups")
    require("default" in workflow["resources"], "workflow.resources", workflow["resources"], "one called default")
    names = [t["name"] for t in tasks(spec)] + [g["name"] for g in groups(spec)]
    same = [name.lower().replace("_", "-") for name in names]
    require(len(set(same)) == len(same), "workflow", names, "names that all differ (upper case and _ do not count)")
    require(max(map(len, same)) <= 63, "workflow", max(names, key=len), "names of at most 63 characters")
    require(len(tasks(spec)) <= MAX_TASKS, "workflow", len(tasks(spec)), f"at most {MAX_TASKS} tasks")
    earlier: set[str] = set()
    for group in groups(spec):
        leads = sum(task.get("lead", False) for task in group["tasks"])
        require(leads == 1 or len(group["tasks"]) == 1, f"group {group['name']}", leads, "exactly one lead task")
        for task in group["tasks"]:
            where = f"task {task['name']}"
            paths = [file["path"] for file in task.get("files", [])]
            require(len(set(paths)) == len(paths), where, paths, "a path of its own per file")
            # The secret, and the pod's volume, are named after contents and base name: Kubernetes refuses a pod with
            # two volumes of one name, and OSMO does not look before.
            twins = Counter((Path(file["path"]).name, file["contents"]) for file in task.get("files", []))
            same = [name for (name, _), count in twins.items() if count > 1]
            require(not same, where, same, "files of the same name to differ (two empty __init__.py do not)")
            for file in task.get("files", []):
                size = len(file["contents"].encode())
                require(size < MAX_FILE_BYTES, f"{where}, file {file['path']}", size, f"under {MAX_FILE_BYTES} bytes")
            for source in task.get("inputs", []):
                require(source.get("task", "") in {"", *earlier}, where, source, "an input from a task listed earlier")
            twice = set(task.get("environment", {})) & {v for c in task.get("credentials", {}).values() for v in c}
            require(not twice, where, twice, "a variable in environment or in credentials, not in both")
        earlier |= {task["name"] for task in group["tasks"]}
    place(spec)


# -- placing it on a node -----------------------------------------------------------------------------------------


def place(
    spec: dict[str, Any], workflow_id: str = "workflow-1", hosts: dict[str, str] | None = None
) -> dict[str, dict[str, Any]]:
    """The tasks by name, with the tokens replaced as on the node; `hosts` are the tasks' addresses.

    Raises:
        SpecError: a token that names nothing, and would reach the task as it is.
    """
    placed = {}
    for group in groups(spec):
        siblings = {f"host:{t['name']}": (hosts or {}).get(t["name"], t["name"]) for t in group["tasks"]}
        for task in group["tasks"]:
            values = {"workflow_id": workflow_id, "output": f"{DATA}/output", **siblings}
            for index, source in enumerate(task.get("inputs", [])):
                values[f"input:{index}"] = f"{DATA}/input/{index}"
                if "task" in source:
                    values[f"input:{source['task']}"] = f"{DATA}/input/{index}"
            own = copy.deepcopy(task)
            files = own.pop("files", [])  # tokens in them would be replaced too: ours hold none, see test_osmo_spec
            encoded = json.dumps(own)
            for name, value in values.items():
                encoded = re.sub("{{[ ]*" + re.escape(name) + "[ ]*}}", value, encoded)
            if left := re.findall(r"{{[^}]*}}", encoded):
                raise SpecError(f"task {task['name']}: {left[0]} names nothing and would stay as it is")
            placed[task["name"]] = {**json.loads(encoded), "files": files}
    return placed
