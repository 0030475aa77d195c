"""Drops documents too short to teach anything, such as empty package files."""

from __future__ import annotations

from athanor.data.documents import Decision, Document

THRESHOLD = 100.0  # characters without the white space around them


def judge(document: Document) -> Decision:
    characters = float(len(document.text.strip()))
    return Decision(characters >= THRESHOLD, characters, THRESHOLD, "too short")
