"""What a router knows of caches elsewhere, in hashes of its own: from the engines' events, or from what it sent them.

Engines hash blocks each in their own way, and vLLM's differ from process to process; but events say which tokens a
block holds, so that everybody's blocks can be told by one chain. State machines; no socket, no clock.
"""

from __future__ import annotations

from collections import OrderedDict, deque
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field

from penstock.cluster.kv_events import END_OF_REPLAY, decode
from penstock.core.kv_events import KVChange, KVEvents
from penstock.core.moves import DEVICE
from penstock.core.prefix import extend_chain

MAX_LATER = 10_000  # batches kept while missed ones are on their way


@dataclass(slots=True)
class _Block:
    own: bytes  # our hash of it
    tiers: set[str] = field(default_factory=set)


class RemoteCache:
    """One engine's cache, from its stream of events. `root`: of the router's chain; `block_size`: of its blocks.

    `told` takes what was published, `replayed` what was asked for again. Both give changes in our hashes, numbered
    without gaps. A chain whose beginning was missed cannot be told and is left out: a hit that is not predicted.
    `wanted`: the first batch that is missing; its replay is to be asked for. `can_replay` False: nothing comes again.
    """

    def __init__(self, engine: str, root: bytes, block_size: int, *, can_replay: bool) -> None:
        self.engine, self.block_size, self.can_replay = engine, block_size, can_replay
        self.num_gaps = 0
        self.num_foreign = 0  # blocks of another size
        self.wanted: int | None = 0 if can_replay else None
        self._root = root
        self._blocks: dict[bytes, _Block] = {}
        self._next = 0  # number of the batch to come
        self._newest = -1  # of what was published
        self._replayed: dict[int, int] = {}  # batches that came again before they came: number -> hash of the payload
        self._later: deque[KVEvents] = deque()
        self._life, self._seq = 0, -1  # of what we tell

    def told(self, frames: Sequence[bytes]) -> list[KVEvents]:
        """A published batch. Raises FormatError."""
        events = decode(frames, self.engine)
        replayed = self._replayed.get(events.seq)
        is_known = replayed is not None and replayed == hash(frames[2])
        if self._replayed:
            self._replayed = {seq: payload for seq, payload in self._replayed.items() if seq > events.seq}
        if events.seq <= self._newest or (events.seq < self._next and not is_known):
            out = [self._emptied()]  # numbers begin anew: it is another process
            self._replayed.clear()
            self._next, self.wanted = 0, 0 if self.can_replay and events.seq else None
            self._later.clear()
        else:
            out = []
        self._newest = events.seq
        if self.wanted is None and events.seq > self._next:
            self.num_gaps += self._next > 0
            self.wanted = self._next if self.can_replay else None
        if self.wanted is not None:
            if len(self._later) < MAX_LATER:
                self._later.append(events)
            return out
        return out + self._take(events)

    def replayed(self, frames: Sequence[bytes]) -> list[KVEvents]:
        """An answer of the replay socket, without the empty frame before it. Raises FormatError."""
        if len(frames) == 3 and frames[1] == END_OF_REPLAY:
            self.wanted = None
            out = []
            while self._later:
                out += self._take(self._later.popleft())
            return out
        events = decode(frames, self.engine)
        if events.seq > self._newest:
            self._replayed[events.seq] = hash(frames[2])
        return self._take(events)

    def everything(self) -> KVEvents:
        """All that it holds, as the beginning of a new life: for a router that has forgotten it."""
        tiers: dict[str, list[bytes]] = {}
        for block in self._blocks.values():
            for tier in block.tiers:
                tiers.setdefault(tier, []).append(block.own)
        self._life, self._seq = self._life + 1, 0
        changes = tuple(KVChange(True, tier, tuple(hashes)) for tier, hashes in tiers.items())
        return KVEvents(self.engine, self._life, 0, changes)

    @property
    def num_blocks(self) -> int:
        return len(self._blocks)

    def _take(self, events: KVEvents) -> list[KVEvents]:
        if events.seq < self._next:
            return []  # known
        out = []
        if events.seq > self._next and self._next > 0:
            out.append(self._emptied())  # what was missed will not come: what is believed may be wrong
        self._next = events.seq + 1
        changes = [own for change in events.changes if (own := self._change(change)) is not None]
        return [*out, self._event(changes)] if changes else out

    def _change(self, change: KVChange) -> KVChange | None:
        if not change.stored:
            return self._removed(change)
        if change.tokens is None:
            known = [block for hash_ in change.hashes if (block := self._blocks.get(hash_)) is not None]
        else:
            known = self._chained(change)
        for block in known:
            block.tiers.add(change.tier)
        return KVChange(True, change.tier, tuple(block.own for block in known)) if known else None

    def _chained(self, change: KVChange) -> list[_Block]:
        tokens = change.tokens
        assert tokens is not None
        if tokens.block_size != self.block_size:
            self.num_foreign += len(change.hashes)
            return []
        parent = None if tokens.parent is None else self._blocks.get(tokens.parent)
        if tokens.parent is not None and parent is None:
            return []
        owns: list[bytes] = []
        extend_chain(owns, self._root if parent is None else parent.own, tokens.token_ids, self.block_size)
        return [self._blocks.setdefault(hash_, _Block(own)) for hash_, own in zip(change.hashes, owns, strict=False)]

    def _removed(self, change: KVChange) -> KVChange | None:
        hashes: Iterable[bytes] = change.hashes or [h for h, b in self._blocks.items() if change.tier in b.tiers]
        gone = []
        for hash_ in hashes:
            block = self._blocks.get(hash_)
            if block is None:
                continue
            block.tiers.discard(change.tier)
            gone.append(block.own)
            if not block.tiers:
                del self._blocks[hash_]
        return KVChange(False, change.tier, tuple(gone)) if gone else None

    def _emptied(self) -> KVEvents:
        tiers = {tier for block in self._blocks.values() for tier in block.tiers}
        self._blocks.clear()
        return self._event([KVChange(False, tier, ()) for tier in sorted(tiers)])

    def _event(self, changes: Sequence[KVChange]) -> KVEvents:
        self._seq += 1
        return KVEvents(self.engine, self._life, self._seq, tuple(changes))


