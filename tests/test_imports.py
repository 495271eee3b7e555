"""Imports run one way: no circle among the rooms (modules) of a package, and nothing from packages above it."""

from __future__ import annotations

import ast
import importlib
import importlib.util
import subprocess
import sys
from pathlib import Path

import pytest
from ur10e_deploy import robot

import rosbag_dataset
from tests.checks import ROOT
from training.identity import BESIDE


def imports_of(package: Path) -> tuple[dict[str, set[str]], dict[str, set[str]]]:
    """What the rooms of a package import, wherever in the file: in functions and under TYPE_CHECKING, too.

    Args:
        package: a folder with __init__.py; its rooms are its .py files.

    Returns:
        (room -> rooms of the same package, which may be "__init__"; room -> top-level names of all other modules).
    """
    assert not list(package.glob("*/*.py")), "a package inside the package would go unseen"
    rooms = {path.stem: path for path in package.glob("*.py")}
    inside: dict[str, set[str]] = {room: set() for room in rooms}
    outside: dict[str, set[str]] = {room: set() for room in rooms}
    for room, path in rooms.items():
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Import):
                names = [alias.name for alias in node.names]
            elif isinstance(node, ast.ImportFrom):
                assert node.level < 2, f"{path}, line {node.lineno}: leaves its package by dots"
                module = ".".join(filter(None, [package.name if node.level else "", node.module]))
                names = [f"{module}.{alias.name}" for alias in node.names]
            else:
                continue
            for name in names:
                top, *rest = name.split(".")
                if top != package.name:
                    outside[room].add(top)
                else:
                    inside[room].add(rest[0] if rest and rest[0] in rooms else "__init__")
    return inside, outside


def circle(edges: dict[str, set[str]]) -> list[str]:
    """Some room, what it imports, and so on back to that room; [] where imports run one way."""
    done: set[str] = set()

    def visit(room: str, path: list[str]) -> list[str]:
        if room in path:
            return [*path[path.index(room) :], room]
        if room in done:
            return []
        for other in sorted(edges[room]):
            if found := visit(other, [*path, room]):
                return found
        done.add(room)
        return []

    return next((found for room in sorted(edges) if (found := visit(room, []))), [])


def project_modules() -> set[str]:
    """Top-level names that this repository brings: modules and packages in its root and in deploy/."""
    folders = [path.parent for path in [*ROOT.glob("*/__init__.py"), *ROOT.glob("deploy/*/__init__.py")]]
    return {path.stem for path in ROOT.glob("*.py")} | {folder.name for folder in folders}


# package -> what else of the project it may import; heavy libraries that it must do without
RULES: dict[str, tuple[set[str], set[str]]] = {
    "rosbag_dataset": ({"report_page", "ur10e"}, {"torch", "torchvision", "lerobot"}),
    "lerobot_checkpoint": ({"act_model"}, {"lerobot", "wandb"}),
    "lerobot_dataset": ({"rosbag_dataset"}, {"torch", "torchvision", "lerobot", "wandb"}),
    "training": ({"act_model", "lerobot_checkpoint", "lerobot_dataset", "rosbag_dataset"}, {"lerobot"}),
    "deploy/ur10e_deploy": (
        {"act_model", "lerobot_checkpoint", "lerobot_dataset", "report_page", "rosbag_dataset", "ur10e"},
        {"wandb"},
    ),
}


@pytest.mark.parametrize("package", RULES)
def test_no_circle_among_the_rooms(package: str):
    """One can read a package from the bottom up: each room needs only those that were read before."""
    inside, _ = imports_of(ROOT / package)
    assert not circle(inside), " -> ".join(circle(inside))
    assert len(inside) > 1 and any(inside.values())


@pytest.mark.parametrize("package", RULES)
def test_nothing_from_above(package: str):
    """A package imports of this project what the table allows, and none of the libraries that it must do without."""
    allowed, without = RULES[package]
    _, outside = imports_of(ROOT / package)
    forbidden = (project_modules() - {Path(package).name} - allowed) | without
    assert {"train", "sim", "tests", "benchmarks"} <= forbidden
    assert {room: names & forbidden for room, names in outside.items() if names & forbidden} == {}


@pytest.mark.parametrize("module", ["report_page", "ur10e"])
def test_what_all_may_import_imports_nothing(module: str):
    """What a page looks like, and how the arm moves: of this project they need nothing, so that anything may use them;
    and of rosbag_dataset only its commands do, because OSMO does not inject them."""
    tree = ast.parse((ROOT / f"{module}.py").read_text())
    names = {a.name for node in ast.walk(tree) if isinstance(node, ast.Import) for a in node.names}
    names |= {node.module for node in ast.walk(tree) if isinstance(node, ast.ImportFrom)}
    assert not {name.partition(".")[0] for name in names} & project_modules()
    _, outside = imports_of(ROOT / "rosbag_dataset")
    assert {f"{room}.py" for room, of in outside.items() if module in of} <= BESIDE


