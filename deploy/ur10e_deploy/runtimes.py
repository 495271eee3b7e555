"""A policy as one file for another runtime: raw observation in, actions in the robot's units out.

The file holds the network and its normalisation. Its inputs are `state`, (1, S) float32 as RobotContract.wrap leaves
it, and `image_CAMERA` for each camera, (1, H, W, 3) uint8 RGB at the size that the network sees; its output `actions`
is (1, chunk, A) float32, as PolicyRunner.predict_chunk has them but for relative ones, which stay offsets. The robot's
contract lies in the file as JSON, under "contract".
"""

from __future__ import annotations

import contextlib
import copy
import io
import json
import logging
import tempfile
import time
import warnings
from collections.abc import Callable, Generator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from act_model import ACTION, STATE
from lerobot_checkpoint import LoadedPolicy, Normalizer, image_key

CONTRACT = "contract"  # the name under which a file holds the robot's contract
# How far an exported file's actions may be from the checkpoint's, in standard deviations of the action: rounding.
SAME_SIGMA = 1e-4
MISSING = "the package {} is not installed; run: pip install onnx onnxscript onnxruntime"
CHECKED, TIMED = 5, 30  # observations that a file is compared on, and inferences that it is timed over


class ExportError(Exception):
    """A policy that cannot be exported as asked: one line, with what to do."""

    def __init__(self, message: str) -> None:
        super().__init__(" ".join(message.split()))


class Deployable(nn.Module):
    """A loaded policy as a module of tensors, on the CPU: its normalisation inside, pictures as a camera gives them."""

    def __init__(self, policy: LoadedPolicy) -> None:
        super().__init__()
        self.model = copy.deepcopy(policy.model).cpu().eval()  # the policy's own stays where it is
        self._normalizer, self._cameras = Normalizer(policy.stats), list(policy.image_shapes)

    def forward(self, state: Tensor, *images: Tensor) -> Tensor:
        """Actions (1, chunk, A) float32 for a state (1, S) float32 and each camera's (1, H, W, 3) uint8."""
        batch = {STATE: state}
        for camera, image in zip(self._cameras, images, strict=True):
            batch[image_key(camera)] = image.permute(0, 3, 1, 2).float() / 255
        actions, _ = self.model(self._normalizer.normalize(batch))
        return self._normalizer.unnormalize_action(actions)


def inputs_of(policy: LoadedPolicy, generator: np.random.Generator) -> tuple[np.ndarray, dict[str, np.ndarray]]:
    """A made-up observation that is not unlike training: a state (S,) float32, {camera: (H, W, 3) uint8}."""
    stats = policy.stats[STATE]
    state = np.asarray(stats["mean"]) + np.asarray(stats["std"]) * generator.standard_normal(len(stats["mean"]))
    shapes = policy.image_shapes.items()
    return state.astype(np.float32), {c: generator.integers(0, 256, (*shape, 3), np.uint8) for c, shape in shapes}


def to_onnx(policy: LoadedPolicy, contract: Mapping[str, Any]) -> bytes:
    """The policy as an ONNX model.

    Raises:
        ExportError: the packages for it are not installed.
    """
    try:
        import onnx
        import onnxscript  # noqa: F401 - what torch.onnx exports with
    except ImportError as error:
        raise ExportError(MISSING.format(error.name)) from None
    example = _tensors(*inputs_of(policy, np.random.default_rng(0)))
    with _quiet(), tempfile.TemporaryDirectory() as folder:
        file = Path(folder, "policy.onnx")
        names = ["state", *(f"image_{camera}" for camera in policy.image_shapes)]
        module = Deployable(policy)
        torch.onnx.export(
            module, example, str(file), input_names=names, output_names=["actions"], dynamo=True, external_data=False
        )
        model = onnx.load(str(file))
    onnx.helper.set_model_props(model, {CONTRACT: json.dumps(contract)})
    return model.SerializeToString()


def to_torch_export(policy: LoadedPolicy, contract: Mapping[str, Any]) -> bytes:
    """The policy as a program of torch.export."""
    example = _tensors(*inputs_of(policy, np.random.default_rng(0)))
    with _quiet():
        program = torch.export.export(Deployable(policy), example)
        buffer = io.BytesIO()
        torch.export.save(program, buffer, extra_files={CONTRACT: json.dumps(contract)})
    return buffer.getvalue()


