"""The report of a search: what it says, that it comes back from JSON, and its page in a browser."""

from __future__ import annotations

import io
import json
import re
import shutil
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import pytest
import torch
from rich.console import Console
from test_report_page import (
    ALLOWED,
    CHROMIUM,
    HOSTILE,
    Reader,
    browse,
    contrast,
    messages,
    width_of_frames,
)
from torch import nn

import normsearch
from normsearch.methods import Refusal
from normsearch.reporting import Document, search_charts, search_page, sections
from normsearch.reporting import search_sections as made
from normsearch.reports import Environment
from normsearch.searching import MaxDrop, MaxLatency, Recipe, Search, SearchResult, Task, search_report
from normsearch.text import visible

METHODS = ["batch", "group", "instance", "switchable"]
INPUTS = [torch.randn(4, 1, 8, 8, generator=torch.Generator().manual_seed(0))]


def network() -> nn.Module:
    torch.manual_seed(0)
    layers: list[nn.Module] = []
    for channels in (1, 4, 4, 4):
        layers += [nn.Conv2d(channels, 4, 3, padding=1), nn.BatchNorm2d(4), nn.ReLU()]
    return nn.Sequential(*layers).eval()


class Planted:
    """An objective that likes group first and instance last, fails once, and is noisy by the seed."""

    wanted = ("group", "batch", "batch", "instance")

    def __call__(self, model: nn.Module, trial: Any) -> float:
        if trial.number == 9:
            raise RuntimeError("out of <memory>")
        found = [trial.params.get(name) for name in ("1", "4", "7", "10")]
        score = sum(a == b for a, b in zip(found, self.wanted, strict=True)) / 4
        return score + 0.01 * float(torch.randn(())) * (1 + found.count("switchable"))

    def confirm(self, model: nn.Module, trial: Any) -> float:
        return self(model, trial) - 0.1


def searched(**changes: Any) -> SearchResult:
    options: dict[str, Any] = {"methods": METHODS, "n_trials": 24, "confirm": 3, "inputs": INPUTS, "seed": 3}
    return normsearch.search(network(), Planted(), **{**options, **changes})


def test_methods_that_are_one_network_are_named() -> None:
    for methods, said in ((["group", "layer"], True), (["group", "instance"], False)):
        notes = searched(methods=methods, n_trials=4, confirm=0).report().section(sections.Notes)
        assert notes is not None
        assert any("At 4 of 4 sites group has a single group" in one.text for one in notes.notes) == said


@pytest.fixture(scope="module")
def result() -> SearchResult:
    return searched(costs=["latency"], constraints=[MaxDrop(0.1), MaxLatency(100)], veto=None)


@pytest.fixture(scope="module")
def found(result: SearchResult) -> Document:
    return result.report(score="accuracy", title="planted")


def part(found: Document, kind: type[Any]) -> Any:
    section = found.section(kind)
    assert section is not None
    return section


# What it says.


def test_summary_says_what_was_searched(result: SearchResult, found: Document) -> None:
    summary = part(found, made.SearchPart)
    assert (summary.sites, summary.searched, summary.choices, summary.plans) == (4, 4, 4, result.space.size)
    assert (summary.trials, summary.sampler, summary.seed) == (24, "norm", 3)
    assert [(goal.name, goal.maximize) for goal in summary.goals] == [("accuracy", True), ("latency", False)]
    assert summary.constraints == (
        "at most 0.1 worse than the original",
        "at most 100 times the original's latency",
    )
    states = [trial.state.name for trial in result.study.trials]
    assert summary.states["failed"] == states.count("FAIL") == 1
    assert summary.states["complete"] + summary.states.get("infeasible", 0) == states.count("COMPLETE")
    row = result.confirmation[result.chosen]
    assert summary.outcome.score == pytest.approx(row.mean)
    assert (summary.outcome.gain, summary.outcome.error) == (row.gain, row.error)
    assert sum(summary.outcome.methods.values()) == 4


