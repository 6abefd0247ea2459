"""The tiers that a configuration asks for, opened: host memory, disk, remote store, and the pool over them.

Knows settings, stores and the pool. Knows no engine.
"""

from __future__ import annotations

import importlib
import logging
from collections.abc import Callable
from pathlib import Path

from penstock.config.model import KVLayout
from penstock.config.schema import CacheOptions
from penstock.config.values import ConfigError
from penstock.core.kv_pool import KVPool
from penstock.core.tiering import TierSettings
from penstock.tiers.arena import Arena, slots_for
from penstock.tiers.disk import DiskStore, StoreRefused
from penstock.tiers.driver import PoolDriver, TierStore
from penstock.tiers.mooncake import MooncakeStore
from penstock.tiers.record import RecordFormat

log = logging.getLogger("penstock.tiers")

LEAST_SLOTS = 64  # of host memory: lower tiers pass through it


def host_slots(options: CacheOptions, layout: KVLayout) -> tuple[int, ...]:
    """Slots of host memory per KV group. Raises ConfigError for a size that holds next to nothing."""
    assert options.kv_offloading_size is not None
    slots = slots_for(layout, options.kv_offloading_size)
    if min(slots) < LEAST_SLOTS:
        size = sum(RecordFormat.of(group).num_bytes for group in layout.groups)
        message = f"{options.kv_offloading_size} bytes hold {min(slots)} blocks of {size}; at least {LEAST_SLOTS} do"
        raise ConfigError(message, "--kv-offloading-size")
    return slots


def open_pool(
    options: CacheOptions,
    layout: KVLayout,
    arena: Arena,
    remote: TierStore | None = None,
    wake: Callable[[], None] = lambda: None,
) -> PoolDriver:
    """The pool at work. `remote`: the store of the remote tier where its URL names none that this room knows.

    Raises ConfigError for a disk or a store that cannot be used.
    """
    stores: dict[str, TierStore] = {}
    settings: list[TierSettings] = []
    disk: DiskStore | None = None
    if options.kv_disk_path is not None:
        try:
            disk = DiskStore(Path(options.kv_disk_path).expanduser(), layout, options.kv_disk_size)
        except StoreRefused as error:
            raise ConfigError(str(error), "--kv-disk-path") from None
        stores["disk"] = disk
        settings.append(TierSettings("disk", disk.num_blocks, options.kv_lower_write_policy))
    if options.kv_remote_url is not None:
        stores["remote"] = remote or _remote(options.kv_remote_url, layout)
        settings.append(TierSettings("remote", None, options.kv_lower_write_policy))
    record_bytes = [RecordFormat.of(group).num_bytes for group in layout.groups]
    pool = KVPool(record_bytes, arena.num_slots, settings, options.kv_eviction_policy)
    driver = PoolDriver(pool, arena, stores, wake)
    if disk is not None and len(disk):
        pool.adopt("disk", disk.recovered(), 0.0)
        log.info("KV tier disk: %d blocks found in %s", len(disk), options.kv_disk_path)
    return driver


def _remote(url: str, layout: KVLayout) -> TierStore:
    """The store that a URL names. Raises ConfigError for one that names none, or whose library is missing."""
    try:
        if url.startswith("mooncake://"):
            return MooncakeStore(url, layout)
        store: TierStore = importlib.import_module("penstock.tiers.redis").RedisStore(url, layout)
    except (ImportError, ValueError) as error:
        raise ConfigError(str(error), "--kv-remote-url") from None
    return store
