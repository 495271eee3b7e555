"""Which files of this repository travel with an OSMO submission: what train.py imports, and what its scripts do.

    python -m tests.osmo_modules            # name them
    python -m tests.osmo_modules --write    # and put them under `modules:` in every workflow's default-values

OSMO injects files one by one, each by its name, so the workflows have to list them. test_osmo_modules.py fails when the
list is not this one.
"""

from __future__ import annotations

import ast
import re
import sys
import textwrap
from collections.abc import Iterator
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
OSMO = ROOT / "osmo"
IMPORT_ROOTS = (ROOT, ROOT / "deploy")  # what pyproject.toml's package-dir says
SCRIPTS = (OSMO / "uploads.py", OSMO / "check_settings.py", OSMO / "heartbeat.py")  # injected, each by its own line
INJECTED = (ROOT / "train.py", OSMO / "train-entrypoint.sh", OSMO / "download-blob.sh", *SCRIPTS)  # Python, or with it
AT_HOME = ROOT / "lerobot_dataset"  # for data.lerobot_dataset, which no workflow sets: 40 KB less in each submission
ROBOTS = ROOT / "deploy/ur10e_deploy/robot.py"  # imports the robot that --robot names, and no task runs one
COMMAND = "python -m tests.osmo_modules --write"
LISTED = re.compile(r"^  modules: >-.*\n((?:    .*\n)+)", re.MULTILINE)


def imported_modules(*start: Path, roots: tuple[Path, ...] = IMPORT_ROOTS, lazy: bool = True) -> set[Path]:
    """The .py files below `roots` that `start` (modules, or scripts with Python in them) import, directly or not.

    Read, not run: an import whose name is computed is refused. `lazy`: those in functions count, too.
    """
    found: set[Path] = set()
    waiting = list(start)
    while waiting:
        path = waiting.pop()
        if path in found:
            continue
        found.add(path)
        package = path.parent
        while (package / "__init__.py").is_file():  # `import a.b` runs a/__init__.py, too
            waiting.append(package / "__init__.py")
            package = package.parent
        for code in python_in(path):
            for node in run_nodes(ast.parse(code, str(path)), lazy):
                for name, level in names_imported(node, path):
                    bases = (path.parents[level - 1],) if level else roots
                    candidates = [base / name.replace(".", "/") for base in bases]
                    files = [f for c in candidates for f in (c / "__init__.py", c.with_suffix(".py")) if f.is_file()]
                    waiting += [
                        file for file in files[:1] if AT_HOME not in file.parents
                    ]  # a package goes before a module of the same name, as for Python
    return {path for path in found if path.suffix == ".py"}


def run_nodes(tree: ast.AST, lazy: bool) -> Iterator[ast.AST]:
    """What runs on import, and with `lazy` later: not what is there for type checkers only."""
    waiting = [tree]
    while waiting:
        node = waiting.pop()
        yield node
        if isinstance(node, ast.If) and ast.unparse(node.test) in ("TYPE_CHECKING", "typing.TYPE_CHECKING"):
            waiting += node.orelse
        elif lazy or not isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef, ast.Lambda)):
            waiting += ast.iter_child_nodes(node)


def names_imported(node: ast.AST, path: Path) -> Iterator[tuple[str, int]]:
    """(dotted name, leading dots) of all that this node may import. `from a import b` may mean a module a.b."""
    if isinstance(node, ast.Import):
        for alias in node.names:
            yield alias.name, 0
    elif isinstance(node, ast.ImportFrom):
        if node.module:
            yield node.module, node.level
        for alias in node.names:
            yield ".".join(filter(None, (node.module, alias.name))), node.level
    elif isinstance(node, ast.Call):
        function = node.func.id if isinstance(node.func, ast.Name) else getattr(node.func, "attr", "")
        if function in ("__import__", "import_module"):
            if path == ROBOTS:
                return
            if not (node.args and isinstance(node.args[0], ast.Constant)):
                raise ValueError(f"{path}:{node.lineno}: imports a computed name; nobody can tell what has to travel")
            name = node.args[0].value
            yield name.lstrip("."), len(name) - len(name.lstrip("."))


def python_in(path: Path) -> list[str]:
    """The Python in a module, or in a shell script: what follows `python - <<WORD`, or stands after `python -c`."""
    text = path.read_text(encoding="utf-8")
    if path.suffix == ".py":
        return [text]
    fed = re.findall(r"^.*\bpython3?\b.*<<-?\s*(['\"]?)(\w+)\1.*\n((?s:.*?))^\t*\2$", text, re.MULTILINE)
    given = re.findall(r"\bpython3? (?:-\w+ )*-c (['\"])((?s:.*?))\1", text)
    return [code for *_, code in fed + given]


def modules() -> list[str]:
    """What the workflows have to inject, relative to the root: first what lies there, then package by package."""
    names = [path.relative_to(ROOT).as_posix() for path in imported_modules(*INJECTED) - set(SCRIPTS)]
    return sorted(names, key=lambda name: ("/" in name, name))


def listed(workflow: str) -> list[str]:
    """What a workflow's text lists under `modules:`."""
    return LISTED.search(workflow)[1].split()


def with_list(workflow: str, names: list[str]) -> str:
    """The workflow's text with these names listed; each package begins a line."""
    folders = dict.fromkeys(name.rpartition("/")[0] for name in names)
    groups = [" ".join(name for name in names if name.rpartition("/")[0] == folder) for folder in folders]
    lines = [line for group in groups for line in textwrap.wrap(group, 114, break_on_hyphens=False)]
    old = LISTED.search(workflow)
    return workflow[: old.start(1)] + "".join(f"    {line}\n" for line in lines) + workflow[old.end(1) :]


def main(arguments: list[str]) -> int:
    if arguments not in ([], ["--write"]):
        print(f"error: expected nothing, or --write: {COMMAND}", file=sys.stderr)
        return 2
    names = modules()
    print("\n".join(names))
    if arguments:
        for path in sorted(OSMO.glob("osmo-workflow*.yaml")):
            path.write_text(with_list(path.read_text(), names))
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