def test_scores_hold_every_uniform_plan_and_all_that_was_confirmed(
    result: SearchResult, found: Document
) -> None:
    scores = part(found, made.Scores)
    assert {row.name for row in scores.rows if row.uniform} == {f"all {method}" for method in METHODS}
    confirmed = {row.trial: row for row in scores.rows if row.scores}
    assert {row.number: row.scores for row in result.confirmation} == {
        number: row.scores for number, row in confirmed.items()
    }
    assert scores.seeds == (4, 5, 6)
    assert [row.trial for row in scores.rows if row.chosen] == [result.candidates[result.chosen].number]
    for row in scores.rows:
        values = result.study.trials[row.trial].values
        assert row.searched == (None if values is None else values[0])


def test_the_plan_is_a_difference(result: SearchResult, found: Document) -> None:
    chosen = part(found, made.Chosen)
    assert {row.site: row.after for row in chosen.rows} == {
        path: str(method) for path, method in result.best.items()
    }
    assert {row.before for row in chosen.rows} == {"batch"}
    if chosen.reference is not None:
        uniform = result.space.plan(result.candidates[0].params)
        assert [row.uniform for row in chosen.rows] == [str(uniform[row.site]) for row in chosen.rows]


def test_history_knows_origins_and_failures(result: SearchResult, found: Document) -> None:
    trials = part(found, made.Trials)
    assert [row.number for row in trials.rows] == [trial.number for trial in result.study.trials]
    assert {row.origin for row in trials.rows} >= {"uniform", "sampler"}
    assert trials.rows[9].state == "failed"
    assert trials.rows[9].reason == "RuntimeError: out of <memory>"
    best = search_charts.running_best(trials)
    assert [value for _, value in best] == sorted(value for _, value in best)


def test_front_is_what_nothing_beats(found: Document) -> None:
    front = part(found, made.Front)
    for point in front.points:
        beaten = any(
            other.values[0] >= point.values[0]
            and other.values[1] <= point.values[1]
            and other.values != point.values
            for other in front.points
        )
        assert point.best == (not beaten)
    assert any(point.name is not None for point in front.points)


def test_effects_and_importances_find_what_was_planted(found: Document) -> None:
    effects = part(found, made.Effects)
    assert effects.methods == tuple(METHODS)
    for row, wanted in zip(effects.rows, Planted.wanted, strict=True):
        means = [cell.mean if cell is not None else -9 for cell in row.cells]
        assert effects.methods[means.index(max(means))] == wanted
        assert row.cells[row.chosen].mean == pytest.approx(0, abs=1e-9)
        assert sum(cell.trials for cell in row.cells if cell) == len(part(found, made.Front).points) + part(
            found, made.SearchPart
        ).states.get("infeasible", 0)
    rows = part(found, made.Importances).rows
    assert sum(row.share for row in rows) == pytest.approx(1)
    assert [row.spread for row in rows] == sorted((row.spread for row in rows), reverse=True)


def test_costs_add_up(result: SearchResult, found: Document) -> None:
    costs = part(found, made.Costs)
    assert result.costs is not None
    assert costs.plans[0].latency == result.costs.base_latency
    plans = {plan.name: plan for plan in costs.plans}
    added = sum(row.latency[METHODS.index("group")] for row in costs.rows)
    assert plans["all group"].latency == pytest.approx(costs.plans[0].latency + added)


def test_warnings_name_what_a_reader_should_know(found: Document) -> None:
    texts = [note.text for note in part(found, sections.Notes).notes]
    assert any(text.startswith("1 trial failed: RuntimeError: out of <memory>") for text in texts)
    assert any("Pareto front" in text for text in texts)
    single = searched(n_trials=6, confirm=1, inputs=None)
    without = [note.text for note in part(search_report(single), sections.Notes).notes]
    said = "a single seed cannot tell a mix from noise, so the uniform plan is returned; confirm with 2 seeds"
    assert any(said in text for text in without)

    def same(model: nn.Module, trial: Any) -> float:
        return float(len(set(trial.params.values())))

    split = normsearch.search(network(), same, methods=METHODS, n_trials=16, confirm=2)
    told = [note.text for note in part(search_report(split), sections.Notes).notes]
    assert any("on the data that they were chosen by" in text for text in told)
    assert any("Every seed gave the same scores" in text for text in told)


