"""Tasks on real engines: models whose probabilities are known exactly, so that every score can be computed by hand."""

from __future__ import annotations

import gzip
import itertools
import json
import lzma
import math
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from bigram_model import follow, normalised, write_bigram
from hypothesis import given
from hypothesis import strategies as st

from athanor.data.text.tokenizer import Tokenizer
from athanor.evaluate.subject import Subject, open_subject
from athanor.evaluate.tasks import bits_per_byte, identifiers, python_parses
from athanor.foundation.errors import ModelError, UserError
from athanor.models.decoder import Decoder
from athanor.models.huggingface import logits, save_model
from athanor.models.initialize import initialize
from athanor.models.shapes.decoder import DecoderShape


def nothing(done: int, total: int) -> None:
    pass


def texts_of(data: Path) -> list[str]:
    return [json.loads(line)["text"] for line in (data / "evaluation.jsonl").read_text().splitlines()]


def random_table(tokenizer: Tokenizer, seed: int) -> np.ndarray:
    return normalised(np.random.default_rng(seed).random((tokenizer.vocab_size, tokenizer.vocab_size)) ** 4)


@given(st.integers(1, 300), st.integers(2, 40))
def test_windows_score_every_token_once_with_half_a_context_before_it(length: int, size: int) -> None:
    scored: list[int] = []
    for begin, end, first in bits_per_byte.windows(length, size):
        assert 0 <= begin < first <= end <= length or length == 1
        assert end - begin <= size
        scored += range(first, end)
        if begin > 0:
            assert first - begin >= size // 2
    assert scored == list(range(1, length))


@pytest.mark.parametrize("context", [16, 31, 512])
def test_bits_per_byte_of_a_bigram_model(tmp_path: Path, tokenizer: Tokenizer, data: Path, context: int) -> None:
    """Whatever the window, the sum is that of the table: no token is missed or counted twice."""
    table = random_table(tokenizer, 0)
    subject = open_subject("m", write_bigram(tmp_path / "m", tokenizer, table, context), False)
    score = bits_per_byte.run(subject, data, None, nothing)
    bits, ends, sizes = [], [], []
    for text in texts_of(data):
        ids = [0, *tokenizer.encode(text)]
        bits.append(-sum(table[a, b] for a, b in itertools.pairwise(ids)) / math.log(2))
        ends.append(-table[ids[-1], 1] / math.log(2))
        sizes.append(len(text.encode()))
    assert score.value == pytest.approx(sum(bits) / sum(sizes), rel=1e-5)
    assert score.details["with_end_of_document"] == pytest.approx((sum(bits) + sum(ends)) / sum(sizes), rel=1e-5)
    ratios = [b / s for b, s in zip(bits, sizes, strict=True)]
    assert min(ratios) - 1e-6 <= score.low < score.value < score.high <= max(ratios) + 1e-6
    assert (score.count, score.higher_is_better, score.unit) == (3, False, "bits per byte")
    assert score.details["bytes"] == sum(sizes) and score.details["context_tokens"] == context


