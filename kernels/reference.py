"""The specification of every vlrt op, in plain PyTorch, in the dtype it is given (fp32 or fp64 for judging others).

Formulas and notation: README.md beside this file. Knows tensors, not models, caches or engines. CPU runs these as they
are (`schema.py` registers them), so that a model is correct on any machine; the kernels are held against them.
"""

from itertools import pairwise
from typing import cast

import torch
from torch import Tensor


def rotary(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotate the two halves of the last axis: `[x1 cos - x2 sin, x2 cos + x1 sin]`.

    Args:
        x: [..., S, H, D].
        cos: [S, D/2], of the dtype of x or wider. Row s belongs to position s of x.
        sin: [S, D/2].

    Returns:
        Like x, of its dtype.

    Source: RoFormer (arXiv 2104.09864), in the half-split layout of Qwen2 and Llama.
    """
    cos, sin = cos.unsqueeze(-2), sin.unsqueeze(-2)
    x1, x2 = x.chunk(2, dim=-1)
    return torch.cat((x1 * cos - x2 * sin, x2 * cos + x1 * sin), dim=-1).to(x.dtype)


def attention(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None) -> Tensor:
    """Softmax attention with grouped key and value heads, scaled by `D**-0.5`.

    Args:
        q: [B, S, H, D].
        k: [B, K, H_kv, D]; H is a multiple of H_kv.
        v: [B, K, H_kv, D].
        mask: broadcastable to [B, H, S, K]: bool, True where a query may look, or a number that is added to the score;
            None: a query looks everywhere.

    Returns:
        [B, S, H, D].
    """
    groups = q.shape[2] // k.shape[2]
    k, v = (x.repeat_interleave(groups, dim=2).transpose(1, 2) for x in (k, v))
    scores = q.transpose(1, 2) @ k.transpose(-1, -2) * q.shape[-1] ** -0.5
    if mask is not None:
        scores = scores.masked_fill(~mask, float("-inf")) if mask.dtype == torch.bool else scores + mask
    return (scores.softmax(dim=-1) @ v).transpose(1, 2)


def video_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    cos: Tensor,
    sin: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    past_length: Tensor,
    bias: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """Rotary, append to the KV cache, causal attention over the whole of it.

    Args:
        q: [B, S, H, D], not yet rotated.
        k: [B, S, H_kv, D], not yet rotated.
        v: [B, S, H_kv, D].
        cos: [M, D/2]: row m rotates what is stored in cache slot m.
        sin: [M, D/2].
        k_cache: [B, H_kv, M, D], rotated keys; slots from past_length on are ignored and overwritten.
        v_cache: [B, H_kv, M, D].
        past_length: int32 scalar tensor: slots in use before this call; past_length + S <= M.
        bias: [1, 1, S, past_length + S], added to the scores, -inf hiding a slot; None or without an element: nothing.

    Returns:
        out [B, S, H, D], and the two caches with slots past_length .. past_length + S written.
    """
    k_cache, v_cache = k_cache.clone(), v_cache.clone()
    return video_attention_(q, k, v, cos, sin, k_cache, v_cache, past_length, bias), k_cache, v_cache


def video_attention_(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    cos: Tensor,
    sin: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    past_length: Tensor,
    bias: Tensor | None = None,
) -> Tensor:
    """`video_attention` that writes into the caches it is given; returns out [B, S, H, D] alone."""
    past = cast(int, past_length.item())  # unlike int(), leaves it symbolic where the backward is traced
    num_new = q.shape[1]
    total = past + num_new
    new = slice(past, total)
    q, k = rotary(q, cos[new], sin[new]), rotary(k, cos[new], sin[new])
    k_cache[:, :, new] = k.transpose(1, 2)
    v_cache[:, :, new] = v.transpose(1, 2)
    mask = torch.ones(num_new, total, dtype=torch.bool, device=q.device).tril(past)
    if bias is not None and bias.numel():
        mask = bias.masked_fill(~mask, float("-inf"))
    keys, values = (x[:, :, :total].transpose(1, 2) for x in (k_cache, v_cache))
    return attention(q, keys, values, mask).contiguous()


def segment_attention(q: Tensor, k: Tensor, v: Tensor, cos: Tensor, sin: Tensor, cu_seqlens: Tensor) -> Tensor:
    """Rotary, then attention in which every token sees its own segment: windows or temporal patches of a vision tower.

    Args:
        q: [N, H, D], not yet rotated.
        k: [N, H, D], not yet rotated.
        v: [N, H, D].
        cos: [N, D/2].
        sin: [N, D/2].
        cu_seqlens: [num_segments + 1] int32, from 0 to N, increasing: segment i is cu_seqlens[i] .. cu_seqlens[i + 1].

    Returns:
        [N, H, D].
    """
    q, k = rotary(q, cos, sin), rotary(k, cos, sin)
    bounds = cu_seqlens.tolist()
    size = bounds[1] - bounds[0]
    known = all(isinstance(bound, int) for bound in bounds)  # they are symbols where the backward is traced
    if known and all(stop - start == size for start, stop in pairwise(bounds)):  # as a batch: one call for all
        q, k, v = (x.unflatten(0, (-1, size)) for x in (q, k, v))
        return attention(q, k, v, None).flatten(0, 1)
    out = torch.empty_like(v)
    for start, stop in pairwise(bounds):
        q_i, k_i, v_i = (x[None, start:stop] for x in (q, k, v))
        out[start:stop] = attention(q_i, k_i, v_i, None)[0]
    return out


def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """`x / sqrt(mean(x**2) + eps) * weight` over the last axis, the statistics in fp32 or better.

    Args:
        x: [..., C].
        weight: [C].
        eps: added to the mean square.
    """
    high = x if x.dtype == torch.float64 else x.float()
    return weight * (high * torch.rsqrt(high.pow(2).mean(-1, keepdim=True) + eps)).to(x.dtype)


def add_rms_norm(x: Tensor, residual: Tensor, weight: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    """Return `x + residual`, and its `rms_norm`: what stands between two blocks of a decoder.

    Args:
        x: [..., C].
        residual: [..., C], same dtype as x.
        weight: [C].
        eps: added to the mean square.
    """
    added = x + residual
    return added, rms_norm(added, weight, eps)


def swiglu(gate: Tensor, up: Tensor) -> Tensor:
    """`silu(gate) * up`, both [..., I] (arXiv 2002.05202)."""
    return torch.nn.functional.silu(gate) * up


def patchify(
    frames: Tensor, mean: Tensor, std: Tensor, patch_size: int, temporal_patch_size: int, merge_size: int
) -> Tensor:
    """Normalise frames and cut them into patches, in the order of merge windows: `vlrt.preprocess.patchify`.

    Args:
        frames: [T, H, W, 3] uint8; T a multiple of temporal_patch_size, H and W of patch_size * merge_size.
        mean: [3], of the dtype of the result.
        std: [3].
        patch_size: rows and columns of a patch.
        temporal_patch_size: frames of a patch.
        merge_size: rows and columns of patches in a window.

    Returns:
        [N, 3 * temporal_patch_size * patch_size**2]: per patch channel, frame, row, column.
    """
    size, steps, merge = patch_size, temporal_patch_size, merge_size
    count, height, width, channels = frames.shape
    rows, columns = height // size, width // size
    high = torch.float64 if mean.dtype == torch.float64 else torch.float32
    levels = (frames.to(high) * (1 / 255) - mean.to(high)) / std.to(high)
    blocks = levels.reshape(count // steps, steps, rows // merge, merge, size, columns // merge, merge, size, channels)
    ordered = blocks.permute(0, 2, 5, 3, 6, 8, 1, 4, 7)
    return ordered.reshape(count // steps * rows * columns, -1).to(mean.dtype).contiguous()


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
    """The latent injection module: hidden states to the vectors that are injected at the latent slots.

        u = RMSNorm(h)
        z = rho * RMSNorm(u + fc2 silu(fc1 u) + tanh(alpha) * Attn(q_proj u, memory_k, memory_v))

    Args:
        h: [B, L, C], post-final-norm hidden states of the decoder.
        norm_in: [C], weight of the first norm.
        fc1: [I, C].
        fc2: [C, I].
        q_proj: [C, C].
        memory_k: [B, T, C], keys of the video's spatially pooled tokens.
        memory_v: [B, T, C], their values.
        alpha: scalar tensor, gate of the attention.
        norm_out: [C], weight of the second norm.
        rho: scalar tensor, RMS of the result where norm_out is one.
        num_heads: heads of the attention; C is a multiple of it.
        eps: of both norms.

    Returns:
        z [B, L, C].
    """
    u = rms_norm(h, norm_in, eps)
    q, k, v = (x.unflatten(-1, (num_heads, -1)) for x in (u @ q_proj.T, memory_k, memory_v))
    looked_up = attention(q, k, v, None).flatten(-2)
    mixed = u + torch.nn.functional.silu(u @ fc1.T) @ fc2.T + torch.tanh(alpha) * looked_up
    return rho * rms_norm(mixed, norm_out, eps)
