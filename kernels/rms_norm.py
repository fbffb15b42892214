"""RMSNorm, alone and after a residual is added: `x / sqrt(mean(x**2) + eps) * weight` over the last axis.

Shapes: x, residual and the results [..., C]; weight [C]. One row per program, read once and held in registers;
statistics in fp32. As in `reference.rms_norm` the normalised value is rounded to the dtype of x before the weight
multiplies it. Rows that are not evenly spaced (a slice of a batch) are copied first.

Not supported: fp64, C beyond 32768, a weight of another dtype. Source: RMSNorm (arXiv 1910.07467).
"""

from collections.abc import Iterator
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from vlrt.kernels import configs, launch

MAX_WIDTH = 32_768  # 64 fp32 values a thread with 16 warps: beyond it a row no longer fits the registers
WIDTHS = (128, 1280, 3584, 8192)  # per-head norms, the vision towers, decoders of 2B to 72B


@triton.jit
def rms_norm_kernel(
    p_x, p_residual, p_weight, p_sum, p_out, stride_x, stride_residual, C, EPS: tl.constexpr, BLOCK_C: tl.constexpr
):
    """Normalise one row; with p_residual, of x + residual, which is written to p_sum. Outputs are dense [rows, C]."""
    i_row = tl.program_id(0).to(tl.int64)
    o_c = tl.arange(0, BLOCK_C)
    m_c = o_c < C
    dtype = p_x.dtype.element_ty
    b_x = tl.load(p_x + i_row * stride_x + o_c, mask=m_c, other=0.0).to(tl.float32)  # [BLOCK_C]
    if p_residual is not None:
        b_residual = tl.load(p_residual + i_row * stride_residual + o_c, mask=m_c, other=0.0)  # [BLOCK_C]
        b_sum = (b_x + b_residual.to(tl.float32)).to(dtype)
        tl.store(p_sum + i_row * C + o_c, b_sum, mask=m_c)
        b_x = b_sum.to(tl.float32)
    b_weight = tl.load(p_weight + o_c, mask=m_c, other=0.0)  # [BLOCK_C]
    rstd = tl.rsqrt(tl.sum(b_x * b_x, axis=0) / C + EPS)
    b_normed = (b_x * rstd).to(dtype)
    b_out = b_normed.to(tl.float32) * b_weight.to(tl.float32)
    tl.store(p_out + i_row * C + o_c, b_out.to(dtype), mask=m_c)


def supported(op: str, dtype: torch.dtype, shape: tuple[int, ...]) -> str | None:
    """Say why the kernel does not serve x of this dtype and shape, or None."""
    if reason := launch.unsupported_dtype(op, dtype):
        return reason
    if not 1 <= shape[-1] <= MAX_WIDTH:
        return f"{op} on 'cuda' takes rows of 1 to {MAX_WIDTH} values, not {shape[-1]}"
    return None


def options(block: int) -> dict[str, Any]:
    """Return the launch options of a row of `block` values: 16 to 64 values a thread."""
    return {"num_warps": max(1, min(16, block // 512)), "num_stages": 1, **configs.FP_FUSION}


def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """Launch `reference.rms_norm`: x [..., C], weight [C].

    Raises:
        ValueError: shapes, dtypes or devices do not fit each other, or the kernel.
    """
    _check("rms_norm", x, weight)
    out = torch.empty_like(x)
    if not out.is_contiguous():  # x is a permuted view, and so is the result that the op promises
        return out.copy_(rms_norm(x.contiguous(), weight, eps))
    _launch(launch.rows(x), None, weight, None, out, eps)
    return out


def add_rms_norm(x: Tensor, residual: Tensor, weight: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    """Launch `reference.add_rms_norm`: x and residual [..., C], weight [C]; returns (sum, normed).

    Raises:
        ValueError: shapes, dtypes or devices do not fit each other, or the kernel.
    """
    _check("add_rms_norm", x, weight, residual)
    added, out = torch.empty_like(x), torch.empty_like(x)
    if not out.is_contiguous():
        pair = add_rms_norm(x.contiguous(), residual.contiguous(), weight, eps)
        return added.copy_(pair[0]), out.copy_(pair[1])
    _launch(launch.rows(x), launch.rows(residual), weight, added, out, eps)
    return added, out


def _check(op: str, x: Tensor, weight: Tensor, *residual: Tensor) -> None:
    reason = supported(op, x.dtype, tuple(x.shape))
    launch.require(reason is None, reason or "")
    launch.require_alike(op, x, (weight, *residual))
    for other in residual:
        launch.require(other.shape == x.shape, f"{op} was given x {list(x.shape)} and residual {list(other.shape)}")
    launch.require(
        weight.shape == x.shape[-1:] and weight.is_contiguous(),
        f"{op} was given x {list(x.shape)} and weight {list(weight.shape)}; accepted: a contiguous weight [C]",
    )


def _launch(x: Tensor, residual: Tensor | None, weight: Tensor, added: Tensor | None, out: Tensor, eps: float) -> None:
    if not out.numel():
        return
    block = triton.next_power_of_2(x.shape[-1])
    stride_residual = 0 if residual is None else residual.stride(0)
    with launch.on_device_of(x):
        rms_norm_kernel[(x.shape[0],)](
            x, residual, weight, added, out, x.stride(0), stride_residual, x.shape[-1], eps, block, **options(block)
        )


def compilations(arch: int) -> Iterator[configs.Compilation]:
    """Yield the kernels of this file in every configuration that ships."""
    for block in sorted({triton.next_power_of_2(width) for width in WIDTHS}):
        for dtype in configs.FLOATS:
            constexprs: dict[str, Any] = {"EPS": 1e-6, "BLOCK_C": block}
            for absent in ({}, {"p_residual": None, "p_sum": None}):
                yield configs.compilation(
                    rms_norm_kernel, arch, dtype, absent | constexprs, options(block), multiples=["C"]
                )
