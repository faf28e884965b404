"""Work for children that takes a moment and needs no torch, so that a killed worker is back in a second.

A checkpoint is JSON here: how long a conversion takes, how large its result is, and the seed of its bytes.
"""

from __future__ import annotations

import json
import random
import time
from pathlib import Path
from typing import Any

from pydantic import BaseModel

from api.messages import Failed, Progressed
from api.search_tasks import (
    Concluding,
    Confirmed,
    Confirming,
    Found,
    Listed,
    Listing,
    Pair,
    Prepared,
    Proposed,
    Searching,
    StudyOf,
    TrialOf,
    Tried,
    Trying,
)
from api.tasks import Converted, Converting, Described, Describing, Inspected, Made, Source

_CHOICES = {"a": ["batch", "group"], "b": ["batch", "group"]}
TRIALS, SEEDS = 5, 2
#: The stages that a conversion goes through, in which it is struck.
STAGES = ("opening", "working", "writing")


def prepare() -> None:
    """Nothing is needed."""


def result(seed: int, size: int) -> bytes:
    """Return the bytes that a conversion must come to."""
    return random.Random(seed).randbytes(size)


def run(task: str, argument: bytes, folder: Path, report: Any) -> BaseModel | Failed:
    """Do a piece of work."""
    form, work = _TASKS[task]
    made: BaseModel = work(form.model_validate_json(argument), folder, report)
    return made


def _inspect(asked: Source, folder: Path, _: Any) -> Inspected:
    return Inspected(
        format="safetensors",
        architecture="storm",
        arguments={},
        parameters=0,
        converted=False,
        notes=(),
        sites=[],
    )


def _convert(asked: Converting, folder: Path, report: Any) -> Converted:
    given = json.loads((folder / asked.source.file).read_text())
    for stage in STAGES:
        report(Progressed(stage=stage, done=0, total=1))
        time.sleep(given["seconds"] / len(STAGES))
    names = []
    for number in range(2):
        names.append(f"{asked.stem}-{number}.safetensors")
        (folder / names[-1]).write_bytes(result(given["seed"] + number, given["bytes"]))
    return Converted(
        model=_inspect(asked.source, folder, report),
        files=[Made(name=name, role="weights", media_type="application/octet-stream") for name in names],
        changed=1,
        exact=True,
        batch_independent=True,
        notes=(),
    )


def _describe(asked: Describing, folder: Path, _: Any) -> Described:
    return Described(kind="arrays", samples=100, arrays=[], classes=[])


def _prepare(asked: Searching, folder: Path, _: Any) -> Prepared:
    time.sleep(0.2)
    waiting = [
        TrialOf(number=number, state="waiting", fixed=dict.fromkeys(_CHOICES, method))
        for number, method in enumerate(("batch", "group"))
    ]
    study = StudyOf(directions=["maximize"], attributes={}, choices=_CHOICES, trials=waiting)
    return Prepared(study=study, trials=TRIALS)


def _try(asked: Trying, folder: Path, report: Any) -> Tried:
    own = asked.study.trials[asked.number]
    chosen = random.Random(asked.number)
    params = own.params or own.fixed or {name: chosen.choice(some) for name, some in _CHOICES.items()}
    report(Progressed(stage="trial", done=0, total=0, note=Proposed(params=params).model_dump()))
    time.sleep(0.5)
    return Tried(
        params=params, state="complete", values=[float(asked.number)], constraints={}, error=None, next=[]
    )


def _pairs(asked: Listing, folder: Path, _: Any) -> Listed:
    return Listed(pairs=[Pair(number=0, seed=seed) for seed in range(1, SEEDS + 1)])


def _confirm(asked: Confirming, folder: Path, _: Any) -> Confirmed:
    time.sleep(0.7)
    return Confirmed(score=float(asked.pair.seed))


def _conclude(asked: Concluding, folder: Path, _: Any) -> Found:
    time.sleep(0.2)
    states = [trial.state for trial in asked.study.trials]
    scores = json.loads(asked.study.attributes["normsearch:confirmation"])
    if states.count("complete") != TRIALS or len(scores) != SEEDS:
        raise RuntimeError(f"{states}, {scores}")
    name = f"{asked.search.stem}.safetensors"
    (folder / name).write_bytes(result(len(states), 1000))
    made = Made(name=name, role="weights", media_type="application/octet-stream")
    return Found(files=[made], methods={}, chosen=0, confirmation=[], trials=len(states), notes=())


_TASKS: dict[str, tuple[Any, Any]] = {
    "inspect": (Source, _inspect),
    "convert": (Converting, _convert),
    "describe": (Describing, _describe),
    "search": (Searching, _prepare),
    "trial": (Trying, _try),
    "pairs": (Listing, _pairs),
    "confirm": (Confirming, _confirm),
    "conclude": (Concluding, _conclude),
}
