"""What would the policy do? Run it on recorded episodes and compare with what the recording did.

    python -m ur10e_deploy.offline_eval --checkpoint outputs/train-rosbag-act --bags my_bags       # held-out episodes
    python -m ur10e_deploy.offline_eval --checkpoint outputs/train-rosbag-act --dataset my_lerobot_dataset \
        --episode 0 1 2 3 --device cuda --output outputs/eval
    python -m ur10e_deploy.offline_eval ... --max-mae 0.002 --max-p99-ms 33        # exit 3 when exceeded: a gate

The policy sees the recorded states and images ("teacher-forced"), at every frame that has a recorded action. With
--rollout its own predictions are followed as well, from the first frame of each uninterrupted piece: deltas are
integrated, absolute actions taken, and the drift from the recorded joint path is reported. The images stay the
recorded ones, so that a rollout shows how errors add up, not how the policy would react to seeing them.

The output directory gets report.html (open it first), summary.json (written last: it is there when all is),
episode_NNN.parquet and .png, all_episodes.parquet for several episodes, overview.png.

Exit code 0: done; 1: bad input, with one line; 3: a gate was exceeded, and all results are written.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import NoReturn

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import torch
from tqdm import tqdm

from lerobot_checkpoint import CheckpointError

from . import report
from .checks import EvalError, check_data, check_source, choose_episodes
from .config import ACTION_MODES, PolicyError, RobotContract, has_contract
from .episode_result import ChunkErrors, EpisodeResult
from .policy_runner import BACKENDS, DEVICES, MODES, PolicyRunner
from .results import Output, screen, summarise, table
from .sources import AbsentVideo, BagSource, EpisodeData, EpisodeSource, SourceError

EXIT_GATE = 3
THUMBNAILS = 8  # video frames along the time axis of an episode's picture


# -- one episode ---------------------------------------------------------------------------------------------------


class Rollout:
    """Follows the policy's own actions: deltas are added up, absolute actions taken as they are."""

    def __init__(self, runner: PolicyRunner) -> None:
        self._runner = runner.fork()  # with a queue and a latency of its own

    def start(self, state_rad: np.ndarray) -> None:
        """Begin anew at the recorded state (S,), with an empty action queue."""
        self._runner.reset()
        # (A,), never wrapped: a path without jumps
        self.position_rad = self._runner.contract.acted_on(state_rad.astype(np.float64))

    def step(self, state_rad: np.ndarray, images: Mapping[str, np.ndarray]) -> None:
        """Ask the policy at position_rad, and move position_rad by its answer.

        The images are this frame's recorded ones, and so are those states (S,) that are only observed.
        """
        state = state_rad.astype(np.float64)
        state[list(self._runner.contract.acted)] = self.position_rad
        self.position_rad = self._runner.command(state, images)


