"""Sources: each kind is read as it lies on disk, and what is not text is dropped with its reason."""

from __future__ import annotations

import csv
import gzip
import json
import os
import subprocess
import sys
import sysconfig
from collections.abc import Callable
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from athanor.data.documents import PIECE_BYTES, Document, Rejected, html_text, read_documents
from athanor.data.shards import ShardWriter
from athanor.data.sources import list_files, scan
from athanor.data.text.tokenizer import Tokenizer
from athanor.foundation.errors import DataError
from athanor.foundation.recipe import Recipe, Source

TEXTS = ["first é\r\n", 'with "quotes", and\ncommas', "中文"]


def read(kind: str, path: Path | str, tokenizer: Tokenizer | None = None) -> list[Document | Rejected]:
    return list(read_documents(Source(name="s", kind=kind, path=str(path)), tokenizer))  # type: ignore[arg-type]


def texts(items: list[Document | Rejected]) -> list[str]:
    return [item.text if isinstance(item, Document) else f"<{item.reason}>" for item in items]


def test_standard_library_is_found_without_its_tests() -> None:
    source = Source(name="s", kind="python", path="auto")
    files = list_files(source)
    names = {file.relative_to(sysconfig.get_path("stdlib")).as_posix() for file in files}
    assert {"os.py", "json/decoder.py", "asyncio/base_events.py"} <= names
    assert not [name for name in names if {"test", "tests", "idlelib", "site-packages"} & set(name.split("/"))]
    assert files == sorted(files) and len(files) > 400


def test_folder_keeps_text_and_refuses_the_rest(tmp_path: Path) -> None:
    (tmp_path / "sub").mkdir()
    (tmp_path / "sub" / "a.c").write_bytes("int é;\r\n".encode())
    (tmp_path / "b.bin").write_bytes(b"\x7fELF\0\0\1")
    (tmp_path / "c.txt").write_bytes(b"\xff\xfe broken")
    (tmp_path / "d.txt").touch()
    (tmp_path / ".hidden").write_text("x")
    items = read("folder", tmp_path)
    assert [(item.uri, item.length) for item in items] == [("b.bin", 7), ("c.txt", 9), ("d.txt", 0), ("sub/a.c", 9)]
    assert texts(items) == ["<binary>", "<not UTF-8>", "<empty>", "int é;\r\n"]
    assert isinstance(items[3], Document) and items[3].is_code
    assert len({item.doc_id for item in items}) == 4 and all(len(item.doc_id) == 32 for item in items)


def test_long_text_is_cut_at_empty_lines_without_loss(tmp_path: Path) -> None:
    content = "".join(f"paragraph {i} é\nmore\n\n" for i in range(12_000)) + "x" * (2 * PIECE_BYTES) + "\nend"
    (tmp_path / "book.txt").write_text(content, encoding="utf-8")
    items = read("text", tmp_path / "book.txt")
    assert "".join(texts(items)) == content
    raw = content.encode()
    assert all(raw[item.offset:item.offset + item.length].decode() == item.text for item in items if isinstance(item, Document))
    assert len(items) > 3 and all(item.length <= PIECE_BYTES for item in items[:-2])


@pytest.mark.parametrize("suffix", ["", ".gz"])
def test_json_lines(tmp_path: Path, suffix: str) -> None:
    lines = [json.dumps({"text": text, "n": 1}, ensure_ascii=False) for text in TEXTS]
    raw = "\n".join([*lines, "", "{broken", '{"txt": 1}', "[]", '{"text": "\\ud800"}', '{"text": "a\\u0000"}']).encode()
    (tmp_path / f"a.jsonl{suffix}").write_bytes(gzip.compress(raw) if suffix else raw)
    items = read("jsonl", tmp_path)
    assert texts(items) == [*TEXTS, "<not JSON>", "<no field 'text'>", "<no field 'text'>", "<not UTF-8>", "<binary>"]
    assert json.loads(raw[items[1].offset:items[1].offset + items[1].length])["text"] == TEXTS[1]


def test_csv(tmp_path: Path) -> None:
    with (tmp_path / "a.csv").open("w", newline="", encoding="utf-8") as file:
        csv.writer(file).writerows([["id", "text"], *([i, text] for i, text in enumerate(TEXTS)), ["short"]])
    items = read("csv", tmp_path)
    assert texts(items) == [*TEXTS, "<no field 'text'>"]
    raw = (tmp_path / "a.csv").read_bytes()
    assert raw[items[1].offset:items[1].offset + items[1].length].startswith(b'1,"with ""quotes""')
    (tmp_path / "a.csv").write_text("a,b\n1,2\n")
    with pytest.raises(DataError, match="has no column 'text'; its columns are a, b"):
        read("csv", tmp_path)


def test_parquet(tmp_path: Path) -> None:
    pq.write_table(pa.table({"text": [*TEXTS, None], "n": [1, 2, 3, 4]}), tmp_path / "a.parquet")
    items = read("parquet", tmp_path / "a.parquet")
    assert texts(items) == [*TEXTS, "<no field 'text'>"]
    assert [item.offset for item in items] == [0, 1, 2, 3]
    (tmp_path / "b.parquet").write_bytes(b"no")
    with pytest.raises(DataError, match=r"b\.parquet is not a Parquet file"):
        read("parquet", tmp_path)


