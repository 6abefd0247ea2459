"""Whether settings of a server that is one of several can be, as far as they alone tell."""

from __future__ import annotations

from penstock.config.kv_events import FLAG, event_settings
from penstock.config.schema import ClusterOptions
from penstock.config.values import ConfigError

EVERYWHERE = ("", "*", "0.0.0.0", "::", "[::]")


def check_cluster(options: ClusterOptions) -> None:
    """One engine, an address, and the secret of the others. Raises ConfigError."""
    events = event_settings(options.kv_events_config)
    flag = FLAG if events is not None else "--kv-role" if options.kv_role is not None else ""
    if flag and (options.pd is not None or options.data_parallel_size > 1):
        message = "for servers with one engine: a router outside cannot choose among several behind one port"
        raise ConfigError(message, f"{flag} with --pd or --data-parallel-size")
    if options.cluster_secret is not None and not options.cluster_secret.strip():
        raise ConfigError("it is empty; without the flag a random one is drawn", "--cluster-secret")
    if options.kv_role is None:
        return
    if not options.cluster_secret:
        raise ConfigError("the servers of a cluster need the same --cluster-secret", "--kv-role")
    if options.kv_link == "shm":
        raise ConfigError("shared memory ends at this server, and it is one of several (--kv-role)", "--kv-link")
    if options.cluster_host in EVERYWHERE:
        raise ConfigError("others dial it: name one address of this machine", "--cluster-host")
