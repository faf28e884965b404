"""Commands that search: search, worker, status."""

from __future__ import annotations

import json
import sys
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager, redirect_stdout
from enum import StrEnum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from normsearch.arguments import split_methods
from normsearch.commands.options import Force, Json, Title
from normsearch.commands.running import OUT, fail, following, print_json, progress, refuse_outputs, reported
from normsearch.commands.search_outputs import (
    folder_or_weights,
    places_of,
    refuse_places,
    rows_of,
    told_plan,
    write_found,
)
from normsearch.commands.tasks import check_spelling, load_task, place, said
from normsearch.errors import NormsearchError, SearchError

# Optuna takes half a second to import: inside the commands, so that --help does not wait for it.
if TYPE_CHECKING:
    from normsearch.searching import Constraint


class Direction(StrEnum):
    """Whether more or less of a number is better."""

    MAXIMIZE = "maximize"
    MINIMIZE = "minimize"


class Cost(StrEnum):
    """A known cost that is an objective too."""

    LATENCY = "latency"
    MEMORY = "memory"


class Sampler(StrEnum):
    """What proposes plans."""

    AUTO = "auto"
    NORM = "norm"
    TPE = "tpe"
    GP = "gp"
    NSGA2 = "nsga2"
    RANDOM = "random"


_Task = Annotated[
    str,
    typer.Option(
        "--task",
        metavar="PACKAGE.MODULE:TASK",
        help="A function without arguments that returns (model, objective): the trained network, and a "
        "normsearch.searching.Task or a function of (model, trial). It is imported and run; the current "
        "folder is looked in first.",
        show_default=False,
    ),
]
_STORAGE = (
    "Where trials are kept: a journal file, for processes of one machine, or "
    "postgresql://USER:PASSWORD@HOST/DATABASE for many. [default: STUDY.journal]"
)
_Storage = Annotated[str | None, typer.Option(help=_STORAGE, show_default=False)]


