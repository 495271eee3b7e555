"""download-blob.sh with the real azcopy against a real Blob server (Azurite), through everything that goes wrong.

Every run's output is searched for the secret.
"""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
import time
import urllib.parse
import urllib.request
from collections.abc import Iterator
from pathlib import Path

import pytest

from lerobot_checkpoint import list_checkpoints
from tests.azurite import NODE_BIN, Azurite, environment
from tests.osmo_spec import place, submit
from tests.osmo_task import WORKFLOWS, TaskBox, require, tiny

SCRIPT = WORKFLOWS / "download-blob.sh"
MIB = 2**20
BAG = {"houston_recordings/day 1/a/metadata.yaml": b"x" * 100, "houston_recordings/day 1/a/a_0.db3": b"y" * 300_000}
pytestmark = pytest.mark.skipif(
    not (NODE_BIN / "azcopy").exists() and not os.environ.get("CI"), reason="no azcopy: `make .node/installed` gets it"
)


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Azurite]:
    with Azurite(tmp_path_factory.mktemp("server")) as running:
        running.upload("datasets", {**BAG, "texts/readme.txt": b"no bag", "houston_recordings_old/b/b_0.db3": b"old"})
        yield running


def secrets_of(values: dict[str, str]) -> list[str]:
    """The signature of the SAS, as it is and as it may be printed, and an account key."""
    sas = values.get("AZURE_STORAGE_SAS", "").strip()
    signature = next((part[4:] for part in sas.split("&") if part.startswith("sig=")), "")
    return [s for s in (signature, urllib.parse.unquote(signature), values.get("AZURE_STORAGE_ACCOUNT_KEY", "")) if s]


def download(values: dict[str, str], *command: str, timeout_s: float = 60) -> tuple[int, str, float]:
    """Run the script; -> (exit code, what it printed, seconds)."""
    started = time.monotonic()
    done = subprocess.run(
        ["bash", str(SCRIPT), *command], env=values, capture_output=True, text=True, timeout=timeout_s,
        stdin=subprocess.DEVNULL,
    )  # fmt: skip
    printed = done.stdout + done.stderr
    assert not any(secret in printed for secret in secrets_of(values)), "a secret was printed"
    return done.returncode, printed, time.monotonic() - started


def error_line(printed: str) -> str:
    lines = [line for line in printed.splitlines() if line.startswith("error: ")]
    assert len(lines) == 1, printed
    return lines[0]


def files(folder: Path) -> dict[str, int]:
    return {str(path.relative_to(folder)): path.stat().st_size for path in folder.rglob("*") if path.is_file()}


WHOLE = {name.removeprefix("houston_recordings/"): len(content) for name, content in BAG.items()}
SAS_FORMS = {
    "as it is": lambda sas: sas,
    "with a question mark": lambda sas: "?" + sas,
    "with a carriage return": lambda sas: sas + "\r\n",
    "with blanks around it": lambda sas: f"  {sas} \t",
}


@pytest.mark.parametrize("form", SAS_FORMS.values(), ids=list(SAS_FORMS))
def test_the_prefix_arrives(form, server: Azurite, tmp_path: Path):
    """All that is below the prefix, and nothing that only begins like it; then the command runs, without the SAS."""
    values = environment(server, tmp_path / "bags", AZURE_STORAGE_SAS=form(server.sas("datasets", "rl")))
    code, printed, _ = download(values, "bash", "-c", 'echo "then ${AZURE_STORAGE_SAS:-without}"; exit 7')
    assert code == 7 and "then without" in printed, printed
    assert files(tmp_path / "bags") == WHOLE


def test_a_second_run_fetches_only_what_is_missing(server: Azurite, tmp_path: Path):
    values = environment(server, tmp_path / "bags")
    assert download(values)[0] == 0
    kept, lost = tmp_path / "bags/day 1/a/a_0.db3", tmp_path / "bags/day 1/a/metadata.yaml"
    lost.unlink()
    before = kept.stat().st_ino, kept.stat().st_mtime_ns
    code, printed, _ = download(values)
    assert code == 0, printed
    assert files(tmp_path / "bags") == WHOLE and (kept.stat().st_ino, kept.stat().st_mtime_ns) == before


