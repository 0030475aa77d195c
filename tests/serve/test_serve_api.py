"""The real client against the real server: what is asked is answered, in OpenAI's shapes."""

from __future__ import annotations

import http.client
import json
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import openai
import pytest

from athanor.serve.api import Api, Limits
from athanor.serve.server import running
from athanor.serve.target import Target

QUESTION: list[Any] = [{"role": "user", "content": "def value(self):"}]


def post(url: str, path: str, body: bytes, headers: dict[str, str] | None = None) -> tuple[int, dict[str, Any], dict[str, str]]:
    connection = http.client.HTTPConnection(url.removeprefix("http://"), timeout=60)
    try:
        connection.request("POST", path, body, {"Content-Type": "application/json", **(headers or {})})
        response = connection.getresponse()
        return response.status, json.loads(response.read()), {k.lower(): v for k, v in response.getheaders()}
    finally:
        connection.close()


def wait(condition: Callable[[], bool], words: str) -> None:
    deadline = time.monotonic() + 20
    while not condition():
        assert time.monotonic() < deadline, words
        time.sleep(0.01)


def wait_idle(api: Api) -> None:
    wait(lambda: not api.worker.live, "answers that nobody wants are still being written")


def slow_down(api: Api, monkeypatch: pytest.MonkeyPatch) -> None:
    """The same engine, three tokens a second."""
    step = api.worker.engine.step
    monkeypatch.setattr(api.worker.engine, "step", lambda: (time.sleep(0.3), step())[1])


def test_models(client: openai.OpenAI, served: tuple[str, Api]) -> None:
    assert [model.id for model in client.models.list()] == ["tiny"]
    model = client.models.retrieve("tiny")
    assert model.owned_by == "athanor" and model.version == served[1].target.version  # type: ignore[attr-defined]
    assert client.models.retrieve(served[1].target.reference).id == "tiny"
    with pytest.raises(openai.NotFoundError, match="no model 'other'"):
        client.models.retrieve("other")


def test_chat_and_usage(client: openai.OpenAI, served: tuple[str, Api]) -> None:
    api = served[1]
    answer = client.chat.completions.create(model="tiny", messages=QUESTION, max_tokens=12, temperature=0)
    choice = answer.choices[0]
    assert choice.message.role == "assistant" and choice.message.content
    assert choice.finish_reason == "length" and answer.object == "chat.completion"
    assert api.template is not None and answer.usage is not None
    assert answer.usage.prompt_tokens == len(api.template.render(QUESTION, add_generation_prompt=True))
    assert answer.usage.completion_tokens == 12 and answer.usage.total_tokens == answer.usage.prompt_tokens + 12
    again = client.chat.completions.create(model="tiny", messages=QUESTION, max_completion_tokens=12, temperature=0)
    assert again.choices[0].message.content == choice.message.content and again.id != answer.id


def test_chat_streams_the_same_text(client: openai.OpenAI) -> None:
    asked: dict[str, Any] = {"model": "tiny", "messages": QUESTION, "max_tokens": 40, "temperature": 1, "seed": 5}
    whole = client.chat.completions.create(**asked)
    chunks = list(client.chat.completions.create(**asked, stream=True, stream_options={"include_usage": True}))
    assert chunks[0].choices[0].delta.role == "assistant"
    pieces = [c.choices[0].delta.content or "" for c in chunks if c.choices]
    assert "".join(pieces) == whole.choices[0].message.content and sum(map(bool, pieces)) > 10
    assert [c.choices[0].finish_reason for c in chunks if c.choices][-1] == whole.choices[0].finish_reason
    assert chunks[-1].choices == [] and chunks[-1].usage == whole.usage
    assert all(chunk.usage is None for chunk in chunks[:-1])
    assert all(chunk.usage is None for chunk in client.chat.completions.create(**asked, stream=True))


