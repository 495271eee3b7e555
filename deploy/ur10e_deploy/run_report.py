"""What a run on a robot leaves: the figures, one screen, and report.html with a picture.

Knows: the control loop's log, files, words.
Must not know: how anything was controlled.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from html import escape
from pathlib import Path
from typing import Any

import numpy as np

import report_page
from ur10e import JOINT_NAMES

from .control import ControlLoop, ControlSettings, Log
from .limits import Limits
from .report import ERROR, PREDICTED, _new_figure, _picture, _save, can_draw
from .thinking import Answer

NAMES = [name.removesuffix("_joint") for name in JOINT_NAMES]
AHEAD_S = (0.0, 0.5, 1.0)  # beyond the next frame: where a shadow's predictions are compared
REPORT, NUMBERS, PICTURE = "report.html", "run.json", "run.png"


def differences(command_rad: np.ndarray, period_s: float) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Speed (N-1, J), acceleration (N-2, J) and jerk (N-3, J) of consecutive commands (N, J) rad."""
    speed = np.diff(command_rad, axis=0) / period_s
    acceleration = np.diff(speed, axis=0) / period_s
    return speed, acceleration, np.diff(acceleration, axis=0) / period_s


def percentiles_ms(seconds: Sequence[float]) -> dict[str, float] | None:
    """p50, p99, p99.9 and the largest in ms; observed values. None without any."""
    if not len(seconds):
        return None
    found = {f"p{p:g}": np.percentile(seconds, p, method="higher") for p in (50, 99, 99.9)} | {"max": max(seconds)}
    return {name: round(1e3 * float(value), 3) for name, value in found.items()}


def shadow_errors(log: Log, fps: float) -> list[dict[str, Any]]:
    """What the policy predicted, against where a person took the arm: per horizon, mean |difference| of each joint."""
    time_s, measured = np.array(log.time_s), np.array(log.measured_rad)
    rows = []
    for ahead_s in AHEAD_S:
        i = round(ahead_s * fps)
        pairs = [
            (answer.positions[i, :6], [np.interp(at_s, time_s, column) for column in measured.T])
            for _, answer, _ in log.answers
            if answer.positions is not None
            and i < len(answer.positions)
            and (at_s := answer.asked_s + (i + 1) / fps) <= time_s[-1]
        ]
        if pairs:
            predicted, moved = np.array(pairs).transpose(1, 0, 2)
            off = np.abs(predicted - moved).mean(axis=0)
            rows.append(
                {"ahead_s": round((i + 1) / fps, 3), "chunks": len(pairs), "mean_rad": float(off.mean()),
                 "per_joint_rad": dict(zip(NAMES, off.tolist(), strict=True))}
            )  # fmt: skip
    return rows


def summarise(
    loop: ControlLoop, limits: Limits, settings: ControlSettings, oldest_s: Mapping[str, float], lock_step: bool
) -> dict[str, Any]:
    """What run.json holds of a run: every figure with its unit in its name."""
    log, period_s = loop.log, 1 / settings.command_hz
    command = np.array(log.command_rad)[:, :6]
    peaks = [np.abs(d).max(axis=0) if len(d) else np.zeros(6) for d in differences(command, period_s)]
    allowed = [limits.speed_rad_s, limits.acceleration_rad_s2, limits.jerk_rad_s3]
    answers: list[Answer] = [answer for _, answer, _ in log.answers if answer.positions is not None]
    waited = [came_s - answer.asked_s for came_s, answer, _ in log.answers]
    jumps = np.array(loop.playback.jumps)[:, :6] if loop.playback.jumps else np.zeros((0, 6))
    running = np.array(log.running)
    return {
        "ended": loop.ended,
        "orderly": loop.orderly,
        "clock": "lock step" if lock_step else "real time",
        "commanding": settings.commanding,
        "duration_s": round(log.time_s[-1] - log.time_s[0], 3),
        "periods": len(log.time_s),
        "missed_periods": log.missed_periods,
        "command_hz": settings.command_hz,
        "speed_fraction": settings.speed_fraction,
        "period_ms": percentiles_ms(np.diff(log.time_s).tolist()),
        "late_ms": percentiles_ms(log.late_s),
        "inference_ms": percentiles_ms([answer.seconds for answer in answers]),
        "asked_to_playing_ms": percentiles_ms(waited),
        "chunks": len(answers),
        "failed_chunks": len(log.answers) - len(answers),
        "late_actions": loop.playback.late,
        "seam_jump_rad": {
            "median": float(np.median(np.abs(jumps).max(axis=1))) if len(jumps) else 0.0,
            "largest": float(np.abs(jumps).max()) if len(jumps) else 0.0,
        },
        "peaks": {
            what: dict(zip(NAMES, [[float(p), float(a)] for p, a in zip(peak, limit, strict=True)], strict=True))
            for what, peak, limit in zip(
                ("speed_rad_s", "acceleration_rad_s2", "jerk_rad_s3"), peaks, allowed, strict=True
            )
        },
        "tracking_rad": float(np.abs(np.array(log.measured_rad) - command)[running].max()) if running.any() else 0.0,
        "limited_periods": int(sum(log.limited)),
        "limited_by_rad": log.beyond_rad,
        "oldest_s": {name: round(age, 4) for name, age in oldest_s.items()},
        "stops": [
            {"kind": s.kind, "at_s": round(s.at_s, 3), "why": s.why,
             "rest_s": None if s.rest_s is None else round(s.rest_s, 3),
             "resumed_s": None if s.resumed_s is None else round(s.resumed_s, 3)}
            for s in log.stops
        ],
        "shadow": [] if settings.commanding else shadow_errors(log, settings.fps),
    }  # fmt: skip


