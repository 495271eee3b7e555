"""Recordings to episodes: time grid, gaps and segments, joint conventions, actions, the sync report."""

from __future__ import annotations

import dataclasses
import json
import re
from pathlib import Path

import numpy as np
import pytest

from rosbag_dataset import (
    ChunkDataset,
    data_notes,
    load_episodes,
    no_motion,
    open_pixels,
    sync_table,
    synchronise,
    wrap_to_pi,
)
from rosbag_dataset.synchronisation import nearest_index
from tests.bags import (
    CAMERA_TOPIC,
    JOINT_TOPIC,
    JOINTS,
    T0_NS,
    Take,
    clock,
    joint_state,
    make_take,
    noise_images,
    settings,
    smooth_path,
    write_bag,
)
from tests.checks import both_storages, error_of
from tests.episodes import one_joint, sync, turning, without

# -- the grid -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("fps", [30, 15, 10, 7.3, 60])
def test_ticks_are_regular_and_start_on_an_image(fps):
    """Frames are 1/fps apart (to the nanosecond) and the first is an image of the first camera."""
    take = make_take(seconds=2.0)
    episode = sync(take, fps=fps)
    assert episode.time_ns[0] == take.camera_ns[0]
    np.testing.assert_allclose(np.diff(episode.time_ns), 1e9 / fps, atol=1)
    drift_ns = episode.time_ns[-1] - episode.time_ns[0] - (len(episode.time_ns) - 1) * 1e9 / fps
    assert abs(drift_ns) <= 1
    assert take.camera_ns[-1] - episode.time_ns[-1] < 1e9 / fps, "up to the end of the recording"


def test_steady_camera_gives_each_image_once():
    """At the camera's own rate every image is one frame: none repeated, none left over."""
    take = make_take(seconds=3.0)
    episode = sync(take)
    np.testing.assert_array_equal(episode.image_index["color"], np.arange(len(take.images)))
    report = episode.sync_report
    assert report["repeated_images"] == {"color": 0} and report["unused_images"] == {"color": 0}


def test_the_first_camera_anchors_the_grid():
    """With two cameras it is the first of data.camera_topics, from where every topic has begun."""
    take = make_take(seconds=1.0)
    times = {"color": take.camera_ns, "wrist": take.camera_ns + 7_000_000}
    for names, anchor in ((("color", "wrist"), times["color"][1]), (("wrist", "color"), times["wrist"][0])):
        topics = {camera: f"/{camera}" for camera in names}
        recording = dataclasses.replace(take.recording(), camera_time_ns={c: times[c] for c in names})
        assert synchronise("a", recording, settings(Path("bags"), camera_topics=topics)).time_ns[0] == anchor


def jittered(seed, camera_hz):
    rng = np.random.default_rng(seed)
    camera_ns = np.sort(clock(3.0, camera_hz) + rng.integers(-12_000_000, 12_000_000, round(3 * camera_hz)))
    joint_ns = np.sort(clock(3.0, 125) + rng.integers(-3_000_000, 3_000_000, 375))
    return Take(joint_ns, smooth_path((joint_ns - T0_NS) / 1e9), camera_ns, noise_images(len(camera_ns), (2, 2), seed))


@pytest.mark.parametrize("seed", range(5))
@pytest.mark.parametrize("camera_hz", [12, 30, 47])
def test_images_are_the_nearest(seed, camera_hz):
    """Against the brute force over all images and frames, on jittered times."""
    take = jittered(seed, camera_hz)
    episode = sync(take, max_offset_ms=200)
    offsets = np.abs(take.camera_ns[None, :] - episode.time_ns[:, None])
    chosen = offsets[np.arange(len(offsets)), episode.image_index["color"]]
    np.testing.assert_array_equal(chosen, offsets.min(axis=1))
    report = episode.sync_report["topics"][CAMERA_TOPIC]
    assert report["offset_ms_worst"] == pytest.approx(chosen.max() / 1e6, abs=0.006)
    assert report["offset_ms_median"] == pytest.approx(np.median(chosen) / 1e6, abs=0.006)


def test_nearest_index():
    """The earlier one on a tie, the ends beyond the ends."""
    times = np.array([10, 20, 20, 40])
    assert times[nearest_index(times, np.array([-5, 10, 14, 15, 16, 30, 31, 99]))].tolist() == [
        10, 10, 10, 10, 20, 20, 40, 40,
    ]  # fmt: skip


@pytest.mark.parametrize("seed", range(3))
def test_linear_joints_are_interpolated(seed):
    """Against np.interp, joint by joint, at the frames' times."""
    take = jittered(seed, 30)
    episode = sync(take, wrap_angles=False)
    for j in range(6):
        want = np.interp(episode.time_ns - T0_NS, take.joint_ns - T0_NS, take.joint_rad[:, j])
        np.testing.assert_allclose(episode.state[:, j], want, atol=1e-6)


