"""python -m rosbag_dataset DIR --html: each planted fault is named with what to do, the worst first, on one page."""

from __future__ import annotations

import json
import re
import shutil
from html import escape
from html.parser import HTMLParser
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pytest

from report_page import envelope
from rosbag_dataset import find_bags, html_report, inspection
from rosbag_dataset.inspection import main
from rosbag_dataset.looking import KEPT, THUMBNAIL_WIDTH, THUMBNAILS, Looker
from tests.bags import (
    CAMERA_TOPIC,
    JOINT_TOPIC,
    T0_NS,
    clock,
    image,
    joint_state,
    make_take,
    moving_in,
    settings,
    storage_file,
    write_bag,
)
from tests.once import once
from tests.planted import GOOD, OVERRIDE, more_takes, plain, plant, take, takes
from ur10e import link_frames


class Planted(NamedTuple):
    folder: Path
    code: int
    page: str
    report: dict[str, Any]
    cards: dict[str, str]


@pytest.fixture(scope="module")
def planted(tmp_path_factory) -> Planted:
    """Bags of which some are wrong, and what the inspection says of them."""

    def make(folder: Path) -> None:
        plant(folder / "bags", plain, joint_hz=100, camera_hz=15, more=True)
        code = inspect(folder / "bags", folder, "--override", OVERRIDE, "--override", "data.fps=15")
        (folder / "code").write_text(str(code))

    folder = once(tmp_path_factory, "planted", make)
    page, report = outputs(folder)
    return Planted(folder / "bags", int((folder / "code").read_text()), page, report, cards(page))


def inspect(bags: Path, folder: Path, *options: str) -> int:
    return main([str(bags), "--html", str(folder / "report.html"), "--json", str(folder / "report.json"), *options])


def outputs(folder: Path) -> tuple[str, dict[str, Any]]:
    """What inspect() wrote: -> (page, report)."""
    return (folder / "report.html").read_text(), json.loads((folder / "report.json").read_text())


def cards(page: str) -> dict[str, str]:
    """Name of an episode -> its part of the page, in order."""
    parts = re.split(r'(?=<details class="card")', page)[1:]
    return {re.search(r"<h3>(.*?)</h3>", part)[1]: part.partition("</details>")[0] for part in parts}


# bag -> (badness, kind, what its sentence says)
SAID = {
    "camera_dies": ("refused", "refused", ["frames cover 1.5 of the", "/close/image_raw", "record it again"]),
    "degrees": ("refused", "refused", ["looks like degrees", "degrees x pi / 180"]),
    "driver_hangs": ("mend", "jumps", ["the joints jump once", "of the same message", "ros2 topic info"]),
    "pictures_freeze": ("mend", "pictures", ["camera front", "frozen while the arm moves, 2.0 to 3.9 s", "again"]),
    "camera_late": ("mend", "late", ["camera front", "ms older than the joints", "data.time_source: header"]),
    "stands_still": ("look", "stall", ["the arm stands still for 2.", "amid its motion", "data.episodes: still"]),
    "comes_from_elsewhere": ("look", "unlike", ["starts with shoulder_pan_joint at", "leave it out"]),
    "replayed": ("look", "twin", ["moves as pick_02 does, to within 0.0", "keep one"]),
    "clock_set_back": ("refused", "refused", ["the clock steps back by ", "was recorded twice; record it again"]),
    "two_publishers": ("refused", "refused", ["two publishers that take turns look so, see: ros2 topic info -v"]),
    "slow_joints": ("refused", "refused", ["/joint_states", "data.max_offset_ms", "would keep 95% of the frames"]),
    "pictures_black": ("mend", "pictures", ["camera front: 15 pictures black, 2.0 to 2.9 s"]),
    "pictures_torn": ("mend", "pictures", ["camera front: 3 pictures torn", "record it again"]),
    "stored_twice": ("mend", "copy", ["holds the same recording as pick_01; delete one"]),
}  # fmt: skip


ALL = {**takes(), **more_takes(), "stored_twice": takes()[GOOD[0]]}
REFUSED = [name for name, (badness, *_) in SAID.items() if badness == "refused"]


@pytest.mark.parametrize("name", SAID)
def test_each_planted_fault_is_named_with_what_to_do(planted: Planted, name: str):
    """In the data and, in the same words, in the card of its episode."""
    badness, kind, words = SAID[name]
    (finding,) = [f for f in planted.report["findings"] if f["episode"] == name and f["kind"] == kind]
    assert finding["badness"] == badness and [w for w in words if w not in finding["sentence"]] == [], finding
    assert f"<li>{escape(finding['sentence'])}</li>" in planted.cards[name]


