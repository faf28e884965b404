"""Mutated ONNX files against admission: no crash, no foreign error, no memory beyond the file's size.

    python -m benchmarks.fuzz_onnx [--files 60000] [--seed 0]
        [--output benchmarks/results/fuzz_admission.json]

Mutates bytes, wire structure and fields of small valid models. Each must be read, or be refused with a
NormsearchError; of what is read, sites are found, and what can be converted is, and written. A crash of the
process, another exception or growing memory fails the run. Outcomes are written beside those of other kinds
of files (``benchmarks.fuzz_admission``). Prints the branch coverage of the admission code.
"""

from __future__ import annotations

import argparse
import random
import resource
import time
from collections import Counter
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

import coverage
import numpy as np
import onnx
import torch
from onnx import TensorProto, helper

from benchmarks.fuzz_admission import MEASURED, MOST_GROWTH, cut, flip, note, repeat

_SIZES = [0, 1, 2, 3, 4, 5, -1, 2**31, 2**40, 2**62]
_WORDS = (
    "",
    "x",
    "y",
    "w",
    "Relu",
    "If",
    "com.microsoft",
    "a\nb",
    "\u202e",
    "Constant",
    "BatchNormalization",
)


def _norm(x: str, y: str, channels: int, name: str) -> tuple[onnx.NodeProto, list[TensorProto]]:
    rng = np.random.default_rng(0)
    tensors = [
        onnx.numpy_helper.from_array(rng.uniform(0.5, 2, channels).astype(np.float32), f"{name}.{key}")
        for key in ("scale", "bias", "mean", "variance")
    ]
    inputs = [x, *(tensor.name for tensor in tensors)]
    return helper.make_node("BatchNormalization", inputs, [y], name, epsilon=1e-3), tensors


def _value(name: str, *sizes: int | str) -> onnx.ValueInfoProto:
    return helper.make_tensor_value_info(name, TensorProto.FLOAT, sizes)


def _model(graph: onnx.GraphProto, opset: int) -> bytes:
    made = helper.make_model(graph, opset_imports=[helper.make_opsetid("", opset)], ir_version=8)
    made.metadata_props.add(key="author", value="somebody")
    onnx.checker.check_model(made, full_check=True)
    return bytes(made.SerializeToString())


def seeds() -> list[bytes]:
    """Return valid files: a chain with a convolution and Constant nodes, a branch, a matrix product."""
    rng = np.random.default_rng(1)
    weight = onnx.numpy_helper.from_array(rng.normal(size=(4, 2, 3, 3)).astype(np.float32), "weight")
    norm, tensors = _norm("z", "n", 4, "norm")
    constants = [
        helper.make_node("Constant", [], [tensor.name], value=tensor) for tensor in (weight, *tensors)
    ]
    convolution = helper.make_node("Conv", ["x", "weight"], ["z"], "conv", pads=[1, 1, 1, 1], group=1)
    nodes = [*constants, convolution, norm, helper.make_node("Relu", ["n"], ["y"], "act")]
    chain = helper.make_graph(nodes, "chain", [_value("x", "N", 2, 5, 5)], [_value("y", "N", 4, 5, 5)])

    inner, inside = _norm("x", "a", 2, "inner")
    branches = (
        helper.make_graph([inner], "then", [], [_value("a", "N", 2, 3)], inside),
        helper.make_graph([helper.make_node("Neg", ["x"], ["b"])], "else", [], [_value("b", "N", 2, 3)]),
    )
    node = helper.make_node("If", ["c"], ["y"], "if", then_branch=branches[0], else_branch=branches[1])
    condition = helper.make_tensor("c", TensorProto.BOOL, [], [True])
    branch = helper.make_graph(
        [node], "branch", [_value("x", "N", 2, 3)], [_value("y", "N", 2, 3)], [condition]
    )

    norm, tensors = _norm("z", "y", 3, "norm")
    matrix = helper.make_tensor("m", TensorProto.FLOAT, [2, 3], list(range(6)))
    product = helper.make_graph(
        [helper.make_node("MatMul", ["x", "m"], ["z"], "product"), norm],
        "product",
        [_value("x", "N", 2)],
        [_value("y", "N", 3)],
        [matrix, *tensors],
        value_info=[_value("z", "N", 3)],
    )
    return [_model(chain, 11), _model(chain, 21), _model(branch, 17), _model(product, 9)]


def _messages(message: Any) -> list[Any]:
    """Return a message and every message inside it."""
    found = [message]
    for field, value in message.ListFields():
        if field.message_type is not None:
            for inner in value if field.is_repeated else [value]:
                found += _messages(inner)
    return found


def _number(rng: random.Random, kind: str) -> Any:
    if kind == "float":
        return rng.choice((0.0, -1.0, 1e-30, 1e38, float("nan"), float("inf")))
    return rng.choice((*_SIZES, *range(26)))


