"""The search as a whole: found plans, interruption, objectives, constraints, what is refused."""

from __future__ import annotations

import gc
import itertools
import multiprocessing
import threading
import time
from pathlib import Path
from typing import Any

import numpy as np
import optuna
import pytest
import torch
from optuna.trial import TrialState
from searched import INPUTS, OPTIONS, SITES, Planted, assert_same, network, pairs, snapshot, task
from torch import nn
from torch.nn import functional as F

import normsearch
from normsearch.errors import ModelError, SearchError
from normsearch.searching import (
    BatchIndependent,
    LeaseTerms,
    MaxDrop,
    MaxLatency,
    MaxMemory,
    Search,
    join,
    open_storage,
    workers,
)
from normsearch.searching.findings import Findings


def trials(study: optuna.Study) -> list[tuple[Any, ...]]:
    return [(t.number, t.params, t.values, t.state) for t in study.trials]


def test_search_finds_a_planted_plan_and_never_changes_the_model() -> None:
    model = network()
    before = snapshot(model)
    result = normsearch.search(model, Planted(), **OPTIONS)
    assert_same(before, snapshot(model))
    assert [type(result.model.get_submodule(p)).__name__ for p in SITES] == list(Planted.best.values())
    assert result.confirmation[0].uniform is not None
    assert result.confirmation[result.chosen].scores == (1.0, 1.0)
    assert result.same_split
    origins = [t.user_attrs.get("origin") for t in result.study.trials]
    assert origins[:3] == ["uniform"] * 3
    assert trials(result.study) == trials(normsearch.search(model, Planted(), **OPTIONS).study)


def test_an_interrupted_search_goes_on_as_if_it_had_not_been(tmp_path: Path) -> None:
    whole = normsearch.search(network(), Planted(), **OPTIONS)
    objective = Planted()
    objective.stop_at = 12
    kept = {"storage": tmp_path / "study.journal", "name": "s"}
    with pytest.raises(KeyboardInterrupt):
        normsearch.search(network(), objective, **OPTIONS, **kept)
    resumed = normsearch.search(network(), objective, **OPTIONS, **kept)
    assert trials(resumed.study) == trials(whole.study)
    calls = objective.calls
    again = normsearch.search(network(), objective, **OPTIONS, **kept)
    # All that is run again is the training of the plan that is returned.
    assert objective.calls == calls + 1
    assert again.best == resumed.best
    with pytest.raises(SearchError, match="seed=0, now it is 1"):
        normsearch.search(network(), objective, **OPTIONS, **kept, seed=1)


def test_a_task_tries_no_more_plans_than_there_are() -> None:
    result = normsearch.search(network(), task(), methods=["batch", "group"], sites=["a.1", "b.1"], confirm=1)
    assert len(result.study.trials) == len({tuple(t.params.values()) for t in result.study.trials}) == 4


@pytest.mark.parametrize("sampler", ["norm", "tpe", "nsga2", "random", optuna.samplers.RandomSampler(seed=1)])
def test_every_sampler_runs(sampler: Any) -> None:
    result = normsearch.search(network(), Planted(), **OPTIONS | {"n_trials": 8, "sampler": sampler})
    assert len(result.study.trials) == 8


def test_costs_are_objectives_and_ceilings() -> None:
    result = normsearch.search(
        network(), Planted(), **OPTIONS, costs=["memory"], constraints=[MaxLatency(1e9)], inputs=[INPUTS]
    )
    assert result.costs is not None
    assert len(result.study.directions) == 2
    for trial in result.study.trials:
        assert trial.values[1] == result.costs.of(result.space.plan(trial.params), "memory")


def test_no_plan_over_a_known_ceiling_is_proposed_or_tried() -> None:
    result = normsearch.search(
        network(), Planted(), **OPTIONS, constraints=[MaxMemory(1.0)], inputs=[INPUTS], veto=None
    )
    assert result.costs is not None
    table, limit, choices = result.costs, result.costs.base("memory"), result.space.distributions
    every = itertools.product(*(distribution.choices for distribution in choices.values()))
    plans = {p: result.space.plan(dict(zip(choices, p, strict=True))) for p in every}
    under = {p for p, plan in plans.items() if table.of(plan, "memory") <= limit}
    assert 0 < len(under) < len(plans)
    # What is over comes when nothing else is left, and is not trained.
    tried = [(tuple(t.params[name] for name in choices), t.state) for t in result.study.trials]
    assert {plan for plan, _ in tried[: len(under)]} == under
    assert {plan for plan, state in tried if state == TrialState.COMPLETE} == under


