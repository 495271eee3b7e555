"""What an evaluation measures and writes: errors beside the baselines, drift, parquet with units, summary.json."""

from __future__ import annotations

import argparse
import contextlib
import datetime
import os
import platform
import re
from collections.abc import Generator, Mapping, Sequence
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import torch

from act_model import ACTION
from lerobot_checkpoint import PRETRAINED_DIR, WEIGHTS_FILE, file_sha256
from rosbag_dataset import no_motion
from ur10e import JOINT_NAMES, link_frames

from . import report
from .checks import EvalError
from .config import RobotContract
from .episode_result import ChunkErrors, EpisodeResult
from .policy_runner import PolicyRunner
from .sources import EpisodeSource

DRIFT_INTERVAL_S = 0.25  # the drift of rollouts is averaged over intervals of so much time since their start
RESULT_FILE = re.compile(
    r"report\.html|summary\.json|overview\.png|all_episodes\.parquet|episode_\d+(_rollout)?\.(parquet|png)"
)


def errors(predicted: np.ndarray, recorded: np.ndarray, names: Sequence[str], overall: np.ndarray) -> dict[str, Any]:
    """Mean absolute, root mean square and largest error of (N, A) actions: of all `overall` (A,) bool, and of each."""
    error = np.abs(predicted.astype(np.float64) - recorded)

    def of(values: np.ndarray) -> dict[str, float]:
        return {"mae": float(values.mean()), "rmse": float(np.sqrt((values**2).mean())), "max": float(values.max())}

    return of(error[:, overall]) | {"per_joint": {name: of(error[:, j]) for j, name in enumerate(names)}}


def drift_over_time(results: Sequence[EpisodeResult], contract: RobotContract) -> dict[str, Any]:
    """How far the rollouts are from the recorded joint path: at the last frame of every piece, and by time.

    What is in other units than rad stands apart, under "per_other_state".
    """
    in_rad = contract.in_rad
    joints = [label for label, of_joint in zip(contract.action_labels, in_rad, strict=True) if of_joint]
    seconds, drift, last = [], [], []
    for result in results:
        assert result.rollout_rad is not None  # asked for only after a rollout
        distance = np.abs(contract.difference(result.rollout_rad, contract.acted_on(result.state_rad)))
        cuts = np.flatnonzero((np.diff(result.frame) != 1) | (np.diff(result.segment) != 0)) + 1
        for piece in np.split(np.arange(len(result.frame)), cuts):
            seconds.append(result.timestamp_s[piece] - result.timestamp_s[piece[0]])
            drift.append(distance[piece])
            last.append(distance[piece[-1]])
    every, final = np.concatenate(drift), np.stack(last)
    others = {
        contract.action_labels[j]: {
            "unit": contract.units[contract.acted[j]], "final_mean": float(final[:, j].mean()),
            "max": float(every[:, j].max()),
        }
        for j in np.flatnonzero(~in_rad)
    }  # fmt: skip
    every, final = every[:, in_rad], final[:, in_rad]
    interval = np.floor(np.concatenate(seconds) / DRIFT_INTERVAL_S).astype(int)
    return {
        "explained": "|rollout - recorded joint position|, rad, when the policy's own actions are followed from the "
        "first frame of each uninterrupted piece; the images stay the recorded ones",
        "pieces": len(last),
        "final_mean_rad": float(final.mean()),
        "max_rad": float(every.max()),
        "per_joint": {
            name: {"final_mean_rad": float(final[:, j].mean()), "max_rad": float(every[:, j].max())}
            for j, name in enumerate(joints)
        },
        "per_other_state": others,
        "over_time": [
            {
                "middle_s": (int(i) + 0.5) * DRIFT_INTERVAL_S,
                "mean_rad": float(every[interval == i].mean()),
                "per_joint_rad": dict(zip(joints, every[interval == i].mean(axis=0).tolist(), strict=True)),
            }
            for i in np.unique(interval)
        ],
    }


