"""Train an ACT policy for a UR10e straight from ROS 2 bags.

    python train.py --config config.yaml                                          # one GPU, or the CPU
    torchrun --nproc_per_node=4 train.py --config config.yaml                     # one machine, four GPUs
    torchrun --nnodes=2 --node_rank=R --nproc_per_node=4 --master_addr=HOST --master_port=29500 \
        train.py --config config.yaml                                             # two machines, R = 0 and 1
    python train.py --config config.yaml --override training.lr=5e-5 --override data.bag_dir=my_bags
    python train.py --config config.yaml --resume                                 # go on where it stopped

Every setting, its unit and its default is in the schema below; config.yaml shows them all. A relative path in a
config is relative to the config's folder, a relative path on the command line to the working directory.

The output directory gets checkpoint_NNNNNN/ (see lerobot_checkpoint/), `last` and `best` links, metrics.jsonl,
sync_report.json (what became of every bag), summary.json and summary.png.
"""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import difflib
import errno
import fcntl
import hashlib
import importlib.util
import json
import math
import os
import platform
import re
import shutil
import signal
import sys
import threading
import time
import warnings
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torchvision
import yaml
from torch.nn.parallel import DistributedDataParallel
from torch.utils.data import DataLoader, Sampler
from tqdm import tqdm

import augment
import lerobot_checkpoint
import run_summary
from act_model import ACT, ACTConfig, loss_terms
from lerobot_checkpoint import CheckpointError, CheckpointSaver, Normalizer
from rosbag_dataset import (
    RESIZE_INTERPOLATION,
    UR_JOINTS,
    BagError,
    BagSettings,
    ChunkDataset,
    Episode,
    compute_stats,
    load_episodes,
    open_pixels,
    settings_from,
    split_episodes,
    sync_table,
)

VERSION = "0.1.0"
VALIDATION_SAMPLES = 512  # held-out samples per validation, evenly spaced over the held-out episodes
SUMMARY_EPISODES = 5  # held-out episodes that the summary predicts on, frame by frame
EXIT_STOPPED = 75  # EX_TEMPFAIL of sysexits.h: stopped by a signal after saving; run the same again with --resume


class ConfigError(Exception):
    """A setting that cannot be used: one line with the file, the key, what was found and what was expected."""


class TrainingError(Exception):
    """Training cannot go on: one line with the step and what to do."""


class Stopped(BaseException):  # not an Exception: raised by a signal, it must pass through every `except Exception`
    """SIGTERM or SIGINT ended the run in an orderly way; the message says where it can go on."""


# -- the schema: every setting, its default (written here only), its unit and its bounds --------------------------


def key(default: Any, doc: str, *, choices: Sequence[str] = (), low: float | None = None, path: bool = False) -> Any:
    """A setting. `choices` bounds text, `low` bounds numbers from below, `path` marks what is resolved as a path."""
    metadata = {"doc": doc, "choices": tuple(choices), "low": low, "path": path}
    if isinstance(default, (list, dict)):
        return field(default_factory=lambda: default.copy(), metadata=metadata)
    return field(default=default, metadata=metadata)


@dataclass
class DataConfig:
    bag_dir: str = key("../rosbag-to-lerobot/local_bags", "folder searched recursively for ROS 2 bags", path=True)
    cache_dir: str = key("outputs/frame-cache", "folder for decoded frames", path=True)
    joint_topic: str = key("/joint_states", "topic of sensor_msgs/msg/JointState")
    camera_topic: str = key("/camera/color/image_raw", "the one camera's topic, Image or CompressedImage")
    camera_topics: dict[str, str] | None = key(None, "several cameras, {name: topic}; replaces camera_topic")
    joint_names: list[str] = key(list(UR_JOINTS), "joints, in the order of state and action")
    fps: float = key(30.0, "rate of the training frames, Hz", low=0.1)
    max_offset_ms: float = key(50.0, "a frame needs a sample of every topic this near, ms", low=0.0)
    joint_resample: str = key("linear", "how joints are put on the frames' times", choices=("linear", "nearest"))
    time_source: str = key("receive", "which clock orders the messages", choices=("receive", "header"))
    image_stats: str = key("imagenet", "what normalises images", choices=("imagenet", "dataset"))
    ros_distro: str = key("humble", "whose message definitions decode the bags")
    on_bad_bag: str = key("error", "what a bag that cannot be used does", choices=("error", "skip"))
    frames_on_device: str = key("auto", "auto: frames live on the GPU when they fit", choices=("auto", "never"))


@dataclass
class ConventionsConfig:
    joint_sign: list[float] = key([1.0] * 6, "factor of +1 or -1 per joint")
    apply_joint_sign: bool = key(False, "multiply joint positions by joint_sign")
    wrap_angles: bool = key(True, "wrap revolute joints to (-pi, pi], and their deltas across the seam")
    image_resize: list[int] | None = key(None, "[height, width] of the frames, pixels; null keeps the camera's")
    action_mode: str = key("delta", "what the policy predicts per frame, rad", choices=("delta", "absolute"))


@dataclass
class AugmentationConfig:
    """Random changes of the training images; never of held-out episodes, nor of anything but images."""

    enabled: bool = key(False, "change training images at random")
    brightness: float = key(0.2, "factor from 1 -/+ this", low=0.0)
    contrast: float = key(0.2, "factor from 1 -/+ this", low=0.0)
    saturation: float = key(0.5, "factor from 1 -/+ this", low=0.0)
    hue: float = key(0.05, "turn of -/+ this part of the colour circle", low=0.0)
    rotate_deg: float = key(5.0, "rotation of -/+ this, degrees", low=0.0)
    translate: float = key(0.05, "shift of -/+ this part of height and width", low=0.0)
    scale: float = key(0.0, "factor from 1 -/+ this", low=0.0)


@dataclass
class ModelConfig:
    state_dim: int = key(6, "joints in the observation", low=1)
    action_dim: int = key(6, "joints in the action", low=1)
    chunk_size: int = key(100, "actions predicted at once, frames", low=1)
    n_action_steps: int = key(100, "actions executed before the next inference, frames", low=1)
    dim_model: int = key(512, "width of the transformer", low=8)
    n_heads: int = key(8, "attention heads", low=1)
    dim_feedforward: int = key(3200, "width of the feed-forward layers", low=1)
    feedforward_activation: str = key("relu", "activation", choices=("relu", "gelu"))
    n_encoder_layers: int = key(4, "encoder layers", low=1)
    n_decoder_layers: int = key(1, "decoder layers (1 as in LeRobot; see README)", low=1)
    pre_norm: bool = key(False, "normalise before each block instead of after")
    use_vae: bool = key(True, "train with the style variable of a conditional VAE")
    latent_dim: int = key(32, "size of the style variable", low=1)
    n_vae_encoder_layers: int = key(4, "VAE encoder layers", low=1)
    dropout: float = key(0.1, "dropout probability", low=0.0)
    vision_backbone: str = key("resnet18", "torchvision ResNet", choices=("resnet18", "resnet34", "resnet50"))
    pretrained_backbone: bool | str = key(True, "true: ImageNet weights, false: none, or a file of weights", path=True)
    replace_final_stride_with_dilation: bool = key(False, "dilate the backbone's last stage instead of striding")
    temporal_ensemble_coeff: float | None = key(None, "m of temporal ensembling at inference, 0.01 in the paper")


@dataclass
class TrainingConfig:
    steps: int = key(5000, "optimizer steps", low=1)
    batch_size: int = key(4, "samples per GPU and step", low=1)
    lr: float = key(1e-5, "peak learning rate", low=0.0)
    lr_backbone: float = key(1e-5, "peak learning rate of the image backbone", low=0.0)
    weight_decay: float = key(1e-4, "AdamW weight decay", low=0.0)
    kl_weight: float = key(10.0, "weight of the KL term against L1", low=0.0)
    grad_clip_norm: float = key(10.0, "largest gradient norm", low=1e-12)
    scheduler: str = key("none", "learning rate over the steps", choices=("none", "cosine"))
    warmup_steps: int = key(500, "steps of linear warm-up (scheduler: cosine)", low=0)
    min_lr: float = key(1e-7, "learning rate at the last step (scheduler: cosine)", low=0.0)
    seed: int = key(42, "of weights, sample order, dropout and the held-out episodes", low=0)
    num_workers: int = key(2, "data loader processes per GPU; 0 loads in the training process", low=0)
    log_freq: int = key(50, "steps between lines of metrics.jsonl", low=1)
    save_freq: int = key(1000, "steps between checkpoints (and validations)", low=1)
    keep_checkpoints: int | None = key(None, "newest checkpoints to keep besides last and best; null keeps all", low=1)
    on_save_error: str = key("stop", "what a checkpoint that cannot be written does", choices=("stop", "continue"))
    output_dir: str = key("outputs/train-rosbag-act", "where the run goes", path=True)
    val_fraction: float = key(0.1, "share of whole episodes held out; at least one of five or more", low=0.0)
    device: str = key("auto", "where to train", choices=("auto", "cuda", "cpu", "mps"))
    precision: str = key("auto", "of the forward pass; auto: bf16 where fast", choices=("auto", "bf16", "fp32"))
    compile: str = key("auto", "torch.compile; auto: off", choices=("auto", "true", "false"))
    resume: str = key("never", "auto: from the newest checkpoint, never, or a checkpoint's path", path=True)


