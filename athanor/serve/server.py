"""Starting and stopping the server: uvicorn over the API, and the first answers that prove that it works."""

from __future__ import annotations

import asyncio
import contextlib
import http.client
import json
import socket
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import uvicorn

from athanor.foundation.errors import AthanorError
from athanor.inference.engine import context_tokens, open_engine
from athanor.serve.address import Address, listen, url_of
from athanor.serve.api import Api, Limits
from athanor.serve.target import Target, find_target
from athanor.serve.worker import Worker

GRACE_SECONDS = 5  # how long answers that are being written may go on after a stop
DEFAULT_CACHE_TOKENS = 32_768


class Server(uvicorn.Server):
    """Lets answers that are being written go on for a while after a stop, then ends them with a sentence."""

    def __init__(self, config: uvicorn.Config, worker: Worker) -> None:
        super().__init__(config)
        self.worker = worker

    async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
        halting = asyncio.get_running_loop().call_later(GRACE_SECONDS, self.worker.halt)
        await super().shutdown(sockets)
        halting.cancel()


def make_server(target: Target, api_key: str | None = None, limits: Limits | None = None,
                cache_tokens: int | None = None) -> tuple[Server, Api]:
    """Open the model and put a server before it, which nobody runs yet. Raises ModelError for a folder that is no model."""
    limits = limits or Limits()
    longest = context_tokens(target.folder)
    cache_tokens = cache_tokens or min(DEFAULT_CACHE_TOKENS, limits.answers * longest)
    worker = Worker(open_engine(target.folder, cache_tokens), limits.answers)
    api = Api(target, worker, min(longest, cache_tokens), int(time.time()), api_key, limits)
    config = uvicorn.Config(api.app(), log_level="warning", access_log=False, lifespan="on", ws="none", server_header=False,
                            timeout_graceful_shutdown=GRACE_SECONDS + 5)
    return Server(config, api.worker), api


@contextlib.contextmanager
def running(target: Target, **options: Any) -> Iterator[tuple[str, Api]]:
    """The real server on a free port of the loopback interface, in a thread of this process; gives its URL, and stops it."""
    listener = listen(Address(port=0))
    try:
        server, api = make_server(target, **options)
        thread = threading.Thread(target=server.run, kwargs={"sockets": [listener]}, name="server", daemon=True)
        thread.start()
        try:
            while not server.started:
                if not thread.is_alive():
                    raise AthanorError("the server ended before it was ready")
                time.sleep(0.005)
            yield url_of(listener), api
        finally:
            server.should_exit = True
            thread.join()
    finally:
        listener.close()


def smoke(model_folder: Path, max_tokens: int = 48) -> dict[str, Any]:
    """Start the server, ask one chat and one streamed chat over HTTP, stop it; answers, usage and timings (seconds).

    The two ask the same with temperature 0, so they must say the same; AthanorError otherwise.
    """
    begin = time.perf_counter()
    question = {"messages": [{"role": "user", "content": 'def add(a, b):\n    """Return the sum of a and b."""'}],
                "max_tokens": max_tokens, "temperature": 0}
    with running(find_target(str(model_folder))) as (url, api):
        ready_seconds = time.perf_counter() - begin
        asked = time.perf_counter()
        chat = json.loads(_post(url, question)[0])
        chat_seconds = time.perf_counter() - asked
        asked = time.perf_counter()
        body, first_seconds = _post(url, question | {"stream": True, "stream_options": {"include_usage": True}})
        stream_seconds = time.perf_counter() - asked
        model = api.target.reference
        stopping = time.perf_counter()
    events = [line.removeprefix("data: ") for line in body.decode().splitlines() if line.startswith("data: ")]
    chunks = [json.loads(line) for line in events[:-1]]
    streamed = "".join(choice["delta"].get("content", "") for chunk in chunks for choice in chunk["choices"])
    answer = chat["choices"][0]["message"]["content"]
    if events[-1] != "[DONE]" or streamed != answer:
        raise AthanorError(f"the served model said {answer!r} at once, but streamed {streamed!r}")
    return {"model": model, "question": question["messages"], "answer": answer, "streamed": streamed, "usage": chat["usage"],
            "ready_seconds": ready_seconds, "chat_seconds": chat_seconds, "first_token_seconds": first_seconds,
            "stream_seconds": stream_seconds, "tokens_per_second": chunks[-1]["usage"]["completion_tokens"] / stream_seconds,
            "stop_seconds": time.perf_counter() - stopping, "seconds": time.perf_counter() - begin}


def _post(url: str, body: dict[str, Any]) -> tuple[bytes, float]:
    """Ask for a chat; the answer's body, and the seconds until its first token (when it is streamed)."""
    begin = time.perf_counter()
    connection = http.client.HTTPConnection(url.removeprefix("http://"), timeout=300)
    try:
        connection.request("POST", "/v1/chat/completions", json.dumps(body), {"Content-Type": "application/json"})
        response = connection.getresponse()
        first_seconds, content = 0.0, b""
        while line := response.readline():
            if not first_seconds and b'"content":' in line and b'"content":""' not in line:
                first_seconds = time.perf_counter() - begin
            content += line
    finally:
        connection.close()
    if response.status != 200:
        raise AthanorError(f"the server answered {response.status}: {content.decode(errors='replace')}")
    return content, first_seconds or time.perf_counter() - begin