def positions_ahead(chunk_errors: ChunkErrors, contract: RobotContract) -> list[dict[str, Any]]:
    """Where a chunk would have led, open loop, against where the arm was: per horizon, joints in rad, the UR10e in mm.

    The tool is the flange (UR's tool0), by forward kinematics in the robot's own signs; None for another robot.
    """
    of_arm = [[n.endswith(joint) for n in contract.action_names or ()] for joint in JOINT_NAMES]
    rows = []
    for seconds, pairs in chunk_errors.ahead.items():
        if not pairs:
            continue
        predicted, recorded = np.array(pairs).transpose(1, 0, 2)
        joints_rad, tool_m = np.abs(predicted - recorded)[:, contract.in_rad].mean(axis=1), None
        if all(sum(which) == 1 for which in of_arm):
            order, sign = [which.index(True) for which in of_arm], contract.acted_on(np.array(contract.joint_sign))
            places = [link_frames((q * sign)[:, order])[:, 6, :3, 3] for q in (predicted, recorded)]
            tool_m = np.linalg.norm(places[0] - places[1], axis=1)
        row: dict[str, Any] = {"seconds": seconds, "chunks": len(pairs)}
        for name, values in (("joint_rad", joints_rad), ("tool_m", tool_m)):
            row[f"{name}_mean"] = None if values is None else float(values.mean())
            row[f"{name}_p95"] = None if values is None else float(np.percentile(values, 95))
        rows.append(row)
    return rows


# -- files --------------------------------------------------------------------------------------------------------


def table(result: EpisodeResult, contract: RobotContract) -> pa.Table:
    """One row per evaluated frame. Every field says its unit and what it is in its metadata."""
    columns: list[tuple[str, Any, pa.DataType, str, str]] = [
        ("episode_index", np.full(len(result.frame), result.index), pa.int64(), "", "episode in the dataset"),
        ("step", np.arange(len(result.frame)), pa.int64(), "", "row in this evaluation of the episode"),
        ("frame_index", result.frame, pa.int64(), "", "frame in the episode"),
        ("timestamp", result.timestamp_s, pa.float64(), "s", "since the episode's start"),
    ]
    action_units, error = contract.action_units, np.abs(result.predicted - result.recorded)
    every, acted = range(len(contract.units)), contract.acted
    groups = [
        ("joint_position", result.state_rad, every, contract.units, "recorded position"),
        ("predicted_action", result.predicted, acted, action_units, f"predicted {contract.action_kind} action"),
        ("gt_action", result.recorded, acted, action_units, f"recorded {contract.action_kind} action"),
        ("abs_error", error, acted, action_units, "|predicted - recorded|"),
    ]
    if result.rollout_rad is not None:
        positions = [contract.units[i] for i in acted]
        what = "where the policy's own actions led, not wrapped"
        groups.append(("rollout_position", result.rollout_rad, acted, positions, what))
    labels, full_names = contract.state_labels, contract.state_names or contract.state_labels
    for prefix, values, states, units, what in groups:
        kind = pa.float64() if prefix == "rollout_position" else pa.float32()
        for column, (i, unit) in enumerate(zip(states, units, strict=True)):
            columns.append((f"{prefix}_{labels[i]}", values[:, column], kind, unit, f"{what} of {full_names[i]}"))
    cached = ~result.inferred
    columns += [
        (
            "inference_time_s", pa.array(result.seconds, mask=cached), pa.float64(), "s",
            "control step that inferred, joint state and images to action; null where the action came from the queue",
        ),
        ("control_step_s", result.seconds, pa.float64(), "s", "control step, whether it inferred or not"),
    ]  # fmt: skip
    schema = pa.schema(
        [
            pa.field(name, kind, metadata={"unit": unit, "description": what} if unit else {"description": what})
            for name, _, kind, unit, what in columns
        ],
        metadata={"action_mode": contract.action_kind, "episode": result.name},
    )
    arrays = [values if isinstance(values, pa.Array) else pa.array(values, kind) for _, values, kind, _, _ in columns]
    return pa.Table.from_arrays(arrays, schema=schema)


class Output:
    """The output directory. Every file is complete under its name or not there (written beside it, then renamed).

    Args:
        folder: the directory, which need not be there yet.
        files: what an evaluation of this kind writes: only a directory with nothing else in it is written over.
        last: the file that is written last.

    Raises:
        EvalError: the directory holds something else than an earlier evaluation.
    """

    def __init__(self, folder: Path, files: re.Pattern[str] = RESULT_FILE, last: str = "summary.json") -> None:
        self.folder, self._last = folder, last
        if folder.exists() and not folder.is_dir():
            raise EvalError(f"--output {folder}: is a file; name a folder")
        self._earlier = sorted(p for p in folder.glob("*") if not p.name.startswith(".")) if folder.is_dir() else []
        foreign = [p.name for p in self._earlier if not files.fullmatch(p.name)]
        if foreign:
            raise EvalError(
                f"--output {folder}: holds {', '.join(foreign[:3])}{', ...' if len(foreign) > 3 else ''}, which no "
                "evaluation writes; name a new or empty folder (an earlier evaluation's is written over)"
            )

    def clear(self) -> bool:
        """Make the folder, and remove an earlier evaluation, its last file first; -> whether there was one."""
        self.folder.mkdir(parents=True, exist_ok=True)
        for path in sorted(self._earlier, key=lambda p: p.name != self._last):
            path.unlink()
        for path in self.folder.glob(".*.partial"):  # of one that was killed
            path.unlink()
        return bool(self._earlier)

    @contextlib.contextmanager
    def writing(self, name: str) -> Generator[Path]:
        """A path to write to, which gets its name when the block ends well."""
        partial = self.folder / f".{name}.partial"
        try:
            yield partial
            if partial.exists():  # a picture is not drawn where matplotlib is not installed
                os.replace(partial, self.folder / name)
        finally:
            partial.unlink(missing_ok=True)


