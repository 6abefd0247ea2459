"""The process of a machine's KV pool: `python -m penstock.build.pool_process DIRECTORY LEVEL`. Imports no torch.

LEVEL: what it logs from. It reads its settings from standard input, and leaves when that ends.
"""

from __future__ import annotations

import signal
import sys
import threading
from pathlib import Path

import msgspec

from penstock.cluster.pool import PoolServer
from penstock.config.kv_pool import PoolSettings
from penstock.config.log import set_up_logging


def main(directory: str, log_level: str) -> int:
    set_up_logging(log_level, "pool")
    encoded = sys.stdin.buffer.read(int.from_bytes(sys.stdin.buffer.read(8), "little"))
    settings = msgspec.msgpack.decode(encoded, type=PoolSettings)
    gone = threading.Event()

    def hear() -> None:
        sys.stdin.buffer.read(1)
        gone.set()

    threading.Thread(target=hear, name="penstock-parent", daemon=True).start()
    server = PoolServer(settings, Path(directory))
    try:
        server.run(gone.is_set)
    finally:
        server.close()
    return 0


if __name__ == "__main__":
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, signal.SIG_IGN)
    sys.exit(main(sys.argv[1], sys.argv[2]))