def test_completions(client: openai.OpenAI, served: tuple[str, Api]) -> None:
    ids = served[1].tokenizer.encode("import path")
    both = client.completions.create(model="tiny", prompt=["import path", "return"], max_tokens=9, temperature=0)
    assert [choice.index for choice in both.choices] == [0, 1]
    one = client.completions.create(model="tiny", prompt="import path", max_tokens=9, temperature=0)
    from_ids = client.completions.create(model="tiny", prompt=[0, *ids], max_tokens=9, temperature=0)
    assert one.choices[0].text == from_ids.choices[0].text == both.choices[0].text
    assert one.usage is not None and one.usage.prompt_tokens == 1 + len(ids)
    echoed = client.completions.create(model="tiny", prompt="import path", max_tokens=9, temperature=0, echo=True)
    assert echoed.choices[0].text == "import path" + one.choices[0].text
    chunks = client.completions.create(model="tiny", prompt="import path", max_tokens=9, temperature=0, echo=True, stream=True)
    assert "".join(chunk.choices[0].text for chunk in chunks) == echoed.choices[0].text
    default = client.completions.create(model="tiny", prompt="import path", temperature=0)
    assert default.usage is not None and default.usage.completion_tokens == 16


def test_n_and_seed(client: openai.OpenAI) -> None:
    asked: dict[str, Any] = {"model": "tiny", "messages": QUESTION, "max_tokens": 20, "n": 3, "temperature": 1.0}
    first, again, other = (client.chat.completions.create(**asked, seed=seed) for seed in (1, 1, 100))
    answers = [choice.message.content for choice in first.choices]
    assert answers == [choice.message.content for choice in again.choices]
    assert len(set(answers)) == 3 and answers != [choice.message.content for choice in other.choices]
    assert first.usage is not None and first.usage.completion_tokens <= 60
    streamed = ["", "", ""]
    for chunk in client.chat.completions.create(**asked, seed=1, stream=True):
        streamed[chunk.choices[0].index] += chunk.choices[0].delta.content or ""
    assert streamed == answers


def test_stop_string_across_tokens(client: openai.OpenAI) -> None:
    asked: dict[str, Any] = {"model": "tiny", "prompt": "self value", "max_tokens": 60, "temperature": 0.5, "seed": 8,
                             "logprobs": 0}
    free = client.completions.create(**asked).choices[0]
    assert free.logprobs is not None and free.logprobs.tokens is not None and free.logprobs.text_offset is not None
    tokens = free.logprobs.tokens
    across = [free.text[at - 2:at + 2] for at in free.logprobs.text_offset[10:]]
    stop = next(text for text in across if len(text) == 4 and "\ufffd" not in text and not any(text in t for t in tokens))
    expected = free.text[:free.text.index(stop)]
    assert expected
    cut = client.completions.create(**asked, stop=stop).choices[0]
    assert cut.text == expected and cut.finish_reason == "stop"
    assert cut.logprobs is not None and cut.logprobs.tokens == tokens[:len(cut.logprobs.tokens or [])]
    pieces = [chunk.choices[0].text for chunk in client.completions.create(**asked, stop=["never written", stop], stream=True)]
    assert "".join(pieces) == expected
    assert client.completions.create(**asked, stop="never written").choices[0].text == free.text


def test_eos_ends_an_answer(client: openai.OpenAI) -> None:
    """Ask until a sample ends by itself: its text has nothing of the end token and it is shorter than allowed."""
    for seed in range(6):
        answer = client.completions.create(model="tiny", prompt="value", max_tokens=60, temperature=2, seed=100 * seed, n=16,
                                           logprobs=0)
        for choice in answer.choices:
            if choice.finish_reason == "stop":
                assert choice.logprobs is not None and len(choice.logprobs.tokens or []) < 60
                assert "<|end|>" not in choice.text
                assert answer.usage is not None and answer.usage.completion_tokens < 16 * 60
                return
    pytest.fail("none of 96 answers ended with the end token")


