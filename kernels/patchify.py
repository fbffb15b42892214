"""Patchify: normalise uint8 frames and write them in the order in which Qwen's vision towers read patches, in one pass.

    out[n, (channel, frame, row, column)] = (frames / 255 - mean) / std

Shapes: frames [T, H, W, 3] uint8, any strides; mean, std [3]; out [N, 3 * temporal_patch_size * patch_size**2] in
a dtype of its own, patches in the order (time, window row, window column, row, column in the window). Resizing and the
padding of T happen outside. A window's patches are one dense stretch of the output: each program writes a block of it.

Arithmetic is fp32 with a true division and without fused multiply-add, so that it equals
`reference.patchify` to the bit.
Not supported: fp64. Source: transformers, `Qwen2VLImageProcessor`.
"""

from collections.abc import Iterator
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from vlrt.kernels import configs, launch

BLOCK = 1024  # a window of Qwen2.5-VL is 4704 values: 5 blocks, 8 % of the lanes idle
OPTIONS: dict[str, Any] = {"num_warps": 4, "num_stages": 1, "enable_fp_fusion": False}
SHIPPED = ((14, 2, 2), (16, 2, 2))  # patch, temporal patch, merge: Qwen2-VL and Qwen2.5-VL, Qwen3-VL


@triton.jit
def patchify_kernel(
    p_frames,
    p_mean,
    p_std,
    p_out,
    stride_t,
    stride_h,
    stride_w,
    stride_c,
    num_window_rows,
    num_window_columns,
    PATCH: tl.constexpr,
    STEPS: tl.constexpr,
    MERGE: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Write one block of the patches of one window of MERGE * MERGE patches."""
    i_window = tl.program_id(0).to(tl.int64)
    i_column = i_window % num_window_columns
    i_row = i_window // num_window_columns % num_window_rows
    i_time = i_window // num_window_columns // num_window_rows
    o = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)  # (row, column in the window, channel, frame, row, column)
    m = o < MERGE * MERGE * 3 * STEPS * PATCH * PATCH
    o_x = o % PATCH
    o_y = o // PATCH % PATCH
    o_frame = o // (PATCH * PATCH) % STEPS
    o_channel = o // (PATCH * PATCH * STEPS) % 3
    o_patch = o // (PATCH * PATCH * STEPS * 3)
    o_x += o_patch % MERGE * PATCH
    o_y += o_patch // MERGE * PATCH
    p_window = p_frames + i_time * STEPS * stride_t
    p_window += i_row * (MERGE * PATCH) * stride_h + i_column * (MERGE * PATCH) * stride_w
    b_in = tl.load(
        p_window + o_frame.to(tl.int64) * stride_t + o_y * stride_h + o_x * stride_w + o_channel * stride_c,
        mask=m,
        other=0,
    )  # [BLOCK]
    b_mean = tl.load(p_mean + o_channel, mask=m, other=0.0).to(tl.float32)  # [BLOCK]
    b_std = tl.load(p_std + o_channel, mask=m, other=1.0).to(tl.float32)  # [BLOCK]
    b_out = tl.div_rn(b_in.to(tl.float32) * 0.00392156862745098 - b_mean, b_std)  # 1 / 255
    p_dense = p_out + i_window * (MERGE * MERGE * 3 * STEPS * PATCH * PATCH)
    tl.store(p_dense + o, b_out.to(p_out.dtype.element_ty), mask=m)


def supported(op: str, dtype: torch.dtype, shape: tuple[int, ...]) -> str | None:
    """Say why the kernel does not serve frames of this dtype and shape, or None."""
    if dtype != torch.uint8:
        return f"{op} on 'cuda' takes frames of torch.uint8, not {dtype}"
    if len(shape) != 4 or shape[-1] != 3:
        return f"{op} on 'cuda' takes frames [T, H, W, 3], not {list(shape)}"
    return None


def patchify(
    frames: Tensor,
    mean: Tensor,
    std: Tensor,
    patch_size: int,
    temporal_patch_size: int,
    merge_size: int,
    dtype: torch.dtype | None = None,
) -> Tensor:
    """Launch `reference.patchify`: frames [T, H, W, 3] uint8, mean and std [3]; dtype None: that of mean.

    Raises:
        ValueError: T, H or W is no multiple of what it must be, or the tensors do not fit the kernel.
    """
    reason = supported("patchify", frames.dtype, tuple(frames.shape))
    dtype = mean.dtype if dtype is None else dtype
    reason = reason or launch.unsupported_dtype("patchify", mean.dtype) or launch.unsupported_dtype("patchify", dtype)
    launch.require(reason is None, reason or "")
    launch.require_alike("patchify", mean, (std,))
    launch.require(mean.shape == std.shape == (3,), f"mean is {list(mean.shape)} and std {list(std.shape)}, not [3]")
    launch.require(frames.device == mean.device, f"frames are on {frames.device}, mean is on {mean.device}")
    count, height, width, _ = frames.shape
    side = patch_size * merge_size
    launch.require(
        not (count % temporal_patch_size or height % side or width % side),
        f"frames are {list(frames.shape)}; accepted: T a multiple of {temporal_patch_size}, H and W of {side}",
    )
    patch_dim = 3 * temporal_patch_size * patch_size**2
    num_rows, num_columns = height // side, width // side
    num_windows = count // temporal_patch_size * num_rows * num_columns
    out = mean.new_empty(num_windows * merge_size**2, patch_dim, dtype=dtype)
    if num_windows:
        grid = (num_windows, triton.cdiv(merge_size**2 * patch_dim, BLOCK))
        sizes = (patch_size, temporal_patch_size, merge_size, BLOCK)
        mean, std = mean.contiguous(), std.contiguous()
        with launch.on_device_of(frames):
            patchify_kernel[grid](frames, mean, std, out, *frames.stride(), num_rows, num_columns, *sizes, **OPTIONS)
    return out


def compilations(arch: int) -> Iterator[configs.Compilation]:
    """Yield the kernels of this file in every configuration that ships."""
    for patch, steps, merge in SHIPPED:
        constexprs = {"PATCH": patch, "STEPS": steps, "MERGE": merge, "BLOCK": BLOCK}
        for dtype in configs.FLOATS:
            pointers = {"p_frames": torch.uint8, "p_mean": torch.float32, "p_std": torch.float32}
            yield configs.compilation(patchify_kernel, arch, dtype, constexprs, OPTIONS, pointers)
