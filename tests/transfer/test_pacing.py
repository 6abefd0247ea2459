"""The token bucket and the size of messages, without a clock."""

from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from penstock.transfer.coalesce import LinkCost, layers_per_message
from penstock.transfer.throttle import TokenBucket


@given(
    rate=st.floats(1e3, 1e10),
    burst=st.floats(1, 1e7),
    sends=st.lists(st.tuples(st.integers(1, 10**7), st.floats(0, 0.1)), min_size=1, max_size=50),
)
@settings(deadline=None)
def test_a_bucket_never_lets_more_through(rate: float, burst: float, sends: list[tuple[int, float]]) -> None:
    """Whoever waits as told has sent, at any time, at most burst + rate * seconds; and waits no longer than that."""
    bucket, now, total = TokenBucket(rate, burst), 0.0, 0
    for num_bytes, pause_s in sends:
        now += pause_s
        now += bucket.take(num_bytes, now)
        total += num_bytes
        assert total <= (burst + rate * now) * (1 + 1e-6) + 1
    busy = TokenBucket(rate, burst)
    now = 0.0
    for num_bytes, _ in sends:
        now += busy.take(num_bytes, now)
    assert now == pytest.approx(max(0.0, (total - burst) / rate), rel=1e-6, abs=1e-6)


def test_a_bucket_needs_a_rate() -> None:
    for rate, burst in ((0, 1), (-1, 1), (1, 0)):
        with pytest.raises(ValueError):
            TokenBucket(rate, burst)


def test_the_known_switch_falls_out_of_the_formula() -> None:
    """DeepSeek-V3's latent at 50 GB/s and 20 us per message: layer by layer from about 8k tokens on, above that too;
    below, as many layers as fill the same message."""
    cost = LinkCost(50e9, 20e-6)
    assert cost.min_message_bytes == pytest.approx(10e6)
    assert [layers_per_message(n, 1152, cost) for n in (8192, 8704, 16384)] == [2, 1, 1]
    assert layers_per_message(4096, 1152, cost) == 3
    assert layers_per_message(1024, 1152, cost) == 9


def test_the_cost_follows_what_is_observed() -> None:
    cost = LinkCost(1e9, 1e-4)
    for _ in range(60):
        cost.observe(10_000_000, 10, 0.021)  # 20 ms for 10 MB besides the messages themselves
    assert cost.bytes_per_s == pytest.approx(5e8, rel=0.01)
    before = cost.bytes_per_s
    cost.observe(0, 1, 1.0)
    cost.observe(100, 100, 1e-9)
    assert cost.bytes_per_s == before
