"""What the Triton kernels share: split head dims, rotary on load, one step of the online softmax.

Head dims are split in a power of two and the rest (72 = 64 + 16 masked, 80 = 64 + 16, 96 = 64 + 32), since padding to
128 wastes up to 44 % of the work; 64 and 128 are one piece (WIDTH1 = 0). Blocks: R rows, M queries, N keys, D0 and D1
the pieces. Knows no op. Notation: README.md beside this file.
"""

import torch
import triton
import triton.language as tl
from triton.tools.tensor_descriptor import TensorDescriptor

from vlrt.kernels import launch

HEAD_DIMS = (64, 72, 80, 96, 128)
LOG2_E = 1.4426950408889634  # exp(x) = exp2(x log2(e)): exp2 is the GPU's own instruction
# A running maximum that stays finite: -inf - -inf would be NaN in rows that have seen no key.
NO_MAXIMUM = tl.constexpr(-1.0e30)
# Triton decides how to run a kernel when the kernel's module is imported; this must be the same decision.
INTERPRETED = tl.constexpr(bool(triton.knobs.runtime.interpret))


def head_constexprs(head_dim: int) -> dict[str, int]:
    """Return the constexprs HEAD_DIM, WIDTH0 and WIDTH1: powers of two, 16 or more, as tl.dot wants them, or 0."""
    if head_dim in (64, 128):
        return {"HEAD_DIM": head_dim, "WIDTH0": head_dim, "WIDTH1": 0}
    return {"HEAD_DIM": head_dim, "WIDTH0": 64, "WIDTH1": 16 if head_dim <= 80 else 32}


def softmax_scale(head_dim: int) -> float:
    """Return D**-0.5 * log2(e): what makes of a score the exponent of two of its weight."""
    return head_dim**-0.5 * LOG2_E


def unsupported(op: str, dtype: torch.dtype, head_dim: int) -> str | None:
    """Say why no attention kernel takes a dtype and head dim, or None."""
    if reason := launch.unsupported_dtype(op, dtype):
        return reason
    if head_dim not in HEAD_DIMS:
        return f"{op} has kernels for head dims {', '.join(map(str, HEAD_DIMS))}, not {head_dim}"
    return None


def alignment(*tensors: torch.Tensor) -> int:
    """Return 8 where every row of the tensors starts at a multiple of 8 elements and 16 bytes, else 1.

    Triton learns of arguments only whether 16 divides them, which a head dim of 72 hides.
    """
    strides = (stride for x in tensors for stride, size in zip(x.stride()[:-1], x.shape, strict=False) if size > 1)
    whole = all(stride % 8 == 0 for stride in strides) and all(x.data_ptr() % 16 == 0 for x in tensors)
    return 8 if whole else 1


def blocks(x: torch.Tensor, num_rows: int, tma: bool) -> tuple[TensorDescriptor | None, TensorDescriptor | None]:
    """Return how the copy engine reads contiguous x [..., D] in blocks of rows, in two pieces; None for no piece."""
    head = head_constexprs(x.shape[-1])
    first, second = (
        TensorDescriptor.from_tensor(x.view(-1, x.shape[-1]), [num_rows, head[width]]) if tma and head[width] else None
        for width in ("WIDTH0", "WIDTH1")
    )
    return first, second


@triton.jit
def dot(a, b, acc):
    """Return a @ b + acc in fp32; fp32 inputs as three products of tf32, which loses next to nothing against fp32."""
    if INTERPRETED:  # the interpreter multiplies bfloat16 as if its bits were integers
        out = tl.dot(a.to(tl.float32), b.to(tl.float32), acc, input_precision="tf32x3")
    else:
        out = tl.dot(a, b, acc, input_precision="tf32x3")
    return out


