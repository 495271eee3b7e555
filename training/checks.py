"""Rules between settings, which no single one can show. This room knows keys, but neither defaults nor types.

`cfg` is train.py's Config, which is not imported: imports run from train.py to here.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from rosbag_dataset import command_rules, episode_rules, setting_rules, state_rules

from .errors import ConfigError


def check_settings(cfg: Any) -> None:
    """Refuse settings that contradict each other. Raises ConfigError, naming the first, what was found and expected."""
    data, conv, model, training = cfg.data, cfg.conventions, cfg.model, cfg.training
    topics, units, cosine = data.state_topics or {}, data.state_units or {}, training.scheduler == "cosine"
    states = len(data.joint_names) + len(topics)
    actions = states - len(data.observed_only)
    ensembling, begun = model.temporal_ensemble_coeff is not None, training.init_from is not None
    counted = "the number of data.joint_names"
    if topics:
        counted += f" ({len(data.joint_names)}) and data.state_topics ({len(topics)})"
    without = f" without data.observed_only ({len(data.observed_only)})" if data.observed_only else ""
    divides = model.dim_model % model.n_heads == 0 and model.dim_model % 4 == 0
    multiple = f"a multiple of 4 and of model.n_heads {model.n_heads}"
    at_most = f"at most model.chunk_size {model.chunk_size}"
    rules: list[tuple[bool, str, Any, str]] = [  # holds, key, found, expected
        *setting_rules(
            data.joint_names, conv.joint_sign, conv.apply_joint_sign,
            conv.image_resize, cfg.cameras, data.min_used_share,
        ),
        *state_rules(data.joint_names, data.joint_topic, topics, data.observed_only, units, cfg.cameras),
        *command_rules(data.joint_names, data.joint_topic, topics, data.observed_only, data.action_source,
                       data.command_topics or {}, data.command_max_age_ms, cfg.cameras),
        *episode_rules(data),
        (model.state_dim == states, "model.state_dim", model.state_dim, f"{states}, {counted}"),
        (model.action_dim == actions, "model.action_dim", model.action_dim, f"{actions}, {counted}{without}"),
        (model.n_action_steps <= model.chunk_size, "model.n_action_steps", model.n_action_steps, at_most),
        (model.n_action_steps == 1 or not ensembling, "model.n_action_steps", model.n_action_steps,
         "1 with model.temporal_ensemble_coeff"),
        (model.dropout < 1, "model.dropout", model.dropout, "below 1"),
        (divides, "model.dim_model", model.dim_model, multiple),
        (training.lr > 0, "training.lr", training.lr, "above 0"),
        (training.val_fraction < 1, "training.val_fraction", training.val_fraction, "below 1"),
        (not begun or not _within(training.init_from, training.output_dir), "training.init_from", training.init_from,
         f"a policy outside training.output_dir {training.output_dir}, which the new run is written to"),
        (begun or training.init_stats == "new", "training.init_stats", training.init_stats,
         "new without training.init_from"),
        (begun or not training.init_partial, "training.init_partial", training.init_partial,
         "false without training.init_from"),
        (training.ema_decay is None or 0 < training.ema_decay < 1, "training.ema_decay", training.ema_decay,
         "above 0 and below 1, or null"),
        (training.min_lr <= training.lr or not cosine, "training.min_lr", training.min_lr,
         f"at most training.lr {training.lr}"),
        (training.warmup_steps < training.steps or not cosine, "training.warmup_steps", training.warmup_steps,
         f"fewer than training.steps {training.steps}"),
    ]  # fmt: skip
    for holds, dotted, found, expected in rules:
        if not holds:
            raise ConfigError(f"{dotted}: found {found}, expected {expected}")


def _within(path: str, folder: str) -> bool:
    """Whether `path` is `folder` or lies in it."""
    resolved = Path(path).resolve()
    return Path(folder).resolve() in (resolved, *resolved.parents)
