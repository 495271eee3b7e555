"""Grids of settings: every combination of some values, each with a name of its own. For sweeps, on OSMO or here.

    python -m training.grid training.lr=1e-5,5e-5,1e-4 training.kl_weight=10,1

prints an arm per line, NAME:SETTING;SETTING, as osmo/osmo-workflow-sweep.yaml takes them. The first setting varies
fastest. This room knows no schema: whether a setting exists, and what it may be, train.py says when it starts.
"""

from __future__ import annotations

import itertools
import re
import sys
from collections.abc import Sequence
from dataclasses import dataclass

from .errors import ConfigError

EXAMPLE = "training.lr=1e-5,5e-5,1e-4 training.kl_weight=10,1"
SHORT = {"training.kl_weight": "kl"}  # in names; any other setting is called by its last part
MAX_ARMS = 19  # with the task that compares them, 20: OSMO takes so many in a workflow
MAX_NAME = 51  # characters of `train-NAME-group`, which may have 63 on OSMO
BETWEEN_VALUES = re.compile(r",(?![^\[{]*[\]}])")  # a comma, but not one in a list or mapping
UNSAFE = re.compile(r"[\"'\\;\s]")  # would end a text, or the setting, in the workflow


@dataclass(frozen=True)
class Arm:
    """One run of a sweep: its name (letters, digits, _ and -), and its settings as --override takes them."""

    name: str
    settings: tuple[str, ...]

    def __str__(self) -> str:
        return f"{self.name}:{';'.join(self.settings)}"


def parse_grid(text: str) -> list[Arm]:
    """Every combination of `key=value,value,... key=value,...`, the first key varying fastest.

    Raises:
        ConfigError: what is no axis, a key or a value given twice, two arms of one name, more than OSMO takes.
    """
    axes: dict[str, list[str]] = {}
    for axis in text.split():
        key, equals, listed = axis.partition("=")
        values = BETWEEN_VALUES.split(listed)
        if not (re.fullmatch(r"\w+\.\w+", key) and equals and all(values)):
            raise ConfigError(f"grid: found {axis}, expected section.key=value,value,... for example {EXAMPLE}")
        if unsafe := UNSAFE.search(listed):
            raise ConfigError(f"grid: {axis}: found {unsafe[0]}, expected values without quotes, backslashes and ;")
        if key in axes:
            raise ConfigError(f"grid: {key}: found it twice, expected each key once, with all its values")
        meant = [_meaning(value) for value in values]
        if len(set(meant)) < len(meant):
            raise ConfigError(f"grid: {axis}: found a value twice, expected values that all differ")
        axes[key] = values
    if not axes:
        raise ConfigError(f"grid: found nothing, expected for example {EXAMPLE}")
    arms = []
    for reversed_values in itertools.product(*reversed(axes.values())):
        pairs = list(zip(axes, reversed(reversed_values), strict=True))
        name = "-".join(SHORT.get(key, key.rpartition(".")[2]) + _label(value) for key, value in pairs)
        arms.append(Arm(name, tuple(f"{key}={value}" for key, value in pairs)))
    _check(arms)
    return arms


def _check(arms: list[Arm]) -> None:
    if len(arms) > MAX_ARMS:
        raise ConfigError(
            f"grid: found {len(arms)} runs, expected at most {MAX_ARMS}, which OSMO takes with their comparison"
        )
    by_name: dict[str, Arm] = {}
    for arm in arms:
        if len(arm.name) > MAX_NAME:
            raise ConfigError(
                f"grid: {arm.name}: found a name of {len(arm.name)}, expected at most {MAX_NAME} characters"
            )
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