def test_linear_joints_follow_the_true_path():
    """For a path known in closed form the error is that of linear interpolation, h^2/8 max|q''|, and a one-frame
    delta is far better than with the nearest sample."""
    take = one_joint(lambda t: np.sin(3 * t))
    seconds = lambda episode: (episode.time_ns - T0_NS) / 1e9  # noqa: E731
    linear, nearest = sync(take), sync(take, joint_resample="nearest")
    bound = (1 / 125) ** 2 / 8 * 9
    assert np.abs(linear.state[:, 0] - np.sin(3 * seconds(linear))).max() < bound + 2e-7
    index = np.abs(take.joint_ns[None] - nearest.time_ns[:, None]).argmin(axis=1)
    np.testing.assert_array_equal(nearest.state[:, 0], take.joint_rad[index, 0].astype(np.float32))
    true = np.diff(np.sin(3 * seconds(linear)))
    errors = [np.abs(e.action[:-1, 0] - true).mean() for e in (linear, nearest)]
    assert errors[0] < 1e-4 < errors[1]


@pytest.mark.parametrize("storage", ["sqlite3", "mcap"])
def test_order_in_the_file_does_not_matter(tmp_path, storage):
    """Messages shuffled in the bag give the episode of the sorted ones, down to the pixels that a frame shows."""
    take = make_take(seconds=0.5)
    messages = take.messages()
    write_bag(tmp_path / "bags" / "sorted", messages, storage)
    np.random.default_rng(1).shuffle(messages)
    write_bag(tmp_path / "bags" / "shuffled", messages, storage)
    (shuffled, in_order), _ = load_episodes(settings(tmp_path / "bags"), 1, False)
    np.testing.assert_array_equal(shuffled.time_ns, in_order.time_ns)
    np.testing.assert_array_equal(shuffled.state, in_order.state)
    np.testing.assert_array_equal(shuffled.action, in_order.action)
    frames = [open_pixels(e, "color")[e.image_index["color"]] for e in (shuffled, in_order)]
    np.testing.assert_array_equal(frames[0], frames[1])
    np.testing.assert_array_equal(frames[1], take.images)


def test_equal_stamps():
    """Two joint samples or images of one time do no harm: finite states, no division by zero."""
    take = make_take(seconds=1.0)
    take.joint_ns[1::2] = take.joint_ns[:-1:2]
    take.camera_ns[1] = take.camera_ns[0]
    with np.errstate(all="raise"):
        episode = sync(take)
    assert np.isfinite(episode.state).all() and 0 <= episode.sync_report["still_share"] <= 1
    doubled = np.interp(episode.time_ns, take.joint_ns[1::2], take.joint_rad[1::2, 0])  # the later of each pair
    np.testing.assert_allclose(episode.state[:, 0], doubled, atol=1e-5)


# -- gaps and segments --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("gap", ["camera", "joints"])
def test_gap_drops_frames_and_cuts(gap):
    """A gap longer than max_offset on either side drops exactly the frames without a sample near enough.

    And of frames between two joint samples that are more than twice that apart, all: a line between them is a guess.
    """
    take = without(make_take(seconds=3.0), **{gap: (1.0, 1.6)})
    episode = sync(take, max_offset_ms=50)
    times = take.camera_ns if gap == "camera" else take.joint_ns
    assert np.abs(times[None] - episode.time_ns[:, None]).min(axis=1).max() <= 50e6
    steps = np.diff(episode.time_ns)
    (cut,) = np.flatnonzero(steps > 40e6)
    assert episode.segments.tolist() == [[0, cut + 1], [cut + 1, len(episode.time_ns)]]
    dropped = round(steps[cut] * 30 / 1e9) - 1
    fewest = 14 if gap == "camera" else 17  # 0.6 s, for the camera less 50 ms on either side
    assert episode.sync_report["dropped"] == dropped and fewest <= dropped <= fewest + 2
    assert (episode.sync_report["dropped_in_joint_gaps"] > 0) == (gap == "joints")
    assert episode.sync_report["segments"] == 2 and episode.sync_report["frames"] == len(episode.time_ns)
    assert (episode.action[cut] == 0).all() and (episode.action[-1] == 0).all()
    assert episode.action_stop.tolist() == [cut] * (cut + 1) + [len(steps)] * (len(steps) - cut)


@pytest.mark.parametrize("resample", ["linear", "nearest"])
def test_no_label_lies_across_a_gap_of_the_joints(resample):
    """Joints at up to 2.4 rad/s and a gap of 1 s: every kept state and delta is the true one, not one of a line.

    "nearest" takes a recorded sample, which max_offset_ms has found near enough; its rule is as it was.
    """

    def path(t):
        return np.sin(2.4 * t)

    take = without(one_joint(path, seconds=4.0), joints=(1.0, 2.0))
    episode = sync(take, max_offset_ms=25, joint_resample=resample)
    t = (episode.time_ns - T0_NS) / 1e9
    has_action = episode.action_stop > np.arange(len(t))
    if resample == "linear":
        np.testing.assert_allclose(episode.state[:, 0], path(t), atol=1e-4)
        delta = path(t[1:]) - path(t[:-1])
        np.testing.assert_allclose(episode.action[:-1, 0][has_action[:-1]], delta[has_action[:-1]], atol=1e-4)
    else:
        assert episode.sync_report["dropped_in_joint_gaps"] == 0
        assert set(episode.state[:, 0].tolist()) <= set(take.joint_rad[:, 0].astype(np.float32).tolist())


