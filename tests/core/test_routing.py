"""Routing: invariants of every policy, and what ours does in cases that can be worked out by hand."""

from __future__ import annotations

import hashlib
import random

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from penstock.core.cost import FittedCost, MoveCost, StepCoefficients
from penstock.core.decode_policies import DECODE_POLICIES, decode_policy
from penstock.core.hot_prefixes import HotPrefixes
from penstock.core.kv_events import KVChange, KVEvents
from penstock.core.kv_index import KVIndex
from penstock.core.prediction import predict
from penstock.core.route_policies import PREFILL_POLICIES, TIE_S, TIE_SHARE, prefill_policy
from penstock.core.routing import EngineReport, EngineViews, RouteRequest

SIZE = 16
MOVES = {tier: MoveCost(0.0, 1e9) for tier in ("host", "disk", "remote", "peer")}


def make_cost(**moves):
    """1 ms a token; a block of 1,000 bytes is loaded in a microsecond from the tiers in MOVES."""
    return FittedCost(StepCoefficients(token=1e-3), moves={**MOVES, **moves})


def hashes(name, num):
    return [hashlib.blake2b(f"{name} {n}".encode(), digest_size=16).digest() for n in range(num)]


class Fleet:
    """Views with helpers to put blocks into engines."""

    def __init__(self, num, num_blocks=1000, slots=8):
        self.views = EngineViews(KVIndex(), SIZE, 1000)
        self.seqs = {}
        for n in range(num):
            self.views.add(f"e{n}", num_blocks=num_blocks, slots=slots)

    def hold(self, engine, blocks, tier="device"):
        seq = self.seqs[engine] = self.seqs.get(engine, -1) + 1
        assert self.views.index.apply(KVEvents(engine, 0, seq, (KVChange(True, tier, tuple(blocks)),)), 0.0) is None

    def pick(self, policy, request, now=0.0):
        return policy.pick(request, self.views, self.views.index, now)


def request(prompt, name="r", tokens=None, **more):
    return RouteRequest(name, len(prompt) * SIZE + 1 if tokens is None else tokens, prompt, **more)


