"""osmo-workflow-ddp.yaml on two nodes: two network namespaces with a cable between them, torchrun across it, gloo.

The rendered commands run as they are; {{host:train-act-ddp}} is a name that each node's /etc/hosts maps to node 0's
address. OSMO's part, restarting a group, is played by killing and starting commands in the order that OSMO does.
"""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from lerobot_checkpoint import list_checkpoints, verify_checkpoint
from tests.osmo_spec import place, submit
from tests.osmo_task import WORKFLOWS, TaskBox, require, tiny
from tests.tiny import metrics

LEAD, FOLLOWER = "train-act-ddp", "train-act-ddp-1"
HOSTS = {LEAD: "node-0.workers.example", FOLLOWER: "node-1.workers.example"}
ADDRESSES = {LEAD: "10.211.0.1", FOLLOWER: "10.211.0.2"}


def ip(*words: str) -> None:
    subprocess.run(["ip", *words], check=True, capture_output=True, text=True, timeout=20)


@pytest.fixture
def networks() -> Iterator[dict[str, str]]:
    """A network namespace per node, joined by a cable; gone afterwards."""
    require("ip")
    names = {node: f"osmo-test-{os.getpid()}-{node[-1]}" for node in HOSTS}
    ends = {node: f"o{os.getpid()}-{node[-1]}" for node in HOSTS}
    try:
        for name in names.values():
            ip("netns", "add", name)
        ip("link", "add", ends[LEAD], "type", "veth", "peer", "name", ends[FOLLOWER])
        for node, name in names.items():
            ip("link", "set", ends[node], "netns", name)
            ip("-n", name, "addr", "add", f"{ADDRESSES[node]}/24", "dev", ends[node])
            ip("-n", name, "link", "set", ends[node], "up")
            ip("-n", name, "link", "set", "lo", "up")
        yield names
    finally:
        for name in names.values():
            subprocess.run(["ip", "netns", "delete", name], capture_output=True, timeout=20)


@pytest.fixture
def nodes(networks: dict[str, str], sample_bags: Path, tmp_path: Path) -> Iterator:
    """A function that makes the two nodes' boxes, with settings of the run; none of them outlives the test."""
    made: list[TaskBox] = []

    def make(
        peer_wait_s: int = 60, stored: Path | None = None, attempt: str = "", **changes: object
    ) -> tuple[TaskBox, TaskBox]:
        settings = {"training__save_freq": 3, "training__log_freq": 1, "training__val_fraction": 0, **changes}
        storage = ["storage_url=azure://account/container/prefix"] if stored else []
        spec = submit(WORKFLOWS / "osmo-workflow-ddp.yaml", "n_nodes=2", tiny(**settings), *storage)
        for name, task in place(spec, hosts=HOSTS).items():
            hosts = {HOSTS[node]: address for node, address in ADDRESSES.items()}
            hosts[socket.gethostname()] = ADDRESSES[name]  # as Kubernetes writes it
            environment = {"PEER_WAIT_S": str(peer_wait_s), "GLOO_SOCKET_IFNAME": f"o{os.getpid()}-{name[-1]}"}
            inputs, folder = {0: sample_bags, 1: stored}, tmp_path / attempt / name
            common = dict(network=networks[name], hosts=hosts, storage=tmp_path / "storage")
            made.append(TaskBox(folder, task, inputs, **common, **environment))
        return made[-2], made[-1]

    yield make
    for box in made:
        box.lose()


def test_a_lost_node_restarts_the_group(nodes):
    """Node 1 is lost in the middle. Node 0 does not fail, which would fail the group: it waits to be restarted in
    place, goes on from its own checkpoints, and the run completes. The lead alone hands over."""
    lead, follower = nodes(training__steps=10)
    lead.start()
    lost = follower.start()
    lead.wait_for(lead.run_dir / "checkpoint_000003")
    follower.lose()
    assert lost.returncode == -signal.SIGKILL
    lead.wait_for("another node stopped or was lost; waiting up to 60 s")
    assert not any(lead.delivered.iterdir())

    lead.kill()  # what OSMO does to the others when it reschedules one; a second later at the earliest it starts all
    time.sleep(1)
    processes = lead.start(), follower.start()
    assert [box.wait(process) for box, process in zip((lead, follower), processes, strict=True)] == [0, 0], lead.log()
    assert "resuming from /output/train-rosbag-act/checkpoint_" in lead.log()
    assert "effective batch 4 = 2 per GPU x 2" in lead.log()
    assert [m["step"] for m in metrics(lead.run_dir)] == list(range(1, 11))
    (handed,) = lead.delivered.iterdir()
    verify_checkpoint(list_checkpoints(handed)[-1])
    assert list_checkpoints(handed)[-1].name == "checkpoint_000010"
    assert not any(follower.delivered.iterdir()) and not list_checkpoints(follower.run_dir)


