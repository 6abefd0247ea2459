"""The router when engines die: requests go on elsewhere, or wait for one that is started again; no token twice."""

from __future__ import annotations

from typing import Any

import msgspec
from hypothesis import given
from hypothesis import strategies as st
from tests.fakes.placement import LeastLoaded

from penstock.cluster.placement import PolicyPlacement
from penstock.cluster.restarts import FIRST_S, LONGEST_S, WINDOW_S, Restarts
from penstock.cluster.router import Router
from penstock.core.kv_events import KVChange, KVEvents, KVSnapshot, fingerprint
from penstock.core.pool_contents import POOL, TIER
from penstock.core.request import SamplingParams
from penstock.engine.messages import (
    AddRequest,
    CacheEvents,
    CacheSnapshot,
    CancelRequest,
    Drain,
    Explain,
    Failed,
    Fatal,
    Peer,
    Peers,
    Progress,
    Ready,
    Report,
    Stopped,
    TokenDelta,
    Tokens,
    WantSnapshot,
    Watch,
)

ROLES = {"prefill-0": "prefill", "decode-0": "decode"}


def ready(name: str) -> Ready:
    peer = Peer(name, ROLES[name], f"ipc://{name}", f"shm://{name}")
    return Ready("m", 2048, 32, 100, 16, "cpu", [], [], peer)


def running(roles: dict[str, str] = ROLES) -> Router:
    router = Router(roles, LeastLoaded(roles))
    told: list[Any] = []
    for name in roles:
        told += router.receive(name, ready(name), 0.0)[0]
    assert [type(message) for message in told] == [Ready]
    return router


def add(request_id: str = "r", num_tokens: int = 500) -> AddRequest:
    return AddRequest(request_id, list(range(num_tokens)), SamplingParams(max_tokens=10), 7, 0.0)


def tokens(*token_ids: int) -> Tokens:
    return Tokens([TokenDelta("r", list(token_ids))], 1.0)


def test_a_request_waits_for_the_only_engine_that_decodes() -> None:
    router = running()
    [(engine, sent)] = router.submit(add(), 0.0)[1]
    assert engine == "decode-0" and sent.prefill_at == ("prefill-0",)
    router.receive("decode-0", tokens(1, 2), 1.0)
    told, post = router.restarting("decode-0", 2.0)
    assert [type(message) for message in told] == [Report]
    assert [(name, len(m.peers)) for name, m in post if isinstance(m, Peers)] == [("prefill-0", 1)]
    assert router.submit(add("s"), 2.0) == ([], [])  # nobody is there to refuse it either
    assert router.receive("decode-0", Progress("loading", 0, 0), 2.0) == ([], [])
    told, post = router.receive("decode-0", ready("decode-0"), 3.0)
    assert told == []
    assert sorted(name for name, m in post if isinstance(m, Peers)) == ["decode-0", "prefill-0"]
    again = {m.request_id: m for name, m in post if isinstance(m, AddRequest) and name == "decode-0"}
    assert set(again) == {"r", "s"}
    assert again["r"].token_ids == [*range(500), 1, 2] and again["r"].num_generated == 2
    assert type(post[0][1]) is Peers  # before the requests that name them


def test_a_request_that_waits_can_be_cancelled_and_asked_about() -> None:
    router = running()
    router.submit(add(), 0.0)
    router.restarting("decode-0", 1.0)
    [failed] = router.submit(Explain("r"), 1.0)[0]
    assert isinstance(failed, Failed) and failed.code == 404
    [ended] = router.submit(CancelRequest("r"), 1.0)[0]
    assert isinstance(ended, Tokens) and ended.deltas[0].finish_reason == "abort"
    _, post = router.receive("decode-0", ready("decode-0"), 2.0)
    assert not any(isinstance(message, AddRequest) for _, message in post)


def test_an_engine_that_does_not_come_back_takes_what_waits_for_it() -> None:
    router = running()
    router.submit(add(), 0.0)
    router.restarting("decode-0", 1.0)
    [fatal] = router.lost("decode-0", "why", 2.0)[0]
    assert isinstance(fatal, Fatal) and fatal.message == "engine decode-0: why"


def test_what_goes_to_all_goes_to_an_engine_that_starts_only_if_it_must() -> None:
    router = running()
    router.restarting("decode-0", 1.0)
    assert [name for name, _ in router.submit(Watch(2.0, 1.0), 1.0)[1]] == ["prefill-0"]
    assert [name for name, _ in router.submit(Drain(2.0), 1.0)[1]] == ["decode-0"]


