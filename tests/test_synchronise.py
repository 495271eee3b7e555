"""From recordings to samples: time grid, gaps and segments, joint conventions, actions, chunks, statistics, split."""

from __future__ import annotations

import dataclasses
import json
import shutil
from pathlib import Path

import numpy as np
import pytest

import rosbag_dataset as rd
from tests.bags import (
    CAMERA_TOPIC,
    JOINT_TOPIC,
    JOINTS,
    T0_NS,
    Take,
    clock,
    make_take,
    noise_images,
    settings,
    smooth_path,
    write_bag,
)


def sync(take, **changes):
    return rd.synchronise("a", take.recording(), settings(Path("bags"), **changes))


def one_joint(path, hz=125.0, seconds=4.0, camera_hz=30.0, joint=0):
    """A take in which one joint follows `path(t)` and the others rest at 0."""

    def all_joints(t):
        rad = np.zeros((len(t), 6))
        rad[:, joint] = path(t)
        return rad

    return make_take(seconds=seconds, path=all_joints, size=(2, 2), joint_hz=hz, camera_hz=camera_hz)


def without(take, joints=(0, 0), camera=(0, 0)):
    """The take less its samples in these stretches, in seconds from its start."""

    def outside(times, stretch):
        seconds = (times - T0_NS) / 1e9
        return (seconds < stretch[0]) | (seconds >= stretch[1])

    j, c = outside(take.joint_ns, joints), outside(take.camera_ns, camera)
    return Take(take.joint_ns[j], take.joint_rad[j], take.camera_ns[c], take.images[c])


def error_of(action):
    with pytest.raises(rd.BagError) as caught:
        action()
    assert len(str(caught.value).splitlines()) == 1
    return str(caught.value)


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
    assert episode.report["repeated_images"] == {"color": 0} and episode.report["unused_images"] == {"color": 0}


def test_the_first_camera_anchors_the_grid():
    """With two cameras it is the first of data.camera_topics, from where every topic has begun."""
    take = make_take(seconds=1.0)
    times = {"color": take.camera_ns, "wrist": take.camera_ns + 7_000_000}
    for names, anchor in ((("color", "wrist"), times["color"][1]), (("wrist", "color"), times["wrist"][0])):
        topics = {camera: f"/{camera}" for camera in names}
        recording = dataclasses.replace(take.recording(), camera_time_ns={c: times[c] for c in names})
        assert rd.synchronise("a", recording, settings(Path("bags"), camera_topics=topics)).time_ns[0] == anchor


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
    report = episode.report["topics"][CAMERA_TOPIC]
    assert report["offset_ms_worst"] == pytest.approx(chosen.max() / 1e6, abs=0.006)
    assert report["offset_ms_median"] == pytest.approx(np.median(chosen) / 1e6, abs=0.006)


