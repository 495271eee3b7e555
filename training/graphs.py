"""A training step that the host launches once: captured as a CUDA graph, and repeated from then on.

A step of ACT is some 1,500 operations. At batch 8 a GPU computes them faster than a host can launch them one by one.
This room knows a function of tensors and the learning rates of an optimizer; it knows no model, and one setting.
"""

from __future__ import annotations

import contextlib
import statistics
from collections.abc import Callable, Generator
from typing import Any

import torch
from torch import Tensor

from .errors import ConfigError
from .ranks import World

Step = Callable[[dict[str, Tensor]], Tensor]

# Steps before the capture. DDP asks for 11 (torch's notes on CUDA graphs), cuDNN and the allocator for fewer.
WARM_UP = 11
TIMED = 5  # the last of these, and as many of the first repetitions, whose times are compared


def check(compiled: str, world: World) -> None:
    """Check that training.compile `graph` is asked of NVIDIA GPUs of one machine.

    Nobody watches a collective inside a graph: when a machine is lost, the others would wait for it for ever. (Ranks on
    one machine are ended by their torchrun.)

    Raises:
        ConfigError: it is not.
    """
    if compiled == "graph" and (world.device.type != "cuda" or world.nodes > 1):
        found = f"{world.nodes} machines" if world.nodes > 1 else world.device.type
        raise ConfigError(
            f"training.compile: graph is for NVIDIA GPUs of one machine, and this is {found}; set it to auto"
        )


def launched_once(step: Step, optimizer: Any, world: World, compiled: str, say: Callable[[str], object]) -> Step:
    """`step` as a Repeated with training.compile `graph`, else as it is.

    Call it before DDP wraps the model, and before the first step.
    """
    if compiled != "graph":
        return step
    # A capture refuses the default stream, and what was made in any other than its own (DDP's and autograd's nodes for
    # the weights are): so from here on the run has this one.
    stream = torch.cuda.Stream(world.device)
    stream.wait_stream(torch.cuda.current_stream(world.device))
    torch.cuda.set_stream(stream)
    return Repeated(step, optimizer, world, say)


