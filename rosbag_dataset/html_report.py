"""The report of an inspection as one HTML page: what to do first, all episodes side by side, then each, worst first.

The page says what the report in JSON says, and draws what a Look has beyond that. Drawings wait on disk until the order
of the page is known, so that memory does not grow with the number of recordings.

Knows: HTML, and how a look is drawn.
Must not know: bags, and what is good or bad about an episode (findings.py).
"""

from __future__ import annotations

import tempfile
from collections.abc import Iterator, Mapping, Sequence
from html import escape
from typing import Any

import cv2
import numpy as np

import report_page
from report_page import ACROSS, BLUE, GREEN, ORANGE, PINK, SKY, VERMILION, band, line, row_svg

from .findings import BADNESS, KINDS
from .looking import THUMBNAILS, Curve, Look, Mark, TopicCurve
from .settings import BagSettings

DRAWN = 300  # episodes with a drawing of about 50 KB, the worst; of all others there is a row in the table
OPENED = 40  # of these the first that something was found of are unfolded
BARS, NAMED = 1000, 20  # episodes in the picture of all; so few have their names there
PATHS, CLEAR = 400, 60  # flange paths in a picture; of more than so many each is fainter
JPEG_QUALITY = 60
NAMES = 12  # of episodes in a row of the table of findings
TAGS, TAG_LANES = 12, 3  # words above the curves, for marks
# kind of mark -> (colour, how dense, whether it has words above the curves), as drawn: those below first
MARKS = {
    "rest": ("#888888", 0.16, False),
    "gap": (VERMILION, 0.16, True),
    "stall": (ORANGE, 0.40, True),
    "hang": (SKY, 0.40, True),
    "pictures": (PINK, 0.35, True),
    "jump": (VERMILION, 1.0, True),
}
WORDS = {"refused": ("✗ refused", VERMILION), "mend": ("! mend", ORANGE), "look": ("? look", BLUE), "": ("✓", GREEN)}

STYLE = """
h3 { font-size: 1.05rem; margin: 0; display: inline; overflow-wrap: anywhere; }
.card { border-top: 1px solid #ddd; padding: .8rem 0 1.2rem; } .card summary { cursor: pointer; }
.card:not([open]) { padding: .25rem 0; }
.badge { display: inline-block; color: #fff; border-radius: 3px; padding: 0 .45rem; font-size: .8rem; font-weight: 600;
         margin: 0 .6rem 0 .1rem; vertical-align: 1px; }
.figures { color: #666; font-size: .85rem; margin-left: .6rem; }
ul.found { margin: .4rem 0 .6rem; padding-left: 1.2rem; } ul.found li { margin: .15rem 0; }
.look { display: grid; grid-template-columns: 11.5rem minmax(0, 1fr); gap: 3px 10px; font-size: 12px; }
.look .l { grid-column: 1; color: #666; line-height: 1.2; align-self: center; overflow: hidden; white-space: nowrap;
           text-overflow: ellipsis; text-align: right; }
.look .l b { color: #222; font-weight: 600; } .look .p { grid-column: 2; position: relative; }
.look svg.row { display: block; width: 100%; background: #f7f8f9; } .look img { display: block; margin: 0; }
.look svg.over { grid-column: 2; width: 100%; height: 100%; pointer-events: none; mix-blend-mode: multiply; }
.tags span, .ticks span { position: absolute; white-space: nowrap; line-height: 15px; }
.ticks span { transform: translateX(-50%); color: #666; }
.key span { white-space: nowrap; }
.key i { display: inline-block; width: 1.1rem; height: .8rem; margin: 0 .3rem 0 1rem; vertical-align: -1px; }
.planes { display: flex; flex-wrap: wrap; gap: 1rem; align-items: center; }
.planes svg { height: 19rem; max-width: 100%; } .planes table { font-size: .8rem; }
.planes th, .planes td { padding: .2rem .5rem; } .under { display: flex; }
.under span { overflow: hidden; text-overflow: ellipsis; white-space: nowrap; padding-right: 4px; }
td.names { text-align: left; max-width: 44rem; overflow-wrap: anywhere; } a { color: #0072B2; }
@media print { .card { break-inside: avoid; } }
"""


