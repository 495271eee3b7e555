"""sim.rollout: the simulated step is what a recording holds, the criterion and the figures are right, and a policy
that does not look is seen to fail."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import av
import numpy as np
import pyarrow.parquet as pq
import pytest
from PIL import Image
from ur10e_deploy.policy_runner import PolicyRunner, step_together
from ur10e_deploy.sources import BagSource

from sim import rollout, rollout_pictures
from sim.closed_loop import GREY, MEAN_BLOCK, OTHER
from sim.expert import random_episode
from sim.record import CAMERA_LATENCY_S, plan_episode
from sim.rollout_measures import LINK_RADIUS_M, depths, measure, stalled_s, wilson
from sim.scene import Renderer
from sim.world import HELD_S, IMAGE_AGE_S, PERTURBATIONS, Conditions, World, goal_m, judge
from tests.policies import (
    as_batch,
    contract_of,
    save_ours,
    trained,
    trained_absolute,
    trained_relative,
    two_cameras_contract,
)
from ur10e import SPEED_LIMIT_RAD_S, inverse_kinematics, link_frames, tool_tip

__all__ = ["trained", "trained_absolute", "trained_relative"]  # fixtures
SIZE = (96, 128)  # of sample_bags


def follow(world: World, path_rad: np.ndarray) -> World:
    """Command every row of path_rad (T, 6) but the first, where the arm is."""
    for q_rad in path_rad[1:]:
        world.command(q_rad)
    return world


def straight_down(world: World, end_m: np.ndarray, seconds: float = 4.0) -> World:
    """Move the arm evenly to the pose with its tip at end_m (3,), and stay there for a second."""
    share = np.minimum(np.arange(int((seconds + 1) * 30) + 1) / (seconds * 30), 1.0)[:, None]
    start = world.expert.start_rad
    return follow(world, start + share * (inverse_kinematics(end_m) - start))


# -- the step ------------------------------------------------------------------------------------------------------


def test_a_recording_replayed_as_commands_gives_its_frames_and_states(trained: Path, sample_bags: Path, tmp_path: Path):
    """A policy sees in the cell what it saw in training: frames captured at the same moments are the same pixels, and
    of all constant ages the one that the world gives its images fits best."""
    index, config = 1, contract_of(trained)["config"]
    values = config["data"] | config["conventions"] | {"image_resize": None}
    source = BagSource(sample_bags, values, tmp_path / "cache")
    episode = source.episode(index)
    world = World(7, index, *SIZE)
    follow(world, episode.state_rad)
    np.testing.assert_allclose(world.path_rad, episode.state_rad, rtol=0, atol=1e-3)

    events = [(receive, stamp) for receive, stamp, _, kind in plan_episode(7, index)[2] if kind == "camera"]
    receive_ns, stamp_ns = np.array(events).T
    frames = list(source.frames(index, 0, len(episode.timestamp_s)))
    begin_ns = receive_ns[0]
    error = {age_s: [] for age_s in (0.0, IMAGE_AGE_S, 2 * IMAGE_AGE_S)}
    exact = []
    for t, frame in enumerate(frames):
        shown = np.argmin(np.abs(receive_ns - (begin_ns + t * 1e9 / 30)))
        captured_s = (stamp_ns[shown] - begin_ns) / 1e9  # on the clock of the grid, which the world counts from
        difference = world.image(at_s=captured_s + IMAGE_AGE_S).astype(int) - frame.images["color"]
        exact.append(np.abs(difference).mean())
        for age_s, errors in error.items():
            seen = world.image(at_s=t / 30 - age_s + IMAGE_AGE_S).astype(int)
            errors.append(np.abs(seen - frame.images["color"]).mean())
    assert max(exact) < 0.1, max(exact)  # grey levels; the path between two ticks is straight here, curved there
    moving = slice(20, 80)
    fit = {age_s: np.mean(errors[moving]) for age_s, errors in error.items()}
    assert min(fit, key=fit.get) == IMAGE_AGE_S and fit[0.0] > 1.5 * fit[IMAGE_AGE_S], fit
    assert IMAGE_AGE_S == pytest.approx(np.mean(CAMERA_LATENCY_S))
    assert world.scene == random_episode(7, index)[0]


def test_the_same_numbers_are_the_same_episode():
    """reset() forgets everything, also the pose that the image still shows; noise is drawn anew in the same way."""
    fresh, used = (
        World(3, i, *SIZE, conditions=Conditions(lag_s=0.05, image_noise=10, camera_shift_m=0.02)) for i in (7, 8)
    )
    follow(used, used.expert.position(np.arange(60) / 30)).image()
    used.reset(3, 7)
    assert used.time_s == 0 and len(used.path_rad) == 1
    path = fresh.expert.position(np.arange(30) / 30)
    first, again = ([world.observe(), follow(world, path).observe()] for world in (fresh, used))
    for (state, image), (same_state, same_image) in zip(first, again, strict=True):
        np.testing.assert_array_equal(state, same_state)
        np.testing.assert_array_equal(image, same_image)


def test_an_ideal_arm_is_where_it_was_told_and_a_lagging_one_is_first_order():
    """Behind a ramp of v rad/s a first-order lag of T is v T (1 - exp(-t / T)) behind; speed limits hold only there."""
    ramp = np.arange(31)[:, None] / 30 * 0.5
    ideal, lagging = World(0, 0), World(0, 0, conditions=Conditions(lag_s=0.08))
    path = ideal.expert.start_rad + ramp
    np.testing.assert_allclose(follow(ideal, path).path_rad, path, rtol=0, atol=1e-12)
    np.testing.assert_allclose(ideal.pose_rad(0.35 / 30), path[0] + 0.35 * (path[1] - path[0]), rtol=0, atol=1e-12)
    t = np.arange(31)[:, None] / 30
    expected = path - 0.5 * 0.08 * (1 - np.exp(-t / 0.08))
    np.testing.assert_allclose(follow(lagging, path).path_rad, expected, rtol=0, atol=2e-3)

    fast = World(0, 0, conditions=Conditions(lag_s=0.08))
    for _ in range(10):
        fast.command(fast.expert.start_rad + 1.5)
    speed = np.abs(np.diff(fast.path_rad, axis=0)) * 30
    assert (speed <= SPEED_LIMIT_RAD_S + 1e-9).all() and speed.max() > 0.99 * SPEED_LIMIT_RAD_S[0]


@pytest.mark.parametrize("command", [[0.0] * 5, [np.nan] + [0.0] * 5])
def test_a_command_that_is_none_is_refused(command):
    with pytest.raises(ValueError, match="expected six finite joint positions"):
        World(0, 0).command(command)


def test_disturbances_are_what_they_say():
    """2 cm for the camera, 10 grey levels of noise, light from where no recording has it, and nothing else changes."""
    plain = World(2, 4, *SIZE)
    worlds = {n: World(2, 4, *SIZE, conditions=Conditions(**change)) for n, (change, _) in PERTURBATIONS.items()}
    images = {name: world.image().astype(int) for name, world in worlds.items()}
    here = plain.image().astype(int)
    moved = worlds["camera"]._renderer.camera
    assert np.linalg.norm(moved.position_m - plain._renderer.camera.position_m) == pytest.approx(0.02)
    np.testing.assert_array_equal(moved.R, plain._renderer.camera.R)
    middle = (here > 40) & (here < 215)  # noise is cut off at black and white
    assert 9 < (images["noise"] - here)[middle].std() < 11
    assert worlds["light"].scene.light[0] > 0 > plain.scene.light[0]
    np.testing.assert_array_equal(images["lag"], here)
    assert all(np.abs(images[name] - here).mean() > 1 for name in ("noise", "camera", "light"))
    for name, world in worlds.items():
        undone = replace(world.scene, light=plain.scene.light, camera_shift_m=(0.0, 0.0, 0.0))
        assert undone == plain.scene, name
        np.testing.assert_array_equal(world.expert.start_rad, plain.expert.start_rad)


# -- the criterion and the figures ---------------------------------------------------------------------------------


def ends(scene, *offsets_m) -> np.ndarray:
    """The tip's places (T, 3): far away, then at these offsets from the middle of the block's top."""
    return np.array([goal_m(scene) + o for o in [(0.3, 0.0, 0.3), *offsets_m]])


@pytest.mark.parametrize(
    "offset_m, success, on_top",
    [
        ((0.0, 0.0, 0.0), True, True),
        ((0.019, 0.0, 0.0), True, True),
        ((0.0, -0.0119, 0.016), True, False),  # near enough, but in the air
        ((0.0, 0.0, -0.019), True, False),  # near enough, but inside the block
        ((0.021, 0.0, 0.0), False, True),  # on the face, but off its middle
        ((0.05, 0.0, 0.0), False, False),  # beside the block
        ((0.0, 0.0, 0.021), False, False),
    ],
)
def test_success_is_the_tip_within_2_cm_of_the_middle_of_the_top(offset_m, success: bool, on_top: bool):
    scene = replace(random_episode(0, 0)[0], block_yaw_rad=0.0)
    outcome = judge(scene, ends(scene, offset_m))
    assert (outcome.success, outcome.on_top) == (success, on_top)
    assert outcome.final_m == pytest.approx(np.linalg.norm(offset_m)) == pytest.approx(outcome.least_m)
    assert outcome.touch_s == (pytest.approx(1 / 30) if success else None)


def test_the_top_face_turns_with_the_block():
    """A corner of a block that lies at 20 degrees is at 65, and further out than a side; at 25 there is none."""
    scene = replace(random_episode(0, 0)[0], block_yaw_rad=np.deg2rad(20))
    for angle_deg, on_top in ((65, True), (25, False), (155, True)):
        out = 0.05 * np.array([np.cos(np.deg2rad(angle_deg)), np.sin(np.deg2rad(angle_deg)), 0.0])
        assert judge(scene, ends(scene, out)).on_top == on_top, angle_deg
        inside, _ = depths(scene, inverse_kinematics(goal_m(scene) + out - [0, 0, 0.01])[None])
        assert (inside[0] > 1e-3) == on_top, angle_deg


def test_passing_by_is_success_but_not_held():
    """Half a second is 15 periods, and so 16 control steps in a row."""
    scene = random_episode(0, 0)[0]
    near, away = (0.0, 0.0, 0.01), (0.0, 0.0, 0.1)
    for steps, held in ((1, False), (15, False), (16, True)):
        outcome = judge(scene, ends(scene, *[near] * steps, away))
        assert (outcome.success, outcome.held) == (True, held), steps
        assert outcome.final_m == pytest.approx(0.1) and outcome.least_m == pytest.approx(0.01)
    assert not judge(scene, ends(scene, *[near] * 8, away, *[near] * 8)).held
    assert judge(scene, ends(scene, *[near] * 4), control_hz=6.0).held and HELD_S == 0.5
    assert judge(scene, ends(scene, away), tolerance_m=0.101).success


@pytest.mark.parametrize(
    "successes, trials, low, high",
    [(81, 263, 0.2553, 0.3662), (15, 148, 0.0624, 0.1605), (0, 20, 0.0, 0.1611), (1, 29, 0.0061, 0.1718)],
)
def test_wilson_interval_is_the_published_one(successes: int, trials: int, low: float, high: float):
    """Table I, method 3, of Newcombe, "Two-sided confidence intervals for the single proportion", 1998."""
    assert wilson(successes, trials) == pytest.approx((low, high), abs=5e-5)
    assert wilson(trials - successes, trials) == pytest.approx((1 - high, 1 - low), abs=5e-5)
    assert wilson(0, 0) == (0.0, 1.0)


def test_entering_block_and_table_is_measured_in_metres():
    """The finger pushed 3 cm into the block's top, or 2 cm into the table beside it; the expert enters neither."""
    world = World(1, 3)
    scene = world.scene
    into = straight_down(World(1, 3), goal_m(scene) - [0, 0, 0.03])
    in_block, in_table = depths(scene, np.array(into.path_rad))
    assert in_block[-1] == pytest.approx(0.03, abs=1e-6) and in_table.max() == 0
    beside = straight_down(
        World(1, 3), np.array([-0.7, scene.block_xy_m[1] - np.sign(scene.block_xy_m[1]) * 0.3, -0.02])
    )
    in_block, in_table = depths(scene, np.array(beside.path_rad))
    assert in_table[-1] == pytest.approx(0.02, abs=1e-6) and in_block[-1] == 0
    down = np.array([0.0, 0.5, -1.2, 1.0, -1.5, 0.0])  # the elbow below the table, the finger in the air
    in_block, in_table = depths(scene, down[None])
    assert tool_tip(down)[2] > 0.1 and in_table[0] == pytest.approx(LINK_RADIUS_M - link_frames(down)[2, 2, 3])
    follow(world, world.expert.position(np.arange(180) / 30))
    row = measure(world)
    assert max(row["depth_in_block_m"], row["depth_in_table_m"]) < 1e-9
    assert row["success"] and row["held"] and row["on_top"] and row["stalled_s"] == 0
    assert row["peak_speed_rad_s"] == pytest.approx(row["expert_peak_speed_rad_s"], rel=1e-3)
    assert row["time_to_touch_s"] < world.expert.duration_s
    assert measure(into)["entered_block"] and measure(beside)["entered_table"]


