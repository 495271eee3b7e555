"""One recording into episodes: where they are, how they are called, what is left out; each through load_episodes()."""

from __future__ import annotations

import json
import re
import shutil
from pathlib import Path

import numpy as np
import pytest

from rosbag_dataset import (
    BagError,
    ChunkDataset,
    compute_stats,
    find_bags,
    load_episodes,
    open_pixels,
    read_bag,
    split_episodes,
    sync_table,
    synchronise,
)
from rosbag_dataset.cutting import rest_notes
from rosbag_dataset.inspection import main
from tests.bags import T0_NS, Take, make_take, moving_in, ros, settings, write_bag
from tests.checks import both_storages, error_of, load
from tests.episodes import without

STARTS_S, STOPS_S = (1.0, 5.0, 9.0), (3.0, 7.0, 11.0)  # when the joints of a session move
MOVES = tuple(zip(STARTS_S, STOPS_S, strict=True))
SIDECAR = """
- {start_s: 0.5, stop_s: 3.5, task: pick the block}
- {start_s: 8.5, stop_s: 11.5, success: true, note: slow}
- {start_s: 4.5, stop_s: 7.5, success: false, note: it slipped}
"""


def session(*, pauses: tuple[tuple[float, float], ...] = (), seed: int = 0) -> Take:
    """Twelve seconds, in which the arm moves three times and rests in between; less what was not recorded."""
    take = make_take(seconds=12.0, path=moving_in(*MOVES), size=(2, 2), seed=seed)
    for pause in pauses:
        take = without(take, pause, pause)
    return take


def markers(kind: str, values: list, times_s: list[float]) -> list:
    """Messages on /marker."""
    return [("/marker", T0_NS + round(s * 1e9), ros(kind, v)) for s, v in zip(times_s, values, strict=True)]


def names(episodes) -> list[str]:
    return [episode.name for episode in episodes]


def seconds(episode) -> tuple[float, float]:
    """When an episode's first and last frame are, since the session's first message."""
    return (episode.time_ns[0] - T0_NS) / 1e9, (episode.time_ns[-1] - T0_NS) / 1e9


def assert_shows(episode, take: Take) -> None:
    """States and pixels are those of the take at the frames' times, and actions lead from one to the next."""
    at = (episode.time_ns - T0_NS) / 1e9
    np.testing.assert_allclose(episode.state, moving_in(*MOVES)(at), atol=2e-3)  # interpolated where motion begins
    image = np.abs(take.camera_ns[None] - episode.time_ns[:, None]).argmin(axis=1)
    np.testing.assert_array_equal(open_pixels(episode, "color")[episode.image_index["color"]], take.images[image])
    (segment,) = episode.segments
    assert segment.tolist() == [0, len(at)] and not episode.action[-1].any()
    np.testing.assert_allclose(episode.action[:-1], np.diff(episode.state, axis=0), atol=1e-6)


# -- what separates episodes --------------------------------------------------------------------------------------


def test_a_bag_is_one_episode_to_the_last_bit(tmp_path):
    """Nothing asked: name, hash, frames, pixels and report are those of synchronise() on the whole recording."""
    bag = write_bag(tmp_path / "bags" / "a", session(pauses=((3.5, 4.5),)).messages())
    wanted = settings(tmp_path / "bags")
    (episode,), left_out = load(wanted)
    (found,) = find_bags(bag.parent)
    expected = synchronise("a", read_bag(found, wanted, None), wanted)
    assert left_out == [] and (episode.name, episode.content_hash) == ("a", found.content_hash())
    for key in ("time_ns", "state", "action", "segments", "path_rad"):
        np.testing.assert_array_equal(getattr(episode, key), getattr(expected, key))
    np.testing.assert_array_equal(episode.image_index["color"], expected.image_index["color"])
    assert episode.sync_report == expected.sync_report | {"copy_of": ""}


