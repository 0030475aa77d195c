"""What model code asks of a tensor besides its shape and dtype: the kind of its device, and where documents end.

The tensors of a rehearsal lie nowhere and have no values, so there the answers come from what is rehearsed. Nothing else
in the models knows of rehearsals.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence

from torch import Tensor

_device_type: str | None = None
_lengths: list[int] | None = None


@contextlib.contextmanager
def computing_like(device_type: str, lengths: Sequence[int]) -> Iterator[None]:
    """Take the branches of a kind of device (`cpu` or `cuda`), for micro-batches of documents of these lengths."""
    global _device_type, _lengths
    _device_type, _lengths = device_type, list(lengths)
    try:
        yield
    finally:
        _device_type = _lengths = None


def device_type(x: Tensor) -> str:
    """The kind of device that a tensor is computed on."""
    return _device_type or x.device.type


def on_host(counts: Tensor, total: int) -> list[list[int]]:
    """Rows of counts [rows, parts] as numbers, each row adding up to `total`. Waits for the device.

    A rehearsal takes parts to be as equal as can be.
    """
    if _lengths is None:
        return counts.tolist()  # type: ignore[no-any-return]
    rows, parts = counts.shape
    return [[total // parts + (part < total % parts) for part in range(parts)] for _ in range(rows)]


def document_lengths(cu_seqlens: Tensor) -> list[int]:
    """The tokens of each document; the padding of cu_seqlens is left out. Waits for the device."""
    if _lengths is not None:
        return _lengths
    return [length for length in cu_seqlens.diff().tolist() if length]
