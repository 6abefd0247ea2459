"""Each KV link tried between two processes with pools of their own: does it work, how fast, and what follows from that.

`python -m penstock.build.links LINK` is the receiving process. Knows links and layouts; no model, no engine, no torch.
"""

from __future__ import annotations

import math
import secrets
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import msgspec
import numpy as np

from penstock.config.model import KVLayout
from penstock.core.moves import DEVICE, KVMove, MoveResult, Place
from penstock.transfer.coalesce import LinkCost
from penstock.transfer.counter import StepCounter
from penstock.transfer.frames import Identity, LinkError
from penstock.transfer.memory import KVMemory
from penstock.transfer.mover import LinkMover

LISTEN = {
    "local": "local://doctor",
    "shm": "shm://",
    "tcp": "tcp://127.0.0.1:0",
    "nixl": "nixl://127.0.0.1:0",
    "mooncake": "mooncake://127.0.0.1:0",
}
ROUNDS = 3  # of which the fastest counts: the first touches the memory
TIMEOUT_S = 30.0


class LinkFault(RuntimeError):
    """A link does not work; why, in one line for people."""


@dataclass(frozen=True, slots=True)
class LinkFigures:
    """What one link was measured to do. `message_s`: seconds of a message that carries nothing, one way."""

    link: str
    num_bytes: int
    seconds: float  # from the start of the sending until all of it is in the receiver's pool, and checked
    message_s: float

    @property
    def bytes_per_s(self) -> float:
        return self.num_bytes / self.seconds

    def layerwise_from(self, layout: KVLayout) -> int:
        """Tokens from which on one layer is worth a message of its own (transfer.coalesce)."""
        cost = LinkCost(self.bytes_per_s, self.message_s)
        per_token = max(group.layer_bytes / group.block_size for group in layout.groups)
        return math.ceil(cost.min_message_bytes / per_token)


class _Spec(msgspec.Struct):
    """What the receiving process is told."""

    layout: KVLayout
    num_blocks: int
    secret: str


class _Sent(msgspec.Struct):
    """What left the sender in one round, or why nothing did."""

    num_units: int = 0
    checksum: int = 0
    error: str = ""


