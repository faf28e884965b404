"""docs/zoo.md: what was found, for readers."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

from benchmarks.zoo.counts import Record, graph_symbol, opacus_symbol, spellings, symbol
from benchmarks.zoo.verdicts import EQUAL, EXACT

_HEAD = """\
# Every method on {networks} networks

Written by `python -m benchmarks.zoo`. {networks} networks with BatchNorm from timm, torchvision
(classification, segmentation, detection, video, optical flow) and segmentation_models_pytorch,
{layers:,} BatchNorm layers in all. {numbers} run with real numbers: double precision, weights as a fresh
network has them, random statistics, and random γ with zero and negative ones in every layer. The other
{meta}, which have more than 40 million parameters or need large inputs, are checked for structure and
shapes on the meta device.

{versions}.

- **complete**: no BatchNorm layer is left that was to go, as a module or as a call, counted without
  asking normsearch; and none is gone that was to stay.
- **alive**: outputs are finite and tell two inputs apart, and no new layer puts out a constant where its
  input is none (on the meta device: each has more than one element to normalize over).
- **faded**: every layer is alive, but rounding is all that the output still shows of the input (two inputs'
  outputs differ by less than 1e-9 of their size). That is `instance` where a network pools the output of its
  last normalization, whose mean over the map is β whatever comes in: keep that layer, or take `group` there.
  And it is `spectral(gain=fixed)`, which bounds every layer's norm, in deep networks: train such a network
  from the start, or take `spectral` with its learned gain.
- **exact**: outputs within {exact:.0e} (relative) of the original's, for the methods that promise it.
- Where a method refuses a layer, that layer stays BatchNorm here; every refusal is counted below.
"""

_GRAPHS = """
## torch.fx graphs

Plain `torch.fx.symbolic_trace`, then `normsearch.graph.rewrite`, against `convert` on the network
itself. The sites take the methods in turn, one after the other, until every method had its turn; outputs
and buffers after a pass must agree to {equal:.0e} (relative, double precision) and the state must have
the same names and shapes. Functional sites are `F.batch_norm` calls, which a plain trace makes of timm's
fused layers. Where the trace shows another layer upstream than the network does, or another fold, the site
stays BatchNorm in both ("decided otherwise").

"""

_NETWORKS = """
## Networks

`=` exact and `≈` approximate, as promised; `−n` with n layers refused; `–` refused everywhere; `fades` see
above; **!** not as it must be. Opacus: what `ModuleValidator.fix` leaves, or `yes` for complete and alive.
Graph: whether the rewritten trace equals the converted network, in eval and in train mode. * on the meta
device.

"""


def page(records: Sequence[Record], document: dict[str, Any], wanted: int) -> str:
    """Return docs/zoo.md; ``wanted`` is the number of networks in the zoo."""
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
    if len(records) < wanted:
        text += (
            f"\n**Not complete:** {wanted - len(records)} of the zoo's {wanted} networks are yet to be run.\n"
        )
    text += _methods(document["methods"], len(done)) + _opacus(document["opacus"], len(done))
    text += (
        _reasons(document["methods"])
        + _unfed(document["no weight upstream"])
        + _GRAPHS.format(equal=EQUAL)
        + _graphs(document["graphs"])
    )
    text += _problems(document["problems"])
    return text + _NETWORKS + _networks(done)


def _methods(methods: dict[str, Any], networks: int) -> str:
    rows = (
        (
            f"`{spelling}`",
            f"{counts['complete']} of {networks}",
            _alive(counts, networks),
            f"{counts['layers changed']:,}",
            _refused(counts["layers refused"], networks - counts["nothing refused"]),
            f"{counts['worst error']:.0e} ({counts['compared']})"
            if counts["exact"] and counts["compared"]
            else "",
        )
        for spelling, counts in methods.items()
    )
    head = ("method", "complete", "alive", "layers changed", "layers refused", "worst error (networks)")
    return "\n## Methods\n\n" + _table(head, rows)


def _alive(counts: dict[str, Any], networks: int) -> str:
    faded = f", {counts['faded']} faded" if counts["faded"] else ""
    return f"{counts['alive']} of {networks}{faded}"


def _refused(layers: int, networks: int) -> str:
    return f"{layers:,} in {networks} networks" if layers else "none"


def _opacus(counts: dict[str, int], networks: int) -> str:
    return f"""
Opacus' `ModuleValidator.fix` on the same networks: {counts["complete and alive"]} of {networks} complete and
alive; BatchNorm left in {counts["BatchNorm left"]} ({counts["layers left"]:,} layers), dead layers in
{counts["dead layers"]}, failed on {counts["failed"]}.
"""


def _reasons(methods: dict[str, Any]) -> str:
    rows = (
        (f"`{spelling}`", reason.replace(" in train mode", ""), f"{layers:,}", str(networks))
        for spelling, counts in methods.items()
        for reason, (layers, networks) in counts["reasons"].items()
    )
    return "\n## Refusals\n\n" + _table(("method", "reason", "layers", "networks"), rows)


def _unfed(sites: dict[str, list[str]]) -> str:
    lines = (f"- {name}: {', '.join(f'`{path}`' for path in paths)}\n" for name, paths in sites.items())
    return f"\nLayers of which no forward pass shows a weight upstream, by name:\n\n{''.join(lines)}"


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
    columns = spellings(records)
    rows = (
        (
            record["name"] + (" *" if record["meta"] else ""),
            str(record["batch_norms"]),
            *(symbol(spelling, record["methods"][spelling]) for spelling in columns),
            opacus_symbol(record["opacus"]),
            ", ".join(dict.fromkeys(graph_symbol(graph) for graph in record["graphs"].values())),
        )
        for record in records
    )
    return _table(("network", "layers", *(f"`{one}`" for one in columns), "Opacus", "graph"), rows)


def _table(head: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    lines = [head, ["---"] * len(head), *rows]
    return "".join(f"| {' | '.join(line)} |\n" for line in lines)
