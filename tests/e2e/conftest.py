"""One real server for all tests that do not end it, with the official client.

It lives as long as the session: whatever one test leaves behind in it, another one finds. `idle_server` checks that a
test left nothing.
"""

from __future__ import annotations

from collections.abc import Iterator

import openai
import pytest
from tests.e2e.serving import PLAIN, RealServer


@pytest.fixture(scope="session")
def _server() -> Iterator[RealServer]:
    with RealServer(*PLAIN) as running:
        yield running.until_ready()
        errors = running.errors()
        assert "Traceback" not in errors and "ERROR" not in errors, errors


@pytest.fixture
def server(_server: RealServer) -> Iterator[RealServer]:
    """The running server; afterwards no request and no block is left in it."""
    yield _server
    _server.until_idle()


@pytest.fixture
def client(server: RealServer) -> Iterator[openai.OpenAI]:
    with server.client() as opened:
        yield opened
