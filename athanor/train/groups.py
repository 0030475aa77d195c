"""Which parameters learn at another rate or decay otherwise than the rest: groups by patterns of their names."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase

from athanor.foundation.errors import RecipeError, nearest


@dataclass(frozen=True)
class Group:
    """Parameters whose names fit `pattern` (as of shells: `*`, `?`, `[…]`) and no pattern of an earlier group.

    Their learning rate is the stage's times `learning_rate_factor`; `weight_decay` None is what they have without a group.
    """

    pattern: str
    learning_rate_factor: float = 1.0
    weight_decay: float | None = None


def group_of(name: str, groups: Sequence[Group]) -> Group | None:
    """The first group whose pattern a parameter's name fits."""
    return next((group for group in groups if fnmatchcase(name, group.pattern)), None)


def check_groups(names: Iterable[str], groups: Sequence[Group], stage: str) -> None:
    """Refuse a group that no parameter is left for; `names` are those of the whole model. Raises RecipeError."""
    names = list(names)
    chosen = {name: group_of(name, groups) for name in names}
    for group in groups:
        fitting = [name for name in names if fnmatchcase(name, group.pattern)]
        if not fitting:
            raise RecipeError(f"stage.{stage}.group: the pattern '{group.pattern}' fits no parameter; the nearest names are "
                              f"{', '.join(_near(group.pattern, names))}")
        if group not in chosen.values():
            raise RecipeError(f"stage.{stage}.group: all that the pattern '{group.pattern}' fits, such as {fitting[0]}, belongs "
                              "to groups before it; put the narrower pattern first")


def _near(pattern: str, names: list[str]) -> list[str]:
    """The ends of names that are most like a pattern, its wildcards left out; the first names when none is like it."""
    plain = pattern.replace("*", "").replace("?", "").strip(".")
    ends = {".".join(name.split(".")[-count:]) for name in names for count in (2, 3)} | {*names}
    found, left = list[str](), sorted(ends)
    while len(found) < 3 and (guess := nearest(plain, left)) is not None:
        found.append(guess)
        left.remove(guess)
    return found or names[:3]
