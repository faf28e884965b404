"""Exported programs of real architectures, converted, beside the converted models: every method, both modes.

    python -m benchmarks.programs [--output programs.jsonl] [--architectures NAME ...] [--methods NAME ...]

Each architecture is exported in eval and in train mode with an open batch size (random BatchNorm numbers,
double precision, small images). Each program is converted, saved, and read by a process that cannot import
normsearch, which runs it at batch sizes 1, 3 and 8 (those that the model itself takes); the converted model
runs on the same inputs from the same random state. ``turns`` gives every site another method, all in turn;
the other methods stand wherever they are not refused. One JSON line for each architecture, mode and method;
what the file holds already is not done again. ``--summary`` prints what it holds; ``--timing FILE`` writes
how long rewriting a ResNet-50 takes, the first one of a process and later ones.
"""

from __future__ import annotations

import argparse
import copy
import glob
import json
import os
import platform
import subprocess
import sys
import tempfile
import time
import warnings
from collections import defaultdict
from collections.abc import Callable, Iterator
from pathlib import Path
from statistics import median
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

import normsearch
from normsearch import METHODS

BATCHES = (1, 3, 8)
#: The largest relative distance that counts as equal.
TOLERANCE = 1e-5
UNIFORM = [
    *(name for name in METHODS if name != "batch"),
    "layer(axes=channel)",
    "weight(mean_only=true)",
    "group(weight_standardization=true)",
    "frozen(trainable=true)",
]
TURNS = "turns"
SPELLINGS = [TURNS, *UNIFORM]


def timm(name: str, size: int = 64, **options: Any) -> tuple[Callable[[], nn.Module], tuple[int, ...]]:
    """Return a maker of one of timm's models, and the shape of a sample."""

    def build() -> nn.Module:
        import timm as library

        model: nn.Module = library.create_model(name, num_classes=10, **options)
        return model

    return build, (3, size, size)


def torchvision(
    name: str, size: int = 64, kind: str = "", **options: Any
) -> tuple[Callable[[], nn.Module], tuple[int, ...]]:
    """Return a maker of one of torchvision's models, and the shape of a sample."""

    def build() -> nn.Module:
        import torchvision as library

        owner = getattr(library.models, kind) if kind else library.models
        model: nn.Module = getattr(owner, name)(weights=None, num_classes=10, **options)
        return model

    return build, (3, 4, size, size) if kind == "video" else (3, size, size)


def unet(encoder: str) -> tuple[Callable[[], nn.Module], tuple[int, ...]]:
    """Return a maker of a Unet, and the shape of a sample."""

    def build() -> nn.Module:
        import segmentation_models_pytorch as library

        model: nn.Module = library.Unet(encoder, encoder_weights=None, decoder_channels=(32, 16, 16, 8, 8))
        return model

    return build, (3, 64, 64)


#: The smaller ones first.
ARCHITECTURES: dict[str, tuple[Callable[[], nn.Module], tuple[int, ...]]] = {
    "timm/test_resnet": timm("test_resnet"),
    "timm/test_byobnet": timm("test_byobnet"),
    "timm/test_efficientnet": timm("test_efficientnet"),
    "timm/resnet10t": timm("resnet10t"),
    "torchvision/vgg11_bn": torchvision("vgg11_bn", 32),
    "torchvision/resnet18": torchvision("resnet18"),
    "timm/darknet17": timm("darknet17"),
    "timm/resnet14t": timm("resnet14t"),
    "torchvision/r3d_18": torchvision("r3d_18", 32, "video"),
    "torchvision/mc3_18": torchvision("mc3_18", 32, "video"),
    "torchvision/r2plus1d_18": torchvision("r2plus1d_18", 32, "video"),
    "timm/repvgg_a0": timm("repvgg_a0", 32),
    "timm/skresnet18": timm("skresnet18"),
    "timm/lcnet_035": timm("lcnet_035"),
    "timm/tinynet_e": timm("tinynet_e"),
    "timm/mobilenetv3_small_050": timm("mobilenetv3_small_050"),
    "timm/tf_mobilenetv3_small_minimal_100": timm("tf_mobilenetv3_small_minimal_100"),
    "timm/mobilenetv4_conv_small_050": timm("mobilenetv4_conv_small_050"),
    "torchvision/mobilenet_v3_small": torchvision("mobilenet_v3_small"),
    "timm/semnasnet_050": timm("semnasnet_050"),
    "timm/mnasnet_050": timm("mnasnet_050"),
    "torchvision/mnasnet0_5": torchvision("mnasnet0_5"),
    "timm/mobilenetv2_035": timm("mobilenetv2_035"),
    "torchvision/mobilenet_v2": torchvision("mobilenet_v2", 32),
    "timm/regnetx_002": timm("regnetx_002"),
    "timm/regnety_002": timm("regnety_002"),
    "torchvision/regnet_y_400mf": torchvision("regnet_y_400mf", 32),
    "torchvision/shufflenet_v2_x0_5": torchvision("shufflenet_v2_x0_5"),
    "timm/ese_vovnet19b_dw": timm("ese_vovnet19b_dw"),
    "timm/gernet_s": timm("gernet_s"),
    "timm/efficientnet_lite0": timm("efficientnet_lite0", 32),
    "timm/fbnetc_100": timm("fbnetc_100", 32),
    "timm/hardcorenas_a": timm("hardcorenas_a", 32),
    "timm/spnasnet_100": timm("spnasnet_100", 32),
    "timm/seresnext26d_32x4d": timm("seresnext26d_32x4d", 32),
    "timm/mobilevit_xxs": timm("mobilevit_xxs"),
    "timm/ghostnet_050": timm("ghostnet_050"),
    "timm/levit_128s": timm("levit_128s", 224),
    "timm/mixnet_s": timm("mixnet_s"),
    "timm/rexnet_100": timm("rexnet_100", 32),
    "timm/selecsls42": timm("selecsls42"),
    "timm/repghostnet_050": timm("repghostnet_050"),
    "smp/unet_resnet18": unet("resnet18"),
    "torchvision/lraspp_mobilenet_v3_large": torchvision(
        "lraspp_mobilenet_v3_large", 64, "segmentation", weights_backbone=None
    ),
    "torchvision/efficientnet_b0": torchvision("efficientnet_b0", 32),
    "timm/dla34": timm("dla34", 32),
    "torchvision/resnet50": torchvision("resnet50", 32),
}


