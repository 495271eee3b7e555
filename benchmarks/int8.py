"""Would int8 be worth offering? The exported ONNX policy as it is, and with its weights quantised dynamically.

    python -m benchmarks.int8                                             # the default model, random weights
    python -m benchmarks.int8 --checkpoint outputs/demo --episodes 200    # also in closed loop; after make demo

Three figures of each: the processor time of an inference on one thread, in turn; how far its actions are from the
checkpoint's, in standard deviations of the action; how often it does the simulated task, on scenes that no recording
has. PolicyRunner refuses a policy that gives other actions than the checkpoint (runtimes.SAME_SIGMA): here it may drive
all the same.
"""

from __future__ import annotations

import argparse
import functools
import logging
import shutil
import statistics
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime
import torch
from onnxruntime.quantization import QuantType, quantize_dynamic
from onnxruntime.quantization.shape_inference import quant_pre_process
from ur10e_deploy import runtimes
from ur10e_deploy.policy_runner import OnnxBackend, PolicyError, PolicyRunner

from act_model import ACTION
from benchmarks import common
from benchmarks.common import BenchmarkError, Report, say
from lerobot_checkpoint import LoadedPolicy, load_policy
from sim.closed_loop import POLICY, Runs, check_policy
from sim.rollout_measures import measure, summarise
from sim.world import CONTROL_HZ, TIMEOUT_S, Conditions, World

SEED = 1000  # of the scenes: that of sim.rollout
INFERENCES = 50  # in each round
PRODUCTS = ["MatMul", "Gemm"]
# What onnxruntime can quantise here. Convolutions need unsigned weights: it has no other kernel for them on a CPU.
KINDS: dict[str, dict[str, Any] | None] = {
    "float32": None,
    "int8 products": dict(op_types_to_quantize=PRODUCTS, weight_type=QuantType.QInt8),
    "int8 products, per channel": dict(
        op_types_to_quantize=PRODUCTS, weight_type=QuantType.QInt8, per_channel=True, reduce_range=True
    ),
    "int8 products and convolutions": dict(
        op_types_to_quantize=[*PRODUCTS, "Conv"], weight_type=QuantType.QUInt8, per_channel=False
    ),
}


def quantised(content: bytes, how: dict[str, Any] | None) -> bytes:
    """An ONNX model with its weights in 8 bits, its activations quantised as they come; as it is for None."""
    if how is None:
        return content
    level = logging.root.manager.disable
    logging.disable(logging.WARNING)
    try:
        with tempfile.TemporaryDirectory() as folder:
            given, prepared, made = (Path(folder, f"{name}.onnx") for name in ("given", "prepared", "made"))
            given.write_bytes(content)
            quant_pre_process(given, prepared, skip_symbolic_shape=True)
            quantize_dynamic(prepared, made, **how)
            return made.read_bytes()
    finally:
        logging.disable(level)


def errors_sigma(policy: LoadedPolicy, run: runtimes.OnnxPolicy, observations: int = 20) -> np.ndarray:
    """Differences (N, chunk, A) from the checkpoint's actions on made-up observations, in deviations of the action."""
    generator, ours = np.random.default_rng(1), runtimes.native(policy)
    seen = [runtimes.inputs_of(policy, generator) for _ in range(observations)]
    return np.stack([run(*each) - ours(*each) for each in seen]) / np.maximum(policy.stats[ACTION]["std"], 1e-12)


class Driven(OnnxBackend):
    """A backend that runs what it is given, whatever its actions are."""

    def __init__(self, run: runtimes.OnnxPolicy) -> None:
        self._run = run


def success_rate(runner: PolicyRunner, run: runtimes.OnnxPolicy, episodes: int) -> dict[str, Any]:
    """What sim.rollout says of the policy when `run` answers for it."""
    runner._backend = Driven(run)
    ((height, width),) = runner.contract.cameras.values()
    control_hz = runner.contract.fps or CONTROL_HZ
    runs = Runs(runner, lambda episode, how: World(SEED, episode, height, width, how, control_hz), TIMEOUT_S)
    runs.policy(POLICY, list(range(episodes)), Conditions())
    return summarise([measure(world) for world in runs.worlds[POLICY]])


def int8(options: argparse.Namespace) -> None:
    """Latency, error and success of the exported policy in float32 and in int8."""
    report = Report("int8")
    torch.set_num_threads(1)  # as in sim.rollout
    folder = options.out / "int8"
    try:
        if options.checkpoint is None:
            cfg, size = common.config(options), (options.height, options.width)
            policy = load_policy(common.random_checkpoint(cfg, folder, size), torch.device("cpu"))
        else:
            runner = PolicyRunner(options.checkpoint, backend="native", device="cpu")
            policy = runner.policy
            check_policy(runner)
        say("exporting")
        content = runtimes.to_onnx(policy, {})
    except (PolicyError, runtimes.ExportError) as error:
        raise BenchmarkError(f"int8: {error}") from None
    models = {kind: quantised(content, how) for kind, how in KINDS.items()}
    policies = {kind: runtimes.OnnxPolicy(model) for kind, model in models.items()}
    seen = runtimes.inputs_of(policy, np.random.default_rng(0))

    def median_ms(run: runtimes.OnnxPolicy) -> float:
        times_s = []
        for _ in range(INFERENCES + 3):
            before_s = time.process_time()
            run(*seen)
            times_s.append(time.process_time() - before_s)
        return 1e3 * statistics.median(times_s[3:])

    measures = {kind: functools.partial(median_ms, run) for kind, run in policies.items()}
    p50_ms = common.alternate(options.rounds, measures)
    for kind, run in policies.items():
        report.row(f"{kind}: processor time", p50_ms[kind], "ms")
        if kind != "float32":
            report.ratio(f"{kind}: speed to float32", p50_ms["float32"], p50_ms[kind])
        errors = errors_sigma(policy, run)
        report.row(f"{kind}: largest error", [float(np.abs(errors).max())], "deviations")
        report.row(f"{kind}: root mean square error", [float(np.sqrt((errors**2).mean()))], "deviations")
        report.row(f"{kind}: file", [len(models[kind]) / 1e6], "MB")
        if options.checkpoint is not None and options.episodes:
            say(f"  {options.episodes} scenes: {kind}")
            summary = success_rate(runner, run, options.episodes)
            report.row(f"{kind}: success", [100 * summary["success_rate"]], "%")
            report.row(f"{kind}: least distance, median", [1e3 * summary["least_distance_median_m"]], "mm")
    shutil.rmtree(folder, ignore_errors=True)
    report.note(
        f"onnxruntime {onnxruntime.__version__}, one thread, batch 1, {options.rounds} rounds of {INFERENCES}; errors "
        f"over 20 made-up observations; {policy.path if options.checkpoint else 'random weights'}."
    )
    report.finish(options)


def main(argv: Sequence[str] | None = None) -> int:
    """The command line; returns the exit status."""
    parser = common.Parser(prog="python -m benchmarks.int8", description="A quantised policy beside the exported one.")
    common.add_options(parser)
    parser.add_argument("--checkpoint", type=Path, help="a policy of the simulated cell; without it random weights")
    parser.add_argument(
        "--episodes", type=common.whole_number(0), default=200, help="scenes in closed loop (default: %(default)s)"
    )
    return common.run_stages(parser.parse_args(argv), [int8])


if __name__ == "__main__":
    raise SystemExit(main())
