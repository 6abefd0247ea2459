"""Blocks in a Mooncake Store: the memory that machines lend it, found through its master, which also evicts.

The URL: mooncake://HOST:PORT of the master, and `?lend=SIZE` for how much of this machine's memory the store may use
(none: others lend). The store knows no passwords: its network must be trusted. Names carry the layout and a namespace.
No call raises: a master that is gone gives `error`, and the pool pauses the tier.
"""

from __future__ import annotations

import contextlib
import hashlib
import os
import socket
from collections.abc import Callable, Sequence
from typing import Any, TypeVar
from urllib.parse import parse_qsl, urlsplit

import numpy as np

from penstock.config.hardware import has_rdma
from penstock.config.model import KVLayout
from penstock.config.values import ConfigError, parse_size
from penstock.core.tiering import key_group
from penstock.tiers.record import RecordFormat

PREFIX = "penstock:1:"
BATCH = 16  # blocks of one call
MISSING, FULL = -704, -200  # its error codes for a name that is not there, and for no memory left
MIN_BUFFER_BYTES = 16 << 20  # of the library's own
Answer = TypeVar("Answer")


def load() -> Any:
    """The library's client. Raises ImportError with what is to be installed."""
    os.environ.setdefault("MC_LOG_LEVEL", "ERROR")  # before it is loaded; else it tells each of its steps
    try:
        from mooncake.store import MooncakeDistributedStore
    except ImportError as error:
        raise ImportError(
            "a tier in Mooncake Store needs an extra: pip install 'penstock[mooncake-cpu]', or 'penstock[mooncake]' on "
            f"a machine with CUDA; and libibverbs1 from the system, with or without RDMA ({error})"
        ) from error
    return MooncakeDistributedStore


def parse(url: str) -> tuple[str, int, int]:
    """(host, port, bytes to lend) of a URL. Raises ValueError."""
    parts = urlsplit(url)
    try:
        options = dict(parse_qsl(parts.query, strict_parsing=True)) if parts.query else {}
        lend = parse_size(options.pop("lend", "0"))
        host, port = parts.hostname, parts.port
    except (ValueError, ConfigError) as error:
        raise ValueError(f"{url!r} is not mooncake://host:port?lend=SIZE: {error}") from None
    if parts.scheme != "mooncake" or not host or not port or parts.path or parts.username or options:
        raise ValueError(f"{url!r} is not mooncake://host:port?lend=SIZE")
    return host, port, lend


