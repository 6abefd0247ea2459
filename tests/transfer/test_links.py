"""Moves over each link: whole, in chunks behind a step counter, cancelled, stale, with peers that die or stall."""

from __future__ import annotations

import socket
import threading
import time

import numpy as np
import pytest
from tests.transfer.rig import (
    EXTRAS,
    LAYOUTS,
    LISTEN,
    SECRET,
    pair,
    random_memory,
    receive_move,
    send_move,
    wait,
    wait_until,
)

from penstock.config.model import KVGroup, KVLayout
from penstock.core.moves import DEVICE, KVMove, Place
from penstock.transfer.counter import StepCounter
from penstock.transfer.frames import Identity
from penstock.transfer.mover import LinkMover
from penstock.transfer.throttle import TokenBucket

SCHEMES = ["local", "tcp", "shm", *EXTRAS]
links = pytest.mark.parametrize("scheme", SCHEMES)
# 64 blocks of 32 KiB in each of 2 layers: 4 MiB, enough for a slow link to be caught in the middle.
BIG = KVLayout((KVGroup(0, "full", (0, 1), None, 32, 8, 32, "bfloat16"),))


@links
@pytest.mark.parametrize("name", LAYOUTS)
def test_a_whole_transfer_arrives_byte_for_byte(scheme: str, name: str) -> None:
    """Every wanted block, of every layer, in the right place, and nothing anywhere else; scales travel along."""
    rng = np.random.default_rng(3)
    with pair(scheme, LAYOUTS[name]) as rig:
        src = [rng.permutation(np.arange(1, 40))[:20] for _ in rig.layout.groups]
        dst = [rng.permutation(np.arange(1, 40))[:20] for _ in rig.layout.groups]
        for ids in dst[1:]:
            ids[:15] = 0  # before the window: not wanted
        units = sum(np.count_nonzero(ids) * len(g.layers) for ids, g in zip(dst, rig.layout.groups, strict=True))
        rig.d.start(receive_move(7, dst))
        rig.p.start(send_move(9, rig.address, src, dst))
        (sent,) = wait(rig.p)
        assert (sent.id, sent.error, sent.num_units) == (9, None, units)
        assert rig.d.poll() == []  # nobody has said how much there is to come
        rig.d.expect(7, sent.num_units, sent.checksum)
        (arrived,) = wait(rig.d)
        assert (arrived.id, arrived.error) == (7, None)
        assert (arrived.num_units, arrived.num_bytes, arrived.checksum) == (units, sent.num_bytes, sent.checksum)
        rig.assert_arrived(src, dst)


@links
@pytest.mark.parametrize("mode", ["layerwise", "coalesced", "whole"])
def test_chunks_follow_the_steps(scheme: str, mode: str) -> None:
    """One move per step, each ended by the last layer that it has blocks in and not before; together they are whole."""
    with pair(scheme, LAYOUTS["window"], mode=mode) as rig:
        src = [list(range(1, 31)), list(range(30, 0, -1))]
        dst = [list(range(10, 40)), [0] * 24 + list(range(1, 7))]
        rig.d.start(receive_move(0, dst))
        results = []
        for n in range(3):
            chunk = slice(10 * n, 10 * n + 10)
            step = 5 + n
            rig.p.start(send_move(n, rig.address, [s[chunk] for s in src], [d[chunk] for d in dst], after_step=step))
            rig.counter.begin(step)
            last = 3 if any(dst[1][chunk]) else 2  # the full group has layers 0 and 2, the window group 1 and 3
            for _ in range(last):
                rig.counter.layer_done()
            time.sleep(0.02)
            assert rig.p.poll() == []
            rig.counter.layer_done()
            results += wait(rig.p)
            assert results[-1].id == n
            rig.counter.end()
        assert [r.error for r in results] == [None] * 3
        rig.d.expect(0, sum(r.num_units for r in results), sum(r.checksum for r in results))
        assert wait(rig.d)[0].error is None
        rig.assert_arrived(src, dst)
        stats = rig.p.stats()[rig.address]
        assert stats.num_moves == 3
        assert stats.exposed_s > 0
        if mode == "layerwise":
            assert stats.num_messages == 2 + 2 + 4
        if mode == "whole":
            assert stats.num_messages == 3


@links
def test_expect_may_come_first(scheme: str) -> None:
    with pair(scheme, LAYOUTS["full"]) as rig:
        ids = [[1, 2, 3, 9]]
        checksum = sum(rig.p_memory.checksum(layer, ids[0]) for layer in range(3))
        rig.d.start(receive_move(1, ids))
        rig.d.expect(1, 12, checksum)
        assert rig.d.poll() == []
        rig.p.start(send_move(1, rig.address, ids, ids))
        (arrived,) = wait(rig.d)
        assert arrived.error is None
        rig.assert_arrived(ids, ids)


