"""document: measure what a report tells, and put it together."""

from __future__ import annotations

import datetime
import math
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from torch import nn

from normsearch.calibration import Calibration, calibration_record
from normsearch.dependence import BatchDependence, Crop
from normsearch.forward import evaluating
from normsearch.measurement import Metric, Outputs, compare, profile
from normsearch.methods import Refusal, parse_method
from normsearch.plans import Plan
from normsearch.progress import OnProgress, Stage
from normsearch.reporting import sections
from normsearch.reporting.documents import Document
from normsearch.reporting.gates import gates_of
from normsearch.reports import Environment, Report
from normsearch.sensitivities import THRESHOLD, Sensitivity
from normsearch.site_outputs import SiteDrift, site_drift

_REPEATS = 5


def document(
    original: nn.Module,
    converted: nn.Module,
    plan: Plan,
    batches: Iterable[Any] | None = None,
    *,
    calibrated: nn.Module | None = None,
    calibration: Calibration | None = None,
    sensitivity: Sensitivity | None = None,
    threshold: float = THRESHOLD,
    metric: Metric | None = None,
    metric_name: str = "metric",
    outputs: Outputs | None = None,
    logits: bool = False,
    crop: Crop | None = None,
    title: str | None = None,
    notes: Sequence[str] = (),
    on_progress: OnProgress | None = None,
) -> Document:
    """Measure a conversion and return its report.

    Without ``batches`` it holds what needs no forward pass: the plan, what the gates have learned, notes.
    Models, random state and modes are left as they were.

    Args:
        original: the model before.
        converted: the model after conversion.
        plan: the plan that converted it.
        batches: inputs, never labels, as for ``compare``; they are read several times, so an iterator that
            runs out is kept in memory. The first should hold three samples or more.
        calibrated: the model after calibration.
        calibration: what calibration did; by default what ``calibration_record`` knows.
        sensitivity: of the original, measured before; its vetoes are marked.
        threshold: the drift above which a method is vetoed at a site.
        metric: a number for a model, for example its accuracy; called in eval mode.
        metric_name: what to call it.
        outputs: as for ``compare``.
        logits: as for ``compare``.
        crop: as for ``compare``.
        title: what the report is about; by default the original's class.
        notes: what else its readers should know.
        on_progress: called after each step.

    Raises:
        ModelError: a model fails, outputs do not match, or there is no batch.

    Example:
        >>> import torch, normsearch
        >>> model = torch.nn.Sequential(torch.nn.Conv2d(3, 32, 3), torch.nn.BatchNorm2d(32))
        >>> plan = normsearch.plan(model, "group")
        >>> converted = normsearch.convert(model, plan)
        >>> made = document(model, converted, plan, [torch.randn(4, 3, 8, 8)], title="two layers")
        >>> [section.kind for section in made.sections]
        ['summary', 'layers', 'cost', 'dependence']
        >>> html = made.to_html()

    """
    models = [converted] if calibrated is None else [converted, calibrated]
    final = models[-1]
    found = (
        None
        if batches is None
        else _measure(original, models, plan, batches, (outputs, logits, crop), on_progress)
    )
    parts: list[sections.Section | None] = [_summary(original, final, plan, found)]
    if metric is not None:
        scores = [_score(model, metric) for model in (original, *models)]
        parts.append(
            sections.Metric(
                name=metric_name,
                original=scores[0],
                converted=scores[1],
                calibrated=scores[2] if calibrated is not None else None,
            )
        )
    if calibration is None and calibrated is not None:
        calibration = calibration_record(calibrated)
    if calibration is not None:
        parts.append(_calibration(calibration))
    parts.append(_layers(plan, found))
    if sensitivity is not None:
        parts.append(_heat_map(sensitivity, plan, threshold))
    parts.append(gates_of(final, plan))
    if found is not None:
        parts += [found.cost, found.dependence]
    parts.append(_notes(plan, notes, found, () if sensitivity is None else sensitivity.refusals))
    from normsearch import __version__

    return Document(
        title=type(original).__name__ if title is None else title,
        environment=Environment.here(final),
        normsearch=__version__,
        created=datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        sections=tuple(part for part in parts if part is not None),
    )


@dataclass(frozen=True)
class _Found:
    """What forward passes showed: of the converted, then of the calibrated model."""

    batches: int
    moved: list[sections.Moved]
    drifts: list[dict[str, SiteDrift]]
    cost: sections.Cost
    dependence: sections.Dependence


