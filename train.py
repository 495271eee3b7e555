"""Train an ACT policy for a UR10e straight from ROS 2 bags.

    python train.py --config config.yaml                                          # one GPU, or the CPU
    torchrun --nproc_per_node=4 train.py --config config.yaml                     # one machine, four GPUs
    torchrun --nnodes=2 --node_rank=R --nproc_per_node=4 --master_addr=HOST --master_port=29500 \
        train.py --config config.yaml                                             # two machines, R = 0 and 1
    python train.py --config config.yaml --override training.lr=5e-5 --override data.bag_dir=my_bags
    python train.py --config config.yaml --resume                                 # go on where it stopped

This file is the story of a run: its settings, its processes, its learning rate, its loop, when it saves and how it
ends. What has a specification of its own stands beside it: rosbag_dataset/ (bags to samples), act_model.py (the
network), lerobot_checkpoint/ (what is written), training/ (everything else). docs/architecture.md is the map.

The output directory gets checkpoint_NNNNNN/ (see lerobot_checkpoint), `last` and `best` links, metrics.jsonl,
sync_report.json (what became of every bag), summary.json and summary.png.
"""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import functools
import gc
import math
import os
import sys
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

if __name__ == "__main__":
    gc.disable()  # until all is imported: see the end

import torch
import torch.distributed as dist
from tqdm import tqdm

import lerobot_checkpoint
from act_model import ACT, ACTConfig, loss_terms, valid_elements
from lerobot_checkpoint import CheckpointError, CheckpointSaver, Normalizer
from rosbag_dataset import (
    CHOICES,
    UR_JOINTS,
    BagSettings,
    ChunkDataset,
    compute_stats,
    data_notes,
    load_episodes,
    settings_from,
)
from training import augment, device, feed, graphs, identity, metrics, run_dir, summary, trackers, validation
from training.averaging import Average
from training.checks import check_settings
from training.errors import ConfigError, Stopped, TrainingError
from training.failures import claim_failure, explain, print_error
from training.init_from import Origin, find_origin
from training.ranks import World, world_of_torchrun
from training.settings import adopt_dataset, finder, read_settings, setting
from training.stopping import StopSignal

EXIT_STOPPED = 75  # EX_TEMPFAIL of sysexits.h: stopped by a signal after saving; run the same again with --resume


# -- the schema: every setting, its default (written only once), its unit and its bounds --------------------------
# The sections augmentation, wandb and mlflow stand beside what they are for: training/augment.py, training/trackers.py.


@dataclass
class DataConfig:
    bag_dir: str = setting("../rosbag-to-lerobot/local_bags", "folder searched recursively for ROS 2 bags", path=True)
    lerobot_dataset: str | None = setting(None, "folder of a LeRobot v3.0 dataset, instead of bag_dir", path=True)
    frames: str = setting("auto", "where frames are read", choices=CHOICES["frames"])
    cache_dir: str = setting("outputs/frame-cache", "folder for decoded frames, or where they are", path=True)
    joint_topic: str = setting("/joint_states", "topic of sensor_msgs/msg/JointState")
    camera_topic: str = setting("/camera/color/image_raw", "the one camera's topic, Image or CompressedImage")
    camera_topics: dict[str, str] | None = setting(None, "several cameras, {name: topic}; replaces camera_topic")
    joint_names: list[str] = setting(list(UR_JOINTS), "joints, with which state and action begin, in this order")
    state_topics: dict[str, str] | None = setting(None, "further states, {name: TOPIC:FIELD}, behind the joints")
    observed_only: list[str] = setting([], "names of states that are not in the action")
    state_units: dict[str, str] | None = setting(None, "units of states, {name: unit}; joints are in rad")
    action_source: str = setting("next_state", "what joints' actions are of: next_state, or a topic of commands")
    command_topics: dict[str, str] | None = setting(None, "commands of single states, {name: TOPIC:FIELD}")
    command_max_age_ms: float | None = setting(500.0, "a command that is older is none, ms; null: none gets old")
    fps: float = setting(30.0, "rate of the training frames, Hz", low=0.1)
    max_offset_ms: float = setting(50.0, "a frame needs a sample of every topic this near, ms", low=0.0)
    joint_resample: str = setting("linear", "how joints are put on frames' times", choices=CHOICES["joint_resample"])
    time_source: str = setting("receive", "which clock orders the messages", choices=CHOICES["time_source"])
    image_stats: str = setting("imagenet", "what normalises images", choices=("imagenet", "dataset"))
    ros_distro: str = setting("humble", "whose message definitions decode the bags")
    min_used_share: float = setting(0.5, "a bag is bad if frames cover less of the time it recorded")
    on_bad_bag: str = setting("error", "what a bag that cannot be used does", choices=CHOICES["on_bad_bag"])
    episodes: str = setting("bag", "what separates episodes in a recording", choices=CHOICES["episodes"])
    episode_pause_s: float = setting(2.0, "a pause or rest longer than this separates (gaps, still), s", low=0.1)
    episode_marker_topic: str | None = setting(None, "topic that says start and stop (marker)")
    keep_failures: bool = setting(False, "keep episodes that their sidecar marks as failures (file)")
    trim_still_s: float | None = setting(None, "cut the rest at an episode's start to this, s; null keeps it", low=0.0)
    min_episode_s: float = setting(0.0, "leave out shorter episodes, s", low=0.0)
    frames_on_device: str = setting("auto", "auto: frames live on the GPU when they fit", choices=("auto", "never"))


