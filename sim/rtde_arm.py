"""A controller that speaks UR's protocols to the real ur_rtde, in a process of its own; the arm behind it is simulated.

    python -m sim.rtde_arm --host 127.0.0.2        # until Ctrl-C, or until its standard input ends
    python -m ur10e_deploy.run --checkpoint outputs/demo --robot rtde --host 127.0.0.2 \
        --camera color=http://127.0.0.2:8080/

ur_rtde knows its ports by heart (30004 RTDE, 30003 script, 29999 dashboard), so the controller wants an address of its
own: any 127.x.y.z on Linux. A camera stands beside it: MJPEG over HTTP, port 8080.

From UR's public guides: the bytes of RTDE (protocol version 2), the answers of the dashboard. Read in ur_rtde 1.6.5:
what it asks for, and what the program does that it uploads; that program is not interpreted here, its main loop is
written out again, for the commands that ur10e_deploy.rtde_robot uses. Another one ends the program.

Guesses about a real controller:
- servoj follows its target with a first-order lag of lookahead_time, whatever the gain, and keeps the joints' speed
  limits. (Measured by others on a UR10: 34 ms behind at 30 ms of lookahead.) No jump of a target is refused.
- stopl, a stopped program and a protective stop brake each joint at a constant rate: the number that stopl was given,
  in rad/s^2, and BRAKING_RAD_S2.
- A protective stop pauses the program. Released, it stays paused until somebody presses play; then it goes on with its
  old target.
- The watchdog's "stop" is a stopped program, at once; so is the dashboard's "stop". Inputs keep their last values when
  a client is gone.
- The speed slider changes what RTDE says, not how servoj moves.

Knows: the protocols, the program's commands, the world.
Must not know: the robot side, policies; it starts in a moment without torch.
"""

import argparse
import os
import re
import selectors
import signal
import socket
import struct
import sys
import threading
import time
from dataclasses import replace
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import cv2
import numpy as np

from sim.faults import BRAKING_RAD_S2
from sim.scene import Renderer
from sim.world import CONTROL_HZ as CAMERA_HZ
from sim.world import IMAGE_AGE_S, World
from ur10e import JOINT_NAMES

RTDE_PORT, SCRIPT_PORT, DASHBOARD_PORT, CAMERA_PORT = 30004, 30003, 29999, 8080
CONTROL_HZ = 500  # of an e-Series controller
VERSION = (5, 11, 1, 108318)  # PolyScope 5.11: what ur_rtde asks for depends on it
STOPPED, PLAYING, PAUSED = 1, 2, 4  # runtime_state
ROBOT_RUNNING, PROTECTIVE_BIT = 7, 2
# What can go wrong: all connections end for good with LOST; WATCHED only says that the arm moves.
FAULTS = (PROTECTIVE, PROGRAM, SLOWED, LOST, WATCHED) = (
    "protective stop", "program", "speed scaling", "connection", "nothing",
)  # fmt: skip
SERVO_J, SERVO_STOP, SET_WATCHDOG, STOP_SCRIPT = 11, 16, 35, 255  # of the uploaded program's input_int_register_0
READY, DONE = 1, 2  # and what it says in output_int_register_0
CODES = {"DOUBLE": "d", "INT32": "i", "UINT32": "I", "VECTOR6D": "6d"}
OUTPUTS = {
    "timestamp": "DOUBLE", "actual_q": "VECTOR6D", "target_q": "VECTOR6D", "robot_mode": "INT32",
    "runtime_state": "UINT32", "robot_status_bits": "UINT32", "safety_status_bits": "UINT32",
    "speed_scaling": "DOUBLE", "target_speed_fraction": "DOUBLE",
}  # fmt: skip


