"""The other pure decisions: modes, chunks over ranks, scaling, the order of prompts."""

from __future__ import annotations

import math

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from penstock.core.dealing import Chunk, deal_chunks
from penstock.core.policy import SjfAgedPolicy
from penstock.core.request import Request, SamplingParams
from penstock.core.route_modes import Mode, ModeCosts, ModeLimits, choose_mode
from penstock.core.scaling import DECODE, PREFILL, RoleScaler, ScalingLimits, Window, need

SPLIT_COSTS = {
    "prompt_tokens": 4000, "output_tokens": 200, "queue_p_s": 0.1, "prefill_p_s": 0.4, "tail_s": 0.01, "queue_d_s": 0.0,
    "new_tokens_d": 4000, "prefill_d_s": 0.4, "harm_d_s": 0.5, "step_p_s": 0.03, "step_d_s": 0.03, "harm_p_s": 0.1,
    "p_load": 0.5, "d_load": 0.5,
}  # fmt: skip


def mode(**changes):
    choice = choose_mode(ModeCosts(**{**SPLIT_COSTS, **changes}))
    return None if choice is None else choice.mode


def test_the_gates_of_each_mode():
    """Defaults: short answers may stay on P while it has room, short new prompts on D while it has."""
    assert mode() is Mode.SPLIT
    short = {"output_tokens": 8, "harm_p_s": 0.0, "queue_d_s": 0.05}
    assert mode(**short) is Mode.PREFILL_ONLY
    assert mode(**short, p_load=0.7) is Mode.SPLIT
    hit = {"new_tokens_d": 200, "prefill_d_s": 0.02, "harm_d_s": 0.05}
    assert mode(**hit) is Mode.DECODE_ONLY
    assert mode(**hit, d_load=0.9) is Mode.SPLIT
    assert mode(**{**hit, "new_tokens_d": 257}) is Mode.SPLIT
    assert mode(**hit, queue_d_s=9.0) is not None
    assert mode(has_p=False) is Mode.DECODE_ONLY and mode(has_d=False) is Mode.PREFILL_ONLY
    assert mode(has_p=False, has_d=False) is None


@given(
    st.fixed_dictionaries({
        name: st.integers(0, 9000) if "tokens" in name else st.floats(0, 3) for name in SPLIT_COSTS
    })
)  # fmt: skip
@settings(deadline=None)
def test_the_cheapest_that_meets_the_slos_or_the_cheapest(values):
    limits, costs = ModeLimits(), ModeCosts(**values)
    choice = choose_mode(costs, limits)
    assert choice.mode in choice.cost_s and Mode.SPLIT in choice.cost_s
    if "none meets" in choice.why:
        assert choice.cost_s[choice.mode] == min(choice.cost_s.values())
    if costs.output_tokens > 16 and costs.prompt_tokens + costs.output_tokens >= 512:
        assert choice.mode is not Mode.PREFILL_ONLY
    if costs.new_tokens_d > 256:
        assert choice.mode is not Mode.DECODE_ONLY


@given(
    st.lists(st.builds(Chunk, st.integers(1, 512), st.integers(0, 30_000)), max_size=40), st.integers(1, 8)
)  # fmt: skip
@settings(deadline=None)
def test_chunks_are_dealt_evenly(chunks, num_ranks):
    """Each exactly once; no rank above the even share by more than a chunk and a block; cost within LPT's bound."""
    token, attended, block = 1.0, 1e-4, 64
    ranks = deal_chunks(chunks, num_ranks, token=token, attended=attended, slack_tokens=block)
    assert sorted(i for rank in ranks for i in rank) == list(range(len(chunks)))
    if not chunks:
        return
    tokens = [sum(chunks[i].num_tokens for i in rank) for rank in ranks]
    share = math.ceil(sum(tokens) / num_ranks)
    assert max(tokens) <= share + block + max(chunk.num_tokens for chunk in chunks)
    if all(chunk.num_tokens == chunks[0].num_tokens for chunk in chunks):
        return
    alone = deal_chunks(chunks, num_ranks, token=token, attended=attended, slack_tokens=10**9)
    costs = [sum(chunks[i].cost(token, attended) for i in rank) for rank in alone]
    longest = max(chunk.cost(token, attended) for chunk in chunks)
    assert max(costs) <= sum(costs) / num_ranks + longest + 1e-6


