"""The checkpoint directory: LeRobot 0.3.2 and 0.4+ load it as it is, and training resumes from it.

    OUTPUT_DIR/
      checkpoint_005000/
        pretrained_model/            what LeRobot reads; copy this folder to deploy
          config.json                                               0.3.2's fields; later versions fill in theirs
          model.safetensors                                         weights, and 0.3.2's normalisation buffers
          policy_preprocessor.json                                  0.4+ normalises here ...
          policy_preprocessor_step_3_normalizer_processor.safetensors
          policy_postprocessor.json                                 ... and un-normalises here
          policy_postprocessor_step_0_unnormalizer_processor.safetensors
          train_config.json                                         the run's whole configuration
        training_state/              what a resumed run reads
          training_state.pt                                         optimizer, step, generators, ...
          manifest.json                                             size and SHA-256 of every file above
      checkpoint_010000/
      last -> checkpoint_010000      relative links
      best -> checkpoint_005000

No LeRobot release writes such a union: 0.3.2 normalises inside the policy, from buffers among the weights, and
0.4+ outside it, from the processors' files. A checkpoint read through the wrong one gives un-normalised actions
and no error. Ours has both, and load_policy refuses one in which they are absent or contradict each other.

A checkpoint is written under a temporary name, flushed to disk and renamed; only then does `last` move. So a
kill at any instant leaves `last` pointing at a complete checkpoint, or, if it was about to replace one of the
same step, that one complete as `checkpoint_NNNNNN.old`, which every function here finds.

Every failure is a CheckpointError, in one line: which file, what was found, what was expected, what to do.
This file knows nothing of the training loop, the bags or wandb, and never imports lerobot: the tests compare it
with the real 0.3.2 and 0.4.4.
"""

from __future__ import annotations

import hashlib
import io
import json
import os
import re
import shutil
import sys
import threading
from collections import OrderedDict
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import safetensors
import safetensors.torch
import torch
from torch import Tensor

from act_model import ACT, ACTION, IMAGE_PREFIX, STATE, ACTConfig, describe_mismatch

PRETRAINED, TRAINING = "pretrained_model", "training_state"
CONFIG, WEIGHTS, TRAIN_CONFIG = "config.json", "model.safetensors", "train_config.json"
PREPROCESSOR, POSTPROCESSOR = "policy_preprocessor.json", "policy_postprocessor.json"
NORMALIZER = "policy_preprocessor_step_3_normalizer_processor.safetensors"
UNNORMALIZER = "policy_postprocessor_step_0_unnormalizer_processor.safetensors"
STATE_FILE, MANIFEST = f"{TRAINING}/training_state.pt", f"{TRAINING}/manifest.json"
PRETRAINED_FILES = (CONFIG, WEIGHTS, PREPROCESSOR, NORMALIZER, POSTPROCESSOR, UNNORMALIZER, TRAIN_CONFIG)
FILES = tuple(f"{PRETRAINED}/{name}" for name in PRETRAINED_FILES) + (STATE_FILE,)  # what a manifest has to list

EPS = 1e-8  # LeRobot's: (x - mean) / (std + EPS)
MEAN_STD = dict(VISUAL="MEAN_STD", STATE="MEAN_STD", ACTION="MEAN_STD")
POLICY_FIELDS = (  # of LeRobot's ACTConfig: what is not the network's shape but has to be said
    "n_action_steps", "temporal_ensemble_coeff", "kl_weight",
    "optimizer_lr", "optimizer_weight_decay", "optimizer_lr_backbone",
)  # fmt: skip
SHAPE_FIELDS = tuple(  # of our ACTConfig, under the same names in LeRobot's; the others follow from its features
    name for name in ACTConfig.__dataclass_fields__ if name not in ("state_dim", "action_dim", "cameras")
)

# {"observation.state": {"mean": (state_dim,), "std": (state_dim,)}, "action": ... (action_dim,),
#  "observation.images.<camera>": ... (3, 1, 1), of images in [0, 1]}, all float32
Stats = dict[str, dict[str, np.ndarray]]


class CheckpointError(Exception):
    """A checkpoint cannot be written, read or trusted; the message is one line."""


# ---- Normalisation -------------------------------------------------------------------------------------------


