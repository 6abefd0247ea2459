"""What `penstock bench kernels` compares with and how it takes times: ceilings of this machine, medians, figures.

Knows a team, programs and their seconds. Does not know which kernels there are.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

import numpy as np

from penstock.nn.kernels.native import FORMATS, load_native

STREAMED_BYTES = 320 << 20  # read between two reads of the same: more than caches hold
READ_BYTES = 1 << 30
LEAST_S = 0.05  # of one round, where what bounds a kernel is the same with less than STREAMED_BYTES


@dataclass(frozen=True, slots=True)
class Ceilings:
    """Of this machine with this team: bytes per second from memory, operations per second by format."""

    read: float
    products: dict[str, float]


@dataclass(frozen=True, slots=True)
class Work:
    """What one call of a kernel must do. `streamed`: bytes that went by since the call before on the same memory.

    operations: multiplications and additions of products in `weight_format`, 0 where there are none.
    """

    kernel: str
    shape: str
    rows: int
    num_bytes: float
    streamed: float
    operations: float = 0.0
    weight_format: str = "bf16"


class Bench:
    """Measurements with one instruction set and one team."""

    def __init__(self, kernels: str, num_threads: int, rounds: int) -> None:
        self.kernels, self.num_threads, self.rounds = kernels, num_threads, rounds
        self.native = load_native()
        self.team = self.native.Team(num_threads, [])
        self.ceilings = Ceilings(math.inf, {})

    def measure_ceilings(self, formats: Iterable[str]) -> None:
        products = {name: self.native.product_rate(self.kernels, self.team, FORMATS[name]) for name in formats}
        self.ceilings = Ceilings(self.native.read_rate(self.team, READ_BYTES), products)

    def program(self, max_tokens: int) -> Any:
        return self.native.Program(self.kernels, self.team, max_tokens)

    def turns(self, num_bytes: float) -> int:
        """How many of so many bytes are read in turns until none of them is left in a cache."""
        return max(1, math.ceil(STREAMED_BYTES / num_bytes))

    def used(self, turns: int, num_bytes: float, operations: float, weight_format: str) -> int:
        """Of so many `turns`, how many a round takes: all of them where memory is the bound."""
        products_s = operations / self.ceilings.products[weight_format]
        if num_bytes / self.ceilings.read >= products_s:
            return turns
        return min(turns, max(2, math.ceil(LEAST_S / products_s)))

    def seconds(self, program: Any, operations: tuple[str, ...], run: Callable[[], Any], kinds: int = 1) -> list[float]:
        """Medians over rounds of the mean of operations so named, for each of `kinds` that take turns in `program`."""
        run()
        means = []
        for _ in range(self.rounds):
            program.clear_seconds()
            run()
            found = [seconds for name, seconds in program.seconds() if name in operations]
            means.append([statistics.mean(found[kind::kinds]) for kind in range(kinds)])
        return [statistics.median(of_kind) for of_kind in zip(*means, strict=True)]

    def row(self, work: Work, seconds: float) -> dict[str, Any]:
        """Figures of one kernel. Where it works in caches, whose rate was not measured, there is no share."""
        memory_s = work.num_bytes / self.ceilings.read
        products_s = work.operations / self.ceilings.products[work.weight_format] if work.operations else 0.0
        bound = "products"
        if memory_s >= products_s:
            bound = "memory" if work.streamed >= STREAMED_BYTES else "caches"
        return {
            "kernel": work.kernel,
            "shape": work.shape,
            "rows": work.rows,
            "us": round(seconds * 1e6, 2 if seconds < 1e-5 else 1),
            "gb_per_s": round(work.num_bytes / seconds / 1e9, 1 if work.num_bytes / seconds >= 1e9 else 3),
            "g_operations_per_s": round(work.operations / seconds / 1e9, 1) if work.operations else None,
            "share_of_roofline": None if bound == "caches" else round(max(memory_s, products_s) / seconds, 3),
            "bound": bound,
        }


def run_tokens(program: Any, tokens: np.ndarray) -> None:
    """One step of a program without KV: so many tokens, of one row."""
    program.run(tokens, np.zeros_like(tokens), np.array([0, len(tokens)]), np.array([0]), [])