class Drawings:
    """What Looker draws, by name, in a file that is gone when the process is."""

    def __init__(self, settings: BagSettings) -> None:
        self._settings = settings
        self._file = tempfile.TemporaryFile()
        self._places: dict[str, tuple[int, int]] = {}

    def add(self, look: Look) -> None:
        """Draw a look, which has its drawing."""
        content = drawn(look, self._settings).encode()
        self._places[look.name] = (self._file.tell(), len(content))
        self._file.write(content)

    def get(self, name: str) -> str:
        """What was drawn under a name; "" where nothing was. Only after the last add()."""
        start, size = self._places.get(name, (0, 0))
        self._file.seek(start)
        return self._file.read(size).decode()


# -- the page -----------------------------------------------------------------------------------------------------


def page_parts(report: Mapping[str, Any], drawings: Drawings) -> Iterator[str]:
    """The page, part by part.

    Args:
        report: what `--json` writes.
        drawings: of the same looks.
    """
    said, order, findings = report["settings"], report["order"], report["findings"]
    of_episode: dict[str, list[Mapping[str, str]]] = {name: [] for name in order}
    for finding in findings:
        if finding["episode"]:
            of_episode[finding["episode"]].append(finding)
    place = {name: i for i, name in enumerate(order)}
    yield report_page.head(f"{said['bag_dir']}: recordings", STYLE)
    yield f"<h1>{escape(said['bag_dir'])}</h1>"
    overrides = f", with {' '.join(said['overrides'])}" if said["overrides"] else ""
    yield (
        f'<p class="sub">What a training would read, by {escape(said["config"] + overrides)}: '
        f"{said['fps']:g} frames per second, each with a sample of every topic within {said['max_offset_ms']:g} ms. "
        f"{escape(said['created'])}</p>"
    )
    yield report_page.verdicts(_claims(report, of_episode))
    common = [finding["sentence"] for finding in findings if not finding["episode"]]
    yield report_page.notes([*common, *report["notes"]])
    if findings:
        yield "<h2>What to do first</h2>" + _kinds_table(findings, place)
    if report["overview"]["episodes"]:
        yield "<h2>All episodes</h2>" + _overview(report, of_episode)
    yield "<h2>Episode by episode, worst first</h2>" + _key(said["max_offset_ms"])
    for i, name in enumerate(order[:DRAWN]):
        yield _card(i, name, report, of_episode[name], drawings.get(name))
    if len(order) > DRAWN:
        yield f"<p>The other {len(order) - DRAWN} have no drawing here; give their folder, to see them.</p>"
    yield f"<details><summary>A table of all {len(order)}</summary>{_table(report, of_episode)}</details>"
    if report["left_out"]:
        rows = [[entry.get("episode", entry["bag"]), entry["why"]] for entry in report["left_out"]]
        yield "<h2>Left out</h2>" + report_page.table(["episode", "why"], rows)
    yield (
        "<footer>0 s is the first frame of an episode; of what is refused, its first message. "
        "The same as data: <code>--json</code>.</footer>"
    )
    yield report_page.END


def _claims(report: Mapping[str, Any], of_episode: Mapping[str, Sequence[Mapping[str, str]]]) -> list[tuple[bool, str]]:
    """Three boxes: can it be trained on, does it teach something wrong, what is there to decide."""
    overview = report["overview"]
    worst = [_badness(found) for found in of_episode.values()]
    good, refused = overview["episodes"], overview["refused"]
    mend, look = worst.count("mend"), worst.count("look")
    usable = f"{good} episodes can be trained on"
    if good:
        usable += f": {overview['used_s']:.1f} of {overview['recorded_s']:.1f} s recorded, {overview['frames']} frames"
    return [
        (not refused, f"{usable}; {refused} recordings cannot" if refused else usable),
        (not mend, f"{mend} of them would teach the policy something wrong" if mend else "none teaches anything wrong"),
        (not look, f"{look} more to look at and decide" if look else "nothing else to decide"),
    ]


