"""What decides what a stage learns, as its folder's config.toml keeps it, beside what would decide it now."""

from __future__ import annotations

import tomllib
from typing import Any

from athanor.foundation.errors import UserError
from athanor.foundation.run_folder import StageFolder
from athanor.foundation.toml import toml_value

MOST_TOLD = 4
ROWS_FOLLOW = {"data", "hash.data", "hash.template", "seq_len", "seed"}  # and a file of conversations


def read_identity(folder: StageFolder) -> dict[str, Any]:
    """The identity that a stage was trained with, empty when it was not begun. Raises UserError for a damaged config.toml."""
    if not folder.config.exists():
        return {}
    try:
        return dict(tomllib.loads(folder.config.read_text(encoding="utf-8")).get("identity", {}))
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise UserError(f"{folder.config} is damaged ({error}), so nobody knows what {folder.root} was trained with; start "
                        "it anew with --fresh (of `train`, `run` or `jobs submit`), or give the run another name") from None


def check_same(folder: StageFolder, now: dict[str, Any]) -> None:
    """Refuse to go on in a folder that was begun with another identity. Raises UserError with what differs."""
    if folder.config.exists() and (differing := differences(read_identity(folder), now)):
        raise UserError(f"{folder.root} was trained with another configuration: {differing}; start it anew with --fresh (of "
                        "`train`, `run` or `jobs submit`), or give the run another name")


def differences(old: dict[str, Any], new: dict[str, Any]) -> str:
    """`learning_rate was 0.001 and is 0.002`, for the first few keys that differ; empty when none does."""
    differing = [key for key in sorted({*old, *new}) if old.get(key) != _as_toml(new.get(key))]
    has_other_file = ROWS_FOLLOW.isdisjoint(differing) and new.get("data") not in ("documents", "pairs")
    told = [f"the conversations of {new.get('data')} are others than it was trained on" if key == "hash.rows" and has_other_file
            else f"{key} was {old.get(key, 'unset')} and is {new.get(key, 'unset')}" for key in differing]
    more = f"; and {len(told) - MOST_TOLD} more" if len(told) > MOST_TOLD else ""
    return "; ".join(told[:MOST_TOLD]) + more


def _as_toml(value: Any) -> Any:
    return tomllib.loads(f"x = {toml_value(value)}")["x"] if value is not None else None
