"""`video_attention_` for a few new positions: the keys are split over programs, and the parts combined.

A row is a new position of a head: R = S * group rows share a kv head. The split that owns the new slots takes their
keys and values from k and v, and stores them; no program reads what another one writes. How many splits there are
follows from the card and the shapes alone, their bounds from `past_length`, which stays on the device. Parts are fp32,
each with the base-2 logarithm of its sum of weights.

Shapes and dtypes: video_attention.py, whose launcher checks them. Source: Flash-Decoding (Dao et al., 2023).
"""

import functools
from collections.abc import Iterator
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from vlrt.kernels import configs, tl_ops

PROGRAMS_PER_PROCESSOR = 2  # programs that one multiprocessor runs at a time, to hide each other's latency
MAX_SPLITS = 64
COMBINE_WARPS = 4
BLOCK_T = 16  # new keys at a time: often one alone, and 16 is tl.dot's least
INTERPRETED_PROCESSORS = 8  # what a CPU, on which kernels are interpreted, counts as


@triton.jit(do_not_specialize=["num_new"])
def decode_kernel(
    p_q,  # [B, S, H, D]
    p_k,  # [B, S, H_kv, D]
    p_v,
    p_cos,  # [M, D/2]
    p_sin,
    p_k_cache,  # [B, H_kv, M, D]
    p_v_cache,
    p_past,  # int32 scalar
    p_out,  # [B, S, H, D]; with several splits [B, S, H, splits, D] fp32
    p_log,  # [B, S, H, splits] fp32; unused with one split
    stride_qb,
    stride_qs,
    stride_qh,
    stride_kb,
    stride_ks,
    stride_kh,
    stride_vb,
    stride_vs,
    stride_vh,
    stride_kcb,
    stride_kch,
    stride_kcm,
    stride_vcb,
    stride_vch,
    stride_vcm,
    num_new,
    num_kv_heads,
    group_size,  # H / H_kv
    SCALE: tl.constexpr,  # D**-0.5 * log2(e)
    HEAD_DIM: tl.constexpr,
    WIDTH0: tl.constexpr,
    WIDTH1: tl.constexpr,
    ALIGN: tl.constexpr,
    NUM_SPLITS: tl.constexpr,
    BLOCK_R: tl.constexpr,
    BLOCK_N: tl.constexpr,  # older keys at a time
    BLOCK_T: tl.constexpr,  # new keys at a time
):
    """Attend from BLOCK_R rows to the keys of one split. Grid: (splits, blocks of rows, B * H_kv)."""
    i_split, i_r = tl.program_id(0), tl.program_id(1)
    i_b = (tl.program_id(2) // num_kv_heads).to(tl.int64)
    i_kv = (tl.program_id(2) % num_kv_heads).to(tl.int64)
    past = tl.load(p_past)
    stop = past + num_new
    chunk = tl.cdiv(tl.cdiv(stop, BLOCK_N), NUM_SPLITS) * BLOCK_N
    start = i_split * chunk
    stop = tl.minimum(start + chunk, stop)

    rows = i_r * BLOCK_R + tl.arange(0, BLOCK_R)
    s = rows // group_size
    i_h = i_kv * group_size + rows % group_size
    m_r = s < num_new
    p_q += tl.multiple_of(i_b * stride_qb, ALIGN)
    o_q = tl.multiple_of(s * stride_qs + i_h * stride_qh, ALIGN)
    o_table = (past + s).to(tl.int64) * (HEAD_DIM // 2)
    q0, q1 = tl_ops.load_rotated(p_q, p_cos, p_sin, o_q, o_table, m_r, HEAD_DIM, WIDTH0, WIDTH1)  # [R, D0], [R, D1]
    highest, total, acc0, acc1 = tl_ops.no_rows(BLOCK_R, WIDTH0, WIDTH1)

    p_k += tl.multiple_of(i_b * stride_kb + i_kv * stride_kh, ALIGN)
    p_v += tl.multiple_of(i_b * stride_vb + i_kv * stride_vh, ALIGN)
    p_k_cache += tl.multiple_of(i_b * stride_kcb + i_kv * stride_kch, ALIGN)
    p_v_cache += tl.multiple_of(i_b * stride_vcb + i_kv * stride_vch, ALIGN)
    n = tl.arange(0, BLOCK_N)
    o_k, o_v = tl.multiple_of(n * stride_kcm, ALIGN), tl.multiple_of(n * stride_vcm, ALIGN)
    # Older keys: every row sees them.
    stop_old = tl.minimum(stop, past)
    for start_n in tl.range(start, stop_old, BLOCK_N):
        m_n = start_n + n < stop_old
        k0, k1 = tl_ops.load(
            p_k_cache + tl.cast(start_n, tl.int64) * stride_kcm, o_k, m_n, HEAD_DIM, WIDTH0, WIDTH1, True
        )  # [N, D0], [N, D1]
        v0, v1 = tl_ops.load(
            p_v_cache + tl.cast(start_n, tl.int64) * stride_vcm, o_v, m_n, HEAD_DIM, WIDTH0, WIDTH1, True
        )  # [N, D0], [N, D1]
        highest, total, acc0, acc1 = tl_ops.attend(
            q0, q1, k0, k1, v0, v1, m_n[None, :], highest, total, acc0, acc1, SCALE, True, WIDTH1
        )
    # New keys: rotated here, stored by the first block of rows.
    t = tl.arange(0, BLOCK_T)
    for start_t in tl.range(tl.maximum(start, past), stop, BLOCK_T, num_stages=1):
        slot = tl.cast(start_t, tl.int64) + t
        m_t = slot < stop
        o_kt = tl.multiple_of((slot - past) * stride_ks, ALIGN)
        o_vt = tl.multiple_of((slot - past) * stride_vs, ALIGN)
        o_t = slot * (HEAD_DIM // 2)
        k0, k1 = tl_ops.load_rotated(p_k, p_cos, p_sin, o_kt, o_t, m_t, HEAD_DIM, WIDTH0, WIDTH1)  # [T, D0], [T, D1]
        v0, v1 = tl_ops.load(p_v, o_vt, m_t, HEAD_DIM, WIDTH0, WIDTH1, True)  # [T, D0], [T, D1]
        if i_r == 0:
            tl_ops.store(p_k_cache, tl.multiple_of(slot * stride_kcm, ALIGN), m_t, k0, k1, HEAD_DIM, WIDTH0, WIDTH1)
            tl_ops.store(p_v_cache, tl.multiple_of(slot * stride_vcm, ALIGN), m_t, v0, v1, HEAD_DIM, WIDTH0, WIDTH1)
        visible = m_t[None, :] & (slot[None, :] <= (past + s)[:, None])  # [R, T]
        highest, total, acc0, acc1 = tl_ops.attend(
            q0, q1, k0, k1, v0, v1, visible, highest, total, acc0, acc1, SCALE, True, WIDTH1
        )

    # Rows that see no key of this split have a sum of 0.
    inverse = (1.0 / tl.where(total > 0, total, 1.0))[:, None]
    row = (i_b * num_new + s) * (num_kv_heads * group_size) + i_h
    part = row * NUM_SPLITS + i_split
    tl_ops.store(p_out, part * HEAD_DIM, m_r, acc0 * inverse, acc1 * inverse, HEAD_DIM, WIDTH0, WIDTH1)
    if NUM_SPLITS > 1:
        log = tl.where(total > 0, highest + tl.log2(total), tl_ops.NO_MAXIMUM)
        tl.store(p_log + part, log, mask=m_r)


@triton.jit
def combine_kernel(
    p_part,  # [B, S, H, splits, D] fp32
    p_log,  # [B, S, H, splits] fp32
    p_out,  # [B, S, H, D]
    HEAD_DIM: tl.constexpr,
    NUM_SPLITS: tl.constexpr,
    BLOCK_SPLITS: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    """Weigh the parts of one row by their sums of weights. Grid: (B * S * H,)."""
    row = tl.program_id(0).to(tl.int64)
    split = tl.arange(0, BLOCK_SPLITS)
    d = tl.arange(0, BLOCK_D)
    log = tl.load(p_log + row * NUM_SPLITS + split, mask=split < NUM_SPLITS, other=tl_ops.NO_MAXIMUM)  # [splits]
    weight = tl.exp2(log - tl.max(log, 0))
    o_part = (row * NUM_SPLITS + split) * HEAD_DIM
    mask = (split < NUM_SPLITS)[:, None] & (d < HEAD_DIM)[None, :]
    part = tl.load(p_part + o_part[:, None] + d[None, :], mask=mask, other=0.0)  # [splits, D]
    out = tl.sum(part * weight[:, None], 0) / tl.sum(weight, 0)
    tl.store(p_out + row * HEAD_DIM + d, out.to(p_out.dtype.element_ty), mask=d < HEAD_DIM)


def decode_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    cos: Tensor,
    sin: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    past_length: Tensor,
    num_splits: int | None = None,
) -> Tensor:
    """`video_attention_` by splitting the keys. The arguments are not checked.

    Args:
        q: see `reference.video_attention`, like all others.
        k: likewise.
        v: likewise.
        cos: likewise; contiguous.
        sin: likewise; contiguous.
        k_cache: likewise.
        v_cache: likewise.
        past_length: likewise.
        num_splits: into how many parts the keys are split; None: as many as fill the card.
    """
    batch, num_new, num_heads, head_dim = q.shape
    num_kv_heads, capacity = k_cache.shape[1:3]
    config = configs.lookup("decode_attention", configs.architecture(q.device), q.dtype, head_dim, capacity)
    num_rows = num_new * (num_heads // num_kv_heads)
    block_r = row_block(num_rows, config["MAX_BLOCK_R"])
    row_blocks = triton.cdiv(num_rows, block_r)
    if num_splits is None:
        num_splits = split_count(batch * num_kv_heads * row_blocks, triton.cdiv(capacity, config["BLOCK_N"]), q.device)
    out = torch.empty(q.shape, dtype=q.dtype, device=q.device)
    part = log = out
    if num_splits > 1:
        part = torch.empty((*q.shape[:3], num_splits, head_dim), dtype=torch.float32, device=q.device)
        log = torch.empty(part.shape[:-1], dtype=torch.float32, device=q.device)
    decode_kernel[(num_splits, row_blocks, batch * num_kv_heads)](
        *(q, k, v, cos, sin, k_cache, v_cache, past_length, part, log),
        *(*q.stride()[:3], *k.stride()[:3], *v.stride()[:3], *k_cache.stride()[:3], *v_cache.stride()[:3]),
        *(num_new, num_kv_heads, num_heads // num_kv_heads),
        SCALE=tl_ops.softmax_scale(head_dim),
        **tl_ops.head_constexprs(head_dim),
        ALIGN=tl_ops.alignment(q, k, v, k_cache, v_cache),
        NUM_SPLITS=num_splits,
        BLOCK_R=block_r,
        BLOCK_N=config["BLOCK_N"],
        BLOCK_T=BLOCK_T,
        **configs.options(config),
    )
    if num_splits > 1:
        combine_kernel[(batch * num_new * num_heads,)](
            *(part, log, out),
            HEAD_DIM=head_dim,
            NUM_SPLITS=num_splits,
            BLOCK_SPLITS=triton.next_power_of_2(num_splits),
            BLOCK_D=triton.next_power_of_2(head_dim),
            num_warps=COMBINE_WARPS,
            **configs.FP_FUSION,
        )
    return out


def row_block(num_rows: int, largest: int) -> int:
    """Return the rows of a program: a power of two that holds them all, from 16, tl.dot's least, to `largest`."""
    return min(max(triton.next_power_of_2(num_rows), 16), largest)


def split_count(programs: int, most: int, device: torch.device) -> int:
    """Return the splits that make `programs` fill the card, a power of two of at most `most` and MAX_SPLITS."""
    wanted = PROGRAMS_PER_PROCESSOR * num_processors(device) // max(programs, 1)
    wanted = max(min(wanted, most, MAX_SPLITS), 1)
    return 1 << (wanted.bit_length() - 1)


@functools.cache
def num_processors(device: torch.device) -> int:
    """Return the multiprocessors of a device."""
    if device.type != "cuda":
        return INTERPRETED_PROCESSORS
    return int(torch.cuda.get_device_properties(device).multi_processor_count)


def compilations(arch: int) -> Iterator[configs.Compilation]:
    """Yield the kernels of this file for every config that an architecture ships."""
    for dtype, head_dim, config in configs.cases("decode_attention", arch, tl_ops.HEAD_DIMS):
        constexprs: dict[str, Any] = {
            "SCALE": tl_ops.softmax_scale(head_dim),
            **tl_ops.head_constexprs(head_dim),
            "ALIGN": 8,
        }
        constexprs |= {
            "NUM_SPLITS": 8,
            "BLOCK_R": config["MAX_BLOCK_R"],
            "BLOCK_N": config["BLOCK_N"],
            "BLOCK_T": BLOCK_T,
        }
        pointers = {"p_past": torch.int32, "p_out": torch.float32, "p_log": torch.float32}
        yield configs.compilation(decode_kernel, arch, dtype, constexprs, configs.options(config), pointers)
    constexprs = {"HEAD_DIM": 128, "NUM_SPLITS": MAX_SPLITS, "BLOCK_SPLITS": MAX_SPLITS, "BLOCK_D": 128}
    pointers = {"p_part": torch.float32, "p_log": torch.float32}
    options = {"num_warps": COMBINE_WARPS, **configs.FP_FUSION}
    yield configs.compilation(combine_kernel, arch, torch.bfloat16, constexprs, options, pointers)