def test_stalling_is_standing_about_before_the_touch():
    """A second or more; standing on the block is none, neither is creeping by more than 5 mm, nor what comes later."""
    scene = random_episode(0, 0)[0]
    walk = np.linspace((0.3, 0.0, 0.3), (0.1, 0.0, 0.0), 60)
    stays = np.vstack([walk, np.repeat(walk[-1:], 45, axis=0)]) + goal_m(scene)
    assert stalled_s(scene, stays, 30.0) == pytest.approx(45 / 30)
    assert stalled_s(scene, stays[:85], 30.0) == 0
    assert stalled_s(scene, np.repeat(goal_m(scene)[None], 90, axis=0), 30.0) == 0
    assert stalled_s(scene, np.vstack([goal_m(scene)[None], stays]), 30.0) == 0
    assert stalled_s(scene, np.vstack([stays, goal_m(scene)[None]]), 30.0) == pytest.approx(45 / 30)
    assert stalled_s(scene, goal_m(scene) + np.linspace((0.5, 0, 0), (0.4, 0, 0), 90), 30.0) == 0


# -- the runner's part ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("mode", ["chunk", "every-step", "ensemble"])
def test_many_forks_in_one_inference_act_as_each_alone(trained: Path, mode: str, monkeypatch):
    """Actions, commands and who inferred, also when forks are at different places of their queues and the batch is
    larger than one inference takes."""
    monkeypatch.setattr("ur10e_deploy.policy_runner.BATCH", 3)
    runner = PolicyRunner(trained, backend="native", device="cpu", mode=mode, n_action_steps=5)
    worlds = [World(9, i, 32, 48) for i in range(4)]
    alone, together = ([runner.fork() for _ in worlds] for _ in range(2))
    for pair in (alone, together):
        pair[1].step(worlds[1].path_rad[-1], {"color": worlds[1].image()})  # one step ahead of the others
    for _ in range(7):
        states = [world.path_rad[-1] for world in worlds]
        images = [{"color": world.image()} for world in worlds]
        one_by_one = [fork.step(*seen) for fork, *seen in zip(alone, states, images, strict=True)]
        needed = [seen if fork.needs_images else {} for fork, seen in zip(together, images, strict=True)]
        for world, ours, theirs in zip(worlds, one_by_one, step_together(together, states, needed), strict=True):
            np.testing.assert_allclose(theirs.action, ours.action, rtol=0, atol=1e-6)
            np.testing.assert_allclose(theirs.command_rad, ours.command_rad, rtol=0, atol=1e-6)
            assert (theirs.chunk is None) == (ours.chunk is None)
            world.command(ours.command_rad)
    assert together[0].latency()["inference"]["count"] == 0  # a shared inference is nobody's latency


