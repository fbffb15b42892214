"""Real files of many kinds: which frames come, at what times, which way up. Each frame tells its own number."""

import io
import json
import subprocess
import sys
from fractions import Fraction
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

import vlrt.container
from tests.videos import SMALL, VISION, decoded, make, number_of, picture
from vlrt.container import Container
from vlrt.decoding import decode_frames
from vlrt.sampling import frame_indices
from vlrt.timeline import list_frames
from vlrt.video import Frames, load

# file name, encoder, options of `make`: containers and codecs with B-frames, open GOPs, alpha, palettes, 10 bit
KINDS = {
    "h264.mp4": ("libx264", {}),
    "h264.mkv": ("libx264", {}),
    "h264.ts": ("libx264", {}),
    "h264.flv": ("libx264", {}),
    "h264.avi": ("libx264", {}),  # AVI holds no presentation times: with B-frames, the packets' times mislead
    "h264-raw.h264": ("libx264", {}),  # no times at all
    "open-gop.mp4": ("libx264", {"options": {"x264-params": "open-gop=1:keyint=12:min-keyint=12:bframes=3"}}),
    "intra-refresh.mp4": ("libx264", {"options": {"x264-params": "intra-refresh=1:keyint=20:bframes=0"}}),
    "hevc.mp4": ("libx265", {"options": {"x265-params": "open-gop=1:keyint=12:min-keyint=12:log-level=none"}}),
    "hevc-10bit.mkv": ("libx265", {"pix_fmt": "yuv420p10le", "options": {"x265-params": "log-level=none"}}),
    "h264-10bit.mp4": ("libx264", {"pix_fmt": "yuv420p10le"}),
    "vp8.webm": ("libvpx", {"options": {"auto-alt-ref": "1", "lag-in-frames": "16"}}),
    "vp9.webm": ("libvpx-vp9", {"options": {"auto-alt-ref": "1", "lag-in-frames": "16", "cpu-used": "8"}}),
    "av1.webm": ("libsvtav1", {"options": {"preset": "12"}}),
    "mpeg2.mpg": ("mpeg2video", {}),
    "mpeg4.avi": ("mpeg4", {}),
    "wmv.wmv": ("wmv2", {}),
    "mjpeg.mov": ("mjpeg", {"pix_fmt": "yuvj420p"}),
    "animation.gif": ("gif", {"pix_fmt": "rgb8", "fps": 20}),
    "animation.apng": ("apng", {"pix_fmt": "rgb24"}),  # marks every frame as a keyframe
    "fragmented.mp4": ("libx264", {"container_options": {"movflags": "frag_keyframe+empty_moov"}}),
}