def test_robots_are_the_only_way_up_from_the_robot_side():
    """deploy/ names the modules that bring robots as text, in one table, and imports them when they are asked for:
    nothing else leads from it to sim/ or a driver, no other import is hidden, and what is named there exists."""
    assert all(importlib.import_module(module).open_robot for module in robot.ROBOTS.values())
    for path in (ROOT / "deploy/ur10e_deploy").glob("*.py"):
        text = path.read_text()
        assert path.stem == "robot" or "import_module" not in text and "__import__" not in text, path
    code = "import sys, ur10e_deploy.run; sys.exit('sim' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], cwd=ROOT).returncode == 0


def test_only_tests_benchmarks_and_submit_import_train():
    """Imports run one way: whatever stands behind a run, reads its data or drives a robot must not need the trainer."""
    paths = [*ROOT.glob("*.py"), *ROOT.glob("[a-z]*/*.py"), *ROOT.glob("deploy/*/*.py")]
    for path in paths:
        if path.relative_to(ROOT).parts[0] in ("tests", "benchmarks", "osmo"):
            continue
        for node in ast.walk(ast.parse(path.read_text())):
            modules = [node.module or ""] if isinstance(node, ast.ImportFrom) else []
            modules += [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
            assert "train" not in modules, path
    assert {ROOT / "train.py", ROOT / "training/ranks.py", ROOT / "deploy/ur10e_deploy/report.py"} <= {*paths}


@pytest.mark.parametrize("path", [*ROOT.glob("tests/*.py"), *ROOT.glob("benchmarks/*.py")], ids=lambda p: p.stem)
def test_what_is_run_by_hand_imports_what_exists(path: Path):
    """Soaks and benchmarks run seldom: a name that moved would be missed in the middle of the night."""
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.ImportFrom) and (node.module or "").partition(".")[0] in project_modules():
            module = importlib.import_module(node.module)
            missing = [
                alias.name
                for alias in node.names
                if not hasattr(module, alias.name) and not importlib.util.find_spec(f"{node.module}.{alias.name}")
            ]
            assert not missing, f"{path.name}: {node.module} has no {missing}"


@pytest.mark.parametrize("module", ["rosbag_dataset", "sim.record", "sim.rtde_arm", "sim.world", "sweep"])
def test_what_is_no_policy_loads_no_torch(module: str):
    """Not by way of some library, either: bags are read and recorded, the cell is simulated, and commands are run,
    without any."""
    code = f"import sys, {module}; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], cwd=ROOT).returncode == 0


def test_others_import_what_rosbag_dataset_exports():
    """Outside of tests, from the package itself and by names in __all__: its rooms may move. All but two
    commands, which __init__ does not import, because what trains needs none."""
    assert sorted(rosbag_dataset.__all__) == sorted(set(rosbag_dataset.__all__))
    others = [
        *ROOT.glob("*.py"),
        *(p for f in ("benchmarks", "deploy", "osmo", "sim") for p in ROOT.glob(f"{f}/**/*.py")),
    ]
    used = set()
    for path in others:
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.ImportFrom) and (node.module or "").partition(".")[0] == "rosbag_dataset":
                if node.module in ("rosbag_dataset.exporting", "rosbag_dataset.inspection"):
                    continue
                assert node.module == "rosbag_dataset", f"{path}, line {node.lineno}"
                used |= {alias.name for alias in node.names}
    assert used and used <= set(rosbag_dataset.__all__)


ROOMS = {
    "plain": ("from .b import x", "from .a import y", ["a", "b", "a"]),
    "in a function": ("from .b import x", "def f():\n    from .a import y", ["a", "b", "a"]),
    "for a type checker": ("from . import b", "if TYPE_CHECKING:\n    from . import a", ["a", "b", "a"]),
    "by its full name": ("import box.b", "from box import a", ["a", "b", "a"]),
    "through __init__": ("from . import VERSION", "", ["__init__", "a", "__init__"]),
    "of one room": ("from .a import x", "", ["a", "a"]),
    "none": ("from .b import x\nimport b, os", "import a, torch.nn", []),
}


@pytest.mark.parametrize("a, b, found", ROOMS.values(), ids=list(ROOMS))
def test_circles_are_found(tmp_path: Path, a: str, b: str, found: list[str]):
    """Wherever in a file an import stands; a module of the same name outside the package is another one."""
    package = tmp_path / "box"
    package.mkdir()
    (package / "__init__.py").write_text("from .a import x")
    (package / "a.py").write_text(a)
    (package / "b.py").write_text(b)
    inside, outside = imports_of(package)
    assert circle(inside) == found
    if not found:
        assert outside == {"__init__": set(), "a": {"b", "os"}, "b": {"a", "torch"}}
