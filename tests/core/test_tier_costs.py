"""Rates, load-or-recompute and the verdict on a tier, against what they are defined to be."""

from __future__ import annotations

import math

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from penstock.core.tier_costs import LinearRate, PrefillRate, TierWorth, choose_end

SECONDS = st.floats(0.001, 2.0)


def price(num_loaded, tiers, load, recompute_s, first_block) -> float:
    """Seconds of one plan, straight from the definition."""
    total = 0.0
    for i, tier in enumerate(tiers):
        if i >= num_loaded:
            total += recompute_s(first_block + i)
            continue
        run_s, block_s = load[tier]
        total += block_s + (run_s if not i or tiers[i - 1] != tier else 0.0)
    return total


@settings(deadline=None, max_examples=300)
@given(
    tiers=st.lists(st.integers(0, 3), max_size=9),
    load=st.lists(st.tuples(SECONDS, SECONDS), min_size=3, max_size=3),
    base=SECONDS,
    slope=st.floats(0.0, 0.3),
    first_block=st.integers(0, 20),
)
def test_no_end_is_faster(tiers, load, base, slope, first_block):
    """What is loaded lies in tiers without a gap, and no other end costs less."""
    by_tier = dict(enumerate(load, 1))

    def recompute_s(block: int) -> float:
        return base + slope * block

    num_loaded = choose_end(tiers, by_tier, recompute_s, first_block) - first_block
    assert 0 <= num_loaded <= len(tiers) and all(tiers[:num_loaded])
    ours = price(num_loaded, tiers, by_tier, recompute_s, first_block)
    first_gap = tiers.index(0) if 0 in tiers else len(tiers)
    best = min(price(n, tiers, by_tier, recompute_s, first_block) for n in range(first_gap + 1))
    assert ours == pytest.approx(best)


def test_deep_blocks_pay_for_shallow_ones():
    """Attention makes deep blocks dearer: a slow tier costs time at first, and pays from some depth on."""
    prefill = PrefillRate(token_s=1e-4, pair_s=1e-6)
    ends = [choose_end([1] * n, {1: (0.001, 0.02)}, lambda n: prefill.seconds(32 * n, 32 * n + 32)) for n in (8, 64)]
    assert ends == [0, 64]


@given(
    latency_s=st.floats(1e-6, 1e-2),
    byte_s=st.floats(1e-11, 1e-7),
    sizes=st.lists(st.integers(1, 1 << 26), min_size=30, max_size=60, unique=True),
)
@settings(deadline=None)
def test_linear_rate_finds_the_line(latency_s, byte_s, sizes):
    rate = LinearRate(1e-3, 1e-9)
    for _ in range(6):
        for size in sizes:
            rate.observe(size, latency_s + byte_s * size)
    for size in sizes:
        expected = latency_s + byte_s * size
        assert rate.seconds(size) == pytest.approx(expected, rel=0.05, abs=0.02 * max(sizes) * byte_s + 1e-4)
    assert rate.latency_s >= 0 and rate.byte_s >= 0


@given(samples=st.lists(st.tuples(st.integers(0, 1 << 30), st.floats(0.0, 100.0)), max_size=40))
@settings(deadline=None)
def test_linear_rate_is_sane_whatever_it_sees(samples):
    rate = LinearRate(1e-3, 1e-9)
    for sample in samples:
        rate.observe(*sample)
    assert rate.latency_s >= 0 and rate.byte_s >= 0
    assert math.isfinite(rate.seconds(1 << 40))


@given(token_s=st.floats(1e-5, 1e-2), pair_s=st.floats(1e-9, 1e-5))
@settings(deadline=None)
def test_prefill_rate_tells_attention_from_the_rest(token_s, pair_s):
    rate = PrefillRate()
    for _ in range(10):
        for start, end in [(0, 512), (512, 1024), (4096, 4608), (100, 132), (8192, 8700)]:
            rate.observe(start, end, token_s * (end - start) + pair_s * (end * end - start * start) / 2)
    assert rate.seconds(2048, 2560) == pytest.approx(token_s * 512 + pair_s * (2560 * 2560 - 2048 * 2048) / 2, rel=0.02)


@given(samples=st.lists(st.tuples(st.integers(0, 9000), st.integers(1, 600), st.floats(0, 50.0)), max_size=40))
@settings(deadline=None)
def test_prefill_rate_never_predicts_less_for_more(samples):
    rate = PrefillRate()
    for start, num, seconds in samples:
        rate.observe(start, start + num, seconds)
    assert 0 <= rate.seconds(0, 10) <= rate.seconds(0, 20) < math.inf
    assert rate.seconds(100, 110) >= rate.seconds(0, 10)


def test_a_tier_that_does_not_pay_goes_off_and_is_tried_again_ever_later():
    worth = TierWorth(min_uses=10, window_s=5.0, retry_s=60.0, max_retry_s=200.0)
    now, pauses = 0.0, []
    assert worth.judge(now) is None
    for _ in range(4):
        worth.saved(1.0)
        worth.spent(2.0)
        worth.used(9)
        assert worth.judge(now + 6) is None, "too few samples"
        worth.used(1)
        assert worth.judge(now + 4) is None, "too short a time"
        verdict = worth.judge(now + 6)
        assert verdict is not None and not verdict.pays and not worth.is_on
        assert (verdict.saved_s, verdict.spent_s, verdict.num_uses) == (1.0, 2.0, 10)
        now += 6
        pauses.append(worth.off_until_s - now)
        assert not worth.probe(worth.off_until_s - 0.1)
        now = worth.off_until_s
        assert worth.probe(now) and worth.is_on
    assert pauses == [60.0, 120.0, 200.0, 200.0]
    worth.saved(3.0)
    worth.spent(2.0)
    worth.used(10)
    verdict = worth.judge(now + 6)
    assert verdict is not None and verdict.pays and worth.is_on
    assert worth.retry_s == 60.0
