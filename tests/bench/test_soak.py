"""50 clients for 10 seconds, some vanishing, with the very code of benchmarks/soak.py; and that its checks can fail."""

from __future__ import annotations

import copy

import pytest
from benchmarks.soak import Clients, Served, added_latencies_ms, failures, soak


@pytest.fixture(scope="module")
def report() -> dict[str, object]:
    return soak(50, 10.0, leave=0.2)


def test_fifty_clients_for_ten_seconds(report: dict[str, object]) -> None:
    assert report["failures"] == []
    assert report["requests_served"] >= 50
    assert sum(report["requests_left"].values()) >= 1
    assert report["added_latency_ms"]["requests_matched"] > 0.9 * report["requests_served"]
    assert 0 < report["added_latency_ms"]["p50"] < 1000


def test_each_check_can_fail(report: dict[str, object]) -> None:
    fine = Clients(served=[Served("a", 3, 3, [1.0, 2.0, 3.0])])

    def told(*changes: tuple[str, object], clients: Clients = fine) -> str:
        """What is said of the report with changes: (path of keys, new value)."""
        broken = copy.deepcopy(report)
        broken["added_latency_ms"]["requests_matched"] = 1
        broken["memory"] = [{**each, "growth_mb": 0.0} for each in report["memory"]]  # ten seconds say nothing of it
        for keys, value in changes:
            *path, last = keys.split("/")
            at = broken
            for name in path:
                at = at[int(name) if name.isdigit() else name]
            at[last] = value
        return "; ".join(failures(broken, clients, 16.0, judge_growth=True))

    assert told() == ""
    assert told(("num_errors", 1), ("errors", ["boom"])) == "1 requests that nobody left failed; first: boom"
    assert told(("blocks/used", 3)) == "3 used after everything had ended"
    assert "are not all" in told(("blocks/free", 0))
    assert "the front end has 9999 open files" in told(("open_files/front end/after", 9999))
    assert told(("memory/1/growth_mb", 900.0)) == "the engine grew by 900.0 MB"
    assert told(("server_exit_code", 1)) == "the server left with exit code 1"
    assert "could be matched" in told(("added_latency_ms/requests_matched", 0))
    assert told(clients=Clients()) == "no request was served"
    short = Clients(served=[Served("a", 3, 2, [1.0, 2.0])])
    assert "another number of tokens" in told(clients=short)


def test_added_latency_is_per_token_of_requests_that_match() -> None:
    served = [Served("a", 2, 2, [1.002, 1.105]), Served("b", 2, 2, [5.0]), Served("c", 1, 1, [9.0])]
    emitted = {"a": [1.0, 1.1, 1.2], "b": [4.0, 4.1]}
    added_ms, num_matched = added_latencies_ms(served, emitted)
    assert added_ms == pytest.approx([2.0, 5.0])
    assert num_matched == 1
