"""The page in a real browser, on a real server with a pretended rank: it streams, it shows, it explains, it complains
about nothing.

Screenshots go to pytest's temporary directory, so that a person can look at what the test saw.
"""

from __future__ import annotations

import json
import threading
import time
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from tests.server.chromium import Chromium, chromium, find_chromium
from tests.server.story_server import STORIES, StoryServer, story_server

pytestmark = pytest.mark.browser
CHART_PIXELS = """(() => {
  const canvas = document.querySelector(%s + ' canvas'), copy = new OffscreenCanvas(canvas.width, canvas.height);
  const paper = copy.getContext('2d', {willReadFrequently: true});
  paper.drawImage(canvas, 0, 0);
  const data = paper.getImageData(0, 0, copy.width, copy.height).data;
  const seen = new Set();
  for (let i = 0; i < data.length; i += 4) {
    if (data[i + 3] > 200) seen.add(data[i] << 16 | data[i + 1] << 8 | data[i + 2]);
  }
  return [...seen];
})()"""


@pytest.fixture(scope="module")
def program() -> str:
    found = find_chromium()
    if found is None:
        pytest.skip("needs a headless Chromium: none is installed (Debian: apt-get install chromium)")
    return found


@pytest.fixture(scope="module")
def server(program: str) -> Iterator[StoryServer]:
    with story_server() as running:
        yield running


@pytest.fixture(scope="module")
def one_browser(program: str, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Chromium]:
    with chromium(program, tmp_path_factory.mktemp("profile")) as running:
        yield running


@pytest.fixture
def browser(one_browser: Chromium) -> Iterator[Chromium]:
    one_browser.resize(1280, 1000)
    yield one_browser
    assert one_browser.judge() == []


def ask(base: str, content: str, max_tokens: int = 40) -> dict[str, Any]:
    """A chat of some other client."""
    body = json.dumps({"messages": [{"role": "user", "content": content}], "max_tokens": max_tokens}).encode()
    request = urllib.request.Request(f"{base}/v1/chat/completions", body, {"content-type": "application/json"})
    with urllib.request.urlopen(request, timeout=30) as response:
        answer: dict[str, Any] = json.load(response)
    return answer


def text_of(browser: Chromium, selector: str) -> str:
    return str(browser.run(f"document.querySelector({json.dumps(selector)})?.innerText ?? ''"))


def open_page(browser: Chromium, base: str, query: str = "?theme=dark") -> None:
    browser.open(f"{base}/{query}")
    browser.wait_for("document.querySelector('#live span').textContent === 'live'")
    browser.wait_for("document.querySelector('#s-run').textContent !== '–'")


def send(browser: Chromium, text: str) -> None:
    browser.run("document.querySelector('#message').focus()")
    browser.type(text)
    browser.press("Enter")


def test_a_chat_streams_and_is_explained(browser: Chromium, server: StoryServer, tmp_path: Path) -> None:
    open_page(browser, server.base)
    assert text_of(browser, "#f-model") == "story" and text_of(browser, "#f-device") == "pretended rank"
    # How long the answer is at each moment that it grows: proof that it streams.
    browser.run(
        "window.lengths = []; new MutationObserver(() => {"
        " const n = document.querySelector('.msg.bot')?.textContent.length; if (n) window.lengths.push(n);"
        "}).observe(document.querySelector('#log'), {childList: true, subtree: true})"
    )
    send(browser, "Tell me about the river, please.")
    browser.wait_for("document.querySelector('.msg.bot .meta')")
    lengths = browser.run("window.lengths")
    assert len(set(lengths)) >= 4 and lengths[0] < lengths[-1] / 2

    answer = text_of(browser, ".msg.bot")
    story = next(story for story in STORIES if answer.startswith(story[:40]))
    if "<b>" in story:  # markup of the model is text, `code` and fences are code
        assert (
            "<b>fast</b>" in answer and browser.run("document.querySelectorAll('.msg.bot b b, .msg p b').length") == 0
        )
        assert text_of(browser, ".msg.bot pre code") == "boat --speed fast"
    facts = text_of(browser, ".msg.bot .meta")
    assert "TTFT" in facts and "tok/s" in facts and "cached" in facts and "stop" in facts

    browser.run("document.activeElement.blur()")
    browser.press("e")
    browser.wait_for("document.querySelector('.explain .where')")
    told = text_of(browser, ".explain")
    for word in ("Where the time went", "Queue", "Prefill", "Decode", "Recompute", "at token"):
        assert word in told, told
    # The bar is full: its parts are shares of the whole.
    assert browser.run(
        "(() => { const box = document.querySelector('.explain .where').getBoundingClientRect();"
        " const last = document.querySelector('.explain .where').lastChild.getBoundingClientRect();"
        " return Math.abs(box.right - last.right) < 1.5; })()"
    )
    send(browser, "And then?")
    browser.wait_for("document.querySelectorAll('.msg.bot .meta').length === 2")
    cached, _, prompt = text_of(browser, ".msg.bot:last-child .meta").split(" cached")[0].split()[-1].partition("/")
    assert int(cached) >= 32 and int(cached) < int(prompt)  # the first turn came from the cache
    browser.screenshot(tmp_path / "chat.png")


