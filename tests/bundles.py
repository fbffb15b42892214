"""Small models and clips for the tests of exports and runtimes, and transformers' model of the same checkpoint.

`QUICK` keeps every part of a model (a windowed and a full vision layer, two decoder layers) and exports in seconds.
"""

import math
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import torch
import transformers
from numpy.typing import NDArray

from vlrt import preprocess, prompt, video
from vlrt.backends.reference import ReferenceBackend
from vlrt.checkpoint import Checkpoint
from vlrt.runtime import Runtime
from vlrt.video import Frames

QUICK: dict[str, Any] = {"vision.depth": 2, "vision.full_attention_layers": [1], "decoder.num_layers": 2}
QUESTION = "What moves across the picture, and which way does it go?"


def plain_vision(**more: Any) -> dict[str, Any]:
    """Return QUICK for a tower without windows (Qwen2-VL), with more overrides."""
    return {**QUICK, "vision.full_attention_layers": [], **more}


def square(count: int = 8, height: int = 84, width: int = 112, fps: float = 1.5) -> Frames:
    """Return frames of a red square that moves to the right: four temporal patches of 1 1/3 seconds each by default."""
    frames = np.full((count, height, width, 3), 40, np.uint8)
    for step, frame in enumerate(frames):
        frame[20:48, 8 * step : 8 * step + 28] = (230, 30, 30)
    return Frames.from_array(frames, fps=fps)


def torch_runtime(checkpoint: Checkpoint) -> Runtime:
    """Return a Runtime on the PyTorch reference."""
    return Runtime(ReferenceBackend(checkpoint), prompt.Tokenizer.open(checkpoint.path))


class Oracle:
    """transformers' model of a checkpoint, and its inputs for one question about one video."""

    def __init__(self, checkpoint: Checkpoint, source: Any, question: str, *, num_frames: int | None = None) -> None:
        cfg = checkpoint.model
        self.model = _load(checkpoint.path, cfg.family)
        self.eos = cfg.tokens.eos_token_ids
        frames = video.load(source, cfg.video, cfg.vision, num_frames=num_frames)
        patches = preprocess.patchify(preprocess.resized(frames, cfg.video, cfg.vision), cfg.video, cfg.vision)
        self.grid, self.seconds = patches.grid_thw, patches.seconds_per_temporal_patch
        self.steps_per_second = cfg.vision.tokens_per_second
        pad = cfg.tokens.video_token_id
        size = math.prod(self.grid) // cfg.vision.spatial_merge_size**2
        chat = [{"role": "user", "content": [{"type": "video"}, {"type": "text", "text": question}]}]
        tokenizer = transformers.AutoTokenizer.from_pretrained(checkpoint.path)
        short = tokenizer.encode(tokenizer.apply_chat_template(chat, add_generation_prompt=True, tokenize=False))
        self.ids = torch.tensor([[i for t in short for i in [t] * (size if t == pad else 1)]])
        self.inputs = {
            "pixel_values_videos": torch.from_numpy(patches.pixels),
            "video_grid_thw": torch.tensor([self.grid]),
            "mm_token_type_ids": 2 * (self.ids == pad).int(),
        }

    def positions(self, length: int) -> NDArray[np.int64]:
        """Return positions [3, length] by the rule that Qwen2-VL and Qwen2.5-VL were trained with."""
        where = np.flatnonzero(self.inputs["mm_token_type_ids"][0].numpy())
        start, (time, height, width) = int(where[0]), (self.grid[0], self.grid[1] // 2, self.grid[2] // 2)
        video = [(self._step(t), row, column) for t in range(time) for row in range(height) for column in range(width)]
        after = start + max(map(max, video)) + 1
        text = [(i,) * 3 for i in range(start)], [(after + i,) * 3 for i in range(length - start - len(video))]
        return np.array([*text[0], *((start + t, start + r, start + c) for t, r, c in video), *text[1]]).T

    def greedy(self, count: int) -> list[int]:
        """Write `count` tokens, end tokens barred, one whole forward pass each, with the positions given."""
        ids = self.ids
        for _ in range(count):
            at = torch.from_numpy(self.positions(ids.shape[1]))[:, None]
            kinds = torch.nn.functional.pad(self.inputs["mm_token_type_ids"], (0, ids.shape[1] - self.ids.shape[1]))
            with torch.inference_mode():
                out = self.model(input_ids=ids, position_ids=at, **{**self.inputs, "mm_token_type_ids": kinds})
            logits = out.logits[0, -1].clone()
            logits[list(self.eos)] = -torch.inf
            ids = torch.cat([ids, logits.argmax()[None, None]], dim=1)
        return ids[0, self.ids.shape[1] :].tolist()

    def generate(self, **settings: Any) -> list[int]:
        """Write as transformers' `generate` does, at the positions that it computes itself."""
        more = {} if self.steps_per_second is None else {"second_per_grid_ts": torch.tensor([self.seconds])}
        out = self.model.generate(input_ids=self.ids, do_sample=False, **self.inputs, **more, **settings)
        written = out[0, self.ids.shape[1] :].tolist()
        return written[:-1] if written[-1] in self.eos else written

    def _step(self, index: int) -> int:
        if self.steps_per_second is None:
            return index
        return math.floor(np.float32(index) * np.float32(self.seconds) * np.float32(self.steps_per_second))


@cache
def _load(path: Path, family: str) -> Any:
    classes = {
        "qwen2_5_vl": transformers.Qwen2_5_VLForConditionalGeneration,
        "qwen2_vl": transformers.Qwen2VLForConditionalGeneration,
    }
    return classes[family].from_pretrained(path, dtype=torch.float32).eval()
