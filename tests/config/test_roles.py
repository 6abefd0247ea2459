"""Roles of engines: written short, as JSON, in a file; and what cannot be is refused with what would be right."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from penstock.config.load import resolve
from penstock.config.roles import PER_ROLE, RoleGroup, parse_roles, role_groups
from penstock.config.schema import settings
from penstock.config.values import ConfigError

YAML = """
prefill: {engines: 2, max-num-batched-tokens: 8k, num_threads: 4}
decode:
  max_num_seqs: 512
  kv_cache_memory_bytes: 16G
"""


def test_short() -> None:
    assert parse_roles(" 2p1D ") == [
        RoleGroup("prefill", ("prefill-0", "prefill-1"), {}),
        RoleGroup("decode", ("decode-0",), {}),
    ]


def test_a_file_says_what_each_role_is_set_to(tmp_path: Path) -> None:
    path = tmp_path / "roles.yaml"
    path.write_text(YAML)
    prefill, decode = parse_roles(str(path))
    assert prefill.names == ("prefill-0", "prefill-1")
    assert prefill.settings == {"max_num_batched_tokens": 8000, "num_threads": 4}
    assert decode.names == ("decode-0",)
    config = resolve({"pd": str(path), "max_num_batched_tokens": 1024, "max_num_seqs": 64}, environ={})
    ours = prefill.apply(config)
    assert ours.scheduler.max_num_batched_tokens == 8000 and ours.scheduler.max_num_seqs == 64
    assert ours.runtime.num_threads == 4 and ours.origins["num_threads"] == ("flag", "--pd: prefill")
    theirs = decode.apply(config)
    assert theirs.scheduler.max_num_batched_tokens == 1024 and theirs.scheduler.max_num_seqs == 512
    assert theirs.cache.kv_cache_memory_bytes == 16 << 30 and theirs.runtime.num_threads is None


def test_a_configuration_file_may_hold_the_mapping_itself(tmp_path: Path) -> None:
    path = tmp_path / "serve.yaml"
    path.write_text("pd:\n  prefill: 3\n  decode: {engines: 2}\n")
    config = resolve(config_file=path, environ={})
    assert json.loads(config.cluster.pd or "") == {"prefill": 3, "decode": {"engines": 2}}
    assert [len(group.names) for group in role_groups(config.cluster)] == [3, 2]


def test_without_roles_engines_do_both() -> None:
    assert role_groups(resolve({"data_parallel_size": 2}, environ={}).cluster) == [
        RoleGroup("both", ("engine-0", "engine-1"), {})
    ]
    with pytest.raises(ConfigError, match="some of each"):
        role_groups(resolve({"data_parallel_size": 2, "pd": "1P1D"}, environ={}).cluster)


def test_a_small_step_bounds_the_rows_unless_they_were_asked_for() -> None:
    config = resolve({}, environ={})
    (prefill, _) = parse_roles('{"prefill": {"max_num_batched_tokens": 128}, "decode": 1}')
    assert prefill.apply(config).scheduler.max_num_seqs == 128
    with pytest.raises(ConfigError, match=r"prefill.*256 requests need"):
        prefill.apply(resolve({"max_num_seqs": 256}, environ={}))


def test_every_setting_of_a_role_is_one() -> None:
    assert set(PER_ROLE) <= set(settings())


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("1P", "not of the form 1P1D"),
        ("0P1D", "between 1 and 64"),
        ("1P65D", "between 1 and 64"),
        ("{", "not JSON"),
        ("missing.yaml", "cannot read missing.yaml"),
        ('{"prefill": 1}', "decode: a number of engines"),
        ('{"prefill": 1, "decode": true}', "decode: a number of engines"),
        ('{"prefill": 1, "decode": 0}', "decode: between 1 and 64"),
        ('{"prefil": 1, "decode": 1}', "did you mean prefill"),
        ('{"prefill": {"block_size": 16}, "decode": 1}', "block_size' is the same for all engines"),
        ('{"prefill": {"num_thread": 2}, "decode": 1}', "did you mean num_threads"),
        ('{"prefill": {"num_threads": 0}, "decode": 1}', "prefill: num_threads: 0 is not"),
    ],
)
def test_what_cannot_be_is_refused(text: str, words: str) -> None:
    with pytest.raises(ConfigError, match="--pd") as caught:
        parse_roles(text)
    assert words in str(caught.value)
