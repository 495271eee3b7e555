"""Imports inside a package run one way, so that each of its files can be read knowing only those that it imports."""

from __future__ import annotations

import ast
from graphlib import TopologicalSorter
from pathlib import Path

import pytest

from tests.tiny import ROOT

PACKAGES = (ROOT / "lerobot_checkpoint", ROOT / "deploy/ur10e_deploy")


def imports(path: Path) -> list[tuple[int, str]]:
    """(level, dotted name) of every import in a file, also of those in functions or under TYPE_CHECKING."""
    found = []
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            found += [(0, alias.name) for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            found += [(node.level, node.module)] if node.module else [(node.level, alias.name) for alias in node.names]
    return found


@pytest.mark.parametrize("package", PACKAGES, ids=lambda path: path.name)
def test_imports_inside_a_package_run_one_way(package: Path):
    """No circle, and siblings are imported by relative names, so that none escapes this test."""
    graph = {path.stem: imports(path) for path in package.glob("*.py")}
    for name, found in graph.items():
        assert not [module for level, module in found if level == 0 and module.split(".")[0] == package.name], name
    order = TopologicalSorter({name: [m for level, m in found if level] for name, found in graph.items()})
    assert set(order.static_order()) == set(graph)  # raises CycleError, which names the circle


def test_checkpoints_know_nothing_of_training():
    """A robot has this package and act_model.py, and no LeRobot."""
    found = {module.split(".")[0] for path in PACKAGES[0].glob("*.py") for level, module in imports(path) if not level}
    assert not found & {"lerobot", "train", "augment", "rosbag_dataset", "run_summary", "wandb", "ur10e_deploy"}
