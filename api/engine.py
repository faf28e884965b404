"""The work of children: the only file of the service that imports normsearch.

It runs in a confined child, on files in the child's folder, and says what came of it as plain data.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import asdict, fields
from pathlib import Path
from typing import Any

import torch
from pydantic import BaseModel

import normsearch
from api.messages import Failed, Progressed, Refused
from api.tasks import (
    Array,
    Catalogue,
    Converted,
    Converting,
    Decision,
    Described,
    Describing,
    Explained,
    Explaining,
    ImageClass,
    Inspected,
    Made,
    MethodOf,
    Refusal,
    Site,
    Source,
)
from normsearch.admission import legacy, torch_zip
from normsearch.admission.arrays import read_inputs
from normsearch.admission.image_archives import check_archive
from normsearch.architectures import Architecture
from normsearch.arguments import read_to
from normsearch.checkpoints import Checkpoint, load, save
from normsearch.commands.wording import in_options
from normsearch.errors import ArchitectureError, CheckpointError, NormsearchError, RefusedError
from normsearch.inputs import random_batch
from normsearch.methods import METHODS
from normsearch.plans import Plan
from normsearch.rebuilding import script_names, scripts
from normsearch.registries import LIBRARIES, names
from normsearch.reporting import document

Report = Callable[[Progressed], None]
#: Samples of random numbers that a report is measured with.
_SAMPLES = 4
_MOST_ARRAYS = 1000


def prepare() -> None:
    """Import what children need, and run once what imports more."""
    torch.set_num_threads(1)
    torch.set_num_interop_threads(1)
    _catalogue()
    model = torch.nn.Sequential(torch.nn.Conv2d(3, 32, 1), torch.nn.BatchNorm2d(32)).eval()
    made = normsearch.plan(model, "group")
    Plan.from_json(made.to_json())
    batches = random_batch(model, "3x4x4", _SAMPLES)
    document(model, normsearch.convert(model, made), made, batches).to_html()
    for module in ("safetensors.torch", "PIL.Image", "numpy"):
        __import__(module)


def run(task: str, argument: bytes, folder: Path, report: Report) -> BaseModel | Failed:
    """Do a piece of work; what the library refuses is an answer, not an exception."""
    form, work = _TASKS[task]
    try:
        made: BaseModel = work(form.model_validate_json(argument) if form else None, folder)
        return made
    except RefusedError as error:
        refusals = [
            Refused(site=one.site, method=one.method, reason=one.reason, remedy=_said(one.remedy, folder))
            for one in error.refusals[:10_000]
        ]
        return Failed(error="RefusedError", detail=_said(str(error), folder), refusals=refusals)
    except NormsearchError as error:
        return Failed(error=type(error).__name__, detail=_said(str(error), folder))


def _said(message: str, folder: Path) -> str:
    """Return a message in the words of the service: its fields for options, a file's name for its path."""
    options = re.sub(r"--([a-z]+(?:-[a-z]+)*)", lambda match: match[1].replace("-", "_"), in_options(message))
    return options.replace(f"{folder}/", "")[:20_000]


def _loaded(source: Source, folder: Path) -> Checkpoint:
    architecture = None
    if source.architecture is not None:
        architecture = Architecture(source.architecture, source.arguments)
        if architecture.is_factory and not source.configured:
            raise ArchitectureError(
                f"{source.architecture} is code, which only the operator may name; "
                "GET /v1/architectures lists what there is"
            )
    elif source.arguments:
        raise ArchitectureError("arguments belong to an architecture; give both")
    return load(folder / source.file, architecture, entry=source.entry, allow_factories=source.configured)


def _inspected(loaded: Checkpoint, source: Source, folder: Path) -> Inspected:
    head = (folder / source.file).open("rb").read(64)
    kinds = ((torch_zip.MAGIC, "torch zip"), (legacy.MAGIC, "torch legacy"))
    found = [asdict(site) for site in normsearch.find_sites(loaded.model)]
    return Inspected.model_validate(
        {
            "format": next((kind for magic, kind in kinds if head.startswith(magic)), "safetensors"),
            "architecture": loaded.architecture.name,
            "arguments": loaded.architecture.arguments,
            "parameters": sum(parameter.numel() for parameter in loaded.model.parameters()),
            "converted": loaded.plan is not None and bool(loaded.plan.changes),
            "notes": loaded.notes,
            "sites": [Site.model_validate(site) for site in found],
        }
    )


def _inspect(source: Source, folder: Path) -> Inspected:
    return _inspected(_loaded(source, folder), source, folder)


def _to(given: Any) -> Any:
    """Read texts as the command line does; a mapping is what the library takes."""
    return given if isinstance(given, dict) else read_to([given] if isinstance(given, str) else given)