def test_logprobs(client: openai.OpenAI) -> None:
    asked: dict[str, Any] = {"model": "tiny", "messages": QUESTION, "max_tokens": 15, "temperature": 0, "logprobs": True}
    choice = client.chat.completions.create(**asked).choices[0]
    assert choice.logprobs is not None and choice.logprobs.content is not None
    rows = choice.logprobs.content
    assert len(rows) == 15 and all(row.logprob <= 0 for row in rows)
    assert b"".join(bytes(row.bytes or []) for row in rows).decode("utf-8", "replace") == choice.message.content
    streamed = [row for chunk in client.chat.completions.create(**asked, stream=True)
                if chunk.choices[0].logprobs for row in chunk.choices[0].logprobs.content or []]
    assert [(row.token, row.logprob) for row in streamed] == [(row.token, pytest.approx(row.logprob, abs=1e-4)) for row in rows]
    text = client.completions.create(model="tiny", prompt="value", max_tokens=15, temperature=0, logprobs=1).choices[0]
    assert text.logprobs is not None and text.logprobs.tokens and text.logprobs.text_offset
    assert len(text.logprobs.token_logprobs or []) == 15
    assert [list(row.items()) for row in text.logprobs.top_logprobs or []] == [
        [pair] for pair in zip(text.logprobs.tokens, text.logprobs.token_logprobs or [], strict=True)]
    for token, offset in zip(text.logprobs.tokens, text.logprobs.text_offset, strict=True):
        assert "\ufffd" in token or text.text[offset:].startswith(token)


def test_many_at_once_say_what_each_says_alone(client: openai.OpenAI) -> None:
    def ask(number: int) -> str | None:
        answer = client.chat.completions.create(model="tiny", messages=[{"role": "user", "content": "value " * number}],
                                                max_tokens=10 + number, temperature=number % 2, seed=number)
        return answer.choices[0].message.content

    alone = [ask(number) for number in range(12)]
    with ThreadPoolExecutor(12) as pool:
        assert list(pool.map(ask, range(12))) == alone
    assert len(set(alone)) > 6


def test_client_that_leaves_frees_the_engine(served: tuple[str, Api]) -> None:
    url, api = served
    wait_idle(api)
    free = api.worker.engine.pool.free
    assert free == api.worker.engine.pool.count
    for number in range(12):
        connection = http.client.HTTPConnection(url.removeprefix("http://"), timeout=60)
        body = {"messages": QUESTION, "stream": number % 2 == 0, "n": 2, "temperature": 1, "max_tokens": 120}
        connection.request("POST", "/v1/chat/completions", json.dumps(body), {"Content-Type": "application/json"})
        if body["stream"]:
            assert connection.getresponse().readline().startswith(b"data: ")
        else:
            time.sleep(0.03)
        connection.close()
    wait_idle(api)
    assert api.worker.engine.pool.free == free
    assert post(url, "/v1/chat/completions", json.dumps({"messages": QUESTION, "max_tokens": 2}).encode())[0] == 200


@pytest.mark.parametrize("stream", [False, True])
def test_nothing_more_is_written_for_a_client_that_left(model_folder: Path, monkeypatch: pytest.MonkeyPatch,
                                                        stream: bool) -> None:
    with running(Target(model_folder, "tiny")) as (url, api):
        slow_down(api, monkeypatch)
        connection = http.client.HTTPConnection(url.removeprefix("http://"), timeout=60)
        body = {"prompt": [10], "stream": stream, "temperature": 1, "n": 8, "max_tokens": 100}  # 30 seconds
        connection.request("POST", "/v1/completions", json.dumps(body), {"Content-Type": "application/json"})
        wait(lambda: api.worker.live > 0, "nothing is being written")
        connection.close()
        wait_idle(api)


def test_queue_is_bounded(model_folder: Path) -> None:
    with running(Target(model_folder, "tiny"), limits=Limits(answers=2)) as (url, api), \
            openai.OpenAI(base_url=url + "/v1", api_key="none", max_retries=0) as client:
        long: dict[str, Any] = {"model": "tiny", "messages": QUESTION, "n": 2, "temperature": 2, "seed": 3, "max_tokens": 130}
        stream = client.chat.completions.create(**long, stream=True)
        next(iter(stream))
        with pytest.raises(openai.RateLimitError, match="2 of 2 places") as caught:
            client.chat.completions.create(model="tiny", messages=QUESTION, max_tokens=5)
        assert caught.value.response.headers["retry-after"] == "1" and caught.value.code == "rate_limit_exceeded"
        stream.close()
        wait_idle(api)
        assert client.chat.completions.create(model="tiny", messages=QUESTION, max_tokens=5).choices
        with pytest.raises(openai.BadRequestError, match="writes 2 at most"):
            client.chat.completions.create(model="tiny", messages=QUESTION, n=3)


