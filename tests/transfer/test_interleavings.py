"""Many hand-offs at once, cancelled at random moments on either side, over each link; blocks are reused at once."""

from __future__ import annotations

import random
import time

import numpy as np
import pytest
from tests.transfer.rig import pair, receive_move, send_move, wait
from tests.transfer.test_links import BIG, SCHEMES

from penstock.transfer.throttle import TokenBucket

USED = 0x5A  # what the next owner of a block writes into it


@pytest.mark.parametrize("scheme", SCHEMES)
@pytest.mark.parametrize("seed", range(3))
def test_reused_blocks_are_never_written_late(scheme: str, seed: int) -> None:
    """Each move has exactly one result. After D's, its blocks are its next owner's alone: what arrived in full is what
    P sent, and nothing is written into them any more, whoever was cancelled when. After P's, P may overwrite its own
    and D's sum still agrees. No receipt is left over, and no block."""
    rng = random.Random(seed)
    with pair(scheme, BIG, 64, throttle=TokenBucket(60e6)) as rig:
        rig.p.start(send_move(0, rig.address, [[1]], [[1]], transfer_id="connects"))
        assert wait(rig.p)[0].error is None  # some links take longer for that than all that follows
        free = {"p": set(range(1, 64)), "d": set(range(1, 64))}
        live: dict[int, tuple[list[int], list[int]]] = {}  # hand-off -> blocks of P, of D
        sent: dict[int, str | None] = {}
        content: dict[int, np.ndarray] = {}
        ended: dict[str, list[int]] = {"p": [], "d": []}
        outcome = {"whole": 0, "cancelled": 0}
        started = 0
        deadline = time.monotonic() + 60
        while started < 60 or live:
            assert time.monotonic() < deadline, f"{sorted(live)} did not end"
            count = rng.randint(1, 12)
            if started < 60 and min(len(free["p"]), len(free["d"])) >= count and rng.random() < 0.5:
                started += 1
                src, dst = rng.sample(sorted(free["p"]), count), rng.sample(sorted(free["d"]), count)
                free["p"] -= set(src)
                free["d"] -= set(dst)
                for pool in rig.p_memory.pools:
                    pool[src] = rng.randrange(256)
                    pool[src, :8] = rng.randbytes(1)[0]
                content[started] = np.stack([pool[src] for pool in rig.p_memory.pools])
                live[started] = src, dst
                rig.d.start(receive_move(started, [dst], transfer_id=f"t{started}"))
                rig.p.start(send_move(started, rig.address, [src], [dst], transfer_id=f"t{started}"))
            if live and rng.random() < 0.3:
                rng.choice([rig.p, rig.d]).cancel(rng.choice(sorted(live)))
            for result in rig.p.poll():
                ended["p"].append(result.id)
                sent[result.id] = result.error
                src = live[result.id][0] if result.id in live else []
                for pool in rig.p_memory.pools:
                    pool[src] = USED
                if result.error is None:
                    rig.d.expect(result.id, result.num_units, result.checksum)
                else:
                    rig.d.cancel(result.id)
            for result in rig.d.poll():
                ended["d"].append(result.id)
                dst = live[result.id][1]
                if result.error is None:
                    arrived = np.stack([pool[dst] for pool in rig.d_memory.pools])
                    np.testing.assert_array_equal(arrived, content[result.id])
                    outcome["whole"] += 1
                else:
                    assert result.error == "cancelled"
                    outcome["cancelled"] += 1
                for pool in rig.d_memory.pools:
                    pool[dst] = USED
            for done in [n for n in live if n in ended["d"] and n in sent]:
                src, dst = live.pop(done)
                for pool in rig.d_memory.pools:
                    assert (pool[dst] == USED).all(), f"hand-off {done}: written after its end"
                free["p"] |= set(src)
                free["d"] |= set(dst)
            time.sleep(0.001 * rng.random())
        assert sorted(ended["p"]) == sorted(ended["d"]) == list(range(1, 61))
        assert outcome["whole"]
        assert outcome["cancelled"]
        assert len(free["p"]) == len(free["d"]) == 63
        assert rig.p.poll() == rig.d.poll() == []