@reported
def search(
    task: _Task,
    methods: Annotated[
        list[str] | None,
        typer.Option(
            help="Methods to choose from, the preferred first, with commas; repeat. [default: batch,group,"
            "layer,instance,batch_instance,switchable,batch_renorm]",
            show_default=False,
        ),
    ] = None,
    sites: Annotated[
        list[str] | None,
        typer.Option(
            metavar="PATTERN",
            help="Search only sites whose path matches; the others keep their BatchNorm. Repeat.",
            show_default=False,
        ),
    ] = None,
    trials: Annotated[
        int, typer.Option(min=1, help="Trials in all, earlier ones and those of workers included.")
    ] = 100,
    study: Annotated[
        str | None,
        typer.Option(
            help="Name of the study; one that exists goes on. [default: the task's name]", show_default=False
        ),
    ] = None,
    storage: _Storage = None,
    sampler: Annotated[Sampler, typer.Option(help="What proposes plans; auto is norm.")] = Sampler.AUTO,
    seed: Annotated[int, typer.Option(min=0, help="The same seed gives the same result.")] = 0,
    direction: Annotated[
        list[Direction] | None,
        typer.Option(
            help="For each number that the objective returns, in order; repeat. [default: maximize]",
            show_default=False,
        ),
    ] = None,
    cost: Annotated[
        list[Cost] | None,
        typer.Option(help="A cost to minimise beside, measured once; repeat.", show_default=False),
    ] = None,
    max_drop: Annotated[
        float | None,
        typer.Option(help="How much worse than the original's score it may be.", show_default=False),
    ] = None,
    max_latency: Annotated[
        float | None,
        typer.Option(
            metavar="RATIO",
            help="The longest forward pass, as a ratio to the original's; plans above are not trained.",
            show_default=False,
        ),
    ] = None,
    max_memory: Annotated[
        float | None,
        typer.Option(
            metavar="RATIO",
            help="The most that is kept for the backward pass, as a ratio to the original's.",
            show_default=False,
        ),
    ] = None,
    batch_independent: Annotated[
        bool,
        typer.Option(
            "--batch-independent", help="Try no method under which samples of a batch depend on each other."
        ),
    ] = False,
    veto: Annotated[
        float | None,
        typer.Option(
            help="Try no method at a site where alone it moves the output further than this (relative L2). "
            "[default: 0.75]",
            show_default=False,
        ),
    ] = None,
    no_veto: Annotated[bool, typer.Option("--no-veto", help="Try every method that may stand.")] = False,
    sense: Annotated[
        bool,
        typer.Option(
            "--sense/--no-sense", help="Ask a network that trains all methods at once first; a Task only."
        ),
    ] = True,
    confirm: Annotated[
        int,
        typer.Option(
            min=0,
            help="Fresh seeds that the best plans are run again with; 1 cannot tell a mix from noise.",
        ),
    ] = 5,
    top: Annotated[int, typer.Option(min=1, help="How many mixes are confirmed.")] = 3,
    output: Annotated[
        Path | None,
        typer.Option(
            "--output",
            "-o",
            help="A folder for model.safetensors, plan.json, report.html and report.json; or "
            "NAME.safetensors, and the others beside it. [default: a folder named after the study]",
            show_default=False,
        ),
    ] = None,
    title: Title = None,
    force: Force = False,
    as_json: Json = False,
) -> None:
    """Search the normalization method of every site; the best plan is confirmed on data no trial saw.

    normsearch search --task mytask:task --methods batch,group,instance --trials 60 -o found/

    Ctrl-C loses nothing: the same command goes on. More workers: normsearch worker.
    """
    if veto is not None and no_veto:
        raise typer.BadParameter("give --veto or --no-veto, not both", param_hint="--veto")
    name = _study_name(study, task)
    kept = storage or f"{name}.journal"
    places = places_of(Path(name)) if output is None else places_of(folder_or_weights(output))
    journal = None if "://" in kept else Path(kept)
    refuse_places(places, journal, force=force)
    from normsearch import searching
    from normsearch.searching.preparing import VETO
    from normsearch.searching.trials import finished_trials

    constraints = _constraints(max_drop, max_latency, max_memory, batch_independent)
    with progress("preparing the task"):
        model, objective = load_task(task)
    given: dict[str, Any] = {"methods": split_methods(methods)} if methods else {}
    with _kept(kept), following(lines=True) as follow:
        found = searching.search(
            model,
            objective,
            **given,
            sites=sites or None,
            directions=[one.value for one in direction or [Direction.MAXIMIZE]],
            costs=[one.value for one in cost or []],
            constraints=constraints,
            n_trials=trials,
            storage=kept,
            name=name,
            sampler=sampler.value,
            seed=seed,
            veto=None if no_veto else VETO if veto is None else veto,
            sense=sense,
            confirm=confirm,
            top=top,
            on_progress=follow,
        )
    with _kept(kept), progress(f"writing {places[0]}"):
        report = searching.search_report(found, score=_score_of(objective), title=title)
        write_found(found, report, places, force=force)
    if as_json:
        print_json(
            {
                "written": [str(path) for path in places],
                "study": name,
                "trials": finished_trials(found.study),
                "plan": json.loads(found.best.to_json()),
                "params": found.further,
                "chosen": found.chosen,
                "confirmation": rows_of(found.confirmation),
                "same_split": found.same_split,
            }
        )
        return
    OUT.print(found)
    OUT.print(told_plan(found.best, found.further), highlight=False, markup=False)
    typer.echo(f"wrote {', '.join(map(str, places))}")


@reported
def worker(
    task: _Task,
    study: Annotated[str, typer.Option(help="Name of the study to join.", show_default=False)],
    storage: _Storage = None,
    as_json: Json = False,
) -> None:
    """Run trials of a search that was started elsewhere, until it has all it asked for.

    normsearch worker --study mytask --storage postgresql://me@db.example/trials --task mytask:task

    The task is this command line's, never one that the study names; it should be the same as the search's.
    A worker that is killed loses nothing: another one runs its trial.
    """
    from normsearch import searching
    from normsearch.searching.storage import refuse_missing

    kept = storage or f"{study}.journal"
    refuse_missing(kept)
    with progress("preparing the task"):
        model, objective = load_task(task)
    ran = 0

    def follow(step: Any) -> None:
        nonlocal ran
        ran += step.detail != ""
        show(step)

    with _kept(kept), following(lines=True) as show:
        searching.join(model, objective, name=study, storage=kept, on_progress=follow)
    if as_json:
        print_json({"study": study, "trials_run": ran})
    else:
        typer.echo(f"the study {study!r} has all its trials; {ran} of them ran here")