def _badness(found: Sequence[Mapping[str, str]]) -> str:
    """The worst of what was found of an episode; "" of one of which nothing was."""
    return min((finding["badness"] for finding in found), key=BADNESS.index, default="")


def _badge(badness: str) -> str:
    words, colour = WORDS[badness]
    return f'<span class="badge" style="background:{colour}">{words}</span>'


def _link(name: str, place: Mapping[str, int]) -> str:
    return f'<a href="#e{place[name]}">{escape(name)}</a>' if place[name] < DRAWN else escape(name)


def _kinds_table(findings: Sequence[Mapping[str, str]], place: Mapping[str, int]) -> str:
    rows = []
    for kind, (badness, title) in KINDS.items():
        names = list({f["episode"]: None for f in findings if f["kind"] == kind and f["episode"]})
        if not names:
            continue
        more = f" and {len(names) - NAMES} more" if len(names) > NAMES else ""
        links = ", ".join(_link(name, place) for name in names[:NAMES])
        what = f"<td>{_badge(badness)} {escape(title)}</td>"
        rows.append(f'<tr>{what}<td>{len(names)}</td><td class="names">{links}{more}</td></tr>')
    return f"<table>{''.join(rows)}</table>"


def _card(i: int, name: str, report: Mapping[str, Any], found: Sequence[Mapping[str, str]], drawing: str) -> str:
    sentences = "".join(f"<li>{escape(finding['sentence'])}</li>" for finding in found)
    title = f"{_badge(_badness(found))}<h3>{escape(name)}</h3>"
    sync = next((episode for episode in report["episodes"] if episode["episode"] == name), None)
    figures = f'<span class="figures">{escape(_figures(sync, report["looks"][name]))}</span>' if sync else ""
    opened = " open" if found and i < OPENED else ""
    return (
        f'<details class="card" id="e{i}"{opened}><summary>{title}{figures}</summary>'
        + (f'<ul class="found">{sentences}</ul>' if sentences else "")
        + (drawing or "<p>Nothing of it could be read.</p>")
        + "</details>"
    )


def _figures(sync: Mapping[str, Any], look: Mapping[str, Any]) -> str:
    texts = [
        f"{sync['used_s']:.1f} of {sync['recorded_s']:.1f} s used",
        f"{sync['frames']} frames",
        f"{sync['dropped']} dropped",
        f"still {sync['still_share']:.0%}",
    ]
    if step := sync["fastest_joint_step"]:
        texts.append(f"fastest {step['rad_per_s']:.1f} rad/s")
    if "flange_path_m" in look:
        texts.append(f"flange {look['flange_path_m']:.2f} m")
    return " · ".join(texts)


TABLE_HEADER = [
    "episode", "verdict", "recorded, s", "used, s", "frames", "dropped", "pieces", "still", "rest at start, s",
    "fastest, rad/s", "flange path, m",
]  # fmt: skip


def _table(report: Mapping[str, Any], of_episode: Mapping[str, Sequence[Mapping[str, str]]]) -> str:
    sync_reports = {episode["episode"]: episode for episode in report["episodes"]}
    rows = []
    for name, found in of_episode.items():
        verdict, sync, look = WORDS[_badness(found)][0], sync_reports.get(name), report["looks"][name]
        if sync is None:
            rows.append([name, verdict, *[""] * (len(TABLE_HEADER) - 2)])
            continue
        step, path_m = sync["fastest_joint_step"], look.get("flange_path_m")
        rows.append([
            name, verdict, f"{sync['recorded_s']:.1f}", f"{sync['used_s']:.1f}", str(sync["frames"]),
            str(sync["dropped"]), str(sync["segments"]), f"{sync['still_share']:.0%}", f"{sync['rest_at_start_s']:.1f}",
            f"{step['rad_per_s']:.2f}" if step else "", "" if path_m is None else f"{path_m:.2f}",
        ])  # fmt: skip
    return report_page.table(TABLE_HEADER, rows)


