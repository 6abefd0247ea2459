"""An engine's KV tiers: what its requests load instead of computing, and which of its blocks are saved below.

Joins the tiers' client (`core/tier_client.py`) to scheduler and engine: a KVSource that offers what lies in host
memory. Knows messages of the pool by their door; no store, memory or thread.
"""

from __future__ import annotations

import logging
from collections.abc import Sequence
from typing import Protocol

from penstock.core.kv_events import KVEvents
from penstock.core.moves import KVMove, MoveResult
from penstock.core.plan import Row
from penstock.core.pool_contents import POOL
from penstock.core.request import Request
from penstock.core.scheduler import Scheduler
from penstock.core.tier_client import TierClient
from penstock.core.tiering import (
    HOST,
    WRITE_BACK,
    News,
    PoolChanged,
    PoolHolds,
    TierStatus,
    ToEngine,
    ToPool,
    WantContents,
)
from penstock.core.traffic import Offer
from penstock.engine.messages import TierReport

log = logging.getLogger("penstock.tiers")

COOL_SHARE = 16  # of write-back: blocks are saved when less than one in so many is free
MIN_PIECE = 32  # tokens: the time of a shorter piece is that of what surrounds it
MAX_ROUNDS = 8  # of question and answer in one turn
WAITING = "tier"  # the reason of waiting


class PoolLine(Protocol):
    """The way to the machine's pool, in this process or another. Neither method waits."""

    def send(self, message: ToPool | WantContents, now: float) -> None: ...

    def receive(self, now: float) -> Sequence[ToEngine | News]: ...

    def is_lost(self, now: float) -> bool:
        """The pool does not speak any more."""
        ...


class TierSource:
    """Called by its engine, in the engine's thread: `turn` before each plan, the others as things happen."""

    def __init__(self, scheduler: Scheduler, client: TierClient, line: PoolLine) -> None:
        self.scheduler = scheduler
        self.client = client
        self.line = line
        self._loads: dict[str, tuple[int, int]] = {}  # request id -> (first block, blocks) of the offer it took
        self._was_lost = False
        self.tells_news = False  # somebody calls `news`
        self._news: list[News] = []
        self._life: int | None = None  # of the pool, when it has told of its contents
        scheduler.kv.on_published = client.saving.published

    @property
    def is_busy(self) -> bool:
        """Are answers of the pool, or moves, awaited?"""
        return self.client.num_open > 0

    def arrived(self, request: Request, now: float) -> None:
        """A request was queued: what the tiers have of it is brought into host memory while it waits."""
        if self._was_lost:
            return
        hit, hashes = self.scheduler.kv.ask(request)
        if len(hashes) > hit.num_blocks:
            self.client.arrived(request.id, hashes, hit.num_blocks, now)
            self._tell(now)

    def ended(self, request_id: str) -> None:
        """The request is over."""
        self._loads.pop(request_id, None)
        self.client.ended(request_id)

    def offer(self, request: Request, num_blocks: int, now: float) -> Offer | str | None:
        """See KVSource."""
        found = self.client.offer(request.id, num_blocks, now)
        if found.wait_until_s is not None:
            return WAITING
        if not found.num_blocks or found.place is None:
            return None
        self._loads[request.id] = (num_blocks, found.num_blocks)
        num_tokens = (num_blocks + found.num_blocks) * self.scheduler.block_size
        return Offer(num_tokens, found.place, request.id, is_cache=True)

    def started(self, move: KVMove) -> None:
        """A move has begun."""
        if move.src.where == HOST and move.request_id in self._loads:
            self.client.load_started(move.request_id, *self._loads.pop(move.request_id), move.id)

    def stepped(self, num_rows: int, chunks: Sequence[tuple[Request, Row]], seconds: float) -> None:
        """A step ended: its longest piece of a prompt tells what computing costs, by its share of the tokens."""
        if not chunks:
            return
        row = max((row for _, row in chunks), key=lambda row: row.num_tokens)
        num_tokens = num_rows - len(chunks) + sum(each.num_tokens for _, each in chunks)
        if row.num_tokens >= MIN_PIECE:
            share = row.num_tokens / num_tokens
            self.client.prefill.observe(row.start, row.start + row.num_tokens, share * seconds)

    def ended_move(self, result: MoveResult) -> None:
        """A move has ended."""
        self.client.moved(result)

    def reports(self) -> list[TierReport]:
        """Each tier: what the pool says of it, and what this engine had of it."""
        client, reports = self.client, []
        num_hits = max(1, client.hits.total())
        for tier in client.status.tiers:
            share = client.hits[tier.name] / num_hits
            reports.append(
                TierReport(
                    tier.name,
                    tier.capacity,
                    0 if self._was_lost else tier.used,
                    hit_blocks=client.hits[tier.name],
                    read_bytes=int(share * client.load_bytes),
                    written_bytes=client.saving.num_bytes if tier.name == HOST else 0,
                    load_s=share * client.load_s,
                    saved_s=share * (client.saved_s - client.load_s),
                    state=self._state(tier),
                    latency_s=client.rate.latency_s + tier.latency_s,
                    byte_s=client.rate.byte_s + tier.byte_s,
                )
            )
        return reports

    def _state(self, tier: TierStatus) -> str:
        if self._was_lost:
            return "off: the pool is gone"
        return tier.state if tier.name != HOST or self.client.worth.is_on else "off: it does not pay"

    def turn(self, now: float) -> None:
        """Take the pool's answers in, start saves, tell the pool what is new."""
        for event in self.client.tick(now):
            log.warning("%s", event.text)
        saving = self.client.saving
        if saving.settings.write == WRITE_BACK:
            for pool in self.scheduler.pools:
                if pool.num_free * COOL_SHARE < pool.num_blocks:
                    saving.cooling(pool.coldest(COOL_SHARE))
        # A pool in this process answers at once: blocks are then pinned before the plan that follows can evict them.
        for _ in range(MAX_ROUNDS):
            answers = self.line.receive(now)
            for message in answers:
                if isinstance(message, PoolChanged | PoolHolds):
                    if self.tells_news:
                        self._news.append(message)
                else:
                    self.client.handle(message, now)
            is_lost = self.line.is_lost(now)
            if is_lost:
                break
            self._save()
            if not self._tell(now) and not answers:
                break
        if is_lost and not self._was_lost:
            log.error("the pool of KV tiers is gone: prompts are computed from now on")
            self.client.pool_lost()
            if self._life is not None:  # what a pool tells in a later life begins with nothing
                self._news.append(PoolChanged(KVEvents(POOL, self._life + 1, 0, (), 0)))
        elif self._was_lost and not is_lost:
            log.info("the pool of KV tiers is back")
        self._was_lost = is_lost

    def news(self) -> list[News]:
        """What the pool has told of its contents since the last call."""
        new, self._news = self._news, []
        for message in new:
            self._life = message.events.life if isinstance(message, PoolChanged) else message.snapshot.life
        return new

    def ask_contents(self, now: float) -> None:
        """A router wants all of it."""
        self.line.send(WantContents(), now)

    def _save(self) -> None:
        """Start what has got slots."""
        saving, kv = self.client.saving, self.scheduler.kv
        for save in saving.ready():
            places = save.places(kv.find, len(kv.pools))
            if places is None:
                saving.dropped(save)
                continue
            src, dst, indices = places
            saving.started(save, self.scheduler.traffic.save(src, dst).id, indices)

    def _tell(self, now: float) -> bool:
        """Whether there was anything to tell."""
        messages = self.client.messages()
        for message in messages:
            self.line.send(message, now)
        return bool(messages)
