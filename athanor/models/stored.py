"""Which tensors of a folder hold which parameters of a model, and how."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from athanor.foundation.placement import placements
from athanor.models.decoder import Decoder

TRANSPOSED = ".T"


@dataclass(frozen=True)
class Stored:
    """Tensors of one shape and the parameters that they hold, whose rows lie one after another in each of them.

    A tensor that `is_transposed` has them as columns. Parameters that are stacks [E, rows, …] (`is_stacked`) have E tensors,
    all others one.
    """

    tensors: tuple[str, ...]
    shape: tuple[int, ...]
    rows: Mapping[str, range]  # of each parameter
    is_stacked: bool
    is_transposed: bool

    def join(self, parameters: Sequence[Tensor]) -> Tensor:
        """What the tensors hold, one after another, from the whole parameters."""
        joined = parameters[0] if len(parameters) == 1 else torch.cat(list(parameters), int(self.is_stacked))
        return joined.mT if self.is_transposed else joined

    def take(self, parameter: str, read: Callable[[str], Any]) -> Tensor:
        """One whole parameter; `read` gives a tensor, or what can be cut like one."""
        rows = slice(self.rows[parameter].start, self.rows[parameter].stop)
        parts = [read(name)[:, rows].mT if self.is_transposed else read(name)[rows] for name in self.tensors]
        return torch.stack(parts) if self.is_stacked else parts[0]


def stored(module: Decoder) -> list[Stored]:
    """How the parameters of a module (of the whole model or of a stage) are stored, in their order."""
    together: dict[str, list[str]] = {}
    for name in placements(module):
        together.setdefault(written(name, module.on_disk), []).append(name)
    return [_stored(place, {name: placements(module)[name].shape for name in names}) for place, names in together.items()]


def written(name: str, on_disk: Mapping[str, str]) -> str:
    """Where a parameter is written. `on_disk` maps beginnings of names (keys with a dot at the end) and ends of names.

    Parameters of one place are joined there. With {} in it the place is a tensor for each entry of dim 0, with .T at the end
    one that is transposed.
    """
    for part, other in on_disk.items():
        if part.endswith(".") and name.startswith(part):
            name = other + name.removeprefix(part)
        elif name.endswith(part):
            name = name.removesuffix(part) + other
    return name


def _stored(place: str, shapes: dict[str, tuple[int, ...]]) -> Stored:
    is_stacked, is_transposed = "{}" in place, place.endswith(TRANSPOSED)
    rows, end = {}, 0
    for name, shape in shapes.items():
        begin, end = end, end + shape[is_stacked]
        rows[name] = range(begin, end)
    whole = (end, *shape[1 + is_stacked:])
    place = place.removesuffix(TRANSPOSED)
    tensors = tuple(place.format(i) for i in range(shape[0])) if is_stacked else (place,)
    return Stored(tensors, whole[::-1] if is_transposed else whole, rows, is_stacked, is_transposed)
