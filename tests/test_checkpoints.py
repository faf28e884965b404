"""save and load: what goes in comes out, what does not fit is said before anything is copied."""

from __future__ import annotations

import json
import os
import threading
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

import normsearch
from normsearch import Architecture, CheckpointError, NormsearchError, PlanError
from normsearch.admission import admit

RESNET = Architecture("timm/resnet10t", {"num_classes": 3})


@pytest.fixture(scope="module")
def model() -> nn.Module:
    torch.manual_seed(0)
    built = normsearch.build(RESNET).eval()
    for module in built.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.running_mean.normal_()
            module.running_var.uniform_(0.5, 2)
    return built


@pytest.fixture(scope="module")
def inputs() -> Tensor:
    return torch.randn(2, 3, 64, 64, generator=torch.Generator().manual_seed(0))


def same(first: nn.Module, second: nn.Module, inputs: Tensor) -> bool:
    with torch.no_grad():
        return torch.equal(first.eval()(inputs), second.eval()(inputs))


def test_plain_network_round_trip(model: nn.Module, inputs: Tensor, tmp_path: Path) -> None:
    path = tmp_path / "x.safetensors"
    normsearch.save(model, path, architecture=RESNET)
    loaded = normsearch.load(path)
    assert (loaded.architecture, loaded.plan, loaded.notes) == (RESNET, None, ())
    assert same(model, loaded.model, inputs)


def test_any_reader_opens_the_file(model: nn.Module, tmp_path: Path) -> None:
    path = tmp_path / "x.safetensors"
    plan = normsearch.plan(model, "group")
    converted = normsearch.convert(model, plan)
    normsearch.save(converted, path, architecture=RESNET, plan=plan)
    assert all(torch.equal(value, converted.state_dict()[name]) for name, value in load_file(path).items())
    with safe_open(path, "pt") as file:
        record = json.loads(file.metadata()["normsearch"])
    assert record["architecture"] == {"name": "timm/resnet10t", "arguments": {"num_classes": 3}}
    assert normsearch.Plan.from_json(record["plan"]) == plan
    assert record["versions"] == {"normsearch": normsearch.__version__, "torch": torch.__version__}


@pytest.mark.parametrize("suffix", [".pth", ".pt", ".ckpt", ".bin", ".pth.tar", "", ".safetensors"])
def test_plain_state_dicts(suffix: str, model: nn.Module, inputs: Tensor, tmp_path: Path) -> None:
    path = tmp_path / f"x{suffix}"
    save_file(model.state_dict(), path) if suffix == ".safetensors" else torch.save(model.state_dict(), path)
    assert same(normsearch.load(path, RESNET).model, model, inputs)
    with pytest.raises(CheckpointError, match="does not say which network it belongs to"):
        normsearch.load(path)


WRAPPED = {
    "module.": ["removed the prefix 'module.' of DataParallel"],
    "_orig_mod.": ["removed the prefix '_orig_mod.' of torch.compile"],
    "model.": ["removed the prefix 'model.' of a wrapper such as Lightning's"],
    "net.": ["removed the prefix 'net.' of a wrapper"],
    "module._orig_mod.": [
        "removed the prefix 'module.' of DataParallel",
        "removed the prefix '_orig_mod.' of torch.compile",
    ],
    "": [],
}


@pytest.mark.parametrize("prefix", WRAPPED)
@pytest.mark.parametrize("entry", [None, "state_dict", "model", "model_ema"])
def test_wrappers_are_removed_and_named(
    prefix: str, entry: str | None, model: nn.Module, inputs: Tensor, tmp_path: Path
) -> None:
    state: Any = {f"{prefix}{name}": value for name, value in model.state_dict().items()}
    torch.save(state if entry is None else {"epoch": 1, entry: state}, tmp_path / "x.pth")
    loaded = normsearch.load(tmp_path / "x.pth", RESNET)
    assert same(loaded.model, model, inputs)
    assert list(loaded.notes) == [
        *([] if entry is None else [f"read from the entry {entry!r}"]),
        *WRAPPED[prefix],
    ]


def test_real_wrappers(model: nn.Module, inputs: Tensor, tmp_path: Path) -> None:
    averaged = torch.optim.swa_utils.AveragedModel(model)
    torch.save(averaged.state_dict(), tmp_path / "x.pth")
    loaded = normsearch.load(tmp_path / "x.pth", RESNET)
    assert same(loaded.model, model, inputs)
    assert loaded.notes == (
        "left out the counter 'n_averaged'",
        "removed the prefix 'module.' of DataParallel",
    )