@both_storages
def test_gaps_separate_where_the_recorder_paused(tmp_path, storage):
    """A pause longer than the limit, not a shorter one, and not one of the camera alone; names stay with another
    limit; nothing leads across."""
    take = without(session(pauses=((4.0, 4.5), (7.5, 8.5))), camera=(5.5, 6.5))
    write_bag(tmp_path / "bags" / "a", take.messages(), storage)
    short, left_out = load(settings(tmp_path / "bags", episodes="gaps", episode_pause_s=0.7))
    assert names(short) == ["a@00000.000s", "a@00008.504s"] and left_out == []
    longer, _ = load(settings(tmp_path / "bags", episodes="gaps", episode_pause_s=0.3))
    assert names(longer) == ["a@00000.000s", "a@00004.504s", "a@00008.504s"]
    assert_shows(longer[0], take)
    assert_shows(longer[2], take)
    np.testing.assert_array_equal(longer[2].state, short[1].state)
    assert len(longer[1].segments) == 2 and longer[1].sync_report["dropped"] > 20  # the camera's own gap
    assert [e.sync_report["cut"]["frames_between"] for e in longer] == [0, 0, 0]
    assert load(settings(tmp_path / "bags", episodes="gaps", episode_pause_s=2.0))[0][0].name == "a@00000.000s"


def test_a_pause_between_episodes_is_no_loss_and_one_camera_that_dies_is(tmp_path):
    """data.min_used_share is a matter of each part: a recorder that was paused for most of the time loses nothing, and
    a part of which little can be used is left out, with the reason."""
    take = without(session(pauses=((3.0, 9.0),)), camera=(0.5, 3.0))
    write_bag(tmp_path / "bags" / "a", take.messages())
    wanted = settings(tmp_path / "bags", episodes="gaps", episode_pause_s=4.0, min_used_share=0.6)
    episodes, left_out = load(wanted)
    assert names(episodes) == ["a@00009.000s"]
    (gone,) = left_out
    assert gone["episode"] == "a@00000.000s" and "data.min_used_share 0.6" in gone["why"]


@both_storages
def test_rests_separate(tmp_path, storage):
    """An episode begins with the motion and ends with the limit's length of rest, or with what rest there is; the limit
    changes no episode's start; what lies between is counted and said."""
    take = session()
    write_bag(tmp_path / "bags" / "a", take.messages(), storage)
    for pause_s in (0.5, 1.5):
        episodes, _ = load(settings(tmp_path / "bags", episodes="still", episode_pause_s=pause_s))
        assert [e.sync_report["cut"]["start_s"] for e in episodes] == pytest.approx(STARTS_S, abs=0.04)
        for episode, start, stop in zip(episodes, STARTS_S, STOPS_S, strict=True):
            assert seconds(episode) == pytest.approx((start, min(stop + pause_s, 11.96)), abs=0.07)
            assert episode.name == f"a@{episode.sync_report['cut']['start_s']:09.3f}s"
            assert_shows(episode, take)
        kept = sum(len(e.time_ns) for e in episodes)
        facts = episodes[0].sync_report["cut"]
        assert facts["frames_of_bag"] - facts["frames_between"] == pytest.approx(kept, abs=3)
        note = f"a: 3 episodes; {facts['frames_between']} of its {facts['frames_of_bag']} frames lie between them"
        assert note in sync_table([e.sync_report for e in episodes])
    named = names(episodes)
    (only,), _ = load(settings(tmp_path / "bags", episodes="still", episode_pause_s=3.0))
    assert only.name == named[0]


MARKERS = {
    "Bool": ([False, True, True, False, True, False], True, "sqlite3"),
    "String": (["stop", "start", " START", "stop", "start", "stop"], "start", "mcap"),
    "Int32": ([0, 7, 7, 0, 8, 0], 1, "mcap"),
    "UInt8": ([0, 1, 1, 0, 1, 0], 1, "sqlite3"),
}