@triton.jit
def load_piece(
    p_x, o_rows, m_rows, START: tl.constexpr, WIDTH: tl.constexpr, HEAD_DIM: tl.constexpr, MASKED: tl.constexpr
):
    """Load columns START .. START + WIDTH of rows: one piece of `load`."""
    cols = START + tl.arange(0, WIDTH)
    p_piece = p_x + o_rows[:, None] + cols[None, :]
    if MASKED:
        if START + WIDTH > HEAD_DIM:
            x = tl.load(p_piece, mask=m_rows[:, None] & (cols < HEAD_DIM)[None, :], other=0.0)  # [R, WIDTH]
        else:
            x = tl.load(p_piece, mask=m_rows[:, None], other=0.0)  # [R, WIDTH]
    else:
        if START + WIDTH > HEAD_DIM:
            x = tl.load(p_piece, mask=(cols < HEAD_DIM)[None, :], other=0.0)  # [R, WIDTH]
        else:
            x = tl.load(p_piece)  # [R, WIDTH]
    return x


@triton.jit
def load(
    p_x,
    o_rows,
    m_rows,
    HEAD_DIM: tl.constexpr,
    WIDTH0: tl.constexpr,
    WIDTH1: tl.constexpr,
    MASKED: tl.constexpr,
):
    """Load rows in two pieces; what is masked, or beyond the head dim, is 0.

    Args:
        p_x: where column 0 of row 0 lies.
        o_rows: [R], offset of each row in elements.
        m_rows: [R], which rows to load; unused unless MASKED.
        HEAD_DIM: D.
        WIDTH0: D0.
        WIDTH1: D1, or 0.
        MASKED: whether to look at m_rows.

    Returns:
        [R, D0], and [R, D1], or the first once more where there is no second.
    """
    x0 = load_piece(p_x, o_rows, m_rows, 0, WIDTH0, HEAD_DIM, MASKED)
    x1 = x0
    if WIDTH1:
        x1 = load_piece(p_x, o_rows, m_rows, WIDTH0, WIDTH1, HEAD_DIM, MASKED)
    return x0, x1


@triton.jit
def load_block(d_x0, d_x1, row, WIDTH0: tl.constexpr, WIDTH1: tl.constexpr):
    """Load a block of rows in two pieces by the copy engine: see `load` and `blocks`."""
    x0 = d_x0.load([row, 0])
    x1 = x0
    if WIDTH1:
        x1 = d_x1.load([row, WIDTH0])
    return x0, x1


@triton.jit
def load_rotated_piece(
    p_x, p_cos, p_sin, o_rows, o_table, m_rows, START: tl.constexpr, WIDTH: tl.constexpr, HEAD_DIM: tl.constexpr
):
    """Load columns START .. START + WIDTH of rows and rotate them: one piece of `load_rotated`."""
    HALF: tl.constexpr = HEAD_DIM // 2
    cols = START + tl.arange(0, WIDTH)
    mask = m_rows[:, None] & (cols < HEAD_DIM)[None, :]
    partner = (cols + HALF) % HEAD_DIM
    angle = o_table[:, None] + (cols % HALF)[None, :]
    x = tl.load(p_x + o_rows[:, None] + cols[None, :], mask=mask, other=0.0).to(tl.float32)  # [R, WIDTH]
    other = tl.load(p_x + o_rows[:, None] + partner[None, :], mask=mask, other=0.0).to(tl.float32)  # [R, WIDTH]
    cos = tl.load(p_cos + angle, mask=mask, other=0.0).to(tl.float32)  # [R, WIDTH]
    sin = tl.load(p_sin + angle, mask=mask, other=0.0).to(tl.float32)  # [R, WIDTH]
    sin = tl.where((cols < HALF)[None, :], -sin, sin)
    return (x * cos + other * sin).to(p_x.dtype.element_ty)


@triton.jit
def load_rotated(
    p_x, p_cos, p_sin, o_rows, o_table, m_rows, HEAD_DIM: tl.constexpr, WIDTH0: tl.constexpr, WIDTH1: tl.constexpr
):
    """Load rows in two pieces, rotated: `reference.rotary`, for any split of the head dim.

    out_j = x_j cos[j mod D/2] + sign_j x_{(j + D/2) mod D} sin[j mod D/2], sign_j = -1 for j < D/2, else 1.

    Args:
        p_x: where column 0 of row 0 lies.
        p_cos: [., D/2], rows contiguous.
        p_sin: [., D/2].
        o_rows: [R], offset in elements of each row of x.
        o_table: [R], offset of its row in the tables.
        m_rows: [R], which rows to load; the others are 0.
        HEAD_DIM: D.
        WIDTH0: D0.
        WIDTH1: D1, or 0.

    Returns:
        [R, D0], and [R, D1], or the first once more where there is no second; of the dtype of x.
    """
    x0 = load_rotated_piece(p_x, p_cos, p_sin, o_rows, o_table, m_rows, 0, WIDTH0, HEAD_DIM)
    x1 = x0
    if WIDTH1:
        x1 = load_rotated_piece(p_x, p_cos, p_sin, o_rows, o_table, m_rows, WIDTH0, WIDTH1, HEAD_DIM)
    return x0, x1


