"""Controls that both tabs have: the sample files and the list of models."""

from collections.abc import Sequence
from pathlib import Path

import gradio as gr

from app.service import Service

SAMPLES_FOLDER = Path(__file__).parents[1] / "samples"
SAMPLES = {"Picture": "lake.png", "Sound": "vowels.wav", "Text": "lamp.txt"}


def sample_buttons(file: gr.File, prefix: str) -> None:
    """A row of buttons that put one of the sample files into `file`, or all of them if it takes several."""
    paths = {label: str(SAMPLES_FOLDER / name) for label, name in SAMPLES.items()}
    choices: dict[str, str | list[str]] = dict(paths)
    if file.file_count == "multiple":
        choices = {label: [path] for label, path in paths.items()} | {"All": list(paths.values())}
    with gr.Row(elem_classes="samples"):
        gr.HTML("<span class='caption'>or try</span>", min_width=0)
        for label, value in choices.items():
            button = gr.Button(label, size="sm", min_width=0, elem_id=f"{prefix}-sample-{label.lower()}")
            button.click(lambda value=value: value, None, file, show_progress="hidden", api_visibility="private")


def model_choices(service: Service) -> list[tuple[str, str]]:
    """Dropdown entries: the model that suits the file first, then every model by name."""
    models = [(f"{m.name}: {m.modality}, {m.num_parameters / 1e6:.1f} M parameters", m.name) for m in service.models()]
    return [("Chosen by the content", ""), *models]


def title_of(names: Sequence[str]) -> str:
    """What a list calls some files, or whatever else goes together."""
    return names[0] if len(names) == 1 else f"{names[0]} and {len(names) - 1:,} more"
