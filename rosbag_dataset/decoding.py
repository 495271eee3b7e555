"""Many bags into the cache at once: a pool of processes, one bag each, that stops cleanly when it is asked to.

Knows: processes, signals, the progress bar, how a killed process shows.
Must not know: what an entry holds (cache.py), and which bags want one (episodes.py).
"""

from __future__ import annotations

import contextlib
import multiprocessing
import multiprocessing.connection
import os
import queue
import signal
import sys
import threading
from collections.abc import Callable, Generator, Sequence
from concurrent.futures import Future, ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from typing import Any

import cv2
from tqdm import tqdm

from .bags import Bag
from .cache import clean_cache, make_entry
from .errors import BagError
from .settings import BagSettings
from .topics import typestore_for

STOP_SIGNALS = {signal.SIGINT, signal.SIGTERM}
_counters: Any = None  # (images, bytes) shared with the decoding processes


def build_entries(
    todo: Sequence[Bag],
    keys: dict[str, str],
    settings: BagSettings,
    in_place: bool,
    workers: int,
    progress: bool,
    stop_early: bool,
) -> tuple[list[tuple[Bag, BagError]], list[str]]:
    """Decode bags into the cache, in parallel.

    Args:
        todo: the bags that are not cached yet.
        keys: bag name -> cache key.
        settings: what to read and where the cache is.
        in_place: keep an index of the pictures, and no pixels, of those bags that allow it.
        workers: number of processes, at most one per bag; 0 chooses as many as keep the cores busy.
        progress: show a progress bar.
        stop_early: stop at the first bad bag, without waiting for bags that are half decoded.

    Returns:
        (the bags that failed, each with its error; with `stop_early`, those that had failed when it stopped;
         of each bag that does not allow an index, why).

    Raises:
        BagError: a decoding process was killed.
    """
    if not todo:
        return [], []
    clean_cache(settings.cache_dir)
    typestore_for(settings.ros_distro)  # the processes inherit it
    total = sum((bag.claimed or {}).get(topic, 0) for bag in todo for topic in settings.camera_topics.values())
    failed: list[tuple[Bag, BagError]] = []
    not_in_place: list[str] = []
    bar = tqdm(
        total=total or None, desc=f"decoding {len(todo)} bags", unit="frame", disable=not progress,
        mininterval=0.5 if sys.stderr.isatty() else 10.0,
    )  # fmt: skip

    def show(images: int, size: int) -> None:
        bar.n = images
        rate = bar.format_dict["rate"] or (images / max(1e-9, bar.format_dict["elapsed"]))
        bar.set_postfix_str(f"{rate * size / 1e6 / max(1, images):.0f} MB/s, {size / 1e6:.0f} MB")

    def take(task: tuple[Any, ...], result: BagError | str) -> bool:
        if isinstance(result, BagError):
            failed.append((task[0], result))
        elif result:
            not_in_place.append(result)
        return bool(failed) and stop_early

    tasks = [(bag, keys[bag.name], settings, in_place) for bag in todo]
    with bar:
        try:
            in_processes(_build_one, tasks, workers or _decoding_processes(), show, take)
        except BrokenProcessPool:
            raise BagError(
                "data.bag_dir: a process that decodes bags was killed, most likely for want of memory; "
                "free some and start again (the bags that were finished stay cached)"
            ) from None
    return failed, not_in_place