def test_a_saturated_score_has_no_effects() -> None:
    pairs = [(torch.randn(4, 1, 8, 8), torch.zeros(4)) for _ in range(4)]
    task = Task(
        train=pairs,
        validation=pairs,
        loss=lambda output, target: output.square().mean(),
        metric=lambda model, given: 1.0,
        recipe=Recipe(steps=2),
    )
    result = normsearch.search(network(), task, methods=METHODS, n_trials=12, confirm=2)
    # Sensing says something of methods, and no score bears it out.
    assert result.prior
    report = result.report()
    assert {section.kind for section in report.sections}.isdisjoint({"effects", "importances"})
    told = [note.text for note in part(report, sections.Notes).notes]
    assert any("or the score cannot tell (it is saturated, for example)" in text for text in told)
    assert "All trials scored the same: the score tells no method from another." in told


@pytest.mark.parametrize("size", [1e38, 1e99, -1e99])
@pytest.mark.parametrize("at", [[3], range(100)])
def test_reports_bear_large_scores(size: float, at: Any) -> None:
    def objective(model: nn.Module, trial: Any) -> float:
        return size / (trial.number % 3 + 1) if trial.number in at else float(trial.number % 4)

    report = normsearch.search(network(), objective, methods=METHODS, n_trials=8, confirm=2).report()
    assert "NaN" not in report.to_json()
    assert Reader(report.to_html())
    assert part(report, made.SearchPart).outcome is not None


def test_a_single_seed_is_said_to_rule_every_mix_out() -> None:
    told: list[normsearch.Progress] = []
    result = searched(n_trials=12, confirm=1, inputs=None, on_progress=told.append)
    assert told[0].detail.startswith("a single seed cannot tell a mix from noise")
    page = result.report().to_html()
    assert ": a single seed cannot tell mixes from noise, so the uniform plan is returned; confirm" in page
    assert "beyond noise" not in page
    console = Console(width=150, file=io.StringIO())
    console.print(result)
    assert "confirm with 2 seeds or more" in " ".join(console.file.getvalue().split())  # type: ignore[attr-defined]


def test_vetoes_are_shown() -> None:
    result = searched(n_trials=6, confirm=1, veto=0.5)
    report = search_report(result)
    heat = part(report, sections.HeatMap)
    assert heat.threshold == 0.5
    assert any(row.vetoed for row in heat.rows)
    refusals = part(report, sections.Notes).refusals
    assert {refusal.reason for refusal in refusals} == {"alone it moves the output by more than 0.5"}
    assert any(None in row.cells for row in part(report, made.Effects).rows)


def test_without_confirmation_no_empty_table_is_printed() -> None:
    result = searched(n_trials=6, confirm=0, inputs=None)
    console = Console(width=150, file=io.StringIO())
    console.print(result)
    best = result.candidates[result.chosen]
    name = f"all {best.uniform}" if best.uniform else f"trial {best.number}"
    assert console.file.getvalue() == f"not confirmed: {name}, {best.value:.4f} in the search\n"  # type: ignore[attr-defined]


def test_sites_where_a_veto_would_leave_nothing_are_named() -> None:
    told: list[str] = []
    options: dict[str, Any] = {
        "n_trials": 6,
        "confirm": 1,
        "on_progress": lambda step: told.append(step.detail),
    }
    result = searched(methods=["group", "instance"], veto=0.01, **options)
    said = (
        "t '1', '4', '7', '10' every method moves the output by more than 0.01 alone, so that none is vetoed"
    )
    assert any(said in detail for detail in told)
    assert any(said in note.text for note in part(search_report(result), sections.Notes).notes)
    told.clear()
    # BatchNorm is left there.
    result = searched(methods=["batch", "instance"], veto=0.5, **options)
    assert not any("every method moves" in detail for detail in told)


def test_pruned_and_infeasible_trials_say_why() -> None:
    result = searched(constraints=[MaxLatency(1.0)], n_trials=12, sampler="random")
    rows = part(search_report(result), made.Trials).rows
    for row, trial in zip(rows, result.study.trials, strict=True):
        if trial.state.name == "PRUNED":
            assert row.state == "pruned"
            assert re.match(r"misses MaxLatency by ", row.reason)
    result.report().to_html()


