"""A UR10e behind ROS 2: UR's driver and the cell's cameras, through rclpy.

    joint states and pictures    the topics that training read, by the checkpoint; best effort, the newest alone
    commands                     std_msgs/Float64MultiArray to /forward_position_controller/commands, or to a trajectory
                                 controller a JointTrajectory of one point, a period away; reliable
    status                       what UR's driver publishes and serves; what of it is not there, is said

Best effort takes whatever a driver offers, reliable or not, and never waits for a picture that was lost. Commands are
reliable, as the controllers ask for by the system's default.

Everything that arrives is taken by an executor in a thread of its own; the control loop and the policy look at the
newest of it. Pictures are decoded where they are looked at.

In lock step (Ros2Options.lock_step) the other side is `sim.ros2_arm --lock-step`, and two more topics carry the time:

    /lock_step/until    Float64MultiArray [number, s, n]    move on to s, after n commands of mine have come
    /lock_step/now      Float64MultiArray [number, s, joints' header s, their arrival s, picture's header s, arrival s]

Knows: topics, messages and services, rclpy, which is imported when such a robot is opened.
Must not know: policies, the control loop.
"""

from __future__ import annotations

import math
import os
import statistics
import sys
import threading
import time
from collections import deque
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, fields
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np

from rosbag_dataset import COMPRESSED_TYPE, IMAGE_TYPE, BagError, read_image
from ur10e import JOINT_NAMES

from .config import PolicyError, RobotContract, read_options_file
from .recording import recorded_topics
from .robot import JointReading, Picture, RobotOptions, Status, WallClock

# What UR's driver calls its things (ur_robot_driver/config/ur_controllers.yaml). It publishes the program's state and
# the modes when they change, kept for who comes later (transient local), and the speed scaling, in percent, at 100 Hz.
STATUS = "/io_and_status_controller"
PROGRAM, SAFETY, MODE = f"{STATUS}/robot_program_running", f"{STATUS}/safety_mode", f"{STATUS}/robot_mode"
SCALING = "/speed_scaling_state_broadcaster/speed_scaling"
HAND_BACK = f"{STATUS}/hand_back_control"  # the robot's program stops the arm (stopj) and ends
LIST_CONTROLLERS = "/controller_manager/list_controllers"
UNTIL, NOW = "/lock_step/until", "/lock_step/now"

DISCOVERY_S = 10.0  # nodes find each other within a second or so
ANSWER_S = 5.0  # of a service
SETTLE_S = 2.0  # for what may be there
WATCH_S, ASK_S = 0.1, 0.5  # how often the graph of nodes is looked at, and the controller manager asked
SCALING_AGE_S = 1.0  # a hundred that did not come
ACTIVE_AGE_S = 2.0  # of the controller manager's answer: four that did not come
LOCK_STEP_S = 60.0  # for one answer of the simulator
JOINTS = "joint states"


@dataclass(frozen=True)
class Ros2Options:
    """What a file for `--ros2 FILE` may say, in YAML; all of it may be left out.

    Attributes:
        controller: takes commands; its kind follows from its name, which ends with position_controller or
            trajectory_controller (scaled_joint_trajectory_controller where the driver still has it).
        joints: the order of its positions, where its parameter `joints` cannot be asked for.
        joint_topic, camera_topics: instead of those that training read.
        joint_publishers: how many nodes publish joint_topic; a gripper's driver may be the second one.
        lock_step: see the head of this file.
    """

    controller: str = "forward_position_controller"
    joints: tuple[str, ...] = ()
    joint_topic: str = ""
    camera_topics: Mapping[str, str] = field(default_factory=dict)
    joint_publishers: int = 1
    lock_step: bool = False

    @property
    def trajectory(self) -> bool:
        """Whether commands are JointTrajectory."""
        return self.controller.endswith("trajectory_controller")

    @property
    def command_topic(self) -> str:
        """Where commands go."""
        return f"/{self.controller}/{'joint_trajectory' if self.trajectory else 'commands'}"


