"""The web page, as a browser is served it and in a real one; and pages of other origins."""

from __future__ import annotations

import base64
import json
import re
import shutil
import subprocess
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest
from pydantic import ValidationError
from starlette.testclient import TestClient
from websockets.sync.client import ClientConnection, connect

from service.app import create_app
from service.auth import hash_key
from service.settings import ApiKey, Settings
from tests.conftest import LOCAL, REPOSITORY, RunningService

CHROMIUM = shutil.which("chromium")
KEY = "a-key-for-tests"
KEYS = (ApiKey(name="page", sha256=hash_key(KEY)),)
PAGE = "https://shop.example"


def test_the_page_and_all_that_it_loads_come_from_the_service(service: RunningService) -> None:
    page = service.get("/")
    assert page.headers["content-type"].startswith("text/html")
    policy = page.headers["content-security-policy"]
    assert "default-src 'none'" in policy
    assert "unsafe" not in policy
    assert "frame-ancestors 'none'" in policy
    script = service.get("/console/console.js")
    parts = re.findall(r'"(console/[a-z.]+)"', page.text + script.text)
    assert sorted(set(parts)) == ["console/console.css", "console/console.js", "console/recorder.js"]
    for name in parts:
        part = service.get(f"/{name}")
        assert part.status_code == 200
        assert part.headers["content-type"].split(";")[0] == ("text/css" if name.endswith("css") else "text/javascript")
        assert part.headers["x-content-type-options"] == "nosniff"
    # What the policy would refuse: code and styles within the page.
    assert not re.search(r"<script(?![^>]*src=)|<style|\son[a-z]+=|\sstyle=|https?://", page.text)


@pytest.mark.parametrize("name", ["../settings.py", "..%2Fsettings.py", "index.html", "nothing.js"])
def test_nothing_else_of_the_folder_is_served(service: RunningService, name: str) -> None:
    answer = service.get(f"/console/{name}")
    assert answer.status_code == 404
    assert answer.headers["content-type"] == "application/problem+json"


def test_the_page_is_no_part_of_the_api(service: RunningService) -> None:
    assert not [path for path in service.get("/openapi.json").json()["paths"] if path == "/" or "console" in path]
    assert httpx.head(f"{service.url}/").status_code == 200


@pytest.fixture
def open_to_a_page(tmp_path: Path) -> Iterator[TestClient]:
    settings = Settings(data_dir=tmp_path, api_keys=KEYS, cors_origins=(PAGE,), inference_threads=1, intra_op_threads=1)
    with TestClient(create_app(settings), base_url=LOCAL) as client:
        yield client


def test_a_page_that_is_named_may_use_the_service_and_no_other(open_to_a_page: TestClient) -> None:
    asking = {
        "Access-Control-Request-Method": "POST",
        "Access-Control-Request-Headers": "authorization,content-type,x-request-timeout-ms",
    }
    allowed = open_to_a_page.options("/v1/keywords/detect", headers={"Origin": PAGE, **asking})
    assert allowed.status_code == 200
    assert allowed.headers["access-control-allow-origin"] == PAGE
    assert allowed.headers["x-request-id"]
    refused = open_to_a_page.options("/v1/keywords/detect", headers={"Origin": "https://other.example", **asking})
    assert refused.status_code == 400
    clip = (REPOSITORY / "examples/computer.wav").read_bytes()
    headers = {"Origin": PAGE, "Authorization": f"Bearer {KEY}", "Content-Type": "audio/wav"}
    answer = open_to_a_page.post("/v1/keywords/detect", content=clip, headers=headers)
    assert answer.json()["detections"][0]["keyword"] == "en:computer"
    assert answer.headers["access-control-allow-origin"] == PAGE
    assert "X-Request-ID" in answer.headers["access-control-expose-headers"]
    # Errors are to be read as well.
    unknown = open_to_a_page.post("/v1/keywords/detect", content=clip, headers={**headers, "Authorization": "Bearer x"})
    assert (unknown.status_code, unknown.headers["access-control-allow-origin"]) == (401, PAGE)
    other = open_to_a_page.get("/v1/models", headers={**headers, "Origin": "https://other.example"})
    assert "access-control-allow-origin" not in other.headers


def test_by_default_no_page_of_another_origin_may_read_answers(service: RunningService) -> None:
    answer = service.get("/healthz", headers={"Origin": PAGE})
    assert "access-control-allow-origin" not in answer.headers


@pytest.mark.parametrize(
    "origin",
    [
        "shop.example",
        "https://shop.example/",
        "https://a b",
        "ftp://x",
        "",
        "https://*.x.example",
        "https://Shop.example",
        "https://shop.example:443",
        "http://shop.example:80",
    ],
)
def test_what_is_no_origin_is_refused(origin: str) -> None:
    with pytest.raises(ValidationError, match="is no origin"):
        Settings(api_keys=KEYS, cors_origins=(origin,))


def test_pages_are_let_in_with_keys_only() -> None:
    with pytest.raises(ValidationError, match="needs API keys"):
        Settings(cors_origins=(PAGE,))