@pytest.mark.parametrize("kind", MARKERS)
def test_markers_separate(tmp_path, kind):
    """From a start to the stop behind it, whatever the type, and however often each is repeated; with one more start an
    episode lasts to the end of the recording, which is said. The pixels are decoded once for all."""
    values, start, storage = MARKERS[kind]
    take, kind = session(), f"std_msgs/msg/{kind}"
    said = markers(kind, values, [0.2, 0.5, 1.0, 3.5, 4.5, 7.5])
    more = markers(kind, [start], [8.5])
    write_bag(tmp_path / "bags" / "a", sorted(take.messages() + said, key=lambda m: m[1]), storage)
    write_bag(tmp_path / "more" / "a", sorted(take.messages() + said + more, key=lambda m: m[1]), storage)
    wanted = {"episodes": "marker", "episode_marker_topic": "/marker"}
    episodes, _ = load(settings(tmp_path / "bags", **wanted))
    assert names(episodes) == ["a@00000.500s", "a@00004.500s"]
    for episode, begin, end in zip(episodes, (0.5, 4.5), (3.5, 7.5), strict=True):
        assert seconds(episode) == pytest.approx((begin, end), abs=0.05) and seconds(episode)[1] < end
        assert_shows(episode, take)
    assert len({e.entry for e in episodes}) == 1 and episodes[0].sync_report["cut"]["episodes_in_bag"] == 2
    episodes, _ = load(settings(tmp_path / "more", **wanted))
    assert names(episodes) == ["a@00000.500s", "a@00004.500s", "a@00008.500s"]
    assert "a@00008.500s: its marker never stops" in sync_table([e.sync_report for e in episodes])


@pytest.mark.parametrize(
    ("said", "words"),
    [
        (markers("std_msgs/msg/String", ["start", "wait"], [1, 2]), ["/marker, message 2", "'wait'", "start or stop"]),
        (markers("std_msgs/msg/Bool", [False], [1]), ["none of the 1 messages on /marker", "true"]),
        (markers("std_msgs/msg/Float32", [1.0], [1]), ["data.episode_marker_topic", "std_msgs/msg/Float32", "Int32"]),
        ([], ["data.episode_marker_topic", "no topic /marker"]),
    ],
    ids=["word", "no-start", "type", "no-topic"],
)
def test_markers_that_say_nothing(tmp_path, said, words):
    """One line that names the bag, the topic, what was found and what was expected."""
    write_bag(tmp_path / "bags" / "a", make_take(seconds=0.4).messages() + said)
    wanted = settings(tmp_path / "bags", episodes="marker", episode_marker_topic="/marker")
    message = error_of(lambda: load(wanted))
    assert message.startswith("a") and all(word in message for word in words), message


@both_storages
def test_a_sidecar_separates(tmp_path, storage, capsys):
    """start_s and stop_s of a list, in any order, with task and note in the report; failures are left out and counted,
    or kept when asked; the same for a bare file. Another entry's change leaves a name alone."""
    take = session()
    bag = write_bag(tmp_path / "bags" / "a", take.messages(), storage)
    (bag / "episodes.yaml").write_text(SIDECAR)
    wanted = settings(tmp_path / "bags", episodes="file")
    episodes, left_out = load(wanted)
    assert names(episodes) == ["a@00000.500s", "a@00008.500s"]
    for episode, begin in zip(episodes, (0.5, 8.5), strict=True):
        assert seconds(episode) == pytest.approx((begin, begin + 3), abs=0.05)
        assert_shows(episode, take)
    assert [e.sync_report["cut"].get("task") for e in episodes] == ["pick the block", None]
    assert episodes[1].sync_report["cut"]["note"] == "slow"
    failure = {"bag": "a", "episode": "a@00004.500s", "why": "its sidecar says success: false"}
    assert left_out == [failure]
    everything, _ = load(settings(tmp_path / "bags", episodes="file", keep_failures=True))
    assert names(everything) == ["a@00000.500s", "a@00004.500s", "a@00008.500s"]

    (bag / "episodes.yaml").write_text(SIDECAR.replace("stop_s: 3.5", "stop_s: 2.5"))
    changed, _ = load(wanted)
    assert names(changed) == names(episodes)
    assert [a.content_hash == b.content_hash for a, b in zip(changed, episodes, strict=True)] == [False, True]

    bare = tmp_path / "bare" / f"take{storage_file_end(bag)}"
    bare.parent.mkdir()
    shutil.copy(next(p for p in bag.iterdir() if p.suffix in (".db3", ".mcap")), bare)
    (tmp_path / "bare" / "take.episodes.yaml").write_text(SIDECAR)
    episodes, _ = load(settings(tmp_path / "bare", episodes="file"))
    assert names(episodes) == [f"{bare.name}@00000.500s", f"{bare.name}@00008.500s"]


