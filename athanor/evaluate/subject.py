"""A model under test: its engine, its tokenizer, how it is asked, and answers for many prompts at once."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

from athanor.data.text.chat import ChatTemplate
from athanor.data.text.tokenizer import Tokenizer
from athanor.foundation.errors import UserError

if TYPE_CHECKING:
    from athanor.inference.engine import Engine, Request
    from athanor.inference.shared import Mesh

Item = TypeVar("Item")
Progress = Callable[[int, int], None]  # done, total
CONCURRENT = 64  # requests of full context that the cache is made for
CHECK_EVERY = 8  # tokens between looks at whether an answer is over


@dataclass
class Subject:
    """A model folder, opened. A chat model is asked through its template, another by plain text to go on with.

    `context_tokens` is the longest context that tasks use: the model's own, or a shorter one it was trained on.
    """

    name: str
    folder: Path
    is_chat: bool
    context_tokens: int
    engine: Engine
    tokenizer: Tokenizer

    def chat(self) -> ChatTemplate:
        return ChatTemplate.load(self.folder)


def open_subject(name: str, folder: Path, is_chat: bool, context_tokens: int | None = None, mesh: Mesh | None = None) -> Subject:
    """Load a Hugging Face folder for testing, this rank's part of it where a mesh is shared.

    Raises ModelError or DataError when a part of it is missing.
    """
    from athanor.inference.engine import context_tokens as longest_of
    from athanor.inference.engine import open_engine

    longest = longest_of(folder)
    context_tokens = min(longest, context_tokens or longest)
    if mesh is None:
        engine = open_engine(folder, cache_tokens=CONCURRENT * context_tokens)
    else:
        from athanor.inference.shared import open_shared_engine

        engine = open_shared_engine(folder, CONCURRENT * context_tokens, mesh)
    return Subject(name, folder, is_chat, context_tokens, engine, Tokenizer.load(folder))


def generate(subject: Subject, prompts: Sequence[list[int]], max_new_tokens: Sequence[int], progress: Progress,
             is_over: Callable[[int, str], bool] = lambda index, text: False,
             **sampling: float) -> list[tuple[str, str]]:
    """Answers to token prompts: (text, finish reason: stop, length or cancelled), in their order.

    Generation ends at one of the tokenizer's ends, after `max_new_tokens[i]`, or soon after `is_over(i, text so far)`. It is
    greedy unless `sampling` has a temperature (top_p, top_k); answer i draws with seed i.
    """
    from athanor.inference.engine import Sampling

    engine, tokenizer = subject.engine, subject.tokenizer
    requests: dict[int, Request] = {}
    for index, (prompt, limit) in enumerate(zip(prompts, max_new_tokens, strict=True)):
        chosen = Sampling(limit, seed=index, stop_token_ids=tokenizer.end_ids, **sampling)  # type: ignore[arg-type]
        requests[index] = engine.submit(prompt, chosen)
    answers: dict[int, tuple[str, str]] = {}
    seen = dict.fromkeys(requests, 0)
    while requests:
        engine.step()
        for index, request in list(requests.items()):
            length = len(request.token_ids)
            if request.finish_reason is None and length < seen[index] + CHECK_EVERY:
                continue
            seen[index] = length
            text = tokenizer.decode(request.token_ids)
            if request.finish_reason is None and is_over(index, text):
                engine.cancel(request)
                answers[index] = text, "cancelled"
            elif request.finish_reason is not None:
                answers[index] = text, str(request.finish_reason)
            else:
                continue
            del requests[index]
            progress(len(answers), len(prompts))
    return [answers[index] for index in range(len(prompts))]


def spread(items: Sequence[Item], count: int | None) -> Sequence[Item]:
    """So many of some items (all when None), evenly spaced, since neighbours come from the same place."""
    if count is None or count >= len(items):
        return items
    return [items[number * len(items) // count] for number in range(count)]


def held_out(data: Path, name: str, *keys: str) -> list[dict[str, Any]]:
    """The lines of a held-out file of a data folder. Raises UserError when it is missing, empty, or lacks texts at `keys`."""
    from athanor.foundation.run_folder import read_jsonl

    path = data / name
    if not path.is_file():
        raise UserError(f"{path} does not exist; {data} is not a data folder, or `athanor data build` has not finished it")
    rows = read_jsonl(path)
    if not rows:
        rest = ("leave out tasks that ask for Python functions, if the text has none" if name == "functions.jsonl" else
                "give more documents: whole ones are held out, and a file of text is one")
        raise UserError(f"{path} is empty, so there is nothing to score; raise data.evaluation_share, or {rest}")
    for number, row in enumerate(rows, 1):
        for key in keys:
            if not isinstance(row.get(key), str) or any("\ud800" <= sign <= "\udfff" for sign in row[key]):
                raise UserError(f"{path}: '{key}' of row {number} must be text; `athanor data build` writes such files")
    return rows
