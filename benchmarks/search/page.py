"""docs/search.md: what the search was measured to do, from the results that are there; nothing is run.

python -m benchmarks.search.page
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[2]
RESULTS = ROOT / "benchmarks" / "results"
PAGE = ROOT / "docs" / "search.md"

WHY = """\
Where the missed ones come from. *Priors*: one of .6 helps on the average of every constructed
landscape, one of .4 of two, but two searches of the same landscape differ by more than that help. To
win nine seeds of ten a prior must be nearly right: the sites' own effects themselves (*exact*) do so on
three of four; a prior of .6 whose every row is scaled by how far it deserves trust (*shrunk*), which
bounds what modelling its errors site by site could bring, wins hardly more often than the plain one. On
forty landscapes of other seeds nothing else made a difference beyond noise either: other slopes and
precisions of the slope, two or four uniform plans first instead of all, designs beside a prior, one or
three deviations of hope instead of two, the sites' true relevances in place of fitted ones. A prior that
has nothing to do with the truth costs something on one of the four.
*Factorials*: 200 trials of the other sampler see most of 256 plans, and the best plan of *one class* is
ahead of the next by less than what is left of a score when everything that two sites do together is
known. *Fronts* reach the bar by less than the seeds differ; more starts of the climb, other ceilings of
hope, another corner, and true relevances gave the same hypervolume.

