"""Run a policy on a robot: two rates, limits, a watchdog, and everything recorded.

    python -m ur10e_deploy.run --checkpoint outputs/demo --robot sim --dry-run       # all but commands
    python -m ur10e_deploy.run --checkpoint outputs/demo --robot sim                 # a quarter of the recorded speed
    python -m ur10e_deploy.run --checkpoint outputs/demo --robot sim --real-time --speed-fraction 1

Read deploy/README.md before a real arm: the order of steps, what each stop means, how to get out. Ctrl-C brakes within
the limits and ends; a second one halts at once.

The output directory, a new one for every run, gets bag/ (mcap, as training reads it), report.html (open it first),
run.png and run.json (written last).

Exit code 0: the time was over, or somebody ended it; 1: bad input, or the start was refused, with one line; 3: it
stopped by itself: a limit, the watchdog, or the robot.

Knows: the command line, and which parts make a run.
Must not know: what the parts do.
"""

from __future__ import annotations

import argparse
import datetime
import gc
import math
import os
import signal
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from . import run_report as report
from .checks import EvalError
from .config import ENSEMBLE_M, PolicyError, has_contract
from .control import ControlLoop, ControlSettings
from .limiter import LimitError
from .limits import read_limits
from .offline_eval import EXIT_GATE, ArgumentParser, in_one_line
from .playback import FADE_FRAMES, SEAMS, SMOOTH_FRAMES, Playback
from .policy_runner import BACKENDS, DEVICES, PolicyRunner
from .recording import BagRecorder
from .results import checkpoint_identity, versions
from .robot import ROBOTS, Robot, RobotOptions, open_robot
from .start_checks import check_contract, check_start
from .thinking import ArmContract, Thinker
from .watchdog import CAMERA_AGE_S, JOINTS_AGE_S, AgeLimits, Watchdog

MIN_COMMAND_HZ, MAX_COMMAND_HZ = 125.0, 500.0  # 500 is a UR10e's own rate
EXIT_STOPPED = EXIT_GATE
DEFAULTS = ControlSettings(fps=30.0)
OPTIONS_OF = {  # robot -> the options that it alone has
    "sim": ("real_time", "latency_ms", "seed", "episode"),
    "ros2": ("ros2",),
    "rtde": ("host", "camera", "servo_lookahead_s", "servo_gain"),
}


def run(args: argparse.Namespace) -> int:
    """The whole run; -> exit code.

    Raises:
        CheckpointError, PolicyError, EvalError: one line each.
    """
    check_arguments(args)
    commanding = not (args.dry_run or args.shadow)
    limits = read_limits(args.limits)
    if args.output.exists() and (not args.output.is_dir() or any(args.output.iterdir())):
        raise EvalError(f"--output {args.output}: is there already, and no run is written over; name a new folder")
    if not has_contract(args.checkpoint):
        raise PolicyError(
            f"{args.checkpoint}: no contract of train.py in it: what its actions mean is not known, and no arm is "
            "moved by guesses; use a checkpoint of train.py"
        )
    torch.set_num_threads(max(1, (os.cpu_count() or 1) - 1))  # a core for the control loop
    runner = PolicyRunner(args.checkpoint, backend=args.backend, device=args.device)
    contract = runner.contract
    fps = check_contract(contract, True)
    seam = args.seam or ("ensemble" if runner.mode == "ensemble" else "cross-fade")
    settings = ControlSettings(
        fps=fps, command_hz=args.command_hz, speed_fraction=args.speed_fraction,
        replan_frames=args.replan or (1 if seam == "ensemble" else runner.n_action_steps),
        duration_s=args.duration_s, recover_s=args.recover_s, max_limited_s=args.max_limited_s,
        max_beyond_rad=args.max_beyond_rad, max_gap_s=args.max_gap_ms / 1e3, commanding=commanding,
    )  # fmt: skip
    if settings.replan_frames > runner.chunk_size:
        raise PolicyError(f"--replan {settings.replan_frames}: expected at most {runner.chunk_size} (chunk_size)")
    others = ArmContract(contract).others
    robot = open_robot(args.robot, robot_options(args, contract, others))
    lock_step = robot.clock.lock_step
    if args.latency_ms and not lock_step:
        raise PolicyError("--latency-ms: is for lock step; in real time the policy takes what it takes")
    try:
        notes = runner.notes + check_start(
            robot, contract, fps, 1 / settings.command_hz, args.allow_unknown_start, still=not args.shadow
        )
        for note in notes:
            print(f"note: {note}", flush=True)
        args.output.mkdir(parents=True, exist_ok=True)
        loop, watchdog = make_loop(args, robot, runner, limits, settings, seam)
        began = datetime.datetime.now(datetime.timezone.utc)
        recorder = None
        if args.bag:
            begin_ns = time.time_ns() - round(robot.clock.now_s() * 1e9)
            recorder = BagRecorder(args.output / "bag", contract, others, begin_ns, not lock_step, commanding)
            loop.record(recorder)
        before = signal.signal(signal.SIGINT, lambda *_: _interrupt(loop))
        gc.collect()
        gc.disable()  # a full collection takes longer than a period
        try:
            loop.run()
        except LimitError as error:
            raise PolicyError(f"the arm cannot be moved from here: {error}; move it by hand, or see --limits") from None
        finally:
            gc.enable()
            signal.signal(signal.SIGINT, before)
            if recorder and (problem := recorder.close()):
                notes.append(f"the bag is not complete: {problem}")
                print(f"note: {notes[-1]}", flush=True)
    finally:
        robot.close()
    summary: dict[str, Any] = report.summarise(loop, limits, settings, watchdog.oldest_s, lock_step) | {
        "notes": notes,
        "robot": args.robot,
        "created": began.isoformat(timespec="seconds"),
        "policy": checkpoint_identity(runner) | {"backend": runner.backend, "fps": fps, "seam": seam},
        "options": {name: str(value) for name, value in vars(args).items()},
        "versions": versions(),
    }
    report.write(args.output, summary, loop.log, limits)
    print(report.screen(summary, args.output), flush=True)
    return 0 if loop.orderly else EXIT_STOPPED