def storage_file_end(bag: Path) -> str:
    return next(p.suffix for p in bag.iterdir() if p.suffix in (".db3", ".mcap"))


FAULTY = {
    "absent": (None, ["not there", "data.episodes: file", "data.episodes: bag"]),
    "not-yaml": ("- {start_s: 1", ["not valid YAML"]),
    "no-list": ("episodes: []", ["expected a list of entries"]),
    "empty": ("[]", ["found []", "expected a list"]),
    "no-entry": ("- 3", ["entry 1", "found 3"]),
    "unknown-key": ("- {start_s: 0, stop_s: 1}\n- {start_s: 1, end_s: 2}", ["entry 2", "unknown key end_s", "stop_s"]),
    "twice": ("- {start_s: 0, stop_s: 0.2, stop_s: 0.3}", ["given twice"]),
    "missing": ("- {start_s: 0}", ["entry 1", "stop_s: found None"]),
    "text": ("- {start_s: 0, stop_s: soon}", ["entry 1", "stop_s: found 'soon'", "seconds"]),
    "nan": ("- {start_s: .nan, stop_s: 1}", ["entry 1", "start_s: found nan"]),
    "before": ("- {start_s: -1, stop_s: 1}", ["entry 1", "start_s: found -1"]),
    "backwards": ("- {start_s: 0.3, stop_s: 0.1}", ["entry 1", "start_s 0.3 is not before stop_s 0.1"]),
    "overlap": (
        "- {start_s: 0.2, stop_s: 0.3}\n- {start_s: 0, stop_s: 0.25}",
        ["entry 1", "overlaps entry 2", "0.2 s", "0.25 s"],
    ),
    "outside": ("- {start_s: 0, stop_s: 12.5}", ["entry 1", "stop_s 12.5", "outside the recording", "0.392 s long"]),
    "success": ("- {start_s: 0, stop_s: 0.2, success: maybe}", ["entry 1", "success: found 'maybe'", "true or false"]),
    "task": ("- {start_s: 0, stop_s: 0.2, task: 3}", ["entry 1", "task: found 3", "text"]),
    "deep": ("[" * 2000, ["100 levels"]),
    "huge": ("# " + "x" * (1 << 20), ["expected at most 1048576"]),
}


@pytest.mark.parametrize("fault", FAULTY)
def test_a_faulty_sidecar_is_one_line(tmp_path, fault):
    """The file, which entry, what was found, what was expected; before anything is decoded, unless the recording's own
    length has to be known. Skipped when asked, as any bad bag."""
    text, words = FAULTY[fault]
    bag = write_bag(tmp_path / "bags" / "a", make_take(seconds=0.4).messages())
    if text is not None:
        (bag / "episodes.yaml").write_text(text)
    message = error_of(lambda: load(settings(tmp_path / "bags", episodes="file")))
    assert message.startswith(f"a: {bag / 'episodes.yaml'}") and all(word in message for word in words), message
    assert (tmp_path / "cache").exists() == (fault == "outside")
    if fault == "overlap":
        good = write_bag(tmp_path / "bags" / "b", make_take(seconds=0.4, seed=1).messages())
        (good / "episodes.yaml").write_text("- {start_s: 0, stop_s: 0.3}")
        episodes, skipped = load(settings(tmp_path / "bags", episodes="file", on_bad_bag="skip"))
        assert names(episodes) == ["b@00000.000s"] and [s["why"] for s in skipped] == [message]


