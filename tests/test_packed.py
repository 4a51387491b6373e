"""Packed linear layers: the plain layers' results, for any number of rows."""

import pytest
import torch
from torch import nn

from core.kernels import linear as kernel
from core.models.packed import BlockedLinear, PackedLinear, pack_linears


@pytest.fixture(params=[PackedLinear, BlockedLinear])
def packed(request):
    """The layer of 128 inputs that is to be tested, and how it is made; skips where this machine lacks it."""

    def build(bias: bool) -> tuple[nn.Module, nn.Module]:
        num_outputs = 192 if request.param is BlockedLinear else 40
        model = nn.Sequential(nn.Linear(128, num_outputs, bias=bias), nn.ReLU()).bfloat16().requires_grad_(False)
        plain = model[0]
        pack_linears(model)
        if not isinstance(model[0], request.param):
            pytest.skip(f"this machine has no {request.param.__name__}")
        return plain, model[0]

    return build


@pytest.mark.parametrize("shape", [(16, 128), (1, 128), (2, 3, 5, 128), (200, 128), (0, 128)])
@pytest.mark.parametrize("bias", [True, False])
def test_equal_the_plain_layer(packed, shape, bias):
    plain, layer = packed(bias)
    x = torch.randn(shape, dtype=torch.bfloat16)
    torch.testing.assert_close(layer(x), plain(x), rtol=2**-7, atol=2**-8)


@pytest.mark.parametrize("packed", [BlockedLinear], indirect=True)
def test_a_row_of_a_blocked_layer_does_not_depend_on_the_others(packed):
    _, layer = packed(True)
    x = torch.randn(50, 128, dtype=torch.bfloat16)
    assert all(torch.equal(layer(x[row : row + 1])[0], layer(x)[row]) for row in range(50))


@pytest.mark.parametrize("packed", [BlockedLinear], indirect=True)
def test_a_blocked_layer_refuses_what_does_not_fit(packed):
    _, layer = packed(True)
    for wrong in (torch.zeros(3, 64, dtype=torch.bfloat16), torch.zeros(3, 128)):
        with pytest.raises(ValueError, match="not bfloat16"):
            layer(wrong)


def test_without_the_kernel_onednn_multiplies(monkeypatch):
    monkeypatch.setattr(kernel, "library", lambda: None)
    model = nn.Sequential(nn.Linear(128, 64)).bfloat16()
    has_onednn = torch.backends.mkldnn.is_available() and torch.ops.mkldnn._is_mkldnn_bf16_supported()
    pack_linears(model)
    assert type(model[0]) is (PackedLinear if has_onednn else nn.Linear)
