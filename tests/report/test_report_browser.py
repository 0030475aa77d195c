"""The page in a real browser: nothing wider than the screen, no message on the console, no request to anywhere."""

from __future__ import annotations

import base64
import contextlib
import json
import os
import shutil
import signal
import subprocess
import tempfile
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from athanor.foundation.launch import free_port
from athanor.foundation.run_folder import RunFolder
from athanor.report.page import write_report

pytestmark = pytest.mark.slow
FLAGS = ["--headless", "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run", "--disable-background-networking",
         "--disable-component-update", "--disable-sync", "--disable-dev-shm-usage", "--hide-scrollbars"]
# elements that reach beyond the screen although nothing around them clips or scrolls
OVERFLOWING = """
const wide = [...document.querySelectorAll('main *')].filter(e => {
  const box = e.getBoundingClientRect();
  if (!box.width || (box.right <= innerWidth + 0.5 && box.left >= -0.5)) return false;
  return !e.closest('pre') && !e.closest('svg:not(:scope)') && getComputedStyle(e).position !== 'absolute';
});
return [document.documentElement.scrollWidth, innerWidth, wide.slice(0, 5).map(e => e.outerHTML.slice(0, 200))];
"""


class Browser:
    """A WebDriver session, spoken to with plain HTTP."""

    def __init__(self, port: int, profile: str) -> None:
        self.base = f"http://127.0.0.1:{port}"
        options = {"args": [*FLAGS, f"--user-data-dir={profile}"], "binary": shutil.which("chromium")}
        wanted = {"browserName": "chrome", "goog:chromeOptions": options,
                  "goog:loggingPrefs": {"browser": "ALL", "performance": "ALL"}}
        session = self.call("POST", "/session", {"capabilities": {"alwaysMatch": wanted}})
        self.base += f"/session/{session['sessionId']}"

    def call(self, method: str, path: str, body: dict[str, Any] | None = None) -> Any:
        data = json.dumps(body or {}).encode() if method == "POST" else None
        request = urllib.request.Request(self.base + path, data, {"Content-Type": "application/json"}, method=method)
        with urllib.request.urlopen(request, timeout=60) as response:
            return json.load(response)["value"]

    def devtools(self, command: str, **parameters: Any) -> Any:
        return self.call("POST", "/goog/cdp/execute", {"cmd": command, "params": parameters})

    def open(self, url: str, width: int, height: int = 900, scheme: str = "light") -> None:
        self.devtools("Emulation.setDeviceMetricsOverride", width=width, height=height, deviceScaleFactor=1, mobile=width < 500)
        self.devtools("Emulation.setEmulatedMedia", features=[{"name": "prefers-color-scheme", "value": scheme}])
        self.call("POST", "/url", {"url": url})

    def script(self, code: str) -> Any:
        return self.call("POST", "/execute/sync", {"script": code, "args": []})

    def log(self, kind: str) -> list[dict[str, Any]]:
        found: list[dict[str, Any]] = self.call("POST", "/se/log", {"type": kind})
        return found

    def screenshot(self, path: Path) -> None:
        """The whole page, to be looked at."""
        shot = self.devtools("Page.captureScreenshot", captureBeyondViewport=True)
        path.write_bytes(base64.b64decode(shot["data"]))


@contextlib.contextmanager
def started_browser() -> Iterator[Browser]:
    """A headless Chromium with a profile of its own, ended with all its processes."""
    port = free_port()
    with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as profile:
        driver = subprocess.Popen(["chromedriver", f"--port={port}"], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL,
                                  start_new_session=True)
        try:
            deadline = time.monotonic() + 60
            while True:
                try:
                    urllib.request.urlopen(f"http://127.0.0.1:{port}/status", timeout=5).close()
                    break
                except (urllib.error.URLError, ConnectionError):
                    assert time.monotonic() < deadline, "chromedriver does not answer"
                    time.sleep(0.1)
            session = Browser(port, profile)
            try:
                yield session
            finally:
                session.call("DELETE", "")
        finally:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(driver.pid, signal.SIGKILL)
            driver.wait(timeout=10)


@pytest.fixture(scope="module")
def browser() -> Iterator[Browser]:
    if not shutil.which("chromium") or not shutil.which("chromedriver"):
        if os.environ.get("CI"):
            pytest.fail("chromium and chromedriver are missing, and CI must not skip what needs them")
        pytest.skip("chromium and chromedriver are not installed")
    with started_browser() as session:
        yield session


