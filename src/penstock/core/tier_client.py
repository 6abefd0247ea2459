"""An engine's side of the tiers: asks its machine's pool at arrival, says what a request may load.

A state machine without clock or I/O. What to call, and when:

- `arrived` when a request has come, `offer` when it could start, `ended` when it is over;
- for an offer of blocks: a KVMove from `offer.place` into fresh device blocks, then `load_started`;
- `saving.published` for blocks that the prefix cache has taken in; then, for each of `saving.ready()`: `Save.places`
  and a KVMove, `saving.started`, or `saving.dropped` if none of its blocks is on the device any more;
- `moved` with the result of every such move, `tick` now and then;
- `messages()` go to the pool, its answers into `handle`.

Knows hashes, slots and seconds. Does not know device blocks, budgets or steps.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field

from penstock.config.model import KVLayout
from penstock.core.moves import MoveResult, Place
from penstock.core.tier_costs import LinearRate, PrefillRate, TierWorth, choose_end
from penstock.core.tier_saves import TierSaves
from penstock.core.tiering import (
    BAD_BLOCK,
    BEST_EFFORT,
    HOST,
    IN_HOST,
    NO_TIER,
    WAIT_COMPLETE,
    ClientSettings,
    Expired,
    Fetch,
    Fetched,
    Match,
    Matched,
    PoolStatus,
    Release,
    Reserved,
    TierEvent,
    TierRate,
    ToEngine,
    ToPool,
    block_key,
)


@dataclass(frozen=True, slots=True)
class Offer:
    """What a request can have from the tiers. Nothing, as things stand: then compute.

    `num_blocks` from the block asked for lie ready in `place` (host memory; per KV group as many entries, 0 where a
    window group needs none). `wait_until_s`: not known yet; ask again when an answer has come, at that time at the
    latest.
    """

    num_blocks: int = 0
    place: Place | None = None
    wait_until_s: float | None = None


NOTHING = Offer()


@dataclass(slots=True, eq=False)
class _Prompt:
    """A request whose beginning may come from the tiers."""

    hashes: Sequence[bytes]
    first_block: int  # earlier ones were on the device when it asked
    asked_s: float
    match_id: int
    fetch_id: int | None = None
    end: int | None = None  # of the blocks to load, from `first_block` on; None: not known yet
    tiers: list[str] = field(default_factory=list)  # where each block from `first_block` on was found
    place_of: dict[bytes, int] = field(default_factory=dict)  # key -> index into `slots`
    slots: Sequence[int] = ()
    is_final: bool = False
    fetched_s: float = 0.0  # when the fetch was sent
    valid_until_s: float = float("inf")
    asked_again: bool = False
    waits_since_s: float | None = None
    loading: int | None = None  # move id
    load_range: tuple[int, int] = (0, 0)


class TierClient:
    """`prefill` is shared with whoever observes the steps: it predicts what recomputing costs."""

    def __init__(self, layout: KVLayout, settings: ClientSettings, prefill: PrefillRate) -> None:
        self.layout = layout
        self.settings = settings
        self.prefill = prefill
        self.rate = LinearRate(settings.latency_s, settings.byte_s)  # host memory to device
        self.worth = TierWorth()
        self.saving = TierSaves(layout, settings, prefill, self.worth)
        self.num_loaded = 0  # blocks
        self.hits: Counter[str] = Counter()  # of these, by the tier that had them
        self.load_bytes, self.load_s, self.saved_s = 0, 0.0, 0.0  # of loads, and computing the same as predicted
        self.num_failed = 0  # loads
        self.status = PoolStatus(())
        self.block_size = layout.block_size
        self._full = [g.index for g in layout.groups if g.window is None]
        self._windows = [(g.index, g.window) for g in layout.groups if g.window is not None]
        loaded = [g for g in layout.groups if g.window is None] or layout.groups
        self._load_bytes = sum(g.block_bytes for g in loaded)  # of one block; windows add a constant
        self._prompts: dict[str, _Prompt] = {}
        self._by_id: dict[int, str] = {}  # match or fetch id -> request id
        self._loads: dict[int, tuple[str, _Prompt]] = {}  # move id
        self._outbox: list[ToPool] = []
        self._next_id = 0

    # ---- loading ----

    def arrived(self, request_id: str, hashes: Sequence[bytes], first_block: int, now: float) -> None:
        """A request came. `hashes`: of its blocks that may come from a cache; those before `first_block` did."""
        self.saving.asked_for(hashes)
        if not self.worth.is_on or (len(hashes) - first_block) * self.block_size < self.settings.min_tokens:
            return
        self.worth.used(len(hashes) - first_block)
        self._ask(request_id, hashes, first_block, now)

    def offer(self, request_id: str, first_block: int, now: float) -> Offer:
        """What can be loaded from `first_block` on, the request having all before it."""
        prompt = self._prompts.get(request_id)
        if prompt is None or prompt.loading is not None:
            return NOTHING
        if first_block < prompt.first_block or now >= prompt.valid_until_s:  # evicted since, or the lease has run down
            self._forget(request_id)
            if prompt.asked_again or first_block >= len(prompt.hashes):
                return NOTHING
            again = self._ask(request_id, prompt.hashes, first_block, now)
            again.asked_again = True
            return self._wait(again, now)
        if prompt.end is None:
            waiting = self._wait(prompt, now)
            if waiting is NOTHING:
                self._forget(request_id)
            return waiting
        if first_block < prompt.end:
            ready = self._ready(prompt, first_block, prompt.end)
            if ready < prompt.end and not prompt.is_final:
                waiting = self._wait(prompt, now)
                if waiting.wait_until_s is not None:
                    return waiting
            self._end_wait(prompt, now)
            if ready > first_block:
                return Offer(ready - first_block, self._place(prompt, first_block, ready))
        self._forget(request_id)
        return NOTHING

    def load_started(self, request_id: str, first_block: int, num_blocks: int, move_id: int) -> None:
        """The offer was taken."""
        prompt = self._prompts[request_id]
        prompt.loading = move_id
        prompt.load_range = (first_block, first_block + num_blocks)
        self._loads[move_id] = request_id, prompt

    def ended(self, request_id: str) -> None:
        """The request will load nothing more: finished, cancelled, preempted. A load under way keeps its slots."""
        prompt = self._prompts.get(request_id)
        if prompt is not None:
            if prompt.loading is None:
                self._forget(request_id)
            else:
                del self._prompts[request_id]

    # ---- results and messages ----

    def moved(self, result: MoveResult) -> None:
        """How a load or a save ended; results of other moves are ignored."""
        if result.id in self._loads:
            self._loaded(result)
        else:
            self.saving.moved(result)

    def handle(self, message: ToEngine, now: float) -> None:
        """An answer of the pool. One for a request that is over is dropped."""
        if isinstance(message, Reserved):
            self.saving.reserved(message)
            return
        if isinstance(message, PoolStatus):
            self.status = message
            return
        request_id = self._by_id.get(message.id)
        prompt = None if request_id is None else self._prompts.get(request_id)
        if isinstance(message, Matched):
            if prompt is not None and prompt.match_id == message.id:
                self._by_id.pop(message.id)
                self._fetch(request_id or "", prompt, message.tiers, message.rates, now)
        elif isinstance(message, Fetched):
            if prompt is not None and prompt.fetch_id == message.id:
                prompt.slots, prompt.is_final = message.slots, message.final
                prompt.valid_until_s = prompt.fetched_s + message.lease_s / 2
        elif isinstance(message, Expired):
            self.saving.expired(message.id)
            if prompt is not None and prompt.fetch_id == message.id:
                prompt.valid_until_s = float("-inf")

    def messages(self) -> list[ToPool]:
        """For the pool, new since the last call."""
        new, self._outbox = self._outbox, []
        return new + self.saving.messages()

    def tick(self, now: float) -> list[TierEvent]:
        """Does host memory pay? Off and on again, with the figures. And what the pool does not answer is given up."""
        self.saving.tick(now)
        verdict = self.worth.judge(now)
        events = []
        if verdict is not None and not verdict.pays:
            self.saving.stop()
            pause_s = (self.worth.off_until_s or now) - now
            text = (
                f"tier {HOST}: off, it saved {verdict.saved_s * 1e3:.0f} ms and took {verdict.spent_s * 1e3:.0f} ms"
                f" over {verdict.num_uses} blocks; tried again in {pause_s:g} s"
            )
            events.append(TierEvent(HOST, "unprofitable", text, now))
        if self.worth.probe(now):
            events.append(TierEvent(HOST, "on", f"tier {HOST}: tried again", now))
        return events

    def pool_lost(self) -> None:
        """The pool is gone, with all it held. Loads under way verify what they copy, so they may end."""
        self._prompts.clear()
        self._by_id.clear()
        self._outbox.clear()
        self.saving.pool_lost()

    @property
    def num_open(self) -> int:
        """Requests and reservations for which the pool may hold something."""
        return len(self._prompts) + len(self._loads) + self.saving.num_open

    # ---- inside: loading ----

    def _id(self) -> int:
        self._next_id += 2  # odd ones are the reservations'
        return self._next_id

    def _ask(self, request_id: str, hashes: Sequence[bytes], first_block: int, now: float) -> _Prompt:
        self._forget(request_id)
        prompt = self._prompts[request_id] = _Prompt(tuple(hashes), first_block, now, self._id())
        self._by_id[prompt.match_id] = request_id
        groups = range(len(self.layout.groups))
        keys = tuple(block_key(hash_, g) for hash_ in hashes[first_block:] for g in groups)
        self._outbox.append(Match(prompt.match_id, keys))
        return prompt

    def _forget(self, request_id: str) -> None:
        """Ask nothing more for it; the pool takes its slots back."""
        prompt = self._prompts.pop(request_id, None)
        if prompt is not None:
            self._by_id.pop(prompt.match_id, None)
            self._release(prompt)

    def _release(self, prompt: _Prompt, failed: bool = False) -> None:
        if prompt.fetch_id is not None:
            self._by_id.pop(prompt.fetch_id, None)
            self._outbox.append(Release(prompt.fetch_id, failed))
            prompt.fetch_id = None

    def _wait(self, prompt: _Prompt, now: float) -> Offer:
        settings = self.settings
        if settings.wait == BEST_EFFORT:
            return NOTHING
        num_tokens = (len(prompt.hashes) - prompt.first_block) * self.block_size
        patience_s = settings.wait_s + settings.wait_token_s * num_tokens
        until_s = prompt.asked_s + (settings.max_wait_s if settings.wait == WAIT_COMPLETE else patience_s)
        if now >= until_s:
            self._end_wait(prompt, now)
            return NOTHING
        if prompt.waits_since_s is None:
            prompt.waits_since_s = now
        return Offer(wait_until_s=until_s)

    def _end_wait(self, prompt: _Prompt, now: float) -> None:
        if prompt.waits_since_s is not None:
            self.worth.spent(now - prompt.waits_since_s)
            prompt.waits_since_s = None

    def _fetch(
        self, request_id: str, prompt: _Prompt, found: Sequence[int], rates: Sequence[TierRate], now: float
    ) -> None:
        """The pool has said what it has: choose, and have it brought into host memory."""
        num_groups, first = len(self.layout.groups), prompt.first_block
        tiers = [found[n : n + num_groups] for n in range(0, len(found), num_groups)]  # per block, per group
        prompt.end = self._end(first, tiers, rates)
        names = ("", HOST, *(rate.name for rate in rates))
        prompt.tiers = [names[max(found)] for found in tiers]
        keys: list[bytes] = []
        parents: list[bytes] = []
        costs_s: list[float] = []
        for n in range(first, prompt.end):
            for g in range(num_groups):
                if n >= self._first_wanted(g, first, prompt.end):
                    keys.append(block_key(prompt.hashes[n], g))
                    parents.append(self.saving.parent_key(prompt.hashes[n - 1] if n else None, g))
                    costs_s.append(self.saving.cost_s(n, g))
        if not keys:
            del self._prompts[request_id]
            return
        prompt.place_of = {key: i for i, key in enumerate(keys)}
        prompt.slots = (0,) * len(keys)
        prompt.fetch_id = self._id()
        prompt.fetched_s = now
        self._by_id[prompt.fetch_id] = request_id
        self._outbox.append(Fetch(prompt.fetch_id, tuple(keys), tuple(parents), tuple(costs_s)))

    def _end(self, first: int, tiers: Sequence[Sequence[int]], rates: Sequence[TierRate]) -> int:
        """Blocks [first, end) are loaded sooner than they could be computed."""
        load = {IN_HOST: (self.rate.latency_s, self.rate.byte_s * self._load_bytes)}
        for t, rate in enumerate(rates, IN_HOST + 1):
            load[t] = (rate.latency_s + self.rate.latency_s, (rate.byte_s + self.rate.byte_s) * self._load_bytes)
        if not self._full:
            return self._window_end(first, tiers, load)
        slowest = [
            NO_TIER if any(found[g] == NO_TIER for g in self._full) else max(found[g] for g in self._full)
            for found in tiers
        ]
        end = choose_end(slowest, load, self._recompute_s, first)
        while end > first and not self._windows_have(first, end, tiers):
            end -= 1
        return end

    def _window_end(self, first: int, tiers: Sequence[Sequence[int]], load: dict[int, tuple[float, float]]) -> int:
        """Without a full-attention group only the last window is loaded: the deepest end that pays."""
        for end in range(first + len(tiers), first, -1):
            if self._windows_have(first, end, tiers):
                start = min(self._first_wanted(g, first, end) for g, _ in self._windows)
                slowest = max(load[max(found)] for found in tiers[start - first : end - first])
                load_s = slowest[0] + slowest[1] * (end - start)
                pays = load_s < sum(self._recompute_s(n) for n in range(first, end))
                return end if pays else first
        return first

    def _windows_have(self, first: int, end: int, tiers: Sequence[Sequence[int]]) -> bool:
        return all(
            tiers[n - first][g] != NO_TIER
            for g, _ in self._windows
            for n in range(self._first_wanted(g, first, end), end)
        )

    def _first_wanted(self, group: int, start: int, end: int) -> int:
        """The first block that this group needs to go on at block `end`, blocks before `start` being there."""
        window = self.layout.groups[group].window
        if window is None:
            return start
        return max(start, max(0, end * self.block_size - window + 1) // self.block_size)

    def _ready(self, prompt: _Prompt, first: int, end: int) -> int:
        """Largest block up to which the request could go on with what lies in host memory now."""

        def slot(n: int, group: int) -> int:
            i = prompt.place_of.get(block_key(prompt.hashes[n], group))
            return prompt.slots[i] if i is not None else 0

        for g in self._full:
            n = first
            while n < end and slot(n, g):
                n += 1
            end = n
        while end > first and not all(
            slot(n, g) for g, _ in self._windows for n in range(self._first_wanted(g, first, end), end)
        ):
            end -= 1
        return end

    def _place(self, prompt: _Prompt, first: int, end: int) -> Place:
        slots: list[tuple[int, ...]] = []
        keys: list[bytes] = []
        for group in self.layout.groups:
            wanted = self._first_wanted(group.index, first, end)
            names = [block_key(prompt.hashes[n], group.index) for n in range(first, end)]
            there = tuple(prompt.slots[prompt.place_of[name]] for name in names[wanted - first :])
            keys += names
            slots.append((0,) * (wanted - first) + there)
        return Place(HOST, tuple(slots), tuple(keys))

    def _recompute_s(self, block: int) -> float:
        return self.prefill.seconds(block * self.block_size, (block + 1) * self.block_size)

    def _loaded(self, result: MoveResult) -> None:
        request_id, prompt = self._loads.pop(result.id)
        prompt.loading = None
        start, end = prompt.load_range
        self.worth.spent(result.seconds)
        if result.error is None:
            self.rate.observe(result.num_bytes, result.seconds)
            self.worth.saved(self.prefill.seconds(start * self.block_size, end * self.block_size))
            self.num_loaded += end - start
            self.load_bytes += result.num_bytes
            self.load_s += result.seconds
            self.saved_s += self.prefill.seconds(start * self.block_size, end * self.block_size)
            self.hits.update(prompt.tiers[start - prompt.first_block : end - prompt.first_block])
        else:
            self.num_failed += 1
        is_bad = result.error is not None and result.error.startswith(BAD_BLOCK)
        self._release(prompt, is_bad)
        if self._prompts.get(request_id) is prompt:
            del self._prompts[request_id]
