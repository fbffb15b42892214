"""Rotary, then attention within segments (windows, temporal patches): `reference.segment_attention`.

    out_n = softmax(rotate(q_n) rotate(k_segment(n))^T / sqrt D) v_segment(n)

q, k, v, out [N, H, D]; cos, sin [N, D/2]; cu_seqlens [num_segments + 1] int32; bfloat16, float16 or float32; D of
tl_ops.HEAD_DIMS. q, k and v may be thirds of one projection: strides may be anything but for the last axis, which must
be contiguous. No causal mask.

The host never reads `cu_seqlens`. A program owns BLOCK_M tokens, wherever segments begin and end, so the grid follows
from N alone and no program is empty; it finds the segments that meet its tokens by counting bounds, and attends to
each in turn with a state of its own: nothing of one segment, NaN neither, reaches another. Tokens of a tile outside
the segment at hand are wasted work: tiles that segment bounds divide evenly waste none.

Keys are rotated while they are loaded, once per query tile. Where segments are long, rotating them once, in a launch
before, is cheaper: the config's ROTATE_KEYS_FIRST, by the mean length of the segments.

Sources: FlashAttention (arXiv 2205.14135, 2307.08691), RoFormer (arXiv 2104.09864), Qwen2.5-VL (arXiv 2502.13923).
"""

from collections.abc import Iterator
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from vlrt.kernels import configs, tl_ops

BLOCK_BOUNDS = 1024  # segment bounds that a program reads at a time


def supported(op: str, dtype: torch.dtype, shape: tuple[int, ...]) -> str | None:
    """Say why the kernel does not take q of this dtype and shape [N, H, D], or None."""
    if len(shape) != 3:
        return f"{op} takes q [N, H, D], not {list(shape)}"
    return tl_ops.unsupported(op, dtype, shape[-1])


@triton.jit
def count_bounds_up_to(p_bounds, num_segments, token, BLOCK: tl.constexpr):
    """Return how many of the segments' ends are at or before `token`: the index of the segment that holds it."""
    count = 0
    for start in range(0, num_segments, BLOCK):
        i = start + tl.arange(0, BLOCK)
        ends = tl.load(p_bounds + 1 + i, mask=i < num_segments, other=2147483647)  # [BLOCK]
        count += tl.sum((ends <= token).to(tl.int32))
    return count


