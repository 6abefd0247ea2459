"""How much of a KV transfer is still noticed, by prompt length, when layers are sent while others compute?

Two processes and a real link between them, limited by a token bucket to 0.1-10 GB/s. Prefill is pretended: a thread
advances the step counter layer by layer at a stated rate, a step per chunk, and each step's blocks are one move that
follows it, exactly as an engine would start them. Compared: `naive` (one transfer when all is computed), `whole` (each
chunk when its step is over), `layerwise` (each layer when it is done) and `coalesced` (layers together until a message
is worth its cost). The exposed tail is the time from the end of the last layer's computation to the moment when the
receiver has everything in place and its checksum agrees; a run whose checksum differs ends the benchmark. One table
per link speed, with the growth of the tail per token as a share of naive's; --out writes all lines as JSON. Both
processes share this machine's cores and memory, so beyond some GB/s the machine is the limit and not the bucket:
`link_gbs` is what was measured.
"""

from __future__ import annotations

import argparse
import itertools
import multiprocessing
import statistics
import threading
import time
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import numpy as np

from penstock.bench.flags import machine, write_json
from penstock.config.model import KVGroup, KVLayout
from penstock.core.moves import DEVICE, KVMove, Place
from penstock.transfer import mooncake, nixl
from penstock.transfer.counter import StepCounter
from penstock.transfer.frames import Identity, LinkError
from penstock.transfer.memory import KVMemory
from penstock.transfer.mover import LinkMover
from penstock.transfer.throttle import TokenBucket

BLOCK_SIZE = 32
MODES = ("naive", "whole", "layerwise", "coalesced")
LISTEN = {
    "tcp": "tcp://127.0.0.1:0", "shm": "shm://", "nixl": "nixl://127.0.0.1:0", "mooncake": "mooncake://127.0.0.1:0",
}  # fmt: skip
SECRET = b"of this benchmark"
TIMEOUT_S = 30.0


def layout_of(num_layers: int, num_kv_heads: int, head_dim: int) -> KVLayout:
    return KVLayout(
        (KVGroup(0, "full", tuple(range(num_layers)), None, BLOCK_SIZE, num_kv_heads, head_dim, "bfloat16"),)
    )


def memory_of(layout: KVLayout, num_blocks: int, seed: int) -> KVMemory:
    """Pools of random bytes, which are in memory because they were written."""
    (group,) = layout.groups
    rng = np.random.default_rng(seed)
    return KVMemory(layout, [rng.integers(0, 256, (num_blocks, group.layer_bytes), np.uint8) for _ in group.layers])


def wait(mover: LinkMover, count: int) -> None:
    """Until so many moves have ended well."""
    deadline = time.monotonic() + TIMEOUT_S
    while count:
        for result in mover.poll():
            if result.error:
                raise SystemExit(f"a move failed: {result.error}")
            count -= 1
        if time.monotonic() > deadline:
            raise SystemExit(f"{count} moves did not end")
        time.sleep(1e-4)


def receive(pipe: Connection, layout: KVLayout, num_blocks: int, listen: str) -> None:
    """The other process: (transfer, blocks, units, checksum) in, the moment at which all was in place out."""
    mover = LinkMover(
        memory_of(layout, num_blocks, 2), StepCounter(), Identity("receiver", layout.format, SECRET), [listen]
    )
    pipe.send(mover.addresses[0])
    while (job := pipe.recv()) is not None:
        move_id, blocks, num_units, checksum = job
        place = Place(DEVICE, (tuple(range(1, blocks + 1)),))
        mover.start(KVMove(move_id, str(move_id), "r", Place("tcp://sender:1"), place))
        mover.expect(move_id, num_units, checksum)
        pipe.send("ready")
        wait(mover, 1)
        pipe.send(time.monotonic())  # one clock for all processes of a machine
    mover.close()