# -- all episodes -------------------------------------------------------------------------------------------------


def _overview(report: Mapping[str, Any], of_episode: Mapping[str, Sequence[Mapping[str, str]]]) -> str:
    """Bars of each in order of name, where the flange goes, and what the states do."""
    overview = report["overview"]
    length, farthest = overview["duration_s"], overview["farthest"]
    text = (
        f"{length['median']:.1f} s long in the median ({length['least']:.1f} to {length['most']:.1f}), still in "
        f"{overview['still_share']:.0%} of the time."
    )
    if farthest:
        text += (
            f" Least like the others is {farthest['episode']}, which {farthest['by']}: {farthest['score']:.1f} times "
            f"the usual deviation; beyond {farthest['limit']:g} it is said to be unlike."
        )
    figures = ("least", "most", "start_median", "end_median")
    rows = [[s["name"], s["unit"], *(f"{s[key]:.3f}" for key in figures)] for s in overview["states"]]
    header = ["state", "unit", "least", "most", "start, median", "end, median"]
    where, planes = _planes(report, of_episode)
    return (
        f"<p>{escape(text)}</p>{_bars(report, of_episode)}{where}"
        f'<div class="planes">{planes}{report_page.table(header, rows)}</div>'
    )


def _bars(report: Mapping[str, Any], of_episode: Mapping[str, Sequence[Mapping[str, str]]]) -> str:
    """A bar for each episode and refused recording, by name."""
    sync_reports = {episode["episode"]: episode for episode in report["episodes"]}
    names = sorted(of_episode)
    shown = [names[i] for i in np.unique(np.linspace(0, len(names) - 1, min(BARS, len(names))).astype(int))]
    lengths, used, still, dropped = [], [], [], []
    for name in shown:
        sync, span_s = sync_reports.get(name), report["looks"][name].get("span_s", [0, 0])
        lengths.append(sync["recorded_s"] if sync else span_s[1] - span_s[0])
        used.append(sync["used_s"] if sync else 0)
        still.append(sync["still_share"] if sync else 0)
        dropped.append(sync["dropped"] / max(1, sync["frames"] + sync["dropped"]) if sync else 0)
    most_s, width = max([*lengths, 1e-9]), ACROSS / len(shown)

    def bars(values: Sequence[float], most: float, colours: Sequence[str]) -> str:
        return "".join(
            f'<rect x="{i * width:.1f}" y="{100 - 100 * value / most:.1f}" width="{max(0.5, 0.86 * width):.1f}" '
            f'height="{100 * value / most:.1f}" fill="{colour}"><title>{escape(name)}</title></rect>'
            for i, (name, value, colour) in enumerate(zip(shown, values, colours, strict=True))
            if value
        )

    all_of = [[colour] * len(shown) for colour in ("#c3c8cd", BLUE, ORANGE, VERMILION)]
    verdicts = [WORDS[_badness(of_episode[name])][1] for name in shown]
    rows = [
        (f"<b>recorded</b>, <b>used</b><br>0 to {most_s:.1f} s",
         row_svg(bars(lengths, most_s, all_of[0]) + bars(used, most_s, all_of[1]), 70)),
        ("<b>still</b><br>0 to 100 %", row_svg(bars(still, 1, all_of[2]), 34)),
        ("<b>dropped</b><br>0 to 100 %", row_svg(bars(dropped, 1, all_of[3]), 34)),
        ("<b>verdict</b><br>" + " ".join(f'<i style="color:{c};font-style:normal">{w.split()[-1]}</i>'
                                         for w, c in WORDS.values()), row_svg(bars([1] * len(shown), 1, verdicts), 14)),
    ]  # fmt: skip
    if len(shown) <= NAMED:
        spans = "".join(f'<span style="width:{1 / len(shown):.3%}">{escape(name)}</span>' for name in shown)
        rows.append(("", f'<div class="under">{spans}</div>'))
    note = f"<p>Every {len(names) / len(shown):.1f}th of {len(names)} is shown.</p>" if len(shown) < len(names) else ""
    return f'<div class="look">{_grid(rows)}</div>{note}'


