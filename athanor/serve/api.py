"""OpenAI's routes over one worker: models, completions, chat completions; beside them the chat page, feedback and health."""

from __future__ import annotations

import asyncio
import contextlib
import hmac
import secrets
from collections.abc import AsyncIterator, Awaitable, Callable
from dataclasses import dataclass
from pathlib import Path

from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect
from starlette.requests import Request as HttpRequest
from starlette.responses import HTMLResponse, JSONResponse, Response, StreamingResponse
from starlette.routing import Route

from athanor.data.text.chat import ChatTemplate
from athanor.data.text.tokenizer import Tokenizer
from athanor.foundation.errors import AthanorError, DataError, UserError
from athanor.foundation.run_folder import append_jsonl
from athanor.inference.engine import Sampling
from athanor.serve.answers import Answer, ChatAnswer, Choice, CompletionAnswer, event
from athanor.serve.requests import ApiError, Asked, ChatAsked, CompletionAsked, Feedback, parse
from athanor.serve.target import Target
from athanor.serve.text import AnswerText, Piece
from athanor.serve.worker import Generation, QueueFull, Worker

DEFAULT_COMPLETION_TOKENS = 16  # what OpenAI's completions do without max_tokens; a chat may fill the context
DRAINED_BODIES = 16  # a body this many times too long is cut off
PAGE_POLICY = ("default-src 'none'; style-src 'unsafe-inline'; script-src 'unsafe-inline'; connect-src 'self'; img-src data:; "
               "base-uri 'none'; form-action 'none'; frame-ancestors 'none'")


@dataclass(frozen=True)
class Limits:
    """What one server takes: bytes of a body, and answers written or waited for at once."""

    body_bytes: int = 1 << 20
    answers: int = 64


