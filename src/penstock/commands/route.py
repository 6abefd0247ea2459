"""`penstock route`: a router in front of servers on this machine or others. Settles what is asked; knows no HTTP."""

from __future__ import annotations

import importlib

from penstock.commands.arguments import parse_or_help
from penstock.config.flags import FlagParser, given_settings
from penstock.config.load import resolve
from penstock.config.log import set_up_logging
from penstock.config.route import RouteOptions, engine_addresses
from penstock.config.schema import settings
from penstock.config.values import ConfigError, parse_value

OF_SERVER = (
    "host", "port", "api_key", "allowed_origins", "allow_credentials", "root_path", "ssl_keyfile", "ssl_certfile",
    "max_body_bytes", "shutdown_timeout",
)  # fmt: skip
OF_MODEL = ("model", "tokenizer", "chat_template")
OF_CLUSTER = ("route_policy", "decode_policy", "pd_min_tokens", "pd_max_short_output")


def main(arguments: list[str]) -> int:
    """Route until SIGTERM or Ctrl-C; the exit code."""
    parsed = parse_or_help(_parser(), arguments)
    if parsed is None:
        return 0
    given = given_settings(parsed)
    engines = engine_addresses(parsed.engine, parsed.prefill, parsed.decode)
    config = resolve(given, config_file=parsed.config_file)
    options = RouteOptions(
        engines,
        parsed.engine_api_key,
        _seconds(parsed.health_interval, "--health-interval"),
        _seconds(parsed.approximate_ttl, "--approximate-ttl"),
        None
        if parsed.block_size is None
        else int(parse_value(settings()["block_size"], parsed.block_size, "--block-size")),
    )
    set_up_logging(config.runtime.log_level)
    knows_model = config.origins["model"][0] != "default"
    return int(importlib.import_module("penstock.build.route").route(config, options, knows_model, tell_ready))


def _parser() -> FlagParser:
    parser = FlagParser(
        prog="penstock route",
        description="Route OpenAI-compatible requests to servers: by predicted time, with what their caches hold.",
    )
    parser.add_argument("--config", dest="config_file", default=None, metavar="FILE", help="settings from a YAML file")
    for flag, text in (
        (
            "--engine",
            "a server that does both phases: URL[,events=tcp://...][,replay=tcp://...][,topic=...]; repeat it",
        ),
        ("--prefill", "a server that computes prompts for others, likewise"),
        ("--decode", "a server that makes answers from them, likewise"),
    ):
        parser.add_argument(flag, action="append", default=[], metavar="URL", help=text)
    parser.take(*OF_SERVER, *OF_MODEL, *OF_CLUSTER, "log_level")
    parser.add_argument(
        "--engine-api-key", default=None, metavar="KEY", help="sent to engines; else the client's own is"
    )
    parser.add_argument("--health-interval", default="1", metavar="SECONDS", help="between two looks at an engine [1]")
    parser.add_argument(
        "--approximate-ttl", default="120", metavar="SECONDS",
        help="an engine without events is believed to hold a prompt for so long after it was sent there [120]",
    )  # fmt: skip
    parser.add_argument(
        "--block-size",
        default=None,
        metavar="TOKENS",
        help="of the engines' KV blocks; default: what the first one says",
    )
    return parser


def _seconds(text: str, flag: str) -> float:
    try:
        seconds = float(text)
    except ValueError:
        seconds = -1.0
    if not 0 < seconds < 1e6:
        raise ConfigError(f"{text} is not a number of seconds above 0", flag)
    return seconds


def tell_ready(options: RouteOptions, url: str, knows_model: bool) -> None:
    """The router takes requests; whether engines are there, its log says."""
    how = (
        "by token ids" if knows_model else "by text; --model DIR would let it count in tokens and hear engines' events"
    )
    lines = [f"penstock route: {len(options.engines)} engines, prompts told apart {how}"]
    lines += [f"  {each.role:<8} {each.url}" for each in options.engines]
    print(
        "\n".join([*lines, f"\n  listening at {url}   (for clients: {url}/v1; decisions: {url}/routes/recent)"]),
        flush=True,
    )
