"""Per-request state of one rank in arrays by slot, and one step's plan turned into flat index arrays.

Knows tokens, positions and block tables as numpy int arrays. Knows no model and no torch.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from penstock.core.plan import Row, StepPlan

NO_IDS = np.empty(0, np.int64)


@dataclass(slots=True)
class StepInputs:
    """One step, R rows and T tokens.

    request_ids, slots [R]; starts, nums and ends [R]: first position, tokens, and the position behind the last, of each
    row; query_start [R + 1]: where rows begin in the batch; token_ids, positions [T] int64; tables per KV group
    [R, max_blocks] int32, contiguous; length: the largest of the ends.

    outputs [N] int64: the tokens whose hidden states are read, of each row its last `num_logits`, and at least the last
    one, which tells whether its states are numbers; None: all of them. output_start [R + 1]: where rows begin in there.

    Valid until the next `prepare`, which may write into these arrays, but not into `slots`.
    """

    request_ids: list[str]
    slots: np.ndarray
    starts: np.ndarray
    nums: np.ndarray
    ends: np.ndarray
    query_start: np.ndarray
    token_ids: np.ndarray
    positions: np.ndarray
    tables: tuple[np.ndarray, ...]
    outputs: np.ndarray | None
    output_start: np.ndarray
    length: int
    next_ids: np.ndarray  # what the rows sampled, once they did


class RequestTable:
    """Tokens, computed counts and block tables of the requests this rank holds. Mutated by plans and sampled tokens."""

    def __init__(self, max_num_seqs: int, max_model_len: int, num_groups: int, block_size: int) -> None:
        max_blocks = -(-max_model_len // block_size) + 1
        self.block_size = block_size
        self.slots: dict[str, int] = {}
        # Known are the prompt, and what is still to be computed; tokens sampled before that may never have come here.
        self.tokens = np.zeros((max_num_seqs, max_model_len + 1), np.int32)
        self.num_computed = np.zeros(max_num_seqs, np.int64)
        self.tables = [np.zeros((max_num_seqs, max_blocks), np.int32) for _ in range(num_groups)]
        self._num_blocks = [[0] * max_num_seqs for _ in range(num_groups)]
        self._nothing_new: tuple[tuple[int, ...], ...] = ((),) * num_groups
        self._free = list(range(max_num_seqs - 1, -1, -1))
        # The last step, if the next may go on with it: until its rows change. Its arrays know where its rows are,
        # `num_computed` and `tokens` are behind.
        self._steady: StepInputs | None = None

    def release(self, request_id: str) -> int:
        """Forget a request; its slot."""
        self._settle()
        slot = self.slots.pop(request_id)
        self._free.append(slot)
        return slot

    def admit(self, request_id: str, token_ids: tuple[int, ...], start: int) -> int:
        """Take a request in, with `start` tokens computed already; its slot."""
        slot = self._free.pop()
        self.slots[request_id] = slot
        self.tokens[slot, : len(token_ids)] = token_ids
        self.num_computed[slot] = start
        for table, counts in zip(self.tables, self._num_blocks, strict=True):
            table[slot] = 0  # the null block: what is not there yet is never somebody else's
            counts[slot] = 0
        return slot

    def prepare(self, plan: StepPlan) -> StepInputs:
        """Add the rows' new blocks and gather the step's arrays.

        A step that gives one token to each row of the step before, which did the same, gets that step's very object:
        the arrays move on in place, and what was made from their memory stays good.
        """
        rows = plan.rows
        ids = [row.request_id for row in rows]
        num_list = [row.num_tokens for row in rows]
        total = sum(num_list)
        # Most rows of most steps add no block: one comparison each finds those that do.
        grown = [i for i, row in enumerate(rows) if row.new_block_ids != self._nothing_new]
        if self._steady is not None and total == len(rows) and ids == self._steady.request_ids:
            return self._go_on(self._steady, rows, grown)
        self._settle()
        slot_list = [self.slots[request_id] for request_id in ids]
        for i in grown:
            self._extend(slot_list[i], rows[i].new_block_ids)
        slots = np.fromiter(slot_list, np.int64, len(rows))
        starts = self.num_computed[slots]
        if total == len(rows):  # decodes only
            nums, query_start = np.ones(total, np.int64), np.arange(total + 1)
            positions, row_slots = starts, slots
            outputs, output_start = None, query_start
        else:
            nums, query_start = np.array(num_list), np.zeros(len(rows) + 1, np.int64)
            np.cumsum(nums, out=query_start[1:])
            positions = np.arange(total) + np.repeat(starts - query_start[:-1], nums)
            row_slots = np.repeat(slots, nums)
            outputs, output_start = _outputs(plan, query_start)
        ends = starts + nums
        length = int(ends.max())
        return StepInputs(
            ids,
            slots,
            starts,
            nums,
            ends,
            query_start,
            self.tokens[row_slots, positions].astype(np.int64),
            positions,
            self._gathered(slots, length),
            outputs,
            output_start,
            length,
            NO_IDS,
        )

    def advance(self, inputs: StepInputs, sampling: Sequence[int], token_ids: np.ndarray) -> None:
        """The step of `inputs` was computed, and its rows `sampling` were given a token each, which are kept.

        To be called once for each `prepare`.
        """
        slots, ends = inputs.slots, inputs.ends
        if len(sampling) == len(slots) == len(inputs.token_ids):
            self._steady, inputs.next_ids = inputs, token_ids
            return
        self.num_computed[slots] = ends
        self.tokens[slots[sampling], ends[sampling]] = token_ids

    def _settle(self) -> None:
        """Write down where the rows of the last step are, which its own arrays know."""
        steady, self._steady = self._steady, None
        if steady is not None:
            self.num_computed[steady.slots] = steady.ends
            self.tokens[steady.slots, steady.ends] = steady.next_ids

    def _go_on(self, inputs: StepInputs, rows: list[Row], grown: list[int]) -> StepInputs:
        """The rows of `inputs`, one token further."""
        self._steady = None
        inputs.starts += inputs.nums  # ones; the positions are this array too
        inputs.ends += inputs.nums
        inputs.length += 1
        inputs.token_ids[:] = inputs.next_ids
        for i in grown:
            slot, new_block_ids = int(inputs.slots[i]), rows[i].new_block_ids
            for table, counts, new in zip(inputs.tables, self._num_blocks, new_block_ids, strict=True):
                if (at := counts[slot]) < table.shape[1]:  # else it is gathered again before a row gets there
                    table[i, at : at + len(new)] = new[: table.shape[1] - at]
            self._extend(slot, new_block_ids)
        if inputs.length > inputs.tables[0].shape[1] * self.block_size:
            inputs.tables = self._gathered(inputs.slots, inputs.length)
        return inputs

    def _gathered(self, slots: np.ndarray, length: int) -> tuple[np.ndarray, ...]:
        """The tables of `slots`, wide enough for `length` tokens."""
        width = -(-length // self.block_size)
        return tuple(table[slots, :width] for table in self.tables)

    def _extend(self, slot: int, new_block_ids: tuple[tuple[int, ...], ...]) -> None:
        """Append a row's new blocks to its slot's tables."""
        for table, counts, new in zip(self.tables, self._num_blocks, new_block_ids, strict=True):
            count = counts[slot]
            table[slot, count : count + len(new)] = new
            counts[slot] = count + len(new)


def _outputs(plan: StepPlan, query_start: np.ndarray) -> tuple[np.ndarray | None, np.ndarray]:
    """`outputs` and `output_start` of a step whose rows begin at `query_start` [R + 1]."""
    output_start = np.zeros(len(plan.rows) + 1, np.int64)
    counts = np.array([max(1, row.num_logits) for row in plan.rows])
    np.cumsum(counts, out=output_start[1:])
    total = int(output_start[-1])
    if total == query_start[-1]:
        return None, query_start
    return np.arange(total) + np.repeat(query_start[1:] - output_start[1:], counts), output_start
