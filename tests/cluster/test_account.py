"""What engines count of hand-offs and links, and that every prompt token has one source."""

from __future__ import annotations

import pytest
from tests.cluster.world import Setting, World

from penstock.cluster.account import link_reports
from penstock.cluster.prefill_side import PrefillSide
from penstock.engine.messages import HandOffs, Report
from penstock.transfer.sender import PeerStats


def by_source(world: World, name: str) -> dict[str, int]:
    return dict(world.nodes[name].member.engine.timeline.by_source)


def handoffs(world: World, name: str) -> HandOffs:
    told = world.nodes[name].member.engine.reporter.handoffs()
    assert told is not None
    return told


def test_prompts_are_counted_at_both_ends_and_their_tokens_once() -> None:
    world = World(Setting(), seed=1)
    world.ask(range(200, 240), 6, "d0", ["p0"])
    world.run()
    world.ask(range(200, 260), 6, "d1", ["p0"])  # p0 has the first 40 in its cache, d1 nothing
    world.run()
    world.ask(range(200, 205), 6, "d0", ["p0"])  # too short to be handed over
    world.run()
    world.check()
    assert handoffs(world, "p0").num_sent == 2
    assert (handoffs(world, "d0").num_received, handoffs(world, "d0").num_local) == (1, 1)
    assert (handoffs(world, "d1").tokens_received, handoffs(world, "d1").tokens_received_cached) == (60, 40)
    for name in world.names:
        told = handoffs(world, name)
        assert told.num_sending == told.num_receiving == 0
    assert by_source(world, "p0") == {}, "who decodes counts"
    assert by_source(world, "d0") == {"peer": 40, "device": 4, "compute": 1}
    assert by_source(world, "d1") == {"peer": 60}


def test_each_token_has_one_source_when_peers_die_and_blocks_run_out() -> None:
    for seed in range(20):
        world = World(Setting(num_blocks=24), seed=seed)
        for number in range(8):
            first = 200 + 13 * (number % 3)
            world.ask(range(first, first + 30 + number), 9, f"d{number % 2}", ["p0", "p1"])
        world.clock.call_in(0.02, lambda world=world: world.kill("p0"))
        world.run()
        world.check()
        for name in world.decodes:
            counters = world.nodes[name].scheduler.counters
            assert sum(by_source(world, name).values()) == counters.prompt_tokens, (seed, by_source(world, name))


def test_a_report_follows_when_all_is_over() -> None:
    """What is in flight is told as long as it is, and then once that it is not."""
    world = World(Setting(), seed=3)
    told: dict[str, Report] = {}
    for node in world.nodes.values():
        reporter = node.member.engine.reporter
        reporter.name = node.name
        send = reporter.due

        def due(now: float, send=send) -> Report | None:  # type: ignore[no-untyped-def]
            report = send(now)
            if report is not None:
                told[report.name] = report
            return report

        reporter.due = due  # type: ignore[method-assign]
    world.ask(range(200, 260), 40, "d0", ["p0"])
    world.run()
    for name in ("p0", "d0"):
        last = told[name]
        assert last.handoffs is not None
        assert last.num_running == last.guests_running == last.handoffs.num_sending == last.handoffs.num_receiving == 0
    assert told["p0"].handoffs is not None and told["p0"].handoffs.num_sent == 1
    assert told["d0"].prompt_tokens_by_source == {"peer": 60}


def test_links_are_told_by_the_peers_names() -> None:
    stats = {
        "shm:///tmp/old": PeerStats(100, 2, 1, 0, 1, busy_s=1e-7, overlappable_s=1e-7, exposed_s=5e-8),
        "shm:///tmp/new": PeerStats(300, 4, 2, 1, 1, busy_s=1e-7, overlappable_s=1e-7, exposed_s=0.0),
        "tcp://1.2.3.4:5": PeerStats(),
    }
    names = {"shm:///tmp/old": "decode-0", "shm:///tmp/new": "decode-0"}
    first, second = link_reports(stats, names, PrefillSide("f"))
    assert (first.peer, first.scheme, first.num_bytes, first.num_transfers, first.num_failed) == (
        "decode-0", "shm", 400, 3, 1,
    )  # fmt: skip
    assert first.gigabytes_per_s == pytest.approx(2.0) and first.overlap == pytest.approx(0.75)
    assert (second.peer, second.scheme, second.overlap) == ("tcp://1.2.3.4:5", "tcp", 0.0)
