"""Does the policy do its task? Run it in the simulated cell, closed loop, on scenes that no recording has.

    python -m sim.rollout --checkpoint outputs/demo
    python -m sim.rollout --checkpoint outputs/demo --episodes 200 --min-success 0.9 --max-blind 0.1          # a gate
    python -m sim.rollout --checkpoint outputs/demo --robustness                  # lag, image noise, camera, light

The policy is asked through the PolicyRunner that a robot uses; the arm moves as it says and the camera shows what came
of it. Beside it stand, on the first of the same scenes, a policy that goes to the mean block position, and the policy
with a grey image and with another episode's image: success means something only where these fail.

The output directory gets report.html (open it first), rollouts.json (written last: it is there when all is),
steps.parquet (every step), rollouts.mp4, contact_sheet.png, top_view.png.

Exit code 0: done; 1: bad input, with one line; 3: a gate is not passed (success below --min-success, a baseline above
--max-blind), and all results are written.

Knows: the command line, and what an evaluation consists of.
Must not know: the success criterion (world.py), how a policy drives (closed_loop.py), what is measured
(rollout_measures.py), files and pictures (rollout_report.py).
"""

import datetime
import json
import operator
import sys
import time
from dataclasses import asdict, replace
from pathlib import Path

import torch
from tqdm import tqdm
from ur10e_deploy.checks import EvalError
from ur10e_deploy.offline_eval import EXIT_GATE, ArgumentParser, in_one_line
from ur10e_deploy.policy_runner import BACKENDS, DEVICES, MODES, PolicyRunner
from ur10e_deploy.results import checkpoint_identity, versions

from act_model import full_float32
from sim import rollout_report as report
from sim.closed_loop import POLICY, Runs, check_policy
from sim.record import MANIFEST
from sim.rollout_measures import measure, summarise
from sim.world import CONTROL_HZ, IMAGE_AGE_S, PERTURBATIONS, TIMEOUT_S, TOLERANCE_M, Conditions, World

BASELINE_EPISODES = 50  # the first scenes are enough for what should fail


def evaluate(args):
    """The whole evaluation; -> exit code.

    Raises:
        CheckpointError, PolicyError, EvalError: one line each.
    """
    began_s = time.perf_counter()
    check_arguments(args)
    torch.set_num_threads(1)  # groups of episodes are the parallelism; PyTorch's own threads would wait for each other
    output = report.open_output(args.output)
    runner = PolicyRunner(
        args.checkpoint,
        backend=args.backend,
        device=args.device,
        mode=args.mode,
        n_action_steps=args.n_action_steps,
    )
    check_policy(runner)
    ((height, width),) = runner.contract.cameras.values()
    args.height, args.width = args.height or height, args.width or width
    notes = runner.notes + recorded_note(runner.contract, args.seed)
    if output.clear():
        notes.append(f"replaced the roll-outs that were in {args.output}")
    for note in notes:
        print(f"note: {note}", flush=True)
    with full_float32():  # once, around all threads: they would undo each other's, and TF32 is for the whole process
        runs, perturbed = run_all(args, runner)
    summary = summarise_all(args, runner, runs, perturbed, notes)
    report.write(output, args, summary, runs, began_s)
    print(report.screen(summary, args.output), flush=True)
    return 0 if all(gate["passed"] for gate in summary["gates"]) else EXIT_GATE


def recorded_note(contract, seed):
    """A note when the policy's recordings, if they are still where it was trained, show the very scenes of `seed`."""
    manifest = Path(contract.data_settings.get("bag_dir", "")) / MANIFEST
    try:
        recorded = json.loads(manifest.read_text())["arguments"]["seed"]
    except (OSError, ValueError, KeyError, TypeError):
        return []
    return [f"the policy was trained on scenes of seed {seed}: these are not new to it"] if recorded == seed else []


def run_all(args, runner):
    """Every run of the evaluation: -> (Runs, {perturbation: its Conditions})."""
    control_hz = runner.contract.fps or CONTROL_HZ
    base = Conditions(lag_s=args.lag_ms / 1e3)
    perturbed = {name: replace(base, **PERTURBATIONS[name][0]) for name in args.perturb}

    def make_world(episode, conditions):
        return World(args.seed, episode, args.height, args.width, conditions, control_hz)

    episodes = list(range(args.episodes))
    baseline_episodes = episodes[:BASELINE_EPISODES]
    rollouts = len(episodes) * (1 + len(perturbed)) + 3 * len(baseline_episodes)
    steps = round(args.timeout_s * control_hz)
    quiet = not sys.stderr.isatty()
    with tqdm(total=rollouts * steps, unit="step", mininterval=10.0 if quiet else 0.5) as bar:
        runs = Runs(runner, make_world, args.timeout_s, bar)
        runs.policy(POLICY, episodes, base)
        runs.baselines(baseline_episodes, base)
        for name, conditions in perturbed.items():
            runs.policy(name, episodes, conditions)
    return runs, perturbed


def summarise_all(args, runner, runs, perturbed, notes):
    """What rollouts.json holds."""
    tolerance_m = args.tolerance_mm / 1e3
    rows = {name: [measure(world, tolerance_m) for world in worlds] for name, worlds in runs.worlds.items()}
    success = summarise(rows[POLICY])
    baselines = {name: summarise(rows[name]) for name in rows if name != POLICY and name not in perturbed}
    rate, blind = success["success_rate"], max(of["success_rate"] for of in baselines.values())
    gates = [
        ("--min-success", args.min_success, rate, operator.ge),
        ("--max-blind", args.max_blind, blind, operator.le),
    ]
    return dict(
        success=success,
        baselines=baselines,
        perturbations={
            name: dict(what=PERTURBATIONS[name][1], conditions=asdict(conditions)) | summarise(rows[name])
            for name, conditions in perturbed.items()
        },
        gates=[
            dict(gate=gate, limit=limit, found=found, passed=passed(found, limit))
            for gate, limit, found, passed in gates
            if limit is not None
        ],
        task=dict(
            criterion="the tip comes within the tolerance of the middle of the block's top, before the timeout",
            tolerance_m=tolerance_m,
            timeout_s=args.timeout_s,
            control_hz=runner.contract.fps or CONTROL_HZ,
            image_age_s=IMAGE_AGE_S,
            image_size=[args.height, args.width],
            conditions=asdict(Conditions(lag_s=args.lag_ms / 1e3)),
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
        other_episodes={name: rows[name] for name in rows if name != POLICY},
        versions=versions(),
        created=datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds"),
    )


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
    for option, value in (("--min-success", args.min_success), ("--max-blind", args.max_blind)):
        if value is not None and not 0 <= value <= 1:
            raise EvalError(f"{option} is {value}; expected 0 to 1")
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
    p.add_argument("--max-blind", type=float, metavar="X", help="exit 3 when a baseline succeeds more often")
    p.add_argument("--output", type=Path, default=Path("outputs/rollout"), help="default: outputs/rollout")
    p.add_argument("--gif", type=Path, metavar="FILE", help="also an animation for a web page")
    p.add_argument("--no-pictures", dest="pictures", action="store_false", help="numbers only: no video, no pictures")
    p.add_argument("--device", choices=DEVICES, default="auto", help="default: auto")
    p.add_argument("--backend", choices=BACKENDS, default="native", help="default: native, which needs no LeRobot")
    return p


def main(argv=None):
    """Entry of `python -m sim.rollout`. Exit codes: see the top of this file."""
    return in_one_line(evaluate, parser().parse_args(argv), report.LAST)


if __name__ == "__main__":
    sys.exit(main())
