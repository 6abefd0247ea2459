"""What `penstock route` and servers of one cluster are told: read, or refused with the reason."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from penstock.config.cluster import check_cluster
from penstock.config.fingerprint import model_fingerprint
from penstock.config.kv_events import EventSettings, event_settings
from penstock.config.load import resolve
from penstock.config.route import EngineAddress, engine_addresses
from penstock.config.values import ConfigError

EVENTS = '{"enable_kv_cache_events": true, "publisher": "zmq", "endpoint": "tcp://127.0.0.1:5557", "topic": "kv"}'


def test_engines_are_named_by_host_and_port() -> None:
    told = "http://gpu-1:8000/v1,events=tcp://gpu-1:5557,replay=tcp://gpu-1:5558,topic=kv"
    one, two, three = engine_addresses([told, "gpu-2:8001", "https://[::1]/x/"])
    assert one == EngineAddress(
        "gpu-1:8000", "http://gpu-1:8000/v1", "both", "tcp://gpu-1:5557", "tcp://gpu-1:5558", "kv"
    )
    assert (two.name, two.url) == ("gpu-2:8001", "http://gpu-2:8001") and three.name == "[::1]:443/x"
    assert [each.role for each in engine_addresses([], ["p:1"], ["d:1", "d:2"])] == ["prefill", "decode", "decode"]


@pytest.mark.parametrize(
    ("both", "prefill", "decode", "said"),
    [
        ([], [], [], "at least one server"),
        (["a:1"], ["b:1"], ["c:1"], "not some of each"),
        ([], ["b:1"], [], "--decode"),
        ([], [], ["b:1"], "--prefill"),
        (["a:1", "http://a:1"], [], [], "twice"),
        (["http://a:99999"], [], [], "port"),
        (["ftp://a"], [], [], "not an address"),
        (["a:1,event=tcp://a:2"], [], [], "did you mean events"),
        (["a:1,events=a:2"], [], [], "no address such as tcp://"),
        (["a:1,replay=tcp://a:2"], [], [], "events=tcp://..., which is missing"),
    ],
)
def test_engines_that_cannot_be(both: list[str], prefill: list[str], decode: list[str], said: str) -> None:
    with pytest.raises(ConfigError, match=said):
        engine_addresses(both, prefill, decode)


def test_vllms_event_settings() -> None:
    assert event_settings(EVENTS) == EventSettings(True, "zmq", "tcp://127.0.0.1:5557", topic="kv")
    assert event_settings(None) is None and event_settings("{}") is None
    assert event_settings('{"enable_kv_cache_events": true, "publisher": "null"}') is None
    assert event_settings('{"enable_kv_cache_events": true, "replay_endpoint": null}') == EventSettings(True)


@pytest.mark.parametrize(
    ("given", "said"),
    [
        ("{", "not JSON"),
        ("[]", "an object"),
        ({"endpoints": "tcp://*:1"}, "did you mean endpoint"),
        ({"enable_kv_cache_events": "yes"}, "is no bool"),
        ({"endpoint": "5557"}, "no address"),
        ({"publisher": "kafka"}, "neither zmq nor null"),
        ({"buffer_steps": 0}, "at least 1"),
    ],
)
def test_event_settings_that_are_wrong(given: object, said: str) -> None:
    text = given if isinstance(given, str) else json.dumps(given)
    with pytest.raises(ConfigError, match=f"--kv-events-config: .*{said}"):
        check_cluster(resolve({"kv_events_config": text}, environ={}).cluster)


@pytest.mark.parametrize(
    ("given", "said"),
    [
        ({"kv_role": "both"}, "same --cluster-secret"),
        ({"kv_role": "both", "cluster_secret": "s", "cluster_host": "0.0.0.0"}, "--cluster-host: .*name one address"),
        ({"kv_role": "both", "cluster_secret": "s", "kv_link": "shm"}, "--kv-link"),
        ({"pd": "1P1D", "cluster_secret": " "}, "--cluster-secret: it is empty"),
        ({"kv_role": "both", "cluster_secret": "s", "pd": "1P1D"}, "--kv-role with --pd"),
        ({"kv_events_config": EVENTS, "data_parallel_size": 2}, "--kv-events-config with"),
    ],
)
def test_servers_of_a_cluster_that_cannot_be(given: dict[str, object], said: str) -> None:
    with pytest.raises(ConfigError, match=said):
        check_cluster(resolve(given, environ={}).cluster)


def test_vllms_role_names() -> None:
    config = resolve({"kv_role": "kv_producer", "cluster_secret": "s"}, environ={})
    assert config.cluster.kv_role == "prefill"


def test_a_fingerprint_is_of_what_computes(tmp_path: Path) -> None:
    def make(name: str, weights: bytes) -> Path:
        (tmp_path / name).mkdir()
        (tmp_path / name / "config.json").write_text("{}")
        (tmp_path / name / "model.safetensors").write_bytes(weights)
        return tmp_path / name

    one, same, other = make("a", b"x" * 100), make("b", b"x" * 100), make("c", b"x" * 99 + b"y")
    assert model_fingerprint(one, "bfloat16") == model_fingerprint(same, "bfloat16")
    assert len({model_fingerprint(one, "bfloat16"), model_fingerprint(one, "int8"), model_fingerprint(other)}) == 3