def test_a_search_that_is_not_finished_has_a_report() -> None:
    run = Search(network(), Planted(), methods=METHODS, n_trials=24)
    empty = search_report(run)
    assert part(empty, made.SearchPart).outcome is None
    assert "No trial is complete yet" in empty.to_html()
    for _ in range(3):
        trial = run.ask()
        run.tell(trial, float(trial.number))
    half = search_report(run, notes=["from a test"])
    assert part(half, made.SearchPart).outcome.seeds == 0
    assert "not confirmed yet" in half.to_html()
    texts = [note.text for note in part(half, sections.Notes).notes]
    assert "The search is not finished: 3 of 24 trials are done." in texts
    assert "from a test" in texts
    assert Document.from_json(half.to_json()) == half


def test_smaller_may_be_better() -> None:
    def objective(model: nn.Module, trial: Any) -> float:
        return float(sum(value != "group" for value in trial.params.values()))

    result = normsearch.search(
        network(), objective, methods=METHODS, n_trials=18, confirm=2, directions=["minimize"]
    )
    report = search_report(result)
    best = search_charts.running_best(part(report, made.Trials))
    assert best[-1][1] == 0
    effects = part(report, made.Effects)
    # Gains are positive where a plan is better, whatever the direction: nothing is better than all group.
    assert all(cell.mean < 0.3 for row in effects.rows for cell in row.cells if cell is not None)


def test_json_comes_back(found: Document, tmp_path: Path) -> None:
    html, text = found.save(tmp_path / "search")
    assert Document.from_json(text.read_bytes()) == found
    assert html.read_text("utf-8") == found.to_html() + ("" if found.to_html().endswith("\n") else "\n")
    plain = json.loads(found.to_json())
    plain["sections"][0]["outcome"]["seeds"] = "many"
    with pytest.raises(normsearch.ReportError, match=r"section 0 \(search\)\.outcome\.seeds"):
        Document.from_json(json.dumps(plain))


def test_spaces_of_any_size_are_told(found: Document) -> None:
    summary = replace(part(found, made.SearchPart), plans=7**53)
    large = replace(found, sections=(summary, *found.sections[1:]))
    assert Document.from_json(large.to_json()) == large
    assert "6.2e44" in large.to_html()


# The page.


def hostile() -> Document:
    """Every name of a search's report is one that no browser should run."""
    names = list(HOSTILE)
    goals = (made.Goal(name=names[0], maximize=True), made.Goal(name=names[1], maximize=False))
    cell = made.EffectCell(mean=0.1, deviation=0.1, trials=1)
    scores = [
        made.PlanScore(
            name=name,
            trial=n,
            uniform=n % 2 == 0,
            searched=0.1 * n,
            scores=(0.1 * n, 0.2),
            gain=0.1,
            error=0.1,
        )
        for n, name in enumerate(names)
    ]
    states = ("complete", "failed", "infeasible", "pruned", "running")
    points = [
        made.TrialPoint(
            number=n,
            state=states[n % 5],
            origin=list(search_page.ORIGINS)[n % 4],
            values=(0.1 * n, 1.0) if n % 5 in (0, 2) else (),
            name=name,
            chosen=n == 0,
            reason=name,
        )
        for n, name in enumerate(names)
    ]
    outcome = made.Outcome(
        name=names[0], methods=dict.fromkeys(names, 1), uniform=False, score=0.5, seeds=2, gain=0.1,
        error=0.1, reference=names[1],
    )  # fmt: skip
    return Document(
        title="".join(names),
        environment=Environment(names[0], names[1], 1, names[2], names[3]),
        normsearch=names[1],
        created=names[1],
        sections=(
            made.SearchPart(
                study=names[0],
                sampler=names[1],
                seed=0,
                goals=goals,
                constraints=tuple(names),
                methods=tuple(names),
                sites=1,
                searched=1,
                choices=1,
                plans=2,
                trials=2,
                states=dict.fromkeys(names, 1),
                outcome=outcome,
            ),
            made.Scores(goal=goals[0], rows=tuple(scores), seeds=(1, 2)),
            made.Chosen(
                name=names[0],
                reference=names[1],
                rows=tuple(made.PlanRow(site=n, before=n, after=names[3], uniform=n) for n in names),
            ),
            made.Trials(goals=goals, rows=tuple(points)),
            made.Front(
                goals=goals,
                points=tuple(
                    made.FrontPoint(
                        number=n, values=(0.1 * n, 1.0 * n), name=name, best=n % 2 == 0, chosen=n == 0
                    )
                    for n, name in enumerate(names)
                ),
            ),
            made.Effects(
                goal=goals[0],
                plan=names[0],
                methods=tuple(names),
                rows=tuple(
                    made.EffectRow(
                        sites=(name, *names),
                        cells=(None, replace(cell, trials=0), *(cell for _ in names[2:])),
                        chosen=2,
                    )
                    for name in names
                ),
            ),
            made.Importances(
                goal=goals[0],
                rows=tuple(made.ImportanceRow(sites=(name,), spread=0.1, share=0.1) for name in names),
            ),
            made.Costs(
                methods=tuple(names),
                rows=tuple(
                    made.CostRow(
                        site=name,
                        latency=(None, *(0.1 for _ in names[1:])),
                        memory=(None, *(0.1 for _ in names[1:])),
                        chosen=1,
                    )
                    for name in names
                ),
                plans=tuple(made.PlanCost(name=name, latency=0.1, memory=2.0) for name in names),
                device=names[0],
                threads=1,
            ),
            sections.Notes(
                notes=tuple(sections.Note(text=name) for name in names),
                refusals=tuple(Refusal(name, name, name, name) for name in names),
            ),
        ),
    )