def test_nearest_index():
    """The earlier one on a tie, the ends beyond the ends."""
    times = np.array([10, 20, 20, 40])
    assert times[rd.nearest_index(times, np.array([-5, 10, 14, 15, 16, 30, 31, 99]))].tolist() == [
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
    (shuffled, in_order), _ = rd.load_episodes(settings(tmp_path / "bags"), 1, False)
    np.testing.assert_array_equal(shuffled.time_ns, in_order.time_ns)
    np.testing.assert_array_equal(shuffled.state, in_order.state)
    np.testing.assert_array_equal(shuffled.action, in_order.action)
    frames = [rd.open_pixels(e, "color")[e.image_index["color"]] for e in (shuffled, in_order)]
    np.testing.assert_array_equal(frames[0], frames[1])
    np.testing.assert_array_equal(frames[1], take.images)


def test_equal_stamps():
    """Two joint samples or images of one time do no harm: finite states, no division by zero."""
    take = make_take(seconds=1.0)
    take.joint_ns[1::2] = take.joint_ns[:-1:2]
    take.camera_ns[1] = take.camera_ns[0]
    with np.errstate(all="raise"):
        episode = sync(take)
    assert np.isfinite(episode.state).all() and 0 <= episode.report["still_share"] <= 1
    doubled = np.interp(episode.time_ns, take.joint_ns[1::2], take.joint_rad[1::2, 0])  # the later of each pair
    np.testing.assert_allclose(episode.state[:, 0], doubled, atol=1e-5)


# -- gaps and segments --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("gap", ["camera", "joints"])
def test_gap_drops_frames_and_cuts(gap):
    """A gap longer than max_offset on either side drops exactly the frames without a sample near enough."""
    take = without(make_take(seconds=3.0), **{gap: (1.0, 1.6)})
    episode = sync(take, max_offset_ms=50)
    times = take.camera_ns if gap == "camera" else take.joint_ns
    assert np.abs(times[None] - episode.time_ns[:, None]).min(axis=1).max() <= 50e6
    steps = np.diff(episode.time_ns)
    (cut,) = np.flatnonzero(steps > 40e6)
    assert episode.segments.tolist() == [[0, cut + 1], [cut + 1, len(episode.time_ns)]]
    dropped = round(steps[cut] * 30 / 1e9) - 1
    assert episode.report["dropped"] == dropped and 14 <= dropped <= 16  # 0.6 s less 50 ms on either side
    assert episode.report["segments"] == 2 and episode.report["frames"] == len(episode.time_ns)
    assert (episode.action[cut] == 0).all() and (episode.action[-1] == 0).all()
    assert episode.action_stop.tolist() == [cut] * (cut + 1) + [len(steps)] * (len(steps) - cut)


def test_gap_shorter_than_the_offset_cuts_nothing():
    """What max_offset allows is bridged: one segment, the missing image shown twice."""
    episode = sync(without(make_take(seconds=2.0), camera=(1.0, 1.03)))
    assert len(episode.segments) == 1 and episode.report["dropped"] == 0
    assert episode.report["repeated_images"] == {"color": 1}


def test_single_frames_between_gaps():
    """A segment of one frame has no action, hence no sample; the report counts frames without one."""
    take = make_take(seconds=2.0)
    keep = [*range(8), 20, *range(33, len(take.camera_ns))]
    take = dataclasses.replace(take, camera_ns=take.camera_ns[keep], images=take.images[keep])
    episode = sync(take, max_offset_ms=10)
    assert np.diff(episode.segments, axis=1).ravel().tolist()[:2] == [8, 1]
    assert episode.report["frames_without_action"] == 3
    samples = rd.ChunkDataset([episode], 4)
    assert len(samples) == episode.report["frames"] - 3
    assert 8 not in [samples.locate(i)[1] for i in range(len(samples))]


@pytest.mark.parametrize("mode", ["delta", "absolute"])
def test_no_action_and_no_chunk_crosses_a_gap_or_an_episode(tmp_path, mode):
    """Joint 0 grows by 0.01 rad a frame, jumps in a gap and differs by episode, so that a crossing would show."""
    episodes = []
    for number in range(3):
        take = one_joint(lambda t, n=number: 0.3 * t + np.where(t >= 1.5, 1.0, 0.0) + 0.05 * n, seconds=3.0)
        episode = sync(without(take, camera=(1.2, 1.8), joints=(1.3, 1.7)), action_mode=mode)
        assert len(episode.segments) == 2
        episodes.append(with_pixels(episode, tmp_path / str(number)))
    samples = rd.ChunkDataset(episodes, chunk_size=20)
    assert len(samples) == sum(len(e.time_ns) - 2 for e in episodes)
    for i in range(len(samples)):
        sample = samples[i]
        name, t = samples.locate(i)
        episode = episodes[i * 3 // len(samples)]
        start, stop = next(s for s in episode.segments if s[0] <= t < s[1])
        valid = min(20, stop - 1 - t)
        assert valid > 0
        assert sample["action_is_pad"].tolist() == [False] * valid + [True] * (20 - valid)
        assert (sample["action"][valid:] == 0).all()
        action = sample["action"][:valid, 0]
        if mode == "delta":
            np.testing.assert_allclose(action, 0.01, atol=1e-5)
        else:
            want = sample["observation.state"][0] + 0.01 * np.arange(1, valid + 1)
            np.testing.assert_allclose(action, want, atol=1e-5)


def with_pixels(episode, entry):
    """Store for each image a grey level that tells which one it is."""
    entry.mkdir()
    count, shape = episode.stored_images["color"], episode.image_shape["color"]
    levels = np.arange(count, dtype=np.uint8)[:, None, None, None]
    np.broadcast_to(levels, (count, *shape, 3)).tofile(entry / "color.rgb")
    return dataclasses.replace(episode, entry=entry)


def test_episode_shorter_than_a_chunk(tmp_path):
    """Allowed: every sample is padded, and the padding starts where the episode ends."""
    take = make_take(seconds=0.4)
    episode = with_pixels(sync(take), tmp_path / "entry")
    samples = rd.ChunkDataset([episode], chunk_size=100)
    frames = len(episode.time_ns)
    assert len(samples) == frames - 1 < 100
    batch = samples.__getitems__(list(range(len(samples))))
    assert (~batch["action_is_pad"]).sum(axis=1).tolist() == list(range(frames - 1, 0, -1))
    assert batch["action"].shape == (frames - 1, 100, 6)
    np.testing.assert_array_equal(batch["action"][0, : frames - 1], episode.action[:-1])
    assert batch["observation.images.color"][:, 0, 0, 0].tolist() == list(range(frames - 1))


# -- conventions --------------------------------------------------------------------------------------------------


def turning(t):
    """From 2.6 rad on at 0.4 rad/s: over the seam, on to 4.2 rad."""
    return 2.6 + 0.4 * t


def test_wrapped_states_and_small_deltas():
    """A path over the seam: states in (-pi, pi], none in between, and deltas that know no seam."""
    take = one_joint(turning)
    take.joint_rad[:] = rd.wrap_to_pi(take.joint_rad)  # as a driver that wraps by itself
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
    wrapped = rd.wrap_to_pi(near)
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
        np.testing.assert_allclose(rd.wrap_to_pi(path - episode.state[start + 1 : stop]), 0, atol=1e-5)


def test_absolute_is_the_next_state():
    """Where nothing wraps, action[t] is state[t+1] to the bit."""
    episode = sync(make_take(seconds=2.0), action_mode="absolute", wrap_angles=False)
    np.testing.assert_array_equal(episode.action[:-1], episode.state[1:])


# -- report -------------------------------------------------------------------------------------------------------


def test_report_of_a_slow_camera_and_a_resting_robot():
    """Each number of the report against what was recorded; it goes through json as it is."""
    take = one_joint(lambda t: np.where(t < 1, 0.2 * np.sin(6 * t), 0.2 * np.sin(6)), camera_hz=10)
    episode = sync(take, max_offset_ms=60)
    report = json.loads(json.dumps(episode.report))
    assert report == episode.report
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
    text = rd.report_table([report])
    assert "never moved: shoulder_lift_joint" in text and f"1 episodes, {frames} frames kept" in text


def test_report_counts_unused_images():
    """A camera faster than fps leaves images that no frame shows."""
    take = make_take(seconds=2.0, camera_hz=60)
    report = sync(take).report
    assert report["unused_images"] == {"color": len(take.camera_ns) - report["frames"]}
    assert report["repeated_images"] == {"color": 0}


def test_copies_are_reported_and_kept_together(tmp_path):
    """A bag with the bytes of another says so, in the report and in the table."""
    bag = write_bag(tmp_path / "bags" / "a", make_take(seconds=0.3).messages())
    (tmp_path / "bags" / "b").symlink_to(tmp_path / "copy")
    shutil.copytree(bag, tmp_path / "copy")
    write_bag(tmp_path / "bags" / "c", make_take(seconds=0.3, seed=1).messages())
    episodes, _ = rd.load_episodes(settings(tmp_path / "bags"), 1, False)
    assert [e.report["same_bytes_as"] for e in episodes] == ["", "a", ""]
    assert "b has the same bytes as a" in rd.report_table([e.report for e in episodes])


@pytest.mark.parametrize("late", ["joints", "camera"])
def test_topics_that_start_late_and_stop_early(late):
    """Only the time in which every topic was recorded becomes frames."""
    take = without(without(make_take(seconds=3.0), **{late: (0, 0.8)}), **{late: (2.3, 9)})
    episode = sync(take)
    times = take.joint_ns if late == "joints" else take.camera_ns
    assert times[0] <= episode.time_ns[0] < times[0] + 34e6
    assert times[-1] - 34e6 < episode.time_ns[-1] <= times[-1]
    assert episode.report["dropped"] == 0


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
    assert sync(stretched).report["frames"] > 10


def test_no_frame_within_the_offset():
    """Topics that overlap but never come near each other: the offsets are said."""
    take = make_take(seconds=2.0, joint_hz=2)
    sparse = dataclasses.replace(take, camera_ns=take.camera_ns[::20] + 100_000_000, images=take.images[::20])
    message = error_of(lambda: sync(sparse, max_offset_ms=1, fps=1.5))
    assert "data.max_offset_ms 1" in message and JOINT_TOPIC in message and "ms" in message


def test_still_robot_is_refused():
    """All joints constant: not the live robot."""
    take = one_joint(lambda t: 1e-5 * np.sin(50 * t))
    assert "no joint moves" in error_of(lambda: sync(take))


# -- statistics ---------------------------------------------------------------------------------------------------


def episodes_with_pixels(tmp_path, seeds, **changes):
    """Episodes of different paths, lengths and images, with a gap in each, and their stored images."""
    out, images = [], []
    for seed in seeds:
        take = make_take(
            seconds=1.5 + seed / 2, path=lambda t, s=seed: smooth_path(t * (1 + s)) + 0.1 * s, seed=seed, size=(5, 7)
        )
        take = without(take, camera=(0.5, 0.8))
        episode = sync(take, **changes)
        entry = tmp_path / f"entry{seed}"
        entry.mkdir()
        (take.images // (1 + seed)).tofile(entry / "color.rgb")
        out.append(dataclasses.replace(episode, entry=entry, name=f"e{seed}"))
        images.append(take.images // (1 + seed))
    return out, images


@pytest.mark.parametrize("mode", ["delta", "absolute"])
def test_statistics_are_those_of_all_training_frames(tmp_path, mode):
    """Streamed statistics equal numpy's over everything at once: states, actions that exist, every stored pixel."""
    episodes, images = episodes_with_pixels(tmp_path, range(3), action_mode=mode)
    for _ in range(2):  # the second time from the moments that are kept beside the pixels
        stats, floored = rd.compute_stats(episodes, "dataset", mode)
        state = np.concatenate([e.state for e in episodes]).astype(np.float64)
        action = np.concatenate([e.action[a : b - 1] for e in episodes for a, b in e.segments]).astype(np.float64)
        pixels = np.concatenate([i.reshape(-1, 3) for i in images]) / 255
        for key, rows in (("observation.state", state), ("action", action)):
            np.testing.assert_allclose(stats[key]["mean"], rows.mean(axis=0), rtol=1e-5, atol=1e-7)
            np.testing.assert_allclose(stats[key]["std"], rows.std(axis=0), rtol=1e-5)
        color = stats["observation.images.color"]
        np.testing.assert_allclose(color["mean"].ravel(), pixels.mean(axis=0), rtol=1e-5)
        np.testing.assert_allclose(color["std"].ravel(), pixels.std(axis=0), rtol=1e-5)
        assert color["mean"].shape == (3, 1, 1) and not floored


def test_imagenet_statistics(tmp_path):
    """The default: ImageNet's numbers, and no pixel is read."""
    episodes, _ = episodes_with_pixels(tmp_path, [0])
    (tmp_path / "entry0" / "color.rgb").unlink()
    color = rd.compute_stats(episodes, "imagenet", "delta")[0]["observation.images.color"]
    np.testing.assert_allclose(color["mean"].ravel(), [0.485, 0.456, 0.406], rtol=1e-6)
    np.testing.assert_allclose(color["std"].ravel(), [0.229, 0.224, 0.225], rtol=1e-6)


@pytest.mark.parametrize(("mode", "floor"), [("delta", 1e-4), ("absolute", 1e-2)])
def test_deviations_have_a_floor(tmp_path, mode, floor):
    """A joint that never moves gets the documented floor, is named, and nothing is infinite; black images too."""
    episode = with_pixels(sync(one_joint(turning), action_mode=mode), tmp_path / "entry")
    (tmp_path / "entry" / "color.rgb").write_bytes(bytes((tmp_path / "entry" / "color.rgb").stat().st_size))
    stats, floored = rd.compute_stats([episode], "dataset", mode)
    np.testing.assert_allclose(stats["observation.state"]["std"][1:], 1e-2)
    np.testing.assert_allclose(stats["action"]["std"][1:], floor)
    np.testing.assert_allclose(stats["observation.images.color"]["std"], 1 / 255)
    assert stats["observation.state"]["std"][0] > 0.1
    resting = {f"{key}[{j}]" for key in ("observation.state", "action") for j in range(1, 6)}
    steady = {"action[0]"} if mode == "delta" else set()  # joint 0 turns at one speed: its deltas do not vary
    assert {line.split(":")[0] for line in floored} == resting | steady


def test_statistics_without_any_action():
    """Single frames only: nothing to learn, said in one line."""
    episode = sync(make_take(seconds=2.0), fps=30)
    first = {key: getattr(episode, key)[:1] for key in ("time_ns", "state", "action")}
    alone = dataclasses.replace(episode, **first, segments=np.array([[0, 1]]))
    assert "no action to learn" in error_of(lambda: rd.compute_stats([alone], "imagenet", "delta"))


# -- training and validation --------------------------------------------------------------------------------------


def named(count, copies=()):
    """Episodes of which only name and content matter; `copies` maps an episode's number to the one it copies."""
    blank = sync(make_take(seconds=0.3))
    copies = dict(copies)
    return [dataclasses.replace(blank, name=f"e{i:02}", content=f"hash{copies.get(i, i)}") for i in range(count)]


@pytest.mark.parametrize(
    ("count", "fraction", "held_out"),
    [
        (4, 0.1, 0),
        (5, 0.1, 1),
        (9, 0.1, 1),
        (20, 0.1, 2),
        (10, 0.5, 5),
        (5, 0.0, 0),
        (4, 0.5, 2),
        (1, 0.9, 0),
        (2, 1, 1),
    ],
)
def test_how_many_are_held_out(count, fraction, held_out):
    """val_fraction of the episodes, at least one of five or more, never all."""
    training, validation = rd.split_episodes(named(count), fraction, seed=3)
    assert len(validation) == held_out and len(training) == count - held_out > 0
    assert sorted(e.name for e in training + validation) == [e.name for e in named(count)]


def test_split_is_deterministic():
    """By the seed alone; another seed splits otherwise."""
    splits = [[e.name for e in rd.split_episodes(named(30), 0.2, seed)[1]] for seed in (1, 1, 2)]
    assert splits[0] == splits[1] != splits[2]
    assert splits[0] == sorted(splits[0])


@pytest.mark.parametrize("seed", range(20))
def test_copies_stay_on_one_side(seed):
    """The same recording twice never sits in training and validation at once."""
    training, validation = rd.split_episodes(named(10, {7: 2, 9: 2, 8: 0}.items()), 0.3, seed)
    assert not {e.content for e in training} & {e.content for e in validation}
    assert validation


def test_validation_episodes_do_not_touch_the_statistics(tmp_path):
    """Statistics of the training side are the same whatever the held-out episode holds."""
    episodes, _ = episodes_with_pixels(tmp_path, range(6))
    training, validation = rd.split_episodes(episodes, 0.2, 0)
    before = rd.compute_stats(training, "dataset", "delta")[0]
    for episode in validation:
        episode.state += 100
        (episode.entry / "color.rgb").write_bytes(b"\xff" * (episode.entry / "color.rgb").stat().st_size)
    after = rd.compute_stats(rd.split_episodes(episodes, 0.2, 0)[0], "dataset", "delta")[0]
    for key in before:
        np.testing.assert_array_equal(before[key]["mean"], after[key]["mean"])
        np.testing.assert_array_equal(before[key]["std"], after[key]["std"])
