"""Prompts computed by one engine for another: the same tokens, whatever the network and the engines do."""

from __future__ import annotations

import os
from collections import Counter

import pytest
from tests.cluster.world import FRONT_END, LEASE_S, Setting, World

from penstock.cluster.messages import Alive, Commit, FirstToken, Prefill, Refused, Stop
from penstock.cluster.prefill_side import PrefillSide
from penstock.core.moves import DEVICE, KVMove, KVTicket, MoveResult, Place
from penstock.core.request import SamplingParams
from penstock.engine.messages import AddRequest, Peers, TokenDelta
from penstock.sim.clock import stream
from penstock.sim.mover import LinkFaults
from penstock.sim.wire import LineFaults

NUM_SEEDS = int(os.environ.get("PENSTOCK_FAULT_SEEDS", "300"))
PREFIXES = [[200 + (7 * p + 3 * i) % 91 for i in range(60)] for p in range(3)]


def test_a_prompt_computed_elsewhere_gives_the_same_tokens() -> None:
    world = World(Setting(), seed=1)
    world.ask(range(200, 223), 8, "d0", ["p0"])
    world.ask(range(310, 351), 8, "d0", ["p1"])
    world.run()
    world.check()
    assert world.nodes["d0"].member.decode.num_received == 2
    assert world.nodes["p0"].executor.num_tokens == 23
    assert world.nodes["p1"].executor.num_tokens == 41
    assert world.nodes["d0"].scheduler.counters.prompt_tokens_received == 23 + 41


def test_only_what_the_decode_engine_lacks_is_sent() -> None:
    world = World(Setting(), seed=2)
    world.ask(PREFIXES[0][:40], 4, "d0", ["p0"])
    world.run()
    world.ask(PREFIXES[0][:40] + [400 + i for i in range(20)], 4, "d0", ["p1"])
    world.run()
    world.check()
    received = world.nodes["d0"].scheduler.counters.prompt_tokens_received
    assert received == 40 + 60 - 40, "the first ten blocks were there"


def test_a_prefill_engine_that_never_answers_is_left_for_the_next() -> None:
    world = World(Setting(), seed=3)
    world.kill("p0")
    world.ask(range(200, 240), 6, "d0", ["p0", "p1"])
    world.run()
    world.check()
    assert world.nodes["d0"].member.decode.num_received == 1


def test_without_any_prefill_engine_the_prompt_is_computed_where_it_is_decoded() -> None:
    world = World(Setting(), seed=4)
    for name in world.prefills:
        world.kill(name)
    ask = world.ask(range(200, 240), 6, "d0", world.prefills)
    world.run()
    world.check()
    assert ask.finish_reason is not None
    assert world.nodes["d0"].member.decode.num_local == 1


@pytest.mark.parametrize("peers", [["p0"], ["p0", "p1"]])
def test_a_peer_that_has_ended_is_not_waited_for(peers: list[str]) -> None:
    """The front end says who is left: what the dead one was to send is asked for elsewhere long before the lease."""
    world = World(Setting(tells_peers=True), seed=5)
    ask = world.ask(range(200, 280), 6, "d0", peers)
    late = world.ask(range(300, 380), 6, "d0", peers)
    world.clock.run_until(0.02)
    assert world.nodes["p0"].member.prefill.live
    world.kill("p0")
    world.clock.run_until(LEASE_S / 2)
    assert ask.tokens and late.tokens
    world.run()
    world.check()


def test_nothing_is_computed_for_a_decode_engine_that_has_ended() -> None:
    world = World(Setting(num_decode=1, tells_peers=True), seed=6)
    world.ask(range(200, 400), 6, "d0", ["p0"])
    world.clock.run_until(0.02)
    world.kill("d0")
    world.clock.run_until(0.05)
    prefill = world.nodes["p0"]
    assert not prefill.member.prefill.live and not prefill.scheduler.requests
    assert prefill.executor.num_tokens < 200
    world.run()
    world.check()


