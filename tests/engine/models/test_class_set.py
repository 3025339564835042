"""Prefix mode: the sentence "<vectors> name." is tokenised whole, as CLIP's own tokenizer reads it."""

from __future__ import annotations

from collections.abc import Callable

import open_clip
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from pspg.engine.models.class_set import make_class_set
from pspg.engine.models.clip import text_tower, tokenize, tokenizer
from pspg.kernels.text_tower import encode, encode_prompts, pair_prompts

MakeClip = Callable[..., open_clip.CLIP]

NAMES = ["effusion (left)", "effusion", "st.", "foo--", "(x))", "what?", "5%", 'a "b"', "fracture - rib."]
N = 3


def sentence(clip: open_clip.CLIP, name: str, vectors: Tensor) -> tuple[Tensor, int]:
    """Embeddings of "X X X name." with the vectors for the X, and the position of EOS."""
    tokens = tokenize([" ".join(["X"] * N) + f" {name}."], clip.context_length)[0]
    embeddings = F.embedding(tokens, clip.token_embedding.weight).clone()
    embeddings[1 : 1 + N] = vectors
    return embeddings, int(tokens.argmax())


@pytest.mark.parametrize("impl", ["reference", "eager"])
@pytest.mark.parametrize("names", [NAMES, NAMES[:1], NAMES[1:2], NAMES[4:]])
def test_single_prompts_are_whole_sentences(make_clip: MakeClip, names: list[str], impl: str) -> None:
    clip = make_clip().double().requires_grad_(False)
    vectors = torch.randn(2, len(names), N, clip.token_embedding.weight.shape[1], dtype=torch.float64)
    template, tower = make_class_set(clip, names, prefix=True, prompt_length=N).template, text_tower(clip)
    found = encode_prompts(tower, template, vectors, impl=impl).features
    grouped = encode_prompts(tower, template, vectors, impl=impl, memory=1).features
    torch.testing.assert_close(grouped, found)
    for side in range(2):
        for number, name in enumerate(names):
            embeddings, end = sentence(clip, name, vectors[side, number])
            right = encode(tower, embeddings[None], end, impl="reference")[0]
            torch.testing.assert_close(found[side, number], right, atol=1e-10, rtol=1e-10)


def test_pairs_pool_where_the_published_code_does(make_clip: MakeClip) -> None:
    """At 1 + 2n + the lengths of both bare names; name_i is as many tokens of its sentence."""
    clip = make_clip().double().requires_grad_(False)
    vectors = torch.randn(len(NAMES), N, clip.token_embedding.weight.shape[1], dtype=torch.float64)
    template = make_class_set(clip, NAMES, prefix=True, prompt_length=N).template
    first, second = torch.triu_indices(len(NAMES), len(NAMES), 1)
    embeddings, pooled = pair_prompts(vectors, template, first, second)
    for row, (i, j) in enumerate(zip(first.tolist(), second.tolist(), strict=True)):
        count, other = (len(tokenizer().encode(NAMES[c])) for c in (i, j))
        left, right = (sentence(clip, NAMES[c], vectors[c])[0] for c in (i, j))
        whole = torch.cat([left[: 1 + N + count], right[1 : 1 + N + other + 1]])
        assert pooled[row] == 1 + 2 * N + count + other
        torch.testing.assert_close(embeddings[row, : len(whole)], whole)
