"""What a video source is, and a name for what is in it: equal contents, sampled alike, have equal names.

A copy of a file beyond WHOLE_BYTES has another name, if it was written at another time.

Knows files and arrays, not how they are decoded.
"""

import hashlib
import os
from collections.abc import Hashable, Sequence
from pathlib import Path

import numpy as np

from vlrt.video import Frames

WHOLE_BYTES = 64 * 1024**2  # files up to here are hashed whole
END_BYTES = 1024**2

Source = str | os.PathLike[str] | bytes | Sequence[str | os.PathLike[str]] | Frames


def content_key(source: Source, num_frames: int | None, fps: float | None) -> Hashable | None:
    """Return a name for a source as it is sampled; None where it cannot be read: whoever decodes it says why.

    Args:
        source: what `vlrt.video.load` takes.
        num_frames: frames that are sampled.
        fps: frames per second that are sampled.
    """
    digest = hashlib.sha256()
    try:
        if isinstance(source, Frames):
            digest.update(repr((source.data.shape, source.sample_fps, source.is_image)).encode())
            digest.update(np.ascontiguousarray(source.data).data)  # without a copy: frames may be most of the memory
            digest.update(source.pts_seconds.tobytes())
        elif isinstance(source, bytes):
            digest.update(source)
        elif isinstance(source, str | os.PathLike):
            return ("file", _of_file(source), num_frames, fps)
        else:
            return ("list", tuple(_of_file(path) for path in source), num_frames, fps)
    except (OSError, ValueError, TypeError):
        return None
    return (type(source).__name__, digest.digest(), num_frames, fps)


def stamp(source: Source) -> Hashable:
    """Return what changes whenever the files of a source are written to or replaced; None where it has none."""
    if isinstance(source, Frames | bytes):
        return None
    paths = [source] if isinstance(source, str | os.PathLike) else source
    try:
        found = [os.stat(path) for path in paths]
    except (OSError, ValueError, TypeError):
        return None
    return tuple((s.st_dev, s.st_ino, s.st_size, s.st_mtime_ns, s.st_ctime_ns) for s in found)


def _of_file(path: str | os.PathLike[str]) -> Hashable:
    """Return the hash of a file; of a large one that of both ends, with its size and the time it was written."""
    with Path(path).open("rb") as file:
        status = os.fstat(file.fileno())
        if status.st_size <= WHOLE_BYTES:
            return hashlib.file_digest(file, "sha256").digest()
        digest = hashlib.sha256(file.read(END_BYTES))
        file.seek(-END_BYTES, os.SEEK_END)
        digest.update(file.read(END_BYTES))
        return (digest.digest(), status.st_size, status.st_mtime_ns)