def test_a_pause_of_the_joints_within_twice_the_offset_is_bridged():
    """Of joints at 125 Hz some are missing, so that 48 ms lie between two of them: 24 ms bridge that, 23 ms do not."""
    take = without(one_joint(np.sin), joints=(1.001, 1.041))
    assert np.diff(take.joint_ns).max() == 48_000_000
    assert sync(take, max_offset_ms=24).sync_report["dropped"] == 0
    report = sync(take, max_offset_ms=23).sync_report
    assert report["dropped"] >= report["dropped_in_joint_gaps"] >= 1


def test_gap_shorter_than_the_offset_cuts_nothing():
    """What max_offset allows is bridged: one segment, the missing image shown twice."""
    episode = sync(without(make_take(seconds=2.0), camera=(1.0, 1.03)))
    assert len(episode.segments) == 1 and episode.sync_report["dropped"] == 0
    assert episode.sync_report["repeated_images"] == {"color": 1}


def test_rest_at_the_start_is_measured():
    """Half a second without motion, then any joint counts; a recording that moves at once has none."""
    late = sync(one_joint(lambda t: 0.5 * np.maximum(t - 0.52, 0), joint=4))
    assert late.sync_report["rest_at_start_s"] == pytest.approx(0.5, abs=1 / 30)
    assert sync(one_joint(lambda t: 0.5 * t)).sync_report["rest_at_start_s"] == 0


def test_the_age_of_images_is_measured():
    """Images 5 ms before the ticks that they are paired with are 5 ms old; one that comes after its tick is newer."""
    take = make_take(seconds=2.0)
    early = take.camera_ns - 5_000_000
    early[[0, 7]] = take.camera_ns[0], take.camera_ns[7] + 8_000_000  # the grid begins on the first one
    age_s = sync(dataclasses.replace(take, camera_ns=early)).sync_report["image_age_s"]["color"]
    assert age_s == {"median": pytest.approx(0.005, abs=2e-4), "most": pytest.approx(0.005, abs=2e-4)}
    newer = sync(dataclasses.replace(take, camera_ns=np.append(take.camera_ns[:1], take.camera_ns[1:] + 8_000_000)))
    assert newer.sync_report["image_age_s"]["color"]["median"] == pytest.approx(-0.008, abs=2e-4)


def test_single_frames_between_gaps():
    """A segment of one frame has no action, hence no sample; the report counts frames without one."""
    take = make_take(seconds=2.0)
    keep = [*range(8), 20, *range(33, len(take.camera_ns))]
    take = dataclasses.replace(take, camera_ns=take.camera_ns[keep], images=take.images[keep])
    episode = sync(take, max_offset_ms=10)
    assert np.diff(episode.segments, axis=1).ravel().tolist()[:2] == [8, 1]
    assert episode.sync_report["frames_without_action"] == 3
    samples = ChunkDataset([episode], 4)
    assert len(samples) == episode.sync_report["frames"] - 3
    assert 8 not in [samples.locate(i)[1] for i in range(len(samples))]


# -- joints of several publishers ---------------------------------------------------------------------------------

WITH_GRIPPER = dict(joint_names=(*JOINTS, "finger_joint"), joint_sign=[1] * 6 + [-1])


def finger(t):
    """A gripper's stroke: in no unit of an angle, and never still."""
    return 40 + 30 * np.sin(2 * t)


def gripper_messages(time_ns):
    return [(JOINT_TOPIC, int(t), joint_state(int(t), [finger((t - T0_NS) / 1e9)], ["finger_joint"])) for t in time_ns]


def by_hand(time_ns, samples_ns, values):
    """Linear interpolation, written out."""
    want = np.empty(len(time_ns))
    for i, t in enumerate(time_ns.tolist()):
        before = max(k for k, s in enumerate(samples_ns.tolist()) if s <= t)
        after = min(before + 1, len(samples_ns) - 1)
        step = max(1, int(samples_ns[after] - samples_ns[before]))
        want[i] = values[before] + (values[after] - values[before]) * (t - int(samples_ns[before])) / step
    return want


@both_storages
def test_arm_and_gripper_on_one_topic(tmp_path, storage):
    """Each joint is interpolated between its own messages, some of which have the same time as another's.

    The second start, from the cache, gives the same; the report has a line for either publisher.
    """
    take, gripper_ns = make_take(seconds=1.0), clock(1.0, 20)
    assert np.isin(gripper_ns, take.joint_ns).any()
    messages = sorted(gripper_messages(gripper_ns) + take.messages(), key=lambda m: m[1])
    write_bag(tmp_path / "bags" / "a", messages, storage)
    wanted = settings(tmp_path / "bags", wrap_angles=False, apply_joint_sign=True, **WITH_GRIPPER)
    (episode,), _ = load_episodes(wanted, 1, False)
    t = episode.time_ns
    for j in range(6):
        np.testing.assert_allclose(episode.state[:, j], by_hand(t, take.joint_ns, take.joint_rad[:, j]), atol=1e-6)
    want = by_hand(t, gripper_ns, finger((gripper_ns - T0_NS) / 1e9))
    np.testing.assert_allclose(episode.state[:, 6], -want, rtol=1e-6)
    np.testing.assert_allclose(episode.action[:-1, 6], -np.diff(want), atol=1e-5)
    report = episode.sync_report
    assert (report["dropped"], report["ignored_joint_messages"], report["segments"]) == (0, 0, 1)
    arm, gripper = f"{JOINT_TOPIC} ({', '.join(JOINTS)})", f"{JOINT_TOPIC} (finger_joint)"
    assert list(report["topics"]) == [arm, gripper, CAMERA_TOPIC]
    assert [report["topics"][name]["messages"] for name in (arm, gripper)] == [125, 20]
    assert report["topics"][gripper]["rate_hz"] == pytest.approx(20)
    assert "125.0/20.0" in sync_table([report])
    (again,), _ = load_episodes(wanted, 1, False)
    np.testing.assert_array_equal(again.state, episode.state)
    assert (again.sync_report, again.recording_hash) == (report, episode.recording_hash)


