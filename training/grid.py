"""Grids of settings: every combination of some values, each with a name of its own. For sweeps, on OSMO or here.

    python -m training.grid training.lr=1e-5,5e-5,1e-4 training.kl_weight=10,1

prints an arm per line, NAME:SETTING;SETTING, as osmo/osmo-workflow-sweep.yaml takes them. The first setting varies
fastest. A grid may also be a YAML file of lists, as grid.example.yaml. This room knows no schema: whether a setting
exists, and what it may be, train.py says when it starts.
"""

from __future__ import annotations

import itertools
import re
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rosbag_dataset import SettingError, parse_yaml

from .errors import ConfigError

EXAMPLE = "training.lr=1e-5,5e-5,1e-4 training.kl_weight=10,1"
SHORT = {"training.kl_weight": "kl"}  # in names; any other setting is called by its last part
MAX_ARMS = 19  # with the task that compares them, 20: OSMO takes so many in a workflow
MAX_NAME = 51  # characters of `train-NAME-group`, which may have 63 on OSMO
MAX_FILE_NAME = 200  # of a folder that is called so, with a little behind it
BETWEEN_VALUES = re.compile(r",(?![^\[{]*[\]}])")  # a comma, but not one in a list or mapping
UNSAFE = re.compile(r"[\"'\\;\s]")  # would end a text, or the setting, in the workflow


@dataclass(frozen=True)
class Arm:
    """One run of a sweep: its name (letters, digits, _ and -), and its settings as --override takes them."""

    name: str
    settings: tuple[str, ...]

    def __str__(self) -> str:
        return f"{self.name}:{';'.join(self.settings)}"


def parse_grid(text: str, osmo: bool = True) -> list[Arm]:
    """Every combination of `key=value,value,... key=value,...`, the first key varying fastest.

    Args:
        text: the grid, or the path of a YAML file, which has lists of values, by key.
        osmo: refuse more arms, and longer names, than OSMO takes.

    Raises:
        ConfigError: what is no axis, a key or a value given twice, two arms of one name, more than OSMO takes.
    """
    axes: dict[str, list[str]] = {}
    for key, values in _axes_of_file(Path(text)) if text.endswith((".yaml", ".yml")) else map(_axis, text.split()):
        listed = ",".join(values)
        if not (re.fullmatch(r"\w+\.\w+", key) and values and all(values)):
            found = f"{key}={listed}" if values else key
            raise ConfigError(f"grid: found {found}, expected section.key=value,value,... for example {EXAMPLE}")
        if unsafe := UNSAFE.search(listed):
            raise ConfigError(
                f"grid: {key}={listed}: found {unsafe[0]}, expected values without quotes, backslashes and ;"
            )
        if key in axes:
            raise ConfigError(f"grid: {key}: found it twice, expected each key once, with all its values")
        meant = [_meaning(value) for value in values]
        if len(set(meant)) < len(meant):
            raise ConfigError(f"grid: {key}={listed}: found a value twice, expected values that all differ")
        axes[key] = values
    if not axes:
        raise ConfigError(f"grid: found nothing, expected for example {EXAMPLE}")
    arms = []
    for reversed_values in itertools.product(*reversed(axes.values())):
        pairs = list(zip(axes, reversed(reversed_values), strict=True))
        name = "-".join(SHORT.get(key, key.rpartition(".")[2]) + _label(value) for key, value in pairs)
        arms.append(Arm(name, tuple(f"{key}={value}" for key, value in pairs)))
    _check(arms, osmo)
    return arms


def _axis(text: str) -> tuple[str, list[str]]:
    key, equals, listed = text.partition("=")
    return key, BETWEEN_VALUES.split(listed) if equals else []


def _axes_of_file(path: Path) -> list[tuple[str, list[str]]]:
    try:
        content = parse_yaml(path.read_text(), str(path))
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"grid: {path}: cannot read it ({getattr(error, 'strerror', None) or error})") from None
    except SettingError as error:
        raise ConfigError(f"grid: {error}") from None
    if not isinstance(content, dict) or not all(isinstance(values, list) for values in content.values()):
        raise ConfigError(f"grid: {path}: found {str(content)[:60]}, expected section.key: [value, value, ...]")
    return [(key, [_written(value) for value in values]) for key, values in content.items()]


def _written(value: Any) -> str:
    """A value of a YAML file as --override takes it: a list as [a,b]."""
    return f"[{','.join(map(_written, value))}]" if isinstance(value, list) else str(value)


def _check(arms: list[Arm], osmo: bool) -> None:
    if osmo and len(arms) > MAX_ARMS:
        raise ConfigError(
            f"grid: found {len(arms)} runs, expected at most {MAX_ARMS}, which OSMO takes with their comparison"
        )
    by_name: dict[str, Arm] = {}
    for arm in arms:
        most = MAX_NAME if osmo else MAX_FILE_NAME
        if len(arm.name) > most:
            raise ConfigError(f"grid: {arm.name}: found a name of {len(arm.name)}, expected at most {most} characters")
        other = by_name.setdefault(arm.name.lower(), arm)
        if other is not arm:
            raise ConfigError(
                f"grid: found {other} and {arm}, expected runs whose names differ, too; write a value otherwise"
            )


def _number(value: str) -> float | None:
    return float(value) if re.fullmatch(r"[+-]?(\d+\.?\d*|\.\d+)([eE][+-]?\d+)?", value) else None


def _meaning(value: str) -> float | str:
    """What makes two values the same: 1e-4 is 0.0001."""
    number = _number(value)
    return value.lower() if number is None else number


def _label(value: str) -> str:
    """A value in a name: 1e-5 is 1e5, 0.5 is 0_5, [240,320] is 240_320; of a number the same, however it is written."""
    number = _number(value)
    if number is None:
        return re.sub(r"[^A-Za-z0-9]+", "_", value).strip("_")
    text = f"{number:.9g}"
    if 0 < abs(number) < 0.01:
        digits, power = f"{number:.8e}".split("e")
        text = f"{digits.rstrip('0').rstrip('.')}e{int(power)}"
    return text.replace("e-", "e").replace("e+", "ep").replace("-", "m").replace(".", "_")


def main(arguments: Sequence[str]) -> int:
    """Entry of `python -m training.grid`. Exit code 0, or 1 with one line."""
    try:
        arms = parse_grid(" ".join(arguments))
    except ConfigError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    print(*arms, sep="\n")
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
