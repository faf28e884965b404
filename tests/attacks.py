"""Hostile checkpoints, built here: each would leave a canary, fill the memory or break the reader."""

from __future__ import annotations

import io
import json
import os
import pickle
import struct
import zipfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save as safetensors_bytes
from torch import nn


@dataclass(frozen=True)
class Attack:
    """A file's name and how its content is made; ``touch`` is a shell command that writes the canary."""

    name: str
    file: str
    content: Callable[[Path], bytes]

    def write(self, folder: Path, canary: Path) -> Path:
        path = folder / self.file
        path.write_bytes(self.content(canary))
        return path


class Calls:
    """Pickles as a call of ``function`` on ``arguments``."""

    def __init__(self, function: Any, *arguments: Any) -> None:
        self.call = (function, arguments)

    def __reduce__(self) -> tuple[Any, ...]:
        return self.call


class Builds:
    """Pickles with a state that a BUILD instruction sets."""

    def __init__(self, function: Any, argument: Any) -> None:
        self.parts = (function, argument)

    def __reduce__(self) -> tuple[Any, ...]:
        return list, (), {"x": Calls(*self.parts)}


def touch(canary: Path) -> str:
    return f"touch {canary}"


def torch_file(content: Any, *, zipped: bool = True) -> bytes:
    buffer = io.BytesIO()
    torch.save(content, buffer, _use_new_zipfile_serialization=zipped)
    return buffer.getvalue()


def archive(pickled: bytes, extra: dict[str, bytes] | None = None, method: int = zipfile.ZIP_STORED) -> bytes:
    """An archive as torch.save lays it out, with any pickle in it."""
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w", method) as file:
        file.writestr("archive/data.pkl", pickled)
        for name, data in ({"archive/version": b"3\n"} | (extra or {})).items():
            file.writestr(name, data)
    return buffer.getvalue()


def rewritten(data: bytes, change: Callable[[str, bytes], list[tuple[str, bytes]]]) -> bytes:
    """The archive again, each entry replaced by what ``change`` makes of it."""
    buffer = io.BytesIO()
    with zipfile.ZipFile(io.BytesIO(data)) as old, zipfile.ZipFile(buffer, "w") as new:
        for name in old.namelist():
            for entry, content in change(name, old.read(name)):
                new.writestr(zipfile.ZipInfo(entry), content)
    return buffer.getvalue()


def global_call(module: str, name: str, *arguments: bytes) -> bytes:
    """A raw pickle that calls ``module.name`` with arguments given as instructions."""
    return b"\x80\x02c" + f"{module}\n{name}\n".encode() + b"(" + b"".join(arguments) + b"tR."


def text(value: str) -> bytes:
    data = value.encode()
    return b"X" + struct.pack("<I", len(data)) + data


def header(entries: dict[str, Any], data: bytes = b"", length: int | None = None) -> bytes:
    """A safetensors file with any header."""
    encoded = json.dumps(entries).encode()
    return struct.pack("<Q", len(encoded) if length is None else length) + encoded + data


def record(document: Any) -> bytes:
    """A safetensors file with any normsearch metadata."""
    encoded = document if isinstance(document, str) else json.dumps(document)
    return safetensors_bytes({"a": torch.ones(1)}, {"normsearch": encoded})


def architecture(name: Any, arguments: Any = None, **others: Any) -> bytes:
    return record({"format": 1, "architecture": {"name": name, "arguments": arguments or {}}, **others})


def _small() -> bytes:
    return torch_file({"a": torch.arange(4.0), "b": torch.ones(2, 3)})


def _pickles() -> Iterator[tuple[str, Callable[[Path], Any]]]:
    yield "os.system", lambda canary: Calls(os.system, touch(canary))
    yield "eval", lambda canary: Calls(eval, f"open({str(canary)!r}, 'w')")
    yield "exec", lambda canary: Calls(exec, f"open({str(canary)!r}, 'w')")
    yield "open", lambda canary: Calls(open, str(canary), "w")
    yield "torch.load", lambda canary: Calls(torch.load, str(canary))
    yield "torch.hub", lambda canary: Calls(torch.hub.load, str(canary), "x")
    yield "state setter", lambda canary: {"a": Builds(os.system, touch(canary))}
    yield "in a tensor's place", lambda canary: {"a": torch.ones(1), "b": Calls(os.system, touch(canary))}
    yield (
        "beside the weights",
        lambda canary: {
            "state_dict": {"a": torch.ones(1)},
            "hyper_parameters": Calls(os.system, touch(canary)),
        },
    )


