"""What becomes of one network under every method, and under Opacus' converter."""

from __future__ import annotations

import copy
import re
import warnings
from collections import defaultdict
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

import normsearch
from benchmarks.zoo.models import Model
from benchmarks.zoo.probes import (
    batch_norm_calls,
    batch_norms,
    dead_layers,
    distance,
    norm_at,
    tells_samples_apart,
    tensors,
)
from benchmarks.zoo.statistics import draw_numbers
from normsearch import METHODS, NormSite, Plan, parse_method
from normsearch.forward import call
from normsearch.plans import Row, refusal_at

with warnings.catch_warnings():
    # Importing Opacus warns about its optimizers.
    warnings.simplefilter("ignore")
    from opacus.validators import ModuleValidator

#: Options that make another layer of a method, or initialise it otherwise.
_OPTIONS = {
    "frozen": ("frozen(trainable=true)",),
    "group": ("group(groups=32)",),
    "layer": ("layer(axes=channel)",),
    "switchable": ("switchable(bn_logit=40)",),
    "weight": ("weight(mean_only=true)",),
    "spectral": ("spectral(gain=fixed)",),
}
SPELLINGS = tuple(spelling for name in METHODS for spelling in (name, *_OPTIONS.get(name, ())))
KEPT = METHODS["batch"]()
BATCH = 2


def built(entry: Model) -> tuple[nn.Module, dict[str, Any]]:
    """Return the network in eval mode, in double precision with drawn numbers or on the meta device."""
    torch.manual_seed(0)
    if entry.meta:
        factory = {"device": torch.device("meta"), "dtype": torch.float32}
        with torch.device("meta"):
            return entry.build().eval(), factory
    model, factory = entry.build().eval().double(), {"device": torch.device("cpu"), "dtype": torch.float64}
    draw_numbers(model, batch_norms(model).values(), entry.inputs(8, factory))
    return model, factory


@torch.no_grad()
def run(model: nn.Module, inputs: Any, entry: Model) -> list[Tensor]:
    """Run the model and return the tensors that are looked at."""
    found: list[Tensor] = []
    where = model.get_submodule(entry.outputs)
    hook = where.register_forward_hook(lambda _module, _args, output: found.extend(tensors(output)))
    try:
        call(model, inputs)
    finally:
        hook.remove()
    return found


def planned(sites: Sequence[NormSite], spellings: Sequence[str]) -> Plan:
    """Return the plan that ``plan`` makes for one method per site, or ``batch`` where it refuses.

    The network is analysed once for all methods, which takes most of the time.
    """
    rows = []
    for site, spelling in zip(sites, spellings, strict=True):
        method = parse_method(spelling)
        refusal = refusal_at(site, method)
        rows.append(Row(site, method.resolve(site)) if refusal is None else Row(site, KEPT, (refusal,)))
    return Plan(tuple(rows))


def under_every_method(entry: Model, model: nn.Module, inputs: Any) -> dict[str, dict[str, Any]]:
    """Convert the network by each spelling and judge the result."""
    wanted = run(model, inputs, entry)
    before = set(batch_norms(model))
    sites = normsearch.find_sites(model, inputs)
    outcomes = {}
    for spelling in SPELLINGS:
        plan = planned(sites, [spelling] * len(sites))
        changed = {site.path for site, _ in plan.changes}
        try:
            converted = normsearch.convert(model, plan)
            outcome, outputs = judged(entry, converted, inputs, before, changed)
            if plan.exact and not entry.meta:
                outcome["error"] = distance(outputs, wanted)
        except Exception as error:
            outcome = {"failed": f"{type(error).__name__}: {error}"[:300]}
        outcome["changed"] = len(changed)
        refused: dict[str, list[str]] = defaultdict(list)
        for row in plan.rows:
            if row.refusals:
                refused[reason(row)].append(row.site.path)
        outcome["refused"] = refused
        outcomes[spelling] = outcome
    return outcomes


def judged(
    entry: Model, converted: nn.Module, inputs: Any, before: set[str], changed: set[str]
) -> tuple[dict[str, Any], list[Tensor]]:
    """Count what a conversion left that it should have changed, and what it killed; give the outputs too."""
    left = batch_norms(converted)
    layers = {path: norm_at(converted, path) for path in before & changed}
    with batch_norm_calls() as callers, dead_layers(layers) as dead:
        outputs = run(converted, inputs, entry)
    known = {id(module) for module in left.values()}
    calling = [type(module).__name__ for module in callers if id(module) not in known]
    outcome: dict[str, Any] = {
        # A site that was not asked for and is gone is as wrong as one that is still there.
        "left": sorted(set(left) ^ (before - changed)),
        "calling": sorted(set(calling)),
        "dead": dead,
    }
    if not entry.meta:
        outcome["finite"] = all(bool(x.isfinite().all()) for x in outputs)
        outcome["depends"] = tells_samples_apart(outputs)
    return outcome, outputs


def reason(row: Row) -> str:
    """Return why a site was refused, without the names that stand in it."""
    text = row.refusals[0].reason
    for path in sorted(
        {row.site.path, *(() if row.site.producer is None else (row.site.producer.path,))}, key=len
    )[::-1]:
        text = text.replace(path, "…") if path else text
    text = re.sub(
        r"(?s)torch\.fx cannot trace .*?(?=\) and would|\Z)",
        "torch.fx cannot trace the network in train mode",
        text,
    )
    text = re.sub(r"the model reads \S+ elsewhere", "the network reads its parameters elsewhere", text)
    text = re.sub(r"called \d+ times", "called several times", text)
    return re.sub(r"\b[A-Z]\w+ may transform", "a layer of its class may transform", text)


def under_opacus(entry: Model, model: nn.Module, factory: dict[str, Any]) -> dict[str, Any]:
    """Judge what Opacus' ModuleValidator.fix makes of the network, in single precision as it expects."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        single = copy.deepcopy(model).float()
        inputs = entry.inputs(BATCH, factory | {"dtype": torch.float32})
        before = set(batch_norms(single))
        try:
            fixed = ModuleValidator.fix(single).eval()
            return judged(entry, fixed, inputs, before, before)[0]
        except Exception as error:
            return {"failed": f"{type(error).__name__}: {error}"[:300]}
