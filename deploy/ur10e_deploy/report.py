"""What a person looks at after an evaluation: pictures (with matplotlib), and one HTML page that holds them all.

Colours are Okabe and Ito's, which people with any colour vision can tell apart; no verdict is said by colour alone.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Mapping, Sequence
from html import escape
from pathlib import Path
from typing import TYPE_CHECKING, Any

import cv2
import numpy as np

import report_page

from .config import CONTROL_HZ, RobotContract
from .episode_result import EpisodeResult

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

RECORDED, PREDICTED, ERROR, BUDGET = "0.25", "#0072B2", "#D55E00", "#009E73"
POLICY_COLOURS = {"policy": PREDICTED, "no motion": "0.55", "mean action": "0.8"}
THUMBNAIL_HEIGHT = 120  # pixels
COLUMNS = 3  # joint panels side by side


# -- the verdict, in words ------------------------------------------------------------------------------------------


# In the simulated cell a policy that was 1.8 times better than "no motion" never did its task, and one that was no
# better always did: docs/results.md.
NO_PROMISE = "this does not predict success at the task: python -m sim.rollout measures that, for the simulated arm"


def verdict_text(summary: Mapping[str, Any]) -> str:
    """One line: is it better than doing nothing, and is it fast enough?"""
    return "; ".join(text for _, text in _verdicts(summary))


def ahead_text(row: Mapping[str, Any]) -> str:
    """A row of results.positions_ahead() in words."""
    tool = "" if row["tool_m_mean"] is None else f", {row['tool_m_mean'] * 1e3:.1f} mm at the tool"
    return f"a joint is off by {row['joint_rad_mean']:.3g} rad on average{tool} ({row['chunks']} chunks, open loop)"


def _verdicts(summary: Mapping[str, Any]) -> list[tuple[bool, str]]:
    verdict, error, latency = summary["verdict"], summary["error"], summary["latency"]
    name, best = min(((n, of["mae"]) for n, of in error.items() if n != "policy"), key=lambda item: item[1])
    ratio = verdict["times_better_than_best_baseline"]
    if verdict["better_than_baselines"]:
        said = "better than both baselines"
        said += f" ('{name}', the better of them, is off by {ratio:.1f} times as much)" if ratio else ""
    else:
        said = f"NOT better than '{name}' (mean absolute error {error['policy']['mae']:.3g} against {best:.3g})"
    p99, count = latency["inference"]["p99_ms"], latency["inference"]["count"]
    fast = "real-time" if verdict["realtime_30hz"] else "NOT real-time"
    timing = f"{fast} at {CONTROL_HZ:g} Hz (p99 of {count} inferences {p99:.1f} ms, limit {1e3 / CONTROL_HZ:.1f})"
    return [(verdict["better_than_baselines"], said), (verdict["realtime_30hz"], timing)]


# -- pictures -------------------------------------------------------------------------------------------------------


def can_draw() -> bool:
    """Whether matplotlib is installed; without it there are no pictures, and everything else is as always."""
    return importlib.util.find_spec("matplotlib") is not None


def _new_figure(width_in: float, height_in: float) -> Figure:
    import matplotlib
    from matplotlib.figure import Figure  # no pyplot: half the time to import, and nothing global
    from matplotlib.layout_engine import ConstrainedLayoutEngine

    matplotlib.rcParams.update({"font.size": 11, "axes.spines.top": False, "axes.spines.right": False})
    return Figure(figsize=(width_in, height_in), layout=ConstrainedLayoutEngine(hspace=0.02, h_pad=0.05))


def _save(figure: Figure, path: Path) -> None:
    figure.savefig(path, dpi=100, format="png")


def draw_episode(path: Path, result: EpisodeResult, contract: RobotContract, joints: Sequence[str]) -> None:
    """Predicted against recorded actions per joint, the error below, and what the cameras saw along the time axis."""
    readable = [_readable(unit) for unit in contract.action_units]
    scale, units = np.array([factor for factor, _ in readable]), [unit for _, unit in readable]
    first = int(contract.in_rad.argmax())
    mae = np.abs(result.predicted - result.recorded)[:, contract.in_rad].mean()
    title = f"{result.name}: predicted against recorded {contract.action_kind} actions, mean absolute error "
    title += f"{mae * scale[first]:.3g} {units[first]}"
    ylabels = [f"action, {unit}".removesuffix(", ") for unit in units]
    _draw_joints(
        path, result, joints, title, ylabels, result.predicted * scale, result.recorded * scale, "predicted",
        np.abs(result.predicted - result.recorded) * scale, "|error|",
    )  # fmt: skip


def _readable(unit: str) -> tuple[float, str]:
    """(factor, unit) for pictures: deltas of joints are a few thousandths of a rad."""
    return (1e3, "mrad per frame") if unit == "rad per frame" else (1.0, unit)


def draw_rollout(path: Path, result: EpisodeResult, contract: RobotContract, joints: Sequence[str]) -> None:
    """Where the policy's own actions lead, against the recorded joint path, and the drift below."""
    assert result.rollout_rad is not None  # drawn only after a rollout
    drift = contract.difference(result.rollout_rad, contract.acted_on(result.state_rad))
    title = f"{result.name}: rollout (images stay the recorded ones) against the recorded joint path, largest drift "
    title += f"{np.abs(drift[:, contract.in_rad]).max():.3g} rad"
    ylabels = [f"position, {contract.units[i]}".removesuffix(", ") for i in contract.acted]
    # Beside the rollout, on its turn, so that wrapping draws no jump.
    recorded = result.rollout_rad - drift
    _draw_joints(
        path, result, joints, title, ylabels, result.rollout_rad, recorded, "rollout", np.abs(drift), "|drift|"
    )


