"""What the service costs and holds out: memory, latency under load, slow clients, a conversion's time.

    python -m benchmarks.service

Four measurements of servers on loopback, with the defaults of `make serve` but for the rate limit:

- the peak resident memory (VmHWM) of the server while it receives 2 GB, raw and as a form, a new server each;
  raw ones once more after 10 conversions, so that nothing is only loaded later;
- /health/live, asked by a process of its own every 20 ms: idle, and while 25 clients upload and 25 convert;
- clients that stop in the middle of a head, a body, an upload or a download: after how long they are ended;
- `POST /v1/convert` of a ResNet-18 beside the command line in a fresh process, in turns.

Writes benchmarks/results/service.json.
"""

from __future__ import annotations

import http.client
import importlib.metadata
import itertools
import json
import math
import os
import platform
import re
import shutil
import socket
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Any

RESULTS = Path(__file__).parent / "results" / "service.json"
ROOT = Path(__file__).parent.parent
GB, PIECE = 10**9, 2**20
#: The marks: bytes of memory, seconds beyond the command line's, a 99th percentile in seconds, or as a ratio.
MEMORY, BEYOND, P99, RATIO = 100 * 10**6, 1.0, 0.1, 5.0
UPLOADING, CONVERTING, UPLOADED, CONVERSIONS = 25, 25, 20_000_000, 10
#: Seconds by which a client that stops must be ended: the server's own limits, and some patience.
SLOW = {"head": 20.0, "body": 35.0, "upload": 35.0, "download": 70.0}
FORM = {"architecture": "torchvision/resnet18", "to": "group"}


class Server:
    """A server as users start it, and what can be asked of it."""

    def __init__(self, folder: Path, process: subprocess.Popen[bytes], port: int) -> None:
        self.folder, self.process, self.port = folder, process, port

    def request(
        self, method: str, path: str, body: Any = None, headers: dict[str, str] | None = None
    ) -> tuple[int, dict[str, str], bytes]:
        """Ask and return status, headers and content."""
        line = http.client.HTTPConnection("127.0.0.1", self.port, timeout=300)
        try:
            line.request(method, path, body, headers or {})
            answer = line.getresponse()
            return answer.status, {key.lower(): value for key, value in answer.getheaders()}, answer.read()
        finally:
            line.close()

    def lasted(self) -> list[float]:
        """Return the seconds of downloads that lasted long, as the log has them."""
        lines = (self.folder / "log").read_text().splitlines()
        events = [json.loads(line) for line in lines if '"/v1/artifacts/{identifier}"' in line]
        return [event["ms"] / 1000 for event in events if event["ms"] > 10_000]

    def memory(self) -> tuple[int, int]:
        """Return the process's resident memory, now and at its peak, in bytes."""
        text = Path(f"/proc/{self.process.pid}/status").read_text()
        found = [re.search(rf"{name}:\s+(\d+) kB", text) for name in ("VmRSS", "VmHWM")]
        now, peak = (int(match[1]) * 1024 for match in found if match is not None)
        return now, peak


@contextmanager
def server() -> Iterator[Server]:
    """Start a server, ready to convert."""
    folder = Path(tempfile.mkdtemp(prefix="normsearch-service-"))
    given = {
        **os.environ,
        "NORMSEARCH_DATA": str(folder / "data"),
        "NORMSEARCH_OPEN": "1",
        # All clients are one here.
        "NORMSEARCH_REQUESTS_PER_MINUTE": "1000000",
    }
    log = folder / "log"
    with log.open("wb") as stderr:
        process = subprocess.Popen(
            [sys.executable, "-m", "api", "serve", "--port", "0"], cwd=ROOT, env=given, stderr=stderr
        )
    try:
        deadline = time.monotonic() + 120
        while not (found := re.search(r"running on http://127\.0\.0\.1:(\d+)", log.read_text())):
            if process.poll() is not None or time.monotonic() > deadline:
                raise SystemExit(log.read_text())
            time.sleep(0.05)
        made = Server(folder, process, int(found[1]))
        # The process that forks children has imported everything.
        status, _, _ = made.request("GET", "/v1/methods")
        assert status == 200
        yield made
    finally:
        process.terminate()
        process.wait(60)
        shutil.rmtree(folder)


