"""The simulated cell as a UR10e on ROS 2, as UR's driver and a camera's would show it, with faults on demand.

    python -m sim.ros2_arm --seed 1000 --log /tmp/arm                                 # by the wall clock
    python -m sim.ros2_arm --seed 1000 --log /tmp/arm --lock-step                     # waits for the commands
    python -m sim.ros2_arm --fault "0:camera:1.1" --fault "1:joints:1.1:1.6"          # of scene 0 and scene 1

It needs rclpy: a sourced ROS 2, or the wheels that `make .ros2/installed` brings (python -m tests.ros2 COMMAND).

    /joint_states                                          sensor_msgs/JointState at 500 Hz, in the driver's order
    /camera/color/image_raw                                sensor_msgs/Image at 30 Hz, --delay-s after it was taken;
                                                           CompressedImage if --camera-topic ends with /compressed
    /forward_position_controller/commands                  obeyed: held until the next one comes, as the driver does
    /joint_trajectory_controller/joint_trajectory          obeyed: on a straight line to the first point, in its time
    /speed_scaling_state_broadcaster/speed_scaling         percent, at 100 Hz; 0 while the robot is stopped
    /io_and_status_controller/robot_program_running        when it changes, kept for who comes later
    /io_and_status_controller/hand_back_control            a service: the program stops the arm and ends
    /sim/next_scene                                        a service: the next scene begins; answers how this one ended

The arm follows with a lag (--lag-s) behind what the controller holds. A controller forgets nothing: who is killed
leaves a last command behind, and an arm that is released from a protective stop goes on to it, unless the program was
ended meanwhile. So UR's driver was read (hardware_interface.cpp: write()); none of it was measured on a UR10e.

Faults: KIND:FROM[:TO], s after the arm was first commanded to move. KIND is one of sim.faults' (camera, joints, held,
protective stop, program, speed scaling), `joint publisher` or `commander`: a second publisher of the joint states or of
the commands.

In lock step, the world moves on only when somebody asks on /lock_step/until (ur10e_deploy/ros2_robot.py); of what it
publishes meanwhile only the newest is sent, reliably, with simulated times as stamps.

--log FOLDER gets scene_000.npz, ...: command_s (N,), command_rad (N, 6) as they came; path_rad (T, 6), where the arm
was, one row every 1 / path_hz s from time 0 on; moved_s, when it was first commanded to move; success.

Knows: worlds, faults and how an arm brakes, rclpy.
Must not know: policies, the control loop.
"""

import argparse
import json
import os
import signal
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import cv2
import numpy as np
import rclpy
from rclpy.executors import SingleThreadedExecutor
from rclpy.qos import DurabilityPolicy, QoSProfile, ReliabilityPolicy
from rclpy.signals import SignalHandlerOptions
from sensor_msgs.msg import CompressedImage, Image, JointState
from std_msgs.msg import Bool, Float64, Float64MultiArray
from std_srvs.srv import Trigger
from trajectory_msgs.msg import JointTrajectory

from sim.faults import (
    CAMERA,
    CONTROLLER,
    EMERGENCY,
    FAULTS,
    HELD,
    JOINTS,
    PROGRAM,
    PROTECTIVE,
    SLOWED,
    Fault,
    braked,
    faulty,
)
from sim.world import IMAGE_AGE_S, Conditions, World
from ur10e import DRIVER_FROM_CANONICAL, DRIVER_JOINT_NAMES, JOINT_NAMES

HZ, CAMERA_HZ, SCALING_HZ = 500.0, 30.0, 100.0
LAG_S = 0.03  # servoj's lookahead as UR's driver sets it
FORWARD, TRAJECTORY = "forward_position_controller", "joint_trajectory_controller"
JOINT_PUBLISHER, COMMANDER = "joint publisher", "commander"
JOINT_TOPIC, COMMAND_TOPIC = "/joint_states", f"/{FORWARD}/commands"
MOVED_RAD = 1e-4  # from the first command: the arm is sent somewhere


