"""Counts on a command line, as they are printed and as people write them: 15T, 2.5B, 1e6, 8,388,608."""

from __future__ import annotations

import contextlib
from typing import Any

import click

from athanor.foundation.units import read_count


class Counted(click.ParamType):
    """A number of tokens, parameters or devices; with `is_whole` a whole one, of at least `least` where that is given."""

    name = "count"

    def __init__(self, is_whole: bool = True, least: int | None = None) -> None:
        self.is_whole, self.least = is_whole, least

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> Any:
        """Raises click's BadParameter, a usage error of one sentence."""
        found = self._read(value, param, ctx) if isinstance(value, str) else value
        if not self.is_whole:
            return float(found)
        if found % 1 != 0 or (self.least is not None and found < self.least):
            end = "" if self.least is None else f" of at least {self.least}"
            self.fail(f"'{value}': a whole number{end} is expected", param, ctx)
        return int(found)

    def _read(self, text: str, param: click.Parameter | None, ctx: click.Context | None) -> int | float:
        try:
            return read_count(text)
        except ValueError as error:
            with contextlib.suppress(ValueError):
                return float(text)  # beyond what is a count, which an option's own rule refuses
            self.fail(f"'{text}': {error}", param, ctx)


COUNT, WHOLE, POSITIVE, INDEX = Counted(is_whole=False), Counted(), Counted(least=1), Counted(least=0)
