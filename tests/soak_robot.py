"""The robot side over the simulated arm, at length: the tables of docs/runner.md.

    python -m tests.soak_robot success --checkpoint outputs/demo --scenes 40
    python -m tests.soak_robot faults
    python -m tests.soak_robot hostile --seconds 1000
    python -m tests.soak_robot seams --checkpoint outputs/demo --scenes 10
    python -m tests.soak_robot jitter --checkpoint outputs/demo --seconds 30
    python -m tests.soak_robot rtde

Prints Markdown. All in lock step but `jitter` and `rtde`. Exit code 1 when what must hold does not: a command beyond a
limit, a fault that does not end as it should, success more than 5 points from sim.rollout's.
"""

from __future__ import annotations

import argparse
import multiprocessing
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from ur10e_deploy.control import HALTED, HOLDING, ControlLoop, ControlSettings
from ur10e_deploy.limits import Limits, default_limits
from ur10e_deploy.playback import Playback
from ur10e_deploy.policy_runner import PolicyRunner
from ur10e_deploy.robot import Robot
from ur10e_deploy.rtde_robot import LOST_S, WATCHDOG_HZ
from ur10e_deploy.run_report import differences, percentiles_ms
from ur10e_deploy.thinking import Thinker
from ur10e_deploy.watchdog import AgeLimits, Watchdog

from sim.closed_loop import PolicyDriver, roll_out
from sim.faults import BRAKING_RAD_S2, CAMERA, JOINTS, PROGRAM, PROTECTIVE, SLOWED, Fault
from sim.robot import SimRobot
from sim.rtde_arm import LOST, WATCHED
from sim.world import TIMEOUT_S, World
from tests.robots import CHUNK, RtdeArm, contract, make_loop, make_rtde_loop

SEED, HZ = 1000, 250.0
POINTS = 5.0  # of success, that the runner may differ from sim.rollout
ENDLESS = dict(max_limited_s=1e9, max_beyond_rad=1e9)


def row(*cells: object) -> None:
    print("| " + " | ".join(str(cell) for cell in cells) + " |", flush=True)


def head(*cells: str) -> None:
    row(*cells)
    print("|" + "---|" * len(cells), flush=True)


def broken(path_rad: np.ndarray, hz: float, limits: Limits) -> list[str]:
    """Which limits the commands (N, 6) from rest break; [] for none."""
    at_rest = np.concatenate([np.repeat(path_rad[:1], 3, axis=0), path_rad])
    found = [] if np.isfinite(path_rad).all() else ["finite"]
    if not ((path_rad >= limits.low_rad) & (path_rad <= limits.high_rad)).all():
        found.append("position")
    allowed = (limits.speed_rad_s, limits.acceleration_rad_s2, limits.jerk_rad_s3)
    for name, values, limit in zip(
        ("speed", "acceleration", "jerk"), differences(at_rest, 1 / hz), allowed, strict=True
    ):
        if not (np.abs(values) <= limit).all():
            found.append(name)
    return found + (["workspace"] if limits.workspace_error(path_rad) else [])


def sent(robot: SimRobot) -> np.ndarray:
    return np.concatenate([robot.world.path_rad[:1], [q for _, q in robot.sent]])


def policy_loop(
    runner: PolicyRunner, episode: int, seam: str = "cross-fade", smooth_frames: float | None = None,
    limits: Limits | None = None, real_time: bool = False, latency_s: float = 0.0, hz: float = HZ, **settings: Any,
) -> tuple[ControlLoop, SimRobot]:  # fmt: skip
    """The checkpoint's loop, as `ur10e_deploy.run` puts it together, on a scene of sim.rollout's."""
    ((camera, (height, width)),) = runner.contract.cameras.items()
    how = ControlSettings(fps=runner.contract.fps or 30.0, command_hz=hz, **settings)
    robot = SimRobot(World(SEED, episode, height, width, control_hz=hz), camera, real_time)
    thinker = Thinker(runner, not real_time, lambda _: latency_s)
    playback = Playback(seam, **({} if smooth_frames is None else {"smooth_frames": smooth_frames}))
    watchdog = Watchdog(AgeLimits(), runner.contract.cameras)
    return ControlLoop(robot, thinker, limits or default_limits(), how, watchdog, playback), robot


