"""Steps whose KV is carried away and brought in while they run, layer by layer: native and in plain torch.

Prompts are computed in a donor's pools first; a rank under test lacks their first blocks, which a thread of the test
brings in while the step runs, or does not.
"""

from __future__ import annotations

import functools
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from typing import Any

import numpy as np
import pytest
import torch

from penstock.config.model import KVGroup, KVLayout, kv_layout, parse_model_config
from penstock.core.plan import Admitted, Row, StepPlan, StepResult
from penstock.core.request import SamplingParams
from penstock.nn.doors import Spans
from penstock.nn.kernels.attention import PagedAttention
from penstock.nn.kernels.native import NativeAttention, NativeModel, PackedWeights, packed_layout, usable_kernels
from penstock.nn.models import create_model
from penstock.nn.weights.create import init_dummy
from penstock.nn.words import StepWords
from penstock.runner.inputs import RequestTable
from penstock.runner.kv_store import KVStore
from penstock.runner.runner import Runner
from penstock.runner.sampler import SampleOutput, Sampler
from penstock.transfer.counter import StepCounter

pytestmark = pytest.mark.usefixtures("one_thread")
SIZE, LAYERS = 32, 4
GIVEN, NEW = 2, 20  # blocks that are brought in, tokens that the step computes
LENGTH = GIVEN * SIZE + NEW
PATIENCE_S, DEADLINE_S = 60.0, 60.0
MODEL = {
    "architectures": ["Qwen2ForCausalLM"],
    "vocab_size": 203,
    "hidden_size": 64,
    "intermediate_size": 80,
    "num_hidden_layers": LAYERS,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "rms_norm_eps": 1e-6,
    "rope_theta": 1e6,
    "max_position_embeddings": 512,
    "use_sliding_window": True,  # two KV groups, whose layers take turns, the windowed one first
    "sliding_window": 40,
    "layer_types": ["sliding_attention", "full_attention"] * 2,
    "torch_dtype": "bfloat16",
}
PROMPT = tuple(np.random.default_rng(5).integers(0, MODEL["vocab_size"], LENGTH).tolist())
PARAMS = SamplingParams(temperature=0, max_tokens=4, logprobs=5)


@pytest.fixture(scope="module")
def one_thread() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


class Loads:
    """Words of loads by id, int64 each."""

    def __init__(self, ids: Sequence[int]) -> None:
        self.word = {i: np.zeros(1, np.int64) for i in ids}

    def words(self, ids: Sequence[int]) -> np.ndarray:
        return np.array([self.word[i].ctypes.data for i in ids], np.int64)


class Rank:
    """A runner with pools of its own. Request n owns blocks 1 + 4 n and later."""

    def __init__(
        self, kind: str, dtype: str, loads: Loads | None = None, *, patience_s: float = PATIENCE_S, listens: bool = True
    ) -> None:
        config = parse_model_config(MODEL)
        model = create_model(config, torch.bfloat16)
        init_dummy(model, 0)
        layout = kv_layout(config, SIZE, dtype)
        if kind != "torch":
            layout = packed_layout(layout)
        self.store = KVStore(layout, (60, 60), torch.device("cpu"))
        self.views = self.store.byte_views()
        self.counter = StepCounter() if listens else None
        table = RequestTable(16, 256, len(layout.groups), SIZE)
        attention: Any = PagedAttention(layout, self.store.pools, torch.bfloat16)
        computing: Any = model
        if kind != "torch":
            weights, attention = PackedWeights(model, int(kind[-1])), NativeAttention()
            computing = NativeModel(
                model, weights, layout, self.store.pools, kernels=usable_kernels()[0], max_tokens=LENGTH
            )
        sampler = Sampler(16, config.vocab_size)
        self.runner = Runner(computing, attention, sampler, table, self.counter, loads, patience_s)

    def prompt(self, step: int, start: int = 0, awaits: tuple[int, ...] = (), request: int = 0) -> StepResult:
        """Compute a request's prompt from `start`; what is before it is thought to be in its blocks."""
        blocks = tuple(self.blocks(request).tolist())
        row = Row(f"r{request}", start, LENGTH - start, 0, 1, True, (blocks, blocks))
        return self.runner.run(
            StepPlan(step, [row], (Admitted(row.request_id, PROMPT, LENGTH, PARAMS, 0),), awaits=awaits)
        )

    def before_the_end(self, then: Callable[[], None]) -> None:
        """`then` happens in each step when its layers are computed and its tokens chosen."""
        sample = self.runner.sampler.sample

        def and_then(*args: Any) -> SampleOutput:
            out = sample(*args)
            then()
            return out

        self.runner.sampler.sample = and_then  # type: ignore[method-assign]

    @staticmethod
    def blocks(request: int = 0) -> np.ndarray:
        return np.arange(1 + 4 * request, 1 + 4 * request + GIVEN + 1)

    def kv(self, layer: int, request: int = 0) -> np.ndarray:
        """A copy of a request's bytes [blocks, layer_bytes]."""
        return self.views[layer][self.blocks(request)].copy()

    def bring(self, layer: int, donor: Rank) -> None:
        """The given blocks of the first request, from another rank's pools."""
        given = self.blocks()[:GIVEN]
        self.views[layer][given] = donor.views[layer][given]


