"""A router's mind where engines are servers elsewhere: who is there, what they hold, where a prompt goes and why.

The same placement as inside one server. A state machine: no HTTP, socket or clock; `now` comes in. What it believes of
an engine comes from the engine's events, its numbers, and the time that its first bytes took.
"""

from __future__ import annotations

from collections.abc import Sequence, Set
from dataclasses import dataclass

from penstock.cluster.decisions import Decisions
from penstock.cluster.placement import PolicyPlacement
from penstock.cluster.remote_cache import RemoteCache, SentPrompts
from penstock.cluster.router import DECODE, Placed
from penstock.core.kv_events import KVEvents
from penstock.core.prefix import chain_start, extend_chain
from penstock.core.request import SamplingParams
from penstock.core.route_modes import ModeLimits
from penstock.engine.messages import AddRequest, KVReport, Ready, Report

CHAIN = "route"  # what the router's block hashes begin with
BLOCK_SIZE = 32  # tokens, where no engine says
MAX_BLOCKS = 100_000  # of an engine that does not say


@dataclass(frozen=True, slots=True)
class Facts:
    """What an engine says of itself when it is met. 0: it does not say."""

    block_size: int = 0
    num_blocks: int = 0
    slots: int = 256
    max_model_len: int = 0
    models: tuple[str, ...] = ()
    block_bytes: int = 0
    reads: str = ""  # where its KV pool reads what others hold: host:port
    serves: str = ""  # where it serves others


@dataclass(slots=True)
class _Call:
    engine: str
    num_tokens: int
    placed_s: float
    hit_tokens: int
    was_alone: bool  # its prefill waited for nobody whom we sent, nor for a load
    has_begun: bool = False
    num_tries: int = 1