def test_lightning_losses_are_left_out_and_named(model: nn.Module, inputs: Tensor, tmp_path: Path) -> None:
    state = {f"model.{name}": value for name, value in model.state_dict().items()} | {
        "loss.weight": torch.ones(3)
    }
    torch.save({"state_dict": state, "epoch": 3}, tmp_path / "x.ckpt")
    loaded = normsearch.load(tmp_path / "x.ckpt", RESNET)
    assert same(loaded.model, model, inputs)
    assert "left out what is not the network's: loss.weight" in loaded.notes


@pytest.mark.parametrize("prefix", ["", "module."])
def test_what_profilers_leave_in_layers_is_left_out(
    prefix: str, model: nn.Module, inputs: Tensor, tmp_path: Path
) -> None:
    own = model.state_dict()
    counts = {
        f"{name}total_{kind}": torch.zeros(1) for name in ("", "conv1.", "fc.") for kind in ("ops", "params")
    }
    torch.save({f"{prefix}{name}": value for name, value in (own | counts).items()}, tmp_path / "x.pth")
    loaded = normsearch.load(tmp_path / "x.pth", RESNET)
    assert same(loaded.model, model, inputs)
    assert loaded.notes[0].startswith(
        f"left out what a profiler counted: {prefix}total_ops, {prefix}total_params"
    )


def test_a_network_may_have_such_a_number_of_its_own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "counting_network.py").write_text(
        "import torch\nfrom torch import nn\n"
        "def network():\n"
        "    net = nn.Linear(2, 2)\n    net.register_buffer('total_ops', torch.zeros(1))\n    return net\n"
    )
    monkeypatch.syspath_prepend(str(tmp_path))
    state = {"weight": torch.ones(2, 2), "bias": torch.ones(2), "total_ops": torch.ones(1)}
    torch.save({f"module.{name}": value for name, value in state.items()}, tmp_path / "x.pth")
    loaded = normsearch.load(tmp_path / "x.pth", "counting_network:network", allow_factories=True)
    assert torch.equal(loaded.model.get_buffer("total_ops"), torch.ones(1))


_RENAMING = """
from torch import nn

class Renamed(nn.Linear):
    def _load_from_state_dict(self, state_dict, prefix, *args):
        if prefix + "kernel" in state_dict:
            state_dict[prefix + "weight"] = state_dict.pop(prefix + "kernel")
        super()._load_from_state_dict(state_dict, prefix, *args)
"""


def test_old_names_that_the_network_itself_translates(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "renaming_network.py").write_text(_RENAMING)
    monkeypatch.syspath_prepend(str(tmp_path))
    factory = Architecture("renaming_network:Renamed", {"in_features": 2, "out_features": 3})
    torch.save({"kernel": torch.ones(3, 2), "bias": torch.zeros(3)}, tmp_path / "x.pth")
    loaded = normsearch.load(tmp_path / "x.pth", factory, allow_factories=True).model
    assert torch.equal(loaded.get_parameter("weight"), torch.ones(3, 2))
    torch.save({"kernels": torch.ones(3, 2), "bias": torch.zeros(3)}, tmp_path / "y.pth")
    with pytest.raises(
        CheckpointError, match=r"missing \(weight\); 1 entries are not the network's \(kernels\)"
    ):
        normsearch.load(tmp_path / "y.pth", factory, allow_factories=True)


def test_counters_that_old_versions_did_not_write(model: nn.Module, inputs: Tensor, tmp_path: Path) -> None:
    state = {name: value for name, value in model.state_dict().items() if "num_batches" not in name}
    save_file(state, tmp_path / "x.safetensors")
    assert same(normsearch.load(tmp_path / "x.safetensors", RESNET).model, model, inputs)


def _damaged(state: dict[str, Tensor], how: str) -> dict[str, Tensor]:
    changed = dict(state)
    if how == "missing":
        del changed["fc.weight"]
    if how == "unexpected":
        changed["head.weight"] = torch.ones(1)
    if how == "shape":
        changed["fc.weight"] = torch.ones(4, 512)
    if how == "transposed":
        changed["fc.weight"] = state["fc.weight"].t().contiguous()
    if how == "type":
        changed["fc.weight"] = state["fc.weight"].to(torch.int64)
    return changed


