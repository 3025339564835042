"""Operators of the kernels: the inputs they are measured on, their implementations, and what the gate compares.

An operator is added to `OPERATORS`; README.md says how.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager, nullcontext
from dataclasses import replace
from functools import partial
from importlib import import_module
from typing import Any

import torch
from torch import Tensor, nn

from pspg.kernels.asymmetric_loss import asymmetric_loss
from pspg.kernels.batch_norm import Norm, batch_norm
from pspg.kernels.pair_loss import pair_loss
from pspg.kernels.pairs import PairSample, PairSelection, pair_indices
from pspg.kernels.prompt_decoder import decode
from pspg.kernels.spcl import ImageBatch, spcl
from pspg.kernels.spcl.reference import pair_features
from pspg.kernels.text_tower import (
    Packing,
    Prompts,
    PromptTemplate,
    TextLayer,
    TextTower,
    encode_prompts,
    pack_texts,
)
from pspg.kernels.text_tower.block_operations import BlockOperations, RaggedPairs, Stream
from pspg.kernels.text_tower.blocks import finish, project
from pspg.kernels.text_tower.eager import EAGER
from pspg.kernels.text_tower.packed import trained

from . import repaired
from .harness import Sizes, Unavailable
from .problem import Function, Operator, Part, Problem, as_tuple, cotangents

CONTEXT = 77
"""tokens of CLIP's text tower"""
TOWER: Mapping[str, int] = {"W": 512, "layers": 12, "heads": 8, "D": 1024}
"""sizes of RN50's text tower"""
BLOCK: Mapping[str, int] = {"C": 108, "n": 16, "pairs": 367, "W": 512}
"""sizes of an operation in a block of the text tower, over a chunk of pairs as the engine makes them on a GPU"""


def by_impl(function: Callable[[str, Problem], Any], *, exact: bool = False, tidy: Function | None = None) -> Any:
    """Implementations of a function that takes their name.

    Args:
        exact: the literal equations repeat no work, and serve for eager, too.
        tidy: the tuned baseline; None: the literal equations.
    """
    literal, triton = partial(function, "reference"), partial(function, "triton")
    eager = literal if exact else partial(function, "eager")
    return {"reference": literal, "repaired": tidy or literal, "eager": eager, "triton": triton}


def called(operator: Callable[..., Tensor]) -> Callable[[str, Problem], Tensor]:
    """An operator that takes leaves, fixed and impl as they are."""
    return lambda impl, problem: operator(*problem.leaves, *problem.fixed, impl=impl)


# Random inputs.


def _normal(*shape: int, device: torch.device, dtype: torch.dtype = torch.float32, std: float = 1.0) -> Tensor:
    return (std * torch.randn(shape, device=device)).to(dtype)


def random_tower(s: Sizes, device: torch.device, dtype: torch.dtype) -> TextTower:
    """CLIP's text tower at the deviations it is initialised with."""
    normal = partial(_normal, device=device, dtype=dtype)
    ones = partial(torch.ones, device=device, dtype=dtype)
    W = s.W
    narrow, wide = W**-0.5 * (2 * max(s.layers, 1)) ** -0.5, (2 * W) ** -0.5

    def layer() -> TextLayer:
        return TextLayer(
            *(ones(W), normal(W, std=0.1), normal(3 * W, W, std=W**-0.5), normal(3 * W, std=0.02)),
            *(normal(W, W, std=narrow), normal(W, std=0.02), ones(W), normal(W, std=0.1)),
            *(normal(4 * W, W, std=wide), normal(4 * W, std=0.02), normal(W, 4 * W, std=narrow), normal(W, std=0.02)),
        )

    layers, positions = tuple(layer() for _ in range(s.layers)), normal(CONTEXT, W, std=0.01)
    return TextTower(layers, positions, ones(W), normal(W, std=0.1), normal(W, s.D, std=W**-0.5), heads=s.heads)


def random_template(s: Sizes, device: torch.device, dtype: torch.dtype) -> PromptTemplate:
    """SOS, padding and EOS around whole prompts."""
    table = _normal(3, s.W, device=device, dtype=dtype, std=0.02)
    lengths = torch.zeros(s.C, dtype=torch.int64, device=device)
    return PromptTemplate(table[0], table[1], table[2].expand(s.C, 1, s.W).contiguous(), lengths, (0,) * s.C, 0)