def test_html(tmp_path: Path) -> None:
    page = ("<html><head><title>T</title><script>var a = '<p>';</script></head><body><h1>One &amp; two</h1>"
            "<p> a <b>bold</b>\n  word<br>next</p><style>p {}</style><ul><li>x<li>y</ul>"
            "<pre>def f():\n    pass\n</pre></body></html>")
    assert html_text(page) == "One & two\na bold word\nnext\nx\ny\ndef f():\n    pass"
    (tmp_path / "a.html").write_text(page)
    assert texts(read("html", tmp_path)) == [html_text(page)]


def test_unreadable_files_are_named(tmp_path: Path) -> None:
    (tmp_path / "a.jsonl.gz").write_bytes(gzip.compress(b'{"text": "x"}\n' * 9999)[:-20])
    with pytest.raises(DataError, match=r"source 's': cannot read .*a\.jsonl\.gz"):
        read("jsonl", tmp_path)


def test_git_reads_what_is_tracked(tmp_path: Path) -> None:
    for name in ("kept.py", "ignored.py"):
        (tmp_path / name).write_text(f"# {name}\n")
    git = ["git", "-C", str(tmp_path), "-c", "user.name=a", "-c", "user.email=a@example.org"]
    subprocess.run([*git, "init", "-q"], check=True)
    subprocess.run([*git, "add", "kept.py"], check=True)
    assert [item.uri for item in read("git", tmp_path)] == ["kept.py"]


def test_git_refuses_a_plain_folder(tmp_path: Path) -> None:
    (tmp_path / "a.py").write_text("x")
    with pytest.raises(DataError, match="is not a git work tree"):
        read("git", tmp_path)


def test_tokens_become_text_again(tmp_path: Path, data_folder: Path) -> None:
    tokenizer = Tokenizer.load(data_folder / "tokenizer")
    with ShardWriter(tmp_path / "old", tokenizer.vocab_size) as writer:
        for text in TEXTS:
            writer.append([tokenizer.bos_id, *tokenizer.encode(text), tokenizer.eos_id])
        writer.append([60_000])
    assert texts(read("tokens", tmp_path / "old", tokenizer)) == [*TEXTS, "<token ids beyond the tokenizer>"]
    with pytest.raises(DataError, match=r"needs data\.tokenizer"):
        read("tokens", tmp_path / "old")


@pytest.mark.parametrize(("kind", "path", "words"), [
    ("folder", "nowhere", "source 's': .*nowhere does not exist"), ("jsonl", ".", r"no file of kind 'jsonl' \(\.jsonl"),
    ("folder", ".", "there is no file"), ("text", "auto", "needs a path; 'auto' is for kind 'python' only")])
def test_missing_sources_are_named(tmp_path: Path, kind: str, path: str, words: str) -> None:
    with pytest.raises(DataError, match=words):
        read(kind, path if path == "auto" else tmp_path / path)


@pytest.mark.parametrize(("kind", "package"), [("warc", "warcio"), ("pdf", "pypdf")])
def test_missing_packages_are_named(tmp_path: Path, kind: str, package: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(DataError, match=f"needs the package '{package}', which is not installed"):
        read(kind, tmp_path)


def test_scan_counts_without_reading(tmp_path: Path, make_recipe: Callable[..., Recipe]) -> None:
    (tmp_path / "d").mkdir()
    (tmp_path / "d" / "a.jsonl").write_text('{"text": "x"}\n' * 1000)
    (tmp_path / "d" / "b.py").write_text("x = 1\n")
    recipe = make_recipe([{"name": "lines", "kind": "jsonl", "path": str(tmp_path / "d")},
                          {"name": "code", "kind": "python", "path": str(tmp_path / "d")}])
    assert scan(recipe) == {"bytes": 14_006, "documents": 1001, "sources": {
        "lines": {"bytes": 14_000, "documents": 1000, "estimated": True},
        "code": {"bytes": 6, "documents": 1, "estimated": False}}}


def test_scanning_needs_no_heavy_package() -> None:
    program = ("import sys; sys.modules.update({n: None for n in ('pyarrow', 'torch', 'numpy', 'tokenizers')})\n"
               "import athanor.data.sources")
    subprocess.run([sys.executable, "-c", program], check=True, timeout=60)


@pytest.mark.parametrize(("path", "words"), [("/dev/null", "neither a file nor a folder"), ("~nobody-of-that-name/x", "a user")])
def test_a_path_that_is_no_text_is_one_sentence(path: str, words: str) -> None:
    with pytest.raises(DataError, match=words):
        read("text", path)


def test_what_parsers_choke_on_is_refused_alone(tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_text("[" * 200_000 + '\n{"text": "good"}\n')
    assert texts(read("jsonl", tmp_path)) == ["<not JSON>", "good"]
    (tmp_path / "a.html").write_text("<p>x<![foo[bar]]>")
    assert texts(read("html", tmp_path)) == ["<not HTML>"]
    (tmp_path / "a.csv").write_text("text,b\nfoo\rbar,3\n")
    with pytest.raises(DataError, match=r"cannot read .*a\.csv: new-line character"):
        read("csv", tmp_path)


def test_git_names_that_are_not_utf8_are_read(tmp_path: Path) -> None:
    (tmp_path / os.fsdecode(b"bad\xff.txt")).write_text("text")
    subprocess.run("git init -q && git add -A", shell=True, check=True, cwd=tmp_path)
    assert [(item.uri, item.length) for item in read("git", tmp_path)] == [("bad\\xff.txt", 4)]
