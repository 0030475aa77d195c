"""Drops text that is full of control characters or of characters that a broken conversion left."""

from __future__ import annotations

import re

from athanor.data.documents import Decision, Document

THRESHOLD = 0.001  # share of characters
ODD = re.compile("[\x00-\x08\x0e-\x1f\x7f\ufffd]")


def judge(document: Document) -> Decision:
    share = len(ODD.findall(document.text)) / max(1, len(document.text))
    return Decision(share <= THRESHOLD, share, THRESHOLD, "control characters")
