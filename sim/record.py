"""Record episodes of the simulated UR10e into rosbag2 folders, without ROS.

    python -m sim.record --out demo_bags --episodes 20 --seed 0 --storage mcap
    python -m sim.record --out demo_bags --episodes 20 --height 96 --width 128 --preview preview.png

writes

    demo_bags/
        episode_000/          a rosbag2 folder: metadata.yaml and one .db3 or .mcap
        episode_001/
        ...
        recording.json        the arguments and totals; written last, so it marks a finished recording

with the topics of a real UR10e cell:

    /joint_states                        sensor_msgs/JointState       125 Hz, the UR driver's joint order
    /camera/color/image_raw              sensor_msgs/Image            30 Hz with jitter, some frames dropped
    /camera/color/image_raw/compressed   sensor_msgs/CompressedImage  the same as JPEG, with --compressed
    /camera/color/camera_info            sensor_msgs/CameraInfo       1 Hz

Episode i depends on the seed and i alone, whatever the number of episodes, workers or pixels.
"""

import argparse
import json
import multiprocessing
import os
import shutil
import signal
import sys
import time
from concurrent.futures import ProcessPoolExecutor, as_completed
from pathlib import Path

import cv2
import numpy as np
from rosbags.rosbag2 import StoragePlugin, Writer
from rosbags.typesys import Stores, get_typestore
from tqdm import tqdm

from sim import scene as scenes
from sim.expert import random_episode
from ur10e import DRIVER_FROM_CANONICAL, DRIVER_JOINT_NAMES

JOINT_TOPIC, JOINT_HZ = "/joint_states", 125
CAMERA_TOPIC, CAMERA_HZ = "/camera/color/image_raw", 30
CAMERA_INFO_TOPIC = "/camera/color/camera_info"
CAMERA_FRAME_ID = "camera_color_optical_frame"

# Jitter moves the moment of sampling; latency is from there (header.stamp) to the bag's receive time.
JOINT_JITTER_S, JOINT_LATENCY_S = 0.0003, (0.0002, 0.0006)
CAMERA_JITTER_S, CAMERA_LATENCY_S = 0.003, (0.012, 0.020)
DROP_PROBABILITY = 0.01
JPEG_QUALITY = 90

# Bags carry wall-clock times; a fixed clock keeps them the same on every run. Episodes start a minute apart.
EPOCH_NS, EPISODE_SPACING_NS = 1_760_000_000 * 10**9, 60 * 10**9

STORAGES = {"sqlite3": StoragePlugin.SQLITE3, "mcap": StoragePlugin.MCAP}
MIN_PIXELS, MAX_PIXELS = 32, 4096  # a side
MANIFEST, PARTIAL_MANIFEST = "recording.json", "recording.json.partial"


# --- One episode ------------------------------------------------------------------------------------------


def joint_times(rng, duration_s):
    """When the driver samples the joints: (n,) float64 s, increasing, JOINT_HZ with a little jitter."""
    t_s = np.arange(0.0, duration_s, 1 / JOINT_HZ)
    return t_s + rng.uniform(0.0, JOINT_JITTER_S, len(t_s))


def camera_times(rng, duration_s):
    """When the camera captures a frame that arrives: (n,) float64 s, increasing.

    CAMERA_HZ with jitter; about one frame in a hundred is lost, never the first and never two in a row, so a
    gap stays below 100 ms.
    """
    t_s = np.arange(0.0, duration_s, 1 / CAMERA_HZ) + rng.uniform(0.0, 2 * CAMERA_JITTER_S)
    t_s[1:] += rng.uniform(-CAMERA_JITTER_S, CAMERA_JITTER_S, len(t_s) - 1)
    dropped = rng.random(len(t_s)) < DROP_PROBABILITY
    dropped[0] = False
    dropped[1:] &= ~dropped[:-1]
    return t_s[~dropped]


def plan_episode(seed, index, varied=False):
    """Everything about an episode but its pixels; with `varied` the light and the camera's place are its own.

    Returns (scene, expert, events); an event is (receive_ns, stamp_ns, t_s, kind) with kind "joints" or
    "camera", sorted by receive_ns.
    """
    scene, expert = random_episode(seed, index)
    if varied:
        scene = scenes.varied(scene, np.random.default_rng([seed, index, 3]))  # 2 is the roll-outs' stream
    rng = np.random.default_rng([seed, index, 1])  # its own stream: timing never changes the motion
    begin_ns = EPOCH_NS + index * EPISODE_SPACING_NS
    events = []
    for kind, t_s, latency_s in (
        ("joints", joint_times(rng, expert.duration_s), JOINT_LATENCY_S),
        ("camera", camera_times(rng, expert.duration_s), CAMERA_LATENCY_S),
    ):
        stamp_ns = begin_ns + np.rint(t_s * 1e9).astype(np.int64)
        receive_ns = stamp_ns + np.rint(rng.uniform(*latency_s, len(t_s)) * 1e9).astype(np.int64)
        columns = receive_ns.tolist(), stamp_ns.tolist(), t_s.tolist()
        events += [(*row, kind) for row in zip(*columns, strict=True)]
    return scene, expert, sorted(events)


