"""The page in a real browser on the real server: an answer of the model streams in, the engine's own blocks show, and
the answer is explained. Screenshots go to pytest's temporary directory. (The page in all its states: tests/server.)
"""

from __future__ import annotations

import json
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest
from tests.e2e.serving import MODEL, RealServer
from tests.server.chromium import Chromium, chromium, find_chromium

pytestmark = pytest.mark.browser


@pytest.fixture(scope="module")
def browser(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Chromium]:
    program = find_chromium()
    if program is None:
        pytest.skip("needs a headless Chromium: none is installed (Debian: apt-get install chromium)")
    with chromium(program, tmp_path_factory.mktemp("profile")) as opened:
        yield opened


def text_of(browser: Chromium, selector: str) -> str:
    return str(browser.run(f"document.querySelector({json.dumps(selector)})?.innerText ?? ''"))


def test_a_chat_while_others_run(browser: Chromium, server: RealServer, tmp_path: Path) -> None:
    stop = threading.Event()

    def other(number: int) -> None:
        while not stop.is_set():
            prompt = "Everybody reads the same long beginning of one story. " * 8 + f"Client {number}."
            server.complete(prompt, max_tokens=60, ignore_eos=True, seed=number)

    others = [threading.Thread(target=other, args=(number,)) for number in range(3)]
    browser.resize(1280, 1000)
    browser.open(f"{server.url}/?theme=dark")
    browser.wait_for("document.querySelector('#live span').textContent === 'live'")
    try:
        for thread in others:
            thread.start()
        browser.wait_for("+document.querySelector('#s-run').textContent >= 2")
        browser.run(
            "window.lengths = []; new MutationObserver(() => {"
            " const n = document.querySelector('.msg.bot')?.textContent.length; if (n) window.lengths.push(n);"
            "}).observe(document.querySelector('#log'), {childList: true, subtree: true})"
        )
        browser.run("document.querySelector('#message').focus()")
        browser.type("Tell me a story about a boat.")
        browser.press("Enter")
        browser.wait_for("document.querySelector('.msg.bot .meta')", 60)
        assert len(set(browser.run("window.lengths"))) >= 4  # it grew: it streamed
        browser.wait_for("+document.querySelector('#legend b[data-s=shared]').textContent > 0")
        browser.wait_for("+document.querySelector('#legend b[data-s=used]').textContent > 0")
        browser.wait_for("/\\d/.test(document.querySelector('#c-itl .vals b').textContent)")
        browser.screenshot(tmp_path / "busy.png")
    finally:
        stop.set()
        for thread in others:
            thread.join(60)
    assert text_of(browser, "#f-model") == MODEL and "cpu" in text_of(browser, "#f-device").lower()
    facts = text_of(browser, ".msg.bot .meta")
    assert "TTFT" in facts and "tok/s" in facts and "cached" in facts

    browser.run("document.activeElement.blur()")
    browser.press("e")
    browser.wait_for("document.querySelector('.explain .where')")
    told = text_of(browser, ".explain")
    for word in ("Where the time went", "Queue", "Prefill", "Decode"):
        assert word in told, told
    browser.wait_for("document.querySelector('#s-run').textContent === '0'")
    browser.run("document.querySelector('#reqs tr.r.fin').click()")
    browser.wait_for("document.querySelector('tr.detail')")
    browser.screenshot(tmp_path / "explained.png")
    assert browser.judge() == []  # nothing on the console, nothing against the policy
