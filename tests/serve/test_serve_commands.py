"""`athanor serve` and `athanor chat` as people call them."""

from __future__ import annotations

import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import time
import urllib.request
from pathlib import Path
from typing import Any

import pytest

from athanor.foundation.errors import UserError
from athanor.serve.server import smoke
from athanor.serve.target import find_target

PROGRAM = [sys.executable, "-c", "from athanor.cli.main import main; main()"]


RECIPE = """name = "demo"
[[data.source]]
name = "a"
kind = "text"
path = "a.txt"
[[stage]]
name = "pretrain"
[[stage]]
name = "chat"
[serve]
port = 0
"""


@pytest.fixture
def run_folder(model_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A run with two finished stages; the second is the newest. Commands run beside `runs/`."""
    run = tmp_path / "runs" / "demo"
    for number, stage in enumerate(["pretrain", "chat"]):
        shutil.copytree(model_folder, run / stage / "model")
        os.utime(run / stage / "model" / "config.json", (1e9 + number, 1e9 + number))
    (run / "recipe.toml").write_text(RECIPE)
    (tmp_path / "demo.toml").write_text(RECIPE)
    monkeypatch.chdir(tmp_path)
    for variable in ("ATHANOR_RUNS", "ATHANOR_REGISTRY", "ATHANOR_API_KEY"):
        monkeypatch.delenv(variable, raising=False)
    return run


def test_what_model_means(run_folder: Path) -> None:
    newest = (run_folder / "chat" / "model").resolve()
    for name in ("demo.toml", "runs/demo", "demo", "runs/demo/chat", "runs/demo/chat/model"):
        target = find_target(name)
        assert target.folder.resolve() == newest and target.name == "demo-chat"
        assert target.feedback is not None and target.feedback.resolve() == (run_folder / "feedback.jsonl").resolve()
    assert find_target("runs/demo/pretrain").name == "demo-pretrain"
    with pytest.raises(UserError, match=r"'demi' is no model folder.*did you mean 'demo'"):
        find_target("demi")
    (run_folder.parent / "empty").mkdir()
    with pytest.raises(UserError, match="holds no model"):
        find_target("runs/empty")
    (run_folder.parent.parent / "other.toml").write_text((run_folder / "recipe.toml").read_text().replace('"demo"', '"other"'))
    with pytest.raises(UserError, match=r"other.toml' has not been trained yet"):
        find_target("other.toml")


def test_registry_names(run_folder: Path) -> None:
    from athanor.registry.store import register

    card = register(run_folder, "chat")
    for name in ("demo-chat", "demo-chat@latest", card.reference):
        target = find_target(name)
        assert target.reference == card.reference and (target.folder / "config.json").is_file()
        assert target.feedback == Path("runs/demo/feedback.jsonl")
    assert find_target("runs/demo").reference == card.reference  # the same content has the same version
    with pytest.raises(UserError, match="demo-chat@0000"):
        find_target("demo-chat@0000")


def test_smoke(model_folder: Path) -> None:
    result = smoke(model_folder, max_tokens=20)
    assert result["answer"] == result["streamed"] != "" and result["usage"]["completion_tokens"] <= 20
    assert 0 < result["first_token_seconds"] <= result["stream_seconds"] < result["seconds"]
    json.dumps(result)


def test_serve_starts_says_where_and_stops(run_folder: Path) -> None:
    server = subprocess.Popen([*PROGRAM, "serve", "demo.toml", "--json"], stdout=subprocess.PIPE, stderr=subprocess.PIPE,
                              text=True)
    try:
        assert server.stdout is not None and server.stderr is not None
        ready = json.loads(server.stdout.readline())
        assert ready["model"] == "demo-chat" and ready["url"].startswith("http://127.0.0.1:")
        with urllib.request.urlopen(ready["url"] + "/v1/models") as response:
            assert json.load(response)["data"][0]["id"] == "demo-chat"
        port = ready["url"].rsplit(":", 1)[1]
        taken = subprocess.run([*PROGRAM, "serve", "runs/demo", "--port", port], capture_output=True, text=True, timeout=60)
        assert taken.returncode == 2 and taken.stdout == "" and len(taken.stderr.strip().splitlines()) == 1
        assert f"port {port} is in use" in taken.stderr and "--port" in taken.stderr
        begin = time.monotonic()
        server.send_signal(signal.SIGINT)
        output, words = server.communicate(timeout=20)
        assert server.returncode == 0 and output == "" and time.monotonic() - begin < 8
        assert ready["url"] in words and "Traceback" not in words
    finally:
        server.kill()
        server.communicate()
    with socket.socket() as probe:
        assert probe.connect_ex(("127.0.0.1", int(port))) != 0


def chat(*arguments: str, said: str = "") -> subprocess.CompletedProcess[str]:
    call = [*PROGRAM, "chat", "demo", "--seed", "1", *arguments]
    return subprocess.run(call, input=said, capture_output=True, text=True, timeout=60)


def test_chat_once(run_folder: Path) -> None:
    done = chat("--once", "value self", "--max-tokens", "12", "--json")
    answer: dict[str, Any] = json.loads(done.stdout)
    assert done.returncode == 0 and answer["usage"]["completion_tokens"] <= 12 and answer["model"].startswith("demo-chat@")
    plain = chat("--once", "value self", "--max-tokens", "12")
    assert plain.stdout == answer["answer"] + "\n"
    refused = chat("--once", "value " * 400)
    assert refused.returncode == 2 and refused.stdout == "" and "context is 160" in refused.stderr


def test_chat_from_a_pipe_has_turns(run_folder: Path) -> None:
    said = "/help\nvalue\n\nself\n/reset\n/nonsense\n/system be brief\npath\n/quit\nnot asked\n"
    done = chat("--max-tokens", "5", "--json", said=said)
    assert done.returncode == 0, done.stderr
    document = json.loads(done.stdout)
    assert len(document["turns"]) == 3 and "there is no /nonsense" in done.stderr
    assert [message["content"] for message in document["messages"]][:2] == ["be brief", "path"]
    first, second, third = (turn["usage"]["prompt_tokens"] for turn in document["turns"])
    assert second > first  # the second question carries the first turn with it
    assert third != second
