"""Whether normsearch.graph.rewrite on a plain torch.fx trace equals convert on the network itself."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, fx, nn

import normsearch
from benchmarks.zoo.checks import BATCH, KEPT, SPELLINGS, planned
from benchmarks.zoo.models import Model
from benchmarks.zoo.probes import distance, tensors
from normsearch import NormSite, Plan
from normsearch.forward import call, preserved
from normsearch.graph import rewrite
from normsearch.plans import Row


def under_rewriting(entry: Model, model: nn.Module, factory: dict[str, Any]) -> dict[str, dict[str, Any]]:
    """Compare both ways in both modes; sites take the methods in turn until each method had its turn."""
    outcomes = {}
    for mode in ("eval", "train"):
        training = mode == "train"
        inputs = (entry.train_inputs if training and entry.train_inputs else entry.inputs)(BATCH, factory)
        model.train(training)
        try:
            # A trace leaves its proxies in what a network caches.
            with preserved(model):
                graph = fx.symbolic_trace(model)
        except Exception as error:
            outcomes[mode] = {"traced": False, "why": type(error).__name__}
            continue
        outcomes[mode] = {"traced": True, **_compared(model, graph, inputs)}
    model.eval()
    return outcomes


def _compared(subject: nn.Module, graph: fx.GraphModule, inputs: Any) -> dict[str, Any]:
    try:
        sites = {site.path: site for site in normsearch.find_sites(subject, inputs)}
        found = {_home(site): site for site in normsearch.find_sites(graph, inputs)}
        # A trace leaves out what the mode does not reach: auxiliary heads, in eval mode.
        missing = {path for path, site in sites.items() if site.calls} - set(found)
        if missing or set(found) - set(sites):
            return {"failed": f"{len(sites)} sites as modules, {len(found)} in the graph"}
        twins = [(site, found[path]) for path, site in sites.items() if path in found]
        functional = sum(site.kind == "functional" for site in found.values())
        turns = [_one_turn(subject, graph, twins, start, inputs) for start in _starts(len(twins))]
    except Exception as error:
        return {"failed": f"{type(error).__name__}: {error}"[:300]}
    return {
        "sites": len(twins),
        "functional": functional,
        "methods": sorted({name for turn in turns for name in turn["methods"]}),
        "otherwise": sum(turn["otherwise"] for turn in turns),
        "structure": [line for turn in turns for line in turn["structure"]][:10],
        "error": max(turn["error"] for turn in turns),
    }


def _starts(sites: int) -> range:
    """Return which spelling the first site takes in each turn, so that all spellings are taken."""
    return range(0, len(SPELLINGS), sites)


def _home(site: NormSite) -> str:
    """Return the path of the module that a functional call came from: its layer stands inside."""
    return site.path.rpartition(".")[0] if site.kind == "functional" else site.path


def _one_turn(
    subject: nn.Module,
    graph: fx.GraphModule,
    twins: Sequence[tuple[NormSite, NormSite]],
    start: int,
    inputs: Any,
) -> dict[str, Any]:
    asked = [SPELLINGS[(start + number) % len(SPELLINGS)] for number in range(len(twins))]
    here = planned([site for site, _ in twins], asked)
    there = planned([site for _, site in twins], asked)
    # What one way cannot prove, such as who else reads a convolution, neither does here.
    alike = [_decision(a) == _decision(b) for a, b in zip(here.rows, there.rows, strict=True)]
    eager, rewritten = (_carried_out(one, plan, alike) for one, plan in ((subject, here), (graph, there)))
    return {
        "methods": [name for name, same in zip(asked, alike, strict=True) if same],
        "otherwise": alike.count(False),
        "structure": list(_structure(subject, graph, rewritten, eager)),
        "error": _difference(rewritten, eager, inputs),
    }


def _carried_out(model: nn.Module, plan: Plan, alike: Sequence[bool]) -> nn.Module:
    """Carry out what both ways decided alike, each in its own way."""
    rows = (row if same else replace(row, method=KEPT) for row, same in zip(plan.rows, alike, strict=True))
    plan = Plan(tuple(rows))
    if not isinstance(model, fx.GraphModule):
        # What the trace does not reach, such as heads for training alone, stays.
        others = [Row(site, KEPT) for site in normsearch.find_sites(model) if site.path not in plan]
        return normsearch.convert(model, Plan((*plan.rows, *others)))
    rewritten = rewrite(model, plan)
    rewritten.graph.lint()
    return rewritten


def _decision(row: Row) -> tuple[Any, ...]:
    """Return the method and, where that matters, which layer feeds the site and whether it takes a scale.

    A plain trace enters subclasses of convolutions, which leaves no layer there to be found.
    """
    producer = row.site.producer
    if row.method is None or not row.method.needs_producer or producer is None:
        return (row.method,)
    return row.method, producer.path, producer.foldable


def _structure(
    subject: nn.Module, traced: nn.Module, rewritten: nn.Module, eager: nn.Module
) -> Iterable[str]:
    """Yield the state that one has and the other not, beside what the trace does not reach."""
    found, wanted = (
        {name: tuple(value.shape) for name, value in one.state_dict().items() if "num_batches" not in name}
        for one in (rewritten, eager)
    )
    reached = {name.rpartition(".")[0] for name in traced.state_dict()}
    # torch.fx names the constants that it met, and makes every buffer persistent.
    of_trace = set(traced.state_dict()) - set(subject.state_dict())
    for name in sorted((set(found) | set(wanted)) - of_trace):
        if found.get(name) != wanted.get(name):
            owner = name.rpartition(".")[0]
            if name in found or owner in reached or owner.rpartition(".")[0] in reached:
                yield f"{name}: {found.get(name)} in the graph, {wanted.get(name)} in the module"


def _difference(rewritten: nn.Module, eager: nn.Module, inputs: Any) -> float:
    """Return how far outputs and buffers are apart after one pass; shapes alone on the meta device."""
    results = []
    for one in (rewritten, eager):
        torch.manual_seed(0)
        with torch.no_grad():
            output = tensors(call(one, inputs))
        results.append((output, dict(one.state_dict())))
    (found, after), (wanted, expected) = results
    if any(x.is_meta for x in wanted):
        return 0.0 if [x.shape for x in found] == [x.shape for x in wanted] else math.inf
    both = [name for name in after if name in expected and expected[name].is_floating_point()]
    return max(distance(found, wanted), distance(_of(after, both), _of(expected, both)))


def _of(state: Mapping[str, Tensor], names: Iterable[str]) -> list[Tensor]:
    return [state[name] for name in names]
