"""Control loops over --robot ros2, one scene of sim.ros2_arm after the other; a JSON line for each.

    python -m tests.ros2_runner --scenes 3 --seconds 5 --lock-step                     # the scene's expert as policy
    python -m tests.ros2_runner --scenes 3 --seconds 6 --checkpoint outputs/demo

Run in the environment of tests/ros2.py, beside a node of the same --seed and first --episode.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import rclpy
import torch
import yaml
from rclpy.context import Context
from rclpy.executors import SingleThreadedExecutor
from std_srvs.srv import Trigger
from ur10e_deploy.config import PolicyError
from ur10e_deploy.control import ControlLoop, ControlSettings
from ur10e_deploy.limits import default_limits
from ur10e_deploy.playback import Playback
from ur10e_deploy.policy_runner import PolicyRunner
from ur10e_deploy.robot import RobotOptions, open_robot
from ur10e_deploy.run_report import percentiles_ms
from ur10e_deploy.start_checks import check_start
from ur10e_deploy.thinking import Thinker
from ur10e_deploy.watchdog import AgeLimits, Watchdog

from sim.world import World
from tests.robots import FPS, ExpertPolicy, contract


def next_scene() -> dict[str, Any]:
    """Begin the next one; -> how this one ended, as sim.ros2_arm judges it."""
    context = Context()
    rclpy.init(context=context)
    node = rclpy.create_node("test_scenes", context=context)
    executor = SingleThreadedExecutor(context=context)
    executor.add_node(node)
    client = node.create_client(Trigger, "/sim/next_scene")
    assert client.wait_for_service(10.0)
    future = client.call_async(Trigger.Request())
    executor.spin_until_future_complete(future, 10.0)
    answer = future.result().message
    executor.shutdown()
    node.destroy_node()
    context.try_shutdown()
    return json.loads(answer)


def spoiled(kind: str) -> Callable[[int, np.ndarray], np.ndarray]:
    """What of the expert's answers is wrong: "slow" takes 300 ms, "nan" is none; "once" is the fourth."""
    what, when = kind.split()

    def spoil(number: int, chunk: np.ndarray) -> np.ndarray:
        if number != 3 and not (when == "always" and number > 3):
            return chunk
        if what == "nan":
            return np.full_like(chunk, np.nan)
        time.sleep(0.3)
        return chunk

    return spoil


def one_scene(args: argparse.Namespace, scene: int, runner: PolicyRunner | None, how: Path) -> dict[str, Any]:
    """A run from where the arm is to its end."""
    kinds = dict(spoil.split(":") for spoil in args.spoil)
    spoil = spoiled(kinds[str(scene)]) if str(scene) in kinds else None
    policy = runner or ExpertPolicy(contract(), World(args.seed, args.episode + scene, 32, 48), spoil)
    agreed = policy.contract
    if str(scene) in (older := dict(trained.split(":") for trained in args.by_header)):
        ages = {camera: {"median": 0.0, "most": float(older[str(scene)])} for camera in agreed.cameras}
        agreed = replace(agreed, data_settings={"time_source": "header"}, image_age_s=ages)
    extra = {"contract": agreed, "ros2": how, "commanding": True}
    robot = open_robot("ros2", RobotOptions(args.command_hz, True, agreed.cameras, (), extra))
    fps = agreed.fps or FPS
    try:
        rate = 1.0 if args.max_age_s else fps  # that pictures must come at: on a machine that is busy, any
        notes = check_start(robot, agreed, rate, 1 / args.command_hz, True)
        settings = ControlSettings(
            fps=fps, command_hz=args.command_hz, speed_fraction=args.speed_fraction, duration_s=args.seconds,
            recover_s=args.recover_s, max_gap_s=args.max_gap_s, max_limited_s=args.seconds,
            replan_frames=runner.n_action_steps if runner else 10,
        )  # fmt: skip
        thinker = Thinker(policy, robot.clock.lock_step)  # ty: ignore[invalid-argument-type]
        ages = AgeLimits(args.max_age_s, args.max_age_s) if args.max_age_s else AgeLimits()
        loop = ControlLoop(
            robot, thinker, default_limits(), settings, Watchdog(ages, agreed.cameras), Playback("cross-fade"),
            say=lambda line: print(line, flush=True),
        )  # fmt: skip
        loop.run()
    finally:
        robot.close()
    return {
        "ended": loop.ended, "orderly": loop.orderly, "notes": notes, "stops": [vars(stop) for stop in loop.log.stops],
        "limited": sum(loop.log.limited), "periods": len(loop.log.time_s), "missed": loop.log.missed_periods,
        "late_ms": percentiles_ms(loop.log.late_s),
    }  # fmt: skip


def main() -> int:
    p = argparse.ArgumentParser(prog="python -m tests.ros2_runner")
    p.add_argument("--scenes", type=int, default=1)
    p.add_argument("--seconds", type=float, default=5.0)
    p.add_argument("--seed", type=int, default=11)
    p.add_argument("--episode", type=int, default=0)
    p.add_argument("--checkpoint", type=Path)
    p.add_argument("--lock-step", action="store_true")
    p.add_argument("--controller", default="forward_position_controller")
    p.add_argument("--camera-topic")
    p.add_argument("--command-hz", type=float, default=125.0)
    p.add_argument("--speed-fraction", type=float, default=1.0)
    p.add_argument("--recover-s", type=float, default=2.0)
    p.add_argument("--max-gap-s", type=float, default=0.04)
    p.add_argument("--max-age-s", type=float, help="of joint states and pictures, on a machine that is busy")
    p.add_argument("--spoil", action="append", default=[], metavar="SCENE:KIND", help="of the expert: see spoiled()")
    p.add_argument("--by-header", action="append", default=[], metavar="SCENE:S", help="trained so; images that old")
    p.add_argument("--absent-controller", type=int, action="append", default=[], metavar="SCENE")
    p.add_argument("--next-first", action="store_true", help="begin another scene first: after one that was killed")
    p.add_argument("--minutes", type=float, default=1e9, help="begin no further scene after that time")
    args = p.parse_args()
    torch.set_num_threads(1)
    runner = PolicyRunner(args.checkpoint, backend="native") if args.checkpoint else None
    with tempfile.TemporaryDirectory() as folder:
        how = Path(folder) / "ros2.yaml"
        content: dict[str, Any] = {"lock_step": args.lock_step}
        content |= {"camera_topics": {"color": args.camera_topic}} if args.camera_topic else {}
        if args.next_first:
            next_scene()
        began_s = time.monotonic()
        for scene in range(args.scenes):
            if time.monotonic() - began_s > 60 * args.minutes:
                break
            absent = scene in args.absent_controller
            how.write_text(
                yaml.safe_dump(content | {"controller": "absent_position_controller" if absent else args.controller})
            )
            try:
                said = one_scene(args, scene, runner, how)
            except PolicyError as error:
                said = {"error": str(error)}
            print(json.dumps(said | {"outcome": next_scene()}), flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())