def write_episode(bag, seed, index, storage="sqlite3", compressed=False, height=480, width=640, varied=False):
    """Write episode `index` to the new rosbag2 folder `bag`; returns its number of camera frames.

    Raises rosbags' WriterError when `bag` exists.
    """
    scene, expert, events = plan_episode(seed, index, varied)
    renderer = scenes.Renderer(scene, height, width)
    store = get_typestore(Stores.ROS2_HUMBLE)
    types = store.types
    effort = np.zeros(6)

    def header(stamp_ns, frame_id):
        stamp = types["builtin_interfaces/msg/Time"](*divmod(stamp_ns, 10**9))
        return types["std_msgs/msg/Header"](stamp=stamp, frame_id=frame_id)

    with Writer(bag, version=9, storage_plugin=STORAGES[storage]) as writer:

        def publisher(topic, msgtype):
            connection = writer.add_connection(topic, msgtype, typestore=store)

            def publish(receive_ns, **fields):
                message = types[msgtype](**fields)
                writer.write(connection, receive_ns, store.serialize_cdr(message, msgtype))

            return publish

        publish_joints = publisher(JOINT_TOPIC, "sensor_msgs/msg/JointState")
        if compressed:
            publish_image = publisher(f"{CAMERA_TOPIC}/compressed", "sensor_msgs/msg/CompressedImage")
        else:
            publish_image = publisher(CAMERA_TOPIC, "sensor_msgs/msg/Image")
        publish_info = publisher(CAMERA_INFO_TOPIC, "sensor_msgs/msg/CameraInfo")

        frames = 0
        for receive_ns, stamp_ns, t_s, kind in events:
            if kind == "joints":
                publish_joints(
                    receive_ns,
                    header=header(stamp_ns, "base_link"),
                    name=list(DRIVER_JOINT_NAMES),
                    position=expert.position(t_s)[DRIVER_FROM_CANONICAL],
                    velocity=expert.velocity(t_s)[DRIVER_FROM_CANONICAL],
                    effort=effort,
                )
                continue
            camera_header = header(stamp_ns, CAMERA_FRAME_ID)
            if frames % CAMERA_HZ == 0:
                publish_info(receive_ns, header=camera_header, **_camera_info(renderer.camera, types))
            publish_image(receive_ns, header=camera_header, **_image(renderer.render(expert.position(t_s)), compressed))
            frames += 1
    return frames


def _image(rgb, compressed):
    """Fields of sensor_msgs/Image, or of CompressedImage, for an (H, W, 3) uint8 RGB frame."""
    if not compressed:
        height, width, _ = rgb.shape
        size = dict(height=height, width=width, step=3 * width)
        return dict(**size, encoding="rgb8", is_bigendian=0, data=rgb.reshape(-1))
    bgr = cv2.cvtColor(rgb, cv2.COLOR_RGB2BGR)
    _, jpeg = cv2.imencode(".jpg", bgr, [cv2.IMWRITE_JPEG_QUALITY, JPEG_QUALITY])
    return dict(format="rgb8; jpeg compressed bgr8", data=jpeg.reshape(-1))


def _camera_info(camera, types):
    """Fields of sensor_msgs/CameraInfo: an undistorted pinhole with the intrinsics of `camera`."""
    region = types["sensor_msgs/msg/RegionOfInterest"](x_offset=0, y_offset=0, height=0, width=0, do_rectify=False)
    return dict(
        height=camera.height,
        width=camera.width,
        distortion_model="plumb_bob",
        d=np.zeros(5),
        k=camera.K.reshape(-1),
        r=np.eye(3).reshape(-1),
        p=np.hstack([camera.K, np.zeros((3, 1))]).reshape(-1),
        binning_x=0,
        binning_y=0,
        roi=region,
    )


# --- A recording: many episodes in one folder -----------------------------------------------------------------