class OnnxPolicy:
    """An exported policy in onnxruntime, on the CPU.

    Raises:
        ExportError: onnxruntime is not installed, or does not run it.
    """

    def __init__(self, content: bytes) -> None:
        try:
            import onnxruntime as runtime
        except ImportError as error:
            raise ExportError(MISSING.format(error.name)) from None
        options = runtime.SessionOptions()
        options.intra_op_num_threads = torch.get_num_threads()
        options.log_severity_level = 3  # errors
        try:
            self._session = runtime.InferenceSession(content, options, providers=["CPUExecutionProvider"])
        except Exception as error:  # noqa: BLE001 - onnxruntime has a dozen kinds
            raise ExportError(f"onnxruntime does not run it ({error})") from None

    def __call__(self, state: np.ndarray, images: Mapping[str, np.ndarray]) -> np.ndarray:
        """(chunk, A) float32 for a state (S,) float32 and images, camera -> (H, W, 3) uint8."""
        feeds = {"state": state[None]} | {f"image_{camera}": image[None] for camera, image in images.items()}
        return np.asarray(self._session.run(["actions"], feeds)[0])[0]


def torch_export_policy(content: bytes) -> Callable[[np.ndarray, Mapping[str, np.ndarray]], np.ndarray]:
    """The same as OnnxPolicy for a program of torch.export."""
    module = torch.export.load(io.BytesIO(content)).module()

    def run(state: np.ndarray, images: Mapping[str, np.ndarray]) -> np.ndarray:
        with torch.inference_mode():
            return module(*_tensors(state, images))[0].numpy()

    return run


def difference_sigma(policy: LoadedPolicy, run: Callable[..., np.ndarray]) -> float:
    """The largest difference between an exported policy's actions and the checkpoint's own, on made-up observations.

    In standard deviations of the action; nan if the shapes differ.
    """
    generator, std, worst = np.random.default_rng(1), np.maximum(policy.stats[ACTION]["std"], 1e-12), 0.0
    for _ in range(CHECKED):
        state, images = inputs_of(policy, generator)
        ours, theirs = native(policy)(state, images), run(state, images)
        if ours.shape != theirs.shape:
            return float("nan")
        worst = max(worst, float((np.abs(ours - theirs) / std).max()))
    return worst


def native(policy: LoadedPolicy) -> Callable[[np.ndarray, Mapping[str, np.ndarray]], np.ndarray]:
    """The same as OnnxPolicy for the checkpoint itself."""

    def run(state: np.ndarray, images: Mapping[str, np.ndarray]) -> np.ndarray:
        tensors = {image_key(c): torch.from_numpy(i[None]).permute(0, 3, 1, 2).float() / 255 for c, i in images.items()}
        return policy.predict_chunk({STATE: torch.from_numpy(state[None]), **tensors})[0].numpy()

    return run


def median_ms(policy: LoadedPolicy, run: Callable[..., np.ndarray]) -> float:
    """The median time of an inference, in ms, over TIMED of them after a few to warm up."""
    state, images = inputs_of(policy, np.random.default_rng(2))
    seconds = []
    for _ in range(TIMED + 3):
        began_s = time.perf_counter()
        run(state, images)
        seconds.append(time.perf_counter() - began_s)
    return 1e3 * float(np.median(seconds[3:]))


def _tensors(state: np.ndarray, images: Mapping[str, np.ndarray]) -> tuple[Tensor, ...]:
    return (torch.from_numpy(state[None]), *(torch.from_numpy(image[None]) for image in images.values()))


@contextlib.contextmanager
def _quiet() -> Generator[None]:
    """Without the exporters' progress, which speaks of their own insides."""
    level = logging.root.manager.disable
    logging.disable(logging.WARNING)
    try:
        with warnings.catch_warnings(), contextlib.redirect_stdout(io.StringIO()):
            warnings.simplefilter("ignore")
            yield
    finally:
        logging.disable(level)
