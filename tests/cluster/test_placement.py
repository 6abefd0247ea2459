"""Placement by predicted time: caches, loads and costs as engines tell them, and modes that fit the request."""

from __future__ import annotations

import msgspec

from penstock.cluster.placement import PolicyPlacement
from penstock.core.kv_events import KVEvents, KVEventSource, SnapshotRequest
from penstock.core.pool_contents import POOL
from penstock.core.prefix import chain_start, extend_chain
from penstock.core.request import SamplingParams
from penstock.core.route_modes import ModeLimits
from penstock.engine.messages import AddRequest, KVReport, Ready, Report, TierReport

BOTH = {"e0": "both", "e1": "both", "e2": "both"}
SPLIT = {"p0": "prefill", "p1": "prefill", "d0": "decode", "d1": "decode"}


def a_ready(slots: int = 8) -> Ready:
    return Ready("m", 8192, 32, 1000, slots, "cpu", [], [], None, "model", "format", 1000)


def a_report(running: int = 0, free: int = 1000, steps: list[tuple[int, int, int, int, float]] | None = None) -> Report:
    kv = KVReport(32, 1000, 1000 - free, 0, 0, 0, free)
    return Report(0.0, running, 0, {}, kv, 1, 0.1, 0, 0, 0, 0, 0, 0, [], [], steps=steps or [])


def ask(name: str, tokens: range, max_tokens: int = 200, salt: str = "") -> AddRequest:
    return AddRequest(name, list(tokens), SamplingParams(max_tokens=max_tokens), 1, 0.0, salt=salt)


def placement(roles: dict[str, str], **limits: int) -> PolicyPlacement:
    made = PolicyPlacement(roles, "least_time", "remaining_slots", ModeLimits(**limits))
    for name in roles:
        made.joined(name, a_ready())
    return made


def cached(made: PolicyPlacement, engine: str, tokens: range, salt: str = "") -> None:
    """The engine tells that it holds all blocks of a prompt."""
    hashes: list[bytes] = []
    extend_chain(hashes, chain_start("model", "format", 32, "", salt), list(tokens), 32)
    source = KVEventSource(engine, 1, list)
    for hash_ in hashes:
        source.stored(hash_)
    events = source.take(1.0)
    assert events is not None
    assert made.changed(events, 1.0) is None


def test_a_prompt_goes_where_its_cache_is() -> None:
    made = placement(BOTH)
    cached(made, "e1", range(2000))
    for n in range(4):
        placed = made.place(ask(f"r{n}", range(2000)), 2.0)
        assert placed is not None and placed.engine == "e1" and not placed.prefill_at
        assert placed.forecast.hit_tokens == 1984
        made.first_token(f"r{n}", 1984, 2.0)
        made.ended(f"r{n}", 10, 2.0)


def pooled(made: PolicyPlacement, tokens: range, first_seq: int = 0) -> SnapshotRequest | None:
    """The pool tells that it holds all blocks of a prompt, after `first_seq` batches that went elsewhere."""
    hashes: list[bytes] = []
    extend_chain(hashes, chain_start("model", "format", 32), list(tokens), 32)
    source = KVEventSource(POOL, 1, list)
    source.add_tier("remote", lambda: hashes)
    for hash_ in hashes:
        source.stored(hash_, "remote")
    source.seq = first_seq - 1
    events = source.take(1.0)
    assert events is not None
    asked = made.changed(events, 1.0)
    assert asked is None or made.restored(source.snapshot(), 1.0) is None
    return asked


def test_what_the_pool_holds_counts_everywhere_as_long_as_loading_is_sooner() -> None:
    """A prompt in the pool is predicted as its load, on whichever engine; measured loads that crawl change that."""
    made, before = placement(BOTH), placement(BOTH).place(ask("r0", range(2000)), 0.5)
    assert pooled(made, range(2000)) is None
    host = TierReport("host", 100, 100, latency_s=0.001, byte_s=1e-9)
    made.told("e0", msgspec.structs.replace(a_report(), tiers=[host]), 1.5)
    placed = made.place(ask("r1", range(2000)), 2.0)
    made.ended("r1", 1, 2.0)
    assert before is not None and before.forecast.hit_tokens == 0
    assert placed is not None and placed.forecast.hit_tokens == 1984 and placed.forecast.terms["load"] > 0
    assert placed.forecast.ttft_s is not None and before.forecast.ttft_s is not None
    assert placed.forecast.ttft_s < 0.5 * before.forecast.ttft_s
    crawls = msgspec.structs.replace(host, byte_s=1e-3)
    other = placement(BOTH)
    assert pooled(other, range(2000)) is None
    other.told("e0", msgspec.structs.replace(a_report(), tiers=[crawls]), 3.0)
    placed = other.place(ask("r0", range(2000)), 4.0)
    assert placed is not None and placed.forecast.hit_tokens == 0


def test_a_router_that_missed_the_pools_changes_asks_for_all_of_it_and_both_sides_learn_it() -> None:
    made = placement(SPLIT)
    asked = pooled(made, range(2000), first_seq=3)
    assert asked is not None and asked.engine == POOL
    for side in (made._prompts, made._answers):
        assert side is not None and side.index.held_by(POOL) == 62
    made.left("p0")
    assert made._prompts is not None and made._prompts.index.held_by(POOL) == 62  # it is the machine's
    gone = KVEvents(POOL, 2, 0, (), 0)  # what an engine says when the pool is
    assert made.changed(gone, 9.0) is None and made._prompts.index.held_by(POOL) == 0


