"""What several workers on one study gain, and lose: speed-up on trials that sleep, and storms of kills.

``python -m benchmarks.search.workers`` writes benchmarks/results/search_workers.json. The clock of the
speed-up starts when every worker has opened the study and stops when the last one's loop has ended, waiting
for others included: imports and connecting are left out.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, replace
from importlib.metadata import version
from pathlib import Path
from typing import Any

import optuna

from benchmarks.search import postgresql
from benchmarks.search.storms import SPACE, Work, storm, timed
from normsearch.searching import LeaseTerms

RESULTS = Path(__file__).parents[1] / "results" / "search_workers.json"
WORKERS = 4
TRIALS, SECONDS = 24, 2.0
#: The speed-up that four workers must reach.
BAR = 3.6
STORMS = LeaseTerms(beat=0.2, patience=1.2, attempts=100)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=6, help="storms per storage")
    rounds = parser.parse_args().rounds
    optuna.logging.set_verbosity(optuna.logging.ERROR)
    storages = ["journal", "postgresql"]
    reason = postgresql.missing()
    if reason is not None:
        print(f"journal only: {reason}")
        storages = storages[:1]
    results: dict[str, Any] = {"versions": versions(), "speedup": {}, "storms": {}}
    for storage in storages:
        results["speedup"][storage] = speedup(storage)
        results["storms"][storage] = storms(storage, rounds)
        print(storage, json.dumps(results["speedup"][storage]), json.dumps(results["storms"][storage]))
    RESULTS.write_text(json.dumps(results, indent=1) + "\n")
    slow = [name for name, found in results["speedup"].items() if found["speedup"] < BAR]
    amiss = [name for name, found in results["storms"].items() if found["amiss"]]
    if slow or amiss:
        raise SystemExit(f"below {BAR}: {slow}; trials lost, stuck, wrong or counted twice: {amiss}")


def versions() -> dict[str, Any]:
    """Return what the numbers depend on."""
    server = None if postgresql.missing() else postgresql.version()
    return {
        "python": platform.python_version(),
        **{name: version(name) for name in ("optuna", "sqlalchemy")},
        "postgresql": server,
        "cores": os.cpu_count(),
        "load": round(os.getloadavg()[0], 1),
    }


def speedup(storage: str) -> dict[str, Any]:
    """Return the seconds that one worker and several take for the same number of trials."""
    seconds = {}
    for workers in (1, WORKERS):
        with place(storage) as task:
            wanted = replace(task, n_trials=TRIALS, seconds=SECONDS, terms=LeaseTerms())
            seconds[workers] = timed(wanted, workers, limit=10 * TRIALS * SECONDS)
    return {
        "trials": TRIALS,
        "sleep_s": SECONDS,
        "parameters": len(SPACE),
        "one_s": round(seconds[1], 2),
        f"{WORKERS}_s": round(seconds[WORKERS], 2),
        "speedup": round(seconds[1] / seconds[WORKERS], 3),
        "overhead_per_trial_s": round(seconds[1] / TRIALS - SECONDS, 4),
    }


def storms(storage: str, rounds: int) -> dict[str, Any]:
    """Return what became of trials whose workers were killed and stopped, round by round."""
    records = []
    for seed in range(rounds):
        with place(storage) as task:
            # In every second round workers cannot look at each other's processes, as on several machines.
            wanted = replace(task, n_trials=60, seconds=0.2, terms=STORMS, elsewhere=seed % 2 == 1)
            start = time.monotonic()
            found = storm(wanted, workers=WORKERS, kills=25, stops=5, pause=0.15, seed=seed, limit=120)
            records.append({**asdict(found), "seconds": round(time.monotonic() - start, 1)})
    amiss = sum(len(r[key]) for r in records for key in ("lost", "twice", "stuck", "wrong"))
    return {
        "rounds": rounds,
        "trials": sum(record["complete"] for record in records),
        "struck": sum(record["struck"] for record in records),
        "begun_again": sum(record["repeated"] for record in records),
        "amiss": amiss,
        "each": records,
    }


@contextmanager
def place(storage: str) -> Iterator[Work]:
    """Give an empty storage, and work to be filled in."""
    with tempfile.TemporaryDirectory() as folder:
        task = Work("", Path(folder), n_trials=1, seconds=0, terms=LeaseTerms())
        if storage == "journal":
            yield replace(task, storage=str(Path(folder) / "journal"))
        else:
            with postgresql.cluster() as server:
                yield replace(task, storage=server.url)


if __name__ == "__main__":
    main()
