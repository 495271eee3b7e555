"""MLflow, a real server: what a run logs there, how a resumed one goes on, and what a server costs that is away."""

from __future__ import annotations

import signal
import time
from pathlib import Path
from typing import Any

import pytest

import train
from lerobot_checkpoint import verify_checkpoint
from tests.azurite import free_port
from tests.checks import wait_for
from tests.mlflow_server import PYTHON, MlflowServer
from tests.tiny import arguments, error_line, metrics, run, run_process, start, torchrun, wait_for_step
from training import mlflow_tracker
from training.metrics import METRICS
from training.trackers import MlflowConfig

pytestmark = [
    pytest.mark.skipif(not PYTHON.exists(), reason="no MLflow server: make .venv-mlflow/installed"),
    pytest.mark.xdist_group("mlflow"),
]


def history(server: MlflowServer, run_id: str, key: str) -> list[tuple[int, float]]:
    return sorted((metric.step, metric.value) for metric in server.client.get_metric_history(run_id, key))


def in_metrics(output_dir: Path, key: str) -> list[tuple[int, float]]:
    return [(line["step"], line[key]) for line in metrics(output_dir, key)]


def newest_run(server: MlflowServer) -> Any:
    return max(server.runs(), key=lambda each: each.info.start_time)


def test_a_run_is_logged_and_continued(mlflow_server: MlflowServer, sample_bags: Path, tmp_path: Path):
    """Parameters, every line with its own step, tags, pages, the best checkpoint as a model; a resumed run goes on
    under the same id, a changed setting becomes a tag, and no line is there twice."""
    asked = {
        "mlflow__enabled": "true", "mlflow__tracking_uri": mlflow_server.uri, "mlflow__run_name": "001",
        "mlflow__tags": "{cell: north}", "training__save_freq": 3,
    }  # fmt: skip
    output = run(sample_bags, tmp_path, training__steps=3, **asked)
    first = newest_run(mlflow_server)
    assert first.info.status == "FINISHED" and first.info.run_name == "001"
    asked |= {"training__lr": "2e-5", "mlflow__registered_model": "ur10e"}
    run(sample_bags, tmp_path, "--resume", training__steps=6, **asked)
    logged = newest_run(mlflow_server)
    assert logged.info.run_id == first.info.run_id and logged.info.status == "FINISHED"
    assert logged.data.params["training.lr"] != "2e-05" and logged.data.params["data.fps"] == "30.0"
    assert logged.data.tags["changed.training.lr"].endswith("-> 2e-05 at step 3")
    assert logged.data.tags["cell"] == "north" and len(logged.data.tags["bags.sha256"]) == 64
    for key in ("loss", "grad_norm", "samples_per_s_wall", "val_l1_loss"):
        assert history(mlflow_server, logged.info.run_id, key) == in_metrics(output, key)
    names = {file.path for file in mlflow_server.client.list_artifacts(logged.info.run_id)}
    assert names >= {"summary.json", "summary.png", "sync_report.json", "train_config.json", METRICS}
    assert "observation.images.color.png" in names
    (version,) = mlflow_server.client.search_model_versions("name='ur10e'")
    best = mlflow_server.client.download_artifacts(version.run_id, version.source.rpartition("/")[2], str(tmp_path))
    verify_checkpoint(Path(best))


def test_a_killed_run_is_taken_up(mlflow_server: MlflowServer, sample_bags: Path, tmp_path: Path):
    """SIGKILL leaves a run that the resumed one continues; steps that are done again, with the same values, are not
    there twice."""
    asked = {"mlflow__enabled": "true", "mlflow__tracking_uri": mlflow_server.uri, "training__log_freq": 1}
    before = {each.info.run_id for each in mlflow_server.runs()}
    process = start(sample_bags, tmp_path, training__steps=5000, training__save_freq=4, **asked)
    wait_for((tmp_path / "run/last").exists, seconds=60)
    wait_for_step(tmp_path / "run", 7, process)
    process.kill()
    process.communicate()
    run(sample_bags, tmp_path, "--resume", training__steps=12, training__save_freq=4, **asked)
    (logged,) = [each for each in mlflow_server.runs() if each.info.run_id not in before]
    steps = [step for step, _ in history(mlflow_server, logged.info.run_id, "loss")]
    assert steps == sorted(set(steps)) and steps[:8] == list(range(1, 9))