def test_of_what_is_right_nothing_is_said(planted: Planted):
    """Not of a good recording, and of one with a fault only what follows from it."""
    found = {(f["episode"], f["kind"]) for f in planted.report["findings"]}
    assert set(SAID) | set(GOOD) == set(ALL) and planted.code == 1
    follows = {("stands_still", "unlike"), ("pictures_black", "unlike")}  # longer, and darker
    assert found - {(name, kind) for name, (_, kind, _) in SAID.items()} <= follows, found


def test_the_worst_come_first(planted: Planted):
    """What cannot be trained on, what teaches something wrong, what is to be decided, what is right; as on the page."""
    order = planted.report["order"]
    place = {"refused": 0, "mend": 1, "look": 2}
    assert [place[SAID[name][0]] for name in order if name in SAID] == sorted(place[b] for b, *_ in SAID.values())
    assert order[len(SAID) :] == GOOD
    assert list(planted.cards) == order
    badness = [f["badness"] for f in planted.report["findings"]]
    assert badness == sorted(badness, key=place.__getitem__)


def test_the_page_says_what_the_data_say(planted: Planted):
    """Sentences, figures of each episode, the table, what holds for all; and of what was asked."""
    page, report = planted.page, planted.report
    said = (
        [finding["sentence"] for finding in report["findings"]] + report["notes"] + [OVERRIDE, "15 frames per second"]
    )
    assert [text for text in said if escape(text) not in page] == []
    overview = report["overview"]
    assert (overview["episodes"], overview["refused"]) == (len(ALL) - len(REFUSED), len(REFUSED))
    assert f"{overview['used_s']:.1f} of {overview['recorded_s']:.1f} s recorded, {overview['frames']} frames" in page
    assert overview["frames"] == sum(episode["frames"] for episode in report["episodes"])
    assert f"{overview['still_share']:.0%} of the time" in page and overview["farthest"]["by"] in page
    table = page[page.index("A table of all") :]
    for episode in report["episodes"]:
        name, look = episode["episode"], report["looks"][episode["episode"]]
        figures = [f"{episode['used_s']:.1f} of {episode['recorded_s']:.1f} s used", f"{episode['frames']} frames"]
        figures += [
            f"flange {look['flange_path_m']:.2f} m",
            *(f"{round(a, 2) + 0.0:.2f} to {round(b, 2) + 0.0:.2f} rad" for a, b in look["ranges"].values()),
        ]
        assert [figure for figure in figures if figure not in planted.cards[name]] == []
        assert (
            f"<td>{episode['recorded_s']:.1f}</td><td>{episode['used_s']:.1f}</td><td>{episode['frames']}</td>" in table
        )
    for name, look in report["looks"].items():
        for topic, of in look["topics"].items():
            words = f"<b>{topic}</b><br>{of['median_hz']:.1f} Hz, offset up to {of['worst_offset_ms']:.0f} ms"
            assert words in planted.cards[name]


def test_episodes_are_seen(planted: Planted):
    """Of each recording that could be read: a strip per camera, six joints, topics; and marks where something is."""
    for name, card in planted.cards.items():
        assert card.count('src="data:image/jpeg;base64,') == 2, name
        assert card.count("<path ") == 6 + 3, name
    marks = {name: {m["kind"]: m for m in look["marks"]} for name, look in planted.report["looks"].items()}
    hangs = takes()["driver_hangs"].repeats_s[1] - 0.02  # 0 s is the first frame
    assert marks["driver_hangs"]["jump"]["to_s"] == pytest.approx(hangs, abs=0.02)
    assert "after 0.79 s of the same message" in marks["driver_hangs"]["jump"]["what"]
    assert marks["camera_dies"]["gap"]["where"] == "/close/image_raw" and "early" in marks["camera_dies"]["gap"]["what"]
    assert marks["pictures_freeze"]["pictures"]["what"].endswith("frozen")
    middle = take(14).duration_s / 2
    assert marks["stands_still"]["stall"]["from_s"] == pytest.approx(middle, abs=0.3)
    assert {kind for name in GOOD for kind in marks[name]} <= {"rest"}
    assert marks["driver_hangs"]["hang"]["from_s"] == pytest.approx(hangs - 0.8, abs=0.02)
    assert "jump: " in planted.cards["driver_hangs"] and "stall: " in planted.cards["stands_still"]


