"""The command line, run on a small checkpoint."""

from __future__ import annotations

import functools
import json
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import torch
from click.testing import Result
from typer.testing import CliRunner

import normsearch
from normsearch import Architecture
from normsearch.cli import app

NAME = "timm/resnet10t"
RESNET = Architecture(NAME, {"num_classes": 3})
MODEL = ["--architecture", NAME, "--arguments", "num_classes=3"]


@functools.cache
def weights() -> dict[str, torch.Tensor]:
    """Return weights of a network whose running variances are not the initial ones."""
    torch.manual_seed(0)
    state: dict[str, torch.Tensor] = normsearch.build(RESNET).state_dict()
    for name, value in state.items():
        if name.endswith("running_var"):
            value.uniform_(0.5, 2)
    return state


def saved(folder: Path) -> str:
    """Save them as a training script does, and return the file's name."""
    torch.save({"state_dict": weights()}, folder / "x.pth")
    return "x.pth"


def cli(*words: str, code: int = 0) -> Result:
    result = CliRunner().invoke(app, list(words))
    assert result.exit_code == code, (result.output, result.exception)
    # Whatever happens, no traceback.
    assert "Traceback" not in result.output
    assert code == 0 or result.stderr
    return result


def output(*words: str) -> Any:
    return json.loads(cli(*words, "--json").stdout)


def process(*words: str, **options: Any) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "normsearch", *words], capture_output=True, text=True, check=False, **options
    )


def interrupted(words: list[str], started: Path) -> tuple[int, str]:
    """Run a command, interrupt it once a file is there, and return its exit code and stderr."""
    with subprocess.Popen(
        [sys.executable, "-m", "normsearch", *words],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        # A test run in the background inherits an ignored SIGINT; the command is one in the foreground.
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
    ) as running_command:
        try:
            while not started.exists():
                assert running_command.poll() is None
                time.sleep(0.05)
            running_command.send_signal(signal.SIGINT)
            _, stderr = running_command.communicate(timeout=30)
        finally:
            running_command.kill()
    return running_command.returncode, stderr
