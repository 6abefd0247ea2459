"""The table is a dict."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from penstock.core.hash_table import HashTable

# Keys that are multiples of 13 and small fall into few buckets of a small table, so that buckets fill up and spill.
keys = st.integers(1, 40).map(lambda k: 13 * k) | st.integers(1, 2**64 - 1)
batches = st.lists(st.dictionaries(keys, st.integers(0, 5) | st.just(2**32 - 1), max_size=60), max_size=8)


@given(batches, st.integers(0, 60))
@settings(deadline=None, max_examples=200)
def test_it_behaves_as_a_dict(changes, size):
    """After any puts, through growth and spilling: the same values, 0 for what is not there, the same count."""
    table, model = HashTable(size), {}
    for change in changes:
        table.put(np.array(list(change), np.uint64), np.array(list(change.values()), np.uint32))
        model.update(change)
        model = {k: v for k, v in model.items() if v}
        asked = np.array([*model, 13, 26, 999, 2**63], np.uint64)
        assert table.get(asked).tolist() == [model.get(int(k), 0) for k in asked]
        assert table.num_entries == len(model)


@pytest.mark.parametrize("num", [100, 50_000])
def test_it_is_as_small_as_it_says(num):
    """Some 20 to 40 bytes an entry, also after growing."""
    table, random = HashTable(0), np.random.default_rng(1)
    for _ in range(10):
        table.put(random.integers(1, 2**63, num // 10).astype(np.uint64), np.full(num // 10, 7, np.uint32))
    assert table.num_bytes <= 45 * num and len(table.spilled) < 0.03 * num + 10