def window(num_prefill=2, num_decode=2, new=0.0, out=0.0, resident=0.0):
    return Window(num_prefill, num_decode, new, out, 1000.0, 100.0, resident, 10_000.0, 4, 6, 10.0, 200.0)


def test_need_by_hand():
    """Load over what one engine carries at 80 %; decode by tokens or by memory, whichever asks for more."""
    found = need(window(new=1600.0, out=80.0, resident=16_000.0), ScalingLimits())
    assert found.prefill == pytest.approx(2.0) and found.decode == pytest.approx(2.0)
    assert found.slots_free_soon == pytest.approx(6 + 4 * 10 * 10 / 200)
    assert need(window(), ScalingLimits()).prefill == 0


def test_a_role_flips_after_three_windows_once_a_minute_and_never_the_last():
    scaler, flips, have = RoleScaler(), [], {PREFILL: 2, DECODE: 4}
    for n in range(30):
        signals = scaler.observe(window(have[PREFILL], have[DECODE], new=4000.0, out=10.0), 10.0 * n)
        if signals.flip is not None:
            flips.append(n)
            have[signals.flip[0]] -= 1
            have[signals.flip[1]] += 1
        assert signals.scale[PREFILL] == 5
    assert flips == [2, 8, 14] and have == {PREFILL: 5, DECODE: 1}  # the third window; then every 60 s; then it fits


@given(st.lists(st.floats(0, 1.14), max_size=60), st.lists(st.booleans(), max_size=60))
@settings(deadline=None)
def test_what_passes_soon_flips_nothing(loads, spikes):
    """Need within 15 % of what there is, or above it for less than three windows in a row: no change."""
    scaler = RoleScaler()
    spikes = [spike and not (n > 1 and spikes[n - 1] and spikes[n - 2]) for n, spike in enumerate(spikes)]
    in_row = 0
    for n, load in enumerate(loads):
        spike = n < len(spikes) and spikes[n] and in_row < 2
        in_row = in_row + 1 if spike else 0
        new = 1600.0 * (5.0 if spike else load)
        assert scaler.observe(window(new=new, out=10.0), 10.0 * n).flip is None


def test_a_donor_keeps_what_it_needs():
    scaler = RoleScaler()
    for n in range(9):
        signals = scaler.observe(window(2, 2, new=9000.0, out=150.0), 10.0 * n)
    assert signals.flip is None and "cannot spare" in signals.why


def prompt(name, length, arrival, **more):
    return Request(name, [1] * length, length, SamplingParams(), 0, length + 9, arrival_s=arrival, **more)


@given(st.lists(st.tuples(st.integers(1, 50_000), st.floats(0, 30)), min_size=1, max_size=30))
@settings(deadline=None)
def test_short_prompts_first_but_nobody_waits_for_ever(lengths):
    """Who waited for half of the SLO is ahead of all who did not; the others stand by work less wait."""
    policy, now = SjfAgedPolicy(), 30.0
    requests = [prompt(f"{n:02}", length, arrival) for n, (length, arrival) in enumerate(lengths)]
    order = policy.order(requests, now)
    urgent = [r for r in order if now - r.arrival_s > 1.0 or r.arrival_s + 2 - now - 1e-4 * len(r.token_ids) < 0.1]
    assert order[: len(urgent)] == urgent
    assert [r.arrival_s for r in urgent] == sorted(r.arrival_s for r in urgent)
    rest = order[len(urgent) :]
    keys = [1e-4 * r.prompt_len - (now - r.arrival_s) for r in rest]
    assert keys == sorted(keys)
    assert sorted(r.id for r in order) == sorted(r.id for r in requests)


def test_deadlines_and_begun_answers_come_before_length():
    policy = SjfAgedPolicy(ttft_slo_s=100.0)
    long, short = prompt("long", 9000, 0.0, deadline_s=1.2), prompt("short", 10, 0.2)
    begun = prompt("begun", 20_000, 0.0)
    begun.token_ids.append(5)
    assert [r.id for r in policy.order([short, long, begun], 0.3)] == ["begun", "long", "short"]
    assert [r.id for r in policy.order([short, long], 0.0)] == ["short", "long"]
