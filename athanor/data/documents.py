"""Readers: each kind of source becomes a stream of documents, or of what could not be read and why."""

from __future__ import annotations

import csv
import gzip
import hashlib
import io
import itertools
import json
import re
import zlib
from collections.abc import Callable, Iterator
from html.parser import HTMLParser
from pathlib import Path
from typing import BinaryIO, NamedTuple, cast

from athanor.data.shards import Shard
from athanor.data.sources import ROWS, list_files, root, uri_of
from athanor.data.text.tokenizer import Tokenizer
from athanor.foundation.errors import DataError
from athanor.foundation.recipe import Source

LOOKED_AT = 100  # texts of a source's file, before it is read as a whole
PIECE_BYTES = 64 * 1024  # longer plain text files are cut at empty lines, so that whole documents can be held out
CODE_SUFFIXES = (".py", ".pyi", ".c", ".h", ".cc", ".cpp", ".hpp", ".rs", ".go", ".java", ".js", ".ts", ".sh", ".sql")


class Document(NamedTuple):
    """One text with its place in the raw data: `length` bytes from `offset` of the file that `uri` names.

    For Parquet and token files `offset` is the number of the row or sequence.
    """

    doc_id: str
    text: str
    source: str
    uri: str
    offset: int
    length: int
    is_code: bool


class Rejected(NamedTuple):
    """A part of a source that is not a text; `reason` says why in a few words."""

    doc_id: str
    source: str
    uri: str
    offset: int
    length: int
    reason: str


class Decision(NamedTuple):
    """What a filter says of a document: `value` is held against `threshold`; `reason` names the fault when dropped."""

    keep: bool
    value: float
    threshold: float
    reason: str


class Refusal(str):
    """Stands in the place of a text that is none; its value is the reason."""


Piece = tuple[int, int, bytes | str]  # offset, length, content (or a Refusal)


def read_documents(source: Source, tokenizer: Tokenizer | None = None) -> Iterator[Document | Rejected]:
    """All documents of a source, in the order of its sorted files.

    `tokenizer` is needed for kind 'tokens' alone. Raises DataError when the source is missing or has the wrong form.
    """
    start = root(source)
    for file in list_files(source):
        uri = uri_of(start, file)
        is_code = source.kind == "python" or uri.lower().endswith(CODE_SUFFIXES)
        pieces = _token_documents(source, file, tokenizer) if source.kind == "tokens" else READERS[source.kind](source, file)
        try:
            for offset, length, content in pieces:
                doc_id = make_doc_id(source.name, uri, offset, length)
                text = to_text(content)
                if isinstance(text, Refusal):
                    yield Rejected(doc_id, source.name, uri, offset, length, text)
                else:
                    yield Document(doc_id, text, source.name, uri, offset, length, is_code)
        except (OSError, EOFError, zlib.error, csv.Error) as error:
            raise DataError(f"source '{source.name}': cannot read {file}: {error}") from None


def check_readable(source: Source) -> None:
    """Raise DataError when none of the first rows of any file of a source is a text: its field goes by another name."""
    why = []
    for file in list_files(source) if source.kind in ROWS else []:
        for each in itertools.islice(read_documents(source.model_copy(update={"path": str(file)})), LOOKED_AT):
            if isinstance(each, Document):
                return
            why.append(each.reason)
    if why:
        raise DataError(f"source '{source.name}': none of the first {len(why)} rows of {source.path} can be read: {why[0]}")


def make_doc_id(source: str, uri: str, offset: int, length: int) -> str:
    """128 bits of BLAKE2b over where a document lies, as 32 hexadecimal digits."""
    place = f"{source}/{uri}\0".encode()
    digest = hashlib.blake2b(place + offset.to_bytes(8, "little") + length.to_bytes(8, "little"), digest_size=16)
    return digest.hexdigest()


def to_text(content: bytes | str) -> str:
    """The content as text, unchanged; a Refusal when it is empty, binary or not UTF-8."""
    if isinstance(content, Refusal):
        return content
    if not content:
        return Refusal("empty")
    if isinstance(content, bytes):
        if b"\0" in content:
            return Refusal("binary")
        try:
            return content.decode("utf-8")
        except UnicodeDecodeError:
            return Refusal("not UTF-8")
    if "\0" in content:
        return Refusal("binary")
    try:
        content.encode("utf-8")
    except UnicodeEncodeError:
        return Refusal("not UTF-8")
    return content


def _whole_file(source: Source, file: Path) -> Iterator[Piece]:
    content = file.read_bytes()
    yield 0, len(content), content


def _text_pieces(source: Source, file: Path) -> Iterator[Piece]:
    content = file.read_bytes()
    begin = 0
    while len(content) - begin > PIECE_BYTES:
        cut = content.rfind(b"\n\n", begin, begin + PIECE_BYTES)
        cut = cut + 2 if cut > begin else content.find(b"\n", begin + PIECE_BYTES) + 1
        if cut <= begin:
            break
        yield begin, cut - begin, content[begin:cut]
        begin = cut
    yield begin, len(content) - begin, content[begin:]


def _open(file: Path) -> BinaryIO:
    return cast(BinaryIO, gzip.open(file, "rb")) if file.suffix == ".gz" else file.open("rb")


def _json_lines(source: Source, file: Path) -> Iterator[Piece]:
    offset = 0
    with _open(file) as lines:
        for line in lines:
            if line.strip():
                yield offset, len(line), _json_text(line)
            offset += len(line)


def _json_text(line: bytes) -> str:
    try:
        row = json.loads(line)
    except (ValueError, RecursionError):
        return Refusal("not JSON")
    text = row.get("text") if isinstance(row, dict) else None
    return text if isinstance(text, str) else Refusal("no field 'text'")


