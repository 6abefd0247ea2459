"""Extents cover every stored byte once, in file order, within the size they were asked for."""

from __future__ import annotations

from pathlib import Path

import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from penstock.nn.weights.headers import StoredTensor
from penstock.nn.weights.layout import FLOAT_DTYPES, MAX_PIECES, Filling, cut


@settings(max_examples=300, deadline=None)
@given(
    sizes=st.lists(
        st.tuples(st.sampled_from(sorted(FLOAT_DTYPES)), st.integers(0, 3000), st.integers(0, 1)), max_size=40
    ),
    many=st.integers(0, 600),
    chunk_bytes=st.integers(4096, 9001),
)
def test_extents_cover_the_files(sizes: list[tuple[str, int, int]], many: int, chunk_bytes: int) -> None:
    """Files with gaps and with hundreds of one-element tensors; pieces end at element borders; slots do not overlap."""
    fillings, position = [], 64
    for dtype, length, gap in sizes + [("BF16", 1, 0)] * many:
        position += gap * 10
        end = position + length * FLOAT_DTYPES[dtype].itemsize
        parameter = torch.nn.Parameter(torch.empty(length))
        target = parameter.detach()
        raw = target.view(torch.uint8).numpy().data if dtype == "F32" else None
        fillings.append(Filling(Path("x"), StoredTensor("t", dtype, (length,), position, end), parameter, target, raw))
        position = end
    extents = cut(fillings, chunk_bytes)
    pieces = [piece for extent in extents for piece in extent.pieces]
    wanted = [(f.stored.start, f.stored.end) for f in fillings if f.stored.end > f.stored.start]
    found: list[tuple[int, int]] = []
    for piece in pieces:
        assert (piece.start - piece.filling.stored.start) % piece.filling.dtype.itemsize == 0
        assert piece.num_elements > 0
        if found and found[-1][1] == piece.start and piece.first > 0:
            found[-1] = (found[-1][0], piece.end)
        else:
            found.append((piece.start, piece.end))
    assert found == wanted
    for extent in extents:
        assert 0 < extent.end - extent.start <= chunk_bytes
        assert len(extent.pieces) <= MAX_PIECES
        assert extent.start == extent.pieces[0].start
        assert [p.start for p in extent.pieces[1:]] == [p.end for p in extent.pieces[:-1]], "one read, without a gap"
        assert extent.pieces[-1].end == extent.end
        taken = 0
        for piece in extent.pieces:
            assert (piece.slot_offset < 0) == (piece.filling.raw is not None)
            if piece.slot_offset >= 0:
                assert piece.slot_offset >= taken
                assert piece.slot_offset % 4 == 0
                taken = piece.slot_offset + piece.end - piece.start
        assert taken <= extent.slot_bytes
