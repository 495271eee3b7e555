"""Kill a run again and again; in the end it must be the run that nobody disturbed, to the last bit.

    python -m tests.soak_kills                       # 50 kills with SIGKILL, one process (about 5 minutes, 2 cores)
    python -m tests.soak_kills --ranks 2             # the same with two ranks
    python -m tests.soak_kills --stop --times 20     # 20 SIGTERMs: exit 75, saved, exact

Moments are random over the whole life of a process: start, steps, saves. After each kill the newest checkpoint and
`last` must load. Exit code 0 only if all of it held.
"""

from __future__ import annotations

import argparse
import random
import signal
import tempfile
import time
from pathlib import Path

from tests import soak_common as soak
from tests.tiny import assert_same_run, metrics


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--ranks", type=int, default=1)
    parser.add_argument("--times", type=int, default=50)
    parser.add_argument("--stop", action="store_true", help="SIGTERM instead of SIGKILL")
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    rng = random.Random(args.seed)
    began = time.monotonic()
    with tempfile.TemporaryDirectory() as folder:
        bags = soak.sample_bags(Path(folder))
        steps = max(200, 8 * args.times)  # more than a fast machine gets through between the kills
        undisturbed = soak.Run(bags, Path(folder) / "undisturbed", args.ranks, training__steps=steps)
        assert undisturbed.wait(600) == [0] * args.ranks, undisturbed.log.read_text()[-2000:]
        seconds = time.monotonic() - began
        print(f"undisturbed: {undisturbed.steps()} steps in {seconds:.0f} s", flush=True)

        done, starts, in_training = 0, 0, 0
        while True:
            run = soak.Run(bags, Path(folder) / "disturbed", args.ranks, training__steps=steps)
            starts += 1
            at_start = run.steps()
            if done < args.times and rng.random() < 0.85:  # mostly among steps and saves, else during the start
                while run.alive() and run.steps() <= at_start:
                    time.sleep(0.005)
            time.sleep(rng.uniform(0, 1.5))
            if done >= args.times or not run.alive():
                codes = run.wait(600)
                assert codes == [0] * args.ranks, (codes, run.log.read_text()[-2000:])
                break
            victims = run.pids if args.stop or rng.random() < 0.5 else [rng.choice(run.pids)]
            run.send(signal.SIGTERM if args.stop else signal.SIGKILL, victims)
            codes = run.wait(60)
            done += 1
            in_training += run.steps() > at_start
            newest = soak.check_loadable(run.output)
            if args.stop:
                check_stop(run, codes, newest)
            print(f"{done}: exit {codes}, {run.steps()} steps logged, newest {newest} loads", flush=True)
        assert done == args.times, f"the run ended after {done} of {args.times}; raise `steps`"
        assert_same_run(undisturbed.output, run.output)
    what = "SIGTERM" if args.stop else "SIGKILL"
    print(
        f"OK: {done} x {what}, {in_training} of them in training, {args.ranks} rank(s), {starts} starts: final weights,"
        " optimizer state and every logged loss equal the undisturbed run's bit for bit; "
        f"{time.monotonic() - began:.0f} s"
    )


def check_stop(run: soak.Run, codes: list[int], newest: str) -> None:
    """Exit 75 on all ranks, and the saved step is the last logged or the one after it."""
    assert codes == [75] * len(codes), (codes, run.log.read_text()[-2000:])
    logged = metrics(run.output)[-1]["step"] if run.steps() else 0
    if newest != "none":
        assert int(newest.removeprefix("checkpoint_")) in (logged, logged + 1), (newest, logged)


if __name__ == "__main__":
    main()
