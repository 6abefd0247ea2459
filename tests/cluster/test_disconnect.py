"""A client that leaves in the middle of its prompt: the prefill engine has its blocks back with the step in flight."""

from __future__ import annotations

import pytest
from tests.cluster.node import Node
from tests.cluster.whole import Cluster, Setting

LINES_S = 0.004  # front end to D, D to P, and what the pretended wires add


def held(node: Node) -> int:
    """Blocks that somebody reads or writes, or that a step in flight may."""
    return sum(pool.num_blocks - 1 - pool.num_available for pool in node.scheduler.pools)


@pytest.mark.parametrize("depth", [1, 2])
@pytest.mark.parametrize("leaves_s", [0.0, 0.003, 0.011, 0.017, 0.02])
def test_the_blocks_are_free_when_the_step_in_flight_ends(leaves_s: float, depth: int) -> None:
    """Steps of 16 tokens take 2 to 10 ms, the prompt 12 of them. At depth 2 both steps in flight count."""
    roles = {"p0": "prefill", "d0": "decode"}
    setting = Setting(roles=roles, depth=depth, is_inline=depth == 1, num_blocks=120, has_tiers=False)
    cluster = Cluster(setting, seed=7)
    cluster.clock.run_until(0.1)
    ask = cluster.ask([400 + n for n in range(190)], 4)
    node = cluster.nodes["p0"]
    while not node.busy:
        assert cluster.clock.step()
    cluster.clock.run_until(cluster.clock.now() + leaves_s)
    assert node.scheduler.running and held(node) and not ask.tokens[0]
    cluster.cancel(ask)
    heard_s = cluster.clock.now() + LINES_S
    cluster.clock.run_until(heard_s)
    free_s = max([heard_s, *node.busy])  # ends of the steps that were in flight when the word came
    num_steps = node.scheduler.step
    assert not node.busy or held(node), "a step still writes into them"
    cluster.clock.run_until(free_s)
    assert held(node) == 0 and not node.scheduler.requests
    assert node.scheduler.step == num_steps, "nothing more was planned for it"
    cluster.run()
    cluster.check()
    assert held(cluster.nodes["d0"]) == 0
