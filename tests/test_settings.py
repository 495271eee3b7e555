"""The reader of settings knows no key: it reads YAML and overrides into any schema of dataclasses."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path

import pytest

from training.errors import ConfigError
from training.settings import read_settings, setting


@dataclass
class Gripper:
    force_n: float = setting(20.0, "closing force, N", low=1)
    name: str | None = setting(None, "its name")
    where: str = setting("maps", "a folder, or the word anywhere", path=True, words=("anywhere",))
    fingers: list[int] = setting([1, 2], "which fingers")


@dataclass
class Schema:
    gripper: Gripper = field(default_factory=Gripper)


def read(tmp_path: Path, text: str = "", *overrides: str) -> Gripper:
    (tmp_path / "my.yaml").write_text(text)
    return read_settings(Schema(), tmp_path / "my.yaml", overrides).gripper


def test_defaults_file_and_overrides_in_this_order(tmp_path: Path):
    assert read(tmp_path) == Gripper(where=str(tmp_path / "maps"))
    assert read(tmp_path, "gripper: {force_n: 5e1, name: 007}").force_n == 50.0
    assert read(tmp_path, "gripper: {force_n: 5e1, name: 007}", "gripper.force_n=3").name == "007"
    assert read(tmp_path, "gripper: {fingers: [3]}", "gripper.fingers=[4, 5]").fingers == [4, 5]


def test_a_default_list_is_not_shared(tmp_path: Path):
    read(tmp_path).fingers.append(9)
    assert read(tmp_path).fingers == [1, 2]


def test_a_word_is_no_path(tmp_path: Path):
    assert read(tmp_path, "gripper: {where: anywhere}").where == "anywhere"
    assert read(tmp_path, "gripper: {where: ../anywhere}").where == str(tmp_path.parent / "anywhere")


# What pydantic would have let pass, or would have said less clearly: see docs/architecture.md.
@pytest.mark.parametrize("text, words", [
    ("gripper: {force: 3}", "unknown key gripper.force; did you mean gripper.force_n?"),
    ("griper: {}", "unknown key griper; did you mean gripper?"),
    ("gripper: {force_n: nan}", "gripper.force_n: found 'nan', expected a number (closing force, N)"),
    ("gripper: {force_n: 0.5}", "found '0.5', expected at least 1"),
    ("gripper: {fingers: ['5.0']}", "gripper.fingers: found a list ['5.0'], expected a list of whole numbers"),
    ("gripper: {name: a, name: b}", "key 'name' given twice"),
    ("gripper: [", "not valid YAML at line 1"),
])  # fmt: skip
def test_a_mistake_is_one_line_that_names_file_key_and_what_was_expected(tmp_path: Path, text: str, words: str):
    with pytest.raises(ConfigError) as error:
        read(tmp_path, text)
    assert words in str(error.value) and "my.yaml" in str(error.value) and "\n" not in str(error.value)