def evaluate_episode(
    runner: PolicyRunner,
    source: EpisodeSource,
    data: EpisodeData,
    frames: range,
    chunk_errors: ChunkErrors,
    rollout: Rollout | None,
    bar: tqdm,
) -> EpisodeResult:
    """Run the policy on `frames` of an episode. Queue, ensemble and rollout start anew where the recording was cut.

    `chunk_errors` gains every chunk that was inferred, against the actions recorded from there to the next cut.

    Raises:
        PolicyError: an observation does not fit the policy.
        SourceError: an image cannot be read.
    """
    has_action = np.all(np.isfinite(data.action), axis=1)
    run_stop = _run_stops(has_action, data.segment)
    shown = set(np.linspace(frames.start, max(frames.start, frames.stop - 1), THUMBNAILS).round().astype(int).tolist())
    contract, cameras = runner.contract, list(runner.contract.cameras)
    kept, predicted, seconds, inferred, path, thumbnails = [], [], [], [], [], []
    for frame in source.frames(data.index, frames.start, frames.stop):
        t = frame.index
        images = {camera: frame.images[camera] for camera in cameras}
        if t in shown:
            thumbnails.append((float(data.timestamp_s[t]), images))
        bar.update()
        if not has_action[t]:
            continue
        if t == frames.start or run_stop[t] != run_stop[t - 1]:
            runner.reset()
            if rollout is not None:
                rollout.start(data.state_rad[t])
        step = runner.step(data.state_rad[t], images)
        if step.chunk is not None:
            recorded = data.action[t : min(run_stop[t], t + len(step.chunk))]
            recorded = contract.beside(recorded, step.chunk[: len(recorded)])
            chunk_errors.add(step.chunk, recorded, contract.acted_on(data.state_rad[t]))
        kept.append(t)
        predicted.append(step.action)
        seconds.append(step.seconds)
        inferred.append(step.chunk is not None)
        if rollout is not None:
            path.append(rollout.position_rad)
            rollout.step(data.state_rad[t], images)
    actions = np.array(predicted, np.float32).reshape(-1, len(contract.acted))
    return EpisodeResult(
        index=data.index,
        name=data.name,
        frame=np.array(kept, np.int64),
        timestamp_s=data.timestamp_s[kept],
        state_rad=data.state_rad[kept],
        predicted=actions,
        recorded=contract.beside(data.action[kept], actions).astype(np.float32),
        seconds=np.array(seconds),
        inferred=np.array(inferred, bool),
        segment=data.segment[kept],
        rollout_rad=np.array(path).reshape(actions.shape) if rollout is not None else None,
        without_action=len(frames) - len(kept),
        thumbnails=thumbnails,
    )


def _run_stops(has_action: np.ndarray, segment: np.ndarray) -> np.ndarray:
    """Where the run of each frame ends (exclusive), (n,) int64.

    A run is frames with recorded actions and no cut between them; a frame without an action is a run of its own.
    """
    stop = np.empty(len(has_action), np.int64)
    for t in range(len(has_action) - 1, -1, -1):
        goes_on = t + 1 < len(has_action) and has_action[t] and has_action[t + 1] and segment[t] == segment[t + 1]
        stop[t] = stop[t + 1] if goes_on else t + 1
    return stop


# -- the command ---------------------------------------------------------------------------------------------------


