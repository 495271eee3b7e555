"""What roll-outs leave behind: rollouts.json, a parquet file of every step, pictures, and report.html around them.

Knows: the files and the words of the report.
Must not know: how a policy is run, how anything is measured.
"""

import importlib.util
import json
import re
import time
from html import escape

import cv2
import numpy as np
from ur10e_deploy.results import Output

import report_page
from sim import rollout_pictures as pictures
from sim.closed_loop import POLICY
from sim.scene import BLOCK_SIDE_M
from sim.world import HELD_S, goal_m
from ur10e import JOINT_NAMES, tool_tip

FILES = re.compile(r"report\.html|rollouts\.json|steps\.parquet|rollouts\.mp4|contact_sheet\.png|top_view\.png")
LAST = "rollouts.json"
BLIND_SUCCESS = 0.1  # a baseline that succeeds more often than this shows that the scenes ask for too little


def open_output(folder):
    """The output directory. Raises EvalError when it holds something else than earlier roll-outs."""
    return Output(folder, FILES, LAST)


def write(output, args, summary, runs, began_s):
    """Write every file of the evaluation `summary`; the numbers go last.

    Args:
        output: ur10e_deploy.results.Output.
        args: the command line: `pictures`, `gif`, `tolerance_mm`.
        summary: what rollouts.json is to hold.
        runs: sim.rollout.Runs, finished.
        began_s: time.perf_counter() at the start.
    """
    with output.writing("steps.parquet") as path:
        write_steps(path, runs)
    outcomes = {n: [w.outcome(args.tolerance_mm / 1e3) for w in worlds] for n, worlds in runs.worlds.items()}
    worlds = runs.worlds[POLICY]
    if args.gif:
        size_bytes, limit_bytes = pictures.write_gif(args.gif, worlds, outcomes[POLICY]), pictures.GIF_MAX_BYTES
        if size_bytes > limit_bytes:  # no reason to lose an evaluation
            summary["notes"].append(f"{args.gif}: {size_bytes / 1e6:.1f} MB, more than {limit_bytes / 1e6:g} MB")
            print(f"note: {summary['notes'][-1]}")
    if args.pictures:
        for package, what in (("av", "video"), ("matplotlib", "view from above")):
            if importlib.util.find_spec(package) is None:
                summary["notes"].append(f"no {what}: the package {package} is not installed")
        if importlib.util.find_spec("av"):
            with output.writing("rollouts.mp4") as path:
                pictures.write_video(path, worlds, outcomes[POLICY])
        with output.writing("contact_sheet.png") as path:
            sheet = pictures.contact_sheet(worlds, outcomes[POLICY])
            path.write_bytes(cv2.imencode(".png", sheet[..., ::-1])[1].tobytes())
        if importlib.util.find_spec("matplotlib"):
            with output.writing("top_view.png") as path:
                pictures.draw_top_view(path, {name: (runs.worlds[name], outcomes[name]) for name in runs.worlds})
    with output.writing("report.html") as path:
        path.write_text(html(summary, output.folder), encoding="utf-8")
    with output.writing(LAST) as path:
        path.write_text(json.dumps(summary | {"took_s": round(time.perf_counter() - began_s, 1)}, indent=2) + "\n")


