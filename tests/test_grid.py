"""Grids of settings: which runs a sweep has, and what they are called."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

import train
from tests.tiny import ROOT
from training.errors import ConfigError
from training.grid import EXAMPLE, main, parse_grid


def test_the_documents_six_arms():
    """Their names, values and order."""
    arms = {arm.name: arm.settings for arm in parse_grid(EXAMPLE)}
    assert list(arms) == ["lr1e5-kl10", "lr5e5-kl10", "lr1e4-kl10", "lr1e5-kl1", "lr5e5-kl1", "lr1e4-kl1"]
    assert arms["lr5e5-kl10"] == ("training.lr=5e-5", "training.kl_weight=10")


def test_any_setting_can_be_swept():
    """Lists are one value, and train.py takes what comes out."""
    arms = parse_grid("conventions.image_resize=[240,320],[120,160],null training.scheduler=none,cosine")
    assert [arm.name for arm in arms[:3]] == ["image_resize240_320-schedulernone", "image_resize120_160-schedulernone",
                                              "image_resizenull-schedulernone"]  # fmt: skip
    configs = [train.load_config(ROOT / "config.yaml", arm.settings) for arm in arms]
    assert [c.conventions.image_resize for c in configs] == [[240, 320], [120, 160], None] * 2
    assert [c.training.scheduler for c in configs] == ["none"] * 3 + ["cosine"] * 3


def test_a_grid_in_a_file(tmp_path: Path):
    """The example is the documents' six arms; a list is one value; only OSMO limits how many arms there are."""
    assert parse_grid(str(ROOT / "grid.example.yaml")) == parse_grid(EXAMPLE)
    file = tmp_path / "grid.yaml"
    file.write_text("conventions.image_resize: [[240, 320], null]\ntraining.seed: [1, 02]\n")
    arms = [arm.settings for arm in parse_grid(str(file))]
    assert arms[0] == ("conventions.image_resize=[240,320]", "training.seed=1")
    assert arms[3] == ("conventions.image_resize=null", "training.seed=02")
    file.write_text(f"training.seed: {list(range(25))}\n")
    assert len(parse_grid(str(file), osmo=False)) == 25
    with pytest.raises(ConfigError, match="found 25 runs, expected at most 19"):
        parse_grid(str(file))


FILES_REFUSED = {
    "one value": ("training.lr: 1e-4\n", "grid: FILE: found {'training.lr': '1e-4'}, expected section.key: [value,"),
    "no mapping": ("- 1\n", "grid: FILE: found ['1'], expected section.key: [value,"),
    "nothing": ("", "grid: FILE: found None, expected section.key: [value,"),
    "no values": ("training.lr: []\n", "grid: found training.lr, expected section.key=value,value,..."),
    "a key twice": ("a.b: [1]\na.b: [2]\n", "grid: FILE: not valid YAML at line 2, column 1: key 'a.b' given twice"),
    "a value twice": ("a.b: [1, 1.0]\n", "grid: a.b=1,1.0: found a value twice"),
    "no file": (None, "grid: FILE: cannot read it (No such file or directory)"),
}


@pytest.mark.parametrize("text, message", FILES_REFUSED.values(), ids=list(FILES_REFUSED))
def test_a_file_that_is_no_grid_is_one_line(tmp_path: Path, text: str | None, message: str):
    if text is not None:
        (tmp_path / "grid.yaml").write_text(text)
    with pytest.raises(ConfigError) as refusal:
        parse_grid(str(tmp_path / "grid.yaml"))
    line = str(refusal.value).replace(str(tmp_path / "grid.yaml"), "FILE")
    assert line.startswith(message) and "\n" not in line


LABELS = {"1e-4": "1e4", "0.0001": "1e4", "2.5e-05": "2_5e5", "1e4": "10000", "10.0": "10", "0.5": "0_5", "-1": "m1",
          "1e7": "10000000", "1e12": "1ep12", "0": "0", "true": "true", "/a/b.pt": "a_b_pt"}  # fmt: skip


@pytest.mark.parametrize("value, label", LABELS.items())
def test_a_number_has_one_name_however_it_is_written(value: str, label: str):
    (arm,) = parse_grid(f"training.lr={value}")
    assert arm.name == f"lr{label}" and arm.settings == (f"training.lr={value}",)


REFUSED = {
    "nothing": ("", "found nothing, expected for example training.lr="),
    "no values": ("training.lr=", "found training.lr=, expected section.key=value,value"),
    "no key": ("1e-5,1e-4", "found 1e-5,1e-4, expected section.key=value"),
    "no section": ("lr=1e-5", "found lr=1e-5, expected section.key=value"),
    "an empty value": ("training.lr=1e-5,", "found training.lr=1e-5,, expected"),
    "a key twice": ("training.lr=1e-5 training.lr=1e-4", "training.lr: found it twice, expected each key once"),
    "a value twice": ("training.lr=1e-4,0.0001", "training.lr=1e-4,0.0001: found a value twice"),
    "two of one name": (
        "training.lr=[1,2],[1_2]",
        "found lr1_2:training.lr=[1,2] and lr1_2:training.lr=[1_2], expected",
    ),
    "a quote": ('training.lr="1"', 'found ", expected values without quotes'),
    "a semicolon": ("training.lr=1;2", "found ;, expected values without"),
    "21 runs": (f"training.seed={','.join(map(str, range(21)))}", "found 21 runs, expected at most 19"),
    "a long name": ("training.output_dir=/" + 50 * "x", "found a name of 60, expected at most 51 characters"),
}


@pytest.mark.parametrize("text, message", REFUSED.values(), ids=list(REFUSED))
def test_refused_before_anything_is_submitted(text: str, message: str):
    with pytest.raises(ConfigError) as refusal:
        parse_grid(text)
    assert message in str(refusal.value) and "\n" not in str(refusal.value)


def test_the_command(capsys: pytest.CaptureFixture[str]):
    """Settings as words or as one text; a mistake is one line and 1. It needs no torch, and so no time."""
    assert main(EXAMPLE.split()) == main([EXAMPLE]) == 0
    printed = capsys.readouterr().out.splitlines()
    assert printed[:6] == printed[6:] and printed[5] == "lr1e4-kl1:training.lr=1e-4;training.kl_weight=1"
    assert main([]) == 1 and capsys.readouterr().err.count("\n") == 1
    code = "import sys, training.grid; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], cwd=ROOT, timeout=60).returncode == 0
