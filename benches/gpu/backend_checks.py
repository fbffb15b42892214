"""The torch backend's own ways against the host's: frames that are sent piece by piece, words, recorded passes.

What only a card can get wrong: copies on a stream of their own, memory that is lent again too early, a recording that
reads what it was recorded with.
"""

import functools
from collections.abc import Callable, Iterator

import numpy as np
import torch
from torch import Tensor

from benches import random_model
from benches.inputs import Setting, Source
from vlrt import positions, preprocess
from vlrt.backends.device_cache import LentAttention
from vlrt.backends.device_words import DeviceWords
from vlrt.backends.greedy import HostWords
from vlrt.backends.torch import TorchBackend
from vlrt.backends.uploads import Cutter, FrameUpload
from vlrt.video import Frames

Check = tuple[str, Callable[[], None]]


def checks(setting: Setting) -> Iterator[Check]:
    """Yield name and check."""
    for dtype in (torch.float32, torch.bfloat16):
        yield f"patches of frames, {dtype}", functools.partial(_patches, setting, dtype)
    for penalty in (1.0, 1.05):
        yield f"words, penalty {penalty}", functools.partial(_words, setting, penalty)
    small = Setting(setting.device, tiny=True)  # other checks run beside these, and need the card's memory
    yield "passes of few positions", functools.partial(_passes, small)
    yield "videos of one grid", functools.partial(_videos, small)


def _patches(setting: Setting, dtype: torch.dtype) -> None:
    """Send several videos, some of them frame by frame, while the device is busy; compare to the bit."""
    model = random_model.model_config(setting)
    device = torch.device(setting.device)
    cutter = Cutter(model.vision, model.video, dtype, device)
    busy = Source(setting.device, torch.float32).normal(*setting.pick((4096, 4096), (8, 8)))
    random = np.random.default_rng(0)
    found = []
    for number in range(6):
        shape = (setting.pick(32, 4), *setting.pick((252, 308), (56, 84)), 3)
        data = random.integers(0, 256, shape, np.uint8)
        upload = FrameUpload(cutter)
        given = data
        if number % 2:
            given = upload.begin(shape)
            for i, frame in enumerate(data):
                given[i] = frame
                upload.written(i + 1)
        for _ in range(3):
            busy @ busy
        frames = Frames.from_array(data, fps=2.0)
        half = shape[0] // 4
        parts = [upload.patches(given, *bounds) for bounds in ((0, half), (half, 2 * half))]
        found.append((torch.cat(parts), frames))
    for out, frames in found:
        ref = torch.from_numpy(preprocess.patchify(frames, model.video, model.vision).pixels).to(dtype)
        assert torch.equal(out.cpu(), ref), "patches differ from those that are cut on the host"


def _words(setting: Setting, penalty: float) -> None:
    source = Source(setting.device, torch.bfloat16)
    size, width = setting.pick((152_064, 3584), (384, 64))
    head = source.normal(size, width)
    head[size // 2 :: 7] = head[: len(head[size // 2 :: 7])]  # ties
    seen = list(range(0, size, 3))
    device = DeviceWords(head, seen, penalty)
    host = HostWords(lambda hidden: (hidden @ head.t()).float().cpu().numpy(), seen, penalty)
    for number in range(20):
        hidden = source.normal(1, width)
        banned = (number, size - 1) if number % 2 else ()
        ours, theirs = device(hidden, banned), host(hidden, banned)
        assert ours == theirs, f"the device chose {ours}, the host {theirs}"


def _passes(setting: Setting) -> None:
    """Run passes recorded and not, behind pasts of other lengths than the recording's."""
    backend = random_model.loaded(setting)
    decoder = backend.model.decoder
    source = Source(setting.device, torch.bfloat16)
    for past in (100, 999, 37):
        for num_new in (1, 2, random_model.NUM_LATENTS + 1):
            before, x = (source.normal(n, decoder.hidden_size, scale=0.02) for n in (past, num_new))
            at = np.tile(np.arange(past + num_new, dtype=np.int64), (3, 1))
            cos, sin = positions.mrope_cos_sin(at, decoder)
            cache = backend.prepare(past + num_new)
            backend.decode(cache, before, cos[:past], sin[:past])
            out = backend.decode(cache, x, cos[past:], sin[past:])
            cache.rewind(num_new)
            with torch.inference_mode():
                ref = backend._decoder(x[None], LentAttention(cache.storage))[0]
            assert _near(out, ref), f"{num_new} positions behind {past}: a replay differs from the pass itself"


def _videos(setting: Setting) -> None:
    """Encode videos of one grid: the first as it is, the second recorded, the others replayed."""
    backend = random_model.loaded(setting)
    vision = backend.model.vision
    grid = (2, 16, 16)
    source = Source(setting.device, torch.bfloat16)
    videos = [source.normal(grid[0] * 256, vision.patch_dim) for _ in range(4)]
    outs = [backend.encode(pixels, grid) for pixels in videos]
    for pixels, out in zip(videos, outs, strict=True):
        assert _near(out, _eager(backend, pixels, grid)), "a replay of the vision tower differs from the tower"


def _eager(backend: TorchBackend, pixels: Tensor, grid: tuple[int, int, int]) -> Tensor:
    with torch.inference_mode():
        out: Tensor = backend._module.visual(pixels, *backend._grid_inputs(grid))
        return out


def _near(out: Tensor, ref: Tensor) -> bool:
    """Compare to a hundredth: libraries may multiply otherwise while recorded, and what is wrong is far off."""
    return bool((out.float() - ref.float()).norm() <= 1e-2 * ref.float().norm())