@pytest.mark.parametrize("resample", ["linear", "nearest"])
def test_messages_with_any_of_the_joints(resample):
    """Each message has some joints: each joint's state is that of a recording of it alone."""
    take, rng = make_take(seconds=2.0), np.random.default_rng(4)
    take.joint_rad[rng.random(take.joint_rad.shape) < 0.4] = np.nan
    episode = sync(take, joint_resample=resample, wrap_angles=False)
    assert episode.sync_report["dropped"] == 0
    for j in range(6):
        there = ~np.isnan(take.joint_rad[:, j])
        times, values = take.joint_ns[there], take.joint_rad[there, j]
        if resample == "linear":
            want = np.interp(episode.time_ns - T0_NS, times - T0_NS, values)
        else:
            want = values[np.abs(times[None] - episode.time_ns[:, None]).argmin(axis=1)]
        np.testing.assert_allclose(episode.state[:, j], want, atol=1e-6)


@both_storages
def test_a_gap_of_one_joint_drops_the_frames_in_it(tmp_path, storage):
    """The gripper is silent for 0.6 s while the arm goes on: those frames go, all others stay."""
    take, gripper_ns = make_take(seconds=3.0), clock(3.0, 50)
    silent = (gripper_ns >= T0_NS + 10**9) & (gripper_ns <= T0_NS + 16 * 10**8)
    before, after = gripper_ns[~silent & (gripper_ns < T0_NS + 10**9)], gripper_ns[gripper_ns > T0_NS + 16 * 10**8]
    messages = take.messages() + gripper_messages([*before, *after])
    write_bag(tmp_path / "bags" / "a", sorted(messages, key=lambda m: m[1]), storage)
    (episode,), _ = load_episodes(settings(tmp_path / "bags", **WITH_GRIPPER), 1, False)
    ticks = take.camera_ns  # at the camera's own rate every image is a frame
    in_gap = (ticks > before[-1]) & (ticks < after[0])
    np.testing.assert_array_equal(episode.time_ns, ticks[~in_gap])
    report = episode.sync_report
    assert (report["dropped"], report["segments"]) == (in_gap.sum(), 2) and report["dropped_in_joint_gaps"] > 0
    np.testing.assert_allclose(episode.state[:, 6], finger((episode.time_ns - T0_NS) / 1e9), rtol=1e-3)


def test_a_joint_of_which_hardly_anything_is_there():
    """The line gives the time in which each publisher sent; one message alone makes one frame, no crash."""
    take = make_take(seconds=2.0)
    late = dataclasses.replace(take, joint_rad=take.joint_rad.copy())
    late.joint_rad[:-1, 5] = np.nan
    late.camera_ns = take.camera_ns - 100_000_000  # ends before the last joint message
    message = error_of(lambda: sync(late))
    assert f"{JOINT_TOPIC} (wrist_3_joint) 1700000001.992 to 1700000001.992 s" in message
    late.camera_ns[-1] = late.joint_ns[-1]
    assert sync(late).sync_report["frames"] == 1


# -- jumps of the joints ------------------------------------------------------------------------------------------


def test_the_fastest_step_is_measured():
    """Of the arm's joints, in rad/s; a gripper has another unit. Messages that arrive in pairs look no faster."""
    take = one_joint(lambda t: np.sin(2.4 * t), joint=4)
    fastest = sync(take).sync_report["fastest_joint_step"]
    assert fastest["joint"] == "wrist_2_joint" and fastest["rad_per_s"] == pytest.approx(2.4, rel=1e-3)
    assert fastest["rad"] == pytest.approx(2.4 / 125, rel=1e-2)
    assert abs(np.cos(2.4 * (fastest["at_s"] + 0.016))) > 0.999, "the time after the step, counted from the first image"
    take.joint_ns[:-1:2] = take.joint_ns[1::2] - 100_000
    report = sync(take).sync_report
    assert report["fastest_joint_step"]["rad_per_s"] < 5 and report["joint_jumps"] == 0
    names = (*JOINTS[:4], "finger_joint", JOINTS[5])
    assert sync(take, joint_names=names).sync_report["fastest_joint_step"]["rad_per_s"] == 0