def _torch_files() -> Iterator[Attack]:
    for name, make in _pickles():
        for kind, zipped in (("zip", True), ("legacy", False)):
            yield Attack(
                f"{name} ({kind})",
                "x.pth",
                lambda canary, make=make, zipped=zipped: torch_file(make(canary), zipped=zipped),
            )
        yield Attack(f"{name} (plain pickle)", "x.pt", lambda canary, make=make: pickle.dumps(make(canary)))
    yield Attack(
        "protocol 4 with STACK_GLOBAL",
        "x.pth",
        lambda canary: archive(pickle.dumps(Calls(os.system, touch(canary)), protocol=4)),
    )
    yield Attack(
        "INST instruction",
        "x.pth",
        lambda canary: archive(b"(S'" + touch(canary).encode() + b"'\nios\nsystem\n."),
    )
    yield Attack(
        "torch function",
        "x.pth",
        lambda canary: archive(global_call("torch.serialization", "load", text(str(canary)))),
    )
    yield Attack("getattr chain", "x.pth", lambda canary: archive(_getattr_chain(touch(canary))))
    yield Attack(
        "huge bytearray",
        "x.pth",
        lambda _: archive(global_call("builtins", "bytearray", b"\x8a\x06" + b"\xff" * 5 + b"\0")),
    )
    yield Attack("extension registry", "x.pth", lambda _: archive(b"\x80\x02\x82\x01."))
    yield Attack("persistent id as text", "x.pth", lambda _: archive(b"Pid\n."))
    yield Attack("hash of nested tuples", "x.pth", lambda _: archive(_nested_key(60)))
    yield Attack("half a million marks", "x.pth", lambda _: archive(b"\x80\x02" + b"(" * 500_000 + b"."))
    yield Attack("list inside itself", "x.pth", lambda _: archive(b"\x80\x02]q\0h\0a."))
    yield Attack("dict inside itself", "x.pth", lambda _: archive(b"\x80\x02}q\0" + text("model") + b"h\0s."))
    yield Attack(
        "nested 100,000 deep", "x.pth", lambda _: archive(b"\x80\x02" + b"]" * 100_000 + b"a" * 99_999 + b".")
    )
    yield Attack("text of 4 GB claimed", "x.pth", lambda _: archive(b"\x80\x02X\xff\xff\xff\xff."))
    yield Attack("whole model", "x.pth", lambda _: torch_file(nn.Sequential(nn.Linear(2, 2))))
    yield Attack("whole model (legacy)", "x.pth", lambda _: torch_file(nn.Linear(2, 2), zipped=False))
    yield Attack(
        "40 GB tensor of stride 0", "x.pth", lambda _: torch_file({"a": torch.ones(1).expand(10**10)})
    )
    yield Attack(
        "overlapping windows",
        "x.pth",
        lambda _: torch_file({"a": torch.ones(10**4).as_strided((5000, 5000), (1, 1))}),
    )
    yield Attack("sparse tensor", "x.pth", lambda _: torch_file({"a": torch.eye(3).to_sparse()}))
    yield Attack(
        "quantized tensor",
        "x.pth",
        lambda _: torch_file({"a": torch.quantize_per_tensor(torch.ones(2), 1.0, 0, torch.qint8)}),
    )
    yield Attack("meta tensor", "x.pth", lambda _: torch_file({"a": torch.ones(10**12, device="meta")}))
    yield Attack("one tensor", "x.pth", lambda _: torch_file(torch.ones(2)))
    yield Attack("no weights", "x.pth", lambda _: torch_file({"epoch": 3}))


def _getattr_chain(command: str) -> bytes:
    """getattr(__import__("os"), "system")(command)."""
    module = b"cbuiltins\n__import__\n(" + text("os") + b"tR"
    return b"\x80\x02cbuiltins\ngetattr\n(" + module + text("system") + b"tR(" + text(command) + b"tR."


