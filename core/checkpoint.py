"""A model on disk: run steps to go on from, exports to use. Safetensors and JSON only, every file verified before it is used.

step    config.json  model.safetensors  state.json  state.safetensors  manifest.json
export  config.json  model.safetensors  card.json                      manifest.json
"""

import logging
import shutil
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from core.config import Config, load_config
from core.distributed import share_of, usable_device
from core.errors import UserError
from core.folder import MANIFEST_NAME, atomic_folder, present_folder, read_json, verify_folder, write_json
from core.models import ByteModel, build_model
from core.models.layers import Rotary

WEIGHTS_FOLDER = Path(__file__).parents[1] / "weights"
_STATE_TENSORS_NAME = "state.safetensors"
_TYPES = (torch.float32, torch.bfloat16, torch.float16)

_MOST_TABLE_BYTES = 1 << 30  # a context of a million bytes with heads of 128 channels

logger = logging.getLogger(__name__)


@dataclass(frozen=True, kw_only=True)
class TrainState:
    """What a run needs besides its configuration and weights to go on as if it had never stopped."""

    step: int  # finished updates, which is also the position in the data
    bytes_seen: int
    seconds: float  # spent training, over all starts
    best_bits_per_byte: float | None  # on the validation data; None before the first evaluation
    unvalidated: dict[str, float] | None = None  # the step's metrics, if its validation was put off by a signal
    tensors: dict[str, Tensor] = field(default_factory=dict)  # optimizer moments, averaged weights, generator states

    @property
    def average(self) -> dict[str, Tensor]:
        """The averaged weights by the names of the weights; empty if the run keeps none."""
        prefix = "average."
        return {name.removeprefix(prefix): tensor for name, tensor in self.tensors.items() if name.startswith(prefix)}


@dataclass(frozen=True, kw_only=True)
class Checkpoint:
    """A verified step or export."""

    folder: Path
    config: Config
    tensors: dict[str, Tensor]
    card: dict[str, Any]  # empty for a step of a run
    digest: str  # SHA-256 in hex of the file that the tensors are from
    has_state: bool  # whether there is all that a run needs to go on


def model_tensors(model: nn.Module) -> dict[str, Tensor]:
    """The tensors that make up a model, by name; one that is used in two places stands under its first name."""
    names: dict[int, str] = {}
    for name, tensor in model.state_dict(keep_vars=True).items():
        names.setdefault(id(tensor), name)
    state = model.state_dict()
    return {name: state[name] for name in names.values()}


def save_checkpoint(folder: Path, config: Config, tensors: dict[str, Tensor], state: TrainState) -> None:
    """Writes one step of a run; `folder` is whole afterwards, or as it was before."""
    with atomic_folder(folder) as partial:
        (partial / "config.json").write_text(config.to_json(), encoding="utf-8")
        _save_tensors(partial / "model.safetensors", tensors)
        _save_tensors(partial / _STATE_TENSORS_NAME, state.tensors)
        counters = {name: value for name, value in vars(state).items() if name != "tensors"}
        write_json(partial / "state.json", counters)


def export_model(
    folder: Path, config: Config, tensors: dict[str, Tensor], card: dict[str, Any], dtype: torch.dtype = torch.bfloat16
) -> None:
    """Writes a model for use, its weights rounded to `dtype`, with the card that says what it is."""
    with atomic_folder(folder) as partial:
        (partial / "config.json").write_text(config.to_json(), encoding="utf-8")
        _save_tensors(partial / "model.safetensors", {name: tensor.to(dtype) for name, tensor in tensors.items()})
        write_json(partial / "card.json", card)


