"""A real Azure Blob server (Azurite) on loopback, and SAS tokens of every kind for it.

    with Azurite(tmp_path) as server:
        server.upload("datasets", {"houston_recordings/a/metadata.yaml": b"..."})
        server.sas("datasets", "rl")

Azurite and azcopy come from npm into .node/ of the repository (`make .node/installed`).
"""

from __future__ import annotations

import base64
import os
import socket
import subprocess
import time
from datetime import datetime, timedelta, timezone
from pathlib import Path

from azure.storage.blob import BlobServiceClient, ContainerSasPermissions, generate_container_sas

ROOT = Path(__file__).resolve().parent.parent
NODE_BIN = ROOT / ".node" / "bin"  # azurite-blob and azcopy
ACCOUNT = "testaccount"
KEY = base64.b64encode(os.urandom(64)).decode()  # a new account for each test run


def free_port() -> int:
    """A TCP port on loopback that nobody listens on just now."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def wait_until_it_listens(port: int, timeout_s: float, log: Path) -> None:
    """Raises RuntimeError, with the end of what the server wrote, when nobody listens there in time."""
    deadline = time.monotonic() + timeout_s
    while time.monotonic() < deadline:
        with socket.socket() as probe:
            if probe.connect_ex(("127.0.0.1", port)) == 0:
                return
        time.sleep(0.1)
    raise RuntimeError(f"nobody listens on port {port}: {log.read_text()[-2000:]}")


class Azurite:
    """The server as a context manager; `endpoint` is what AZURE_BLOB_ENDPOINT takes."""

    def __init__(self, folder: Path) -> None:
        self._folder, self._process = folder / "azurite", None
        self.port = free_port()
        self.endpoint = f"http://127.0.0.1:{self.port}/{ACCOUNT}"

    def __enter__(self) -> Azurite:
        self._folder.mkdir(parents=True, exist_ok=True)
        options = ["--silent", "--disableTelemetry", "--skipApiVersionCheck", "--location", str(self._folder)]
        command = [str(NODE_BIN / "azurite-blob"), "--blobHost", "127.0.0.1", "--blobPort", str(self.port), *options]
        log = (self._folder / "server.log").open("wb")
        environment = {**os.environ, "AZURITE_ACCOUNTS": f"{ACCOUNT}:{KEY}"}
        self._process = subprocess.Popen(command, stdout=log, stderr=log, cwd=self._folder, env=environment)
        wait_until_it_listens(self.port, 15.0, self._folder / "server.log")
        return self

    def __exit__(self, *exception: object) -> None:
        self.stop()

    def stop(self) -> None:
        """End the server at once, as a network that goes away."""
        if self._process is not None:
            self._process.kill()
            self._process.wait()
            self._process = None

    def upload(self, container: str, blobs: dict[str, bytes | Path], metadata: dict[str, str] | None = None) -> None:
        """Make the container, if need be, and put the blobs there, each with this metadata."""
        service = BlobServiceClient(self.endpoint, credential=KEY)
        client = service.get_container_client(container)
        if not client.exists():
            client.create_container()
        for name, content in blobs.items():
            data = content.read_bytes() if isinstance(content, Path) else content
            client.upload_blob(name, data, overwrite=True, metadata=metadata)

    def upload_folder(self, container: str, prefix: str, folder: Path) -> list[str]:
        """Put all files below `folder` under `prefix`; -> their names below it."""
        names = sorted(str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file())
        self.upload(container, {f"{prefix}/{name}": folder / name for name in names})
        return names

    def sas(self, container: str, permissions: str, hours: float = 1.0) -> str:
        """A SAS with these permission letters, valid for `hours` (negative: expired)."""
        now = datetime.now(timezone.utc)
        return generate_container_sas(
            ACCOUNT,
            container,
            account_key=KEY,
            permission=ContainerSasPermissions.from_string(permissions),
            start=now - timedelta(days=1),
            expiry=now + timedelta(hours=hours),
        )


def environment(server: Azurite, destination: Path, **changes: str | None) -> dict[str, str]:
    """What the blob workflow gives download-blob.sh, pointed at `server`; None takes a variable away."""
    values = {
        **os.environ,
        "PATH": f"{NODE_BIN}:{os.environ['PATH']}",
        "AZURE_STORAGE_ACCOUNT": ACCOUNT,
        "AZURE_STORAGE_SAS": server.sas("datasets", "rl"),
        "AZURE_BLOB_ENDPOINT": server.endpoint,
        "AZURE_BLOB_CONTAINER": "datasets",
        "AZURE_BLOB_PREFIX": "houston_recordings/",
        "BLOB_DEST_DIR": str(destination),
        **changes,
    }
    return {name: value for name, value in values.items() if value is not None}
