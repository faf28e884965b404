"""search: find a method for each site by training a few plans, and prove it on data not seen before."""

from __future__ import annotations

import os
from collections.abc import Iterable, Sequence
from typing import Any

from optuna.samplers import BaseSampler
from optuna.storages import BaseStorage
from torch import nn

from normsearch.methods import Method
from normsearch.progress import OnProgress, Progress
from normsearch.searching.checking import check_callback, check_whole
from normsearch.searching.constraints import Constraint
from normsearch.searching.objectives import Objective
from normsearch.searching.preparing import VETO
from normsearch.searching.results import SINGLE_SEED, SearchResult
from normsearch.searching.space import METHODS
from normsearch.searching.stepwise import Search
from normsearch.searching.tasks import Task


def search(
    model: nn.Module,
    objective: Objective | Task,
    *,
    methods: Sequence[str | Method] = METHODS,
    sites: Iterable[str] | None = None,
    directions: Sequence[str] = ("maximize",),
    costs: Sequence[str] = (),
    constraints: Sequence[Constraint] = (),
    n_trials: int = 100,
    storage: str | os.PathLike[str] | BaseStorage | None = None,
    name: str | None = None,
    sampler: str | BaseSampler = "auto",
    seed: int = 0,
    inputs: Iterable[Any] | None = None,
    veto: float | None = VETO,
    sense: bool = True,
    confirm: int = 5,
    top: int = 3,
    on_progress: OnProgress | None = None,
) -> SearchResult:
    """Search the normalization method of every site: train a few plans, confirm the best on other data.

    In order: the sites and methods that may be combined are listed; costs are measured where an objective or
    constraint needs them; methods that destroy the output at a site are vetoed (``sensitivity``); sites are
    tied by stage if there are more than ``n_trials`` can tell apart; a supernet senses what each method is
    worth (``Task`` alone); trials convert, train and score one plan each, starting with the uniform plans, a
    few that the prior suggests and what trained gates say; the best few plans and the best uniform one are
    run again under fresh seeds on data that no trial saw, and a mix is returned only if it beats the uniform
    plan beyond noise there. A plan that fails when it is run again is out, and the next best takes its place.

    Every trial starts from the same trained weights and the same seed. An exception or an interruption loses
    nothing where ``storage`` or ``name`` says where the study is kept: the same call goes on with it. More
    workers may join (``normsearch worker``). The data is read without any accounting for privacy.

    Args:
        model: the trained network; it is copied once and left alone.
        objective: called with the converted network, in the modes of ``model``, and the Optuna trial; may
            train it; returns a number, or one for each direction. It may suggest further parameters. A
            ``confirm`` method of the same kind is used on the best plans, else the objective itself, with an
            ``optuna.trial.FixedTrial``. Or a ``Task``.
        methods: methods or spellings to choose from, the preferred first.
        sites: glob patterns of site paths to search; the others keep their BatchNorm.
        directions: ``maximize`` or ``minimize`` for each number of the objective.
        costs: ``latency``, ``memory``: objectives to minimise beside, known for every plan beforehand.
        constraints: ``MaxDrop``, ``MaxLatency``, ``MaxMemory``, ``BatchIndependent``.
        n_trials: trials in all, those of earlier calls and of other workers included; no more than there are
            plans, unless the objective suggests further parameters. Sites are tied for what the first call
            asks for.
        storage: where the study is kept: a journal file's path, a ``postgresql://`` URL, an Optuna storage;
            by default a file ``NAME.journal`` if there is a name, else memory.
        name: of the study.
        sampler: ``auto`` (``norm``), ``norm``, ``tpe``, ``gp``, ``nsga2``, ``random``, or one of Optuna's.
        seed: of everything random, at most 2⁶².
        inputs: batches of inputs for sensitivity and costs; by default a ``Task``'s training inputs.
        veto: the largest drift of a single change that may be tried; None vetoes nothing.
        sense: whether to ask a supernet first; only a ``Task`` can be asked.
        confirm: fresh seeds that the best plans are run with; 1 cannot tell a mix from noise, so that the
            uniform plan is returned; 0 skips confirmation, and the best plan is then taken at its word.
        top: how many mixes are confirmed.
        on_progress: called after every step of every stage.

    Returns:
        A ``SearchResult``.

    Raises:
        SearchError: arguments contradict each other, the objective fails in the first trials or with every
            plan that is run again, no trial meets the constraints, or a study of this name has other
            settings.
        PlanError: the model has no BatchNorm, or a pattern matches none.
        MethodError: a spelling is not valid.

    Source: the search of a mixture per layer instead of by gradient, as Luo et al., 2018, arXiv:1806.10779
    (switchable), and Nam and Kim, 2018, arXiv:1805.07925 (batch-instance) learn it.

    Example:
        >>> import torch, normsearch
        >>> model = torch.nn.Sequential(torch.nn.Conv2d(1, 8, 3), torch.nn.BatchNorm2d(8)).eval()
        >>> x = torch.randn(4, 1, 6, 6)
        >>> y = model(x)
        >>> result = normsearch.search(
        ...     model,
        ...     lambda converted, trial: float((converted.eval()(x) - y).square().mean()),
        ...     directions=["minimize"],
        ...     methods=["group", "frozen"],
        ...     n_trials=2,
        ...     confirm=2,
        ... )
        >>> result.best["1"]
        Frozen(trainable=False)

    """
    confirm, top = check_whole("confirm", confirm, 0), check_whole("top", top, 1)
    check_callback(on_progress)
    if confirm == 1 and on_progress is not None:
        on_progress(Progress("searching", 0, n_trials, None, SINGLE_SEED))
    run = Search(
        model,
        objective,
        methods=methods,
        sites=sites,
        directions=directions,
        costs=costs,
        constraints=constraints,
        storage=storage,
        name=name,
        sampler=sampler,
        seed=seed,
        inputs=inputs,
        veto=veto,
        sense=sense,
        n_trials=n_trials,
        on_progress=on_progress,
    )
    run.forget_failures()
    run.optimize(on_progress=on_progress)
    return run.result(confirm=confirm, top=top, on_progress=on_progress)
