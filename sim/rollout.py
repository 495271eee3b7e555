"""Does the policy do its task? Run it in the simulated cell, closed loop, on scenes that no recording has.

    python -m sim.rollout --checkpoint outputs/demo
    python -m sim.rollout --checkpoint outputs/demo --episodes 200 --min-success 0.9       # exit 3 below it: a gate
    python -m sim.rollout --checkpoint outputs/demo --robustness                  # lag, image noise, camera, light

The policy is asked through the PolicyRunner that a robot uses; the arm moves as it says and the camera shows what came
of it. Beside it stand, on the first of the same scenes, a policy that goes to the mean block position, and the policy
with a grey image and with another episode's image: success means something only where these fail.

The output directory gets report.html (open it first), rollouts.json (written last: it is there when all is),
steps.parquet (every step), rollouts.mp4, contact_sheet.png, top_view.png.

Exit code 0: done; 1: bad input, with one line; 3: success is below --min-success, and all results are written.

Knows: how a policy drives the world, which runs there are, the command line.
Must not know: the success criterion (world.py), what is measured (rollout_measures.py), pictures (rollout_report.py).
"""

import argparse
import datetime
import json
import sys
import time
from dataclasses import asdict, replace
from pathlib import Path

import numpy as np
from tqdm import tqdm
from ur10e_deploy.checks import EvalError
from ur10e_deploy.config import PolicyError
from ur10e_deploy.offline_eval import EXIT_GATE, ArgumentParser
from ur10e_deploy.policy_runner import BACKENDS, DEVICES, MODES, PolicyRunner, step_together
from ur10e_deploy.results import checkpoint_identity, versions

from lerobot_checkpoint import CheckpointError
from sim import rollout_report as report
from sim.expert import Expert
from sim.rollout_measures import measure, summarise
from sim.scene import BLOCK_HIGH_M, BLOCK_LOW_M
from sim.ur10e import JOINT_NAMES
from sim.world import CONTROL_HZ, IMAGE_AGE_S, PERTURBATIONS, TIMEOUT_S, TOLERANCE_M, Conditions, World

TOGETHER = 50  # episodes that run side by side and share inferences
BASELINE_EPISODES = 50  # the first scenes are enough for what should fail
MEAN_BLOCK, GREY, OTHER = "mean block position", "grey image", "another episode's image"
POLICY = "policy"
GREY_LEVEL = 128


# -- who drives ----------------------------------------------------------------------------------------------------


class PolicyDriver:
    """A policy for many worlds at once: what each arm is commanded next.

    Args:
        runner: PolicyRunner of a policy with one camera.
        count: of worlds.
        look: (world, its number) -> the image (H, W, 3) that the policy is shown; None shows it the world's own.
    """

    def __init__(self, runner, count, look=None):
        self._contract = runner.contract
        self._forks = [runner.fork() for _ in range(count)]
        (self._camera,) = self._contract.cameras
        self._look = look or (lambda world, _: world.image())
        self.inferred = []  # per step: (count,) bool, whether the policy was asked or its queue answered

    def commands(self, worlds):
        """Joint positions to command, (6,) rad each, in the order of JOINT_NAMES."""
        images = [
            {self._camera: self._look(world, i)} if fork.needs_images else {}
            for i, (world, fork) in enumerate(zip(worlds, self._forks, strict=True))
        ]
        states = [self._contract.state_from_robot(JOINT_NAMES, world.path_rad[-1]) for world in worlds]
        steps = step_together(self._forks, states, images)
        self.inferred.append(np.array([step.chunk is not None for step in steps]))
        order = [self._contract.joint_names.index(name) for name in JOINT_NAMES]
        return [self._contract.action_to_robot(step.command_rad)[order] for step in steps]