@triton.jit
def store_piece(p_x, o_rows, m_rows, x, START: tl.constexpr, HEAD_DIM: tl.constexpr):
    """Store x [R, WIDTH] to columns START on: one piece of `store`."""
    cols = START + tl.arange(0, x.shape[1])
    mask = m_rows[:, None] & (cols < HEAD_DIM)[None, :]
    tl.store(p_x + o_rows[:, None] + cols[None, :], x.to(p_x.dtype.element_ty), mask=mask)


@triton.jit
def store(p_x, o_rows, m_rows, x0, x1, HEAD_DIM: tl.constexpr, WIDTH0: tl.constexpr, WIDTH1: tl.constexpr):
    """Store rows in two pieces, x0 [R, D0] and x1 [R, D1], where m_rows [R]; in the dtype of p_x."""
    store_piece(p_x, o_rows, m_rows, x0, 0, HEAD_DIM)
    if WIDTH1:
        store_piece(p_x, o_rows, m_rows, x1, WIDTH0, HEAD_DIM)


@triton.jit
def no_rows(ROWS: tl.constexpr, WIDTH0: tl.constexpr, WIDTH1: tl.constexpr):
    """Return the state of an online softmax before its first key: maximum, sum, and the two pieces of the output."""
    highest = tl.full([ROWS], NO_MAXIMUM, tl.float32)
    total = tl.zeros([ROWS], tl.float32)
    acc0 = tl.zeros([ROWS, WIDTH0], tl.float32)
    acc1 = tl.zeros([ROWS, WIDTH1 if WIDTH1 else 1], tl.float32)
    return highest, total, acc0, acc1


@triton.jit
def attend(
    q0,
    q1,
    k0,
    k1,
    v0,
    v1,
    visible,
    highest,
    total,
    acc0,
    acc1,
    SCALE: tl.constexpr,
    MASKED: tl.constexpr,
    WIDTH1: tl.constexpr,
):
    """Take one block of keys into the online softmax (arXiv 2205.14135, 2307.08691).

    Args:
        q0: [M, D0], rotated.
        q1: [M, D1]; unused, like all second pieces, where WIDTH1 is 0.
        k0: [N, D0], rotated.
        k1: [N, D1].
        v0: [N, D0].
        v1: [N, D1].
        visible: [M, N] or broadcastable, which query sees which key; unused unless MASKED.
        highest: [M], running maximum of the scores times SCALE.
        total: [M], running sum of the weights.
        acc0: [M, D0], running weighted sum of values.
        acc1: [M, D1].
        SCALE: D**-0.5 * log2(e): positive; weights are powers of two.
        MASKED: whether to look at `visible`.
        WIDTH1: D1, or 0.
    """
    scores = dot(q0, tl.trans(k0), tl.zeros([q0.shape[0], k0.shape[0]], tl.float32))  # [M, N]
    if WIDTH1:
        scores = dot(q1, tl.trans(k1), scores)
    if MASKED:
        scores = tl.where(visible, scores, float("-inf"))
    higher = tl.maximum(highest, tl.max(scores, 1) * SCALE)  # [M]
    weights = tl.exp2(scores * SCALE - higher[:, None])  # [M, N]
    shrink = tl.exp2(highest - higher)  # [M]
    total = total * shrink + tl.sum(weights, 1)
    weights = weights.to(v0.dtype)
    acc0 = dot(weights, v0, acc0 * shrink[:, None])
    if WIDTH1:
        acc1 = dot(weights, v1, acc1 * shrink[:, None])
    return higher, total, acc0, acc1
