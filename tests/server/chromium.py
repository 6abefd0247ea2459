"""A headless Chromium, driven over the DevTools protocol through two pipes: no driver program, no port, no dependency.

Knows the protocol as far as the page's test needs it: navigate, evaluate, keys, screenshots, and what the console and
the security policy complained about. The browser gets an empty profile and loads nothing but what the test serves.
"""

from __future__ import annotations

import base64
import contextlib
import fcntl
import json
import os
import select
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

PROGRAMS = ("chromium", "chromium-browser", "google-chrome", "chrome")
FLAGS = (
    "--headless",
    "--no-sandbox",  # tests run as root in containers; the only page is ours
    "--disable-gpu",
    "--disable-quic",
    "--disable-dev-shm-usage",
    "--no-first-run",
    "--no-default-browser-check",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
    "--disable-extensions",
    "--remote-debugging-pipe",
)
# Chromium reads commands from descriptor 3 and writes answers to 4.
LAUNCHER = "import os,sys;os.dup2(int(sys.argv[1]),3);os.dup2(int(sys.argv[2]),4);os.execv(sys.argv[3],sys.argv[3:])"


def find_chromium() -> str | None:
    """Path of an installed Chromium, or None."""
    return next((found for name in PROGRAMS if (found := shutil.which(name))), None)


class BrowserError(RuntimeError):
    """The browser does not answer, or a script in the page threw."""