class Controller:
    """The arm and the program that moves it; cycle() is 2 ms of both.

    Args:
        world: World at CONTROL_HZ.
        fault, at_rad_s, lasts_s: what goes wrong when a joint first is as fast as that, and for how long.

    Attributes:
        inputs, outputs: RTDE registers and variables by name.
        received: list of (s, six positions in rad, lookahead s, gain): every servoJ, as it came.
        events: list of (s, text).
        is_lost: nobody is spoken to any more.
    """

    def __init__(self, world, fault=None, at_rad_s=0.3, lasts_s=np.inf):
        self.world = world
        self.inputs, self.received, self.events, self.is_lost = {}, [], [], False
        self.outputs = dict.fromkeys(OUTPUTS, 0) | {"robot_mode": ROBOT_RUNNING, "runtime_state": STOPPED}
        self.outputs |= {"safety_status_bits": 1, "speed_scaling": 1.0, "target_speed_fraction": 1.0}
        self._fault, self._at_rad_s, self._lasts_s, self._fault_s = fault, at_rad_s, lasts_s, None
        self._program = None  # the generator that runs it
        self._target_rad, self._lag_s = None, 0.0  # of the servo thread; None: there is none
        self._braking_rad_s2 = BRAKING_RAD_S2
        self._watchdog_s, self._heard_s = None, 0.0
        self.set("output_int_register_0", 0)

    def set(self, name, value):
        """Set an output."""
        self.outputs[name] = value

    def say(self, text):
        """Into the log, and on the screen."""
        self.events.append((self.world.time_s, text))
        print(f"{self.world.time_s:8.3f} s  {text}", flush=True)

    def receive(self, names, values):
        """An RTDE client wrote inputs."""
        self.inputs |= zip(names, values, strict=True)
        if "input_int_register_0" in names:
            self._heard_s = time.perf_counter()
            if self.inputs["input_int_register_0"] == SERVO_J:
                lookahead_s, gain = (self.inputs[f"input_double_register_{i}"] for i in (9, 10))
                self.received.append((self.world.time_s, *self._floats(6), lookahead_s, gain))

    def play(self, script):
        """A program was uploaded: it takes the place of what ran."""
        if "def rtde_control():" not in script:
            self.say(f"a program that is not ur_rtde's was not run: {script.splitlines()[0]}")
            return
        self._target_rad, self._watchdog_s, self._program = None, None, self._ur_rtde()
        self.set("runtime_state", PLAYING)
        self.say("program started")

    def stop(self, why):
        """The program ends."""
        if self.outputs["runtime_state"] != STOPPED:
            self._target_rad, self._program, self._braking_rad_s2 = None, None, BRAKING_RAD_S2
            self.set("runtime_state", STOPPED)
            self.say(f"program stopped: {why}")

    def cycle(self):
        """The next 2 ms."""
        self._go_wrong()
        if self.outputs["runtime_state"] == PLAYING:
            try:
                next(self._program)
            except StopIteration:
                self.stop("it ended")
            if self._watchdog_s and time.perf_counter() - self._heard_s > self._watchdog_s:
                self.stop("the watchdog heard nothing")
        follows = self._target_rad is not None and self.outputs["runtime_state"] == PLAYING
        self.world.conditions = replace(self.world.conditions, lag_s=self._lag_s if follows else 0.0)
        self.world.command(self._target_rad if follows else self._braked())
        self.outputs |= {"timestamp": self.world.time_s, "actual_q": self.world.path_rad[-1]}
        self.set("target_q", self.world.command_rad[-1])

    def _ur_rtde(self):
        """The main loop of ur_rtde's program, and its threads' part in it; a yield is its sync()."""
        executing = False
        self.set("output_int_register_0", READY)
        while True:
            command = self.inputs.get("input_int_register_0", 0)
            if command == SERVO_J:
                self._target_rad = np.array(self._floats(6))
                self._lag_s = self.inputs["input_double_register_9"]
                self.set("output_int_register_0", READY)
            elif command == 0:
                executing = False
                self.set("output_int_register_0", READY)
            elif not executing:
                executing = True
                if command == SERVO_STOP:
                    self._target_rad, self._braking_rad_s2 = None, self.inputs["input_double_register_0"]
                    self.say(f"stopl({self._braking_rad_s2:g})")
                    while self._speed_rad_s().any():
                        yield
                elif command == SET_WATCHDOG:
                    self._watchdog_s = 1 / self.inputs["input_double_register_0"]
                else:
                    if command != STOP_SCRIPT:
                        self.say(f"command {command} is not known here")
                    return
                self.set("output_int_register_0", DONE)
            yield

    def _floats(self, count):
        return [self.inputs[f"input_double_register_{i}"] for i in range(count)]

    def _speed_rad_s(self):
        before = self.world.path_rad[-2:]
        return (before[-1] - before[0]) * CONTROL_HZ

    def _braked(self):
        speed = self._speed_rad_s()
        slower = np.sign(speed) * np.maximum(np.abs(speed) - self._braking_rad_s2 / CONTROL_HZ, 0.0)
        return self.world.path_rad[-1] + slower / CONTROL_HZ

    def _go_wrong(self):
        now_s, kind = self.world.time_s, self._fault
        if kind and self._fault_s is None and np.abs(self._speed_rad_s()).max() > self._at_rad_s:
            self._fault_s = now_s
            self.say(f"fault: {kind}")
            if kind == PROTECTIVE:
                self._braking_rad_s2 = BRAKING_RAD_S2
                self.outputs |= {"safety_status_bits": 1 << PROTECTIVE_BIT, "runtime_state": PAUSED}
            elif kind == PROGRAM:
                self.stop("by somebody")
            elif kind == SLOWED:
                self.set("target_speed_fraction", 0.5)
            self.is_lost = kind == LOST
        elif kind and self._fault_s is not None and now_s > self._fault_s + self._lasts_s:
            self._fault = None
            self.say("released")
            self.outputs |= {"safety_status_bits": 1, "target_speed_fraction": 1.0}
            if self.outputs["runtime_state"] == PAUSED:
                self.set("runtime_state", PLAYING)
                self.say("somebody pressed play")