class Api:
    """The routes of one served model. `context_tokens` is the longest prompt and answer together."""

    def __init__(self, target: Target, worker: Worker, context_tokens: int, created: int, api_key: str | None = None,
                 limits: Limits | None = None) -> None:
        self.target, self.worker, self.context_tokens = target, worker, context_tokens
        self.api_key, self.limits = api_key, limits or Limits()
        self.tokenizer = Tokenizer.load(target.folder)
        self.template: ChatTemplate | None = None
        with contextlib.suppress(DataError):  # a base model may have none; then it has no chat
            self.template = ChatTemplate.load(target.folder)
        self.card = {"id": target.name, "object": "model", "created": created, "owned_by": "athanor", "version": target.version,
                     "context_tokens": context_tokens, "has_chat": self.template is not None,
                     "takes_feedback": target.feedback is not None}
        self.page = Path(__file__).with_name("page.html").read_text(encoding="utf-8")

    def app(self) -> Starlette:
        routes = [Route("/", self.show_page), Route("/healthz", self.health), Route("/v1/models", self.guarded(self.models)),
                  Route("/v1/models/{name:path}", self.guarded(self.model)),
                  Route("/v1/completions", self.guarded(self.completions), methods=["POST"]),
                  Route("/v1/chat/completions", self.guarded(self.chat_completions), methods=["POST"]),
                  Route("/v1/feedback", self.guarded(self.feedback), methods=["POST"])]
        return Starlette(routes=routes, lifespan=self._lifespan,
                         exception_handlers={HTTPException: _http_error, Exception: _unexpected,
                                             ClientDisconnect: lambda *_: Response(status_code=499)})

    @contextlib.asynccontextmanager
    async def _lifespan(self, app: Starlette) -> AsyncIterator[None]:
        self.worker.start(asyncio.get_running_loop())
        yield
        await asyncio.to_thread(self.worker.stop)

    def guarded(self, handler: Callable[[HttpRequest], Awaitable[Response]]) -> Callable[[HttpRequest], Awaitable[Response]]:
        """Check who asks, and turn refusals into OpenAI's error object."""
        async def checked(http: HttpRequest) -> Response:
            try:
                if http.headers.get("sec-fetch-site") == "cross-site":  # browsers say so, and pages cannot change it
                    raise ApiError(403, "pages of other sites may not use this server", None, "cross_site")
                self._check_key(http)
                return await handler(http)
            except ApiError as error:
                return JSONResponse(error.body(), error.status, error.headers)

        return checked

    def _check_key(self, http: HttpRequest) -> None:
        if self.api_key is None:
            return
        scheme, _, given = http.headers.get("authorization", "").partition(" ")
        if scheme.lower() != "bearer" or not hmac.compare_digest(given.strip().encode("latin-1"), self.api_key.encode()):
            what = "this API key is not the server's" if given else "an API key is needed, as 'Authorization: Bearer <key>'"
            raise ApiError(401, what, None, "invalid_api_key", {"WWW-Authenticate": "Bearer"})

    async def show_page(self, http: HttpRequest) -> Response:
        return HTMLResponse(self.page, headers={"Content-Security-Policy": PAGE_POLICY, "Referrer-Policy": "no-referrer"})

    async def health(self, http: HttpRequest) -> Response:
        failure = self.worker.failure
        content = {"status": failure or "ok", "live": self.worker.live, "limit": self.limits.answers}
        return JSONResponse(content, 503 if failure else 200)

    async def models(self, http: HttpRequest) -> Response:
        return JSONResponse({"object": "list", "data": [self.card]})

    async def model(self, http: HttpRequest) -> Response:
        self._check_model(http.path_params["name"])
        return JSONResponse(self.card)

    def _check_model(self, name: str | None) -> None:
        if name not in (None, self.target.name, self.target.reference):
            raise ApiError(404, f"there is no model '{name}' here; this server has '{self.target.name}'", "model",
                           "model_not_found")

    async def chat_completions(self, http: HttpRequest) -> Response:
        asked = parse(ChatAsked, await self._body(http))
        self._check_model(asked.model)
        if self.template is None:
            raise ApiError(400, f"'{self.target.name}' has no chat template; ask /v1/completions instead", "model",
                           "no_chat_template")
        messages = [{"role": message.role, "content": message.content} for message in asked.messages]
        try:
            token_ids = await asyncio.to_thread(self.template.render, messages, True)
        except DataError as error:
            raise ApiError(400, str(error), "messages", "invalid_value") from None
        choices = [Choice() for _ in range(asked.n or 1)]
        answer = ChatAnswer(self.target.name, self.target.version, choices, len(token_ids), 0 if asked.logprobs else None)
        return await self._answer(http, asked, answer, [token_ids], "messages", None)

    async def completions(self, http: HttpRequest) -> Response:
        asked = parse(CompletionAsked, await self._body(http))
        self._check_model(asked.model)
        if asked.echo and asked.logprobs is not None:
            raise ApiError(400, "'echo' with 'logprobs' is not supported by this server; leave one out", "echo",
                           "unsupported_parameter")
        if asked.logprobs and (asked.logprobs, asked.temperature) != (1, 0):
            raise ApiError(400, "'logprobs' gives those of the written tokens: use 0, or 1 with temperature 0, where the written "
                           "token is the likeliest", "logprobs", "unsupported_parameter")
        prompts = await asyncio.to_thread(lambda: [self._prompt_ids(prompt) for prompt in asked.prompt])
        echoes = [prompt if isinstance(prompt, str) else self.tokenizer.decode(prompt) for prompt in asked.prompt if asked.echo]
        choices = [Choice(echo) for echo in echoes or [""] * len(prompts) for _ in range(asked.n or 1)]
        prompt_tokens = sum(map(len, prompts))
        answer = CompletionAnswer(self.target.name, self.target.version, choices, prompt_tokens, asked.logprobs)
        return await self._answer(http, asked, answer, prompts, "prompt", DEFAULT_COMPLETION_TOKENS)

    def _prompt_ids(self, prompt: str | list[int]) -> list[int]:
        """A text begins like a training document, with bos (where the tokenizer has one); token ids are taken as they are."""
        if isinstance(prompt, str):
            ids = self.tokenizer.encode(prompt)
            return [self.tokenizer.bos_id, *ids] if self.tokenizer.bos_id != self.tokenizer.eos_id or not ids else ids
        if max(prompt) >= self.tokenizer.vocab_size:
            raise ApiError(400, f"'prompt' holds token id {max(prompt)}; this model has ids 0 to {self.tokenizer.vocab_size - 1}",
                           "prompt", "invalid_value")
        return prompt

    async def _answer(self, http: HttpRequest, asked: Asked, answer: Answer, prompts: list[list[int]], field: str,
                      default_tokens: int | None) -> Response:
        """Start the generations (prompt by prompt, `n` each) and send what they write, at the end or as it comes."""
        pieces: asyncio.Queue[tuple[int, Piece]] = asyncio.Queue()
        generations = self._generations(asked, answer, prompts, field, default_tokens, pieces)
        if len(generations) > self.limits.answers:
            raise ApiError(400, f"{len(generations)} answers are asked for at once; this server writes {self.limits.answers} "
                           "at most", "n", "invalid_value")
        try:
            self.worker.submit(generations)
        except QueueFull as error:
            raise ApiError(429, str(error), None, "rate_limit_exceeded", {"Retry-After": "1"}) from None
        except AthanorError as error:
            raise ApiError(503, str(error), None, "unavailable") from None
        watch = asyncio.create_task(self._cancel_when_gone(http, generations))
        if asked.stream:
            return StreamingResponse(self._events(asked, answer, pieces, generations, watch), media_type="text/event-stream",
                                     headers={"Cache-Control": "no-cache", "X-Accel-Buffering": "no"})
        try:
            async for _ in _until_finished(answer, pieces):
                pass
        finally:
            watch.cancel()
            self.worker.cancel(generations)
        return JSONResponse(answer.whole())

    def _generations(self, asked: Asked, answer: Answer, prompts: list[list[int]], field: str, default_tokens: int | None,
                     pieces: asyncio.Queue[tuple[int, Piece]]) -> list[Generation]:
        seed = secrets.randbits(62) if asked.seed is None else asked.seed
        temperature = 1.0 if asked.temperature is None else asked.temperature
        stop_token_ids = self.tokenizer.end_ids

        def generation(index: int, prompt: list[int], choice: int) -> Generation:
            sampling = Sampling(self._new_tokens(len(prompt), asked.token_limit, default_tokens, field), temperature=temperature,
                                top_p=asked.top_p or 1.0, seed=(seed + choice) % 2**63, stop_token_ids=stop_token_ids)
            text = AnswerText(self.tokenizer, asked.stop, stop_token_ids, answer.logprobs is not None)
            return Generation(prompt, sampling, text, lambda piece: pieces.put_nowait((index, piece)))

        several = [(prompt, choice) for prompt in prompts for choice in range(asked.n or 1)]
        return [generation(index, prompt, choice) for index, (prompt, choice) in enumerate(several)]

    def _new_tokens(self, prompt_tokens: int, wanted: int | None, default: int | None, field: str) -> int:
        """How many tokens may be written. Raises ApiError 400 when they do not fit beside the prompt."""
        room = self.context_tokens - prompt_tokens
        if room < (wanted or 1):
            raise ApiError(400, f"this model's context is {self.context_tokens} tokens, but {prompt_tokens} are in the {field} "
                           f"and {wanted or 'at least 1'} asked for the answer; shorten one of them", field,
                           "context_length_exceeded")
        return wanted or min(room, default or room)

    async def _events(self, asked: Asked, answer: Answer, pieces: asyncio.Queue[tuple[int, Piece]],
                      generations: list[Generation], watch: asyncio.Task[None]) -> AsyncIterator[bytes]:
        usage = {"usage": None} if asked.includes_usage else {}
        try:
            for chunk in answer.begin():
                yield event({**chunk, **usage})
            async for index, piece in _until_finished(answer, pieces):
                yield event({**answer.chunk(index, piece), **usage})
            if asked.includes_usage:
                yield event(answer.last())
            yield event("[DONE]")
        except ApiError as error:  # the status has been sent; what is left is an event
            yield event(error.body())
        finally:
            watch.cancel()
            self.worker.cancel(generations)

    async def _cancel_when_gone(self, http: HttpRequest, generations: list[Generation]) -> None:
        while (await http.receive())["type"] != "http.disconnect":
            pass
        self.worker.cancel(generations)

    async def feedback(self, http: HttpRequest) -> Response:
        """Append a judged conversation to the run's feedback.jsonl."""
        given = parse(Feedback, await self._body(http))
        self._check_model(given.model)
        if self.target.feedback is None:
            raise ApiError(404, "this server knows no run folder to keep feedback in", None, "no_run_folder")
        row = {"messages": [{"role": m.role, "content": m.content} for m in given.messages], "choice": given.choice,
               "model": self.target.reference}
        try:
            await asyncio.to_thread(append_jsonl, self.target.feedback, row)
        except AthanorError as error:
            raise ApiError(507, str(error), None, "disk") from None
        return JSONResponse({"object": "feedback", **row})

    async def _body(self, http: HttpRequest) -> bytes:
        """The whole body, or ApiError 413; what is too long is read and forgotten, so that the client gets to hear it."""
        parts, length = [], 0
        async for part in http.stream():
            length += len(part)
            if length <= self.limits.body_bytes:
                parts.append(part)
            elif length > DRAINED_BODIES * self.limits.body_bytes:
                break
        if length > self.limits.body_bytes:
            raise ApiError(413, f"the body is longer than the {self.limits.body_bytes} bytes that this server takes", None,
                           "body_too_large", {"Connection": "close"})
        return b"".join(parts)


async def _until_finished(answer: Answer, pieces: asyncio.Queue[tuple[int, Piece]]) -> AsyncIterator[tuple[int, Piece]]:
    """Pieces as they come, added to their choices, until every choice has ended. Raises what ended one badly."""
    unfinished = len(answer.choices)
    while unfinished:
        index, piece = await pieces.get()
        if piece.error is not None:
            status = 400 if isinstance(piece.error, UserError) else 500
            raise ApiError(status, str(piece.error), None, "engine" if status == 500 else "invalid_value")
        answer.choices[index].add(piece)
        unfinished -= piece.finish_reason is not None
        yield index, piece


async def _http_error(http: HttpRequest, error: Exception) -> Response:
    assert isinstance(error, HTTPException), "the handler of HTTPException"
    what = {404: f"there is no {http.url.path} here; the API is below /v1 (models, completions, chat/completions)",
            405: f"{http.method} is not allowed for {http.url.path}"}.get(error.status_code, error.detail)
    return JSONResponse(ApiError(error.status_code, what).body(), error.status_code, error.headers)


async def _unexpected(http: HttpRequest, error: Exception) -> Response:
    return JSONResponse(ApiError(500, f"the server failed: {type(error).__name__}", None, "internal").body(), 500)