@dataclass
class ConventionsConfig:
    joint_sign: list[float] = setting([1.0] * 6, "factor of +1 or -1 per joint")
    apply_joint_sign: bool = setting(False, "multiply joint positions by joint_sign")
    wrap_angles: bool = setting(True, "one angle for one pose: wrap revolute joints around their training data")
    image_resize: list[int] | None = setting(None, "[height, width] of the frames, pixels; null keeps the camera's")
    action_mode: str = setting("delta", "what the policy predicts, rad", choices=CHOICES["action_mode"])


@dataclass
class ModelConfig:
    state_dim: int = setting(6, "states in the observation", low=1)
    action_dim: int = setting(6, "states in the action", low=1)
    chunk_size: int = setting(100, "actions predicted at once, frames", low=1)
    n_action_steps: int = setting(100, "actions executed before the next inference, frames", low=1)
    dim_model: int = setting(512, "width of the transformer", low=8)
    n_heads: int = setting(8, "attention heads", low=1)
    dim_feedforward: int = setting(3200, "width of the feed-forward layers", low=1)
    feedforward_activation: str = setting("relu", "activation", choices=("relu", "gelu"))
    n_encoder_layers: int = setting(4, "encoder layers", low=1)
    n_decoder_layers: int = setting(1, "decoder layers (1 as in LeRobot; see README)", low=1)
    pre_norm: bool = setting(False, "normalise before each block instead of after")
    use_vae: bool = setting(True, "train with the style variable of a conditional VAE")
    latent_dim: int = setting(32, "size of the style variable", low=1)
    n_vae_encoder_layers: int = setting(4, "VAE encoder layers", low=1)
    dropout: float = setting(0.1, "dropout probability", low=0.0)
    vision_backbone: str = setting("resnet18", "torchvision ResNet", choices=("resnet18", "resnet34", "resnet50"))
    pretrained_backbone: bool | str = setting(True, "true: ImageNet weights, false: none, or a weights file", path=True)
    replace_final_stride_with_dilation: bool = setting(False, "dilate the backbone's last stage instead of striding")
    temporal_ensemble_coeff: float | None = setting(None, "m of temporal ensembling at inference, 0.01 in the paper")


@dataclass
class TrainingConfig:
    steps: int = setting(5000, "optimizer steps", low=1)
    batch_size: int = setting(4, "samples per GPU and forward pass", low=1)
    accumulate_steps: int = setting(1, "passes whose gradients one step adds up", low=1)
    lr: float = setting(1e-5, "peak learning rate", low=0.0)
    lr_backbone: float = setting(1e-5, "peak learning rate of the image backbone", low=0.0)
    weight_decay: float = setting(1e-4, "AdamW weight decay", low=0.0)
    kl_weight: float = setting(10.0, "weight of the KL term against L1", low=0.0)
    grad_clip_norm: float = setting(10.0, "largest gradient norm", low=1e-12)
    scheduler: str = setting("none", "learning rate over the steps", choices=("none", "cosine"))
    warmup_steps: int = setting(500, "steps of linear warm-up (scheduler: cosine)", low=0)
    min_lr: float = setting(1e-7, "learning rate of both groups at the last step (scheduler: cosine)", low=0.0)
    seed: int = setting(42, "of weights, sample order, dropout and the held-out episodes", low=0)
    num_workers: int = setting(2, "workers per GPU that load batches ahead; 0: the training loop loads them", low=0)
    log_freq: int = setting(50, "steps between lines of metrics.jsonl", low=1)
    save_freq: int = setting(1000, "steps between checkpoints (and validations)", low=1)
    keep_checkpoints: int | None = setting(None, "newest to keep besides last and best; null keeps all", low=1)
    on_save_error: str = setting("stop", "what a checkpoint that cannot be written does", choices=("stop", "continue"))
    output_dir: str = setting("outputs/train-rosbag-act", "where the run goes", path=True)
    val_fraction: float = setting(0.1, "share of whole recordings held out; at least one of five or more", low=0.0)
    hold_out: str = setting("bag", "what is never on both sides of the split", choices=("bag", "episode"))
    device: str = setting("auto", "where to train", choices=("auto", "cuda", "cpu", "mps"))
    precision: str = setting("auto", "of the forward pass; auto: bf16 where fast", choices=("auto", "bf16", "fp32"))
    ddp_compression: str = setting("none", "how gradients travel between GPUs", choices=("none", "bf16"))
    compile: str = setting("auto", "torch.compile or CUDA graph; auto: off", choices=("auto", "true", "graph", "false"))
    resume: str = setting("never", "auto (newest checkpoint), never, or a path", path=True, words=("auto", "never"))
    init_from: str | None = setting(None, "policy with whose weights a new run begins", path=True)
    init_stats: str = setting("new", "statistics of the new data, or that policy's", choices=("new", "keep"))
    init_partial: bool = setting(False, "load what fits of that policy; false: refuse what does not")
    ema_decay: float | None = setting(None, "the policy is a moving average of the weights, 0.999; null: it is not")


