"""The same bags through LeRobot and through us, in turn: converting, exporting, training, inference.

    python -m benchmarks.versus_lerobot --lerobot-python .venv-lerobot-0.4.4/bin/python
    python -m benchmarks.versus_lerobot --lerobot-python PATH inference --rounds 9

The same frames at the same size, the same batch, the same model with the same number of parameters. How each side is
timed, and where the comparison favours LeRobot: benchmarks/README.md.
"""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import difflib
import functools
import json
import os
import re
import shutil
import statistics
import subprocess
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from ur10e_deploy import runtimes

import train
from act_model import ACT
from benchmarks import common
from benchmarks.common import BenchmarkError, Lines, Report, say
from lerobot_checkpoint import load_policy
from rosbag_dataset import ChunkDataset, Episode, compute_stats, load_episodes, open_pixels, split_episodes
from rosbag_dataset.exporting import export as export_bags
from training.device import has_fast_bf16

SIDE = Path(__file__).with_name("lerobot_side.py")
INFERENCES = 50  # of each kind, in each round
# Their two float32 networks may differ by rounding, and on a GPU LeRobot also multiplies in TF32.
SAME_ACTIONS = {"cpu": 1e-4, "cuda": 1e-2}


# -- LeRobot's side -----------------------------------------------------------------------------------------------


@functools.cache
def lerobot_facts(python: Path) -> dict[str, str]:
    """What that interpreter's LeRobot is (see lerobot_side.about). Raises BenchmarkError when it has none for us."""
    wanted = "make one with: uv venv DIR && uv pip install --python DIR lerobot==0.4.4"
    if not os.access(python, os.X_OK) or python.is_dir():
        raise BenchmarkError(f"--lerobot-python {python}: expected the python of an environment with lerobot; {wanted}")
    environment = {**os.environ, "PYTHONPATH": ""}
    result = subprocess.run([python, SIDE, "about"], env=environment, capture_output=True, text=True)
    if result.returncode:
        raise BenchmarkError(f"--lerobot-python {python}: {common.last_words(result.stderr)}; {wanted}")
    return json.loads(result.stdout)


