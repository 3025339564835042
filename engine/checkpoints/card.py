"""README.md of an exported folder: the card that the Hugging Face Hub shows; nothing is sent or looked up."""

from __future__ import annotations

from collections.abc import Sequence
from importlib.metadata import version

from huggingface_hub import ModelCard, ModelCardData

from ..data.pixels import Pixels
from ..utils.text import printable

TAGS = ["chest-x-ray", "medical", "multi-label-classification", "pspg"]
SHOWN = 200
"""class names that a card lists"""
USE = {
    "pspg-engine": 'model = pspg.load_model("hf-hub:OWNER/NAME")  # or this folder\n'
    'model.set_classes(["edema", "a finding of your own"])\n'
    'probabilities = model.probabilities(["a.dcm", "b.png"])',
    "classifier": 'model = pspg.load_model("hf-hub:OWNER/NAME")  # or this folder\n'
    'probabilities = model.probabilities(["a.dcm", "b.png"])  # columns: model.class_names',
    "published": "# the layout of the published code: pspg-engine import-checkpoint --source model.safetensors "
    "--class_names classes.txt --output FOLDER",
    "clip": "# a backbone: pspg-engine train --model.pretrained hf-hub:OWNER/NAME, or this folder",
}
"""layout → lines of Python"""


def export_card(
    layout: str, *, class_names: Sequence[str] | None, pixels: Pixels, training: str | None, plugins: Sequence[str]
) -> str:
    """The card of an export. No licence is stated: weights have the one that their data allow.

    Args:
        layout: a key of USE.
        class_names: trained on, or frozen; None: a CLIP of phase 1.
        pixels: what the model sees of an image.
        training: what it was trained on; None: not recorded.
        plugins: modules that have to be imported before.
    """
    kind = {"clip": "CLIP for radiographs", "classifier": "Frozen chest-radiograph classifier"}
    title = kind.get(layout, "Pseudo-Prompt Generating (PsPG) for chest radiographs")
    parts = [f"# {title}", "**Not for clinical use.** A research model: its scores are no diagnosis."]
    parts += ["## Use", f"```python\nimport pspg.engine as pspg\n\n{USE[layout]}\n```"]
    if plugins:
        parts.append(f"It needs modules of its author's: import {', '.join(map(printable, plugins))} before.")
    parts += ["## Training data", printable(training) if training else "Not recorded."]
    if class_names is not None:
        more = f", and {len(class_names) - SHOWN} more" if len(class_names) > SHOWN else ""
        listed = ", ".join(map(printable, class_names[:SHOWN])) + more
        parts += [f"## Classes ({len(class_names)})", listed]
    side = f"{pixels.size} × {pixels.size}"
    resized = "stretched" if pixels.resize == "stretch" else "padded with black"
    scaled = f"mean {pixels.mean:.4f}, standard deviation {pixels.std:.4f}"
    parts += ["## Input", f"Grey images, {resized} to {side}, {scaled}."]
    parts.append(f"Exported by pspg-engine {version('pspg-engine')}.")
    data = ModelCardData(library_name="pspg-engine", tags=TAGS, pipeline_tag="zero-shot-image-classification")
    return str(ModelCard(f"---\n{data.to_yaml()}\n---\n\n" + "\n\n".join(parts) + "\n"))
