"""Converted networks come back equal: from their checkpoint, and from model.py without normsearch."""

from __future__ import annotations

import ast
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

import normsearch
from normsearch import METHODS, Architecture, CheckpointError, Plan
from normsearch.layer_sources import standalone
from normsearch.rebuilding import LAYERS, SCRIPT, literal, scripts

SPELLINGS = (
    *METHODS,
    "group(groups=2)",
    "group(weight_standardization=true)",
    "layer(axes=channel)",
    "layer(whiten=true)",
    "weight(mean_only=true)",
    "spectral(gain=fixed)",
    "switchable(bn_logit=40)",
    "batch_renorm(r_max=2, d_max=1)",
    "ghost(size=4)",
    "sparse_switchable(steps=9)",
    "frozen(trainable=true)",
)


@dataclass(frozen=True)
class Case:
    name: str
    shape: tuple[int, ...]
    arguments: dict[str, Any] = field(default_factory=dict)


CASES = (
    Case("torchvision/resnet18", (3, 64, 64), {"num_classes": 7}),
    Case("torchvision/shufflenet_v2_x0_5", (3, 64, 64)),
    Case("torchvision/lraspp_mobilenet_v3_large", (3, 64, 64), {"num_classes": 3}),
    Case("torchvision/mc3_18", (3, 4, 32, 32), {"num_classes": 3}),
    # Buffers that no state dict holds.
    Case("timm/resnetblur18", (3, 64, 64), {"num_classes": 5, "in_chans": 3}),
    # Normalization and activation in one layer.
    Case("timm/mobilenetv3_small_050", (1, 64, 64), {"in_chans": 1}),
    Case("timm/tinynet_e", (3, 64, 64)),
    # BatchNorm1d on tokens.
    Case("timm/levit_128s", (3, 224, 224)),
    Case("timm/regnetx_002", (3, 64, 64)),
    Case("segmentation_models_pytorch/Unet", (3, 64, 64), {"encoder_name": "mobilenet_v2", "classes": 2}),
)

_CHILD = """
import importlib, sys
from pathlib import Path
sys.modules["normsearch"] = None
import torch
torch.set_num_threads(1)
folder = Path(sys.argv[1])
inputs = torch.load(folder / "inputs.pt")
for place in sorted(path for path in folder.iterdir() if path.is_dir()):
    for name in ("model", "normsearch_layers"):
        sys.modules.pop(name, None)
    sys.path.insert(0, str(place))
    importlib.invalidate_caches()
    model = importlib.import_module("model").load()
    sys.path.pop(0)
    with torch.no_grad():
        torch.save(model(inputs), place / "outputs.pt")
assert not [name for name in sys.modules if name.startswith("normsearch.")]
"""


def trained(architecture: Architecture) -> nn.Module:
    """A network whose statistics, γ and β look trained, some γ zero or negative."""
    model = normsearch.build(architecture).eval()
    generator = torch.Generator().manual_seed(1)
    for module in model.modules():
        if isinstance(getattr(module, "running_var", None), Tensor):
            count = module.running_mean.shape[0]
            module.running_mean.copy_(torch.randn(count, generator=generator) * 0.3)
            module.running_var.copy_(torch.rand(count, generator=generator) + 0.5)
            if module.weight is not None:
                module.weight.data.copy_(torch.randn(count, generator=generator) * 0.3 + 1)
                module.weight.data[0] = 0
                module.bias.data.copy_(torch.randn(count, generator=generator) * 0.3)
    return model


def run(model: nn.Module, inputs: Tensor) -> list[Tensor]:
    with torch.no_grad():
        return [leaf for leaf in tree_leaves(model(inputs)) if isinstance(leaf, Tensor)]


def write(files: dict[str, str], folder: Path) -> None:
    for name, text in files.items():
        (folder / name).write_text(text)