@pytest.fixture(scope="session")
def kinds(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("kinds")


def file_of(kinds: Path, name: str) -> Path:
    if not (kinds / name).exists():
        codec, options = KINDS[name]
        make(kinds / name, codec, **options)
    return kinds / name


@pytest.mark.parametrize("name", KINDS)
def test_frames_and_times_of_every_kind(kinds: Path, name: str) -> None:
    # Would catch frames off by one, duplicated or out of order, and times made from an index.
    path = file_of(kinds, name)
    rate = {"animation.gif": 20, "h264-raw.h264": 25}.get(name, 30)
    frames = load(path, SMALL, VISION, num_frames=14)
    expected = frame_indices(60, 14)
    assert [number_of(frame) for frame in frames.data] == expected.tolist()
    np.testing.assert_allclose(frames.pts_seconds, expected / rate, atol=1.1e-3)  # Matroska rounds to milliseconds
    assert frames.duration_seconds == pytest.approx(60 / rate, abs=0.01)
    assert frames.source_fps == pytest.approx(rate, rel=1e-3)
    assert frames.sample_fps == pytest.approx(14 / 60 * rate, rel=1e-3)
    assert (frames.source_height, frames.source_width) == (96, 160)
    assert frames.data.shape[1:] == (84, 140, 3)
    assert frames.data.dtype == np.uint8
    assert len(frames.warnings) == (name == "h264-raw.h264")


@pytest.mark.parametrize("name", KINDS)
def test_seeking_gives_the_frames_of_plain_decoding(kinds: Path, name: str) -> None:
    # Would catch a seek past the wanted frame, or frames decoded without their references (open GOPs, intra refresh).
    path = file_of(kinds, name)
    plain = decoded(path)
    with Container(str(path), name, SMALL) as container:
        times = list_frames(container)
        assert len(times.keys) == len(plain)
        for indices in (list(range(60)), [0, 29, 59], list(range(5, 60, 17)), [47], [12, 12, 13, 13]):
            found = decode_frames(container, times, indices)
            for index, frame in zip(indices, found, strict=True):
                np.testing.assert_array_equal(frame.to_ndarray(format="rgb24"), plain[index])


@pytest.mark.parametrize("name", ["h264.mp4", "h264.mkv", "h264.ts", "hevc.mp4", "vp9.webm", "mjpeg.mov"])
def test_sparse_sampling_skips_what_it_can(kinds: Path, name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    # Would catch a seek that silently falls back to decoding everything.
    path = make(kinds / f"long-{name}", KINDS[name][0], **{**KINDS[name][1], "frames": 300, "options": None})
    fed = 0
    decode = vlrt.container.Container.decode

    def count(self: Container, packet: object, wanted_from: int | None) -> list[object]:
        nonlocal fed
        fed += 1
        return decode(self, packet, wanted_from)  # type: ignore[arg-type, return-value]

    monkeypatch.setattr(Container, "decode", count)
    frames = load(path, SMALL, VISION, num_frames=4)
    assert [number_of(f) for f in frames.data] == [0, 100, 199, 299]
    assert fed < 1 + 5 + 8 + 12 + 4 * 8  # from keyframes at every 12th frame, and what fills the pipeline


@pytest.mark.parametrize("suffix", ["mp4", "mkv", "webm"])
def test_variable_rates_keep_their_times(tmp_path: Path, suffix: str) -> None:
    # Would catch times of index / fps, which are seconds off here.
    ticks = [i * i * 7 for i in range(40)]
    codec = "libvpx" if suffix == "webm" else "libx264"
    path = make(tmp_path / f"vfr.{suffix}", codec, frames=40, ticks=ticks)
    frames = load(path, SMALL, VISION, num_frames=10)
    indices = frame_indices(40, 10)
    np.testing.assert_allclose(frames.pts_seconds, np.array(ticks)[indices] / 1000, atol=1.1e-3)
    assert [number_of(f) for f in frames.data] == indices.tolist()
    assert frames.source_fps == pytest.approx(40 / frames.duration_seconds)
    assert frames.duration_seconds >= ticks[-1] / 1000


@pytest.mark.parametrize("suffix", ["mp4", "mkv", "ts"])
def test_times_count_from_the_first_frame(tmp_path: Path, suffix: str) -> None:
    # Would catch a start offset of 5 s told as the time of the first frame.
    path = make(tmp_path / f"late.{suffix}", frames=30, ticks=[5000 + 40 * i for i in range(30)])
    frames = load(path, SMALL, VISION, num_frames=4)
    np.testing.assert_allclose(frames.pts_seconds, frame_indices(30, 4) * 0.04, atol=1.1e-3)
    assert frames.duration_seconds == pytest.approx(1.2, abs=0.05)
    assert not frames.warnings


def test_a_fraction_of_a_rate_is_exact(tmp_path: Path) -> None:
    # Would catch 29.97 rounded, or an average of rounded times that loses a frame to a floor.
    path = make(tmp_path / "ntsc.mkv", frames=300, fps=Fraction(30000, 1001))
    frames = load(path, SMALL, VISION, fps=2.0)
    assert frames.source_fps == 30000 / 1001
    assert len(frames.data) == 20
    assert frames.sample_fps == pytest.approx(20 / 300 * 30000 / 1001)


@pytest.mark.parametrize("degrees", [0, 90, 180, 270])
@pytest.mark.parametrize("mirrored", [False, True])
def test_pictures_come_upright(tmp_path: Path, degrees: int, mirrored: bool) -> None:
    # Would catch a phone's portrait video shown lying, or turned the wrong way.
    path = make(tmp_path / "turned.mp4", frames=4, rotation=(degrees, mirrored))
    frames = load(path, SMALL, VISION)
    shown = np.rot90(decoded(path)[0], degrees // 90)
    shown = shown[:, ::-1] if mirrored else shown
    assert (frames.source_height, frames.source_width) == shown.shape[:2]
    height, width = frames.data.shape[1:3]
    at = [(0.1, 0.1), (0.1, 0.9), (0.9, 0.1), (0.9, 0.9)]
    found = [frames.data[0, int(r * height), int(c * width)].astype(int) for r, c in at]
    expected = [shown[int(r * shown.shape[0]), int(c * shown.shape[1])].astype(int) for r, c in at]
    np.testing.assert_allclose(found, expected, atol=12)


@pytest.mark.parametrize(("height", "width"), [(97, 161), (1, 63), (123, 777), (2, 2)])
def test_odd_sizes(tmp_path: Path, height: int, width: int) -> None:
    # Would catch a row lost to chroma subsampling, or a stride taken for a width.
    pictures = [np.full((height, width, 3), 20 * i, np.uint8) for i in range(8)]
    path = make(tmp_path / "odd.mkv", "ffv1", frames=8, height=height, width=width, pix_fmt="bgr0", pictures=pictures)
    frames = load(path, SMALL, VISION, num_frames=8)
    assert (frames.source_height, frames.source_width) == (height, width)
    assert frames.data.shape[1] % 28 == frames.data.shape[2] % 28 == 0
    for i, frame in enumerate(frames.data):
        np.testing.assert_allclose(frame, 20 * i, atol=1)


def test_an_edit_list_cuts_the_start(tmp_path: Path) -> None:
    # Would catch frames that players never show; ffmpeg writes such a list for every cut that copies its streams.
    path = make(tmp_path / "cut.mp4", frames=60, ticks=[-400 + 40 * i for i in range(60)], options={"bf": "0"})
    frames = load(path, SMALL, VISION, num_frames=50)
    assert [number_of(f) for f in frames.data] == list(range(10, 60))
    assert frames.pts_seconds[0] == 0


def test_a_stream_cut_before_its_first_keyframe(kinds: Path, tmp_path: Path) -> None:
    # Would catch waiting for frames that nothing can decode: recordings of broadcasts start like this.
    whole = file_of(kinds, "h264.ts").read_bytes()
    start = len(whole) // 3 // 188 * 188
    (tmp_path / "cut.ts").write_bytes(whole[:564] + whole[start:])  # service tables, then the middle of a GOP
    frames = load(tmp_path / "cut.ts", SMALL, VISION, num_frames=20)
    numbers = [number_of(f) for f in frames.data]
    assert numbers == sorted(numbers)
    assert numbers[0] % 12 == 0
    assert numbers[-1] == 59


def test_a_clock_that_jumps_back(kinds: Path, tmp_path: Path) -> None:
    # Would catch two recordings joined by `cat` shuffled into each other.
    long = make(tmp_path / "long.ts", frames=100)
    (tmp_path / "joined.ts").write_bytes(long.read_bytes() * 2)
    frames = load(tmp_path / "joined.ts", SMALL, VISION, num_frames=8)
    assert [number_of(f) for f in frames.data] == [i % 100 for i in frame_indices(200, 8)]
    assert "jump" in frames.warnings[0]
    assert (np.diff(frames.pts_seconds) > 0).all()


def test_sound_and_cover_art_are_passed_over(kinds: Path, tmp_path: Path) -> None:
    # Would catch sound packets taken for frames, and durations of the sound taken for the video's.
    path = make(tmp_path / "sound.mp4", audio=True)
    frames = load(path, SMALL, VISION, num_frames=6)
    assert [number_of(f) for f in frames.data] == frame_indices(60, 6).tolist()
    assert not frames.warnings


def test_bytes_are_the_file(kinds: Path) -> None:
    # Would catch a memory source that cannot seek or be opened twice.
    path = file_of(kinds, "h264.mp4")
    from_file = load(path, SMALL, VISION, num_frames=4)
    for source in (path.read_bytes(), bytearray(path.read_bytes()), memoryview(path.read_bytes()), str(path)):
        again = load(source, SMALL, VISION, num_frames=4)
        np.testing.assert_array_equal(again.data, from_file.data)
        np.testing.assert_array_equal(again.pts_seconds, from_file.pts_seconds)


def test_content_counts_not_the_name(kinds: Path, tmp_path: Path) -> None:
    # Would catch files told apart by their suffix, and names that FFmpeg takes for patterns or protocols.
    for name in ("clip.jpg", "frame%03d.mp4", "http:clip.mp4", "a b#c?.mp4"):
        (tmp_path / name).write_bytes(file_of(kinds, "h264.mp4").read_bytes())
        assert number_of(load(tmp_path / name, SMALL, VISION).data[-1]) == 59
    Image.fromarray(picture(5)).save(tmp_path / "image.mp4", format="JPEG")
    assert load(tmp_path / "image.mp4", SMALL, VISION).is_image


def test_frames_and_arrays_are_taken_as_they_are() -> None:
    # Would catch arrays sampled again by fps, which drops frames that the caller chose.
    array = np.stack([picture(i) for i in range(63)])
    frames = Frames.from_array(array, fps=30)
    assert load(frames, SMALL, VISION, num_frames=4) is frames
    assert frames.data is array
    assert frames.sample_fps == frames.source_fps == 30
    assert frames.duration_seconds == pytest.approx(2.1)
    np.testing.assert_allclose(frames.pts_seconds, np.arange(63) / 30)


def test_a_list_of_images_is_a_video(tmp_path: Path) -> None:
    # Would catch a list sampled by fps, or its names taken in another order.
    paths = [tmp_path / f"{i}.png" for i in range(9)]
    for i, path in enumerate(paths):
        Image.fromarray(picture(i)).save(path)
    frames = load(paths, SMALL, VISION)
    assert [number_of(f) for f in frames.data] == list(range(9))
    np.testing.assert_allclose(frames.pts_seconds, np.arange(9) / 2)
    assert not frames.is_image
    assert load(paths, SMALL, VISION, fps=4.0).duration_seconds == 2.25
    fewer = load(tuple(map(str, paths)), SMALL, VISION, num_frames=4)
    assert [number_of(f) for f in fewer.data] == [0, 3, 5, 8]
    assert fewer.sample_fps == pytest.approx(4 / 9 * 2)


@pytest.mark.parametrize("orientation", range(1, 9))
def test_photographs_come_upright(tmp_path: Path, orientation: int) -> None:
    # Would catch a phone's portrait photograph shown lying.
    from PIL import ImageOps

    exif = Image.Exif()
    exif[0x0112] = orientation
    Image.fromarray(picture(3)).save(tmp_path / "x.jpg", exif=exif, quality=95)
    frames = load(tmp_path / "x.jpg", SMALL, VISION)
    with Image.open(tmp_path / "x.jpg") as stored:
        shown = np.asarray(ImageOps.exif_transpose(stored).resize(frames.data.shape[2:0:-1], Image.Resampling.BICUBIC))
    assert np.abs(frames.data[0].astype(int) - shown.astype(int)).max() <= 2
    assert (frames.source_height > frames.source_width) == (orientation >= 5)


@pytest.mark.parametrize("kind", ["PNG", "JPEG", "WEBP", "BMP", "TIFF", "PPM", "GIF", "AVIF", "MPO"])
def test_images_of_every_kind(kind: str) -> None:
    # Would catch a still GIF or a photograph with a preview behind it (MPO) taken for a video.
    file = io.BytesIO()
    more = {"save_all": True, "append_images": [Image.fromarray(picture(1))]} if kind == "MPO" else {}
    Image.fromarray(picture(683)).save(file, format=kind, **more)
    frames = load(file.getvalue(), SMALL, VISION, num_frames=16)
    assert frames.is_image
    assert frames.data.shape == (1, 112, 168, 3) or frames.data.shape[0] == 1
    assert number_of(frames.data[0]) == 683
    assert frames.duration_seconds == 0
    assert frames.source_fps is None


def test_nothing_is_printed(kinds: Path, tmp_path: Path) -> None:
    # Would catch FFmpeg's complaints on the stderr of an application.
    damaged = bytearray(file_of(kinds, "h264.mkv").read_bytes())
    damaged[len(damaged) // 2] ^= 255
    (tmp_path / "damaged.mkv").write_bytes(damaged[: len(damaged) * 3 // 4])
    script = """
import sys
from tests.videos import SMALL, VISION
from vlrt.errors import VideoError
from vlrt.video import load
try:
    load(sys.argv[1], SMALL, VISION)
except VideoError:
    pass
"""
    done = subprocess.run([sys.executable, "-c", script, tmp_path / "damaged.mkv"], capture_output=True, text=True)
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")


# VmHWM, since ru_maxrss begins at the peak of the process that started this one.
MEASURE = """
import json, re, sys
import av, numpy, PIL.Image
from tests.videos import VISION
from vlrt.config import Video
from vlrt.video import load

def peak():
    with open("/proc/self/status") as status:
        return int(re.search(r"VmHWM:\\s+(\\d+) kB", status.read())[1])

before = peak()
frames = load(sys.argv[1], Video(), VISION, num_frames=64)
print(json.dumps([peak() - before, list(frames.data.shape), frames.pts_seconds[-1]]))
"""


def test_ten_minutes_of_1080p_stay_small(tmp_path: Path) -> None:
    # Would catch full-size frames piling up: 64 of 1080p are 400 MB, a GOP of 10 s another 1.8 GB.
    still = [np.ascontiguousarray(np.roll(picture(0, 1080, 1920), 40 * i, axis=1)) for i in range(4)]
    path = make(
        tmp_path / "long.mp4", frames=600, fps=1, height=1080, width=1920, gop=120, pictures=still * 150,
        options={"preset": "ultrafast", "crf": "30", "bf": "2"},
    )  # fmt: skip
    done = subprocess.run([sys.executable, "-c", MEASURE, path], capture_output=True, text=True, check=True)
    grown_kib, shape, last = json.loads(done.stdout)
    assert shape == [64, 560, 1008, 3]
    assert last == 599
    assert grown_kib * 1024 < 300e6, f"{grown_kib} KiB"  # the frames themselves are 108 MB