def _ms(found: Mapping[str, float] | None) -> str:
    if found is None:
        return "none"
    return f"p50 {found['p50']:.2f}, p99 {found['p99']:.2f}, p99.9 {found['p99.9']:.2f}, largest {found['max']:.2f} ms"


def _nearest(of: Mapping[str, Sequence[float]]) -> str:
    """The joint that came nearest to its limit."""
    name, (peak, limit) = max(of.items(), key=lambda item: item[1][0] / item[1][1])
    return f"{peak:.3f} of {limit:.3f} ({name})"


def screen(summary: Mapping[str, Any], folder: Path | None) -> str:
    """What the terminal shows at the end."""
    jump = summary["seam_jump_rad"]
    lines = [
        ("ended", summary["ended"]),
        ("control", f"{summary['periods']} periods at {summary['command_hz']:g} Hz in {summary['clock']}, "
                    f"{summary['missed_periods']} missed; {_ms(summary['period_ms'])}"),
        ("late by", _ms(summary["late_ms"])),
        ("inference", f"{_ms(summary['inference_ms'])}; {summary['chunks']} chunks, {summary['failed_chunks']} failed, "
                      f"{summary['late_actions']} actions late"),
        ("seams", f"jumps of {jump['median']:.4f} rad (median), {jump['largest']:.4f} rad (largest) before blending"),
        ("speed", f"{_nearest(summary['peaks']['speed_rad_s'])} rad/s"),
        ("acceleration", f"{_nearest(summary['peaks']['acceleration_rad_s2'])} rad/s^2"),
        ("jerk", f"{_nearest(summary['peaks']['jerk_rad_s3'])} rad/s^3"),
        ("limited", f"{summary['limited_periods']} commands, by {summary['limited_by_rad']:.4f} rad at most; a joint "
                    f"was {summary['tracking_rad']:.4f} rad from its command at most"),
        ("ages", ", ".join(f"{name} {1e3 * age:.0f} ms at most" for name, age in summary["oldest_s"].items())),
    ]  # fmt: skip
    for stop in summary["stops"]:
        rest = "did not come to rest" if stop["rest_s"] is None else f"at rest after {stop['rest_s']:.3f} s"
        again = "" if stop["resumed_s"] is None else f", went on at {stop['resumed_s']:.3f} s"
        rest = "" if stop["kind"] == "halted" else f" ({rest}{again})"
        lines.append(("stop", f"{stop['at_s']:.3f} s {stop['kind']}: {stop['why']}{rest}"))
    for row in summary["shadow"]:
        lines.append(
            ("shadow", f"{row['ahead_s']:.2f} s ahead {row['mean_rad']:.4f} rad from what the arm did, "
                       f"mean of {row['chunks']} chunks")
        )  # fmt: skip
    if folder is not None:
        lines.append(("report", str(folder / REPORT)))
    return "\n".join(f"{name:<13} {text}" for name, text in lines)


