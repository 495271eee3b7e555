"""A step as one CUDA graph, as far as it can be shown without a GPU: it can be captured, and it is repeated rightly.

A capture refuses whatever reads from the device, repeats numbers and addresses as they were, and repeats no Python.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
import torch._dynamo.config

import train
from lerobot_checkpoint import load_training_state
from tests.tiny import Operations, arguments, assert_same_run, run, trainer
from training import graphs, identity
from training.errors import ConfigError
from training.ranks import World

# The default network's layers, at a width that costs nothing: operations are counted, not computed.
LAYERS = {"model__n_encoder_layers": 4, "model__n_vae_encoder_layers": 4}
OPERATIONS = {"fp32": 1138, "bf16": 1494}  # of a step; both may fall, and neither may grow

# Rates that differ from step to step and that float32 does not round: a warm-up to a power of two in eight steps.
RATES = {
    "training__scheduler": "cosine", "training__warmup_steps": 8, "training__steps": 9, "training__min_lr": 0.0,
    "training__lr": 2**-10, "training__lr_backbone": 2**-12, "training__log_freq": 1,
}  # fmt: skip


@pytest.mark.parametrize("precision", OPERATIONS)
def test_a_step_never_waits_for_the_device(sample_bags: Path, tmp_path: Path, precision: str):
    """No operation reads from the device or is given numbers of the host's, and there are no more than there were."""
    ready = trainer(sample_bags, tmp_path, **LAYERS, training__precision=precision)
    batch = ready.prepare(next(iter(ready.loader)))
    ready.train_step(batch)
    with Operations() as done:
        ready.step_on_device(batch)
    assert not done.waiting
    assert 0.95 * OPERATIONS[precision] < len(done.launched) <= OPERATIONS[precision], len(done.launched)


def test_a_step_leaves_everything_where_it_was(sample_bags: Path, tmp_path: Path):
    """Weights, what Adam remembers, the flags and the log's sums: a graph knows them by their addresses."""
    ready = trainer(sample_bags, tmp_path)
    batch = ready.prepare(next(iter(ready.loader)))

    def addresses() -> list[int]:
        state = [value for values in ready.optimizer.state.values() for value in values.values()]
        lasting = [*ready.model.parameters(), *ready.model.buffers(), *state]
        lasting += [ready.optimizer.found_inf, ready.window, ready.asked]
        return [tensor.data_ptr() for tensor in lasting]

    ready.train_step(batch)
    before = addresses()
    ready.train_step(batch)
    assert addresses() == before and len(before) > 200


@pytest.mark.skipif(
    not hasattr(torch._dynamo.config, "trace_autograd_ops"), reason="this torch traces no backward pass"
)
def test_a_step_has_no_graph_break(sample_bags: Path, tmp_path: Path, monkeypatch):
    """torch.compile(fullgraph=True) traces forward, loss, backward, clipping and flags as one graph, with the same
    gradients. Not the fused AdamW, into which torch does not trace. No compiler is needed."""
    monkeypatch.setattr(torch._dynamo.config, "trace_autograd_ops", True)
    ready = trainer(sample_bags, tmp_path, model__dropout=0)  # compiled code draws dropout's noise its own way
    batch = ready.prepare(next(iter(ready.loader)))
    ready.train_step(batch)
    steps = {"zero_grad": ready.optimizer.zero_grad, "step": ready.optimizer.step}
    for name in steps:
        monkeypatch.setattr(ready.optimizer, name, lambda **options: None)
    parameters = list(ready.model.parameters())
    results = []
    for step in (ready._step_on_device, torch.compile(ready._step_on_device, fullgraph=True, backend="eager")):
        steps["zero_grad"](set_to_none=True)
        torch.manual_seed(0)
        step(batch)
        results.append([parameter.grad for parameter in parameters])
    for ours, theirs in zip(*results, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-6)


