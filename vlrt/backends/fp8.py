"""Linear layers in fp8 (float8_e4m3fn): weights scaled by output channel, activations by token. Knows no model."""

import torch
from torch import Tensor

FP8 = torch.float8_e4m3fn
FP8_MAX = torch.finfo(FP8).max
SCALE = ".scale"  # ending of the name of a weight's scales
MULTIPLE = 16  # of values: torch._scaled_mm takes no other widths


def unsupported(*widths: int) -> str | None:
    """Return why matrices of these widths cannot be multiplied in fp8, as a sentence, or None."""
    odd = ", ".join(str(width) for width in widths if width % MULTIPLE)
    return f"fp8 products take widths that are multiples of {MULTIPLE}, not {odd}" if odd else None


def fp8_linear(x: Tensor, weight: Tensor, scale: Tensor, bias: Tensor | None) -> Tensor:
    """Map x [..., K] to [..., N] by fp8 products, scaled by rows of x and of the weight.

    Cards multiply in fp8; on the CPU the same values are multiplied in float32.

    Args:
        x: [..., K].
        weight: [N, K] float8_e4m3fn.
        scale: [N] float32, by which row n of the weight is multiplied.
        bias: [N], of the dtype of x; None: none.
    """
    rows = x.flatten(0, -2)
    per_row = rows.abs().amax(-1, keepdim=True).float().clamp(min=1e-12) / FP8_MAX
    small = (rows.float() / per_row).to(FP8)
    if x.is_cuda:
        out = torch._scaled_mm(
            small, weight.t(), scale_a=per_row, scale_b=scale[None], out_dtype=x.dtype, use_fast_accum=True
        )
    else:
        out = (small.float() @ weight.float().t() * per_row * scale).to(x.dtype)
    if bias is not None:
        out = out + bias
    result: Tensor = out.unflatten(0, x.shape[:-1])
    return result


def to_fp8(weight: Tensor) -> tuple[Tensor, Tensor]:
    """Return a weight [N, K] as float8_e4m3fn and the scales [N] float32 of its rows."""
    scale = weight.float().abs().amax(-1).clamp(min=1e-12) / FP8_MAX
    return (weight.float() / scale[:, None]).to(FP8), scale
