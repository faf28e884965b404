"""Mutated checkpoints against admission: no crash, no foreign error, no memory beyond the file's size.

    python -m benchmarks.fuzz_admission [--headers 50000] [--archives 20000] [--programs 50000] [--seed 0]
        [--output benchmarks/results/fuzz_admission.json]

Mutates bytes, JSON, pickles and zip structures of small valid checkpoints. Each must be read, or be refused
with a NormsearchError; whatever is read is touched to its last number. A crash of the process, another
exception or growing memory fails the run. Each kind of file's outcomes are written where the run is through
with it (0 leaves a kind out). Prints the branch coverage of ``normsearch/admission``.
"""

from __future__ import annotations

import argparse
import io
import json
import platform
import random
import resource
import tempfile
import time
import zipfile
from collections import Counter
from collections.abc import Callable, Mapping
from pathlib import Path

import coverage
import numpy as np
import torch
from torch import nn

#: Files of each kind under which coverage is measured, which takes several times as long.
MEASURED = 2_000
#: How far the largest memory of the process may grow, in bytes.
MOST_GROWTH = 200 * 2**20

Mutation = Callable[[bytes, random.Random], bytes]


def _model() -> nn.Module:
    return nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.Linear(4, 2))


def safetensors_seeds() -> list[bytes]:
    """Return valid files: with and without normsearch's own metadata."""
    from safetensors.torch import save

    import normsearch
    from normsearch.admission.record import KEY, Record

    model = _model()
    plan = normsearch.plan(model, "group")
    converted = normsearch.convert(model, plan)
    record = Record(
        normsearch.Architecture("torchvision/resnet18", {"num_classes": 3}), plan, {"a": "b"}, {"torch": "2"}
    )
    return [
        save(model.state_dict()),
        save(converted.state_dict(), {KEY: record.to_json()}),
        save(
            {"a": torch.ones(2, dtype=torch.bfloat16), "b": torch.ones(0, 3), "c": torch.tensor(1)},
            {"x": "y"},
        ),
    ]


def torch_seeds() -> list[bytes]:
    """Return valid files of torch.save: a state dict, a training checkpoint, the format before 1.6."""
    model = _model()
    optimizer = torch.optim.Adam(model.parameters())
    model(torch.ones(1, 3, 6, 6)).sum().backward()
    optimizer.step()
    training = {
        "epoch": 3,
        "loss": 0.5,
        "model": {f"module.{key}": value for key, value in model.state_dict().items()},
        "model_ema": model.state_dict(),
        "optimizer": optimizer.state_dict(),
        "parameter": nn.Parameter(torch.ones(2)),
        "size": torch.Size([1, 2]),
        "device": torch.device("cpu"),
        "counts": Counter({30: 1}),
        "none": None,
        "flags": (True, False, [1, 2**40, -1]),
    }
    files = []
    for content, is_zip in ((model.state_dict(), True), (training, True), (model.state_dict(), False)):
        buffer = io.BytesIO()
        torch.save(content, buffer, _use_new_zipfile_serialization=is_zip)
        files.append(buffer.getvalue())
    return files