@links
def test_a_sum_that_differs_is_an_error(scheme: str) -> None:
    with pair(scheme, LAYOUTS["full"]) as rig:
        ids = [[1, 2, 3]]
        rig.d.start(receive_move(1, ids))
        rig.p.start(send_move(1, rig.address, ids, ids))
        (sent,) = wait(rig.p)
        rig.d.expect(1, sent.num_units, sent.checksum ^ 1)
        (arrived,) = wait(rig.d)
        assert arrived.error is not None
        assert "checksum" in arrived.error


@links
def test_too_much_is_an_error(scheme: str) -> None:
    with pair(scheme, LAYOUTS["full"]) as rig:
        ids = [[1, 2, 3]]
        rig.d.start(receive_move(1, ids))
        rig.p.start(send_move(1, rig.address, ids, ids))
        rig.d.expect(1, 3, 0)
        (arrived,) = wait(rig.d)
        assert arrived.error is not None
        assert "too much" in arrived.error


@links
def test_stale_epochs_and_strangers_write_nothing(scheme: str) -> None:
    """A frame of another epoch, of an unknown transfer or for blocks that are not reserved leaves the pool alone."""
    with pair(scheme, LAYOUTS["full"]) as rig:
        ids = [[1, 2, 3]]
        rig.d.start(receive_move(1, ids, epoch=2))
        rig.p.start(send_move(1, rig.address, ids, ids, epoch=1))
        rig.p.start(send_move(2, rig.address, ids, ids, transfer_id="another", epoch=2))
        assert [r.error for r in wait(rig.p, 2)] == [None, None]
        wait_until(lambda: rig.d.received()["unknown"] == 2)
        rig.assert_arrived([[]], [[]])
        assert rig.d.poll() == []
        rig.p.start(send_move(3, rig.address, ids, [[2, 3, 4]], epoch=2))
        (arrived,) = wait(rig.d)
        assert arrived.error == "prefill-0 sent blocks that were not reserved for transfer t"
        rig.assert_arrived([[]], [[]])


@links
def test_a_cancelled_send_ends_soon_and_its_memory_is_free(scheme: str) -> None:
    """In the middle of a slow transfer: the result comes at once, what P writes into its blocks then never counts at D,
    and the next move over the same connection arrives whole."""
    with pair(scheme, BIG, 80, throttle=TokenBucket(8e6)) as rig:
        ids = [list(range(1, 65))]
        rig.d.start(receive_move(1, ids))
        rig.p.start(send_move(1, rig.address, ids, ids))
        wait_until(lambda: (rig.d_memory.pools[0][1] == rig.p_memory.pools[0][1]).all())
        begin = time.monotonic()
        rig.p.cancel(1)
        (sent,) = wait(rig.p)
        took_s = time.monotonic() - begin
        assert sent.error == "cancelled"
        assert took_s < 2.0  # the filler that completes its frame takes longer than that, but nobody waits for it
        for pool in rig.p_memory.pools:
            pool[1:65] = 0xEE  # reused
        rig.d.cancel(1)
        assert wait(rig.d)[0].error == "cancelled"
        rig.d.start(receive_move(2, [[70]], transfer_id="next"))
        rig.p.start(send_move(2, rig.address, [[66]], [[70]], transfer_id="next"))
        (sent,) = wait(rig.p)
        assert sent.error is None
        rig.d.expect(2, sent.num_units, sent.checksum)
        assert wait(rig.d)[0].error is None
        np.testing.assert_array_equal(rig.d_memory.pools[1][70], rig.p_memory.pools[1][66])


@links
def test_after_a_cancelled_receipt_no_byte_is_written(scheme: str) -> None:
    """D cancels in the middle and reuses the blocks at once, while P sends on and does not know."""
    with pair(scheme, BIG, 80, throttle=TokenBucket(20e6)) as rig:
        ids = [list(range(1, 65))]
        rig.d.start(receive_move(1, ids))
        rig.p.start(send_move(1, rig.address, ids, ids))
        wait_until(lambda: (rig.d_memory.pools[0][1] == rig.p_memory.pools[0][1]).all())
        rig.d.cancel(1)
        assert wait(rig.d)[0].error == "cancelled"
        for pool in rig.d_memory.pools:
            pool[:] = 0x55
        assert wait(rig.p)[0].error is None
        counts = rig.d.received
        wait_until(lambda: counts()["late"] + counts()["unknown"] > 0)
        for pool in rig.d_memory.pools:
            assert (pool == 0x55).all()


