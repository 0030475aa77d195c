"""`athanor chat`: talk to a model in the terminal."""

from __future__ import annotations

import contextlib
import json
import secrets
import signal
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import click

from athanor.cli.counts import POSITIVE
from athanor.foundation.errors import UserError
from athanor.foundation.progress import say

if TYPE_CHECKING:
    from athanor.data.text.chat import ChatTemplate
    from athanor.inference.engine import Engine

HELP = "/reset forgets the conversation, /system TEXT sets the system message, /quit (or Ctrl-D) ends; Ctrl-C stops an answer"


@click.command()
@click.argument("model")
@click.option("--once", metavar="QUESTION", help="ask one question, print the answer and end")
@click.option("--system", metavar="TEXT", help="system message to begin with")
@click.option("--temperature", type=click.FloatRange(0, 2), default=0.7, show_default=True,
              help="0 always takes the likeliest token")
@click.option("--max-tokens", type=POSITIVE, help="longest answer; what the context leaves when not given")
@click.option("--seed", type=click.IntRange(min=0), help="seed of the sampling; a new one for each answer when not given")
@click.option("--json", "as_json", is_flag=True, help="print one JSON document to standard output, at the end")
def command(model: str, once: str | None, system: str | None, temperature: float, max_tokens: int | None, seed: int | None,
            as_json: bool) -> None:
    """Talk to MODEL (a model or run folder, a recipe, or a name in the registry), in the terminal or from a pipe."""
    from athanor.data.text.chat import ChatTemplate
    from athanor.inference.engine import context_tokens, open_engine
    from athanor.serve.server import DEFAULT_CACHE_TOKENS
    from athanor.serve.target import find_target

    target = find_target(model)
    template = ChatTemplate.load(target.folder)
    engine = open_engine(target.folder, cache_tokens=DEFAULT_CACHE_TOKENS)
    chat = Conversation(engine, template, context_tokens(target.folder), temperature, max_tokens, seed)
    chat.reset(system)
    write = (lambda text: None) if as_json else _write
    if once is not None:
        with _interrupts() as interrupts:
            figures = chat.ask(once, write, interrupts)
        if figures["finish_reason"] == "cancelled":
            raise KeyboardInterrupt
        if as_json:
            answer = chat.messages[-1]["content"]
            click.echo(json.dumps({"model": target.reference, "answer": answer, **figures}, ensure_ascii=False))
        else:
            click.echo()
        return
    say(f"{target.reference}; /help lists the commands")
    turns = _talk(chat, write)
    if as_json:
        click.echo(json.dumps({"model": target.reference, "messages": chat.messages, "turns": turns}, ensure_ascii=False))


@dataclass
class Conversation:
    """The messages so far and what answers them."""

    engine: Engine
    template: ChatTemplate
    context_tokens: int
    temperature: float
    max_tokens: int | None
    seed: int | None
    messages: list[dict[str, str]] = field(default_factory=list)

    def reset(self, system: str | None) -> None:
        self.messages = [{"role": "system", "content": system}] if system else []

    def ask(self, question: str, write: Callable[[str], None], interrupts: list[int]) -> dict[str, Any]:
        """Add a question and its answer, which goes to `write` piece by piece. Returns usage, finish_reason and rate.

        The answer ends early when something comes to stand in `interrupts`.
        Raises UserError when the conversation does not fit the context; the question is then taken back.
        """
        from athanor.inference.engine import Sampling
        from athanor.serve.text import AnswerText

        text_only = question.encode(errors="surrogateescape").decode(errors="replace")  # bytes that were no UTF-8
        asked = [*self.messages, {"role": "user", "content": text_only}]
        ids = self.template.render(asked, add_generation_prompt=True)
        room = self.context_tokens - len(ids)
        if room < (self.max_tokens or 1):
            raise UserError(f"the conversation is {len(ids)} tokens and the answer needs {self.max_tokens or 'at least 1'}, but "
                            f"the model's context is {self.context_tokens}; start anew with /reset, or ask for less")
        stop = self.template.tokenizer.end_ids
        text = AnswerText(self.template.tokenizer, [], stop, wants_tokens=False)
        pieces: list[str] = []

        def give(piece: str) -> None:
            pieces.append(piece)
            write(piece)

        begin = time.perf_counter()
        seed = secrets.randbits(62) if self.seed is None else self.seed
        sampling = Sampling(max_new_tokens=self.max_tokens or room, temperature=self.temperature, seed=seed, stop_token_ids=stop)
        request = self.engine.submit(ids, sampling, lambda token_id, logprob: give(text.push(token_id, logprob).text))
        while request.finish_reason is None:
            self.engine.step()
            if interrupts:
                self.engine.cancel(request)
        give(text.finish().text)
        self.messages = [*asked, {"role": "assistant", "content": "".join(pieces)}]
        seconds = time.perf_counter() - begin
        usage = {"prompt_tokens": len(ids), "completion_tokens": text.completion_tokens}
        return {"finish_reason": request.finish_reason, "usage": usage, "seconds": seconds,
                "tokens_per_second": text.completion_tokens / seconds}


@contextlib.contextmanager
def _interrupts() -> Iterator[list[int]]:
    """Collect Ctrl-C instead of raising it, so that the engine is never left in the middle of a step."""
    caught: list[int] = []
    before = signal.signal(signal.SIGINT, lambda number, frame: caught.append(number))
    try:
        yield caught
    finally:
        signal.signal(signal.SIGINT, before)


def _talk(chat: Conversation, write: Callable[[str], None]) -> list[dict[str, Any]]:
    """Read lines until /quit or the end of input, and answer them. Returns the figures of every answer."""
    turns = []
    is_terminal = sys.stdin.isatty()
    while (line := _read_line(is_terminal)) is not None:
        word, _, rest = line.strip().partition(" ")
        if word == "/quit":
            break
        if word == "/help":
            say(HELP)
        elif word == "/reset":
            chat.reset(chat.messages[0]["content"] if chat.messages and chat.messages[0]["role"] == "system" else None)
            say("forgotten")
        elif word == "/system":
            chat.reset(rest.strip())
            say("a new conversation, with this system message" if rest.strip() else "a new conversation, without system message")
        elif word.startswith("/") and " " not in word[1:] and word[1:].isalpha():
            say(f"there is no {word}; {HELP}")
        elif word:
            turns += _answer(chat, line.strip(), write, is_terminal)
    return turns


def _answer(chat: Conversation, question: str, write: Callable[[str], None], is_terminal: bool) -> list[dict[str, Any]]:
    try:
        with _interrupts() as interrupts:
            figures = chat.ask(question, write, interrupts)
    except UserError as error:
        if not is_terminal:
            raise
        say(str(error))
        return []
    write("\n")
    if figures["finish_reason"] == "cancelled" and not is_terminal:
        raise KeyboardInterrupt
    if is_terminal:
        say(f"[{figures['usage']['completion_tokens']} tokens, {figures['tokens_per_second']:.0f} per second]")
    return [figures]


def _read_line(is_terminal: bool) -> str | None:
    if not is_terminal:
        return sys.stdin.readline() or None
    try:
        return input("\n> ")
    except EOFError:
        return None
    except KeyboardInterrupt:
        say("\n/quit or Ctrl-D ends")
        return ""


def _write(text: str) -> None:
    sys.stdout.write(text)
    sys.stdout.flush()
