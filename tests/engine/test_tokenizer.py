from __future__ import annotations

import json
import threading
import time
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tests.shared import tiny_tokenizers
from tests.shared.checkpoints import checkpoints, parity_cases, qwen_directory, template_references
from tests.shared.gguf import tokenizer_of
from tokenizers import AddedToken, normalizers

from penstock.core.request import ParamsError
from penstock.engine.tokenizer import Tokenizer, TokenizerError, load_tokenizer

IM_END = {"content": "<|im_end|>", "lstrip": False, "normalized": False, "rstrip": False, "single_word": False}


@pytest.fixture(scope="module")
def byte_level(tmp_path_factory: pytest.TempPathFactory) -> Tokenizer:
    directory = tmp_path_factory.mktemp("byte_level")
    return load_tokenizer(tiny_tokenizers.save(tiny_tokenizers.byte_level(), directory, {"eos_token": "<|im_end|>"}))


@pytest.fixture(scope="module")
def byte_fallback(tmp_path_factory: pytest.TempPathFactory) -> Tokenizer:
    directory = tmp_path_factory.mktemp("byte_fallback")
    config = {"bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>"}
    return load_tokenizer(tiny_tokenizers.save(tiny_tokenizers.byte_fallback(), directory, config))


# ---- encoding and decoding ----


@given(st.text())
@settings(max_examples=200, deadline=None)
def test_byte_level_text_survives(byte_level: Tokenizer, text: str) -> None:
    """decode(encode(text)) == text for any Unicode text, and the tokens' bytes are the text's."""
    if any(special in text for special in tiny_tokenizers.SPECIALS):
        return
    ids = byte_level.encode(text)
    assert byte_level.decode(ids) == text
    assert b"".join(byte_level.token_bytes(token_id) for token_id in ids) == text.encode()


@given(st.text())
@settings(max_examples=200, deadline=None)
def test_byte_fallback_text_survives(byte_fallback: Tokenizer, text: str) -> None:
    """As above; SentencePiece puts a space before the text and takes "▁" for one."""
    if any(special in text for special in ("<unk>", "<s>", "</s>")):
        return
    ids = byte_fallback.encode(text, add_special_tokens=False)
    assert byte_fallback.decode(ids) == text.replace("▁", " ")
    token_bytes = b"".join(byte_fallback.token_bytes(token_id) for token_id in ids)
    assert token_bytes == ((" " + text.replace("▁", " ")).encode() if text else b"")


def test_batch_is_each_text(byte_fallback: Tokenizer) -> None:
    texts = ["Lily", "", "played in the park", "日本"]
    assert byte_fallback.encode_batch(texts) == [byte_fallback.encode(text) for text in texts]
    assert byte_fallback.encode("Lily")[0] == byte_fallback.bos_id == 1


def test_facts_of_byte_level(byte_level: Tokenizer) -> None:
    assert byte_level.decoding == "byte_level"
    assert not byte_level.strips_first_space
    im_end, think = byte_level.token_to_id("<|im_end|>"), byte_level.token_to_id("<think>")
    assert im_end is not None
    assert think is not None
    assert byte_level.eos_ids == (im_end,)
    assert byte_level.bos_id is None
    assert byte_level.is_special(im_end)
    assert not byte_level.is_special(think)
    assert byte_level.added_token(think) == "<think>"
    assert byte_level.vocab_size == think + 1
    assert byte_level.id_to_token(byte_level.encode(" the")[0]) == "Ġthe"
    assert byte_level.id_to_token(byte_level.vocab_size) is None
    assert byte_level.id_to_token(-1) is None
    assert byte_level.token_bytes(byte_level.vocab_size) == b""
    text = "a<|im_end|>b<think>c"
    ids = byte_level.encode(text)
    assert im_end in ids
    assert think in ids
    assert byte_level.decode(ids, skip_special_tokens=False) == text
    assert byte_level.decode(ids) == "ab<think>c"


def test_bytes_of_part_of_a_character(byte_level: Tokenizer, byte_fallback: Tokenizer) -> None:
    parts = [byte_level.token_bytes(token_id) for token_id in byte_level.encode("🦙")]
    assert len(parts) > 1
    assert b"".join(parts) == "🦙".encode()
    newline = byte_fallback.token_to_id("<0x0A>")
    assert newline is not None
    assert byte_fallback.token_bytes(newline) == b"\n"
    assert byte_fallback.token_text(byte_fallback.encode("the", False)[0]).startswith(" ")
    first = byte_level.encode("🦙")[0]
    assert byte_level.token_text(first) == "\ufffd"


