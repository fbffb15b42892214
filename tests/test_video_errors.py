"""What cannot be used: every refusal is a VideoError that says what was given and what to do, before any waste."""

import os
import struct
import zlib
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import av
import numpy as np
import pytest
from PIL import Image

from tests.videos import SMALL, VISION, busy, make, make_sound, number_of, picture
from vlrt.container import Container
from vlrt.errors import VideoError
from vlrt.sampling import frame_indices
from vlrt.video import Frames, load

BUSY = busy(60)


@pytest.fixture(scope="module")
def clip(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make(
        tmp_path_factory.mktemp("clip") / "clip.mp4", pictures=BUSY, container_options={"movflags": "faststart"}
    )


def refused(source: object, *words: str, **asked: object) -> str:
    """Load a source that must be refused; return the message, which has all `words`."""
    with pytest.raises(VideoError) as caught:
        load(source, asked.pop("video", SMALL), VISION, **asked)  # type: ignore[arg-type]
    message = str(caught.value)
    assert all(word in message for word in words), message
    assert "\n" not in message
    return message


def test_no_file(tmp_path: Path) -> None:
    # Would catch FFmpeg's error codes in place of words, and URLs or devices being opened.
    refused(tmp_path / "absent.mp4", "absent.mp4", "does not exist")
    refused("http://127.0.0.1:9/clip.mp4", "does not exist")
    refused("/dev/zero", "no regular file")
    refused(tmp_path, "no regular file", "list of image files")
    refused("a\0b", "does not exist")


def test_not_a_source() -> None:
    # Would catch arrays taken for lists of paths, and tracebacks of the wrong type deep inside.
    refused(7, "int", "accepted")
    refused(None, "NoneType", "accepted")
    refused(np.zeros((4, 28, 28, 3), np.uint8), "ndarray", "from_array")
    refused([b"", 3], "in memory", "empty")
    refused([3], "int")


def test_no_video_in_it(tmp_path: Path) -> None:
    # Would catch a sound file, or its cover art, answered about.
    refused(make_sound(tmp_path / "sound.m4a"), "no video stream", "audio")
    song = make_sound(tmp_path / "song.mp3", codec="libmp3lame")
    refused(song, "no video stream", "audio")
    covered = tmp_path / "covered.mp3"
    with av.open(str(song)) as source, av.open(str(covered), "w") as out:
        sound = out.add_stream_from_template(source.streams.audio[0])
        cover = out.add_stream("png", rate=1)
        cover.height, cover.width, cover.pix_fmt = 96, 160, "rgb24"
        cover.disposition = av.stream.Disposition.attached_pic
        out.mux(cover.encode(av.VideoFrame.from_ndarray(picture(1), "rgb24")))
        for packet in source.demux(audio=0):
            if packet.size:
                packet.stream = sound
                out.mux(packet)
    refused(covered, "no video stream")


@pytest.mark.parametrize("content", [b"x", b"hello world\n" * 99, b"\0" * 5000, bytes(range(256)) * 20])
def test_not_a_video(tmp_path: Path, content: bytes) -> None:
    # Would catch text shown as a video (FFmpeg draws it), and a demuxer guessed from noise.
    (tmp_path / "x.mp4").write_bytes(content)
    refused(tmp_path / "x.mp4", "cannot be read", "convert")
    refused(content, "in memory", "cannot be read")


@pytest.mark.parametrize(
    "script",
    [
        "#EXTM3U\n#EXT-X-TARGETDURATION:2\n#EXTINF:2,\n{clip}\n#EXT-X-ENDLIST\n",
        "ffconcat version 1.0\nfile '{clip}'\n",
        "v=0\no=- 0 0 IN IP4 127.0.0.1\nc=IN IP4 127.0.0.1\nt=0 0\nm=video 9999 RTP/AVP 96\na=rtpmap:96 H264/90000\n",
    ],
)
def test_playlists_open_nothing(clip: Path, tmp_path: Path, script: str) -> None:
    # Would catch an uploaded text file that makes FFmpeg read other files, or the network.
    (tmp_path / "list.mp4").write_text(script.format(clip=clip))
    refused(tmp_path / "list.mp4", "cannot be read")


def test_nothing_in_it(tmp_path: Path) -> None:
    # Would catch a division by zero frames.
    (tmp_path / "empty.mp4").touch()
    refused(tmp_path / "empty.mp4", "is empty")
    refused(b"", "is empty")
    refused([], "list", "empty")
    bare = tmp_path / "bare.mkv"
    with av.open(str(bare), "w") as out:
        stream = out.add_stream("libx264", rate=30)
        stream.height, stream.width, stream.pix_fmt = 96, 160, "yuv420p"
        out.start_encoding()
    refused(bare, "bare.mkv", "cannot be read")
    whole = make(tmp_path / "fragments.mp4", container_options={"movflags": "frag_keyframe+empty_moov"}).read_bytes()
    refused(whole[: whole.index(b"moof") - 4], "holds no frame")


def test_too_few_frames(tmp_path: Path, clip: Path) -> None:
    # Would catch fewer frames than asked for, delivered in silence.
    refused(make(tmp_path / "one.mp4", frames=1), "one.mp4", "1 frame", "as an image")
    message = refused(clip, "64 frames", "has 60", num_frames=64)
    assert "2 to 60" in message
    refused(clip, "63 frames", "rounded to 64", num_frames=63)
    refused(clip, "num_frames is 1", num_frames=1)
    refused(clip, "num_frames is 0", num_frames=0)
    refused(clip, "num_frames is 2.5", num_frames=2.5)
    refused(clip, "both given", num_frames=4, fps=1.0)
    for fps in (0, -1.0, float("nan"), float("inf"), "2", True):
        refused(clip, "fps is", fps=fps)
    refused(clip, "max_frames", video=replace(SMALL, min_frames=1, max_frames=1))
    assert len(load(clip, SMALL, VISION, num_frames=60).data) == 60
    assert len(load(make(tmp_path / "three.mp4", frames=3), SMALL, VISION).data) == 2


def test_caps_come_before_decoding(clip: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    # Would catch a bomb that is refused only once it has filled the memory.
    Image.new("1", (9000, 9000)).save(tmp_path / "large.png")
    monkeypatch.setattr(Container, "decode", lambda *_: pytest.fail("decoded"))
    monkeypatch.setattr(Image.Image, "load", lambda *_: pytest.fail("decoded"))
    size = clip.stat().st_size
    refused(clip, str(size), str(size - 1), "max_file_bytes", video=replace(SMALL, max_file_bytes=size - 1))
    content = clip.read_bytes()
    refused(content, "in memory", "max_file_bytes", video=replace(SMALL, max_file_bytes=size - 1))
    refused(clip, "96 x 160", "max_source_pixels", video=replace(SMALL, max_source_pixels=96 * 160 - 1))
    refused(clip, "59", "max_source_frames", video=replace(SMALL, max_source_frames=59))
    refused(tmp_path / "large.png", "9000 x 9000", "max_source_pixels")
    refused([tmp_path / "large.png"] * 2, "9000 x 9000", "max_source_pixels")
    refused([tmp_path / "large.png"] * 2, "max_source_frames", video=replace(SMALL, max_source_frames=1))


def test_a_picture_that_claims_a_billion_pixels() -> None:
    # Would catch Pillow's own error, or its warning, coming through.
    header = struct.pack(">II5B", 40_000, 40_000, 8, 2, 0, 0, 0)
    chunk = b"IHDR" + header
    bomb = b"\x89PNG\r\n\x1a\n" + struct.pack(">I", 13) + chunk + struct.pack(">I", zlib.crc32(chunk))
    refused(bomb + struct.pack(">I", 100) + b"IDAT" + bytes(200), "pixels", "cale it down")


def test_a_stream_larger_than_its_header_says(tmp_path: Path) -> None:
    # Would catch a small header before a huge picture: only the decoder sees it.
    large = make(tmp_path / "large.mkv", frames=4, height=1024, width=1024).read_bytes()
    width, height = b"\xb0\x82\x04\x00", b"\xba\x82\x04\x00"  # Matroska's PixelWidth and PixelHeight
    assert large.count(width) == large.count(height) == 1
    lying = large.replace(width, b"\xb0\x82\x00\x40").replace(height, b"\xba\x82\x00\x40")
    (tmp_path / "lying.mkv").write_bytes(lying)
    for cap in (64 * 64, 1000 * 1000):
        refused(tmp_path / "lying.mkv", "lying.mkv", video=replace(SMALL, max_source_pixels=cap))


def test_slivers_are_refused(tmp_path: Path) -> None:
    # Would catch one side blown up to thousands of pixels.
    Image.new("RGB", (2010, 10)).save(tmp_path / "sliver.png")
    refused(tmp_path / "sliver.png", "10 x 2010", "200")


def test_truncated_at_the_end_is_answered(clip: Path, tmp_path: Path) -> None:
    # Would catch a download that broke off refused, or answered as if it were whole.
    (tmp_path / "broken-off.mp4").write_bytes(clip.read_bytes()[: clip.stat().st_size * 2 // 3])
    frames = load(tmp_path / "broken-off.mp4", SMALL, VISION, num_frames=8)
    numbers = [number_of(f) for f in frames.data]
    assert numbers[0] == 0
    assert 20 < numbers[-1] < 55
    np.testing.assert_allclose(frames.pts_seconds, np.array(numbers) / 30, atol=1e-6)
    assert len(frames.warnings) == 1
    assert "truncated" in frames.warnings[0]
    assert "promises 60 frames" in frames.warnings[0]


@pytest.mark.parametrize("suffix", ["mkv", "avi", "ts", "flv", "webm", "gif"])
def test_other_containers_broken_off(tmp_path: Path, suffix: str) -> None:
    # Would catch a last packet in pieces taken for a frame.
    codec, pix_fmt = {"webm": ("libvpx", "yuv420p"), "gif": ("gif", "rgb8")}.get(suffix, ("libx264", "yuv420p"))
    whole = make(tmp_path / f"whole.{suffix}", codec, pix_fmt=pix_fmt, pictures=BUSY).read_bytes()
    (tmp_path / f"half.{suffix}").write_bytes(whole[: len(whole) // 2])
    frames = load(tmp_path / f"half.{suffix}", SMALL, VISION, num_frames=6)
    numbers = [number_of(f) for f in frames.data]
    assert numbers[0] == 0
    assert numbers == sorted(numbers)
    assert 8 < numbers[-1] < 50
    if suffix in ("mkv", "webm", "avi"):  # the others promise nothing
        assert "truncated" in frames.warnings[0] or "damaged" in frames.warnings[0]


def test_an_index_that_was_never_written(tmp_path: Path, clip: Path) -> None:
    # An MP4 writes its index last: a recording that was killed has none.
    whole = make(tmp_path / "whole.mp4", pictures=BUSY).read_bytes()
    (tmp_path / "killed.mp4").write_bytes(whole[: len(whole) * 3 // 4])
    refused(tmp_path / "killed.mp4", "killed.mp4", "incomplete or damaged")


def test_a_container_that_promises_more_frames(tmp_path: Path) -> None:
    # Would catch sampling over frames that are not there: decord and others fail or repeat the last one.
    whole = bytearray(make(tmp_path / "whole.avi", "mpeg4", frames=60).read_bytes())
    for tag, offset in ((b"avih", 24), (b"strh", 40)):  # total frames, stream length
        at = whole.index(tag) + 8 + offset - (0 if tag == b"strh" else 8)
        found = struct.unpack_from("<I", whole, at)[0]
        at = at if found == 60 else next(o for o in range(at - 32, at + 33, 4) if whole[o : o + 4] == b"\x3c\0\0\0")
        struct.pack_into("<I", whole, at, 90)
    (tmp_path / "more.avi").write_bytes(whole)
    frames = load(tmp_path / "more.avi", SMALL, VISION, num_frames=6)
    assert [number_of(f) for f in frames.data] == frame_indices(60, 6).tolist()
    assert "promises 90 frames" in frames.warnings[0]
    refused(tmp_path / "more.avi", "64 frames", "60", num_frames=64)


def damage(path: Path, target: Path, first: int, last: int, change: Callable[[bytes], bytes]) -> Path:
    """Write a copy of a Matroska file in which packets `first` to `last` (exclusive) are changed."""
    content = path.read_bytes()
    with av.open(str(path)) as file:
        packets = [bytes(packet) for packet in file.demux(video=0) if packet.size]
    for packet in packets[first:last]:
        assert content.count(packet) == 1
        content = content.replace(packet, change(packet))
    target.write_bytes(content)
    return target


def test_a_hole_is_named_by_its_time(tmp_path: Path) -> None:
    # Would catch the frame before a hole shown in place of the wanted one; preallocated downloads have such holes.
    path = make(tmp_path / "whole.mkv", pictures=BUSY, options={"bf": "0"})
    holed = damage(path, tmp_path / "holed.mkv", 24, 36, lambda packet: bytes(len(packet)))
    refused(holed, "holed.mkv", "0.80 s", "ffmpeg", num_frames=60)
    frames = load(holed, SMALL, VISION, num_frames=4)  # 0, 20, 39 and 59 are whole
    assert [number_of(f) for f in frames.data] == [0, 20, 39, 59]


def test_damage_that_decodes_comes_with_a_warning(tmp_path: Path) -> None:
    # Would catch a concealed picture passed off as a sound one.
    path = make(tmp_path / "whole.mkv", pictures=BUSY, options={"bf": "0"})

    def scratch(packet: bytes) -> bytes:
        middle = len(packet) // 2
        return packet[:middle] + bytes(b ^ 0x55 for b in packet[middle : middle + 4]) + packet[middle + 4 :]

    frames = load(damage(path, tmp_path / "scratched.mkv", 36, 37, scratch), SMALL, VISION, num_frames=60)
    assert len(frames.warnings) == 1
    assert "damaged near 1.20 s" in frames.warnings[0]


@pytest.mark.parametrize(
    ("array", "words"),
    [
        (np.zeros((4, 28, 28, 3), np.float32), ["float32", "uint8"]),
        (np.zeros((28, 28, 3), np.uint8), ["[28, 28, 3]", "[T, H, W, 3]"]),
        (np.zeros((4, 3, 28, 28), np.uint8), ["[4, 3, 28, 28]"]),
        (np.zeros((4, 28, 28, 4), np.uint8), ["[4, 28, 28, 4]"]),
        (np.zeros((0, 28, 28, 3), np.uint8), ["at least 1 frame"]),
        (np.zeros((4, 0, 28, 3), np.uint8), ["[4, 0, 28, 3]"]),
        ([[1, 2], [3, 4]], ["[2, 2]"]),
    ],
)
def test_arrays_of_another_shape_or_kind(array: object, words: list[str]) -> None:
    # Would catch floats of 0 to 1 read as black, and channels-first arrays read as stripes.
    with pytest.raises(VideoError) as caught:
        Frames.from_array(array, fps=2)
    assert all(word in str(caught.value) for word in words)


@pytest.mark.parametrize("fps", [0, -2, float("nan"), float("inf"), None, "2", True])
def test_arrays_need_a_rate(fps: object) -> None:
    # Would catch times that are infinite or missing.
    with pytest.raises(VideoError, match="fps is"):
        Frames.from_array(np.zeros((2, 28, 28, 3), np.uint8), fps=fps)  # type: ignore[arg-type]


def test_lists_of_unlike_images(tmp_path: Path, clip: Path) -> None:
    # Would catch images of several sizes squeezed into one, and a video within a list.
    Image.fromarray(picture(0)).save(tmp_path / "0.png")
    Image.fromarray(picture(1, 160, 96)).save(tmp_path / "1.png")
    refused([tmp_path / "0.png", tmp_path / "1.png"], "1.png", "160 x 96", "96 x 160")
    refused([tmp_path / "0.png", clip], "clip.mp4", "cannot be read")
    refused([tmp_path / "0.png", tmp_path / "2.png"], "2.png", "does not exist")
    refused([tmp_path / "0.png"], "1 frame", "2 or more", num_frames=4)
    refused([tmp_path / "0.png"] * 3, "4 frames", "has 3", num_frames=4)


def test_damaged_images(tmp_path: Path) -> None:
    # Would catch the grey lower half of a photograph that broke off.
    Image.fromarray(np.random.default_rng(0).integers(0, 256, (96, 160, 3), np.uint8)).save(tmp_path / "x.jpg")
    content = (tmp_path / "x.jpg").read_bytes()
    refused(content[: len(content) // 2], "in memory", "damaged")
    refused(content[:20], "cannot be read")


def test_an_animated_webp_says_what_to_do(tmp_path: Path) -> None:
    # FFmpeg does not decode it. Would catch its first picture answered about as if it were all.
    images = [Image.fromarray(picture(i)) for i in range(4)]
    images[0].save(tmp_path / "x.webp", save_all=True, append_images=images[1:])
    refused(tmp_path / "x.webp", "WebP", "convert")


def test_causes_are_kept(tmp_path: Path) -> None:
    # Would catch errors whose origin nobody can find.
    with pytest.raises(VideoError) as caught:
        load(b"x" * 100, SMALL, VISION)
    assert isinstance(caught.value.__cause__, av.FFmpegError)


def test_files_are_closed(clip: Path, tmp_path: Path) -> None:
    # Would catch a server that runs out of file descriptors on bad uploads.
    (tmp_path / "half.mp4").write_bytes(clip.read_bytes()[: clip.stat().st_size // 2])
    Image.fromarray(picture(0)).save(tmp_path / "x.png")
    before = len(os.listdir("/proc/self/fd"))
    for _ in range(5):
        load(clip, SMALL, VISION)
        load(tmp_path / "half.mp4", SMALL, VISION)
        load(tmp_path / "x.png", SMALL, VISION)
        refused(clip, "64", num_frames=64)
        refused(clip, "pixels", video=replace(SMALL, max_source_pixels=1))
    assert len(os.listdir("/proc/self/fd")) == before
