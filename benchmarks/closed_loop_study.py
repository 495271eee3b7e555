"""Which settings give a policy that does its task? One factor at a time around one set of settings, in closed loop.

    python -m benchmarks.closed_loop_study                                   # all arms, three seeds: hours on 2 cores
    python -m benchmarks.closed_loop_study --arms base,delta,relative --seeds 1
    python -m benchmarks.closed_loop_study --jobs 14                         # on a GPU, with 16 cores: 10 minutes

Each arm is `train.py --config sim/demo.yaml` with BASE, with the overrides that its row names, and then `sim.rollout`
on scenes that no recording has. It resumes: what is finished in --out is not done again, an interrupted training goes
on. Ends with one table, also in --out/study.md, and all numbers in --out/study.json. Success rates of one arm's seeds
differ by tens of points where a policy only half learns its task: the spread is a result, so it is in the table.
"""

from __future__ import annotations

import argparse
import json
import os
import shlex
import statistics
import subprocess
import sys
from collections import defaultdict
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

from sim.record import record
from sim.rollout_measures import wilson

from .common import ROOT, BenchmarkError, Parser, say, whole_number

MOST_EPISODES = 400  # recorded once; an arm with fewer takes the first of them


@dataclass(frozen=True)
class Arm:
    """One row: overrides of sim/demo.yaml and BASE, options of sim.rollout, how many of the episodes it is given."""

    overrides: tuple[str, ...] = ()
    rollout: tuple[str, ...] = ()
    episodes: int = MOST_EPISODES


# What all arms share. The demo has since taken the chunk that came out best.
BASE = ("model.chunk_size=30", "training.steps=1400", "training.save_freq=700")
VAE = ("model.use_vae=true", "training.kl_weight=10")
ARMS = {
    "base": Arm(),
    "delta": Arm(("conventions.action_mode=delta",)),
    "relative": Arm(("conventions.action_mode=relative",)),
    "VAE": Arm(VAE),
    "EMA": Arm(("training.ema_decay=0.99",)),
    "chunk 15": Arm(("model.chunk_size=15",)),
    "chunk 60": Arm(("model.chunk_size=60",)),
    "executes 1": Arm(rollout=("--mode", "every-step")),
    "executes 30": Arm(rollout=("--n-action-steps", "30")),
    "ensemble": Arm(rollout=("--mode", "ensemble")),
    "100 episodes": Arm(episodes=100),
    "40 episodes": Arm(episodes=40),
}


def main(argv: Sequence[str] | None = None) -> int:
    """Entry of `python -m benchmarks.closed_loop_study`. Exit code 0: the table is whole; 1: an arm failed."""
    parser = Parser(prog="python -m benchmarks.closed_loop_study", description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, default=ROOT / "outputs/study", help="default: outputs/study")
    parser.add_argument("--arms", type=lambda text: text.split(","), default=list(ARMS), help="default: all")
    parser.add_argument("--seeds", type=whole_number(1), default=3, help="of the training, from 1 on (default: 3)")
    parser.add_argument("--episodes", type=whole_number(1), default=100, help="scenes of each (default: 100)")
    parser.add_argument("--jobs", type=whole_number(1), default=1, help="trainings at a time (default: 1)")
    parser.add_argument("--override", action="append", default=[], metavar="KEY=VALUE", help="of every arm")
    args = parser.parse_args(argv)
    args.out = args.out.resolve()  # the commands below run in the project's folder
    if unknown := [arm for arm in args.arms if arm not in ARMS]:
        parser.error(f"--arms {','.join(unknown)}: expected some of {', '.join(ARMS)}")
    try:
        rows = all_scores(recorded_bags(args.out), args)
    except BenchmarkError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    text = table(rows)
    (args.out / "study.json").write_text(json.dumps(rows, indent=2) + "\n")
    (args.out / "study.md").write_text(text)
    print(text)
    return 0


def recorded_bags(out: Path) -> dict[int, Path]:
    """{number of episodes: folder of bags}, recorded once; the smaller sets are links into the largest."""
    bags = record(out / "bags", MOST_EPISODES, seed=1, storage="mcap", height=120, width=160, workers=2, progress=True)
    folders = {}
    for count in sorted({arm.episodes for arm in ARMS.values()}):
        folders[count] = out / f"bags-{count}"
        folders[count].mkdir(exist_ok=True)
        for bag in bags[:count]:
            link = folders[count] / bag.name
            if not link.exists():
                link.unlink(missing_ok=True)  # --out was moved: the link leads to where it was
                link.symlink_to(bag.resolve())
    return folders


