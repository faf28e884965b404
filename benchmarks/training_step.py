"""One training step of ResNet-50 at batch size 8: BatchNorm beside the network converted to switchable.

    python -m benchmarks.training_step [--threads 1] [--rounds 7] [--size 224]

Forward, loss, backward and an SGD step; the models take turns and the ratio is the median of the turns'.
Bar: at most 1.1 × the BatchNorm network's time. With one thread the clock is the process' own, with more the
wall's.
"""

from __future__ import annotations

import argparse
import json
import platform
import time
from pathlib import Path
from statistics import median

import torch
import torchvision
from torch import nn

import normsearch

RESULTS = Path(__file__).parent / "results" / "training_step.json"
BAR = 1.1
BATCH = 8
METHODS = ("switchable", "batch_instance", "batch_renorm", "group")


def step(
    model: nn.Module, optimizer: torch.optim.Optimizer, images: torch.Tensor, labels: torch.Tensor
) -> None:
    optimizer.zero_grad()
    nn.functional.cross_entropy(model(images), labels).backward()
    optimizer.step()


def main() -> int:
    """Print medians and ratios; 1 if the bar is missed."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--size", type=int, default=224)
    options = parser.parse_args()
    torch.manual_seed(0)
    torch.set_num_threads(options.threads)
    clock = time.process_time if options.threads == 1 else time.perf_counter
    original = torchvision.models.resnet50(weights=None)
    models = {"batch": original, **{name: normsearch.convert(original, name) for name in METHODS}}
    images, labels = torch.randn(BATCH, 3, options.size, options.size), torch.randint(0, 1000, (BATCH,))
    optimizers = {name: torch.optim.SGD(m.train().parameters(), 0.01) for name, m in models.items()}
    seconds: dict[str, list[float]] = {name: [] for name in models}
    for turn in range(options.rounds + 1):
        for name, model in models.items():
            start = clock()
            step(model, optimizers[name], images, labels)
            if turn:
                seconds[name].append(clock() - start)
    ratios = {
        name: [a / b for a, b in zip(taken, seconds["batch"], strict=True)] for name, taken in seconds.items()
    }
    print(f"ResNet-50, {BATCH} × {options.size}², {options.threads} thread(s), torch {torch.__version__}")
    for name, values in ratios.items():
        print(
            f"{name:16} {median(seconds[name]):6.2f} s  {median(values):.3f} × batch "
            f"({min(values):.3f} to {max(values):.3f})"
        )
    RESULTS.write_text(
        json.dumps(
            {
                "torch": torch.__version__,
                "python": platform.python_version(),
                "threads": options.threads,
                "size": options.size,
                "seconds": seconds,
                "bar": BAR,
            },
            indent=1,
        )
        + "\n"
    )
    return 1 if median(ratios["switchable"]) > BAR else 0


if __name__ == "__main__":
    raise SystemExit(main())