class MeanBlockDriver:
    """The expert's motion to the middle of where blocks lie: what is possible without looking."""

    def __init__(self, worlds):
        middle_m = (np.array(BLOCK_LOW_M) + BLOCK_HIGH_M) / 2
        self._experts = [Expert(world.expert.start_rad, middle_m) for world in worlds]
        self.inferred = []

    def commands(self, worlds):
        """Joint positions to command, (6,) rad each."""
        self.inferred.append(np.ones(len(worlds), bool))
        return [e.position(w.time_s + 1 / w.control_hz) for e, w in zip(self._experts, worlds, strict=True)]


def roll_out(worlds, driver, timeout_s=TIMEOUT_S, bar=None):
    """Run every world from its start to the timeout, under one driver."""
    for _ in range(round(timeout_s * worlds[0].control_hz)):
        for world, command_rad in zip(worlds, driver.commands(worlds), strict=True):
            world.command(command_rad)
        if bar is not None:
            bar.update(len(worlds))


# -- the runs ------------------------------------------------------------------------------------------------------


class Runs:
    """Everything that is run of one policy: the policy itself, its baselines, perturbations.

    Args:
        runner: PolicyRunner.
        make_world: (episode, Conditions) -> World.
        timeout_s: of an episode.
        bar: tqdm, counting steps.

    Attributes:
        worlds: run -> its finished worlds.
        inferred: run -> (episodes, steps) bool.
    """

    def __init__(self, runner, make_world, timeout_s, bar=None):
        self._runner, self._make_world, self._timeout_s, self._bar = runner, make_world, timeout_s, bar
        self.worlds, self.inferred = {}, {}

    def run(self, name, episodes, conditions, make_driver):
        """Run `episodes` under `conditions`; make_driver is called with the worlds of each group and its offset."""
        self.worlds[name], inferred = [], []
        if self._bar is not None:
            self._bar.set_description(name)
        for first in range(0, len(episodes), TOGETHER):
            group = [self._make_world(episode, conditions) for episode in episodes[first : first + TOGETHER]]
            driver = make_driver(group, first)
            roll_out(group, driver, self._timeout_s, self._bar)
            self.worlds[name] += group
            inferred.append(np.array(driver.inferred).T)
        self.inferred[name] = np.concatenate(inferred)

    def policy(self, name, episodes, conditions):
        """The policy itself."""
        self.run(name, episodes, conditions, lambda group, _: PolicyDriver(self._runner, len(group)))

    def baselines(self, episodes, conditions):
        """What stands beside it, on `episodes`, which are the first of the policy's own run."""
        self.run(MEAN_BLOCK, episodes, conditions, lambda group, _: MeanBlockDriver(group))

        def grey(world, _):
            return np.full((world.height, world.width, 3), GREY_LEVEL, np.uint8)

        self.run(GREY, episodes, conditions, lambda group, _: PolicyDriver(self._runner, len(group), grey))
        seen = self.worlds[POLICY]

        def driver(group, first):
            # What the camera showed in the next episode, at the same moment of the policy's own run.
            def look(world, i):
                return seen[(first + i + 1) % len(seen)].image(at_s=world.time_s)

            return PolicyDriver(self._runner, len(group), look)

        self.run(OTHER, episodes, conditions, driver)


def check_policy(runner):
    """Whether this cell can feed the policy; -> notes.

    Raises:
        PolicyError: other joints, or not exactly one camera.
    """
    contract = runner.contract
    if len(contract.cameras) != 1:
        raise PolicyError(f"the policy sees {', '.join(contract.cameras)}; the simulated cell has one camera")
    if contract.joint_names is None or set(contract.joint_names) != set(JOINT_NAMES):
        raise PolicyError(
            f"the policy's joints are {', '.join(contract.joint_names or ['not named'])}; the simulated arm's are "
            f"{', '.join(JOINT_NAMES)}"
        )
    notes = list(runner.notes)
    if runner.mode == "every-step":
        notes.append("mode every-step: recordings that begin at rest teach a first action of nearly zero; it may stall")
    return notes


