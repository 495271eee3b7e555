"""`--robot ros2` at length, over real middleware: tables of docs/runner.md.

    python -m tests.soak_ros2 success --checkpoint outputs/demo --scenes 200 --minutes 15
    python -m tests.soak_ros2 faults
    python -m tests.soak_ros2 kills --kills 200

The runner is tests/ros2_runner.py in one process, the arm sim/ros2_arm.py in another; needs `make .ros2/installed`.
Prints Markdown. `faults`, `kills` and a part of `success` run by the wall clock: on a machine that does nothing else.
Exit code 1 when what must hold does not: a command beyond a limit in the arm's own log, a fault that does not end as it
should, success more than 5 points from the one in process.
"""

from __future__ import annotations

import argparse
import json
import random
import sys
import tempfile
import time
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import torch
from ur10e_deploy.control import ControlLoop, ControlSettings
from ur10e_deploy.limits import default_limits
from ur10e_deploy.playback import Playback
from ur10e_deploy.policy_runner import PolicyRunner
from ur10e_deploy.thinking import Thinker
from ur10e_deploy.watchdog import AgeLimits, Watchdog

from sim.robot import SimRobot
from sim.world import TIMEOUT_S, Conditions, World
from tests.ros2 import INSTALLED, Arm, start_in_ros2
from tests.soak_robot import POINTS, SEED, broken, head, row

HZ, LAG_S = 250.0, 0.03  # LAG_S as sim.ros2_arm's
SMALL = ("--seed", "11", "--height", "32", "--width", "48")  # as tests/ros2_runner.py's expert
FAULT_S = 1.1  # after the arm began to move: in the middle of the first stroke


def said_of(arm: Arm, *options: str, hz: float = HZ) -> list[dict[str, Any]]:
    """What a runner says of its scenes."""
    runner = start_in_ros2(["-m", "tests.ros2_runner", "--command-hz", f"{hz:g}", *options], arm.domain)
    assert runner.stdout is not None
    said = [json.loads(line) for line in runner.stdout if line.startswith("{")]
    if runner.wait():
        sys.exit(f"error: the runner ended with {runner.returncode}")
    return said


def past_limits(log: dict[str, np.ndarray], hz: float = HZ) -> list[str]:
    """Which limits the commands of an arm's own log break."""
    path = np.concatenate([log["path_rad"][:1], log["command_rad"]])
    return broken(path, hz, default_limits())


def in_process(runner: PolicyRunner, scenes: int, fraction: float, hz: float) -> float:
    """Success of the same loop over the same arm in this process."""
    ((camera, (height, width)),) = runner.contract.recorded_cameras.items()
    done = 0
    for episode in range(scenes):
        world = World(SEED, episode, height, width, Conditions(lag_s=LAG_S), control_hz=hz)
        how = ControlSettings(
            fps=runner.contract.fps or 30.0, command_hz=hz, speed_fraction=fraction, duration_s=TIMEOUT_S / fraction,
            max_limited_s=TIMEOUT_S / fraction, replan_frames=runner.n_action_steps,
        )  # fmt: skip
        watchdog = Watchdog(AgeLimits(), runner.contract.cameras)
        robot = SimRobot(world, camera)
        ControlLoop(robot, Thinker(runner, True), default_limits(), how, watchdog, Playback("cross-fade")).run()
        done += world.outcome().success
    return done / scenes


def success(args: argparse.Namespace) -> bool:
    """The touch task in process and in lock step, at some speeds, and by the wall clock at full speed."""
    runner = PolicyRunner(args.checkpoint, backend="native")
    ((height, width),) = runner.contract.recorded_cameras.values()
    pixels = ("--height", str(height), "--width", str(width))
    head("Through", "Speed fraction", "Success", "Commands", "of them limited", "Past a limit", "Ended early",
         "Periods missed", "Late by, ms: p50", "p99", "Wall s per scene")  # fmt: skip
    base, fine, notes = {}, True, []
    for fraction in args.speed_fractions:
        base[fraction] = in_process(runner, args.scenes, fraction, args.command_hz)
        row("in process", fraction, f"{base[fraction]:.1%} of {args.scenes}", *[""] * 8)
    ways = [("lock step", fraction, 1e9) for fraction in args.speed_fractions]
    for clock, fraction, minutes in [*ways, *([("real time", 1.0, args.minutes)] if args.minutes else [])]:
        flags = ["--lock-step"] if clock == "lock step" else []
        with tempfile.TemporaryDirectory() as folder, Arm(Path(folder), "--seed", str(SEED), *pixels, *flags) as arm:
            began_s = time.monotonic()
            said = said_of(
                arm, "--checkpoint", str(args.checkpoint), "--scenes", str(args.scenes), "--speed-fraction",
                str(fraction), "--seconds", str(TIMEOUT_S / fraction), "--minutes", str(minutes), *flags,
                hz=args.command_hz,
            )  # fmt: skip
            took_s = time.monotonic() - began_s
            arm.stop()
            logs = [arm.log(scene) for scene in range(len(said))]
        if refused := [one["error"] for one in said if "error" in one]:
            notes.append(f"{clock}: {len(refused)} were refused: {refused[0]}")
        ran = [one for one in said if "error" not in one]
        bad = sum(bool(past_limits(log, args.command_hz)) for log in logs if len(log["command_rad"]))
        rate = sum(one["outcome"]["success"] for one in ran) / max(len(said), 1)
        share = sum(one["limited"] for one in ran) / max(sum(one["periods"] for one in ran), 1)
        late = [float(np.median([one["late_ms"][p] for one in ran])) if ran else np.nan for p in ("p50", "p99")]
        row(f"ros2, {clock}", fraction, f"{rate:.1%} of {len(said)}", sum(len(log["command_rad"]) for log in logs),
            f"{share:.1%}", f"{bad} scenes" if bad else "none", sum(not one["orderly"] for one in ran),
            sum(one["missed"] for one in ran), *(f"{value:.2f}" for value in late),
            f"{took_s / max(len(said), 1):.1f}")  # fmt: skip
        for ended, count in Counter(one["ended"] for one in ran if not one["orderly"]).most_common(3):
            notes.append(f"{clock}: {count} ended early: {ended}")
        if fraction not in base:
            base[fraction] = in_process(runner, len(said), fraction, args.command_hz)
            row("in process", fraction, f"{base[fraction]:.1%} of {len(said)}", *[""] * 8)
        fine &= not bad and not refused and abs(rate - base[fraction]) * 100 <= POINTS
    print("", *notes, sep="\n")
    return fine


