"""Progress for people, on standard error: a bar on a terminal, plain lines otherwise. Standard output stays clean."""

from __future__ import annotations

import sys
import time
from types import TracebackType
from typing import Self

from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

from athanor.foundation.run_folder import FULL

console = Console(stderr=True, highlight=False, width=None if sys.stderr.isatty() else 160)  # files need no wrapping


def say(text: str) -> None:
    """One line for people; a disk too full to show it is no reason to fail."""
    try:
        console.print(text, markup=False, soft_wrap=True)
    except OSError as error:
        if error.errno not in FULL:
            raise


class Bar:
    """`with Bar("tokenise", total) as bar: bar.advance(n)`; away from a terminal a line every `every` seconds."""

    def __init__(self, title: str, total: float, every: float = 10.0) -> None:
        self.title, self.total, self.every, self.done = title, total, every, 0.0
        self._progress = Progress(TextColumn("{task.description}"), BarColumn(), TextColumn("{task.percentage:>3.0f} %"),
                                  TimeElapsedColumn(), TimeRemainingColumn(), TextColumn("{task.fields[note]}"),
                                  console=console, transient=True) if sys.stderr.isatty() else None
        self._last = time.monotonic()

    def __enter__(self) -> Self:
        if self._progress:
            self._progress.start()
            self._task = self._progress.add_task(self.title, total=self.total, note="")
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        if self._progress:
            self._progress.stop()

    def advance(self, amount: float = 1.0, note: str = "") -> None:
        """`amount` more is done; `note` is shown beside the bar (rates, the loss)."""
        self.done += amount
        if self._progress:
            self._progress.update(self._task, completed=self.done, note=note)
        elif time.monotonic() - self._last >= self.every:
            self._last = time.monotonic()
            say(f"{self.title}: {100 * self.done / max(self.total, 1e-9):.0f} %" + (f", {note}" if note else ""))
