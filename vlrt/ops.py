"""The only door to the kernels: every vlrt op by name, and whether a fused kernel serves it.

Importing it loads torch and registers the ops. Knows no model.
"""

import torch
from torch import Tensor

import vlrt.kernels.schema

OPS = tuple(vlrt.kernels.schema.SCHEMAS)

video_attention = torch.ops.vlrt.video_attention
segment_attention = torch.ops.vlrt.segment_attention
latent_injection = torch.ops.vlrt.latent_injection
rms_norm = torch.ops.vlrt.rms_norm


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
    if device != "cpu":
        return f"{op} has no kernel for {device!r} yet; it runs on 'cpu'"
    if not dtype.is_floating_point:
        return f"{op} takes floating point tensors, not {dtype}"
    if len(shape) < 2:
        return f"{op} takes tensors of 2 axes or more, not {list(shape)}"
    return None


def rotary(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotate the halves of the last axis of x [..., S, H, D] by cos and sin [S, D/2]."""
    return vlrt.kernels.reference.rotary(x, cos, sin)