def test_where_the_flange_goes_is_forward_kinematics(planted: Planted):
    """Start, end and extent are those of the expert's joints by the UR10e's kinematics."""
    for name in ("pick_01", "pick_05"):
        of, look = takes()[name], planted.report["looks"][name]
        q_rad = of.position(np.array([0.0, of.duration_s]))
        np.testing.assert_allclose(
            [look["flange_start_m"], look["flange_end_m"]], link_frames(q_rad)[:, 6, :3, 3], atol=3e-3
        )
        np.testing.assert_allclose(list(look["start"].values()), q_rad[0], atol=2e-3)
    low, high = (np.array(planted.report["overview"]["workspace_m"][which]) for which in ("least", "most"))
    paths = [link_frames(of.position(np.linspace(0, of.duration_s, 99)))[:, 6, :3, 3]
             for name, of in ALL.items() if name not in REFUSED]  # fmt: skip
    np.testing.assert_allclose(
        [low, high], [np.min(np.concatenate(paths), 0), np.max(np.concatenate(paths), 0)], atol=5e-3
    )


def test_signs_are_taken_back_for_kinematics(tmp_path):
    """joint_sign turns states, not the robot: the flange stays where it was."""
    of = take(1)
    t = clock(2.0, 100)
    joints = [(JOINT_TOPIC, int(n), joint_state(int(n), q)) for n, q in
              zip(t, of.position((t - T0_NS) / 1e9), strict=True)]  # fmt: skip
    pictures = [m for m in make_take(seconds=2.0).messages() if m[0] == CAMERA_TOPIC]
    write_bag(tmp_path / "bags" / "a", sorted(joints + pictures, key=lambda m: m[1]))
    found = []
    for apply in ("false", "true"):
        signs = [f"conventions.apply_joint_sign={apply}", "conventions.joint_sign=[1, -1, 1, -1, 1, 1]"]
        inspect(tmp_path / "bags", tmp_path, *(word for sign in signs for word in ("--override", sign)))
        found.append(outputs(tmp_path)[1]["looks"]["a"])
    assert found[0]["flange_m"] == found[1]["flange_m"]
    assert found[0]["start"]["shoulder_lift_joint"] == -found[1]["start"]["shoulder_lift_joint"] != 0


class Checker(HTMLParser):
    """Raises where tags do not fit into each other, and collects what a browser would load."""

    def __init__(self) -> None:
        super().__init__()
        self.open: list[str] = []
        self.loads: list[str] = []
        self.tags: set[str] = set()

    def handle_starttag(self, tag, attrs):
        self.tags.add(tag)
        self.loads += [value for key, value in attrs if key in ("src", "href", "xlink:href", "action", "data")]
        assert not [key for key, _ in attrs if key.startswith("on")], attrs
        if tag not in ("meta", "img", "br"):
            self.open.append(tag)

    def handle_startendtag(self, tag, attrs):
        self.tags.add(tag)

    def handle_endtag(self, tag):
        assert self.open and self.open.pop() == tag, (tag, self.open[-3:], self.getpos())


def checked(page: str) -> Checker:
    checker = Checker()
    checker.feed(page)
    checker.close()
    assert checker.open == [] and page.startswith("<!doctype html>")
    return checker


def test_one_well_formed_file_that_loads_nothing(planted: Planted):
    """It can be sent to somebody: no script, no style, no picture from elsewhere."""
    checker = checked(planted.page)
    assert "script" not in checker.tags and "link" not in checker.tags and "@import" not in planted.page
    assert [
        address[:30] for address in checker.loads if not address.startswith(("data:image/jpeg;base64,", "#e"))
    ] == []
    assert re.findall(r"https?:", planted.page) == [] and "url(" not in planted.page


HOSTILE = "<img src=x onerror=alert(1)> & 'q' \"p\""


