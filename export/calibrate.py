"""Calibration: what linear layers read while PyTorch is asked about a small made-up video, with latents where it can.

Knows how to drive the reference, and keeps of every input the largest magnitudes and a few rows. Does not know what
they are for (`smooth.py`), nor the gate's video and question: what is fitted to some inputs is judged by others.
"""

from collections.abc import Callable, Collection
from dataclasses import dataclass, replace

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from vlrt import config, preprocess, prompt
from vlrt.backends.reference import ReferenceBackend
from vlrt.checkpoint import Checkpoint
from vlrt.generate import Writer, read
from vlrt.video import Frames

NUM_ROWS = 128  # kept of each input, in bfloat16: 3B and 7B models then take 160 and 210 MB, less than one layer
MAX_STEPS = 4
SIZE_MERGED = (5, 3)  # rows and columns of video tokens
SCENE_STEPS = 2  # temporal patches
FPS = 2.0
QUESTION = (
    "Here are three scenes, one after the other. What moves in the first one, and where does it go? Count the bright "
    "stripes of the second: are there 3, 5 or 12? Which scene shows nothing but noise?"
)
ANSWER = "A bright square moves from the left to the right; there are 5 stripes, and the last scene is noise."

Floats = NDArray[np.float32]


@dataclass(frozen=True)
class Seen:
    """What was read at one place.

    Attributes:
        largest: [C], magnitude per channel, over all rows.
        rows: [n, C] bfloat16, at most NUM_ROWS, drawn from all.
        keys: [n], of the draw.
    """

    largest: Tensor
    rows: Tensor
    keys: Tensor

    def sample(self) -> Floats:
        """Return the rows."""
        rows: Floats = self.rows.float().numpy()
        return rows


def observe(
    checkpoint: Checkpoint, tokenizer: prompt.Tokenizer, layers: Collection[str], progress: Callable[[float], None]
) -> dict[str, Seen]:
    """Ask a model, one layer in memory at a time; return what layers read of patches, prompt, latents and an answer.

    Args:
        checkpoint: the model.
        tokenizer: its own.
        layers: names of weights.
        progress: told fractions of the work.
    """
    cfg = _shortened(checkpoint.model)
    backend = ReferenceBackend(replace(checkpoint, model=cfg), streamed=True)
    recorder = _Recorder(layers)
    backend.watch(recorder)
    patches = preprocess.patchify(_clip(cfg), cfg.video, cfg.vision)
    video_tokens = backend.encode(patches.pixels, patches.grid_thw)
    progress(0.2)
    media = prompt.Media(False, patches.grid_thw, patches.seconds_per_temporal_patch)
    reasoning: prompt.Reasoning = "direct" if cfg.latent is None else "latent"
    context = read(backend, prompt.build(tokenizer, cfg, QUESTION, [media], reasoning=reasoning), video_tokens)
    answer = [*tokenizer.encode(ANSWER), cfg.tokens.eos_token_ids[0]]
    writer = Writer(backend, context, len(answer) + (cfg.latent.num_latents + 1 if cfg.latent is not None else 0))
    progress(0.4)
    if cfg.latent is not None:
        writer.reason(context)
    progress(0.8)
    backend.logits(writer.feed_tokens(answer))
    backend.close()
    progress(1.0)
    return recorder.seen


def _shortened(cfg: config.Model) -> config.Model:
    """Return a config with at most MAX_STEPS latents, or rounds of them, each of which reads all weights once."""
    plan = cfg.latent
    if plan is None:
        return cfg
    if plan.rollout == "parallel":
        return replace(cfg, latent=replace(plan, rounds=min(plan.rounds, MAX_STEPS)))
    return replace(cfg, latent=replace(plan, num_latents=min(plan.num_latents, MAX_STEPS)))


class _Recorder:
    """Keeps rows by random keys, the largest of which stay: each row is as likely to be kept as any other."""

    def __init__(self, layers: Collection[str]) -> None:
        self.seen: dict[str, Seen] = {}
        self._layers = frozenset(layers)
        self._random = torch.Generator().manual_seed(0)

    def __call__(self, layer: str, x: Tensor) -> None:
        """Learn that a layer reads x [..., C]."""
        if layer not in self._layers:
            return
        x = x.flatten(0, -2)
        largest, rows, keys = x.abs().amax(dim=0), x.bfloat16(), torch.rand(len(x), generator=self._random)
        if (before := self.seen.get(layer)) is not None:
            largest = torch.maximum(before.largest, largest)
            rows, keys = torch.cat([before.rows, rows]), torch.cat([before.keys, keys])
        keys, kept = keys.topk(min(NUM_ROWS, len(keys)))
        self.seen[layer] = Seen(largest, rows[kept], keys)


def _clip(cfg: config.Model) -> Frames:
    """Make three scenes: a square that moves over a gradient, stripes that drift, noise."""
    merged = cfg.vision.spatial_merge_size * cfg.vision.patch_size
    height, width = (size * merged for size in SIZE_MERGED)
    frames = cfg.vision.temporal_patch_size * SCENE_STEPS
    y, x = np.mgrid[:height, :width]
    scenes = np.empty((3, frames, height, width, 3))
    for step in range(frames):
        scenes[0, step] = (60 + 120 * y / height)[..., None] * (1.0, 0.8, 0.6)
        left = step * (width - merged) // frames
        scenes[0, step, merged : 3 * merged, left : left + merged] = (250, 240, 90)
        waves = np.sin((x + y / 2 + 2 * step) * (10 * np.pi / width))
        scenes[1, step] = (127 + 127 * np.sign(waves))[..., None] * (0.2, 0.9, 1.0)
    scenes[2] = np.random.default_rng(0).uniform(0, 255, scenes[2].shape)
    return Frames.from_array(scenes.reshape(-1, height, width, 3).astype(np.uint8), fps=FPS)
