"""May one more request run? Predicts the peak of KV over the lives of all that run, before a prompt is started.

Knows lengths in tokens and capacities in blocks. Source: the "future past" admission of LightLLM (Gong et al. 2025,
"Past-Future Scheduler") and RTP-LLM, whose admission simulates the running set.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import numpy as np

from penstock.core.request import Request

MAX_ESTIMATE = 4096  # output tokens: longer wishes are clipped, for the estimate only
MIN_SAMPLES = 20


@dataclass(frozen=True, slots=True)
class Sharing:
    """Blocks of a prefix hit that running requests hold already, in the full-attention group."""

    num_held: int = 0
    num_sole: int = 0  # of these, held by one request alone
    holder: Request | None = None  # that request


class PeakPredictor:
    """Peak of a full-attention group over time; in window groups the sum of what each request can hold at most.

    Outputs are expected to be as long as 80 % of the last 1,000 finished ones; before 20 have finished, as long as
    asked for. While lengths come out as expected and each request gets its token in every step, nobody is preempted.
    Blocks that several requests hold are counted once, and as if they stayed for good.
    """

    def __init__(self, block_size: int, capacities: Sequence[int], max_blocks: Sequence[int | None]) -> None:
        self.block_size = block_size
        self.capacity: int | None = None  # usable blocks of the full-attention group, if there is one
        self.windows: list[tuple[int, int]] = []  # (usable blocks, what one request holds at most) of the others
        for capacity, bound in zip(capacities, max_blocks, strict=True):
            if bound is None:
                self.capacity = capacity
            else:
                self.windows.append((capacity, bound))
        self._outputs: deque[int] = deque(maxlen=1000)
        self._p80: int | None = None
        self._requests: list[Request] = []  # the running set, those that stay longest first
        self._held = np.zeros(0, np.int64)  # tokens that each holds alone
        self._left = np.zeros(0, np.int64)  # tokens that each still generates
        self._num_shared = 0  # blocks that several hold
        self._window_blocks: list[int] = []  # per window group
        self._update()

    def finished(self, num_output: int) -> None:
        """Learn from a request that ended by itself."""
        self._outputs.append(num_output)
        self._p80 = None

    def expected_remaining(self, request: Request) -> int:
        """Output tokens still to come, at least 1, never above what the request may still generate."""
        left = request.max_total - len(request.token_ids)
        if len(self._outputs) >= MIN_SAMPLES:
            if self._p80 is None:
                self._p80 = int(np.percentile(np.fromiter(self._outputs, int), 80))
            left = min(left, max(self._p80 - request.num_output, self._p80 // 4))
        return max(1, min(left, MAX_ESTIMATE))

    def begin(self, running: Iterable[tuple[Request, int]], num_shared: int) -> None:
        """Look at the running set, each with how many of its blocks others hold too; `num_shared` blocks are such.

        `fits` and `add` then speak about this set.
        """
        entries = [(*self._lengths(request, count), request) for request, count in running]
        entries.sort(key=lambda entry: -entry[1])
        self._requests = [request for _, _, request in entries]
        self._held = np.array([held for held, _, _ in entries], np.int64)
        self._left = np.array([left for _, left, _ in entries], np.int64)
        self._num_shared = num_shared
        self._window_blocks = [
            sum(self._window_need(request, left, bound) for _, left, request in entries) for _, bound in self.windows
        ]
        self._update()

    def fits(self, request: Request, sharing: Sharing) -> bool:
        """Would the peak of the running set with `request` stay within every group?"""
        if not self._requests:
            return True
        held, left = self._lengths(request, sharing.num_held)
        for used, (capacity, bound) in zip(self._window_blocks, self.windows, strict=True):
            if used + self._window_need(request, left, bound) > capacity:
                return False
        if self.capacity is None:
            return True
        at, gone, extra = self._place(left), 0, 0
        if sharing.holder is not None:
            gone = self._requests.index(sharing.holder)
            extra = sharing.num_sole * self.block_size  # this request's alone once the holder has left
        most = held + (extra if gone >= at else 0) + (at + 1) * (left + self.block_size - 1)  # when it leaves itself
        if at:
            most = max(most + int(self._sums[at - 1]), int(self._peaks[:at].max()))
        if gone > at:
            most = max(most, held + extra + int(self._growing[at:gone].max()))
        if len(self._requests) > max(at, gone):
            most = max(most, held + int(self._growing[max(at, gone) :].max()))
        return most // self.block_size + self._num_shared <= self.capacity

    def add(self, request: Request, sharing: Sharing) -> None:
        """The request runs too."""
        if sharing.holder is not None:
            self._held[self._requests.index(sharing.holder)] -= sharing.num_sole * self.block_size
            self._num_shared += sharing.num_sole
        held, left = self._lengths(request, sharing.num_held)
        at = self._place(left)
        self._requests.insert(at, request)
        self._held, self._left = _inserted(self._held, at, held), _inserted(self._left, at, left)
        for n, (_, bound) in enumerate(self.windows):
            self._window_blocks[n] += self._window_need(request, left, bound)
        self._update()

    def _update(self) -> None:
        """Each grows one token a step and leaves when it is done: tokens in use when the n-th leaves.

        Those before it are there still, each `left[n] - 1` tokens longer than now; `block_size - 1` more covers an
        open block.
        """
        grown = self._left + (self.block_size - 1)
        self._sums = np.cumsum(self._held)
        self._peaks = self._sums + grown * np.arange(1, len(grown) + 1)
        self._growing = self._peaks + grown
        self._leaving = -self._left

    def _place(self, left: int) -> int:
        """How many stay longer than `left` steps."""
        return int(np.searchsorted(self._leaving, -left))

    def _window_need(self, request: Request, left: int, bound: int) -> int:
        return min(-(-(request.num_known + left) // self.block_size), bound)

    def _lengths(self, request: Request, num_shared: int) -> tuple[int, int]:
        """(tokens it holds alone, tokens still to come), with what steps in flight sample counted as there."""
        held = request.num_known - num_shared * self.block_size
        return held, max(1, self.expected_remaining(request) - request.num_unsampled)


def _inserted(array: np.ndarray, at: int, value: int) -> np.ndarray:
    """As np.insert, without its many cases."""
    longer = np.empty(len(array) + 1, array.dtype)
    longer[:at], longer[at], longer[at + 1 :] = array[:at], value, array[at:]
    return longer