class RtdeClient:
    """One connection to the RTDE port."""

    def __init__(self, controller, connection):
        self._controller, self._socket = controller, connection
        self._in, self._out, self._recipes = b"", b"", []
        self._names, self._every, self._started = [], 1, False

    def read(self, data):
        """Bytes that came."""
        self._in += data
        while len(self._in) >= 3:
            size, kind = struct.unpack(">HB", self._in[:3])
            if len(self._in) < size:
                return
            payload, self._in = self._in[3:size], self._in[size:]
            self._answer(chr(kind), payload)

    def _answer(self, kind, payload):
        if kind == "V":  # request protocol version
            self._send(kind, struct.pack(">B", payload == b"\x00\x02"))
        elif kind == "v":  # get URControl version
            self._send(kind, struct.pack(">4I", *VERSION))
        elif kind == "O":  # set up outputs
            (frequency,) = struct.unpack(">d", payload[:8])
            self._every = max(1, round(CONTROL_HZ / frequency))
            self._names = _names(payload[8:])
            self._send(kind, struct.pack(">B", 1) + ",".join(map(_output_type, self._names)).encode())
        elif kind == "I":  # set up inputs
            self._recipes.append([(name, _input_type(name)) for name in _names(payload)])
            types = ",".join(kind for _, kind in self._recipes[-1])
            self._send(kind, struct.pack(">B", len(self._recipes)) + types.encode())
        elif kind in "SP":  # start, pause
            self._started = kind == "S"
            self._send(kind, b"\x01")
        elif kind == "U":  # data
            recipe = self._recipes[payload[0] - 1]
            values = struct.unpack(">" + "".join(CODES[kind] for _, kind in recipe), payload[1:])
            names = [name for name, kind in recipe for _ in range(6 if kind == "VECTOR6D" else 1)]
            self._controller.receive(names, values)

    def cycle(self, number):
        """Send the outputs if it is time; a client that does not read them loses some."""
        if self._started and number % self._every == 0 and not self._out:
            values = [self._controller.outputs.get(name, 0) for name in self._names]
            packed = (
                struct.pack(f">{CODES[_output_type(name)]}", *np.atleast_1d(value).tolist())
                for name, value in zip(self._names, values, strict=True)
            )
            self._send("U", b"\x01" + b"".join(packed))
        elif self._out:
            self._flush()

    def _send(self, kind, payload):
        self._out += struct.pack(">HB", 3 + len(payload), ord(kind)) + payload
        self._flush()

    def _flush(self):
        try:
            self._out = self._out[self._socket.send(self._out) :]
        except BlockingIOError:
            pass


