"""An engine's side of the tiers, with the real pool behind it, on virtual time."""

from __future__ import annotations

import random

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from penstock.config.model import KVGroup, KVLayout
from penstock.core.kv_pool import READ, KVPool
from penstock.core.moves import DEVICE, MoveResult
from penstock.core.tier_client import NOTHING, TierClient
from penstock.core.tier_costs import PrefillRate
from penstock.core.tier_saves import ANSWER_S, Save
from penstock.core.tiering import (
    BAD_BLOCK,
    BEST_EFFORT,
    HOST,
    TIMEOUT,
    WAIT_COMPLETE,
    WRITE_BACK,
    WRITE_SELECTIVE,
    WRITE_THROUGH,
    ClientSettings,
    Release,
    Reserve,
    TierSettings,
    block_key,
    key_group,
)

SIZE = 32  # tokens a block


def layout_of(*windows: int | None) -> KVLayout:
    return KVLayout(
        tuple(
            KVGroup(g, "full" if window is None else "window", (g,), window, SIZE, 2, 16, "float32")
            for g, window in enumerate(windows)
        )
    )


def hashes(root: int, num: int) -> list[bytes]:
    return [bytes((root, n)) + bytes(14) for n in range(num)]


class Engine:
    """A client, its pool, a pretended device (group, hash) -> block id, stores that answer when `work` is called."""

    def __init__(self, layout=None, tiers=(), host_blocks=64, **settings) -> None:
        self.layout = layout or layout_of(None)
        num_groups = len(self.layout.groups)
        sizes = [group.block_bytes for group in self.layout.groups]
        settings.setdefault("min_tokens", SIZE)
        self.pool = KVPool(sizes, (host_blocks,) * num_groups, tiers, "lru")
        self.client = TierClient(self.layout, ClientSettings(**settings), PrefillRate(1e-3, 1e-7))
        self.arena: dict[tuple[int, int], bytes] = {}
        self.disk: set[bytes] = set()
        self.jobs: list = []
        self.now = 0.0
        self.move_id = 0
        self.device: dict[tuple[int, bytes], int] = {}

    def pump(self) -> None:
        """Messages both ways until nothing is left."""
        while messages := self.client.messages():
            for message in messages:
                self.answer(self.pool.handle("engine", message, self.now))
        self.jobs += self.pool.jobs()

    def answer(self, answers) -> None:
        for _, message in answers:
            self.client.handle(message, self.now)
        self.jobs += self.pool.jobs()

    def work(self, num_jobs=1000) -> None:
        while self.jobs and num_jobs:
            num_jobs -= 1
            job = self.jobs.pop(0)
            ok = [job.kind != READ or key in self.disk for key in job.keys]
            for key, slot in zip(job.keys, job.slots, strict=False):
                if job.kind == READ:
                    self.arena[key_group(key), slot] = key
                else:
                    self.disk.add(key)
            self.answer(self.pool.job_done(job.id, ok, 0.001, self.now))
        self.pump()

    def publish(self, names, num_tokens=None) -> None:
        """The blocks were computed; every group has them on the device."""
        for n, name in enumerate(names):
            for g in range(len(self.layout.groups)):
                self.device[g, name] = len(self.device) + 1
            self.client.saving.published(name, names[n - 1] if n else None, n)
        self.pump()

    def publish_unheard(self, names) -> None:
        """As `publish`, while the pool does not hear."""
        for n, name in enumerate(names):
            self.client.saving.published(name, names[n - 1] if n else None, n)

    def save_all(self, error=None) -> list[Save]:
        done = []
        self.pump()
        while saves := self.client.saving.ready():
            for save in saves:
                places = save.places(lambda g, name: self.device.get((g, name), 0), len(self.layout.groups))
                if places is None:
                    self.client.saving.dropped(save)
                    continue
                src, dst, chosen = places
                assert src.where == DEVICE and dst.where == HOST
                keys = iter(dst.keys)
                for g, slots in enumerate(dst.block_ids):
                    for slot in slots:
                        self.arena[g, slot] = next(keys)
                self.move_id += 1
                self.client.saving.started(save, self.move_id, chosen)
                self.client.moved(MoveResult(self.move_id, error, seconds=0.0001))
                done.append(save)
            self.pump()
        return done

    def load(self, request_id, first_block, offer, error=None) -> None:
        """Take an offer: every slot must hold what its key says."""
        place, num_blocks = offer.place, offer.num_blocks
        keys = iter(place.keys)
        for g, slots in enumerate(place.block_ids):
            assert len(slots) == num_blocks
            for slot in slots:
                key = next(keys)
                assert not slot or self.arena[g, slot] == key
        self.move_id += 1
        self.client.load_started(request_id, first_block, num_blocks, self.move_id)
        self.client.moved(MoveResult(self.move_id, error, num_bytes=1000 * num_blocks, seconds=0.0001))
        self.pump()


