"""A folder of recordings of which some are wrong, for the report of the inspection: by name, what was planted in each.

    python -m tests.planted outputs/planted        # as the simulated cell looks; about a minute
    python -m tests.planted outputs/planted --all  # more faults
    python -m rosbag_dataset outputs/planted --html outputs/planted.html \
        --override 'data.camera_topics={front: /front/image_raw, close: /close/image_raw}'
"""

from __future__ import annotations

import argparse
import dataclasses
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from sim.expert import Expert, random_start
from sim.scene import Renderer, Scene, random_scene
from tests.bags import JOINT_TOPIC, T0_NS, Message, image, joint_state, write_bag

CAMERAS = {"front": "/front/image_raw", "close": "/close/image_raw"}
OVERRIDE = f"data.camera_topics={{{', '.join(f'{camera}: {topic}' for camera, topic in CAMERAS.items())}}}"
CLOSER_M = (0.40, -0.42, -0.30)  # the second camera stands so much nearer, and lower
GOOD = [f"pick_{i:02d}" for i in range(1, 7)]
LATE_MS = 250
Painter = Callable[[np.ndarray, float], np.ndarray]  # (joints (6,) rad, time in s) -> (H, W, 3) uint8 RGB


@dataclasses.dataclass
class Take:
    """What the arm does, and what goes wrong while it is recorded. Times are in s from its start."""

    scene: Scene
    position: Callable[[np.ndarray], np.ndarray]  # (N,) s -> (N, 6) rad
    duration_s: float
    start_s: float = 0.0  # of the whole, by the clock of all recordings
    degrees: bool = False
    repeats_s: tuple[float, float] = (0, 0)  # the driver sends what it knew
    frozen_s: tuple[float, float] = (0, 0)  # the front camera shows one picture
    black_s: tuple[float, float] = (0, 0)  # or none
    torn: bool = False  # now and then it has rows of the picture before
    close_ends_s: float = np.inf  # the other camera dies
    set_back_s: float = np.inf  # the clock of all goes back by 2 s then
    two_publishers: bool = False  # another one, which knows an old pose only
    joint_hz: float | None = None  # None: as all
    late_ms: float = 2.0  # from the stamp of a picture of the front camera to its receipt


def take(index: int, pause_s: float = 0.0, start_rad: np.ndarray | None = None) -> Take:
    """The scripted expert's way to a block, about half as fast as it goes, with a pause amid it."""
    rng = np.random.default_rng([5, index])
    scene = random_scene(rng)
    expert = Expert(random_start(rng) if start_rad is None else start_rad, scene.block_xy_m)
    slower = rng.uniform(1.8, 2.2)
    half_s = slower * expert.duration_s / 2

    def position(t_s: np.ndarray) -> np.ndarray:
        moved_s = np.minimum(t_s, half_s) + np.maximum(0.0, t_s - half_s - pause_s)
        return expert.position(moved_s / slower)

    return Take(scene, position, 2 * half_s + pause_s, 60.0 * index)


def takes() -> dict[str, Take]:
    """Name of a bag -> its take: good ones, and one of each fault, named for it."""
    good = {name: take(i) for i, name in enumerate(GOOD, 1)}
    middle_s = take(11).duration_s / 2
    turned = random_start(np.random.default_rng(7)) + np.array([1.2, 0, 0, 0, 0, 0])
    return good | {
        "degrees": dataclasses.replace(take(9), degrees=True),
        "camera_dies": dataclasses.replace(take(10), close_ends_s=1.5),
        "driver_hangs": dataclasses.replace(take(11), repeats_s=(middle_s - 1.4, middle_s - 0.6)),
        "pictures_freeze": dataclasses.replace(take(12), frozen_s=(2.0, 4.0)),
        "camera_late": dataclasses.replace(take(13), late_ms=LATE_MS),
        "stands_still": take(14, pause_s=2.5),
        "comes_from_elsewhere": take(15, start_rad=turned),
        "replayed": dataclasses.replace(take(2), scene=take(16).scene, start_s=60.0 * 16),
    }


def more_takes() -> dict[str, Take]:
    """The same for faults that hardly need a picture; there is a copy of a good one, too: see plant()."""
    return {
        "clock_set_back": dataclasses.replace(take(21), set_back_s=3.0),
        "two_publishers": dataclasses.replace(take(22), two_publishers=True),
        "slow_joints": dataclasses.replace(take(23), joint_hz=8),
        "pictures_black": dataclasses.replace(take(24), black_s=(2.0, 3.0)),
        "pictures_torn": dataclasses.replace(take(25), torn=True),
    }