@pytest.mark.parametrize(
    ("how", "message"),
    [
        ("missing", r"1 of \d+ entries are missing \(fc.weight\)"),
        ("unexpected", r"1 entries are not the network's \(head.weight\)"),
        ("shape", r"1 have another shape \(fc.weight: \(4, 512\) in the file, \(3, 512\) in the network\)"),
        ("transposed", r"fc.weight: \(512, 3\) in the file, \(3, 512\) in the network"),
        ("type", r"1 have another type \(fc.weight: int64 in the file, float32 in the network\)"),
    ],
)
def test_what_does_not_fit(how: str, message: str, model: nn.Module, tmp_path: Path) -> None:
    torch.save(_damaged(model.state_dict(), how), tmp_path / "x.pth")
    with pytest.raises(CheckpointError, match=message) as caught:
        normsearch.load(tmp_path / "x.pth", RESNET)
    assert "Give the architecture and arguments that it was trained with" in str(caught.value)


def test_wrong_architecture(model: nn.Module, tmp_path: Path) -> None:
    torch.save(model.state_dict(), tmp_path / "x.pth")
    for name in ("timm/resnet18", "torchvision/resnet50", "timm/vit_base_patch16_224"):
        with pytest.raises(CheckpointError, match=f"does not fit {name}"):
            normsearch.load(tmp_path / "x.pth", name)


def test_buffers_that_no_file_holds_are_right(tmp_path: Path) -> None:
    # Blur kernels are computed when the network is built and are in no state dict.
    blur = Architecture("timm/resnetblur18", {"num_classes": 2})
    network, x = normsearch.build(blur).eval(), torch.randn(1, 3, 64, 64)
    hidden = set(dict(network.named_buffers())) - set(network.state_dict())
    assert hidden
    normsearch.save(network, tmp_path / "x.safetensors", architecture=blur)
    loaded = normsearch.load(tmp_path / "x.safetensors").model
    found = dict(loaded.named_buffers())
    assert all(torch.equal(found[name], dict(network.named_buffers())[name]) for name in hidden)
    assert same(network, loaded, x)


def test_layers_that_gained_an_affine(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "plain_networks.py").write_text(
        "from torch import nn\n"
        "def network(): return nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8, affine=False))\n"
    )
    monkeypatch.syspath_prepend(str(tmp_path))
    factory, x = Architecture("plain_networks:network"), torch.randn(2, 3, 8, 8)
    network = normsearch.build(factory, allow_factories=True).eval()
    for trained in (False, True):
        if trained:
            network[1].running_mean.fill_(0.5)
        for keep in ("function", "nothing"):
            plan = normsearch.plan(network, "group")
            converted = normsearch.convert(network, plan, keep=keep)  # type: ignore[arg-type]
            assert (converted[1].weight is not None) == (trained and keep == "function")
            path = tmp_path / f"{trained}{keep}.safetensors"
            normsearch.save(converted, path, architecture=factory, plan=plan)
            assert same(normsearch.load(path, factory, allow_factories=True).model, converted, x)


def test_tied_weights_are_written_once_and_tied_again(model: nn.Module, tmp_path: Path) -> None:
    network = normsearch.build(RESNET)
    network.layer1[0].conv2.weight = network.layer1[0].conv1.weight
    path = tmp_path / "x.safetensors"
    normsearch.save(network, path, architecture=RESNET)
    assert "layer1.0.conv2.weight" not in load_file(path)
    loaded = normsearch.load(path).model
    assert loaded.layer1[0].conv2.weight is loaded.layer1[0].conv1.weight
    assert torch.equal(loaded.layer1[0].conv2.weight, network.layer1[0].conv1.weight)


def test_views_of_one_tensor_are_written_apart(tmp_path: Path) -> None:
    network, numbers = nn.Linear(4, 4, bias=False), torch.arange(32.0)
    network.weight = nn.Parameter(numbers[:16].view(4, 4))
    network.register_buffer("shifted", numbers[8:24].view(4, 4))
    network.register_buffer("turned", numbers[:16].view(4, 4).t())
    normsearch.save(network, tmp_path / "x.safetensors")
    assert all(
        torch.equal(v, network.state_dict()[k]) for k, v in load_file(tmp_path / "x.safetensors").items()
    )


