"""Work for children that were taken over: each answers as ours does, after trying what a stranger would."""

from __future__ import annotations

import contextlib
import json
import os
import pickle
import socket
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Any

from pydantic import BaseModel

from api.messages import Failed
from api.tasks import Catalogue, Converted, Described, Explained, Inspected, Made

OUT = 3
#: What is somewhere in the service's environment or files, and must stay there.
SECRET = "hunter2"


class Payload:
    """Leaves a file behind where it is unpickled."""

    def __init__(self, canary: str) -> None:
        self.canary = canary

    def __reduce__(self) -> Any:
        return os.system, (f"touch {self.canary}",)


def prepare() -> None:
    """Nothing is needed."""


def run(task: str, argument: bytes, folder: Path, report: Callable[[Any], None]) -> BaseModel | Failed:
    asked = json.loads(argument)
    made: BaseModel | Failed = globals()[f"do_{task}"](asked, folder)
    return made


def attempts(folder: Path, canary: str, port: int) -> dict[str, Callable[[], Any]]:
    """What reaches out of a child; False or an error where it is not possible."""
    me = os.getpid()

    def processes() -> bool:
        # The service was started before this one, and so has a lower number nearly always; and its parent's.
        for pid in {*range(1, 500), *range(max(1, me - 3000), me), os.getppid()}:
            for name in ("environ", "maps", "mem", "fd"):
                with contextlib.suppress(OSError):
                    os.open(f"/proc/{pid}/{name}", os.O_RDONLY)
                    return True
        return False

    def files() -> bool:
        data = folder.parent.parent
        for path in (
            data,
            data / "normsearch.sqlite",
            data / "blobs",
            data / "incoming",
            data.parent / "log",
        ):
            with contextlib.suppress(OSError):
                os.open(path, os.O_RDONLY)
                return True
        return False

    def modules() -> bool:
        for path in (Path(__file__), Path(os.__file__)):
            with contextlib.suppress(OSError):
                os.open(path, os.O_WRONLY)
                return True
        return False

    return {
        "secret in its environment": lambda: SECRET in str(os.environ),
        "other processes": processes,
        "the service's files": files,
        "modules that the service imports": modules,
        "the canary": lambda: Path(canary).write_text("x"),
        "a program": lambda: subprocess.run(["/bin/sh", "-c", f"touch {canary}"], check=True),
        "the service itself": lambda: socket.create_connection(("127.0.0.1", port), 1),
    }


def possible(folder: Path, canary: str, port: int) -> list[str]:
    """Try everything; return what was possible."""
    found = []
    for name, attempt in attempts(folder, canary, port).items():
        with contextlib.suppress(Exception):
            if attempt() is not False:
                found.append(name)
    return found


def _told(asked: dict[str, Any]) -> tuple[str, int, str]:
    """What a test gives along, where a checkpoint's entry is named."""
    canary, port, kind = asked["entry"].split("|")
    return canary, int(port), kind


def _inspected(notes: tuple[str, ...]) -> Inspected:
    return Inspected(
        format="torch zip",
        architecture="<script>",
        arguments={},
        parameters=10**300,
        converted=False,
        notes=notes,
        sites=[],
    )


def do_inspect(asked: dict[str, Any], folder: Path) -> BaseModel:
    canary, port, kind = _told(asked)
    if kind == "pickle":
        os.write(OUT, pickle.dumps(Payload(canary)) + b"\n")
        os._exit(0)
    return _inspected(tuple(possible(folder, canary, port)))


def do_explain(asked: dict[str, Any], folder: Path) -> BaseModel:
    kind = _told(asked["source"])[2]
    plan = {"text": "__import__('os').system('true')", "list": "[]", "deep": '{"a":' + "[" * 50_000}[kind]
    return Explained.model_construct(rows=[], notes=(), plan=plan)


def do_convert(asked: dict[str, Any], folder: Path) -> BaseModel:
    canary, _, kind = _told(asked["source"])
    name = {"outside": "../../normsearch.sqlite", "missing": "missing", "input": asked["source"]["file"]}.get(
        kind, "made.bin"
    )
    if kind == "pickle":
        # A pickle where weights should be, with the name of a module.
        name = "sitecustomize.py"
        (folder / name).write_bytes(pickle.dumps(Payload(canary)))
    made = Made(name=name, role="weights", media_type="text/html; charset=utf-8")
    return Converted(
        model=_inspected(()), files=[made], changed=0, exact=True, batch_independent=True, notes=()
    )


def do_describe(asked: dict[str, Any], folder: Path) -> BaseModel:
    return Described.model_construct(
        kind="images", samples=-1, arrays=[], classes=[{"name": "x" * 10**6, "images": 1}]
    )


def do_catalogue(asked: Any, folder: Path) -> BaseModel:
    return Catalogue(methods=[], architectures={"<script>": ["\0", "../x"]}, arguments={})