def draw(path: Path, log: Log, limits: Limits, period_s: float) -> None:
    """A PNG: commands, speeds and accelerations over time, stops and seams marked."""
    figure = _new_figure(12, 8)
    axes = figure.subplots(3, 1, sharex=True)
    time_s, command = np.array(log.time_s), np.array(log.command_rad)[:, :6]
    speed, acceleration, _ = differences(command, period_s)
    for rows, values, label, limit in (
        (axes[0], command, "command, rad", None),
        (axes[1], speed, "speed, rad/s", limits.speed_rad_s.min()),
        (axes[2], acceleration, "acceleration, rad/s²", limits.acceleration_rad_s2.min()),
    ):
        for joint, column in zip(NAMES, values.T, strict=True):
            rows.plot(time_s[len(time_s) - len(values) :], column, lw=1, label=joint)
        if limit is not None:
            largest = np.abs(values).max() if len(values) else 0.0
            if largest > 0.3 * limit:
                for sign in (-1, 1):
                    rows.axhline(sign * limit, color=ERROR, lw=1, ls=":")
        rows.set_ylabel(label)
        for came_s, answer, _ in log.answers:
            rows.axvline(came_s, color=PREDICTED if answer.positions is not None else ERROR, lw=0.5, alpha=0.3)
        for stop in log.stops:
            rows.axvline(stop.at_s, color=ERROR, lw=1.5)
    axes[0].legend(ncols=6, loc="upper center", bbox_to_anchor=(0.5, 1.25), frameon=False)
    axes[2].set_xlabel("s; thin lines: a chunk came; thick: a stop; dotted: the lowest limit")
    _save(figure, path)


def html(summary: Mapping[str, Any], folder: Path) -> str:
    """The page, self-contained."""
    parts = [
        f"<h1>{escape(summary['policy']['name'])} on {escape(summary['robot'])}</h1>",
        f'<p class="sub">{escape(summary["created"])}, {summary["duration_s"]:g} s, {escape(summary["clock"])}, '
        f"{'commanding' if summary['commanding'] else 'nothing was commanded'}</p>",
        report_page.verdicts([(summary["orderly"], summary["ended"])]),
        report_page.notes(summary["notes"]),
    ]
    parts += [_picture(folder, PICTURE), "<h2>Stops</h2>"]
    rows = [
        [f"{s['at_s']:.3f}", s["kind"], s["why"], "" if s["rest_s"] is None else f"{s['rest_s']:.3f}",
         "" if s["resumed_s"] is None else f"{s['resumed_s']:.3f}"]
        for s in summary["stops"]
    ]  # fmt: skip
    parts += [
        report_page.table(["at, s", "kind", "why", "at rest after, s", "went on at, s"], rows),
        "<h2>Peaks and limits</h2>",
    ]
    peaks = summary["peaks"]
    rows = [[name, *(f"{peaks[what][name][i]:.3f}" for what in peaks for i in (0, 1))] for name in NAMES]
    units = ("speed, rad/s", "acceleration, rad/s²", "jerk, rad/s³")
    parts.append(report_page.table(["joint", *(cell for unit in units for cell in (unit, "limit"))], rows))
    parts.append("<h2>Time</h2>")
    kinds = ("period_ms", "late_ms", "inference_ms", "asked_to_playing_ms")
    rows = [
        [name.removesuffix("_ms").replace("_", " "), *(f"{v:.3f}" for v in summary[name].values())]
        for name in kinds
        if summary[name]
    ]
    parts.append(report_page.table(["ms", "p50", "p99", "p99.9", "largest"], rows))
    plain = ("command_hz", "speed_fraction", "periods", "missed_periods", "chunks", "failed_chunks", "late_actions",
             "seam_jump_rad", "limited_periods", "limited_by_rad", "tracking_rad", "oldest_s", "shadow")  # fmt: skip
    parts += ["<h2>Everything else</h2>", report_page.facts("figures", {name: summary[name] for name in plain})]
    parts += [
        report_page.facts(name, summary[name], opened=name == "policy") for name in ("policy", "options", "versions")
    ]
    return report_page.page(f"{summary['policy']['name']}: on the robot", parts)


def write(folder: Path, summary: Mapping[str, Any], log: Log, limits: Limits) -> None:
    """report.html, its picture, and run.json, which is written last."""
    if can_draw():
        draw(folder / PICTURE, log, limits, 1 / summary["command_hz"])
    (folder / REPORT).write_text(html(summary, folder), encoding="utf-8")
    (folder / NUMBERS).write_text(json.dumps(summary, indent=2) + "\n", encoding="utf-8")