def _csv_rows(source: Source, file: Path) -> Iterator[Piece]:
    csv.field_size_limit(1 << 30)
    consumed = 0
    with _open(file) as raw:
        def lines() -> Iterator[str]:
            nonlocal consumed
            for line in raw:
                consumed += len(line)
                yield line.decode("utf-8-sig" if consumed == len(line) else "utf-8", "surrogateescape")

        rows = csv.reader(lines())
        column = _text_column(source, file, next(rows, []))
        offset = consumed
        for row in rows:
            yield offset, consumed - offset, row[column] if column < len(row) else Refusal("no field 'text'")
            offset = consumed


def _text_column(source: Source, file: Path, names: list[str]) -> int:
    if "text" not in names:
        raise DataError(f"source '{source.name}': {file} has no column 'text'; its columns are {', '.join(names) or 'none'}")
    return names.index("text")


def _parquet_rows(source: Source, file: Path) -> Iterator[Piece]:
    import pyarrow as pa
    import pyarrow.parquet as pq

    try:
        table = pq.ParquetFile(file)
    except (pa.ArrowInvalid, OSError) as error:
        raise DataError(f"source '{source.name}': {file} is not a Parquet file: {error}") from None
    _text_column(source, file, table.schema_arrow.names)
    number = 0
    for batch in table.iter_batches(batch_size=1024, columns=["text"]):
        for text in batch.column(0).to_pylist():
            content = text if isinstance(text, (str, bytes)) else Refusal("no field 'text'")
            size = len(content if isinstance(content, bytes) else content.encode("utf-8", "surrogatepass"))
            yield number, size, content
            number += 1


class _TextOfHtml(HTMLParser):
    """Collects what a page shows, line by line: no scripts or styles, a line for each block."""

    SILENT = ("script", "style", "template", "noscript", "head")
    BLOCKS = ("p", "div", "li", "tr", "br", "h1", "h2", "h3", "h4", "h5", "h6", "pre", "section", "article", "table",
              "ul", "ol", "dt", "dd", "blockquote", "header", "footer", "nav")

    def __init__(self) -> None:
        super().__init__(convert_charrefs=True)
        self.lines = [""]
        self.silent = self.preformatted = 0

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.silent += tag in self.SILENT
        self.preformatted += tag == "pre"
        if tag in self.BLOCKS:
            self.lines.append("")

    def handle_endtag(self, tag: str) -> None:
        self.silent = max(0, self.silent - (tag in self.SILENT))
        self.preformatted = max(0, self.preformatted - (tag == "pre"))
        if tag in self.BLOCKS:
            self.lines.append("")

    def handle_data(self, data: str) -> None:
        if self.silent:
            return
        if self.preformatted:
            first, *others = data.split("\n")
            self.lines[-1] += first
            self.lines += others
        else:
            data = re.sub(r"\s+", " ", data)
            self.lines[-1] += data if self.lines[-1] else data.lstrip()


def html_text(page: str) -> str:
    """The text of an HTML page: a line for each block; white space is kept in preformatted text alone."""
    parser = _TextOfHtml()
    parser.feed(page)
    parser.close()
    return "\n".join(line.rstrip() for line in parser.lines if line.strip())


def _html_page(source: Source, file: Path) -> Iterator[Piece]:
    raw = file.read_bytes()
    yield 0, len(raw), _page_text(to_text(raw))


def _page_text(page: str) -> str:
    try:
        return page if isinstance(page, Refusal) else html_text(page)
    except AssertionError:  # the parser's word for a declaration that it does not know
        return Refusal("not HTML")


def _warc_records(source: Source, file: Path) -> Iterator[Piece]:
    from warcio.archiveiterator import ArchiveIterator

    with file.open("rb") as raw:
        records = ArchiveIterator(raw)
        for record in records:
            if record.rec_type != "response":
                continue
            content = record.content_stream().read()
            kind = record.http_headers.get_header("Content-Type", "") if record.http_headers else ""
            page = to_text(content) if kind.startswith(("text/html", "text/plain")) else Refusal("not a page of text")
            text = _page_text(page) if kind.startswith("text/html") else page
            yield records.get_record_offset(), len(content), text


def _pdf_text(source: Source, file: Path) -> Iterator[Piece]:
    from pypdf import PdfReader
    from pypdf.errors import PyPdfError

    raw = file.read_bytes()
    try:
        text = "\n\n".join(page.extract_text() for page in PdfReader(io.BytesIO(raw)).pages)
    except (PyPdfError, ValueError, KeyError) as error:
        text = Refusal(f"not a readable PDF ({type(error).__name__})")
    yield 0, len(raw), text


def _token_documents(source: Source, file: Path, tokenizer: Tokenizer | None) -> Iterator[Piece]:
    if tokenizer is None:
        raise DataError(f"source '{source.name}' of kind 'tokens' needs data.tokenizer, the tokenizer that made its tokens")
    shard = Shard(file.with_suffix(""))
    for index in range(len(shard)):
        ids = shard.document(index)
        outside = len(ids) and int(ids.max()) >= tokenizer.vocab_size
        yield index, len(ids), Refusal("token ids beyond the tokenizer") if outside else tokenizer.decode(ids.tolist())


READERS: dict[str, Callable[[Source, Path], Iterator[Piece]]] = {
    "python": _whole_file, "folder": _whole_file, "git": _whole_file, "text": _text_pieces, "jsonl": _json_lines,
    "csv": _csv_rows, "parquet": _parquet_rows, "html": _html_page, "warc": _warc_records, "pdf": _pdf_text}
