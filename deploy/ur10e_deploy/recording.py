"""A run as a rosbag2 folder (mcap), with the topics of a cell's recordings, so that it can be trained on and looked at.

    /joint_states                              sensor_msgs/JointState        what came, in the robot's order
    the contract's camera topics               sensor_msgs/Image             what came
    /forward_position_controller/commands      std_msgs/Float64MultiArray    every command, joints in the policy's order
    /runner/not_sent/commands                  the same                      of a dry run: nobody was commanded
    /runner/state/NAME, /runner/command/NAME   std_msgs/Float64              the same of states that are no joints
    /runner/chunk                              std_msgs/Float64MultiArray    number, frame, seconds, late actions
    /runner/event                              std_msgs/String               phases, stops and why

Writing is a thread's work in real time: a disk that pauses must not make a command late.

Knows: messages, topics, the writer's thread.
Must not know: why anything happened.
"""

from __future__ import annotations

import queue
import threading
from collections.abc import Callable, Mapping
from pathlib import Path

import numpy as np
from rosbags.rosbag2 import StoragePlugin, Writer
from rosbags.typesys import Stores, get_typestore

from ur10e import JOINT_NAMES

from .config import RobotContract
from .robot import JointReading, Robot
from .thinking import Answer

COMMAND_TOPIC, NOT_SENT_TOPIC = "/forward_position_controller/commands", "/runner/not_sent/commands"
CHUNK_TOPIC, EVENT_TOPIC = "/runner/chunk", "/runner/event"
STATE_TOPIC, OTHER_COMMAND_TOPIC = "/runner/state/", "/runner/command/"  # and the state's name
JOINT_TYPE, IMAGE_TYPE = "sensor_msgs/msg/JointState", "sensor_msgs/msg/Image"
ARRAY_TYPE, NUMBER_TYPE, TEXT_TYPE = "std_msgs/msg/Float64MultiArray", "std_msgs/msg/Float64", "std_msgs/msg/String"


def recorded_topics(contract: RobotContract) -> dict[str, str]:
    """Camera -> the topic that training read; /camera/NAME/image_raw where the contract does not say."""
    data = contract.data_settings
    named = data.get("camera_topics") or {}
    only = data.get("camera_topic") if len(contract.cameras) == 1 and not named else None
    return {camera: named.get(camera) or only or f"/camera/{camera}/image_raw" for camera in contract.cameras}


def camera_topics(contract: RobotContract) -> dict[str, str]:
    """The same for what is written: whole pictures, which a compressed topic's name must not promise."""
    return {camera: topic.removesuffix("/compressed") for camera, topic in recorded_topics(contract).items()}


