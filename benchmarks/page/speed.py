"""How quick the page is: the server's part of the first paint, and a model of 500 sites in the browser."""

from __future__ import annotations

import io
import statistics
import time
import urllib.request
from importlib.metadata import version

import torch
from playwright.sync_api import Browser, Page

from benchmarks.page import deep

_REQUESTS = 200
#: From an event until the browser has shown what came of it.
_INTERACTION = """async ([selector, kind, value]) => {
  const element = document.querySelector(selector);
  if (value !== null) element.value = value;
  const start = performance.now();
  if (kind === "click") element.click();
  else element.dispatchEvent(new Event(kind, { bubbles: true }));
  // What is typed is acted on when nothing more comes for 80 ms.
  if (kind === "input") await new Promise((done) => setTimeout(done, 90));
  await new Promise((done) => requestAnimationFrame(() => setTimeout(done)));
  return performance.now() - start - (kind === "input" ? 90 : 0);
}"""
_LONG_TASKS = """() => new Promise((done) => {
  const found = [];
  new PerformanceObserver((list) => found.push(...list.getEntries().map((one) => one.duration)))
    .observe({ type: "longtask", buffered: true });
  setTimeout(() => done(found), 300);
})"""


def measure(browser: Browser, base: str, secret: str) -> None:
    """Print every figure."""
    print(f"Chromium {browser.version}, Playwright {version('playwright')}")
    seconds = []
    for _ in range(_REQUESTS):
        start = time.perf_counter()
        with urllib.request.urlopen(base) as answer:
            answer.read()
        seconds.append(time.perf_counter() - start)
    quantiles = [1000 * one for one in statistics.quantiles(seconds, n=100)]
    print(f"/ over a connection of its own: median {quantiles[49]:.1f} ms, p99 {quantiles[98]:.1f} ms")
    page = browser.new_context(viewport={"width": 1280, "height": 900}).new_page()
    page.set_default_timeout(180_000)
    _enter(page, base, secret)
    paint = page.evaluate("() => performance.getEntriesByName('first-contentful-paint')[0].startTime")
    print(f"first contentful paint {paint:.0f} ms after the address was entered")
    sites = _large(page)
    tasks = page.evaluate(_LONG_TASKS)
    print(f"{sites} sites: longest task of the browser until all is shown {max(tasks, default=0):.0f} ms")
    steps = (
        ("one method for every site", "#all", "change", "group"),
        ("another", "#all", "change", "frozen"),
        ("filter to 4 rows", "#filter", "input", "99."),
        ("all rows again", "#filter", "input", ""),
        ("a site's dialog", "#sites .gets", "click", None),
    )
    for name, selector, kind, value in steps:
        took = page.evaluate(_INTERACTION, [selector, kind, value])
        print(f"    {name}: shown after {took:.0f} ms")


def _enter(page: Page, base: str, secret: str) -> None:
    page.goto(base)
    page.fill("#key", secret)
    page.keyboard.press("Enter")
    page.wait_for_selector("#view-start:not([hidden])")


def _large(page: Page) -> int:
    torch.save(deep.network().state_dict(), held := io.BytesIO())
    page.set_input_files(
        "#file", {"name": "deep.pth", "mimeType": "application/octet-stream", "buffer": held.getvalue()}
    )
    page.fill("#architecture", "factories/deep")
    page.click("#upload-button")
    page.wait_for_selector("#sites .body .m")
    page.wait_for_selector("#sites-scroll[aria-busy=false]")
    page.wait_for_timeout(3000)
    return page.locator("#sites .body [role=row]").count()