def checkpoint_identity(runner: PolicyRunner) -> dict[str, Any]:
    """Which policy this was: enough to find it again, and to know that it is the same."""
    path = runner.policy.path
    owner = path.parent if path.name == PRETRAINED_DIR else path
    step = re.search(r"(\d{3,})$", owner.name)
    return {
        "path": str(path),
        "name": "/".join(owner.parts[-2:]),
        "step": int(step[1]) if step else None,
        "weights_sha256": file_sha256(path / WEIGHTS_FILE),
        "parameters": sum(p.numel() for p in runner.policy.model.parameters()),
        "trained_by": runner.contract.code or None,
    }


def versions() -> dict[str, str | None]:
    """Versions of Python and of the packages that decide the numbers; None for one that is not installed."""
    found: dict[str, str | None] = {"python": platform.python_version(), "torch": str(torch.__version__)}
    for name in ("numpy", "lerobot", "pyarrow", "av", "opencv-python-headless", "ur10e-act-train"):
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            found[name] = None
    return found


def summarise(
    runner: PolicyRunner,
    source: EpisodeSource,
    results: Sequence[EpisodeResult],
    chunk_errors: ChunkErrors,
    args: argparse.Namespace,
    notes: Sequence[str],
) -> dict[str, Any]:
    """What summary.json holds."""
    contract, names, in_rad = runner.contract, runner.contract.action_labels, runner.contract.in_rad
    mean_action = runner.policy.stats[ACTION]["mean"]

    def compared(of: Sequence[EpisodeResult]) -> dict[str, Any]:
        recorded = np.concatenate([r.recorded for r in of])
        policies = {
            "policy": np.concatenate([r.predicted for r in of]),
            "no motion": np.concatenate(
                [
                    no_motion(contract.acted_on(r.state_rad), r.recorded, contract.action_wrapped, contract.action_kind)
                    for r in of
                ]
            ),
            "mean action": np.broadcast_to(mean_action, recorded.shape),
        }
        return {name: errors(action, recorded, names, in_rad) for name, action in policies.items()}

    error, latency = compared(results), runner.latency()
    value = {"--max-mae": error["policy"]["mae"], "--max-p99-ms": latency["inference"]["p99_ms"]}
    limit = {"--max-mae": args.max_mae, "--max-p99-ms": args.max_p99_ms}
    seen = chunk_errors.count > 0
    by_position = chunk_errors.total[seen] / chunk_errors.count[seen, None]
    baseline = min(error["no motion"]["mae"], error["mean action"]["mae"])
    cpu = f"{platform.machine()} {torch.backends.cpu.get_cpu_capability()}, {torch.get_num_threads()} threads"
    return {
        "verdict": {
            "better_than_baselines": error["policy"]["mae"] < baseline,
            "times_better_than_best_baseline": baseline / error["policy"]["mae"] if error["policy"]["mae"] else None,
            "realtime_30hz": latency["realtime_30hz"],
            "gates": [
                {"gate": gate, "limit": limit[gate], "found": value[gate], "passed": value[gate] <= limit[gate]}
                for gate in limit
                if limit[gate] is not None
            ],
        },
        "unit": contract.action_unit,
        "units": dict(zip(names, contract.action_units, strict=True)),
        "error": error,
        "error_by_chunk_position": {
            "explained": "mean |predicted - recorded| of the i-th action of a chunk, over the inferred chunks",
            "mae": by_position[:, in_rad].mean(axis=1).tolist(),
            "per_joint": {name: by_position[:, j].tolist() for j, name in enumerate(names)},
            "count": chunk_errors.count[seen].tolist(),
        },
        "position_ahead": positions_ahead(chunk_errors, contract),
        "rollout": drift_over_time(results, contract) if args.rollout else None,
        "latency": latency,
        "episodes": [
            {
                "index": r.index,
                "name": r.name,
                "frames": len(r.frame),
                "frames_without_action": r.without_action,
                "trained_on": r.name in contract.training_episodes if contract.data_settings and args.bags else None,
                "mae": {name: of["mae"] for name, of in compared([r]).items()},
                "rmse": errors(r.predicted, r.recorded, names, in_rad)["rmse"],
                "max": errors(r.predicted, r.recorded, names, in_rad)["max"],
            }
            for r in results
        ],
        "frames": sum(len(r.frame) for r in results),
        "policy": checkpoint_identity(runner)
        | {
            "backend": runner.backend,
            "backend_version": runner.backend_version,
            "device": runner.device.type,
            "device_name": torch.cuda.get_device_name() if runner.device.type == "cuda" else cpu,
            "mode": runner.mode,
            "chunk_size": runner.chunk_size,
            "n_action_steps": runner.n_action_steps,
            "ensemble_m": runner.ensemble_m if runner.mode == "ensemble" else None,
        },
        "contract": {
            "source": contract.source,
            "action_mode": contract.action_mode,
            "state_names": list(contract.state_names) if contract.state_names else None,
            "action_names": contract.action_names,
            "state_topics": contract.state_topics or None,
            "joint_sign": list(contract.joint_sign),
            "wrap_angles": contract.wrap_angles,
            "fps": contract.fps or source.fps,
            "image_resize": contract.image_resize,
            "cameras": contract.cameras,
        },
        "dataset": source.identity,
        "selection": {
            "episodes": [r.index for r in results],
            "start_frame": args.start_frame,
            "num_steps": args.num_steps,
        },
        "notes": [*notes, *source.notes],
        "versions": versions(),
        "created": datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds"),
    }