class Browser:
    """A page in a real browser, through its DevTools protocol."""

    def __init__(self, connection: ClientConnection) -> None:
        self._connection = connection
        self._count = 0

    def ask(self, method: str, **parameters: Any) -> dict[str, Any]:
        self._count += 1
        self._connection.send(json.dumps({"id": self._count, "method": method, "params": parameters}))
        while True:
            message = json.loads(self._connection.recv(timeout=30))
            if message.get("id") == self._count:
                result: dict[str, Any] = message["result"]
                return result

    def value(self, expression: str) -> Any:
        found = self.ask("Runtime.evaluate", expression=expression, returnByValue=True, awaitPromise=True)
        assert "exceptionDetails" not in found, found
        return found["result"].get("value")

    def text(self, element: str) -> str:
        # The page may not be there yet.
        found: str = self.value(f"document.getElementById({element!r})?.innerText ?? ''")
        return found

    def click(self, element: str) -> None:
        # While the page is at something, a click on what is greyed out would be lost.
        self.until(lambda: not self.value(f"document.getElementById({element!r}).disabled"))
        self.value(f"document.getElementById({element!r}).click()")

    def until(self, holds: Callable[[], bool], within_s: float = 30) -> None:
        end = time.monotonic() + within_s
        while not holds():
            assert time.monotonic() < end, self.value("document.body.innerText")
            time.sleep(0.1)


@pytest.fixture
def browser(service: RunningService, tmp_path: Path) -> Iterator[Browser]:
    """On the console, with five words in place of a microphone, over and over."""
    if CHROMIUM is None:
        # As for PostgreSQL and promtool: `.ci/run` installs it, a person who runs `make test` need not.
        pytest.skip("needs Chromium (Debian package chromium)")
    flags = [
        "--headless", "--no-sandbox", "--disable-gpu", "--no-first-run", "--disable-background-networking",
        "--disable-component-update", "--disable-sync", "--remote-debugging-port=0",
        "--autoplay-policy=no-user-gesture-required", f"--user-data-dir={tmp_path / 'profile'}",
        "--use-fake-ui-for-media-stream", "--use-fake-device-for-media-stream",
        f"--use-file-for-fake-audio-capture={REPOSITORY / 'examples/five-words.wav'}",
    ]  # fmt: skip
    with (tmp_path / "log").open("w") as log:
        process = subprocess.Popen([CHROMIUM, *flags, f"{service.url}/"], stdout=log, stderr=log)
    try:
        port_file, end = tmp_path / "profile/DevToolsActivePort", time.monotonic() + 60
        while not (port_file.is_file() and port_file.read_text().strip()):
            assert time.monotonic() < end, (tmp_path / "log").read_text()[-2000:]
            time.sleep(0.1)
        port = port_file.read_text().splitlines()[0]
        pages = httpx.get(f"http://127.0.0.1:{port}/json/list", timeout=30).json()
        address = next(page["webSocketDebuggerUrl"] for page in pages if page["type"] == "page")
        with connect(address, max_size=None) as connection:
            yield Browser(connection)
    finally:
        process.terminate()
        process.wait(30)


def test_words_are_shown_as_a_microphone_hears_them(browser: Browser, service: RunningService) -> None:
    browser.until(lambda: "@" in browser.text("model"))
    assert browser.text("model").startswith("sotto-edge@")
    # The page asks for its keywords after its model, so both are waited for.
    keywords = len(service.get("/v1/keywords").json()["keywords"])
    browser.until(lambda: browser.value("document.getElementById('keywords').childElementCount") == keywords)
    # Nobody is asked for a key that the service does not want.
    assert browser.value("document.getElementById('key').checkVisibility()") is False
    browser.click("listen")
    wanted = ("en:computer", "en:alexa", "en:jarvis")
    browser.until(lambda: all(word in browser.text("heard") for word in wanted))
    browser.click("listen")
    browser.until(lambda: browser.text("listen").startswith("Listen"))
    browser.until(lambda: not browser.text("listening"))
    assert browser.value("document.getElementById('fault').hidden")


def test_a_recording_is_searched_and_a_voice_enrolled_and_found(browser: Browser, service: RunningService) -> None:
    browser.until(lambda: "@" in browser.text("model"))
    clip = base64.b64encode((REPOSITORY / "examples/computer.wav").read_bytes()).decode()
    browser.value(
        f"""const bytes = Uint8Array.from(atob("{clip}"), (letter) => letter.charCodeAt(0));
            const chosen = new DataTransfer();
            chosen.items.add(new File([bytes], "computer.wav"));
            document.getElementById("file").files = chosen.files;
            document.getElementById("file").dispatchEvent(new Event("change"));"""
    )
    browser.until(lambda: "en:computer" in browser.text("found"))
    browser.value("document.getElementById('speaker').value = 'console-test'")
    try:
        browser.click("enrol")
        browser.until(lambda: "of speech" in browser.text("verdict") or "Not taken" in browser.text("verdict"))
        # The page asks for the list anew once it has told the verdict.
        browser.until(lambda: "console-test" in browser.text("speakers"))
        if "enrolling" in browser.text("verdict"):
            browser.click("enrol")
            browser.until(lambda: "enrolled" in browser.text("verdict"))
        browser.click("verify")
        browser.until(lambda: "accepted" in browser.text("verdict") or "refused" in browser.text("verdict"))
        browser.click("identify")
        browser.until(lambda: "console-test" in browser.text("verdict") and "(" in browser.text("verdict"))
        browser.value("window.confirm = () => true; document.querySelector('#speakers button').click()")
        browser.until(lambda: "console-test" not in browser.text("speakers"))
    finally:
        httpx.delete(f"{service.url}/v1/speakers/console-test")
    assert browser.value("document.getElementById('fault').hidden")
