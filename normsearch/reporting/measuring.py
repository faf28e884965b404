"""document: measure what a report tells, and put it together."""

from __future__ import annotations

import datetime
from collections.abc import Iterable, Iterator, Sequence
from typing import Any

from torch import nn
from torch.export import ExportedProgram

from normsearch.calibration import Calibration, calibration_record
from normsearch.dependence import Crop
from normsearch.forward import evaluating
from normsearch.measurement import Metric, Outputs, compare, profile
from normsearch.opening import Model, as_module
from normsearch.plans import Plan
from normsearch.programs import with_layers
from normsearch.progress import OnProgress, Stage
from normsearch.reporting import parts, sections
from normsearch.reporting.documents import Document
from normsearch.reporting.gates import gates_of
from normsearch.reports import Environment
from normsearch.sensitivities import THRESHOLD, Sensitivity
from normsearch.site_outputs import site_drift

_REPEATS = 5


def document(
    original: Model,
    converted: Model,
    plan: Plan,
    batches: Iterable[Any] | None = None,
    *,
    calibrated: Model | None = None,
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
        original: the model before, or an exported program.
        converted: the model after conversion; of a program, what was converted from it.
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
    if calibration is None and calibrated is not None:
        calibration = calibration_record(calibrated)
    title = type(original).__name__ if title is None else title
    models = [_module(converted, original)]
    if calibrated is not None:
        models.append(_module(calibrated, original))
    original, final = as_module(original), models[-1]
    found = (
        None
        if batches is None
        else _measure(original, models, plan, batches, (outputs, logits, crop), on_progress)
    )
    counts = (_parameters(original), _parameters(final))
    made: list[sections.Section | None] = [parts.summary(plan, counts, found)]
    if metric is not None:
        scores = [_score(model, metric) for model in (original, *models)]
        made.append(
            sections.Metric(
                name=metric_name,
                original=scores[0],
                converted=scores[1],
                calibrated=scores[2] if calibrated is not None else None,
            )
        )
    if calibration is not None:
        made.append(parts.calibration(calibration))
    made.append(parts.layers(plan, found))
    if sensitivity is not None:
        made.append(parts.heat_map(sensitivity, plan, threshold))
    made.append(gates_of(final, plan))
    if found is not None:
        made += [found.cost, found.dependence]
    made.append(parts.notes(plan, notes, found, () if sensitivity is None else sensitivity.refusals))
    # The package imports this module.
    from normsearch import __version__

    return Document(
        title=title,
        environment=Environment.here(final),
        normsearch=__version__,
        created=datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        sections=tuple(part for part in made if part is not None),
    )


def _module(converted: Model, original: Model) -> nn.Module:
    """Return a converted program with its layers as modules, which have outputs to look at."""
    if isinstance(converted, ExportedProgram) and isinstance(original, ExportedProgram):
        return with_layers(converted, original)
    return as_module(converted)


def _measure(
    original: nn.Module,
    models: Sequence[nn.Module],
    plan: Plan,
    batches: Iterable[Any],
    options: tuple[Outputs | None, bool, Crop | None],
    on_progress: OnProgress | None,
) -> parts.Found:
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
    return parts.Found(
        counted.batches,
        last.batch_size,
        [parts.moved(report) for report in reports],
        drifts,
        sections.Dependence(
            before=parts.known(last.batch_dependence.before),
            after=parts.known(last.batch_dependence.after),
            crop=None if crops is None else (parts.finite(crops.before), parts.finite(crops.after)),
        ),
        sections.Cost(before=profiles[0], after=profiles[1]),
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


def _score(model: nn.Module, metric: Metric) -> float | None:
    with evaluating(model):
        return parts.finite(float(metric(model)))


def _parameters(model: nn.Module) -> int:
    return sum(parameter.numel() for parameter in model.parameters())
