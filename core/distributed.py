"""Several processes as one: torchrun's ranks, sums over them, gradients averaged and weights sharded between them."""

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

    def shard(self, model: nn.Module, parts: list[nn.Module]) -> nn.Module:
        """`model` on the device, each rank holding its share of the rows of every weight, gradient and moment (FSDP2).

        `model.measure` and each of `parts` gather their own weights when they run and drop them afterwards. The backward
        pass leaves each rank its share of the mean gradient over all ranks. All ranks must make the same passes.
        """
        if self.num_ranks == 1:
            return model.to(self.device)
        from torch.distributed.device_mesh import init_device_mesh
        from torch.distributed.fsdp import fully_shard, register_fsdp_forward_method

        mesh = init_device_mesh(self.device.type, (self.num_ranks,))
        for part in parts:
            fully_shard(part, mesh=mesh)
        # Weights that stayed gathered after a validation would hide that training has changed them since.
        fully_shard(model, mesh=mesh, reshard_after_forward=True)
        # Copied, because FSDP2 hooks its backward pass to what comes out; a view that is changed in place would lose the hook.
        measure = model.measure
        model.measure = lambda *arguments: {name: tensor.clone() for name, tensor in measure(*arguments).items()}
        register_fsdp_forward_method(model, "measure")
        return model

    def collect(self, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
        """The whole tensors: of sharded ones on the host of the first rank only. All ranks must call it."""
        if not any(map(_is_sharded, tensors.values())):
            return tensors
        collected = {}
        for name, tensor in tensors.items():  # one at a time: an accelerator need not hold them all
            gathered = whole(tensor)
            if self.is_first:
                collected[name] = gathered.cpu()
        return collected

    def average_gradients(self, module: nn.Module) -> nn.Module:
        """`module`, whose backward pass now leaves the mean gradient over all ranks."""
        if self.num_ranks == 1:
            return module
        device_ids = [self.device] if self.device.type == "cuda" else None
        return DistributedDataParallel(module, device_ids=device_ids, broadcast_buffers=False, gradient_as_bucket_view=True)


def keep_gradients_local(module: nn.Module) -> contextlib.AbstractContextManager:
    """A context in which backward only adds to this rank's gradients: for all but the last pass of an accumulation.

    Without effect on sharded weights: whole gradients, kept between passes, are what there may be no room for.
    """
    return module.no_sync() if isinstance(module, DistributedDataParallel) else contextlib.nullcontext()


def whole(tensor: Tensor) -> Tensor:
    """All rows of a tensor that may be sharded between the ranks, all of which must call this then."""
    return tensor.full_tensor() if _is_sharded(tensor) else tensor


def share_of(tensor: Tensor, like: Tensor) -> Tensor:
    """Of a whole `tensor` the rows that this rank holds of `like`; all of it if `like` is not sharded or `tensor` is a number."""
    if tensor.ndim == 0 or not _is_sharded(like):
        return tensor
    from torch.distributed.tensor import distribute_tensor

    return distribute_tensor(tensor.to(like.device), like.device_mesh, like.placements, src_data_rank=None)


def _is_sharded(tensor: Tensor) -> bool:
    # Every tensor is asked, sharded or not, and to import DTensor takes a second.
    return hasattr(tensor, "full_tensor")


@contextlib.contextmanager
def join_ranks(device: str) -> Iterator[Ranks]:
    """The ranks torchrun has started (RANK, WORLD_SIZE, LOCAL_RANK in the environment), or this process alone."""
    num_ranks, place = int(os.environ.get("WORLD_SIZE", "1")), usable_device(device)
    if num_ranks == 1:
        yield Ranks(0, 1, place)
        return
    if place.type == "cuda":
        place = usable_device(f"cuda:{os.environ['LOCAL_RANK']}")
        torch.cuda.set_device(place)
    dist.init_process_group("cpu:gloo,cuda:nccl" if place.type == "cuda" else "gloo")
    try:
        yield Ranks(dist.get_rank(), num_ranks, place)
    finally:
        dist.destroy_process_group()


def usable_device(name: str) -> torch.device:
    """The device of that name; "auto" is the GPU if there is one, else the CPU.

    Raises:
        UserError: if there is no such device on this machine.
    """
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(name)
    except RuntimeError:
        raise UserError(f"--device {name} is not a device; use cpu, cuda or auto") from None
    if device.type not in ("cpu", "cuda"):
        raise UserError(f"--device {name} is not supported; use cpu, cuda or auto")
    if device.type == "cuda" and (device.index or 0) >= torch.cuda.device_count():
        raise UserError(f"--device {name} is not there: this machine shows {torch.cuda.device_count()} CUDA devices; use cpu")
    return device