def test_stop_ends_the_answer_and_keeps_what_came(browser: Chromium, server: StoryServer) -> None:
    open_page(browser, server.base)
    send(browser, "A long story, and I will not hear its end.")
    browser.wait_for("document.querySelector('.msg.bot').textContent.length > 20")
    browser.press("Escape", 27)
    browser.wait_for("document.querySelector('.msg.bot .meta')")
    assert "stopped by you" in text_of(browser, ".msg.bot .meta")
    assert len(text_of(browser, ".msg.bot")) < max(map(len, STORIES))
    assert text_of(browser, "#b-send span") == "Send"
    browser.wait_for(
        "fetch('live/snapshot').then(r => r.json()).then(s => s.requests.some(r => r.state === 'aborted'))"
    )


def test_the_engine_panel_shows_work(browser: Chromium, server: StoryServer, tmp_path: Path) -> None:
    stop = threading.Event()

    def client(number: int) -> None:
        count = 0
        while not stop.is_set():
            ask(server.base, f"{'The same beginning for everybody. ' * 6} Client {number}, request {count}.", 60)
            count += 1

    clients = [threading.Thread(target=client, args=(number,)) for number in range(7)]  # four places: some wait
    try:
        for thread in clients:
            thread.start()
        open_page(browser, server.base)
        browser.wait_for("+document.querySelector('#s-run').textContent === 4")
        browser.wait_for("+document.querySelector('#s-wait').textContent > 0")
        browser.wait_for("document.querySelector('#s-why').textContent.includes('places')")
        browser.wait_for("+document.querySelector('#legend b[data-s=shared]').textContent > 0")
        for chart in ("#c-ttft", "#c-itl", "#c-in", "#c-out"):
            browser.wait_for(f"/\\d/.test(document.querySelector('{chart} .vals b').textContent)")
        time.sleep(2.5)  # a line needs two points, charts are drawn once a second
        for chart, colour in (("#c-ttft", 0x3D96D6), ("#c-itl", 0x3D96D6), ("#c-in", 0xE89C55), ("#c-out", 0x3D96D6)):
            assert colour in browser.run(CHART_PIXELS % json.dumps(chart)), chart
        for order in ("level", "address"):
            pixels = browser.run(CHART_PIXELS % "'#scene'")
            assert {0x2F8ACB, 0x63D2C6, 0x23556F, 0x17222A} <= set(pixels), order  # in use, shared, cached, free
            browser.screenshot(tmp_path / f"engine-{order}.png")
            browser.run("document.activeElement.blur()")
            browser.press("m")
            time.sleep(0.4)
        assert "not recomputed" in text_of(browser, "#flow")
        for hidden in ("#fleet", "#spec-card", "#waiting", "#newer"):
            assert browser.run(f"document.querySelector('{hidden}').offsetParent === null"), hidden

        for state in ("decode", "waiting", "length"):
            browser.wait_for(f"[...document.querySelectorAll('#reqs tr.r')].some(r => r.innerText.includes('{state}'))")
        browser.run("document.querySelector('#reqs tr.r.fin').click()")
        browser.wait_for("document.querySelectorAll('tr.detail .lane i').length >= 3")
        browser.run("document.querySelector('tr.detail').scrollIntoView({block: 'end'})")
        detail = text_of(browser, "tr.detail")
        assert "Time to first token" in detail and "Device" in detail and "Decode" in detail
        browser.screenshot(tmp_path / "request.png")
    finally:
        stop.set()
        for thread in clients:
            thread.join(30)
    browser.wait_for("document.querySelector('#s-run').textContent === '0'")  # the engine's last word is heard
    browser.wait_for("document.querySelector('#scene').classList.contains('idle')")


