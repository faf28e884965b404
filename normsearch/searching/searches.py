"""search: find a method for each site by training a few plans, and prove it on data not seen before."""

from __future__ import annotations

import os
from collections.abc import Iterable, Sequence
from dataclasses import asdict
from typing import Any

from optuna.samplers import BaseSampler
from optuna.storages import BaseStorage
from optuna.trial import FrozenTrial, Trial, TrialState
from torch import nn

from normsearch.errors import SearchError
from normsearch.methods import Method
from normsearch.plans import Plan
from normsearch.progress import OnProgress, Stage
from normsearch.searching.checking import check_arguments, check_whole
from normsearch.searching.confirming import Candidate, candidates, decide
from normsearch.searching.constraints import Constraint, checked
from normsearch.searching.costs import check_cost
from normsearch.searching.identity import identity
from normsearch.searching.objectives import Objective, direction_names
from normsearch.searching.preparing import prepare
from normsearch.searching.resident import Resident
from normsearch.searching.results import SearchResult
from normsearch.searching.samplers import check_sampler, sampler_named
from normsearch.searching.space import METHODS
from normsearch.searching.studies import Memory, Settings, made_study
from normsearch.searching.tasks import Task
from normsearch.searching.workers import evaluation, work
from normsearch.sensitivities import Sensitivity

#: A single change that moves the output this far (relative L2) destroys more than a short training mends.
VETO = 0.75


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
    plan beyond noise there.

    Every trial starts from the same trained weights and the same seed. An exception or an interruption loses
    nothing where ``storage`` or ``name`` says where the study is kept: the same call goes on with it. More
    workers may join (``normsearch worker``). The data is read without any accounting for privacy.

    Args:
        model: the trained network; it is copied once and left alone.
        objective: called with the converted network, in the modes of ``model``, and the Optuna trial; may
            train it; returns a number, or one for each direction. It may suggest further parameters. A
            ``confirm`` method of the same kind is used on the best plans, else the objective itself. Or a
            ``Task``.
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
        seed: of everything random.
        inputs: batches of inputs for sensitivity and costs; by default a ``Task``'s training inputs.
        veto: the largest drift of a single change that may be tried; None vetoes nothing.
        sense: whether to ask a supernet first; only a ``Task`` can be asked.
        confirm: fresh seeds that the best plans are run with; 0 skips confirmation, and the best plan is then
            taken at its word.
        top: how many mixes are confirmed.
        on_progress: called after every step of every stage.

    Returns:
        A ``SearchResult``.

    Raises:
        SearchError: arguments contradict each other, the objective fails, no trial meets the constraints, or
            a study of this name has other settings.
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
    run.optimize(on_progress=on_progress)
    return run.result(confirm=confirm, top=top, on_progress=on_progress)


