"""A book: device-seconds by account, with what is needed to read them. Forecast, rehearsal and actual are the same kind."""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import Any, Literal

from athanor.foundation.errors import UserError, did_you_mean
from athanor.foundation.run_folder import read_json, write_json
from athanor.foundation.units import PD_FLOP
from athanor.ledger.accounts import NAMES, STEPPING

SCHEMA = 1
Kind = Literal["forecast", "rehearsal", "actual"]


@dataclass
class Book:
    """Where `device_seconds` went. Times in seconds, work in FLOP, memory in bytes per pipeline stage.

    `device_seconds` is measured (or planned) independently of the accounts; `close` puts the difference in `unattributed`.
    A rehearsal has no times; `rehearsed` holds one row per rank: rank, pp, blocks, peak_bytes, flops {model, recompute,
    optimizer} and the collectives of one step [{axis, kind, size_bytes, count}], and `memory_bytes` one value per such rank.
    `model_flops` counts causal attention and nothing recomputed; `model_flops_full` the same with full-square attention.
    """

    kind: Kind
    devices: int
    accelerator: str
    peak_flops: float | None  # FLOP/s of one device in the compute dtype; None when nobody knows it
    wall_seconds: float = 0.0
    device_seconds: float = 0.0
    tokens: float = 0.0
    model_flops: float = 0.0
    model_flops_full: float = 0.0
    accounts: dict[str, float] = field(default_factory=dict)
    evidence: dict[str, str] = field(default_factory=dict)
    memory_bytes: dict[str, list[float]] = field(default_factory=dict)
    rehearsed: list[dict[str, Any]] = field(default_factory=list)
    energy_joules: float | None = None
    money: float | None = None
    notes: list[str] = field(default_factory=list)
    layout: str | None = None  # degrees of the axes, such as "dp_shard=4 tp=2"; None when nobody knows, or there are several
    schema: int = SCHEMA

    def add(self, account: str, device_seconds: float, evidence: str = "measured") -> None:
        """Put device-seconds into an account. Raises ValueError for a name outside the list or a non-finite value."""
        if account not in NAMES:
            raise ValueError(f"there is no account '{account}'; {did_you_mean(account, NAMES)}")
        if not math.isfinite(device_seconds):
            raise ValueError(f"account '{account}' cannot hold {device_seconds} seconds")
        self.accounts[account] = self.accounts.get(account, 0.0) + device_seconds
        self.evidence[account] = evidence if self.evidence.get(account, evidence) == evidence else "derived"

    def close(self) -> Book:
        """Put what no account explains into `unattributed`, which may be negative."""
        self.accounts.pop("unattributed", None)
        self.accounts["unattributed"] = self.device_seconds - math.fsum(self.accounts.values())
        self.evidence["unattributed"] = "derived"
        return self

    @property
    def stepping_seconds(self) -> float:
        """Device-seconds of kept training steps."""
        return math.fsum(self.accounts.get(name, 0.0) for name in STEPPING)

    def derived(self) -> dict[str, float]:
        """Ratios with their definitions in the names' documentation: mfu, mfu_full_attention, hfu, goodput, end_to_end."""
        out: dict[str, float] = {"pd_6nd": self.model_flops / PD_FLOP}
        stepping, useful = self.stepping_seconds, self.accounts.get("useful", 0.0)
        if stepping > 0 and useful > 0:
            out["mfu"] = useful / stepping
            if self.model_flops:
                out["mfu_full_attention"] = out["mfu"] * self.model_flops_full / self.model_flops
            out["hfu"] = (useful + self.accounts.get("recompute", 0.0)) / stepping
        if self.device_seconds > 0:
            out["goodput"] = stepping / self.device_seconds
            out["end_to_end"] = useful / self.device_seconds
            out["unattributed_share"] = self.accounts.get("unattributed", 0.0) / self.device_seconds
        return out

    def write(self, path: Path) -> None:
        write_json(path, {**asdict(self), "derived": self.derived()})


def read_book(path: Path) -> Book:
    """Read a book and check that it is one. Raises UserError naming the file and what is wrong with it."""
    raw = read_json(path)
    if not isinstance(raw, dict) or raw.get("schema") != SCHEMA:
        raise UserError(f"{path} is not a book of schema {SCHEMA}")
    accounts = raw.get("accounts", {})
    wrong = [name for name in ("devices", "wall_seconds", "device_seconds", "tokens", "model_flops")
             if not isinstance(raw.get(name, 0.0), (int, float))]
    if not isinstance(accounts, dict) or not all(isinstance(seconds, (int, float)) for seconds in accounts.values()):
        wrong.append("accounts")
    if wrong:
        raise UserError(f"{path} is a damaged book: {', '.join(wrong)} must be numbers")
    unknown = set(accounts) - set(NAMES)
    if unknown:
        raise UserError(f"{path} has an unknown account '{min(unknown)}'; {did_you_mean(min(unknown), NAMES)}")
    known: dict[str, Any] = {f.name: raw[f.name] for f in fields(Book) if f.name in raw}
    try:
        return Book(**known)
    except TypeError as error:  # a field without a default is not there
        raise UserError(f"{path} is not a whole book: {error}") from None


def total(books: Iterable[Book], kind: Kind, *, wall_seconds: float, devices: int, device_seconds: float | None = None) -> Book:
    """Add up the books of a chain's steps; what lies between the steps is `unattributed`.

    `device_seconds` were paid for; left out, all `devices` were all the time.
    """
    books = list(books)
    trained = [book for book in books if book.model_flops > 0] or books
    out = Book(kind, devices, trained[0].accelerator, trained[0].peak_flops, wall_seconds=wall_seconds,
               device_seconds=wall_seconds * devices if device_seconds is None else device_seconds,
               layout=trained[0].layout if len({book.layout for book in trained}) == 1 else None)
    for book in books:
        for name, seconds in book.accounts.items():
            if name != "unattributed":
                out.add(name, seconds, book.evidence.get(name, "measured"))
        out.tokens += book.tokens
        out.model_flops += book.model_flops
        out.model_flops_full += book.model_flops_full
        out.notes += [note for note in book.notes if note not in out.notes]
    return out.close()