def test_constraints_on_the_score_and_on_the_batch() -> None:
    result = normsearch.search(
        network(), Planted(), **OPTIONS, constraints=[MaxDrop(0.0), BatchIndependent()], inputs=[INPUTS]
    )
    # The original scores ¼; no plan below it may be chosen, and none has BatchNorm.
    assert all("batch" not in t.params.values() for t in result.study.trials)
    bad = [t for t in result.study.trials if t.values[0] < 0.25]
    assert bad
    assert all(t.constraints["MaxDrop"] > 0 for t in bad)
    assert result.confirmation[result.chosen].mean == 0.75


def test_ask_and_tell() -> None:
    run = Search(network(), None, methods=["batch", "group"], n_trials=5)
    for _ in range(5):
        trial = run.ask()
        run.tell(trial, sum(method.name == "group" for method in run.plan(trial).values()))
    assert run.study.best_value == 4
    with pytest.raises(SearchError, match="all 5 trials"):
        run.ask()
    with pytest.raises(SearchError, match="no objective"):
        run.optimize()


def asking(tmp_path: Path, **changes: Any) -> Search:
    kept = {"storage": tmp_path / "study.journal", "name": "s"}
    return Search(network(), Planted(), methods=["batch", "group"], n_trials=5, **kept, **changes)