@dataclass
class Config:
    """The whole configuration; the sections are the YAML's top-level keys."""

    data: DataConfig = field(default_factory=DataConfig)
    conventions: ConventionsConfig = field(default_factory=ConventionsConfig)
    augmentation: augment.AugmentationConfig = field(default_factory=augment.AugmentationConfig)
    model: ModelConfig = field(default_factory=ModelConfig)
    training: TrainingConfig = field(default_factory=TrainingConfig)
    wandb: trackers.WandbConfig = field(default_factory=trackers.WandbConfig)
    mlflow: trackers.MlflowConfig = field(default_factory=trackers.MlflowConfig)

    @property
    def cameras(self) -> dict[str, str]:
        """{camera name: topic}, in the model's order; data.camera_topic alone is the camera called "color"."""
        return self.data.camera_topics or {"color": self.data.camera_topic}


def load_config(path: Path, overrides: Sequence[str] = ()) -> Config:
    """Read a config file and apply `key=value` overrides, as given to --override; both may leave out what they like.

    Raises:
        ConfigError: a file, a key or a value that cannot be used; one line, naming it.
    """
    cfg = read_settings(Config(), path, overrides)
    adopt_dataset(cfg)
    check_settings(cfg)
    return cfg


def bag_settings(cfg: Config) -> BagSettings:
    """The part of the configuration that turns bags into samples."""
    values = dataclasses.asdict(cfg.data) | dataclasses.asdict(cfg.conventions)
    return settings_from(values | {"bag_dir": Path(cfg.data.bag_dir), "cache_dir": Path(cfg.data.cache_dir)})


def act_config(cfg: Config) -> ACTConfig:
    """The part of the configuration that shapes the network."""
    names = {f.name for f in dataclasses.fields(ACTConfig)} - {"cameras"}
    return ACTConfig(cameras=tuple(cfg.cameras), **{n: getattr(cfg.model, n) for n in names})


# -- where to run: one process, or one of several under torchrun --------------------------------------------------


def detect_ddp() -> World:
    """This process's place: DDP when RANK is set, as torchrun does; one process otherwise. Raises ConfigError."""
    if "RANK" not in os.environ:
        return World(rank=0, local_rank=0, size=1, node=0, nodes=1)
    return world_of_torchrun()


def join_ddp(world: World, wanted: str) -> None:
    """Choose this rank's device and, under torchrun, join the process group (NCCL on CUDA, gloo elsewhere).

    `world` gets its device; `wanted` is training.device. Raises ConfigError if that is not there.
    """
    world.device = device.choose(wanted, world.local_rank, under_torchrun=world.store is not None)
    if world.device.type == "cuda":
        torch.cuda.set_device(world.local_rank)
    if world.store is not None:
        backend = "nccl" if world.device.type == "cuda" else "gloo"
        dist.init_process_group(backend, store=world.store, rank=world.rank, world_size=world.size)


# -- learning rate ------------------------------------------------------------------------------------------------


def lr_factor(step: int, training: TrainingConfig, peak_lr: float) -> float:
    """What multiplies a group's peak learning rate in (0-based) step `step`.

    cosine: a line from 1/warmup_steps to 1 over the warm-up, then half a cosine from 1 down to min_lr/peak_lr, reached
    in the last step (SGDR, Loshchilov & Hutter 2017, eq. 5, one cycle). A group whose peak is below min_lr stays there.
    """
    if training.scheduler == "none":
        return 1.0
    if step < training.warmup_steps:
        return (step + 1) / training.warmup_steps
    progress = (step - training.warmup_steps) / max(1, training.steps - 1 - training.warmup_steps)
    floor = min(1.0, training.min_lr / peak_lr) if peak_lr else 1.0
    return floor + (1 - floor) * 0.5 * (1 + math.cos(math.pi * min(1.0, progress)))


