"""What each method would mean at each site of a network: exact, approximate, or refused, and why."""

from __future__ import annotations

from pathlib import Path

from api.engine import data
from api.engine.networks import Network
from api.engine.sources import Report, loaded, said, told
from api.tasks import Choices, Choosing, Meaning
from normsearch.errors import PlanError
from normsearch.methods import METHODS, Method, parse_method
from normsearch.plans import refusal_at
from normsearch.sites import NormSite


def choices(asked: Choosing, folder: Path, report: Report) -> Choices:
    """Ask every method about every site; the network is read and looked at once."""
    found = loaded(asked.source, folder)
    given = data.inputs(found, asked.data, asked.input_shape, folder, 2)
    first = None if given is None else next(iter(given))
    methods = {name: parse_method(name) for name in asked.methods or METHODS}
    sites = found.library.find_sites(found.model, first)
    if not sites:
        raise PlanError("the network has no BatchNorm layer: there is nothing to convert")
    return Choices(
        sites=[told(site) for site in sites],
        order=found.order(sites, first),
        methods=tuple(methods),
        choices=[
            tuple(_meaning(found, site, method, folder) for method in methods.values()) for site in sites
        ],
    )


def _meaning(found: Network, site: NormSite, method: Method, folder: Path) -> Meaning:
    refusal = refusal_at(site, method)
    if refusal is not None:
        fix = said(refusal.remedy, folder)
        return Meaning(method=None, exact=None, reason=refusal.reason, fix=fix, notes=())
    return Meaning(
        method=str(method.resolve(site)),
        exact=method.exact_at(site),
        reason=None,
        fix=None,
        notes=tuple(said(note, folder) for note in found.notes_on(site, method)),
    )