def write_steps(path, runs):
    """One row per control step of every run: what was commanded, and where the arm went."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    columns = {name: [] for name in ("run", "episode", "step", "time", "inferred", "distance")}
    path_rad, command_rad, tip_m = [], [], []
    for run, worlds in runs.worlds.items():
        for world, inferred in zip(worlds, runs.inferred[run], strict=True):
            count = len(world.command_rad)
            before = np.array(world.path_rad[:count])
            tip = tool_tip(before)
            columns["run"] += [run] * count
            columns["episode"] += [world.episode] * count
            columns["step"] += range(count)
            columns["time"].append(np.arange(count) / world.control_hz)
            columns["inferred"].append(inferred)
            columns["distance"].append(np.linalg.norm(tip - goal_m(world.scene), axis=1))
            path_rad.append(before)
            command_rad.append(np.array(world.command_rad))
            tip_m.append(tip)
    fields = [
        ("run", pa.array(columns["run"]).dictionary_encode(), "", "the policy, a baseline, or a perturbation"),
        ("episode", pa.array(columns["episode"]), "", "number of the scene"),
        ("step", pa.array(columns["step"]), "", "control step"),
        ("time", pa.array(np.concatenate(columns["time"])), "s", "since the start"),
        ("inferred", pa.array(np.concatenate(columns["inferred"])), "", "the policy was asked in this step"),
        ("distance", pa.array(np.concatenate(columns["distance"])), "m", "tip to the middle of the block's top"),
    ]
    for prefix, values, names, unit, what in (
        ("position", np.concatenate(path_rad), [n.removesuffix("_joint") for n in JOINT_NAMES], "rad", "before it"),
        ("command", np.concatenate(command_rad), [n.removesuffix("_joint") for n in JOINT_NAMES], "rad", "sent in it"),
        ("tip", np.concatenate(tip_m), ["x", "y", "z"], "m", "before it, in the robot's base frame"),
    ):
        fields += [(f"{prefix}_{n}", pa.array(values[:, j]), unit, f"{prefix} {what}") for j, n in enumerate(names)]
    schema = pa.schema(
        [
            pa.field(name, values.type, metadata={"unit": unit, "description": what} if unit else {"description": what})
            for name, values, unit, what in fields
        ]
    )
    pq.write_table(pa.Table.from_arrays([values for _, values, _, _ in fields], schema=schema), path)


# -- in words ------------------------------------------------------------------------------------------------------


def success_text(of):
    """A success rate in words: 94 % (47 of 50; 95 % interval 84 to 98 %)."""
    low, high = of["wilson_95"]
    share = f"{of['successes']} of {of['episodes']}; 95 % interval {100 * low:.0f} to {100 * high:.0f} %"
    return f"{100 * of['success_rate']:.3g} % ({share})"  # 199 of 200 is not 100 %


def table_rows(summary):
    """(run in words, its summary) of the policy, its baselines and its perturbations."""
    rows = [(POLICY, summary["success"]), *summary["baselines"].items()]
    return rows + [(f"policy, {of['what']}", of) for of in summary["perturbations"].values()]


def claims(summary):
    """(good or not, what is claimed) of the evaluation, for the report's head."""
    success, task = summary["success"], summary["task"]
    best = max(summary["baselines"].items(), key=lambda item: item[1]["success_rate"])
    said = [
        (
            success["wilson_95"][0] > 0.5,  # more often than not, for sure
            f"success {success_text(success)}: tip within {1e3 * task['tolerance_m']:g} mm of the middle of the "
            f"block's top in {task['timeout_s']:g} s",
        ),
        (
            best[1]["success_rate"] <= BLIND_SUCCESS,
            f"without the right image at most {100 * best[1]['success_rate']:.3g} % ({best[0]}, "
            f"{best[1]['successes']} of {best[1]['episodes']})",
        ),
    ]
    return said + [(gate["passed"], gate_text(gate)) for gate in summary["gates"]]


def gate_text(gate):
    """One line about --min-success or --max-blind."""
    return f"{gate['gate']} {gate['limit']:g}: {'passed' if gate['passed'] else 'NOT PASSED'} ({gate['found']:.3g})"


def screen(summary, folder):
    """The end of a run on one screen."""
    success, policy = summary["success"], summary["policy"]
    executes = f", executes {policy['n_action_steps']}" if policy["mode"] == "chunk" else ""
    lines = [
        ("policy", f"{policy['name']}, mode {policy['mode']} (chunks of {policy['chunk_size']}{executes})"),
        ("scenes", f"seed {summary['selection']['seed']}, episodes 0 to {summary['selection']['episodes'] - 1}"),
        ("success", success_text(success)),
        *[("", f"{name}: {success_text(of)}") for name, of in table_rows(summary)[1:]],
        (
            "how",
            f"held for {HELD_S:g} s {100 * success['held_rate']:.0f} %, tip on the top face "
            f"{100 * success['on_top_rate']:.0f} %, entered the block {100 * success['entered_block_rate']:.0f} %, the "
            f"table {100 * success['entered_table_rate']:.0f} %, stalled {100 * success['stalled_rate']:.0f} %",
        ),
        (
            "distance",
            f"median {1e2 * success['final_distance_median_m']:.1f} cm at the end, "
            f"{1e2 * success['least_distance_median_m']:.1f} cm at the least",
        ),
        (
            "speed",
            f"fastest joint {success['peak_speed_median_rad_s']:.2f} rad/s in the median episode "
            f"(expert {success['expert_peak_speed_median_rad_s']:.2f}), {success['peak_speed_max_rad_s']:.2f} in any",
        ),
        *[("gate", gate_text(gate)) for gate in summary["gates"]],
        ("results", f"{folder}/ ({LAST}, steps.parquet, pictures)"),
        ("open first", f"{folder}/report.html"),
    ]
    return "\n" + "\n".join(f"  {name:<11} {text}" for name, text in lines) + "\n"


