"""A clip on disk: what was computed about a video, in one file, for the bundle that computed it.

The file: 8 bytes MAGIC, the header's length (uint64, little-endian), the header (JSON, sealed with a hash of its own),
and the values of its parts one after the other. It is written to a temporary sibling and renamed, so that a path holds
a whole clip, the one before, or none. Nothing is unpickled, and what a file declares is held against its size and
against the model before memory is taken for it. Knows files and memories, no engine and no question.
"""

import contextlib
import hashlib
import json
import math
import os
import secrets
import stat
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from io import BufferedReader
from pathlib import Path
from typing import IO, Any

import numpy as np
from numpy.typing import NDArray

from vlrt import config, prompt
from vlrt.backends.base import Backend
from vlrt.bundle import SEAL, sealed
from vlrt.errors import ClipError, ConfigError
from vlrt.memory import SLACK, Memory, Shown, video_end

MAGIC = b"VLRTCLIP"
SCHEMA_VERSION = 1
MAX_HEADER_BYTES = 16 * 1024**2
MAX_SECONDS = 1e9  # of a temporal patch
_ANEW = "open the video with open_video and save it again"

Path_ = str | os.PathLike[str]


@dataclass(frozen=True)
class Origin:
    """What computed a clip: the seal of its bundle, the backend, and the precision."""

    bundle: str
    backend: str
    precision: str


@dataclass(frozen=True)
class Part:
    """An array of a saved clip: as NumPy names its dtype (bfloat16 as uint16), its shape, and the hash of its bytes."""

    dtype: str
    shape: tuple[int, ...]
    sha256: str


@dataclass(frozen=True)
class Header:
    """What a saved clip says of itself; its parts lie in the file in this order."""

    schema_version: int
    origin: Origin
    shown: Shown
    parts: dict[str, Part]


@dataclass(frozen=True)
class Saved:
    """What saving a clip did.

    Attributes:
        path: of the file.
        num_bytes: of it.
        removed: what others that were killed while they saved to this path had left, and is gone now.
    """

    path: Path
    num_bytes: int
    removed: tuple[Path, ...]


def save(path: Path_, memory: Memory, origin: Origin) -> Saved:
    """Write what a memory holds. On any error, and if the process is killed, what was at `path` stays.

    Raises:
        ClipError: something else than a saved clip is there, it cannot be written to, or the disk is full.
    """
    out = Path(path)
    try:
        if os.path.lexists(out) and not _is_clip(out):
            raise ClipError(f"{out} exists and is no saved clip; accepted: a new path, or a saved clip to replace")
        removed = tuple(_remove_stale(out))
        arrays = {name: np.ascontiguousarray(array) for name, array in memory.arrays().items()}
        parts = {n: Part(str(a.dtype), a.shape, hashlib.sha256(a.data).hexdigest()) for n, a in arrays.items()}
        header = Header(SCHEMA_VERSION, origin, memory.shown, parts)
        text = json.dumps(sealed(config.to_dict(header))).encode()
        with _temporary(out) as file:
            file.write(MAGIC + len(text).to_bytes(8, "little") + text)
            for array in arrays.values():
                file.write(array.data)
            file.flush()
            os.fsync(file.fileno())
            num_bytes = file.tell()
            os.replace(file.name, out)
    except (OSError, ValueError) as error:  # ValueError: a name that the system cannot have
        reason = getattr(error, "strerror", None) or error
        raise ClipError(f"cannot write {out}: {reason}; free space, or choose another path") from error
    return Saved(out, num_bytes, removed)


