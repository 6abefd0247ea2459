"""Steps that compute only the tokens whose hidden states are read: the bits of those that compute all of them."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tests.nn.native_model import MISTRAL, QWEN2, QWEN3, Native, native, prompts

from penstock.config.model import ModelConfig, parse_model_config
from penstock.nn.doors import Buffer, Recorder
from penstock.nn.kernels.native import load_native, usable_kernels
from penstock.nn.kernels.native_recording import BF16
from penstock.nn.models.llama import DecoderLayer, LlamaModel

KERNELS = usable_kernels()
pytestmark = [
    pytest.mark.skipif(not KERNELS, reason="the native kernels were not built, or not for this machine"),
    pytest.mark.usefixtures("one_thread"),
]
TURNS: dict[str, Any] = {**QWEN2, "use_sliding_window": True, "sliding_window": 40}
SHAPES: dict[str, dict[str, Any]] = {
    "one layer": {**QWEN3, "num_hidden_layers": 1},
    "two layers": QWEN3,
    "a window": MISTRAL,
    "two KV groups, the last layer windowed": {**TURNS, "layer_types": ["full_attention", "sliding_attention"]},
    "two KV groups, the last layer full": {**TURNS, "layer_types": ["sliding_attention", "full_attention"]},
    "all heads alone": {**QWEN2, "num_key_value_heads": 4},
}
LENGTHS = (150, 60, 90)


class ReadsAgain(LlamaModel):
    """Behind attention it reads what was made before it: the normed input, and queries, keys and values."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__(config)
        heads = config.num_heads + 2 * config.num_kv_heads
        self.gate = torch.nn.Linear(heads * config.head_dim, config.hidden_size, bias=False)

    def record(self, to: Recorder) -> Buffer:
        x = to.embed(self.embed.weight)
        for layer in self.layers:
            assert isinstance(layer, DecoderLayer)
            attention = layer.attention
            a = layer.attention_norm.record(to, x)
            qkv = to.linear(a, attention.qkv.weight, None)
            out = to.attend(attention.layer, qkv, attention.num_heads, None, (self.rotary.cos, self.rotary.sin))
            to.linear_add(x, out, attention.out.weight, None)
            layer.mlp.record(to, a, x)
            to.linear_add(x, qkv, self.gate.weight, None)
        return self.norm.record(to, x)


def steps(draw: st.DataObject, length: int) -> list[list[tuple[int, int, int]]]:
    """Prompts in chunks and single tokens: steps of (request, start, number of tokens) in any order."""
    lengths, done, found = (length, *LENGTHS[1:]), [0, 0, 0], []
    while done[0] < length:
        rows = []
        for request, most in enumerate(lengths):
            left = most - done[request]
            num = min(left, draw.draw(st.one_of(st.integers(0, 1), st.integers(1, most)), label=f"of {request}"))
            if request == 0:
                num = max(num, min(left, 5))  # an end must come
            if num:
                rows.append((request, done[request], num))
                done[request] += num
        found.append(draw.draw(st.permutations(rows)))
    return found


def asked_for(total: int, ends: list[int]) -> st.SearchStrategy[list[int] | None]:
    """Of `total` tokens: all, the last of each row, few, or all but few."""
    few = st.lists(st.integers(0, total - 1), unique=True, max_size=20).map(sorted)
    return st.one_of(st.none(), st.just(ends), few, few.map(lambda out: sorted(set(range(total)) - set(out))))


def compare(data: st.DataObject, every: Native, some: Native, length: int) -> None:
    """The same steps in both, of `some` only drawn tokens: their hidden states, and keys and values of all."""
    tokens = prompts(every.config, length, *LENGTHS[1:])
    for rows in steps(data, length):
        step = [(request, start, tokens[request][start : start + num]) for request, start, num in rows]
        total = sum(num for *_, num in rows)
        ends = np.cumsum([num for *_, num in rows]) - 1
        outputs = data.draw(asked_for(total, ends.tolist()), label="outputs")
        expected = every.step(step)
        assert torch.equal(some.step(step, outputs), expected if outputs is None else expected[outputs])
    for theirs, ours in zip(every.pools, some.pools, strict=True):
        assert torch.equal(theirs, ours)


@settings(max_examples=60, deadline=None)
@given(
    data=st.data(),
    kernels=st.sampled_from(KERNELS or ["none"]),
    shape=st.sampled_from(sorted(SHAPES)),
    weights=st.sampled_from(["bf16", "w8a8", "w4a8", "int4"]),
    kv_dtype=st.sampled_from(["bfloat16", "int8"]),
    num_threads=st.integers(1, 3),
    length=st.integers(1, LENGTHS[0]),
)
def test_outputs_are_bit_for_bit_those_of_a_step_that_computes_all(
    data: st.DataObject, kernels: str, shape: str, weights: str, kv_dtype: str, num_threads: int, length: int
) -> None:
    """Any tokens of prompts, chunks and decodes, in any layout of layers and cache, by any team."""
    settled: dict[str, Any] = {"formats": (weights, "bf16"), "kv_dtype": kv_dtype}
    every = native(SHAPES[shape], kernels, num_threads=1, **settled)
    compare(data, every, native(SHAPES[shape], kernels, num_threads=num_threads, **settled), length)


