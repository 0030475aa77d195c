"""What people watch while a stage trains, on wide and narrow terminals and away from them; and what TensorBoard gets."""

from __future__ import annotations

import io
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
from rich.console import Console

from athanor.cli import live
from athanor.cli.board import Board, find_writer
from athanor.cli.live import View, flow, sparkline
from athanor.foundation.errors import RecipeError
from athanor.ledger.accounts import BY_NAME

ACCOUNTS = {"useful": 40.0, "kernel": 30.0, "input": 20.0, "skew": 6.0, "unattributed": 4.0}


class Clock:
    """A clock that the tests set."""

    def __init__(self) -> None:
        self.now = 100.0

    def monotonic(self) -> float:
        return self.now


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    made = Clock()
    monkeypatch.setattr(live, "time", made)
    return made


def message(step: int, **changes: Any) -> dict[str, Any]:
    return {"step": step, "steps": 400, "loss": 4.0 - step / 200, "grad_norm": 0.8734, "learning_rate": 0.0012,
            "tokens_per_second": 12_340.0, "mfu": 0.4123, "validation_loss": None, "accounts": ACCOUNTS,
            "attempt": 0, **changes}


def watch(clock: Clock, console: Console, steps: int, seconds: float = 0.5, **changes: Any) -> None:
    with View("pretrain", console) as view:
        for step in range(1, steps + 1):
            view.show(message(step, **changes))
            clock.now += seconds


@pytest.mark.parametrize("width", [80, 40, 20])
def test_it_fits_the_terminal_and_says_all(clock: Clock, width: int) -> None:
    console = Console(file=io.StringIO(), force_terminal=True, width=width, height=20, record=True, color_system="truecolor")
    view = View("pretrain", console)
    for step in range(1, 101):
        view.show(message(step))
        clock.now += 0.5
    view.__exit__(None, None, None)
    console.export_text()
    console.print(view)
    coloured = console.export_text(styles=True, clear=False)
    lines = console.export_text().splitlines()
    assert all(len(line) <= width for line in lines) and len(lines) <= 12
    text = " ".join(lines)
    wanted = ["pretrain", "25 %", "loss 3.500", "step 100 of 400"]
    wanted += ["gradient norm 0.873", "learning rate 1.20e-03", "2 min 32 s left", "12.3 k tokens/s", "MFU 41.2 %",
               "■ useful 40 %", "■ kernel 30 %", "■ input 20 %"] if width >= 40 else []
    assert [words for words in wanted if words not in text] == []
    assert "▇" in text and len(lines) == {80: 6, 40: 9, 20: 12}[width]
    red, green, blue = (int(BY_NAME["kernel"].colour[i:i + 2], 16) for i in (1, 3, 5))
    assert f"38;2;{red};{green};{blue}m" in coloured
    ledger_bar = next(line for line in lines if line.startswith("██"))
    assert len(ledger_bar) == min(width, 72)


def test_a_terminal_is_left_clean(clock: Clock) -> None:
    console = Console(file=io.StringIO(), force_terminal=True, width=80, height=20)
    watch(clock, console, 3)
    written = console.file.getvalue()  # type: ignore[attr-defined]
    assert "step 3 of 400" in written and written.endswith("\x1b[2K"), "the lines are erased at the end"


def test_away_from_a_terminal_there_is_a_plain_line_now_and_then(clock: Clock) -> None:
    console = Console(file=io.StringIO(), force_terminal=False, width=80)
    watch(clock, console, 100)
    written = console.file.getvalue().splitlines()  # type: ignore[attr-defined]
    assert len(written) == 4, "fifty seconds, a line every ten"
    assert written[0] == ("pretrain: 5 %, step 21 of 400, 3 min 10 s left, loss 3.895, gradient norm 0.873, learning rate "
                          "1.20e-03, 12.3 k tokens/s, MFU 41.2 %")
    assert not any("\x1b" in line or "█" in line for line in written)


