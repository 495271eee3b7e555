"""sim/: the kinematics, the picture, the expert and the recorded bags keep the promises that others rely on."""

import json
import os
import subprocess
import sys
import time
from pathlib import Path

import cv2
import numpy as np
import pytest
from rosbags.highlevel import AnyReader
from rosbags.typesys import Stores, get_typestore

from sim import record as recorder
from sim.expert import Expert, random_episode
from sim.record import camera_times, joint_times, record
from sim.scene import BLOCK_HIGH_M, BLOCK_LOW_M, BLOCK_SIDE_M, Renderer, block_corners, camera
from ur10e import (
    JOINT_NAMES,
    POSITION_LIMIT_RAD,
    SPEED_LIMIT_RAD_S,
    inverse_kinematics,
    link_frames,
    tool_tip,
)

SMALL = dict(height=48, width=64)
ROOT = Path(__file__).resolve().parents[1]
# /joint_states of ur_robot_driver, written out so that a change of sim's constant is noticed.
DRIVER_ORDER = [
    "elbow_joint",
    "shoulder_lift_joint",
    "shoulder_pan_joint",
    "wrist_1_joint",
    "wrist_2_joint",
    "wrist_3_joint",
]
ASIDE_RAD = np.array([np.pi, -1.2, 0.3, -1.5, -1.5, 0.0])  # the arm turned away, so that it hides nothing


def red_pixels(rgb):
    """Where an RGB image shows the block: nothing else in the scene is red or orange."""
    red, green, blue = (rgb[..., i].astype(int) for i in range(3))
    return (red - green > 50) & (red - blue > 50)


def read_messages(bag):
    """Every message of a bag in file order: (topic, type, receive_ns, raw bytes, decoded message)."""
    with AnyReader([bag], default_typestore=get_typestore(Stores.ROS2_HUMBLE)) as reader:
        return [
            (link.topic, link.msgtype, receive_ns, bytes(raw), reader.deserialize(raw, link.msgtype))
            for link, receive_ns, raw in reader.messages()
        ]


def stamp_ns(message):
    return message.header.stamp.sec * 10**9 + message.header.stamp.nanosec


# --- Kinematics -------------------------------------------------------------------------------------------


def test_forward_kinematics_agrees_with_an_independent_implementation():
    """Contract: the flange's pose is ur-analytic-ik's to 1e-6 m and 1e-6 in rotation, on 1,000 poses."""
    ur10e = pytest.importorskip("ur_analytic_ik").ur10e
    poses = np.random.default_rng(0).uniform(-POSITION_LIMIT_RAD, POSITION_LIMIT_RAD, (1000, 6))
    expected = np.array([ur10e.forward_kinematics(*pose) for pose in poses])
    np.testing.assert_allclose(link_frames(poses)[:, 6], expected, rtol=0, atol=1e-6)


def test_inverse_kinematics_reaches_the_target_pointing_down_on_one_branch():
    """Contract: IK puts the tip on the target, tool down, elbow up, and neighbours get neighbouring angles."""
    rng = np.random.default_rng(1)
    targets = rng.uniform((-0.85, -0.35, 0.0), (-0.45, 0.35, 0.5), (300, 3))
    poses = np.array([inverse_kinematics(target) for target in targets])
    frames = link_frames(poses)
    np.testing.assert_allclose(tool_tip(poses), targets, atol=1e-9)
    np.testing.assert_allclose(frames[:, 6, :3, 2], np.tile([0.0, 0.0, -1.0], (300, 1)), atol=1e-9)
    shoulder, elbow, wrist = (frames[:, i, 2, 3] for i in (1, 2, 3))
    assert (elbow > (shoulder + wrist) / 2).all()
    nudged = np.array([inverse_kinematics(target + 1e-4) for target in targets])
    assert np.abs(nudged - poses).max() < 0.01


@pytest.mark.parametrize("target", [(-1.5, 0.0, 0.1), (0.0, 0.1, 0.1)])
def test_inverse_kinematics_refuses_what_it_cannot_reach(target):
    """Contract: a target out of reach is a clear error, not a NaN pose."""
    with pytest.raises(ValueError, match="out of the UR10e's reach"):
        inverse_kinematics(target)


def test_forward_kinematics_refuses_a_wrong_number_of_joints():
    """Contract: five joints are an error that says what was expected."""
    with pytest.raises(ValueError, match=r"shape \(5,\); expected \(\.\.\., 6\)"):
        link_frames(np.zeros(5))


