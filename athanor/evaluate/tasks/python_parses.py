"""The share of held-out functions for which the model writes a body that compiles in place.

One greedy answer per function with a docstring. A chat model is asked with signature and docstring, as in fine-tuning;
another one goes on with the file's text behind the docstring. The stop rule is the same for all and fixed: the body
ends at eos, at the first line indented less than the body, or after NEW_TOKENS; in the last case its last, unfinished line
is left out. Every function counts; one whose prompt does not fit counts as wrong. A body that is empty or only pass, an
ellipsis or a constant (a docstring) counts as wrong.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from athanor.evaluate.scorers import python_parses
from athanor.evaluate.scores import Score, share
from athanor.evaluate.subject import Progress, Subject, generate, held_out, spread

NEW_TOKENS = 96
LEAST_NEW_TOKENS = 16  # a prompt that leaves less room does not fit


def check(data: Path) -> None:
    """Refuse data that hold no function to ask for, before a model is trained."""
    held_out(data, "functions.jsonl")


def run(subject: Subject, data: Path, limit: int | None, progress: Progress) -> Score:
    """Ask for every function of functions.jsonl (or `limit` of them, evenly spaced)."""
    functions = list(spread(held_out(data, "functions.jsonl", "name", "prompt", "before", "indent", "after"), limit))
    prompts = make_prompts(subject, functions)
    room = [min(NEW_TOKENS, subject.context_tokens - len(prompt)) for prompt in prompts]
    fitting = [index for index, space in enumerate(room) if space >= LEAST_NEW_TOKENS]

    def is_over(index: int, text: str) -> bool:
        return not subject.is_chat and _dedent_at(text, functions[fitting[index]]["indent"]) is not None

    answers = generate(subject, [prompts[index] for index in fitting], [room[index] for index in fitting], progress, is_over)
    bodies = [body(text, reason, functions[index]["indent"], subject.is_chat)
              for index, (text, reason) in zip(fitting, answers, strict=True)]
    results = [(0.0, "prompt does not fit")] * len(functions)
    for index, result in zip(fitting, python_parses.score_all(bodies, [functions[i] for i in fitting]), strict=True):
        results[index] = result
    return share([value for value, _ in results], {
        "asked": "chat template" if subject.is_chat else "plain text", "new_tokens": NEW_TOKENS, "temperature": 0.0,
        "interval": "95 % Wilson", "reasons": python_parses.reasons(results),
        "ended": {reason: sum(r == reason for _, r in answers) for reason in ("stop", "cancelled", "length")},
        "examples": [{"function": functions[index]["name"], "body": text, "verdict": results[index][1]}
                     for index, text in list(zip(fitting, bodies, strict=True))[:5]]},
        [(function["before"], function["prompt"]) for function in functions])


def make_prompts(subject: Subject, functions: list[dict[str, Any]]) -> list[list[int]]:
    """Token prompts: the question in the chat template, or as much of the file before the body as leaves NEW_TOKENS."""
    if subject.is_chat:
        template = subject.chat()
        return [template.render([{"role": "user", "content": function["prompt"]}], add_generation_prompt=True)
                for function in functions]
    keep = max(1, subject.context_tokens - NEW_TOKENS)
    files = subject.tokenizer.encode_batch([function["before"].rstrip() for function in functions])
    return [[subject.tokenizer.bos_id, *ids][-keep:] for ids in files]


def body(text: str, finish_reason: str, indent: str, is_chat: bool) -> str:
    """The body in an answer, its statements at the margin; empty when there is none.

    Text that goes on with a file begins behind the docstring: nothing more may stand on that line.
    """
    end = None if is_chat else _dedent_at(text, indent)
    if end is not None:
        text = text[:end]
    elif finish_reason == "length":
        text = text[:text.rfind("\n") + 1]
    if is_chat:
        return text.rstrip()
    first_line, _, rest = text.partition("\n")
    if first_line.strip():
        return ""
    return "\n".join(line.removeprefix(indent) for line in rest.split("\n")).strip("\n").rstrip()


def _dedent_at(text: str, indent: str) -> int | None:
    """Where the first line begins that is indented less than `indent`; None when there is none yet."""
    offset = text.find("\n") + 1
    if not offset:
        return None
    for line in text[offset:].split("\n"):
        if line.strip() and not line.startswith(indent):  # a line of spaces only may still grow, an empty one ends nothing
            return offset
        offset += len(line) + 1
    return None