def evaluate(args: argparse.Namespace) -> int:
    """The whole evaluation; -> exit code.

    Raises:
        CheckpointError, PolicyError, SourceError, EvalError: one line each.
    """
    began_s = time.perf_counter()
    if args.start_frame < 0 or (args.num_steps is not None and args.num_steps < 1):
        raise EvalError(f"--start-frame {args.start_frame} --num-steps {args.num_steps}: expected >= 0 and >= 1")
    output = Output(args.output)
    if args.bags and not has_contract(args.checkpoint):
        raise EvalError(
            f"--bags: {args.checkpoint} has no contract of train.py, and how to decode bags for it is unknown; "
            "use --dataset"
        )
    dataset = open_dataset(args.dataset) if args.dataset else None
    said = {
        "action_mode": args.action_mode,
        "wrap_angles": args.wrap,
        "image_resize": tuple(args.image_resize) if args.image_resize else None,
        "joint_names": dataset.joint_names if dataset else None,
    }
    runner = PolicyRunner(args.checkpoint, backend=args.backend, device=args.device, mode=args.mode, said=said)
    contract, notes = runner.contract, list(runner.notes)
    if contract.source == "flags":
        notes.append(
            f"no contract in the checkpoint; by flags: {contract.action_mode} actions, "
            f"{'wrapped' if contract.wrap_angles else 'not wrapped'}, images "
            f"{'resized' if contract.image_resize else 'not resized'}, joints in the dataset's order and sign"
        )
    source: EpisodeSource = dataset or open_bags(args, contract)
    chosen, choice_notes = choose_episodes(source, contract, args.episode, args.skip_missing_episodes)
    episodes, without_video = [], []
    for index in chosen:
        try:
            episodes.append(source.episode(index))
        except AbsentVideo as absent:
            if not args.skip_missing_episodes:
                raise
            without_video.append((index, absent))
    if without_video:
        if not episodes:
            raise EvalError(f"none of the {len(chosen)} episodes has all its videos; the first: {without_video[0][1]}")
        numbers = ", ".join(str(index) for index, _ in without_video)
        notes.append(f"episodes {numbers} are skipped: videos of theirs are absent")
        chosen = [data.index for data in episodes]
    notes += choice_notes + check_source(source, contract) + check_data(episodes, source, runner)
    if args.bags and (trained := [e.name for e in episodes if e.name in contract.training_episodes]):
        notes.append(f"training saw {', '.join(trained)}: errors there say nothing about new episodes")
    ranges = []
    for data in episodes:
        count = len(data.timestamp_s)
        stop = count if args.num_steps is None else min(count, args.start_frame + args.num_steps)
        if not np.isfinite(data.action[args.start_frame : stop]).all(axis=1).any():
            raise EvalError(
                f"{data.name}: no recorded action from --start-frame {args.start_frame} on; it has {count} frames"
            )
        ranges.append(range(args.start_frame, stop))

    if output.clear():
        notes.append(f"replaced the evaluation that was in {args.output}")
    for note in notes:
        print(f"note: {note}", flush=True)
    joints = contract.action_labels
    chunk_errors = ChunkErrors(runner.chunk_size, len(joints), source.fps, contract.action_kind == "delta")
    rollout = Rollout(runner) if args.rollout else None
    results, tables = [], []
    quiet = not sys.stderr.isatty()
    with tqdm(total=sum(map(len, ranges)), unit="frame", mininterval=10.0 if quiet else 0.5) as bar:
        for data, frames in zip(episodes, ranges, strict=True):
            bar.set_description(data.name)
            result = evaluate_episode(runner, source, data, frames, chunk_errors, rollout, bar)
            results.append(result)
            tables.append(table(result, contract))
            with output.writing(f"episode_{data.index:03d}.parquet") as path:
                pq.write_table(tables[-1], path)
            with output.writing(f"episode_{data.index:03d}.png") as path:
                report.draw_episode(path, result, contract, joints)
            if rollout is not None:
                with output.writing(f"episode_{data.index:03d}_rollout.png") as path:
                    report.draw_rollout(path, result, contract, joints)
            result.thumbnails.clear()  # pixels of one episode at a time
    if len(tables) > 1:
        with output.writing("all_episodes.parquet") as path:
            pq.write_table(
                pa.concat_tables([t.replace_schema_metadata(tables[0].schema.metadata) for t in tables]), path
            )

    summary = summarise(runner, source, results, chunk_errors, args, notes)
    with output.writing("overview.png") as path:
        report.draw_overview(path, summary, [r.seconds[r.inferred] for r in results])
    with output.writing("report.html") as path:
        path.write_text(report.html(summary, args.output), encoding="utf-8")
    with output.writing("summary.json") as path:
        path.write_text(json.dumps(summary | {"took_s": round(time.perf_counter() - began_s, 1)}, indent=2) + "\n")
    for note in source.notes:  # files are opened when they are needed, so that reading adds to them
        print(f"note: {note}", flush=True)
    print(screen(summary, args.output, "" if report.can_draw() else ": none, matplotlib is not installed"), flush=True)
    return 0 if all(gate["passed"] for gate in summary["verdict"]["gates"]) else EXIT_GATE


def open_dataset(root: Path) -> EpisodeSource:
    """The LeRobot dataset in `root`. Raises SourceError when it is none, or when the package av is missing."""
    try:
        from .lerobot_dataset import LeRobotDatasetSource
    except ModuleNotFoundError as error:  # av, which bags do not need
        raise SourceError(f"--dataset {root}: {error.name} is not installed; `uv pip install {error.name}`") from error
    return LeRobotDatasetSource(root)


def open_bags(args: argparse.Namespace, contract: RobotContract) -> BagSource:
    """The bags in --bags, decoded as in training.

    Decoded frames go to --cache-dir, else to the training's own cache if it is on this machine, else to
    outputs/frame-cache.

    Raises:
        SourceError: no bags there.
    """
    training_cache = Path(contract.data_settings["cache_dir"])
    cache = args.cache_dir or (training_cache if training_cache.is_dir() else Path("outputs/frame-cache"))
    # A policy of relative actions, or of commands, is compared by the positions that they lead to: see PolicyRunner.
    values = contract.data_settings | {"action_mode": contract.action_kind}
    return BagSource(args.bags, values, cache, contract.angle_reference_rad)


