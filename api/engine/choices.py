"""What each method would mean at each site of a network: exact, approximate, or refused, and why."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path

import normsearch
from api.engine import data
from api.engine.sources import Report, loaded, said
from api.tasks import Choices, Choosing, Meaning, Site
from normsearch.errors import PlanError
from normsearch.methods import METHODS, Method, parse_method
from normsearch.plans import refusal_at
from normsearch.site_outputs import site_drift


def choices(asked: Choosing, folder: Path, report: Report) -> Choices:
    """Ask every method about every site; the network is read and looked at once."""
    found = loaded(asked.source, folder)
    given = data.inputs(found.model, asked.data, asked.input_shape, folder, 2)
    first = None if given is None else next(iter(given))
    methods = {name: parse_method(name) for name in asked.methods or METHODS}
    sites = normsearch.find_sites(found.model, first)
    if not sites:
        raise PlanError("the network has no BatchNorm layer: there is nothing to convert")
    order = None
    if first is not None:
        # The model beside itself: nothing drifts, and the order of the forward pass is told.
        reached = site_drift(found.model, found.model, [first], sites=sites)
        depths = {one.site: one.depth for one in reached if one.depth is not None}
        order = tuple(sorted(depths, key=lambda path: depths[path]))
    return Choices(
        sites=[Site.model_validate(asdict(site)) for site in sites],
        order=order,
        methods=tuple(methods),
        choices=[tuple(_meaning(site, method, folder) for method in methods.values()) for site in sites],
    )


def _meaning(site: normsearch.NormSite, method: Method, folder: Path) -> Meaning:
    refusal = refusal_at(site, method)
    if refusal is not None:
        fix = said(refusal.remedy, folder)
        return Meaning(method=None, exact=None, reason=refusal.reason, fix=fix, notes=())
    return Meaning(
        method=str(method.resolve(site)),
        exact=method.exact_at(site),
        reason=None,
        fix=None,
        notes=tuple(said(note, folder) for note in method.notes(site)),
    )
