"""The simulated cell, one control step at a time, and what counts as doing its task.

    world = World(seed=1000, episode=0)
    while world.time_s < TIMEOUT_S:
        state_rad, image = world.observe()
        world.command(policy(state_rad, image))        # (6,) joint positions, rad
    outcome = world.outcome()

The world shows what a recording holds (tests/test_rollout.py): the joints as they are now, and the image as old as it
is when a camera's message arrives.

Knows: the scene, the arm's way of following commands, the age of an image, disturbances, the success criterion.
Must not know: policies, checkpoints, how many worlds there are, what is reported.
"""

from bisect import bisect_left
from dataclasses import dataclass, replace

import numpy as np

from sim.expert import random_episode
from sim.scene import BLOCK_SIDE_M, Renderer
from ur10e import SPEED_LIMIT_RAD_S, tool_tip

CONTROL_HZ = 30.0
IMAGE_AGE_S = 0.016  # from capture to the message's arrival; the middle of the recorder's CAMERA_LATENCY_S
SERVO_S = 0.005  # the arm moves in steps of at most this

TIMEOUT_S = 6.0
TOLERANCE_M = 0.02  # from the tip to the middle of the block's top
HELD_S = 0.5
ON_TOP_M = 0.01  # the tip's height above or below the block's top face when it is "on" it


@dataclass(frozen=True)
class Conditions:
    """How this cell differs from the one that was recorded.

    Attributes:
        lag_s: time constant with which the arm follows its commands; 0 follows them exactly. With a lag the joints
            also keep the UR10e's speed limits.
        image_noise: standard deviation of the noise on every pixel, grey levels of 255.
        camera_shift_m: how far the camera is from its place, in a direction that each episode draws.
        light_turned: the light comes from the side opposite to the recorded one.
    """

    lag_s: float = 0.0
    image_noise: float = 0.0
    camera_shift_m: float = 0.0
    light_turned: bool = False


PERTURBATIONS = {  # name -> (what differs from the undisturbed cell, in words)
    "lag": (dict(lag_s=0.08), "80 ms lag and the joints' speed limits"),
    "noise": (dict(image_noise=10.0), "image noise of 10 grey levels"),
    "camera": (dict(camera_shift_m=0.02), "camera moved by 2 cm"),
    "light": (dict(light_turned=True), "light from the opposite side"),
}


@dataclass(frozen=True)
class Outcome:
    """Whether and how an episode's task was done; distances are from the tip to the middle of the block's top.

    Attributes:
        success: the tip came within the tolerance.
        touch_s: when it first did, s since the start; None when it did not.
        held: it stayed there for HELD_S.
        on_top: at the end the tip is over the block's top face and within ON_TOP_M of its height.
        final_m, least_m: distance at the end, and the smallest.
    """

    success: bool
    touch_s: float | None
    held: bool
    on_top: bool
    final_m: float
    least_m: float


def goal_m(scene):
    """Where the tip has to go: the middle of the block's top face, (3,) m."""
    return np.array([*scene.block_xy_m, BLOCK_SIDE_M])


def judge(scene, tip_m, control_hz=CONTROL_HZ, tolerance_m=TOLERANCE_M):
    """The success criterion: (Scene, the tip's places at every control step (T, 3) m) -> Outcome."""
    distance_m = np.linalg.norm(tip_m - goal_m(scene), axis=1)
    near = distance_m <= tolerance_m
    # Runs of consecutive steps within the tolerance; N steps span N - 1 periods.
    edges = np.flatnonzero(np.diff(np.concatenate([[0], near.astype(np.int8), [0]]))).reshape(-1, 2)
    longest_s = max((int(stop - start) - 1 for start, stop in edges), default=0) / control_hz
    cos, sin = np.cos(scene.block_yaw_rad), np.sin(scene.block_yaw_rad)
    along_sides = np.array([[cos, sin], [-sin, cos]]) @ (tip_m[-1, :2] - scene.block_xy_m)
    over = bool((np.abs(along_sides) <= BLOCK_SIDE_M / 2).all())
    return Outcome(
        success=bool(near.any()),
        touch_s=float(np.argmax(near) / control_hz) if near.any() else None,
        held=longest_s >= HELD_S - 1e-9,
        on_top=over and bool(abs(tip_m[-1, 2] - BLOCK_SIDE_M) <= ON_TOP_M),
        final_m=float(distance_m[-1]),
        least_m=float(distance_m.min()),
    )


