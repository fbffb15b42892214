"""A frame at another size, by `libvlrt_ort` where that is built, else by Pillow.

Knows pictures in memory; no files, no rule of sizes.
"""

import ctypes
import functools
from collections.abc import Callable
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from vlrt.backends import ort_library

Picture = NDArray[np.uint8]


def resize(picture: Picture, size: tuple[int, int]) -> Picture:
    """Return a frame [H, W, 3] uint8 at `size` = (height, width): bicubic, antialiased, in float32, rounded at the end.

    Equal to torchvision's resize of uint8 tensors, which qwen-vl-utils calls, but for rounding ties (one level in fewer
    than 1 of 1,000 values). Pillow's 8-bit resize, and torch's port of it, clip and round between columns and rows
    instead: up to 30 levels away at hard edges.
    """
    if picture.shape[:2] == size:
        return picture
    return _by_library(str(ort_library.DIRECTORY))(picture, size)


@functools.cache
def _by_library(directory: str) -> Callable[[Picture, tuple[int, int]], Picture]:
    """Return what resizes with the library of a directory; without one, Pillow."""
    found = ort_library.find(Path(directory))
    if isinstance(found, str):
        return _by_pillow
    call = ctypes.CDLL(str(found.path)).vlrt_resize
    pointer, number = ctypes.c_void_p, ctypes.c_int64
    call.argtypes = [ctypes.c_char_p, pointer, *[number] * 5, pointer]
    level = ort_library.AUTO.encode()

    def resize(picture: Picture, size: tuple[int, int]) -> Picture:
        if picture.strides[1:] != (3, 1):
            picture = np.ascontiguousarray(picture)
        resized = np.empty((*size, 3), np.uint8)
        given = picture.ctypes.data, *picture.shape[:2], picture.strides[0], *size
        if call(level, *given, resized.ctypes.data) != 0:
            raise MemoryError("no memory is left to resize a frame")
        return resized

    return resize


def _by_pillow(picture: Picture, size: tuple[int, int]) -> Picture:
    from PIL import Image  # which takes a while to import

    resized = np.empty((*size, 3), np.uint8)
    for channel in range(3):
        values = Image.fromarray(picture[:, :, channel].astype(np.float32))
        scaled = np.asarray(values.resize((size[1], size[0]), Image.Resampling.BICUBIC))
        resized[:, :, channel] = np.rint(np.clip(scaled, 0, 255))
    return resized
