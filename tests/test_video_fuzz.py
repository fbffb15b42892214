"""Damaged files of many kinds: whatever the bytes, sound Frames or a VideoError come, and nothing is printed."""

import contextlib
import io
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from tests.videos import SMALL, VISION, busy, make, picture
from vlrt.errors import VideoError
from vlrt.video import Frames, load

VIDEO = replace(SMALL, max_source_pixels=512 * 512)
CASES = 14  # damaged copies of each file

# mistakes of our own code, which the catch-all around foreign readers would dress up as damage
OURS = (TypeError, AttributeError, NameError, KeyError, IndexError, ZeroDivisionError, AssertionError, RecursionError)

VIDEOS = {
    "h264.mp4": ("libx264", {}),
    "fragmented.mp4": ("libx264", {"container_options": {"movflags": "frag_keyframe+empty_moov"}}),
    "faststart.mp4": ("libx264", {"container_options": {"movflags": "faststart"}, "audio": True}),
    "h264.mkv": ("libx264", {"audio": True}),
    "h264.ts": ("libx264", {}),
    "h264.avi": ("libx264", {}),
    "h264.h264": ("libx264", {}),
    "h264.flv": ("libx264", {}),
    "hevc.mp4": ("libx265", {"options": {"x265-params": "log-level=none"}}),
    "vp9.webm": ("libvpx-vp9", {"options": {"cpu-used": "8"}}),
    "vp8.webm": ("libvpx", {}),
    "mpeg4.avi": ("mpeg4", {}),
    "animation.gif": ("gif", {"pix_fmt": "rgb8"}),
    "animation.apng": ("apng", {"pix_fmt": "rgb24"}),
    "mpeg2.mpg": ("mpeg2video", {}),
}
IMAGES = ["PNG", "JPEG", "WEBP", "GIF", "TIFF", "AVIF"]


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> dict[str, bytes]:
    folder = tmp_path_factory.mktemp("files")
    made = {name: make(folder / name, codec, frames=20, pictures=busy(20), gop=6, **options) for name, (codec, options) in VIDEOS.items()}  # fmt: skip  # noqa: E501
    contents = {name: path.read_bytes() for name, path in made.items()}
    for kind in IMAGES:
        file = io.BytesIO()
        Image.fromarray(busy(1)[0]).save(file, format=kind)
        contents[kind] = file.getvalue()
    return contents


def damaged(content: bytes, rng: np.random.Generator) -> bytes:
    """Return a copy that is cut off, overwritten, shortened or lengthened in places, mostly near the header."""
    data = bytearray(content)
    for _ in range(rng.integers(1, 6)):
        reach = len(data) if rng.random() < 0.5 else min(len(data), 600)
        at, length = int(rng.integers(0, max(reach, 1))), int(rng.integers(1, 64))
        match rng.integers(0, 5):
            case 0:
                data[at : at + 1] = rng.bytes(1)
            case 1:
                data[at : at + length] = rng.bytes(length)
            case 2:
                data[at : at + 4] = b"\xff\xff\xff\xff"
            case 3:
                del data[at : at + length]
            case 4:
                data[at : at + length] = bytes(length)
    return bytes(data[: rng.integers(1, len(data) + 1)] if data and rng.random() < 0.3 else data)


def check(source: bytes | Path) -> bool:
    """Load a source; whether it was answered. Frames must be sound; an error must be about the file."""
    try:
        frames = load(source, VIDEO, VISION)
    except VideoError as error:
        refusal = error
    else:
        refusal = None
    if refusal:
        assert "\n" not in str(refusal)
        assert not isinstance(refusal.__cause__, OURS), repr(refusal.__cause__)
        return False
    count, height, width, channels = frames.data.shape
    assert isinstance(frames, Frames)
    assert count >= 1
    assert height % 28 == width % 28 == channels - 3 == 0
    assert frames.data.dtype == np.uint8
    assert frames.pts_seconds.shape == (count,)
    assert np.isfinite(frames.pts_seconds).all()
    assert (np.diff(frames.pts_seconds) > 0).all()
    assert frames.pts_seconds[0] == 0
    assert np.isfinite([frames.sample_fps, frames.duration_seconds]).all()
    assert frames.sample_fps > 0
    return True


@pytest.mark.parametrize("name", [*VIDEOS, *IMAGES])
def test_damaged_files_are_answered_or_refused(
    files: dict[str, bytes], name: str, capfd: pytest.CaptureFixture
) -> None:
    # Would catch any other exception, a hang, a crash of FFmpeg, times that are not numbers.
    rng = np.random.default_rng(sum(name.encode()))
    assert check(files[name])
    for _ in range(CASES):
        check(damaged(files[name], rng))
    printed = capfd.readouterr()
    assert printed.out == ""
    assert printed.err == ""


def test_every_length_of_a_small_file(files: dict[str, bytes]) -> None:
    # Would catch a header that is half read.
    content = files["h264.mkv"]
    answered = [check(content[:length]) for length in np.linspace(1, len(content), 25).astype(int)]
    assert not answered[0]
    assert answered[-1]


def test_noise_is_refused() -> None:
    # Would catch a demuxer that makes a video of anything: FFmpeg draws text files, for one.
    rng = np.random.default_rng(0)
    for size in (1, 100, 5000):
        assert not check(rng.bytes(size))


def test_lists_and_paths_are_no_exception(files: dict[str, bytes], tmp_path: Path) -> None:
    # Would catch a reader of files that fails otherwise than the reader of memory.
    rng = np.random.default_rng(1)
    Image.fromarray(picture(0)).save(tmp_path / "whole.png")
    for name in ("h264.mp4", "h264.mkv", "PNG", "JPEG"):
        for i in range(5):
            path = tmp_path / f"{name}{i}"
            path.write_bytes(damaged(files[name], rng) or b"x")
            check(path)
            with contextlib.suppress(VideoError):
                load([tmp_path / "whole.png", path], VIDEO, VISION)
