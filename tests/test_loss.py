"""The loss in chunks is the loss of all logits, to its gradient, in memory that does not hold them."""

import pytest
import torch
import torch.nn.functional as F
from torch.utils._python_dispatch import TorchDispatchMode

from core.models import loss
from core.models.loss import nll, plan_chunks
from tests.model_cases import CASES, CONTEXT, PATCH, build, random_bytes, two_level

TELLING = ["exact", "all_rotary", "flat", "three_levels"]


@pytest.fixture(params=[1, 9, 40])
def small_chunks(request, monkeypatch) -> int:
    for budgets in (loss._CHUNK_BYTES, loss._RECOMPUTED_CHUNK_BYTES):
        monkeypatch.setitem(budgets, "cpu", request.param)
    return request.param


def reference(model, byte_ids) -> torch.Tensor:
    return F.cross_entropy(model(byte_ids).transpose(1, 2), byte_ids, reduction="none")


@pytest.mark.parametrize(
    ("name", "num_bytes"),
    [
        pytest.param(name, num_bytes, marks=[] if num_bytes == CONTEXT or name in TELLING else pytest.mark.slow)
        for name in CASES
        for num_bytes in (1, PATCH, CONTEXT)
    ],
)
def test_chunks_give_the_loss_of_the_logits(name, num_bytes, small_chunks, tolerance):
    model, byte_ids = build(CASES[name]), random_bytes(3, num_bytes)
    with torch.no_grad():
        torch.testing.assert_close(nll(model, byte_ids), reference(model, byte_ids), **tolerance[torch.float32])


@pytest.mark.parametrize("recompute", [False, True])
@pytest.mark.parametrize("name", TELLING)
def test_chunks_and_recomputation_give_the_gradient_of_the_logits(name, recompute, small_chunks):
    model, byte_ids = build(CASES[name]), random_bytes(2, CONTEXT)
    parameters = list(model.parameters())
    expected = torch.autograd.grad(reference(model, byte_ids).mean(), parameters)
    found = torch.autograd.grad(nll(model, byte_ids, recompute).mean(), parameters)
    for gradient, wanted in zip(found, expected, strict=True):
        torch.testing.assert_close(gradient, wanted, rtol=1e-4, atol=1e-6)


def test_recomputation_draws_the_same_dropout_again():
    model, byte_ids = build(CASES["dropout"]).train(), random_bytes(2, CONTEXT)
    gradients = []
    for recompute in (False, True):
        torch.manual_seed(5)
        gradients.append(torch.autograd.grad(nll(model, byte_ids, recompute).mean(), list(model.parameters())))
    for kept, recomputed in zip(*gradients, strict=True):
        torch.testing.assert_close(recomputed, kept, rtol=1e-4, atol=1e-6)


def test_no_bytes_have_no_loss_and_too_many_are_refused():
    model = build(CASES["exact"])
    assert nll(model, random_bytes(2, 0)).shape == (2, 0)
    with pytest.raises(ValueError, match="exceed the model's context"):
        nll(model, random_bytes(1, CONTEXT + 1))


class LargestTensor(TorchDispatchMode):
    """Watches the number of elements of everything that is computed."""

    def __init__(self) -> None:
        super().__init__()
        self.num_elements = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        for tensor in out if isinstance(out, (tuple, list)) else [out]:
            if isinstance(tensor, torch.Tensor) and tensor.untyped_storage().nbytes():
                self.num_elements = max(self.num_elements, tensor.numel())
        return out


def test_no_tensor_holds_the_logits_or_the_local_model_of_all_bytes(monkeypatch):
    monkeypatch.setitem(loss._CHUNK_BYTES, "cpu", 256)
    config = two_level(local_cross_patch=PATCH)
    num_bytes = 1 << 12
    model = build(type(config)(levels=config.levels, max_seq_len=num_bytes))
    with torch.no_grad(), LargestTensor() as largest:
        nll(model, random_bytes(1, num_bytes))
    # The global model's feed-forward layer is the largest: K x 4 D.
    assert largest.num_elements <= num_bytes // PATCH * 4 * model.levels[0].config.dim


@pytest.mark.parametrize(
    ("num_sequences", "num_bytes", "row", "past", "budget"), [(1, 64, 4, 8, 20), (5, 16, 4, 0, 40), (3, 12, 4, 4, 1)]
)
def test_a_plan_covers_every_byte_of_every_sequence_once(num_sequences, num_bytes, row, past, budget):
    seen = torch.zeros(num_sequences, num_bytes, dtype=torch.int64)
    for group in plan_chunks(num_sequences, num_bytes, row, past, budget):
        for chunk in group:
            seen[chunk.sequences, chunk.start : chunk.end] += 1
            assert chunk.start % row == chunk.first % row == 0
            assert chunk.first == max(0, chunk.start - past)
            assert seen[chunk.sequences, chunk.start : chunk.end].numel() <= max(budget, row)
    assert (seen == 1).all()


@pytest.mark.usefixtures("small_chunks")
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.uint8])
def test_measures_of_any_type_are_joined_under_autocast(dtype):
    model, byte_ids = build(CASES["exact"]), random_bytes(2, CONTEXT)
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        found = model.measure(byte_ids, lambda logits, ids: {"likeliest": logits.argmax(-1).to(dtype)})["likeliest"]
        expected = model(byte_ids).argmax(-1).to(dtype)
    assert found.dtype == dtype
    assert (found == expected).float().mean() > 0.9  # two in a row may be nearly equal
