"""What is computed over all training episodes: means and deviations for normalisation, turns to count angles from.

Knows: which frames count, floors for joints that never move, that image statistics are kept in the cache entry.
Must not know: how a policy normalises with them.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
from collections.abc import Sequence

import numpy as np

from .cache import save, whole
from .errors import BagError
from .samples import open_pixels
from .synchronisation import Episode, wrap_to_pi

# Floors for standard deviations. A joint that never moves has a deviation near zero, and dividing by it would turn
# a 0.001 rad disturbance on the robot into an input of hundreds of sigmas.
POSITION_STD_FLOOR_RAD = 1e-2
DELTA_STD_FLOOR_RAD = 1e-4
# Of a state from another topic, whose unit may be anything: this part of its largest magnitude; of one that never
# changes 1, in its unit. Of its deltas: a hundredth, as of joints.
STATE_STD_FLOOR = 1e-2
ANGLE_BINS, MANY_FRAMES = 1 << 16, 100_000  # of the circle; that are sorted at once
IMAGENET_MEAN, IMAGENET_STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)

Moments = tuple[int, np.ndarray, np.ndarray]  # count, mean, sum of squared deviations from it


def compute_stats(
    episodes: Sequence[Episode], image_stats: str, chunk_size: int
) -> tuple[dict[str, dict[str, np.ndarray]], list[str]]:
    """Mean and standard deviation of the training episodes, for normalisation.

    State: every kept frame. Action: every frame that has one; relative ones, and deltas of commands: every one of every
    frame's chunk, as training sees them. Images: ImageNet's, or per channel over every stored frame of each camera, in
    [0, 1] ("dataset"; computed once per cache entry, or part of one, and kept beside it).

    Args:
        episodes: those to train on, at least one.
        image_stats: "imagenet" or "dataset".
        chunk_size: actions of a chunk.

    Returns:
        (stats {feature: {"mean", "std"}} float32 with shapes (S,), (A,) or (3, 1, 1),
         one line per state or action whose deviation was raised to its floor).

    Raises:
        BagError: no episode has two consecutive frames, so that there is no action to learn.
    """
    state = action = None
    images: dict[str, Moments | None] = dict.fromkeys(episodes[0].image_shape)
    low, high = np.float32(np.inf), np.float32(-np.inf)
    for episode in episodes:
        states = episode.state
        state = _merge(state, _moments(states))
        low, high = np.minimum(low, states.min(axis=0)), np.maximum(high, states.max(axis=0))
        if image_stats == "dataset":
            for camera in images:
                images[camera] = _merge(images[camera], _image_moments(episode, camera))
        has_action = np.arange(len(episode.time_ns)) < episode.action_stop
        if not has_action.any():
            continue
        if episode.action_mode == "absolute" or (episode.action_mode == "delta" and episode.target is None):
            action = _merge(action, _moments(episode.action[has_action]))
        else:
            for start, stop in episode.segments:
                count = stop - episode.ahead - start  # of frames with an action
                for k in range(1, min(chunk_size, count) + 1):
                    action = _merge(action, _moments(episode.chunk_actions(start, count, k)))
    if state is None or action is None:
        raise BagError(
            "no episode has two consecutive frames, so that there is no action to learn; see data.max_offset_ms"
        )
    floored: list[str] = []

    def finish(key: str, moments: Moments, floor: np.ndarray, in_rad: np.ndarray) -> dict[str, np.ndarray]:
        std = np.sqrt(moments[2] / moments[0])
        for j in np.flatnonzero(std < floor):
            unit = " rad" if in_rad[j] else ""
            floored.append(f"{key}[{j}]: standard deviation {std[j]:.2g} raised to its floor {floor[j]:g}{unit}")
        return {"mean": moments[1].astype(np.float32), "std": np.maximum(std, floor).astype(np.float32)}

    acted, joint = episodes[0].acted, np.arange(len(state[1])) < episodes[0].joints
    floor, delta_floor = _floors(np.asarray(low), np.asarray(high), joint)
    action_floor = floor if episodes[0].action_mode == "absolute" else delta_floor
    stats = {
        "observation.state": finish("observation.state", state, floor, joint),
        "action": finish("action", action, action_floor[acted], joint[acted]),
    }
    for camera, moments in images.items():
        if moments is None:
            mean, std = np.array(IMAGENET_MEAN), np.array(IMAGENET_STD)
        else:
            mean, std = moments[1], np.maximum(np.sqrt(moments[2] / moments[0]), 1 / 255)
        stats[f"observation.images.{camera}"] = {
            "mean": mean.astype(np.float32).reshape(3, 1, 1),
            "std": std.astype(np.float32).reshape(3, 1, 1),
        }
    return stats, floored


def _floors(low: np.ndarray, high: np.ndarray, joint: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """The least standard deviations of states, and of their deltas, (S,) each, by the least and largest of each."""
    others = np.where(low == high, 1.0, STATE_STD_FLOOR * np.maximum(np.abs(low), np.abs(high)))
    floor = np.where(joint, POSITION_STD_FLOOR_RAD, others)
    return floor, np.where(joint, DELTA_STD_FLOOR_RAD, others / 100)


def angle_references(episodes: Sequence[Episode]) -> np.ndarray:
    """(S,) float64, rad: for each joint the middle of the arc that the episodes visit, in (-pi, pi].

    It is opposite the middle of the largest arc in which no frame of any episode lies, so that angles wrapped around
    it jump only where the training data never are. A mean would not do: a joint that works at 0 and sometimes reaches
    3.3 rad has its mean near 0, and the seam in its way. For refer_angles(); of states that are no angles, and are
    never wrapped, it means nothing.

    The circle is cut into ANGLE_BINS; of each only the least and the largest angle in it are kept, whatever the number
    of frames. So gaps narrower than one, a tenth of a milliradian, count as visited.
    """
    states = episodes[0].path_rad.shape[1]
    least, largest = np.full((2, states, ANGLE_BINS), np.nan)
    waiting: list[np.ndarray] = []  # short episodes are looked at together
    for number, episode in enumerate(episodes):
        waiting.append(episode.path_rad)
        if number + 1 < len(episodes) and sum(map(len, waiting)) < MANY_FRAMES and len(waiting) < MANY_FRAMES // 1000:
            continue
        paths, waiting = np.concatenate(waiting), []
        for joint in range(states):
            angles = np.sort(wrap_to_pi(paths[:, joint]))
            bins = np.clip((angles + np.pi) * (ANGLE_BINS / (2 * np.pi)), 0, ANGLE_BINS - 1).astype(np.int64)
            ends = np.flatnonzero(np.append(np.diff(bins), 1))  # the last angle of each bin
            first, last = angles[np.append(0, ends[:-1] + 1)], angles[ends]
            least[joint, bins[ends]] = np.fmin(least[joint, bins[ends]], first)
            largest[joint, bins[ends]] = np.fmax(largest[joint, bins[ends]], last)
    seam = np.empty(states)
    for joint in range(states):
        visited = ~np.isnan(least[joint])
        first, last = least[joint, visited], largest[joint, visited]
        gaps = np.append(first[1:], first[0] + 2 * np.pi) - last
        seam[joint] = last[gaps.argmax()] + gaps.max() / 2
    return np.round(wrap_to_pi(seam + np.pi), 3)  # to read it in a file


def _moments(rows: np.ndarray) -> Moments:
    """Moments of each column, in float64."""
    rows = rows.astype(np.float64)
    mean = rows.mean(axis=0)
    return len(rows), mean, ((rows - mean) ** 2).sum(axis=0)


def _merge(a: Moments | None, b: Moments) -> Moments:
    """Combine two sets' moments (Chan, Golub & LeVeque 1979, eq. 2.1), so that statistics stream over episodes."""
    if a is None:
        return b
    n = a[0] + b[0]
    shift = b[1] - a[1]
    return n, a[1] + shift * (b[0] / n), a[2] + b[2] + shift**2 * (a[0] * b[0] / n)


def _image_moments(episode: Episode, camera: str) -> Moments:
    """Per-channel moments in [0, 1] over an episode's stored images; kept in the cache entry after the first time.

    Of a part of a recording only over the images that it shows: others may be held out.
    """
    assert episode.entry is not None
    images: slice | np.ndarray = slice(None) if episode.whole else np.unique(episode.image_index[camera])
    which = "" if isinstance(images, slice) else f".{hashlib.sha256(images.tobytes()).hexdigest()[:16]}"
    file = episode.entry / f"{camera}{which}.moments.json"
    with contextlib.suppress(OSError, ValueError, TypeError):  # not there yet, or damaged: computed again
        count, mean, squares = json.loads(file.read_text())
        return count, np.array(mean), np.array(squares)
    moments: Moments | None = None
    stored = open_pixels(episode, camera)
    for image in np.arange(len(stored))[images]:
        moments = _merge(moments, _moments(stored[image].reshape(-1, 3) / np.float32(255)))
    assert moments is not None
    with contextlib.suppress(OSError), whole(file) as partial:  # a full disk: they are computed again next time
        save(partial, json.dumps([moments[0], moments[1].tolist(), moments[2].tolist()]).encode())
    return moments