def in_processes(
    work: Callable[..., Any],
    tasks: Sequence[tuple[Any, ...]],
    workers: int,
    show: Callable[[int, int], None],
    take: Callable[[tuple[Any, ...], Any], bool],
    start: Callable[..., None] | None = None,
    shared: tuple[Any, ...] = (),
) -> None:
    """Do `work(*task)` for each task, in processes of their own; SIGINT and SIGTERM are answered meanwhile.

    Args:
        work: what to do, a function of a module.
        tasks: its arguments.
        workers: number of processes, at most one per task.
        show: called as show(images, bytes) four times a second, with what all processes have counted (count()).
        take: called as take(task, result) for each that is done; True ends it all, without waiting for the others.
        start: called as start(counters, *shared) in a new process, which has to call start_worker(counters); that by
            default.
        shared: what all tasks need.

    Raises:
        BrokenProcessPool: a process was killed.
        What `take` raises.
    """
    method = "fork" if "fork" in multiprocessing.get_all_start_methods() else None  # spawn would import torch again
    context = multiprocessing.get_context(method)
    counters = context.Array("q", [0, 0])
    workers = max(1, min(workers, len(tasks)))
    opencv_threads = cv2.getNumThreads()
    # One task per core is the parallelism. Set before forking: OpenCV's thread pool does not survive a fork, and a
    # child that touches it (even to switch it off) waits for threads that are not there.
    cv2.setNumThreads(1)
    given = (counters, *shared)
    with (
        hold_signals() as answer,
        ProcessPoolExecutor(workers, context, start or start_worker, given) as pool,  # ty: ignore[no-matching-overload]
    ):
        left, ended = 0, False
        done: queue.SimpleQueue[Future] = queue.SimpleQueue()  # concurrent.futures.wait() looks at all, each time
        allowed = signal.pthread_sigmask(signal.SIG_BLOCK, STOP_SIGNALS)  # for the children, until they are ready
        try:
            task_of = {pool.submit(work, *task): task for task in tasks}
            left = len(task_of)
            signal.pthread_sigmask(signal.SIG_SETMASK, allowed)
            for future in task_of:
                future.add_done_callback(done.put)
            while left and not ended:
                finished = []
                with contextlib.suppress(queue.Empty):
                    finished.append(done.get(timeout=0.25))
                    while True:
                        finished.append(done.get_nowait())
                answer()
                left -= len(finished)
                show(*counters.get_obj())  # without the lock: a process that was killed may have had it
                for future in finished:
                    ended |= take(task_of[future], future.result())
        finally:
            if left:
                # We were asked to stop, or something failed. Tasks that are half done are not waited for; what they
                # have made is discarded. The pool itself then marks the futures that are left as failed. Do not cancel
                # them: up to Python 3.11 the pool's thread dies with a traceback on a cancelled future, and a stop
                # should print one line.
                for process in list(pool._processes.values()):
                    process.terminate()
            signal.pthread_sigmask(signal.SIG_SETMASK, allowed)
            cv2.setNumThreads(opencv_threads)


def available_cores() -> int:
    """How many cores this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def _decoding_processes() -> int:
    """One per core that this process may use, and a few more: each waits for the disk when it flushes an entry."""
    cores = available_cores()
    return cores + max(1, cores // 4)


@contextlib.contextmanager
def hold_signals() -> Generator[Callable[[], None]]:
    """Hold back SIGINT and SIGTERM inside the block; yields a function that delivers those that have come so far.

    The caller calls that function where a handler may safely raise. Elsewhere it may not: raised in the middle of
    concurrent.futures, the exception leaves locks taken, and the pool's threads wait for them for ever; raised during
    a fork, it surfaces in the child. Blocking the signals with a mask is not enough, because the main thread also
    handles a signal that another thread has received. Outside the main thread nothing is held: no handler runs there.
    """
    received: list[int] = []
    previous: dict[int, Any] = {}

    def hold() -> None:
        if threading.current_thread() is threading.main_thread():
            for number in STOP_SIGNALS:
                previous[number] = signal.signal(number, lambda number, frame: received.append(number))

    def release() -> None:
        while previous:
            signal.signal(*previous.popitem())
        while received:
            signal.raise_signal(received.pop(0))

    def answer() -> None:
        if received:
            release()
            hold()

    hold()
    try:
        yield answer
    finally:
        release()


# -- inside a decoding process ------------------------------------------------------------------------------------


def start_worker(counters: Any) -> None:
    """Make a new process of a pool ready: it counts in `counters`, ends with its parent, and leaves Ctrl-C to it."""
    global _counters
    _counters = counters
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is the parent's to answer; it terminates us
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    signal.pthread_sigmask(signal.SIG_UNBLOCK, STOP_SIGNALS)
    threading.Thread(target=_die_with_parent, daemon=True).start()


def _die_with_parent() -> None:
    """End this process when its parent has been killed: otherwise it would wait for work for ever."""
    parent = multiprocessing.parent_process()
    assert parent is not None  # this is a pool's process
    multiprocessing.connection.wait([parent.sentinel])
    os._exit(1)


def count(images: int, size: int) -> None:
    """Add to what the pool's progress bar shows."""
    if _counters is not None:
        with _counters.get_lock():
            _counters[0] += images
            _counters[1] += size


def _build_one(bag: Bag, key: str, settings: BagSettings, in_place: bool) -> BagError | str:
    try:
        return make_entry(bag, key, settings, in_place, count)[1]
    except BagError as error:
        return type(error)(str(error))  # without its cause, which may not survive the trip between processes
