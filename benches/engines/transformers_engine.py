"""Hugging Face transformers with SDPA and its own `generate`. Patches are cut by vlrt, which counts for both.

transformers' own preprocessing of videos needs torchvision, whose published build does not load beside a CPU build of
torch. Positions are Qwen's own (docs/design.md): transformers places text after a video elsewhere, which changes what
is answered and not how long it takes.
"""

from typing import Any

import numpy as np
import torch
import transformers
from torch import Tensor

from benches.engines.protocol import Request, rolled, timed
from benches.engines.vlrt_engine import FPS
from vlrt import positions, preprocess, prompt, video
from vlrt.checkpoint import Checkpoint
from vlrt.video import Frames


class Engine:
    """See `protocol.Answering`.

    Args:
        checkpoint: a directory.
        threads: of torch.
        dtype: "float32" or "bfloat16".
    """

    def __init__(self, checkpoint: str, threads: int, dtype: str) -> None:
        torch.set_num_threads(threads)
        transformers.utils.logging.set_verbosity_error()  # it does not know the latent module, and says so
        transformers.utils.logging.disable_progress_bar()
        self._config = Checkpoint.open(checkpoint).model
        self._tokenizer = prompt.Tokenizer.open(checkpoint)
        self._dtype = getattr(torch, dtype)
        self._peer = transformers.Qwen2_5_VLForConditionalGeneration.from_pretrained(
            checkpoint, dtype=self._dtype, attn_implementation="sdpa"
        ).eval()
        self._peer.requires_grad_(False)
        self._peer.model.get_rope_index = lambda *_, **__: self._places
        self._places: tuple[Tensor, Tensor] = (torch.empty(0), torch.empty(0))

    def describe(self) -> dict[str, Any]:
        """See `protocol.Answering`."""
        versions = {"transformers": transformers.__version__, "torch": torch.__version__}
        attention = self._peer.config.get_text_config()._attn_implementation
        return {"version": versions["transformers"], "versions": versions, "attention": attention}

    @torch.inference_mode()
    def answer(self, request: Request) -> dict[str, Any]:
        """See `protocol.Answering`."""
        array = rolled(request)
        frames = None if array is None else Frames.from_array(array, fps=FPS)
        if request.logits_to is not None:
            logits = self._peer(**self._given(request, frames), logits_to_keep=1).logits[0, -1]
            np.save(request.logits_to, logits.float().numpy())
            return {"seconds": 0.0, "token_ids": []}
        seconds, ids = timed(lambda: self._write(request, frames))
        assert len(ids) == request.num_tokens, "the length was to be forced"
        return {"seconds": seconds, "token_ids": ids}

    def _write(self, request: Request, frames: Frames | None) -> list[int]:
        given = self._given(request, frames)
        eos = list(self._config.tokens.eos_token_ids)
        count = request.num_tokens
        forced = {"min_new_tokens": count, "max_new_tokens": count, "do_sample": False}
        written = self._peer.generate(**given, **forced, eos_token_id=eos, pad_token_id=eos[0])
        ids: list[int] = written[0, given["input_ids"].shape[1] :].tolist()
        return ids

    def _given(self, request: Request, frames: Frames | None) -> dict[str, Tensor]:
        """Return what the model reads, from a video file where there are no frames."""
        cfg = self._config
        if frames is None:
            frames = video.load(request.source, cfg.video, cfg.vision, num_frames=request.num_frames)
        patches = preprocess.patchify(preprocess.resized(frames, cfg.video, cfg.vision), cfg.video, cfg.vision)
        media = prompt.Media(False, patches.grid_thw, patches.seconds_per_temporal_patch)
        how: prompt.Reasoning = "cot" if request.reasoning == "cot" else "direct"
        built = prompt.build(self._tokenizer, cfg, request.question, [media], reasoning=how)
        places, after = positions.mrope_positions(
            built.ids,
            built.spans,
            tokens_per_second=cfg.vision.tokens_per_second,
            spatial_merge_size=cfg.vision.spatial_merge_size,
        )
        self._places = torch.from_numpy(places)[:, None], torch.tensor([[after - len(built.ids)]])
        ids = torch.from_numpy(built.ids)[None]
        return {
            "input_ids": ids,
            "attention_mask": torch.ones_like(ids),
            "mm_token_type_ids": (ids == cfg.tokens.video_token_id).to(torch.int32) * 2,  # 2: a video's token
            "pixel_values_videos": torch.from_numpy(patches.pixels).to(self._dtype),
            "video_grid_thw": torch.tensor([patches.grid_thw]),
            "second_per_grid_ts": torch.tensor([patches.seconds_per_temporal_patch]),
        }