@pytest.fixture
def captured(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Steps are repeated also on a CPU: a "graph" that runs the step on the batch that was captured, after two steps.
    -> when a step was captured, and when it was repeated."""
    done: list[str] = []

    def record(step: Callable[[], None]) -> Callable[[], None]:
        done.append("captured")
        return lambda: (done.append("repeated"), step())[1]

    class Stopwatch:
        """Says that a step takes 1 ms as a graph, and 2 otherwise."""

        def time(self, call: Callable[[], object]) -> object:
            before, result = len(done), call()
            self.ms = 1.0 if done[before:] == ["repeated"] else 2.0
            return result

        def median_ms(self) -> float:
            return self.ms

    monkeypatch.setattr(graphs, "record", record)
    monkeypatch.setattr(graphs, "Stopwatch", Stopwatch)
    monkeypatch.setattr(graphs, "WARM_UP", 2)
    monkeypatch.setattr(graphs, "TIMED", 1)
    monkeypatch.setattr(graphs, "launched_once", lambda *given: graphs.Repeated(*given[:3], given[4]))
    return done


@pytest.fixture(scope="module")
def launched(sample_bags: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What the same run gives operation by operation."""
    return run(sample_bags, tmp_path_factory.mktemp("launched"), **RATES)


def test_repeated_steps_are_the_steps(captured, launched: Path, sample_bags: Path, tmp_path: Path, capsys):
    """Each on its own batch, with its own noise and rate, saved and validated between: bit for bit those of a run
    without a graph. A checkpoint has numbers for rates, as any; the gain is said once."""
    graphed = run(sample_bags, tmp_path, **RATES)
    assert captured == ["captured", *["repeated"] * 7]
    assert_same_run(graphed, launched)
    assert capsys.readouterr().out.count("1.00 ms as one CUDA graph and 2.00 ms operation by operation\n") == 1
    groups = load_training_state(graphed / "last")["optimizer"]["param_groups"]
    assert [(g["lr"], g["capturable"]) for g in groups] == [(2**-10, False), (2**-12, False)]


@pytest.mark.parametrize(
    ("fault", "words"),
    [
        ("broken", "note: a step cannot be captured as a CUDA graph (out of memory); training goes on operation by"),
        ("slow", "note: a step takes 2.00 ms as one CUDA graph and 2.00 ms operation by operation; training goes on"),
    ],
)
def test_what_cannot_be_a_graph_goes_on_without_and_says_why(
    fault, words, captured, launched: Path, sample_bags: Path, tmp_path: Path, capsys, monkeypatch
):
    """Also where it is no faster: one line, and the same weights."""

    def broken(step: Callable[[], None]) -> None:
        raise RuntimeError("out of\nmemory")

    if fault == "slow":
        monkeypatch.setattr(graphs.Stopwatch, "median_ms", lambda self: 2.0)
    else:
        monkeypatch.setattr(graphs, "record", broken)
    assert_same_run(run(sample_bags, tmp_path, **RATES), launched)
    assert capsys.readouterr().out.count(words) == 1
    assert captured.count("repeated") == (2 if fault == "slow" else 0)


def test_another_size_of_batch_is_captured_anew(captured):
    """As when benchmarks look for the largest batch."""
    parameter = torch.nn.Parameter(torch.ones(1))
    optimizer = torch.optim.AdamW([parameter], lr=0.5, fused=True)
    step = graphs.Repeated(lambda batch: batch["x"].sum(), optimizer, train.detect_ddp(), lambda line: None)
    for size in (2, 3):
        assert [float(step({"x": torch.full((size,), float(i))})) for i in range(5)] == [size * i for i in range(5)]
    assert captured.count("captured") == 2


def test_only_gpus_of_one_machine_get_graphs(sample_bags: Path, tmp_path: Path, capsys):
    """Where it is asked for: else ranks would wait in it for a machine that is lost, and nobody would notice. On resume
    such a change of rounding is said."""
    ready = trainer(sample_bags, tmp_path)
    assert ready.step_on_device == ready._step_on_device
    for compiled in ("auto", "graph"):
        settings = ready.settings | {"training": ready.settings["training"] | {"compile": compiled}}
        conditions = identity.rounding_conditions(settings, ready.world, torch.float32)
        assert conditions["CUDA graph"] == (compiled == "graph")
    world = World(rank=0, local_rank=0, size=4, node=0, nodes=2)
    world.device = torch.device("cuda")
    graphs.check("auto", world)
    with pytest.raises(ConfigError, match="graph is for NVIDIA GPUs of one machine, and this is 2 machines"):
        graphs.check("graph", world)
    world.nodes = 1
    graphs.check("graph", world)
    assert train.main(arguments(sample_bags, tmp_path / "cpu", training__compile="graph")) == 1
    assert "training.compile: graph is for NVIDIA GPUs of one machine, and this is cpu" in capsys.readouterr().err


def test_an_optimizer_from_elsewhere_goes_on(sample_bags: Path, tmp_path: Path, monkeypatch):
    """From before the schedule was a function of the step, or with other switches: what Adam remembers is taken, rates
    and decay are the config's. The run is the unbroken one, bit for bit."""
    original = train.Trainer._state

    def older(self, validation_due):
        state = original(self, validation_due)
        for group in state["optimizer"]["param_groups"]:
            group |= {
                "lr": torch.tensor(0.5),
                "initial_lr": 0.5,
                "capturable": True,
                "weight_decay": 9.0,
                "foreach": True,
            }
        return state | {"scheduler": {"last_epoch": 3, "base_lrs": [0.5, 0.5], "lr_lambdas": [{}, {}]}}

    every_third = {"training__log_freq": 3}  # as it saves: the first three steps alone log and validate no more
    unbroken = run(sample_bags, tmp_path / "a", **every_third)
    with monkeypatch.context() as patch:
        patch.setattr(train.Trainer, "_state", older)
        run(sample_bags, tmp_path / "b", **every_third, training__steps=3)
    assert_same_run(run(sample_bags, tmp_path / "b", "--resume", **every_third), unbroken)
