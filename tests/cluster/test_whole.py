"""Router, prefill, decode and tiers under faults: every stream ends as it does alone, or with one typed error."""

from __future__ import annotations

import os
from collections import Counter
from dataclasses import replace

import pytest
from tests.cluster.whole import CLOSED, Ask, Cluster, Setting
from tests.fakes.host_tier import TierFaults

from penstock.core.tiering import (
    BEST_EFFORT,
    TIMEOUT,
    WAIT_COMPLETE,
    WRITE_BACK,
    WRITE_SELECTIVE,
    WRITE_THROUGH,
    ClientSettings,
)
from penstock.sim.clock import stream
from penstock.sim.mover import LinkFaults
from penstock.sim.wire import LineFaults

NUM_SEEDS = int(os.environ.get("PENSTOCK_FAULT_SEEDS", "300"))
NUM_PARTS = 3  # large enough that each shows every fault and what it leads to: a replayed request is rare
PREFIXES = [[200 + (7 * p + 3 * i) % 91 for i in range(60)] for p in range(3)]
FAULTS = ("kill", "stop", "hang", "stick", "stall", "cancel", "row", "pool", "router", "forget", "deadline")
ROLES = (
    {"p0": "prefill", "p1": "prefill", "d0": "decode", "d1": "decode"},
    {"p0": "prefill", "p1": "prefill", "d0": "decode"},
    {"p0": "prefill", "d0": "decode", "d1": "decode"},
    {"p0": "prefill", "d0": "decode"},
    {"e0": "both", "e1": "both"},
)
DEADLY = {"kill", "stop", "hang", "stick"}  # whoever is silent for long is killed
FOR_EVER_S = 1e6
TYPED = (
    (0, CLOSED, {"router", *DEADLY}),
    (500, "the pretended rank failed", {"row"}),
    (500, "engines ended while they computed this", DEADLY),
    (503, "the engine died: engine ", DEADLY),
    (503, "the model is still loading", {"router", "kill", ""}),
    (504, "the request did not finish within its ", {"deadline"}),
)


def draw_setting(seed: int) -> Setting:
    """A cluster and how its lines, links and stores behave."""
    draw = stream(seed, "setting")
    choice = draw.choice
    client = ClientSettings(
        write=choice([WRITE_THROUGH, WRITE_THROUGH, WRITE_SELECTIVE, WRITE_BACK]),
        wait=choice([TIMEOUT, TIMEOUT, WAIT_COMPLETE, WAIT_COMPLETE, BEST_EFFORT]),
        wait_s=choice([0.02, 0.2]),
        max_wait_s=1.0,
        min_tokens=8,
        latency_s=1e-6,
        byte_s=1e-9,
        save_bytes=choice([16 << 20, 100]),
        max_saves=choice([4, 1]),
    )
    flips = stream(seed, "flips")
    hang_s = stream(seed, "hang").choice([0.3, 3.0])
    depth = stream(seed, "depth").choice([1, 1, 2])
    return Setting(
        roles=choice(ROLES),
        windows=choice([(None,), (None,), (None, 6), (7,)]),
        num_blocks=choice([60, 34, 24]),
        max_num_seqs=choice([6, 2]),
        max_num_batched_tokens=choice([16, 7, 64]),
        depth=depth,
        is_inline=depth == 1 and stream(seed, "inline").random() < 0.5,
        min_tokens=choice([1, 6, 40]),
        max_restarts=choice([5, 5, 0]),
        hang_s=hang_s,
        flips=flips.choice([0.0, 0.3, 0.9]),
        drain_s=flips.choice([0.0, 0.5]),
        stuck_s=2 * hang_s,
        has_tiers=choice([True, True, False]),
        client_tiers=client,
        tiers=TierFaults(
            host_blocks=choice([60, 24, 8]),
            disk_blocks=choice([100, 30]),
            has_remote=choice([True, False]),
            peer_until_s=stream(seed, "has peer").choice([0.0, 1.5]),
            write=choice([WRITE_THROUGH, WRITE_SELECTIVE, WRITE_BACK]),
            lease_s=choice([1.0, 0.1]),
            job_s=choice([0.001, 0.03]),
            fails=choice([0.0, 0.0, 0.05, 0.3]),
            damages=choice([0.0, 0.0, 0.05]),
            copy_s=choice([0.0002, 0.004]),
            late=choice([0.0, 0.0, 0.05]),
        ),
        messages=LineFaults(
            delay_s=0.001,
            jitter_s=choice([0.0, 0.02]),
            loss=choice([0.0, 0.0, 0.05, 0.3]),
            duplicate=choice([0.0, 0.2]),
            reorder=choice([0.0, 0.2]),
        ),
        links=LinkFaults(
            jitter_s=choice([0.0, 0.01]),
            block_s=choice([0.0001, 0.003]),
            breaks=choice([0.0, 0.0, 0.1]),
            alters=choice([0.0, 0.0, 0.01]),
        ),
        events_lost=choice([0.0, 0.0, 0.1, 0.4]),
        policies=(choice(["least_time", "round_robin", "longest_match"]), choice(["request_count", "round_robin"])),
    )


