from __future__ import annotations

import random
from collections.abc import Sequence
from pathlib import Path

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st
from tests.shared import tiny_tokenizers
from tests.shared.checkpoints import checkpoints, qwen_directory

from penstock.core.request import SamplingParams
from penstock.engine.text import (
    ByteDetokenizer,
    Detokenizer,
    OutputText,
    StopMatch,
    StopMatcher,
    WindowDetokenizer,
    detokenizer,
)
from penstock.engine.tokenizer import Tokenizer, load_tokenizer

PLAIN_TEXTS = [
    "Once upon a time, 日本語のテキスト and 😀👩‍👩‍👧‍👦🎉 in one line.\n\n\tdef f(x): return x ** 2  # naïve größer",
    " leading and trailing spaces  ",
    "ក្រុមហ៊ុន 北京和上海的天气怎么样？ Привет, мир! ñ e\u0301 \u202e \x00 end",
]


@pytest.fixture(scope="module")
def byte_level() -> Tokenizer:
    return Tokenizer(tiny_tokenizers.byte_level(), special_tokens={"eos_token": "<|im_end|>"})


@pytest.fixture(scope="module")
def byte_fallback() -> Tokenizer:
    return Tokenizer(tiny_tokenizers.byte_fallback(), special_tokens={"bos_token": "<s>", "eos_token": "</s>"})


@pytest.fixture(scope="module")
def word_piece() -> Tokenizer:
    return Tokenizer(tiny_tokenizers.word_piece())


@pytest.fixture(scope="module")
def qwen3(shared_dir: Path, tmp_path_factory: pytest.TempPathFactory) -> Tokenizer:
    return load_tokenizer(qwen_directory(shared_dir, "qwen3-30b-a3b", tmp_path_factory.mktemp("qwen3")))


@pytest.fixture(scope="module")
def phi3(shared_dir: Path) -> Tokenizer:
    return load_tokenizer(checkpoints(shared_dir) / "tokenizers" / "phi-3-mini")


def _batches(ids: Sequence[int], rng: random.Random) -> list[list[int]]:
    """`ids` cut at random, empty batches included."""
    cuts = sorted(rng.randrange(len(ids) + 1) for _ in range(rng.randrange(len(ids) + 2)))
    return [list(ids[a:b]) for a, b in zip([0, *cuts], [*cuts, len(ids)])]


def _pieces(stream: Detokenizer, ids: Sequence[int], rng: random.Random) -> str:
    """The text of `ids` fed in random batches; checks that no piece but the last holds part of a character."""
    pieces = [stream.feed(batch) for batch in _batches(ids, rng)]
    return "".join(pieces) + stream.finish()


def _bytes_with_one_mark_per_invalid_byte(data: bytes) -> str:
    """UTF-8 with U+FFFD for each byte that belongs to no whole character: written the slow way, as a reference."""
    text, i = "", 0
    while i < len(data):
        for length in (1, 2, 3, 4):
            try:
                text += data[i : i + length].decode("utf-8")
            except UnicodeDecodeError:
                continue
            i += length
            break
        else:
            text += "\ufffd"
            i += 1
    return text


def _unfinished(data: bytes) -> int:
    """How many bytes at the end of `data` begin a character without ending it."""
    for length in range(min(3, len(data)), 0, -1):
        for rest in (b"\x80", b"\x80\x80", b"\x80\x80\x80", b"\xbf", b"\xbf\x80", b"\xbf\x80\x80"):
            try:
                if len((data[-length:] + rest).decode("utf-8")) == 1:
                    return length
            except UnicodeDecodeError:
                continue
    return 0


# ---- detokenising ----


def _check_byte_level(tokenizer: Tokenizer, prompt: list[int], output: list[int], skip: bool, seed: int) -> None:
    got = _pieces(detokenizer(tokenizer, prompt, skip), output, random.Random(seed))
    prompt_bytes = b"".join(tokenizer.pieces(skip).bytes_of(token_id) for token_id in prompt)
    num_sent = len(prompt_bytes) - _unfinished(prompt_bytes)
    whole = tokenizer.decode(prompt + output, skip_special_tokens=skip)
    assert prompt_bytes[:num_sent].decode("utf-8", "replace") + got == whole


