"""The corpus of a recipe as documents: text or chat, each on one side of the held-out split.

Reads the JSON-lines and text files of a corpus directory. Knows nothing of tensors, models or optimisers.
"""

from __future__ import annotations

import gzip
import hashlib
import json
import random
import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from penstock.training.recipe import LmRecipe, Source
from penstock.training.sampled_stories import sample_stories
from penstock.training.story_chat import chats_of_story
from penstock.training.tokenizer import END_OF_TEXT, ChatRenderer

SYSTEM_PROMPTS = (
    "You are a helpful assistant.",
    "You are a friendly assistant. Answer in short, simple sentences.",
    "You are penstock-tiny, a small language model.",
    "You are a helpful, honest assistant.",
    "Answer the user's question.",
    "You are a kind storyteller.",
)


@dataclass(frozen=True, slots=True)
class Document:
    """One unit of training text, as the model will read it (without its closing <|endoftext|>).

    `silent_chars`: characters at the beginning that carry no loss (a system prompt with tools). `is_chat`: a row never
    begins in the middle of it.
    """

    text: str
    held_out: bool
    is_chat: bool
    silent_chars: int = 0


class CorpusError(ValueError):
    """A file of the corpus is missing or is not what the recipe says."""


def chance(*parts: str) -> float:
    """A number in [0, 1) that depends on the parts alone: decides splits and variants, the same on every machine."""
    digest = hashlib.blake2b("\x00".join(parts).encode(), digest_size=8).digest()
    return int.from_bytes(digest, "big") / 2**64


def load_documents(
    recipe: LmRecipe, corpus_dir: Path, cache_dir: Path, say: Callable[[str], None] = print
) -> dict[str, list[Document]]:
    """Documents of every source, by name, in a fixed order. Sampled stories are kept in `cache_dir`.

    Raises CorpusError when a file is missing or malformed.
    """
    stories: dict[str, list[str]] = {}
    found: dict[str, list[Document]] = {}
    renderer = ChatRenderer()
    for source in recipe.sources:
        documents: list[Document] = []
        if source.kind in ("text", "plain", "sampled"):
            stories[source.name] = list(_texts(source, recipe, corpus_dir, cache_dir, say))
            documents = [
                Document(text, _held_out(recipe, source.name, text), False) for text in stories[source.name] if text
            ]
        elif source.kind == "story_chat":
            for story in stories[source.of]:
                held_out = _held_out(recipe, source.of, story)
                for messages in chats_of_story(story):
                    documents.append(_chat_document(renderer, messages, None, held_out, source.name))
        elif source.kind == "chat":
            rows = list(_json_lines(corpus_dir / source.file, source))
            tools = _tool_schemas(rows)
            for row in rows:
                key = json.dumps(row["messages"], ensure_ascii=False)
                messages, used = _messages(row["messages"], tools, key)
                documents.append(
                    _chat_document(renderer, messages, used, _held_out(recipe, source.name, key), source.name)
                )
        else:
            for messages in _pairs(recipe_file(source)):
                documents.append(_chat_document(renderer, messages, None, False, source.name))
        if source.max_documents:
            documents = documents[: source.max_documents]
        found[source.name] = documents
        num_chars = sum(len(d.text) for d in documents)
        say(f"  {source.name}: {len(documents):,} documents, {num_chars / 1e6:.2f} M characters")
    return found


def recipe_file(source: Source) -> Path:
    """Where the file of a "pairs" source lies: beside the shipped recipes."""
    return Path(__file__).parent / "recipes" / source.file


def _held_out(recipe: LmRecipe, source: str, text: str) -> bool:
    return chance("held-out", source, text) < recipe.held_out_fraction


def _texts(
    source: Source, recipe: LmRecipe, corpus_dir: Path, cache_dir: Path, say: Callable[[str], None]
) -> Iterator[str]:
    """Plain documents of one source, normalised and cut into sections."""
    if source.kind == "sampled":
        yield from _sampled(source, recipe, corpus_dir, cache_dir, say)
        return
    if source.kind == "plain":
        raw = [_read_gzip(corpus_dir / source.file)]
    else:
        raw = [str(row["text"]) for row in _json_lines(corpus_dir / source.file, source)]
    for text in raw:
        yield from sections(clean(text), source.section_chars)


def _sampled(
    source: Source, recipe: LmRecipe, corpus_dir: Path, cache_dir: Path, say: Callable[[str], None]
) -> list[str]:
    kept = cache_dir / f"{source.name}.json"
    if kept.is_file():
        return json.loads(kept.read_text(encoding="utf-8"))
    checkpoint = corpus_dir / source.file
    tokenizer = checkpoint.parent / "tok512.bin"
    for path in (checkpoint, tokenizer):
        if not path.is_file():
            raise CorpusError(f"source {source.name} needs {path}, which does not exist")
    say(f"  {source.name}: sampling {source.max_documents:,} stories from {checkpoint.name}")
    stories = sample_stories(checkpoint, tokenizer, source.max_documents, recipe.seed)
    cache_dir.mkdir(parents=True, exist_ok=True)
    kept.write_text(json.dumps(stories), encoding="utf-8")
    return stories


def clean(text: str) -> str:
    """Straight quotes, no carriage returns, no trailing blanks, at most one empty line in a row."""
    for old, new in (("\r", ""), ("“", '"'), ("”", '"'), ("‘", "'"), ("’", "'"), ("\u00a0", " ")):
        text = text.replace(old, new)
    text = re.sub(r"[ \t]+\n", "\n", text)
    return re.sub(r"\n{3,}", "\n\n", text).strip()