def built(name: str, *, training: bool) -> nn.Module:
    """Return an architecture with random numbers in its BatchNorm layers, in double precision."""
    torch.manual_seed(0)
    model = ARCHITECTURES[name][0]()
    generator = torch.Generator().manual_seed(0)
    for module in model.modules():
        if isinstance(module, nn.modules.batchnorm._BatchNorm):
            with torch.no_grad():
                module.weight.uniform_(0.5, 1.5, generator=generator)
                module.bias.normal_(0, 0.1, generator=generator)
                if module.running_mean is not None and module.running_var is not None:
                    module.running_mean.normal_(0, 0.1, generator=generator)
                    module.running_var.uniform_(0.5, 2, generator=generator)
                    assert module.num_batches_tracked is not None
                    module.num_batches_tracked.fill_(3)
    return model.double().train(training)


def drawn(name: str, batch: int) -> Tensor:
    """Return inputs of an architecture."""
    generator = torch.Generator().manual_seed(batch)
    return torch.randn(batch, *ARCHITECTURES[name][1], generator=generator, dtype=torch.float64)


#: What the other process runs: torch alone, and a line of JSON for each program.
_READER = """
import json, sys
sys.modules["normsearch"] = None
import torch
from torch.utils._pytree import tree_leaves
torch.set_num_threads(1)
for line in sys.stdin:
    work = json.loads(line)
    results = []
    program = torch.export.load(work["program"]).module()
    tensors = [*program.parameters(), *program.buffers()]
    numbers = [tensor.detach().clone() for tensor in tensors]
    for given in work["inputs"]:
        # Each from the numbers in the file: a forward pass in train mode moves running statistics.
        with torch.no_grad():
            for tensor, value in zip(tensors, numbers, strict=True):
                tensor.copy_(value)
        torch.manual_seed(1)
        try:
            with torch.no_grad():
                output = program(torch.load(given))
            results.append([x for x in tree_leaves(output) if isinstance(x, torch.Tensor)])
        except Exception as error:
            results.append(f"{type(error).__name__}: {error}"[:300])
    torch.save(results, work["results"])
    print("done", flush=True)
"""


