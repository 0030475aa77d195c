"""Rows: every token of the stream once, no attention or loss across documents, weight on answers alone."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from athanor.data.rows import Windows, open_rows
from athanor.data.shards import Shard, ShardWriter
from athanor.data.text.chat import ChatTemplate
from athanor.foundation.errors import DataError
from athanor.foundation.run_folder import read_json, read_jsonl


def test_windows_cover_the_stream_once(tmp_path: Path) -> None:
    with ShardWriter(tmp_path / "t", 100) as writer:
        for document in ([0, 5, 6, 7, 1], [0, 1], [0, 8, 9, 1]):
            writer.append(document)
    windows = Windows(Shard(tmp_path / "t"), 4, 2, keep_rest=True)
    rows = [windows.row(i) for i in range(windows.count)]
    assert [row["tokens"].tolist() for row in rows] == [[0, 5, 6, 7, 1], [1, 0, 1, 0, 8], [8, 9, 1, 2, 2]]
    assert [row["weight"].tolist() for row in rows] == [[1, 1, 1, 1], [0, 1, 0, 1], [1, 1, 0, 0]]
    assert [row["starts"].tolist() for row in rows] == [[0], [0, 1, 3], [0, 3]]
    assert Windows(Shard(tmp_path / "t"), 4, 2, keep_rest=False).count == 2


@pytest.mark.parametrize("split", ["train", "evaluation"])
def test_rows_have_the_agreed_form(data_folder: Path, split: str) -> None:
    for data in ("documents", "pairs"):
        rows = open_rows(data_folder, data, 128, 0, split)  # type: ignore[arg-type]
        assert rows.count > 0
        for row in rows.take(0, 20):
            assert row["tokens"].shape == (129,) and row["tokens"].dtype == np.int32
            assert row["weight"].shape == (128,) and row["weight"].dtype == np.float32
            assert row["starts"].dtype == np.int32 and row["starts"][0] == 0
            assert (np.diff(row["starts"]) > 0).all() and row["starts"][-1] < 128
            boundaries = row["starts"][1:] - 1
            assert not row["weight"][boundaries].any()
            assert row["weight"].any()


def test_evaluation_scores_every_token_of_every_held_out_document(data_folder: Path) -> None:
    rows = open_rows(data_folder, "documents", 64, 0, "evaluation")
    weight = sum(row["weight"].sum() for row in rows.take(0, rows.count))
    manifest = read_json(data_folder / "manifest.json")["evaluation"]
    assert weight == manifest["tokens"] - manifest["documents"]  # all but the first token of each, which nothing precedes
    first = rows.take(0, 1)[0]["tokens"]
    assert np.array_equal(first, Shard(data_folder / "evaluation").tokens[:65])


def test_samples_do_not_depend_on_how_they_are_asked_for(data_folder: Path) -> None:
    rows = open_rows(data_folder, "documents", 128, 1)
    together = rows.take(rows.count - 3, 8)
    again = open_rows(data_folder, "documents", 128, 1)
    single = [again.take(rows.count - 3 + i, 1)[0] for i in range(8)]
    assert all(np.array_equal(a[key], b[key]) for a, b in zip(together, single, strict=True) for key in a)
    other = open_rows(data_folder, "documents", 128, 2)
    assert not all(np.array_equal(a["tokens"], b["tokens"]) for a, b in zip(together, other.take(rows.count - 3, 8), strict=True))


def test_sources_are_mixed_by_weight(data_folder: Path) -> None:
    rows = open_rows(data_folder, "documents", 128, 1)
    weights = {tuple(row["tokens"].tolist()) for row in rows.take(0, 4096)}
    asyncio = Windows(Shard(data_folder / "train-asyncio"), 128, 2, keep_rest=False)
    email = Windows(Shard(data_folder / "train-email"), 128, 2, keep_rest=False)
    assert len(weights) <= asyncio.count + email.count
    ours = {tuple(asyncio.row(i)["tokens"].tolist()) for i in range(asyncio.count)}
    share = np.mean([tuple(row["tokens"].tolist()) in ours for row in rows.take(0, 4096)])
    assert abs(share - 0.75) < 0.01


def test_rows_know_where_they_come_from(data_folder: Path) -> None:
    rows = open_rows(data_folder, "documents", 128, 1)
    origins, taken = rows.origins(4090, 12), rows.take(4090, 12)
    assert [origin["sample"] for origin in origins] == list(range(4090, 4102))
    assert {origin["source"] for origin in origins} == {"asyncio", "email"}
    for origin, row in zip(origins, taken, strict=True):
        shard, (first, end) = Shard(data_folder / f"train-{origin['source']}"), origin["tokens"]
        assert np.array_equal(shard.tokens[first:end], row["tokens"])
        documents = [np.flatnonzero(shard.starts <= token)[-1] for token in (first, end - 1)]
        assert origin["documents"] == documents
    assert json.dumps(origins)
    pairs = open_rows(data_folder, "pairs", 256, 0).origins(0, 3)
    assert all(row["source"] == "pairs" and row["conversations"] for row in pairs) and json.dumps(pairs)


def test_fingerprint_changes_with_what_rows_depend_on(data_folder: Path, tmp_path: Path) -> None:
    prints = {open_rows(data_folder, data, seq_len, seed, split).fingerprint  # type: ignore[arg-type]
              for data, seq_len, seed, split in [("documents", 128, 0, "train"), ("documents", 64, 0, "train"),
                                                 ("documents", 128, 1, "train"), ("documents", 128, 0, "evaluation"),
                                                 ("pairs", 128, 0, "train")]}
    assert len(prints) == 5
    assert open_rows(data_folder, "documents", 128, 0).fingerprint in prints
    template = tmp_path / "data" / "tokenizer" / "chat_template.jinja"
    shutil.copytree(data_folder, tmp_path / "data")
    template.write_text(template.read_text() + " ")
    assert open_rows(tmp_path / "data", "pairs", 128, 0).fingerprint not in prints


def test_pairs_are_whole_and_each_comes_once(data_folder: Path) -> None:
    rows = open_rows(data_folder, "pairs", 256, 0)
    template = ChatTemplate.load(data_folder / "tokenizer")
    pairs = [row["messages"] for row in read_jsonl(data_folder / "pairs.jsonl")]
    all_pairs = [template.render(messages) for messages in pairs]
    answers = {tuple(ids): messages[-1]["content"] for ids, messages in zip(all_pairs, pairs, strict=True)}
    wanted = sorted(ids for ids in all_pairs if len(ids) <= 256)
    assert rows.dropped == len(all_pairs) - len(wanted) > 0
    found = []
    for row in rows.take(0, rows.count):
        ends = [*row["starts"].tolist()[1:], 256]
        for start, end in zip(row["starts"].tolist(), ends, strict=True):
            ids = row["tokens"][start:end].tolist()
            if ids[0] != template.tokenizer.pad_id:
                found.append(ids)
                shown = template.tokenizer.decode(
                    [int(t) for t, w in zip(row["tokens"][start + 1:end], row["weight"][start:end - 1], strict=True) if w], False)
                assert shown == answers[tuple(ids)] + "<|end|>"  # the answer, from its first token to the end of its turn
    assert sorted(found) == wanted


def test_conversation_file_is_read_and_split(data_folder: Path, tmp_path: Path) -> None:
    talks = [{"messages": [{"role": "user", "content": f"q{i}"}, {"role": "assistant", "content": f"a{i}"}]} for i in range(200)]
    file = tmp_path / "talk.jsonl"
    file.write_text("\n".join(map(json.dumps, talks)) + "\n\n")
    texts = []
    for split in ("train", "evaluation"):
        rows = open_rows(data_folder, str(file), 64, 0, split)  # type: ignore[arg-type]
        tokenizer = ChatTemplate.load(data_folder / "tokenizer").tokenizer
        shown = " ".join(tokenizer.decode(row["tokens"].tolist(), False) for row in rows.take(0, rows.count))
        texts.append({i for i in range(200) if f"<|assistant|>a{i}<|end|>" in shown})
    assert texts[0] | texts[1] == set(range(200)) and not texts[0] & texts[1]
    assert 15 < len(texts[1]) < 70  # a fifth


@pytest.mark.parametrize(("data", "content", "words"), [
    ("talk.jsonl", '{"messages": []}', "line 1: messages must be a list of at least one"),
    ("talk.jsonl", '{"messages": [{"role": "user", "content": "a"}]}\n{"x"', "line 2 is not JSON"),
    ("talk.jsonl", "[" * 100_000, "line 1 is not JSON"),
    ("talk.jsonl", '{"messages": [{"role": "user", "content": "\\ud800"}]}', "line 1: 'content' of message 0 has half a"),
    ("talk.jsonl", "[]", 'line 1 must be an object with "messages"'),
    ("talk.jsonl", '\n{"messages": [{"role": "human", "content": "a"}]}',
     r"talk.jsonl line 2: .*chat_template.jinja refuses these messages: .*allowed: system, user, assistant"),
    ("documentz", "", "is not a file; allowed: documents, pairs"), ("lost/talk", "", "'lost/talk' does not exist; allowed: doc")])
def test_bad_conversations_are_refused(data_folder: Path, tmp_path: Path, data: str, content: str, words: str) -> None:
    if data.endswith(".jsonl"):
        (tmp_path / data).write_text(content)
        data = str(tmp_path / data)
    with pytest.raises(DataError, match=words):
        _ = [open_rows(data_folder, data, 64, 0, split) for split in ("evaluation", "train")]  # type: ignore[arg-type]


def test_too_long_rows_are_refused(data_folder: Path) -> None:
    with pytest.raises(DataError, match="fewer than one row of 10000000"):
        open_rows(data_folder, "documents", 10_000_000, 0)
    with pytest.raises(DataError, match=r"'pairs' has no conversation .*\d+ too long for a row.*a larger seq_len than 8"):
        open_rows(data_folder, "pairs", 8, 0)


def test_conversations_without_an_answer_are_left_out_and_counted(data_folder: Path, tmp_path: Path) -> None:
    asked = [[{"role": "user", "content": f"q{i}"}] for i in range(60)]
    answered = [[*ask, {"role": "assistant", "content": f"a{i}"}] for i, ask in enumerate(asked[:30])]
    silent, mixed, empty = (tmp_path / f"{name}.jsonl" for name in ("silent", "mixed", "empty"))
    for file, talks in ((silent, asked), (mixed, asked + answered), (empty, [])):
        file.write_text("".join(json.dumps({"messages": talk}) + "\n" for talk in talks))
    with pytest.raises(DataError, match=r"no conversation to train on \(\d+ without an answer.*'assistant' must follow"):
        open_rows(data_folder, str(silent), 64, 0)
    with pytest.raises(DataError, match="the file is empty, or all in it was held out"):
        open_rows(data_folder, str(empty), 64, 0)
    splits = [open_rows(data_folder, str(mixed), 64, 0, split) for split in ("train", "evaluation")]  # type: ignore[arg-type]
    assert [rows.dropped for rows in splits] == [0, 0] and sum(rows.silent for rows in splits) == len(asked)
    tokenizer = ChatTemplate.load(data_folder / "tokenizer").tokenizer
    shown = ""
    for rows in splits:
        assert rows.left_out == f"{rows.silent} without an answer to learn from"
        for row in rows.take(0, rows.count):
            assert row["weight"].any()
            shown += tokenizer.decode(row["tokens"].tolist(), False)
    assert shown.count("<|user|>") == shown.count("<|assistant|>") == len(answered)


def test_conversations_are_rendered_once(data_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Ranks and later runs find their tokens; damaged ones, or those of another template, are made anew."""
    folder, file, rendered = tmp_path / "data", tmp_path / "talk.jsonl", []
    shutil.copytree(data_folder, folder, ignore=shutil.ignore_patterns("conversations"))
    talk = json.dumps({"messages": [{"role": "user", "content": "q"}, {"role": "assistant", "content": "d"}]})  # trained on
    file.write_text(talk + "\n")
    render = ChatTemplate.render_with_mask
    monkeypatch.setattr(ChatTemplate, "render_with_mask", lambda *given: rendered.append(given) or render(*given))

    def take(data: str) -> tuple[int, bytes]:
        rendered.clear()
        rows = open_rows(folder, data, 256, 0)
        return len(rendered), b"".join(each.tobytes() for row in rows.take(0, 5) for each in row.values())

    for data in ("pairs", str(file)):
        count, wanted = take(data)
        assert count > 0 and take(data) == (0, wanted)
        for kept in (folder / "conversations").iterdir():
            content = bytearray(kept.read_bytes())
            content[len(content) // 2] ^= 1
            kept.write_bytes(content)
        assert take(data) == (count, wanted) and take(data) == (0, wanted)
    template = folder / "tokenizer" / "chat_template.jinja"
    template.write_text(template.read_text() + " ")
    assert take(str(file))[0] == 1
    shutil.rmtree(folder / "conversations")
    (folder / "conversations").touch()  # nothing can be written there
    assert take("pairs") == take("pairs") and len(rendered) > 0


def test_reading_rows_loads_nothing_heavy(data_folder: Path) -> None:
    program = ("import sys; sys.modules.update({name: None for name in ('pyarrow', 'torch', 'starlette', 'pandas')})\n"
               "from pathlib import Path\nfrom athanor.data.rows import open_rows\n"
               "for data in ('documents', 'pairs'): open_rows(Path(sys.argv[1]), data, 128, 0).take(0, 2)")
    subprocess.run([sys.executable, "-c", program, str(data_folder)], check=True, timeout=60)
