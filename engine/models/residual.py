"""A residual on the text features of the training classes: what prompts and text tower cannot say of a class."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from pspg.kernels.precision import no_autocast

from .novelty import centred

POWER, RIDGE = 3, 0.1
"""of `related_mixing`; chosen by leaving one training class out at a time, on validation phantoms"""


class ClassResidual(nn.Module):
    """Trained vectors that are added to unit text features: w = unit(ŵ + Σ_t m_t δ_t) over training classes t.

    δ starts at zero. A training class has its own, m is one there. Under `residual: class` another class has none: its
    features stay as they are, to the last bit, so that zero-shot scores are those without a residual.

    Args:
        sides: 2 for positive and negative prompts, 1 for positive ones only.
        classes: K training classes.
        width: D.
    """

    def __init__(self, sides: int, classes: int, width: int) -> None:
        super().__init__()
        self.offsets = nn.Parameter(torch.zeros(sides, classes, width))

    def forward(self, features: Tensor, mixing: Tensor) -> Tensor:
        """Unit features (G,C,D).

        Args:
            features: (G,C,D) unit text features, float32 or better, G the number of sides.
            mixing: (C,K), m of each class; a row of zeros: no residual.
        """
        with no_autocast(features):
            moved = F.normalize(features + mixing.to(features.dtype) @ self.offsets, dim=-1)
            return torch.where((mixing != 0).any(dim=1, keepdim=True), moved, features)


def own_mixing(rows: Tensor, classes: int) -> Tensor:
    """m (C,K): one at a class's own place among the K training classes, nothing where `rows` (C,) is −1."""
    return (rows[:, None] == torch.arange(classes, device=rows.device)).float()


@torch.no_grad()
def related_mixing(rows: Tensor, features: Tensor, training: Tensor) -> Tensor:
    """m (C,K) of `residual: related`: classes never trained on borrow from training classes with like names.

    Kernel ridge regression from names to residuals, m_c = k(c,T)·(k(T,T) + λI)⁻¹ with k = max(0, f̃·f̃)³ and λ = 0.1.
    A name unlike all training classes has m near 0. Training classes keep their own residual.

    Args:
        rows: (C,) place among the training classes, −1 for another class.
        features: (C,D) text features of the plain names.
        training: (K,D) those of the training classes.
    """
    own, known = centred(features, training).double(), centred(training, training).double()
    across, among = ((side @ known.T).clamp(min=0) ** POWER for side in (own, known))
    ridge = RIDGE * torch.eye(len(known), dtype=known.dtype, device=known.device)
    borrowed = torch.linalg.solve(among + ridge, across.T).T
    return torch.where((rows >= 0)[:, None], own_mixing(rows, len(known)), borrowed.float())
