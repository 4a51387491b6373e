"""Training: one loop over steps, one learner that a restart brings back, one folder that holds it all."""

import logging
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import asdict, dataclass
from math import isfinite
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from core.allocator import return_freed_memory
from core.checkpoint import export_model, latest_checkpoint, remove_old_checkpoints, save_checkpoint, step_folder
from core.codecs import atomic_file, build_codec, shown
from core.config import Config, TrainConfig, load_config
from core.data import Loader, build_shards, evaluation_windows, shared_files
from core.distributed import Ranks, join_ranks, keep_gradients_local, whole
from core.errors import UserError
from core.folder import MANIFEST_NAME
from core.kernels.gpu import can_fuse
from core.learner import Learner, MeanNll, learning_precision, trains_in_bf16
from core.likelihood import engine_name
from core.models import build_model
from core.optim import FiniteGuard, learning_rate_fraction
from core.report import Report
from core.run_folder import StopSignals, claim_run

logger = logging.getLogger(__name__)

_CPU_BYTES = 1 << 14  # of one forward pass on a CPU, unless the settings say: more are no faster, take memory and delay a stop


@dataclass(frozen=True, kw_only=True)
class TrainResult:
    """Where a finished run stands."""

    steps: int
    bytes_seen: int
    bits_per_byte: float  # on the validation data, of the exported weights before they were rounded to bf16
    export: Path


def train(
    config: Config,
    data_paths: list[Path],
    valid_paths: list[Path],
    out: Path,
    *,
    resume: bool = False,
    device: str = "cpu",
    log: Callable[[str], None] | None = None,
    data_cache: Path | None = None,
) -> TrainResult:
    """Trains a model in the folder `out`; `out`/export always holds the weights with the best validation so far.

    The data's bytes are kept in `data_cache`, which runs may share; without it in the folder of the run.
    Under torchrun every rank calls this with the same arguments. Ctrl-C or SIGTERM ends the forward and backward pass at
    hand (of several ranks the step), saves a checkpoint and ends the program with exit code 130 or 143.

    Raises:
        UserError: if the data, the folder or the settings cannot be used, or the loss stops being a finite number.
    """
    out = Path(out)
    with join_ranks(device) as ranks, claim_run(out, resume) if ranks.is_first else nullcontext():
        run = _Run(config, data_paths, valid_paths, out, ranks, log or logger.info, data_cache or out / "data")
        run.start(resume)
        out_of_memory_advice = explain_out_of_memory(run.micro_batch_size, run.seq_len)
        kernels = repeatable_kernels(config.train.deterministic and run.is_on_gpu)
        with kernels, learning_precision(ranks.device, config.train.precision), out_of_memory_advice, StopSignals() as stop:
            return run.loop(stop)


