"""Makes a shipped model: `python -m weights.make_model NAME ROOT --out RUN` trains and measures it as its card says.

ROOT holds the data sets as the project's README lays them out. RUN becomes a run of `python -m app train`, which goes on with
--resume, and RUN/shipped the folder that belongs in weights/: the weights with the best validation, and a card with what they
reach on the test set. On an H100 each takes 2 to 18 minutes.
"""

import argparse
import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from core.checkpoint import export_model, load_checkpoint, load_model
from core.codecs import build_codec
from core.compare import matching, sliding_options
from core.data import build_shards, shared_items
from core.distributed import usable_device
from core.errors import UserError
from core.likelihood import score
from core.models import ByteModel
from core.plans import split_of
from core.presets import preset
from core.train import train

Log = Callable[[str], Any]


@dataclass(frozen=True, kw_only=True)
class Facts:
    """What a card says that no run can know.

    Attributes:
        split: the data, by its name in `core.plans`.
        classical_coders: bits per byte of the test set by coder, measured with those programs.
    """

    split: str
    data: str
    license_note: str
    classical_coders: dict[str, float]


_CLIPS = "524 wake-word and short-phrase clips, 16 kHz (MycroftAI Precise-Community-Data, training split)"
_CLIPS_LICENSE = "clips dedicated to the public domain by their contributors"
FACTS = {
    "text": Facts(
        split="text",
        data="73 English novels of 1847 to 1922 (computationalstylistics/100_english_novels, training split)",
        license_note="novels in the US public domain by age; the collection states no licence",
        classical_coders={
            "PPMd order 16, having read the training text": 1.656,
            "PPMd order 16": 1.773,
            "bzip2": 2.086,
            "xz": 2.224,
        },
    ),
    "image32": Facts(
        split="image32",
        data="CIFAR-10 training images, 32x32 RGB; half of them mirrored when read",
        license_note="CIFAR-10 states no licence; research use is customary, cite Krizhevsky 2009",
        classical_coders={"WebP, each image": 4.611, "PNG, each image": 5.870, "xz": 6.072},
    ),
    "image64": Facts(
        split="image64",
        data="photographs scaled to 64x64 RGB; half of them mirrored when read",
        license_note="photographs of 15 public collections under their own licences; only the weights are distributed",
        classical_coders={"WebP": 4.355},
    ),
    "audio": Facts(
        split="audio",
        data=f"{_CLIPS} as mu-law; changed in gain and polarity when read",
        license_note=_CLIPS_LICENSE,
        classical_coders={"8-bit FLAC": 4.326, "xz": 4.377, "bzip2": 4.397},
    ),
    "audio-pcm16": Facts(
        split="audio",
        data=f"{_CLIPS} as 16-bit samples; changed in gain and polarity when read",
        license_note=_CLIPS_LICENSE,
        classical_coders={"FLAC": 4.004},
    ),
}


def make_model(name: str, root: Path, out: Path, *, resume: bool = False, device: str = "auto", log: Log) -> dict[str, Any]:
    """Trains the preset `name` in the folder `out` and leaves it ready to ship in `out`/shipped; its card.

    Raises:
        UserError: if data is missing, a test item is in the training data, or `out` cannot be used.
    """
    facts, config, place = FACTS[name], preset(name), usable_device(device)
    split, codec, cache = split_of(facts.split, "gpu"), build_codec(config.codec), out.with_name(f"{out.name}-data")
    train_paths, valid_paths = matching(root, split.train), matching(root, split.valid)
    test = build_shards(matching(root, split.test), codec, cache, log)
    data = build_shards(train_paths, codec, cache, log)
    if num_shared := shared_items(test, data, by_line=codec.modality == "text"):
        raise UserError(f"{num_shared} items of {split.test} are in {split.train} as well; take them out of the training data")
    train(config, train_paths, valid_paths, out, resume=resume, device=str(place), log=log, data_cache=cache)
    trained, model = load_checkpoint(out / "export"), load_model(out / "export", str(place))
    card = {
        **trained.card,
        "data": f"{facts.data}, {len(data):,} bytes",
        "license_note": facts.license_note,
        "classical_coders_test": facts.classical_coders,
        "training_flops": float(f"{3 * trained.card['flops_per_byte'] * trained.card['bytes_seen']:.3g}"),
        "trained_on": torch.cuda.get_device_name(place) if place.type == "cuda" else "a CPU",
    }
    items = [test.bytes[start:end] for start, end in zip(test.document_offsets[:-1], test.document_offsets[1:], strict=True)]
    for protocol, options in {"test": {}, "test_strided_sliding": sliding_options(model)}.items():
        if options or protocol == "test":
            card["bits_per_byte"][protocol] = _measured(model, items, options)
            log(f"{name}, {protocol}: {card['bits_per_byte'][protocol]['value']:.4f} bits/byte")
    export_model(out / "shipped", trained.config, trained.tensors, card)
    return card


def _measured(model: ByteModel, items: list, options: dict[str, Any]) -> dict[str, Any]:
    scores = score(model, items, **options)
    num_bytes = sum(result.num_bytes for result in scores)
    slides = scores[0].hop < scores[0].window
    return {
        "value": sum(result.total_bits for result in scores) / num_bytes,
        "protocol": ", ".join(["strided"] * scores[0].strided + ["sliding"] * slides) or "basic",
        "window": scores[0].window,
        "hop": scores[0].hop,
        "num_bytes": num_bytes,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("name", choices=FACTS, metavar="NAME", help=", ".join(FACTS))
    parser.add_argument("root", type=Path, metavar="ROOT", help="folder of the data sets")
    parser.add_argument("--out", type=Path, required=True, metavar="RUN", help="folder of the run")
    parser.add_argument("--resume", action="store_true", help="go on with the run in --out")
    parser.add_argument("--device", default="auto", help="cpu, cuda, or auto: a GPU if there is one (%(default)s)")
    args = parser.parse_args()
    options = {"resume": args.resume, "device": args.device, "log": lambda line: print(line, flush=True)}
    try:
        print(json.dumps(make_model(args.name, args.root, args.out.resolve(), **options), indent=1))
    except UserError as error:
        raise SystemExit(f"error: {error}") from None


if __name__ == "__main__":
    main()
