"""Rotary, append to the KV cache, causal attention over the whole of it: `reference.video_attention`.

    k_cache[past + s] = rotate(k_s);  v_cache[past + s] = v_s
    out_s = softmax(rotate(q_s) k_cache[: past + s + 1]^T / sqrt D) v_cache[: past + s + 1]

q, out [B, S, H, D]; k, v [B, S, H_kv, D]; caches [B, H_kv, M, D]; cos, sin [M, D/2]; H a multiple of H_kv; bfloat16,
float16 or float32; D of tl_ops.HEAD_DIMS. Strides may be anything but for the last axis, which must be contiguous.
`past_length` stays on the device, so that one CUDA graph serves every length. Up to DECODE_ROWS new positions go to
decode_attention.py; for more, one launch rotates and appends, and a second attends, queries rotated in registers.

Sources: FlashAttention (arXiv 2205.14135, 2307.08691), RoFormer (arXiv 2104.09864), GQA (arXiv 2305.13245).
"""

from collections.abc import Iterator
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from vlrt.kernels import configs, decode_attention, tl_ops

DECODE_ROWS = 32  # new positions up to which splitting the keys beats splitting the queries


def supported(op: str, dtype: torch.dtype, shape: tuple[int, ...]) -> str | None:
    """Say why the kernels do not take q of this dtype and shape [B, S, H, D], or None."""
    if len(shape) != 4:
        return f"{op} takes q [B, S, H, D], not {list(shape)}"
    return tl_ops.unsupported(op, dtype, shape[-1])