class SentPrompts:
    """A guess at one engine's cache: the prompts that were sent there lately, at most `max_blocks` blocks of them.

    For engines that publish nothing. A prompt is believed to be there for `lasts_s` after it was last sent.
    """

    def __init__(self, engine: str, max_blocks: int, lasts_s: float) -> None:
        self.engine, self.max_blocks, self.lasts_s = engine, max_blocks, lasts_s
        self._until_s: OrderedDict[bytes, float] = OrderedDict()  # the one sent longest ago first
        self._life, self._seq = 0, -1

    def sent(self, hashes: Sequence[bytes], now: float) -> KVEvents | None:
        """A prompt goes there: what is believed from now on."""
        new = tuple(hash_ for hash_ in hashes if hash_ not in self._until_s)
        for hash_ in reversed(hashes):  # ends leave before beginnings
            self._until_s[hash_] = now + self.lasts_s
            self._until_s.move_to_end(hash_)
        changes = [KVChange(True, DEVICE, new)] if new else []
        over = len(self._until_s) - self.max_blocks
        if over > 0:
            changes.append(KVChange(False, DEVICE, tuple(self._until_s.popitem(last=False)[0] for _ in range(over))))
        return self._event(changes)

    def tick(self, now: float) -> KVEvents | None:
        """What is no longer believed."""
        gone = []
        while self._until_s and next(iter(self._until_s.values())) <= now:
            gone.append(self._until_s.popitem(last=False)[0])
        return self._event([KVChange(False, DEVICE, tuple(gone))] if gone else [])

    def everything(self) -> KVEvents:
        """As of `RemoteCache`."""
        self._life, self._seq = self._life + 1, 0
        changes = (KVChange(True, DEVICE, tuple(self._until_s)),) if self._until_s else ()
        return KVEvents(self.engine, self._life, 0, changes)

    def _event(self, changes: Sequence[KVChange]) -> KVEvents | None:
        if not changes:
            return None
        self._seq += 1
        return KVEvents(self.engine, self._life, self._seq, tuple(changes))