@triton.jit
def attend_to_tokens(
    p_k,
    p_v,
    p_cos,
    p_sin,
    stride_kn,
    stride_vn,
    q0,
    q1,
    start_n,
    stop,
    state,
    SCALE: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    WIDTH0: tl.constexpr,
    WIDTH1: tl.constexpr,
    ALIGN: tl.constexpr,
    ROTATE_KEYS: tl.constexpr,
    BLOCK_N: tl.constexpr,
    MASKED: tl.constexpr,
):
    """Take tokens start_n .. start_n + BLOCK_N into the online softmax; those from `stop` on not, if MASKED."""
    n = tl.arange(0, BLOCK_N)
    m_n = start_n + n < stop
    o_k, o_v = tl.multiple_of(n * stride_kn, ALIGN), tl.multiple_of(n * stride_vn, ALIGN)
    p_k += tl.multiple_of(tl.cast(start_n, tl.int64) * stride_kn, ALIGN)
    p_v += tl.multiple_of(tl.cast(start_n, tl.int64) * stride_vn, ALIGN)
    if ROTATE_KEYS:
        o_table = (start_n + n) * (HEAD_DIM // 2)
        k0, k1 = tl_ops.load_rotated(p_k, p_cos, p_sin, o_k, o_table, m_n, HEAD_DIM, WIDTH0, WIDTH1)  # [N, D0], [N, D1]
    else:
        k0, k1 = tl_ops.load(p_k, o_k, m_n, HEAD_DIM, WIDTH0, WIDTH1, MASKED)  # [N, D0], [N, D1]
    v0, v1 = tl_ops.load(p_v, o_v, m_n, HEAD_DIM, WIDTH0, WIDTH1, MASKED)  # [N, D0], [N, D1]
    highest, total, acc0, acc1 = state
    return tl_ops.attend(q0, q1, k0, k1, v0, v1, m_n[None, :], highest, total, acc0, acc1, SCALE, MASKED, WIDTH1)


@triton.jit(do_not_specialize=["num_tokens", "num_segments"])
def segment_attention_kernel(
    p_q,  # [N, H, D]
    p_k,  # [N, H, D], rotated already unless ROTATE_KEYS
    p_v,  # [N, H, D]
    p_cos,  # [N, D/2]
    p_sin,
    p_bounds,  # [num_segments + 1] int32
    p_out,  # [N, H, D]
    stride_qn,
    stride_qh,
    stride_kn,
    stride_kh,
    stride_vn,
    stride_vh,
    stride_on,
    stride_oh,
    num_tokens,
    num_segments,
    SCALE: tl.constexpr,  # D**-0.5 * log2(e)
    HEAD_DIM: tl.constexpr,
    WIDTH0: tl.constexpr,
    WIDTH1: tl.constexpr,
    ALIGN: tl.constexpr,
    ROTATE_KEYS: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_BOUNDS: tl.constexpr,
):
    """Attend from BLOCK_M tokens of one head. Grid: (blocks of N, H)."""
    start_m = tl.program_id(0) * BLOCK_M
    i_h = tl.program_id(1).to(tl.int64)
    p_q += tl.multiple_of(i_h * stride_qh, ALIGN)
    p_k += tl.multiple_of(i_h * stride_kh, ALIGN)
    p_v += tl.multiple_of(i_h * stride_vh, ALIGN)
    p_out += tl.multiple_of(i_h * stride_oh, ALIGN)
    stop_m = tl.minimum(start_m + BLOCK_M, num_tokens)
    first = count_bounds_up_to(p_bounds, num_segments, start_m, BLOCK_BOUNDS)
    last = count_bounds_up_to(p_bounds, num_segments, stop_m - 1, BLOCK_BOUNDS)

    m = start_m + tl.arange(0, BLOCK_M)
    o_q = tl.multiple_of(m.to(tl.int64) * stride_qn, ALIGN)
    o_out = tl.multiple_of(m.to(tl.int64) * stride_on, ALIGN)
    o_table = m * (HEAD_DIM // 2)
    q0, q1 = tl_ops.load_rotated(
        p_q, p_cos, p_sin, o_q, o_table, m < num_tokens, HEAD_DIM, WIDTH0, WIDTH1
    )  # [M, D0], [M, D1]
    for i_segment in range(first, last + 1):
        start = tl.load(p_bounds + i_segment)
        stop = tl.load(p_bounds + i_segment + 1)
        stop_whole = start + (stop - start) // BLOCK_N * BLOCK_N
        state = tl_ops.no_rows(BLOCK_M, WIDTH0, WIDTH1)
        for start_n in tl.range(start, stop_whole, BLOCK_N):
            state = attend_to_tokens(
                p_k, p_v, p_cos, p_sin, stride_kn, stride_vn, q0, q1, start_n, stop, state,
                SCALE, HEAD_DIM, WIDTH0, WIDTH1, ALIGN, ROTATE_KEYS, BLOCK_N, False,
            )  # fmt: skip
        if stop_whole < stop:
            state = attend_to_tokens(
                p_k, p_v, p_cos, p_sin, stride_kn, stride_vn, q0, q1, stop_whole, stop, state,
                SCALE, HEAD_DIM, WIDTH0, WIDTH1, ALIGN, ROTATE_KEYS, BLOCK_N, True,
            )  # fmt: skip
        _, total, acc0, acc1 = state
        mine = (m >= start) & (m < stop)
        inverse = (1.0 / total)[:, None]
        tl_ops.store(p_out, o_out, mine, acc0 * inverse, acc1 * inverse, HEAD_DIM, WIDTH0, WIDTH1)


@triton.jit(do_not_specialize=["num_tokens"])
def rotate_kernel(
    p_x,  # [N, H, D]
    p_cos,  # [N, D/2]
    p_sin,
    p_out,  # [H, N, D]
    stride_xn,
    stride_xh,
    num_tokens,
    HEAD_DIM: tl.constexpr,
    WIDTH0: tl.constexpr,
    WIDTH1: tl.constexpr,
    ALIGN: tl.constexpr,
    BLOCK_M: tl.constexpr,
):
    """Rotate x, heads first. Grid: (blocks of N, H)."""
    i_h = tl.program_id(1).to(tl.int64)
    m = (tl.program_id(0) * BLOCK_M + tl.arange(0, BLOCK_M)).to(tl.int64)
    p_x += tl.multiple_of(i_h * stride_xh, ALIGN)
    x0, x1 = tl_ops.load_rotated(
        p_x,
        p_cos,
        p_sin,
        tl.multiple_of(m * stride_xn, ALIGN),
        m * (HEAD_DIM // 2),
        m < num_tokens,
        HEAD_DIM,
        WIDTH0,
        WIDTH1,
    )  # [M, D0], [M, D1]
    o_out = (i_h * num_tokens + m) * HEAD_DIM
    tl_ops.store(p_out, o_out, m < num_tokens, x0, x1, HEAD_DIM, WIDTH0, WIDTH1)


def segment_attention(q: Tensor, k: Tensor, v: Tensor, cos: Tensor, sin: Tensor, cu_seqlens: Tensor) -> Tensor:
    """See `reference.segment_attention`.

    Raises:
        ValueError: dtypes, shapes or strides that the kernels do not take.
    """
    check(q, k, v, cos, sin, cu_seqlens)
    if not len(q):
        return torch.empty(q.shape, dtype=q.dtype, device=q.device)
    with torch.cuda.device_of(q):  # Triton launches on the current device
        return launch(q, k, v, cos.contiguous(), sin.contiguous(), cu_seqlens.contiguous())


def launch(q: Tensor, k: Tensor, v: Tensor, cos: Tensor, sin: Tensor, cu_seqlens: Tensor) -> Tensor:
    """`segment_attention` of at least one token. The arguments are not checked."""
    num_tokens, num_heads, head_dim = q.shape
    num_segments = len(cu_seqlens) - 1
    out = torch.empty(q.shape, dtype=q.dtype, device=q.device)
    mean_length = triton.cdiv(num_tokens, max(num_segments, 1))
    config = configs.lookup("segment_attention", configs.architecture(q.device), q.dtype, head_dim, mean_length)
    head = {**tl_ops.head_constexprs(head_dim), "ALIGN": tl_ops.alignment(q, k, v)}
    grid = (triton.cdiv(num_tokens, config["BLOCK_M"]), num_heads)
    if config["ROTATE_KEYS_FIRST"]:
        rotated = torch.empty((num_heads, num_tokens, head_dim), dtype=k.dtype, device=k.device)
        rotate_kernel[grid](
            *(k, cos, sin, rotated, *k.stride()[:2], num_tokens), **head, BLOCK_M=config["BLOCK_M"], **configs.FP_FUSION
        )
        k = rotated.transpose(0, 1)
    segment_attention_kernel[grid](
        *(q, k, v, cos, sin, cu_seqlens, out),
        *(*q.stride()[:2], *k.stride()[:2], *v.stride()[:2], *out.stride()[:2]),
        *(num_tokens, num_segments),
        SCALE=tl_ops.softmax_scale(head_dim),
        **head,
        ROTATE_KEYS=not config["ROTATE_KEYS_FIRST"],
        BLOCK_M=config["BLOCK_M"],
        BLOCK_N=config["BLOCK_N"],
        BLOCK_BOUNDS=BLOCK_BOUNDS,
        **configs.options(config),
    )
    return out


def check(q: Tensor, k: Tensor, v: Tensor, cos: Tensor, sin: Tensor, cu_seqlens: Tensor) -> None:
    """Raise ValueError for tensors that the kernels do not take, saying what they are and what they should be."""
    reason = supported("segment_attention", q.dtype, tuple(q.shape))
    if reason:
        raise ValueError(reason)
    half = (q.shape[0], q.shape[2] // 2)
    expected = {"k": (k, q.shape), "v": (v, q.shape), "cos": (cos, half), "sin": (sin, half)}
    for name, (x, shape) in expected.items():
        if x.shape != shape:
            raise ValueError(f"{name} is {list(x.shape)}; it must be {list(shape)}, q being {list(q.shape)}")
        if x.dtype != q.dtype and name in ("k", "v"):
            raise ValueError(f"{name} is {x.dtype}; it must be {q.dtype} as q is")
    if cu_seqlens.dtype != torch.int32 or cu_seqlens.ndim != 1 or not len(cu_seqlens):
        raise ValueError(f"cu_seqlens is {cu_seqlens.dtype} {list(cu_seqlens.shape)}; pass int32 [num_segments + 1]")
    for name, x in {"q": q, "k": k, "v": v}.items():
        if x.stride(-1) != 1:
            raise ValueError(f"{name} has strides {x.stride()}; its last axis must be contiguous")


def compilations(arch: int) -> Iterator[configs.Compilation]:
    """Yield the kernels of this file for every config that an architecture ships."""
    for dtype, head_dim, config in configs.cases("segment_attention", arch, tl_ops.HEAD_DIMS):
        head = {**tl_ops.head_constexprs(head_dim), "ALIGN": 8}
        constexprs: dict[str, Any] = {
            "SCALE": tl_ops.softmax_scale(head_dim),
            **head,
            "ROTATE_KEYS": not config["ROTATE_KEYS_FIRST"],
        }
        constexprs |= {"BLOCK_M": config["BLOCK_M"], "BLOCK_N": config["BLOCK_N"], "BLOCK_BOUNDS": BLOCK_BOUNDS}
        pointers = {"p_bounds": torch.int32}
        yield configs.compilation(segment_attention_kernel, arch, dtype, constexprs, configs.options(config), pointers)
        if config["ROTATE_KEYS_FIRST"]:
            constexprs = {**head, "BLOCK_M": config["BLOCK_M"]}
            yield configs.compilation(rotate_kernel, arch, dtype, constexprs, configs.FP_FUSION)
