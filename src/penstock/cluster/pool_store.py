"""Another machine's pool as a tier of this one: its host memory and its disk, over TCP.

It answers from its own tiers alone, so two pools may name each other. No call raises: a peer that is gone, slow, of
another layout or without the secret gives `error`, and the pool pauses the tier. Knows records and the connection; not
who wants a block.
"""

from __future__ import annotations

import os
import socket
import time
from collections.abc import Callable, Iterator, Sequence

import numpy as np

from penstock.cluster.pool_frames import (
    LEAST_BYTES_S,
    MAX_BYTES,
    MAX_FIND,
    MAX_RECORDS,
    Find,
    Get,
    Put,
    RecordLine,
    pool_identity,
    why,
)
from penstock.config.model import KVLayout
from penstock.core.tiering import key_group
from penstock.tiers.record import RecordFormat
from penstock.transfer.frames import LinkError
from penstock.transfer.streams import Greeting
from penstock.transfer.tcp import parse, prepare


class PeerStore:
    """A `Store` (core/doors.py) with `find`. `address`: "tcp://host:port" where the other pool listens.

    A call on a peer that says nothing takes about `timeout_s`; on one that is slow, as long as LEAST_BYTES_S needs
    more. The connection is kept from call to call, and made again when it was lost.
    """

    def __init__(self, address: str, layout: KVLayout, secret: str, timeout_s: float = 1.0) -> None:
        self.address = address
        self.formats = [RecordFormat.of(group) for group in layout.groups]
        self.timeout_s = timeout_s
        self.error: str | None = None
        self.num_bad = 0
        self._place = parse(address)
        self._identity = pool_identity(f"the KV pool of {socket.gethostname()} ({os.getpid()})", layout, secret)
        self._line: RecordLine | None = None

    def find(self, keys: Sequence[bytes]) -> list[bool]:
        """Which are there now."""

        def ask(line: RecordLine, part: slice) -> list[bool]:
            line.say(Find(tuple(keys[part])), self._deadline(0))
            return list(line.flags(len(keys[part]), self._deadline(0)))

        return self._in_parts(len(keys), (slice(n, n + MAX_FIND) for n in range(0, len(keys), MAX_FIND)), ask)

    def read(self, keys: Sequence[bytes], into: Sequence[memoryview]) -> list[bool]:
        """Fill the buffers of those that are there, whole and unharmed."""

        def get(line: RecordLine, part: slice) -> list[bool]:
            asked, buffers = keys[part], into[part]
            deadline_s = self._deadline(sum(map(len, buffers)))
            line.say(Get(tuple(asked)), deadline_s)
            found = list(line.flags(len(asked), deadline_s))
            for n, (key, buffer) in enumerate(zip(asked, buffers, strict=True)):
                if found[n]:
                    line.receive(buffer, deadline_s)
                    found[n] = self._is_whole(key, buffer)
                    self.num_bad += not found[n]
            return found

        return self._in_parts(len(keys), self._parts(keys), get)

    def write(self, keys: Sequence[bytes], blocks: Sequence[memoryview]) -> list[bool]:
        """Which the peer holds now. What is not the whole block `key` is not sent."""
        whole = [self._is_whole(key, block) for key, block in zip(keys, blocks, strict=True)]
        chosen = [n for n, good in enumerate(whole) if good]
        mine, records = [keys[n] for n in chosen], [blocks[n] for n in chosen]

        def put(line: RecordLine, part: slice) -> list[bool]:
            asked, views = mine[part], records[part]
            deadline_s = self._deadline(sum(map(len, views)))
            heads = [
                self._format(key).header(np.frombuffer(view, np.uint8)) for key, view in zip(asked, views, strict=True)
            ]
            assert None not in heads  # they are whole
            parents = tuple(head.parent for head in heads if head is not None)
            line.say(Put(tuple(asked), parents, tuple(h.recompute_s for h in heads if h is not None)), deadline_s)
            wanted = line.flags(len(asked), deadline_s)
            line.send([view for view, is_wanted in zip(views, wanted, strict=True) if is_wanted], deadline_s)
            return list(line.flags(len(asked), deadline_s))

        stored = self._in_parts(len(mine), self._parts(mine), put)
        for n, good in zip(chosen, stored, strict=True):
            whole[n] = good
        return whole

    def delete(self, keys: Sequence[bytes]) -> None:
        """Nothing: the peer evicts by itself."""
        self.error = None

    def close(self) -> None:
        if self._line is not None:
            self._line.close()
            self._line = None

    def _format(self, key: bytes) -> RecordFormat:
        return self.formats[key_group(key)]

    def _is_whole(self, key: bytes, record: memoryview) -> bool:
        return self._format(key).is_whole(np.frombuffer(record, np.uint8), key)

    def _parts(self, keys: Sequence[bytes]) -> Iterator[slice]:
        """As many blocks as one message may carry."""
        start = num_bytes = 0
        for n, key in enumerate(keys):
            size = self._format(key).num_bytes
            if n > start and (num_bytes + size > MAX_BYTES or n - start == MAX_RECORDS):
                yield slice(start, n)
                start, num_bytes = n, 0
            num_bytes += size
        if start < len(keys):
            yield slice(start, len(keys))

    def _deadline(self, num_bytes: int) -> float:
        return time.monotonic() + self.timeout_s + num_bytes / LEAST_BYTES_S

    def _in_parts(
        self, number: int, parts: Iterator[slice], call: Callable[[RecordLine, slice], list[bool]]
    ) -> list[bool]:
        """After the first error the rest is not tried."""
        self.error = None
        answers: list[bool] = []
        try:
            for part in parts:
                answers += self._once_more(call, part)
        except (OSError, EOFError, LinkError) as error:
            self.error = f"{self.address}: {why(error)}"
            self.close()
        return answers + [False] * (number - len(answers))

    def _once_more(self, call: Callable[[RecordLine, slice], list[bool]], part: slice) -> list[bool]:
        """On a kept connection that turns out to be closed, again on a new one: the peer may have been started anew."""
        if self._line is not None:
            try:
                return call(self._line, part)
            except (ConnectionError, EOFError):
                self.close()
        self._line = self._dial()
        return call(self._line, part)

    def _dial(self) -> RecordLine:
        sock = socket.create_connection(self._place, timeout=self.timeout_s)
        try:
            prepare(sock)
            Greeting(sock, self._identity, self.address).dial()
        except BaseException:
            sock.close()
            raise
        return RecordLine(sock)
