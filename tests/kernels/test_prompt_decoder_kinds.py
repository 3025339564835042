"""LSTM, Transformer and MLP decoders: the references against torch's modules, the exact algebra against those."""

from __future__ import annotations

from statistics import median
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from pspg.kernels.prompt_decoder import KINDS, DecoderKind, decode
from pspg.kernels.prompt_decoder import Inputs as DecoderInputs

WIDTH, HIDDEN, HEADS = 6, 4, 2


class Torch(nn.Module):
    """One decoder out of torch's own modules; its parameters carry the published names."""

    def __init__(self, kind: str, blocks: int = 2) -> None:
        super().__init__()
        self.kind = kind
        if kind == "mlp":
            self.mlp = nn.Sequential(nn.Linear(WIDTH, HIDDEN))
            return
        self.encoder_proj = nn.Linear(WIDTH, HIDDEN)
        if kind == "transformer":
            self.input_proj = nn.Linear(WIDTH, HIDDEN)
            self.resblocks = nn.ModuleList(nn.Module() for _ in range(blocks))
            for block in self.resblocks:
                block.self_attn, block.cross_attn = (nn.MultiheadAttention(HIDDEN, HEADS) for _ in range(2))
                block.ln_1, block.ln_2, block.ln_3 = (nn.LayerNorm(HIDDEN) for _ in range(3))
                block.mlp = nn.Sequential(nn.Linear(HIDDEN, 4 * HIDDEN), nn.ReLU(), nn.Linear(4 * HIDDEN, HIDDEN))
        else:
            self.lstm = nn.LSTMCell(WIDTH, HIDDEN)
            self.self_attention = nn.Module()
            self.self_attention.self_attention = nn.MultiheadAttention(HIDDEN, HEADS)
            self.self_attention.fc = nn.Linear(HIDDEN, HIDDEN)
            self.self_attention.layer_norm = nn.LayerNorm(HIDDEN)
            self.encoder_attention = nn.MultiheadAttention(HIDDEN, HEADS)
            self.fc = nn.Linear(HIDDEN, WIDTH)

    def forward(self, t: Tensor, context: Tensor, n: int) -> Tensor:
        if self.kind == "mlp":
            x = self.mlp(t)
            return x * torch.sigmoid(1.702 * x)
        run = self._transformer if self.kind == "transformer" else self._lstm
        return torch.stack(run(t, self.encoder_proj(context), n), dim=1)

    def _transformer(self, t: Tensor, c: Tensor, n: int) -> list[Tensor]:
        x, outputs = self.input_proj(t), []
        for _ in range(n):
            for block in self.resblocks:
                y = block.ln_1(x)
                x = x + block.self_attn(y, y, y)[0]
                x = x + block.cross_attn(block.ln_2(x), c, c)[0]
                x = x + block.mlp(block.ln_3(x))
            outputs.append(x)
        return outputs

    def _lstm(self, x: Tensor, c: Tensor, n: int) -> list[Tensor]:
        attention, outputs = self.self_attention, []
        h = cell = x.new_zeros(len(x), HIDDEN)
        for _ in range(n):
            h, cell = self.lstm(x, (h, cell))
            y = attention.layer_norm(h + attention.self_attention(h, h, h)[0])
            h = attention.layer_norm(attention.fc(y) + h)
            x = self.fc(h + self.encoder_attention(c, h, h)[0].mean(dim=0, keepdim=True))
            outputs.append(x)
        return outputs


