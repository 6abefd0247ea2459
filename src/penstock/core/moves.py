"""KV on its way: what is carried from where to where, and how it went. Plain data; knows no byte and no socket."""

from __future__ import annotations

from dataclasses import dataclass

DEVICE = "device"
CANCELLED = "cancelled"  # MoveResult.error of a move that its own engine ended


@dataclass(frozen=True, slots=True)
class Place:
    """Blocks of KV somewhere.

    `where`: "device" (this engine's pools), the name of a tier ("host", "disk", "remote"), the link address of a peer
    that is sent to ("shm://...", "tcp://host:port", "local://name"), or the name of a peer that will send. On a device,
    here or at a peer, blocks have ids, per KV group; in a tier they are found by their hash.
    """

    where: str
    block_ids: tuple[tuple[int, ...], ...] = ()  # per KV group
    keys: tuple[bytes, ...] = ()


@dataclass(frozen=True, slots=True)
class KVMove:
    """Blocks of one request from `src` to `dst`, which name as many blocks in the same order, per KV group.

    A move has one end on this engine's device: src for a send or a save, dst for a receipt or a load. It holds a
    reference to its device blocks from its start until its MoveResult has come, whatever becomes of the request.
    """

    id: int  # counts up within one engine
    transfer_id: str  # of all moves of one hand-off; a prompt computed in chunks is one move per step under it
    request_id: str
    src: Place
    dst: Place
    epoch: int = 0  # of the hand-off: what carries an older one is dropped unread
    after_step: int = -1  # src is complete, layer by layer, when this step has computed it; -1: it is complete now

    @property
    def num_blocks(self) -> int:
        """Over all KV groups, of the device's end."""
        place = self.src if self.src.where == DEVICE else self.dst
        return sum(map(len, place.block_ids))


@dataclass(frozen=True, slots=True)
class MoveResult:
    """How a move ended. Its blocks are nobody's business any more: what would still come for it is dropped.

    `num_units` counts (block, layer) pairs carried. `checksum` is the sum over them, modulo 2^64, of their content's,
    weighted by layer and receiver's block id
    (`transfer.memory.checksum`), so that moves of one hand-off add up in any order.
    """

    id: int
    error: str | None = None  # None: all of it is in place
    num_units: int = 0
    num_bytes: int = 0
    checksum: int = 0
    seconds: float = 0.0


@dataclass(frozen=True, slots=True)
class KVTicket:
    """What a decode engine hands to a prefill engine: where the KV of one prompt goes. Valid for one epoch.

    The KV of tokens up to `num_tokens` is wanted. Blocks `first_block` and later lack it; earlier ones D has.
    `block_ids`, per KV group, are those of D from `first_block` to the last, 0 where nothing is wanted (outside a
    window). D drops the reservation when it has heard nothing for `lease_s`.
    """

    transfer_id: str
    request_id: str
    epoch: int
    decode_engine: str  # its name among peers
    link: str  # its link address
    format: str  # KVLayout.format: another one is refused
    num_tokens: int
    first_block: int
    block_ids: tuple[tuple[int, ...], ...]
    lease_s: float = 5.0