def test_prefill_engines_are_drained_when_nobody_needs_them_any_more() -> None:
    roles = ROLES | {"decode-1": "decode"}
    router = Router(roles, LeastLoaded(roles))
    for name in roles:
        router.receive(name, msgspec.structs.replace(ready("decode-0"), peer=None), 0.0)
    drain = Drain(9.0)
    assert router.submit(drain, 1.0) == ([], [("decode-0", drain), ("decode-1", drain)])
    assert router.receive("decode-1", Stopped(), 2.0) == ([], [])
    assert router.receive("decode-0", Stopped(), 3.0) == ([], [("prefill-0", drain)])
    assert router.receive("prefill-0", Stopped(), 4.0) == ([Stopped()], [])


def test_an_engine_that_has_stopped_gets_nothing_of_one_that_dies() -> None:
    roles = ROLES | {"decode-1": "decode"}
    router = Router(roles, LeastLoaded(roles))
    for name in roles:
        router.receive(name, msgspec.structs.replace(ready("decode-0"), peer=None), 0.0)
    [(engine, _)] = router.submit(add(), 0.0)[1]
    [other] = {"decode-0", "decode-1"} - {engine}
    router.submit(Drain(9.0), 1.0)
    router.receive(other, Stopped(), 1.0)
    [_, failed], post = router.lost(engine, "why", 2.0)
    assert isinstance(failed, Failed) and failed.code == 503
    assert [(name, type(m)) for name, m in post if not isinstance(m, Peers)] == [("prefill-0", Drain)]


def test_while_one_decodes_nothing_waits() -> None:
    roles = ROLES | {"decode-1": "decode"}
    router = Router(roles, LeastLoaded(roles))
    for name in roles:
        router.receive(name, msgspec.structs.replace(ready("decode-0"), peer=None), 0.0)
    [(engine, _)] = router.submit(add(), 0.0)[1]
    _, post = router.restarting(engine, 1.0)
    [moved] = [(name, m) for name, m in post if isinstance(m, AddRequest)]
    assert moved[0] != engine and moved[0].startswith("decode")
    assert router.receive(engine, tokens(1), 1.0) == ([], [])  # of the one that has died
    assert router.receive(moved[0], tokens(1), 1.0)[0] == [tokens(1)]


@given(st.lists(st.floats(0, 200), max_size=30), st.integers(0, 10))
def test_restarts_are_few_and_wait_longer_and_longer(gaps: list[float], limit: int) -> None:
    """Never more than the limit within the window; after a quiet window all is as at first."""
    restarts, now, allowed_s = Restarts(limit), 0.0, list[float]()
    for gap in gaps:
        now += gap
        recent = [each for each in allowed_s if now - each < WINDOW_S]
        wait_s = restarts.wait_s("a", now)
        assert wait_s == (min(FIRST_S * 2 ** len(recent), LONGEST_S) if len(recent) < limit else None)
        if wait_s is not None:
            allowed_s.append(now)
    assert restarts.wait_s("b", now) == (FIRST_S if limit else None)  # each has its own


def test_whoever_brought_the_pools_news_is_asked_for_what_was_missed() -> None:
    """A gap in the pool's changes is the router's to notice and any engine's to fill; nobody asks twice meanwhile."""
    roles = {"a": "both", "b": "both"}
    router = Router(roles, PolicyPlacement(roles, "least_time", "remaining_slots"))
    for name in roles:
        router.receive(name, Ready("m", 2048, 32, 100, 16, "cpu", [], []), 0.0)
    late = KVEvents(POOL, 3, 4, (KVChange(True, TIER, (bytes(range(16)),)),), None)
    assert router.receive("b", CacheEvents(late), 1.0)[1] == [("b", WantSnapshot(of_pool=True))]
    assert router.receive("a", CacheEvents(late), 1.0)[1] == []
    assert router.tick(1.5) == []
    # It did not come: whoever is there is asked, one after another, for one may not be joined to the pool just now.
    assert [router.tick(now) for now in (3.0, 3.5, 5.0)] == [
        [(name, WantSnapshot(of_pool=True))] if name else [] for name in ("b", "", "a")
    ]
    block = bytes(range(16))
    snapshot = KVSnapshot(POOL, 3, 4, ((TIER, (block,)),), fingerprint(block, TIER))
    assert router.receive("a", CacheSnapshot(snapshot), 5.1) == ([], [])
    assert router.tick(9.0) == []
    wrong = KVEvents("a", 1, 5, (), None)
    assert router.receive("a", CacheEvents(wrong), 9.0)[1] == [("a", WantSnapshot())]