class Inputs:
    """G decoders with random weights, and what they read; float64, all of it wanting gradients."""

    def __init__(
        self, kind: str, *, classes: int = 3, images: int = 2, count: int = 2, blocks: int = 2, seed: int = 0
    ) -> None:
        torch.manual_seed(seed)
        self.kind = kind
        self.modules = [Torch(kind, blocks).double() for _ in range(count)]
        for module in self.modules:
            for parameter in module.parameters():
                nn.init.normal_(parameter, std=0.5)
        self.names = [name for name, _ in self.modules[0].named_parameters()]
        self.features, self.context = (torch.randn(rows, WIDTH).double().requires_grad_() for rows in (classes, images))
        weights = [parameter for module in self.modules for parameter in module.parameters()]
        self.leaves: list[Tensor] = [self.features, self.context, *weights]

    def decode(self, leaves: list[Tensor], n: int, impl: str, **options: Any) -> Tensor:
        size = len(self.names)
        decoders = [
            dict(zip(self.names, leaves[2 + i * size : 2 + (i + 1) * size], strict=True))
            for i in range(len(self.modules))
        ]
        options = {"kind": self.kind, "prompt_length": n, "heads": HEADS, "impl": impl, **options}
        return decode(decoders, leaves[0], leaves[1], **options)

    def outcome(self, leaves: list[Tensor], n: int, impl: str, **options: Any) -> list[Tensor]:
        """Outputs, and the gradients of a combination of them."""
        outputs = self.decode(leaves, n, impl, **options)
        weights = torch.linspace(-1, 1, outputs.numel(), dtype=torch.float64).view(outputs.shape)
        gradients = torch.autograd.grad((outputs * weights).sum(), leaves, allow_unused=self.kind == "mlp")
        return [outputs.detach(), *(torch.zeros(()) if g is None else g for g in gradients)]


OTHERS = ["lstm", "transformer", "mlp"]


