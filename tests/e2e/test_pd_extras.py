"""Prefill and decode apart over the links that are extras: the answers of one engine, bit for bit.

Fewer cases than in test_pd.py: what is asked is the links' part, and tests/transfer has their faults.
"""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor

import pytest
from tests.e2e.pd import COMMON, KV_BYTES, Reference, ask, asked, handoffs
from tests.e2e.serving import MODEL, RealServer, until
from tests.transfer.rig import EXTRAS

from penstock import cli
from penstock.nn.kernels.native import usable_kernels
from penstock.transfer.frames import LinkError


@pytest.mark.skipif(not usable_kernels(), reason="bit-equal with native kernels only")
@pytest.mark.parametrize("link", EXTRAS)
def test_answers_are_those_of_one_engine(link: str) -> None:
    """Prompts in many chunks, one by one and at once, over one connection; none of them was computed twice."""
    with RealServer("--pd", "1P1D", *COMMON, "--kv-link", link, "--kv-cache-memory-bytes", KV_BYTES) as server:
        one = Reference(MODEL)
        server.until_ready()
        requests = [asked(n, n) for n in (129, 640, 1500)]
        for request in requests:
            assert ask(server, request) == one.answers(request)
        many = [asked(100 + 150 * k, 30 + k, max_tokens=24, temperature=0.8, seed=k) for k in range(6)]
        with ThreadPoolExecutor(len(many)) as threads:
            for found, request in zip(threads.map(lambda r: ask(server, r), many), many):
                assert found == one.answers(request)
        until(lambda: handoffs(server)["received"] == len(requests) + len(many), what="counting all hand-offs")
        assert handoffs(server)["failed"] == 0
        server.until_idle()
        one.close()


def test_a_missing_extra_says_what_to_install(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Before anything starts, on one line."""

    def load() -> None:
        raise LinkError("the NIXL link needs an extra: pip install 'penstock[nixl]'")

    monkeypatch.setattr("penstock.cluster.seat._LOAD", {"nixl": load})
    assert cli.main(["serve", str(MODEL), "--pd", "1P1D", "--kv-link", "nixl", "--port", "0"]) != 0
    assert "pip install 'penstock[nixl]'" in capsys.readouterr().err
