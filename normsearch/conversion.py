"""convert: replace a model's BatchNorm layers as modules, keeping everything else as it is."""

from __future__ import annotations

import gc
from collections.abc import Collection, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from typing import Any, TypeVar, get_args

import torch
from torch import fx, nn
from torch.export import ExportedProgram

from normsearch.closing import closed
from normsearch.compatibility import refused_wrappers
from normsearch.errors import ModelError, PlanError, RefusedError
from normsearch.forward import copied, is_lazy, materialised
from normsearch.methods import Keep
from normsearch.opening import opened
from normsearch.plans import Plan, To, Where, plan, refusal_at
from normsearch.sites import NormSite, analyse, with_calls_lifted
from normsearch.surgery import replace_layers

M = TypeVar("M", nn.Module, ExportedProgram, nn.Module | ExportedProgram)

#: The plan's place in what a converted program says of itself.
PLAN = "plan"


def convert(
    model: M,
    to: To | Plan,
    *,
    inputs: Any = None,
    where: Where | None = None,
    weights: bool = False,
    keep: Keep = "function",
    in_place: bool = False,
    optimizer: torch.optim.Optimizer | None = None,
) -> M:
    """Replace BatchNorm layers by other normalizations and keep what the network has learned.

    Each new layer is initialised from the trained one: exactly where the method allows it, else by folding
    the running statistics into its affine (see ``Method.exact``). Class, methods, names and hooks of the
    model stay, as do eps, device, dtype, training flags, requires_grad and sharing.

    Args:
        model: any nn.Module, or a ``torch.export.ExportedProgram``, which becomes another one of plain ATen
            operators; it is left untouched unless ``in_place``.
        to: a ``Plan``, or what ``plan`` takes.
        inputs: one forward pass's inputs, as for ``plan``; lazy layers need them, and ``weight`` initialises
            layers that were never trained from them.
        where: as for ``plan``.
        weights: as for ``plan``.
        keep: ``function`` carries statistics, γ and β; ``affine`` γ and β only; ``nothing`` resets the
            layer, as a plain swap does.
        in_place: edit the model itself instead of a copy.
        optimizer: with ``in_place``, an optimizer of the model: replaced parameters take their
            predecessors' places in its groups.

    Returns:
        The converted model.

    Raises:
        RefusedError: a method cannot stand at a site; nothing was changed.
        PlanError: a given plan does not fit the model, or the arguments contradict each other.
        ModelError: the model cannot be copied, edited or run.
        MethodError: a spelling is not valid.

    Example:
        >>> import torch, normsearch
        >>> model = torch.nn.Sequential(torch.nn.Conv2d(3, 32, 3), torch.nn.BatchNorm2d(32))
        >>> type(normsearch.convert(model, "group")[1])
        <class 'torch.nn.modules.normalization.GroupNorm'>

    """
    if keep not in get_args(Keep):
        raise PlanError(f"keep={keep!r} is not one of {', '.join(get_args(Keep))}")
    if optimizer is not None and not in_place:
        raise PlanError("an optimizer belongs to the model it was made for; give it with in_place=True only")
    if isinstance(to, Plan) and (where is not None or weights):
        raise PlanError("a Plan says what happens at each site; give where= and weights= to plan() instead")
    if isinstance(model, ExportedProgram):
        if in_place:
            raise ModelError("an exported program cannot be edited in place; use the return value of convert")
        with _collector_waiting():
            module = opened(model)
            the_plan = _planned(module, to, inputs, where, weights)
            _check_targets(the_plan, module, keep, in_place=True)
            edited = replace_layers(module, the_plan, keep, inputs=inputs)
            assert isinstance(edited, fx.GraphModule)
            return closed(edited, {PLAN: the_plan.to_json()})  # type: ignore[return-value]
    if not isinstance(model, nn.Module):
        raise ModelError(f"expected a torch.nn.Module, got {type(model).__name__}; load the model first")
    refused_wrappers(model)
    lazy = inputs is not None and is_lazy(model)
    target = materialised(model, inputs, in_place=in_place) if lazy else model
    the_plan = _planned(target, to, inputs, where, weights)
    _check_targets(the_plan, model, keep, in_place=in_place)
    if not in_place and not lazy:
        target = copied(model)
    calls = {site.path for site, _ in the_plan.changes if site.kind == "functional"}
    if calls:
        target = _as_graph(target, calls, in_place=in_place)
    return replace_layers(target, the_plan, keep, inputs=inputs, optimizer=optimizer)


@contextmanager
def _collector_waiting() -> Iterator[None]:
    """Let nobody look for garbage among the thousands of nodes that are made, none of which is any."""
    enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if enabled:
            gc.enable()


def _planned(model: nn.Module, to: To | Plan, inputs: Any, where: Where | None, weights: bool) -> Plan:
    if isinstance(to, Plan):
        return _checked(to, model)
    return plan(model, to, inputs=inputs, where=where, weights=weights)


