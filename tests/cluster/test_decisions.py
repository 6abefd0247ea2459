"""What a router remembers of its decisions, and that the front end is told of engines that come and go."""

from __future__ import annotations

from tests.fakes.placement import LeastLoaded

from penstock.cluster.decisions import MAX_DECISIONS, Decisions, Forecast
from penstock.cluster.router import Router
from penstock.core.request import SamplingParams
from penstock.engine.messages import AddRequest, KVReport, Peer, Ready, Report, TokenDelta, Tokens

ROLES = {"prefill-0": "prefill", "decode-0": "decode", "decode-1": "decode"}


def ready(name: str) -> Ready:
    return Ready("m", 1024, 32, 100, 8, "cpu", [], [], Peer(name, ROLES[name], f"ipc://{name}", f"shm://{name}"))


def report(name: str, num_running: int) -> Report:
    kv = KVReport(32, 100, num_running, 0, 0, 0, 100 - num_running)
    return Report(
        1.0, num_running, 0, {}, kv, 1, 0.1, 40, 0, 7, 0, 40, 0, [5], [],
        name=name, role=ROLES[name], prompt_tokens_by_source={"compute": 40},
    )  # fmt: skip


def started() -> Router:
    router = Router(ROLES, LeastLoaded(ROLES, min_tokens=16))
    for name in ROLES:
        told, _ = router.receive(name, ready(name), 0.0)
    (merged,) = told
    assert isinstance(merged, Ready)
    assert [each.peer.name for each in merged.engines if each.peer is not None] == list(ROLES)
    return router


def ask(router: Router, request_id: str, num_tokens: int, now: float) -> str:
    params = SamplingParams(max_tokens=4)
    ((name, _),) = router.submit(AddRequest(request_id, [7] * num_tokens, params, 1, now), now)[1]
    return name


def test_a_decision_says_why_and_what_came_of_it() -> None:
    router = started()
    engine = ask(router, "a", 100, 1.0)
    told = router.decisions.explain("a")
    assert told is not None
    assert (told["engine"], told["prefill_at"], told["prompt_tokens"]) == (engine, ["prefill-0"], 100)
    assert (told["outcome"], told["ttft_s"], told["num_tries"]) == ("running", None, 1)
    assert told["reason"] == "fewest tokens to do" and told["runner_ups"][0]["engine"] != engine
    router.receive(engine, Tokens([TokenDelta("a", [1])], 1.5), 1.5)
    router.receive(engine, Tokens([TokenDelta("a", [2], "stop")], 2.5), 2.5)
    told = router.decisions.explain("a")
    assert told is not None and (told["outcome"], told["ttft_s"]) == ("stop", 0.5)
    assert router.decisions.engine_of("a") == engine and router.decisions.engine_of("b") == ""
    ask(router, "b", 4, 3.0)
    assert [each["request_id"] for each in router.decisions.recent(10)] == ["b", "a"]
    assert router.decisions.recent(10)[0]["prefill_at"] == []


def test_a_request_that_outlives_its_engine_is_decided_again() -> None:
    router = started()
    engine = ask(router, "a", 100, 1.0)
    router.receive(engine, Tokens([TokenDelta("a", [1])], 1.5), 1.5)
    router.lost(engine, "it was killed", 2.0)
    told = router.decisions.explain("a")
    assert told is not None
    assert told["engine"] != engine and (told["num_tries"], told["ttft_s"]) == (2, 0.5)
    router.lost(told["engine"], "it was killed too", 3.0)
    assert router.decisions.num_made == 2


def test_the_newest_thousand_are_remembered() -> None:
    decisions = Decisions()
    for number in range(MAX_DECISIONS + 5):
        decisions.placed(f"r{number}", 0.0, 10, "e", (), Forecast(), 0.0, 1)
    assert decisions.explain("r4") is None and decisions.explain("r5") is not None
    decisions.ended("r4", "stop")
    decisions.first_token("r4", 1.0)
    assert len(decisions.recent(10_000)) == MAX_DECISIONS and decisions.num_made == MAX_DECISIONS + 5


def test_the_front_end_hears_at_once_of_an_engine_that_died() -> None:
    router = started()
    for name, num_running in (("prefill-0", 0), ("decode-0", 3), ("decode-1", 2)):
        told, _ = router.receive(name, report(name, num_running), 1.0)
    (merged,) = told
    assert isinstance(merged, Report) and merged.num_running == 5 and merged.name == "decode-1"
    told, _ = router.lost("decode-0", "it was killed", 2.0)
    (merged,) = [message for message in told if isinstance(message, Report)]
    assert merged.num_running == 2 and merged.iteration_tokens == []
    assert {engine.name: engine.is_alive for engine in merged.engines}["decode-0"] is False
    assert merged.prompt_tokens_by_source == {"compute": 120}, "totals never fall"
