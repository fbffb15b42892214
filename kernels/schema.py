"""Registration of every vlrt op with PyTorch, once. Import it for its effect.

CPU runs `reference.py`, CUDA the launcher of the same name (LAUNCHERS says in which file), which is imported when it is
first called, and triton with it. The fakes give shapes to torch.export and torch.compile. An op whose name ends in `_`
writes to the caches that it is given; all others write to nothing.
"""

import importlib
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from vlrt.kernels import reference

LIBRARY = torch.library.Library("vlrt", "DEF")

SCHEMAS = {
    "video_attention": (
        "(Tensor q, Tensor k, Tensor v, Tensor cos, Tensor sin, Tensor k_cache, Tensor v_cache, Tensor past_length,"
        " Tensor? bias=None) -> (Tensor, Tensor, Tensor)"
    ),
    "video_attention_": (
        "(Tensor q, Tensor k, Tensor v, Tensor cos, Tensor sin, Tensor(a!) k_cache, Tensor(b!) v_cache,"
        " Tensor past_length) -> Tensor"
    ),
    "segment_attention": "(Tensor q, Tensor k, Tensor v, Tensor cos, Tensor sin, Tensor cu_seqlens) -> Tensor",
    "latent_injection": (
        "(Tensor h, Tensor norm_in, Tensor fc1, Tensor fc2, Tensor q_proj, Tensor memory_k, Tensor memory_v,"
        " Tensor alpha, Tensor norm_out, Tensor rho, int num_heads, float eps) -> Tensor"
    ),
    "rms_norm": "(Tensor x, Tensor weight, float eps) -> Tensor",
    "add_rms_norm": "(Tensor x, Tensor residual, Tensor weight, float eps) -> (Tensor, Tensor)",
    "swiglu": "(Tensor gate, Tensor up) -> Tensor",
    "patchify": (
        "(Tensor frames, Tensor mean, Tensor std, int patch_size, int temporal_patch_size, int merge_size) -> Tensor"
    ),
}

WITHOUT_BACKWARD = ("video_attention_", "patchify")  # inference's cache, and uint8 frames

LAUNCHERS = {  # module of kernels/ that holds the launcher of each op
    "video_attention": "video_attention",
    "video_attention_": "video_attention",
    "segment_attention": "segment_attention",
    "latent_injection": "latent_injection",
    "rms_norm": "rms_norm",
    "add_rms_norm": "rms_norm",
    "swiglu": "swiglu",
    "patchify": "patchify",
}


def _video_attention_fake(
    q: Tensor, k: Tensor, v: Tensor, cos: Tensor, sin: Tensor, k_cache: Tensor, v_cache: Tensor, *others: Tensor | None
) -> tuple[Tensor, Tensor, Tensor]:
    return torch.empty_like(q).contiguous(), torch.empty_like(k_cache), torch.empty_like(v_cache)


def _video_attention_in_place_fake(q: Tensor, *others: Tensor) -> Tensor:
    return torch.empty_like(q).contiguous()


def _segment_attention_fake(q: Tensor, k: Tensor, v: Tensor, cos: Tensor, sin: Tensor, cu_seqlens: Tensor) -> Tensor:
    return torch.empty_like(v)


def _like_first_fake(x: Tensor, *others: Tensor | int | float) -> Tensor:
    return torch.empty_like(x)


def _add_rms_norm_fake(x: Tensor, residual: Tensor, weight: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    return torch.empty_like(x), torch.empty_like(x)


def _patchify_fake(
    frames: Tensor, mean: Tensor, std: Tensor, patch_size: int, temporal_patch_size: int, merge_size: int
) -> Tensor:
    num_frames, height, width, channels = frames.shape
    patch_dim = channels * temporal_patch_size * patch_size**2
    num_patches = num_frames // temporal_patch_size * (height // patch_size) * (width // patch_size)
    return mean.new_empty(num_patches, patch_dim)


def _launcher(name: str) -> Callable[..., Any]:
    """Return what imports an op's launcher when it is called, and calls it."""

    def launch(*given: Any) -> Any:
        return getattr(importlib.import_module(f"vlrt.kernels.{LAUNCHERS[name]}"), name)(*given)

    return launch


def _recompute_backward(function: Callable[..., Any]) -> Callable[..., Any]:
    """Return a backward that runs the reference again and differentiates it: right anywhere, fast nowhere."""

    def backward(ctx: Any, *grads: Tensor | None) -> tuple[Tensor | None, ...]:
        tensors = iter(ctx.saved_tensors)
        inputs = [next(tensors) if is_tensor else value for is_tensor, value in ctx.given]
        with torch.enable_grad():
            inputs = [x.detach().requires_grad_(x.is_floating_point()) if isinstance(x, Tensor) else x for x in inputs]
            outs = function(*inputs)
        outs = outs if isinstance(outs, tuple) else (outs,)
        wanted = [x for x in inputs if isinstance(x, Tensor) and x.requires_grad]
        pairs = [(out, grad) for out, grad in zip(outs, grads, strict=True) if grad is not None]
        found = iter(torch.autograd.grad([o for o, _ in pairs], wanted, [g for _, g in pairs], allow_unused=True))
        return tuple(next(found) if isinstance(x, Tensor) and x.requires_grad else None for x in inputs)

    return backward


def _save_inputs(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
    ctx.save_for_backward(*(x for x in inputs if isinstance(x, Tensor)))
    ctx.given = [(isinstance(x, Tensor), None if isinstance(x, Tensor) else x) for x in inputs]


for _name, _fake in (
    ("video_attention", _video_attention_fake),
    ("video_attention_", _video_attention_in_place_fake),
    ("segment_attention", _segment_attention_fake),
    ("latent_injection", _like_first_fake),
    ("rms_norm", _like_first_fake),
    ("add_rms_norm", _add_rms_norm_fake),
    ("swiglu", _like_first_fake),
    ("patchify", _patchify_fake),
):
    LIBRARY.define(_name + SCHEMAS[_name])
    LIBRARY.impl(_name, getattr(reference, _name), "CPU")
    LIBRARY.impl(_name, _launcher(_name), "CUDA")
    torch.library.register_fake(f"vlrt::{_name}", _fake, lib=LIBRARY)
    if _name not in WITHOUT_BACKWARD:
        torch.library.register_autograd(
            f"vlrt::{_name}", _recompute_backward(getattr(reference, _name)), setup_context=_save_inputs, lib=LIBRARY
        )