def test_a_lost_lead_comes_back_on_another_node(nodes, tmp_path: Path):
    """With a storage url: the lead's new pod takes up what was uploaded of the lost one's run; node 1 is restarted in
    place. Without one, there would be nothing to take up."""
    (tmp_path / "nothing").mkdir()
    lead, follower = nodes(training__steps=8, stored=tmp_path / "nothing")
    lead.start(), follower.start()
    lead.wait_for("uploaded checkpoint_000003")
    lead.lose()
    follower.wait_for("another node stopped or was lost; waiting up to 60 s")
    follower.kill()
    time.sleep(1)
    lead, _ = nodes(training__steps=8, stored=lead.stored, attempt="again")
    processes = lead.start(), follower.start()
    assert [box.wait(process) for box, process in zip((lead, follower), processes, strict=True)] == [0, 0], lead.log()
    assert "taking up checkpoint_00000" in lead.log()
    assert [m["step"] for m in metrics(lead.run_dir)] == list(range(1, 9)), "the curve has no gap"
    verify_checkpoint(list_checkpoints(lead.stored / "train-rosbag-act")[-1])
    for rank, code in ((0, 0), (1, 0)):
        name = f".heartbeat{f'-{rank}' if rank else ''}.json"
        assert json.loads((lead.stored / "train-rosbag-act" / name).read_text())["code"] == code, "a word of each node"


@pytest.mark.parametrize("asked", ["lead", "follower"])
def test_a_stopped_node_stops_all_with_75(nodes, asked: str):
    """SIGTERM to one node alone, through the script to its ranks: all save at the same step, and both commands end with
    75, which torchrun itself would have turned into 1."""
    lead, follower = nodes(peer_wait_s=2, training__steps=500, training__save_freq=500)
    first, second = lead.start(), follower.start()
    lead.wait_for(lead.run_dir / "metrics.jsonl")
    (first if asked == "lead" else second).send_signal(signal.SIGTERM)
    assert (lead.wait(first), follower.wait(second)) == (75, 75), lead.log() + follower.log()
    assert "waiting up to" not in lead.log() + follower.log(), "nobody was lost"
    (saved,) = list_checkpoints(lead.run_dir)
    verify_checkpoint(saved)
    assert (lead.run_dir / "stopped.json").exists() and not any(lead.delivered.iterdir())


def test_a_node_that_fails_says_why_and_ends_with_1(nodes):
    """An error is not a lost peer: the node whose rank says why ends with 1 at once; the other one waits, and does not
    end the group's chance of an orderly failure by claiming one of its own."""
    lead, follower = nodes(peer_wait_s=2, training__steps=3)
    argument = "--override=training.batch_size=2"
    follower.task["args"][follower.task["args"].index(argument)] = "--override=training.batch_size=0"
    first, second = lead.start(), follower.start()
    started = time.monotonic()
    assert follower.wait(second) == 1, follower.log()
    assert "error: --override training.batch_size=0" in follower.log()
    assert lead.wait(first) == 75, lead.log()
    assert time.monotonic() - started < 90


def test_a_node_whose_rank_fails_in_torch_ends_with_1(nodes):
    """torch names its own errors `torch.AcceleratorError`, and torchrun's lines begin with `torch.` as well: the one is
    a reason, the other is not. (A script stands in for train.py on a GPU that fails.)"""
    lead, follower = nodes(peer_wait_s=2)
    (lead.folder / "workspace/train.py").write_text("import time; time.sleep(60)")
    failing = "import os; os.write(2, b'[rank1]: torch.AcceleratorError: CUDA error: out of luck\\n'); os._exit(1)"
    (follower.folder / "workspace/train.py").write_text(failing)
    lead.start()
    assert follower.run() == 1, follower.log()
    assert "waiting up to" not in follower.log()