@dataclass
class WandbConfig:
    enabled: bool = key(False, "log to Weights & Biases")
    project: str = key("ur10e-act-train", "project")
    run_name: str | None = key(None, "name of the run; null lets wandb choose")
    tags: list[str] = key([], "tags of the run")


@dataclass
class Config:
    """The whole configuration; the sections are the YAML's top-level keys."""

    data: DataConfig = field(default_factory=DataConfig)
    conventions: ConventionsConfig = field(default_factory=ConventionsConfig)
    augmentation: AugmentationConfig = field(default_factory=AugmentationConfig)
    model: ModelConfig = field(default_factory=ModelConfig)
    training: TrainingConfig = field(default_factory=TrainingConfig)
    wandb: WandbConfig = field(default_factory=WandbConfig)

    @property
    def cameras(self) -> dict[str, str]:
        """{camera name: topic}, in the model's order; data.camera_topic alone is the camera called "color"."""
        return self.data.camera_topics or {"color": self.data.camera_topic}


# -- reading it ---------------------------------------------------------------------------------------------------

KINDS = {
    "None": "null", "bool": "true or false", "int": "a whole number", "float": "a number", "str": "text",
    "list[int]": "a list of whole numbers", "list[float]": "a list of numbers", "list[str]": "a list of texts",
    "dict[str, str]": "a mapping of names to texts",
}  # fmt: skip


class _RawLoader(yaml.BaseLoader):
    """YAML with every scalar as its raw text: the schema decides the type, so that 1e-5 is a number, 001 stays the
    text 001 where text is due, and `yes` is not silently true. A key given twice is refused, not overwritten."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        seen = set()
        for key_node, _ in node.value:
            if key_node.value in seen:
                raise yaml.MarkedYAMLError(
                    problem=f"key {key_node.value!r} given twice", problem_mark=key_node.start_mark
                )
            seen.add(key_node.value)
        return super().construct_mapping(node, deep)


def _parse_yaml(text: str, where: str) -> Any:
    try:
        return yaml.load(text, Loader=_RawLoader)  # noqa: S506 - BaseLoader constructs only texts, lists and mappings
    except yaml.YAMLError as exc:
        mark = getattr(exc, "problem_mark", None)
        line = f" at line {mark.line + 1}, column {mark.column + 1}" if mark else ""
        problem = " ".join(str(getattr(exc, "problem", None) or exc).split())
        hint = "; indent with spaces, not tabs" if "\\t" in problem else ""
        raise ConfigError(f"{where}: not valid YAML{line}: {problem}{hint}") from None


def _convert(raw: Any, kinds: Sequence[str]) -> Any:
    """Raw YAML (text, list, mapping) to the first of the `kinds` that fits; raises ValueError when none does."""
    for kind in sorted(kinds, key=list(KINDS).index):
        if kind.startswith("list[") and isinstance(raw, list):
            return [_convert(item, [kind[5:-1]]) for item in raw]
        if kind.startswith("dict[") and isinstance(raw, dict):
            return {_convert(k, ["str"]): _convert(v, ["str"]) for k, v in raw.items()}
        if not isinstance(raw, str):
            continue
        if kind == "None" and raw.lower() in ("null", "~", ""):
            return None
        if kind == "bool" and raw.lower() in ("true", "false"):
            return raw.lower() == "true"
        if kind == "int" and re.fullmatch(r"[+-]?\d+", raw):
            return int(raw)
        if kind == "float" and re.fullmatch(r"[+-]?(\d+\.?\d*|\.\d+)([eE][+-]?\d+)?", raw):
            return float(raw)
        if kind == "str":
            return raw
    raise ValueError


def _set(cfg: Config, dotted: str, raw: Any, where: str, base: Path) -> None:
    """Set one key from raw YAML; relative paths are resolved against `base`."""
    section_name, _, name = dotted.partition(".")
    section = getattr(cfg, section_name, None) if section_name in _sections() else None
    fields = {f.name: f for f in dataclasses.fields(section)} if section is not None else {}
    if name not in fields:
        known = [f"{s}.{f.name}" for s in _sections() for f in dataclasses.fields(getattr(cfg, s))]
        near = difflib.get_close_matches(dotted, known, 1, 0.5) or [k for k in known if k.endswith(f".{dotted}")]
        raise ConfigError(f"{where}: unknown key {dotted}" + (f"; did you mean {near[0]}?" if near else ""))
    spec = fields[name]
    kinds = str(spec.type).split(" | ")
    doc = spec.metadata["doc"]
    found = repr(raw) if isinstance(raw, str) else f"{'a list' if isinstance(raw, list) else 'a mapping'} {raw}"
    try:
        value = _convert(raw, kinds)
    except ValueError:
        expected = " or ".join(KINDS[k] for k in kinds)
        raise ConfigError(f"{where}: {dotted}: found {found}, expected {expected} ({doc})") from None
    choices, low = spec.metadata["choices"], spec.metadata["low"]
    if choices and value not in choices:
        raise ConfigError(f"{where}: {dotted}: found {found}, expected one of {', '.join(choices)} ({doc})")
    if low is not None and value is not None and not value >= low:
        raise ConfigError(f"{where}: {dotted}: found {found}, expected at least {low:g} ({doc})")
    if spec.metadata["path"] and isinstance(value, str) and value not in ("auto", "never"):
        value = _absolute(value, base)
    setattr(section, name, value)


def _sections() -> list[str]:
    return [f.name for f in dataclasses.fields(Config)]


def _absolute(path: str, base: Path) -> str:
    return os.path.abspath(base / Path(path).expanduser())


def load_config(path: Path, overrides: Sequence[str] = ()) -> Config:
    """Read a config file and apply `key=value` overrides (dot notation, as given to --override).

    Sections and keys that the file leaves out keep their defaults. The type of a value is the schema's.

    Raises:
        ConfigError: unreadable file, not YAML, unknown key, wrong type, value out of bounds; one line, naming it.
    """
    try:
        text = path.read_text()
    except (OSError, UnicodeDecodeError) as exc:
        raise ConfigError(f"{path}: cannot read the config ({getattr(exc, 'strerror', None) or exc})") from None
    content = _parse_yaml(text, str(path)) or {}
    if not isinstance(content, dict):
        raise ConfigError(f"{path}: expected sections ({', '.join(_sections())}), found {content!r:.60}")
    cfg = Config()
    for section_name in _sections():  # defaults are relative to the config's folder, as if they stood in it
        section = getattr(cfg, section_name)
        for spec in dataclasses.fields(section):
            value = getattr(section, spec.name)
            if spec.metadata["path"] and isinstance(value, str) and value not in ("auto", "never"):
                setattr(section, spec.name, _absolute(value, path.parent))
    for section_name, values in content.items():
        if section_name not in _sections():
            near = difflib.get_close_matches(str(section_name), _sections(), 1, 0.5)
            hint = f"; did you mean {near[0]}?" if near else f"; the sections are {', '.join(_sections())}"
            raise ConfigError(f"{path}: unknown key {section_name}{hint}")
        if values in ("", "null", "~"):
            continue
        if not isinstance(values, dict):
            raise ConfigError(f"{path}: {section_name}: found {values!r}, expected a section of keys")
        for name, raw in values.items():
            _set(cfg, f"{section_name}.{name}", raw, str(path), path.parent)
    for override in overrides:
        dotted, equals, text = override.partition("=")
        where = f"--override {override}"
        if not equals:
            raise ConfigError(f"{where}: expected key=value, for example training.lr=5e-5")
        raw = _parse_yaml(text, where) if text.startswith(("[", "{")) else text
        _set(cfg, dotted.strip(), raw, where, Path.cwd())
    _check(cfg)
    return cfg


def _check(cfg: Config) -> None:
    """What no single key can show. Raises ConfigError."""
    data, conv, model, training = cfg.data, cfg.conventions, cfg.model, cfg.training
    joints = len(data.joint_names)

    def require(holds: bool, dotted: str, found: Any, expected: str) -> None:
        if not holds:
            raise ConfigError(f"{dotted}: found {found}, expected {expected}")

    names, size = data.joint_names, conv.image_resize
    require(joints > 0 and len(set(names)) == joints, "data.joint_names", names, "different names")
    for name in ("state_dim", "action_dim"):
        value = getattr(model, name)
        require(value == joints, f"model.{name}", value, f"{joints}, the number of data.joint_names")
    signs = conv.joint_sign
    require(all(abs(s) == 1 for s in signs), "conventions.joint_sign", signs, "+1 or -1 each")
    one_each = len(signs) == joints or not conv.apply_joint_sign
    require(one_each, "conventions.joint_sign", signs, f"{joints} signs, one per data.joint_names")
    pixels = size is None or (len(size) == 2 and min(size) >= 32)
    require(pixels, "conventions.image_resize", size, "[height, width] of at least 32 pixels each")
    cameras = cfg.cameras
    plain = all(re.fullmatch(r"\w+", name) for name in cameras)
    require(plain, "data.camera_topics", list(cameras), "names of letters, digits and underscores")
    require(len(set(cameras.values())) == len(cameras), "data.camera_topics", cameras, "a topic of its own per camera")
    at_most = f"at most model.chunk_size {model.chunk_size}"
    require(model.n_action_steps <= model.chunk_size, "model.n_action_steps", model.n_action_steps, at_most)
    every_step = model.temporal_ensemble_coeff is None or model.n_action_steps == 1
    require(every_step, "model.n_action_steps", model.n_action_steps, "1 with model.temporal_ensemble_coeff")
    require(model.dropout < 1, "model.dropout", model.dropout, "below 1")
    divides = model.dim_model % model.n_heads == 0 and model.dim_model % 4 == 0
    require(divides, "model.dim_model", model.dim_model, f"a multiple of 4 and of model.n_heads {model.n_heads}")
    require(training.lr > 0, "training.lr", training.lr, "above 0")
    require(training.val_fraction < 1, "training.val_fraction", training.val_fraction, "below 1")
    if training.scheduler == "cosine":
        require(
            training.min_lr <= training.lr, "training.min_lr", training.min_lr, f"at most training.lr {training.lr}"
        )
        fewer = training.warmup_steps < training.steps
        require(fewer, "training.warmup_steps", training.warmup_steps, f"fewer than training.steps {training.steps}")


def bag_settings(cfg: Config) -> BagSettings:
    """The part of the configuration that turns bags into samples."""
    values = dataclasses.asdict(cfg.data) | dataclasses.asdict(cfg.conventions)
    return settings_from(values | {"bag_dir": Path(cfg.data.bag_dir), "cache_dir": Path(cfg.data.cache_dir)})


def act_config(cfg: Config) -> ACTConfig:
    """The part of the configuration that shapes the network."""
    names = {f.name for f in dataclasses.fields(ACTConfig)} - {"cameras"}
    return ACTConfig(cameras=tuple(cfg.cameras), **{n: getattr(cfg.model, n) for n in names})


# -- where to run: one process, or one of several under torchrun --------------------------------------------------


class World:
    """This process among those that train together; rank 0 alone logs and writes.

    Under torchrun the ranks share a key-value store. It carries what collectives should not: waiting for a long
    conversion (a collective would time out), and the news that a rank failed (a collective would hang on it).
    """

    def __init__(self) -> None:
        """DDP when RANK is set, as torchrun does; one process otherwise.

        Raises:
            ConfigError: RANK without the other variables that torchrun sets.
        """
        alone = dict(RANK=0, LOCAL_RANK=0, WORLD_SIZE=1, GROUP_RANK=0, GROUP_WORLD_SIZE=1)
        missing = [name for name in (*alone, "MASTER_ADDR", "MASTER_PORT") if name not in os.environ]
        if "RANK" in os.environ and missing:
            raise ConfigError(f"RANK is set, but {', '.join(missing)} not; start several processes through torchrun")
        numbers = (int(os.environ.get(name, default)) for name, default in alone.items())
        self.rank, self.local_rank, self.size, self.node, self.nodes = numbers
        self.is_main = self.rank == 0
        self.device = torch.device("cpu")
        self._store = self._connect(serve=self.is_main) if "RANK" in os.environ else None
        self.before_death: Callable[[], object] = lambda: None  # what must not be cut off when another rank fails
        self._finished = threading.Event()
        if self._store is not None:
            threading.Thread(target=self._watch, name="watch-failures", daemon=True).start()

    def _connect(self, serve: bool) -> dist.Store:
        """The ranks' store, with keys of their own in each round: torchrun keeps one store over its restarts, and the
        first round's keys in it make the second round's rendezvous hang."""
        agent_serves = os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True"
        address, port = os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"])
        store = dist.TCPStore(address, port, is_master=serve and not agent_serves, wait_for_workers=False)
        return dist.PrefixStore(f"round{os.environ.get('TORCHELASTIC_RESTART_COUNT', 0)}", store)

    def start(self, device: str) -> None:
        """Choose the device and, under torchrun, join the process group (NCCL on CUDA, gloo elsewhere).

        Raises:
            ConfigError: the wanted device is not there.
        """
        has = {"cuda": torch.cuda.is_available(), "mps": torch.backends.mps.is_available(), "cpu": True}
        if device == "auto":
            device = next(d for d in ("cuda", "mps", "cpu") if has[d] and not (self._store and d == "mps"))
        if not has[device]:
            there = ", ".join(d for d in has if has[d])
            raise ConfigError(f"training.device: {device} is not available here; found {there}")
        if device == "cuda":
            gpus = torch.cuda.device_count()
            if self.local_rank >= gpus:
                raise ConfigError(f"rank {self.rank} has no GPU: {gpus} on this machine; lower --nproc_per_node")
            torch.cuda.set_device(self.local_rank)
            self.device = torch.device(device, self.local_rank)
        else:
            self.device = torch.device(device)
        if self._store is not None:
            backend = "nccl" if device == "cuda" else "gloo"
            dist.init_process_group(backend, store=self._store, rank=self.rank, world_size=self.size)

    def sum(self, values: torch.Tensor) -> torch.Tensor:
        """Sum over all ranks, in place."""
        if self.size > 1:
            dist.all_reduce(values)
        return values

    def share(self, value: Any) -> Any:
        """Rank 0's `value`, on every rank."""
        box = [value]
        if self.size > 1:
            dist.broadcast_object_list(box, device=self.device)
        return box[0]

    def gather(self, value: Any) -> list[Any]:
        """Every rank's `value`, on every rank."""
        values = [value]
        if self.size > 1:
            values = [None] * self.size
            dist.all_gather_object(values, value)
        return values

    def barrier(self) -> None:
        if self.size > 1:
            dist.barrier()

    def once_per_node(self, work: Callable[[], Any], what: str) -> Any:
        """Do `work` first on each node's local rank 0, then, when every node has done it, on the other ranks.

        Waiting is polling the store: no collective is open that could time out, however long it takes.
        """
        if self._store is None:
            return work()
        result = work() if self.local_rank == 0 else None
        if self.local_rank == 0:
            self._store.set(f"{what}-{self.node}", "done")
        else:
            print(f"rank {self.rank}: waiting while rank 0 of this node is {what}", flush=True)
        while not self._store.check([f"{what}-{node}" for node in range(self.nodes)]):
            if self._store.check(["stopped"]):
                raise Stopped("another rank before the first step; start again with the same command")
            time.sleep(0.2)
        return result if self.local_rank == 0 else work()

    def tell_stopped(self) -> None:
        """For the ranks that wait, here or on other nodes, for what this one will not do now."""
        if self._store is not None:
            with contextlib.suppress(RuntimeError):  # the store is gone with the node that held it
                self._store.set("stopped", str(self.rank))

    def first_to_fail(self) -> bool:
        """Claim the right to print the run's one error line; also tells the other ranks to end."""
        if self._store is None:
            return True
        try:
            return self._store.compare_set("failed", "", str(self.rank)).decode() == str(self.rank)
        except RuntimeError:  # the store is gone with the node that held it: somebody else has failed
            return False

    def leave_to_main(self) -> None:
        """Every rank has found the same error: rank 0 reports it, and its failing ends this rank."""
        if not self.is_main:
            time.sleep(120)

    def _watch(self) -> None:
        """End this rank when another has failed: it may be inside a collective that would wait for ever."""
        try:
            store = self._connect(serve=False)
            while not self._finished.wait(0.5):
                if store.check(["failed"]) and store.get("failed").decode() != str(self.rank):
                    break
        except RuntimeError:
            pass  # the node that held the store is gone
        if not self._finished.is_set():
            self.before_death()
            os._exit(1)

    def close(self) -> None:
        """Leave the process group; call it on errors too."""
        self._finished.set()
        if dist.is_initialized():
            dist.destroy_process_group()


