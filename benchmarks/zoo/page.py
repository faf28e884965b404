"""docs/zoo.md and results/zoo.json from what was found."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Sequence
from typing import Any

from benchmarks.zoo.verdicts import EQUAL, EXACT, alive, complete, equal, exact, problems
from normsearch import parse_method

Record = dict[str, Any]


def summary(records: Sequence[Record], versions: dict[str, str]) -> dict[str, Any]:
    """Return every network's outcome in short, and the counts over all."""
    done = [record for record in records if "failed" not in record]
    return {
        "versions": versions,
        "networks": {record["name"]: _short(record) for record in records},
        "methods": {spelling: _counts(done, spelling) for spelling in _spellings(done)},
        "opacus": _opacus_counts(done),
        "graphs": {mode: _graph_counts(done, mode) for mode in ("eval", "train")},
        "problems": [line for record in records for line in problems(record)],
    }


def _spellings(records: Sequence[Record]) -> list[str]:
    return list(records[0]["methods"]) if records else []


def _short(record: Record) -> dict[str, Any]:
    if "failed" in record:
        return {"failed": record["failed"]}
    return {
        "batch_norms": record["batch_norms"],
        "numbers": not record["meta"],
        "methods": {spelling: symbol(spelling, outcome) for spelling, outcome in record["methods"].items()},
        "opacus": _opacus_symbol(record["opacus"]),
        "graphs": {mode: _graph_symbol(graph) for mode, graph in record["graphs"].items()},
    }


def symbol(spelling: str, outcome: dict[str, Any]) -> str:
    """Return what a table says of one network under one method."""
    if not (complete(outcome) and alive(outcome) and exact(outcome)):
        return "**!**"
    refused = sum(outcome["refused"].values())
    if refused and not outcome["changed"]:
        return "–"
    kind = "=" if parse_method(spelling).exact else "≈"
    return f"{kind} −{refused}" if refused else kind


def _opacus_symbol(outcome: dict[str, Any]) -> str:
    if "failed" in outcome:
        return "fails"
    parts = [f"{len(outcome[key])} {key}" for key in ("left", "dead") if outcome[key]]
    if not parts and not (complete(outcome) and alive(outcome)):
        return "dead output"
    return ", ".join(parts) or "yes"


def _graph_symbol(graph: dict[str, Any]) -> str:
    return "not traced" if not graph["traced"] else "equal" if equal(graph) else "differs"


def _counts(records: Sequence[Record], spelling: str) -> dict[str, Any]:
    outcomes = [record["methods"][spelling] for record in records]
    refused: Counter[str] = Counter()
    where: Counter[str] = Counter()
    for outcome in outcomes:
        refused.update(outcome["refused"])
        where.update(outcome["refused"].keys())
    errors = [outcome["error"] for outcome in outcomes if "error" in outcome]
    return {
        "exact": parse_method(spelling).exact,
        "complete": sum(map(complete, outcomes)),
        "alive": sum(map(alive, outcomes)),
        "nothing refused": sum(not outcome["refused"] for outcome in outcomes),
        "layers changed": sum(outcome["changed"] for outcome in outcomes),
        "layers refused": sum(refused.values()),
        "worst error": max(errors, default=None),
        "compared": len(errors),
        "reasons": {reason: [count, where[reason]] for reason, count in refused.most_common()},
    }


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


_HEAD = """# Every method on {networks} networks

Written by `python -m benchmarks.zoo`. {networks} networks with BatchNorm from timm, torchvision (classification,
segmentation, detection, video, optical flow) and segmentation_models_pytorch, {layers:,} BatchNorm layers in all.
{numbers} run with real numbers: double precision, weights as a fresh network has them, random statistics, and
random γ with zero and negative ones in every layer. The other {meta}, which have more than 40 million parameters or
need large inputs, are checked for structure and shapes on the meta device. {versions}.

- **complete**: no BatchNorm layer is left that was to go, as a module or as a call, counted without asking
  normsearch; and none is gone that was to stay.
- **alive**: outputs are finite and tell two inputs apart, and no new layer puts out a constant where its input is
  none (on the meta device: has more than one element to normalize over).
- **exact**: outputs within {exact:.0e} (relative) of the original's, for the methods that promise it.
- Where a method refuses a layer, that layer stays BatchNorm here and the refusal is counted below.
"""