class Prefill:
    """A pretended one: steps of at most `chunk` tokens, all layers of a step equally long."""

    def __init__(self, counter: StepCounter, num_layers: int, tokens_per_s: float, chunk: int) -> None:
        self.counter, self.num_layers, self.tokens_per_s, self.chunk = counter, num_layers, tokens_per_s, chunk
        self.step = 0
        self.ended_s = 0.0

    def chunks(self, num_tokens: int) -> list[range]:
        """Blocks of each step."""
        ends = [*range(self.chunk, num_tokens, self.chunk), num_tokens]
        starts = [0, *ends[:-1]]
        return [range(a // BLOCK_SIZE + 1, b // BLOCK_SIZE + 1) for a, b in zip(starts, ends, strict=True)]

    def run(self, chunks: list[range], begin: Any) -> None:
        """Compute; `begin(step, blocks)` is called as each step begins, as an engine starts its moves."""
        due = time.monotonic()
        for blocks in chunks:
            self.step += 1
            begin(self.step, blocks)
            self.counter.begin(self.step)
            for _ in range(self.num_layers):
                due += len(blocks) * BLOCK_SIZE / self.tokens_per_s / self.num_layers
                time.sleep(max(0.0, due - time.monotonic()))
                self.counter.layer_done()
            self.counter.end()
        self.ended_s = time.monotonic()


class Rig:
    """A sender here, a receiver in another process, and the link between them in one mode at one speed."""

    def __init__(self, args: argparse.Namespace, link: str, memory: KVMemory, mode: str, gbs: float) -> None:
        self.memory, self.mode, self.args = memory, mode, args
        self.counter = StepCounter()
        context = multiprocessing.get_context("spawn")
        self.pipe, theirs = context.Pipe()
        shape = (memory.layout, memory.num_blocks(0), LISTEN[link])
        self.process = context.Process(target=receive, args=(theirs, *shape), daemon=True)
        self.process.start()
        self.address = self.pipe.recv()
        self.mover = LinkMover(
            memory,
            self.counter,
            Identity("sender", memory.layout.format, SECRET),
            mode="coalesced" if mode == "naive" else mode,
            throttle=TokenBucket(gbs * 1e9),
        )
        self.prefill = Prefill(self.counter, memory.num_layers, args.tokens_per_s, args.chunk)
        self.num_moves = 0

    def transfer(self, num_tokens: int) -> float:
        """One prompt, computed and carried; seconds of its tail."""
        blocks = list(range(1, num_tokens // BLOCK_SIZE + 1))
        checksum = sum(self.memory.checksum(layer, blocks) for layer in range(self.memory.num_layers))
        transfer_id = self.num_moves + 1
        self.pipe.send((transfer_id, len(blocks), len(blocks) * self.memory.num_layers, checksum))
        assert self.pipe.recv() == "ready"

        def begin(step: int, chunk: range) -> None:
            self.num_moves += 1
            place = (tuple(chunk),)
            ends = Place(DEVICE, place), Place(self.address, place)
            self.mover.start(KVMove(self.num_moves, str(transfer_id), "r", *ends, after_step=step))

        follows = self.mode != "naive"
        chunks = self.prefill.chunks(num_tokens)
        compute = threading.Thread(target=self.prefill.run, args=(chunks, begin if follows else lambda *_: None))
        compute.start()
        compute.join()
        if not follows:
            begin(-1, range(1, len(blocks) + 1))
        arrived_s: float = self.pipe.recv()
        wait(self.mover, len(chunks) if follows else 1)
        return arrived_s - self.prefill.ended_s

    def close(self) -> None:
        self.pipe.send(None)
        self.mover.close()
        self.process.join(20)
        self.process.kill()


def slope(lengths: list[int], seconds: list[float]) -> float:
    """Seconds per token, least squares."""
    return float(np.polyfit(lengths, seconds, 1)[0]) if len(lengths) > 1 else float("nan")


def measure(args: argparse.Namespace, link: str, memory: KVMemory, gbs: float) -> list[dict[str, Any]]:
    """All modes of one link at one speed."""
    (group,) = memory.layout.groups
    token_bytes = group.block_bytes // BLOCK_SIZE
    lines: list[dict[str, Any]] = []
    tails: dict[str, list[float]] = {}
    for mode in MODES:
        rig = Rig(args, link, memory, mode, gbs)
        try:
            rig.transfer(BLOCK_SIZE)  # connects, which measures the link
            for num_tokens in args.lengths:
                before = rig.mover.stats()[rig.address]
                tail_s = statistics.median(rig.transfer(num_tokens) for _ in range(args.repeats))
                after = rig.mover.stats()[rig.address]
                assert after.cost is not None
                tails.setdefault(mode, []).append(tail_s)
                lines.append(
                    {
                        "link": link, "limit_gbs": gbs, "link_gbs": round(after.cost.bytes_per_s / 1e9, 3),
                        "message_us": round(1e6 * after.cost.message_s, 1),
                        "min_message_bytes": round(after.cost.min_message_bytes),
                        "mode": mode, "prompt_tokens": num_tokens, "kv_bytes": num_tokens * token_bytes,
                        "compute_s": num_tokens / args.tokens_per_s, "tail_ms": round(1e3 * tail_s, 2),
                        "messages": (after.num_messages - before.num_messages) // args.repeats,
                        "overlap_ratio": round(max(0.0, 1.0 - tail_s / tails["naive"][len(tails[mode]) - 1]), 4),
                    }
                )  # fmt: skip
        finally:
            rig.close()
    naive = slope(args.lengths, tails["naive"])
    for line in lines:
        line["slope_of_naive"] = round(slope(args.lengths, tails[line["mode"]]) / naive, 4)
    return lines


def show(lines: list[dict[str, Any]], lengths: list[int]) -> None:
    first = lines[-1]
    print(
        f"\n{first['link']} limited to {first['limit_gbs']:g} GB/s, measured {first['link_gbs']:.2f} GB/s and "
        f"{first['message_us']:.0f} us per message: at least {first['min_message_bytes'] / 1e3:.0f} kB in one\n"
        f"{'exposed tail, ms':<18}" + "".join(f"{n:>9}" for n in lengths) + "   slope/naive   overlap at the longest"
    )
    for mode in MODES:
        mine = [line for line in lines if line["mode"] == mode]
        cells = "".join(f"{line['tail_ms']:>9.2f}" for line in mine)
        print(f"{mode:<18}{cells}{mine[-1]['slope_of_naive']:>13.1%}{mine[-1]['overlap_ratio']:>24.1%}")
        print(f"{'  messages':<18}" + "".join(f"{line['messages']:>9}" for line in mine), flush=True)


def compare(lines: list[dict[str, Any]], links: list[str]) -> None:
    """The links side by side: tails of the longest prompt, in ms."""
    longest = max(line["prompt_tokens"] for line in lines)
    tails = {
        (line["limit_gbs"], line["mode"], line["link"]): line["tail_ms"]
        for line in lines
        if line["prompt_tokens"] == longest
    }
    print(f"\n{'tail at ' + format(longest, ','):<24}" + "".join(f"{link:>12}" for link in links))
    for limit, mode in dict.fromkeys((limit, mode) for limit, mode, _ in tails):
        cells = "".join(f"{tails[limit, mode, link]:>12.2f}" for link in links)
        print(f"{f'{limit:g} GB/s, {mode}':<24}{cells}")


def is_here(link: str) -> bool:
    """False for an extra that is not installed."""
    try:
        {"nixl": nixl.load, "mooncake": mooncake.load}.get(link, lambda: None)()
    except LinkError as error:
        print(f"{link} is left out: {error}")
        return False
    return True


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--link", choices=list(LISTEN), nargs="+", default=["tcp"], help="several: side by side")
    parser.add_argument("--gbs", type=float, nargs="+", default=[0.1, 0.3, 1.0, 3.0, 10.0], help="of the token bucket")
    parser.add_argument("--lengths", type=int, nargs="+", default=[512 << n for n in range(7)], help="tokens")
    parser.add_argument("--chunk", type=int, default=2048, help="tokens of a prefill step")
    parser.add_argument("--tokens-per-s", type=float, default=20e3, help="of the pretended prefill")
    parser.add_argument("--layers", type=int, default=8)
    parser.add_argument("--kv-heads", type=int, default=2)
    parser.add_argument("--head-dim", type=int, default=64)
    parser.add_argument("--repeats", type=int, default=3, help="per length and mode; the median counts")
    parser.add_argument("--out", type=Path, help="write the lines as JSON")
    args = parser.parse_args()
    if any(n % BLOCK_SIZE for n in [*args.lengths, args.chunk]):
        parser.error(f"lengths and chunk must be multiples of {BLOCK_SIZE} tokens")
    layout = layout_of(args.layers, args.kv_heads, args.head_dim)
    memory = memory_of(layout, max(args.lengths) // BLOCK_SIZE + 1, 1)
    token_bytes = layout.groups[0].block_bytes // BLOCK_SIZE
    facts = {
        **machine(), "format": layout.format, "bytes_per_token": token_bytes, "chunk": args.chunk,
        "tokens_per_s": args.tokens_per_s, "repeats": args.repeats,
    }  # fmt: skip
    links = [link for link in args.link if is_here(link)]
    print(
        f"{', '.join(links)}; {layout.format}: {token_bytes} bytes per token; prefill of {args.tokens_per_s:g} tokens/s"
    )
    lines = []
    for link, gbs in itertools.product(links, args.gbs):
        found = measure(args, link, memory, gbs)
        show(found, args.lengths)
        lines += found
    if len(links) > 1:
        compare(lines, links)
    if args.out:
        write_json(args.out, {"facts": facts, "lines": lines})


if __name__ == "__main__":
    main()
