"""What do tokens cost in text: detokenising per token, stop strings, and chat templates per request?

Takes a tokenizer directory and a text file. Each method is checked against `decode` of the whole before it is timed;
the peer is the `tokenizers` library's own DecodeStream (what vLLM uses). For templates: the directory's own, or
ChatML; a round trip through the worker process beside Jinja in this process, and the start of a worker.
Prints one JSON line per figure: the best of --repeats runs, on one thread.
"""

from __future__ import annotations

import argparse
import json
import platform
import time
from collections.abc import Callable
from pathlib import Path

import jinja2.sandbox
import tokenizers
from tokenizers.decoders import DecodeStream

from penstock.core.request import SamplingParams
from penstock.engine.text import OutputText, WindowDetokenizer, detokenizer
from penstock.engine.tokenizer import Tokenizer, load_tokenizer
from penstock.server.chat import ChatRenderer, Conversation

CHATML = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}<|im_start|>assistant\n"
)
MACHINE = f"{platform.machine()}, Python {platform.python_version()}, tokenizers {tokenizers.__version__}"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("tokenizer", type=Path, help="checkpoint directory")
    parser.add_argument("text", type=Path, help="a text file in UTF-8")
    parser.add_argument("--max-tokens", type=int, default=20_000)
    parser.add_argument("--repeats", type=int, default=5)
    args = parser.parse_args()
    tokenizer = load_tokenizer(args.tokenizer)
    ids = tokenizer.encode(args.text.read_text(encoding="utf-8"), add_special_tokens=False)[: args.max_tokens]
    for name, make in methods(tokenizer).items():
        assert make()(ids) == tokenizer.decode(ids), name
        seconds = best(args.repeats, lambda make=make: make()(ids))
        report(name, us_per_token=round(seconds / len(ids) * 1e6, 3), num_tokens=len(ids), decoding=tokenizer.decoding)

    template = tokenizer.chat_templates.get("default", CHATML)
    messages = [{"role": "user", "content": "Tell me a story about a cat."}]
    began = time.perf_counter()
    renderer = ChatRenderer({"default": template}, tokenizer.special_tokens)
    renderer.check()
    report("template_check_at_start", ms=round((time.perf_counter() - began) * 1e3, 1))
    conversation = Conversation(messages)
    seconds = best(args.repeats * 100, lambda: renderer.render_sync(conversation))
    report("template_round_trip", ms=round(seconds * 1e3, 3))
    renderer.close()
    inside = jinja2.sandbox.ImmutableSandboxedEnvironment(trim_blocks=True, lstrip_blocks=True).from_string(CHATML)
    report("chatml_in_process", ms=round(best(args.repeats * 100, lambda: inside.render(messages=messages)) * 1e3, 3))


def methods(tokenizer: Tokenizer) -> dict[str, Callable[[], Callable[[list[int]], str]]]:
    """Name -> a factory of a fresh function that turns ids into text, one token at a time."""

    def one_by_one(feed: Callable[[list[int]], str], end: Callable[[], str]) -> Callable[[list[int]], str]:
        return lambda ids: "".join([feed([token_id]) for token_id in ids]) + end()

    def penstock() -> Callable[[list[int]], str]:
        stream = detokenizer(tokenizer)
        return one_by_one(stream.feed, stream.finish)

    def window() -> Callable[[list[int]], str]:
        stream = WindowDetokenizer(tokenizer)
        return one_by_one(stream.feed, stream.finish)

    def with_stop() -> Callable[[list[int]], str]:
        text = OutputText(tokenizer, [], SamplingParams(stop=("\n\nHuman:", "<|never|>")))
        return one_by_one(text.feed, lambda: text.close([], "length"))

    def library() -> Callable[[list[int]], str]:
        stream = DecodeStream(skip_special_tokens=True)
        step, inner = stream.step, tokenizer._library
        return lambda ids: "".join([step(inner, token_id) or "" for token_id in ids])

    return {
        "penstock": penstock,
        "penstock_with_2_stop_strings": with_stop,
        "penstock_general": window,
        "tokenizers_DecodeStream": library,
    }


def best(repeats: int, run: Callable[[], object]) -> float:
    """Seconds of the fastest run, after one that does not count."""
    run()
    times = []
    for _ in range(repeats):
        began = time.perf_counter()
        run()
        times.append(time.perf_counter() - began)
    return min(times)


def report(name: str, **figures: object) -> None:
    print(json.dumps({"name": name, **figures, "machine": MACHINE}))


if __name__ == "__main__":
    main()
