"""What would be found wrong hours later: every setting, and an evaluation dataset that does not fit the training.

    python check_settings.py DATASET BAGS LAUNCHER... train.py ARGUMENT...

For train-entrypoint.sh, before a download or where an evaluation follows. DATASET is a LeRobot dataset to evaluate on,
of which only meta/info.json and meta/stats.json have to be there; BAGS are recordings, to evaluate on those that the
training holds out; either is "" where it is not so. Exit code 1, with one line, when something is refused.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NoReturn

from rosbag_dataset import BagError, find_bags
from train import Config, load_config
from training.errors import ConfigError


def die(message: object) -> NoReturn:
    """End with one line."""
    print(f"error: {message}", file=sys.stderr)
    sys.exit(1)


def read(path: Path) -> dict[str, Any]:
    """A JSON object; {} if it is not there: stats.json alone can be absent."""
    try:
        content = json.loads(path.read_text())
    except FileNotFoundError:
        return {}
    except (OSError, ValueError) as error:
        die(f"{path}: cannot be read as JSON ({error}); upload the evaluation dataset again")
    return content if isinstance(content, dict) else die(f"{path}: expected a JSON object")


def mean(stats: dict[str, Any], key: str) -> list[float]:
    """A feature's means; [] if there are none."""
    values = (stats.get(key) or {}).get("mean")
    return values if isinstance(values, list) and all(isinstance(v, (int, float)) for v in values) else []


def check(dataset: Path, cfg: Config) -> None:
    """End with one line if this dataset does not fit."""
    # Whether the actions are differences or positions, as the evaluator tells it from the recorded numbers.
    stats = read(dataset / "meta/stats.json")
    action, state = mean(stats, "action"), mean(stats, "observation.state")
    far_from_state = sum(abs(a - s) for a, s in zip(action, state, strict=False))
    size = sum(map(abs, action))
    kind = "absolute" if far_from_state * 5 < size else "delta" if size * 5 < far_from_state else None
    mode = cfg.conventions.action_mode
    wanted_kind = "delta" if mode == "delta" else "absolute"  # relative ones are evaluated as positions

    info = read(dataset / "meta/info.json")
    features = info.get("features") or {}
    shape, actions = (features.get("action") or {}).get("shape"), cfg.model.action_dim
    cameras = [f"observation.images.{name}" for name in cfg.cameras]
    fps, version = info.get("fps"), str(info.get("codebase_version"))
    same_fps = isinstance(fps, (int, float)) and abs(fps / cfg.data.fps - 1) <= 0.01
    rules = [
        (version.startswith("v3."), f"codebase_version is {version}", "v3.0, the format of LeRobot 0.4"),
        (same_fps, f"fps is {fps}", f"data.fps {cfg.data.fps:g}"),
        (
            shape == [actions],
            f"the shape of action is {shape}",
            f"[{actions}], one per joint and state that is acted on",
        ),
        (set(cameras) <= set(features), f"the features are {', '.join(features)}", f"{', '.join(cameras)} among them"),
        (
            kind in (None, wanted_kind),
            f"by their means in stats.json, the actions are {kind}",
            f"{wanted_kind} ones, as conventions.action_mode={mode} has them",
        ),
    ]
    for holds, found, expected in rules:
        if not holds:
            die(f"{dataset}: the evaluation dataset does not fit the training: {found}, expected {expected}")


def check_held_out(bags: Path, cfg: Config) -> None:
    """End with one line if the training would hold out none of these recordings.

    What it holds out of recordings that are cut into episodes shows only when they are.
    """
    try:
        count = len(find_bags(bags))
    except BagError as error:
        die(error)
    if cfg.training.val_fraction == 0 or (count < 5 and cfg.data.episodes == "bag"):
        die(
            "the evaluation needs recordings that the training holds out: found training.val_fraction "
            f"{cfg.training.val_fraction:g} and {count} recordings, expected more than 0 and at least 5; or give "
            "eval_dataset"
        )


def main(dataset: str, bags: str, words: Sequence[str]) -> None:
    """Entry."""
    config = next(word for word in words if word.startswith("--config=")).partition("=")[2]
    try:
        cfg = load_config(Path(config), [w.partition("=")[2] for w in words if w.startswith("--override=")])
    except ConfigError as error:
        die(error)
    if dataset:
        check(Path(dataset), cfg)
    if bags:
        check_held_out(Path(bags), cfg)


if __name__ == "__main__":
    main(sys.argv[1], sys.argv[2], sys.argv[3:])
