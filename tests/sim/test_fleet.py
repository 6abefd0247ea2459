"""A fleet on virtual time: one seed gives one run, the index ends as the caches are, tokens are accounted for."""

from __future__ import annotations

import random

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from penstock.core.cost import FittedCost, MoveCost, StepCoefficients
from penstock.core.kv_index import keys_of
from penstock.core.prefix import extend_chain
from penstock.core.route_policies import PREFILL_POLICIES, prefill_policy
from penstock.sim.fleet import FleetSettings, SimFleet, trace_hashes
from penstock.sim.pool import SimPool
from penstock.sim.report import mean_and_margin, report
from penstock.sim.trace import TraceRequest, block_tokens

COST = FittedCost(
    StepCoefficients(step=0.01, token=1e-4, attended=1e-9),
    moves={"remote": MoveCost(0.001, 1e11), "peer": MoveCost(0.001, 1e11)},
)


def conversations(seed, num, rate, gap_s):
    """Requests that repeat the beginnings of others, as a trace's do; `gap_s` apart, or at a rate."""
    draw, threads, requests, time, fresh = random.Random(seed), [[0]], [], 0.0, 1
    for n in range(num):
        time += gap_s or draw.expovariate(rate)
        ids = list(draw.choice(threads))
        for _ in range(draw.randint(1, 6)):
            ids.append(fresh)
            fresh += 1
        threads.append(ids)
        tokens = len(ids) * 512 - draw.randint(0, 511)
        requests.append(TraceRequest(f"t{n}", time, tuple(block_tokens(ids, 16, 1 << 30)[: tokens // 32]), tokens, 5))
    return requests


def replay(name, seed, pool_blocks=0, num=60, rate=20.0, num_blocks=60, engines=3, gap_s=None):
    settings_ = FleetSettings(COST, engines, num_blocks, pool_blocks)
    requests = conversations(seed, num, rate, gap_s)
    fleet = SimFleet(settings_, prefill_policy(name, COST, seed, tiers=pool_blocks > 0))
    return fleet, fleet.run(requests, [trace_hashes(r, settings_.block_size) for r in requests])


@given(st.sampled_from(sorted(PREFILL_POLICIES)), st.integers(0, 10_000), st.sampled_from([0, 20, 1000]))
@settings(deadline=None, max_examples=40)
def test_one_seed_one_run_and_the_index_ends_as_the_caches_are(name, seed, pool_blocks):
    fleet, outcomes = replay(name, seed, pool_blocks)
    again, same = replay(name, seed, pool_blocks)
    told = [(o.request.id, o.choice.engine, o.first_token_s, o.cached_tokens) for o in outcomes]
    assert told == [(o.request.id, o.choice.engine, o.first_token_s, o.cached_tokens) for o in same]
    assert fleet.clock.num_events == again.clock.num_events
    assert len(outcomes) == 60 and all(o.ttft_s > 0 for o in outcomes)
    for engine_name, engine in fleet.engines.items():
        held = {holding.key for holding in fleet.index.holdings(engine_name)}
        assert held == set(keys_of(list(engine.pool.index)).tolist())
        assert engine.pool.num_held == 0 and not engine.engine.has_work
    views = fleet.views
    assert not views.num_requests.any() and not views.pending_tokens.any()
    assert fleet.index.num_gaps == fleet.index.num_divergences == fleet.index.num_refused == 0


def test_tokens_are_computed_or_cached_and_time_is_what_the_model_says():
    """One engine, room for all: reuse is what the trace repeats; the engine is busy for its steps and no longer."""
    fleet, outcomes = replay("round_robin", 4, num_blocks=4000, gap_s=5.0, engines=1)
    seen = set()
    for outcome in outcomes:
        hashes = trace_hashes(outcome.request, 16)
        expected = next((n for n, h in enumerate(hashes) if h not in seen), len(hashes))
        assert outcome.cached_tokens == 512 * expected  # idle in between, so nothing is in flight
        extend_chain(hashes, b"", outcome.request.token_ids, 16)  # the block that the last token fills
        seen.update(hashes)
        new = 32 * len(outcome.request.token_ids) - outcome.cached_tokens
        assert outcome.ttft_s == pytest.approx(COST.prefill_seconds(new, outcome.cached_tokens), rel=0.2)
    summary = report(fleet, outcomes)
    assert summary.imbalance == 1.0 and 0 < summary.reuse < 1 and summary.prediction_error < 0.2


def test_a_shared_pool_gives_what_the_device_lost_and_never_makes_it_slower():
    without, first = replay("round_robin", 7, 0, rate=2.0)
    with_pool, second = replay("round_robin", 7, 10_000, rate=2.0)
    assert report(with_pool, second).reuse > report(without, first).reuse
    assert report(with_pool, second).ttft_mean_s < report(without, first).ttft_mean_s
    assert with_pool.num_loaded_blocks > 0 == without.num_loaded_blocks


def test_blocks_that_are_carried_in_do_not_drive_out_what_they_continue():
    """A full device holds a chain's beginning, used longest ago: after its rest has come, all of it can be hit."""
    fleet, _ = replay("round_robin", 1, num=0, num_blocks=8, engines=1)
    engine = fleet.engines["e0"]
    chain, others = ([bytes([kind, n] * 8) for n in range(num)] for kind, num in ((1, 5), (2, 6)))
    engine.put(chain[:2], 0)
    engine.put(others, 0)  # the device is full
    engine.put(chain, 2)
    assert engine.num_on_device(chain) == 5 and len(engine.pool.index) == 8
    long = [bytes([3, n] * 8) for n in range(20)]
    engine.put(long, 0)  # more than there is room for: its beginning
    assert engine.num_on_device(long) == 8 and engine.pool.num_held == 0


def test_ours_reuses_more_and_answers_sooner_than_the_blind_ones():
    found = {}
    for name in ("round_robin", "least_loaded", "least_time"):
        runs = [report(*replay(name, seed, num=150, rate=12.0, num_blocks=60, engines=6)) for seed in range(4)]
        found[name] = [sum(getattr(r, metric) for r in runs) for metric in ("reuse", "ttft_mean_s")]
    assert found["least_time"][0] > 1.3 * found["round_robin"][0]
    assert found["least_time"][1] < found["least_loaded"][1] < found["round_robin"][1]


def test_the_pool_keeps_what_was_used_last():
    pool = SimPool("pool", 2)
    a, b, c = (bytes([n] * 16) for n in range(3))
    pool.store([a, b])
    assert pool.run([a, c]) == 1  # a becomes young
    pool.store([c])
    assert pool.run([a, c]) == 2 and pool.run([b]) == 0
    changes = pool.events.take(0.0).changes
    assert [(x.stored, x.tier, x.hashes) for x in changes] == [
        (True, "remote", (a, b)), (False, "remote", (b,)), (True, "remote", (c,)),
    ]  # fmt: skip


def test_margins():
    """Student's t by hand: 1, 2, 3 have standard deviation 1."""
    mean, margin = mean_and_margin([1.0, 2.0, 3.0])
    assert mean == 2.0 and margin == pytest.approx(4.30 / 3**0.5)
    assert mean_and_margin([5.0])[1] == float("inf")
