"""How ranks are laid out: the degrees of each axis, what is legal and why not, and how blocks split into stages."""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, fields, replace
from typing import Any

import numpy as np
from numpy.typing import NDArray

from athanor.foundation.errors import LayoutError

AXES = ("pp", "dp_replicate", "dp_shard", "cp", "tp")  # outer to inner
CUT = ("num_attention_heads", "num_key_value_heads", "intermediate_size", "moe_intermediate_size", "vocab_size")  # by tp
KEPT_WHOLE_PARAMETERS = 100_000_000  # of a model whose weights and gradients every rank can afford to hold during a step


@dataclass(frozen=True)
class Layout:
    """Degrees of the five mesh axes; `ep` is carved out of dp_shard x cp. They multiply to the world size."""

    pp: int = 1
    dp_replicate: int = 1
    dp_shard: int = 1
    cp: int = 1
    tp: int = 1
    ep: int = 1

    @property
    def world_size(self) -> int:
        return self.pp * self.dp_replicate * self.dp_shard * self.cp * self.tp

    @property
    def data_ranks(self) -> int:
        """Ranks that read different rows."""
        return self.dp_replicate * self.dp_shard

    def sizes(self) -> tuple[int, ...]:
        return tuple(getattr(self, axis) for axis in AXES)

    def coordinates(self, rank: int) -> dict[str, int]:
        """The position of a rank on each axis."""
        return dict(zip(AXES, (int(i) for i in np.unravel_index(rank, self.sizes())), strict=True))

    def __str__(self) -> str:
        named = [f"{f.name}={getattr(self, f.name)}" for f in fields(self) if getattr(self, f.name) != 1]
        return " ".join(named) or "one rank"


def keeps_whole(layout: Layout, parameters: int) -> bool:
    """Whether sharded weights and gradients are whole during a step, and travel once: in a pipeline, and where they are small."""
    return layout.pp > 1 or parameters <= KEPT_WHOLE_PARAMETERS


