"""Hugging Face transformers on the weights of a random model: bf16, SDPA, its own `generate`."""

import time
from typing import Any

import numpy as np
import torch
import transformers
from torch import Tensor

from benches import random_model, timing
from benches.inputs import Setting
from vlrt import prompt
from vlrt.hf_config import hf_config, stored_name


class Peer:
    """A model that answers in transformers."""

    def __init__(self, setting: Setting) -> None:
        self._setting = setting
        self.model, weights = random_model.model_and_weights(setting)
        values = hf_config(self.model, layout="nested", dtype="bfloat16")
        made = transformers.Qwen2_5_VLConfig(**values)
        with torch.device(setting.device):
            self._peer = transformers.Qwen2_5_VLForConditionalGeneration._from_config(
                made, dtype=torch.bfloat16, attn_implementation="sdpa"
            ).eval()
        shapes = {name: parameter.shape for name, parameter in self._peer.state_dict().items()}
        own = {name: x for name, x in weights.tensors.items() if not name.startswith("latent_injection.")}
        state = {stored_name(name, "nested"): x for name, x in own.items()}
        state = {name: x.reshape(shapes[name]) for name, x in state.items()}  # shared, not copied
        self._peer.load_state_dict(state, strict=True, assign=True)
        self._peer.requires_grad_(False)
        self.attention = self._peer.config.get_text_config()._attn_implementation

    def given(self, built: prompt.Prompt, pixels: np.ndarray[Any, Any]) -> dict[str, Tensor]:
        """Return what `generate` reads, on the device: a prompt and its patches."""
        (span,) = built.spans
        ids = torch.from_numpy(built.ids)[None].to(self._setting.device)
        kinds = (ids == self.model.tokens.video_token_id).to(torch.int32) * 2  # 2: a video's token
        return {
            "input_ids": ids,
            "attention_mask": torch.ones_like(ids),
            "mm_token_type_ids": kinds,
            "pixel_values_videos": torch.from_numpy(pixels).to(self._setting.device).to(torch.bfloat16),
            "video_grid_thw": torch.tensor([span.grid_thw], device=self._setting.device),
            "second_per_grid_ts": torch.tensor([span.seconds_per_temporal_patch]),
        }

    @torch.inference_mode()
    def logits(self, built: prompt.Prompt, pixels: np.ndarray[Any, Any]) -> Tensor:
        """Return the logits [V] after the prompt."""
        out: Tensor = self._peer(**self.given(built, pixels), logits_to_keep=1).logits[0, -1]
        return out

    @torch.inference_mode()
    def write(self, built: prompt.Prompt, pixels: np.ndarray[Any, Any], num_tokens: int) -> float:
        """Write so many tokens, greedily, from patches in host memory on; return seconds."""
        eos = list(self.model.tokens.eos_token_ids)
        timing.synchronize(self._setting.device)
        start = time.perf_counter()
        given = self.given(built, pixels)
        forced = {"min_new_tokens": num_tokens, "max_new_tokens": num_tokens, "do_sample": False}
        written = self._peer.generate(**given, **forced, eos_token_id=eos, pad_token_id=eos[0])
        timing.synchronize(self._setting.device)
        seconds = time.perf_counter() - start
        assert written.shape[1] == len(built.ids) + num_tokens, "the length was to be forced"
        return seconds


def relative_error(out: Tensor, ref: Tensor) -> float:
    """Return the distance of two vectors, over the length of the second."""
    out, ref = out.double().cpu(), ref.double().cpu()
    return ((out - ref).norm() / ref.norm()).item()
