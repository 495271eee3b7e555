"""Run a trained policy, one control step at a time: checks, normalisation, action queue, honest latency.

    runner = PolicyRunner("outputs/train-rosbag-act")             # the output directory's `last`, or any checkpoint
    runner.reset()                                                # at the start of every episode
    target_rad = runner.command(state_rad, {"color": image})      # (A,) joint positions to command, rad
    print(runner.latency())

Three backends run the same checkpoint: LeRobot's own ACTPolicy, whichever version is installed; ours, which needs no
LeRobot; and onnxruntime with what runtimes.py makes of ours, the fastest on a CPU. LeRobot's versions differ in where
they normalise (0.3.2 inside the policy, 0.4+ in processors around it), and a policy that normalises twice or not at all
still gives actions, wrong ones. So when another backend than ours is loaded, its answers are compared with ours: only
if they agree does it normalise exactly once.
"""

from __future__ import annotations

import copy
import time
from collections import deque
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from act_model import ACTION, STATE, TemporalEnsembler, describe_mismatch, full_float32
from lerobot_checkpoint import (
    PREPROCESSOR_FILE,
    WEIGHTS_FILE,
    LoadedPolicy,
    buffer_names,
    image_key,
    load_policy,
    read_tensors,
)
from rosbag_dataset import resize_image

from .config import CONTROL_HZ, ENSEMBLE_M, WARM_UP_INFERENCES, PolicyError, read_contract
from .runtimes import SAME_SIGMA, ExportError, OnnxPolicy, difference_sigma, to_onnx

BACKENDS, DEVICES, MODES = ("auto", "lerobot", "native", "onnx"), ("auto", "cpu", "cuda", "mps"), (
    "auto", "chunk", "every-step", "ensemble",
)  # fmt: skip
# How far LeRobot's actions may be from ours on the same observation, in standard deviations of the action. Rounding
# is near 1e-6 (float32); a normalisation that is missing or applied twice is off by about 1.
SAME_ACTIONS_SIGMA = 1e-3
# Of recordings that begin at rest for so long, mode every-step is warned about: docs/evaluation.md.
LONG_REST_S = 0.1
# Observations in one inference of step_together: larger batches need memory and are not faster.
BATCH = 32


class CannotLoad(PolicyError):
    """The installed LeRobot, or its absence, and this checkpoint do not go together; the other backend may do."""


# -- backends: raw observations (a batch of B) -> (B, chunk, A) actions in the robot's units ----------------------


class _TorchBackend:
    """A backend that takes tensors, on a device."""

    _device: torch.device

    def chunk(self, observation: Mapping[str, Tensor]) -> Tensor:
        """Actions (B, chunk, A) for a raw observation: see LoadedPolicy.predict_chunk."""
        raise NotImplementedError

    @torch.inference_mode()
    def act(self, states: np.ndarray, images: Mapping[str, np.ndarray]) -> np.ndarray:
        """Actions (B, chunk, A) float32 for states (B, S) float32 and images, camera -> (B, H, W, 3) uint8."""
        observation = {STATE: torch.from_numpy(states).to(self._device)}
        for camera, stack in images.items():
            pixels = torch.from_numpy(stack).to(self._device)  # travels as bytes
            observation[image_key(camera)] = pixels.permute(0, 3, 1, 2).float() / 255
        return self.chunk(observation).float().cpu().numpy()


class NativeBackend(_TorchBackend):
    """act_model.py with the statistics that load_policy found."""

    name, version = "native", None

    def __init__(self, policy: LoadedPolicy, device: torch.device) -> None:
        self._policy, self._device = policy, device

    def chunk(self, observation: Mapping[str, Tensor]) -> Tensor:
        """Actions (B, chunk, A) float32 for a raw observation: see LoadedPolicy.predict_chunk."""
        return self._policy.predict_chunk(observation)