@reported
def status(
    task: _Task,
    study: Annotated[
        str | None, typer.Option(help="Name of the study. [default: the task's name]", show_default=False)
    ] = None,
    storage: _Storage = None,
    output: Annotated[
        Path | None,
        typer.Option(
            "--output",
            "-o",
            help="Write the report so far: NAME.html, and NAME.json beside it.",
            show_default=False,
        ),
    ] = None,
    title: Title = None,
    force: Force = False,
    as_json: Json = False,
) -> None:
    """Say how far a search has come that goes on elsewhere, or was interrupted; nothing is run.

    normsearch status --task mytask:task -o so-far.html
    """
    from normsearch import searching
    from normsearch.searching.findings import Findings, state
    from normsearch.searching.storage import refuse_missing

    name = _study_name(study, task)
    kept = storage or f"{name}.journal"
    refuse_missing(kept)
    places = [] if output is None else [output.with_suffix(".html"), output.with_suffix(".json")]
    refuse_outputs(places, [None if "://" in kept else Path(kept)], force=force)
    with progress("preparing the task"):
        model, objective = load_task(task)
    with _kept(kept):
        found = Findings.of_study(model, name=name, storage=kept, score=_score_of(objective))
        if places:
            searching.search_report(found, title=title).save(places[0], force=force)
    counts = Counter(state(trial) for trial in found.counted)
    best = None if found.best is None else found.by_number[found.best]
    if as_json:
        leading = None if best is None else {"trial": best.number, "values": best.values}
        plan = None if best is None else json.loads(found.best_plan.to_json())
        print_json(
            {
                "written": [str(path) for path in places],
                "study": name,
                "trials": found.wanted,
                "states": counts,
                "leading": leading,
                "plan": plan,
                "params": found.further,
                "confirmation": rows_of(found.confirmed.values()),
            }
        )
        return
    told = ", ".join(f"{count} {what}" for what, count in counts.items()) or "none has begun"
    typer.echo(f"the study {name!r} has {found.wanted} trials to run: {told}")
    if best is not None:
        values = ", ".join(
            f"{goal.name} {value:.4g}" for goal, value in zip(found.goals, best.values, strict=True)
        )
        row, name = found.confirmed.get(best.number), found.name(best.number)
        told = f"leading, not confirmed: {name}, {values}"
        if row is not None:
            seeds = f"{len(row.scores)} {'seed' if len(row.scores) == 1 else 'seeds'}"
            score = f"{found.goals[0].name} {row.mean:.4g} over {seeds}"
            told = f"confirmed: {name}, {score}; in the search {values}"
        OUT.print(told, highlight=False, markup=False)
        OUT.print(told_plan(found.best_plan, found.further), highlight=False, markup=False)
    if places:
        typer.echo(f"wrote {', '.join(map(str, places))}")


def _score_of(objective: Any) -> str:
    """Return what a task's first number is called."""
    return str(getattr(getattr(objective, "metric", None), "__name__", "score"))


def _study_name(study: str | None, task: str) -> str:
    """Return the name of a study, which names files too.

    Raises:
        SearchError: it cannot name one.

    """
    check_spelling(task)
    if study is None:
        module, _, function = task.partition(":")
        # Two tasks of one module are two searches.
        module = module.rpartition(".")[2]
        study = module if function in ("", "task") else f"{module}.{function}"
    name = study
    if not name or name != Path(name).name or not name.isprintable() or name.startswith("."):
        raise SearchError(f"--study {name!r}: give a name that a file may have too")
    return name


def _constraints(
    drop: float | None, latency: float | None, memory: float | None, independent: bool
) -> list[Constraint]:
    from normsearch import searching

    found: list[Constraint] = []
    if drop is not None:
        found.append(searching.MaxDrop(drop))
    if latency is not None:
        found.append(searching.MaxLatency(latency))
    if memory is not None:
        found.append(searching.MaxMemory(memory))
    return [*found, searching.BatchIndependent()] if independent else found


@contextmanager
def _kept(storage: str) -> Iterator[None]:
    """Say on Ctrl-C, and where the task or the storage fails, that nothing is lost, and how to go on.

    What the task prints goes to stderr, so that stdout holds the command's own words or JSON.
    """
    # A URL may hold a password.
    where = "the database" if "://" in storage else storage
    try:
        with redirect_stdout(sys.stderr):
            yield
    except (NormsearchError, OSError, MemoryError):
        raise
    except Exception as error:
        from optuna.exceptions import StorageInternalError

        if isinstance(error, StorageInternalError):
            fail(f"{where} cannot be used any more; what was told it is kept: the same command goes on")
        if not place(error):
            # Not the task's: a mistake in this library, which its traceback tells.
            raise
        fail(
            f"the task failed: {said(error)}{place(error)}; what is done is kept in {where}: mend it, and "
            "the same command goes on"
        )
    except KeyboardInterrupt:
        typer.echo(f"interrupted; everything is kept in {where}: the same command goes on", err=True)
        raise typer.Exit(130) from None
