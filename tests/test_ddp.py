"""Several processes train as one: real torchrun, gloo, two ranks on this machine."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch
import torch.distributed as dist

import train
from act_model import FrozenBatchNorm
from lerobot_checkpoint import load_policy, load_training_state, verify_checkpoint
from tests.azurite import free_port
from tests.once import once
from tests.tiny import ROOT, Operations, arguments, assert_same_run, metrics, run, run_process, torchrun, wait_for_step
from training.failures import collective_fault
from training.ranks import World

NO_VALIDATION = {"training__val_fraction": 0}
PLAIN = {"model__dropout": 0, "model__use_vae": "false", "training__log_freq": 1}
LONG = {"training__steps": 20, "training__save_freq": 5, "training__log_freq": 1}


def train_two(bags: Path, folder: Path, *flags: str, **overrides: object) -> Path:
    """Two ranks train to their end; -> the output directory."""
    done = run_process(bags, folder, *flags, launcher=torchrun(2), **overrides)
    assert done.returncode == 0, done.stderr
    return folder / "run"


@pytest.fixture(scope="session")
def unbroken(sample_bags: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What two ranks leave after LONG, never interrupted; read-only for the tests."""
    return once(tmp_path_factory, "ddp-unbroken", lambda folder: train_two(sample_bags, folder, **LONG)) / "run"