def disk(num_groups=1, **more) -> TierSettings:
    return TierSettings("disk", (200,) * num_groups, WRITE_THROUGH, **more)


def evict_host(engine: Engine) -> None:
    """Other blocks take all of host memory."""
    for index in engine.pool.host:
        for key in list(index.entries):
            index.remove(key)


def test_unknown_policies_are_refused():
    for wrong in ({"write": "sometimes"}, {"wait": "for ever"}):
        with pytest.raises(ValueError, match="none of"):
            ClientSettings(**wrong)
    with pytest.raises(ValueError, match="disk"):
        TierSettings("disk", (1,), "sometimes")


def test_what_one_request_computed_another_loads():
    engine = Engine()
    names = hashes(1, 6)
    engine.publish(names)
    assert len(engine.save_all()) == 1
    engine.client.arrived("r", names, 0, engine.now)
    engine.pump()
    offer = engine.client.offer("r", 0, engine.now)
    assert offer.num_blocks == 6
    engine.load("r", 0, offer)
    assert engine.client.num_loaded == 6
    assert engine.client.offer("r", 6, engine.now) == NOTHING
    engine.client.ended("r")
    engine.pump()
    assert not engine.pool.num_held and not engine.client.num_open


def test_what_the_device_has_is_not_loaded():
    engine = Engine()
    names = hashes(1, 6)
    engine.publish(names)
    engine.save_all()
    engine.client.arrived("r", names, 2, engine.now)
    engine.pump()
    assert engine.client.offer("r", 2, engine.now).num_blocks == 4
    assert engine.client.offer("r", 4, engine.now).num_blocks == 2, "more has come to the device since"
    waiting = engine.client.offer("r", 1, engine.now)
    assert waiting.wait_until_s is not None, "one was evicted since: asked again"
    engine.pump()
    assert engine.client.offer("r", 1, engine.now).num_blocks == 5


def test_short_beginnings_are_not_asked_for():
    engine = Engine(min_tokens=256)
    engine.client.arrived("r", hashes(1, 7), 0, 0.0)
    assert engine.client.messages() == []
    assert engine.client.offer("r", 0, 0.0) == NOTHING


def from_disk(**settings) -> tuple[Engine, list[bytes]]:
    engine = Engine(tiers=[disk(batch_bytes=1, max_jobs=1)], **settings)
    names = hashes(1, 6)
    engine.publish(names)
    engine.save_all()
    engine.work()
    evict_host(engine)
    engine.client.arrived("r", names, 0, engine.now)
    engine.pump()
    return engine, names


def test_best_effort_takes_what_is_there():
    engine, _ = from_disk(wait=BEST_EFFORT)
    engine.work(2)
    assert engine.client.offer("r", 0, 0.0).num_blocks == 2


def test_timeout_waits_by_the_length_of_the_prompt():
    engine, _ = from_disk(wait=TIMEOUT, wait_s=0.1, wait_token_s=1e-3)
    until = engine.client.offer("r", 0, 0.0).wait_until_s
    assert until == pytest.approx(0.1 + 6 * SIZE * 1e-3)
    engine.work(3)
    assert engine.client.offer("r", 0, until - 0.01).wait_until_s == until
    assert engine.client.offer("r", 0, until).num_blocks == 3
    assert engine.client.worth.total_spent_s >= until, "waiting counts against the tier"


def test_wait_complete_waits_for_all_but_not_for_ever():
    engine, _ = from_disk(wait=WAIT_COMPLETE, max_wait_s=5.0)
    engine.work(3)
    assert engine.client.offer("r", 0, 4.9).wait_until_s == 5.0
    engine.work()
    assert engine.client.offer("r", 0, 4.9).num_blocks == 6


def test_a_slow_tier_is_not_waited_for():
    """Predicted to take longer than computing: recomputed, and the pool holds nothing for it."""
    engine = Engine(tiers=[disk(latency_s=10.0)])
    names = hashes(1, 6)
    engine.publish(names)
    engine.save_all()
    engine.pool.lower[0].rate.latency_s = 10.0
    engine.jobs, jobs = [], engine.jobs
    for job in jobs:
        engine.disk |= set(job.keys)
        engine.pool.job_done(job.id, [True] * len(job.keys), 10.0, 0.0)
    evict_host(engine)
    engine.client.arrived("r", names, 0, 0.0)
    engine.pump()
    assert engine.client.offer("r", 0, 0.0) == NOTHING
    assert not engine.pool.num_held