def _draw_joints(
    path: Path,
    result: EpisodeResult,
    joints: Sequence[str],
    title: str,
    ylabels: Sequence[str],
    ours: np.ndarray,
    recorded: np.ndarray,
    our_name: str,
    error: np.ndarray,
    error_name: str,
) -> None:
    if not can_draw():
        return
    # A line is not drawn across a cut in the recording.
    cuts = np.flatnonzero(np.diff(result.frame) != 1) + 1
    seconds = np.insert(result.timestamp_s, cuts, np.nan)
    ours, recorded, error = (
        np.insert(values.astype(float), cuts, np.nan, axis=0) for values in (ours, recorded, error)
    )
    strips = _strips(result.thumbnails)
    rows = -(-len(joints) // COLUMNS)
    figure = _new_figure(13, 1.3 * len(strips) + 3.1 * rows + 0.6)
    figure.suptitle(title, fontsize=13)
    grid = figure.add_gridspec(len(strips) + rows, COLUMNS, height_ratios=[1.3] * len(strips) + [3.1] * rows)
    for i, (camera, (strip, centres, times)) in enumerate(strips.items()):
        axes = figure.add_subplot(grid[i, :])
        axes.imshow(strip)
        axes.set_ylabel(camera)
        axes.set_xticks(centres, [f"{time:.1f} s" for time in times])
        axes.set_yticks([])
        axes.tick_params(length=0)
        axes.spines[:].set_visible(False)
    starts = result.timestamp_s[result.inferred]
    for j, name in enumerate(joints):
        cell = grid[len(strips) + j // COLUMNS, j % COLUMNS].subgridspec(2, 1, height_ratios=[3, 1], hspace=0.05)
        upper = figure.add_subplot(cell[0])
        lower = figure.add_subplot(cell[1], sharex=upper)
        if not result.inferred.all():  # chunks: where a new one begins
            for axes in (upper, lower):
                axes.vlines(starts, 0, 1, transform=axes.get_xaxis_transform(), color="0.75", linewidth=1, zorder=0)
        upper.plot(seconds, recorded[:, j], color=RECORDED, linewidth=2.4, label="recorded")
        upper.plot(seconds, ours[:, j], color=PREDICTED, linewidth=1.6, label=our_name)
        lower.fill_between(seconds, error[:, j], color=ERROR, alpha=0.85, linewidth=0, label=error_name)
        lower.set_ylim(bottom=0)
        upper.set_title(name, fontsize=12)
        upper.tick_params(labelbottom=False)
        upper.grid(alpha=0.25)
        lower.grid(alpha=0.25)
        if j % COLUMNS == 0 or ylabels[j] != ylabels[j - 1]:
            upper.set_ylabel(ylabels[j])
            lower.set_ylabel(error_name)
        if j + COLUMNS >= len(joints):
            lower.set_xlabel("s")
    handles = [*upper.get_lines()[:2], lower.collections[-1]]
    labels = ["recorded", our_name, error_name]
    if not result.inferred.all():
        handles.append(upper.collections[0])
        labels.append("new chunk")
    figure.legend(handles, labels, loc="outside lower center", ncols=len(handles), frameon=False)
    _save(figure, path)


def _strips(
    thumbnails: Sequence[tuple[float, dict[str, np.ndarray]]],
) -> dict[str, tuple[np.ndarray, list[float], list[float]]]:
    """For each camera: (its frames side by side, the middle of each in pixels, its time in seconds)."""
    strips = {}
    for camera in thumbnails[0][1] if thumbnails else ():
        parts, centres, x = [], [], 0
        for _, images in thumbnails:
            height, width = images[camera].shape[:2]
            new_width = max(1, round(width * THUMBNAIL_HEIGHT / height))
            way = cv2.INTER_AREA if THUMBNAIL_HEIGHT < height else cv2.INTER_CUBIC
            parts.append(cv2.resize(images[camera], (new_width, THUMBNAIL_HEIGHT), interpolation=way))
            parts.append(np.full((THUMBNAIL_HEIGHT, 4, 3), 255, np.uint8))
            centres.append(x + new_width / 2)
            x += new_width + 4
        strips[camera] = (np.hstack(parts[:-1]), centres, [time for time, _ in thumbnails])
    return strips


def draw_overview(path: Path, summary: Mapping[str, Any], inference_s: Sequence[np.ndarray]) -> None:
    """Draw the whole evaluation on one picture.

    It shows the error per joint and per episode beside the baselines, the error by position in the chunk, the latency
    and, after a rollout, the drift over time. `inference_s` has an array for each episode: the seconds of the steps
    that inferred.
    """
    if not can_draw():
        return
    scale, unit = _readable(summary["unit"])
    rollout = summary["rollout"]
    figure = _new_figure(13, 11.5 if rollout else 8)
    verdict = verdict_text(summary).replace("; ", "\n")  # one claim a line: together they are wider than the picture
    figure.suptitle(f"{summary['policy']['name']}\n{verdict}", fontsize=13)
    grid = figure.add_gridspec(3 if rollout else 2, 2)

    joints = [name for name, its in summary["units"].items() if its == summary["unit"]]  # on one axis
    axes = figure.add_subplot(grid[0, 0])
    per_joint = {p: [scale * of["per_joint"][j]["mae"] for j in joints] for p, of in summary["error"].items()}
    _bars(axes, joints, per_joint)
    axes.set(title="error per joint", ylabel=f"mean absolute error, {unit}")
    axes.legend(frameon=False)

    axes = figure.add_subplot(grid[0, 1])
    episodes = summary["episodes"]
    shown = episodes if len(episodes) <= 12 else sorted(episodes, key=lambda e: -e["mae"]["policy"])[:12]
    _bars(axes, [e["name"] for e in shown], {p: [scale * e["mae"][p] for e in shown] for p in POLICY_COLOURS})
    which = "" if len(episodes) <= 12 else f" (the worst 12 of {len(episodes)})"
    axes.set(title=f"error per episode{which}", ylabel=f"mean absolute error, {unit}")

    axes = figure.add_subplot(grid[1, 0])
    by_position = np.array(summary["error_by_chunk_position"]["mae"]) * scale
    axes.plot(np.arange(1, len(by_position) + 1), by_position, color=PREDICTED, linewidth=2, label="policy")
    for name in ("no motion", "mean action"):
        mae = summary["error"][name]["mae"] * scale
        axes.axhline(mae, color=POLICY_COLOURS[name], linestyle="--", label=name)
    fps = summary["contract"]["fps"]
    chunks = max(summary["error_by_chunk_position"]["count"])
    axes.set(
        title=f"error by position in the chunk ({chunks} chunks)", ylabel=f"mean absolute error, {unit}", ylim=(0, None)
    )
    axes.set_xlabel(f"frames ahead (1 frame = {1e3 / fps:.1f} ms)")
    axes.grid(alpha=0.25)
    axes.legend(frameon=False)

    axes = figure.add_subplot(grid[1, 1])
    milliseconds, budget = 1e3 * np.concatenate(inference_s), 1e3 / CONTROL_HZ
    far = max(1.15 * budget, 1.05 * milliseconds.max())
    axes.hist(milliseconds, bins=np.linspace(0, far, 60).tolist(), color=PREDICTED)
    p99 = summary["latency"]["inference"]["p99_ms"]
    axes.axvline(p99, color=ERROR, linewidth=2, label=f"p99 {p99:.1f} ms")
    axes.axvline(budget, color=BUDGET, linewidth=2, linestyle="--", label=f"{CONTROL_HZ:g} Hz: {budget:.1f} ms")
    axes.set(title=f"latency of {len(milliseconds)} inferences", xlabel="ms", ylabel="inferences")
    axes.locator_params(axis="y", integer=True)
    axes.legend(frameon=False)

    if rollout:
        axes = figure.add_subplot(grid[2, :])
        rows = rollout["over_time"]
        seconds = [row["middle_s"] for row in rows]
        for name, colour in zip(rollout["per_joint"], _cycle(len(rollout["per_joint"])), strict=True):
            axes.plot(
                seconds, [row["per_joint_rad"][name] for row in rows], "o-", markersize=4, color=colour, label=name
            )
        axes.plot(seconds, [row["mean_rad"] for row in rows], color="0", linewidth=3, label="mean")
        axes.set(
            title=f"drift of {rollout['pieces']} rollouts from the recorded path (images stay the recorded ones)",
            xlabel="s since the start", ylabel="|rollout - recorded|, rad", ylim=(0, None),
        )  # fmt: skip
        axes.grid(alpha=0.25)
        axes.legend(frameon=False, ncols=2)
    _save(figure, path)


def draw_comparison(path: Path, groups: Sequence[Sequence[tuple[str, Mapping[str, Any]]]]) -> None:
    """Groups of (label, summary), best first: mean absolute error beside the better baseline, and latency."""
    sizes = [len(group) for group in groups]
    figure = _new_figure(13, 1.6 * len(groups) + 0.45 * sum(sizes) + 0.6)
    grid = figure.add_gridspec(len(groups), 2, height_ratios=[size + 2 for size in sizes], width_ratios=[3, 2])
    budget = 1e3 / CONTROL_HZ
    for i, group in enumerate(groups):
        first = group[0][1]
        scale, unit = _readable(first["unit"])
        y, names = np.arange(len(group)), [label for label, _ in group]
        axes = figure.add_subplot(grid[i, 0])
        mae = [s["error"]["policy"]["mae"] * scale for _, s in group]
        axes.barh(y, mae, color=PREDICTED, height=0.7)
        for row, value in zip(y, mae, strict=True):
            axes.text(value, row, f" {value:.3g}", va="center")
        # The mean of the training data is each policy's own; staying put is the same for all.
        axes.axvline(first["error"]["no motion"]["mae"] * scale, color="0.45", linestyle="--", label="no motion")
        axes.set(xlabel=f"mean absolute error, {unit}", xlim=(0, None))
        episodes = len(first["selection"]["episodes"])
        axes.set_title(
            f"{episodes} episodes, {first['frames']} frames of {Path(first['dataset']['path']).name}",
            fontsize=12,
            loc="left",
        )
        axes.set_yticks(y, names)
        axes.invert_yaxis()
        axes.legend(frameon=False, loc="lower right", bbox_to_anchor=(1, 1))
        axes = figure.add_subplot(grid[i, 1])
        axes.barh(y, [s["latency"]["inference"]["p99_ms"] for _, s in group], color="0.6", height=0.7)
        axes.axvline(budget, color=BUDGET, linestyle="--", label=f"{CONTROL_HZ:g} Hz: {budget:.1f} ms")
        axes.set(xlabel="p99 of an inference, ms", yticks=[], xlim=(0, None))
        axes.invert_yaxis()
        axes.legend(frameon=False, loc="lower right", bbox_to_anchor=(1, 1))
    _save(figure, path)


def draw_arms(path: Path, arms: Sequence[Mapping[str, Any]]) -> None:
    """Draw the arms of a sweep, best first: success in closed loop beside the error on recordings, with every seed.

    Args:
        path: of the PNG.
        arms: "arm" (its name), "success" (rate, low, high) or None, "rates" of each seed, "mae" of each seed,
            "mae_interval" (low, high) or None, and "unit", in which those are.
    """
    figure = _new_figure(13, 1.5 + 0.5 * len(arms))
    measured = any(arm["success"] for arm in arms)
    grid = figure.add_gridspec(1, 1 + measured)
    y, names = np.arange(len(arms)), [arm["arm"] for arm in arms]
    if measured:
        axes = figure.add_subplot(grid[0, 0])
        for row, arm in enumerate(arms):
            if arm["success"]:
                _bar_with_seeds(axes, row, *(100 * x for x in arm["success"]), [100 * rate for rate in arm["rates"]])
        axes.set(xlabel="success in closed loop, %, with its 95 % interval; dots: seeds", xlim=(0, 100))
        axes.set_yticks(y, names)
        axes.invert_yaxis()
    axes = figure.add_subplot(grid[0, -1])
    unit = next((arm["unit"] for arm in arms if arm["mae"]), "")
    scale, readable = _readable(unit)
    for row, arm in enumerate(arms):
        if arm["mae"] and arm["unit"] != unit:  # a delta and a position are not on one axis
            axes.text(0, row, f" {np.mean(arm['mae']):.3g} {arm['unit']}", va="center")
        elif arm["mae"]:
            errors = [scale * mae for mae in arm["mae"]]
            low, high = arm["mae_interval"] or (arm["mae"][0],) * 2
            _bar_with_seeds(axes, row, float(np.mean(errors)), scale * low, scale * high, errors)
    axes.set(xlabel=f"mean absolute error on what was held out, {readable}", xlim=(0, None))
    axes.set_yticks(y, [] if measured else names)
    axes.invert_yaxis()
    _save(figure, path)


def _bar_with_seeds(axes: Axes, row: int, value: float, low: float, high: float, seeds: Sequence[float]) -> None:
    axes.barh(row, value, color=PREDICTED, alpha=0.6, height=0.6)
    if high > low:
        axes.plot([max(0, low), high], [row, row], color="0.2", linewidth=1.5)
    axes.plot(seeds, [row] * len(seeds), "o", color=ERROR, markersize=5)


def _bars(axes: Axes, labels: Sequence[str], groups: Mapping[str, Sequence[float]]) -> None:
    width = 0.8 / len(groups)
    for i, (name, values) in enumerate(groups.items()):
        x = np.arange(len(labels)) + (i - (len(groups) - 1) / 2) * width
        axes.bar(x, values, width, color=POLICY_COLOURS[name], label=name)
    axes.set_xticks(range(len(labels)), labels, rotation=20, ha="right", rotation_mode="anchor")
    axes.grid(alpha=0.25, axis="y")
    axes.set_axisbelow(True)


def _cycle(count: int) -> list[str]:
    okabe_ito = ["#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#F0E442"]
    return [okabe_ito[i % len(okabe_ito)] for i in range(count)]


# -- the page -------------------------------------------------------------------------------------------------------


def html(summary: Mapping[str, Any], folder: Path) -> str:
    """The page, self-contained: pictures of `folder` are inside it, and nothing is loaded from anywhere."""
    policy, latency, unit = summary["policy"], summary["latency"], summary["unit"]
    verdicts = _verdicts(summary) + [
        (
            gate["passed"],
            f"{gate['gate']} {gate['limit']:g}: {'passed' if gate['passed'] else 'EXCEEDED'} ({gate['found']:.4g})",
        )
        for gate in summary["verdict"]["gates"]
    ]
    said = f'<p class="sub">{escape(NO_PROMISE[0].upper() + NO_PROMISE[1:])}. ' + "; ".join(
        f"{row['seconds']:g} s ahead {escape(ahead_text(row))}" for row in summary["position_ahead"]
    )
    said += "</p>"
    backend = f"{policy['backend']} {policy['backend_version'] or ''}".strip()
    steps = f", step {policy['step']}" if policy["step"] is not None else ""
    parts = [
        f"<h1>{escape(policy['name'])}</h1>",
        f'<p class="sub">ACT, {policy["parameters"] / 1e6:.1f} M parameters{steps}, on {len(summary["episodes"])} '
        f"recorded episodes ({summary['frames']} frames), {escape(backend)} on {escape(policy['device_name'])}, "
        f"{escape(summary['created'])}</p>",
        report_page.verdicts(verdicts, said),
    ]
    parts.append(report_page.notes(summary["notes"]))
    parts += [f"<h2>Error per joint, {escape(unit)}</h2>", _error_table(summary), _picture(folder, "overview.png")]
    if summary["rollout"]:
        parts += ["<h2>Rollout</h2>", _rollout_table(summary["rollout"])]
    parts += [f"<h2>Episodes: mean absolute error, {escape(unit)}</h2>", _episode_table(summary)]
    for episode in summary["episodes"]:
        parts.append(_picture(folder, f"episode_{episode['index']:03d}.png"))
        parts.append(_picture(folder, f"episode_{episode['index']:03d}_rollout.png"))

    parts += ["<h2>Latency, ms</h2>", _latency_table(latency)]
    parts.append(
        "<p>A control step is everything from joint state and camera images to an action in host memory, and the "
        "device is waited for. Steps that took an action from the queue are counted apart; real-time is decided on the "
        "p99 of the steps that inferred.</p>"
    )
    parts.append("<h2>What was evaluated</h2>")
    for name in ("policy", "contract", "dataset", "selection", "versions"):
        parts.append(report_page.facts(name, summary[name], opened=name == "policy"))
    parts.append(
        "<footer>The policy saw the recorded states and images (“teacher-forced”). <i>No motion</i> keeps the arm "
        "where it is; <i>mean action</i> is the mean of the training data. Numbers: <code>summary.json</code>; every "
        "step: <code>episode_*.parquet</code>, with units in the schema.</footer>"
    )
    return report_page.page(f"{policy['name']}: offline evaluation", parts)


def _error_table(summary: Mapping[str, Any]) -> str:
    error = summary["error"]
    rows = [("all", error)]
    for name, unit in summary["units"].items():
        title = name if unit == summary["unit"] else f"{name}, {unit or 'no unit said'} (not in all)"
        rows.append((title, {n: of["per_joint"][name] for n, of in error.items()}))
    texts = []
    for name, of in rows:
        policy, baselines = of["policy"], [of[n]["mae"] for n in ("no motion", "mean action")]
        numbers = [policy["mae"], policy["rmse"], policy["max"], *baselines]
        texts.append([name, *(f"{x:.5f}" for x in numbers), "yes" if policy["mae"] < min(baselines) else "NO"])
    header = [
        "mean absolute",
        "root mean square",
        "largest",
        "no motion: mean",
        "mean action: mean",
        "better than both",
    ]
    return report_page.table(["joint", *header], texts)


def _rollout_table(rollout: Mapping[str, Any]) -> str:
    rows = [["mean of all", f"{rollout['final_mean_rad']:.4f}", f"{rollout['max_rad']:.4f}"]]
    rows += [[j, f"{of['final_mean_rad']:.4f}", f"{of['max_rad']:.4f}"] for j, of in rollout["per_joint"].items()]
    for name, of in rollout["per_other_state"].items():
        rows.append([f"{name}, {of['unit'] or 'no unit said'}", f"{of['final_mean']:.4f}", f"{of['max']:.4f}"])
    return f"<p>{escape(rollout['explained'])}.</p>" + report_page.table(
        ["joint", "at the end, mean, rad", "largest, rad"], rows
    )


def _episode_table(summary: Mapping[str, Any]) -> str:
    rows = []
    for episode in summary["episodes"]:
        seen = {True: "yes", False: "no", None: "unknown"}[episode["trained_on"]]
        mae = [f"{episode['mae'][name]:.5f}" for name in POLICY_COLOURS]
        rows.append([episode["name"], str(episode["frames"]), *mae, f"{episode['max']:.5f}", seen])
    return report_page.table(["episode", "frames", *POLICY_COLOURS, "largest error", "trained on"], rows)


def _latency_table(latency: Mapping[str, Any]) -> str:
    rows = []
    for name, kind in (("inference", "inference"), ("from the queue", "cached_pop"), ("warm-up", "warm_up")):
        of = latency[kind]
        times = ["" if of[p] is None else f"{of[p]:.3f}" for p in ("p50_ms", "p95_ms", "p99_ms", "max_ms")]
        rows.append([name, str(of["count"]), *times])
    return report_page.table(["step", "count", "p50", "p95", "p99", "largest"], rows)


def _picture(folder: Path, name: str) -> str:
    path = folder / name
    return report_page.picture(name, path.read_bytes()) if path.exists() else ""