def load(path: Path_, backend: Backend, model: config.Model, tokenizer: prompt.Tokenizer, origin: Origin) -> Memory:
    """Read a saved clip.

    Raises:
        ClipError: it is none, damaged, or computed by something else than `origin`.
    """
    source = Path(path)
    try:
        with _opened(source) as (file, size):
            header = _read_header(file, size)
            if header.origin != origin:
                raise ClipError(f"{_difference(header.origin, origin)}; {_ANEW}")
            ids = _expected_ids(header, model, tokenizer, size)
            cache = backend.prepare(len(ids) + SLACK)
            expected = _expected_parts(header.shown, model, ids, cache.parts())
            _check_parts(header.parts, expected, size - file.tell())
            arrays = {name: _read_part(file, name, part) for name, part in header.parts.items()}
            if not np.array_equal(arrays["ids"], ids):
                raise ClipError(f"its prompt is not what this version of vlrt writes; {_ANEW}")
            return Memory.restore(backend, model, tokenizer, header.shown, cache, arrays)
    except ClipError as error:
        raise ClipError(f"{source} cannot be used: {error}") from error
    except (OSError, ValueError) as error:
        raise ClipError(f"{source} cannot be read: {getattr(error, 'strerror', None) or error}") from error


@contextlib.contextmanager
def _temporary(out: Path) -> Iterator[IO[bytes]]:
    """Give a new sibling of `out` to write, locked as long as it is open; it is removed unless it was renamed."""
    while True:
        file = open(out.parent / f".{out.name}.{secrets.token_hex(8)}.partial", "xb")  # noqa: SIM115 - closed below
        if _lock(file) and os.fstat(file.fileno()).st_nlink:
            break
        file.close()  # another save took it for stale before it was locked
    try:
        yield file
    finally:
        file.close()
        Path(file.name).unlink(missing_ok=True)


def _remove_stale(out: Path) -> Iterator[Path]:
    """Remove temporary siblings whose writers are gone, and yield them."""
    for path in sorted(out.parent.iterdir()):
        if not path.name.startswith(f".{out.name}.") or not path.name.endswith(".partial"):
            continue
        with contextlib.suppress(FileNotFoundError):  # another save has put it in place, or removed it
            if _is_regular(path):
                with path.open("rb") as file:
                    if _lock(file):
                        path.unlink()
                        yield path


def _lock(file: IO[bytes]) -> bool:
    """Lock a file, if nobody else has; the system lets go of it when its process ends, however it ends."""
    import fcntl

    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    return True


def _is_regular(path: Path) -> bool:
    return stat.S_ISREG(path.lstat().st_mode)


def _is_clip(path: Path) -> bool:
    if not _is_regular(path):
        return False
    with path.open("rb") as file:
        return file.read(len(MAGIC)) == MAGIC


@contextlib.contextmanager
def _opened(path: Path) -> Iterator[tuple[BufferedReader, int]]:
    """Open a regular file: reading a pipe or a device could go on for ever."""
    if not stat.S_ISREG(path.stat().st_mode):
        raise ClipError("it is no regular file; accepted: a file that Clip.save wrote")
    with path.open("rb") as file:
        yield file, os.fstat(file.fileno()).st_size


def _read_header(file: BufferedReader, size: int) -> Header:
    """Read what stands before the values, and check it against its seal."""
    start = file.read(len(MAGIC) + 8)
    length = int.from_bytes(start[len(MAGIC) :], "little")
    if not start.startswith(MAGIC) or len(start) < len(MAGIC) + 8:
        raise ClipError("it is no saved clip; accepted: a file that Clip.save wrote")
    if length > min(MAX_HEADER_BYTES, size):
        raise ClipError(f"its header is said to have {length} bytes, the file has {size}; {_ANEW}")
    try:
        values = json.loads(file.read(length))
        if not isinstance(values, dict) or values.get(SEAL) != sealed(values)[SEAL]:
            raise ConfigError("its header does not fit its sha256")
        if values.get("schema_version") != SCHEMA_VERSION:
            raise ConfigError(f"it has schema version {values.get('schema_version')!r}; accepted: {SCHEMA_VERSION}")
        return config.from_dict(Header, {key: value for key, value in values.items() if key != SEAL})
    except (ValueError, RecursionError, ConfigError) as error:
        raise ClipError(f"it is damaged: {error}; {_ANEW}") from error


