"""The work of children: the only folder of the service that imports normsearch.

It runs in a confined child, on files in the child's folder, and says what came of it as plain data.
"""

from __future__ import annotations

import contextlib
import io
from collections.abc import Callable
from dataclasses import fields
from pathlib import Path
from typing import Any

import torch
from pydantic import BaseModel

import normsearch
from api.engine import converting, data, searching
from api.engine.choices import choices
from api.engine.sources import Report, inspected, loaded, said
from api.messages import Failed, Refused
from api.search_tasks import Concluding, Confirming, Listing, Searching, Trying
from api.tasks import (
    Calibrating,
    Catalogue,
    Choosing,
    Converting,
    Describing,
    Explaining,
    Inspected,
    MethodOf,
    Sensing,
    Source,
)
from normsearch.errors import ArchitectureError, NormsearchError, RefusedError
from normsearch.exporting import exported
from normsearch.inputs import random_batch
from normsearch.methods import METHODS
from normsearch.plans import Plan
from normsearch.registries import LIBRARIES, names
from normsearch.reporting import document


def prepare() -> None:
    """Import what children need, and run once what imports more."""
    torch.set_num_threads(1)
    torch.set_num_interop_threads(1)
    _catalogue()
    model = torch.nn.Sequential(torch.nn.Conv2d(3, 32, 1), torch.nn.BatchNorm2d(32)).eval()
    made = normsearch.plan(model, "group")
    Plan.from_json(made.to_json())
    batches = random_batch(model, "3x4x4", 4)
    document(model, normsearch.convert(model, made), made, batches).to_html()
    for module in ("safetensors.torch", "PIL.Image", "numpy"):
        __import__(module)
    # Reading, converting and writing a program imports some four hundred modules.
    held = io.BytesIO()
    torch.export.save(exported(model, next(iter(batches))), held)
    held.seek(0)
    normsearch.convert(torch.export.load(held), "group")
    # Without onnxruntime, which starts a thread: children import it, in a tenth of a second.
    with contextlib.suppress(ModuleNotFoundError):
        for module in ("onnx", "onnx_ir"):
            __import__(module)


def run(task: str, argument: bytes, folder: Path, report: Report) -> BaseModel | Failed:
    """Do a piece of work; what the library refuses is an answer, not an exception."""
    # Torch replaces its thread pool when it is first used after a fork, and ends the process if a thread of a
    # backward pass looks for it meanwhile: it is used here, while there is one thread.
    torch.set_num_threads(1)
    form, work = _TASKS[task]
    try:
        made: BaseModel = work(form.model_validate_json(argument) if form else None, folder, report)
        return made
    except RefusedError as error:
        refusals = [
            Refused(site=one.site, method=one.method, reason=one.reason, remedy=said(one.remedy, folder))
            for one in error.refusals[:10_000]
        ]
        return Failed(error="RefusedError", detail=said(str(error), folder), refusals=refusals)
    except NormsearchError as error:
        return Failed(error=type(error).__name__, detail=said(str(error), folder))


def _catalogue(*_: Any) -> Catalogue:
    methods = [
        MethodOf(
            name=name,
            title=method.title,
            exact=method().exact,
            batch_independent=method().batch_independent,
            options={field.name: field.default for field in fields(method)},
            citation=method.citation,
        )
        for name, method in METHODS.items()
    ]
    architectures: dict[str, list[str]] = {}
    for library in LIBRARIES:
        try:
            architectures[library] = list(names(library))
        except ArchitectureError:
            # Not installed here.
            continue
    arguments = {
        library: {key: value.describe()[:4000] for key, value in LIBRARIES[library].arguments.items()}
        for library in architectures
    }
    return Catalogue(methods=methods, architectures=architectures, arguments=arguments)


def _inspect(source: Source, folder: Path, report: Report) -> Inspected:
    return inspected(loaded(source, folder))


_TASKS: dict[str, tuple[Any, Callable[[Any, Path, Report], BaseModel]]] = {
    "inspect": (Source, _inspect),
    "explain": (Explaining, converting.explain),
    "choices": (Choosing, choices),
    "convert": (Converting, converting.convert),
    "calibrate": (Calibrating, converting.calibrate),
    "sensitivity": (Sensing, converting.sensitivity),
    "search": (Searching, searching.prepare),
    "trial": (Trying, searching.run_trial),
    "pairs": (Listing, searching.pairs),
    "confirm": (Confirming, searching.confirm),
    "conclude": (Concluding, searching.conclude),
    "describe": (Describing, lambda asked, folder, _: data.describe(asked, folder)),
    "catalogue": (None, _catalogue),
}
