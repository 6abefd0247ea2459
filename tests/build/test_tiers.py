"""What opening an engine's tiers refuses."""

from __future__ import annotations

import pytest
from tests.tiers.tier_blocks import ONE

from penstock.build.tiers import open_tiers
from penstock.config.kv_pool import PoolSettings
from penstock.config.schema import CacheOptions
from penstock.config.values import ConfigError


def test_an_engine_without_a_server_shares_no_pool() -> None:
    cache = CacheOptions(kv_offloading_size=1 << 20, kv_pool_listen="127.0.0.1:0")
    with pytest.raises(ConfigError, match="--kv-pool-listen"):
        open_tiers(PoolSettings(cache, "secret"), ONE, [], None)