@links
def test_queued_moves_are_cancelled_at_once(scheme: str) -> None:
    """One that waits for a step which never comes, and does not hold up others."""
    with pair(scheme, LAYOUTS["full"]) as rig:
        rig.p.start(send_move(1, rig.address, [[1]], [[1]], after_step=3))
        rig.p.start(send_move(2, rig.address, [[2]], [[2]]))
        assert [(r.id, r.error) for r in wait(rig.p)] == [(2, None)]
        rig.p.cancel(1)
        rig.p.cancel(1)
        rig.p.cancel(99)
        assert [(r.id, r.error) for r in wait(rig.p)] == [(1, "cancelled")]
        time.sleep(0.02)
        assert rig.p.poll() == []


@links
def test_another_secret_or_format_is_refused(scheme: str) -> None:
    """The sender's move ends with an error that names both sides; the receiver is unharmed."""
    layout = LAYOUTS["full"]
    with pair(scheme, layout) as rig:
        for identity, reason in [
            (Identity("prefill-9", layout.format, b"wrong"), "does not hold this cluster's secret"),
            (Identity("prefill-9", LAYOUTS["int8"].format, SECRET), "KV format"),
        ]:
            memory = random_memory(LAYOUTS["int8"] if reason == "KV format" else layout, 4, 5)
            mover = LinkMover(memory, StepCounter(), identity)
            try:
                mover.start(send_move(1, rig.address, [[1]], [[1]]))
                (sent,) = wait(mover)
                assert sent.error is not None
                for part in (reason, "decode-0", "prefill-9", rig.address):
                    assert part in sent.error
            finally:
                mover.close()
        rig.d.start(receive_move(1, [[1]]))
        rig.p.start(send_move(1, rig.address, [[1]], [[1]]))
        assert wait(rig.p)[0].error is None


@links
def test_a_peer_that_closes_ends_its_moves_and_may_come_back(scheme: str) -> None:
    layout = LAYOUTS["full"]
    with pair(scheme, layout) as rig:
        rig.p.start(send_move(1, rig.address, [[1]], [[1]]))
        assert wait(rig.p)[0].error is None
        rig.p.start(send_move(2, rig.address, [[1]], [[1]], after_step=1))  # waits for a step
        rig.d.close()
        (sent,) = wait(rig.p)
        assert sent.error is not None
        assert rig.address in sent.error
        rig.p.start(send_move(3, rig.address, [[1]], [[1]]))
        (sent,) = wait(rig.p)
        assert sent.error is not None
        assert "cannot reach" in sent.error
        if scheme == "shm":  # its private directory went with it
            return
        again = LinkMover(rig.d_memory, StepCounter(), Identity("decode-0", layout.format, SECRET), [rig.address])
        try:
            again.start(receive_move(1, [[1]]))
            rig.p.start(send_move(4, rig.address, [[1]], [[1]]))
            (sent,) = wait(rig.p)
            assert sent.error is None
            again.expect(1, sent.num_units, sent.checksum)
            assert wait(again)[0].error is None
        finally:
            again.close()


def test_a_stalled_peer_delays_only_itself() -> None:
    """It greets and never reads: its move ends in time with an error, can be cancelled, and others go on meanwhile."""
    layout = LAYOUTS["full"]
    with socket.create_server(("127.0.0.1", 0)) as server, pair("tcp", layout, stall_s=1.0) as rig:
        stalled = f"tcp://127.0.0.1:{server.getsockname()[1]}"
        rig.p.start(send_move(1, stalled, [[1]], [[1]]))
        for n in range(2, 12):
            rig.p.start(send_move(n, rig.address, [[1]], [[1]]))
        rig.p.start(send_move(20, stalled, [[1]], [[1]]))
        first = wait(rig.p, 10)
        assert {r.id for r in first} == set(range(2, 12))
        assert all(r.error is None for r in first)
        rig.p.cancel(20)
        assert [(r.id, r.error) for r in wait(rig.p)] == [(20, "cancelled")]
        (sent,) = wait(rig.p)
        assert sent.id == 1
        assert sent.error is not None
        assert stalled in sent.error


@links
def test_close_ends_everything(scheme: str) -> None:
    with pair(scheme, BIG, 80, throttle=TokenBucket(4e6)) as rig:
        ids = [list(range(1, 65))]
        rig.d.start(receive_move(1, ids))
        rig.p.start(send_move(1, rig.address, ids, ids))
        rig.p.start(send_move(2, rig.address, ids, ids, after_step=9))
        wait_until(lambda: (rig.d_memory.pools[0][1] == rig.p_memory.pools[0][1]).all())
        rig.p.close()
        rig.d.close()
        assert sorted(r.id for r in rig.p.poll() if r.error) == [1, 2]
        assert [r.id for r in rig.d.poll() if r.error] == [1]
        rig.p.start(send_move(3, rig.address, ids, ids))
        assert [r.id for r in rig.p.poll() if r.error] == [3]


