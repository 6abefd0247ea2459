"""What do KV tiers bring on this machine: GB/s and latency of each, where loading beats recomputing, hits by policy?

`speed`: blocks of Qwen3-0.6B's shape (28 layers x 8 KV heads x 128, bf16, 32 tokens: 3.7 MB) are written and read in
runs of 1 to 64, checksums included, contents compared; a line is fitted through the times. `crossover`: from those
lines, the prefill rate above which recomputing a prompt is sooner than loading it, by its length; attention counts with
the square. `workload`: multi-turn chats on the very machines that serve (BlockPool, TierClient, KVPool), on virtual
time with the measured rates: device memory for 5 % of all blocks, host 4x and disk 16x of that.
"""

from __future__ import annotations

import argparse
import hashlib
import itertools
import os
import random
import socket
import statistics
import tempfile
import time
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from penstock.bench.flags import machine, write_json
from penstock.build.launch import PoolProcess
from penstock.cluster.pool import PoolWire
from penstock.cluster.pool_store import PeerStore
from penstock.config.model import KVGroup, KVLayout
from penstock.config.schema import CacheOptions, ClusterOptions, Config
from penstock.config.socket_directory import SocketDirectory
from penstock.core.blocks import BlockPool
from penstock.core.kv_pool import READ, KVPool
from penstock.core.moves import DEVICE, KVMove, MoveResult, Place
from penstock.core.tier_client import TierClient
from penstock.core.tier_costs import PrefillRate
from penstock.core.tiering import HOST, WAIT_COMPLETE, WRITE_THROUGH, ClientSettings, TierSettings, block_key
from penstock.tiers.arena import Arena
from penstock.tiers.disk import DiskStore
from penstock.tiers.mover import TierMover
from penstock.tiers.record import RecordFormat

BLOCK_TOKENS = 32
RUNS = (1, 2, 4, 8, 16, 32, 64)  # blocks
# A token of Qwen3-0.6B: 2 x 0.44e9 operations in matrices, and 4 x 28 layers x 16 heads x 128 per earlier token.
PAIR_SHARE = 4 * 28 * 16 * 128 / (2 * 0.44e9)


def qwen3_layout(num_layers: int) -> KVLayout:
    return KVLayout((KVGroup(0, "full", tuple(range(num_layers)), None, BLOCK_TOKENS, 8, 128, "bfloat16"),))


def key_of(number: int) -> bytes:
    return block_key(hashlib.blake2b(str(number).encode(), digest_size=16).digest(), 0)


# ---- speed ----


def timed(call: Callable[..., Any], *arguments: Any) -> tuple[float, Any]:
    begin = time.perf_counter()
    found = call(*arguments)
    return time.perf_counter() - begin, found


def fit(times: dict[int, list[float]], block_bytes: int) -> dict[str, float]:
    """Median seconds per run length -> latency and GB/s of the least-squares line, weighted by 1 / seconds^2."""
    sizes = np.array([n * block_bytes for n in times], float)
    seconds = np.array([statistics.median(found) for found in times.values()])
    slope, latency = np.polyfit(sizes, seconds, 1, w=1 / seconds)
    if latency < 0:
        latency, slope = 0.0, float(np.median(seconds / sizes))
    return {"latency_ms": 1e3 * float(latency), "gb_s": 1e-9 / float(slope)}


