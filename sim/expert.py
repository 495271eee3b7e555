"""The scripted expert: from a random start pose, over the block, and down to touch it.

The motion is a sum of two minimum-jerk strokes in joint space, the second beginning before the first has
ended, so the arm flows through the waypoint above the block instead of stopping there (Flash and Henis,
"Arm trajectory modifications during reaching towards visual targets", 1991). It depends on the start pose and
on the block's place only, so a policy that sees the image and the joints can learn it.
"""

import numpy as np

from sim.scene import BLOCK_SIDE_M, random_scene
from ur10e import SPEED_LIMIT_RAD_S, inverse_kinematics

# Box of the tip's start. An arm that starts anywhere looks, before it moves, like one that is half-way there; people
# start near a home pose, and so does this one, within 10 x 20 x 10 cm.
START_LOW_M, START_HIGH_M = (-0.60, -0.10, 0.40), (-0.50, 0.10, 0.50)
START_WRIST_NOISE_RAD = 0.05
APPROACH_HEIGHT_M = 0.12  # of the waypoint above the block's top
SPEED_FRACTION = 0.35  # of the robot's speed limit, at the first stroke's fastest moment

STILL_START_S, STILL_END_S = 0.2, 0.4
REACH_MIN_S, DESCENT_S, OVERLAP_S = 1.8, 1.2, 0.4


def random_start(rng):
    """A start pose with the tool roughly down and clear of the table: (6,) float64 rad, from a NumPy Generator."""
    q_rad = inverse_kinematics(rng.uniform(START_LOW_M, START_HIGH_M))
    q_rad[3:] += rng.uniform(-START_WRIST_NOISE_RAD, START_WRIST_NOISE_RAD, 3)
    return q_rad


class Expert:
    """A smooth joint trajectory from `start_rad` (6,) rad to the top of a block at `block_xy_m` (2,) m.

    Attributes: `duration_s`, and `goal_rad` (6,), the touching pose. Raises ValueError when the block is out
    of reach.
    """

    def __init__(self, start_rad, block_xy_m):
        x, y = block_xy_m
        self.start_rad = np.asarray(start_rad, dtype=np.float64)
        above_rad = inverse_kinematics((x, y, BLOCK_SIDE_M + APPROACH_HEIGHT_M))
        self.goal_rad = inverse_kinematics((x, y, BLOCK_SIDE_M))
        # A minimum-jerk stroke peaks at 15/8 of its mean speed: slow enough for every joint.
        reach_rad = above_rad - self.start_rad
        fastest_s = np.max(15 / 8 * np.abs(reach_rad) / (SPEED_FRACTION * SPEED_LIMIT_RAD_S))
        reach_s = max(REACH_MIN_S, float(fastest_s))
        descent_begin_s = STILL_START_S + reach_s - OVERLAP_S
        self._strokes = (  # (begin, duration, how far each joint goes)
            (STILL_START_S, reach_s, reach_rad),
            (descent_begin_s, DESCENT_S, self.goal_rad - above_rad),
        )
        self.duration_s = descent_begin_s + DESCENT_S + STILL_END_S

    def position(self, t_s):
        """Joint angles at time(s) `t_s` from the episode's start: (...) s -> (..., 6) rad. Still outside it."""
        # Minimum jerk: 10 u^3 - 15 u^4 + 6 u^5 (Flash and Hogan, 1985).
        q_rad = self.start_rad
        for begin_s, length_s, delta_rad in self._strokes:
            u = np.clip((np.asarray(t_s)[..., None] - begin_s) / length_s, 0.0, 1.0)
            q_rad = q_rad + delta_rad * (u**3 * (10 + u * (6 * u - 15)))
        return q_rad

    def velocity(self, t_s):
        """Joint velocities, the exact derivative of `position`: (...) s -> (..., 6) rad/s."""
        qd_rad_s = np.zeros(6)
        for begin_s, length_s, delta_rad in self._strokes:
            u = np.clip((np.asarray(t_s)[..., None] - begin_s) / length_s, 0.0, 1.0)
            qd_rad_s = qd_rad_s + delta_rad / length_s * 30 * (u * (1 - u)) ** 2
        return qd_rad_s


def random_episode(seed, index):
    """The scene and the expert of episode `index` under `seed`: (Scene, Expert), always the same ones."""
    rng = np.random.default_rng([seed, index])
    scene = random_scene(rng)
    return scene, Expert(random_start(rng), scene.block_xy_m)