def test_a_trial_that_was_asked_for_is_left_alone_until_it_is_told(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    terms = LeaseTerms(beat=0.05, patience=0.5)
    monkeypatch.setattr("normsearch.searching.asking._TERMS", terms)
    run = asking(tmp_path)
    trial = run.ask()
    worker = threading.Thread(
        target=join,
        args=(network(), Planted()),
        kwargs={"storage": tmp_path / "study.journal", "name": "s", "terms": terms},
        daemon=True,
    )
    worker.start()
    end = time.monotonic() + 30
    while sum(t.state.is_finished() for t in run.study.get_trials(deepcopy=False)) < 4:
        assert time.monotonic() < end
        time.sleep(0.05)
    # The worker waits for the last one, far longer than a process is given up after.
    time.sleep(1.5)
    assert run.study.trials[trial.number].state == TrialState.RUNNING
    assert worker.is_alive()
    run.tell(trial, 0.5)
    worker.join(30)
    assert not worker.is_alive()
    assert [t.state for t in run.study.trials] == [TrialState.COMPLETE] * 5
    assert run.study.trials[trial.number].value == 0.5


def test_what_cannot_be_told_is_said(tmp_path: Path) -> None:
    run = asking(tmp_path)
    for nothing in (None, 0):
        with pytest.raises(SearchError, match=f"trial={nothing!r}: give a trial that ask returned"):
            run.tell(nothing, 0.5)  # type: ignore[arg-type]
        with pytest.raises(SearchError, match="give a trial that ask returned"):
            run.plan(nothing)  # type: ignore[arg-type]
    trial = run.ask()
    for values, said in (
        (float("nan"), "nan; give finite numbers, or None for a trial that failed"),
        ("good", "'good'; give a number"),
        ([0.1, 0.2], "2 numbers; give one"),
    ):
        with pytest.raises(SearchError, match=f"trial 0 was told {said}"):
            run.tell(trial, values)  # type: ignore[arg-type]
    # It can still be told.
    run.tell(trial, 0.5)
    with pytest.raises(SearchError, match=r"trial 0 is finished already \(complete\); ask for another one"):
        run.tell(trial, 0.5)
    with pytest.raises(SearchError, match=r"trial 0 is finished already"):
        run.resume(0)
    failed = run.ask()
    failed.set_user_attr("error", "out of patience")
    run.tell(failed, None)
    assert run.study.trials[1].state == TrialState.FAIL
    other = Search(network(), None, methods=["batch", "group"], n_trials=5)
    other.ask(), other.ask(), run.ask()
    with pytest.raises(SearchError, match="trial 2 of 'normsearch' is not of this search"):
        run.tell(other.ask(), 0.5)
    twin = Search(network(), None, methods=["batch", "group"], n_trials=5)
    with pytest.raises(SearchError, match="trial 0 is another's by now"):
        other.tell(twin.ask(), 0.5)


def test_a_trial_belongs_to_who_resumed_it_last(tmp_path: Path) -> None:
    first, second = asking(tmp_path), asking(tmp_path)
    trial = first.ask()
    again = second.resume(trial.number)
    assert again.params == trial.params
    with pytest.raises(SearchError, match="trial 0 is another's by now"):
        first.tell(trial, 0.5)
    second.tell(again, 0.75)
    with pytest.raises(SearchError, match="trial 0 is finished already"):
        first.tell(trial, 0.5)


def test_trials_that_were_asked_for_and_not_told_are_run(tmp_path: Path) -> None:
    run = asking(tmp_path)
    trial = run.ask()
    run.optimize()
    assert run.study.trials[trial.number].params == trial.params
    assert [t.state for t in run.study.trials] == [TrialState.COMPLETE] * 5


def test_a_trial_of_a_process_that_ended_is_asked_for_again(tmp_path: Path) -> None:
    process = multiprocessing.get_context("forkserver").Process(target=ask_and_end, args=(tmp_path,))
    process.start()
    process.join(60)
    assert process.exitcode == 0
    run = asking(tmp_path)
    assert run.study.trials[0].state == TrialState.RUNNING
    assert run.ask().number == 0


def ask_and_end(folder: Path) -> None:
    asking(folder).ask()


def test_leases_end_with_their_search() -> None:
    def renewing() -> set[threading.Thread]:
        return {thread for thread in threading.enumerate() if thread.name.startswith("lease")}

    # Those of earlier tests end when they are collected.
    before = renewing()
    run = Search(network(), None, methods=["batch", "group"], n_trials=5)
    run.ask(), run.ask()
    own = renewing() - before
    assert len(own) == 2
    del run
    gc.collect()
    end = time.monotonic() + 10
    while own & renewing():
        assert time.monotonic() < end
        time.sleep(0.01)


@pytest.mark.parametrize(
    ("returned", "said"),
    [
        ("3", "'3'; give a number"),
        ((1.0, 2.0), "2 numbers; give one"),
        (float("nan"), "nan; give finite numbers, or raise optuna.TrialPruned"),
        (1e160, "1e\\+160; give finite numbers"),
        (10**400, "something of type int; give a number"),
        (None, "None; give a number"),
        (torch.zeros(2, 2), "something of type Tensor; give a number"),
        (network(), "something of type Net; give a number"),
    ],
)
def test_an_objective_that_returns_something_else(returned: Any, said: str) -> None:
    with pytest.raises(SearchError, match=f"the objective returned {said}"):
        normsearch.search(network(), lambda model, trial: returned, **OPTIONS)


@pytest.mark.parametrize("constraint", [MaxDrop(0.0), MaxMemory(0.0)])
def test_constraints_bind_a_search_by_hand_as_well(constraint: Any) -> None:
    x = torch.randn(4, 1, 8, 8)

    def score(model: nn.Module, trial: Any) -> float:
        with torch.no_grad():
            return -float(model(x).square().mean()) if trial is None or trial.params else 1e6

    options = {"methods": ["group", "layer"], "n_trials": 3, "constraints": constraint, "inputs": [INPUTS]}
    with pytest.raises(SearchError) as whole:
        normsearch.search(network(), score, **options, veto=None)
    by_hand = Search(network(), score, **options, veto=None)
    for _ in range(3):
        trial = by_hand.ask()
        by_hand.tell(trial, score(normsearch.convert(network(), by_hand.plan(trial)), None))
    with pytest.raises(SearchError, match=r"meets the constraints|is above MaxMemory") as stepwise:
        by_hand.result(confirm=2)
    assert type(constraint).__name__ in str(whole.value)
    assert type(constraint).__name__ in str(stepwise.value)


def test_what_evaluate_returns_can_be_told() -> None:
    options = {"methods": ["batch", "group"], "n_trials": 4, "inputs": [INPUTS], "veto": None}
    run = Search(network(), Planted(), costs=["latency"], **options)
    trial = run.ask()
    values = run.evaluate(trial)
    run.tell(trial, values)
    assert len(values) == 2
    assert run.study.trials[trial.number].values == list(values)
    run = Search(network(), Planted(), constraints=[MaxLatency(0.0)], **options)
    trial = run.ask()
    with pytest.raises(optuna.TrialPruned):
        run.evaluate(trial)
    run.tell(trial, None)
    assert run.study.trials[trial.number].state == TrialState.PRUNED


def test_max_drop_says_what_an_objective_with_parameters_must_bear() -> None:
    def objective(model: nn.Module, trial: Any) -> float:
        return float(trial.suggest_float("lr", 0.0, 1.0))

    said = "gets a trial without parameters there: suggest further ones only where trial.params is not empty"
    with pytest.raises(SearchError, match=said):
        normsearch.search(network(), objective, **OPTIONS, constraints=[MaxDrop(0.1)])

    def bearing(model: nn.Module, trial: Any) -> float:
        return float(trial.suggest_float("lr", 0.0, 1.0)) if trial.params else 0.0

    Search(network(), bearing, methods=["batch", "group"], n_trials=2, constraints=[MaxDrop(0.1)]).optimize()


class _Objective:
    """An objective whose ``confirm`` is what it is given."""

    def __init__(self, confirm: Any) -> None:
        self.confirm = confirm

    def __call__(self, model: nn.Module, trial: Any) -> float:
        return 0.5


@pytest.mark.parametrize(
    ("objective", "said"),
    [
        (lambda model: 0.5, r"objective is called with \(model, trial\), which it does not take"),
        (_Objective(5), r"objective.confirm=5: give a function of \(model, trial\)"),
        (_Objective(lambda model: 0.5), r"objective.confirm is called with \(model, trial\)"),
    ],
)
def test_functions_that_do_not_take_a_trial_are_refused_at_once(objective: Any, said: str) -> None:
    with pytest.raises(SearchError, match=said):
        normsearch.search(network(), objective, **OPTIONS)


def test_costs_without_inputs_leave_no_study_behind(tmp_path: Path) -> None:
    options = OPTIONS | {"name": "s", "storage": tmp_path / "s.journal", "inputs": None}
    with pytest.raises(SearchError, match="give inputs="):
        normsearch.search(network(), Planted(), **options, costs=["latency"])
    assert not (tmp_path / "s.journal").exists()
    normsearch.search(network(), Planted(), **options)
    with pytest.raises(SearchError, match=r"constraints=\(\), now it is MaxDrop\(drop=0.1\); resume"):
        normsearch.search(network(), Planted(), **options, constraints=[MaxDrop(0.1)])


def test_a_search_that_is_pruned_throughout_says_by_what() -> None:
    def objective(model: nn.Module, trial: Any) -> float:
        if trial.number == 0:
            raise KeyError("label")
        raise optuna.TrialPruned("hopeless")

    said = (
        r"no trial of '.*' has a score: 1 failed \(trial 0: KeyError: 'label'\), 5 pruned by the objective "
        r"\(trial 1: hopeless\); mend the objective or let it return a number for some plans"
    )
    with pytest.raises(SearchError, match=said):
        normsearch.search(network(), objective, **{**OPTIONS, "n_trials": 6})


def test_a_model_that_cannot_be_copied() -> None:
    model = network()
    model.lock = threading.Lock()
    said = (
        r"Net cannot be copied \(TypeError: .*\); plans are tried on a copy: give a model that copy.deepcopy"
    )
    with pytest.raises(ModelError, match=said):
        normsearch.search(model, Planted(), **OPTIONS)


@pytest.mark.parametrize("kind", [tuple, list, np.array, torch.tensor])
@pytest.mark.parametrize("count", [1, 2])
def test_objectives_return_numbers_in_any_container(kind: Any, count: int) -> None:
    def objective(model: nn.Module, trial: Any) -> Any:
        return kind([0.5, 2.0][:count])

    search = Search(
        network(), objective, methods=["batch", "group"], n_trials=2, directions=["maximize"] * count
    )
    search.optimize()
    assert [trial.values for trial in search.study.trials] == [[0.5, 2.0][:count]] * 2


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        ({"n_trials": 0}, "n_trials=0"),
        ({"directions": ["up"]}, "maximize"),
        ({"costs": ["energy"]}, "is no cost"),
        ({"costs": ["latency"]}, "give inputs="),
        ({"constraints": ["latency"]}, "no constraint"),
        ({"constraints": [MaxDrop(0.1), MaxDrop(0.2)]}, "give each once"),
        ({"sampler": "best"}, "none of auto"),
    ],
)
def test_arguments_that_make_no_sense(arguments: dict[str, Any], said: str) -> None:
    with pytest.raises(SearchError, match=said):
        normsearch.search(network(), Planted(), **arguments)


