"""Model files that are wrong or made to do harm are refused in a sentence, soon, in little memory, and run nothing."""

import io
import json
import pickle
import subprocess
import sys
import zipfile
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import save_file

from core.checkpoint import export_model, load_model, model_tensors
from core.config import FORMAT_VERSION, MegaByteConfig, PerceiverArConfig
from core.errors import UserError
from core.learner import MeanNll
from core.limits import PeakMemory
from core.models import build_model
from core.sample import generate
from tests.test_checkpoint import reseal
from tests.tiny_run import SEQ_LEN, TINY_MODEL, tiny_config

ROOT = Path(__file__).parents[1]
CARD = {"name": "tiny", "modality": "text"}
FIRST = "levels.0.pad"


@pytest.fixture
def tensors(model) -> dict[str, torch.Tensor]:
    return model_tensors(model)


def change_json(path: Path, dotted: str, value: object) -> None:
    content = json.loads(path.read_text())
    *parents, last = dotted.split(".")
    inner = content
    for key in parents:
        inner = inner[int(key) if isinstance(inner, list) else key]
    if value is None:
        del inner[last]
    else:
        inner[last] = value
    path.write_text(json.dumps(content))


WRONG_CONFIGS = {
    "a newer format": ("format_version", FORMAT_VERSION + 1, rf"format_version={FORMAT_VERSION + 1}, this program reads"),
    "an unknown setting": ("model.flash", True, "config.model.flash is not a known setting"),
    "a missing setting": ("model.max_seq_len", None, "config.model.max_seq_len is missing"),
    "a wrong type": ("model.levels.0.dim", "wide", "config.model.levels.0.dim='wide' must be a whole number"),
    "an unknown kind": ("model.kind", "lstm", "config.model.kind='lstm' must be megabyte or perceiver_ar"),
    "another width": ("model.levels.1.dim", 20, r"has shape \(.*\), its config.json asks for \("),
    "another depth": ("model.levels.0.num_layers", 2, r"lacks the tensor levels.0.transformer.blocks.1"),
    "another context": ("model.max_seq_len", 2 * SEQ_LEN, r"has shape \(32, .*\), its config.json asks for \(64"),
    "another modality": ("codec", {"modality": "audio"}, "card.json: modality='text', its config.json says 'audio'"),
}  # fmt: skip


@pytest.mark.parametrize("what", WRONG_CONFIGS)
def test_a_configuration_that_does_not_fit_is_refused_with_what_was_found_and_expected(tmp_path, tensors, what):
    dotted, value, says = WRONG_CONFIGS[what]
    export_model(tmp_path / "export", tiny_config(), tensors, CARD)
    change_json(tmp_path / "export" / "config.json", dotted, value)
    reseal(tmp_path / "export")
    with pytest.raises(UserError, match=says):
        load_model(tmp_path / "export")


WRONG_TENSORS = {
    "lacks": (lambda made: made.pop(FIRST), f"lacks the tensor {FIRST} that its config.json asks for"),
    "holds": (lambda made: made.update(extra=torch.zeros(1)), "holds the tensor extra that its config.json does not know"),
    "shape": (lambda made: made.update({FIRST: torch.zeros(3)}), rf"tensor {FIRST} has shape \(3,\), .* asks for \(32,\)"),
    "type": (
        lambda made: made.update({FIRST: torch.zeros(32, dtype=torch.int8)}),
        rf"tensor {FIRST} is of type torch.int8, float32, bfloat16 or float16 is expected",
    ),
    "eight bits": (
        lambda made: made.update({FIRST: torch.zeros(32, dtype=torch.float8_e4m3fn)}),
        rf"tensor {FIRST} is of type torch.float8_e4m3fn, float32, bfloat16 or float16 is expected",
    ),
    "not finite": (
        lambda made: made.update({FIRST: torch.full((32,), torch.inf)}),
        f"tensor {FIRST} holds values that are no finite numbers",
    ),
}


@pytest.mark.parametrize("what", WRONG_TENSORS)
def test_tensors_that_do_not_fit_are_refused_by_name(tmp_path, tensors, what):
    change, says = WRONG_TENSORS[what]
    export_model(tmp_path / "export", tiny_config(), tensors, CARD)
    change(tensors)
    save_file(tensors, tmp_path / "export" / "model.safetensors")
    reseal(tmp_path / "export")
    with pytest.raises(UserError, match=says):
        load_model(tmp_path / "export")


