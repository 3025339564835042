"""An adapter for `pspg-engine evaluate --adapter`: an open_clip model with one or more templates a side, averaged.

    MODEL=ViT-B-16 WEIGHTS=openai pspg-engine evaluate --adapter configs/adapters/open_clip_templates.py \\
        --manifest data/test.jsonl --output report

Copy it and let the three functions run another model.
"""

import os
from functools import cache

import open_clip
import torch
from torchvision.transforms import v2

MODEL = os.environ.get("MODEL", "ViT-B-16")  # a model name, or local-dir:FOLDER
WEIGHTS = os.environ.get("WEIGHTS", "openai")
# Names are put in as they are; a class that is an absence, such as No Finding, needs sentences of its own.
POSITIVE = ("Findings suggesting {}.",)
NEGATIVE = ("No evidence of {}.",)

SIZE = open_clip.get_model_config(MODEL)["vision_cfg"]["image_size"]
TRANSFORM = v2.Compose(
    [
        v2.Resize((SIZE, SIZE), v2.InterpolationMode.BICUBIC),
        v2.PILToTensor(),
        v2.ToDtype(torch.float32, scale=True),
        v2.Normalize(open_clip.OPENAI_DATASET_MEAN, open_clip.OPENAI_DATASET_STD),
    ]
)


def load(device):
    """Called once. What it returns goes to `score` as it is."""
    return open_clip.create_model(MODEL, pretrained=WEIGHTS, device=device).eval()


def preprocess(image):
    """A tensor, always of one shape, of an 8-bit RGB image. Called in other processes, which have no loaded model."""
    return TRANSFORM(image)


def score(model, images, class_names):
    """Probabilities (images, classes) in [0, 1] of stacked inputs. Called batch by batch."""
    positive, negative = text_features(model, tuple(class_names), images.device)
    image = model.encode_image(images, normalize=True)
    return torch.sigmoid(model.logit_scale.exp() * image @ (positive - negative).T)


@cache
def text_features(model, names, device):
    """Unit features (classes, width) of both sides, made once for a class list."""
    tokenizer = open_clip.get_tokenizer(MODEL)

    def side(templates):
        texts = [template.format(name) for name in names for template in templates]
        features = model.encode_text(tokenizer(texts).to(device), normalize=True)
        return torch.nn.functional.normalize(features.unflatten(0, (len(names), -1)).mean(1), dim=-1)

    return side(POSITIVE), side(NEGATIVE)
