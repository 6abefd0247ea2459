"""The pretended network: what each fault does, and that one seed gives one run."""

from __future__ import annotations

from hypothesis import given, settings
from hypothesis import strategies as st

from penstock.sim.clock import VirtualClock
from penstock.sim.wire import LineFaults, PretendedNetwork

chances = st.floats(0, 0.5)
faults = st.builds(LineFaults, st.floats(0, 0.1), st.floats(0, 0.1), chances, chances, chances)


def run(seed, lines, sends, killed_at=None):
    """Every arrival as (time, party, peer, message), for messages n sent at `sends[n]` in turn by a and b."""
    clock, arrived = VirtualClock(), []

    def on_arrival(party, peer):
        arrived.extend((clock.now(), party, peer, m) for m in network.wire(party, peer).receive())

    network = PretendedNetwork(clock, seed, lines, on_arrival)
    for n, when in enumerate(sends):
        party, peer = ("a", "b") if n % 2 else ("b", "a")
        clock.call_at(when, lambda n=n, party=party, peer=peer: network.wire(party, peer).send(n))
    if killed_at is not None:
        clock.call_at(killed_at, lambda: network.kill("b"))
    clock.run()
    return arrived, network


@given(st.integers(0, 99), faults, st.lists(st.floats(0, 1), max_size=40))
@settings(deadline=None)
def test_one_seed_one_run_and_every_message_is_accounted_for(seed, lines, sends):
    """The same arrivals twice; sent + doubled = arrived + lost; nothing arrives before it was sent."""
    arrived, network = run(seed, lines, sends)
    again, _ = run(seed, lines, sends)
    assert arrived == again
    assert network.num_sent + network.num_doubled == len(arrived) + network.num_lost
    assert all(time >= sends[n] + lines.delay_s for time, _, _, n in arrived)


@given(st.integers(0, 99), st.lists(st.floats(0, 1), max_size=40))
@settings(deadline=None)
def test_without_faults_each_line_keeps_order(seed, sends):
    arrived, _ = run(seed, LineFaults(0.01, 0.5), sends)
    for party in "ab":
        order = [n for _, to, _, n in arrived if to == party]
        assert order == sorted(order, key=lambda n: (sends[n], n))
    assert len(arrived) == len(sends)


@given(st.integers(0, 99), st.lists(st.floats(0, 1), max_size=40), st.floats(0, 1.2))
@settings(deadline=None)
def test_the_dead_get_nothing(seed, sends, killed_at):
    arrived, _ = run(seed, LineFaults(0.05, 0.05, 0, 0.2, 0.2), sends, killed_at)
    assert all(time <= killed_at for time, to, _, _ in arrived if to == "b")
    assert {n for _, to, _, n in arrived if to == "a"} == {
        n for n in range(0, len(sends), 2) if sends[n] < killed_at or (sends[n] == killed_at)
    }


def test_cuts_lose_stalls_delay_and_a_new_life_reads_nothing_old():
    clock = VirtualClock()
    network = PretendedNetwork(clock, 1)
    a, b = network.wire("a", "b"), network.wire("b", "a")
    network.cut(["a"], ["b"])
    a.send(1)
    network.heal()
    a.send(2)
    network.stall("a", "b", 5.0)
    a.send(3)
    a.send(4)
    b.send("back")
    clock.run_until(1.0)
    assert list(b.receive()) == [2] and list(a.receive()) == ["back"]
    clock.run_until(5.0)
    assert list(b.receive()) == [3, 4] and network.num_lost == 1
    network.set_faults(LineFaults(delay_s=1.0), "a", "b")
    a.send("to the old life")
    network.kill("b")
    network.revive("b")
    a.send("to the new life")
    clock.run()
    assert list(b.receive()) == ["to the new life"]
