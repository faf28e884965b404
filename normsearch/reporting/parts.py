"""The sections of a report, made from a plan and from what was measured."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass

from normsearch.calibration import Calibration
from normsearch.dependence import BatchDependence
from normsearch.errors import PlanError
from normsearch.methods import Refusal, parse_method
from normsearch.plans import Plan
from normsearch.reporting import sections
from normsearch.reports import Report
from normsearch.sensitivities import Sensitivity
from normsearch.site_outputs import SiteDrift


@dataclass(frozen=True)
class Found:
    """What forward passes showed: of the converted, then of the calibrated model."""

    batches: int
    batch_size: int
    moved: list[sections.Moved]
    drifts: list[dict[str, SiteDrift]]
    dependence: sections.Dependence
    cost: sections.Cost | None = None


def summary(plan: Plan, parameters: tuple[int, int], found: Found | None) -> sections.Summary:
    """Return what was changed, and what came of it; ``parameters`` counts them before and after."""
    return sections.Summary(
        sites=len(plan),
        changed=len(plan.changes),
        methods=dict(Counter(str(method) for method in plan.values()).most_common()),
        exact=plan.exact,
        batch_independent=plan.batch_independent,
        parameters=parameters,
        batches=None if found is None else found.batches,
        batch_size=None if found is None else found.batch_size,
        converted=None if found is None else found.moved[0],
        calibrated=None if found is None or len(found.moved) == 1 else found.moved[1],
    )


def calibration(done: Calibration) -> sections.CalibrationPart:
    """Return what calibration did."""
    steps = [
        sections.CalibrationStep(
            name=rung.name, error=finite(rung.error), kept=rung.kept, steps=rung.steps, seconds=rung.seconds
        )
        for rung in done.rungs
    ]
    whitened = any(rung.kept and rung.name == "whitening" for rung in done.rungs)
    return sections.CalibrationPart(
        before=finite(done.error.before),
        after=finite(done.error.after),
        steps=tuple(steps),
        whitened=done.whitened if whitened else (),
        gained_bias=done.gained_bias if whitened else (),
        batches=done.batches,
        held_out=done.held_out,
    )


def layers(plan: Plan, found: Found | None) -> sections.Layers:
    """Return every site with its method and its drifts."""
    changed = {site.path for site, _ in plan.changes}
    rows = []
    for row in plan.rows:
        path = row.site.path
        drifts = [] if found is None else [drift[path] for drift in found.drifts]
        rows.append(
            sections.LayerRow(
                site=path,
                layer=row.site.layer.rpartition(".")[2],
                channels=row.site.channels,
                method=str(plan[path]),
                changed=path in changed,
                exact=plan[path].exact,
                depth=drifts[0].depth if drifts else None,
                converted=drifts[0].relative_l2 if drifts else None,
                calibrated=drifts[1].relative_l2 if len(drifts) > 1 else None,
                reason=next((drift.reason for drift in drifts if drift.reason is not None), None),
                notes=row.notes,
            )
        )
    return sections.Layers(rows=tuple(rows))


def heat_map(sensitivity: Sensitivity, plan: Plan, threshold: float) -> sections.HeatMap:
    """Return the drift of the output by site and method, with vetoes and what the plan chose.

    Raises:
        PlanError: it was measured of another model.

    """
    known = {site.path: site for site in plan.sites}
    unknown = [path for path in sensitivity.sites if path not in known]
    if unknown:
        raise PlanError(
            f"the sensitivity has the site {unknown[0]!r}, of which the plan says nothing; give what was "
            "measured of this model"
        )
    vetoes = sensitivity.vetoes(threshold)
    tried = [parse_method(spelling) for spelling in sensitivity.methods]
    rows = []
    for path in sensitivity.sites:
        drifts = [sensitivity.drift[path][spelling] for spelling in sensitivity.methods]
        refused = {number for number, drift in enumerate(drifts) if drift is None}
        vetoed = {sensitivity.methods.index(spelling) for spelling in vetoes.get(path, ())}
        # "group" stands where the plan has group(groups=8), if that is what it becomes there.
        chosen = [n for n, m in enumerate(tried) if m.resolve(known[path]) == plan[path]]
        rows.append(
            sections.HeatRow(
                site=path,
                drift=tuple(finite(drift) for drift in drifts),
                refused=tuple(sorted(refused)),
                chosen=next((number for number in chosen if number not in refused), None),
                vetoed=tuple(sorted(vetoed - refused)),
            )
        )
    return sections.HeatMap(methods=sensitivity.methods, rows=tuple(rows), threshold=threshold)


def notes(
    plan: Plan, given: Sequence[str], found: Found | None, refusals: tuple[Refusal, ...]
) -> sections.Notes | None:
    """Return what a user should know, and what was refused; None where there is nothing."""
    notes = [sections.Note(text=text) for text in (*given, *plan.notes)]
    if found is not None:
        sides = (("the original", found.dependence.before), ("the new model", found.dependence.after))
        notes += [
            sections.Note(text=f"batch dependence of {whose}: {measured.note}")
            for whose, measured in sides
            if measured.note is not None
        ]
    notes += [sections.Note(text=text, about=row.site.path) for row in plan.rows for text in row.notes]
    return sections.Notes(notes=tuple(notes), refusals=refusals) if notes or refusals else None


def moved(report: Report) -> sections.Moved:
    """Return how far outputs moved."""
    drift = report.drift
    return sections.Moved(
        relative_l2=finite(drift.relative_l2),
        kl=finite(drift.kl),
        top1_agreement=finite(drift.top1_agreement),
    )


def known(measured: BatchDependence) -> BatchDependence:
    """Return it with None for what is no number."""
    return BatchDependence(
        finite(measured.eval_alone),
        finite(measured.eval_batches),
        finite(measured.train_alone),
        finite(measured.train_batches),
        measured.note,
    )


def finite(value: float | None) -> float | None:
    """Return a number, or None for what is none."""
    return None if value is None or not math.isfinite(value) else value
