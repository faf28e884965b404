"""Searches as jobs: one process prepares, waits and concludes; trials go to every worker that has a place.

The trials of a search, and then the plans that are run again, are rows of ``job_parts``. A few workflows,
the explorers, take one row after the other, on whichever workers the queue gives them to. An explorer whose
worker is lost is given to another one and goes on with the row that it had. So every part is done by one
process at a time and told once, and a process that is lost costs what it was doing.
"""

from __future__ import annotations

import json
import threading
import time
from contextlib import ExitStack
from pathlib import Path
from typing import TYPE_CHECKING, Any

import sqlalchemy as sa
from pydantic import ValidationError

from api import jobs
from api.conversions import keep_artifacts, receive
from api.database import PARTS
from api.hearing import KilledError
from api.inputs import data_of, model_of, stem
from api.job_schemas import SearchRequest
from api.messages import Progressed
from api.problems import ProblemError
from api.queueing import PART_QUEUE
from api.runs import Run
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
    Tried,
    Trying,
)
from api.settings import Settings

if TYPE_CHECKING:
    from api.studies import Studies

#: Where studies are: a file beside SQLite's, or a schema.
STUDIES_FILE, STUDIES_SCHEMA = "searches.sqlite", "optuna"
#: A part is tried so often: workers and children that died of it count.
_ATTEMPTS = 3
#: Seconds between two looks at how far the parts are.
_LOOK = 0.5
#: So many first trials that fail in the same way are no accident.
_SAME_FAILURES = 3


def search(run: Run) -> None:
    """Search the plan of a model: prepare, have every part done, conclude."""
    asked, files = _asked(run)
    studies = _studies(run)
    trials = run.lasting(lambda: studies.trials(run.job.id))
    if trials is None:
        with run.child("search", asked, Prepared, files) as ready:
            prepared = ready.result
        run.lasting(lambda: studies.make(run.job.id, prepared))
        trials = prepared.trials
        run.log(f"prepared; {trials} trials over {len(prepared.study.choices)} choices")
    _have_done(run, "trial", ["{}"] * trials)
    again = _confirmed(run, asked, files) if asked.confirm else {}
    study = run.lasting(lambda: studies.told(run.job.id, again))
    concluding = Concluding(search=asked, study=study)
    with run.child("conclude", concluding, Found, files) as finished, ExitStack() as stack:
        made = finished.result
        received = receive(run.tools, run.owner, finished, made.files, stack)

        def keep(connection: sa.Connection) -> dict[str, Any]:
            model = str(run.job.model)
            rows = keep_artifacts(connection, run.tools, run.owner, model, run.job.id, received)
            told = made.model_dump(mode="json", exclude={"files"})
            return {"artifacts": [row.id for row in rows], **told}

        run.publish(keep)


def _confirmed(run: Run, asked: Searching, files: dict[str, Path]) -> dict[str, Any]:
    """Have the best plans run again; return their scores by trial and seed, and why some failed.

    Those that take the place of one that failed are run again by the process that concludes.
    """
    listing = Listing(search=asked, study=run.lasting(lambda: _studies(run).told(run.job.id)))
    with run.child("pairs", listing, Listed, files) as finished:
        pairs = finished.result.pairs
    run.log(f"{len(pairs)} runs confirm the best plans")
    done = _have_done(run, "confirm", [pair.model_dump_json() for pair in pairs])
    scores: dict[str, float] = {}
    failures: dict[str, dict[str, Any]] = {}
    for pair, text in zip(pairs, done, strict=True):
        found = json.loads(text)
        if found.get("error") is not None:
            failures.setdefault(str(pair.number), {"seed": pair.seed, "reason": found["error"]})
        elif found.get("score") is not None:
            scores[f"{pair.number}/{pair.seed}"] = found["score"]
    return {"confirmation": scores, "failures": failures}


def explore(run: Run) -> None:
    """Take parts of a search, one after the other, until none is left."""
    asked, files = _asked(run)
    stage = run.claim.workflow.split("-")[1]
    work = _STAGES[stage]
    while (part := run.lasting(lambda: _take(run, stage))) is not None:
        if part.attempts > _ATTEMPTS:
            result = _give_up(run, part)
        else:
            try:
                result = work(run, part, asked, files)
            except KilledError:
                run.log(f"{stage} {part.number}: its child was killed")
                continue
            except ProblemError as problem:
                if problem.status in (503, 507):
                    raise
                result = _failed(run, part, problem)
        run.lasting(lambda: _keep(run, part, result))  # noqa: B023 (done before the next turn)