@pytest.mark.parametrize("what", ["other plan", "other architecture", "unconverted"])
def test_what_could_not_be_loaded_is_not_saved(what: str, model: nn.Module, tmp_path: Path) -> None:
    plan = normsearch.plan(model, "rms" if what == "other plan" else "switchable")
    converted = model if what == "unconverted" else normsearch.convert(model, "batch_instance")
    architecture = Architecture("timm/resnet18") if what == "other architecture" else RESNET
    with pytest.raises(CheckpointError, match="the model does not fit"):
        normsearch.save(converted, tmp_path / "x.safetensors", architecture=architecture, plan=plan)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("done", "said"),
    [
        ("layer", "group"),
        ("group(groups=2)", "group"),
        ("instance", "group"),
        ("rms", "layer"),
        ("frozen(trainable=true)", "batch_renorm"),
    ],
)
def test_a_plan_that_makes_other_layers_of_the_same_shapes_is_not_saved(
    done: str, said: str, model: nn.Module, tmp_path: Path
) -> None:
    plan, converted = normsearch.plan(model, said), normsearch.convert(model, done)
    with pytest.raises(CheckpointError):
        normsearch.save(converted, tmp_path / "x.safetensors", architecture=RESNET, plan=plan)
    assert not list(tmp_path.iterdir())


def test_the_layers_that_a_plan_does_not_make_are_named(model: nn.Module, tmp_path: Path) -> None:
    said = r"it has group\(groups=2\), which makes GroupNorm\(2, .*, and the model has GroupNorm\(1, "
    with pytest.raises(CheckpointError, match=said):
        normsearch.save(
            normsearch.convert(model, "layer"),
            tmp_path / "x.safetensors",
            architecture=RESNET,
            plan=normsearch.plan(model, "group"),
        )


def test_parametrized_layers_are_no_other_layers(model: nn.Module, inputs: Tensor, tmp_path: Path) -> None:
    plan = normsearch.plan(model, ["spectral", "weight", "frozen"], weights=True)
    converted, path = normsearch.convert(model, plan), tmp_path / "x.safetensors"
    normsearch.save(converted, path, architecture=RESNET, plan=plan)
    assert same(normsearch.load(path).model, converted, inputs)


def test_whitening_of_what_was_not_trained_is_saved(inputs: Tensor, tmp_path: Path) -> None:
    network = normsearch.build(RESNET).eval()
    plan = normsearch.plan(network, "group(whiten=true)")
    converted, path = normsearch.convert(network, plan), tmp_path / "x.safetensors"
    normsearch.save(converted, path, architecture=RESNET, plan=plan)
    assert same(normsearch.load(path).model, converted, inputs)


def test_nothing_is_replaced_unasked(model: nn.Module, tmp_path: Path) -> None:
    path = tmp_path / "x.safetensors"
    path.write_text("mine")
    with pytest.raises(CheckpointError, match="exists; choose another name"):
        normsearch.save(model, path)
    assert path.read_text() == "mine"
    normsearch.save(model, path, force=True)
    assert len(admit(path).tensors) == len(model.state_dict())
    assert [entry.name for entry in tmp_path.iterdir()] == ["x.safetensors"]


def test_names_that_cannot_be_written(model: nn.Module, tmp_path: Path) -> None:
    (tmp_path / "folder.safetensors").mkdir()
    for name, message in (
        ("x.pth", "written as .safetensors"),
        ("no/x.safetensors", "does not exist; make it first"),
        ("folder.safetensors", "is a directory"),
    ):
        with pytest.raises(CheckpointError, match=message):
            normsearch.save(model, tmp_path / name)


def test_failed_write_leaves_nothing(
    model: nn.Module, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*args: Any) -> None:
        Path(args[1]).write_bytes(b"half")
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("safetensors.torch.save_file", full)
    path = tmp_path / "x.safetensors"
    path.write_text("before")
    with pytest.raises(CheckpointError, match="No space left on device"):
        normsearch.save(model, path, force=True)
    assert [entry.name for entry in tmp_path.iterdir()] == ["x.safetensors"]
    assert path.read_text() == "before"


def test_readers_see_all_or_nothing(model: nn.Module, tmp_path: Path) -> None:
    path, stop, seen = tmp_path / "x.safetensors", threading.Event(), []
    normsearch.save(model, path)

    def look() -> None:
        while not stop.is_set():
            seen.append(len(admit(path).tensors))

    reader = threading.Thread(target=look)
    reader.start()
    for _ in range(5):
        normsearch.save(model, path, force=True)
    stop.set()
    reader.join()
    assert set(seen) == {len(model.state_dict())}


def test_file_gets_the_usual_permissions(model: nn.Module, tmp_path: Path) -> None:
    normsearch.save(model, tmp_path / "x.safetensors")
    (tmp_path / "y").touch()
    assert (tmp_path / "x.safetensors").stat().st_mode == (tmp_path / "y").stat().st_mode
    assert os.access(tmp_path / "x.safetensors", os.R_OK)


