"""Real video files for tests, made with PyAV: every frame tells its own number, so that a test sees which it got."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator, Sequence
from fractions import Fraction
from pathlib import Path

import av
import numpy as np
from numpy.typing import NDArray

from vlrt.config import Video, Vision

# A tower as small as its checks allow, with Qwen2.5-VL's patch sizes.
VISION = Vision(depth=1, hidden_size=8, intermediate_size=8, num_heads=2, out_hidden_size=8, hidden_act="silu")
SMALL = Video(min_pixels=28 * 28, max_pixels=112 * 112)  # frames small enough to compare quickly
CELL = 16  # pixels; the side of a bit that `picture` draws
BITS = 10


def picture(number: int, height: int = 96, width: int = 160) -> NDArray[np.uint8]:
    """Return frame `number`, [H, W, 3] uint8: its bits as black and white cells (5 x 2, from the top left), grey else.

    The quarters' greys differ, so that a picture that is turned or mirrored is told apart as well.
    """
    frame = np.full((height, width, 3), 120, np.uint8)
    frame[height // 2 :, : width // 2] = (200, 60, 60)
    frame[height // 2 :, width // 2 :] = (60, 60, 200)
    for bit in range(BITS):
        row, column = divmod(bit, 5)
        frame[row * CELL : (row + 1) * CELL, column * CELL : (column + 1) * CELL] = 235 if number >> bit & 1 else 20
    return frame


def busy(count: int, height: int = 96, width: int = 160) -> list[NDArray[np.uint8]]:
    """Return `picture(0)` to `picture(count - 1)` over noise, so that each packet is large and like no other."""
    rng = np.random.default_rng(0)
    noise = rng.integers(0, 256, (count, height - 2 * CELL, width, 3), np.uint8)
    return [np.concatenate([picture(i, height, width)[: 2 * CELL], noise[i]]) for i in range(count)]


def number_of(frame: NDArray[np.uint8], height: int = 96, width: int = 160) -> int:
    """Return the number that `picture` drew into a frame, which may have been resized."""
    rows, columns = frame.shape[0] / height, frame.shape[1] / width
    number = 0
    for bit in range(BITS):
        row, column = divmod(bit, 5)
        centre = frame[int((row + 0.5) * CELL * rows), int((column + 0.5) * CELL * columns)]
        number |= int(centre.mean() > 127) << bit
    return number


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """Silence what encoders print to stderr past FFmpeg's logging (x265, SVT-AV1)."""
    saved, null = os.dup(2), os.open(os.devnull, os.O_WRONLY)
    try:
        os.dup2(null, 2)
        yield
    finally:
        os.dup2(saved, 2)
        os.close(saved)
        os.close(null)


def make(
    path: Path,
    codec: str = "libx264",
    *,
    frames: int = 60,
    fps: int | Fraction = 30,
    height: int = 96,
    width: int = 160,
    pix_fmt: str = "yuv420p",
    gop: int = 12,
    ticks: Sequence[int] | None = None,
    time_base: Fraction = Fraction(1, 1000),
    options: dict[str, str] | None = None,
    container_options: dict[str, str] | None = None,
    rotation: tuple[float, bool] | None = None,
    audio: bool = False,
    pictures: Sequence[NDArray[np.uint8]] | None = None,
) -> Path:
    """Write a video of `picture(0)`, `picture(1)` ... (or of `pictures`) and return its path.

    `ticks` are presentation times in `time_base`, for variable rates and start offsets. `rotation` is (degrees
    anticlockwise at which players show the stored pictures, mirrored or not).
    """
    with quiet(), av.open(str(path), "w", container_options=container_options or {}) as out:
        stream = out.add_stream(codec, rate=fps, options=options or {})
        stream.height, stream.width, stream.pix_fmt = height, width, pix_fmt
        stream.codec_context.gop_size = gop
        if ticks is not None:
            stream.codec_context.time_base = time_base
        if rotation:
            stream.set_display_rotation(rotation[0], hflip=rotation[1])
        sound = out.add_stream("aac", rate=16_000) if audio else None
        for i in range(frames):
            drawn = pictures[i] if pictures is not None else picture(i, height, width)
            frame = av.VideoFrame.from_ndarray(drawn, "rgb24")
            if ticks is not None:
                frame.pts, frame.time_base = ticks[i], time_base
            out.mux(stream.encode(frame))
        out.mux(stream.encode())
        if sound is not None:
            _add_silence(out, sound, frames / float(fps))
    return path


def make_sound(path: Path, seconds: float = 1.0, codec: str = "aac") -> Path:
    """Write a file without pictures and return its path."""
    with av.open(str(path), "w") as out:
        _add_silence(out, out.add_stream(codec, rate=16_000), seconds)
    return path


def _add_silence(out: av.container.OutputContainer, stream: av.audio.AudioStream, seconds: float) -> None:
    for start in range(0, int(seconds * 16_000), 1024):
        frame = av.AudioFrame.from_ndarray(np.zeros((1, 1024), np.float32), format="fltp", layout="mono")
        frame.rate, frame.pts, frame.time_base = 16_000, start, Fraction(1, 16_000)
        out.mux(stream.encode(frame))
    out.mux(stream.encode())


def decoded(path: Path) -> list[NDArray[np.uint8]]:
    """Return every frame of a file, [H, W, 3] uint8, decoded from start to end without seeking."""
    with av.open(str(path)) as file:
        return [frame.to_ndarray(format="rgb24") for frame in file.decode(video=0)]
