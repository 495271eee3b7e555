"""The list of planted bugs stays true: what it changes is there, and so are the tests that it names."""

from __future__ import annotations

import ast
from collections import Counter

import pytest

from tests.mutants import MUTANTS, ROOT, Mutant, places


@pytest.mark.parametrize("mutant", MUTANTS, ids=lambda m: m.name)
def test_a_mutant_can_be_planted(mutant: Mutant):
    """Its text stands exactly once in its file, what is planted there is Python, and its test exists."""
    assert places(mutant) == 1, f"{mutant.file}: mend the mutant in tests/mutants.py, or leave it out there"
    planted = (ROOT / mutant.file).read_text().replace(mutant.text, mutant.planted)
    assert ast.dump(ast.parse(planted)) != ast.dump(ast.parse((ROOT / mutant.file).read_text()))
    file, _, function = mutant.test.partition("::")
    tests = ast.parse((ROOT / "tests" / file).read_text()).body
    assert function.partition("[")[0] in {node.name for node in tests if isinstance(node, ast.FunctionDef)}


def test_there_are_enough_of_them():
    """Each has a name of its own, and each area some."""
    assert len({mutant.name for mutant in MUTANTS}) == len(MUTANTS) >= 60
    areas = Counter(mutant.name.split(": ")[0] for mutant in MUTANTS)
    assert {"step", "schedule", "resume", "best", "split", "statistics", "synchronisation", "actions", "normalisation",
            "checkpoint", "runner"} <= {area for area, count in areas.items() if count > 2}, areas  # fmt: skip
