"""Documents and decisions as Parquet parts: what was read is never changed, what was decided stands beside it."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from athanor.data.documents import Decision, Document, Rejected

PART_BYTES = 32 << 20  # of text


@dataclass
class Entry:
    """What is remembered of a document while the build goes on; its text lies in a part."""

    doc_id: str
    source: str
    uri: str
    offset: int
    length: int
    size_bytes: int  # of the text in UTF-8; of the raw data when it is no text
    is_code: bool
    values: dict[str, float] = field(default_factory=dict)  # of each filter
    reason: str = ""  # why it was dropped; empty when kept
    split: str = ""  # train or evaluation when kept


class Parts:
    """Writes and reads `documents/part-*.parquet`; `entries` are the rows of all parts in order."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.entries: list[Entry] = []
        self.ends: list[int] = []  # number of entries up to the end of each part
        self._texts: list[str | None] = []
        self._text_bytes = 0
        (folder / "documents").mkdir()
        (folder / "decisions").mkdir()

    def add(self, item: Document | Rejected, verdicts: dict[str, Decision]) -> Entry:
        """Store a document with what the filters said of it, or what could not be read."""
        values = {name: verdict.value for name, verdict in verdicts.items()}
        if isinstance(item, Document):
            size = len(item.text.encode())
            entry = Entry(item.doc_id, item.source, item.uri, item.offset, item.length, size, item.is_code, values)
            self._texts.append(item.text)
            self._text_bytes += size
        else:
            entry = Entry(item.doc_id, item.source, item.uri, item.offset, item.length, item.length, False, values, item.reason)
            self._texts.append(None)
        self.entries.append(entry)
        if self._text_bytes >= PART_BYTES:
            self.flush()
        return entry

    def flush(self) -> None:
        """Write what has gathered as a part."""
        if not self._texts:
            return
        begin = self.ends[-1] if self.ends else 0
        rows = self.entries[begin:]
        table = pa.table({
            "doc_id": pa.array([bytes.fromhex(row.doc_id) for row in rows], pa.binary(16)),
            "text": pa.array(self._texts, pa.large_string()),
            **{name: pa.array([getattr(row, name) for row in rows], kind)
               for name, kind in (("source", pa.string()), ("uri", pa.string()), ("offset", pa.int64()),
                                  ("length", pa.int64()))}})
        pq.write_table(table, self._file("documents", len(self.ends)), compression="zstd", compression_level=3)
        self.ends.append(len(self.entries))
        self._texts, self._text_bytes = [], 0

    def texts(self) -> Iterator[list[tuple[Entry, str]]]:
        """Part by part, the documents that are still kept, with their texts."""
        begin = 0
        for number, end in enumerate(self.ends):
            column = pq.read_table(self._file("documents", number), columns=["text"]).column(0).to_pylist()
            rows = zip(self.entries[begin:end], column, strict=True)
            yield [(entry, text) for entry, text in rows if not entry.reason]
            begin = end

    def write_decisions(self, filters: list[str]) -> None:
        """Write `decisions/part-*.parquet`: for each row of the documents keep, reason, split and each filter's value."""
        begin = 0
        for number, end in enumerate(self.ends):
            rows = self.entries[begin:end]
            columns: dict[str, Any] = {
                "keep": [not row.reason for row in rows],
                "reason": [row.reason for row in rows],
                "split": [row.split for row in rows]}
            columns |= {f"value_{name}": pa.array([row.values.get(name) for row in rows], pa.float32()) for name in filters}
            pq.write_table(pa.table(columns), self._file("decisions", number), compression="zstd", compression_level=3)
            begin = end

    def _file(self, kind: str, number: int) -> Path:
        return self.folder / kind / f"part-{number:05d}.parquet"