KINDS = [*([f"native, threads: {n}" for n in (1, 3)] if usable_kernels() else []), "torch"]


@functools.cache
def whole(kind: str, dtype: str) -> tuple[Rank, StepResult]:
    """A rank that had the given blocks when it computed the rest, and its answer."""
    donor, rank = Rank(kind, dtype), Rank(kind, dtype, listens=False)
    donor.prompt(0)
    for layer in range(LAYERS):
        rank.bring(layer, donor)
    return rank, rank.prompt(0, GIVEN * SIZE)


@pytest.fixture(params=KINDS)
def kind(request: pytest.FixtureRequest) -> str:
    return str(request.param)


@pytest.fixture(params=["bfloat16", "int8"])
def dtype(request: pytest.FixtureRequest) -> str:
    return str(request.param)


@contextmanager
def beside(step: Callable[[], StepResult]) -> Iterator[Future[StepResult]]:
    with ThreadPoolExecutor(1) as pool:
        yield pool.submit(step)


def wait_for(condition: Callable[[], bool]) -> None:
    until = time.monotonic() + DEADLINE_S
    while not condition():
        assert time.monotonic() < until, "it never came"
        time.sleep(0)


def equal(found: StepResult, expected: StepResult) -> bool:
    return (found.tokens, found.logprobs) == (expected.tokens, expected.logprobs)


def test_a_step_goes_as_far_as_its_loads_and_tells_how_far(kind: str, dtype: str) -> None:
    """One layer let through at a time: its KV is in place when the word says so, that of the next is not there yet,
    and the result is bit for bit that of a step that had everything from the start."""
    donor, expected = whole(kind, dtype)
    loads = Loads([7, 8])
    rank = Rank(kind, dtype, loads)
    assert rank.counter is not None
    seen = []
    with beside(lambda: rank.prompt(3, GIVEN * SIZE, awaits=(8, 7))) as step:
        for layer in range(LAYERS):
            wait_for(lambda layer=layer: rank.counter.is_done(3, layer))
            time.sleep(0.002)
            assert not rank.counter.is_done(3, layer + 1) and not step.done()
            assert not any(rank.views[later][rank.blocks()].any() for later in range(layer + 1, LAYERS))
            rank.bring(layer, donor)
            seen.append(rank.kv(layer))
            loads.word[7][0] = layer + 1
            time.sleep(0.001)
            assert not rank.counter.is_done(3, layer + 1)  # the other load is behind
            loads.word[8][0] = layer + 1
    result = step.result()
    assert result.bad_loads == () and equal(result, expected)
    for layer in range(LAYERS):
        assert np.array_equal(seen[layer], rank.kv(layer))
        assert np.array_equal(seen[layer], donor.kv(layer))
    assert rank.counter.is_done(3, LAYERS) and not rank.counter.is_done(4, 0)


def test_a_watcher_never_sees_a_layer_before_its_kv(kind: str, dtype: str) -> None:
    """Steps run freely; who copies a layer as soon as the word allows has what is there in the end."""
    rank, num_steps = Rank(kind, dtype), 14
    assert rank.counter is not None
    counter, words, copies = rank.counter, [], {}
    stop = threading.Event()

    def watch() -> None:
        todo = [(step, layer) for step in range(num_steps) for layer in range(LAYERS)]
        while todo and not stop.is_set():
            words.append(counter.value)
            while todo and counter.is_done(*todo[0]):
                step, layer = todo.pop(0)
                copies[step, layer] = rank.kv(layer, step)
            time.sleep(0)  # or each operation of torch would wait for the interpreter's lock

    with ThreadPoolExecutor(1) as pool:
        watcher = pool.submit(watch)
        try:
            for step in range(num_steps):
                rank.prompt(step, request=step)
            wait_for(lambda: len(copies) == num_steps * LAYERS)
        finally:
            stop.set()
        watcher.result()
    assert words == sorted(words)
    for (step, layer), copy in copies.items():
        assert copy.any() and np.array_equal(copy, rank.kv(layer, step))


def test_words_change_no_result(kind: str) -> None:
    assert equal(Rank(kind, "bfloat16").prompt(0), Rank(kind, "bfloat16", listens=False).prompt(0))


