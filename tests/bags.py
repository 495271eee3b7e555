"""Small bags for tests, written by the real rosbags writer, and ways to make them odd.

    take = make_take(seconds=1.0)                  # what a robot did: joints at 125 Hz, one camera at 30 Hz
    write_bag(tmp_path / "bags" / "a", take.messages())
    settings(tmp_path / "bags", fps=10)            # BagSettings that fit it

A take holds the truth (times, joint positions, pixels), so that a test compares with it and not with the code.
"""

from __future__ import annotations

import shutil
import struct
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import yaml
from rosbags.interfaces import Qos, QosDurability, QosHistory, QosLiveliness, QosReliability, QosTime
from rosbags.rosbag2 import CompressionFormat, CompressionMode, StoragePlugin, Writer
from rosbags.typesys import Stores, get_types_from_msg, get_typestore

from rosbag_dataset import UR_JOINTS, BagSettings, Recording, settings_from

STORE = get_typestore(Stores.ROS2_HUMBLE)
# A type that rosbags does not know, as ur_msgs has it less its analog values: a bag brings its definition.
IO_STATES = "ur_msgs/msg/IOStates"
STORE.register(get_types_from_msg("uint8 pin\nbool state\n", "ur_msgs/msg/Digital"))
STORE.register(get_types_from_msg("Digital[] digital_in_states\nDigital[] digital_out_states\n", IO_STATES))
# As their makers have them (foxglove/schemas, ros-misc-utilities/ffmpeg_image_transport_msgs).
COMPRESSED_VIDEO, FFMPEG_PACKET = "foxglove_msgs/msg/CompressedVideo", "ffmpeg_image_transport_msgs/msg/FFMPEGPacket"
for _type, _definition in {
    COMPRESSED_VIDEO: "builtin_interfaces/Time timestamp\nstring frame_id\nuint8[] data\nstring format\n",
    FFMPEG_PACKET: "std_msgs/Header header\nint32 width\nint32 height\nstring encoding\nuint64 pts\nuint8  flags\n"
    "bool is_bigendian\nuint8[] data\n",
}.items():
    STORE.register(get_types_from_msg(_definition, _type))
T0_NS = 1_700_000_000 * 10**9
JOINTS = UR_JOINTS
JOINT_TOPIC, CAMERA_TOPIC = "/joint_states", "/camera/color/image_raw"
MCAP_MAGIC = b"\x89MCAP0\r\n"

Message = tuple[str, int, Any]  # topic, receive time in ns, message


def settings(bag_dir: Path, cache_dir: Path | None = None, **changes: Any) -> BagSettings:
    """The defaults of config.yaml for the topics of a take; `changes` are keys of its data and conventions."""
    values = dict(
        bag_dir=bag_dir,
        cache_dir=cache_dir or bag_dir.parent / "cache",
        joint_topic=JOINT_TOPIC,
        camera_topic=CAMERA_TOPIC,
        camera_topics=None,
        joint_names=JOINTS,
        fps=30,
        max_offset_ms=50,
        joint_resample="linear",
        time_source="receive",
        ros_distro="humble",
        joint_sign=[1] * 6,
        apply_joint_sign=False,
        wrap_angles=True,
        image_resize=None,
        action_mode="delta",
        min_used_share=0,  # many takes are mostly gaps
        on_bad_bag="error",
    )
    return settings_from(values | changes)


# -- messages -----------------------------------------------------------------------------------------------------


def ros(name: str, *fields: Any) -> Any:
    return STORE.types[name](*fields)


