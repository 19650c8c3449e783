"""A headless Chromium that tests click through, driven by the DevTools protocol over a pipe: no package, no port.

with open_browser(tmp_path) as browser:
    browser.open(tmp_path / "page.html")
    browser.click("#next")
    assert browser.text("#turn") == "2"
assert browser.problems == [] and browser.requests == []
"""

import base64
import contextlib
import json
import os
import select
import shlex
import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.processes import WAIT_S, killed_after

_PROGRAMS = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable")
_FLAGS = (
    "--headless",
    "--no-sandbox",  # as root Chromium does not start with one; the pages are our own
    "--disable-gpu",
    "--disable-dev-shm-usage",
    "--disable-background-networking",
    "--disable-component-update",
    "--no-first-run",
    "--hide-scrollbars",
    "--window-size=1280,900",
    "--remote-debugging-pipe",
)
_FIND = "document.querySelector({selector})"
_MIDDLE = """(() => {{
  const element = document.querySelector({selector});
  if (!element) return "there is none";
  element.scrollIntoView({{ block: "center", inline: "center", behavior: "instant" }});
  const box = element.getBoundingClientRect(), x = box.x + box.width / 2, y = box.y + box.height / 2;
  const top = document.elementFromPoint(x, y);
  if (!element.contains(top)) return `it is covered by ${{top && top.outerHTML.slice(0, 80)}}`;
  return [x, y];
}})()"""
_KEY_CODES = {"ArrowLeft": 37, "ArrowUp": 38, "ArrowRight": 39, "ArrowDown": 40, "Escape": 27, "Enter": 13, " ": 32}