# --- The expert -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("seed", [0, 1])
def test_expert_is_safe_smooth_and_touches_the_block(seed):
    """Contract: 50 episodes inside joint and speed limits, smooth, still at both ends, tip on the block's top."""
    step_s = 0.001
    for index in range(25):
        scene, expert = random_episode(seed, index)
        assert 3.0 <= expert.duration_s <= 5.0
        t_s = np.arange(0.0, expert.duration_s, step_s)
        q, qd = expert.position(t_s), expert.velocity(t_s)
        assert (np.abs(q) <= POSITION_LIMIT_RAD).all()
        assert (np.abs(qd) <= 0.5 * SPEED_LIMIT_RAD_S).all()
        np.testing.assert_allclose(np.gradient(q, step_s, axis=0), qd, atol=2e-3)  # qd is q's derivative
        acceleration = np.diff(qd, axis=0) / step_s
        assert np.abs(acceleration).max() < 5.0  # rad/s^2
        assert np.abs(np.diff(acceleration, axis=0)).max() < 0.1  # and without steps: bounded jerk
        assert (qd[t_s < 0.15] == 0).all() and (qd[t_s > expert.duration_s - 0.35] == 0).all()

        tip = tool_tip(q)
        touch = [*scene.block_xy_m, BLOCK_SIDE_M]
        assert np.linalg.norm(tip[-1] - touch) < 0.002
        assert (tip[:, 2] > BLOCK_SIDE_M - 1e-6).all()  # from above, never through the block
        assert (link_frames(q)[:, 2:, 2, 3] > 0.15).all()  # no joint near the table
        # The last centimetres are a descent over the block, not a slide towards it.
        low = tip[:, 2] < BLOCK_SIDE_M + 0.05
        assert np.linalg.norm(tip[low, :2] - scene.block_xy_m, axis=1).max() < 0.01


def test_expert_takes_its_time_for_a_long_way():
    """Contract: from a far start the speed stays at half the robot's limit by taking longer."""
    start = inverse_kinematics((-0.2, 0.7, 0.5))
    expert = Expert(start, BLOCK_LOW_M)
    speed = np.abs(expert.velocity(np.arange(0.0, expert.duration_s, 0.001))) / SPEED_LIMIT_RAD_S
    assert 0.2 < speed.max() <= 0.5


def test_episodes_differ_and_fill_the_work_area():
    """Contract: block and start vary from episode to episode, over the whole work area, and by seed."""
    drawn = [random_episode(seed, index) for seed in (0, 1) for index in range(50)]
    blocks = np.array([scene.block_xy_m for scene, _ in drawn])
    starts = np.array([expert.start_rad for _, expert in drawn])
    assert len(np.unique(blocks, axis=0)) == len(np.unique(starts, axis=0)) == 100
    assert (np.ptp(blocks, axis=0) > 0.9 * (np.array(BLOCK_HIGH_M) - BLOCK_LOW_M)).all()


def test_expert_keeps_one_arm_configuration():
    """Contract: elbow up, wrist_2 near -90 degrees and pan along the shortest way, so averaging poses is safe."""
    for index in range(50):
        _, expert = random_episode(2, index)
        q = expert.position(np.linspace(0.0, expert.duration_s, 100))
        assert (q[:, 2] > 0.5).all() and (np.abs(q[:, 4] + np.pi / 2) < 0.2).all()
        pan = q[:, 0]
        assert np.abs(np.diff(pan)).sum() <= abs(pan[-1] - pan[0]) + 0.1 and np.abs(pan).max() < np.pi / 2


def test_motion_depends_on_the_block():
    """Contract: from one start pose, different blocks give different motions well before the touch."""
    start = inverse_kinematics((-0.6, 0.0, 0.4))
    left, right = Expert(start, BLOCK_LOW_M), Expert(start, BLOCK_HIGH_M)
    assert np.abs(left.position(1.5) - right.position(1.5)).max() > 0.2
    np.testing.assert_array_equal(left.position(0.0), right.position(0.0))


# --- The picture ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("height,width", [(480, 640), (240, 240), (96, 128)])
def test_block_is_drawn_where_the_calibrated_camera_sees_it(height, width):
    """Contract: the block's pixels are centred on its corners, projected by OpenCV with the camera's K, R, t."""
    cam = camera(height, width)
    for index in range(8):
        scene, _ = random_episode(3, index)
        rotation, _ = cv2.Rodrigues(cam.R)
        corners, _ = cv2.projectPoints(block_corners(scene), rotation, cam.t, cam.K, None)
        outline = cv2.convexHull(corners.astype(np.float32))
        moments = cv2.moments(outline)
        expected = np.array([moments["m10"], moments["m01"]]) / moments["m00"]
        rows, columns = np.nonzero(red_pixels(Renderer(scene, height, width).render(ASIDE_RAD)))
        error = np.array([columns.mean(), rows.mean()]) - expected
        assert np.linalg.norm(error) < 0.5, (index, error)
        # And it has the projected size; anti-aliasing makes it up to a pixel larger all round.
        assert 0.9 < len(rows) / moments["m00"] < 1.3