@given(st.data(), st.booleans(), st.integers())
@settings(max_examples=300, deadline=None)
def test_byte_level_pieces_are_the_whole(byte_level: Tokenizer, data: st.DataObject, skip: bool, seed: int) -> None:
    """For any ids, invalid UTF-8 included, and any batches: prompt text + pieces == decode(prompt + output)."""
    ids = st.lists(st.integers(0, byte_level.vocab_size + 3), max_size=30)
    _check_byte_level(byte_level, data.draw(ids), data.draw(ids), skip, seed)


@given(st.lists(st.binary(max_size=5), max_size=8), st.binary(max_size=5), st.integers())
@example([], b"\xed\xa1", 0)  # half a surrogate: nothing can complete it, so it is the prompt's
@example([b"\x80"], b"a\xed\xbf", 0)
@example([b"\x80"], b"a\xed\x9f", 0)  # the last two-byte beginning of a character before them
@settings(max_examples=300, deadline=None)
def test_byte_level_random_bytes(byte_level: Tokenizer, parts: list[bytes], prompt: bytes, seed: int) -> None:
    """The same over ids of single bytes: every kind of broken UTF-8, and whole characters in between."""
    of_byte = {byte_level.token_bytes(i): i for i in range(byte_level.vocab_size - 1, -1, -1)}
    data = b"".join(part + text.encode() for part, text in zip(parts, ["é", "日", "😀", "a"] * 2))
    ids = [of_byte[bytes([byte])] for byte in data]
    _check_byte_level(byte_level, [of_byte[bytes([byte])] for byte in prompt], ids, False, seed)


@given(st.data(), st.booleans(), st.integers())
@settings(max_examples=300, deadline=None)
def test_byte_fallback_pieces_are_the_whole(
    byte_fallback: Tokenizer, data: st.DataObject, skip: bool, seed: int
) -> None:
    """For any ids and batches: UTF-8 with one U+FFFD per invalid byte, less the first space of the whole text.

    That is what the library gives, except that it also destroys the valid characters of a run of byte tokens that
    holds an invalid byte: equality with it is demanded wherever no such run exists.
    """
    ids = st.lists(st.integers(0, byte_fallback.vocab_size + 3), max_size=25)
    prompt, output = data.draw(ids), data.draw(ids)
    got = _pieces(detokenizer(byte_fallback, prompt, skip), output, random.Random(seed))
    bytes_of = byte_fallback.pieces(skip).bytes_of
    before = b"".join(map(bytes_of, prompt))
    after = b"".join(map(bytes_of, output))
    sent = before[: len(before) - _unfinished(before)]
    whole = _bytes_with_one_mark_per_invalid_byte(before + after)
    prefix = _bytes_with_one_mark_per_invalid_byte(sent)
    if before:
        assert prefix + got == whole
    else:
        assert got == whole.removeprefix(" ")
    library = byte_fallback.decode(prompt + output, skip_special_tokens=skip)
    if "\ufffd" not in library:
        assert (prefix + got).removeprefix(" ") == library


@pytest.mark.parametrize("text", PLAIN_TEXTS)
def test_text_comes_without_broken_characters(byte_level: Tokenizer, byte_fallback: Tokenizer, text: str) -> None:
    """Token by token, what is out is always a prefix of the text, and behind by less than one character."""
    for tokenizer in (byte_level, byte_fallback):
        prompt = tokenizer.encode("Lily said:", add_special_tokens=True)
        ids = tokenizer.encode(text, add_special_tokens=False)
        stream, out, num_bytes = detokenizer(tokenizer, prompt), "", 0
        expected = " " * tokenizer.strips_first_space + text  # after a prompt, "▁" at the beginning is a space
        for token_id in ids:
            out += stream.feed([token_id])
            num_bytes += len(tokenizer.token_bytes(token_id))
            assert expected.startswith(out)
            assert num_bytes - len(out.encode()) < 4
        assert out + stream.finish() == expected


