"""Episodes to training samples: whole batches of state, images and a chunk of actions, straight from the cache.

Knows: which frame a sample is, where its chunk ends, how stored pixels are read.
Must not know: bags, how an episode's frames came about, normalisation, torch: samples are raw numpy arrays.
"""

from __future__ import annotations

import errno
import os
import resource
from collections.abc import Hashable, Sequence
from typing import Any

import numpy as np

from .cache import pixels_file
from .synchronisation import Episode


def open_pixels(episode: Episode, camera: str) -> np.ndarray:
    """(N, H, W, 3) uint8 memory map of an episode's stored images, in file order (see Episode.image_index)."""
    assert episode.entry is not None
    shape = (episode.stored_images[camera], *episode.image_shape[camera], 3)
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

    With `images` False, for frames that live on the device, instead of the images
        image_index.<camera>         (B,) int64 among all stored images, one of pixel_owners() after the other
    """

    def __init__(self, episodes: Sequence[Episode], chunk_size: int, images: bool = True) -> None:
        self.episodes = list(episodes)
        self.images = images
        self.chunk_size = chunk_size
        stops = [episode.action_stop for episode in self.episodes]
        frames = [np.flatnonzero(np.arange(len(stop)) < stop) for stop in stops]
        self._episode_of = np.repeat(np.arange(len(frames)), [len(f) for f in frames])
        self._frame_of = np.concatenate(frames) if frames else np.zeros(0, np.int64)
        self._stop_of = np.concatenate([s[f] for s, f in zip(stops, frames, strict=True)]) if frames else self._frame_of
        cameras = self.episodes[0].image_shape if self.episodes else ()
        self._first_image: dict[str, list[int]] = {}  # camera -> which of all stored images is each episode's first
        owners = pixel_owners(self.episodes)
        for camera in cameras:
            firsts = np.cumsum([0, *(owner.stored_images[camera] for owner in owners.values())]).tolist()
            first_of = dict(zip(owners, firsts, strict=False))
            self._first_image[camera] = [first_of[e.entry or e.name] for e in self.episodes]
        self._files: dict[tuple[int, str], int] = {}  # (episode, camera) -> descriptor of the stored images
        self._allow_open_files()

    def _allow_open_files(self) -> None:
        """Every episode and camera is a file; a thousand episodes pass the usual soft limit of 1024."""
        soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
        needed = 512 + sum(len(e.image_shape) for e in self.episodes)
        if soft != resource.RLIM_INFINITY and soft < needed:
            limit = needed if hard == resource.RLIM_INFINITY else min(needed, hard)
            resource.setrlimit(resource.RLIMIT_NOFILE, (limit, hard))

    def __getstate__(self) -> dict[str, Any]:
        return self.__dict__ | {"_files": {}}  # a worker opens the files itself

    def __del__(self) -> None:
        for file in self._files.values():
            os.close(file)

    def _read_image(self, e: int, camera: str, image: int, out: np.ndarray) -> None:
        """Read stored image number `image` of an episode into `out`, (H, W, 3) uint8.

        Not through a memory map: that takes page tables, 3 MB in each worker for every 700 MB of frames touched, and
        longer for a frame that is not in memory yet.

        Raises:
            OSError: the file cannot be read, or has been cut short since it was opened.
        """
        entry = self.episodes[e].entry
        assert entry is not None
        path = entry / pixels_file(camera)
        if (e, camera) not in self._files:
            self._files[e, camera] = os.open(path, os.O_RDONLY)
        if os.preadv(self._files[e, camera], [out.data], image * out.nbytes) != out.nbytes:
            raise OSError(errno.EIO, f"image {image} is cut short; remove this folder, it is decoded again", str(path))

    def __len__(self) -> int:
        return len(self._frame_of)

    def locate(self, index: int) -> tuple[str, int]:
        """-> (episode name, frame in it) of a sample."""
        return self.episodes[self._episode_of[index]].name, int(self._frame_of[index])

    def __getitem__(self, index: int) -> dict[str, np.ndarray]:
        return {key: value[0] for key, value in self.__getitems__([index]).items()}

    def __getitems__(self, indices: Sequence[int]) -> dict[str, np.ndarray]:
        batch_size, first = len(indices), self.episodes[0]
        batch = {
            "observation.state": np.empty((batch_size, first.state.shape[1]), np.float32),
            "action": np.zeros((batch_size, self.chunk_size, len(first.acted)), np.float32),
            "action_is_pad": np.ones((batch_size, self.chunk_size), bool),
            "index": np.asarray(indices, np.int64),
        }
        for camera, shape in self.episodes[0].image_shape.items():
            if self.images:
                batch[f"observation.images.{camera}"] = np.empty((batch_size, *shape, 3), np.uint8)
            else:
                batch[f"image_index.{camera}"] = np.empty(batch_size, np.int64)
        for b, i in enumerate(indices):
            e, t = int(self._episode_of[i]), int(self._frame_of[i])
            episode = self.episodes[e]
            count = min(self.chunk_size, int(self._stop_of[i]) - t)
            batch["observation.state"][b] = episode.state[t]
            batch["action"][b, :count] = episode.chunk(t, count)
            batch["action_is_pad"][b, :count] = False
            for camera in episode.image_shape:
                image = episode.image_index[camera][t]
                if self.images:
                    self._read_image(e, camera, int(image), batch[f"observation.images.{camera}"][b])
                else:
                    batch[f"image_index.{camera}"][b] = self._first_image[camera][e] + image
        return batch
