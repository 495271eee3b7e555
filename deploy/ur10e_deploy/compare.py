"""Which of several evaluated policies is the best? One table, best first, and a picture of it.

    python -m ur10e_deploy.compare outputs/eval-*                         # folders that offline_eval wrote
    python -m ur10e_deploy.compare outputs/eval-a outputs/eval-b --output comparison.png
    python -m ur10e_deploy.compare outputs/eval-* --max-mae 0.002     # exit 3 when even the best one is above: a gate

Errors on different recordings say nothing about which policy is better: evaluations are ranked only among those of
the same frames of the same data, with the same kind of action, and the table says where there are several such groups.

Exit code 0: done; 1: bad input, with one line; 3: the best evaluation, that with the lowest MAE, exceeds a limit.
"""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from . import report
from .offline_eval import EXIT_GATE, ArgumentParser


class CompareError(Exception):
    """Results that cannot be compared: one line, with what to do."""


def read_summary(folder: Path) -> dict[str, Any]:
    """summary.json of an evaluation, with "folder" added.

    Raises:
        CompareError: there is none, or it is not one.
    """
    path = folder / "summary.json"
    try:
        summary = json.loads(path.read_bytes())
        for key in ("error", "latency", "policy", "dataset", "selection", "frames", "unit", "contract"):
            summary[key]
    except (FileNotFoundError, NotADirectoryError):
        raise CompareError(
            f"{path}: not there; expected a folder that offline_eval wrote to the end (summary.json comes last)"
        ) from None
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise CompareError(f"{path}: not an evaluation's summary ({error!r}); run offline_eval again") from None
    return summary | {"folder": str(folder)}


def group(summaries: Sequence[dict[str, Any]]) -> list[list[dict[str, Any]]]:
    """Evaluations of the same frames with the same kind of action, best (lowest MAE) first; largest group first."""
    groups: dict[str, list[dict[str, Any]]] = {}
    for summary in summaries:
        same = [summary[key] for key in ("selection", "frames", "unit")]
        same += [summary["dataset"]["sha256"], summary["contract"]["fps"]]
        groups.setdefault(json.dumps(same, sort_keys=True), []).append(summary)
    ranked = [sorted(members, key=lambda s: s["error"]["policy"]["mae"]) for members in groups.values()]
    return sorted(ranked, key=len, reverse=True)


def labels(summaries: Sequence[dict[str, Any]]) -> list[str]:
    """What tells the evaluations apart: their folders, without what all paths share."""
    paths = [Path(summary["folder"]).resolve() for summary in summaries]
    common = len(Path(os.path.commonpath(paths)).parts) if len(paths) > 1 else len(paths[0].parts) - 1
    return [str(Path(*path.parts[common:])) if path.parts[common:] else path.name for path in paths]


def table(members: Sequence[dict[str, Any]], names: Sequence[str]) -> str:
    """One row per evaluation."""
    rows = [("", "evaluation", "MAE", "RMSE", "largest", "of baseline", "p99 ms", "30 Hz", "step", "mode", "backend")]
    for place, (summary, name) in enumerate(zip(members, names, strict=True), 1):
        error, policy, latency = summary["error"]["policy"], summary["policy"], summary["latency"]
        baseline = min(of["mae"] for key, of in summary["error"].items() if key != "policy")
        rows.append((
            str(place), name, f"{error['mae']:.6f}", f"{error['rmse']:.6f}", f"{error['max']:.5f}",
            f"{error['mae'] / baseline:.2f} x" if baseline else "-", f"{latency['inference']['p99_ms']:.1f}",
            "yes" if latency["realtime_30hz"] else "no", str(policy["step"] if policy["step"] is not None else "-"),
            policy["mode"], " ".join(filter(None, (policy["backend"], policy["backend_version"], policy["device"]))),
        ))  # fmt: skip
    widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]
    left = (1, 9, 10)
    return "\n".join(
        "  ".join(
            c.ljust(w) if i in left else c.rjust(w) for i, (c, w) in enumerate(zip(row, widths, strict=True))
        ).rstrip()
        for row in rows
    )


def gates(groups: Sequence[Sequence[dict[str, Any]]], limits: dict[str, float | None]) -> list[tuple[str, bool]]:
    """Each limit that is given, as a line about the best evaluation, and whether that passed.

    Args:
        groups: from group().
        limits: --max-mae and --max-p99-ms, None where it is not given.

    Raises:
        CompareError: there are limits, and several groups: none of their best ones is the best of all.
    """
    given = {option: limit for option, limit in limits.items() if limit is not None}
    if given and len(groups) > 1:
        raise CompareError(
            f"{', '.join(given)}: evaluations of {len(groups)} different sets of frames, expected one, in which one "
            "is the best; evaluate all on the same recordings"
        )
    best = groups[0][0]
    found = {"--max-mae": best["error"]["policy"]["mae"], "--max-p99-ms": best["latency"]["inference"]["p99_ms"]}
    return [
        (f"{o} {x:g}: {'passed' if found[o] <= x else 'EXCEEDED'} by the best ({found[o]:.4g})", found[o] <= x)
        for o, x in given.items()
    ]


def main(argv: Sequence[str] | None = None) -> int:
    """Entry of `python -m ur10e_deploy.compare`. Exit codes: see the top of this file."""
    parser = ArgumentParser(prog="python -m ur10e_deploy.compare", description="Rank evaluations, best first.")
    parser.add_argument("results", type=Path, nargs="+", metavar="RESULTS", help="folders that offline_eval wrote")
    parser.add_argument("--output", type=Path, default=Path("comparison.png"), help="default: comparison.png")
    parser.add_argument("--max-mae", type=float, metavar="X", help="exit 3 when the best one's MAE is above this")
    parser.add_argument("--max-p99-ms", type=float, metavar="X", help="exit 3 when its 99th percentile is above this")
    args = parser.parse_args(argv)
    try:
        summaries = [read_summary(folder) for folder in args.results]
        named = dict(zip((id(s) for s in summaries), labels(summaries), strict=True))
        groups = group(summaries)
        if len(groups) > 1:
            print(
                f"note: evaluations of {len(groups)} different sets of frames: ranked within each set, not across",
                flush=True,
            )
        for members in groups:
            dataset, selection = members[0]["dataset"], members[0]["selection"]
            episodes = ", ".join(map(str, selection["episodes"]))
            print(f"\n{dataset['path']}, episodes {episodes}: {members[0]['frames']} frames, {members[0]['unit']}")
            print(table(members, [named[id(s)] for s in members]), flush=True)
        if report.can_draw():
            args.output.parent.mkdir(parents=True, exist_ok=True)
            partial = args.output.with_name(f".{args.output.name}.partial")
            report.draw_comparison(partial, [[(named[id(s)], s) for s in members] for members in groups])
            os.replace(partial, args.output)
            print(f"\npicture: {args.output}")
        else:
            print("\npicture: none, matplotlib is not installed (pip install matplotlib)")
        verdicts = gates(groups, {"--max-mae": args.max_mae, "--max-p99-ms": args.max_p99_ms})
        for line, _ in verdicts:
            print(f"gate: {line}", flush=True)
        return 0 if all(passed for _, passed in verdicts) else EXIT_GATE
    except CompareError as error:
        line = str(error)
    except OSError as error:
        line = f"{error.filename or args.output}: {error.strerror or error}"
    print(f"error: {line}", file=sys.stderr, flush=True)
    return 1


if __name__ == "__main__":
    sys.exit(main())
