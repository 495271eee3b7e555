"""The documentation can be followed: links lead somewhere, commands name what exists, the README stays short."""

from __future__ import annotations

import ast
import importlib.util
import re
import shlex
from pathlib import Path

import pytest

from tests.tiny import ROOT

README = ROOT / "README.md"
ARCHITECTURE = ROOT / "docs" / "architecture.md"
PAGES = [
    README,
    ROOT / "CONTRIBUTING.md",
    ROOT / "osmo" / "README.md",
    ROOT / "benchmarks" / "README.md",
    *sorted((ROOT / "docs").glob("*.md")),
    *sorted((ROOT / "deploy").rglob("*.md")),
]
each_page = pytest.mark.parametrize("page", PAGES, ids=lambda page: page.relative_to(ROOT).as_posix())

FENCE = re.compile(r"^ *```(\w*)\n(.*?)^ *```", re.MULTILINE | re.DOTALL)  # a block may be indented, in a list


def prose(page: Path) -> str:
    """The page without its blocks of code."""
    return FENCE.sub("", page.read_text(encoding="utf-8"))


def links(page: Path) -> list[tuple[Path, str]]:
    """(file, anchor) of every relative link and picture on the page; the anchor is "" where there is none."""
    text = re.sub(r"`[^`]*`", "code", prose(page))
    targets = re.findall(r"\]\(([^()\s]+)\)", text)
    split = [target.partition("#") for target in targets if not re.match(r"[a-z]+:", target)]
    return [((page.parent / path).resolve() if path else page, anchor) for path, _, anchor in split]


def anchors(page: Path) -> set[str]:
    """What #... may name on the page: its headings, as GitHub turns them into anchors."""
    headings = re.findall(r"^#+ (.+)$", prose(page), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.strip().lower()).replace(" ", "-") for heading in headings}


def commands(page: Path) -> list[list[str]]:
    """The commands on the page, as words: those of its bash blocks, and what stands in backticks."""
    blocks = [block for language, block in FENCE.findall(page.read_text(encoding="utf-8")) if language == "bash"]
    lines = "\n".join(blocks).replace("\\\n", " ").splitlines()
    spans = [" ".join(span.split()) for span in re.findall(r"`([^`]+)`", prose(page))]
    parts = [part.strip() for line in [*lines, *spans] for part in re.split(r"&&|\|\|", line)]
    found = []
    for part in parts:
        part = re.sub(r"^(\w+=\S* +)+", "", part)  # VARIABLE=value in front
        if re.match(r"(\S*/)?(python|torchrun) |make \w", part):
            found.append(shlex.split(part, comments=True))
    return found


def test_the_readme_is_short():
    lines = README.read_text(encoding="utf-8").splitlines()
    assert len(lines) <= 150
    assert [line for line in lines if len(line) > 120] == []


def test_the_picture_and_the_two_commands_come_first():
    first_screen = "\n".join(README.read_text(encoding="utf-8").splitlines()[:25])
    assert all(wanted in first_screen for wanted in ("](docs/demo.gif)", "make demo", "make test"))


@each_page
def test_links_lead_somewhere(page: Path):
    for target, anchor in links(page):
        assert target.exists(), f"{target} does not exist"
        assert not anchor or anchor in anchors(target), f"{target.name} has no heading #{anchor}"


def test_every_page_is_found_from_the_readme():
    linked = {target for page in (README, ARCHITECTURE) for target, _ in links(page)}
    assert [page.name for page in PAGES if page != README and page not in linked] == []


@each_page
def test_commands_name_programs_that_exist(page: Path):
    targets = re.findall(r"^(\w[\w.-]*):", (ROOT / "Makefile").read_text(encoding="utf-8"), re.MULTILINE)
    for program, *arguments in commands(page):
        if program == "make":
            assert arguments[0] in targets, f"make {arguments[0]}"
        elif arguments[0] == "-m":
            assert importlib.util.find_spec(arguments[1]), f"python -m {arguments[1]}"
            missing = [word for word in arguments if word.startswith("tests/") and not (ROOT / word).exists()]
            assert not missing, missing
        elif script := next((word for word in arguments if word.endswith(".py")), None):
            assert (ROOT / script).is_file(), f"{script} does not exist"


# -- the map of the code ------------------------------------------------------------------------------------------


def names_in(path: Path) -> set[str]:
    """What a Python file defines: functions, classes, methods as Class.method, and names assigned at the top."""
    found: set[str] = set()
    for node in ast.parse(path.read_text(encoding="utf-8")).body:
        if isinstance(node, (ast.FunctionDef, ast.ClassDef)):
            found.add(node.name)
            methods = node.body if isinstance(node, ast.ClassDef) else []
            found |= {f"{node.name}.{method.name}" for method in methods if isinstance(method, ast.FunctionDef)}
        elif isinstance(node, (ast.Assign, ast.AnnAssign)):
            targets = node.targets if isinstance(node, ast.Assign) else [node.target]
            found |= {target.id for target in targets if isinstance(target, ast.Name)}
    return found


def map_entries() -> list[tuple[str, str]]:
    """(file, name defined in it or "") of every `file` and `file`: `name`, `name` on the architecture page."""
    entries = []
    pattern = r"`([\w/.-]+\.(?:py|sh|yaml|md))`(?::((?:,? (?:and )?`[\w.]+`)+))?"
    for file, names in re.findall(pattern, prose(ARCHITECTURE)):
        defined = re.findall(r"`([\w.]+)`", names)
        entries += [(file, name) for name in defined] or [(file, "")]
    return entries


@pytest.mark.parametrize("file, name", map_entries())
def test_the_map_names_what_exists(file: str, name: str):
    """A room or function that was renamed would send a newcomer nowhere."""
    path = next((p for p in (ROOT / file, *ROOT.glob(f"*/{file}")) if p.is_file()), None)
    assert path, f"{file} does not exist"
    assert not name or name in names_in(path), f"{file} defines no {name}"


def test_the_map_leads_through_every_package():
    assert len(map_entries()) > 40
    folders = {file.partition("/")[0] for file, _ in map_entries()}
    assert {"training", "rosbag_dataset", "lerobot_checkpoint", "deploy", "osmo", "benchmarks"} <= folders


def test_train_py_can_be_read_in_one_sitting():
    """What grows past this has a room of its own in training/."""
    assert len((ROOT / "train.py").read_text(encoding="utf-8").splitlines()) <= 700