def success(args: argparse.Namespace) -> bool:
    """Closed-loop success through the runner and, on the same scenes, as sim.rollout measures it."""
    runner = PolicyRunner(args.checkpoint, backend="native")
    ((height, width),) = runner.contract.cameras.values()
    worlds = [World(SEED, episode, height, width) for episode in range(args.scenes)]
    driver = PolicyDriver(runner, len(worlds))
    roll_out(worlds, driver)
    base = sum(world.outcome().success for world in worlds) / args.scenes
    head("Through", "speed fraction", "latency, ms", "success", "commands limited", "peak speed, rad/s",
         "peak acceleration, rad/s²", "ended early")  # fmt: skip
    row("sim.rollout", 1, 0, f"{base:.1%} of {args.scenes}", "", "", "", "")
    fine = True
    for fraction, latency_s in ((1.0, 0.0), (0.25, 0.0), *(((1.0, 0.2),) if args.latency else ())):
        done = limited = total = early = 0
        speeds, accelerations = [], []
        for episode in range(args.scenes):
            loop, robot = policy_loop(
                runner, episode, speed_fraction=fraction, duration_s=TIMEOUT_S / fraction, latency_s=latency_s,
                replan_frames=runner.n_action_steps, max_limited_s=TIMEOUT_S,
            )  # fmt: skip
            loop.run()
            done += robot.world.outcome().success
            early += not loop.orderly
            limited, total = limited + sum(loop.log.limited), total + len(loop.log.limited)
            path = sent(robot)
            fine &= not broken(path, HZ, default_limits())
            speed, acceleration, _ = differences(path, 1 / HZ)
            speeds.append(np.abs(speed).max())
            accelerations.append(np.abs(acceleration).max())
        rate = done / args.scenes
        if not latency_s:
            fine &= abs(rate - base) * 100 <= POINTS
        row("ur10e_deploy.run", fraction, f"{latency_s * 1e3:g}", f"{rate:.1%} of {args.scenes}",
            f"{limited / total:.1%}", f"{max(speeds):.2f}", f"{max(accelerations):.2f}", early)  # fmt: skip
    return fine


def nan_from(first: int, last: float) -> Callable[[int, np.ndarray], np.ndarray]:
    return lambda number, chunk: np.full_like(chunk, np.nan) if first <= number < last else chunk


FAULT_S = 1.1  # in the middle of the first stroke
# what -> (make_loop's arguments, the kind of stop that it must lead to or None, whether the run goes on)
FAULTS: dict[str, tuple[dict[str, Any], str | None, bool]] = {
    "camera dies": (dict(faults=[Fault(CAMERA, FAULT_S)]), HOLDING, False),
    "camera away for 1 s": (dict(faults=[Fault(CAMERA, FAULT_S, FAULT_S + 1)]), HOLDING, True),
    "joint states away for 0.1 s": (dict(faults=[Fault(JOINTS, FAULT_S, FAULT_S + 0.1)]), HOLDING, True),
    "joint states away for 0.5 s": (dict(faults=[Fault(JOINTS, FAULT_S, FAULT_S + 0.5)]), HOLDING, True),
    "joint states away for 2 s": (dict(faults=[Fault(JOINTS, FAULT_S, FAULT_S + 2)]), HOLDING, True),
    "joint states stop": (dict(faults=[Fault(JOINTS, FAULT_S)]), HOLDING, False),
    "inference takes 300 ms once": (dict(latency_s=lambda n: 0.3 if n == 3 else 0.02), None, True),
    "inference takes 300 ms always": (dict(latency_s=lambda n: 0.3), None, True),
    "inference takes 2.2 s once": (dict(latency_s=lambda n: 2.2 if n == 2 else 0.02), HOLDING, True),
    "policy gives NaN once": (dict(spoil=nan_from(3, 4)), HOLDING, True),
    "policy gives NaN always": (dict(spoil=nan_from(3, np.inf)), HOLDING, False),
    "protective stop, released after 0.5 s": (
        dict(faults=[Fault(PROTECTIVE, FAULT_S, FAULT_S + 0.5)]), HALTED, False,
    ),
}  # fmt: skip