def test_api_key(model_folder: Path) -> None:
    with running(Target(model_folder, "tiny"), api_key="sésame") as (url, _):
        for key in (None, "Bearer wrong", "Basic sésame", "Bearer "):
            headers = {"Authorization": key.encode().decode("latin-1")} if key else {}
            status, body, sent = post(url, "/v1/chat/completions", b"{}", headers)
            assert status == 401 and body["error"]["code"] == "invalid_api_key" and sent["www-authenticate"] == "Bearer"
        right = {"Authorization": "Bearer sésame".encode().decode("latin-1")}
        assert post(url, "/v1/completions", b'{"prompt": "a"}', right)[0] == 200
        connection = http.client.HTTPConnection(url.removeprefix("http://"))
        connection.request("GET", "/")  # the page itself is no secret: it asks for the key
        assert connection.getresponse().status == 200
        connection.close()


def test_feedback_is_kept(served: tuple[str, Api]) -> None:
    url, api = served
    messages = [*QUESTION, {"role": "assistant", "content": "    return 数"}]
    body = json.dumps({"messages": messages, "choice": "up"}).encode()
    assert post(url, "/v1/feedback", body)[0] == 200
    assert api.target.feedback is not None
    assert json.loads(api.target.feedback.read_text(encoding="utf-8").splitlines()[-1]) == {
        "messages": messages, "choice": "up", "model": api.target.reference}
    assert post(url, "/v1/feedback", body, {"Sec-Fetch-Site": "cross-site"})[0] == 403
    status, answer, _ = post(url, "/v1/feedback", json.dumps({"messages": messages, "choice": "maybe"}).encode())
    assert status == 400 and answer["error"]["param"] == "choice"


def test_a_failing_engine_is_reported(model_folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The client hears of it at once, whole or streamed, and so does whoever looks at the server's health."""
    with running(Target(model_folder, "tiny")) as (url, api):
        def fail() -> None:
            raise RuntimeError("the device is gone")

        monkeypatch.setattr(api.worker.engine, "step", fail)
        status, body, _ = post(url, "/v1/chat/completions", json.dumps({"messages": QUESTION}).encode())
        assert status == 500 and "the device is gone" in body["error"]["message"] and body["error"]["type"] == "server_error"
        status, body, _ = post(url, "/v1/chat/completions", json.dumps({"messages": QUESTION, "stream": True}).encode())
        assert status == 503 and "the device is gone" in body["error"]["message"]
        connection = http.client.HTTPConnection(url.removeprefix("http://"))
        connection.request("GET", "/healthz")
        assert connection.getresponse().status == 503
        connection.close()


def test_stopping_ends_what_is_being_written(model_folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("athanor.serve.server.GRACE_SECONDS", 1)
    with running(Target(model_folder, "tiny")) as (url, api):
        slow_down(api, monkeypatch)
        connection = http.client.HTTPConnection(url.removeprefix("http://"), timeout=60)
        body = json.dumps({"messages": QUESTION, "stream": True, "temperature": 1, "seed": 3, "n": 8})
        connection.request("POST", "/v1/chat/completions", body)
        response = connection.getresponse()
        assert response.readline().startswith(b"data: ")
        begin = time.monotonic()
    assert time.monotonic() - begin < 20 and api.worker.live == 0, "half of what all of it takes"
    last = [line for line in response.read().decode().splitlines() if line][-1]
    assert json.loads(last.removeprefix("data: "))["error"]["message"] == "the server is stopping"
    connection.close()
