"""Loading is exact for every dtype, shard, thread count and chunk size; a failure leaves nothing half loaded."""

from __future__ import annotations

import os
import threading
from pathlib import Path

import pytest
import torch
from tests.nn.dense_attention import dense_logits
from tests.nn.weights.files import dummy_model, save, tensors_of, tiny_config

from penstock.nn.models import create_model, model_routes
from penstock.nn.models.llama import LlamaModel
from penstock.nn.weights.errors import (
    CheckpointError,
    MissingTensor,
    NoCheckpoint,
    TiedWeightsDiffer,
    TruncatedShard,
    UnknownTensor,
    WrongDtype,
    WrongShape,
)
from penstock.nn.weights.stream import LoadReport, load_weights

pytestmark = pytest.mark.usefixtures("one_thread")
FLOATS = [torch.float32, torch.bfloat16, torch.float16]
FIRST_NORM = "model.layers.0.input_layernorm.weight"


def load(directory: Path, model: LlamaModel, **options: int) -> LoadReport:
    return load_weights(directory, model, model_routes(model.config), **options)


def assert_equal(model: LlamaModel, expected: LlamaModel) -> None:
    ours, theirs = dict(model.named_parameters()), dict(expected.named_parameters())
    assert ours.keys() == theirs.keys()
    for name in ours:
        assert torch.equal(ours[name], theirs[name].to(ours[name].dtype)), name


