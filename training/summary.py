"""What a run says first, and its end: one screen of text, summary.json, and a picture to look at before reading.

The picture (with the extra `plots` installed): loss curves; what the camera saw; and, on one episode, the action the
policy predicts at each recorded frame against the action that was recorded, per joint.
"""

from __future__ import annotations

import functools
import json
import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from tqdm import tqdm

from rosbag_dataset import ChunkDataset, Episode, action_unit, left_out_notes, no_motion, sync_table

from .errors import Stopped
from .metrics import METRICS, Watch, metrics_lines, read_metrics

# What docs/results.md found in closed loop, with the same data, network and steps: the default is not what works best.
STUDIED = {"delta": "48 %", "relative": "47 %", "absolute": "95 %"}
FEW_PASSES = 5  # over the data: with fewer, a policy has seen too little to do its task
SUMMARY_EPISODES = 5  # held-out episodes that the summary predicts on
SUMMARY_FRAMES = 500  # of each of them, at most: 17 s at 30 Hz, nearly every demonstration as a whole
BATCH = 16

Predict = Callable[[dict[str, np.ndarray]], torch.Tensor]
StopRequest = Callable[[], str]  # -> the name of the signal that asks to stop, "" if none does


def chosen_frames(count: int) -> tuple[np.ndarray, np.ndarray]:
    """Which of an episode's `count` frames with an action the summary looks at, at most SUMMARY_FRAMES each.

    Returns:
        (those that errors are averaged over, evenly from all of the episode; those that are drawn, one after the other
         from its middle), int64: both are all of them in an episode that is short enough.
    """
    if count <= SUMMARY_FRAMES:
        return np.arange(count), np.arange(count)
    first = (count - SUMMARY_FRAMES) // 2
    return np.arange(SUMMARY_FRAMES) * count // SUMMARY_FRAMES, np.arange(first, first + SUMMARY_FRAMES)