def load_checkpoint(folder: Path, *, averaged: bool = False) -> Checkpoint:
    """The configuration and weights of a step or an export; with `averaged` those that an export of the step would have.

    What the manifest does not list is not looked at.

    Raises:
        UserError: if a file is missing or not what the manifest says; nothing of the folder is used then.
    """
    digests = verify_folder(folder)
    for name in ("config.json", "model.safetensors"):
        if name not in digests:
            raise UserError(f"{folder / MANIFEST_NAME} does not list {name}; this is not a model folder")
    has_state = {"state.json", _STATE_TENSORS_NAME} <= digests.keys()
    average = load_train_state(folder).average if averaged and has_state else {}
    return Checkpoint(
        folder=folder,
        config=load_config(folder / "config.json"),
        tensors=average or _load_tensors(folder / "model.safetensors"),
        card=read_json(folder / "card.json") if "card.json" in digests else {},
        digest=digests[_STATE_TENSORS_NAME if average else "model.safetensors"],
        has_state=has_state,
    )


def load_train_state(folder: Path) -> TrainState:
    """The state beside the weights of a step that `load_checkpoint` has verified."""
    counters = read_json(folder / "state.json")
    del counters["format_version"]
    try:
        return TrainState(**counters, tensors=_load_tensors(folder / _STATE_TENSORS_NAME))
    except TypeError as error:
        raise UserError(f"{folder / 'state.json'} does not fit this program: {error}") from None


def step_folders(run_dir: Path) -> list[Path]:
    """The saved steps of a run, oldest first, whether or not they are intact."""
    return sorted((run_dir / "checkpoints").glob("step-*"))


def step_folder(run_dir: Path, step: int) -> Path:
    return run_dir / "checkpoints" / f"step-{step:08d}"


def latest_checkpoint(run_dir: Path) -> Checkpoint | None:
    """The newest intact step of a run; damaged ones are named on the logger and passed over. None if nothing was saved yet.

    Raises:
        UserError: if steps were saved and none of them is intact.
    """
    folders = step_folders(run_dir)
    for folder in reversed(folders):
        try:
            return load_checkpoint(folder)
        except ValueError as error:
            logger.warning("%s; the checkpoint before it is used", error)
    if folders:
        raise UserError(f"{run_dir}: all {len(folders)} checkpoints are damaged; start a new run in another folder")
    return None


def remove_old_checkpoints(run_dir: Path, step: int, num_kept: int) -> None:
    """Keeps the newest `num_kept` up to `step`; later ones are damaged or of an abandoned past and go as well."""
    kept = [folder for folder in step_folders(run_dir) if folder <= step_folder(run_dir, step)][-num_kept:]
    for folder in step_folders(run_dir):
        if folder not in kept:
            shutil.rmtree(folder, ignore_errors=True)


def shipped_models() -> list[str]:
    """Names of the models that come with the program."""
    return sorted(manifest.parent.name for manifest in WEIGHTS_FOLDER.glob(f"*/{MANIFEST_NAME}"))


def resolve_model(name_or_dir: str | Path) -> Path:
    """The folder that `load_checkpoint` reads for a shipped name, an export, a run's step, or a run (its export first).

    Raises:
        UserError: if there is no such model.
    """
    if str(name_or_dir) in shipped_models():
        return WEIGHTS_FOLDER / name_or_dir
    folder = Path(name_or_dir)
    for candidate in map(present_folder, (folder, folder / "export")):
        if (candidate / MANIFEST_NAME).exists():
            return candidate
    if step_folders(folder):
        return latest_checkpoint(folder).folder
    names = ", ".join(shipped_models()) or "none"
    raise UserError(f"model {name_or_dir} is neither a shipped name ({names}) nor the folder of a trained model")


