"""Makes what there is to see and hear of the shipped models: `python -m weights.make_samples ROOT` writes weights/samples/.

A contact sheet for each model of pictures, three sounds for each model of sound, four texts for each model of text, and a
README.md that shows them. ROOT holds the data as the project's README lays it out. On one engine the same weights
give the same bytes again; nothing is picked by hand, the files are spread evenly over the test set.
"""

import argparse
import itertools
import shutil
import tempfile
from pathlib import Path

import numpy as np
import soundfile
from PIL import Image, ImageDraw, ImageFont

from app.service import Completion, ModelInfo, Service
from core.codecs import Picture, read_media
from core.compare import matching
from core.data import ByteData, build_shards
from core.plans import split_of

HERE = Path(__file__).parent
NUM_PICTURES, NUM_SOUNDS, NUM_TEXTS = 16, 3, 4
COMPLETIONS_OF_A_PICTURE = 4
CELL = 64  # pixels, at least, of a picture on the sheet
SHEET_QUALITY = 75  # of WebP
SECONDS = (0.7, 1.05)  # of the sounds that are continued
PROMPT_BYTES, TEXT_BYTES, TEXT_TEMPERATURE = 300, 500, 0.8
_GAP = 6


def spread(items: list, count: int) -> list:
    """`count` items, evenly spread."""
    return [items[index * len(items) // count] for index in range(min(count, len(items)))]


def complete(service: Service, source: Path | None, **settings) -> list[Completion]:
    job = service.complete(source, **settings)
    for _ in job.run():
        pass
    return job.results


def contact_sheet(service: Service, model: ModelInfo, data: ByteData, work: Path) -> Image.Image:
    """Two columns of rows: a test picture, the half that is kept, and four completions of it."""
    codec = service.model(model.path).codec
    side = codec.config.side
    _, layout = codec.encode(Picture(np.zeros((side, side, 3), np.uint8)))
    rows, path = [], work / "picture.png"
    documents = list(itertools.pairwise(data.document_offsets.tolist()))
    for number, (start, end) in enumerate(spread(documents, NUM_PICTURES)):
        picture = codec.decode(data.bytes[start:end], layout)
        codec.write(picture, path)
        job = service.complete(path, model=model.path, keep=0.5, samples=COMPLETIONS_OF_A_PICTURE, seed=number)
        for _ in job.run():
            pass
        rows.append([picture.pixels, job.kept.pixels, *(result.media.pixels for result in job.results)])
    cell = side * -(-CELL // side)
    header, half = 20, -(-len(rows) // 2)
    width = len(rows[0]) * (cell + _GAP)
    sheet = Image.new("RGB", (2 * width + 3 * _GAP, header + half * (cell + _GAP)), "white")
    draw = ImageDraw.Draw(sheet)
    for index, row in enumerate(rows):
        left, top = index // half * (width + 3 * _GAP), header + index % half * (cell + _GAP)
        for column, pixels in enumerate(row):
            enlarged = Image.fromarray(pixels).resize((cell, cell), Image.Resampling.NEAREST)
            sheet.paste(enlarged, (left + column * (cell + _GAP), top))
        if index % half == 0:
            for column, label in enumerate(("original", "kept", "completed")):
                draw.text((left + column * (cell + _GAP), 2), label, fill="black", font=ImageFont.load_default(13))
    return sheet


def sounds(service: Service, model: ModelInfo, data: ByteData, out: Path) -> list[str]:
    """Writes three test sounds whose second half the model made; a line for each."""
    files = [path for path in data.files if SECONDS[0] <= _seconds(path) <= SECONDS[1]]
    lines = []
    for number, path in enumerate(spread(files, NUM_SOUNDS)):
        [result] = complete(service, path, model=model.path, keep=0.5, seed=number)
        name = f"{model.name}-{number + 1}.wav"
        subtype = "ULAW" if result.codec.config.encoding == "mulaw8" else "PCM_16"  # no more bits than the model's bytes have
        soundfile.write(out / name, result.media.samples, result.media.sample_rate, subtype=subtype)
        lines.append(f"- [{name}]({name}): the first {_seconds(path) / 2:.2f} s are recorded, the rest is made")
    return lines


def texts(service: Service, model: ModelInfo, text: bytes) -> list[str]:
    """Four continuations of the test text, as Markdown."""
    lines = []
    for number in range(NUM_TEXTS):
        start = text.index(b"\n\n", (2 * number + 1) * len(text) // (2 * NUM_TEXTS)) + 2
        prompt = text[start : start + PROMPT_BYTES]
        settings = {"num_bytes": TEXT_BYTES, "temperature": TEXT_TEMPERATURE, "seed": number}
        [result] = complete(service, None, model=model.path, text=prompt, **settings)
        whole = result.media.data.tobytes()
        kept, made = (part.decode("utf-8", "replace").strip("\n") for part in (whole[: len(prompt)], whole[len(prompt) :]))
        lines += [f"Kept ({number + 1}):", "", *_quoted(kept), "", "Made:", "", *_quoted(made), ""]
    return lines


def make(root: Path, out: Path, service: Service) -> None:
    """Makes the samples of every shipped model in `out`, in place of those that are there.

    Raises:
        UserError: if a test set is missing.
    """
    sources = {model.name: _test_set(root, model) for model in service.models()}
    if out.exists():
        shutil.rmtree(out)
    out.mkdir(parents=True)
    lines = [
        "# Samples of the shipped models",
        "",
        "Made by `python -m weights.make_samples ROOT` from test files that no model has seen, spread evenly over the test",
        f"sets, none picked by hand. Temperature 1, for text {TEXT_TEMPERATURE}.",
    ]
    for model in service.models():
        lines += ["", f"## {model.name}", ""]
        with tempfile.TemporaryDirectory() as name:
            work = Path(name)
            data = build_shards(sources[model.name], service.model(model.path).codec, work, print)
            if model.modality == "image":
                contact_sheet(service, model, data, work).save(out / f"{model.name}.webp", quality=SHEET_QUALITY, method=6)
                lines += [f"![Test pictures, the half that was kept, and four completions]({model.name}.webp)"]
            elif model.modality == "audio":
                lines += sounds(service, model, data, out)
            else:
                lines += texts(service, model, data.bytes.tobytes())
    (out / "README.md").write_text("\n".join(lines).rstrip("\n") + "\n", encoding="utf-8")


def _test_set(root: Path, model: ModelInfo) -> list[Path]:
    pictures = "image32" if model.max_seq_len == 3 * 32 * 32 else "image64"
    return matching(root, split_of({"image": pictures}.get(model.modality, model.modality), "gpu").test)


def _seconds(path: Path) -> float:
    sound = read_media(path)
    return len(sound.samples) / sound.sample_rate


def _quoted(text: str) -> list[str]:
    return [f"> {line}".rstrip() for line in text.split("\n")]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("root", type=Path, metavar="ROOT", help="folder with the test sets")
    parser.add_argument("--out", type=Path, default=HERE / "samples", help="folder of the samples (%(default)s)")
    args = parser.parse_args()
    make(args.root, args.out, Service(weights=HERE, runs=Path("no-runs")))


if __name__ == "__main__":
    main()
