"""Everything that is asked about one network, in a process of its own."""

from __future__ import annotations

import ctypes
import json
import os
import resource
import signal
import sys
import time
import warnings
from multiprocessing.connection import Connection
from typing import Any

import torch

from benchmarks.zoo.checks import BATCH, built, under_every_method, under_opacus
from benchmarks.zoo.graphs import under_rewriting
from benchmarks.zoo.models import ZOO
from benchmarks.zoo.probes import batch_norms

#: Bytes that one process may take.
_MEMORY = 6 * 2**30
_PR_SET_PDEATHSIG = 1


def examine(name: str) -> dict[str, Any]:
    """Return what becomes of one network."""
    start = time.perf_counter()
    entry = ZOO[name]
    model, factory = built(entry)
    return {
        "name": name,
        "meta": entry.meta,
        "batch_norms": len(batch_norms(model)),
        "parameters": sum(parameter.numel() for parameter in model.parameters()),
        "methods": under_every_method(entry, model, entry.inputs(BATCH, factory)),
        "opacus": under_opacus(entry, model, factory),
        "graphs": under_rewriting(entry, model, factory),
        "seconds": round(time.perf_counter() - start, 1),
    }


def examine_apart(name: str, connection: Connection) -> None:
    """Examine in a child process and send the result as JSON."""
    # A session of its own: Ctrl-C is for the parent, without which this process ends too.
    os.setsid()
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
    resource.setrlimit(resource.RLIMIT_DATA, (_MEMORY, _MEMORY))
    warnings.simplefilter("ignore")
    torch.set_num_threads(1)
    try:
        record = examine(name)
    except Exception as error:
        record = {"name": name, "failed": f"{type(error).__name__}: {error}"[:500]}
    connection.send_bytes(json.dumps(record).encode())
