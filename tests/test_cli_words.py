"""What the command line reads and says: arguments, tables, words of errors, progress."""

from __future__ import annotations

import io
import re
import sys
from pathlib import Path

import pytest
from commanding import MODEL, cli, output
from rich.console import Console

import normsearch
from normsearch import METHODS
from normsearch.arguments import read_architecture, read_to
from normsearch.commands import running
from normsearch.commands.wording import in_options
from normsearch.tables import Column, Listing

pytestmark = pytest.mark.usefixtures("folder")


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("tiny", "tiny"),
        ("3", 3),
        ("0.5", 0.5),
        ("true", True),
        ('"3"', "3"),
        ("[1]", "[1]"),
        ("", ""),
        ("a=b", "a=b"),
    ],
)
def test_arguments_are_read_as_json_or_text(text: str, value: object) -> None:
    architecture = read_architecture("timm/resnet18", [f"x={text}"])
    assert architecture is not None
    assert architecture.arguments == {"x": value}
    assert type(architecture.arguments["x"]) is type(value)


def test_to_is_read_like_in_python() -> None:
    assert read_to(["group"]) == {"*": ["group"]}
    assert read_to(["instance,group(groups=8)"]) == {"*": ["instance", "group(groups=8)"]}
    assert read_to(["group", "a.*=batch_renorm(r_max=2, d_max=1),rms"]) == {
        "a.*": ["batch_renorm(r_max=2, d_max=1)", "rms"],
        "*": ["group"],
    }


def columns(monkeypatch: pytest.MonkeyPatch, width: int) -> None:
    for console in (running.OUT, running.ERR):
        monkeypatch.setattr(console, "_width", width)


@pytest.mark.parametrize("width", [60, 80, 160])
def test_tables_fit_the_terminal_and_break_no_name(
    width: int, checkpoint: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    columns(monkeypatch, width)
    paths = [site["path"] for site in output("sites", checkpoint, *MODEL)]
    for words in (
        ["methods"],
        ["sites", checkpoint, *MODEL, "--input-shape", "3x64x64"],
        ["plan", checkpoint, *MODEL, "--to", "group"],
    ):
        printed = cli(*words).stdout
        assert max(map(len, printed.splitlines())) <= width
        names = list(METHODS) if words == ["methods"] else paths
        first = [line.split()[0] for line in printed.splitlines() if line[:1].strip()]
        assert [word for word in first if word in names] == names
        assert "batch_ren\n" not in printed


def test_columns_that_say_nothing_or_have_no_room_are_named(
    checkpoint: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    columns(monkeypatch, 60)
    printed = cli("sites", checkpoint, *MODEL, "--input-shape", "3x64x64").stdout
    assert "everywhere: layer BatchNorm2d, kind batch, eps 1e-05" in " ".join(printed.split())
    assert "no room for: producer" in printed
    columns(monkeypatch, 200)
    printed = cli("sites", checkpoint, *MODEL, "--input-shape", "3x64x64").stdout
    assert "no room" not in printed
    assert "layer1.0.conv1" in printed


def test_options_are_printed_as_they_are_typed() -> None:
    printed = cli("methods").stdout
    assert "trainable=false" in printed
    assert "groups=per site" in printed
    assert "False" not in printed
    assert "None" not in printed


def test_names_in_tables_cannot_drive_the_terminal() -> None:
    listing = Listing("t", (Column("site"), Column("notes", prose=True)), [("a\x1b[2Jb", "\u202ec")])
    console = Console(file=io.StringIO(), width=60)
    console.print(listing)
    assert isinstance(console.file, io.StringIO)
    assert "a\\x1b[2Jb" in console.file.getvalue()
    assert "\\u202ec" in console.file.getvalue()


def test_errors_speak_in_options(folder: Path) -> None:
    (folder / "lazy_network.py").write_text(
        "from torch import nn\n"
        "def network():\n    return nn.Sequential(nn.Conv2d(3, 8, 3), nn.LazyBatchNorm2d())\n"
    )
    sys.modules.pop("lazy_network", None)
    result = cli("plan", "-a", "lazy_network:network", "--to", "group", code=1)
    assert "give --inputs or --input-shape" in result.stderr
    for text in (result.stderr, " ".join(result.stdout.split())):
        assert not re.search(r"\b(inputs|where|outputs|in_place|force)=", text)


@pytest.mark.parametrize(
    ("python", "options"),
    [
        (
            "leave it out with where=lambda site: site.kind != 'custom', or",
            "leave it out with --to 'PATH=batch', or",
        ),
        ("or leave it out with where=", "or leave it out with --to 'PATH=batch'"),
        (
            "a.pth exists; choose another name, or replace it with force=True (--force)",
            "or replace it with --force",
        ),
        ("untie them first, or keep='affine'", "untie them first, or --keep affine"),
        (
            "logits=True needs outputs (N, classes, ...), got (3,); pick with outputs=",
            "--logits needs outputs",
        ),
        ("X cannot be copied (E: m); use in_place=True to edit the model itself", "convert without --report"),
        (
            "give a model and what convert made of it, or outputs=, a function that picks comparable tensors "
            "(outputs=lambda output: () matches the sites alone, as a detector's boxes need)",
            "what convert made of it; from Python, outputs= picks what is compared",
        ),
        (
            "check the inputs, or give outputs= to pick finite ones",
            "check the inputs; from Python, outputs= picks what is compared",
        ),
    ],
)
def test_python_is_said_in_options(python: str, options: str) -> None:
    said = in_options(python)
    assert options in said
    assert not re.search(r"\b(where|force|keep|in_place)=", said)


def test_progress_is_shown_on_a_terminal(monkeypatch: pytest.MonkeyPatch) -> None:
    console = Console(file=io.StringIO(), force_terminal=True, width=120)
    monkeypatch.setattr(running, "ERR", console)
    with running.following() as follow:
        follow(normsearch.Progress("distilling", 3, 10, 3725.0, "error 0.1\x1b[2J"))
        follow(normsearch.Progress("reading", 2, 0, None))
    assert isinstance(console.file, io.StringIO)
    shown = console.file.getvalue()
    assert "distilling" in shown
    assert "3/10" in shown
    assert "1:02:05 left" in shown
    assert "\\x1b[2J" in shown
    console = Console(file=io.StringIO(), force_terminal=False)
    monkeypatch.setattr(running, "ERR", console)
    with running.following() as follow:
        follow(normsearch.Progress("distilling", 3, 10, 65.0))
    assert console.file.getvalue().strip() == ""