def test_objectives_may_suggest_more() -> None:
    def objective(model: nn.Module, trial: Any) -> float:
        return -abs(trial.suggest_float("lr", 0.0, 1.0) - 0.5)

    result = normsearch.search(network(), objective, **OPTIONS | {"n_trials": 6})
    assert "lr" in result.params


def test_a_worker_waits_until_trials_begin_and_then_joins(tmp_path: Path) -> None:
    kept = {"storage": tmp_path / "study.journal", "name": "s"}
    run = Search(network(), Planted(), methods=["batch", "group", "instance"], n_trials=6, **kept)
    # As if the search were still at it.
    run.study.set_user_attr("normsearch:ready", None)
    told: list[str] = []

    def follow(progress: normsearch.Progress) -> None:
        told.append(progress.stage)
        if progress.stage.startswith("waiting"):
            run.memory.keep("ready", True)

    join(network(), Planted(), **kept, on_progress=follow)
    assert told[0].startswith("waiting")
    assert len(run.study.trials) == 6
    with pytest.raises(SearchError, match="no study 't'; it has s"):
        join(network(), Planted(), storage=kept["storage"], name="t")
    other = nn.Sequential(nn.Conv2d(1, 4, 3), nn.BatchNorm2d(4))
    with pytest.raises(SearchError, match=r"4 channels at 'a.1'; this one has nothing there"):
        join(other, Planted(), **kept)
    with pytest.raises(SearchError, match="memory"):
        join(network(), Planted(), storage=optuna.storages.InMemoryStorage(), name="s")


