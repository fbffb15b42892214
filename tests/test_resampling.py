"""Frames at another size: by the library at every level, and by Pillow where there is none."""

import ctypes

import numpy as np
import pytest
import torch

from tests.ort_ops import level
from vlrt import resampling
from vlrt.backends import ort_library
from vlrt.resampling import resize

__all__ = ["level"]  # a fixture
SIZES = [(28, 28), (84, 140), (224, 56), (112, 112), (1, 1), (123, 140), (500, 77), (121, 5)]


def edges(height: int, width: int) -> np.ndarray:
    """Pixels whose channels are each 0 or 254, so that halves seldom tie: bicubic weights overshoot on both sides."""
    return np.random.default_rng(2).integers(0, 2, (height, width, 3), np.uint8) * np.uint8(254)


def torchvision(source: np.ndarray, size: tuple[int, int]) -> np.ndarray:
    tensor = torch.from_numpy(source).permute(2, 0, 1)[None].float()
    values = torch.nn.functional.interpolate(tensor, size, mode="bicubic", antialias=True)
    return values.clamp(0, 255).round().byte()[0].permute(1, 2, 0).numpy()


def assert_near(out: np.ndarray, want: np.ndarray) -> None:
    apart = np.abs(out.astype(int) - want.astype(int))
    assert out.shape == want.shape
    assert apart.max() <= 1
    assert (apart > 0).sum() <= max(1, apart.size // 1000)


@pytest.mark.parametrize("size", SIZES)
def test_pillow_is_torchvision_but_for_ties(tmp_path, monkeypatch, size):
    """Catches 8-bit resampling, which clips between columns and rows: tens of levels away at hard edges."""
    monkeypatch.setattr(ort_library, "DIRECTORY", tmp_path)
    assert_near(resize(edges(123, 77), size), torchvision(edges(123, 77), size))


@pytest.mark.parametrize("size", SIZES)
def test_the_library_is_torchvision_but_for_ties(library, monkeypatch, size):
    """Catches a weight of another pixel at the edges, mixed-up channels, and what lies behind the last pixel."""
    monkeypatch.setattr(ort_library, "DIRECTORY", library.path.parent)
    assert resampling._by_library(str(library.path.parent)) is not resampling._by_pillow
    for height, width in ((123, 77), (3, 1), (1, 300), (64, 1031)):
        assert_near(resize(edges(height, width), size), torchvision(edges(height, width), size))


def test_every_level_is_torchvision_but_for_ties(library, level):
    """Catches vectors whose last numbers are another pixel's."""
    call = ctypes.CDLL(str(library.path)).vlrt_resize
    call.argtypes = [ctypes.c_char_p, ctypes.c_void_p, *[ctypes.c_int64] * 5, ctypes.c_void_p]
    source, out = edges(270, 481), np.zeros((85, 141, 3), np.uint8)
    assert call(level.encode(), source.ctypes.data, 270, 481, source.strides[0], 84, 141, out.ctypes.data) == 0
    assert_near(out[:84], torchvision(source, (84, 141)))
    assert not out[84].any()
    assert call(b"mmx", source.ctypes.data, 270, 481, source.strides[0], 84, 141, out.ctypes.data) == 1


def test_views_are_read_as_they_lie(library, monkeypatch):
    """Catches turned frames, and frames with padded rows, that are read as if they were dense."""
    monkeypatch.setattr(ort_library, "DIRECTORY", library.path.parent)
    source = edges(90, 120)
    for view in (source[:, ::-1], source.transpose(1, 0, 2), source[:, 7:100], source[::-1], source[:, :, ::-1]):
        assert np.array_equal(resize(view, (28, 56)), resize(view.copy(), (28, 56)))


def test_nothing_is_done_to_a_frame_that_has_the_size():
    """Catches a copy, and a resampling that rounds."""
    source = edges(28, 56)
    assert resize(source, (28, 56)) is source


def test_a_library_that_does_not_load_leaves_pillow(tmp_path, monkeypatch):
    """Catches frames that cannot be read for want of what only makes them faster."""
    (tmp_path / ort_library.file_name()).write_bytes(b"no library")
    monkeypatch.setattr(ort_library, "DIRECTORY", tmp_path)
    assert_near(resize(edges(123, 77), (28, 28)), torchvision(edges(123, 77), (28, 28)))
    assert resampling._by_library(str(tmp_path)) is resampling._by_pillow
