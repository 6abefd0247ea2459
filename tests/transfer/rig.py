"""Two ranks with pools of random bytes and a link between them, inside one process."""

from __future__ import annotations

import itertools
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from types import ModuleType
from typing import Any

import numpy as np
import pytest

from penstock.config.model import KVGroup, KVLayout
from penstock.core.moves import DEVICE, KVMove, MoveResult, Place
from penstock.transfer import mooncake, nixl
from penstock.transfer.counter import StepCounter
from penstock.transfer.frames import Identity, LinkError
from penstock.transfer.memory import KVMemory
from penstock.transfer.mover import LinkMover

TIMEOUT_S = 20.0
SECRET = b"a secret of the cluster"
LISTEN = {
    "local": "local://{name}",
    "tcp": "tcp://127.0.0.1:0",
    "shm": "shm://",
    "nixl": "nixl://127.0.0.1:0",
    "mooncake": "mooncake://127.0.0.1:0",
}


def is_installed(extra: ModuleType) -> bool:
    """Whether the library of `transfer.nixl` or `transfer.mooncake` loads here."""
    try:
        extra.load()
    except LinkError:
        return False
    return True


EXTRAS = [
    pytest.param(name, marks=pytest.mark.skipif(not is_installed(module), reason=f"penstock[{name}] is not here"))
    for name, module in (("nixl", nixl), ("mooncake", mooncake))
]
_names = itertools.count()

LAYOUTS = {
    "full": KVLayout((KVGroup(0, "full", (0, 1, 2), None, 32, 2, 16, "bfloat16"),)),
    "window": KVLayout(
        (
            KVGroup(0, "full", (0, 2), None, 32, 2, 16, "bfloat16"),
            KVGroup(1, "window", (1, 3), 64, 32, 2, 16, "bfloat16"),
        )
    ),
    "int8": KVLayout((KVGroup(0, "full", (0, 1), None, 32, 2, 16, "int8"),)),
}


def random_memory(layout: KVLayout, num_blocks: int, seed: int) -> KVMemory:
    rng = np.random.default_rng(seed)
    sizes = {layer: group.layer_bytes for group in layout.groups for layer in group.layers}
    pools = [rng.integers(0, 256, (num_blocks, sizes[layer]), np.uint8) for layer in range(len(sizes))]
    return KVMemory(layout, pools)


def send_move(
    move_id: int,
    to: str,
    src: Sequence[Sequence[int]],
    dst: Sequence[Sequence[int]],
    *,
    transfer_id: str = "t",
    epoch: int = 1,
    after_step: int = -1,
) -> KVMove:
    places = Place(DEVICE, _tuples(src)), Place(to, _tuples(dst))
    return KVMove(move_id, transfer_id, "r", *places, epoch=epoch, after_step=after_step)


def receive_move(move_id: int, dst: Sequence[Sequence[int]], *, transfer_id: str = "t", epoch: int = 1) -> KVMove:
    return KVMove(move_id, transfer_id, "r", Place("tcp://prefill:1"), Place(DEVICE, _tuples(dst)), epoch=epoch)


def _tuples(ids: Sequence[Sequence[int]]) -> tuple[tuple[int, ...], ...]:
    return tuple(tuple(int(block) for block in each) for each in ids)


def wait(mover: LinkMover, count: int = 1, timeout_s: float = TIMEOUT_S) -> list[MoveResult]:
    """The next `count` results."""
    results: list[MoveResult] = []
    deadline = time.monotonic() + timeout_s
    while len(results) < count:
        assert time.monotonic() < deadline, f"only {results} within {timeout_s} s"
        results += mover.poll()
        time.sleep(0.001)
    return results


def wait_until(condition: Any, timeout_s: float = TIMEOUT_S) -> None:
    deadline = time.monotonic() + timeout_s
    while not condition():
        assert time.monotonic() < deadline, "it never came true"
        time.sleep(0.002)


class Pair:
    """Rank P sends to rank D."""

    def __init__(self, scheme: str, layout: KVLayout, num_blocks: int, **sender: Any) -> None:
        self.layout = layout
        self.p_memory, self.d_memory = random_memory(layout, num_blocks, 1), random_memory(layout, num_blocks, 2)
        self.counter = StepCounter()
        address = LISTEN[scheme].format(name=f"d{next(_names)}")
        p, d = Identity("prefill-0", layout.format, SECRET), Identity("decode-0", layout.format, SECRET)
        self.d = LinkMover(self.d_memory, StepCounter(), d, [address])
        self.p = LinkMover(self.p_memory, self.counter, p, **sender)
        self.address = self.d.addresses[0]

    def close(self) -> None:
        self.p.close()
        self.d.close()

    def assert_arrived(self, src: Sequence[Sequence[int]], dst: Sequence[Sequence[int]]) -> None:
        """D's blocks hold what P's hold, but those with id 0; all others of D are as they were."""
        before = random_memory(self.layout, self.d_memory.num_blocks(0), 2)
        for layer, pool in enumerate(before.pools):
            group = self.d_memory.group_of[layer]
            for s, d in zip(src[group], dst[group], strict=True):
                if d:
                    pool[d] = self.p_memory.pools[layer][s]
            np.testing.assert_array_equal(self.d_memory.pools[layer], pool)


@contextmanager
def pair(scheme: str, layout: KVLayout, num_blocks: int = 40, **sender: Any) -> Iterator[Pair]:
    made = Pair(scheme, layout, num_blocks, **sender)
    try:
        yield made
    finally:
        made.close()