def _difference(theirs: Origin, ours: Origin) -> str:
    """Say by what a clip was computed, where it was not by what is to answer."""
    if theirs.bundle == ours.bundle:
        return (
            f"it was computed by the backend {theirs.backend} in {theirs.precision}; accepted: {ours.backend} in "
            f"{ours.precision}"
        )
    return f"it was computed by the bundle {theirs.bundle[:16]}..., this one is {ours.bundle[:16]}..."


def _expected_ids(header: Header, model: config.Model, tokenizer: prompt.Tokenizer, size: int) -> NDArray[np.int64]:
    """Return the prompt up to the end of such a video, once it is clear that the file can hold so much."""
    shown, merge = header.shown, model.vision.spatial_merge_size
    time, height, width = grid = shown.media.grid_thw
    tokens = math.prod(grid) // merge**2
    if min(grid) < 1 or height % merge or width % merge or tokens > model.decoder.max_positions:
        raise ClipError(f"its video has {list(grid)} patches, which this model cannot be shown; {_ANEW}")
    if tokens * model.decoder.hidden_size * 4 > size:
        raise ClipError(f"its video is said to have {tokens} tokens, more than {size} bytes hold; {_ANEW}")
    if not 0 <= shown.media.seconds_per_temporal_patch < MAX_SECONDS:
        raise ClipError(f"it has {shown.media.seconds_per_temporal_patch} seconds per temporal patch; {_ANEW}")
    if not 1 <= shown.num_frames <= time * model.vision.temporal_patch_size:
        raise ClipError(f"it is said to have {shown.num_frames} frames in {time} temporal patches; {_ANEW}")
    built = prompt.build(tokenizer, model, "?", [shown.media], reasoning="direct")
    return built.ids[: video_end(built, model)]


def _expected_parts(
    shown: Shown, model: config.Model, ids: NDArray[np.int64], empty: Mapping[str, NDArray[Any]]
) -> dict[str, tuple[str, tuple[int, ...]]]:
    """Return dtype and shape of each part of such a video; `empty` are the parts of a cache that holds nothing."""
    grid, width = shown.media.grid_thw, model.decoder.hidden_size
    expected: dict[str, tuple[str, tuple[int, ...]]] = {
        "ids": ("int64", (len(ids),)),
        "tokens": ("float32", (math.prod(grid) // model.vision.spatial_merge_size**2, width)),
        "pooled": ("float32", (grid[0], width)),
    }
    for name, array in empty.items():
        expected[name] = str(array.dtype), tuple(size or len(ids) for size in array.shape)
    return expected


def _check_parts(parts: Mapping[str, Part], expected: Mapping[str, tuple[str, tuple[int, ...]]], left: int) -> None:
    """Refuse parts that this model would not have, before any is read."""
    if parts.keys() != expected.keys():
        odd = sorted(parts.keys() ^ expected.keys())[0]
        raise ClipError(f"it {'has no' if odd in expected else 'has a'} part {odd!r}, unlike this model; {_ANEW}")
    for name, part in parts.items():
        if (part.dtype, part.shape) != expected[name]:
            dtype, shape = expected[name]
            raise ClipError(
                f"its part {name!r} is {part.dtype} {list(part.shape)}; accepted: {dtype} {list(shape)}; {_ANEW}"
            )
    needed = sum(math.prod(part.shape) * np.dtype(part.dtype).itemsize for part in parts.values())
    if needed != left:
        raise ClipError(f"its parts have {needed} bytes, the file has {left} for them; it was cut short: {_ANEW}")


def _read_part(file: BufferedReader, name: str, part: Part) -> NDArray[Any]:
    array = np.empty(part.shape, part.dtype)
    view = array.data.cast("B")
    if file.readinto(view) != len(view) or hashlib.sha256(view).hexdigest() != part.sha256:
        raise ClipError(f"its part {name!r} is damaged; copy it anew, or {_ANEW}")
    return array
