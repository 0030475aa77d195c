"""From a token on disk back to its document and its bytes, and from a data folder to whether it is still whole."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np

from athanor.data.shards import Shard
from athanor.data.text.tokenizer import Tokenizer
from athanor.foundation.errors import DataError, did_you_mean
from athanor.foundation.run_folder import hash_file, read_json, read_jsonl

AROUND = 16  # tokens shown on each side
MOST_CHECKED_BYTES = 4e9  # whose hashes are computed before each start of a training: some seconds


def open_manifest(data_folder: Path) -> dict[str, Any]:
    """The manifest of a data folder; DataError when it is none."""
    file = data_folder / "manifest.json"
    if not file.is_file():
        raise DataError(f"{data_folder} is not a data folder: it has no manifest.json; `athanor data build` makes one")
    manifest: dict[str, Any] = read_json(file)
    if not isinstance(manifest, dict) or not {"hash", "files", "sources", "vocab_size", "pad_id"} <= set(manifest):
        raise DataError(f"{file} is not the manifest of a data folder; build the data again (athanor data build)")
    return manifest


def damaged_files(data_folder: Path) -> list[str]:
    """Names of files that are missing or no longer have the hash that the manifest gives."""
    files = open_manifest(data_folder)["files"]
    return [name for name, digest in files.items()
            if not (data_folder / name).is_file() or hash_file(data_folder / name) != digest]


def check_intact(data_folder: Path) -> None:
    """Raise DataError when files are damaged. Those of a large folder are not read: `athanor data inspect` does."""
    files = [data_folder / name for name in open_manifest(data_folder)["files"]]
    if sum(file.stat().st_size for file in files if file.is_file()) > MOST_CHECKED_BYTES:
        return
    damaged = damaged_files(data_folder)
    if damaged:
        raise DataError(f"{', '.join(damaged)} in {data_folder} {'is' if len(damaged) == 1 else 'are'} missing or not what was "
                        "built; build the data again (athanor data build)")


def trace(data_folder: Path, token_index: int, split: str = "train", source: str | None = None) -> dict[str, Any]:
    """Where token number `token_index` of a token file comes from.

    Returns split, source, token_index, token_id, token (its text), document {number, doc_id, source, uri, offset, length},
    token_in_document, bytes [start, end) in the document's UTF-8 text, and the text before and after it.
    Raises DataError when there is no such source or token.
    """
    manifest = open_manifest(data_folder)
    name = _token_file(manifest, split, source)
    shard = Shard(data_folder / name)
    if not 0 <= token_index < len(shard.tokens):
        raise DataError(f"{name}.bin has tokens 0 to {len(shard.tokens) - 1}; there is no token {token_index}")
    number = int(np.searchsorted(shard.starts, token_index, side="right")) - 1
    ids = shard.document(number).tolist()
    position = token_index - int(shard.starts[number])
    tokenizer = Tokenizer.load(data_folder / "tokenizer")
    lengths = [len(tokenizer.token_bytes()[token]) for token in ids]
    start = sum(lengths[:position])
    lineage = read_jsonl(data_folder / f"{name}.lineage.jsonl")
    if len(lineage) != len(shard):
        raise DataError(f"{data_folder / name}.lineage.jsonl has {len(lineage)} whole lines for {len(shard)} documents; it is "
                        "damaged, build the data again")
    return {"split": split, "token_index": token_index, "token_id": ids[position],
            "token": tokenizer.decode([ids[position]], skip_special_tokens=False),
            "document": {"number": number, **lineage[number]}, "token_in_document": position,
            "bytes": [start, start + lengths[position]],
            "before": tokenizer.decode(ids[max(0, position - AROUND):position]),
            "after": tokenizer.decode(ids[position + 1:position + 1 + AROUND])}


def _token_file(manifest: dict[str, Any], split: str, source: str | None) -> str:
    if split == "evaluation":
        return "evaluation"
    names = list(manifest["sources"])
    if source is None and len(names) > 1:
        raise DataError(f"this data folder has several sources ({', '.join(names)}); name one with --source")
    if source is not None and source not in names:
        raise DataError(f"there is no source '{source}'; {did_you_mean(source, names)}")
    return f"train-{source or names[0]}"
