"""How long OSMO's last rendering of a submission takes, the injected files of every task included.

    python -m tests.osmo_rendering

It is what `osmo_spec.render` does, too: jinja2's sandbox on the filled-in spec. Processor time, of 20 renderings; OSMO
allows half a second (`jinja_sandbox_max_time`), on the clock of a service that has other things to do.
"""

from __future__ import annotations

import statistics
import time

from tests.osmo_spec import OSMO, filled_in, load, render, tasks

CASES = (
    ("osmo-workflow.yaml",),
    ("osmo-workflow-sweep.yaml",),
    ("osmo-workflow-ddp.yaml",),
    ("osmo-workflow-ddp.yaml", "n_nodes=8"),
)


def main() -> None:
    print("| Workflow | Tasks | Files per task | KB in all | ms, least | ms, median |\n|---|---|---|---|---|---|")
    for name, *settings in CASES:
        text, values = filled_in(OSMO / name, *settings)
        files = [len(task.get("files", ())) for task in tasks(load(text))]  # an image has its own
        taken = []
        for _ in range(20):
            start = time.process_time()
            render(text, values)
            taken.append(1000 * (time.process_time() - start))
        numbers = [len(files), files[0], len(text) / 1000, min(taken), statistics.median(taken)]
        print(f"| {' '.join([name, *settings])} | {' | '.join(f'{number:.0f}' for number in numbers)} |")


if __name__ == "__main__":
    main()
