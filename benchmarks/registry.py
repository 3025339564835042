"""Every operator, with the inputs that it is measured on and the forms that compute it.

An operator is added to `OPERATORS` with a function that makes its inputs and one function a form; see README.md.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, fields, is_dataclass, replace
from functools import lru_cache, partial
from typing import Any, NamedTuple

import torch
from torch import Tensor

from pspg.engine.models.decoders import GRUDecoder
from pspg.kernels.asymmetric_loss import asymmetric_loss
from pspg.kernels.pair_loss import pair_loss
from pspg.kernels.pairs import PairSample, PairSelection, pair_indices
from pspg.kernels.prompt_decoder import decode
from pspg.kernels.spcl import ImageBatch, spcl
from pspg.kernels.spcl.reference import pair_features
from pspg.kernels.text_tower import Prompts, PromptTemplate, TextLayer, TextTower, encode_prompts
from pspg.kernels.text_tower.block_operations import BlockOperations, RaggedPairs
from pspg.kernels.text_tower.eager import EAGER

from . import repaired

D, H, W, LAYERS, HEADS, CONTEXT = 1024, 512, 512, 12, 8, 77
"""of RN50 and of the paper's decoders"""


class Shape(NamedTuple):
    """Sizes that vary."""

    C: int
    B: int
    n: int = 16


@dataclass(frozen=True)
class Problem:
    """Inputs of an operator."""

    leaves: tuple[Tensor, ...]
    """those whose gradients are asked for"""
    fixed: tuple[Any, ...] = ()
    """all others: tensors, towers, frames, or anything that has no floating-point numbers"""

    def to(self, dtype: torch.dtype) -> Problem:
        """The same numbers in a dtype."""
        return Problem(tuple(leaf.to(dtype) for leaf in self.leaves), tuple(_cast(part, dtype) for part in self.fixed))

    def tensors(self) -> Iterator[Tensor]:
        """All that an operator reads."""
        yield from self.leaves
        yield from _tensors(self.fixed)


Form = Callable[[Problem], Tensor | tuple[Tensor, ...]]


@dataclass(frozen=True)
class Part:
    """Something that can be known of an outcome at a cost that can be borne."""

    problem: Problem
    """what a form is run on"""
    expected: list[Tensor]
    """from the literal equations in float64: what `view` leaves of outputs and gradients"""
    view: Callable[[list[Tensor]], list[Tensor]] = lambda outcome: outcome


@dataclass(frozen=True)
class Operator:
    """Inputs and forms of an operator.

    `forms` are reference, repaired, eager and triton; the compiled form is made of eager. Where there is nothing to
    tidy, or the literal equations repeat no work, names share a function.
    """

    make: Callable[[Shape, torch.device, torch.dtype], Problem]
    """problem from torch's random state; the dtype is that of what the engine holds in low precision"""
    forms: Mapping[str, Form]
    parts: Callable[[Form, Problem, Problem, int], list[Part]]
    """(literal form, problem, the same in float64, FLOPs that may be spent) → what is known of the outcome"""
    by_batch: bool = True
    """whether B matters"""


def outcome(form: Form, problem: Problem) -> list[Tensor]:
    """Outputs, and gradients of the sum of their products with fixed random numbers."""
    leaves = tuple(leaf.detach().requires_grad_() for leaf in problem.leaves)
    outputs = as_tuple(form(replace(problem, leaves=leaves)))
    return [*(output.detach() for output in outputs), *gradients(outputs, leaves)]


def gradients(outputs: Sequence[Tensor], leaves: Sequence[Tensor]) -> tuple[Tensor, ...]:
    """Of the sum of the outputs times `cotangents`, by the leaves; zero where an output does not depend on one."""
    return torch.autograd.grad(outputs, leaves, cotangents(outputs), materialize_grads=True)


def cotangents(outputs: Sequence[Tensor]) -> list[Tensor]:
    """One for a scalar, else fixed normal numbers."""
    return [_cotangent(output.shape, output.dtype, output.device) for output in outputs]


@lru_cache(maxsize=8)
def _cotangent(shape: torch.Size, dtype: torch.dtype, device: torch.device) -> Tensor:
    if not shape or device.type == "meta":
        return torch.ones(shape, dtype=dtype, device=device)
    return torch.randn(shape, generator=torch.Generator().manual_seed(3)).to(device, dtype)


def as_tuple(outputs: Tensor | tuple[Tensor, ...]) -> tuple[Tensor, ...]:
    """Of one tensor a tuple of one."""
    return (outputs,) if isinstance(outputs, Tensor) else outputs


def whole(literal: Form, problem: Problem, exact: Problem, budget: int) -> list[Part]:
    """The literal equations once, on everything."""
    return [Part(problem, outcome(literal, exact))]