def test_another_salt_is_another_cache() -> None:
    made = placement(BOTH)
    cached(made, "e1", range(2000), salt="tenant")
    placed = made.place(ask("r", range(2000)), 2.0)
    assert placed is not None and placed.forecast.hit_tokens == 0
    placed = made.place(ask("s", range(2000), salt="tenant"), 2.0)
    assert placed is not None and placed.engine == "e1"


def test_a_busy_cache_is_not_worth_waiting_for() -> None:
    made = placement(BOTH)
    cached(made, "e1", range(320))
    for n in range(12):  # long prompts of others wait at e1
        side = made._find("e1")
        assert side is not None
        side.views.busy_until_s[side.index.rows["e1"]] = 100.0
        placed = made.place(ask(f"r{n}", range(320)), 2.0)
        assert placed is not None and placed.engine != "e1"


def test_engines_of_one_pool_load_what_another_has_computed() -> None:
    """The idle one loads rather than computes, once somebody has told how fast host memory is, and says so."""
    made = placement({"e0": "both", "e1": "both"})
    cached(made, "e0", range(2000))
    side = made._find("e0")
    assert side is not None
    for number, expected in enumerate((0, 1984)):
        side.views.busy_until_s[side.index.rows["e0"]] = 100.0
        placed = made.place(ask(f"r{number}", range(2000)), 2.0)
        assert placed is not None and placed.engine == "e1" and placed.forecast.hit_tokens == expected
        assert (placed.forecast.terms["load"] > 0) == bool(expected)
        made.left("e1")
        made.joined("e1", a_ready())
        tiers = [TierReport("host", 100, 50, latency_s=1e-4, byte_s=1e-9)]
        made.told("e0", msgspec.structs.replace(a_report(), tiers=tiers), 2.0)


def test_prompts_without_a_cache_are_spread() -> None:
    made = placement(BOTH)
    engines = {made.place(ask(f"r{n}", range(n * 5000, n * 5000 + 3000)), 0.0).engine for n in range(3)}  # type: ignore[union-attr]
    assert engines == set(BOTH)


def test_a_gap_in_events_asks_for_a_snapshot_and_a_dead_engine_is_forgotten() -> None:
    made = placement(BOTH)
    source = KVEventSource("e1", 1, list)
    source.stored(b"a" * 16)
    assert source.take(1.0) is not None
    source.stored(b"b" * 16)
    later = source.take(2.0)
    assert later is not None
    asked = made.changed(later, 2.0)
    assert asked is not None and asked.engine == "e1"
    source = KVEventSource("e1", 1, lambda: [b"a" * 16, b"b" * 16])
    source.stored(b"a" * 16)
    source.stored(b"b" * 16)
    source.seq = 1
    assert made.restored(source.snapshot(), 2.1) is None
    made.left("e1")
    for n in range(6):
        placed = made.place(ask(f"r{n}", range(1000)), 3.0)
        assert placed is not None and placed.engine != "e1"


def test_long_prompts_with_long_answers_are_split_and_short_ones_stay() -> None:
    made = placement(SPLIT)
    placed = made.place(ask("long", range(3000), 400), 0.0)
    assert placed is not None and placed.engine.startswith("d") and placed.prefill_at[0].startswith("p")
    short = made.place(ask("short", range(3000, 6000), 4), 0.0)
    assert short is not None and short.engine.startswith("p") and not short.prefill_at
    cached(made, "d0", range(8000, 11000))
    cached(made, "d1", range(8000, 11000))
    hit = made.place(ask("hit", range(8000, 11100), 400), 0.0)
    assert hit is not None and hit.engine.startswith("d") and not hit.prefill_at, "D lacks less than a small chunk"


def test_short_answers_are_split_too_where_that_is_asked_for() -> None:
    made = placement(SPLIT, max_output_on_p=0, max_total_on_p=0, max_new_on_d=0)
    for n in range(4):
        placed = made.place(ask(f"r{n}", range(n * 100, n * 100 + 80), 2), 0.0)
        assert placed is not None and placed.engine.startswith("d") and placed.prefill_at


def test_decodes_go_where_slots_are_and_wait_there_when_all_are_full() -> None:
    made = placement(SPLIT)
    made.told("d0", a_report(running=8), 0.0)
    for n in range(3):
        placed = made.place(ask(f"r{n}", range(n * 4000, n * 4000 + 3000), 400), 0.0)
        assert placed is not None and placed.engine == "d1"
    made.told("d1", a_report(running=8), 0.0)
    placed = made.place(ask("more", range(20_000, 23_000), 400), 0.0)
    assert placed is not None and placed.engine.startswith("d")


def test_costs_follow_measured_steps() -> None:
    made = placement(BOTH)
    before = made.cost.prefill_seconds(1000, 0)
    steps = [(n, 1, n * n // 2, n, 0.001 * n + 0.005) for n in range(16, 2000, 64)]
    made.told("e0", a_report(steps=steps[:16]), 10.0)
    made.told("e0", a_report(steps=steps[16:32]), 20.0)
    after = made.cost.prefill_seconds(1000, 0)
    assert abs(after - 1.0) < 0.1
    assert before < 0.5


def test_without_engines_there_is_no_place() -> None:
    made = placement(SPLIT)
    for name in SPLIT:
        made.left(name)
    assert made.place(ask("r", range(100)), 0.0) is None
