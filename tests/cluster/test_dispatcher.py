"""A router's mind: who gets a request, after what happened before. No server, no clock."""

from __future__ import annotations

import random

import pytest

from penstock.cluster.dispatcher import Dispatcher, Facts
from penstock.cluster.kv_events import encode
from penstock.cluster.remote_cache import RemoteCache
from penstock.core.kv_events import KVEventSource
from penstock.core.prefix import chain_start, extend_chain
from penstock.core.route_modes import ModeLimits

FACTS = Facts(block_size=32, num_blocks=1000, max_model_len=4096, models=("m",))


def prompt(seed, num_tokens=640):
    draw = random.Random(seed)
    return [draw.randrange(1000) for _ in range(num_tokens)]


def make(*names, **options):
    mind = Dispatcher(dict.fromkeys(names, "both"), **options)
    for name in names:
        mind.joined(name, FACTS, 0.0)
    return mind


def test_a_prompt_goes_where_it_went_before_until_that_is_forgotten():
    mind = make("a", "b", "c", lasts_s=100.0)
    for number in range(10):
        first = mind.place(f"{number}", prompt(number), 8, set(), 1.0).engine
        mind.ended(f"{number}", 8, "stop", 2.0)
        again = mind.place(f"{number}+", prompt(number) + [1, 2], 8, set(), 50.0)
        assert again.engine == first and again.forecast.hit_tokens == 640
        mind.ended(f"{number}+", 8, "stop", 51.0)
    for second in range(52, 200):
        mind.tick(float(second))
    assert mind.place("late", prompt(3), 8, set(), 200.0).forecast.hit_tokens == 0


def test_an_engine_that_left_and_came_back_is_believed_to_have_kept_its_cache():
    mind = make("a", "b")
    engine = mind.place("1", prompt(1), 8, set(), 0.0).engine
    mind.ended("1", 8, "stop", 1.0)
    mind.left(engine)
    other = mind.place("2", prompt(1), 8, set(), 2.0)
    assert other.engine != engine
    mind.ended("2", 8, "stop", 3.0)
    mind.joined(engine, FACTS, 4.0)
    assert mind.place("3", prompt(1), 8, {other.engine}, 5.0).forecast.hit_tokens == 608


def test_a_request_is_placed_again_without_those_it_has_been_to():
    mind = make("a", "b", "c")
    been: set[str] = set()
    for number in range(3):
        placed = mind.place("r", prompt(1), 8, been, float(number))
        assert placed.engine not in been
        been.add(placed.engine)
    assert mind.place("r", prompt(1), 8, been, 4.0) is None
    assert mind.decisions.explain("r")["outcome"] == "error" and mind.num_retries == 3
    assert mind.place("s", prompt(1), 8, set(), 5.0) is not None  # shunned for that request only
    mind.ended("s", 1, "stop", 6.0)
    assert not mind.is_live("r") and not mind.is_live("s")


def test_events_of_an_engine_count_and_guesses_about_it_do_not():
    mind = make("a", "b", publishes={"a"})
    held = prompt(7)
    source = KVEventSource("a", 0, list, with_tokens=True)
    hashes: list[bytes] = []
    extend_chain(hashes, b"its own root....", held, 32)
    for n, hash_ in enumerate(hashes):
        source.describe(hash_, hashes[n - 1] if n else None, held[32 * n : 32 * n + 32])
        source.stored(hash_)
    mind.changed(mind.caches["a"].told(encode(source.take(0.0), 0.0)), 0.0)
    placed = mind.place("r", held + [1], 8, set(), 1.0)
    assert placed.engine == "a" and placed.forecast.hit_tokens == 640
    assert set(mind.caches) == {"a"}
    assert isinstance(mind.caches["a"], RemoteCache)


def test_prefill_and_decode():
    roles = {"p0": "prefill", "p1": "prefill", "d0": "decode", "d1": "decode"}
    limits = ModeLimits(max_output_on_p=0, max_total_on_p=0, max_new_on_d=64)
    mind = Dispatcher(roles, limits=limits)
    assert not mind.can_serve
    for name in ("p0", "p1"):
        mind.joined(name, FACTS, 0.0)
    assert not mind.can_serve
    for name in ("d0", "d1"):
        mind.joined(name, FACTS, 0.0)
    assert mind.can_serve
    placed = mind.place("r", prompt(1), 100, set(), 1.0)
    assert placed.engine in ("d0", "d1") and placed.prefill_at[0] in ("p0", "p1")
    mind.began("r", 1.1)
    mind.ended("r", 50, "stop", 2.0)
    again = mind.place("s", prompt(1), 100, {placed.engine}, 3.0)
    assert again.prefill_at[:1] == placed.prefill_at[:1] and again.engine != placed.engine
    for name in ("p0", "p1"):
        mind.left(name)
    assert mind.place("t", prompt(2), 100, set(), 4.0).prefill_at == ()


