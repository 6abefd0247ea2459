"""`penstock quantize` as a function: what it writes, what it refuses, and that nothing half-done looks finished."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from tests.nn.dense_attention import dense_logits
from tests.nn.weights.files import dummy_model, save, tensors_of
from tests.shared.tiny_tokenizers import byte_level
from tests.shared.tiny_tokenizers import save as save_tokenizer

from penstock.config.model import load_model_config
from penstock.engine.tokenizer import load_tokenizer
from penstock.nn.kernels.native import PackedWeights, usable_kernels
from penstock.nn.models import create_model, model_routes
from penstock.nn.models.llama import LlamaModel
from penstock.nn.quant.rotation import rotate
from penstock.nn.quant.rounding import Grid, round_to_nearest
from penstock.nn.weights.errors import CheckpointError
from penstock.nn.weights.stream import load_weights
from penstock.training.calibration import CalibrationError, beginnings, rows_of, rows_of_file
from penstock.training.layerwise import CalibratedLayers
from penstock.training.quantize import QuantizeError, Recipe, quantize_checkpoint

CONFIG: dict[str, Any] = {
    "architectures": ["LlamaForCausalLM"],
    "attention_bias": True,
    "vocab_size": 211,
    "hidden_size": 128,
    "intermediate_size": 256,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 128,
    "torch_dtype": "bfloat16",
    "eos_token_id": 0,
}
LAYER = ["self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj", "self_attn.o_proj"]
LAYER += ["mlp.gate_proj", "mlp.up_proj", "mlp.down_proj"]


def model(directory: Path, num_shards: int = 1, **changes: Any) -> Path:
    directory.mkdir()
    (directory / "config.json").write_text(json.dumps(CONFIG | changes))
    made = dummy_model(load_model_config(directory), torch.bfloat16)
    save(directory, tensors_of(made), num_shards)
    return save_tokenizer(byte_level(), directory, {"eos_token": "<|endoftext|>"})


def loaded(directory: Path) -> LlamaModel:
    config = load_model_config(directory)
    made = create_model(config, torch.float32)
    load_weights(directory, made, model_routes(config), quantization=config.quantization)
    return made


def everything(directory: Path) -> dict[str, torch.Tensor]:
    found: dict[str, torch.Tensor] = {}
    for path in sorted(directory.glob("*.safetensors")):
        found |= load_file(path)
    return found


def rows(num: int = 32, length: int = 24) -> torch.Tensor:
    return torch.randint(1, 211, (num, length), generator=torch.Generator().manual_seed(3))


def config_of(directory: Path) -> dict[str, Any]:
    return json.loads((directory / "config.json").read_text())["quantization_config"]


@pytest.mark.parametrize("shards", [1, 3])
@pytest.mark.parametrize("scheme", ["int8", "w8a8", "int4", "w4a8"])
def test_every_weight_is_the_nearest(tmp_path: Path, scheme: str, shards: int) -> None:
    source = model(tmp_path / "plain", shards, tie_word_embeddings=False)
    report = quantize_checkpoint(source, tmp_path / "out", Recipe(scheme, head="8bit", shard_bytes=200_000))
    assert report.num_modules == 2 * len(LAYER) + 1
    assert len(list((tmp_path / "out").glob("*.safetensors"))) > 1
    assert load_model_config(tmp_path / "out").quantization is not None
    stored, plain, made = everything(tmp_path / "out"), everything(source), tensors_of(loaded(tmp_path / "out"))
    for name, values in plain.items():
        module = name.removesuffix(".weight")
        if f"{module}.weight_scale" in stored:
            four = scheme in ("int4", "w4a8") and module != "lm_head"
            grid = Grid(4, 128) if four else Grid(8, None)
            if scheme.endswith("a8") and module.endswith("down_proj"):
                want = rotate(round_to_nearest(rotate(values.float(), 128), grid).values(), 128)
            else:
                want = round_to_nearest(values.float(), grid).values()
            assert torch.equal(made[name], want), name
        else:
            assert torch.equal(stored[name], values), name
            assert name.endswith(("norm.weight", "bias")) or name == "model.embed_tokens.weight"
    assert (tmp_path / "out" / "tokenizer.json").read_bytes() == (source / "tokenizer.json").read_bytes()
    assert report.bytes == sum(tensor.nbytes for tensor in stored.values())


@pytest.mark.parametrize(("width", "block"), [(256, 128), (240, 16), (200, 0)])
def test_inputs_with_outliers_are_rotated_in_the_largest_blocks(tmp_path: Path, width: int, block: int) -> None:
    source = model(tmp_path / "plain", intermediate_size=width)
    quantize_checkpoint(source, tmp_path / "out", Recipe("w8a8"))
    quantize_checkpoint(source, tmp_path / "plain8", Recipe("w8a8", rotate=False))
    assert "transform_config" not in config_of(tmp_path / "plain8")
    rotated, left = (load_model_config(tmp_path / name).quantization for name in ("out", "plain8"))
    assert rotated is not None
    assert left is not None
    for name in LAYER:
        module = f"model.layers.1.{name}"
        scheme = rotated.scheme_of(module)
        assert scheme is not None
        assert scheme.rotation == (block if name == "mlp.down_proj" else 0)
        assert left.scheme_of(module) == replace(scheme, rotation=0)
    name = "model.layers.1.mlp.down_proj.weight"
    want = round_to_nearest(everything(source)[name].float(), Grid(8, None)).integers
    assert torch.equal(everything(tmp_path / "plain8")[name], want)


def test_calibration_sees_rotated_inputs(tmp_path: Path) -> None:
    """Where only the down projection is rounded, what GPTQ makes up for is all that brings outputs nearer."""
    source, text = model(tmp_path / "plain"), rows()
    others = r"re:.*\.(q|k|v|o|gate|up)_proj"
    exact, lost = dense_logits(loaded(source), text.tolist()), {}
    for method in ("rtn", "gptq"):
        quantize_checkpoint(source, tmp_path / method, Recipe("w4a8", method, ignore=(others,)), lambda: text)
        lost[method] = float((dense_logits(loaded(tmp_path / method), text.tolist()) - exact).norm())
    assert lost["gptq"] < 0.79 * lost["rtn"]
    assert load_model_config(tmp_path / "gptq").quantization == load_model_config(tmp_path / "rtn").quantization


@pytest.mark.skipif(not usable_kernels(), reason="the native kernels were not built, or not for this machine")
@pytest.mark.parametrize("scheme", ["w8a8", "w4a8"])
@pytest.mark.parametrize("width", [256, 240, 192])
def test_what_is_stored_is_what_loading_makes(tmp_path: Path, scheme: str, width: int) -> None:
    source = model(tmp_path / "plain", intermediate_size=width, tie_word_embeddings=False)
    quantize_checkpoint(source, tmp_path / "out", Recipe(scheme))
    found = []
    for directory in (source, tmp_path / "out"):
        config = load_model_config(directory)
        made = create_model(config, torch.bfloat16)
        weights = PackedWeights(made, 1, (scheme, "bf16"))
        load_weights(directory, made, model_routes(config), packer=weights, quantization=config.quantization)
        down = weights.find(made.layers[1].mlp.down.weight)
        assert down is not None
        found.append(np.zeros((down.n, down.k), np.float32))
        down.unpack(found[-1])
    eight = scheme == "w4a8" and width % 128 > 0  # such a module gets 8 bits in the file
    assert np.array_equal(*found) != eight


def test_weights_that_no_rotation_can_hold_are_refused(tmp_path: Path) -> None:
    source = model(tmp_path / "plain")
    tensors = everything(source)
    tensors["model.layers.1.mlp.down_proj.weight"][3, :] = 3e38
    save_file(tensors, source / "model.safetensors")
    with pytest.raises(QuantizeError, match=r"model.layers.1.mlp.down_proj: its weights are too large"):
        quantize_checkpoint(source, tmp_path / "out", Recipe("w8a8"))


def test_a_head_that_is_stored_beside_the_table_it_is_tied_to(tmp_path: Path) -> None:
    """Checkpoints often hold both names of a tied matrix: one quantized matrix comes out, and it loads."""
    source = model(tmp_path / "plain", tie_word_embeddings=True)
    plain = everything(source)
    both = plain | {name: plain["model.embed_tokens.weight"].clone() for name in ("lm_head.weight",)}
    save_file(both, source / "model.safetensors")
    quantize_checkpoint(source, tmp_path / "out", Recipe("w8a8", head="8bit"))
    stored, made = everything(tmp_path / "out"), loaded(tmp_path / "out")
    assert "model.embed_tokens.weight" not in stored
    want = round_to_nearest(plain["model.embed_tokens.weight"].float(), Grid(8, None)).values()
    assert torch.equal(made.head.weight.detach(), want)
    assert made.embed.weight is made.head.weight


def test_only_the_head_is_quantized(tmp_path: Path) -> None:
    source = model(tmp_path / "plain", tie_word_embeddings=False)
    quantize_checkpoint(source, tmp_path / "out", Recipe("int8", head="8bit", ignore=("re:model.layers.*",)))
    stored = everything(tmp_path / "out")
    assert [name for name in stored if name.endswith("weight_scale")] == ["lm_head.weight_scale"]
    assert loaded(tmp_path / "out").head.weight.dtype == torch.float32


def test_files_can_be_mapped(tmp_path: Path) -> None:
    """Every tensor starts at a multiple of its item size, and the safetensors library reads it."""
    source = model(tmp_path / "plain", intermediate_size=240)
    report = quantize_checkpoint(source, tmp_path / "out", Recipe("int4"))
    assert report.eight_bits == tuple(f"model.layers.{n}.mlp.down_proj" for n in range(2))  # 240 columns
    path = tmp_path / "out" / "model.safetensors"
    raw = path.read_bytes()
    size = int.from_bytes(raw[:8], "little")
    header = json.loads(raw[8 : 8 + size])
    assert size % 8 == 0
    width = {"I64": 8, "I32": 4, "BF16": 2}
    assert all(each["data_offsets"][0] % width[each["dtype"]] == 0 for name, each in header.items() if name[0] != "_")
    with safe_open(path, "pt") as file:
        assert file.get_tensor("model.layers.0.mlp.down_proj.weight_shape").tolist() == [128, 240]
        assert file.get_tensor("model.layers.0.mlp.down_proj.weight_packed").shape == (128, 60)
    groups = config_of(tmp_path / "out")["config_groups"]
    assert groups["group_1"]["targets"] == [f"model.layers.{n}.mlp.down_proj" for n in range(2)]
    assert groups["group_1"]["weights"]["num_bits"] == 8
    assert load_model_config(tmp_path / "out").quantization is not None
    assert loaded(tmp_path / "out").layers[0].mlp.down.weight.isfinite().all()


def test_what_is_ignored_is_copied(tmp_path: Path) -> None:
    source = model(tmp_path / "plain", tie_word_embeddings=True)
    ignore = ("re:.*layers\\.0\\..*", "model.layers.1.self_attn.o_proj")
    quantize_checkpoint(source, tmp_path / "out", Recipe("int8", ignore=ignore))
    plain, stored = everything(source), everything(tmp_path / "out")
    kept = [f"model.layers.0.{name}" for name in LAYER] + [ignore[1], "lm_head"]
    assert sorted(config_of(tmp_path / "out")["ignore"]) == sorted(kept)
    for name in kept[:-1]:
        assert torch.equal(stored[f"{name}.weight"], plain[f"{name}.weight"])
    assert "model.layers.1.mlp.up_proj.weight_packed" in stored
    assert loaded(tmp_path / "out").layers[0].mlp.down.weight.isfinite().all()


@pytest.mark.parametrize(
    ("recipe", "text"),
    [
        (Recipe("int4", ignore=("model.layers.7.mlp.up_proj",)), "no module of this model matches"),
        (Recipe("int4", ignore=("model.layers.0.self_attn.q_proj",)), "are one matrix; ignore all or none"),
        (Recipe("int4", ignore=("re:.*",)), "nothing is left"),
        (Recipe("int4", ignore=("re:(",)), "not a pattern"),
        (Recipe("int4", group_size=64), "--group-size must be a multiple of 128"),
        (Recipe("int4", "gptq"), "gptq needs calibration text"),
    ],
)
def test_refusals_leave_nothing_behind(tmp_path: Path, recipe: Recipe, text: str) -> None:
    source = model(tmp_path / "plain")
    with pytest.raises(QuantizeError, match=text):
        quantize_checkpoint(source, tmp_path / "out", recipe)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["plain"]


def test_neither_a_full_directory_nor_a_quantized_model(tmp_path: Path) -> None:
    source = model(tmp_path / "plain")
    with pytest.raises(QuantizeError, match="not an empty directory"):
        quantize_checkpoint(source, source, Recipe("int8"))
    quantize_checkpoint(source, tmp_path / "out", Recipe("int8"))
    with pytest.raises(QuantizeError, match="is quantized already"):
        quantize_checkpoint(tmp_path / "out", tmp_path / "again", Recipe("int8"))


def test_a_weight_that_is_no_number_ends_it_without_a_directory(tmp_path: Path) -> None:
    source = model(tmp_path / "plain")
    tensors = everything(source)
    tensors["model.layers.1.mlp.up_proj.weight"][3, 3] = torch.nan
    save_file(tensors, source / "model.safetensors")
    for recipe in (Recipe("int8"), Recipe("int4", "gptq")):
        with pytest.raises(CheckpointError, match=r"model.layers.1.mlp.(gate|up)_proj"):
            quantize_checkpoint(source, tmp_path / "out", recipe, rows)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["plain"]


def test_layers_are_run_as_the_model_runs_them(tmp_path: Path) -> None:
    """Hessians beside inputs caught in a whole forward; hidden states run through all layers."""
    source = model(tmp_path / "plain")
    plain, text = loaded(source), rows(5, 24)
    seen: dict[str, torch.Tensor] = {}
    for name, module in plain.named_modules():
        if name.startswith("layers") and hasattr(module, "weight") and module.weight.dim() == 2:
            module.register_forward_pre_hook(lambda _, inputs, name=name: seen.update({name: inputs[0]}))
    dense_logits(plain, text.tolist())
    stored = everything(source)
    with torch.inference_mode():
        layers = CalibratedLayers(plain.config, text, lambda name: stored[name].float())
        targets = []
        for number in range(2):
            for matrix in layers.matrices(number):
                x = seen[matrix.target.removesuffix(".weight")]
                torch.testing.assert_close(matrix.hessian(), x.T @ x / len(x), rtol=1e-3, atol=1e-4)
                targets.append(matrix.target)
    assert targets == [f"layers.{n}.{name}.weight" for n in range(2) for name in
                       ("attention.qkv", "attention.out", "mlp.gate_up", "mlp.down")]  # fmt: skip


def test_calibration_gains(tmp_path: Path) -> None:
    """Logits on other text than that of the calibration; also the reported errors are those of the outputs."""
    source = model(tmp_path / "plain", tie_word_embeddings=True)
    plain, text = loaded(source), rows(48, 32)
    held = torch.randint(1, 211, (6, 32), generator=torch.Generator().manual_seed(9)).tolist()
    want = dense_logits(plain, held).log_softmax(-1)

    def divergence(directory: Path) -> float:
        found = dense_logits(loaded(directory), held).log_softmax(-1)
        return float((want.exp() * (want - found)).sum(-1).mean())

    quantize_checkpoint(source, tmp_path / "nearest", Recipe("int4"))
    told: list[tuple[str, int, int]] = []
    report = quantize_checkpoint(
        source, tmp_path / "gptq", Recipe("int4", "gptq"), lambda: text, lambda *all: told.append(all)
    )
    assert divergence(tmp_path / "gptq") < 0.75 * divergence(tmp_path / "nearest")
    assert len(report.errors) == 8
    assert all(0 < error < 0.05 for error in report.errors.values())
    assert told[-1] == ("quantizing layers", 2, 2)
    again = quantize_checkpoint(source, tmp_path / "again", Recipe("int4", "gptq"), lambda: text)
    assert again.errors == report.errors
    first, second = everything(tmp_path / "gptq"), everything(tmp_path / "again")
    assert all(torch.equal(first[name], second[name]) for name in first)


def test_calibration_text_from_files(tmp_path: Path) -> None:
    tokenizer = load_tokenizer(model(tmp_path / "plain"))
    text = tmp_path / "text.txt"
    text.write_text("One day a dog ran.\n\n" * 200)
    found = rows_of_file(text, tokenizer, 5, 40, seed=1)
    assert found.shape == (5, 40)
    assert torch.equal(found, rows_of_file(text, tokenizer, 5, 40, seed=1))
    assert len(rows_of_file(text, tokenizer, 10**6, 40, seed=1)) < 200
    lines = tmp_path / "text.jsonl"
    lines.write_text('{"text": "One day a dog ran."}\n' * 20)
    assert rows_of_file(lines, tokenizer, 2, 10, seed=0).shape == (2, 10)
    for name, content, error in (
        ("short.txt", "a", "needs at least 40"),
        ("bad.jsonl", '{"text": "x"}\n{"tex": 1}', "line 2 is not"),
        ("odd.jsonl", '{"text": 3}', "line 1: text must be a string"),
    ):
        (tmp_path / name).write_text(content)
        with pytest.raises(CalibrationError, match=error):
            rows_of_file(tmp_path / name, tokenizer, 5, 40, seed=1)
    with pytest.raises(CalibrationError, match="No such file"):
        rows_of_file(tmp_path / "none.txt", tokenizer, 5, 40, seed=1)


def test_beginnings_and_rows(tmp_path: Path) -> None:
    tokenizer = load_tokenizer(model(tmp_path / "plain"))
    found = beginnings(tokenizer, 211, 40, seed=2)
    assert found == beginnings(tokenizer, 211, 40, seed=2)
    assert found != beginnings(tokenizer, 211, 40, seed=3)
    assert all(found)
    assert rows_of([[1, 2, 3], [4], [5, 6]], 2).tolist() == [[1, 2], [5, 6]]