class _Run:
    """One process's part of a run: what the loop works with, and what it writes on its way."""

    def __init__(
        self,
        config: Config,
        data_paths: list[Path],
        valid_paths: list[Path],
        out: Path,
        ranks: Ranks,
        log: Callable[[str], None],
        data_cache: Path,
    ) -> None:
        settings = config.train
        self.config = config
        self.out = out
        self.ranks = ranks
        self.log = log if ranks.is_first else lambda _: None
        self.data_names = ", ".join(Path(path).name for path in data_paths)
        self.seq_len = settings.seq_len or config.model.max_seq_len
        self.bytes_per_step = settings.batch_size * config.model.num_predicted(self.seq_len)
        self.is_on_gpu = ranks.device.type == "cuda"
        self.compiles = settings.compile and settings.parallel == "ddp" and self.is_on_gpu and can_fuse(ranks.device)
        most = settings.batch_size if self.is_on_gpu else max(1, _CPU_BYTES // self.seq_len)
        self.micro_batch_size = micro_batch_size(settings, ranks.num_ranks, most)
        if settings.checkpoint_activations and not self.is_on_gpu:
            return_freed_memory()

        codec = build_codec(config.codec)
        data, valid = ranks.first_rank_first(
            lambda: [build_shards(paths, codec, data_cache, self.log) for paths in (data_paths, valid_paths)]
        )
        if seen := shared_files(valid, data):
            self.log(f"{shown(seen[0])} is validated on and trained on: the validation will look better than it is")
        aligned = config.codec.modality == "image"
        self.lengths = lengths_read(config)
        self.windows = evaluation_windows(valid, self.seq_len, settings.eval_sequences, aligned=aligned)
        self.loader = Loader(
            data,
            self.seq_len,
            settings.batch_size,
            settings.seed,
            aligned=aligned,
            unit=codec.unit_bytes,
            augment=codec.augmented if settings.augment else None,
            lengths=self.lengths,
            rank=ranks.rank,
            world_size=ranks.num_ranks,
        )
        torch.manual_seed(settings.seed)  # the same initial weights on every rank
        try:
            self.learner = Learner(build_model(config), settings, ranks)
        except (RuntimeError, MemoryError) as error:
            if not _is_out_of_memory(error):
                raise
            raise UserError("out of memory for the model itself; choose a smaller one with --preset or --set model") from error
        torch.manual_seed(settings.seed + 1 + ranks.rank)  # but dropout of its own

    def start(self, resume: bool) -> None:
        """Goes on from the newest intact checkpoint, or from the beginning if there is none to go on from."""
        config_path = self.out / "config.json"
        if resume:
            require_same_course(load_config(config_path), self.config)
            if checkpoint := latest_checkpoint(self.out):
                self.learner.restore(checkpoint)
                self.log(f"going on from {checkpoint.folder}")
        self.ranks.wait()  # the others have read the old configuration
        if self.ranks.is_first:
            with atomic_file(config_path) as file:
                file.write(self.config.to_json().encode())

    def loop(self, stop: StopSignals) -> TrainResult:
        """Next batch, forward, backward, clip, optimizer; every so many steps evaluate, report, save."""
        settings, learner, ranks = self.config.train, self.learner, self.ranks
        objective = MeanNll(learner.model, settings.precision, settings.checkpoint_activations)
        if self.compiles:
            torch.compiler.reset()  # the graphs of earlier runs of this process would count as recompilations of this one's
            objective = torch.compile(objective)
            self.log("the first step is compiled for this GPU, which takes up to a minute")
        objective = ranks.average_gradients(objective) if settings.parallel == "ddp" else objective
        guard = FiniteGuard(ranks.device)
        batches = self.loader.iterate(learner.step, settings.num_steps - learner.step, pin=self.is_on_gpu)
        learner.model.train()

        with self.new_report() as report:
            if learner.unvalidated is not None:
                report.stop_clock()
                self.finish_step(learner.unvalidated, report, stop, is_evaluating=True, is_reporting=True, is_saving=True)
                report.restart_clock()
            for batch in batches:
                lr_fraction = learning_rate_fraction(learner.step, settings)
                random_states = learner.random_states()
                loss = self.accumulate_gradients(objective, batch, stop)
                if loss is None:
                    learner.set_random_states(random_states)  # those that the step has drawn are drawn again
                    if learner.step:
                        require_finite(guard, settings)
                        self.note_progress(report)
                        self.save()
                    stop.leave()
                grad_norm = whole(nn.utils.clip_grad_norm_(learner.model.parameters(), settings.grad_clip))
                learner.update(guard.watch(learner.step, loss, grad_norm), lr_fraction)
                report.advance()

                step, is_last = learner.step, learner.step == settings.num_steps
                is_evaluating = is_last or step % settings.eval_every == 0
                is_reporting = is_evaluating or step % settings.log_every == 0
                is_saving = is_last or step % settings.checkpoint_every == 0
                if not (is_reporting or is_saving):
                    continue

                # Only from here on does the host wait for the device.
                require_finite(guard, settings)
                self.note_progress(report)
                line = {
                    "step": step,
                    "loss_nats": loss.item(),
                    "lr": settings.lr * lr_fraction,
                    "grad_norm": grad_norm.item(),
                    "bytes_seen": learner.bytes_seen,
                    "bytes_per_s": report.bytes_per_s(),
                    "seconds": learner.seconds,
                }
                self.finish_step(line, report, stop, is_evaluating=is_evaluating, is_reporting=is_reporting, is_saving=is_saving)
                report.restart_clock()

        return TrainResult(
            steps=learner.step,
            bytes_seen=learner.bytes_seen,
            bits_per_byte=learner.best_bits_per_byte,
            export=self.out / "export",
        )

    def new_report(self) -> Report:
        return Report(
            self.out / "metrics.jsonl",
            step=self.learner.step,
            num_steps=self.config.train.num_steps,
            bytes_per_step=self.bytes_per_step,
            seconds=self.learner.seconds,
            speaks=self.ranks.is_first,
        )

    def finish_step(
        self,
        line: dict[str, float],
        report: Report,
        stop: StopSignals,
        *,
        is_evaluating: bool,
        is_reporting: bool,
        is_saving: bool,
    ) -> None:
        """Validates, reports and saves; ends the program if a signal asks for it, which puts off a validation at hand."""
        bits_per_byte = self.evaluate(stop) if is_evaluating else None
        is_put_off = is_evaluating and bits_per_byte is None
        self.learner.unvalidated = line if is_put_off else None
        if is_reporting and not is_put_off:
            report.write(**line, valid_bits_per_byte=bits_per_byte)
        is_stopping = self.is_asked_to_stop(stop)
        if is_saving or is_stopping:
            self.save()
        if is_stopping:
            stop.leave()

    def note_progress(self, report: Report) -> None:
        report.stop_clock()
        self.learner.bytes_seen, self.learner.seconds = self.learner.step * self.bytes_per_step, report.seconds

    def is_asked_to_stop(self, stop: StopSignals) -> bool:
        """Whether to leave in the middle of something, of which the ranks must all ask at the same place."""
        return self.ranks.any(stop.received is not None)

    def accumulate_gradients(self, objective: nn.Module, batch: Tensor, stop: StopSignals) -> Tensor | None:
        """Leaves the gradient of the whole batch in the parameters; the mean loss over all ranks, still on the device.

        None if it was given up.
        """
        micro_batches = batch.split(self.micro_batch_size)
        total = torch.zeros((), device=self.ranks.device)
        for index, micro_batch in enumerate(micro_batches):
            if self.is_asked_to_stop(stop):
                return None
            byte_ids = micro_batch.to(self.ranks.device, non_blocking=True).long()
            is_last = index == len(micro_batches) - 1
            with nullcontext() if is_last else keep_gradients_local(objective):
                loss = objective(byte_ids) / len(micro_batches)
                loss.backward()
            total += loss.detach()
        return self.ranks.sum(total) / self.ranks.num_ranks

    def evaluate(self, stop: StopSignals) -> float | None:
        """Validates the weights, and exports them if they are the best so far. None if it was given up."""
        learner = self.learner
        bits_per_byte = learner.evaluate(self.windows, self.micro_batch_size, self.lengths, lambda: self.is_asked_to_stop(stop))
        if bits_per_byte is None:
            return None
        if not isfinite(bits_per_byte):
            raise UserError(
                f"the validation after step {learner.step} gave no finite number; "
                f"resume with a learning rate below train.lr={self.config.train.lr}"
            )
        self.log(f"step {learner.step}: {bits_per_byte:.4f} bits/byte on the validation data")
        best = learner.best_bits_per_byte
        is_best = best is None or bits_per_byte < best or not (self.out / "export" / MANIFEST_NAME).exists()
        if self.ranks.any(self.ranks.is_first and is_best):  # the first rank decides: it alone is sure to see its own files
            learner.best_bits_per_byte = bits_per_byte
            weights = self.ranks.collect(learner.evaluated_weights)
            if self.ranks.is_first:
                export_model(self.out / "export", self.config, weights, self.card())
        return bits_per_byte

    def save(self) -> None:
        """Writes a checkpoint of the step just finished, then removes the oldest ones."""
        state, weights = self.learner.capture(), self.ranks.collect(self.learner.weights)
        if self.ranks.is_first:
            save_checkpoint(step_folder(self.out, state.step), self.config, weights, state)
            remove_old_checkpoints(self.out, state.step, self.config.train.keep_checkpoints)

    def card(self) -> dict[str, Any]:
        """What a person should know about the weights as they are now."""
        config, learner = self.config, self.learner
        return {
            "name": config.name,
            "modality": config.codec.modality,
            "preset": config.name,
            "data": self.data_names,
            "license_note": "",
            "bytes_seen": learner.bytes_seen,
            "num_steps": learner.step,
            "train_seconds": round(learner.seconds, 1),
            "num_parameters": learner.model.num_parameters(),
            "flops_per_byte": learner.model.flops_per_byte(self.seq_len),
            "bits_per_byte": {
                "valid": {
                    "value": learner.best_bits_per_byte,
                    "protocol": "basic",
                    "window": self.seq_len,
                    "hop": self.seq_len,
                    "num_bytes": self.windows.size,
                }
            },
            "engine": engine_name(self.ranks.device, trains_in_bf16(self.ranks.device, config.train.precision)),
        }


def lengths_read(config: Config) -> tuple[int, ...]:
    """How many bytes of a training window are read: always all of them, unless the model predicts only the last of what it reads.

    Such a model reads each part of a window up to its end, and so learns and is validated with every context it is scored with.
    """
    seq_len = config.train.seq_len or config.model.max_seq_len
    num_predicted = config.model.num_predicted(seq_len)
    return (*range(num_predicted, seq_len, num_predicted), seq_len)


def micro_batch_size(settings: TrainConfig, num_ranks: int, most: int) -> int:
    """Sequences of one forward pass on one rank; at most `most` where the settings leave it open.

    Raises:
        UserError: if the batch does not divide into ranks and micro-batches of equal size; a mean of their means would be wrong.
    """
    share = max(1, settings.batch_size // num_ranks)
    size = settings.micro_batch_size or next(n for n in range(min(share, most), 0, -1) if share % n == 0)
    if settings.batch_size % (size * num_ranks):
        raise UserError(
            f"batch_size={settings.batch_size} must be a multiple of micro_batch_size={size} times {num_ranks} processes"
        )
    return size


def require_same_course(saved: Config, given: Config) -> None:
    """Refuses to resume with settings that would make it another run: what is learned from which bytes in which order.

    Raises:
        UserError: naming the first setting that differs.
    """
    for name in ("model", "codec"):
        settings = [dict(_settings(asdict(getattr(config, name)), name)) for config in (saved, given)]
        for key in sorted(settings[0].keys() | settings[1].keys()):
            was, now = (of.get(key, "missing") for of in settings)
            if was != now:
                raise UserError(f"{key}={now}, but the run was started with {was}; resume it with its own config.json")
    for name in ("seq_len", "batch_size", "seed", "augment", "optimizer"):
        was, now = getattr(saved.train, name), getattr(given.train, name)
        if was != now:
            raise UserError(f"train.{name}={now}, but the run was started with {was}; give the same to resume it")
    if bool(saved.train.ema_decay) != bool(given.train.ema_decay):
        raise UserError(f"train.ema_decay={given.train.ema_decay}, but the run was started with {saved.train.ema_decay}")


def _settings(value: Any, name: str) -> Iterator[tuple[str, Any]]:
    """Every single setting with its dotted name."""
    if isinstance(value, (dict, tuple, list)):
        for key, inner in value.items() if isinstance(value, dict) else enumerate(value):
            yield from _settings(inner, f"{name}.{key}")
    else:
        yield name, value


def require_finite(guard: FiniteGuard, settings: TrainConfig) -> None:
    """Ends a run whose weights are frozen.

    Raises:
        UserError: naming the first step whose loss or gradient was not finite.
    """
    if (step := guard.bad_step()) is not None:
        raise UserError(
            f"the loss or its gradient was not a finite number at step {step + 1}, so the weights were left as they were; "
            f"resume with a learning rate below train.lr={settings.lr}"
        )


@contextmanager
def repeatable_kernels(wanted: bool) -> Iterator[None]:
    """If wanted, only kernels that give the same bits each time, so that a resumed run equals an unbroken one.

    A CPU's kernels always do. On an H100 they cost the `image32` preset, compiled, a tenth of its speed.
    """
    if not wanted or torch.are_deterministic_algorithms_enabled():
        yield
        return
    fills = torch.utils.deterministic.fill_uninitialized_memory
    torch.use_deterministic_algorithms(True, warn_only=True)
    torch.utils.deterministic.fill_uninitialized_memory = False  # no kernel here reads what it has not written
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(False)
        torch.utils.deterministic.fill_uninitialized_memory = fills


@contextmanager
def explain_out_of_memory(micro_batch_size: int, seq_len: int) -> Iterator[None]:
    """Turns the device's or the host's refusal of memory into advice.

    Raises:
        UserError: naming the batch that did not fit and a smaller one.
    """
    try:
        yield
    except (RuntimeError, MemoryError) as error:
        if not _is_out_of_memory(error):
            raise
        smaller = f"train.micro_batch_size={micro_batch_size // 2}" if micro_batch_size > 1 else f"train.seq_len={seq_len // 2}"
        raise UserError(
            f"out of memory with {micro_batch_size} sequences of {seq_len} bytes at once; try --set {smaller}"
        ) from error


def _is_out_of_memory(error: Exception) -> bool:
    error = getattr(error, "inner_exception", error)  # torch.compile wraps what stops it
    return isinstance(error, (torch.OutOfMemoryError, MemoryError)) or "can't allocate memory" in str(error)
