"""Native programs: beside the torch model they are recorded from, and bit for bit whatever shares the batch."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tests.nn.dense_attention import dense_logits
from tests.nn.native_model import MISTRAL, QWEN3, SHAPES, SIZE, native, prompts, torch_model

from penstock.config.model import kv_layout, parse_model_config
from penstock.nn.kernels import native as kernels_module
from penstock.nn.kernels.native import (
    FORMATS,
    NativeModel,
    PackedWeights,
    check_layout,
    load_native,
    packed_layout,
    usable_kernels,
)
from penstock.nn.kernels.native_recording import Unsupported
from penstock.nn.models import create_model
from penstock.nn.quant.rounding import Grid, round_to_nearest

KERNELS = usable_kernels()
pytestmark = [
    pytest.mark.skipif(not KERNELS, reason="the native kernels were not built, or not for this machine"),
    pytest.mark.usefixtures("one_thread"),
]


def error(found: torch.Tensor, expected: torch.Tensor) -> float:
    return float((found - expected).norm() / expected.norm())


@pytest.mark.parametrize("kernels", KERNELS)
@pytest.mark.parametrize("shape", SHAPES)
def test_logits_are_those_of_the_torch_model(shape: str, kernels: str) -> None:
    ours = native(SHAPES[shape], kernels)
    config, reference = torch_model(SHAPES[shape], torch.bfloat16)
    wide = create_model(config, torch.float32)
    for name, parameter in wide.named_parameters():  # the very same values, computed in float32
        parameter.data.copy_(dict(reference.named_parameters())[name])
    for parameter in (p for m in (reference, wide) for p in m.parameters()):
        assert parameter.isfinite().all()
    first, second, third = prompts(config, 70, 9, 1)
    exact = dense_logits(wide, [list(first), list(second), list(third)])
    rounded = dense_logits(reference, [list(first), list(second), list(third)])
    hidden = ours.step([(0, 0, first[:33]), (1, 0, second)])
    later = ours.step([(2, 0, third), (0, 33, first[33:])])
    found = ours.model.logits(torch.cat((hidden[:33], later[1:], hidden[33:], later[:1])))
    assert error(found, exact) <= max(1e-2, 1.2 * error(rounded, exact))


@settings(max_examples=50, deadline=None)
@given(
    data=st.data(),
    kernels=st.sampled_from(KERNELS or ["none"]),
    shape=st.sampled_from(["qwen3", "mistral with a window"]),
    weights=st.sampled_from(["bf16", "w8a8", "w4a8"]),
    kv_dtype=st.sampled_from(["bfloat16", "int8"]),
)
def test_a_row_is_the_same_bit_for_bit_in_any_company(
    data: st.DataObject, kernels: str, shape: str, weights: str, kv_dtype: str
) -> None:
    """Alone and whole, or in chunks among others, with any number of threads: the same hidden states and cache."""
    length = data.draw(st.integers(1, 150), label="length")
    settled: dict[str, Any] = {"formats": (weights, weights), "kv_dtype": kv_dtype}
    alone = native(SHAPES[shape], kernels, num_threads=1, **settled)
    mixed = native(SHAPES[shape], kernels, num_threads=data.draw(st.integers(1, 3), label="threads"), **settled)
    [ids, *others] = prompts(alone.config, length, 60, 120)
    expected = alone.step([(0, 0, ids)])
    done = [0, 0, 0]
    found = []
    while done[0] < length:
        rows = []
        for request, tokens in enumerate((ids, *others)):
            most = len(tokens) - done[request]
            num = data.draw(st.integers(1 if request == 0 else 0, max(1, most)), label=f"tokens of {request}")
            num = min(num, most)
            if num:
                rows.append((request, done[request], tokens[done[request] : done[request] + num]))
                done[request] += num
        rows = data.draw(st.permutations(rows))
        hidden = mixed.step(rows)
        at = 0
        for request, _, tokens in rows:
            if request == 0:
                found.append(hidden[at : at + len(tokens)])
            at += len(tokens)
    assert torch.equal(torch.cat(found), expected)
    blocks = [1 + 3 * block for block in range(-(-length // SIZE))]
    for ours, theirs in zip(alone.pools, mixed.pools, strict=True):
        assert torch.equal(ours[blocks], theirs[blocks])
    assert torch.equal(mixed.model.logits(torch.cat(found)), alone.model.logits(expected))


@pytest.mark.parametrize("kernels", KERNELS)
def test_long_contexts_are_cut_where_they_always_are(kernels: str) -> None:
    """Few tasks: each span of the context is one. Many: a task walks all spans. Both merge the same parts."""
    raw = {**QWEN3, "num_hidden_layers": 1, "num_key_value_heads": 1}
    [ids] = prompts(parse_model_config(raw), 1300)
    whole = native(raw, kernels, num_threads=1, length=1400)
    expected = whole.step([(0, 0, ids)])
    pieces = native(raw, kernels, num_threads=3, length=1400)
    found = [pieces.step([(0, 0, ids[:1200])])]
    found += [pieces.step([(0, n, ids[n : n + 1])]) for n in range(1200, 1300, 50) for n in range(n, n + 50)]
    assert torch.equal(torch.cat(found), expected)


def test_a_team_may_have_more_members_than_most_machines_cores() -> None:
    few, many = native(SHAPES["qwen3"], KERNELS[0]), native(SHAPES["qwen3"], KERNELS[0], num_threads=67)
    (prompt,) = prompts(few.config, 40)
    assert torch.equal(many.step([(0, 0, prompt)]), few.step([(0, 0, prompt)]))


@pytest.mark.skipif(len(KERNELS) < 2, reason="one instruction set cannot disagree")
def test_the_instruction_sets_agree() -> None:
    [ids] = prompts(parse_model_config(QWEN3), 50)
    found = [native(QWEN3, kernels).step([(0, 0, ids)]).float() for kernels in KERNELS]
    for other in found[1:]:
        assert error(other, found[0]) <= 1e-2


@pytest.mark.parametrize("shape", [{**QWEN3, "tie_word_embeddings": False}, MISTRAL], ids=["full", "window"])
@pytest.mark.parametrize("kernels", KERNELS)
def test_a_token_that_is_not_a_number_harms_only_its_own_request(kernels: str, shape: dict[str, Any]) -> None:
    config, model = torch_model(shape, torch.bfloat16)
    bad, good = prompts(config, 20, 20)
    good = np.where(good == bad[3], (good + 1) % config.vocab_size, good)
    expected = native(shape, kernels).step([(1, 0, good)])
    model.embed.weight.data[int(bad[3])] = torch.nan
    broken = native(shape, kernels)
    layout = packed_layout(kv_layout(config, SIZE, "bfloat16"))
    broken.model = NativeModel(model, PackedWeights(model, 2), layout, broken.pools, kernels=kernels, max_tokens=64)
    hidden = broken.step([(0, 0, bad), (1, 0, good)])
    assert hidden[3:20].isnan().any(-1).all()
    assert torch.equal(hidden[20:], expected)
    assert torch.equal(broken.step([(0, 0, good)]), expected)  # in the very block that the first one had


@pytest.mark.parametrize("kv_dtype", ["bfloat16", "int8"])
@pytest.mark.parametrize("shape", ["qwen3", "mistral with a window"])
@pytest.mark.parametrize("kernels", KERNELS)
def test_what_is_left_in_a_block_is_never_seen(kernels: str, shape: str, kv_dtype: str) -> None:
    """Every byte of the cache but the null block's is a NaN's: each block that is begun forgets it."""
    clean, used = (native(SHAPES[shape], kernels, kv_dtype=kv_dtype) for _ in range(2))
    for pool in used.pools:
        pool[1:].view(torch.uint8).fill_(0xFF)
    (ids,) = prompts(clean.config, 140)
    for start, end in [(0, 3), (3, 4), (4, 70), (70, 96), (96, 97), (97, 140)]:
        rows = [(0, start, ids[start:end]), (1, start, ids[start:end])]
        found = used.step(rows)
        assert found.isfinite().all()
        assert torch.equal(found, clean.step(rows))


@pytest.mark.parametrize("kv_dtype", ["bfloat16", "int8"])
@pytest.mark.parametrize("kv_heads", [1, 4])  # each span is a task; a task walks all spans
@pytest.mark.parametrize("kernels", KERNELS)
def test_a_span_without_a_number_is_no_span_that_nobody_sees(kernels: str, kv_heads: int, kv_dtype: str) -> None:
    raw = {**QWEN3, "num_hidden_layers": 1, "num_key_value_heads": kv_heads}
    ours = native(raw, kernels, num_threads=1, length=1400, kv_dtype=kv_dtype)
    [ids] = prompts(ours.config, 1201)
    ours.step([(0, 0, ids[:1200])])
    assert ours.step([(0, 1200, ids[1200:])]).isfinite().all()
    keys = ours.pools[0].view(torch.uint8).view(ours.pools[0].shape[0], 2, kv_heads, -1)
    nan = torch.tensor([torch.nan], dtype=torch.bfloat16).view(torch.uint8)
    for block in range(16):  # the first span: keys, or their scales, which lie behind them
        place = keys[1 + 3 * block, 0, :, -2 * SIZE if kv_dtype == "int8" else 0 :]
        place.copy_(nan.repeat(place.shape[1] // 2))
    assert ours.step([(0, 1200, ids[1200:])]).isnan().all()


def packed(weight_format: str, w: torch.Tensor) -> tuple[Any, torch.Tensor]:
    """A packed weight [N, K], and what it stands for."""
    weight = load_native().PackedWeight(FORMATS[weight_format], *w.shape)
    weight.fill(load_native().Team(2, []), 0, w.view(torch.uint16).numpy())
    values = torch.empty(w.shape)
    weight.unpack(values.numpy())
    return weight, values


@settings(max_examples=60, deadline=None)
@given(n=st.integers(1, 70), k=st.integers(1, 300), seed=st.integers(0, 1 << 20))
def test_weights_are_rounded_to_the_nearest_step_of_their_format(n: int, k: int, seed: int) -> None:
    w = torch.randn(n, k, generator=torch.Generator().manual_seed(seed)).bfloat16()
    w[0, 0] = 0.0
    assert torch.equal(packed("bf16", w)[1], w.float())
    for weight_format in ("int8", "w8a8"):
        step = (w.float().abs().amax(1, keepdim=True) / 127).bfloat16().float()
        assert ((packed(weight_format, w)[1] - w).abs() <= 0.501 * step).all()
    fourth = packed("int4", w)[1]
    assert torch.equal(fourth, packed("w4a8", w)[1])
    groups = torch.nn.functional.pad(w.float(), (0, -k % 128)).view(n, -1, 128)
    extreme = groups.gather(2, groups.abs().argmax(2, keepdim=True))
    step = torch.where(extreme != 0, extreme / -8, 1.0).bfloat16().float()
    edge = torch.where(groups.sign() * extreme.sign() < 0, 1.0, 0.501)  # on the other side 7 steps are the most
    assert ((fourth - w).abs() <= (edge * step.abs()).flatten(1)[:, :k]).all()


@pytest.mark.parametrize("weight_format", ["int8", "w8a8", "int4", "w4a8"])
def test_weights_whose_scale_has_no_inverse_are_zero(weight_format: str) -> None:
    w = torch.tensor([[9.2e-41], [-1e-38], [1e-35], [3.0e38]]).bfloat16()
    found = packed(weight_format, w)[1]
    assert found[:2].eq(0).all()
    assert error(found[2:] / w[2:].float(), torch.ones(2, 1)) <= 1e-2
    grid = Grid(8, None) if weight_format in ("int8", "w8a8") else Grid(4, 128)
    assert torch.equal(found, round_to_nearest(w.float(), grid).values())


def test_a_position_beyond_the_rotary_tables_is_refused() -> None:
    ours = native({**QWEN3, "max_position_embeddings": 64}, KERNELS[0])
    ours.step([(0, 60, np.arange(4))])
    with pytest.raises(ValueError, match="a position that the tables"):
        ours.step([(0, 61, np.arange(4))])


def eight_bits(a: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Activations as whole numbers and a scale per row."""
    most = a.float().abs().amax(1, keepdim=True).clamp(min=1e-12)
    scale = most / 127
    return (a.float() * (1 / scale)).round(), scale.double()


