"""A router of its own: the engines' tokenizer where it is at hand, the dispatcher, HTTP. Imports no torch."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

from penstock.cluster.dispatcher import Dispatcher
from penstock.config.load import model_directory
from penstock.config.model import load_model_config
from penstock.config.route import RouteOptions
from penstock.config.schema import Config
from penstock.core.route_modes import ModeLimits
from penstock.engine.tokenizer import load_tokenizer
from penstock.server.port import listening_socket
from penstock.server.route_prompts import Prompts
from penstock.server.route_serve import run_router
from penstock.server.serve import served_model
from penstock.server.state import Served


def route(
    config: Config,
    options: RouteOptions,
    knows_model: bool,
    on_ready: Callable[[RouteOptions, str, bool], None] | None = None,
) -> int:
    """Route until a signal; the exit code. `knows_model`: the engines' model is `config.model.model`.

    Without it events are of no use: they speak of tokens. Raises ConfigError, and what loading a tokenizer raises.
    """
    sock = listening_socket(config.server)
    try:
        prompts = Prompts(_served(config) if knows_model else None)
    except BaseException:
        sock.close()
        raise
    cluster = config.cluster
    limits = ModeLimits(
        max_output_on_p=cluster.pd_max_short_output,
        max_total_on_p=ModeLimits().max_total_on_p if cluster.pd_max_short_output else 0,
        max_new_on_d=cluster.pd_min_tokens,
    )
    dispatcher = Dispatcher(
        {each.name: each.role for each in options.engines},
        prefill=cluster.route_policy,
        decode=cluster.decode_policy,
        limits=limits,
        publishes={each.name for each in options.engines if each.events} if knows_model else set(),
        block_size=options.block_size,
        lasts_s=options.approximate_ttl_s,
        seed=sock.getsockname()[1],  # routers that serve the same engines break ties in their own ways
    )
    tell = None if on_ready is None else partial(_tell, on_ready, options, knows_model)
    return run_router(config.server, options, dispatcher, prompts, sock, tell)


def _tell(on_ready: Callable[[RouteOptions, str, bool], None], options: RouteOptions, knows: bool, url: str) -> None:
    on_ready(options, url, knows)


def _served(config: Config) -> Served:
    directory = model_directory(config.model.model)
    tokenizer = load_tokenizer(model_directory(config.model.tokenizer) if config.model.tokenizer else directory)
    return served_model(config, directory, tokenizer, load_model_config(directory).vocab_size)