@pytest.mark.parametrize("mode", ["delta", "absolute", "relative"])
@pytest.mark.parametrize("kind", ["glitch", "teleport"])
def test_a_jump_of_a_joint_is_cut_out(kind, mode):
    """No state is off the true path and no action leads across; only the frames at the jump go; the table says so."""
    take = one_joint(lambda t: 0.3 * np.sin(t), seconds=2.0)
    jump = slice(125, 126 if kind == "glitch" else None)
    take.joint_rad[jump, 0] += 0.4
    episode = sync(take, action_mode=mode)
    report = episode.sync_report
    assert report["dropped"] == report["dropped_at_joint_jumps"] <= 2 and report["segments"] == 2
    assert report["joint_jumps"] == (2 if kind == "glitch" else 1)
    t = (episode.time_ns - T0_NS) / 1e9
    true = 0.3 * np.sin(t) + (0.4 * (t >= 1) if kind == "teleport" else 0)
    np.testing.assert_allclose(episode.state[:, 0], true, atol=1e-4)
    samples = ChunkDataset([dataclasses.replace(episode, image_shape={})], 10)  # its pictures lie nowhere
    chunks = np.stack([samples[i]["action"][:, 0] for i in range(len(samples))])
    moves = {"delta": chunks, "absolute": chunks - 0.4 * (chunks > 0.35), "relative": chunks}[mode]
    assert np.abs(moves).max() < 0.32, "none is 0.4 and more"
    text = sync_table([report])
    assert f"a: cut at {report['joint_jumps']} jumps of the joints (shoulder_pan_joint by 0.40" in text
    assert f"{report['dropped']} frames dropped" in text.split("cut at")[1]


def test_jumps_again_and_again_are_refused():
    """Ten jumps, of five glitches, are cut out; with one glitch more the recording is refused, however much is left."""
    take = one_joint(lambda t: 0.3 * np.sin(t), seconds=4.0)
    take.joint_rad[100:350:50, 0] += 0.4
    report = sync(take).sync_report
    assert report["joint_jumps"] == 10 and report["frames"] > 100
    take.joint_rad[375, 0] += 0.4
    assert "one of 12 steps faster than 10 rad/s" in error_of(lambda: sync(take))


@both_storages
def test_two_publishers_of_the_same_joints(tmp_path, storage):
    """The arm's driver, and one that says where the arm is not: refused, with joint, size, time and what it may be."""
    take = make_take(seconds=1.0)
    other = [(JOINT_TOPIC, int(t) + 3_000_000, joint_state(int(t), np.zeros(6))) for t in take.joint_ns]
    write_bag(tmp_path / "bags" / "a", sorted(take.messages() + other, key=lambda m: m[1]), storage)
    message = error_of(lambda: load_episodes(settings(tmp_path / "bags"), 1, False))
    assert message.startswith(f"a: {JOINT_TOPIC}: wrist_3_joint jumps by 1.") and " at 17000000" in message
    assert "steps faster than 10 rad/s" in message and f"ros2 topic info -v {JOINT_TOPIC}" in message


# -- conventions --------------------------------------------------------------------------------------------------


def test_wrapped_states_and_small_deltas():
    """A path over the seam: states in (-pi, pi], none in between, and deltas that know no seam."""
    take = one_joint(turning)
    take.joint_rad[:] = wrap_to_pi(take.joint_rad)  # as a driver that wraps by itself
    episode = sync(take)
    state, limit = episode.state[:, 0], np.float32(np.pi)
    assert (np.abs(state) <= limit).all()
    seconds = (episode.time_ns - T0_NS) / 1e9
    np.testing.assert_allclose(np.exp(1j * state), np.exp(1j * turning(seconds)), atol=1e-6)
    assert np.ptp(state) > 5, "the seam was crossed"
    np.testing.assert_allclose(episode.action[:-1, 0], 0.4 / 30, atol=1e-6)


def test_wrap_to_pi_is_half_open():
    """(-pi, pi]: pi stays, -pi becomes pi, also for the neighbours of pi in floating point."""
    pi = np.pi
    near = np.array([pi, -pi, np.nextafter(pi, 4), np.nextafter(-pi, -4), 3 * pi, 0, -0.5, 2 * pi, 1e6])
    wrapped = wrap_to_pi(near)
    assert ((-pi < wrapped) & (wrapped <= pi)).all()
    np.testing.assert_allclose(np.exp(1j * wrapped), np.exp(1j * near), atol=1e-9)


def test_not_wrapped_when_not_asked_for():
    """wrap_angles: false leaves the recorded angles, beyond pi too."""
    episode = sync(one_joint(turning), wrap_angles=False)
    np.testing.assert_allclose(episode.state[:, 0], turning((episode.time_ns - T0_NS) / 1e9), atol=1e-6)


@pytest.mark.parametrize("wrap", [True, False])
@pytest.mark.parametrize("gap", [None, (1.0, 3.0)], ids=["no-gap", "camera-gap"])
@pytest.mark.parametrize("sign", [1, -1])
def test_absolute_actions_are_unwrapped_along_the_episode(wrap, gap, sign):
    """They go on beyond pi, also over the turns that were made while the camera was away."""
    fast = lambda t: 2.6 + 2.5 * t  # noqa: E731, in the gap of 2 s: 5 rad, which the states alone would take for -1.3
    take = one_joint(fast, seconds=5.0)
    if gap:
        take = without(take, camera=gap)
    episode = sync(take, action_mode="absolute", wrap_angles=wrap, apply_joint_sign=True, joint_sign=[sign] * 6)
    has_action = np.arange(len(episode.time_ns)) < episode.action_stop
    following = (episode.time_ns[has_action] - T0_NS) / 1e9 + 1 / 30
    np.testing.assert_allclose(episode.action[has_action, 0], sign * fast(following), atol=1e-5)
    following_state = episode.state[1:][has_action[:-1]][:, 0]
    np.testing.assert_allclose(np.exp(1j * episode.action[has_action, 0]), np.exp(1j * following_state), atol=1e-5)


