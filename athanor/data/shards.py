"""Tokens on disk in Megatron's format: `<name>.bin` holds the ids, `<name>.idx` says where each document lies."""

from __future__ import annotations

import struct
from collections.abc import Sequence
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import numpy as np
from numpy.typing import NDArray

from athanor.foundation.errors import DataError

MAGIC = b"MMIDIDX\x00\x00"
VERSION = 1
DTYPES: dict[int, type[np.generic]] = {1: np.uint8, 2: np.int8, 3: np.int16, 4: np.int32, 5: np.int64, 8: np.uint16}
SMALL_VOCABULARY = 65_500  # Megatron's own limit for 16-bit ids
HEADER = struct.Struct("<9sQBQQ")


class ShardWriter:
    """Appends documents to `<prefix>.bin` and writes `<prefix>.idx` when the block ends well."""

    def __init__(self, prefix: Path, vocab_size: int) -> None:
        self.prefix = prefix
        self.code = 8 if vocab_size < SMALL_VOCABULARY else 4
        self.lengths: list[int] = []

    def __enter__(self) -> Self:
        self._file = self.prefix.with_name(self.prefix.name + ".bin").open("wb")
        return self

    def append(self, ids: Sequence[int]) -> None:
        """Add one document (it must have its begin and end tokens already)."""
        self._file.write(np.asarray(ids, dtype=np.dtype(DTYPES[self.code]).newbyteorder("<")).tobytes())
        self.lengths.append(len(ids))

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self._file.close()
        if kind is None:
            self._write_index()

    def _write_index(self) -> None:
        lengths = np.asarray(self.lengths, dtype="<i4")
        itemsize = np.dtype(DTYPES[self.code]).itemsize
        pointers = np.zeros(len(lengths), dtype="<i8")
        np.cumsum(lengths[:-1].astype(np.int64) * itemsize, out=pointers[1:])
        with self.prefix.with_name(self.prefix.name + ".idx").open("wb") as file:
            file.write(HEADER.pack(MAGIC, VERSION, self.code, len(lengths), len(lengths) + 1))
            file.write(lengths.tobytes())
            file.write(pointers.tobytes())
            file.write(np.arange(len(lengths) + 1, dtype="<i8").tobytes())


class Shard:
    """Reads a pair of files through memory maps: `tokens` is the whole stream, `starts` where each sequence begins.

    `starts` has one entry more than there are sequences: the number of tokens.
    """

    def __init__(self, prefix: Path) -> None:
        index_file = prefix.with_name(prefix.name + ".idx")
        bin_file = prefix.with_name(prefix.name + ".bin")
        for file in (index_file, bin_file):
            if not file.is_file():
                raise DataError(f"{file} does not exist; tokens are a pair of files, .bin and .idx")
        raw = index_file.read_bytes()
        if len(raw) < HEADER.size or not raw.startswith(MAGIC):
            raise DataError(f"{index_file} is not a Megatron index: it does not begin with MMIDIDX")
        _, version, code, sequences, documents = HEADER.unpack_from(raw)
        if version != VERSION or code not in DTYPES:
            raise DataError(f"{index_file} has version {version} and dtype code {code}; known: version 1, codes "
                            + ", ".join(map(str, DTYPES)))
        if len(raw) != HEADER.size + 12 * sequences + 8 * documents:
            raise DataError(f"{index_file} is cut short: {len(raw)} bytes for {sequences} sequences")
        lengths = np.frombuffer(raw, "<i4", sequences, HEADER.size).astype(np.int64)
        pointers = np.frombuffer(raw, "<i8", sequences, HEADER.size + 4 * sequences)
        dtype = np.dtype(DTYPES[code]).newbyteorder("<")
        self.starts: NDArray[np.int64] = np.concatenate([[0], np.cumsum(lengths)]).astype(np.int64)
        if not np.array_equal(pointers, self.starts[:-1] * dtype.itemsize):
            raise DataError(f"{index_file} does not list its sequences one after another, which is the only form read here")
        size = bin_file.stat().st_size
        if size != self.starts[-1] * dtype.itemsize:
            raise DataError(f"{bin_file} has {size} bytes; its index says {self.starts[-1] * dtype.itemsize}")
        self.tokens: NDArray[Any] = np.memmap(bin_file, dtype, "r") if size else np.zeros(0, dtype)

    def __len__(self) -> int:
        return len(self.starts) - 1

    def document(self, index: int) -> NDArray[np.int32]:
        """Token ids of one sequence."""
        return np.asarray(self.tokens[self.starts[index]:self.starts[index + 1]], dtype=np.int32)
