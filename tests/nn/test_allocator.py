"""Memory of a process that sees ever new shapes: what torch compiles for each of them does not pile up."""

from __future__ import annotations

import subprocess
import sys

# As a serving engine does it: a new number of tokens in every step. Prints the growth in megabytes over the second 300.
GROWTH = """
import torch
from penstock.nn.allocator import bound_kernel_caches, keep_freed_memory

def rss_mb():
    return int(open("/proc/self/statm").read().split()[1]) * 4096 / 1e6

keep_freed_memory()
bound_kernel_caches()
torch.set_num_threads(1)
with torch.inference_mode():
    weight = torch.zeros(256, 256, dtype=torch.bfloat16)
    for num_tokens in range(1, 601):
        torch.nn.functional.linear(torch.zeros(num_tokens, 256, dtype=torch.bfloat16), weight)
        if num_tokens == 300:
            before = rss_mb()
    print(rss_mb() - before)
"""


def test_compiled_kernels_do_not_pile_up() -> None:
    """Without the bound, where oneDNN compiles for bfloat16: 200 MB."""
    done = subprocess.run([sys.executable, "-c", GROWTH], capture_output=True, text=True, timeout=120, check=True)
    assert float(done.stdout) < 40