def test_names_are_escaped(tmp_path):
    """Names of bags, joints, topics and errors come from outside; in sentences about other episodes as well."""
    path = moving_in((0.2, 0.8))
    joints, topic = ["<b>a</b>", *"bcdef"], "/cam<i>"
    messages = [
        (topic if t == CAMERA_TOPIC else t, n, m if t == CAMERA_TOPIC else joint_state(n, m.position, joints))
        for t, n, m in make_take(path=path).messages()
    ]
    write_bag(tmp_path / "bags" / HOSTILE, messages)
    write_bag(tmp_path / "bags" / "copy", messages)
    write_bag(tmp_path / "bags" / f"bad {HOSTILE}", messages[:1])
    names = json.dumps(joints)
    inspect(
        tmp_path / "bags",
        tmp_path,
        "--override",
        f"data.camera_topic={topic}",
        "--override",
        f"data.joint_names={names}",
    )
    page, report = outputs(tmp_path)
    assert "img" in checked(page).tags
    for raw in ("<img src=x", "<b>a</b>", "<i>"):
        assert raw not in page, raw
    assert page.count(escape(HOSTILE)) > 3 and escape("<b>a</b>") in page and escape(topic) in page
    assert any(HOSTILE in finding["sentence"] for finding in report["findings"])
    assert report["looks"]["copy"]["start"].keys() == set(joints) and report["overview"]["workspace_m"] is None


def test_many_episodes_make_no_endless_page(planted: Planted, tmp_path, monkeypatch):
    """The worst have a drawing, all have a row; a drawing's size depends on no recording's length."""
    drawing = max(len(card) for card in planted.cards.values())
    assert drawing < 60_000 and len(planted.page) < (len(ALL) + 2) * 60_000
    monkeypatch.setattr(html_report, "DRAWN", 3)
    monkeypatch.setattr(html_report, "BARS", 4)
    inspect(planted.folder, tmp_path, "--override", OVERRIDE, "--override", "data.fps=15")
    page, report = outputs(tmp_path)
    assert list(cards(page)) == report["order"][:3] and f"The other {len(ALL) - 3} have no drawing" in page
    assert [name for name in ALL if f"<td>{name}</td>" not in page] == []
    assert checked(page) and f"th of {len(ALL)} is shown" in page


def test_curves_are_thinned_without_losing_a_peak():
    """A day at 500 Hz is as many points as a minute, and the one sample that is off is among them."""
    x = np.arange(500_000) / 500.0
    y = np.sin(x / 50)
    y[[123_457, 400_001]] = 7, -7
    kept = envelope(x, y, 120)
    assert len(kept) <= 242 and {123_457, 400_001, 0, len(x) - 1} <= set(kept.tolist()) and (np.diff(kept) > 0).all()
    assert envelope(x[:50], y[:50], 120).tolist() == list(range(50))


