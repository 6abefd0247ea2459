"""The tiers together: client, pool, stores in their threads, mover. What comes back is what was saved, or nothing."""

from __future__ import annotations

import time

import numpy as np
import pytest
from tests.tiers.resp_server import RespServer
from tests.tiers.tier_blocks import TWO

from penstock.core.kv_pool import KVPool
from penstock.core.moves import DEVICE, KVMove, Place
from penstock.core.tier_client import Offer, TierClient
from penstock.core.tier_costs import PrefillRate
from penstock.core.tiering import WAIT_COMPLETE, WRITE_THROUGH, ClientSettings, TierSettings
from penstock.tiers.arena import Arena
from penstock.tiers.disk import DiskStore
from penstock.tiers.driver import PoolDriver
from penstock.tiers.mover import TierMover
from penstock.tiers.redis import RedisStore

NUM_LAYERS = 4
NUM_BLOCKS = 10


def hashes(root: int, num: int = 6) -> list[bytes]:
    return [bytes((root, n)) * 8 for n in range(num)]


class Machine:
    """One engine's device memory and its machine's tiers, in this process."""

    def __init__(self, stores, host_blocks=8) -> None:
        sizes = [f.num_bytes for f in Arena.private(TWO, (1, 1)).formats]
        tiers = [
            TierSettings(name, getattr(store, "num_blocks", None), WRITE_THROUGH, retry_s=0.05)
            for name, store in stores.items()
        ]
        self.arena = Arena.private(TWO, (host_blocks,) * 2)
        self.pool = KVPool(sizes, (host_blocks,) * 2, tiers)
        for name, store in stores.items():
            if isinstance(store, DiskStore):
                self.pool.adopt(name, list(store.recovered()), 0.0)
        self.driver = PoolDriver(self.pool, self.arena, stores)
        settings = ClientSettings(min_tokens=32, wait=WAIT_COMPLETE, max_wait_s=20.0)
        self.client = TierClient(TWO, settings, PrefillRate(1.0, 0.0))
        self.device = [np.zeros((NUM_BLOCKS, TWO.groups[n % 2].layer_bytes), np.uint8) for n in range(NUM_LAYERS)]
        self.mover = TierMover(TWO, self.device, self.arena)
        self.move_id = 0

    def turn(self) -> None:
        """Messages, results and jobs, as an engine's loop would."""
        now = time.monotonic()
        answers = self.driver.poll(now)
        for message in self.client.messages():
            answers += self.driver.handle("engine", message, now)
        for _, message in answers:
            self.client.handle(message, now)
        for result in self.mover.poll():
            self.client.moved(result)
            self.last = result
        time.sleep(0.001)

    def until(self, condition) -> None:
        deadline = time.monotonic() + 30
        while not condition():
            assert time.monotonic() < deadline
            self.turn()

    def move(self, src, dst) -> int:
        self.move_id += 1
        self.mover.start(KVMove(self.move_id, f"t{self.move_id}", "r", src, dst))
        return self.move_id

    def save(self, root: int) -> None:
        """Block n + 1 of every layer holds something that depends on root, layer and n."""
        names = hashes(root)
        for layer, pool in enumerate(self.device):
            for n in range(len(names)):
                pool[n + 1] = root + 10 * layer + n
        for n, name in enumerate(names):
            self.client.saving.published(name, names[n - 1] if n else None, n)

        def step() -> bool:
            for save in self.client.saving.ready():
                src, dst, chosen = save.places(lambda g, name: names.index(name) + 1, 2)
                self.client.saving.started(save, self.move(src, dst), chosen)
            return not self.client.num_open and not self.client.saving._queued

        self.turn()
        self.until(step)
        self.turn()

    def settle(self) -> None:
        """All jobs of the stores are done."""
        self.turn()
        self.until(lambda: not self.pool._jobs)

    def load(self, root: int) -> int:
        """Blocks that came back, all checked; TWO's window of 64 tokens needs two blocks of group 1."""
        names = hashes(root)
        for pool in self.device:
            pool[:] = 255
        self.client.arrived("r", names, 0, time.monotonic())
        offers: list[Offer] = []

        def known() -> bool:
            offer = self.client.offer("r", 0, time.monotonic())
            offers.append(offer)
            return offer.wait_until_s is None

        self.turn()
        self.until(known)
        offer = offers[-1]
        if offer.num_blocks:
            ids = tuple(tuple(n + 1 if slot else 0 for n, slot in enumerate(slots)) for slots in offer.place.block_ids)
            move_id = self.move(offer.place, Place(DEVICE, ids))
            self.client.load_started("r", 0, offer.num_blocks, move_id)
            self.until(lambda: not self.client._loads)
            if self.last.error is not None:
                return 0
            for layer, pool in enumerate(self.device):
                for id_ in ids[layer % 2]:
                    assert not id_ or (pool[id_] == root + 10 * layer + id_ - 1).all(), "wrong bytes"
        self.client.ended("r")
        self.turn()
        return offer.num_blocks

    def close(self) -> None:
        self.mover.close()
        self.driver.close()