def read_options(path: Path | None) -> Ros2Options:
    """The options, with what a YAML file says.

    Raises:
        PolicyError: it cannot be read, or has a key or a value that cannot be.
    """
    if path is None:
        return Ros2Options()
    content = read_options_file("--ros2", path, [f.name for f in fields(Ros2Options)])

    def is_names(value: Any) -> bool:
        return isinstance(value, list) and bool(order_of(value))

    expected: dict[str, tuple[Callable[[Any], bool], str]] = {
        "controller": (
            lambda v: isinstance(v, str) and v.endswith(("position_controller", "trajectory_controller")),
            "a name that ends with position_controller or trajectory_controller",
        ),
        "joints": (is_names, f"a list of {', '.join(JOINT_NAMES)} in any order, with any prefix"),
        "joint_topic": (_is_topic, "a topic, /joint_states for example"),
        "camera_topics": (lambda v: isinstance(v, dict) and all(map(_is_topic, v.values())), "camera: topic"),
        "joint_publishers": (lambda v: type(v) is int and v > 0, "1 or more"),
        "lock_step": (lambda v: isinstance(v, bool), "true or false"),
    }
    for name, value in content.items():
        fits, words = expected[name]
        if not fits(value):
            raise PolicyError(f"--ros2 {path}: {name} is {value!r}; expected {words}")
    values: dict[str, Any] = content | {"joints": tuple(content.get("joints", ()))}
    return Ros2Options(**values)


def _is_topic(value: Any) -> bool:
    return isinstance(value, str) and value.startswith("/")


def order_of(names: Any) -> list[int]:
    """Which of JOINT_NAMES each of a controller's joints is; [] when they are not these six, once each."""
    found = [j for name in names for j, joint in enumerate(JOINT_NAMES) if str(name).endswith(joint)]
    return found if sorted(found) == list(range(6)) and len(names) == 6 else []


class LockStepClock:
    """The simulator's seconds: they pass when somebody waits."""

    lock_step = True

    def __init__(self, move_on: Callable[[float], None]) -> None:
        self._move_on = move_on
        self.time_s = 0.0

    def now_s(self) -> float:
        """The time now."""
        return self.time_s

    def wait_until(self, time_s: float) -> None:
        """Let the simulator move on to time_s; at once when that is past."""
        if time_s > self.time_s + 1e-9:
            self._move_on(time_s)