class World:
    """The cell with one arm, one block and one camera.

    Args:
        seed, episode: which scene and start pose; those of the recorder's episode of the same numbers.
        height, width: of the image, pixels.
        conditions: what differs from the recorded cell.
        control_hz: how often command() is called per simulated second.
        image_age_s: how old the image is that observe() shows.

    Attributes:
        scene: sim.scene.Scene, with the disturbances.
        expert: sim.expert.Expert of this episode.
        path_rad: list of (6,), the arm's pose at every control step, the start included.
        command_rad: list of (6,), what was commanded; one shorter than path_rad.
    """

    def __init__(
        self, seed, episode, height=120, width=160, conditions=None, control_hz=CONTROL_HZ, image_age_s=IMAGE_AGE_S
    ):
        self.height, self.width = height, width
        self.conditions = conditions or Conditions()
        self.control_hz, self.image_age_s = control_hz, image_age_s
        self.reset(seed, episode)

    def reset(self, seed, episode):
        """Begin episode `episode` of `seed`, at its start pose."""
        scene, self.expert = random_episode(seed, episode)
        self._rng = np.random.default_rng([seed, episode, 2])  # apart from the recorder's streams
        if self.conditions.camera_shift_m:
            direction = self._rng.normal(size=3)
            shift = self.conditions.camera_shift_m * direction / np.linalg.norm(direction)
            scene = replace(scene, camera_shift_m=tuple(shift.tolist()))
        if self.conditions.light_turned:
            x, y, z = scene.light
            scene = replace(scene, light=(-x, -y, z))
        self.seed, self.episode, self.scene = seed, episode, scene
        self._renderer = None  # drawn on only if somebody looks
        start = self.expert.start_rad
        self.path_rad, self.command_rad = [start], []
        self._setpoint, self._servo_s, self._servo_rad = start, [0.0], [start]

    @property
    def time_s(self):
        """Simulated seconds since the start."""
        return len(self.command_rad) / self.control_hz

    def observe(self):
        """What the robot's program gets now: ((6,) float64 joint positions in rad, (H, W, 3) uint8 RGB)."""
        return self.path_rad[-1], self.image()

    def image(self, at_s=None):
        """The image that has arrived by `at_s` (None: now): (H, W, 3) uint8 RGB."""
        if self._renderer is None:
            self._renderer = Renderer(self.scene, self.height, self.width)
        image = self._renderer.render(self.pose_rad((self.time_s if at_s is None else at_s) - self.image_age_s))
        if not self.conditions.image_noise:
            return image
        noise = self._rng.normal(0.0, self.conditions.image_noise, image.shape)
        return np.clip(np.rint(image + noise), 0, 255).astype(np.uint8)

    def pose_rad(self, at_s):
        """Where the arm was at `at_s`, between control steps too: (6,) rad. It stood still before the start."""
        i = bisect_left(self._servo_s, at_s)
        if i == 0 or i == len(self._servo_s):
            return self._servo_rad[0 if i == 0 else -1]
        part = (at_s - self._servo_s[i - 1]) / (self._servo_s[i] - self._servo_s[i - 1])
        return self._servo_rad[i - 1] + part * (self._servo_rad[i] - self._servo_rad[i - 1])

    def command(self, q_rad):
        """Send the arm to joint positions `q_rad` (6,) rad, which it is to reach one control period from now.

        Raises ValueError when they are not six finite numbers.
        """
        q_rad = np.array(q_rad, dtype=np.float64)
        if q_rad.shape != (6,) or not np.isfinite(q_rad).all():
            raise ValueError(f"command {q_rad}: expected six finite joint positions in rad")
        steps = int(np.ceil(1 / (self.control_hz * SERVO_S)))
        step_s = 1 / (self.control_hz * steps)
        begin_s, pose = self.time_s, self.path_rad[-1]
        lag_s = self.conditions.lag_s
        # First-order lag behind a setpoint that moves evenly: the exact solution for one held over a servo step.
        share = 1 - np.exp(-step_s / lag_s) if lag_s else 1.0
        for i in range(1, steps + 1):
            move = share * (self._setpoint + i / steps * (q_rad - self._setpoint) - pose)
            if lag_s:
                move = np.clip(move, -SPEED_LIMIT_RAD_S * step_s, SPEED_LIMIT_RAD_S * step_s)
            pose = pose + move
            self._servo_s.append(begin_s + i * step_s)
            self._servo_rad.append(pose)
        self._setpoint = q_rad
        self.path_rad.append(pose)
        self.command_rad.append(q_rad)

    def outcome(self, tolerance_m=TOLERANCE_M):
        """How the episode went up to now: Outcome."""
        return judge(self.scene, tool_tip(np.array(self.path_rad)), self.control_hz, tolerance_m)
