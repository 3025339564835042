"""A residual on the text features of the training classes: what prompts and text tower cannot say of a class."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from pspg.kernels.precision import no_autocast


class ClassResidual(nn.Module):
    """Trained vectors that are added to unit text features, for the training classes alone.

    w = unit(ŵ + δ). δ starts at zero. A class that was never trained on has none: its features stay as they are, to the
    last bit, so that zero-shot scores are those without a residual.

    Args:
        sides: 2 for positive and negative prompts, 1 for positive ones only.
        classes: K training classes.
        width: D.
    """

    def __init__(self, sides: int, classes: int, width: int) -> None:
        super().__init__()
        self.offsets = nn.Parameter(torch.zeros(sides, classes, width))

    def forward(self, features: Tensor, rows: Tensor) -> Tensor:
        """Unit features (G,C,D).

        Args:
            features: (G,C,D) unit text features, float32 or better, G the number of sides.
            rows: (C,) place of each class among the training classes, −1 for another.
        """
        with no_autocast(features):
            moved = F.normalize(features + self.offsets[:, rows.clamp(min=0)], dim=-1)
            return torch.where((rows >= 0)[:, None], moved, features)
