"""Values as people write them."""

from __future__ import annotations

from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from penstock.config.schema import settings
from penstock.config.values import ConfigError, format_bytes, parse_size, parse_value

KNOWN = settings()


def parsed(name: str, raw: Any) -> Any:
    return parse_value(KNOWN[name], raw, KNOWN[name].flag)


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("0", 0),
        ("2048", 2048),
        ("1_000", 1000),
        ("32k", 32_000),
        ("32K", 32_768),
        ("25.6k", 25_600),
        ("512M", 512 << 20),
        ("512m", 512_000_000),
        ("4G", 4 << 30),
        ("4GiB", 4 << 30),
        ("4 GiB", 4 << 30),
        ("4GB", 4_000_000_000),
        ("1.5K", 1536),
        ("1e3", 1000),
        ("2T", 2 << 40),
    ],
)
def test_sizes_read_as_vllm_reads_them(text: str, value: int) -> None:
    assert parse_size(text) == value


@pytest.mark.parametrize("text", ["", "x", "4Q", "1.5", "0.3K", "4iB", "--4", "1e400", "nan", "4 G G"])
def test_what_is_no_size_is_refused(text: str) -> None:
    with pytest.raises(ValueError):
        parse_size(text)


@given(st.integers(0, 1 << 62))
def test_a_written_number_reads_back(number: int) -> None:
    assert parse_size(str(number)) == number
    assert parse_size(f"{number}K") == number * 1024


@given(st.text(max_size=20), st.sampled_from(sorted(KNOWN)))
def test_any_text_gives_a_value_in_range_or_a_config_error_with_the_flag(text: str, name: str) -> None:
    setting = KNOWN[name]
    try:
        value = parse_value(setting, text, setting.flag)
    except ConfigError as error:
        assert str(error).startswith(setting.flag + ": ")
        assert "\n" not in str(error)
        return
    if setting.kind in ("int", "float") and value is not None:
        assert value >= setting.extra.get("low", value)
        assert value <= setting.extra.get("high", value)
    if "choices" in setting.extra:
        assert value in setting.extra["choices"]
    # What YAML or Python gives for the same value is accepted, and is the same value.
    assert parse_value(setting, value, setting.flag) == value


def test_booleans_lists_and_switches() -> None:
    assert parsed("enable_prefix_caching", "off") is False
    assert parsed("enable_prefix_caching", True) is True
    assert parsed("api_key", "a, b") == ("a", "b")
    assert parsed("api_key", '["a,b", "c"]') == ("a,b", "c")
    assert parsed("api_key", ["a", "b"]) == ("a", "b")
    assert parsed("async_scheduling", True) == "on"
    assert parsed("async_scheduling", False) == "off"
    assert parsed("dtype", "bf16") == "bfloat16"
    assert parsed("max_model_len", "auto") is None
    assert parsed("max_model_len", -1) is None
    assert parsed("request_timeout_s", "none") is None
    assert parsed("port", None) == 8000


@pytest.mark.parametrize(
    ("name", "raw", "says"),
    [
        ("port", "70000", "--port: 70000 is not a whole number from 0 to 65535"),
        ("port", "http", "--port: 'http' is not a whole number from 0 to 65535"),
        ("port", True, "--port: True is not a whole number"),
        ("port", 1.5, "--port: 1.5 is not a whole number"),
        ("gpu_memory_utilization", "0", "a number above 0, at most 1"),
        ("gpu_memory_utilization", "nan", "is not a number above 0"),
        ("dtype", "float61", "did you mean float16?"),
        ("kv_cache_memory_bytes", "big", "a size such as 512M or 4GiB"),
        ("enable_prefix_caching", "maybe", "true or false"),
        ("api_key", {"a": 1}, "the value given is not a list"),
        ("api_key", "[1]", "the value given is not a list"),
        ("host", ["a"], "is not a text"),
    ],
)
def test_errors_name_flag_value_and_what_would_be_right(name: str, raw: Any, says: str) -> None:
    with pytest.raises(ConfigError) as caught:
        parsed(name, raw)
    assert says in str(caught.value)


def test_bytes_for_people() -> None:
    assert [format_bytes(n) for n in (0, 1023, 1536, 5 << 20, 3 << 30, 5 << 40)] == [
        "0 B",
        "1023 B",
        "1.5 KiB",
        "5 MiB",
        "3 GiB",
        "5 TiB",
    ]