def test_first_space_belongs_to_the_whole_text(byte_fallback: Tokenizer) -> None:
    """SentencePiece: the first space of everything goes; it stays if the prompt has any text."""
    the = byte_fallback.encode("the", add_special_tokens=False)
    for prompt, expected in (([], "the"), ([1], "the"), ([1, *the], " the"), ([*the, 1], " the")):
        stream = detokenizer(byte_fallback, prompt)
        assert stream.feed(the) + stream.finish() == expected
        assert byte_fallback.decode(prompt + the) == byte_fallback.decode(prompt) + expected
    shown = detokenizer(byte_fallback, [1], skip_special_tokens=False)  # now "<s>" is text
    assert shown.feed(the) == " the"


def test_unfinished_character_of_the_prompt(byte_level: Tokenizer) -> None:
    """A prompt of token ids may end inside a character; the output that completes it carries it."""
    llama = byte_level.encode("🦙")
    stream = detokenizer(byte_level, llama[:-1])
    assert stream.feed(llama[-1:]) == "🦙"
    assert WindowDetokenizer(byte_level, llama[:-1]).feed(llama[-1:]) == "🦙"
    unfinished = detokenizer(byte_level)
    assert unfinished.feed(llama[:-1]) == ""
    assert unfinished.finish() == "\ufffd"


@given(st.text(alphabet="abc dTQ.,é日😀\n", max_size=40), st.text(alphabet="ab de日", max_size=10), st.integers())
@settings(max_examples=100, deadline=None)
def test_window_pieces_are_the_whole(
    word_piece: Tokenizer, byte_level: Tokenizer, byte_fallback: Tokenizer, text: str, prompt: str, seed: int
) -> None:
    """The general detokenizer gives what the whole gives, for a decoder with spaces and for the two fast kinds."""
    for tokenizer in (word_piece, byte_level, byte_fallback):
        before = tokenizer.encode(prompt)
        ids = tokenizer.encode(text, add_special_tokens=False)
        got = _pieces(WindowDetokenizer(tokenizer, before), ids, random.Random(seed))
        assert tokenizer.decode(before) + got == tokenizer.decode(before + ids)


@given(st.data(), st.booleans(), st.integers())
@settings(max_examples=100, deadline=None)
def test_window_over_any_ids(word_piece: Tokenizer, data: st.DataObject, spaces: bool, seed: int) -> None:
    """Any ids, special ones and unknown ones among them, with and without spaces around added tokens."""
    ids = data.draw(st.lists(st.integers(0, word_piece.vocab_size + 3), max_size=30))
    skip = data.draw(st.booleans())
    assert type(detokenizer(word_piece)) is WindowDetokenizer
    got = _pieces(detokenizer(word_piece, (), skip, spaces), ids, random.Random(seed))
    assert got == word_piece.decode(ids, skip, spaces)


def test_window_never_grows(byte_level: Tokenizer) -> None:
    """Endless invalid bytes are sent on after a few tokens: the window, and so the cost per token, stays bounded."""
    broken = next(i for i in range(byte_level.vocab_size) if byte_level.token_bytes(i) == b"\xff")
    stream = WindowDetokenizer(byte_level)
    out = "".join(stream.feed([broken]) for _ in range(100)) + stream.finish()
    assert set(out) == {"\ufffd"}
    assert len(stream._ids) <= 2 * WindowDetokenizer._MAX_WAITING