class ArgumentParser(argparse.ArgumentParser):
    """argparse exits 2 and prints the usage first; bad input here is one line and 1."""

    def error(self, message: str) -> NoReturn:
        """Print the message as one line on stderr and exit with 1."""
        self.exit(1, f"error: {message}; see --help\n")


def parser() -> argparse.ArgumentParser:
    """The options of the command line."""
    p = ArgumentParser(
        prog="python -m ur10e_deploy.offline_eval",
        description="Run a policy on recorded episodes and compare with what the recording did.",
    )
    p.add_argument("--checkpoint", type=Path, required=True, help="output, checkpoint or pretrained_model directory")
    data = p.add_mutually_exclusive_group(required=True)
    data.add_argument("--dataset", type=Path, help="root of a LeRobot v3.0 dataset")
    data.add_argument("--bags", type=Path, help="folder of ROS 2 bags, decoded as in training")
    p.add_argument(
        "--episode", type=int, nargs="+", metavar="N", help="default: all of a dataset, the held-out ones of bags"
    )
    p.add_argument(
        "--skip-missing-episodes", action="store_true", help="leave out, and name, episodes that are not there"
    )
    p.add_argument("--start-frame", type=int, default=0, metavar="N", help="first frame of each episode (default: 0)")
    p.add_argument("--num-steps", type=int, metavar="N", help="at most so many frames of each episode (default: all)")
    p.add_argument("--device", choices=DEVICES, default="auto", help="default: auto")
    p.add_argument("--backend", choices=BACKENDS, default="auto", help="default: auto, LeRobot if it is installed")
    p.add_argument("--mode", choices=MODES, default="auto", help="default: auto, what the checkpoint says")
    p.add_argument("--rollout", action="store_true", help="also follow the policy's own actions")
    p.add_argument("--output", type=Path, default=Path("outputs/eval"), help="default: outputs/eval")
    p.add_argument(
        "--max-mae", type=float, metavar="X", help="exit 3 above this mean absolute error, in the action's unit"
    )
    p.add_argument("--max-p99-ms", type=float, metavar="X", help="exit 3 above this 99th percentile of inference, ms")
    p.add_argument(
        "--cache-dir", type=Path, help="decoded frames of --bags (default: the training's, or outputs/frame-cache)"
    )
    lerobot = p.add_argument_group("for checkpoints that LeRobot wrote, which do not say")
    lerobot.add_argument("--action-mode", choices=ACTION_MODES, help="what its actions are")
    lerobot.add_argument("--wrap", action=argparse.BooleanOptionalAction, help="angles were wrapped to (-pi, pi]")
    lerobot.add_argument("--image-resize", type=int, nargs=2, metavar=("H", "W"), help="images were resized to this")
    return p


def in_one_line(evaluate: Callable[[argparse.Namespace], int], args: argparse.Namespace, last: str) -> int:
    """Run an evaluation; -> its exit code, or 1, or 130 for Ctrl-C, after one line on stderr that says what is wrong.

    `last` is the file that it writes last, into args.output.
    """
    try:
        return evaluate(args)
    except (CheckpointError, PolicyError, SourceError, EvalError) as error:
        line = str(error)
    except torch.OutOfMemoryError as error:
        line = f"the GPU is out of memory; use --device cpu, or free some ({str(error).splitlines()[0]:.100})"
    except OSError as error:
        line = f"{error.filename or args.output}: {error.strerror or error}"
    except KeyboardInterrupt:
        print(f"error: interrupted; {args.output} is not complete (no {last})", file=sys.stderr, flush=True)
        return 130
    print(f"error: {line}", file=sys.stderr, flush=True)
    return 1


def main(argv: Sequence[str] | None = None) -> int:
    """Entry of `python -m ur10e_deploy.offline_eval`. Exit codes: see the top of this file."""
    return in_one_line(evaluate, parser().parse_args(argv), "summary.json")


if __name__ == "__main__":
    sys.exit(main())
