"""The one renderer of chat templates, for training, serving and evaluation: messages in, token ids out."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NoReturn

import jinja2
from jinja2.sandbox import ImmutableSandboxedEnvironment

from athanor.data.text.tokenizer import TEMPLATE, Tokenizer, train_tokenizer
from athanor.foundation.errors import DataError
from athanor.foundation.run_folder import hash_value, read_json

Message = Mapping[str, Any]


class ChatTemplate:
    """A template and its tokenizer. The text of a special token inside a message stays ordinary text."""

    def __init__(self, source: str, tokenizer: Tokenizer, where: str = "chat template") -> None:
        self.source, self.tokenizer, self.where = source, tokenizer, where
        self.hash = hash_value(source)
        environment = ImmutableSandboxedEnvironment(trim_blocks=True, lstrip_blocks=True,
                                                    extensions=["jinja2.ext.loopcontrols"])
        environment.globals["raise_exception"] = _raise_exception
        environment.filters["tojson"] = _to_json
        try:
            self._template = environment.from_string(source)
        except jinja2.TemplateError as error:
            raise DataError(f"{where} is not a template: {error}") from None
        names = {index: name for name, index in tokenizer.special_ids.items()}
        self._variables = {"bos_token": names.get(tokenizer.bos_id, ""), "eos_token": names.get(tokenizer.eos_id, "")}
        alternatives = "|".join(re.escape(name) for name in sorted(tokenizer.special_ids, key=len, reverse=True))
        self._special = re.compile(f"({alternatives})") if alternatives else re.compile("((?!))")

    @classmethod
    def load(cls, folder: Path) -> ChatTemplate:
        """Open a tokenizer folder with chat_template.jinja, or with a template in tokenizer_config.json."""
        source, where = _find_template(Path(folder))
        if source is None:
            raise DataError(f"{folder} has no chat template: neither chat_template.jinja nor one in tokenizer_config.json")
        return cls(source, Tokenizer.load(Path(folder)), where)

    @classmethod
    def to_come(cls, given: str | None) -> ChatTemplate:
        """The template that data will be built with: of the given tokenizer (a folder or its tokenizer.json), or our own."""
        if given is None:
            return cls(TEMPLATE.read_text(encoding="utf-8"), train_tokenizer(iter(()), 0), str(TEMPLATE.name))
        return cls.load(Path(given).parent if Path(given).name == "tokenizer.json" else Path(given))

    def render(self, messages: Sequence[Message], add_generation_prompt: bool = False) -> list[int]:
        """Token ids of a conversation, ready for an answer when `add_generation_prompt`."""
        guard, safe = self._guarded(messages)
        return self._encode(self._render(safe, add_generation_prompt), guard)

    def render_with_mask(self, messages: Sequence[Message]) -> tuple[list[int], list[int]]:
        """Token ids and a mask of the same length: 1 on what the assistant says and on the token that ends its turn.

        What the assistant says is whatever the template adds to the prompt it would be generated from.
        """
        guard, safe = self._guarded(messages)
        text = self._render(safe, False)
        ids: list[int] = []
        mask: list[int] = []
        done = 0
        for index, message in enumerate(safe):
            if message.get("role") != "assistant":
                continue
            prompt, whole = self._render(safe[:index], True), self._render(safe[:index + 1], False)
            if not (text.startswith(whole) and whole.startswith(prompt) and len(prompt) >= done):
                raise DataError(f"{self.where} changes earlier turns when later ones follow, so answers cannot be marked")
            before = self._encode(text[done:len(prompt)], guard)
            answer = self._encode(text[len(prompt):len(whole)], guard)
            eos = self.tokenizer.eos_id
            spoken = len(answer) - answer[::-1].index(eos) if eos in answer else len(answer)
            ids += before + answer
            mask += [0] * len(before) + [1] * spoken + [0] * (len(answer) - spoken)
            done = len(whole)
        rest = self._encode(text[done:], guard)
        return ids + rest, mask + [0] * len(rest)

    def text(self, messages: Sequence[Message], add_generation_prompt: bool = False) -> str:
        """A conversation as text, for whoever must have text; special tokens in it are told from others no more."""
        check_messages(messages, self.where)
        return self._render(messages, add_generation_prompt)

    def encode(self, text: str) -> list[int]:
        """Token ids of such text."""
        return self._encode(text, "")

    def _guarded(self, messages: Sequence[Message]) -> tuple[str, list[dict[str, Any]]]:
        """Break up special-token text in contents with a character that no message contains."""
        check_messages(messages, self.where)
        used = set().union(*(message["content"] for message in messages))
        guard = next((chr(point) for point in range(0xE000, 0x110000) if chr(point) not in used), None)
        if guard is None:
            raise DataError(f"{self.where}: the messages hold every character from U+E000 on; leave one out")
        return guard, [{**message, "content": self._special.sub(lambda found: found[0][0] + guard + found[0][1:],
                                                                message["content"])} for message in messages]

    def _render(self, messages: Sequence[Message], add_generation_prompt: bool) -> str:
        try:
            return self._template.render(messages=messages, add_generation_prompt=add_generation_prompt, **self._variables)
        except (jinja2.TemplateError, TypeError, ValueError) as error:
            raise DataError(f"{self.where} refuses these messages: {error}") from None

    def _encode(self, text: str, guard: str) -> list[int]:
        ids: list[int] = []
        for index, part in enumerate(self._special.split(text)):
            if index % 2:
                ids.append(self.tokenizer.special_ids[part])
            elif part:
                ids += self.tokenizer.encode(part.replace(guard, ""))
        return ids


def template_hash(folder: Path) -> str | None:
    """The hash of a tokenizer folder's chat template; None when it has none."""
    source, _ = _find_template(folder)
    return None if source is None else hash_value(source)


def check_messages(messages: Any, where: str) -> None:
    """Raise DataError unless `messages` is a list of {"role": text, "content": text}."""
    if not isinstance(messages, Sequence) or isinstance(messages, (str, bytes)) or not messages:
        raise DataError(f"{where}: messages must be a list of at least one message")
    for index, message in enumerate(messages):
        if not isinstance(message, Mapping):
            raise DataError(f"{where}: message {index} must be an object with role and content")
        for key in ("role", "content"):
            if not isinstance(message.get(key), str):
                raise DataError(f"{where}: '{key}' of message {index} must be text")
            if not message[key].isascii() and re.search("[\ud800-\udfff]", message[key]):
                raise DataError(f"{where}: '{key}' of message {index} has half a surrogate pair, which is no character")


def _find_template(folder: Path) -> tuple[str | None, str]:
    file, config = folder / "chat_template.jinja", folder / "tokenizer_config.json"
    if file.is_file():
        try:
            return file.read_text(encoding="utf-8"), str(file)
        except UnicodeDecodeError as error:
            raise DataError(f"{file} is not UTF-8: byte {error.start} cannot be read") from None
    content = read_json(config) if config.is_file() else None
    source = content.get("chat_template") if isinstance(content, dict) else None
    if isinstance(source, list):  # several named templates
        source = next((entry["template"] for entry in source if entry.get("name") == "default"), None)
    return source if isinstance(source, str) else None, str(config)


def _raise_exception(sentence: str) -> NoReturn:
    raise jinja2.TemplateError(sentence)


def _to_json(value: Any, indent: int | None = None) -> str:
    return json.dumps(value, ensure_ascii=False, indent=indent)
