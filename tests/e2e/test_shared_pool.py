"""Engines behind one router that share a pool of KV tiers: the router counts on what only the pool still has."""

from __future__ import annotations

import random

from tests.e2e.serving import RealServer, until

TOKENS, BLOCK = 1024, 32
HIT = TOKENS - BLOCK  # the last block's last token is computed, and so its block


def test_a_prompt_that_only_the_pool_holds_is_predicted_as_a_load_and_is_one() -> None:
    """More prompts than two devices hold: the first are in the pool alone, and the router says so before they come."""
    draw = random.Random(5)
    prompts = [[draw.randrange(16, 8000) for _ in range(TOKENS)] for _ in range(12)]
    flags = ("-dp", "2", "--kv-cache-memory-bytes", "8M", "--kv-offloading-size", "128M", "--disable-log-stats")
    with RealServer(*flags) as server:
        server.until_ready()

        def asked(prompt: list[int]) -> tuple[int, dict[str, float], int]:
            """(tokens that were cached, the terms that the router saw, tokens that it expected to be cached)."""
            answer = server.complete(prompt, max_tokens=1, temperature=0)
            (route, *_) = server.http.get("/routes/recent").json()["routes"]
            return answer["usage"]["prompt_tokens_details"]["cached_tokens"], route["terms"], route["hit_tokens"]

        for prompt in prompts:
            assert asked(prompt)[0] == 0
        # Saves are told of when they are done. A prompt that is asked for moves up, so the next is the oldest.
        told = until(lambda: next((found for found in map(asked, prompts) if found[1]["load"] > 0), None), 60.0)
        cached, terms, hit = told
        assert hit == cached == HIT
        assert terms["load"] < 1000 and terms["prefill"] < 1000
