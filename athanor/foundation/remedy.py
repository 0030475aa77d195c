"""A change that saves memory, as rehearsals, estimates and errors name it."""

from __future__ import annotations

from dataclasses import dataclass

from athanor.foundation.units import format_bytes, format_share


@dataclass(frozen=True)
class Remedy:
    """Key=value changes that save memory on the fullest rank. `costs` is the share that a step takes longer by, an estimate."""

    changes: tuple[str, ...]
    saves_bytes: float
    costs: float

    def __str__(self) -> str:
        takes = f"{format_share(abs(self.costs), 0)} {'longer' if self.costs >= 0 else 'less'}"
        return f"{' '.join(self.changes)} (saves about {format_bytes(self.saves_bytes)}, a step takes about {takes})"
