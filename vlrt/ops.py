"""The only door to the kernels: every vlrt op by name, and whether a fused kernel serves it.

Importing it loads torch and registers the ops. Knows no model.
"""

import importlib
import importlib.util
from typing import Any

import torch
from torch import Tensor

import vlrt.kernels.schema

OPS = tuple(vlrt.kernels.schema.SCHEMAS)

video_attention = torch.ops.vlrt.video_attention
video_attention_ = torch.ops.vlrt.video_attention_
segment_attention = torch.ops.vlrt.segment_attention
add_rms_norm = torch.ops.vlrt.add_rms_norm
swiglu = torch.ops.vlrt.swiglu
patchify = torch.ops.vlrt.patchify


def supported(op: str, device: str, dtype: torch.dtype, shape: tuple[int, ...]) -> str | None:
    """Say whether an op runs on a device: None if it does, else the reason why not, as a sentence.

    Args:
        op: one of OPS.
        device: device type, such as "cpu" or "cuda".
        dtype: of the op's first input.
        shape: of the op's first input.
    """
    if op not in OPS:
        return f"no op is named {op!r}; there are {', '.join(OPS)}"
    if device not in ("cpu", "cuda"):
        return f"{op} has no kernel for {device!r}; it runs on 'cpu' and 'cuda'"
    if op == "patchify" and dtype != torch.uint8:
        return f"{op} takes frames of torch.uint8, not {dtype}"
    if op != "patchify" and not dtype.is_floating_point:
        return f"{op} takes floating point tensors, not {dtype}"
    if len(shape) < 2:
        return f"{op} takes tensors of 2 axes or more, not {list(shape)}"
    return None if device == "cpu" else _kernel_supports(op, dtype, shape)


def _kernel_supports(op: str, dtype: torch.dtype, shape: tuple[int, ...]) -> str | None:
    """Ask the module of an op's launcher, which imports triton."""
    module = f"vlrt.kernels.{vlrt.kernels.schema.LAUNCHERS[op]}"
    if importlib.util.find_spec(module) is None:
        return f"{op} has no kernel for 'cuda' yet; it runs on 'cpu'"
    if importlib.util.find_spec("triton") is None:
        return f"{op} on 'cuda' needs the package triton, which is not installed"
    reason: str | None = importlib.import_module(module).supported(op, dtype, shape)
    return reason


def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """See `kernels.reference.rms_norm`."""
    run = vlrt.kernels.reference.rms_norm if _learns_on_cpu(x) else torch.ops.vlrt.rms_norm
    return run(x, weight, eps)


def latent_injection(h: Tensor, *rest: Tensor | int | float) -> Tensor:
    """See `kernels.reference.latent_injection`."""
    run: Any = vlrt.kernels.reference.latent_injection if _learns_on_cpu(h) else torch.ops.vlrt.latent_injection
    out: Tensor = run(h, *rest)
    return out


def _learns_on_cpu(x: Tensor) -> bool:
    """Whether to call the reference itself: as an op, its backward would run it a second time."""
    return x.device.type == "cpu" and torch.is_grad_enabled() and not torch.compiler.is_compiling()


def rotary(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotate the halves of the last axis of x [..., S, H, D] by cos and sin [S, D/2]."""
    return vlrt.kernels.reference.rotary(x, cos, sin)