def robot_options(args: argparse.Namespace, contract: Any, others: tuple[str, ...]) -> RobotOptions:
    """What the robot is told: also, for a simulated one, the size of the pictures that training recorded."""
    extra = {
        "seed": args.seed, "episode": args.episode, "person": args.shadow, "contract": contract,
        "commanding": not (args.dry_run or args.shadow),
    }  # fmt: skip
    extra |= {name: getattr(args, name) for robot in ("ros2", "rtde") for name in OPTIONS_OF[robot]}
    states = tuple(contract.state_topics) or others
    return RobotOptions(args.command_hz, args.real_time, contract.recorded_cameras, states, extra)


def make_loop(
    args: argparse.Namespace, robot: Robot, runner: PolicyRunner, limits: Any, settings: ControlSettings, seam: str
) -> tuple[ControlLoop, Watchdog]:
    """The parts put together."""
    thinker = Thinker(runner, robot.clock.lock_step, lambda _: args.latency_ms / 1e3)
    watchdog = Watchdog(AgeLimits(args.max_joint_age_s, args.max_camera_age_s), runner.contract.cameras)
    ensemble_m = runner.ensemble_m if seam == "ensemble" else ENSEMBLE_M
    playback = Playback(seam, args.fade_frames, ensemble_m, args.smooth_frames)
    loop = ControlLoop(robot, thinker, limits, settings, watchdog, playback, say=lambda line: print(line, flush=True))
    return loop, watchdog


def _interrupt(loop: ControlLoop) -> None:
    signal.signal(signal.SIGINT, signal.default_int_handler)  # the second one
    loop.stop("ended by hand")


def check_arguments(args: argparse.Namespace) -> None:
    """Refuse numbers out of range. Raises EvalError, naming the option."""
    for option, value, low, high in (
        ("--command-hz", args.command_hz, MIN_COMMAND_HZ, MAX_COMMAND_HZ),
        ("--speed-fraction", args.speed_fraction, 0.01, 1.0),
        ("--duration-s", args.duration_s, 0.1, math.inf),
        ("--recover-s", args.recover_s, 0.0, math.inf),
        ("--max-limited-s", args.max_limited_s, 0.0, math.inf),
        ("--max-beyond-rad", args.max_beyond_rad, 0.0, math.inf),
        ("--max-joint-age-s", args.max_joint_age_s, 0.001, math.inf),
        ("--max-camera-age-s", args.max_camera_age_s, 0.001, math.inf),
        ("--max-gap-ms", args.max_gap_ms, 1.0, math.inf),
        ("--latency-ms", args.latency_ms, 0.0, math.inf),
        ("--fade-frames", args.fade_frames, 1, math.inf),
        ("--smooth-frames", args.smooth_frames, 0.0, 10.0),
        ("--replan", args.replan or 1, 1, math.inf),
        ("--seed", args.seed, 0, math.inf),
        ("--episode", args.episode, 0, math.inf),
    ):
        if not low <= value <= high:
            expected = f"{low:g} to {high:g}" if high < math.inf else f"{low:g} or more"
            raise EvalError(f"{option} is {value:g}; expected {expected}")
    for robot, names in OPTIONS_OF.items():
        for name in names:
            if robot != args.robot and getattr(args, name) != parser().get_default(name):
                raise EvalError(f"--{name.replace('_', '-')}: is of --robot {robot}, not of {args.robot}")
    if args.dry_run and args.shadow:
        raise EvalError("--dry-run --shadow: expected one of them; --shadow commands nothing, either")