@pytest.fixture
def begun(sample_bags: Path, tmp_path: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The output directory of the same run in `tmp_path`, of which two ranks have done five steps."""
    five = LONG | {"training__steps": 5}
    made = once(tmp_path_factory, "ddp-begun", lambda folder: train_two(sample_bags, folder, **five)) / "run"
    return shutil.copytree(made, tmp_path / "run", symlinks=True)


def test_two_ranks_train_like_one_with_twice_the_batch(sample_bags: Path, tmp_path: Path):
    """Dropout and VAE off: AdamW's losses agree within 1e-4 over six steps (rounding grows with each), validation too;
    rank 0 alone wrote; the effective batch is said and logged."""
    ranks = run_process(sample_bags, tmp_path / "two", launcher=torchrun(2), training__steps=6, **PLAIN)
    assert ranks.returncode == 0, ranks.stderr
    one = run(sample_bags, tmp_path / "one", training__steps=6, training__batch_size=4, **PLAIN)
    ours, theirs = (metrics(d) for d in (tmp_path / "two/run", one))
    assert [m["loss"] for m in ours] == pytest.approx([m["loss"] for m in theirs], rel=1e-4)
    assert [m["grad_norm"] for m in ours] == pytest.approx([m["grad_norm"] for m in theirs], rel=1e-4)
    ours, theirs = (metrics(d, "val_l1_loss") for d in (tmp_path / "two/run", one))
    assert [m["val_l1_loss"] for m in ours] == pytest.approx([m["val_l1_loss"] for m in theirs], rel=1e-4)
    assert "effective batch 4 = 2 per GPU x 2" in ranks.stdout
    assert ranks.stdout.count("training 11") == 1 and len(metrics(tmp_path / "two/run")) == 6
    assert metrics(tmp_path / "two/run")[0]["effective_batch"] == 4


GRADIENTS = """
import sys, torch, train
from pathlib import Path
out, args = Path(sys.argv[2]), sys.argv[3:]
grads = []
original = torch.nn.utils.clip_grad_norm_
def record(parameters, *rest):
    parameters = list(parameters)
    grads.append([p.grad.clone() for p in parameters])
    return original(parameters, *rest)
torch.nn.utils.clip_grad_norm_ = record
class SGD(torch.optim.SGD):
    def __init__(self, groups, weight_decay, fused):
        super().__init__(groups, lr=1e-4, fused=True)
torch.optim.AdamW = SGD
weights = {}
original_fit = train.Trainer.fit
def fit(self):
    original_fit(self)
    weights.update(self.model.state_dict())
    if self.world.is_main:
        torch.save({"first": grads[0], "weights": weights}, out)
train.Trainer.fit = fit
sys.exit(train.main(args))
"""


def test_reduced_gradients_and_sgd_steps_agree(sample_bags: Path, tmp_path: Path):
    """The loss is averaged over the *global* valid elements: padding differs between the ranks, and still the reduced
    gradients agree within 1e-5 of each tensor's norm, and 20 SGD steps within 1e-6."""
    results = []
    (tmp_path / "probe.py").write_text(GRADIENTS)
    for name, launcher, batch in (("two", torchrun(2), 2), ("one", (sys.executable,), 4)):
        settings = {"training__steps": 20, "training__save_freq": 100, "training__grad_clip_norm": 1e9}
        settings |= {"model__chunk_size": 60, "model__n_action_steps": 60, "training__batch_size": batch, **PLAIN}
        command = [*launcher, str(tmp_path / "probe.py"), "train.py", str(tmp_path / f"{name}.pt")]
        environment = {**os.environ, "PYTHONPATH": str(ROOT)}
        done = subprocess.run(
            [*command, *arguments(sample_bags, tmp_path / name, **settings)], env=environment, cwd=ROOT,
            capture_output=True, text=True, timeout=240,
        )  # fmt: skip
        assert done.returncode == 0, done.stderr
        results.append(torch.load(tmp_path / f"{name}.pt"))
    two, one = results
    for ours, theirs in zip(two["first"], one["first"], strict=True):
        assert (ours - theirs).norm() <= 1e-5 * theirs.norm() + 1e-9
    worst = max(float((two["weights"][n] - one["weights"][n]).abs().max()) for n in one["weights"])
    assert worst < 1e-6


@pytest.fixture
def alone() -> Iterator[World]:
    """One rank in a process group of its own, which takes itself for one of two."""
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    yield World(rank=0, local_rank=0, size=2, node=0, nodes=1)
    dist.destroy_process_group()


@pytest.mark.parametrize("compression", ["none", "bf16"])
def test_gradients_alone_travel(alone: World, compression: str):
    """No buffer is sent in a forward pass, and gradients lie where they are sent from. With bf16 they are rounded to
    it, else they are those of the model alone, bit for bit."""
    model = torch.nn.Sequential(torch.nn.Conv2d(3, 4, 1), FrozenBatchNorm(4), torch.nn.Conv2d(4, 2, 1))
    parameters, images = list(model.parameters()), torch.randn(2, 3, 5, 5, generator=torch.Generator().manual_seed(0))
    expected = torch.autograd.grad(model(images).square().sum(), parameters)
    ddp = alone.parallel(model, compression)
    for _ in range(3):  # DDP arranges its buckets anew in the second
        model.zero_grad(set_to_none=True)
        with Operations() as done:
            ddp(images).square().sum().backward()
    assert any("c10d.allreduce_" in name for name in done.names)
    assert not [name for name in done.names if "c10d.broadcast" in name]
    assert len({parameter.grad.untyped_storage().data_ptr() for parameter in parameters}) == 1
    for parameter, gradient in zip(parameters, expected, strict=True):
        assert torch.equal(parameter.grad, gradient.bfloat16().float() if compression == "bf16" else gradient)


def test_only_the_last_part_s_gradients_travel(alone: World):
    """Before it, gradients are added up on each rank: one exchange a step, and the same gradients."""
    model = torch.nn.Linear(3, 2)
    first, last = torch.randn(2, 4, 3, generator=torch.Generator().manual_seed(0))
    expected = torch.autograd.grad(model(torch.cat([first, last])).square().sum(), model.weight)[0]
    ddp = alone.parallel(model, "none")
    for part, now in ((first, False), (last, True)):
        with Operations() as done, alone.exchanging(ddp, now):
            ddp(part).square().sum().backward()
        assert any("c10d.allreduce_" in name for name in done.names) == now
    torch.testing.assert_close(model.weight.grad, expected)


def test_two_ranks_that_round_gradients_and_take_two_parts(sample_bags: Path, tmp_path: Path):
    """ddp_compression and accumulate_steps: losses are those of one process with the same effective batch, which is
    said, but for what bfloat16 rounds; the checkpoint says how it came about."""
    settings = {"training__steps": 4, "training__batch_size": 1, "training__accumulate_steps": 2, **PLAIN}
    two = run_process(sample_bags, tmp_path / "two", launcher=torchrun(2), training__ddp_compression="bf16", **settings)
    assert two.returncode == 0, two.stderr
    assert "effective batch 4 = 1 per GPU x 2 x 2 accumulated" in two.stdout
    one = run(sample_bags, tmp_path / "one", training__steps=4, training__batch_size=4, **PLAIN)
    ours, theirs = (metrics(d) for d in (tmp_path / "two/run", one))
    assert [m["loss"] for m in ours] == pytest.approx([m["loss"] for m in theirs], rel=0.02)
    assert ours[0]["loss"] == pytest.approx(theirs[0]["loss"], rel=1e-5) and ours[3]["loss"] != theirs[3]["loss"]
    assert ours[0]["effective_batch"] == 4
    state = load_training_state(tmp_path / "two/run/last")
    assert state["samples_seen"] == 16
    said = {name: state["environment"][f"training.{name}"] for name in ("ddp_compression", "accumulate_steps")}
    assert said == {"ddp_compression": "bf16", "accumulate_steps": 2}


def test_two_ranks_resume_bit_for_bit(begun: Path, unbroken: Path, sample_bags: Path, tmp_path: Path):
    """Dropout and VAE on, two ranks on gloo: interrupted and resumed equals unbroken, to the last bit."""
    assert_same_run(train_two(sample_bags, tmp_path, "--resume", **LONG), unbroken)


def test_another_number_of_ranks_keeps_the_place_and_is_said(begun: Path, sample_bags: Path, tmp_path: Path, capsys):
    """Two ranks, then one: the run goes on from the same sample and says what is no longer exact."""
    run(sample_bags, tmp_path, "--resume", training__steps=6)
    assert "ranks (was 2, is 1)" in capsys.readouterr().out
    assert load_training_state(begun / "last")["samples_seen"] == 5 * 4 + 2


def start(bags: Path, folder: Path, *options: str, script: Path = ROOT / "train.py", **overrides) -> subprocess.Popen:
    command = [*torchrun(2, *options), str(script), *arguments(bags, folder, ("--resume",), **overrides)]
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    return subprocess.Popen(
        command, cwd=ROOT, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
        start_new_session=True,
    )  # fmt: skip


def ranks_of(launcher: subprocess.Popen) -> list[int]:
    children = Path(f"/proc/{launcher.pid}/task/{launcher.pid}/children").read_text().split()
    return [int(c) for c in children if "train.py" in Path(f"/proc/{c}/cmdline").read_text()]


def test_sigterm_to_torchrun_saves_on_all_ranks_together(sample_bags: Path, tmp_path: Path):
    """torchrun only ever returns 1: the marker tells the command around it that this was a stop, exit code 75."""
    process = start(sample_bags, tmp_path, training__steps=5000, training__log_freq=1, training__save_freq=5000)
    wait_for_step(tmp_path / "run", 2, process)
    process.send_signal(signal.SIGTERM)
    _, stderr = process.communicate(timeout=60)
    assert process.returncode == 1
    assert stderr.count("stopped by SIGTERM at step") == 1, stderr
    marker = json.loads((tmp_path / "run/stopped.json").read_text())
    assert marker["exit_code"] == 75
    saved = load_training_state(tmp_path / "run/last")["step"]
    assert saved == metrics(tmp_path / "run")[-1]["step"] and f"at step {saved};" in marker["stopped by"]


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_to_the_whole_process_group_loses_no_save(sample_bags: Path, tmp_path: Path, number: signal.Signals):
    """As SLURM and systemd stop a job, and a terminal's Ctrl-C: each rank gets it twice, the second from torchrun."""
    process = start(sample_bags, tmp_path, training__steps=5000, training__log_freq=1, training__save_freq=5000)
    wait_for_step(tmp_path / "run", 2, process)
    os.killpg(process.pid, number)
    _, stderr = process.communicate(timeout=60)
    assert process.returncode == 1, stderr
    marker = json.loads((tmp_path / "run/stopped.json").read_text())
    verify_checkpoint(tmp_path / "run/last")
    assert f"at step {load_training_state(tmp_path / 'run/last')['step']};" in marker["stopped by"]


def test_a_killed_rank_is_restarted_by_torchrun_and_the_weights_are_exact(
    unbroken: Path, sample_bags: Path, tmp_path: Path
):
    """--max-restarts: one rank is killed; torchrun restarts both, they resume by themselves (the store trap)."""
    process = start(sample_bags, tmp_path, "--max-restarts=2", **LONG)
    wait_for_step(tmp_path / "run", 7, process)
    os.kill(ranks_of(process)[1], signal.SIGKILL)
    _, stderr = process.communicate(timeout=200)
    assert process.returncode == 0, stderr
    assert_same_run(tmp_path / "run", unbroken)


SICK = """
import os, sys, train
original, calls = train.loss_terms, []
def sick(*args):
    calls.append(None)
    l1_sum, n_valid, kl_sum = original(*args)
    bad = os.environ["RANK"] == "1" and len(calls) == 3
    return (l1_sum * float("inf") if bad else l1_sum), n_valid, kl_sum
train.loss_terms = sick
sys.exit(train.main(sys.argv[2:]))
"""


def test_a_loss_that_is_not_finite_on_one_rank_stops_all(sample_bags: Path, tmp_path: Path):
    """Rank 1's loss is infinite in step 3: no rank takes that step, one line names it, all ranks exit with 1."""
    (tmp_path / "probe.py").write_text(SICK)
    settings = {"training__steps": 5000, "training__log_freq": 1000, "training__save_freq": 2, **NO_VALIDATION}
    done = run_process(
        sample_bags, tmp_path, launcher=(*torchrun(2), str(tmp_path / "probe.py")),
        env={"PYTHONPATH": str(ROOT)}, **settings,
    )  # fmt: skip
    assert done.returncode == 1
    (line,) = our_errors(done.stderr)
    assert "step 3:" in line and "frame" in line and "checkpoint_000002" in line
    assert load_training_state(tmp_path / "run/last")["step"] == 2


UNEVEN = """
import os, pathlib, sys, time, train
from lerobot_checkpoint import saving
original, move, calls = train.loss_terms, saving.move_into_place, []
saving_began = pathlib.Path(__file__).with_name("saving began")
def fails(*args):
    calls.append(None)
    if os.environ["RANK"] == "1" and len(calls) == 3:
        while not saving_began.exists():
            time.sleep(0.05)
        raise train.TrainingError("rank 1 cannot go on")
    return original(*args)
train.loss_terms = fails
def slowly(*paths):
    saving_began.touch()
    time.sleep(3)
    move(*paths)
    print("moved after rank 1 had failed", flush=True)
saving.move_into_place = slowly
sys.exit(train.main(sys.argv[2:]))
"""


def test_a_save_under_way_is_finished_when_another_rank_fails(sample_bags: Path, tmp_path: Path):
    """Rank 1 fails in step 3 while rank 0 still writes the checkpoint of step 2: what was trained is not lost."""
    (tmp_path / "probe.py").write_text(UNEVEN)
    settings = {"training__steps": 5000, "training__save_freq": 2, **NO_VALIDATION}
    done = run_process(
        sample_bags, tmp_path, launcher=(*torchrun(2), str(tmp_path / "probe.py")), env={"PYTHONPATH": str(ROOT)},
        **settings,
    )  # fmt: skip
    assert done.returncode == 1
    assert our_errors(done.stderr) == ["error: rank 1 cannot go on"]
    assert "moved after rank 1 had failed" in done.stdout
    verify_checkpoint(tmp_path / "run/checkpoint_000002")


SLOW_TO_FINISH = """
import sys, time, train
from training.trackers import NoTracker
class Run(NoTracker):
    def finish(self, exit_code=None):
        time.sleep(3)
train._init_wandb = lambda cfg, output_dir, is_main, run_id: Run() if is_main else NoTracker()
sys.exit(train.main(sys.argv[1:]))
"""


def test_a_stop_is_marked_though_rank_0_has_to_close_its_logs(sample_bags: Path, tmp_path: Path):
    """SIGTERM to the ranks themselves: none leaves before rank 0 has written stopped.json, because torchrun then ends
    the others."""
    probe = tmp_path / "probe_train.py"
    probe.write_text(SLOW_TO_FINISH)
    process = start(sample_bags, tmp_path, script=probe, training__steps=5000, training__log_freq=1)
    wait_for_step(tmp_path / "run", 2, process)
    for rank in ranks_of(process):
        os.kill(rank, signal.SIGTERM)
    _, stderr = process.communicate(timeout=60)
    assert process.returncode == 1 and stderr.count("stopped by SIGTERM at step") == 1, stderr
    assert json.loads((tmp_path / "run/stopped.json").read_text())["exit_code"] == 75


def our_errors(stderr: str) -> list[str]:
    return [line for line in stderr.replace("\r", "\n").splitlines() if line.startswith("error: ")]


@pytest.mark.parametrize(
    ("overrides", "words"),
    [
        ({"data__bag_dir": "/nowhere"}, ["/nowhere"]),
        ({"data__camera_topic": "/cam"}, ["/cam"]),
        ({"training__batch_size": "-1"}, ["training.batch_size"]),
        ({"training__resume": "/no/checkpoint"}, ["/no/checkpoint"]),
    ],
)
def test_a_mistake_under_two_ranks_is_one_line(sample_bags: Path, tmp_path: Path, overrides: dict, words: list[str]):
    """All ranks end, one line says why, no rank reports another one's timeout."""
    began = time.monotonic()
    done = run_process(sample_bags, tmp_path, launcher=torchrun(2), **overrides)
    assert done.returncode == 1
    (line,) = our_errors(done.stderr)
    assert all(word in line for word in words)
    ours = done.stderr.split("torch/distributed")[0]
    assert "Traceback" not in ours
    assert time.monotonic() - began < 60


def test_a_rank_that_disappears_takes_the_other_down_with_one_line(sample_bags: Path, tmp_path: Path):
    """Killed without a word: the survivor says that another rank is gone, not a gloo traceback, within seconds."""
    process = start(sample_bags, tmp_path, training__steps=5000, training__log_freq=1)
    wait_for_step(tmp_path / "run", 2, process)
    os.kill(ranks_of(process)[1], signal.SIGKILL)
    killed = time.monotonic()
    _, stderr = process.communicate(timeout=60)
    assert process.returncode == 1 and time.monotonic() - killed < 20
    assert len(our_errors(stderr)) <= 1
    assert "Connection closed" not in stderr.split("torch.distributed.elastic")[0] or our_errors(stderr)


@pytest.fixture
def start_two_nodes(sample_bags: Path, tmp_path: Path) -> Iterator[Callable[..., list[subprocess.Popen]]]:
    """A function that starts two torchruns on loopback (--nnodes=2) with output and cache directories of their own;
    none of them outlives the test."""
    nodes: list[subprocess.Popen] = []

    def start(script: Path = ROOT / "train.py", **overrides) -> list[subprocess.Popen]:
        port = free_port()
        for rank in range(2):
            command = [
                sys.executable, "-m", "torch.distributed.run", "--nnodes=2", "--nproc_per_node=1",
                f"--node_rank={rank}", "--master_addr=127.0.0.1", f"--master_port={port}", str(script),
            ]  # fmt: skip
            own = tmp_path / f"node{rank}"
            command += arguments(sample_bags, own, ("--resume",), data__cache_dir=own / "cache", **overrides)
            environment = {**os.environ, "PYTHONPATH": str(ROOT)}
            nodes.append(
                subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
            )
        return nodes[-2:]

    yield start
    for node in nodes:
        node.terminate()  # which it passes on to its rank
        node.wait()


def test_two_nodes_without_a_shared_disk(start_two_nodes, tmp_path: Path):
    """Only rank 0 wrote, and the resumed second half gets its state from rank 0."""
    for steps in (2, 4):
        nodes = start_two_nodes(training__steps=steps)
        results = [node.communicate(timeout=200) for node in nodes]
        assert [node.returncode for node in nodes] == [0, 0], results
    assert load_training_state(tmp_path / "node0/run/last")["step"] == 4
    assert not (tmp_path / "node1/run").exists()
    assert (tmp_path / "node1/cache").exists()
    assert load_policy(tmp_path / "node0/run") is not None


STOPPED_EARLY = """
import os, signal, sys, train
original = train.load_episodes
def load_episodes(*args, **options):
    if os.environ["GROUP_RANK"] == "1":
        os.kill(os.getpid(), signal.SIGTERM)
    return original(*args, **options)
train.load_episodes = load_episodes
sys.exit(train.main(sys.argv[1:]))
"""


def test_a_node_that_is_stopped_while_it_decodes_stops_the_others(start_two_nodes, tmp_path: Path):
    """They would wait for its bags for ever, in no collective that could time out."""
    (tmp_path / "probe.py").write_text(STOPPED_EARLY)
    nodes = start_two_nodes(script=tmp_path / "probe.py")
    results = [node.communicate(timeout=60) for node in nodes]
    assert [node.returncode for node in nodes] == [1, 1], results
    assert "stopped by another rank before the first step" in results[0][1]
    assert json.loads((tmp_path / "node0/run/stopped.json").read_text())["exit_code"] == train.EXIT_STOPPED == 75


FAULTS = {  # texts of torch's NCCLUtils.cpp and ProcessGroupGloo: no NCCL runs here
    "NCCL error in: NCCL.cpp:3690, remote process exited or there was a network error, NCCL version 2.27.3\n"
    "ncclRemoteError: A call failed possibly due to a network error or a remote process exiting prematurely.\n"
    "Last error:\nsocketProgressOpt: recv from 10.0.0.2<40000> failed: Connection reset by peer": "another rank",
    "[gloo/transport/tcp/pair.cc:547] Connection closed by peer [127.0.0.1]:3456": "another rank is gone",
    "NCCL error in: NCCL.cpp:94, invalid usage (run with NCCL_DEBUG=WARN for details), NCCL version 2.27.3\n"
    "ncclInvalidUsage: This usually reflects invalid usage of NCCL library.\nLast error:\n"
    "Duplicate GPU detected : rank 1 and rank 0 both on CUDA device 1000": "NCCL fails on this machine",
    "NCCL error in: ProcessGroupNCCL.cpp:94, unhandled system error, NCCL version 2.27.3\nncclSystemError: System call "
    "(e.g. socket, malloc) or external library call failed or device error.\nLast error:\n"
    "Error while creating shared memory segment /dev/shm/nccl-x (size 9637888)": "NCCL fails on this machine",
}  # fmt: skip


@pytest.mark.parametrize("text, words", FAULTS.items(), ids=["a peer's end", "the same on gloo", "settings", "shm"])
def test_a_fault_at_home_is_not_blamed_on_another_rank(text: str, words: str):
    """A lost node is worth another start, a machine on which NCCL cannot work is not; the reason is not cut off."""
    line = collective_fault(text)
    assert words in line and "\n" not in line and len(line) < 300
    assert "another rank" in words or text[-30:] in line


@pytest.mark.parametrize("device, backend", [("cuda", "nccl"), ("cpu", "gloo")])
def test_the_backend_belongs_to_the_device(device: str, backend: str, monkeypatch):
    """NCCL between GPUs, each rank with its own. (There is no GPU in CI: torch's part is not called.)"""
    asked: list[object] = []
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setattr(torch.cuda, "set_device", asked.append)
    monkeypatch.setattr(train.dist, "init_process_group", lambda name, **options: asked.append(name))
    world = train.detect_ddp()
    world.store, world.local_rank = object(), 1
    train.join_ddp(world, device)
    assert asked == ([1, backend] if device == "cuda" else [backend])