def header(stamp_ns: int) -> Any:
    stamp = ros("builtin_interfaces/msg/Time", stamp_ns // 10**9, stamp_ns % 10**9)
    return ros("std_msgs/msg/Header", stamp, "base")


def joint_state(stamp_ns: int, rad: Sequence[float], names: Sequence[str] = JOINTS) -> Any:
    """A JointState as the UR driver's: velocity there, effort empty."""
    rad = np.asarray(rad, np.float64)
    return ros("sensor_msgs/msg/JointState", header(stamp_ns), list(names), rad, np.zeros(len(rad)), np.zeros(0))


def number(kind: str, value: Any) -> Any:
    """A std_msgs message with one number, for example Float64."""
    return ros(f"std_msgs/msg/{kind}", value)


def numbers(values: Sequence[float]) -> Any:
    """A Float64MultiArray, as of a forward controller."""
    layout = ros("std_msgs/msg/MultiArrayLayout", [], 0)
    return ros("std_msgs/msg/Float64MultiArray", layout, np.asarray(values, np.float64))


def trajectory(stamp_ns: int, at_s: Sequence[float], rows: Any, names: Sequence[str] = JOINTS) -> Any:
    """A JointTrajectory with positions `rows` (P, J), so many seconds from its start."""
    none = np.zeros(0)
    points = [
        ros("trajectory_msgs/msg/JointTrajectoryPoint", np.asarray(row, np.float64), none, none, none,
            ros("builtin_interfaces/msg/Duration", int(s), round(s % 1 * 1e9)))
        for s, row in zip(at_s, rows, strict=True)
    ]  # fmt: skip
    return ros("trajectory_msgs/msg/JointTrajectory", header(stamp_ns), list(names), points)


def wrench(stamp_ns: int, force_n: Sequence[float]) -> Any:
    force, torque = (ros("geometry_msgs/msg/Vector3", *map(float, v)) for v in (force_n, (0, 0, 0)))
    return ros("geometry_msgs/msg/WrenchStamped", header(stamp_ns), ros("geometry_msgs/msg/Wrench", force, torque))


def io_states(outputs: Sequence[bool]) -> Any:
    return ros(IO_STATES, [], [ros("ur_msgs/msg/Digital", pin, bool(on)) for pin, on in enumerate(outputs)])


def image(stamp_ns: int, pixels: np.ndarray, encoding: str = "rgb8", **changes: Any) -> Any:
    """An Image whose header fits `pixels` (H, W) or (H, W, C); `changes` make it lie."""
    height, width = pixels.shape[:2]
    data = np.frombuffer(pixels.tobytes(), np.uint8)
    fields = dict(height=height, width=width, encoding=encoding, is_bigendian=0, step=pixels[0].nbytes, data=data)
    return ros("sensor_msgs/msg/Image", header(stamp_ns), *(fields | changes).values())


def compressed(stamp_ns: int, data: bytes | np.ndarray, kind: str = "jpeg") -> Any:
    return ros("sensor_msgs/msg/CompressedImage", header(stamp_ns), kind, np.frombuffer(bytes(data), np.uint8))


def compressed_video(stamp_ns: int, data: bytes, codec: str) -> Any:
    stamp = header(stamp_ns).stamp
    return ros(COMPRESSED_VIDEO, stamp, "camera", np.frombuffer(data, np.uint8), codec)


def ffmpeg_packet(stamp_ns: int, data: bytes, codec: str) -> Any:
    encoding = f"{codec};yuv420p;bgr8;bgr8"
    return ros(FFMPEG_PACKET, header(stamp_ns), 96, 64, encoding, 0, 0, False, np.frombuffer(data, np.uint8))


def encode(rgb: np.ndarray, extension: str) -> bytes:
    return cv2.imencode(extension, rgb[..., ::-1])[1].tobytes()


# -- takes: what a robot did --------------------------------------------------------------------------------------


def smooth_path(t: np.ndarray) -> np.ndarray:
    """(T, 6) rad: every joint on a sine of its own, inside (-pi, pi)."""
    return np.stack([0.2 * j + 0.5 * np.sin((1 + 0.3 * j) * t + j) for j in range(6)], axis=1)


def moving_in(*stretches: tuple[float, float]) -> Callable[[np.ndarray], np.ndarray]:
    """A path for make_take(): smooth_path() in these stretches of time, in s, and rest where it is in between."""

    def path(t: np.ndarray) -> np.ndarray:
        return smooth_path(sum(np.clip(t - start, 0.0, stop - start) for start, stop in stretches) + 0.0 * t)

    return path


def noise_images(count: int, size: tuple[int, int], seed: int) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 256, (count, *size, 3), np.uint8)


@dataclass
class Take:
    joint_ns: np.ndarray  # (M,)
    joint_rad: np.ndarray  # (M, 6)
    camera_ns: np.ndarray  # (N,)
    images: np.ndarray  # (N, H, W, 3) RGB

    def messages(self, clock_offset_ns: int = 0) -> list[Message]:
        """In order of time; header stamps are off the receive times by `clock_offset_ns`."""
        joints = [
            (JOINT_TOPIC, int(t), joint_state(int(t) + clock_offset_ns, q))
            for t, q in zip(self.joint_ns, self.joint_rad, strict=True)
        ]
        images = [
            (CAMERA_TOPIC, int(t), image(int(t) + clock_offset_ns, p))
            for t, p in zip(self.camera_ns, self.images, strict=True)
        ]
        return sorted(joints + images, key=lambda m: m[1])

    def recording(self) -> Recording:
        """The same without a bag in between, for tests of synchronise()."""
        shape = {"color": self.images.shape[1:3]}
        return Recording(self.joint_ns, self.joint_rad, {"color": self.camera_ns}, shape, shape)  # no first_image


def clock(seconds: float, hz: float, start_s: float = 0.0) -> np.ndarray:
    """(N,) int64 ns: `hz` from `start_s` on, for `seconds`."""
    return T0_NS + np.rint((start_s + np.arange(round(seconds * hz)) / hz) * 1e9).astype(np.int64)


