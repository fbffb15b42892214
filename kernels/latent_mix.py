"""The kernels of the latent injection module behind the first: attention to the video, the sum, the second norm.

1. `score_kernel`, only where it pays: the products of the attention, which else every program of 2 computes for itself.
2. `mix_kernel`: each program makes BLOCK_N columns, all of one head, of the sum inside the second norm, and their part
   of its sum of squares. The last program of a row block to finish (an atomic counter) normalises the rows.

Launched by `latent_injection.py`, which has the formula. Source of the running softmax: FlashAttention
(arXiv 2205.14135).
"""

import triton
import triton.language as tl

from vlrt.kernels.latent_expand import add_product, normalised


@triton.jit
def score(
    p_q,
    p_k,
    stride_q,
    stride_kt,
    m_l,
    o_t,
    m_t,
    D,
    BLOCK_L: tl.constexpr,
    BLOCK_K: tl.constexpr,
    BLOCK_T: tl.constexpr,
):
    """Return the products of rows p_q [L, D] and rows o_t of p_k [T, D]: [BLOCK_L, BLOCK_T] in fp32."""
    b_scores = tl.zeros([BLOCK_L, BLOCK_T], tl.float32)
    for o in range(0, D, BLOCK_K):
        o_k = o + tl.arange(0, BLOCK_K)
        m_k = o_k < D
        p_q_block = p_q + tl.arange(0, BLOCK_L)[:, None] * stride_q + o_k[None, :]
        b_q = tl.load(p_q_block, mask=m_l[:, None] & m_k[None, :], other=0.0)  # [L, K]
        p_k_block = p_k + o_t.to(tl.int64)[:, None] * stride_kt + o_k[None, :]
        b_k = tl.load(p_k_block, mask=m_t[:, None] & m_k[None, :], other=0.0)  # [T, K]
        b_scores = add_product(b_q, b_k, b_scores)
    return b_scores


