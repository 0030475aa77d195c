"""Which part of each parameter a rank holds: what the axes of the layout did to it, one after another."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class Box:
    """The part of a global tensor that a rank holds: where it begins and how far it goes, per dim."""

    offset: tuple[int, ...]
    shape: tuple[int, ...]

    def overlap(self, other: Box) -> Box | None:
        """What two boxes share, in global coordinates; None when they share nothing."""
        begin = tuple(map(max, zip(self.offset, other.offset, strict=True)))
        end = tuple(min(a + n, b + m) for a, n, b, m in zip(self.offset, self.shape, other.offset, other.shape, strict=True))
        if any(e <= b for b, e in zip(begin, end, strict=True)):
            return None
        return Box(begin, tuple(e - b for b, e in zip(begin, end, strict=True)))

    def slices(self, within: Box | None = None) -> tuple[slice, ...]:
        """Indices of this box inside the tensor that holds `within`, or inside the global one."""
        begin = within.offset if within is not None else (0,) * len(self.offset)
        return tuple(slice(a - b, a - b + n) for a, b, n in zip(self.offset, begin, self.shape, strict=True))


@dataclass(frozen=True)
class Cut:
    """What one axis does to a tensor: its ranks share out `dim` in equal parts, the last of which may be smaller or empty.

    Where `dim` is None each has a copy. `index` is this rank's number among them.
    """

    axis: str
    ranks: int
    index: int
    dim: int | None


@dataclass(frozen=True)
class Placement:
    """Which part of a global tensor of `shape` a rank holds: each cut is of what those before it left."""

    shape: tuple[int, ...]
    cuts: tuple[Cut, ...] = ()

    def then(self, cut: Cut) -> Placement:
        """The same, cut once more."""
        return Placement(self.shape, (*self.cuts, cut))

    def box(self, place: Mapping[str, int] | None = None) -> Box:
        """The part of this rank, or of the one with these coordinates by axis."""
        offset, sizes = [0] * len(self.shape), list(self.shape)
        for cut in self.cuts:
            if cut.dim is not None:
                part = -(-sizes[cut.dim] // cut.ranks)
                begin = min(sizes[cut.dim], part * (cut.index if place is None else place[cut.axis]))
                offset[cut.dim] += begin
                sizes[cut.dim] = min(sizes[cut.dim], begin + part) - begin
        return Box(tuple(offset), tuple(sizes))

    def is_first_copy(self, place: Mapping[str, int] | None = None) -> bool:
        """Whether no earlier rank of these axes holds the same part as this one, or as the one at `place`."""
        return all((cut.index if place is None else place[cut.axis]) == 0 for cut in self.cuts if cut.dim is None)

    @property
    def is_copied(self) -> bool:
        """Whether tensor-parallel ranks hold the same part."""
        return any(cut.axis == "tp" and cut.dim is None for cut in self.cuts)


def placements(module: Any) -> dict[str, Placement]:
    """How the parameters of a torch module are placed, by name: a table it carries, to be kept by who cuts them.

    Until then, at the first call, they are whole.
    """
    if not hasattr(module, "placements"):
        module.placements = {name: Placement(tuple(parameter.shape)) for name, parameter in module.named_parameters()}
    return module.placements  # type: ignore[no-any-return]