def play(seed: int) -> tuple[World, Counter[str]]:
    """A cluster, its clients and its misfortunes, all from one seed."""
    draw = stream(seed, "play")
    chance = draw.random
    setting = Setting(
        num_prefill=draw.choice([1, 2]),
        num_decode=draw.choice([1, 2]),
        windows=draw.choice([(None,), (None,), (None, 6), (7,)]),
        num_blocks=draw.choice([60, 60, 34]),
        max_num_seqs=draw.choice([6, 2]),
        max_num_batched_tokens=draw.choice([16, 7, 64]),
        depth=draw.choice([1, 1, 2]),
        min_tokens=draw.choice([1, 6]),
        tells_peers=draw.choice([False, True]),
        messages=LineFaults(
            delay_s=0.001,
            jitter_s=draw.choice([0.0, 0.02]),
            loss=draw.choice([0.0, 0.0, 0.05, 0.3]),
            duplicate=draw.choice([0.0, 0.2]),
            reorder=draw.choice([0.0, 0.2]),
        ),
        links=LinkFaults(
            jitter_s=draw.choice([0.0, 0.01]),
            block_s=draw.choice([0.0001, 0.003]),
            breaks=draw.choice([0.0, 0.0, 0.1]),
            alters=draw.choice([0.0, 0.0, 0.01]),
        ),
    )
    world = World(setting, seed)
    happened: Counter[str] = Counter()

    def arrive(_: int) -> None:
        prefix = PREFIXES[draw.randrange(3)][: draw.randrange(50)]
        prompt = prefix + [500 + draw.randrange(400) for _ in range(draw.randrange(1, 12))]
        alive = [n for n in world.decodes if world.nodes[n].alive]
        if alive:
            peers = draw.sample(world.prefills, draw.randrange(len(world.prefills) + 1))
            world.ask(prompt, draw.randrange(1, 12), draw.choice(alive), peers)

    def disturb() -> None:
        kind = draw.choice(["kill", "stop", "stall", "cancel", "cancel"])
        name = draw.choice(world.names)
        if kind == "kill":
            world.kill(name, revive_s=draw.choice([0.05, 0.3, 2.0]))
        elif kind == "stop":
            world.nodes[name].stop(draw.choice([0.05, 0.4, 1.5]))
        elif kind == "stall":
            world.links.stall(f"link:{name}", world.clock.now() + draw.choice([0.05, 0.4, 1.5]))
        else:
            live = [ask for ask in world.asks.values() if not ask.is_over]
            if live:
                world.cancel(draw.choice(live))
        happened[kind] += 1

    for n in range(draw.randrange(2, 14)):
        world.clock.call_at(chance() * 0.5, lambda n=n: arrive(n))
    for _ in range(draw.choice([0, 1, 3])):
        world.clock.call_at(chance() * 0.7, disturb)
    world.clock.run_until(0.71)
    world.run()
    world.check()
    for node in world.nodes.values():
        happened["received"] += node.member.decode.num_received
        happened["failed"] += node.member.decode.num_failed
        happened["local"] += node.member.decode.num_local
    happened["stale"] += world.links.num_stale
    return world, happened


@pytest.mark.parametrize("part", range(10))
def test_faults_of_every_kind_change_no_token_and_leak_no_block(part: int) -> None:
    happened: Counter[str] = Counter()
    for seed in range(part, NUM_SEEDS, 10):
        happened += play(seed)[1]
    for kind in ("kill", "stop", "stall", "cancel", "received", "failed", "local", "stale"):
        assert happened[kind], f"no seed of this part shows {kind}"


def test_a_seed_replays_exactly() -> None:
    for seed in (5, 17):
        first, again = play(seed)[0], play(seed)[0]
        assert first.clock.num_events == again.clock.num_events
        assert [ask.tokens for ask in first.asks.values()] == [ask.tokens for ask in again.asks.values()]