def html(summary, folder):
    """The page, self-contained: video and pictures of `folder` are inside it, and nothing is loaded from anywhere."""
    policy, task = summary["policy"], summary["task"]
    parts = [
        f"<h1>{escape(policy['name'])}: closed loop</h1>",
        f'<p class="sub">{policy["parameters"] / 1e6:.1f} M parameters, mode {policy["mode"]}, in the simulated cell, '
        f"scenes of seed {summary['selection']['seed']}, {escape(summary['created'])}</p>",
        report_page.verdicts(claims(summary)),
        report_page.notes(summary["notes"]),
    ]
    parts += [
        "<h2>Success</h2>",
        report_page.table(SUCCESS_HEADER, [_success_row(*row) for row in table_rows(summary)]),
    ]
    parts.append(
        f"<p>An episode succeeds when {escape(task['criterion'])}: "
        f"{1e3 * task['tolerance_m']:g} mm of a block of {1e3 * BLOCK_SIDE_M:g} mm, {task['timeout_s']:g} s. The "
        "interval is Wilson's, 95 %. A baseline that does well means that the scenes do not ask for what the policy "
        "is to show.</p>"
    )
    parts += ["<h2>Motion</h2>", report_page.table(MOTION_HEADER, [_motion_row(*row) for row in table_rows(summary)])]
    for name, title in (
        ("rollouts.mp4", "The first roll-outs, whatever became of them"),
        ("contact_sheet.png", "How each ended: episode and final distance"),
        ("top_view.png", "The table from above: blocks, and where the tip ended"),
    ):
        if (folder / name).exists():
            parts += [f"<h2>{title}</h2>", _embedded(folder / name)]
    parts += [
        "<h2>Episodes</h2>",
        report_page.table(EPISODE_HEADER, [_episode_row(row) for row in summary["episodes"]]),
    ]
    parts.append("<h2>What was run</h2>")
    parts += [report_page.facts(name, summary[name]) for name in ("policy", "task", "selection", "versions")]
    parts.append("<footer>Numbers: <code>rollouts.json</code>; every step: <code>steps.parquet</code>.</footer>")
    return report_page.page(f"{policy['name']}: closed loop", parts, "video { width: 100%; }")


SUCCESS_HEADER = [
    "run", "episodes", "success", "95 % interval", f"held {HELD_S:g} s", "on the top face", "final distance, cm",
    "least distance, cm", "time to touch, s",
]  # fmt: skip
MOTION_HEADER = [
    "run", "fastest joint, rad/s", "of any episode", "the expert's", "acceleration, rad/s²", "the expert's",
    "entered the block", "the table", "stalled",
]  # fmt: skip
EPISODE_HEADER = [
    "episode", "success", "held", "on top", "touch, s", "final, cm", "least, cm", "rad/s", "in block, mm",
    "in table, mm", "stalled, s",
]  # fmt: skip


def _success_row(name, of):
    low, high = of["wilson_95"]
    touch_s = of["time_to_touch_median_s"]
    return [
        name, str(of["episodes"]), f"{100 * of['success_rate']:.1f} %", f"{100 * low:.1f} to {100 * high:.1f} %",
        f"{100 * of['held_rate']:.0f} %", f"{100 * of['on_top_rate']:.0f} %",
        f"{100 * of['final_distance_median_m']:.1f}", f"{100 * of['least_distance_median_m']:.1f}",
        "" if touch_s is None else f"{touch_s:.1f}",
    ]  # fmt: skip


def _motion_row(name, of):
    return [
        name, f"{of['peak_speed_median_rad_s']:.2f}", f"{of['peak_speed_max_rad_s']:.2f}",
        f"{of['expert_peak_speed_median_rad_s']:.2f}", f"{of['peak_acceleration_median_rad_s2']:.1f}",
        f"{of['expert_peak_acceleration_median_rad_s2']:.1f}", f"{100 * of['entered_block_rate']:.0f} %",
        f"{100 * of['entered_table_rate']:.0f} %", f"{100 * of['stalled_rate']:.0f} %",
    ]  # fmt: skip


def _episode_row(row):
    touch_s = row["time_to_touch_s"]
    return [
        str(row["episode"]), *("yes" if row[key] else "NO" for key in ("success", "held", "on_top")),
        "" if touch_s is None else f"{touch_s:.1f}", f"{100 * row['final_distance_m']:.1f}",
        f"{100 * row['least_distance_m']:.1f}", f"{row['peak_speed_rad_s']:.2f}",
        f"{1e3 * row['depth_in_block_m']:.0f}",
        f"{1e3 * row['depth_in_table_m']:.0f}", f"{row['stalled_s']:.1f}",
    ]  # fmt: skip


def _embedded(path):
    if path.suffix == ".mp4":
        address = report_page.data_uri(path.read_bytes(), "video/mp4")
        return f'<video controls loop muted autoplay playsinline src="{address}"></video>'
    return report_page.picture(path.name, path.read_bytes())