def program_seeds() -> list[bytes]:
    """Return valid exported programs: with an open batch size, of train mode, converted, with a constant."""

    class Network(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.network = nn.Sequential(nn.Conv2d(1, 2, 1), nn.BatchNorm2d(2), nn.ReLU())
            self.constant = torch.ones(2, 1, 1)

        def forward(self, x: torch.Tensor, *, scale: torch.Tensor | None = None) -> dict[str, torch.Tensor]:
            y: torch.Tensor = self.network(x) * self.constant + x.shape[0]
            return {"y": y if scale is None else y * scale}

    import normsearch

    files = []
    x = torch.randn(2, 1, 2, 2)
    shapes = {"x": {0: torch.export.Dim("batch", max=64)}, "scale": None}
    for training in (False, True):
        model = Network().train(training)
        program = torch.export.export(model, (x,), {"scale": torch.ones(1)}, dynamic_shapes=shapes)
        for one in (program, normsearch.convert(program, "group")):
            buffer = io.BytesIO()
            torch.export.save(one, buffer)
            files.append(buffer.getvalue())
    return files


def array_seeds() -> list[bytes]:
    """Return valid files of numpy.savez."""
    files = []
    for save, arrays in (
        (np.savez, (np.ones((2, 3)), np.arange(4))),
        (np.savez_compressed, (np.zeros(1000),)),
    ):
        buffer = io.BytesIO()
        save(buffer, *arrays)
        files.append(buffer.getvalue())
    return files


def flip(data: bytes, rng: random.Random) -> bytes:
    """Change up to four bytes."""
    changed = bytearray(data)
    for _ in range(rng.randint(1, 4)):
        changed[rng.randrange(len(changed))] = rng.choice((rng.randrange(256), 0, 255, 0x7F, 0x80))
    return bytes(changed)


def cut(data: bytes, rng: random.Random) -> bytes:
    """Truncate, or remove a piece."""
    start, end = sorted(rng.randrange(len(data)) for _ in range(2))
    return data[:start] if rng.random() < 0.5 else data[:start] + data[end:]


def repeat(data: bytes, rng: random.Random) -> bytes:
    """Copy a piece elsewhere."""
    start = rng.randrange(len(data))
    piece = data[start : start + rng.choice((1, 4, 16, 64, 256))]
    place = rng.randrange(len(data))
    return data[:place] + piece * rng.choice((1, 1, 2, 20)) + data[place:]


_NUMBERS = (
    b"0",
    b"-1",
    b"1",
    b"2147483648",
    b"18446744073709551615",
    b"1e9",
    b"null",
    b'""',
    b"[]",
    b"{}",
    b"9" * 30,
)


def json_token(data: bytes, rng: random.Random) -> bytes:
    """Replace a number or word in a header, and its length to match."""
    length = int.from_bytes(data[:8], "little")
    header, rest = data[8 : 8 + length], data[8 + length :]
    digits = [i for i in range(len(header)) if header[i : i + 1].isalnum()]
    start = end = rng.choice(digits)
    while end < len(header) and header[end : end + 1].isalnum():
        end += 1
    words = (
        *_NUMBERS,
        b"F64",
        b"BF16",
        b"F4",
        b"BOOL",
        b"U8",
        b"shape",
        b"data_offsets",
        b"__metadata__",
        b"dtype",
    )
    header = header[:start] + rng.choice(words) + header[end:]
    return len(header).to_bytes(8, "little") + header + rest


def header_bytes(data: bytes, rng: random.Random) -> bytes:
    """Mutate the header alone, and set its length to match."""
    length = int.from_bytes(data[:8], "little")
    header = rng.choice((flip, cut, repeat))(data[8 : 8 + length], rng)
    return len(header).to_bytes(8, "little") + header + data[8 + length :]


def header_length(data: bytes, rng: random.Random) -> bytes:
    """Lie about the header's length."""
    size = rng.choice((0, 1, 2**31, 2**63, 2**64 - 1, len(data), len(data) - 8, rng.randrange(len(data))))
    return size.to_bytes(8, "little") + data[8:]


def rezip(data: bytes, rng: random.Random) -> bytes:
    """Write the archive anew with a mutated pickle or entry, checksums right."""
    if not data.startswith(b"PK"):
        return in_pickle(data, rng)
    buffer = io.BytesIO()
    with zipfile.ZipFile(io.BytesIO(data)) as old, zipfile.ZipFile(buffer, "w") as new:
        victim = rng.choice(old.namelist()) if rng.random() < 0.3 else "archive/data.pkl"
        for name in old.namelist():
            content, method = old.read(name), zipfile.ZIP_STORED
            if name == victim:
                content = rng.choice((flip, cut, repeat, in_pickle))(content or b"0", rng)
                method = zipfile.ZIP_DEFLATED if rng.random() < 0.02 else method
                name = (
                    name
                    if rng.random() > 0.03
                    else rng.choice(("archive/code/x.py", "b/data/0", "../x", name + "0"))
                )
            if rng.random() > 0.005:
                new.writestr(zipfile.ZipInfo(name), content, method)
    return buffer.getvalue()


_PROGRAM_WORDS = (
    *_NUMBERS,
    b"true",
    b'"as_int"',
    b'"as_none"',
    b'"use_pickle"',
    b'"torch.ops.aten.from_file.default"',
    b'"torch.hub.load"',
    b'"x\\"); import os"',
    b"\"Symbol('s0')\"",
    b"\"__import__('os')\"",
    b'{"as_int": 4611686018427387904}',
)


def in_program(data: bytes, rng: random.Random) -> bytes:
    """Write a program's archive anew with a mutated JSON or entry, checksums right."""
    buffer = io.BytesIO()
    with zipfile.ZipFile(io.BytesIO(data)) as old, zipfile.ZipFile(buffer, "w") as new:
        names = old.namelist()
        texts = [name for name in names if name.endswith(".json")]
        victim = rng.choice(texts) if rng.random() < 0.9 else rng.choice(names)
        for name in names:
            content, method = old.read(name), zipfile.ZIP_STORED
            if name == victim:
                change = (
                    json_value if name in texts and rng.random() < 0.85 else rng.choice((flip, cut, repeat))
                )
                content = change(content or b"0", rng)
                method = zipfile.ZIP_DEFLATED if rng.random() < 0.02 else method
                if rng.random() < 0.02:
                    name = rng.choice(("x/data/aotinductor/a.so", "../x", name + "0"))
            if rng.random() > 0.005:
                new.writestr(zipfile.ZipInfo(name), content, method)
    return buffer.getvalue()


def json_value(data: bytes, rng: random.Random) -> bytes:
    """Replace a value somewhere in a JSON text by another one, or copy, drop or rename it."""
    try:
        root = json.loads(data)
    except ValueError:
        return flip(data, rng)
    here = root
    while isinstance(here, dict | list) and here:
        key = rng.choice(list(here) if isinstance(here, dict) else range(len(here)))
        inner = here[key]
        if not isinstance(inner, dict | list) or not inner or rng.random() < 0.15:
            break
        here = inner
    if not isinstance(here, dict | list) or not here:
        return data
    action = rng.random()
    if action < 0.7:
        here[key] = json.loads(rng.choice(_PROGRAM_WORDS))
    elif action < 0.8:
        del here[key]
    elif isinstance(here, dict):
        here[rng.choice(["name", "as_graph", "as_expr", "custom", "x"])] = here[key]
    else:
        here.append(here[key])
    return json.dumps(root).encode()


_OPCODES = b".(01Nacdehjlopqrstu}]bB)JKMXRiP" + bytes(
    (0x80, 0x81, 0x85, 0x86, 0x87, 0x88, 0x89, 0x8A, 0x8B, 0x93, 0x95)
)


def in_pickle(data: bytes, rng: random.Random) -> bytes:
    """Insert or replace an instruction, or swap in a name."""
    names = (
        b"cos\nsystem\n",
        b"cbuiltins\neval\n",
        b"ctorch\nload\n",
        b"ctorch\nFloatStorage\n",
        b"ccollections\nCounter\n",
    )
    piece = rng.choice(
        (*names, bytes([rng.choice(_OPCODES)]), b"J\xff\xff\xff\x7f", b"\x8a\x08" + b"\xff" * 8)
    )
    place = rng.randrange(len(data))
    return data[:place] + piece + data[place + rng.choice((0, len(piece), 1)) :]


def touch(tensors: Mapping[str, torch.Tensor], size: int) -> None:
    """Read every number; none may be there twice or outside the file."""
    for name, tensor in tensors.items():
        if tensor.numel() * tensor.element_size() > size:
            raise OverflowError(f"{name} is larger than its file")
        tensor.sum()


HEADERS: tuple[Mutation, ...] = (json_token, json_token, header_bytes, header_bytes, header_length, flip, cut)
ARCHIVES: tuple[Mutation, ...] = (rezip, rezip, rezip, flip, cut, repeat)
ARRAYS: tuple[Mutation, ...] = (flip, flip, cut, repeat)
PROGRAMS: tuple[Mutation, ...] = (in_program, in_program, in_program, in_program, flip, cut, repeat)


def fuzz(
    seeds: list[bytes], mutations: tuple[Mutation, ...], suffix: str, count: int, seed: int, folder: Path
) -> Counter[str]:
    """Read ``count`` mutated files and count what became of them.

    Raises:
        AssertionError: a file raised anything but a NormsearchError, or made a tensor larger than itself.

    """
    from normsearch import NormsearchError
    from normsearch.admission import admit, programs
    from normsearch.admission.arrays import read_inputs
    from normsearch.admission.record import read

    rng = random.Random(seed)
    outcomes: Counter[str] = Counter()
    for turn in range(count):
        data = rng.choice(mutations)(rng.choice(seeds), rng)
        if rng.random() < 0.2:
            data = rng.choice((flip, cut, repeat))(data, rng) if data else data
        path = (
            folder
            / f"mutated{suffix if rng.random() > 0.05 else rng.choice(('', '.bin', '.safetensors', '.txt'))}"
        )
        # A new file each time: the last one's tensors may still be mapped.
        path.unlink(missing_ok=True)
        path.write_bytes(data)
        try:
            if path.suffix == ".pt2":
                programs.read(path)
                outcomes["read"] += 1
                continue
            if path.suffix == ".npz":
                read_inputs(path)
                outcomes["read"] += 1
                continue
            admitted = admit(path, rng.choice((None,) * 20 + ("model", "absent")))
            read(admitted.metadata, path)
            touch(admitted.tensors, len(data))
            outcomes["read"] += 1
        except NormsearchError as error:
            outcomes[type(error).__name__] += 1
        except BaseException as error:
            raise AssertionError(f"turn {turn}: {type(error).__name__}: {error}") from error
    return outcomes


def note(
    output: Path, kind: str, count: int, seed: int, outcomes: Counter[str], seconds: float, grown: int
) -> None:
    """Write what came of one kind of file beside what a file of results holds of others."""
    held = json.loads(output.read_text()) if output.exists() else {}
    held[kind] = {
        "inputs": count,
        "seed": seed,
        "outcomes": dict(sorted(outcomes.items())),
        "seconds": round(seconds, 1),
        "memory_growth_bytes": grown,
        "torch": torch.__version__,
        "python": platform.python_version(),
        "machine": f"{platform.system()} {platform.machine()}",
    }
    output.parent.mkdir(parents=True, exist_ok=True)
    output.write_text(json.dumps(held, indent=1) + "\n")


def main() -> None:
    """Run every kind; write outcomes, print coverage."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--headers", type=int, default=50_000)
    parser.add_argument("--archives", type=int, default=20_000)
    parser.add_argument("--programs", type=int, default=50_000)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--output", type=Path, default=Path("benchmarks/results/fuzz_admission.json"))
    options = parser.parse_args()
    torch.set_num_threads(1)
    measured = coverage.Coverage(branch=True, source_pkgs=["normsearch.admission"], data_file=None)
    with tempfile.TemporaryDirectory() as folder:
        kinds = (
            ("safetensors", safetensors_seeds, HEADERS, ".safetensors", options.headers),
            ("torch.save", torch_seeds, ARCHIVES, ".pth", options.archives),
            ("torch.export.save", program_seeds, PROGRAMS, ".pt2", options.programs),
            ("numpy.savez", array_seeds, ARRAYS, ".npz", options.archives // 10),
        )
        for name, seeds, mutations, suffix, count in kinds:
            if not count:
                continue
            measured.start()
            files = seeds()
            fuzz(files, mutations, suffix, min(count, MEASURED), options.seed + 1, Path(folder))
            measured.stop()
            before, start = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss, time.perf_counter()
            outcomes = fuzz(files, mutations, suffix, count, options.seed, Path(folder))
            seconds = time.perf_counter() - start
            grown = (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) * 1024
            assert grown < MOST_GROWTH, f"memory grew by {grown:,} bytes"
            note(options.output, name, count, options.seed, outcomes, seconds, grown)
            print(
                f"{name}: {count:,} mutated files in {seconds:.0f} s, no crash, "
                f"largest memory grew by {grown / 2**20:.0f} MiB; {dict(outcomes)}",
                flush=True,
            )
    print(f"branch coverage of normsearch/admission by {MEASURED:,} more of each kind:")
    measured.report(show_missing=True)


if __name__ == "__main__":
    main()