def measure(link: str, layout: KVLayout, num_bytes: int) -> LinkFigures:
    """Send about `num_bytes` of random KV over a link, into another process unless it is "local". Raises LinkFault."""
    num_blocks = max(1, num_bytes // sum(group.block_bytes for group in layout.groups))
    spec = _Spec(layout, num_blocks, secrets.token_hex(16))
    try:
        if link == "local":
            return _measure_local(spec)
        return _measure_processes(link, spec)
    except (OSError, ValueError, msgspec.MsgspecError) as error:
        raise LinkFault(f"{error.strerror or error}" if isinstance(error, OSError) else str(error)) from None


def _memory(spec: _Spec, content: int) -> KVMemory:
    """Pools that fit; block 0 is nobody's. Every unit's bytes differ, and are told apart by their sum."""
    sizes = {layer: group.layer_bytes for group in spec.layout.groups for layer in group.layers}
    draw = np.random.default_rng(content)
    pools = [np.zeros((spec.num_blocks + 1, sizes[layer]), np.uint8) for layer in range(len(sizes))]
    if content:
        for pool in pools:
            pool.view()[:] = draw.integers(0, 256, pool.shape[1], np.uint8)
            pool[:, :8] = np.arange(len(pool), dtype=np.uint64).view(np.uint8).reshape(-1, 8)
    return KVMemory(spec.layout, pools)


def _move(number: int, spec: _Spec, where: str, *, sends: bool) -> KVMove:
    ids = tuple(tuple(range(1, spec.num_blocks + 1)) for _ in spec.layout.groups)
    here, there = Place(DEVICE, ids), Place(where, ids)
    src, dst = (here, there) if sends else (there, here)
    return KVMove(number, f"round {number}", "doctor", src, dst, epoch=1)


def _await(mover: LinkMover) -> MoveResult:
    until_s = time.monotonic() + TIMEOUT_S
    while time.monotonic() < until_s:
        for result in mover.poll():
            if result.error is not None:
                raise LinkFault(result.error)
            return result
        time.sleep(2e-4)
    raise LinkFault(f"nothing has arrived within {TIMEOUT_S:g} s")


def _rounds(
    link: str, spec: _Spec, sender: LinkMover, address: str, begin: Callable[[int], None], end: Callable[[_Sent], None]
) -> LinkFigures:
    """The sender's part. `begin` and `end`: what the receiver is told before and after each round."""
    found: list[tuple[float, int]] = []
    for number in range(ROUNDS):
        begin(number)
        started_s = time.monotonic()
        sender.start(_move(number, spec, address, sends=True))
        try:
            sent = _await(sender)
        except LinkFault as fault:
            end(_Sent(error=str(fault)))
            raise
        end(_Sent(sent.num_units, sent.checksum))
        found.append((time.monotonic() - started_s, sent.num_bytes))
    seconds, num_bytes = min(found)
    cost = sender.stats()[address].cost
    assert cost is not None
    return LinkFigures(link, num_bytes, seconds, cost.message_s)


def _measure_local(spec: _Spec) -> LinkFigures:
    sender, receiver = (
        LinkMover(
            _memory(spec, content), StepCounter(), Identity(name, spec.layout.format, spec.secret.encode()), listen
        )
        for name, content, listen in (("sender", 1, []), ("receiver", 0, [LISTEN["local"]]))
    )
    number = 0

    def begin(next_number: int) -> None:
        nonlocal number
        number = next_number
        receiver.start(_move(number, spec, "sender", sends=False))

    def end(sent: _Sent) -> None:
        if not sent.error:
            receiver.expect(number, sent.num_units, sent.checksum)
            _await(receiver)

    try:
        return _rounds("local", spec, sender, receiver.addresses[0], begin, end)
    finally:
        sender.close()
        receiver.close()


def _measure_processes(link: str, spec: _Spec) -> LinkFigures:
    command = [sys.executable, "-m", "penstock.build.links", link]
    process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    assert process.stdin is not None and process.stdout is not None and process.stderr is not None
    lines = process.stdout
    killer = threading.Timer(2 * TIMEOUT_S, process.kill)  # a receiver that hangs must not hang its judge
    killer.start()

    def tell(message: Any) -> None:
        assert process.stdin is not None
        process.stdin.write(msgspec.json.encode(message) + b"\n")
        process.stdin.flush()

    def hear() -> str:
        """The receiver's next word. Raises LinkFault for its error, or its end."""
        assert process.stderr is not None
        for line in lines:
            word, _, rest = line.decode().strip().partition(" ")
            if word == "ok":
                return rest
            if word == "bad":
                raise LinkFault(rest)  # all else is what a library says to itself
        last = process.stderr.read().decode().strip().splitlines()[-1:]
        raise LinkFault(f"the receiving process ended{': ' + last[0] if last else ''}")

    sender: LinkMover | None = None
    try:
        tell(spec)
        address = hear()
        identity = Identity("sender", spec.layout.format, spec.secret.encode())
        sender = LinkMover(_memory(spec, 1), StepCounter(), identity)

        def begin(number: int) -> None:
            hear()

        def end(sent: _Sent) -> None:
            tell(sent)
            hear()

        return _rounds(link, spec, sender, address, begin, end)
    finally:
        killer.cancel()
        if sender is not None:
            sender.close()
        process.kill()
        process.communicate()


def receive(link: str) -> None:
    """The receiving process: what it is to do comes on standard input, "ok ..." or "bad ..." goes out, line by line."""
    try:
        spec = msgspec.json.decode(sys.stdin.readline(), type=_Spec)
        identity = Identity("receiver", spec.layout.format, spec.secret.encode())
        mover = LinkMover(_memory(spec, 0), StepCounter(), identity, [LISTEN[link]])
    except LinkError as error:
        print("bad", error, flush=True)
        return
    except (OSError, ValueError) as error:
        print(f"bad cannot listen at {LISTEN[link]}: {error}", flush=True)
        return
    try:
        print(f"ok {mover.addresses[0]}", flush=True)
        for number in range(ROUNDS):
            mover.start(_move(number, spec, "sender", sends=False))
            print("ok", number, flush=True)
            sent = msgspec.json.decode(sys.stdin.readline(), type=_Sent)
            mover.expect(number, sent.num_units, sent.checksum)
            _await(mover)
            print("ok", number, flush=True)
    except (LinkFault, ValueError) as error:
        print("bad", error, flush=True)
    finally:
        mover.close()


if __name__ == "__main__":
    receive(sys.argv[1])
