"""`athanor serve` and `athanor chat` as people call them."""

from __future__ import annotations

import fcntl
import io
import json
import os
import pty
import re
import select
import shutil
import signal
import socket
import subprocess
import sys
import termios
import time
import urllib.request
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from athanor.cli.main import main
from athanor.foundation.errors import ModelError, UserError
from athanor.serve.server import smoke
from athanor.serve.target import find_target

Result = tuple[int, str, str]


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


def test_a_registered_model_that_was_damaged_is_not_used(run_folder: Path) -> None:
    from athanor.registry.store import register

    card = register(run_folder, "chat")
    folder = Path("registry") / card.reference / "model"
    with (folder / "model.safetensors").open("r+b") as file:
        file.seek(-1, os.SEEK_END)
        last = file.read(1)[0]
        file.seek(-1, os.SEEK_END)
        file.write(bytes([last ^ 1]))
    (folder / "notes.txt").write_text("what is not on the card is nobody's damage")
    for name in ("demo-chat", card.reference, str(folder)):
        with pytest.raises(ModelError, match=rf"{card.reference} is damaged: model\.safetensors is not as registered; .* import"):
            find_target(name)
    assert find_target("runs/demo").reference == card.reference, "the run's own is whole"


def test_the_notebook_of_the_readme_runs(model_folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    code = re.findall(r"```python\n(.*?)```", (Path(__file__).parents[2] / "README.md").read_text(), re.S)
    assert len(code) == 1 and "runs/stdlib/pretrain/model" in code[0]
    found: dict[str, Any] = {}
    exec(code[0].replace("runs/stdlib/pretrain/model", str(model_folder)), found)
    assert found["scores"].shape == (len(found["prompt"]), found["model"].shape.vocab_size)
    assert capsys.readouterr().out


def test_smoke(model_folder: Path) -> None:
    result = smoke(model_folder, max_tokens=20)
    assert result["answer"] == result["streamed"] != "" and result["usage"]["completion_tokens"] <= 20
    assert 0 < result["first_token_seconds"] <= result["stream_seconds"] < result["seconds"]
    json.dumps(result)


def test_serve_starts_says_where_and_stops(run_folder: Path) -> None:
    call = [sys.executable, "-c", "from athanor.cli.main import main; main()", "serve", "demo.toml", "--json"]
    server = subprocess.Popen(call, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    try:
        assert server.stdout is not None and server.stderr is not None
        ready = json.loads(server.stdout.readline())
        assert ready["model"] == "demo-chat" and ready["url"].startswith("http://127.0.0.1:")
        with urllib.request.urlopen(ready["url"] + "/v1/models") as response:
            assert json.load(response)["data"][0]["id"] == "demo-chat"
        begin = time.monotonic()
        server.send_signal(signal.SIGINT)
        output, words = server.communicate(timeout=60)
        assert server.returncode == 0 and output == "" and time.monotonic() - begin < 20
        assert ready["url"] in words and "Traceback" not in words
    finally:
        server.kill()
        server.communicate()
    with socket.socket() as probe:
        assert probe.connect_ex(("127.0.0.1", int(ready["url"].rsplit(":", 1)[1]))) != 0


@pytest.fixture
def athanor(run_folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Callable[..., Result]:
    """Run the command line in this process: (exit code, standard output, standard error)."""
    def call(*arguments: str, said: bytes = b"") -> Result:
        monkeypatch.setattr(sys, "argv", ["athanor", *arguments])
        monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(said), encoding="utf-8", errors="surrogateescape"))
        code = 0
        try:
            main()
        except SystemExit as end:
            code = int(end.code or 0)
        return (code, *capsys.readouterr())

    return call


def test_serve_refuses_in_one_sentence(athanor: Callable[..., Result]) -> None:
    with socket.socket() as other:
        other.bind(("127.0.0.1", 0))
        other.listen()
        port = str(other.getsockname()[1])
        for arguments in (["runs/demo", "--port", port], ["demo.toml", f"serve.port={port}"]):
            code, output, words = athanor("serve", *arguments)
            assert code == 2 and output == "" and f"port {port} is in use" in words and "--port or serve.port" in words
            assert len(words.strip().splitlines()) == 1
    code, output, words = athanor("serve", "runs/demo", "serve.port=1")
    assert code == 2 and "use --port" in words
    code, output, words = athanor("serve", "demo.toml", "serve.prot=1")
    assert code == 2 and "'port'" in words


def test_chat_once(athanor: Callable[..., Result]) -> None:
    asked = ("chat", "demo", "--seed", "1", "--once", "value self", "--max-tokens", "12")
    code, output, _ = athanor(*asked, "--json")
    answer: dict[str, Any] = json.loads(output)
    assert code == 0 and 0 < answer["usage"]["completion_tokens"] <= 12 and answer["model"].startswith("demo-chat@")
    assert athanor(*asked)[:2] == (0, answer["answer"] + "\n")
    code, output, words = athanor("chat", "demo", "--once", "value " * 400)
    assert code == 2 and output == "" and "context is 160" in words
    assert athanor("chat", "demo", "--once", "\udcff no UTF-8", "--max-tokens", "1")[0] == 0


@pytest.mark.slow
def test_chat_on_a_terminal_survives_ctrl_c(run_folder: Path) -> None:
    """Ctrl-C ends an answer (or nothing, when it comes late) and not the conversation; /quit ends that."""
    ours, theirs = pty.openpty()
    call = [sys.executable, "-c", "from athanor.cli.main import main; main()", "chat", "demo", "--temperature", "1"]
    process = subprocess.Popen(call, stdin=theirs, stdout=theirs, stderr=theirs, start_new_session=True,
                               preexec_fn=lambda: fcntl.ioctl(0, termios.TIOCSCTTY, 0))
    os.close(theirs)
    seen = ""

    def until(text: str) -> None:
        nonlocal seen
        while text not in seen:
            ready, _, _ = select.select([ours], [], [], 60)
            assert ready, f"waited for {text!r}, saw {seen!r}"
            seen += os.read(ours, 4096).decode(errors="replace")
        seen = seen.split(text, 1)[1]

    try:
        until("> ")
        os.write(ours, b"value\n")
        until("value\r\n")
        assert select.select([ours], [], [], 60)[0]  # the answer begins
        os.write(ours, b"\x03")
        until("> ")
        os.write(ours, b"self\n")
        until("per second]")
        until("> ")
        os.write(ours, b"/quit\n")
        assert process.wait(timeout=60) == 0
    finally:
        process.kill()
        process.wait()
        os.close(ours)


def test_chat_from_a_pipe_has_turns(athanor: Callable[..., Result]) -> None:
    said = b"/help\nvalue\n\n\xff\n/reset\n/nonsense\n/system be brief\npath\n/quit\nnot asked\n"
    code, output, words = athanor("chat", "demo", "--max-tokens", "5", "--seed", "1", "--json", said=said)
    document = json.loads(output)
    assert code == 0 and len(document["turns"]) == 3 and "there is no /nonsense" in words
    assert [message["content"] for message in document["messages"]][:2] == ["be brief", "path"]
    first, second, third = (turn["usage"]["prompt_tokens"] for turn in document["turns"])
    assert second > first + 5  # the second question carries the first turn with it
    assert third < second