def _as_graph(model: nn.Module, calls: Collection[str], *, in_place: bool) -> nn.Module:
    """Return the graph in which these F.batch_norm calls of the model are layers."""
    if in_place:
        raise ModelError(
            f"{type(model).__name__} calls F.batch_norm itself: its graph is rewritten, which cannot be "
            "done in place; use the return value of convert without in_place"
        )
    return with_calls_lifted(model, certain=True, only=calls)


def _check_targets(the_plan: Plan, model: nn.Module, keep: Keep, *, in_place: bool) -> None:
    """Raise for changes that a model's structure or the other arguments forbid."""
    if in_place and "" in {site.path for site, _ in the_plan.changes}:
        raise ModelError(
            f"the model itself is a {type(model).__name__}, which cannot be replaced in place; "
            "use the return value of convert without in_place"
        )
    if keep == "nothing":
        tied = [site for site, _ in the_plan.changes if site.tied]
        if tied:
            raise PlanError(
                f"keep='nothing' would untie the weight or bias of {tied[0].path!r} from "
                f"{', '.join(tied[0].tied)}; untie them first, or keep='affine'"
            )
    wrapper = next(
        (site.path for site, _ in the_plan.changes if site.path.split(".")[-1] == "_orig_mod"), None
    )
    if wrapper is not None:
        raise ModelError(
            f"{wrapper} is a compiled {type(model.get_submodule(wrapper)).__name__}, which cannot be "
            "replaced inside its wrapper; convert the layer itself and compile the result"
        )


def _checked(the_plan: Plan, model: nn.Module) -> Plan:
    """Return ``the_plan`` if it fits ``model``.

    Raises:
        PlanError: a site is missing, is another layer, or is not in the plan.
        RefusedError: a method cannot stand at a site.

    """
    dataflow = any(method.needs_dataflow for _, method in the_plan.changes)
    weights = any(site.kind == "weight" for site in the_plan.sites)
    functional = any(site.kind == "functional" for site in the_plan.sites)
    analysed = analyse(model, None, dataflow=dataflow, weights=weights, functional=functional)
    check_sites(the_plan, analysed, type(model).__name__)
    return the_plan


def check_sites(the_plan: Plan, sites: Sequence[NormSite], owner: str) -> None:
    """Raise unless a plan fits the sites of a model.

    Args:
        the_plan: the plan.
        sites: of the model that it is applied to.
        owner: what the model is called in an error.

    Raises:
        PlanError: a site is missing, is another layer, or is not in the plan.
        RefusedError: a method cannot stand at a site.

    """
    found = {site.path: site for site in sites}
    for site, method in the_plan.changes:
        here = found.get(site.path)
        if here is None:
            raise PlanError(
                f"the plan changes {site.path!r}, where {owner} has no BatchNorm layer; "
                "use a plan made for this model"
            )
        for name in ("layer", "kind", "channels", "eps", "affine", "bias", "track_running_stats"):
            planned, given = getattr(site, name), getattr(here, name)
            if planned != given:
                raise PlanError(
                    f"the plan expects {name} {planned} at {site.path!r}, the model has {given}; "
                    "use a plan made for this model"
                )
        if method.rewrites_producer(site):
            _check_producer(site, here)
        if method.absorbs(site):
            _check_activation(site, here)
    known = {site.path for site in the_plan.sites}
    left = [site.path for site in sites if site.kind != "weight" and site.path not in known]
    if left:
        raise PlanError(
            f"the plan says nothing of {len(left)} of the {len(sites)} sites of {owner}, {left[0]!r} among "
            "them; use a plan made for this model, or add rows with the method batch for what should stay"
        )
    refusals = []
    for site, method in the_plan.changes:
        here = found[site.path]
        refusals.append(refusal_at(replace(site, tied=here.tied, detail=here.detail, read=here.read), method))
    if any(refusals):
        raise RefusedError(tuple(refusal for refusal in refusals if refusal is not None))


def _check_activation(planned: NormSite, here: NormSite) -> None:
    """Raise a ``PlanError`` if an activation is to be taken out where the model no longer allows it."""
    if here.followed_by != planned.followed_by:
        assert planned.followed_by is not None
        found = "none is known to follow" if here.followed_by is None else here.followed_by.detail
        raise PlanError(
            f"the plan lets {planned.path!r} take the place of the activation {planned.followed_by.path!r}, "
            f"which this model does not allow: {found or 'another one follows'}; make a new plan"
        )


def _check_producer(planned: NormSite, here: NormSite) -> None:
    """Raise a ``PlanError`` if a scale is to be folded where the model no longer allows it."""
    if planned.producer is None or not planned.producer.foldable or here.producer == planned.producer:
        return
    found = here.producer
    same = found is not None and (found.path, found.layer) == (planned.producer.path, planned.producer.layer)
    # Whether a linear layer's features are the channels was seen in the forward pass the plan was made with.
    if not same or found is None or not (found.foldable or found.layer.endswith("Linear")):
        why = "it does not feed the site" if found is None or not same else found.detail
        raise PlanError(
            f"the plan folds {planned.path!r} into {planned.producer.path!r}, which this model does not "
            f"allow: {why}; make a new plan"
        )
