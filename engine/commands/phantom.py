"""`pspg-engine phantom`: draw a phantom data set."""

from __future__ import annotations

import logging
from dataclasses import asdict, dataclass

from ..config import require
from ..data.phantoms.dataset import PhantomConfig, write_phantoms
from ..utils.files import check_output

log = logging.getLogger(__name__)

USES = {
    "train": "so nothing can be trained on it",
    "val": "so leave data.val out; a training then keeps its last epoch as the best",
    "test": "so evaluate on another split",
}
"""split → what an empty one means"""


@dataclass(kw_only=True)
class DrawConfig(PhantomConfig):
    """Draw phantom chest radiographs with reports and labels: crude pictures to train and test on, no clinical data."""

    output: str = ""
    """new folder; one that already holds the same phantoms is kept"""


def draw(config: DrawConfig) -> None:
    """Write the images, manifests and class lists to `config.output`.

    Raises:
        UserError: impossible settings, or a folder that holds anything else.
    """
    require(output=config.output)
    check_output(config.output)
    settings = asdict(config)
    output = settings.pop("output")
    write_phantoms(PhantomConfig(**settings), output)
    log.info(f"{config.train + config.val + config.test} images: {config.output}")
    for split, use in USES.items():
        if getattr(config, split) == 0:
            log.info(f"{split} 0: {split}.jsonl is empty, {use}")
