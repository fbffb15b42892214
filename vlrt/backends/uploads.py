"""From host memory to a device without waiting: arrays, and a video's frames while later ones are still being decoded.

Copies start in pinned memory, so that the host goes on; those of frames run on a stream of their own, beside what the
device computes. Patches are cut on the device, from a quarter of the bytes. Knows patch sizes, and no other part of a
model.
"""

import math
import threading
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from vlrt import config, ops

PIECE_BYTES = 4 * 1024**2  # of frames per copy: enough for the bus's full speed, little beside what a video takes
MAX_PINNED_BYTES = 512 * 1024**2  # the system cannot swap pinned memory; longer videos are copied chunk by chunk


def staged(array: NDArray[Any], device: torch.device) -> Tensor:
    """Return an array where a copy to the device, `non_blocking`, does not hold the host up: pinned, for a card."""
    tensor = torch.from_numpy(np.ascontiguousarray(array))
    return tensor.pin_memory() if device.type == "cuda" else tensor


def upload(array: NDArray[Any], device: torch.device) -> Tensor:
    """Return an array on a device; on the CPU it shares the array's memory."""
    return staged(array, device).to(device, non_blocking=True)


class Cutter:
    """Makes of frames what the vision tower reads: see `preprocess.patchify`, which it equals but for the dtype.

    Args:
        vision: patch sizes.
        video: mean and standard deviation per channel.
        dtype: of patches.
        device: where they are made.
    """

    def __init__(self, vision: config.Vision, video: config.Video, dtype: torch.dtype, device: torch.device) -> None:
        self._sizes = vision.patch_size, vision.temporal_patch_size, vision.spatial_merge_size
        self._moments = [torch.tensor(values, dtype=torch.float32, device=device) for values in (video.mean, video.std)]
        self._dtype, self.device = dtype, device
        self.steps = vision.temporal_patch_size
        self.stream = torch.cuda.Stream(device) if device.type == "cuda" else None

    def beside(self) -> AbstractContextManager[Any]:
        """Run what is enqueued beside the computation, from memory to memory."""
        return nullcontext() if self.stream is None else torch.cuda.stream(self.stream)

    def __call__(self, frames: Tensor) -> Tensor:
        """Cut frames [T, H, W, 3] uint8, on their way to the device `beside`, into patches [n, patch_dim]."""
        if self.stream is not None:
            computing = torch.cuda.current_stream(self.device)
            computing.wait_stream(self.stream)
            frames.record_stream(computing)
        out: Tensor = ops.patchify(frames, *self._moments, *self._sizes, self._dtype)
        return out


class FrameUpload:
    """Frames of one video: see `base.FrameUpload`. One thread may write them while another asks for patches."""

    def __init__(self, cutter: Cutter) -> None:
        self._cutter = cutter
        self._given: NDArray[np.uint8] | None = None  # what `begin` handed out
        self._host = self._sent = torch.empty(0, dtype=torch.uint8)
        self._written = self._num_sent = 0
        self._sending = threading.Lock()

    def begin(self, shape: tuple[int, int, int, int]) -> NDArray[np.uint8]:
        """See `base.FrameUpload`."""
        if math.prod(shape) > MAX_PINNED_BYTES:
            return np.empty(shape, np.uint8)
        self._host, self._sent = self._pinned(shape), self._room(shape)
        self._given = self._host.numpy()
        return self._given

    def written(self, count: int) -> None:
        """See `base.FrameUpload`."""
        with self._sending:
            self._written = count
            if self._given is not None and (count - self._num_sent) * self._host[0].numel() >= PIECE_BYTES:
                self._send()

    def patches(self, data: NDArray[np.uint8], start: int, stop: int) -> Tensor:
        """See `base.FrameUpload`."""
        chunk = slice(start * self._cutter.steps, stop * self._cutter.steps)
        if data is self._given:
            with self._sending:
                self._send()
            return self._cutter(self._sent[chunk])
        host = self._pinned(data[chunk].shape)
        host.numpy()[...] = data[chunk]
        frames = self._room(host.shape)
        with self._cutter.beside():
            frames.copy_(host, non_blocking=True)
        return self._cutter(frames)

    def _send(self) -> None:
        """Enqueue the copy of what was written and not sent yet."""
        piece = slice(self._num_sent, self._written)
        with self._cutter.beside():
            self._sent[piece].copy_(self._host[piece], non_blocking=True)
        self._num_sent = self._written

    def _pinned(self, shape: tuple[int, ...]) -> Tensor:
        return torch.empty(shape, dtype=torch.uint8, pin_memory=self._cutter.device.type == "cuda")

    def _room(self, shape: tuple[int, ...]) -> Tensor:
        """Allocate for the stream that copies, or it would have to wait for what the device computes."""
        with self._cutter.beside():
            return torch.empty(shape, dtype=torch.uint8, device=self._cutter.device)
