"""Engines that change their role: only when one role lacks what the other can spare, and never before they answer."""

from __future__ import annotations

from collections.abc import Sequence

from penstock.cluster.placement import PolicyPlacement
from penstock.cluster.roles import PROBE, RoleKeeper
from penstock.cluster.router import Router
from penstock.core.cost import FittedCost, StepCoefficients
from penstock.core.request import SamplingParams
from penstock.core.scaling import ScalingLimits
from penstock.engine.messages import AddRequest, KVReport, Peer, Peers, Ready, Report, TokenDelta, Tokens

ROLES = {"p0": "prefill", "p1": "prefill", "d0": "decode", "d1": "decode"}
LIMITS = ScalingLimits(window_s=1.0, cool_down_s=5.0)
COST = FittedCost(StepCoefficients(step=0.01, token=1e-4), chunk_tokens=1024)  # 9,000 prompt tokens a second


def a_ready(name: str) -> Ready:
    peer = Peer(name, ROLES[name], f"ipc://{name}", f"shm://{name}")
    return Ready("m", 4096, 32, 1000, 64, "cpu", [], [], peer, "m", "f", 1000)


def a_report(prefill: int, generated: int, running: int = 0, waiting: int = 0) -> Report:
    kv = KVReport(32, 1000, 0, 0, 0, 0, 1000)
    return Report(0.0, running, waiting, {}, kv, 1, 0.1, 0, 0, generated, 0, 0, 0, [], [], prefill_tokens_total=prefill)


class Cluster:
    """A router with a keeper, and engines that only report."""

    def __init__(self, roles: dict[str, str] = ROLES, may_change: bool = True) -> None:
        self.keeper = RoleKeeper(COST, LIMITS, drain_s=3.0, may_change=may_change)
        self.router = Router(roles, PolicyPlacement(roles, "least_time", "remaining_slots"), self.keeper)
        self.now = 0.0
        self.sent: list[tuple[str, object]] = []
        self.prefilled = dict.fromkeys(roles, 0)
        for name in roles:
            self.router.receive(name, a_ready(name), 0.0)

    def pass_by(self, seconds: float, prompt_tokens_per_s: float, running: Sequence[str] = ()) -> None:
        """Time with this load on the prefill engines."""
        for _ in range(round(seconds * 10)):
            self.now += 0.1
            prefill = [name for name, engine in self.router.engines.items() if engine.role == "prefill"]
            for name, engine in self.router.engines.items():
                if engine.role == "prefill":
                    self.prefilled[name] += int(prompt_tokens_per_s * 0.1 / len(prefill))
                self.router.receive(name, a_report(self.prefilled[name], 0, int(name in running)), self.now)
            self.sent += self.router.tick(self.now)

    def probes(self) -> list[tuple[str, AddRequest]]:
        return [(to, message) for to, message in self.sent if isinstance(message, AddRequest)]

    def roles(self) -> dict[str, str]:
        return {name: engine.role for name, engine in self.router.engines.items()}

    def answer(self, name: str) -> None:
        """The probe's token."""
        tokens = Tokens([TokenDelta(PROBE + name, [7], "length")], self.now)
        told, _ = self.router.receive(name, tokens, self.now)
        assert not any(isinstance(message, Tokens) and message.deltas for message in told), "a probe is nobody's answer"


def test_nothing_changes_while_nobody_is_short() -> None:
    cluster = Cluster()
    cluster.pass_by(8.0, 5000)
    assert cluster.roles() == ROLES
    assert not cluster.probes()
    assert cluster.keeper.signals is not None
    assert cluster.keeper.signals.scale["prefill"] == 1


def test_a_spare_decode_engine_becomes_a_prefill_engine_once_it_answers() -> None:
    cluster = Cluster()
    cluster.pass_by(4.5, 40_000)  # two engines can do 18,000
    ((name, probe),) = cluster.probes()
    assert ROLES[name] == "decode"
    assert probe.request_id == PROBE + name and probe.params.max_tokens == 1
    assert cluster.roles() == ROLES, "not before it has answered"
    cluster.answer(name)
    cluster.pass_by(0.2, 40_000)
    assert cluster.roles()[name] == "prefill"
    peers = [message for _, message in cluster.sent if isinstance(message, Peers)][-1]
    assert {peer.name: peer.role for peer in peers.peers}[name] == "prefill"
    placed = cluster.router.placement.place(a_request(), cluster.now)
    assert placed is not None
    assert placed.engine not in (name, "p0", "p1"), "the one that is left decodes"


def test_who_may_not_change_still_tells_what_is_lacking() -> None:
    cluster = Cluster(may_change=False)
    cluster.pass_by(8.0, 40_000)
    assert cluster.roles() == ROLES and not cluster.probes()
    assert cluster.keeper.signals is not None
    assert cluster.keeper.signals.scale == {"prefill": 6, "decode": 1}


def test_who_leaves_gets_nothing_new_and_ends_what_it_has() -> None:
    cluster = Cluster()
    cluster.pass_by(3.2, 40_000, running=("d0", "d1"))
    left = next(iter(cluster.keeper._changes))
    assert not cluster.probes(), "it still runs something"
    for n in range(8):
        placed = cluster.router.placement.place(a_request(f"r{n}"), cluster.now)
        assert placed is not None and placed.engine != left
    cluster.pass_by(0.2, 40_000)
    assert [name for name, _ in cluster.probes()] == [left]


def test_who_does_not_answer_its_probe_stays_what_it_was() -> None:
    cluster = Cluster()
    cluster.pass_by(4.0, 40_000)
    ((name, _),) = cluster.probes()
    cluster.pass_by(3.5, 0)
    assert cluster.roles() == ROLES
    assert any(cluster.router.placement.place(a_request(f"r{n}"), cluster.now).engine == name for n in range(32))  # type: ignore[union-attr]


def test_every_role_keeps_an_engine() -> None:
    cluster = Cluster({"p0": "prefill", "d0": "decode"})
    cluster.pass_by(10.0, 100_000)
    assert not cluster.probes()
    assert cluster.keeper.signals is not None
    assert cluster.keeper.signals.scale["prefill"] > 5, "an outer autoscaler is told"
    assert "cannot spare" in cluster.keeper.signals.why


def test_an_engine_that_dies_while_it_changes_comes_back_as_it_was() -> None:
    cluster = Cluster()
    cluster.pass_by(4.0, 40_000)
    ((name, _),) = cluster.probes()
    cluster.router.restarting(name, cluster.now)
    cluster.router.receive(name, a_ready(name), cluster.now)
    cluster.pass_by(1.0, 0)
    assert cluster.roles() == ROLES


def a_request(request_id: str = "r", num_tokens: int = 600) -> AddRequest:
    return AddRequest(request_id, list(range(num_tokens)), SamplingParams(max_tokens=400), 1, 0.0)