def load_model(name_or_dir: str | Path, device: str = "cpu") -> ByteModel:
    """A model ready for use: float32, in evaluation mode, with its name, card and digest as attributes.

    Of a run's step it has the averaged weights if the run keeps them, as its export would. It is for one thread at a time:
    the first sample on a CPU moves its matrices in memory.

    Raises:
        UserError: if there is no such model, or its files are damaged or do not fit each other.
    """
    checkpoint = load_checkpoint(resolve_model(name_or_dir), averaged=True)
    _require_modality(checkpoint)
    with torch.device("meta"), _NoFirstValues():
        model = build_model(checkpoint.config)
    _require_fitting(model, checkpoint)  # before there is memory for a model of any size
    tensors = {name: tensor.to(torch.float32, copy=True) for name, tensor in checkpoint.tensors.items()}
    model.load_state_dict(tensors, assign=True)
    for module in model.modules():
        if isinstance(module, Rotary):
            module.empty("cpu")
    model.name = checkpoint.card.get("name", checkpoint.config.name)
    model.card = checkpoint.card
    model.digest = checkpoint.digest
    return model.to(usable_device(device))


def load_weights(model: nn.Module, checkpoint: Checkpoint) -> None:
    """Copies a checkpoint's tensors into `model`: all of them, or none if one does not fit.

    Raises:
        UserError: naming the first tensor that is missing, unknown, of another shape or type, or not finite.
    """
    _require_fitting(model, checkpoint)
    for name, tensor in model_tensors(model).items():
        tensor.copy_(share_of(checkpoint.tensors[name], tensor))


class _NoFirstValues(TorchFunctionMode):
    """Inside the block new layers are not filled with random numbers: to draw them takes longer than to read a model."""

    def __torch_function__(self, func: Any, types: Any, args: tuple = (), kwargs: dict[str, Any] | None = None) -> Any:
        return None if getattr(func, "__module__", "") == "torch.nn.init" else func(*args, **kwargs or {})


def _require_fitting(model: nn.Module, checkpoint: Checkpoint) -> None:
    path = checkpoint.folder / "model.safetensors"
    expected = model_tensors(model)
    for name in sorted(expected.keys() | checkpoint.tensors.keys()):
        if name not in checkpoint.tensors:
            raise UserError(f"{path} lacks the tensor {name} that its config.json asks for")
        tensor = checkpoint.tensors[name]
        if name not in expected:
            raise UserError(f"{path} holds the tensor {name} that its config.json does not know")
        found, wanted = tuple(tensor.shape), tuple(expected[name].shape)
        if found != wanted:
            raise UserError(f"{path}: tensor {name} has shape {found}, its config.json asks for {wanted}")
        if tensor.dtype not in _TYPES:
            raise UserError(f"{path}: tensor {name} is of type {tensor.dtype}, float32, bfloat16 or float16 is expected")
        if not _is_finite(tensor):
            raise UserError(f"{path}: tensor {name} holds values that are no finite numbers; use another export or step")
    table_bytes = sum(module.num_bytes for module in model.modules() if isinstance(module, Rotary))
    if table_bytes > _MOST_TABLE_BYTES:
        raise UserError(
            f"{checkpoint.folder / 'config.json'}: max_seq_len={checkpoint.config.model.max_seq_len} asks for "
            f"{table_bytes} bytes of position tables, at most {_MOST_TABLE_BYTES} are expected"
        )


def _is_finite(tensor: Tensor) -> bool:
    """Whether all values are numbers: both bounds are none if any value is none. One pass, and no memory."""
    return tensor.numel() == 0 or bool(torch.stack(tensor.aminmax()).isfinite().all())


def _require_modality(checkpoint: Checkpoint) -> None:
    wanted = checkpoint.config.codec.modality
    if (found := checkpoint.card.get("modality", wanted)) != wanted:
        raise UserError(f"{checkpoint.folder / 'card.json'}: modality={found!r}, its config.json says {wanted!r}")


def _save_tensors(path: Path, tensors: dict[str, Tensor]) -> None:
    for name, tensor in tensors.items():
        if not _is_finite(tensor):
            raise UserError(f"{name} holds values that are no finite numbers, so {path.parent.name} was not written")
    save_file({name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}, path)


def _load_tensors(path: Path) -> dict[str, Tensor]:
    try:
        return load_file(path)
    except SafetensorError as error:
        raise UserError(f"{path} is not a safetensors file: {error}") from None
