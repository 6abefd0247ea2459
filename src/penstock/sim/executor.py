"""A pretended rank: a plan takes the time that a cost model says, on virtual time; tokens are hashes.

Knows plans, results and the clock. Computes nothing and holds no KV.
"""

from __future__ import annotations

from collections import deque
from dataclasses import dataclass

from penstock.core.cost import StepShape
from penstock.core.doors import Clock, CostModel
from penstock.core.plan import StepPlan, StepResult

_MASK = 2**64 - 1


def sim_token(seed: int, position: int, previous: int, vocab_size: int) -> int:
    """The token after `position`, where `previous` stands: a pure function (the mixer of splitmix64)."""
    x = (seed * 0x9E3779B97F4A7C15 + position * 0xBF58476D1CE4E5B9 + previous * 0x94D049BB133111EB + 1) & _MASK
    x = ((x ^ (x >> 30)) * 0xBF58476D1CE4E5B9) & _MASK
    x = ((x ^ (x >> 27)) * 0x94D049BB133111EB) & _MASK
    return ((x ^ (x >> 31)) & _MASK) % vocab_size


@dataclass(slots=True)
class _Sequence:
    """What the rank keeps of a request."""

    seed: int
    last_token: int
    last_position: int


class SimExecutor:
    """The `Executor` door on virtual time. Steps of one engine run one after another.

    The driver calls `collect` at `ready_s`, or later; earlier is an error. `slowness` multiplies all times.
    `tokens_per_token`: for traces whose lengths were divided, how many tokens each stands for in the cost model.
    """

    feeds_back = True

    def __init__(
        self,
        cost: CostModel,
        clock: Clock,
        *,
        depth: int = 1,
        vocab_size: int = 32_000,
        slowness: float = 1.0,
        tokens_per_token: int = 1,
    ) -> None:
        self.depth = depth
        self.cost = cost
        self.slowness = slowness
        self.tokens_per_token = tokens_per_token
        self.busy_s = 0.0  # of all steps so far
        self._clock = clock
        self._vocab_size = vocab_size
        self._end_s = 0.0  # of the newest step
        self._results: deque[tuple[float, StepResult]] = deque()
        self._sequences: dict[str, _Sequence] = {}

    @property
    def ready_s(self) -> float | None:
        """When the oldest submitted step ends; None when there is none."""
        return self._results[0][0] if self._results else None

    def submit(self, plan: StepPlan) -> None:
        """Start the step behind those that run."""
        seconds = self.slowness * self.cost.step_seconds(StepShape.of(plan, self.tokens_per_token))
        self._end_s = max(self._end_s, self._clock.now()) + seconds
        self.busy_s += seconds
        self._results.append((self._end_s, StepResult(plan.step, self._tokens(plan), seconds=seconds)))

    def collect(self) -> StepResult:
        """The oldest step's result."""
        ready_s, result = self._results.popleft()
        assert ready_s <= self._clock.now()
        return result

    def _tokens(self, plan: StepPlan) -> list[list[int]]:
        for request_id in plan.released:
            self._sequences.pop(request_id, None)
        for item in plan.admitted:
            ids = item.token_ids
            self._sequences[item.request_id] = _Sequence(item.seed, ids[-1], len(ids) - 1)
        tokens: list[list[int]] = []
        for row in plan.rows:
            if not row.samples:
                tokens.append([])
                continue
            sequence = self._sequences[row.request_id]
            token = sim_token(sequence.seed, sequence.last_position, sequence.last_token, self._vocab_size)
            sequence.last_token = token
            sequence.last_position += 1
            tokens.append([token])
        return tokens
