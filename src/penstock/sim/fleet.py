"""Many engines and a router on virtual time: real `Engine`, `Scheduler`, block pools, index and policy.

Pretended are only the ranks (`SimExecutor`), the clock, the delays between engines and router, and the bytes of moves.
Engines compute prompts; answers are one token long, as on prefill engines.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from penstock.config.model import KVGroup, KVLayout
from penstock.core.cost import FittedCost
from penstock.core.doors import RoutePolicy
from penstock.core.kv_events import KVEvents, KVEventSource
from penstock.core.kv_index import KVIndex
from penstock.core.policy import FcfsPolicy
from penstock.core.prefix import chain_root, extend_chain
from penstock.core.request import SamplingParams
from penstock.core.routing import Choice, EngineViews, Replicate, RouteRequest
from penstock.core.scheduler import Scheduler
from penstock.core.steps import SchedulerLimits
from penstock.engine.engine import Engine, EngineLimits
from penstock.engine.messages import AddRequest, Failed, FromEngine, Tokens
from penstock.sim.clock import VirtualClock
from penstock.sim.executor import SimExecutor
from penstock.sim.pool import SimPool
from penstock.sim.trace import TRACE_BLOCK, TraceRequest

POOL = "pool"
ONE_TOKEN = SamplingParams(max_tokens=1)


@dataclass(frozen=True, slots=True)
class FleetSettings:
    """What is simulated. Sizes in blocks of the trace; lengths in its tokens unless divided by `tokens_per_token`."""

    cost: FittedCost  # the truth
    num_engines: int = 8
    num_blocks: int = 2000  # of each device
    pool_blocks: int = 0  # of the shared pool; 0: there is none
    step_tokens: int = 8192
    max_num_seqs: int = 16
    tokens_per_token: int = 32
    block_bytes: int = 512 * 131_072
    event_delay_s: float = 0.1  # from a change in a cache to the router's index
    answer_delay_s: float = 0.001  # from a first token to the router

    @property
    def block_size(self) -> int:
        """Of the engines, in their own tokens."""
        return TRACE_BLOCK // self.tokens_per_token


@dataclass(slots=True)
class Outcome:
    """What became of a request."""

    request: TraceRequest
    choice: Choice
    first_token_s: float = float("nan")
    cached_tokens: int = 0  # in tokens of the trace

    @property
    def ttft_s(self) -> float:
        return self.first_token_s - self.request.arrival_s


class SimEngine:
    """One engine and what drives it. `on_message(engine, message)` gets what it says."""

    def __init__(
        self,
        name: str,
        settings: FleetSettings,
        clock: VirtualClock,
        on_message: Callable[[SimEngine, FromEngine], None],
        on_events: Callable[[KVEvents], None],
    ) -> None:
        scale, size = settings.tokens_per_token, settings.block_size
        layout = sim_layout(size)
        limits = SchedulerLimits(settings.max_num_seqs, settings.step_tokens // scale)
        self.name = name
        self.clock = clock
        self.executor = SimExecutor(settings.cost, clock, tokens_per_token=scale, vocab_size=1 << 30)
        self.scheduler = Scheduler(layout, (settings.num_blocks + 1,), limits, FcfsPolicy())
        self.engine = Engine(self.scheduler, self.executor, EngineLimits(1 << 30, 1 << 30, frozenset()))
        self.pool = self.scheduler.kv.events_pool
        self.events = KVEventSource(name, 0, lambda: self.pool.index.keys())
        self.scheduler.kv.tell(self.events)
        self.link_free_s = 0.0  # its loads come one after another
        self._on_message = on_message
        self._on_events = on_events
        self._telling = False

    def add(self, message: AddRequest) -> None:
        """A request comes in."""
        for answer in self.engine.handle(message, self.clock.now()):
            self._on_message(self, answer)
        self.turn()

    def turn(self) -> None:
        """Start a step if none runs."""
        now = self.clock.now()
        if not self.scheduler.num_submitted:
            for answer in self.engine.launch(now):
                self._on_message(self, answer)
            if self.executor.ready_s is not None:
                self.clock.call_at(self.executor.ready_s, self._complete)
        self.tell()

    def _complete(self) -> None:
        for answer in self.engine.complete(self.executor.collect(), self.clock.now()):
            self._on_message(self, answer)
        self.turn()

    def tell(self) -> None:
        """Give out a batch of events now, or when it is due."""
        due_s = self.events.due_s
        if due_s is None or self._telling:
            return
        self._telling = True
        self.clock.call_at(due_s, self._tell)

    def _tell(self) -> None:
        self._telling = False
        events = self.events.take(self.clock.now())
        if events is not None:
            self._on_events(events)
        self.tell()

    def num_on_device(self, hashes: Sequence[bytes]) -> int:
        """How many of these, from the first on, are in the device's cache."""
        return next((n for n, hash_ in enumerate(hashes) if hash_ not in self.pool.index), len(hashes))

    def put(self, hashes: Sequence[bytes], first: int) -> None:
        """Blocks `first` and later of a chain have been carried here: they are cached, as if computed just now.

        What is here of the chain is held meanwhile, as for a request: else blocks that come drive out their parents.
        """
        pool, now = self.pool, self.clock.now()
        held: list[int | None] = []
        for hash_ in hashes:
            block = pool.hit(hash_)
            if block is not None:
                pool.hold(block)
            held.append(None if block is None else block.id)
        for n in range(first, len(hashes)):
            if held[n] is None and pool.num_available:
                held[n] = block_id = pool.allocate(now)
                pool.publish(block_id, hashes[n], hashes[n - 1] if n else None)
        for block_id in filter(None, reversed(held)):
            pool.release(block_id, -1)
        self.tell()