@triton.jit
def score_kernel(
    p_q,
    p_k,
    p_scores,
    stride_kb,
    stride_kt,
    L,
    T,
    C,
    D,
    BLOCK_L: tl.constexpr,
    BLOCK_K: tl.constexpr,
    BLOCK_T: tl.constexpr,
):
    """Write one block of q k^T of one head to p_scores [R, C / D heads, T] in fp32."""
    num_l = tl.cdiv(L, BLOCK_L)
    num_t = tl.cdiv(T, BLOCK_T)
    i_b = (tl.program_id(0) // num_l).to(tl.int64)
    i_l = tl.program_id(0) % num_l
    i_head = tl.program_id(1) // num_t
    m_l = i_l * BLOCK_L + tl.arange(0, BLOCK_L) < L
    i_row = i_b * L + i_l * BLOCK_L
    o_t = tl.program_id(1) % num_t * BLOCK_T + tl.arange(0, BLOCK_T)
    m_t = o_t < T
    p_head_q = p_q + i_row * C + i_head * D
    p_head_k = p_k + i_b * stride_kb + i_head * D
    b_scores = score(p_head_q, p_head_k, C, stride_kt, m_l, o_t, m_t, D, BLOCK_L, BLOCK_K, BLOCK_T)
    o_row = (i_row + tl.arange(0, BLOCK_L)) * (C // D) + i_head
    tl.store(p_scores + o_row[:, None] * T + o_t[None, :], b_scores, mask=m_l[:, None] & m_t[None, :])


@triton.jit
def look_up(
    p_q,
    p_k,
    p_v,
    p_scores,
    o_scores,
    stride_q,
    stride_kt,
    stride_vt,
    stride_s,
    m_l,
    o_d,
    T,
    D,
    SCALE: tl.constexpr,
    BLOCK_L: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    BLOCK_T: tl.constexpr,
):
    """Return columns o_d of one head's attention of rows p_q to p_k, p_v [T, D]: [BLOCK_L, BLOCK_N] in fp32.

    p_scores + o_scores holds q k^T; p_scores None: it is computed here. SCALE is log2(e) / sqrt(D): exponents of two.
    """
    b_max = tl.full([BLOCK_L], -1.0e30, tl.float32)
    b_sum = tl.zeros([BLOCK_L], tl.float32)
    b_acc = tl.zeros([BLOCK_L, BLOCK_N], tl.float32)
    for o in range(0, T, BLOCK_T):
        o_t = o + tl.arange(0, BLOCK_T)
        m_t = o_t < T
        if p_scores is not None:
            p_block = p_scores + o_scores + tl.arange(0, BLOCK_L)[:, None] * stride_s + o_t[None, :]
            b_scores = tl.load(p_block, mask=m_l[:, None] & m_t[None, :], other=0.0)  # [L, T]
        else:
            b_scores = score(p_q, p_k, stride_q, stride_kt, m_l, o_t, m_t, D, BLOCK_L, BLOCK_K, BLOCK_T)
        b_scores = tl.where(m_t[None, :], b_scores * SCALE, -1.0e30)
        b_new_max = tl.maximum(b_max, tl.max(b_scores, axis=1))
        b_shrink = tl.exp2(b_max - b_new_max)
        b_p = tl.where(m_t[None, :], tl.exp2(b_scores - b_new_max[:, None]), 0.0)
        b_sum = b_sum * b_shrink + tl.sum(b_p, axis=1)
        b_max = b_new_max
        p_v_block = p_v + o_t.to(tl.int64)[:, None] * stride_vt + o_d[None, :]
        b_v = tl.load(p_v_block, mask=m_t[:, None] & (o_d < D)[None, :], other=0.0)  # [T, N]
        b_acc = add_product(b_p.to(b_v.dtype), tl.trans(b_v), b_acc * b_shrink[:, None])
    return b_acc / b_sum[:, None]


@triton.jit
def mix_kernel(
    p_h,
    p_norm_in,
    p_fc2,
    p_k,
    p_v,
    p_alpha,
    p_norm_out,
    p_rho,
    p_inner,
    p_q,
    p_scores,
    p_rstd,
    p_mixed,
    p_squares,
    p_counters,
    p_z,
    p_start,
    stride_hb,
    stride_hl,
    stride_kb,
    stride_kt,
    stride_vb,
    stride_vt,
    stride_zb,
    stride_zs,
    L,
    S,
    T,
    C,
    inner,
    D,
    EPS: tl.constexpr,
    SCALE: tl.constexpr,
    BLOCK_L: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    BLOCK_T: tl.constexpr,
):
    """Write z to rows start .. start + L of p_z [B, S, C]; rows beyond S are dropped. p_start None: start is 0.

    p_k None: no attention; p_scores: of `score_kernel`, or None.
    Scratch: p_mixed [R, C] and p_squares [R, column blocks] in fp32, p_counters [R].
    """
    i_n = tl.program_id(1)
    num_l = tl.cdiv(L, BLOCK_L)
    i_b = (tl.program_id(0) // num_l).to(tl.int64)
    i_l = tl.program_id(0) % num_l
    o_l = i_l * BLOCK_L + tl.arange(0, BLOCK_L)
    m_l = o_l < L
    i_row = i_b * L + i_l * BLOCK_L  # the block's first row in the scratch
    o_row = i_row + tl.arange(0, BLOCK_L)
    num_parts = tl.cdiv(D, BLOCK_N)  # of a head
    i_head = i_n // num_parts
    o_d = i_n % num_parts * BLOCK_N + tl.arange(0, BLOCK_N)
    m_n = o_d < D
    o_n = i_head * D + o_d
    m_ln = m_l[:, None] & m_n[None, :]

    b_acc = tl.zeros([BLOCK_L, BLOCK_N], tl.float32)
    for o in range(0, inner, BLOCK_K):
        o_i = o + tl.arange(0, BLOCK_K)
        m_i = o_i < inner
        b_x = tl.load(
            p_inner + o_row[:, None] * inner + o_i[None, :], mask=m_l[:, None] & m_i[None, :], other=0.0
        )  # [L,K]
        p_w = p_fc2 + o_n.to(tl.int64)[:, None] * inner + o_i[None, :]
        b_w = tl.load(p_w, mask=m_n[:, None] & m_i[None, :], other=0.0)  # [N, K]
        b_acc = add_product(b_x, b_w, b_acc)
    if p_k is not None:
        p_head_q = p_q + i_row * C + i_head * D
        p_head_k = p_k + i_b * stride_kb + i_head * D
        p_head_v = p_v + i_b * stride_vb + i_head * D
        b_found = look_up(
            p_head_q,
            p_head_k,
            p_head_v,
            p_scores,
            (i_row * (C // D) + i_head) * T,
            C,
            stride_kt,
            stride_vt,
            C // D * T,
            m_l,
            o_d,
            T,
            D,
            SCALE,
            BLOCK_L,
            BLOCK_N,
            BLOCK_K,
            BLOCK_T,
        )
        alpha = tl.load(p_alpha).to(tl.float32)
        shrink = tl.exp2(-2.8853900817779268 * tl.abs(alpha))  # exp(-2 |alpha|)
        gate = (1.0 - shrink) / (1.0 + shrink)  # tanh |alpha|
        b_acc += tl.where(alpha < 0, -gate, gate) * b_found
    b_rstd = tl.load(p_rstd + o_row, mask=m_l, other=0.0)  # [L]
    p_rows = p_h + i_b * stride_hb + o_l.to(tl.int64) * stride_hl
    b_h = tl.load(p_rows[:, None] + o_n[None, :], mask=m_ln, other=0.0)  # [L, N]
    b_acc += normalised(b_h, b_rstd, tl.load(p_norm_in + o_n, mask=m_n, other=0.0)).to(tl.float32)
    tl.store(p_mixed + o_row[:, None] * C + o_n[None, :], b_acc, mask=m_ln)
    b_squares = tl.sum(tl.where(m_ln, b_acc * b_acc, 0.0), axis=1)
    num_n = tl.num_programs(1)
    tl.store(p_squares + o_row * num_n + i_n, b_squares, mask=m_l)

    tl.debug_barrier()  # all threads' stores come before the release below
    if tl.atomic_add(p_counters + i_row, 1, sem="acq_rel") == num_n - 1:
        b_total = tl.zeros([BLOCK_L, BLOCK_K], tl.float32)
        for o in range(0, num_n, BLOCK_K):
            o_part = o + tl.arange(0, BLOCK_K)
            p_parts = p_squares + o_row[:, None] * num_n + o_part[None, :]
            m_parts = m_l[:, None] & (o_part < num_n)[None, :]
            b_total += tl.load(p_parts, mask=m_parts, other=0.0, cache_modifier=".cg")  # [L, K], past a stale L1
        rho = tl.load(p_rho).to(tl.float32)
        b_scale = rho * tl.rsqrt(tl.sum(b_total, axis=1) / C + EPS)  # [L]
        start = 0
        if p_start is not None:
            start = tl.load(p_start)
        o_s = o_l + start
        m_s = m_l & (o_s >= 0) & (o_s < S)
        p_out = p_z + i_b * stride_zb + o_s.to(tl.int64) * stride_zs
        for o in range(0, C, BLOCK_K):
            o_c = o + tl.arange(0, BLOCK_K)
            m_c = o_c < C
            p_part = p_mixed + o_row[:, None] * C + o_c[None, :]
            b_mixed = tl.load(p_part, mask=m_s[:, None] & m_c[None, :], other=0.0, cache_modifier=".cg")  # [L, K]
            b_norm = tl.load(p_norm_out + o_c, mask=m_c, other=0.0).to(tl.float32)  # [K]
            b_z = (b_mixed * b_scale[:, None] * b_norm[None, :]).to(p_z.dtype.element_ty)
            tl.store(p_out[:, None] + o_c[None, :], b_z, mask=m_s[:, None] & m_c[None, :])
