"""Two cards' differences for people: what was trained, how good it is, what it took, what it is made of; on one screen."""

from __future__ import annotations

import re
from typing import Any

from athanor.foundation.identity import ROWS_FOLLOW

Differences = dict[str, tuple[Any, Any]]
IDENTITY, LONGEST = "stage.identity.", 44  # characters of a value
MOST_KEYS = 4  # of a table that are told one by one
# in this order; what follows from these, or is of one run rather than of the model, is told by --json alone
ORDER = (r"hashes\.weights", "architecture", "parameters", r"stage\.identity", r"scores\.[^.]+\.value", "tokens", "steps",
         "model_flops", r"book\.device_hours", r"book\.money", r"book\.energy_joules", r"book\.derived\.mfu", "data",
         r"parents\.[^.]+\.version", "hashes", "recipe", "stage", "code")
LEFT_OUT = re.compile(r"recipe\.(sha256|name)|stage\.(name|execution\..*)|stage\.identity\.(hash\..*|stage)"
                      r"|data\.(tokenizer|template)_hash")


def rows(differences: Differences) -> list[tuple[str, str, str]]:
    """Name and both values of each difference, the telling ones first; a table of many keys is one row."""
    if ROWS_FOLLOW.isdisjoint(key.removeprefix(IDENTITY) for key in differences) and f"{IDENTITY}hash.rows" in differences:
        differences = differences | {f"{IDENTITY}conversations": differences[f"{IDENTITY}hash.rows"]}
    told = {key.rpartition(".")[2] for key in differences if key.startswith(IDENTITY)}
    left = {key: values for key, values in differences.items() if key not in told and not LEFT_OUT.fullmatch(key) and (
        key.startswith(IDENTITY) or not key.startswith(("recipe.", "stage.")) or key.rpartition(".")[2] not in told)}
    out = []
    for pattern in ORDER:
        tables: dict[str, Differences] = {}
        for key in [key for key in left if re.match(rf"{pattern}(\.|$)", key)]:
            tables.setdefault(_table(key), {})[key] = left.pop(key)
        for name, inside in tables.items():
            out += _told(name, inside)
    return out


def _table(key: str) -> str:
    """What a key stands in: the identity, one stage or source, or the first two parts of its name."""
    parts = key.split(".")
    return ".".join(parts[:3 if parts[:2] in (["recipe", "stage"], ["stage", "stage"], ["data", "sources"]) else 2])


def _told(name: str, inside: Differences) -> list[tuple[str, str, str]]:
    is_missing = [all(values[side] is None for values in inside.values()) for side in (0, 1)]
    if len(inside) > MOST_KEYS and (any(is_missing) or not name.startswith(IDENTITY.rstrip("."))):
        first, second = ("-" if missing else f"{len(inside)} values" for missing in is_missing)
        return [(name, first, second)]
    return [(key.removeprefix(IDENTITY).removeprefix("hashes.").removesuffix(".value"), _short(first), _short(second))
            for key, (first, second) in inside.items()]


def _short(value: Any) -> str:
    text = "-" if value is None else f"{value:.6g}" if isinstance(value, float) else " ".join(str(value).split())
    if re.fullmatch(r"[0-9a-f]{40,}", text):
        return text[:12]
    return text if len(text) <= LONGEST else text[:LONGEST - 1] + "…"
