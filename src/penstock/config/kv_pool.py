"""What a machine's KV pool is made from, and the addresses by which pools of several machines find each other.

Knows texts; opens no socket.
"""

from __future__ import annotations

from dataclasses import dataclass

from penstock.config.schema import CacheOptions, Config
from penstock.config.values import ConfigError

SCHEME = "penstock://"
REMOTE_SCHEMES = ("redis", "rediss", "unix", "mooncake", "penstock")


@dataclass(frozen=True, slots=True)
class PoolSettings:
    """`secret`: the cluster's, where other machines' pools are asked or let in."""

    cache: CacheOptions
    secret: str = ""


def pool_settings(config: Config) -> PoolSettings:
    return PoolSettings(config.cache, config.cluster.cluster_secret or "")


def peer_address(url: str | None) -> str | None:
    """ "tcp://host:port" of "penstock://host:port"; None where the URL names no pool. Raises ConfigError."""
    if url is None or not url.startswith(SCHEME):
        return None
    return _tcp_address(url.removeprefix(SCHEME), "--kv-remote-url", "penstock://HOST:PORT")


def listen_address(place: str) -> str:
    """ "tcp://host:port" of "host:port". Raises ConfigError."""
    return _tcp_address(place.removeprefix(SCHEME), "--kv-pool-listen", "HOST:PORT")


def remote_name(url: str) -> str:
    """Host and port, without a password: the same for all machines that share it."""
    return url.partition("://")[2].rpartition("@")[2].partition("?")[0].rstrip("/")


def check_pool(config: Config) -> None:
    """Addresses, and the secret without which none is of use. Raises ConfigError."""
    cache = config.cache
    if cache.kv_pool_listen is not None:
        listen_address(cache.kv_pool_listen)
    if cache.kv_remote_url is not None:
        scheme, colon, _ = cache.kv_remote_url.partition("://")
        if not colon or scheme not in REMOTE_SCHEMES:
            known = ", ".join(f"{each}://" for each in REMOTE_SCHEMES)
            raise ConfigError(f"it begins with none of {known}", "--kv-remote-url")  # it may hold a password
    flag = "--kv-pool-listen" if cache.kv_pool_listen is not None else ""
    if peer_address(cache.kv_remote_url) is not None:
        flag = flag or "--kv-remote-url"
    if flag and not config.cluster.cluster_secret:
        raise ConfigError("pools that speak to each other need the same --cluster-secret", flag)


def _tcp_address(place: str, flag: str, form: str) -> str:
    host, colon, port = place.rstrip("/").rpartition(":")
    bare = host.removeprefix("[").removesuffix("]")
    if not (colon and bare and port.isdecimal() and int(port) < 65536) or ((":" in bare) != host.startswith("[")):
        raise ConfigError(f"{place!r} is not {form}", flag)
    return f"tcp://{host}:{port}"
