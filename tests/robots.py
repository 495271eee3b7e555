"""An arm, its expert as a policy, and the loop between them, for the tests and soaks of the robot side.

loop, robot = make_loop(contract(), seconds=4)
loop.run()
"""

from __future__ import annotations

import itertools
import os
import subprocess
import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from ur10e_deploy.config import PolicyError, RobotContract
from ur10e_deploy.control import ControlLoop, ControlSettings
from ur10e_deploy.limits import default_limits
from ur10e_deploy.playback import Playback
from ur10e_deploy.robot import Robot, RobotOptions, open_robot
from ur10e_deploy.thinking import Thinker
from ur10e_deploy.watchdog import AgeLimits, Watchdog

from sim.robot import SimRobot
from sim.world import World
from tests.checks import ROOT
from ur10e import JOINT_NAMES

FPS, CHUNK = 30.0, 40
SIGNS = (-1.0, 1.0, 1.0, 1.0, 1.0, -1.0)  # of contract(): the last is the pan joint's, which moves most
HZ = 125.0  # of commands: the slowest, and so the cheapest
# In real time, on a machine that does other things, too: late is not wrong.
BUSY_AGES, BUSY = AgeLimits(10.0, 10.0), {"max_gap_s": 1e9, "recover_s": 20.0}


def contract(action_mode: str = "absolute", others: Sequence[str] = (), **changes: Any) -> RobotContract:
    """Of a policy for the simulated arm, in an order and with a sign of its own."""
    names = (*reversed(JOINT_NAMES), *others)
    fields: dict[str, Any] = dict(  # every field of RobotContract
        action_mode=action_mode, state_names=names, state_topics={name: f"/{name}:data" for name in others},
        units=(*["rad"] * 6, *[""] * len(others)), acted=tuple(range(len(names))), of_commands=False,
        joint_sign=(*SIGNS, *[1.0] * len(others)), wrap_angles=False, revolute=(*[True] * 6, *[False] * len(others)),
        angle_reference_rad=(0.0,) * len(names), fps=FPS, rest_at_start_s=0.2, image_age_s={}, start_states=(),
        start_brightness={}, recorded_shapes={}, image_resize=None, cameras={"color": (32, 48)}, training_episodes=(),
        held_out_episodes=(), data_settings={}, code={}, source="a test",
    )  # fmt: skip
    return RobotContract(**(fields | changes))


class ExpertPolicy:
    """The episode's expert, asked as a policy is: from the joints alone it finds out how far it is.

    `spoil` gets (number of the question, chunk (N, A)) and gives what is said instead; it may raise PolicyError.
    """

    def __init__(
        self, contract: RobotContract, world: World, spoil: Callable[[int, np.ndarray], np.ndarray] | None = None
    ) -> None:
        self.contract, self._expert, self._spoil, self._asked = contract, world.expert, spoil, 0
        self._times_s = np.arange(0.0, self._expert.duration_s, 1 / 240)
        self._path = self._expert.position(self._times_s)
        self._order = [JOINT_NAMES.index(name) for name in contract.state_names[:6]]
        self._sign = np.array(contract.joint_sign[:6])

    def predict_chunk(self, state: np.ndarray, images: Mapping[str, np.ndarray]) -> np.ndarray:
        """As PolicyRunner's: (CHUNK, A) float32."""
        assert images["color"].shape == (32, 48, 3) and images["color"].dtype == np.uint8
        q_rad = np.empty(6)
        q_rad[self._order] = state[:6] * self._sign
        # Of the moments where the joints are as near, the last: at rest it moves on.
        away = np.abs(self._path - q_rad).max(axis=1)
        now_s = self._times_s[np.flatnonzero(away <= away.min() + 1e-4)[-1]]
        positions = self._expert.position(now_s + np.arange(CHUNK + 1) / FPS)[:, self._order] * self._sign
        others = np.tile(np.linspace(0, 1, CHUNK + 1)[:, None], (1, len(state) - 6))
        rows = np.concatenate([positions, others], axis=1)
        chunk = np.diff(rows, axis=0) if self.contract.action_kind == "delta" else rows[1:]
        self._asked += 1
        if self._spoil is not None:
            chunk = self._spoil(self._asked - 1, chunk)
        if not np.isfinite(chunk).all():
            raise PolicyError("the policy's actions are not finite; they must not reach a robot")  # as PolicyRunner
        return chunk.astype(np.float32)