def test_added_tokens_decode_as_the_library_does(tmp_path: Path) -> None:
    """A byte-level decoder reads an added token through the byte alphabet if all its characters are in it."""
    library = tiny_tokenizers.byte_level()
    library.add_tokens(["é", "x y", "｜bar▁｜"])
    tokenizer = load_tokenizer(tiny_tokenizers.save(library, tmp_path))
    for token in ("é", "x y", "｜bar▁｜"):
        token_id = tokenizer.token_to_id(token)
        assert token_id is not None
        assert tokenizer.token_text(token_id) == library.decode([token_id])


def test_other_decoder(tmp_path: Path) -> None:
    library = tiny_tokenizers.word_piece()
    library.add_tokens([AddedToken("[A]", normalized=False), AddedToken("[B]", normalized=False)])
    tokenizer = load_tokenizer(tiny_tokenizers.save(library, tmp_path))
    assert tokenizer.decoding == "other"
    ids = tokenizer.encode("the quick [A][B] fox")
    assert tokenizer.decode(ids) == library.decode(ids) == "the quick [A] [B] fox"
    assert tokenizer.decode(ids, spaces_between_special_tokens=False) == "the quick[A][B]fox"


def test_what_cannot_be_encoded_or_decoded(byte_level: Tokenizer) -> None:
    with pytest.raises(TokenizerError, match="surrogate"):
        byte_level.encode("broken \ud83d pair")
    for bad in (-1, 2**32, 2**70):
        with pytest.raises(TokenizerError, match="token ids"):
            byte_level.decode([bad])
    with pytest.raises(TokenizerError, match="token ids"):
        byte_level.decode(["a"])  # type: ignore[list-item]


def test_encoding_lets_other_threads_run(byte_level: Tokenizer) -> None:
    """A long prompt is encoded without the GIL: this thread goes on meanwhile."""
    text = "The quick brown fox jumps over the lazy dog. " * 10_000
    thread = threading.Thread(target=byte_level.encode, args=(text,))
    began = last = time.perf_counter()
    longest_gap = 0.0
    thread.start()
    while thread.is_alive():
        now = time.perf_counter()
        longest_gap, last = max(longest_gap, now - last), now
    took = time.perf_counter() - began
    thread.join()
    assert took > 0.05, "too quick to tell"
    assert longest_gap < took / 2


def test_bad_words(byte_level: Tokenizer) -> None:
    """The word bare and after a space, however many tokens each has."""
    (bare,), (spaced,) = byte_level.encode("fo"), byte_level.encode(" fo")
    assert byte_level.encode_bad_words(["fo"]) == byte_level.encode_bad_words(["  fo"]) == ((bare,), (spaced,))
    the, spaced_the = tuple(byte_level.encode("the")), tuple(byte_level.encode(" the"))
    assert (len(the), len(spaced_the)) == (2, 1)
    assert byte_level.encode_bad_words(["the", "fo"]) == (the, spaced_the, (bare,), (spaced,))
    assert byte_level.encode_bad_words([]) == ()
    with pytest.raises(ParamsError, match="empty word") as caught:
        byte_level.encode_bad_words(["ok", " "])
    assert caught.value.param == "bad_words"


# ---- loading ----


def test_added_tokens_of_the_config(tmp_path: Path) -> None:
    library = tiny_tokenizers.byte_level()
    size = library.get_vocab_size()
    config: dict[str, Any] = {
        "added_tokens_decoder": {str(size): {**IM_END, "content": "<|x|>", "special": True}},
        "bos_token": {**IM_END, "__type": "AddedToken", "content": "<|im_start|>"},
        "eos_token": "<|im_end|>",
        "additional_special_tokens": ["<|im_start|>", "<|im_end|>"],
    }
    tokenizer = load_tokenizer(tiny_tokenizers.save(library, tmp_path, config))
    assert tokenizer.encode("<|x|>") == [size]
    assert tokenizer.is_special(size)
    assert tokenizer.vocab_size == size + 1
    assert tokenizer.bos_id == tokenizer.token_to_id("<|im_start|>")
    assert tokenizer.special_tokens == {
        "bos_token": "<|im_start|>",
        "eos_token": "<|im_end|>",
        "additional_special_tokens": ["<|im_start|>", "<|im_end|>"],
    }
    config["added_tokens_decoder"] = {str(size + 5): {**IM_END, "content": "<|x|>"}}
    with pytest.raises(TokenizerError, match=f"should have id {size + 5}, but the vocabulary makes it {size}"):
        load_tokenizer(tiny_tokenizers.save(library, tmp_path, config))


