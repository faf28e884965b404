"""Networks by name: exact names, bounded arguments, no download, no local file, no code unasked."""

from __future__ import annotations

import socket
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from attacks import ARGUMENTS, NAMES
from torch import nn

from normsearch import Architecture, ArchitectureError, build
from normsearch.architectures import construction
from normsearch.registries import LIBRARIES, names


@pytest.fixture
def offline(monkeypatch: pytest.MonkeyPatch) -> None:
    def refused(*args: Any, **kwargs: Any) -> None:
        raise AssertionError(f"the network was asked for {args}")

    monkeypatch.setattr(socket.socket, "connect", refused)
    monkeypatch.setattr(socket, "getaddrinfo", refused)
    monkeypatch.setattr(torch.hub, "load_state_dict_from_url", refused)


@pytest.mark.usefixtures("offline")
@pytest.mark.parametrize(
    ("name", "arguments", "parameters"),
    [
        ("torchvision/resnet18", {}, 11_689_512),
        ("torchvision/resnet18", {"num_classes": 10}, 11_181_642),
        ("torchvision/googlenet", {"aux_logits": False}, 6_624_904),
        ("torchvision/ssdlite320_mobilenet_v3_large", {"num_classes": 3}, 2_220_380),
        ("torchvision/lraspp_mobilenet_v3_large", {}, 3_221_538),
        ("timm/resnet18", {"in_chans": 1, "num_classes": 2}, 11_171_266),
        ("timm/mobilenetv3_small_050", {"num_classes": 0, "drop_rate": 0.5}, 568_224),
        ("segmentation_models_pytorch/Unet", {"encoder_name": "resnet18", "classes": 2}, 14_328_354),
        ("segmentation_models_pytorch/FPN", {"encoder_name": "tu-resnet18"}, 13_047_233),
    ],
)
def test_registered_networks(name: str, arguments: dict[str, Any], parameters: int) -> None:
    model = build(Architecture(name, arguments))
    assert sum(parameter.numel() for parameter in model.parameters()) == parameters


def test_registries_are_whole() -> None:
    assert {
        library: len(names(library)) > least for library, least in zip(LIBRARIES, (90, 1000, 10), strict=True)
    } == {
        "torchvision": True,
        "timm": True,
        "segmentation_models_pytorch": True,
    }
    assert not [name for name in names("torchvision") if name.startswith("quantized")]


@pytest.mark.parametrize("library", LIBRARIES)
def test_pretrained_sources_are_off(library: str) -> None:
    off = {"weights": None, "weights_backbone": None, "pretrained": False, "encoder_weights": None}
    for name in names(library):
        given = construction(Architecture(f"{library}/{name}")).arguments
        assert given
        assert {key: off[key] for key in given} == given


@pytest.mark.usefixtures("offline")
@pytest.mark.parametrize("name", NAMES)
def test_dangerous_names_are_refused(name: str) -> None:
    with pytest.raises(ArchitectureError) as caught:
        build(Architecture(name))
    assert len(str(caught.value)) < 600


@pytest.mark.parametrize("arguments", ARGUMENTS, ids=lambda arguments: str(arguments)[:30])
@pytest.mark.parametrize(
    "name", ["torchvision/resnet18", "timm/resnet18", "segmentation_models_pytorch/Unet"]
)
def test_dangerous_arguments_are_refused(name: str, arguments: dict[str, Any]) -> None:
    with pytest.raises(ArchitectureError) as caught:
        build(Architecture(name, arguments))
    assert len(str(caught.value)) < 600


@pytest.mark.parametrize("library", LIBRARIES)
def test_bounds_of_every_argument(library: str) -> None:
    name = names(library)[0]
    for key, allowed in LIBRARIES[library].arguments.items():
        for value in (-1, 10**6, 0.5 + 10**6, "no such word", "local-dir:/tmp"):
            assert not allowed.accepts(value)
            with pytest.raises(ArchitectureError, match=key):
                construction(Architecture(f"{library}/{name}", {key: value}))