@pytest.mark.parametrize("layer", [0, 2, LAYERS])
def test_a_load_that_fails_is_reported_and_holds_nobody_up(kind: str, layer: int) -> None:
    """Also one that fails when its last layer has been read already. The next step knows nothing of it."""
    donor, expected = whole(kind, "bfloat16")
    loads = Loads([3, 4, 5])
    rank = Rank(kind, "bfloat16", loads)
    for each in range(LAYERS):
        rank.bring(each, donor)
    loads.word[3][0] = loads.word[5][0] = LAYERS
    loads.word[4][0] = layer
    if layer == LAYERS:
        rank.before_the_end(lambda: loads.word[4].fill(-1))
    with beside(lambda: rank.prompt(0, GIVEN * SIZE, awaits=(3, 4, 5))) as step:
        if layer < LAYERS:
            wait_for(lambda: rank.counter is not None and rank.counter.is_done(0, layer))
            assert not step.done()
            loads.word[4][0] = -1
    assert step.result().bad_loads == (4,)
    rank.runner.run(StepPlan(1, [Row("r0", LENGTH, 1, 0, 1, True, ((), ()))], awaits=(3, 5)))
    again = rank.runner.run(StepPlan(2, [Row("r0", LENGTH + 1, 1, 0, 1, True, ((), ()))], awaits=(3, 5)))
    assert again.bad_loads == () and equal(step.result(), expected)  # its bytes were there all along


def test_patience_is_of_the_whole_step(kind: str) -> None:
    """Twelve loads that never come cost as much as one: waiting for each would take four seconds."""
    ids = tuple(range(12))
    loads = Loads([*ids, 20])
    loads.word[20][0] = LAYERS
    rank = Rank(kind, "bfloat16", loads, patience_s=1 / 3)
    rank.prompt(0, request=1)
    begin = time.perf_counter()
    result = rank.prompt(1, GIVEN * SIZE, awaits=(*ids, 20))
    assert 1 / 3 <= time.perf_counter() - begin < 2
    assert result.bad_loads == ids


def test_a_load_that_comes_too_late_is_bad(kind: str) -> None:
    """It is complete when the step ends, but the first layer had to be read without it."""
    loads = Loads([1])
    rank = Rank(kind, "bfloat16", loads, patience_s=0.05)
    rank.before_the_end(lambda: loads.word[1].fill(LAYERS))
    assert rank.prompt(0, GIVEN * SIZE, awaits=(1,)).bad_loads == (1,)
    assert rank.prompt(1, GIVEN * SIZE, awaits=(1,), request=1).bad_loads == ()


def test_nobody_listens_and_nothing_is_awaited() -> None:
    """No words are made then."""
    rank = Rank("torch", "bfloat16", listens=False)
    prepare = rank.runner.attention.prepare
    found: list[StepWords | None] = []

    def spy(spans: Spans, words: StepWords | None = None) -> Any:
        found.append(words)
        return prepare(spans, words)

    rank.runner.attention.prepare = spy  # type: ignore[method-assign]
    assert rank.prompt(0).bad_loads == ()
    assert found == [None]


@pytest.mark.parametrize("dtype", ["bfloat16", "float32", "int8"])
@pytest.mark.parametrize("packs", [False, True])
def test_byte_views_are_the_pools(dtype: str, packs: bool) -> None:
    """By extent, as the layout publishes them; what is written there is in the pool."""
    groups = [KVGroup(0, "full", (1, 2), None, SIZE, 3, 16, dtype), KVGroup(1, "window", (0,), 9, SIZE, 2, 32, dtype)]
    layout = KVLayout(tuple(groups))
    if packs and dtype != "float32" and usable_kernels():
        layout = packed_layout(layout)
    store = KVStore(layout, (5, 7), torch.device("cpu"))
    views = store.byte_views()
    assert [view.shape for view in views] == [(7, groups[1].layer_bytes)] + 2 * [(5, groups[0].layer_bytes)]
    random = np.random.default_rng(0)
    for group in layout.groups:
        for layer in group.layers:
            views[layer][:] = random.integers(0, 100, views[layer].shape)
            for part in ("k", "v"):
                for head in range(group.num_kv_heads):
                    offset, length = group.extent(layer, part, head, head + 1)
                    offset %= group.layer_bytes
                    place = store.pools[layer][3, "kv".index(part), head].reshape(-1).view(torch.uint8).numpy()
                    assert np.array_equal(place, views[layer][3, offset : offset + length])
    assert KVStore(layout, (0, 0), torch.device("cpu")).byte_views()[0].shape == (0, groups[1].layer_bytes)