class OnnxBackend:
    """onnxruntime, on the CPU, with what runtimes.py makes of the checkpoint.

    Raises:
        PolicyError: it cannot be exported, or gives other actions.
    """

    name = "onnx"

    def __init__(self, policy: LoadedPolicy, device: torch.device) -> None:
        if device.type != "cpu":
            raise PolicyError(f"backend onnx runs on the CPU, and the device is {device.type}; use --device cpu")
        try:
            self._run = OnnxPolicy(to_onnx(policy, {}))
            self.version = version("onnxruntime")
        except ExportError as error:
            raise PolicyError(f"{policy.path}: backend onnx: {error}; or use --backend native") from None
        sigma = difference_sigma(policy, self._run)
        if not sigma <= SAME_SIGMA:
            raise PolicyError(
                f"{policy.path}: onnxruntime {self.version} gives actions {sigma:.3g} standard deviations from ours "
                f"(at most {SAME_SIGMA:g} expected); use --backend native"
            )

    def act(self, states: np.ndarray, images: Mapping[str, np.ndarray]) -> np.ndarray:
        """As _TorchBackend.act, one observation after the other."""
        one = [{camera: stack[i] for camera, stack in images.items()} for i in range(len(states))]
        return np.stack([self._run(state, seen) for state, seen in zip(states, one, strict=True)])


class LeRobotBackend(_TorchBackend):
    """lerobot.policies.act.modeling_act.ACTPolicy, with that version's own normalisation.

    Raises:
        CannotLoad: no lerobot, or its version does not read this checkpoint.
        PolicyError: weights are missing, or it does not normalise exactly once.
    """

    name = "lerobot"

    def __init__(self, policy: LoadedPolicy, device: torch.device) -> None:
        try:
            from lerobot.configs.policies import PreTrainedConfig
            from lerobot.policies.act.modeling_act import ACTPolicy

            self.version = version("lerobot")
        except (ImportError, PackageNotFoundError) as error:
            raise CannotLoad(f"lerobot cannot be imported ({error})") from None
        except Exception as error:  # noqa: BLE001 - mismatched torch and torchvision raise RuntimeError, and others
            raise CannotLoad(f"lerobot fails to import ({type(error).__name__}: {error})") from None
        self._device, this = device, f"lerobot {self.version}"
        try:
            config: Any = PreTrainedConfig.from_pretrained(policy.path, local_files_only=True)
        except Exception as error:  # noqa: BLE001 - draccus has a dozen kinds
            raise CannotLoad(f"{this} does not read this config.json ({error})") from None
        config.pretrained_backbone_weights = None  # a name here makes it download weights that are replaced at once
        config.device = str(device)
        self._policy = ACTPolicy(config)

        # from_pretrained loads what fits and says nothing of the rest (strict=False): so not through it.
        found, expected = read_tensors(policy.path / WEIGHTS_FILE), self._policy.state_dict()
        own_buffers = any(key.startswith("normalize_inputs.") for key in expected)
        if not own_buffers:  # this version normalises outside; what a union directory holds for 0.3.2 is not its own
            prefixes = tuple(name for names in buffer_names(policy.act_config) for name in names.values())
            found = {key: tensor for key, tensor in found.items() if not key.startswith(prefixes)}
        if own_buffers and not any(key.startswith("normalize_inputs.") for key in found):
            raise CannotLoad(f"{this} normalises from buffers among the weights, and {WEIGHTS_FILE} has none")
        if mismatch := describe_mismatch(expected, found):
            raise PolicyError(
                f"{policy.path / WEIGHTS_FILE}: {this} expects other tensors: {mismatch}; use a complete checkpoint"
            )
        self._policy.load_state_dict(found)
        self._policy.to(device).eval()

        self._before = self._after = lambda batch: batch
        if not own_buffers:
            if not (policy.path / PREPROCESSOR_FILE).exists():
                raise CannotLoad(f"{this} normalises in processors, and there is no {PREPROCESSOR_FILE}")
            try:
                from lerobot.policies.factory import make_pre_post_processors  # ty: ignore[missing-module-member] - 0.4+

                self._before, self._after = make_pre_post_processors(
                    self._policy.config,
                    pretrained_path=str(policy.path),
                    preprocessor_overrides={"device_processor": {"device": str(device)}},
                )
            except Exception as error:  # noqa: BLE001 - FileNotFoundError, ProcessorMigrationError, KeyError, ...
                raise CannotLoad(f"{this} does not read the processors ({type(error).__name__}: {error})") from None
        self._check_against(policy, device)

    def chunk(self, observation: Mapping[str, Tensor]) -> Tensor:
        """Actions (B, chunk, A) for a raw observation, through LeRobot's own normalisation."""
        with full_float32():
            return self._after(self._policy.predict_action_chunk(self._before(dict(observation))))

    def _check_against(self, policy: LoadedPolicy, device: torch.device) -> None:
        """Normalised exactly once? Then one observation, far from zero, gives the actions that ours gives."""
        generator = torch.Generator().manual_seed(0)
        joints = torch.randn(1, policy.act_config.state_dim, generator=generator).to(device)
        state = policy.normalizer.stats[STATE]
        observation = {STATE: state["mean"] + state["std"] * joints}
        for camera, shape in policy.image_shapes.items():
            observation[image_key(camera)] = torch.rand(1, 3, *shape, generator=generator).to(device)
        with torch.inference_mode():
            ours, theirs = policy.predict_chunk(observation), self.chunk(observation).to(device)
        std = policy.normalizer.stats[ACTION]["std"].clamp(min=1e-12)
        sigma = float(((ours - theirs).abs() / std).max()) if ours.shape == theirs.shape else float("nan")
        if not sigma <= SAME_ACTIONS_SIGMA:
            raise PolicyError(
                f"{policy.path}: lerobot {self.version} gives actions {sigma:.3g} standard deviations from those that "
                f"its statistics imply (at most {SAME_ACTIONS_SIGMA:g} expected): it does not normalise exactly once; "
                "use --backend native"
            )


