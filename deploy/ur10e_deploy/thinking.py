"""The policy beside the arm's motion: asked at one moment, its chunk there at a later one.

In real time the policy runs in a thread: PyTorch and the renderer let go of Python's lock while they compute. In lock
step it runs at once, and its answer is held back for as long as `latency_s` says, so that what latency does to a task
is the same every time.

Knows: PolicyRunner, what a chunk means as positions of the robot, how long answers take.
Must not know: what is done with a chunk (playback.py), limits.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass

import numpy as np

from ur10e import JOINT_NAMES

from .config import PolicyError, RobotContract
from .policy_runner import PolicyRunner
from .robot import JointReading


class ArmContract:
    """The policy's actions as what the control loop commands: six joints, then the other states it acts on.

    Positions here are (J,): the joints in the order of JOINT_NAMES, in the robot's signs and turns, in rad, then
    `others` in the contract's order.

    Raises:
        PolicyError: the policy does not act on exactly this arm.
    """

    def __init__(self, contract: RobotContract) -> None:
        names = contract.action_names or []
        of_arm = [[i for i, name in enumerate(names) if name.endswith(joint)] for joint in JOINT_NAMES]
        if any(len(found) != 1 for found in of_arm):
            raise PolicyError(
                f"{contract.source}: the policy acts on {', '.join(names) or 'joints without names'}; expected all of "
                f"{', '.join(JOINT_NAMES)}, once each"
            )
        joints = [found[0] for found in of_arm]
        self._order = [*joints, *(i for i in range(len(names)) if i not in joints)]
        self._sign = contract.acted_on(np.asarray(contract.joint_sign))[self._order]
        self.others = tuple(names[i] for i in self._order[6:])
        self.contract = contract
        if unknown := [name for name in self.others if name not in contract.state_topics]:
            raise PolicyError(
                f"{contract.source}: the policy acts on {', '.join(unknown)}, which are no joints of a UR"
            )

    def state(self, reading: JointReading) -> np.ndarray:
        """(S,) the policy's state. Raises PolicyError when something is missing or not finite."""
        return self.contract.state_from_robot(reading.names, reading.position_rad, reading.others)

    def here(self, state: np.ndarray) -> np.ndarray:
        """(J,) where the robot is, of (S,) the policy's state."""
        return self.contract.acted_on(state)[self._order] * self._sign

    def positions(self, chunk: np.ndarray, state: np.ndarray, commanded: np.ndarray) -> np.ndarray:
        """(N, J) what a chunk (N, A) of PolicyRunner.predict_chunk leads to.

        Args:
            chunk: actions.
            state: (S,) from which it was predicted.
            commanded: (J,) what was commanded at that moment; deltas add up from there.
        """
        here, last = self.contract.acted_on(state), np.empty(len(self._order))
        last[self._order] = commanded * self._sign
        rows = []
        for action in chunk:  # on the turn on which the joint was one action earlier
            last = self.contract.joint_command(action, here, last)
            here = last
            rows.append(last)
        return np.array(rows)[:, self._order] * self._sign


@dataclass(frozen=True)
class Answer:
    """A chunk, as positions, or why there is none.

    Attributes:
        number: of the question, from 0.
        frame: of playback, at which it was asked.
        asked_s, seconds: when on the robot's clock, and how long it took.
        positions: (N, J); None when the policy failed.
        chunk: (N, A) float32 as the policy said it.
        state: (S,) what it was asked with.
        error: why there is none; "" otherwise.
    """

    number: int
    frame: int
    asked_s: float
    seconds: float
    positions: np.ndarray | None
    chunk: np.ndarray | None
    state: np.ndarray
    error: str = ""


Images = Callable[[], Mapping[str, np.ndarray]]


class Thinker:
    """Asks the policy one question at a time.

    Args:
        runner: PolicyRunner; its queue and ensemble are not used.
        lock_step: answer at once and hold the answer back, instead of in a thread.
        latency_s: question's number -> simulated seconds, of lock step.
    """

    def __init__(
        self, runner: PolicyRunner, lock_step: bool, latency_s: Callable[[int], float] = lambda number: 0.0
    ) -> None:
        self._runner, self._latency_s = runner, latency_s
        self.arm = ArmContract(runner.contract)
        self._pool = None if lock_step else ThreadPoolExecutor(1, thread_name_prefix="policy")
        self._pending: Future[Answer] | Answer | None = None
        self._asked = 0
        self._forgotten = False

    @property
    def busy(self) -> bool:
        """Whether a question is open."""
        return self._pending is not None

    def ask(self, now_s: float, frame: int, reading: JointReading, images: Images, commanded: np.ndarray) -> None:
        """Ask for a chunk from the robot's state of now; nothing while a question is open.

        Args:
            now_s: on the robot's clock.
            frame: of playback.
            reading: the joints.
            images: gives camera -> (H, W, 3) uint8 RGB; called where the policy runs.
            commanded: (J,) what is commanded now.
        """
        if self.busy:
            return
        number, self._asked = self._asked, self._asked + 1

        def think() -> Answer:
            began_s = time.perf_counter()
            state, chunk, positions, error = np.array([]), None, None, ""
            try:
                state = self.arm.state(reading)
                chunk = self._runner.predict_chunk(state, images())
                positions = self.arm.positions(chunk, state, commanded)
            except PolicyError as problem:
                error = str(problem)
            except Exception as problem:  # noqa: BLE001 - whatever it is, the arm must be braked and not dropped
                error = f"{type(problem).__name__}: {problem}"
            return Answer(
                number, frame, now_s, time.perf_counter() - began_s, positions, chunk, state, " ".join(error.split())
            )

        self._pending = think() if self._pool is None else self._pool.submit(think)

    def answer(self, now_s: float) -> Answer | None:
        """The answer to the open question, if it is there by now."""
        pending = self._pending
        if isinstance(pending, Future):
            if not pending.done():
                return None
            found = pending.result()
        elif pending is None or now_s + 1e-9 < pending.asked_s + self._latency_s(pending.number):
            return None
        else:
            found = pending
        self._pending = None
        forgotten, self._forgotten = self._forgotten, False
        return None if forgotten else found

    def forget(self) -> None:
        """Drop the answer to the open question when it comes: the world that it is about is over."""
        self._forgotten = self.busy

    def close(self) -> None:
        """Wait for no question any more."""
        if self._pool is not None:
            self._pool.shutdown(wait=False, cancel_futures=True)