def test_of_two_ranks_one_logs(mlflow_server: MlflowServer, sample_bags: Path, tmp_path: Path):
    before = len(mlflow_server.runs())
    done = run_process(
        sample_bags, tmp_path, launcher=torchrun(2), training__steps=2, mlflow__enabled="true",
        mlflow__tracking_uri=mlflow_server.uri,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert len(mlflow_server.runs()) == before + 1 and newest_run(mlflow_server).info.status == "FINISHED"


def test_a_stopped_run_says_so(mlflow_server: MlflowServer, sample_bags: Path, tmp_path: Path):
    """SIGTERM: the run is KILLED there, not FAILED, and is saved and left within the time that a stop has."""
    process = start(
        sample_bags, tmp_path, mlflow__enabled="true", mlflow__tracking_uri=mlflow_server.uri, training__steps=5000,
        training__log_freq=1,
    )  # fmt: skip
    wait_for_step(tmp_path / "run", 2, process)
    process.send_signal(signal.SIGTERM)
    process.communicate(timeout=60)
    assert process.returncode == 75 and newest_run(mlflow_server).info.status == "KILLED"


def test_a_server_that_is_away_costs_nothing(
    mlflow_server: MlflowServer, sample_bags: Path, tmp_path: Path, monkeypatch, capsys
):
    """Away all the time: one note at the start, one at the end, exit 0. The run that resumes sends what is missing."""
    monkeypatch.setattr(mlflow_tracker, "PATIENCE_AWAY_S", 0.5)
    away = f"http://127.0.0.1:{free_port()}"
    output = run(sample_bags, tmp_path, training__steps=3, mlflow__enabled="true", mlflow__tracking_uri=away)
    said = capsys.readouterr().err
    assert f"note: mlflow: {away} does not take what is logged" in said and "lines of metrics could not" in said
    run(
        sample_bags, tmp_path, "--resume", training__steps=6, mlflow__enabled="true",
        mlflow__tracking_uri=mlflow_server.uri,
    )  # fmt: skip
    for key in ("loss", "val_l1_loss"):
        assert history(mlflow_server, newest_run(mlflow_server).info.run_id, key) == in_metrics(output, key)


def test_what_can_never_be_logged_is_refused_at_once(mlflow_server: MlflowServer, sample_bags: Path, tmp_path: Path):
    """A store that is none, before the first step."""
    result = run_process(sample_bags, tmp_path, mlflow__enabled="true", mlflow__tracking_uri="nonsense://x")
    assert "nonsense://x refuses" in error_line(result) and "mlflow.tracking_uri" in error_line(result)
    assert not (tmp_path / "run/metrics.jsonl").exists() and result.returncode == 1


PASSWORD = "MLFLOW_TRACKING_PASSWORD"
NOT_KNOWN = "does not know MLFLOW_TRACKING_USERNAME and MLFLOW_TRACKING_PASSWORD"


def test_a_wrong_password(mlflow_server: MlflowServer, sample_bags: Path, tmp_path: Path, monkeypatch, capsys):
    """A run that begins is refused before its first step, in one line. One that goes on, goes on without a step less:
    one line says what is wrong, one at the end how much is missing, and the next attempt sends it."""
    right = mlflow_server.credentials[PASSWORD]
    asked = {"mlflow__enabled": "true", "mlflow__tracking_uri": mlflow_server.uri, "training__log_freq": 1}
    monkeypatch.setenv(PASSWORD, "wrong")
    assert train.main(arguments(sample_bags, tmp_path, **asked)) == 1
    (line,) = [line for line in capsys.readouterr().err.splitlines() if "mlflow" in line]
    assert line.startswith(f"error: mlflow.enabled: {mlflow_server.uri} refuses (it {NOT_KNOWN}")
    assert not (tmp_path / "run/metrics.jsonl").exists()

    monkeypatch.setenv(PASSWORD, right)
    run(sample_bags, tmp_path, training__steps=2, **asked)
    begun = newest_run(mlflow_server)
    monkeypatch.setenv(PASSWORD, "wrong")
    output = run(sample_bags, tmp_path, "--resume", training__steps=4, **asked)
    first, last = [line for line in capsys.readouterr().err.splitlines() if "mlflow" in line]
    assert first.startswith("note: ") and NOT_KNOWN in first and first.endswith("training goes on, and no more is sent")
    assert last.startswith("note: ") and "lines of metrics could not be sent" in last
    assert [step for step, _ in in_metrics(output, "loss")] == [1, 2, 3, 4]

    monkeypatch.setenv(PASSWORD, right)
    run(sample_bags, tmp_path, "--resume", training__steps=5, **asked)
    for key in ("loss", "val_l1_loss"):
        assert history(mlflow_server, begun.info.run_id, key) == in_metrics(output, key)


def test_a_password_that_changes_in_the_middle(mlflow_server: MlflowServer, tmp_path: Path, monkeypatch, capsys):
    """Training waits for nothing and hears of it once."""
    tracker = mlflow_tracker.MlflowTracker(MlflowConfig(True, mlflow_server.uri), tmp_path, None, 0, {}, {})
    tracker.log({"step": 1, "loss": 1.0})
    wait_for(lambda: history(mlflow_server, tracker.id, "loss"))
    monkeypatch.setenv(PASSWORD, "wrong")
    for step in range(2, 102):
        tracker.log({"step": step, "loss": 1 / step})
    tracker.finish(0)
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) == 2 and NOT_KNOWN in lines[0] and "100 lines of metrics could not be sent" in lines[1], lines