def test_folders_of_a_hierarchical_namespace_are_no_files(server: Azurite, tmp_path: Path):
    """Such an account lists them as blobs, marked so; azcopy makes none that is empty, and nobody misses it."""
    server.upload("datasets", {"hierarchical/day1/a_0.db3": b"y"})
    server.upload("datasets", {"hierarchical/day1": b"", "hierarchical/empty": b""}, metadata={"hdi_isfolder": "true"})
    code, printed, _ = download(environment(server, tmp_path / "bags", AZURE_BLOB_PREFIX="hierarchical/"))
    assert code == 0 and "1 blobs" in printed, printed
    assert files(tmp_path / "bags") == {"day1/a_0.db3": 1}


def test_a_file_that_did_not_arrive_whole_is_fetched_again(server: Azurite, tmp_path: Path):
    """azcopy reports success, and a byte is missing: 75, and the next run does not take it for complete."""
    cut = 'REAL "$@" && truncate -s -1 "$BLOB_DEST_DIR/day 1/a/a_0.db3"'
    values = environment(server, tmp_path / "bags", PATH=azcopy_with(tmp_path / "bin", cut))
    code, printed, _ = download(values)
    assert code == 75 and "1 of 2 blobs did not arrive whole (day 1/a/a_0.db3" in error_line(printed), printed
    assert download(environment(server, tmp_path / "bags"))[0] == 0
    assert files(tmp_path / "bags") == WHOLE


REFUSALS = {  # what is changed, the exit code, the message
    "expired SAS": (lambda s: dict(AZURE_STORAGE_SAS=s.sas("datasets", "rl", hours=-2)), 1, "it expired at"),
    "SAS without List": (lambda s: dict(AZURE_STORAGE_SAS=s.sas("datasets", "r")), 1, "lacks the permission List"),
    "SAS without Read": (lambda s: dict(AZURE_STORAGE_SAS=s.sas("datasets", "l")), 1, "lacks the permission Read"),
    "forged SAS": (
        lambda s: dict(AZURE_STORAGE_SAS=s.sas("datasets", "rl").replace("sig=", "sig=AAAA")), 1, "SAS is refused",
    ),
    "another container's SAS": (lambda s: dict(AZURE_STORAGE_SAS=s.sas("others", "rl")), 1, "SAS is refused"),
    "no SAS at all in it": (lambda s: dict(AZURE_STORAGE_SAS="hello"), 1, "it has no sig="),
    "missing container": (
        lambda s: dict(AZURE_BLOB_CONTAINER="nowhere", AZURE_STORAGE_SAS=s.sas("nowhere", "rl")), 1,
        "no container nowhere",
    ),
    "missing prefix": (lambda s: dict(AZURE_BLOB_PREFIX="Houston_recordings/"), 1, "nothing there; check AZURE_BLOB"),
    "prefix without bags": (lambda s: dict(AZURE_BLOB_PREFIX="texts/"), 1, "no bag (.db3 or .mcap) among them"),
    "nothing to log in with": (lambda s: dict(AZURE_STORAGE_SAS=None), 1, "osmo-workflow.yaml"),
    "an account key": (lambda s: dict(AZURE_STORAGE_ACCOUNT_KEY="a2V5a2V5a2V5"), 1, "azcopy takes no account key"),
    "no account": (lambda s: dict(AZURE_STORAGE_ACCOUNT="", AZURE_BLOB_ENDPOINT=None), 1, "AZURE_STORAGE_ACCOUNT is"),
    "no container": (lambda s: dict(AZURE_BLOB_CONTAINER=""), 1, "AZURE_BLOB_CONTAINER is empty"),
    "no folder": (lambda s: dict(BLOB_DEST_DIR=""), 1, "BLOB_DEST_DIR is empty"),
    "a folder that cannot be": (lambda s: dict(BLOB_DEST_DIR="/dev/null/x"), 1, "/dev/null/x: cannot be made"),
    "a time-out with a unit": (
        lambda s: dict(BLOB_TIMEOUT_S="6h"), 1, "BLOB_TIMEOUT_S: found '6h', expected a whole number of seconds",
    ),
    "no time at all": (lambda s: dict(BLOB_TIMEOUT_S="0"), 1, "BLOB_TIMEOUT_S: found '0', expected a whole number"),
    "a time-out that --set has made": (lambda s: dict(BLOB_TIMEOUT_S="60000.0"), 1, "BLOB_TIMEOUT_S: found '60000.0'"),
    "a stall in words": (lambda s: dict(BLOB_STALL_S="long"), 1, "BLOB_STALL_S: found 'long', expected a whole number"),
    "an answer at once": (lambda s: dict(BLOB_CONNECT_S="0.5"), 1, "BLOB_CONNECT_S: found '0.5', expected a whole"),
    "a host that does not exist": (
        lambda s: dict(AZURE_BLOB_ENDPOINT="http://account.blob.invalid"), 1, "no such host",
    ),
}  # fmt: skip


