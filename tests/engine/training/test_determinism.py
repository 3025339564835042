"""A training step has one result: its operators have deterministic forms on a GPU, and runs repeat bit for bit."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from pspg.engine.config import LossConfig, ModelConfig
from pspg.engine.models.pspg import PsPG
from pspg.engine.training.losses import PromptLoss, contrastive_loss

# torch.use_deterministic_algorithms documents these for CUDA tensors. No deterministic form, it raises:
RAISES = {
    *("adaptive_max_pool2d_backward", "_adaptive_avg_pool2d_backward", "_adaptive_avg_pool3d_backward"),
    *("avg_pool3d_backward", "max_unpool2d", "max_unpool3d", "nll_loss_forward", "nll_loss2d_forward"),
    *("fractional_max_pool2d_backward", "fractional_max_pool3d_backward", "_ctc_loss_backward"),
    *("upsample_linear1d_backward", "upsample_bilinear2d_backward", "_upsample_bilinear2d_aa_backward"),
    *("upsample_bicubic2d_backward", "_upsample_bicubic2d_aa_backward", "upsample_trilinear3d_backward"),
    *("reflection_pad1d_backward", "reflection_pad2d_backward", "reflection_pad3d_backward"),
    *("grid_sampler_2d_backward", "grid_sampler_3d_backward", "histc", "bincount", "median", "put", "put_"),
}
# It varies unless the setting is on (index_put that accumulates is sorted on a GPU, and does not vary there):
VARIES = {
    *("index_add", "index_add_", "scatter_add", "scatter_add_", "scatter_reduce", "scatter_reduce_", "cumsum"),
    *("index_copy", "index_copy_", "convolution_backward", "embedding_dense_backward", "repeat_interleave"),
    *("replication_pad1d_backward", "replication_pad2d_backward", "replication_pad3d_backward"),
}


class Operators(TorchDispatchMode):
    """Names of all operators that run."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: set[str] = set()

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.seen.add(function.overloadpacket.__name__)
        return function(*args, **(kwargs or {}))


@contextmanager
def deterministic() -> Iterator[None]:
    torch.use_deterministic_algorithms(True)
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(False)


@pytest.fixture
def steps(make_clip: Callable[..., Any], names: list[str]) -> Callable[..., Callable[[], list[Tensor]]]:
    """Function (implementation, pair loss, settings) → step: loss and gradients of the same small phase-2 step."""

    def make(impl: str, pair: Any, **settings: Any) -> Callable[[], list[Tensor]]:
        torch.manual_seed(0)
        small = ModelConfig(prompt_length=2, hidden_size=16, decoder_heads=2, **settings)
        model = PsPG(make_clip().float(), small, names[:3]).train().freeze()
        model.head.impl = impl
        images, labels = torch.randn(3, 3, 32, 32), torch.tensor([[1, 1, 0], [0, -1, 1], [0, 1, 0]]).float()
        loss_of = PromptLoss(LossConfig(pair=pair))
        parameters = [parameter for parameter in model.head.parameters() if parameter.requires_grad]

        def step() -> list[Tensor]:
            torch.manual_seed(1)  # dropout
            loss, _ = loss_of(model(images), labels, model.tower, impl=impl)
            return [loss.detach(), *torch.autograd.grad(loss, parameters)]

        return step

    return make


def test_the_trap_catches_them() -> None:
    x, table = torch.randn(3, 4, requires_grad=True), torch.randn(2, 4, requires_grad=True)
    with Operators() as operators:
        loss = torch.nn.functional.cross_entropy(x, torch.zeros(3, dtype=torch.long))
        (loss + table.index_select(0, torch.tensor([0, 0, 1])).sum()).backward()
    assert "nll_loss_forward" in operators.seen & RAISES
    assert operators.seen & VARIES


@pytest.mark.parametrize(
    ("pair", "settings"),
    [
        *((pair, {"prefix": prefix}) for pair in ("spcl", "pcl", "ranking") for prefix in (False, True)),
        *(("spcl", {"decoder": decoder}) for decoder in ("lstm", "transformer", "mlp")),
        ("spcl", {"fusion": "gate_before_norm"}),
        ("ranking", {"decoder": "context", "fusion": "regions"}),
    ],
)
def test_operators_of_a_step_have_deterministic_forms(steps: Any, pair: str, settings: dict[str, Any]) -> None:
    step = steps("eager", pair, **settings)
    with deterministic(), Operators() as operators:
        first = step()
    assert not operators.seen & RAISES
    with deterministic():
        assert all(map(torch.equal, step(), first))


@pytest.mark.skipif(torch.cuda.is_available(), reason="test_training_on_gpu.py repeats a step with compiled kernels")
@pytest.mark.parametrize("prefix", [False, True])
def test_kernels_need_no_such_form(steps: Any, prefix: bool) -> None:
    """What a GPU runs by default: nothing sums in an order of its own, with or without torch's setting."""
    pytest.importorskip("triton", reason="needs triton")
    from tests.kernels import interpreter

    interpreter.repair()
    step = steps("triton", "spcl", prefix=prefix)
    with Operators() as operators:
        first = step()
    assert not operators.seen & (RAISES | VARIES)
    assert all(map(torch.equal, step(), first))


def test_the_contrastive_loss_has_deterministic_forms() -> None:
    features, scale = torch.randn(3, 8, requires_grad=True), torch.tensor(2.0, requires_grad=True)
    with deterministic(), Operators() as operators:
        contrastive_loss(features, features.flip(0), scale).backward()
    assert not operators.seen & (RAISES | VARIES)