class Play:
    """Clients and misfortunes of one seed."""

    def __init__(self, seed: int) -> None:
        self.draw = stream(seed, "play")
        self.cluster = Cluster(draw_setting(seed), seed)
        self.happened: Counter[str] = Counter()

    def run(self) -> Play:
        clock, draw = self.cluster.clock, self.draw
        for _ in range(draw.randrange(2, 16)):
            clock.call_at(0.07 + draw.random() * draw.choice([0.3, 1.5]), self.arrive)
        for _ in range(draw.choice([0, 1, 1, 3])):
            clock.call_at(0.07 + draw.random() * 1.2, self.forget)
        for _ in range(draw.choice([0, 1, 1, 3])):
            clock.call_at(0.07 + draw.random() * 1.2, self.disturb)
        clock.run_until(1.6)
        self.cluster.run()
        self.check()
        return self

    def arrive(self) -> None:
        draw = self.draw
        prefix = PREFIXES[draw.randrange(3)][: draw.choice([0, 24, 36, 48, 48])]
        prompt = prefix + [500 + draw.randrange(400) for _ in range(draw.randrange(1, 12))]
        more = draw.choice([{}, {}, {}, {"n": 2}, {"prompt_logprobs": 1}])
        deadline_s = draw.choice([None, None, None, None, None, 0.05, 0.4])
        self.happened["deadline"] += deadline_s is not None
        self.cluster.ask(prompt, draw.randrange(1, 12), deadline_s, **more)

    def disturb(self) -> None:
        draw, cluster = self.draw, self.cluster
        kind = draw.choice(("kill", "cancel", *FAULTS[:9]))
        name, short = draw.choice(sorted(cluster.setting.roles)), draw.choice([0.05, 0.4, 1.5])
        node, until_s = cluster.nodes[name], cluster.clock.now() + short
        if kind == "kill":
            cluster.kill(name)
        elif kind == "stop":
            node.stop(short)
        elif kind == "hang":
            node.stop(FOR_EVER_S)
        elif kind == "stick":
            node.stick(draw.choice([short, FOR_EVER_S]))
        elif kind == "stall":
            party = draw.choice(["link", "router", "pool", "peer"])
            if party == "link":
                cluster.links.stall(f"link:{name}", until_s)
            else:
                other = draw.choice(sorted(cluster.setting.roles)) if party == "peer" else party
                cluster.network.stall(*draw.choice([(name, other), (other, name)]), until_s)
        elif kind == "cancel":
            live = [ask for ask in cluster.asks if not ask.is_over]
            if live:
                cluster.cancel(draw.choice(live))
        elif kind == "row" and node.scheduler.running:
            node.executor.failing.add(draw.choice([request.id for request in node.scheduler.running]))
        elif kind == "pool":
            if draw.random() < 0.5:
                cluster.kill_pool(short)
            else:
                cluster.pool.stopped_until_s = until_s
        elif kind == "router" and cluster.router.is_ready:
            cluster.kill_router(short)
        self.happened[kind] += 1

    def forget(self) -> None:
        """No fault: what the device forgets comes back from the tiers."""
        for node in self.cluster.nodes.values():
            node.scheduler.forget_cache()
        self.happened["forget"] += 1

    def check(self) -> None:
        self.cluster.check()
        for ask in self.cluster.asks:
            assert "abort" not in ask.reasons, ask
            if ask.error is not None:
                assert self.explains(ask), ask
                self.happened[f"error {ask.error[0]}"] += 1
            self.happened["tokens"] += sum(map(len, ask.tokens))
        for node in self.cluster.nodes.values():
            self.happened["received"] += node.member.decode.num_received
            self.happened["failed"] += node.member.decode.num_failed
            self.happened["loaded"] += node.copies.num_loaded
            self.happened["forced"] += node.copies.num_forced
            self.happened["spoiled"] += node.copies.num_bad
            self.happened["saved"] += node.copies.num_saved
        self.happened["bad blocks"] += self.cluster.pool.num_bad
        for side in (self.cluster.placement._prompts, self.cluster.placement._answers):
            self.happened["gaps"] += 0 if side is None else side.index.num_gaps
        self.happened["replayed"] += self.cluster.router.num_replayed
        self.happened += self.cluster.happened
        self.happened["stale"] += self.cluster.links.num_stale

    def explains(self, ask: Ask) -> bool:
        """An error is one of those that some fault of this run may end a request with."""
        assert ask.error is not None
        code, text = ask.error
        return any(
            code == c and words in text and ("" in kinds or any(self.happened[kind] for kind in kinds))
            for c, words, kinds in TYPED
        )


