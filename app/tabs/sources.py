"""Controls that both tabs have: the sample files and the list of models."""

from pathlib import Path

import gradio as gr

from app.service import Service

SAMPLES_FOLDER = Path(__file__).parents[1] / "samples"
SAMPLES = {"Picture": "lake.png", "Sound": "vowels.wav", "Text": "lamp.txt"}


def sample_buttons(file: gr.File, prefix: str) -> None:
    """A row of buttons that put one of the sample files into `file`."""
    with gr.Row(elem_classes="samples"):
        gr.HTML("<span class='caption'>or try a</span>", min_width=0)
        for label, name in SAMPLES.items():
            button = gr.Button(label, size="sm", min_width=0, elem_id=f"{prefix}-sample-{label.lower()}")
            path = str(SAMPLES_FOLDER / name)
            button.click(lambda path=path: path, None, file, show_progress="hidden", api_visibility="private")


def model_choices(service: Service) -> list[tuple[str, str]]:
    """Dropdown entries: the model that suits the file first, then every model by name."""
    models = [(f"{m.name}: {m.modality}, {m.num_parameters / 1e6:.1f} M parameters", m.name) for m in service.models()]
    return [("Chosen by the file's content", ""), *models]