@pytest.mark.parametrize("change, code, message", REFUSALS.values(), ids=list(REFUSALS))
def test_refused_at_once(change, code: int, message: str, server: Azurite, tmp_path: Path):
    found, printed, seconds = download(environment(server, tmp_path / "bags", **change(server)))
    assert (found, message in error_line(printed)) == (code, True), printed
    assert seconds < 15
    assert not (tmp_path / "bags").exists() or not files(tmp_path / "bags")


def put(server: Azurite, path: str, content: bytes) -> None:
    """Put a blob under a name that client libraries would tidy up, percent-encoded in `path`."""
    sas = server.sas("datasets", "rwc")
    headers = {"x-ms-blob-type": "BlockBlob", "x-ms-version": "2021-08-06"}
    url = f"{server.endpoint}/datasets/{path}?{sas}"
    with urllib.request.urlopen(urllib.request.Request(url, content, headers, method="PUT")) as answer:
        assert answer.status == 201


OUT_OF_PLACE = {
    "climbs": ("climbs/%2E%2E/%2E%2E/kept.db3", "../../kept.db3"),
    "climbs on its way": ("later/a%2F..%2F..%2F..%2Fkept.db3", "a/../../../kept.db3"),
    "absolute": ("absolute/{}/kept.db3", "{}/kept.db3"),
    "empty part": ("empty/a//kept.db3", "a//kept.db3"),
}


@pytest.mark.parametrize("path, name", OUT_OF_PLACE.values(), ids=list(OUT_OF_PLACE))
def test_a_blob_whose_name_leads_elsewhere_is_refused(path: str, name: str, server: Azurite, tmp_path: Path):
    """azcopy writes such a blob where its name leads, and the check of what arrived would remove a file there."""
    kept = tmp_path / "kept.db3"
    kept.write_bytes(b"another size")
    path, name = path.format(tmp_path), name.format(tmp_path)
    prefix = path.partition("/")[0]
    put(server, path, b"evil")
    server.upload("datasets", {f"{prefix}/a/a_0.db3": b"y"})
    dest = tmp_path / "x" / "bags"
    code, printed, _ = download(environment(server, dest, AZURE_BLOB_PREFIX=prefix))
    assert code == 1 and f"the blob '{prefix}/{name}' has no place below {dest}" in error_line(printed), printed
    assert kept.read_bytes() == b"another size" and not files(dest)


def test_with_an_identity_too_nothing_is_written_elsewhere(server: Azurite, tmp_path: Path):
    """Only azcopy sees the names then: what climbs is left out."""
    put(server, "identity/%2E%2E/%2E%2E/evil.db3", b"evil")
    server.upload("datasets", {"identity/a/a_0.db3": b"y", "identity/..b/b..c_0.db3": b"z"})
    login = 'args=("$@"); args[1]+="?$IDENTITY"; unset AZCOPY_AUTO_LOGIN_TYPE; exec REAL "${args[@]}"'
    values = environment(
        server, tmp_path / "x" / "bags", AZURE_STORAGE_SAS=None, AZCOPY_AUTO_LOGIN_TYPE="MSI",
        IDENTITY=server.sas("datasets", "rl"), PATH=azcopy_with(tmp_path / "bin", login), AZURE_BLOB_PREFIX="identity",
    )  # fmt: skip
    code, printed, _ = download(values)
    assert code == 0, printed
    assert files(tmp_path / "x") == {"bags/a/a_0.db3": 1, "bags/..b/b..c_0.db3": 1}
    assert not list(tmp_path.glob("evil*"))


