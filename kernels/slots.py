"""The two simple modes of the latent injection module, straight into the latent slots, one launch each.

    rms: z = rho * h / sqrt(mean(h**2) + eps)        identity: z = h

Shapes: h [B, L, C], z into rows start .. start + L of embeds [B, S, C]; rho a scalar of any float dtype on the device.
One row per program, statistics in fp32. The modes with weights: `latent_injection.latent_injection_into`.

Not supported: fp64, C beyond 32768, embeds that overlaps h. Source: docs/latents.md.
"""

from collections.abc import Iterator
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from vlrt.kernels import configs, launch, rms_norm


@triton.jit
def slots_kernel(
    p_h,
    p_rho,
    p_z,
    p_start,
    stride_hb,
    stride_hl,
    stride_zb,
    stride_zs,
    L,
    S,
    C,
    EPS: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    """Write one row; p_rho None: as it is. p_start None: start is 0. Rows beyond S are dropped."""
    i_b = (tl.program_id(0) // L).to(tl.int64)
    i_l = tl.program_id(0) % L
    o_c = tl.arange(0, BLOCK_C)
    m_c = o_c < C
    b_z = tl.load(p_h + i_b * stride_hb + i_l.to(tl.int64) * stride_hl + o_c, mask=m_c, other=0.0)  # [BLOCK_C]
    if p_rho is not None:
        b_h = b_z.to(tl.float32)
        rstd = tl.rsqrt(tl.sum(b_h * b_h, axis=0) / C + EPS)
        b_z = (b_h * rstd * tl.load(p_rho).to(tl.float32)).to(p_z.dtype.element_ty)
    i_s = i_l.to(tl.int64)
    if p_start is not None:
        i_s += tl.load(p_start)
    if (i_s >= 0) & (i_s < S):
        tl.store(p_z + i_b * stride_zb + i_s * stride_zs + o_c, b_z, mask=m_c)


def rms_into(h: Tensor, rho: Tensor, eps: float, embeds: Tensor, start: int | Tensor) -> None:
    """Write `rho * h / rms(h)` to rows start .. start + L of embeds; start as in `launch.slots`.

    Raises:
        ValueError: shapes, strides, dtypes or devices do not fit each other, or the rows do not fit embeds.
    """
    launch.require(
        rho.numel() == 1 and rho.device == h.device, f"rho is {list(rho.shape)} on {rho.device}, not a scalar"
    )
    _launch(h, rho, eps, embeds, start)


def identity_into(h: Tensor, embeds: Tensor, start: int | Tensor) -> None:
    """Write h to rows start .. start + L of embeds; start as in `launch.slots`.

    Raises:
        ValueError: shapes, strides, dtypes or devices do not fit each other, or the rows do not fit embeds.
    """
    _launch(h, None, 0.0, embeds, start)


def _launch(h: Tensor, rho: Tensor | None, eps: float, embeds: Tensor, start: int | Tensor) -> None:
    z, p_start = launch.slots(h, embeds, start)
    reason = rms_norm.supported("the latent slots", h.dtype, tuple(h.shape))
    launch.require(reason is None, reason or "")
    launch.require(h.stride(-1) == 1, "h has gaps between the values of a row; pass h.contiguous()")
    if not h.numel():
        return
    batch, length, width = h.shape
    block = triton.next_power_of_2(width)
    with launch.on_device_of(h):
        slots_kernel[(batch * length,)](
            *(h, rho, z, p_start, *h.stride()[:2], *z.stride()[:2], length, z.shape[1], width, eps, block),
            **rms_norm.options(block),
        )


def compilations(arch: int) -> Iterator[configs.Compilation]:
    """Yield the kernels of this file in every configuration that ships."""
    for block in (4096, 8192):  # the decoders of 7B and 72B
        for dtype in configs.FLOATS:
            for absent in ({}, {"p_rho": None}):
                constexprs: dict[str, Any] = {**absent, "EPS": 1e-6, "BLOCK_C": block}
                options, pointers = rms_norm.options(block), {"p_start": torch.int32}
                yield configs.compilation(slots_kernel, arch, dtype, constexprs, options, pointers, multiples=["C"])
