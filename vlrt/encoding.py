"""Frames to video tokens: chunks of whole temporal patches through the vision tower, wherever patches are cut.

Knows the order of the work, and how long it takes; not where frames come from, and no engine from within.
"""

from collections.abc import Callable

import numpy as np
from numpy.typing import NDArray

from vlrt import config, preprocess
from vlrt.answer import Clock
from vlrt.backends.base import Array, Backend, FrameUpload
from vlrt.generate import pool
from vlrt.video import Frames


def encode(
    backend: Backend,
    model: config.Model,
    data: NDArray[np.uint8],
    clock: Clock,
    upload: FrameUpload | None = None,
    wait: Callable[[int], object] = lambda _: None,
) -> Array:
    """Return the video tokens [N_v, C] of frames.

    Args:
        backend: has the tower.
        model: its config.
        data: [T, H, W, 3], the frames as `preprocess.resized` returns them.
        clock: told what patches and tower take; what waiting takes counts as decoding.
        upload: of the backend, where the frames are decoded into its memory.
        wait: returns once the first so many frames are there; before that they are not looked at.

    Raises:
        Stopped: the clock says so.
    """
    upload = upload or backend.frame_upload()
    time, rows, columns = preprocess.grid_of_shape(data.shape, model.vision)
    step, parts = _step(backend, rows * columns), []
    for start in range(0, time, step):
        stop = min(start + step, time)
        with clock("decode"):
            wait(stop * model.vision.temporal_patch_size)
        with clock("preprocess"):
            if upload is not None:
                pixels = upload.patches(data, start, stop)
            else:
                pixels = preprocess.cut(data, model.video, model.vision, start, stop)
        with clock("vision"):
            parts.append(backend.encode(pixels, (stop - start, rows, columns), last=stop == time))
    return backend.join(parts)


def num_passes(backend: Backend, model: config.Model, shape: tuple[int, ...]) -> int:
    """Return how many passes of the tower `encode` takes over frames of a shape [T, H, W, 3]."""
    time, rows, columns = preprocess.grid_of_shape(shape, model.vision)
    return -(-time // _step(backend, rows * columns))


def _step(backend: Backend, patches: int) -> int:
    """Return how many temporal patches of so many patches each go through the tower at a time."""
    return max(1, backend.vision_chunk // patches)


def encode_kept(
    backend: Backend,
    model: config.Model,
    frames: Frames,
    kept: NDArray[np.bool_] | None,
    clock: Clock,
    upload: FrameUpload | None = None,
) -> tuple[Array, Array]:
    """Return the video tokens [N, C] that are kept, and all of them pooled over space, [T_v, C].

    A temporal patch without a kept token does not enter the tower, which looks at each by itself; pooled, it has the
    row of the one before it.

    Args:
        backend: as in `encode`.
        model: as in `encode`.
        frames: as `preprocess.resized` returns them.
        kept: [N_v] of the video's tokens; None: all.
        clock: as in `encode`.
        upload: as in `encode`.

    Raises:
        Stopped: the clock says so.
    """
    steps, _, _ = preprocess.grid_of(frames, model.vision)
    if kept is None:
        tokens = encode(backend, model, frames.data, clock, upload)
        return tokens, pool(tokens, steps)
    rows = kept.reshape(steps, -1)
    enters = np.asarray(rows.any(1))
    tokens = encode(backend, model, preprocess.take(frames, model.vision, enters).data, clock)
    pooled = pool(tokens, int(enters.sum()))
    return tokens[np.flatnonzero(rows[enters])], pooled[np.cumsum(enters) - 1]