@pytest.mark.shared
@pytest.mark.parametrize("name", ["qwen3", "phi3"])
def test_real_tokenizers(request: pytest.FixtureRequest, name: str) -> None:
    """Real vocabularies: random ids in random batches, and texts, through the fast and the general detokenizer."""
    tokenizer: Tokenizer = request.getfixturevalue(name)
    assert type(detokenizer(tokenizer)) is ByteDetokenizer
    rng = random.Random(7)
    short = [i for i in range(600) if len(tokenizer.token_bytes(i)) == 1]
    for _ in range(300):
        pool = rng.choice([short, range(tokenizer.vocab_size)])
        prompt = [rng.choice(pool) for _ in range(rng.randrange(5))]
        output = [rng.choice(pool) for _ in range(rng.randrange(40))]
        skip = rng.random() < 0.5
        if name == "qwen3":
            _check_byte_level(tokenizer, prompt, output, skip, rng.randrange(1000))
        else:
            got = _pieces(detokenizer(tokenizer, [1], skip), output, rng)
            whole = tokenizer.decode([1, *output], skip_special_tokens=skip)
            expected = tokenizer.decode([1], skip_special_tokens=skip) + got
            assert expected == whole or "\ufffd" in whole
    for text in PLAIN_TEXTS * 3:
        before = tokenizer.encode("Question: ", add_special_tokens=False)
        ids = tokenizer.encode(text, add_special_tokens=False)
        for stream in (detokenizer(tokenizer, before), WindowDetokenizer(tokenizer, before)):
            whole = tokenizer.decode(before + ids)
            assert tokenizer.decode(before) + _pieces(stream, ids, rng) == whole


# ---- stop strings ----


def _reference(
    texts: list[str], stop: list[str], include: bool, min_tokens: int
) -> tuple[str, tuple[str, int, int] | None]:
    """The rule of StopMatcher, read off its docstring: one character at a time over the whole text."""
    whole = "".join(texts)
    starts = [len("".join(texts[:i])) for i in range(len(texts))]
    for end in range(1, len(whole) + 1):
        num_tokens = max(i + 1 for i, start in enumerate(starts) if start < end and texts[i])
        for string in stop if num_tokens > min_tokens else []:
            if whole[:end].endswith(string):
                cut = end if include else end - len(string)
                num_text = sum(start < cut for start in starts[:num_tokens])
                return whole[:cut], (string, num_tokens, num_text)
    return whole, None


TOKEN_TEXTS = st.lists(st.text(alphabet="abc", max_size=4), max_size=12)
STOPS = st.lists(st.text(alphabet="abc", min_size=1, max_size=5), min_size=1, max_size=4)


@given(TOKEN_TEXTS, STOPS, st.booleans(), st.integers(0, 4))
@settings(max_examples=1000, deadline=None)
def test_stop_matcher_against_the_rule(texts: list[str], stop: list[str], include: bool, min_tokens: int) -> None:
    """Text, stop string and token counts are the reference's; what is out never has to be taken back or waits idly."""
    expected_text, expected_match = _reference(texts, stop, include, min_tokens)
    matcher, out, num_fed = StopMatcher(stop, include, min_tokens), "", 0
    for text in texts:
        out += matcher.feed(text)
        num_fed += len(text)
        assert expected_text.startswith(out)
        if matcher.match is None:
            fed = "".join(texts)[:num_fed]
            could_begin = [n for s in stop for n in range(len(s)) if fed.endswith(s[:n])]
            assert num_fed - len(out) == max(could_begin, default=0)
    out += matcher.finish()
    assert out == expected_text
    got = matcher.match
    assert (got and (got.stop, got.num_tokens, got.num_text_tokens)) == expected_match
    if got:
        assert matcher.feed("more") == matcher.finish() == ""


def test_stop_matcher_by_example() -> None:
    matcher = StopMatcher(["END", "."])
    assert [matcher.feed(text) for text in ["one E", "N", "O", " E", "ND two."]] == ["one ", "", "ENO", " ", ""]
    assert matcher.match == StopMatch("END", num_tokens=5, num_text_tokens=4)
    both = StopMatcher(["cd", "bcd"])
    assert both.feed("abcde") == "ab"  # both end at the same character: the first in the list
    assert both.match is not None
    assert both.match.stop == "cd"
    sooner = StopMatcher(["abcd", "bc"])
    assert sooner.feed("abcd") == "a"  # "bc" is complete before "abcd", which a longer answer would have needed
    whole = StopMatcher(["bc"], include_stop_str_in_output=True)
    assert whole.feed("abcd") == "abc"
    assert StopMatcher([]).feed("anything") == "anything"
    late = StopMatcher(["a"], min_tokens=2)
    assert [late.feed(text) for text in ("a", "a", "ba")] == ["a", "a", "b"]
    unusual = StopMatcher(["]", "^-\\"])
    assert [unusual.feed(text) for text in ("a^", "-", "b^-", "\\")] == ["a", "", "^-b", ""]


