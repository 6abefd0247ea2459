"""A rank of its own process: `python peer_process.py receive LISTEN` or `... send ADDRESS MEGABYTES_PER_S`.

A receiver awaits transfer "t" in blocks 1 to 64 and prints its address; a sender sends its blocks 1 to 64 there. Both
go on until they are killed or their standard input ends.
"""

from __future__ import annotations

import sys

from tests.transfer.rig import SECRET, random_memory, receive_move, send_move
from tests.transfer.test_links import BIG

from penstock.transfer.counter import StepCounter
from penstock.transfer.frames import Identity
from penstock.transfer.mover import LinkMover
from penstock.transfer.throttle import TokenBucket


def main() -> None:
    what, address = sys.argv[1:3]
    ids = [list(range(1, 65))]
    identity = Identity(f"child-{what}", BIG.format, SECRET)
    if what == "receive":
        mover = LinkMover(random_memory(BIG, 80, 2), StepCounter(), identity, [address])
        mover.start(receive_move(1, ids))
        print(mover.addresses[0], flush=True)
    else:
        throttle = TokenBucket(1e6 * float(sys.argv[3]))
        mover = LinkMover(random_memory(BIG, 80, 1), StepCounter(), identity, throttle=throttle)
        mover.start(send_move(1, address, ids, ids))
    sys.stdin.read()
    mover.close()


if __name__ == "__main__":
    main()
