"""Flags and help generated from the schema."""

from __future__ import annotations

from typing import Any

import pytest

from penstock.config.flags import FlagParser, HelpRequested, given_settings
from penstock.config.load import resolve
from penstock.config.schema import SECTIONS, Config, settings
from penstock.config.values import ConfigError


def parser() -> FlagParser:
    made = FlagParser(prog="penstock serve", sections=tuple(SECTIONS))
    made.add_argument("model_given", nargs="?", help="model directory")
    return made


def config(*arguments: str) -> Config:
    parsed = parser().parse(arguments)
    return resolve(given_settings(parsed), foreign=parsed.foreign, environ={})


def test_every_setting_has_a_flag_with_dashes_or_underscores() -> None:
    samples = {"str": "text", "int": "16", "float": "0.5", "bool": "", "list": "a"}
    for name, item in settings().items():
        value = item.extra["choices"][-1] if "choices" in item.extra else samples[item.kind]
        if item.extra.get("low", 0) > 16:
            value = str(item.extra["low"])
        more = ["--ssl-keyfile", "k", "--ssl-certfile", "c"] if name.startswith("ssl") else []
        more += ["--max-num-seqs", "1"] if name == "max_num_batched_tokens" else []
        results = []
        for flag in (item.flag, "--" + name, *item.extra.get("aliases", ())):
            made = config(*more, flag, *([value] if value else []))
            assert made.origins[name][0] == "flag"
            results.append(getattr(made, item.section))
        assert all(result == results[0] for result in results)


@pytest.mark.parametrize(
    ("arguments", "section", "name", "value"),
    [
        (["--max_model_len=32k"], "model", "max_model_len", 32000),
        (["--max-model-len", "-1"], "model", "max_model_len", None),
        (["--no-enable-prefix-caching"], "cache", "enable_prefix_caching", False),
        (["--disable-radix-cache"], "cache", "enable_prefix_caching", False),
        (["--api-key", "a", "b", "--api-key", "c"], "server", "api_key", ("a", "b", "c")),
        (["--allowed-origins", '["http://a"]'], "server", "allowed_origins", ("http://a",)),
        (["--async-scheduling"], "scheduler", "async_scheduling", "on"),
        (["--async-scheduling", "auto"], "scheduler", "async_scheduling", "auto"),
        (["--no-async-scheduling"], "scheduler", "async_scheduling", "off"),
        (["--mem-fraction-static", "0.5"], "cache", "gpu_memory_utilization", 0.5),
        (["--context-length", "64"], "model", "max_model_len", 64),
    ],
)
def test_forms_that_users_write(arguments: list[str], section: str, name: str, value: Any) -> None:
    assert getattr(getattr(config(*arguments), section), name) == value


def test_a_bare_flag_leaves_the_model_after_it_alone() -> None:
    for flag in ("--async-scheduling", "--trust-remote-code", "--enforce-eager", "--enable-prefix-caching"):
        assert parser().parse([flag, "my-model"]).model_given == "my-model"


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (["--max-num-seq", "3"], "unknown flag --max-num-seq; did you mean --max-num-seqs?"),
        (["--prot=3"], "unknown flag --prot; did you mean --port?"),
        (["--port"], "--port: expected one argument"),
        (["a", "b"], "unexpected argument 'b'"),
        (["-tp", "2"], "-tp: not supported yet: this version runs one rank on one machine (accepted: 1)"),
        (["--tensor-parallel-size=4"], "not supported yet"),
        (["--quantization", "awq"], "none, int8, w8a8, int4, w4a8"),
        (["--speculative-config", '{"method": "ngram"}'], "does not speculate"),
        (["--enable-lora"], "--enable-lora: not supported yet"),
        (["--kv-transfer-config", "{}x"], "--pd 1P1D starts prefill and decode engines"),
        (["--no-enable-chunked-prefill"], "always computed in chunks"),
    ],
)
def test_errors_are_one_line_that_helps(arguments: list[str], says: str) -> None:
    with pytest.raises(ConfigError) as caught:
        config(*arguments)
    assert says in str(caught.value)
    assert "\n" not in str(caught.value)


def test_flags_that_ask_for_what_is_so_anyway_are_accepted() -> None:
    made = config("-tp", "1", "--quantization", "none", "--enable-chunked-prefill", "--pp-size", "1", "--enforce-eager")
    assert made.warnings == ("--enforce-eager changes nothing: no graphs are used",)


def test_help_shows_headlines_all_or_what_was_asked_for() -> None:
    made = parser()
    short, full, found = made.help_text(), made.help_text("all"), made.help_text("kv")
    headline = [item for item in settings().values() if item.extra.get("headline")]
    assert 20 <= len(headline) <= 30
    for item in settings().values():
        assert (item.flag + " " in short or item.flag + "," in short) == bool(item.extra.get("headline"))
        assert item.flag in full
    assert "--kv-cache-memory-bytes" in found
    assert "--kv-transfer-config" in found
    assert "--port" not in found
    assert "has to do with 'xyzzy'" in made.help_text("xyzzy")
    assert max(len(line) for line in full.splitlines()) <= 200


@pytest.mark.parametrize(
    ("arguments", "topic"),
    [(["--help"], ""), (["-h"], ""), (["--help=all"], "all"), (["--help", "cache"], "cache"), (["m", "--help"], "")],
)
def test_help_is_asked_for_in_any_place(arguments: list[str], topic: str) -> None:
    with pytest.raises(HelpRequested) as caught:
        parser().parse(arguments)
    assert caught.value.topic == topic
