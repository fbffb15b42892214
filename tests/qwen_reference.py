"""The real qwen-vl-utils as an oracle, over a stand-in for torchvision, whose wheel does not load beside a CPU torch.

The stand-in has the three things that qwen-vl-utils uses: reading a whole video, the bicubic resize, and its name.
torchvision (transforms/_functional_tensor.py) resizes uint8 tensors in float32, clamps and rounds; so does the
stand-in. Torch's own uint8 kernel, which torchvision's v2 transforms use, is up to 30 levels away at edges.
"""

import enum
import functools
import sys
import types
from typing import Any

import av
import numpy as np
import requests  # noqa: F401  # loaded before the stand-in is, so that only qwen-vl-utils sees it
import torch
from numpy.typing import NDArray

from vlrt.config import Video


class InterpolationMode(enum.Enum):
    BICUBIC = "bicubic"


def _read_video(path: str, **_: object) -> tuple[torch.Tensor, None, dict[str, float]]:
    with av.open(path) as file:
        rate = float(file.streams.video[0].average_rate)
        frames = [frame.to_rgb().to_ndarray() for frame in file.decode(video=0)]
    return torch.from_numpy(np.stack(frames)).permute(0, 3, 1, 2), None, {"video_fps": rate}


def _resize(video: torch.Tensor, size: list[int], *, interpolation: InterpolationMode, antialias: bool) -> torch.Tensor:
    values = torch.nn.functional.interpolate(video.float(), size, mode=interpolation.value, antialias=antialias)
    return values.clamp(0, 255).round().byte()


@functools.cache
def vision_process() -> Any:
    """Return qwen-vl-utils' module, imported with the stand-in in place and out of the way again afterwards."""
    names = ["torchvision", "torchvision.io", "torchvision.transforms", "torchvision.transforms.functional"]
    modules = {name: types.ModuleType(name) for name in names}
    root, io, transforms, functional = modules.values()
    root.__dict__.update(__version__="0.99.0", io=io, transforms=transforms)
    io.__dict__.update(read_video=_read_video)
    transforms.__dict__.update(functional=functional, InterpolationMode=InterpolationMode)
    functional.__dict__.update(resize=_resize)
    sys.modules.update(modules)
    try:
        import qwen_vl_utils.vision_process as module
    finally:
        for name in names:
            del sys.modules[name]
    return module


def fetch_video(path: Any, video: Video, **asked: Any) -> tuple[NDArray[np.uint8], NDArray[np.int64], float]:
    """Return the reference's frames [T, H, W, 3] uint8, their indices [T] in the source, and the sampled rate."""
    element = {"video": path, "min_pixels": video.min_pixels, "total_pixels": video.total_pixels, **asked}
    element.setdefault("max_pixels", video.max_pixels)
    if "nframes" not in asked and isinstance(path, str):
        element = {"fps": video.fps, "min_frames": video.min_frames, "max_frames": video.max_frames, **element}
    (frames, metadata), sample_fps = vision_process().fetch_video(
        element, return_video_sample_fps=True, return_video_metadata=True
    )
    data = frames.permute(0, 2, 3, 1).numpy().astype(np.uint8)
    return data, np.asarray(metadata["frames_indices"]), sample_fps