def learning_rates(step: int, training: TrainingConfig) -> list[float]:
    """The learning rates in (0-based) step `step`, of the optimizer's groups in their order: the backbone's is last."""
    return [peak * lr_factor(step, training, peak) for peak in (training.lr, training.lr_backbone)]


# -- Weights & Biases ---------------------------------------------------------------------------------------------


def _init_wandb(cfg: Config, output_dir: Path, is_main: bool, run_id: str | None) -> Any:
    """A wandb run on rank 0 when wandb.enabled, an object that does nothing otherwise; wandb is imported only then.

    `run_id` continues an earlier run. Curves are drawn against `step`, ours, so that a resumed run overlaps rightly.

    Raises:
        ConfigError: the package is missing, or wandb cannot start.
    """
    if not (cfg.wandb.enabled and is_main):
        return trackers.NoTracker()
    wandb = trackers.import_wandb()
    try:
        run = wandb.init(
            project=cfg.wandb.project, name=cfg.wandb.run_name, tags=cfg.wandb.tags, config=dataclasses.asdict(cfg),
            dir=str(output_dir), id=run_id, resume="allow",
        )  # fmt: skip
    except wandb.errors.Error as error:
        reason = " ".join(str(error).split())[:150]
        raise ConfigError(f"wandb.enabled: wandb cannot start ({reason}); log in, or set WANDB_MODE=offline") from None
    run.define_metric("*", step_metric="step")
    return run


# -- the run ------------------------------------------------------------------------------------------------------


