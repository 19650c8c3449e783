"""The browser that tests of HTML pages use: real clicks and keys, and no error or request goes unseen."""

from pathlib import Path

import pytest

from tests.browser import open_browser

PAGE = """<!doctype html><title>page</title><script>
addEventListener("keydown", event => { document.querySelector("#key").innerText = event.key; });
</script>
<p id="key">none</p><p id="count">0</p>
<button id="next" onclick="count.innerText = Number(count.innerText) + 1">next</button>
<select id="button"><option>up</option><option>down</option></select>
<p id="far" style="margin-top: 5000px" onclick="count.innerText = 'far'">far below</p>
<div id="hidden" style="display: none">hidden</div>
<button id="wrong" onclick="missing()">wrong</button>
<button id="ask" onclick="fetch('http://127.0.0.1:9/x').catch(() => 0)">ask</button>
<div style="position: relative"><button id="covered">covered</button>
<div style="position: absolute; inset: 0; background: white"></div></div>
"""


def test_a_page_is_clicked_and_its_errors_and_requests_are_seen(tmp_path: Path) -> None:
    (tmp_path / "page.html").write_text(PAGE)
    with open_browser(tmp_path) as browser:
        browser.open(tmp_path / "page.html", fragment="here")
        assert browser.evaluate("location.hash") == "#here"
        browser.click("#next")
        browser.click("#next")
        browser.press("ArrowRight")
        browser.choose("#button", "down")
        assert [browser.text("#count"), browser.text("#key")] == ["2", "ArrowRight"]
        assert browser.evaluate("document.querySelector('#button').value") == "down"
        browser.click("#far")
        assert browser.text("#count") == "far"
        assert [browser.count("p"), browser.count("#hidden")] == [3, 0]
        with pytest.raises(AssertionError, match="covered"):
            browser.click("#covered")
        assert (browser.problems, browser.requests) == ([], [])
        browser.click("#wrong")
        browser.click("#ask")
        browser.wait_until("true")
        assert "missing is not defined" in browser.problems[0]
        assert browser.requests == ["http://127.0.0.1:9/x"]
        assert browser.screenshot(tmp_path / "page.png").stat().st_size > 1000
