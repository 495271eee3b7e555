"""python -m rosbag_dataset list: every file that has to arrive, and nothing else."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

from rosbag_dataset import find_bags, listing
from tests.checks import ROOT


def test_every_file_of_every_recording_is_listed(sample_bags: Path, tmp_path: Path):
    """As a command of its own, into the folder of the bags, which it then does not list; linked recordings are listed
    like others, and named, because OSMO leaves them out."""
    bags = tmp_path / "my bags"
    (bags / "day 1").mkdir(parents=True)
    (bags / "day 1/notes.txt").write_text("no recording")
    for name in ("episode_000", "episode_001"):
        (bags / "day 1" / name).symlink_to(sample_bags / name)
    with (bags / "bags.txt").open("wb") as file:
        done = subprocess.run(
            [sys.executable, "-m", "rosbag_dataset", "list", bags], stdout=file, stderr=subprocess.PIPE, text=True,
            env=os.environ | {"PYTHONPATH": str(ROOT)}, cwd=tmp_path, timeout=60,
        )  # fmt: skip
    assert done.returncode == 0
    links = [bags / "day 1" / name for name in ("episode_000", "episode_001")]
    assert done.stderr.splitlines() == [
        f"note: {link} is a link, which OSMO does not upload: put a copy in its place" for link in links
    ]
    files = sorted(path for link in links for path in link.iterdir())
    expected = [f"{path.stat().st_size}\t{path.relative_to(bags).as_posix()}" for path in files]
    assert (bags / "bags.txt").read_text().splitlines() == expected and len(expected) >= 4
    assert len(find_bags(bags)) == 2, "the list is no recording"


def test_what_cannot_be_listed_is_refused_in_one_line(tmp_path: Path, capsys):
    assert listing.main([str(tmp_path)]) == 1
    assert "found no ROS 2 bag in it" in capsys.readouterr().err
    (tmp_path / "a.mcap").symlink_to(tmp_path / "gone")
    assert listing.main([str(tmp_path)]) == 1
    printed = capsys.readouterr()
    assert printed.err == "error: a.mcap: a.mcap is not there; copy the recording again, or remove it\n"
    assert printed.out == ""