def form(fields: dict[str, str], name: str, size: int) -> tuple[bytes, bytes, dict[str, str]]:
    """Return what stands before and after a file of some size in a form, and the request's headers."""
    parts = [
        f'--x\r\nContent-Disposition: form-data; name="{key}"\r\n\r\n{value}\r\n'
        for key, value in fields.items()
    ]
    parts.append(f'--x\r\nContent-Disposition: form-data; name="file"; filename="{name}"\r\n\r\n')
    before, after = "".join(parts).encode(), b"\r\n--x--\r\n"
    length = len(before) + size + len(after)
    return (
        before,
        after,
        {"Content-Type": "multipart/form-data; boundary=x", "Content-Length": str(length)},
    )


def large_upload(kind: str, checkpoint: bytes) -> dict[str, float]:
    """Send 2 GB to a new server; return its memory before, at its peak, and the seconds.

    Raw ones are sent twice: before the server's first conversions, and after some.
    """
    size = 2 * GB // PIECE * PIECE
    with server() as running:
        before, _ = running.memory()
        start = time.perf_counter()
        _send(running, kind, size)
        found = {"before": before, "seconds": time.perf_counter() - start, "bytes": size}
        _, found["peak"] = running.memory()
        if kind == "raw":
            for _ in range(CONVERSIONS):
                _expect(convert(running, checkpoint))
            _, found["peak_of_conversions"] = running.memory()
            _send(running, kind, size)
            _, found["peak_afterwards"] = running.memory()
    return found


