"""Engines that hang: who is held to be dead, when, and what becomes of its requests. On virtual time, and a pipe."""

from __future__ import annotations

import itertools
import os
from collections.abc import Callable

import pytest
from tests.cluster.node import Node
from tests.cluster.whole import Cluster, Setting
from tests.fakes.host_tier import TierFaults

from penstock.cluster.beat_pipe import BeatReader, beating
from penstock.cluster.beats import MAX_LOOK_S, STUCK_S, Pulse, Silences

ROLES = {"p0": "prefill", "p1": "prefill", "d0": "decode", "d1": "decode"}
FOR_EVER_S = 1e6


def test_an_engine_beats_while_it_goes_on_and_not_for_long_after() -> None:
    pulse = Pulse(0.0)
    assert all(pulse.beats(mark, float(mark)) for mark in range(3))
    assert pulse.beats(2, 2.0 + STUCK_S - 1)
    assert not pulse.beats(2, 2.0 + STUCK_S)
    assert pulse.beats(3, 100.0), "a layer is done: it was a long one"


def test_the_silent_are_named_and_the_others_are_not() -> None:
    silences = Silences(10.0)
    looks = [silences.look(["a", "b"], {"a"}, second) for second in range(12)]
    assert looks == [[]] * 11 + [["b"]]


def test_an_engine_is_not_blamed_for_what_nobody_listened_to() -> None:
    """Neither before it came, nor while the front end was stopped itself."""
    silences = Silences(10.0)
    for second in range(100):
        silences.look([], set(), second)
    assert silences.look(["a"], set(), 100.0) == []
    assert silences.look(["a"], set(), 1000.0) == [] and MAX_LOOK_S < 10
    assert silences.look(["a"], {"a"}, 1001.0) == []


def test_no_limit_no_death() -> None:
    silences = Silences(0.0)
    assert not any(silences.look(["a"], set(), second) for second in range(1000))


def test_beats_go_through_a_pipe() -> None:
    reader, goes_on = BeatReader(), itertools.count()
    assert not reader.heard()
    thread = beating(reader.writer, lambda: next(goes_on))
    thread.join(0.6)
    assert reader.heard() and not reader.heard()
    reader.close()
    assert not reader.heard()
    thread.join(20.0)
    assert not thread.is_alive(), "nobody is left to hear it"
    os.close(reader.writer)


@pytest.mark.parametrize("victim", ["p0", "d0"])
@pytest.mark.parametrize("harm", [lambda node: node.stop(FOR_EVER_S), lambda node: node.stick(FOR_EVER_S)])
def test_what_hangs_is_killed_and_its_requests_go_on(victim: str, harm: Callable[[Node], None]) -> None:
    """Also where nobody else could decode."""
    roles = {name: role for name, role in ROLES.items() if name != "d1"}
    cluster = Cluster(Setting(roles=roles, hang_s=1.0, stuck_s=2.0), seed=3)
    cluster.clock.run_until(0.1)
    asks = [cluster.ask([300 + n] * 20, 40) for n in range(4)]
    cluster.clock.run_until(0.16)
    harm(cluster.nodes[victim])
    cluster.run(until_s=20.0)
    cluster.check()
    assert cluster.happened["hung"] == 1 and cluster.lives[victim] == 2
    assert all(ask.error is None and ask.reasons[0] in ("stop", "length") for ask in asks)


def test_a_long_step_is_no_hang() -> None:
    """It takes five times as long as an engine may be silent, and layers of it are done all the time."""
    cluster = Cluster(Setting(roles=ROLES, hang_s=0.5, stuck_s=0.5), seed=4)
    cluster.clock.run_until(0.1)
    ask = cluster.ask([310] * 20, 8)
    cluster.clock.run_until(0.12)
    node = cluster.nodes["p0"]
    node.stick(2.5)
    for n in range(25):
        cluster.clock.call_in(0.1 * n, lambda: setattr(node, "num_marks", node.num_marks + 1))
    cluster.run(until_s=20.0)
    cluster.check()
    assert ask.error is None and cluster.happened["hung"] == 0 and cluster.lives["p0"] == 1


def test_what_a_dead_engine_held_in_the_pool_goes_at_once() -> None:
    """Its pins would stand until their lease ends, here after the test."""
    setting = Setting(roles={"p0": "prefill", "d0": "decode"}, hang_s=0.5, tiers=TierFaults(lease_s=FOR_EVER_S))
    cluster = Cluster(setting, seed=5)
    cluster.clock.run_until(0.1)
    for n in range(3):
        cluster.ask([320 + n] * 30, 4)
    while not any(source.startswith("p0") for source, _ in cluster.pool.pool._holds):
        assert cluster.clock.now() < 5 and cluster.clock.step(), "the prefill engine holds nothing at any moment"
    cluster.nodes["p0"].stop(FOR_EVER_S)
    cluster.run(until_s=20.0)
    cluster.check()
    assert cluster.happened["hung"] == 1