def test_a_strip_shows_what_was_when(tmp_path):
    """Ten pictures over the whole time of a recording, each of its own tenth; grey where its camera was silent."""
    t = clock(4.0, 30)
    levels = (40 + 30 * (t - T0_NS) / 1e9).astype(np.uint8)  # brighter by 12 from tenth to tenth
    messages = make_take(seconds=4.0).messages()
    messages = [m for m in messages if m[0] == JOINT_TOPIC] + [
        (CAMERA_TOPIC, int(n), image(int(n), np.full((30, 40, 3), level, np.uint8)))
        for n, level in zip(t, levels, strict=True)
        if not 2.0 <= (n - T0_NS) / 1e9 < 2.8
    ]
    write_bag(tmp_path / "bags" / "a", messages)
    strips = []
    looker = Looker(settings(tmp_path / "bags"), True, lambda look: strips.append(look.drawing.strips["color"]))
    inspection.inspect_bags(find_bags(tmp_path / "bags"), settings(tmp_path / "bags"), looker=looker)
    (strip,) = strips
    assert strip.shape == (72, THUMBNAILS * THUMBNAIL_WIDTH, 3)
    seen = strip[36, THUMBNAIL_WIDTH // 2 :: THUMBNAIL_WIDTH, 0].astype(int)
    expected = 40 + 30 * (0.4 * np.arange(10) + 0.2)
    expected[5:7] = 225  # a tenth without pictures
    assert np.abs(seen - expected).max() <= 3 + 30 * 4.0 / KEPT
    assert looker.looks[0].drawing is None  # memory


def test_parts_of_a_recording_have_looks_of_their_own(tmp_path):
    """Cut by rests: each its own time, its own pictures, marks and poses."""
    path = moving_in((0.5, 3.0), (6.0, 8.0))
    write_bag(tmp_path / "bags" / "a", make_take(seconds=9.0, path=path).messages())
    inspect(tmp_path / "bags", tmp_path, "--override", "data.episodes=still")
    page, report = outputs(tmp_path)
    names = [episode["episode"] for episode in report["episodes"]]
    assert len(names) == 2 and sorted(cards(page)) == names
    for name, length_s in zip(names, (4.5, 3.0), strict=True):
        low, high = report["looks"][name]["span_s"]
        assert high - low == pytest.approx(length_s, abs=0.1), name
        assert cards(page)[name].count("data:image/jpeg") == 1
    assert (
        cards(page)[names[0]].split("data:image/jpeg")[1][:3000]
        != cards(page)[names[1]].split("data:image/jpeg")[1][:3000]
    )


def test_what_most_episodes_have_is_said_once(tmp_path):
    """A camera that is late in all of them is the cell's: one line, and no episode is blamed."""
    for i in range(5):
        late = [(t, n + 120_000_000 * (t == CAMERA_TOPIC), m) for t, n, m in make_take(seconds=1.5, seed=i).messages()]
        write_bag(tmp_path / "bags" / f"{i}", sorted(((t, n + i * 10**10, m) for t, n, m in late), key=lambda m: m[1]))
    inspect(tmp_path / "bags", tmp_path)
    page, report = outputs(tmp_path)
    (late,) = [finding for finding in report["findings"] if finding["kind"] == "late"]
    assert late["episode"] == "" and late["sentence"].startswith(
        "in 5 of 5 episodes, so that it is the set-up; for example 0"
    )
    assert page.count(escape(late["sentence"])) == 1


def test_copies_and_the_same_moments(tmp_path):
    """A copy, and a bag that was cut out of another one: both would be on both sides of a split."""
    whole = make_take(seconds=4.0, seed=1).messages()
    write_bag(tmp_path / "bags" / "whole", whole)
    write_bag(tmp_path / "bags" / "part", [m for m in whole if 10**9 < m[1] - T0_NS < 3 * 10**9])
    shutil.copytree(tmp_path / "bags" / "whole", tmp_path / "bags" / "zcopy")
    inspect(tmp_path / "bags", tmp_path)
    said = {f["episode"]: f["sentence"] for f in outputs(tmp_path)[1]["findings"] if f["kind"] == "copy"}
    assert said.keys() == {"part", "zcopy"}
    assert "shows 2.0 s that whole shows, too" in said["part"] and "same recording as whole" in said["zcopy"]


def test_what_cannot_be_read_at_all_is_there(bag_dir, tmp_path):
    """A damaged bag has no curves, but its card, the sentence and the first place."""
    storage_file(bag_dir / "b").write_bytes(b"nothing")
    assert inspect(bag_dir, tmp_path) == 1
    page, report = outputs(tmp_path)
    assert report["order"] == ["b", "a"] and "Nothing of it could be read." in cards(page)["b"]
    assert report["looks"]["b"] == {} and escape(report["findings"][0]["sentence"]) in cards(page)["b"]


def test_data_without_a_page_decode_nothing(bag_dir, tmp_path, monkeypatch):
    """--json alone has the findings, and says that pictures were not looked at."""
    monkeypatch.setattr(Looker, "image", None)
    assert main([str(bag_dir), "--json", str(tmp_path / "r.json")]) == 0
    report = json.loads((tmp_path / "r.json").read_text())
    assert report["settings"]["pictures_decoded"] is False and report["order"] == ["b", "a"]  # b moves as a
    assert report["looks"]["a"]["topics"].keys() == {CAMERA_TOPIC, JOINT_TOPIC}


def test_a_page_that_cannot_be_written(bag_dir, tmp_path, capsys):
    """One line, before anything is read if the folder is not there; no half of a page stays, and an old one does."""
    assert main([str(bag_dir), "--html", str(tmp_path / "absent" / "r.html")]) == 1
    out, err = capsys.readouterr()
    assert out == "" and err.startswith("error: --html: ") and "make that folder first" in err and err.count("\n") == 1
    (tmp_path / "r.html").mkdir()
    assert main([str(bag_dir), "--html", str(tmp_path / "r.html")]) == 1
    assert "error: --html: " in capsys.readouterr().err
    assert [path.name for path in tmp_path.iterdir() if "partial" in path.name] == []


def test_a_page_is_there_as_a_whole_or_not_at_all(bag_dir, tmp_path, monkeypatch):
    """While it is written, and when that fails, the one from before is there."""
    (tmp_path / "r.html").write_text("old")

    def breaks_off(report, drawings):
        yield "half"
        assert (tmp_path / "r.html").read_text() == "old"
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(inspection, "page_parts", breaks_off)
    assert main([str(bag_dir), "--html", str(tmp_path / "r.html")]) == 1
    assert (
        sorted(path.name for path in tmp_path.glob("*"))
        == ["bags", "r.html"]
        == sorted(p.name for p in tmp_path.iterdir())
    )
    assert (tmp_path / "r.html").read_text() == "old"