def _nested_key(depth: int) -> bytes:
    nested = b")" + b"".join(b"q" + bytes([i]) + b"h" + bytes([i]) + b"\x86" for i in range(depth))
    return b"\x80\x02}" + nested + b"K\x01s."


def _archives() -> Iterator[Attack]:
    big = b"\0" * 400_000_000

    def bomb(method: int, name: str = "archive/data/0") -> bytes:
        return archive(torch_pickle(), {name: big}, method)

    yield Attack("zip bomb of 400 MB", "x.pth", lambda _: bomb(zipfile.ZIP_DEFLATED))
    yield Attack("bomb in the pickle", "x.pth", lambda _: archive(big, method=zipfile.ZIP_DEFLATED))
    yield Attack("lzma", "x.pth", lambda _: archive(b"\x80\x02}." * 1000, method=zipfile.ZIP_LZMA))
    yield Attack("entry outside", "x.pth", lambda _: archive(torch_pickle(), {"../../evil": b"x"}))
    yield Attack("absolute entry", "x.pth", lambda _: archive(torch_pickle(), {"/etc/evil": b"x"}))
    yield Attack("code entry", "x.pth", lambda _: archive(torch_pickle(), {"archive/code/x.py": b"x"}))
    yield Attack("TorchScript", "x.pt", lambda _: _scripted())
    yield Attack(
        "exported program", "x.pt", lambda _: archive(torch_pickle(), {"archive/archive_format": b"pt2"})
    )
    yield Attack("an ordinary zip", "x.pt", lambda _: _zip({"a.txt": b"x"}))
    yield Attack("empty zip", "x.pt", lambda _: b"PK\x05\x06" + b"\0" * 18)
    yield Attack("pickle twice", "x.pth", lambda _: _twice("archive/data.pkl"))
    yield Attack("storage twice", "x.pth", lambda _: _twice("archive/data/0"))
    yield Attack(
        "storage missing",
        "x.pth",
        lambda _: rewritten(_small(), lambda n, d: [] if n.endswith("/0") else [(n, d)]),
    )
    yield Attack(
        "storage too short",
        "x.pth",
        lambda _: rewritten(_small(), lambda n, d: [(n, d[:4] if n.endswith("/0") else d)]),
    )
    yield Attack(
        "storage too long",
        "x.pth",
        lambda _: rewritten(_small(), lambda n, d: [(n, d + d if n.endswith("/0") else d)]),
    )
    yield Attack(
        "two roots",
        "x.pth",
        lambda _: rewritten(_small(), lambda n, d: [("b/data/0" if n.endswith("/0") else n, d)]),
    )
    yield Attack(
        "big-endian",
        "x.pth",
        lambda _: rewritten(_small(), lambda n, d: [(n, b"big" if n.endswith("byteorder") else d)]),
    )
    yield Attack("bytes before the archive", "x.pth", lambda _: b"PK\x03\x04" + _small())
    yield Attack("comment", "x.pth", lambda _: _small()[:-2] + b"\x03\x00abc")
    yield Attack("overlapping entries", "x.pth", lambda _: _overlapping())
    yield Attack("encrypted", "x.pth", lambda _: _flagged(1))


def torch_pickle() -> bytes:
    with zipfile.ZipFile(io.BytesIO(_small())) as file:
        return file.read("archive/data.pkl")


def _zip(entries: dict[str, bytes]) -> bytes:
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w") as file:
        for name, data in entries.items():
            file.writestr(name, data)
    return buffer.getvalue()


def _twice(name: str) -> bytes:
    import warnings

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return rewritten(_small(), lambda n, d: [(n, d), (n, d)] if n == name else [(n, d)])


def _scripted() -> bytes:
    import warnings

    buffer = io.BytesIO()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        torch.jit.save(torch.jit.trace(nn.Linear(2, 2), torch.ones(1, 2)), buffer)
    return buffer.getvalue()