def test_every_token_is_scored_with_the_context_its_window_gives(tmp_path: Path, tokenizer: Tokenizer, data: Path) -> None:
    """A model that looks back: each token's probability is that after all tokens of the first window that holds it."""
    shape = DecoderShape(tokenizer.vocab_size, 64, 96, 2, 2, max_position_embeddings=40, initializer_range=0.5)
    module = Decoder(shape)
    initialize(module, 0)
    save_model(module, tmp_path / "m")
    tokenizer.save(tmp_path / "m")
    score = bits_per_byte.run(open_subject("m", tmp_path / "m", False, 24), data, 1, nothing)
    text = texts_of(data)[0]
    ids = [0, *tokenizer.encode(text)]
    total = 0.0
    with torch.no_grad():
        for at in range(1, len(ids)):
            begin = 0 if at < 24 else 12 * ((at - 24) // 12 + 1)
            total -= float(logits(module, ids[begin:at])[-1].log_softmax(-1)[ids[at]])
    assert score.details["context_tokens"] == 24 and len(ids) > 60
    assert score.value == pytest.approx(total / math.log(2) / len(text.encode()), rel=1e-5)


def test_compressors_get_exactly_the_scored_bytes(tmp_path: Path, tokenizer: Tokenizer, data: Path) -> None:
    subject = open_subject("m", write_bigram(tmp_path / "m", tokenizer, random_table(tokenizer, 0)), False)
    details = bits_per_byte.run(subject, data, None, nothing).details
    texts = [text.encode() for text in texts_of(data)]
    total = sum(map(len, texts))
    assert details["xz"] * total / 8 == pytest.approx(len(lzma.compress(b"".join(texts), preset=9)))
    assert lzma.decompress(lzma.compress(b"".join(texts), preset=9)) == b"".join(texts)
    assert details["gzip"] * total / 8 == pytest.approx(len(gzip.compress(b"".join(texts), 9)))
    assert details["gzip_each"] * total / 8 == pytest.approx(sum(len(gzip.compress(text, 9)) for text in texts))
    one = bits_per_byte.run(subject, data, 1, nothing)
    assert one.count == 1 and one.details["bytes"] == len(texts[0])


def test_a_tokenizer_that_loses_text_is_refused(tokenizer: Tokenizer) -> None:
    class Lossy(Tokenizer):
        def encode(self, text: str) -> list[int]:
            return super().encode(text.lower())

    assert bits_per_byte.encode(tokenizer, "Abc")[0] == 0
    with pytest.raises(ModelError, match="does not give back the held-out text"):
        bits_per_byte.encode(Lossy(tokenizer.inner, 0, 1, 2), "Abc")


def greedy(table: np.ndarray, prompt: list[int], count: int) -> list[int]:
    out = []
    token = prompt[-1]
    for _ in range(count):
        token = int(np.argmax(table[token]))
        if token == 1:
            break
        out.append(token)
    return out


def test_identifiers_of_a_bigram_model(tmp_path: Path, tokenizer: Tokenizer, data: Path, source: str) -> None:
    """The table goes on as the first document does wherever a token has one successor there; each place is checked by hand."""
    ids = [0, *tokenizer.encode(source), 1]
    table = follow(tokenizer, ids)
    subject = open_subject("m", write_bigram(tmp_path / "m", tokenizer, table, 64), False)
    score = identifiers.run(subject, data, None, nothing)
    rows = texts_of(data)[:2]
    keywords = {"def", "return", "class", "in", "or"}
    right = count = 0
    for text in rows:
        code = re.sub(r'""".*?"""|\'.*?\'', lambda found: "\0" * len(found[0]), text)
        coded = tokenizer.encode(text)
        pieces = [tokenizer.decode([index]) for index in coded]
        for found in re.finditer(r"[^\W\d]\w*", code):
            if found[0] in keywords:
                continue
            count += 1
            done, index = 0, 0
            while done + len(pieces[index].encode()) <= len(text[:found.start()].encode()):
                done += len(pieces[index].encode())
                index += 1
            expected = text.encode()[done:].decode()[:len(text[:found.end()].encode()[done:].decode())]
            answer = tokenizer.decode(greedy(table, [0, *coded[:index]], identifiers.NEW_TOKENS))
            right += bool(re.match(re.escape(expected) + r"(?!\w)", answer))
    assert count == score.count and 0 < right < count
    assert score.value == right / count
    assert score.details["without_a_sign"]["count"] < count
    assert identifiers.run(subject, data, 7, nothing).count == 7


def test_an_answer_cut_short_is_not_right() -> None:
    assert identifiers.right("width", "length", "width") == 0.0
    assert identifiers.right("width", "stop", "width") == 1.0
    assert identifiers.right("width ", "length", "width") == 1.0
    assert identifiers.right("widt", "stop", "width") == 0.0
    assert identifiers.right("widths", "stop", "width") == 0.0


def test_the_same_places_for_every_model() -> None:
    texts = [f"alpha_{i} = beta({i}, gamma)\nif alpha_{i}:\n    delta.epsilon\n" for i in range(30)]
    ids = [str(i) for i in range(30)]
    places = identifiers.choose(ids, texts, 50)
    assert len(places) == len(set(places)) == 50
    assert all(texts[p.document].startswith(p.identifier, p.offset) for p in places)
    fewer = identifiers.choose(ids, texts, 20)
    assert set(fewer) <= set(places)
    reordered = identifiers.choose(ids[::-1], texts[::-1], 20)
    assert {(29 - p.document, p.offset) for p in reordered} == {(p.document, p.offset) for p in fewer}


def test_identifiers_are_names_that_are_no_keywords() -> None:
    text = "import os\nfor caf\u00e9 in 'text name':  # remark\n    x = caf\u00e9 if None else self._y\n"
    found = list(identifiers.identifiers(text))
    assert [name for _, name in found] == ["os", "caf\u00e9", "x", "caf\u00e9", "self", "_y"]
    assert all(text.startswith(name, offset) for offset, name in found)
    assert list(identifiers.identifiers("x = '''unfinished")) == [] and list(identifiers.identifiers("a\n  b\n c\n")) == []


def test_the_cut_keeps_whole_tokens(tokenizer: Tokenizer) -> None:
    text = "caf\u00e9 = 'na\u00efve \u4e2d\u6587'\nself.width = area\n"
    ids, ends = identifiers.encode(tokenizer, text)
    for offset in range(len(text)):
        prompt, pending = identifiers.cut(ids, ends, text, offset)
        assert tokenizer.decode(prompt) + pending == text[:offset]
        assert prompt == ids[:len(prompt)]


def ids_between(tokenizer: Tokenizer, text: str, after: str) -> list[int]:
    """Tokens of `text`, the first of which is the last token of `after` in its place."""
    before, whole = tokenizer.encode(after), tokenizer.encode(after + text)
    assert whole[:len(before)] == before
    return whole[len(before) - 1:]


def ask(tmp_path: Path, tokenizer: Tokenizer, data: Path, table: np.ndarray, is_chat: bool, context: int = 256) -> Any:
    folder = write_bigram(tmp_path / f"m{len(list(tmp_path.iterdir()))}", tokenizer, table, context)
    return python_parses.run(open_subject("m", folder, is_chat), data, None, nothing)


@pytest.mark.parametrize(("answer", "value", "reason"), [
    ("x", 1.0, "compiles in place"), ("pass", 0.0, "does nothing"), ("", 0.0, "empty"), ("(", 0.0, "SyntaxError")])
def test_bodies_of_a_chat_model(tmp_path: Path, tokenizer: Tokenizer, data: Path, answer: str, value: float, reason: str) -> None:
    assistant = tokenizer.special_ids["<|assistant|>"]
    score = ask(tmp_path, tokenizer, data, follow(tokenizer, [assistant, *tokenizer.encode(answer), 1]), True)
    assert (score.value, score.count) == (value, 2)
    assert list(score.details["reasons"]) == [reason] and score.details["ended"]["stop"] == 2
    assert score.details["asked"] == "chat template"


@pytest.mark.parametrize(("answer", "value", "ended"), [
    ("\n    x\n", 0.0, "stop"),  # right for a function at the margin, a dedent for the method
    ("\n        x\n\nz = 1", 1.0, "cancelled"), ("\n        x", 1.0, "stop"), ("; x", 0.0, "stop")])
def test_bodies_of_a_model_that_goes_on_with_the_text(tmp_path: Path, tokenizer: Tokenizer, data: Path, answer: str,
                                                      value: float, ended: str) -> None:
    rows = [json.loads(line) for line in (data / "functions.jsonl").read_text().splitlines()]
    method = rows[1]
    assert method["indent"] == " " * 8
    (data / "functions.jsonl").write_text(json.dumps(method) + "\n")
    chain = ids_between(tokenizer, answer, method["before"].rstrip())
    last = chain[-1] if ended == "cancelled" else tokenizer.eos_id  # goes on for ever, unless it is stopped
    score = ask(tmp_path, tokenizer, data, follow(tokenizer, [*chain, last]), False)
    assert (score.value, score.count) == (value, 1), score.details
    assert score.details["ended"][ended] == 1, score.details


def test_an_answer_ends_at_each_end_that_the_model_names(tmp_path: Path, tokenizer: Tokenizer, data: Path) -> None:
    assistant, turn = (tokenizer.special_ids[name] for name in ("<|assistant|>", "<|user|>"))
    table = follow(tokenizer, [assistant, *tokenizer.encode("x"), turn, turn])
    folder = write_bigram(tmp_path / "m", tokenizer, table, 256)
    assert python_parses.run(open_subject("m", folder, True), data, None, nothing).details["ended"]["stop"] == 0
    for ends in (turn, [tokenizer.eos_id, turn]):
        (folder / "generation_config.json").write_text(json.dumps({"eos_token_id": ends}))
        assert Tokenizer.load(folder).end_ids == (tokenizer.eos_id, turn)
        score = python_parses.run(open_subject("m", folder, True), data, None, nothing)
        assert score.value == 1.0 and score.details["ended"]["stop"] == 2, score.details


def test_an_endless_answer_ends_at_its_last_whole_line(tmp_path: Path, tokenizer: Tokenizer, data: Path) -> None:
    assistant = tokenizer.special_ids["<|assistant|>"]
    loop = tokenizer.encode("x\n")
    score = ask(tmp_path, tokenizer, data, follow(tokenizer, [assistant, *loop, loop[0]]), True)
    assert score.value == 1.0 and score.details["ended"] == {"stop": 0, "cancelled": 0, "length": 2}
    assert score.details["examples"][0]["body"] == "\n".join(["x"] * (python_parses.NEW_TOKENS // 2))
    endless = follow(tokenizer, [assistant, *tokenizer.encode("x"), *tokenizer.encode("x")])
    assert ask(tmp_path, tokenizer, data, endless, True).details["reasons"] == {"empty": 2}, "a line that never ends"


def test_a_prompt_that_does_not_fit_counts_as_wrong(tmp_path: Path, tokenizer: Tokenizer, data: Path) -> None:
    assistant = tokenizer.special_ids["<|assistant|>"]
    table = follow(tokenizer, [assistant, *tokenizer.encode("x"), 1])
    lengths = sorted(len(prompt) for prompt in python_parses.make_prompts(
        Subject("m", write_bigram(tmp_path / "t", tokenizer, table), True, 0, None, tokenizer),  # type: ignore[arg-type]
        [json.loads(line) for line in (data / "functions.jsonl").read_text().splitlines()]))
    assert lengths[0] < lengths[1]
    score = ask(tmp_path, tokenizer, data, table, True, context=lengths[0] + python_parses.LEAST_NEW_TOKENS)
    assert (score.value, score.count) == (0.5, 2)
    assert score.details["reasons"] == {"compiles in place": 1, "prompt does not fit": 1}


@pytest.mark.parametrize(("text", "reason", "body"), [
    ("\n    a\n    b\n\nc", "cancelled", "a\nb"), ("\n    a\n      b\n    c", "stop", "a\n  b\nc"), ("\n\n    a\n", "stop", "a"),
    ("\n    a\n    b", "length", "a"), ("  \n    a\n\n", "stop", "a"), (" # a\n    b\n", "stop", ""), ("\nc", "cancelled", ""),
    ("", "stop", ""), ("\n    a\n   b\n    c\n", "length", "a"), ("\n    a\n# c\n    b", "stop", "a"),
    ("\n    a (\n  b", "stop", "a (")])
def test_the_stop_rule_for_text(text: str, reason: str, body: str) -> None:
    assert python_parses.body(text, reason, "    ", False) == body


def test_the_margin_of_a_chat_answer_is_the_answers_own() -> None:
    assert python_parses.body("    a\n    b \n\n", "stop", "    ", True) == "    a\n    b"


def test_missing_and_empty_data_are_one_sentence(tmp_path: Path, tokenizer: Tokenizer) -> None:
    subject = Subject("m", tmp_path, False, 64, None, tokenizer)  # type: ignore[arg-type]
    with pytest.raises(UserError, match=r"evaluation\.jsonl does not exist"):
        bits_per_byte.run(subject, tmp_path, None, nothing)
    (tmp_path / "functions.jsonl").write_text("")
    with pytest.raises(UserError, match=r"functions\.jsonl is empty"):
        python_parses.run(subject, tmp_path, None, nothing)
    (tmp_path / "evaluation.jsonl").write_text(json.dumps({"doc_id": "a", "uri": "a.txt", "text": "x = 1"}) + "\n")
    with pytest.raises(UserError, match="no Python file with an identifier"):
        identifiers.run(subject, tmp_path, None, nothing)


@pytest.mark.parametrize(("row", "words"), [
    ({"doc_id": "a", "uri": "a.py"}, "'text' of row 1 must be text"), ({"text": 3}, "'text' of row 1"),
    ({"text": "\ud800"}, "'text' of row 1"), ({"text": ""}, "no byte of text")])
def test_rows_without_text_are_one_sentence(tmp_path: Path, tokenizer: Tokenizer, row: dict[str, Any], words: str) -> None:
    (tmp_path / "evaluation.jsonl").write_text(json.dumps(row) + "\n")
    subject = Subject("m", tmp_path, False, 64, None, tokenizer)  # type: ignore[arg-type]
    with pytest.raises(UserError, match=words):
        bits_per_byte.run(subject, tmp_path, None, nothing)


def test_an_empty_document_does_not_spoil_the_interval_and_nan_is_refused(tmp_path: Path, tokenizer: Tokenizer) -> None:
    write_bigram(tmp_path / "model", tokenizer, normalised(np.ones((tokenizer.vocab_size, tokenizer.vocab_size))), 64)
    rows = [{"text": ""}, {"text": "x = 1"}]
    (tmp_path / "evaluation.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    subject = open_subject("m", tmp_path / "model", is_chat=False)
    score = bits_per_byte.run(subject, tmp_path, None, nothing)
    assert score.count == 1 and score.low == pytest.approx(score.value) == score.high
    next(subject.engine.model.parameters()).fill_(math.nan)
    with pytest.raises(ModelError, match="NaN"):
        bits_per_byte.run(subject, tmp_path, None, nothing)
