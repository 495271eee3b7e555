"""Several processes as one run: what the ranks tell each other beside the gradients.

Under torchrun the ranks share a key-value store. It carries what collectives should not: waiting for a long
conversion (a collective would time out), and the news that a rank failed (a collective would hang on it).
train.py finds out the ranks, chooses the device and joins the process group; this room knows no setting and no model.
"""

from __future__ import annotations

import contextlib
import os
import threading
import time
import warnings
from collections.abc import Callable
from typing import Any

import torch
import torch.distributed as dist
from torch.nn.parallel import DistributedDataParallel

from .errors import ConfigError, Stopped


class World:
    """This process among those that train together; rank 0 alone logs and writes.

    `several`: whether torchrun (or something that sets its variables) has started this process, even as the only one.

    Attributes:
        rank, local_rank, size, node, nodes: as torchrun counts them; `local_rank` is the one on this node.
        is_main: whether this is rank 0.
        device: where this rank computes; the CPU until train.py has chosen.
        store: the ranks' key-value store, None for a single process.
        before_death: called before this process is ended because another rank has failed: what must not be cut off.
    """

    def __init__(self, rank: int, local_rank: int, size: int, node: int, nodes: int, several: bool = False) -> None:
        self.rank, self.local_rank, self.size, self.node, self.nodes = rank, local_rank, size, node, nodes
        self.is_main = rank == 0
        self.device = torch.device("cpu")
        self.store = connect(serve=self.is_main) if several else None
        self.before_death: Callable[[], object] = lambda: None
        self._finished = threading.Event()
        if self.store is not None:
            threading.Thread(target=self._watch, name="watch-failures", daemon=True).start()

    # Gradients.

    def parallel(self, model: torch.nn.Module, compression: str) -> torch.nn.Module:
        """`model` such that a backward pass leaves the gradients' mean over the ranks; itself where there is one rank.

        `compression`: "bf16" rounds what is sent to bfloat16, half the bytes; "none" sends gradients as they are.
        """
        if self.size == 1:
            return model
        # A 1x1 convolution's weight has one memory order under two names, about which DDP worries.
        warnings.filterwarnings("ignore", message="Grad strides do not match bucket view strides")
        ids = [self.local_rank] if self.device.type == "cuda" else None
        ddp = DistributedDataParallel(model, device_ids=ids, gradient_as_bucket_view=True)
        # Buffers are constant (frozen batch norm, positions) and were sent just now: not in every forward pass again.
        # Set here, because the argument has another name from torch 2.13 on.
        ddp.broadcast_buffers = False
        if compression == "bf16":
            from torch.distributed.algorithms.ddp_comm_hooks.default_hooks import bf16_compress_hook

            ddp.register_comm_hook(None, bf16_compress_hook)
        return ddp

    def exchanging(self, model: torch.nn.Module, now: bool) -> contextlib.AbstractContextManager[object]:
        """Inside, a backward pass of what `parallel` gave adds up the rank's gradients; `now` it averages them, too."""
        return model.no_sync() if isinstance(model, DistributedDataParallel) and not now else contextlib.nullcontext()

    # Values.

    def sum(self, values: torch.Tensor) -> torch.Tensor:
        """Sum over all ranks, in place."""
        return self.begin_sum(values)()

    def begin_sum(self, values: torch.Tensor) -> Callable[[], torch.Tensor]:
        """Begin to sum over all ranks, in place; -> what waits for the sum and gives it."""
        work = dist.all_reduce(values, async_op=True) if self.size > 1 else None

        def finish() -> torch.Tensor:
            if work is not None:
                work.wait()
            return values

        return finish

    def share(self, value: Any) -> Any:
        """Rank 0's `value`, on every rank."""
        box = [value]
        if self.size > 1:
            dist.broadcast_object_list(box, device=self.device)
        return box[0]

    def gather(self, value: Any) -> list[Any]:
        """Every rank's `value`, on every rank."""
        values = [value]
        if self.size > 1:
            values = [None] * self.size
            dist.all_gather_object(values, value)
        return values

    def barrier(self) -> None:
        """Wait until every rank is here."""
        if self.size > 1:
            dist.barrier()

    def first_on_each_node(self, work: Callable[[], Any], what: str) -> Any:
        """Do `work` on every rank, but first on each node's local rank 0, which leaves the others little to do.

        The other ranks begin when every node's first one is done, and none goes on before all are. They wait by asking
        the store: no collective is open that could time out, however long it takes.

        Raises:
            Stopped: a node was asked to stop before it was done.
        """
        if self.store is None:
            return work()
        first = self.local_rank == 0
        result = work() if first else None
        if first:
            self.store.set(f"{what}-{self.node}", "done")
        else:
            print(f"rank {self.rank}: waiting while rank 0 of this node is {what}", flush=True)
        self._wait_for([f"{what}-{node}" for node in range(self.nodes)])
        result = result if first else work()
        self.store.set(f"{what}-rank{self.rank}", "done")
        self._wait_for([f"{what}-rank{rank}" for rank in range(self.size)])
        return result

    def _wait_for(self, keys: list[str]) -> None:
        """Until the ranks' store has all of these keys. Raises Stopped."""
        assert self.store is not None
        while not self.store.check(keys):
            if self.store.check(["stopped"]):
                raise Stopped("another rank before the first step; start again with the same command")
            time.sleep(0.2)

    # Stopping and failing.

    def leave_stopped(self, together: bool) -> None:
        """End in good order after a stop.

        Args:
            together: True if every rank stops at this point, as in training: wait for the others, because torchrun
                kills those that are left as soon as one has exited. False if this rank stops alone, before training:
                tell the ranks that wait for its work, here or on other nodes, that it will not come.
        """
        with contextlib.suppress(RuntimeError):  # the store is gone with the node that held it
            if together:
                if dist.is_initialized():  # during the summary the others have left already
                    self.barrier()
            elif self.store is not None:
                self.store.set("stopped", str(self.rank))

    def first_to_fail(self) -> bool:
        """Claim the right to print the run's one error line; also tells the other ranks to end."""
        if self.store is None:
            return True
        try:
            return self.store.compare_set("failed", "", str(self.rank)).decode() == str(self.rank)
        except RuntimeError:  # the store is gone with the node that held it: somebody else has failed
            return False

    def leave_to_main(self) -> None:
        """Call this when every rank has found the same error: rank 0 goes on and reports it, which ends the others."""
        if not self.is_main:
            time.sleep(120)

    def _watch(self) -> None:
        """End this rank when another has failed: it may be inside a collective that would wait for ever."""
        try:
            store = connect(serve=False)
            while not self._finished.wait(0.5):
                if store.check(["failed"]) and store.get("failed").decode() != str(self.rank):
                    break
        except RuntimeError:
            pass  # the node that held the store is gone
        if not self._finished.is_set():
            self.before_death()
            os._exit(1)

    def close(self) -> None:
        """Leave the process group; call it on errors too."""
        self._finished.set()
        if dist.is_initialized():
            dist.destroy_process_group()


def world_of_torchrun() -> World:
    """This process's place as torchrun says it in the environment.

    Raises:
        ConfigError: RANK is set without the other variables that torchrun sets.
    """
    names = ("RANK", "LOCAL_RANK", "WORLD_SIZE", "GROUP_RANK", "GROUP_WORLD_SIZE")
    missing = [name for name in (*names, "MASTER_ADDR", "MASTER_PORT") if name not in os.environ]
    if missing:
        raise ConfigError(f"RANK is set, but {', '.join(missing)} not; start several processes through torchrun")
    return World(*(int(os.environ[name]) for name in names), several=True)


def connect(serve: bool) -> dist.Store:
    """The ranks' store at MASTER_ADDR:MASTER_PORT, with keys of their own in each of torchrun's rounds.

    torchrun keeps one store over its restarts, and the first round's keys in it make the second's rendezvous hang.

    Args:
        serve: whether this process holds the store, if torchrun's agent does not.
    """
    agent_serves = os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True"
    address, port = os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"])
    store = dist.TCPStore(address, port, is_master=serve and not agent_serves, wait_for_workers=False)
    return dist.PrefixStore(f"round{os.environ.get('TORCHELASTIC_RESTART_COUNT', 0)}", store)