def make_loop(
    contract: RobotContract,
    seconds: float,
    spoil: Callable[[int, np.ndarray], np.ndarray] | None = None,
    latency_s: Callable[[int], float] = lambda number: 0.0,
    faults: Sequence[Any] = (),
    seam: str = "cross-fade",
    episode: int = 0,
    conditions: Any = None,
    person: bool = False,
    **settings: Any,
) -> tuple[ControlLoop, SimRobot]:
    """A loop in lock step over the simulated arm, with an expert that `spoil` makes worse."""
    how = ControlSettings(fps=FPS, duration_s=seconds, **{"command_hz": HZ, "speed_fraction": 1.0} | settings)
    world = World(11, episode, 32, 48, conditions, control_hz=how.command_hz)
    others = {name: 0.0 for name in contract.state_topics}
    robot = SimRobot(world, faults=faults, others=others, person=world.expert.position if person else None)
    thinker = Thinker(ExpertPolicy(contract, world, spoil), True, latency_s)  # ty: ignore[invalid-argument-type]
    watchdog = Watchdog(AgeLimits(), contract.cameras)
    return ControlLoop(robot, thinker, default_limits(), how, watchdog, Playback(seam)), robot


class RtdeArm:
    """sim.rtde_arm in a process and at an address of its own, with the scene of make_loop(); it ends with this one.

    with RtdeArm(folder, "--fault", "protective stop") as arm:
        loop, robot = make_rtde_loop(arm)
    arm.events, arm.received, arm.path_rad      # afterwards, from its own log
    """

    _count = itertools.count(2)

    def __init__(self, folder: Path, *options: str) -> None:
        self.host = f"127.{os.getpid() // 250 % 250 + 1}.{os.getpid() % 250 + 1}.{next(self._count)}"
        self._log = folder / f"{self.host}.npz"
        command = [sys.executable, "-m", "sim.rtde_arm", "--host", self.host, "--until-eof", "--log", str(self._log)]
        scene = ["--seed", "11", "--episode", "0", "--height", "32", "--width", "48"]
        self._process = subprocess.Popen(
            [*command, *scene, *options], cwd=ROOT, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
        )
        self.wait_for("ready")

    @property
    def camera(self) -> str:
        return f"http://{self.host}:8080/"

    def wait_for(self, text: str) -> None:
        """Until it said so."""
        assert self._process.stdout is not None
        while line := self._process.stdout.readline():
            if text in line:
                return
        raise AssertionError(f"sim.rtde_arm ended and never said {text!r}")

    def __enter__(self) -> RtdeArm:
        return self

    def __exit__(self, *_: object) -> None:
        self._process.communicate(timeout=60)  # closes its standard input
        with np.load(self._log) as log:
            self.events = dict(zip(log["event"].tolist(), log["event_s"].tolist(), strict=True))
            self.received, self.path_rad = log["received"], log["path_rad"]

    @property
    def targets_rad(self) -> np.ndarray:
        """(N, 6) every servoJ's, in the order in which they came."""
        return self.received[:, 1:7]

    def moving(self) -> np.ndarray:
        """(N,) rad/s of the fastest joint, every 2 ms."""
        return np.abs(np.diff(self.path_rad, axis=0)).max(axis=1) * 500


def open_rtde(arm: RtdeArm, hz: float = HZ, others: tuple[str, ...] = (), **extra: Any) -> Robot:
    """`--robot rtde`, with its camera; `extra` changes what it is told."""
    said = {"host": arm.host, "camera": [f"color={arm.camera}"]} | extra
    return open_robot("rtde", RobotOptions(hz, True, {"color": (32, 48)}, others, said))


def make_rtde_loop(
    arm: RtdeArm, extra: Mapping[str, Any] | None = None, **settings: Any
) -> tuple[ControlLoop, Robot]:  # fmt: skip
    """A loop in real time over `--robot rtde`, until the expert rests: "it is there".

    What a busy machine makes late stops nothing: its periods are missed, and the arm is slower.
    """
    how = ControlSettings(fps=FPS, duration_s=200, **BUSY | {"command_hz": HZ, "speed_fraction": 1.0} | settings)
    robot = open_rtde(arm, how.command_hz, **{"watchdog_hz": 0.25, "lost_s": 10.0} | dict(extra or {}))
    resting = []

    def until_it_rests(number: int, chunk: np.ndarray) -> np.ndarray:
        if np.ptp(chunk, axis=0).max() < 1e-3:
            resting.append(number)
        if len(resting) == 3:
            loop.stop("it is there")
        return chunk

    expert = ExpertPolicy(contract(), World(11, 0, 32, 48), until_it_rests)
    thinker = Thinker(expert, False)  # ty: ignore[invalid-argument-type]
    watchdog = Watchdog(BUSY_AGES, ("color",))
    loop = ControlLoop(robot, thinker, default_limits(), how, watchdog, Playback("cross-fade"))
    return loop, robot
