"""The text tower's input: prompt vectors among constant token embeddings (paper 3.2).

    single prompt   SOS V_c suffix_c
    pair prompt     SOS V_i name_i V_j suffix_j

The token suffix is EOS. In prefix mode it is the tokens of "name." and EOS; without it name_i is empty. Where a name
ends in punctuation, its last token holds the ".", too. All sequences are assembled by one lookup in a table of vectors,
so backward is one scatter-add.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
import torch.nn.functional as F
from torch import Tensor


@dataclass(frozen=True)
class PromptTemplate:
    """Constant token embeddings around the prompt vectors of C classes."""

    sos: Tensor
    """(W,)"""
    padding: Tensor
    """(W,)"""
    token_suffix: Tensor
    """(C,K,W): EOS (K = 1), or in prefix mode the tokens of "name.", EOS, padding"""
    name_lengths: Tensor
    """(C,) int64: name tokens in the suffix, 0 without prefix mode"""
    lengths: tuple[int, ...]
    """name_lengths on the host"""
    longest_name: int
    """largest of name_lengths, in the whole class list"""
    tail_lengths: Tensor | None = None
    """prefix mode: (C,) int64, tokens between the name and EOS; None: one each, a full stop"""
    tails: tuple[int, ...] = ()
    """tail_lengths on the host"""

    @property
    def named(self) -> bool:
        """Prefix mode: class names follow the prompt vectors."""
        return self.longest_name > 0

    @property
    def ends(self) -> Tensor:
        """(C,) place of EOS in the suffix."""
        tail = (1 if self.named else 0) if self.tail_lengths is None else self.tail_lengths
        return self.name_lengths + tail

    @property
    def longest_tail(self) -> int:
        """Largest number of tokens between a name and EOS."""
        return max(self.tails, default=1) if self.named else 0

    @property
    def longest_pair(self) -> int:
        """Largest sum of two classes' name lengths."""
        return sum(sorted(self.lengths)[-2:])

    def rows(self, start: int, stop: int) -> PromptTemplate:
        """The template of classes start to stop; the suffixes keep their width."""
        part = slice(start, stop)
        return replace(
            self,
            token_suffix=self.token_suffix[part],
            name_lengths=self.name_lengths[part],
            lengths=self.lengths[part],
            tail_lengths=None if self.tail_lengths is None else self.tail_lengths[part],
            tails=self.tails[part],
        )

    def take(self, rows: Tensor) -> PromptTemplate:
        """The template of classes `rows` (K,) on the device, which the host does not know: all names count as longest.

        It serves prefixes; `longest_pair` and the groups of pair suffixes are not those of the classes.
        """
        return replace(
            self,
            token_suffix=self.token_suffix.index_select(0, rows),
            name_lengths=self.name_lengths.index_select(0, rows),
            lengths=(self.longest_name,) * len(rows),
            tail_lengths=None if self.tail_lengths is None else self.tail_lengths.index_select(0, rows),
            tails=(max(self.tails),) * len(rows) if self.tails else (),
        )

    def to(self, dtype: torch.dtype) -> PromptTemplate:
        """The template in another dtype."""
        return replace(
            self,
            sos=self.sos.to(dtype),
            padding=self.padding.to(dtype),
            token_suffix=self.token_suffix.to(dtype),
        )

    def single_tokens(self, prompt_length: int) -> int:
        """Tokens of the longest single prompt, EOS included."""
        return 1 + prompt_length + self.longest_name + self.longest_tail + 1

    def pair_tokens(self, prompt_length: int) -> int:
        """Tokens of the longest pair prompt, up to the pooled one."""
        return 2 + 2 * prompt_length + self.longest_pair


def single_prompts(prompts: Tensor, template: PromptTemplate, *, tokens: int | None = None) -> tuple[Tensor, Tensor]:
    """Embedding sequences of the single prompts of all classes.

    Args:
        prompts: (C,n,W).
        tokens: T, length of the sequences; None: as long as needed.

    Returns:
        Embeddings (C,T,W), before the positional embedding, and position of EOS (C,).
    """
    classes, n, _ = prompts.shape
    table = _Table(prompts, template)
    c = torch.arange(classes, device=prompts.device)[:, None]
    t = torch.arange(tokens or template.single_tokens(n), device=prompts.device)
    index = torch.where(t > n, table.suffix(c, t - 1 - n), torch.where(t > 0, table.vector(c, t - 1), table.SOS))
    return table.look_up(index), 1 + n + template.ends


def pair_prompts(
    prompts: Tensor, template: PromptTemplate, first: Tensor, second: Tensor, *, tokens: int | None = None
) -> tuple[Tensor, Tensor]:
    """Embedding sequences of pair prompts.

    Args:
        prompts: (C,n,W).
        first, second: (R,) int64, classes i and j of each pair.
        tokens: T, length of the sequences; None: as long as needed.

    Returns:
        Embeddings (R,T,W), before the positional embedding, and pooled positions (R,): 1 + 2n + both name lengths. That
        is EOS, but in prefix mode the final "." before it, as in the published implementation.
    """
    n = prompts.shape[1]
    table = _Table(prompts, template)
    i, j = first[:, None], second[:, None]
    t = torch.arange(tokens or template.pair_tokens(n), device=prompts.device)
    # Offsets into the four segments that follow SOS; negative before a segment starts.
    in_v_i = t - 1
    in_name_i = in_v_i - n
    in_v_j = in_name_i - template.name_lengths[i]
    in_suffix_j = in_v_j - n
    index = torch.where(in_v_i >= 0, table.vector(i, in_v_i), table.SOS)
    index = torch.where(in_name_i >= 0, table.suffix(i, in_name_i), index)
    index = torch.where(in_v_j >= 0, table.vector(j, in_v_j), index)
    index = torch.where(in_suffix_j >= 0, table.suffix(j, in_suffix_j), index)
    return table.look_up(index), 1 + 2 * n + template.name_lengths[first] + template.name_lengths[second]


class _Table:
    """Every vector that a sequence can hold, as rows: SOS, padding, the prompts, the suffixes."""

    SOS, PADDING = 0, 1

    def __init__(self, prompts: Tensor, template: PromptTemplate) -> None:
        self._n, self._k = prompts.shape[1], template.token_suffix.shape[1]
        self._suffixes = 2 + prompts.shape[0] * self._n
        self._rows = torch.cat(
            [template.sos[None], template.padding[None], prompts.flatten(0, 1), template.token_suffix.flatten(0, 1)]
        )

    def vector(self, c: Tensor, offset: Tensor) -> Tensor:
        return 2 + c * self._n + offset

    def suffix(self, c: Tensor, offset: Tensor) -> Tensor:
        return torch.where(offset < self._k, self._suffixes + c * self._k + offset, self.PADDING)

    def look_up(self, index: Tensor) -> Tensor:
        return F.embedding(index, self._rows)