def screen(summary: Mapping[str, Any], folder: Path, picture: str) -> str:
    """The end of a run on one screen."""
    policy, error, latency, verdict = (summary[key] for key in ("policy", "error", "latency", "verdict"))
    inference, pops, unit = latency["inference"], latency["cached_pop"], summary["unit"]
    backend = f"{policy['backend']} {policy['backend_version'] or ''}".strip()
    executes = f", executes {policy['n_action_steps']}" if policy["mode"] == "chunk" else ""
    per_name = error["policy"]["per_joint"]
    worst = max(((n, per_name[n]) for n, of in summary["units"].items() if of == unit), key=lambda item: item[1]["mae"])
    names = [episode["name"] for episode in summary["episodes"]]
    episodes = ", ".join(names[:4]) + (f" and {len(names) - 4} more" if len(names) > 4 else "")
    what = f"{policy['name']}, {policy['parameters'] / 1e6:.1f} M parameters, {backend} on {policy['device']}"
    lines = [
        ("policy", f"{what}, mode {policy['mode']} (chunks of {policy['chunk_size']}{executes})"),
        ("data", f"{summary['dataset']['path']}: {episodes}; {summary['frames']} frames"),
        ("error", f"mean absolute, {unit}: " + ", ".join(f"{name} {of['mae']:.3g}" for name, of in error.items())),
        ("worst joint", f"{worst[0]}: mean {worst[1]['mae']:.3g}, largest {worst[1]['max']:.3g}"),
    ]
    for name, other in summary["units"].items():
        if other != unit:
            of_each = ", ".join(f"{policy} {of['per_joint'][name]['mae']:.3g}" for policy, of in error.items())
            lines.append((name, f"mean absolute, {other or 'no unit said'}: {of_each}"))
    if summary["rollout"]:
        final, largest = summary["rollout"]["final_mean_rad"], summary["rollout"]["max_rad"]
        lines.append(("rollout", f"drift at the end {final:.3g} rad on average, largest {largest:.3g}"))
    for row in summary["position_ahead"]:
        lines.append((f"{row['seconds']:g} s ahead", report.ahead_text(row)))
    times = ", ".join(f"{name} {inference[f'{name}_ms']:.1f}" for name in ("p50", "p95", "p99", "max"))
    apart = f"{pops['count']} cached steps and {latency['warm_up']['count']} warm-up inferences apart"
    lines.append(("latency", f"{times} ms of {inference['count']} inferences ({apart})"))
    lines += [("verdict", report.verdict_text(summary)), ("", report.NO_PROMISE)]
    for gate in verdict["gates"]:
        passed = "passed" if gate["passed"] else "EXCEEDED"
        lines.append(("gate", f"{gate['gate']} {gate['limit']:g}: {passed} ({gate['found']:.4g})"))
    lines += [
        ("results", f"{folder}/ (summary.json, parquet, pictures{picture})"),
        ("open first", f"{folder}/report.html"),
    ]
    return "\n" + "\n".join(f"  {name:<11} {text}" for name, text in lines) + "\n"