class Trainer:
    """A run, on one rank: bags to samples, the model, the loop, the checkpoints.

    Raises (everywhere): BagError, ConfigError, CheckpointError, TrainingError, Stopped; one line each.
    """

    def __init__(self, cfg: Config, world: World, stop: StopSignal, overwrite: bool) -> None:
        self.cfg, self.world, self.stop = cfg, world, stop
        self.settings = dataclasses.asdict(cfg)
        self.say = print if world.is_main else (lambda *values, **options: None)
        self.precision = world.share(device.choose_precision(cfg.training.precision, world.device))  # one for all nodes
        self.rounding = identity.rounding_conditions(self.settings, world, self.precision)
        self.output_dir = Path(cfg.training.output_dir)
        opened = run_dir.open_output(self.output_dir, cfg.training.resume, overwrite) if world.is_main else None
        resume_from: Path | None = world.share(opened)
        device.allow_tf32()
        device.keep_freed_memory()
        # What can be refused at once is, before an hour of decoding.
        if world.is_main:
            trackers.check_installed(cfg.wandb, cfg.mlflow)
        device.check_compiler(cfg.training.compile, world.device)
        graphs.check(cfg.training.compile, world)
        state = lerobot_checkpoint.load_training_state(resume_from) if world.is_main and resume_from else None
        settings = cfg, act_config(cfg), bag_settings(cfg)
        self.origin: Origin = world.share(find_origin(*settings, resume_from, state) if world.is_main else None)
        self._prepare_data(was=world.share(state and state["fingerprint"]))
        self._build_model()
        self.tracker_ids: dict[str, str | None] = {}
        self.validation_due: Path | None = None  # a checkpoint made by a stop that left no time to validate
        self.step, self.samples_seen = 0, 0
        # loss, L1, KL, gradient norm summed since the last line of metrics.jsonl, and the number of steps
        self.window = torch.zeros(5, device=world.device)
        if resume_from is not None:
            self._resume(resume_from, state)
        if world.is_main:
            path, on_error = self.output_dir / metrics.METRICS, cfg.training.on_save_error
            self.journal = metrics.Journal(path, self.step, on_error, self.say)
        self.saver = CheckpointSaver()
        world.before_death = lambda: self.saver.settle(timeout_s=20)  # torchrun ends what is left after 30 s

    # Data.

    def _prepare_data(self, was: dict[str, Any] | None) -> None:
        """Bags to episodes (once per node), samples, statistics; split as in `was`, a resumed run's fingerprint."""
        cfg, world, bags = self.cfg, self.world, bag_settings(self.cfg)
        self.say(f"reading bags in {bags.bag_dir}", flush=True)
        reference_rad, notes = world.first_on_each_node(lambda: self._read_bags(bags, was), "decoding bags")
        split = self.train_episodes, self.held_out
        self.dataset = ChunkDataset(self.train_episodes, cfg.model.chunk_size)
        self.frames = self._frames_on_device()
        self.held_out_dataset = ChunkDataset(self.held_out, cfg.model.chunk_size)
        self.fingerprint = identity.fingerprint(was, self.settings, act_config(cfg), cfg.cameras, reference_rad, *split)
        # Once, at the start: it hashes the code that runs.
        self.contract = identity.robot_contract(self.settings, bags, reference_rad, *split) | self.origin.recorded
        identity.check_same_on_all_ranks(self.fingerprint, world)
        if world.is_main:
            summary.report_sync(self.output_dir, self.episodes, self.skipped, self.held_out)
            for line in [*notes, *data_notes(self.episodes, cfg.model.chunk_size, bags)]:
                print(f"note: {line}")

    def _read_bags(self, bags: BagSettings, was: dict[str, Any] | None) -> tuple[list[float], list[str]]:
        """What takes long once: the cache keeps it for this node's other ranks. -> (angle references, notes)."""
        find = finder(self.cfg.data.lerobot_dataset)
        self.episodes, self.skipped = load_episodes(bags, progress=self.world.local_rank == 0, find=find)
        split = self.train_episodes, self.held_out = identity.split(self.episodes, self.cfg.training, was)
        reference_rad = identity.angle_reference(*split, bags, was, self.origin.angle_reference_rad)
        measured = compute_stats(self.train_episodes, self.cfg.data.image_stats, self.cfg.model.chunk_size)
        self.stats, notes = self.origin.on_data(*measured, *split, bags)
        return reference_rad, notes

    def _frames_on_device(self) -> feed.DeviceFrames | None:
        if self.cfg.data.frames_on_device == "never":
            return None
        return feed.frames_on_device(self.dataset, self.world.device, self.say)

    # Model and optimizer.

    def _build_model(self) -> None:
        """The network with the weights that the run begins with, on the device, with its optimizer and schedule."""
        cfg, world, training = self.cfg, self.world, self.cfg.training
        torch.manual_seed(training.seed)  # the same weights on every rank; DDP would also copy rank 0's
        self.act = act_config(cfg)
        self.model = ACT(self.act)
        self.origin.load_into(self.model, cfg.model.pretrained_backbone)
        # The convolutions get their images channels last (that is how pixels are stored), and so their weights.
        self.model.to(world.device, memory_format=torch.channels_last)  # ty: ignore[no-matching-overload] - stubs
        self.average = Average(self.model, training.ema_decay)
        self.normalizer = Normalizer(self.stats).to(world.device)
        groups = [
            {"params": self.model.other_parameters(), "lr": training.lr},
            {"params": self.model.backbone_parameters(), "lr": training.lr_backbone},
        ]
        # Any: torch does not declare its attribute found_inf
        self.optimizer: Any = torch.optim.AdamW(groups, weight_decay=training.weight_decay, fused=True)
        # The fused optimizer leaves the weights alone in a step in which this is 1 (it was made for AMP's scaler).
        self.optimizer.found_inf = torch.zeros((), device=world.device)
        self.asked = torch.zeros((), device=world.device)  # 1 when this rank was asked to stop

    def _state(self, validation_due: bool) -> dict[str, Any]:
        """What _resume takes up, on this machine or another."""
        return {
            "step": self.step, "samples_seen": self.samples_seen, "validation_due": validation_due,
            "schedule": identity.learning_settings(self.settings), "fingerprint": self.fingerprint,
            "environment": self.rounding, "window": self.window, "optimizer": self.optimizer.state_dict(),
            **self.trackers.ids, **self.origin.recorded, **self.average.state(),
        }  # fmt: skip

    def _resume(self, checkpoint: Path, state: Any) -> None:
        """Take up where a checkpoint stopped. Rank 0 has read its state and shares it: not all nodes have the disk."""
        if self.world.is_main:
            identity.check_unchanged(state["fingerprint"], self.fingerprint, self.episodes, checkpoint)
            state["model"] = lerobot_checkpoint.load_policy(checkpoint).model.state_dict()
            run_dir.score_old_best(self.output_dir, state)
        state = self.world.share(state)
        self.model.load_state_dict(state["model"])
        self.average.resume(state)
        # What Adam remembers of the gradients; the learning rates and the weight decay are the config's.
        self.optimizer.load_state_dict(self.optimizer.state_dict() | {"state": state["optimizer"]["state"]})
        self.window.copy_(state["window"])
        self.step, self.samples_seen = state["step"], state["samples_seen"]
        self.tracker_ids = {name: state.get(name) for name in ("wandb_id", "mlflow_id")}
        self.validation_due = checkpoint if state["validation_due"] else None
        if changed := identity.differences(state["schedule"], identity.learning_settings(self.settings)):
            self.say(f"note: from here on with other settings: {'; '.join(changed)}")
        self.say(f"resuming from {checkpoint} at step {self.step}")
        if changed := identity.differences(identity.BEFORE_PARTS | state["environment"], self.rounding):
            self.say(f"note: from here on not bit for bit what an unbroken run gives: {'; '.join(changed)}")

    # The loop.

    def start(self) -> Iterable[dict[str, torch.Tensor]]:
        """Make ready for train_step: say what will be trained, compile, wrap; -> the loader of raw batches."""
        world, training = self.world, self.cfg.training
        self.effective_batch = training.batch_size * training.accumulate_steps * world.size
        self.parameters = sum(p.numel() for p in self.model.parameters())
        if world.is_main:
            where = device.describe(world.device, self.precision, training.compile == "true")
            summary.print_opening(
                f"{self.parameters / 1e6:.1f} M parameters on {where}", training, self.effective_batch, self.step,
                len(self.dataset), len(self.train_episodes), self.held_out,
            )  # fmt: skip
        if training.compile == "true":
            self.model.compile()
        step = self._step_on_device
        self.step_on_device = graphs.launched_once(step, self.optimizer, world, training.compile, self.say)
        self.ddp = world.parallel(self.model, training.ddp_compression)
        self.stream = feed.SampleStream(
            len(self.dataset), self.effective_batch // world.size, world.rank, world.size, training.seed,
            self.samples_seen, identity.sample_order(self.fingerprint),
        )  # fmt: skip
        self.model.train()
        return feed.make_loader(self.dataset, self.stream, training.num_workers, world.device, self.frames)

    def fit(self) -> None:
        """Train to training.steps, logging, validating and saving on the way; then the summary."""
        world, training = self.world, self.cfg.training
        loader = self.start()
        wandb_run = _init_wandb(self.cfg, self.output_dir, world.is_main, self.tracker_ids.get("wandb_id"))
        facts = identity.facts(self.contract, self.fingerprint)
        self.trackers = trackers.Trackers(wandb_run, trackers.start_mlflow(
            self.cfg.mlflow, self.output_dir, world.is_main, self.tracker_ids.get("mlflow_id"), self.step,
            self.settings, facts,
        ))  # fmt: skip
        self.bar = tqdm(
            total=training.steps, initial=self.step, desc="training", unit="step", disable=not world.is_main,
            mininterval=0.5 if sys.stderr.isatty() else 10.0,
        )  # fmt: skip
        self.late = device.LateRead(world.device)
        self.pace = metrics.Pace()
        self.stop.interrupts = False
        batches, exit_code = iter(loader), 1
        try:
            with contextlib.closing(self.bar):  # last: a worker that was killed can raise while others are closed
                try:
                    if self.validation_due is not None:
                        score = self._validate()
                        if world.is_main:
                            run_dir.score_late(self.output_dir, self.validation_due, score)
                    self._loop(batches)
                finally:
                    feed.end_loader(batches)
            world.barrier()
            world.close()  # the others need not wait for the summary
            if world.is_main:
                self._summarise()
            exit_code = 0
        except Stopped:
            exit_code = EXIT_STOPPED
            raise
        finally:
            self.trackers.finish(exit_code)

    def _loop(self, batches: Iterator[dict[str, torch.Tensor]]) -> None:
        training = self.cfg.training
        self.pace.restart(self.step)
        while self.step < training.steps:
            with self.pace.waiting():
                raw = next(batches)
            batch = self.prepare(raw)
            if self.step == 0:
                self.trackers.log_camera_views(batch, self.normalizer)
            flags = self.train_step(batch)
            self.bar.update()
            self.saver.check()
            last = self.step == training.steps
            saving, logging = self.step % training.save_freq == 0, self.step % training.log_freq == 0
            # Flags of the step before this one, which the device has long finished; the present one's only where
            # the host reads from the device anyway.
            stopping = self._heed(self.late.push(self.step, flags))
            if last or stopping or logging or saving:
                stopping |= self._heed(self.late.flush())
            if last or logging:
                self._log()
            if last or stopping or saving:
                self._save(validate=last or not stopping)
            if stopping and not last:
                self._wait_for_save()
                raise Stopped(f"{self.stop.name or 'another rank'} at step {self.step}; saved, continue with --resume")
        self._wait_for_save()

    def prepare(self, raw: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        """The loader's batch for the coming step, on the device, augmented if asked, normalised."""
        batch = feed.to_device(raw, self.world.device)
        if self.frames is not None:
            batch = self.frames.look_up(batch)
        # A seed of its own: dropout and the latent draw the same noise with augmentation and without.
        seed = feed.step_seed(self.cfg.training.seed, self.step, self.world.rank, "augmentation")
        amounts = augment.draw_for(self.cfg.augmentation, len(self.cfg.cameras), len(raw["index"]), seed)
        return feed.to_model(batch, self.normalizer, amounts)

    def train_step(self, batch: dict[str, torch.Tensor]) -> torch.Tensor:
        """One optimizer step; -> (2,) on the device: how many ranks were asked to stop, is something not finite."""
        rates = learning_rates(self.step, self.cfg.training)
        for group, lr in zip(self.optimizer.param_groups, rates, strict=True):
            group["lr"] = lr
        self.lr = rates[0]
        # Dropout and the VAE's noise depend on seed, step and rank alone, so that no generator state needs saving.
        torch.manual_seed(feed.step_seed(self.cfg.training.seed, self.step, self.world.rank))
        self.asked.fill_(bool(self.stop.name))
        flags = self.step_on_device(batch)
        self.step += 1
        self.average.update(self.step)
        self.samples_seen += self.effective_batch
        return flags

    def _step_on_device(self, batch: dict[str, torch.Tensor]) -> torch.Tensor:
        """What a CUDA graph repeats: nothing in here reads from the device, and what outlasts it stays in its place."""
        training, world = self.cfg.training, self.world
        # Averages are over the *global* batch: sums over all ranks, then one division (a mean of the ranks' means
        # would weigh their samples differently). How much is valid is known before, and added up during the forward.
        valid = valid_elements(batch["action"], batch["action_is_pad"])
        counts = world.begin_sum(torch.stack([valid.float(), self.asked]))
        self.optimizer.zero_grad(set_to_none=True)
        terms = []
        parts = feed.divide(batch, training.accumulate_steps)
        for i, part in enumerate(parts, 1):
            with world.exchanging(self.ddp, i == len(parts)):
                with torch.autocast(world.device.type, self.precision, enabled=self.precision != torch.float32):
                    prediction, (mu, log_sigma_x2) = self.ddp(part)
                l1_sum, _, kl_sum = loss_terms(prediction, part["action"], part["action_is_pad"], mu, log_sigma_x2)
                n_valid, asked = counts()
                # DDP averages gradients over the ranks, hence the factor world.size.
                loss = world.size * (l1_sum / n_valid + training.kl_weight * kl_sum / self.effective_batch)
                loss.backward()
            terms.append(torch.stack([l1_sum.detach(), kl_sum.detach()]))
        l1_all, kl_all = world.sum(functools.reduce(torch.add, terms))
        l1_loss, kl_loss = l1_all / n_valid, kl_all / self.effective_batch
        grad_norm = torch.nn.utils.clip_grad_norm_(self.model.parameters(), training.grad_clip_norm)
        # Decided on the device, and for good: not one step is taken on or after a loss or gradient that is not
        # finite. The sums and the reduced gradients are the same on all ranks, and so is the decision.
        self.optimizer.found_inf.masked_fill_(~torch.isfinite(l1_loss + kl_loss + grad_norm), 1.0)
        self.optimizer.step()
        total = l1_loss + training.kl_weight * kl_loss
        self.window += torch.stack([total, l1_loss, kl_loss, grad_norm, torch.ones_like(total)])
        return torch.stack([asked, self.optimizer.found_inf])

    def _heed(self, read: tuple[int, list[float]] | None) -> bool:
        """-> whether any rank was asked to stop. Raises TrainingError if that step was not finite."""
        if read is None:
            return False
        step, (asked, bad) = read
        if not bad:
            return asked > 0
        self.world.leave_to_main()
        first = self.samples_seen - (self.step - step + 1) * self.effective_batch
        batch = feed.name_samples(self.dataset, self.stream, first, self.effective_batch)
        with contextlib.suppress(CheckpointError):  # a save that fails now is not what stops the run
            self.saver.wait()
        good = lerobot_checkpoint.newest_checkpoint(self.output_dir)
        raise TrainingError(
            f"step {step}: the loss or its gradient is not finite, the weights were not touched; the batch: {batch}; "
            f"last good checkpoint: {good or 'none'}; look at these frames, or lower training.lr"
        )

    # Logging, validating, saving.

    def _log(self) -> None:
        """One line of metrics.jsonl, averaged over the steps since the last one. The host waits for the device here."""
        loss, l1_loss, kl_loss, grad_norm, _ = (self.window / self.window[4]).tolist()
        steps_per_s, wall_steps_per_s, waiting = self.pace.read(self.step)
        samples_per_s, wall = steps_per_s * self.effective_batch, wall_steps_per_s * self.effective_batch
        self._append({
            "step": self.step, "loss": loss, "l1_loss": l1_loss, "kl_loss": kl_loss, "lr": self.lr,
            "grad_norm": grad_norm, "samples_per_s": round(samples_per_s, 2), "samples_per_s_wall": round(wall, 2),
            "data_wait_fraction": round(waiting, 4), "effective_batch": self.effective_batch,
        })  # fmt: skip
        self.bar.set_postfix_str(f"loss {loss:.3f}, {samples_per_s:.1f} samples/s", refresh=False)
        self.window.zero_()
        self.pace.restart(self.step)

    def _append(self, line: dict[str, Any]) -> None:
        """Rank 0 logs a line, to metrics.jsonl and to the trackers."""
        if self.world.is_main:
            self.journal.append(line)
            self.trackers.log(line)

    def _validate(self) -> float | None:
        """Score the policy on held-out samples, shared among the ranks: lower is better, None if there are none."""
        if not len(self.held_out_dataset):
            return None
        policy, batch_size = self.average.policy, self.cfg.training.batch_size
        val_l1, samples = validation.score(policy, self.normalizer, self.held_out_dataset, batch_size, self.world)
        self._append({"step": self.step, "val_l1_loss": val_l1, "val_samples": samples})
        return val_l1

    def _save(self, validate: bool) -> None:
        """Validate (not when stopping: there is no time) and hand a checkpoint to the background saver."""
        training = self.cfg.training
        with self.pace.paused():
            score = self._validate() if validate else None
            if not self.world.is_main:
                return
            self.saver.submit(
                self.output_dir, self.step, keep=training.keep_checkpoints, on_error=training.on_save_error,
                model_state=self.average.policy.state_dict(), act_config=self.act, stats=self.stats,
                image_shapes=self.episodes[0].image_shape,
                policy_fields=identity.policy_fields(self.settings),
                train_config=self.contract,
                # The resumed run makes up for a validation that a stop left out.
                training_state=self._state(validation_due=not validate and self.step % training.save_freq == 0),
                score=score, total_steps=training.steps,
            )  # fmt: skip

    def _wait_for_save(self) -> None:
        self.saver.wait()
        self.world.barrier()

    def _summarise(self) -> None:
        """The end of the run for people: what the policy does on a few held-out episodes, and where everything is."""
        summary.finish(
            self.output_dir, self.train_episodes, self.held_out,
            predict=functools.partial(validation.predict, self.average.policy, self.normalizer, self.world.device),
            chunk_size=self.cfg.model.chunk_size, action_mean=self.stats["action"]["mean"], contract=self.contract,
            trained=f"ACT, {self.parameters / 1e6:.1f} M parameters, {self.step} steps, effective batch "
            f"{self.effective_batch}, on {self.world.device}",
            skipped=self.skipped, stop_request=lambda: self.stop.name,
        )  # fmt: skip


# -- the command --------------------------------------------------------------------------------------------------


def main(argv: Sequence[str] | None = None) -> int:
    """Entry of `python train.py`. Exit code 0: complete; 1: failed, with one line; 75: stopped by a signal, saved."""
    parser = argparse.ArgumentParser(description="Train ACT from ROS 2 bags. Every setting: see config.yaml.")
    parser.add_argument("--config", type=Path, required=True, help="YAML file with what differs from the defaults")
    parser.add_argument("--override", action="append", default=[], metavar="KEY=VALUE", help="set one key; repeatable")
    parser.add_argument("--resume", action="store_true", help="short for training.resume=auto: go on, or start")
    parser.add_argument("--overwrite", action="store_true", help="replace the run that is there; not on a restart")
    args = parser.parse_args(argv)
    stop = StopSignal()
    world = cfg = None
    try:
        try:
            world = detect_ddp()
            cfg = load_config(args.config, args.override)
            if args.resume and args.overwrite:
                raise ConfigError("--resume and --overwrite: choose one")
            if args.resume and cfg.training.resume == "never":
                cfg.training.resume = "auto"
            if args.overwrite and cfg.training.resume != "never":
                raise ConfigError(f"training.resume: found {cfg.training.resume}, expected never with --overwrite")
            join_ddp(world, cfg.training.device)
            Trainer(cfg, world, stop, args.overwrite).fit()
            return 0
        except Exception:
            if early := stop.early():  # raised in the middle of C code, Stopped can come out as another exception
                raise early from None
            stop.interrupts = False  # a signal from here on must not raise in the middle of saying what is wrong
            raise
    except Stopped as stopped:
        if world is None or world.is_main:
            print(f"stopped by {stopped}", file=sys.stderr, flush=True)
            if cfg is not None:
                run_dir.mark_stopped(Path(cfg.training.output_dir), EXIT_STOPPED, str(stopped))
        if world is not None:
            world.leave_stopped(together=not stop.interrupts)
        return EXIT_STOPPED
    except Exception as error:
        line = explain(error, world)
        if line is None:  # nobody foresaw it: its traceback is due, and the other ranks need not wait for this one
            claim_failure(world)
            raise
        print_error(line, world)
        return 1
    finally:
        if world is not None:
            world.close()
        stop.restore()


if __name__ == "__main__":
    # The half a million objects that PyTorch's modules are stay: to look through them is a quarter of the start.
    gc.freeze()
    gc.enable()
    sys.exit(main())
