"""TOML values as text, and tables by dotted keys."""

from __future__ import annotations

import json
import tomllib
from typing import Any

from athanor.foundation.errors import RecipeError, did_you_mean


def toml_value(value: Any) -> str:
    """One value as TOML."""
    if isinstance(value, bool):
        return "true" if value else "false"
    if isinstance(value, str):
        return json.dumps(value, ensure_ascii=False).replace("\x7f", "\\u007f")
    if isinstance(value, (list, tuple)):
        return "[" + ", ".join(toml_value(v) for v in value) + "]"
    if isinstance(value, dict):
        return "{ " + ", ".join(f"{k} = {toml_value(v)}" for k, v in value.items() if v is not None) + " }"
    return repr(value)


def leaves(value: Any, prefix: str = "") -> list[tuple[str, Any]]:
    """Dotted keys and values; entries of a list of tables are keyed by their name."""
    if isinstance(value, dict):
        return [leaf for k, v in value.items() for leaf in leaves(v, f"{prefix}{k}.")]
    if isinstance(value, list) and value and all(isinstance(v, dict) and "name" in v for v in value):
        return [leaf for v in value for leaf in leaves(v, f"{prefix}{v['name']}.")]
    return [(prefix[:-1], value)]


def assign(node: Any, path: list[str], value: Any, where: str) -> None:
    """Set a dotted key; in a list of tables the next part is the `name` of an entry."""
    head, rest = path[0], path[1:]
    if isinstance(node, list):
        entries = {entry.get("name"): entry for entry in node if isinstance(entry, dict)}
        fitting = [n for n in range(1, len(path)) if ".".join(path[:n]) in entries]  # a name may have dots
        if not fitting:
            raise RecipeError(f"{where}: '{head}' is not an entry with a key; {did_you_mean(head, map(str, entries))}")
        assign(entries[".".join(path[:fitting[-1]])], path[fitting[-1]:], value, where)
    elif not isinstance(node, dict):
        raise RecipeError(f"{where}: there is a value where '{head}' expects a table")
    elif rest:
        assign(node.setdefault(head, {}), rest, value, where)
    else:
        node[head] = value


def parse_value(text: str) -> Any:
    """What a text says as TOML, or else the text."""
    try:
        return tomllib.loads(f"value = {text}")["value"]
    except tomllib.TOMLDecodeError:
        return text