EITHER = "held or not"  # what is as long as the age limit: a millisecond decides
# what -> (the arm's faults, the runner's, the kind of stop that it must lead to or None, whether the run goes on)
FAULTS: dict[str, tuple[list[str], str, str | None, bool]] = {
    "camera dies": ([f"camera:{FAULT_S}"], "", "holding", False),
    "camera away for 1 s": ([f"camera:{FAULT_S}:{FAULT_S + 1}"], "", "holding", True),
    "joint states away for 0.1 s": ([f"joints:{FAULT_S}:{FAULT_S + 0.1}"], "", EITHER, True),
    "joint states away for 0.5 s": ([f"joints:{FAULT_S}:{FAULT_S + 0.5}"], "", "holding", True),
    "joint states away for 2 s": ([f"joints:{FAULT_S}:{FAULT_S + 2}"], "", "holding", True),
    "joint states stop": ([f"joints:{FAULT_S}"], "", "holding", False),
    "inference takes 300 ms once": ([], "slow once", None, True),
    "inference takes 300 ms always": ([], "slow always", None, True),
    "policy gives NaN once": ([], "nan once", "holding", True),
    "policy gives NaN always": ([], "nan always", "holding", False),
    "a second publisher of joint states": ([f"joint publisher:{FAULT_S}"], "", "halted", False),
    "a second publisher of commands": ([f"commander:{FAULT_S}"], "", "halted", False),
    "protective stop, released after 0.3 s": ([f"protective stop:{FAULT_S}:{FAULT_S + 0.3}"], "", "halted", False),
    "the robot's program ends": ([f"program:{FAULT_S}"], "", "halted", False),
}


def stopping(log: dict[str, np.ndarray], at_s: float) -> tuple[str, str, str]:
    """Of an arm's own log from at_s on: speed then, when it first stood still, its peak deceleration till then.

    Both over 20 ms: a controller that holds each command until the next one makes the arm's speed ripple.
    """
    hz = float(log["path_hz"])
    over = round(0.02 * hz)
    path = log["path_rad"]
    speed = (path[over:] - path[:-over]) * hz / over  # speed[i] is that of the 20 ms after sample i
    fastest = np.abs(speed).max(axis=1)
    at = min(max(round(at_s * hz), over), len(speed) - 1)
    still = np.flatnonzero(fastest[at:] < 1e-3)
    rest = at + int(still[0]) if len(still) else len(speed) - 1
    span = speed[at - over : rest + 1]
    slowing = np.abs(span[over:] - span[:-over]).max(initial=0.0) * hz / over
    within = f"{(rest - at) / hz:.3f}" if len(still) else "never"
    return f"{fastest[at - over]:.2f}", within, f"{slowing:.2f}"