class Reader:
    """A process without normsearch that runs programs from files."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        script = folder / "reader.py"
        script.write_text(_READER)
        self._process = subprocess.Popen(
            [sys.executable, "-W", "ignore", str(script)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            cwd=folder,
            env={"PATH": "/usr/bin:/bin", "OMP_NUM_THREADS": "1"},
        )

    def run(self, program: Path, inputs: list[Path]) -> list[list[Tensor] | str]:
        """Return the outputs of a program for each input."""
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        results = self._folder / "results.pt"
        work = {"program": str(program), "inputs": [str(path) for path in inputs], "results": str(results)}
        self._process.stdin.write(json.dumps(work) + "\n")
        self._process.stdin.flush()
        if self._process.stdout.readline().strip() != "done":
            raise RuntimeError(f"the reader ended with {self._process.wait()}")
        found: list[list[Tensor] | str] = torch.load(results)
        return found

    def close(self) -> None:
        """End it."""
        assert self._process.stdin is not None
        self._process.stdin.close()
        self._process.wait()


def measured(
    name: str, model: nn.Module, program: Any, spelling: str, reader: Reader, folder: Path
) -> dict[str, Any]:
    """Convert a program and the model alike and compare them."""
    inputs = drawn(name, 3)
    choice = _choice(spelling, program)
    # The same methods at the same sites. Where a model and its program differ in what they refuse (a program
    # shows that a convolution is a plain one, and may leave the batch size open) or in the activation that a
    # method replaces (a model that cannot be traced does not show it), BatchNorm is frozen.
    wanted = normsearch.explain(model, choice, inputs=inputs)
    plan = {row.site.path: row.method or METHODS["batch"]() for row in wanted.rows}
    of_model, of_program = (
        {row.site.path: (row.method, row.method is not None and row.method.absorbs(row.site)) for row in rows}
        for rows in (wanted.rows, normsearch.explain(program, choice).rows)
    )
    differing = [path for path in plan if of_program.get(path) != of_model[path]]
    plan |= {path: normsearch.parse_method("frozen") for path in differing}
    to: dict[str, list[str | normsearch.Method]] = {
        glob.escape(path): [method, "batch"] for path, method in plan.items()
    }
    start = time.process_time()
    try:
        converted = normsearch.convert(program, to)
    except normsearch.NormsearchError as error:
        return {"error": str(error)[:300]}
    seconds = time.process_time() - start
    path = folder / "converted.pt2"
    torch.export.save(converted, path)
    eager = normsearch.convert(model, to, inputs=inputs)
    expected: list[list[Tensor] | None] = []
    files = []
    for batch in BATCHES:
        x = drawn(name, batch)
        files.append(folder / f"inputs-{batch}.pt")
        torch.save(x, files[-1])
        torch.manual_seed(1)
        try:
            with torch.no_grad():
                output = copy.deepcopy(eager)(x)
            expected.append([y for y in tree_leaves(output) if isinstance(y, Tensor)])
        except Exception:
            # In train mode BatchNorm refuses a single value per channel.
            expected.append(None)
    distances = {}
    for batch, outputs, found in zip(BATCHES, expected, reader.run(path, files), strict=True):
        if outputs is not None:
            distances[batch] = found if isinstance(found, str) else _distance(outputs, found)
    names = (
        {spelling.partition("(")[0]} if spelling != TURNS else {name for name in METHODS if name != "batch"}
    )
    return {
        "distances": distances,
        "sites": len(plan),
        "with_method": sum(method.name in names for method in plan.values()),
        "differing_plans": len(differing),
        "cpu_seconds": round(seconds, 3),
    }


def _choice(spelling: str, program: Any) -> Any:
    if spelling != TURNS:
        return [spelling, "frozen", "batch"]
    places = enumerate(normsearch.find_sites(program))
    return {site.path: [*UNIFORM[i % len(UNIFORM) :], *UNIFORM, "batch"] for i, site in places}


def _distance(wanted: list[Tensor], found: list[Tensor]) -> float:
    if [x.shape for x in wanted] != [x.shape for x in found]:
        return float("inf")
    pairs = [(a, b) for a, b in zip(wanted, found, strict=True) if a.is_floating_point()]
    return max(float((b - a).norm() / a.norm().clamp_min(1e-300)) for a, b in pairs)


def results(path: Path) -> Iterator[dict[str, Any]]:
    """Yield what a file of results holds."""
    if path.exists():
        for line in path.read_text().splitlines():
            yield json.loads(line)


def run(names: list[str], spellings: list[str], output: Path) -> None:
    """Measure what ``output`` does not hold yet."""
    done = {(row["architecture"], row["mode"], row["method"]) for row in results(output)}
    with tempfile.TemporaryDirectory() as temporary, output.open("a") as file:
        folder = Path(temporary)
        reader = Reader(folder)
        for name in names:
            for mode in ("eval", "train"):
                missing = [s for s in spellings if (name, mode, s) not in done]
                if not missing:
                    continue
                model = built(name, training=mode == "train")
                try:
                    with warnings.catch_warnings():
                        warnings.simplefilter("ignore")
                        program = torch.export.export(
                            copy.deepcopy(model),
                            (drawn(name, 3),),
                            dynamic_shapes=({0: torch.export.Dim("batch")},),
                            strict=False,
                        )
                        torch.export.save(program, folder / "original.pt2")
                        program = torch.export.load(folder / "original.pt2")
                except Exception as error:
                    print(
                        f"{name} {mode}: not exported: {type(error).__name__}: {str(error)[:200]}", flush=True
                    )
                    continue
                for spelling in missing:
                    row = {"architecture": name, "mode": mode, "method": spelling}
                    row |= measured(name, copy.deepcopy(model), program, spelling, reader, folder)
                    file.write(json.dumps(row) + "\n")
                    file.flush()
                    print(name, mode, spelling, row.get("distances", row.get("error")), flush=True)
        reader.close()


def summary(path: Path) -> None:
    """Print what a file of results says."""
    rows = list(results(path))
    by_method: dict[str, list[dict[str, Any]]] = defaultdict(list)
    for row in rows:
        by_method[row["method"]].append(row)
    print(f"{len({row['architecture'] for row in rows})} architectures, {len(rows)} programs")
    print("method | programs | equal | largest distance | refused | CPU seconds, median")
    for spelling, own in by_method.items():
        measured_rows = [row for row in own if "distances" in row]
        distances = [d for row in measured_rows for d in row["distances"].values()]
        numbers = [d for d in distances if isinstance(d, float)]
        equal = sum(
            all(isinstance(d, float) and d <= TOLERANCE for d in row["distances"].values())
            for row in measured_rows
        )
        seconds = sorted(row["cpu_seconds"] for row in measured_rows) or [0.0]
        print(
            f"{spelling} | {len(measured_rows)} | {equal} | {max(numbers, default=0):.1e} | "
            f"{len(own) - len(measured_rows)} | {seconds[len(seconds) // 2]:.2f}"
        )


#: What a process of its own runs: the first rewriting in it, and more.
_TIMER = """
import json, sys, time
import torch, normsearch
torch.set_num_threads(1)
program = torch.export.load(sys.argv[1])
before, times = set(sys.modules), []
for _ in range(4):
    start = time.perf_counter(), time.process_time()
    normsearch.convert(program, [sys.argv[2], "frozen"])
    times.append((time.perf_counter() - start[0], time.process_time() - start[1]))
    imported = sorted(set(sys.modules) - before)
