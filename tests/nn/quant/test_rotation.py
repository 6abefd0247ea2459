"""The Hadamard rotation in plain torch: the matrix itself."""

from __future__ import annotations

import pytest
import torch

from penstock.config.quantization import ROTATIONS
from penstock.nn.quant.rotation import hadamard, largest_rotation, rotate


@pytest.mark.parametrize("block", ROTATIONS)
def test_it_is_the_hadamard_matrix_over_its_root_and_its_own_inverse(block: int) -> None:
    matrix = rotate(torch.eye(block), block)
    assert torch.allclose(matrix.abs(), torch.full((block, block), block**-0.5))
    assert torch.allclose(matrix @ matrix, torch.eye(block), atol=1e-6)
    assert torch.equal(matrix, matrix.T)
    assert torch.equal(matrix.sign(), hadamard(block))
    x = torch.randn(3, 5, 4 * block, generator=torch.Generator().manual_seed(0))
    whole = (x.view(3, 5, 4, block) @ matrix).view_as(x)
    assert torch.allclose(rotate(x, block), whole, atol=1e-5)


@pytest.mark.parametrize(("k", "block"), [(1024, 128), (4864, 128), (192, 64), (96, 32), (80, 16), (24, 0)])
def test_the_largest_block_that_divides_the_width(k: int, block: int) -> None:
    assert largest_rotation(k) == block
