"""MLflow as a tracker: what a run logs to a tracking server, which may be away.

Knows: MLflow's client, how to keep lines until a server is back, how a resumed run continues its earlier one.
Must not know: the trainer, its settings' names (they come as a mapping), when a line is logged.

A line goes into a queue; a thread of its own sends what is there, so that a slow or absent server costs no step. All
lines stand in metrics.jsonl as well: what could not be sent before the end is sent by the run that resumes.
"""

from __future__ import annotations

import logging
import os
import sys
import threading
import time
from collections import deque
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from .errors import ConfigError
from .metrics import METRICS, metrics_lines

LINES_KEPT = 100_000  # while the server is away: days at a line every few seconds, some 50 MB
LINES_AT_ONCE = 50  # a request may hold 1,000 metrics
RETRY_S = 10.0  # between two attempts to send
# At the end, for what is left: where the server is away; where it answers (a model takes its time); where the run was
# stopped or has failed, and whoever ended it may not wait.
PATIENCE_AWAY_S, PATIENCE_S, PATIENCE_STOPPED_S = 60.0, 1800.0, 5.0
LONGEST = 6_000  # characters, MLflow's limit
KINDS = ("loss", "val_l1_loss")  # of the lines: each has one of these
# Answers of a server that can be reached and will never take this.
FINAL = {"RESOURCE_DOES_NOT_EXIST", "INVALID_PARAMETER_VALUE", "PERMISSION_DENIED", "UNAUTHENTICATED", "INVALID_STATE"}
STATUS = {0: "FINISHED", 75: "KILLED"}  # by the exit code of train.py; any other: FAILED
# What the end of a run hands over, of the output directory.
ARTIFACTS = ("summary.png", "summary.json", "sync_report.json", "last/pretrained_model/train_config.json", METRICS)