def test_a_part_in_which_nothing_was_recorded_is_left_out(tmp_path):
    """The camera was off, or the arm at rest: said with the reason; the others are episodes all the same."""
    take = without(session(), camera=(3.9, 8.1))
    bag = write_bag(tmp_path / "bags" / "a", take.messages())
    (bag / "episodes.yaml").write_text(
        "[{start_s: 0, stop_s: 3}, {start_s: 4, stop_s: 8}, {start_s: 8.2, stop_s: 8.8}, {start_s: 9, stop_s: 11}]"
    )
    episodes, left_out = load(settings(tmp_path / "bags", episodes="file"))
    assert names(episodes) == ["a@00000.000s", "a@00009.000s"]
    (camera, rest) = left_out
    assert camera["episode"] == "a@00004.000s" and camera["why"] == "no message of /camera/color/image_raw in it"
    assert rest["episode"] == "a@00008.200s" and "no joint moves" in rest["why"]


# -- rests, and what is too short ---------------------------------------------------------------------------------


@pytest.mark.parametrize("how", ["bag", "file"])
def test_the_rest_at_the_start_is_cut_and_the_end_is_kept(tmp_path, how):
    """trim_still_s leaves so much of it, to within a frame; names stay; without it the run says what it would do."""
    take = session()
    bag = write_bag(tmp_path / "bags" / "a", take.messages())
    (bag / "episodes.yaml").write_text("[{start_s: 4, stop_s: 8.5}]")
    begin, start, end = (0.02, 1.0, 11.95) if how == "bag" else (4.0, 5.0, 8.5)
    (usual,), _ = load(settings(tmp_path / "bags", episodes=how))
    assert seconds(usual) == pytest.approx((begin, end), abs=0.05)
    assert "trimmed_at_start" not in usual.sync_report
    for trim_s in (0.0, 0.3, 5.0):
        wanted = settings(tmp_path / "bags", episodes=how, trim_still_s=trim_s)
        (episode,), _ = load(wanted)
        assert episode.name == usual.name and seconds(episode)[1] == pytest.approx(end, abs=0.05)
        assert seconds(episode)[0] == pytest.approx(max(begin, start - trim_s), abs=0.07)
        assert episode.sync_report["trimmed_at_start"] == len(usual.time_ns) - len(episode.time_ns)
        assert (episode.content_hash == usual.content_hash) == (trim_s == 5.0)
        assert_shows(episode, take)
        assert "data.trim_still_s" not in "".join(rest_notes([episode], wanted))
    (note,) = rest_notes([usual], settings(tmp_path / "bags", episodes=how))
    numbers = [int(number) for number in re.findall(r"\d+(?= %| frames| of these)", note)]
    still = 1 - 6 / (end - begin) if how == "bag" else 1 - 2 / (end - begin)
    assert numbers == pytest.approx([100 * still, 100 / (end - begin), 30, 24], abs=1.5), note
    assert "a policy that sees an arm at rest learns to rest: data.trim_still_s: 0.2 would cut off" in note
    moving = make_take(seconds=1.0, size=(2, 2))
    write_bag(tmp_path / "moving" / "a", moving.messages())
    episodes, _ = load(settings(tmp_path / "moving"))
    assert not list(rest_notes(episodes, settings(tmp_path / "moving")))


def false_start(bag_dir: Path) -> None:
    """Four recordings, and one of three frames."""
    for i in range(4):
        write_bag(bag_dir / f"take_{i}", make_take(seconds=0.5, size=(2, 2), seed=i).messages())
    write_bag(bag_dir / "oops", make_take(seconds=0.14, size=(2, 2), seed=9).messages())


