"""The linked views of long files in a headless Chromium: the time until they are drawn, and that of a frame while they scroll.

python -m tests.benchmarks.views [--json] [MEGABYTES ...]

The scores are made up, so that only the page is measured: reading the file of scores, the first drawing, and for the hex and the
text view 120 steps through the file. A frame is the script's own work; an interval is the time from one frame to the next, which
is no less than the screen's.
"""

import argparse
import json
import os
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

os.environ.setdefault("GRADIO_ANALYTICS_ENABLED", "False")

import gradio as gr
import numpy as np

from app.media import modality_of
from app.service import FileScore
from app.ui import launch_options
from app.views import factory, score_values
from core.codecs import Raw, build_codec
from core.config import TextCodecConfig
from core.likelihood import Expectation
from tests.browsing import CHROMIUM

MEGABYTE = 1_000_000
OPEN_LIMIT_MS, FRAME_LIMIT_MS = 1000.0, 16.0
SCROLL = """async ([selector, steps]) => {
  const stage = document.querySelector(selector);
  const [frames, intervals] = [[], []];
  const frame = () => new Promise(requestAnimationFrame);
  let before = await frame();
  for (let step = 0; step < steps; step++) {
    stage.scrollTop = (step / steps) * (stage.scrollHeight - stage.clientHeight);
    await frame();
    const now = await frame();
    frames.push(Number(stage.dataset.drawms));
    intervals.push((now - before) / 2);
    before = now;
  }
  return { frames, intervals };
}"""


def made_up_score(num_bytes: int) -> FileScore:
    """A text of random words with scores of the shape that real ones have."""
    draw = np.random.default_rng(0)
    media, codec = Raw(draw.choice(np.frombuffer(b"etaoin shrdlu\\n", np.uint8), num_bytes)), build_codec(TextCodecConfig())
    _, layout = codec.encode(media)
    bits = draw.gamma(1.0, 2.0, num_bytes).astype(np.float32)
    likeliest = draw.integers(0, 256, (num_bytes, 5), dtype=np.uint8)
    expected = Expectation(
        draw.integers(0, 256, num_bytes, dtype=np.uint8),
        bits.astype(np.float16) / 2,
        likeliest,
        likeliest.astype(np.float16) / 32,
    )
    return FileScore(
        file=Path(f"{num_bytes}.txt"), model="none", modality=modality_of(media), scored_as="media", num_bytes=num_bytes,
        total_bits=float(bits.sum()), bits_per_byte=float(bits.mean()), window=8192, hop=8192, strided=False, engine="none",
        notes=(), bits=bits, expected=expected, layout=layout, media=media, codec=codec,
    )  # fmt: skip


@contextmanager
def served(items: dict[int, dict[str, Any]]) -> Iterator[str]:
    """A page with the views and a button for each item."""
    with gr.Blocks() as page:
        view = factory.likelihood_view()
        for number, item in items.items():
            button = gr.Button(str(number), elem_id=f"open-{number}")
            button.click(lambda item=item: {"items": [item]}, None, view, api_visibility="private")
    options = launch_options(cancel=lambda event, endpoint: False) | {"quiet": True, "prevent_thread_lock": True}
    _, url, _ = page.launch(**options)
    try:
        yield url
    finally:
        page.close(verbose=False)


def measure(page: Any, number: int) -> dict[str, Any]:
    """The figures of one file."""
    page.click(f"#open-{number}")
    page.wait_for_function(
        "n => document.querySelector('#headline-view .subtitle')?.textContent.startsWith(n)", arg=f"{number}.txt"
    )
    page.wait_for_selector("#hex-view[data-ready]", timeout=60_000)
    page.wait_for_timeout(500)
    facts: dict[str, Any] = {"num_bytes": number, "open_ms": float(page.get_attribute(".byte-book", "data-openms"))}
    for view in ("hex", "text"):
        found = page.evaluate(SCROLL, [f"#{view}-view .stage", 120])
        facts |= {f"{view}_frame_ms": float(np.median(found["frames"])), f"{view}_longest_frame_ms": max(found["frames"])}
        facts[f"{view}_interval_ms"] = float(np.median(found["intervals"]))
    return facts


def main(arguments: list[str]) -> int:
    """Measures and prints; 1 if a megabyte took longer than the page promises."""
    from playwright.sync_api import sync_playwright

    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("megabytes", nargs="*", type=int, default=[1, 16], metavar="MEGABYTES")
    parser.add_argument("--json", action="store_true", help="one JSON object a file")
    args = parser.parse_args(arguments)
    is_slow = False
    with tempfile.TemporaryDirectory() as folder, sync_playwright() as driver:
        items = {n * MEGABYTE: score_values.item(made_up_score(n * MEGABYTE), Path(folder)) for n in args.megabytes}
        with served(items) as url:
            browser = driver.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox", "--disable-gpu"])
            page = browser.new_page(viewport={"width": 1280, "height": 900})
            page.goto(url)
            page.wait_for_selector(f"#open-{next(iter(items))}")
            page.wait_for_timeout(1000)
            for number in items:
                facts = measure(page, number)
                print(
                    json.dumps(facts) if args.json else "  ".join(f"{name} {value:g}" for name, value in facts.items()),
                    flush=True,
                )
                longest = max(facts["hex_longest_frame_ms"], facts["text_longest_frame_ms"])
                is_slow |= longest > FRAME_LIMIT_MS or (number <= MEGABYTE and facts["open_ms"] > OPEN_LIMIT_MS)
            browser.close()
    return int(is_slow)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
