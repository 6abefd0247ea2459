"""The router among engines that die: what it says again, and what it does not."""

from __future__ import annotations

import msgspec
from tests.fakes.placement import LeastLoaded

from penstock.cluster.placement import PolicyPlacement
from penstock.cluster.router import Router
from penstock.core.kv_events import KVChange, KVEvents
from penstock.core.kv_index import ASK_AGAIN_S
from penstock.core.moves import DEVICE
from penstock.core.request import FINISH_STOP, SamplingParams
from penstock.engine.messages import (
    AddRequest,
    CacheEvents,
    CancelRequest,
    Failed,
    Ready,
    TokenDelta,
    Tokens,
    WantSnapshot,
)

BOTH = {"e0": "both", "e1": "both"}
READY = Ready("m", 200, 4, 60, 6, "cpu", [], [], None, "m", "f", 64)


def a_request(request_id: str = "r") -> AddRequest:
    return AddRequest(request_id, list(range(9)), SamplingParams(max_tokens=4), 1, 0.0)


def started(router: Router) -> Router:
    for name in router.engines:
        router.receive(name, READY, 0.0)
    return router


def test_a_cancelled_request_is_not_begun_again_when_its_engine_dies() -> None:
    router = started(Router(BOTH, LeastLoaded(BOTH)))
    _, ((engine, _),) = router.submit(a_request(), 0.0)
    cancel = CancelRequest("r", FINISH_STOP, "full stop")
    assert router.submit(cancel, 1.0) == ([], [(engine, cancel)])
    told, post = router.restarting(engine, 2.0)
    assert [message for message in told if isinstance(message, Tokens)] == [
        Tokens([TokenDelta("r", [], FINISH_STOP, "full stop")], 2.0)
    ]
    assert not [message for _, message in post if isinstance(message, AddRequest)]
    assert not router.num_replayed and not router._live


def test_an_engine_that_no_longer_has_a_request_says_nothing_about_it() -> None:
    router = started(Router(BOTH, LeastLoaded(BOTH)))
    _, ((first, _),) = router.submit(a_request(), 0.0)
    answer = Tokens([TokenDelta("r", [7])], 1.0)
    assert router.receive(first, answer, 1.0) == ([answer], [])
    _, post = router.restarting(first, 2.0)
    (second,) = [name for name, message in post if isinstance(message, AddRequest)]
    assert second != first
    router.receive(first, READY, 3.0)
    assert router.receive(first, Tokens([TokenDelta("r", [8])], 3.0), 3.0) == ([], [])
    assert router.receive(first, Failed("r", 500, "late"), 3.0) == ([], [])
    ((_, again),) = [item for item in router.restarting(second, 4.0)[1] if isinstance(item[1], AddRequest)]
    assert isinstance(again, AddRequest)
    assert (again.token_ids[9:], again.num_generated) == ([7], 1)


def test_prompt_logprobs_come_once() -> None:
    router = started(Router(BOTH, LeastLoaded(BOTH)))
    request = msgspec.structs.replace(a_request(), params=SamplingParams(max_tokens=4, prompt_logprobs=1))
    _, ((first, sent),) = router.submit(request, 0.0)
    assert isinstance(sent, AddRequest) and sent.params.prompt_logprobs == 1
    router.receive(first, Tokens([TokenDelta("r", [7])], 1.0), 1.0)
    ((_, again),) = [item for item in router.restarting(first, 2.0)[1] if isinstance(item[1], AddRequest)]
    assert isinstance(again, AddRequest) and again.params.prompt_logprobs is None


def test_a_request_that_waits_for_an_engine_is_cancelled_at_once() -> None:
    router = started(Router({"e0": "both"}, LeastLoaded({"e0": "both"})))
    router.restarting("e0", 1.0)
    assert router.submit(a_request(), 2.0) == ([], [])
    assert router.submit(CancelRequest("r"), 3.0) == ([Tokens([TokenDelta("r", [], "abort")], 3.0)], [])
    _, post = router.receive("e0", READY, 4.0)
    assert not [message for _, message in post if isinstance(message, AddRequest)]


def test_a_snapshot_that_does_not_come_is_asked_for_again() -> None:
    router = started(Router(BOTH, PolicyPlacement(BOTH, "least_time", "request_count")))
    changes = (KVChange(True, DEVICE, (bytes(range(16)),)),)
    asked = [("e0", WantSnapshot())]
    assert router.receive("e0", CacheEvents(KVEvents("e0", 1, 5, changes)), 1.0) == ([], asked)
    assert router.tick(1.1) == []
    assert router.tick(1.0 + ASK_AGAIN_S) == asked
    router.restarting("e0", 3.0)
    assert router.tick(10.0) == [], "nobody is asked who is not there"


def test_what_dead_engines_held_is_forgotten_in_time() -> None:
    placement = PolicyPlacement(BOTH, "least_time", "request_count")
    router = started(Router(BOTH, placement))
    changes = (KVChange(True, DEVICE, tuple(bytes([n + 1] * 16) for n in range(20))),)
    for life in range(5):
        router.receive("e0", CacheEvents(KVEvents("e0", life, 0, changes)), float(life))
        router.restarting("e0", life + 0.5)
        for _ in range(100):
            router.tick(life + 0.6)
        router.receive("e0", READY, life + 0.7)
    assert placement._prompts is not None
    assert placement._prompts.index.num_blocks == 0
    assert placement._prompts.index._num_slots < 6, "slots are used again"