class Search:
    """A search that can be driven by hand: what ``search`` does, step by step.

    Making one prepares the study: space, costs, veto, ties, prior and first plans, each once for all workers
    and resumptions. Then ``optimize``, or ``ask`` for a trial, take its ``plan`` (or ``evaluate`` it) and
    ``tell`` what it scored; at the end ``result``.

    Args: as for ``search``.

    Example:
        >>> import torch
        >>> from normsearch.searching import Search
        >>> model = torch.nn.Sequential(torch.nn.Conv2d(1, 8, 3), torch.nn.BatchNorm2d(8)).eval()
        >>> run = Search(model, None, methods=["batch", "group"], n_trials=4)
        >>> trial = run.ask()
        >>> plan = run.plan(trial)
        >>> run.tell(trial, 0.5)

    """

    def __init__(
        self,
        model: nn.Module,
        objective: Objective | Task | None,
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
        on_progress: OnProgress | None = None,
    ) -> None:
        check_whole("n_trials", n_trials, 1)
        check_whole("seed", seed, 0)
        check_arguments(model, methods, sites, veto, name)
        costs = (costs,) if isinstance(costs, str) else costs
        self.n_trials = n_trials
        for cost in costs:
            check_cost(cost)
        if isinstance(sampler, str):
            check_sampler(sampler)
        self._objective = objective
        given = objective.inputs() if inputs is None and isinstance(objective, Task) else inputs
        named = sampler if isinstance(sampler, str) else type(sampler).__name__
        settings = Settings(
            methods=tuple(str(m) for m in ([methods] if isinstance(methods, str | Method) else methods)),
            sites=None if sites is None else tuple([sites] if isinstance(sites, str) else sites),
            directions=direction_names(directions),
            costs=tuple(costs),
            constraints=tuple((type(c).__name__, asdict(c)) for c in checked(constraints)),
            sampler=named,
            seed=seed,
            veto=veto,
            sense=bool(sense) and isinstance(objective, Task),
        )
        self.resident = Resident(model)
        self.study = made_study(settings, storage, name)
        self.memory = Memory(self.study)
        self.memory.keep_settings(settings)
        self.memory.keep_identity(identity(self.resident, objective))
        prepare(self.resident, self.memory, objective, given, n_trials, on_progress)
        self.space = self.memory.space(self.resident.model)
        self.memory.keep("n_trials", min(self.n_trials, self.space.size))
        if not isinstance(sampler, BaseSampler):
            sampler = sampler_named(sampler, self.memory, self.space)
        self.study.sampler = sampler
        self._evaluation = evaluation(self.resident, self.space, objective, self.memory)

    @property
    def sensitivity(self) -> Sensitivity | None:
        """Drift of single changes; None without inputs."""
        text = self.memory.read("sensitivity")
        return None if text is None else Sensitivity.from_json(text)

    def ask(self) -> Trial:
        """Return the next trial, its parameters suggested.

        Raises:
            SearchError: all trials are taken.

        """
        trials = self.study.get_trials(deepcopy=False)
        if sum(trial.state != TrialState.WAITING for trial in trials) >= self.n_trials:
            raise SearchError(f"all {self.n_trials} trials were asked for; give a larger n_trials")
        return self.study.ask(dict(self.space.distributions))

    def plan(self, trial: Trial | FrozenTrial) -> Plan:
        """Return a trial's plan."""
        return self.space.plan(trial.params)

    def tell(self, trial: Trial, values: float | Sequence[float]) -> None:
        """Record a trial's numbers; costs that are objectives are added.

        Raises:
            SearchError: they are not finite, or not one for each direction.

        """
        self.study.tell(trial, self._evaluation.with_costs(trial, values))

    def optimize(self, *, on_progress: OnProgress | None = None) -> None:
        """Run trials until there are ``n_trials``; other workers' count.

        Raises:
            SearchError: the objective fails again and again.

        """
        if self._objective is None:
            raise SearchError("this search has no objective to run; ask and tell by hand, or give one")
        work(self.study, self._evaluation, self.memory.read("n_trials"), on_progress=on_progress)
        names = set(self.space.distributions)
        if self.n_trials > self.space.size and any(set(t.params) - names for t in self.study.get_trials()):
            # The objective suggests more than the plan: another run of one is no repetition.
            self.memory.keep("n_trials", self.n_trials)
            work(self.study, self._evaluation, self.n_trials, on_progress=on_progress)

    def resume(self, number: int) -> Trial:
        """Return a running trial by its number, its parameters suggested unless they were before.

        Raises:
            SearchError: there is no such trial.

        """
        found = [one for one in self.study.get_trials(deepcopy=False) if one.number == number]
        if not found:
            raise SearchError(f"the study has no trial {number}; ask for one")
        trial = Trial(self.study, found[0]._trial_id)
        for name, distribution in self.space.distributions.items():
            trial.suggest_categorical(name, distribution.choices)
        return trial

    def evaluate(self, trial: Trial) -> tuple[float, ...]:
        """Convert, run the objective on a trial's plan and return its numbers with costs; it is not told.

        Raises:
            optuna.TrialPruned: a known cost is above what a constraint allows.
            SearchError: the objective returned something else than finite numbers.

        """
        return self._evaluation.trial(self.study, trial)

    def unconfirmed(self, *, confirm: int = 5, top: int = 3) -> list[tuple[Candidate, int]]:
        """Return which plans are still to be run again before ``result``, each with its seed.

        Raises:
            SearchError: no trial meets the constraints.

        """
        kept = self.memory.read("confirmation") or {}
        given = candidates(self.study, self.space, top if confirm else 1, self.memory.prior())
        pairs = [(candidate, seed) for seed in self._seeds(confirm) for candidate in given]
        return [pair for pair in pairs if _key(*pair) not in kept] if confirm else []

    def confirm(self, candidate: Candidate, seed: int) -> float:
        """Run a plan again under a seed, on data that no trial saw if the objective has some; keep the score.

        Raises:
            SearchError: it fails.

        """
        kept: dict[str, float] = self.memory.read("confirmation") or {}
        key = _key(candidate, seed)
        if key not in kept:
            kept[key] = self._again(candidate, seed)[0]
            self.memory.keep("confirmation", kept)
        return kept[key]

    def result(
        self, *, confirm: int = 5, top: int = 3, on_progress: OnProgress | None = None
    ) -> SearchResult:
        """Confirm the best plans and return the one to use, trained.

        Raises:
            SearchError: no trial meets the constraints, or there is nothing to run.

        """
        check_whole("confirm", confirm, 0)
        check_whole("top", top, 1)
        if self._objective is None:
            raise SearchError("this search has no objective to confirm by; see study.best_trials instead")
        memory, seeds = self.memory, self._seeds(confirm)
        given = candidates(self.study, self.space, top if confirm else 1, memory.prior())
        stage = Stage("confirming", confirm * len(given), on_progress)

        def score(candidate: Candidate, seed: int) -> float:
            found = self.confirm(candidate, seed)
            stage.advance(f"trial {candidate.number}, seed {seed}: {found:.4g}")
            return found

        maximize = memory.settings().directions[0] == "maximize"
        if confirm:
            samples = self._objective.confirmed_on() if isinstance(self._objective, Task) else None
            chosen, rows = decide(given, score, seeds, maximize=maximize, samples=samples)
        else:
            sign = 1.0 if maximize else -1.0
            chosen, rows = max(range(len(given)), key=lambda i: (sign * given[i].value, -i)), []
        best = given[chosen]
        _, model = self._again(best, seeds[0], keep=True)
        assert model is not None
        return SearchResult(
            best=self.space.plan(best.params),
            model=model,
            study=self.study,
            space=self.space,
            confirmation=tuple(rows),
            chosen=chosen,
            candidates=tuple(given),
            same_split=getattr(self._objective, "confirm", None) is None,
            costs=memory.costs(),
            sensitivity=self.sensitivity,
            prior=memory.prior(),
        )

    def _seeds(self, confirm: int) -> list[int]:
        """Return fresh seeds, one at least."""
        return [self.memory.settings().seed + 1 + number for number in range(max(confirm, 1))]

    def _again(
        self, candidate: Candidate, seed: int, *, keep: bool = False
    ) -> tuple[float, nn.Module | None]:
        """Run a plan under another seed; what fails there is named."""
        objective: Any = self._objective
        run: Objective = getattr(objective, "confirm", None) or objective
        try:
            return self._evaluation.again(run, candidate.params, candidate.number, seed, keep=keep)
        except SearchError:
            raise
        except Exception as error:
            raise SearchError(
                f"the plan of trial {candidate.number} failed when it was run again with seed {seed} "
                f"({type(error).__name__}: {error}); mend the objective and go on with the same call: what "
                "is done is kept where the study has a name or a storage"
            ) from error


def _key(candidate: Candidate, seed: int) -> str:
    return f"{candidate.number}/{seed}"
