"""What is wrong is refused with one sentence, in OpenAI's shape, and the server goes on."""

from __future__ import annotations

import http.client
import json
import socket
import time
from typing import Any

import openai
import pytest
from tiny_model import CONTEXT_TOKENS

from athanor.foundation.errors import UserError
from athanor.serve.address import Address, listen
from athanor.serve.api import Api

CHAT = {"messages": [{"role": "user", "content": "hello"}]}


def refused(url: str, path: str, body: bytes) -> dict[str, Any]:
    connection = http.client.HTTPConnection(url.removeprefix("http://"), timeout=60)
    connection.request("POST", path, body)
    response = connection.getresponse()
    content = json.loads(response.read())
    connection.close()
    assert set(content) == {"error"} and set(content["error"]) == {"message", "type", "param", "code"}
    return {"status": response.status, **content["error"]}


@pytest.mark.parametrize(("body", "words"), [
    (b'{"messages": [}', "line 1 column 15"), (b"", "Expecting value"), (b"[1]", "JSON object"), (b'"text"', "JSON object"),
    (b'{"messages": "\xff"}', "byte 14"), (b'{"temperature": NaN}', "NaN"), (b"[" * 100_000, "nested"),
    (b'{"messages": [{"role": "user", "content": "\\ud800"}]}', "surrogate"), (b"{}", "'messages' is missing"),
    (b'{"n": ' + b"9" * 5000 + b"}", "not JSON")])
def test_malformed_bodies(served: tuple[str, Api], body: bytes, words: str) -> None:
    error = refused(served[0], "/v1/chat/completions", body)
    assert error["status"] == 400 and words in error["message"] and error["type"] == "invalid_request_error"


@pytest.mark.parametrize(("fields", "param", "words"), [
    ({"messages": []}, "messages", "at least 1"), ({"messages": "hello"}, "messages", "list"),
    ({"messages": [{"role": "usr", "content": "a"}]}, "messages[0].role", "did you mean 'user'"),
    ({"messages": [{"role": "user"}]}, "messages[0].content", "missing"),
    ({"messages": [{"role": "user", "content": [{"type": "image_url"}]}]}, "messages[0].content", "text only"),
    ({"max_tokens": 0}, "max_tokens", "greater than or equal to 1"), ({"max_tokens": "5"}, "max_tokens", "integer"),
    ({"max_tokens": 1.5}, "max_tokens", "integer"), ({"max_completion_tokens": -1}, "max_completion_tokens", "greater"),
    ({"temperature": 3}, "temperature", "less than or equal to 2"), ({"temperature": True}, "temperature", "number"),
    ({"top_p": 0}, "top_p", "greater than 0"), ({"n": 0}, "n", "greater"), ({"n": 1000}, "n", "less"),
    ({"stop": ["a"] * 5}, "stop", "at most 4"), ({"stop": 7}, "stop", "text"), ({"stop": ""}, "stop", "empty"),
    ({"stream": "yes"}, "stream", "boolean"), ({"tools": [{"type": "function"}]}, "tools", "not supported"),
    ({"response_format": {"type": "json_object"}}, "response_format", "not supported"),
    ({"presence_penalty": 0.5}, "presence_penalty", "not supported"),
    ({"temperatur": 1}, "temperatur", "did you mean 'temperature'"),
    ({"seed": 2**70}, "seed", "less than"), ({"logprobs": 1}, "logprobs", "boolean")])
def test_wrong_fields(served: tuple[str, Api], fields: dict[str, Any], param: str, words: str) -> None:
    error = refused(served[0], "/v1/chat/completions", json.dumps(CHAT | fields).encode())
    assert error["status"] == 400 and error["param"] == param and words in error["message"], error


@pytest.mark.parametrize(("fields", "param"), [
    ({"prompt": []}, "prompt"), ({"prompt": 5}, "prompt"), ({"prompt": [-1]}, "prompt"), ({"prompt": [[]]}, "prompt"),
    ({"prompt": [10**9]}, "prompt"), ({"prompt": ["a", [1]]}, "prompt"), ({}, "prompt"),
    ({"prompt": "a", "logprobs": 9}, "logprobs"), ({"prompt": "a", "logprobs": 1}, "logprobs"),
    ({"prompt": "a", "suffix": "b"}, "suffix"), ({"prompt": "a", "best_of": 4}, "best_of"), ({"prompt": True}, "prompt")])
