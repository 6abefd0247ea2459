"""What benchmarks ask for: prompts, output lengths and arrival times, made up from a seed or read from a file.

Names, defaults and file formats are vLLM's; a timed trace is Mooncake's. Knows token ids, text and lengths. Does not
know how a request is sent, nor who answers it.
"""

from __future__ import annotations

import gzip
import json
import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from penstock.config.values import ConfigError
from penstock.engine.tokenizer import Tokenizer

# ShareGPT: as vLLM and SGLang prune it, so that figures compare. In tokens.
MIN_SHARE_LEN, MAX_SHARE_PROMPT, MAX_SHARE_TOTAL = 4, 1024, 2048
MOONCAKE_BLOCK = 512
WORDS = (
    "about after again air all and animal answer around back because before between big boat book boy came can city "
    "come could country day different down each earth end every eye far father find first follow food found girl give "
    "good great hand head help here home house idea land large learn letter light line little live long look made make "
    "man many mean more most mother move much name near need never new night number old only open other over page"
).split()


@dataclass(frozen=True, slots=True)
class BenchRequest:
    """One request: token ids or text, and how many tokens it shall get.

    `num_prompt`: tokens of the prompt as far as they are known here, 0 for text without a tokenizer. `at_s`: seconds
    from the start of the run, for traces that say when.
    """

    num_output: int
    num_prompt: int
    token_ids: list[int] | None = None
    text: str | None = None
    at_s: float | None = None


@dataclass(frozen=True, slots=True)
class Vocabulary:
    """What made-up prompts are made of.

    `ids`: the ids to draw from. `text_of`: ids as text. `num_added`: tokens that a server puts before a text.
    `are_token_ids` False: `ids` number WORDS, because no tokenizer is known; only their text means anything then.
    """

    ids: np.ndarray
    text_of: Callable[[Sequence[int]], str]
    are_token_ids: bool = True

    @classmethod
    def of(cls, tokenizer: Tokenizer, vocab_size: int | None = None) -> Vocabulary:
        """All tokens of a tokenizer but the special ones; below `vocab_size`, if the model has fewer."""
        size = min(tokenizer.vocab_size, vocab_size or tokenizer.vocab_size)
        ids = [i for i in range(size) if not tokenizer.is_special(i) and tokenizer.id_to_token(i) is not None]
        return cls(np.array(ids, np.int64), lambda ids: tokenizer.decode(list(ids)))

    @classmethod
    def of_words(cls) -> Vocabulary:
        """Common English words, each about a token in most vocabularies."""
        return cls(np.arange(len(WORDS)), lambda ids: " ".join(WORDS[i] for i in ids), are_token_ids=False)

    def draw(self, rng: np.random.Generator, num: int) -> list[int]:
        """`num` ids, uniformly."""
        return self.ids[rng.integers(0, len(self.ids), num)].tolist()  # type: ignore[no-any-return]

    def request(self, ids: list[int], num_output: int, at_s: float | None = None) -> BenchRequest:
        """A request for these ids."""
        if self.are_token_ids:
            return BenchRequest(num_output, len(ids), token_ids=ids, at_s=at_s)
        return BenchRequest(num_output, 0, text=self.text_of(ids), at_s=at_s)


def random_requests(
    vocabulary: Vocabulary,
    num_requests: int,
    rng: np.random.Generator,
    *,
    input_len: int = 1024,
    output_len: int = 128,
    prefix_len: int = 0,
    range_ratio: float = 0.0,
) -> list[BenchRequest]:
    """Prompts of `prefix_len` equal tokens and `input_len` random ones.

    Lengths are uniform over [len * (1 - range_ratio), len * (1 + range_ratio)], at least 1.
    """
    if not 0 <= range_ratio < 1:
        raise ConfigError("must be at least 0 and below 1", "--random-range-ratio")
    prefix = vocabulary.draw(rng, prefix_len)

    def lengths(mean: int) -> np.ndarray:
        low, high = math.floor(mean * (1 - range_ratio)), math.ceil(mean * (1 + range_ratio))
        return rng.integers(max(low, 1), max(high, 1) + 1, num_requests)

    inputs, outputs = lengths(input_len), lengths(output_len)
    return [
        vocabulary.request(prefix + vocabulary.draw(rng, int(num)), int(num_output))
        for num, num_output in zip(inputs, outputs, strict=True)
    ]


