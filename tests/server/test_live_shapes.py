"""The page's JSON from messages: configuration, spans, rows of the requests table."""

from __future__ import annotations

import json

from tests.server.synthetic_messages import record

from penstock.config.schema import Config, ServerOptions
from penstock.engine.messages import Span
from penstock.server.live_shapes import MAX_SPANS, Track, config_rows, merged, request_row


def test_config_rows_say_who_set_what_and_keep_secrets() -> None:
    config = Config(server=ServerOptions(api_key=("sk-hush",)), origins={"api_key": ("env", "PENSTOCK_API_KEY")})
    rows = {row["name"]: row for row in config_rows(config)}
    assert rows["api_key"] == {
        "name": "api_key",
        "value": "set, not shown",
        "origin": "env",
        "note": "PENSTOCK_API_KEY",
    }
    assert rows["port"] == {"name": "port", "value": 8000, "origin": "default", "note": ""}
    assert rows["max_model_len"]["value"] == "none"
    assert "sk-hush" not in json.dumps(list(rows.values()))
    assert {row["name"]: row for row in config_rows(Config())}["api_key"]["value"] == "not set"


def test_neighbours_of_one_kind_are_one_span_and_the_last_ones_are_kept() -> None:
    spans = [Span("queue", 0.0, 1.0), Span("prefill", 1.0, 1.5), Span("prefill", 1.52, 2.0), Span("prefill", 3.0, 4.0)]
    found = [(s.kind, s.start_ts, s.end_ts) for s in merged([*spans, Span("decode", 4.0, None)], 10.0, None)]
    assert found == [
        ("queue", 10.0, 11.0),
        ("prefill", 11.0, 12.0),
        ("prefill", 13.0, 14.0),
        ("decode", 14.0, None),
    ]
    assert merged([Span("decode", 4.0, None)], 10.0, 5.0)[0].end_ts == 15.0
    many = [Span(("prefill", "preempted")[k % 2], k, k + 0.9) for k in range(40)]
    assert [s.start_ts for s in merged(many, 0.0, None)] == list(range(40 - MAX_SPANS, 40))


def test_tokens_that_came_after_the_engines_last_word_count_in_a_row() -> None:
    old = record("a", state="waiting", admitted_s=None, first_token_s=None, spans=[Span("queue", 100.0, None)])
    track = Track("a", 40, 100.0, record=old)
    row = request_row(track, 10.0)
    assert (row.state, row.cached_tokens, row.generation_tokens) == ("waiting", None, 0)
    track.first_s, track.last_s, track.num_tokens = 101.0, 101.2, 3
    row = request_row(track, 10.0)
    assert (row.state, row.cached_tokens, row.generation_tokens) == ("decode", None, 3)
    assert [(s.kind, s.start_ts, s.end_ts) for s in row.spans] == [("queue", 110.0, 111.0), ("decode", 111.0, None)]
    track.record = record("a")
    row = request_row(track, 10.0)
    assert (row.state, row.cached_tokens, len(row.spans)) == ("decode", 32, 3)