def test_wrong_completions(served: tuple[str, Api], fields: dict[str, Any], param: str) -> None:
    error = refused(served[0], "/v1/completions", json.dumps(fields).encode())
    assert error["status"] == 400 and error["param"] == param, error


def test_fields_that_ask_for_nothing_are_accepted(client: openai.OpenAI) -> None:
    messages: Any = [{"role": "developer", "content": "a"}, {"role": "user", "content": [{"type": "text", "text": "b"}]}]
    answer = client.chat.completions.create(
        model="tiny", messages=messages, max_tokens=1, user="me", metadata={"a": "b"}, presence_penalty=0, frequency_penalty=0,
        logit_bias={}, tools=[], response_format={"type": "text"}, service_tier="auto", store=False, stop=None,
        parallel_tool_calls=True)
    assert len(answer.choices) == 1


def test_context_too_long(client: openai.OpenAI) -> None:
    with pytest.raises(openai.BadRequestError) as caught:
        client.chat.completions.create(model="tiny", messages=[{"role": "user", "content": "value " * 400}])
    assert caught.value.code == "context_length_exceeded" and str(CONTEXT_TOKENS) in caught.value.message
    with pytest.raises(openai.BadRequestError) as caught:
        client.completions.create(model="tiny", prompt="value", max_tokens=CONTEXT_TOKENS)
    assert caught.value.code == "context_length_exceeded" and caught.value.param == "prompt"
    full = client.completions.create(model="tiny", prompt=[7] * (CONTEXT_TOKENS - 3), max_tokens=3, temperature=0)
    assert full.usage is not None and full.usage.total_tokens <= CONTEXT_TOKENS


def test_wrong_places(served: tuple[str, Api], client: openai.OpenAI) -> None:
    assert refused(served[0], "/v1/embeddings", b"{}")["status"] == 404
    assert refused(served[0], "/v1/models", b"{}")["status"] == 405
    with pytest.raises(openai.NotFoundError, match="'tiny'") as caught:
        client.chat.completions.create(model="gpt-4", messages=[{"role": "user", "content": "a"}])
    assert caught.value.code == "model_not_found"


def test_body_too_large(served: tuple[str, Api]) -> None:
    error = refused(served[0], "/v1/completions", b'{"prompt": "' + b"a" * (2 << 20) + b'"}')
    assert error["status"] == 413 and "1048576" in error["message"]
    connection = http.client.HTTPConnection(served[0].removeprefix("http://"), timeout=60)
    body = iter([b"x" * 65536] * 20)
    connection.request("POST", "/v1/completions", body, {"Transfer-Encoding": "chunked"}, encode_chunked=True)
    assert connection.getresponse().status == 413
    connection.close()


def test_a_long_wrong_name_is_cut_short(served: tuple[str, Api]) -> None:
    error = refused(served[0], "/v1/chat/completions", b'{"' + b"a" * 100_000 + b'": 1}')
    assert error["status"] == 400 and "unknown field" in error["message"] and len(error["message"]) <= 600


def test_a_client_that_leaves_within_its_body_is_no_fault(served: tuple[str, Api], caplog: pytest.LogCaptureFixture) -> None:
    with socket.create_connection(("127.0.0.1", int(served[0].rpartition(":")[2]))) as leaving:
        leaving.sendall(b"POST /v1/completions HTTP/1.1\r\nHost: x\r\nContent-Length: 500\r\n\r\n{")
    time.sleep(0.3)
    test_health_still_ok(served)
    assert not caplog.records


def test_port_in_use_names_the_port() -> None:
    with socket.socket() as other:
        other.bind(("127.0.0.1", 0))
        other.listen()
        port = other.getsockname()[1]
        with pytest.raises(UserError, match=f"127.0.0.1 port {port} is in use.*--port or serve.port"):
            listen(Address(port=port))
    with pytest.raises(UserError, match="no address"):
        listen(Address("no.such.host.invalid", 0))


def test_health_still_ok(served: tuple[str, Api]) -> None:
    connection = http.client.HTTPConnection(served[0].removeprefix("http://"))
    connection.request("GET", "/healthz")
    assert json.loads(connection.getresponse().read())["status"] == "ok"
    connection.close()
