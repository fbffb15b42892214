"""SwiGLU: `silu(gate) * up` (arXiv 2002.05202), the activation between the two GEMMs of a decoder's MLP.

Shapes: gate, up and the result [..., I]. gate and up may be the two halves of one projection [..., 2 I]: rows are read
with a stride. Computed in fp32, rounded once. Rows that are not evenly spaced are copied first.

Not supported: fp64, gate and up of different dtypes.
"""

from collections.abc import Iterator
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from vlrt.kernels import configs, launch

BLOCK_I = 1024  # 8 values a thread with 4 warps: one 16-byte load of each bf16 input
OPTIONS: dict[str, Any] = {"num_warps": 4, "num_stages": 1, **configs.FP_FUSION}


@triton.jit
def swiglu_kernel(p_gate, p_up, p_out, stride_gate, stride_up, width, BLOCK_I: tl.constexpr):
    """Activate one block of one row; the output is dense [rows, width]."""
    i_row = tl.program_id(0).to(tl.int64)
    o_i = tl.program_id(1) * BLOCK_I + tl.arange(0, BLOCK_I)
    m_i = o_i < width
    b_gate = tl.load(p_gate + i_row * stride_gate + o_i, mask=m_i, other=0.0).to(tl.float32)  # [BLOCK_I]
    b_up = tl.load(p_up + i_row * stride_up + o_i, mask=m_i, other=0.0).to(tl.float32)  # [BLOCK_I]
    b_out = b_gate / (1.0 + tl.exp2(b_gate * -1.4426950408889634)) * b_up
    tl.store(p_out + i_row * width + o_i, b_out.to(p_out.dtype.element_ty), mask=m_i)


def supported(op: str, dtype: torch.dtype, shape: tuple[int, ...]) -> str | None:
    """Say why the kernel does not serve a gate of this dtype and shape, or None."""
    return launch.unsupported_dtype(op, dtype)


def swiglu(gate: Tensor, up: Tensor) -> Tensor:
    """Launch `reference.swiglu`: gate and up [..., I].

    Raises:
        ValueError: shapes, dtypes or devices do not fit each other, or the kernel.
    """
    reason = supported("swiglu", gate.dtype, tuple(gate.shape))
    launch.require(reason is None, reason or "")
    launch.require_alike("swiglu", gate, (up,))
    launch.require(gate.shape == up.shape, f"swiglu was given gate {list(gate.shape)} and up {list(up.shape)}")
    out = torch.empty_like(gate)
    if not out.is_contiguous():  # gate is a permuted view, and so is the result that the op promises
        return out.copy_(swiglu(gate.contiguous(), up.contiguous()))
    if out.numel():
        gate, up = launch.rows(gate), launch.rows(up)
        grid = (gate.shape[0], triton.cdiv(gate.shape[1], BLOCK_I))
        with launch.on_device_of(gate):
            swiglu_kernel[grid](gate, up, out, gate.stride(0), up.stride(0), gate.shape[1], BLOCK_I, **OPTIONS)
    return out


def compilations(arch: int) -> Iterator[configs.Compilation]:
    """Yield the kernels of this file in every configuration that ships."""
    for dtype in configs.FLOATS:
        yield configs.compilation(swiglu_kernel, arch, dtype, {"BLOCK_I": BLOCK_I}, OPTIONS, multiples=["width"])
