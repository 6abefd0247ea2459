"""The counter against a set of what was done."""

from __future__ import annotations

from ctypes import c_int64

from hypothesis import given, settings
from hypothesis import strategies as st

from penstock.transfer.counter import StepCounter

LAYERS = 5


@settings(max_examples=100, deadline=None)
@given(steps=st.lists(st.tuples(st.integers(1, 3), st.integers(0, LAYERS)), min_size=1, max_size=6), told=st.booleans())
def test_done_is_what_was_done(steps: list[tuple[int, int]], told: bool) -> None:
    """Steps may be skipped, their numbers only grow; `end` completes what was not told layer by layer."""
    counter, done, seen = StepCounter(), set(), []
    last = 3 * len(steps) + 1

    def check() -> None:
        assert {(s, n) for s in range(last) for n in range(LAYERS) if counter.is_done(s, n)} == done
        assert c_int64.from_address(counter.address).value == counter.word[0]
        seen.append(int(counter.word[0]))

    check()
    step = -1
    for gap, layers in steps:
        step += gap
        counter.begin(step)
        done |= {(s, n) for s in range(step) for n in range(LAYERS)}
        check()
        for layer in range(layers if told else 0):
            counter.layer_done(layer)
            done.add((step, layer))
            check()
        counter.end()
        done |= {(step, n) for n in range(LAYERS)}
        check()
    assert seen == sorted(seen)