def test_commands_follow_deltas_from_the_last_command_and_absolutes_as_they_are(
    trained: Path,
    trained_absolute: Path,
    trained_relative: Path,
):
    """An arm that does not move at all is still sent along the whole chunk; after reset() it starts where it is."""
    world = World(9, 0, 32, 48)
    here, images = world.path_rad[-1], {"color": world.image()}
    delta = PolicyRunner(trained, backend="native", device="cpu", mode="chunk")
    for _ in range(2):
        chunk = delta.predict_chunk(here, images)
        found = np.array([delta.command(here, images if delta.needs_images else {}) for _ in range(5)])
        np.testing.assert_allclose(found, here + np.cumsum(chunk[:5].astype(float), axis=0), rtol=0, atol=1e-6)
        delta.reset()
    relative = PolicyRunner(trained_relative, backend="native", device="cpu", mode="chunk")
    offsets = relative.policy.predict_chunk(as_batch(relative.contract.wrap(here).astype(np.float32), images))[
        0
    ].numpy()
    for moved in range(3):  # the arm moves on; the queue still counts from where the chunk was predicted
        found = relative.command(here + 0.01 * moved, images if relative.needs_images else {})
        np.testing.assert_allclose(found, here + offsets[moved], rtol=0, atol=1e-5)
    absolute = PolicyRunner(trained_absolute, backend="native", device="cpu", mode="every-step")
    expected = absolute.predict_chunk(here, images)[0]
    np.testing.assert_allclose(absolute.command(here, images), expected, rtol=0, atol=1e-6)
    turned = here + [2 * np.pi, 0, 0, 0, 0, 0]  # the joint is a turn on; its command must not turn it back
    np.testing.assert_allclose(absolute.command(turned, images)[0], expected[0] + 2 * np.pi, rtol=0, atol=1e-5)