def _labels(s: Sizes, device: torch.device) -> Tensor:
    return (torch.rand(s.B, s.C, device=device) < 0.1).float()


# Asymmetric loss.


def _asl_problem(s: Sizes, device: torch.device, dtype: torch.dtype) -> Problem:
    labels = _labels(s, device) - (torch.rand(s.B, s.C, device=device) < 0.1).float()
    return Problem((_normal(s.B, 2, s.C, device=device, std=5),), (labels.clamp(min=-1),))


# Batch norm of a ResNet's block, with its residual and ReLU.


def _batch_norm_problem(s: Sizes, device: torch.device, dtype: torch.dtype) -> Problem:
    shape = s.B, s.channels, s.side, s.side
    low = (_normal(*shape, device=device, dtype=dtype).to(memory_format=torch.channels_last) for _ in range(2))
    weight, bias, variance = (1 + _normal(s.channels, device=device, std=0.1) for _ in range(3))
    batches = torch.zeros((), dtype=torch.int64, device=device)
    return Problem((*low, weight, bias), (torch.zeros_like(bias), variance, batches))


def _batch_norm(impl: str, problem: Problem) -> Tensor:
    """(B,H,W,channels), so that a gradient comes in channels last, too."""
    x, residual, weight, bias = problem.leaves
    return batch_norm(x, Norm(weight, bias, *problem.fixed), residual, impl=impl).permute(0, 2, 3, 1)


# Attention of reports that train, packed.


def _packed_problem(s: Sizes, device: torch.device, dtype: torch.dtype) -> Problem:
    lengths = torch.arange(s.B) * 7 % s.tokens  # of one token up to all
    packing = pack_texts(lengths, s.tokens)
    qkv = _normal(len(packing.positions), 3 * s.W, device=device, dtype=dtype)
    return Problem((qkv,), (s.heads, *(tensor.to(device) for tensor in packing)))


def _packed_attention(impl: str, problem: Problem) -> Tensor:
    (qkv,), (heads, *packing) = problem.leaves, problem.fixed
    if impl == "triton":
        from pspg.kernels.text_tower.triton.packed_attention import can_attend  # imports triton

        if not can_attend(qkv, heads, Packing(*packing).seen.shape[1]):
            raise Unavailable("kernels take half precision and fewer tokens; torch's attention would be measured")
    return trained("triton" if impl == "triton" else "eager", qkv)[1](heads, qkv, Packing(*packing))


# Pair loss of features.