_GRAPHS = """
## torch.fx graphs

Plain `torch.fx.symbolic_trace`, then `normsearch.graph.rewrite`, against `convert` on the network itself. The
sites take the methods in turn, one after the other, until every method had its turn; outputs and buffers after a
pass must agree to {equal:.0e} (relative, double precision) and the state must have the same names and shapes.
Functional sites are `F.batch_norm` calls, which a plain trace makes of timm's fused layers.

"""

_NETWORKS = """
## Networks

`=` exact, `≈` approximate (as promised), `−n` with n layers refused, `–` refused everywhere, **!** not as it must be.
Opacus: what `ModuleValidator.fix` leaves; graph: whether the rewritten trace equals the converted network, in eval
and in train mode. * on the meta device.

"""


def page(records: Sequence[Record], document: dict[str, Any]) -> str:
    """Return docs/zoo.md."""
    done = [record for record in records if "failed" not in record]
    known = document["versions"]
    text = _HEAD.format(
        networks=len(records),
        layers=sum(record["batch_norms"] for record in done),
        numbers=sum(not record["meta"] for record in done),
        meta=sum(record["meta"] for record in done),
        versions=", ".join(f"{name} {version}" for name, version in known.items()),
        exact=EXACT,
    )
    text += _methods(document["methods"], len(done)) + _opacus(document["opacus"], len(done))
    text += _reasons(document["methods"]) + _GRAPHS.format(equal=EQUAL) + _graphs(document["graphs"])
    text += _problems(document["problems"])
    return text + _NETWORKS + _networks(done)


def _methods(methods: dict[str, Any], networks: int) -> str:
    rows = (
        (
            f"`{spelling}`",
            f"{counts['complete']} of {networks}",
            f"{counts['alive']} of {networks}",
            f"{counts['layers changed']:,}",
            f"{counts['layers refused']:,} in {networks - counts['nothing refused']} networks"
            if counts["layers refused"]
            else "none",
            f"{counts['worst error']:.0e} ({counts['compared']})" if counts["exact"] else "",
        )
        for spelling, counts in methods.items()
    )
    head = ("method", "complete", "alive", "layers changed", "layers refused", "worst error (networks)")
    return "\n## Methods\n\n" + _table(head, rows)


def _opacus(counts: dict[str, int], networks: int) -> str:
    return (
        f"\nOpacus' `ModuleValidator.fix` on the same networks: {counts['complete and alive']} of {networks} "
        f"complete and alive; BatchNorm left in {counts['BatchNorm left']} ({counts['layers left']:,} layers), dead "
        f"layers in {counts['dead layers']}, failed on {counts['failed']}.\n"
    )


def _reasons(methods: dict[str, Any]) -> str:
    rows = (
        (f"`{spelling}`", reason, f"{layers:,}", str(networks))
        for spelling, counts in methods.items()
        for reason, (layers, networks) in counts["reasons"].items()
    )
    return "\n## Refusals\n\n" + _table(("method", "reason", "layers", "networks"), rows)


def _graphs(graphs: dict[str, Any]) -> str:
    rows = (
        (
            mode,
            f"{counts['traced']} of {counts['networks']}",
            f"{counts['equal']} of {counts['traced']}",
            str(counts["with numbers"]),
            f"{counts['sites']:,}, {counts['functional']:,}",
            str(counts["decided otherwise"]),
            f"{counts['worst error']:.0e}" if counts["worst error"] is not None else "",
            ", ".join(f"{why} {count}" for why, count in counts["not traced"].items()),
        )
        for mode, counts in graphs.items()
    )
    head = (
        *("mode", "traced", "equal", "with numbers", "sites, functional", "decided otherwise"),
        *("worst error", "not traced"),
    )
    return _table(head, rows)


def _problems(lines: Sequence[str]) -> str:
    if not lines:
        return "\n## Problems\n\nNone.\n"
    return "\n## Problems\n\n" + "".join(f"- {line.replace('|', '/')}\n" for line in lines)


def _networks(records: Sequence[Record]) -> str:
    spellings = _spellings(records)
    rows = (
        (
            record["name"] + (" *" if record["meta"] else ""),
            str(record["batch_norms"]),
            *(symbol(spelling, record["methods"][spelling]) for spelling in spellings),
            _opacus_symbol(record["opacus"]),
            ", ".join(dict.fromkeys(_graph_symbol(graph) for graph in record["graphs"].values())),
        )
        for record in records
    )
    return _table(("network", "layers", *(f"`{one}`" for one in spellings), "Opacus", "graph"), rows)


def _table(head: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    lines = [head, ["---"] * len(head), *rows]
    return "".join(f"| {' | '.join(line)} |\n" for line in lines)
