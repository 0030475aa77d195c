"""What a stage in training says of itself, for TensorBoard; its writer is a package of its own that need not be there."""

from __future__ import annotations

from pathlib import Path
from types import TracebackType
from typing import Any, Self

from athanor.foundation.errors import RecipeError

SCALARS = {"loss": "train/loss", "grad_norm": "train/grad_norm", "learning_rate": "train/learning_rate",
           "validation_loss": "train/validation_loss", "tokens_per_second": "speed/tokens_per_second", "mfu": "speed/mfu"}


def find_writer() -> Any:
    """The class SummaryWriter of tensorboardX, or of torch where tensorboard is. Raises RecipeError when neither is there."""
    try:
        from tensorboardX import SummaryWriter
    except ImportError:
        try:
            from torch.utils.tensorboard import SummaryWriter
        except ImportError:
            raise RecipeError("metrics.tensorboard needs a package that writes event files; install one with `pip install "
                              "tensorboardX`, or leave the key out") from None
    return SummaryWriter


class Board:
    """`with Board(folder) as board: board.add(message)` for each step's message of the channel.

    Events are written from the first message on; a step that is done again after a restart replaces what was there.
    """

    def __init__(self, folder: Path) -> None:
        self.folder, self.make = folder, find_writer()
        self.writer: Any = None
        self.accounts: dict[str, float] = {}

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        if self.writer is not None:
            self.writer.close()

    def add(self, message: dict[str, Any]) -> None:
        """Write a step's figures, and the shares of the ledger's accounts whenever there are new ones."""
        step = message["step"]
        if self.writer is None:
            self.writer = self.make(str(self.folder), purge_step=step)
        for key, tag in SCALARS.items():
            if message[key] is not None:
                self.writer.add_scalar(tag, message[key], step)
        accounts = message["accounts"]
        if accounts != self.accounts:
            self.accounts, total = accounts, sum(accounts.values())
            for name, seconds in accounts.items():
                self.writer.add_scalar(f"ledger/{name}", seconds / total if total else 0.0, step)