NO_PASSWORD = """
import os, re, urllib.request
proxy = re.sub("//.*@", "//azcopy:guessed@", os.environ["HTTP_PROXY"])
opener = urllib.request.build_opener(urllib.request.ProxyHandler({"http": proxy}))
try:
    opener.open("http://blob.invalid/datasets/houston_recordings/day%201/a/metadata.yaml")
except urllib.error.HTTPError as error:
    print(error.code, dict(error.headers))
"""


@pytest.mark.parametrize("no_proxy", ["*", "localhost,127.0.0.1"])
def test_no_process_has_the_sas_among_its_arguments(no_proxy: str, server: Azurite, tmp_path: Path):
    """`ps` shows them to everybody. What knows the SAS instead answers only to a password, and ends with the run."""
    (tmp_path / "door.py").write_text(NO_PASSWORD)
    look = (
        f"cat /proc/[0-9]*/cmdline 2>/dev/null >{tmp_path}/seen; {sys.executable} {tmp_path}/door.py >{tmp_path}/door; "
        f'echo "$HTTP_PROXY" >{tmp_path}/proxy; exec REAL "$@"'
    )
    values = environment(
        server, tmp_path / "bags", PATH=azcopy_with(tmp_path / "bin", look), NO_PROXY=no_proxy, HTTP_PROXY=None
    )
    code, printed, _ = download(values, "bash", "-c", 'echo "proxy ${HTTP_PROXY:-none}, ${NO_PROXY:-none}"')
    assert code == 0 and f"proxy none, {no_proxy}" in printed, printed
    assert files(tmp_path / "bags") == WHOLE
    seen, door = (tmp_path / "seen").read_bytes(), (tmp_path / "door").read_text()
    assert b"blob.invalid" in seen or str(tmp_path).encode() in seen, "azcopy's arguments were looked at"
    assert not any(secret.encode() in seen for secret in secrets_of(values))
    assert door.startswith("407 ") and "ocation" not in door
    port = int((tmp_path / "proxy").read_text().rpartition(":")[2])
    with socket.socket() as probe:
        assert probe.connect_ex(("127.0.0.1", port)), "nobody listens there any more"


def test_an_identity_that_cannot_log_in_ends(server: Azurite, tmp_path: Path):
    """Without a SAS azcopy uses the workload identity; here it fails to, and does not wait for ever."""
    (tmp_path / "token").write_text("no token")
    values = environment(
        server, tmp_path / "bags", AZURE_STORAGE_SAS=None, AZURE_FEDERATED_TOKEN_FILE=str(tmp_path / "token"),
        AZURE_CLIENT_ID="client", AZURE_TENANT_ID="tenant", AZURE_AUTHORITY_HOST="https://127.0.0.1:9/",
    )  # fmt: skip
    code, printed, _ = download(values)
    assert code == 1 and "azcopy was refused" in error_line(printed) and "WorkloadIdentity" in printed, printed


def azcopy_with(folder: Path, line: str) -> str:
    """A PATH whose azcopy is the real one, called as `line` says; REAL is its path."""
    folder.mkdir()
    shim = folder / "azcopy"
    shim.write_text(f"#!/bin/bash\n{line.replace('REAL', str(NODE_BIN / 'azcopy'))}\n")
    shim.chmod(0o755)
    return f"{folder}:{NODE_BIN}:{os.environ['PATH']}"


