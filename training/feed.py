"""From episodes to what the network takes: the order of samples, the loader, frames on the device, normalising.

This room knows samples and tensors; it knows no setting, no schedule and no checkpoint.
"""

from __future__ import annotations

import hashlib
import math
import pickle
import signal
import threading
from collections import deque
from collections.abc import Callable, Generator, Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any, Protocol

import numpy as np
import torch
from torch.utils.data import DataLoader, Sampler
from torch.utils.data.dataloader import _MultiProcessingDataLoaderIter

from lerobot_checkpoint import Normalizer
from rosbag_dataset import ChunkDataset, Episode, open_pixels, pixel_owners

from . import augment


class Order(Protocol):
    """A permutation of the samples for each epoch."""

    def __init__(self, n_samples: int, seed: int) -> None: ...

    def at(self, epoch: int, place: int) -> int:
        """The sample that an epoch has at a place, both from 0 on."""
        ...


class FeistelOrder:
    """Permutations that are computed where they are asked for, BLOCK places at a time: no memory, no pause.

    An epoch is a Feistel network (Luby & Rackoff 1988) whose rounds are keyed by seed and epoch. It acts on the two
    digits that a place has in base ceil(sqrt(N)), and so permutes the N and the few numbers up to the next square. A
    place that comes out behind N goes through it again until it does not ("cycle walking", Black & Rogaway 2002).
    """

    ROUNDS, BLOCK = 8, 4096

    def __init__(self, n_samples: int, seed: int) -> None:
        self.n_samples, self.seed = n_samples, seed
        self._block, self._samples = (-1, -1), np.empty(0, np.int64)

    def at(self, epoch: int, place: int) -> int:
        """See Order."""
        block = (epoch, place // self.BLOCK)
        if block != self._block:
            first = block[1] * self.BLOCK
            places = np.arange(first, min(first + self.BLOCK, self.n_samples))
            self._block, self._samples = block, self.permute(epoch, places)
        return int(self._samples[place % self.BLOCK])

    def permute(self, epoch: int, places: np.ndarray) -> np.ndarray:
        """The samples that an epoch has at some places, (K,) int64 each."""
        keys = [np.uint64(step_seed(self.seed, epoch, r, "sample order")) for r in range(self.ROUNDS)]
        base = np.uint64(math.isqrt(self.n_samples - 1) + 1)
        samples, through = places.astype(np.uint64), np.arange(len(places))
        while len(through):
            left, right = np.divmod(samples[through], base)
            for key in keys:
                left, right = right, (left + _mixed(right ^ key) % base) % base
            samples[through] = left * base + right
            through = through[samples[through] >= self.n_samples]
        return samples.astype(np.int64)


def _mixed(x: np.ndarray) -> np.ndarray:
    """uint64 to uint64 such that each bit depends on all (the end of splitmix64, Steele, Lea & Flood 2014)."""
    x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return x ^ (x >> np.uint64(31))


class RandpermOrder:
    """torch.randperm, seeded with seed + epoch: of runs that began with it, which go on with it.

    It holds all of an epoch, and takes 5.7 s to make 50 million.
    """

    def __init__(self, n_samples: int, seed: int) -> None:
        self.n_samples, self.seed = n_samples, seed
        self._epoch, self._order = -1, torch.empty(0, dtype=torch.int64)

    def at(self, epoch: int, place: int) -> int:
        """See Order."""
        if epoch != self._epoch:
            generator = torch.Generator().manual_seed(self.seed + epoch)
            self._epoch, self._order = epoch, torch.randperm(self.n_samples, generator=generator)
        return int(self._order[place])


ORDERS: dict[int, type[Order]] = {2: RandpermOrder, 3: FeistelOrder}  # by the versions in identity.py


class SampleStream(Sampler[list[int]]):
    """Endless batches of sample indices for one rank; each epoch is a permutation of its own, by `seed` and `order`.

    The epochs' permutations follow each other without a seam, and every step takes the next `batch_size x
    world_size` samples; rank r takes every world_size-th of them from the r-th on, as DistributedSampler does. So
    there is no last, uneven batch; N ranks with batch b see in each step what one rank sees with batch N*b; and the
    place in the data is one number, whatever the batch and the number of ranks are after a restart.
    """

    def __init__(
        self,
        n_samples: int,
        batch_size: int,
        rank: int,
        world_size: int,
        seed: int,
        start: int = 0,
        order: int = max(ORDERS),
    ) -> None:
        self.n_samples, self.batch_size, self.rank, self.world_size = n_samples, batch_size, rank, world_size
        self.start, self._order = start, ORDERS[order](n_samples, seed)

    def at(self, position: int) -> int:
        """The sample at a place in the endless stream."""
        return self._order.at(*divmod(position, self.n_samples))

    def __iter__(self) -> Iterator[list[int]]:
        first, size = self.start + self.rank, self.batch_size * self.world_size
        while True:
            yield [self.at(position) for position in range(first, first + size, self.world_size)]
            first += size


def step_seed(seed: int, step: int, rank: int, use: str = "") -> int:
    """A generator seed of 63 bits for one step of one rank and one use, unrelated to its neighbours'."""
    return int.from_bytes(hashlib.sha256(f"{seed} {step} {rank} {use}".encode()).digest()[:8], "big") >> 1


# -- the loader ---------------------------------------------------------------------------------------------------


def make_loader(
    dataset: ChunkDataset,
    stream: SampleStream,
    num_workers: int,
    device: torch.device,
    frames: DeviceFrames | None = None,
) -> Iterable[dict[str, torch.Tensor]]:
    """Raw batches in the stream's order; `num_workers` workers load them ahead (0: each is loaded when asked for).

    Workers are processes where pictures have to be decoded, and threads where they only have to be read: to have a
    batch from a process costs this one many times what it costs to read it. For DeviceFrames batches are sample numbers
    alone, whatever num_workers is.
    """
    pinned = device.type == "cuda"
    if frames is not None:
        return Numbers(stream, pinned)
    if num_workers and all(episode.source is None for episode in dataset.episodes):
        return Threads(dataset, stream, num_workers, pinned)
    return processes(dataset, stream, num_workers, pinned)


def processes(
    dataset: ChunkDataset, stream: SampleStream, num_workers: int, pinned: bool
) -> DataLoader[dict[str, torch.Tensor]]:
    """Batches from processes, which have each an interpreter of their own; from this one if num_workers is 0."""
    return DataLoader(
        dataset,  # ty: ignore[invalid-argument-type] - rosbag_dataset knows no torch, so that it is no torch Dataset
        batch_sampler=stream,
        collate_fn=to_tensors,  # ty: ignore[invalid-argument-type] - torch's stubs know no __getitems__ of whole batches
        num_workers=num_workers,
        pin_memory=pinned,
        worker_init_fn=ignore_signals,
        generator=torch.Generator(),  # making the iterator draws a seed; not from the global generator
    )


class Numbers:
    """Batches of sample numbers, {"index": (B,) int64}, in the stream's order."""

    def __init__(self, stream: SampleStream, pinned: bool) -> None:
        self.stream, self.pinned = stream, pinned

    def __iter__(self) -> Iterator[dict[str, torch.Tensor]]:
        for indices in self.stream:
            yield {"index": torch.tensor(indices, pin_memory=self.pinned)}


class Threads:
    """Batches that threads of this process load ahead, each from a copy of the dataset: two may not share its files."""

    AHEAD = 2  # batches of each thread that wait to be taken: torch's DataLoader has as many

    def __init__(self, dataset: ChunkDataset, stream: SampleStream, threads: int, pinned: bool) -> None:
        self.dataset, self.stream, self.threads, self.pinned = dataset, stream, threads, pinned

    def __iter__(self) -> Iterator[dict[str, torch.Tensor]]:
        sent, own = pickle.dumps(self.dataset), threading.local()  # what a loader process is sent, too

        def begin() -> None:
            own.dataset = pickle.loads(sent)

        def load(indices: list[int]) -> dict[str, torch.Tensor]:
            batch = to_tensors(own.dataset.__getitems__(indices))
            return {name: tensor.pin_memory() for name, tensor in batch.items()} if self.pinned else batch

        pool = ThreadPoolExecutor(self.threads, "loader", begin)
        ahead: deque[Future[dict[str, torch.Tensor]]] = deque()
        try:
            for indices in self.stream:
                ahead.append(pool.submit(load, indices))
                if len(ahead) > self.AHEAD * self.threads:
                    yield ahead.popleft().result()
        finally:
            pool.shutdown(wait=False, cancel_futures=True)


def end_loader(batches: Iterator[Any]) -> None:
    """End the processes or threads behind a loader's iterator, whatever they are doing.

    Left alone, processes would keep a failed run from ending: they ignore SIGTERM, which is the trainer's to answer,
    and at its exit Python sends them just that and waits. A traceback that names the iterator keeps it from being
    collected.
    """
    if isinstance(batches, Generator):
        batches.close()
    if isinstance(batches, _MultiProcessingDataLoaderIter):
        try:
            batches._shutdown_workers()  # torch has no public way
        finally:  # it raises when it meets a worker that was killed
            for process in batches._workers:  # and leaves those that are busy for longer than it waits
                process.kill()


def ignore_signals(worker: int) -> None:
    """Make a loader worker ignore Ctrl-C and SIGTERM: the trainer answers them, and needs the worker one more step."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, signal.SIG_IGN)


def to_tensors(batch: dict[str, Any]) -> dict[str, torch.Tensor]:
    """The collate function: ChunkDataset already returns whole batches, as NumPy arrays."""
    return {name: torch.from_numpy(array) for name, array in batch.items()}


def name_samples(dataset: ChunkDataset, stream: SampleStream, first: int, count: int) -> str:
    """Episode and frame of `count` samples, from place `first` of the stream on, as text; names at most 16 of them."""
    places = [dataset.locate(stream.at(first + i)) for i in range(count)]
    named = ", ".join(f"{episode} frame {frame}" for episode, frame in places[:16])
    return f"{named}{', ...' if len(places) > 16 else ''}"


# -- frames on the device -----------------------------------------------------------------------------------------

BLOCK, LOADING_THREADS = 64, 8  # images that are loaded at once, by how many threads: a GPU's host has that many cores


class DeviceFrames:
    """All samples of a dataset on the device, pixels, states and actions: batches are cut there, from their numbers.

    Recordings' frames follow each other; those of which a part is an episode are there as a whole, and once.
    """

    SHARE = 0.5  # of the GPU's free memory; the rest is for weights, activations and other processes

    @classmethod
    def size_bytes(cls, episodes: Sequence[Episode]) -> int:
        """What the frames of these episodes take."""
        return sum(open_pixels(e, camera).nbytes for e in pixel_owners(episodes).values() for camera in e.image_shape)

    def __init__(self, dataset: ChunkDataset, device: torch.device) -> None:
        episodes = dataset.episodes
        self.tables = {name: torch.from_numpy(table).to(device) for name, table in dataset.tables().items()}
        self.chunks_are = episodes[0].chunks_are
        self.places = torch.arange(dataset.chunk_size, device=device)
        owners = pixel_owners(episodes).values()
        self.frames = {}  # camera -> (N, H, W, 3) uint8
        blocks: list[tuple[Episode, str, int, int]] = []
        for camera, shape in episodes[0].image_shape.items():
            stored = sum(e.stored_images[camera] for e in owners)
            self.frames[camera] = torch.empty((stored, *shape, 3), dtype=torch.uint8, device=device)
            first = 0
            for episode in owners:
                own = episode.stored_images[camera]
                blocks += [(episode, camera, start, first) for start in range(0, own, BLOCK)]
                first += own
        with ThreadPoolExecutor(LOADING_THREADS) as pool:  # pictures in the bags are decoded now
            list(pool.map(self._load, blocks))

    def _load(self, block: tuple[Episode, str, int, int]) -> None:
        """Copy up to BLOCK images of an episode, from `start` on, to the device; its first is number `first` there."""
        episode, camera, start, first = block
        images = np.array(open_pixels(episode, camera)[start : start + BLOCK])
        self.frames[camera][first + start : first + start + len(images)] = torch.from_numpy(images)

    def look_up(self, batch: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        """Samples by their numbers, {"index": (B,) int64} on the device, bit for bit as ChunkDataset has them."""
        tables, index = self.tables, batch["index"]
        frame, stop = tables["frame"][index], tables["stop"][index][:, None]
        at = frame[:, None] + self.places  # (B, chunk)
        is_pad = at >= stop
        at = torch.minimum(at, stop - 1)
        action = tables["value"][at]  # (B, chunk, A) float64
        if self.chunks_are == "offsets":
            action = action - tables["origin"][frame][:, None]
        elif self.chunks_are == "steps":
            action = torch.diff(action, dim=1, prepend=tables["origin"][frame][:, None])
        cut = {
            "observation.state": tables["state"][frame],
            "action": action.float().masked_fill(is_pad[..., None], 0.0),
            "action_is_pad": is_pad,
            "index": index,
        }
        for camera, frames in self.frames.items():
            cut[f"observation.images.{camera}"] = frames[tables[f"image.{camera}"][frame]]
        return cut


def frames_on_device(dataset: ChunkDataset, device: torch.device, say: Callable[[str], object]) -> DeviceFrames | None:
    """Copy the dataset's frames to the GPU if they take at most half of its free memory; `say` tells what was decided.

    None when they do not fit, or when `device` is no GPU.
    """
    if device.type != "cuda":
        return None
    size, free = DeviceFrames.size_bytes(dataset.episodes), torch.cuda.mem_get_info(device)[0]
    fits = size <= DeviceFrames.SHARE * free
    say(
        f"frames: {size / 1e9:.2f} GB, {'kept' if fits else 'too much to keep'} on {device} ({free / 1e9:.1f} GB "
        f"free, of which frames may take {DeviceFrames.SHARE:.0%}; data.frames_on_device)"
    )
    return DeviceFrames(dataset, device) if fits else None


# -- to the model -------------------------------------------------------------------------------------------------


def to_device(batch: dict[str, torch.Tensor], device: torch.device) -> dict[str, torch.Tensor]:
    """Copy a batch to the device; the host does not wait where the batch lies in pinned memory.

    Images are still uint8 here, a quarter of the bytes that they have as float32.
    """
    return {name: tensor.to(device, non_blocking=True) for name, tensor in batch.items()}


def divide(batch: dict[str, torch.Tensor], parts: int) -> list[dict[str, torch.Tensor]]:
    """A batch's samples in `parts` batches of the same size, in their order."""
    if parts == 1:
        return [batch]
    divided = {name: values.chunk(parts) for name, values in batch.items()}
    return [{name: values[i] for name, values in divided.items()} for i in range(parts)]


def to_model(
    batch: dict[str, torch.Tensor], normalizer: Normalizer, amounts: Sequence[dict[str, torch.Tensor]] = ()
) -> dict[str, torch.Tensor]:
    """Make a batch on the device what the network takes: (B, H, W, 3) uint8 -> (B, 3, H, W) float32, normalised.

    `amounts` augments the images: one entry of augment.draw per camera.
    """
    batch = dict(batch)
    cameras = [name for name in batch if name.startswith("observation.images.")]
    for i, name in enumerate(cameras):
        image = batch[name].permute(0, 3, 1, 2).float() / 255
        batch[name] = augment.apply(image, amounts[i]) if amounts else image
    return normalizer.normalize(batch)
