"""The service with keys, as its operator starts it, and Chromium beside it."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from playwright.sync_api import Browser, sync_playwright

_FLAGS = ("--no-sandbox", "--disable-gpu", "--disable-background-networking", "--disable-component-update")
_FACTORIES = {"deep": "benchmarks.page.deep:network"}


@contextmanager
def service(folder: Path) -> Iterator[tuple[str, str]]:
    """Start it on a free port; its address and a key."""
    given = {
        **os.environ,
        "NORMSEARCH_DATA": str(folder / "data"),
        "NORMSEARCH_FACTORIES": json.dumps(_FACTORIES),
        "NORMSEARCH_RESERVE_BYTES": "0",
        "NORMSEARCH_REQUESTS_PER_MINUTE": "100000",
    }
    words = [sys.executable, "-m", "api"]
    made = subprocess.run(
        [*words, "keys", "create", "page"], env=given, check=True, stdout=subprocess.PIPE, text=True
    )
    log = folder / "log"
    with log.open("wb") as stderr:
        process = subprocess.Popen([*words, "serve", "--port", "0"], env=given, stderr=stderr)
    try:
        deadline = time.monotonic() + 120
        while not (found := re.search(r"running on (http://127\.0\.0\.1:\d+)", log.read_text())):
            if process.poll() is not None or time.monotonic() > deadline:
                raise RuntimeError(log.read_text())
            time.sleep(0.1)
        yield found[1], made.stdout.strip()
    finally:
        process.terminate()
        process.wait(60)


@contextmanager
def chromium() -> Iterator[Browser]:
    """Chromium of the system, without a window."""
    path = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
    if path is None:
        raise SystemExit("chromium is not installed: apt-get install chromium")
    with sync_playwright() as driver:
        started = driver.chromium.launch(executable_path=path, args=list(_FLAGS))
        try:
            yield started
        finally:
            started.close()