def disk(directory) -> DiskStore:
    return DiskStore(directory, TWO, 4 << 20, 200_000)


def test_through_host_memory_and_disk(tmp_path):
    machine = Machine({"disk": disk(tmp_path)})
    for root in range(1, 5):  # more than host memory has room for
        machine.save(root)
        machine.settle()
    assert [machine.load(root) for root in range(1, 5)] == [6] * 4
    assert machine.pool.lower[0].counts.num_read > 0
    assert not machine.pool.num_held
    machine.close()


def test_a_restart_keeps_the_disk(tmp_path):
    machine = Machine({"disk": disk(tmp_path)})
    machine.save(1)
    machine.settle()
    machine.close()
    machine = Machine({"disk": disk(tmp_path)})
    assert machine.load(1) == 6
    assert machine.load(2) == 0
    machine.close()


def test_flipped_bits_on_disk_are_recomputed(tmp_path):
    machine = Machine({"disk": disk(tmp_path)})
    machine.save(1)
    machine.settle()
    machine.close()
    for path in tmp_path.glob("kv-0-*.segment"):
        data = bytearray(path.read_bytes())
        data[4096 + 3 * machine.arena.formats[0].num_bytes + 5000] ^= 1  # of one block of the full group
        path.write_bytes(data)
    machine = Machine({"disk": disk(tmp_path)})
    assert machine.load(1) < 6
    machine.close()


def test_a_bit_flipped_in_host_memory_is_recomputed(tmp_path):
    machine = Machine({})
    machine.save(1)
    for group in range(2):
        machine.arena.record(group, machine.pool.host[group].get(hashes(1)[5] + bytes([group])).slot)[-200] ^= 1
    assert machine.load(1) == 0
    assert machine.client.num_failed == 1
    machine.until(lambda: not machine.pool.num_held)
    assert not len(machine.pool.host[0]), "all of that load is dropped: none is trusted"
    machine.close()


def test_a_remote_store_serves_another_machine(caplog):
    """Then the server goes: one line in the log, recomputation, and service again when it is back."""
    server = RespServer()
    one = Machine({"remote": RedisStore(server.url(), TWO, timeout_s=0.5)})
    other = Machine({"remote": RedisStore(server.url(), TWO, timeout_s=0.5)})
    one.save(1)
    one.settle()
    assert other.load(1) == 6
    other.save(2)
    other.settle()
    assert other.load(9) == 0
    server.stop()
    one.close()
    caplog.clear()
    for _ in range(3):
        assert other.load(7) == 0
    lines = [record.getMessage() for record in caplog.records]
    assert len(lines) == 1 and "remote" in lines[0] and "tried again" in lines[0]
    again = RespServer(port=server.port)
    again.data = server.data
    deadline = time.monotonic() + 20
    while not other.pool.lower[0].is_on or other.pool.lower[0]._was_failing:
        assert time.monotonic() < deadline
        other.load(8)
        time.sleep(0.05)
    assert other.load(2) == 6
    other.close()
    again.stop()


def test_a_full_disk_pauses_writes_and_nothing_else(tmp_path, caplog):
    store = disk(tmp_path)
    machine = Machine({"disk": store})
    machine.save(1)
    machine.settle()

    def full(fd, data, offset):
        raise OSError(28, "No space left on device")

    object.__setattr__(store.calls, "write", full)
    for root in (2, 3, 4):
        machine.save(root)
        machine.settle()
    assert len([record for record in caplog.records if "No space left" in record.getMessage()]) == 1
    assert [event.kind for event in machine.driver.events()] == ["failed"]
    assert machine.load(1) == 6
    machine.close()


@pytest.mark.parametrize("problem", [RuntimeError("a bug"), MemoryError()])
def test_a_store_that_raises_pauses_its_tier(tmp_path, problem, caplog):
    store = disk(tmp_path)

    def broken(keys, blocks):
        raise problem

    store.write = broken
    machine = Machine({"disk": store})
    machine.save(1)
    machine.settle()
    assert [event.kind for event in machine.driver.events()] == ["failed"]
    assert machine.load(1) == 6, "from host memory"
    machine.close()
