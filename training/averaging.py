"""An exponential moving average of the weights while they are trained (training.ema_decay), which is then the policy.

The average is what is validated, scored, summed up, and written for LeRobot and the robot; the weights that the
optimizer goes on with lie in the training state beside it. This room knows weights and the number of a step.
"""

from __future__ import annotations

import copy
from collections.abc import Mapping
from typing import Any

import torch

from act_model import ACT

# The decay of step n is 1 - n^-0.75 until it reaches ema_decay: 0 in the first step, so that the start leaves no trace,
# 0.9 in step 22, 0.99 in step 465, 0.999 in step 10,000. It is the warm-up of Diffusion Policy (Chi et al. 2023; its
# EMAModel, after K. Crowson, with inv_gamma 1 and power 0.75), which LeRobot's --ema.enable has as well.
WARM_UP_POWER = 0.75

OWN_WEIGHTS = "own_weights"  # in a training state: the weights that are trained, where the policy is their average


class Average:
    """What is the policy: an average of `model`'s weights, or, without a decay, the model itself.

    Args:
        model: is trained; every rank averages its own copy of the same weights.
        decay: how much of the average stays in a step, below 1; None for no average.

    Attributes:
        policy: the network to evaluate and to save.
    """

    def __init__(self, model: ACT, decay: float | None) -> None:
        self.model, self.decay = model, decay
        self.policy = model if decay is None else copy.deepcopy(model).requires_grad_(False)

    @torch.no_grad()
    def update(self, step: int) -> None:
        """Take in the weights after optimizer step `step`, counted from 1; ACT's buffers are constant."""
        if self.decay is not None:
            decay = min(self.decay, 1 - step**-WARM_UP_POWER)
            torch._foreach_lerp_(list(self.policy.parameters()), list(self.model.parameters()), 1 - decay)

    def state(self) -> dict[str, Any]:
        """What a training state needs beside the policy to go on."""
        return {} if self.decay is None else {OWN_WEIGHTS: self.model.state_dict()}

    def resume(self, state: Mapping[str, Any]) -> None:
        """Go on from a training state; `model` already holds the weights of its policy.

        An average that was not kept before begins with these; one that is no longer kept is dropped.
        """
        self.policy.load_state_dict(self.model.state_dict())
        self.model.load_state_dict(state.get(OWN_WEIGHTS, self.model.state_dict()))
