"""metrics.jsonl holds whole lines only, whatever the disk does."""

from __future__ import annotations

import errno
import os
import subprocess
import sys
from pathlib import Path

import train
from tests.tiny import ROOT, arguments, run
from training.metrics import Pace, read_metrics

FULL_DISK = """
import resource, sys
from pathlib import Path
from training.metrics import append_line
path = Path(sys.argv[1])
path.write_text('{"step": 1}\\n')
resource.setrlimit(resource.RLIMIT_FSIZE, (20, 20))  # as a full disk does: room for a part of the line, then none
for step in (2, 3):
    try:
        append_line(path, '{"step": %d, "loss": 0.5}' % step)
    except OSError as error:
        print(Path(error.filename).name, error.strerror)
"""


def test_a_line_that_the_disk_has_no_room_for_is_not_there_at_all(tmp_path: Path):
    """Half a line would be glued to the next one, and break whoever reads metrics.jsonl."""
    command = [sys.executable, "-c", FULL_DISK, str(tmp_path / "metrics.jsonl")]
    done = subprocess.run(command, env={**os.environ, "PYTHONPATH": str(ROOT)}, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert len(done.stdout.splitlines()) == 2 and all(line.startswith("metrics") for line in done.stdout.splitlines())
    assert (tmp_path / "metrics.jsonl").read_text() == '{"step": 1}\n'


def test_metrics_that_cannot_be_opened_stop_or_go_on_as_asked(sample_bags: Path, tmp_path: Path, capsys, monkeypatch):
    """on_save_error decides; what is lost is said, and what was torn before does not break the summary."""

    def gone(path: Path, line: str) -> None:
        raise OSError(errno.ESTALE, os.strerror(errno.ESTALE), str(path))

    monkeypatch.setattr("training.metrics.append_line", gone)
    run(sample_bags, tmp_path, training__on_save_error="continue")
    assert "metrics.jsonl: Stale file handle; step 2 is not in it" in capsys.readouterr().err
    assert train.main(arguments(sample_bags, tmp_path / "stop")) == 1
    assert "metrics.jsonl: Stale file handle; continue with --resume" in capsys.readouterr().err


def test_a_torn_line_of_metrics_is_passed_over(tmp_path: Path):
    (tmp_path / "metrics.jsonl").write_text(
        '{"step": 1, "loss": 2.0}\n{"step": 2, "lo\n{"step": 2, "val_l1_loss": 3.0}\n'
    )
    training, validation = read_metrics(tmp_path / "metrics.jsonl")
    assert training == [{"step": 1, "loss": 2.0}] and validation == [{"step": 2, "val_l1_loss": 3.0}]


def test_the_wall_clock_counts_saving_and_validation(monkeypatch):
    """Ten steps in 2 s of training, 1 s of it waiting for data, and 3 s of saving: 5 steps a second, 2 by the clock."""
    now_s = [0.0]
    monkeypatch.setattr("training.metrics.time.perf_counter", lambda: now_s[0])
    pace = Pace()
    with pace.waiting():
        now_s[0] += 1
    now_s[0] += 1
    with pace.paused():
        now_s[0] += 3
    assert pace.read(10) == (5.0, 2.0, 0.5)
    pace.restart(10)
    now_s[0] += 1
    assert pace.read(14) == (4.0, 4.0, 0.0)
