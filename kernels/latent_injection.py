"""The latent injection module: hidden states to the vectors injected at the latent slots, in two or three launches.

    u = RMSNorm(h)
    z = rho * RMSNorm(u + fc2 silu(fc1 u) + tanh(alpha) * Attn(q_proj u, memory_k, memory_v))

Shapes: h and z [B, L, C], fc1 [I, C], fc2 [C, I], q_proj [C, C], memory_k and memory_v [B, T, C]; all of one dtype, but
alpha and rho, which are scalars of any float dtype on the device. Accumulators, softmax and norms in fp32.

The first launch zeroes the counters of the last, so all scratch may be uninitialised, calls may run on several streams
at once, and a CUDA graph may be replayed. Sums are taken in a fixed order: every run gives the same bits.

In two launches every column block computes the attention weights of its head anew: D / BLOCK_N times one head's work.
For heads of 64 to 256 and some temporal patches that is little; where it is not (`scores_apart`), a launch between the
two computes them once.

Not supported: fp64, weights with gaps between rows, z that overlaps h. Sources: docs/latents.md;
`latent_expand.py`, `latent_mix.py`.
"""

from collections.abc import Iterator
from typing import Any, NamedTuple

import torch
import triton
from torch import Tensor

from vlrt.kernels import configs, launch
from vlrt.kernels.latent_expand import expand_kernel
from vlrt.kernels.latent_mix import mix_kernel, score_kernel

LOG2_E = 1.4426950408889634


class Tiles(NamedTuple):
    """Block sizes of both kernels."""

    rows: int  # of h; 1, or what tl.dot accepts
    columns: int  # rows of fc1, q_proj and fc2 per program
    depth: int  # of a step along C, I or D
    steps: int  # temporal patches per step
    num_warps: int
    num_stages: int

    @property
    def options(self) -> dict[str, Any]:
        """Launch options."""
        return {"num_warps": self.num_warps, "num_stages": self.num_stages, **configs.FP_FUSION}


def tiles(num_rows: int, dtype: torch.dtype) -> Tiles:
    """Return block sizes by reasoning, not yet by measurement.

    16 to 32 KiB of weights in flight per program hide the memory's latency with a few programs per SM. One row: the
    tile is held in registers, 64 values a thread. More rows: staged through shared memory for the tensor cores; fp32
    has none of its precision there, and its product holds a whole step of K in registers, hence the short step.
    """
    if num_rows == 1:
        return Tiles(1, 16, 512 if dtype.itemsize == 2 else 256, 16, 4, 1)
    rows, num_warps = (16, 4) if num_rows <= 16 else (32, 8)  # 32 rows with 4 warps spill on sm_120
    return Tiles(rows, 32, 128, 32, num_warps, 3) if dtype.itemsize == 2 else Tiles(rows, 32, 32, 32, num_warps, 2)


def scores_apart(steps: int, inner: int, head_dim: int, columns: int) -> bool:
    """Whether q k^T gets a launch of its own: read anew by every column block, memory_k outweighs a quarter of fc2.

    By reasoning, not yet by measurement: a launch costs about what a quarter of fc2 [C, I] takes to read at C = 3584.
    """
    return 4 * steps * triton.cdiv(head_dim, columns) > inner


def supported(op: str, dtype: torch.dtype, shape: tuple[int, ...]) -> str | None:
    """Say why the kernels do not serve h of this dtype and shape, or None."""
    if reason := launch.unsupported_dtype(op, dtype):
        return reason
    if len(shape) != 3:
        return f"{op} on 'cuda' takes h [B, L, C], not {list(shape)}"
    return None


def latent_injection(
    h: Tensor,
    norm_in: Tensor,
    fc1: Tensor,
    fc2: Tensor,
    q_proj: Tensor,
    memory_k: Tensor,
    memory_v: Tensor,
    alpha: Tensor,
    norm_out: Tensor,
    rho: Tensor,
    num_heads: int,
    eps: float,
) -> Tensor:
    """Launch `reference.latent_injection`; returns z [B, L, C].

    Raises:
        ValueError: shapes, strides, dtypes or devices do not fit each other, or the kernels.
    """
    z = torch.empty_like(h)
    module = Module(norm_in, fc1, fc2, norm_out, rho, q_proj, memory_k, memory_v, alpha, num_heads)
    _launch(h, module, eps, z, None)
    return z