def _overlapping() -> bytes:
    """Point the second storage's directory entry at the first one's bytes."""
    data = bytearray(_small())
    with zipfile.ZipFile(io.BytesIO(bytes(data))) as file:
        first = file.getinfo("archive/data/0").header_offset
        start = file.start_dir
    place = data.index(b"archive/data/1", start)
    data[place - 4 : place] = struct.pack("<L", first)
    return bytes(data)


def _flagged(flag: int) -> bytes:
    data = bytearray(_small())
    with zipfile.ZipFile(io.BytesIO(bytes(data))) as file:
        start = file.start_dir
    place = data.index(b"archive/data/0", start)
    data[place - 38] |= flag
    return bytes(data)


def _headers() -> Iterator[Attack]:
    one = {"dtype": "F32", "shape": [1], "data_offsets": [0, 4]}
    lies = {
        "length of 2^63": header({"a": one}, b"\0" * 4, 2**63),
        "length beyond the file": header({"a": one}, b"\0" * 4, 10**6),
        "shape larger than its data": header({"a": one | {"shape": [10**10]}}, b"\0" * 4),
        "shape that overflows": header({"a": one | {"shape": [2**32, 2**32]}}, b"\0" * 4),
        "offsets outside": header({"a": one | {"data_offsets": [0, 4 * 10**9]}}, b"\0" * 4),
        "offsets reversed": header({"a": one | {"data_offsets": [4, 0]}}, b"\0" * 4),
        "offsets overlap": header({"a": one, "b": one}, b"\0" * 4),
        "hole": header({"a": one}, b"\0" * 8),
        "unknown dtype": header({"a": one | {"dtype": "OBJ"}}, b"\0" * 4),
        "negative shape": header({"a": one | {"shape": [-1]}}, b"\0" * 4),
        "no dictionary": struct.pack("<Q", 2) + b"[]",
        "nested 100,000 deep": struct.pack("<Q", 200_000) + b"[" * 100_000 + b"]" * 100_000,
        "metadata that is no text": header({"__metadata__": {"x": 1}, "a": one}, b"\0" * 4),
        "escape sequence as a name": header({"\x1b[2J": one}, b"\0" * 4),
        "name of 100,000 characters": header({"a" * 100_000: one}, b"\0" * 4),
        "no tensor": header({}),
    }
    for name, content in lies.items():
        yield Attack(name, "x.safetensors", lambda _, content=content: content)


#: What FACTS of other libraries make dangerous: local folders, hubs, paths, downloads.
NAMES = (
    "timm/local-dir:/tmp/evil",
    "timm/hf-hub:evil/model",
    "timm/hf_hub:evil/model",
    "timm/resnet18.a1_in1k",
    "timm/../resnet18",
    "timm/",
    "torchvision/get_model",
    "torchvision/ResNet",
    "torchvision/quantized_resnet50",
    "segmentation_models_pytorch/create_model",
    "segmentation_models_pytorch/from_pretrained",
    "os/system",
    "torchvision.models/resnet18",
    "os:system",
    "builtins:eval",
    "subprocess:check_output",
    "torch.hub:load",
    "",
    "x" * 100_000,
    "torchvision/resnet18\n",
    "torchvision/resnet18'); import os; os.system('x",
)
ARGUMENTS: tuple[dict[str, Any], ...] = (
    {"weights": "DEFAULT"},
    {"weights_backbone": "DEFAULT"},
    {"pretrained": True},
    {"checkpoint_path": "/etc/passwd"},
    {"pretrained_cfg": "x"},
    {"pretrained_cfg": {"file": "/etc/passwd"}},
    {"num_classes": 10**9},
    {"num_classes": -1},
    {"num_classes": 2.5},
    {"num_classes": True},
    {"num_classes": "10"},
    {"num_classes": 10**400},
    {"num_classes": [1]},
    {"num_classes": None},
    {"block": "eval"},
    {"self": 1},
    {"__class__": 1},
    {"num_classes=1, weights": "DEFAULT"},
    {f"a{i}": 1 for i in range(1000)},
)


