"""Stored blocks: what is whole is read back, anything else is not taken for a block."""

from __future__ import annotations

import zlib

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tests.tiers.tier_blocks import ONE, key, record

from penstock.core.tiering import block_key
from penstock.tiers import record as record_module
from penstock.tiers.record import RecordFormat

FORMAT = RecordFormat.of(ONE.groups[0])


def test_layers_lie_as_the_layout_says():
    """A page is the group's block seen page-first: `KVGroup.extent` finds every head in it."""
    group = ONE.groups[0]
    made = record(FORMAT, key(1))
    page = made[FORMAT.page_start : FORMAT.page_start + group.block_bytes]
    for n, layer in enumerate(group.layers):
        offset, length = group.extent(layer, "v", 1, 2)
        assert np.array_equal(
            FORMAT.page(made, n)[offset % group.layer_bytes :][:length], page[offset : offset + length]
        )


def test_header_round_trip():
    made = record(FORMAT, key(1))
    FORMAT.describe(made, key(0), 0.25)
    header = FORMAT.header(made)
    assert header is not None and (header.key, header.parent, header.recompute_s) == (key(1), key(0), 0.25)
    assert FORMAT.is_whole(made, key(1)) and not FORMAT.is_whole(made, key(2))
    FORMAT.clear(made)
    assert FORMAT.header(made) is None


@settings(deadline=None, max_examples=300)
@given(bits=st.sets(st.integers(0, 8 * FORMAT.num_bytes - 1), min_size=1, max_size=3))
def test_flipped_bits_are_found(bits):
    """Up to three, anywhere that matters; bits of the padding and of parent and cost do not."""
    made = record(FORMAT, key(1))
    for bit in bits:
        made[bit // 8] ^= 1 << (bit % 8)
    end = FORMAT.page_start + FORMAT.num_layers * FORMAT.layer_bytes
    matters = [bit for bit in bits if bit // 8 < FORMAT._crc_start or FORMAT.page_start <= bit // 8 < end]
    if matters:
        assert not FORMAT.is_whole(made, key(1))
    header = FORMAT.header(made)
    if header is not None and header.parent:
        raise AssertionError("the damaged parent was taken for one")


def test_a_header_is_of_one_block_while_another_moves_in(monkeypatch):
    """Whatever is replaced whole while it is looked at: the key of one block never comes with the sums of another."""
    made, other = record(FORMAT, key(1)), record(FORMAT, key(2))
    other[FORMAT.page_start] ^= 1
    FORMAT.seal(other, key(2), tuple(zlib.crc32(FORMAT.page(other, n).data) for n in range(FORMAT.num_layers)))
    of_one = FORMAT.header(made)
    assert of_one is not None and of_one.sums != FORMAT.header(other).sums

    class Head:  # the first that is read of a header
        @staticmethod
        def unpack_from(view, offset):
            found = head.unpack_from(view, offset)
            made[:] = other
            return found

    head = record_module._HEAD
    monkeypatch.setattr(record_module, "_HEAD", Head)
    assert FORMAT.header(made) in (None, of_one)


def test_layers_that_changed_places_are_found():
    made = record(FORMAT, key(1))
    first, second = FORMAT.page(made, 0).copy(), FORMAT.page(made, 1).copy()
    FORMAT.page(made, 0)[:], FORMAT.page(made, 1)[:] = second, first
    assert not FORMAT.is_whole(made, key(1))


def test_another_number_of_layers_is_no_record():
    assert RecordFormat(3, FORMAT.layer_bytes).header(record(FORMAT, key(1))) is None


def test_a_key_that_is_too_long_is_refused():
    with pytest.raises(ValueError, match="31"):
        FORMAT.seal(record(FORMAT, key(1)), block_key(bytes(31), 0), (0,) * FORMAT.num_layers)