def latent_injection_into(
    h: Tensor,
    norm_in: Tensor,
    fc1: Tensor,
    fc2: Tensor,
    q_proj: Tensor | None,
    memory_k: Tensor | None,
    memory_v: Tensor | None,
    alpha: Tensor | None,
    norm_out: Tensor,
    rho: Tensor,
    num_heads: int,
    eps: float,
    embeds: Tensor,
    start: int | Tensor,
) -> None:
    """Write z of `latent_injection` to rows start .. start + L of embeds, and nothing else.

    All up to eps is as in `reference.latent_injection`; q_proj, memory_k, memory_v and alpha are all None for mode
    "mlp", which does not look at the video. embeds is [B, S, C] in the dtype of h and may not overlap it. start is the
    first row; or an int32 scalar tensor on the device, read by the kernel, so that a CUDA graph may be replayed at
    other rows: that cannot be checked here, and rows beyond S are dropped.

    Raises:
        ValueError: as `latent_injection`; or the rows do not fit embeds.
    """
    z, p_start = launch.slots(h, embeds, start)
    module = Module(norm_in, fc1, fc2, norm_out, rho, q_proj, memory_k, memory_v, alpha, num_heads)
    _launch(h, module, eps, z, p_start)


class Module(NamedTuple):
    """The module's tensors; those from q_proj on are None without attention."""

    norm_in: Tensor
    fc1: Tensor
    fc2: Tensor
    norm_out: Tensor
    rho: Tensor
    q_proj: Tensor | None
    memory_k: Tensor | None
    memory_v: Tensor | None
    alpha: Tensor | None
    num_heads: int

    def check(self, h: Tensor) -> None:
        """Refuse what the kernels do not read rightly."""
        reason = supported("latent_injection", h.dtype, tuple(h.shape))
        launch.require(reason is None, reason or "")
        batch, _, width = h.shape
        inner = self.fc1.shape[0]
        launch.require(width % self.num_heads == 0, f"{self.num_heads} heads do not divide a width of {width}")
        dense = {"norm_in": (width,), "fc1": (inner, width), "fc2": (width, inner), "norm_out": (width,)}
        looking = [self.q_proj, self.memory_k, self.memory_v, self.alpha]
        if any(x is not None for x in looking):
            launch.require(
                all(x is not None for x in looking), "q_proj, memory_k, memory_v, alpha: all or none is None"
            )
            dense["q_proj"] = (width, width)
        for name, shape in dense.items():
            weight = getattr(self, name)
            launch.require_alike(f"latent_injection ({name})", h, (weight,))
            launch.require(
                weight.shape == shape and weight.is_contiguous(),
                f"{name} is {list(weight.shape)} with strides {weight.stride()}; accepted: contiguous {list(shape)}",
            )
        for name in ("memory_k", "memory_v") if self.memory_k is not None else ():
            memory = getattr(self, name)
            launch.require_alike(f"latent_injection ({name})", h, (memory,))
            fits = memory.dim() == 3 and memory.shape[::2] == (batch, width) and memory.shape[1] > 0
            fits = fits and memory.shape == self.memory_k.shape and memory.stride(-1) == 1  # type: ignore[union-attr]
            launch.require(fits, f"{name} is {list(memory.shape)}; accepted: [{batch}, T, {width}], T > 0, dense rows")


