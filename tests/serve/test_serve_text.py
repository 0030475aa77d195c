"""Stop strings are found wherever token boundaries fall, and never shown; characters come out whole."""

from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tiny_model import texts

from athanor.data.text.tokenizer import Tokenizer, train_tokenizer
from athanor.serve.text import AnswerText

EOS = 1


@pytest.fixture(scope="module")
def tokenizer() -> Tokenizer:
    return train_tokenizer(texts(), 400)


def written(tokenizer: Tokenizer, ids: list[int], stop: list[str]) -> tuple[str, AnswerText, list[str]]:
    answer = AnswerText(tokenizer, stop, (EOS,), wants_tokens=True)
    pieces = []
    for number, token_id in enumerate(ids):
        pieces.append(answer.push(token_id, -float(number)))
        if answer.is_stopped:
            break
    pieces.append(answer.finish())
    for piece in pieces:
        assert all(stop not in piece.text for stop in stop)
    rows = [token for piece in pieces for token in piece.tokens]
    assert [row.logprob for row in rows] == [-float(number) for number in range(len(rows))]
    return "".join(piece.text for piece in pieces), answer, [row.text for row in rows]


@settings(max_examples=150, deadline=None)
@given(text=st.text("abé数\n ", max_size=40), stop=st.lists(st.text("abé数\n ", min_size=1, max_size=5), max_size=3))
def test_text_before_the_stop_that_completes_first(tokenizer: Tokenizer, text: str, stop: list[str]) -> None:
    ids = tokenizer.encode(text)
    found = [(text.find(s) + len(s), text.find(s)) for s in stop if s in text]
    got, answer, tokens = written(tokenizer, [*ids, EOS], stop)
    assert got == (text[:min(found)[1]] if found else text)
    assert answer.is_stopped == bool(found)
    if not found:
        assert answer.completion_tokens == len(ids) + 1 and len(tokens) == len(ids)


def test_half_a_character_is_not_shown(tokenizer: Tokenizer) -> None:
    table = tokenizer.token_bytes()
    ids = [table.index(bytes([byte])) for byte in "€".encode()]
    answer = AnswerText(tokenizer, [], (EOS,), wants_tokens=False)
    assert [answer.push(token_id, 0.0).text for token_id in ids] == ["", "", "€"]
    answer = AnswerText(tokenizer, [], (EOS,), wants_tokens=False)
    assert answer.push(ids[0], 0.0).text + answer.finish().text == "\ufffd"