print(json.dumps({"times": times, "imported": imported}))
"""


def timing(output: Path, spellings: list[str], runs: int) -> None:
    """Measure how long rewriting a ResNet-50 takes: without export, load and save, in fresh processes."""
    import torchvision as library

    model = library.models.resnet50().eval()
    found: dict[str, Any] = json.loads(output.read_text()) if output.exists() else {"methods": {}}
    found["network"] = "torchvision/resnet50, eval, 224 x 224, open batch size, single precision"
    found["versions"] = {
        "torch": torch.__version__,
        "python": platform.python_version(),
        "machine": f"{platform.system()} {platform.machine()}",
        "threads": 1,
    }
    with tempfile.TemporaryDirectory() as temporary:
        path = Path(temporary) / "resnet50.pt2"
        shapes = ({0: torch.export.Dim("batch")},)
        program = torch.export.export(
            model, (torch.randn(2, 3, 224, 224),), dynamic_shapes=shapes, strict=False
        )
        torch.export.save(program, path)
        del program, model
        print("convert(program, method): seconds of CPU, median (least)")
        for spelling in spellings:
            measured_runs = []
            for _ in range(runs):
                command = [sys.executable, "-W", "ignore", "-c", _TIMER, str(path), spelling]
                done = subprocess.run(command, capture_output=True, text=True, check=True)
                measured_runs.append(json.loads(done.stdout))
            firsts = [run["times"][0] for run in measured_runs]
            others = [pair for run in measured_runs for pair in run["times"][1:]]
            found["methods"][spelling] = row = {
                "first": _spread(firsts),
                "again": _spread(others),
                "imported": measured_runs[0]["imported"],
            }
            found["load_average"] = [round(part, 1) for part in os.getloadavg()]
            output.write_text(json.dumps(found, indent=1) + "\n")
            print(
                f"{spelling}: first {row['first']['cpu_median']} ({row['first']['cpu_least']}), "
                f"again {row['again']['cpu_median']} ({row['again']['cpu_least']})",
                flush=True,
            )


def _spread(pairs: list[list[float]]) -> dict[str, Any]:
    wall, cpu = zip(*pairs, strict=True)
    return {
        "wall_least": round(min(wall), 3),
        "wall_median": round(median(wall), 3),
        "cpu_least": round(min(cpu), 3),
        "cpu_median": round(median(cpu), 3),
        "runs": len(pairs),
    }


def main() -> None:
    """Run, or print a summary."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--output", type=Path, default=Path("programs.jsonl"))
    parser.add_argument("--architectures", nargs="*", default=list(ARCHITECTURES))
    parser.add_argument("--methods", nargs="*", default=SPELLINGS)
    parser.add_argument("--summary", action="store_true")
    parser.add_argument("--timing", type=Path, metavar="FILE")
    parser.add_argument("--runs", type=int, default=5)
    options = parser.parse_args()
    torch.set_num_threads(1)
    if options.timing:
        timing(options.timing, [name for name in options.methods if name != TURNS], options.runs)
    elif options.summary:
        summary(options.output)
    else:
        run(options.architectures, options.methods, options.output)
        summary(options.output)


if __name__ == "__main__":
    main()