# -- stopping in good order ---------------------------------------------------------------------------------------


class StopSignal:
    """SIGTERM and SIGINT as a request: finish the step, save, exit with 75. A second signal ends the process at once.

    Before training proper (`saves` False) there is nothing to save, and the first signal raises Stopped.
    """

    def __init__(self) -> None:
        self.name = ""  # of the signal that was received
        self.saves = False
        self._previous = {s: signal.signal(s, self._receive) for s in (signal.SIGTERM, signal.SIGINT)}

    def early(self) -> Stopped | None:
        """What a signal that came before training proper raises."""
        if self.saves or not self.name:
            return None
        return Stopped(f"{self.name} before the first step; start again with the same command")

    def _receive(self, number: int, frame: Any) -> None:
        self.name = signal.Signals(number).name
        for each in self._previous:
            signal.signal(each, signal.SIG_DFL)
        if early := self.early():
            raise early

    def restore(self) -> None:
        """Put the handlers back that were there before."""
        for number, handler in self._previous.items():
            signal.signal(number, handler)


class LateRead:
    """Read a small tensor of each step one step later, so that the host never waits for the device."""

    def __init__(self, device: torch.device) -> None:
        self._cuda = device.type == "cuda"
        self._pending: tuple[int, torch.Tensor, Any] | None = None

    def push(self, step: int, values: torch.Tensor) -> tuple[int, list[float]] | None:
        """Start reading this step's values; -> the previous step and its values."""
        previous = self.flush()
        if self._cuda:
            host = torch.empty(values.shape, dtype=values.dtype, pin_memory=True)
            host.copy_(values, non_blocking=True)
            event = torch.cuda.Event()
            event.record()
            self._pending = (step, host, event)
        else:
            self._pending = (step, values, None)
        return previous

    def flush(self) -> tuple[int, list[float]] | None:
        """What is still to be read, waiting for it."""
        pending, self._pending = self._pending, None
        if pending is None:
            return None
        step, values, event = pending
        if event is not None:
            event.synchronize()
        return step, values.tolist()


# -- the order of samples -----------------------------------------------------------------------------------------


