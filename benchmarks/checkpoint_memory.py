"""Memory of converting a 2 GB checkpoint in place, from file to file.

    python -m benchmarks.checkpoint_memory

VGG-16 with BatchNorm and a classifier of 100,000 classes. A child process converts it as the command line
does without a report; the peak of its anonymous memory (RssAnon, sampled each 5 ms: mapped files do not
count) is compared with what it has after ``import torch``.
"""

from __future__ import annotations

import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path

import torch

#: The most anonymous memory above ``import torch`` that a conversion may take, in sizes of the checkpoint.
MOST = 1.3
ARCHITECTURE, ARGUMENTS = "torchvision/vgg16_bn", {"num_classes": 100_000}


def anonymous() -> int:
    """Return this process's anonymous memory in bytes."""
    status = Path("/proc/self/status").read_text()
    return int(status.split("RssAnon:")[1].split()[0]) * 1024


def convert(source: str, target: str) -> None:
    """Convert in this process and print the size of the file, the memory before and the peak."""
    base = peak = anonymous()
    done = threading.Event()

    def watch() -> None:
        nonlocal peak
        while not done.wait(0.005):
            peak = max(peak, anonymous())

    watcher = threading.Thread(target=watch)
    watcher.start()
    from normsearch.cli import app

    words = [f"{key}={value}" for key, value in ARGUMENTS.items()]
    start = time.perf_counter()
    app(
        [
            "convert",
            source,
            "-a",
            ARCHITECTURE,
            "--arguments",
            *words,
            "--to",
            "group",
            "-o",
            target,
            "--json",
        ],
        standalone_mode=False,
    )
    seconds = time.perf_counter() - start
    done.set()
    watcher.join()
    print(f"\n{base} {peak} {seconds}")


def main() -> None:
    """Write the checkpoint, convert it from each format, compare."""
    import normsearch

    if len(sys.argv) == 3:
        convert(*sys.argv[1:])
        return
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        architecture = normsearch.Architecture(ARCHITECTURE, ARGUMENTS)
        model = normsearch.build(architecture)
        torch.save(model.state_dict(), folder / "before.pth")
        normsearch.save(model, folder / "before.safetensors", architecture=architecture)
        del model
        for source in ("before.pth", "before.safetensors"):
            size = (folder / source).stat().st_size
            command = [sys.executable, "-m", "benchmarks.checkpoint_memory", str(folder / source)]
            done = subprocess.run(
                [*command, str(folder / f"{source}.out.safetensors")], capture_output=True, text=True
            )
            if done.returncode:
                raise SystemExit(done.stderr)
            base, peak, seconds = map(float, done.stdout.split()[-3:])
            ratio = (peak - base) / size
            print(
                f"{source}: {size / 2**30:.2f} GiB in {seconds:.0f} s; anonymous memory "
                f"{base / 2**20:.0f} MiB after import torch, at most "
                f"{(peak - base) / 2**30:.2f} GiB more: {ratio:.2f} of the checkpoint "
                f"({'within' if ratio <= MOST else 'beyond'} {MOST})"
            )
            assert ratio <= MOST
            for path in (*folder.glob("*.out.*"), *folder.glob("*_model.py")):
                path.unlink()


if __name__ == "__main__":
    main()