@pytest.mark.parametrize("dtype", FLOATS, ids=str)
@pytest.mark.parametrize("stored", FLOATS, ids=str)
def test_every_pair_of_float_dtypes(stored: torch.dtype, dtype: torch.dtype, tmp_path: Path) -> None:
    """What arrives is torch's own cast of what is stored, bit for bit; the report says which casts were made."""
    source = dummy_model(tiny_config(), stored)
    save(tmp_path, tensors_of(source), num_shards=3)
    model = create_model(source.config, dtype)
    report = load(tmp_path, model)
    assert_equal(model, source)
    assert report.num_shards == 3
    assert report.num_tensors == len(tensors_of(source))
    assert report.bytes == sum(p.numel() for p in model.parameters()) * stored.itemsize
    assert report.gb_per_s > 0
    names = {torch.float32: "F32", torch.bfloat16: "BF16", torch.float16: "F16"}
    cast = f"{names[stored]} -> {str(dtype).removeprefix('torch.')}"
    assert report.casts == ({} if stored == dtype else {cast: report.num_tensors})


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("threads", [1, 2, 5])
@pytest.mark.parametrize("chunk_bytes", [4096, 5003, 1 << 24])
def test_every_way_of_cutting(chunk_bytes: int, threads: int, dtype: torch.dtype, tmp_path: Path) -> None:
    """Tensors larger and smaller than a chunk, chunk sizes that no element size divides, more threads than extents."""
    source = dummy_model(tiny_config(vocab_size=997, tie_word_embeddings=True))
    save(tmp_path, tensors_of(source), num_shards=2)
    model = create_model(source.config, dtype)
    calls: list[tuple[int, int]] = []
    routes = model_routes(model.config)
    report = load_weights(
        tmp_path, model, routes, threads=threads, chunk_bytes=chunk_bytes, progress=lambda *call: calls.append(call)
    )
    assert_equal(model, source)
    done = [call[0] for call in calls]
    assert done[0] == 0
    assert done == sorted(set(done)), "progress only grows"
    assert done[-1] == report.bytes
    assert {call[1] for call in calls} == {report.bytes}
    assert model.head.weight is model.embed.weight


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_reads_that_return_less(dtype: torch.dtype, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The kernel may read less than it was asked for (signals, network file systems, 2 GiB): the rest is asked again.

    The real call with at most 777 bytes, so that reads end inside tensors and between them.
    """
    source = dummy_model(tiny_config())
    save(tmp_path, tensors_of(source))
    real = os.preadv

    def reluctant(file: int, buffers: list[memoryview], offset: int) -> int:
        taken, room = [], 777
        for buffer in buffers:
            taken.append(buffer[:room])
            room -= len(taken[-1])
        return real(file, [part for part in taken if part], offset)

    monkeypatch.setattr(os, "preadv", reluctant)
    model = create_model(source.config, dtype)
    load(tmp_path, model)
    assert_equal(model, source)


def test_a_mixed_checkpoint(tmp_path: Path) -> None:
    """Norms in float32 among bfloat16 matrices: one read fills parameters and slots at once."""
    source = dummy_model(tiny_config())
    tensors = {n: t if t.dim() == 1 else t.bfloat16() for n, t in tensors_of(source).items()}
    save(tmp_path, tensors)
    model = create_model(source.config, torch.float32)
    report = load(tmp_path, model)
    assert report.casts == {"BF16 -> float32": sum(t.dim() == 2 for t in tensors.values())}
    loaded = tensors_of(model)
    for name, tensor in tensors.items():
        assert torch.equal(loaded[name], tensor.float()), name


def test_old_rotary_tables_are_ignored(tmp_path: Path) -> None:
    source = dummy_model(tiny_config())
    extra = {f"model.layers.{n}.self_attn.rotary_emb.inv_freq": torch.ones(3) for n in range(2)}
    save(tmp_path, tensors_of(source) | extra)
    model = create_model(source.config, torch.float32)
    report = load(tmp_path, model)
    assert_equal(model, source)
    assert report.num_tensors == len(tensors_of(source))


def test_tied_checkpoint_that_stores_the_head_too(tmp_path: Path) -> None:
    """Equal values are fine, in any float dtype; different ones are refused, and so is another shape."""
    source = dummy_model(tiny_config(tie_word_embeddings=True), torch.bfloat16)
    tensors = tensors_of(source)
    head = source.embed.weight.detach().clone()
    for dtype in FLOATS[:2]:
        save(tmp_path, tensors | {"lm_head.weight": head})
        model = create_model(source.config, dtype)
        load(tmp_path, model, chunk_bytes=4096)
        assert_equal(model, source)
        changed = head.clone()
        changed[-1, -1] += 1
        save(tmp_path, tensors | {"lm_head.weight": changed})
        with pytest.raises(
            TiedWeightsDiffer, match=r"model.safetensors: lm_head.weight differs .* tie_word_embeddings"
        ):
            load(tmp_path, model)
        assert_emptied(model)
    save(tmp_path, tensors | {"lm_head.weight": head[:-1].clone()})
    with pytest.raises(WrongShape, match=r"lm_head.weight has shape \[96, 24\], config.json asks for \[97, 24\]"):
        load(tmp_path, create_model(source.config, torch.bfloat16))


def test_tied_checkpoint_that_stores_only_the_head(tmp_path: Path) -> None:
    source = dummy_model(tiny_config(tie_word_embeddings=True))
    tensors = tensors_of(source)
    tensors["lm_head.weight"] = tensors.pop("model.embed_tokens.weight")
    save(tmp_path, tensors)
    model = create_model(source.config, torch.float32)
    load(tmp_path, model)
    assert_equal(model, source)


def assert_untouched(model: LlamaModel) -> None:
    assert all(bool((parameter == 7).all()) for parameter in model.parameters())


def assert_emptied(model: LlamaModel) -> None:
    """No parameter holds anything, so that a forward cannot give an answer."""
    assert all(parameter.numel() == 0 for parameter in model.parameters())
    with pytest.raises((RuntimeError, IndexError)):
        dense_logits(model, [[1, 2, 3]])


def filled(source: LlamaModel, dtype: torch.dtype = torch.float32) -> LlamaModel:
    model = create_model(source.config, dtype)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.fill_(7)
    return model


def without(name: str) -> dict[str, torch.Tensor]:
    tensors = tensors_of(dummy_model(tiny_config()))
    del tensors[name]
    return tensors


@pytest.mark.parametrize(
    ("name", "value", "kind", "text"),
    [
        ("model.layers.0.mlp.extra", torch.ones(3), UnknownTensor, "no place for tensor model.layers.0.mlp.extra"),
        ("model.layers.2.input_layernorm.weight", torch.ones(24), UnknownTensor, "layers.2.input_layernorm.weight"),
        (FIRST_NORM, torch.ones(25), WrongShape, r"layernorm.weight has shape \[25\], config.json asks for \[24\]"),
        (FIRST_NORM, torch.ones(1, 24), WrongShape, r"has shape \[1, 24\], config.json asks for \[24\]"),
        ("model.layers.1.self_attn.k_proj.weight", torch.ones(24, 24), WrongShape, r"\[24, 24\].*asks for \[12, 24\]"),
        (FIRST_NORM, torch.ones(24, dtype=torch.int64), WrongDtype, "layernorm.weight is I64, which cannot become"),
        (FIRST_NORM, torch.ones(24).to(torch.float8_e4m3fn), WrongDtype, "is F8_E4M3, .* loadable: F32, BF16, F16"),
        (FIRST_NORM, torch.ones(24, dtype=torch.float64), WrongDtype, "layernorm.weight is F64"),
        (FIRST_NORM, None, MissingTensor, "does not hold model.layers.0.input_layernorm.weight$"),
        ("model.layers.1.self_attn.v_proj.bias", None, MissingTensor, "layers.1.self_attn.v_proj.bias"),
        ("lm_head.weight", None, MissingTensor, "does not hold lm_head.weight"),
    ],
)
def test_what_is_wrong_is_found_before_anything_is_written(
    name: str, value: torch.Tensor | None, kind: type[CheckpointError], text: str, tmp_path: Path
) -> None:
    """Each error is one line that names file (or directory) and tensor, and the parameters are as they were."""
    save(tmp_path, without(name) if value is None else without(FIRST_NORM) | {FIRST_NORM: torch.ones(24), name: value})
    model = filled(dummy_model(tiny_config()))
    with pytest.raises(kind, match=text) as error:
        load(tmp_path, model)
    assert str(tmp_path) in str(error.value)
    assert "\n" not in str(error.value)
    assert_untouched(model)


def test_many_missing_tensors_are_counted(tmp_path: Path) -> None:
    save(tmp_path, {FIRST_NORM: torch.ones(24)})
    with pytest.raises(MissingTensor, match=r"does not hold model.embed_tokens.weight, .* and 23 more"):
        load(tmp_path, create_model(tiny_config(), torch.float32))


def test_absent_directory(tmp_path: Path) -> None:
    model = filled(dummy_model(tiny_config()))
    with pytest.raises(NoCheckpoint, match="absent: no such directory"):
        load(tmp_path / "absent", model)
    assert_untouched(model)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("threads", [1, 3])
def test_a_file_cut_short_while_it_is_read(threads: int, dtype: torch.dtype, tmp_path: Path) -> None:
    """The header was right when it was checked: a typed error, no thread left, no model that could be used."""
    source = dummy_model(tiny_config(vocab_size=4001))
    save(tmp_path, tensors_of(source))
    model = filled(source, dtype)
    path = tmp_path / "model.safetensors"
    num_threads = threading.active_count()

    def cut(done: int, total: int) -> None:
        if done == 0:
            os.truncate(path, path.stat().st_size * 2 // 3)

    with pytest.raises(TruncatedShard, match=r"model.safetensors: ends at byte \d+, inside .*: it changed"):
        load_weights(tmp_path, model, model_routes(model.config), threads=threads, chunk_bytes=1 << 14, progress=cut)
    assert threading.active_count() == num_threads
    assert_emptied(model)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_an_interrupted_load(dtype: torch.dtype, tmp_path: Path) -> None:
    """Ctrl-C, seen here as an exception out of `progress`: it comes through, threads end, nothing is half loaded."""
    source = dummy_model(tiny_config(vocab_size=4001))
    save(tmp_path, tensors_of(source))
    model = filled(source, dtype)
    num_threads, num_files = threading.active_count(), len(os.listdir("/proc/self/fd"))

    def interrupt(done: int, total: int) -> None:
        if done > total // 2:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        load_weights(tmp_path, model, model_routes(model.config), chunk_bytes=1 << 14, progress=interrupt)
    assert threading.active_count() == num_threads
    assert len(os.listdir("/proc/self/fd")) == num_files
    assert_emptied(model)


def test_values_that_float16_cannot_hold(tmp_path: Path) -> None:
    """bf16 reaches 3e38, fp16 65504: infinities in the weights would only show as nonsense in the answers."""
    tensors = tensors_of(dummy_model(tiny_config(), torch.bfloat16))
    tensors["model.layers.1.mlp.up_proj.weight"][3, 3] = 1e5
    save(tmp_path, tensors)
    model = create_model(tiny_config(), torch.float16)
    with pytest.raises(WrongDtype, match=r"model.layers.1.mlp.up_proj.weight has values that float16 cannot hold"):
        load(tmp_path, model)
    assert_emptied(model)
    load(tmp_path, create_model(tiny_config(), torch.float32))


def test_the_number_of_torch_threads_is_as_before(tmp_path: Path) -> None:
    source = dummy_model(tiny_config())
    save(tmp_path, tensors_of(source))
    seen = []
    torch.set_num_threads(2)
    try:
        model = create_model(source.config, torch.bfloat16)
        routes = model_routes(source.config)
        load_weights(tmp_path, model, routes, progress=lambda *_: seen.append(torch.get_num_threads()))
        assert set(seen) == {1}
        assert torch.get_num_threads() == 2
    finally:
        torch.set_num_threads(1)


def test_options_are_checked(tmp_path: Path) -> None:
    model = create_model(tiny_config(), torch.float32)
    for options in ({"threads": 0}, {"chunk_bytes": 4095}):
        with pytest.raises(ValueError, match="threads must be >= 1 and chunk_bytes >= 4096"):
            load(tmp_path, model, **options)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs an NVIDIA GPU")
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
def test_onto_a_gpu(dtype: torch.dtype, tmp_path: Path) -> None:
    """Through pinned slots, with and without a cast: the same bits as on the CPU, and a tied head is compared there."""
    source = dummy_model(tiny_config(tie_word_embeddings=True), torch.bfloat16)
    save(tmp_path, tensors_of(source) | {"lm_head.weight": source.embed.weight.detach().clone()}, num_shards=2)
    model = create_model(source.config, dtype, "cuda")
    load(tmp_path, model, chunk_bytes=4096)
    assert {parameter.device.type for parameter in model.parameters()} == {"cuda"}
    assert model.rotary.cos.device.type == "cuda"
    assert_equal(model.cpu(), source)
