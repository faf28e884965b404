"""What a conversion costs beside copying the model: normsearch and Opacus, interleaved with copy.deepcopy.

    python -m benchmarks.overhead

Bar: convert(resnet50, "group") takes at most 1.5 × copy.deepcopy(resnet50), in the median of the pairs.
"""

from __future__ import annotations

import copy
import time
from collections.abc import Callable
from statistics import median

import torch
import torchvision
from rich.console import Console
from rich.table import Table

import normsearch
from benchmarks.fidelity import opacus_swap

BAR = 1.5
ROUNDS = 15


def seconds(run: Callable[[], object]) -> float:
    """Return how long ``run`` takes; its result is freed outside the measurement."""
    start = time.perf_counter()
    result = run()
    taken = time.perf_counter() - start
    del result
    return taken


def main() -> int:
    """Print medians and ratios; 1 if the bar is missed."""
    torch.set_num_threads(1)
    model = torchvision.models.resnet50(weights=None).eval()
    for module in model.modules():
        # Without statistics there is nothing to fold, and the measurement would flatter.
        if isinstance(module, torch.nn.BatchNorm2d):
            torch.nn.init.normal_(module.get_buffer("running_mean"))
            torch.nn.init.uniform_(module.get_buffer("running_var"), 0.5, 2)
    runs: dict[str, Callable[[], object]] = {
        "copy.deepcopy": lambda: copy.deepcopy(model),
        'normsearch.convert(model, "group")': lambda: normsearch.convert(model, "group"),
        "Opacus ModuleValidator.fix": lambda: opacus_swap(model),
    }
    times: dict[str, list[float]] = {name: [] for name in runs}
    for turn in range(ROUNDS + 1):
        for name, run in runs.items():
            taken = seconds(run)
            if turn:
                times[name].append(taken)
    table = Table(title=f"ResNet-50, {ROUNDS} interleaved rounds, 1 thread, torch {torch.__version__}")
    for column in ("", "ms (median)", "× deepcopy (median)", "least", "most"):
        table.add_column(column, justify="right" if column else "left")
    base, ratio = times["copy.deepcopy"], 0.0
    for name, taken_times in times.items():
        ratios = [a / b for a, b in zip(taken_times, base, strict=True)]
        if "normsearch" in name:
            ratio = median(ratios)
        table.add_row(
            name,
            f"{median(taken_times) * 1e3:.0f}",
            f"{median(ratios):.2f}",
            f"{min(ratios):.2f}",
            f"{max(ratios):.2f}",
        )
    Console().print(table)
    return 1 if ratio > BAR else 0


if __name__ == "__main__":
    raise SystemExit(main())