def evaluate(args):
    """The whole evaluation; -> exit code.

    Raises:
        CheckpointError, PolicyError, EvalError: one line each.
    """
    began_s = time.perf_counter()
    check_arguments(args)
    output = report.open_output(args.output)
    runner = PolicyRunner(
        args.checkpoint,
        backend=args.backend,
        device=args.device,
        mode=args.mode,
        n_action_steps=args.n_action_steps,
    )
    notes = check_policy(runner)
    ((height, width),) = runner.contract.cameras.values()
    height, width = args.height or height, args.width or width
    control_hz = runner.contract.fps or CONTROL_HZ
    base, tolerance_m = Conditions(lag_s=args.lag_ms / 1e3), args.tolerance_mm / 1e3
    perturbed = {name: replace(base, **PERTURBATIONS[name][0]) for name in args.perturb}

    def make_world(episode, conditions):
        return World(args.seed, episode, height, width, conditions, control_hz)

    if output.clear():
        notes.append(f"replaced the roll-outs that were in {args.output}")
    for note in notes:
        print(f"note: {note}", flush=True)
    episodes = list(range(args.episodes))
    baseline_episodes = episodes[:BASELINE_EPISODES]
    runs_of = len(episodes) * (1 + len(perturbed)) + 3 * len(baseline_episodes)
    quiet = not sys.stderr.isatty()
    with tqdm(
        total=runs_of * round(args.timeout_s * control_hz), unit="step", mininterval=10.0 if quiet else 0.5
    ) as bar:
        runs = Runs(runner, make_world, args.timeout_s, bar)
        runs.policy(POLICY, episodes, base)
        runs.baselines(baseline_episodes, base)
        for name, conditions in perturbed.items():
            runs.policy(name, episodes, conditions)

    rows = {name: [measure(world, tolerance_m) for world in worlds] for name, worlds in runs.worlds.items()}
    rate = sum(row["success"] for row in rows[POLICY]) / len(episodes)
    gate = dict(gate="--min-success", limit=args.min_success, found=rate, passed=rate >= (args.min_success or 0.0))
    summary = dict(
        success=summarise(rows[POLICY]),
        baselines={name: summarise(rows[name]) for name in (MEAN_BLOCK, GREY, OTHER)},
        perturbations={
            name: dict(what=PERTURBATIONS[name][1], conditions=asdict(perturbed[name])) | summarise(rows[name])
            for name in perturbed
        },
        gates=[gate] if args.min_success is not None else [],
        task=dict(
            criterion="the tip comes within the tolerance of the middle of the block's top, before the timeout",
            tolerance_m=tolerance_m,
            timeout_s=args.timeout_s,
            control_hz=control_hz,
            image_age_s=IMAGE_AGE_S,
            image_size=[height, width],
            conditions=asdict(base),
        ),
        selection=dict(seed=args.seed, episodes=args.episodes),
        policy=checkpoint_identity(runner)
        | dict(
            backend=runner.backend,
            device=runner.device.type,
            mode=runner.mode,
            chunk_size=runner.chunk_size,
            n_action_steps=runner.n_action_steps,
            action_mode=runner.contract.action_mode,
        ),
        notes=notes,
        episodes=rows[POLICY],
        baseline_episodes={name: rows[name] for name in (MEAN_BLOCK, GREY, OTHER)},
        perturbed_episodes={name: rows[name] for name in perturbed},
        versions=versions(),
        created=datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds"),
    )
    report.write(output, args, summary, runs, began_s)
    print(report.screen(summary, args.output), flush=True)
    return 0 if all(gate["passed"] for gate in summary["gates"]) else EXIT_GATE


# -- command line --------------------------------------------------------------------------------------------------


