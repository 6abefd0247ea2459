"""KV from engine to engine: the `Mover` of one rank for moves whose other end is a peer's link address.

Knows memory, links and moves. Does not know requests, steps beyond their counter, nor why anything moves.
"""

from __future__ import annotations

import threading
from collections import Counter, deque
from collections.abc import Callable, Sequence

from penstock.core.moves import DEVICE, KVMove, MoveResult, Place
from penstock.transfer import local, mooncake, nixl, shm, tcp
from penstock.transfer.counter import StepCounter
from penstock.transfer.frames import Identity, LinkError
from penstock.transfer.listener import Listener
from penstock.transfer.memory import KVMemory
from penstock.transfer.receipts import Receipts
from penstock.transfer.ring import RING_BYTES
from penstock.transfer.sender import MODES, PeerStats, Sender
from penstock.transfer.streams import Outgoing
from penstock.transfer.throttle import TokenBucket

DIAL: dict[str, Callable[[str, Identity], Outgoing]] = {
    "local": local.dial,
    "tcp": tcp.dial,
    "shm": shm.dial,
    "nixl": nixl.dial,
    "mooncake": mooncake.dial,
}


def scheme_of(address: str) -> str | None:
    """ "tcp" of "tcp://host:port", and so on; None: `where` names no link."""
    scheme, colon, _ = address.partition("://")
    return scheme if colon and scheme in DIAL else None