def test_block_stays_visible_at_training_size():
    """Contract: at 96x128 the block is seen during the whole approach, whatever the start and place."""
    for index in range(40):
        scene, expert = random_episode(4, index)
        renderer = Renderer(scene, 96, 128)
        for t_s in np.linspace(0.0, expert.duration_s, 4):
            assert red_pixels(renderer.render(expert.position(t_s))).sum() >= 15, (index, t_s)


def test_picture_moves_with_every_large_joint():
    """Contract: the image shows the arm's pose; moving any of the first five joints changes it."""
    scene, expert = random_episode(0, 0)
    renderer = Renderer(scene, 96, 128)
    before = renderer.render(expert.start_rad).astype(int)
    for joint in range(5):
        q = expert.start_rad.copy()
        q[joint] += 0.3
        changed = np.abs(renderer.render(q) - before).max(axis=-1) > 20
        assert changed.sum() > 30, JOINT_NAMES[joint]


def test_small_picture_is_the_large_one_resized():
    """Contract: the calibration scales with the resolution, also when the aspect ratio changes."""
    scene, expert = random_episode(0, 1)
    large = Renderer(scene, 480, 640).render(expert.start_rad)
    for height, width in ((96, 128), (120, 120)):
        small = Renderer(scene, height, width).render(expert.start_rad)
        resized = cv2.resize(large, (width, height), interpolation=cv2.INTER_AREA)
        assert np.abs(small.astype(int) - resized).mean() < 3.0


def test_rendering_is_fast_enough():
    """Contract: at least 100 frames/s of one core at 480x640 (CPU time, best of three)."""
    scene, expert = random_episode(0, 0)
    renderer = Renderer(scene)
    took_s = []
    for _ in range(3):
        begin_s = time.process_time()
        for t_s in np.linspace(0.0, expert.duration_s, 20):
            renderer.render(expert.position(t_s))
        took_s.append(time.process_time() - begin_s)
    assert 20 / min(took_s) > 100


# --- The bags ---------------------------------------------------------------------------------------------


def test_clocks_have_the_rates_jitter_and_drops_of_a_robot():
    """Contract: 125 Hz and 30 Hz with jitter, 1 % of frames lost, never two in a row: gaps below 100 ms."""
    rng = np.random.default_rng(0)
    gaps = np.concatenate([np.diff(camera_times(rng, 4.0)) for _ in range(200)])
    assert gaps.min() > 0.02 and gaps.max() < 0.1
    lost = (gaps > 0.05).mean()
    assert 0.005 < lost < 0.02
    usual = gaps[gaps < 0.05]
    assert abs(usual.mean() - 1 / 30) < 2e-4 and 1e-3 < usual.std() < 5e-3
    events = recorder.plan_episode(0, 0)[2]
    assert events == sorted(events)  # written in order: a reader of the file need not sort
    gaps = np.diff(joint_times(rng, 4.0))
    assert abs(gaps.mean() - 0.008) < 1e-5 and gaps.min() > 0.007 and gaps.std() > 1e-5


