"""Drops minified code and encoded blobs, which show as lines without end; prose may have a paragraph in a line."""

from __future__ import annotations

from athanor.data.documents import Decision, Document

MEAN_CHARACTERS = {True: 150.0, False: 20_000.0}  # of code, of other text: mean length of a line, weighted by length


def judge(document: Document) -> Decision:
    lengths = [len(line) for line in document.text.split("\n")]
    mean = sum(length * length for length in lengths) / max(1, sum(lengths))
    threshold = MEAN_CHARACTERS[document.is_code]
    return Decision(mean <= threshold, mean, threshold, "lines too long")
