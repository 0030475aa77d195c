"""A model as lm-evaluation-harness asks it: its `LM` interface, answered by our engine.

Texts become tokens, and too long ones are cut on the left, as in the harness's own `hf` model, so that results are equal.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import Any

from lm_eval import utils
from lm_eval.api.instance import Instance
from lm_eval.api.model import TemplateLM
from lm_eval.models.utils import handle_stop_sequences, normalize_gen_kwargs, postprocess_generated_text

from athanor.evaluate.subject import Progress, Subject, generate
from athanor.foundation.errors import UserError

NEW_TOKENS = 256  # unless a task says otherwise, as in the harness
PER_CALL = 256  # sequences scored between two reports of progress
Tokens = list[int]


class EngineModel(TemplateLM):
    """A subject that answers the harness. A chat model gets its template, without special tokens of the tokenizer's own.

    `cut_contexts` counts contexts that lost their beginning, and `new_tokens` is the longest answer allowed so far: a task
    that asks for more than half the context gets half of it.
    """

    def __init__(self, subject: Subject, progress: Progress) -> None:
        super().__init__()
        self.subject, self.progress = subject, progress
        self.template = subject.chat() if subject.is_chat else None
        self.cut_contexts = self.new_tokens = 0

    @property
    def eot_token_id(self) -> int:
        return self.subject.tokenizer.eos_id

    @property
    def prefix_token_id(self) -> int:
        """What stands before a text without a context: bos where there is one, never eos in its place."""
        return self.subject.tokenizer.bos_id

    @property
    def tokenizer_name(self) -> str:
        return "" if self.template is None else self.template.hash

    def apply_chat_template(self, chat_history: list[dict[str, str]], add_generation_prompt: bool = True) -> str:
        assert self.template is not None, "only a chat model is asked through its template"
        return self.template.text(chat_history, add_generation_prompt)

    def tok_encode(self, string: str, add_special_tokens: bool | None = None, **kwargs: Any) -> Tokens:
        """Token ids; the tokenizer's own special tokens are around them unless `add_special_tokens` is False."""
        if self.template is not None:
            return self.template.encode(string)
        ids: Tokens = self.subject.tokenizer.inner.encode(string, add_special_tokens=add_special_tokens is not False).ids
        return ids

    def loglikelihood(self, requests: list[Instance], disable_tqdm: bool = True) -> list[tuple[float, bool]]:
        """(log-probability, whether it is the greedy answer) of each request's continuation after its context."""
        for request in requests:
            if not request.args[1]:
                raise UserError(f"task '{request.task_name}' asks for the probability of an empty text")
        found: list[tuple[float, bool]] = super().loglikelihood(requests, disable_tqdm=True)
        return found

    def _loglikelihood_tokens(self, requests: Sequence[tuple[Any, Tokens, Tokens]], **kwargs: Any) -> list[tuple[float, bool]]:
        longest = self.subject.context_tokens
        sequences, counts = [], []
        for _, context, continuation in requests:
            if len(continuation) > longest:
                raise UserError(f"an answer to be scored has {len(continuation)} tokens, and the context only {longest}")
            sequences.append([*context, *continuation][-longest - 1:])
            counts.append(len(continuation))
            self.cut_contexts += len(sequences[-1]) < len(context) + len(continuation)
        found = [(0.0, True)] * len(requests)
        order = sorted(range(len(requests)), key=lambda i: len(sequences[i]), reverse=True)
        for start in range(0, len(order), PER_CALL):
            part = order[start:start + PER_CALL]
            scored = self.subject.engine.score_ends([sequences[i] for i in part], [counts[i] for i in part])
            for i, result in zip(part, scored, strict=True):
                found[i] = result
            self.progress(start + len(part), len(order))
        return found

    def loglikelihood_rolling(self, requests: list[Instance], disable_tqdm: bool = True) -> list[float]:
        """Log-probability of each whole text, in windows of the context without overlap but for the last."""
        windows: list[tuple[None, Tokens, Tokens]] = []
        owners: list[int] = []
        for number, request in enumerate(requests):
            for pair in utils.get_rolling_token_windows(self.tok_encode(request.args[0]), self.prefix_token_id,
                                                        self.subject.context_tokens, context_len=1):
                windows.append((None, *utils.make_disjoint_window(pair)))
                owners.append(number)
        totals = [0.0] * len(requests)
        for number, (logp, _) in zip(owners, self._loglikelihood_tokens(windows), strict=True):
            totals[number] += logp
        return totals

    def generate_until(self, requests: list[Instance], disable_tqdm: bool = True) -> list[str]:
        """Answers that end at eos, before the first of a request's stop texts, or when they are long enough."""
        alike: dict[str, list[int]] = {}
        for number, request in enumerate(requests):
            alike.setdefault(json.dumps(request.args[1], sort_keys=True), []).append(number)
        answers = [""] * len(requests)
        for numbers in alike.values():
            settings = normalize_gen_kwargs(requests[numbers[0]].args[1], NEW_TOKENS)
            texts = self._generate([requests[i].args[0] for i in numbers], dict(settings))
            for i, text in zip(numbers, texts, strict=True):
                answers[i] = text
        return answers

    def _generate(self, contexts: list[str], settings: dict[str, Any]) -> list[str]:
        tokenizer, longest = self.subject.tokenizer, self.subject.context_tokens
        until = handle_stop_sequences(settings["until"], tokenizer.decode([tokenizer.eos_id], skip_special_tokens=False))
        room = min(settings["max_gen_toks"], max(1, longest // 2))
        self.new_tokens = max(self.new_tokens, room)
        whole = [self.tok_encode(context) for context in contexts]
        prompts = [ids[-(longest - room):] for ids in whole]
        self.cut_contexts += sum(len(prompt) < len(ids) for prompt, ids in zip(prompts, whole, strict=True))
        sampling = {key: settings[key] for key in ("temperature", "top_p", "top_k") if key in settings}
        if settings["do_sample"]:
            sampling.setdefault("temperature", 1.0)
        answers = generate(self.subject, prompts, [room] * len(prompts), self.progress,
                           lambda index, text: any(term in text for term in until if term), **sampling)
        return [postprocess_generated_text(text, until, None) for text, _ in answers]
