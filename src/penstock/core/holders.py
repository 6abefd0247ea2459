"""Who holds a block, as one 32-bit code: one engine and its tiers spelt out, or the number of a set that is kept once.

Knows engines as slots (small numbers) and tiers as bits.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from penstock.core.hash_table import Values
from penstock.core.kv_events import TIERS

NUM_TIERS = len(TIERS)
TIER_BITS = {tier: 1 << n for n, tier in enumerate(TIERS)}
EXPECTED = 1 << NUM_TIERS  # promised by a decision: counts as the device
_BITS = NUM_TIERS + 1
_ALL = (1 << _BITS) - 1
_SET = 1 << 31

Masks = tuple[int, ...]  # per bit of a code's tiers: which slots, as a number with a bit for each


@dataclass(frozen=True, slots=True)
class Holding:
    """One entry of an engine: the block's 64-bit key and its tiers' bits."""

    key: int
    tiers: int


class HolderCodes:
    """0: nobody. Below 2^31: `slot << 5 | tiers` of the only holder. Above: the number of a set of holders.

    Sets are counted: `count` says how many entries more, or fewer, use a code. Few differ, for blocks of one prefix are
    held by the same engines.
    """

    def __init__(self) -> None:
        self._masks: list[Masks | None] = []
        self._numbers: dict[Masks, int] = {}
        self._counts: list[int] = []
        self._free: list[int] = []

    @property
    def num_bytes(self) -> int:
        """An estimate: a tuple, its numbers, and two places that point to it."""
        return sum(
            150 + sum(28 + mask.bit_length() // 8 for mask in masks) for masks in self._masks if masks is not None
        )

    def masks(self, code: int) -> tuple[int, int, int, int]:
        """Slots per tier, nearest first; what is promised counts as the device."""
        if code & _SET:
            masks = self._masks[code & ~_SET]
            assert masks is not None
            return masks[0] | masks[4], masks[1], masks[2], masks[3]
        bit = 1 << (code >> _BITS)
        return (
            bit if code & (1 | EXPECTED) else 0,
            bit if code & 2 else 0,
            bit if code & 4 else 0,
            bit if code & 8 else 0,
        )

    def tiers_at(self, code: int, slot: int) -> int:
        """The bits of one slot."""
        if not code & _SET:
            return code & _ALL if code >> _BITS == slot else 0
        masks = self._masks[code & ~_SET]
        assert masks is not None
        return sum((mask >> slot & 1) << n for n, mask in enumerate(masks))

    def holding(self, codes: Values, slot: int, bits: int) -> NDArray[np.bool_]:
        """Which of many codes have one of `bits` at a slot. Shape of `codes`."""
        single = (codes >> _BITS == slot) & (codes & np.uint32(bits) != 0) & (codes < _SET)
        numbers = [_SET | n for n, masks in enumerate(self._masks) if masks and self.tiers_at(_SET | n, slot) & bits]
        return np.asarray(single | np.isin(codes, np.array(numbers, np.uint32)))

    def changed(self, code: int, slot: int, set_bits: int, clear_bits: int) -> int:
        """The code with some bits of a slot set and others cleared. Not counted yet."""
        if not code & _SET and (not code or code >> _BITS == slot):
            tiers = (code & _ALL & ~clear_bits) | set_bits
            return slot << _BITS | tiers if tiers else 0
        bit = 1 << slot
        masks = list(self._all_masks(code))
        for n in range(_BITS):
            if clear_bits >> n & 1:
                masks[n] &= ~bit
            if set_bits >> n & 1:
                masks[n] |= bit
        return self._code(masks)

    def without(self, code: int, slots: int) -> int:
        """The code with these slots (bits) taken out. Not counted yet."""
        if not code & _SET:
            return 0 if code and slots >> (code >> _BITS) & 1 else code
        masks = self._all_masks(code)
        if not any(mask & slots for mask in masks):
            return code
        return self._code([mask & ~slots for mask in masks])

    def count(self, code: int, more: int) -> None:
        """So many entries more use a code. A set that nobody uses is forgotten."""
        if not code & _SET:
            return
        number = code & ~_SET
        self._counts[number] += more
        if self._counts[number] == 0:
            masks = self._masks[number]
            assert masks is not None
            del self._numbers[masks]
            self._masks[number] = None
            self._free.append(number)

    def _all_masks(self, code: int) -> Masks:
        if code & _SET:
            masks = self._masks[code & ~_SET]
            assert masks is not None
            return masks
        bit = 1 << (code >> _BITS)
        return tuple(bit if code >> n & 1 else 0 for n in range(_BITS))

    def _code(self, masks: Sequence[int]) -> int:
        key = tuple(masks)
        union = 0
        for mask in key:
            union |= mask
        if union & (union - 1) == 0:  # one holder, or none
            if not union:
                return 0
            tiers = sum(1 << n for n, mask in enumerate(key) if mask)
            return (union.bit_length() - 1) << _BITS | tiers
        number = self._numbers.get(key)
        if number is None:
            if self._free:
                number = self._free.pop()
                self._masks[number], self._counts[number] = key, 0
            else:
                number = len(self._masks)
                self._masks.append(key)
                self._counts.append(0)
            self._numbers[key] = number
        return _SET | number