def test_what_lies_behind_a_gap_is_not_fetched():
    """It would be computed anyway: its slots are nobody's to keep, its read from below nobody's to pay."""
    engine = Engine()
    names = hashes(1, 9)
    engine.publish(names)
    engine.save_all()
    for n in (4, 5):
        engine.pool.host[0].remove(block_key(names[n], 0))
    engine.client.arrived("r", names, 0, 0.0)
    engine.pump()
    assert sum(entry.num_pins for entry in engine.pool.host[0].entries.values()) == 4
    offer = engine.client.offer("r", 0, 0.0)
    assert offer.num_blocks == 4
    engine.load("r", 0, offer)
    assert engine.client.offer("r", 4, 0.0) == NOTHING
    assert not engine.pool.num_held


def test_windows_need_their_last_blocks_only():
    """A window group brings what the next token can see; the full group brings all."""
    engine = Engine(layout_of(None, 40), host_blocks=64)
    names = hashes(1, 8)
    engine.publish(names)
    engine.save_all()
    engine.pool.host[1].remove(block_key(names[0], 1))  # long outside the window
    engine.client.arrived("r", names, 0, 0.0)
    engine.pump()
    offer = engine.client.offer("r", 0, 0.0)
    assert offer.num_blocks == 8
    assert [bool(slot) for slot in offer.place.block_ids[0]] == [True] * 8
    assert [bool(slot) for slot in offer.place.block_ids[1]] == [False] * 6 + [True] * 2
    engine.load("r", 0, offer)


def test_a_window_that_is_not_there_shortens_the_load():
    engine = Engine(layout_of(None, 40))
    names = hashes(1, 8)
    engine.publish(names)
    engine.save_all()
    engine.pool.host[1].remove(block_key(names[7], 1))
    engine.client.arrived("r", names, 0, 0.0)
    engine.pump()
    assert engine.client.offer("r", 0, 0.0).num_blocks == 7


def test_a_model_of_windows_alone_loads_the_last_one():
    engine = Engine(layout_of(40))
    names = hashes(1, 8)
    engine.publish(names)
    engine.save_all()
    engine.client.arrived("r", names, 0, 0.0)
    engine.pump()
    offer = engine.client.offer("r", 0, 0.0)
    assert offer.num_blocks == 8
    assert [bool(slot) for slot in offer.place.block_ids[0]] == [False] * 6 + [True] * 2


def test_a_load_that_met_a_bad_block_drops_it_and_is_over():
    engine = Engine()
    names = hashes(1, 4)
    engine.publish(names)
    engine.save_all()
    engine.client.arrived("r", names, 0, 0.0)
    engine.pump()
    engine.load("r", 0, engine.client.offer("r", 0, 0.0), error=f"{BAD_BLOCK} (layer 0)")
    assert engine.client.offer("r", 0, 0.0) == NOTHING
    assert not len(engine.pool.host[0]) and not engine.pool.num_held


def test_a_lease_that_ran_down_is_asked_for_again():
    engine = Engine()
    names = hashes(1, 4)
    engine.publish(names)
    engine.save_all()
    engine.client.arrived("r", names, 0, 0.0)
    engine.pump()
    assert engine.client.offer("r", 0, 59.0).num_blocks == 4
    assert engine.client.offer("r", 0, 61.0).wait_until_s is not None
    engine.now = 61.0
    engine.pump()
    assert engine.client.offer("r", 0, 62.0).num_blocks == 4
    assert engine.pool.num_held == 1


def test_selective_saves_at_the_second_request():
    engine = Engine(write=WRITE_SELECTIVE)
    names = hashes(1, 4)
    engine.client.arrived("a", names, 0, 0.0)
    engine.publish(names)
    assert engine.save_all() == []
    engine.client.arrived("b", names[:2], 2, 0.0)
    [save] = engine.save_all()
    assert [name for name, _, _ in save.items] == names[:2]


def test_write_back_saves_what_cools():
    engine = Engine(write=WRITE_BACK)
    names = hashes(1, 4)
    engine.publish(names)
    assert engine.save_all() == []
    engine.client.saving.cooling(names[2:])
    [save] = engine.save_all()
    assert [name for name, _, _ in save.items] == names[2:]