def faults(args: argparse.Namespace) -> bool:
    """Each fault in the middle of the expert's first stroke: how long the arm takes to stop, and how hard it brakes."""
    fine = True
    head("Fault, at full speed", "Speed then, rad/s", "Stops within, s", "Peak deceleration, rad/s²",
         "On again after, s", "Ends", "Touches the block")  # fmt: skip
    for what, (arguments, kind, goes_on) in FAULTS.items():
        loop, robot = make_loop(contract(), seconds=9.0, command_hz=HZ, recover_s=2.5, **arguments)
        loop.run()
        stop = next((s for s in loop.log.stops if s.kind in (HOLDING, HALTED)), None)
        well = (stop.kind if stop else None) == kind and loop.orderly == goes_on == robot.world.outcome().success
        fine &= well and not broken(sent(robot), HZ, default_limits())
        speed = within = peak = after = ""
        if stop is not None:
            log = np.array(robot.world.command_rad)  # the simulator's own, the robot's braking included
            at = round(stop.at_s * HZ)
            moving = np.abs(np.diff(log[at - 2 :], axis=0)).max(axis=1) * HZ
            rest = int(np.argmax(moving < 1e-6)) if (moving < 1e-6).any() else len(moving)
            _, braking, _ = differences(log[at - 2 : at + rest + 2], 1 / HZ)
            speed, within, peak = f"{moving[0]:.2f}", f"{(rest - 1) / HZ:.3f}", f"{np.abs(braking).max():.2f}"
            after = f"{stop.resumed_s - stop.at_s:.2f}" if stop.resumed_s is not None else "never"
        row(what, speed, within, peak, after, loop.ended + ("" if well else " (UNEXPECTED)"),
            "yes" if robot.world.outcome().success else "no")  # fmt: skip
    print(f"\nThe braking of the protective stop is the simulator's own, {BRAKING_RAD_S2:g} rad/s².")
    return fine


def hostile(args: argparse.Namespace) -> bool:
    """A policy of random jumps, through the whole loop: never a command past a limit, for so many simulated seconds."""
    limits, fine, done_s, episode = default_limits(), True, 0.0, 0
    peaks, limited, periods, began_s = np.zeros((3, 6)), 0, 0, time.perf_counter()
    span_s = 20.0
    while done_s < args.seconds:
        rng = np.random.default_rng(episode)
        scale = 10 ** rng.uniform(-2.5, 1)

        def spoil(number: int, chunk: np.ndarray, rng=rng, scale=scale) -> np.ndarray:
            kind = rng.integers(4)
            if kind == 0:
                return chunk + rng.normal(0, scale, chunk.shape)
            if kind == 1:
                return chunk[:1] + np.cumsum(rng.normal(0, scale / 10, chunk.shape), axis=0)
            if kind == 2:
                return chunk + rng.uniform(-scale, scale, (1, 6))
            return rng.uniform(-2 * np.pi, 2 * np.pi, (CHUNK, 6))

        loop, robot = make_loop(
            contract(), seconds=span_s, spoil=spoil, seam=("none", "cross-fade", "ensemble")[episode % 3],
            episode=episode, replan_frames=int(rng.integers(1, 12)), command_hz=args.command_hz, **ENDLESS,
        )  # fmt: skip
        loop.playback._smooth_frames = float(rng.choice([0.0, 2.0]))
        loop.run()
        path = sent(robot)
        if bad := broken(path, args.command_hz, limits):
            print(f"episode {episode}: commands break {', '.join(bad)}")
            fine = False
        if loop._phase == HALTED:
            print(f"episode {episode}: {loop.ended}")
        found = differences(path, 1 / args.command_hz)
        peaks = np.maximum(peaks, [np.abs(values).max(axis=0) for values in found])
        limited, periods = limited + sum(loop.log.limited), periods + len(loop.log.limited)
        done_s, episode = done_s + robot.clock.now_s(), episode + 1
    head(
        "Simulated, s",
        "Commands",
        "of them limited",
        "Past a limit",
        "Peak speed, of the limit",
        "acceleration",
        "jerk",
    )
    allowed = (limits.speed_rad_s, limits.acceleration_rad_s2, limits.jerk_rad_s3)
    shares = [f"{(peak / limit).max():.4%}" for peak, limit in zip(peaks, allowed, strict=True)]
    row(f"{done_s:.0f}", periods, f"{limited / periods:.0%}", "none" if fine else "SOME", *shares)
    print(f"\n{args.command_hz:g} Hz, {time.perf_counter() - began_s:.0f} s by the wall clock.")
    return fine


