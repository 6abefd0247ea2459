"""`penstock chat`: a conversation with a running server, streamed into the terminal.

Works with any OpenAI-compatible server. Keeps the conversation; knows no model.
"""

from __future__ import annotations

import contextlib
import sys
import time
from typing import Any

from penstock.commands.arguments import parse_or_help
from penstock.commands.openai_http import OpenAIServer, ServerError
from penstock.config.flags import FlagParser
from penstock.config.load import first_api_key

HELP = """  /system TEXT   set the system message and start again
  /reset         forget the conversation
  /facts         numbers of the last answer
  /help          this
  /exit          leave (also Ctrl-D); Ctrl-C stops an answer"""


def main(arguments: list[str]) -> int:
    """Talk until the input ends. With input from a pipe, each line is one message."""
    parser = FlagParser(prog="penstock chat", description="Talk to a running server in the terminal.")
    parser.add_argument("--url", default="http://127.0.0.1:8000", help="the server [http://127.0.0.1:8000]")
    parser.add_argument("--api-key", default=None, metavar="KEY", help="its key; default: PENSTOCK_API_KEY")
    parser.add_argument("--model", default=None, help="which of its models; default: the first")
    parser.add_argument("--system", default=None, metavar="TEXT", help="system message")
    parser.add_argument("--max-tokens", type=int, default=None, metavar="N", help="longest answer in tokens")
    parser.add_argument("--temperature", type=float, default=None, metavar="X", help="0: always the likeliest token")
    parser.add_argument("--seed", type=int, default=None, metavar="N", help="for answers that can be repeated")
    parser.add_argument("message", nargs="*", help="one message: answer it and leave")
    parsed = parse_or_help(parser, arguments)
    if parsed is None:
        return 0
    server = OpenAIServer(parsed.url, parsed.api_key or first_api_key())
    options = {
        name: value for name in ("max_tokens", "temperature", "seed") if (value := getattr(parsed, name)) is not None
    }
    chat = Conversation(server, parsed.model or server.model(), parsed.system, options)
    if parsed.message:
        chat.say(" ".join(parsed.message))
        return 0
    return _talk(chat)


class Conversation:
    """Messages so far. `say` sends one, prints the answer as it comes and remembers it."""

    def __init__(self, server: OpenAIServer, model: str, system: str | None, options: dict[str, Any]) -> None:
        self.server, self.model, self.options = server, model, options
        self.facts = "no answer yet"
        self.messages: list[dict[str, str]] = []
        self.start(system)

    def start(self, system: str | None) -> None:
        self.system = system
        self.messages = [{"role": "system", "content": system}] if system else []

    def say(self, text: str) -> None:
        """Raises ServerError; the message is not kept then. Ctrl-C ends the answer and keeps what came of it."""
        self.messages.append({"role": "user", "content": text})
        body = {
            "model": self.model,
            "messages": self.messages,
            "stream_options": {"include_usage": True},
            **self.options,
        }
        pieces: list[str] = []
        usage: dict[str, Any] = {}
        started = time.perf_counter()
        first_s = 0.0
        events = self.server.stream("/v1/chat/completions", body)
        try:
            with contextlib.closing(events):
                for event in events:
                    usage = event.get("usage") or usage
                    for choice in event.get("choices", ()):
                        piece = choice.get("delta", {}).get("content") or ""
                        if piece and not pieces:
                            first_s = time.perf_counter() - started
                        pieces.append(piece)
                        print(piece, end="", flush=True)
        except KeyboardInterrupt:
            print(" [stopped]", end="")
        except ServerError:
            self.messages.pop()
            if pieces:
                print()
            raise
        print()
        self.messages.append({"role": "assistant", "content": "".join(pieces)})
        self.facts = facts(usage, first_s, time.perf_counter() - started)


def facts(usage: dict[str, Any], first_s: float, total_s: float) -> str:
    """Numbers of one answer in one line; `first_s`: until the first text, `total_s`: until the last."""
    num_tokens = usage.get("completion_tokens", 0)
    cached = (usage.get("prompt_tokens_details") or {}).get("cached_tokens") or 0
    line = f"{usage.get('prompt_tokens', 0)} prompt tokens ({cached} cached), {num_tokens} answered"
    line += f", first after {first_s * 1000:.0f} ms"
    if num_tokens > 1 and total_s > first_s:
        line += f", then {(num_tokens - 1) / (total_s - first_s):.0f} tokens/s"
    return line


def _talk(chat: Conversation) -> int:
    by_hand = sys.stdin.isatty()
    if by_hand:
        with contextlib.suppress(ImportError):
            import readline  # noqa: F401  line editing and history for input()

        print(f"{chat.model} at {chat.server.url}. /help lists commands, Ctrl-D leaves.")
    while True:
        try:
            line = input("> " if by_hand else "").strip()
        except EOFError:
            if by_hand:
                print()
            return 0
        except KeyboardInterrupt:
            print()
            return 130
        if not line:
            continue
        if line.startswith("/"):
            if not _command(chat, line):
                return 0
            continue
        try:
            chat.say(line)
        except ServerError as error:
            print(f"penstock: {error}", file=sys.stderr)
            if not by_hand:
                return 1


def _command(chat: Conversation, line: str) -> bool:
    """Do what a line with a slash says; False to leave."""
    word, _, rest = line.partition(" ")
    if word in ("/exit", "/quit", "/q"):
        return False
    if word == "/reset":
        chat.start(chat.system)
        print("  forgotten")
    elif word == "/system":
        chat.start(rest.strip() or None)
        print("  started again" + (" with this system message" if rest.strip() else ""))
    elif word == "/facts":
        print("  " + chat.facts)
    else:
        print(HELP)
    return True
