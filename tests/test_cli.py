"""The command line as a user sees it: files, tables, JSON, exit codes, one message on stderr."""

from __future__ import annotations

import io
import json
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from importlib import import_module
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from click.testing import Result
from PIL import Image
from rich.console import Console
from safetensors.torch import load_file
from torch import nn
from typer.testing import CliRunner

import normsearch
from normsearch import METHODS, Architecture, reporting
from normsearch.admission.images import Preparation, find_images, read_image
from normsearch.arguments import read_architecture, read_to
from normsearch.cli import COMMANDS, app
from normsearch.commands import running
from normsearch.commands.wording import in_options
from normsearch.tables import Column, Listing

NAME = "timm/resnet10t"
RESNET = Architecture(NAME, {"num_classes": 3})
MODEL = ["--architecture", NAME, "--arguments", "num_classes=3"]


@pytest.fixture(autouse=True)
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("COLUMNS", "200")
    return tmp_path


@pytest.fixture(scope="module")
def weights() -> dict[str, torch.Tensor]:
    torch.manual_seed(0)
    state: dict[str, torch.Tensor] = normsearch.build(RESNET).state_dict()
    for name, value in state.items():
        if name.endswith("running_var"):
            value.uniform_(0.5, 2)
    return state


@pytest.fixture
def checkpoint(weights: dict[str, torch.Tensor], folder: Path) -> str:
    torch.save({"state_dict": weights}, folder / "x.pth")
    return "x.pth"


def cli(*words: str, code: int = 0) -> Result:
    result = CliRunner().invoke(app, list(words))
    assert result.exit_code == code, (result.output, result.exception)
    # Whatever happens, no traceback.
    assert "Traceback" not in result.output
    assert code == 0 or result.stderr
    return result


def output(*words: str) -> Any:
    return json.loads(cli(*words, "--json").stdout)


def process(*words: str, **options: Any) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "normsearch", *words], capture_output=True, text=True, check=False, **options
    )


def test_convert_writes_all_that_is_needed(checkpoint: str, folder: Path) -> None:
    words = ["--to", "group", "-o", "out.safetensors", "--report", "report.json", "--input-shape", "3x64x64"]
    result = cli("convert", checkpoint, *MODEL, *words)
    assert "note: read from the entry 'state_dict'" in result.stderr
    assert sorted(path.name for path in folder.iterdir()) == [
        "out.safetensors",
        "out_model.py",
        "report.json",
        "x.pth",
    ]
    assert result.stdout.endswith("wrote out.safetensors, out_model.py, report.json\n")
    report = json.loads((folder / "report.json").read_text())
    assert report["batch_norms"]["after"] == 0
    loaded = normsearch.load("out.safetensors")
    original = normsearch.load("x.pth", RESNET).model
    x = torch.randn(2, 3, 64, 64)
    expected = normsearch.convert(original, "group")(x)
    assert torch.equal(loaded.model(x), expected)
    torch.save(x, "inputs.pt")
    code = "import torch; from out_model import load; torch.save(load()(torch.load('inputs.pt')), 'y.pt')"
    subprocess.run([sys.executable, "-c", code], check=True)
    torch.testing.assert_close(torch.load("y.pt"), expected)


def test_convert_with_patterns_and_a_preference(checkpoint: str) -> None:
    words = ["--to", "layer4.*=instance,layer", "--to", "group(groups=8)", "--input-shape", "3x32x32"]
    result = output("convert", checkpoint, *MODEL, *words, "-o", "o.safetensors")
    methods = {row["site"]["path"]: row["method"] for row in result["plan"]["rows"]}
    assert methods["layer1.0.bn1"] == "group(groups=8)"
    # Maps of one element leave nothing to an instance.
    assert {methods["layer4.0.bn1"], methods["layer4.0.bn2"]} == {"layer"}
    assert result["written"] == ["o.safetensors", "o_model.py"]
    assert result["report"] is None


def test_plan_file_round_trip(checkpoint: str, folder: Path) -> None:
    cli("plan", checkpoint, *MODEL, "--to", "rms", "-o", "plan.json")
    cli("convert", checkpoint, *MODEL, "--plan", "plan.json", "-o", "o.safetensors", "--no-script")
    assert normsearch.load("o.safetensors").plan == normsearch.Plan.from_json(
        (folder / "plan.json").read_text()
    )
    assert not (folder / "o_model.py").exists()


