"""The comparison of the paper's Tables 2 and 5: models that learn from the same bytes, with the same FLOPs, scored on the same.

OUT/plan.json        what is compared, with how many FLOPs each
OUT/data/            the training and validation data as bytes, for all models
OUT/NAME/            one run of core.train, and result.json as soon as its model is scored
OUT/comparison.json  OUT/table.md  OUT/table.txt  written when all are done

A comparison that was killed goes on with the run at hand; finished models are not trained or scored again.
"""

import dataclasses
import hashlib
import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from core.checkpoint import load_model
from core.codecs import atomic_file, build_codec
from core.comparison import Measurement, Result, as_markdown, as_text, table
from core.config import Config, ImageCodecConfig
from core.data import ByteData, build_shards, shared_items
from core.errors import UserError
from core.folder import read_json, write_json
from core.likelihood import score
from core.models import ByteModel, build_model
from core.plans import Member, Plan, Split
from core.train import lengths_read, train

_BACKWARD = 3  # a training step costs its forward pass and twice that for the backward one
_NUM_EVALUATIONS = 12
_NUM_CHECKPOINTS = 8

Log = Callable[[str], None]


def compare(
    plan: Plan, root: Path, out: Path, *, budget: float = 0.0, resume: bool = False, device: str = "cpu", log: Log
) -> list[Result]:
    """Trains and scores every model of a plan in the folder `out`.

    Args:
        plan: From `core.plans.build_plan`.
        root: The folder of the data sets.
        out: The folder of the comparison.
        budget: FLOPs of each model, forward and backward; 0 stands for the plan's own.
        resume: Go on with what lies in `out`.
        device: cpu or cuda.
        log: Takes a line for each event.

    Raises:
        UserError: if data is missing, or `out` holds something else than this comparison.
    """
    budget = budget or plan.budget
    for member in plan.members:
        for pattern in (member.split.train, member.split.valid, member.split.test):
            matching(root, pattern)
    _claim(
        out,
        {"plan": plan.name, "size": plan.size, "budget": budget, "device": device.partition(":")[0], "models": _digest(plan)},
        resume,
    )
    results = []
    for number, member in enumerate(plan.members, start=1):
        saved = out / member.name / "result.json"
        if saved.exists():
            result = Result.from_dict({name: value for name, value in read_json(saved).items() if name != "format_version"})
            log(f"{member.name} ({number} of {len(plan.members)}) is done already: {result.basic.bits_per_byte:.4f} bits/byte")
        else:
            log(f"{member.name} ({number} of {len(plan.members)}) is trained with {budget:.3g} FLOPs")
            result = _train_and_score(member, budget, root, out, device, log)
            with atomic_file(saved) as file:
                file.write(json.dumps({"format_version": 1, **result.to_dict()}).encode())
            log(f"{member.name}: {result.basic.bits_per_byte:.4f} bits/byte of the test data")
        results.append(result)
    write_results(out, results)
    return results


def write_results(out: Path, results: list[Result]) -> None:
    """Writes the tables and the JSON of a finished comparison."""
    rows = table(results)
    words = {result.num_words for result in results if result.num_words}
    note = f"\nWords in the scored text: {max(words)}.\n" if words else ""
    for name, text in (("table.md", as_markdown(rows)), ("table.txt", as_text(rows))):
        (out / name).write_text(text + note, encoding="utf-8")
    with atomic_file(out / "comparison.json") as file:
        file.write(json.dumps({"format_version": 1, "results": [result.to_dict() for result in results]}, indent=1).encode())


def flops_per_predicted_byte(model: ByteModel, config: Config) -> float:
    """Forward FLOPs of a training sequence, on average over the lengths that are read, per byte the loss is of."""
    lengths = lengths_read(config)
    per_sequence = sum(model.flops_per_byte(length) * length for length in lengths) / len(lengths)
    return per_sequence / config.model.num_predicted(lengths[-1])


