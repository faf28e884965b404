"""Conversions, calibrations and sensitivities, with everything that is written of them."""

from __future__ import annotations

import datetime
import math
from dataclasses import asdict
from pathlib import Path
from typing import Any

import normsearch
from api.engine import data
from api.engine.labels import scoring
from api.engine.networks import Network
from api.engine.sources import Report, converted, following, inspected, loaded, original, said, title, wanted
from api.tasks import (
    Calibrated,
    Calibrating,
    Converted,
    Converting,
    Decision,
    Explained,
    Explaining,
    Made,
    Refusal,
    Rung,
    Sensed,
    Sensing,
)
from normsearch.architectures import Architecture
from normsearch.errors import NormsearchError
from normsearch.methods import METHODS
from normsearch.plans import Plan
from normsearch.rebuilding import script_names, scripts
from normsearch.reporting import Document, parts


class Writing:
    """The files that a piece of work leaves in its folder.

    Attributes:
        files: what was written.
        notes: what could not be.

    """

    def __init__(self, folder: Path, stem: str) -> None:
        self._folder, self._stem = folder, stem
        self.files: list[Made] = []
        self.notes: list[str] = []

    def weights(self, before: Network, model: Any, plan: Plan | None, what: str) -> None:
        """Write what was made of a network, the script that rebuilds it if that is needed, and the plan."""
        name = f"{self._stem}-{what}{before.suffix}"
        before.write(model, self._folder / name, plan)
        self.files.append(Made(name=name, role="weights", media_type="application/octet-stream"))
        if before.architecture is not None:
            self._script(model, before.architecture, plan, name)
        if plan is not None:
            self._write(f"{self._stem}-plan.json", "plan", "application/json", plan.to_json())

    def _script(self, model: Any, architecture: Architecture, plan: Plan | None, weights: str) -> None:
        names = script_names(weights)
        try:
            texts = scripts(model, architecture, plan, weights, names)
        except NormsearchError as error:
            # What a script cannot show is no reason to lose the checkpoint.
            texts = {}
            self.notes.append(f"no {names[0]}: {said(str(error), self._folder)}"[:4000])
        for (script, text), role in zip(texts.items(), ("script", "layers"), strict=False):
            self._write(script, role, "text/x-python", text)

    def report(self, made: Document) -> None:
        """Write a report as JSON and as a page."""
        self._write(f"{self._stem}-report.json", "report", "application/json", made.to_json())
        self._write(f"{self._stem}-report.html", "page", "text/html; charset=utf-8", made.to_html())

    def sensitivity(self, found: normsearch.Sensitivity) -> None:
        """Write what a measurement found."""
        self._write(f"{self._stem}-sensitivity.json", "sensitivity", "application/json", found.to_json())

    def _write(self, name: str, role: Any, media_type: Any, text: str) -> None:
        (self._folder / name).write_text(text, "utf-8")
        self.files.append(Made(name=name, role=role, media_type=media_type))


def explain(asked: Explaining, folder: Path, report: Report) -> Explained:
    """Say which method would stand at each site, and why not."""
    found = loaded(asked.source, folder)
    given = data.inputs(found, asked.data, asked.input_shape, folder, 2)
    first, to = (None if given is None else next(iter(given))), wanted(asked.to)
    explained = found.library.explain(found.model, to, inputs=first)
    rows = [
        Decision(
            site=row.site.path,
            method=None if row.method is None else str(row.method),
            exact=None if row.method is None else row.method.exact_at(row.site),
            refusals=tuple(
                Refusal(method=one.method, reason=one.reason, fix=said(one.remedy, folder))
                for one in row.refusals
            ),
            notes=tuple(said(note, folder) for note in row.notes),
        )
        for row in explained.rows
    ]
    plan = None
    if not explained.refusals:
        plan = found.library.plan(found.model, to, inputs=first).to_json()
    return Explained(rows=rows, notes=tuple(said(note, folder) for note in explained.notes), plan=plan)