def _records() -> Iterator[Attack]:
    for name in NAMES:
        yield Attack(f"architecture {name[:40]!r}", "x.safetensors", lambda _, name=name: architecture(name))
    for library in ("torchvision/resnet18", "timm/resnet18", "segmentation_models_pytorch/Unet"):
        for arguments in ARGUMENTS:
            yield Attack(
                f"{library} {str(arguments)[:40]}",
                "x.safetensors",
                lambda _, library=library, arguments=arguments: architecture(library, arguments),
            )
    for encoder in (
        "tu-local-dir:/tmp/evil",
        "tu-hf-hub:evil/model",
        "tu-resnet18.a1_in1k",
        "../resnet18",
        "tu-",
    ):
        yield Attack(
            f"encoder {encoder}",
            "x.safetensors",
            lambda _, encoder=encoder: architecture(
                "segmentation_models_pytorch/Unet", {"encoder_name": encoder}
            ),
        )
    yield Attack(
        "factory with a canary",
        "x.safetensors",
        lambda canary: architecture("os:system", {"command": touch(canary)}),
    )
    resnet = "torchvision/resnet18"
    broken: dict[str, Any] = {
        "no JSON": "{",
        "a list": [],
        "deep": "[" * 100_000,
        "unknown field": {"format": 1, "evil": 1},
        "unknown format": {"format": 99},
        "numbers for names": {"format": 1, "architecture": {"name": 3, "arguments": {}}},
        "not a number": json.dumps(
            {"format": 1, "architecture": {"name": "timm/resnet18", "arguments": {"drop_rate": float("nan")}}}
        ),
        "plan of nothing": {"format": 1, "plan": "x"},
        "plan with an unknown method": {"format": 1, "plan": json.dumps({"rows": [_row(method="evil")]})},
        "plan with a call": {"format": 1, "plan": json.dumps({"rows": [_row(method="__import__('os')")]})},
        "alias of nothing": {
            "format": 1,
            "architecture": {"name": resnet, "arguments": {}},
            "aliases": {"b": "c"},
        },
        "alias over a tensor": {
            "format": 1,
            "architecture": {"name": resnet, "arguments": {}},
            "aliases": {"a": "a"},
        },
    }
    for name, document in broken.items():
        yield Attack(f"metadata: {name}", "x.safetensors", lambda _, document=document: record(document))
    for name in ("timm/vit_giant_patch14_dinov2", "torchvision/regnet_y_128gf", "timm/efficientnet_l2"):
        yield Attack(f"one number for {name}", "x.safetensors", lambda _, name=name: architecture(name))
    for path in ("__class__", "bn1.__init__", "a'); import os; os.system('x", "", "layer1.0.bn9"):
        plan = json.dumps({"rows": [_row(path=path)]})
        yield Attack(
            f"plan for {path!r}", "x.safetensors", lambda _, plan=plan: architecture(resnet, {}, plan=plan)
        )


def _row(path: str = "bn1", method: str = "group") -> dict[str, Any]:
    site = {
        "path": path,
        "kind": "batch",
        "layer": "torch.nn.modules.batchnorm.BatchNorm2d",
        "channels": 64,
        "eps": 1e-5,
        "momentum": 0.1,
        "affine": True,
        "bias": True,
        "track_running_stats": True,
        "trained": True,
        "ranks": [4],
    }
    return {"site": site, "method": method, "notes": []}


def _others() -> Iterator[Attack]:
    files = {
        "empty.pth": b"",
        "empty.safetensors": b"",
        "page.pth": b"<!DOCTYPE html><html>not found</html>",
        "keras.pth": b"\x89HDF\r\n\x1a\n" + b"\0" * 100,
        "lfs.pth": b"version https://git-lfs.github.com/spec/v1\noid sha256:0\n",
        "packed.pth": b"\x1f\x8b" + b"\0" * 50,
        "noise.pth": bytes(range(256)) * 4,
        "model.onnx": b"\x08\x07\x12\x07pytorch",
        "short.safetensors": b"\x01\0\0",
    }
    for name, content in files.items():
        yield Attack(name, name, lambda _, content=content: content)
    yield Attack("torch.save named safetensors", "x.safetensors", lambda _: _small())
    yield Attack("safetensors named pth", "x.pth", lambda _: safetensors_bytes({"a": torch.ones(1)}))


ATTACKS: tuple[Attack, ...] = (*_torch_files(), *_archives(), *_headers(), *_records(), *_others())