class Ros2Arm:
    """The arm and its node.

    Args:
        args: of parser().
    """

    def __init__(self, args):
        self._args = args
        self.scene = -1
        self._lock = threading.RLock()
        self._drawing = ThreadPoolExecutor(1)
        self._second = {}
        self._epoch_ns = 0 if args.lock_step else time.time_ns()
        rclpy.init(args=[], signal_handler_options=SignalHandlerOptions.NO)
        self.node = rclpy.create_node("ur10e_simulated", start_parameter_services=False)
        reliable, kept = QoSProfile(depth=100), QoSProfile(depth=1, durability=DurabilityPolicy.TRANSIENT_LOCAL)
        camera = QoSProfile(depth=5, reliability=ReliabilityPolicy.BEST_EFFORT)
        publisher, subscribe = self.node.create_publisher, self.node.create_subscription
        self._joint_states = publisher(JointState, JOINT_TOPIC, reliable)
        self._compressed = args.camera_topic.endswith("/compressed")
        kind = CompressedImage if self._compressed else Image
        self._pictures = publisher(kind, args.camera_topic, reliable if args.lock_step else camera)
        self._scaling = publisher(Float64, "/speed_scaling_state_broadcaster/speed_scaling", reliable)
        self._program_running = publisher(Bool, "/io_and_status_controller/robot_program_running", kept)
        self.node.create_service(Trigger, "/io_and_status_controller/hand_back_control", self._hand_back)
        self.node.create_service(Trigger, "/sim/next_scene", self._next_scene)
        if args.lock_step:
            subscribe(Float64MultiArray, "/lock_step/until", self._on_until, reliable)
            self._now = publisher(Float64MultiArray, "/lock_step/now", reliable)
        self.executor = SingleThreadedExecutor()
        self.executor.add_node(self.node)
        for name, kind, topic, obey in (
            (FORWARD, Float64MultiArray, "commands", self._on_array),
            (TRAJECTORY, JointTrajectory, "joint_trajectory", self._on_trajectory),
        ):
            controller = rclpy.create_node(name)
            controller.declare_parameter("joints", args.joints)
            controller.create_subscription(kind, f"/{name}/{topic}", obey, reliable)
            self.executor.add_node(controller)
        self._begin(0)

    # -- scenes

    def _begin(self, scene):
        args = self._args
        self.scene = scene
        conditions = Conditions(lag_s=args.lag_s)
        self.world = World(
            args.seed, args.episode + scene, args.height, args.width, conditions, args.hz, image_age_s=args.delay_s
        )
        self.faults = []
        self._program, self._program_said = True, None
        self._goal = None  # (from (6,), at s, to (6,), within s): what the controller holds
        self._commands, self._moved_s = [], None
        self._stamp_s = {JOINTS: (np.nan, np.nan), CAMERA: (np.nan, np.nan)}  # of what was sent last: header, arrival
        self._camera_frame, self._scaling_frame = 0, -1
        self._base, self._until = 0, None  # of lock step
        self._began_s = time.perf_counter()
        if not args.lock_step:
            self._epoch_ns = time.time_ns()

    def _next_scene(self, request, response):
        with self._lock:
            outcome = self.world.outcome()
            self._write()
            response.message = json.dumps(
                {"scene": self.scene, "success": outcome.success, "least_m": outcome.least_m,
                 "commands": len(self._commands), "simulated_s": self.world.time_s}
            )  # fmt: skip
            response.success = True
            self._begin(self.scene + 1)
        return response

    def _write(self):
        if self._args.log is None:
            return
        self._args.log.mkdir(parents=True, exist_ok=True)
        file = self._args.log / f"scene_{self.scene:03d}.npz"
        part = file.with_suffix(".part.npz")
        np.savez(
            part, path_rad=np.array(self.world.path_rad), path_hz=self.world.control_hz,
            command_s=np.array([at_s for at_s, _ in self._commands]),
            command_rad=np.array([q for _, q in self._commands]).reshape(-1, 6),
            moved_s=np.nan if self._moved_s is None else self._moved_s, success=self.world.outcome().success,
            program_running=self._program,
        )  # fmt: skip
        part.replace(file)

    # -- what is obeyed

    def _on_array(self, message):
        if len(message.data) == 6:  # else the controller ignores it
            self._command(np.array(message.data)[[self._args.joints.index(name) for name in JOINT_NAMES]], 0.0)

    def _on_trajectory(self, message):
        point, names = message.points[0], list(message.joint_names)
        target = np.array([point.positions[names.index(name)] for name in JOINT_NAMES])
        self._command(target, point.time_from_start.sec + 1e-9 * point.time_from_start.nanosec)

    def _command(self, target_rad, within_s):
        with self._lock:
            now_s = self.world.time_s
            self._commands.append((now_s, target_rad))
            if self._moved_s is None and np.abs(target_rad - self._commands[0][1]).max() > MOVED_RAD:
                self._moved_s = now_s
                for scene, fault in self._args.fault:
                    if scene == self.scene:
                        self.faults.append(Fault(fault.kind, now_s + fault.from_s, now_s + fault.to_s))
            if self._program:  # a controller whose robot runs no program writes nothing, and was stopped
                self._goal = (self._held(now_s), now_s, target_rad, within_s)
            self._move_on_if_due()

    def _held(self, at_s):
        """(6,) what the controller holds at a time; where the arm was sent last before there is a command."""
        if self._goal is None:
            return self.world.command_rad[-1] if self.world.command_rad else self.world.path_rad[-1]
        from_rad, began_s, to_rad, within_s = self._goal
        share = 1.0 if within_s <= 0 else min((at_s - began_s) / within_s, 1.0)
        return from_rad + share * (to_rad - from_rad)

    def _hand_back(self, request, response):
        with self._lock:
            self._program, self._goal = False, None
        response.success = True
        return response

    # -- time

    def _faulty(self, kind):
        return faulty(self.faults, kind, self.world.time_s)

    def tick(self):
        """One period of the driver."""
        world = self.world
        if self._faulty(PROGRAM):
            self._program, self._goal = False, None
        stopped = self._faulty(PROTECTIVE) or self._faulty(EMERGENCY)
        if self._faulty(HELD):
            world.command(world.path_rad[-1])
        elif self._program and not stopped and self._goal is not None:
            world.command(self._held(world.time_s + 1 / world.control_hz))
        else:
            world.command(braked(world))
        self._second_publishers()

    def _second_publishers(self):
        for kind, message, topic in (
            (JOINT_PUBLISHER, JointState, JOINT_TOPIC), (COMMANDER, Float64MultiArray, COMMAND_TOPIC),
        ):  # fmt: skip
            if self._faulty(kind) and kind not in self._second:
                self._second[kind] = self.node.create_publisher(message, topic, 10)
            elif not self._faulty(kind) and kind in self._second:
                self.node.destroy_publisher(self._second.pop(kind))

    def publish(self, everything=False):
        """What is due by now: joint states, a picture, status; with `everything` those that were sent last, again."""
        world, now_s, lock_step = self.world, self.world.time_s, self._args.lock_step
        if not self._faulty(JOINTS) or everything:
            self._publish_joints(now_s if not self._faulty(JOINTS) else self._stamp_s[JOINTS][0])
        frame = int(np.floor(now_s * CAMERA_HZ + 1e-6))
        if (frame > self._camera_frame and not self._faulty(CAMERA)) or (everything and self._camera_frame):
            self._camera_frame = max(frame, self._camera_frame) if not self._faulty(CAMERA) else self._camera_frame
            arrival_s = self._camera_frame / CAMERA_HZ
            header_s = arrival_s - self._args.delay_s
            self._stamp_s[CAMERA] = (header_s, arrival_s)
            if lock_step:
                self._publish_picture(world, header_s, self._camera_frame)
            else:
                self._drawing.submit(self._publish_picture, world, header_s, self._camera_frame)
        stopped = any(map(self._faulty, (PROTECTIVE, EMERGENCY)))
        if self._program != self._program_said:
            self._program_said = self._program
            self._program_running.publish(Bool(data=self._program))
        if (frame := int(now_s * SCALING_HZ)) > self._scaling_frame or everything:
            self._scaling_frame = frame
            self._scaling.publish(Float64(data=0.0 if stopped else 50.0 if self._faulty(SLOWED) else 100.0))

    def _publish_joints(self, at_s):
        message = JointState(name=list(DRIVER_JOINT_NAMES))
        message.position = self.world.path_rad[round(at_s * self.world.control_hz)][DRIVER_FROM_CANONICAL].tolist()
        self._stamp(message.header, at_s, "base_link")
        self._joint_states.publish(message)
        self._stamp_s[JOINTS] = (at_s, at_s)

    def _publish_picture(self, world, header_s, number):
        rgb = world.image(at_s=header_s + world.image_age_s)
        rgb[0, 0] = number % 251  # a camera's noise makes every picture another one; the renderer's would not be
        if self._compressed:
            message, data = (
                CompressedImage(format="rgb8; jpeg compressed bgr8"),
                cv2.imencode(".jpg", rgb[..., ::-1])[1],
            )
        else:
            message, data = Image(height=rgb.shape[0], width=rgb.shape[1], encoding="rgb8", step=3 * rgb.shape[1]), rgb
        message.data.frombytes(data.tobytes())
        self._stamp(message.header, header_s, "camera_color_optical_frame")
        self._pictures.publish(message)

    def _stamp(self, header, at_s, frame_id):
        header.stamp.sec, header.stamp.nanosec = divmod(max(self._epoch_ns + round(at_s * 1e9), 0), 10**9)
        header.frame_id = frame_id

    # -- lock step

    def _on_until(self, message):
        with self._lock:
            self._until = message.data
            if self._until[2] == 0:  # a runner that has commanded nothing yet: it counts from here
                self._base = len(self._commands)
            self._move_on_if_due()

    def _move_on_if_due(self):
        """Move on as far as was asked for, when all commands that were sent before have come."""
        if self._until is None or len(self._commands) - self._base < self._until[2]:
            return
        (number, until_s, _), self._until = self._until, None
        again = until_s <= self.world.time_s
        while self.world.time_s + 0.5 / self.world.control_hz < until_s:
            self.tick()
        self.publish(everything=again)
        stamps = [*self._stamp_s[JOINTS], *self._stamp_s[CAMERA]]
        self._now.publish(Float64MultiArray(data=[number, self.world.time_s, *stamps]))

    # -- running

    def run(self, ended):
        """Until `ended` (threading.Event) is set; then the log is written."""
        spinning = threading.Thread(target=self._spin, daemon=True)
        spinning.start()
        if self._args.lock_step:
            print("ready", flush=True)
            ended.wait()
        else:
            self._run_real_time(ended)
        with self._lock:
            self._write()
        self.executor.shutdown(timeout_sec=0)
        spinning.join(2)
        self._drawing.shutdown()
        rclpy.shutdown()

    def _run_real_time(self, ended):
        said = False
        while not ended.is_set():
            with self._lock:
                due_s = self._began_s + self.world.time_s + 1 / self.world.control_hz
                if (left_s := due_s - time.perf_counter()) <= 0:
                    self.tick()
                    self.publish()
                    left_s = 0.0
            if not said and self._camera_frame > 0:
                said = True
                print("ready", flush=True)
            time.sleep(max(left_s, 0.0))

    def _spin(self):
        try:
            self.executor.spin()
        except Exception:
            if rclpy.ok():
                raise


