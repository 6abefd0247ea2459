"""One fault at each state of the hand-off and of the tiers: the state was reached, and the stream ends as it must."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import pytest
from tests.cluster.node import POOL, Node
from tests.cluster.whole import CLOSED, Ask, Cluster, Setting
from tests.cluster.world import LEASE_S
from tests.fakes.host_tier import NOTHING

from penstock.cluster.messages import Ack, Alive, Commit, FirstToken, Prefill, Refused, Stop
from penstock.core.moves import DEVICE
from penstock.core.tiering import Fetched, Match, Reserve, Reserved
from penstock.core.traffic import Offer
from penstock.engine.client import DRAINING
from penstock.sim.wire import LineFaults

PROMPT = list(range(200, 245))
PAIRS = {"p0": "prefill", "p1": "prefill", "d0": "decode", "d1": "decode"}
BOTH = {"e0": "both", "e1": "both"}

When = Callable[..., bool]  # of (the hooked call's result, *its arguments)


def after(thing: Any, method: str, when: When, fire: Callable[[], None]) -> None:
    """Call `fire` behind calls of this object's method of which `when` holds."""
    original = getattr(thing, method)

    def hooked(*args: Any) -> Any:
        result = original(*args)
        if when(result, *args):
            fire()
        return result

    setattr(thing, method, hooked)


class Scene:
    """A cluster with one request that is watched. `d` decodes it, `p` computes its prompt, both by name."""

    def __init__(self, roles: dict[str, str], **more: Any) -> None:
        self.cluster = Cluster(replace(Setting(), roles=roles, policies=("round_robin", "round_robin"), **more), 1)
        self.reached = 0  # times
        self.wanted = 1  # at which of them the fault comes
        self.fault: Callable[[Scene], None] = lambda scene: None
        self.ask: Ask | None = None
        self.d = self.p = ""

    def fire(self) -> None:
        self.reached += 1
        if self.reached == self.wanted:
            self.cluster.clock.call_in(0.0, lambda: self.fault(self))

    def begin(self) -> None:
        self.ask = self.cluster.ask(PROMPT, 6)
        place = self.cluster.router.decisions.explain(self.ask.request_id)
        assert place is not None
        self.d = place["engine"]
        self.p = (place["prefill_at"] or [self.d])[0]

    def node(self, name: str) -> Node:
        return self.cluster.nodes[name]

    def end(self) -> Ask:
        for n in range(3):
            self.cluster.ask([*PROMPT[:24], 700 + n], 5)  # bystanders
        self.cluster.run()
        self.cluster.check()
        assert self.ask is not None
        return self.ask


# ---- states: each hooks what makes it visible ----


def offered(s: Scene) -> None:
    after(s.node(s.d).member.decode, "offer", lambda result, *_: isinstance(result, Offer), s.fire)


def reserved(s: Scene) -> None:
    after(s.node(s.d).member.decode, "started", lambda _, move, now: move.dst.where == DEVICE, s.fire)


def sent(kind: type) -> Callable[[Scene], None]:
    def hook(s: Scene) -> None:
        s.cluster.watchers.append(lambda source, to, message: s.fire() if isinstance(message, kind) else None)

    return hook


def heard(kind: type) -> Callable[[Scene], None]:
    def hook(s: Scene) -> None:
        for name in (s.d, s.p):
            after(s.node(name).member, "handle", lambda _, source, message, now: isinstance(message, kind), s.fire)

    return hook


def computing(s: Scene) -> None:
    after(s.node(s.p).executor, "submit", lambda *_: True, s.fire)


def sending(s: Scene) -> None:
    after(s.node(s.p).links, "start", lambda _, move: move.src.where == DEVICE, s.fire)


def loading(s: Scene) -> None:
    for node in s.cluster.nodes.values():
        after(node.copies, "start", lambda _, move: move.dst.where == DEVICE, s.fire)


def landed(s: Scene) -> None:
    for node in s.cluster.nodes.values():
        after(node.copies, "_end", lambda _, copy, error: copy.move.dst.where == DEVICE, s.fire)


def saving(s: Scene) -> None:
    for node in s.cluster.nodes.values():
        after(node.copies, "start", lambda _, move: move.src.where == DEVICE, s.fire)