def _measure(
    original: nn.Module,
    models: Sequence[nn.Module],
    plan: Plan,
    batches: Iterable[Any],
    options: tuple[Outputs | None, bool, Crop | None],
    on_progress: OnProgress | None,
) -> _Found:
    if iter(batches) is batches:
        batches = list(batches)
    outputs, logits, crop = options
    stage = Stage("measuring", 2 * len(models) + 2, on_progress)
    counted = _Counted(batches)
    reports = []
    drifts = []
    for model in models:
        reports.append(compare(original, model, counted, outputs=outputs, logits=logits, crop=crop))
        stage.advance("outputs")
        drifts.append({drift.site: drift for drift in site_drift(original, model, batches, sites=plan.sites)})
        stage.advance("layers")
    profiles = []
    for model in (original, models[-1]):
        profiles.append(profile(model, counted.first, repeats=_REPEATS))
        stage.advance("cost")
    last = reports[-1]
    crops = last.crop_dependence
    return _Found(
        counted.batches,
        [_moved(report) for report in reports],
        drifts,
        sections.Cost(before=profiles[0], after=profiles[1]),
        sections.Dependence(
            before=_known(last.batch_dependence.before),
            after=_known(last.batch_dependence.after),
            crop=None if crops is None else (_finite(crops.before), _finite(crops.after)),
        ),
    )


class _Counted:
    """Batches that are counted, and whose first one is kept, while they are read."""

    def __init__(self, batches: Iterable[Any]) -> None:
        self._source = batches
        self.batches = 0
        self.first: Any = None

    def __iter__(self) -> Iterator[Any]:
        self.batches = 0
        for inputs in self._source:
            if not self.batches:
                self.first = inputs
            self.batches += 1
            yield inputs


def _summary(original: nn.Module, final: nn.Module, plan: Plan, found: _Found | None) -> sections.Summary:
    return sections.Summary(
        sites=len(plan),
        changed=len(plan.changes),
        methods=dict(Counter(str(method) for method in plan.values()).most_common()),
        exact=plan.exact,
        batch_independent=plan.batch_independent,
        parameters=(_parameters(original), _parameters(final)),
        batches=None if found is None else found.batches,
        converted=None if found is None else found.moved[0],
        calibrated=None if found is None or len(found.moved) == 1 else found.moved[1],
    )


def _parameters(model: nn.Module) -> int:
    return sum(parameter.numel() for parameter in model.parameters())


def _score(model: nn.Module, metric: Metric) -> float | None:
    with evaluating(model):
        return _finite(float(metric(model)))


def _calibration(done: Calibration) -> sections.CalibrationPart:
    steps = [
        sections.CalibrationStep(
            name=rung.name, error=_finite(rung.error), kept=rung.kept, steps=rung.steps, seconds=rung.seconds
        )
        for rung in done.rungs
    ]
    whitened = any(rung.kept and rung.name == "whitening" for rung in done.rungs)
    return sections.CalibrationPart(
        before=_finite(done.error.before),
        after=_finite(done.error.after),
        steps=tuple(steps),
        whitened=done.whitened if whitened else (),
        gained_bias=done.gained_bias if whitened else (),
        batches=done.batches,
        held_out=done.held_out,
    )


def _layers(plan: Plan, found: _Found | None) -> sections.Layers:
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


def _heat_map(sensitivity: Sensitivity, plan: Plan, threshold: float) -> sections.HeatMap:
    vetoes = sensitivity.vetoes(threshold)
    tried = [parse_method(spelling) for spelling in sensitivity.methods]
    known = {site.path: site for site in plan.sites}
    rows = []
    for path in sensitivity.sites:
        drifts = [sensitivity.drift[path][spelling] for spelling in sensitivity.methods]
        refused = {number for number, drift in enumerate(drifts) if drift is None}
        vetoed = {sensitivity.methods.index(spelling) for spelling in vetoes.get(path, ())}
        # "group" stands where the plan has group(groups=8), if that is what it becomes there.
        site = known.get(path)
        chosen = [] if site is None else [n for n, m in enumerate(tried) if m.resolve(site) == plan[path]]
        rows.append(
            sections.HeatRow(
                site=path,
                drift=tuple(_finite(drift) for drift in drifts),
                refused=tuple(sorted(refused)),
                chosen=next((number for number in chosen if number not in refused), None),
                vetoed=tuple(sorted(vetoed - refused)),
            )
        )
    return sections.HeatMap(methods=sensitivity.methods, rows=tuple(rows), threshold=threshold)


def _notes(
    plan: Plan, given: Sequence[str], found: _Found | None, refusals: tuple[Refusal, ...]
) -> sections.Notes | None:
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


def _moved(report: Report) -> sections.Moved:
    drift = report.drift
    return sections.Moved(
        relative_l2=_finite(drift.relative_l2),
        kl=_finite(drift.kl),
        top1_agreement=_finite(drift.top1_agreement),
    )


def _known(measured: BatchDependence) -> BatchDependence:
    """Return it with None for what is no number."""
    return BatchDependence(
        _finite(measured.eval_alone),
        _finite(measured.eval_batches),
        _finite(measured.train_alone),
        _finite(measured.train_batches),
        measured.note,
    )


def _finite(value: float | None) -> float | None:
    return None if value is None or not math.isfinite(value) else value
