"""What a run of five checkpoints sends to its storage url: OSMO's own command line against a real blob server, counted.

    .venv/bin/python -m tests.soak_uploads ../OSMO ../osmo-venv/bin/python            # as real_osmo.py sets both up
    .venv/bin/python -m tests.soak_uploads ../OSMO ../osmo-venv/bin/python --checkpoint-mb 620

The run writes a checkpoint every ten minutes (told, not waited for) and keeps three, as osmo-config.yaml has it.

    checkpoint:   OSMO's own uploads, word by word as its osmo_exec and osmo_ctrl call them: the run directory every ten
                  minutes and once more at the end, then the task's output
    uploads.py    what the workflows have

A proxy before the server counts what is sent to it. What is stored in the end is read back and compared with the run,
and what the tests' own `osmo` (osmo_data.py) does is compared with the real one: that a failed upload ends with 0.
Exit code 1 when something is not as it should be. Minutes, most of them OSMO's start; not part of `make test`.
"""

from __future__ import annotations

import argparse
import hashlib
import importlib.util
import json
import os
import shutil
import socket
import sys
import tempfile
import threading
from collections.abc import Callable
from pathlib import Path

import yaml
from azure.storage.blob import BlobServiceClient

from tests.azurite import ACCOUNT, KEY, Azurite

ROOT = Path(__file__).resolve().parent.parent
CONTAINER, STEPS, KEEP = "runs", 5, 3
HIDDEN = r"(?!.*/\.).*"  # the regex that the workflows gave `checkpoint:`


class CountingProxy:
    """Passes connections on to `port`; `received` counts the bytes that clients have sent."""

    def __init__(self, port: int) -> None:
        self.received, self._target = 0, port
        self._listening = socket.create_server(("127.0.0.1", 0))
        self.port = self._listening.getsockname()[1]
        threading.Thread(target=self._accept, daemon=True).start()

    def _accept(self) -> None:
        while True:
            client, _ = self._listening.accept()
            server = socket.create_connection(("127.0.0.1", self._target))
            threading.Thread(target=self._pass, args=(client, server, True), daemon=True).start()
            threading.Thread(target=self._pass, args=(server, client, False), daemon=True).start()

    def _pass(self, source: socket.socket, target: socket.socket, counts: bool) -> None:
        try:
            while data := source.recv(1 << 16):
                self.received += len(data) if counts else 0
                target.sendall(data)
            target.shutdown(socket.SHUT_WR)
        except OSError:
            pass


def install_osmo(folder: Path, checkout: Path, python: Path, endpoint: str) -> None:
    """The command `osmo` as a pod has it: with the storage's credential in its configuration, at the end of PATH."""
    connection = f"DefaultEndpointsProtocol=http;AccountName={ACCOUNT};AccountKey={KEY};BlobEndpoint={endpoint};"
    endpoint_of = f"azure://{ACCOUNT}"
    credential = {"endpoint": endpoint_of, "access_key_id": "any", "access_key": connection, "region": "any"}
    (folder / "config").mkdir(parents=True)
    (folder / "config/config.yaml").write_text(yaml.dump({"auth": {"data": {endpoint_of: credential}}}))
    (folder / "bin").mkdir()
    (folder / "bin/osmo").write_text(f'#!/bin/sh\nexec env PYTHONPATH="{checkout}" "{python}" -m src.cli.cli "$@"\n')
    (folder / "bin/osmo").chmod(0o755)
    os.environ |= {"OSMO_CONFIG_FILE_DIR": str(folder / "config"), "OSMO_LOG_FILE_DIR": str(folder)}
    os.environ["PATH"] += f":{folder / 'bin'}"