def convert(asked: Converting, folder: Path, report: Report) -> Converted:
    """Replace the layers of a network."""
    before = original(asked.source, folder)
    known = inspected(before)
    given = data.inputs(before, asked.data, asked.input_shape, folder)
    first = None if given is None else next(iter(given))
    if asked.plan is not None:
        plan = Plan.from_json(asked.plan)
    else:
        plan = before.library.plan(before.model, wanted(asked.to), inputs=first)
    model = before.library.convert(before.model, plan, inputs=first, keep=asked.keep)
    written = Writing(folder, asked.stem)
    written.weights(before, model, plan, "converted")
    scored = scoring(before, asked.data, folder)
    written.report(
        before.document(
            model,
            plan,
            given,
            title=title(asked.source, before),
            notes=(*data.notes_on(asked.data, given), *scored.notes),
            metric=scored.metric,
            metric_name="accuracy",
            logits=scored.metric is not None,
            on_progress=following(report),
        )
    )
    return Converted(
        model=known,
        files=written.files,
        changed=len(plan.changes),
        exact=plan.exact,
        batch_independent=plan.batch_independent,
        notes=(*before.notes, *written.notes),
    )


def calibrate(asked: Calibrating, folder: Path, report: Report) -> Calibrated:
    """Bring a converted network back to its original."""
    before = original(asked.source, folder)
    model, plan = converted(asked.converted, asked.plan, before, asked.source, folder)
    given = data.batches(before, asked.data, folder)
    if before.batch_size is None:
        given = given.held_apart()
    kept = given.kept()
    follow = following(report)
    calibrated = before.calibrate(model, kept, asked, follow)
    record = before.library.calibration_record(calibrated)
    assert record is not None
    written = Writing(folder, asked.stem)
    written.weights(before, calibrated, plan, "calibrated")
    if plan is None:
        written.notes.append(
            "no report: the plan of the conversion was deleted, and the file does not say it"
        )
    else:
        scored = scoring(before, asked.data, folder)
        written.report(
            before.document(
                model,
                plan,
                kept,
                calibrated=calibrated,
                title=title(asked.source, before),
                notes=(*given.notes, *scored.notes),
                metric=scored.metric,
                metric_name="accuracy",
                logits=scored.metric is not None,
                on_progress=follow,
            )
        )
    return Calibrated(
        files=written.files,
        before=_finite(record.error.before),
        after=_finite(record.error.after),
        rungs=[Rung(**{**asdict(rung), "error": _finite(rung.error)}) for rung in record.rungs],
        notes=(*before.notes, *written.notes),
    )


def sensitivity(asked: Sensing, folder: Path, report: Report) -> Sensed:
    """Measure how far the output moves when one site changes."""
    before = original(asked.source, folder)
    given = data.inputs(before, asked.data, asked.input_shape, folder)
    methods = asked.methods or tuple(name for name in METHODS if name != "batch")
    found: normsearch.Sensitivity = before.library.sensitivity(
        before.model, methods, given, sites=asked.sites, on_progress=following(report)
    )
    vetoes = found.vetoes(asked.threshold)
    # What a network is like, before anything is changed: the plan that changes nothing.
    plan = before.library.plan(before.model, "batch")
    notes = data.notes_on(asked.data, given)
    sections = (
        parts.heat_map(found, plan, asked.threshold),
        parts.notes(plan, notes, None, found.refusals),
    )
    written = Writing(folder, asked.stem)
    written.sensitivity(found)
    written.report(
        Document(
            title=title(asked.source, before),
            environment=found.environment,
            normsearch=normsearch.__version__,
            created=datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
            sections=tuple(part for part in sections if part is not None),
        )
    )
    return Sensed(
        files=written.files,
        sites=len(found.sites),
        methods=found.methods,
        vetoes=vetoes,
        notes=(*before.notes, *notes, *written.notes),
    )


def _finite(value: float) -> float | None:
    return value if math.isfinite(value) else None
