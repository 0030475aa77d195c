"""Keys and values in pages, and the pool that hands pages out."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from athanor.models.collectives import size
from athanor.models.context import Cache, Groups, Paged
from athanor.models.decoder import Decoder

PAGE_TOKENS = 16


class PagePool:
    """The cache of one engine: `count` pages for all blocks of this rank's model, and which of them are free."""

    def __init__(self, model: Decoder, cache_tokens: int, groups: Groups) -> None:
        shape, parameter = model.shape, next(model.parameters())
        self.count = pages_of(cache_tokens)
        self.groups, self.device = groups, parameter.device
        heads = shape.num_key_value_heads // size(groups.tp)
        sizes = (2, self.count, PAGE_TOKENS, heads, shape.head_dim)
        layers = {int(number): torch.zeros(sizes, dtype=parameter.dtype, device=self.device) for number in model.blocks}
        filters = {number: parameter.new_zeros(2, self.count, shape.filter_size // 2) for number in layers}
        self.cache = Cache(layers, PAGE_TOKENS, filters)
        self._free = list(range(self.count - 1, -1, -1))

    @property
    def free(self) -> int:
        """Pages that nobody holds."""
        return len(self._free)

    def take(self, count: int) -> list[int]:
        """`count` free pages; the caller has looked whether there are as many."""
        assert count <= len(self._free), "more pages are taken than are free"
        return [self._free.pop() for _ in range(count)]

    def give_back(self, pages: list[int]) -> None:
        """Free these pages and empty the list, so that nothing is given back twice."""
        self._free += pages
        pages.clear()

    def context(self, pages: Sequence[list[int]], firsts: Sequence[int], lengths: Sequence[int]) -> Paged:
        """The context of sequences with these pages whose new tokens are `firsts[i]` .. `firsts[i] + lengths[i]`.

        Only the logits after each sequence's last token are wanted.
        """
        most = max(len(p) for p in pages)
        table = torch.tensor([p + [0] * (most - len(p)) for p in pages], device=self.device)
        numbers = [number for f, n in zip(firsts, lengths, strict=True) for number in range(f, f + n)]
        positions = torch.tensor(numbers, device=self.device)
        count = torch.tensor(list(lengths), device=self.device)
        wanted: Tensor = count.cumsum(0) - 1
        return Paged(positions, table, count, self.cache, self.groups, wanted)


def pages_of(tokens: int) -> int:
    """Pages that so many tokens need."""
    return -(-tokens // PAGE_TOKENS)