@pytest.mark.parametrize("holds", ["trials", "attributes"])
def test_a_study_of_others_is_left_alone(tmp_path: Path, holds: str) -> None:
    path = tmp_path / "study.journal"
    study = optuna.create_study(study_name="s", storage=open_storage(path), direction="maximize")
    if holds == "trials":
        study.optimize(lambda trial: trial.suggest_float("x", 0, 1), n_trials=3)
    else:
        study.set_user_attr("owner", "somebody")
    before = path.read_bytes()
    said = r"'s' is no search of normsearch: it has \d trials and no settings.*; give the search another name"
    with pytest.raises(SearchError, match=said):
        normsearch.search(network(), Planted(), **OPTIONS, storage=path, name="s")
    with pytest.raises(SearchError, match=said):
        join(network(), Planted(), storage=path, name="s")
    with pytest.raises(SearchError, match=said):
        Findings.of_study(network(), storage=path, name="s")
    assert path.read_bytes() == before


def test_a_worker_does_not_wait_for_a_study_that_no_search_begins(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "study.journal"
    optuna.create_study(study_name="s", storage=open_storage(path))
    monkeypatch.setattr(workers, "_GRACE", 0.1)
    with pytest.raises(SearchError, match="'s' is empty: no search has begun there; start it first"):
        join(network(), Planted(), storage=path, name="s")
    # Empty, it may become one, of its own direction.
    with pytest.raises(SearchError, match="'s' was made to minimize, now it is to maximize"):
        normsearch.search(network(), Planted(), **OPTIONS, storage=path, name="s")
    optuna.create_study(study_name="t", storage=open_storage(path), direction="maximize")
    normsearch.search(network(), Planted(), **OPTIONS | {"n_trials": 4}, storage=path, name="t")


def test_a_study_is_not_gone_on_with_for_another_network_or_task(tmp_path: Path) -> None:
    kept = {"storage": tmp_path / "study.journal", "name": "s", "n_trials": 3, "confirm": 1}
    few = {"methods": ["batch", "group"], **kept}
    normsearch.search(network(), task(), **few)
    other = network()
    with torch.no_grad():
        other.head.bias.add_(1)
    with pytest.raises(SearchError, match="other weights"):
        normsearch.search(other, task(), **few)
    with pytest.raises(SearchError, match="other recipe"):
        normsearch.search(network(), task(steps=5), **few)
    with pytest.raises(SearchError, match="other loss"):
        normsearch.search(network(), task(loss=F.nll_loss), **few)
    with pytest.raises(SearchError, match="other the original's score"):
        normsearch.search(network(), task(validation=pairs(4, 7)), **few)
    with pytest.raises(
        SearchError, match=r"other training data \(4 batches, first \w+, now 3 batches, first"
    ):
        normsearch.search(network(), task(train=pairs(4)[:3]), **few)
    with pytest.raises(SearchError, match="other training data"):
        normsearch.search(network(), task(train=pairs(4, 8)), **few)
    with pytest.raises(SearchError, match="other training data"):
        join(network(), task(train=pairs(4, 8)), storage=kept["storage"], name="s")
    # Those of earlier versions know nothing of it.
    run = Search(network(), task(), methods=["batch", "group"], n_trials=3, storage=kept["storage"], name="s")
    run.memory.keep(
        "identity", {k: v for k, v in run.memory.read("identity").items() if k != "training data"}
    )
    normsearch.search(network(), task(train=pairs(4, 8)), **few)
    normsearch.search(network(), Planted(), **few | {"name": "t"})
    with pytest.raises(SearchError, match="other objective"):
        normsearch.search(network(), lambda model, trial: 0.0, **few | {"name": "t"})


def test_a_loader_is_known_by_its_size(tmp_path: Path) -> None:
    def loader(count: int) -> Any:
        return torch.utils.data.DataLoader(
            [pair for b in pairs(count) for pair in zip(*b, strict=True)], 8, shuffle=True
        )

    kept = {"storage": tmp_path / "study.journal", "name": "s", "n_trials": 3, "confirm": 1}
    few = {"methods": ["batch", "group"], **kept}
    normsearch.search(network(), task(train=loader(4)), **few)
    normsearch.search(network(), task(train=loader(4)), **few)
    said = r"other training data \(4 batches, 32 samples, now 3 batches, 24 samples\)"
    with pytest.raises(SearchError, match=said):
        normsearch.search(network(), task(train=loader(3)), **few)


def test_a_search_that_failed_goes_on_when_the_objective_is_mended(tmp_path: Path) -> None:
    broken = True

    def objective(model: nn.Module, trial: Any) -> float:
        if broken:
            raise RuntimeError("not yet")
        return Planted()(model, trial)

    kept = {"storage": tmp_path / "study.journal", "name": "s"}
    with pytest.raises(SearchError, match="not yet"):
        normsearch.search(network(), objective, **OPTIONS, **kept)
    broken = False
    result = normsearch.search(network(), objective, **OPTIONS, **kept)
    done = [t.params for t in result.study.trials if t.state == optuna.trial.TrialState.COMPLETE]
    assert all(result.space.uniform(m) in done for m in result.space.methods)


def test_a_sampler_that_cannot_propose_is_named() -> None:
    sampler = optuna.samplers.GridSampler({"a": [1, 2]})
    said = (
        r"the sampler GridSampler cannot propose a plan \(ValueError: .*\); give one that takes categoricals"
    )
    with pytest.raises(SearchError, match=said):
        normsearch.search(network(), Planted(), **OPTIONS, sampler=sampler)
    run = Search(network(), Planted(), methods=["batch", "group"], n_trials=4, sampler=sampler)
    uniform = [run.ask(), run.ask()]
    assert [set(trial.params.values()) for trial in uniform] == [{"batch"}, {"group"}]
    with pytest.raises(SearchError, match=said):
        run.ask()


def test_a_plan_over_several_ceilings_names_each() -> None:
    over = [MaxLatency(0), MaxMemory(0)]
    run = Search(
        network(), Planted(), methods=["batch", "group"], n_trials=4, constraints=over, inputs=[INPUTS]
    )
    with pytest.raises(
        optuna.TrialPruned, match=r"MaxLatency: .* allowed; MaxMemory: .* above what is allowed"
    ):
        run.evaluate(run.ask())


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        ({"confirm": -1}, "confirm=-1"),
        ({"confirm": 2.0}, "confirm=2.0"),
        ({"top": 0}, "top=0"),
        ({"seed": "a"}, "seed='a'"),
        ({"seed": 2**63}, r"seed=9223372036854775808: give at most 4611686018427387904"),
        ({"inputs": INPUTS}, r"inputs= is a Tensor: give a list of batches, \[inputs\] for one"),
        ({"inputs": 5}, "inputs= is a int: give a list of batches"),
        ({"storage": 5}, "storage=5: give a path"),
        ({"on_progress": 5}, "on_progress=5: give a function"),
        ({"directions": None}, "directions=None: give 'maximize'"),
        ({"costs": None}, "costs=None: give a list"),
        ({"constraints": 5}, "constraints=5: give a list"),
        ({"sampler": 5}, "sampler=5: give a name"),
        ({"sites": 5}, "sites=5: give glob patterns"),
        ({"veto": float("nan")}, "veto=nan"),
        ({"methods": None}, "methods=None"),
        ({"sites": [1]}, r"sites=\[1\]"),
        ({"name": ""}, "name=''"),
        ({"name": "../evil"}, "names the journal too"),
        ({"name": "a\0b"}, "printable"),
    ],
)
def test_arguments_of_other_kinds(arguments: dict[str, Any], said: str) -> None:
    objective = Planted()
    with pytest.raises(SearchError, match=said):
        normsearch.search(network(), objective, **OPTIONS | arguments)
    # Before anything is run.
    assert not objective.calls


