"""The modules that OSMO injects: found by reading imports, listed in the workflows, and all needed."""

from __future__ import annotations

import ast
import json
import subprocess
import sys
import sysconfig
from pathlib import Path

import pytest

from tests import osmo_modules
from tests.osmo_modules import OSMO, ROOT, imported_modules, listed, modules, with_list
from tests.osmo_spec import submit, tasks

WORKFLOWS = sorted(OSMO.glob("osmo-workflow*.yaml"))


def write(root: Path, files: dict[str, str]) -> None:
    for name, text in files.items():
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_text(text)


TREE = {
    "start.py": "import torch, os.path, flat\nfrom package import reader, CONSTANT\nimport deep.er.module as m\n",
    "flat.py": "def later():\n    from late import anything\n",
    "late.py": "",
    "package/__init__.py": "from .errors import Error\nCONSTANT = 1\n",
    "package/errors.py": "class Error(Exception): ...\nfrom . import helper, Error\n",
    "package/helper.py": "if TYPE_CHECKING:\n    import types_only\nelse:\n    import real\n",
    "package/reader.py": "def read():\n    from .sub.low import x\n",
    "package/sub/__init__.py": "",
    "package/sub/low.py": "from .. import up\nfrom ...package.sideways import y\n",
    "package/up.py": "import importlib\nimportlib.import_module('.plugin', __package__)\n",
    "package/plugin.py": "import package\n",
    "package/sideways.py": "",
    "deep/er/__init__.py": "",  # deep itself is a namespace package
    "deep/er/module.py": "import both\n",
    "both/__init__.py": "",
    "both.py": "",
    "real.py": "",
    "types_only.py": "",
    "not_imported.py": "",
    "package/not_imported.py": "",
    "package/flat.py": "",  # a neighbour is no top-level module
    "errors.py": "",
    "sub/low.py": "",
    "other/elsewhere.py": "",
    "script.sh": "python - \"$1\" <<'PY' || exit 1\nimport late\nPY\necho import not_imported\n"
    "python3 -c 'import real; print(1)'\n",
}
LAZY = {"late.py", "package/sub/__init__.py", "package/sub/low.py", "package/up.py", "package/plugin.py",
        "package/sideways.py"}  # fmt: skip
NOW = {"start.py", "flat.py", "package/__init__.py", "package/errors.py", "package/helper.py", "package/reader.py",
       "deep/er/__init__.py", "deep/er/module.py", "both/__init__.py", "real.py"}  # fmt: skip


def test_imports_are_followed_as_python_does(tmp_path: Path):
    write(tmp_path, TREE)

    def found(*start: str, **options) -> set[str]:
        paths = imported_modules(*(tmp_path / name for name in start), roots=(tmp_path, tmp_path / "other"), **options)
        return {path.relative_to(tmp_path).as_posix() for path in paths}

    assert found("start.py") == NOW | LAZY
    assert found("start.py", lazy=False) == NOW
    assert found("package/sideways.py") == {f"package/{n}.py" for n in ("sideways", "__init__", "errors", "helper")} | {
        "real.py"
    }
    assert found("script.sh") == {"late.py", "real.py"}
    write(tmp_path, {"flat.py": "import elsewhere"})
    assert "other/elsewhere.py" in found("start.py")
    write(tmp_path, {"flat.py": "__import__('a' + 'b')"})
    with pytest.raises(ValueError, match=r"flat.py:1: imports a computed name"):
        found("start.py")


def test_the_list_is_rewritten_and_nothing_else(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    names = ["act_model.py", "train.py", *(f"package/module_{i:02}.py" for i in range(20)), "package/sub/low.py"]
    text = WORKFLOWS[0].read_text()
    changed = with_list(text, names)
    assert listed(changed) == names and max(map(len, changed.splitlines())) <= 120
    assert "\n    package/module_00.py" in changed and "\n    package/sub/low.py\n" in changed
    assert with_list(changed, listed(text)) == text
    (tmp_path / WORKFLOWS[0].name).write_text(changed)
    monkeypatch.setattr(osmo_modules, "OSMO", tmp_path)
    assert osmo_modules.main(["--write"]) == 0
    assert (tmp_path / WORKFLOWS[0].name).read_text() == text
    assert osmo_modules.main(["--help"]) == 2


@pytest.mark.parametrize("path", WORKFLOWS, ids=lambda path: path.stem.removeprefix("osmo-workflow"))
def test_the_workflows_list_what_the_trainer_imports(path: Path):
    assert listed(path.read_text()) == modules(), f"to put this right: {osmo_modules.COMMAND}"


# In a Python that knows the standard library, the installed packages and one folder, but no editable install: start
# train.py once, then once without each of the files that it read, in a process forked off (so torch is read once).
ALONE = """
import importlib, json, os, runpy, sys
folder, site = sys.argv[1:]
sys.path[:0] = [folder]
sys.path.append(site)

def start():
    sys.argv[:] = ["train.py", "--help"]
    try:
        runpy.run_path(folder + "/train.py", run_name="__main__")
    except SystemExit as end:
        return end.code or 0
    except (ImportError, FileNotFoundError):
        return 99

assert start() == 0
ours = {n: m.__file__ for n, m in sys.modules.items() if (getattr(m, "__file__", None) or "").startswith(folder + "/")}
for name in ours:
    del sys.modules[name]
codes = {}
for path in [*ours.values(), folder + "/train.py"]:
    os.rename(path, path + ".gone")
    importlib.invalidate_caches()
    child = os.fork()
    if not child:
        os.dup2(2, 1)
        os._exit(start())
    codes[os.path.relpath(path, folder)] = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    os.rename(path + ".gone", path)
print(json.dumps(codes))
"""


def test_without_any_one_of_them_the_trainer_does_not_start(tmp_path: Path):
    """What it reads at its start are the injected files that the imports tell of; and each is missed."""
    (task,) = tasks(submit(OSMO / "osmo-workflow.yaml"))
    write(tmp_path, {file["path"].removeprefix("/workspace/"): file["contents"] for file in task["files"]})
    command = [sys.executable, "-I", "-S", "-B", "-c", ALONE, tmp_path, sysconfig.get_paths()["purelib"]]
    done = subprocess.run(list(map(str, command)), capture_output=True, text=True, timeout=200)
    assert done.returncode == 0, done.stderr
    codes = json.loads(done.stdout.splitlines()[-1])
    wanted = imported_modules(ROOT / "train.py", lazy=False)
    assert set(codes) == {path.relative_to(ROOT).as_posix() for path in wanted}
    started = {name for name, code in codes.items() if code != 99}
    assert started <= {name for name in codes if says_nothing(ROOT / name)}, codes


def says_nothing(path: Path) -> bool:
    """An __init__.py of comments alone: Python takes the folder for a namespace package without it."""
    return path.name == "__init__.py" and all(isinstance(n, ast.Expr) for n in ast.parse(path.read_text()).body)