@pytest.mark.parametrize(("kept", "words"), [(60, "step 60"), (0, "the beginning"), (64, "step 64")])
def test_started_again_the_time_left_is_that_of_the_steps_since_then(clock: Clock, kept: int, words: str) -> None:
    console = Console(file=io.StringIO(), force_terminal=False, width=80)
    with View("pretrain", console) as view:
        for step in range(1, 65):
            view.show(message(step))
            clock.now += 0.5
        clock.now += 60.0
        for step in range(kept + 1, kept + 22):
            view.show(message(step, attempt=1))
            clock.now += 0.5
    written = console.file.getvalue().splitlines()  # type: ignore[attr-defined]
    again = written.index(f"pretrain: the ranks go on from {words}")
    assert "left" not in written[again + 1] and f"step {kept + 1} of 400" in written[again + 1]
    left = live.format_seconds((400 - kept - 21) * 0.5)
    assert f"step {kept + 21} of 400, {left} left" in written[again + 2] and "go on" not in "".join(written[:again])


def test_what_is_not_known_is_not_told(clock: Clock) -> None:
    console = Console(file=io.StringIO(), force_terminal=True, width=60, height=20, record=True)
    view = View("chat", console)
    view.show(message(1, loss=None, grad_norm=None, mfu=None, accounts={}))
    console.print(view)
    view.__exit__(None, None, None)
    text = console.export_text()
    assert "loss not finite" in text and "gradient norm not finite" in text
    assert "MFU" not in text and "left" not in text and "■" not in text


def test_sparklines_and_lines() -> None:
    assert sparkline([3.0, 2.0, 1.0], 8) == "█▅▁" and sparkline([], 8) == "" and sparkline([2.0, 2.0], 8) == "▁▁"
    assert sparkline([float(i) for i in range(1000)], 8) == "▁▂▃▄▅▆▇█"
    facts = [live.Text(word) for word in ("one", "two", "thirteen")]
    assert [line.plain for line in flow(facts, 8)] == ["one  two", "thirteen"]
    assert flow([live.Text("thirteen")], 5)[0].plain == "thir…"


class Writer:
    """Takes the place of a package's writer, and keeps what it is told."""

    made: list[Writer]

    def __init__(self, folder: str, purge_step: int) -> None:
        self.folder, self.purge_step, self.is_closed = folder, purge_step, False
        self.scalars: list[tuple[str, float, int]] = []
        self.made.append(self)

    def add_scalar(self, tag: str, value: float, step: int) -> None:
        self.scalars.append((tag, value, step))

    def close(self) -> None:
        self.is_closed = True


def test_the_board_gets_figures_and_shares(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    package = ModuleType("tensorboardX")
    package.SummaryWriter = Writer  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "tensorboardX", package)
    Writer.made = []
    with Board(tmp_path / "run" / "pretrain") as board:
        assert not Writer.made, "a stage that is finished writes nothing"
        for step in (7, 8, 9):
            board.add(message(step, mfu=None, validation_loss=3.5 if step == 8 else None, accounts=ACCOUNTS if step > 7 else {}))
    (writer,) = Writer.made
    assert writer.folder == str(tmp_path / "run" / "pretrain") and writer.purge_step == 7 and writer.is_closed
    assert [(value, step) for tag, value, step in writer.scalars if tag == "train/loss"] == [(3.965, 7), (3.96, 8), (3.955, 9)]
    assert [step for tag, _, step in writer.scalars if tag == "train/validation_loss"] == [8]
    shares = {tag: value for tag, value, step in writer.scalars if tag.startswith("ledger/")}
    assert shares == {f"ledger/{name}": seconds / 100 for name, seconds in ACCOUNTS.items()}
    assert "speed/mfu" not in {tag for tag, *_ in writer.scalars}
    assert len(writer.scalars) == 3 * 4 + 1 + len(ACCOUNTS)


def test_without_a_writer_the_package_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("tensorboardX", "torch.utils.tensorboard"):
        monkeypatch.setitem(sys.modules, name, None)
    with pytest.raises(RecipeError, match="install one with `pip install tensorboardX`, or leave the key out"):
        find_writer()