def measure_host(layout: KVLayout, rounds: int) -> dict[str, Any]:
    """Device memory to arena slots and back, as an engine's mover does it."""
    group, most = layout.groups[0], max(RUNS)
    dice = np.random.default_rng(0)
    pools = [dice.integers(0, 256, (2 * most + 1, group.layer_bytes), dtype=np.uint8) for _ in group.layers]
    arena = Arena.private(layout, (most,))
    mover = TierMover(layout, pools, arena)

    ids = itertools.count()

    def carry(src: Place, dst: Place) -> None:
        mover.start(KVMove(next(ids), "t", "r", src, dst))
        while not (found := mover.poll()):
            time.sleep(1e-4)
        assert found[0].error is None, found[0].error

    times: dict[str, dict[int, list[float]]] = {"write": {}, "read": {}}
    for round_ in range(rounds + 1):
        for num in RUNS:
            slots, keys = (tuple(range(1, num + 1)),), tuple(map(key_of, range(num)))
            mine, back = (tuple(range(1, num + 1)),), (tuple(range(most + 1, most + num + 1)),)
            write_s, _ = timed(carry, Place(DEVICE, mine), Place(HOST, slots, keys))
            read_s, _ = timed(carry, Place(HOST, slots, keys), Place(DEVICE, back))
            assert all(np.array_equal(p[1 : num + 1], p[most + 1 : most + num + 1]) for p in pools[:: len(pools) // 2])
            if round_:  # the first touches the memory
                times["write"].setdefault(num, []).append(write_s)
                times["read"].setdefault(num, []).append(read_s)
    mover.close()
    return {what: fit(found, group.block_bytes) for what, found in times.items()}


def measure_store(store: Any, layout: KVLayout, rounds: int, before_read: Callable[[], None]) -> dict[str, Any]:
    """Records from and into memory, whole and checked."""
    format_ = RecordFormat.of(layout.groups[0])
    dice = np.random.default_rng(0)
    blocks = [dice.integers(0, 256, format_.num_bytes, dtype=np.uint8) for _ in range(max(RUNS))]
    buffers = [np.zeros(format_.num_bytes, np.uint8) for _ in blocks]
    sums = [tuple(zlib.crc32(format_.page(block, n).data) for n in range(format_.num_layers)) for block in blocks]
    times: dict[str, dict[int, list[float]]] = {"write": {}, "read": {}}
    number = 0
    for _ in range(rounds):
        for num in RUNS:
            keys = [key_of(number + n) for n in range(num)]
            number += num
            for block, key, found in zip(blocks, keys, sums):
                format_.seal(block, key, found)
            seconds, ok = timed(store.write, keys, [block.data for block in blocks[:num]])
            assert all(ok), store.error
            times["write"].setdefault(num, []).append(seconds)
            before_read()
            seconds, ok = timed(store.read, keys, [buffer.data for buffer in buffers[:num]])
            assert all(ok), store.error
            assert all(np.array_equal(a, b) for a, b in zip(blocks[:num], buffers))
            times["read"].setdefault(num, []).append(seconds)
            store.delete(keys)
    return {what: fit(found, layout.groups[0].block_bytes) for what, found in times.items()}


def measure_peer(layout: KVLayout, rounds: int) -> dict[str, Any]:
    """The host memory of another machine's pool, which here is another process on this one."""
    with socket.create_server(("127.0.0.1", 0)) as free:
        place = f"127.0.0.1:{free.getsockname()[1]}"
    size = (max(RUNS) + 16) * RecordFormat.of(layout.groups[0]).num_bytes
    cache = CacheOptions(kv_offloading_size=size, kv_pool_listen=place)
    directory = SocketDirectory()
    pool = PoolProcess(Config(cache=cache, cluster=ClusterOptions(cluster_secret="benchmark")), directory.path)
    line = PoolWire(directory.path, layout)
    line.join()  # as its engine does; then it listens
    store = PeerStore(f"tcp://{place}", layout, "benchmark", timeout_s=10.0)
    try:
        return measure_store(store, layout, rounds, lambda: None)
    finally:
        for each in (store, line, pool, directory):
            each.close()


def drop_page_cache(directory: Path) -> None:
    """Of the store's files: what is read then comes from the disk."""
    for path in directory.glob("*.segment"):
        fd = os.open(path, os.O_RDONLY)
        os.fsync(fd)
        os.posix_fadvise(fd, 0, 0, os.POSIX_FADV_DONTNEED)
        os.close(fd)


def measure(rounds: int, directory: Path | None, redis_url: str | None) -> dict[str, Any]:
    layout = qwen3_layout(28)
    found = {"host": measure_host(layout, rounds)}
    with tempfile.TemporaryDirectory(dir=directory) as name:
        store = DiskStore(Path(name), layout, 512 << 20)
        found["disk, page cache"] = measure_store(store, layout, rounds, lambda: None)
        found["disk"] = measure_store(store, layout, rounds, lambda: drop_page_cache(Path(name)))
        store.close()
    found["peer"] = measure_peer(layout, rounds)
    if redis_url:
        from penstock.tiers.redis import RedisStore  # the extra may not be here

        remote = RedisStore(redis_url, layout, "benchmark", timeout_s=10.0)
        found["redis"] = measure_store(remote, layout, rounds, lambda: None)
        remote.close()
    return found


# ---- crossover ----


def crossover(speed: dict[str, Any]) -> list[dict[str, Any]]:
    """Per tier and prompt length: seconds to load, and the rate (of a short prefill) above which computing wins."""
    block_bytes = qwen3_layout(28).groups[0].block_bytes
    host = speed["host"]["read"]
    rows = []
    for tier, measured in speed.items():
        for tokens in (256, 1024, 4096, 16384, 65536):
            num_bytes = tokens // BLOCK_TOKENS * block_bytes
            load_s = host["latency_ms"] / 1e3 + num_bytes / host["gb_s"] / 1e9
            if tier != "host":
                load_s += measured["read"]["latency_ms"] / 1e3 + num_bytes / measured["read"]["gb_s"] / 1e9
            work = tokens + PAIR_SHARE * tokens**2 / 2  # in tokens of a short prompt
            rows.append({"tier": tier, "tokens": tokens, "load_s": load_s, "break_even_tokens_s": work / load_s})
    return rows


# ---- workload ----


class Chats:
    """Sessions over a few system prompts; a turn repeats all before it and adds some blocks. Deterministic by seed."""

    def __init__(self, num_sessions: int, seed: int) -> None:
        dice = random.Random(seed)
        waiting: list[tuple[float, int, int]] = []
        names: dict[int, list[bytes]] = {}
        turns_left: dict[int, int] = {}
        self.requests: list[tuple[float, list[bytes], int]] = []  # arrival, hashes, blocks of the prompt
        start = 0.0
        for session in range(num_sessions):
            start += dice.expovariate(1 / 4.0)
            system = min(int(dice.paretovariate(1.0)), 8)
            names[session] = [self._name(f"system {system}", n) for n in range(16)]
            turns_left[session] = 1 + min(int(dice.expovariate(1 / 4.0)), 15)
            waiting.append((start, session, 0))
        while waiting:
            now, session, turn = min(waiting)
            waiting.remove((now, session, turn))
            chat = names[session]
            asked = dice.randrange(2, 20)
            chat += [self._name(f"{session} {turn}", n) for n in range(asked)]
            num_prompt = len(chat)
            chat += [self._name(f"{session} {turn} answer", n) for n in range(dice.randrange(1, 16))]
            self.requests.append((now, list(chat), num_prompt))
            turns_left[session] -= 1
            if turns_left[session]:
                waiting.append((now + dice.expovariate(1 / 120.0), session, turn + 1))
        self.num_blocks = len({name for _, chat, _ in self.requests for name in chat})
        seen: set[bytes] = set()
        num_new = 0  # what no cache can have
        for _, chat, num_prompt in self.requests:
            num_new += num_prompt - sum(name in seen for name in chat[: num_prompt - 1])
            seen.update(chat)
        self.new_share = num_new / sum(num_prompt for _, _, num_prompt in self.requests)

    @staticmethod
    def _name(text: str, number: int) -> bytes:
        return hashlib.blake2b(f"{text}:{number}".encode(), digest_size=16).digest()


class Replay:
    """One engine and its pool, one request after another, on virtual time."""

    def __init__(self, chats: Chats, policy: str, rates: dict[str, Any], token_s: float, tiers: str) -> None:
        self.chats = chats
        self.num_device = max(64, chats.num_blocks // 20)
        self.layout = qwen3_layout(28)
        self.block_bytes = self.layout.groups[0].block_bytes
        self.rates = rates
        self.device = BlockPool(self.num_device + 1)
        self.prefill = PrefillRate(token_s, token_s * PAIR_SHARE)
        disk = [TierSettings("disk", (16 * self.num_device,), WRITE_THROUGH)] if "disk" in tiers else []
        num_host = 4 * self.num_device if "host" in tiers else 1
        self.pool = KVPool([self.block_bytes], [num_host], disk, policy)
        settings = ClientSettings(wait=WAIT_COMPLETE, min_tokens=64, max_queued=1 << 20)
        self.client = TierClient(self.layout, settings, self.prefill)
        self.tiered = bool(tiers)
        self.disk: set[bytes] = set()
        self.hits = {"device": 0, "host": 0, "disk": 0, "recomputed": 0}
        self.ttft_s: list[float] = []
        self.move_id = 0

    def seconds(self, tier: str, what: str, num_blocks: int) -> float:
        line = self.rates[tier][what]
        return line["latency_ms"] / 1e3 + num_blocks * self.block_bytes / line["gb_s"] / 1e9

    def pump(self, now: float) -> float:
        """Messages until nothing is left; seconds that reads from disk took."""
        read_s = 0.0
        while True:
            messages = self.client.messages()
            jobs = self.pool.jobs()
            if not messages and not jobs:
                return read_s
            answers = [found for message in messages for found in self.pool.handle("engine", message, now)]
            for job in jobs:
                is_read = job.kind == READ
                seconds = self.seconds("disk", "read" if is_read else "write", len(job.keys))
                read_s += seconds if is_read else 0.0
                ok = [not is_read or key in self.disk for key in job.keys]
                if job.kind == "write":
                    self.disk.update(job.keys)
                elif job.kind == "delete":
                    self.disk.difference_update(job.keys)
                answers += self.pool.job_done(job.id, ok, seconds, now)
            for _, message in answers:
                self.client.handle(message, now)

    def run(self) -> dict[str, Any]:
        free_s = 0.0
        for number, (arrival, chat, num_prompt) in enumerate(self.chats.requests):
            now = max(arrival, free_s)
            free_s = now + self.request(f"r{number}", chat, num_prompt, now)
            if number % 16 == 0:
                self.pool.tick(now)
                self.client.tick(now)
        total = sum(self.hits.values())
        return {
            **{f"{tier}_hit": count / total for tier, count in self.hits.items()},
            "ttft_mean_s": statistics.fmean(self.ttft_s),
            "ttft_p95_s": statistics.quantiles(self.ttft_s, n=20)[-1],
            "policy_at_end": self.pool.host[0].policy_name,
        }

    def request(self, request_id: str, chat: list[bytes], num_prompt: int, now: float) -> float:
        limit = num_prompt - 1  # the last block is computed, for its logits
        held = []
        for name in chat[:limit]:
            block = self.device.hit(name)
            if block is None:
                break
            self.device.hold(block)
            held.append(block.id)
        at = len(held)
        self.hits["device"] += at
        spent_s = 0.0
        if self.tiered:
            before = {key for index in self.pool.host for key in index.entries}
            self.client.arrived(request_id, chat[:limit], at, now)
            spent_s += self.pump(now)
            while at < limit:
                offer = self.client.offer(request_id, at, now)
                if not offer.num_blocks:
                    break
                load_s = self.seconds("host", "read", offer.num_blocks)
                self.move_id += 1
                self.client.load_started(request_id, at, offer.num_blocks, self.move_id)
                num_bytes = offer.num_blocks * self.block_bytes
                self.client.moved(MoveResult(self.move_id, num_bytes=num_bytes, seconds=load_s))
                assert offer.place is not None
                in_host = sum(key in before for key in offer.place.keys)
                self.hits["host"] += in_host
                self.hits["disk"] += offer.num_blocks - in_host
                spent_s += load_s
                at += offer.num_blocks
            self.client.ended(request_id)
        spent_s += self.compute(at, num_prompt)
        self.ttft_s.append(spent_s)
        self.publish(chat, held, now)
        self.pump(now)
        return spent_s

    def compute(self, start: int, end: int) -> float:
        self.hits["recomputed"] += end - start
        return self.prefill.seconds(start * BLOCK_TOKENS, end * BLOCK_TOKENS)

    def publish(self, chat: list[bytes], held: list[int], now: float) -> None:
        """Prompt and answer are on the device, then only in its cache."""
        room = self.device.num_available
        for n in range(len(held), min(len(chat), len(held) + room)):
            held.append(self.device.allocate(now))
            self.device.publish(held[-1], chat[n], chat[n - 1] if n else None)
            if self.tiered:
                self.client.saving.published(chat[n], chat[n - 1] if n else None, n)
        self.pump(now)
        while saves := self.client.saving.ready():
            for save in saves:
                self.move_id += 1
                self.client.saving.started(save, self.move_id, range(len(save.items)))
                seconds = self.seconds("host", "write", len(save.items))
                self.client.moved(MoveResult(self.move_id, seconds=seconds))
            self.pump(now)
        for block_id in reversed(held):
            self.device.release(block_id, -1)


def workload(num_sessions: int, rates: dict[str, Any], token_s: float, seed: int) -> list[dict[str, Any]]:
    chats = Chats(num_sessions, seed)
    rows = []
    for tiers, policy in (
        ("", "lru"), ("host", "gdsf"), *(("host+disk", policy) for policy in ("lru", "lfu", "gdsf", "auto"))
    ):  # fmt: skip
        replay = Replay(chats, policy, rates, token_s, tiers)
        seconds, found = timed(replay.run)
        rows.append({"tiers": tiers or "none", "policy": policy, **found, "wall_s": seconds})
    capacity = {
        "requests": len(chats.requests),
        "blocks": chats.num_blocks,
        "device_blocks": replay.num_device,
        "new_share": round(chats.new_share, 4),
    }
    return [capacity, *rows]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--directory", type=Path, help="on the disk to be measured [the temporary directory]")
    parser.add_argument("--redis-url", help="a server to be measured, e.g. redis://127.0.0.1:6379/0")
    parser.add_argument("--prefill-tokens-s", type=float, default=1000.0, help="of a short prompt, in the workload")
    parser.add_argument("--sessions", type=int, default=400)
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--out", type=Path)
    given = parser.parse_args()

    speed = measure(given.rounds, given.directory, given.redis_url)
    print(f"{'tier':18}{'read GB/s':>10}{'ms':>8}{'write GB/s':>12}{'ms':>8}")
    for tier, found in speed.items():
        read, write = found["read"], found["write"]
        print(f"{tier:18}{read['gb_s']:10.2f}{read['latency_ms']:8.2f}{write['gb_s']:12.2f}{write['latency_ms']:8.2f}")
    curve = crossover(speed)
    print("\ntokens/s of prefill above which recomputing is sooner than loading, by prompt length")
    for tier in speed:
        cells = [f"{row['tokens']}: {row['break_even_tokens_s']:,.0f}" for row in curve if row["tier"] == tier]
        print(f"{tier:18}" + "   ".join(cells))
    rows = workload(given.sessions, speed, 1 / given.prefill_tokens_s, given.seed)
    print(f"\n{rows[0]}, prefill {given.prefill_tokens_s:g} tokens/s")
    for row in rows[1:]:
        hits = "  ".join(f"{tier} {row[tier + '_hit']:6.1%}" for tier in ("device", "host", "disk", "recomputed"))
        print(
            f"{row['tiers']:10}{row['policy']:6}{hits}  TTFT {row['ttft_mean_s']:.3f} s, P95 {row['ttft_p95_s']:.3f} s"
        )
    if given.out:
        settings = {name: str(value) for name, value in vars(given).items() if name not in ("out", "directory")}
        found = {"settings": settings, "speed": speed, "crossover": curve, "workload": rows}
        write_json(given.out, {**machine(), **found})


if __name__ == "__main__":
    main()