def test_partial_character_before_a_stop_string(byte_level: Tokenizer) -> None:
    """Tokens that only bring bytes of the stop string's first character have no share in the text."""
    ids = byte_level.encode("ok", False) + byte_level.encode("🦙!", False)
    text = OutputText(byte_level, [], SamplingParams(stop=("🦙!",)))
    assert text.feed(ids) + text.close([], "length") == "ok"
    assert text.match == StopMatch("🦙!", len(ids), len(byte_level.encode("ok", False)))


# ---- both together ----


@given(st.data(), st.booleans(), st.integers(0, 6), st.integers())
@settings(max_examples=200, deadline=None)
def test_output_text_is_the_same_for_any_batches(
    byte_level: Tokenizer, data: st.DataObject, include: bool, min_tokens: int, seed: int
) -> None:
    """Streaming equals not streaming: text, match and counts do not depend on how tokens arrive."""
    text = data.draw(st.text(alphabet="ab é日", max_size=30))
    stop = data.draw(st.lists(st.text(alphabet="ab é日", min_size=1, max_size=3), max_size=3))
    ids = byte_level.encode(text)
    params = SamplingParams(
        stop=tuple(stop), include_stop_str_in_output=include, min_tokens=min_tokens, max_tokens=None
    )
    whole = OutputText(byte_level, [], params)
    returned = whole.close(ids, "length")
    streamed = OutputText(byte_level, [], params)
    *first, last = _batches(ids, random.Random(seed))
    pieces = [streamed.feed(batch) for batch in first]
    pieces.append(streamed.close(last, "length"))
    assert "".join(pieces) == streamed.text == whole.text == returned
    assert streamed.match == whole.match
    expected, match = _reference([byte_level.token_text(i) for i in ids], stop, include, min_tokens)
    if "\ufffd" not in expected:  # tokens that are whole characters: the reference sees what the matcher sees
        if all("\ufffd" not in byte_level.token_text(i) for i in ids):
            assert (returned, match is None) == (expected, whole.match is None)


def test_stop_tokens_give_no_text(byte_level: Tokenizer) -> None:
    """The last token of a sequence that ended by "stop" is left out, unless it is asked for (and not special)."""
    hello, think = byte_level.encode("Hello"), byte_level.encode("<think>")
    im_end = list(byte_level.eos_ids)
    for last, reason, include, expected in (
        (think, "stop", False, "Hello"),
        (think, "stop", True, "Hello<think>"),
        (think, "length", False, "Hello<think>"),
        (im_end, "stop", True, "Hello"),
    ):
        text = OutputText(byte_level, [], SamplingParams(include_stop_str_in_output=include))
        assert text.feed(hello) == "Hello"
        assert "Hello" + text.close(last, reason) == text.text == expected
    shown = OutputText(byte_level, [], SamplingParams(skip_special_tokens=False, include_stop_str_in_output=True))
    assert shown.close(hello + im_end, "stop") == "Hello<|im_end|>"
    half = OutputText(byte_level, [], SamplingParams(stop=("Hello!",)))
    assert half.feed(hello) == ""
    assert half.close(im_end, "stop") == "Hello"
    assert half.match is None


def test_no_detokenising(byte_level: Tokenizer) -> None:
    text = OutputText(byte_level, [], SamplingParams(detokenize=False))
    assert text.feed(byte_level.encode("Hello")) == text.close([], "length") == text.text == ""