@pytest.mark.parametrize("storage", ["sqlite3", "mcap"])
@pytest.mark.parametrize("compressed", [False, True])
def test_bag_reads_back_as_recorded(tmp_path, storage, compressed):
    """Contract: both storages and image kinds hold the expert's joints, the rendered frames and sane clocks."""
    bags = record(tmp_path / "out", 2, seed=5, storage=storage, compressed=compressed, **SMALL)
    assert [bag.name for bag in bags] == ["episode_000", "episode_001"]
    assert list(bags[0].glob("*.db3" if storage == "sqlite3" else "*.mcap"))
    messages = read_messages(bags[1])
    receive = np.array([message[2] for message in messages])
    assert (np.diff(receive) >= 0).all()
    with AnyReader([bags[1]]) as reader:
        assert reader.message_count == len(messages)

    scene, expert = random_episode(5, 1)
    begin_ns = recorder.EPOCH_NS + recorder.EPISODE_SPACING_NS
    joints = [(t, m) for topic, _, t, _, m in messages if topic == "/joint_states"]
    assert len(joints) == int(np.ceil(expert.duration_s * 125))
    for receive_ns, message in joints[::20]:
        assert message.name == DRIVER_ORDER
        assert 0 < receive_ns - stamp_ns(message) < 1_000_000
        t_s = (stamp_ns(message) - begin_ns) / 1e9
        order = [JOINT_NAMES.index(name) for name in message.name]
        np.testing.assert_allclose(message.position, expert.position(t_s)[order], atol=1e-8)
        np.testing.assert_allclose(message.velocity, expert.velocity(t_s)[order], atol=1e-8)
        assert len(message.effort) == 6

    topic = "/camera/color/image_raw" + ("/compressed" if compressed else "")
    images = [(t, m) for name, _, t, _, m in messages if name == topic]
    assert expert.duration_s * 30 * 0.95 < len(images) <= np.ceil(expert.duration_s * 30)
    assert max(np.diff([stamp_ns(m) for _, m in images])) < 100_000_000
    renderer = Renderer(scene, **SMALL)
    for receive_ns, message in images[::15]:
        assert message.header.frame_id == "camera_color_optical_frame"
        assert 5_000_000 < receive_ns - stamp_ns(message) < 30_000_000
        expected = renderer.render(expert.position((stamp_ns(message) - begin_ns) / 1e9))
        if compressed:
            assert message.format == "rgb8; jpeg compressed bgr8"
            found = cv2.imdecode(message.data, cv2.IMREAD_COLOR)[..., ::-1]
            assert np.abs(found.astype(int) - expected).mean() < 4.0
        else:
            assert (message.height, message.width, message.step, message.encoding) == (48, 64, 192, "rgb8")
            found = message.data.reshape(48, 64, 3)
            assert np.abs(found.astype(int) - expected).max() <= 1

    infos = [m for name, _, _, _, m in messages if name == "/camera/color/camera_info"]
    assert len(infos) == int(np.ceil(len(images) / 30))
    np.testing.assert_allclose(infos[0].k.reshape(3, 3), camera(**SMALL).K)


def test_episode_depends_on_seed_and_index_only(tmp_path):
    """Contract: same bytes whatever the number of episodes and processes; another seed gives other ones."""

    def recorded(name, **arguments):
        bags = record(tmp_path / name, **arguments, **SMALL)
        return [[message[:4] for message in read_messages(bag)] for bag in bags]

    once = recorded("once", episodes=2, seed=7)
    assert once == recorded("parallel", episodes=3, seed=7, workers=2)[:2]
    assert once[0] != once[1]
    assert once[0] != recorded("other", episodes=1, seed=8)[0]