class SampleStream(Sampler[list[int]]):
    """Endless batches of sample indices for one rank; epoch e is a permutation seeded with seed + e.

    The epochs' permutations follow each other without a seam, and every step takes the next `batch_size x
    world_size` samples; rank r takes every world_size-th of them from the r-th on, as DistributedSampler does. So
    there is no last, uneven batch; N ranks with batch b see in each step what one rank sees with batch N*b; and the
    place in the data is one number, whatever the batch and the number of ranks are after a restart.
    """

    def __init__(self, n_samples: int, batch_size: int, rank: int, world_size: int, seed: int, start: int = 0) -> None:
        self.n_samples, self.batch_size, self.rank, self.world_size = n_samples, batch_size, rank, world_size
        self.seed, self.start = seed, start
        self._epoch, self._order = -1, torch.empty(0, dtype=torch.int64)

    def set_epoch(self, epoch: int) -> None:
        """Shuffle for `epoch`; called by the stream itself when it crosses into the next one."""
        if epoch != self._epoch:
            generator = torch.Generator().manual_seed(self.seed + epoch)
            self._epoch, self._order = epoch, torch.randperm(self.n_samples, generator=generator)

    def at(self, position: int) -> int:
        """The sample at a place in the endless stream."""
        self.set_epoch(position // self.n_samples)
        return int(self._order[position % self.n_samples])

    def __iter__(self) -> Iterator[list[int]]:
        first, size = self.start + self.rank, self.batch_size * self.world_size
        while True:
            yield [self.at(position) for position in range(first, first + size, self.world_size)]
            first += size


def step_seed(seed: int, step: int, rank: int, use: str = "") -> int:
    """A generator seed of 63 bits for one step of one rank and one use, unrelated to its neighbours'."""
    return int.from_bytes(hashlib.sha256(f"{seed} {step} {rank} {use}".encode()).digest()[:8], "big") >> 1


def ignore_signals(worker: int) -> None:
    """Loader workers leave Ctrl-C and preemption to the trainer, which needs them for one more step."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, signal.SIG_IGN)


def to_tensors(batch: dict[str, Any]) -> dict[str, torch.Tensor]:
    """The collate function: ChunkDataset already returns whole batches, as NumPy arrays."""
    return {name: torch.from_numpy(array) for name, array in batch.items()}


class DeviceFrames:
    """All decoded frames of some episodes on the device, so that the loader sends indices instead of pixels.

    Episodes follow each other in the order of ChunkDataset(images=False), whose `image_index.<camera>` counts them.
    """

    SHARE = 0.5  # of the GPU's free memory; the rest is for weights, activations and other processes

    @classmethod
    def size_bytes(cls, episodes: Sequence[Episode]) -> int:
        return sum(open_pixels(e, camera).nbytes for e in episodes for camera in e.image_shape)

    def __init__(self, episodes: Sequence[Episode], device: torch.device) -> None:
        self.frames = {}  # camera -> (N, H, W, 3) uint8
        for camera, shape in episodes[0].image_shape.items():
            stored = sum(e.stored_images[camera] for e in episodes)
            self.frames[camera] = torch.empty((stored, *shape, 3), dtype=torch.uint8, device=device)
            first = 0
            for episode in episodes:
                pixels = open_pixels(episode, camera)
                self.frames[camera][first : first + len(pixels)] = torch.from_numpy(pixels.copy())
                first += len(pixels)

    def look_up(self, batch: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        """Replace each image_index.<camera> (B,) by observation.images.<camera> (B, H, W, 3) uint8."""
        batch = dict(batch)
        for camera, frames in self.frames.items():
            batch[f"observation.images.{camera}"] = frames[batch.pop(f"image_index.{camera}")]
        return batch


def to_device(batch: dict[str, torch.Tensor], device: torch.device) -> dict[str, torch.Tensor]:
    """Frames travel as uint8, a quarter of float's bytes, and without waiting when they come from pinned memory."""
    return {name: tensor.to(device, non_blocking=True) for name, tensor in batch.items()}


def to_model(
    batch: dict[str, torch.Tensor], normalizer: Normalizer, amounts: Sequence[dict[str, torch.Tensor]] = ()
) -> dict[str, torch.Tensor]:
    """Make a batch on the device what the network takes: (B, H, W, 3) uint8 -> (B, 3, H, W) float32, normalised.

    `amounts` augments the images: one entry of augment.draw per camera.
    """
    batch = dict(batch)
    cameras = [name for name in batch if name.startswith("observation.images.")]
    for i, name in enumerate(cameras):
        image = batch[name].permute(0, 3, 1, 2).float() / 255
        batch[name] = augment.apply(image, amounts[i]) if amounts else image
    return normalizer.normalize(batch)


# -- how to compute -----------------------------------------------------------------------------------------------


def has_fast_bf16(device: torch.device) -> bool:
    """Whether bfloat16 is computed by instructions of its own, not emulated. CPUs: AVX-512 BF16, AMX.

    Of a CPU, torch up to 2.10 does not say: False then.
    """
    if device.type == "cuda":
        return torch.cuda.is_bf16_supported(including_emulation=False)
    capabilities = getattr(torch.cpu, "get_capabilities", dict)() if device.type == "cpu" else {}
    return bool(capabilities.get("avx512_bf16") or capabilities.get("amx_bf16"))


def choose_precision(wanted: str, device: torch.device) -> torch.dtype:
    """training.precision as a dtype: bfloat16 autocast, or float32 throughout."""
    if wanted == "auto":
        wanted = "bf16" if has_fast_bf16(device) else "fp32"
    return {"bf16": torch.bfloat16, "fp32": torch.float32}[wanted]


def check_compiler(device: torch.device) -> None:
    """torch.compile writes C++ and Triton code and needs their compilers when training starts. Raises ConfigError."""
    compiler = os.environ.get("CXX", "clang++" if sys.platform == "darwin" else "g++")
    if not shutil.which(compiler):
        raise ConfigError(
            f"training.compile: true needs a C++ compiler, and {compiler} is not on the PATH; "
            "install g++, set CXX, or set training.compile to false"
        )
    if device.type == "cuda" and importlib.util.find_spec("triton") is None:
        raise ConfigError(
            "training.compile: true needs the package triton on CUDA; install it, or set training.compile to false"
        )


# -- learning rate ------------------------------------------------------------------------------------------------


def lr_factor(step: int, training: TrainingConfig) -> float:
    """What multiplies both groups' peak learning rates in (0-based) step `step`.

    cosine: a line from 1/warmup_steps to 1 over the warm-up, then half a cosine from 1 down to min_lr/lr, reached in
    the last step (SGDR, Loshchilov & Hutter 2017, eq. 5, one cycle).
    """
    if training.scheduler == "none":
        return 1.0
    if step < training.warmup_steps:
        return (step + 1) / training.warmup_steps
    progress = (step - training.warmup_steps) / max(1, training.steps - 1 - training.warmup_steps)
    floor = training.min_lr / training.lr
    return floor + (1 - floor) * 0.5 * (1 + math.cos(math.pi * min(1.0, progress)))


def _build_scheduler(optimizer: torch.optim.Optimizer, training: TrainingConfig) -> torch.optim.lr_scheduler.LambdaLR:
    return torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: lr_factor(step, training))


# -- Weights & Biases ---------------------------------------------------------------------------------------------


class _NoWandb:
    """Stands in when wandb is off, so that the loop has no ifs."""

    id = None

    def log(self, values: dict[str, Any]) -> None: ...

    def finish(self, exit_code: int = 0) -> None: ...


def import_wandb() -> Any:
    """The package wandb. Raises ConfigError when it is missing."""
    try:
        import wandb
    except ImportError:
        raise ConfigError(
            "wandb.enabled: true, but the package wandb is not installed; "
            "run: pip install wandb, or set wandb.enabled to false"
        ) from None
    return wandb


def _init_wandb(cfg: Config, output_dir: Path, is_main: bool, run_id: str | None) -> Any:
    """A wandb run on rank 0 when wandb.enabled, an object that does nothing otherwise; wandb is imported only then.

    `run_id` continues an earlier run. Curves are drawn against `step`, ours, so that a resumed run overlaps rightly.

    Raises:
        ConfigError: the package is missing, or wandb cannot start.
    """
    if not (cfg.wandb.enabled and is_main):
        return _NoWandb()
    wandb = import_wandb()
    try:
        run = wandb.init(
            project=cfg.wandb.project,
            name=cfg.wandb.run_name,
            tags=cfg.wandb.tags,
            config=dataclasses.asdict(cfg),
            dir=str(output_dir),
            id=run_id,
            resume="allow",
        )
    except wandb.errors.Error as error:
        reason = " ".join(str(error).split())[:150]
        raise ConfigError(f"wandb.enabled: wandb cannot start ({reason}); log in, or set WANDB_MODE=offline") from None
    run.define_metric("*", step_metric="step")
    return run


def log_camera_views(run: Any, batch: dict[str, torch.Tensor], normalizer: Normalizer) -> None:
    """One batch of what the network sees, resized and augmented, so that a person sees it too."""
    if isinstance(run, _NoWandb):
        return
    wandb = import_wandb()
    views = {}
    for name, images in normalizer.unnormalize_images(batch).items():  # (B, 3, H, W) in [0, 1]
        pixels = (images[:8] * 255).round().byte().permute(0, 2, 3, 1).cpu().numpy()
        views[name] = [wandb.Image(image) for image in pixels]
    run.log({"step": 0} | views)