# -- latency -------------------------------------------------------------------------------------------------------


@dataclass
class Latency:
    """Seconds that control steps took, by what they did.

    Taking an action from the queue ("cached pop") takes microseconds: in one list with the inferences it would make
    any policy look fast.
    """

    warm_up_s: list[float] = field(default_factory=list)
    inference_s: list[float] = field(default_factory=list)
    cached_pop_s: list[float] = field(default_factory=list)

    def report(self) -> dict[str, Any]:
        """Counts and percentiles in ms. Percentiles are observed values: p99 of fewer than 100 is the largest."""

        def milliseconds(seconds: list[float]) -> dict[str, Any]:
            if not seconds:
                return {"count": 0, "p50_ms": None, "p95_ms": None, "p99_ms": None, "max_ms": None}
            points = {f"p{p}_ms": np.percentile(seconds, p, method="higher") for p in (50, 95, 99)} | {
                "max_ms": max(seconds)
            }
            return {"count": len(seconds)} | {name: round(1e3 * float(value), 4) for name, value in points.items()}

        inference = milliseconds(self.inference_s)
        p99 = inference["p99_ms"]
        return {
            "control_hz": CONTROL_HZ,
            "realtime_30hz": None if p99 is None else p99 <= 1e3 / CONTROL_HZ,
            "inference": inference,
            "cached_pop": milliseconds(self.cached_pop_s),
            "warm_up": milliseconds(self.warm_up_s),
        }


# -- the runner ----------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class ControlStep:
    """What one control step gave and how long it took.

    Attributes:
        action: (A,) float32.
        chunk: (chunk, A) float32, all that was predicted; None when the action came from the queue.
        command_rad: (A,) float64, the joint positions to command: see RobotContract.joint_command.
        seconds: from joint state and camera images to action.
    """

    action: np.ndarray
    chunk: np.ndarray | None
    command_rad: np.ndarray
    seconds: float


