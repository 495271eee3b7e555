"""Write a policy as one file for another runtime.

    python -m ur10e_deploy.export --checkpoint outputs/train-rosbag-act --format onnx --output policy.onnx
    python -m ur10e_deploy.export --checkpoint outputs/train-rosbag-act --format torch-export --output policy.pt2

What is written is loaded again by the runtime that it is for, and compared with the checkpoint before it is kept. What
the file takes and gives: runtimes.py.
"""

from __future__ import annotations

import dataclasses
import os
import sys
from pathlib import Path

import torch

from lerobot_checkpoint import CheckpointError

from .offline_eval import ArgumentParser
from .policy_runner import PolicyError, PolicyRunner
from .runtimes import (
    CHECKED,
    SAME_SIGMA,
    ExportError,
    OnnxPolicy,
    difference_sigma,
    median_ms,
    native,
    to_onnx,
    to_torch_export,
    torch_export_policy,
)

FORMATS = ("onnx", "torch-export")


def main(argv: list[str] | None = None) -> int:
    """Entry of `python -m ur10e_deploy.export`. Exit code 0: written; 1: not, with one line."""
    p = ArgumentParser(prog="python -m ur10e_deploy.export", description="Write a policy for another runtime.")
    p.add_argument("--checkpoint", type=Path, required=True, help="output, checkpoint or pretrained_model directory")
    p.add_argument("--format", choices=FORMATS, required=True)
    p.add_argument("--output", type=Path, required=True, help="the file; one that is there is replaced")
    args = p.parse_args(argv)
    try:
        runner = PolicyRunner(args.checkpoint, backend="native", device="cpu")
        contract = {k: v for k, v in dataclasses.asdict(runner.contract).items() if k != "data_settings"}
        onnx = args.format == "onnx"
        content = (to_onnx if onnx else to_torch_export)(runner.policy, contract)
        run = OnnxPolicy(content) if onnx else torch_export_policy(content)
        sigma = difference_sigma(runner.policy, run)
        if not sigma <= SAME_SIGMA:
            raise ExportError(
                f"{args.checkpoint}: as {args.format} its actions are {sigma:.3g} standard deviations from the "
                f"checkpoint's, expected at most {SAME_SIGMA:g}; nothing was written"
            )
        ours_ms, theirs_ms = median_ms(runner.policy, native(runner.policy)), median_ms(runner.policy, run)
        args.output.parent.mkdir(parents=True, exist_ok=True)
        partial = args.output.with_name(f".{args.output.name}.partial")
        partial.write_bytes(content)
        os.replace(partial, args.output)
    except (CheckpointError, PolicyError, ExportError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    except OSError as error:
        print(f"error: {error.filename or args.output}: {error.strerror or error}", file=sys.stderr)
        return 1
    print(f"  policy      {runner.policy.path}")
    print(f"  difference  {sigma:.1e} standard deviations of the action, at most, on {CHECKED} made-up observations")
    print(f"  inference   {theirs_ms:.1f} ms, as a checkpoint {ours_ms:.1f} ms ({torch.get_num_threads()} threads)")
    print(f"  written     {args.output} ({len(content) / 1e6:.1f} MB)")
    return 0


if __name__ == "__main__":
    sys.exit(main())
