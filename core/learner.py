"""What a run learns with: its loss, the model, the optimizer, the averaged weights and the counters, saved as one."""

import contextlib
from collections.abc import Callable, Iterator

import numpy as np
import torch
from torch import Tensor, nn

from core.checkpoint import Checkpoint, TrainState, load_train_state, load_weights, model_tensors
from core.config import TrainConfig
from core.distributed import Ranks, share_of
from core.errors import UserError
from core.kernels import multiplies_bf16, training_cpu
from core.kernels.gpu import has_training_kernels
from core.likelihood import nats_to_bits
from core.models.layers import Block
from core.models.loss import nll
from core.optim import Muon, average_decay, build_optimizers, set_learning_rate, update_average

# What each optimizer remembers of a parameter.
_STATE_KEYS = {torch.optim.AdamW: ("step", "exp_avg", "exp_avg_sq"), Muon: ("mean",)}


class Nll(nn.Module):
    """-ln p `(B, S)` of every byte that the model predicts, at the run's precision."""

    def __init__(self, model: nn.Module, precision: str, recompute: bool = False) -> None:
        super().__init__()
        self.model = model
        self._precision = precision
        self._recompute = recompute

    def forward(self, byte_ids_BT: Tensor) -> Tensor:
        with _autocast(byte_ids_BT.device, self._precision):
            return nll(self.model, byte_ids_BT, self._recompute)


class MeanNll(Nll):
    """The training loss: mean negative log-likelihood over every predicted byte, in nats. One module, so one graph to compile.

    The model must be on its device already.
    """

    def __init__(self, model: nn.Module, precision: str, recompute: bool = False) -> None:
        super().__init__(model, precision, recompute)
        if precision == "bf16" and _has_training_kernels(next(model.parameters()).device):
            for module in model.modules():
                if hasattr(module, "has_kernels"):
                    module.has_kernels = True

    def forward(self, byte_ids_BT: Tensor) -> Tensor:
        return super().forward(byte_ids_BT).mean()