def sections(text: str, section_chars: int) -> Iterator[str]:
    """The text, or its paragraphs in sections of at least `section_chars` characters (the last: what is left)."""
    if not section_chars or len(text) <= section_chars:
        yield text
        return
    part: list[str] = []
    for paragraph in text.split("\n"):
        part.append(paragraph)
        if sum(len(p) + 1 for p in part) >= section_chars:
            yield "\n".join(part).strip()
            part = []
    if rest := "\n".join(part).strip():
        yield rest


def _json_lines(path: Path, source: Source) -> Iterator[dict[str, Any]]:
    field = "text" if source.kind == "text" else "messages"
    # not splitlines(): JSON strings may hold U+2028 and other line ends of Unicode
    for number, line in enumerate(_read_gzip(path).rstrip("\n").split("\n"), 1):
        try:
            row = json.loads(line)
            row[field]
        except (json.JSONDecodeError, KeyError, TypeError) as error:
            raise CorpusError(f"{path}, line {number}: no JSON object with {field!r} ({error})") from None
        yield row


def _read_gzip(path: Path) -> str:
    try:
        with gzip.open(path, "rt", encoding="utf-8", newline="\n") as file:
            return file.read()
    except FileNotFoundError:
        raise CorpusError(f"{path} does not exist: is --corpus the right directory?") from None
    except (OSError, EOFError, UnicodeDecodeError) as error:
        raise CorpusError(f"{path} cannot be read: {error}") from None


def _calls(turn: dict[str, Any]) -> list[dict[str, Any]]:
    """Tool calls of a turn. Schema-guided dialogues: one `service_call`; Taskmaster 4: a list `api_calls`."""
    return [turn["service_call"]] if "service_call" in turn else list(turn.get("api_calls", ()))


def _tool_schemas(rows: list[dict[str, Any]]) -> dict[str, dict[str, Any]]:
    """One function description per tool name seen, its parameters being the union of the arguments seen."""
    arguments: dict[str, dict[str, str]] = {}
    for row in rows:
        for turn in row["messages"]:
            for call in _calls(turn):
                seen = arguments.setdefault(call["name"], {})
                for key, value in call["arguments"].items():
                    seen[key] = "array" if isinstance(value, list) else "string"
    return {
        name: {
            "type": "function",
            "function": {
                "name": name,
                "description": " ".join(re.findall(r"[A-Z]?[a-z]+", name)).lower().capitalize() + ".",
                "parameters": {"type": "object", "properties": {k: {"type": t} for k, t in sorted(seen.items())}},
            },
        }
        for name, seen in sorted(arguments.items())
    }


def _messages(
    turns: list[dict[str, Any]], tools: dict[str, dict[str, Any]], key: str
) -> tuple[list[dict[str, Any]], list[dict[str, Any]] | None]:
    """Turns in OpenAI's message form, and the tools to describe. Half of the dialogues with calls drop them."""
    names = sorted({call["name"] for turn in turns for call in _calls(turn)})
    with_calls = bool(names) and chance("calls", key) < 0.5
    messages: list[dict[str, Any]] = []
    for turn in turns:
        plain = {"role": turn["role"], "content": turn["content"]}
        if not with_calls or not _calls(turn):
            messages.append(plain)
            continue
        if turn["role"] == "user":  # the calls follow what the user asked for
            messages.append(plain)
        messages.append(
            {
                "role": "assistant",
                "content": "",
                "tool_calls": [{"type": "function", "function": c} for c in _calls(turn)],
            }
        )
        messages += [{"role": "tool", "content": '{"status": "success"}'} for _ in _calls(turn)]
        if turn["role"] == "assistant":
            messages.append(plain)
    if not with_calls:
        return messages, None
    others = [name for name in tools if name not in names]
    spare = random.Random(key).sample(others, min(2, len(others)))
    return messages, [tools[name] for name in sorted({*names, *spare})]


def _chat_document(
    renderer: ChatRenderer,
    messages: list[dict[str, Any]],
    tools: list[dict[str, Any]] | None,
    held_out: bool,
    source: str,
) -> Document:
    """Render one chat. One in six gets a system prompt; system turns carry no loss."""
    key = json.dumps(messages, ensure_ascii=False)
    draw = chance("system", source, key)
    if draw < 1 / 6:
        prompt = SYSTEM_PROMPTS[int(draw * 6 * len(SYSTEM_PROMPTS))]
        messages = [{"role": "system", "content": prompt}, *messages]
    messages = [{**m, "content": clean(m["content"])} for m in messages]
    text = renderer.render(messages, tools).rstrip("\n")
    silent = 0
    if text.startswith("<|im_start|>system"):
        silent = text.index("<|im_end|>") + len("<|im_end|>")
    return Document(text, held_out, True, silent)


def _pairs(path: Path) -> Iterator[list[dict[str, Any]]]:
    """Every question of a group with every answer of the group, from {"groups": [{"user": [], "assistant": []}]}."""
    for group in json.loads(path.read_text(encoding="utf-8"))["groups"]:
        for question in group["user"]:
            for answer in group["assistant"]:
                yield [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]


def vocabulary_texts(recipe: LmRecipe, documents: dict[str, list[Document]]) -> Iterator[str]:
    """What the tokenizer is trained on: the training side of each source, thinned to its `vocab_share`."""
    for source in recipe.sources:
        for document in documents[source.name]:
            if not document.held_out and chance("vocabulary", document.text) < source.vocab_share:
                yield document.text.replace(END_OF_TEXT, "")