def _inputs(loaded: Checkpoint, shape: str | None, samples: int) -> Any:
    return None if shape is None else random_batch(loaded.model, shape, samples)


def _explain(asked: Explaining, folder: Path) -> Explained:
    loaded = _loaded(asked.source, folder)
    batches = _inputs(loaded, asked.input_shape, 2)
    inputs, to = (None if batches is None else next(iter(batches))), _to(asked.to)
    found = normsearch.explain(loaded.model, to, inputs=inputs)
    rows = [
        Decision(
            site=row.site.path,
            method=None if row.method is None else str(row.method),
            exact=None if row.method is None else row.method.exact_at(row.site),
            refusals=tuple(
                Refusal(method=one.method, reason=one.reason, fix=_said(one.remedy, folder))
                for one in row.refusals
            ),
            notes=tuple(_said(note, folder) for note in row.notes),
        )
        for row in found.rows
    ]
    plan = None
    if not found.refusals:
        plan = normsearch.plan(loaded.model, to, inputs=inputs).to_json()
    return Explained(rows=rows, notes=tuple(_said(note, folder) for note in found.notes), plan=plan)


def _convert(asked: Converting, folder: Path) -> Converted:
    loaded = _loaded(asked.source, folder)
    if loaded.plan is not None and loaded.plan.changes:
        raise CheckpointError(
            f"{asked.source.file} is converted already; convert the checkpoint that it was made from"
        )
    inspected = _inspected(loaded, asked.source, folder)
    batches = _inputs(loaded, asked.input_shape, _SAMPLES)
    inputs = None if batches is None else next(iter(batches))
    if asked.plan is not None:
        plan = Plan.from_json(asked.plan)
    else:
        plan = normsearch.plan(loaded.model, _to(asked.to), inputs=inputs)
    model = normsearch.convert(loaded.model, plan, inputs=inputs, keep=asked.keep)
    weights = f"{asked.stem}-converted.safetensors"
    save(model, folder / weights, architecture=loaded.architecture, plan=plan)
    files = [Made(name=weights, role="weights", media_type="application/octet-stream")]

    def write(name: str, role: Any, media_type: Any, text: str) -> None:
        (folder / name).write_text(text, "utf-8")
        files.append(Made(name=name, role=role, media_type=media_type))

    notes = list(loaded.notes)
    scripting = script_names(weights)
    try:
        texts = scripts(model, loaded.architecture, plan, weights, scripting)
    except NormsearchError as error:
        # What a script cannot show is no reason to lose the checkpoint.
        texts, notes = {}, [*notes, f"no {scripting[0]}: {_said(str(error), folder)}"[:4000]]
    for (name, text), role in zip(texts.items(), ("script", "layers"), strict=False):
        write(name, role, "text/x-python", text)
    write(f"{asked.stem}-plan.json", "plan", "application/json", plan.to_json())
    noise = () if batches is None else ("inputs are random numbers: drifts on real inputs are others",)
    made = document(loaded.model, model, plan, batches, title=str(loaded.architecture), notes=noise)
    write(f"{asked.stem}-report.json", "report", "application/json", made.to_json())
    write(f"{asked.stem}-report.html", "page", "text/html; charset=utf-8", made.to_html())
    return Converted(
        model=inspected,
        files=files,
        changed=len(plan.changes),
        exact=plan.exact,
        batch_independent=plan.batch_independent,
        notes=tuple(notes),
    )


def _describe(asked: Describing, folder: Path) -> Described:
    path = folder / asked.file
    if path.suffix == ".zip":
        counts = check_archive(path, folder)
        classes = [ImageClass(name=name, images=count) for name, count in counts.items()]
        return Described(kind="images", samples=sum(counts.values()), arrays=[], classes=classes)
    found = read_inputs(path)
    if not isinstance(found, dict):
        arrays = found if isinstance(found, tuple) else (found,)
        found = {f"arr_{number}": array for number, array in enumerate(arrays)}
    lengths = {array.shape[0] if array.dim() else 0 for array in found.values()}
    if len(found) > _MOST_ARRAYS or lengths == {0}:
        raise CheckpointError(
            f"{asked.file} holds {len(found)} arrays, without samples or too many; give 1 to {_MOST_ARRAYS}"
        )
    return Described(
        kind="arrays",
        samples=lengths.pop() if len(lengths) == 1 else None,
        arrays=[
            Array(name=name, dtype=str(array.dtype).removeprefix("torch."), shape=tuple(array.shape))
            for name, array in found.items()
        ],
        classes=[],
    )


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


_TASKS: dict[str, tuple[Any, Callable[[Any, Path], BaseModel]]] = {
    "inspect": (Source, _inspect),
    "explain": (Explaining, _explain),
    "convert": (Converting, _convert),
    "describe": (Describing, _describe),
    "catalogue": (None, _catalogue),
}