# -- weights to start from ----------------------------------------------------------------------------------------


def backbone_weights(model: ModelConfig) -> dict[str, torch.Tensor] | None:
    """State dict of the image backbone as model.pretrained_backbone says, or None for random weights.

    Raises:
        ConfigError: no download, no such file, or not a file of weights; says how to go on.
    """
    choice = model.pretrained_backbone
    if choice is False:
        return None
    weights = torchvision.models.get_model_weights(model.vision_backbone)["IMAGENET1K_V1"]
    if choice is True:
        try:
            return weights.get_state_dict(progress=False, check_hash=True)
        except Exception as exc:  # URLError, HTTPError, timeouts, hash mismatch: all mean "no weights"
            raise ConfigError(
                f"model.pretrained_backbone: true needs torchvision's {model.vision_backbone} ImageNet weights, and "
                f"the download failed ({' '.join(str(exc).split())}); fetch {Path(weights.url).name} where there is a "
                "network and set model.pretrained_backbone to its path, or to false to start from random weights"
            ) from None
    try:
        if choice.endswith(".safetensors"):
            from safetensors.torch import load_file

            return load_file(choice)
        return torch.load(choice, map_location="cpu", weights_only=True)
    except Exception as exc:  # missing, a folder, not a pickle, not tensors: torch raises many types
        reason = " ".join(str(exc).split())[:120]
        raise ConfigError(f"model.pretrained_backbone: {choice}: not a file of weights ({reason})") from None


# -- the output directory -----------------------------------------------------------------------------------------

STOP_MARKER = "stopped.json"  # what the command around torchrun, which only ever returns 1, can tell a stop by
RUN_FILES = ("metrics.jsonl", "sync_report.json", "summary.json", "summary.png", "last", "best", STOP_MARKER)


_output_lock: Any = None  # held until this process ends or trains elsewhere


