"""Still images through Pillow: RGB, upright, at a given size.

Knows image files. Knows no video, no sampling rule and no model.
"""

from __future__ import annotations

import io
from collections.abc import Callable
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from vlrt.config import Video
from vlrt.container import check_pixels, reading
from vlrt.errors import VideoError

if TYPE_CHECKING:  # importing Pillow takes a while, and arrays do without it
    from PIL import Image

FORMATS = ("JPEG", "PNG", "GIF", "WEBP", "BMP", "TIFF", "PPM", "AVIF")  # MPO, which phones write, is opened as JPEG
ORIENTATION = 0x0112  # of EXIF: 1 is upright


def is_image(source: str | bytes, name: str) -> bool:
    """Whether the content of `source` (a path, or a file in memory) is a still image; an animated GIF or PNG is not.

    Raises:
        VideoError: an animated WebP, which FFmpeg does not decode, or a picture too large for Pillow.
    """
    from PIL import Image, UnidentifiedImageError

    try:
        with Image.open(_file(source), formats=FORMATS) as image:
            kind, animated = image.format, image.format != "MPO" and getattr(image, "is_animated", False)
    except (Image.DecompressionBombError, Image.DecompressionBombWarning) as error:
        raise VideoError(f"{name} has more pixels than Pillow reads ({error}); scale it down") from error
    except UnidentifiedImageError:
        return False
    except Exception as error:  # a damaged image, whose reader raises anything
        if isinstance(error, OSError) and error.errno is not None:
            raise VideoError(f"{name} cannot be opened: {error}") from error
        return not _is_gif(source)  # a damaged GIF may still be a video
    if kind == "WEBP" and animated:
        raise VideoError(f"{name} is an animated WebP, which is not supported; convert it to GIF or MP4 (H.264)")
    return kind == "TIFF" or not animated


def read_image(
    source: str | bytes, name: str, video: Video, size: Callable[[int, int], tuple[int, int]]
) -> tuple[NDArray[np.uint8], int, int]:
    """Return an image as [H, W, 3] uint8 RGB, resized to `size(height, width)`, and its upright height and width.

    Transparent pixels of RGBA images are laid over white; resampling is Pillow's bicubic. Source: qwen-vl-utils,
    `fetch_image`; unlike there, the orientation that a camera noted is obeyed.

    Raises:
        VideoError: not an image, damaged, or beyond `video.max_source_pixels`.
    """
    from PIL import Image

    with reading(name), Image.open(_file(source), formats=FORMATS) as stored:
        check_pixels(name, stored.height, stored.width, video)
        image = _over_white(_upright(stored))
        rows, columns = size(image.height, image.width)
        resized = image.resize((columns, rows), Image.Resampling.BICUBIC)
        return np.asarray(resized), image.height, image.width


def _upright(image: Image.Image) -> Image.Image:
    from PIL import Image

    turns = {
        2: Image.Transpose.FLIP_LEFT_RIGHT,
        3: Image.Transpose.ROTATE_180,
        4: Image.Transpose.FLIP_TOP_BOTTOM,
        5: Image.Transpose.TRANSPOSE,
        6: Image.Transpose.ROTATE_270,
        7: Image.Transpose.TRANSVERSE,
        8: Image.Transpose.ROTATE_90,
    }
    image.load()  # before EXIF: PNG holds it behind the pixels
    try:
        orientation = image.getexif().get(ORIENTATION, 1)
    except Exception:  # damaged EXIF raises anything, and a picture without it is taken as stored
        orientation = 1
    return image.transpose(turns[orientation]) if orientation in turns else image


def _over_white(image: Image.Image) -> Image.Image:
    from PIL import Image

    if image.mode != "RGBA":
        return image.convert("RGB")
    white = Image.new("RGB", image.size, (255, 255, 255))
    white.paste(image, mask=image.getchannel("A"))
    return white


def _is_gif(source: str | bytes) -> bool:
    if isinstance(source, bytes):
        return source.startswith(b"GIF8")
    with open(source, "rb") as file:
        return file.read(4) == b"GIF8"


def _file(source: str | bytes) -> str | io.BytesIO:
    return io.BytesIO(source) if isinstance(source, bytes) else source