def test_message_says_what_is_near() -> None:
    with pytest.raises(ArchitectureError, match=r"no architecture 'resnet51'; did you mean .*resnet50"):
        build(Architecture("torchvision/resnet51"))
    with pytest.raises(ArchitectureError, match="allowed are num_classes, aux_logits"):
        build(Architecture("torchvision/resnet18", {"classes": 3}))
    with pytest.raises(ArchitectureError, match="num_classes must be a whole number from 1 to 100000"):
        build(Architecture("torchvision/resnet18", {"num_classes": 0}))


def test_argument_that_the_network_does_not_take() -> None:
    with pytest.raises(ArchitectureError, match=r"resnet18\(img_size=64\) cannot be built: TypeError"):
        build(Architecture("timm/resnet18", {"img_size": 64}))


def test_factories_only_where_the_caller_says_so(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "factory_module.py").write_text(
        "from pathlib import Path\nfrom torch import nn\nPath(__file__).with_name('ran').touch()\n"
        "class Inner:\n    @staticmethod\n    def network(width): return nn.Linear(width, 1)\n"
        "def number(): return 3\ndef broken(): raise RuntimeError('no')\n"
    )
    monkeypatch.syspath_prepend(str(tmp_path))
    architecture = Architecture("factory_module:Inner.network", {"width": 5})
    assert architecture.is_factory
    with pytest.raises(ArchitectureError, match="allow_factories=True"):
        build(architecture)
    assert not (tmp_path / "ran").exists()
    model = build(architecture, allow_factories=True)
    assert isinstance(model, nn.Linear)
    assert model.in_features == 5
    for name, message in (
        ("number", "returned a int, not a torch.nn.Module"),
        ("broken", "cannot be built: RuntimeError: no"),
        ("absent", "has no attribute 'absent'"),
    ):
        with pytest.raises(ArchitectureError, match=message):
            build(Architecture(f"factory_module:{name}"), allow_factories=True)
    with pytest.raises(ArchitectureError, match="No module named 'no_such_module'"):
        build(Architecture("no_such_module:f"), allow_factories=True)


def test_arguments_are_copied_and_shown() -> None:
    given = {"num_classes": 3}
    architecture = Architecture("timm/resnet18", given)
    given["num_classes"] = 4
    assert str(architecture) == "timm/resnet18(num_classes=3)"
    assert architecture == Architecture("timm/resnet18", {"num_classes": 3})
    assert len({architecture, Architecture("timm/resnet18", {"num_classes": 3})}) == 1


def test_building_leaves_random_state_alone() -> None:
    torch.manual_seed(0)
    expected = torch.rand(3)
    torch.manual_seed(0)
    build(Architecture("timm/resnet18"))
    assert torch.equal(torch.rand(3), expected)


def test_importing_normsearch_imports_no_registry() -> None:
    code = (
        "import normsearch, sys; normsearch.Architecture('timm/resnet18'); "
        "print([m for m in ('torchvision', 'timm', 'segmentation_models_pytorch', 'pydantic', 'rich', "
        "'typer', "
        "'safetensors') if m in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


def test_converting_a_module_imports_no_symbols() -> None:
    code = (
        "import normsearch, sys; from torch import nn; normsearch.convert(nn.Sequential(nn.Conv2d(3, 8, 3), "
        "nn.BatchNorm2d(8)).eval(), 'group'); "
        "print([m for m in ('sympy', 'optuna', 'onnx') if m in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


def test_library_that_is_not_installed(monkeypatch: pytest.MonkeyPatch) -> None:
    names.cache_clear()
    monkeypatch.setitem(sys.modules, "timm", None)
    with pytest.raises(ArchitectureError, match=r"timm is not installed .*: pip install timm"):
        names("timm")
    names.cache_clear()
