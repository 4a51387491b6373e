"""Several processes as one: torchrun's ranks, sums over them, gradients averaged between them."""

import contextlib
import os
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import TypeVar

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from core.errors import UserError

Built = TypeVar("Built")


@dataclass(frozen=True)
class Ranks:
    """This process's place among those that train together. Without torchrun there is one, and every method is local."""

    rank: int
    num_ranks: int
    device: torch.device

    @property
    def is_first(self) -> bool:
        return self.rank == 0

    def sum(self, values: Tensor) -> Tensor:
        """`values` summed over all ranks, in place."""
        if self.num_ranks > 1:
            dist.all_reduce(values)
        return values

    def any(self, fact: bool) -> bool:
        """Whether `fact` holds on some rank. The flag travels between hosts, so no rank waits for its accelerator."""
        return bool(self.sum(torch.tensor(int(fact))))

    def gather(self, values: Tensor) -> list[Tensor]:
        """The tensors of all ranks, of equal shape, in order of rank."""
        if self.num_ranks == 1:
            return [values]
        gathered = [torch.empty_like(values) for _ in range(self.num_ranks)]
        dist.all_gather(gathered, values)
        return gathered

    def wait(self) -> None:
        """Returns once every rank has come here."""
        self.any(False)

    def first_rank_first(self, build: Callable[[], Built]) -> Built:
        """`build()` of every rank, the others' after the first rank's: for files that the first makes and the others find."""
        if not self.is_first:
            self.wait()
        built = build()
        if self.is_first:
            self.wait()
        return built

    def average_gradients(self, module: nn.Module) -> nn.Module:
        """`module`, whose backward pass now leaves the mean gradient over all ranks."""
        if self.num_ranks == 1:
            return module
        device_ids = [self.device] if self.device.type == "cuda" else None
        return DistributedDataParallel(module, device_ids=device_ids, broadcast_buffers=False, gradient_as_bucket_view=True)


def keep_gradients_local(module: nn.Module) -> contextlib.AbstractContextManager:
    """A context in which backward only adds to this rank's gradients: for all but the last pass of an accumulation."""
    return module.no_sync() if isinstance(module, DistributedDataParallel) else contextlib.nullcontext()


@contextlib.contextmanager
def join_ranks(device: str) -> Iterator[Ranks]:
    """The ranks torchrun has started (RANK, WORLD_SIZE, LOCAL_RANK in the environment), or this process alone."""
    num_ranks = int(os.environ.get("WORLD_SIZE", "1"))
    if num_ranks == 1:
        yield Ranks(0, 1, usable_device(device))
        return
    place = torch.device("cuda", int(os.environ["LOCAL_RANK"])) if device.startswith("cuda") else torch.device("cpu")
    place = usable_device(str(place))
    if place.type == "cuda":
        torch.cuda.set_device(place)
    dist.init_process_group("cpu:gloo,cuda:nccl" if place.type == "cuda" else "gloo")
    try:
        yield Ranks(dist.get_rank(), num_ranks, place)
    finally:
        dist.destroy_process_group()


def usable_device(name: str) -> torch.device:
    """The device of that name.

    Raises:
        UserError: if there is no such device on this machine.
    """
    try:
        device = torch.device(name)
    except RuntimeError:
        raise UserError(f"--device {name} is not a device; use cpu or cuda") from None
    if device.type not in ("cpu", "cuda"):
        raise UserError(f"--device {name} is not supported; use cpu or cuda")
    if device.type == "cuda" and (device.index or 0) >= torch.cuda.device_count():
        raise UserError(f"--device {name} is not there: this machine shows {torch.cuda.device_count()} CUDA devices; use cpu")
    return device
