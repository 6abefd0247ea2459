"""One engine's process on virtual time: the real member over a pretended rank, its movers and its lines.

It can be killed, stopped for a while or for good, stuck in a step, and started anew under its name. Its cluster gives
it clock, wires and pool.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from io import BytesIO
from typing import Any

from tests.cluster.world import BLOCK_SIZE, LEASE_S, VOCAB_SIZE, Memory
from tests.core.checks import check_idle, check_scheduler
from tests.fakes.executor import EOS_IDS, FakeExecutor
from tests.fakes.host_tier import PretendedCopies, PretendedPool

from penstock.cluster.beats import Pulse
from penstock.cluster.decode_side import DecodeSide
from penstock.cluster.member import FRONT, Member
from penstock.cluster.prefill_side import PrefillSide
from penstock.core.policy import FcfsPolicy
from penstock.core.scheduler import Scheduler
from penstock.core.steps import SchedulerLimits
from penstock.core.tier_client import TierClient
from penstock.core.tier_costs import PrefillRate
from penstock.core.tiering import ToEngine, ToPool
from penstock.engine.engine import Engine, EngineLimits
from penstock.engine.messages import Peer, Peers, Ready
from penstock.engine.movers import Movers
from penstock.engine.recorder import RecordingScheduler, Setup
from penstock.engine.tier_source import TierSource
from penstock.sim.clock import stream
from penstock.sim.mover import SimMover

ROUTER, POOL = "router", "pool"
BOOT_S = 0.05
PULSE_S = 0.05


class Node:
    """One engine's process: a member, its rank, movers and tiers."""

    def __init__(self, cluster: Any, name: str, life: int) -> None:
        setting, clock = cluster.setting, cluster.clock
        self.cluster, self.name, self.life, self.alive = cluster, name, life, True
        self.source = f"{name}.{cluster.life}.{life}"
        self.stopped_until_s = 0.0
        self.stuck_until_s = 0.0  # its loop waits for a step that does not end
        self.pulse = Pulse(clock.now(), setting.stuck_s)
        self.num_marks = 0  # rounds of its loop, layers of its steps
        self.known_peers: set[str] = set()
        layout, num_blocks = cluster.layout, (setting.num_blocks,) * len(setting.windows)
        self.executor = FakeExecutor(layout, num_blocks, cluster.model, depth=setting.depth)
        memory = Memory(self.executor)
        self.links = SimMover(cluster.links, f"link:{name}", layout, memory, lambda: self.wake_in(0.0))
        limits = SchedulerLimits(setting.max_num_seqs, setting.max_num_batched_tokens)
        if cluster.recordings is None:
            self.scheduler = Scheduler(layout, num_blocks, limits, FcfsPolicy(), model_id="m")
        else:
            file = cluster.recordings[self.source] = BytesIO()
            self.scheduler = RecordingScheduler(Setup(layout, num_blocks, limits, "fcfs", "m", True, True), file)
        self._random = stream(cluster.seed, "steps", self.source)
        self.copies = PretendedCopies(
            clock, self._random, memory, setting.tiers, lambda: cluster.pool.slots, lambda: self.wake_in(0.0)
        )
        self.executor.load = self.copies.force
        self.tiers: TierSource | None = None
        if setting.has_tiers:
            client = TierClient(layout, setting.client_tiers, PrefillRate(1e-3, 1e-7))
            self.tiers = self.scheduler.source = TierSource(self.scheduler, client, self)
        movers = Movers(self.copies, self.links)
        limits_of = EngineLimits(4096, VOCAB_SIZE, EOS_IDS)
        self.engine = Engine(self.scheduler, self.executor, limits_of, movers, tiers=self.tiers)
        self.engine.reporter.name = name
        decode = DecodeSide(name, f"link:{name}", self.source, LEASE_S, setting.min_tokens)
        self.member = Member(self.engine, decode, PrefillSide(layout.format), life=1000 * cluster.life + life)
        self.busy: list[float] = []  # when each submitted step ends
        self._num_turns = 0
        clock.call_in(BOOT_S, self._ready)

    # ---- the line to the pool ----

    def send(self, message: ToPool, now: float) -> None:
        self.cluster.network.wire(self.name, POOL).send((self.source, message))

    def receive(self, now: float) -> Sequence[ToEngine]:
        arrived = self.cluster.network.wire(self.name, POOL).receive()
        return [message for source, message in arrived if source == self.source]

    def is_lost(self, now: float) -> bool:
        """A pool that is gone is noticed sometimes only: answers that never come are harder."""
        return not self.cluster.pool.alive and self.cluster.seed % 2 == 0

    # ---- the loop ----

    def _ready(self) -> None:
        if self.alive:
            role = self.cluster.setting.roles[self.name]
            peer = Peer(self.name, role, f"wire:{self.name}", f"link:{self.name}")
            blocks, rows = self.cluster.setting.num_blocks, self.cluster.setting.max_num_seqs
            layout = self.cluster.layout
            ready = Ready("m", 200, BLOCK_SIZE, blocks, rows, "cpu", [], [], peer, "m", layout.format, 64)
            self._post([(FRONT, ready)])
            self._beat()
            self._pulse()

    def wake_in(self, delay_s: float) -> None:
        self.cluster.clock.call_in(delay_s, self.turn)

    def _beat(self) -> None:
        """An idle loop looks up now and then."""
        if self.alive:
            self.turn()
            self.cluster.clock.call_in(LEASE_S / 5, self._beat)

    def _pulse(self) -> None:
        """The thread beside the loop."""
        if self.alive:
            now = self.cluster.clock.now()
            if now >= self.stopped_until_s and self.pulse.beats(self.num_marks, now):
                self.cluster.heard.add(self.name)
            self.cluster.clock.call_in(PULSE_S, self._pulse)

    def turn(self) -> None:
        """Messages in, plan; a step that was submitted ends later."""
        now = self.cluster.clock.now()
        if not self.alive or now < max(self.stopped_until_s, self.stuck_until_s):
            return
        if self.busy and self.cluster.setting.is_inline:
            return
        self.num_marks += 1
        member, network = self.member, self.cluster.network
        for life, message in network.wire(self.name, ROUTER).receive():
            if life == self.life:  # else it was for another process of this name
                if isinstance(message, Peers):
                    self.known_peers = {peer.name for peer in message.peers}
                self._post(member.handle(FRONT, message, now))
        for peer in self.cluster.setting.roles:
            for message in network.wire(self.name, peer).receive():
                self._post(member.handle(peer, message, now))
        self._post(member.launch(now))
        self._num_turns += 1
        if self._num_turns % 8 == 0:
            check_scheduler(self.scheduler)
        while len(self.busy) < self.scheduler.num_submitted:
            begin = max([now, *self.busy])
            self.busy.append(begin + 0.002 + self._random.random() * 0.008)
            self.cluster.clock.call_at(self.busy[-1], self._complete)

    def _complete(self) -> None:
        if not self.alive:
            return
        clock, until_s = self.cluster.clock, max(self.stopped_until_s, self.stuck_until_s)
        if clock.now() < until_s:
            clock.call_at(until_s, self._complete)
            return
        self.busy.pop(0)
        result = self.executor.collect()
        result.seconds = 0.005
        self.links.computed(result.step)
        self._post(self.member.complete(result, clock.now()))
        self.turn()

    def _post(self, post: Sequence[tuple[str, Any]]) -> None:
        for to, message in post:
            if to == FRONT:
                self.cluster.network.wire(self.name, ROUTER).send((self.life, message))
            elif to in self.known_peers:
                for delay_s in self.cluster.fate(message):
                    self.cluster.clock.call_in(delay_s, partial(self.cluster.network.wire(self.name, to).send, message))
            self.cluster.observe(self.name, to, message)

    def kill(self) -> None:
        self.alive = self.copies.alive = False
        self.links.close()
        self.cluster.network.kill(self.name)

    @property
    def hangs(self) -> bool:
        return self.alive and max(self.stopped_until_s, self.stuck_until_s) > self.cluster.clock.now()

    def stop(self, seconds: float) -> None:
        """As SIGSTOP and SIGCONT do."""
        until_s = max(self.stopped_until_s, self.cluster.clock.now() + seconds)
        self.stopped_until_s = self.copies.paused_until_s = until_s
        self.cluster.clock.call_at(self.stopped_until_s, self.turn)

    def stick(self, seconds: float) -> None:
        """Its loop waits for a call that does not return meanwhile; its other threads run."""
        self.stuck_until_s = max(self.stuck_until_s, self.cluster.clock.now() + seconds)
        self.cluster.clock.call_at(self.stuck_until_s, self.turn)


def check_node(node: Node) -> None:
    """An engine that has nothing to do holds nothing."""
    check_idle(node.scheduler)
    engine, decode, prefill = node.engine, node.member.decode, node.member.prefill
    assert not node.scheduler.traffic.flights and not engine.timeline._tracks
    assert not engine._deadlines and not engine._prompt_logprobs and not engine._submitted_s
    assert not prefill.live and not prefill._by_request and not prefill.outbox
    assert not decode._live and not decode.outbox
    assert not node.links._receipts and not node.links._waiting and not node.links._sending
    if node.tiers is not None:
        assert not node.tiers._loads and not node.tiers.client.num_open, node.name
        assert not node.tiers.client._by_id and not node.tiers.client.saving._save_moves


def check_pool(pool: PretendedPool) -> None:
    """Nor does the pool."""
    inner = pool.pool
    assert not inner._holds and not inner._filling and not inner._promotions and not inner._lookups
    assert not inner._jobs and not inner._harmful
    for indexes in [inner.host, *(tier.indexes or [] for tier in inner.lower)]:
        for index in indexes:
            assert index.num_reserved == 0 and not any(entry.num_pins for entry in index.entries.values())
