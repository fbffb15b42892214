"""The frames of a video and their times, found without decoding where the container allows.

Knows packets and timestamps. Knows no sampling rule, no pixel and no model.
"""

from __future__ import annotations

from array import array
from dataclasses import dataclass, field
from fractions import Fraction

import numpy as np
from numpy.typing import NDArray

from vlrt.container import Container, reading
from vlrt.errors import VideoError

MAX_REORDER = 64  # packets; decoders reorder at most 16 frames, more means that the clock jumped


@dataclass(frozen=True)
class Timeline:
    """The frames of a video stream in presentation order, and where decoding can start.

    `keys` name the frames: by presentation time in ticks or, where the container's times cannot be trusted
    (`by_order`), by ordinal. Keyframes are in decoding order, with `key_at` packets before each.
    """

    keys: NDArray[np.int64]  # [T], ascending
    seconds: NDArray[np.float64]  # [T], from the first frame
    duration_seconds: float
    fps: float
    by_order: bool
    key_pts: NDArray[np.int64]  # [K] ticks
    key_dts: NDArray[np.int64]  # [K] ticks
    key_at: NDArray[np.int64]  # [K] packets


@dataclass
class _Found:
    """What demuxing a stream to its end found; ticks, in decoding order."""

    pts: array[int] = field(default_factory=lambda: array("q"))  # of frames that are shown
    newest_duration: int = 0  # of the frame that is shown last
    keyframes: list[tuple[int, int, int]] = field(default_factory=list)  # pts, dts, packets before it
    packets: int = 0
    damaged: int = 0
    timed: bool = True  # every packet carries a presentation time


def list_frames(container: Container) -> Timeline:
    """Read the container to its end and return the frames that are there, whatever its header promises.

    Frames that cannot decode are left out: those before the first keyframe, those that an edit list cuts away, and
    packets marked as damaged (the last one of a truncated file). Leaves the container at its end.

    Raises:
        VideoError: no frame is there, more than `video.max_source_frames` are, or nothing tells their times.
    """
    found = _demux(container)
    if not found.pts and found.timed:
        raise VideoError(f"{container.name} holds no frame; it is empty or damaged") from container.failure
    rate = container.stream.average_rate or container.stream.guessed_rate or None
    tick = container.stream.time_base or Fraction(1)
    jumps = found.timed and _clock_jumps(found)
    by_order = jumps or not found.timed or _times_mislead(container, found)
    if by_order:
        seconds = _decoded_seconds(container, rate, jumps)
        keys = np.arange(len(seconds), dtype=np.int64)
        last = 0.0
    else:
        keys = np.sort(np.array(found.pts, np.int64))
        seconds = (keys - keys[0]).view(np.uint64).astype(np.float64) * float(tick)  # their differences need 64 bits
        last = found.newest_duration * float(tick)
    duration = float(seconds[-1]) + (last or (1 / float(rate) if rate else 0.0))
    fps = _frames_per_second(len(keys), duration, rate)
    duration = duration or len(keys) / fps
    _compare_with_header(container, found, len(keys), duration, fps)
    order = np.array(found.keyframes, np.int64).reshape(-1, 3)
    return Timeline(keys, seconds, duration, fps, by_order, order[:, 0], order[:, 1], order[:, 2])


def _demux(container: Container) -> _Found:
    """Demux the stream without decoding: 10 to 100 times as fast as decoding it.

    Container indices would be faster still, but hold decoding times (MP4) or keyframes only (Matroska).
    """
    found, newest = _Found(), None
    cap = container.video.max_source_frames
    for packet in container.packets():
        if packet is None:
            break
        found.packets += 1
        if found.packets > cap:
            raise VideoError(f"{container.name} has more than {cap} frames; cut it, or raise video.max_source_frames")
        if packet.is_corrupt:
            found.damaged += 1
            continue
        if packet.pts is None:
            found.timed = False
            continue
        if packet.is_keyframe:
            dts = packet.pts if packet.dts is None else packet.dts
            found.keyframes.append((packet.pts, dts, found.packets - 1))
        decodable = bool(found.keyframes) and packet.pts >= found.keyframes[0][0]  # else the stream was cut before it
        if decodable and not packet.is_discard:  # discarded: cut away by an edit list
            found.pts.append(packet.pts)
            if newest is None or packet.pts > newest:
                newest, found.newest_duration = packet.pts, max(packet.duration or 0, 0)
    return found


def _clock_jumps(found: _Found) -> bool:
    order = np.argsort(np.array(found.pts, np.int64), kind="stable")
    return bool((np.abs(order - np.arange(len(order))) > MAX_REORDER).any())


def _times_mislead(container: Container, found: _Found) -> bool:
    """Whether the packets' times do not name frames: made up from the order of decoding, or doubled."""
    codec = container.stream.codec_context
    if container.format == "avi" and codec.has_b_frames and codec.name in ("h264", "hevc"):
        return True
    return len(set(found.pts)) < len(found.pts)


def _decoded_seconds(container: Container, rate: Fraction | None, jumps: bool) -> NDArray[np.float64]:
    """Decode everything, keep only the times: seconds [T] from the first frame."""
    from av.error import FFmpegError

    container.reopen(max_threads=1)
    times: list[int | None] = []
    with reading(container.name):
        for packet in container.packets():
            try:
                times += [frame.pts for frame in container.decode(packet)]
            except FFmpegError as error:
                container.failure = error
    if not times:
        raise VideoError(f"{container.name} holds no frame that decodes; it is damaged") from container.failure
    ticks = sorted(t for t in times if t is not None)
    if len(ticks) == len(times) == len(set(ticks)) and not jumps:
        tick = container.stream.time_base or Fraction(1)
        return np.array([float((t - ticks[0]) * tick) for t in ticks])
    if rate is None:
        raise VideoError(f"{container.name} has neither timestamps nor a frame rate; convert it to MP4 (H.264)")
    kind = "timestamps that jump" if jumps else "no usable timestamps"
    container.warn(f"{container.name} has {kind}: times were counted from its frame rate, {float(rate):g} per second")
    return np.arange(len(times)) / float(rate)


def _frames_per_second(count: int, duration: float, rate: Fraction | None) -> float:
    """Return the nominal rate where the times agree with it, so that rounded times do not change counts; else the mean.

    Raises nothing: without a rate and without times, 25 stands in, as it does in FFmpeg.
    """
    if rate and abs(count / float(rate) - duration) < 1 / float(rate):
        return float(rate)
    return count / duration if duration else float(rate or 25)


def _compare_with_header(container: Container, found: _Found, frames: int, duration: float, fps: float) -> None:
    """Warn where the header promises more than there is, or where data are damaged."""
    there = f"{frames} frames ({duration:.2f} s) that are there were used"
    reported = container.stream.frames
    promised = container.promised_seconds()
    if container.format.startswith("matroska") and found.pts:  # counts from zero, not from the first frame
        promised -= float(min(found.pts) * (container.stream.time_base or 1))
    missing = promised - duration  # below 0 where the header does not tell
    if reported > found.packets and (missing < 0 or missing > 0.5 / fps):
        container.warn(f"{container.name} is truncated: its header promises {reported} frames; the {there}")
    elif found.timed and missing > 0.25 + 0.05 * promised:
        container.warn(f"{container.name} is truncated: its header promises {promised:.2f} s; the {there}")
    elif found.damaged or container.failure:
        reason = container.failure or f"{found.damaged} damaged packets"
        container.warn(f"{container.name} is damaged ({reason}); the {there}")
