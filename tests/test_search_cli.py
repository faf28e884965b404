"""``normsearch search`` and ``normsearch worker``: files, resumption, workers, and what goes wrong."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import optuna
import pytest
import torch
from click.testing import Result
from optuna.trial import TrialState
from safetensors.torch import load_file
from typer.testing import CliRunner

import normsearch
from normsearch.cli import app
from normsearch.commands import searching as commands
from normsearch.reporting import Document, search_sections, sections
from normsearch.searching import open_storage
from normsearch.searching.costs import COSTS
from normsearch.searching.preparing import VETO
from normsearch.searching.samplers import SAMPLERS
from normsearch.searching.space import METHODS

MODULE = """
import time
from pathlib import Path
import torch
from torch import nn
from normsearch.searching import Recipe, Task, accuracy

def network():
    torch.manual_seed(0)
    layers = []
    for channels in (1, 4, 4, 4):
        layers += [nn.Conv2d(channels, 4, 3, padding=1), nn.BatchNorm2d(4), nn.ReLU()]
    return nn.Sequential(*layers, nn.Flatten(), nn.Linear(4 * 36, 2)).eval()

def pairs(count):
    labels = [torch.arange(8) % 2 for _ in range(count)]
    return [(torch.randn(8, 1, 6, 6) + y.view(-1, 1, 1, 1), y) for y in labels]

def task():
    model = network()
    recipe = Recipe(steps=2, lr=1e-3)
    return model, Task(train=pairs(4), validation=pairs(4), loss=nn.functional.cross_entropy,
                       metric=accuracy, recipe=recipe)

def objective(model, trial):
    names = [type(m).__name__ for m in model.modules()]
    return names.count("GroupNorm") + 0.01 * float(torch.randn(()))

def scored():
    return network(), objective

def slow():
    def score(model, trial):
        if not Path("fast").exists():
            Path("started").touch()
            time.sleep(0.3)
        return objective(model, trial)
    return network(), score

class Noisy:
    def __call__(self, model, trial):
        return self.confirm(model, trial) + 9 * (trial.number == 6)
    def confirm(self, model, trial):
        return objective(model, trial)

def noisy():
    return network(), Noisy()

def loud():
    print("loading")
    def score(model, trial):
        print("epoch 1")
        return objective(model, trial)
    return network(), score

def rated():
    return network(), lambda model, trial: objective(model, trial) - trial.suggest_float("lr", 0, 1)

def both():
    return network(), lambda model, trial: (objective(model, trial), 1.0)

def failing():
    def score(model, trial):
        raise ValueError("no data\\x1b[2J")
    return network(), score

class Late:
    def __call__(self, model, trial):
        return objective(model, trial)
    def confirm(self, model, trial):
        raise KeyError("no such split")

def late():
    return network(), Late()

def broken():
    raise RuntimeError("the data set is\\nnot here")

def alone():
    return network()

def swapped():
    return objective, network()

def nothing_to_call():
    return network(), 3