def outside(folder: Path) -> None:
    """Run every model.py under ``folder`` in a process that cannot import normsearch."""
    done = subprocess.run(
        [sys.executable, "-W", "error::UserWarning", "-c", _CHILD, str(folder)],
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    """The same sums in the same order here and in the child process."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


_QUICK = (CASES[1], CASES[2], CASES[4], CASES[5], CASES[7], CASES[9])


@pytest.mark.parametrize("number", range(len(_QUICK)), ids=[case.name for case in _QUICK])
def test_round_trip(number: int, tmp_path: Path) -> None:
    # Each network with another part of the methods; the slow test has all of them on all.
    check_round_trip(_QUICK[number], SPELLINGS[number :: len(_QUICK)], tmp_path)


@pytest.mark.slow
@pytest.mark.parametrize("case", CASES, ids=[case.name for case in CASES])
def test_round_trip_of_every_method(case: Case, tmp_path: Path) -> None:
    check_round_trip(case, SPELLINGS, tmp_path)


def check_round_trip(case: Case, spellings: tuple[str, ...], tmp_path: Path) -> None:
    torch.manual_seed(0)
    architecture = Architecture(case.name, case.arguments)
    original = trained(architecture)
    inputs = torch.randn(2, *case.shape)
    torch.save(inputs, tmp_path / "inputs.pt")
    expected = {}
    for number, spelling in enumerate(spellings):
        plan = normsearch.plan(original, [spelling, "batch"], inputs=inputs)
        assert plan.changes or spelling == "batch"
        converted = normsearch.convert(original, plan)
        place = tmp_path / f"{number:02}"
        place.mkdir()
        path = place / "weights.safetensors"
        normsearch.save(converted, path, architecture=architecture, plan=plan)
        loaded = normsearch.load(path)
        assert (loaded.plan, loaded.architecture, loaded.notes) == (plan, architecture, ())
        expected[place] = run(converted, inputs)
        assert all(map(torch.equal, run(loaded.model, inputs), expected[place])), spelling
        assert {n: p.requires_grad for n, p in loaded.model.named_parameters()} == {
            n: p.requires_grad for n, p in converted.named_parameters()
        }
        write(scripts(converted, architecture, plan, path.name), place)
    outside(tmp_path)
    for place, outputs in expected.items():
        found = [leaf for leaf in tree_leaves(torch.load(place / "outputs.pt")) if isinstance(leaf, Tensor)]
        assert all(map(torch.equal, found, outputs)), spellings[int(place.name)]


def _converted(to: Any = "group", name: str = "timm/resnet18") -> tuple[nn.Module, Architecture, Plan]:
    architecture = Architecture(name, {"num_classes": 3})
    model = trained(architecture)
    plan = normsearch.plan(model, to)
    return normsearch.convert(model, plan), architecture, plan


def test_script_reads_like_written_by_hand() -> None:
    model, architecture, plan = _converted({"bn1": "group", "*": "batch"}, "torchvision/resnet18")
    assert scripts(model, architecture, plan, "out.safetensors") == {
        SCRIPT: '''"""torchvision/resnet18 with 1 layer replaced by normsearch.

Needs torch, torchvision, safetensors; not normsearch.

    from model import load

    model = load()
"""

from pathlib import Path

import torchvision.models
from safetensors.torch import load_file
from torch import nn


def build() -> nn.Module:
    """Return the network with fresh weights."""
    model = torchvision.models.get_model('resnet18', num_classes=3, weights=None)
    model.set_submodule('bn1', nn.GroupNorm(4, 64))
    return model


def load() -> nn.Module:
    """Return the network with its weights, in eval mode."""
    model = build()
    state = load_file(Path(__file__).with_name('out.safetensors'))
    model.load_state_dict(state)
    return model.eval()


if __name__ == "__main__":
    print(load())
'''
    }


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16, None])
def test_other_dtypes(dtype: torch.dtype | None, tmp_path: Path) -> None:
    architecture = Architecture("timm/resnetblur18", {"num_classes": 3})
    original = trained(architecture)
    if dtype is None:
        # Mixed: half-precision head on a single-precision body.
        original.fc.to(torch.float64)
        original.global_pool.register_forward_hook(lambda module, args, output: output.double())
    else:
        original.to(dtype)
    plan = normsearch.plan(original, "rms")
    converted = normsearch.convert(original, plan)
    place = tmp_path / "0"
    place.mkdir()
    normsearch.save(converted, place / "w.safetensors", architecture=architecture, plan=plan)
    loaded = normsearch.load(place / "w.safetensors")
    assert {n: v.dtype for n, v in loaded.model.state_dict().items()} == {
        n: v.dtype for n, v in converted.state_dict().items()
    }
    if dtype is None:
        write(scripts(converted, architecture, plan, "w.safetensors"), place)
        assert "assign=True" in (place / SCRIPT).read_text()
        return
    inputs = torch.randn(2, 3, 64, 64, dtype=dtype)
    torch.save(inputs, tmp_path / "inputs.pt")
    write(scripts(converted, architecture, plan, "w.safetensors"), place)
    outside(tmp_path)
    assert torch.equal(run(loaded.model, inputs)[0], run(converted, inputs)[0])
    assert torch.equal(torch.load(place / "outputs.pt"), run(converted, inputs)[0])


_MODULE = """
import torch
from torch import nn

class Shared(nn.Module):
    '''One BatchNorm under two names, tied weights, a layer without affine.'''

    def __init__(self, width=8, keep_list=False):
        super().__init__()
        self.first = nn.Linear(width, width)
        self.second = nn.Linear(width, width, bias=False)
        self.second.weight = self.first.weight
        self.norm = nn.BatchNorm1d(width)
        self.again = self.norm
        self.plain = nn.BatchNorm1d(width, affine=False)
        self.register_buffer("scale", torch.full((width,), 2.0), persistent=False)
        if keep_list:
            self.layers = [self.norm]

    def forward(self, x):
        return self.plain(self.again(self.second(self.norm(self.first(x)))) * self.scale)
"""


@pytest.fixture
def shared(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    (tmp_path / "my_networks.py").write_text(_MODULE)
    monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.delitem(sys.modules, "my_networks", raising=False)
    return "my_networks:Shared"


@pytest.mark.parametrize("spelling", ["group(groups=2)", "switchable", "frozen", "weight", "batch_instance"])
def test_shared_layers_tied_weights_and_factories(shared: str, spelling: str, tmp_path: Path) -> None:
    architecture = Architecture(shared, {"width": 16})
    model = normsearch.build(architecture, allow_factories=True).eval()
    for module in (model.norm, model.plain):
        module.running_mean.normal_()
        module.running_var.uniform_(0.5, 2)
    plan = normsearch.plan(model, spelling)
    converted = normsearch.convert(model, plan)
    place = tmp_path / "out"
    place.mkdir()
    normsearch.save(converted, place / "w.safetensors", architecture=architecture, plan=plan)
    with pytest.raises(CheckpointError, match="code that a file names is never run"):
        normsearch.load(place / "w.safetensors")
    with pytest.raises(CheckpointError, match="code that a file names is never run"):
        normsearch.load(place / "w.safetensors", allow_factories=True)
    with pytest.raises(normsearch.ArchitectureError, match="allow_factories=True"):
        normsearch.load(place / "w.safetensors", architecture)
    loaded = normsearch.load(place / "w.safetensors", architecture, allow_factories=True).model
    assert loaded.norm is loaded.again
    inputs = torch.randn(4, 16)
    assert torch.equal(run(loaded, inputs)[0], run(converted, inputs)[0])
    write(scripts(converted, architecture, plan, "w.safetensors"), place)
    (place / "my_networks.py").write_text(_MODULE)
    torch.save(inputs, tmp_path / "inputs.pt")
    outside(tmp_path)
    assert torch.equal(torch.load(place / "outputs.pt"), run(converted, inputs)[0])


def test_layer_kept_in_a_plain_list_is_an_error(shared: str) -> None:
    architecture = Architecture(shared, {"keep_list": True})
    model = normsearch.build(architecture, allow_factories=True)
    plan = normsearch.plan(model, "group(groups=2)")
    with pytest.raises(CheckpointError, match="attribute layers too"):
        scripts(normsearch.convert(model, plan), architecture, plan, "w.safetensors")


#: Text that would be code if it were pasted.
INJECTIONS = (
    "x'); import os; os.system('touch canary'); ('",
    'x"); import os; os.system("touch canary"); ("',
    "\n\nimport os\nos.system('touch canary')\n",
    '"""\nimport os; os.system("touch canary")\n"""',
    "\\",
    "'",
    '"',
    "{}",
    "%s",
    "\u2028import os",
    "\x00",
    "\ud800",
    "a\rb",
    "#",
    "'''",
    "${x}",
    "`id`",
)


@pytest.mark.parametrize("text", INJECTIONS)
def test_injected_text_stays_text(text: str, tmp_path: Path) -> None:
    assert ast.literal_eval(literal(text)) == text
    assert literal(text).isascii()
    assert len(literal(text).splitlines()) == 1
    model, architecture, plan = _converted("rms")
    files = scripts(model, architecture, plan, f"{text}.safetensors")
    tree = ast.parse(files[SCRIPT])
    # The same statements as with a harmless name, one text apart.
    harmless = ast.parse(scripts(model, architecture, plan, "w.safetensors")[SCRIPT])
    assert ast.dump(tree).replace(repr(f"{text}.safetensors"), "'w.safetensors'") == ast.dump(harmless)


@pytest.mark.parametrize("text", INJECTIONS)
def test_injected_names_are_no_architecture(text: str) -> None:
    for name in (text, f"timm/{text}", f"torchvision/{text}", f"os:{text}", f"{text}:system"):
        with pytest.raises(normsearch.ArchitectureError):
            normsearch.build(Architecture(name))
    with pytest.raises(normsearch.ArchitectureError):
        Architecture("timm/resnet18", {text: 1})


@pytest.mark.parametrize("text", INJECTIONS)
def test_injected_arguments_of_factories_stay_text(text: str, shared: str) -> None:
    architecture = Architecture(shared, {"width": 8, "keep_list": text})
    model = normsearch.build(Architecture(shared), allow_factories=True)
    files = scripts(model, architecture, None, "w.safetensors")
    (call,) = [
        node
        for node in ast.walk(ast.parse(files[SCRIPT]))
        if isinstance(node, ast.Call) and ast.unparse(node.func) == "my_networks.Shared"
    ]
    assert [ast.literal_eval(keyword.value) for keyword in call.keywords] == [8, text]


@pytest.mark.parametrize(
    "value", [float("nan"), float("inf"), object(), b"x", {1}, 1j, type("S", (str,), {})("x")]
)
def test_values_without_a_literal_are_refused(value: object) -> None:
    with pytest.raises(CheckpointError, match="no literal"):
        literal(value)


def test_literals() -> None:
    values = (None, True, -3, 1e-5, "a", (), (1,), (1, (2.5, "b")))
    for value in values:
        assert ast.literal_eval(literal(value)) == value


def test_layer_that_forgets_its_arguments_is_an_error() -> None:
    class Forgetful(nn.Module):
        def __init__(self, hidden: int) -> None:
            super().__init__()

    model, architecture, plan = _converted({"bn1": "group", "*": "batch"}, "torchvision/resnet18")
    model.bn1 = Forgetful(3)
    with pytest.raises(CheckpointError, match="bn1: Forgetful does not keep its argument hidden"):
        scripts(model, architecture, plan, "w.safetensors")


def test_script_names_a_layer_before_a_site_only_where_it_was_rewritten() -> None:
    # The stem's ReLU is its own; those of the blocks are shared, and stay.
    model, architecture, plan = _converted(
        {"bn1": "evonorm_s0", "layer1.0.*": "evonorm_s0"}, "torchvision/resnet18"
    )
    build = scripts(model, architecture, plan, "w.safetensors")[SCRIPT].partition("return model")[0]
    assert build.count("register_parameter('bias'") == build.count("nn.Identity()") == 1
    assert "model.set_submodule('relu', nn.Identity())" in build
    assert build.count("EvoNormS0(64, groups=4)") == 3


def test_layer_changed_afterwards_is_an_error() -> None:
    model, architecture, plan = _converted({"bn1": "rms", "*": "batch"}, "torchvision/resnet18")
    model.bn1.extra = "set by hand"
    with pytest.raises(CheckpointError, match="extra='set by hand'"):
        scripts(model, architecture, plan, "w.safetensors")


def test_layer_file_needs_torch_alone() -> None:
    from normsearch import methods

    classes = [
        methods.BatchInstanceNorm,
        methods.BatchRenorm,
        methods.FrozenBatchNorm,
        methods.ChannelLayerNorm,
        methods.SampleRMSNorm,
        methods.SwitchableNorm,
        methods.FilterResponseNorm,
        methods.EvoNormS0,
        methods.GhostBatchNorm,
        methods.InstanceBatchNorm,
        methods.SparseSwitchableNorm,
    ]
    text = standalone(classes)
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, ast.Import | ast.ImportFrom):
            names = (
                [alias.name for alias in node.names] if isinstance(node, ast.Import) else [node.module or ""]
            )
            assert {name.split(".")[0] for name in names} <= {*sys.stdlib_module_names, "torch"}
    assert "TrainedNorm" not in text
    scope: dict[str, Any] = {"__name__": LAYERS.removesuffix(".py")}
    exec(compile(text, LAYERS, "exec"), scope)
    x = torch.randn(3, 8, 5, 5)
    for cls in classes:
        ours, copied = cls(8), scope[cls.__name__](8)
        copied.load_state_dict(ours.state_dict())
        assert torch.equal(ours(x), copied(x)), cls.__name__
    # Compiled, on a map that takes operators: the copy defines its own.
    large = torch.randn(2, 8, 48, 48).to(memory_format=torch.channels_last)
    for name in ("SwitchableNorm", "FilterResponseNorm"):
        layer = scope[name](8)
        torch.compiler.reset()
        compiled = torch.compile(layer, fullgraph=True, backend="aot_eager")
        assert torch.allclose(compiled(large), layer(large), rtol=1e-4, atol=1e-5), name