class MooncakeStore:
    """A `Store` (core/doors.py) with `find`. Connects at once if the master is there, else when it is first used.

    Blocks go through a registered buffer of this store: what comes is looked at before it enters the arena, and the
    library never knows the arena. A call to a master that is gone takes at most about `timeout_s`, and up to about 5 s
    when it goes in the middle of one.
    """

    def __init__(self, url: str, layout: KVLayout, namespace: str = "", timeout_s: float = 1.0) -> None:
        """Raises ValueError for a URL that is none, ImportError where the library is missing."""
        self._host, self._port, self._lend = parse(url)
        self._kind = load()
        self.formats = [RecordFormat.of(group) for group in layout.groups]
        self.error: str | None = None
        self.num_bad = 0
        self.where = f"Mooncake Store at {self._host}:{self._port}"
        self._timeout_s = timeout_s
        digest = hashlib.blake2b(f"{layout.format}\n{namespace}".encode(), digest_size=8).hexdigest()
        self._prefix = f"{PREFIX}{digest}:"
        self._slots = np.zeros((BATCH, max(format_.num_bytes for format_ in self.formats)), np.uint8)
        self._addresses = [int(slot.ctypes.data) for slot in self._slots]
        self._client: Any = None
        self._must_look = True  # whether the master is there, before a call: the library would wait for minutes
        self.find([])  # the first request would not wait for a client that has yet to start

    def find(self, keys: Sequence[bytes]) -> list[bool]:
        """Which are there now."""

        def ask(batch: Sequence[bytes]) -> list[bool]:
            found = self._client.batch_is_exist(self._names(batch))
            self._check([code for code in found if code < 0])
            return [code == 1 for code in found]

        return self._in_batches(keys, 64 * BATCH, ask, False)

    def read(self, keys: Sequence[bytes], into: Sequence[memoryview]) -> list[bool]:
        """Fill the buffers of those that are there, whole and unharmed."""
        buffers = dict(zip(keys, into, strict=True))

        def get(batch: Sequence[bytes]) -> list[bool]:
            sizes = [self.formats[key_group(key)].num_bytes for key in batch]
            found = self._client.batch_get_into(self._names(batch), self._addresses[: len(batch)], sizes)
            self._check([code for code in found if code < 0 and code != MISSING])
            return [
                code != MISSING and self._accept(key, self._slots[n, :size], code, buffers[key])
                for n, (key, size, code) in enumerate(zip(batch, sizes, found, strict=True))
            ]

        return self._in_batches(keys, BATCH, get, False)

    def _accept(self, key: bytes, content: Any, num_bytes: int, buffer: memoryview) -> bool:
        if num_bytes != len(content) or not self.formats[key_group(key)].is_whole(content, key):
            self.num_bad += 1
            self._client.batch_remove(self._names([key]), True)  # forced: it was just read, and is leased for that
            return False
        buffer[:] = content.data
        return True

    def write(self, keys: Sequence[bytes], blocks: Sequence[memoryview]) -> list[bool]:
        """Which were stored. What is not the whole block `key` is not, nor what finds no room."""
        content = dict(zip(keys, blocks, strict=True))

        def put(batch: Sequence[bytes]) -> list[bool]:
            whole = [
                key
                for key in batch
                if self.formats[key_group(key)].is_whole(np.frombuffer(content[key], np.uint8), key)
            ]
            if not whole:
                return [False] * len(batch)
            for slot, key in zip(self._slots, whole):
                slot[: len(content[key])] = np.frombuffer(content[key], np.uint8)
            sizes = [len(content[key]) for key in whole]
            found = self._client.batch_put_from(self._names(whole), self._addresses[: len(whole)], sizes)
            self._check([code for code in found if code < 0 and code != FULL])
            if all(code == FULL for code in found):
                self.error = f"{self.where}: no room: machines lend it memory by ?lend=SIZE"
            stored = {key for key, code in zip(whole, found, strict=True) if code == 0}
            return [key in stored for key in batch]

        return self._in_batches(keys, BATCH, put, False)

    def delete(self, keys: Sequence[bytes]) -> None:
        def drop(batch: Sequence[bytes]) -> list[bool]:
            found = self._client.batch_remove(self._names(batch), True)
            self._check([code for code in found if code < 0 and code != MISSING])
            return [True] * len(batch)

        self._in_batches(keys, 64 * BATCH, drop, False)

    def close(self) -> None:
        """Also takes back the memory that was lent, with the blocks in it."""
        if self._client is not None:
            self._client.close()
            self._client = None

    def _names(self, keys: Sequence[bytes]) -> list[str]:
        return [self._prefix + key.hex() for key in keys]

    def _check(self, codes: Sequence[int]) -> None:
        if codes:
            raise _StoreError(f"error {codes[0]}")

    def _connect(self) -> None:
        """Look whether the master is there; become its client unless that was done."""
        if not self._must_look:
            return
        with socket.create_connection((self._host, self._port), timeout=self._timeout_s) as sock:
            here = sock.getsockname()[0]
        if self._client is None:
            client, protocol = self._kind(), "rdma" if has_rdma() else "tcp"
            buffer_bytes = max(MIN_BUFFER_BYTES, 2 * self._slots.nbytes)
            master = f"[{self._host}]:{self._port}" if ":" in self._host else f"{self._host}:{self._port}"
            name = f"[{here}]" if ":" in here else here
            code = client.setup(name, "P2PHANDSHAKE", self._lend, buffer_bytes, protocol, "", master)
            code = code or client.register_buffer(int(self._slots.ctypes.data), self._slots.nbytes)
            if code:
                with contextlib.suppress(Exception):
                    client.close()
                raise _StoreError(f"the client does not start over {protocol}: error {code}")
            self._client = client
        self._must_look = False

    def _in_batches(
        self, keys: Sequence[bytes], size: int, call: Callable[[Sequence[bytes]], list[Answer]], missing: Answer
    ) -> list[Answer]:
        """After the first error the rest is not tried."""
        self.error = None
        answers: list[Answer] = []
        try:
            self._connect()
            for start in range(0, len(keys), size):
                answers += call(keys[start : start + size])
        except (OSError, _StoreError) as error:
            self.error = f"{self.where}: {error}"
            self._must_look = True
        return answers + [missing] * (len(keys) - len(answers))


class _StoreError(Exception):
    """The library said no; with its code."""
