"""Executors of one rank in this process: run plans at once, or in a thread of their own so that planning overlaps.

Knows plans and results. What computes is given as a callable, so that no torch is imported here.
"""

from __future__ import annotations

import queue
import threading
from collections import deque
from collections.abc import Callable

from penstock.core.plan import StepPlan, StepResult


class InlineExecutor:
    """Depth 1: `collect` computes the plan in the caller's thread."""

    depth = 1
    feeds_back = True

    def __init__(self, run: Callable[[StepPlan], StepResult]) -> None:
        self._run = run
        self._plans: deque[StepPlan] = deque()

    def submit(self, plan: StepPlan) -> None:
        self._plans.append(plan)

    def collect(self) -> StepResult:
        return self._run(self._plans.popleft())

    def close(self) -> None:
        """Nothing runs between calls."""


class ThreadExecutor:
    """Depth 2: one thread computes plans in order while the next is made. All torch calls come from that thread.

    An exception of `run` is raised again by the `collect` of its plan and every one after it.
    """

    depth = 2
    feeds_back = True

    def __init__(self, run: Callable[[StepPlan], StepResult]) -> None:
        self._run = run
        self._plans: queue.SimpleQueue[StepPlan | None] = queue.SimpleQueue()
        self._results: queue.SimpleQueue[StepResult | BaseException] = queue.SimpleQueue()
        self._broken: BaseException | None = None
        self._thread = threading.Thread(target=self._work, name="penstock-rank", daemon=True)
        self._thread.start()

    def submit(self, plan: StepPlan) -> None:
        self._plans.put(plan)

    def collect(self) -> StepResult:
        if self._broken is not None:
            raise self._broken
        result = self._results.get()
        if isinstance(result, BaseException):
            self._broken = result
            raise result
        return result

    def close(self) -> None:
        """Let the thread end after the plans it has."""
        self._plans.put(None)
        self._thread.join(timeout=30)

    def _work(self) -> None:
        while (plan := self._plans.get()) is not None:
            try:
                self._results.put(self._run(plan))
            except BaseException as error:
                self._results.put(error)
                return
