"""An open video container, through PyAV: its one video stream, the packets of it, and what it promises.

Knows files, bytes, streams and the caps on them. Knows no frame times, no sampling rule and no model.
"""

from __future__ import annotations

import io
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Literal

from vlrt.config import Video
from vlrt.errors import VideoError, VlrtError

if TYPE_CHECKING:  # importing av takes a while, and arrays do without it
    from av.container import InputContainer
    from av.packet import Packet as AnyPacket
    from av.video.frame import VideoFrame
    from av.video.stream import VideoStream

    Packet = AnyPacket[VideoStream]

# Playlists and scripts (hls, concat, sdp ...) are left out: they would make FFmpeg open further files or the network.
# Containers without pictures are in, so that a sound file is called one.
FORMATS = (
    "mov,mp4,m4a,3gp,3g2,mj2,matroska,webm,avi,gif,apng,mpegts,mpeg,mpegvideo,flv,asf,ogg,ivf,obu,av1,h264,hevc,m4v,"
    "mjpeg,mxf,nut,dv,rm,amv,vc1,wav,mp3,flac,aac,ac3,aiff,caf,amr"
)
SKIPPING = ("h264", "hevc")  # decoders that look at each packet when asked to leave out what no other frame refers to
MAX_THREADS = 4  # of the decoder; each holds a frame


