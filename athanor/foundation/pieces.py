"""SentencePiece's `tokenizer.model`, read without its package.

The file is a protocol buffer (google/sentencepiece, sentencepiece_model.proto): pieces with scores and kinds, how they were
trained, and how text is normalised.
"""

from __future__ import annotations

import struct
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from athanor.foundation.errors import DataError

FILE = "tokenizer.model"
UNIGRAM, BPE = 1, 2  # model_type
NORMAL, UNKNOWN, CONTROL, USER_DEFINED, UNUSED, BYTE = range(1, 7)  # kinds of pieces
SPACE = "\u2581"  # stands for a space in pieces
NAMES = {"bos_token": (46, "<s>"), "eos_token": (47, "</s>"), "pad_token": (48, "<pad>")}  # fields of how it was trained
VARINT, EIGHT, LENGTH, FOUR = 0, 1, 2, 5  # wire types


@dataclass(frozen=True)
class Pieces:
    """(piece, score, kind) by id, whether they were trained as UNIGRAM or BPE, and how text becomes pieces."""

    pieces: list[tuple[str, float, int]]
    kind: int
    names: dict[str, str]  # of special pieces, by their keys in tokenizer_config.json
    characters: bytes  # compiled table of what becomes of characters
    has_prefix: bool  # a space before every text
    joins_spaces: bool


def read_pieces(file: Path) -> Pieces:
    """What the file holds. Raises DataError for what is no SentencePiece model."""
    pieces: list[tuple[str, float, int]] = []
    trained: dict[int, Any] = {}
    normalised: dict[int, Any] = {}
    try:
        for number, value in _fields(file.read_bytes()):
            if number == 1:
                part = dict(_fields(value))
                score = struct.unpack("<f", part[2])[0] if 2 in part else 0.0
                pieces.append((part.get(1, b"").decode(), score, part.get(3, NORMAL)))
            elif number in (2, 3):
                (trained if number == 2 else normalised).update(_fields(value))
        names = {key: _name(trained, field, usual) for key, (field, usual) in NAMES.items()}
        characters = normalised.get(2, b"")
        if not isinstance(characters, bytes):
            raise TypeError("its table of characters is a number")
        return Pieces(pieces, trained.get(3, UNIGRAM), names, characters, bool(normalised.get(3, 1)), bool(normalised.get(4, 1)))
    except (OSError, ValueError, IndexError, struct.error, TypeError, AttributeError) as error:
        raise DataError(f"{file} is not a SentencePiece model: {error}") from None


def _name(trained: dict[int, Any], field: int, usual: str) -> str:
    value: Any = trained.get(field)
    return value.decode() if isinstance(value, bytes) and value else usual


def _fields(data: bytes) -> Iterator[tuple[int, Any]]:
    """Field numbers and values of a message: whole numbers, and bytes (of strings, messages and floats)."""
    at = 0
    while at < len(data):
        key, at = _varint(data, at)
        number, wire = key >> 3, key & 7
        if wire == VARINT:
            value, at = _varint(data, at)
            yield number, value
            continue
        if wire not in (LENGTH, FOUR, EIGHT):
            raise ValueError(f"wire type {wire}")
        size, at = _varint(data, at) if wire == LENGTH else ((4, at) if wire == FOUR else (8, at))
        if at + size > len(data):
            raise ValueError("it ends too early")
        yield number, data[at:at + size]
        at += size


def _varint(data: bytes, at: int) -> tuple[int, int]:
    value = shift = 0
    while True:
        byte = data[at]
        value, shift, at = value | (byte & 127) << shift, shift + 7, at + 1
        if byte < 128:
            return value, at
