"""From rows to a batch: equally long columns on one axis of tokens, and where each document begins on it."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

Row = dict[str, NDArray[Any]]
Batch = dict[str, Any]  # columns [T] of numpy arrays or tensors, cu_seqlens [K], max_length


def collate(rows: Sequence[Row], seq_len: int) -> Batch:
    """Put rows of `seq_len` tokens one after another: T = rows x seq_len.

    Columns: tokens, targets, positions (from 0 in each document) int64 [T], weight float32 [T]; cu_seqlens int32 [K] holds
    each document's offset and then T, as often as it takes to fill K, which depends on T alone; max_length is `seq_len`, and
    is_even says that every row is one document of that length.
    """
    total = len(rows) * seq_len
    starts = np.concatenate([row["starts"].astype(np.int64) + index * seq_len for index, row in enumerate(rows)])
    cu_seqlens = np.full(most_documents(len(rows), seq_len) + 1, total, dtype=np.int32)
    assert len(starts) < len(cu_seqlens), "rows hold more documents than tokens allow"
    cu_seqlens[:len(starts)] = starts
    lengths = np.diff(np.append(starts, total))
    positions = np.arange(total, dtype=np.int64) - np.repeat(starts, lengths)
    return {"tokens": np.concatenate([row["tokens"][:-1] for row in rows]).astype(np.int64),
            "targets": np.concatenate([row["tokens"][1:] for row in rows]).astype(np.int64),
            "weight": np.concatenate([row["weight"] for row in rows]).astype(np.float32),
            "positions": positions, "cu_seqlens": cu_seqlens, "max_length": seq_len, "is_even": len(starts) == len(rows)}


def most_documents(rows: int, seq_len: int) -> int:
    """Documents that rows can hold: each has a begin and an end, but the first of a row may be the last token of one."""
    return rows * (1 + (seq_len + 1) // 2)


def empty_row(seq_len: int) -> Row:
    """A row that weighs nothing, for a rank that has no more rows while others have."""
    return {"tokens": np.zeros(seq_len + 1, dtype=np.int32), "weight": np.zeros(seq_len, dtype=np.float32),
            "starts": np.zeros(1, dtype=np.int32)}


def count_kept(batch: Batch) -> tuple[int, int]:
    """Tokens of the documents that count for the loss (padding does not), and the keys that their queries see in all."""
    weight = np.asarray(batch["weight"])
    edges = np.asarray(batch["cu_seqlens"])
    starts, lengths = edges[:-1][np.diff(edges) > 0], np.diff(edges)[np.diff(edges) > 0].astype(np.int64)
    kept = lengths[np.add.reduceat(weight, starts) > 0]
    return int(kept.sum()), int((kept * (kept + 1) // 2).sum())