def test_weights_of_another_architecture_are_refused(tmp_path, tensors):
    perceiver = PerceiverArConfig(dim=32, num_layers=1, num_heads=2, num_latents=16, max_seq_len=SEQ_LEN)
    export_model(tmp_path / "export", tiny_config(perceiver), tensors, CARD)
    with pytest.raises(UserError, match=r"tensor .* that its config\.json"):
        load_model(tmp_path / "export")


class Attack:
    def __reduce__(self):
        return exec, ("open('attacked', 'w')",)


def zipped(num_bytes: int) -> bytes:
    """A torch file in form, `num_bytes` of zeros in fact."""
    packed = io.BytesIO()
    with zipfile.ZipFile(packed, "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("archive/data.pkl", pickle.dumps(Attack()))
        archive.writestr("archive/data/0", bytes(num_bytes))
    return packed.getvalue()


def tensor_file(header: object, data: bytes = b"") -> bytes:
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    return len(text).to_bytes(8, "little") + text + data


def entry(start: int, end: int, shape: tuple[int, ...] = (1,)) -> dict:
    return {"dtype": "F32", "shape": list(shape), "data_offsets": [start, end]}


def hostile_files() -> dict[str, bytes]:
    chance = np.random.default_rng(0)
    torch.manual_seed(0)
    model = build_model(tiny_config())
    path = Path("model.safetensors")
    save_file(model_tensors(model), path)
    whole = path.read_bytes()
    path.unlink()
    files = {
        "pickle": pickle.dumps(Attack()),
        "zip bomb": zipped(1 << 28),
        "header of 2^62 bytes": (1 << 62).to_bytes(8, "little") + b"{}",
        "header of 100 MB": (100_000_000).to_bytes(8, "little") + b"{}",
        "header of another length": (100).to_bytes(8, "little") + b"{}",
        "no header": (4).to_bytes(8, "little") + b"abcd",
        "deep header": tensor_file(b"[" * 100_000),
        "overlapping tensors": tensor_file({"a": entry(0, 4), "b": entry(2, 6)}, bytes(6)),
        "hole between tensors": tensor_file({"a": entry(0, 4), "b": entry(8, 12)}, bytes(12)),
        "tensor beyond the file": tensor_file({"a": entry(0, 1 << 40, (1 << 38,))}, bytes(4)),
        "shape that overflows": tensor_file({"a": entry(0, 4, (1 << 62, 1 << 62))}, bytes(4)),
        "negative offset": tensor_file({"a": entry(-4, 0)}, bytes(4)),
        "surplus bytes": whole + b"PK" + zipped(1000),
    }
    header_bytes = 8 + int.from_bytes(whole[:8], "little")
    for number in range(60):
        changed = bytearray(whole)
        # In the header, which is read; a changed weight is a weight.
        for place in chance.integers(0, header_bytes, 3):
            changed[place] = chance.integers(256)
        files[f"changed bytes {number}"] = bytes(changed)
    return files


ABSURD = {
    "model.levels.0.dim": 1 << 40,
    "model.levels.1.ffn_dim": 1 << 50,
    "model.levels.0.num_layers": 10**9,
    "model.max_seq_len": 1 << 60,
    "model.levels.0.patch_size": 1 << 40,
    "model.levels.0.conv_kernels": [1 << 40],
    "model.levels": [{"dim": 16, "num_layers": 1, "num_heads": 2, "patch_size": 2}] * 5000,
    "train.lr": 1e999,
}
# Within the limits of single settings, and too much together.
LARGE = {"model.levels.0.dim": 1 << 16, "model.levels.0.num_layers": 256, "model.max_seq_len": 1 << 24}


def export_rotary(folder: Path, max_seq_len: int, num_heads: int = 2) -> None:
    """A tiny model whose weights say nothing of its context: its positions are rotary."""
    first, last = TINY_MODEL.levels
    levels = (replace(first, num_heads=num_heads), last)
    config = tiny_config(MegaByteConfig(levels=levels, max_seq_len=max_seq_len, positions="rotary"))
    torch.manual_seed(0)
    with torch.device("meta"):
        names = model_tensors(build_model(config))
    export_model(folder, config, {name: torch.randn(tensor.shape) / 8 for name, tensor in names.items()}, CARD)


def test_a_context_of_millions_costs_nothing_until_it_is_used_and_changes_no_bit(tmp_path):
    contexts = {"short": SEQ_LEN, "long": 1 << 22}
    for name, max_seq_len in contexts.items():
        export_rotary(tmp_path / name, max_seq_len)
    memory = PeakMemory(torch.device("cpu"))
    memory.start()
    short, long = (load_model(tmp_path / name) for name in contexts)
    assert memory.read()[1] < 20e6  # and 128 MB with the tables
    with torch.inference_mode():
        made = [generate(model, b"abcdefg", 20, seed=3)[0].tolist() for model in (short, long)]
    assert made[0] == made[1]
    byte_ids = torch.arange(SEQ_LEN)[None]
    losses = [MeanNll(model.train(), "fp32")(byte_ids) for model in (short, long)]
    for loss in losses:
        loss.backward()
    assert losses[0].item() == losses[1].item()
    assert all(map(torch.equal, *([parameter.grad for parameter in model.parameters()] for model in (short, long))))


WATCHED = """
import json, resource, sys, time
from pathlib import Path
import torch
from core.checkpoint import load_model
from core.errors import UserError

FORBIDDEN = ("exec", "compile", "subprocess.Popen", "os.system", "os.exec", "os.fork", "socket.", "pickle.", "ctypes.")
CHANGES = ("os.remove", "os.rename", "os.mkdir")
events = []

def watch(event, arguments):
    if not watching:
        return
    writes = event == "open" and isinstance(arguments[1], str) and any(c in arguments[1] for c in "wax+")
    if event.startswith(FORBIDDEN + CHANGES) or writes:
        events.append((event, str(arguments)[:80]))

def memory():
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss >> 10

watching = False
sys.addaudithook(watch)
folders = sorted(Path(sys.argv[1]).iterdir())
# Time is that of the processor: a busy machine takes longer for everything.
for export in [folders[0], *folders]:  # once more: what is imported at first use is no part of a file
    before, began, error = memory(), time.process_time(), ""
    events.clear()
    watching = True
    try:
        load_model(export)
    except UserError as refusal:
        error = str(refusal)
    watching = False
    print(json.dumps([export.name, error, time.process_time() - began, memory() - before, events]))
"""


def test_loading_hostile_files_runs_nothing_and_takes_neither_time_nor_memory(tmp_path, tensors, monkeypatch):
    monkeypatch.chdir(tmp_path)
    exports, files = tmp_path / "exports", hostile_files()
    export_model(exports / "a good one", tiny_config(), tensors, CARD)
    for name, content in files.items():
        export_model(exports / name, tiny_config(), tensors, CARD)
        (exports / name / "model.safetensors").write_bytes(content)
        reseal(exports / name)
    for name, value in ABSURD.items():
        export_model(exports / name, tiny_config(), tensors, CARD)
        change_json(exports / name / "config.json", name, value)
    export_model(exports / "large together", tiny_config(), tensors, CARD)
    for name, value in LARGE.items():
        change_json(exports / "large together" / "config.json", name, value)
    for name, num_heads in (("a good one with long tables", 2), ("tables too long", 1)):
        export_rotary(exports / name, 1 << 24, num_heads)
    export_model(exports / "long configuration", tiny_config(), tensors, CARD)
    with (exports / "long configuration" / "config.json").open("ab") as file:
        file.truncate(1 << 30)
    for target in exports.iterdir():
        if not target.name.startswith("long configuration"):
            reseal(target)
    done = subprocess.run(
        [sys.executable, "-c", WATCHED, exports], cwd=ROOT, capture_output=True, text=True, check=True, timeout=120
    )
    found = [json.loads(line) for line in done.stdout.splitlines()][1:]
    assert len(found) == len(files) + len(ABSURD) + 5
    for name, error, seconds, megabytes, events in found:
        # A changed byte may leave a file as good as it was.
        assert error or name.startswith(("changed bytes", "a good one")), name
        assert events == [], name
        assert megabytes < 100, name
        assert seconds < 1, name
    assert sum(bool(error) for name, error, *_ in found if name.startswith("changed bytes")) > 50
    assert not (ROOT / "attacked").exists()
    assert [path.name for path in tmp_path.iterdir()] == ["exports"]
