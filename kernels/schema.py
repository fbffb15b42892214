"""Registration of every vlrt op with PyTorch, once. Import it for its effect.

CPU runs `reference.py`; the fake implementations give shapes to torch.export and torch.compile. All ops are functional:
nothing given is written to.
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from vlrt.kernels import reference

LIBRARY = torch.library.Library("vlrt", "DEF")

SCHEMAS = {
    "video_attention": (
        "(Tensor q, Tensor k, Tensor v, Tensor cos, Tensor sin, Tensor k_cache, Tensor v_cache, Tensor past_length)"
        " -> (Tensor, Tensor, Tensor)"
    ),
    "segment_attention": "(Tensor q, Tensor k, Tensor v, Tensor cos, Tensor sin, Tensor cu_seqlens) -> Tensor",
    "latent_injection": (
        "(Tensor h, Tensor norm_in, Tensor fc1, Tensor fc2, Tensor q_proj, Tensor memory_k, Tensor memory_v,"
        " Tensor alpha, Tensor norm_out, Tensor rho, int num_heads, float eps) -> Tensor"
    ),
    "rms_norm": "(Tensor x, Tensor weight, float eps) -> Tensor",
}


def _video_attention_fake(
    q: Tensor, k: Tensor, v: Tensor, cos: Tensor, sin: Tensor, k_cache: Tensor, v_cache: Tensor, past_length: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    return torch.empty_like(q).contiguous(), torch.empty_like(k_cache), torch.empty_like(v_cache)


def _segment_attention_fake(q: Tensor, k: Tensor, v: Tensor, cos: Tensor, sin: Tensor, cu_seqlens: Tensor) -> Tensor:
    return torch.empty_like(v)


def _like_first_fake(x: Tensor, *others: Tensor | int | float) -> Tensor:
    return torch.empty_like(x)


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
    ("segment_attention", _segment_attention_fake),
    ("latent_injection", _like_first_fake),
    ("rms_norm", _like_first_fake),
):
    LIBRARY.define(_name + SCHEMAS[_name])
    LIBRARY.impl(_name, getattr(reference, _name), "CPU")
    torch.library.register_fake(f"vlrt::{_name}", _fake, lib=LIBRARY)
    torch.library.register_autograd(
        f"vlrt::{_name}", _recompute_backward(getattr(reference, _name)), setup_context=_save_inputs, lib=LIBRARY
    )