class LeRobot:
    """LeRobot in its own environment, with its caches below --out."""

    def __init__(self, options: argparse.Namespace) -> None:
        self.options, self.python = options, options.lerobot_python
        self.facts = lerobot_facts(self.python)
        home = options.out / "lerobot-home"
        self.env = {"HF_HOME": str(home), "HF_LEROBOT_HOME": str(home / "lerobot")}
        self.env |= {"HF_HUB_OFFLINE": "1", "PYTHONPATH": ""}

    def side(self, command: str, *arguments: object) -> dict[str, Any]:
        """Run a command of lerobot_side.py; -> what it wrote. Raises BenchmarkError with its last words."""
        out = self.options.out / f"lerobot-{command}.json"
        out.unlink(missing_ok=True)
        result = subprocess.run(
            [self.python, SIDE, command, *map(str, arguments), out],
            env={**os.environ, **self.env}, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT, text=True, errors="replace",
        )  # fmt: skip
        if result.returncode or not out.exists():
            raise BenchmarkError(
                f"--lerobot-python {self.python}: {command} failed: {common.last_words(result.stdout)}"
            )
        return json.loads(out.read_text())

    def convert(self, frames: Path, **changes: object) -> float:
        """Seconds to write a fresh dataset of the frames that dump_frames() wrote; `changes` of its job."""
        job = json.loads((frames / "job.json").read_text()) | changes
        (frames / "this-job.json").write_text(json.dumps(job))
        shutil.rmtree(job["root"], ignore_errors=True)
        written = self.side("convert", frames / "this-job.json")
        if written["frames"] != job["frames"]:
            raise BenchmarkError(f"LeRobot wrote {written['frames']} frames, expected {job['frames']}")
        return written["seconds"]

    def train(self, cfg: train.Config, root: str) -> dict[str, float]:
        """Run lerobot-train on a dataset until it logs its last step; the same figures as common.train_ours().

        Speed is by the moments at which its log lines appear, without the steps of the first line.
        """
        options, folder = self.options, self.options.out / "lerobot-train"
        shutil.rmtree(folder, ignore_errors=True)
        steps, log_freq = options.steps, common.log_freq(options.steps)
        device = "cuda" if on_gpu(options) else "cpu"
        shape = {name: getattr(cfg.model, name) for name in LEROBOT_MODEL_KEYS}
        command = [
            self.python, "-m", "lerobot.scripts.lerobot_train",
            "--dataset.repo_id=local/benchmark", f"--dataset.root={root}",
            f"--dataset.video_backend={self.facts['video_backend']}",
            "--policy.type=act", f"--policy.device={device}", "--policy.push_to_hub=false",
            "--policy.pretrained_backbone_weights=null",
            *(f"--policy.{name}={str(value).lower()}" for name, value in shape.items() if value is not None),
            f"--policy.optimizer_lr={cfg.training.lr}", f"--policy.optimizer_lr_backbone={cfg.training.lr_backbone}",
            f"--output_dir={folder}", f"--batch_size={options.batch_size}", f"--steps={steps}",
            f"--log_freq={log_freq}", f"--save_freq={steps}", f"--num_workers={options.lerobot_workers}",
            "--wandb.enable=false",
        ]  # fmt: skip
        log = folder.with_suffix(".log")
        lines = Lines(log)

        def logged() -> list[tuple[float, str]]:
            return [(when_s, line) for when_s, line in lines.poll() if "updt_s:" in line]

        launched_s = common.run_watched(command, log, lambda pid: len(logged()) >= steps // log_freq, env=self.env)
        text = log.read_text(errors="replace")
        ours = sum(p.numel() for p in ACT(train.act_config(cfg)).parameters())
        theirs = re.search(r"num_total_params=(\d+)", text)
        if theirs is None or int(theirs[1]) != ours:
            found = theirs[1] if theirs else "no"
            raise BenchmarkError(f"lerobot-train's model has {found} parameters, expected ours, {ours}; see {log}")
        moments_s = [when_s for when_s, _ in logged()]
        spent = [
            (float(m[1]), float(m[2])) for _, line in logged() if (m := re.search(r"updt_s:(\S+) data_s:(\S+)", line))
        ]
        update_s, data_s = (statistics.mean(column) for column in zip(*spent[1:], strict=True))
        shutil.rmtree(folder, ignore_errors=True)
        samples = (len(moments_s) - 1) * log_freq * options.batch_size
        return {
            "to_last_step_s": moments_s[-1] - launched_s,
            "samples_per_s": samples / (moments_s[-1] - moments_s[0]),
            "data_wait_fraction": data_s / (update_s + data_s),
        }


# Our names of what shapes the network are LeRobot's. state_dim and action_dim follow from its dataset.
LEROBOT_MODEL_KEYS = [
    name for name in train.ModelConfig.__dataclass_fields__
    if name not in ("state_dim", "action_dim", "pretrained_backbone")
]  # fmt: skip


def on_gpu(options: argparse.Namespace) -> bool:
    """Whether --device means a GPU here."""
    return options.device == "cuda" or (options.device == "auto" and torch.cuda.is_available())


def dump_frames(options: argparse.Namespace, cfg: train.Config) -> Path:
    """The bags' synchronised, resized frames as arrays for LeRobot's writer, and the job that names them.

    Only frames that have an action, so that both sides train on the same samples.
    """
    frames = options.out / "lerobot-frames"
    shutil.rmtree(frames, ignore_errors=True)
    episodes, _ = load_episodes(train.bag_settings(cfg))
    folders, total = [], 0
    for i, episode in enumerate(episodes):
        folder = frames / f"episode_{i:04d}"
        folder.mkdir(parents=True)
        kept = frames_with_action(episode)
        for camera, index in episode.image_index.items():
            np.save(folder / f"{camera}.npy", open_pixels(episode, camera)[index[kept]])
        np.save(folder / "state.npy", episode.state[kept])
        np.save(folder / "action.npy", episode.action[kept])
        folders.append(str(folder))
        total += len(kept)
    if total != len(ChunkDataset(episodes, cfg.model.chunk_size)):
        raise BenchmarkError("the frames for LeRobot are not as many as our samples")
    if cfg.data.fps != int(cfg.data.fps):
        raise BenchmarkError(f"data.fps: found {cfg.data.fps:g}, expected a whole number: LeRobot's datasets need one")
    job = {
        "root": str(options.out / "lerobot-dataset"),
        "fps": int(cfg.data.fps),
        "joint_names": cfg.data.joint_names,
        "streaming_encoding": options.lerobot_streaming_encoding,
        "episodes": folders,
        "frames": total,
    }
    (frames / "job.json").write_text(json.dumps(job))
    return frames


def frames_with_action(episode: Episode) -> np.ndarray:
    """(n,) int64: the frames of an episode that have an action."""
    return np.flatnonzero(np.arange(len(episode.time_ns)) < episode.action_stop)


# -- converting ---------------------------------------------------------------------------------------------------


def convert(options: argparse.Namespace) -> None:
    """Bags to ready to train: LeRobot's dataset against our frame cache."""
    report = Report("versus_lerobot_convert")
    lerobot = LeRobot(options)
    cfg, frames = prepared(options)
    measures = {"LeRobot's writer": lambda: lerobot.convert(frames), "ours": lambda: ready_to_train(options, cfg)}
    theirs_s, ours_s = common.alternate(options.rounds, measures).values()
    total = json.loads((frames / "job.json").read_text())["frames"]
    for name, times_s in (("LeRobot's writer", theirs_s), ("ours", ours_s)):
        report.row(f"bags to ready to train, {name}", times_s, "s")
        report.row(f"bags to ready to train, {name}", [total / t for t in times_s], "frames/s")
    report.ratio("speed of ours to LeRobot's", theirs_s, ours_s, at_least=20)
    report.note(f"{total} frames of {options.height}x{options.width}. {about(lerobot)}")
    report.note(
        "LeRobot is timed from create() to finalize(), given frames that are decoded and resized already; ours from "
        "opening the bags to statistics and samples, with the cache on disk."
    )
    report.finish(options)


def prepared(options: argparse.Namespace) -> tuple[train.Config, Path]:
    """The configuration with all bags for training, and the frames for LeRobot; the bags end in the page cache."""
    cfg = common.config(options, data__bag_dir=common.sample_bags(options), training__val_fraction=0)
    say("handing the frames over to LeRobot")
    frames = dump_frames(options, cfg)
    common.read_bags(Path(cfg.data.bag_dir))
    return cfg, frames


def ready_to_train(options: argparse.Namespace, cfg: train.Config) -> float:
    """Seconds from bags to statistics and samples, into a fresh cache."""
    cache = options.out / "versus-cache"
    shutil.rmtree(cache, ignore_errors=True)
    fresh = common.config(options, data__bag_dir=cfg.data.bag_dir, data__cache_dir=cache)
    settings = train.bag_settings(fresh)

    def work() -> None:
        episodes, _ = load_episodes(settings, progress=False)
        training, _ = split_episodes(episodes, cfg.training.val_fraction, cfg.training.seed)
        compute_stats(training, cfg.data.image_stats, cfg.model.chunk_size)
        ChunkDataset(training, cfg.model.chunk_size)

    return common.seconds(work)


# -- exporting ----------------------------------------------------------------------------------------------------


def export(options: argparse.Namespace) -> None:
    """Frames to a LeRobot dataset: LeRobot's own writer against `python -m rosbag_dataset export`."""
    report = Report("versus_lerobot_export")
    lerobot = LeRobot(options)
    cfg, frames = prepared(options)
    settings = dataclasses.replace(train.bag_settings(cfg), action_mode="absolute")
    total = json.loads((frames / "job.json").read_text())["frames"]
    out = options.out / "our-dataset"

    def ours(codec: str) -> float:
        shutil.rmtree(out, ignore_errors=True)
        took_s = common.seconds(lambda: export_bags(settings, out, codec, "reach", progress=False))
        written = json.loads((out / "meta/info.json").read_text())["total_frames"]
        if written != total:
            raise BenchmarkError(f"we wrote {written} frames, LeRobot {total}")
        return took_s

    measures: dict[str, Callable[[], float]] = {}
    for codec, encoder in (("av1", "libsvtav1"), ("h264", "h264")):
        measures[f"LeRobot's writer, {codec}"] = lambda encoder=encoder: lerobot.convert(frames, vcodec=encoder)
        measures[f"ours, {codec}"] = lambda codec=codec: ours(codec)
    times_s = common.alternate(options.rounds, measures)
    for name, each in times_s.items():
        report.row(f"frames to a dataset, {name}", each, "s")
        report.row(f"frames to a dataset, {name}", [total / t for t in each], "frames/s")
    as_it_comes = times_s["LeRobot's writer, av1"], times_s["ours, h264"]
    report.ratio("speed of ours to LeRobot's, each as it comes", *as_it_comes, at_least=5)
    for codec in ("av1", "h264"):
        of = times_s[f"LeRobot's writer, {codec}"], times_s[f"ours, {codec}"]
        report.ratio(f"speed of ours to LeRobot's, {codec}", *of)
    report.note(f"{total} frames of {options.height}x{options.width}. {about(lerobot)}")
    report.note(
        "Both sides start from frames that are decoded and resized: LeRobot's from create() to finalize(), given "
        "arrays in memory; ours from opening the bags, whose frames are in the cache, to meta/info.json, on the disk."
    )
    report.finish(options)


def about(lerobot: LeRobot) -> str:
    """Which LeRobot, in a sentence."""
    facts = lerobot.facts
    return f"LeRobot {facts['lerobot']}, torch {facts['torch']}, video by {facts['video_backend']}."


# -- training -----------------------------------------------------------------------------------------------------


def training(options: argparse.Namespace) -> None:
    """Samples per second, and from bags to the last step, of lerobot-train against train.py."""
    report = Report("versus_lerobot_train")
    lerobot = LeRobot(options)
    cfg, frames = prepared(options)
    root = json.loads((frames / "job.json").read_text())["root"]
    cache = options.out / "versus-cache"

    def theirs() -> dict[str, float]:
        converted_s = lerobot.convert(frames)
        return {"convert_s": converted_s, **lerobot.train(cfg, root)}

    def ours(precision: str) -> dict[str, float]:
        shutil.rmtree(cache, ignore_errors=True)
        return common.train_ours(
            options, options.out / "versus-train", options.steps, data__bag_dir=cfg.data.bag_dir,
            data__cache_dir=cache, training__val_fraction=0, training__precision=precision,
        )  # fmt: skip

    device = torch.device("cuda" if on_gpu(options) else "cpu")
    precisions = ["fp32", "bf16"] if has_fast_bf16(device) else ["fp32"]
    measures: dict[str, Callable[[], dict[str, float]]] = {"lerobot-train": theirs}
    for precision in precisions:
        measures[f"ours, {precision}"] = lambda precision=precision: ours(precision)
    runs = common.alternate(options.rounds, measures)

    for name, each in runs.items():
        report.row(f"{name}: training", [run["samples_per_s"] for run in each], "samples/s")
        report.row(f"{name}: waiting for data", [run["data_wait_fraction"] for run in each], "of the time")
    from_bags = {name: [run.get("convert_s", 0) + run["to_last_step_s"] for run in each] for name, each in runs.items()}
    for name, times_s in from_bags.items():
        report.row(f"{name}: bags to step {options.steps}", times_s, "s")
    if device.type == "cuda":
        targets, whole = {"fp32": {}, "bf16": {"at_least": 4}}, {}
    else:
        targets, whole = {"fp32": {"at_least": 1.05}, "bf16": {"at_least": 1.5}}, {"at_least": 2}
    for precision in precisions:
        mine, lerobots = ([run["samples_per_s"] for run in runs[n]] for n in (f"ours, {precision}", "lerobot-train"))
        report.ratio(f"training speed of ours, {precision}, to LeRobot's", mine, lerobots, **targets[precision])
    for precision in precisions:  # the target is for ours as it comes, which is the last
        target = whole if precision == precisions[-1] else {}
        what = f"speed of ours, {precision}, from bags to step {options.steps}"
        report.ratio(what, from_bags["lerobot-train"], from_bags[f"ours, {precision}"], **target)
    report.note(
        f"{options.height}x{options.width}, batch {options.batch_size}, on {device}; loader processes: "
        f"{cfg.training.num_workers} ours, {options.lerobot_workers} LeRobot's. {about(lerobot)}"
    )
    report.note(
        "From bags: LeRobot's writer as in `convert`, plus lerobot-train from launch; ours from launch, no cache."
    )
    report.finish(options)


# -- inference ----------------------------------------------------------------------------------------------------


def inference(options: argparse.Namespace) -> None:
    """Batch 1: our predict_chunk against LeRobot's select_action with an empty queue, on the same checkpoint."""
    report = Report("versus_lerobot_inference")
    lerobot = LeRobot(options)
    cfg = common.config(options)
    device = torch.device("cuda" if on_gpu(options) else "cpu")
    size, folder = (options.height, options.width), options.out / "versus-inference"
    policy = load_policy(common.random_checkpoint(cfg, folder, size), device)
    observation = common.random_observation(cfg, size)
    np.savez(folder / "input.npz", **{key: value.numpy() for key, value in observation.items()})
    observation = {key: value.to(device) for key, value in observation.items()}
    try:
        onnx, seen = (
            runtimes.OnnxPolicy(runtimes.to_onnx(policy, {})),
            runtimes.inputs_of(policy, np.random.default_rng(0)),
        )
    except runtimes.ExportError as error:
        raise BenchmarkError(f"inference: {error}") from None
    command = [lerobot.python, SIDE, "infer", policy.path, folder / "input.npz", folder / "output.npz", device.type]
    with (
        (folder / "log").open("w") as log,
        subprocess.Popen(
            command, env={**os.environ, **lerobot.env}, stdin=subprocess.PIPE, stdout=subprocess.PIPE,
            stderr=log, text=True,
        ) as process,
    ):  # fmt: skip

        def answer(question: str = "") -> str:
            """LeRobot's next line on stdout, after asking; other libraries may print there too."""
            if question:
                with contextlib.suppress(BrokenPipeError):  # it has ended: there is no answer either
                    process.stdin.write(question + "\n")
                    process.stdin.flush()
            for line in process.stdout:
                if line.startswith(("ready", "{")):
                    return line
            raise BenchmarkError(f"LeRobot's inference failed: {common.last_words((folder / 'log').read_text())}")

        def ours() -> list[float]:
            work = lambda: policy.predict_chunk(observation).cpu()  # noqa: E731
            return [1e3 * common.seconds(work) for _ in range(INFERENCES)]

        def with_onnx() -> list[float]:
            return [1e3 * common.seconds(lambda: onnx(*seen)) for _ in range(INFERENCES)]

        try:
            answer()
            theirs_chunk = np.load(folder / "output.npz")["chunk"]
            difference = float(np.abs(theirs_chunk - policy.predict_chunk(observation).cpu().numpy()).max())
            if not difference <= SAME_ACTIONS[device.type]:
                raise BenchmarkError(f"inference: the two sides' actions differ by {difference:g}; nothing to compare")
            ours(), with_onnx(), answer("5")  # warm up
            measures = {"ours": ours, "LeRobot": lambda: json.loads(answer(str(INFERENCES))), "onnx": with_onnx}
            ours_ms, theirs_ms, onnx_ms = common.alternate(options.rounds, measures).values()
        finally:
            with contextlib.suppress(BrokenPipeError):
                process.stdin.close()  # its loop over stdin ends
    shutil.rmtree(folder)
    kinds = {"ours": ours_ms, "ours, onnx": onnx_ms} | {
        f"LeRobot, {kind}": [each[kind] for each in theirs_ms] for kind in theirs_ms[0]
    }
    p50_ms = {name: [statistics.median(times) for times in rounds] for name, rounds in kinds.items()}
    for name, rounds in kinds.items():
        report.row(f"{name}: p50", p50_ms[name], "ms")
        report.row(f"{name}: p99", [float(np.percentile(times, 99)) for times in rounds], "ms")
    alone, whole = p50_ms["LeRobot, select_action"], p50_ms["LeRobot, with processors"]
    report.ratio("speed of ours to select_action", alone, p50_ms["ours"], at_least=1.5)
    report.ratio("speed of ours to select_action with processors", whole, p50_ms["ours"])
    report.ratio("speed of ours, onnx, to select_action", alone, p50_ms["ours, onnx"], at_least=2.0)
    report.note(
        f"{options.rounds} rounds of {INFERENCES} on {device}, {options.height}x{options.width}; actions of both sides "
        f"differ by at most {difference:.1e}. Ours normalises and un-normalises, select_action alone does not. "
        f"{about(lerobot)}"
    )
    report.finish(options)


# -- the command --------------------------------------------------------------------------------------------------

STAGES: dict[str, Callable[[argparse.Namespace], None]] = {
    "convert": convert, "export": export, "train": training, "inference": inference,
}  # fmt: skip


def main(argv: Sequence[str] | None = None) -> int:
    """The command line; returns the exit status. A missed target is not an error: it is in the table."""
    parser = common.Parser(prog="python -m benchmarks.versus_lerobot", description="Ours beside LeRobot's.")
    add = parser.add_argument
    add("stages", nargs="*", metavar="STAGE", help=f"of {', '.join(STAGES)} (default: all)")
    add("--lerobot-python", type=Path, required=True, help="the interpreter of an environment with lerobot 0.4.4")
    common.add_options(parser)
    add(
        "--lerobot-workers", type=int, default=4, help="lerobot-train's loader processes (default: 4, as LeRobot's own)"
    )
    add(
        "--lerobot-streaming-encoding", action="store_true",
        help="let LeRobot's writer encode while frames come in, which it does not by default",
    )  # fmt: skip
    options = parser.parse_args(argv)
    options.lerobot_python = options.lerobot_python.absolute()  # not resolved: a venv's python is a link
    for name in options.stages:
        if name not in STAGES:
            near = difflib.get_close_matches(name, STAGES, 1, 0.5) or list(STAGES)
            parser.error(f"no stage {name}; did you mean {', '.join(near)}?")
    return common.run_stages(options, [STAGES[name] for name in options.stages or STAGES])


if __name__ == "__main__":
    sys.exit(main())
