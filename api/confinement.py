"""How a process gives up what it does not need: memory, time, files, network, signals, children.

Linux calls that Python does not have are made through the C library. Each means says whether the platform
has it; what is missing is reported, never an error: the others stand.
"""

from __future__ import annotations

import ctypes
import errno
import os
import platform
import resource
import signal
import struct
from collections.abc import Iterable, Sequence
from pathlib import Path

from pydantic import BaseModel

_LIBC = ctypes.CDLL(None, use_errno=True)
_PR_SET_PDEATHSIG, _PR_SET_DUMPABLE, _PR_SET_SECCOMP, _PR_SET_NO_NEW_PRIVS = 1, 4, 22, 38
_CLONE_NEWNET, _CLONE_THREAD = 0x40000000, 0x10000


class Limits(BaseModel):
    """What a child may use.

    Attributes:
        memory: bytes of address space beyond what it starts with.
        file: bytes of a file that it writes.
        seconds: of time; processor time is bounded by as much for each thread.
        threads: of arithmetic.

    """

    memory: int
    file: int
    seconds: float
    threads: int


class Confinement(BaseModel):
    """Which means apply on this platform.

    Attributes:
        landlock: version of Landlock's interface that bounds files and signals; 0 without it.
        seccomp: whether system calls are filtered: no sockets, no programs, no children, no tracing.
        own_network: whether a child has a network of its own, with nothing in it.
        no_capabilities: whether it has no capability left.

    """

    landlock: int
    seccomp: bool
    own_network: bool
    no_capabilities: bool


def hide() -> None:
    """Keep other processes of the same user from reading this one's memory and environment."""
    _LIBC.prctl(_PR_SET_DUMPABLE, 0, 0, 0, 0)


def forget_environment(prefix: str) -> None:
    """Remove variables from the environment, and from the memory in which the system shows what it was."""
    for name in [name for name in os.environ if name.startswith(prefix)]:
        del os.environ[name]
    fields = Path("/proc/self/stat").read_text().rpartition(")")[2].split()
    # The 50th and 51st of proc(5); the list starts with the third.
    start, end = int(fields[47]), int(fields[48])
    place = start
    for entry in ctypes.string_at(start, end - start).split(b"\0"):
        if entry.startswith(prefix.encode()):
            ctypes.memset(place, 0, len(entry))
        place += len(entry) + 1


def die_with_parent(parent: int) -> None:
    """Be killed when the thread that forked this process ends; at once if it has ended."""
    _LIBC.prctl(_PR_SET_PDEATHSIG, signal.SIGKILL, 0, 0, 0)
    if os.getppid() != parent:
        os._exit(1)


def limit(limits: Limits, inputs: int) -> None:
    """Set the limits of resources; ``inputs`` bytes of files may be mapped on top."""
    pages = int(Path("/proc/self/statm").read_text().split()[0])
    seconds = int(limits.seconds * limits.threads) + 1
    for kind, most in (
        (resource.RLIMIT_AS, pages * resource.getpagesize() + limits.memory + inputs),
        (resource.RLIMIT_CPU, seconds),
        (resource.RLIMIT_FSIZE, limits.file),
        (resource.RLIMIT_CORE, 0),
        (resource.RLIMIT_NOFILE, 256),
        # Of the user, not of the child; the filter of system calls is what forbids children.
        (resource.RLIMIT_NPROC, 1024),
    ):
        hard = resource.getrlimit(kind)[1]
        bounded = most if hard == resource.RLIM_INFINITY else min(most, hard)
        resource.setrlimit(kind, (bounded, bounded))
    # The last resort if whoever watches this process is stopped.
    signal.alarm(int(limits.seconds) + 10)


def confine(read: Iterable[Path], write: Sequence[Path], inputs: Sequence[int]) -> Confinement:
    """Give up everything else than reading some folders and files and writing others; there is no way back.

    Args:
        read: folders and files that may be read.
        write: folders that may be written.
        inputs: descriptors of files that may be opened again for reading.

    """
    own_network = _LIBC.unshare(_CLONE_NEWNET) == 0
    _LIBC.prctl(_PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0)
    version = _landlock(read, write, inputs)
    return Confinement(
        landlock=version,
        own_network=own_network,
        no_capabilities=_drop_capabilities(),
        seccomp=_filter_calls(),
    )


# --- Landlock: files, signals, TCP ---

_CREATE_RULESET, _ADD_RULE, _RESTRICT_SELF = 444, 445, 446
_WRITE_FILE, _READ_FILE, _READ_DIR, _TRUNCATE = 1 << 1, 1 << 2, 1 << 3, 1 << 14
_REMOVE_FILE, _MAKE_REG = 1 << 5, 1 << 8
#: All rights on files that each version of the interface knows.
_HANDLED = {1: (1 << 13) - 1, 2: (1 << 14) - 1, 3: (1 << 15) - 1, 4: (1 << 15) - 1}
_NEWEST = (1 << 16) - 1