def prefix_repetition_requests(
    vocabulary: Vocabulary,
    num_requests: int,
    rng: np.random.Generator,
    *,
    prefix_len: int = 256,
    suffix_len: int = 256,
    num_prefixes: int = 10,
    output_len: int = 128,
) -> list[BenchRequest]:
    """`num_requests // num_prefixes` prompts for each of `num_prefixes` beginnings, in random order."""
    each = num_requests // num_prefixes if num_prefixes > 0 else 0
    if each == 0:
        raise ConfigError(
            f"must be between 1 and the number of prompts ({num_requests})", "--prefix-repetition-num-prefixes"
        )
    requests = []
    for _ in range(num_prefixes):
        prefix = vocabulary.draw(rng, prefix_len)
        requests += [vocabulary.request(prefix + vocabulary.draw(rng, suffix_len), output_len) for _ in range(each)]
    return [requests[i] for i in rng.permutation(len(requests))]


def sharegpt_requests(
    path: str,
    tokenizer: Tokenizer,
    num_requests: int,
    rng: np.random.Generator,
    *,
    output_len: int | None = None,
    oversample: bool = True,
) -> list[BenchRequest]:
    """First turns of a ShareGPT file: the prompt is what the person said first, the length that of the first answer.

    JSON, a list of {"conversations": [{"value": ...}, {"value": ...}, ...]}. Raises ConfigError.
    """
    data = _read_json(path)
    if not isinstance(data, list):
        raise ConfigError(f"{path} is not a list of conversations", "--dataset-path")
    pairs = []
    for entry in data:
        turns = entry.get("conversations") or entry.get("conversation") or [] if isinstance(entry, dict) else []
        if len(turns) >= 2 and all(isinstance(turn.get("value"), str) for turn in turns[:2]):
            pairs.append((turns[0]["value"], turns[1]["value"]))
    found: list[BenchRequest] = []
    for i in rng.permutation(len(pairs)).tolist():
        if len(found) == num_requests:
            break
        prompt, answer = pairs[i]
        num_prompt = len(tokenizer.encode(prompt))
        num_output = len(tokenizer.encode(answer, add_special_tokens=False)) if output_len is None else output_len
        if num_prompt < MIN_SHARE_LEN or (output_len is None and num_output < MIN_SHARE_LEN):
            continue
        if num_prompt > MAX_SHARE_PROMPT or num_prompt + num_output > MAX_SHARE_TOTAL:
            continue
        found.append(BenchRequest(num_output, num_prompt, text=prompt))
    return _oversampled(found, num_requests, oversample, path)


def custom_requests(
    path: str,
    tokenizer: Tokenizer | None,
    num_requests: int,
    rng: np.random.Generator,
    *,
    output_len: int = 256,
    oversample: bool = True,
    shuffle: bool = True,
) -> list[BenchRequest]:
    """Lines {"prompt": text} of a JSONL file; `output_len` -1: each line's own "output_tokens". Raises ConfigError."""
    found: list[BenchRequest] = []
    for number, line in _read_lines(path):
        try:
            prompt = line["prompt"]
            num_output = int(line["output_tokens"]) if output_len == -1 else output_len
            if not isinstance(prompt, str):
                raise TypeError
        except (KeyError, TypeError, ValueError):
            wanted = '{"prompt": text, "output_tokens": N}' if output_len == -1 else '{"prompt": text}'
            raise ConfigError(f"line {number} of {path} is not {wanted}", "--dataset-path") from None
        num_prompt = len(tokenizer.encode(prompt)) if tokenizer is not None else 0
        found.append(BenchRequest(num_output, num_prompt, text=prompt))
    if shuffle:
        found = [found[i] for i in rng.permutation(len(found))]
    return _oversampled(found[:num_requests], num_requests, oversample, path)