def test_short_episodes_are_left_out_when_asked(tmp_path):
    """min_episode_s: each with its length and the limit; never all of them without an error."""
    false_start(tmp_path / "bags")
    episodes, left_out = load(settings(tmp_path / "bags"))
    assert len(episodes) == 5 and len(episodes[0].time_ns) == 3 and left_out == []
    episodes, left_out = load(settings(tmp_path / "bags", min_episode_s=0.2))
    assert names(episodes) == ["take_0", "take_1", "take_2", "take_3"]
    (entry,) = left_out
    assert entry["episode"] == "oops" and "s long, shorter than data.min_episode_s 0.2" in entry["why"]
    message = error_of(lambda: load(settings(tmp_path / "bags", min_episode_s=9)))
    assert "no episode is left of 5 bags, 5 were left out; the first: oops: 0." in message


def test_what_has_no_action_is_never_held_out(tmp_path):
    """One frame measures nothing: whatever the seed, it is trained on, which is said; and it does not count as one of
    the five of which one is held out."""
    for i in range(5):
        write_bag(tmp_path / "bags" / f"a{i}", make_take(seconds=0.3, size=(2, 2), seed=i).messages())
    write_bag(tmp_path / "bags" / "oops", make_take(seconds=0.08, size=(2, 2), seed=9).messages())
    episodes, _ = load(settings(tmp_path / "bags"))
    assert [e.has_action for e in episodes] == [True] * 5 + [False]
    for seed in range(30):
        train, held_out = split_episodes(episodes, 0.3, seed)
        assert held_out and "oops" not in names(held_out) and "oops" in names(train)
        assert not split_episodes(episodes[1:], 1e-9, seed)[1] and split_episodes(episodes, 1e-9, seed)[1]
    assert "oops: no frame has an action, and it is never held out" in sync_table([e.sync_report for e in episodes])


# -- training and validation --------------------------------------------------------------------------------------


@pytest.fixture
def sessions(tmp_path) -> Path:
    """Two recordings of three demonstrations each, and a copy of the first one."""
    for i, name in enumerate(("a", "b")):
        bag = write_bag(tmp_path / "bags" / name, session(seed=i).messages())
        (bag / "episodes.yaml").write_text(SIDECAR.replace("success: false, ", ""))
    shutil.copytree(tmp_path / "bags" / "a", tmp_path / "bags" / "copy")
    return tmp_path / "bags"


def test_a_recordings_episodes_are_on_one_side(sessions):
    """Those of copies too, even if they are cut otherwise; episode by episode when asked, and then a copy's with those
    that show the same moments. One episode that is cut away moves no other."""
    (sessions / "copy" / "episodes.yaml").write_text("[{start_s: 1, stop_s: 3}, {start_s: 6.8, stop_s: 11}]")
    episodes, _ = load(settings(sessions, episodes="file"))
    assert len(episodes) == 8 and [e.sync_report["copy_of"] for e in episodes] == [""] * 6 + ["a"] * 2
    table = sync_table([e.sync_report for e in episodes])
    assert table.count("is a copy of") == 1 and "note: copy is a copy of a" in table
    together, apart, moved_none = set(), set(), 0
    for seed in range(40):
        for hold_out, seen in (("bag", together), ("episode", apart)):
            train, held_out = split_episodes(episodes, 0.4, seed, hold_out)
            seen.add(frozenset(names(held_out)))
            assert train and overlap(train, held_out) == []
        fewer = frozenset(names(split_episodes(episodes[:4] + episodes[5:], 0.4, seed, "episode")[1]))
        assert fewer <= frozenset(names(held_out))
        moved_none += bool(fewer)
    of_a, of_b = (frozenset(n for n in names(episodes) if (n[0] == "b") == is_b) for is_b in (False, True))
    assert together == {frozenset(), of_a, of_b}
    assert moved_none > 10 and len(apart) > 4 and any(len({name[0] for name in held_out}) > 1 for held_out in apart)


def overlap(train, held_out) -> list[tuple[str, str]]:
    """Pairs of episodes on the two sides that show the same moment of the same recording."""
    return [
        (a.name, b.name)
        for a in train
        for b in held_out
        if a.recording_hash == b.recording_hash and a.time_ns[0] <= b.time_ns[-1] and b.time_ns[0] <= a.time_ns[-1]
    ]


