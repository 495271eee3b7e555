"""The guide's first section, executed as it is written: from nothing to a checkpoint, and to a sweep's comparison.

`osmo` is tests/osmo_cluster.py, which runs the tasks for real; `docker` is nothing, because the tasks run on this
machine's packages. What a user would edit in submit.yaml makes the runs small.
"""

from __future__ import annotations

import json
import re
import subprocess
import sys
from pathlib import Path

import pytest

from lerobot_checkpoint import file_sha256, list_checkpoints, verify_checkpoint
from tests.once import once
from tests.osmo_cluster import calls, install
from tests.osmo_spec import GUIDE
from tests.osmo_task import require
from tests.tiny import ROOT, TINY

EDITS = {
    **TINY, "training.steps": 4, "training.save_freq": 2, "eval_device": "cpu", "eval_args": "--backend native",
    "sweep": "training.kl_weight=10,1",
}  # fmt: skip


def commands_of(section: str) -> list[str]:
    """The shell blocks of a section of the guide, up to its next heading."""
    text = GUIDE.read_text().partition(f"## {section}\n")[2]
    return re.findall(r"```bash\n(.*?)```", re.split(r"^##", text, flags=re.MULTILINE)[0], re.DOTALL)


@pytest.fixture(scope="session")
def followed(sample_bags: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder in which the section was followed: checkout, the recordings beside it, cluster, log.txt."""
    require()

    def make(folder: Path) -> None:
        checkout = folder / "checkout"
        (checkout / "osmo").mkdir(parents=True)
        for path in [*ROOT.iterdir(), *(ROOT / "osmo").iterdir()]:  # links, but for what submit.py looks for beside it
            copy = checkout / path.relative_to(ROOT)
            if path.name not in ("osmo", "submit.yaml", "__pycache__", ".git"):
                copy.write_bytes(path.read_bytes()) if path.parent.name == "osmo" else copy.symlink_to(path)
        (folder / "rosbag-to-lerobot").mkdir()
        (folder / "rosbag-to-lerobot/local_bags").symlink_to(sample_bags)
        environment = install(folder / "cluster")
        for name, text in {"docker": "exit 0", "python": f'exec "{sys.executable}" "$@"'}.items():
            (folder / "cluster/bin" / name).write_text(f"#!/bin/sh\n{text}\n")
            (folder / "cluster/bin" / name).chmod(0o755)
        environment["PYTHONPATH"] = str(checkout / "deploy")
        once_, *rest = commands_of("In three steps")
        edits = "".join(f"{key}: {value}\n" for key, value in EDITS.items())
        script = "\n".join(["set -euo pipefail", once_, f"cat >>osmo/submit.yaml <<'END'\n{edits}END", *rest])
        done = subprocess.run(
            ["bash", "-c", script], cwd=checkout, env=environment, capture_output=True, text=True, timeout=600
        )
        (folder / "log.txt").write_text(done.stdout + done.stderr)
        assert done.returncode == 0, done.stdout[-5000:] + done.stderr[-3000:]

    return once(tmp_path_factory, "osmo-guide", make)


def test_three_steps_lead_to_a_checkpoint(followed: Path):
    """Whole, on the recordings of the folder that the example names."""
    run = followed / "checkout/results/ur10e-act-checkpoint/train-rosbag-act"
    last = list_checkpoints(run)[-1]
    verify_checkpoint(last)
    assert last.name == "checkpoint_000004"
    contract = json.loads((last / "pretrained_model/train_config.json").read_text())
    episodes = contract["training_episodes"] + contract["held_out_episodes"]
    assert sorted(episodes) == [f"episode_{i:03d}" for i in range(6)], "named as at home"


def test_one_more_leads_to_a_comparison(followed: Path):
    """Each arm has its own settings; all are evaluated on what they held out, and ranked in one table."""
    results = followed / "checkout/results/ur10e-act-sweep-comparison"
    table = (results / "comparison.txt").read_text()
    assert sorted(re.findall(r"^\s*(\d)  (kl\d+) ", table, re.MULTILINE))[0][0] == "1", table
    assert set(re.findall(r"  (kl\d+) ", table)) == {"kl10", "kl1"} and "different sets of frames" not in table
    assert (results / "comparison.png").read_bytes().startswith(b"\x89PNG")
    for arm, kl_weight in (("kl10", 10.0), ("kl1", 1.0)):
        (handed,) = (followed / f"cluster/datasets/ur10e-act-sweep-{arm}").glob("*/train-rosbag-act")
        path = list_checkpoints(handed)[-1] / "pretrained_model/train_config.json"
        contract = json.loads(path.read_text())
        assert contract["config"]["training"]["kl_weight"] == kl_weight
        summary = json.loads((results / arm / "summary.json").read_text())
        assert summary["policy"]["weights_sha256"] == file_sha256(path.with_name("model.safetensors")), "another arm's"
        assert [episode["name"] for episode in summary["episodes"]] == contract["held_out_episodes"] != []
        assert (results / arm / "report.html").exists()


def test_the_recordings_went_up_once(followed: Path):
    """The second submission found them; each command that was shown is one that ran."""
    kinds = [" ".join(words[:2]) for words in calls(followed / "cluster")]
    first = [
        "dataset info",
        "workflow validate",
        "dataset upload",
        "dataset info",
        "workflow submit",
        "dataset download",
    ]
    assert kinds == ["login https://192.168.1.100/", *first, "dataset info", "workflow submit", "dataset download"]
    log = (followed / "log.txt").read_text()
    assert "the bags are there already, as ur10e-rosbags:bags-" in log and "held out: episode_" in log
    assert log.count("$ osmo workflow submit osmo/osmo-workflow") == 2