def test_what_safetensors_cannot_hold(tmp_path: Path) -> None:
    network = nn.Linear(2, 2)
    network.register_buffer("sparse", torch.eye(2).to_sparse())
    with pytest.raises(CheckpointError, match="sparse is no plain tensor"):
        normsearch.save(network, tmp_path / "x.safetensors")
    with pytest.raises(CheckpointError, match="weight is on the meta device"):
        normsearch.save(nn.Linear(2, 2, device="meta"), tmp_path / "x.safetensors")


def _with_plan(model: nn.Module, path: Path, change: Any) -> None:
    """A converted checkpoint whose recorded plan was tampered with; sizes are right."""
    plan = normsearch.plan(model, "rms")
    converted = normsearch.convert(model, plan)
    document = json.loads(plan.to_json())
    change(document["rows"])
    record = {
        "format": 1,
        "architecture": {"name": RESNET.name, "arguments": RESNET.arguments},
        "plan": json.dumps(document),
    }
    save_file(converted.state_dict(), path, {"normsearch": json.dumps(record)})


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("path", "__class__"),
        ("path", "bn1.__init__"),
        ("path", ""),
        ("path", "fc"),
        ("path", "x'); import os; ('"),
        ("channels", 10**9),
        ("channels", -1),
        ("channels", None),
        ("eps", -1.0),
        ("eps", 1e300),
        ("kind", "custom"),
        ("layer", "os.system"),
        ("ranks", []),
        ("momentum", 1e300),
        ("input_shapes", [[10**9] * 5]),
        ("aliases", ["fc"]),
        ("activation", "Evil"),
        ("tied", ["fc.weight"]),
        ("detail", "x" * 10_000),
        ("track_running_stats", False),
        ("affine", False),
        ("trained", None),
        ("calls", -5),
    ],
)
def test_tampered_plans(field: str, value: Any, model: nn.Module, inputs: Tensor, tmp_path: Path) -> None:
    def change(rows: list[dict[str, Any]]) -> None:
        rows[1]["site"][field] = value

    path = tmp_path / "x.safetensors"
    _with_plan(model, path, change)
    try:
        loaded = normsearch.load(path)
    except NormsearchError:
        return
    # What passes is information alone: the network is the same.
    assert same(loaded.model, normsearch.convert(model, "rms"), inputs)


def test_plan_of_another_network_is_refused(model: nn.Module, tmp_path: Path) -> None:
    path = tmp_path / "x.safetensors"
    _with_plan(model, path, lambda rows: rows[0].update(method="evil"))
    with pytest.raises(NormsearchError, match="unknown method 'evil'"):
        normsearch.load(path)
    _with_plan(model, path, lambda rows: rows[0]["site"].update(path="nowhere"))
    with pytest.raises(PlanError, match="nowhere"):
        normsearch.load(path)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (
            lambda path, model: normsearch.save(model.state_dict(), path),
            "torch.nn.Module first, got OrderedDict",
        ),
        (lambda path, model: normsearch.save(model, 3), "expected a path, got int"),
        (lambda path, model: normsearch.save(model, path, plan={"bn1": "group"}), "got dict"),
        (lambda path, model: normsearch.save(model, path, architecture=RESNET.arguments), "got dict"),
        (lambda path, model: normsearch.load(None), "expected a path, got NoneType"),
        (lambda path, model: normsearch.load(path, model), "architecture is an Architecture or its name"),
    ],
)
def test_arguments_of_other_types_are_named(
    call: Any, message: str, model: nn.Module, tmp_path: Path
) -> None:
    with pytest.raises(CheckpointError, match=message):
        call(tmp_path / "x.safetensors", model)
    assert list(tmp_path.iterdir()) == []


def test_an_architecture_may_be_given_by_name(tmp_path: Path) -> None:
    model = normsearch.build("timm/resnet10t").eval()
    normsearch.save(model, tmp_path / "x.safetensors", architecture="timm/resnet10t")
    x = torch.randn(1, 3, 64, 64)
    assert same(model, normsearch.load(tmp_path / "x.safetensors").model, x)


def test_build_names_what_it_cannot_take() -> None:
    with pytest.raises(normsearch.ArchitectureError, match="got Linear"):
        normsearch.build(nn.Linear(1, 1))  # type: ignore[arg-type]
