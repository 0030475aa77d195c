"""What a forward pass must know besides its tokens: where documents begin, or where their keys and values are kept."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import TYPE_CHECKING, NamedTuple

import torch
from torch import Tensor

if TYPE_CHECKING:
    import torch.distributed as dist


@dataclass(frozen=True)
class Groups:
    """The process groups that model code communicates in; None is a group of one."""

    tp: dist.ProcessGroup | None = None
    cp: dist.ProcessGroup | None = None
    ep: dist.ProcessGroup | None = None


class Rope:
    """Cosine and sine of each token's angles [T, 1, head_dim / 2, 2], in fp32 or wider.

    Not a dataclass, so that fully_shard does not look inside and cast them to the dtype it computes in.
    """

    def __init__(self, table: Tensor) -> None:
        self.table = table


@dataclass(frozen=True)
class Packed:
    """Documents one after another on one axis of T tokens.

    positions [T] restart at 0 with each document; cu_seqlens [K] int32 are the documents' starts and T, padded with T to a
    fixed length; no document is longer than max_length. Under context parallelism the tokens are this rank's contiguous
    part of T, while positions and cu_seqlens are those of the whole T. `wanted` are the indices whose logits are returned
    when there are no targets (None: all). `is_even`: every document has max_length tokens, so that kernels need not look at
    cu_seqlens. `z_loss` is the coefficient of the squared logsumexp in the loss, `mtp_weight` that of the mean loss of blocks
    that predict further tokens, which are not computed where it is 0. `row_tokens`: T is made of rows of so many, which a
    filter may read across documents; 0: nothing reads across. `rope` is filled by the model, once per forward pass.
    """

    positions: Tensor
    cu_seqlens: Tensor
    max_length: int
    groups: Groups = field(default_factory=Groups)
    wanted: Tensor | None = None
    rope: Rope | None = None
    is_even: bool = False
    z_loss: float = 0.0
    mtp_weight: float = 0.0
    row_tokens: int = 0

    @property
    def tokens(self) -> int:
        """Tokens of this context-parallel rank."""
        return len(self.positions) // (1 if self.groups.cp is None else self.groups.cp.size())

    @classmethod
    def of(cls, lengths: Sequence[int], device: torch.device | str = "cpu", groups: Groups | None = None,
           wanted: Tensor | None = None) -> Packed:
        """The context of whole documents of these lengths."""
        positions = torch.cat([torch.arange(length, device=device) for length in lengths])
        ends = torch.tensor([0, *lengths], device=device).cumsum(0, dtype=torch.int32)
        return cls(positions, ends, max(lengths), groups or Groups(), wanted, is_even=len(set(lengths)) == 1)

    def prepared(self, owner: torch.nn.Module, make: Callable[[], Tensor]) -> Tensor:
        """A weight in the form it is multiplied in: made anew in every pass, since training changes weights."""
        return make()


@dataclass
class Cache:
    """Keys and values of all blocks in pages: layers[i] is [2, pages, page_tokens, heads, head_dim].

    filters[i] [2, pages, width] is what a block's two convolutions need of the last token in each page; width 0 without them.
    `weights` keeps weights in the form they are multiplied in; whoever changes the model's weights clears it.
    """

    layers: dict[int, Tensor]
    page_tokens: int
    filters: dict[int, Tensor] = field(default_factory=dict)
    weights: dict[int, Tensor] = field(default_factory=dict)


@dataclass(frozen=True)
class Paged:
    """New tokens of B sequences, one after another, whose earlier keys and values lie in a cache.

    positions [T] of the new tokens; block_table [B, M] the pages of each sequence; lengths [B] new tokens of each
    sequence (they are its last ones). `wanted` and `rope` as in Packed.
    """

    positions: Tensor
    block_table: Tensor
    lengths: Tensor
    cache: Cache
    groups: Groups = field(default_factory=Groups)
    wanted: Tensor | None = None
    rope: Rope | None = None
    masks: dict[int, Tensor] = field(default_factory=dict)  # by window

    @property
    def tokens(self) -> int:
        """New tokens of all sequences."""
        return len(self.positions)

    @cached_property
    def starts(self) -> Tensor:
        """[B + 1] where each sequence's new tokens begin, and T."""
        return torch.cat([self.lengths.new_zeros(1), self.lengths.cumsum(0)])

    @cached_property
    def cu_seqlens(self) -> Tensor:
        return self.starts.to(torch.int32)

    @cached_property
    def sequence(self) -> Tensor:
        """[T] the sequence of each new token."""
        return torch.repeat_interleave(torch.arange(len(self.lengths), device=self.lengths.device), self.lengths)

    @cached_property
    def offset(self) -> Tensor:
        """[T] each token's number among its sequence's new tokens."""
        return torch.arange(len(self.positions), device=self.positions.device) - self.starts[self.sequence]

    @cached_property
    def longest(self) -> int:
        return int(self.lengths.max())

    @cached_property
    def is_whole(self) -> bool:
        """Whether no sequence has anything in the cache yet."""
        return not bool(self.positions[self.starts[:-1]].any())

    @cached_property
    def places(self) -> tuple[Tensor, Tensor]:
        """[T], [T]: page and slot of each new token."""
        page_tokens = self.cache.page_tokens
        return self.block_table[self.sequence, self.positions // page_tokens], self.positions % page_tokens

    @cached_property
    def before(self) -> tuple[Tensor, Tensor]:
        """[B], [B, 1]: the page of the token before each sequence's first new one, and whether there is such a token."""
        last = self.positions[self.starts[:-1]] - 1
        pages = self.block_table.gather(1, last.clamp(min=0).unsqueeze(1) // self.cache.page_tokens)
        return pages.squeeze(1), last.unsqueeze(1) >= 0

    @cached_property
    def tails(self) -> tuple[Tensor, Tensor]:
        """[N], [N]: the new tokens that are the last in their pages, and these pages."""
        page, slot = self.places
        is_tail = slot == self.cache.page_tokens - 1
        is_tail[self.starts[1:] - 1] = True
        return is_tail.nonzero().squeeze(1), page[is_tail]

    def mask(self, window: int) -> Tensor:
        """[B, 1, longest, M x page_tokens], to be added to scores: 0 up to the query's own position, of at most `window` keys
        where that is not 0; -inf elsewhere."""
        if window in self.masks:
            return self.masks[window]
        layer = next(iter(self.cache.layers.values()))
        positions = self.positions.new_zeros(len(self.lengths), self.longest)
        positions[self.sequence, self.offset] = self.positions
        keys = torch.arange(self.block_table.shape[1] * self.cache.page_tokens, device=positions.device)
        hidden = keys > positions[:, None, :, None]
        if window:
            hidden |= keys <= positions[:, None, :, None] - window
        mask = torch.zeros(hidden.shape, dtype=layer.dtype, device=layer.device).masked_fill_(hidden, float("-inf"))
        return self.masks.setdefault(window, mask)

    def prepared(self, owner: torch.nn.Module, make: Callable[[], Tensor]) -> Tensor:
        """A weight in the form it is multiplied in: made once for as long as the cache's owner keeps the weights."""
        weights = self.cache.weights
        if id(owner) not in weights:
            weights[id(owner)] = make()
        return weights[id(owner)]


Context = Packed | Paged


class Scored(NamedTuple):
    """What the model says of its targets.

    weighted_sum: sum over tokens of weight x (-log-probability), a scalar (without weights every weight is 1);
    logp, logsumexp [T]: log-probability of each target and the logarithm of the softmax's denominator, in fp32 or wider;
    entropy, score [T]: of models and objectives that have them; z_sum: what the context's z_loss has added to weighted_sum,
    where it has; mtp: sum and total weight of what blocks that predict further tokens say of theirs, where they were asked. A
    tuple, so that fully_shard finds the tensors in it.
    """

    weighted_sum: Tensor
    logp: Tensor
    logsumexp: Tensor
    entropy: Tensor | None = None
    score: Tensor | None = None
    z_sum: Tensor | None = None
    mtp: tuple[Tensor, Tensor] | None = None