def test_varied_episodes_differ_in_light_and_camera_pose_alone(tmp_path, capsys):
    """The same motion and times with other pixels; every pose within 3 cm, light from all around; asked for by name."""
    plain, varied = (record(tmp_path / str(v), 1, seed=7, varied=v, **SMALL)[0] for v in (False, True))
    joints, pixels = [], []
    for bag in (plain, varied):
        messages = read_messages(bag)
        joints.append([m[:4] for m in messages if m[0] == recorder.JOINT_TOPIC])
        pixels.append([m[4].data for m in messages if m[0] == recorder.CAMERA_TOPIC])
    assert joints[0] == joints[1] and len(pixels[0]) == len(pixels[1])
    assert all((a != b).any() for a, b in zip(*pixels, strict=True))
    scenes = [recorder.plan_episode(7, i, varied=True)[0] for i in range(200)]
    distance_m = np.linalg.norm([scene.camera_shift_m for scene in scenes], axis=1)
    assert distance_m.max() <= 0.03 and distance_m.min() < 0.005 and distance_m.max() > 0.025
    side_rad = np.arctan2(*np.array([scene.light[:2] for scene in scenes]).T)
    assert all((side_rad // (np.pi / 2) == quarter).any() for quarter in (-2, -1, 0, 1))
    with pytest.raises(FileExistsError, match="holds a recording with varied True, not None"):
        record(tmp_path / "True", 1, seed=7, **SMALL)


# --- The command ------------------------------------------------------------------------------------------


def run(capsys, *argv):
    """main() with these arguments: (exit status, stdout, stderr)."""
    try:
        status = recorder.main([str(arg) for arg in argv])
    except SystemExit as stop:
        status = stop.code
    return status, *capsys.readouterr()


def small_command(out, *more):
    return ("--out", out, "--episodes", 1, "--height", 32, "--width", 32, "--workers", 1, *more)


@pytest.mark.parametrize(
    "arguments,complaint",
    [
        (("--episodes", 0), "--episodes is 0"),
        (("--height", -5), "--height is -5"),
        (("--height", 8, "--width", 8), "--height is 8; expected 32"),
        (("--width", 100_000), "--width is 100000"),
        (("--storage", "rosbag1"), "expected one of sqlite3, mcap"),
        (("--seed", -1), "--seed is -1"),
        (("--workers", 0), "--workers is 0"),
        (("--episodes", "many"), "invalid int value"),
        (("--preview", "picture.txt"), "expected a .png or .jpg"),
    ],
)
def test_bad_arguments_get_one_line_and_write_nothing(tmp_path, capsys, arguments, complaint):
    """Contract: a bad argument is one line that names it, status 2, and no folder."""
    status, _, err = run(capsys, *small_command(tmp_path / "out"), *arguments)
    assert status == 2 and complaint in err and err.count("\n") == 1
    assert not (tmp_path / "out").exists()


def test_command_records_and_says_so(tmp_path):
    """Contract: `python -m sim.record` works as documented, ends with a summary and writes the preview."""
    arguments = small_command("out", "--storage", "mcap", "--preview", "p.png")
    command = [sys.executable, "-m", "sim.record", *map(str, arguments)]
    environment = dict(os.environ, PYTHONPATH=str(ROOT))
    done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    for word in ("episodes", "frames", "MB", "path", "frames/s", "preview"):
        assert word in done.stdout
    assert cv2.imread(str(tmp_path / "p.png")).shape == (64, 96, 3)
    assert json.loads((tmp_path / "out" / "recording.json").read_text())["arguments"]["storage"] == "mcap"


def test_finished_recording_is_left_alone(tmp_path, capsys):
    """Contract: running the same command again changes nothing and exits 0; other arguments are refused."""
    out = tmp_path / "out"
    assert run(capsys, *small_command(out))[0] == 0
    before = {path: path.stat().st_mtime_ns for path in out.rglob("*")}
    status, text, _ = run(capsys, *small_command(out))
    assert status == 0 and "already recorded" in text
    status, _, err = run(capsys, *small_command(out), "--seed", 3)
    assert status == 2 and "seed 0, not 3" in err and err.count("\n") == 1
    assert {path: path.stat().st_mtime_ns for path in out.rglob("*")} == before
    next(out.glob("episode_000/*.db3")).unlink()
    status, _, err = run(capsys, *small_command(out))
    assert status == 2 and "changed since" in err


def test_folder_of_somebody_else_is_not_touched(tmp_path, capsys):
    """Contract: a folder with foreign files, or a file at --out, is refused in one line and kept."""
    out = tmp_path / "out"
    out.mkdir()
    (out / "thesis.txt").write_text("years of work")
    status, _, err = run(capsys, *small_command(out))
    assert status == 2 and "thesis.txt" in err and err.count("\n") == 1
    assert [path.name for path in out.iterdir()] == ["thesis.txt"]
    status, _, err = run(capsys, *small_command(out / "thesis.txt"))
    assert status == 2 and "is a file" in err and err.count("\n") == 1


def test_interrupted_recording_is_redone(tmp_path, capsys, monkeypatch):
    """Contract: Ctrl-C leaves no finished manifest; the same command redoes it, another one is refused."""
    out, write_episode, calls = tmp_path / "out", recorder.write_episode, []

    def interrupted_at_the_second(*task):
        calls.append(task)
        if len(calls) == 2:
            raise KeyboardInterrupt
        return write_episode(*task)

    command = (*small_command(out), "--episodes", 2)
    with monkeypatch.context() as patch:
        patch.setattr(recorder, "write_episode", interrupted_at_the_second)
        status, _, err = run(capsys, *command)
    assert status == 130 and err.count("\n") == 1
    assert (out / "episode_000").is_dir() and not (out / "recording.json").exists()

    status, _, err = run(capsys, *command, "--seed", 1)
    assert status == 2 and "unfinished recording with other arguments" in err
    (out / "notes.txt").write_text("mine")
    assert run(capsys, *command)[0] == 2 and (out / "notes.txt").exists()
    (out / "notes.txt").unlink()
    assert run(capsys, *command)[0] == 0
    assert sorted(path.name for path in out.iterdir()) == ["episode_000", "episode_001", "recording.json"]


def test_full_disk_is_foreseen(tmp_path, monkeypatch):
    """Contract: images that cannot fit on the disk are refused before anything is rendered."""
    usage = type("Usage", (), dict(free=1000))
    monkeypatch.setattr(recorder.shutil, "disk_usage", lambda path: usage)
    with pytest.raises(OSError, match="--compressed"):
        record(tmp_path / "out", 1, seed=0, **SMALL)
    assert not list((tmp_path / "out").iterdir())
