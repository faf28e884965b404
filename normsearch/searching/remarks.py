"""Remarks: what the reader of a search's report should know before believing it."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence

from normsearch.methods import parse_method
from normsearch.methods.group import Group
from normsearch.reporting import sections
from normsearch.searching.concluding import failures, skipped
from normsearch.searching.findings import Findings, state
from normsearch.searching.leases import ERROR
from normsearch.searching.results import SINGLE_SEED
from normsearch.searching.space import SearchSpace
from normsearch.searching.stepwise import spared


def notes(found: Findings, given: Sequence[str]) -> sections.Notes | None:
    """Return what a reader should know, and what was refused."""
    texts = [*_warnings(found), *given]
    notes = [sections.Note(text=text) for text in texts]
    if found.best is not None:
        notes += [sections.Note(text=t, about=r.site.path) for r in found.best_plan.rows for t in r.notes]
    refusals = tuple(dict.fromkeys(found.space.refusals))
    return sections.Notes(notes=tuple(notes), refusals=refusals) if notes or refusals else None


def _warnings(found: Findings) -> list[str]:
    states = Counter(map(state, found.counted))
    said = []
    if not found.confirmed:
        said.append("Nothing is confirmed yet: scores are single runs on the data of the search.")
    else:
        seeds = max(len(row.scores) for row in found.confirmed.values())
        if found.same_split:
            said.append(
                "The plans were confirmed on the data that they were chosen by, under fresh seeds alone: "
                "their scores there flatter them. A Task, or an objective with a confirm method, keeps "
                "data for it."
            )
        if seeds > 1 and all(len(set(row.scores)) == 1 for row in found.confirmed.values()):
            said.append(
                "Every seed gave the same scores: either nothing that the objective does depends on the "
                "seed, or the score cannot tell (it is saturated, for example); the errors say nothing of "
                "the noise."
            )
        if seeds == 1:
            ruled_out = any(row.gain is not None for row in found.confirmed.values())
            what = SINGLE_SEED if ruled_out else "it says nothing of the noise"
            said.append(f"The confirmation has a single seed: {what}.")
    said += [
        f"The plan of trial {number} failed when it was run again with seed {failure.seed} and was left out: "
        f"{failure.reason}."
        for number, failure in failures(found.memory).items()
    ]
    said += [
        f"Every plan failed when it was run again with seed {one.seed}, so that another seed was taken: "
        f"{one.reason}."
        for one in skipped(found.memory)
    ]
    if what := spared(found.memory, found.space):
        said.append(f"{what[0].upper()}{what[1:]}.")
    if alike := _of_one_group(found.space):
        said.append(
            f"At {len(alike)} of {len(found.space.allowed)} sites group has a single group, which is what "
            "layer does: plans that differ in nothing else are one network, tried twice."
        )
    if found.further:
        told = ", ".join(f"{name}={value!r}" for name, value in found.further.items())
        said.append(f"The objective suggested more than the plan; its trial had {told}.")
    if found.scored == 1 and states["complete"] + states["infeasible"] > 1:
        said.append("All trials scored the same: the score tells no method from another.")
    finished = sum(states[s] for s in ("complete", "infeasible", "pruned", "failed"))
    if finished < found.wanted:
        said.append(f"The search is not finished: {finished} of {found.wanted} trials are done.")
    reasons = Counter(trial.user_attrs.get(ERROR, "") for trial in found.counted if state(trial) == "failed")
    said += [
        f"{count} {'trial' if count == 1 else 'trials'} failed{f': {reason}' if reason else ''}."
        for reason, count in reasons.most_common(5)
    ]
    if states["pruned"]:
        said.append(f"{states['pruned']} plans were not trained: their known cost is above what is allowed.")
    if states["infeasible"]:
        said.append(f"{states['infeasible']} trained plans break a constraint and were not considered.")
    if len(found.goals) > 1:
        others = " and ".join(goal.name for goal in found.goals[1:])
        said.append(
            f"The plan is the best by {found.goals[0].name}; the Pareto front has those that trade it "
            f"for {others}."
        )
    return said


def _of_one_group(space: SearchSpace) -> list[str]:
    """Return the sites where ``group`` and ``layer`` are both tried and the same."""
    group = parse_method("group")
    return [
        site.path
        for site in space.sites
        if {"group", "layer"} <= set(space.allowed.get(site.path, ()))
        and group.resolve(site) == Group(groups=1)
    ]