def timed_trace_requests(
    path: str,
    vocabulary: Vocabulary,
    num_requests: int | None,
    seed: int,
    *,
    block_size: int = MOONCAKE_BLOCK,
    length_scale: float = 1.0,
    seconds_per_unit: float = 0.001,
    speed: float = 1.0,
) -> list[BenchRequest]:
    """The first requests of a trace in Mooncake's format, in order of arrival. Raises ConfigError.

    JSONL: {"timestamp", "input_length", "output_length", "hash_ids"}; equal hash ids are equal blocks of `block_size`
    tokens. Each id stands for tokens drawn from (seed, id), so prompts share exactly the prefixes that the trace says.
    Without hash ids a prompt shares nothing. `length_scale` shrinks prompts, outputs and blocks alike; `speed` 2 plays
    twice as fast. Source: Qin et al. 2024, "Mooncake"; github.com/kvcache-ai/Mooncake.
    """
    for value, flag in ((length_scale, "--timed-trace-length-scale"), (speed, "--timed-trace-speed")):
        if value <= 0:
            raise ConfigError("must be above 0", flag)
    scaled_block = max(1, round(block_size * length_scale))
    blocks: dict[int, list[int]] = {}

    def block(id_: int) -> list[int]:
        if id_ not in blocks:
            # A hash may be any 64-bit number, negative ones too; seeds are words of 32 bits.
            words = (seed, id_ & 0xFFFFFFFF, (id_ >> 32) & 0xFFFFFFFF)
            blocks[id_] = vocabulary.draw(np.random.default_rng(words), scaled_block)
        return blocks[id_]

    requests: list[BenchRequest] = []
    for number, line in _read_lines(path):
        if num_requests is not None and len(requests) == num_requests:
            break
        try:
            timestamp, num_input, num_output = (
                float(line["timestamp"]), int(line["input_length"]), int(line["output_length"])
            )  # fmt: skip
            hash_ids = [int(i) for i in line.get("hash_ids") or ()]
        except (KeyError, TypeError, ValueError, AttributeError):
            wanted = "timestamp, input_length, output_length and hash_ids"
            raise ConfigError(f"line {number} of {path} has no {wanted}", "--dataset-path") from None
        if hash_ids and len(hash_ids) * block_size < num_input:
            raise ConfigError(
                f"line {number} of {path}: {len(hash_ids)} blocks of {block_size} tokens do not cover its "
                f"{num_input}; give the trace's block size",
                "--timed-trace-chunk-hash-size",
            )
        if hash_ids:
            num = min(max(1, round(num_input * length_scale)), len(hash_ids) * scaled_block)
            ids: list[int] = []
            for id_ in hash_ids[: -(-num // scaled_block)]:
                ids += block(id_)
            del ids[num:]
        else:
            own = np.random.default_rng((seed, number, 1))
            ids = vocabulary.draw(own, max(1, round(num_input * length_scale)))
        at_s = timestamp * seconds_per_unit / speed
        requests.append(vocabulary.request(ids, max(1, round(num_output * length_scale)), at_s))
    if not requests:
        raise ConfigError(f"{path} holds no request", "--dataset-path")
    requests.sort(key=lambda request: request.at_s or 0.0)
    first_s = requests[0].at_s or 0.0
    return [replace(request, at_s=(request.at_s or 0.0) - first_s) for request in requests]


def _oversampled(found: list[BenchRequest], num: int, oversample: bool, path: str) -> list[BenchRequest]:
    """As many as asked for; what is missing is repeated, unless that is not wanted."""
    if not found:
        raise ConfigError(f"{path} holds no usable request", "--dataset-path")
    if oversample:
        found = [found[i % len(found)] for i in range(num)]
    return found


def _open_text(path: str) -> Any:
    try:
        return gzip.open(path, "rt", encoding="utf-8") if path.endswith(".gz") else Path(path).open(encoding="utf-8")
    except OSError as error:
        raise ConfigError(f"cannot read {path}: {error.strerror or error}", "--dataset-path") from None


def _read_json(path: str) -> Any:
    with _open_text(path) as file:
        try:
            return json.load(file)
        except (OSError, ValueError) as error:
            raise ConfigError(f"{path} is not JSON: {error}", "--dataset-path") from None


def _read_lines(path: str) -> Iterator[tuple[int, dict[str, Any]]]:
    """(line number, object) of a JSONL file; empty lines are left out."""
    with _open_text(path) as file:
        try:
            for number, line in enumerate(file, 1):
                if line.strip():
                    yield number, json.loads(line)
        except (OSError, ValueError) as error:
            raise ConfigError(f"{path} is not JSONL: {error}", "--dataset-path") from None
