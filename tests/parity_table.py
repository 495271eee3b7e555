"""Measure how closely our ACT follows LeRobot's, and print it as a Markdown table: python -m tests.parity_table"""

import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path

TEST = Path(__file__).with_name("test_act_parity.py")


def markdown(rows: list[dict]) -> str:
    lines = [
        "| Configuration | LeRobot | Actions: largest difference | Loss: difference | Gradients: worst relative norm |",
        "|---|---|---|---|---|",
    ]
    for row in sorted(rows, key=lambda row: (row["case"], row["lerobot"])):
        lines.append(
            f"| {row['case']} | {row['lerobot']} | {row['output']:.1e} | {row['loss']:.1e} | {row['gradient']:.1e} |"
        )
    return "\n".join(lines)


if __name__ == "__main__":
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "parity.json"
        command = [sys.executable, "-m", "pytest", "-q", str(TEST), "-k", "same_actions_loss_and_gradients"]
        run = subprocess.run(
            command, env={**os.environ, "PARITY_JSON": str(path)}, stdout=sys.stderr, cwd=TEST.parents[1]
        )
        if path.exists():
            print(markdown(json.loads(path.read_text())))
    sys.exit(run.returncode)
