"""A real MLflow tracking server on loopback, with its store in sqlite, that asks for a name and a password.

    with MlflowServer(tmp_path) as server:
        os.environ.update(server.credentials)
        server.client.get_run(...)

It has an environment of its own, .venv-mlflow (`make .venv-mlflow/installed`).
"""

from __future__ import annotations

import os
import secrets
import signal
import subprocess
from pathlib import Path
from typing import Any

from tests.azurite import ROOT, free_port, wait_until_it_listens

PYTHON = ROOT / ".venv-mlflow" / "bin" / "python"
EXPERIMENT = "ur10e-act-train"

# A password is looked up for each request, by a hash that is slow on purpose: here, once a minute.
USERS = """[mlflow]
default_permission = NO_PERMISSIONS
database_uri = sqlite:///users.db
auth_cache_ttl_seconds = 60
"""


class MlflowServer:
    """The server as a context manager; it can be stopped and started again, on the same store and port.

    Attributes:
        uri: for mlflow.tracking_uri.
        credentials: the environment that a client needs.
    """

    def __init__(self, folder: Path) -> None:
        self._folder, self._process = folder / "mlflow-server", None
        self.port = free_port()
        self.uri = f"http://127.0.0.1:{self.port}"
        self.credentials = {"MLFLOW_TRACKING_USERNAME": "cell", "MLFLOW_TRACKING_PASSWORD": secrets.token_hex()}

    def __enter__(self) -> MlflowServer:
        self.start()
        return self

    def __exit__(self, *exception: object) -> None:
        self.stop()

    def start(self) -> None:
        """Start it and wait until it listens."""
        self._folder.mkdir(parents=True, exist_ok=True)
        (self._folder / "users.ini").write_text(USERS)
        command = [
            str(PYTHON), "-m", "mlflow", "server", "--app-name", "basic-auth", "--workers", "1", "--host", "127.0.0.1",
            "--port", str(self.port),
            "--backend-store-uri", f"sqlite:///{self._folder}/mlflow.db",
            "--artifacts-destination", str(self._folder / "artifacts"),
        ]  # fmt: skip
        log = (self._folder / "server.log").open("ab")
        environment = {
            **os.environ, "MLFLOW_DISABLE_TELEMETRY": "true", "PYTHONPATH": "",
            "MLFLOW_SERVER_ENABLE_JOB_EXECUTION": "false",  # eight processes more, which no test needs
            "MLFLOW_AUTH_CONFIG_PATH": str(self._folder / "users.ini"),
            "MLFLOW_AUTH_ADMIN_USERNAME": self.credentials["MLFLOW_TRACKING_USERNAME"],
            "MLFLOW_AUTH_ADMIN_PASSWORD": self.credentials["MLFLOW_TRACKING_PASSWORD"],
            "MLFLOW_FLASK_SERVER_SECRET_KEY": secrets.token_hex(),
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
        """MLflow's own client of it; `credentials` have to be in the environment."""
        import mlflow

        return mlflow.MlflowClient(tracking_uri=self.uri)

    def runs(self) -> list[Any]:
        """All runs of the default experiment."""
        client = self.client
        return client.search_runs([client.get_experiment_by_name(EXPERIMENT).experiment_id])