def in_fields(data: bytes, rng: random.Random) -> bytes:
    """Change, add, remove or repeat fields of the parsed model."""
    model = onnx.ModelProto.FromString(data)
    for _ in range(rng.randint(1, 3)):
        message = rng.choice(_messages(model))
        field = rng.choice(message.DESCRIPTOR.fields)
        # Numbers without a name cannot be set; ``splice`` and ``flip`` write those.
        with suppress(ValueError):
            _change(message, field, rng)
    return bytes(model.SerializeToString())


def _change(message: Any, field: Any, rng: random.Random) -> None:
    """Change one field of a message; what does not fit it is left out."""
    if rng.random() < 0.15:
        message.ClearField(field.name)
        return
    value = getattr(message, field.name)
    if field.message_type is not None:
        inner = value.add() if field.is_repeated else value
        present = [other for other in value if other is not inner] if field.is_repeated else []
        inner.CopyFrom(rng.choice(present)) if present else inner.SetInParent()
        return
    if field.type in (field.TYPE_STRING, field.TYPE_BYTES):
        new: Any = rng.choice(_WORDS)
        new = new if field.type == field.TYPE_STRING else new.encode() * rng.randint(0, 9)
    else:
        new = _number(rng, "float" if field.type in (field.TYPE_FLOAT, field.TYPE_DOUBLE) else "int")
        if field.type not in (field.TYPE_FLOAT, field.TYPE_DOUBLE, field.TYPE_INT64):
            new = abs(new) % 30
    if not field.is_repeated:
        setattr(message, field.name, new)
    elif value and rng.random() < 0.6:
        value[rng.randrange(len(value))] = new
    else:
        value.append(new)


def splice(data: bytes, rng: random.Random) -> bytes:
    """Put a field with a number, wire type and length of its own somewhere."""
    tag = rng.choice((rng.randrange(256), 0x3A, 0x0A, 0x2A, 0x6A))
    body = bytes(rng.randrange(256) for _ in range(rng.choice((0, 1, 2, 8))))
    length = rng.choice((len(body), len(body), 0x7F, 0x80, 0xFF))
    place = rng.choice((0, len(data), rng.randrange(len(data))))
    return data[:place] + bytes([tag, length & 0xFF]) + body + data[place:]


Mutation = Callable[[bytes, random.Random], bytes]
MUTATIONS: tuple[Mutation, ...] = (in_fields, in_fields, in_fields, flip, flip, cut, repeat, splice)


def fuzz(files: list[bytes], count: int, seed: int) -> Counter[str]:
    """Read ``count`` mutated files and count what became of them.

    Raises:
        AssertionError: a file raised anything but a NormsearchError, or holds more numbers than bytes.

    """
    from normsearch import METHODS, NormsearchError, onnx_graph
    from normsearch.admission.onnx_files import admitted
    from normsearch.onnx_graph.files import as_proto, deserialized

    rng, path = random.Random(seed), Path("mutated.onnx")
    outcomes: Counter[str] = Counter()
    for turn in range(count):
        data = rng.choice(MUTATIONS)(rng.choice(files), rng)
        if rng.random() < 0.1 and data:
            data = rng.choice((flip, cut, repeat))(data, rng)
        try:
            model = deserialized(admitted(data, path), path)
            for value in model.graph.initializers.values():
                assert value.const_value is None or value.const_value.numpy().nbytes <= len(data)
            outcomes["read"] += 1
            to = [rng.choice(list(METHODS)), "group", "frozen"]
            as_proto(onnx_graph.convert(model, to)).SerializeToString()
            outcomes["converted"] += 1
        except NormsearchError as error:
            outcomes[type(error).__name__] += 1
        except BaseException as error:
            raise AssertionError(f"turn {turn}: {type(error).__name__}: {error}") from error
    return outcomes


def main() -> None:
    """Fuzz and print outcomes, memory and coverage."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--files", type=int, default=60_000)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--output", type=Path, default=Path("benchmarks/results/fuzz_admission.json"))
    options = parser.parse_args()
    torch.set_num_threads(1)
    files, sources = seeds(), ["normsearch.admission.onnx_files", "normsearch.admission.protobuf"]
    measured = coverage.Coverage(branch=True, source_pkgs=sources, data_file=None)
    measured.start()
    fuzz(files, min(options.files, MEASURED), options.seed + 1)
    measured.stop()
    before, start = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss, time.perf_counter()
    outcomes = fuzz(files, options.files, options.seed)
    seconds = time.perf_counter() - start
    grown = (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) * 1024
    assert grown < MOST_GROWTH, f"memory grew by {grown:,} bytes"
    note(options.output, "ONNX", options.files, options.seed, outcomes, seconds, grown)
    print(
        f"ONNX: {options.files:,} mutated files in {seconds:.0f} s, no crash, "
        f"largest memory grew by {grown / 2**20:.0f} MiB; {dict(outcomes)}"
    )
    print(f"branch coverage of the admission of ONNX files by {MEASURED:,} more:")
    measured.report(show_missing=True)


if __name__ == "__main__":
    main()