class BagRecorder:
    """Writes what the control loop tells (control.Recorder) into a new bag.

    Args:
        folder: of the bag; must not be there yet.
        contract: of the policy, for the topics.
        others: names of the commanded states that are no joints.
        begin_ns: wall clock at the robot's second 0.
        threaded: write in a thread.
        commanding: commands are sent; those of a dry run must not be trained on as if they had been.

    Raises:
        rosbags' WriterError: the folder is there.
    """

    def __init__(
        self,
        folder: Path,
        contract: RobotContract,
        others: tuple[str, ...],
        begin_ns: int,
        threaded: bool,
        commanding: bool,
    ) -> None:
        self._writer = Writer(folder, version=9, storage_plugin=StoragePlugin.MCAP)
        self._writer.open()
        self._store = get_typestore(Stores.ROS2_HUMBLE)
        self._begin_ns, self._others = begin_ns, others
        self._command_topic = COMMAND_TOPIC if commanding else NOT_SENT_TOPIC
        # A forward controller's arrays name nothing: the order is the policy's, as training would read them.
        named = contract.state_names or JOINT_NAMES
        self._policy_order = [j for n in named for j, joint in enumerate(JOINT_NAMES) if n.endswith(joint)]
        self._joint_topic = contract.data_settings.get("joint_topic", "/joint_states")
        self._cameras = camera_topics(contract)
        self._connections: dict[str, object] = {}
        self._stamps: dict[str, float] = {}
        self._problem: Exception | None = None
        self._queue: queue.SimpleQueue[Callable[[], None] | None] = queue.SimpleQueue()
        self._thread = threading.Thread(target=self._work, name="recorder", daemon=True) if threaded else None
        if self._thread:
            self._thread.start()

    def joints(self, reading: JointReading) -> None:
        """A new joint reading."""
        stamp_ns = self._ns(reading.stamp_s)
        fields = dict(
            header=self._header(stamp_ns, "base_link"), name=list(reading.names),
            position=np.array(reading.position_rad, np.float64), velocity=np.zeros(0), effort=np.zeros(0),
        )  # fmt: skip
        self._do(lambda: self._write(self._joint_topic, JOINT_TYPE, stamp_ns, **fields))
        for name, value in dict(reading.others).items():
            self._do(lambda n=name, v=value: self._write(STATE_TOPIC + n, NUMBER_TYPE, stamp_ns, data=float(v)))

    def pictures(self, robot: Robot) -> None:
        """New pictures are there to be taken."""
        self._do(lambda: self._write_pictures(robot.pictures()))

    def command(self, now_s: float, command_rad: np.ndarray) -> None:
        """What was commanded, (J,)."""
        ordered = command_rad[self._policy_order]
        self._do(lambda: self._write_array(self._command_topic, now_s, ordered))
        for name, value in zip(self._others, command_rad[6:].tolist(), strict=True):
            self._do(lambda n=name, v=value: self._write(OTHER_COMMAND_TOPIC + n, NUMBER_TYPE, self._ns(now_s), data=v))

    def chunk(self, now_s: float, answer: Answer, late: int) -> None:
        """A chunk that came: its number, its frame, how long it took, how many of its actions were late."""
        facts = np.array([answer.number, answer.frame, now_s - answer.asked_s, late], np.float64)
        self._do(lambda: self._write_array(CHUNK_TOPIC, now_s, facts))

    def event(self, now_s: float, text: str) -> None:
        """Something a person would want to know."""
        self._do(lambda: self._write(EVENT_TOPIC, TEXT_TYPE, self._ns(now_s), data=text))

    def close(self) -> str | None:
        """Finish the bag; -> why it is not complete, None when it is. No problem of a disk is one of the arm's."""
        if self._thread:
            self._queue.put(None)
            self._thread.join()
        self._do_now(self._writer.close)
        return f"{type(self._problem).__name__}: {self._problem}" if self._problem else None

    # What it is made of.

    def _do(self, job: Callable[[], None]) -> None:
        if self._thread:
            self._queue.put(job)
        elif self._problem is None:
            self._do_now(job)

    def _do_now(self, job: Callable[[], None]) -> None:
        try:
            job()
        except Exception as problem:  # noqa: BLE001 - close() says it: the arm goes on meanwhile
            self._problem = self._problem or problem

    def _work(self) -> None:
        while (job := self._queue.get()) is not None:
            if self._problem is None:
                self._do_now(job)

    def _write_pictures(self, pictures: Mapping) -> None:
        for camera, picture in pictures.items():
            if camera not in self._cameras or picture.stamp_s <= self._stamps.get(camera, -1.0):
                continue
            self._stamps[camera] = picture.stamp_s
            height, width, _ = picture.rgb.shape
            stamp_ns = self._ns(picture.stamp_s)
            self._write(
                self._cameras[camera], IMAGE_TYPE, stamp_ns, header=self._header(stamp_ns, camera), height=height,
                width=width, encoding="rgb8", is_bigendian=0, step=3 * width,
                data=np.ascontiguousarray(picture.rgb).reshape(-1),
            )  # fmt: skip

    def _write_array(self, topic: str, now_s: float, values: np.ndarray) -> None:
        layout = self._store.types["std_msgs/msg/MultiArrayLayout"](dim=[], data_offset=0)
        self._write(topic, ARRAY_TYPE, self._ns(now_s), layout=layout, data=np.array(values, np.float64))

    def _write(self, topic: str, msgtype: str, time_ns: int, **fields: object) -> None:
        if topic not in self._connections:
            self._connections[topic] = self._writer.add_connection(topic, msgtype, typestore=self._store)
        message = self._store.types[msgtype](**fields)  # ty: ignore[invalid-argument-type]
        connection: object = self._connections[topic]
        self._writer.write(connection, time_ns, self._store.serialize_cdr(message, msgtype))  # ty: ignore[invalid-argument-type]

    def _ns(self, time_s: float) -> int:
        return self._begin_ns + round(time_s * 1e9)

    def _header(self, stamp_ns: int, frame_id: str) -> object:
        types = self._store.types
        return types["std_msgs/msg/Header"](
            stamp=types["builtin_interfaces/msg/Time"](*divmod(stamp_ns, 10**9)), frame_id=frame_id
        )