def plant(
    folder: Path, painter: Callable[[Scene], Painter], joint_hz: float = 125, camera_hz: float = 30, more: bool = False
) -> None:
    """Write one bag for each of takes() below `folder`; `painter` makes what draws the pictures of a scene."""
    for index, (name, of) in enumerate({**takes(), **(more_takes() if more else {})}.items()):
        write_bag(folder / name, messages(of, painter, of.joint_hz or joint_hz, camera_hz, index), "mcap")
    if more:
        shutil.copytree(folder / GOOD[0], folder / "stored_twice")


def messages(
    of: Take, painter: Callable[[Scene], Painter], joint_hz: float, camera_hz: float, seed: int
) -> list[Message]:
    """A take's messages, as they are recorded; joints and pixels have a little noise, as real ones do."""
    rng = np.random.default_rng(seed)
    begin_ns = T0_NS + round(of.start_s * 1e9)
    t_s = np.arange(0, of.duration_s, 1 / joint_hz)
    joint_rad = of.position(t_s) + rng.normal(0, 1e-5, (len(t_s), 6))
    known = (t_s >= of.repeats_s[0]) & (t_s < of.repeats_s[1])
    joint_rad[known] = joint_rad[known.argmax()]
    if of.degrees:
        joint_rad = np.rad2deg(joint_rad)
    found: list[tuple[float, Message]] = []  # with the true time in s at which they are received

    def record(topic: str, t: float, delay_s: float, make: Callable[[int], Any]) -> None:
        set_back_ns = 2 * 10**9 if t >= of.set_back_s else 0
        stamp_ns = begin_ns + round(t * 1e9) - set_back_ns
        found.append((t + delay_s, (topic, stamp_ns + round(delay_s * 1e9), make(stamp_ns))))

    for t, q in zip(t_s.tolist(), joint_rad, strict=True):
        record(JOINT_TOPIC, t, 5e-4, lambda stamp_ns, q=q: joint_state(stamp_ns, q))
        if of.two_publishers:
            record(JOINT_TOPIC, t, 4e-3, lambda stamp_ns: joint_state(stamp_ns, joint_rad[0] + 0.4))
    for camera, topic in CAMERAS.items():
        scene = dataclasses.replace(of.scene, camera_shift_m=CLOSER_M) if camera == "close" else of.scene
        paint = painter(scene)
        times_s = np.arange(0.02, min(of.duration_s, of.close_ends_s if camera == "close" else np.inf), 1 / camera_hz)
        pixels = np.zeros(0, np.uint8)
        for i, t in enumerate(times_s.tolist()):
            if not (camera == "front" and of.frozen_s[0] < t < of.frozen_s[1]):
                pixels = paint(of.position(np.array([t]))[0], t)
                noise = rng.integers(-2, 3, pixels.shape)
                pixels = np.clip(pixels.astype(np.int16) + noise, 0, 255).astype(np.uint8)
            if camera == "front" and of.black_s[0] < t < of.black_s[1]:
                pixels = np.full_like(pixels, 2)
            if camera == "front" and of.torn and i % 30 == 20:
                pixels[len(pixels) // 2 :] = 128
            delay_s = of.late_ms / 1e3 if camera == "front" else 2e-3
            record(topic, t, delay_s, lambda stamp_ns, pixels=pixels: image(stamp_ns, pixels))
    return [message for _, message in sorted(found, key=lambda item: item[0])]


def plain(scene: Scene) -> Painter:
    """A painter for tests: a lit table and a dot that goes where the arm goes."""
    level = round(90 * scene.brightness)

    def paint(q_rad: np.ndarray, t_s: float) -> np.ndarray:
        pixels = np.full((24, 32, 3), level, np.uint8)
        x, y = (int(16 + 10 * np.cos(q_rad[0])), int(12 + 8 * np.sin(q_rad[1])))
        pixels[y : y + 3, x : x + 3] = (220, 40 + int(20 * t_s) % 60, 40)
        return pixels

    return paint


def cell(scene: Scene) -> Painter:
    """The simulated cell."""
    renderer = Renderer(scene, 120, 160)
    return lambda q_rad, t_s: renderer.render(q_rad)


def main() -> None:
    parser = argparse.ArgumentParser(
        prog="python -m tests.planted", description="Record bags, some of which are wrong."
    )
    parser.add_argument("folder", type=Path, help="new folder for the bags")
    parser.add_argument("--all", action="store_true", help="with faults that need no picture")
    args = parser.parse_args()
    plant(args.folder, cell, more=args.all)


if __name__ == "__main__":
    main()
