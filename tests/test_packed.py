"""Packed linear layers: the plain layers' results, for any number of rows."""

import pytest
import torch
from torch import nn

from core.models.packed import PackedLinear, pack_linears


@pytest.mark.parametrize("shape", [(16, 24), (1, 24), (2, 3, 5, 24)])
@pytest.mark.parametrize("bias", [True, False])
def test_equal_the_plain_layer(shape, bias):
    model = nn.Sequential(nn.Linear(24, 40, bias=bias), nn.ReLU()).bfloat16().requires_grad_(False)
    x = torch.randn(shape, dtype=torch.bfloat16)
    expected = model(x)
    pack_linears(model)
    if not isinstance(model[0], PackedLinear):
        pytest.skip("torch has no bfloat16 products of oneDNN here")
    torch.testing.assert_close(model(x), expected, rtol=2**-7, atol=2**-8)
