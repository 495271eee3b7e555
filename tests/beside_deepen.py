"""The faults of tests/planted.py, as deepen-grade and as the inspection see them: a table in Markdown.

    python -m venv outputs/deepen && outputs/deepen/bin/pip install "deepen-grade[mcap]==0.4.1"
    python -m tests.beside_deepen --deepen outputs/deepen/bin/deepen

deepen takes one bag at a time. Of what it says of a bag counts what is worse than what it says of the good ones.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

from rosbag_dataset.findings import KINDS
from rosbag_dataset.inspection import main as inspect
from tests.planted import GOOD, OVERRIDE, plain, plant

SEVERITY = {"warn": 1, "fail": 2}  # 0: it passes, or is not assessed


def deepen(program: Path, bag: Path) -> tuple[str, dict[str, tuple[int, str]]]:
    """-> (grade, name of a check -> how bad it is, what it says)."""
    (file,) = bag.glob("*.mcap")
    done = subprocess.run([program, "grade", file, "--json", "--quiet"], capture_output=True, text=True)
    if done.returncode:
        sys.exit(f"error: {program} grade {file}: {' '.join((done.stderr or done.stdout).split())}")
    report = json.loads(done.stdout)
    checks: list[dict[str, Any]] = [*report["dataset_level_checks"], *report["episodes"][0]["checks"]]
    return report["overall"]["grade"], {c["name"]: (SEVERITY.get(c["severity"], 0), c["summary"]) for c in checks}


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m tests.beside_deepen", description="Compare with deepen-grade.")
    parser.add_argument("--deepen", type=Path, required=True, help="its program")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder, open(os.devnull, "w") as nowhere:
        bags, out = Path(folder, "bags"), Path(folder, "report.json")
        plant(bags, plain, more=True)
        with contextlib.redirect_stdout(nowhere), contextlib.redirect_stderr(nowhere):
            inspect([str(bags), "--json", str(out), "--verify", "--override", OVERRIDE])
        ours: dict[str, list[str]] = {}
        for finding in json.loads(out.read_text())["findings"]:
            refused = finding["kind"] == "refused"
            words = finding["sentence"].split("; ")[0] if refused else KINDS[finding["kind"]][1]
            ours.setdefault(finding["episode"], []).append(f"{finding['badness']}: {words}")
        theirs = {bag.name: deepen(args.deepen, bag) for bag in sorted(bags.iterdir())}
    usual = {check: max(theirs[name][1][check][0] for name in GOOD) for check in theirs[GOOD[0]][1]}
    print("| Planted | deepen grade | The inspection |\n|---|---|---|")
    for name, (grade, said) in theirs.items():
        if name not in GOOD:
            more = "; ".join(text for check, (severity, text) in said.items() if severity > usual[check])
            print(f"| {name} | {grade}{f': {more}' if more else ''} | {'; '.join(ours.get(name, ['nothing']))} |")
    grades = ", ".join(sorted({theirs[name][0] for name in GOOD}))
    print(
        f"\nOn all {len(GOOD)} good ones deepen says {grades}; not passed: "
        f"{', '.join(check for check, severity in usual.items() if severity) or 'nothing'}."
    )
    print(f"The inspection says of good ones: {[name for name in GOOD if name in ours] or 'nothing'}.")


if __name__ == "__main__":
    main()
