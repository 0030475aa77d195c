"""Drops source files that are mostly tables of literals: code pages, entity lists, recorded configuration."""

from __future__ import annotations

import re

from athanor.data.documents import Decision, Document

THRESHOLD = 0.5  # share of characters in lines that hold nothing but literals and brackets
LITERAL = (r"(?:0[xX][0-9a-fA-F]++|\d[\w.]*+|[rubRUB]{0,2}'(?:[^'\\\n]|\\.)*+'|[rubRUB]{0,2}\"(?:[^\"\\\n]|\\.)*+\""
           r"|None|True|False|null|true|false)")
LINE = re.compile(rf"^[ \t]*+(?:(?:{LITERAL}|[,:()\[\]{{}}+\-])[ \t]*+)++(?:#[^\n]*+)?+$", re.MULTILINE)


def judge(document: Document) -> Decision:
    share = sum(map(len, LINE.findall(document.text))) / max(1, len(document.text)) if document.is_code else 0.0
    return Decision(share <= THRESHOLD, share, THRESHOLD, "table of data")
