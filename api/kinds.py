"""What each kind of job does: its child, and what is kept of it."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from contextlib import ExitStack
from pathlib import Path, PurePath
from typing import Any, TypeVar

import sqlalchemy as sa
from pydantic import BaseModel

from api.children import source
from api.conversions import Received, keep_artifacts, keep_model, receive
from api.database import ARTIFACTS, JOBS, UPLOADS
from api.inputs import data_of, model_of, path_of, plan_of, row_of, stem
from api.job_schemas import CalibrationRequest, ConversionRequest, ConvertJob, SensitivityRequest
from api.owned import fetch
from api.runs import Run
from api.searches import explore, search
from api.tasks import (
    Calibrated,
    Calibrating,
    Converted,
    Converting,
    Sensed,
    Sensing,
)

R = TypeVar("R", Converted, Calibrated, Sensed)


def convert(run: Run) -> None:
    """Do what POST /v1/convert asks: the model is made together with what was made from it."""
    request = ConvertJob.model_validate_json(run.job.request)
    form, upload = request.form, row_of(run, UPLOADS, request.upload)
    told = source(run.tools.settings, upload.name, form.architecture, form.arguments, form.entry)
    asked = Converting(
        source=told,
        to=form.to,
        plan=form.plan,
        keep=form.keep,
        input_shape=form.input_shape,
        stem=stem(upload.name),
    )
    named = form.model_dump(include={"architecture", "arguments", "entry"})

    def keep(connection: sa.Connection, made: Converted, received: list[Received]) -> dict[str, Any]:
        there = fetch(connection, UPLOADS, run.owner, upload.id)
        model = keep_model(connection, run.tools, run.owner, there, named, made.model)
        connection.execute(sa.update(JOBS).where(JOBS.c.id == run.job.id).values(model=model.id))
        return _kept(connection, run, model.id, made, received)

    _make(run, "convert", asked, Converted, {told.file: path_of(run, upload)}, keep)


def conversion(run: Run) -> None:
    """Convert a model."""
    request = ConversionRequest.model_validate_json(run.job.request)
    files, told, name = model_of(run, request.model)
    asked = Converting(
        source=told,
        to=request.to,
        plan=None if request.plan is None else json.dumps(request.plan),
        keep=request.keep,
        input_shape=request.input_shape,
        data=data_of(run, files, request.dataset, request.batch_size, request.samples),
        stem=stem(name),
    )
    _make(run, "convert", asked, Converted, files, _keeping(run, request.model))


def calibration(run: Run) -> None:
    """Calibrate what was converted."""
    request = CalibrationRequest.model_validate_json(run.job.request)
    weights = row_of(run, ARTIFACTS, request.weights)
    files, told, name = model_of(run, weights.model)
    # No upload's name begins like this.
    converted = f"_converted{PurePath(weights.name).suffix}"
    files[converted] = path_of(run, weights)
    plan = plan_of(run, weights)
    if plan is not None:
        files["_plan.json"] = path_of(run, plan)
    data = data_of(run, files, request.dataset, request.batch_size, request.samples)
    assert data is not None
    asked = Calibrating(
        source=told,
        converted=converted,
        plan=None if plan is None else "_plan.json",
        data=data,
        budget=request.budget,
        parameters=request.parameters,
        seed=request.seed,
        stem=stem(name),
    )
    _make(run, "calibrate", asked, Calibrated, files, _keeping(run, weights.model))


def sensitivity(run: Run) -> None:
    """Measure how far the output moves when one site changes."""
    request = SensitivityRequest.model_validate_json(run.job.request)
    files, told, name = model_of(run, request.model)
    asked = Sensing(
        source=told,
        methods=tuple(request.methods or ()),
        sites=None if request.sites is None else tuple(request.sites),
        threshold=request.threshold,
        input_shape=request.input_shape,
        data=data_of(run, files, request.dataset, request.batch_size, request.samples),
        stem=stem(name),
    )
    _make(run, "sensitivity", asked, Sensed, files, _keeping(run, request.model))


#: By kind: what is done, and what a part of it does that any worker may take.
KINDS: dict[str, Callable[[Run], None]] = {
    "convert": convert,
    "conversion": conversion,
    "calibration": calibration,
    "sensitivity": sensitivity,
    "search": search,
}
PARTS: dict[str, Callable[[Run], None]] = {"search": explore}


def _make(
    run: Run,
    task: str,
    asked: BaseModel,
    result: type[R],
    files: Mapping[str, Path],
    keep: Callable[[sa.Connection, R, list[Received]], dict[str, Any]],
) -> None:
    """Have a child make files, and publish them."""
    with run.child(task, asked, result, files) as finished, ExitStack() as stack:
        made = finished.result
        received = receive(run.tools, run.owner, finished, made.files, stack)
        run.publish(lambda connection: keep(connection, made, received))


def _keeping(run: Run, model: str) -> Callable[[sa.Connection, R, list[Received]], dict[str, Any]]:
    return lambda connection, made, received: _kept(connection, run, model, made, received)


def _kept(
    connection: sa.Connection, run: Run, model: str, made: R, received: list[Received]
) -> dict[str, Any]:
    rows = keep_artifacts(connection, run.tools, run.owner, model, run.job.id, received)
    told = made.model_dump(mode="json", exclude={"files", "model"})
    return {"artifacts": [row.id for row in rows], **told}
