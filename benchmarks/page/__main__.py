"""The service's page: how quick it is, and pictures of every state.

python -m benchmarks.page                 # measures
python -m benchmarks.page --pictures      # and takes the pictures of docs/page
python -m benchmarks.page --pictures out --all
"""

from __future__ import annotations

import argparse
import tempfile
from pathlib import Path

from benchmarks.page.running import chromium, service
from benchmarks.page.speed import measure
from benchmarks.page.states import Tour


def main() -> None:
    """Measure, and take the pictures if asked to."""
    reader = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    reader.add_argument("--pictures", nargs="?", const="docs/page", type=Path, help="folder of the pictures")
    reader.add_argument("--all", action="store_true", help="each size in light and in dark")
    asked = reader.parse_args()
    with (
        tempfile.TemporaryDirectory() as folder,
        tempfile.TemporaryDirectory() as work,
        service(Path(folder)) as (base, secret),
        chromium() as browser,
    ):
        if asked.pictures is not None:
            Tour(browser, base, secret, asked.pictures, Path(work), asked.all).run()
        else:
            measure(browser, base, secret)


if __name__ == "__main__":
    main()