class Chromium:
    """One browser with one tab. Not thread-safe."""

    def __init__(self, program: str, profile: Path, width: int = 1280, height: int = 1000) -> None:
        command_read, command_write = os.pipe()
        answer_read, answer_write = os.pipe()
        # Above 10, so that the launcher's dup2 to 3 and 4 cannot overwrite the other one.
        given = [fcntl.fcntl(fd, fcntl.F_DUPFD, 10) for fd in (command_read, answer_write)]
        self._write, self._read = command_write, answer_read
        own = [program, *FLAGS, f"--user-data-dir={profile}", f"--window-size={width},{height}", "about:blank"]
        self.process = subprocess.Popen(
            [sys.executable, "-c", LAUNCHER, *map(str, given), *own],
            pass_fds=given,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
            start_new_session=True,
        )
        for fd in (*given, command_read, answer_write):
            os.close(fd)
        self._rest = b""
        self._last_id = 0
        self.complaints: list[str] = []  # console errors, uncaught exceptions, policy violations, failed loads
        self.tolerated: list[str] = []  # pieces of complaints that a test expects
        (page,) = [t for t in self.call("Target.getTargets")["targetInfos"] if t["type"] == "page"]
        attached = self.call("Target.attachToTarget", targetId=page["targetId"], flatten=True)
        self._session: str | None = attached["sessionId"]
        for domain in ("Page", "Runtime", "Log", "Network"):
            self.call(f"{domain}.enable")

    # ---- protocol ----

    _session: str | None = None

    def call(self, method: str, timeout_s: float = 30.0, **params: Any) -> dict[str, Any]:
        """One command and its result. Raises BrowserError."""
        self._last_id += 1
        message: dict[str, Any] = {"id": self._last_id, "method": method, "params": params}
        if self._session is not None:
            message["sessionId"] = self._session
        os.write(self._write, json.dumps(message).encode() + b"\0")
        end = time.monotonic() + timeout_s
        while True:
            answer = self._receive(end)
            if answer.get("id") == self._last_id:
                if "error" in answer:
                    raise BrowserError(f"{method}: {answer['error']['message']}")
                result: dict[str, Any] = answer["result"]
                return result

    def _receive(self, end: float) -> dict[str, Any]:
        while b"\0" not in self._rest:
            if not select.select([self._read], [], [], max(0.0, end - time.monotonic()))[0]:
                raise BrowserError("the browser does not answer")
            data = os.read(self._read, 1 << 20)
            if not data:
                raise BrowserError("the browser has ended")
            self._rest += data
        frame, self._rest = self._rest.split(b"\0", 1)
        message: dict[str, Any] = json.loads(frame)
        self._note(message)
        return message

    def _note(self, message: dict[str, Any]) -> None:
        params = message.get("params", {})
        method = message.get("method")
        if method == "Runtime.exceptionThrown":
            details = params["exceptionDetails"]
            self.complaints.append(details.get("exception", {}).get("description") or details["text"])
        elif method == "Runtime.consoleAPICalled" and params["type"] in ("error", "warning", "assert"):
            self.complaints.append(" ".join(str(a.get("value", a.get("description"))) for a in params["args"]))
        elif method == "Log.entryAdded" and params["entry"]["level"] in ("error", "warning"):
            self.complaints.append(f"{params['entry']['text']} {params['entry'].get('url', '')}".strip())

    def judge(self) -> list[str]:
        """The complaints since the last call that nobody expected; leaves the page."""
        self.open("about:blank")
        found = [c for c in self.complaints if not any(piece in c for piece in self.tolerated)]
        self.complaints, self.tolerated = [], []
        return found

    # ---- the page ----

    def open(self, url: str) -> None:
        """Navigate; returns when the page has been asked for, not when it is complete."""
        found = self.call("Page.navigate", url=url)
        if found.get("errorText"):
            raise BrowserError(f"{url}: {found['errorText']}")

    def run(self, script: str) -> Any:
        """Value of a JavaScript expression (awaited if it is a promise). Raises BrowserError if it throws."""
        found = self.call(
            "Runtime.evaluate", expression=script, returnByValue=True, awaitPromise=True, userGesture=True
        )
        if "exceptionDetails" in found:
            details = found["exceptionDetails"]
            raise BrowserError(details.get("exception", {}).get("description") or details["text"])
        return found["result"].get("value")

    def wait_for(self, script: str, timeout_s: float = 20.0) -> None:
        """Ask until the expression is true (what it throws meanwhile counts as no). Raises BrowserError after
        `timeout_s`."""
        end = time.monotonic() + timeout_s
        thrown = ""
        while time.monotonic() < end:
            try:
                if self.run(f"(async () => !!(await ({script})))()"):
                    return
                thrown = ""
            except BrowserError as error:
                thrown = f" ({error})"
            time.sleep(0.05)
        raise BrowserError(f"never true within {timeout_s:.0f} s: {script}{thrown}")

    def type(self, text: str) -> None:
        """Text into whatever has the focus."""
        self.call("Input.insertText", text=text)

    def press(self, key: str, code: int = 0) -> None:
        """One key down and up; `code` is its Windows virtual key code, needed for keys without text."""
        text = "\r" if key == "Enter" else key if len(key) == 1 else ""
        common = {"key": key, "windowsVirtualKeyCode": code or (13 if key == "Enter" else ord(key.upper()[0]))}
        self.call("Input.dispatchKeyEvent", type="keyDown", text=text, **common)
        self.call("Input.dispatchKeyEvent", type="keyUp", **common)

    def click(self, selector: str) -> None:
        """A mouse click on the middle of an element."""
        where = json.dumps(selector)
        box = self.run(
            f"(() => {{ const n = document.querySelector({where}); n.scrollIntoView({{block: 'nearest'}});"
            " const r = n.getBoundingClientRect(); return [r.x + r.width / 2, r.y + r.height / 2]; })()"
        )
        for kind in ("mousePressed", "mouseReleased"):
            self.call("Input.dispatchMouseEvent", type=kind, x=box[0], y=box[1], button="left", clickCount=1)
        self.call("Input.dispatchMouseEvent", type="mouseMoved", x=1, y=1)

    def resize(self, width: int, height: int, mobile: bool = False) -> None:
        """Size of the page in CSS pixels."""
        self.call("Emulation.setDeviceMetricsOverride", width=width, height=height, deviceScaleFactor=1, mobile=mobile)

    def screenshot(self, path: Path) -> None:
        """What the page looks like now, as PNG."""
        path.write_bytes(base64.b64decode(self.call("Page.captureScreenshot", format="png")["data"]))

    def close(self) -> None:
        """End the browser and wait for it."""
        with contextlib.suppress(BrowserError, OSError):
            self._session = None
            self.call("Browser.close", timeout_s=5)
        os.close(self._write)
        try:
            self.process.wait(10)
        except subprocess.TimeoutExpired:
            self.process.kill()
            self.process.wait(10)
        os.close(self._read)


@contextlib.contextmanager
def chromium(program: str, profile: Path) -> Iterator[Chromium]:
    """A browser that is closed afterwards, whatever happens."""
    browser = Chromium(program, profile)
    try:
        yield browser
    finally:
        browser.close()