def _landlock(read: Iterable[Path], write: Sequence[Path], inputs: Sequence[int]) -> int:
    version = int(_LIBC.syscall(_CREATE_RULESET, None, ctypes.c_size_t(0), 1))
    if version < 1:
        return 0
    handled = _HANDLED.get(version, _NEWEST)
    # No TCP from the fourth version on; no signals and abstract sockets beyond this process from the sixth.
    fields = [handled, *([3] if version >= 4 else []), *([3] if version >= 6 else [])]
    rules = struct.pack(f"={len(fields)}Q", *fields)
    ruleset = _LIBC.syscall(_CREATE_RULESET, rules, ctypes.c_size_t(len(rules)), 0)
    if ruleset < 0:
        return 0
    try:
        for descriptor in inputs:
            _allow(ruleset, descriptor, _READ_FILE)
        for path in read:
            _allow_path(ruleset, path, (_READ_FILE | _READ_DIR) & handled)
        # Plain files alone: no links, pipes or folders, which would have to be removed again.
        writing = _READ_FILE | _READ_DIR | _WRITE_FILE | _TRUNCATE | _MAKE_REG | _REMOVE_FILE
        for path in write:
            _allow_path(ruleset, path, writing & handled)
        return version if _LIBC.syscall(_RESTRICT_SELF, ruleset, 0) == 0 else 0
    finally:
        os.close(ruleset)


def _allow_path(ruleset: int, path: Path, rights: int) -> None:
    try:
        descriptor = os.open(path, os.O_PATH | os.O_CLOEXEC)
    except OSError:
        return
    try:
        _allow(ruleset, descriptor, rights if path.is_dir() else rights & (_READ_FILE | _WRITE_FILE))
    finally:
        os.close(descriptor)


def _allow(ruleset: int, descriptor: int, rights: int) -> None:
    _LIBC.syscall(_ADD_RULE, ruleset, 1, struct.pack("=Qi", rights, descriptor), 0)


# --- Capabilities ---


def _drop_capabilities() -> bool:
    header = struct.pack("=Ii", 0x20080522, 0)
    return int(_LIBC.capset(header, struct.pack("=6I", *[0] * 6))) == 0


# --- Seccomp: system calls ---

_ALLOW, _KILL, _FAIL = 0x7FFF0000, 0x80000000, 0x00050000
#: Audit architecture, clone, and the calls that are denied: fork, vfork, execve, execveat, socket, ptrace,
#: kill, process_vm_readv and _writev, pidfd_getfd, unshare, setns, mount, bpf, perf_event_open, userfaultfd,
#: io_uring_setup, add_key, request_key, keyctl.
_CALLS = {
    "x86_64": (
        0xC000003E,
        56,
        (57, 58, 59, 322, 41, 101, 62, 310, 311, 438, 272, 308, 165, 321, 298, 323, 425, 248, 249, 250),
    ),
    "aarch64": (
        0xC00000B7,
        220,
        (221, 281, 198, 117, 129, 270, 271, 438, 97, 268, 40, 280, 241, 282, 425, 217, 218, 219),
    ),
}
_CLONE3 = 435


def _filter_calls() -> bool:
    if platform.machine() not in _CALLS:
        return False
    architecture, clone, denied = _CALLS[platform.machine()]
    load, equal, at_least, has_bits, give = 0x20, 0x15, 0x35, 0x45, 0x06
    program = [
        (load, 0, 0, 4),
        (equal, 1, 0, architecture),
        (give, 0, 0, _KILL),
        (load, 0, 0, 0),
        # The other numbering of x86 (x32) would go around the list.
        (at_least, 0, 1, 0x40000000),
        (give, 0, 0, _FAIL | errno.EPERM),
        # The C library then takes clone, whose flags can be read.
        (equal, 0, 1, _CLONE3),
        (give, 0, 0, _FAIL | errno.ENOSYS),
    ]
    for number in denied:
        program += [(equal, 0, 1, number), (give, 0, 0, _FAIL | errno.EPERM)]
    program += [
        (equal, 0, 3, clone),
        (load, 0, 0, 16),
        (has_bits, 1, 0, _CLONE_THREAD),
        (give, 0, 0, _FAIL | errno.EPERM),
        (give, 0, 0, _ALLOW),
    ]
    code = ctypes.create_string_buffer(b"".join(struct.pack("=HBBI", *step) for step in program))

    class Program(ctypes.Structure):
        _fields_ = (("length", ctypes.c_ushort), ("code", ctypes.c_void_p))

    filled = Program(len(program), ctypes.addressof(code))
    return int(_LIBC.prctl(_PR_SET_SECCOMP, 2, ctypes.byref(filled), 0, 0)) == 0