class Repeated:
    """A step that is launched operation by operation WARM_UP times, captured as one CUDA graph, and then repeated.

    Its results are those of `step` to the last bit, except that learning rates are rounded to float32, in all steps:
    the optimizer reads them from tensors, because a graph repeats numbers as they were when it was captured. A
    repetition draws the noise of the last torch.manual_seed, as `step` does. Where a step cannot be captured, or is no
    faster so, on any rank, every rank goes on operation by operation.

    Args:
        step: batch -> a tensor, all on the device. It reads the batch and tensors that stay where they are, writes in
            place what outlasts it, and never waits for the device. All batches have the same names and shapes; with one
            that has others it begins anew.
        optimizer: a fused one, which `step` calls. The learning rates of its groups are numbers before and after.
        world: the ranks, and this one's device.
        say: called once, with how long a step takes, or with why it is not repeated.
    """

    def __init__(self, step: Step, optimizer: Any, world: World, say: Callable[[str], object]) -> None:
        self._step, self._optimizer, self._world, self._say = step, optimizer, world, say
        self._rates = [torch.zeros((), device=world.device) for _ in optimizer.param_groups]
        self._given_up = False
        self._begin({})

    def _begin(self, shapes: dict[str, torch.Size]) -> None:
        self._shapes, self._steps = shapes, 0
        self._launched, self._repeated = Stopwatch(), Stopwatch()
        self._repeat: Callable[[], Any] | None = None
        self._batch: dict[str, Tensor] = {}  # what a repetition reads
        self._result = torch.empty(0)  # what it writes

    def __call__(self, batch: dict[str, Tensor]) -> Tensor:
        """One step; a repetition's result is overwritten by the next one."""
        for rate, group in zip(self._rates, self._optimizer.param_groups, strict=True):
            rate.fill_(group["lr"])
        shapes = {name: values.shape for name, values in batch.items()}
        if shapes != self._shapes:
            self._begin(shapes)
        self._steps += 1
        if self._steps == WARM_UP + 1 and not self._given_up:
            self._capture(batch)
        if self._steps == WARM_UP + TIMED + 2 and self._repeat is not None:
            self._compare()
        if self._repeat is None:
            if WARM_UP - TIMED < self._steps <= WARM_UP:
                return self._launched.time(lambda: self._launch(batch))
            return self._launch(batch)
        for name, values in batch.items():
            self._batch[name].copy_(values)
        if self._steps <= WARM_UP + TIMED:
            self._repeated.time(self._repeat)
        else:
            self._repeat()
        return self._result

    def _launch(self, batch: dict[str, Tensor]) -> Tensor:
        """The step, operation by operation."""
        with self._rates_in_tensors(capturable=False):
            return self._step(batch)

    def _capture(self, batch: dict[str, Tensor]) -> None:
        """Record the step on a batch of its own, computing nothing."""
        self._batch = {name: values.clone() for name, values in batch.items()}

        def step() -> None:
            with self._rates_in_tensors(capturable=True):
                self._result = self._step(self._batch)

        why = None
        try:
            self._repeat = record(step)
        except RuntimeError as error:  # torch's own, out of memory among them
            why = f"a step cannot be captured as a CUDA graph ({' '.join(str(error).split())[:150]})"
        self._agree(why)

    def _compare(self) -> None:
        """Say what the graph gains, and give it up if that is nothing. Waits once for the device."""
        repeated_ms, launched_ms = self._repeated.median_ms(), self._launched.median_ms()
        said = f"a step takes {repeated_ms:.2f} ms as one CUDA graph and {launched_ms:.2f} ms operation by operation"
        if self._agree(said if repeated_ms >= launched_ms else None):
            self._say(f"note: {said}")

    def _agree(self, why_not: str | None) -> bool:
        """Whether no rank has a reason against the graph; else all give it up, because NCCL wants all or none."""
        if why_not := next((why for why in self._world.gather(why_not) if why), None):
            self._say(f"note: {why_not}; training goes on operation by operation")
            self._given_up, self._repeat = True, None
        return not self._given_up

    @contextlib.contextmanager
    def _rates_in_tensors(self, capturable: bool) -> Generator[None]:
        """Inside, the optimizer reads its learning rates from the device; outside they are numbers, as saved."""
        groups = self._optimizer.param_groups
        before = [(group["lr"], group["capturable"]) for group in groups]
        for group, rate in zip(groups, self._rates, strict=True):
            group["lr"], group["capturable"] = rate, capturable
        try:
            yield
        finally:
            for group, (lr, was) in zip(groups, before, strict=True):
                group["lr"], group["capturable"] = lr, was


def record(step: Callable[[], None]) -> Callable[[], Any]:
    """Capture what `step` launches in the current stream; -> what repeats it. Raises RuntimeError if that cannot be.

    "thread_local": what other threads do meanwhile is theirs. The loader's pins memory, which a capture in the usual
    mode would not survive.
    """
    graph, seed = torch.cuda.CUDAGraph(), torch.initial_seed()
    try:
        with torch.cuda.graph(graph, stream=torch.cuda.current_stream(), capture_error_mode="thread_local"):
            step()
    except RuntimeError:
        # A capture that has failed leaves the generator in its midst: one with the same seed begins afresh.
        generator = torch.cuda.default_generators[torch.cuda.current_device()]
        generator.graphsafe_set_state(generator.clone_state())
        torch.manual_seed(seed)
        raise
    return graph.replay


class Stopwatch:
    """Times of calls on the device, which the host reads later."""

    def __init__(self) -> None:
        self._spans: list[tuple[torch.cuda.Event, torch.cuda.Event]] = []

    def time(self, call: Callable[[], Any]) -> Any:
        """Do it, and have the device note when it begins and ends."""
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        begin.record()
        result = call()
        end.record()
        self._spans.append((begin, end))
        return result

    def median_ms(self) -> float:
        """The median of the times so far; waits for the last one."""
        self._spans[-1][1].synchronize()
        return statistics.median(begin.elapsed_time(end) for begin, end in self._spans)