def make_take(
    seconds: float = 1.0,
    size: tuple[int, int] = (6, 8),
    path: Callable[[np.ndarray], np.ndarray] = smooth_path,
    joint_hz: float = 125.0,
    camera_hz: float = 30.0,
    seed: int = 0,
) -> Take:
    """Joints all the time, and a camera inside of it, starting 20 ms later and stopping 20 ms earlier."""
    joint_ns = clock(seconds, joint_hz)
    camera_ns = clock(seconds - 0.04, camera_hz, 0.02)
    return Take(
        joint_ns, path((joint_ns - T0_NS) / 1e9), camera_ns, noise_images(len(camera_ns), size, seed)
    )  # fmt: skip


# -- bags ---------------------------------------------------------------------------------------------------------


def write_bag(
    path: Path,
    messages: Iterable[Message],
    storage: str = "sqlite3",
    compression: str = "none",
    extra_topics: Sequence[tuple[str, str]] = (),
    publishers: int = 1,
) -> Path:
    """A rosbag2 folder with `messages` in the order given. `compression` is none, file, message or storage (mcap's
    own chunks). `extra_topics` are (topic, type) that are declared and stay empty. The messages of a topic come in turn
    from so many `publishers`, which are connections that differ in their QoS."""
    writer = Writer(path, version=9, storage_plugin=StoragePlugin[storage.upper()])
    writer.set_compression(CompressionMode[compression.upper()], CompressionFormat.ZSTD)
    with writer:
        for topic, kind in extra_topics:
            writer.add_connection(topic, kind, typestore=STORE)
        links: dict[tuple[str, int], Any] = {}
        for i, (topic, time_ns, message) in enumerate(messages):
            kind, publisher = message.__msgtype__, i % publishers
            if (topic, publisher) not in links:
                links[topic, publisher] = writer.add_connection(
                    topic, kind, typestore=STORE, offered_qos_profiles=[qos(depth=publisher)] * (publisher > 0)
                )
            writer.write(links[topic, publisher], time_ns, STORE.serialize_cdr(message, kind))
    return path


def qos(depth: int) -> Qos:
    never = QosTime(0, 0)
    return Qos(
        QosHistory.KEEP_LAST, depth, QosReliability.RELIABLE, QosDurability.VOLATILE, never, never,
        QosLiveliness.AUTOMATIC, never, False,
    )  # fmt: skip


def storage_file(bag: Path) -> Path:
    (file,) = (p for p in bag.iterdir() if p.name != "metadata.yaml")
    return file


def edit_metadata(bag: Path, change: Callable[[dict[str, Any]], None]) -> None:
    file = bag / "metadata.yaml"
    content = yaml.safe_load(file.read_text())
    change(content["rosbag2_bagfile_information"])
    file.write_text(yaml.safe_dump(content))


def write_split_bag(path: Path, parts: Sequence[Sequence[Message]], **how: Any) -> Path:
    """One bag in several storage files, as `ros2 bag record --max-bag-size` leaves it."""
    path.mkdir(parents=True)
    files, merged = [], {}
    for i, part in enumerate(parts):
        bag = write_bag(path / f"part{i}", part, **how)
        info = yaml.safe_load((bag / "metadata.yaml").read_text())["rosbag2_bagfile_information"]
        file = storage_file(bag)
        files.append(file.name.replace("part", f"{path.name}_", 1))
        file.rename(path / files[-1])
        shutil.rmtree(bag)
        for entry in info["topics_with_message_count"]:
            known = merged.setdefault(entry["topic_metadata"]["name"], entry | {"message_count": 0})
            known["message_count"] += entry["message_count"]
    info |= {"relative_file_paths": files, "topics_with_message_count": list(merged.values())}
    (path / "metadata.yaml").write_text(yaml.safe_dump({"rosbag2_bagfile_information": info}))
    return path


def strip_mcap_index(file: Path, unchunk: bool) -> None:
    """Drop an mcap's summary (chunk index, statistics); with `unchunk` also put its messages outside of chunks."""
    content = file.read_bytes()
    (summary,) = struct.unpack_from("<Q", content, len(content) - 28)
    body = content[:summary]
    if unchunk:
        start = len(MCAP_MAGIC) + 9 + struct.unpack_from("<Q", content, len(MCAP_MAGIC) + 1)[0]
        op, size = struct.unpack_from("<BQ", content, start)
        assert op == 6, "a chunk follows the header"
        name_size = struct.unpack_from("<I", content, start + 9 + 28)[0]
        assert not name_size, "the chunk is not compressed"
        records = content[start + 9 + 40 : start + 9 + size]
        body = content[:start] + records + content[start + 9 + size : summary]
    footer = b"\x02" + struct.pack("<QQQI", 20, 0, 0, 0)
    file.write_bytes(body + footer + MCAP_MAGIC)
