"""UR10e kinematics in NumPy: joint names, limits, forward and closed-form inverse kinematics.

Frames: everything is expressed in the controller's `base` frame (the frame of the DH parameters), in metres,
z up. With all joints near zero pan the arm points along -x, so the simulated work area lies at negative x.
(ROS's `base_link` is the same frame turned by pi about z.)
"""

import numpy as np

# The canonical order: base to tool. Every array of joints in this project uses it.
JOINT_NAMES = (
    "shoulder_pan_joint",
    "shoulder_lift_joint",
    "elbow_joint",
    "wrist_1_joint",
    "wrist_2_joint",
    "wrist_3_joint",
)
# The order of the driver's /joint_states: alphabetical, not ours, so readers must match by name.
DRIVER_JOINT_NAMES = tuple(sorted(JOINT_NAMES))
DRIVER_FROM_CANONICAL = np.array([JOINT_NAMES.index(name) for name in DRIVER_JOINT_NAMES])

# Universal Robots, "DH Parameters for calculations of kinematics and dynamics", UR10e.
# Classic DH: T = Rz(theta) Tz(d) Tx(a) Rx(alpha).
DH_A_M = np.array([0.0, -0.6127, -0.57155, 0.0, 0.0, 0.0])
DH_D_M = np.array([0.1807, 0.0, 0.0, 0.17415, 0.11985, 0.11655])
DH_ALPHA_RAD = np.array([np.pi / 2, 0.0, 0.0, np.pi / 2, -np.pi / 2, 0.0])

# Universal Robots, UR10e technical specification; the elbow's +-180 degrees is ur_description's.
POSITION_LIMIT_RAD = np.deg2rad([360.0, 360.0, 180.0, 360.0, 360.0, 360.0])
SPEED_LIMIT_RAD_S = np.deg2rad([120.0, 120.0, 180.0, 180.0, 180.0, 180.0])

TOOL_LENGTH_M = 0.15  # a straight finger on the flange, along the flange's z


def link_frames(q_rad):
    """Forward kinematics of every DH frame.

    q_rad: (..., 6) joint angles in radians, canonical order.
    Returns (..., 7, 4, 4) float64 homogeneous transforms base <- frame i; frame 0 is the base itself and
    frame 6 the flange (UR's tool0).
    Raises ValueError when the last axis is not 6.
    """
    q_rad = np.asarray(q_rad, dtype=np.float64)
    if q_rad.ndim == 0 or q_rad.shape[-1] != 6:
        raise ValueError(f"q_rad has shape {q_rad.shape}; expected (..., 6), one angle per joint")
    cos_q, sin_q = np.cos(q_rad), np.sin(q_rad)
    cos_a, sin_a = np.cos(DH_ALPHA_RAD), np.sin(DH_ALPHA_RAD)
    step = np.zeros((*q_rad.shape, 4, 4))  # (..., joint, 4, 4): frame i-1 <- frame i
    step[..., 0, 0], step[..., 0, 1], step[..., 0, 2] = cos_q, -sin_q * cos_a, sin_q * sin_a
    step[..., 1, 0], step[..., 1, 1], step[..., 1, 2] = sin_q, cos_q * cos_a, -cos_q * sin_a
    step[..., 2, 1], step[..., 2, 2] = sin_a, cos_a
    step[..., 0, 3], step[..., 1, 3], step[..., 2, 3] = DH_A_M * cos_q, DH_A_M * sin_q, DH_D_M
    step[..., 3, 3] = 1.0

    frames = np.empty((*q_rad.shape[:-1], 7, 4, 4))
    frames[..., 0, :, :] = np.eye(4)
    for i in range(6):
        frames[..., i + 1, :, :] = frames[..., i, :, :] @ step[..., i, :, :]
    return frames


def tool_tip(q_rad):
    """Position of the finger's tip in the base frame: (..., 6) rad -> (..., 3) m. Raises as link_frames."""
    flange = link_frames(q_rad)[..., 6, :, :]
    return flange[..., :3, 3] + TOOL_LENGTH_M * flange[..., :3, 2]


def inverse_kinematics(tip_m, wrist_3_rad=0.0):
    """Joint angles that put the tool tip at `tip_m` with the tool pointing straight down.

    tip_m: (3,) position in the base frame, metres. Returns (6,) float64 radians, canonical order.
    Always the same branch (elbow up, wrist forward, wrist_2 = -90 degrees), so that neighbouring targets have
    neighbouring solutions. Pointing down leaves a planar two-link problem, solved in closed form: the law of
    cosines, with the pan angle from the offset d4 between the arm's plane and the wrist (Hawkins, "Analytic
    Inverse Kinematics for the Universal Robots UR-5/UR-10 Arms", 2013, restricted to this case).
    Raises ValueError when the target is out of reach.
    """
    x, y, z = (float(v) for v in tip_m)
    d1, _, _, d4, d5, d6 = DH_D_M
    upper, fore = -DH_A_M[1], -DH_A_M[2]
    # Frame 5 sits above the tip; in the plan view it is `forward` ahead of the base and d4 to its side.
    forward = np.sqrt(max(x * x + y * y - d4 * d4, 0.0))
    pan = np.arctan2(-y, -x) - np.arctan2(d4, forward)
    pan = (pan + np.pi) % (2 * np.pi) - np.pi

    reach, height = forward - d5, z + TOOL_LENGTH_M + d6 - d1  # of the forearm's end, seen from the shoulder
    cos_elbow = (reach**2 + height**2 - upper**2 - fore**2) / (2 * upper * fore)
    if reach <= 0.0 or abs(cos_elbow) > 1.0:
        raise ValueError(
            f"tool tip target ({x:.3f}, {y:.3f}, {z:.3f}) m is out of the UR10e's reach pointing down; "
            f"choose one about 0.4 to 1.1 m from the base"
        )
    elbow = np.arccos(cos_elbow)
    lift = -(np.arctan2(height, reach) + np.arctan2(fore * np.sin(elbow), upper + fore * np.cos(elbow)))
    return np.array([pan, lift, elbow, -np.pi / 2 - lift - elbow, -np.pi / 2, wrist_3_rad])