HAND_OFF: dict[str, tuple[Callable[[Scene], None], int]] = {
    "D offered": (offered, 1),
    "D reserved": (reserved, 1),
    "D ticket sent": (sent(Prefill), 1),
    "D first token seen": (heard(FirstToken), 1),
    "D commit seen": (heard(Commit), 1),
    "D complete": (sent(Ack), 1),
    "P queued": (heard(Prefill), 1),
    "P computing chunk 0": (computing, 1),
    "P computing chunk 1": (computing, 2),
    "P computing chunk 2": (computing, 3),
    "P sent chunk 0": (sending, 1),
    "P sent chunk 1": (sending, 2),
    "P sent chunk 2": (sending, 3),
    "P sampled": (sent(FirstToken), 1),
    "P committed": (sent(Commit), 1),
    "P acked": (heard(Ack), 1),
}
TIERS: dict[str, tuple[Callable[[Scene], None], int]] = {
    "asked": (sent(Match), 1),
    "fetched": (sent(Fetched), 1),
    "loading": (loading, 1),
    "landed": (landed, 1),
    "reserving": (sent(Reserve), 1),
    "reserved": (sent(Reserved), 1),
    "saving": (saving, 1),
}


# ---- faults ----


def lost(s: Scene) -> None:
    """What the two say to each other in the next while: longer than a lease, or the next message only."""
    s.cluster.network.cut([s.d], [s.p])
    s.cluster.clock.call_in(0.6 * LEASE_S, s.cluster.network.heal)


def doubled(s: Scene) -> None:
    for pair in ((s.d, s.p), (s.p, s.d)):
        s.cluster.network.set_faults(LineFaults(delay_s=0.001, duplicate=1.0), *pair)


def stalled(s: Scene) -> None:
    now = s.cluster.clock.now()
    s.cluster.links.stall(f"link:{s.d}", now + 2 * LEASE_S)
    for pair in ((s.d, s.p), (s.p, s.d), (s.d, POOL), (POOL, s.d)):
        s.cluster.network.stall(*pair, now + 2 * LEASE_S)


def cancel(s: Scene) -> None:
    assert s.ask is not None
    s.cluster.cancel(s.ask)


def damage(s: Scene) -> None:
    for place in s.cluster.pool.slots:
        s.cluster.pool.slots[place] = NOTHING


def stop_pool(s: Scene) -> None:
    s.cluster.pool.stopped_until_s = s.cluster.clock.now() + 0.5


FAULTS: dict[str, Callable[[Scene], None]] = {
    "P dies": lambda s: s.cluster.kill(s.p),
    "D dies": lambda s: s.cluster.kill(s.d),
    "the router dies": lambda s: s.cluster.kill_router(0.1),
    "messages are lost": lost,
    "messages are doubled": doubled,
    "links stall": stalled,
    "P stops for a while": lambda s: s.node(s.p).stop(2 * LEASE_S),
    "D stops for a while": lambda s: s.node(s.d).stop(2 * LEASE_S),
    "cancel": cancel,
}
TIER_FAULTS: dict[str, Callable[[Scene], None]] = {
    "the engine dies": FAULTS["D dies"],
    "the router dies": FAULTS["the router dies"],
    "the engine stops for a while": FAULTS["D stops for a while"],
    "the pool dies": lambda s: s.cluster.kill_pool(0.3),
    "the pool stops for a while": stop_pool,
    "links stall": stalled,
    "slots are damaged": damage,
    "cancel": cancel,
}


def judge(fault: str, ask: Ask) -> None:
    """A fault that the cluster can make good ends no stream; the others end it in one way."""
    if fault == "the router dies":
        assert ask.error == (0, CLOSED) or None not in ask.reasons
    elif fault == "cancel":
        assert ask.cancelled or None not in ask.reasons
    else:
        assert ask.error is None and None not in ask.reasons, ask


@pytest.mark.parametrize("fault", FAULTS)
@pytest.mark.parametrize("state", HAND_OFF)
def test_a_hand_off(state: str, fault: str) -> None:
    scene = Scene(PAIRS, has_tiers=False)
    hook, scene.wanted = HAND_OFF[state]
    scene.fault = FAULTS[fault]
    scene.cluster.clock.run_until(0.1)
    scene.begin()
    hook(scene)
    scene.cluster.clock.run_until(0.5)
    ask = scene.end()
    assert scene.reached >= scene.wanted, f"{state} was never reached"
    judge(fault, ask)


@pytest.mark.parametrize("depth", [1, 2])
@pytest.mark.parametrize("fault", TIER_FAULTS)
@pytest.mark.parametrize("state", TIERS)
def test_a_tier(state: str, fault: str, depth: int) -> None:
    scene = Scene(BOTH, depth=depth)
    hook, scene.wanted = TIERS[state]
    scene.fault = TIER_FAULTS[fault]
    cluster = scene.cluster
    cluster.clock.run_until(0.1)
    for _ in range(2):
        cluster.ask(PROMPT[:40] + [900], 3)
    cluster.clock.run_until(0.6)
    for node in cluster.nodes.values():
        node.scheduler.forget_cache()
    scene.begin()
    hook(scene)
    cluster.clock.run_until(1.2)
    ask = scene.end()
    assert scene.reached >= scene.wanted, f"{state} was never reached"
    judge(fault, ask)