@triton.jit(do_not_specialize=["num_new"])
def append_kernel(
    p_k,  # [B, S, H_kv, D]
    p_v,
    p_cos,  # [M, D/2]
    p_sin,
    p_k_cache,  # [B, H_kv, M, D]
    p_v_cache,
    p_past,  # int32 scalar
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
    HEAD_DIM: tl.constexpr,
    WIDTH0: tl.constexpr,
    WIDTH1: tl.constexpr,
    ALIGN: tl.constexpr,
    BLOCK_S: tl.constexpr,
):
    """Write rotated k, and v, to slots past .. past + S. Grid: (blocks of S, B * H_kv)."""
    i_s = tl.program_id(0)
    i_b = (tl.program_id(1) // num_kv_heads).to(tl.int64)
    i_h = (tl.program_id(1) % num_kv_heads).to(tl.int64)
    past = tl.load(p_past).to(tl.int64)
    s = i_s * BLOCK_S + tl.arange(0, BLOCK_S)
    m_s = s < num_new
    s = s.to(tl.int64)
    p_k += tl.multiple_of(i_b * stride_kb + i_h * stride_kh, ALIGN)
    p_v += tl.multiple_of(i_b * stride_vb + i_h * stride_vh, ALIGN)
    p_k_cache += tl.multiple_of(i_b * stride_kcb + i_h * stride_kch, ALIGN)
    p_v_cache += tl.multiple_of(i_b * stride_vcb + i_h * stride_vch, ALIGN)
    o_k, o_v = tl.multiple_of(s * stride_ks, ALIGN), tl.multiple_of(s * stride_vs, ALIGN)
    o_table = (past + s) * (HEAD_DIM // 2)
    o_k_cache = tl.multiple_of((past + s) * stride_kcm, ALIGN)
    o_v_cache = tl.multiple_of((past + s) * stride_vcm, ALIGN)
    k0, k1 = tl_ops.load_rotated(p_k, p_cos, p_sin, o_k, o_table, m_s, HEAD_DIM, WIDTH0, WIDTH1)
    v0, v1 = tl_ops.load(p_v, o_v, m_s, HEAD_DIM, WIDTH0, WIDTH1, True)
    tl_ops.store(p_k_cache, o_k_cache, m_s, k0, k1, HEAD_DIM, WIDTH0, WIDTH1)
    tl_ops.store(p_v_cache, o_v_cache, m_s, v0, v1, HEAD_DIM, WIDTH0, WIDTH1)


@triton.jit(do_not_specialize=["num_new"])
def prefill_kernel(
    p_q,  # [B, S, H, D]
    p_cos,  # [M, D/2]
    p_sin,
    p_k_cache,  # [B, H_kv, M, D], the new slots written
    p_v_cache,
    p_past,  # int32 scalar
    p_out,  # [B, S, H, D]
    d_k0,  # caches as [B * H_kv * M, D] in blocks [BLOCK_N, D0] and [BLOCK_N, D1] for the copy engine, if TMA
    d_k1,
    d_v0,
    d_v1,
    stride_qb,
    stride_qs,
    stride_qh,
    stride_kcb,
    stride_kch,
    stride_kcm,
    stride_vcb,
    stride_vch,
    stride_vcm,
    stride_ob,
    stride_os,
    stride_oh,
    num_new,
    group_size,  # H / H_kv
    SCALE: tl.constexpr,  # D**-0.5 * log2(e)
    HEAD_DIM: tl.constexpr,
    WIDTH0: tl.constexpr,
    WIDTH1: tl.constexpr,
    ALIGN: tl.constexpr,
    TMA: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    """Attend from BLOCK_M new positions of one head. Grid: (H, B, blocks of S).

    Programs run in the order of their ids: heads of one group first, which share keys in L2, and the last query
    blocks, which see most keys, before the others, so that the short ones fill the end.
    """
    i_h = tl.program_id(0).to(tl.int64)
    i_b = tl.program_id(1).to(tl.int64)
    start_m = (tl.num_programs(2) - 1 - tl.program_id(2)) * BLOCK_M
    past = tl.load(p_past)
    i_kv = i_h // group_size
    p_k = p_k_cache + tl.multiple_of(i_b * stride_kcb + i_kv * stride_kch, ALIGN)
    p_v = p_v_cache + tl.multiple_of(i_b * stride_vcb + i_kv * stride_vch, ALIGN)

    rows = tl.arange(0, BLOCK_M)
    m_m = start_m + rows < num_new
    p_q += tl.multiple_of(i_b * stride_qb + i_h * stride_qh + start_m.to(tl.int64) * stride_qs, ALIGN)
    o_q = tl.multiple_of(rows * stride_qs, ALIGN)
    o_table = (past + start_m + rows).to(tl.int64) * (HEAD_DIM // 2)
    q0, q1 = tl_ops.load_rotated(p_q, p_cos, p_sin, o_q, o_table, m_m, HEAD_DIM, WIDTH0, WIDTH1)  # [M, D0], [M, D1]
    highest, total, acc0, acc1 = tl_ops.no_rows(BLOCK_M, WIDTH0, WIDTH1)

    n = tl.arange(0, BLOCK_N)
    o_k, o_v = tl.multiple_of(n * stride_kcm, ALIGN), tl.multiple_of(n * stride_vcm, ALIGN)
    row = ((i_b * stride_kcb + i_kv * stride_kch) // HEAD_DIM).to(tl.int32)
    # Keys that every query of the block sees, in whole blocks: no mask. They are all in use, whatever M is.
    stop_whole = (past + start_m + 1) // BLOCK_N * BLOCK_N
    for start_n in tl.range(0, stop_whole, BLOCK_N):
        if TMA:
            k0, k1 = tl_ops.load_block(d_k0, d_k1, row + start_n, WIDTH0, WIDTH1)  # [N, D0], [N, D1]
            v0, v1 = tl_ops.load_block(d_v0, d_v1, row + start_n, WIDTH0, WIDTH1)  # [N, D0], [N, D1]
        else:
            k0, k1 = tl_ops.load(
                p_k + tl.cast(start_n, tl.int64) * stride_kcm, o_k, n, HEAD_DIM, WIDTH0, WIDTH1, False
            )  # [N, D0], [N, D1]
            v0, v1 = tl_ops.load(
                p_v + tl.cast(start_n, tl.int64) * stride_vcm, o_v, n, HEAD_DIM, WIDTH0, WIDTH1, False
            )  # [N, D0], [N, D1]
        highest, total, acc0, acc1 = tl_ops.attend(
            q0, q1, k0, k1, v0, v1, True, highest, total, acc0, acc1, SCALE, False, WIDTH1
        )
    # The diagonal. Slots past the new ones may hold anything, NaN too: never loaded.
    stop = past + tl.minimum(start_m + BLOCK_M, num_new)
    for start_n in tl.range(stop_whole, stop, BLOCK_N):
        m_n = start_n + n < stop
        k0, k1 = tl_ops.load(
            p_k + tl.cast(start_n, tl.int64) * stride_kcm, o_k, m_n, HEAD_DIM, WIDTH0, WIDTH1, True
        )  # [N, D0], [N, D1]
        v0, v1 = tl_ops.load(
            p_v + tl.cast(start_n, tl.int64) * stride_vcm, o_v, m_n, HEAD_DIM, WIDTH0, WIDTH1, True
        )  # [N, D0], [N, D1]
        visible = (start_n + n)[None, :] <= (past + start_m + rows)[:, None]  # [M, N]
        highest, total, acc0, acc1 = tl_ops.attend(
            q0, q1, k0, k1, v0, v1, visible, highest, total, acc0, acc1, SCALE, True, WIDTH1
        )

    p_out += tl.multiple_of(i_b * stride_ob + i_h * stride_oh + start_m.to(tl.int64) * stride_os, ALIGN)
    inverse = (1.0 / total)[:, None]  # every query sees its own key
    o_out = tl.multiple_of(rows * stride_os, ALIGN)
    tl_ops.store(p_out, o_out, m_m, acc0 * inverse, acc1 * inverse, HEAD_DIM, WIDTH0, WIDTH1)


def video_attention(
    q: Tensor, k: Tensor, v: Tensor, cos: Tensor, sin: Tensor, k_cache: Tensor, v_cache: Tensor, past_length: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """See `reference.video_attention`. Copies both caches: a loop should call `video_attention_`."""
    k_cache, v_cache = k_cache.clone(), v_cache.clone()
    return video_attention_(q, k, v, cos, sin, k_cache, v_cache, past_length), k_cache, v_cache


def video_attention_(
    q: Tensor, k: Tensor, v: Tensor, cos: Tensor, sin: Tensor, k_cache: Tensor, v_cache: Tensor, past_length: Tensor
) -> Tensor:
    """See `reference.video_attention_`.

    Raises:
        ValueError: dtypes, shapes or strides that the kernels do not take.
    """
    check(q, k, v, cos, sin, k_cache, v_cache, past_length)
    cos, sin = cos.contiguous(), sin.contiguous()
    attend = decode_attention.decode_attention if q.shape[1] <= DECODE_ROWS else prefill_attention
    with torch.cuda.device_of(q):  # Triton launches on the current device
        return attend(q, k, v, cos, sin, k_cache, v_cache, past_length)


def check(
    q: Tensor, k: Tensor, v: Tensor, cos: Tensor, sin: Tensor, k_cache: Tensor, v_cache: Tensor, past_length: Tensor
) -> None:
    """Raise ValueError for tensors that the kernels do not take, saying what they are and what they should be."""
    reason = supported("video_attention", q.dtype, tuple(q.shape))
    if reason:
        raise ValueError(reason)
    batch, num_new, num_heads, head_dim = q.shape
    num_kv_heads, capacity = k_cache.shape[1:3]
    expected = {
        "k": (k, (batch, num_new, num_kv_heads, head_dim)),
        "v": (v, (batch, num_new, num_kv_heads, head_dim)),
        "k_cache": (k_cache, (batch, num_kv_heads, capacity, head_dim)),
        "v_cache": (v_cache, (batch, num_kv_heads, capacity, head_dim)),
        "cos": (cos, (capacity, head_dim // 2)),
        "sin": (sin, (capacity, head_dim // 2)),
    }
    for name, (x, shape) in expected.items():
        if x.shape != shape:
            raise ValueError(f"{name} is {list(x.shape)}; it must be {list(shape)}, q being {list(q.shape)}")
        if x.dtype != q.dtype and name not in ("cos", "sin"):
            raise ValueError(f"{name} is {x.dtype}; it must be {q.dtype} as q is")
    if num_heads % num_kv_heads:
        raise ValueError(f"q has {num_heads} heads, k {num_kv_heads}; the former must be a multiple of the latter")
    if num_new > capacity:
        raise ValueError(f"{num_new} new positions do not fit a cache of {capacity} slots; allocate a larger one")
    if past_length.numel() != 1 or past_length.dtype != torch.int32 or past_length.device != q.device:
        raise ValueError(f"past_length is {past_length.dtype} on {past_length.device}; pass an int32 scalar beside q")
    for name, x in {"q": q, "k": k, "v": v, "k_cache": k_cache, "v_cache": v_cache}.items():
        if x.stride(-1) != 1:
            raise ValueError(f"{name} has strides {x.stride()}; its last axis must be contiguous")


def prefill_attention(
    q: Tensor, k: Tensor, v: Tensor, cos: Tensor, sin: Tensor, k_cache: Tensor, v_cache: Tensor, past_length: Tensor
) -> Tensor:
    """`video_attention_` by two launches, for any number of new positions. The arguments are not checked."""
    batch, num_new, num_heads, head_dim = q.shape
    num_kv_heads = k.shape[2]
    arch = configs.architecture(q.device)
    append = configs.lookup("append", arch, q.dtype, head_dim, num_new)
    prefill = configs.lookup("video_attention", arch, q.dtype, head_dim, num_new)
    out = torch.empty(q.shape, dtype=q.dtype, device=q.device)
    head = {**tl_ops.head_constexprs(head_dim), "ALIGN": tl_ops.alignment(q, k, v, k_cache, v_cache)}
    append_kernel[(triton.cdiv(num_new, append["BLOCK_S"]), batch * num_kv_heads)](
        *(k, v, cos, sin, k_cache, v_cache, past_length),
        *(*k.stride()[:3], *v.stride()[:3], *k_cache.stride()[:3], *v_cache.stride()[:3]),
        *(num_new, num_kv_heads),
        **head,
        BLOCK_S=append["BLOCK_S"],
        **configs.options(append),
    )
    tma = bool(prefill["TMA"]) and head["ALIGN"] > 1 and k_cache.is_contiguous() and v_cache.is_contiguous()
    blocks = [tl_ops.blocks(cache, prefill["BLOCK_N"], tma) for cache in (k_cache, v_cache)]
    prefill_kernel[(num_heads, batch, triton.cdiv(num_new, prefill["BLOCK_M"]))](
        *(q, cos, sin, k_cache, v_cache, past_length, out, *blocks[0], *blocks[1]),
        *(*q.stride()[:3], *k_cache.stride()[:3], *v_cache.stride()[:3], *out.stride()[:3]),
        *(num_new, num_heads // num_kv_heads),
        SCALE=tl_ops.softmax_scale(head_dim),
        **head,
        TMA=tma,
        BLOCK_M=prefill["BLOCK_M"],
        BLOCK_N=prefill["BLOCK_N"],
        **configs.options(prefill),
    )
    return out


def compilations(arch: int) -> Iterator[configs.Compilation]:
    """Yield the kernels of this file for every config that an architecture ships."""
    for dtype, head_dim, config in configs.cases("append", arch, tl_ops.HEAD_DIMS):
        constexprs: dict[str, Any] = {**tl_ops.head_constexprs(head_dim), "ALIGN": 8, "BLOCK_S": config["BLOCK_S"]}
        pointers = {"p_past": torch.int32}
        yield configs.compilation(append_kernel, arch, dtype, constexprs, configs.options(config), pointers)
    for dtype, head_dim, config in configs.cases("video_attention", arch, tl_ops.HEAD_DIMS):
        blocks = {name: config[name] for name in ("TMA", "BLOCK_M", "BLOCK_N")}
        scale, head = tl_ops.softmax_scale(head_dim), tl_ops.head_constexprs(head_dim)
        constexprs = {"SCALE": scale, **head, "ALIGN": 8, **blocks}
        constexprs |= {f"d_{x}{i}": None for x in "kv" for i in (0, 1) if not (config["TMA"] and head[f"WIDTH{i}"])}
        descriptors = {f"d_{x}{i}": (config["BLOCK_N"], head[f"WIDTH{i}"]) for x in "kv" for i in (0, 1)}
        yield configs.compilation(
            prefill_kernel, arch, dtype, constexprs, configs.options(config), pointers, descriptors=descriptors
        )