def test_a_named_eos_becomes_special(tmp_path: Path) -> None:
    """A special token that tokenizer.json holds as an ordinary word is skipped in output all the same."""
    library = tiny_tokenizers.byte_level()
    tokenizer = load_tokenizer(tiny_tokenizers.save(library, tmp_path, {"eos_token": "Ġthe"}))
    assert tokenizer.is_special(tokenizer.eos_ids[0])


@pytest.mark.parametrize(("setting", "adds"), [(None, True), (True, True), (False, False)])
def test_add_bos_over_a_post_processor(tmp_path: Path, setting: bool | None, adds: bool) -> None:
    config = {"bos_token": "<s>", "add_bos_token": setting}
    tokenizer = load_tokenizer(tiny_tokenizers.save(tiny_tokenizers.byte_fallback(), tmp_path, config))
    plain = tokenizer.encode("Lily", add_special_tokens=False)
    assert tokenizer.encode("Lily") == ([1] if adds else []) + plain
    assert tokenizer.encode("<s>Lily")[: 1 + adds] == [1] * (1 + adds)


def test_add_bos_without_a_post_processor(tmp_path: Path) -> None:
    config = {"bos_token": "<|im_start|>", "add_bos_token": True}
    tokenizer = load_tokenizer(tiny_tokenizers.save(tiny_tokenizers.byte_level(), tmp_path, config))
    assert tokenizer.encode("Lily") == [tokenizer.bos_id, *tokenizer.encode("Lily", add_special_tokens=False)]


def test_end_tokens_from_all_sources(tmp_path: Path) -> None:
    """tokenizer_config first, then generation_config.json; config.json only without it."""
    directory = tiny_tokenizers.save(tiny_tokenizers.byte_level(), tmp_path, {"eos_token": "<|im_end|>"})
    (directory / "config.json").write_text('{"eos_token_id": 7}')
    assert load_tokenizer(directory).eos_ids == (2, 7)
    (directory / "generation_config.json").write_text('{"eos_token_id": [2, 0]}')
    assert load_tokenizer(directory).eos_ids == (2, 0)
    (directory / "generation_config.json").write_text("{}")
    assert load_tokenizer(directory).eos_ids == (2,)
    (directory / "tokenizer_config.json").unlink()
    (directory / "special_tokens_map.json").write_text('{"eos_token": {"content": "<|endoftext|>"}}')
    assert load_tokenizer(directory).eos_ids == (0,)


def test_chat_templates(tmp_path: Path) -> None:
    named = [{"name": "default", "template": "A"}, {"name": "tool_use", "template": "B"}]
    library = tiny_tokenizers.byte_level()
    assert load_tokenizer(tiny_tokenizers.save(library, tmp_path, {})).chat_templates == {}
    directory = tiny_tokenizers.save(library, tmp_path, {"chat_template": "one"})
    assert load_tokenizer(directory).chat_templates == {"default": "one"}
    directory = tiny_tokenizers.save(library, tmp_path, {"chat_template": named})
    assert load_tokenizer(directory).chat_templates == {"default": "A", "tool_use": "B"}
    (directory / "chat_template.jinja").write_text("C")
    (directory / "additional_chat_templates").mkdir()
    (directory / "additional_chat_templates" / "rag.jinja").write_text("D")
    assert load_tokenizer(directory).chat_templates == {"default": "C", "tool_use": "B", "rag": "D"}
    (directory / "tokenizer_config.json").write_text('{"chat_template": [1]}')
    with pytest.raises(TokenizerError, match="list of name and template"):
        load_tokenizer(directory)


