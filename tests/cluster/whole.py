"""The whole cluster in one process on virtual time: clients, front end, router, engines, pool; faults from one seed.

Real are FrontEnd, Router, RoleKeeper, PolicyPlacement, Member, Engine, Scheduler, TierSource and KVPool; pretended are
ranks, links, stores, wires and processes, and drawn from the seed is when an engine is to change its role. Tokens are
hashes of the KV that was read, so whatever is wrong shows in them.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from io import BytesIO
from types import SimpleNamespace
from typing import Any

from tests.cluster.node import POOL, ROUTER, Node, check_node, check_pool
from tests.cluster.world import BLOCK_SIZE, LEASE_S, VOCAB_SIZE
from tests.fakes.executor import EOS_IDS, HashModel, fake_layout, logprob_of
from tests.fakes.host_tier import PretendedPool, Stores, TierFaults

from penstock.cluster.beats import Silences
from penstock.cluster.placement import PolicyPlacement
from penstock.cluster.restarts import Restarts
from penstock.cluster.roles import RoleKeeper
from penstock.cluster.router import Router
from penstock.core.request import Request, SamplingParams, child_seed
from penstock.core.route_modes import ModeLimits
from penstock.core.scaling import DECODE, PREFILL, Need, RoleScaler, ScalingLimits, Signals, Window
from penstock.core.tiering import ClientSettings, ToEngine
from penstock.engine.client import DRAINING, FrontEnd, Output, RequestError
from penstock.engine.messages import (
    CacheEvents,
    CacheSnapshot,
    Fatal,
    Report,
    ResetPrefixCache,
    WantSnapshot,
)
from penstock.sim.clock import VirtualClock, stream
from penstock.sim.mover import LinkFaults, PretendedLinks
from penstock.sim.wire import LineFaults, PretendedNetwork

FLIP_S = 0.2
POLL_S = 0.1  # the front end looks after processes and its router so often
CLOSED = "the connection was closed"


@dataclass(frozen=True)
class Setting:
    """What a cluster is made of. `events_lost`: of what engines tell of caches, and of what is asked back."""

    roles: dict[str, str] = field(default_factory=lambda: {"p0": "prefill", "p1": "prefill", "d0": "decode"})
    windows: tuple[int | None, ...] = (None,)
    num_blocks: int = 60
    max_num_seqs: int = 6
    max_num_batched_tokens: int = 16
    depth: int = 1
    is_inline: bool = False  # at depth 1: a loop hears nothing while a step runs
    min_tokens: int = 6
    max_restarts: int = 5
    hang_s: float = 3.0
    stuck_s: float = 6.0
    has_tiers: bool = True
    client_tiers: ClientSettings = field(
        default_factory=lambda: ClientSettings(min_tokens=8, latency_s=1e-6, byte_s=1e-9)
    )
    tiers: TierFaults = field(default_factory=TierFaults)
    messages: LineFaults = field(default_factory=lambda: LineFaults(delay_s=0.001))
    links: LinkFaults = field(default_factory=LinkFaults)
    events_lost: float = 0.0
    flips: float = 0.0  # of a window of FLIP_S: that a role is to give an engine to the other
    drain_s: float = 0.5
    policies: tuple[str, str] = ("least_time", "request_count")


class DrawnScaler(RoleScaler):
    """Who changes its role is no matter of load."""

    def __init__(self, cluster: Cluster) -> None:
        super().__init__()
        self._cluster = cluster
        self._random = stream(cluster.seed, "flips", cluster.life)

    def observe(self, window: Window, now: float) -> Signals:
        donor = self._random.choice([PREFILL, DECODE])
        draws = self._random.random() < self._cluster.setting.flips and not self._cluster.is_healing
        flip = (donor, DECODE if donor == PREFILL else PREFILL) if draws else None
        return Signals(Need(0.0, 0.0, 0.0), flip, {}, "by lot")


@dataclass
class Ask:
    """A request and what its client has seen of it."""

    request_id: str
    prompt: list[int]
    params: SamplingParams
    seed: int
    tokens: list[list[int]]  # per sample
    reasons: list[str | None]
    prompt_logprobs: Any = None
    error: tuple[int, str] | None = None
    cancelled: bool = False

    @property
    def is_over(self) -> bool:
        return self.cancelled or self.error is not None or None not in self.reasons


class Cluster:
    """The machine, its clients, and what befalls them. `lives`: of each engine, within this life of the machine."""

    def __init__(self, setting: Setting, seed: int, recordings: dict[str, BytesIO] | None = None) -> None:
        self.setting, self.seed, self.recordings = setting, seed, recordings
        self.clock = VirtualClock()
        self.layout = fake_layout(setting.windows, BLOCK_SIZE)
        self.model = HashModel(self.layout)
        self.links = PretendedLinks(self.clock, seed, setting.links)
        self.network = PretendedNetwork(self.clock, seed, setting.messages, self._arrived)
        local, pipe = LineFaults(delay_s=0.001), LineFaults(delay_s=0.0002)
        for name in setting.roles:
            for party, faults in ((ROUTER, local), (POOL, pipe)):
                self.network.set_faults(faults, party, name)
                self.network.set_faults(faults, name, party)
        self.asks: list[Ask] = []
        self.seen: Counter[str] = Counter()  # messages and states, by name
        self.happened: Counter[str] = Counter()  # faults
        self.stores = Stores()
        self.fate: Callable[[Any], Sequence[float]] = lambda message: (0.0,)  # when copies of a peer's message leave
        self.watchers: list[Any] = []  # called with (source, destination, message) as it is sent
        self.life = -1
        self.is_healing = False
        self._random = stream(seed, "router")
        self.begin()

    def begin(self) -> None:
        """The machine's processes start."""
        self.life += 1
        self.is_up = True
        setting, roles = self.setting, self.setting.roles
        limits = ModeLimits(max_output_on_p=0, max_total_on_p=0, max_new_on_d=setting.min_tokens)
        self.placement = PolicyPlacement(roles, *setting.policies, limits, self.seed)
        keeper = RoleKeeper(self.placement.cost, ScalingLimits(window_s=FLIP_S), drain_s=setting.drain_s)
        keeper._scaler = DrawnScaler(self)
        self.router = Router(roles, self.placement, keeper)
        self.restarts = Restarts(setting.max_restarts)
        self.silences = Silences(setting.hang_s)
        self.heard: set[str] = set()  # who has beaten since the front end looked
        tokenizer: Any = SimpleNamespace(eos_ids=tuple(EOS_IDS))
        self.front = FrontEnd(self._submit, tokenizer, VOCAB_SIZE)
        self.open: dict[str, Ask] = {}  # by request id, of this front end
        self.pool_life = 0
        self.network.revive(ROUTER)
        self.network.revive(POOL)
        self._open_pool()
        self.lives = dict.fromkeys(roles, 0)
        self.known_lives: dict[str, int] = {}  # of the processes that the front end holds a wire to
        self.nodes: dict[str, Node] = {}
        for name in roles:
            self._start(name)
        self._poll(self.life)

    def _open_pool(self) -> None:
        args = (self.clock, self.seed, self.layout, self.setting.tiers, self.stores, 100 * self.life + self.pool_life)
        self.pool = PretendedPool(*args, self._from_pool)

    def _from_pool(self, source: str, answer: ToEngine) -> None:
        name = source.split(".")[0]
        self.network.wire(POOL, name).send((source, answer))
        self.observe(POOL, name, answer)

    def _start(self, name: str) -> None:
        self.lives[name] += 1
        self.known_lives[name] = self.lives[name]
        self.network.revive(name)
        self.nodes[name] = Node(self, name, self.lives[name])

    def observe(self, source: str, to: str, message: Any) -> None:
        """A message was sent, or lost at once."""
        self.seen[type(message).__name__] += 1
        for watcher in list(self.watchers):
            watcher(source, to, message)

    # ---- the front end's process ----

    def _submit(self, message: Any) -> None:
        self._deliver(*self.router.submit(message, self.clock.now()))

    def _deliver(self, told: Sequence[Any], post: Sequence[tuple[str, Any]]) -> None:
        for name, message in post:
            self.observe(ROUTER, name, message)
            if isinstance(message, WantSnapshot) and self._loses():
                continue
            if name in self.known_lives:
                self.network.wire(ROUTER, name).send((self.known_lives[name], message))
        for message in told:
            fatal = isinstance(message, Fatal)
            for output in self.front.handle(message, self.clock.now()):
                self._output(output)
            if fatal:
                self.kill_router(0.2)  # the server leaves, with all engines; a supervisor starts it again
                return

    def _loses(self) -> bool:
        return not self.is_healing and self._random.random() < self.setting.events_lost

    def _arrived(self, party: str, peer: str) -> None:
        if party == ROUTER:
            for life, message in self.network.wire(ROUTER, peer).receive():
                lossy = isinstance(message, CacheEvents | CacheSnapshot | Report)
                if life == self.known_lives.get(peer) and not (lossy and self._loses()):
                    self._deliver(*self.router.receive(peer, message, self.clock.now()))
        elif party == POOL:
            if self.clock.now() < self.pool.stopped_until_s:
                self.clock.call_at(self.pool.stopped_until_s, lambda: self._arrived(party, peer))
                return
            for source, message in self.network.wire(POOL, peer).receive():
                self.observe(peer, POOL, message)
                self.pool.handle(source, message)
        else:
            self.nodes[party].wake_in(0.0)

    def _poll(self, life: int) -> None:
        """Looks after the router's promises and dead processes."""
        if life != self.life:
            return
        now = self.clock.now()
        self._deliver([], self.router.tick(now))
        serving = [name for name in self.router.serving if name in self.known_lives]
        for name in self.silences.look(serving, self.heard, now):
            self.happened["hung"] += 1
            self.kill(name)
        self.heard.clear()
        for name, node in list(self.nodes.items()):
            if not node.alive and self.known_lives.get(name) == node.life:
                del self.known_lives[name]
                may_return = self.router.is_ready and self.front.state != DRAINING
                wait_s = self.restarts.wait_s(name, now) if may_return else None
                if wait_s is None:
                    self._deliver(*self.router.lost(name, "it was killed", now))
                    if life != self.life:
                        return
                    continue
                self.clock.call_in(wait_s, lambda name=name: life == self.life and self._start(name))  # type: ignore[misc]
                self._deliver(*self.router.restarting(name, now))
        self.clock.call_in(POLL_S, lambda: self._poll(life))

    # ---- clients ----

    def ask(self, prompt: Sequence[int], max_tokens: int, deadline_s: float | None = None, **more: Any) -> Ask:
        """A client comes. Ids are used again as soon as they are free."""
        number, n = len(self.asks), more.get("n", 1)
        request_id = next((f"r{i}" for i in range(number + 1) if self.front.is_free(f"r{i}", 1 + (n > 1))), "")
        params = SamplingParams(max_tokens=max_tokens, logprobs=1, detokenize=False, seed=1000 + number, **more)
        ask = Ask(request_id, list(prompt), params, 1000 + number, [[] for _ in range(n)], [None] * n)
        self.asks.append(ask)
        self.open[request_id] = ask
        now = self.clock.now()
        if not self.is_up:
            ask.error = 0, CLOSED
            return ask
        try:
            self.front.submit(
                request_id, prompt, params, now, deadline_s=None if deadline_s is None else now + deadline_s
            )
        except RequestError as error:
            ask.error = error.status, str(error)
        return ask

    def cancel(self, ask: Ask) -> None:
        if not ask.is_over:
            ask.cancelled = True
            self.front.cancel(ask.request_id, self.clock.now())

    def _output(self, output: Output) -> None:
        ask = self.open[output.request_id]
        assert not ask.is_over, f"{ask} is over, and yet: {output}"
        if output.error is not None:
            ask.error = output.error.status, str(output.error)
            return
        assert ask.reasons[output.index] is None, f"{ask} has ended, and yet: {output}"
        begin = len(ask.tokens[output.index])
        ask.tokens[output.index] += output.token_ids
        ask.reasons[output.index] = output.finish_reason
        if output.index == 0 and output.prompt_logprobs is not None:
            assert ask.prompt_logprobs is None and not begin
            ask.prompt_logprobs = output.prompt_logprobs
        if output.token_ids:
            run = self.model.run(tuple(ask.prompt), child_seed(ask.seed, output.index))
            at = len(ask.prompt) + begin - 1
            told = [logprob_of(t, run.context(at + i)) for i, t in enumerate(output.token_ids)]
            assert output.logprobs == told, ask

    # ---- what can happen ----

    def kill(self, name: str) -> None:
        node = self.nodes[name]
        if node.alive:
            node.kill()
            self.clock.call_in(self._random.choice([0.0, 0.001, 0.1]), lambda: self._pool_hears(node.source))

    def _pool_hears(self, source: str) -> None:
        """That an engine's connection broke."""
        if self.clock.now() < self.pool.stopped_until_s:
            self.clock.call_at(self.pool.stopped_until_s, lambda: self._pool_hears(source))
        else:
            self.pool.lost(source)

    def kill_pool(self, revive_s: float) -> None:
        if not self.pool.alive:
            return
        self.pool.close()
        self.network.kill(POOL)
        life = self.life

        def revive() -> None:
            if life == self.life:
                self.pool_life += 1
                self.network.revive(POOL)
                self._open_pool()

        self.clock.call_in(revive_s, revive)

    def kill_router(self, revive_s: float) -> None:
        """The front end's process goes: its clients see their connections close, engines and pool leave with it."""
        if not self.is_up:
            return
        for ask in self.asks:
            if not ask.is_over:
                ask.error = 0, CLOSED
        for name in self.nodes:
            self.kill(name)
        self._count_flips()
        self.pool.close()
        self.network.kill(POOL)
        self.network.kill(ROUTER)
        self.life, self.is_up = self.life + 1, False
        self.clock.call_in(revive_s, self.begin)

    def _count_flips(self) -> None:
        assert self.router.keeper is not None
        self.happened["flipped"] += self.router.keeper.num_changes

    # ---- what must hold ----

    def run(self, until_s: float = 60.0) -> None:
        """Until every request is over and everything has calmed down."""
        while not all(ask.is_over for ask in self.asks) or any(node.hangs for node in self.nodes.values()):
            assert self.clock.now() < until_s, [ask for ask in self.asks if not ask.is_over]
            self.clock.run_until(self.clock.now() + 0.1)
        self.is_healing = True
        self.clock.run_until(self.clock.now() + 6 * LEASE_S)
        self._count_flips()
        self._submit(ResetPrefixCache())  # every engine tells something, so that every gap is found
        self.clock.run_until(self.clock.now() + 2.5)

    def check(self) -> None:
        """Everybody got what it gets alone, and nobody holds anything any more."""
        for ask in self.asks:
            self._check_answer(ask)
        for node in self.nodes.values():
            if node.alive:
                check_node(node)
        assert not self.router._live and not self.placement._sent
        assert not self.front.requests and not self.front._samples and not self.front._ending
        for side in filter(None, (self.placement._prompts, self.placement._answers)):
            assert not side.views._sent and not side.views._reserved
            for name, row in side.index.rows.items():
                node = self.nodes[name]
                assert side.views.num_requests[row] == side.views.pending_tokens[row] == 0, name
                if node.alive and self.router.engines[name].ready is not None:
                    state = side.index._engines[name]
                    assert state.asked_s is None, f"a snapshot of {name} never came"
                    assert (state.seq, state.checksum) == (node.member.events.seq, node.member.events._checksum())
        if self.pool.alive:
            check_pool(self.pool)

    def _check_answer(self, ask: Ask) -> None:
        for index, tokens in enumerate(ask.tokens):
            request = Request(
                ask.request_id,
                list(ask.prompt),
                len(ask.prompt),
                replace(ask.params, n=1),
                child_seed(ask.seed, index),
                len(ask.prompt) + (ask.params.max_tokens or 0),
                EOS_IDS,
            )
            expected = self.model.solo_tokens(request)
            assert tokens == expected[: len(tokens)], ask
            assert ask.reasons[index] in (None, "stop", "length", "abort"), ask
            assert ask.reasons[index] in (None, "abort") or tokens == expected, ask
            if index == 0 and ask.params.prompt_logprobs is not None and tokens:
                assert ask.prompt_logprobs == [None, *self.model.solo_prompt_logprobs(request)], ask