def seams(args: argparse.Namespace) -> bool:
    """Peak joint acceleration at chunk switches, of the path before any limit, with and without blending."""
    runner = PolicyRunner(args.checkpoint, backend="native")
    none = replace(default_limits(), acceleration_rad_s2=np.full(6, 1e4), jerk_rad_s3=np.full(6, 1e7))
    variants = {
        "chunks as they are, no blending": ("none", 0.0), "smoothed, no blending": ("none", None),
        "as they are, cross-fade": ("cross-fade", 0.0), "smoothed, cross-fade (default)": ("cross-fade", None),
        "smoothed, ensemble": ("ensemble", None),
    }  # fmt: skip
    head("Path", "Jumps between chunks, rad: median", "largest", "Peak acceleration at switches, rad/s²: median",
         "largest", "Peak speed, rad/s", "Touched")  # fmt: skip
    for what, (seam, smooth_frames) in variants.items():
        jumps, peaks, speeds, touched = [], [], [], 0
        for episode in range(args.scenes):
            loop, robot = policy_loop(
                runner, episode, seam, smooth_frames, none, speed_fraction=1.0, duration_s=TIMEOUT_S,
                replan_frames=2 if seam == "ensemble" else runner.n_action_steps, **ENDLESS,
            )  # fmt: skip
            loop.run()
            path = sent(robot)
            speed, acceleration, _ = differences(path, 1 / HZ)
            came = [round(came_s * HZ) for came_s, _, _ in loop.log.answers[1:]]
            peaks += [np.abs(acceleration[at : at + round(0.34 * HZ)]).max(initial=0.0) for at in came]
            jumps += np.abs(loop.playback.jumps).max(axis=1).tolist()
            speeds.append(np.abs(speed).max())
            touched += robot.world.outcome().success
        row(what, f"{np.median(jumps):.4f}", f"{max(jumps):.4f}", f"{np.median(peaks):.2f}", f"{max(peaks):.1f}",
            f"{max(speeds):.2f}", f"{touched} of {args.scenes}")  # fmt: skip
    return True


def jitter(args: argparse.Namespace) -> bool:
    """The loop by the wall clock, the policy in its thread: how even its periods are on this machine."""
    runner = PolicyRunner(args.checkpoint, backend="native")
    loop, _ = policy_loop(
        runner,
        0,
        real_time=True,
        hz=args.command_hz,
        max_gap_s=1e9,
        duration_s=args.seconds,
        replan_frames=runner.n_action_steps,
        speed_fraction=0.25,
    )
    loop.run()
    head("ms", "p50", "p99", "p99.9", "largest")
    kinds = {"period": np.diff(loop.log.time_s).tolist(), "late by": loop.log.late_s,
             "inference": [a.seconds for _, a, _ in loop.log.answers]}  # fmt: skip
    for name, values in kinds.items():
        row(name, *(percentiles_ms(values) or {}).values())
    print(f"\n{loop.log.missed_periods} periods of {len(loop.log.time_s)} missed; ended: {loop.ended}")
    return True