def read_fault(text):
    """SCENE:KIND:FROM[:TO] -> (scene, Fault). Raises argparse.ArgumentTypeError."""
    kinds = (*(kind for kind in FAULTS if kind != CONTROLLER), JOINT_PUBLISHER, COMMANDER)
    try:
        scene, kind, from_s, *to_s = text.split(":")
        if kind not in kinds or len(to_s) > 1:
            raise ValueError
        return int(scene), Fault(kind, float(from_s), float(to_s[0]) if to_s else np.inf)
    except ValueError:
        raise argparse.ArgumentTypeError(
            f"found {text!r}, expected SCENE:KIND:FROM[:TO] with one of {', '.join(kinds)}"
        ) from None


def parser():
    """The options of the command line."""
    p = argparse.ArgumentParser(prog="python -m sim.ros2_arm", description="A simulated UR10e on ROS 2.")
    p.add_argument("--seed", type=int, default=1000, help="of the scenes (default: 1000)")
    p.add_argument("--episode", type=int, default=0, help="the first scene (default: 0)")
    p.add_argument("--height", type=int, default=120, help="of pictures, pixels (default: 120)")
    p.add_argument("--width", type=int, default=160, help="default: 160")
    p.add_argument("--camera-topic", default="/camera/color/image_raw", help="default: /camera/color/image_raw")
    p.add_argument("--hz", type=float, default=HZ, help="of joint states and of the controllers (default: 500)")
    p.add_argument("--delay-s", type=float, default=IMAGE_AGE_S, help=f"of a picture (default: {IMAGE_AGE_S:g})")
    p.add_argument("--lag-s", type=float, default=LAG_S, help=f"of the arm behind its commands (default: {LAG_S:g})")
    p.add_argument(
        "--joints", type=lambda text: text.split(","), default=list(JOINT_NAMES), metavar="NAME,...",
        help="of the controllers, in their order (default: from base to tool)",
    )  # fmt: skip
    p.add_argument("--lock-step", action="store_true", help="wait for commands")
    p.add_argument(
        "--fault", type=read_fault, action="append", default=[], metavar="SCENE:KIND:FROM[:TO]",
        help="see the file's head",
    )  # fmt: skip
    p.add_argument("--log", type=Path, metavar="FOLDER", help="gets a file per scene")
    return p


def main():
    """Until SIGTERM or Ctrl-C."""
    args, ended = parser().parse_args(), threading.Event()
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, lambda *_: ended.set())
    Ros2Arm(args).run(ended)
    sys.stdout.flush()
    os._exit(0)  # rclpy's middleware may wait for its threads


if __name__ == "__main__":
    main()