def _cast(part: Any, dtype: torch.dtype) -> Any:
    if isinstance(part, Tensor):
        return part.to(dtype) if part.is_floating_point() else part
    if isinstance(part, TextTower | PromptTemplate):
        return part.to(dtype)
    return part


def _tensors(part: Any) -> Iterator[Tensor]:
    if isinstance(part, Tensor):
        yield part
    elif isinstance(part, TextTower):
        yield from part.tensors()
    elif isinstance(part, tuple | list):
        for one in part:
            yield from _tensors(one)
    elif is_dataclass(part):
        for one in fields(part):
            yield from _tensors(getattr(part, one.name))


# Random inputs of the full size.


def _normal(*shape: int, device: torch.device, dtype: torch.dtype = torch.float32, std: float = 1.0) -> Tensor:
    return (std * torch.randn(shape, device=device)).to(dtype)


def random_tower(device: torch.device, dtype: torch.dtype) -> TextTower:
    """CLIP's text tower at the deviations it is initialised with."""
    normal = partial(_normal, device=device, dtype=dtype)
    ones = partial(torch.ones, device=device, dtype=dtype)
    narrow, wide = W**-0.5 * (2 * LAYERS) ** -0.5, (2 * W) ** -0.5

    def layer() -> TextLayer:
        return TextLayer(
            *(ones(W), normal(W, std=0.1), normal(3 * W, W, std=W**-0.5), normal(3 * W, std=0.02)),
            *(normal(W, W, std=narrow), normal(W, std=0.02), ones(W), normal(W, std=0.1)),
            *(normal(4 * W, W, std=wide), normal(4 * W, std=0.02), normal(W, 4 * W, std=narrow), normal(W, std=0.02)),
        )

    layers = tuple(layer() for _ in range(LAYERS))
    positions = normal(CONTEXT, W, std=0.01)
    return TextTower(layers, positions, ones(W), normal(W, std=0.1), normal(W, D, std=W**-0.5), heads=HEADS)


def random_frame(classes: int, device: torch.device, dtype: torch.dtype) -> PromptTemplate:
    """SOS, padding and EOS around whole prompts."""
    table = _normal(3, W, device=device, dtype=dtype, std=0.02)
    lengths = torch.zeros(classes, dtype=torch.int64, device=device)
    return PromptTemplate(table[0], table[1], table[2].expand(classes, 1, W).contiguous(), lengths, (0,) * classes, 0)


def _labels(shape: Shape, device: torch.device) -> Tensor:
    return (torch.rand(shape.B, shape.C, device=device) < 0.1).float()


# Asymmetric loss.


def _asl_problem(shape: Shape, device: torch.device, dtype: torch.dtype) -> Problem:
    labels = _labels(shape, device) - (torch.rand(shape.B, shape.C, device=device) < 0.1).float()
    return Problem((_normal(shape.B, 2, shape.C, device=device, std=5),), (labels.clamp(min=-1),))


def _asl(impl: str, problem: Problem) -> Tensor:
    return asymmetric_loss(*problem.leaves, *problem.fixed, impl=impl)


# Pair loss of features.


