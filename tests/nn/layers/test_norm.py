"""The fast RMSNorm equals the reference over shapes and dtypes."""

from __future__ import annotations

import pytest
import torch

from penstock.nn.layers.norm import RMSNorm, rms_norm_reference

pytestmark = pytest.mark.usefixtures("one_thread")
ROUNDING = {torch.float32: 1e-6, torch.bfloat16: 2**-7, torch.float16: 2**-10}


@pytest.mark.parametrize("dtype", ROUNDING, ids=str)
@pytest.mark.parametrize("shape", [(1, 8), (5, 33), (3, 4, 16), (0, 8)])
def test_equals_the_reference(shape: tuple[int, ...], dtype: torch.dtype) -> None:
    """Within two roundings of the dtype; rows of very different size do not disturb each other."""
    generator = torch.Generator().manual_seed(2)
    x = torch.randn(shape, generator=generator) * 10 ** torch.randint(-2, 3, (*shape[:-1], 1), generator=generator)
    norm = RMSNorm(shape[-1], 1e-6).to(dtype)
    with torch.no_grad():
        norm.weight.copy_(torch.rand(shape[-1], generator=generator) + 0.5)
        ours, expected = norm(x.to(dtype)), rms_norm_reference(x.to(dtype), norm.weight, 1e-6)
    assert ours.dtype == expected.dtype == dtype
    assert ours.shape == shape
    torch.testing.assert_close(ours, expected, rtol=2 * ROUNDING[dtype], atol=1e-7)


def test_reference_by_hand() -> None:
    """(3, 4) has a mean square of 12.5; eps keeps zeros finite."""
    result = rms_norm_reference(torch.tensor([[3.0, 4.0], [0.0, 0.0]]), torch.tensor([1.0, 2.0]), 1e-6)
    root = 12.5**0.5
    torch.testing.assert_close(result, torch.tensor([[3 / root, 8 / root], [0.0, 0.0]]))


def test_strided_input() -> None:
    """q and k are views into the fused projection: norm over the last axis of a tensor that is not contiguous."""
    x = torch.randn(6, 5, 16, generator=torch.Generator().manual_seed(3))[:, 1:4]
    norm = RMSNorm(16, 1e-5)
    assert torch.equal(norm(x), norm(x.contiguous()))
