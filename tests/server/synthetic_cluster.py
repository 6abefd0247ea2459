"""A cluster as its reports show it: one prefill engine, one decode engine, a link between them, tiers below.

Everything is merged by the product's own code; only the engines' words are made up.
"""

from __future__ import annotations

import msgspec
from tests.server.synthetic_messages import KV, READY

from penstock.cluster.merge import merged_ready, merged_report
from penstock.engine.messages import HandOffs, KVReport, LinkReport, Peer, Ready, Report, RequestRecord, TierReport

MAPPED = msgspec.structs.replace(KV, num_cells=100, blocks_per_cell=1, cells="u20s5f5c30.40")


def ready_of(name: str, role: str) -> Ready:
    return msgspec.structs.replace(READY, peer=Peer(name, role, f"ipc://{name}", f"shm://{name}.link"))


PREFILL, DECODE = ready_of("prefill-0", "prefill"), ready_of("decode-0", "decode")
CLUSTER = merged_ready([PREFILL, DECODE], [DECODE])


def engine_report(name: str, role: str, now: float, kv: KVReport = MAPPED, **changes: object) -> Report:
    plain = Report(now, 0, 0, {}, kv, 5, 0.5, 0, 0, 0, 0, 0, 0, [], [], name=name, role=role)
    return msgspec.structs.replace(plain, **changes)


def prefill_report(now: float, num_prompts: int, num_sending: int = 2) -> Report:
    """`num_prompts` of 1,000 tokens each were computed for the other engine, and as many MB sent."""
    sent = 1_000_000 * num_prompts
    return engine_report(
        "prefill-0",
        "prefill",
        now,
        num_running=num_sending,
        num_waiting=1,
        waiting_by_reason={"budget": 1},
        guests_running=num_sending,
        guests_waiting_by_reason={"budget": 1},
        prefill_tokens_total=1000 * num_prompts,
        handoffs=HandOffs(num_sent=num_prompts, num_sending=num_sending),
        links=[
            LinkReport(
                "decode-0", "shm", sent, 2 * num_prompts, num_prompts, 1, num_sending,
                0.01 * num_prompts, 0.002 * num_prompts, 0.1, 0.8,
            )
        ],
        iteration_tokens=[256],
    )  # fmt: skip


def decode_report(now: float, num_prompts: int, requests: tuple[RequestRecord, ...] = ()) -> Report:
    """The same prompts received, a quarter of their tokens from the sender's cache; and a few from tiers."""
    host = TierReport("host", 400, 100, 10 * num_prompts, 5000, 7000, 0.25, 1.5)
    disk = TierReport("disk", 1600, 1600, 2 * num_prompts, 100, 200, 0.1, -0.5, "off: loads took longer than computing")
    sources = {"device": 320, "peer": 1000 * num_prompts, "host": 384 * num_prompts, "compute": 64}
    return engine_report(
        "decode-0",
        "decode",
        now,
        num_running=3,
        prompt_tokens_total=sum(sources.values()),
        prompt_tokens_cached_total=320 + 384 * num_prompts,
        prompt_tokens_by_source=sources,
        generation_tokens_total=50 * num_prompts,
        prefill_tokens_total=64,
        handoffs=HandOffs(
            num_received=num_prompts,
            num_failed=1,
            num_local=4,
            num_receiving=2,
            tokens_received=1000 * num_prompts,
            tokens_received_cached=250 * num_prompts,
        ),
        tiers=[disk, host],
        iteration_tokens=[3],
        requests=list(requests),
    )


def cluster_report(now: float, num_prompts: int, requests: tuple[RequestRecord, ...] = ()) -> Report:
    """What the router tells its front end."""
    decode = decode_report(now, num_prompts, requests)
    return merged_report([prefill_report(now, num_prompts), decode], now, decode)