def test_the_only_recording_is_divided(sessions):
    """Of its three episodes at least one is held out and one is not, whatever the seed; none where nothing is to be."""
    for name in ("b", "copy"):
        shutil.rmtree(sessions / name)
    three, _ = load(settings(sessions, episodes="file"))
    fractions = (1e-9, 0.1, 0.5)
    for seed in range(20):
        sizes = [len(split_episodes(three, fraction, seed)[1]) for fraction in fractions]
        assert sizes[0] == 1 and sizes == sorted(sizes) and sizes[-1] < 3
        assert len(split_episodes(three[:2], 0.5, seed)[1]) < 2
    assert not split_episodes(three, 0.0, 1)[1]


def test_parts_share_the_frames_of_their_recording(sessions):
    """On the device each recording's images are counted once, and a part's frames are found in them."""
    episodes, _ = load(settings(sessions, episodes="file"))
    stored = np.concatenate([open_pixels(e, "color") for e in (episodes[0], episodes[3], episodes[6])])
    dataset = ChunkDataset(episodes, 4)
    tables, chosen = dataset.tables(), range(0, len(dataset), 7)
    shown = stored[tables["image.color"][tables["frame"][chosen]]]
    np.testing.assert_array_equal(shown, dataset.__getitems__(chosen)["observation.images.color"])


def test_image_statistics_are_of_the_frames_that_a_part_shows(sessions):
    """data.image_stats: dataset: pixels of an episode that is held out count as little as its joints do."""
    episodes, _ = load(settings(sessions, episodes="file"))
    for _ in ("computed", "kept"):
        stats, _ = compute_stats(episodes[:2], "dataset", 4)
        shown = np.concatenate([open_pixels(e, "color")[np.unique(e.image_index["color"])] for e in episodes[:2]]) / 255
        mean = stats["observation.images.color"]["mean"].ravel()
        np.testing.assert_allclose(mean, shown.mean(axis=(0, 1, 2)), rtol=1e-5)


# -- looking ------------------------------------------------------------------------------------------------------


def test_the_inspection_shows_the_same_episodes(sessions, tmp_path, capsys):
    """python -m rosbag_dataset DIR --config my.yaml: names, frames, failures and rests are those of training."""
    (sessions / "a" / "episodes.yaml").write_text(SIDECAR)
    config = tmp_path / "my.yaml"
    config.write_text("data: {episodes: file, trim_still_s: 0.2}")
    assert main([str(sessions), "--config", str(config), "--json", str(tmp_path / "report.json")]) == 0
    out = capsys.readouterr().out
    episodes, left_out = load_episodes(settings(sessions, episodes="file", trim_still_s=0.2), 1, False)
    report = json.loads((tmp_path / "report.json").read_text())
    assert [e["episode"] for e in report["episodes"]] == names(episodes) and report["left_out"] == left_out
    assert [e["frames"] for e in report["episodes"]] == [len(e.time_ns) for e in episodes]
    assert all(f"\n{name}  " in out for name in names(episodes))
    assert "left out 1 episodes that their sidecars mark as failures (success: false): a@00004.500s;" in out
    assert "frames of rest were cut off at the start of 8 of 8 episodes" in out
    config.write_text("data: {min_episode_s: 99}")
    assert main([str(sessions), "--config", str(config)]) == 1
    assert "no episode is left of 3 bags, 3 were left out; the first: a: 11.9" in capsys.readouterr().err
    config.write_text("data: {episodes: marker}")
    assert main([str(sessions), "--config", str(config)]) == 1
    assert "data.episode_marker_topic: found None, expected a topic" in capsys.readouterr().err


def test_an_error_of_the_whole_recording_is_one_of_all_its_parts(tmp_path):
    """A bag that cannot be used is refused as ever, however it is to be cut."""
    write_bag(tmp_path / "bags" / "a", make_take(seconds=0.4, path=lambda t: np.ones((len(t), 6))).messages())
    for how in ("bag", "gaps", "still"):
        with pytest.raises(BagError, match="no joint moves by more than"):
            load(settings(tmp_path / "bags", episodes=how, episode_pause_s=1.0))