def test_costs_are_learnt_from_first_bytes():
    mind, now = make("a"), 0.0
    for number in range(200):
        num_tokens = 32 * (1 + number % 30)
        mind.place(f"{number}", prompt(number + 1000, num_tokens), 8, set(), now)
        now += 0.01 + 1e-5 * num_tokens  # 100,000 tokens/s, and 10 ms
        mind.began(f"{number}", now)
        mind.ended(f"{number}", 8, "stop", now)
    predicted = mind.place("x", prompt(5, 960), 8, set(), now).forecast.ttft_s
    assert predicted == pytest.approx(0.01 + 960e-5, rel=0.3)


def test_models_and_sizes():
    mind = Dispatcher({"a": "both", "b": "both"})
    mind.joined("a", Facts(16, 100, models=("x", "y")), 0.0)
    mind.joined("b", Facts(models=("y",)), 0.0)
    assert mind.block_size == 16 and mind.models() == ["x", "y"]
    assert mind.without("x") == {"b"} and mind.without(None) == set()
    assert mind.place("long", prompt(1, 4000), 8, set(), 0.0).engine == "b"  # it does not fit into the other
    mind.measured("a", 3, 1, 0.5, 1.0)
    assert mind.place("none", [], None, {"b"}, 1.0).engine == "a"
    start = chain_start("route", "", 16)
    assert start != chain_start("route", "", 32)


def linked_pair():
    """`b` reads where `a` serves; `a` holds a prompt and is busy."""
    mind = Dispatcher({"a": "both", "b": "both"})
    facts = {"block_size": 32, "num_blocks": 1000, "models": ("m",), "block_bytes": 100_000}
    mind.joined("a", Facts(serves="host-a:7000", **facts), 0.0)
    mind.joined("b", Facts(reads="host-a:7000", **facts), 0.0)
    assert mind.place("first", prompt(1), 8, {"b"}, 0.0).engine == "a"
    mind.ended("first", 8, "stop", 1.0)
    for number in range(3):
        mind.place(f"long {number}", prompt(100 + number, 8000), 8, {"b"}, 1.0)
    return mind


def test_a_prompt_goes_where_its_beginning_can_be_copied_to():
    """Only as fast as its engine has measured; not while that says that its remote tier is off."""
    mind = linked_pair()
    mind.reads_others("b", 1e-3, 1e-9)
    placed = mind.place("copy", prompt(1), 8, set(), 1.0)
    assert placed.engine == "b" and placed.forecast.hit_tokens == 608
    assert placed.forecast.terms["load"] == pytest.approx(1.0 + 1.9, rel=1e-3), "19 blocks of 0.1 ms, in ms"
    mind.began("copy", 1.5)
    assert not mind.placement._samples, "a load says nothing of what computing costs"
    mind.ended("copy", 8, "stop", 2.0)

    for latency_s, byte_s in ((None, 0.0), (1e-3, 1e-3)):
        mind = linked_pair()
        mind.reads_others("b", 1e-3, 1e-9)
        mind.reads_others("b", latency_s, byte_s)
        placed = mind.place("compute", prompt(1), 8, set(), 1.0)
        assert placed.engine == "b" and placed.forecast.hit_tokens == 0


def test_the_slowest_of_those_that_copy_is_predicted_with():
    mind = linked_pair()
    mind.reads_others("a", 1e-3, 2e-9)
    mind.reads_others("b", 2e-3, 1e-9)
    assert mind.placement.cost.move_seconds(10**6, "peer") == pytest.approx(2e-3 + 2e-3)
    mind.left("a")
    mind.reads_others("b", 2e-3, 1e-9)
    assert mind.placement.cost.move_seconds(10**6, "peer") == pytest.approx(2e-3 + 1e-3)
    mind.reads_others("nobody", 1.0, 1.0)
