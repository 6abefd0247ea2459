"""Blocks in a Redis or Valkey server that machines share. The server evicts by itself (`maxmemory-policy allkeys-lru`).

Names carry the layout and a namespace, so that one server can serve several models and tensor-parallel layouts. No call
raises: a server that is gone, slow or refuses the password gives `error`, and the pool pauses the tier.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Sequence
from typing import Any, TypeVar

import numpy as np

from penstock.config.model import KVLayout
from penstock.core.tiering import key_group
from penstock.tiers.record import RecordFormat

try:
    import redis
except ImportError as error:
    raise ImportError("a remote KV tier needs an extra: pip install 'penstock[redis]'") from error

PREFIX = b"penstock:1:"
BATCH = 16  # blocks of one command pipeline
Answer = TypeVar("Answer")


class RedisStore:
    """A `Store` (core/doors.py) with `find`. `url` as redis-py takes it: redis://[user:password@]host:port/db.

    A call takes at most about `timeout_s` for a dead server, per batch of blocks for a slow one. `expire_s`: how long a
    block is kept after it was written; None leaves that to the server.
    """

    def __init__(
        self, url: str, layout: KVLayout, namespace: str = "", timeout_s: float = 1.0, expire_s: int | None = None
    ) -> None:
        self.formats = [RecordFormat.of(group) for group in layout.groups]
        self.expire_s = expire_s
        self.error: str | None = None
        self.num_bad = 0
        self.where = url.rpartition("@")[2].removeprefix("redis://").removeprefix("rediss://")  # without the password
        digest = hashlib.blake2b(f"{layout.format}\n{namespace}".encode(), digest_size=8).hexdigest()
        self._prefix = PREFIX + digest.encode() + b":"
        self._client: Any = redis.Redis.from_url(
            url,
            socket_timeout=timeout_s,
            socket_connect_timeout=timeout_s,
            retry=None,  # the pool's pause is the retry
            protocol=2,
        )

    def find(self, keys: Sequence[bytes]) -> list[bool]:
        """Which are there now."""

        def ask(batch: Sequence[bytes]) -> list[bool]:
            pipeline = self._client.pipeline(transaction=False)
            for key in batch:
                pipeline.exists(self._prefix + key)
            return [bool(answer) for answer in pipeline.execute()]

        return self._in_batches(keys, 64 * BATCH, ask, False)

    def read(self, keys: Sequence[bytes], into: Sequence[memoryview]) -> list[bool]:
        """Fill the buffers of those that are there, whole and unharmed."""
        buffers = dict(zip(keys, into, strict=True))

        def get(batch: Sequence[bytes]) -> list[bool]:
            values = self._client.mget([self._prefix + key for key in batch])
            return [self._accept(key, value, buffers[key]) for key, value in zip(batch, values, strict=True)]

        return self._in_batches(keys, BATCH, get, False)

    def _accept(self, key: bytes, value: bytes | None, buffer: memoryview) -> bool:
        if value is None:
            return False
        format_ = self.formats[key_group(key)]
        if len(value) != format_.num_bytes or not format_.is_whole(np.frombuffer(value, np.uint8), key):
            self.num_bad += 1
            self._client.delete(self._prefix + key)
            return False
        buffer[:] = value
        return True

    def write(self, keys: Sequence[bytes], blocks: Sequence[memoryview]) -> list[bool]:
        """Which were stored. What is not the whole block `key` is not."""
        content = dict(zip(keys, blocks, strict=True))

        def put(batch: Sequence[bytes]) -> list[bool]:
            whole = [self.formats[key_group(key)].is_whole(np.frombuffer(content[key], np.uint8), key) for key in batch]
            pipeline = self._client.pipeline(transaction=False)
            for key, good in zip(batch, whole, strict=True):
                if good:
                    pipeline.set(self._prefix + key, content[key], ex=self.expire_s)
            answers = iter(pipeline.execute())
            return [good and bool(next(answers)) for good in whole]

        return self._in_batches(keys, BATCH, put, False)

    def delete(self, keys: Sequence[bytes]) -> None:
        def drop(batch: Sequence[bytes]) -> list[bool]:
            self._client.delete(*(self._prefix + key for key in batch))
            return [True] * len(batch)

        self._in_batches(keys, 64 * BATCH, drop, False)

    def close(self) -> None:
        self._client.close()

    def _in_batches(
        self, keys: Sequence[bytes], size: int, call: Callable[[Sequence[bytes]], list[Answer]], missing: Answer
    ) -> list[Answer]:
        """After the first error the rest is not tried."""
        self.error = None
        answers: list[Answer] = []
        try:
            for start in range(0, len(keys), size):
                answers += call(keys[start : start + size])
        except redis.RedisError as error:
            self.error = f"{self.where}: {error}"
        return answers + [missing] * (len(keys) - len(answers))