def faults(args: argparse.Namespace) -> bool:
    """Each fault in the middle of the expert's first stroke, by the wall clock, at full speed."""
    fine = True
    head("Fault, at full speed", "Speed then, rad/s", "Stands after, s", "Peak deceleration, rad/s²",
         "On again after, s", "Ends", "Touches the block", "Past a limit")  # fmt: skip
    arms = [f"{scene}:{fault}" for scene, (of, _, _, _) in enumerate(FAULTS.values()) for fault in of]
    spoils = [f"{scene}:{kind}" for scene, (_, kind, _, _) in enumerate(FAULTS.values()) if kind]
    options = [word for fault in arms for word in ("--fault", fault)]
    with tempfile.TemporaryDirectory() as folder, Arm(Path(folder), *SMALL, *options) as arm:
        said = said_of(
            arm, "--scenes", str(len(FAULTS)), "--seconds", "9", "--recover-s", "2.5",
            *(word for spoil in spoils for word in ("--spoil", spoil)),
        )  # fmt: skip
        arm.stop()
        logs = [arm.log(scene) for scene in range(len(FAULTS))]
    for (what, (of, _, kind, goes_on)), one, log in zip(FAULTS.items(), said, logs, strict=True):
        if "error" in one:
            row(what, "", "", "", "", f"refused: {one['error']} (UNEXPECTED)", "", "")
            fine = False
            continue
        stop = next((s for s in one["stops"] if s["kind"] in ("holding", "halted")), None)
        bad, touched = past_limits(log), one["outcome"]["success"]
        expected = (None, "holding") if kind == EITHER else (kind,)
        well = (stop["kind"] if stop else None) in expected and one["orderly"] == goes_on == touched
        fine &= well and not bad
        # The arm's own time of the fault; of one in the policy: when the commands began to brake is not in its log.
        figures = stopping(log, float(log["moved_s"]) + FAULT_S) if of and stop else ("", "", "")
        resumed = "" if stop is None else "never"
        if stop and stop["resumed_s"] is not None:
            resumed = f"{stop['resumed_s'] - stop['at_s']:.2f}"
        row(what, *figures, resumed, one["ended"] + ("" if well else " (UNEXPECTED)"), "yes" if touched else "no",
            ", ".join(bad) or "none")  # fmt: skip
    return fine


def kills(args: argparse.Namespace) -> bool:
    """SIGKILL at random moments of a run: what the arm does then, in its own log."""
    rng, fine, rest_s, slowing, speeds, commands, odd = random.Random(0), True, [], [], [], 0, 0
    with tempfile.TemporaryDirectory() as folder, Arm(Path(folder), *SMALL) as arm:
        for kill in range(args.kills):
            options = ["--next-first"] if kill else []
            program = ["-m", "tests.ros2_runner", "--command-hz", f"{HZ:g}", "--episode", str(kill), *options]
            runner = start_in_ros2(program, arm.domain)
            assert runner.stdout is not None
            for line in runner.stdout:
                if line.rstrip().endswith("running"):
                    break
            time.sleep(rng.uniform(0.0, 3.5))
            runner.kill()
            runner.communicate()
        time.sleep(1.5)
        arm.stop()
        for kill in range(args.kills):
            log = arm.log(kill)
            if not len(log["command_s"]):
                odd += 1
                continue
            if bad := past_limits(log):
                print(f"kill {kill}: commands break {', '.join(bad)}")
                fine = False
            at_s = float(log["command_s"][-1])
            speed, within, peak = stopping(log, at_s)
            there = np.abs(log["path_rad"][-1] - log["command_rad"][-1]).max() < 1e-3
            if within == "never" or not there:
                print(f"kill {kill}: the arm is not where it was sent last ({within} s)")
                fine = False
                continue
            commands += len(log["command_rad"])
            speeds.append(float(speed))
            rest_s.append(float(within))
            slowing.append(float(peak))
    head("Kills", "Commands", "Past a limit", "Fastest joint when killed, rad/s: median", "largest",
         "Stands after, s: median", "largest", "Peak deceleration, rad/s²: median", "largest")  # fmt: skip
    figures = [f"{value:.2f}" for of in (speeds, rest_s, slowing) for value in (np.median(of), max(of))]
    row(len(rest_s), commands, "none" if fine else "SOME", *figures)
    if odd:
        print(f"\n{odd} runs had no command: killed before one, or the arm's next scene did not begin.")
    return fine and odd < args.kills / 10


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m tests.soak_ros2", description=__doc__.splitlines()[0])
    commands = parser.add_subparsers(dest="command", required=True)
    of_success = commands.add_parser("success")
    of_success.add_argument("--checkpoint", type=Path, required=True)
    of_success.add_argument("--scenes", type=int, default=200)
    of_success.add_argument("--command-hz", type=float, default=HZ)
    of_success.add_argument("--speed-fractions", type=float, nargs="*", default=[1.0, 0.25])
    of_success.add_argument("--minutes", type=float, default=15.0, help="by the wall clock; 0: not at all")
    commands.add_parser("faults")
    commands.add_parser("kills").add_argument("--kills", type=int, default=200)
    args = parser.parse_args()
    if not INSTALLED:
        sys.exit("error: no rclpy: `make .ros2/installed` gets it where wheels exist (Python 3.11, x86-64)")
    torch.set_num_threads(1)
    began_s = time.monotonic()
    fine = {"success": success, "faults": faults, "kills": kills}[args.command](args)
    print(f"\n{time.monotonic() - began_s:.0f} s.")
    return 0 if fine else 1


if __name__ == "__main__":
    sys.exit(main())