def check_arguments(args):
    """Refuse numbers out of range. Raises EvalError, naming the option."""
    for option, value, low in (
        ("--episodes", args.episodes, 1),
        ("--seed", args.seed, 0),
        ("--lag-ms", args.lag_ms, 0),
        ("--timeout-s", args.timeout_s, 0.1),
        ("--tolerance-mm", args.tolerance_mm, 0.1),
    ):
        if not value >= low:
            raise EvalError(f"{option} is {value}; expected {low} or more")
    for option, value in (("--height", args.height), ("--width", args.width)):
        if value is not None and not 32 <= value <= 4096:
            raise EvalError(f"{option} is {value}; expected 32 to 4096 pixels")
    if unknown := [name for name in args.perturb if name not in PERTURBATIONS]:
        raise EvalError(f"--perturb {','.join(unknown)}: expected some of {','.join(PERTURBATIONS)}")
    if args.min_success is not None and not 0 <= args.min_success <= 1:
        raise EvalError(f"--min-success is {args.min_success}; expected 0 to 1")
    if args.gif and args.gif.suffix != ".gif":
        raise EvalError(f"--gif {args.gif}: expected a file that ends in .gif")


def parser():
    """The options of the command line."""
    p = ArgumentParser(prog="python -m sim.rollout", description="Run a policy in the simulated cell, closed loop.")
    p.add_argument("--checkpoint", type=Path, required=True, help="output, checkpoint or pretrained_model directory")
    p.add_argument("--episodes", type=int, default=50, help="scenes (default: 50)")
    p.add_argument("--seed", type=int, default=1000, help="of the scenes; not one that was recorded (default: 1000)")
    p.add_argument("--mode", choices=MODES, default="auto", help="default: auto, what the checkpoint says")
    p.add_argument("--n-action-steps", type=int, metavar="K", help="of mode chunk (default: the checkpoint's)")
    p.add_argument("--timeout-s", type=float, default=TIMEOUT_S, metavar="S", help=f"default: {TIMEOUT_S:g}")
    p.add_argument(
        "--tolerance-mm", type=float, default=TOLERANCE_M * 1e3, metavar="MM", help=f"default: {TOLERANCE_M * 1e3:g}"
    )
    p.add_argument(
        "--lag-ms", type=float, default=0.0, metavar="MS", help="the arm lags, and keeps its speed limits (default: 0)"
    )
    p.add_argument(
        "--perturb", type=lambda text: text.split(","), default=[], metavar="A,B",
        help=f"also under these disturbances: {','.join(PERTURBATIONS)}",
    )  # fmt: skip
    p.add_argument(
        "--robustness", dest="perturb", action="store_const", const=list(PERTURBATIONS), help="--perturb with all"
    )
    p.add_argument("--height", type=int, help="of the camera's images, pixels (default: what the policy sees)")
    p.add_argument("--width", type=int, help="the same")
    p.add_argument("--min-success", type=float, metavar="X", help="exit 3 below this rate")
    p.add_argument("--output", type=Path, default=Path("outputs/rollout"), help="default: outputs/rollout")
    p.add_argument("--gif", type=Path, metavar="FILE", help="also an animation for a web page, below 3 MB")
    p.add_argument("--no-pictures", dest="pictures", action="store_false", help="numbers only: no video, no pictures")
    p.add_argument("--device", choices=DEVICES, default="auto", help="default: auto")
    p.add_argument("--backend", choices=BACKENDS, default="native", help="default: native, which needs no LeRobot")
    return p


def main(argv=None):
    """Entry of `python -m sim.rollout`. Exit codes: see the top of this file."""
    args = parser().parse_args(argv)
    try:
        return evaluate(args)
    except (CheckpointError, PolicyError, EvalError) as error:
        line = str(error)
    except OSError as error:
        line = f"{error.filename or args.output}: {error.strerror or error}"
    except KeyboardInterrupt:
        print(f"error: interrupted; {args.output} is not complete (no rollouts.json)", file=sys.stderr, flush=True)
        return 130
    print(f"error: {line}", file=sys.stderr, flush=True)
    return 1


if __name__ == "__main__":
    sys.exit(main())