IDENTITIES = {  # what is asked for, the identity's rights, the exit code, the message
    "all there": ({}, "rl", 0, "1 folders with bags"),
    "missing prefix": ({"AZURE_BLOB_PREFIX": "nothing/"}, "rl", 1, "nothing there; check AZURE_STORAGE_ACCOUNT"),
    "missing container": ({"AZURE_BLOB_CONTAINER": "no-such"}, "rl", 1, "nothing there; check AZURE_STORAGE_ACCOUNT"),
    "no right to list": ({}, "r", 1, "azcopy was refused"),
    "no right to read": ({}, "l", 1, "azcopy was refused"),
    "no bags": ({"AZURE_BLOB_PREFIX": "texts/"}, "rl", 1, "no bag arrived"),
}


@pytest.mark.parametrize("change, rights, code, message", IDENTITIES.values(), ids=list(IDENTITIES))
def test_with_an_identity(change, rights: str, code: int, message: str, server: Azurite, tmp_path: Path):
    """Azurite knows no identities: the login alone is stood in for, by a SAS that only azcopy gets to see."""
    sas = server.sas(change.get("AZURE_BLOB_CONTAINER", "datasets"), rights)
    login = 'args=("$@"); args[1]+="?$IDENTITY"; unset AZCOPY_AUTO_LOGIN_TYPE; exec REAL "${args[@]}"'
    values = environment(
        server, tmp_path / "bags", AZURE_STORAGE_SAS=None, AZCOPY_AUTO_LOGIN_TYPE="MSI", IDENTITY=sas,
        PATH=azcopy_with(tmp_path / "bin", login), **change,
    )  # fmt: skip
    found, printed, seconds = download(values)
    assert found == code and seconds < 30, printed
    assert message in (printed if code == 0 else error_line(printed)), printed
    assert not any(secret in printed for secret in secrets_of({"AZURE_STORAGE_SAS": sas}))


def test_a_server_that_is_down(tmp_path: Path):
    """75: a rerun may succeed. azcopy itself would wait for ever."""
    code, printed, seconds = download(environment(Azurite(tmp_path), tmp_path / "bags"))
    assert code == 75 and "cannot be reached" in error_line(printed) and seconds < 20, printed


def test_bags_from_somewhere_else_are_not_trained_on(server: Azurite, tmp_path: Path):
    (tmp_path / "bags" / "other").mkdir(parents=True)
    (tmp_path / "bags" / "other" / "other_0.mcap").write_bytes(b"z")
    code, printed, _ = download(environment(server, tmp_path / "bags"))
    assert code == 1 and "bags that are not from there (other/other_0.mcap" in error_line(printed), printed


# -- a disk that is full ------------------------------------------------------------------------------------------


@pytest.fixture
def small_disk(tmp_path: Path, request: pytest.FixtureRequest) -> Iterator[Path]:
    require("mount")
    disk = tmp_path / "disk"
    disk.mkdir()
    subprocess.run(["mount", "-t", "tmpfs", "-o", request.param, "tmpfs", str(disk)], check=True)
    yield disk
    subprocess.run(["umount", str(disk)], check=True)


@pytest.mark.parametrize("small_disk", ["size=128k"], indirect=True)
def test_a_disk_that_is_too_small_is_refused_before(small_disk: Path, server: Azurite):
    code, printed, seconds = download(environment(server, small_disk))
    assert code == 1 and "to download, but" in error_line(printed) and "raise `storage`" in printed, printed
    assert seconds < 10 and not files(small_disk)


@pytest.mark.parametrize("small_disk", ["size=10m,nr_inodes=4"], indirect=True)
def test_a_disk_that_fills_up_on_the_way(small_disk: Path, server: Azurite):
    """No inode is left for the second file: azcopy finds out, and the script says it."""
    code, printed, _ = download(environment(server, small_disk))
    assert code == 1 and "is full; raise `storage`" in error_line(printed), printed


# -- interrupted in the middle ------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def large(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Azurite]:
    """Some hundred MiB, so that there is a middle."""
    with Azurite(tmp_path_factory.mktemp("large")) as running:
        content = os.urandom(64 * MIB)
        running.upload("datasets", {f"houston_recordings/bag{i}/bag{i}_0.mcap": content[i:] for i in range(4)})
        yield running