def a_ticket(epoch: int, format: str = "f") -> KVTicket:
    return KVTicket("d0.0:r", "r", epoch, "d0", "link:d0", format, 8, 0, ((1, 2),))


def a_request(num_tokens: int = 8) -> AddRequest:
    return AddRequest("r", list(range(num_tokens)), SamplingParams(max_tokens=4), 1, 0.5, prefill_at=("p0",))


def test_a_prefill_engine_knows_an_epoch_once_and_drops_older_ones() -> None:
    side = PrefillSide("f")
    assert side.take(Prefill(a_ticket(3), a_request()), 0.0) is not None
    assert side.take(Prefill(a_ticket(3), a_request()), 0.0) is None
    assert side.take(Prefill(a_ticket(2), a_request()), 0.0) is None
    assert not side.ended_requests
    newer = side.take(Prefill(a_ticket(4), a_request()), 0.0)
    assert newer is not None
    assert newer.request_id != side.ended_requests[0]
    assert len(side.live) == 1


def test_a_load_of_the_prompt_from_a_tier_is_no_part_of_what_is_sent() -> None:
    """It has the request's id; its end, good or bad, is between the prefill engine and its tiers."""
    side = PrefillSide("f")
    request = side.take(Prefill(a_ticket(1), a_request()), 0.0)
    assert request is not None
    load = KVMove(1, "tier", request.request_id, Place("host", ((3,),), (b"k",)), Place(DEVICE, ((5,),)))
    sent = KVMove(2, a_ticket(1).transfer_id, request.request_id, Place(DEVICE, ((5,),)), Place("link:d0", ((1,),)))
    for move in (load, sent):
        side.started(move, 0.0)
    side.ended(load, MoveResult(1, None, 54, 540, checksum=9), 0.1)
    side.sampled(TokenDelta(request.request_id, [7], "length"), 0.2)
    side.ended(sent, MoveResult(2, None, 114, 1140, checksum=5), 0.3)
    [commit] = [message for _, message in side.outbox if isinstance(message, Commit)]
    assert (commit.num_units, commit.checksum, side.num_bytes) == (114, 5, 1140)
    side.ended(load, MoveResult(1, "the block is damaged"), 0.4)
    assert side.live and not side.num_failed


def test_what_was_committed_arrives_within_one_more_lease_or_is_given_up() -> None:
    """However often the commit is said again: nothing can follow it."""
    world = World(Setting(), seed=1)
    world.ask(range(200, 223), 8, "d0", ["p0"])
    side = world.nodes["d0"].member.decode
    while not side.num_in_flight:
        assert world.clock.step()
    [hand_off] = side._live.values()
    transfer_id, begin = side._transfer_id(hand_off.request.request_id), world.clock.now()
    first = FirstToken(transfer_id, hand_off.epoch, 999, [7])
    step = LEASE_S / 4
    for n in range(1, 4):
        side.handle("p0", Alive(transfer_id, hand_off.epoch), begin + n * step)
    committed = begin + 4 * step
    assert not side.expired(committed), "alive until then"
    for n in range(4):
        side.handle("p0", Commit(first, 10**6, 1), committed + n * step)
        side.handle("p0", Alive(transfer_id, hand_off.epoch), committed + n * step)
    assert not side.expired(committed + 0.99 * LEASE_S)
    assert side.expired(committed + 1.01 * LEASE_S) == [hand_off.move_id]
    assert "not all has arrived" in hand_off.fault


def test_a_prefill_engine_refuses_another_format_and_names_both() -> None:
    side = PrefillSide("mine")
    assert side.take(Prefill(a_ticket(1, "theirs"), a_request()), 0.0) is None
    ((_, refused),) = side.outbox
    assert isinstance(refused, Refused)
    assert refused.code == 400
    assert "mine" in refused.reason and "theirs" in refused.reason