def _send(running: Server, kind: str, size: int) -> None:
    """Send a file of some size, raw or as a form."""
    piece = os.urandom(PIECE)
    pieces = (piece for _ in range(size // PIECE))
    if kind == "raw":
        headers = {"Content-Length": str(size)}
        status, _, _ = running.request("PUT", "/v1/uploads?filename=x.pth", pieces, headers)
    else:
        head, tail, headers = form({}, "x.pth", size)
        body = itertools.chain([head], pieces, [tail])
        status, _, _ = running.request("POST", "/v1/uploads", body, headers)
    assert status == 201


def probe(port: int, seconds: float) -> list[float]:
    """Ask /health/live every 20 ms for some time, from a process of its own; return the seconds of each."""
    command = [sys.executable, "-m", "benchmarks.service", "probe", str(port), str(seconds)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True)
    return [float(one) for one in json.loads(done.stdout)]


def ask_live(port: int, seconds: float) -> None:
    """Be the process that asks; print the seconds of each answer."""
    line, found = http.client.HTTPConnection("127.0.0.1", port, timeout=60), []
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        start = time.perf_counter()
        line.request("GET", "/health/live")
        answer = line.getresponse()
        answer.read()
        found.append(time.perf_counter() - start)
        assert answer.status == 200
        time.sleep(0.02)
    print(json.dumps(found))


def percentiles(seconds: list[float]) -> dict[str, float]:
    """Return the median, the 99th percentile and the most, in milliseconds."""
    cut = statistics.quantiles(seconds, n=100, method="inclusive")
    return {
        "asked": len(seconds),
        "p50_ms": 1000 * cut[49],
        "p99_ms": 1000 * cut[98],
        "most_ms": 1000 * max(seconds),
    }


def convert(running: Server, checkpoint: bytes) -> tuple[int, dict[str, str], bytes]:
    """Convert over HTTP in one call."""
    head, tail, headers = form(FORM, "resnet18.pth", len(checkpoint))
    return running.request("POST", "/v1/convert", head + checkpoint + tail, headers)


def under_load(checkpoint: bytes) -> dict[str, Any]:
    """Ask /health/live while nothing happens, and while many upload and convert."""
    with server() as running:
        convert(running, checkpoint)
        idle = probe(running.port, 10)
        statuses: dict[str, list[int]] = {"uploads": [], "conversions": []}
        asked: list[float] = []
        done = threading.Event()

        def upload(number: int) -> None:
            content = os.urandom(PIECE) * (UPLOADED // PIECE) + number.to_bytes(4, "little")
            while not done.is_set():
                status, _, _ = running.request("PUT", f"/v1/uploads?filename={number}.pth", content)
                statuses["uploads"].append(status)

        def ask() -> None:
            while not done.is_set():
                asked.extend(probe(running.port, 2))

        start = time.perf_counter()
        with ThreadPoolExecutor(UPLOADING + CONVERTING + 1) as threads:
            others = [threads.submit(upload, number) for number in range(UPLOADING)]
            asking = threads.submit(ask)
            conversions = [threads.submit(convert, running, checkpoint) for _ in range(CONVERTING)]
            statuses["conversions"] = [one.result()[0] for one in conversions]
            done.set()
            for one in (*others, asking):
                one.result()
        seconds = time.perf_counter() - start
        _, peak = running.memory()
    return {
        "idle": percentiles(idle),
        "loaded": percentiles(asked),
        "seconds": seconds,
        "statuses": {
            kind: {str(status): found.count(status) for status in set(found)}
            for kind, found in statuses.items()
        },
        "peak_memory": peak,
    }


def slow_clients(checkpoint: bytes, each: int = 10) -> dict[str, Any]:
    """Stop in the middle of a request, in four ways at once; return when the server ended it."""
    with server() as running:
        _, headers, _ = convert(running, checkpoint)
        artifact = headers["location"]
        host = f"Host: 127.0.0.1:{running.port}\r\n"
        sent = {
            "head": f"GET /health/live HTTP/1.1\r\n{host}",
            "body": f"POST /v1/models HTTP/1.1\r\n{host}Content-Type: application/json\r\n"
            "Content-Length: 100\r\n\r\n{",
            "upload": f"PUT /v1/uploads?filename=x.pth HTTP/1.1\r\n{host}Content-Length: 1000000\r\n\r\nx",
            "download": f"GET {artifact} HTTP/1.1\r\n{host}\r\n",
        }

        def stop(kind: str) -> float:
            start = time.monotonic()
            with socket.socket() as line:
                if kind == "download":
                    # Little of it fits in what nobody reads.
                    line.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
                line.settimeout(SLOW[kind] + 30)
                line.connect(("127.0.0.1", running.port))
                line.sendall(sent[kind].encode())
                if kind == "download":
                    # What a client does not read it does not see the end of: the server's log has it.
                    while len(running.lasted()) < each and time.monotonic() - start < SLOW[kind] + 30:
                        time.sleep(0.5)
                    return min(running.lasted(), default=math.inf)
                while line.recv(4096):
                    pass
            return time.monotonic() - start

        kinds = [kind for kind in sent for _ in range(each)]
        with ThreadPoolExecutor(len(kinds) + 1) as threads:
            asking = threads.submit(probe, running.port, 30)
            seconds = list(threads.map(stop, kinds))
            asked = asking.result()
    ended = {kind: [took for one, took in zip(kinds, seconds, strict=True) if one == kind] for kind in sent}
    return {
        "clients_of_each": each,
        "ended_after": {kind: {"least": min(took), "most": max(took)} for kind, took in ended.items()},
        "health": percentiles(asked),
    }


def beside_the_command_line(path: Path, repeats: int = 7) -> dict[str, Any]:
    """Convert in turns over HTTP and in a fresh process."""
    checkpoint = path.read_bytes()
    rows = []
    with server() as running:
        convert(running, checkpoint)
        for number in range(repeats):
            order: list[Callable[[], tuple[str, float]]] = [
                lambda: ("service", _timed(lambda: _expect(convert(running, checkpoint)))),
                lambda: ("command_line", _timed(lambda: _command_line(path))),
                lambda: ("transfer", _timed(lambda: _transfer(running, checkpoint))),
            ]
            # Each is the first of a round as often as the others.
            turned = order[number % 3 :] + order[: number % 3]
            rows.append(dict(one() for one in turned))
    return {
        "rounds": rows,
        "median": {key: statistics.median(row[key] for row in rows) for key in rows[0]},
        "beyond": [row["service"] - row["command_line"] - row["transfer"] for row in rows],
    }


def _timed(work: Callable[[], object]) -> float:
    start = time.perf_counter()
    work()
    return time.perf_counter() - start


def _expect(answer: tuple[int, dict[str, str], bytes]) -> None:
    assert answer[0] == 200, answer[2][:500]


def _transfer(running: Server, checkpoint: bytes) -> None:
    """Send the checkpoint, and take a converted one: what a call costs beside the work."""
    _expect_any(running.request("PUT", "/v1/uploads?filename=resnet18.pth", checkpoint))
    _, _, listed = running.request("GET", "/v1/artifacts")
    weights = next(one for one in json.loads(listed)["items"] if one["role"] == "weights")
    _expect_any(running.request("GET", f"/v1/artifacts/{weights['id']}"))


def _expect_any(answer: tuple[int, dict[str, str], bytes]) -> None:
    assert answer[0] in (200, 201), answer[2][:500]


def _command_line(path: Path) -> None:
    target = path.with_suffix(".safetensors")
    words = ["convert", str(path), "--architecture", FORM["architecture"], "--to", FORM["to"]]
    command = [sys.executable, "-m", "normsearch", *words, "-o", str(target), "--force"]
    subprocess.run(command, cwd=ROOT, check=True, capture_output=True)


def _said(passes: bool) -> str:
    return "within" if passes else "BEYOND"


def main() -> None:
    """Measure, print, write the results."""
    if sys.argv[1:2] == ["probe"]:
        ask_live(int(sys.argv[2]), float(sys.argv[3]))
        return
    import torch
    import torchvision

    folder = Path(tempfile.mkdtemp(prefix="normsearch-service-"))
    try:
        path = folder / "resnet18.pth"
        torch.save(torchvision.models.resnet18().state_dict(), path)
        checkpoint = path.read_bytes()
        packages = ("torch", "torchvision", "fastapi", "starlette", "uvicorn", "sqlalchemy")
        results: dict[str, Any] = {
            "versions": {"python": platform.python_version()}
            | {name: importlib.metadata.version(name) for name in packages},
            "processors": os.cpu_count(),
            "load_average_before": os.getloadavg(),
        }
        memory = {kind: [large_upload(kind, checkpoint) for _ in range(3)] for kind in ("raw", "form")}
        results["memory"] = memory
        for kind, runs in memory.items():
            peak = max(max(run["peak"], run.get("peak_afterwards", 0)) for run in runs)
            growth = max(run["peak"] - run["before"] for run in runs)
            took = [run["seconds"] for run in runs]
            print(
                f"2 GB, {kind}: at most {peak / 1e6:.0f} MB resident, {growth / 1e6:.0f} MB more than before "
                f"in {min(took):.0f} to {max(took):.0f} s: {_said(peak <= MEMORY)} {MEMORY / 1e6:.0f} MB"
            )
        results["conversion"] = times = beside_the_command_line(path)
        median = times["median"]
        allowed = median["command_line"] + BEYOND + median["transfer"]
        least, most = min(times["beyond"]), max(times["beyond"])
        print(
            f"a ResNet-18: {median['service']:.2f} s over HTTP, {median['command_line']:.2f} s on the "
            f"command line, {median['transfer']:.2f} s to send and take it; beyond these "
            f"{least:.2f} to {most:.2f} s: {_said(median['service'] <= allowed)} {BEYOND} s"
        )
        results["load"] = loads = [under_load(checkpoint) for _ in range(3)]
        for load in loads:
            idle, loaded = load["idle"]["p99_ms"], load["loaded"]["p99_ms"]
            limit = max(RATIO * idle, 1000 * P99)
            print(
                f"/health/live: p99 {idle:.1f} ms idle, {loaded:.1f} ms (of {load['loaded']['asked']}) while "
                f"{UPLOADING} upload and {CONVERTING} convert; {load['statuses']}: {_said(loaded <= limit)} "
                f"{limit:.0f} ms"
            )
        results["slow_clients"] = slow = slow_clients(checkpoint)
        for kind, took in slow["ended_after"].items():
            print(
                f"a {kind} that stops is ended after {took['least']:.0f} to {took['most']:.0f} s: "
                f"{_said(took['most'] <= SLOW[kind])} {SLOW[kind]:.0f} s"
            )
        results["load_average_after"] = os.getloadavg()
        RESULTS.write_text(json.dumps(results, indent=1) + "\n")
    finally:
        shutil.rmtree(folder)


if __name__ == "__main__":
    main()