def start(values: dict[str, str], dest: Path, log: Path) -> subprocess.Popen:
    """Start a download that one connection makes slow, and return when it is in the middle of a file."""
    with log.open("wb") as out:
        process = subprocess.Popen(
            ["bash", str(SCRIPT)], env={**values, "AZCOPY_CONCURRENCY_VALUE": "1"}, stdin=subprocess.DEVNULL,
            stdout=out, stderr=out, start_new_session=True,
        )  # fmt: skip
    end = time.monotonic() + 30
    while not any(path.stat().st_blocks for path in dest.rglob(".azDownload-*")):
        assert process.poll() is None and time.monotonic() < end, log.read_text()
        time.sleep(0.005)
    return process


def azcopies(dest: Path) -> list[int]:
    """azcopy processes that download to `dest`."""
    found = []
    for folder in Path("/proc").iterdir():
        try:
            if folder.name.isdigit() and {b"copy", str(dest).encode()} <= set(
                (folder / "cmdline").read_bytes().split(b"\0")
            ):
                found.append(int(folder.name))
        except OSError:
            continue
    return found


def test_killed_in_the_middle_and_run_again(large: Azurite, tmp_path: Path):
    """SIGKILL to all of it, three times; then a run completes, every byte is right, and nothing is left behind."""
    dest, scratch = tmp_path / "bags", tmp_path / "scratch"
    scratch.mkdir()
    values = environment(large, dest, TMPDIR=str(scratch))
    for attempt in range(3):
        log = tmp_path / f"log{attempt}"
        process = start(values, dest, log)
        os.killpg(process.pid, signal.SIGKILL)
        process.wait()
        assert any(dest.rglob(".azDownload-*")) and any(scratch.rglob("*")), "it was not in the middle"
        assert not any(secret in log.read_text() for secret in secrets_of(values))
        for path in dest.rglob("*.mcap"):
            if not path.name.startswith("."):
                path.unlink()  # so that the next attempt has a middle, too
    code, printed, _ = download(values)
    assert code == 0, printed
    assert not list(dest.rglob(".azDownload-*")) and not any(scratch.iterdir())
    first = (dest / "bag0/bag0_0.mcap").read_bytes()
    assert len(first) == 64 * MIB
    assert all((dest / f"bag{i}/bag{i}_0.mcap").read_bytes() == first[i:] for i in range(1, 4))


def test_stopped_in_the_middle(large: Azurite, tmp_path: Path):
    """SIGTERM: 75 within seconds, nothing left behind, no azcopy that goes on; a rerun completes."""
    dest, log = tmp_path / "bags", tmp_path / "log"
    values = environment(large, dest)
    process = start(values, dest, log)
    started = time.monotonic()
    process.send_signal(signal.SIGTERM)
    assert process.wait(20) == 75 and time.monotonic() - started < 5
    assert "stopped by a signal" in error_line(log.read_text())
    assert not any(secret in log.read_text() for secret in secrets_of(values))
    assert not list(dest.rglob(".azDownload-*")) and not azcopies(dest)
    assert download(values)[0] == 0
    assert len(files(dest)) == 4


def test_a_slow_download_is_no_stalled_one(large: Azurite, tmp_path: Path):
    """All files are begun at once, with their full size on the disk from then on; what arrives is what counts."""
    slow = azcopy_with(tmp_path / "bin", 'exec REAL "$@" --cap-mbps 120 --block-size-mb 1')
    code, printed, seconds = download(environment(large, tmp_path / "bags", BLOB_STALL_S="4", PATH=slow))
    assert code == 0, printed
    assert seconds > 8, "not slow enough to show it"


def test_a_download_that_takes_too_long(large: Azurite, tmp_path: Path):
    """Bounded whatever it does; 1, because in a new pod it would begin again and take as long."""
    slow = azcopy_with(tmp_path / "bin", 'exec REAL "$@" --cap-mbps 20 --block-size-mb 1')
    code, printed, seconds = download(environment(large, tmp_path / "bags", BLOB_TIMEOUT_S="3", PATH=slow))
    assert code == 1 and "not complete after 3 s; raise blob_timeout_s" in error_line(printed), printed
    assert seconds < 15 and not list((tmp_path / "bags").rglob(".azDownload-*"))


