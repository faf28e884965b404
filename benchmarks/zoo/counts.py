"""Every network's findings in short, and the counts over all of them."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from typing import Any

from benchmarks.zoo.verdicts import alive, complete, equal, exact, fades, problems
from normsearch import parse_method

Record = dict[str, Any]

_UNFED = "no convolution or linear layer is known to feed it"


def summary(records: Sequence[Record], versions: dict[str, str]) -> dict[str, Any]:
    """Return every network's outcome in short, and the counts over all."""
    done = [record for record in records if "failed" not in record]
    return {
        "versions": versions,
        "networks": {record["name"]: _short(record) for record in records},
        "methods": {spelling: _counts(done, spelling) for spelling in spellings(done)},
        "no weight upstream": _unfed(done),
        "opacus": _opacus_counts(done),
        "graphs": {mode: _graph_counts(done, mode) for mode in ("eval", "train")},
        "problems": [line for record in records for line in problems(record)],
    }


def spellings(records: Sequence[Record]) -> list[str]:
    """Return the spellings that were tried, in order."""
    return list(records[0]["methods"]) if records else []


def _short(record: Record) -> dict[str, Any]:
    if "failed" in record:
        return {"failed": record["failed"]}
    return {
        "batch_norms": record["batch_norms"],
        "numbers": not record["meta"],
        "methods": {spelling: symbol(spelling, outcome) for spelling, outcome in record["methods"].items()},
        "opacus": opacus_symbol(record["opacus"]),
        "graphs": {mode: graph_symbol(graph) for mode, graph in record["graphs"].items()},
    }


def symbol(spelling: str, outcome: dict[str, Any]) -> str:
    """Return what a table says of one network under one method."""
    if complete(outcome) and fades(spelling, outcome):
        return "fades"
    if not (complete(outcome) and alive(outcome) and exact(outcome)):
        return "**!**"
    refused = sum(map(len, outcome["refused"].values()))
    if refused and not outcome["changed"]:
        return "–"
    kind = "=" if parse_method(spelling).exact else "≈"
    return f"{kind} −{refused}" if refused else kind


def opacus_symbol(outcome: dict[str, Any]) -> str:
    """Return what a table says of one network under Opacus' converter."""
    if "failed" in outcome:
        return "fails"
    parts = [f"{len(outcome[key])} {key}" for key in ("left", "dead") if outcome[key]]
    if not parts and not (complete(outcome) and alive(outcome)):
        return "dead output"
    return ", ".join(parts) or "yes"


def graph_symbol(graph: dict[str, Any]) -> str:
    """Return what a table says of one network's rewritten graph."""
    return "not traced" if not graph["traced"] else "equal" if equal(graph) else "differs"


def _counts(records: Sequence[Record], spelling: str) -> dict[str, Any]:
    outcomes = [record["methods"][spelling] for record in records]
    refused: Counter[str] = Counter()
    where: Counter[str] = Counter()
    for outcome in outcomes:
        refused.update({reason: len(paths) for reason, paths in outcome["refused"].items()})
        where.update(outcome["refused"].keys())
    errors = [outcome["error"] for outcome in outcomes if "error" in outcome]
    return {
        "exact": parse_method(spelling).exact,
        "complete": sum(map(complete, outcomes)),
        "alive": sum(map(alive, outcomes)),
        "faded": sum(fades(spelling, outcome) for outcome in outcomes),
        "nothing refused": sum(not outcome["refused"] for outcome in outcomes),
        "layers changed": sum(outcome["changed"] for outcome in outcomes),
        "layers refused": sum(refused.values()),
        "worst error": max(errors, default=None),
        "compared": len(errors),
        "reasons": {reason: [count, where[reason]] for reason, count in refused.most_common()},
    }


def _unfed(records: Sequence[Record]) -> dict[str, list[str]]:
    """Return the layers that no weight-space method can take, by their names."""
    found = {record["name"]: record["methods"]["weight"]["refused"].get(_UNFED, []) for record in records}
    return {name: paths for name, paths in found.items() if paths}


def _opacus_counts(records: Sequence[Record]) -> dict[str, int]:
    outcomes = [record["opacus"] for record in records]
    ran = [outcome for outcome in outcomes if "failed" not in outcome]
    return {
        "complete and alive": sum(complete(outcome) and alive(outcome) for outcome in outcomes),
        "BatchNorm left": sum(bool(outcome["left"]) for outcome in ran),
        "dead layers": sum(bool(outcome["dead"]) for outcome in ran),
        "failed": len(outcomes) - len(ran),
        "layers left": sum(len(outcome["left"]) for outcome in ran),
    }


def _graph_counts(records: Sequence[Record], mode: str) -> dict[str, Any]:
    graphs = [(record, record["graphs"][mode]) for record in records]
    traced = [(record, graph) for record, graph in graphs if graph["traced"]]
    real = [graph for record, graph in traced if not record["meta"] and "error" in graph]
    return {
        "networks": len(graphs),
        "traced": len(traced),
        "equal": sum(equal(graph) for _, graph in traced),
        "with numbers": len(real),
        "sites": sum(graph.get("sites", 0) for _, graph in traced),
        "functional": sum(graph.get("functional", 0) for _, graph in traced),
        "decided otherwise": sum(graph.get("otherwise", 0) for _, graph in traced),
        "worst error": max((graph["error"] for graph in real), default=None),
        "not traced": dict(Counter(graph["why"] for _, graph in graphs if not graph["traced"])),
    }
