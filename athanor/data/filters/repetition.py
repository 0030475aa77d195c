"""Drops text that says the same again and again (the duplicate-line rule of Rae et al. 2021, Gopher, looser for code)."""

from __future__ import annotations

from athanor.data.documents import Decision, Document

THRESHOLD = {True: 0.5, False: 0.3}  # of code, of other text: share of characters in lines that stood there before


def judge(document: Document) -> Decision:
    seen: set[str] = set()
    repeated = total = 0
    for line in document.text.split("\n"):
        stripped = line.strip()
        total += len(stripped)
        if stripped in seen:
            repeated += len(stripped)
        else:
            seen.add(stripped)
    share = repeated / max(1, total)
    return Decision(share <= THRESHOLD[document.is_code], share, THRESHOLD[document.is_code], "repeated lines")