class ScriptClient:
    """One connection to the port that takes programs."""

    def __init__(self, controller, connection):
        self._controller, self._script = controller, ""

    def read(self, data):
        """A program's text; it is whole with a line "end"."""
        self._script += data.decode()
        if self._script.endswith("\nend\n"):
            self._controller.play(self._script)
            self._script = ""

    def cycle(self, number):
        """A real one tells its state here, too, which ur_rtde does not read."""


class DashboardClient:
    """One connection to the dashboard."""

    def __init__(self, controller, connection):
        self._controller, self._socket = controller, connection
        self._write("Connected: Universal Robots Dashboard Server")

    def read(self, data):
        """Commands, a line each."""
        for line in data.decode().splitlines():
            if line == "stop":
                self._controller.stop("by the dashboard")
            major, minor, bugfix, build = VERSION
            self._write({
                "PolyscopeVersion": f"URSoftware {major}.{minor}.{bugfix}.{build} (Sep 22 2021)",
                "get serial number": "20205500001",
                "is in remote control": "true",
                "stop": "Stopped",
            }.get(line, f"could not understand: {line}"))  # fmt: skip

    def cycle(self, number):
        """It speaks only when it is asked."""

    def _write(self, line):
        self._socket.send(f"{line}\n".encode())


def _names(payload):
    return [name for name in payload.decode().split(",") if name]


def _output_type(name):
    if match := re.fullmatch(r"output_(int|double)_register_\d+", name):
        return "INT32" if match[1] == "int" else "DOUBLE"
    return OUTPUTS.get(name, "NOT_FOUND")


def _input_type(name):
    if match := re.fullmatch(r"input_(int|double)_register_\d+", name):
        return "INT32" if match[1] == "int" else "DOUBLE"
    return "VECTOR6D" if name == "external_force_torque" else "NOT_FOUND"


def serve(controller, host, until_eof, running):
    """Answer at the three ports and move the arm, until `running` (a threading.Event) is cleared."""
    selector = selectors.DefaultSelector()
    kinds = {RTDE_PORT: RtdeClient, SCRIPT_PORT: ScriptClient, DASHBOARD_PORT: DashboardClient}
    clients = {}
    for port in kinds:
        listening = socket.create_server((host, port))
        selector.register(listening, selectors.EVENT_READ, port)
    if until_eof:
        selector.register(sys.stdin, selectors.EVENT_READ)

    def close(connection):
        selector.unregister(connection)
        clients.pop(connection, None)
        connection.close()

    print(f"ready at {host}", flush=True)
    began_s, number = time.perf_counter(), 0
    while running.is_set():
        due_s = began_s + number / CONTROL_HZ
        for key, _ in selector.select(max(due_s - time.perf_counter(), 0.0)):
            connection = key.fileobj
            if connection is sys.stdin:
                if not os.read(sys.stdin.fileno(), 4096):
                    return
            elif key.data is not None:  # somebody calls
                called, _ = connection.accept()
                called.setblocking(False)
                called.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
                clients[called] = kinds[key.data](controller, called)
                selector.register(called, selectors.EVENT_READ)
            else:
                try:
                    data = connection.recv(65536)
                    if data:
                        clients[connection].read(data)
                except ConnectionError:
                    data = b""
                if not data:
                    close(connection)
        if time.perf_counter() < due_s:
            continue  # somebody spoke; it is not time yet
        controller.cycle()
        number += 1
        if controller.is_lost:
            for key in [k for k in selector.get_map().values() if isinstance(k.fileobj, socket.socket)]:
                close(key.fileobj)
        for connection, client in list(clients.items()):
            try:
                client.cycle(number)
            except ConnectionError:
                close(connection)