FATES: dict[str, Sequence[float]] = {
    "lost": (),
    "doubled": (0.0, 0.0),
    "late": (1.5 * LEASE_S,),
    "doubled, once late": (0.0, 1.5 * LEASE_S),
}
PROVOKED: dict[type, Callable[[Scene], None]] = {  # what these are said for
    Alive: lambda s: s.node(s.p).stop(0.9 * LEASE_S),
    Stop: cancel,
    Refused: lambda s: s.node(s.p).executor.failing.update(r for r in s.node(s.p).scheduler.requests),
}


@pytest.mark.parametrize("number", [1, 2, 4])
@pytest.mark.parametrize("fate", FATES)
@pytest.mark.parametrize("kind", [Prefill, FirstToken, Commit, Ack, Alive, Stop, Refused])
def test_a_message(kind: type, fate: str, number: int) -> None:
    """The first `number` messages of this kind."""
    scene = Scene(PAIRS, has_tiers=False)
    met = 0

    def decide(message: Any) -> Sequence[float]:
        nonlocal met
        met += isinstance(message, kind)
        return FATES[fate] if isinstance(message, kind) and met <= number else (0.0,)

    scene.cluster.fate = decide
    scene.cluster.clock.run_until(0.1)
    scene.begin()
    if kind in PROVOKED:
        scene.fault = PROVOKED[kind]
        computing(scene)
    scene.cluster.clock.run_until(0.1 + 6 * LEASE_S)
    ask = scene.end()
    assert met, f"no {kind.__name__} was sent"
    judge("cancel" if kind is Stop else fate, ask)


@pytest.mark.parametrize("kind", [FirstToken, Commit, Alive, Refused])
def test_an_id_that_is_used_again_meets_nothing_of_its_past(kind: type) -> None:
    """What P said of a cancelled request comes when D waits for another one of that id, as long as the first."""
    scene = Scene(PAIRS | {"d1": "prefill"}, has_tiers=False)
    cluster, held = scene.cluster, []

    def hold(message: Any) -> Sequence[float]:
        if isinstance(message, kind) and scene.ask is first:
            held.append(message)
            return ()
        return (0.0,)

    cluster.fate = hold
    cluster.clock.run_until(0.1)
    scene.begin()
    first = scene.ask
    if kind in PROVOKED:
        scene.fault = PROVOKED[kind]
        computing(scene)
    while not held:
        assert cluster.clock.step()
    assert first is not None
    cluster.cancel(first)
    while not cluster.front.is_free(first.request_id, 1):
        assert cluster.clock.step()
    scene.ask = cluster.ask([token + 50 for token in PROMPT], 6)
    assert scene.ask.request_id == first.request_id
    side = scene.node(scene.d).member.decode
    failed = side.num_failed
    while not side.num_in_flight:
        assert cluster.clock.step()
    cluster.network.wire(scene.p, scene.d).send(held[0])
    judge("an old message", scene.end())
    assert side.num_failed == failed, "its hand-off was spoiled"


@pytest.mark.parametrize("patience_s", [0.01, 0.1, 5.0])
@pytest.mark.parametrize("fault", ["", *FAULTS])
def test_a_drain(fault: str, patience_s: float) -> None:
    """The server is told to end, and something befalls it meanwhile: every stream ends, and then the server."""
    scene = Scene(PAIRS, has_tiers=False)
    cluster = scene.cluster
    cluster.clock.run_until(0.1)
    scene.begin()
    asks = [cluster.ask([*PROMPT[: 20 + n], 700 + n], 9) for n in range(4)]
    assert scene.ask is not None
    asks.append(scene.ask)
    cluster.clock.run_until(0.12)
    front = cluster.front
    front.drain(0.12 + patience_s)
    assert cluster.ask(PROMPT, 4).error == (503, "the server is shutting down")
    if fault:
        FAULTS[fault](scene)
    while front.state == DRAINING and cluster.is_up:
        assert cluster.clock.now() < 30.0, f"it never ends: {cluster.router.engines}"
        cluster.clock.run_until(cluster.clock.now() + 0.1)
    cluster.clock.run_until(cluster.clock.now() + 20 * LEASE_S)
    cluster.check()
    for ask in asks:
        assert ask.is_over, ask
        assert ask.error is None or fault.endswith("dies"), ask
        assert patience_s < 1.0 or fault or "abort" not in ask.reasons, ask