def test_absolute_actions_start_where_the_state_says():
    """An arm that starts at 6.5 rad, wrapped to 0.2: its absolute actions begin at 0.2 as well."""
    episode = sync(one_joint(lambda t: 6.5 + 0.1 * t), action_mode="absolute")
    assert episode.state[0, 0] == pytest.approx(6.5 - 2 * np.pi, abs=0.01)
    np.testing.assert_allclose(episode.action[:-1, 0], episode.state[1:, 0], atol=1e-6)


@pytest.mark.parametrize("mode", ["delta", "absolute"])
def test_a_joint_that_is_not_revolute_is_never_wrapped(mode):
    """A gripper whose value passes pi, or jumps by more than pi, is no angle."""
    names = (*JOINTS[:5], "finger_width")
    take = one_joint(lambda t: np.where(t < 2, 1 + t, 50 + t), joint=5)
    episode = sync(take, joint_names=names, action_mode=mode)
    want = np.interp(episode.time_ns - T0_NS, take.joint_ns - T0_NS, take.joint_rad[:, 5])
    np.testing.assert_allclose(episode.state[:, 5], want, rtol=1e-6)
    target = want[1:] if mode == "absolute" else np.diff(want)
    np.testing.assert_allclose(episode.action[:-1, 5], target, atol=1e-4)


def test_joint_sign():
    """joint_sign counts only with apply_joint_sign, for states and actions alike."""
    take, sign = make_take(seconds=1.0), [1, -1, 1, -1, -1, 1]
    plain, ignored = sync(take), sync(take, joint_sign=sign)
    signed = sync(take, joint_sign=sign, apply_joint_sign=True)
    np.testing.assert_array_equal(plain.state, ignored.state)
    np.testing.assert_allclose(signed.state, plain.state * np.array(sign), atol=1e-6)
    np.testing.assert_allclose(signed.action, plain.action * np.array(sign), atol=1e-6)


def test_deltas_integrate_to_the_states():
    """Within a segment the start plus the sum of deltas is every later state, modulo whole turns."""
    episode = sync(without(make_take(seconds=3.0), camera=(1.0, 1.5)))
    assert len(episode.segments) == 2
    for start, stop in episode.segments:
        path = episode.state[start] + np.cumsum(episode.action[start : stop - 1], axis=0, dtype=np.float64)
        np.testing.assert_allclose(wrap_to_pi(path - episode.state[start + 1 : stop]), 0, atol=1e-5)


def test_absolute_is_the_next_state():
    """Where nothing wraps, action[t] is state[t+1] to the bit."""
    episode = sync(make_take(seconds=2.0), action_mode="absolute", wrap_angles=False)
    np.testing.assert_array_equal(episode.action[:-1], episode.state[1:])


def test_no_motion_stays_on_the_turn_of_the_recorded_action():
    """A joint at -3 rad whose recorded action is 3.3 rad stays at -3 + 2 pi; a gripper that opens by 5 is no angle."""
    state, recorded = np.array([[-3.0, 0.5, 80.0]], np.float32), np.array([[3.3, 0.6, 85.0]], np.float32)
    stays = no_motion(state, recorded, np.array([True, True, False]), "absolute")
    np.testing.assert_allclose(stays, [[2 * np.pi - 3, 0.5, 80]], rtol=1e-6)
    assert stays.dtype == np.float32
    assert (no_motion(state, recorded, np.array([True, True, False]), "delta") == 0).all()


# -- the sync report ----------------------------------------------------------------------------------------------


def test_report_of_a_slow_camera_and_a_resting_robot():
    """Each number of the report against what was recorded; it goes through json as it is."""
    take = one_joint(lambda t: np.where(t < 1, 0.2 * np.sin(6 * t), 0.2 * np.sin(6)), camera_hz=10)
    episode = sync(take, max_offset_ms=60)
    report = json.loads(json.dumps(episode.sync_report))
    assert report == episode.sync_report
    frames = len(episode.time_ns)
    assert (report["episode"], report["frames"], report["dropped"], report["segments"]) == ("a", frames, 0, 1)
    assert report["repeated_images"] == {"color": frames - len(take.camera_ns)}
    assert report["unused_images"] == {"color": 0}
    assert report["topics"][CAMERA_TOPIC]["rate_hz"] == pytest.approx(10, abs=0.05)
    assert report["topics"][JOINT_TOPIC]["rate_hz"] == pytest.approx(125, abs=0.05)
    assert report["topics"][JOINT_TOPIC]["messages"] == 500
    assert report["topics"][JOINT_TOPIC]["starts_s"] == pytest.approx(-0.02, abs=1e-3)
    assert report["joints_never_moved"] == list(JOINTS[1:])
    assert report["still_share"] == pytest.approx(0.75, abs=0.02)
    assert report["image_size"] == {"color": [2, 2]}
    text = sync_table([report])
    assert "never moved: shoulder_lift_joint" in text and f"1 episodes, {frames} frames kept" in text


