"""All measurements of the search, one after the other; each goes on where it stood."""

from __future__ import annotations

import subprocess
import sys

PARTS = ("factorials", "regret", "fronts", "real", "workers", "overhead", "page")

if __name__ == "__main__":
    codes = [subprocess.run([sys.executable, "-m", f"benchmarks.search.{part}"]).returncode for part in PARTS]
    raise SystemExit(max(codes))
