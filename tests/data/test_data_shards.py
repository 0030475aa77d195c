"""Token files: Megatron's layout byte by byte, and refusals of what is not one."""

from __future__ import annotations

import struct
from pathlib import Path

import numpy as np
import pytest

from athanor.data.shards import Shard, ShardWriter
from athanor.foundation.errors import DataError

DOCUMENTS = [[0, 5, 6, 1], [0, 1], [0, 7, 8, 9, 1]]


def write(prefix: Path, vocab_size: int = 1000) -> Shard:
    with ShardWriter(prefix, vocab_size) as writer:
        for document in DOCUMENTS:
            writer.append(document)
    return Shard(prefix)


@pytest.mark.parametrize(("vocab_size", "code", "dtype"), [(1000, 8, "<u2"), (65_499, 8, "<u2"), (65_500, 4, "<i4")])
def test_files_have_megatrons_layout(tmp_path: Path, vocab_size: int, code: int, dtype: str) -> None:
    write(tmp_path / "t", vocab_size)
    index = (tmp_path / "t.idx").read_bytes()
    size = np.dtype(dtype).itemsize
    assert index[:9] == b"MMIDIDX\x00\x00"
    assert struct.unpack("<QBQQ", index[9:34]) == (1, code, 3, 4)
    assert np.frombuffer(index[34:46], "<i4").tolist() == [4, 2, 5]
    assert np.frombuffer(index[46:70], "<i8").tolist() == [0, 4 * size, 6 * size]
    assert np.frombuffer(index[70:], "<i8").tolist() == [0, 1, 2, 3]
    assert np.frombuffer((tmp_path / "t.bin").read_bytes(), dtype).tolist() == [i for document in DOCUMENTS for i in document]


def test_reader_gives_back_what_was_written(tmp_path: Path) -> None:
    shard = write(tmp_path / "t")
    assert [shard.document(i).tolist() for i in range(len(shard))] == DOCUMENTS
    assert shard.starts.tolist() == [0, 4, 6, 11]


def test_empty_file_can_be_read(tmp_path: Path) -> None:
    with ShardWriter(tmp_path / "t", 10):
        pass
    shard = Shard(tmp_path / "t")
    assert len(shard) == 0 and len(shard.tokens) == 0


def test_no_index_after_an_error(tmp_path: Path) -> None:
    with pytest.raises(OverflowError), ShardWriter(tmp_path / "t", 10) as writer:
        writer.append([1, 70_000])
    assert not (tmp_path / "t.idx").exists()


@pytest.mark.parametrize(("change", "words"), [
    (lambda p: p.with_suffix(".bin").write_bytes(b"12"), "has 2 bytes"),
    (lambda p: p.with_suffix(".idx").write_bytes(b"garbage"), "not a Megatron index"),
    (lambda p: p.with_suffix(".idx").write_bytes(p.with_suffix(".idx").read_bytes()[:-4]), "cut short"),
    (lambda p: p.with_suffix(".bin").unlink(), "does not exist")])
def test_damaged_files_are_refused(tmp_path: Path, change: object, words: str) -> None:
    write(tmp_path / "t")
    change(tmp_path / "t")  # type: ignore[operator]
    with pytest.raises(DataError, match=words):
        Shard(tmp_path / "t")