def test_report_counts_unused_images():
    """A camera faster than fps leaves images that no frame shows."""
    take = make_take(seconds=2.0, camera_hz=60)
    report = sync(take).sync_report
    assert report["unused_images"] == {"color": len(take.camera_ns) - report["frames"]}
    assert report["repeated_images"] == {"color": 0}


@pytest.mark.parametrize("late", ["joints", "camera"])
def test_topics_that_start_late_and_stop_early(late):
    """Only the time in which every topic was recorded becomes frames."""
    take = without(without(make_take(seconds=3.0), **{late: (0, 0.8)}), **{late: (2.3, 9)})
    episode = sync(take)
    times = take.joint_ns if late == "joints" else take.camera_ns
    assert times[0] <= episode.time_ns[0] < times[0] + 34e6
    assert times[-1] - 34e6 < episode.time_ns[-1] <= times[-1]
    assert episode.sync_report["dropped"] == 0


def test_a_camera_that_dies_early():
    """What frames cover is held against what was recorded, from any topic's first message to any one's last."""
    take = one_joint(lambda t: np.sin(t), seconds=20)
    recording = take.recording()
    recording.camera_time_ns["wrist"] = take.camera_ns[:60]
    recording.image_shape["wrist"] = (2, 2)
    cameras = {"color": CAMERA_TOPIC, "wrist": "/wrist"}
    episode = synchronise("a", recording, settings(Path("bags"), camera_topics=cameras, min_used_share=0.09))
    report = episode.sync_report
    assert (len(episode.time_ns), report["dropped"], report["used_s"], report["recorded_s"]) == (60, 0, 2.0, 20.025)
    assert report["image_size"] == {"color": [2, 2], "wrist": [2, 2]}
    names, row, *_ = (re.split(" {2,}", line) for line in sync_table([report]).splitlines())
    shown = dict(zip(names, row, strict=True))
    assert (shown["recorded s"], shown["used s"], shown["camera Hz"]) == ("20.0", "2.0", "30.0/30.0")
    wanted = settings(Path("bags"), camera_topics=cameras, min_used_share=0.11)
    message = error_of(lambda: synchronise("a", recording, wanted))
    assert "a: frames cover 2.0 of the 20.0 s that were recorded, 10%" in message
    assert f"data.min_used_share 0.11: {JOINT_TOPIC} 0.0 to 20.0 s, {CAMERA_TOPIC} 0.0 to 20.0 s, /wrist" in message
    assert "/wrist 0.0 to 2.0 s, and in the time of all of them 0 frames were dropped" in message


def test_a_recording_that_is_mostly_gaps():
    """Frames that are dropped in between count as well."""
    take = without(make_take(seconds=3.0), camera=(0.5, 2.5))
    assert "frames cover 1.0 of the 3.0 s" in error_of(lambda: sync(take, min_used_share=0.5))
    assert sync(take, min_used_share=0.25).sync_report["used_s"] == pytest.approx(0.95, abs=0.1)


def test_chunks_that_are_mostly_padding():
    """Said with their share, and what heals it: the offset for a slow topic, else a shorter chunk or no gaps."""
    rng = np.random.default_rng(0)
    joint_ns = T0_NS + np.cumsum(rng.uniform(95, 155, 160) * 1e6).astype(np.int64)  # joints at 8 Hz, and a bit
    slow = one_joint(np.sin, seconds=20)
    slow = dataclasses.replace(slow, joint_ns=joint_ns, joint_rad=np.tile(np.sin((joint_ns - T0_NS) / 1e9), (6, 1)).T)
    episode = sync(slow)
    (note,) = data_notes([episode], 100, settings(Path("bags")))
    stop, frames = episode.action_stop, np.arange(len(episode.time_ns))
    sampled = frames < stop
    padding = 1 - np.minimum(stop - frames, 100)[sampled].mean() / 100
    assert f"{padding:.0%} of the actions in chunks are padding" in note and padding > 0.9
    assert f"{JOINT_TOPIC} comes every 12" in note and "data.max_offset_ms: 77 instead of 50" in note
    healed = sync(slow, max_offset_ms=77)
    assert len(healed.time_ns) > 0.95 * 20 * 30 > 1.3 * len(episode.time_ns)
    assert not [*data_notes([sync(one_joint(np.sin, seconds=20))], 100, settings(Path("bags")))]
    short = sync(one_joint(np.sin, seconds=2))
    (note,) = data_notes([short], 100, settings(Path("bags")))
    assert f"lower model.chunk_size to about {len(short.time_ns) - 1}, or record longer" in note
    holes = one_joint(np.sin, seconds=12)
    for start in np.arange(0.5, 12):
        holes = without(holes, camera=(start, start + 0.5))
    (note,) = data_notes([sync(holes)], 100, settings(Path("bags")))
    assert "the topics have gaps" in note and "12 segments" in note


def test_topics_that_do_not_overlap():
    """The line gives each topic's span, so that one sees which clock is off."""
    take = make_take(seconds=1.0)
    message = error_of(lambda: sync(dataclasses.replace(take, camera_ns=take.camera_ns + 5 * 10**9)))
    assert "do not overlap" in message and CAMERA_TOPIC in message and "1700000005.020" in message