class Container:
    """The video stream of an open file. A context manager.

    Attributes:
        name: what messages call the source.
        video: the caps.
        stream: PyAV's video stream; another object after `reopen`.
        warnings: what was found amiss so far, one text each.
        failure: the error that ended the last demuxing before the end of the file, or None.
    """

    def __init__(self, source: str | bytes, name: str, video: Video, check: Callable[[], None] = lambda: None) -> None:
        """Open `source`: a path, or an encoded video in memory. `check` is called before each packet.

        Raises:
            VideoError: not a video that can be read, without a video stream, or with pictures beyond the caps.
        """
        self.name = name
        self.video = video
        self.warnings: list[str] = []
        self.failure: BaseException | None = None
        self._source, self._check = source, check
        self._skip: Literal["NONREF", "DEFAULT"] = "DEFAULT"  # what the decoder leaves out
        self._open(MAX_THREADS)

    def __enter__(self) -> Container:
        """Return itself; the file is open already."""
        return self

    def __exit__(self, *_: object) -> None:
        """Close the file."""
        self._file.close()

    @property
    def format(self) -> str:
        """FFmpeg's name of the container format."""
        return self._file.format.name

    def reopen(self, max_threads: int = MAX_THREADS) -> None:
        """Go back to the start, in any format, with a fresh decoder of at most so many threads."""
        self._file.close()
        self._open(max_threads)

    def seek(self, ticks: int) -> bool:
        """Move to a keyframe at or before `ticks` of the stream and empty the decoder; False where that cannot be."""
        from av.error import FFmpegError

        try:
            self._file.seek(ticks, stream=self.stream)
        except FFmpegError:
            return False
        return True

    def packets(self) -> Iterator[Packet | None]:
        """Yield the stream's packets from here on in decoding order, then None, which flushes the decoder.

        Data that cannot be demuxed count as the end; `failure` then has the cause.
        """
        packets = self._file.demux(self.stream)
        packet: Packet | None
        while True:
            self._check()
            try:
                packet = next(packets, None)
            except Exception as error:  # FFmpeg's errors and those of Python's file objects share no narrower type
                self.failure = error
                packet = None
            if packet is None or packet.size:
                yield packet
            if packet is None:
                return

    def decode(self, packet: Packet | None, wanted_from: int | None = None) -> list[VideoFrame]:
        """Return the frames that are complete after this packet; none for one that is marked as damaged.

        With `wanted_from`, frames shown before that tick may be left out: those that no other refers to are skipped.

        Raises:
            av.FFmpegError: damaged data; with several threads, sound frames before the damage are lost with it.
        """
        if packet is not None and packet.is_corrupt:
            return []
        shown = None if packet is None else packet.pts
        early = wanted_from is not None and shown is not None and shown < wanted_from
        skip: Literal["NONREF", "DEFAULT"] = "NONREF" if early and self.stream.codec.name in SKIPPING else "DEFAULT"
        if skip != self._skip:
            self.stream.codec_context.skip_frame = self._skip = skip
        return self.stream.decode(packet)

    def promised_seconds(self) -> float:
        """Return how long the video is by its header, or 0 where the header does not tell."""
        stream = self.stream
        if stream.duration is not None and stream.time_base:
            return float(stream.duration * stream.time_base)
        tag = stream.metadata.get("DURATION", "").split(":")  # Matroska: hours:minutes:seconds
        if len(tag) == 3 and all(part.replace(".", "", 1).isdecimal() for part in tag):
            return float(tag[0]) * 3600 + float(tag[1]) * 60 + float(tag[2])
        alone = len(self._file.streams) == 1  # else the duration may be that of the sound
        return (self._file.duration or 0) / 1e6 if alone else 0.0

    def warn(self, text: str) -> None:
        """Add to the warnings, once."""
        if text not in self.warnings:
            self.warnings.append(text)

    def _open(self, max_threads: int) -> None:
        import av
        from av.stream import Discard

        source = io.BytesIO(self._source) if isinstance(self._source, bytes) else f"file:{self._source}"
        # Twice the cap, for streams that pad their frames: a header that lies about its size meets it in the decoder.
        limit = {"max_pixels": str(2 * self.video.max_source_pixels)}
        options = {"format_whitelist": FORMATS, "protocol_whitelist": "file", **limit}
        with reading(self.name):
            self._file: InputContainer = av.open(
                source, mode="r", options=options, metadata_errors="replace", buffer_size=1 << 20
            )
        try:
            self.stream = self._choose_stream()
            codec = self.stream.codec_context
            check_pixels(self.name, codec.height, codec.width, self.video)
            with reading(self.name):
                codec.options = limit
                self._skip = "DEFAULT"
                codec.thread_type = "AUTO"
                codec.thread_count = min(max_threads, os.cpu_count() or 1)
                for other in self._file.streams:
                    if other.index != self.stream.index:
                        other.discard = Discard.all
        except BaseException:
            self._file.close()
            raise

    def _choose_stream(self) -> VideoStream:
        from av.stream import Disposition

        streams = self._file.streams
        found = [s for s in streams.video if not s.disposition & Disposition.attached_pic]  # cover art of a song
        if not found:
            kinds = ", ".join(sorted({s.type for s in streams})) or "none"
            raise VideoError(f"{self.name} has no video stream (its streams: {kinds}); pass a file that has one")
        if found[0].codec_context is None:
            raise VideoError(f"{self.name} is in a codec that this FFmpeg cannot decode; convert it to MP4 (H.264)")
        return found[0]


def check_pixels(name: str, height: int, width: int, video: Video) -> None:
    """Refuse a picture of no size, or of one beyond `video.max_source_pixels`.

    Raises:
        VideoError: the size is out of range.
    """
    if height < 1 or width < 1:
        raise VideoError(f"{name} does not tell the size of its pictures; it is damaged, or no video or image")
    if height * width > video.max_source_pixels:
        raise VideoError(
            f"{name} has pictures of {height} x {width} pixels; accepted: at most {video.max_source_pixels} pixels. "
            "Scale it down, or raise video.max_source_pixels"
        )


@contextmanager
def reading(name: str) -> Iterator[None]:
    """Turn whatever a library raises about the data of `name` into a VideoError; our own errors pass.

    Raises:
        VideoError: in place of any other exception, which it names as its cause.
    """
    try:
        yield
    except VlrtError:
        raise
    except Exception as error:  # readers of damaged data raise anything
        raise VideoError(
            f"{name} cannot be read as a video or image ({getattr(error, 'strerror', None) or repr(error)}); "
            "it is of another kind, incomplete or damaged: check it, or convert it to MP4 (H.264)"
        ) from error