def test_dry_run_writes_nothing(checkpoint: str, folder: Path) -> None:
    result = cli("convert", checkpoint, *MODEL, "--to", "group", "-o", "out.safetensors", "--dry-run")
    assert result.stdout.endswith("nothing written (--dry-run)\n")
    assert os.listdir(folder) == [checkpoint]


def test_keep_nothing(checkpoint: str) -> None:
    cli("convert", checkpoint, *MODEL, "--to", "group", "--keep", "nothing", "-o", "o.safetensors")
    assert torch.equal(load_file("o.safetensors")["bn1.weight"], torch.ones(64))


DETECTOR = """
from torch import nn

class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.conv, self.norm = nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8)

    def forward(self, x):
        y = self.norm(self.conv(x))
        return [{"boxes": y[y > 0.5 + 0.1 * y.mean()]}]
"""


def test_a_detector_is_told_that_python_picks_its_outputs(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.syspath_prepend(str(folder))
    (folder / "detecting.py").write_text(DETECTOR)
    network = ["-a", "detecting:Net"]
    torch.save(normsearch.build("detecting:Net", allow_factories=True).state_dict(), folder / "net.pth")
    cli("convert", "net.pth", *network, "--to", "layer", "-o", "out.safetensors", "--no-script")
    np.savez(folder / "x.npz", np.random.default_rng(0).standard_normal((8, 3, 9, 9)).astype(np.float32))
    words = [*network, "--inputs", "x.npz"]
    for command in (
        ["calibrate", "net.pth", "out.safetensors", *words, "-o", "c.safetensors"],
        ["compare", "net.pth", "out.safetensors", *words],
    ):
        said = cli(*command, code=1).stderr
        assert "from Python, outputs= picks what is compared" in said
        assert said.count("outputs=") == 1


@pytest.mark.parametrize("there", ["out.safetensors", "out_model.py", "report.json"])
def test_nothing_is_replaced_without_force(there: str, checkpoint: str, folder: Path) -> None:
    (folder / there).write_text("mine")
    words = ["--to", "group", "-o", "out.safetensors", "--report", "report.json", "--input-shape", "3x64x64"]
    result = cli("convert", checkpoint, *MODEL, *words, code=1)
    assert result.stderr.startswith(f"error: {there} exists")
    assert (folder / there).read_text() == "mine"
    assert sorted(os.listdir(folder)) == sorted([checkpoint, there])
    cli("convert", checkpoint, *MODEL, *words, "--force")
    assert (folder / there).read_bytes() != b"mine"


FACTORY = """
import torch
from torch import nn

class Net(nn.Module):
    def __init__(self, model):
        super().__init__()
        self.conv = nn.Conv1d(1, {"tiny": 8, "full": 32}[model], 3)
        self.norm = nn.BatchNorm1d(self.conv.out_channels)

    def forward(self, x):
        return self.norm(self.conv(x))
"""


def test_factory_in_the_current_folder(folder: Path) -> None:
    (folder / "my_factory.py").write_text(FACTORY)
    sys.modules.pop("my_factory", None)
    model = ["--architecture", "my_factory:Net", "--arguments", "model=tiny"]
    assert [site["channels"] for site in output("sites", *model)] == [8]
    network = normsearch.build(Architecture("my_factory:Net", {"model": "tiny"}), allow_factories=True)
    torch.save(network.state_dict(), "net.pth")
    cli("convert", "net.pth", *model, "--to", "batch_renorm", "-o", "net.safetensors")
    assert cli("sites", "net.safetensors", code=1).stderr.startswith(
        "error: net.safetensors says that 'my_factory:Net'"
    )
    assert output("sites", "net.safetensors", *model) == []
    done = process("profile", "net.safetensors", *model, "--input-shape", "1x64", "--json")
    assert json.loads(done.stdout)["parameters"] == 48
    script = subprocess.run([sys.executable, "net_model.py"], capture_output=True, text=True, check=True)
    assert "(norm): BatchRenorm(8" in script.stdout


def test_methods() -> None:
    found = output("methods")
    assert [row["method"] for row in found] == list(METHODS)
    assert next(row for row in found if row["method"] == "ghost")["options"] == {"size": 32}
    assert all(name in cli("methods").stdout for name in METHODS)


def test_architectures() -> None:
    found = output("architectures", "*/resnet18")
    assert found["architectures"] == ["torchvision/resnet18", "timm/resnet18"]
    assert found["arguments"]["timm"]["num_classes"] == "a whole number from 0 to 100000"
    assert cli("architectures", "timm/resnet18").stdout.splitlines() == ["timm/resnet18"]
    assert "no architecture matches 'x'" in cli("architectures", "x", code=1).stderr


@pytest.mark.parametrize("words", [["architectures"], ["methods", "--json"], ["methods"]])
def test_a_reader_that_has_seen_enough_ends_it_quietly(words: list[str]) -> None:
    with subprocess.Popen(
        [sys.executable, "-m", "normsearch", *words], stdout=subprocess.PIPE, stderr=subprocess.PIPE
    ) as running:
        assert running.stdout is not None
        assert running.stderr is not None
        running.stdout.close()
        assert running.stderr.read() == b""
        assert running.wait(60) == 1


def test_sites(checkpoint: str) -> None:
    found = output("sites", checkpoint, *MODEL, "--input-shape", "3x64x64", "--batch-size", "3")
    assert found[0]["input_shapes"][0][0] == 3
    assert len(found) == len(output("sites", *MODEL))
    assert "layer1.0.bn1" in cli("sites", checkpoint, *MODEL).stdout


def test_a_network_without_sites_is_said_to_have_none(folder: Path) -> None:
    torch.export.save(torch.export.export(nn.Linear(2, 2), (torch.ones(1, 2),)), folder / "plain.pt2")
    assert cli("sites", "plain.pt2").stdout == "plain.pt2 has no BatchNorm layer\n"
    assert cli("sites", "-a", "torchvision/vgg11").stdout == "torchvision/vgg11 has no BatchNorm layer\n"
    assert output("sites", "plain.pt2") == []


def test_plan_prints_refusals_and_fails(checkpoint: str) -> None:
    result = cli("plan", checkpoint, *MODEL, "--to", "instance", "--input-shape", "3x32x32", code=1)
    assert "refused" in result.stdout
    assert "the output would be constant" in result.stderr
    table = json.loads(cli("plan", *MODEL, "--to", "group", "--json").stdout)
    assert {row["exact"] for row in table["rows"]} == {False}


def test_compare_and_profile(checkpoint: str, folder: Path) -> None:
    cli("convert", checkpoint, *MODEL, "--to", "frozen", "-o", "f.safetensors")
    np.savez(folder / "x.npz", np.random.default_rng(0).standard_normal((4, 3, 64, 64)).astype(np.float32))
    report = output("compare", checkpoint, "f.safetensors", *MODEL, "--inputs", "x.npz", "--logits")
    assert report["drift"]["relative_l2"] < 1e-5
    assert report["drift"]["top1_agreement"] == 1
    assert "output drift" in cli("compare", checkpoint, "f.safetensors", *MODEL, "--inputs", "x.npz").stdout
    cost = output("profile", "f.safetensors", "--input-shape", "3x64x64", "--repeats", "1")
    assert cost["parameters"] == report["parameters"]["after"]


def test_the_batch_size_that_was_measured_is_said(checkpoint: str, folder: Path) -> None:
    np.savez(folder / "x.npz", np.random.default_rng(0).standard_normal((9, 3, 32, 32)).astype(np.float32))
    inputs = ["--inputs", "x.npz"]
    words = [checkpoint, *MODEL, "--to", "frozen", "-o", "f.safetensors", "--report", "f.json", *inputs]
    assert "2 batches, the first of 8 samples" in cli("convert", *words).stdout
    report = json.loads((folder / "f.json").read_text())
    compared = output("compare", checkpoint, "f.safetensors", *MODEL, *inputs)
    assert [compared[key] for key in ("batches", "batch_size")] == [2, 8]
    assert report == compared
    profiled = cli("profile", checkpoint, *MODEL, *inputs, "--batch-size", "100", "--repeats", "1")
    assert "the inputs have 9 samples, fewer than --batch-size" in profiled.stderr
    assert "1 batch of 9 samples" in profiled.stdout


def test_half_precision_checkpoint_gets_half_precision_inputs(
    folder: Path, weights: dict[str, torch.Tensor]
) -> None:
    state = {
        name: value.bfloat16() if value.is_floating_point() else value for name, value in weights.items()
    }
    torch.save(state, "h.pth")
    result = cli("sites", "h.pth", *MODEL, "--input-shape", "3x64x64", "--json")
    assert "bfloat16: the network was cast" in result.stderr
    assert json.loads(result.stdout)[0]["calls"] == 1


USAGE: Sequence[tuple[list[str], str]] = (
    (["convert", "x.pth"], "give either --to or --plan"),
    (["convert", "x.pth", "--to", "group", "--plan", "p.json"], "give either --to or --plan"),
    (["convert", "x.pth", "--to", "group"], "say where to write"),
    (["convert", "x.pth", "--to", "group", "-o", "o.safetensors", "--report", "r.json"], "a report needs"),
    (["convert", "x.pth", "--to", "group", "-o", "o.safetensors", "--logits"], "it is part of a report"),
    (["convert"], "Missing argument"),
    (["calibrate", "x.pth", "o.safetensors", "-o", "c.safetensors"], "Missing option '--inputs'"),
    (["calibrate", "x.pth", "o.safetensors", "--inputs", "x.npz"], "Missing option '--output'"),
    (
        ["calibrate", "x.pth", "o.safetensors", "--inputs", "x.npz", "-o", "c.safetensors", "--logits"],
        "it is part of a report",
    ),
    (["sensitivity", "x.pth"], "give --input-shape or --inputs"),
    (["report", "x.pth", "o.safetensors"], "say where to write"),
    (["report", "x.pth", "-o", "r.html"], "give the converted checkpoint after the original"),
    (["report", "r.json", "o.safetensors", "-o", "r.html"], "stands alone"),
    (["convert", "x.pth", "--to", "group", "-o", "o.safetensors", "--keep", "half"], "half"),
    (["plan", "x.pth"], "give at least one method"),
    (["sites"], "give a checkpoint or an --architecture"),
    (["profile", "x.pth"], "give --input-shape or --inputs"),
    (["profile", "x.pth", "--input-shape", "3", "--repeats", "0"], "repeats"),
    (["evil"], "evil"),
)


@pytest.mark.parametrize(("words", "message"), USAGE, ids=[" ".join(words)[:40] for words, _ in USAGE])
def test_wrong_usage_is_two(words: list[str], message: str, checkpoint: str) -> None:
    assert message in cli(*words, code=2).stderr


REFUSED: Sequence[tuple[list[str], str]] = (
    (["sites", "none.pth", *MODEL], "No such file"),
    (["sites", "."], "is a directory"),
    (["sites", "x.pth"], "does not say which network"),
    (["sites", "x.pth", "-a", "timm/resnet50"], "does not fit timm/resnet50"),
    (["sites", "x.pth", "-a", "resnet50"], "cannot read the architecture 'resnet50'; write torchvision/NAME"),
    (["sites", "x.pth", "-a", "timm/resnet_50"], "did you mean"),
    (["sites", "x.pth", "-a", NAME, "--arguments", "num_classes"], "write name=value"),
    (["sites", "x.pth", "-a", NAME, "--arguments", "num_classes=3", "--arguments", "num_classes=4"], "twice"),
    (["sites", "x.pth", "--arguments", "a=1"], "belong to an --architecture"),
    (["sites", *MODEL, "--input-shape", "3,64,64"], "write the shape of one sample, for example 3x224x224"),
    (["sites", *MODEL, "--input-shape", "3x999999x999999"], "give less"),
    (["sites", *MODEL, "--input-shape", "5x64x64"], "failed on the given inputs"),
    (["sites", *MODEL, "--inputs", "x.pth"], "inputs are read from .npz, .npy or .safetensors"),
    (["sites", *MODEL, "--inputs", "."], "holds no image"),
    (["sites", *MODEL, "--image-size", "32"], "prepare the images in a folder; give it with --inputs"),
    (["sites", *MODEL, "--inputs", "x.pth", "--mean", "0.5", "--std", "1"], "is no folder of images"),
    (
        ["sensitivity", "x.pth", *MODEL, "--input-shape", "3x32x32", "--to", "a.*=group"],
        "give methods alone",
    ),
    (["sensitivity", "x.pth", *MODEL, "--input-shape", "3x32x32", "--threshold", "0"], "above 0"),
    (["report", "x.pth", "x.pth", *MODEL, "-o", "r.html"], "does not say how it was converted"),
    (["report", "no.json", "-o", "r.html"], "cannot read no.json"),
    (["sites", *MODEL, "--inputs", "no.npz"], "is not a file"),
    (["sites", *MODEL, "--inputs", "no.npz", "--input-shape", "3"], "not both"),
    (["plan", *MODEL, "--to", "grup"], "unknown method 'grup'"),
    (["plan", *MODEL, "--to", "nothing.*=group"], "no site matches"),
    (["plan", *MODEL, "--to", "group", "-o", "no/plan.json"], "does not exist"),
    (
        ["convert", "x.pth", *MODEL, "--plan", "no.json", "-o", "o.safetensors"],
        "cannot read no.json",
    ),
    (["convert", "x.pth", *MODEL, "--plan", "x.pth", "-o", "o.safetensors"], "not a plan"),
    (["convert", "x.pth", *MODEL, "--to", "group", "-o", "o.pth"], "written as .safetensors"),
    (["sites", "-a", "no_such_module:Net"], "No module named"),
)


@pytest.mark.parametrize(("words", "message"), REFUSED, ids=[" ".join(words)[:50] for words, _ in REFUSED])
def test_refusal_is_one(words: list[str], message: str, checkpoint: str, folder: Path) -> None:
    result = cli(*words, code=1)
    assert message in result.stderr
    assert "error: " in result.stderr
    assert os.listdir(folder) == [checkpoint]


def test_converted_checkpoint_is_not_converted_again(checkpoint: str) -> None:
    cli("convert", checkpoint, *MODEL, "--to", "group", "-o", "o.safetensors", "--no-script")
    result = cli("convert", "o.safetensors", "--to", "layer", "-o", "p.safetensors", code=1)
    assert "converted already" in result.stderr


def test_names_in_files_cannot_drive_the_terminal(folder: Path) -> None:
    torch.save({"\x1b[2J\x1b]0;owned\x07": torch.ones(1)}, "x.pth")
    result = cli("sites", "x.pth", *MODEL, code=1)
    assert "\x1b" not in result.output
    assert "\x07" not in result.output


def test_entry_point_and_module_agree() -> None:
    done = process("methods", "--json")
    assert (done.returncode, done.stderr) == (0, "")
    assert [row["method"] for row in json.loads(done.stdout)] == list(METHODS)
    script = Path(sys.executable).with_name("normsearch")
    if script.exists():
        again = subprocess.run([script, "--help"], capture_output=True, text=True, check=True).stdout
        assert again == process("--help").stdout.replace("python -m normsearch", "normsearch")


def test_no_output_replaces_an_input_or_another_output(checkpoint: str, folder: Path) -> None:
    before = Path(checkpoint).read_bytes()
    common = [
        "convert",
        checkpoint,
        "-a",
        "torchvision/resnet18",
        "--to",
        "group",
        "--input-shape",
        "3x32x32",
    ]
    for words, message in (
        ([*common, "-o", "o.safetensors", "--report", checkpoint, "--force"], "is read by this command"),
        ([*common, "-o", "o.safetensors", "--report", "o_model.py"], "would be written twice"),
        ([*common, "-o", "o.safetensors", "--report", "o.safetensors"], "would be written twice"),
        (
            ["plan", checkpoint, "-a", "torchvision/resnet18", "--to", "group", "-o", checkpoint, "--force"],
            "is read by this command",
        ),
    ):
        result = cli(*words, code=1)
        assert message in " ".join(result.output.split())
    assert Path(checkpoint).read_bytes() == before
    assert not (folder / "o.safetensors").exists()
    assert not (folder / "o_model.py").exists()


def interrupted(words: list[str], started: Path) -> tuple[int, str]:
    """Run a command, interrupt it once a file is there, and return its exit code and stderr."""
    with subprocess.Popen(
        [sys.executable, "-m", "normsearch", *words],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        # A test run in the background inherits an ignored SIGINT; the command is one in the foreground.
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
    ) as running_command:
        try:
            while not started.exists():
                assert running_command.poll() is None
                time.sleep(0.05)
            running_command.send_signal(signal.SIGINT)
            _, stderr = running_command.communicate(timeout=30)
        finally:
            running_command.kill()
    return running_command.returncode, stderr


def test_interrupt_is_clean(checkpoint: str, folder: Path) -> None:
    (folder / "slow_network.py").write_text(
        "import time\nfrom pathlib import Path\n"
        "def network():\n    Path('started').touch()\n    time.sleep(60)\n"
    )
    words = ["convert", checkpoint, "-a", "slow_network:network", "--to", "group", "-o", "o.safetensors"]
    returncode, stderr = interrupted(words, folder / "started")
    assert returncode == 130
    assert stderr.strip().splitlines()[-1] == "interrupted; nothing half-written is left"
    assert not (folder / "o.safetensors").exists()


def test_the_list_of_commands_is_theirs_and_needs_no_torch() -> None:
    for name, (module, does) in COMMANDS.items():
        text = " ".join(str(getattr(import_module(f"normsearch.commands.{module}"), name).__doc__).split())
        assert text.startswith(does.removesuffix(".")), name
    code = "import sys, normsearch.__main__ as m; sys.argv[1:] = {words}\ntry: m.main()\n"
    code += "finally: print({'torch', 'numpy', 'rich'} & set(sys.modules))"
    for words, status in (["--help"], 0), ([], 2), (["serch"], 2):
        done = subprocess.run(
            [sys.executable, "-c", code.replace("{words}", str(words))], capture_output=True, text=True
        )
        assert done.returncode == status
        assert done.stdout.endswith("set()\n")
    assert "Did you mean 'search'?" in done.stderr


@pytest.mark.parametrize("name", ["typer", "torch"])
def test_ctrl_c_before_a_command_begins_ends_it_without_a_word(name: str) -> None:
    code = f"""
import os, signal, sys
from importlib.abc import MetaPathFinder
class Interrupting(MetaPathFinder):
    def find_spec(self, name, path, target=None):
        if name == {name!r}:
            os.kill(os.getpid(), signal.SIGINT)
sys.meta_path.insert(0, Interrupting())
signal.signal(signal.SIGINT, signal.default_int_handler)
from normsearch.__main__ import main
sys.argv = ["normsearch", "sites", "x.pth"]
main()
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert (done.returncode, done.stdout, done.stderr) == (130, "", "")


def test_help_names_every_command() -> None:
    text = cli("--help").stdout
    commands = ("methods", "architectures", "sites", "plan", "convert", "compare", "profile")
    for command in (*commands, "sensitivity", "calibrate", "report", "search", "worker"):
        assert command in text
        assert "--json" in cli(command, "--help").stdout


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


# Tables and words


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


def test_entries_are_asked_for_with_the_option(weights: dict[str, torch.Tensor]) -> None:
    torch.save({"params_ema": weights}, "esrgan.pth")
    assert "give --entry 'params_ema'" in cli("sites", "esrgan.pth", *MODEL, code=1).stderr
    cli("sites", "esrgan.pth", *MODEL, "--entry", "params_ema")
    torch.save({"state_dict": weights, "model_ema": weights}, "both.pth")
    assert "--entry 'model_ema' takes it instead" in cli("sites", "both.pth", *MODEL).stderr


def test_two_conversions_share_a_folder(checkpoint: str, folder: Path) -> None:
    for method, name in (("group", "a"), ("batch_renorm", "b-1"), ("rms", "2")):
        cli("convert", checkpoint, *MODEL, "--to", method, "-o", f"{name}.safetensors")
    assert {path.name for path in folder.glob("*.py")} == {
        "a_model.py",
        "b_1_model.py",
        "b_1_layers.py",
        "_2_model.py",
        "_2_layers.py",
    }
    torch.save(torch.randn(2, 3, 64, 64), "x.pt")
    code = (
        "import sys; sys.modules['normsearch'] = None\n"
        "import torch, a_model, b_1_model, _2_model\n"
        "torch.save([m.load()(torch.load('x.pt')) for m in (a_model, b_1_model, _2_model)], 'y.pt')"
    )
    subprocess.run([sys.executable, "-c", code], check=True)
    for found, name in zip(torch.load("y.pt"), ("a", "b-1", "2"), strict=True):
        torch.testing.assert_close(found, normsearch.load(f"{name}.safetensors").model(torch.load("x.pt")))


# Inputs from folders, sensitivity, calibrate, report


@pytest.fixture
def pictures(folder: Path) -> str:
    (folder / "pictures").mkdir()
    for number in range(8):
        pixels = np.random.default_rng(number).integers(0, 256, (40, 48, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(folder / "pictures" / f"{number}.png")
    return "pictures"


def test_commands_take_a_folder_of_images(checkpoint: str, pictures: str) -> None:
    images = ["--inputs", pictures, "--image-size", "32"]
    result = cli("sites", checkpoint, *MODEL, *images, "--batch-size", "3", "--json")
    assert json.loads(result.stdout)[0]["input_shapes"][0][0] == 3
    assert "note: 8 of 8 images in pictures, 32 pixels square" in result.stderr
    made = output(
        "convert", checkpoint, *MODEL, *images, "--to", "group", "-o", "o.safetensors", "--report", "r.json"
    )
    report = output("compare", checkpoint, "o.safetensors", *MODEL, *images, "--batch-size", "4")
    assert report["drift"] == pytest.approx(made["report"]["drift"])
    x = torch.stack([read_image(path, Preparation(32)) for path in find_images(Path(pictures))])
    models = [normsearch.load("x.pth", RESNET).model, normsearch.load("o.safetensors").model]
    expected = normsearch.compare(*models, [x]).drift.relative_l2
    assert report["drift"]["relative_l2"] == pytest.approx(expected, rel=1e-4)


def test_arrays_of_another_type_are_cast_with_a_note(checkpoint: str, folder: Path) -> None:
    np.savez(folder / "x.npz", np.random.default_rng(0).standard_normal((2, 3, 32, 32)))
    result = cli("sites", checkpoint, *MODEL, "--inputs", "x.npz")
    assert "is float64 and was cast to the network's float32" in result.stderr
    np.savez(folder / "bytes.npz", np.zeros((2, 3, 32, 32), np.uint8))
    assert "scaled as in training" in cli("sites", checkpoint, *MODEL, "--inputs", "bytes.npz", code=1).stderr


def test_sensitivity(checkpoint: str, pictures: str, folder: Path) -> None:
    words = [
        "sensitivity",
        checkpoint,
        *MODEL,
        "--inputs",
        pictures,
        "--image-size",
        "32",
        "--batch-size",
        "4",
    ]
    few = [*words, "--to", "group,instance", "--to", "identity", "--site", "*bn1"]
    result = cli(*few, "-o", "s.json", "--threshold", "0.1")
    found = normsearch.Sensitivity.from_json((folder / "s.json").read_text())
    assert found.methods == ("group", "instance", "identity")
    assert all(site.endswith("bn1") for site in found.sites)
    model = normsearch.load("x.pth", RESNET).model
    x = [read_image(path, Preparation(32)) for path in find_images(Path(pictures))]
    batches = [torch.stack(x[:4]), torch.stack(x[4:])]
    expected = normsearch.sensitivity(model, ["group"], batches, sites=["bn1"])
    assert found.drift["bn1"]["group"] == pytest.approx(expected.drift["bn1"]["group"], rel=1e-3)
    vetoes = found.vetoes(0.1)
    assert (
        f"{sum(map(len, vetoes.values()))} vetoes at {len(vetoes)} of {len(found.sites)} sites"
        in result.stdout
    )
    assert json.loads(cli(*few, "--json").stdout)["methods"] == ["group", "instance", "identity"]
    noise = cli(
        "sensitivity", checkpoint, *MODEL, "--input-shape", "3x32x32", "--to", "frozen", "--batch-size", "2"
    )
    assert "note: inputs are random numbers" in noise.stderr
    assert "no veto" in noise.stdout


def test_report(checkpoint: str, pictures: str, folder: Path) -> None:
    images = ["--inputs", pictures, "--image-size", "32", "--batch-size", "4"]
    cli("convert", checkpoint, *MODEL, "--to", "switchable", "-o", "o.safetensors")
    cli("sensitivity", checkpoint, *MODEL, *images, "--to", "switchable", "-o", "s.json", "--site", "bn1")
    common = ["report", checkpoint, "o.safetensors", *MODEL, *images]
    result = cli(*common, "--sensitivity", "s.json", "--logits", "-o", "r.html", "--title", "<mine>")
    assert result.stdout == "wrote r.html, r.json\n"
    made = reporting.Document.from_json((folder / "r.json").read_text())
    assert made.title == "<mine>"
    kinds = [section.kind for section in made.sections]
    assert kinds == ["summary", "layers", "sensitivity", "gates", "cost", "dependence", "notes"]
    x = torch.stack([read_image(path, Preparation(32)) for path in find_images(Path(pictures))])
    models = [normsearch.load("x.pth", RESNET).model, normsearch.load("o.safetensors").model]
    expected = normsearch.compare(*models, [x], logits=True).drift
    summary = made.section(reporting.Summary)
    assert summary is not None
    assert summary.converted is not None
    assert summary.converted.relative_l2 == pytest.approx(expected.relative_l2, rel=1e-4)
    # Nothing is replaced; the JSON gives the same page again.
    assert "r.html exists" in cli(*common, "-o", "r.json", code=1).stderr
    before = (folder / "r.html").read_text()
    cli("report", "r.json", "-o", "again.html")
    assert (folder / "again.html").read_text() == before
    assert json.loads(cli("report", "r.json", "--json").stdout) == json.loads((folder / "r.json").read_text())
    (folder / "bad.json").write_text("{}")
    assert "not a report" in cli("report", "bad.json", "-o", "b.html", code=1).stderr
    # Without inputs: what needs no forward pass.
    short = json.loads(cli("report", checkpoint, "o.safetensors", *MODEL, "--json").stdout)
    assert [section["kind"] for section in short["sections"]] == ["summary", "layers", "gates"]


def test_report_refuses_checkpoints_that_do_not_belong_together(checkpoint: str) -> None:
    cli("convert", checkpoint, *MODEL, "--to", "group", "-o", "o.safetensors", "--no-script")
    cli("convert", checkpoint, *MODEL, "--to", "rms", "-o", "p.safetensors", "--no-script")
    for words, message in (
        (["o.safetensors", checkpoint], "give the original first"),
        ([checkpoint, "o.safetensors", "--calibrated", "p.safetensors"], "has another plan"),
    ):
        assert message in cli("report", *words, *MODEL, "-o", "r.html", code=1).stderr
    other = ["-a", NAME, "--arguments", "num_classes=4"]
    torch.save(normsearch.build(Architecture(NAME, {"num_classes": 4})).state_dict(), "y.pth")
    assert "does not fit" in cli("report", "y.pth", "o.safetensors", *other, "-o", "r.html", code=1).stderr


def test_calibrate(checkpoint: str, pictures: str, folder: Path) -> None:
    images = ["--inputs", pictures, "--image-size", "32", "--batch-size", "2"]
    cli("convert", checkpoint, *MODEL, "--to", "group", "-o", "o.safetensors")
    common = ["calibrate", checkpoint, "o.safetensors", *MODEL, *images, "--budget", "6"]
    result = cli(*common, "-o", "c.safetensors", "--report", "c.html")
    assert "held-out error" in result.stdout
    assert result.stdout.endswith("wrote c.safetensors, c_model.py, c.html, c.json\n")
    again = output(*common, "-o", "d.safetensors", "--no-script")
    assert again["written"] == ["d.safetensors"]
    one, two = load_file("c.safetensors"), load_file("d.safetensors")
    assert one.keys() == two.keys()
    assert all(torch.equal(one[key], two[key]) for key in one)
    original, converted = normsearch.load("x.pth", RESNET).model, normsearch.load("o.safetensors").model
    calibrated = normsearch.load("c.safetensors")
    assert calibrated.plan == normsearch.load("o.safetensors").plan
    x = torch.stack([read_image(path, Preparation(32)) for path in find_images(Path(pictures))])
    drifts = [normsearch.compare(original, m, [x]).drift.relative_l2 for m in (converted, calibrated.model)]
    assert drifts[1] < drifts[0]
    made = reporting.Document.from_json((folder / "c.json").read_text())
    done, summary = made.section(reporting.CalibrationPart), made.section(reporting.Summary)
    assert done is not None
    assert summary is not None
    assert summary.converted is not None
    assert summary.calibrated is not None
    found = [summary.converted.relative_l2, summary.calibrated.relative_l2]
    assert found == pytest.approx(drifts, rel=1e-4)
    assert done.after == pytest.approx(again["calibration"]["error"]["after"])
    torch.save(x, "x.pt")
    code = (
        "import sys; sys.modules['normsearch'] = None\n"
        "import torch; from c_model import load; torch.save(load()(torch.load('x.pt')), 'y.pt')"
    )
    subprocess.run([sys.executable, "-c", code], check=True)
    torch.testing.assert_close(torch.load("y.pt"), calibrated.model(x))
    assert "exists" in cli(*common, "-o", "c.safetensors", code=1).stderr


SLOW = """
import time
from pathlib import Path
from torch import nn

class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.conv = nn.Conv1d(2, 16, 3)
        self.norm = nn.BatchNorm1d(16)
        self.calls = 0

    def forward(self, x):
        self.calls += 1
        if self.calls > 3 and Path("go").exists():
            Path("started").touch()
            time.sleep(60)
        return self.norm(self.conv(x))
"""


def test_interrupted_calibration_leaves_nothing(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (folder / "slow_net.py").write_text(SLOW)
    sys.modules.pop("slow_net", None)
    monkeypatch.syspath_prepend(folder)
    model = ["-a", "slow_net:Net"]
    network = normsearch.build(Architecture("slow_net:Net"), allow_factories=True)
    torch.save(network.state_dict(), "x.pth")
    np.savez(folder / "x.npz", np.random.default_rng(0).standard_normal((8, 2, 9)).astype(np.float32))
    cli("convert", "x.pth", *model, "--to", "group", "-o", "o.safetensors", "--no-script")
    (folder / "go").touch()
    before = set(os.listdir(folder))
    words = ["calibrate", "x.pth", "o.safetensors", *model, "--inputs", "x.npz", "--batch-size", "2", "-o"]
    returncode, stderr = interrupted([*words, "c.safetensors", "--report", "c.html"], folder / "started")
    assert returncode == 130
    assert stderr.strip().splitlines()[-1] == "interrupted; nothing half-written is left"
    assert set(os.listdir(folder)) - {"__pycache__"} == (before | {"started"}) - {"__pycache__"}


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