def rtde(args: argparse.Namespace) -> bool:
    """`--robot rtde`, with its defaults, against sim.rtde_arm: what the arm did, from the controller's own log."""
    fine = True
    head("While it moves", "Speed then, rad/s", "Last command after, s", "Stands after, s",
         "Peak deceleration, rad/s², over 20 ms", "Ends", "On the controller")  # fmt: skip
    for fault in (PROTECTIVE, SLOWED, PROGRAM, LOST, WATCHED):
        with tempfile.TemporaryDirectory() as folder, RtdeArm(Path(folder), "--fault", fault, "--lasts-s", "2") as arm:
            if fault == WATCHED:
                runner = multiprocessing.get_context("fork").Process(target=_rtde_loop, args=(arm,))
                runner.start()
                arm.wait_for("fault")
                runner.kill()
                runner.join()
                ended = "SIGKILL"
            else:
                loop, robot = _rtde_loop(arm)
                ended = loop.ended
                robot.close()
            if fault != LOST:
                arm.wait_for("released")
            time.sleep(0.5)
        at_s, last_s = arm.events[f"fault: {fault}"], arm.received[-1, 0]
        at, speed = round(at_s * 500), np.diff(arm.path_rad, axis=0) * 500
        rest = at + int(np.argmax(~(np.abs(speed[at:]) > 1e-3).any(axis=1)))
        braking = np.abs(speed[at + 10 : rest + 10] - speed[at:rest]).max() / 0.02
        done = [text for text, event_s in arm.events.items() if event_s >= at_s and text != f"fault: {fault}"]
        fine &= not broken(np.concatenate([arm.path_rad[:1], arm.targets_rad]), HZ, default_limits())
        fine &= not np.abs(speed[-5:]).any() and "somebody pressed play" not in done
        row({WATCHED: "the runner is killed"}.get(fault, fault), f"{np.abs(speed[at]).max():.2f}",
            f"{last_s - at_s:.3f}", f"{(rest - at) / 500:.3f}", f"{braking:.1f}", ended, "; ".join(done))  # fmt: skip
    return fine


def _rtde_loop(arm: RtdeArm) -> tuple[ControlLoop, Robot]:
    loop, robot = make_rtde_loop(arm, {"watchdog_hz": WATCHDOG_HZ, "lost_s": LOST_S}, command_hz=HZ)
    loop.run()
    return loop, robot


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m tests.soak_robot", description=__doc__.splitlines()[0])
    commands = parser.add_subparsers(dest="command", required=True)
    for name in ("success", "seams", "jitter"):
        commands.add_parser(name).add_argument("--checkpoint", type=Path, required=True)
    for name, scenes in (("success", 40), ("seams", 10)):
        commands.choices[name].add_argument("--scenes", type=int, default=scenes)
    commands.choices["success"].add_argument("--latency", action="store_true", help="also with 200 ms of latency")
    commands.add_parser("faults")
    commands.add_parser("rtde")
    commands.add_parser("hostile")
    for name, seconds, hz in (("hostile", 1000.0, 125.0), ("jitter", 30.0, HZ)):
        commands.choices[name].add_argument("--seconds", type=float, default=seconds)
        commands.choices[name].add_argument("--command-hz", type=float, default=hz)
    args = parser.parse_args()
    torch.set_num_threads(1)
    run = {
        "success": success, "faults": faults, "hostile": hostile, "seams": seams, "jitter": jitter, "rtde": rtde,
    }[args.command]  # fmt: skip
    return 0 if run(args) else 1


if __name__ == "__main__":
    sys.exit(main())
