"""A folder's tokens by their ids, and whether its files agree on the one that ends an answer. Reads JSON only."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from athanor.foundation.errors import ModelError
from athanor.foundation.run_folder import read_json

FILES = ("config.json", "generation_config.json", "tokenizer_config.json")


def token_ids(folder: Path) -> dict[str, int]:
    """The id of each token of a folder's tokenizer.json; none where there is no such file."""
    content = read_object(folder, "tokenizer.json")
    try:
        vocabulary = (content.get("model") or {}).get("vocab") or {}
        if isinstance(vocabulary, list):  # pieces with their scores, in the order of ids
            vocabulary = {piece: index for index, (piece, _) in enumerate(vocabulary)}
        return {str(token): int(index) for token, index in vocabulary.items()} | {
            str(token["content"]): int(token["id"]) for token in content.get("added_tokens") or []}
    except (AttributeError, KeyError, TypeError, ValueError):
        raise ModelError(f"{folder / 'tokenizer.json'} is not a tokenizer: its 'model.vocab' or 'added_tokens' cannot be "
                         "read") from None


def eos_notes(folder: Path) -> list[str]:
    """Where config, generation config, tokenizer and chat template do not agree on what ends an answer, a sentence each."""
    ids = token_ids(folder)
    values: dict[str, Any] = {name: read_object(folder, name).get("eos_token_id") for name in FILES[:2]} | {
        FILES[2]: special_id(folder, "eos_token", ids)}
    found = {name: value if isinstance(value, list) else [value] for name, value in values.items() if value is not None}
    notes = []
    if found and not set.intersection(*map(set, found.values())):
        said = ", ".join(f"{name} {' or '.join(map(str, each))}" for name, each in found.items())
        notes.append(f"eos differs: {said}; an answer that ends for one of them goes on for another")
    source = template_source(folder)
    ends = sorted(name for name, index in ids.items() if any(index in each for each in found.values()))
    if source is not None and ends and not any(name in source for name in ("eos_token", *ends)):
        notes.append(f"the chat template never writes {' or '.join(ends)}, which ends an answer elsewhere")
    return notes


def special_id(folder: Path, key: str, ids: dict[str, int]) -> int | None:
    """The id of the token that tokenizer_config.json names as `key`, such as eos_token."""
    token: Any = read_object(folder, "tokenizer_config.json").get(key)
    token = token.get("content") if isinstance(token, dict) else token
    return ids.get(token) if isinstance(token, str) else None


def template_source(folder: Path) -> str | None:
    """The chat template, from its own file or tokenizer_config.json."""
    file = folder / "chat_template.jinja"
    try:
        source = file.read_text(encoding="utf-8") if file.is_file() else read_object(folder, FILES[2]).get("chat_template")
    except UnicodeDecodeError:
        raise ModelError(f"{file} is not a text in UTF-8") from None
    return source if isinstance(source, str) else None


def read_object(folder: Path, name: str) -> dict[str, Any]:
    """The object in a folder's JSON file; empty where there is none."""
    content = read_json(folder / name) if (folder / name).is_file() else {}
    return content if isinstance(content, dict) else {}
