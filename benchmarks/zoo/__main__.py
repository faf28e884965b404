"""python -m benchmarks.zoo: examine what is missing, then write results/zoo.json and docs/zoo.md."""

from __future__ import annotations

import argparse
import json
import random
from pathlib import Path

from rich.console import Console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)

from benchmarks.zoo.counts import summary
from benchmarks.zoo.models import ZOO
from benchmarks.zoo.page import page
from benchmarks.zoo.runs import Results, examined, fingerprint, versions
from benchmarks.zoo.verdicts import problems

_ROOT = Path(__file__).parent.parent.parent
#: One line per network, kept between runs; not under version control.
_LINES = _ROOT / "benchmarks" / "results" / "zoo.jsonl"


def main() -> int:
    """Return 0, 1 if anything is not as it must be, 130 if interrupted."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.zoo", description=__doc__)
    parser.add_argument("models", nargs="*", metavar="MODEL", help="only these, for example timm/resnet18")
    parser.add_argument("--jobs", type=int, default=1, help="networks at a time, one thread each")
    parser.add_argument("--page", action="store_true", help="examine nothing, write what is known so far")
    parser.add_argument("--fresh", action="store_true", help="forget the results of earlier runs")
    options = parser.parse_args()
    unknown = [name for name in options.models if name not in ZOO]
    if unknown:
        parser.error(f"unknown: {', '.join(unknown)}; benchmarks/zoo/models.py lists the networks")
    console, results = Console(), Results(_LINES, fingerprint(), fresh=options.fresh)
    wanted = options.models or list(ZOO)
    missing = [name for name in wanted if name not in results.records]
    # Mixed, so that the time left can be told from the time taken.
    random.Random(0).shuffle(missing)
    if len(missing) < len(wanted):
        console.print(f"{len(wanted) - len(missing)} of {len(wanted)} networks are done already")
    try:
        _examine(console, [] if options.page else missing, results, options.jobs)
    except KeyboardInterrupt:
        console.print(f"interrupted: {len(results.records)} networks are kept in {_LINES}; run it again")
        return 130
    found = [line for name in wanted for line in problems(results.records.get(name, {"name": name}))]
    for line in found:
        console.print(line, style="red", highlight=False, markup=False)
    records = [results.records[name] for name in ZOO if name in results.records]
    if options.page or len(records) == len(ZOO):
        document = summary(records, versions())
        (_LINES.parent / "zoo.json").write_text(json.dumps(document, indent=1, sort_keys=True) + "\n")
        (_ROOT / "docs").mkdir(exist_ok=True)
        (_ROOT / "docs" / "zoo.md").write_text(page(records, document, len(ZOO)))
        console.print(f"{len(records)} of {len(ZOO)}: wrote benchmarks/results/zoo.json and docs/zoo.md")
    return 1 if found else 0


def _examine(console: Console, names: list[str], results: Results, jobs: int) -> None:
    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
        TimeRemainingColumn(),
    )
    with Progress(*columns, console=console) as progress:
        task = progress.add_task("networks", total=len(names))
        for name, record in examined(names, jobs):
            results.add(record)
            wrong = problems(record)
            said = f"{len(wrong)} problems" if wrong else "as it must be"
            progress.console.print(f"{name}: {said}, {record.get('seconds', '?')} s", highlight=False)
            progress.advance(task)


if __name__ == "__main__":
    raise SystemExit(main())