class Learner:
    """The live counterpart of a saved step; `capture` and `restore` are each other's inverse to the last bit."""

    def __init__(self, model: nn.Module, config: TrainConfig, ranks: Ranks) -> None:
        blocks = [module for module in model.modules() if isinstance(module, Block)]
        self.model = ranks.shard(model, blocks) if config.parallel == "fsdp" else model.to(ranks.device)
        self.optimizers = build_optimizers(model, config)
        self.weights = model_tensors(model)
        self.average = {name: tensor.clone() for name, tensor in self.weights.items()} if config.ema_decay else None
        self.step = 0
        self.bytes_seen = 0
        self.seconds = 0.0
        self.best_bits_per_byte: float | None = None
        self.unvalidated: dict[str, float] | None = None
        self._config = config
        self._ranks = ranks

    @property
    def evaluated_weights(self) -> dict[str, Tensor]:
        """The weights that are evaluated and exported: the averaged ones if the run keeps them."""
        return self.weights if self.average is None else self.average

    @torch.no_grad()
    def evaluate(
        self,
        windows: np.ndarray,
        batch_size: int,
        lengths: tuple[int, ...],
        is_given_up: Callable[[], bool] = lambda: False,
    ) -> float | None:
        """Bits per byte of the evaluated weights: sums over all windows and ranks, divided once. None if given up.

        Args:
            windows: All ranks' windows, uint8 (n, seq_len); each rank takes its share of them.
            batch_size: Windows of one forward pass on one rank.
            lengths: Bytes of each window that are read, one forward pass for each; the bytes that it predicts count.
            is_given_up: Asked before each pass; all ranks must give the same answer.
        """
        device, num_ranks = self._ranks.device, self._ranks.num_ranks
        # As many windows for every rank, for together they gather sharded weights; those read a second time do not count.
        own = np.arange(self._ranks.rank, -(-len(windows) // num_ranks) * num_ranks, num_ranks)
        sums = torch.zeros(2, dtype=torch.float64, device=device)  # nats and bytes
        was_training = self.model.training
        self.model.eval()
        nll_of_batch = Nll(self.model, self._config.precision)
        with self._evaluated_weights_in_use():
            for first in range(0, len(own), batch_size):
                indices = own[first : first + batch_size]
                batch = torch.from_numpy(windows[indices % len(windows)])
                num_counted = int((indices < len(windows)).sum())
                for length in lengths:
                    if is_given_up():
                        break
                    byte_ids = batch[:, :length].to(device).long()
                    nats = nll_of_batch(byte_ids)[:num_counted]
                    sums[0] += nats.sum()
                    sums[1] += nats.numel()
        self.model.train(was_training)
        if is_given_up():
            return None
        nats, num_bytes = self._ranks.sum(sums).tolist()
        return nats_to_bits(nats / num_bytes)

    def update(self, found_inf: Tensor, lr_fraction: float) -> None:
        """Moves the weights along the gradients that lie ready, unless `found_inf` is 1."""
        for optimizer in self.optimizers:
            set_learning_rate(optimizer, lr_fraction)
            optimizer.found_inf = found_inf
            optimizer.step()
            optimizer.zero_grad()
        if self.average is not None:
            update_average(self.average, self.weights, average_decay(self.step, self._config.ema_decay))
        self.step += 1

    def random_states(self) -> dict[str, Tensor]:
        """The states of the generators that dropout draws from."""
        states = {"cpu": torch.get_rng_state()}
        if self._ranks.device.type == "cuda":
            states["cuda"] = torch.cuda.get_rng_state(self._ranks.device)
        return states

    def set_random_states(self, states: dict[str, Tensor]) -> None:
        for kind, state in states.items():
            torch.cuda.set_rng_state(state, self._ranks.device) if kind == "cuda" else torch.set_rng_state(state)

    @contextlib.contextmanager
    def _evaluated_weights_in_use(self) -> Iterator[None]:
        """Inside, the model computes with the averaged weights, if the run keeps them; the trained ones lie in their place."""
        self._exchange_weights()
        try:
            yield
        finally:
            self._exchange_weights()

    def _exchange_weights(self) -> None:
        for name, average in (self.average or {}).items():
            weight = self.weights[name].clone()
            self.weights[name].copy_(average)
            average.copy_(weight)

    def capture(self) -> TrainState:
        """Everything but the weights. All ranks must call it; the tensors are complete on the first."""
        tensors = dict(self._optimizer_tensors())
        tensors |= {f"average.{name}": tensor for name, tensor in (self.average or {}).items()}
        tensors = dict(self._ranks.collect(tensors))
        for kind, generator_state in self.random_states().items():
            for rank, gathered in enumerate(self._ranks.gather(generator_state)):
                tensors[f"random.{kind}.{rank}"] = gathered
        return TrainState(
            step=self.step,
            bytes_seen=self.bytes_seen,
            seconds=self.seconds,
            best_bits_per_byte=self.best_bits_per_byte,
            unvalidated=self.unvalidated,
            tensors=tensors,
        )

    def restore(self, checkpoint: Checkpoint) -> None:
        """Goes back to a saved step.

        Raises:
            UserError: if it belongs to another model or lacks a part of the state.
        """
        if not checkpoint.has_state:
            raise UserError(f"{checkpoint.folder} lists no state of a run to go on from; start a new run instead")
        state = load_train_state(checkpoint.folder)
        load_weights(self.model, checkpoint)
        device = self._ranks.device
        try:
            for name, optimizer, parameter in self._optimized():
                keys = _STATE_KEYS[type(optimizer)]
                saved = {key: state.tensors[f"optimizer.{key}.{name}"].to(device) for key in keys}
                optimizer.state[parameter] = {key: share_of(tensor, parameter) for key, tensor in saved.items()}
            saved_average = state.average
            for name, tensor in (self.average or {}).items():
                tensor.copy_(share_of(saved_average[name], tensor))
        except KeyError as error:
            raise UserError(f"{checkpoint.folder / 'state.safetensors'} lacks {error}; start a new run instead") from None
        # Absent if the run goes on with more ranks or on another device; the fresh seed stands then.
        keys = {kind: f"random.{kind}.{self._ranks.rank}" for kind in self.random_states()}
        self.set_random_states({kind: state.tensors[key] for kind, key in keys.items() if key in state.tensors})
        self.step, self.bytes_seen, self.seconds = state.step, state.bytes_seen, state.seconds
        self.best_bits_per_byte, self.unvalidated = state.best_bits_per_byte, state.unvalidated

    def _optimizer_tensors(self) -> dict[str, Tensor]:
        return {
            f"optimizer.{key}.{name}": optimizer.state[parameter][key]
            for name, optimizer, parameter in self._optimized()
            for key in _STATE_KEYS[type(optimizer)]
        }

    def _optimized(self) -> Iterator[tuple[str, torch.optim.Optimizer, Tensor]]:
        """Every parameter with its name and the optimizer that moves it."""
        names = {parameter: name for name, parameter in self.model.named_parameters()}
        for optimizer in self.optimizers:
            for group in optimizer.param_groups:
                yield from ((names[parameter], optimizer, parameter) for parameter in group["params"])


def _has_training_kernels(device: torch.device) -> bool:
    return training_cpu.library() is not None if device.type == "cpu" else has_training_kernels(device)


def trains_in_bf16(device: torch.device, precision: str) -> bool:
    """Whether matrix products run in bf16: where the run asks for it, but not on a CPU to which that is ten times the work."""
    return precision == "bf16" and (device.type != "cpu" or multiplies_bf16())


@contextlib.contextmanager
def learning_precision(device: torch.device, precision: str) -> Iterator[None]:
    """Inside, products that autocast leaves in float32, those of the logits, are rounded to TF32 on a GPU of a bf16 run."""
    before = torch.get_float32_matmul_precision()
    try:
        if device.type == "cuda" and precision == "bf16":
            torch.set_float32_matmul_precision("high")
        yield
    finally:
        torch.set_float32_matmul_precision(before)


def _autocast(device: torch.device, precision: str) -> contextlib.AbstractContextManager:
    """Matrix products in the run's precision; weights, norms, logits and the loss stay float32."""
    return torch.autocast(device.type, torch.bfloat16, enabled=trains_in_bf16(device, precision))
