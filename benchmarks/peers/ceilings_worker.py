"""What the machine itself can do, asked between the engines' turns: a worker that computes nothing useful.

Each line asks for one measurement: {"kind": "read" | "bfloat16" | "float32"} -> {"per_s": bytes or operations}.
Plain torch, so each is a lower bound of the ceiling; reading is the best of three ways to read 1 GiB once.
"""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Callable

import torch

READ_BYTES = 2**30
SIZE = 2048


def best_seconds(run: Callable[[], object], times: int) -> float:
    run()
    found = []
    for _ in range(times):
        begin = time.perf_counter()
        run()
        found.append(time.perf_counter() - begin)
    return min(found)


def main() -> None:
    torch.set_num_threads(int(sys.argv[1]))
    data = torch.ones(READ_BYTES // 4)
    rows = data.view(-1, 8192)
    vector = torch.ones(8192)
    ways: tuple[Callable[[], object], ...] = (data.sum, lambda: torch.mv(rows, vector), lambda: torch.dot(data, data))
    factors = {dtype: torch.ones(SIZE, SIZE, dtype=getattr(torch, dtype)) for dtype in ("bfloat16", "float32")}
    for line in sys.stdin:
        kind = json.loads(line)["kind"]
        if kind == "read":
            found = READ_BYTES / min(best_seconds(way, 2) for way in ways)
        else:
            factor = factors[kind]
            found = 2 * SIZE**3 / best_seconds(lambda factor=factor: factor @ factor, 3)  # type: ignore[misc]
        print(json.dumps({"per_s": found}), flush=True)


if __name__ == "__main__":
    main()
