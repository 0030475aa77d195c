"""What a client may ask, checked: a body becomes a small value, or an error in OpenAI's shape that names the field."""

from __future__ import annotations

import json
from typing import Annotated, Any, Literal, TypeVar

import pydantic
from pydantic import AfterValidator, BaseModel, BeforeValidator, ConfigDict, Field

from athanor.foundation.errors import did_you_mean

MOST_CHOICES = 16
# Fields of OpenAI's API that change nothing here, whatever their value.
IGNORED = {"user", "metadata", "store", "service_tier", "prompt_cache_key", "safety_identifier", "parallel_tool_calls",
           "prompt_cache_retention", "verbosity"}
# Fields that this server cannot honour: only values that ask for nothing are accepted.
NEUTRAL: dict[str, tuple[Any, ...]] = {
    "presence_penalty": (0,), "frequency_penalty": (0,), "logit_bias": ({},), "tools": ([],), "functions": ([],),
    "tool_choice": ("none", "auto"), "function_call": ("none", "auto"), "response_format": ({"type": "text"},),
    "modalities": (["text"],), "best_of": (1,), "suffix": ("",), "audio": (), "prediction": (), "reasoning_effort": ("none",),
    "web_search_options": (), "moderation": (), "top_logprobs": (0,)}


class ApiError(Exception):
    """An answer that is an error: `status`, and the four fields of OpenAI's error object."""

    def __init__(self, status: int, message: str, param: str | None = None, code: str | None = None,
                 headers: dict[str, str] | None = None) -> None:
        self.status, self.param, self.code, self.headers = status, param, code, headers
        super().__init__(message if len(message) <= 600 else message[:599] + "…")

    def body(self) -> dict[str, Any]:
        kind = "server_error" if self.status >= 500 else "rate_limit_error" if self.status == 429 else "invalid_request_error"
        return {"error": {"message": str(self), "type": kind, "param": self.param, "code": self.code}}


def _texts(value: Any) -> list[str]:
    """A text, a list of texts, or nothing."""
    texts = [] if value is None else [value] if isinstance(value, str) else value
    if not (isinstance(texts, list) and len(texts) <= 4 and all(isinstance(text, str) and text for text in texts)):
        raise ValueError("must be a text or a list of at most 4 texts, none of them empty")
    return texts


def _content(value: Any) -> str:
    """A text, or OpenAI's list of text parts."""
    if isinstance(value, str):
        return value
    parts = value if isinstance(value, list) else [None]
    texts: list[Any] = [part.get("text") for part in parts if isinstance(part, dict) and part.get("type") == "text"]
    if len(texts) != len(parts) or not all(isinstance(text, str) for text in texts):
        raise ValueError('must be a text or a list of {"type": "text", "text": …}; this server reads text only')
    return "".join(texts)


def _role(value: str) -> str:
    if value not in ("system", "developer", "user", "assistant"):
        raise ValueError(f"is '{value}'; {did_you_mean(value, ['system', 'developer', 'user', 'assistant'])}")
    return "system" if value == "developer" else value


def _prompts(value: Any) -> list[str | list[int]]:
    """OpenAI's four forms of a prompt as a list of texts or of lists of token ids."""
    prompts = [value] if isinstance(value, str) or (isinstance(value, list) and value and _is_ids(value)) else value
    if not (isinstance(prompts, list) and prompts and (all(isinstance(p, str) for p in prompts)
                                                       or all(isinstance(p, list) and p and _is_ids(p) for p in prompts))):
        raise ValueError("must be a text, a list of texts, a list of token ids or a list of such lists, none of them empty")
    return prompts


def _is_ids(value: list[Any]) -> bool:
    return all(type(entry) is int and entry >= 0 for entry in value)


class StreamOptions(BaseModel):
    model_config = ConfigDict(strict=True, extra="ignore")
    include_usage: bool | None = None


class Asked(BaseModel):
    """What both ways of asking share."""

    model_config = ConfigDict(strict=True, extra="forbid", allow_inf_nan=False)
    model: str | None = None
    max_tokens: int | None = Field(None, ge=1)
    temperature: float | None = Field(None, ge=0, le=2)
    top_p: float | None = Field(None, gt=0, le=1)
    n: int | None = Field(None, ge=1, le=MOST_CHOICES)
    seed: int | None = Field(None, ge=-2**63, lt=2**63)
    stop: Annotated[list[str], BeforeValidator(_texts)] = []
    stream: bool | None = None
    stream_options: StreamOptions | None = None

    @property
    def token_limit(self) -> int | None:
        return self.max_tokens

    @property
    def includes_usage(self) -> bool:
        return bool(self.stream_options and self.stream_options.include_usage)