@pytest.fixture
def two_gpus(networks: dict[str, str], sample_bags: Path, tmp_path: Path) -> Iterator[TaskBox]:
    """One node with two ranks, as the guide advises for several GPUs in one machine."""
    settings = tiny(training__steps=30, training__save_freq=30, training__log_freq=1, training__val_fraction=0)
    spec = submit(WORKFLOWS / "osmo-workflow-ddp.yaml", "n_nodes=1", "gpus_per_node=2", settings)
    box = TaskBox(
        tmp_path, place(spec, hosts=HOSTS)[LEAD], {0: sample_bags}, network=networks[LEAD],
        hosts={HOSTS[LEAD]: "127.0.0.1", socket.gethostname(): "127.0.0.1"}, GLOO_SOCKET_IFNAME="lo",
    )  # fmt: skip
    yield box
    box.lose()


def test_two_ranks_on_one_node_stop_and_go_on(two_gpus: TaskBox):
    """SIGTERM reaches both, they save at the same step, and the next start completes the run."""
    process = two_gpus.start()
    two_gpus.wait_for(two_gpus.run_dir / "metrics.jsonl")
    process.send_signal(signal.SIGTERM)
    assert two_gpus.wait(process) == 75, two_gpus.log()
    (saved,) = list_checkpoints(two_gpus.run_dir)
    verify_checkpoint(saved)
    assert two_gpus.run() == 0, two_gpus.log()
    assert f"resuming from /output/train-rosbag-act/{saved.name}" in two_gpus.log()
    assert "effective batch 4 = 2 per GPU x 2" in two_gpus.log()
    assert [m["step"] for m in metrics(two_gpus.run_dir)] == list(range(1, 31))


def test_one_node_that_fails_without_a_reason_is_not_run_again(two_gpus: TaskBox):
    """There is no other node that could have been lost."""
    (two_gpus.folder / "workspace/train.py").write_text("raise SystemExit(1)")
    assert two_gpus.run() == 1
    assert "error: train-entrypoint: the ranks failed, and none of them says why" in two_gpus.log()


DEATHS = {
    "out of memory": (signal.SIGKILL, 137, "a rank of this node was killed, most likely for want of memory"),
    "crashed": (signal.SIGSEGV, 1, "a rank of this node crashed with signal 11"),
}


@pytest.mark.parametrize("death, code, message", DEATHS.values(), ids=list(DEATHS))
def test_a_rank_that_dies_is_not_restarted_for_ever(nodes, death: signal.Signals, code: int, message: str):
    """No Python line says why: 137, as for a single process out of memory, or 1. OSMO fails the group instead of trying
    the same again."""
    lead, follower = nodes(peer_wait_s=2, training__steps=500, training__save_freq=500)
    first, second = lead.start(), follower.start()
    lead.wait_for(lead.run_dir / "metrics.jsonl")
    (rank,) = descendants(second.pid, "train.py")
    os.kill(rank, death)
    assert follower.wait(second) == code, follower.log()
    assert message in follower.log()
    assert lead.wait(first) == 75, lead.log()


def descendants(pid: int, script: str) -> list[int]:
    """Python processes below `pid` that run `script` itself (not torchrun, which has it as an argument)."""
    parents, commands = {}, {}
    for folder in Path("/proc").iterdir():
        if folder.name.isdigit():
            try:
                parents[int(folder.name)] = int((folder / "stat").read_text().rpartition(")")[2].split()[1])
                commands[int(folder.name)] = (folder / "cmdline").read_bytes().decode().split("\0")
            except OSError:
                continue
    found = []
    for each, words in commands.items():
        above = each
        while above in parents and above != pid:
            above = parents[above]
        if above == pid and len(words) > 2 and "python" in words[0] and any(w.endswith(script) for w in words[1:3]):
            found.append(each)
    return found