def test_vocab_and_merges(tmp_path: Path) -> None:
    """The GPT-2 form gives the ids that tokenizer.json gives; the Qwen2 form normalises and splits digits."""
    library = tiny_tokenizers.byte_level()
    library.model.save(str(tmp_path))
    gpt2 = load_tokenizer(tmp_path)
    text = "Once upon a time, 1234567890 times; naïve ﬁ e\u0301"
    assert gpt2.encode(text) == library.encode(text).ids
    assert gpt2.decode(gpt2.encode(text)) == text
    assert gpt2.eos_ids == (0,)
    assert gpt2.is_special(0)

    (tmp_path / "tokenizer_config.json").write_text('{"tokenizer_class": "Qwen2Tokenizer", "eos_token": "<|im_end|>"}')
    qwen2 = load_tokenizer(tmp_path)
    assert qwen2.eos_ids == (2,)
    assert qwen2.decode(qwen2.encode(text)) == normalizers.NFC().normalize_str(text)
    assert [qwen2.token_text(i) for i in qwen2.encode("1234")] == list("1234")

    (tmp_path / "tokenizer_config.json").write_text('{"tokenizer_class": "LlamaTokenizer"}')
    with pytest.raises(TokenizerError, match="llamatokenizer needs"):
        load_tokenizer(tmp_path)


def test_broken_directories(tmp_path: Path) -> None:
    with pytest.raises(TokenizerError, match="nowhere does not exist"):
        load_tokenizer(tmp_path / "nowhere")
    with pytest.raises(TokenizerError, match=r"neither tokenizer\.json nor vocab\.json"):
        load_tokenizer(tmp_path)
    (tmp_path / "tokenizer.model").write_bytes(b"x")
    with pytest.raises(TokenizerError, match=r"tokenizer\.model alone is not enough"):
        load_tokenizer(tmp_path)
    (tmp_path / "tokenizer.json").write_text('{"version": "1.0", "mod')
    with pytest.raises(TokenizerError, match=r"tokenizer\.json cannot be read"):
        load_tokenizer(tmp_path)
    directory = tiny_tokenizers.save(tiny_tokenizers.byte_level(), tmp_path)
    for text, words in (("{", "cannot be read"), ("[1]", "must hold a JSON object, not a list"), ("[" * 9999, "read")):
        (directory / "tokenizer_config.json").write_text(text)
        with pytest.raises(TokenizerError, match=rf"tokenizer_config\.json {words}|{words}"):
            load_tokenizer(directory)
    (directory / "tokenizer_config.json").write_bytes(b"\xff\xfe{}")
    with pytest.raises(TokenizerError, match="cannot be read"):
        load_tokenizer(directory)


def test_truncation_and_padding_of_the_file_are_ignored(tmp_path: Path) -> None:
    library = tiny_tokenizers.byte_level()
    library.enable_truncation(3)
    library.enable_padding(length=64)
    tokenizer = load_tokenizer(tiny_tokenizers.save(library, tmp_path))
    text = "The quick brown fox"
    assert tokenizer.decode(tokenizer.encode(text)) == text


# ---- parity with real tokenizers ----


@pytest.fixture(scope="module")
def qwen3(shared_dir: Path, tmp_path_factory: pytest.TempPathFactory) -> Tokenizer:
    return load_tokenizer(qwen_directory(shared_dir, "qwen3-30b-a3b", tmp_path_factory.mktemp("qwen3")))


def _assert_parity(tokenizer: Tokenizer, cases: list[tuple[str, list[int]]], leading_space: bool) -> None:
    assert len(cases) == 46
    for text, ids in cases:
        assert tokenizer.encode(text, add_special_tokens=False) == ids, text
        token_bytes = b"".join(tokenizer.token_bytes(token_id) for token_id in ids)
        prefix = " " if leading_space and text else ""
        assert prefix + tokenizer.decode(ids) == token_bytes.decode("utf-8", "replace")
        # DeepSeek's vocabularies hold letters of the byte alphabet ("ü") as added tokens. They match letters of the
        # text, and decode to the byte that the letter stands for: the library does so, hence transformers and we.
        if not any(token in text for token in map(tokenizer.added_token, ids) if token):
            assert token_bytes == (prefix + text).encode()


@pytest.mark.shared
@pytest.mark.parametrize("cases", ["qwen2", "deepseek-r1-qwen"])
def test_qwen_parity(shared_dir: Path, qwen3: Tokenizer, cases: str) -> None:
    """DeepSeek-R1-Distill-Qwen has Qwen2's vocabulary; Qwen3 only adds tokens. The texts are NFC already."""
    _assert_parity(qwen3, parity_cases(shared_dir, cases), leading_space=False)


@pytest.mark.shared
def test_gpt2_parity(shared_dir: Path) -> None:
    tokenizer = load_tokenizer(checkpoints(shared_dir) / "tokenizers" / "gpt2")
    _assert_parity(tokenizer, parity_cases(shared_dir, "gpt-2"), leading_space=False)
    assert tokenizer.eos_ids == (50256,)


