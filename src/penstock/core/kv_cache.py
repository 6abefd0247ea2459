"""The KV cache of one engine: block tables of requests over the pools of all KV groups, and the prefix cache's keys.

Gives, holds, publishes and takes back the blocks of one request at a time. Decides nothing: who gets blocks, and who
gives way, is the scheduler's.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence

from penstock.config.model import KVLayout
from penstock.core.admission import Sharing
from penstock.core.blocks import BlockPool
from penstock.core.kv_events import KVEventSource
from penstock.core.prefix import Hit, PrefixCache, chain_root, extend_chain
from penstock.core.request import Request

MAX_ROOTS = 10_000  # hash roots that are remembered: one per adapter and salt
NOT_SHARED = Sharing()

BlockIds = tuple[tuple[int, ...], ...]  # per KV group


class KVCache:
    """`pools`: one per KV group. `enabled`: whether blocks are published and matched.

    `max_step_tokens`: how many tokens a step may compute: a window group holds that many beyond its window.
    """

    def __init__(
        self, layout: KVLayout, num_blocks: Sequence[int], model_id: str, enabled: bool, max_step_tokens: int
    ) -> None:
        self.layout = layout
        self.block_size = layout.block_size
        self.model_id = model_id
        self.enabled = enabled
        self.max_step_tokens = max_step_tokens
        self.pools = [
            BlockPool(n, leaf_first=group.window is None) for n, group in zip(num_blocks, layout.groups, strict=True)
        ]
        self.prefix = PrefixCache(layout, self.pools)
        self.nothing: BlockIds = ((),) * len(self.pools)
        self.windows = [(g, group.window) for g, group in enumerate(layout.groups) if group.window is not None]
        self._full = next((g for g, group in enumerate(layout.groups) if group.window is None), None)
        self.on_published: Callable[[bytes, bytes | None, int], None] | None = None  # hash, its parent, which block
        self._events: KVEventSource | None = None
        self._computing: dict[bytes, int] = {}  # block hash -> rows of submitted steps that fill it
        self._roots: dict[tuple[str, str], bytes] = {}

    # ---- sizes ----

    @property
    def max_held(self) -> list[int | None]:
        """Per group: blocks that one request can hold at once; None where that grows with its length."""
        return [None if group.window is None else self._window_blocks(group.window) for group in self.layout.groups]

    def max_request_tokens(self) -> int:
        """Longest prompt + output that the pools can hold for one request running alone."""
        sizes = []
        for group, pool in zip(self.layout.groups, self.pools, strict=True):
            usable = pool.num_blocks - 1
            if group.window is None or usable < self._window_blocks(group.window):
                sizes.append(usable * self.block_size)
        return min(sizes, default=2**31)

    def _window_blocks(self, window: int) -> int:
        """A window, a whole step, two open ends."""
        return -(-(window + self.max_step_tokens) // self.block_size) + 2

    # ---- giving blocks ----

    def reset(self, request: Request) -> None:
        """The request holds nothing and has computed nothing."""
        request.block_tables = [[] for _ in self.pools]
        request.num_published = [0] * len(self.pools)
        request.num_computed = request.num_planned = 0

    def has_room(self, need: int, hit: Hit) -> bool:
        """Can every group give `need` blocks besides those of `hit`?"""
        return all(
            need <= pool.num_available - pool.count_cached(ids)
            for pool, ids in zip(self.pools, hit.block_ids, strict=True)
        )

    def would_have(self, needs: Sequence[int], leaving: Sequence[Request]) -> bool:
        """Could every group give its `needs` blocks once steps in flight have ended and `leaving` are gone?"""
        for g, (need, pool) in enumerate(zip(needs, self.pools, strict=True)):
            room = pool.num_available + pool.num_limbo
            num_refs: dict[int, int] = {}
            for request in leaving:
                for id_ in request.block_tables[g]:
                    if id_:
                        num_refs[id_] = left = num_refs.get(id_, pool.blocks[id_].num_refs) - 1
                        room += not left
            if need > room:
                return False
        return True

    def hold(self, request: Request, hit: Hit) -> None:
        """Start the request on the blocks of a hit."""
        for pool, ids, table in zip(self.pools, hit.block_ids, request.block_tables, strict=True):
            for id_ in ids:
                if id_:
                    pool.hold(pool.blocks[id_])
            table.extend(ids)
        request.num_computed = hit.num_blocks * self.block_size
        request.num_published = [hit.num_blocks] * len(self.pools)

    def allocate(self, request: Request, needs: Iterable[int], now: float) -> BlockIds:
        """`needs` more blocks per group; the caller has seen that they are there."""
        added = []
        for need, pool, table in zip(needs, self.pools, request.block_tables, strict=True):
            new = tuple(pool.allocate(now) for _ in range(need))
            table.extend(new)
            added.append(new)
        return tuple(added)

    def has_room_to_receive(self, hit: Hit, num_received: int, num_tokens: int) -> bool:
        """Can every group give what `reserve` takes after `hold`?"""
        return all(
            max(0, -(-num_tokens // self.block_size) - max(self._first_received(g, num_received), hit.num_blocks))
            <= pool.num_available - pool.count_cached(hit.block_ids[g])
            for g, pool in enumerate(self.pools)
        )

    def reserve(self, request: Request, num_received: int, num_tokens: int, now: float) -> None:
        """Blocks up to `num_tokens`, the KV of the first `num_received` coming from elsewhere: of that, in a window
        group, for what stays visible."""
        num_blocks = -(-num_tokens // self.block_size)
        for g, (pool, table) in enumerate(zip(self.pools, request.block_tables, strict=True)):
            table.extend([0] * (self._first_received(g, num_received) - len(table)))
            table.extend([pool.allocate(now) for _ in range(num_blocks - len(table))])

    def receive(self, request: Request, num_tokens: int, fence: int) -> None:
        """The KV is there: the request has computed `num_tokens` tokens, and keeps what is still visible of it."""
        request.num_computed = num_tokens = max(num_tokens, request.num_computed)
        for g, window in self.windows:
            table, pool = request.block_tables[g], self.pools[g]
            for n in range(self.prefix.first_visible(window, num_tokens) - 1, -1, -1):
                if table[n]:
                    pool.release(table[n], fence)
                    table[n] = 0
        if self.enabled:
            self.publish(request)

    def _first_received(self, group: int, num_tokens: int) -> int:
        window = self.layout.groups[group].window
        return 0 if window is None else self.prefix.first_visible(window, num_tokens)

    # ---- taking blocks back ----

    def release(self, request: Request, fence: int) -> None:
        """All blocks of the request, deepest first, behind the step `fence` (-1: none in flight)."""
        for pool, table in zip(self.pools, request.block_tables, strict=True):
            for id_ in reversed(table):
                if id_:
                    pool.release(id_, fence)
            table.clear()

    def trim_windows(self, request: Request, fence: int) -> None:
        """Give back blocks that have left the window of every position still to be computed."""
        for g, window in self.windows:
            table, pool = request.block_tables[g], self.pools[g]
            for n in range(self.prefix.first_visible(window, request.num_computed) - 1, -1, -1):
                if not table[n]:
                    break
                pool.release(table[n], fence)
                table[n] = 0

    def settle(self, step: int) -> None:
        """Steps up to `step` have ended."""
        for pool in self.pools:
            pool.settle(step)

    def forget(self) -> None:
        """Unpublish everything."""
        for pool in self.pools:
            pool.forget()

    # ---- prefix cache ----

    def tell(self, events: KVEventSource) -> None:
        """Tell of blocks that can be hit, and of those that no longer can: of one group, that of full attention."""
        self._events = events
        self.events_pool.listener = events

    @property
    def events_pool(self) -> BlockPool:
        """The pool whose blocks `tell` speaks of."""
        return self.pools[self._full or 0]

    def match(self, request: Request) -> Hit:
        """The longest cached prefix that the request may start on."""
        if not self.enabled:
            return Hit(0, tuple([] for _ in self.pools))
        self._extend_hashes(request)
        return self.prefix.match(request.block_hashes, self._hit_limit(request))

    def ask(self, request: Request) -> tuple[Hit, list[bytes]]:
        """What the device has of a request, and the hashes of all its blocks that may come from a cache."""
        hit = self.match(request)
        return hit, request.block_hashes[: self._hit_limit(request)] if self.enabled else []

    def find(self, group: int, hash_: bytes) -> int:
        """The block with this content, 0 if it is not on the device."""
        block = self.pools[group].index.get(hash_)
        return 0 if block is None else block.id

    def is_being_computed(self, request: Request, hit: Hit) -> bool:
        """Does a submitted step fill the block that comes after the hit?"""
        n, hashes = hit.num_blocks, request.block_hashes
        return bool(self._computing) and n < min(self._hit_limit(request), len(hashes)) and hashes[n] in self._computing

    def publish(self, request: Request) -> None:
        """Hand the request's blocks that are full and committed to the prefix cache."""
        self._extend_hashes(request)
        hashes = request.block_hashes
        end = min(request.num_computed // self.block_size, len(hashes))
        for g, (pool, table) in enumerate(zip(self.pools, request.block_tables, strict=True)):
            for n in range(request.num_published[g], end):
                if table[n]:
                    if self.on_published is not None and pool is self.pools[-1]:
                        self.on_published(hashes[n], hashes[n - 1] if n else None, n)
                    if self._events is not None and self._events.with_tokens and pool.listener is not None:
                        tokens = request.token_ids[n * self.block_size : (n + 1) * self.block_size]
                        self._events.describe(hashes[n], hashes[n - 1] if n else None, tokens)
                    pool.publish(table[n], hashes[n], hashes[n - 1] if n else None)
            request.num_published[g] = end

    def begin_filling(self, request: Request, start: int, end: int) -> list[bytes]:
        """A row will compute tokens [start, end): the hashes of the blocks that it fills with known tokens."""
        if not self.enabled or end // self.block_size == start // self.block_size:
            return []
        self._extend_hashes(request)
        full = min(end, len(request.token_ids)) // self.block_size
        hashes = request.block_hashes[start // self.block_size : full]
        for hash_ in hashes:
            self._computing[hash_] = self._computing.get(hash_, 0) + 1
        return hashes

    def end_filling(self, hashes: Iterable[bytes]) -> None:
        """The step of these blocks was committed."""
        for hash_ in hashes:
            left = self._computing[hash_] - 1
            if left:
                self._computing[hash_] = left
            else:
                del self._computing[hash_]

    def _hit_limit(self, request: Request) -> int:
        """Blocks that may come from the cache: one token at least is computed, and all whose logprobs are owed."""
        if request.params.prompt_logprobs is not None and request.num_logprobs_done < request.prompt_len - 1:
            return 0
        return (len(request.token_ids) - 1) // self.block_size

    def _extend_hashes(self, request: Request) -> None:
        key = (request.adapter, request.salt)
        root = self._roots.get(key)
        if root is None:
            if len(self._roots) > MAX_ROOTS:
                self._roots.clear()
            root = self._roots[key] = chain_root(self.model_id, self.layout, request.adapter, request.salt)
        extend_chain(request.block_hashes, root, request.token_ids, self.block_size, request.media)

    # ---- who shares what, for admission ----

    @property
    def num_shared(self) -> int:
        """Blocks of the full-attention group that several requests hold."""
        return 0 if self._full is None else self.pools[self._full].num_shared

    def count_shared(self, request: Request) -> int:
        """How many of a running request's blocks others hold too: only the end of that prefix moves."""
        if self._full is None or not self.pools[self._full].num_shared:
            return 0
        table, blocks = request.block_tables[self._full], self.pools[self._full].blocks
        n = min(request.num_shared, len(table))
        while n and blocks[table[n - 1]].num_refs < 2:
            n -= 1
        while n < len(table) and blocks[table[n]].num_refs > 1:
            n += 1
        request.num_shared = n
        return n

    def sharing(self, hit: Hit, running: Iterable[Request]) -> Sharing:
        """Which of a hit's blocks running requests hold. Whoever holds a block holds all before it."""
        if self._full is None or not hit.num_blocks:
            return NOT_SHARED
        ids, blocks = hit.block_ids[self._full], self.pools[self._full].blocks
        num_held = num_sole = 0
        for id_ in ids:
            num_refs = blocks[id_].num_refs
            if not num_refs:
                break
            num_held += 1
            num_sole += num_refs == 1
        if not num_sole:
            return Sharing(num_held)
        last = num_held - 1
        for request in running:
            table = request.block_tables[self._full]
            if last < len(table) and table[last] == ids[last]:
                return Sharing(num_held, num_sole, request)
        return NOT_SHARED
