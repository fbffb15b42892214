"""What a video source is, and a name for what is in it: equal contents, sampled alike, have equal names.

Knows files and arrays, not how they are decoded.
"""

import hashlib
import os
from collections.abc import Hashable, Sequence
from pathlib import Path

from vlrt.video import Frames

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
            digest.update(source.data.tobytes() + source.pts_seconds.tobytes())
        elif isinstance(source, bytes):
            digest.update(source)
        elif isinstance(source, str | os.PathLike):
            return ("file", _of_file(source), num_frames, fps)
        else:
            return ("list", tuple(_of_file(path) for path in source), num_frames, fps)
    except (OSError, ValueError, TypeError):
        return None
    return (type(source).__name__, digest.digest(), num_frames, fps)


def _of_file(path: str | os.PathLike[str]) -> bytes:
    with Path(path).open("rb") as file:
        return hashlib.file_digest(file, "sha256").digest()