def _have_done(run: Run, stage: str, parts: list[str]) -> list[str]:
    """Let explorers do parts, and return what each came to, when all have."""
    run.lasting(lambda: _begin(run, stage, parts))
    shown = Stage("searching" if stage == "trial" else "confirming", len(parts))
    while True:
        rows = run.lasting(lambda: _rows(run, stage))
        done = [json.loads(row.result) for row in rows if row.result is not None]
        if (step := shown.at(len(done))) is not None:
            run.advance(step)
        if stage == "trial":
            _refuse_failures(done)
        if len(done) == len(parts):
            return [str(row.result) for row in rows]
        if run.cancelled.wait(_LOOK):
            run.check()


class Stage:
    """How far parts are that others do."""

    def __init__(self, name: str, total: int) -> None:
        self._name, self._total = name, total
        self._first, self._last, self._start = -1, -1, time.monotonic()

    def at(self, done: int) -> Progressed | None:
        """Return what is to be told of it; None if nothing is new."""
        if done == self._last:
            return None
        self._first, self._last = done if self._first < 0 else self._first, done
        left = None
        if done > self._first:
            pace = (time.monotonic() - self._start) / (done - self._first)
            left = pace * (self._total - done)
        return Progressed(stage=self._name, done=done, total=self._total, seconds_left=left)


def _refuse_failures(done: list[dict[str, Any]]) -> None:
    """End a search whose first trials all fail alike."""
    errors = {one["error"] for one in done}
    if len(done) >= _SAME_FAILURES and len(errors) == 1 and None not in errors:
        raise ProblemError(422, "failed", f"the first {len(done)} trials failed: {errors.pop()}; mend that")


def _begin(run: Run, stage: str, parts: list[str]) -> None:
    """Make the rows of a stage and its explorers, once."""
    with run.tools.database.write() as connection:
        if not jobs.holds(connection, run.tools.queue, run.claim, run.job.id):
            return
        there = sa.select(sa.func.count()).where(PARTS.c.job == run.job.id, PARTS.c.stage == stage)
        if connection.scalar(there):
            return
        rows = [
            {"job": run.job.id, "stage": stage, "number": number, "asked": asked, "attempts": 0}
            for number, asked in enumerate(parts)
        ]
        if rows:
            connection.execute(sa.insert(PARTS), rows)
        most = run.tools.settings.search_parts if _studies(run).is_shared else 1
        for number in range(min(most, len(rows))):
            workflow = f"{run.job.id}-{stage}-{number}"
            run.tools.queue.put(connection, workflow, PART_QUEUE, run.job.id, f"{stage}-{number}")


def _rows(run: Run, stage: str) -> list[sa.Row[Any]]:
    with run.tools.database.read() as connection:
        query = sa.select(PARTS).where(PARTS.c.job == run.job.id, PARTS.c.stage == stage)
        return list(connection.execute(query.order_by(PARTS.c.number)).all())


def _take(run: Run, stage: str) -> sa.Row[Any] | None:
    """Return the part that this explorer had, or else the next one; None where none is left."""
    here = (PARTS.c.job == run.job.id, PARTS.c.stage == stage, PARTS.c.result.is_(None))
    mine = PARTS.c.holder == run.claim.workflow
    with run.tools.database.write() as connection:
        held = sa.select(PARTS).where(*here, sa.or_(mine, PARTS.c.holder.is_(None)))
        # What is mine first.
        order = (sa.case((mine, 0), else_=1), PARTS.c.number)
        row = connection.execute(
            held.order_by(*order).limit(1).with_for_update(skip_locked=True)
        ).one_or_none()
        if row is None or not connection.scalar(sa.select(run.tools.queue.is_held(run.claim))):
            return None
        this = (PARTS.c.job == run.job.id, PARTS.c.stage == stage, PARTS.c.number == row.number)
        values = {"holder": run.claim.workflow, "attempts": PARTS.c.attempts + 1}
        changed = sa.update(PARTS).where(*this).values(values)
        return connection.execute(changed.returning(*PARTS.c)).one_or_none()


def _keep(run: Run, part: sa.Row[Any], result: str) -> None:
    """Write down what a part came to, once."""
    this = (PARTS.c.job == part.job, PARTS.c.stage == part.stage, PARTS.c.number == part.number)
    mine = (PARTS.c.holder == run.claim.workflow, PARTS.c.result.is_(None))
    with run.tools.database.write() as connection:
        held = run.tools.queue.is_held(run.claim)
        connection.execute(sa.update(PARTS).where(*this, *mine, held).values(result=result))