@pytest.mark.parametrize("kind", OTHERS)
@pytest.mark.parametrize(("classes", "images", "n"), [(1, 1, 1), (5, 3, 4), (2, 7, 16)])
def test_reference_equals_torch_modules(kind: str, classes: int, images: int, n: int) -> None:
    inputs = Inputs(kind, classes=classes, images=images)
    outputs = inputs.decode(inputs.leaves, n, "reference")
    shape = {"lstm": (n, WIDTH), "transformer": (n, HIDDEN), "mlp": (HIDDEN,)}[kind]
    assert outputs.shape == (2, classes, *shape)
    for module, output in zip(inputs.modules, outputs, strict=True):
        torch.testing.assert_close(output, module(inputs.features, inputs.context, n), rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("kind", ["lstm", "transformer"])
@pytest.mark.parametrize("classes", [1, 2, 14])
@pytest.mark.parametrize("images", [1, 7])
@pytest.mark.parametrize("n", [1, 4, 16])
@pytest.mark.parametrize("count", [1, 2])
def test_exact_algebra_equals_the_reference(kind: str, classes: int, images: int, n: int, count: int) -> None:
    inputs = Inputs(kind, classes=classes, images=images, count=count)
    expected, got = (inputs.outcome(inputs.leaves, n, impl) for impl in ("reference", "eager"))
    for one, other in zip(got, expected, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-10, atol=1e-11)


@pytest.mark.parametrize("blocks", [1, 3])
def test_dropped_branches(blocks: int) -> None:
    """Factors reach the branch of their decoder, step, block and class; a class whose branches are all 0 stays put."""
    inputs = Inputs("transformer", blocks=blocks)
    branches = 2 * torch.randint(0, 2, (2, 4, blocks, 3, 3)).double()
    branches[1, :, :, :, 2] = 0
    expected, got = (inputs.outcome(inputs.leaves, 4, impl, branches=branches) for impl in ("reference", "eager"))
    for one, other in zip(got, expected, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-10, atol=1e-11)
    start = inputs.modules[1].input_proj(inputs.features)[2]
    torch.testing.assert_close(got[0][1, 2], start.detach().expand(4, -1))
    assert not torch.allclose(got[0], inputs.decode(inputs.leaves, 4, "eager").detach())


@pytest.mark.parametrize("kind", ["lstm", pytest.param("transformer", marks=pytest.mark.slow), "mlp"])
def test_gradcheck(kind: str) -> None:
    inputs = Inputs(kind, count=1, classes=2, blocks=1)
    for impl in ("reference", "eager"):
        assert torch.autograd.gradcheck(lambda *leaves, impl=impl: inputs.decode(list(leaves), 2, impl), inputs.leaves)


@pytest.mark.parametrize("kind", ["lstm", "transformer"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_autocast(kind: str, dtype: torch.dtype) -> None:
    """No further from float64 than the reference under the same autocast; gradients in the inputs' own dtype.

    The median of several draws: a single one may amplify rounding.
    """
    errors: dict[str, list[float]] = {"reference": [], "eager": []}
    for seed in range(9):
        inputs = Inputs(kind, classes=5, images=7, seed=seed)
        exact = inputs.outcome(inputs.leaves, 4, "reference")
        single = [leaf.detach().float().requires_grad_() for leaf in inputs.leaves]
        for impl in errors:
            with torch.autocast("cpu", dtype):
                got = inputs.outcome(single, 4, impl)
            assert all(tensor.dtype == torch.float32 for tensor in got[1:])
            errors[impl].append(sum(((a - b).norm() / b.norm()).item() for a, b in zip(got, exact, strict=True)))
        assert got[0].dtype == dtype
    assert median(errors["eager"]) <= 1.5 * median(errors["reference"])


@pytest.mark.parametrize("kind", OTHERS)
def test_refuses_what_does_not_fit(kind: str) -> None:
    inputs = Inputs(kind)
    with pytest.raises(ValueError, match="3 heads"):
        inputs.decode(inputs.leaves, 1, "auto", heads=3)
    with pytest.raises(ValueError, match="impl='triton'"):
        inputs.decode(inputs.leaves, 1, "triton")
    narrow = [inputs.features, inputs.context[:, :2], *inputs.leaves[2:]]
    with pytest.raises(ValueError, match="context"):
        inputs.decode(narrow, 1, "auto")
    if kind != "transformer":
        with pytest.raises(ValueError, match="branches are the transformer's"):
            inputs.decode(inputs.leaves, 1, "auto", branches=torch.ones(2, 1, 2, 3, 3))


def test_kinds_are_declared_under_their_names() -> None:
    assert all(kind.name == name for name, kind in KINDS.items())


def test_an_unknown_kind_is_named() -> None:
    inputs = Inputs("mlp")
    with pytest.raises(ValueError, match=r"kind 'rnn' is not known, choose from gru, lstm, transformer, mlp"):
        inputs.decode(inputs.leaves, 1, "auto", kind="rnn")


def test_a_kind_declares_all_that_decoding_needs(monkeypatch: pytest.MonkeyPatch) -> None:
    """A kind that is added to the table is decoded, its first weight checked, its branches passed on."""

    def scaled(inputs: DecoderInputs) -> Tensor:
        factors = 1 if inputs.branches is None else inputs.branches
        return factors * torch.stack([inputs.class_features * p["scale.weight"][0] for p in inputs.decoders])

    kind = DecoderKind("scaled", {"eager": scaled}, first_weight="scale.weight", takes_branches=True)
    monkeypatch.setitem(KINDS, "scaled", kind)
    features, context, decoders = torch.ones(3, WIDTH), torch.ones(2, WIDTH), [{"scale.weight": torch.ones(2, WIDTH)}]
    options: dict[str, Any] = {"prompt_length": 1, "heads": 2, "kind": "scaled"}
    assert torch.equal(decode(decoders, features, context, **options), torch.ones(1, 3, WIDTH))
    doubled = decode(decoders, features, context, branches=torch.tensor(2.0), **options)
    assert torch.equal(doubled, 2 * torch.ones(1, 3, WIDTH))
    with pytest.raises(ValueError, match="3 heads"):
        decode(decoders, features, context, **{**options, "heads": 3})
    with pytest.raises(ValueError, match="impl='triton' is not available"):
        decode(decoders, features, context, impl="triton", **options)


@pytest.mark.parametrize("kind", OTHERS)
@pytest.mark.parametrize("impl", ["eager", "reference"])
def test_images_that_do_not_count_are_as_if_they_were_not_there(kind: str, impl: str) -> None:
    inputs, present = Inputs(kind, classes=5, images=7), torch.tensor([True, False, True, True, False, False, True])
    context = inputs.context.detach()[present].requires_grad_()
    expected = inputs.outcome([inputs.features, context, *inputs.leaves[2:]], 4, "reference")
    got = inputs.outcome(inputs.leaves, 4, impl, present=present)
    if kind != "mlp":
        assert not got[2][~present].any()
        got[2] = got[2][present]
    for one, other in zip(got, expected, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-10, atol=1e-11)
