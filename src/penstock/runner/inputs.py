"""Per-request state of one rank in arrays by slot, and one step's plan turned into flat index arrays.

Knows tokens, positions and block tables as numpy int arrays. Knows no model and no torch.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from penstock.core.plan import StepPlan


@dataclass(slots=True)
class StepInputs:
    """One step, R rows and T tokens.

    slots [R]; starts [R] and nums [R]: first position and tokens of each row; query_start [R + 1]: where rows begin
    in the batch; token_ids, positions [T] int64; tables per KV group [R, max_blocks] int32.

    outputs [N] int64: the tokens whose hidden states are read, of each row its last `num_logits`, and at least the last
    one, which tells whether its states are numbers; None: all of them. output_start [R + 1]: where rows begin in there.
    """

    slots: np.ndarray
    starts: np.ndarray
    nums: np.ndarray
    query_start: np.ndarray
    token_ids: np.ndarray
    positions: np.ndarray
    tables: tuple[np.ndarray, ...]
    outputs: np.ndarray | None
    output_start: np.ndarray


class RequestTable:
    """Tokens, computed counts and block tables of the requests this rank holds. Mutated by plans and sampled tokens."""

    def __init__(self, max_num_seqs: int, max_model_len: int, num_groups: int, block_size: int) -> None:
        max_blocks = -(-max_model_len // block_size) + 1
        self.block_size = block_size
        self.slots: dict[str, int] = {}
        self.tokens = np.zeros((max_num_seqs, max_model_len + 1), np.int32)
        self.num_computed = np.zeros(max_num_seqs, np.int64)
        self.tables = [np.zeros((max_num_seqs, max_blocks), np.int32) for _ in range(num_groups)]
        self._num_blocks = [[0] * max_num_seqs for _ in range(num_groups)]
        self._nothing_new: tuple[tuple[int, ...], ...] = ((),) * num_groups
        self._free = list(range(max_num_seqs - 1, -1, -1))

    def release(self, request_id: str) -> int:
        """Forget a request; its slot."""
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

    def blocks_of(self, group: int, slot: int) -> np.ndarray:
        """Block ids that the request in `slot` was given so far."""
        return self.tables[group][slot, : self._num_blocks[group][slot]]

    def prepare(self, plan: StepPlan) -> StepInputs:
        """Add the rows' new blocks and gather the step's arrays."""
        rows, of = plan.rows, self.slots
        slot_list = [of[row.request_id] for row in rows]
        # Most rows of most steps add no block: one comparison each finds those that do.
        for i in [i for i, row in enumerate(rows) if row.new_block_ids != self._nothing_new]:
            self._extend(slot_list[i], rows[i].new_block_ids)
        slots = np.fromiter(slot_list, np.int64, len(rows))
        num_list = [row.num_tokens for row in rows]
        total = sum(num_list)
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
        width = -(-int((starts + nums).max()) // self.block_size)
        return StepInputs(
            slots,
            starts,
            nums,
            query_start,
            self.tokens[row_slots, positions].astype(np.int64),
            positions,
            tuple(table[slots, :width] for table in self.tables),
            outputs,
            output_start,
        )

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
