"""The chat page in a real browser: text streams in, can be stopped and asked for again, and nothing leaves the machine."""

from __future__ import annotations

import json
import os
import shutil
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from athanor.foundation.run_folder import RunFolder
from athanor.serve.api import Api
from athanor.serve.server import running
from athanor.serve.target import Target

pytestmark = pytest.mark.slow
PHONE = (390, 800)


@pytest.fixture
def browser(tmp_path: Path) -> Iterator[Any]:
    """Headless Chromium; its absence is a skip at home and a failure where CI is set."""
    chromium, driver = shutil.which("chromium"), shutil.which("chromedriver")
    if chromium is None or driver is None:
        assert not os.environ.get("CI"), "chromium and chromium-driver must be installed here"
        pytest.skip("chromium and chromium-driver are not installed")
    from selenium import webdriver
    from selenium.webdriver.chrome.service import Service

    options = webdriver.ChromeOptions()
    options.binary_location = chromium
    for argument in ("--headless", "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run", "--disable-dev-shm-usage",
                     "--disable-background-networking", "--disable-component-update", "--disable-sync",
                     f"--user-data-dir={tmp_path / 'profile'}", "--window-size=1100,900"):
        options.add_argument(argument)
    started = webdriver.Chrome(options=options, service=Service(driver))
    try:
        yield started
    finally:
        started.quit()


def wait(condition: Callable[[], Any], what: str, seconds: float = 60) -> Any:
    deadline = time.monotonic() + seconds
    while not (found := condition()):
        assert time.monotonic() < deadline, f"waited {seconds:.0f} s for {what}"
        time.sleep(0.02)
    return found


def one(browser: Any, selector: str) -> Any:
    return browser.find_element("css selector", selector)


def texts(browser: Any, selector: str) -> list[str]:
    return browser.execute_script("return [...document.querySelectorAll(arguments[0])].map(n => n.textContent)", selector)


def open_page(browser: Any, url: str) -> None:
    browser.get(url)
    wait(lambda: one(browser, "#model").text == "tiny", "the model's name")
    browser.execute_script("document.querySelector('#temperature').value = '0'")


def ask(browser: Any, text: str) -> None:
    """Send a message and wait until what it led to has ended."""
    answers = len(texts(browser, ".assistant"))
    one(browser, "#input").send_keys(text + "\n")
    wait(lambda: len(texts(browser, ".assistant")) > answers and one(browser, "#send").is_displayed(), "the end of an answer")


def slow_down(api: Api, monkeypatch: pytest.MonkeyPatch) -> None:
    """The same engine, at a pace that a person could follow."""
    step = api.worker.engine.step

    def slower() -> Any:
        time.sleep(0.05)
        return step()

    monkeypatch.setattr(api.worker.engine, "step", slower)


def test_ask_stop_regenerate_judge(browser: Any, model_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    feedback = tmp_path / "feedback.jsonl"
    with running(Target(model_folder, "tiny", RunFolder(tmp_path))) as (url, api):
        open_page(browser, url)
        with monkeypatch.context() as patch:
            slow_down(api, patch)
            one(browser, "#input").send_keys("value <b>self</b>\n")
            wait(lambda: one(browser, "#stop").is_displayed(), "the stop button")
            seen = {len(wait(lambda: texts(browser, ".assistant .text")[0], "the first text"))}
            wait(lambda: seen.add(len(texts(browser, ".assistant .text")[0])) or len(seen) > 3, "text that grows")
            one(browser, "#stop").click()
            wait(lambda: one(browser, "#send").is_displayed(), "the send button")
            wait(lambda: api.worker.live == 0, "the engine to be free", 3)
        assert texts(browser, ".hint") == ["Stopped."]
        assert texts(browser, ".user .text") == ["value <b>self</b>"] and not texts(browser, ".text b")
        stopped = texts(browser, ".assistant .text")[0]

        browser.find_element("xpath", "//button[text()='Regenerate']").click()
        wait(lambda: texts(browser, ".assistant .rate") and one(browser, "#send").is_displayed(), "a whole answer")
        answers = texts(browser, ".assistant .text")
        assert len(answers) == 1 and len(answers[0]) > len(stopped) and answers[0].startswith(stopped.rstrip("\ufffd"))
        assert "tokens/s" in texts(browser, ".assistant .rate")[0]

        one(browser, "button[title='Good answer']").click()
        wait(lambda: one(browser, "button[title='Good answer']").get_attribute("aria-pressed"), "the thumb")
        row = json.loads(feedback.read_text(encoding="utf-8"))
        assert row["choice"] == "up" and row["model"] == api.target.reference
        assert [message["role"] for message in row["messages"]] == ["user", "assistant"]
        assert row["messages"][0]["content"] == "value <b>self</b>"
        check_quiet(browser, url)


def test_long_conversation_and_phone_width(browser: Any, model_folder: Path) -> None:
    with running(Target(model_folder, "tiny")) as (url, _):
        browser.execute_cdp_cmd("Emulation.setDeviceMetricsOverride",
                                {"width": PHONE[0], "height": PHONE[1], "deviceScaleFactor": 1, "mobile": True})
        open_page(browser, url)
        for _ in range(3):
            ask(browser, "value self " * 8)
        assert any("oldest messages no longer fit" in hint for hint in texts(browser, ".hint"))
        ask(browser, "value " * 200)
        assert "context is" in texts(browser, ".note")[-1]
        assert browser.execute_script("return document.documentElement.scrollWidth") <= PHONE[0]
        assert not texts(browser, "button[title='Good answer']")  # no run folder, no thumbs
        one(browser, "#new").click()
        assert not texts(browser, ".text") and one(browser, "#empty").is_displayed()


def test_page_asks_for_the_key(browser: Any, model_folder: Path) -> None:
    with running(Target(model_folder, "tiny"), api_key="sesame") as (url, _):
        browser.get(url)
        for key in ("wrong", "sesame"):
            field = wait(lambda: one(browser, "#key").is_displayed() and one(browser, "#key_value"), "the dialog")
            field.clear()
            field.send_keys(key + "\n")
        wait(lambda: one(browser, "#model").text == "tiny", "the model's name")


def check_quiet(browser: Any, url: str) -> None:
    """No error on the console, and nothing fetched from anywhere else."""
    assert not [entry for entry in browser.get_log("browser") if entry["level"] == "SEVERE"]
    fetched = browser.execute_script("return performance.getEntriesByType('resource').map(entry => entry.name)")
    assert fetched and all(name.startswith((url, "data:")) for name in fetched)
