"""The decoder's kernels against float64: outputs and every gradient."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import nullcontext

import pytest
import torch
from torch import Tensor

from pspg.kernels.launch import record
from pspg.kernels.prompt_decoder import decode, folding
from pspg.kernels.prompt_decoder.gru import parameter_shapes

triton = pytest.importorskip("triton", reason="needs triton")
tl = pytest.importorskip("triton.language", reason="needs triton")  # which kernels of this file need
host = pytest.importorskip("pspg.kernels.prompt_decoder.triton.host", reason="needs triton")

DTYPES = [torch.float32, torch.bfloat16]


class Inputs:
    """Class features, context and the parameters of G decoders, float64; D is not H."""

    def __init__(
        self, device: torch.device, *, classes: int, images: int, hidden: int = 16, heads: int = 2, count: int = 2
    ) -> None:
        generator = torch.Generator().manual_seed(classes + 10 * images)
        parameters = parameter_shapes(hidden + 8, hidden)
        self.heads, self.count = heads, count
        self.names = list(parameters)
        shapes = [(rows, hidden + 8) for rows in (classes, images)]
        shapes += count * list(parameters.values())
        self.tensors = [torch.randn(shape, generator=generator, dtype=torch.float64) for shape in shapes]
        for tensor in self.tensors[2:]:
            tensor /= tensor.shape[-1] ** 0.5 if tensor.dim() == 2 else 2
        self.tensors = [tensor.to(device) for tensor in self.tensors]

    def run(self, impl: str, tensors: Sequence[Tensor], n: int, **options: Tensor) -> Tensor:
        features, context, *parameters = tensors
        size = len(self.names)
        decoders = [
            dict(zip(self.names, parameters[i * size : (i + 1) * size], strict=True)) for i in range(self.count)
        ]
        return decode(decoders, features, context, prompt_length=n, heads=self.heads, impl=impl, **options)

    def outcome(
        self, impl: str, dtype: torch.dtype, n: int, wanted: Sequence[int] | None = None, **options: Tensor
    ) -> list[Tensor]:
        """Outputs, and gradients of all inputs or those of the given numbers; short dtypes by autocast."""
        full = torch.float64 if dtype == torch.float64 else torch.float32
        wanted = range(len(self.tensors)) if wanted is None else wanted
        leaves = [
            tensor.to(full).requires_grad_(i in wanted) for i, tensor in enumerate(map(torch.clone, self.tensors))
        ]
        device = leaves[0].device.type
        with torch.autocast(device, dtype) if dtype in (torch.bfloat16, torch.float16) else nullcontext():
            outputs = self.run(impl, leaves, n, **options)
            weights = torch.linspace(-1, 1, outputs.numel(), dtype=torch.float64).view(outputs.shape).to(outputs)
            found = torch.autograd.grad(outputs, [leaves[i] for i in wanted], weights)
        return [outputs.detach(), *found]


# classes, images, hidden, heads, decoders, steps
SHAPES = [
    (1, 1, 16, 4, 1, 1),
    (2, 7, 16, 2, 2, 3),
    (5, 1, 16, 4, 2, 2),
    (14, 7, 96, 4, 1, 2),  # heads of 24
    (35, 7, 48, 3, 1, 2),  # more classes than one program's
]
LARGE = [
    (70, 40, 96, 2, 2, 2),
    (14, 128, 256, 2, 1, 2),  # as many images and as wide heads as go
]


@pytest.mark.parametrize(
    ("classes", "images", "hidden", "heads", "count", "n", "dtype"),
    [
        *((*shape, dtype) for shape in SHAPES for dtype in DTYPES),
        *((*shape, torch.float16) for shape in SHAPES[:2]),  # it goes the way of bfloat16
        *(pytest.param(*shape, dtype, marks=pytest.mark.slow) for shape in LARGE for dtype in DTYPES),
    ],
)
def test_outputs_and_gradients(
    classes: int,
    images: int,
    hidden: int,
    heads: int,
    count: int,
    n: int,
    dtype: torch.dtype,
    device: torch.device,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    for choice in ("cross_fold_is_cheaper", "feedback_fold_is_cheaper"):  # eager folds as the kernels do
        monkeypatch.setattr(folding, choice, lambda **_: True)
    inputs = Inputs(device, classes=classes, images=images, hidden=hidden, heads=heads, count=count)
    exact = inputs.outcome("reference", torch.float64, n)
    got, eager = (inputs.outcome(impl, dtype, n) for impl in ("triton", "eager"))
    assert [part.dtype for part in got] == [part.dtype for part in eager]
    assert all(part.isfinite().all() for part in got)
    errors, others = ([(a.double() - b).abs() for a, b in zip(found, exact, strict=True)] for found in (got, eager))
    for number, (error, other, right) in enumerate(zip(errors, others, exact, strict=True)):
        allowed = 2 * other.max() + 4 * torch.finfo(dtype).eps * right.abs().max()
        assert error.max() <= allowed, f"tensor {number}: {error.max()}, {other.max()} in torch"
    # What chance does to single tensors it does not do to all of them together.
    ours, torchs = (
        sum((error.norm() / right.norm()).item() ** 2 for error, right in zip(found, exact, strict=True) if right.any())
        for found in (errors, others)
    )
    assert ours <= 1.5 * torchs


@pytest.mark.parametrize(
    ("shape", "dtype"),
    [
        (SHAPES[1], torch.bfloat16),
        (SHAPES[2], torch.float32),
        *(pytest.param(shape, dtype, marks=pytest.mark.slow) for shape in (*SHAPES, LARGE[0]) for dtype in DTYPES),
    ],
)
def test_all_steps_in_one_launch_give_the_same(
    shape: tuple[int, ...], dtype: torch.dtype, device: torch.device
) -> None:
    """The interpreter runs a phase at a time, and refuses one that reads what another program of the phase writes."""
    classes, images, hidden, heads, count, n = shape
    inputs = Inputs(device, classes=classes, images=images, hidden=hidden, heads=heads, count=count)
    many = inputs.outcome("triton", dtype, n)
    with torch.no_grad(), host.use("one"):
        short = [tensor.to(dtype) for tensor in inputs.tensors]
        unsaved = inputs.run("triton", short, n)
    with torch.no_grad():
        assert torch.equal(unsaved, inputs.run("triton", short, n)) or device.type == "cuda"
    with host.use("one"):
        one = inputs.outcome("triton", dtype, n)
    for number, (found, other) in enumerate(zip(one, many, strict=True)):
        # On a GPU the compiler may share out the sums of a row over threads otherwise.
        allowed = 0.0 if device.type == "cpu" else 4 * torch.finfo(dtype).eps * other.abs().max()
        assert (found - other).abs().max() <= allowed, f"tensor {number}"


@pytest.mark.skipif(torch.cuda.is_available(), reason="the interpreter sees conflicts, a GPU does not")
def test_phases_need_the_barrier(device: torch.device, monkeypatch: pytest.MonkeyPatch) -> None:
    """Without it a program reads what another has just written, which the interpreter refuses."""
    from pspg.kernels.prompt_decoder.triton import persistent

    monkeypatch.setattr(persistent, "meet", triton.jit(_pass_by))
    monkeypatch.setattr(host, "interpreted", lambda device: False)
    monkeypatch.setattr(host, "multiprocessors", lambda device: 3)
    inputs = Inputs(device, classes=3, images=2)
    with host.use("one"), torch.no_grad(), pytest.raises(RuntimeError, match="forward_kernel: conflict"):
        inputs.run("triton", [tensor.float() for tensor in inputs.tensors], 2)


def _pass_by(counter, arrivals):  # type: ignore[no-untyped-def]
    pass


def test_gradients_of_some_inputs(device: torch.device) -> None:
    """They are the same as among all, bit for bit, so no result depends on the order that programs run in."""
    inputs = Inputs(device, classes=3, images=3)
    size = len(inputs.names)
    outputs, *every = inputs.outcome("triton", torch.float32, 2)
    for wanted in (
        [0],  # class features
        [2 + size + inputs.names.index("gru.weight_hh")],
        list(range(2, 2 + size)),  # one decoder
    ):
        same, *some = inputs.outcome("triton", torch.float32, 2, wanted)
        assert torch.equal(same, outputs)
        assert all(torch.equal(one, every[i]) for one, i in zip(some, wanted, strict=True)), wanted


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_saves_nothing_without_gradients(
    dtype: torch.dtype, device: torch.device, monkeypatch: pytest.MonkeyPatch
) -> None:
    inputs = Inputs(device, classes=5, images=3)
    tensors = [tensor.to(dtype) for tensor in inputs.tensors]
    expected = inputs.run("triton", [tensor.requires_grad_() for tensor in tensors], 3)
    seen = []
    forward = host.forward_steps

    def watched(*arguments: object) -> tuple[Tensor, object]:
        outputs, saved = forward(*arguments)
        seen.append(saved)
        return outputs, saved

    monkeypatch.setattr(host, "forward_steps", watched)
    with torch.no_grad():
        outputs = inputs.run("triton", tensors, 3)
    assert seen == [None]
    assert not outputs.requires_grad
    assert torch.equal(outputs, expected)


def test_auto_prefers_kernels_on_a_gpu_only(device: torch.device) -> None:
    inputs = Inputs(device, classes=3, images=2)
    tensors = [tensor.float() for tensor in inputs.tensors]
    best = "triton" if device.type == "cuda" else "eager"
    assert torch.equal(inputs.run("auto", tensors, 2), inputs.run(best, tensors, 2))


@pytest.mark.parametrize(
    ("shape", "dtype"),
    [
        ({"images": 129}, torch.float32),
        ({"images": 2, "hidden": 1040, "heads": 10}, torch.float32),
        ({"images": 2, "hidden": 130, "heads": 1}, torch.float32),
        ({"images": 2}, torch.float64),
    ],
)
def test_refuses_what_has_no_kernels(shape: dict[str, int], dtype: torch.dtype, device: torch.device) -> None:
    inputs = Inputs(device, classes=2, count=1, **shape)
    tensors = [tensor.to(dtype) for tensor in inputs.tensors]
    with pytest.raises(ValueError, match="impl='triton' is not available"):
        inputs.run("triton", tensors, 1)
    assert torch.equal(inputs.run("auto", tensors, 1), inputs.run("eager", tensors, 1))


def test_refuses_a_cpu_without_the_interpreter(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    inputs = Inputs(torch.device("cpu"), classes=2, images=2)
    with pytest.raises(ValueError, match="impl='triton' is not available"):
        inputs.run("triton", [tensor.float() for tensor in inputs.tensors], 1)


@pytest.mark.parametrize(("architecture", "overlaps"), [(80, False), (90, True)])
def test_overlap_is_asked_of_every_launch_where_it_can_be_had(architecture: int, overlaps: bool) -> None:
    """A kernel that did not wait would read what the one before has not written."""
    from pspg.kernels.prompt_decoder.cases import CASES

    case, _ = CASES
    with record(architecture) as launches, host.use("overlapped"):
        case.run(torch.bfloat16)
    assert len(launches) > 200
    assert all(launch.arguments["OVERLAP"] is overlaps for launch in launches)
    assert all(launch.options.get("launch_pdl", False) is overlaps for launch in launches)


def test_one_launch_is_two_that_are_cooperative() -> None:
    """Programs that wait for one another must all run at once."""
    from pspg.kernels.prompt_decoder.cases import CASES

    _, case = CASES
    with record(90) as launches:
        case.run(torch.bfloat16)
    found = {launch.kernel.fn.__name__: launch for launch in launches}
    assert [len(launches), *found] == [3, "forward_kernel", "self_attention_kernel", "backward_kernel"]
    for name in ("forward_kernel", "backward_kernel"):
        launch = found[name]
        assert launch.options["launch_cooperative_grid"]
        assert launch.grid == (132,)
        assert (launch.arguments["first"], launch.arguments["last"]) == (0, 7 * 16)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("launches", ["separate", "one"])
def test_images_that_do_not_count(dtype: torch.dtype, launches: str, device: torch.device) -> None:
    """Within a block of images, and of whole blocks of them."""
    inputs = Inputs(device, classes=5, images=40)
    present = (torch.arange(40) % 3 != 1) & (torch.arange(40) < 20)
    exact = inputs.outcome("reference", torch.float64, 2, present=present)
    eager = inputs.outcome("eager", dtype, 2, present=present)
    with host.use(launches):
        got = inputs.outcome("triton", dtype, 2, present=present.to(device))
    assert not got[2][~present].any()
    for one, other, right in zip(got, eager, exact, strict=True):
        allowed = 2 * (other - right).abs().max() + 4 * torch.finfo(dtype).eps * right.abs().max()
        assert (one.double() - right).abs().max() <= allowed