@pytest.mark.shared
def test_phi3_parity(shared_dir: Path) -> None:
    tokenizer = load_tokenizer(checkpoints(shared_dir) / "tokenizers" / "phi-3-mini")
    _assert_parity(tokenizer, parity_cases(shared_dir, "phi-3"), leading_space=True)
    assert (tokenizer.bos_id, tokenizer.eos_ids, tokenizer.vocab_size) == (1, (32000,), 32011)


@pytest.mark.shared
@pytest.mark.parametrize("name", ["gpt-2", "phi-3", "deepseek-llm", "deepseek-coder"])
def test_gguf_vocabulary_parity(shared_dir: Path, name: str) -> None:
    """The vocabularies inside the .gguf files. For llama-bpe (Llama 3) only cases exist, no vocabulary: not tested."""
    path = checkpoints(shared_dir) / "tokenizers" / "gguf-vocab" / f"ggml-vocab-{name}.gguf"
    _assert_parity(Tokenizer(tokenizer_of(path)), parity_cases(shared_dir, name), leading_space=name == "phi-3")


@pytest.mark.shared
def test_every_parity_case_has_a_test(shared_dir: Path) -> None:
    """New cases in the shared data must not go unnoticed."""
    found = {path.name for path in (checkpoints(shared_dir) / "tokenizers" / "gguf-vocab").glob("*.inp")}
    tested = {"qwen2", "deepseek-r1-qwen", "gpt-2", "phi-3", "deepseek-llm", "deepseek-coder"}
    without_vocabulary = {"llama-bpe"}
    assert found == {f"ggml-vocab-{name}.gguf.inp" for name in tested | without_vocabulary}


@pytest.mark.shared
def test_qwen_references_read_back(shared_dir: Path, qwen3: Tokenizer) -> None:
    """Ids that Qwen's own tokenizer gave for whole conversations: decoding and encoding again gives them exactly."""
    references = template_references(shared_dir)
    names = [name for name in references if name.startswith(("qwen3-", "qwen_", "repo-wiki"))]
    assert len(names) == 12
    for name in names:
        text = qwen3.decode(references[name], skip_special_tokens=False)
        assert text.count("<|im_start|>") >= 2
        assert "\ufffd" not in text
        assert qwen3.encode(text, add_special_tokens=False) == references[name]


@pytest.mark.shared
@pytest.mark.parametrize("name", ["phi-3-mini", "torchtitan-test-2k", "qwen3-30b-a3b", "qwen2.5", "qwen3-coder"])
def test_same_as_transformers(shared_dir: Path, tmp_path: Path, name: str) -> None:
    """Ids, texts, special tokens and end token as `transformers` reads them from the same directory."""
    from transformers import AutoTokenizer, PreTrainedTokenizerFast

    directory = checkpoints(shared_dir) / "tokenizers" / name
    if (directory / "tokenizer.json").is_file():
        kind = PreTrainedTokenizerFast  # AutoTokenizer 5.x builds Phi-3's anew, not as its file (and llama.cpp) has it
    else:
        directory, kind = qwen_directory(shared_dir, name, tmp_path), AutoTokenizer
    ours, theirs = load_tokenizer(directory), kind.from_pretrained(directory)
    specials = [
        content for value in ours.special_tokens.values() for content in ([value] if isinstance(value, str) else value)
    ]
    texts = [text for text, _ in parity_cases(shared_dir, "qwen2")]
    texts += [f"before{special} after {special}{special}\nend" for special in specials] + ["<think>x</think>"]
    for text in texts:
        for add_special_tokens in (True, False):
            ids = theirs.encode(text, add_special_tokens=add_special_tokens)
            assert ours.encode(text, add_special_tokens) == ids, text
        for skip in (True, False):
            expected = theirs.decode(ids, skip_special_tokens=skip, clean_up_tokenization_spaces=False)
            assert ours.decode(ids, skip_special_tokens=skip) == expected
    assert ours.vocab_size == len(theirs)
    assert ours.bos_id == theirs.bos_token_id
    assert (ours.eos_ids or (None,))[0] == theirs.eos_token_id
    for token_id in theirs.all_special_ids:
        assert ours.is_special(token_id)


def test_json_of_a_decoder_is_what_we_read() -> None:
    """The library gives a decoder's form as JSON; if that changes, every tokenizer would fall to the slow path."""
    state = tiny_tokenizers.byte_level().decoder.__getstate__()
    assert json.loads(state)["type"] == "ByteLevel"