def _try(run: Run, part: sa.Row[Any], asked: Searching, files: dict[str, Path]) -> str:
    """Run a trial."""
    studies = _studies(run)
    number = run.lasting(lambda: studies.take(run.job.id, int(part.number)))
    trying = Trying(search=asked, study=run.lasting(lambda: studies.told(run.job.id)), number=number)

    def follow(step: Progressed) -> None:
        if step.note is None:
            return
        try:
            params = Proposed.model_validate(step.note).params
        except ValidationError as error:
            raise ProblemError(422, "failed", "the process that worked on it misbehaved") from error
        run.lasting(lambda: studies.propose(run.job.id, number, params))

    with run.child("trial", trying, Tried, files, follow) as finished:
        tried = finished.result
    if tried.state == "complete" and len(tried.values or ()) != len(trying.study.directions):
        raise ProblemError(422, "failed", "the process that worked on it misbehaved: it gave other numbers")
    run.lasting(lambda: studies.tell(run.job.id, number, tried))
    said = ", ".join(f"{value:.4g}" for value in tried.values or ()) or (tried.error or tried.state)
    run.log(f"trial {number}: {said}")
    return json.dumps({"trial": number, "error": tried.error})


def _confirm(run: Run, part: sa.Row[Any], asked: Searching, files: dict[str, Path]) -> str:
    """Run a plan again, unless it has failed with another seed."""
    pair = Pair.model_validate_json(str(part.asked))
    if pair.number in _out(run):
        return Confirmed(score=None).model_dump_json()
    study = run.lasting(lambda: _studies(run).told(run.job.id))
    confirming = Confirming(search=asked, study=study, pair=pair)
    with run.child("confirm", confirming, Confirmed, files, lambda _: None) as finished:
        found = finished.result
    said = f"failed: {found.error}" if found.score is None else f"{found.score:.4g}"
    run.log(f"trial {pair.number} with seed {pair.seed}: {said}")
    return found.model_dump_json()


def _out(run: Run) -> set[int]:
    """Return the trials whose plans failed when they were run again."""
    rows = [row for row in _rows(run, "confirm") if row.result is not None]
    failed = [row for row in rows if json.loads(row.result).get("error") is not None]
    return {Pair.model_validate_json(str(row.asked)).number for row in failed}


#: What is done of a search in parts, in order.
_STAGES = {"trial": _try, "confirm": _confirm}


def _give_up(run: Run, part: sa.Row[Any]) -> str:
    text = f"{_ATTEMPTS} processes died of it (killed, out of memory?)"
    return _failed(run, part, ProblemError(422, "failed", f"{part.stage} {part.number}: {text}"))


def _failed(run: Run, part: sa.Row[Any], problem: ProblemError) -> str:
    """Write down that a part came to nothing."""
    if part.stage == "trial":
        studies = _studies(run)
        tried = Tried(
            params={}, state="fail", values=None, constraints={}, error=problem.detail[:1000], next=[]
        )
        number = run.lasting(lambda: studies.take(run.job.id, int(part.number)))
        run.lasting(lambda: studies.tell(run.job.id, number, tried))
    run.log(problem.detail)
    return json.dumps({"problem": problem.document(), "error": problem.detail})


def _asked(run: Run) -> tuple[Searching, dict[str, Path]]:
    """Return a search as children are told of it, and their files."""
    request = SearchRequest.model_validate_json(run.job.request)
    files, told, name = model_of(run, request.model)
    recipe = request.recipe
    data = data_of(run, files, request.dataset, recipe.batch_size, request.samples)
    assert data is not None
    asked = Searching(
        source=told,
        data=data,
        methods=None if request.methods is None else tuple(request.methods),
        sites=None if request.sites is None else tuple(request.sites),
        trials=request.trials,
        recipe=recipe,
        constraints=request.constraints,
        costs=tuple(request.costs),
        seed=request.seed,
        veto=request.veto,
        sense=request.sense,
        confirm=request.confirm,
        top=request.top,
        stem=stem(name),
    )
    return asked, files


_lock = threading.Lock()
_opened: list[Studies] = []


def studies_of(settings: Settings) -> Studies:
    """Return the studies, opened when the first search needs them."""
    with _lock:
        if not _opened:
            # Optuna takes a while to import.
            from api.studies import Studies

            _opened.append(Studies(settings))
        return _opened[0]


def has_studies(connection: sa.Connection) -> bool:
    """Tell whether there was ever a search, without making anything for the first."""
    url = connection.engine.url
    if url.get_backend_name() == "sqlite":
        return Path(str(url.database)).with_name(STUDIES_FILE).exists()
    query = "SELECT count(*) FROM information_schema.schemata WHERE schema_name = :name"
    return bool(connection.scalar(sa.text(query), {"name": STUDIES_SCHEMA}))


def _studies(run: Run) -> Studies:
    return studies_of(run.tools.settings)


def workflows_of(job: str, settings: Settings) -> list[str]:
    """Return the workflows that a search may have had, its own included."""
    stages = (f"{job}-{stage}-{number}" for stage in _STAGES for number in range(settings.search_parts))
    return [job, *stages]