def import_mlflow() -> Any:
    """The package mlflow (mlflow-skinny is enough). Raises ConfigError when it is missing."""
    # Its client waits up to two minutes in an attempt, and tries seven times: here, a thread tries again.
    os.environ.setdefault("MLFLOW_HTTP_REQUEST_TIMEOUT", "20")
    os.environ.setdefault("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "1")
    logging.getLogger("urllib3.connectionpool").setLevel(logging.ERROR)  # it would tell each attempt
    try:
        import mlflow
    except ImportError:
        raise ConfigError(
            "mlflow.enabled: true, but the package mlflow is not installed; "
            "run: pip install mlflow-skinny, or set mlflow.enabled to false"
        ) from None
    return mlflow


def flat(settings: Mapping[str, Any], prefix: str = "") -> dict[str, str]:
    """Nested settings as MLflow's parameters: {"training.lr": "1e-05", ...}."""
    params: dict[str, str] = {}
    for key, value in settings.items():
        if isinstance(value, Mapping) and value:
            params |= flat(value, f"{prefix}{key}.")
        else:
            params[f"{prefix}{key}"] = str(value)[:LONGEST]
    return params


class MlflowTracker:
    """A run on an MLflow tracking server, or the hope of one; same interface as a run of wandb.

    Args:
        section: the settings `tracking_uri`, `experiment`, `run_name`, `tags` and `registered_model`; a tracking_uri of
            None is MLflow's own choice (MLFLOW_TRACKING_URI).
        output_dir: of the run: metrics.jsonl, and what is handed over at the end.
        run_id: of the run to continue; None takes MLFLOW_RUN_ID's (Azure ML sets it), else begins one.
        step: where training goes on.
        settings: all settings, logged once as parameters; what a later attempt changes becomes a tag.
        facts: further tags.

    Raises:
        ConfigError: the package is missing, or the server can be reached and refuses a run that begins.
    """

    def __init__(
        self, section: Any, output_dir: Path, run_id: str | None, step: int, settings: Mapping[str, Any],
        facts: Mapping[str, str],
    ) -> None:  # fmt: skip
        self._mlflow = import_mlflow()
        self._section, self._output_dir, self._step = section, output_dir, step
        self._settings, self._facts = flat(settings), dict(facts)
        self.id = run_id or os.environ.get("MLFLOW_RUN_ID")
        self._opened = self._away = self._given_up = False
        self._sent: set[tuple[str, int, float]] = set()  # (kind, step, value) of lines that the server has
        self._queue: deque[dict[str, Any]] = deque()
        self._sending: list[dict[str, Any]] = []  # taken from the queue, and not known to have arrived
        self._dropped = 0
        self._exit_code: int | None = None  # set when the run ends
        self._lock, self._wake, self._ending = threading.Lock(), threading.Event(), threading.Event()
        self._thread = threading.Thread(target=self._work, name="mlflow", daemon=True)
        try:
            self._client = self._mlflow.MlflowClient(tracking_uri=section.tracking_uri)
            self._open()
        except Exception as error:  # MLflow lets errors of requests and urllib3 through
            if self._is_final(error) and step == 0:  # a run that goes on is not worth losing for this
                raise ConfigError(
                    f"mlflow.enabled: {self._where()} refuses ({_reason(error)}); set mlflow.tracking_uri to an MLflow "
                    "server that takes runs, or mlflow.enabled to false"
                ) from None
            self._note_away(error)

    def log(self, values: dict[str, Any]) -> None:
        """Send a line of metrics.jsonl, soon."""
        with self._lock:
            self._queue.append(values)
            if len(self._queue) > LINES_KEPT:
                self._queue.popleft()
                self._dropped += 1
        self._start()
        self._wake.set()

    def log_pictures(self, pictures: Mapping[str, np.ndarray]) -> None:
        """Put pictures, name -> (H, W, 3) uint8, beside the run; a server that is away does not get them."""
        try:
            for name, picture in pictures.items() if self._opened else ():
                self._client.log_image(self.id, picture, f"{name}.png")
        except Exception as error:
            self._note_away(error)

    def finish(self, exit_code: int = 0) -> None:
        """Send what is left, hand over the run's pages (and register its model), say how it ended; within limits."""
        self._exit_code = exit_code
        self._start()
        self._ending.set()
        self._wake.set()
        begun = time.monotonic()
        while self._thread.is_alive():
            patience_s = PATIENCE_AWAY_S if self._away else PATIENCE_S
            if time.monotonic() - begun > (patience_s if exit_code == 0 else PATIENCE_STOPPED_S):
                self._given_up = True
                break
            self._thread.join(0.2)
        if left := len(self._queue) + len(self._sending) + self._dropped:
            print(
                f"note: mlflow: {left} lines of metrics could not be sent to {self._where()}; they stand in "
                f"{self._output_dir / METRICS}, and a resumed run sends them",
                file=sys.stderr, flush=True,
            )  # fmt: skip

    def _start(self) -> None:
        if self._thread.ident is None:  # not before it is needed: loader processes are forked without it
            self._thread.start()

    def _open(self) -> None:
        """Begin a run on the server, or take up the earlier one. Raises what MLflow raises."""
        client, param, tag = self._client, self._mlflow.entities.Param, self._mlflow.entities.RunTag
        run = self._earlier_run()
        if run is None:
            experiment = client.get_experiment_by_name(self._section.experiment)
            experiment_id = experiment.experiment_id if experiment else self._create_experiment()
            run = client.create_run(experiment_id, run_name=self._section.run_name)
        self.id, known = run.info.run_id, run.data.params
        tags = {**(self._section.tags or {}), **self._facts}
        for key, value in self._settings.items():
            if known.get(key, value) != value:
                tags[f"changed.{key}"] = f"{known[key]} -> {value} at step {self._step}"[:LONGEST]
        new = [param(key, value) for key, value in self._settings.items() if key not in known]
        for first in range(0, len(new), 100):  # more are not taken at once
            client.log_batch(self.id, params=new[first : first + 100])
        client.log_batch(self.id, tags=[tag(key, value) for key, value in tags.items()])
        # Lines of an earlier attempt whose server was away.
        lines = [line for line in metrics_lines(self._output_dir / METRICS) if line["step"] <= self._step]
        with self._lock:
            self._queue.extendleft(line for line in reversed(lines) if not self._is_sent(line))
        self._opened = True

    def _earlier_run(self) -> Any:
        """The run that goes on, and which of its lines the server has; None if one has to begin."""
        if self.id is None:
            return None
        try:
            run = self._client.get_run(self.id)
        except self._mlflow.exceptions.MlflowException as error:
            if error.error_code != "RESOURCE_DOES_NOT_EXIST" or self.id == os.environ.get("MLFLOW_RUN_ID"):
                raise
            print(f"note: mlflow: {self._where()} has no run {self.id}: a new one begins there", file=sys.stderr)
            return None
        self._client.update_run(self.id, status="RUNNING")
        for kind in KINDS:
            history = self._client.get_metric_history(self.id, kind)
            self._sent |= {(kind, metric.step, metric.value) for metric in history}
        return run

    def _create_experiment(self) -> str:
        name = self._section.experiment
        try:
            return self._client.create_experiment(name)
        except self._mlflow.exceptions.MlflowException as error:
            if error.error_code != "RESOURCE_ALREADY_EXISTS":
                raise
            return self._client.get_experiment_by_name(name).experiment_id  # another run was faster

    def _is_sent(self, line: Mapping[str, Any]) -> bool:
        return any((kind, line["step"], line.get(kind)) in self._sent for kind in KINDS)

    def _work(self) -> None:
        """The thread: sends what there is, in order, again after a failure, and at the end what belongs there."""
        while True:
            self._wake.wait()
            self._wake.clear()
            ending = self._ending.is_set()
            try:
                if not self._opened:
                    self._open()
                while self._send_some():
                    pass
                if ending:
                    self._hand_over()
                    return
                if self._away:
                    self._away = False
                    print(f"note: mlflow: {self._where()} answers again", file=sys.stderr, flush=True)
            except Exception as error:
                self._note_away(error)
                if self._is_final(error) or self._given_up:
                    return  # what comes from here on is counted at the end
                self._ending.wait(RETRY_S)
                time.sleep(1)  # also at the end
                self._wake.set()

    def _send_some(self) -> bool:
        """Send the oldest lines; -> whether there were any. After a failure they are sent again."""
        if not self._sending:
            with self._lock:
                count = min(len(self._queue), LINES_AT_ONCE)
                self._sending = [self._queue.popleft() for _ in range(count)]
        now_ms = int(time.time() * 1000)
        metrics = [
            self._mlflow.entities.Metric(key, float(value), now_ms, line["step"])
            for line in self._sending
            if not self._is_sent(line)
            for key, value in line.items()
            if key != "step"
        ]
        if metrics:
            self._client.log_batch(self.id, metrics=metrics)
        some, self._sending = bool(self._sending), []
        return some

    def _hand_over(self) -> None:
        client, complete = self._client, self._exit_code == 0
        for name in ARTIFACTS if complete else ():
            if (self._output_dir / name).exists():
                client.log_artifact(self.id, str(self._output_dir / name))
        if complete and self._section.registered_model:
            self._register(self._section.registered_model)
        if "MLFLOW_RUN_ID" not in os.environ:  # the end of a run that somebody else began is theirs to say
            client.set_terminated(self.id, STATUS.get(self._exit_code or 0, "FAILED"))

    def _register(self, name: str) -> None:
        """Upload the best checkpoint (the last, if none was scored) and make it a version of a registered model."""
        client = self._client
        best = self._output_dir / "best"
        checkpoint = (best if best.exists() else self._output_dir / "last").resolve()
        print(f"mlflow: sending {checkpoint.name} to {self._where()}", flush=True)
        client.log_artifacts(self.id, str(checkpoint), checkpoint.name)
        try:
            client.create_registered_model(name)
        except self._mlflow.exceptions.MlflowException as error:
            if error.error_code != "RESOURCE_ALREADY_EXISTS":
                raise
        source = f"{client.get_run(self.id).info.artifact_uri}/{checkpoint.name}"
        version = client.create_model_version(name, source, self.id).version
        print(f"mlflow: {checkpoint.name} is version {version} of the model {name}", flush=True)

    def _is_final(self, error: Exception) -> bool:
        return isinstance(error, self._mlflow.exceptions.MlflowException) and error.error_code in FINAL

    def _where(self) -> str:
        return self._section.tracking_uri or os.environ.get("MLFLOW_TRACKING_URI", "MLflow's default store")

    def _note_away(self, error: Exception) -> None:
        if not self._away:
            self._away = True
            then = "no more is sent" if self._is_final(error) else "it is tried again"
            print(
                f"note: mlflow: {self._where()} does not take what is logged ({_reason(error)}); training goes on, and "
                f"{then}",
                file=sys.stderr, flush=True,
            )  # fmt: skip


def _reason(error: Exception) -> str:
    if getattr(error, "error_code", None) == "UNAUTHENTICATED":
        return "it does not know MLFLOW_TRACKING_USERNAME and MLFLOW_TRACKING_PASSWORD, or they are not set"
    return f"{type(error).__name__}: {' '.join(str(error).split())[:150]}"
