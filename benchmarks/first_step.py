"""Run train.py up to its first optimizer step and write down when what was done; the `train` stage runs it.

    python -m benchmarks.first_step OUT.json LAUNCHED_S STOP ARGUMENTS-OF-TRAIN.PY...

LAUNCHED_S is time.perf_counter() of whoever launched this (the clock is the machine's). STOP says where to end:
`before` the first step, with its batch in hand, or `after` it.
"""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any


class _Measured(BaseException):
    """Ends the run from inside the first step; train.py passes it through and closes what it has open."""


def main() -> int:
    """Run train.py to its first step and write how long each phase took, as {phase: seconds}.

    The phases are "interpreter", "import torch" (and torchvision), "other imports", "model", "bags and loader"
    (everything else before the first step), and "first step" (unless STOP is `before`).
    """
    out, launched_s, stop, *arguments = sys.argv[1:]
    phases = {"interpreter": time.perf_counter() - float(launched_s)}

    def timed(phase: str, work: Callable[..., Any]) -> Callable[..., Any]:
        def wrapper(*args: Any) -> Any:
            before_s = time.perf_counter()
            try:
                return work(*args)
            finally:
                phases[phase] = time.perf_counter() - before_s

        return wrapper

    timed("import torch", lambda: (__import__("torch"), __import__("torchvision")))()
    timed("other imports", lambda: __import__("train"))()
    import torch

    import train

    def first_step(trainer: train.Trainer, batch: dict[str, torch.Tensor]) -> None:
        phases["bags and loader"] = time.perf_counter() - float(launched_s) - sum(phases.values())
        if stop == "after":
            timed("first step", step)(trainer, batch)
            if trainer.world.device.type == "cuda":
                torch.cuda.synchronize()
        raise _Measured

    step = train.Trainer.train_step
    train.Trainer.train_step = first_step
    train.Trainer._build_model = timed("model", train.Trainer._build_model)
    try:
        return train.main(arguments) or 1  # 0 would be a run that took no step
    except _Measured:
        Path(out).write_text(json.dumps(phases))
        return 0


if __name__ == "__main__":
    sys.exit(main())