def test_blocks_that_have_left_the_device_are_not_saved():
    engine = Engine()
    names = hashes(1, 4)
    engine.publish(names)
    del engine.device[0, names[3]]
    engine.save_all()
    assert len(engine.pool.host[0]) == 3 and engine.client.saving.num_saved == 3
    gone = hashes(2, 3)
    engine.publish(gone)
    engine.device.clear()
    assert engine.save_all() == []
    engine.pump()
    assert not engine.pool.num_held and not engine.client.num_open


def test_a_failed_save_publishes_nothing():
    engine = Engine()
    engine.publish(hashes(1, 4))
    engine.save_all(error="cancelled")
    assert not len(engine.pool.host[0]) and engine.pool.host[0].num_reserved == 0


def test_host_memory_that_does_not_pay_is_left_alone():
    engine = Engine()
    client = engine.client
    client.worth.min_uses, client.worth.window_s = 4, 1.0
    client.tick(0.0)
    engine.publish(hashes(1, 6))
    engine.save_all()
    [event] = client.tick(2.0)
    assert event.kind == "unprofitable" and event.tier == HOST and "ms" in event.text
    engine.publish(hashes(2, 6))
    client.arrived("r", hashes(1, 6), 0, 3.0)
    assert client.messages() == [] and client.offer("r", 0, 3.0) == NOTHING
    assert [event.kind for event in client.tick(2.0 + 61.0)] == ["on"]


@settings(deadline=None, max_examples=60)
@given(seed=st.integers(0, 2**32), windows=st.sampled_from([(None,), (None, 40), (70,)]))
def test_any_order_of_calls_ends_with_nothing_open(seed, windows):
    """Requests come, load, are cancelled at any moment, also under a load; loads and saves fail; leases run down."""
    dice = random.Random(seed)
    engine = Engine(layout_of(*windows), [disk(len(windows), batch_bytes=4096)], host_blocks=dice.randrange(4, 40))
    client = engine.client
    live: dict[str, list[bytes]] = {}
    loads: list[tuple[int, int]] = []
    for n in range(80):
        action = dice.randrange(8)
        engine.now += dice.choice([0.0, 0.01, 0.1, 20.0 if dice.random() < 0.2 else 0.0])
        if action < 2:
            live[f"r{n}"] = names = hashes(dice.randrange(4), dice.randrange(1, 12))
            client.arrived(f"r{n}", names, dice.randrange(len(names)), engine.now)
        elif action == 2:
            engine.publish(hashes(dice.randrange(4), dice.randrange(1, 12)))
        elif action == 3:
            engine.save_all(dice.choice([None, None, "cancelled"]))
            for place in [key for key in engine.device if dice.random() < 0.2]:
                del engine.device[place]
        elif action in (4, 5) and live:
            request_id = dice.choice(list(live))
            first = dice.randrange(len(live[request_id]))
            offer = client.offer(request_id, first, engine.now)
            if offer.num_blocks:
                engine.move_id += 1
                client.load_started(request_id, first, offer.num_blocks, engine.move_id)
                loads.append((engine.move_id, offer.num_blocks))
        elif action == 6 and live:
            request_id = dice.choice(list(live))
            client.ended(request_id)
            del live[request_id]
        elif loads:
            move_id, num = loads.pop(0)
            error = dice.choice([None, None, "cancelled", BAD_BLOCK])
            client.moved(MoveResult(move_id, error, num_bytes=100 * num, seconds=0.001))
        if dice.random() < 0.7:
            engine.pump()
        engine.work(dice.randrange(3))
        if dice.random() < 0.2:
            engine.answer(engine.pool.tick(engine.now))
    for request_id in live:
        client.ended(request_id)
    for move_id, _ in loads:
        client.moved(MoveResult(move_id, None, num_bytes=1, seconds=0.001))
    engine.pump()
    engine.save_all()
    engine.work()
    assert not client.num_open
    assert not engine.pool.num_held


def test_a_reservation_that_is_not_answered_is_given_up_and_a_late_answer_is_given_back():
    engine = Engine(max_saves=1)
    engine.publish_unheard(hashes(1, 3))
    (asked,) = engine.client.messages()
    assert isinstance(asked, Reserve)
    late = engine.pool.handle("engine", asked, 0.0)
    engine.client.tick(0.1)
    assert not engine.client.messages(), "there is time"
    engine.client.tick(0.2 + ANSWER_S)
    assert engine.client.messages() == [Release(asked.id)]
    assert not engine.client.num_open
    for _, answer in late:
        engine.client.handle(answer, 3.0)
    engine.pump()
    assert not engine.client.saving.ready() and not engine.pool.num_held
    engine.publish(hashes(2, 3))
    assert engine.save_all(), "it goes on saving"