def record(
    out,
    episodes,
    seed,
    storage="sqlite3",
    compressed=False,
    height=480,
    width=640,
    varied=False,
    workers=1,
    progress=False,
):
    """Record `episodes` episodes below `out` and return their rosbag2 folders, in order, as a list of Path.

    A finished recording with the same arguments is left as it is; an interrupted one is redone. `workers`
    processes share the episodes; more than one needs a caller that can be imported (a script with a
    `__main__` guard). `progress` shows a bar on a terminal.
    Raises ValueError for arguments out of range, FileExistsError when `out` holds anything else, and OSError
    when the disk has no room.
    """
    out = Path(out)
    arguments = dict(episodes=episodes, seed=seed, storage=storage, compressed=compressed, height=height, width=width)
    if varied:  # recordings from before it could be asked for do not say
        arguments["varied"] = True
    _check_arguments(workers=workers, **arguments)
    digits = max(3, len(str(episodes - 1)))
    bags = [out / f"episode_{index:0{digits}d}" for index in range(episodes)]
    if _is_finished(out, arguments, bags):
        return bags

    camera_frames = [sum(event[3] == "camera" for event in plan_episode(seed, i)[2]) for i in range(episodes)]
    _prepare(out, arguments, bags, needed_bytes=0 if compressed else sum(camera_frames) * height * width * 3)
    tasks = [(bag, seed, index, storage, compressed, height, width, varied) for index, bag in enumerate(bags)]
    # disable=None: a bar on a terminal only, so that logs stay readable.
    with tqdm(total=sum(camera_frames), unit="frame", disable=None if progress else True) as bar:
        if min(workers, episodes) == 1:
            for task in tasks:
                bar.update(write_episode(*task))
        else:
            _write_in_parallel(tasks, workers, bar)

    totals = dict(frames=sum(camera_frames), bytes=_size_bytes(bags))
    _write_json(out / MANIFEST, dict(arguments=arguments, **totals))
    (out / PARTIAL_MANIFEST).unlink()
    return bags


def _write_in_parallel(tasks, workers, bar):
    # spawn: a fork of a process that already runs OpenCV's or PyTorch's threads can hang.
    context = multiprocessing.get_context("spawn")
    workers = min(workers, len(tasks))
    with ProcessPoolExecutor(workers, mp_context=context, initializer=_start_worker) as pool:
        futures = [pool.submit(write_episode, *task) for task in tasks]
        try:
            for future in as_completed(futures):
                bar.update(future.result())
        except BaseException:
            pool.shutdown(cancel_futures=True)
            raise


def _start_worker():
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is the parent's to handle, once
    cv2.setNumThreads(1)  # the processes are the parallelism


def _check_arguments(episodes, seed, storage, compressed, height, width, workers, varied=False):
    if episodes < 1:
        raise ValueError(f"--episodes is {episodes}; expected 1 or more")
    if seed < 0:
        raise ValueError(f"--seed is {seed}; expected 0 or more")
    if storage not in STORAGES:
        raise ValueError(f"--storage is {storage!r}; expected one of {', '.join(STORAGES)}")
    for name, value in (("--height", height), ("--width", width)):
        if not MIN_PIXELS <= value <= MAX_PIXELS:
            raise ValueError(f"{name} is {value}; expected {MIN_PIXELS} to {MAX_PIXELS} pixels")
    if workers < 1:
        raise ValueError(f"--workers is {workers}; expected 1 or more")


def _is_finished(out, arguments, bags):
    """True when `out` is exactly this recording, finished. Raises FileExistsError when it is another one."""
    if not (out / MANIFEST).is_file():
        return False
    manifest = _read_manifest(out / MANIFEST)
    found = manifest["arguments"]
    if found != arguments:
        names = {**arguments, **found}
        changed = [f"{k} {found.get(k)}, not {arguments.get(k)}" for k in names if found.get(k) != arguments.get(k)]
        raise FileExistsError(f"{out} holds a recording with {', '.join(changed)}; choose another --out or remove it")
    folders = {path for path in out.iterdir() if path.is_dir()}
    if folders != set(bags) or _size_bytes(bags) != manifest.get("bytes"):
        raise FileExistsError(
            f"{out} holds this recording, but bags were added, removed or changed since; "
            f"choose another --out or remove it"
        )
    return True