def parser() -> argparse.ArgumentParser:
    """The options of the command line."""
    p = ArgumentParser(prog="python -m ur10e_deploy.run", description="Run a policy on a robot.")
    p.add_argument("--checkpoint", type=Path, required=True, help="output, checkpoint or pretrained_model directory")
    p.add_argument("--robot", choices=sorted(ROBOTS), required=True, help="which robot")
    p.add_argument("--dry-run", action="store_true", help="do everything but command")
    p.add_argument("--shadow", action="store_true", help="the same, and compare with what a person does meanwhile")
    p.add_argument(
        "--speed-fraction", type=float, default=DEFAULTS.speed_fraction, metavar="X",
        help=f"play chunks slower, in 1/X of the time (default: {DEFAULTS.speed_fraction:g})",
    )  # fmt: skip
    p.add_argument(
        "--duration-s", type=float, default=DEFAULTS.duration_s, metavar="S", help=f"default: {DEFAULTS.duration_s:g}"
    )
    p.add_argument(
        "--command-hz", type=float, default=DEFAULTS.command_hz, metavar="HZ", help="125 to 500; default: 250"
    )
    p.add_argument(
        "--seam", choices=SEAMS, help="of two chunks (default: cross-fade, or ensemble if the policy says so)"
    )
    p.add_argument("--fade-frames", type=int, default=FADE_FRAMES, metavar="N", help=f"default: {FADE_FRAMES}")
    p.add_argument(
        "--smooth-frames", type=float, default=SMOOTH_FRAMES, metavar="X", help=f"default: {SMOOTH_FRAMES:g}"
    )
    p.add_argument(
        "--replan", type=int, metavar="K", help="frames between two chunks (default: n_action_steps; 1 of an ensemble)"
    )
    p.add_argument("--limits", type=Path, metavar="FILE", help="YAML: what to change of limits.py's limits")
    p.add_argument(
        "--max-limited-s", type=float, default=DEFAULTS.max_limited_s, metavar="S",
        help=f"end when commands were limited for longer (default: {DEFAULTS.max_limited_s:g})",
    )  # fmt: skip
    p.add_argument(
        "--max-beyond-rad", type=float, default=DEFAULTS.max_beyond_rad, metavar="RAD",
        help=f"end when one was limited by more (default: {DEFAULTS.max_beyond_rad:g})",
    )  # fmt: skip
    p.add_argument(
        "--recover-s", type=float, default=DEFAULTS.recover_s, metavar="S",
        help=f"wait for what is silent so long (default: {DEFAULTS.recover_s:g})",
    )  # fmt: skip
    p.add_argument(
        "--max-joint-age-s", type=float, default=JOINTS_AGE_S, metavar="S", help=f"default: {JOINTS_AGE_S:g}"
    )
    p.add_argument(
        "--max-camera-age-s", type=float, default=CAMERA_AGE_S, metavar="S", help=f"default: {CAMERA_AGE_S:g}"
    )
    p.add_argument(
        "--max-gap-ms", type=float, default=1e3 * DEFAULTS.max_gap_s, metavar="MS",
        help=f"halt when a moving arm got no command for longer (default: {1e3 * DEFAULTS.max_gap_s:g})",
    )  # fmt: skip
    p.add_argument("--allow-unknown-start", action="store_true", help="for checkpoints that do not say where to start")
    p.add_argument("--device", choices=DEVICES, default="auto", help="default: auto")
    p.add_argument("--backend", choices=BACKENDS, default="native", help="default: native, which needs no LeRobot")
    now = datetime.datetime.now().strftime("%Y-%m-%dT%H-%M-%S")
    p.add_argument("--output", type=Path, default=Path("outputs/robot") / now, help="default: outputs/robot/TIME")
    p.add_argument("--no-bag", dest="bag", action="store_false", help="record nothing")
    sim = p.add_argument_group("of --robot sim")
    sim.add_argument("--real-time", action="store_true", help="by the wall clock, not in lock step")
    sim.add_argument(
        "--latency-ms", type=float, default=0.0, metavar="MS", help="of the policy, in lock step (default: 0)"
    )
    sim.add_argument("--seed", type=int, default=1000, help="of the scenes (default: 1000)")
    sim.add_argument("--episode", type=int, default=0, help="which scene (default: 0)")
    ros2 = p.add_argument_group("of --robot ros2")
    ros2.add_argument("--ros2", type=Path, metavar="FILE", help="YAML: controller, topics (ros2_robot.py: Ros2Options)")
    rtde = p.add_argument_group("of --robot rtde (its defaults, with their sources: rtde_robot.py)")
    rtde.add_argument("--host", metavar="ADDRESS", help="of the robot")
    rtde.add_argument(
        "--camera", action="append", metavar="NAME=SOURCE", help="a device or a stream's address, for each camera"
    )
    rtde.add_argument("--servo-lookahead-s", type=float, metavar="S", help="of servoJ: 0.03 to 0.2")
    rtde.add_argument("--servo-gain", type=float, metavar="X", help="of servoJ: 100 to 2000")
    return p


def main(argv: Sequence[str] | None = None) -> int:
    """Entry of `python -m ur10e_deploy.run`. Exit codes: see the top of this file."""
    return in_one_line(run, parser().parse_args(argv), report.NUMBERS)


if __name__ == "__main__":
    sys.exit(main())
