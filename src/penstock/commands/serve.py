"""`penstock serve`: settle the configuration, hand it to the builder, tell people what is going on.

What the command line alone can tell to be wrong is refused here, before anything is loaded. Knows no model and no HTTP.
"""

from __future__ import annotations

import importlib
import json
import time
from functools import partial
from typing import Any

from penstock.commands.arguments import add_model, config_from, parse_or_help
from penstock.config.flags import FlagParser
from penstock.config.load import model_directory, print_config
from penstock.config.log import set_up_logging
from penstock.config.schema import SECTIONS, Config


def main(arguments: list[str]) -> int:
    """Serve until SIGTERM or Ctrl-C; the exit code is the server's."""
    started_s = time.monotonic()
    parser = FlagParser(
        prog="penstock serve",
        description="Start an OpenAI-compatible server on a model.",
        sections=tuple(SECTIONS),
    )
    add_model(parser)
    parsed = parse_or_help(parser, arguments)
    if parsed is None:
        return 0
    config = config_from(parsed)
    model_directory(config.model.model)
    set_up_logging(config.runtime.log_level)
    serve = importlib.import_module("penstock.build.serve").serve
    on_ready = partial(tell_ready, config, started_s)
    return int(serve(config, on_resolved=tell_plan, on_ready=on_ready))


def tell_plan(resolved: Any) -> None:
    """The completed configuration with origins, and where the memory goes."""
    print(f"penstock serve {resolved.config.model.model}")
    print_config(resolved.config)
    print(f"memory\n{resolved.memory.table()}\nloading ...", flush=True)


def tell_ready(config: Config, started_s: float, ready: Any, url: str) -> None:
    """The server takes requests."""
    print(ready_text(config, ready, url, time.monotonic() - started_s), flush=True)


def ready_text(config: Config, ready: Any, url: str, total_s: float) -> str:
    """Where the start's seconds went, the address, and a request to paste. `ready`: the engine's Ready message."""
    rows = [(name, seconds) for name, seconds in ready.timeline if seconds >= 0.005]
    rest = total_s - sum(seconds for _, seconds in ready.timeline)
    rows.append(("front end and waiting", max(rest, 0.0)))
    timeline = ", ".join(f"{name} {seconds:.2f} s" for name, seconds in rows)
    chats = can_chat(config)
    body: dict[str, Any] = {"model": ready.model_id}
    if chats:
        body["messages"] = [{"role": "user", "content": "Hello! Who are you?"}]
    else:
        body |= {"prompt": "Once upon a time", "max_tokens": 64}
    path = "chat/completions" if chats else "completions"
    key = ' -H "authorization: Bearer $PENSTOCK_API_KEY"' if config.server.api_key else ""
    browser = "in a browser: chat and live view" if chats else "in a browser: live view"
    return (
        f"ready after {total_s:.1f} s: {timeline}\n\n"
        f"  {ready.model_id} at {url}   ({browser}; for clients: {url}/v1)\n"
        f"  on {ready.device}\n\n"
        f"  curl {url}/v1/{path} -H 'content-type: application/json'{key} \\\n    -d '{json.dumps(body)}'\n\n"
        + (f"  penstock chat --url {url}\n\n" if chats else "")
        + "Ctrl-C finishes running requests and stops; once more stops at once."
    )


def can_chat(config: Config) -> bool:
    """The model has a chat template, as far as its files show."""
    if config.model.chat_template is not None:
        return True
    directory = model_directory(config.model.tokenizer or config.model.model)
    if (directory / "chat_template.jinja").is_file() or (directory / "chat_template.json").is_file():
        return True
    try:
        return '"chat_template"' in (directory / "tokenizer_config.json").read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError):
        return False