def _prepare(out, arguments, bags, needed_bytes):
    """An empty `out` with the partial manifest, after clearing away what an interrupted same recording left."""
    if out.exists() and not out.is_dir():
        raise FileExistsError(f"{out} is a file; --out needs a new or empty folder")
    left = sorted(out.iterdir()) if out.is_dir() else []
    if left:
        partial = out / PARTIAL_MANIFEST
        ours = {partial, out / f"{MANIFEST}.tmp", *bags}
        foreign = [path.name for path in left if path not in ours]
        if foreign or not partial.is_file():
            found = (foreign or [left[0].name])[0]
            raise FileExistsError(f"{out} is not empty (it holds {found}); choose a new or empty --out")
        if _read_manifest(partial)["arguments"] != arguments:
            raise FileExistsError(
                f"{out} holds an unfinished recording with other arguments; choose another --out or remove it"
            )
        for bag in set(bags).intersection(left):
            shutil.rmtree(bag)
    out.mkdir(parents=True, exist_ok=True)
    free_bytes = shutil.disk_usage(out).free
    if needed_bytes > free_bytes:
        raise OSError(
            f"the images need {needed_bytes / 1e6:.0f} MB and {out} has {free_bytes / 1e6:.0f} MB free; "
            f"record fewer or smaller ones, or use --compressed"
        )
    _write_json(out / PARTIAL_MANIFEST, dict(arguments=arguments))


def _size_bytes(bags):
    return sum(file.stat().st_size for bag in bags for file in bag.iterdir())


def _read_manifest(path):
    try:
        manifest = json.loads(path.read_text())
    except ValueError:
        manifest = None
    if not isinstance(manifest, dict) or not isinstance(manifest.get("arguments"), dict):
        raise FileExistsError(f"{path} is not a recording's manifest; choose another --out or remove it")
    return manifest


def _write_json(path, content):
    # To a temporary name, then renamed: a manifest is whole or absent.
    temporary = path.with_name(f"{path.name}.tmp")
    temporary.write_text(json.dumps(content, indent=2) + "\n")
    os.replace(temporary, path)


def contact_sheet(seed, height=480, width=640):
    """Six moments of episode 0, from the start to the touch, in two rows: (2 H, 3 W, 3) uint8 RGB."""
    scene, expert = random_episode(seed, 0)
    renderer = scenes.Renderer(scene, height, width)
    moments_s = np.linspace(0.2, 0.9, 6) * expert.duration_s
    frames = [renderer.render(expert.position(t_s)) for t_s in moments_s]
    return np.vstack([np.hstack(frames[:3]), np.hstack(frames[3:])])


# --- Command line -----------------------------------------------------------------------------------------


class _Parser(argparse.ArgumentParser):
    def error(self, message):
        self.exit(2, f"error: {message}\n")  # one line, without the usage


def main(argv=None):
    """The command line; returns the exit status: 0, 2 for an error (one line on stderr), 130 for Ctrl-C."""
    parser = _Parser(prog="python -m sim.record", description="Record a simulated UR10e as rosbag2 folders.")
    parser.add_argument("--out", type=Path, required=True, help="new or empty folder for the bags")
    parser.add_argument("--episodes", type=int, default=10)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--storage", default="sqlite3", help=" or ".join(STORAGES) + " (default sqlite3)")
    parser.add_argument("--compressed", action="store_true", help="JPEG images (CompressedImage)")
    parser.add_argument("--height", type=int, default=480, help="pixels (default 480)")
    parser.add_argument("--width", type=int, default=640, help="pixels (default 640)")
    parser.add_argument("--varied", action="store_true", help="each episode has a light and a camera pose of its own")
    parser.add_argument("--workers", type=int, default=os.cpu_count() or 1, help="processes")
    parser.add_argument("--preview", type=Path, help="also write a contact sheet of episode 0 (.png or .jpg)")
    args = vars(parser.parse_args(argv))
    out, preview = args["out"], args.pop("preview")
    begin_s = time.perf_counter()
    try:
        if preview and (preview.suffix not in (".png", ".jpg") or not preview.parent.is_dir()):
            raise ValueError(f"--preview is {preview}; expected a .png or .jpg file in an existing folder")
        already_there = (out / MANIFEST).is_file()
        bags = record(**args, progress=True)
        if preview:
            sheet = contact_sheet(args["seed"], args["height"], args["width"])
            preview.write_bytes(cv2.imencode(preview.suffix, sheet[..., ::-1])[1].tobytes())
    except (ValueError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print(f"interrupted: {out} is unfinished; run the same command again to redo it", file=sys.stderr)
        return 130

    took_s = time.perf_counter() - begin_s
    totals = json.loads((out / MANIFEST).read_text())
    if already_there:
        print("already recorded with these arguments; nothing to do")
    print(f"episodes  {len(bags)}  ({bags[0].name} to {bags[-1].name}, {args['storage']})")
    print(f"frames    {totals['frames']}  ({args['height']}x{args['width']})")
    print(f"size      {totals['bytes'] / 1e6:.1f} MB")
    print(f"path      {out}")
    if not already_there:
        rate = totals["frames"] / took_s
        print(f"speed     {rate:.0f} frames/s  ({took_s:.1f} s, workers {args['workers']})")
    if preview:
        print(f"preview   {preview}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
