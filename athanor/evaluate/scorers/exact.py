"""Right when the answer begins with the reference and does not go on with a letter, digit or underscore."""

from __future__ import annotations


def score(prompt: str, answer: str, reference: str) -> tuple[float, str]:
    """1.0 or 0.0, and why. An answer that ends with the reference is right: whoever cut it short must not pass it on."""
    if not answer.startswith(reference):
        return 0.0, f"expected {reference!r}, got {answer[:len(reference) + 8]!r}"
    rest = answer[len(reference):]
    if rest and (rest[0].isalnum() or rest[0] == "_"):
        return 0.0, f"{reference!r} goes on as {answer[:len(reference) + 8]!r}"
    return 1.0, "exact"
