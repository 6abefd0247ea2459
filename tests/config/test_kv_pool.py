"""Addresses of pools, and what they need."""

from __future__ import annotations

import pytest

from penstock.config.kv_pool import check_pool, listen_address, peer_address, pool_settings, remote_name
from penstock.config.load import resolve
from penstock.config.values import ConfigError


def test_addresses() -> None:
    assert peer_address("penstock://host-a:7000") == "tcp://host-a:7000"
    assert peer_address("penstock://[::1]:7000/") == "tcp://[::1]:7000"
    assert peer_address("redis://127.0.0.1:6379/0") is None and peer_address(None) is None
    assert listen_address("0.0.0.0:7000") == "tcp://0.0.0.0:7000"


@pytest.mark.parametrize("place", ["", "host", "host:", ":7000", "host:port", "host:70000", "::1:7000", "[host]:7000"])
def test_what_is_no_address_is_refused_by_the_flag_that_said_it(place: str) -> None:
    for call, flag in ((lambda: peer_address(f"penstock://{place}"), "--kv-remote-url"),
                       (lambda: listen_address(place), "--kv-pool-listen")):  # fmt: skip
        with pytest.raises(ConfigError, match=flag):
            call()


def test_a_remote_is_named_without_its_password() -> None:
    assert remote_name("redis://:secret@host:6379/0") == remote_name("redis://host:6379/0") == "host:6379/0"
    assert remote_name("penstock://host-a:7000") == "host-a:7000" and remote_name("") == ""


def test_pools_that_speak_to_each_other_need_a_secret() -> None:
    for given, flag in (
        ({"kv_pool_listen": "127.0.0.1:7000"}, "--kv-pool-listen"),
        ({"kv_remote_url": "penstock://127.0.0.1:7000"}, "--kv-remote-url"),
    ):
        with pytest.raises(ConfigError, match=f"(?s){flag}.*--cluster-secret|--cluster-secret.*{flag}"):
            check_pool(resolve(given, environ={}))
        config = resolve({**given, "cluster_secret": "s"}, environ={})
        check_pool(config)
        assert pool_settings(config).secret == "s"
    check_pool(resolve({"kv_remote_url": "redis://127.0.0.1:1/0"}, environ={}))
    for url in ("foo://127.0.0.1:1", "127.0.0.1:6379", "redis:/127.0.0.1"):
        with pytest.raises(ConfigError, match=r"--kv-remote-url: it begins with none of redis://.*penstock://"):
            check_pool(resolve({"kv_remote_url": url}, environ={}))
