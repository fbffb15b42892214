"""The first kernel of the latent injection module: [fc1; q_proj] of the normalised rows; and what its others share.

Each program normalises its rows of h and multiplies them by BLOCK_N rows of [fc1; q_proj]. A handful of rows meets
weights that are each read once, so the weights' bandwidth is the bound. One row is multiplied on the plain cores, more
on the tensor cores. Launched by `latent_injection.py`, which has the formula.
"""

import triton
import triton.language as tl

INTERPRETED = tl.constexpr(triton.knobs.runtime.interpret)  # the interpreter's own bf16 dot multiplies the bits


@triton.jit
def add_product(b_x, b_w, b_acc):
    """Return b_acc [M, N] + b_x [M, K] b_w [N, K]^T, in fp32."""
    if b_x.shape[0] == 1:
        b_acc += tl.sum(b_x.to(tl.float32) * b_w.to(tl.float32), axis=1)[None, :]
    elif INTERPRETED:
        b_acc = tl.dot(b_x.to(tl.float32), tl.trans(b_w.to(tl.float32)), b_acc, input_precision="ieee")
    else:
        b_acc = tl.dot(b_x, tl.trans(b_w), b_acc, input_precision="ieee")
    return b_acc


@triton.jit
def normalised(b_h, b_rstd, b_weight):
    """Return rows b_h [M, K] times b_rstd [M] and b_weight [K], rounded where `reference.rms_norm` rounds."""
    b_normed = (b_h.to(tl.float32) * b_rstd[:, None]).to(b_h.dtype)
    return (b_normed.to(tl.float32) * b_weight.to(tl.float32)[None, :]).to(b_h.dtype)


@triton.jit
def project(
    p_rows, m_r, b_rstd, p_norm, p_w, i_block, N, C, BLOCK_R: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr
):
    """Return the normalised rows times rows i_block * BLOCK_N and on of p_w [N, C]: [BLOCK_R, BLOCK_N] in fp32."""
    m_n = i_block * BLOCK_N + tl.arange(0, BLOCK_N) < N
    p_w += i_block.to(tl.int64) * BLOCK_N * C
    b_acc = tl.zeros([BLOCK_R, BLOCK_N], tl.float32)
    for o in range(0, C, BLOCK_K):
        o_c = o + tl.arange(0, BLOCK_K)
        m_c = o_c < C
        b_h = tl.load(p_rows[:, None] + o_c[None, :], mask=m_r[:, None] & m_c[None, :], other=0.0)  # [R, K]
        b_norm = tl.load(p_norm + o_c, mask=m_c, other=0.0)  # [K]
        m_w = m_n[:, None] & m_c[None, :]
        b_w = tl.load(p_w + tl.arange(0, BLOCK_N)[:, None] * C + o_c[None, :], mask=m_w, other=0.0)  # [N, K]
        b_acc = add_product(normalised(b_h, b_rstd, b_norm), b_w, b_acc)
    return b_acc


@triton.jit
def expand_kernel(
    p_h,
    p_norm,
    p_fc1,
    p_q_proj,
    p_inner,
    p_q,
    p_rstd,
    p_counters,
    stride_hb,
    stride_hl,
    R,
    L,
    C,
    inner,
    EPS: tl.constexpr,
    BLOCK_R: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    """Write silu(fc1 u) to p_inner [R, inner], q_proj u to p_q [R, C], 1 / rms(h) to p_rstd [R].

    Also zeros to p_counters [R], for `mix_kernel`. R = B * L rows; rows of all samples share a block,
    since they meet the same weights. p_q_proj may be None.
    """
    i_r = tl.program_id(0)
    i_n = tl.program_id(1)
    o_r = i_r * BLOCK_R + tl.arange(0, BLOCK_R)
    m_r = o_r < R
    p_rows = p_h + (o_r // L).to(tl.int64) * stride_hb + (o_r % L).to(tl.int64) * stride_hl
    b_squares = tl.zeros([BLOCK_R, BLOCK_K], tl.float32)
    for o in range(0, C, BLOCK_K):
        o_c = o + tl.arange(0, BLOCK_K)
        m_h = m_r[:, None] & (o_c < C)[None, :]
        b_h = tl.load(p_rows[:, None] + o_c[None, :], mask=m_h, other=0.0).to(tl.float32)  # [R, K]
        b_squares += b_h * b_h
    b_rstd = tl.rsqrt(tl.sum(b_squares, axis=1) / C + EPS)  # [R]
    if i_n == 0:
        tl.store(p_rstd + o_r, b_rstd, mask=m_r)
        tl.store(p_counters + o_r, tl.zeros([BLOCK_R], tl.int32), mask=m_r)
    num_blocks = tl.cdiv(inner, BLOCK_N)
    dtype = p_h.dtype.element_ty
    o_row = o_r.to(tl.int64)[:, None]
    if i_n < num_blocks:
        b_x = project(p_rows, m_r, b_rstd, p_norm, p_fc1, i_n, inner, C, BLOCK_R, BLOCK_N, BLOCK_K)
        b_x = b_x / (1.0 + tl.exp2(b_x * -1.4426950408889634))
        o_n = i_n * BLOCK_N + tl.arange(0, BLOCK_N)
        tl.store(p_inner + o_row * inner + o_n[None, :], b_x.to(dtype), mask=m_r[:, None] & (o_n < inner)[None, :])
    elif p_q_proj is not None:
        i_q = i_n - num_blocks
        b_x = project(p_rows, m_r, b_rstd, p_norm, p_q_proj, i_q, C, C, BLOCK_R, BLOCK_N, BLOCK_K)
        o_n = i_q * BLOCK_N + tl.arange(0, BLOCK_N)
        tl.store(p_q + o_row * C + o_n[None, :], b_x.to(dtype), mask=m_r[:, None] & (o_n < C)[None, :])
