"""Right when a function's body compiles in the place of the original one, and does something."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any

from athanor.data.pairs import place
from athanor.foundation.sandbox import compile_sources

DOES_NOTHING = "does nothing: only pass, an ellipsis or a constant"
EMPTY = "empty"


def score(prompt: str, answer: str, reference: Mapping[str, Any]) -> tuple[float, str]:
    """1.0 or 0.0, and why. `answer` is a body with its statements at the margin; `reference` a line of functions.jsonl."""
    return score_all([answer], [reference])[0]


def score_all(answers: Sequence[str], references: Sequence[Mapping[str, Any]]) -> list[tuple[float, str]]:
    """Score many answers with one compiler in a sandbox; nothing is run."""
    sources, lines = [], []
    for answer, reference in zip(answers, references, strict=True):
        first = reference["before"].count("\n") + 1
        sources.append(place(reference["before"], reference["indent"], answer, reference["after"]))
        lines.append((first, first + answer.rstrip().count("\n")))
    results = []
    for answer, verdict in zip(answers, compile_sources(sources, lines), strict=True):
        if not answer.strip():
            results.append((0.0, EMPTY))
        elif verdict.error is not None:
            results.append((0.0, verdict.error))
        elif not verdict.statements:
            results.append((0.0, DOES_NOTHING))
        else:
            results.append((1.0, "compiles in place"))
    return results


def reasons(results: Sequence[tuple[float, str]]) -> dict[str, int]:
    """How often each kind of reason was given, the most frequent first (a compiler's by the name of its error)."""
    return dict(Counter(reason.split(":")[0] for _, reason in results).most_common())
