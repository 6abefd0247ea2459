"""The request table against a table made of Python lists, over random plans."""

from __future__ import annotations

import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st

from penstock.core.plan import Row, StepPlan
from penstock.runner.inputs import RequestTable, StepInputs

BLOCK, MAX_SEQS, MAX_LEN = 4, 5, 60


@settings(max_examples=150, deadline=None)
@given(data=st.data(), num_groups=st.integers(1, 3))
def test_prepare_gathers_what_the_plans_said(data: st.DataObject, num_groups: int) -> None:
    """Tokens, positions, row borders, block tables and outputs of every step are those of lists that only grow.

    Whoever decodes on in the same company gets the same arrays again, until somebody comes, goes, waits or has a chunk.
    """
    table = RequestTable(MAX_SEQS, MAX_LEN, num_groups, BLOCK)
    tokens: dict[str, list[int]] = {}
    computed: dict[str, int] = {}
    blocks: dict[str, list[list[int]]] = {}
    num_named = next_block = 0
    before: tuple[StepInputs, list[str]] | None = None  # the last step, if it gave one token to each of its rows
    for step in range(data.draw(st.integers(1, 14))):
        goes_on = data.draw(st.integers(0, 3)) > 0  # nobody comes or goes, and every row has one token: mostly
        leaving = st.lists(st.sampled_from(sorted(tokens) or [""]), unique=True, max_size=2)
        for request_id in [] if goes_on else data.draw(leaving):
            if request_id in tokens:
                table.release(request_id)
                before = None
                del tokens[request_id], computed[request_id], blocks[request_id]
        while len(tokens) < MAX_SEQS and (not tokens or not goes_on) and data.draw(st.booleans()):
            before = None
            num_named += data.draw(st.booleans()) or f"r{num_named}" in tokens  # else who has left comes again
            request_id, length = f"r{num_named}", data.draw(st.integers(1, 20))
            start = data.draw(st.integers(0, (length - 1) // BLOCK)) * BLOCK
            tokens[request_id] = data.draw(st.lists(st.integers(0, 99), min_size=length, max_size=length))
            computed[request_id], blocks[request_id] = start, [[] for _ in range(num_groups)]
            table.admit(request_id, tuple(tokens[request_id]), start)
        rows = []
        for request_id in (
            sorted(tokens, reverse=data.draw(st.integers(0, 3)) == 0)
            if goes_on
            else data.draw(st.permutations(sorted(tokens)))
        ):
            gap = len(tokens[request_id]) - computed[request_id]
            num = min(1, gap) if goes_on else data.draw(st.integers(0, gap))
            if num == 0 or len(tokens[request_id]) == MAX_LEN:
                continue
            new = []
            for group in blocks[request_id]:
                wanted = -(-(computed[request_id] + num) // BLOCK) + data.draw(st.integers(0, 1)) - len(group)
                new.append(tuple(range(next_block + 1, next_block + 1 + max(0, wanted))))
                next_block += max(0, wanted)
                group += new[-1]
            num_logits = data.draw(st.sampled_from([0, 1, num]))
            rows.append(Row(request_id, computed[request_id], num, 0, num_logits, num == gap, tuple(new)))
        if not rows:
            continue

        inputs = table.prepare(StepPlan(step, rows))

        ids = [row.request_id for row in rows]
        decodes = all(row.num_tokens == 1 and row.samples for row in rows)
        same = before is not None and ids == before[1] and all(row.num_tokens == 1 for row in rows)
        assert (before is not None and inputs is before[0]) == same
        before = (inputs, ids) if decodes else None
        expected_ids, expected_positions, borders = [], [], [0]
        for row in rows:
            span = range(row.start, row.start + row.num_tokens)
            expected_positions += span
            expected_ids += [tokens[row.request_id][at] for at in span]
            borders.append(len(expected_ids))
        assert inputs.token_ids.tolist() == expected_ids
        assert inputs.positions.tolist() == expected_positions
        assert inputs.query_start.tolist() == borders
        assert inputs.starts.tolist() == [row.start for row in rows]
        assert inputs.nums.tolist() == [row.num_tokens for row in rows]
        read = [range(end - max(1, row.num_logits), end) for row, end in zip(rows, borders[1:], strict=True)]
        outputs = list(range(borders[-1])) if inputs.outputs is None else inputs.outputs.tolist()
        assert outputs == [token for tokens_of_row in read for token in tokens_of_row]
        assert (inputs.outputs is None) == (len(outputs) == borders[-1])
        starts_and_ends = zip(inputs.output_start[:-1], inputs.output_start[1:], strict=True)
        assert [outputs[a:b] for a, b in starts_and_ends] == [list(tokens_of_row) for tokens_of_row in read]
        assert inputs.token_ids.dtype == inputs.positions.dtype == np.int64
        for group, gathered in enumerate(inputs.tables):
            for r, row in enumerate(rows):
                needed = -(-(row.start + row.num_tokens) // BLOCK)
                assert gathered[r, :needed].tolist() == blocks[row.request_id][group][:needed]
                given, kept = blocks[row.request_id][group], table.tables[group][inputs.slots[r]].tolist()
                assert kept == given + [0] * (len(kept) - len(given))
        # What a step does: the computed count grows, and a row that samples has one token more.
        sampling = [i for i, row in enumerate(rows) if row.samples]
        table.advance(inputs, sampling, step + np.arange(len(sampling)))
        for row in rows:
            computed[row.request_id] += row.num_tokens
        for n, i in enumerate(sampling):
            tokens[rows[i].request_id].append(step + n)
