"""Parts of one's own, as an example: a prompt decoder, a loss, a metric, an image encoder, a data set.

pspg-engine train --plugins configs/plugins/example.py --model.decoder mean --loss.classification squared …
"""

from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import nn

import pspg.engine as pspg
from pspg.engine.data.preparation.dataset import PrepareConfig
from pspg.engine.data.preparation.rows import Row
from pspg.engine.models.decoders import PromptDecoder
from pspg.engine.models.encoders import ImageEncoder
from pspg.engine.training.losses.classification import ClassificationLoss


@pspg.DECODERS.register
class MeanDecoder(PromptDecoder):
    """--model.decoder mean: every vector from the class name, the mean image and its place in the prompt."""

    name = "mean"
    output = "output_proj"

    def __init__(self, sizes):
        super().__init__(sizes)
        self.input_proj = nn.Linear(sizes.width, sizes.hidden_size)
        self.places = nn.Parameter(torch.zeros(sizes.prompt_length, sizes.hidden_size))
        self.output_proj = nn.Linear(sizes.hidden_size, sizes.text_width)

    @classmethod
    def operator(cls, decoders, class_features, context, *, prompt_length, heads, impl):
        inputs = class_features + context.mean(dim=0)  # (C,D)
        hidden = [nn.functional.linear(inputs, p["input_proj.weight"], p["input_proj.bias"]) for p in decoders]
        return torch.stack([torch.tanh(h[:, None] + p["places"]) for h, p in zip(hidden, decoders, strict=True)])


@pspg.CLASSIFICATION_LOSSES.register
class Squared(ClassificationLoss):
    """--loss.classification squared: the squared error of the probabilities (Brier)."""

    name = "squared"

    def __call__(self, logits, labels, *, reduction, impl):
        errors = (torch.softmax(logits.float(), dim=1)[:, 0] - labels.clamp(min=0)) ** 2  # (B,C)
        kept = errors[labels >= 0]
        return kept.sum() if reduction == "sum" else kept.mean()


@pspg.register_metric("brier_skill", "Brier skill")
def brier_skill(labels, probabilities):
    """1 − the squared error over that of always saying each class's prevalence."""
    known = labels >= 0
    prevalence = np.where(known, labels, 0).sum(0) / known.sum(0)
    error, baseline = ((given - labels)[known] ** 2 for given in (probabilities, prevalence + 0 * probabilities))
    return 1 - error.mean() / baseline.mean()


@pspg.ENCODERS.register
class Patches(ImageEncoder):
    """One linear layer on patches, and their mean.

    In the JSON file of model.backbone: "vision_cfg": {"encoder": "patches", "image_size": 64, "patch": 16}
    """

    name = "patches"

    def __init__(self, width, config):
        super().__init__(width, config)
        self.embed = nn.Conv2d(3, width, config["patch"], stride=config["patch"])

    def tokens(self, images):
        local = torch.tanh(self.embed(images)).flatten(2).transpose(1, 2)  # (B,S−1,D)
        return local.mean(1), local


@dataclass(kw_only=True)
class ClinicConfig(PrepareConfig):
    """Manifests from the clinic's film names, such as p017-effusion.png."""


def read(config, journal):
    """Class names and rows; the journal takes notes of what is left out."""
    files = sorted(path.name for path in Path(config.source).glob("*.png"))
    classes = sorted({name.removesuffix(".png").split("-")[1] for name in files})
    rows = [
        Row(
            id=name,
            filepath=name,
            split="train",
            place=name,
            labels=[int(f"-{finding}." in name) for finding in classes],
            patient=name.split("-")[0],
        )
        for name in files
    ]
    return classes, rows


pspg.register_dataset(pspg.DataSet("clinic", "manifests from the clinic's film names", ClinicConfig, read))
