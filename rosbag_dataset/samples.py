"""Episodes to training samples: whole batches of state, images and a chunk of actions, from the cache or the bags.

Knows: which frame a sample is, where its chunk ends, how stored pixels are read (those in the bags: in_place.py).
Must not know: bags, how an episode's frames came about, normalisation, torch: samples are raw numpy arrays.
"""

from __future__ import annotations

import errno
import os
from collections.abc import Hashable, Sequence
from typing import Any

import numpy as np

from .cache import pixels_file
from .in_place import PictureReader, PicturesInPlace, places_file
from .synchronisation import Episode
from .warm import put_away, taken_out

MAX_FILES = 512  # that a dataset has open: half of what a process may by default


def open_pixels(episode: Episode, camera: str) -> np.ndarray | PicturesInPlace:
    """(N, H, W, 3) uint8 of an episode's stored images, in file order (see Episode.image_index).

    A memory map of the cache entry, or what reads each in the bag when it is asked for by its number.
    """
    assert episode.entry is not None
    shape = (episode.stored_images[camera], *episode.image_shape[camera], 3)
    if episode.source is not None:
        return PicturesInPlace(episode.entry / places_file(camera), episode.source, camera, shape)
    return np.memmap(episode.entry / pixels_file(camera), np.uint8, "r", shape=shape)


def pixel_owners(episodes: Sequence[Episode]) -> dict[Hashable, Episode]:
    """The cache entry of each recording -> the first of the episodes that were cut from it, and share its images."""
    owners: dict[Hashable, Episode] = {}
    for episode in episodes:
        owners.setdefault(episode.entry or episode.name, episode)
    return owners