AGAIN: dict[str, Any] = {**QWEN2, "head_dim": 16, "attention_bias": False}  # heads are 64 wide in all


@pytest.mark.parametrize("hidden_size", [64, 72])
@pytest.mark.parametrize("weights", ["bf16", "w8a8"])
@settings(max_examples=15, deadline=None)
@given(data=st.data(), kernels=st.sampled_from(KERNELS or ["none"]), num_threads=st.integers(1, 3))
def test_what_is_read_behind_the_last_attention_is_taken_along(
    weights: str, hidden_size: int, data: st.DataObject, kernels: str, num_threads: int
) -> None:
    """Whatever a model's operations read there, not only the residual stream."""
    raw, settled = AGAIN | {"hidden_size": hidden_size}, {"formats": (weights, "bf16"), "family": ReadsAgain}
    every = native(raw, kernels, num_threads=1, **settled)
    compare(data, every, native(raw, kernels, num_threads=num_threads, **settled), LENGTHS[0])


def test_queries_stay_where_they_are_until_all_have_attended() -> None:
    """All outputs move up by one, over rows whose queries other threads still read."""
    every, some = (native(AGAIN, KERNELS[0], num_threads=n, length=700, family=ReadsAgain) for n in (1, 3))
    [ids] = prompts(every.config, 700)
    expected = every.step([(0, 0, ids)])[1:]
    for _ in range(20):
        assert torch.equal(some.step([(0, 0, ids)], list(range(1, 700))), expected)


@pytest.mark.parametrize("kernels", KERNELS)
def test_inputs_of_equal_width_are_quantized_when_they_are_read(kernels: str) -> None:
    """The normed input and the result of attention share a place in 8 bits: the former is made again."""
    raw = AGAIN | {"hidden_size": 64}
    exact, rounded = (native(raw, kernels, formats=(of, "bf16"), family=ReadsAgain) for of in ("bf16", "w8a8"))
    [ids] = prompts(exact.config, 50)
    expected, found = (each.step([(0, 0, ids)]).float() for each in (exact, rounded))
    assert (found - expected).norm() <= 0.05 * expected.norm()


@pytest.mark.parametrize("window", [None, 700])
@pytest.mark.parametrize("kv_dtype", ["bfloat16", "int8"])
@pytest.mark.parametrize("kernels", KERNELS)
def test_few_outputs_of_a_long_context_are_cut_where_they_always_are(
    kernels: str, kv_dtype: str, window: int | None
) -> None:
    """Few tasks are left, so that each span of the context becomes one."""
    raw: dict[str, Any] = {**QWEN3, "num_hidden_layers": 1, "num_key_value_heads": 1}
    if window is not None:
        raw |= {"architectures": ["MistralForCausalLM"], "sliding_window": window}
    long, short = prompts(parse_model_config(raw), 1300, 40)
    every, some = (native(raw, kernels, num_threads=n, length=1400, kv_dtype=kv_dtype) for n in (1, 3))
    expected = every.step([(0, 0, long), (1, 0, short)])
    for outputs in ([1299], [511, 512, 513, 1299, 1339], [700, 1299, 1300]):
        assert torch.equal(some.step([(0, 0, long), (1, 0, short)], outputs), expected[outputs])
    after = [every.step([(0, 1300, short[:7]), (1, 40, short[:1])]) for _ in range(2)]
    assert torch.equal(after[0], after[1])
    assert torch.equal(some.step([(0, 1300, short[:7]), (1, 40, short[:1])], [6, 7]), after[0][6:])


@pytest.mark.parametrize("outputs", [[-1], [3, 3], [5, 4], [40]])
def test_outputs_that_are_none_are_refused(outputs: list[int]) -> None:
    ours = native(QWEN3, KERNELS[0])
    [ids] = prompts(ours.config, 40)
    with pytest.raises(ValueError, match="outputs are tokens of the batch, in ascending order"):
        ours.step([(0, 0, ids)], outputs)
    assert len(ours.step([(0, 0, ids)], [])) == 0


def test_without_attention_no_row_can_be_left_out() -> None:
    module = load_native()
    team = module.Team(1, [])
    program = module.Program(KERNELS[0], team, 8)
    weight = module.PackedWeight(0, 16, 16)
    program.linear(weight, program.buffer(BF16, 16), program.buffer(BF16, 16))
    tokens = np.zeros(8, np.int64)
    arrays = tokens, tokens, np.array([0, 8]), np.array([0]), []
    program.run(*arrays)
    with pytest.raises(ValueError, match="only rows behind a last attention can be left out"):
        program.run(*arrays, np.array([7]))