def uploads_of(run_dir: Path, url: str):
    """uploads.py's Uploads."""
    spec = importlib.util.spec_from_file_location("uploads", ROOT / "osmo/uploads.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module.Uploads(run_dir, url)


def train(run_dir: Path, size: int, saved: Callable[[], object]) -> None:
    """What a run leaves at each of its checkpoints, of `size` bytes; `saved` is called after each."""
    for step in range(1, STEPS + 1):
        checkpoint = run_dir / f"checkpoint_{step * 1000:06d}"
        for name, share in (("pretrained_model/model.safetensors", 3), ("training_state/training_state.pt", 1.5)):
            (checkpoint / name).parent.mkdir(parents=True)
            (checkpoint / name).write_bytes(os.urandom(int(size / share)))
        (checkpoint / "training_state/manifest.json").write_text(json.dumps({"step": step}))
        with (run_dir / "metrics.jsonl").open("a") as file:
            file.write(json.dumps({"step": step * 1000}) + "\n")
        for old in sorted(run_dir.glob("checkpoint_*"))[:-KEEP]:
            shutil.rmtree(old)
        saved()


def digests(run_dir: Path) -> dict[str, str]:
    """The MD5 of each file of a run that is no link and not hidden, by name."""
    files = [path for path in run_dir.rglob("*") if path.is_file() and not path.name.startswith(".")]
    return {str(p.relative_to(run_dir)): hashlib.md5(p.read_bytes()).hexdigest() for p in files}  # noqa: S324


def main() -> int:
    parser = argparse.ArgumentParser(description="Bytes that a run sends to its storage url, before and after.")
    parser.add_argument("osmo", type=Path, help="checkout of OSMO")
    parser.add_argument("python", type=Path, help="Python with OSMO's requirements")
    parser.add_argument(
        "--checkpoint-mb", type=float, default=62, help="size of a checkpoint (default: a tenth of ACT's)"
    )
    args = parser.parse_args()
    size = int(args.checkpoint_mb * 1e6)
    wrong: list[str] = []
    with tempfile.TemporaryDirectory() as folder, Azurite(Path(folder)) as server:
        base = Path(folder)
        server.upload(CONTAINER, {"there": b""})
        proxy = CountingProxy(server.port)
        endpoint = f"http://127.0.0.1:{proxy.port}/{ACCOUNT}"
        install_osmo(base / "pod", args.osmo.resolve(), args.python.absolute(), endpoint)
        container = BlobServiceClient(server.endpoint, credential=KEY).get_container_client(CONTAINER)

        def stored(run: str) -> dict[str, str]:
            names = [blob.name for blob in container.list_blobs(name_starts_with=f"{run}/")]
            blobs = {name: container.download_blob(name).readall() for name in names}
            start = len(f"{run}/train-rosbag-act/")
            return {name[start:]: hashlib.md5(content).hexdigest() for name, content in blobs.items()}  # noqa: S324

        def measure(run: str, send: Callable[[Path, str, bool], object]) -> None:
            run_dir, url = base / run / "train-rosbag-act", f"azure://{ACCOUNT}/{CONTAINER}/{run}"
            run_dir.mkdir(parents=True)
            start = proxy.received
            train(run_dir, size, lambda: send(run_dir, url, False))
            send(run_dir, url, True)
            sent, there, here = proxy.received - start, stored(run), digests(run_dir)
            if any(there.get(name) != digest for name, digest in here.items()):
                wrong.append(f"{run}: what is stored is not what the run is")
            kept = len({name.partition("/")[0] for name in there if name.startswith("checkpoint_")})
            print(
                f"{run:<12} {sent / 1e6:8.1f} MB sent, {sent / size:5.2f} checkpoints' worth; {kept} are stored",
                flush=True,
            )

        def osmo_uploads(run_dir: Path, url: str, last: bool) -> None:
            command = uploads_of(run_dir, url).osmo
            command("upload", url, str(run_dir), "--processes", "1", "--regex", HIDDEN)
            if last:  # {{output}} holds a copy
                command("upload", f"{url}/", f"{run_dir.parent}/*", "--processes", "1", "--regex", HIDDEN)

        def ours(run_dir: Path, url: str, last: bool) -> None:
            if problem := uploads_of(run_dir, url).send():
                wrong.append(f"uploads.py: {problem}")

        measure("checkpoint", osmo_uploads)
        measure("uploads.py", ours)
        left = set(stored("uploads.py")) ^ set(digests(base / "uploads.py/train-rosbag-act"))
        if left:
            wrong.append(f"uploads.py: stored, but not in the run, or the other way round: {sorted(left)[:3]}")

        nowhere = uploads_of(base / "uploads.py/train-rosbag-act", f"azure://{ACCOUNT}/nowhere/run")
        told, problem = nowhere.osmo("upload", nowhere.url, str(nowhere.run_dir), "--processes", "1")
        nowhere.sent = {}
        refused = nowhere.upload(nowhere.unsent())
        if problem or not refused:
            wrong.append(f"an upload to no container ends with 0, and is noticed: {problem or told}, {refused}")
        print(f"a container that is not there: exit code {1 if problem else 0}; uploads.py: {refused[:110]}")
    print("\n".join(f"FAILED {line}" for line in wrong) or "as it should be")
    return 1 if wrong else 0


if __name__ == "__main__":
    sys.exit(main())