class PolicyRunner:
    """A checkpoint, ready to act.

    Args:
        checkpoint: pretrained_model directory, checkpoint directory or output directory (its `last`); ours, or written
            by LeRobot 0.3.2 or 0.4+.
        backend: "lerobot", "native", "onnx", or "auto": lerobot if it is installed and reads this checkpoint, else
            native.
        device: "cpu", "cuda", "mps", or "auto": the first that is there of cuda, mps, cpu.
        mode: "chunk" executes n_action_steps of each chunk before the next inference; "every-step" infers at each
            step and executes the first action; "ensemble" infers at each step and averages over the chunks that
            speak of it; "auto" does what the checkpoint says: ensemble if it has a coefficient, else chunk.
        n_action_steps: of mode "chunk"; None takes the checkpoint's.
        said: what the checkpoint does not say (see config.read_contract).

    Attributes:
        contract: RobotContract.
        policy: lerobot_checkpoint.LoadedPolicy, with the statistics.
        backend, backend_version, device, mode, chunk_size, n_action_steps, ensemble_m: what was chosen.
        notes: lines that a person should read.

    Raises:
        CheckpointError: not a complete checkpoint with its normalisation.
        PolicyError: it cannot be run as asked.
    """

    def __init__(
        self,
        checkpoint: str | Path,
        *,
        backend: str = "auto",
        device: str = "auto",
        mode: str = "auto",
        n_action_steps: int | None = None,
        said: Mapping[str, Any] | None = None,
    ) -> None:
        for name, value, known in (("backend", backend, BACKENDS), ("device", device, DEVICES), ("mode", mode, MODES)):
            if value not in known:
                raise PolicyError(f"{name} is {value!r}; expected one of {', '.join(known)}")
        self.device = _device(device)
        self.policy = load_policy(checkpoint, self.device)  # complete, and normalised, or refused here
        self.contract = read_contract(self.policy, said or {})
        self.notes: list[str] = []

        fields = self.policy.policy_fields
        coefficient = fields["temporal_ensemble_coeff"]
        self.chunk_size = self.policy.act_config.chunk_size
        self.mode = mode if mode != "auto" else "chunk" if coefficient is None else "ensemble"
        self.n_action_steps = fields["n_action_steps"] if n_action_steps is None else n_action_steps
        if not 1 <= self.n_action_steps <= self.chunk_size:
            raise PolicyError(f"n_action_steps is {self.n_action_steps}; expected 1 to {self.chunk_size} (chunk_size)")
        self.ensemble_m = ENSEMBLE_M if coefficient is None else coefficient

        self._backend: NativeBackend | LeRobotBackend | OnnxBackend = NativeBackend(self.policy, self.device)
        if backend == "onnx":
            self._backend = OnnxBackend(self.policy, self.device)
        elif backend != "native":
            try:
                self._backend = LeRobotBackend(self.policy, self.device)
            except CannotLoad as error:
                if backend == "lerobot":
                    raise PolicyError(f"{self.policy.path}: backend lerobot: {error}; use --backend native") from None
                self.notes.append(f"backend native: {error}")
        rest_s = self.contract.rest_at_start_s
        if self.mode == "every-step" and rest_s is not None and rest_s >= LONG_REST_S:
            self.notes.append(
                f"mode every-step: the recordings begin with {rest_s:g} s of rest; an arm at rest looks the same in "
                "all those frames, and a chunk's first action hardly moves it: it may stall; use chunk or ensemble"
            )
        self.backend, self.backend_version = self._backend.name, self._backend.version

        self._latency = Latency()
        self.reset()
        self._warm_up()

    def reset(self) -> None:
        """Forget queued actions, past predictions and the last command: call at the start of every episode."""
        self._queue: deque[np.ndarray] = deque()
        self._ensembler = TemporalEnsembler(self.ensemble_m)
        self._command_rad: np.ndarray | None = None

    def fork(self) -> PolicyRunner:
        """Another runner on the same loaded policy, with a queue and a latency of its own."""
        other = copy.copy(self)
        other._latency = Latency(warm_up_s=self._latency.warm_up_s)
        other.reset()
        return other

    def predict(self, state_rad: np.ndarray, images: Mapping[str, np.ndarray]) -> np.ndarray:
        """The action for now.

        Args:
            state_rad: (S,) states in the policy's order and sign, joints in rad: RobotContract.state_from_robot() gives
                them; wrapped here if the policy needs it.
            images: camera -> (H, W, 3) uint8 RGB, of every camera of the policy; resized here as in training.

        Returns:
            (A,) float32, in contract.action_units, as contract.action_kind says.

        Raises:
            PolicyError: the observation does not fit, or the policy's answer is not finite.
        """
        return self.step(state_rad, images).action

    def step(self, state_rad: np.ndarray, images: Mapping[str, np.ndarray]) -> ControlStep:
        """predict(), and what it did and took."""
        began_s = self._now_s()
        state = self._checked(state_rad, images)
        chunk = self._as_actions(self._infer(state, images), state_rad) if self.needs_images else None
        action, command_rad = self._advance(state_rad, chunk)
        seconds = self._now_s() - began_s
        (self._latency.cached_pop_s if chunk is None else self._latency.inference_s).append(seconds)
        return ControlStep(action, chunk, command_rad, seconds)

    def command(self, state_rad: np.ndarray, images: Mapping[str, np.ndarray]) -> np.ndarray:
        """predict(), as positions to command: (A,) float64, joints in rad, on the turns of `state_rad`.

        See RobotContract.joint_command.
        """
        return self.step(state_rad, images).command_rad

    @property
    def needs_images(self) -> bool:
        """Whether the next step looks at its images; when the queue answers, an empty mapping will do."""
        return not (self.mode == "chunk" and self._queue)

    def predict_chunk(self, state_rad: np.ndarray, images: Mapping[str, np.ndarray]) -> np.ndarray:
        """(chunk, A) float32: all that the policy predicts from here; leaves queue, ensemble and latency alone."""
        state = self._checked_state(state_rad)
        self._check_images(images)
        return self._as_actions(self._infer(state, images), state_rad)

    def latency(self) -> dict[str, Any]:
        """What was measured so far, in ms.

        A control step is everything from joint state and camera images to an action in host memory: checks, resizing,
        transfer, the network, un-normalising; the device is waited for before and after. Steps that inferred, steps
        that took an action from the queue, and the warm-up at loading are counted apart. "realtime_30hz" is decided on
        the p99 of the steps that inferred, because only they can be late.
        """
        return self._latency.report()

    # What it is made of.

    def _checked(self, state_rad: np.ndarray, images: Mapping[str, np.ndarray]) -> np.ndarray:
        """The state as the policy takes it. Images may be absent, but not wrong, when the queue answers."""
        if self.needs_images or images:
            self._check_images(images)
        return self._checked_state(state_rad)

    def _as_actions(self, chunk: np.ndarray, state_rad: np.ndarray) -> np.ndarray:
        """Actions that count from the state seen as positions, before anything is queued or averaged.

        Those are relative ones, and deltas of commands, which add up from there. On the robot's own turn, on which the
        path has no seam.
        """
        if self.contract.action_mode == "absolute" or self.contract.action_kind == "delta":
            return chunk
        if self.contract.action_mode == "delta":
            chunk = np.cumsum(chunk, axis=0, dtype=np.float64)
        return (self.contract.acted_on(np.asarray(state_rad, np.float64)) + chunk).astype(np.float32)

    def _advance(self, state_rad: np.ndarray, chunk: np.ndarray | None) -> tuple[np.ndarray, np.ndarray]:
        """The action for now, from a new chunk or else from the queue, and the joint positions to command for it."""
        if chunk is None:
            action = self._queue.popleft()
        elif self.mode == "ensemble":
            action = self._ensembler.update(torch.from_numpy(chunk)[None])[0].numpy()
        else:
            action = chunk[0]
            if self.mode == "chunk":
                self._queue.extend(chunk[1 : self.n_action_steps])
        here_rad = self.contract.acted_on(np.asarray(state_rad, np.float64))
        last_rad = here_rad if self._command_rad is None else self._command_rad
        self._command_rad = self.contract.joint_command(action, here_rad, last_rad)
        return action.copy(), self._command_rad.copy()

    def _now_s(self) -> float:
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)
        elif self.device.type == "mps":
            torch.mps.synchronize()
        return time.perf_counter()

    def _warm_up(self) -> None:
        state = self.policy.stats[STATE]["mean"]
        images = {camera: np.full((*shape, 3), 128, np.uint8) for camera, shape in self.contract.cameras.items()}
        for _ in range(WARM_UP_INFERENCES):
            began_s = self._now_s()
            self._infer(state, images)
            self._latency.warm_up_s.append(self._now_s() - began_s)

    def _checked_state(self, state_rad: np.ndarray) -> np.ndarray:
        state = np.asarray(state_rad)
        expected = (self.policy.act_config.state_dim,)
        if state.shape != expected or state.dtype.kind not in "fiu":
            raise PolicyError(
                f"the state has shape {state.shape} and type {state.dtype}; expected {expected} joint positions in rad"
            )
        if not np.isfinite(state).all():
            named = self.contract.state_names or [f"joint {i}" for i in range(len(state))]
            bad = ", ".join(f"{n} {v}" for n, v in zip(named, state, strict=True) if not np.isfinite(v))
            raise PolicyError(f"the state is not finite: {bad}; the policy was not asked")
        return self.contract.wrap(state.astype(np.float64)).astype(np.float32)

    def _check_images(self, images: Mapping[str, np.ndarray]) -> None:
        cameras = self.contract.cameras
        if not isinstance(images, Mapping):
            raise PolicyError(
                f"images are {type(images).__name__}; expected {{camera: (H, W, 3) uint8 RGB}} of {', '.join(cameras)}"
            )
        if set(images) != set(cameras):
            raise PolicyError(f"images of {', '.join(images) or 'no camera'}; the policy needs {', '.join(cameras)}")
        for camera, image in images.items():
            if not isinstance(image, np.ndarray) or image.dtype != np.uint8 or image.ndim != 3 or image.shape[2] != 3:
                found = f"{image.dtype} {image.shape}" if isinstance(image, np.ndarray) else type(image).__name__
                raise PolicyError(f"camera {camera}: found {found}; expected (H, W, 3) uint8 RGB")
            if not image.size:
                raise PolicyError(f"camera {camera}: an image of {image.shape[0]}x{image.shape[1]} (HxW) has no pixels")
            if self.contract.image_resize is None and image.shape[:2] != cameras[camera]:
                raise PolicyError(
                    f"camera {camera}: images are {image.shape[0]}x{image.shape[1]}; the policy was trained on "
                    f"{cameras[camera][0]}x{cameras[camera][1]} (HxW) and never resized"
                )

    def _infer(self, state: np.ndarray, images: Mapping[str, np.ndarray]) -> np.ndarray:
        return self._infer_batch([(state, images)])[0]

    def _infer_batch(self, observed: Sequence[tuple[np.ndarray, Mapping[str, np.ndarray]]]) -> np.ndarray:
        """(B, chunk, A) float32 for B checked states (S,) and images."""
        images = {
            camera: np.stack([resize_image(seen[camera], self.contract.image_resize) for _, seen in observed])
            for camera in self.contract.cameras
        }
        chunks = self._backend.act(np.stack([state for state, _ in observed]), images)
        if not np.isfinite(chunks).all():
            raise PolicyError(
                "the policy's actions are not finite; they must not reach a robot: use another checkpoint"
            )
        return chunks