def test_an_unanswered_commit_is_said_again_and_given_up_at_last() -> None:
    side = PrefillSide("f")
    request = side.take(Prefill(a_ticket(1), a_request()), 0.0)
    assert request is not None
    side.sampled(TokenDelta(request.request_id, [7], "length"), 1.0)
    now, num_commits = 1.0, 0
    while side.live:
        now += 0.1
        assert now < 30.0
        side.tick(now)
        num_commits += sum(isinstance(message, Commit) for _, message in side.outbox)
        side.outbox.clear()
    assert num_commits >= 6
    assert now > 1.0 + 3 * a_ticket(1).lease_s


def test_what_is_on_its_way_is_cancelled_when_nobody_wants_it_any_more() -> None:
    side = PrefillSide("f")
    request = side.take(Prefill(a_ticket(1), a_request()), 0.0)
    assert request is not None
    for id_ in (4, 2):
        side.started(KVMove(id_, "d0.0:r", request.request_id, Place(DEVICE), Place("link:d0")), 0.1)
    side.ended(KVMove(2, "d0.0:r", request.request_id, Place(DEVICE), Place("link:d0")), MoveResult(2), 0.2)
    side.handle(Stop("d0.0:r", 1), 0.3)
    assert side.cancelled == [4]
    assert side.ended_requests == [request.request_id]


def test_a_lost_ack_is_said_again_when_the_commit_is() -> None:
    world = World(Setting(num_prefill=1, num_decode=1), seed=7)
    world.ask(range(200, 240), 6, "d0", ["p0"])
    side = world.nodes["d0"].member.decode
    while not side.num_received:
        assert world.clock.step()
    sending = world.nodes["p0"].member.prefill
    assert sending.live
    world.network.kill("p0")  # it loses what is on its way to it, and goes on
    world.network.revive("p0")
    world.clock.run_until(world.clock.now() + LEASE_S)
    assert not sending.live
    assert sending.num_sent == 1
    world.run()
    world.check()


def test_a_peer_that_is_gone_is_not_waited_for() -> None:
    world = World(Setting(num_prefill=1, num_decode=1), seed=8)
    world.kill("p0")
    ask = world.ask(range(200, 240), 6, "d0", ["p0"])
    world.clock.run_until(0.02)
    assert world.nodes["d0"].member.decode.num_in_flight == 1
    world.network.wire(FRONT_END, "d0").send(Peers([]))
    world.clock.run_until(0.02 + 0.6 * LEASE_S)
    assert ask.finish_reason is not None
    world.run()
    world.check()


def test_nothing_more_is_computed_for_a_peer_that_is_gone() -> None:
    world = World(Setting(num_prefill=1, num_decode=2), seed=9)
    world.ask(range(200, 260), 6, "d0", ["p0"])
    world.clock.run_until(0.01)
    prefill = world.nodes["p0"].member.prefill
    assert prefill.live
    world.kill("d0")
    world.network.wire(FRONT_END, "p0").send(Peers([]))
    world.clock.run_until(0.02)
    assert not [id_ for id_ in prefill.live if id_.startswith("d0.")]
    world.run()
    world.check()


def test_what_an_older_epoch_says_is_not_heard() -> None:
    world = World(Setting(), seed=6)
    world.network.cut(["d0"], ["p0"])  # nobody computes it
    ask = world.ask(range(200, 240), 6, "d0", ["p0"])
    world.clock.run_until(0.02)
    member, now = world.nodes["d0"].member, world.clock.now()
    (hand_off,) = member.decode._live.values()
    for epoch in (hand_off.epoch - 1, hand_off.epoch + 1):
        post = member.handle("p0", FirstToken("d0.0:r0", epoch, 40, [1]), now)
        assert [type(message) for to, message in post if to == "p0"] == [Stop]
    for transfer_id in ("d0.1:r0", "d1.0:r0", "r0"):
        member.handle("p0", FirstToken(transfer_id, hand_off.epoch, 40, [1]), now)
    assert not ask.tokens
    world.run()
    world.check()