class ChunkDataset:
    """Samples for ACT: one per frame that has an action. A torch map-style dataset that returns whole batches.

    `__getitems__(indices)` gives, for a batch of B:
        observation.state            (B, S) float32, raw (rad)
        observation.images.<camera>  (B, H, W, 3) uint8, as stored
        action                       (B, chunk, A) float32, raw; zeros where padded
        action_is_pad                (B, chunk) bool: past the segment's end
        index                        (B,) int64 sample indices, to say which sample made trouble
    """

    def __init__(self, episodes: Sequence[Episode], chunk_size: int) -> None:
        self.episodes = list(episodes)
        self.chunk_size = chunk_size
        # Of each segment with actions its episode, and [start, stop) of the frames that have one; samples are counted
        # through them. Nothing here is as long as the recordings are.
        bounds = [np.column_stack([e.segments[:, 0], e.segments[:, 1] - e.ahead]) for e in self.episodes]
        segments = np.concatenate([np.zeros((0, 2), np.int64), *bounds])
        episode_of = np.repeat(np.arange(len(bounds)), [len(b) for b in bounds])
        some = segments[:, 1] > segments[:, 0]
        self._segments, self._episode_of = segments[some], episode_of[some]
        self._first_sample = np.cumsum([0, *(self._segments[:, 1] - self._segments[:, 0])])
        self._reader = PictureReader() if any(e.source is not None for e in self.episodes) else None
        # (episode, camera) -> descriptor of the stored images, the latest MAX_FILES: there may be more of them than a
        # process can have open.
        self._files: dict[tuple[int, str], int] = {}

    def __getstate__(self) -> dict[str, Any]:
        """What a worker is sent: it opens files itself, and looks itself for arrays that lie on disk."""
        return self.__dict__ | {"_files": {}, "episodes": [put_away(episode) for episode in self.episodes]}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__ |= state | {"episodes": [taken_out(episode) for episode in state["episodes"]]}

    def __del__(self) -> None:
        for file in self._files.values():
            os.close(file)

    def _read_image(self, e: int, camera: str, image: int, out: np.ndarray) -> None:
        """Read stored image number `image` of an episode into `out`, (H, W, 3) uint8.

        Not through a memory map: that takes page tables, 3 MB in each worker for every 700 MB of frames touched, and
        longer for a frame that is not in memory yet.

        Raises:
            OSError: the file cannot be read, or has been cut short since it was opened.
            BagError: the same of a bag's file, or it holds something else.
        """
        entry, source = self.episodes[e].entry, self.episodes[e].source
        assert entry is not None
        if source is not None:
            assert self._reader is not None
            self._reader.read(entry / places_file(camera), source, camera, image, out)
            return
        path = entry / pixels_file(camera)
        if (e, camera) not in self._files:
            if len(self._files) >= MAX_FILES:
                os.close(self._files.pop(next(iter(self._files))))  # the first that was opened
            self._files[e, camera] = os.open(path, os.O_RDONLY)
        if os.preadv(self._files[e, camera], [out.data], image * out.nbytes) != out.nbytes:
            raise OSError(errno.EIO, f"image {image} is cut short; remove this folder, it is decoded again", str(path))

    def __len__(self) -> int:
        return int(self._first_sample[-1])

    def locate(self, index: int) -> tuple[str, int]:
        """-> (episode name, frame in it) of a sample."""
        e, t, _ = self._place(index)
        return self.episodes[e].name, t

    def _place(self, index: int) -> tuple[int, int, int]:
        """Of a sample: its episode, its frame in it, and behind which frame the actions of its segment end."""
        if not 0 <= index < len(self):
            raise IndexError(f"sample {index} of {len(self)}")
        segment = int(np.searchsorted(self._first_sample, index, side="right")) - 1
        start, stop = self._segments[segment].tolist()
        return int(self._episode_of[segment]), start + int(index - self._first_sample[segment]), stop

    def tables(self) -> dict[str, np.ndarray]:
        """All that batches consist of but the pixels, to cut them elsewhere (training.feed.DeviceFrames).

        Of the N samples and of the F frames of all episodes, one episode after the other:
            frame          (N,) int64: a sample's frame
            stop           (N,) int64: behind which frame the actions of its segment end
            state          (F, S) float32
            value, origin  (F, A) float64: Episode.chunk_values, chunk_origins
            image.<camera> (F,) int64 among all stored images, one of pixel_owners() after the other
        """
        first_frame = np.cumsum([0, *(len(e.time_ns) for e in self.episodes)])
        moved = self._segments + first_frame[self._episode_of][:, None]
        lengths = np.diff(moved, axis=1)[:, 0]
        within = np.arange(len(self)) - np.repeat(self._first_sample[:-1], lengths)
        tables = {
            "frame": np.repeat(moved[:, 0], lengths) + within,
            "stop": np.repeat(moved[:, 1], lengths),
            "state": np.concatenate([e.state for e in self.episodes]),
            "value": np.concatenate([e.chunk_values for e in self.episodes]),
            "origin": np.concatenate([e.chunk_origins for e in self.episodes]),
        }
        owners = pixel_owners(self.episodes)
        for camera in self.episodes[0].image_shape:
            firsts = np.cumsum([0, *(owner.stored_images[camera] for owner in owners.values())])
            first_of = dict(zip(owners, firsts, strict=False))
            index = [first_of[e.entry or e.name] + e.image_index[camera] for e in self.episodes]
            tables[f"image.{camera}"] = np.concatenate(index)
        return tables

    def __getitem__(self, index: int) -> dict[str, np.ndarray]:
        return {key: value[0] for key, value in self.__getitems__([index]).items()}

    def __getitems__(self, indices: Sequence[int]) -> dict[str, np.ndarray]:
        batch_size, first = len(indices), self.episodes[0]
        batch = {
            "observation.state": np.empty((batch_size, first.path_rad.shape[1]), np.float32),
            "action": np.zeros((batch_size, self.chunk_size, len(first.acted)), np.float32),
            "action_is_pad": np.ones((batch_size, self.chunk_size), bool),
            "index": np.asarray(indices, np.int64),
        }
        for camera, shape in self.episodes[0].image_shape.items():
            batch[f"observation.images.{camera}"] = np.empty((batch_size, *shape, 3), np.uint8)
        for b, i in enumerate(indices):
            e, t, stop = self._place(i)
            episode = self.episodes[e]
            count = min(self.chunk_size, stop - t)
            batch["observation.state"][b] = episode.states(t)
            batch["action"][b, :count] = episode.chunk(t, count)
            batch["action_is_pad"][b, :count] = False
            for camera in episode.image_shape:
                image = episode.image_index[camera][t]
                self._read_image(e, camera, int(image), batch[f"observation.images.{camera}"][b])
        return batch