def _planes(report: Mapping[str, Any], of_episode: Mapping[str, Sequence[Mapping[str, str]]]) -> tuple[str, str]:
    """The flange's paths from above and from the side, in metres; those of episodes that are unlike stand out."""
    if not report["overview"]["workspace_m"]:
        return "", ""
    names = [episode["episode"] for episode in report["episodes"] if "flange_m" in report["looks"][episode["episode"]]]
    unlike = {name for name in names if any(finding["kind"] == "unlike" for finding in of_episode[name])}
    shown = [names[i] for i in np.unique(np.linspace(0, len(names) - 1, min(PATHS, len(names))).astype(int))]
    paths = {name: np.array(report["looks"][name]["flange_m"]) for name in [*shown, *sorted(unlike)]}
    above = {name: path[:, :2] for name, path in paths.items()}
    side = {name: np.stack([np.hypot(path[:, 0], path[:, 1]), path[:, 2]], axis=1) for name, path in paths.items()}
    low, high = (report["overview"]["workspace_m"][which] for which in ("least", "most"))
    box = ", ".join(f"{axis} {a:.2f} to {b:.2f} m" for axis, a, b in zip("xyz", low, high, strict=True))
    return (
        f"<p>Where the flange goes, by a UR10e's kinematics, in the robot's base frame: {box}. Green: start; black: "
        f"end{'; thick: unlike the others' if unlike else ''}.</p>",
        _plane("from above", "x", "y", above, unlike) + _plane("from the side", "reach", "z", side, unlike),
    )


def _plane(title: str, x_name: str, y_name: str, paths: Mapping[str, np.ndarray], unlike: set[str]) -> str:
    """Paths (K, 2) in metres, on a grid of decimetres, drawn in millimetres."""
    points = np.concatenate(list(paths.values()))
    grid = 0.1 if np.ptp(points, axis=0).max() < 1 else 0.2
    low, high = np.floor(points.min(axis=0) / grid) * grid, np.ceil(points.max(axis=0) / grid) * grid
    high = np.maximum(high, low + grid)
    width, height = (1000 * (high - low)).tolist()
    unit = max(width, height) / 100
    opacity, radius = (0.45, unit) if len(paths) <= CLEAR else (0.12, unit / 2)
    inside = []
    for axis in (0, 1):
        for value in np.arange(low[axis], high[axis] + grid / 2, grid):
            at = 1000 * (value - low[axis]) if axis == 0 else height - 1000 * (value - low[axis])
            ends = f'x1="{at:.0f}" x2="{at:.0f}" y1="0" y2="{height:.0f}"' if axis == 0 else (
                f'x1="0" x2="{width:.0f}" y1="{at:.0f}" y2="{at:.0f}"')  # fmt: skip
            place = f'x="{at:.0f}" y="{height + 4 * unit:.0f}" text-anchor="middle"' if axis == 0 else (
                f'x="{-unit:.0f}" y="{at + unit:.0f}" text-anchor="end"')  # fmt: skip
            inside.append(f'<line {ends} stroke="#e3e6e8" stroke-width="{unit / 5:.1f}"/>')
            inside.append(f'<text {place} font-size="{3 * unit:.0f}" fill="#666">{round(value, 1) + 0.0:.1f}</text>')
    for name, path in sorted(paths.items(), key=lambda item: item[0] in unlike):
        x, y = 1000 * (path[:, 0] - low[0]), height - 1000 * (path[:, 1] - low[1])
        steps = "L".join(f"{a:.0f} {b:.0f}" for a, b in zip(x, y, strict=True))
        thick, colour, dense = (3, PINK, 1) if name in unlike else (1, BLUE, opacity)
        inside.append(
            f'<path d="M{steps}" fill="none" stroke="{colour}" opacity="{dense:g}" '
            f'stroke-width="{thick * unit / 3:.1f}" stroke-linejoin="round"><title>{escape(name)}</title></path>'
            f'<circle cx="{x[0]:.0f}" cy="{y[0]:.0f}" r="{radius:.1f}" fill="{GREEN}"/>'
            f'<circle cx="{x[-1]:.0f}" cy="{y[-1]:.0f}" r="{radius:.1f}" fill="#222"/>'
        )
    left, below = 10 * unit, 10 * unit
    view = f"{-left:.0f} {-6 * unit:.0f} {width + left + 3 * unit:.0f} {height + below + 6 * unit:.0f}"
    words = (
        f'<text x="0" y="{-2 * unit:.0f}" font-size="{3.4 * unit:.0f}" font-weight="600">{title}</text>'
        f'<text x="{width:.0f}" y="{height + 8.5 * unit:.0f}" font-size="{3 * unit:.0f}" text-anchor="end">'
        f"{x_name} across, {y_name} up, m</text>"
    )
    return f'<svg viewBox="{view}" font-family="system-ui, sans-serif">{"".join(inside)}{words}</svg>'