def with_budget(config: Config, flops_per_byte: float, budget: float) -> Config:
    """The configuration with as many steps as the FLOPs pay for, evaluated and saved a fixed number of times."""
    train_config = config.train
    bytes_per_step = train_config.batch_size * config.model.num_predicted(config.model.max_seq_len)
    num_steps = max(1, round(budget / (_BACKWARD * flops_per_byte * bytes_per_step)))
    settings = dataclasses.replace(
        train_config,
        num_steps=num_steps,
        warmup_steps=min(train_config.warmup_steps, num_steps // 10),
        eval_every=math.ceil(num_steps / _NUM_EVALUATIONS),
        checkpoint_every=math.ceil(num_steps / _NUM_CHECKPOINTS),
        log_every=math.ceil(num_steps / _NUM_EVALUATIONS),
    )
    return dataclasses.replace(config, train=settings)


def _train_and_score(member: Member, budget: float, root: Path, out: Path, device: str, log: Log) -> Result:
    split = member.split
    flops_per_byte = flops_per_predicted_byte(build_model(member.config), member.config)
    config, run = with_budget(member.config, flops_per_byte, budget), out / member.name
    train_paths, valid_paths = matching(root, split.train), matching(root, split.valid)
    codec = build_codec(config.codec)
    test = build_shards(matching(root, split.test), codec, out / "data", log)
    data = build_shards(train_paths, codec, out / "data", log)
    if num_shared := shared_items(test, data, by_line=config.codec.modality == "text"):
        log(f"{num_shared} items of {split.test} are in {split.train} as well: its figures will look better than they are")
    is_begun = (run / "config.json").exists()
    trained = train(config, train_paths, valid_paths, run, resume=is_begun, device=device, log=log, data_cache=out / "data")
    metrics = [json.loads(line) for line in (run / "metrics.jsonl").read_text(encoding="utf-8").splitlines()]
    model = load_model(run / "export", device)
    items = test_items(test, split)
    log(f"{member.name} is scored on {len(items)} items, {sum(map(len, items))} bytes")
    return Result(
        name=member.name,
        group=member.group,
        num_parameters=model.num_parameters(),
        flops_per_byte=flops_per_byte,
        num_steps=trained.steps,
        training_flops=_BACKWARD * flops_per_byte * trained.bytes_seen,
        bytes_seen=trained.bytes_seen,
        seconds=metrics[-1]["seconds"],
        device=device,
        basic=_measure(model, items),
        sliding=_measure(model, items, **options) if (options := sliding_options(model)) else None,
        num_words=sum(len(item.tobytes().split()) for item in items) if split.segment_bytes else 0,
        curve=[
            (_BACKWARD * flops_per_byte * line["bytes_seen"], line["valid_bits_per_byte"])
            for line in metrics
            if line["valid_bits_per_byte"] is not None
        ],
    )


def test_items(test: ByteData, split: Split) -> list[np.ndarray]:
    """The pictures, sounds or pieces of text that are scored, evenly spread over the test data."""
    borders = list(zip(test.document_offsets[:-1].tolist(), test.document_offsets[1:].tolist(), strict=True))
    if size := split.segment_bytes:
        borders = [(start, start + size) for first, end in borders for start in range(first, end - size + 1, size)]
    if not borders:
        raise UserError(f"{split.test} has no piece of {split.segment_bytes} bytes; give a longer text")
    count = min(split.test_items or len(borders), len(borders))
    chosen = [borders[index * len(borders) // count] for index in range(count)]
    return [np.array(test.bytes[start:end]) for start, end in chosen]


def _measure(model: ByteModel, items: list[np.ndarray], **options: Any) -> Measurement:
    scores = score(model, items, **options)
    return Measurement(
        item_bits=[result.total_bits for result in scores],
        item_bytes=[result.num_bytes for result in scores],
        window=scores[0].window,
        hop=scores[0].hop,
        strided=scores[0].strided,
    )


def sliding_options(model: ByteModel) -> dict[str, Any]:
    """Windows that overlap by half, read twice half a patch apart where the patch is even; nothing for whole pictures.

    Nothing for a Perceiver AR either: its windows overlap in the basic protocol already.
    """
    context, patch_size = model.config.max_seq_len, model.config.patch_size
    if isinstance(model.codec_config, ImageCodecConfig) or model.config.num_predicted(context) < context:
        return {}
    return {"hop": context // 2 // patch_size * patch_size, "strided": patch_size % 2 == 0}


def matching(root: Path, pattern: str) -> list[Path]:
    """The files and folders below `root` that a name of a split stands for.

    Raises:
        UserError: if there is none.
    """
    if found := sorted(root.glob(pattern)):
        return found
    raise UserError(f"{root / pattern} is missing; lay out the data as the README says, below the folder given with --data")


def _digest(plan: Plan) -> str:
    """Of the models, their data and how they are read and measured: all may have changed since a comparison was begun."""
    lengths = [lengths_read(member.config) for member in plan.members]
    measured = [field.name for field in dataclasses.fields(Result)]
    return hashlib.sha256(repr((plan.members, lengths, measured)).encode()).hexdigest()[:16]


def _claim(out: Path, facts: dict[str, Any], resume: bool) -> None:
    """Makes sure that `out` is new, or holds this comparison and is to be resumed."""
    saved = out / "plan.json"
    if resume:
        if not saved.exists():
            raise UserError(f"{out} holds no comparison to resume; leave out --resume to start one")
        for name, value in facts.items():
            was = read_json(saved).get(name)
            if name == "models" and was != value:
                raise UserError(f"{out} was begun when the plan had other models; begin it again in another folder")
            if was != value:
                raise UserError(
                    f"{out} was begun with {name} {was}, not {value}; resume it with the same, or choose another folder"
                )
        return
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise UserError(f"{out} exists and is not empty; resume its comparison with --resume or give --out another folder")
    out.mkdir(parents=True, exist_ok=True)
    write_json(saved, facts)
