"""Hostile and damaged checkpoints: nothing runs, memory stays bounded, every error is normsearch's own."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from attacks import ATTACKS, rewritten, torch_file
from safetensors.torch import save as safetensors_bytes
from torch import nn

import normsearch
from benchmarks.fuzz_admission import (
    ARCHIVES,
    ARRAYS,
    HEADERS,
    array_seeds,
    fuzz,
    safetensors_seeds,
    torch_seeds,
)
from normsearch import CheckpointError, NormsearchError
from normsearch.admission import admit
from normsearch.admission.arrays import read_inputs

#: Address space that reading the whole corpus may add, in bytes: a tenth of what one bomb would take.
ROOM = 512 * 2**20

_CHILD = """
import json, resource, sys, warnings
from pathlib import Path
warnings.simplefilter("error")
import torch, torchvision, timm, segmentation_models_pytorch, pydantic, safetensors.torch
import normsearch
torch.set_num_threads(1)
folder, room = Path(sys.argv[1]), int(sys.argv[2])
# The first load imports whatever is imported late.
try:
    normsearch.load(folder / "warm" / "x.safetensors")
except normsearch.NormsearchError:
    pass
pages = int(Path("/proc/self/statm").read_text().split()[0])
limit = pages * resource.getpagesize() + room
resource.setrlimit(resource.RLIMIT_AS, (limit, limit))
outcomes = {}
for place in sorted(folder.glob("[0-9]*")):
    (path,) = place.iterdir()
    known = path.suffix == ".safetensors"
    try:
        normsearch.load(path, None if known else "torchvision/resnet18")
        outcome = ["loaded", ""]
    except normsearch.NormsearchError as error:
        outcome = ["NormsearchError", str(error)]
    except BaseException as error:
        outcome = [type(error).__name__, str(error)]
    outcomes[place.name] = [*outcome, (folder / "canary").exists()]