def _pair_problem(shape: Shape, device: torch.device, dtype: torch.dtype) -> Problem:
    features = _normal(shape.C * (shape.C - 1) // 2, D, device=device, dtype=dtype)
    vectors = _normal(shape.B, D, device=device, std=0.2)
    return Problem((features, vectors, torch.full((), 2.66, device=device)), (_labels(shape, device),))


def _pair_loss(impl: str, problem: Problem) -> Tensor:
    return pair_loss(*problem.leaves, *problem.fixed, impl=impl)


# Prompt decoders.


def _decoder_problem(shape: Shape, device: torch.device, dtype: torch.dtype) -> Problem:
    with device:
        decoders = [GRUDecoder(D, H, W, HEADS).weights() for _ in range(2)]
    names = [name for name in decoders[0] if not name.startswith("output_proj")]
    weights = tuple(decoder[name].detach() for decoder in decoders for name in names)
    features, context = (_normal(rows, D, device=device) for rows in (shape.C, shape.B))
    return Problem(weights, (tuple(names), features, context, shape.n))


def _decode(impl: str, problem: Problem) -> Tensor:
    names, features, context, n = problem.fixed
    half = len(names)
    decoders = [dict(zip(names, part, strict=True)) for part in (problem.leaves[:half], problem.leaves[half:])]
    return decode(decoders, features, context, prompt_length=n, heads=HEADS, impl=impl)


# Single prompts through the text tower.


def _text_problem(shape: Shape, device: torch.device, dtype: torch.dtype) -> Problem:
    prompts = _normal(2, shape.C, shape.n, W, device=device, std=0.02)
    return Problem((prompts,), (random_tower(device, dtype), random_frame(shape.C, device, dtype)))


def _single_features(impl: str, problem: Problem) -> Tensor:
    (prompts,), (tower, frame) = problem.leaves, problem.fixed
    memory = 2**62 if prompts.is_meta else None  # counted, nothing may run twice
    return encode_prompts(tower, frame, prompts, memory=memory, impl=impl).features


def _repaired_features(problem: Problem) -> Tensor:
    (prompts,), (tower, frame) = problem.leaves, problem.fixed
    return repaired.single_features(tower, frame, prompts)


def _text_parts(literal: Form, problem: Problem, exact: Problem, budget: int) -> list[Part]:
    """A class's features depend on its own prompts alone: as many classes as the budget allows, chosen by seed."""
    (prompts,), (tower, frame) = exact.leaves, exact.fixed
    count = min(max(budget // (2 * _sequence_flops(tower)), 1), prompts.shape[1])
    chosen = _chosen(prompts.shape[1], count).to(prompts.device)
    leaf = prompts[:, chosen].clone().requires_grad_()
    rows = replace(
        frame,
        token_suffix=frame.token_suffix[chosen],
        name_lengths=frame.name_lengths[chosen],
        lengths=tuple(frame.lengths[i] for i in chosen.tolist()),
    )
    features = as_tuple(literal(Problem((leaf,), (tower, rows))))[0]
    (weights,) = cotangents([features.new_empty((*prompts.shape[:2], features.shape[-1]))])
    (gradient,) = torch.autograd.grad(features, leaf, weights[:, chosen])
    return [Part(problem, [features.detach(), gradient], lambda found: [one[:, chosen] for one in found])]


# SPCL: pair prompts through the text tower, and their loss.


def _spcl_problem(shape: Shape, device: torch.device, dtype: torch.dtype) -> Problem:
    prompts, vectors = (
        _normal(shape.C, shape.n, W, device=device, std=0.02),
        _normal(shape.B, D, device=device, std=0.2),
    )
    fixed = (random_tower(device, dtype), random_frame(shape.C, device, dtype), _labels(shape, device), None)
    return Problem((prompts, vectors, torch.full((), 2.66, device=device)), fixed)


def _spcl(impl: str, problem: Problem) -> Tensor:
    tower, frame, labels, pairs = problem.fixed
    sample = None if pairs is None else PairSample(pairs[0], pairs[1], torch.ones(len(pairs[0])))
    selection = PairSelection(len(labels.T), sample)
    memory = 2**62 if labels.is_meta else None
    prompts, vectors, scale = problem.leaves
    images = ImageBatch(vectors, scale, labels)
    return spcl(tower, Prompts(prompts, frame), images, pairs=selection, memory=memory, impl=impl)


def _repaired_spcl(problem: Problem) -> Tensor:
    tower, frame, labels, pairs = problem.fixed
    first, second = pair_indices(labels.shape[1]) if pairs is None else pairs
    prompts, vectors, scale = problem.leaves
    pairs = first.to(labels.device), second.to(labels.device)
    return repaired.spcl(tower, frame, prompts, vectors, scale, labels, pairs)


def _spcl_parts(literal: Form, problem: Problem, exact: Problem, budget: int) -> list[Part]:
    """All pairs, in chunks, if the budget allows.

    Else the pairs of as many classes, chosen by seed, as it does allow (one at least): the gradients of these classes'
    prompts are theirs alone, whatever other pairs there are; and the loss of these pairs by themselves, with all its
    gradients.
    """
    tower, _, labels, _ = exact.fixed
    classes = labels.shape[1]
    first, second = pair_indices(classes)
    affordable = budget // _sequence_flops(tower)
    if affordable >= len(first):
        return [Part(problem, _literal_spcl(exact, first, second))]
    count = max(affordable // max(classes - 1, 1), 1)
    chosen = _chosen(classes, count)
    theirs = torch.isin(first, chosen) | torch.isin(second, chosen)
    first, second = first[theirs], second[theirs]
    found = _literal_spcl(exact, first, second)
    sampled = replace(problem, fixed=(*problem.fixed[:-1], (first, second)))
    chosen = chosen.to(labels.device)
    return [
        Part(problem, [found[1][chosen]], lambda outcome: [outcome[1][chosen]]),
        Part(sampled, found),
    ]


def _literal_spcl(exact: Problem, first: Tensor, second: Tensor, chunk: int = 64) -> list[Tensor]:
    """Loss and gradients of pairs, chunk by chunk: a pair's loss depends on its own feature alone."""
    tower, frame, labels, _ = exact.fixed
    leaves = [leaf.detach().clone().requires_grad_() for leaf in exact.leaves]
    prompts, vectors, scale = leaves
    total = torch.zeros((), dtype=vectors.dtype, device=vectors.device)
    for start in range(0, len(first), chunk):
        i, j = (part[start : start + chunk].to(labels.device) for part in (first, second))
        features = pair_features(tower, frame, prompts, i, j)
        loss = pair_loss(features, vectors, scale, labels, pairs=(i, j), impl="reference")
        loss.backward()
        total += loss.detach()
    return [total, *(leaf.grad for leaf in leaves if leaf.grad is not None)]


def _sequence_flops(tower: TextTower) -> int:
    """Of one whole sequence, forward and the gradients of its inputs, attention aside."""
    width = tower.positional_embedding.shape[1]
    return 2 * 2 * 12 * width**2 * len(tower.layers) * tower.context_length


def _chosen(count: int, wanted: int) -> Tensor:
    return torch.randperm(count, generator=torch.Generator().manual_seed(7))[:wanted].sort().values


# BlockOperations of the text tower, over a chunk of pairs.

PAIRS = 367
"""of a chunk, as the engine makes them on a GPU"""


def _continuation(shape: Shape, device: torch.device) -> RaggedPairs:
    first, second = (part[:PAIRS] for part in pair_indices(shape.C, device))
    tokens = shape.n + 1
    return RaggedPairs(first, second, prefixes=shape.C, suffixes=shape.C, prefix_tokens=tokens, suffix_tokens=tokens)


def _attention_problem(shape: Shape, device: torch.device, dtype: torch.dtype) -> Problem:
    pairs = _continuation(shape, device)
    normal = partial(_normal, device=device, dtype=dtype)
    tails, prefixes = (
        normal(len(pairs.prefix_index), pairs.suffix_tokens, 3 * W),
        normal(pairs.prefixes, pairs.prefix_tokens, 2 * W),
    )
    return Problem((tails, prefixes), (pairs,))


def _attend(passes: Callable[[], BlockOperations], problem: Problem) -> Tensor:
    (tails, prefixes), (pairs,) = problem.leaves, problem.fixed
    return passes().attention(HEADS, tails, prefixes, pairs)


def _rows(shape: Shape) -> int:
    return min(PAIRS, shape.C * (shape.C - 1) // 2) * (shape.n + 1)


def _norm_problem(shape: Shape, device: torch.device, dtype: torch.dtype) -> Problem:
    normal = partial(_normal, device=device, dtype=dtype)
    return Problem((normal(_rows(shape), W), normal(_rows(shape), W)), (random_tower(device, dtype),))


def _add_norm(passes: Callable[[], BlockOperations], problem: Problem) -> tuple[Tensor, Tensor]:
    (x, delta), (tower,) = problem.leaves, problem.fixed
    return passes().add_norm(tower, x, delta, tower.ln_final_weight, tower.ln_final_bias)


def _mlp_problem(shape: Shape, device: torch.device, dtype: torch.dtype) -> Problem:
    return Problem((_normal(_rows(shape), W, device=device, dtype=dtype),), (random_tower(device, dtype),))


def _mlp(passes: Callable[[], BlockOperations], problem: Problem) -> Tensor:
    (y,), (tower,) = problem.leaves, problem.fixed
    return passes().mlp(tower, tower.layers[0], y)


def _fused() -> BlockOperations:
    from pspg.kernels.text_tower.triton import TRITON  # imports triton

    return TRITON


def _passes(function: Callable[[Callable[[], BlockOperations], Problem], Any]) -> dict[str, Form]:
    eager = partial(function, lambda: EAGER)
    return {"reference": eager, "repaired": eager, "eager": eager, "triton": partial(function, _fused)}


def _literal_is_exact(function: Callable[[str, Problem], Tensor]) -> dict[str, Form]:
    """Forms of an operator whose literal equations repeat no work."""
    literal = partial(function, "reference")
    return {"reference": literal, "repaired": literal, "eager": literal, "triton": partial(function, "triton")}


def _by_impl(function: Callable[[str, Problem], Tensor], tidy: Form | None = None) -> dict[str, Form]:
    literal = partial(function, "reference")
    return {
        "reference": literal,
        "repaired": tidy or literal,
        "eager": partial(function, "eager"),
        "triton": partial(function, "triton"),
    }


OPERATORS: dict[str, Operator] = {
    "prompt_decoder": Operator(_decoder_problem, _by_impl(_decode), whole),
    "spcl": Operator(_spcl_problem, _by_impl(_spcl, _repaired_spcl), _spcl_parts),
    "text_tower": Operator(_text_problem, _by_impl(_single_features, _repaired_features), _text_parts, by_batch=False),
    "pair_loss": Operator(_pair_problem, _literal_is_exact(_pair_loss), whole),
    "asymmetric_loss": Operator(_asl_problem, _literal_is_exact(_asl), whole),
    "tail_attention": Operator(_attention_problem, _passes(_attend), whole, by_batch=False),
    "add_norm": Operator(_norm_problem, _passes(_add_norm), whole, by_batch=False),
    "mlp": Operator(_mlp_problem, _passes(_mlp), whole, by_batch=False),
}
