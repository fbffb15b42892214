"""Pixels against qwen-vl-utils and transformers: the same frames, at most one level apart, in the same order."""

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import Qwen2VLImageProcessorPil

from tests import qwen_reference
from tests.videos import SMALL, VISION, decoded, make, picture
from vlrt.config import Video
from vlrt.errors import VideoError
from vlrt.preprocess import grid_of, patchify, resized, take
from vlrt.resampling import resize
from vlrt.sampling import frame_size
from vlrt.video import Frames, load


@pytest.fixture(scope="module")
def clip(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """2.1 s of noise and edges at an odd size, where resampling differs most."""
    rng = np.random.default_rng(0)
    pictures = [
        np.where(rng.random((90, 122, 1)) < 0.5, picture(i, 90, 122), rng.integers(0, 256, (90, 122, 3), np.uint8))
        for i in range(63)
    ]
    return make(
        tmp_path_factory.mktemp("clip") / "noise.mp4", frames=63, height=90, width=122, pictures=pictures,
        options={"crf": "10"},
    )  # fmt: skip


@pytest.mark.parametrize(
    ("video", "asked"),
    [
        (Video(), {}),
        (SMALL, {}),
        (SMALL, {"nframes": 10}),
        (SMALL, {"fps": 13.0}),
        (replace(SMALL, total_pixels=400 * 28 * 28), {"nframes": 62}),
        (replace(Video(), max_pixels=10**8, min_pixels=500_000), {"nframes": 4}),
    ],
)
def test_frames_are_those_of_qwen_vl_utils(clip: Path, video: Video, asked: dict[str, float]) -> None:
    # Would catch another sampling, another size, another colour conversion, another resampling.
    data, indices, sample_fps = qwen_reference.fetch_video(str(clip), video, **asked)
    frames = load(clip, video, VISION, num_frames=asked.get("nframes"), fps=asked.get("fps"))
    assert frames.data.shape == data.shape
    np.testing.assert_allclose(frames.pts_seconds, indices / 30, atol=1e-9)
    assert frames.sample_fps == pytest.approx(sample_fps, rel=1e-12)
    assert np.abs(frames.data.astype(int) - data.astype(int)).max() <= 1
    assert resized(frames, video, VISION).data is frames.data  # already at the model's size


@pytest.mark.parametrize("count", [1, 3, 4])
def test_a_list_of_images_is_that_of_qwen_vl_utils(tmp_path: Path, count: int) -> None:
    # Would catch the first resize, to multiples of 56, left out; or an odd number of frames not padded.
    paths = []
    for i in range(count):
        paths.append(tmp_path / f"{i}.png")
        Image.fromarray(picture(i, 150, 230)).save(paths[-1])
    data, _, sample_fps = qwen_reference.fetch_video([str(p) for p in paths], SMALL_LIST, sample_fps=2.0)
    frames = resized(load(paths, SMALL_LIST, VISION), SMALL_LIST, VISION)
    assert frames.data.shape == data.shape
    assert np.abs(frames.data.astype(int) - data.astype(int)).max() <= 1
    assert frames.sample_fps == sample_fps


# qwen-vl-utils hands a list's bounds to its images too, so that both are set to the same here.
SMALL_LIST = replace(
    SMALL, image_min_pixels=SMALL.min_pixels // 4, image_max_pixels=SMALL.max_pixels // 4, max_pixels=SMALL.max_pixels
)


@pytest.mark.parametrize("mode", ["RGB", "RGBA", "L", "P", "LA", "1", "CMYK"])
def test_an_image_is_that_of_qwen_vl_utils(tmp_path: Path, mode: str) -> None:
    # Would catch transparency over black, or greys that become something else.
    rng = np.random.default_rng(1)
    path = tmp_path / ("x.tiff" if mode == "CMYK" else "x.png")
    Image.fromarray(rng.integers(0, 256, (77, 123, 4), np.uint8), "RGBA").convert(mode).save(path)
    expected = np.asarray(qwen_reference.vision_process().fetch_image({"image": str(path)}))
    frames = load(path, Video(), VISION)
    np.testing.assert_array_equal(frames.data[0], expected)
    assert frames.is_image
    assert (frames.source_height, frames.source_width) == (77, 123)


def test_patches_of_an_image_are_those_of_transformers(tmp_path: Path) -> None:
    # Would catch any other order of patches or of values within one, and another normalisation.
    rng = np.random.default_rng(3)
    Image.fromarray(rng.integers(0, 256, (84, 140, 3), np.uint8)).save(tmp_path / "x.png")
    frames = resized(load(tmp_path / "x.png", Video(), VISION), Video(), VISION)
    patches = patchify(frames, Video(), VISION)
    expected = Qwen2VLImageProcessorPil()(Image.open(tmp_path / "x.png"), return_tensors="np")
    assert patches.grid_thw == tuple(expected["image_grid_thw"][0]) == (1, 6, 10)
    assert patches.pixels.dtype == np.float32
    np.testing.assert_allclose(patches.pixels, expected["pixel_values"], atol=1e-5)


def test_patches_of_a_video_are_those_of_transformers(clip: Path) -> None:
    # Restates its video processor, which needs torchvision. Would catch time mixed up with channels.
    frames = resized(load(clip, SMALL, VISION, num_frames=6), SMALL, VISION)
    patches = patchify(frames, SMALL, VISION)
    t, gh, gw = patches.grid_thw
    scaled = torch.from_numpy(frames.data).permute(0, 3, 1, 2).double() / 255
    scaled = (scaled - torch.tensor(SMALL.mean)[:, None, None]) / torch.tensor(SMALL.std)[:, None, None]
    expected = scaled.view(t, 2, 3, gh // 2, 2, 14, gw // 2, 2, 14).permute(0, 3, 6, 4, 7, 2, 1, 5, 8).reshape(-1, 1176)
    np.testing.assert_allclose(patches.pixels, expected.numpy(), atol=1e-5)
    assert patches.seconds_per_temporal_patch == pytest.approx(2 / frames.sample_fps)
    assert not patches.is_image


def test_a_patch_meets_the_tower_s_convolution(clip: Path) -> None:
    # Independent of any restatement: a row of pixels times the flat kernel is what a 3-D convolution gives.
    frames = resized(load(clip, SMALL, VISION, num_frames=4), SMALL, VISION)
    patches = patchify(frames, SMALL, VISION)
    kernel = torch.randn(1, 3, 2, 14, 14, generator=torch.Generator().manual_seed(0))
    pixels = (torch.from_numpy(frames.data).float() / 255 - torch.tensor(SMALL.mean)) / torch.tensor(SMALL.std)
    convolved = torch.nn.functional.conv3d(pixels.permute(3, 0, 1, 2)[None], kernel, stride=(2, 14, 14))[0, 0]
    t, gh, gw = patches.grid_thw
    windows = convolved.view(t, gh // 2, 2, gw // 2, 2).permute(0, 1, 3, 2, 4).reshape(-1)
    torch.testing.assert_close(torch.from_numpy(patches.pixels) @ kernel.flatten(), windows, atol=2e-3, rtol=1e-4)


def test_chunks_are_the_whole_in_pieces(clip: Path) -> None:
    # Would catch a chunk that starts at a frame instead of a temporal patch.
    frames = resized(load(clip, SMALL, VISION, num_frames=10), SMALL, VISION)
    whole = patchify(frames, SMALL, VISION)
    pieces = [patchify(frames, SMALL, VISION, start, stop) for start, stop in ((0, 2), (2, 3), (3, None))]
    np.testing.assert_array_equal(np.concatenate([p.pixels for p in pieces]), whole.pixels)
    assert [p.grid_thw[0] for p in pieces] == [2, 1, 2]
    assert grid_of(frames, VISION) == whole.grid_thw == (5, *pieces[0].grid_thw[1:])


@pytest.mark.parametrize("span", [(0, 0), (2, 1), (-1, 2), (0, 6), (5, None)])
def test_chunks_beyond_the_video_are_refused(span: tuple[int, int | None]) -> None:
    # Would catch empty pixels that fail later, in the tower, without a name.
    frames = Frames.from_array(np.zeros((10, 28, 28, 3), np.uint8), fps=2)
    with pytest.raises(VideoError, match="0 to 5"):
        patchify(frames, SMALL, VISION, *span)


def test_arrays_are_resized_and_padded() -> None:
    # Would catch an array fed to the tower at its own size, and a last frame lost to the temporal patch.
    array = np.stack([picture(i, 90, 122) for i in range(5)])
    frames = Frames.from_array(array, fps=4.0)
    np.testing.assert_array_equal(frames.data, array)
    ready = resized(frames, SMALL, VISION)
    assert ready.data.shape[0] == 6
    np.testing.assert_array_equal(ready.data[5], ready.data[4])
    np.testing.assert_allclose(ready.pts_seconds, [0, 0.25, 0.5, 0.75, 1, 1])
    assert ready.data.shape[1:3] == frame_size(90, 122, 5, SMALL, VISION)
    np.testing.assert_array_equal(ready.data[3], resize(array[3], ready.data.shape[1:3]))
    assert resized(ready, SMALL, VISION).data is ready.data


def test_an_image_fills_its_temporal_patch(tmp_path: Path) -> None:
    # Would catch an image taken for half a temporal patch.
    Image.fromarray(picture(7)).save(tmp_path / "x.png")
    ready = resized(load(tmp_path / "x.png", SMALL, VISION), SMALL, VISION)
    assert grid_of(ready, VISION)[0] == 1
    np.testing.assert_array_equal(ready.data[0], ready.data[1])


def test_frames_that_were_not_resized_are_refused() -> None:
    # Would catch a reshape error deep inside NumPy.
    with pytest.raises(VideoError, match="resized"):
        grid_of(Frames.from_array(np.zeros((3, 28, 28, 3), np.uint8), fps=2), VISION)
    with pytest.raises(VideoError, match="resized"):
        patchify(Frames.from_array(np.zeros((2, 28, 30, 3), np.uint8), fps=2), SMALL, VISION)


def test_every_level_is_normalised_as_by_arithmetic(clip: Path) -> None:
    # Would catch a look-up table off by a level, or channels exchanged.
    frames = Frames.from_array(np.arange(256, dtype=np.uint8).repeat(3).reshape(1, 16, 16, 3).repeat(2, 0), fps=2)
    vision = replace(VISION, patch_size=8)
    pixels = patchify(frames, SMALL, vision).pixels.reshape(4, 3, 2, 64)[:, :, 0]
    for channel in range(3):
        expected = (np.arange(256) / 255 - SMALL.mean[channel]) / SMALL.std[channel]
        np.testing.assert_allclose(np.sort(pixels[:, channel].ravel()), expected, atol=1e-6)


def test_the_clip_is_what_it_should_be(clip: Path) -> None:
    # The comparisons above are worth something only on pictures with detail.
    assert np.stack(decoded(clip)).std() > 40


def test_the_frames_of_some_temporal_patches_are_taken():
    """Catches frames picked one by one where a temporal patch has two, and times of others."""
    data = np.zeros((6, 28, 28, 3), np.uint8) + np.arange(6, dtype=np.uint8)[:, None, None, None]
    frames = Frames.from_array(data, fps=2.0)
    taken = take(frames, VISION, np.array([True, False, True]))
    assert taken.data[:, 0, 0, 0].tolist() == [0, 1, 4, 5]
    assert taken.pts_seconds.tolist() == [0, 0.5, 2, 2.5]
    assert take(frames, VISION, np.ones(3, bool)) is frames