def test_an_earlier_run_that_is_not_there(mlflow_server: MlflowServer, tmp_path: Path, monkeypatch, capsys):
    """Of a checkpoint: said, and a new one begins. Of the environment (Azure ML's): taken up, or refused."""
    section = MlflowConfig(True, mlflow_server.uri)
    begun = mlflow_tracker.MlflowTracker(section, tmp_path, "f" * 32, 0, {}, {})
    assert "has no run ffff" in capsys.readouterr().err and begun.id != "f" * 32
    monkeypatch.setenv("MLFLOW_RUN_ID", begun.id)
    taken = mlflow_tracker.MlflowTracker(section, tmp_path, None, 0, {}, {})
    taken.finish(0)
    assert taken.id == begun.id and mlflow_server.client.get_run(begun.id).info.status == "RUNNING"
    monkeypatch.setenv("MLFLOW_RUN_ID", "e" * 32)
    with pytest.raises(mlflow_tracker.ConfigError, match="refuses"):
        mlflow_tracker.MlflowTracker(section, tmp_path, None, 0, {}, {})


def test_a_server_that_comes_back_gets_every_line(mlflow_server: MlflowServer, tmp_path: Path, monkeypatch, capsys):
    """It goes away in the middle: lines wait, in order and bounded, and training never waits for them."""
    monkeypatch.setattr(mlflow_tracker, "RETRY_S", 0.1)
    monkeypatch.setattr(mlflow_tracker, "LINES_KEPT", 200)
    tracker = mlflow_tracker.MlflowTracker(MlflowConfig(True, mlflow_server.uri), tmp_path, None, 0, {}, {})
    tracker.log({"step": 1, "loss": 1.0})
    wait_for(lambda: history(mlflow_server, tracker.id, "loss"))
    mlflow_server.stop()
    begun = time.monotonic()
    for step in range(2, 302):
        tracker.log({"step": step, "loss": 1 / step})
    assert time.monotonic() - begun < 1
    wait_for(lambda: tracker._away)
    mlflow_server.start()
    tracker.finish(0)
    steps = [step for step, _ in history(mlflow_server, tracker.id, "loss")]
    assert steps[0] == 1 and steps[-1] == 301 and 200 <= len(steps) < 301
    assert f"{301 - len(steps)} lines of metrics could not be sent" in capsys.readouterr().err