def serve_camera(world, host, height, width):
    """MJPEG of the scene at http://HOST:8080/, for as long as this process lives; noise of 2 grey levels."""
    renderer, rng, lock = Renderer(world.scene, height, width), np.random.default_rng(0), threading.Lock()

    def jpeg():
        # Some cycles ago: a place that the other thread is not writing.
        picture = renderer.render(world.pose_rad(world.time_s - IMAGE_AGE_S))
        noisy = np.clip(picture + rng.integers(-2, 3, picture.shape), 0, 255).astype(np.uint8)
        return cv2.imencode(".jpg", noisy[..., ::-1], [cv2.IMWRITE_JPEG_QUALITY, 95])[1].tobytes()

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self):
            self.send_response(200)
            self.send_header("Content-Type", "multipart/x-mixed-replace; boundary=picture")
            self.end_headers()
            due_s = time.perf_counter()
            try:
                while True:
                    with lock:
                        data = jpeg()
                    head = f"--picture\r\nContent-Type: image/jpeg\r\nContent-Length: {len(data)}\r\n\r\n"
                    self.wfile.write(head.encode() + data + b"\r\n")
                    due_s = max(due_s + 1 / CAMERA_HZ, time.perf_counter() - 1 / CAMERA_HZ)
                    time.sleep(max(due_s - time.perf_counter(), 0.0))
            except ConnectionError:
                pass  # it looked long enough

        def log_message(self, *_):
            """Say nothing."""

    server = ThreadingHTTPServer((host, CAMERA_PORT), Handler)
    server.daemon_threads = True
    threading.Thread(target=server.serve_forever, daemon=True).start()


def main(argv=None):
    """Entry of `python -m sim.rtde_arm`."""
    p = argparse.ArgumentParser(prog="python -m sim.rtde_arm", description=__doc__.splitlines()[0])
    p.add_argument("--host", default="127.0.0.2", help="a loopback address of its own (default: %(default)s)")
    p.add_argument("--seed", type=int, default=1000, help="of the scenes (default: %(default)s)")
    p.add_argument("--episode", type=int, default=0, help="which scene (default: %(default)s)")
    p.add_argument("--height", type=int, default=120, help="of pictures (default: %(default)s)")
    p.add_argument("--width", type=int, default=160, help="of pictures (default: %(default)s)")
    p.add_argument("--fault", choices=FAULTS, help="what goes wrong while the arm moves")
    p.add_argument("--at-rad-s", type=float, default=0.3, help="when a joint first is as fast (default: %(default)s)")
    p.add_argument("--lasts-s", type=float, default=np.inf, help="and for how long (default: for good)")
    p.add_argument("--log", type=Path, help="npz: commands as they came, the arm's path at 500 Hz, events")
    p.add_argument("--until-eof", action="store_true", help="end with the standard input")
    args = p.parse_args(argv)
    world = World(args.seed, args.episode, args.height, args.width, control_hz=CONTROL_HZ)
    controller = Controller(world, args.fault, args.at_rad_s, args.lasts_s)
    running = threading.Event()
    running.set()
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, lambda *_: running.clear())
    try:
        serve_camera(world, args.host, args.height, args.width)
        serve(controller, args.host, args.until_eof, running)
    except OSError as error:
        sys.exit(f"error: --host {args.host}: {error}; expected an address of this machine whose ports "
                 f"{RTDE_PORT}, {SCRIPT_PORT}, {DASHBOARD_PORT} and {CAMERA_PORT} are free")  # fmt: skip
    if args.log:
        received = np.array(controller.received).reshape(-1, 3 + len(JOINT_NAMES))
        times_s, texts = zip(*controller.events, strict=True) if controller.events else ((), ())
        np.savez(args.log, received=received, path_rad=np.array(world.path_rad), event_s=np.array(times_s, float),
                 event=np.array(texts, str))  # fmt: skip


if __name__ == "__main__":
    main()
