"""The tiers of an engine: the pool in this process, or the way to the one that its machine's engines share."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from penstock.cluster.pool import STATUS_S, PoolWire, open_machine_pool
from penstock.config.kv_pool import PoolSettings
from penstock.config.model import KVLayout
from penstock.config.schema import CacheOptions
from penstock.config.values import ConfigError
from penstock.core.pool_status import pool_status
from penstock.core.scheduler import Scheduler
from penstock.core.tier_client import TierClient
from penstock.core.tier_costs import PrefillRate
from penstock.core.tiering import ClientSettings, ToEngine, ToPool, WantContents
from penstock.engine.tier_source import TierSource
from penstock.tiers.arena import Arena
from penstock.tiers.driver import PoolDriver
from penstock.tiers.mover import TierMover
from penstock.tiers.open import host_slots

ENGINE = "engine"  # this process's name to its own pool


class LocalPool:
    """A PoolLine to a pool in this process."""

    def __init__(self, driver: PoolDriver) -> None:
        self.driver = driver
        self._answers: list[ToEngine] = []
        self._told_s = float("-inf")

    def send(self, message: ToPool | WantContents, now: float) -> None:
        assert not isinstance(message, WantContents)  # it tells no router
        self._answers += [answer for _, answer in self.driver.handle(ENGINE, message, now)]

    def receive(self, now: float) -> Sequence[ToEngine]:
        answers, self._answers = self._answers, []
        if now - self._told_s > STATUS_S:
            self._told_s = now
            answers.append(pool_status(self.driver.pool))
        return answers + [answer for _, answer in self.driver.poll(now)]

    def is_lost(self, now: float) -> bool:
        return False

    def close(self) -> None:
        self.driver.close()


@dataclass(slots=True)
class Tiers:
    """What an engine needs of its tiers. `close` when it has ended."""

    line: LocalPool | PoolWire
    mover: TierMover
    prefill: PrefillRate

    def source(self, options: CacheOptions, layout: KVLayout, scheduler: Scheduler) -> TierSource:
        settings = ClientSettings(write=options.kv_write_policy, min_tokens=2 * layout.block_size)
        return TierSource(scheduler, TierClient(layout, settings, self.prefill), self.line)

    def close(self) -> None:
        self.mover.close()
        self.line.close()


def open_tiers(
    settings: PoolSettings, layout: KVLayout, pools: Sequence[NDArray[np.uint8]], directory: str | None
) -> Tiers:
    """`pools`: the device's memory by layer; `directory`: where the machine's shared pool is, None for one of its own.

    Raises PoolGone, ConfigError, OSError, ValueError.
    """
    if directory is None:
        if settings.cache.kv_pool_listen is not None:
            raise ConfigError("a server's pool can be shared; this engine has none", "--kv-pool-listen")
        arena = Arena.private(layout, host_slots(settings.cache, layout))
        line: LocalPool | PoolWire = LocalPool(open_machine_pool(settings, layout, arena))
    else:
        line = PoolWire(directory, layout)
        arena = line.join()
    mover = TierMover(layout, pools, arena)
    if isinstance(line, PoolWire):
        line.on_arena = mover.use
    return Tiers(line, mover, PrefillRate())