def lock_output(output_dir: Path) -> None:
    """One run at a time in an output directory: a second would delete the save that the first has in flight.

    A POSIX lock: it dies with its process, and loader workers do not inherit it. Raises ConfigError.
    """
    global _output_lock
    _output_lock = (output_dir / ".lock").open("w")
    try:
        fcntl.lockf(_output_lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        raise ConfigError(f"training.output_dir: {output_dir}: another process is training there now") from None


def open_output(cfg: Config, overwrite: bool) -> Path | None:
    """Make the output directory ready (called on rank 0) and choose what to resume from.

    Returns:
        The checkpoint directory to continue from, or None for a fresh start.

    Raises:
        ConfigError: the directory holds a run and neither resuming nor overwriting was asked for, or cannot be made.
    """
    output_dir, resume = Path(cfg.training.output_dir), cfg.training.resume
    try:
        output_dir.mkdir(parents=True, exist_ok=True)
        probe = output_dir / f".writable-{os.getpid()}"
        probe.touch()
        probe.unlink()
    except OSError as exc:
        raise ConfigError(f"training.output_dir: {output_dir}: cannot write there ({exc.strerror})") from None
    lock_output(output_dir)
    (output_dir / STOP_MARKER).unlink(missing_ok=True)
    restarted = int(os.environ.get("TORCHELASTIC_RESTART_COUNT", 0)) > 0  # torchrun runs the same command again
    for leftover in lerobot_checkpoint.clean_leftovers(output_dir):
        print(f"removed {leftover}, left by a save that was cut short")
    if overwrite and not restarted:
        for path in [*lerobot_checkpoint.list_checkpoints(output_dir), *(output_dir / name for name in RUN_FILES)]:
            shutil.rmtree(path) if path.is_dir() and not path.is_symlink() else path.unlink(missing_ok=True)
        return None
    if resume == "auto" or restarted:
        newest = lerobot_checkpoint.newest_checkpoint(output_dir, on_bad=lambda line: print(f"passed over {line}"))
        if newest is not None or resume in ("auto", "never"):
            return newest
    checkpoints = lerobot_checkpoint.list_checkpoints(output_dir)
    if resume != "never":
        checkpoint = Path(resume).resolve()
        lerobot_checkpoint.verify_checkpoint(checkpoint)
        newer = [c.name for c in checkpoints if c.name > checkpoint.name]
        if newer:
            raise ConfigError(
                f"training.output_dir: {output_dir} holds newer checkpoints ({newer[-1]}) than training.resume "
                f"{checkpoint.name}; set another training.output_dir, or delete them"
            )
        if checkpoint.parent == output_dir.resolve():
            return checkpoint
    if checkpoints or (output_dir / "metrics.jsonl").exists():
        raise ConfigError(
            f"training.output_dir: {output_dir} already holds a run; continue it with --resume, replace it with "
            "--overwrite, or set another training.output_dir"
        )
    return None if resume == "never" else checkpoint


# -- what a checkpoint says of itself -----------------------------------------------------------------------------


def source_version() -> dict[str, str]:
    """The trainer's version and a hash of its root modules: an injected copy has no git history to ask."""
    digest = hashlib.sha256()
    root = Path(__file__).parent
    files = [root / name for name in ("train.py", "act_model.py", "augment.py")]
    for path in [*files, *sorted(p for name in ("rosbag_dataset", "lerobot_checkpoint") for p in (root / name).glob("*.py"))]:
        digest.update(path.read_bytes())
    return {"version": VERSION, "source_sha256": digest.hexdigest()}


def environment(cfg: Config, world: World, precision: torch.dtype) -> dict[str, Any]:
    """What bit-exactness depends on besides data, seed and model (distributed runs, threads and kernels round
    differently)."""
    return {
        "torch": str(torch.__version__),
        "device": torch.cuda.get_device_name() if world.device.type == "cuda" else world.device.type,
        "instruction set": f"{platform.machine()} {torch.backends.cpu.get_cpu_capability()}",
        "threads": torch.get_num_threads(),
        "precision": str(precision).removeprefix("torch."),
        "compiled": cfg.training.compile == "true",
        "memory format": "channels last",
        "ranks": world.size,
        "training.batch_size": cfg.training.batch_size,
    }


def fingerprint(cfg: Config, act: ACTConfig, train: list[Episode], held_out: list[Episode]) -> dict[str, Any]:
    """What must be the same for a resumed run to be the same run: the network, and the samples in their order."""
    keys = ("fps", "max_offset_ms", "joint_resample", "time_source", "image_stats", "joint_names", "joint_topic")
    return {
        **{f"model.{name}": value for name, value in dataclasses.asdict(act).items()},
        **{f"data.{name}": getattr(cfg.data, name) for name in keys},
        **{f"conventions.{name}": value for name, value in dataclasses.asdict(cfg.conventions).items()},
        "cameras": cfg.cameras,
        "training.seed": cfg.training.seed,
        "training episodes": {e.name: e.content_hash for e in train},
        "held-out episodes": {e.name: e.content_hash for e in held_out},
    }


def schedule(cfg: Config) -> dict[str, Any]:
    """What a resumed run may change, and says: how it learns from here on."""
    training = cfg.training
    keys = ["lr", "lr_backbone", "weight_decay", "kl_weight", "grad_clip_norm", "scheduler"]
    if training.scheduler == "cosine":
        keys += ["warmup_steps", "min_lr", "steps"]
    augmentation = dataclasses.asdict(cfg.augmentation) if cfg.augmentation.enabled else {"enabled": False}
    return {f"training.{name}": getattr(training, name) for name in keys} | {"augmentation": augmentation}


def differences(was: dict[str, Any], now: dict[str, Any]) -> list[str]:
    """One text per key whose value is not the same in both."""
    was, now = json.loads(json.dumps(was)), json.loads(json.dumps(now))  # tuples are lists after a file
    texts = []
    for name in now:
        old, new = was.get(name), now[name]
        if old == new:
            continue
        if isinstance(old, dict) and isinstance(new, dict):
            changed = sorted(k for k in {*old, *new} if old.get(k) != new.get(k))
            texts.append(f"{name} ({', '.join(changed[:5])}{', ...' if len(changed) > 5 else ''})")
        else:
            texts.append(f"{name} (was {old}, is {new})")
    return texts


def robot_contract(cfg: Config, train: list[Episode], held_out: list[Episode]) -> dict[str, Any]:
    """train_config.json: what a robot must know to feed this policy and to act on its output, and the whole config."""
    return {
        "action_mode": cfg.conventions.action_mode,
        "joint_names": cfg.data.joint_names,
        "revolute": bag_settings(cfg).revolute.tolist(),
        "joint_sign": cfg.conventions.joint_sign if cfg.conventions.apply_joint_sign else [1.0] * cfg.model.state_dim,
        "wrap_angles": cfg.conventions.wrap_angles,
        "fps": cfg.data.fps,
        "image_resize": cfg.conventions.image_resize,
        "image_resize_interpolation": RESIZE_INTERPOLATION,
        "cameras": cfg.cameras,
        "image_shapes": {camera: list(shape) for camera, shape in train[0].image_shape.items()},
        "joint_topic": cfg.data.joint_topic,
        "joint_resample": cfg.data.joint_resample,
        "time_source": cfg.data.time_source,
        "pretrained_backbone": cfg.model.pretrained_backbone,
        "training_episodes": [e.name for e in train],
        "held_out_episodes": [e.name for e in held_out],
        "code": source_version(),
        "config": dataclasses.asdict(cfg),
    }


# -- the run ------------------------------------------------------------------------------------------------------


class Trainer:
    """A run, on one rank: bags to samples, the model, the loop, the checkpoints.

    Raises (everywhere): BagError, ConfigError, CheckpointError, TrainingError, Stopped; one line each.
    """

    def __init__(self, cfg: Config, world: World, stop: StopSignal, overwrite: bool) -> None:
        self.cfg, self.world, self.stop = cfg, world, stop
        self.say = print if world.is_main else (lambda *values, **options: None)
        self.precision = world.share(choose_precision(cfg.training.precision, world.device))  # one for all nodes
        self.output_dir = Path(cfg.training.output_dir)
        resume_from = world.share(open_output(cfg, overwrite) if world.is_main else None)
        # What can be refused at once is, before an hour of decoding.
        if cfg.wandb.enabled and world.is_main:
            import_wandb()
        if cfg.training.compile == "true":
            check_compiler(world.device)
        weights = backbone_weights(cfg.model) if resume_from is None else None
        self._prepare_data()
        self._build_model(weights)
        self.run_id: str | None = None
        self.validation_due: Path | None = None  # a checkpoint made by a stop that left no time to validate
        self.step, self.samples_seen, self.best_l1 = 0, 0, math.inf
        # loss, L1, KL, gradient norm summed since the last line of metrics.jsonl, and the number of steps
        self.window = torch.zeros(5, device=world.device)
        if resume_from is not None:
            self._resume(resume_from)
        if world.is_main:
            cut_metrics(self.output_dir / "metrics.jsonl", self.step)
        self.saver = CheckpointSaver()
        world.before_death = lambda: self.saver.settle(timeout_s=20)  # torchrun ends what is left after 30 s

    # Data.

    def _prepare_data(self) -> None:
        cfg, world = self.cfg, self.world
        self.say(f"reading bags in {cfg.data.bag_dir}", flush=True)
        settings = bag_settings(cfg)
        show = world.local_rank == 0
        episodes, self.skipped = world.once_per_node(lambda: load_episodes(settings, progress=show), "decoding bags")
        self.episodes = episodes
        self.train_episodes, self.held_out = split_episodes(episodes, cfg.training.val_fraction, cfg.training.seed)
        self.stats, floored = compute_stats(self.train_episodes, cfg.data.image_stats, cfg.conventions.action_mode)
        self.frames = self._frames_on_device()
        self.dataset = ChunkDataset(self.train_episodes, cfg.model.chunk_size, images=self.frames is None)
        self.held_out_dataset = ChunkDataset(self.held_out, cfg.model.chunk_size)
        self.identity = fingerprint(cfg, act_config(cfg), self.train_episodes, self.held_out)
        self.contract = robot_contract(cfg, self.train_episodes, self.held_out)  # once: it hashes the code that runs
        for rank, identity in enumerate(world.gather(self.identity)):
            if different := "; ".join(differences(identity, self.identity)):
                raise TrainingError(
                    f"ranks {rank} and {world.rank} have different data: {different}; give every node the same bags"
                )
        if world.is_main:
            reports = [episode.sync_report for episode in episodes]
            print(sync_table(reports))
            report = {"episodes": reports, "skipped": self.skipped, "held_out": [e.name for e in self.held_out]}
            (self.output_dir / "sync_report.json").write_text(json.dumps(report, indent=2))
            for line in [*floored, *resize_notes(episodes, settings)]:
                print(f"note: {line}")

    def _frames_on_device(self) -> DeviceFrames | None:
        """The training frames on the GPU, if data.frames_on_device allows it and there is room."""
        device = self.world.device
        if device.type != "cuda" or self.cfg.data.frames_on_device == "never":
            return None
        size, free = DeviceFrames.size_bytes(self.train_episodes), torch.cuda.mem_get_info(device)[0]
        fits = size <= DeviceFrames.SHARE * free
        self.say(
            f"frames: {size / 1e9:.2f} GB, {'kept' if fits else 'too much to keep'} on {device} ({free / 1e9:.1f} GB "
            f"free, of which frames may take {DeviceFrames.SHARE:.0%}; data.frames_on_device)"
        )
        return DeviceFrames(self.train_episodes, device) if fits else None

    # Model and optimizer.

    def _build_model(self, weights: dict[str, torch.Tensor] | None) -> None:
        cfg, world, training = self.cfg, self.world, self.cfg.training
        torch.manual_seed(training.seed)  # the same weights on every rank; DDP would also copy rank 0's
        self.act = act_config(cfg)
        self.model = ACT(self.act)
        if weights is not None:
            try:
                self.model.load_backbone(weights)
            except ValueError as error:
                raise ConfigError(f"model.pretrained_backbone: {cfg.model.pretrained_backbone}: {error}") from None
        # The convolutions get their images channels last (that is how pixels are stored), and so their weights.
        self.model.to(world.device, memory_format=torch.channels_last)
        self.normalizer = Normalizer(self.stats).to(world.device)
        self.optimizer = torch.optim.AdamW(
            [
                {"params": self.model.other_parameters(), "lr": training.lr},
                {"params": self.model.backbone_parameters(), "lr": training.lr_backbone},
            ],
            weight_decay=training.weight_decay,
            fused=True,
        )
        # The fused optimizer leaves the weights alone in a step in which this is 1 (it was made for AMP's scaler).
        self.optimizer.found_inf = torch.zeros((), device=world.device)
        self.scheduler = _build_scheduler(self.optimizer, training)

    def _resume(self, checkpoint: Path) -> None:
        """Take up where a checkpoint stopped. Rank 0 reads it and shares it: other nodes need not have the disk."""
        state = None
        if self.world.is_main:
            state = lerobot_checkpoint.load_training_state(checkpoint)
            changed = differences(state["fingerprint"], self.identity)
            if changed:
                raise CheckpointError(
                    f"{checkpoint}: cannot resume, the run has changed: {'; '.join(changed)}; set it back, or start a "
                    "new run in another training.output_dir"
                )
            state["model"] = lerobot_checkpoint.load_policy(checkpoint).model.state_dict()
        state = self.world.share(state)
        self.model.load_state_dict(state["model"])
        self.optimizer.load_state_dict(state["optimizer"])
        self.scheduler.load_state_dict(state["scheduler"])
        self.window.copy_(state["window"])
        self.step, self.samples_seen = state["step"], state["samples_seen"]
        self.best_l1, self.run_id = state["best_l1"], state["wandb_id"]
        self.validation_due = checkpoint if state["validation_due"] else None
        if changed := differences(state["schedule"], schedule(self.cfg)):
            self.say(f"note: from here on with other settings: {'; '.join(changed)}")
            self._apply_schedule()
        self.say(f"resuming from {checkpoint} at step {self.step}")
        changed = differences(state["environment"], environment(self.cfg, self.world, self.precision))
        if changed:
            self.say(f"note: from here on not bit for bit what an unbroken run gives: {'; '.join(changed)}")

    def _apply_schedule(self) -> None:
        """The config's learning rates and weight decay over those that the optimizer's state brought along."""
        training = self.cfg.training
        self.scheduler.base_lrs = [training.lr, training.lr_backbone]
        for group, lr in zip(self.optimizer.param_groups, self.scheduler.base_lrs, strict=True):
            group["initial_lr"], group["weight_decay"] = lr, training.weight_decay
            group["lr"] = lr * lr_factor(self.step, training)
        self.scheduler._last_lr = [group["lr"] for group in self.optimizer.param_groups]

    # The loop.

    def start(self) -> DataLoader:
        """Make ready for train_step: say what will be trained, compile, wrap; -> the loader of raw batches."""
        world, training = self.world, self.cfg.training
        self.effective_batch = training.batch_size * world.size
        self.parameters = sum(p.numel() for p in self.model.parameters())
        held_out = ", ".join(e.name for e in self.held_out) or "none"
        precision = str(self.precision).removeprefix("torch.")
        self.say(
            f"training {self.parameters / 1e6:.1f} M parameters on {world.device} in {precision}"
            f"{', compiled,' if training.compile == 'true' else ''} for {training.steps} steps; effective batch "
            f"{self.effective_batch} = {training.batch_size} per GPU x {world.size}; {len(self.dataset)} samples "
            f"from {len(self.train_episodes)} episodes, {len(self.held_out)} held out ({held_out})",
            flush=True,
        )
        if self.precision == torch.bfloat16 and not has_fast_bf16(world.device):
            self.say(f"note: {world.device} has no bfloat16 instructions; training.precision fp32 would be faster")
        if self.step >= training.steps:
            self.say(f"nothing left to train: the run is at step {self.step}, training.steps is {training.steps}")
        if training.compile == "true":
            self.model.compile()
        self.ddp: torch.nn.Module = self.model
        if world.size > 1:
            # A 1x1 convolution's weight has one memory order under two names, about which DDP worries.
            warnings.filterwarnings("ignore", message="Grad strides do not match bucket view strides")
            ids = [world.local_rank] if world.device.type == "cuda" else None
            self.ddp = DistributedDataParallel(self.model, device_ids=ids)
        self.stream = SampleStream(
            len(self.dataset), training.batch_size, world.rank, world.size, training.seed, self.samples_seen
        )
        self.model.train()
        return DataLoader(
            self.dataset,
            batch_sampler=self.stream,
            collate_fn=to_tensors,
            num_workers=training.num_workers,
            pin_memory=world.device.type == "cuda",
            worker_init_fn=ignore_signals,
            generator=torch.Generator(),  # making the iterator draws a seed; not from the global generator
        )

    def fit(self) -> None:
        """Train to training.steps, logging, validating and saving on the way; then the summary."""
        cfg, world, training = self.cfg, self.world, self.cfg.training
        loader = self.start()
        self.run = _init_wandb(cfg, self.output_dir, world.is_main, self.run_id)
        tty = sys.stderr.isatty()
        self.bar = tqdm(
            total=training.steps, initial=self.step, desc="training", unit="step", disable=not world.is_main,
            mininterval=0.5 if tty else 10.0,
        )  # fmt: skip
        self.late = LateRead(world.device)
        self.stop.saves = True
        exit_code = 1
        try:
            if self.validation_due is not None and self._validate() and world.is_main:
                lerobot_checkpoint.point_link(self.output_dir, "best", self.validation_due)
            self._restart_clock()
            self._loop(loader)
            exit_code = 0
        finally:
            self.bar.close()
            self.run.finish(exit_code=exit_code)
        if world.is_main:
            self._summarise()
        world.barrier()

    def _loop(self, loader: DataLoader) -> None:
        training = self.cfg.training
        batches = iter(loader)
        while self.step < training.steps:
            batch = self.prepare(self._next(batches))
            if self.step == 0:
                log_camera_views(self.run, batch, self.normalizer)
            flags = self.train_step(batch)
            self.bar.update()
            self.saver.check()
            last = self.step == training.steps
            # Flags of the step before this one, which the device has long finished; the present one's only where
            # the host reads from the device anyway.
            stopping = self._heed(self.late.push(self.step, flags))
            if last or stopping or self.step % training.log_freq == 0 or self.step % training.save_freq == 0:
                stopping |= self._heed(self.late.flush())
            if last or self.step % training.log_freq == 0:
                self._log()
            if last or stopping or self.step % training.save_freq == 0:
                self._save(validate=last or not stopping)
            if stopping and not last:
                self._wait_for_save()
                raise Stopped(f"{self.stop.name or 'another rank'} at step {self.step}; saved, continue with --resume")
        self._wait_for_save()

    def _next(self, batches: Iterator[dict[str, torch.Tensor]]) -> dict[str, torch.Tensor]:
        before = time.perf_counter()
        raw = next(batches)
        self.waited_s += time.perf_counter() - before
        return raw

    def prepare(self, raw: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        """The loader's batch for the coming step, on the device, augmented if asked, normalised."""
        cfg, batch = self.cfg, to_device(raw, self.world.device)
        if self.frames is not None:
            batch = self.frames.look_up(batch)
        amounts = []
        if (a := cfg.augmentation).enabled:
            strengths = augment.Strengths(
                a.brightness, a.contrast, a.saturation, a.hue, a.rotate_deg, a.translate, a.scale
            )
            # A generator of its own: dropout and the latent draw the same noise with augmentation and without.
            seed = step_seed(cfg.training.seed, self.step, self.world.rank, "augmentation")
            generator = torch.Generator().manual_seed(seed)
            amounts = [augment.draw(strengths, cfg.training.batch_size, generator) for _ in cfg.cameras]
        return to_model(batch, self.normalizer, amounts)

    def train_step(self, batch: dict[str, torch.Tensor]) -> torch.Tensor:
        """One optimizer step; -> (2,) on the device: how many ranks were asked to stop, is something not finite."""
        training, world = self.cfg.training, self.world
        # Dropout and the VAE's noise depend on seed, step and rank alone, so that no generator state needs saving.
        torch.manual_seed(step_seed(training.seed, self.step, world.rank))
        with torch.autocast(world.device.type, self.precision, enabled=self.precision != torch.float32):
            prediction, (mu, log_sigma_x2) = self.ddp(batch)
        l1_sum, n_valid, kl_sum = loss_terms(prediction, batch["action"], batch["action_is_pad"], mu, log_sigma_x2)
        # Averages are over the *global* batch: sums over all ranks, then one division (a mean of the ranks' means
        # would weigh their samples differently). DDP averages gradients over the ranks, hence the factor world.size.
        asked = l1_sum.new_full((), float(bool(self.stop.name)))
        sums = world.sum(torch.stack([l1_sum.detach(), kl_sum.detach(), n_valid.to(l1_sum.dtype), asked]))
        l1_loss, kl_loss = sums[0] / sums[2], sums[1] / self.effective_batch
        loss = world.size * (l1_sum / sums[2] + training.kl_weight * kl_sum / self.effective_batch)
        self.optimizer.zero_grad(set_to_none=True)
        loss.backward()
        grad_norm = torch.nn.utils.clip_grad_norm_(self.model.parameters(), training.grad_clip_norm)
        # Decided on the device, and for good: not one step is taken on or after a loss or gradient that is not
        # finite. The sums and the reduced gradients are the same on all ranks, and so is the decision.
        bad = ~torch.isfinite(l1_loss + kl_loss + grad_norm)
        self.optimizer.found_inf = torch.maximum(self.optimizer.found_inf, bad.float())
        self.optimizer.step()
        self.lr = self.scheduler.get_last_lr()[0]
        self.scheduler.step()
        self.step += 1
        self.samples_seen += self.effective_batch
        total = l1_loss + training.kl_weight * kl_loss
        self.window += torch.stack([total, l1_loss, kl_loss, grad_norm, torch.ones_like(total)])
        return torch.stack([sums[3], self.optimizer.found_inf])

    def _heed(self, read: tuple[int, list[float]] | None) -> bool:
        """-> whether any rank was asked to stop. Raises TrainingError if that step was not finite."""
        if read is None:
            return False
        step, (asked, bad) = read
        if not bad:
            return asked > 0
        self.world.leave_to_main()
        first = self.samples_seen - (self.step - step + 1) * self.effective_batch
        samples = [self.dataset.locate(self.stream.at(first + i)) for i in range(self.effective_batch)]
        named = ", ".join(f"{episode} frame {frame}" for episode, frame in samples[:16])
        with contextlib.suppress(CheckpointError):  # a save that fails now is not what stops the run
            self.saver.wait()
        good = lerobot_checkpoint.newest_checkpoint(self.output_dir)
        raise TrainingError(
            f"step {step}: the loss or its gradient is not finite, the weights were not touched; the batch: {named}"
            f"{', ...' if len(samples) > 16 else ''}; last good checkpoint: {good or 'none'}; look at these frames, or "
            "lower training.lr"
        )

    # Logging, validating, saving.

    def _restart_clock(self) -> None:
        self.waited_s, self.clock_s, self.clock_step = 0.0, time.perf_counter(), self.step

    def _log(self) -> None:
        """One line of metrics.jsonl, averaged over the steps since the last one. The host waits for the device here."""
        loss, l1_loss, kl_loss, grad_norm, _ = (self.window / self.window[4]).tolist()
        elapsed_s = time.perf_counter() - self.clock_s
        samples_per_s = (self.step - self.clock_step) * self.effective_batch / elapsed_s
        self._append({
            "step": self.step, "loss": loss, "l1_loss": l1_loss, "kl_loss": kl_loss, "lr": self.lr,
            "grad_norm": grad_norm, "samples_per_s": round(samples_per_s, 2),
            "data_wait_fraction": round(self.waited_s / elapsed_s, 4), "effective_batch": self.effective_batch,
        })  # fmt: skip
        self.bar.set_postfix_str(f"loss {loss:.3f}, {samples_per_s:.1f} samples/s", refresh=False)
        self.window.zero_()
        self._restart_clock()

    def _append(self, line: dict[str, Any]) -> None:
        if not self.world.is_main:
            return
        path = self.output_dir / "metrics.jsonl"
        try:
            append_line(path, json.dumps(line))
        except OSError as error:
            if self.cfg.training.on_save_error == "stop":
                raise
            print(f"warning: {path}: {error.strerror}; step {line['step']} is not in it", file=sys.stderr)
        self.run.log(line)

    def _validate(self) -> bool:
        """Masked L1 (normalised units, latent zero) on evenly spaced held-out samples, shared among the ranks; in
        float32, as the robot will run the policy.

        Returns:
            Whether it is the lowest so far; False when no episode is held out.
        """
        if not len(self.held_out_dataset):
            return False
        world, batch_size = self.world, self.cfg.training.batch_size
        wanted = min(VALIDATION_SAMPLES, len(self.held_out_dataset))
        mine = [i * len(self.held_out_dataset) // wanted for i in range(wanted)][world.rank :: world.size]
        sums = torch.zeros(2, device=world.device)
        self.model.eval()
        with torch.inference_mode():
            for first in range(0, len(mine), batch_size):
                raw = to_tensors(self.held_out_dataset.__getitems__(mine[first : first + batch_size]))
                batch = to_model(to_device(raw, world.device), self.normalizer)
                prediction, _ = self.model.forward(batch)  # not compiled once more for another mode and batch size
                l1_sum, n_valid, _ = loss_terms(prediction, batch["action"], batch["action_is_pad"], None, None)
                sums += torch.stack([l1_sum, n_valid.to(l1_sum.dtype)])
        self.model.train()
        l1_sum, n_valid = world.sum(sums).tolist()
        val_l1 = l1_sum / n_valid
        self._append({"step": self.step, "val_l1_loss": val_l1, "val_samples": wanted})
        better = val_l1 < self.best_l1
        self.best_l1 = min(val_l1, self.best_l1)
        return better

    def _save(self, validate: bool) -> None:
        """Validate (not when stopping: there is no time) and hand a checkpoint to the background saver."""
        paused_s = time.perf_counter()
        better = validate and self._validate()
        due = not validate and self.step % self.cfg.training.save_freq == 0  # the resumed run makes up for it
        if self.world.is_main:
            self.saver.submit(
                self.output_dir,
                self.step,
                links=("last", "best") if better else ("last",),
                keep=self.cfg.training.keep_checkpoints,
                on_error=self.cfg.training.on_save_error,
                model_state=self.model.state_dict(),
                act_config=self.act,
                image_shapes=self.episodes[0].image_shape,
                stats=self.stats,
                policy_fields={
                    "n_action_steps": self.cfg.model.n_action_steps,
                    "temporal_ensemble_coeff": self.cfg.model.temporal_ensemble_coeff,
                    "kl_weight": self.cfg.training.kl_weight,
                    "optimizer_lr": self.cfg.training.lr,
                    "optimizer_weight_decay": self.cfg.training.weight_decay,
                    "optimizer_lr_backbone": self.cfg.training.lr_backbone,
                },
                train_config=self.contract,
                training_state={
                    "step": self.step,
                    "samples_seen": self.samples_seen,
                    "best_l1": self.best_l1,
                    "validation_due": due,
                    "schedule": schedule(self.cfg),
                    "wandb_id": self.run.id,
                    "window": self.window,
                    "optimizer": self.optimizer.state_dict(),
                    "scheduler": self.scheduler.state_dict(),
                    "fingerprint": self.identity,
                    "environment": environment(self.cfg, self.world, self.precision),
                },
                total_steps=self.cfg.training.steps,
            )
        self.clock_s += time.perf_counter() - paused_s  # neither validation nor saving is training speed

    def _wait_for_save(self) -> None:
        self.saver.wait()
        self.world.barrier()

    def _summarise(self) -> None:
        cfg, frames = self.cfg, [e.sync_report for e in self.episodes]
        both = (self.held_out, self.train_episodes)
        held_out, seen = ([e for e in es if len(e.time_ns) > len(e.segments)] for es in both)  # with any action
        self.model.eval()

        def predict(batch: dict[str, Any]) -> torch.Tensor:
            actions, _ = self.model.forward(to_model(to_device(to_tensors(batch), self.world.device), self.normalizer))
            return self.normalizer.unnormalize_action(actions)

        run_summary.finish(
            self.output_dir,
            (held_out or seen)[:SUMMARY_EPISODES],
            held_out=bool(held_out),
            chunk_size=cfg.model.chunk_size,
            predict=predict,
            action_mean=self.stats["action"]["mean"],
            action_mode=cfg.conventions.action_mode,
            joint_names=cfg.data.joint_names,
            fps=cfg.data.fps,
            facts={
                "trained": f"ACT, {self.parameters / 1e6:.1f} M parameters, {self.step} steps, effective batch "
                f"{self.effective_batch}, on {self.world.device}",
                "data": f"{len(self.train_episodes)} episodes ({len(self.held_out)} more held out, {len(self.skipped)} "
                f"bags skipped), {sum(r['frames'] for r in frames)} frames kept, {sum(r['dropped'] for r in frames)} "
                "dropped",
            },
        )


def append_line(path: Path, line: str) -> None:
    """Append a line to a file, whole or, on a disk that is full, not at all.

    Raises:
        OSError: it is not there; with the file's name.
    """
    content = f"{line}\n".encode()
    with path.open("ab", buffering=0) as file:
        size = file.seek(0, os.SEEK_END)
        try:
            if file.write(content) < len(content):  # as much as there was room for
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        except OSError as error:
            with contextlib.suppress(OSError):
                file.truncate(size)
            raise OSError(error.errno, error.strerror, str(path)) from None


def cut_metrics(path: Path, step: int) -> None:
    """Drop the lines after `step`, which the resumed run writes again, and a line cut short by a kill; atomic."""
    if not path.exists():
        return
    kept = [line for line in run_summary.metrics_lines(path) if line["step"] <= step]
    partial = path.with_suffix(".partial")
    partial.write_text("".join(json.dumps(line) + "\n" for line in kept))
    os.replace(partial, path)


def resize_notes(episodes: list[Episode], settings: BagSettings) -> Iterator[str]:
    """Say when resizing changes the aspect ratio: the picture the network sees is then squeezed."""
    if settings.image_resize is None:
        return
    new_height, new_width = settings.image_resize
    for camera, (height, width) in sorted({item for e in episodes for item in e.source_shape.items()}):
        if abs(new_width / new_height / (width / height) - 1) > 0.01:
            yield (
                f"conventions.image_resize {new_height}x{new_width} changes the aspect ratio of camera {camera} "
                f"({height}x{width}, HxW): the picture is squeezed, in training and on the robot alike"
            )


def report(world: World | None, line: str) -> None:
    """Print the run's one error line, if no other rank was first."""
    if world is None or world.first_to_fail():
        above = "\n" if world is not None and world.size > 1 else ""  # rank 0's progress bar may stand in this line
        print(f"{above}error: {line}", file=sys.stderr, flush=True)


def collective_fault(text: str) -> str:
    """What to say of a collective that failed with `text` (torch's NCCLUtils.cpp and gloo's exceptions): mostly the
    other end is gone, but some of NCCL's faults are at home, and the same start would fail again."""
    words = " ".join(text.split())
    if re.search("ncclInvalid|ncclInternal|ncclUnhandledCuda|shared memory segment|No space left", text):
        return f"NCCL fails on this machine (... {words[-200:]}); NCCL_DEBUG=WARN says more"
    return f"another rank is gone (killed, or its node was lost); continue with --resume ({words[:150]})"


def main(argv: Sequence[str] | None = None) -> int:
    """Entry of `python train.py`. Exit code 0: complete; 1: failed, with one line; 75: stopped by a signal, saved."""
    parser = argparse.ArgumentParser(description="Train ACT from ROS 2 bags. Every setting: see config.yaml.")
    parser.add_argument("--config", type=Path, required=True, help="YAML file with what differs from the defaults")
    parser.add_argument("--override", action="append", default=[], metavar="KEY=VALUE", help="set one key; repeatable")
    parser.add_argument("--resume", action="store_true", help="continue the run in training.output_dir, or start it")
    parser.add_argument("--overwrite", action="store_true", help="replace the run in training.output_dir")
    args = parser.parse_args(argv)
    stop = StopSignal()
    world = cfg = None
    try:
        try:
            world = World()
            cfg = load_config(args.config, args.override)
            if args.resume and args.overwrite:
                raise ConfigError("--resume and --overwrite: choose one")
            if args.resume and cfg.training.resume == "never":
                cfg.training.resume = "auto"
            if args.overwrite and cfg.training.resume != "never":
                raise ConfigError(f"training.resume: found {cfg.training.resume}, expected never with --overwrite")
            world.start(cfg.training.device)
            Trainer(cfg, world, stop, args.overwrite).fit()
            return 0
        except Exception:
            if early := stop.early():  # raised in the middle of C code, Stopped can come out as another exception
                raise early from None
            stop.saves = True  # a signal from here on must not raise in the middle of saying what is wrong
            raise
    except Stopped as stopped:
        if world is None or world.is_main:
            print(f"stopped by {stopped}", file=sys.stderr, flush=True)
            if cfg is not None:
                marker = {"exit_code": EXIT_STOPPED, "stopped by": str(stopped)}
                with contextlib.suppress(OSError):
                    Path(cfg.training.output_dir).mkdir(parents=True, exist_ok=True)
                    (Path(cfg.training.output_dir) / STOP_MARKER).write_text(json.dumps(marker) + "\n")
        if stop.saves:  # all ranks stop and leave together: torchrun ends those that are left once one has gone
            with contextlib.suppress(RuntimeError):
                world.barrier()
        elif world is not None:
            world.tell_stopped()
        return EXIT_STOPPED
    except (ConfigError, BagError, CheckpointError, TrainingError, torch.OutOfMemoryError) as error:
        line = str(error)
        if isinstance(error, torch.OutOfMemoryError):
            line = f"the GPU is out of memory; lower training.batch_size or conventions.image_resize ({line:.100})"
        report(world, line)
        return 1
    except OSError as error:
        report(world, f"{error.filename or 'writing the run'}: {error.strerror or error}; continue with --resume")
        return 1
    except RuntimeError as error:
        # torch reports a killed loader worker from wherever the main thread happens to be; and a collective fails on
        # this rank because another one is gone: if that one can still say why, let it.
        reason = " ".join(str(error).split())[:150]
        if "DataLoader worker" in reason:
            line = (
                f"a data loader process was killed, most likely for want of memory ({reason}); lower "
                "training.num_workers and continue with --resume"
            )
        elif type(error).__module__.startswith(("torch._dynamo", "torch._inductor")):
            line = f"training.compile: true: torch.compile failed ({reason}); set training.compile to false"
        elif world is not None and world.size > 1 and re.search("gloo|nccl|connection|peer", reason, re.I):
            time.sleep(2)
            line = f"rank {world.rank}: {collective_fault(str(error))}"
        else:
            raise
        report(world, line)
        return 1
    finally:
        if world is not None:
            world.close()
        stop.restore()


if __name__ == "__main__":
    sys.exit(main())