def documents(found: Document) -> Iterator[tuple[str, Document]]:
    yield "hostile", hostile()
    yield "found", found


def test_page_is_well_formed_and_escaped(found: Document) -> None:
    for _, document in documents(found):
        text = document.to_html()
        read = Reader(text)
        assert {tag for tag, _ in read.elements} <= {tag.lower() for tag in ALLOWED | {"polygon", "path"}}
        ids = [attributes["id"] for _, attributes in read.elements if "id" in attributes]
        assert len(ids) == len(set(ids))
        for number, (tag, attributes) in enumerate(read.elements):
            assert not any(name.startswith("on") or name in ("style", "src") for name in attributes), tag
            if tag == "svg":
                assert [t for t, _ in read.elements[number + 1 : number + 3]] == ["title", "desc"]
            if tag == "th":
                assert attributes["scope"] in ("row", "col")
            if "scroll" in (attributes.get("class") or "").split():
                assert attributes["tabindex"] == "0"
                assert attributes["aria-labelledby"] in ids
    read = Reader(hostile().to_html())
    shown = "".join(read.texts).replace("\n", "")
    for name in HOSTILE:
        assert visible(name) in shown, name
    assert Document.from_json(hostile().to_json()) == hostile()
    assert {section.kind for section in hostile().sections} == {*made.SEARCH_SECTIONS, "notes"}


@pytest.mark.skipif(CHROMIUM is None, reason="chromium is not installed: apt-get install chromium")
def test_browser_finds_nothing_to_complain_about(found: Document, tmp_path: Path) -> None:
    for name, document in documents(found):
        (tmp_path / f"{name}.html").write_text(document.to_html(), "utf-8")
        done = browse(tmp_path / f"{name}.html", tmp_path / "profile", "--dump-dom")
        assert messages(done) == []
        assert "</html>" in done.stdout


@pytest.mark.skipif(CHROMIUM is None, reason="chromium is not installed: apt-get install chromium")
def test_page_never_scrolls_sideways(found: Document, tmp_path: Path) -> None:
    assert shutil.which(str(CHROMIUM))
    widths = (320, 390, 768, 1280)
    cases = [(width, document.to_html()) for width in widths for _, document in documents(found)]
    for (width, _), (inner, content) in zip(cases, width_of_frames(cases, tmp_path), strict=True):
        assert inner == width
        assert content <= inner