class LinkMover:
    """Sends to peers and receives from them, each peer in threads of its own. `start` to `poll` wait for nobody.

    A send-move (src on the device, dst at a link address) follows `counter` if it has `after_step`, layer by layer, and
    ends when its bytes have left the pool. A receive-move (dst on the device) ends when what was announced by `expect`
    has arrived. Blocks whose id at the receiver is 0 are not carried. Units are known by the receiver's block ids, so
    they add up however they are cut into moves. A message reaches `10 * bandwidth * cost of a message` before it goes
    out (`coalesce`); `mode` "layerwise" and "whole" are there to be compared with.

    `notify` is called, from any thread, when a result is there to be polled; it must not call the mover. `poll_s`: how
    often the step counter is looked at while a move waits for it.
    """

    def __init__(
        self,
        memory: KVMemory,
        counter: StepCounter,
        identity: Identity,
        listen: Sequence[str] = (),
        *,
        mode: str = "coalesced",
        throttle: TokenBucket | None = None,
        poll_s: float = 5e-4,
        stall_s: float = 10.0,
        ring_bytes: int = RING_BYTES,
        notify: Callable[[], None] | None = None,
    ) -> None:
        """Raises ValueError for an address or mode that is none, OSError for an address that cannot be had, LinkError
        for one whose link is not installed."""
        if mode not in MODES:
            raise ValueError(f"mode {mode!r} is none of {', '.join(MODES)}")
        if identity.format != memory.layout.format:
            raise ValueError(f"identity of format {identity.format} for memory of format {memory.layout.format}")
        self._memory, self._counter, self._identity, self._notify = memory, counter, identity, notify
        self._mode, self._throttle, self._poll_s, self._stall_s = mode, throttle, poll_s, stall_s
        self._results: deque[MoveResult] = deque()
        self._receipts = Receipts(memory, self._post)
        self._lock = threading.Lock()  # of what follows; never held while anything waits
        self._senders: dict[str, Sender] = {}
        self._sender_of: dict[int, Sender] = {}  # move id -> who sends it
        self._closed = False
        self._listeners: list[Listener] = []
        self._names: list[str] = []
        try:
            for address in listen:
                if address.startswith("local://"):
                    local.listen(address, identity, self._receipts)
                    self._names.append(address)
                else:
                    self._listeners.append(Listener(address, identity, self._receipts, ring_bytes))
        except BaseException:
            self.close()
            raise

    @property
    def addresses(self) -> tuple[str, ...]:
        """Where peers reach this rank."""
        return (*self._names, *(listener.address for listener in self._listeners))

    def start(self, move: KVMove) -> None:
        error = self._wrong(move)
        if error is not None:
            self._post(MoveResult(move.id, error))
        elif move.src.where == DEVICE:
            with self._lock:
                sender = self._senders.get(move.dst.where)
                if sender is None:
                    self._forget_lost()
                    sender = self._senders[move.dst.where] = self._new_sender(move.dst.where)
                    if self._closed:
                        sender.close()
                self._sender_of[move.id] = sender
            sender.add(move)
        else:
            self._receipts.start(move)

    def expect(self, move_id: int, num_units: int, checksum: int) -> None:
        receipt = self._receipts.of_move(move_id)
        if receipt is not None:
            receipt.expect(num_units, checksum)

    def cancel(self, move_id: int) -> None:
        receipt = self._receipts.of_move(move_id)
        if receipt is not None:
            receipt.fail("cancelled")
        with self._lock:
            sender = self._sender_of.get(move_id)
        if sender is not None:
            sender.cancel(move_id)

    def poll(self) -> list[MoveResult]:
        ended = []
        while self._results:
            ended.append(self._results.popleft())
        return ended

    def stats(self) -> dict[str, PeerStats]:
        """Per peer address, since the beginning; a peer that was lost may be left out."""
        with self._lock:
            senders = list(self._senders.values())
        return {sender.address: sender.stats() for sender in senders}

    def received(self) -> Counter[str]:
        """Frames that came, by what became of them: whole, or dropped as unknown, duplicate, late, abandoned..."""
        return self._receipts.counts()

    def close(self) -> None:
        """End every move with an error, hang up and free the addresses. Safe to call twice."""
        with self._lock:
            self._closed = True
            senders = list(self._senders.values())
        for address in self._names:
            local.leave(address)
        for sender in senders:
            sender.close()
        self._receipts.fail_all("the link is closed")
        for listener in self._listeners:
            listener.close()
        for sender in senders:
            sender.join(10.0)

    def _post(self, result: MoveResult) -> None:
        self._sender_of.pop(result.id, None)
        self._results.append(result)
        if self._notify is not None:
            self._notify()

    def _wrong(self, move: KVMove) -> str | None:
        """Why this move cannot even begin."""
        if self._closed:
            return "the link is closed"
        sends = move.src.where == DEVICE
        other = move.dst if sends else move.src
        if move.dst.where != DEVICE and scheme_of(other.where) is None:
            return f"no link carries a move from {move.src.where} to {move.dst.where}"
        here = move.src if sends else move.dst
        error = self._outside(here)
        if error is None and sends:
            if [len(ids) for ids in move.src.block_ids] != [len(ids) for ids in move.dst.block_ids]:
                error = f"source and destination at {move.dst.where} differ in number of blocks"
            elif any(not 0 <= block < 1 << 31 for ids in move.dst.block_ids for block in ids):
                error = f"block ids at {move.dst.where} out of range"
        return error

    def _outside(self, here: Place) -> str | None:
        groups = self._memory.layout.groups
        if len(here.block_ids) != len(groups):
            return f"a move of {len(here.block_ids)} KV groups; there are {len(groups)}"
        for group, ids in zip(groups, here.block_ids):
            limit = self._memory.num_blocks(group.layers[0])
            if ids and not (min(ids) >= 0 and max(ids) < limit):
                return f"block ids of KV group {group.index} outside its pool of {limit}"
        return None

    def _forget_lost(self) -> None:
        """Let go of peers that are gone, so that those who come back under other addresses add up to no crowd."""
        for address in [address for address, sender in self._senders.items() if sender.is_lost]:
            self._senders.pop(address).close()

    def _new_sender(self, address: str) -> Sender:
        scheme = scheme_of(address)
        assert scheme is not None

        def dial() -> Outgoing:
            try:
                return DIAL[scheme](address, self._identity)
            except (OSError, LinkError) as error:
                raise LinkError(f"{self._identity.name} cannot reach {address}: {error}") from error

        return Sender(
            address,
            dial,
            self._memory,
            self._counter,
            self._post,
            mode=self._mode,
            throttle=self._throttle,
            poll_s=self._poll_s,
            stall_s=self._stall_s,
        )
