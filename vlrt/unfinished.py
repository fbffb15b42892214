"""What an export leaves behind that was killed: found by the next one, put right, and said.

Whoever writes a bundle holds a lock on the directories that it makes beside it, which ends with its process: those
that nobody holds are left over. Knows directories; no manifest. Without `fcntl` (Windows) nothing is held or removed.
"""

import contextlib
import os
import secrets
import shutil
import warnings
from collections.abc import Iterator
from pathlib import Path

try:
    import fcntl
except ImportError:  # Windows
    fcntl = None  # type: ignore[assignment]  # asked for before use

PARTIAL, OLD = ".partial", ".old"  # what is being written; what is being replaced


@contextlib.contextmanager
def held(out: Path, suffix: str) -> Iterator[Path]:
    """Make a directory beside `out`, `.<name>.<random><suffix>`, and hold it while the block runs.

    It is removed at the end, whatever ends the block; one with suffix OLD only if it is empty.

    Raises:
        OSError: it cannot be made.
    """
    made = out.parent / f".{out.name}.{secrets.token_hex(8)}.new"
    path, lock = made.with_suffix(suffix), None
    try:  # from here on: a signal may come between any two steps
        made.mkdir(mode=0o700)
        if fcntl is not None:
            lock = os.open(made, os.O_RDONLY)
            fcntl.flock(lock, fcntl.LOCK_EX)
        os.rename(made, path)  # only now is it seen by `recover`
        yield path
    finally:
        if suffix == OLD:
            with contextlib.suppress(OSError):
                path.rmdir()
        else:
            shutil.rmtree(path, ignore_errors=True)
        shutil.rmtree(made, ignore_errors=True)
        if lock is not None:
            os.close(lock)


def recover(out: Path) -> None:
    """Put right what was left by exports to `out` that were killed, with a warning for each.

    A bundle that was to be replaced goes back to its place where that is empty; all else that is left is removed.

    Raises:
        OSError: a directory cannot be read.
    """
    for path in _left(out):
        old = path / out.name
        if path.suffix == OLD and old.exists() and not out.exists():
            old.rename(out)
            warnings.warn(
                f"an export to {out} was cut off as it ended: the bundle before it was put back", stacklevel=2
            )
        else:
            warnings.warn(f"an export to {out} was cut off: what it left in {path} was removed", stacklevel=2)
        shutil.rmtree(path, ignore_errors=True)


def explain(out: Path) -> str:
    """Return what to say where there is no bundle at `out` but an export was cut off; "" where none was."""
    with contextlib.suppress(OSError):
        for path in _left(out):
            if path.suffix == OLD and (path / out.name).exists():
                return f"; an export to it was cut off, the bundle before it is {path / out.name}: move it back"
            return "; an export to it was cut off: export it again"
    return ""


def _left(out: Path) -> list[Path]:
    """Return the directories of exports to `out` that nobody holds; old bundles first."""
    if fcntl is None or not out.parent.is_dir():
        return []
    beside = [path for path in out.parent.iterdir() if path.name.startswith(f".{out.name}.")]
    return [p for suffix in (OLD, PARTIAL) for p in sorted(beside) if p.suffix == suffix and not _is_held(p)]


def _is_held(path: Path) -> bool:
    try:
        lock = os.open(path, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW)
    except OSError:  # gone meanwhile, or not ours
        return True
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        return True
    finally:
        os.close(lock)
    return False