def _launch(h: Tensor, module: Module, eps: float, z: Tensor, start: Tensor | None) -> None:
    module.check(h)
    launch.require(h.stride(-1) == 1 == z.stride(-1), "h has gaps between the values of a row; pass h.contiguous()")
    if not h.numel():
        return
    batch, length, width = h.shape
    num_rows, inner = batch * length, module.fc1.shape[0]
    q_proj, memory_k, memory_v = module.q_proj, module.memory_k, module.memory_v
    first, second = tiles(num_rows, h.dtype), tiles(length, h.dtype)
    head_dim = width // module.num_heads
    blocks = triton.cdiv(inner, first.columns) + (0 if q_proj is None else triton.cdiv(width, first.columns))
    parts = module.num_heads * triton.cdiv(head_dim, second.columns)
    q = None if q_proj is None else h.new_empty(num_rows, width)
    activated, mixed = h.new_empty(num_rows, inner), h.new_empty(num_rows, width, dtype=torch.float32)
    rstd, squares = (h.new_empty(num_rows, n, dtype=torch.float32) for n in (1, parts))
    counters = h.new_empty(num_rows, dtype=torch.int32)
    steps, memory_strides = 0, [0, 0, 0, 0]
    if memory_k is not None and memory_v is not None:
        steps, memory_strides = memory_k.shape[1], [*memory_k.stride()[:2], *memory_v.stride()[:2]]
    row_blocks = batch * triton.cdiv(length, second.rows)
    scores = None
    with launch.on_device_of(h):
        expand_kernel[(triton.cdiv(num_rows, first.rows), blocks)](
            *(h, module.norm_in, module.fc1, q_proj, activated, q, rstd, counters),
            *(*h.stride()[:2], num_rows, length, width, inner),
            *(eps, first.rows, first.columns, first.depth),
            **first.options,
        )
        if scores_apart(steps, inner, head_dim, second.columns):
            scores = h.new_empty(num_rows, module.num_heads, steps, dtype=torch.float32)
            score_kernel[(row_blocks, module.num_heads * triton.cdiv(steps, second.steps))](
                *(q, memory_k, scores, *memory_strides[:2], length, steps, width, head_dim),
                *(second.rows, second.depth, second.steps),
                **second.options,
            )
        mix_kernel[(row_blocks, parts)](
            *(h, module.norm_in, module.fc2, memory_k, memory_v, module.alpha, module.norm_out, module.rho),
            *(activated, q, scores, rstd, mixed, squares, counters, z, start),
            *(*h.stride()[:2], *memory_strides, *z.stride()[:2]),
            *(length, z.shape[1], steps, width, inner, head_dim),
            *(eps, LOG2_E * head_dim**-0.5, second.rows, second.columns, second.depth, second.steps),
            **second.options,
        )


def compilations(arch: int) -> Iterator[configs.Compilation]:
    """Yield the kernels of this file in every configuration that ships."""
    floats, integers = torch.float32, torch.int32
    for dtype in configs.FLOATS:
        for num_rows in (1, 16, 32):
            tile = tiles(num_rows, dtype)
            sizes = {"BLOCK_N": tile.columns, "BLOCK_K": tile.depth}

            def compilation(
                kernel: Any,
                constexprs: dict[str, Any],
                pointers: dict[str, torch.dtype],
                dtype: torch.dtype = dtype,
                tile: Tiles = tile,
            ) -> configs.Compilation:
                given = (arch, dtype, constexprs, tile.options, pointers)
                return configs.compilation(kernel, *given, multiples=("C", "inner", "D"))

            pointers = {"p_rstd": floats, "p_counters": integers}
            yield compilation(expand_kernel, {"EPS": 1e-6, "BLOCK_R": tile.rows, **sizes}, pointers)
            blocks = {"BLOCK_L": tile.rows, "BLOCK_K": tile.depth, "BLOCK_T": tile.steps}
            yield compilation(score_kernel, blocks, {"p_scores": floats})
            pointers |= dict.fromkeys(("p_scores", "p_mixed", "p_squares"), floats) | {"p_start": integers}
            for absent in ({}, {"p_scores": None}):
                constexprs = {"EPS": 1e-6, "SCALE": LOG2_E * 128**-0.5, **blocks, **sizes, **absent}
                yield compilation(mix_kernel, constexprs, pointers)