@pytest.mark.parametrize("weight_format", FORMATS)
@pytest.mark.parametrize("kernels", KERNELS)
@settings(max_examples=30, deadline=None)
@given(m=st.integers(1, 70), n=st.integers(1, 150), k=st.integers(1, 400), seed=st.integers(0, 1 << 20))
def test_products_agree_with_float64(kernels: str, weight_format: str, m: int, n: int, k: int, seed: int) -> None:
    """Only the last bits of float32 sums may differ from the exact product of what weights and activations became."""
    native_module = load_native()
    team = native_module.Team(2, [])
    program = native_module.Program(kernels, team, 70)
    draw = torch.Generator().manual_seed(seed)
    a, w = torch.randn(m, k, generator=draw).bfloat16(), torch.randn(n, k, generator=draw).bfloat16()
    bias = torch.randn(n, generator=draw)
    weight, values = packed(weight_format, w)
    weight.set_bias(bias.numpy())
    out = torch.full((m, n), torch.nan)
    program.head(weight, a.view(torch.uint16).numpy(), out.numpy())
    weights, inputs = values.double(), a.double()
    if weight_format in ("w8a8", "w4a8"):
        whole_inputs, scale = eight_bits(a)
        inputs = whole_inputs.double() * scale
    exact = inputs @ weights.T + bias.double()
    assert float((out - exact).abs().max()) <= 2e-5 * k**0.5 * 4
    alone = torch.empty(1, n)
    row = m // 2
    program.head(weight, a[row : row + 1].contiguous().view(torch.uint16).numpy(), alone.numpy())
    assert torch.equal(alone[0], out[row])


