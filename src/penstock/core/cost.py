"""How long things take: steps, prompts, moves. Few non-negative parameters, fitted to what was measured.

Pure arithmetic on counts. A prediction is monotone: a longer hit never costs more; and it is never below the floor.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import combinations

import numpy as np
from numpy.typing import NDArray

from penstock.core.plan import StepPlan

IntArray = NDArray[np.int64]
FloatArray = NDArray[np.float64]
CORRECTION_RANGE = (0.25, 4.0)  # a measurement beyond it says that something else was slow


@dataclass(frozen=True, slots=True)
class StepShape:
    """What a step's time depends on.

    `num_attended`: the sum over rows of their tokens times the context each sees: attention's products.
    `num_context`: the sum over rows of the context at their end: the KV that is read from memory.
    """

    num_tokens: int
    num_rows: int
    num_attended: int
    num_context: int

    @staticmethod
    def of(plan: StepPlan, tokens_per_token: int = 1) -> StepShape:
        """The shape of a plan. `tokens_per_token`: how many each of its tokens stands for, in scaled-down runs."""
        num_tokens = num_attended = num_context = 0
        for row in plan.rows:
            n, start = row.num_tokens * tokens_per_token, row.start * tokens_per_token
            num_tokens += n
            num_attended += n * start + n * (n + 1) // 2
            num_context += start + n
        return StepShape(num_tokens, len(plan.rows), num_attended, num_context)


@dataclass(frozen=True, slots=True)
class StepCoefficients:
    """Seconds: of any step, and per token, row, attended pair and position of context. None is negative."""

    step: float = 0.0
    token: float = 0.0
    row: float = 0.0
    attended: float = 0.0
    context: float = 0.0

    def seconds(self, shape: StepShape) -> float:
        return (
            self.step
            + self.token * shape.num_tokens
            + self.row * shape.num_rows
            + self.attended * shape.num_attended
            + self.context * shape.num_context
        )

    def one_prompt_seconds(self, new: int, prefix: int, chunk_tokens: int) -> float:
        """`prompt_seconds` of one prompt."""
        if new <= 0:
            return 0.0
        attended = 0.5 * new * (new + 2 * prefix)
        context = new + prefix if new <= chunk_tokens else attended / chunk_tokens + 0.5 * chunk_tokens
        num_steps = max(new / chunk_tokens, 1.0)
        return (self.step + self.row) * num_steps + self.token * new + self.attended * attended + self.context * context

    def prompt_seconds(self, new_tokens: IntArray, prefix_tokens: IntArray, chunk_tokens: int) -> FloatArray:
        """Of prompts computed alone, in steps of `chunk_tokens`. Shapes equal. Nothing new takes no time.

        Falls, or stays, as `prefix_tokens` grows at a fixed sum: steps are counted as a fraction above the first, and
        what the steps read as an integral, for whole steps would jump.
        """
        new, prefix = new_tokens.astype(np.float64), prefix_tokens.astype(np.float64)
        end = new + prefix
        num_steps = np.maximum(new / chunk_tokens, 1.0)
        attended = 0.5 * (end * end - prefix * prefix)
        context = np.where(new <= chunk_tokens, end, attended / chunk_tokens + 0.5 * chunk_tokens)
        seconds = (self.step + self.row) * num_steps + self.token * new
        seconds += self.attended * attended + self.context * context
        return np.where(new > 0, seconds, 0.0)


@dataclass(frozen=True, slots=True)
class Roofline:
    """The least that a step can take: arithmetic at the peak rate, or memory at full bandwidth, whichever is longer."""

    flops_per_s: float
    bytes_per_s: float
    flops_per_token: float  # of the layers' matrices: about twice the active parameters
    flops_per_attended: float  # 4 * heads * head_dim * layers
    weight_bytes: float  # read once in a step
    bytes_per_context: float  # of KV, per token

    def coefficients(self) -> tuple[StepCoefficients, StepCoefficients]:
        """(compute, memory): the floor is the larger of the two."""
        compute = StepCoefficients(
            token=self.flops_per_token / self.flops_per_s, attended=self.flops_per_attended / self.flops_per_s
        )
        memory = StepCoefficients(
            step=self.weight_bytes / self.bytes_per_s, context=self.bytes_per_context / self.bytes_per_s
        )
        return compute, memory


@dataclass(slots=True)
class MoveCost:
    """Of a tier or a link: seconds of a move = `latency_s + bytes / bytes_per_s`. `correction` follows measurements."""

    latency_s: float
    bytes_per_s: float
    correction: float = 1.0


@dataclass(slots=True)
class FittedCost:
    """The `CostModel` that is fitted to measured steps and follows the machine as it drifts.

    One correction for all steps, not one per kind: with several, a longer hit could fall into a dearer kind and a
    prediction would no longer be monotone in hits. Written by `observe_step` and `observe_move` alone.
    """

    coefficients: StepCoefficients
    chunk_tokens: int = 8192  # of a prompt's steps
    floor: Roofline | None = None
    moves: dict[str, MoveCost] = field(default_factory=dict)  # by tier
    alpha: float = 0.05  # weight of the newest measurement
    correction: float = 1.0

    def step_seconds(self, shape: StepShape) -> float:
        """Of one step."""
        seconds = self.correction * self.coefficients.seconds(shape)
        if self.floor is not None:
            seconds = max(seconds, *(bound.seconds(shape) for bound in self.floor.coefficients()))
        return seconds

    def prefill_seconds(self, new_tokens: int, prefix_tokens: int) -> float:
        """Of computing `new_tokens` of a prompt whose first `prefix_tokens` are there; alone on the engine."""
        seconds = self.correction * self.coefficients.one_prompt_seconds(new_tokens, prefix_tokens, self.chunk_tokens)
        if self.floor is not None:
            for bound in self.floor.coefficients():
                seconds = max(seconds, bound.one_prompt_seconds(new_tokens, prefix_tokens, self.chunk_tokens))
        return seconds

    def prefill_seconds_each(self, new_tokens: IntArray, prefix_tokens: IntArray) -> FloatArray:
        """`prefill_seconds` of many prompts."""
        seconds = self.correction * self.coefficients.prompt_seconds(new_tokens, prefix_tokens, self.chunk_tokens)
        if self.floor is not None:
            for bound in self.floor.coefficients():
                seconds = np.maximum(seconds, bound.prompt_seconds(new_tokens, prefix_tokens, self.chunk_tokens))
        return seconds

    def move_seconds(self, num_bytes: int, tier: str) -> float:
        """Of carrying so much from a tier. Affine in bytes. An unknown tier is infinitely slow: nothing is loaded."""
        cost = self.moves.get(tier)
        if cost is None:
            return float("inf")
        return cost.correction * (cost.latency_s + num_bytes / cost.bytes_per_s)

    def observe_step(self, shape: StepShape, seconds: float) -> None:
        """A step took so long."""
        expected = self.coefficients.seconds(shape)
        if expected > 0 and seconds > 0:
            self.correction = self._followed(self.correction, seconds / expected)

    def observe_move(self, num_bytes: int, tier: str, seconds: float) -> None:
        """A move took so long. A tier seen for the first time gets its rate from it."""
        cost = self.moves.get(tier)
        if cost is None:
            self.moves[tier] = MoveCost(0.0, max(num_bytes, 1) / max(seconds, 1e-9))
        elif seconds > 0:
            cost.correction = self._followed(cost.correction, seconds / (cost.latency_s + num_bytes / cost.bytes_per_s))

    def _followed(self, correction: float, ratio: float) -> float:
        low, high = CORRECTION_RANGE
        return correction + self.alpha * (min(max(ratio, low), high) - correction)


def fit_steps(shapes: Sequence[StepShape], seconds: Sequence[float]) -> StepCoefficients:
    """Non-negative least squares of the relative error, so that short steps count as much as long ones.

    Exact: with five columns every choice of those that are not zero is tried. Raises ValueError without a measurement.
    """
    if not shapes or len(shapes) != len(seconds) or min(seconds) <= 0:
        raise ValueError(f"a fit needs positive times for at least one step, got {len(shapes)} steps")
    rows = [(1.0, s.num_tokens, s.num_rows, s.num_attended, s.num_context) for s in shapes]
    columns = np.array(rows, np.float64) / np.array(seconds)[:, None]
    scale = np.maximum(np.abs(columns).max(axis=0), 1e-300)
    columns /= scale
    best: tuple[float, FloatArray] | None = None
    for size in range(1, columns.shape[1] + 1):
        for chosen in map(list, combinations(range(columns.shape[1]), size)):
            found, *_ = np.linalg.lstsq(columns[:, chosen], np.ones(len(rows)), rcond=None)
            if found.min() < 0:
                continue
            error = float(np.square(columns[:, chosen] @ found - 1).sum())
            if best is None or error < best[0] - 1e-12:
                solution = np.zeros(columns.shape[1])
                solution[chosen] = found
                best = error, solution
    assert best is not None  # each column alone is non-negative, and so is its coefficient
    return StepCoefficients(*map(float, best[1] / scale))


def fit_cost(
    measured: Iterable[tuple[StepShape, float]],
    *,
    chunk_tokens: int = 8192,
    floor: Roofline | None = None,
    moves: Mapping[str, MoveCost] | None = None,
) -> FittedCost:
    """A cost model of (step, seconds) pairs."""
    pairs = list(measured)
    coefficients = fit_steps([shape for shape, _ in pairs], [seconds for _, seconds in pairs])
    return FittedCost(coefficients, chunk_tokens, floor, dict(moves or {}))
