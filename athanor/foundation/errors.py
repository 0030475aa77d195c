"""The error tree: what a user may meet, each as one sentence that says what is wrong, where, and what is allowed."""

from __future__ import annotations

import difflib
import functools
from collections.abc import Iterable
from typing import Any


class AthanorError(Exception):
    """Anything Athanor refuses or gives up on; the command line prints its sentence and exits with `exit_code`."""

    exit_code = 1


class UserError(AthanorError):
    """The input is wrong: a recipe, a file, a value on the command line. Trying again unchanged cannot help."""

    exit_code = 2


class RecipeError(UserError):
    """A recipe, an override or a plan does not say what it must."""


class DataError(UserError):
    """A source, a token file or a tokenizer cannot be used."""


class ModelError(UserError):
    """A model folder is incomplete, unknown, or does not fit what is asked of it."""


class LayoutError(UserError):
    """These degrees cannot be laid out on these ranks."""


class CheckpointError(AthanorError):
    """A checkpoint is damaged, of another model, or of a newer format."""


class DiskError(AthanorError):
    """The disk is full, read-only or failing; what was there before is still there."""


class OutOfMemory(AthanorError):
    """A device has no memory left; the sentence names what was predicted, what was used, and what would help."""


class RankError(AthanorError):
    """A rank ended badly. `rank`, `reason` and the path of its `log` say which, why, and where to read on.

    `number`: of the signal that killed it, if one did; `place`: type of the exception that ended it and where it was raised,
    the same whenever it happens again, and `trace`, its traceback. `who` ended this way, where it was not this rank alone.
    """

    def __init__(self, rank: int, reason: str, log: str | None = None, *, number: int | None = None, place: str | None = None,
                 trace: str | None = None, who: str | None = None) -> None:
        self.rank, self.reason, self.log, self.who = rank, reason, log, who or f"rank {rank}"
        self.number, self.place, self.trace = number, place, trace
        super().__init__(f"{self.who} {reason}" + (f"; its log is {log}" if log else ""))

    def __reduce__(self) -> Any:
        return functools.partial(RankError, **vars(self)), ()


def nearest(name: str, allowed: Iterable[str]) -> str | None:
    """The allowed name that `name` most likely meant, the first of those equally close; None when nothing is."""
    close = {option: difflib.SequenceMatcher(None, option, name).ratio() + bool(name and option.startswith(name))
             for option in sorted(allowed)}
    best = max(close, key=close.__getitem__, default=None)
    return best if best is not None and close[best] >= 0.5 else None


def did_you_mean(name: str, allowed: Iterable[str]) -> str:
    """A half-sentence: the nearest valid name, then all of them when they are few; some of many where none is near."""
    options = sorted(allowed)
    guess = nearest(name, options)
    parts = [f"did you mean '{guess}'?"] if guess else []
    if len(options) <= 24:
        parts.append("allowed: " + ", ".join(options))
    elif not guess:
        parts.append(f"allowed: {', '.join(options[:6])} and {len(options) - 6} more")
    return " ".join(parts)