def test_numpys_whole_numbers_are_whole_numbers(tmp_path: Path) -> None:
    kept = {"storage": tmp_path / "study.journal", "name": "s"}
    one, four = np.int64(1), np.int64(4)
    given: Any = {"n_trials": four, "seed": one, "confirm": one, "top": one}
    result = normsearch.search(network(), Planted(), methods=["batch", "group"], **given, **kept)
    assert len(result.study.trials) == 4
    normsearch.search(
        network(), Planted(), methods=["batch", "group"], n_trials=4, seed=1, confirm=1, top=1, **kept
    )


def test_patterns_may_come_from_a_generator() -> None:
    run = Search(network(), None, methods=["batch", "group"], sites=(f"{name}.1" for name in "ab"))
    assert list(run.space.allowed) == ["a.1", "b.1"]


@pytest.mark.filterwarnings("ignore:`torch.jit.script` is deprecated")
def test_models_that_cannot_be_searched_are_named() -> None:
    lazy = nn.Sequential(nn.LazyConv2d(4, 3), nn.LazyBatchNorm2d())
    part = nn.Sequential(nn.Conv2d(1, 4, 3), nn.BatchNorm2d(4), torch.jit.script(nn.ReLU()))
    for model, said in (
        (lazy, "run one forward pass first"),
        (part, "2 is compiled TorchScript.*; give the nn.Module that it was made from"),
        (torch.jit.script(part), "the model is compiled TorchScript"),
        (5, "expected a torch.nn.Module, got int"),
    ):
        with pytest.raises(ModelError, match=said):
            Search(model, None)  # type: ignore[arg-type]


