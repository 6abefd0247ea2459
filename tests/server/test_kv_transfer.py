"""What P answers is what D takes, and nothing else is."""

from __future__ import annotations

import pytest

from penstock.server.errors import ApiError
from penstock.server.kv_transfer import accepted, offered

P, D = "tcp://10.0.0.1:4000", "tcp://10.0.0.2:4001"


def test_what_is_offered_is_accepted() -> None:
    params = offered(P, "bf16 of m", "secret")
    assert params["do_remote_prefill"] and not params["do_remote_decode"]
    assert (params["remote_host"], params["remote_port"]) == ("10.0.0.1", 4000)
    assert accepted(params, D, "bf16 of m", "secret") == P
    assert accepted({**params, "remote_block_ids": [[1, 2]], "more": 1}, D, "bf16 of m", "secret") == P


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"remote_port": 4001}, "do not share one --cluster-secret"),
        ({"remote_host": "10.0.0.9"}, "10.0.0.9:4000 and tcp://10.0.0.2:4001"),
        ({"remote_kv": "int8 of m"}, "do not share"),
        ({"remote_proof": None}, "is no penstock engine"),
        ({"remote_proof": "ä"}, "do not share"),
        ({"remote_host": None}, "name no engine"),
        ({"remote_port": "4000"}, "name no engine"),
        ({"remote_port": 0}, "name no engine"),
        ({"remote_host": "x" * 5000}, "do not share"),
    ],
)
def test_what_was_altered_is_refused(change: dict[str, object], said: str) -> None:
    with pytest.raises(ApiError) as error:
        accepted({**offered(P, "bf16 of m", "secret"), **change}, D, "bf16 of m", "secret")
    assert error.value.status == 400 and said in error.value.message and len(error.value.message) < 400


def test_other_secrets_and_other_models_are_refused_by_name() -> None:
    for params, said in (
        (offered(P, "bf16 of m", "another"), f"{P} and {D} do not share one --cluster-secret"),
        (offered(P, "bf16 of other", "secret"), f"{P} keeps KV as bf16 of other, {D} as bf16 of m"),
    ):
        with pytest.raises(ApiError) as error:
            accepted(params, D, "bf16 of m", "secret")
        assert error.value.message == said