After the uniform plans the sampler needs no designs (plans in which every site meets every method once):
on thirty landscapes of other seeds, four families, they cost .035 of regret at 20 trials and .015 at 50 (±
.006), nothing beyond noise on the factorials and on fronts of 100 trials, .02 of hypervolume at 25."""


def table(heads: Sequence[str], rows: Iterable[Sequence[str]]) -> list[str]:
    """Return a Markdown table."""
    return [
        "| " + " | ".join(heads) + " |",
        "|" + " --- |" * len(heads),
        *("| " + " | ".join(row) + " |" for row in rows),
        "",
    ]


def spread(pair: Sequence[float], digits: int = 3) -> str:
    return f"{pair[0]:.{digits}f} ± {pair[1]:.{digits}f}"


def bars(found: dict[str, Any]) -> list[str]:
    """Return the section of what was demanded."""
    rows = [
        (bar["landscape"], bar["what"], bar["found"], "" if bar["holds"] else "missed")
        for bar in found["regret"]["bars"]
    ]
    rows += [
        (
            f"fronts, costs {front['costs']}",
            f"hypervolume ≥ {found['fronts']['factor']} × TPE's",
            f"{front['ratio']:.2f} × (by seed {min(front['ratios']):.2f} to {max(front['ratios']):.2f})",
            "" if front["holds"] else "missed",
        )
        for front in found["fronts"]["fronts"]
    ]
    rows += [
        (
            name,
            "returned plan not below the best uniform one by more than a standard error",
            f"at worst {whole['worst']:.2f} standard errors",
            "" if whole["worst"] >= -1 else "missed",
        )
        for name, whole in _whole(found)
    ]
    better = [name for name, whole in _whole(found) if whole["better_beyond_noise"]]
    rows.append(
        ("real training", "above it beyond noise in two", ", ".join(better), _missed(len(better) >= 2))
    )
    for name, speed in found["search_workers"]["speedup"].items():
        rows.append(
            (name, "4 workers ≥ 3.6 times one", f"{speed['speedup']:.2f}", _missed(speed["speedup"] >= 3.6))
        )
    for name, storm in found["search_workers"]["storms"].items():
        text = f"{storm['trials']} trials, {storm['struck']} workers struck, {storm['amiss']} trials amiss"
        rows.append((name, "no trial lost, counted twice or stuck", text, _missed(storm["amiss"] == 0)))
    for name, case in found["search_overhead"]["cases"].items():
        rows.append(
            (
                name,
                "overhead beside training ≤ 5 %",
                f"{case['overhead']:.1%} of {case['trial_seconds']:.1f} s a trial",
                _missed(case["overhead"] <= 0.05),
            )
        )
    return ["## What was asked", "", *table(("where", "what", "found", ""), rows), WHY, ""]


def regret(found: dict[str, Any]) -> list[str]:
    """Return the tables of regret."""
    lines = [
        "## Regret",
        "",
        "0 for the best plan, 1 for a random one; mean ± standard error over "
        f"{len(found['regret']['seeds'])} seeds. `python -m benchmarks.search.regret` says how.",
        "",
    ]
    every = found["regret"]["rows"]
    for landscape in dict.fromkeys(row["landscape"] for row in every):
        rows = [row for row in every if row["landscape"] == landscape]
        after = sorted({row["trials"] for row in rows})
        cells = {(row["contender"], row["trials"]): spread((row["regret"], row["error"]), 2) for row in rows}
        lines += [f"### {landscape}", ""]
        lines += table(
            ("sampler", *(f"{trials} trials" for trials in after)),
            [
                (name, *(cells.get((name, trials), "") for trials in after))
                for name in dict.fromkeys(row["contender"] for row in rows)
            ],
        )
    return lines


def fronts(found: dict[str, Any]) -> list[str]:
    """Return the tables of hypervolume."""
    lines = [
        "## Fronts",
        "",
        "Hypervolume of score and a known cost above the worst uniform plans, as a part of the box up to the "
        f"best of each; {len(found['fronts']['seeds'])} seeds.",
        "",
    ]
    for front in found["fronts"]["fronts"]:
        volumes = front["hypervolume"]
        after = list(next(iter(volumes.values())))
        lines += [f"### Costs {front['costs']}", ""]
        lines += table(
            ("sampler", *(f"{trials} trials" for trials in after)),
            [(name, *(spread(of[trials], 2) for trials in after)) for name, of in volumes.items()],
        )
    return lines


def real(found: dict[str, Any]) -> list[str]:
    """Return the table of real trainings."""
    settings = found["search_real"]["settings"]
    rows = []
    for name, variants in found["search_real"]["problems"].items():
        for variant, result in variants.items():
            rows.append(
                (
                    name,
                    variant,
                    str(result["seeds"]),
                    spread([100 * x for x in result["best_uniform"]], 1),
                    spread([100 * x for x in result["returned"]], 1),
                    spread([100 * x for x in result["gain"]], 1),
                    *(
                        spread([100 * x for x in result["by_gradient"][method]], 1)
                        if method in result["by_gradient"]
                        else ""
                        for method in ("switchable", "batch_instance")
                    ),
                )
            )
    return [
        "## Real training",
        "",
        f"Accuracy in percent on data that no search saw, {settings['trials']} trials; paired by seed, ± "
        "95 %. The best uniform plan is the one that scored best in the search of the same row; *no veto* "
        "therefore has others. `python -m benchmarks.search.real` says how.",
        "",
        *table(
            (
                "problem",
                "search",
                "seeds",
                "best uniform",
                "returned",
                "gain",
                "`switchable` everywhere",
                "`batch_instance` everywhere",
            ),
            rows,
        ),
    ]


def _whole(found: dict[str, Any]) -> list[tuple[str, dict[str, Any]]]:
    return [(name, variants["search"]) for name, variants in found["search_real"]["problems"].items()]


def _missed(holds: bool) -> str:
    return "" if holds else "missed"


def page(found: dict[str, Any]) -> str:
    """Return docs/search.md from the documents in benchmarks/results, by name."""
    versions = found["search_real"]["versions"]
    return "\n".join(
        [
            "# What the search finds, and how fast",
            "",
            "Written by `python -m benchmarks.search.page`; do not edit. "
            f"torch {versions['torch']}, optuna {found['regret']['optuna']}, one thread.",
            "",
            *bars(found),
            *real(found),
            *regret(found),
            *fronts(found),
        ]
    )


def main() -> int:
    """Write the page."""
    names = ("regret", "fronts", "search_real", "search_workers", "search_overhead")
    PAGE.write_text(page({name: json.loads((RESULTS / f"{name}.json").read_text()) for name in names}))
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
