"""Engines of one machine: processors are dealt out once, memory is shared, and all take prompts of one length."""

from __future__ import annotations

import dataclasses

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from penstock.build.cluster import complete_groups, deal_cores
from penstock.config.hardware import probe
from penstock.config.load import resolve
from penstock.config.memory import MemoryPlanError
from penstock.config.roles import role_groups


@settings(deadline=None)
@given(cores=st.integers(0, 128), num_threads=st.lists(st.integers(1, 64), min_size=1, max_size=16))
def test_processors_are_dealt_once_or_not_at_all(cores: int, num_threads: list[int]) -> None:
    shares = deal_cores(range(cores), num_threads)
    assert len(shares) == len(num_threads)
    dealt = [core for share in shares for core in share]
    assert len(set(dealt)) == len(dealt)
    assert all(shares) or not dealt
    if sum(num_threads) <= cores:
        assert all(len(share) >= number for share, number in zip(shares, num_threads, strict=True))


def test_roles_have_their_own_settings_and_one_length() -> None:
    roles = '{"prefill": {"kv_cache_memory_bytes": "4M", "num_threads": 1}, "decode": {"kv_cache_memory_bytes": "32M"}}'
    config = resolve({"pd": roles}, environ={})
    machine = dataclasses.replace(probe(), num_cores=8, memory_free_bytes=8 << 30)
    prefill, decode = complete_groups(config, role_groups(config.cluster), machine)
    assert prefill.memory.num_blocks < decode.memory.num_blocks
    assert (prefill.config.runtime.num_threads, decode.config.runtime.num_threads) == (1, 4)
    assert prefill.config.model.max_model_len == decode.config.model.max_model_len
    assert prefill.layout == decode.layout


def test_who_does_not_fit_is_named() -> None:
    machine = dataclasses.replace(probe(), memory_free_bytes=3 << 30)
    roles = '{"prefill": 2, "decode": {"kv_cache_memory_bytes": "4G"}}'
    for settings_, names in (
        ({"pd": "1P1D", "kv_cache_memory_bytes": "4G"}, "prefill-0, decode-0"),
        ({"pd": roles, "kv_cache_memory_bytes": "8M"}, "decode-0"),
    ):
        config = resolve(settings_, environ={})
        with pytest.raises(MemoryPlanError, match=f"{names}: each has to do with its share"):
            complete_groups(config, role_groups(config.cluster), machine)