class Dispatcher:
    """`roles`: prefill, decode or both, by engine. `block_size` None: that of the first engine that is met.

    `publishes`: whose events will be heard (and with what replay); of the others is believed, for `lasts_s`, that they
    hold what they were sent.
    """

    def __init__(
        self,
        roles: dict[str, str],
        *,
        prefill: str = "least_time",
        decode: str = "remaining_slots",
        limits: ModeLimits | None = None,
        publishes: Set[str] = frozenset(),
        block_size: int | None = None,
        lasts_s: float = 120.0,
        seed: int = 0,
    ) -> None:
        self.roles = dict(roles)
        self.placement = PolicyPlacement(roles, prefill, decode, limits, seed)
        self.decisions = Decisions()
        self.facts: dict[str, Facts] = {}  # of those that are there
        self.caches: dict[str, RemoteCache] = {}
        self.block_size = block_size
        self.num_retries = 0
        self._publishes, self._lasts_s = publishes, lasts_s
        self._guesses: dict[str, SentPrompts] = {}
        self._rates: dict[str, tuple[float, float]] = {}  # of those that read what others hold
        self._calls: dict[str, _Call] = {}

    # ---- engines ----

    def joined(self, name: str, facts: Facts, now: float, *, can_replay: bool = False) -> None:
        """An engine answers, for the first time or again."""
        self.block_size = self.block_size or facts.block_size or BLOCK_SIZE
        self.facts[name] = facts
        num_blocks = facts.num_blocks * (facts.block_size or self.block_size) // self.block_size or MAX_BLOCKS
        ready = Ready(
            model_id="", max_model_len=facts.max_model_len, block_size=self.block_size, num_blocks=num_blocks,
            max_num_seqs=facts.slots, device="", memory=[], timeline=[], cache_model=CHAIN,
            block_bytes=facts.block_bytes,
        )  # fmt: skip
        self.placement.joined(name, ready)
        self.placement.linked(name, facts.reads, facts.serves)
        known: RemoteCache | SentPrompts | None
        if name in self._publishes and facts.block_size in (0, self.block_size):
            root = chain_start(CHAIN, "", self.block_size)
            known = self.caches.setdefault(name, RemoteCache(name, root, self.block_size, can_replay=can_replay))
        else:
            known = self._guesses.setdefault(name, SentPrompts(name, num_blocks, self._lasts_s))
        self.placement.changed(known.everything(), now)

    def left(self, name: str) -> None:
        """It does not answer."""
        self._rates.pop(name, None)
        if self.facts.pop(name, None) is not None:
            self.placement.left(name)

    def changed(self, events: Sequence[KVEvents], now: float) -> None:
        """What a RemoteCache gave."""
        for each in events:
            if each.engine in self.facts:
                self.placement.changed(each, now)

    def measured(self, name: str, num_running: int, num_waiting: int, usage: float, now: float) -> None:
        """An engine's own numbers: they count what other routers have sent it. `usage` of its blocks, 0 to 1."""
        facts = self.facts.get(name)
        if facts is not None:
            num_blocks = facts.num_blocks or MAX_BLOCKS
            free = int((1.0 - usage) * num_blocks)
            self.placement.told(name, _report(now, num_running, num_waiting, num_blocks, free), now)

    def reads_others(self, name: str, latency_s: float | None, byte_s: float = 0.0) -> None:
        """How fast its pool gets what others hold, as it has measured; None: not at all, for now.

        One rate is predicted with for all: the slowest.
        """
        facts = self.facts.get(name)
        if facts is None:
            return
        self.placement.linked(name, facts.reads if latency_s is not None else "", facts.serves)
        self._rates.pop(name, None)
        if latency_s is not None:
            self._rates[name] = latency_s, byte_s
            self.placement.carries(*map(max, zip(*self._rates.values(), strict=True)))

    def tick(self, now: float) -> None:
        """To be called about once a second."""
        self.placement.tick(now)
        for guess in self._guesses.values():
            gone = guess.tick(now)
            if gone is not None:
                self.changed([gone], now)

    def models(self) -> list[str]:
        """What the engines that are there serve."""
        return list(dict.fromkeys(model for facts in self.facts.values() for model in facts.models))

    def without(self, model: str | None) -> set[str]:
        """Engines that do not serve a model; None: any will do."""
        return set() if model is None else {name for name, facts in self.facts.items() if model not in facts.models}

    @property
    def can_serve(self) -> bool:
        return any(self.roles[name] == DECODE or DECODE not in self.roles.values() for name in self.facts)

    # ---- requests ----

    def place(
        self, request_id: str, token_ids: list[int], max_tokens: int | None, shunned: Set[str], now: float
    ) -> Placed | None:
        """Where a request goes, for the first time or again; None: nobody is left but the `shunned`."""
        call = self._calls.pop(request_id, None)
        if call is not None:
            self.placement.ended(request_id, 0, now)
            self.num_retries += 1
        params = SamplingParams(max_tokens=max_tokens)
        asked = AddRequest(request_id, token_ids or [0], params, 0, now)
        placed = self.placement.place_among(asked, shunned, now)
        if placed is None:
            if call is not None:
                self.decisions.ended(request_id, "error")
            return None
        num_tries = 1 if call is None else call.num_tries + 1
        first = placed.prefill_at[0] if placed.prefill_at else placed.engine
        alone = not placed.forecast.terms.get("load") and all(
            other.has_begun for other in self._calls.values() if other.engine in (first, placed.engine)
        )
        self._calls[request_id] = _Call(
            placed.engine, len(token_ids), now, placed.forecast.hit_tokens or 0, alone, num_tries=num_tries
        )
        self.decisions.placed(
            request_id, now, len(token_ids), placed.engine, placed.prefill_at, placed.forecast, now, num_tries
        )
        self._guess({*placed.prefill_at[:1], placed.engine}, token_ids, now)
        return placed

    def began(self, request_id: str, now: float) -> None:
        """The first byte of a streamed answer."""
        call = self._calls.get(request_id)
        if call is None or call.has_begun:
            return
        call.has_begun = True
        self.placement.first_token(request_id, call.hit_tokens, now)
        self.decisions.first_token(request_id, now)
        new = call.num_tokens - call.hit_tokens
        if call.was_alone and new > 0 and call.engine in self.facts:
            # As one step of its new tokens: what costs are fitted to.
            attended = new * call.hit_tokens + new * (new + 1) // 2
            steps = [(new, 1, attended, call.num_tokens, max(now - call.placed_s, 1e-6))]
            self.placement.learned(steps, now)

    def ended(self, request_id: str, num_output: int, outcome: str, now: float) -> None:
        """Its answer is complete, or will not be."""
        if self._calls.pop(request_id, None) is not None:
            self.placement.ended(request_id, num_output, now)
            self.decisions.ended(request_id, outcome)

    def is_live(self, request_id: str) -> bool:
        """Whether a request of that id is on its way."""
        return request_id in self._calls

    def _guess(self, engines: Set[str], token_ids: list[int], now: float) -> None:
        guesses = [self._guesses[name] for name in engines if name in self._guesses and name not in self.caches]
        if not guesses or self.block_size is None:
            return
        hashes: list[bytes] = []
        extend_chain(hashes, chain_start(CHAIN, "", self.block_size), token_ids, self.block_size)
        for guess in guesses:
            events = guess.sent(hashes, now)
            if events is not None:
                self.changed([events], now)


def _report(now: float, num_running: int, num_waiting: int, num_blocks: int, free: int) -> Report:
    return Report(
        now_s=now, num_running=num_running, num_waiting=num_waiting, waiting_by_reason={},
        kv=KVReport(0, num_blocks, num_blocks - free, 0, 0, 0, free),
        num_steps_total=0, step_seconds_total=0.0, prompt_tokens_total=0, prompt_tokens_cached_total=0,
        generation_tokens_total=0, num_preemptions_total=0, prefix_queries_total=0, prefix_hits_total=0,
        iteration_tokens=[], requests=[],
    )  # fmt: skip
