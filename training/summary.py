"""What a run says first, and its end: one screen of text, summary.json, and a picture to look at before reading.

The picture (with the extra `plots` installed): loss curves; what the camera saw; and, on one episode, the action the
policy predicts at each recorded frame against the action that was recorded, per joint.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch

from rosbag_dataset import ChunkDataset, Episode, action_unit, no_motion, sync_table

from .metrics import METRICS, Watch, metrics_lines, read_metrics

# What docs/results.md found in closed loop, with the same data, network and steps: the default is not what works best.
STUDIED = {"delta": "48 %", "relative": "47 %", "absolute": "95 %"}
FEW_PASSES = 5  # over the data: with fewer, a policy has seen too little to do its task
SUMMARY_EPISODES = 5  # held-out episodes that the summary predicts on, frame by frame

Predict = Callable[[dict[str, np.ndarray]], torch.Tensor]


def first_actions(episode: Episode, chunk_size: int, predict: Predict) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Run the policy on every recorded frame of an episode ("teacher-forced"), keeping each chunk's first action.

    Returns:
        (frames (N,) int64 that have an action, predicted (N, A), recorded (N, A)), actions in their units.
    """
    dataset = ChunkDataset([episode], chunk_size)
    frames = np.array([dataset.locate(i)[1] for i in range(len(dataset))], np.int64)
    predicted = []
    with torch.inference_mode():
        for first in range(0, len(dataset), 16):
            batch = dataset.__getitems__(range(first, min(first + 16, len(dataset))))
            predicted.append(predict(batch)[:, 0].float().cpu().numpy())
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
        import matplotlib

        matplotlib.use("Agg")
        import matplotlib.pyplot as plt
    except ImportError:
        return "none, matplotlib is not installed (pip install matplotlib)"
    training, validation = read_metrics(path.with_name(METRICS))
    dataset = ChunkDataset([episode], 1)
    cameras = list(episode.image_shape)
    rows = 1 + -(-len(names) // 3)
    figure = plt.figure(figsize=(12, 2.9 * rows), layout="constrained")
    figure.suptitle(title, fontsize=11)
    grid = figure.add_gridspec(rows, 6)

    curves = figure.add_subplot(grid[0, :3])
    curves.plot([m["step"] for m in training], [m["loss"] for m in training], label="loss", color="0.6")
    curves.plot([m["step"] for m in training], [m["l1_loss"] for m in training], label="L1, training")
    if validation:
        curves.plot([m["step"] for m in validation], [m["val_l1_loss"] for m in validation], "o-", label="L1, held out")
    curves.set(xlabel="step", yscale="log", title="loss (normalised units)")
    curves.grid(alpha=0.3, which="both")
    curves.legend()

    camera = figure.add_subplot(grid[0, 3:])
    middle = len(dataset) * 2 // 3
    camera.imshow(np.hstack([dataset[middle][f"observation.images.{c}"] for c in cameras]))
    seconds = frames / fps
    camera.set_title(f"{episode.name}, {', '.join(cameras)} camera at {seconds[middle]:.1f} s", fontsize=10)
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
    plt.close(figure)
    return str(path)


def print_opening(
    model: str, training: Any, effective_batch: int, step: int, samples: int, episodes: int, held_out: Sequence[Episode]
) -> None:
    """Print what will be trained, on what and for how long; `training` is that section of the configuration."""
    names = ", ".join(e.name for e in held_out) or "none"
    passes = training.steps * effective_batch / samples
    print(
        f"training {model} for {training.steps} steps; effective batch {effective_batch} = {training.batch_size} per "
        f"GPU x {effective_batch // training.batch_size}; {samples} samples from {episodes} episodes, {len(held_out)} "
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
    skipped_bags: int,
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
        skipped_bags: how many bags were left out.

    Returns:
        What summary.json holds.
    """
    names, action_mode = contract["action_names"], contract["action_mode"]
    acted = [contract["state_names"].index(name) for name in names]
    wrapped = (np.array(contract["revolute"]) & contract["wrap_angles"])[acted]
    in_rad = np.array([contract["units"][i] == "rad" for i in acted])
    units = [action_unit(contract["units"][i], action_mode) for i in acted]
    reports = [episode.sync_report for episode in (*train, *held_out)]
    facts = {
        "trained": trained,
        "data": f"{len(train)} episodes ({len(held_out)} more held out, {skipped_bags} bags skipped), "
        f"{sum(r['frames'] for r in reports)} frames kept, {sum(r['dropped'] for r in reports)} dropped",
    }
    unseen, seen = ([e for e in es if len(e.time_ns) > len(e.segments)] for es in (held_out, train))  # with an action
    episodes, any_unseen = (unseen or seen)[:SUMMARY_EPISODES], bool(unseen)
    errors: dict[str, list[np.ndarray]] = {}
    shown = None
    for episode in episodes:
        frames, predicted, recorded = first_actions(episode, chunk_size, predict)
        shown = shown or (episode, frames, predicted, recorded)
        policies = {  # the last two are dumb: stay where you are, and the training data's mean
            "policy": predicted,
            "no motion": no_motion(episode.state[frames][:, acted], recorded, wrapped, action_mode),
            "mean action": action_mean,
        }
        for name, action in policies.items():
            errors.setdefault(name, []).append(np.abs(action - recorded))
    assert shown is not None  # compute_stats has refused data in which no episode has an action
    mae = {name: np.concatenate(parts) for name, parts in errors.items()}
    training, validation = read_metrics(output_dir / METRICS)
    watch = Watch()
    trouble = [note for line in metrics_lines(output_dir / METRICS) if (note := watch.add(line))]
    kind = "held-out" if any_unseen else "training (none was held out)"
    which = f"{len(episodes)} {kind} episode{'s' * (len(episodes) > 1)}"
    picture = draw(
        output_dir / "summary.png", *shown, names, contract["fps"], units,
        f"{facts['trained']}\npredicted against recorded actions on the {kind} episode {shown[0].name}",
    )  # fmt: skip
    summary = {
        **facts,
        "episodes": [episode.name for episode in episodes],
        "held_out": any_unseen,
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
    for what, chosen in [("", in_rad)] * bool(in_rad.any()) + each:
        unit = units[int(chosen.argmax())] or "no unit said"
        compared = ", ".join(f"{name} {error[:, chosen].mean():.6f}" for name, error in mae.items())
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
