"""May one more request run? Predicts the peak of KV over the lives of all that run, before a prompt is started.

Knows lengths in tokens and capacities in blocks. Source: the "future past" admission of LightLLM (Gong et al. 2025,
"Past-Future Scheduler") and RTP-LLM, whose admission simulates the running set.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence

import numpy as np

from penstock.core.request import Request

MAX_ESTIMATE = 4096  # output tokens: longer wishes are clipped, for the estimate only
MIN_SAMPLES = 20


class PeakPredictor:
    """Peak of one full-attention group, or any group when `max_blocks` bounds what a request can hold.

    Outputs are expected to be as long as 80 % of the last 1,000 finished ones; before 20 have finished, as long as
    asked for.
    """

    def __init__(self, block_size: int, capacities: Sequence[int], max_blocks: Sequence[int | None]) -> None:
        self.block_size = block_size
        self.capacities = capacities  # usable blocks per group
        self.max_blocks = max_blocks  # per group: what one request holds at most (windows), None = no bound
        self._outputs: deque[int] = deque(maxlen=1000)
        self._p80: int | None = None
        self._running: list[tuple[int, int]] = []  # (tokens held now, tokens still to come)

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

    def begin(self, running: Sequence[Request]) -> None:
        """Look at the running set; `fits` and `add` then speak about it."""
        self._running = [self._entry(request, 0) for request in running]

    def add(self, request: Request, num_shared: int) -> None:
        """The request runs too; `num_shared` of its blocks are counted with another request already."""
        self._running.append(self._entry(request, num_shared))

    def fits(self, request: Request, num_shared: int) -> bool:
        """Would the peak of the running set with `request` stay within every group?"""
        entries = [*self._running, self._entry(request, num_shared)]
        if len(entries) == 1:
            return True
        held = np.array([e[0] for e in entries])
        left = np.array([e[1] for e in entries])
        for capacity, bound in zip(self.capacities, self.max_blocks, strict=True):
            if bound is not None:
                need = -(-(held + left) // self.block_size)
                if int(np.minimum(need, bound).sum()) > capacity:
                    return False
            elif self._peak(held, left) > capacity:
                return False
        return True

    def _entry(self, request: Request, num_shared: int) -> tuple[int, int]:
        held = len(request.token_ids) - num_shared * self.block_size
        return held, self.expected_remaining(request)

    def _peak(self, held: np.ndarray, left: np.ndarray) -> int:
        """Most blocks in use at any moment when each grows one token a step and leaves when it is done.

        Sorted by what is left, longest first: when the k-th leaves, requests 1..k are there, each `left[k]` tokens
        longer than now. Half a block a request is added for the open block.
        """
        order = np.argsort(-left, kind="stable")
        held, left = held[order], left[order]
        count = np.arange(1, len(left) + 1)
        tokens = np.cumsum(held) + left * count + count * (self.block_size // 2)
        return int(-(-int(tokens.max()) // self.block_size))
