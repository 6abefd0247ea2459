"""What an engine's links have carried, as its reports tell it. Pure."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping

from penstock.cluster.prefill_side import PrefillSide
from penstock.engine.messages import LinkReport
from penstock.transfer.sender import PeerStats


def link_reports(stats: Mapping[str, PeerStats], names: Mapping[str, str], prefill: PrefillSide) -> list[LinkReport]:
    """One for each peer that anything was sent to. `names`: of peers, by link address.

    A peer that was started anew has another address, and its numbers go on.
    """
    in_flight = Counter(sending.ticket.decode_engine for sending in prefill.live.values())
    schemes: dict[str, str] = {}
    sums: dict[str, PeerStats] = {}
    for address, sent in stats.items():
        peer = names.get(address, address)
        schemes[peer] = address.partition("://")[0]
        total = sums.setdefault(peer, PeerStats())
        total.num_bytes += sent.num_bytes
        total.num_messages += sent.num_messages
        total.num_moves += sent.num_moves
        total.num_failed += sent.num_failed
        total.busy_s += sent.busy_s
        total.overlappable_s += sent.overlappable_s
        total.exposed_s += sent.exposed_s
    return [
        LinkReport(
            peer=peer,
            scheme=schemes[peer],
            num_bytes=total.num_bytes,
            num_messages=total.num_messages,
            num_transfers=total.num_moves,
            num_failed=total.num_failed,
            num_in_flight=in_flight[peer],
            busy_s=total.busy_s,
            exposed_s=total.exposed_s,
            gigabytes_per_s=total.gigabytes_per_s,
            overlap=total.overlap_ratio,
        )
        for peer, total in sums.items()
    ]