# -- one look -----------------------------------------------------------------------------------------------------


def _key(max_offset_ms: float) -> str:
    """What the colours mean."""
    marks = "".join(
        f'<span><i style="background:{MARKS[kind][0]};opacity:{max(0.3, MARKS[kind][1]):g}"></i>{words}</span> '
        for kind, words in (
            ("rest", "rest"), ("stall", "stall"), ("gap", "gap in a topic"), ("hang", "hanging driver"),
            ("jump", "jump"), ("pictures", "pictures that show no scene"),
        )
    )  # fmt: skip
    return (
        f'<p class="key">Above: {THUMBNAILS} pictures per camera, grey where there is none. Curves: each state, its '
        f"range beside it. Below, of each topic: its rate (grey) and how far the nearest message was (line; dashed: "
        f"data.max_offset_ms, {max_offset_ms:g} ms). Marks: {marks}</p>"
    )


def drawn(look: Look, settings: BagSettings) -> str:
    """A look as rows over one axis of time."""
    assert look.drawing is not None
    start_s, length_s = look.span_s[0], max(1e-9, look.span_s[1] - look.span_s[0])

    def across(seconds: Any) -> Any:
        return (np.asarray(seconds) - start_s) / length_s * ACROSS

    above = [(f"<b>{escape(camera)}</b>", _strip(camera, strip)) for camera, strip in look.drawing.strips.items()]
    used = "".join(band(across(a), min(ACROSS, across(b)), BLUE, 1) for a, b in look.drawing.used_s)
    above.append(("recorded, <b>used</b>", row_svg(band(0, ACROSS, "#c3c8cd", 1) + used, 9)))
    curves = [_curve_row(curve, across) for curve in look.drawing.curves]
    topics = [_topic_row(topic, look, across, settings.max_offset_ms) for topic in look.drawing.topics]
    rows = [*above, ("", _tags(look.marks, across)), *curves, *topics, ("s", _ticks(*look.span_s))]
    bands = "".join(
        band(across(mark.from_s), across(mark.to_s), MARKS[kind][0], MARKS[kind][1])
        for kind in MARKS
        for mark in look.marks
        if mark.kind == kind
    )
    over = f"grid-row: {len(above) + 2} / span {len(curves) + len(topics)}"
    return (
        f'<div class="look">{_grid(rows)}<svg class="over" viewBox="0 0 {ACROSS} 100" preserveAspectRatio="none" '
        f'style="{over}">{bands}</svg></div>'
    )


def _grid(rows_html: Sequence[tuple[str, str]]) -> str:
    return "".join(
        f'<div class="l" style="grid-row:{i}">{label}</div><div class="p" style="grid-row:{i}">{content}</div>'
        for i, (label, content) in enumerate(rows_html, 1)
    )


def _strip(camera: str, strip: np.ndarray) -> str:
    _, content = cv2.imencode(".jpg", strip[..., ::-1], [cv2.IMWRITE_JPEG_QUALITY, JPEG_QUALITY])
    return report_page.picture(f"camera {camera} over time", content.tobytes(), "image/jpeg")


