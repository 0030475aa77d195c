"""A stage in training as people like to watch it: a few lines that stay in place on a terminal, plain lines otherwise."""

from __future__ import annotations

import itertools
import time
from collections.abc import Iterable, Mapping
from types import TracebackType
from typing import Any, Self

from rich.cells import cell_len
from rich.console import Console, ConsoleOptions, RenderResult
from rich.live import Live
from rich.text import Text

from athanor.foundation.progress import console as people
from athanor.foundation.units import format_count, format_seconds, format_share
from athanor.report.terminal import bar, style_of

BLOCKS = "▁▂▃▄▅▆▇█"
MOST_SPARKS = 24  # characters of the longest sparkline
NAMED_ACCOUNTS = 3  # beside the bar, the largest
GAP = "  "


def format_loss(loss: float | None) -> str:
    return "not finite" if loss is None else f"{loss:.3f}"


class View:
    """`with View(title) as view: view.show(message)` for each step's message of the channel of `train_stage`.

    Away from a terminal there is a line every `every` seconds, and none for a stage that is over sooner.
    """

    def __init__(self, title: str, console: Console | None = None, every: float = 10.0) -> None:
        self.title, self.console, self.every = title, console or people, every
        self.live: Live | None = None
        self.message: dict[str, Any] = {}
        self.losses: list[float] = []
        self.began = self.told = time.monotonic()
        self.timed_steps = 0  # since the ranks' first step of this life

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        if self.live is not None:
            self.live.stop()

    def show(self, message: dict[str, Any]) -> None:
        """Take in a finished step."""
        now = time.monotonic()
        self.timed_steps += 1
        if message["attempt"] != self.message.get("attempt"):  # they were started
            self.began, self.timed_steps = now, 0
            if message["attempt"] > 0:
                before = f"step {message['step'] - 1}" if message["step"] > 1 else "the beginning"
                self.console.print(f"{self.title}: the ranks go on from {before}", markup=False, soft_wrap=True)
        self.message = message
        if message["loss"] is not None:
            self.losses.append(message["loss"])
        if self.console.is_terminal:
            if self.live is None:
                self.live = Live(self, console=self.console, transient=True, refresh_per_second=4)
                self.live.start()
        elif now - self.told >= self.every:
            self.told = now
            facts = [fact.plain for fact in (*self._progress(), *self._learning(0), *self._speed())]
            self.console.print(f"{self.title}: {', '.join(facts)}", markup=False, soft_wrap=True)

    def seconds_left(self) -> float | None:
        """From the time that steps took since the ranks were started, all that came between them included; None after one."""
        left = self.message["steps"] - self.message["step"]
        return (time.monotonic() - self.began) / self.timed_steps * left if self.timed_steps else None

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        width = options.max_width
        done = self.message["step"] / self.message["steps"]
        length = max(2, min(40, width - cell_len(self.title) - 8))
        full = round(length * done)
        head = Text.assemble((self.title, "bold"), GAP, ("━" * full, style_of("useful")), ("━" * (length - full), "dim"),
                             f" {100 * done:3.0f} %")
        yield from flow([head], width)
        yield from flow([*self._progress()[1:], *self._learning(min(MOST_SPARKS, width // 3))], width)
        yield from flow(self._speed(), width)
        accounts = self.message["accounts"]
        if total := sum(seconds for seconds in accounts.values() if seconds > 0):
            yield bar(accounts, total, min(width, 72))
            yield from flow(_largest(accounts, total), width)

    def _progress(self) -> list[Text]:
        left = self.seconds_left()
        facts = [Text(f"{100 * self.message['step'] / self.message['steps']:.0f} %"),
                 Text(f"step {self.message['step']} of {self.message['steps']}")]
        return facts if left is None else [*facts, Text(f"{format_seconds(left)} left")]

    def _learning(self, sparks: int) -> list[Text]:
        loss = Text(f"loss {format_loss(self.message['loss'])}", style="bold" if sparks else "")
        if sparks:
            loss.append(f" {sparkline(self.losses, sparks)}", style=style_of("useful"))
        norm = self.message["grad_norm"]
        return [loss, Text("gradient norm " + ("not finite" if norm is None else f"{norm:.3g}")),
                Text(f"learning rate {self.message['learning_rate']:.2e}")]

    def _speed(self) -> list[Text]:
        speed = Text(f"{format_count(self.message['tokens_per_second'])} tokens/s")
        return [speed] if self.message["mfu"] is None else [speed, Text(f"MFU {format_share(self.message['mfu'])}")]


def flow(facts: Iterable[Text], width: int) -> list[Text]:
    """Facts side by side, on as many lines as a width needs; one that is wider than the screen is cut."""
    lines: list[Text] = []
    for fact in facts:
        if lines and lines[-1].cell_len + len(GAP) + fact.cell_len <= width:
            lines[-1] = Text.assemble(lines[-1], GAP, fact)
        else:
            lines.append(fact.copy())
    for line in lines:
        line.truncate(width, overflow="ellipsis")
    return lines


def sparkline(values: list[float], width: int) -> str:
    """A curve in at most `width` characters, from its least to its largest value; each is the mean of what it stands for."""
    count = min(width, len(values))
    edges = [len(values) * i // max(1, count) for i in range(count + 1)]
    means = [sum(values[a:b]) / (b - a) for a, b in itertools.pairwise(edges)]
    if not means:
        return ""
    low, span = min(means), (max(means) - min(means)) or 1.0
    return "".join(BLOCKS[min(len(BLOCKS) - 1, int((mean - low) / span * len(BLOCKS)))] for mean in means)


def _largest(accounts: Mapping[str, float], total: float) -> list[Text]:
    names = sorted((name for name in accounts if accounts[name] > 0), key=lambda name: -accounts[name])[:NAMED_ACCOUNTS]
    return [Text.assemble(("■ ", style_of(name)), f"{name} {format_share(accounts[name] / total, 0)}") for name in names]