class Ros2Robot:
    """The arm that a UR driver publishes, as robot.Robot.

    Args:
        ros: what import_ros() found.
        options: of any robot; `extra` has "contract" (RobotContract) and "commanding" (bool).
        how: of this one.

    Raises:
        PolicyError: a topic is published by nobody, or is of a type that is not read, or the policy has states that are
            no joints.
    """

    cameras_are_noisy = True

    def __init__(self, ros: SimpleNamespace, options: RobotOptions, how: Ros2Options) -> None:
        self._ros, self._how, self._options = ros, how, options
        self._contract: RobotContract = options.extra["contract"]
        self._commanding: bool = options.extra["commanding"]
        if options.others:
            raise PolicyError(
                f"--robot ros2: the policy has states that are no joints ({', '.join(options.others)}), which are "
                "neither read nor commanded over ROS 2 yet; use a policy of joints and cameras alone"
            )
        self._clock_of_training = self._contract.data_settings.get("time_source", "receive")
        self._joint_topic = how.joint_topic or self._contract.data_settings.get("joint_topic", "/joint_states")
        self._camera_topics = recorded_topics(self._contract) | dict(how.camera_topics)
        if unknown := sorted(set(self._camera_topics) - set(options.cameras)):
            raise PolicyError(
                f"--ros2: camera_topics of {', '.join(unknown)}; the policy sees {', '.join(options.cameras)}"
            )
        # What arrived: source -> (when, message). In lock step it is first received, and arrives with /lock_step/now.
        self._arrived: dict[str, tuple[float, Any]] = {}
        self._received: dict[str, Any] = {}
        self._said: dict[str, tuple[float, Any]] = {}  # status topic -> (when, what)
        self._watched: set[str] = set()
        self._graph_troubles: tuple[str, ...] = ()
        self._broken: tuple[str, ...] = ()
        self._active: tuple[float, bool] = (-math.inf, False)  # when the controller manager answered, and what
        self._older_s: dict[str, deque[float]] = {camera: deque(maxlen=200) for camera in self._camera_topics}
        self._decoded: dict[str, Picture] = {}
        self._decoding, self._changed = threading.Lock(), threading.Condition()
        self._told: list[float] = []
        self._asked = self._sent = 0
        self._halted = False
        self._handed_back: Any = None  # answers that are waited for
        self._question: Any = None
        self._publisher: Any = None  # of commands; none where nothing is commanded
        self._order: list[int] = []  # of the controller's joints, known after check()
        self._names: list[str] = []
        self._controller_client: Any = None  # none without controller_manager_msgs
        self.clock = LockStepClock(self._move_on) if how.lock_step else WallClock()

        self._context = ros.Context()
        ros.rclpy.init(context=self._context)  # of our own: no handler of signals is changed
        self._node = ros.rclpy.create_node("ur10e_runner", context=self._context, start_parameter_services=False)
        self._executor = ros.SingleThreadedExecutor(context=self._context)
        self._thread = threading.Thread(target=self._spin, name="ros2", daemon=True)
        try:
            self._connect()
        except BaseException:
            self.close()
            raise

    # -- what the control loop asks

    def joints(self) -> JointReading | None:
        """The last reading; None before the first."""
        if (found := self._arrived.get(JOINTS)) is None:
            return None
        stamp_s, message = found
        return JointReading(stamp_s, tuple(message.name), np.array(message.position, np.float64))

    def picture_stamps(self) -> Mapping[str, float]:
        """Camera -> when its last picture arrived."""
        return {camera: self._arrived[camera][0] for camera in self._camera_topics if camera in self._arrived}

    def pictures(self) -> Mapping[str, Picture]:
        """Camera -> its last picture.

        Raises:
            PolicyError: it does not decode.
        """
        with self._decoding:
            for camera, topic in self._camera_topics.items():
                if camera not in self._arrived:
                    continue
                stamp_s, message = self._arrived[camera]
                if camera not in self._decoded or self._decoded[camera].stamp_s != stamp_s:
                    self._decoded[camera] = Picture(stamp_s, self._rgb(topic, message))
            return dict(self._decoded)

    def status(self) -> Status:
        """What the driver says, as far as it is watched."""
        now_s, further = self.clock.now_s(), [*self._graph_troubles, *self._broken]
        scaling = 1.0
        if SCALING in self._watched:
            at_s, percent = self._said.get(SCALING, (-math.inf, 100.0))
            scaling = percent / 100
            if now_s - at_s > SCALING_AGE_S:
                further.append(f"{SCALING}: the last is {now_s - at_s:.2f} s old, expected {SCALING_AGE_S:g} s at most")
        protective = emergency = False
        if SAFETY in self._watched:
            modes, safety = self._ros.SafetyMode, self._value(SAFETY)
            protective = safety == modes.PROTECTIVE_STOP
            emergency = safety in (modes.SYSTEM_EMERGENCY_STOP, modes.ROBOT_EMERGENCY_STOP)
            if not protective and not emergency and safety not in (modes.NORMAL, modes.REDUCED):
                further.append(f"safety mode {safety}, expected normal or reduced (ur_dashboard_msgs/SafetyMode)")
        if MODE in self._watched and (mode := self._value(MODE)) != self._ros.RobotMode.RUNNING:
            further.append(f"robot mode {mode}, expected running (ur_dashboard_msgs/RobotMode)")
        active = True
        if LIST_CONTROLLERS in self._watched:
            at_s, active = self._active
            if now_s - at_s > ACTIVE_AGE_S:
                further.append(f"{LIST_CONTROLLERS} has not answered for {ACTIVE_AGE_S:g} s")
        return Status(
            controller_active=active,
            speed_scaling=scaling,
            protective_stop=protective,
            emergency_stop=emergency,
            program_running=PROGRAM not in self._watched or bool(self._value(PROGRAM)),
            further=tuple(further),
        )

    def check(self) -> list[str]:
        """What is watched from now on, and what is not.

        Raises:
            PolicyError: nobody takes commands, or in an unknown order; or pictures are older than in training.
        """
        notes = []
        for topic, what, there in (
            (PROGRAM, "whether the robot's program runs", True),
            (SCALING, "speed scaling", True),
            (SAFETY, "safety mode (protective and emergency stop)", self._ros.SafetyMode is not None),
            (MODE, "robot mode", self._ros.RobotMode is not None),
        ):
            if there and self._node.count_publishers(topic):
                self._watched.add(topic)
            else:
                why = f"nobody publishes {topic}" if there else "ur_dashboard_msgs cannot be imported"
                notes.append(f"not watched: {what}: {why}")
        if self._controller_client is not None and self._controller_client.service_is_ready():
            self._watched.add(LIST_CONTROLLERS)
            self._ask_for_controllers()
            self._wait_for(self._question)
        else:
            why = (
                "controller_manager_msgs cannot be imported"
                if self._controller_client is None
                else f"nobody serves {LIST_CONTROLLERS}"
            )
            notes.append(f"not watched: whether {self._how.controller} is active: {why}")
        if not self._hand_back.service_is_ready():
            notes.append(
                f"nobody serves {HAND_BACK}: a halt stops commanding alone; the arm goes to its last command and "
                "stands, and after a protective stop that is released it goes there again"
            )
        if self._publisher is not None:
            notes += self._check_controller()
        self._check_ages()
        self._look_at_the_graph()
        return notes

    def command(self, position_rad: np.ndarray, others: Mapping[str, float]) -> None:
        """Where to be one period from now. Raises ValueError for what is not six finite numbers."""
        position_rad = np.asarray(position_rad, np.float64)
        if position_rad.shape != (6,) or not np.isfinite(position_rad).all() or others:
            raise ValueError(f"command {position_rad}, {dict(others)}: expected six finite joint positions in rad")
        if self._halted or not self._order:
            raise RuntimeError("a command to a robot that was halted, is only looked at, or was not checked")
        self._publisher.publish(self._message(position_rad[self._order].tolist()))
        self._sent += 1

    def halt(self) -> None:
        """Command nothing any more, and have the robot's program stop the arm and end.

        So the controller's last command, which it goes on sending, is followed by nobody, whatever is released later.
        """
        self._halted = True
        if self._commanding and self._hand_back.service_is_ready():
            self._handed_back = self._hand_back.call_async(self._ros.Trigger.Request())
            self._handed_back.add_done_callback(self._say_handed_back)

    def close(self) -> None:
        """Let go of it; a halt that is under way is waited for."""
        deadline_s = time.monotonic() + ANSWER_S / 2
        while self._handed_back is not None and not self._handed_back.done() and time.monotonic() < deadline_s:
            time.sleep(0.01)
        self._executor.shutdown(timeout_sec=0)
        if self._thread.ident is not None:
            self._thread.join(ANSWER_S)
        self._node.destroy_node()
        self._context.try_shutdown()

    # -- how it is connected

    def _connect(self) -> None:
        """Find the topics, listen, and spin."""
        ros, node, how = self._ros, self._node, self._how
        newest = ros.QoSProfile(
            depth=100 if how.lock_step else 1,
            reliability=ros.Reliability.RELIABLE if how.lock_step else ros.Reliability.BEST_EFFORT,
        )
        kept = ros.QoSProfile(depth=1, durability=ros.Durability.TRANSIENT_LOCAL)  # reliable, as the driver's
        self._find("joint states", self._joint_topic, {"sensor_msgs/msg/JointState"})
        node.create_subscription(ros.JointState, self._joint_topic, self._on_joints, newest)
        self._picture_types = {}
        for camera, topic in self._camera_topics.items():
            kind = self._find(f"camera {camera}", topic, {IMAGE_TYPE, COMPRESSED_TYPE})
            self._picture_types[topic] = kind
            message_type = ros.Image if kind == IMAGE_TYPE else ros.CompressedImage
            node.create_subscription(message_type, topic, self._on_picture(camera), newest)
        node.create_subscription(ros.Bool, PROGRAM, self._on_status(PROGRAM, "data"), kept)
        node.create_subscription(ros.Float64, SCALING, self._on_status(SCALING, "data"), newest)
        for topic, message_type in ((SAFETY, ros.SafetyMode), (MODE, ros.RobotMode)):
            if message_type is not None:
                node.create_subscription(message_type, topic, self._on_status(topic, "mode"), kept)
        self._hand_back = node.create_client(ros.Trigger, HAND_BACK)
        self._parameters = node.create_client(ros.GetParameters, f"/{how.controller}/get_parameters")
        if ros.ListControllers is not None:
            self._controller_client = node.create_client(ros.ListControllers, LIST_CONTROLLERS)
        reliable = ros.QoSProfile(depth=100 if how.lock_step else 10)
        if self._commanding:
            message_type = ros.JointTrajectory if how.trajectory else ros.Float64MultiArray
            self._publisher = node.create_publisher(message_type, how.command_topic, reliable)
        if how.lock_step:
            self._until = node.create_publisher(ros.Float64MultiArray, UNTIL, reliable)
            node.create_subscription(ros.Float64MultiArray, NOW, self._on_now, reliable)
        node.create_timer(WATCH_S, self._look_at_the_graph)
        node.create_timer(ASK_S, self._ask_for_controllers)
        self._executor.add_node(node)
        self._thread.start()
        if how.lock_step:
            self._meet_the_simulator()
        self._settle()

    def _settle(self) -> None:
        """Give what may be there a moment to be found; all of it is, beside UR's driver, at once."""
        deadline_s = time.monotonic() + SETTLE_S
        while time.monotonic() < deadline_s:
            count = self._node.count_publishers
            found = count(PROGRAM) and count(SCALING) and self._said.keys() >= {PROGRAM, SCALING}
            takes = self._publisher is None or (
                self._publisher.get_subscription_count() and self._parameters.service_is_ready()
            )
            if found and takes and self._hand_back.service_is_ready():
                return
            time.sleep(0.02)

    def _wait_for(self, answer: Any) -> Any:
        """A service's answer; None when it does not come in time."""
        deadline_s = time.monotonic() + ANSWER_S
        while not answer.done() and time.monotonic() < deadline_s:
            time.sleep(0.01)
        return answer.result() if answer.done() else None

    def _value(self, topic: str) -> Any:
        """What a status topic said last; None before."""
        return self._said[topic][1] if topic in self._said else None

    def _spin(self) -> None:
        try:
            self._executor.spin()
        except Exception as error:  # noqa: BLE001 - nothing arrives any more, and the control loop must know why
            if not self._context.ok():
                return
            self._broken = (f"ROS 2 ended in this program: {type(error).__name__}: {error}",)

    def _find(self, what: str, topic: str, allowed: set[str]) -> str:
        """The type of a topic that somebody publishes."""
        deadline_s = time.monotonic() + DISCOVERY_S
        while not (types := {info.topic_type for info in self._node.get_publishers_info_by_topic(topic)}):
            if time.monotonic() > deadline_s:
                there = sorted(t for t, kinds in self._node.get_topic_names_and_types() if allowed & set(kinds))
                raise PolicyError(
                    f"{what}: nobody publishes {topic} (within {DISCOVERY_S:g} s); there are "
                    f"{', '.join(there) or 'no topics of its type'}; start its driver, in the same ROS_DOMAIN_ID "
                    f"(here {os.environ.get('ROS_DOMAIN_ID', '0')}), or name another topic with --ros2"
                )
            time.sleep(0.05)
        if len(types) > 1 or not types <= allowed:
            raise PolicyError(f"{what}: {topic} is {' and '.join(sorted(types))}; expected {' or '.join(allowed)}")
        return types.pop()

    def _check_controller(self) -> list[str]:
        """Whether somebody takes the commands, and in which order; -> notes."""
        how, notes = self._how, []
        if not self._publisher.get_subscription_count():
            raise PolicyError(
                f"nobody listens to {how.command_topic}; load and activate {how.controller}, or name another "
                "controller with --ros2"
            )
        said: tuple[str, ...] = ()
        if self._parameters.service_is_ready():
            answer = self._wait_for(self._parameters.call_async(self._ros.GetParameters.Request(names=["joints"])))
            if answer is not None and answer.values:
                said = tuple(answer.values[0].string_array_value)
        if said and how.joints and said != how.joints:
            raise PolicyError(f"--ros2: joints are {', '.join(how.joints)}; {how.controller} has {', '.join(said)}")
        if said and not order_of(said):
            raise PolicyError(f"{how.controller} has the joints {', '.join(said)}; expected {', '.join(JOINT_NAMES)}")
        if not said and not how.joints:
            raise PolicyError(
                f"{how.controller} does not tell its parameter `joints`, and so in which order it takes positions; "
                "say joints in the file of --ros2"
            )
        if not said:
            notes.append(f"not watched: the order of {how.controller}'s joints: taken from --ros2, it does not tell it")
        self._names = list(said or how.joints)
        self._order = order_of(self._names)
        return notes

    # -- what arrives, in the executor's thread

    def _on_joints(self, message: Any) -> None:
        if any(name.endswith(JOINT_NAMES) for name in message.name):  # else it is a gripper's, on the same topic
            self._arrive(JOINTS, message)

    def _on_picture(self, camera: str) -> Callable[[Any], None]:
        def arrive(message: Any) -> None:
            joints = self._arrived.get(JOINTS)
            if joints is not None:
                self._older_s[camera].append(_header_s(joints[1]) - _header_s(message))
            self._arrive(camera, message)

        return arrive

    def _on_status(self, topic: str, name: str) -> Callable[[Any], None]:
        def arrive(message: Any) -> None:
            self._said[topic] = (self.clock.now_s(), getattr(message, name))

        return arrive

    def _arrive(self, source: str, message: Any) -> None:
        if not self._how.lock_step:
            self._arrived[source] = (self.clock.now_s(), message)
            return
        with self._changed:
            self._received[source] = message
            self._changed.notify_all()

    def _look_at_the_graph(self) -> None:
        """Who publishes: ten times a second, whatever the control loop does."""
        count, how, found = self._node.count_publishers, self._how, []
        if (publishers := count(self._joint_topic)) > how.joint_publishers:
            found.append(
                f"{publishers} nodes publish {self._joint_topic}, expected {how.joint_publishers}: which of them is "
                "the arm is not known (--ros2: joint_publishers)"
            )
        if self._publisher is not None and count(how.command_topic) > 1:
            found.append(f"somebody else publishes {how.command_topic}: two programs command the arm")
        found += [
            f"nobody publishes {topic} any more"
            for topic in sorted(self._watched - {LIST_CONTROLLERS})
            if not count(topic)
        ]
        self._graph_troubles = tuple(found)

    def _ask_for_controllers(self) -> None:
        """Whether the controller is active; one question at a time."""
        if LIST_CONTROLLERS not in self._watched or (self._question is not None and not self._question.done()):
            return

        def answered(future: Any) -> None:
            states = {controller.name: controller.state for controller in future.result().controller}
            self._active = (self.clock.now_s(), states.get(self._how.controller) == "active")

        self._question = self._controller_client.call_async(self._ros.ListControllers.Request())
        self._question.add_done_callback(answered)

    def _say_handed_back(self, future: Any) -> None:
        answer = future.result()
        if not answer.success:
            self._node.get_logger().error(f"{HAND_BACK} was refused: {answer.message}; press the emergency stop")

    # -- messages

    def _message(self, ordered: list[float]) -> Any:
        ros = self._ros
        if not self._how.trajectory:
            return ros.Float64MultiArray(data=ordered)
        seconds, nanoseconds = divmod(round(1e9 / self._options.command_hz), 10**9)
        point = ros.JointTrajectoryPoint(
            positions=ordered, time_from_start=ros.Duration(sec=seconds, nanosec=nanoseconds)
        )
        return ros.JointTrajectory(joint_names=self._names, points=[point])  # no stamp: from now on

    def _rgb(self, topic: str, message: Any) -> np.ndarray:
        """(H, W, 3) uint8 of a message."""
        values = {
            name: getattr(message, name)
            for name in ("height", "width", "encoding", "is_bigendian", "step", "format")
            if hasattr(message, name)
        }
        plain = SimpleNamespace(**values, data=np.frombuffer(message.data, np.uint8))
        try:
            rgb, _ = read_image(plain, self._picture_types[topic], None, topic, True)
        except BagError as error:
            raise PolicyError(str(error)) from None
        assert rgb is not None
        return rgb

    def _check_ages(self) -> None:
        """Policies that were trained by header stamps saw pictures paired by them; so the newest must be as young."""
        if self._clock_of_training != "header" or self._contract.fps is None:
            return
        for camera, older_s in self._older_s.items():
            trained = self._contract.image_age_s.get(camera, {}).get("most")
            if not older_s or trained is None:
                continue
            for source, topic in ((JOINTS, self._joint_topic), (camera, self._camera_topics[camera])):
                if _header_s(self._arrived[source][1]) <= 0:
                    raise PolicyError(f"{topic}: header.stamp was never set; training paired messages by it")
            here_s, most_s = statistics.median(older_s), trained + 1 / self._contract.fps
            if here_s > most_s:
                raise PolicyError(
                    f"camera {camera}: by header stamps its pictures are {here_s:.3f} s older than the joint states "
                    f"when they arrive, in training {trained:.3f} s at most, expected {most_s:.3f} s: a policy gets "
                    "what arrived last; make the camera faster, or train with data.time_source: receive"
                )

    # -- lock step

    def _on_now(self, message: Any) -> None:
        with self._changed:
            self._told = list(message.data)
            self._changed.notify_all()

    def _meet_the_simulator(self) -> None:
        """Until it has answered, and its joints and pictures have come: a topic's first messages may be lost."""
        deadline_s = time.monotonic() + LOCK_STEP_S
        while not self._ask_the_simulator(0.0, 0.3):
            if time.monotonic() > deadline_s:
                raise PolicyError(f"--ros2: lock_step: nobody answers on {NOW}; start sim.ros2_arm with --lock-step")

    def _move_on(self, time_s: float) -> None:
        if not self._ask_the_simulator(time_s, LOCK_STEP_S):
            raise PolicyError(f"the simulator has not come to {time_s:.3f} s within {LOCK_STEP_S:g} s")

    def _ask_the_simulator(self, time_s: float, timeout_s: float) -> bool:
        """Whether all that the simulator tells of has come."""
        self._asked += 1
        question = [float(self._asked), time_s, float(self._sent)]
        self._until.publish(self._ros.Float64MultiArray(data=question))

        def there() -> bool:
            if not self._told or self._told[0] != self._asked:
                return False
            stamps = dict(zip((JOINTS, *self._camera_topics), self._told[2::2], strict=False))
            return all(
                math.isnan(stamp_s) or (s in self._received and abs(_header_s(self._received[s]) - stamp_s) < 1e-7)
                for s, stamp_s in stamps.items()
            )

        with self._changed:
            if not self._changed.wait_for(there, timeout_s):
                return False
            assert isinstance(self.clock, LockStepClock)
            self.clock.time_s = self._told[1]
            for source, arrival_s in zip((JOINTS, *self._camera_topics), self._told[3::2], strict=False):
                if not math.isnan(arrival_s):
                    self._arrived[source] = (arrival_s, self._received[source])
        return True