@pytest.fixture(scope="module")
def url(finished: RunFolder, tmp_path_factory: pytest.TempPathFactory) -> str:
    return write_report(finished, tmp_path_factory.mktemp("page") / "report.html").as_uri()


@pytest.mark.parametrize("width", [320, 360, 730, 1100])
@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_nothing_is_wider_than_the_screen_and_nothing_is_fetched(browser: Browser, url: str, width: int, scheme: str) -> None:
    for kind in ("browser", "performance"):
        browser.log(kind)  # what earlier pages left
    browser.open(url, width, scheme=scheme)
    content, screen, wide = browser.script(OVERFLOWING)
    assert (content, wide) == (width, []) and screen == width
    assert browser.log("browser") == []
    messages = [json.loads(entry["message"])["message"] for entry in browser.log("performance")]
    asked = [m["params"]["request"]["url"] for m in messages
             if m["method"] == "Network.requestWillBeSent" and m["params"]["documentURL"] == url]
    assert [address for address in asked if not address.startswith("data:")] == [url]


def test_long_names_are_broken_not_wide(browser: Browser, finished: RunFolder, tmp_path: Path) -> None:
    long, run = "x" * 400, RunFolder(Path(shutil.copytree(finished.root, tmp_path / "run")))
    scores = json.loads(run.scores.read_text())
    scores["models"][long] = next(iter(scores["models"].values()))
    run.scores.write_text(json.dumps(scores))
    run.cluster.write_text(run.cluster.read_text().replace('accelerator = "', f'accelerator = "{long}'))
    for path, key in ((run.chain, "step"), (run.stage("pretrain").events, "sentence")):
        rows = [json.loads(line) for line in path.read_text().splitlines()]
        path.write_text("".join(json.dumps({**row, key: f"{row.get(key)}{long}"}) + "\n" for row in rows))
    browser.open(write_report(run).as_uri(), 360)
    assert browser.script(OVERFLOWING) == [360, 360, []]


def test_something_too_wide_would_be_seen(browser: Browser, url: str) -> None:
    browser.open(url, 360)
    browser.script("document.querySelector('main').insertAdjacentHTML('beforeend', '<p style=\"width:500px\">wide</p>')")
    content, screen, _ = browser.script(OVERFLOWING)
    assert content > 360 or screen > 360


def test_a_click_on_a_part_of_the_bar_opens_its_account(browser: Browser, url: str) -> None:
    browser.open(url, 1100)
    shown = "return getComputedStyle(document.querySelector('#account-0-skew + .inside')).display"
    assert browser.script(shown) == "none"
    browser.script("document.querySelector('.book a[href=\"#account-0-skew\"]').dispatchEvent("
                   "new MouseEvent('click', {bubbles: true, cancelable: true, view: window}))")
    deadline = time.monotonic() + 30
    while browser.script(shown) != "table-row":
        assert time.monotonic() < deadline, "the row did not open"
        time.sleep(0.05)


def test_a_tab_shows_the_book_of_its_stage(browser: Browser, url: str) -> None:
    browser.open(url, 1100)
    shown = "return [...document.querySelectorAll('.panel')].map(p => p.checkVisibility())"
    assert browser.script(shown) == [True, False, False]
    browser.script("document.querySelector('.tabs label[for=book-2]').click()")
    assert browser.script(shown) == [False, False, True]


def test_colours_follow_the_scheme(browser: Browser, url: str) -> None:
    colours = set()
    for scheme in ("light", "dark"):
        browser.open(url, 1100, scheme=scheme)
        colours.add(browser.script("return getComputedStyle(document.body).backgroundColor"))
    assert len(colours) == 2


def test_no_tick_is_cut_off_by_the_edge_of_its_picture(browser: Browser, url: str) -> None:
    browser.open(url, 1100)
    cut = """return [...document.querySelectorAll('svg[viewBox] text')].filter(t => {
      const box = t.getBoundingClientRect(), frame = t.ownerSVGElement.getBoundingClientRect();
      return box.width && (box.left < frame.left - 0.5 || box.right > frame.right + 0.5);
    }).map(t => t.textContent)"""
    assert browser.script(cut) == []
    browser.script("const t = document.querySelector('svg[viewBox] .tick'); t.textContent = 'far too long for this margin'")
    assert len(browser.script(cut)) == 1
