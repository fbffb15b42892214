"""Frames to video tokens: chunks of whole temporal patches through the vision tower, wherever patches are cut.

Knows the order of the work, and how long it takes; no file and no engine from within.
"""

from vlrt import config, preprocess
from vlrt.answer import Clock
from vlrt.backends.base import Array, Backend, FrameUpload
from vlrt.video import Frames


def encode(
    backend: Backend, model: config.Model, frames: Frames, clock: Clock, upload: FrameUpload | None = None
) -> Array:
    """Return the video tokens [N_v, C] of frames that went through `preprocess.resized`.

    Args:
        backend: has the tower.
        model: its config.
        frames: of the video.
        clock: told what patches and tower take.
        upload: of the backend, where the frames were decoded into its memory.

    Raises:
        Stopped: the clock says so.
    """
    upload = upload or backend.frame_upload()
    time, rows, columns = preprocess.grid_of(frames, model.vision)
    step, parts = max(1, backend.vision_chunk // (rows * columns)), []
    for start in range(0, time, step):
        stop = min(start + step, time)
        with clock("preprocess"):
            if upload is not None:
                pixels = upload.patches(frames.data, start, stop)
            else:
                pixels = preprocess.patchify(frames, model.video, model.vision, start, stop).pixels
        with clock("vision"):
            parts.append(backend.encode(pixels, (stop - start, rows, columns)))
    return backend.join(parts)
