"""Which tensors of a folder hold which parameters of a model, and how."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from athanor.foundation.placement import placements
from athanor.models.decoder import Decoder

PLACE = re.compile(r"(?P<before>.*?)(?:\[(?P<names>.*)\](?P<after>.*?))?(?:\.(?P<form>T|TAPS|TURNS)(?P<turn>\d*))?")
TAPS = 2  # of the convolutions that are stored as such


@dataclass(frozen=True)
class Stored:
    """Tensors of one shape and the parameters that they hold, whose rows lie one after another in each of them.

    Parameters that are stacks [E, rows, …] (`is_stacked`) have E tensors; all others one, or several that share out all rows.
    With a `turn` parameters take turns of so many rows. In what `form`: `T` has the rows as columns, `TAPS` a row
    [columns of one tap, of the next, …] as that of a convolution's weight, [columns, taps, 1]. `copies` are further tensors
    that hold what a single one does, and which a folder may leave out.
    """

    tensors: tuple[str, ...]
    shape: tuple[int, ...]
    rows: Mapping[str, range]  # of each parameter
    is_stacked: bool
    form: str
    turn: int
    copies: tuple[str, ...] = ()

    def join(self, parameters: Sequence[Tensor]) -> Tensor:
        """What the tensors hold, one after another, from the whole parameters."""
        if self.turn:
            return torch.stack([part.unflatten(0, (-1, self.turn)) for part in parameters], 1).flatten(0, 2)
        joined = parameters[0] if len(parameters) == 1 else torch.cat(list(parameters), int(self.is_stacked))
        if self.form == "TAPS":
            return joined.unflatten(1, (TAPS, -1)).mT.unsqueeze(3)
        return joined.mT if self.form == "T" else joined

    def take(self, parameter: str, read: Callable[[str], Any]) -> Tensor:
        """One whole parameter; `read` gives a tensor, or what can be cut like one."""
        if self.turn:
            return self._turns_of(list(self.rows).index(parameter), read)
        rows = slice(self.rows[parameter].start, self.rows[parameter].stop)
        parts = [read(name)[:, rows].mT if self.form == "T" else read(name)[rows] for name in self.tensors]
        if self.form == "TAPS":
            return parts[0].squeeze(3).mT.flatten(1)  # type: ignore[no-any-return]
        return torch.stack(parts) if self.is_stacked else parts[0]

    def _turns_of(self, number: int, read: Callable[[str], Any]) -> Tensor:
        """The parameter of this number; one tensor is read after the other."""
        found, before = [], 0
        for name in self.tensors:
            turns = read(name)[:].unflatten(0, (-1, self.turn))
            found.append(turns[(number - before) % len(self.rows)::len(self.rows)].flatten(0, 1))
            before += len(turns)
        return torch.cat(found)


def stored(module: Decoder) -> list[Stored]:
    """How the parameters of a module (of the whole model or of a stage) are stored, in their order."""
    together: dict[str, list[str]] = {}
    for name in placements(module):
        together.setdefault(written(name, module.on_disk), []).append(name)
    return [_stored(place, {name: placements(module)[name].shape for name in names}, tuple(module.copies.get(names[0], ())))
            for place, names in together.items()]


def written(name: str, on_disk: Mapping[str, str]) -> str:
    """Where a parameter is written. `on_disk` maps beginnings of names (keys with a dot at the end) and ends of names.

    Parameters of one place are joined there. With {} in it the place is a tensor for each entry of dim 0, with [a,b] in it the
    tensors with either of these in their names share the rows; at its end stands the form, or TURNS and the rows of a turn.
    """
    for part, other in on_disk.items():
        if part.endswith(".") and name.startswith(part):
            name = other + name.removeprefix(part)
        elif name.endswith(part):
            return name.removesuffix(part) + other
    return name


def _stored(place: str, shapes: dict[str, tuple[int, ...]], copies: tuple[str, ...]) -> Stored:
    match = PLACE.fullmatch(place)
    assert match is not None, "every name is a place"
    is_stacked, form = "{}" in place, match["form"] or ""
    rows, end = {}, 0
    for name, shape in shapes.items():
        begin, end = end, end + shape[is_stacked]
        rows[name] = range(begin, end)
    tensors = tuple(match["before"] + name + match["after"] for name in match["names"].split(",")) if match["names"] \
        else tuple(match["before"].format(i) for i in range(shape[0] if is_stacked else 1))
    whole = (end // (1 if is_stacked else len(tensors)), *shape[1 + is_stacked:])
    if form == "TAPS":
        whole = (whole[0], whole[1] // TAPS, TAPS, 1)
    return Stored(tensors, whole[::-1] if form == "T" else whole, rows, is_stacked, form, int(match["turn"] or 0), copies)
