"""A cluster of pretended ranks on virtual time: real members, schedulers and hand-offs; faults drawn from a seed.

Tokens are hashes of the KV that a rank reads through its block tables (tests/fakes/executor.py), so a block that is
wrong, late or somebody else's gives a wrong token. One seed, one run.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from tests.core.checks import check_idle, check_scheduler
from tests.fakes.executor import EOS_IDS, FakeExecutor, HashModel, fake_layout

from penstock.cluster.decode_side import DecodeSide
from penstock.cluster.member import FRONT, Member
from penstock.cluster.prefill_side import PrefillSide
from penstock.core.policy import FcfsPolicy
from penstock.core.request import Request, SamplingParams
from penstock.core.scheduler import Scheduler
from penstock.core.steps import SchedulerLimits
from penstock.engine.engine import Engine, EngineLimits
from penstock.engine.messages import AddRequest, CancelRequest, Failed, Peer, Peers, Tokens
from penstock.sim.clock import VirtualClock, stream
from penstock.sim.mover import LinkFaults, PretendedLinks, SimMover
from penstock.sim.wire import LineFaults, PretendedNetwork

BLOCK_SIZE = 4
VOCAB_SIZE = 4096
LEASE_S = 0.5
FRONT_END = "front"


@dataclass(frozen=True)
class Setting:
    """What a cluster is made of."""

    num_prefill: int = 2
    num_decode: int = 2
    windows: tuple[int | None, ...] = (None,)
    num_blocks: int = 60
    max_num_seqs: int = 6
    max_num_batched_tokens: int = 16
    depth: int = 1
    min_tokens: int = 6
    tells_peers: bool = False  # the front end says who is left when one has died
    messages: LineFaults = field(default_factory=lambda: LineFaults(delay_s=0.001))
    links: LinkFaults = field(default_factory=LinkFaults)


@dataclass
class Memory:
    """The blocks of a pretended rank, as a mover sees them."""

    executor: FakeExecutor

    def read(self, group: int, block_id: int) -> Any:
        return list(self.executor.kv[group][block_id])

    def write(self, group: int, block_id: int, content: Any) -> None:
        altered = content[0] == "altered"
        self.executor.kv[group][block_id] = [hash(("altered", c)) for c in content[1]] if altered else list(content)


class Node:
    """One engine's process: a member, its rank and mover. It can be killed, stopped for a while, and started anew."""

    def __init__(self, world: World, name: str, life: int) -> None:
        setting, clock = world.setting, world.clock
        self.world, self.name, self.alive = world, name, True
        self.stopped_until_s = 0.0
        layout = world.layout
        num_blocks = tuple(setting.num_blocks for _ in setting.windows)
        self.executor = FakeExecutor(layout, num_blocks, world.model, depth=setting.depth)
        self.mover = SimMover(world.links, f"link:{name}", layout, Memory(self.executor), lambda: self.wake_in(0.0))
        scheduler = Scheduler(
            layout,
            num_blocks,
            SchedulerLimits(setting.max_num_seqs, setting.max_num_batched_tokens),
            FcfsPolicy(),
            model_id="m",
        )
        engine = Engine(scheduler, self.executor, EngineLimits(4096, VOCAB_SIZE, EOS_IDS), self.mover)
        decode = DecodeSide(name, f"link:{name}", f"{name}.{life}", LEASE_S, setting.min_tokens)
        self.member = Member(engine, decode, PrefillSide(layout.format))
        self.busy: list[float] = []  # when each submitted step ends
        self._random = stream(world.seed, "steps", name, life)
        clock.call_in(0.0, self._beat)

    @property
    def scheduler(self) -> Scheduler:
        return self.member.engine.scheduler

    def wake_in(self, delay_s: float) -> None:
        self.world.clock.call_in(delay_s, self.turn)

    def _beat(self) -> None:
        """An idle loop looks up now and then."""
        if self.alive:
            self.turn()
            self.world.clock.call_in(LEASE_S / 5, self._beat)

    def turn(self) -> None:
        """Messages in, plan; a step that was submitted ends later."""
        clock = self.world.clock
        if not self.alive:
            return
        if clock.now() < self.stopped_until_s:
            return
        member, now = self.member, clock.now()
        for peer in [FRONT_END, *self.world.names]:
            for message in self.world.network.wire(self.name, peer).receive():
                self._post(member.handle(FRONT if peer == FRONT_END else peer, message, now))
        self._post(member.launch(now))
        check_scheduler(self.scheduler)
        while len(self.busy) < self.scheduler.num_submitted:
            begin = max([now, *self.busy])
            self.busy.append(begin + 0.002 + self._random.random() * 0.008)
            clock.call_at(self.busy[-1], self._complete)

    def _complete(self) -> None:
        if not self.alive:
            return
        clock = self.world.clock
        if clock.now() < self.stopped_until_s:
            clock.call_at(self.stopped_until_s, self._complete)
            return
        self.busy.pop(0)
        result = self.executor.collect()
        self.mover.computed(result.step)
        self._post(self.member.complete(result, clock.now()))
        check_scheduler(self.scheduler)
        self.turn()

    def _post(self, post: Sequence[tuple[str, Any]]) -> None:
        for to, message in post:
            self.world.network.wire(self.name, to or FRONT_END).send(message)

    def kill(self) -> None:
        self.alive = False
        self.mover.close()
        self.world.network.kill(self.name)

    def stop(self, seconds: float) -> None:
        """As SIGSTOP and SIGCONT do: it hears and says nothing meanwhile; the kernel still takes what is sent to it."""
        self.stopped_until_s = self.world.clock.now() + seconds
        self.world.clock.call_at(self.stopped_until_s, self.turn)