number = 3
"""
SMALL = ["--methods", "batch,group", "--trials", "10", "--confirm", "2"]


@pytest.fixture(autouse=True)
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("COLUMNS", "200")
    (tmp_path / "mytask.py").write_text(MODULE)
    before = list(sys.path)
    yield tmp_path
    sys.path[:] = before
    for name in ("mytask", "bad_syntax", "bad_import"):
        sys.modules.pop(name, None)


def cli(*words: str, code: int = 0) -> Result:
    result = CliRunner().invoke(app, list(words))
    assert result.exit_code == code, (result.output, result.exception)
    assert "Traceback" not in result.output
    return result


def started(*words: str) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [sys.executable, "-m", "normsearch", *words],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        # A test run in the background inherits an ignored SIGINT; the command is one in the foreground.
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
    )


def study_of(journal: str, name: str) -> optuna.Study:
    return optuna.load_study(study_name=name, storage=open_storage(journal))


def test_search_writes_the_network_the_plan_and_the_report(folder: Path) -> None:
    result = cli("search", "--task", "mytask:task", *SMALL, "--no-veto", "-o", "found")
    assert result.stdout.endswith(
        "wrote found/model.safetensors, found/plan.json, found/report.html, found/report.json\n"
    )
    assert "searching 10/10" in result.stderr
    names = {path.name for path in folder.iterdir()} - {"__pycache__"}
    assert names == {"mytask.py", "found", "mytask.journal"}
    plan = normsearch.Plan.from_json((folder / "found/plan.json").read_bytes())
    report = Document.from_json((folder / "found/report.json").read_bytes())
    summary = report.section(search_sections.SearchPart)
    assert summary is not None
    assert (summary.study, summary.goals[0].name, summary.trials) == ("mytask", "accuracy", 10)
    # The file is the network that the plan makes of the task's, and says so.
    import mytask  # type: ignore[import-not-found]

    loaded = normsearch.load("found/model.safetensors", "mytask:network", allow_factories=True)
    assert loaded.plan == plan
    converted = normsearch.convert(mytask.network(), plan)
    assert set(load_file("found/model.safetensors")) == set(converted.state_dict())
    x = torch.randn(2, 1, 6, 6)
    assert loaded.model(x).shape == converted(x).shape


def test_a_named_file_has_the_others_beside_it(folder: Path) -> None:
    words = ["--task", "mytask:scored", *SMALL, "--study", "mine", "--storage", "trials.log"]
    found = json.loads(cli("search", *words, "-o", "x.safetensors", "--json").stdout)
    names = ["x.safetensors", "x_plan.json", "x_report.html", "x_report.json"]
    assert found["written"] == names
    assert all((folder / name).exists() for name in names)
    assert (found["study"], found["trials"], found["same_split"]) == ("mine", 10, True)
    assert {row["method"] for row in found["plan"]["rows"]} == {"group(groups=1)"}
    assert (folder / "trials.log").exists()
    before = load_file(folder / names[0])
    # Nothing is replaced unasked, and that is said before any work.
    refused = cli("search", *words, "-o", "x.safetensors", code=1)
    assert refused.stderr == "error: x.safetensors exists; choose another name, or replace it with --force\n"
    cli("search", *words, "-o", "x.safetensors", "--force")
    # The same study, the same seed: the same network.
    after = load_file(folder / names[0])
    assert list(after) == list(before)
    assert all(torch.equal(after[name], before[name]) for name in before)


def test_status_tells_what_was_confirmed_until_further_trials_finish(folder: Path) -> None:
    words = ["--task", "mytask:noisy", "--methods", "batch,group"]
    found = json.loads(
        cli("search", *words, "--trials", "8", "--confirm", "3", "--json", "-o", "found").stdout
    )
    returned = found["confirmation"][found["chosen"]]
    told = json.loads(cli("status", *words[:2], "--json", "-o", "s.html").stdout)
    assert told["confirmation"] == found["confirmation"]
    assert told["leading"]["trial"] == returned["number"]
    assert told["plan"] == found["plan"]
    # The best score of the search was luck, and is not what the search returned.
    best = max(study_of("mytask.noisy.journal", "mytask.noisy").trials, key=lambda t: t.values[0])
    assert best.number != returned["number"]
    said = cli("status", *words[:2]).stdout
    assert (
        f"confirmed: all {returned['uniform']}, score {sum(returned['scores']) / 3:.4g} over 3 seeds; "
        in said
    )
    reports = [Document.from_json(Path(name).read_bytes()) for name in ("s.json", "found/report.json")]
    assert reports[0].sections == reports[1].sections
    single = cli(
        "search", *words, "--trials", "8", "--confirm", "1", "--json", "--force", "-o", "found"
    ).stdout
    assert "Infinity" not in single
    assert json.loads(single)["confirmation"][1]["error"] is None
    study = study_of("mytask.noisy.journal", "mytask.noisy")
    study.add_trial(study.trials[0])
    assert "leading, not confirmed: " in cli("status", *words[:2]).stdout


def test_what_else_the_objective_suggested_is_told(folder: Path) -> None:
    words = ["--task", "mytask:rated", *SMALL]
    found = json.loads(cli("search", *words, "--json", "-o", "found").stdout)
    study = study_of("mytask.rated.journal", "mytask.rated")
    lr = study.trials[found["confirmation"][found["chosen"]]["number"]].params["lr"]
    assert found["params"] == {"lr": lr}
    assert f"; lr={lr!r}\n" in cli("search", *words, "--force", "-o", "found").stdout
    assert f"; lr={lr!r}\n" in cli("status", *words[:2]).stdout
    assert json.loads(cli("status", *words[:2], "--json").stdout)["params"] == {"lr": lr}
    report = Document.from_json((folder / "found/report.json").read_bytes())
    notes = report.section(sections.Notes)
    assert notes is not None
    assert f"The objective suggested more than the plan; its trial had lr={lr!r}." in [
        n.text for n in notes.notes
    ]


def test_what_the_task_prints_goes_to_stderr(folder: Path) -> None:
    (folder / "noisy.py").write_text("print('imported')\nfrom mytask import loud\n")
    words = ["--task", "noisy:loud", "--study", "s", "--json"]
    found = cli("search", *words, *SMALL)
    assert json.loads(found.stdout)["study"] == "s"
    assert found.stderr.startswith("imported\nloading\n")
    assert "\nepoch 1\n" in found.stderr
    assert json.loads(cli("worker", *words).stdout) == {"study": "s", "trials_run": 0}
    assert json.loads(cli("status", *words).stdout)["states"] == {"complete": 10}
    sys.modules.pop("noisy")


def test_trials_that_wait_beyond_what_was_asked_for_do_not_count(folder: Path) -> None:
    words = ["--task", "mytask:scored", "--methods", "batch,group,layer"]
    found = json.loads(cli("search", *words, "--trials", "2", "--confirm", "0", "--json").stdout)
    study = study_of("mytask.scored.journal", "mytask.scored")
    assert len(study.trials) > 2
    assert found["trials"] == 2
    assert json.loads(cli("status", *words[:2], "--json").stdout)["states"] == {"complete": 2}
    assert "has 2 trials to run: 2 complete\n" in cli("status", *words[:2]).stdout
    report = Document.from_json((folder / "mytask.scored/report.json").read_bytes())
    trials = report.section(search_sections.Trials)
    assert trials is not None
    assert len(trials.rows) == 2


def test_the_same_command_goes_on(folder: Path) -> None:
    words = ["--task", "mytask:scored", "--methods", "batch,group", "--confirm", "2"]
    cli("search", *words, "--trials", "8")
    # Two tasks of one module are two searches.
    first = [
        (t.number, t.params, t.values) for t in study_of("mytask.scored.journal", "mytask.scored").trials
    ]
    cli("search", *words, "--trials", "14", "--force")
    again = [
        (t.number, t.params, t.values) for t in study_of("mytask.scored.journal", "mytask.scored").trials
    ]
    assert len(first) == 8
    assert len(again) == 14
    assert again[:8] == first
    other = cli("search", *words, "--trials", "14", "--force", "--seed", "1", code=1)
    assert other.stderr == (
        "error: the study 'mytask.scored' was made with --seed 0, now it is 1; resume with the same "
        "arguments, or give another --study\n"
    )


def test_ctrl_c_keeps_everything_and_the_same_command_goes_on(folder: Path) -> None:
    words = ["search", "--task", "mytask:slow", *SMALL]
    with started(*words) as process:
        try:
            while not (folder / "started").exists():
                assert process.poll() is None
                time.sleep(0.05)
            time.sleep(0.8)
            process.send_signal(signal.SIGINT)
            _, stderr = process.communicate(timeout=30)
        finally:
            process.kill()
    assert process.returncode == 130
    assert stderr.strip().splitlines()[-1] == (
        "interrupted; everything is kept in mytask.slow.journal: the same command goes on"
    )
    assert "Traceback" not in stderr
    assert not (folder / "mytask.slow").exists()
    kept = [
        t for t in study_of("mytask.slow.journal", "mytask.slow").trials if t.state == TrialState.COMPLETE
    ]
    assert 1 <= len(kept) < 10
    before = (folder / "mytask.slow.journal").read_bytes()
    best = max(kept, key=lambda t: t.values[0])
    said = cli("status", "--task", "mytask:slow", "-o", "so-far.html").stdout
    assert f"the study 'mytask.slow' has 10 trials to run: {len(kept)} complete" in said
    assert f"score {best.values[0]:.4g}\nthe plan: " in said
    assert said.endswith("wrote so-far.html, so-far.json\n")
    assert f"{len(kept)} of 10 trials are done" in (folder / "so-far.html").read_text()
    assert f"{len(kept)} of 10 trials are done" in (folder / "so-far.json").read_text()
    told = json.loads(cli("status", "--task", "mytask:slow", "--json").stdout)
    assert told["states"]["complete"] == len(kept)
    assert (told["trials"], told["leading"]["values"]) == (10, best.values)
    # Whoever looks changes nothing.
    assert (folder / "mytask.slow.journal").read_bytes() == before
    (folder / "fast").touch()
    cli(*words)
    trials = study_of("mytask.slow.journal", "mytask.slow").trials
    assert [t.state for t in trials] == [TrialState.COMPLETE] * 10
    assert [t.values for t in trials if t.number in {k.number for k in kept}] == [t.values for t in kept]
    assert (folder / "mytask.slow" / "report.html").exists()


def test_a_worker_joins_on_a_journal_file(folder: Path) -> None:
    with started("search", "--task", "mytask:slow", *SMALL, "--trials", "14") as process:
        try:
            while not (folder / "started").exists():
                assert process.poll() is None
                time.sleep(0.05)
            words = ["--study", "mytask.slow", "--task", "mytask:slow", "--json"]
            joined = json.loads(cli("worker", *words).stdout)
            (folder / "fast").touch()
            _, stderr = process.communicate(timeout=60)
        finally:
            process.kill()
    assert process.returncode == 0, stderr
    trials = study_of("mytask.slow.journal", "mytask.slow").trials
    assert [t.state for t in trials] == [TrialState.COMPLETE] * 14
    assert joined["study"] == "mytask.slow"
    assert 1 <= joined["trials_run"] < 14
    # A worker that comes late has nothing to do.
    late = cli("worker", "--study", "mytask.slow", "--task", "mytask:slow")
    assert late.stdout == "the study 'mytask.slow' has all its trials; 0 of them ran here\n"


def test_options_reach_the_search(folder: Path) -> None:
    words = ["--max-drop", "5", "--max-latency", "50", "--max-memory", "50", "--cost", "latency"]
    more = [
        "--sites",
        "1",
        "--sites",
        "[47]",
        "--no-veto",
        "--no-sense",
        "--sampler",
        "random",
        "--seed",
        "3",
    ]
    cli("search", "--task", "mytask:task", *SMALL, *words, *more, "--title", "small", "-o", "o")
    report = Document.from_json((folder / "o/report.json").read_bytes())
    summary = report.section(search_sections.SearchPart)
    assert summary is not None
    assert report.title == "small"
    assert (summary.sampler, summary.seed, summary.searched) == ("random", 3, 3)
    assert [goal.name for goal in summary.goals] == ["accuracy", "latency"]
    assert len(summary.constraints) == 3
    words = ["--direction", "maximize", "--direction", "minimize", "-o", "p", "--study", "two"]
    cli("search", "--task", "mytask:both", *SMALL, *words)
    assert study_of("two.journal", "two").directions[1].name == "MINIMIZE"


def test_batch_independent_leaves_batch_out(folder: Path) -> None:
    words = ["--methods", "batch,group,layer", "--trials", "6", "--confirm", "1", "--batch-independent"]
    found = json.loads(cli("search", "--task", "mytask:scored", *words, "--json").stdout)
    assert "batch" not in {row["method"] for row in found["plan"]["rows"]}


ERRORS = (
    ("mytask", "--task 'mytask': give package.module:task"),
    (":task", "--task ':task': give package.module:task"),
    ("no such:task", "--task 'no such:task': give package.module:task"),
    ("absent_module:task", "cannot import absent_module: ModuleNotFoundError: No module named"),
    ("bad_syntax:task", "cannot import bad_syntax: SyntaxError: "),
    ("bad_import:task", "ZeroDivisionError: division by zero (line 2 of bad_import.py)"),
    ("mytask:tusk", "mytask has no 'tusk'; it has "),
    ("mytask:number", "number is a int, not a function"),
    ("mytask:broken", "RuntimeError: the data set is not here (line "),
    ("mytask:alone", "it returned a Sequential; return (model, objective)"),
    ("mytask:swapped", "it returned a function first; return (model, objective), a torch.nn.Module first"),
    ("mytask:nothing_to_call", "it returned a int as the objective"),
    ("mytask:late", "failed when it was run again with seed 3 (KeyError: 'no such split')"),
    ("mytask:failing", "the first 3 trials all failed: ValueError: no data\\x1b[2J; mend the objective"),
)


@pytest.mark.parametrize(("task", "said"), ERRORS, ids=[task for task, _ in ERRORS])
def test_each_error_is_one_line(task: str, said: str, folder: Path) -> None:
    (folder / "bad_syntax.py").write_text("def task(:\n")
    (folder / "bad_import.py").write_text("\n1 / 0\n")
    result = cli("search", "--task", task, *SMALL, code=1)
    line = result.stderr.strip().splitlines()[-1]
    assert line.startswith("error: ")
    assert said in line
    assert sum(text.startswith("error") for text in result.stderr.splitlines()) == 1
    assert not (folder / "mytask").exists()


ONE_PLAN = (
    "one plan only is left to try, batch at 4 of 4 sites; refused or vetoed: group at 4 ('1': alone it moves "
    "the output by more than 0.01); give --no-veto, a larger --veto or other --methods"
)
OPTIONS = (
    (["--methods", "batch,grup"], "grup"),
    (["--methods", "batch"], "give --methods that differ"),
    (["--sites", "nowhere"], "no site matches 'nowhere'"),
    (["--max-drop", "-1"], "error: --max-drop -1.0: give a finite number"),
    (["--max-latency", "2"], "let it return a normsearch.searching.Task"),
    (["--storage", "absent/x.journal"], "the folder 'absent' does not exist; make it first"),
    (["--storage", "mytask.py"], "mytask.py is not a journal of trials"),
    (["--storage", "mysql://u:secret@h/d"], "mysql:// is no storage that normsearch opens"),
    (["--task", "mytask:task", "--methods", "batch,group", "--veto", "0.01"], ONE_PLAN),
    (["--seed", str(2**63)], "error: --seed 9223372036854775808: give at most 4611686018427387904"),
    (["--study", "../x"], "--study '../x': give a name that a file may have too"),
    (["-o", "absent/deeper/x"], "the folder 'absent/deeper' does not exist; make it first"),
    (["-o", "mytask.py"], "mytask.py is no folder; give one, or NAME.safetensors"),
    (["-o", "found.pt"], "-o found.pt: weights are written as NAME.safetensors; give that, or a folder"),
)


@pytest.mark.parametrize(("words", "said"), OPTIONS, ids=[" ".join(words) for words, _ in OPTIONS])
def test_options_that_make_no_sense(words: list[str], said: str) -> None:
    result = cli("search", "--task", "mytask:scored", *words, "--trials", "4", code=1)
    assert said in result.stderr
    assert "secret" not in result.stderr


@pytest.mark.skipif(sys.platform != "linux", reason="needs /proc, where nobody can write")
@pytest.mark.parametrize("output", ["/proc/found", "/proc/x.safetensors"])
def test_what_cannot_be_written_is_said_before_the_task_is_loaded(output: str) -> None:
    said = cli("search", "--task", "mytask:broken", "-o", output, code=1).stderr
    assert "nothing can be written into /proc" in said
    assert said.endswith("(No such file or directory); give another -o\n")


def test_usage_errors_have_their_own_exit_code() -> None:
    assert "not both" in cli("search", "--task", "mytask:task", "--veto", "1", "--no-veto", code=2).stderr
    assert "--task" in cli("search", code=2).stderr
    assert "--study" in cli("worker", "--task", "mytask:task", code=2).stderr


def test_a_worker_says_what_it_misses(folder: Path) -> None:
    words = ["--task", "mytask:scored"]
    missing = cli("worker", "--study", "x", *words, code=1)
    assert missing.stderr == (
        "error: there is no journal x.journal; start the search first, or give its --storage\n"
    )
    assert cli("status", *words, "--study", "x", code=1).stderr == missing.stderr
    cli("search", "--task", "mytask:scored", *SMALL)
    other = cli("worker", "--study", "x", "--storage", "mytask.scored.journal", *words, code=1)
    assert "the storage has no study 'x'; it has mytask.scored" in other.stderr
    lite = cli("worker", "--study", "x", "--storage", "sqlite:///x.db", *words, code=1)
    assert "SQLite is for one process" in lite.stderr


def test_choices_are_those_of_the_library() -> None:
    assert tuple(commands.Sampler) == SAMPLERS
    assert tuple(commands.Cost) == COSTS
    text = " ".join(cli("search", "--help").stdout.split())
    assert f"[default: {VETO:g}]" in text
    assert ",".join(METHODS) in text.replace("│ │", "").replace(" ", "")


def test_help_waits_for_nothing_heavy() -> None:
    code = (
        "import sys; from typer.testing import CliRunner; from normsearch.cli import app; "
        "done = CliRunner().invoke(app, ['search', '--help']); assert done.exit_code == 0; "
        "print('optuna' in sys.modules)"
    )
    environment: dict[str, Any] = {**os.environ}
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True, env=environment
    )
    assert done.stdout == "False\n"
