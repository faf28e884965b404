"""Forward and backward of every layer beside BatchNorm, GroupNorm and the formula as usually written.

    python -m benchmarks.layers                     everything: most of the time is compiling
    python -m benchmarks.layers --modes eager --threads 1
    python -m benchmarks.layers --only-page         write docs/layers.md from the results that are there

Cells are merged into benchmarks/results/layers.json, so a part can be measured again. Contenders take turns;
a cell is the median of five turns, its ratio the median of the five ratios within a turn. With one thread the
clock is the process' own, which other processes do not move; with two it is the wall's. glibc is told to keep
freed memory: asking the kernel for the same pages in every pass costs more than the passes.

Bars, on one thread: eager at most 0.8 × BatchNorm on the two large shapes, 1.5 × there in channels_last,
2.5 × on the small shape; compiled at most 0.35 × (1.2 × in channels_last) of eager BatchNorm; at least 5 ×
faster than a straightforward switchable and 3 × than a straightforward batch_instance on the large shapes;
weight(mean_only=true), weight included, at most 1 × on them.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from statistics import median
from typing import Any

import torch
import torch._dynamo.config
import torch._inductor.config
from rich.console import Console
from rich.table import Table
from torch import Tensor, nn

from benchmarks import formulas
from normsearch.methods.batch_instance import BatchInstanceNorm
from normsearch.methods.batch_renorm import BatchRenorm
from normsearch.methods.filter_response import FilterResponseNorm
from normsearch.methods.ghost import GhostBatchNorm
from normsearch.methods.ibn import InstanceBatchNorm
from normsearch.methods.sparse_switchable import SparseSwitchableNorm
from normsearch.methods.switchable import SwitchableNorm
from normsearch.methods.weight import MeanOnlyBatchNorm, WeightNorm

RESULTS = Path(__file__).parent / "results" / "layers.json"
PAGE = Path(__file__).parent.parent / "docs" / "layers.md"
SHAPES = ((32, 64, 56, 56), (8, 256, 28, 28), (2, 512, 14, 14))
LARGE = SHAPES[:2]
FORMATS = {"contiguous": torch.contiguous_format, "channels_last": torch.channels_last}
MODES = ("eager", "compiled")
TURNS = 5
#: Seconds that a contender's turn takes at least.
TURN = 0.06
#: Set before the process starts: the memory of freed tensors stays with it.
KEEP_MEMORY = {
    "MALLOC_MMAP_THRESHOLD_": str(2**32 - 1),
    "MALLOC_TRIM_THRESHOLD_": str(2**32 - 1),
    "MALLOC_TOP_PAD_": str(2**28),
}

Run = Callable[[], object]
#: Milliseconds of each turn by contender, by cell.
Cells = dict[str, dict[str, list[float]]]

#: normsearch's layer and the straightforward one.
LAYERS: dict[str, tuple[Callable[[int, int], nn.Module], Callable[[int, int], nn.Module]]] = {
    "switchable": (lambda n, c: SwitchableNorm(c), lambda n, c: formulas.Switchable(c)),
    "sparse_switchable": (lambda n, c: SparseSwitchableNorm(c), lambda n, c: formulas.SparseSwitchable(c)),
    "batch_instance": (lambda n, c: BatchInstanceNorm(c), lambda n, c: formulas.BatchInstance(c)),
    "batch_renorm": (lambda n, c: BatchRenorm(c), lambda n, c: formulas.BatchRenorm(c)),
    "ibn": (lambda n, c: InstanceBatchNorm(c), lambda n, c: formulas.InstanceBatch(c)),
    "ghost": (
        lambda n, c: GhostBatchNorm(c, size=chunk(n)),
        lambda n, c: formulas.Ghost(c, chunk(n)),
    ),
    "filter_response": (lambda n, c: FilterResponseNorm(c), lambda n, c: formulas.FilterResponse(c)),
}
MEAN_ONLY = "weight(mean_only=true)"
LEAST_SPEEDUP = {"switchable": 5.0, "batch_instance": 3.0}


def chunk(samples: int) -> int:
    """Return ghost's chunk: a quarter of the batch, and at least two samples."""
    return max(2, samples // 4)


def key(shape: tuple[int, ...], layout: str, threads: int, mode: str) -> str:
    """Return a cell's name in the results."""
    return f"{'x'.join(map(str, shape))} {layout} {threads} {mode}"


def passes(layer: nn.Module, x: Tensor, grad: Tensor) -> Run:
    """Return a run of forward and backward; gradients of the parameters accumulate, as in a training step."""

    def run() -> None:
        layer(x).backward(grad)
        x.grad = None

    return run


def weight_passes(channels: int, x: Tensor, grad: Tensor) -> Run:
    """Return a run of weight normalization of a 3 × 3 convolution and mean-only batch norm of its output."""
    conv = WeightNorm.normalized(nn.Conv2d(channels, channels, 3))
    layer, direction = MeanOnlyBatchNorm(channels), torch.randn(channels, channels, 3, 3)

    def run() -> None:
        torch.autograd.backward((conv.weight, layer(x)), (direction, grad))
        x.grad = None

    return run


def contenders(shape: tuple[int, ...], layout: str, mode: str) -> Iterator[tuple[str, Run]]:
    """Yield what takes turns in a cell; ratios are to the first, eager BatchNorm."""
    n, c = shape[:2]
    x, grad = (torch.randn(shape).to(memory_format=FORMATS[layout]) for _ in range(2))
    x.requires_grad_()
    yield "batch", passes(nn.BatchNorm2d(c), x, grad)
    yield "group", passes(nn.GroupNorm(c // 16, c), x, grad)
    # What filter_response replaces: it clips its output itself.
    yield "batch, then ReLU", passes(nn.Sequential(nn.BatchNorm2d(c), nn.ReLU()), x, grad)
    if mode == "compiled":
        torch.compiler.reset()
        for name, layer in (
            ("batch", nn.BatchNorm2d(c)),
            *((name, ours(n, c)) for name, (ours, _) in LAYERS.items()),
        ):
            layer.compile(fullgraph=True)
            run = passes(layer, x, grad)
            run()
            yield f"compiled {name}", run
        return
    for name, (ours, straightforward) in LAYERS.items():
        yield name, passes(ours(n, c), x, grad)
        yield f"straightforward {name}", passes(straightforward(n, c), x, grad)
    yield MEAN_ONLY, weight_passes(c, x, grad)


def measure(runs: dict[str, Run], threads: int) -> dict[str, list[float]]:
    """Return milliseconds per pass of every contender's turns."""
    clock = time.process_time if threads == 1 else time.perf_counter
    torch.set_num_threads(threads)
    repeats = {}
    for name, run in runs.items():
        run()
        start = clock()
        run()
        repeats[name] = max(1, round(TURN / max(clock() - start, 1e-6)))
    times: dict[str, list[float]] = {name: [] for name in runs}
    for _ in range(TURNS):
        for name, run in runs.items():
            run()
            start = clock()
            for _ in range(repeats[name]):
                run()
            times[name].append((clock() - start) / repeats[name] * 1e3)
    return times


def ratio(times: dict[str, list[float]], name: str, base: str = "batch") -> float:
    """Return the median of a contender's ratios to another's in the same turn."""
    return median(a / b for a, b in zip(times[name], times[base], strict=True))


def bar(name: str, shape: tuple[int, ...], layout: str, mode: str) -> float | None:
    """Return the ratio to eager BatchNorm that a contender may have on one thread."""
    last, large = layout == "channels_last", shape in LARGE
    if name == MEAN_ONLY:
        return 1.0 if large and not last else None
    if mode == "compiled":
        wanted = name.startswith("compiled ") and name != "compiled batch"
        return (1.2 if last else 0.35) if wanted else None
    if name not in LAYERS:
        return None
    return (1.5 if last else 0.8) if large else 2.5


def misses(cells: Cells) -> list[str]:
    """Return what falls short of its bar, in words."""
    found = []
    for shape in SHAPES:
        for layout in FORMATS:
            for mode in MODES:
                times = cells.get(key(shape, layout, 1, mode), {})
                where = f"{'×'.join(map(str, shape))}, {layout}"
                for name in times:
                    most, got = bar(name, shape, layout, mode), ratio(times, name)
                    if most is not None and got > most:
                        found.append(f"{name} at {where}: {got:.2f} × BatchNorm, asked {most}")
                if mode == "eager" and shape in LARGE and times:
                    for name, least in LEAST_SPEEDUP.items():
                        got = ratio(times, f"straightforward {name}", name)
                        if got < least:
                            found.append(
                                f"{name} at {where}: {got:.1f} × faster than straightforward, asked {least:g}"
                            )
    return found


def rows(cells: Cells) -> Iterator[tuple[str, ...]]:
    """Yield a row per contender and cell: where, who, milliseconds, ratios with their spread, bar."""
    for shape in SHAPES:
        for layout in FORMATS:
            for threads in (1, 2):
                for mode in MODES:
                    times = cells.get(key(shape, layout, threads, mode), {})
                    for name in times:
                        spread = [a / b for a, b in zip(times[name], times["batch"], strict=True)]
                        most = bar(name, shape, layout, mode) if threads == 1 else None
                        yield (
                            "×".join(map(str, shape)),
                            layout,
                            str(threads),
                            mode,
                            name,
                            f"{median(times[name]):.2f}",
                            f"{median(spread):.2f} ({min(spread):.2f} to {max(spread):.2f})",
                            f"{ratio(times, name, 'group'):.2f}",
                            "" if most is None else f"{most}{'' if median(spread) <= most else ' missed'}",
                        )


COLUMNS = ("shape", "format", "threads", "mode", "layer", "ms", "× BatchNorm", "× GroupNorm", "bar")


def page(results: dict[str, Any]) -> str:
    """Return docs/layers.md."""
    cells, versions = results["cells"], results["versions"]
    missed = misses(cells)
    lines = [
        "# How fast the layers are",
        "",
        "Written by `python -m benchmarks.layers`; do not edit. Forward and backward in training:",
        f"torch {versions['torch']}, Python {versions['python']}, {versions['machine']}",
        f"(load average when last started: {versions['load']}).",
        "*Straightforward* is the formula as public code writes it (`benchmarks/formulas.py`), *compiled* is",
        "`torch.compile(fullgraph=True)`. Ratios are medians of five turns, with the least and the most;",
        "compiled layers are compared with eager BatchNorm too. The benchmark says how it measures.",
        "Nothing here was measured on a GPU.",
        "",
        "## Bars",
        "",
        *(
            [f"{len(missed)} missed on one thread:", "", *(f"- {text}" for text in missed), "", *WHY]
            if missed
            else ["Every bar on one thread is met."]
        ),
        "",
        "## Every cell",
        "",
        "| " + " | ".join(COLUMNS) + " |",
        "|" + " --- |" * len(COLUMNS),
        *("| " + " | ".join(row) + " |" for row in rows(cells)),
        "",
    ]
    return "\n".join(lines)


WHY = [
    "Where they come from: an eager pass reads x twice forward, and x and dy twice backward; BatchNorm in",
    "channels_last needs no more, so there the rule is left: some forty operations on (N, C) numbers,",
    "of a few microseconds each, which weigh most on the small shape. dx takes two kernels",
    "where BatchNorm's takes one: torch has no CPU kernel for a·dy + b·x + c with numbers per row.",
    "Nor does it help to take eager passes a block at a time (1.2 to 2 times as long), or to fold the",
    "clipping of filter_response into fewer sums (within noise). filter_response contains an activation:",
    "*batch, then ReLU* is what it replaces.",
    "",
    "Compiled passes read and write eight times the size of x, of which little stays in a cache on the",
    "largest shape: at the 23 GB/s that one core got from memory here, 8.9 ms, where eager BatchNorm",
    "spends 20 on arithmetic; within an hour these cells came out at .38 to .43 and at .45 to .51. On the",
    "small shape a compiled call costs .12 ms before it computes anything (guards, autograd), and .29",
    "with switchable's parameters and buffers. In channels_last inductor sums in strides: large maps take",
    "the eager kernels, behind operators that it calls as they are (1.2 instead of 1.5 on the largest",
    "shape; on the middle one 1.6 instead of 1.4, so that it sums there itself, and for filter_response",
    "everywhere, which would have to write what passes its threshold: 1.8 instead of 1.4). Sums in two",
    "stages took 1.2 times as long; a first pass in reverse, so that the second finds the end of x in the",
    "cache, was within noise.",
]


def main() -> int:
    """Measure, print and write; 1 if a bar is missed."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    names = ["x".join(map(str, shape)) for shape in SHAPES]
    parser.add_argument("--modes", nargs="+", choices=MODES, default=MODES)
    parser.add_argument("--threads", nargs="+", type=int, choices=(1, 2), default=(1, 2))
    parser.add_argument("--shapes", nargs="+", choices=names, default=names)
    parser.add_argument("--only-page", action="store_true", help="measure nothing")
    options = parser.parse_args()
    if not options.only_page and any(os.environ.get(name) != value for name, value in KEEP_MEMORY.items()):
        # glibc reads them when a process starts.
        os.environ.update(KEEP_MEMORY)
        os.execv(sys.executable, [sys.executable, "-m", "benchmarks.layers", *sys.argv[1:]])
    results: dict[str, Any] = json.loads(RESULTS.read_text()) if RESULTS.exists() else {"cells": {}}
    console = Console(width=160)
    if not options.only_page:
        results["versions"] = {
            "torch": torch.__version__,
            "python": platform.python_version(),
            "machine": f"{platform.machine()}, {os.cpu_count()} cores",
            # A busy machine slows what is bound by memory more than what is bound by arithmetic.
            "load": round(os.getloadavg()[0], 1),
        }
        # One compilation serves every number of threads; all modules share the code that calls them.
        torch._inductor.config.cpp.dynamic_threads = True
        torch._dynamo.config.recompile_limit = 1000
        for mode in options.modes:
            for shape in (SHAPES[names.index(name)] for name in options.shapes):
                for layout in FORMATS:
                    torch.manual_seed(0)
                    torch.set_num_threads(1)
                    runs = dict(contenders(shape, layout, mode))
                    for threads in options.threads:
                        cell = key(shape, layout, threads, mode)
                        results["cells"][cell] = measure(runs, threads)
                        console.print(f"{cell}: measured", style="dim")
                        RESULTS.write_text(json.dumps(results, indent=1) + "\n")
    table = Table(*COLUMNS, title="Forward and backward, training")
    for row in rows(results["cells"]):
        table.add_row(*row)
    console.print(table)
    missed = misses(results["cells"])
    for text in missed:
        console.print(f"missed: {text}")
    PAGE.parent.mkdir(exist_ok=True)
    PAGE.write_text(page(results))
    return 1 if missed else 0


if __name__ == "__main__":
    raise SystemExit(main())