def sim_layout(block_size: int) -> KVLayout:
    """One group of full attention; its bytes are nobody's."""
    return KVLayout((KVGroup(0, "full", (0,), None, block_size, 1, 8, "float32"),))


def trace_hashes(request: TraceRequest, block_size: int) -> list[bytes]:
    """The hashes of its prompt's blocks that a cache may serve: all that leave one token to compute."""
    hashes: list[bytes] = []
    extend_chain(hashes, chain_root("", sim_layout(block_size)), request.token_ids[:-1], block_size)
    return hashes


class SimFleet:
    """Replays a trace through a policy. `run` gives one outcome per request."""

    def __init__(self, settings: FleetSettings, policy: RoutePolicy) -> None:
        self.settings = settings
        self.policy = policy
        self.clock = VirtualClock()
        self.index = KVIndex(4 * settings.num_engines * settings.num_blocks + settings.pool_blocks)
        self.views = EngineViews(self.index, TRACE_BLOCK, settings.block_bytes)
        self.outcomes: list[Outcome] = []
        self.num_copies = 0
        self.num_loaded_blocks = 0
        self.engines: dict[str, SimEngine] = {}
        for n in range(settings.num_engines):
            name = f"e{n}"
            self.engines[name] = SimEngine(name, settings, self.clock, self._answered, self._changed)
            self.views.add(name, num_blocks=settings.num_blocks, slots=settings.max_num_seqs)
        self.pool: SimPool | None = None
        if settings.pool_blocks:
            self.pool = SimPool(POOL, settings.pool_blocks)
            self.views.add_pool(POOL)
        self._open: dict[str, Outcome] = {}

    def run(self, requests: Sequence[TraceRequest], hashes: Sequence[Sequence[bytes]]) -> list[Outcome]:
        """Replay. `hashes[i]`: `trace_hashes` of `requests[i]`."""
        for request, chain in zip(requests, hashes, strict=True):
            self.clock.call_at(request.arrival_s, lambda r=request, c=chain: self._arrive(r, c))  # type: ignore[misc]
        self.clock.run()
        assert not self._open
        return self.outcomes

    # ---- the router ----

    def _arrive(self, request: TraceRequest, hashes: Sequence[bytes]) -> None:
        now = self.clock.now()
        self.index.tick(now)
        asked = RouteRequest(request.id, request.prompt_tokens, hashes, request.output_tokens)
        choice = self.policy.pick(asked, self.views, self.index, now)
        if choice is None:
            raise ValueError(f"no engine can take a prompt of {request.prompt_tokens} tokens")
        self.views.sent(request.id, choice, now)
        self.index.expect(choice.engine, hashes, now)
        self._open[request.id] = outcome = Outcome(request, choice)
        self.outcomes.append(outcome)
        engine, ready_s = self.engines[choice.engine], now
        for copy in choice.copies:
            done_s = self._copy(copy)
            if copy.dst == choice.engine:
                ready_s = max(ready_s, done_s)
        if self.pool is not None:
            ready_s = max(ready_s, self._load(engine, hashes))
        message = AddRequest(request.id, list(request.token_ids), ONE_TOKEN, 0, now)
        self.clock.call_at(ready_s, lambda: engine.add(message))

    def _answered(self, engine: SimEngine, message: FromEngine) -> None:
        if isinstance(message, Failed):
            raise ValueError(f"{engine.name} refused {message.request_id}: {message.message}")
        if not isinstance(message, Tokens):
            return
        now = self.clock.now()
        for delta in message.deltas:
            outcome = self._open.pop(delta.request_id)
            outcome.first_token_s = now
            outcome.cached_tokens = delta.num_cached * self.settings.tokens_per_token
            self.clock.call_in(self.settings.answer_delay_s, lambda o=outcome: self._done(o))  # type: ignore[misc]

    def _done(self, outcome: Outcome) -> None:
        self.views.done(outcome.request.id, self.clock.now(), outcome.cached_tokens)

    def _changed(self, events: KVEvents) -> None:
        """An engine's cache has changed: the pool gets a copy of what is new, the index hears of it later."""
        self._hear(events)
        if self.pool is not None:
            for change in events.changes:
                if change.stored:
                    self.pool.store(change.hashes)
            told = self.pool.events.take(self.clock.now())
            if told is not None:
                self._hear(told)

    def _hear(self, events: KVEvents) -> None:
        def apply() -> None:
            asked = self.index.apply(events, self.clock.now())
            assert asked is None  # nothing is lost here, so nothing is missing

        self.clock.call_in(self.settings.event_delay_s, apply)

    # ---- moves ----

    def _load(self, engine: SimEngine, hashes: Sequence[bytes]) -> float:
        """Fetch from the pool what continues the device's hit, if that is sooner than computing. When it is there."""
        assert self.pool is not None
        first = engine.num_on_device(hashes)
        end = first + self.pool.run(hashes[first:])
        return self._carry(engine, hashes[:end], first, "remote")

    def _copy(self, copy: Replicate) -> float:
        """Fetch from a peer what it still has."""
        engine, src = self.engines[copy.dst], self.engines[copy.src]
        hashes = copy.hashes[: src.num_on_device(copy.hashes)]
        self.num_copies += 1
        return self._carry(engine, hashes, engine.num_on_device(hashes), "peer")

    def _carry(self, engine: SimEngine, hashes: Sequence[bytes], first: int, tier: str) -> float:
        cost, now = self.settings.cost, self.clock.now()
        num_blocks = len(hashes) - first
        if num_blocks <= 0:
            return now
        seconds = cost.move_seconds(num_blocks * self.settings.block_bytes, tier)
        if seconds > cost.prefill_seconds(num_blocks * TRACE_BLOCK, first * TRACE_BLOCK):
            return now
        engine.link_free_s = done_s = max(engine.link_free_s, now) + seconds
        self.num_loaded_blocks += num_blocks
        self.clock.call_at(done_s, lambda: engine.put(hashes, first))
        return done_s
