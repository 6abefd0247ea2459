"""Who must give way so that a request gets its blocks. Pure: decides, and changes nothing."""

from __future__ import annotations

from collections.abc import Sequence

from penstock.core.doors import SchedulePolicy
from penstock.core.kv_cache import KVCache
from penstock.core.request import Request


def victims_for(
    request: Request, needs: list[int], running: Sequence[Request], step: int, kv: KVCache, policy: SchedulePolicy,
    now: float,
) -> list[Request] | None:  # fmt: skip
    """Those to preempt until `needs` blocks per KV group are there, or None: `request` waits with what it has.

    Nobody is preempted in vain, nobody whom the plan of `step` holds already, nobody whose blocks come back soon
    anyway, and nobody for a request that would give way first.
    """
    leaving = [r for r in running if r.num_unsampled and r.num_known >= r.max_total]
    staying = [r for r in running if r.plan_marker != step and r not in leaving]
    victims: list[Request] = []
    while not kv.would_have(needs, leaving + victims):
        victim = policy.victim(staying, now)
        if victim is request:
            return None
        staying.remove(victim)
        victims.append(victim)
    return victims