def test_broken_stamps():
    """A recording that spans years is refused before it fills the memory."""
    take = make_take(seconds=1.0)
    year = 365 * 86400 * 10**9
    stretched = dataclasses.replace(take, joint_ns=take.joint_ns.copy(), camera_ns=take.camera_ns.copy())
    stretched.joint_ns[-1] += 3 * year
    stretched.camera_ns[-1] += 3 * year
    assert "more than a day" in error_of(lambda: sync(stretched))
    stretched.camera_ns[-1] -= 3 * year  # one topic alone: the other one's end bounds the grid
    assert sync(stretched).sync_report["frames"] > 10


def set_back(times_ns, at_s=2.0, by_s=1.5):
    """Times by a clock that is set back, once, `at_s` after the start."""
    return np.where(times_ns - T0_NS < at_s * 1e9, times_ns, times_ns - round(by_s * 1e9))


@both_storages
def test_a_clock_that_is_set_back(tmp_path, storage):
    """Two motions at one time, were they sorted: refused with time and size, cached or not; the other clock is fine."""
    take = make_take(seconds=3.0, size=(80, 100))  # of several chunks in an mcap
    messages = take.messages()
    stepped = [(topic, int(set_back(np.int64(n))), message) for topic, n, message in messages]
    write_bag(tmp_path / "bags" / "a", stepped, storage)
    for _ in range(2):
        message = error_of(lambda: load_episodes(settings(tmp_path / "bags"), 1, False))
        assert message.startswith(
            f"a: {JOINT_TOPIC}: the clock steps back by 1.492 s after message 250, from 1700000001.992"
        )
        assert "to 1700000000.500 s" in message and "data.time_source: header" in message
    write_bag(tmp_path / "right" / "a", messages, storage)
    by_header, right = (
        load_episodes(settings(tmp_path / name, time_source="header"), 1, False)[0][0] for name in ("bags", "right")
    )
    np.testing.assert_array_equal(by_header.state, right.state)


@pytest.mark.parametrize("who", ["camera", "one joint"])
def test_any_clock_that_is_set_back(who):
    """A camera's header, or that of one publisher of several: named."""
    take = make_take(seconds=3.0, size=(2, 2))
    if who == "camera":
        take.camera_ns = set_back(take.camera_ns)
    else:
        take.joint_rad[::2, 5], take.joint_rad[1::2, :5] = np.nan, np.nan
        take.joint_ns[1::2] = set_back(take.joint_ns[1::2])
    message = error_of(lambda: sync(take, time_source="header"))
    assert message.startswith(f"a: {CAMERA_TOPIC if who == 'camera' else f'{JOINT_TOPIC} (wrist_3_joint)'}: the clock")
    assert "data.time_source: receive" in message


LATE = {  # orders of 375 messages in the file
    "single messages": np.argsort(np.arange(375) + 3 * (np.arange(375) % 7 == 0), kind="stable"),
    "files in a wrong order": np.roll(np.arange(375), -195),
    "files that overlap by a message": [193, *range(195, 375), *range(193), 194],
}


@pytest.mark.parametrize("order", LATE.values(), ids=list(LATE))
def test_messages_that_are_late_are_put_in_order(order):
    """By some milliseconds, or because a split recording's files were read in another order: as if they were not."""
    take = make_take(seconds=3.0, size=(2, 2))
    mixed = dataclasses.replace(take, joint_ns=take.joint_ns[order], joint_rad=take.joint_rad[order])
    assert np.diff(mixed.joint_ns).min() < 0 and len(mixed.joint_ns) == 375
    np.testing.assert_array_equal(sync(mixed).state, sync(take).state)


@pytest.mark.parametrize("wrong", [np.degrees(1.2), -400.0, 1e300])
def test_positions_in_degrees(wrong):
    """An arm beyond what a UR can reach is refused, naming bag, joint, value and time; a gripper is no angle."""
    take = make_take(seconds=1.0)
    take.joint_rad[60, 2] = wrong
    message = error_of(lambda: sync(take))
    assert message.startswith(f"a: {JOINT_TOPIC}: elbow_joint is {wrong:.6g} at 1700000000.480 s, which ")
    assert ("is no angle" if wrong == 1e300 else "looks like degrees") in message and "pi / 180" in message
    if wrong != 1e300:
        sync(take, joint_names=(*JOINTS[:2], "finger_joint", *JOINTS[3:]))
    two_turns = make_take(seconds=1.0, path=lambda t: smooth_path(t) + 4 * np.pi)  # a driver that counts turns
    assert sync(two_turns).sync_report["dropped"] == 0


def test_no_frame_within_the_offset():
    """Topics that overlap but never come near each other: the offsets are said, and one that would do."""
    take = make_take(seconds=2.0, joint_hz=2)
    sparse = dataclasses.replace(take, camera_ns=take.camera_ns[::20] + 100_000_000, images=take.images[::20])
    message = error_of(lambda: sync(sparse, max_offset_ms=1, fps=1.5))
    assert "data.max_offset_ms 1" in message and JOINT_TOPIC in message and "ms" in message
    enough_ms = int(re.search(r"data.max_offset_ms: (\d+) would keep 95% of the frames", message)[1])
    assert sync(sparse, max_offset_ms=enough_ms, fps=1.5).sync_report["dropped"] == 0


def test_still_robot_is_refused():
    """All joints constant: not the live robot."""
    take = one_joint(lambda t: 1e-5 * np.sin(50 * t))
    assert "no joint moves" in error_of(lambda: sync(take))