def test_a_queue_answers_without_images(trained: Path):
    """needs_images says when; then wrong images are still refused, and none are taken."""
    world = World(9, 0, 32, 48)
    runner = PolicyRunner(trained, backend="native", device="cpu", mode="chunk", n_action_steps=2)
    assert runner.needs_images
    runner.step(world.path_rad[-1], {"color": world.image()})
    assert not runner.needs_images
    assert runner.step(world.path_rad[-1], {}).chunk is None
    assert runner.needs_images
    with pytest.raises(Exception, match="images of no camera; the policy needs color"):
        runner.step(world.path_rad[-1], {})
    assert runner.fork().needs_images


# -- the command ---------------------------------------------------------------------------------------------------


def roll(checkpoint: Path, output: Path, *flags: str) -> int:
    short = ("--episodes", "3", "--timeout-s", "1", "--device", "cpu")
    return rollout.main(["--checkpoint", str(checkpoint), "--output", str(output), *short, *flags])


def test_an_evaluation_holds_its_baselines_and_can_be_looked_at(trained_absolute: Path, tmp_path: Path, monkeypatch):
    """What a person and a script get; each baseline was shown what its name says."""
    shown: list[np.ndarray] = []
    infer = PolicyRunner._infer_batch

    def spy(self, observed):
        shown.append(np.stack([images["color"] for _, images in observed]))
        return infer(self, observed)

    monkeypatch.setattr(PolicyRunner, "_infer_batch", spy)
    out, gif = tmp_path / "out", tmp_path / "demo.gif"
    code = roll(trained_absolute, out, "--mode", "chunk", "--n-action-steps", "8", "--perturb", "camera,noise",
                "--min-success", "0.5", "--max-blind", "0.1", "--gif", str(gif))  # fmt: skip
    assert code == 3  # it was hardly trained: no success
    found = json.loads((out / "rollouts.json").read_text())
    assert set(found["baselines"]) == {MEAN_BLOCK, GREY, OTHER} and set(found["perturbations"]) == {"camera", "noise"}
    assert found["success"]["success_rate"] == 0 and found["success"]["wilson_95"][1] > 0.5
    assert found["gates"] == [
        {"gate": "--min-success", "limit": 0.5, "found": 0.0, "passed": False},
        {"gate": "--max-blind", "limit": 0.1, "found": 0.0, "passed": True},
    ]
    assert [row["episode"] for row in found["episodes"]] == [0, 1, 2]
    middle = np.mean([[row["end_x_m"], row["end_y_m"]] for row in found["other_episodes"][MEAN_BLOCK]], axis=0)
    np.testing.assert_allclose(middle, (-0.66, 0.0), atol=0.2)  # on its way there after a second

    policy, grey, other = ([b for b in shown if len(b) == 3][i : i + 4] for i in (0, 4, 8))  # 4 inferences in 30 steps
    assert len(shown) - 3 == 5 * 4  # and three at loading; two perturbations
    assert all((batch == 128).all() for batch in grey)
    for batch, seen in zip(other, policy, strict=True):
        np.testing.assert_array_equal(batch, seen[[1, 2, 0]])

    table = pq.read_table(out / "steps.parquet")
    assert table.num_rows == 6 * 3 * 30 and table.schema.field("command_elbow").metadata[b"unit"] == b"rad"
    assert sum(table["inferred"].to_pylist()) == 5 * 3 * 4 + 3 * 30
    with av.open(str(out / "rollouts.mp4")) as video:
        frames = [frame.to_ndarray(format="rgb24") for frame in video.decode(video=0)]
    tile = rollout_pictures.VIDEO_TILE
    assert len(frames) == 15 + 1 + 15 and frames[0].shape[1] == 3 * tile[1]
    inner = (slice(10, tile[0] - 10), slice(10, tile[1] - 10))  # inside the coloured frame
    first = frames[0][: tile[0], : tile[1]][inner].astype(int)
    own, last = (Renderer(w.scene, *tile).render(w.path_rad[0])[inner] for w in (World(1000, 0), World(1000, 2)))
    assert np.abs(first - own).mean() < 0.5 * np.abs(first - last).mean()  # compressed, but the first scene
    with Image.open(gif) as animation:
        assert animation.n_frames > 10 and gif.stat().st_size < 3e6
    page = (out / "report.html").read_text()
    assert page.count("base64,") == 3 and "0 % (0 of 3; 95 % interval 0 to 56 %)" in page and "http" not in page