def all_scores(bags: dict[int, Path], args: argparse.Namespace) -> dict[str, list[dict[str, float]]]:
    """{arm: what its row needs of each seed}; --jobs trainings at a time, the first seed of all arms first."""
    trainings = defaultdict(list)  # arms that differ in the roll-out alone share one, and so follow each other
    for seed in range(1, args.seeds + 1):
        for arm in args.arms:
            trainings[ARMS[arm].overrides, ARMS[arm].episodes, seed].append((arm, seed))

    def scores(arms: list[tuple[str, int]]) -> dict[tuple[str, int], dict[str, float]]:
        return {(arm, seed): score(arm, seed, bags, args) for arm, seed in arms}

    found: dict[tuple[str, int], dict[str, float]] = {}
    with ThreadPoolExecutor(args.jobs) as pool:
        for of in pool.map(scores, trainings.values()):
            found |= of
    return {arm: [found[arm, seed] for seed in range(1, args.seeds + 1)] for arm in args.arms}


def score(arm: str, seed: int, bags: dict[int, Path], args: argparse.Namespace) -> dict[str, float]:
    """Train one arm with one seed and roll it out, unless that is done; -> what its row needs.

    Arms that differ in the roll-out alone share a training.
    """
    what = ARMS[arm]
    settings = dict(pair.split("=", 1) for pair in (*BASE, *what.overrides, *args.override))  # the last of a key counts
    overrides = [*map("=".join, settings.items()), f"training.seed={seed}", f"data.bag_dir={bags[what.episodes]}",
                 f"data.cache_dir={args.out / 'cache'}"]  # fmt: skip
    name = ",".join([*what.overrides, *args.override, f"{what.episodes}"]) + f",{seed}"
    run = args.out / "runs" / name.replace("/", "_")
    overrides.append(f"training.output_dir={run}")
    threads = 1 if args.jobs > 1 else None  # many trainings share the cores already
    command(f"{arm}, seed {seed}: training", threads, "train.py", "--config", "sim/demo.yaml", "--resume",
            *(f"--override={o}" for o in overrides))  # fmt: skip
    options = ["--episodes", str(args.episodes), *what.rollout]
    output = args.out / "rollouts" / f"{run.name} {' '.join(options)}"  # another choice of them is another result
    options += ["--no-pictures", "--output", str(output)]
    if not (output / "rollouts.json").exists():
        command(f"{arm}, seed {seed}: roll-outs", threads, "-m", "sim.rollout", "--checkpoint", str(run), *options)
    found = json.loads((output / "rollouts.json").read_text())
    summary = json.loads((run / "summary.json").read_text())
    return {
        "successes": found["success"]["successes"],
        "scenes": found["success"]["episodes"],
        "success_rate": found["success"]["success_rate"],
        "final_distance_m": found["success"]["final_distance_median_m"],
        "peak_speed_rad_s": found["success"]["peak_speed_median_rad_s"],
        "val_l1": summary["val_l1_last"],
    }


def command(title: str, threads: int | None, *words: str) -> None:
    """Run a command of this project, on so many threads (None: all cores).

    Raises:
        BenchmarkError: it failed; its last line, and how to run it by hand.
    """
    say(title)
    env = os.environ | ({"OMP_NUM_THREADS": str(threads)} if threads else {})
    done = subprocess.run([sys.executable, *words], cwd=ROOT, env=env, capture_output=True, text=True)
    if done.returncode:
        last = (done.stderr.strip().splitlines() or ["no output"])[-1]
        raise BenchmarkError(f"{title}: {last}; run it by hand: python {shlex.join(words)}")


def table(rows: dict[str, list[dict[str, float]]]) -> str:
    """The rows as Markdown: success over all seeds' scenes with its 95 % interval, of each seed, and means."""
    lines = ["| Arm | Success (95 %) | Each seed | Final distance, median | Fastest joint, median | L1, held out |"]
    lines.append("|---" * 6 + "|")
    for arm, seeds in rows.items():
        successes, scenes = (sum(int(seed[key]) for seed in seeds) for key in ("successes", "scenes"))
        low, high = wilson(successes, scenes)
        each = ", ".join(f"{seed['success_rate']:.0%}" for seed in seeds)
        mean = {key: statistics.mean(seed[key] for seed in seeds) for key in seeds[0]}
        lines.append(
            f"| {arm} | **{successes / scenes:.0%}** ({low:.0%} to {high:.0%}) | {each} | "
            f"{mean['final_distance_m'] * 100:.1f} cm | {mean['peak_speed_rad_s']:.2f} rad/s | {mean['val_l1']:.3f} |"
        )
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    sys.exit(main())