def test_what_was_refused_does_not_bind_a_name(tmp_path: Path) -> None:
    kept = {"storage": tmp_path / "study.journal", "name": "s"}
    with pytest.raises(SearchError, match="one plan only"):
        Search(network(), Planted(), methods=["batch", "group"], constraints=[BatchIndependent()], **kept)
    Search(
        network(), Planted(), methods=["batch", "group", "layer"], constraints=[BatchIndependent()], **kept
    )


def test_ceilings_that_no_plan_meets_are_named() -> None:
    with pytest.raises(SearchError, match="above MaxLatency, the cheapest, trial"):
        normsearch.search(network(), Planted(), **OPTIONS, constraints=[MaxLatency(0)], inputs=[INPUTS])


def test_fewer_plans_than_trials_are_told() -> None:
    def told(trials: int) -> list[str]:
        seen: list[str] = []
        model = nn.Sequential(nn.Conv2d(1, 4, 3), nn.BatchNorm2d(4))
        Search(
            model,
            None,
            methods=["batch", "group", "layer"],
            n_trials=trials,
            on_progress=lambda step: seen.append(step.detail),
        )
        return [detail for detail in seen if "different plans" in detail]

    assert told(3) == []
    assert told(4) == ["3 different plans are left without what is refused, vetoed or tied"]


def test_nothing_is_made_where_there_is_no_journal_to_join(tmp_path: Path) -> None:
    missing = tmp_path / "typo.journal"
    with pytest.raises(SearchError, match=r"there is no journal .*typo.journal; start the search first"):
        join(network(), Planted(), name="s", storage=missing)
    with pytest.raises(SearchError, match="there is no journal"):
        Findings.of_study(network(), name="s", storage=missing)
    assert not missing.exists()
