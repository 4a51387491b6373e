"""Reading memory on a CPU as fast as it can be read."""

from ctypes import CDLL, c_int64, c_uint64, c_void_p
from functools import cache
from pathlib import Path

import torch
from torch import Tensor

from core.kernels import load_library


def read(words: Tensor, num_passes: int = 1) -> int:
    """Reads int64 words so many times over, by all threads; the exclusive or of all that they found."""
    assert words.dtype == torch.int64
    assert words.is_contiguous()
    return library().read_words(words.data_ptr(), words.numel(), num_passes, torch.get_num_threads())


@cache
def library() -> CDLL | None:
    """The built loop; None where there is no compiler. Looked for once per process."""
    found = load_library(Path(__file__).with_name("read.cpp"), "-fopenmp")
    if found is not None:
        found.read_words.argtypes = (c_void_p, c_int64, c_int64, c_int64)
        found.read_words.restype = c_uint64
    return found