def test_what_cannot_be_computed_is_said_before_a_weight_is_touched() -> None:
    _, model = torch_model({**QWEN3, "intermediate_size": 88}, torch.bfloat16)
    with pytest.raises(Unsupported, match="feed-forward width of a multiple of 16, not 88"):
        PackedWeights(model, 1)
    assert all(parameter.numel() for parameter in model.parameters())
    _, model = torch_model(QWEN3, torch.float32)
    with pytest.raises(Unsupported, match="these weights are float32"):
        PackedWeights(model, 1)


@pytest.mark.parametrize(
    ("change", "block_size", "dtype", "words"),
    [
        ({"head_dim": 24}, SIZE, "bfloat16", "heads of a multiple of 16"),
        ({"head_dim": 272}, SIZE, "bfloat16", "up to 256"),
        ({}, 16, "bfloat16", "blocks of 32 tokens"),
        ({}, 16, "int8", "blocks of 32 tokens"),
        ({"head_dim": 8}, SIZE, "int8", "heads of a multiple of 16"),
        ({}, SIZE, "float32", "a KV cache of bfloat16 or int8, not float32"),
    ],
)
def test_caches_that_cannot_be_used_are_refused(
    change: dict[str, int], block_size: int, dtype: str, words: str
) -> None:
    with pytest.raises(Unsupported, match=words):
        check_layout(kv_layout(parse_model_config({**QWEN3, **change}), block_size, dtype))


def test_kernels_that_compute_something_else_are_left_out(monkeypatch: pytest.MonkeyPatch) -> None:
    real = load_native()

    class Wrong:
        """The extension, whose "wrong" kernels leave results as they are."""

        def __getattr__(self, name: str) -> Any:
            return getattr(real, name)

        def kernels(self) -> list[str]:
            return ["wrong", *real.kernels()]

        def Program(self, kernels: str, *rest: Any) -> Any:
            return self if kernels == "wrong" else real.Program(kernels, *rest)

        def head(self, weight: Any, hidden: Any, out: Any) -> None:
            pass

    monkeypatch.setattr(kernels_module, "extension", Wrong())
    assert kernels_module.usable_kernels.__wrapped__() == KERNELS