def _pair_problem(s: Sizes, device: torch.device, dtype: torch.dtype) -> Problem:
    features = _normal(s.C * (s.C - 1) // 2, s.D, device=device, dtype=dtype)
    vectors = _normal(s.B, s.D, device=device, std=0.2)
    return Problem((features, vectors, torch.full((), 2.66, device=device)), (_labels(s, device),))


# Prompt decoders.


def _decoder(s: Sizes) -> nn.ModuleDict:
    """Parameters of a GRU decoder under the names that `decode` expects."""
    attention = {"self_attention": nn.MultiheadAttention(s.H, s.heads), "fc": nn.Linear(s.H, s.H)}
    found = nn.ModuleDict({"gru": nn.GRUCell(s.D, s.H), "encoder_proj": nn.Linear(s.D, s.H)})
    found["self_attention"] = nn.ModuleDict({**attention, "layer_norm": nn.LayerNorm(s.H)})
    found["encoder_attention"], found["fc"] = nn.MultiheadAttention(s.H, s.heads), nn.Linear(s.H, s.D)
    for layer in found.modules():
        if isinstance(layer, nn.Linear):
            nn.init.trunc_normal_(layer.weight, std=0.02)
    return found


def _decoder_problem(s: Sizes, device: torch.device, dtype: torch.dtype) -> Problem:
    with device:
        decoders = [dict(_decoder(s).named_parameters()) for _ in range(2)]
    weights = tuple(weight.detach() for decoder in decoders for weight in decoder.values())
    features, context = (_normal(rows, s.D, device=device) for rows in (s.C, s.B))
    return Problem(weights, (tuple(decoders[0]), features, context, s.n, s.heads, s.launches))


def _decode(impl: str, problem: Problem) -> Tensor:
    """Both decoders; kernels launched as the number `launches` says, from 1."""
    names, features, context, n, heads, launches = problem.fixed
    halves = problem.leaves[: len(names)], problem.leaves[len(names) :]
    decoders = [dict(zip(names, half, strict=True)) for half in halves]
    with _using("prompt_decoder.triton.host", launches, impl == "triton"):
        return decode(decoders, features, context, prompt_length=n, heads=heads, impl=impl)


def _using(module: str, number: int, kernels: bool, tiles: int | None = None) -> AbstractContextManager[None]:
    """What a module of kernels can do in several ways is done in the one of that number, from 1; tiles likewise."""
    if not kernels:
        return nullcontext()
    found = import_module(f"pspg.kernels.{module}")  # imports triton
    sizes = {} if tiles is None else {"tiles": found.TILE_NAMES[tiles - 1]}
    chosen: AbstractContextManager[None] = found.use(found.CHOICE_NAMES[number - 1], **sizes)
    return chosen


# Single prompts through the text tower.


def _text_problem(s: Sizes, device: torch.device, dtype: torch.dtype) -> Problem:
    prompts = _normal(2, s.C, s.n, s.W, device=device, std=0.02)
    return Problem((prompts,), (random_tower(s, device, dtype), random_template(s, device, dtype)))


def _single_features(impl: str, problem: Problem) -> Tensor:
    (prompts,), (tower, template) = problem.leaves, problem.fixed
    memory = 2**62 if prompts.is_meta else None  # counted, nothing may run twice
    return encode_prompts(tower, template, prompts, memory=memory, impl=impl).features


def _repaired_features(problem: Problem) -> Tensor:
    (prompts,), (tower, template) = problem.leaves, problem.fixed
    return repaired.single_features(tower, template, prompts)


def _text_parts(literal: Function, problem: Problem, exact: Problem, budget: int) -> list[Part]:
    """A class's features depend on its own prompts alone: as many classes as the budget allows, chosen by seed."""
    (prompts,), (tower, template) = exact.leaves, exact.fixed
    count = min(max(budget // (2 * _sequence_flops(tower)), 1), prompts.shape[1])
    chosen = _chosen(prompts.shape[1], count).to(prompts.device)
    leaf = prompts[:, chosen].clone().requires_grad_()
    rows = replace(
        template,
        token_suffix=template.token_suffix[chosen],
        name_lengths=template.name_lengths[chosen],
        lengths=tuple(template.lengths[i] for i in chosen.tolist()),
    )
    features = as_tuple(literal(Problem((leaf,), (tower, rows))))[0]
    (weights,) = cotangents([features.new_empty((*prompts.shape[:2], features.shape[-1]))])
    (gradient,) = torch.autograd.grad(features, leaf, weights[:, chosen])
    return [Part(problem, [features.detach(), gradient], lambda found: [one[:, chosen] for one in found])]


# SPCL: pair prompts through the text tower, and their loss.


def _spcl_problem(s: Sizes, device: torch.device, dtype: torch.dtype) -> Problem:
    prompts = _normal(s.C, s.n, s.W, device=device, std=0.02)
    vectors = _normal(s.B, s.D, device=device, std=0.2)
    fixed = (random_tower(s, device, dtype), random_template(s, device, dtype), _labels(s, device), None)
    return Problem((prompts, vectors, torch.full((), 2.66, device=device)), fixed)


def _spcl(impl: str, problem: Problem) -> Tensor:
    tower, template, labels, pairs = problem.fixed
    sample = None if pairs is None else PairSample(pairs[0], pairs[1], torch.ones(len(pairs[0])))
    memory = 2**62 if labels.is_meta else None
    prompts, vectors, scale = problem.leaves
    images, selection = ImageBatch(vectors, scale, labels), PairSelection(len(prompts), sample)
    return spcl(tower, Prompts(prompts, template), images, pairs=selection, memory=memory, impl=impl)


def _repaired_spcl(problem: Problem) -> Tensor:
    tower, template, labels, pairs = problem.fixed
    first, second = pair_indices(labels.shape[1]) if pairs is None else pairs
    prompts, vectors, scale = problem.leaves
    pairs = first.to(labels.device), second.to(labels.device)
    return repaired.spcl(tower, template, prompts, vectors, scale, labels, pairs)


def _spcl_parts(literal: Function, problem: Problem, exact: Problem, budget: int) -> list[Part]:
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
    chosen = _chosen(classes, max(affordable // max(classes - 1, 1), 1))
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
    tower, template, labels, _ = exact.fixed
    leaves = [leaf.detach().clone().requires_grad_() for leaf in exact.leaves]
    prompts, vectors, scale = leaves
    total = torch.zeros((), dtype=vectors.dtype, device=vectors.device)
    for start in range(0, len(first), chunk):
        i, j = (part[start : start + chunk].to(labels.device) for part in (first, second))
        features = pair_features(tower, template, prompts, i, j)
        loss = pair_loss(features, vectors, scale, labels, pairs=(i, j), impl="reference")
        loss.backward()
        total += loss.detach()
    return [total, *(leaf.grad for leaf in leaves if leaf.grad is not None)]


def _sequence_flops(tower: TextTower) -> int:
    """FLOPs of one whole sequence, forward and the gradients of its inputs, attention aside."""
    width = tower.positional_embedding.shape[1]
    return 2 * 2 * 12 * width**2 * len(tower.layers) * tower.context_length


def _chosen(count: int, wanted: int) -> Tensor:
    return torch.randperm(count, generator=torch.Generator().manual_seed(7))[:wanted].sort().values


# Operations of a block of the text tower, over a chunk of pairs.


def block_operation(function: Callable[[Any, Problem], Any]) -> dict[str, Function]:
    """Implementations of a function of the text tower's block operations."""

    def run(impl: str, problem: Problem) -> Any:
        if impl == "triton":
            from pspg.kernels.text_tower.triton import TRITON  # imports triton

            return function(TRITON, problem)
        return function(EAGER, problem)

    return by_impl(run)


def _rows(s: Sizes) -> int:
    return min(s.pairs, s.C * (s.C - 1) // 2) * (s.n + 1)


def _pairs(s: Sizes, device: torch.device) -> RaggedPairs:
    first, second = (part[: s.pairs] for part in pair_indices(s.C, device))
    tokens = s.n + 1
    return RaggedPairs(first, second, prefixes=s.C, suffixes=s.C, prefix_tokens=tokens, suffix_tokens=tokens)


def _attention_problem(s: Sizes, device: torch.device, dtype: torch.dtype) -> Problem:
    pairs, normal = _pairs(s, device), partial(_normal, device=device, dtype=dtype)
    count, tokens = len(pairs.prefix_index), s.n + 1
    return Problem((normal(count, tokens, 3 * s.W), normal(s.C, tokens, 2 * s.W)), (pairs, s.heads))


def _pooled_problem(s: Sizes, device: torch.device, dtype: torch.dtype) -> Problem:
    """Queries of a token a sequence, and what they see: prefixes and suffixes, keys and values at once."""
    pairs, normal = _pairs(s, device), partial(_normal, device=device, dtype=dtype)
    count, tokens = len(pairs.prefix_index), s.n + 1
    return Problem((normal(s.heads, count, s.W), normal(s.C, tokens, s.W), normal(count, tokens, s.W)), (pairs,))


def _gather_problem(s: Sizes, device: torch.device, dtype: torch.dtype) -> Problem:
    return Problem((_normal(s.C, s.n + 1, 3 * s.W, device=device, dtype=dtype),), (_pairs(s, device),))


def _block_tower(s: Sizes, layers: int, device: torch.device, dtype: torch.dtype) -> TextTower:
    """A tower without the weights that add_norm and mlp do not read: what an operator is given counts as read."""
    tower = random_tower(Sizes(W=s.W, layers=layers, heads=1, D=1), device, dtype)
    none = tower.positional_embedding[:0]
    bare = tuple(layer._replace(in_proj_weight=none, out_proj_weight=none) for layer in tower.layers)
    return replace(tower, layers=bare, positional_embedding=none, projection=none)


def _norm_problem(s: Sizes, device: torch.device, dtype: torch.dtype) -> Problem:
    x, delta = (_normal(_rows(s), s.W, device=device, dtype=dtype) for _ in range(2))
    return Problem((x, delta), (_block_tower(s, 0, device, dtype),))


def _mlp_problem(s: Sizes, device: torch.device, dtype: torch.dtype) -> Problem:
    y = _normal(_rows(s), s.W, device=device, dtype=dtype)
    return Problem((y,), (_block_tower(s, 1, device, dtype),))


def _products_problem(s: Sizes, device: torch.device, dtype: torch.dtype) -> Problem:
    (x, attended), (tower,) = _norm_problem(s, device, dtype).leaves, _mlp_problem(s, device, dtype).fixed
    layer = random_tower(Sizes(W=s.W, layers=1, heads=1, D=1), device, dtype).layers[0]
    return Problem((x, attended), (replace(tower, layers=(layer,)), s.products, s.tiles))


def _block_products(operations: BlockOperations, problem: Problem) -> tuple[Tensor, Tensor]:
    """A block after its attention, and the next one's projection; kernels as `products` and `tiles` say, from 1."""
    (x, attended), (tower, choice, tiles) = problem.leaves, problem.fixed
    with _using("text_tower.triton.products", choice, operations is not EAGER, tiles):
        stream = finish(tower, operations, tower.layers[0], Stream(x), attended)
        stream, qkv = project(tower, operations, tower.layers[0], stream)
    return stream.total(), qkv


CBn = {"C": 108, "B": 64, "n": 16}
DECODER = {**CBn, "D": 1024, "H": 512, "heads": 8, "launches": 1}
OPERATORS: dict[str, Operator] = {
    "prompt_decoder": Operator(DECODER, _decoder_problem, by_impl(_decode)),
    "spcl": Operator({**CBn, **TOWER}, _spcl_problem, by_impl(_spcl, tidy=_repaired_spcl), _spcl_parts),
    "text_tower": Operator(
        {"C": 108, "n": 16, **TOWER}, _text_problem, by_impl(_single_features, tidy=_repaired_features), _text_parts
    ),
    "pair_loss": Operator({"C": 108, "B": 64, "D": 1024}, _pair_problem, by_impl(called(pair_loss), exact=True)),
    "asymmetric_loss": Operator({"C": 108, "B": 64}, _asl_problem, by_impl(called(asymmetric_loss), exact=True)),
    "batch_norm": Operator({"B": 64, "channels": 256, "side": 56}, _batch_norm_problem, by_impl(_batch_norm)),
    "packed_attention": Operator(
        {"B": 64, "tokens": 64, "W": 512, "heads": 8}, _packed_problem, by_impl(_packed_attention, exact=True)
    ),
    "suffix_attention": Operator(
        {**BLOCK, "heads": 8},
        _attention_problem,
        block_operation(lambda operations, p: operations.attention(p.fixed[1], *p.leaves, p.fixed[0])),
    ),
    "pooled_attention": Operator(
        {**BLOCK, "heads": 8},
        _pooled_problem,
        block_operation(
            lambda operations, p: operations.pooled_attention(*p.leaves, *p.fixed, p.leaves[0].shape[2] ** -0.5)
        ),
    ),
    "gather": Operator(
        BLOCK, _gather_problem, block_operation(lambda operations, p: operations.gather_suffix(*p.leaves, *p.fixed))
    ),
    "block_products": Operator(
        {**BLOCK, "products": 3, "tiles": 1}, _products_problem, block_operation(_block_products)
    ),
    "add_norm": Operator(
        BLOCK,
        _norm_problem,
        block_operation(
            lambda operations, p: operations.add_norm(
                p.fixed[0], *p.leaves, p.fixed[0].ln_final_weight, p.fixed[0].ln_final_bias
            )
        ),
    ),
    "mlp": Operator(
        BLOCK,
        _mlp_problem,
        block_operation(lambda operations, p: operations.mlp(p.fixed[0], p.fixed[0].layers[0], *p.leaves)),
    ),
}