def test_a_gate_that_is_met_exits_0_and_an_earlier_result_is_written_over(
    trained: Path, tmp_path: Path, capsys, monkeypatch
):
    """And groups of episodes that run at the same time give, in order, what one group gives."""
    out, ends_m = tmp_path / "out", []
    for together in (25, 2):
        monkeypatch.setattr("sim.closed_loop.TOGETHER", together)
        assert roll(trained, out, "--timeout-s", "0.5", "--min-success", "0", "--no-pictures") == 0
        found = json.loads((out / "rollouts.json").read_text())
        runs = [found["episodes"], *found["other_episodes"].values()]
        assert [[row["episode"] for row in rows] for rows in runs] == [[0, 1, 2]] * 4
        ends_m.append([[row["end_x_m"], row["end_y_m"], row["end_z_m"]] for rows in runs for row in rows])
    np.testing.assert_allclose(*ends_m, rtol=0, atol=1e-5)
    assert {path.name for path in out.iterdir()} == {"rollouts.json", "steps.parquet", "report.html"}
    assert "replaced the roll-outs" in capsys.readouterr().out
    (out / "mine.txt").touch()
    assert roll(trained, out) == 1
    assert "mine.txt" in capsys.readouterr().err


@pytest.mark.parametrize(
    "flags, line",
    [
        (("--perturb", "fog"), "--perturb fog: expected some of lag,noise,camera,light"),
        (("--episodes", "0"), "--episodes is 0; expected 1 or more"),
        (("--min-success", "90"), "--min-success is 90.0; expected 0 to 1"),
        (("--max-blind", "-1"), "--max-blind is -1.0; expected 0 to 1"),
        (("--n-action-steps", "9"), "n_action_steps is 9; expected 1 to 8"),
        (("--gif", "demo.mp4"), "--gif demo.mp4: expected a file that ends in .gif"),
        (("--checkpoint", "nowhere"), "nowhere: no config.json"),
    ],
)
def test_bad_input_is_one_line_and_exit_1(trained: Path, tmp_path: Path, capsys, flags, line: str):
    assert roll(trained, tmp_path / "out", *flags) == 1
    said = capsys.readouterr().err.splitlines()
    assert len(said) == 1 and said[0].startswith("error: ") and line in said[0]
    assert not (tmp_path / "out").exists()


def test_a_policy_that_the_cell_cannot_feed_is_refused(trained: Path, tmp_path: Path, capsys):
    contract = contract_of(trained)
    assert roll(save_ours(tmp_path / "two", two_cameras_contract(contract)), tmp_path / "out") == 1
    assert "the policy sees wrist, front; the simulated cell has one camera" in capsys.readouterr().err


def test_scenes_that_were_recorded_are_said(trained: Path, sample_bags: Path, tmp_path: Path, capsys):
    """Success on the training scenes says nothing about new ones."""
    assert roll(trained, tmp_path / "out", "--seed", "7", "--timeout-s", "0.1", "--no-pictures") == 0
    assert "note: the policy was trained on scenes of seed 7: these are not new to it" in capsys.readouterr().out
