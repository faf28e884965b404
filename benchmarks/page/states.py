"""Every state of the page: what a user did to come there, done once, and pictures of it."""

from __future__ import annotations

import io
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
from PIL import Image
from playwright.sync_api import Browser, BrowserContext, Page
from safetensors.torch import load_file

import normsearch
from api.engine import digits
from benchmarks.page import deep

SIZES = {1280: 900, 390: 844}
SCHEMES = ("light", "dark")
EXAMPLE = Path(__file__).parents[2] / "api" / "page" / "example"
_PATIENCE = 900_000
_KEY = "normsearch.key"
_RUNNING = 20_000


class Tour:
    """Goes through the states.

    Args:
        browser: Chromium.
        base: the service's address.
        secret: a key of it.
        folder: where pictures go.
        all_schemes: take each size in light and dark, not the large one in light and the small one in dark.

    """

    def __init__(
        self, browser: Browser, base: str, secret: str, folder: Path, work: Path, all_schemes: bool
    ) -> None:
        self._browser, self._base, self._secret = browser, base, secret
        self._folder, self._work = folder, work
        self._views = [
            (width, scheme)
            for width in SIZES
            for scheme in SCHEMES
            if all_schemes or (width == 1280) == (scheme == "light")
        ]

    def run(self) -> None:
        """Take every picture."""
        self._picture("key", "", lambda page: page.wait_for_selector("#key"), with_key=False)
        self._picture("key-wrong", "", self._wrong_key, with_key=False)
        self._picture("start-empty", "", _settled("#jobs-empty:not([hidden])", "#models-empty:not([hidden])"))
        self._picture("architecture", "", self._search)
        self._picture("uploading", "", self._uploading)
        self._picture("upload-refused", "", self._refused)
        self._picture("upload-program", "", self._program)
        with self._tab(1280, "light") as page:
            program = self._read_program(page)
            model, jobs = self._example(page)
            large = self._large(page)
        chosen = _settled("#sites .body .m", "#sites-scroll[aria-busy=false]")
        self._picture("model", model, chosen)
        self._picture("model-table", model, _then(chosen, _to(".toolbar")))
        self._picture("model-run", model, _then(chosen, _to("#h-plan")))
        self._picture(
            "model-search", model, _then(chosen, lambda page: page.click("#run-searches"), _to("#h-run"))
        )
        self._picture("model-program", program, _then(chosen, _to("#h-plan")))
        self._picture("site", model, _then(chosen, lambda page: page.locator("button.gets").last.click()))
        self._picture("plan-refused", model, _then(chosen, _choose_refused))
        self._picture("model-500", large, chosen)
        for name, address in jobs.items():
            self._picture(f"job-{name}", address, _settled("#job-state"))
        report = _settled("#report-part:not([hidden])")
        self._picture("report-conversion", jobs["conversion"], _then(report, _in_report("#depth")))
        self._picture("report-sensitivity", jobs["sensitivity"], _then(report, _in_report("#sensitivity")))
        self._picture("report-search", jobs["search"], _then(report, _in_report("#scores")))
        self._picture("report-pareto", jobs["search"], _then(report, _in_report("#front")))
        self._running(jobs["conversion"])
        self._picture("start", "", _settled("#jobs-scroll:not([hidden])", "#models-scroll:not([hidden])"))
        self._picture("missing", "#/jobs/job_0", _settled("#view-missing:not([hidden])"))
        self._picture("offline", "", self._offline)

    @contextmanager
    def _tab(self, width: int, scheme: str, with_key: bool = True) -> Iterator[Page]:
        context = self._browser.new_context(
            viewport={"width": width, "height": SIZES[width]},
            color_scheme="dark" if scheme == "dark" else "light",
            reduced_motion="reduce",
        )
        context.set_default_timeout(_PATIENCE)
        page = context.new_page()
        if with_key:
            self._enter(page)
        yield page
        context.close()

    def _enter(self, page: Page) -> None:
        page.goto(self._base)
        page.fill("#key", self._secret)
        page.keyboard.press("Enter")
        page.wait_for_selector("#view-start:not([hidden])")

    def _picture(
        self, name: str, address: str, prepare: Callable[[Page], object], with_key: bool = True
    ) -> None:
        for width, scheme in self._views:
            with self._tab(width, scheme, with_key) as page:
                self._restore(page.context)
                page.goto(f"{self._base}/{address}")
                if address and with_key:
                    page.reload()
                prepare(page)
                self._take(page, name, width, scheme)

    def _take(self, page: Page, name: str, width: int, scheme: str) -> None:
        page.wait_for_timeout(400)
        image = Image.open(io.BytesIO(page.screenshot()))
        self._folder.mkdir(parents=True, exist_ok=True)
        image.save(self._folder / f"{name}-{width}-{scheme}.webp", quality=72, method=6)

    def _wrong_key(self, page: Page) -> None:
        page.fill("#key", "nsk_not_a_key")
        page.keyboard.press("Enter")
        page.wait_for_selector("#key-error:not([hidden])")

    def _search(self, page: Page) -> None:
        page.locator("#architecture").press_sequentially("resnet5")
        page.wait_for_selector("#architectures [role=option]:has-text('resnet5')")
        page.keyboard.press("ArrowDown")

    def _uploading(self, page: Page) -> None:
        session = page.context.new_cdp_session(page)
        conditions = {"offline": False, "latency": 0, "downloadThroughput": -1, "uploadThroughput": 2_000_000}
        session.send("Network.emulateNetworkConditions", conditions)
        page.set_input_files("#file", self._file("resnet50.pth", bytes(30_000_000)))
        page.wait_for_timeout(500)
        page.click("#upload-button")
        page.wait_for_selector("#upload-text:has-text('left')")
        page.locator("#upload-progress").scroll_into_view_if_needed()

    def _refused(self, page: Page) -> None:
        torch.save(deep.network().state_dict(), held := io.BytesIO())
        page.set_input_files("#file", self._file("mine.pth", held.getvalue()))
        page.fill("#architecture", "torchvision/resnet18")
        page.click("#upload-button")
        page.wait_for_selector("#upload-error:not([hidden])")
        page.locator("#upload-error").scroll_into_view_if_needed()

    def _program(self, page: Page) -> None:
        network = digits.network().eval()
        network.load_state_dict(load_file(EXAMPLE / "digits.safetensors"))
        normsearch.export(network, self._work / "digits.pt2", torch.randn(4, 1, 8, 8), force=True)
        page.set_input_files("#file", self._work / "digits.pt2")
        page.wait_for_selector("#complete:not([hidden])")

    def _read_program(self, page: Page) -> str:
        self._program(page)
        page.click("#upload-button")
        page.wait_for_selector("#sites .body .m")
        page.select_option("#all", "group")
        address = _address(page)
        page.goto(f"{self._base}/#/")
        page.wait_for_selector("#view-start:not([hidden])")
        return address

    def _file(self, name: str, content: bytes) -> Path:
        path = self._work / name
        path.write_bytes(content)
        return path

    def _example(self, page: Page) -> tuple[str, dict[str, str]]:
        """Have the example converted, calibrated, measured and searched; return where each can be seen."""
        page.click("#try")
        page.wait_for_selector("#sites .body .m")
        page.fill("#pattern", "blocks.2.*")
        page.select_option("#rule-method", "batch_renorm")
        page.click("#add-rule")
        self._kept = page.evaluate("() => Object.entries(localStorage)")
        model = _address(page)
        page.click("#convert-now")
        jobs = {"conversion": self._ended(page, "succeeded")}
        page.fill("#run-budget", "60")
        page.click("#next button.primary")
        page.wait_for_selector("#h-job:has-text('Calibration')")
        jobs["calibration"] = self._ended(page, "succeeded")
        page.goto(f"{self._base}/{model}")
        page.wait_for_selector("#sites .body .m")
        page.click("#run-sensitivities")
        page.click("#run-panel button.primary")
        jobs["sensitivity"] = self._ended(page, "succeeded")
        page.goto(f"{self._base}/{model}")
        page.wait_for_selector("#sites .body .m")
        page.click("#run-searches")
        page.fill("#run-trials", "14")
        page.fill("#run-steps", "30")
        page.fill("#run-confirm", "2")
        page.check("#run-panel [name=latency]")
        page.click("#run-panel button.primary")
        jobs["search"] = self._ended(page, "succeeded")
        jobs["failed"] = self._failed(page, model)
        return model, jobs

    def _failed(self, page: Page, model: str) -> str:
        made = page.request.post(
            f"{self._base}/v1/conversions",
            data={"model": model.rpartition("/")[2], "to": "group", "input_shape": "3x8x8"},
            headers={"Authorization": f"Bearer {self._secret}"},
        )
        page.goto(f"{self._base}/#/jobs/{made.json()['id']}")
        return self._ended(page, "failed")

    def _ended(self, page: Page, state: str) -> str:
        page.wait_for_selector("#view-job:not([hidden])")
        page.wait_for_selector(f"#job-state.{state}")
        return _address(page)

    def _large(self, page: Page) -> str:
        torch.save(deep.network().state_dict(), held := io.BytesIO())
        page.goto(f"{self._base}/#/")
        page.wait_for_selector("#view-start:not([hidden])")
        page.set_input_files("#file", self._file("deep.pth", held.getvalue()))
        page.fill("#architecture", "factories/deep")
        page.click("#upload-button")
        page.wait_for_selector("#sites .body [role=row]")
        page.select_option("#all", "group")
        page.select_option("#inputs", "random")
        page.fill("#shape", "3x16x16")
        page.keyboard.press("Tab")
        self._kept = page.evaluate("() => Object.entries(localStorage)")
        return _address(page)

    def _restore(self, context: BrowserContext) -> None:
        """Give a new context what the browser remembered."""
        for name, value in getattr(self, "_kept", []):
            context.pages[0].evaluate("([name, value]) => localStorage.setItem(name, value)", [name, value])

    def _running(self, conversion: str) -> None:
        """Follow a long calibration, then cancel it."""
        with self._tab(1280, "light") as page:
            page.goto(f"{self._base}/{conversion}")
            page.wait_for_selector("#next-part:not([hidden])")
            page.fill("#run-budget", str(_RUNNING))
            page.click("#next button.primary")
            page.wait_for_selector("#job-count:has-text(' of ')")
            job = _address(page)
            self._picture("job-running", job, _settled("#job-eta:has-text('left')"))
            page.click("#cancel-job")
            self._ended(page, "cancelled")
        self._picture(
            "job-cancelled", job, _settled("#job-state.cancelled", "#job-log:has-text('Cancelled')")
        )

    def _offline(self, page: Page) -> None:
        page.wait_for_selector("#jobs-scroll:not([hidden])")
        page.context.set_offline(True)
        page.locator("#jobs a").first.click()
        page.wait_for_selector("#offline:not([hidden])")


def _address(page: Page) -> str:
    return f"#{page.url.partition('#')[2]}"


def _settled(*selectors: str) -> Callable[[Page], object]:
    def wait(page: Page) -> None:
        for selector in selectors:
            # On a phone some of it is not visible.
            page.wait_for_selector(selector, state="attached")
        page.wait_for_timeout(1500)

    return wait


def _then(*steps: Callable[[Page], object]) -> Callable[[Page], object]:
    def all_of_them(page: Page) -> None:
        for step in steps:
            step(page)

    return all_of_them


def _to(selector: str) -> Callable[[Page], object]:
    return lambda page: page.locator(selector).evaluate("(one) => one.scrollIntoView({ block: 'start' })")


def _in_report(selector: str) -> Callable[[Page], object]:
    def scroll(page: Page) -> None:
        place = page.frame_locator("#report").locator(selector)
        if not place.count():
            place = page.frame_locator("#report").locator("#layers, #trials").first
        place.evaluate("(one) => one.scrollIntoView({ block: 'start' })")

    return scroll


def _choose_refused(page: Page) -> None:
    page.select_option("#all", "instance")
    page.wait_for_selector("#summary:has-text('refused')")
    page.wait_for_selector("#choose-error:not([hidden])")