def first_actions(
    episode: Episode, chosen: np.ndarray, chunk_size: int, predict: Predict, bar: tqdm, stop_request: StopRequest
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Run the policy on recorded frames of an episode ("teacher-forced"), keeping each chunk's first action.

    Args:
        episode: a recorded one.
        chosen: (N,) int64, which of its frames that have an action.
        chunk_size: actions that `predict` gives at once.
        predict: see finish().
        bar: progress, in frames.
        stop_request: asked between batches.

    Returns:
        (frames (N,) int64 of the episode, predicted (N, A), recorded (N, A)), actions in their units.

    Raises:
        Stopped: it was asked to.
    """
    dataset = ChunkDataset([episode], chunk_size)
    frames = np.array([dataset.locate(i)[1] for i in chosen], np.int64)
    predicted = []
    with torch.inference_mode():
        for first in range(0, len(chosen), BATCH):
            if name := stop_request():
                raise Stopped(f"{name} during the summary; the training is complete and saved, --resume sums it up")
            batch = dataset.__getitems__(chosen[first : first + BATCH].tolist())
            predicted.append(predict(batch)[:, 0].float().cpu().numpy())
            bar.update(len(predicted[-1]))
    return frames, np.concatenate(predicted), episode.action[frames]


def draw(
    path: Path,
    episode: Episode,
    frames: np.ndarray,
    predicted: np.ndarray,
    recorded: np.ndarray,
    names: Sequence[str],
    fps: float,
    units: Sequence[str],
    title: str,
) -> str:
    """Draw the picture, with a panel for each action; returns what to say instead of a path without matplotlib."""
    try:
        from matplotlib.figure import Figure  # no pyplot: half the time to import, and nothing global
    except ImportError:
        return "none, matplotlib is not installed (pip install matplotlib)"
    training, validation = read_metrics(path.with_name(METRICS))
    dataset = ChunkDataset([episode], 1)
    middle = next(i for i in range(len(dataset)) if dataset.locate(i)[1] == frames[len(frames) * 2 // 3])
    cameras = list(episode.image_shape)
    rows = 1 + -(-len(names) // 3)
    height = 2.9 * rows  # inches
    figure = Figure(figsize=(12, height))
    figure.suptitle(title, fontsize=11, y=1 - 0.12 / height, va="top")
    # Fixed places: to find them (layout="constrained") matplotlib draws everything once more.
    grid = figure.add_gridspec(
        rows, 6, left=0.085, right=0.985, bottom=0.5 / height, top=1 - 0.88 / height, wspace=0.68, hspace=0.34
    )

    curves = figure.add_subplot(grid[0, :3])
    curves.plot([m["step"] for m in training], [m["loss"] for m in training], label="loss", color="0.6")
    curves.plot([m["step"] for m in training], [m["l1_loss"] for m in training], label="L1, training")
    if validation:
        curves.plot([m["step"] for m in validation], [m["val_l1_loss"] for m in validation], "o-", label="L1, held out")
    curves.set(xlabel="step", yscale="log", title="loss (normalised units)")
    curves.grid(alpha=0.3, which="both")
    curves.legend()

    camera = figure.add_subplot(grid[0, 3:])
    camera.imshow(np.hstack([dataset[middle][f"observation.images.{c}"] for c in cameras]))
    seconds, shown_s = frames / fps, frames[len(frames) * 2 // 3] / fps
    camera.set_title(f"{episode.name}, {', '.join(cameras)} camera at {shown_s:.1f} s", fontsize=10)
    camera.axis("off")

    for j, name in enumerate(names):
        axes = figure.add_subplot(grid[1 + j // 3, 2 * (j % 3) : 2 * (j % 3) + 2])
        axes.plot(seconds, recorded[:, j], label="recorded", color="0.3", linewidth=1.8)
        axes.plot(seconds, predicted[:, j], label="predicted", color="tab:orange", linewidth=1.2)
        axes.set_title(name, fontsize=10)
        axes.grid(alpha=0.3)
        if j % 3 == 0 or units[j] != units[j - 1]:
            axes.set_ylabel(f"action, {units[j]}".rstrip(", "))
        if j + 3 >= len(names):
            axes.set_xlabel("s")
        if j == 0:
            axes.legend()
    figure.savefig(path, dpi=100)
    return str(path)


def print_opening(
    model: str, training: Any, effective_batch: int, step: int, samples: int, episodes: int, held_out: Sequence[Episode]
) -> None:
    """Print what will be trained, on what and for how long; `training` is that section of the configuration."""
    names = ", ".join(e.name for e in held_out) or "none"
    passes = training.steps * effective_batch / samples
    accumulated = f" x {training.accumulate_steps} accumulated" if training.accumulate_steps > 1 else ""
    ranks = effective_batch // training.batch_size // training.accumulate_steps
    print(
        f"training {model} for {training.steps} steps; effective batch {effective_batch} = {training.batch_size} per "
        f"GPU x {ranks}{accumulated}; {samples} samples from {episodes} episodes, {len(held_out)} "
        f"held out ({names})",
        flush=True,
    )
    if passes < FEW_PASSES:
        print(
            f"note: {training.steps} steps are {passes:.1f} passes over the data, {training.steps * effective_batch} "
            "samples; LeRobot's guide trains ACT on 240,000 to 1,280,000 samples: for a real task raise training.steps"
        )
    if step >= training.steps:
        print(f"nothing left to train: the run is at step {step}, training.steps is {training.steps}")


def _wall_rate(training: Sequence[Mapping[str, Any]]) -> float | None:
    """Samples per second of the wall clock, saving and validation included, over lines of one log_freq each."""
    rates = [line["samples_per_s_wall"] for line in training if "samples_per_s_wall" in line]  # older lines have none
    return len(rates) / sum(1 / rate for rate in rates) if rates and all(rates) else None


def _per_name(error: np.ndarray, names: Sequence[str], which: np.ndarray) -> dict[str, float]:
    """{name: mean} of the columns of errors (N, A) that `which` (A,) bool chooses."""
    return {names[j]: float(error[:, j].mean()) for j in np.flatnonzero(which)}


def report_sync(
    output_dir: Path, episodes: Sequence[Episode], skipped: Sequence[dict[str, str]], held_out: Sequence[Episode]
) -> None:
    """Print what became of every bag, and write it to sync_report.json."""
    reports = [episode.sync_report for episode in episodes]
    print(sync_table(reports))
    for note in left_out_notes(skipped):
        print(f"note: {note}")
    names = {e.name for e in held_out}
    also_trained_on = {e.bag for e in episodes if e.name not in names}
    if shared := sorted({e.bag for e in held_out} & also_trained_on):
        print(
            f"note: held-out episodes of {', '.join(shared)} are from recordings that are also trained on: the same "
            "light, place and day, so that new recordings may be harder (training.hold_out)"
        )
    content = {"episodes": reports, "skipped": list(skipped), "held_out": [e.name for e in held_out]}
    (output_dir / "sync_report.json").write_text(json.dumps(content, indent=2))


def finish(
    output_dir: Path,
    train: Sequence[Episode],
    held_out: Sequence[Episode],
    *,
    predict: Predict,
    chunk_size: int,
    action_mean: np.ndarray,
    contract: Mapping[str, Any],
    trained: str,
    skipped: Sequence[Mapping[str, str]],
    stop_request: StopRequest,
) -> dict[str, Any]:
    """Measure the policy on a few episodes, write summary.json and summary.png, and print the one-screen summary.

    Args:
        output_dir: the run's directory, with metrics.jsonl and `last` in it.
        train: the episodes that were trained on.
        held_out: those that training did not see: the policy is measured on these, if there are any.
        predict: raw batch (as ChunkDataset gives) -> (B, chunk, A) actions in their units.
        chunk_size: actions that `predict` gives at once.
        action_mean: (A,) mean action of the training data.
        contract: what train_config.json holds.
        trained: what was trained, in one line.
        skipped: the bags and episodes that were left out.
        stop_request: asked between batches; what is drawn then is not worth waiting for.

    Returns:
        What summary.json holds.

    Raises:
        Stopped: it was asked to, and has written nothing.
    """
    names, action_mode = contract["action_names"], contract["action_mode"]
    acted = [contract["state_names"].index(name) for name in names]
    wrapped = (np.array(contract["revolute"]) & contract["wrap_angles"])[acted]
    in_rad = np.array([contract["units"][i] == "rad" for i in acted])
    units = [action_unit(contract["units"][i], action_mode) for i in acted]
    reports = [episode.sync_report for episode in (*train, *held_out)]
    left_out = sum("episode" in entry for entry in skipped)
    without = f"{len(skipped) - left_out} bags skipped" + (f", {left_out} episodes left out" if left_out else "")
    facts = {
        "trained": trained,
        "data": f"{len(train)} episodes ({len(held_out)} more held out, {without}), "
        f"{sum(r['frames'] for r in reports)} frames kept, {sum(r['dropped'] for r in reports)} dropped",
    }
    unseen, seen = ([e for e in es if e.has_action] for es in (held_out, train))
    episodes, any_unseen = (unseen or seen)[:SUMMARY_EPISODES], bool(unseen)
    counts = [e.frames_with_action for e in episodes]
    chosen = [chosen_frames(count) for count in counts]
    assert episodes  # compute_stats has refused data in which no episode has an action
    whole = len(chosen[0][0]) == counts[0]  # then what is drawn is what was measured
    with tqdm(
        total=sum(len(measured) for measured, _ in chosen) + (0 if whole else len(chosen[0][1])),
        desc="summary", unit="frame", mininterval=0.5 if sys.stderr.isatty() else 10.0,
    ) as bar:  # fmt: skip
        look = functools.partial(
            first_actions, chunk_size=chunk_size, predict=predict, bar=bar, stop_request=stop_request
        )
        seen_at = [look(episode, measured) for episode, (measured, _) in zip(episodes, chosen, strict=True)]
        shown = (episodes[0], *(seen_at[0] if whole else look(episodes[0], chosen[0][1])))
    errors: dict[str, list[np.ndarray]] = {}
    for episode, (frames, predicted, recorded) in zip(episodes, seen_at, strict=True):
        policies = {  # the last two are dumb: stay where you are, and the training data's mean
            "policy": predicted,
            "no motion": no_motion(episode.state[frames][:, acted], recorded, wrapped, action_mode),
            "mean action": action_mean,
        }
        for name, action in policies.items():
            errors.setdefault(name, []).append(np.abs(action - recorded))
    mae = {name: np.concatenate(parts) for name, parts in errors.items()}
    training, validation = read_metrics(output_dir / METRICS)
    watch = Watch()
    trouble = [note for line in metrics_lines(output_dir / METRICS) if (note := watch.add(line))]
    kind = "held-out" if any_unseen else "training (none was held out)"
    which = f"{len(episodes)} {kind} episode{'s' * (len(episodes) > 1)}"
    if len(mae["policy"]) < sum(counts):
        which += f" ({len(mae['policy'])} of {sum(counts)} frames, evenly)"
    part = "" if whole else f", {len(shown[1])} of {counts[0]} frames"
    picture = draw(
        output_dir / "summary.png", *shown, names, contract["fps"], units,
        f"{facts['trained']}\npredicted against recorded actions on the {kind} episode {shown[0].name}{part}",
    )  # fmt: skip
    summary = {
        **facts,
        "episodes": [episode.name for episode in episodes],
        "held_out": any_unseen,
        "frames": len(mae["policy"]),
        "frames_in_episodes": sum(counts),
        "mae_rad": {name: float(error[:, in_rad].mean()) for name, error in mae.items() if in_rad.any()},
        "mae_rad_per_joint": {name: _per_name(error, names, in_rad) for name, error in mae.items()},
        "mae_per_other_state": {name: _per_name(error, names, ~in_rad) for name, error in mae.items()},
        "units": dict(zip(names, units, strict=True)),
        "loss_first": training[0]["loss"] if training else None,
        "loss_last": training[-1]["loss"] if training else None,
        "val_l1_last": validation[-1]["val_l1_loss"] if validation else None,
        "samples_per_s": float(np.median([m["samples_per_s"] for m in training])) if training else None,
        "samples_per_s_wall": _wall_rate(training),
        "warnings": trouble,
        "checkpoint": str(output_dir / "last" / "pretrained_model"),
        "picture": picture,
    }
    (output_dir / "summary.json").write_text(json.dumps(summary, indent=2) + "\n")
    lines = [(name, text) for name, text in facts.items()]
    if training:
        first, last = training[0], training[-1]
        lines.append(
            ("loss", f"{first['loss']:.3f} at step {first['step']}, {last['loss']:.3f} at step {last['step']}")
        )
        waiting = np.mean([m["data_wait_fraction"] for m in training])
        wall = (
            "" if summary["samples_per_s_wall"] is None else f"; {summary['samples_per_s_wall']:.1f} by the wall clock"
        )
        lines.append(("speed", f"{summary['samples_per_s']:.1f} samples/s, {waiting:.1%} of it waiting for data{wall}"))
    if validation:
        best = min(validation, key=lambda m: m["val_l1_loss"])
        text = f"L1 {validation[-1]['val_l1_loss']:.4f} (best {best['val_l1_loss']:.4f} at step {best['step']})"
        lines.append(("held out", text))
    lines += [("warning", note) for note in trouble]
    # Joints together, what is in other units one by one.
    each = [(f" of {names[j]}", np.arange(len(names)) == j) for j in np.flatnonzero(~in_rad)]
    for what, columns in [("", in_rad)] * bool(in_rad.any()) + each:
        unit = units[int(columns.argmax())] or "no unit said"
        compared = ", ".join(f"{name} {error[:, columns].mean():.6f}" for name, error in mae.items())
        lines.append(("error", f"mean absolute{what}, {unit}, on {which}: {compared}"))
    if action_mode != "absolute":
        lines.append(
            (
                "actions",
                f"{action_mode}; in our simulated task {STUDIED[action_mode]} of scenes succeeded with {action_mode}, "
                f"{STUDIED['absolute']} with absolute actions (docs/results.md): try conventions.action_mode=absolute",
            )
        )
    lines += [("checkpoint", summary["checkpoint"]), ("picture", picture)]
    print("\n" + "\n".join(f"  {name:<11} {text}" for name, text in lines) + "\n", flush=True)
    return summary