def resolve(layout: Layout, world_size: int) -> Layout:
    """Fill dp_shard = -1 with what the other axes leave over, and refuse degrees that do not multiply to the world size."""
    others = layout.pp * layout.dp_replicate * layout.cp * layout.tp
    if layout.dp_shard == -1:
        if world_size % others:
            raise LayoutError(f"pp x dp_replicate x cp x tp = {others} does not divide the {world_size} ranks (dp_shard = 1 "
                              f"makes {others} of them); {_nearest(layout, world_size)}")
        layout = replace(layout, dp_shard=world_size // others)
    if layout.world_size != world_size:
        factors = " x ".join(f"{axis} {getattr(layout, axis)}" for axis in AXES)
        raise LayoutError(f"{factors} = {layout.world_size}, but there are {world_size} ranks; {_nearest(layout, world_size)}")
    return layout


def check_model(layout: Layout, shape: Any, seq_len: int, **instead: int) -> None:
    """Refuse degrees that do not divide a model's sizes, or those given `instead`. Raises LayoutError with what works."""
    cut = {name: instead.get(name, getattr(shape, name, 0)) for name in CUT}
    for name, size in cut.items():
        if size % layout.tp:
            raise LayoutError(f"tp = {layout.tp} does not divide {name} = {size}; tp may be {_divisors(math.gcd(*cut.values()))}")
    if layout.pp > (blocks := instead.get("num_hidden_layers", shape.num_hidden_layers)):
        raise LayoutError(f"pp = {layout.pp} is more than the {blocks} blocks of the model, its most")
    if seq_len % layout.cp:
        raise LayoutError(f"cp = {layout.cp} does not divide seq_len = {seq_len}; cp may be {_divisors(seq_len)}")


def check_experts(layout: Layout, num_experts: int) -> None:
    """Refuse expert parallelism that the model or the other axes do not allow. Raises LayoutError with what works."""
    ranks = layout.dp_shard * layout.cp
    if layout.ep == 1:
        return
    if not num_experts:
        raise LayoutError(f"ep = {layout.ep}, but the model has no experts; leave ep at 1")
    if num_experts % layout.ep or ranks % layout.ep:
        fitting = [d for d in range(1, ranks + 1) if ranks % d == 0 and num_experts % d == 0]
        raise LayoutError(f"ep = {layout.ep} must divide both the {num_experts} experts and dp_shard x cp = {ranks}; "
                          f"ep may be {', '.join(map(str, fitting))}")


def check_batch(*, global_batch_tokens: int, seq_len: int, micro_batch_size: int, data_ranks: int,
                tp: int = 1) -> tuple[int, int]:
    """Split a global batch. Returns (rows per step, micro-batches per rank and step); raises LayoutError with what works."""
    if global_batch_tokens % seq_len:
        raise LayoutError(f"global_batch_tokens = {global_batch_tokens} is not a multiple of seq_len = {seq_len}; "
                          f"the nearest is {max(1, round(global_batch_tokens / seq_len)) * seq_len}")
    rows = global_batch_tokens // seq_len
    unit, multiple = micro_batch_size * data_ranks, tp // math.gcd(tp, seq_len)
    if rows % unit:
        raise LayoutError(f"{rows} rows per step do not split into micro-batches of {micro_batch_size} on {data_ranks} ranks; "
                          f"the nearest global_batch_tokens is {max(1, round(rows / unit)) * unit * seq_len}"
                          f"{_other_split(rows, micro_batch_size, data_ranks, multiple)}")
    if micro_batch_size % multiple:
        raise LayoutError(f"tp = {tp} does not divide the {micro_batch_size * seq_len} tokens of a micro-batch; "
                          f"micro_batch_size may be any multiple of {multiple}")
    return rows, rows // unit


def _other_split(rows: int, micro_batch_size: int, data_ranks: int, multiple: int) -> str:
    """The most of these data ranks, and the nearest micro-batch, some `multiple` of rows, by which so many rows split."""
    splits = [(ranks, -abs(math.log(size / micro_batch_size)), size) for ranks in factors(rows) if ranks <= data_ranks
              for size in factors(rows // ranks) if size % multiple == 0]
    if not splits:
        return ""
    ranks, _, size = max(splits)
    parts = [] if ranks == data_ranks else [f"{ranks} data rank{'' if ranks == 1 else 's'} (dp_replicate x dp_shard)"]
    parts += [] if size == micro_batch_size else [f"micro_batch_size = {size}"]
    return f", or with {' and '.join(parts)} they do"


def factors(number: int) -> list[int]:
    """All divisors, the smallest first."""
    small = [d for d in range(1, math.isqrt(number) + 1) if number % d == 0]
    return sorted({*small, *(number // d for d in small)})


def split_evenly(costs: Sequence[float], stages: int) -> list[int]:
    """Blocks per stage so that the costliest stage is as cheap as possible, by exact dynamic programming.

    `costs` holds one cost per block in order; each stage gets at least one. Raises LayoutError with more stages than blocks.
    """
    if stages > len(costs):
        raise LayoutError(f"{stages} stages cannot be made of {len(costs)} blocks")
    return split_least(np.broadcast_to(spans(np.asarray(costs, float)), (stages, len(costs) + 1, len(costs) + 1)))


def spans(costs: NDArray[np.float64]) -> NDArray[np.float64]:
    """[…, begin, end] sums of costs[…, begin:end], infinite where end <= begin."""
    prefix = np.concatenate([np.zeros((*costs.shape[:-1], 1)), np.cumsum(costs, axis=-1)], axis=-1)
    edges = np.arange(costs.shape[-1] + 1)
    return np.where(edges > edges[:, None], prefix[..., None, :] - prefix[..., None], np.inf)


def split_least(loads: NDArray[np.float64]) -> list[int]:
    """Blocks per stage so that the greatest load is as small as possible, by exact dynamic programming.

    loads[stage, begin, end] is what a stage bears with blocks begin to end, infinite where it may not hold them.
    """
    best = np.full(loads.shape[1], np.inf)
    best[0] = -np.inf
    begins = []
    for load in loads:
        worst = np.maximum(best[:, None], load)
        begins.append(np.argmin(worst, axis=0))
        best = worst.min(axis=0)
    edges = [loads.shape[1] - 1]
    for begin in reversed(begins):
        edges.append(int(begin[edges[-1]]))
    return [end - begin for begin, end in itertools.pairwise(reversed(edges))]


def _divisors(size: int) -> str:
    found = [d for d in range(1, min(size, 64) + 1) if size % d == 0]
    return ", ".join(map(str, found))


def nearest(layout: Layout, world_size: int) -> list[Layout]:
    """Every layout of so many ranks, those first whose degrees differ least from the ones asked for (dp_shard -1: none was)."""
    asked = [(axis, math.log(size)) for axis in (*AXES, "ep") if (size := getattr(layout, axis)) > 0]
    made = [Layout(**dict(zip(AXES, sizes, strict=True)), ep=ep) for sizes in _factorings(world_size, len(AXES))
            for ep in (factors(sizes[2] * sizes[3]) if layout.ep > 1 else [1])]

    def distance(other: Layout) -> tuple[float, int]:
        return round(sum(abs(math.log(getattr(other, axis)) - size) for axis, size in asked), 9), -other.dp_shard

    return sorted(made, key=distance)


def _nearest(layout: Layout, world_size: int) -> str:
    return "nearest layouts: " + "; ".join(map(str, nearest(layout, world_size)[:3]))


def _factorings(number: int, count: int) -> Iterator[tuple[int, ...]]:
    """Every way to write a number as a product of so many factors, in order."""
    if count == 1:
        yield (number,)
        return
    for first in factors(number):
        for rest in _factorings(number // first, count - 1):
            yield first, *rest
