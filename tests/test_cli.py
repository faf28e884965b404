"""The command line as a user sees it: files, tables, JSON, exit codes, one message on stderr."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Sequence
from importlib import import_module
from pathlib import Path

import numpy as np
import pytest
import torch
from commanding import MODEL, NAME, RESNET, cli, interrupted, output, process, weights
from safetensors.torch import load_file
from torch import nn

import normsearch
from normsearch import METHODS, Architecture
from normsearch.cli import COMMANDS

pytestmark = pytest.mark.usefixtures("folder")


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
    folder: Path,
) -> None:
    state = {
        name: value.bfloat16() if value.is_floating_point() else value for name, value in weights().items()
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


def test_entries_are_asked_for_with_the_option() -> None:
    torch.save({"params_ema": weights()}, "esrgan.pth")
    assert "give --entry 'params_ema'" in cli("sites", "esrgan.pth", *MODEL, code=1).stderr
    cli("sites", "esrgan.pth", *MODEL, "--entry", "params_ema")
    torch.save({"state_dict": weights(), "model_ema": weights()}, "both.pth")
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