def step_together(
    runners: Sequence[PolicyRunner], states_rad: Sequence[np.ndarray], images: Sequence[Mapping[str, np.ndarray]]
) -> list[ControlStep]:
    """PolicyRunner.step for N forks of one runner, which share inferences of up to BATCH observations.

    Each gets the action that it would get alone, up to rounding. For simulations and evaluations: the steps' `seconds`
    are those of all together, and no runner's latency() counts them.

    Args:
        runners: N forks of one runner; each keeps its own queue, ensemble and last command.
        states_rad: N states (S,), joints in rad.
        images: N mappings as of PolicyRunner.predict; those of runners that do not need images may be empty.

    Raises:
        PolicyError: as PolicyRunner.step.
    """
    began_s = time.perf_counter()
    asked = [i for i, runner in enumerate(runners) if runner.needs_images]
    states = [r._checked(state, seen) for r, state, seen in zip(runners, states_rad, images, strict=True)]
    observed = [(states[i], images[i]) for i in asked]
    chunks: dict[int, np.ndarray] = {}
    for first in range(0, len(asked), BATCH):
        found = runners[0]._infer_batch(observed[first : first + BATCH])
        chunks.update(zip(asked[first : first + BATCH], found, strict=True))
    chunks = {i: runners[i]._as_actions(chunk, states_rad[i]) for i, chunk in chunks.items()}
    answers = [
        (chunks.get(i), *runner._advance(state, chunks.get(i)))
        for i, (runner, state) in enumerate(zip(runners, states_rad, strict=True))
    ]
    seconds = time.perf_counter() - began_s
    return [ControlStep(action, chunk, command_rad, seconds) for chunk, action, command_rad in answers]


def _device(name: str) -> torch.device:
    available = {"cuda": torch.cuda.is_available(), "mps": torch.backends.mps.is_available(), "cpu": True}
    if name == "auto":
        return torch.device(next(kind for kind, there in available.items() if there))
    if not available[name]:
        there = ", ".join(kind for kind, yes in available.items() if yes)
        raise PolicyError(f"device {name}: not available on this machine (found {there}); use --device auto")
    return torch.device(name)