@pytest.mark.parametrize("part", range(NUM_PARTS))
def test_faults_of_every_kind_change_no_token_and_leave_nothing_behind(part: int) -> None:
    happened: Counter[str] = Counter()
    for seed in range(part, NUM_SEEDS, NUM_PARTS):
        happened += Play(seed).run().happened
    shown = (*FAULTS, "received", "failed", "loaded", "saved", "gaps", "replayed", "stale", "hung", "flipped")
    for kind in shown:
        assert happened[kind], f"no seed of this part shows {kind}"


def test_a_seed_replays_exactly() -> None:
    for seed in (5, 17, 40):
        first, again = Play(seed).run(), Play(seed).run()
        assert first.cluster.clock.num_events == again.cluster.clock.num_events
        assert first.cluster.seen == again.cluster.seen
        assert [ask.tokens for ask in first.cluster.asks] == [ask.tokens for ask in again.cluster.asks]


def test_without_faults_no_hand_off_fails() -> None:
    """With tiers at both ends, whose loads and saves are moves of the same requests."""
    num_received = num_loaded = 0
    for seed in range(8):
        draw = stream(seed, "asks")
        cluster = Cluster(replace(Setting(), num_blocks=34, roles=ROLES[0]), seed=seed)
        cluster.clock.run_until(0.1)
        for n in range(25):
            cluster.ask(PREFIXES[draw.randrange(3)][: 30 + draw.randrange(30)] + [600 + n], 8)
            cluster.clock.run_until(cluster.clock.now() + draw.choice([0.01, 0.1, 0.5]))
        cluster.run()
        cluster.check()
        assert not sum(node.member.decode.num_failed for node in cluster.nodes.values()), f"seed {seed}"
        num_received += sum(node.member.decode.num_received for node in cluster.nodes.values())
        num_loaded += sum(cluster.nodes[name].copies.num_loaded for name in ("p0", "p1"))
    assert num_received and num_loaded


def test_without_faults_nobody_gets_an_error() -> None:
    cluster = Cluster(replace(Setting(), num_blocks=34), seed=1)
    cluster.clock.run_until(0.1)
    for n in range(12):
        cluster.ask(PREFIXES[n % 3][: 20 + n] + [600 + n], 8)
    cluster.run()
    cluster.check()
    assert all(ask.error is None for ask in cluster.asks)
    assert sum(node.member.decode.num_received for node in cluster.nodes.values())
