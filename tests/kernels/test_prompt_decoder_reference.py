from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from pspg.kernels.prompt_decoder import decode


class Torch(nn.Module):
    """One decoder out of torch's own modules; its parameters carry the published names."""

    def __init__(self, width: int, hidden: int, heads: int) -> None:
        super().__init__()
        self.gru = nn.GRUCell(width, hidden)
        self.encoder_proj = nn.Linear(width, hidden)
        self.self_attention = nn.Module()
        self.self_attention.self_attention = nn.MultiheadAttention(hidden, heads)
        self.self_attention.fc = nn.Linear(hidden, hidden)
        self.self_attention.layer_norm = nn.LayerNorm(hidden)
        self.encoder_attention = nn.MultiheadAttention(hidden, heads)
        self.fc = nn.Linear(hidden, width)
        for parameter in self.parameters():
            nn.init.normal_(parameter, std=0.5)

    def forward(self, x: Tensor, context: Tensor, steps: int) -> Tensor:
        attention, outputs = self.self_attention, []
        c, h = self.encoder_proj(context), x.new_zeros(len(x), self.fc.in_features)
        for _ in range(steps):
            h = self.gru(x, h)
            y = attention.layer_norm(h + attention.self_attention(h, h, h)[0])
            h = attention.layer_norm(attention.fc(y) + h)
            x = self.fc(h + self.encoder_attention(h, c, c)[0])
            outputs.append(x)
        return torch.stack(outputs, dim=1)


def make(classes: int, images: int, *, width: int = 3, hidden: int = 4) -> tuple[list[Torch], Tensor, Tensor]:
    torch.manual_seed(0)
    decoders = [Torch(width, hidden, heads=2).double() for _ in range(2)]
    return decoders, torch.randn(classes, width).double(), torch.randn(images, width).double()


@pytest.mark.parametrize(("classes", "images", "steps"), [(1, 1, 1), (5, 3, 4), (2, 7, 16)])
def test_equals_torch_modules(classes: int, images: int, steps: int) -> None:
    decoders, features, context = make(classes, images)
    weights = [dict(decoder.named_parameters()) for decoder in decoders]
    outputs = decode(weights, features, context, prompt_length=steps, heads=2, impl="reference")
    assert outputs.shape == (2, classes, steps, 3)
    for decoder, output in zip(decoders, outputs, strict=True):
        torch.testing.assert_close(output, decoder(features, context, steps), rtol=1e-12, atol=1e-12)


def test_gradcheck_of_every_input() -> None:
    decoders, features, context = make(2, 2, width=2, hidden=2)
    names = [name for name, _ in decoders[0].named_parameters()]
    weights = [p.detach().requires_grad_() for p in decoders[0].parameters()]

    def run(features: Tensor, context: Tensor, *weights: Tensor) -> Tensor:
        return decode(
            [dict(zip(names, weights, strict=True))], features, context, prompt_length=2, heads=1, impl="reference"
        )

    assert torch.autograd.gradcheck(run, (features.requires_grad_(), context.requires_grad_(), *weights))


def test_refuses_what_does_not_fit() -> None:
    decoders, features, context = make(2, 2)
    weights = [dict(decoders[0].named_parameters())]
    with pytest.raises(ValueError, match="3 heads"):
        decode(weights, features, context, prompt_length=1, heads=3)
    with pytest.raises(ValueError, match="context"):
        decode(weights, features, context[:, :2], prompt_length=1, heads=2)
    with pytest.raises(ValueError, match="impl='triton'"):
        decode(weights, features, context, prompt_length=1, heads=2, impl="triton")