print(json.dumps(outcomes))
"""


@pytest.fixture(scope="module")
def outcomes(tmp_path_factory: pytest.TempPathFactory) -> dict[str, list[Any]]:
    """What a child process with little memory made of every attack."""
    folder = tmp_path_factory.mktemp("attacks")
    named = [("warm", ATTACKS[-1]), *((f"{i:04}", attack) for i, attack in enumerate(ATTACKS))]
    for name, attack in named:
        (folder / name).mkdir()
        attack.write(folder / name, folder / "canary")
    done = subprocess.run(
        [sys.executable, "-c", _CHILD, str(folder), str(ROOM)], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    found: dict[str, list[Any]] = json.loads(done.stdout)
    return found


@pytest.mark.filterwarnings("ignore:.*quantize.*:UserWarning", "ignore:.*TorchScript.*:DeprecationWarning")
@pytest.mark.parametrize("number", range(len(ATTACKS)), ids=[attack.name for attack in ATTACKS])
def test_attack_is_refused_and_runs_nothing(number: int, outcomes: dict[str, list[Any]]) -> None:
    kind, message, canary = outcomes[f"{number:04}"]
    assert not canary
    assert kind == "NormsearchError", message
    # It names a rule and a way out, and no more of the file than fits on a screen.
    assert 20 < len(message) < 1500


def test_canary_would_be_seen(tmp_path: Path) -> None:
    import pickle

    attack = next(attack for attack in ATTACKS if attack.name == "os.system (plain pickle)")
    path = attack.write(tmp_path, tmp_path / "canary")
    pickle.loads(path.read_bytes())
    assert (tmp_path / "canary").exists()


def _state() -> dict[str, torch.Tensor]:
    torch.manual_seed(0)
    return nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4)).state_dict()


def _files() -> dict[str, bytes]:
    return {
        "x.pth": torch_file(_state()),
        "old.pth": torch_file(_state(), zipped=False),
        "x.safetensors": safetensors_bytes(_state()),
    }


@pytest.mark.parametrize("name", _files())
def test_truncation_at_every_percent(name: str, tmp_path: Path) -> None:
    data = _files()[name]
    path = tmp_path / name
    for percent in range(100):
        path.write_bytes(data[: len(data) * percent // 100])
        with pytest.raises(CheckpointError, match=r"again|torch\.save"):
            admit(path)
    path.write_bytes(data)
    admit(path)


@pytest.mark.parametrize("name", _files())
def test_what_is_read_is_what_was_written(name: str, tmp_path: Path) -> None:
    path = tmp_path / name
    path.write_bytes(_files()[name])
    found = admit(path).tensors
    assert list(found) == sorted(_state()) if name == "x.safetensors" else list(_state())
    for key, value in _state().items():
        assert torch.equal(found[key], value)
        assert found[key].dtype == value.dtype


def test_torch_save_variants_are_read(tmp_path: Path) -> None:
    base = torch.arange(24.0)
    content = {
        "transposed": base.reshape(4, 6).t(),
        "part": base[5:9],
        "same": base,
        "scalar": torch.tensor(3),
        "empty": torch.zeros(0, 3),
        "half": torch.ones(2, dtype=torch.bfloat16),
        "bits": torch.tensor([True, False]),
        "complex": torch.ones(2, dtype=torch.complex64),
        "parameter": nn.Parameter(torch.ones(2)),
        "channels_last": torch.randn(2, 3, 4, 4).to(memory_format=torch.channels_last),
    }
    for zipped in (True, False):
        path = tmp_path / "x.pth"
        path.unlink(missing_ok=True)
        path.write_bytes(torch_file(content, zipped=zipped))
        found = admit(path).tensors
        assert {key: value.dtype for key, value in found.items()} == {k: v.dtype for k, v in content.items()}
        assert all(torch.equal(found[key], value) for key, value in content.items())


def test_files_of_old_versions_are_read(tmp_path: Path) -> None:
    # Before 1.9 storages were named by their address, and there were fewer entries.
    def as_of_2020(name: str, data: bytes) -> list[tuple[str, bytes]]:
        if name.endswith("data.pkl"):
            for key in range(len(_state())):
                old, new = (
                    b"X" + len(k).to_bytes(4, "little") + k for k in (b"%d" % key, b"9434034120%04d" % key)
                )
                data = data.replace(old, new)
            return [(name, data)]
        folder, _, last = name.rpartition("/")
        if last.isdigit() and folder.endswith("data"):
            return [(f"{folder}/9434034120{int(last):04}", data)]
        return [(name, data)] if last == "version" else []

    (tmp_path / "x.pth").write_bytes(rewritten(torch_file(_state()), as_of_2020))
    found = admit(tmp_path / "x.pth").tensors
    assert all(torch.equal(found[key], value) for key, value in _state().items())


def test_tensors_are_mapped_not_copied(tmp_path: Path) -> None:
    torch.save({"a": torch.ones(10_000_000)}, tmp_path / "x.pth")

    def anonymous() -> int:
        return int(Path("/proc/self/status").read_text().split("RssAnon:")[1].split()[0]) * 1024

    before = anonymous()
    found = admit(tmp_path / "x.pth").tensors["a"]
    assert float(found.sum()) == 10_000_000
    assert anonymous() - before < 10_000_000


def test_entries_of_training_checkpoints(tmp_path: Path) -> None:
    state, path = _state(), tmp_path / "x.ckpt"
    torch.save({"epoch": 1, "state_dict": state, "model_ema": {"e": torch.ones(1)}}, path)
    admitted = admit(path)
    assert list(admitted.tensors) == list(state)
    assert admitted.notes == (
        "model_ema left aside; entry='model_ema' takes it instead",
        "read from the entry 'state_dict'",
    )
    assert list(admit(path, "model_ema").tensors) == ["e"]
    with pytest.raises(CheckpointError, match="no entry 'best'; it has 'state_dict', 'model_ema'"):
        admit(path, "best")


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ({"params_ema": _state()}, "there is 'params_ema'; give entry='params_ema'"),
        (
            {"generator": _state(), "discriminator": _state(), "step": 3},
            "there is 'generator', 'discriminator'; give entry='generator'",
        ),
        ({"ema": {"shadow": _state(), "decay": 0.9}}, "there is 'ema.shadow'; give entry='ema.shadow'"),
        ({"a.b": {"c": _state()}}, "there is 'a.b.c'; give entry='a.b.c'"),
        ({}, "holds an empty dict"),
        ({"model": {}}, "'model'.*weights_only=False"),
        ({"step": 3}, "holds no state dict: its entries are 'step'.*weights_only=False"),
    ],
)
def test_state_dicts_that_nothing_chooses_are_named(content: Any, message: str, tmp_path: Path) -> None:
    path = tmp_path / "x.pth"
    torch.save(content, path)
    with pytest.raises(CheckpointError, match=message):
        admit(path)


def test_entries_inside_others(tmp_path: Path) -> None:
    path = tmp_path / "x.pth"
    torch.save({"ema": {"shadow": _state()}, "ema.shadow.x": {"own": torch.ones(1)}}, path)
    admitted = admit(path, "ema.shadow")
    assert list(admitted.tensors) == list(_state())
    assert admitted.notes == ("read from the entry 'ema.shadow'",)
    # A name with dots of its own.
    assert list(admit(path, "ema.shadow.x").tensors) == ["own"]
    torch.save({"model": {"state_dict": _state(), "ema": _state()}}, path)
    assert "ema left aside; entry='model.ema' takes it instead" in admit(path).notes
    assert list(admit(path, "model.ema").tensors) == list(_state())
    with pytest.raises(CheckpointError, match="no entry 'ema'; it has 'model'"):
        admit(path, "ema")


@pytest.mark.parametrize("kind", ["directory", "missing", "pipe", "null byte"])
def test_no_regular_file(kind: str, tmp_path: Path) -> None:
    import os

    path = tmp_path / "x.pth"
    if kind == "directory":
        path.mkdir()
    if kind == "pipe":
        os.mkfifo(path)
    if kind == "null byte":
        path = tmp_path / "x\0.pth"
    with pytest.raises(CheckpointError, match=r"directory|No such file|regular|null"):
        admit(path)


def test_arrays_as_inputs(tmp_path: Path) -> None:
    x, y = np.ones((2, 3), np.float32), np.arange(2)
    np.savez(tmp_path / "one.npz", x)
    np.savez(tmp_path / "two.npz", x, y)
    np.savez_compressed(tmp_path / "named.npz", image=x, length=y)
    np.save(tmp_path / "plain.npy", x)
    assert torch.equal(read_inputs(tmp_path / "one.npz"), torch.ones(2, 3))
    assert torch.equal(read_inputs(tmp_path / "plain.npy"), torch.ones(2, 3))
    assert [tuple(t.shape) for t in read_inputs(tmp_path / "two.npz")] == [(2, 3), (2,)]
    assert list(read_inputs(tmp_path / "named.npz")) == ["image", "length"]


def test_arrays_of_objects_are_refused(tmp_path: Path) -> None:
    np.savez(tmp_path / "x.npz", np.array([{}], dtype=object))
    with pytest.raises(CheckpointError, match="allow_pickle=False"):
        read_inputs(tmp_path / "x.npz")
    (tmp_path / "x.csv").write_text("1,2")
    with pytest.raises(CheckpointError, match=r"\.npz, \.npy or \.safetensors"):
        read_inputs(tmp_path / "x.csv")


@pytest.mark.parametrize(
    ("seeds", "mutations", "suffix", "count"),
    [
        (safetensors_seeds, HEADERS, ".safetensors", 3000),
        (torch_seeds, ARCHIVES, ".pth", 1500),
        (array_seeds, ARRAYS, ".npz", 300),
    ],
)
def test_mutated_files(seeds: Any, mutations: Any, suffix: str, count: int, tmp_path: Path) -> None:
    outcomes = fuzz(seeds(), mutations, suffix, count, 1, tmp_path)
    assert sum(outcomes.values()) == count
    # Both ends are reached: most are refused, some still hold what they held.
    assert outcomes["read"] > count // 100
    assert outcomes["CheckpointError"] > count // 3


def test_plans_of_any_structure_are_refused_as_plans() -> None:
    site = {"path": "1", "producer": 3}
    for text in (json.dumps({"rows": [{"site": site, "method": "group"}]}), "[" * 10_000, "3", '{"rows": 1}'):
        with pytest.raises(NormsearchError):
            normsearch.Plan.from_json(text)