class Normalizer:
    """LeRobot's mean/std normalisation, in float32: the model sees normalised values only, the robot never."""

    def __init__(self, stats: Stats, device: torch.device | str = "cpu"):
        self.stats = {
            key: {name: torch.as_tensor(value, dtype=torch.float32) for name, value in pair.items()}
            for key, pair in stats.items()
        }
        self.to(device)

    def to(self, device: torch.device | str) -> Normalizer:
        self.stats = {k: {name: t.to(device) for name, t in pair.items()} for k, pair in self.stats.items()}
        return self

    def normalize(self, batch: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """A new batch with state (..., state_dim), images (..., 3, H, W) and, if there, actions normalised.

        Other entries pass through. Raises ValueError for images that are not floating point (they have to lie
        in [0, 1]) and KeyError if the state or a camera is missing.
        """
        batch = dict(batch)
        for key, pair in self.stats.items():
            if key == ACTION and key not in batch:
                continue
            if key not in batch:
                raise KeyError(f"{key} is not in the batch ({', '.join(batch)})")
            if not batch[key].is_floating_point():
                raise ValueError(f"{key} is {batch[key].dtype}; expected floats (images: in [0, 1], so divide by 255)")
            batch[key] = (batch[key].float() - pair["mean"]) / (pair["std"] + EPS)
        return batch

    def unnormalize_images(self, batch: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """A normalised batch's images (..., 3, H, W) in [0, 1] again, {feature: images}, float32."""
        return {
            key: (batch[key].float() * (pair["std"] + EPS) + pair["mean"]).clamp(0, 1)
            for key, pair in self.stats.items()
            if key.startswith(IMAGE_PREFIX)
        }

    def unnormalize_action(self, action: Tensor) -> Tensor:
        """The model's actions (..., action_dim) in the robot's units, float32."""
        pair = self.stats[ACTION]
        return action.float() * pair["std"] + pair["mean"]


def image_key(camera: str) -> str:
    return IMAGE_PREFIX + camera


def stats_shapes(config: ACTConfig) -> dict[str, tuple[int, ...]]:
    """Every normalised feature and the shape of its mean and std, in LeRobot's order: inputs, then the action."""
    images = {image_key(camera): (3, 1, 1) for camera in config.cameras}
    return {STATE: (config.state_dim,), **images, ACTION: (config.action_dim,)}


def checked_stats(stats: Mapping[str, Mapping[str, Any]], shapes: Mapping[str, tuple[int, ...]], source: str) -> Stats:
    """The mean and std of each feature in `shapes`, as float32 copies, or a CheckpointError that names `source`."""
    checked: Stats = {}
    for key, shape in shapes.items():
        checked[key] = {}
        for name in ("mean", "std"):
            if key not in stats or name not in stats[key]:
                raise CheckpointError(
                    f"{source}: no {name} of {key}, so its normalisation is unknown; expected one of shape {shape}; "
                    "use a complete checkpoint"
                )
            value = np.array(stats[key][name], dtype=np.float32)
            if value.shape != shape:
                raise CheckpointError(
                    f"{source}: {name} of {key} has shape {value.shape}; expected {shape}; the statistics are of "
                    "another policy"
                )
            # 0.3.2 fills its buffers with infinity until statistics are set.
            if not np.isfinite(value).all() or (name == "std" and (value < 0).any()):
                raise CheckpointError(
                    f"{source}: {name} of {key} is {value.ravel().tolist()}; expected finite numbers, std >= 0; "
                    "the statistics were never set or the data are broken"
                )
            checked[key][name] = value
    return checked


# ---- LeRobot's files, as bytes -------------------------------------------------------------------------------


def lerobot_config(config: ACTConfig, image_shapes: Mapping[str, tuple[int, int]], policy_fields: dict) -> dict:
    """config.json: exactly the fields of 0.3.2's ACTConfig, because that version refuses any it does not know."""
    shape_fields = {name: getattr(config, name) for name in SHAPE_FIELDS}
    return dict(
        type="act",
        n_obs_steps=1,
        normalization_mapping=MEAN_STD,
        input_features=input_features(config, image_shapes),
        output_features=output_features(config),
        # Here and in the preprocessor: the two must agree, and every machine has a CPU.
        device="cpu",
        use_amp=False,
        push_to_hub=False,
        repo_id=None,
        private=None,
        tags=None,
        license=None,
        **shape_fields,
        # With a name here, LeRobot downloads ImageNet weights even to load a checkpoint, and fails offline.
        pretrained_backbone_weights=None,
        **policy_fields,
    )


def input_features(config: ACTConfig, image_shapes: Mapping[str, tuple[int, int]]) -> dict[str, dict]:
    """LeRobot takes the cameras in the order in which they stand here."""
    features = {STATE: dict(type="STATE", shape=[config.state_dim])}
    for camera in config.cameras:
        features[image_key(camera)] = dict(type="VISUAL", shape=[3, *image_shapes[camera]])
    return features


def output_features(config: ACTConfig) -> dict[str, dict]:
    return {ACTION: dict(type="ACTION", shape=[config.action_dim])}


def processors(config: ACTConfig, image_shapes: Mapping[str, tuple[int, int]]) -> tuple[dict, dict]:
    """policy_preprocessor.json and policy_postprocessor.json of 0.4+."""

    def step(name: str, config: dict, state_file: str | None = None) -> dict:
        return dict(registry_name=name, config=config, **(dict(state_file=state_file) if state_file else {}))

    actions = output_features(config)
    everything = input_features(config, image_shapes) | actions
    pre = [
        step("rename_observations_processor", dict(rename_map={})),
        step("to_batch_processor", {}),
        step("device_processor", dict(device="cpu", float_dtype=None)),
        step("normalizer_processor", dict(eps=EPS, features=everything, norm_map=MEAN_STD), NORMALIZER),
    ]
    post = [
        step("unnormalizer_processor", dict(eps=EPS, features=actions, norm_map=MEAN_STD), UNNORMALIZER),
        step("device_processor", dict(device="cpu", float_dtype=None)),
    ]
    return dict(name="policy_preprocessor", steps=pre), dict(name="policy_postprocessor", steps=post)


def buffer_names(config: ACTConfig) -> tuple[dict[str, str], dict[str, str]]:
    """Where 0.3.2 keeps statistics among the weights, by feature; ".mean" and ".std" follow.

    First the buffers that normalise, of every feature; then the one that un-normalises, of the action.
    """
    flat = {key: f"buffer_{key.replace('.', '_')}" for key in stats_shapes(config)}
    normalize = {
        key: f"{'normalize_targets' if key == ACTION else 'normalize_inputs'}.{buffer}" for key, buffer in flat.items()
    }
    return normalize, {ACTION: f"unnormalize_outputs.{flat[ACTION]}"}


def pretrained_files(
    model_state: Mapping[str, Tensor],
    config: ACTConfig,
    image_shapes: Mapping[str, tuple[int, int]],
    stats: Stats,
    policy_fields: Mapping[str, Any],
    train_config: Mapping[str, Any],
) -> dict[str, bytes]:
    """The contents of pretrained_model/ by file name."""
    with torch.device("meta"):  # shapes only, no memory
        expected = ACT(config).state_dict()
    if mismatch := describe_mismatch(expected, model_state):
        raise CheckpointError(f"{WEIGHTS}: model_state does not fit act_config: {mismatch}; pass the bare ACT's state")
    if set(image_shapes) != set(config.cameras):
        raise CheckpointError(f"{CONFIG}: image_shapes has {sorted(image_shapes)}; expected {sorted(config.cameras)}")
    if set(policy_fields) != set(POLICY_FIELDS):
        raise CheckpointError(f"{CONFIG}: policy_fields has {sorted(policy_fields)}; expected {sorted(POLICY_FIELDS)}")
    most = 1 if policy_fields["temporal_ensemble_coeff"] is not None else config.chunk_size
    if not 1 <= policy_fields["n_action_steps"] <= most:
        raise CheckpointError(
            f"{CONFIG}: n_action_steps is {policy_fields['n_action_steps']}; expected 1 to {most} "
            "(chunk_size, but 1 with a temporal ensemble, which needs a prediction at every step)"
        )

    flat_stats = {f"{key}.{name}": torch.tensor(v) for key, pair in stats.items() for name, v in pair.items()}
    weights = {f"model.{key}": t.detach().to("cpu", torch.float32).contiguous() for key, t in model_state.items()}
    for buffers in buffer_names(config):
        for key, buffer in buffers.items():
            weights |= {f"{buffer}.{name}": torch.tensor(value) for name, value in stats[key].items()}
    preprocessor, postprocessor = processors(config, image_shapes)
    action_stats = {key: t for key, t in flat_stats.items() if key.startswith(f"{ACTION}.")}
    return {
        CONFIG: to_json(lerobot_config(config, image_shapes, dict(policy_fields)), CONFIG),
        WEIGHTS: safetensors.torch.save(weights, metadata=dict(format="pt")),
        PREPROCESSOR: to_json(preprocessor, PREPROCESSOR),
        NORMALIZER: safetensors.torch.save(flat_stats),
        POSTPROCESSOR: to_json(postprocessor, POSTPROCESSOR),
        UNNORMALIZER: safetensors.torch.save(action_stats),
        TRAIN_CONFIG: to_json(train_config, TRAIN_CONFIG),
    }


def to_json(content: Any, name: str) -> bytes:
    try:
        return (json.dumps(content, indent=2) + "\n").encode()
    except TypeError as error:
        raise CheckpointError(f"{name}: {error}; expected plain JSON values") from error


# ---- Saving --------------------------------------------------------------------------------------------------


def save_checkpoint(
    output_dir: str | Path,
    step: int,
    *,
    model_state: Mapping[str, Tensor],
    act_config: ACTConfig,
    image_shapes: Mapping[str, tuple[int, int]],
    stats: Stats,
    policy_fields: Mapping[str, Any],
    train_config: Mapping[str, Any],
    training_state: Mapping[str, Any],
    total_steps: int | None = None,
) -> Path:
    """Write checkpoint_<step>, then point `last` at it; return its path. On failure nothing there has changed.

    model_state is the bare ACT's state dict, on any device, in any memory format. image_shapes gives (H, W) in
    pixels of what each camera's images are when they reach the model. policy_fields has the keys POLICY_FIELDS.
    training_state may hold tensors and plain Python values only (it is read back with weights_only=True).
    total_steps only decides how many digits the name has, so that names sort like steps.

    An existing checkpoint of the same step is replaced. Raises CheckpointError.
    """
    output_dir = Path(output_dir)
    final = output_dir / f"checkpoint_{step:0{max(6, len(str(total_steps or 0)))}d}"
    temporary = output_dir / f".tmp-{final.name}-{os.getpid()}"

    # All contents first: what is wrong with them is known before the disk is touched, and the manifest's hashes
    # are of what was meant to be written. Takes about 0.8 GB of memory with the default model and AdamW.
    stats = checked_stats(stats, stats_shapes(act_config), "stats")
    pretrained = pretrained_files(model_state, act_config, image_shapes, stats, policy_fields, train_config)
    contents = {f"{PRETRAINED}/{name}": content for name, content in pretrained.items()}
    contents[STATE_FILE] = to_torch_bytes(training_state)
    listing = {n: dict(bytes=len(c), sha256=hashlib.sha256(c).hexdigest()) for n, c in contents.items()}
    contents[MANIFEST] = to_json(dict(step=step, files=listing), MANIFEST)

    try:
        output_dir.mkdir(parents=True, exist_ok=True)
        if temporary.exists():  # of a killed run that had this process id, as is usual in containers
            shutil.rmtree(temporary)
        for folder in (PRETRAINED, TRAINING):
            (temporary / folder).mkdir(parents=True)
        for name, content in contents.items():
            with open(temporary / name, "wb") as file:
                file.write(content)
                file.flush()
                os.fsync(file.fileno())
        for folder in (temporary / PRETRAINED, temporary / TRAINING, temporary):
            flush_directory(folder)
        move_into_place(temporary, final)
    except OSError as error:
        size = sum(map(len, contents.values())) / 2**20
        raise CheckpointError(
            f"{final}: not written ({error.strerror or error}); it needs {size:.0f} MiB; "
            "make room or choose another output directory; earlier checkpoints are untouched"
        ) from error
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
    point_link(output_dir, "last", final)
    return final


class CheckpointSaver:
    """Saves in the background: training stops only for as long as it takes to copy the weights. One at a time."""

    def __init__(self) -> None:
        self._thread: threading.Thread | None = None
        self._error: Exception | None = None

    def submit(
        self,
        output_dir: str | Path,
        step: int,
        *,
        links: tuple[str, ...] = (),
        keep: int | None = None,
        on_error: str = "stop",
        **contents: Any,
    ) -> None:
        """Copy `contents` (the keywords of save_checkpoint) and save them while the caller goes on.

        Waits first for a save that is still under way. Afterwards the `links` (besides `last`) are pointed at the
        checkpoint, and all but the newest `keep` are pruned. A save that fails is raised by the next check() or
        wait(), or, with on_error "continue", only printed.
        """
        self.wait()
        copied = to_cpu_copy(contents)

        def save() -> None:
            try:
                checkpoint = save_checkpoint(output_dir, step, **copied)
                for name in links:
                    point_link(output_dir, name, checkpoint)
                if keep is not None:
                    prune(output_dir, keep)
            except Exception as error:  # a thread's error is lost unless it is kept
                if isinstance(error, CheckpointError) and on_error == "continue":
                    print(f"warning: {error}; training goes on without this checkpoint", file=sys.stderr, flush=True)
                else:
                    self._error = error

        self._thread = threading.Thread(target=save, name=f"save-{step}")
        self._thread.start()

    def check(self) -> None:
        """Raise the error of a save that has failed, once; never waits."""
        error, self._error = self._error, None
        if error is not None:
            raise error

    def settle(self, timeout_s: float) -> None:
        """Wait for the save under way, but not for ever, whatever becomes of it; from any thread."""
        if (thread := self._thread) is not None:
            thread.join(timeout_s)

    def wait(self) -> None:
        """Wait for the save under way, then check()."""
        if self._thread is not None:
            self._thread.join()
            self._thread = None
        self.check()


def to_cpu_copy(value: Any) -> Any:
    """The same nested dicts, lists and tuples, with every tensor copied to CPU memory of its own."""
    if isinstance(value, Tensor):
        return value.detach().to("cpu", copy=True)
    if isinstance(value, Mapping):
        return {key: to_cpu_copy(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return type(value)(to_cpu_copy(item) for item in value)
    return value


def to_torch_bytes(state: Mapping[str, Any]) -> memoryview:
    """torch.save, refusing at once what torch.load(weights_only=True) would refuse when the run is to resume."""

    def check(value: Any, where: str) -> None:
        if type(value) in (dict, OrderedDict):
            for key, item in value.items():
                check(item, f"{where}[{key!r}]")
        elif type(value) in (list, tuple):
            for index, item in enumerate(value):
                check(item, f"{where}[{index}]")
        elif not isinstance(value, Tensor) and type(value) not in (int, float, bool, str, bytes, type(None)):
            raise CheckpointError(
                f"{STATE_FILE}: {where} is {type(value).__module__}.{type(value).__qualname__}; "
                "expected tensors and plain Python values, which load without running code; convert it"
            )

    check(state, "training_state")
    buffer = io.BytesIO()
    torch.save(dict(state), buffer)
    return buffer.getbuffer()


def flush_directory(path: Path) -> None:
    """fsync a directory: without it a rename may reach the disk before, or without, what was renamed."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def move_into_place(temporary: Path, final: Path) -> None:
    """Rename `temporary` to `final`; a checkpoint that is there already stays complete under one name or other."""
    old = final.with_name(final.name + ".old")
    if final.exists():
        if old.exists():  # of a kill just before the last line below
            shutil.rmtree(old)
        os.rename(final, old)
    try:
        os.rename(temporary, final)
    except OSError:
        if old.exists():
            os.rename(old, final)
        raise
    flush_directory(final.parent)
    shutil.rmtree(old, ignore_errors=True)


def point_link(output_dir: str | Path, name: str, checkpoint_dir: str | Path) -> None:
    """Make OUTPUT_DIR/name a relative link to one of its checkpoints, in one step (rename replaces a link)."""
    link, target = Path(output_dir) / name, Path(checkpoint_dir).name
    temporary = link.with_name(f".tmp-{name}-{os.getpid()}")
    if not (link.parent / target).is_dir():
        raise CheckpointError(f"{link}: {link.parent / target} is not there; link to a checkpoint of this directory")
    try:
        temporary.unlink(missing_ok=True)
        temporary.symlink_to(target)
        os.replace(temporary, link)
        flush_directory(link.parent)
    except OSError as error:
        temporary.unlink(missing_ok=True)
        raise CheckpointError(
            f"{link}: cannot point it at {target} ({error.strerror or error}); it has to be a link, or absent, on a "
            f"file system with symbolic links; {target} itself is complete"
        ) from error


# ---- The output directory ------------------------------------------------------------------------------------


def list_checkpoints(output_dir: str | Path) -> list[Path]:
    """The checkpoints in OUTPUT_DIR, oldest step first, unverified; [] if there is no such directory."""
    found: dict[int, Path] = {}
    for path in sorted(Path(output_dir).glob("checkpoint_*")):  # sorted: "<name>" before "<name>.old"
        match = re.fullmatch(r"checkpoint_(\d{6,})(\.old)?", path.name)
        if match and path.is_dir():
            found.setdefault(int(match[1]), path)
    return [found[step] for step in sorted(found)]


def newest_checkpoint(output_dir: str | Path, on_bad: Callable[[str], None] = lambda message: None) -> Path | None:
    """The newest checkpoint that verifies, or None; `on_bad` hears of each newer one that does not, and why."""
    for checkpoint in reversed(list_checkpoints(output_dir)):
        try:
            verify_checkpoint(checkpoint)
            return checkpoint
        except CheckpointError as error:
            on_bad(str(error))
    return None


def verify_checkpoint(checkpoint_dir: str | Path) -> None:
    """Compare every file with the manifest; raise CheckpointError naming the first that is not as it was written.

    Reads everything: about 0.5 s for the default model with its AdamW state.
    """
    checkpoint = Path(checkpoint_dir)
    verify_files(checkpoint, (PRETRAINED, TRAINING))
    for path in checkpoint.iterdir():
        if path.name not in (PRETRAINED, TRAINING):
            raise CheckpointError(f"{path}: foreign, not in the manifest; move it elsewhere")


def verify_files(checkpoint: Path, folders: tuple[str, ...]) -> None:
    """Compare the files of these of its folders with the manifest."""
    manifest = read_json(checkpoint / MANIFEST)
    try:
        step, listed = manifest["step"], {name: (f["bytes"], f["sha256"]) for name, f in manifest["files"].items()}
    except (KeyError, TypeError, AttributeError) as error:
        raise CheckpointError(f"{checkpoint / MANIFEST}: not a manifest; use another checkpoint") from error
    match = re.fullmatch(r"checkpoint_(\d+)(\.old)?", checkpoint.resolve().name)
    if match and int(match[1]) != step:
        raise CheckpointError(f"{checkpoint}: holds step {step} by its manifest; rename it or use another checkpoint")

    expected = {name for name in {*FILES, *listed} if name.startswith(folders)}
    found = {str(p.relative_to(checkpoint)) for f in folders for p in (checkpoint / f).rglob("*") if not p.is_dir()}
    for name in sorted(expected - found):
        raise CheckpointError(f"{checkpoint / name}: missing; restore it or use another checkpoint")
    for name in sorted(found - set(listed) - {MANIFEST}):
        raise CheckpointError(f"{checkpoint / name}: foreign, not in the manifest; move it elsewhere")
    for name in sorted(expected):
        size, sha256 = listed[name]
        if (checkpoint / name).stat().st_size != size:
            raise CheckpointError(
                f"{checkpoint / name}: {(checkpoint / name).stat().st_size} bytes; expected {size} (truncated or "
                "changed); use another checkpoint"
            )
        if file_sha256(checkpoint / name) != sha256:
            raise CheckpointError(
                f"{checkpoint / name}: its SHA-256 is not the manifest's (changed since it was written); use another "
                f"checkpoint, or, if the change was meant, a copy of {PRETRAINED}/ elsewhere"
            )


def file_sha256(path: Path) -> str:
    digest = hashlib.sha256()
    try:
        with open(path, "rb") as file:
            while block := file.read(1 << 20):
                digest.update(block)
    except OSError as error:
        raise CheckpointError(f"{path}: unreadable ({error.strerror or error})") from error
    return digest.hexdigest()


def load_training_state(checkpoint_dir: str | Path, map_location: torch.device | str = "cpu") -> dict[str, Any]:
    """The training_state that was saved; loading it cannot run code."""
    path = Path(checkpoint_dir) / STATE_FILE
    try:
        return torch.load(path, map_location=map_location, weights_only=True)
    except Exception as error:  # torch.load raises OSError, RuntimeError, EOFError, UnpicklingError, ...
        raise CheckpointError(f"{path}: unreadable ({first_line(error)}); resume from another checkpoint") from error


def clean_leftovers(output_dir: str | Path) -> list[str]:
    """Remove what killed runs left half-written; return the names of what was removed or put back.

    Call it once when a run starts, from one process, never while another writes here.
    """
    cleaned = []
    try:
        for path in sorted(Path(output_dir).glob(".tmp-*")):
            if path.is_dir() and not path.is_symlink():
                shutil.rmtree(path)
            else:
                path.unlink()
            cleaned.append(path.name)
        for old in sorted(Path(output_dir).glob("checkpoint_*.old")):
            current = old.with_suffix("")
            if current.exists():  # complete: it was renamed into place before its predecessor was removed
                shutil.rmtree(old)
            else:
                os.rename(old, current)
            cleaned.append(old.name)
    except OSError as error:
        raise CheckpointError(f"{output_dir}: cannot clean leftovers ({error}); remove .tmp-* by hand") from error
    return cleaned


def prune(output_dir: str | Path, keep: int) -> list[Path]:
    """Remove all but the `keep` newest checkpoints and those that links (`last`, `best`) point at; return them."""
    if keep < 1:
        raise CheckpointError(f"{output_dir}: asked to keep {keep} checkpoints; expected at least 1")
    linked = {path.resolve() for path in Path(output_dir).iterdir() if path.is_symlink()}
    removed = [path for path in list_checkpoints(output_dir)[:-keep] if path.resolve() not in linked]
    for path in removed:
        try:  # renamed first, so that a kill leaves no half of a checkpoint under a checkpoint's name
            hidden = path.with_name(f".tmp-{path.name}-pruned")
            os.rename(path, hidden)
            shutil.rmtree(hidden)
        except OSError as error:
            raise CheckpointError(f"{path}: cannot remove it ({error.strerror or error})") from error
    return removed


# ---- Loading a policy ----------------------------------------------------------------------------------------


@dataclass
class Policy:
    """A model with the normalisation it was trained with."""

    path: Path  # the pretrained_model directory it came from
    model: ACT  # in eval mode
    act_config: ACTConfig
    normalizer: Normalizer
    stats: Stats
    image_shapes: dict[str, tuple[int, int]]  # (H, W) in pixels by camera
    policy_fields: dict[str, Any]  # keys POLICY_FIELDS
    train_config: dict[str, Any] | None  # None if the directory has none

    @torch.inference_mode()
    def predict_chunk(self, observation: Mapping[str, Tensor]) -> Tensor:
        """Raw observation -> actions (B, chunk, action_dim) in the robot's units, float32.

        observation: "observation.state" (B, state_dim) and "observation.images.<camera>" (B, 3, H, W) in [0, 1],
        on the model's device.
        """
        actions, _ = self.model(self.normalizer.normalize(observation))
        return self.normalizer.unnormalize_action(actions)


def load_policy(path: str | Path, device: torch.device | str = "cpu") -> Policy:
    """Load our checkpoints and those that LeRobot 0.3.2 or 0.4+ wrote.

    `path` is a pretrained_model directory, a checkpoint directory, or an output directory (its `last`, else its
    newest checkpoint that verifies). Beside a manifest, the files are verified first. Raises CheckpointError if
    weights do not fit, if the normalisation is absent or contradictory, or if the directory asks for anything
    that this code does not do.
    """
    directory = find_pretrained(Path(path))
    if directory.name == PRETRAINED and (directory.parent / MANIFEST).exists():
        verify_files(directory.parent, (PRETRAINED,))

    act_config, image_shapes, policy_fields = parse_config(directory / CONFIG)
    tensors = read_tensors(directory / WEIGHTS)
    weights = {key.removeprefix("model."): tensors.pop(key) for key in list(tensors) if key.startswith("model.")}
    stats = find_stats(directory, act_config, buffers=tensors)

    with torch.device("meta"):  # no time spent on an initialisation that is overwritten
        model = ACT(act_config)
    if mismatch := describe_mismatch(model.state_dict(), weights):
        raise CheckpointError(f"{directory / WEIGHTS}: does not fit {CONFIG}: {mismatch}; use a complete checkpoint")
    model.load_state_dict({key: tensor.float() for key, tensor in weights.items()}, assign=True)

    train_config = directory / TRAIN_CONFIG
    return Policy(
        path=directory,
        # Channels last, as pixels are stored, is 10 % faster on a CPU.
        model=model.to(device, memory_format=torch.channels_last).eval(),
        act_config=act_config,
        normalizer=Normalizer(stats, device),
        stats=stats,
        image_shapes=image_shapes,
        policy_fields=policy_fields,
        train_config=read_json(train_config) if train_config.exists() else None,
    )


def find_pretrained(path: Path) -> Path:
    for directory in (path, path / PRETRAINED, path / "last" / PRETRAINED):
        if (directory / CONFIG).exists():
            return directory.resolve()
    # If `last` is there and broken, say so: on a robot an older policy must not run unasked.
    if (path / "last").exists():
        raise CheckpointError(f"{path / 'last'}: has no {PRETRAINED}/{CONFIG}; name another checkpoint to load")
    problems: list[str] = []
    if newest := newest_checkpoint(path, on_bad=problems.append):
        return (newest / PRETRAINED).resolve()
    raise CheckpointError(
        problems[0] if problems else f"{path}: no {CONFIG}, {PRETRAINED}/ or checkpoint_NNNNNN/ here; name one of these"
    )


def parse_config(path: Path) -> tuple[ACTConfig, dict[str, tuple[int, int]], dict[str, Any]]:
    """Our view of a LeRobot config.json: the network's shape, the cameras' (H, W), POLICY_FIELDS."""
    config = read_json(path)

    def require(what: str, found: Any, expected: Any) -> None:
        if found != expected:
            raise CheckpointError(f"{path}: {what} is {found!r}; expected {expected!r}; this policy cannot be run here")

    try:
        require("type", config["type"], "act")
        require("n_obs_steps", config["n_obs_steps"], 1)
        modes = {kind: config["normalization_mapping"].get(kind) for kind in MEAN_STD}
        require("normalization_mapping", modes, MEAN_STD)
        inputs, outputs = dict(config["input_features"]), config["output_features"]
        require("output_features", list(outputs), [ACTION])
        state = inputs.pop(STATE)
        image_shapes = {}
        for key, feature in inputs.items():
            require(f"type of input {key}", feature["type"], "VISUAL")
            require(f"prefix of input {key}", key[: len(IMAGE_PREFIX)], IMAGE_PREFIX)
            channels, height, width = feature["shape"]
            require(f"number of channels of {key}", channels, 3)
            image_shapes[key.removeprefix(IMAGE_PREFIX)] = (height, width)
        shape_fields = {name: config[name] for name in SHAPE_FIELDS}
        # LeRobot declares this one an int.
        shape_fields["replace_final_stride_with_dilation"] = bool(config["replace_final_stride_with_dilation"])
        act_config = ACTConfig(
            state_dim=state["shape"][0],
            action_dim=outputs[ACTION]["shape"][0],
            cameras=tuple(image_shapes),
            **shape_fields,
        )
        return act_config, image_shapes, {name: config[name] for name in POLICY_FIELDS}
    except KeyError as error:
        raise CheckpointError(f"{path}: no {error}; expected LeRobot's config of an ACT policy") from error
    except (ValueError, TypeError, AttributeError, IndexError) as error:
        raise CheckpointError(f"{path}: {error}; this policy cannot be run here") from error


def find_stats(directory: Path, config: ACTConfig, buffers: Mapping[str, Tensor]) -> Stats:
    """The statistics, from 0.3.2's buffers, from 0.4+'s processors, or from both if they agree exactly."""
    sources = stats_of_buffers(directory / WEIGHTS, config, buffers) + stats_of_processors(directory, config)
    if not sources:
        raise CheckpointError(
            f"{directory}: no normalisation, neither buffers in {WEIGHTS} nor {PREPROCESSOR}; its actions would be "
            "wrong without any error; use a complete checkpoint"
        )
    (first, stats), *others = sources
    for source, other in others:
        for key, pair in other.items():
            if not all(np.array_equal(pair[name], stats[key][name]) for name in pair):
                raise CheckpointError(
                    f"{source}: statistics of {key} contradict those in {first}; one of the two is of another run; "
                    "use a checkpoint whose files belong together"
                )
    return stats


# Each of these two returns what it finds as (source, statistics): first of every feature, as they normalise, then
# of the action alone, as it is un-normalised. Both must be there; none at all, [], means the other format.


def stats_of_buffers(path: Path, config: ACTConfig, buffers: Mapping[str, Tensor]) -> list[tuple[str, Stats]]:
    """From 0.3.2's buffers: `buffers` is all of the weights file that is not the model's."""
    if not buffers:
        return []
    known = {f"{b}.{name}" for names in buffer_names(config) for b in names.values() for name in ("mean", "std")}
    if unknown := sorted(set(buffers) - known):
        raise CheckpointError(f"{path}: unexpected {', '.join(unknown[:4])}; expected an ACT policy's tensors only")
    sources = []
    for names in buffer_names(config):
        found = {
            key: {n: buffers[f"{buffer}.{n}"].numpy() for n in ("mean", "std") if f"{buffer}.{n}" in buffers}
            for key, buffer in names.items()
        }
        shapes = {key: shape for key, shape in stats_shapes(config).items() if key in names}
        source = f"{path} (buffers)"
        sources.append((source, checked_stats(found, shapes, source)))
    return sources


def stats_of_processors(directory: Path, config: ACTConfig) -> list[tuple[str, Stats]]:
    """From 0.4+'s processors. A step that changes data in a way unknown here is refused rather than left out."""
    if not (directory / PREPROCESSOR).exists() and not (directory / POSTPROCESSOR).exists():
        return []
    shapes = stats_shapes(config)
    sources = []
    for file, wanted, needed in (
        (PREPROCESSOR, "normalizer_processor", shapes),
        (POSTPROCESSOR, "unnormalizer_processor", {ACTION: shapes[ACTION]}),
    ):
        path = directory / file
        found: dict[str, dict[str, Any]] = {}
        try:
            for step in read_json(path)["steps"]:
                name, settings = step.get("registry_name"), step.get("config", {})
                if name == wanted:
                    found = stats_of_step(path, step)
                elif name not in ("to_batch_processor", "device_processor") and (
                    name != "rename_observations_processor" or settings.get("rename_map")
                ):
                    raise CheckpointError(f"{path}: step {name} {settings} is unknown here; load it with LeRobot")
        except (KeyError, TypeError, AttributeError) as error:
            raise CheckpointError(f"{path}: not a processor of LeRobot 0.4+ ({error!r})") from error
        sources.append((str(path), checked_stats(found, needed, str(path))))
    return sources


def stats_of_step(path: Path, step: dict) -> dict[str, dict[str, Any]]:
    settings = step["config"]
    used = dict(eps=settings["eps"], **{kind: settings["norm_map"].get(kind) for kind in MEAN_STD})
    if used != dict(eps=EPS, **MEAN_STD) or settings.get("normalize_observation_keys"):
        raise CheckpointError(
            f"{path}: normalises with {used}, of {settings.get('normalize_observation_keys') or 'everything'}; "
            f"expected MEAN_STD and eps {EPS} of everything; load it with LeRobot"
        )
    stats: dict[str, dict[str, Any]] = {}
    if "state_file" in step:
        for key, tensor in read_tensors(path.with_name(Path(step["state_file"]).name)).items():
            feature, _, name = key.rpartition(".")
            if feature in settings["features"]:  # others are of columns that ACT never sees
                stats.setdefault(feature, {})[name] = tensor.numpy()
    return stats


# ---- Reading -------------------------------------------------------------------------------------------------


def read_json(path: Path) -> Any:
    try:
        return json.loads(path.read_bytes())
    except FileNotFoundError:
        raise CheckpointError(f"{path}: missing; use a complete checkpoint") from None
    except (OSError, ValueError) as error:
        raise CheckpointError(f"{path}: not readable as JSON ({first_line(error)}); use another checkpoint") from error


def read_tensors(path: Path) -> dict[str, Tensor]:
    try:
        return safetensors.torch.load_file(path)
    except FileNotFoundError:
        raise CheckpointError(f"{path}: missing; use a complete checkpoint") from None
    except (OSError, safetensors.SafetensorError) as error:
        raise CheckpointError(
            f"{path}: not readable as safetensors ({first_line(error)}); use another checkpoint"
        ) from error


def first_line(error: Exception) -> str:
    return (str(error) or type(error).__name__).splitlines()[0]
