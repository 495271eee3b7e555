"""A real MLflow tracking server on loopback, with its store in sqlite.

    with MlflowServer(tmp_path) as server:
        server.client.get_run(...)

It has an environment of its own, .venv-mlflow (`make .venv-mlflow/installed`).
"""

from __future__ import annotations

import os
import signal
import subprocess
from pathlib import Path
from typing import Any

from tests.azurite import ROOT, free_port, wait_until_it_listens

PYTHON = ROOT / ".venv-mlflow" / "bin" / "python"
EXPERIMENT = "ur10e-act-train"


class MlflowServer:
    """The server as a context manager; it can be stopped and started again, on the same store and port."""

    def __init__(self, folder: Path) -> None:
        self._folder, self._process = folder / "mlflow-server", None
        self.port = free_port()
        self.uri = f"http://127.0.0.1:{self.port}"

    def __enter__(self) -> MlflowServer:
        self.start()
        return self

    def __exit__(self, *exception: object) -> None:
        self.stop()

    def start(self) -> None:
        """Start it and wait until it listens."""
        self._folder.mkdir(parents=True, exist_ok=True)
        command = [
            str(PYTHON), "-m", "mlflow", "server", "--host", "127.0.0.1", "--port", str(self.port), "--workers", "1",
            "--backend-store-uri", f"sqlite:///{self._folder}/mlflow.db",
            "--artifacts-destination", str(self._folder / "artifacts"),
        ]  # fmt: skip
        log = (self._folder / "server.log").open("ab")
        environment = {
            **os.environ, "MLFLOW_DISABLE_TELEMETRY": "true", "PYTHONPATH": "",
            "MLFLOW_SERVER_ENABLE_JOB_EXECUTION": "false",  # eight processes more, which no test needs
        }  # fmt: skip
        self._process = subprocess.Popen(
            command, stdout=log, stderr=log, cwd=self._folder, env=environment, start_new_session=True
        )
        try:
            wait_until_it_listens(self.port, 150.0, self._folder / "server.log")
        except RuntimeError:
            self.stop()
            raise

    def stop(self) -> None:
        """End it and its workers at once, as a network that goes away."""
        if self._process is not None:
            os.killpg(self._process.pid, signal.SIGKILL)
            self._process.wait()
            self._process = None

    @property
    def client(self) -> Any:
        """MLflow's own client of it."""
        import mlflow

        return mlflow.MlflowClient(tracking_uri=self.uri)

    def runs(self) -> list[Any]:
        """All runs of the default experiment."""
        client = self.client
        return client.search_runs([client.get_experiment_by_name(EXPERIMENT).experiment_id])
