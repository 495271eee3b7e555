"""A policy in closed loop: who drives the simulated arms, and which runs stand beside the policy's own.

Knows: PolicyRunner, worlds by the dozen, the baselines that must fail.
Must not know: the success criterion (world.py), what is measured, files, the command line.
"""

import os
import threading
from concurrent.futures import ThreadPoolExecutor

import numpy as np
from ur10e_deploy.config import PolicyError
from ur10e_deploy.policy_runner import step_together

from sim.expert import Expert
from sim.scene import BLOCK_HIGH_M, BLOCK_LOW_M
from sim.world import TIMEOUT_S
from ur10e import JOINT_NAMES

TOGETHER = 25  # episodes that run side by side and share inferences
# Groups of episodes at a time: while one infers, another renders. More would wait for each other's Python code.
THREADS = min(3, os.cpu_count() or 1)
# Runs: the policy's own, and the baselines.
POLICY, MEAN_BLOCK, GREY, OTHER = "policy", "mean block position", "grey image", "another episode's image"
GREY_LEVEL = 128


def check_policy(runner):
    """Refuse a policy that this cell cannot feed.

    Raises:
        PolicyError: other joints, or not exactly one camera.
    """
    contract = runner.contract
    if len(contract.cameras) != 1:
        raise PolicyError(f"the policy sees {', '.join(contract.cameras)}; the simulated cell has one camera")
    if set(contract.state_names or ()) != set(JOINT_NAMES) or contract.action_names != list(contract.state_names):
        raise PolicyError(
            f"the policy's joints are {', '.join(contract.state_names or ['not named'])}; the simulated arm's are "
            f"{', '.join(JOINT_NAMES)}"
        )


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
        """Joint positions to command, (6,) rad each, in the order of JOINT_NAMES.

        A policy that asks for more than a joint can do finds it at its limit: here that is an episode lost, no error.
        """
        images = [
            {self._camera: self._look(world, i)} if fork.needs_images else {}
            for i, (world, fork) in enumerate(zip(worlds, self._forks, strict=True))
        ]
        states = [self._contract.state_from_robot(JOINT_NAMES, world.path_rad[-1]) for world in worlds]
        steps = step_together(self._forks, states, images)
        self.inferred.append(np.array([step.chunk is not None for step in steps]))
        order = [self._contract.state_names.index(name) for name in JOINT_NAMES]
        limited = [np.clip(step.command_rad, *self._contract.joint_limits_rad) for step in steps]
        return [self._contract.to_robot(command_rad)[order] for command_rad in limited]


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


def roll_out(worlds, driver, timeout_s=TIMEOUT_S, bar=None, stop=None):
    """Run every world from its start to the timeout, or until the event `stop`, under one driver."""
    for _ in range(round(timeout_s * worlds[0].control_hz)):
        if stop is not None and stop.is_set():
            return
        for world, command_rad in zip(worlds, driver.commands(worlds), strict=True):
            world.command(command_rad)
        if bar is not None:
            bar.update(len(worlds))


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
        if self._bar is not None:
            self._bar.set_description(name)
        stop = threading.Event()

        def run_group(first):
            group = [self._make_world(episode, conditions) for episode in episodes[first : first + TOGETHER]]
            driver = make_driver(group, first)
            roll_out(group, driver, self._timeout_s, self._bar, stop)
            return group, np.array(driver.inferred).T

        with ThreadPoolExecutor(THREADS) as pool:
            try:
                groups = list(pool.map(run_group, range(0, len(episodes), TOGETHER)))
            except BaseException:  # Ctrl-C, too: the other groups end at their next step
                stop.set()
                pool.shutdown(cancel_futures=True)
                raise
        self.worlds[name] = [world for group, _ in groups for world in group]
        self.inferred[name] = np.concatenate([inferred for _, inferred in groups])

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
