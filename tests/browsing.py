"""A browser, looked over the shoulder: what it says, whom it asks, and how accessible a page is."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import pytest

CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
_FLAGS = (
    *("--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run", "--disable-sync"),
    *("--disable-background-networking", "--disable-component-update", "--disable-default-apps"),
)
#: axe-core, under the licence beside it.
_AXE = (Path(__file__).parent / "axe" / "axe.min.js").read_text("utf-8")
#: Milliseconds that anything may take on a busy machine.
PATIENCE = 300_000


def playwright() -> Any:
    """Return what drives the browser, or skip the test by the name of what is missing."""
    if CHROMIUM is None:
        pytest.skip("chromium is not installed: apt-get install chromium")
    return pytest.importorskip("playwright.sync_api", reason="playwright is not installed")


@contextmanager
def browser() -> Iterator[Any]:
    """Chromium, without a window."""
    with playwright().sync_playwright() as driver:
        started = driver.chromium.launch(executable_path=CHROMIUM, args=list(_FLAGS))
        try:
            yield started
        finally:
            started.close()


class Tab:
    """A tab of a context, with what it said and asked.

    Attributes:
        page: Playwright's page.
        said: lines of its console but those that a refusal leaves, and its errors.
        asked: addresses that it asked.

    """

    def __init__(self, context: Any, base: str) -> None:
        self.page = context.new_page()
        self.page.set_default_timeout(PATIENCE)
        self.base, self.said, self.asked = base, [], []
        self.page.on("console", self._hear)
        self.page.on("pageerror", lambda error: self.said.append(str(error)))
        self.page.on("request", lambda request: self.asked.append(request.url))

    def _hear(self, message: Any) -> None:
        # The browser's own lines: for an answer of 4xx and 5xx, or for none, of which is tested what the page
        # makes; and for what drives the browser, when it looks into a frame in which nothing may run.
        if not message.text.startswith(("Failed to load resource:", "Blocked script execution in 'blob:")):
            self.said.append(message.text)

    def open(self, address: str = "") -> Any:
        """Go to an address of the page, loading it anew."""
        self.page.goto(f"{self.base}/{address}")
        if address:
            # An address that differs behind # alone loads nothing.
            self.page.reload()
        return self.page

    def shows(self, view: str) -> None:
        """Wait until a view is shown."""
        self.page.wait_for_selector(f"#view-{view}:not([hidden])")

    def is_clean(self) -> None:
        """Assert that nothing was said, and nobody else asked."""
        assert not self.said, self.said
        own = urlsplit(self.base).netloc
        strangers = [
            url
            for url in self.asked
            if urlsplit(url).netloc != own and not url.startswith(("blob:", "data:"))
        ]
        assert not strangers, strangers

    def violations(self) -> list[str]:
        """Return what axe-core finds that is serious, or worse, each with its place."""
        session = self.page.context.new_cdp_session(self.page)
        session.send("Runtime.evaluate", {"expression": _AXE})
        asked = "axe.run(document, {iframes: false, resultTypes: ['violations']}).then(JSON.stringify)"
        answer = session.send(
            "Runtime.evaluate", {"expression": asked, "awaitPromise": True, "returnByValue": True}
        )
        session.detach()
        found = json.loads(answer["result"]["value"])
        assert found["passes"] or found["violations"] or found["incomplete"]
        return [
            f"{one['id']}: {node['html'][:200]}"
            for one in found["violations"]
            if one["impact"] in ("serious", "critical")
            for node in one["nodes"]
        ]
