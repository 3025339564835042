"""Class names as the model sees them, and what makes their prompts."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence

import open_clip
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from pspg.kernels.text_tower import PromptTemplate, encode

from ..distributed.collectives import broadcast_host, rank, world_size
from ..utils.errors import UserError
from .clip import TextEncoder, text_encoder, tokenize, tokenizer

CHUNK = 256
"""names that are encoded at a time"""


class ClassSet(nn.Module):
    """A class list and what the text tower makes of it once: constants that move with `.to(...)`.

    They are in no state dict, as in the published code; `tensors` and `load` keep what cannot be made again.
    """

    names: list[str]
    class_features: Tensor
    """(C,D) text features of the plain names, not normalised: t_0 of the decoders"""
    sos: Tensor
    padding: Tensor
    suffix: Tensor
    name_lengths: Tensor
    tail_lengths: Tensor | None
    rows: Tensor
    """(C,) place of each class among the K that a model was trained on; −1: not among them, or not known"""
    mixing: Tensor
    """(C,K) what each class has of the training classes' residuals; K is 0 where there are none"""

    def __init__(
        self,
        names: Sequence[str],
        class_features: Tensor,
        sos: Tensor,
        padding: Tensor,
        suffix: Tensor,
        lengths: list[int],
        tails: list[int] | None = None,
    ) -> None:
        super().__init__()
        self.names = list(names)
        for name, tensor in (
            ("class_features", class_features),
            ("sos", sos),
            ("padding", padding),
            ("suffix", suffix),
            ("name_lengths", torch.tensor(lengths, device=suffix.device)),
            ("tail_lengths", None if tails is None else torch.tensor(tails, device=suffix.device)),
            ("rows", torch.full((len(names),), -1, device=suffix.device)),
            ("mixing", torch.zeros(len(names), 0, device=suffix.device)),
        ):
            self.register_buffer(name, tensor, persistent=False)
        self._lengths, self._tails = tuple(lengths), tuple(tails or ())

    def __len__(self) -> int:
        return len(self.names)

    def place_among(self, training: Sequence[str]) -> None:
        """Set `rows` for the classes that a model was trained on; names are compared as the tokenizer reads them."""
        place = {tuple(tokenizer().encode(name)): row for row, name in enumerate(training)}
        rows = [place.get(tuple(tokenizer().encode(name)), -1) for name in self.names]
        self.rows = torch.tensor(rows, device=self.rows.device)

    @property
    def template(self) -> PromptTemplate:
        """Embeddings around the prompt vectors."""
        lengths = (self.name_lengths, self._lengths, max(self._lengths))
        return PromptTemplate(self.sos, self.padding, self.suffix, *lengths, self.tail_lengths, self._tails)


@torch.no_grad()
def make_class_set(
    source: open_clip.CLIP | TextEncoder,
    names: Sequence[str],
    prefix: bool = False,
    *,
    prompt_length: int = 0,
    shared: bool = False,
) -> ClassSet:
    """Tokenise and encode a class list, once.

    Args:
        source: CLIP, or a text encoder, that class features and token embeddings are taken from.
        names: class names.
        prefix: prompts stand before the class name.
        prompt_length: n, to check that pair prompts fit the context.
        shared: all ranks make this class list, on the CPU: each encodes a part.

    Raises:
        UserError: no names, empty names, duplicates (also for the tokenizer, which ignores case), names or prompts
            longer than the context, or names whose token embeddings the source lacks.
    """
    encoder = source if isinstance(source, TextEncoder) else text_encoder(source)
    context, table = encoder.tower.context_length, encoder.token_embedding
    tokens = [tokenizer().encode(name) for name in names]
    _check_names(names, tokens, context)
    # The whole sentence: ")" and "." are one token together.
    sentences = [tokenizer().encode(f"{name}.") if prefix else [] for name in names]
    lengths = [min(len(ids), len(sentence)) for ids, sentence in zip(tokens, sentences, strict=True)]
    tails = [len(sentence) - length for sentence, length in zip(sentences, lengths, strict=True)]
    longest = 2 + 2 * prompt_length + sum(sorted(lengths)[-2:])
    if max(longest, 2 + prompt_length + max(map(len, sentences))) > context:
        raise UserError(
            f"model.prompt_length: {prompt_length} vectors make pair prompts of {longest} tokens, "
            f"the context holds {context}" + ("; shorten the class names" if prefix else "")
        )
    eos = tokenizer().eot_token_id
    # Padding (token 0) fills up to the longest suffix; nothing pooled sees it.
    width = max(lengths) + max(tails) + 1
    suffix = torch.tensor([[*ids, eos] + [0] * (width - 1 - len(ids)) for ids in sentences], device=table.device)
    features = _encode_names(encoder, names, shared)
    class_set = ClassSet(
        names,
        features,
        table[tokenizer().sot_token_id].clone(),
        table[0].clone(),
        F.embedding(suffix, table),
        lengths,
        tails if prefix and set(tails) != {1} else None,
    )
    constants = torch.cat([class_set.class_features, class_set.suffix.flatten(1)], dim=1)
    finite = constants.isfinite().all(dim=1)
    if not finite.all():
        bad = names[int(finite.int().argmin())]
        raise UserError(f"class names: the weights hold no (finite) token embedding for {bad!r}")
    return class_set


def _encode_names(encoder: TextEncoder, names: Sequence[str], shared: bool) -> Tensor:
    """(C,D) features of the bare names, in chunks, each as long as its longest name; `shared`: and each on one rank."""
    table, projection = encoder.token_embedding, encoder.tower.projection
    parts = []
    for number, tokens in enumerate(tokenize(names, encoder.tower.context_length).to(table.device).split(CHUNK)):
        owner = number % world_size() if shared else None
        if owner is None or owner == rank():
            end = tokens.argmax(dim=-1)  # EOS is the largest id
            parts.append(encode(encoder.tower, F.embedding(tokens[:, : int(end.max()) + 1], table), end))
        else:
            parts.append(projection.new_empty(len(tokens), projection.shape[1]))
    if shared:
        parts = [part.contiguous() for part in parts]
        for number, part in enumerate(parts):
            broadcast_host(part, number % world_size())
    return torch.cat(parts)


def _check_names(names: Sequence[str], tokens: Sequence[Sequence[int]], context: int) -> None:
    if not names:
        raise UserError("class names: the list is empty")
    for number, (name, ids) in enumerate(zip(names, tokens, strict=True), start=1):
        if not ids:
            raise UserError(f"class names: number {number} ({name!r}) is empty")
        if len(ids) + 2 > context:
            raise UserError(
                f"class names: {name[:40]!r}… takes {len(ids)} tokens, the context holds {context - 2}; shorten it"
            )
    for ids, count in Counter(map(tuple, tokens)).items():
        if count > 1:
            same = [repr(name) for name, other in zip(names, tokens, strict=True) if tuple(other) == ids]
            raise UserError(f"class names: duplicates: {', '.join(same)} (upper and lower case read the same)")