def test_configuration_theme_and_keyboard(browser: Chromium, server: StoryServer, tmp_path: Path) -> None:
    open_page(browser, server.base, "?theme=light")
    assert browser.run("document.documentElement.dataset.theme") == "light"
    browser.press("t")
    assert browser.run("document.documentElement.dataset.theme") == "dark"
    browser.press("g")
    browser.wait_for("document.querySelector('#config').matches(':popover-open')")
    browser.run("document.querySelector('#config-find').focus()")
    browser.type("flag")
    browser.wait_for("document.querySelectorAll('#config-table tr').length === 2")
    table = text_of(browser, "#config-table")
    assert "--model" in table and "--port" in table
    browser.screenshot(tmp_path / "config.png")
    browser.press("Escape", 27)
    browser.run("document.querySelector('#config').hidePopover(); document.activeElement.blur()")
    browser.press("/")
    assert browser.run("document.activeElement.id") == "message"


def test_on_a_phone_the_three_parts_are_tabs(browser: Chromium, server: StoryServer, tmp_path: Path) -> None:
    ask(server.base, "Hello")
    browser.resize(390, 844, mobile=True)
    open_page(browser, server.base)
    for tab, shown in (("chat", "#chat"), ("engine", "#engine"), ("requests", "#requests")):
        browser.run(f"document.querySelector('.tabs [data-go={tab}]').click()")
        parts = {
            part: browser.run(f"document.querySelector('{part}').offsetParent !== null")
            for part in ("#chat", "#engine", "#requests")
        }
        assert parts == {part: part == shown for part in parts}
        time.sleep(1.2)
        assert browser.run("document.documentElement.scrollWidth <= 390")
        browser.screenshot(tmp_path / f"phone-{tab}.png")


def test_a_lost_connection_dims_the_numbers_and_says_so(browser: Chromium, tmp_path: Path) -> None:
    browser.tolerated = ["ERR_CONNECTION_REFUSED"]
    with story_server() as own:
        ask(own.base, "Hello")
        open_page(browser, own.base)
        browser.wait_for("document.querySelector('#legend b[data-s=used]').textContent === '0'")
        before = text_of(browser, "#legend")
    browser.wait_for("document.body.classList.contains('stale')")
    assert text_of(browser, "#live span") in ("stopped", "retrying")
    assert text_of(browser, "#legend") == before  # the last numbers stay
    send(browser, "Is anybody there?")
    browser.wait_for("document.querySelector('.fault')")
    browser.screenshot(tmp_path / "lost.png")


def test_a_server_with_keys_asks_for_one(browser: Chromium, tmp_path: Path) -> None:
    browser.tolerated = ["401", "ERR_CONNECTION_REFUSED"]
    with story_server(api_keys=("sk-river",)) as own:
        browser.open(f"{own.base}/?theme=dark")
        browser.wait_for("document.querySelector('#key').matches(':popover-open')")
        browser.type("sk-wrong")
        browser.press("Enter")
        browser.wait_for("document.querySelector('#key-why').textContent.includes('did not accept')")
        browser.screenshot(tmp_path / "key.png")
        browser.type("sk-river")
        browser.press("Enter")
        browser.wait_for("document.querySelector('#live span').textContent === 'live'")
        send(browser, "Hello")
        browser.wait_for("document.querySelector('.msg.bot .meta')")
        assert "set, not shown" in browser.run("document.querySelector('#config-table').textContent")
        assert "sk-river" not in browser.run("document.documentElement.outerHTML")


def test_the_policy_blocks_what_the_page_never_does(browser: Chromium, server: StoryServer) -> None:
    """The header is in force: an injected script does not run, and the browser says so."""
    browser.tolerated = ["Content Security Policy"]
    open_page(browser, server.base)
    browser.run(
        "(() => { const s = document.createElement('script');"
        " s.textContent = 'window.pwned = 1'; document.body.append(s); })()"
    )
    assert browser.run("window.pwned ?? null") is None
    assert any("Content Security Policy" in complaint for complaint in browser.complaints)