def test_colours_have_contrast_in_light_and_dark(found: Document) -> None:
    style = re.findall(r"<style>(.*?)</style>", found.to_html(), re.DOTALL)[0]
    blocks = re.findall(r":root \{(.*?)\}", style, re.DOTALL)
    assert len(blocks) == 2
    for block in blocks:
        colours = dict(re.findall(r"--([\w-]+): (#[0-9a-f]{6});", block))
        for number in range(7):
            assert contrast(colours[f"e{number}"], colours[f"d{number}"]) >= 4.5, number
        for mark in ("s0", "s1", "p1", "p3", "muted"):
            assert contrast(colours[mark], colours["panel"]) >= 3, mark


# Charts.


def test_trials_are_drawn_where_they_belong() -> None:
    goal = made.Goal(name="score", maximize=True)
    values = [0.5, 0.6, 0.55, 0.7, 0.65, 0.62, -50.0]
    rows = tuple(
        made.TrialPoint(number=n, state="complete", origin="sampler", values=(value,))
        for n, value in enumerate(values)
    )
    trials = made.Trials(goals=(goal,), rows=rows)
    root = ElementTree.fromstring(search_charts.trials_chart(trials, width=1040))
    marks = list(root.iter("polygon"))
    assert len(marks) == 7
    centres = [_centre(mark) for mark in marks]
    assert [x for x, _ in centres] == sorted(x for x, _ in centres)
    # Higher scores are further up; what is far below stands at the edge, and says its value.
    order = sorted(range(6), key=lambda n: values[n])
    assert [centres[n][1] for n in order] == sorted((centres[n][1] for n in order), reverse=True)
    assert centres[6][1] > max(y for _, y in centres[:6]) - 1
    assert "beyond the axis" in "".join(marks[6].itertext())
    assert search_charts.beyond(trials) == "below"
    assert search_charts.running_best(trials) == [(0, 0.5), (1, 0.6), (3, 0.7)]


def _centre(mark: ElementTree.Element) -> tuple[float, float]:
    corners = [tuple(map(float, pair.split(","))) for pair in mark.attrib["points"].split()]
    return sum(x for x, _ in corners) / len(corners), sum(y for _, y in corners) / len(corners)


@pytest.mark.parametrize("values", [[], [0.0], [1.0, 1.0], [1e-9, 2e9], [-3.0, -1.0], [0.123456789] * 200])
@pytest.mark.parametrize("maximize", [True, False])
def test_charts_bear_any_numbers(values: list[float], maximize: bool) -> None:
    goals = (made.Goal(name="a", maximize=maximize), made.Goal(name="latency", maximize=False))
    points = tuple(
        made.TrialPoint(number=n, state="complete", origin="uniform", values=(value, value))
        for n, value in enumerate(values)
    )
    scores = tuple(
        made.PlanScore(name=f"trial {n}", trial=n, uniform=False, searched=value)
        for n, value in enumerate(values[:3])
    )
    front = tuple(
        made.FrontPoint(number=n, values=(value, value), best=True) for n, value in enumerate(values)
    )
    for width in (358, 1040):
        drawn = [search_charts.trials_chart(made.Trials(goals=goals, rows=points), width=width)]
        if scores:
            drawn.append(search_charts.scores_chart(made.Scores(goal=goals[0], rows=scores), width=width))
            drawn.append(search_charts.front_chart(made.Front(goals=goals, points=front), 1, width=width))
        for markup in drawn:
            root = ElementTree.fromstring(markup)
            for mark in root.iter("polygon"):
                x, y = _centre(mark)
                assert 0 <= x <= width
                assert 0 <= y <= float(root.attrib["height"])


def test_effects_have_the_colour_of_their_sign() -> None:
    assert [search_page.effect(share, 1.0) for share in (-2, -0.5, -0.1, -0.01, 0, 0.1, 0.5, 2)] == [
        0, 1, 2, 3, 3, 4, 5, 6
    ]  # fmt: skip
    assert search_page.effect_legend(1.0) == [
        "≤ -0.8", "≤ -0.35", "≤ -0.08", "no change", "≥ +0.08", "≥ +0.35", "≥ +0.8"
    ]  # fmt: skip
