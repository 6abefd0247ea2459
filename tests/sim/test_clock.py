"""Virtual time: order, ties, and streams that do not disturb each other."""

from __future__ import annotations

from hypothesis import given, settings
from hypothesis import strategies as st

from penstock.sim.clock import VirtualClock, stream


@given(st.lists(st.tuples(st.floats(0, 10), st.integers(0, 3)), max_size=40))
@settings(deadline=None)
def test_events_run_in_order_of_time_then_of_asking(asked):
    """Also those that events ask for, also those for the past; time never goes back."""
    clock, ran = VirtualClock(), []

    def event(name, when, more):
        def run():
            ran.append((clock.now(), name))
            assert clock.now() >= when
            for n in range(more):
                clock.call_at(clock.now() - n, event((*name, n), clock.now() - n, 0))

        return run

    for n, (when, more) in enumerate(asked):
        clock.call_at(when, event((n,), when, more))
    assert clock.run()
    assert [time for time, _ in ran] == sorted(time for time, _ in ran)
    assert len(ran) == len(asked) + sum(more for _, more in asked) == clock.num_events
    firsts = [name for _, name in ran if len(name) == 1]
    assert firsts == sorted(firsts, key=lambda name: (asked[name[0]][0], name[0]))


def test_run_until_stops_at_its_time():
    clock, ran = VirtualClock(), []
    for when in (1.0, 2.0, 3.0):
        clock.call_at(when, lambda when=when: ran.append(when))
    clock.run_until(2.0)
    assert ran == [1.0, 2.0] and clock.now() == 2.0 and clock.next_s == 3.0
    clock.run_until(2.5)
    assert clock.now() == 2.5 and not clock.run(max_events=0) and clock.run() and clock.next_s is None


def test_streams_are_their_own():
    assert stream(1, "a").random() == stream(1, "a").random()
    assert len({stream(*key).random() for key in ((1, "a"), (1, "b"), (2, "a"), (1, "a", "b"))}) == 4
