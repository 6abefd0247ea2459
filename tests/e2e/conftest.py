"""One real server for all tests that do not end it, with the official client.

It lives as long as the session: whatever one test leaves behind in it, another one finds.
"""

from __future__ import annotations

from collections.abc import Iterator

import openai
import pytest
from tests.e2e.serving import PLAIN, RealServer


@pytest.fixture(scope="session")
def running() -> Iterator[RealServer]:
    """The server, for tests that send nothing which could run."""
    with RealServer(*PLAIN) as started:
        yield started.until_ready()
        errors = started.errors()
        assert "Traceback" not in errors and "ERROR" not in errors, errors


@pytest.fixture
def server(running: RealServer) -> Iterator[RealServer]:
    """The server; the test fails if a request or a block is left in it."""
    yield running
    running.until_idle()


@pytest.fixture
def client(server: RealServer) -> Iterator[openai.OpenAI]:
    with server.client() as opened:
        yield opened
