"""Which kernels written in Triton a GPU can have: found out by running them once."""

import importlib
import logging
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache

import torch
from torch import nn

_logger = logging.getLogger(__name__)


@cache
def can_fuse(device: torch.device) -> bool:
    """Whether Triton is here and can build kernels for a GPU, for which it needs a C compiler and Python's headers."""
    with _explained("no kernels by Triton: torch's own make samples, and training is not compiled"), torch.cuda.device(device):
        kernels = importlib.import_module("core.kernels.fused")
        settings = {"device": device, "dtype": torch.bfloat16}
        kernels.normalized(torch.zeros(1, 16, **settings), nn.LayerNorm(16, **settings))
        return True
    return False


@cache
def has_training_kernels(device: torch.device) -> bool:
    """Whether `core.kernels.training` runs there: on GPUs that copy tiles by themselves and have Hopper's room for them."""
    if device.type != "cuda":
        return False
    with _explained("no kernels for training, torch's own do their work"), torch.cuda.device(device):
        importlib.import_module("core.kernels.training").try_out(device)
        return True
    return False


@contextmanager
def _explained(consequence: str) -> Iterator[None]:
    """Tries something of which many kinds of failure are possible; whatever it is, torch's own kernels do the same work."""
    try:
        yield
    except Exception as error:
        _logger.info("%s: %s", consequence, error)