@dataclass
class Ask:
    """A request and what its client has seen of it."""

    request_id: str
    prompt: list[int]
    seed: int
    max_tokens: int
    decode_at: str
    prefill_at: tuple[str, ...]
    tokens: list[int] = field(default_factory=list)
    finish_reason: str | None = None
    error: Failed | None = None
    cancelled: bool = False
    confirmed: bool = False  # the engine has said that it is gone: its id is free again

    @property
    def is_over(self) -> bool:
        return self.cancelled or self.finish_reason is not None or self.error is not None


class World:
    """The cluster and its clients."""

    def __init__(self, setting: Setting, seed: int) -> None:
        self.setting, self.seed = setting, seed
        self.clock = VirtualClock()
        self.layout = fake_layout(setting.windows, BLOCK_SIZE)
        self.model = HashModel(self.layout)
        self.links = PretendedLinks(self.clock, seed, setting.links)
        self.network = PretendedNetwork(self.clock, seed, setting.messages, self._arrived)
        safe = LineFaults(delay_s=0.001)  # a front end and its engine share a machine
        self.prefills = [f"p{i}" for i in range(setting.num_prefill)]
        self.decodes = [f"d{i}" for i in range(setting.num_decode)]
        self.names = [*self.prefills, *self.decodes]
        for name in self.names:
            self.network.set_faults(safe, FRONT_END, name)
            self.network.set_faults(safe, name, FRONT_END)
        self.nodes = {name: Node(self, name, 0) for name in self.names}
        self.asks: dict[str, Ask] = {}
        self.past: list[Ask] = []  # whose ids were used again
        self._lives = dict.fromkeys(self.names, 0)

    # ---- clients ----

    def ask(self, prompt: Sequence[int], max_tokens: int, decode_at: str, prefill_at: Sequence[str]) -> Ask:
        number = len(self.asks) + len(self.past)
        free = [i for i, a in self.asks.items() if a.confirmed and a.decode_at == decode_at]
        request_id = free[0] if free else f"r{number}"
        if free:
            self.past.append(self.asks[request_id])
        ask = Ask(request_id, list(prompt), 1000 + number, max_tokens, decode_at, tuple(prefill_at))
        self.asks[request_id] = ask
        self._send(ask)
        return ask

    def _send(self, ask: Ask) -> None:
        """The request, or what is left of it, to its decode engine."""
        message = AddRequest(
            ask.request_id,
            ask.prompt + ask.tokens,
            SamplingParams(max_tokens=ask.max_tokens, logprobs=1),
            ask.seed,
            self.clock.now(),
            prefill_at=ask.prefill_at,
            num_generated=len(ask.tokens),
        )
        self.network.wire(FRONT_END, ask.decode_at).send(message)

    def cancel(self, ask: Ask) -> None:
        if not ask.is_over:
            ask.cancelled = True
            self.network.wire(FRONT_END, ask.decode_at).send(CancelRequest(ask.request_id))

    def kill(self, name: str, revive_s: float | None = None) -> None:
        """Kill an engine; the front end sees it and asks others for what it was decoding."""
        if not self.nodes[name].alive:
            return
        self.nodes[name].kill()
        self._tell_peers()
        left = [n for n in self.decodes if self.nodes[n].alive]
        for ask in self.asks.values():
            if ask.decode_at == name and not ask.is_over:
                if left:
                    ask.decode_at = left[0]
                    self._send(ask)
                else:
                    ask.error = Failed(ask.request_id, 503, "no decode engine is left")
        if revive_s is not None:
            self.clock.call_in(revive_s, lambda: self.revive(name))

    def revive(self, name: str) -> None:
        self._lives[name] += 1
        self.network.revive(name)
        self.nodes[name] = Node(self, name, self._lives[name])
        self._tell_peers()

    def _tell_peers(self) -> None:
        if self.setting.tells_peers:
            alive = [name for name in self.names if self.nodes[name].alive]
            peers = Peers([Peer(name, "", "", f"link:{name}") for name in alive])
            for name in alive:
                self.network.wire(FRONT_END, name).send(peers)

    def _arrived(self, party: str, peer: str) -> None:
        if party != FRONT_END:
            self.nodes[party].wake_in(0.0)
            return
        for message in self.network.wire(FRONT_END, peer).receive():
            if isinstance(message, Tokens):
                for delta in message.deltas:
                    ask = self.asks[delta.request_id]
                    if ask.is_over or ask.decode_at != peer:
                        ask.confirmed |= ask.cancelled and ask.decode_at == peer and delta.finish_reason is not None
                        continue
                    ask.tokens += delta.token_ids
                    if delta.logprobs is not None:
                        assert len(delta.logprobs) == len(delta.token_ids)
                    ask.finish_reason = delta.finish_reason
            elif isinstance(message, Failed):
                ask = self.asks[message.request_id]
                if not ask.is_over and ask.decode_at == peer:
                    ask.error = message

    # ---- what must hold ----

    def run(self, until_s: float = 60.0) -> None:
        """Until every request is over and everything has calmed down."""
        while not all(ask.is_over for ask in self.asks.values()):
            assert self.clock.now() < until_s, [a for a in self.asks.values() if not a.is_over]
            self.clock.run_until(self.clock.now() + 0.1)
        self.clock.run_until(self.clock.now() + 8 * LEASE_S)

    def check(self) -> None:
        """Everybody got what it gets alone, and nobody holds anything any more."""
        for ask in [*self.asks.values(), *self.past]:
            request = Request(
                ask.request_id,
                list(ask.prompt),
                len(ask.prompt),
                SamplingParams(max_tokens=ask.max_tokens),
                ask.seed,
                len(ask.prompt) + ask.max_tokens,
                EOS_IDS,
            )
            expected = self.model.solo_tokens(request)
            assert ask.tokens == expected[: len(ask.tokens)], ask
            if ask.finish_reason is not None:
                assert ask.tokens == expected, ask
        for node in self.nodes.values():
            if node.alive:
                check_idle(node.scheduler)
                assert not node.scheduler.traffic.flights
                assert not node.member.prefill.live
                assert not node.member.decode._live
