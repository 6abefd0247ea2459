"""Engines that change their role in a real server, and are killed in the middle of it: every answer is one engine's."""

from __future__ import annotations

import os
import re
import signal
from concurrent.futures import ThreadPoolExecutor

import pytest
from tests.e2e.pd import COMMON, KV_BYTES, Reference, ask, asked, engine_pids
from tests.e2e.serving import RealServer, until

from penstock.nn.kernels.native import usable_kernels

pytestmark = pytest.mark.skipif(
    not usable_kernels(), reason="bit-equal with native kernels only, which were not built or not for this machine"
)

# A role that has two engines gives one away, decode first, at the end of every window, whatever the load is.
FLIPPING = """
import sys
from penstock import cli
from penstock.cluster import roles
from penstock.core.scaling import Need, Signals

class Flipping:
    def __init__(self, limits):
        pass

    def observe(self, window, now):
        flip = ("decode", "prefill") if window.num_decode > 1 else ("prefill", "decode")
        return Signals(Need(0.0, 0.0, 0.0), flip, {}, "it is told to")

roles.RoleScaler = Flipping
limits = roles.ScalingLimits(window_s=1.0)
roles.ScalingLimits = lambda: limits
sys.exit(cli.main(sys.argv[1:]))
"""


def leaving(server: RealServer) -> list[str]:
    """Engines that have begun to change their role, in order."""
    return re.findall(r"(\S+) leaves role", server.errors())


def changed(server: RealServer) -> list[str]:
    """Engines that have arrived in their new role."""
    return re.findall(r"(\S+) is a \w+ engine from now on", server.errors())


def on_its_way(server: RealServer) -> str | None:
    """The engine that changes its role now."""
    begun = leaving(server)
    return begun[-1] if len(begun) > len(changed(server)) else None


def test_engines_that_are_killed_while_they_change_their_role() -> None:
    arguments = [each for each in COMMON if each != "--no-pd-scaling"]
    settings = ("--pd", "2P2D", "--pd-scaling", "--engine-restarts", "20", "--kv-cache-memory-bytes", KV_BYTES)
    one = Reference()
    requests = [asked(500, 7000 + n, max_tokens=600, temperature=0.8, seed=n) for n in range(6)]
    expected = [one.answers(request) for request in requests]
    try:
        with RealServer(*settings, *arguments, program=("-c", FLIPPING)) as server, ThreadPoolExecutor(6) as threads:
            server.until_ready()
            names = set(engine_pids(server))
            found = [threads.submit(ask, server, request) for request in requests]
            victim = until(lambda: on_its_way(server), 60, "a drain")
            os.kill(engine_pids(server)[victim], signal.SIGKILL)
            assert [each.result() for each in found] == expected
            until(lambda: f"engine {victim}: its process ended with SIGKILL" in server.errors(), what="a word about it")
            until(lambda: set(engine_pids(server)) == names, 60, "an engine started again")
            num_changed = len(changed(server))
            until(lambda: len(changed(server)) > num_changed, 60, "a change that comes to its end")
            found = [threads.submit(ask, server, request) for request in requests]
            os.kill(engine_pids(server)[changed(server)[-1]], signal.SIGKILL)
            assert [each.result() for each in found] == expected
            until(lambda: set(engine_pids(server)) == names, 60, "an engine started again")
            until(server.is_idle, 60, "giving all blocks back")
            assert "Traceback" not in server.errors()
    finally:
        one.close()