def test_a_server_that_goes_away_in_the_middle(tmp_path: Path):
    """azcopy tries again for many minutes; BLOB_STALL_S ends that. 75, so that the task is run again."""
    with Azurite(tmp_path / "server") as going:
        going.upload("datasets", {f"houston_recordings/bag{i}/bag{i}_0.mcap": os.urandom(64 * MIB) for i in range(3)})
        dest, log = tmp_path / "bags", tmp_path / "log"
        values = environment(going, dest, BLOB_STALL_S="4")
        process = start(values, dest, log)
        going.stop()
        assert process.wait(40) == 75, log.read_text()
    assert "nothing has arrived for 4 s" in error_line(log.read_text())
    assert not any(secret in log.read_text() for secret in secrets_of(values))
    assert not list(dest.rglob(".azDownload-*")) and not azcopies(dest)


def test_a_server_that_never_answers(tmp_path: Path):
    """It takes the connection and is silent: bounded by the time-out of the listing."""
    with socket.create_server(("127.0.0.1", 0)) as silent:
        values = environment(
            Azurite(tmp_path), tmp_path / "bags", AZURE_BLOB_ENDPOINT=f"http://127.0.0.1:{silent.getsockname()[1]}/a",
            BLOB_CONNECT_S="2",
        )  # fmt: skip
        code, printed, seconds = download(values)
    assert code == 75 and "cannot be reached" in error_line(printed) and seconds < 20, printed


# -- the workflow -------------------------------------------------------------------------------------------------


def test_the_blob_workflow_killed_in_the_middle_and_run_again(server: Azurite, sample_bags: Path, tmp_path: Path):
    """The rendered command: downloads, is killed, is run again in the same pod, and trains to the end."""
    require()
    server.upload_folder("recordings", "sample", sample_bags)
    spec = submit(
        WORKFLOWS / "osmo-workflow-blob.yaml", "blob_container=recordings", "blob_prefix=sample/",
        "storage_url=azure://account/container/prefix", tiny(training__steps=2, training__save_freq=2),
    )  # fmt: skip
    task = place(spec)["train-act"]
    values = environment(server, tmp_path, AZURE_STORAGE_SAS=server.sas("recordings", "rl"))
    (credentials,) = task["credentials"].values()
    secrets = {name: values[name] for name in credentials}  # as OSMO sets them
    (tmp_path / "nothing").mkdir()  # at the storage url
    first_is_slow = f'[[ -e {tmp_path}/slow ]] || set -- "$@" --cap-mbps 8 --block-size-mb 1; touch {tmp_path}/slow; '
    path = azcopy_with(tmp_path / "bin", first_is_slow + 'exec REAL "$@"')
    box = TaskBox(
        tmp_path / "box", task, {0: tmp_path / "nothing"}, AZURE_BLOB_ENDPOINT=server.endpoint, **secrets,
        PATH=f"{tmp_path / 'bin'}:{Path(sys.executable).parent}:{path}:/osmo/usr/bin",
    )  # fmt: skip
    process, recordings = box.start(), box.folder / "data/rosbags"
    while not any(recordings.rglob(".azDownload-*")):
        assert process.poll() is None, box.log()
        time.sleep(0.01)
    box.kill()
    assert any(recordings.rglob(".azDownload-*")) and not list_checkpoints(box.run_dir), "it was not in the middle"
    assert box.run() == 0, box.log()
    assert "complete: the run is in azure://account/container/prefix/ur10e-act-checkpoint/workflow-1" in box.log()
    assert list_checkpoints(box.stored / "train-rosbag-act")
    assert not any(secret in box.log() for secret in secrets_of(values))
    environments = [path.read_bytes() for path in box.folder.rglob("*.json")]
    assert not any(secret.encode() in content for secret in secrets_of(values) for content in environments)