def _header_s(message: Any) -> float:
    return message.header.stamp.sec + 1e-9 * message.header.stamp.nanosec


def import_ros() -> SimpleNamespace:
    """rclpy and all messages that are needed; of those that only UR's driver and ros2_control bring, None if missing.

    Raises:
        PolicyError: rclpy or a message of ROS 2's own cannot be imported.
    """
    try:
        import rclpy  # ty: ignore[import-not-found]
        from builtin_interfaces.msg import Duration  # ty: ignore[import-not-found]
        from rcl_interfaces.srv import GetParameters  # ty: ignore[import-not-found]
        from rclpy.context import Context  # ty: ignore[import-not-found]
        from rclpy.executors import SingleThreadedExecutor  # ty: ignore[import-not-found]
        from rclpy.qos import DurabilityPolicy, QoSProfile, ReliabilityPolicy  # ty: ignore[import-not-found]
        from sensor_msgs.msg import CompressedImage, Image, JointState  # ty: ignore[import-not-found]
        from std_msgs.msg import Bool, Float64, Float64MultiArray  # ty: ignore[import-not-found]
        from std_srvs.srv import Trigger  # ty: ignore[import-not-found]
        from trajectory_msgs.msg import JointTrajectory, JointTrajectoryPoint  # ty: ignore[import-not-found]
    except ImportError as error:
        raise PolicyError(
            f"--robot ros2: {error.name or 'rclpy'} cannot be imported by this Python "
            f"({sys.version_info[0]}.{sys.version_info[1]}): {str(error).splitlines()[0]}; source ROS 2 in this shell "
            "(source /opt/ros/DISTRO/setup.bash), whose Python must be of the same version"
        ) from None
    try:
        from ur_dashboard_msgs.msg import RobotMode, SafetyMode  # ty: ignore[import-not-found]
    except ImportError:
        RobotMode = SafetyMode = None
    try:
        from controller_manager_msgs.srv import ListControllers  # ty: ignore[import-not-found]
    except ImportError:
        ListControllers = None
    return SimpleNamespace(
        rclpy=rclpy, Context=Context, SingleThreadedExecutor=SingleThreadedExecutor, QoSProfile=QoSProfile,
        Reliability=ReliabilityPolicy, Durability=DurabilityPolicy, JointState=JointState, Image=Image,
        CompressedImage=CompressedImage, Bool=Bool, Float64=Float64, Float64MultiArray=Float64MultiArray,
        JointTrajectory=JointTrajectory, JointTrajectoryPoint=JointTrajectoryPoint, Duration=Duration, Trigger=Trigger,
        GetParameters=GetParameters, SafetyMode=SafetyMode, RobotMode=RobotMode,
        ListControllers=ListControllers,
    )  # fmt: skip


def open_robot(options: RobotOptions) -> Ros2Robot:
    """`--robot ros2`; RobotOptions.extra has "contract", "commanding" and "ros2", the file or None.

    Raises:
        PolicyError: rclpy is not there, the file is wrong, or as Ros2Robot.
    """
    how = read_options(options.extra.get("ros2"))
    return Ros2Robot(import_ros(), options, how)