class Browser:
    """One page of Chromium. `problems` are its script errors and failed loads, `requests` what it asked a network for.

    `browser.evaluate` returns a JavaScript value. Clicks and keys are events of a mouse and a keyboard, so an element
    that is hidden or covered cannot be clicked.
    """

    def __init__(self, commands: int, answers: int) -> None:
        self.problems: list[str] = []
        self.requests: list[str] = []
        self._commands, self._answers, self._unread, self._number = commands, answers, b"", 0
        self._session: str | None = None
        target = self._call("Target.createTarget", url="about:blank")
        attached = self._call("Target.attachToTarget", targetId=target["targetId"], flatten=True)
        self._session = attached["sessionId"]
        for domain in ("Page", "Runtime", "Log", "Network"):
            self._call(f"{domain}.enable")

    def open(self, page: Path | str, *, fragment: str = "") -> None:
        """Open a file, and return when it has loaded."""
        address = Path(page).resolve().as_uri() + (f"#{fragment}" if fragment else "")
        self._call("Page.navigate", url="about:blank")  # else another fragment of the same file would not load it again
        self._call("Page.navigate", url=address)
        self.wait_until(f"location.href.startsWith({json.dumps(address)}) && document.readyState === 'complete'")

    def resize(self, width: int, height: int) -> None:
        """Give the page another size, in pixels."""
        self._call("Emulation.setDeviceMetricsOverride", width=width, height=height, deviceScaleFactor=1, mobile=False)

    def evaluate(self, expression: str) -> Any:
        """Return the value of a JavaScript expression, and what a promise gives."""
        done = self._call("Runtime.evaluate", expression=expression, returnByValue=True, awaitPromise=True)
        assert "exceptionDetails" not in done, f"{expression}: {done['exceptionDetails']}"
        return done["result"].get("value")

    def wait_until(self, condition: str) -> None:
        """Return when a JavaScript condition holds."""
        loop = f"const look = () => ({condition}) ? done() : setTimeout(look, 20); look()"
        with contextlib.suppress(_PageLeftError):
            self.evaluate(f"new Promise(done => {{ {loop} }})")
            return
        self.wait_until(condition)

    def text(self, selector: str) -> str:
        """Return the visible text of the first element of a CSS selector."""
        return self.evaluate(f"{_FIND.format(selector=json.dumps(selector))}.innerText")

    def count(self, selector: str) -> int:
        """Return how many elements of a CSS selector are shown."""
        found = f"[...document.querySelectorAll({json.dumps(selector)})]"
        return self.evaluate(f"{found}.filter(element => element.getClientRects().length).length")

    def click(self, selector: str) -> None:
        """Click the middle of the first element of a CSS selector; fail where the mouse would not reach it."""
        place = self.evaluate(_MIDDLE.format(selector=json.dumps(selector)))
        assert isinstance(place, list), f"{selector} cannot be clicked: {place}"
        for kind in ("mousePressed", "mouseReleased"):
            self._call("Input.dispatchMouseEvent", type=kind, x=place[0], y=place[1], button="left", clickCount=1)

    def press(self, key: str) -> None:
        """Press a key: "ArrowRight", "Escape", or one that writes a character."""
        code = _KEY_CODES.get(key, ord(key.upper()[0]))
        text = {"text": key} if len(key) == 1 else {}
        self._call("Input.dispatchKeyEvent", type="keyDown", key=key, windowsVirtualKeyCode=code, **text)
        self._call("Input.dispatchKeyEvent", type="keyUp", key=key, windowsVirtualKeyCode=code)

    def choose(self, selector: str, value: str) -> None:
        """Choose an option of a <select>, or set an <input>, as a user would: with its events."""
        element = _FIND.format(selector=json.dumps(selector))
        assert self.evaluate(
            f"(() => {{ const e = {element}; e.value = {json.dumps(value)}; for (const name of ['input', 'change']) "
            f"e.dispatchEvent(new Event(name, {{ bubbles: true }})); return e.value === {json.dumps(value)} }})()"
        ), f"{selector} has no {value!r}"

    def screenshot(self, path: Path | str) -> Path:
        """Write what is shown as a PNG."""
        picture = self._call("Page.captureScreenshot", format="png")
        Path(path).write_bytes(base64.b64decode(picture["data"]))
        return Path(path)

    def _call(self, method: str, **parameters: Any) -> dict[str, Any]:
        self._number += 1
        command = {"id": self._number, "method": method, "params": parameters}
        if self._session:
            command["sessionId"] = self._session
        os.write(self._commands, json.dumps(command).encode() + b"\0")
        while True:
            message = self._read()
            if message.get("id") != self._number:
                self._note(message.get("method"), message.get("params", {}))
            elif "error" in message and any(words in message["error"]["message"] for words in _PAGE_LEFT):
                raise _PageLeftError(method)
            else:
                assert "error" not in message, f"{method}: {message['error']}"
                return message["result"]

    def _read(self) -> dict[str, Any]:
        while b"\0" not in self._unread:
            assert select.select([self._answers], [], [], WAIT_S)[0], f"Chromium did not answer within {WAIT_S} s"
            content = os.read(self._answers, 1 << 20)
            assert content, "Chromium ended"
            self._unread += content
        message, _, self._unread = self._unread.partition(b"\0")
        return json.loads(message)

    def _note(self, method: str | None, parameters: dict[str, Any]) -> None:
        if method == "Runtime.exceptionThrown":
            self.problems.append(parameters["exceptionDetails"].get("exception", {}).get("description", "exception"))
        elif method == "Log.entryAdded" and parameters["entry"]["level"] == "error":
            self.problems.append(parameters["entry"]["text"])
        elif method == "Network.requestWillBeSent":
            address = parameters["request"]["url"]
            if not address.startswith(("file:", "data:", "about:", "blob:")):
                self.requests.append(address)


_PAGE_LEFT = ("context was destroyed", "target navigated or closed")
"""What Chromium says of an expression whose page was left, before or while it evaluates it."""


class _PageLeftError(Exception):
    """An expression was not evaluated to its end, because the page loaded another one."""


@contextlib.contextmanager
def open_browser(folder: Path) -> Iterator[Browser]:
    """Start Chromium with an empty profile below `folder`, end it afterwards; skip the test where there is none."""
    program = next(filter(None, map(shutil.which, _PROGRAMS)), None)
    if program is None:
        pytest.skip("needs Chromium (Debian: apt-get install chromium)")
    read_commands, commands = os.pipe()
    answers, write_answers = os.pipe()
    try:
        # The protocol's pipe has fixed numbers: 3 for commands, 4 for answers.
        flags = shlex.join([*_FLAGS, f"--user-data-dir={folder / 'chromium-profile'}"])
        script = f"exec {shlex.quote(program)} {flags} 3<&{read_commands} 4>&{write_answers}"
        process = subprocess.Popen(
            ["bash", "-c", script],
            pass_fds=(read_commands, write_answers),
            stdin=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
        )
        os.close(read_commands)
        os.close(write_answers)
        with killed_after(process):
            yield Browser(commands, answers)
            os.write(commands, json.dumps({"id": 0, "method": "Browser.close"}).encode() + b"\0")
            process.wait(WAIT_S)
    finally:
        os.close(commands)
        os.close(answers)
