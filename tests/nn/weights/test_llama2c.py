"""Converted llama2.c files compute what llama2.c computes, tokens and scores; malformed ones are refused."""

from __future__ import annotations

import gzip
import json
import os
import struct
from dataclasses import dataclass
from itertools import islice, pairwise
from pathlib import Path

import numpy as np
import pytest
import torch
import transformers
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.numpy import load_file
from tests.nn.dense_attention import dense_logits
from tokenizers import Tokenizer

from penstock.config.model import load_model_config
from penstock.nn.models import create_model, model_routes
from penstock.nn.models.llama import LlamaModel
from penstock.nn.weights.errors import CheckpointError
from penstock.nn.weights.llama2c import MalformedLlama2c, build_tokenizer, convert_llama2c
from penstock.nn.weights.stream import load_weights

pytestmark = pytest.mark.usefixtures("one_thread")


@dataclass
class Llama2c:
    """A random model and tokenizer in llama2.c's form, with its arithmetic (run.c) in numpy float64."""

    header: tuple[int, ...]
    arrays: dict[str, np.ndarray]
    pieces: list[bytes]
    scores: list[float]

    def write(self, directory: Path) -> tuple[Path, Path]:
        model, tokenizer = directory / "model.bin", directory / "tokenizer.bin"
        model.write_bytes(struct.pack("<7i", *self.header) + b"".join(a.tobytes() for a in self.arrays.values()))
        tokens = (struct.pack("<fi", s, len(p)) + p for p, s in zip(self.pieces, self.scores, strict=True))
        tokenizer.write_bytes(struct.pack("<i", max(map(len, self.pieces))) + b"".join(tokens))
        return model, tokenizer

    def forward(self, tokens: list[int]) -> np.ndarray:
        """Scores after each token [T, vocab]; rope turns neighbouring elements, as run.c does."""
        dim, _, layers, heads, kv_heads, vocab, _ = self.header
        w = {name: array.astype(np.float64) for name, array in self.arrays.items()}
        size, x = dim // heads, w["embed"][tokens]

        def norm(x: np.ndarray, weight: np.ndarray) -> np.ndarray:
            return x / np.sqrt((x**2).mean(-1, keepdims=True) + 1e-5) * weight

        def rope(x: np.ndarray) -> np.ndarray:
            angles = np.arange(len(tokens))[:, None] / 10000.0 ** (np.arange(0, size, 2) / size)
            turned = (x[..., 0::2] + 1j * x[..., 1::2]) * np.exp(1j * angles)[:, None]
            return np.stack((turned.real, turned.imag), -1).reshape(x.shape)

        for n in range(layers):
            h = norm(x, w["attention_norm"][n])
            q, k, v = (h @ w[name][n].T for name in ("wq", "wk", "wv"))
            q, k = rope(q.reshape(-1, heads, size)), rope(k.reshape(-1, kv_heads, size))
            k, v = (a.reshape(-1, kv_heads, size).repeat(heads // kv_heads, 1) for a in (k, v))
            scores = np.einsum("qhd,khd->hqk", q, k) / np.sqrt(size)
            scores = np.where(np.tri(len(tokens), dtype=bool), scores, -np.inf)
            chances = np.exp(scores - scores.max(-1, keepdims=True))
            chances /= chances.sum(-1, keepdims=True)
            x = x + np.einsum("hqk,khd->qhd", chances, v).reshape(-1, dim) @ w["wo"][n].T
            h = norm(x, w["mlp_norm"][n])
            gate = h @ w["w1"][n].T
            x = x + (gate / (1 + np.exp(-gate)) * (h @ w["w3"][n].T)) @ w["w2"][n].T
        return norm(x, w["norm"]) @ w["head" if vocab < 0 else "embed"].T

    def encode(self, text: str) -> list[int]:
        """run.c's `encode` with bos: a space in front, bytes for unknown characters, best neighbours first."""
        ids = {piece: token for token, piece in enumerate(self.pieces)}
        tokens = [ids[b" "]] if text else []
        for char in text:
            raw = char.encode()
            tokens += [ids[raw]] if raw in ids else [byte + 3 for byte in raw]
        while True:
            unions = [ids.get(self.pieces[a] + self.pieces[b]) for a, b in pairwise(tokens)]
            scored = [(self.scores[union], -n) for n, union in enumerate(unions) if union is not None]
            if not scored:
                return [1, *tokens]
            n = -max(scored)[1]
            tokens[n : n + 2] = [unions[n]]


ALPHABET = " abcdt"


def random_llama2c(tied: bool, seed: int = 0) -> Llama2c:
    """2 layers, 4 heads, 2 KV heads; a vocabulary of random unions, each scored below what it is made of."""
    rng = np.random.default_rng(seed)
    pieces = [b"<unk>", b"\n<s>\n", b"\n</s>\n", *(b"<0x%02X>" % byte for byte in range(256))]
    words = sorted(ALPHABET)
    while len(words) < 60:
        word = words[rng.integers(len(words))] + words[rng.integers(len(words))]
        if word not in words and len(word) < 9:
            words.append(word)
    longer = words[len(ALPHABET) :]
    words = longer + words[: len(ALPHABET)]  # as sentencepiece has it: unions by rank, then single characters
    pieces += [word.encode() for word in words]
    scores = [0.0] * 259 + [-float(n) for n in range(len(words))]
    dim, hidden, layers, heads, kv_heads, seq = 24, 40, 2, 4, 2, 32
    shapes = {
        "embed": (len(pieces), dim),
        "attention_norm": (layers, dim),
        "wq": (layers, dim, dim),
        "wk": (layers, dim // 2, dim),
        "wv": (layers, dim // 2, dim),
        "wo": (layers, dim, dim),
        "mlp_norm": (layers, dim),
        "w1": (layers, hidden, dim),
        "w2": (layers, dim, hidden),
        "w3": (layers, hidden, dim),
        "norm": (dim,),
        "rope": (2, seq, dim // heads // 2),
        **({} if tied else {"head": (len(pieces), dim)}),
    }
    arrays = {
        name: (rng.normal(size=shape) * (1 if "norm" in name else 2 / shape[-1] ** 0.5)).astype("<f4")
        for name, shape in shapes.items()
    }
    header = (dim, hidden, layers, heads, kv_heads, len(pieces) if tied else -len(pieces), seq)
    return Llama2c(header, arrays, pieces, scores)


def load(directory: Path) -> LlamaModel:
    config = load_model_config(directory)
    model = create_model(config, torch.float32)
    load_weights(directory, model, model_routes(config))
    return model


@pytest.mark.parametrize("tied", [True, False])
def test_converted_weights_compute_the_same(tied: bool, tmp_path: Path) -> None:
    """Our model and transformers' agree with run.c's arithmetic to 1e-5; values are moved, never changed."""
    source = random_llama2c(tied)
    report = convert_llama2c(*source.write(tmp_path), tmp_path / "out")
    assert report.directory == tmp_path / "out"
    used = {name: array for name, array in source.arrays.items() if name != "rope"}
    assert report.num_parameters == sum(array.size for array in used.values())
    assert report.bytes == sum(path.stat().st_size for path in (tmp_path / "out").iterdir())
    stored = load_file(tmp_path / "out" / "model.safetensors")
    values = np.concatenate([array.ravel() for array in stored.values()])
    assert np.array_equal(np.sort(values), np.sort(np.concatenate([array.ravel() for array in used.values()])))
    tokens = np.random.default_rng(1).integers(0, len(source.pieces), 30).tolist()
    expected = source.forward(tokens)
    model = load(tmp_path / "out")
    assert model.config.tied_embeddings == tied
    assert model.config.num_parameters == report.num_parameters
    assert (model.config.bos_token_id, model.config.eos_token_ids) == (1, (2, 1))
    assert (model.config.max_position, model.config.dtype) == (32, "float32")
    ours = dense_logits(model, [tokens]).double().numpy()
    assert abs(ours - expected).max() / abs(expected).max() < 1e-5
    reference = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    assert reference.dtype == torch.float32
    with torch.no_grad():
        theirs = reference(torch.tensor([tokens])).logits[0].double().numpy()
    assert abs(theirs - expected).max() / abs(expected).max() < 1e-5


@pytest.fixture(scope="module")
def converted(tmp_path_factory: pytest.TempPathFactory) -> tuple[Llama2c, Tokenizer, Path]:
    directory = tmp_path_factory.mktemp("llama2c")
    source = random_llama2c(tied=True)
    convert_llama2c(*source.write(directory), directory / "out")
    return source, Tokenizer.from_file(str(directory / "out" / "tokenizer.json")), directory / "out"


@settings(max_examples=500, deadline=None)
@given(st.one_of(st.text(st.sampled_from(ALPHABET), max_size=40), st.text(st.sampled_from(ALPHABET + "é😀\n<x"))))
def test_encoding_equals_that_of_run_c(converted: tuple[Llama2c, Tokenizer, Path], text: str) -> None:
    """Any text, with characters outside the vocabulary, which become bytes; decoding gives the text back."""
    source, tokenizer, _ = converted
    ids = tokenizer.encode(text).ids
    assert ids == source.encode(text)
    assert tokenizer.decode(ids) == text


def test_transformers_loads_the_tokenizer(converted: tuple[Llama2c, Tokenizer, Path]) -> None:
    source, _, directory = converted
    tokenizer = transformers.AutoTokenizer.from_pretrained(directory)
    assert tokenizer("dad act é").input_ids == source.encode("dad act é")
    assert (tokenizer.bos_token_id, tokenizer.eos_token_id, tokenizer.unk_token_id) == (1, 2, 0)
    assert tokenizer.model_max_length == 32
    assert tokenizer.decode(source.encode("dad act é"), skip_special_tokens=True) == "dad act é"


def test_special_tokens_are_recognised(converted: tuple[Llama2c, Tokenizer, Path]) -> None:
    _, tokenizer, _ = converted
    assert tokenizer.encode("</s>").ids == [1, 2]
    assert tokenizer.decode([1, 2]) == ""
    assert tokenizer.get_vocab_size() == 319


def header(**changes: int) -> bytes:
    names = ("dim", "hidden", "layers", "heads", "kv", "vocab", "seq")
    fields = dict(zip(names, random_llama2c(True).header, strict=True))
    return struct.pack("<7i", *(fields | changes).values())


BAD_MODELS = {
    "empty": (lambda raw: b"", "0 bytes, too short"),
    "a newer export": (lambda raw: struct.pack("<Ii", 0x616B3432, 1) + raw, "version 1 or 2"),
    "truncated": (lambda raw: raw[:-1], "truncated: .* bytes, its header promises"),
    "trailing bytes": (lambda raw: raw + b"\0", "too long: "),
    "untied without a head": (lambda raw: header(vocab=-319) + raw[28:], "truncated"),
    "zero layers": (lambda raw: header(layers=0) + raw[28:], "not a llama2.c model: its header says 24, 40, 0"),
    "negative width": (lambda raw: header(dim=-24) + raw[28:], "not a llama2.c model"),
    "heads that do not divide": (lambda raw: header(heads=5) + raw[28:], "not a llama2.c model"),
    "kv heads that do not divide": (lambda raw: header(kv=3) + raw[28:], "not a llama2.c model"),
    "odd head_dim": (lambda raw: header(heads=8, kv=4) + raw[28:], "not a llama2.c model"),
    "huge": (lambda raw: header(vocab=2**31 - 1) + raw[28:], "not a llama2.c model"),
    "text": (lambda raw: b"once upon a time there was a file that held a story" * 9, "not a llama2.c model"),
    "not finite": (
        lambda raw: raw[: 28 + 4 * 400] + struct.pack("<f", float("nan")) + raw[28 + 4 * 401 :],
        "model.embed_tokens.weight holds values that are not finite",
    ),
}


@pytest.mark.parametrize("case", BAD_MODELS)
def test_malformed_models_are_refused(case: str, tmp_path: Path) -> None:
    """One line that names the file; nothing is left behind, not even in part."""
    model, tokenizer = random_llama2c(True).write(tmp_path)
    change, text = BAD_MODELS[case]
    model.write_bytes(change(model.read_bytes()))
    with pytest.raises(MalformedLlama2c, match=text) as error:
        convert_llama2c(model, tokenizer, tmp_path / "out")
    assert str(model) in str(error.value)
    assert sorted(os.listdir(tmp_path)) == ["model.bin", "tokenizer.bin"]


def token_bytes(source: Llama2c, token: int) -> tuple[int, int]:
    """Where a token's entry lies in the tokenizer file."""
    start = 4 + sum(8 + len(piece) for piece in source.pieces[:token])
    return start, start + 8 + len(source.pieces[token])


def replaced(token: int, entry: bytes):
    def change(raw: bytes) -> bytes:
        start, end = token_bytes(random_llama2c(True), token)
        return raw[:start] + entry + raw[end:]

    return change


BAD_TOKENIZERS = {
    "empty": (lambda raw: b"", "0 bytes, too short"),
    "truncated": (lambda raw: raw[:-1], "token 318 has score .* and length"),
    "too few tokens": (lambda raw: raw[: token_bytes(random_llama2c(True), 318)[0]], "ends after 318 tokens"),
    "too many tokens": (lambda raw: raw + struct.pack("<fi", 0, 1) + b"x", "9 bytes after token 319, the model's last"),
    "negative length": (replaced(300, struct.pack("<fi", -1, -1)), "token 300 has score -1.0 and length -1"),
    "score that is none": (replaced(300, struct.pack("<fi", float("nan"), 1) + b"x"), "token 300 has score nan"),
    "not UTF-8": (replaced(300, struct.pack("<fi", -1, 1) + b"\xff"), "token 300 is not UTF-8"),
    "no bytes": (replaced(100, struct.pack("<fi", 0, 1) + b"x"), "token 100 is not the byte <0x61>"),
    "a piece twice": (replaced(300, struct.pack("<fi", -1, 1) + b"a"), "token 300 is empty or occurs twice"),
    "an empty piece": (replaced(300, struct.pack("<fi", -1, 0)), "token 300 is empty or occurs twice"),
}


@pytest.mark.parametrize("case", BAD_TOKENIZERS)
def test_malformed_tokenizers_are_refused(case: str, tmp_path: Path) -> None:
    model, tokenizer = random_llama2c(True).write(tmp_path)
    change, text = BAD_TOKENIZERS[case]
    tokenizer.write_bytes(change(tokenizer.read_bytes()))
    with pytest.raises(MalformedLlama2c, match=text) as error:
        convert_llama2c(model, tokenizer, tmp_path / "out")
    assert str(tokenizer) in str(error.value)
    assert not (tmp_path / "out").exists()


def test_paths_that_cannot_be_used(tmp_path: Path) -> None:
    """Absent inputs are named; an output that holds something is not overwritten; an empty one is filled."""
    model, tokenizer = random_llama2c(True).write(tmp_path)
    with pytest.raises(CheckpointError, match="absent.bin: No such file"):
        convert_llama2c(tmp_path / "absent.bin", tokenizer, tmp_path / "out")
    with pytest.raises(CheckpointError, match="exists and is not an empty directory"):
        convert_llama2c(model, tokenizer, tmp_path)
    with pytest.raises(CheckpointError, match="exists and is not an empty directory"):
        convert_llama2c(model, tokenizer, model)
    (tmp_path / "empty").mkdir()
    convert_llama2c(model, tokenizer, tmp_path / "empty")
    convert_llama2c(model, tokenizer, tmp_path / "deep" / "er")
    for directory in (tmp_path / "empty", tmp_path / "deep" / "er"):
        assert load(directory).config.vocab_size == 319


@pytest.mark.shared
def test_stories260k_equals_its_reference(shared_dir: Path, tmp_path: Path) -> None:
    """Real weights in float32: prompt ids, 48 greedy ids per prompt exactly, first top-5 scores to 2e-4, the text."""
    data = shared_dir / "data" / "checkpoints" / "stories260K"
    convert_llama2c(data / "stories260K.bin", data / "tok512.bin", tmp_path / "out")
    model = load(tmp_path / "out")
    assert sum(parameter.numel() for parameter in model.parameters()) == 260_032
    tokenizer = Tokenizer.from_file(str(tmp_path / "out" / "tokenizer.json"))
    reference = json.loads((data / "greedy_reference.json").read_text())["prompts"]
    assert len(reference) == 3
    for prompt, expected in reference.items():
        ids = tokenizer.encode(prompt).ids
        assert ids == expected["prompt_ids"]
        best = dense_logits(model, [ids])[-1].topk(5)
        assert best.indices.tolist() == [token for token, _ in expected["first_step_top5"]]
        assert best.values.tolist() == pytest.approx([value for _, value in expected["first_step_top5"]], abs=2e-4)
        for _ in range(48):
            ids.append(int(dense_logits(model, [ids])[-1].argmax()))
        assert ids[-48:] == expected["greedy_ids"]
        assert tokenizer.decode(ids) == expected["text"].removeprefix(" ")


@pytest.mark.shared
def test_stories_are_encoded_as_run_c_does(shared_dir: Path) -> None:
    """The real vocabulary of 512 tokens on 100 stories."""
    path = shared_dir / "data" / "checkpoints" / "stories260K" / "tok512.bin"
    raw, position, pieces, scores = path.read_bytes(), 4, [], []
    while position < len(raw):
        score, length = struct.unpack_from("<fi", raw, position)
        pieces.append(raw[position + 8 : position + 8 + length])
        scores.append(score)
        position += 8 + length
    source, tokenizer = Llama2c((), {}, pieces, scores), build_tokenizer(path, 512)
    with gzip.open(shared_dir / "data" / "corpus" / "tinystories_slice.jsonl.gz", "rt", encoding="utf-8") as file:
        stories = [json.loads(line)["text"][:400] for line in islice(file, 100)]
    for story in stories:
        ids = tokenizer.encode(story).ids
        assert ids == source.encode(story)
        assert tokenizer.decode(ids) == story
