"""The extension module of native/src/bind.cpp. Built at install where there is a C++ compiler."""

import numpy as np
import numpy.typing as npt

Words = npt.NDArray[np.uint16]  # bf16
Floats = npt.NDArray[np.float32]
Doubles = npt.NDArray[np.float64]
Longs = npt.NDArray[np.int64]

KV_BLOCK: int
COLUMNS: int

def kernels() -> list[str]: ...
def release(array: Words) -> None: ...

class Team:
    def __init__(self, size: int, cpus: list[int]) -> None: ...
    @property
    def size(self) -> int: ...

def read_rate(team: Team, bytes: int) -> float: ...
def product_rate(kernels: str, team: Team, format: int) -> float: ...

class Arena:
    def __init__(self, num_bytes: int) -> None: ...
    def finish(self) -> None: ...
    @property
    def taken_bytes(self) -> int: ...

class PackedWeight:
    def __init__(self, format: int, n: int, k: int, arena: Arena | None = None, rotation: int = 0) -> None: ...
    def fill(self, team: Team | None, begin: int, rows: Words, every: int = 1) -> None: ...
    def fill_quantized(self, team: Team, begin: int, step: int, rows: npt.NDArray[np.int8], scales: Floats) -> None: ...
    def fill_nibbles(self, team: Team, begin: int, step: int, rows: npt.NDArray[np.uint8], scales: Floats) -> None: ...
    def unpack(self, out: Floats) -> None: ...
    def set_bias(self, bias: Floats) -> None: ...
    @property
    def n(self) -> int: ...
    @property
    def k(self) -> int: ...
    @property
    def num_bytes(self) -> int: ...

class Edits:
    def __init__(
        self,
        vocab_size: int,
        bias_starts: Longs,
        bias_ids: Longs,
        bias: Floats,
        limited: npt.NDArray[np.bool_],
        allowed_starts: Longs,
        allowed_ids: Longs,
        banned_starts: Longs,
        banned_ids: Longs,
        occurred_starts: Longs,
        occurred_ids: Longs,
        counts: Floats,
        penalties: Floats,
    ) -> None: ...

class Asked:
    def __init__(
        self,
        temperature: Floats,
        top_k: Longs,
        top_p: Doubles,
        min_p: Doubles,
        seeds: npt.NDArray[np.uint64],
        positions: Longs,
        edits: Edits | None,
    ) -> None: ...

def choose_from(kernels: str, scores: Floats, asked: Asked, tokens: Longs) -> None: ...

class Program:
    def __init__(self, kernels: str, team: Team, max_tokens: int) -> None: ...
    def buffer(self, kind: int, width: int) -> int: ...
    def pool(
        self,
        bytes: npt.NDArray[np.uint8],
        num_kv_heads: int,
        head_dim: int,
        group: int,
        window: int,
        format: int,
        layer: int = 0,
    ) -> int: ...
    def embed_bf16(self, table: Words, to: int) -> None: ...
    def embed_packed(self, weight: PackedWeight, to: int) -> None: ...
    def rms_norm(self, source: int, weight: Floats, eps: float, to: int) -> None: ...
    def linear(self, weight: PackedWeight, source: int, to: int) -> None: ...
    def linear_add(self, weight: PackedWeight, source: int, to: int) -> None: ...
    def linear_silu_mul(self, weight: PackedWeight, source: int, to: int) -> None: ...
    def heads(
        self,
        qkv: int,
        num_heads: int,
        pool: int,
        q_norm: Floats | None,
        k_norm: Floats | None,
        eps: float,
        cos: Floats,
        sin: Floats,
    ) -> None: ...
    def attend(self, qkv: int, num_heads: int, pool: int, scale: float, to: int) -> None: ...
    def run(
        self,
        token_ids: Longs,
        positions: Longs,
        query_start: Longs,
        start: Longs,
        tables: list[npt.NDArray[np.int32]],
        outputs: Longs | None = None,
        done: int = 0,
        loads: list[int] = ...,
        patience_s: float = 0.0,
    ) -> list[int]: ...
    def step(
        self,
        token_ids: Longs,
        positions: Longs,
        query_start: Longs,
        start: Longs,
        tables: list[npt.NDArray[np.int32]],
        outputs: Longs | None,
        done: int,
        loads: list[int],
        patience_s: float,
        states: int,
        weight: PackedWeight,
        asked: Asked,
        raw_rows: Longs,
        raw: Floats,
        tokens: Longs,
    ) -> list[int]: ...
    def read(self, buffer: int, out: Words) -> None: ...
    def head(self, weight: PackedWeight, hidden: Words, out: Floats) -> None: ...
    def choose(
        self, weight: PackedWeight, hidden: Words, asked: Asked, raw_rows: Longs, raw: Floats, tokens: Longs
    ) -> None: ...
    def seconds(self) -> list[tuple[str, float]]: ...
    def clear_seconds(self) -> None: ...
