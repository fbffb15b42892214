"""Decoding of chosen frames: seeks between them where that saves work, holds one frame and the decoder's own.

Knows packets, keyframes and damage. Knows no sampling rule, no size and no model.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import chain
from typing import TYPE_CHECKING

import numpy as np

from vlrt.container import MAX_THREADS, Container, check_pixels, reading
from vlrt.errors import VideoError
from vlrt.timeline import Timeline

if TYPE_CHECKING:  # importing av takes a while, and arrays do without it
    from av.video.frame import VideoFrame

    from vlrt.container import Packet

SEEK_GAP = 4  # packets; a seek empties the decoder's pipeline, which costs about as much as decoding so many
SEEKS_BY_PTS = ("matroska", "mov")  # FFmpeg's demuxers of other containers seek by decoding time
UNSEEKABLE = frozenset({"apng"})  # marks every frame as a keyframe although each one draws on the one before


@dataclass(frozen=True)
class _Way:
    """How frames are looked for."""

    max_threads: int
    lead: int | None  # decoding starts so many keyframes before the one that a frame needs; None: at the file's start


# With threads, the decoder drops sound frames together with a damaged one; some encoders mark keyframes that decoding
# cannot start from (intra refresh). So a frame that does not come out is looked for again, more slowly and surely.
SEEKING = (_Way(MAX_THREADS, 0), _Way(1, 2), _Way(1, None))
PLAIN = (_Way(MAX_THREADS, None), _Way(1, None))
IN_ORDER = (_Way(1, None),)  # frames are counted: none may be dropped


def decode_frames(container: Container, timeline: Timeline, indices: Sequence[int]) -> Iterator[VideoFrame]:
    """Yield the frames at `indices` of the timeline (ascending, repeats allowed), decoded, one at a time.

    Frames of damaged data that still decode come with a warning.

    Raises:
        VideoError: a wanted frame does not decode (its time is named).
    """
    wanted = [int(timeline.keys[i]) for i in indices]
    done = 0
    damage: BaseException | None = None
    for attempt, way in enumerate(_ways(container, timeline)):
        container.reopen(way.max_threads)
        reader = _Reader(container, timeline, way.lead)
        for key in wanted[done:]:
            with reading(container.name):
                frame = reader.frame_at(key)
            if frame is None or (frame.is_corrupt and way.lead == 0):
                break
            if frame.is_corrupt or reader.damage:
                at = timeline.seconds[indices[done]]
                container.warn(f"{container.name} is damaged near {at:.2f} s; frames there may look broken")
                reader.damage = None
            yield frame
            done += 1
        if done == len(wanted):
            return
        damage = reader.damage
        if damage and attempt:
            break  # looked for well enough: the data are to blame, not the way
    raise VideoError(
        f"{container.name}: the frame at {timeline.seconds[indices[done]]:.2f} s does not decode, its data are damaged "
        "or missing; fetch the file again, or repair it by encoding it anew (ffmpeg -i damaged.mp4 repaired.mp4)"
    ) from damage or container.failure


def _ways(container: Container, timeline: Timeline) -> tuple[_Way, ...]:
    if timeline.by_order:
        return IN_ORDER
    ascending = bool((np.diff(timeline.key_pts) > 0).all())
    return SEEKING if ascending and container.format not in UNSEEKABLE else PLAIN


class _Reader:
    """Decodes from the start of the file in presentation order, jumping to keyframes where that saves work."""

    def __init__(self, container: Container, timeline: Timeline, lead: int | None) -> None:
        self.damage: BaseException | None = None  # why the decoder refused a packet
        self._container = container
        self._timeline = timeline
        self._lead = lead
        self._last: tuple[int, VideoFrame] | None = None
        self._restart(container.packets(), 0)
        self._ordinal = -1  # of the frame that came out last

    def _restart(self, packets: Iterator[Packet | None], fed: int) -> None:
        self._packets = packets
        self._fed = fed  # packets before the next one
        self._ready: deque[VideoFrame] = deque()
        self._ended = False

    def frame_at(self, key: int) -> VideoFrame | None:
        """Return the frame named `key`, the last one again or a later one; None where it does not come out."""
        if self._last is not None and self._last[0] == key:
            return self._last[1]
        if self._lead is not None:
            self._jump(key, self._lead)
        while (frame := self._next(None if self._timeline.by_order else key)) is not None:
            here = self._ordinal if self._timeline.by_order else frame.pts
            if here is not None and here >= key:
                self._last = (key, frame)
                return frame if here == key else None
        return None

    def _next(self, wanted_from: int | None) -> VideoFrame | None:
        """Return the next frame, or None at the end; some before `wanted_from` are left out. Damage sets `damage`."""
        from av.error import FFmpegError

        while not self._ready:
            if self._ended:
                return None
            packet = next(self._packets)
            self._fed += 1
            self._ended = packet is None
            try:
                self._ready.extend(self._container.decode(packet, wanted_from))
            except FFmpegError as error:
                self.damage = error
        self._ordinal += 1
        frame = self._ready.popleft()
        check_pixels(self._container.name, frame.height, frame.width, self._container.video)
        return frame

    def _jump(self, key: int, lead: int) -> None:
        """Seek to the keyframe `lead` ones before the last one up to `key`, unless decoding on gets there as fast."""
        times = self._timeline
        target = int(np.searchsorted(times.key_pts, key, side="right")) - 1 - lead
        if target < 1 or times.key_at[target] - self._fed <= SEEK_GAP:
            return
        ticks = times.key_pts if self._container.format.startswith(SEEKS_BY_PTS) else times.key_dts
        for start in (target, target - 1):
            if not self._container.seek(int(ticks[start])):
                break
            packets = self._container.packets()
            first = next((p for p in packets if p is None or (p.is_keyframe and p.pts is not None)), None)
            if first is None or first.pts is None:
                continue
            landed = int(np.searchsorted(times.key_pts, first.pts, side="right")) - 1
            if 0 <= landed <= target:
                self._restart(chain([first], packets), int(times.key_at[landed]))
                return
        self._container.reopen()
        self._restart(self._container.packets(), 0)
