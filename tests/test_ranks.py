"""What ranks do one after the other before the first step, without a collective that could time out."""

from __future__ import annotations

import threading
import time

import pytest
import torch.distributed as dist

from training.errors import Stopped
from training.ranks import World


def ranks(nodes: int, per_node: int) -> list[World]:
    """Ranks that share a store, in this process."""
    store = dist.HashStore()
    worlds = [World(r, r % per_node, nodes * per_node, r // per_node, nodes) for r in range(nodes * per_node)]
    for world in worlds:
        world.store = store
    return worlds


def test_the_first_of_each_node_goes_first_and_none_goes_on_before_all_are_done(capsys):
    """So that whatever takes long has an end before the first collective begins to count its ten minutes."""
    worlds, log = ranks(nodes=2, per_node=2), []

    def run(world: World) -> None:
        def work() -> int:
            log.append(("begins", world.rank))
            time.sleep(0.3 if world.rank in (1, 2) else 0.0)
            log.append(("ends", world.rank))
            return world.rank

        assert world.first_on_each_node(work, "reading") == world.rank
        log.append(("goes on", world.rank))

    threads = [threading.Thread(target=run, args=(world,)) for world in worlds]
    [thread.start() for thread in threads]
    [thread.join() for thread in threads]
    place = {event: log.index(event) for event in log}
    assert len(place) == 12
    assert max(place["ends", 0], place["ends", 2]) < min(place["begins", 1], place["begins", 3])
    assert max(place["ends", rank] for rank in range(4)) < min(place["goes on", rank] for rank in range(4))
    assert capsys.readouterr().out.count("waiting while rank 0 of this node is reading") == 2


def test_a_rank_that_is_stopped_lets_the_others_go():
    """In the second round as well: else they would wait for ever, in no collective that ends them."""
    first, second = ranks(nodes=1, per_node=2)

    def asked_to_stop() -> None:
        raise Stopped("SIGTERM")

    def run() -> None:
        with pytest.raises(Stopped):
            second.first_on_each_node(asked_to_stop, "reading")
        second.leave_stopped(together=False)

    thread = threading.Thread(target=run)
    thread.start()
    with pytest.raises(Stopped, match="another rank before the first step"):
        first.first_on_each_node(lambda: None, "reading")
    thread.join()