def _curve_row(curve: Curve, across: Any) -> tuple[str, str]:
    middle, half = (curve.low + curve.high) / 2, max((curve.high - curve.low) / 2, 0.02)  # noise stays small
    y = 50 - 44 * (curve.y - middle) / half
    name = curve.name.removesuffix("_joint")
    low, high = (f"{round(value, 2) + 0.0:.2f}" for value in (curve.low, curve.high))  # no -0.00
    label = f"<b>{escape(name)}</b><br>{low} to {high} {escape(curve.unit)}"
    return label, row_svg(line(across(curve.x_s), y, curve.breaks, BLUE), 36)


def _topic_row(topic: TopicCurve, look: Look, across: Any, max_offset_ms: float) -> tuple[str, str]:
    edges = np.linspace(0, ACROSS, len(topic.rate_hz) + 1)
    top_hz = 1.35 * max(topic.median_hz, 1e-9)
    rate = "".join(
        f'<rect x="{a:.0f}" y="{100 - min(100, 100 * hz / top_hz):.0f}" width="{b - a + 1:.0f}" '
        f'height="{min(100, 100 * hz / top_hz):.0f}" fill="#d3d7db"/>'
        for a, b, hz in zip(edges[:-1], edges[1:], topic.rate_hz, strict=True)
        if hz
    )
    y = 100 - np.minimum(98, 50 * topic.offset_ms / max(max_offset_ms, 1e-9))
    x = (np.arange(len(y)) + 0.5) * ACROSS / len(y)
    limit = (
        f'<line x1="0" x2="{ACROSS}" y1="50" y2="50" stroke="#999" stroke-dasharray="4 4" '
        'vector-effect="non-scaling-stroke"/>'
    )
    facts = look.topics[topic.name]
    label = (
        f'<span title="{escape(topic.name)}"><b>{escape(topic.name)}</b><br>{facts["median_hz"]:.1f} Hz, offset up to '
        f"{facts['worst_offset_ms']:.0f} ms</span>"
    )
    return label, row_svg(rate + limit + line(x, y, np.arange(len(y)) == 0, VERMILION), 30)


def _tags(marks: Sequence[Mark], across: Any) -> str:
    """A few words for the marks that matter most, in up to TAG_LANES lanes; those without a place are left out."""
    weight = {kind: i for i, kind in enumerate(MARKS)}
    chosen = sorted((m for m in marks if MARKS[m.kind][2]), key=lambda m: (-weight[m.kind], m.from_s - m.to_s))[:TAGS]
    ends: list[list[tuple[float, float]]] = [[] for _ in range(TAG_LANES)]
    spans = []
    for mark in chosen:
        words = f"{mark.kind}: {mark.where} {mark.what}" if mark.where else f"{mark.kind}: {mark.what}"
        width = 6.2 * len(words)  # units: about as many pixels
        x = float(np.clip(across(mark.from_s), 0, max(0.0, ACROSS - width)))
        lane = next((i for i, of in enumerate(ends) if all(x + width < a or b < x for a, b in of)), None)
        if lane is None:
            continue
        ends[lane].append((x, x + width))
        spans.append(f'<span style="left:{x / ACROSS:.1%};top:{15 * lane}px">{escape(words)}</span>')
    height = 15 * max((i + 1 for i, of in enumerate(ends) if of), default=0)
    return f'<div class="tags" style="height:{height}px">{"".join(spans)}</div>'


def _ticks(first_s: float, last_s: float) -> str:
    length_s = max(1e-9, last_s - first_s)
    power = 10.0 ** np.floor(np.log10(length_s / 8))
    step = power * min(factor for factor in (1, 2, 5, 10) if 8 * factor * power >= length_s)
    values = np.arange(np.ceil(first_s / step), np.floor(last_s / step) + 1) * step
    spans = "".join(
        f'<span style="left:{(value - first_s) / length_s:.1%}">{value:g}</span>'
        for value in (values + 0.0).round(6).tolist()
    )
    return f'<div class="ticks" style="height:16px">{spans}</div>'
