"""Memory of this machine: how much of it a process may still take, and giving back what it no longer uses.

Knows the files of Linux and glibc's allocator; elsewhere it knows nothing and does nothing. No model.
"""

import ctypes
import functools
from collections.abc import Callable, Iterator
from pathlib import Path

_Files = tuple[str, str, str]
_V2: _Files = ("memory.max", "memory.current", "inactive_file")
_DONT_NEED = 4  # MADV_DONTNEED
_V1: _Files = ("memory.limit_in_bytes", "memory.usage_in_bytes", "total_inactive_file")


def available_bytes(root: Path = Path("/")) -> int | None:
    """Return how many bytes this process may still take, free swap included; None where the system does not tell.

    The least of what the machine has available, and of what each control group that the process is in leaves: its limit
    less what is used, file pages that can be dropped not counted.

    Args:
        root: where proc/ and sys/ are.
    """
    try:
        lines = (root / "proc/meminfo").read_text(encoding="ascii").splitlines()
        facts = {name: int(value.split()[0]) * 1024 for name, _, value in (line.partition(":") for line in lines)}
        bounds = [facts["MemAvailable"], *_groups(root)]
    except (OSError, ValueError, KeyError, IndexError):
        return None
    return min(bounds) + facts.get("SwapFree", 0)


def give_back() -> None:
    """Return freed memory to the system: glibc keeps what lies between blocks in use, of long passes most of it."""
    _trim()(0)


def let_go(path: Path) -> None:
    """Return the memory of a mapped file's pages to the system; whoever reads them again gets them from the file.

    Nobody may have written to the mapping.
    """
    advise = _advise()
    try:
        lines = Path("/proc/self/maps").read_text(encoding="utf-8", errors="surrogateescape").splitlines()
    except OSError:
        return
    for line in lines:
        fields = line.split(maxsplit=5)
        if len(fields) == 6 and fields[5] == str(path):
            first, last = (int(address, 16) for address in fields[0].split("-"))
            advise(ctypes.c_void_p(first), ctypes.c_size_t(last - first), _DONT_NEED)


@functools.cache
def _advise() -> Callable[..., object]:
    try:
        found: Callable[..., object] = ctypes.CDLL(None).madvise
    except (AttributeError, OSError, TypeError):
        return lambda *_: None
    return found


@functools.cache
def _trim() -> Callable[[int], object]:
    try:
        found: Callable[[int], object] = ctypes.CDLL(None).malloc_trim
    except (AttributeError, OSError, TypeError):  # musl, macOS, Windows
        return lambda _: None
    return found


def _groups(root: Path) -> Iterator[int]:
    """Yield what each control group of this process leaves; groups without a limit, or out of sight, are left out."""
    try:
        lines = (root / "proc/self/cgroup").read_text(encoding="utf-8").splitlines()
    except OSError:
        return
    for line in lines:
        _, controllers, path = line.split(":", 2)
        if not controllers:
            base, files = root / "sys/fs/cgroup", _V2
        elif "memory" in controllers.split(","):
            base, files = root / "sys/fs/cgroup/memory", _V1
        else:
            continue
        group = base / path.lstrip("/")
        for folder in (group, *(parent for parent in group.parents if parent.is_relative_to(base))):
            left = _left(folder, files)
            if left is not None:
                yield left


def _left(folder: Path, files: _Files) -> int | None:
    limit, usage, droppable = files
    try:
        most, used = (int((folder / name).read_text(encoding="ascii")) for name in (limit, usage))
        rows = (row.split() for row in (folder / "memory.stat").read_text(encoding="ascii").splitlines())
        return max(0, most - used + next((int(value) for name, value in rows if name == droppable), 0))
    except (OSError, ValueError):  # "max": no limit; the group of a container is not always visible in it
        return None
