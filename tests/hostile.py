"""Work for children that misbehave: each task is what a compromised child might do."""

from __future__ import annotations

import contextlib
import ctypes
import json
import os
import resource
import signal
import socket
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from pydantic import BaseModel, Field

from api.messages import Failed, Progressed, Strict

OUT = 3


class Ask(BaseModel):
    """What a test gives along."""

    pid: int = 0
    path: str = ""


class Seen(Strict):
    """What was possible; empty is best."""

    possible: list[str] = Field(default_factory=list)
    text: str = ""


def prepare() -> None:
    """Nothing is needed."""


def run(task: str, argument: bytes, folder: Path, report: Callable[[Any], None]) -> BaseModel | Failed:
    made: BaseModel | Failed = globals()[f"do_{task}"](Ask.model_validate_json(argument), folder, report)
    return made


def _try(possible: list[str], name: str, attempt: Callable[[], Any]) -> None:
    with contextlib.suppress(Exception):
        if attempt() is not False:
            possible.append(name)


def harmless(ask: Ask, folder: Path) -> list[str]:
    """What reaches out of a child and can be tried in any process."""
    possible: list[str] = []
    attempts: dict[str, Callable[[], Any]] = {
        "secrets in the environment": lambda: "hunter2" in str(os.environ),
        "reading a file of the service": Path(ask.path).read_bytes,
        "listing the service's folder": lambda: os.listdir(Path(ask.path).parent),
        "listing other children's folders": lambda: os.listdir(folder.parent),
        "/etc/passwd": Path("/etc/passwd").read_bytes,
        "writing elsewhere": lambda: (folder.parent / "elsewhere").write_text("x"),
        "a folder": lambda: os.mkdir(folder / "folder"),
        "a pipe": lambda: os.mkfifo(folder / "pipe"),
        "a link": lambda: os.symlink(ask.path, folder / "link"),
        "a hard link": lambda: os.link(ask.path, folder / "hard"),
        "a TCP socket": lambda: socket.socket(socket.AF_INET, socket.SOCK_STREAM),
        "a UDP socket": lambda: socket.socket(socket.AF_INET, socket.SOCK_DGRAM),
        "a Unix socket": lambda: socket.socket(socket.AF_UNIX),
        "a netlink socket": lambda: socket.socket(socket.AF_NETLINK, socket.SOCK_RAW),
        "fork": lambda: os.fork() == 0 and os._exit(0),
        "spawn": lambda: os.posix_spawn("/bin/true", ["true"], {}),
        "environment of the parent": Path(f"/proc/{os.getppid()}/environ").read_bytes,
        "files of the parent": lambda: os.listdir(f"/proc/{os.getppid()}/fd"),
    }
    for name, attempt in attempts.items():
        _try(possible, name, attempt)
    return possible


def do_look_around(ask: Ask, folder: Path, _: Any) -> Seen:
    """Everything that reaches out of the child, each by itself."""
    libc, possible = ctypes.CDLL(None), harmless(ask, folder)
    for name, pid in (("server", ask.pid), ("parent", os.getppid()), ("init", 1)):
        _try(possible, f"environment of {name}", Path(f"/proc/{pid}/environ").read_bytes)
        _try(possible, f"memory of {name}", lambda pid=pid: os.open(f"/proc/{pid}/mem", os.O_RDONLY))
        _try(possible, f"files of {name}", lambda pid=pid: os.listdir(f"/proc/{pid}/fd"))
        _try(possible, f"signal to {name}", lambda pid=pid: os.kill(pid, signal.SIGURG))
        _try(possible, f"tracing {name}", lambda pid=pid: libc.ptrace(16, pid, 0, 0) == 0)
    _try(possible, "writing a file of the service", lambda: Path(ask.path).write_bytes(b"x"))
    _try(possible, "writing its input", lambda: os.open(folder / "given.pth", os.O_RDWR))
    _try(possible, "exec", lambda: os.execv("/bin/true", ["true"]))
    _try(possible, "a namespace", lambda: libc.unshare(0x10000000) == 0)
    _try(possible, "another root", lambda: os.chroot("/usr"))
    _try(possible, "more memory", lambda: resource.setrlimit(resource.RLIMIT_AS, (-1, -1)))
    for number in range(5, 256):
        _try(possible, f"descriptor {number}", lambda number=number: os.fstat(number))
    given = Path("given.pth")
    return Seen(possible=possible, text=given.read_text() if given.exists() else "")


def do_obey(ask: Ask, folder: Path, report: Callable[[Any], None]) -> Seen:
    report(Progressed(stage="a", done=1, total=2))
    (folder / "made.txt").write_text(ask.path)
    return Seen(text=str(os.getpid()))


def do_refuse(*_: Any) -> Failed:
    return Failed(
        error="RefusedError",
        detail="no",
        refusals=[{"site": "bn1", "method": "group", "reason": "so", "remedy": "do"}],  # type: ignore[list-item]
    )


def do_huge_line(*_: Any) -> None:
    while True:
        os.write(OUT, b"x" * 65_536)


def do_many_lines(*_: Any) -> None:
    line = (Progressed(stage="x" * 200, done=1, total=2).model_dump_json() + "\n").encode() * 100
    while True:
        os.write(OUT, line)


def do_malformed(ask: Ask, *_: Any) -> None:
    os.write(OUT, ask.path.encode("latin-1") + b"\n")
    os._exit(0)


def do_wrong_form(*_: Any) -> Ask:
    return Ask(path="x")


def do_hang(ask: Ask, *_: Any) -> None:
    if ask.path:
        Path(ask.path).write_text(str(os.getpid()))
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    signal.alarm(0)
    while True:
        time.sleep(1)


def do_hang_silently(*_: Any) -> None:
    os.close(OUT)
    while True:
        time.sleep(1)


def do_spin(*_: Any) -> None:
    while True:
        pass


def do_eat_memory(*_: Any) -> None:
    kept = []
    while True:
        kept.append(bytearray(10_000_000))


def do_fill_disk(_: Any, folder: Path, __: Any) -> Seen:
    with (folder / "big").open("wb") as file:
        while True:
            file.write(b"x" * 1_000_000)


def do_crash(*_: Any) -> None:
    ctypes.string_at(0)


def do_leave(*_: Any) -> None:
    os._exit(0)


def do_answer_and_die(*_: Any) -> None:
    os.write(OUT, json.dumps({"kind": "done", "result": {"possible": [], "text": ""}}).encode() + b"\n")
    os.abort()


def do_say_more(*_: Any) -> None:
    os.write(OUT, (json.dumps({"kind": "done", "result": {"possible": []}}) + "\n").encode() * 2)
    sys.exit()