@given(st.sampled_from(sorted(PREFILL_POLICIES)), st.integers(0, 2**32), st.integers(1, 9), st.integers(1, 60))
@settings(deadline=None, max_examples=150)
def test_every_policy_keeps_to_what_is_there(name, seed, num, num_steps):
    """Never a dead engine, nor one that is too small; the same seed, the same choices; counters come back to zero."""

    def run():
        draw, fleet, dead, open_, made = random.Random(seed), Fleet(num), set(), [], []
        views, policy, now = fleet.views, prefill_policy(name, make_cost(), seed), 0.0
        views.num_blocks[: num // 2] = 10
        prompts = [hashes(n, draw.randint(1, 20)) for n in range(4)]
        for step in range(num_steps):
            now += draw.random() * 0.05
            if draw.random() < 0.1 and len(dead) < num:
                gone = draw.choice(list(views.index.rows))
                dead.add(gone)
                lost = views.remove(gone)
                assert all(i in open_ for i in lost)
                open_ = [i for i in open_ if i not in lost]
            if draw.random() < 0.3 and views.index.rows:
                fleet.hold(draw.choice(sorted(views.index.rows)), draw.choice(prompts)[: draw.randint(1, 20)])
            prompt = draw.choice(prompts)
            choice = fleet.pick(policy, request(prompt, f"r{step}"), now)
            may = [e for e, row in views.index.rows.items() if views.num_blocks[row] > len(prompt)]
            assert (choice is None) == (not may)
            if choice is None:
                continue
            assert choice.engine in may and choice.engine not in dead
            assert all(engine in may and engine != choice.engine for engine, _ in choice.runner_ups)
            assert choice.hit_tokens + choice.new_tokens == len(prompt) * SIZE + 1 and choice.new_tokens >= 1
            assert choice.predicted_ms == pytest.approx(sum(choice.terms.values()))
            views.sent(f"r{step}", choice, now)
            views.index.expect(choice.engine, prompt, now)
            open_.append(f"r{step}")
            made.append(choice)
            if open_ and draw.random() < 0.5:
                views.done(open_.pop(draw.randrange(len(open_))), now, draw.randint(0, 300))
        for id_ in open_:
            views.done(id_, now)
        live = list(views.index.rows.values())
        assert not views.num_requests[live].any() and not views.pending_tokens[live].any()
        assert np.allclose(views.pending_s[live], 0)
        return made

    assert run() == run()


def test_ours_weighs_waiting_against_hits():
    """A hit of 160 tokens saves 160 ms: it is worth a wait of 100 ms and not one of 300 ms."""
    policy = prefill_policy("least_time", FittedCost(StepCoefficients(token=1e-3)), 1)
    for wait_s, expected in ((0.1, "e0"), (0.3, "e1")):
        fleet, prompt = Fleet(2), hashes("p", 12)
        fleet.hold("e0", prompt[:10])
        fleet.views.busy_until_s[0] = wait_s
        choice = fleet.pick(policy, request(prompt))
        assert choice.engine == expected
        assert choice.terms["wait"] == pytest.approx(1e3 * wait_s if expected == "e0" else 0)
        assert choice.hit_tokens == (160 if expected == "e0" else 0)


def test_ours_copies_from_a_peer_what_is_cheaper_to_copy():
    """With a fast link the idle engine fetches the prefix that the busy one holds, and the choice says so."""
    fleet, prompt = Fleet(2), hashes("p", 12)
    fleet.hold("e0", prompt[:10])
    fleet.views.busy_until_s[0] = 1.0
    choice = fleet.pick(prefill_policy("least_time", make_cost(), 1), request(prompt))
    assert choice.engine == "e1" and choice.hit_tokens == 160
    (copy,) = choice.copies
    assert (copy.src, copy.dst, copy.hashes) == ("e0", "e1", tuple(prompt[:10]))
    slow = make_cost(peer=MoveCost(10.0, 1e3))
    assert not fleet.pick(prefill_policy("least_time", slow, 1), request(prompt)).copies


@pytest.mark.parametrize("policy", ["least_time", "mooncake"])
def test_copies_come_from_those_that_can_be_read(policy):
    """e1 reads e0's pool, e2 and e3 one store; e4 reads nothing. Each gets the longest prefix that it can reach."""
    fleet, prompt = Fleet(5), hashes("p", 12)
    for engine, reads, serves in (
        ("e0", "", "zero:1"), ("e1", "zero:1", "one:1"), ("e2", "store:6", ""), ("e3", "store:6", ""), ("e4", "", ""),
    ):  # fmt: skip
        fleet.views.link(engine, reads, serves)
    for engine, num in (("e0", 6), ("e1", 12), ("e2", 8)):
        fleet.hold(engine, prompt[:num])
    found = {}
    for row in range(5):
        fleet.views.alive[:] = True
        fleet.views.busy_until_s[:] = 100.0
        fleet.views.busy_until_s[row] = 0.0
        choice = fleet.pick(prefill_policy(policy, make_cost(), 1), request(prompt))
        assert choice.engine == f"e{row}"
        found[choice.engine] = [(copy.src, len(copy.hashes)) for copy in choice.copies], choice.hit_tokens // SIZE
    assert found["e0"] == ([], 6) and found["e1"] == ([], 12) and found["e2"] == ([], 8)
    assert found["e3"] == ([("e2", 8)], 8) and found["e4"] == ([], 0)
    fleet.views.remove("e2")
    fleet.views.link("e4", "one:1", "")
    fleet.views.busy_until_s[:] = 100.0
    fleet.views.busy_until_s[4] = 0.0
    (copy,) = fleet.pick(prefill_policy(policy, make_cost(), 1), request(prompt)).copies
    assert (copy.src, copy.dst, len(copy.hashes)) == ("e1", "e4", 12)
    row = fleet.views.add("e5", num_blocks=1000)
    assert not fleet.views.reach[row].any() and not fleet.views.reach[:, row].any()


@given(st.integers(0, 12), st.integers(0, 12), st.integers(0, 12), st.floats(0, 0.2), st.floats(0, 0.2))
@settings(deadline=None)
def test_more_in_a_cache_never_looks_worse(device, host, pool, host_s, pool_s):
    """Of all tiers, whatever they cost: a longer hit on an engine lowers its predicted time, or leaves it."""
    cost = make_cost(host=MoveCost(host_s, 1e5), remote=MoveCost(pool_s, 1e5))
    fleet, prompt = Fleet(1), hashes("p", 12)
    fleet.views.add_pool("pool")
    index, before = fleet.views.index, float("inf")
    for n, (tier, amount) in enumerate((("none", 0), ("remote", pool), ("host", host), ("device", device))):
        if tier == "remote" and amount:
            index.apply(KVEvents("pool", 0, 0, (KVChange(True, "remote", tuple(prompt[:amount])),)), 0.0)
        elif amount and n:
            fleet.hold("e0", prompt[:amount], tier)
        predicted = predict(request(prompt), fleet.views, index, cost, 0.0)
        total = float(predicted.total_s[0])
        if tier != "host":  # a block at home hides that of the pool: nearer is taken to be faster
            assert total <= before + 1e-9
        before = total


def test_a_load_that_does_not_pay_is_not_made():
    fleet, prompt = Fleet(1), hashes("p", 12)
    fleet.hold("e0", prompt, "disk")
    slow, fast = make_cost(disk=MoveCost(9.0, 1e9)), make_cost()
    index = fleet.views.index
    assert predict(request(prompt), fleet.views, index, slow, 0.0).hit_tokens[0] == 0
    assert predict(request(prompt), fleet.views, index, fast, 0.0).hit_tokens[0] == 192
    assert predict(request(prompt), fleet.views, index, fast, 0.0, tiers=False).hit_tokens[0] == 0


def test_near_ties_are_drawn_and_others_are_not():
    """All engines within 10 % or 20 ms of the best are chosen at times, the others never."""
    fleet, prompt = Fleet(4), hashes("p", 12)
    best = len(prompt) * SIZE * 1e-3 + 1e-3
    fleet.views.busy_until_s[:] = [0.0, 0.5 * max(TIE_SHARE * best, TIE_S), 2 * max(TIE_SHARE * best, TIE_S), 9.0]
    policy = prefill_policy("least_time", make_cost(), 5)
    assert {fleet.pick(policy, request(prompt)).engine for _ in range(60)} == {"e0", "e1"}


def test_of_near_ties_the_one_that_computes_least_is_chosen():
    """A hit of 16 tokens saves 16 ms, less than a tie is wide: it decides all the same, unless somebody has more."""
    fleet, prompt = Fleet(4), hashes("p", 12)
    policy = prefill_policy("least_time", FittedCost(StepCoefficients(token=1e-3)), 5)
    fleet.hold("e2", prompt[:1])
    assert {fleet.pick(policy, request(prompt)).engine for _ in range(20)} == {"e2"}
    fleet.hold("e3", prompt[:2])
    fleet.views.busy_until_s[3] = 0.010
    assert {fleet.pick(policy, request(prompt)).engine for _ in range(20)} == {"e3"}
    fleet.views.busy_until_s[3] = 0.060
    assert {fleet.pick(policy, request(prompt)).engine for _ in range(20)} == {"e2"}


def test_ours_counts_the_prompts_that_its_work_delays():
    """A hit that saves 160 ms is worth a wait of 300 ms where others queue: 160 ms less for each of them, too.

    The same tokens queue in front of every engine, so the sums are: one prompt runs at each, which nothing can delay,
    and one waits: 160 + 160 > 300; with nobody behind 160 < 300.
    """
    policy = prefill_policy("least_time", FittedCost(StepCoefficients(token=1e-3)), 1)
    for num_requests, expected in (([0, 0], "e1"), ([1, 1], "e1"), ([2, 2], "e0")):
        fleet, prompt = Fleet(2), hashes("p", 12)
        fleet.hold("e0", prompt[:10])
        fleet.views.busy_until_s[:] = [0.4, 0.1]
        fleet.views.num_requests[:] = num_requests
        choice = fleet.pick(policy, request(prompt))
        assert choice.engine == expected
        assert choice.predicted_ms == pytest.approx(433 if expected == "e0" else 293)  # its own time alone


def test_hot_engines_and_the_slo_are_filters_that_give_way():
    fleet, prompt = Fleet(5), hashes("p", 12)
    policy = prefill_policy("least_time", FittedCost(StepCoefficients(token=1e-3)), 1)
    fleet.hold("e0", prompt)
    assert fleet.pick(policy, request(prompt)).engine == "e0"
    fleet.views.num_requests[:] = [40, 1, 1, 1, 1]  # over three times the mean of 9
    assert fleet.pick(policy, request(prompt)).engine != "e0"
    fleet.views.num_requests[:] = [4, 0, 0, 0, 0]  # so few say nothing
    assert fleet.pick(policy, request(prompt)).engine == "e0"
    fleet.views.busy_until_s[:] = 0.195  # now e0's 196 ms and the others' 388 ms are near ties of nobody
    assert fleet.pick(policy, request(prompt, ttft_slo_s=0.31)).engine == "e0"
    assert fleet.pick(policy, request(prompt, ttft_slo_s=0.05)).engine == "e0"  # nobody can: the best there is


def test_a_slow_engine_and_one_whose_hits_do_not_come_true_are_avoided():
    """Answers teach: the slow one is expected to be slow, the liar's hits count as far as they came true."""
    fleet, prompt = Fleet(2), hashes("p", 12)
    policy = prefill_policy("least_time", FittedCost(StepCoefficients(token=1e-3)), 1)
    fleet.hold("e0", prompt)
    now = 0.0
    for n in range(60):
        choice = fleet.pick(policy, request(prompt, f"r{n}"), now)
        fleet.views.sent(f"r{n}", choice, now)
        now += 0.25
        fleet.views.done(f"r{n}", now, hit_tokens=0)  # it never had what it said
    assert fleet.views.trust[0] < 0.5
    slow = Fleet(2)
    for n in range(60):
        choice = slow.pick(policy, request(hashes(n, 12), f"r{n}"), now)
        slow.views.sent(f"r{n}", choice, now)
        now += 0.8 if choice.engine == "e0" else 0.19
        slow.views.done(f"r{n}", now, hit_tokens=0)
    assert slow.views.slowness[0] > 1.2 * slow.views.slowness[1]
    assert slow.pick(policy, request(hashes("new", 12)), now).engine == "e1"


def test_prefixes_in_high_demand_are_copied_once_each_and_to_as_many_as_needed():
    """2 requests a second for a prefix of 0.5 s: one engine in demand, so two of 60 % each should hold it."""
    fleet, prompt, cost = Fleet(4), hashes("hot", 32), make_cost()
    fleet.hold("e0", prompt)
    hot, copies, now = HotPrefixes(), [], 0.0
    for n in range(200):
        now += 0.5
        asked = request([*prompt, *hashes(n, 3)])
        predicted = predict(asked, fleet.views, fleet.views.index, cost, now)
        found = hot.copies(asked, fleet.views, predicted, fleet.views.alive, cost, now)
        for copy in found:
            fleet.hold(copy.dst, copy.hashes)
        copies += found
    assert len(copies) == 1 and copies[0].src == "e0" and copies[0].hashes == tuple(prompt)
    cold = HotPrefixes()
    for n in range(50):
        asked = request(hashes(n, 20))
        predicted = predict(asked, fleet.views, fleet.views.index, cost, now)
        assert not cold.copies(asked, fleet.views, predicted, fleet.views.alive, cost, now + n)
    assert len(cold._demands) == 50, "of what nobody has asked for before, the first block is counted"
    seen = HotPrefixes()
    for n in range(1, 9):
        seen.copies(request([*prompt, *hashes(n, 3)]), fleet.views, predicted, fleet.views.alive, cost, now + n)
        assert sorted(prompt.index(hash_) + 1 for hash_ in seen._demands) == [1, 2, 4, 8, 16, 32][:n]


@given(st.sampled_from(sorted(DECODE_POLICIES)), st.integers(0, 2**32), st.integers(1, 6))
@settings(deadline=None, max_examples=60)
def test_decodes_fit_where_they_are_placed(name, seed, num):
    """Reservations count at once: no engine gets more requests than slots, or more KV than blocks."""
    draw, fleet = random.Random(seed), Fleet(num, num_blocks=40, slots=4)
    views, policy, placed = fleet.views, decode_policy(name, make_cost(), seed), {}
    for step in range(80):
        if placed and draw.random() < 0.3:
            id_ = draw.choice(sorted(placed))
            views.release(id_)
            del placed[id_]
        asked = request(hashes(step, draw.randint(1, 8)), f"r{step}", output_tokens=draw.randint(1, 60))
        choice = fleet.pick(policy, asked)
        need = -(-(asked.prompt_tokens + asked.output_tokens) // SIZE)
        room = [n for n in range(num) if views.num_running[n] < 4 and views.free_blocks[n] >= need]
        assert (choice is None) == (not room)
        if choice is not None:
            views.reserve(asked.id, choice.row, need, 0.0)
            placed[asked.id] = choice.row
        assert (views.num_running <= 4).all() and (views.free_blocks >= 0).all()
        assert views.num_running.tolist() == [sum(row == n for row in placed.values()) for n in range(num)]


def test_remaining_slots_looks_at_what_is_scarce_and_reports_replace_reservations():
    fleet = Fleet(2, num_blocks=100, slots=10)
    views, policy = fleet.views, decode_policy("remaining_slots", make_cost())
    views.report("e0", EngineReport(1, 20), 0.0)  # few requests, little memory
    views.report("e1", EngineReport(5, 90), 0.0)
    assert fleet.pick(policy, request(hashes("p", 4), output_tokens=1)).engine == "e1"
    views.reserve("a", 1, 10, 0.0)
    views.reserve("b", 1, 10, 0.0)
    views.report("e1", EngineReport(6, 80, frozenset({"a"})), 1.0)  # it counts a; b is on its way
    assert (views.num_running[1], views.free_blocks[1]) == (7, 70)
    views.renew("b", 4.0)
    views.report("e1", EngineReport(6, 80), 8.0)
    assert views.num_running[1] == 7
    views.report("e1", EngineReport(6, 80), 10.0)  # b never came
    assert (views.num_running[1], views.free_blocks[1]) == (6, 80)
    views.reserve("c", 0, 5, 10.0)
    assert views.remove("e0") == [] and "e0" not in views.index.rows
    assert fleet.pick(policy, request(hashes("p", 4), output_tokens=1)).engine == "e1"
    views.add("e0", num_blocks=7)
    assert views.free_blocks[views.index.rows["e0"]] == 7
