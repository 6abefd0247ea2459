"""The page of a cluster in a real browser: engines, arrows between them, tiers, routes, and why a request went where.

Screenshots go to pytest's temporary directory, so that a person can look at what the test saw.
"""

from __future__ import annotations

import json
import threading
import urllib.request
from collections.abc import Iterator
from pathlib import Path

import pytest
from tests.server.chromium import Chromium, chromium, find_chromium
from tests.server.cluster_server import ClusterServer, cluster_server

pytestmark = pytest.mark.browser


@pytest.fixture(scope="module")
def opened(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[Chromium, ClusterServer]]:
    program = find_chromium()
    if program is None:
        pytest.skip("needs a headless Chromium: none is installed (Debian: apt-get install chromium)")
    with cluster_server() as server, chromium(program, tmp_path_factory.mktemp("profile")) as browser:
        yield browser, server


@pytest.fixture
def browser(opened: tuple[Chromium, ClusterServer]) -> Iterator[Chromium]:
    browser, server = opened
    browser.resize(1280, 1000)
    browser.open(f"{server.base}/?theme=dark")
    browser.wait_for("document.querySelector('#live span').textContent === 'live'")
    yield browser
    assert browser.judge() == []


def ask(base: str, request_id: str, max_tokens: int = 100) -> None:
    """A request of some other client."""
    body = json.dumps({"prompt": [7] * 30, "max_tokens": max_tokens, "temperature": 0}).encode()
    headers = {"content-type": "application/json", "x-request-id": request_id}
    with urllib.request.urlopen(urllib.request.Request(f"{base}/v1/completions", body, headers), timeout=30) as answer:
        answer.read()


def text_of(browser: Chromium, selector: str) -> str:
    return str(browser.run(f"document.querySelector({json.dumps(selector)})?.innerText ?? ''"))


def test_engines_arrows_and_tiers_are_drawn(
    opened: tuple[Chromium, ClusterServer], browser: Chromium, tmp_path: Path
) -> None:
    base = opened[1].base
    asking = [threading.Thread(target=ask, args=(base, f"shown-{number}", 300)) for number in range(4)]
    for thread in asking:
        thread.start()
    try:
        browser.wait_for("document.querySelectorAll('.eng').length === 3")
        assert text_of(browser, "#scene-sub") == "1 prefill, 2 decode"
        browser.wait_for("document.querySelector('.eng[data-id=decode-1] .ef').textContent.includes('running')")
        # The prefill engine stands left of the others, and an arrow with some width leads from it to decode-0.
        assert browser.run(
            "(() => { const at = id => document.querySelector(`.eng[data-id=${id}]`).getBoundingClientRect();"
            " return at('prefill-0').right < at('decode-0').left && at('decode-0').bottom < at('decode-1').top; })()"
        )
        browser.wait_for("parseFloat(document.querySelector('[data-l=\"prefill-0 decode-0\"]')?.style.strokeWidth) > 0")
        assert "/s" in text_of(browser, ".flow-facts") and "exposed" in text_of(browser, ".flow-facts")
        for card in ("#routes-card", "#xfer-card", "#tiers-card"):
            browser.wait_for(f"document.querySelector('{card}').getBoundingClientRect().height > 0")
        browser.wait_for("document.querySelector('#decisions').textContent.includes('prefill-0 → decode-')")
        assert "fewest tokens" in text_of(browser, "#decisions")
        assert "Prompts handed over" in text_of(browser, "#handoffs")
        browser.wait_for("document.querySelector('#flow svg').textContent.includes('Disk')")
        tiers = text_of(browser, "#tiers")
        assert "Host" in tiers and "100 of 400 blocks" in tiers and "off: loads took longer" in tiers
        assert tiers.index("Host") < tiers.index("Disk")
        flow = str(browser.run("document.querySelector('#flow svg').textContent"))
        for source in ("Device", "Other engine", "Host", "Disk", "Recompute"):
            assert source in flow
        assert browser.run("document.documentElement.scrollWidth <= 1280")
        browser.screenshot(tmp_path / "cluster.png")
    finally:
        for thread in asking:
            thread.join()


def test_why_a_request_went_where(opened: tuple[Chromium, ClusterServer], browser: Chromium, tmp_path: Path) -> None:
    ask(opened[1].base, "explained")
    row = "document.querySelector('tr.r[data-id=explained]')"
    browser.wait_for(row)
    browser.run(f"{row}.focus()")
    browser.press("Enter")
    browser.wait_for("document.querySelector('.route-why')")
    told = text_of(browser, "tr.detail")
    for word in ("Route", "fewest tokens to do", "Decoded by", "decode-", "Prompt computed by", "prefill-0"):
        assert word in told, told
    browser.screenshot(tmp_path / "route.png")


def test_a_phone_shows_it_too(opened: tuple[Chromium, ClusterServer], browser: Chromium, tmp_path: Path) -> None:
    browser.resize(390, 844, mobile=True)
    browser.open(f"{opened[1].base}/?tab=engine")
    browser.wait_for("document.querySelectorAll('.eng').length === 3")
    browser.wait_for("document.querySelector('#tiers-card').getBoundingClientRect().height > 0")
    assert browser.run("document.documentElement.scrollWidth <= 390")
    browser.screenshot(tmp_path / "phone.png")