class Message(BaseModel):
    model_config = ConfigDict(strict=True, extra="forbid")
    role: Annotated[str, AfterValidator(_role)]
    content: Annotated[str, BeforeValidator(_content)]
    name: str | None = None
    refusal: None = None


class ChatAsked(Asked):
    """POST /v1/chat/completions."""

    messages: list[Message] = Field(min_length=1)
    max_completion_tokens: int | None = Field(None, ge=1)
    logprobs: bool | None = None

    @property
    def token_limit(self) -> int | None:
        return self.max_tokens if self.max_completion_tokens is None else self.max_completion_tokens


class CompletionAsked(Asked):
    """POST /v1/completions."""

    prompt: Annotated[list[str | list[int]], BeforeValidator(_prompts)]
    logprobs: int | None = Field(None, ge=0, le=5)
    echo: bool | None = None


class Feedback(BaseModel):
    """POST /v1/feedback: a conversation that ends with the answer that was judged."""

    model_config = ConfigDict(strict=True, extra="forbid")
    model: str | None = None
    messages: list[Message] = Field(min_length=2)
    choice: Literal["up", "down"]


Body = TypeVar("Body", bound=BaseModel)


def parse(kind: type[Body], raw: bytes) -> Body:
    """Read a body. Raises ApiError 400 that names the position (no JSON) or the field, with what is allowed."""
    try:
        fields = json.loads(raw, parse_constant=_refuse_constant)
        json.dumps(fields, ensure_ascii=False).encode()  # half a surrogate pair is no text
    except UnicodeEncodeError:
        raise ApiError(400, "the body holds a lone surrogate (\\ud800 to \\udfff), which is no character") from None
    except UnicodeDecodeError as error:
        raise ApiError(400, f"the body is not UTF-8: byte {error.start} cannot be read") from None
    except RecursionError:
        raise ApiError(400, "the body is nested too deeply") from None
    except ValueError as error:  # JSONDecodeError names line, column and character
        raise ApiError(400, f"the body is not JSON: {error}") from None
    if not isinstance(fields, dict):
        raise ApiError(400, "the body must be a JSON object, { … }")
    try:
        return kind.model_validate(_without_neutral(kind, fields))
    except pydantic.ValidationError as error:
        raise _refusal(error.errors()[0]) from None


def _without_neutral(kind: type[BaseModel], fields: dict[str, Any]) -> dict[str, Any]:
    """Take out fields of OpenAI's API that ask for nothing; refuse those that ask for what is not here."""
    kept = {}
    for name, value in fields.items():
        if name in kind.model_fields:
            if value is not None or kind.model_fields[name].is_required():
                kept[name] = value
        elif name in NEUTRAL:
            if value is not None and value not in NEUTRAL[name]:
                allowed = " or ".join(json.dumps(option) for option in NEUTRAL[name]) or "null"
                raise ApiError(400, f"'{name}' is not supported by this server; leave it out, or give {allowed}", name,
                               "unsupported_parameter")
        elif name not in IGNORED:
            known = [*kind.model_fields, *NEUTRAL, *IGNORED]
            raise ApiError(400, f"unknown field '{name}'; {did_you_mean(name, known)}".rstrip("; "), name, "unknown_parameter")
    return kept


def _refusal(problem: Any) -> ApiError:
    """One pydantic problem as a sentence with the field, its value and what is allowed."""
    location = problem["loc"]
    name = str(location[0]) + "".join(f"[{part}]" if isinstance(part, int) else f".{part}" for part in location[1:])
    if problem["type"] == "missing":
        return ApiError(400, f"'{name}' is missing", name, "missing_required_parameter")
    if problem["type"] == "extra_forbidden":
        return ApiError(400, f"unknown field '{name}'", name, "unknown_parameter")
    reason = problem["msg"].removeprefix("Value error, ")
    if problem["type"] == "value_error":
        return ApiError(400, f"'{name}' {reason}", name, "invalid_value")
    value = json.dumps(problem["input"], ensure_ascii=False)
    shown = value if len(value) <= 60 else value[:57] + "…"
    return ApiError(400, f"'{name}' is {shown}: {reason[0].lower()}{reason[1:]}", name, "invalid_value")


def _refuse_constant(name: str) -> None:
    raise ValueError(f"{name} is not a number of JSON")
