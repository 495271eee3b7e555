"""What is measured of a roll-out, and how sure a success rate is.

Knows: joint paths, the arm's and the block's shape, the statistics of a share.
Must not know: policies, checkpoints, pixels, files.
"""

import numpy as np

from sim.scene import BLOCK_SIDE_M
from sim.world import TOLERANCE_M, goal_m
from ur10e import link_frames, tool_tip

Z_95 = 1.959963984540054  # the normal distribution's 97.5 % point

LINK_RADIUS_M = 0.05  # of the thinnest link, about its axis
ENTERED_M = 0.01  # deeper than this is "entered"; the finger's end touches the face that it is to touch
STALL_S, STALL_M = 1.0, 0.005  # the tip moves by less than STALL_M for STALL_S, and is not there


def wilson(successes, trials):
    """The 95 % interval of a share: (low, high) in [0, 1]; (0, 1) without trials.

    Wilson, "Probable Inference, the Law of Succession, and Statistical Inference", 1927: unlike p -+ 1.96 s it is
    right near 0 and 1, where success rates are.
    """
    if trials == 0:
        return 0.0, 1.0
    p, z2 = successes / trials, Z_95**2
    middle = (p + z2 / (2 * trials)) / (1 + z2 / trials)
    half = Z_95 / (1 + z2 / trials) * np.sqrt(p * (1 - p) / trials + z2 / (4 * trials**2))
    return max(0.0, float(middle - half)), min(1.0, float(middle + half))


def measure(world, tolerance_m=TOLERANCE_M):
    """One finished roll-out (sim.world.World) as a flat dict of numbers with their units in their names."""
    path_rad = np.array(world.path_rad)
    tip_m, outcome = tool_tip(path_rad), world.outcome(tolerance_m)
    in_block_m, in_table_m = depths(world.scene, path_rad)
    times_s = np.arange(int(np.ceil(world.expert.duration_s * world.control_hz)) + 1) / world.control_hz
    speed, acceleration = peaks(path_rad, world.control_hz)
    expert_speed, expert_acceleration = peaks(world.expert.position(times_s), world.control_hz)
    return dict(
        episode=world.episode,
        block_x_m=world.scene.block_xy_m[0],
        block_y_m=world.scene.block_xy_m[1],
        end_x_m=float(tip_m[-1, 0]),
        end_y_m=float(tip_m[-1, 1]),
        end_z_m=float(tip_m[-1, 2]),
        success=outcome.success,
        held=outcome.held,
        on_top=outcome.on_top,
        time_to_touch_s=outcome.touch_s,
        final_distance_m=outcome.final_m,
        least_distance_m=outcome.least_m,
        peak_speed_rad_s=speed,
        peak_acceleration_rad_s2=acceleration,
        expert_peak_speed_rad_s=expert_speed,
        expert_peak_acceleration_rad_s2=expert_acceleration,
        depth_in_block_m=float(in_block_m.max()),
        depth_in_table_m=float(in_table_m.max()),
        entered_block=bool(in_block_m.max() > ENTERED_M),
        entered_table=bool(in_table_m.max() > ENTERED_M),
        stalled_s=stalled_s(world.scene, tip_m, world.control_hz, tolerance_m),
    )


def peaks(path_rad, control_hz):
    """The fastest joint and the hardest acceleration of any joint on a path (T, 6) rad: rad/s, rad/s^2.

    From differences between control steps, so that a policy and the expert are measured alike.
    """
    speed = np.diff(path_rad, axis=0) * control_hz
    acceleration = np.diff(speed, axis=0) * control_hz
    return float(np.abs(speed).max(initial=0.0)), float(np.abs(acceleration).max(initial=0.0))


def depths(scene, path_rad):
    """How deep the arm is in the block and in the table, per step: two (T,) float64 m, 0 where it is not.

    The finger counts as a line down to its tip, the links beyond the shoulder as rods of LINK_RADIUS_M.
    """
    frames = link_frames(path_rad)
    joints = frames[:, 1:7, :3, 3]  # (T, 6, 3): shoulder to flange
    tip = tool_tip(path_rad)[:, None]
    share = np.linspace(0.0, 1.0, 9)[:, None]
    links = (joints[:, :-1, None] + share * (joints[:, 1:, None] - joints[:, :-1, None])).reshape(len(tip), -1, 3)
    finger = joints[:, -1:] + share * (tip - joints[:, -1:])
    below_table = np.maximum(-tip[:, 0, 2], (LINK_RADIUS_M - links[..., 2]).max(axis=1))
    in_block = np.maximum(-_to_block(scene, finger).min(axis=1), LINK_RADIUS_M - _to_block(scene, links).min(axis=1))
    return np.maximum(in_block, 0.0), np.maximum(below_table, 0.0)


def _to_block(scene, points_m):
    """Signed distance from points (..., 3) m to the block's surface, m; negative inside."""
    cos, sin = np.cos(scene.block_yaw_rad), np.sin(scene.block_yaw_rad)
    offset = points_m - goal_m(scene) + [0.0, 0.0, BLOCK_SIDE_M / 2]
    turned = offset @ np.array([[cos, -sin, 0.0], [sin, cos, 0.0], [0.0, 0.0, 1.0]])
    beyond = np.abs(turned) - BLOCK_SIDE_M / 2
    return np.linalg.norm(np.maximum(beyond, 0.0), axis=-1) + np.minimum(beyond.max(axis=-1), 0.0)


def stalled_s(scene, tip_m, control_hz, tolerance_m=TOLERANCE_M):
    """The longest time that the tip (T, 3) m stood about before it touched the block; 0 for less than STALL_S."""
    near = np.linalg.norm(tip_m - goal_m(scene), axis=1) <= tolerance_m
    before = tip_m[: np.argmax(near)] if near.any() else tip_m
    longest, start = 0, 0
    for t in range(len(before)):  # the longest stretch whose places are all near its first one
        if np.linalg.norm(before[t] - before[start]) > STALL_M:
            start = t
        longest = max(longest, t - start)
    return longest / control_hz if longest >= STALL_S * control_hz else 0.0


def summarise(rows):
    """Rows of measure() in all: success with its interval, shares, and medians. Keys say their units."""
    count, successes = len(rows), sum(row["success"] for row in rows)
    low, high = wilson(successes, count)
    touched = [row["time_to_touch_s"] for row in rows if row["success"]]

    def median(key):
        return float(np.median([row[key] for row in rows]))

    def share(key):
        return sum(bool(row[key]) for row in rows) / count

    return dict(
        episodes=count,
        successes=successes,
        success_rate=successes / count,
        wilson_95=[low, high],
        held_rate=share("held"),
        on_top_rate=share("on_top"),
        final_distance_median_m=median("final_distance_m"),
        least_distance_median_m=median("least_distance_m"),
        time_to_touch_median_s=float(np.median(touched)) if touched else None,
        peak_speed_median_rad_s=median("peak_speed_rad_s"),
        peak_speed_max_rad_s=max(row["peak_speed_rad_s"] for row in rows),
        expert_peak_speed_median_rad_s=median("expert_peak_speed_rad_s"),
        peak_acceleration_median_rad_s2=median("peak_acceleration_rad_s2"),
        expert_peak_acceleration_median_rad_s2=median("expert_peak_acceleration_rad_s2"),
        entered_block_rate=share("entered_block"),
        entered_table_rate=share("entered_table"),
        stalled_rate=share("stalled_s"),
    )
