"""A model with random weights, made on the device: as large as Qwen2.5-VL-7B, or tiny. Says nothing about accuracy.

Moments of the weights are those of `vlrt.fresh`, so that activations stay near 1 and the latents near the embeddings.
"""

import dataclasses
import functools
import math
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from torch import Tensor

from benches.inputs import Setting
from vlrt import config, fresh, prompt
from vlrt.backends.fp8 import SCALE, to_fp8
from vlrt.backends.torch import TorchBackend
from vlrt.checkpoint import expected_tensors

NUM_LATENTS = 8
EMBEDDING_RMS = 0.02  # of Qwen2.5's tables, about; fresh.py draws rows of norm 1


def model_config(setting: Setting) -> config.Model:
    """Return the config: 7B, latents by the parallel rollout, so that there are queries; see `with_rollout`."""
    heads = setting.pick(28, 2)
    latent = {"num_latents": NUM_LATENTS, "rollout": "parallel", "injection": "mlp_xattn", "num_heads": heads}
    # Where text continues as in transformers, so that both read the same positions and can be compared.
    overrides = {"text_position_after_video": "spatial"}
    if setting.tiny:
        overrides |= {"decoder.num_layers": 2, "vision.depth": 2, "vision.full_attention_layers": [1]}
        # Head dims that the kernels take, so that the trial also runs on a card.
        overrides |= {"decoder.hidden_size": 256, "decoder.head_dim": 64, "decoder.mrope_section": [8, 12, 12]}
        overrides |= {"vision.hidden_size": 256, "vision.out_hidden_size": 256}
    return fresh.fresh_model(setting.pick("7b", "tiny"), latent=latent, overrides=overrides)


class Weights:
    """Every tensor of a model in bf16 on one device."""

    def __init__(self, model: config.Model, device: str, seed: int = 0) -> None:
        generator = torch.Generator(device).manual_seed(seed)
        self.tensors = {
            name: _draw(name, shape, generator, device).to(torch.bfloat16)
            for name, shape in expected_tensors(model).items()
        }

    def fetch(self, name: str) -> Tensor:
        """Return a tensor by its Hugging Face name."""
        return self.tensors[name]

    def fetch_fp8(self, name: str) -> Tensor:
        """Return a tensor as a bundle of precision fp8 has it: linear layers of the decoder rounded, with scales."""
        stem = name.removesuffix(SCALE)
        if stem.startswith("model.layers.") and self.tensors[stem].dim() == 2:
            small, scale = to_fp8(self.tensors[stem])
            return small if stem == name else scale
        return self.tensors[name]


def _draw(name: str, shape: tuple[int, ...], generator: torch.Generator, device: str) -> Tensor:
    if name == "latent_injection.rho":
        return torch.tensor(EMBEDDING_RMS, device=device)
    if name == "latent_injection.alpha":
        return torch.tensor(0.7, device=device)
    if name.endswith(".bias"):
        return torch.zeros(shape, device=device)
    if len(shape) == 1:
        return torch.ones(shape, device=device)
    table = name.endswith(("embed_tokens.weight", "queries"))
    scale = EMBEDDING_RMS if table else 1 / math.sqrt(math.prod(shape[1:]))
    values = torch.empty(shape, device=device, dtype=torch.bfloat16)
    return values.normal_(0.0, scale, generator=generator)


def backend(model: config.Model, weights: Weights, setting: Setting, precision: str = "bf16") -> TorchBackend:
    """Return a backend that runs the weights."""
    fetch: Callable[[str], Any] = weights.fetch_fp8 if precision == "fp8" else weights.fetch
    return TorchBackend.from_weights(model, fetch, precision=precision, device=setting.device)


@functools.cache
def model_and_weights(setting: Setting) -> tuple[config.Model, Weights]:
    """Return the model of a setting, made once per process."""
    model = model_config(setting)
    return model, Weights(model, setting.device)


@functools.cache
def loaded(setting: Setting, precision: str = "bf16") -> TorchBackend:
    """Return a backend of a setting, loaded once per process."""
    return backend(*model_and_weights(setting), setting, precision)


def with_rollout(model: config.Model, rollout: config.Rollout, rounds: int = 1) -> config.Model:
    """Return the config with another rollout; weights are the same."""
    assert model.latent is not None
    return dataclasses.replace(model, latent=dataclasses.replace(model.latent, rollout=rollout, rounds=rounds))


def built_prompt(model: config.Model, grid_thw: tuple[int, int, int], seconds: float, *, latent: bool) -> prompt.Prompt:
    """Return a prompt of a video between random words: about the length that chat template and a question have.

    Args:
        model: token ids and sizes.
        grid_thw: patches of the video.
        seconds: of a temporal patch.
        latent: whether the latent start token ends it.
    """
    rng = np.random.default_rng(0)
    size = math.prod(grid_thw) // model.vision.spatial_merge_size**2
    before, after = (rng.integers(0, 200, n) for n in (15, 30))
    tokens = model.tokens
    ids = [*before, tokens.vision_start_token_id, *[tokens.video_token_id] * size, tokens.vision_end_token_id, *after]
    if latent and model.latent is not None:
        ids.append(model.latent.start_token_id)
    span = prompt.Span(False, len(before) + 1, size, grid_thw, seconds)
    return prompt.Prompt(np.array(ids, np.int64), (span,), "")
