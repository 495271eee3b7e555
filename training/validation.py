"""The policy as the robot will run it, in float32 and without dropout or latent noise, on episodes held out.

Two readers: the validation loss during training, and the summary at its end.
"""

from __future__ import annotations

from typing import Any

import torch

from act_model import ACT, full_float32, loss_terms
from lerobot_checkpoint import Normalizer
from rosbag_dataset import ChunkDataset

from .feed import to_device, to_model, to_tensors
from .ranks import World

VALIDATION_SAMPLES = 512  # held-out samples per validation, evenly spaced over the held-out episodes


def score(
    model: ACT, normalizer: Normalizer, held_out: ChunkDataset, batch_size: int, world: World
) -> tuple[float, int]:
    """Masked L1 in normalised units on evenly spaced samples, shared among the ranks; the model trains on afterwards.

    Returns:
        (mean L1 over the valid actions of all ranks, number of samples).
    """
    wanted = min(VALIDATION_SAMPLES, len(held_out))
    mine = [i * len(held_out) // wanted for i in range(wanted)][world.rank :: world.size]
    sums = torch.zeros(2, device=world.device)
    model.eval()
    with torch.inference_mode(), full_float32():
        for first in range(0, len(mine), batch_size):
            raw = to_tensors(held_out.__getitems__(mine[first : first + batch_size]))
            batch = to_model(to_device(raw, world.device), normalizer)
            prediction, _ = model.forward(batch)  # not compiled once more for another mode and batch size
            l1_sum, n_valid, _ = loss_terms(prediction, batch["action"], batch["action_is_pad"], None, None)
            sums += torch.stack([l1_sum, n_valid.to(l1_sum.dtype)])
    model.train()
    l1_sum, n_valid = world.sum(sums).tolist()
    return l1_sum / n_valid, wanted


def predict(model: ACT, normalizer: Normalizer, device: torch.device, batch: dict[str, Any]) -> torch.Tensor:
    """A raw batch, as ChunkDataset gives it -> (B, chunk, J) actions in the robot's units; the model stays in eval."""
    model.eval()
    with full_float32():
        actions, _ = model.forward(to_model(to_device(to_tensors(batch), device), normalizer))
    return normalizer.unnormalize_action(actions)