@links
def test_one_ring_or_socket_carries_more_than_it_holds(scheme: str) -> None:
    """Many frames, wrapped around a small ring, all arrive."""
    layout = BIG
    p_memory, d_memory = random_memory(layout, 80, 1), random_memory(layout, 80, 2)
    names = [Identity(name, layout.format, SECRET) for name in ("p", "d")]
    address = LISTEN[scheme].format(name="small-ring")
    d = LinkMover(d_memory, StepCounter(), names[1], [address], ring_bytes=100_000)
    p = LinkMover(p_memory, StepCounter(), names[0], mode="layerwise")
    try:
        for n in range(8):
            ids = [list(range(1 + n, 60 + n))]
            d.start(receive_move(n, ids, transfer_id=f"t{n}"))
            p.start(send_move(n, d.addresses[0], ids, ids, transfer_id=f"t{n}"))
            (sent,) = wait(p)
            d.expect(n, sent.num_units, sent.checksum)
            assert wait(d)[0].error is None
    finally:
        p.close()
        d.close()


def test_moves_that_cannot_begin_end_with_an_error() -> None:
    with pair("local", LAYOUTS["full"]) as rig:
        wrong = [
            send_move(1, rig.address, [[1]], [[1, 2]]),
            send_move(2, rig.address, [[40]], [[1]]),
            send_move(3, "carrier-pigeon://here", [[1]], [[1]]),
            send_move(4, rig.address, [[1], [1]], [[1], [1]]),
            receive_move(5, [[40]]),
            KVMove(7, "t", "r", Place("local://a"), Place("local://b")),
        ]
        for move in wrong:
            rig.p.start(move)
        results = rig.p.poll()
        assert [r.id for r in results] == [1, 2, 3, 4, 5, 7]
        assert all(r.error for r in results)
        rig.p.start(receive_move(8, [[1]]))
        rig.p.start(receive_move(9, [[2]]))  # the same transfer and epoch
        assert [r.id for r in rig.p.poll()] == [9]
        rig.p.start(send_move(10, rig.address, [[1, 2]], [[0, 0]]))  # nothing is wanted
        assert [(r.id, r.error, r.num_units) for r in wait(rig.p)] == [(10, None, 0)]


def test_lost_peers_are_forgotten() -> None:
    """Peers that come and go under ever new addresses leave no threads behind; one that is there is kept."""
    layout = LAYOUTS["full"]
    with pair("tcp", layout) as rig:
        rig.p.start(send_move(0, rig.address, [[1]], [[1]]))
        assert wait(rig.p)[0].error is None
        for n in range(1, 6):
            rig.p.start(send_move(n, f"local://gone-{n}", [[1]], [[1]]))
            assert "nobody listens" in str(wait(rig.p)[0].error)
        assert rig.address in rig.p.stats()
        assert len(rig.p.stats()) <= 3


def test_results_are_announced() -> None:
    called = threading.Event()
    with pair("local", LAYOUTS["full"], notify=called.set) as rig:
        rig.p.start(send_move(0, rig.address, [[1]], [[1]]))
        assert called.wait(20)
        assert len(rig.p.poll()) == 1


def test_addresses_that_are_none() -> None:
    layout = LAYOUTS["full"]
    memory, identity = random_memory(layout, 4, 1), Identity("x", layout.format, SECRET)
    for address in ("tcp://nowhere", "tcp://::1:80", "tcp://h:99999", "shm://relative", "local://", "udp://a:1"):
        with pytest.raises(ValueError):
            LinkMover(memory, StepCounter(), identity, [address])
    with pytest.raises(ValueError, match="mode"):
        LinkMover(memory, StepCounter(), identity, mode="fast")
    first = LinkMover(memory, StepCounter(), identity, ["local://taken"])
    with pytest.raises(OSError, match="in use"):
        LinkMover(memory, StepCounter(), identity, ["tcp://127.0.0.1:0", "local://taken"])
    first.close()
    assert DEVICE == "device"


def test_ipv6() -> None:
    if not socket.has_ipv6:
        pytest.skip("no IPv6 here")
    layout = LAYOUTS["full"]
    memory, identity = random_memory(layout, 4, 1), Identity("x", layout.format, SECRET)
    try:
        mover = LinkMover(memory, StepCounter(), identity, ["tcp://[::1]:0"])
    except OSError:
        pytest.skip("no IPv6 here")
    try:
        mover.start(send_move(1, mover.addresses[0], [[1]], [[1]]))
        assert wait(mover)[0].error is None
    finally:
        mover.close()
