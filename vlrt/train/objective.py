"""Latent self-forcing: the terms of the training loss, one function each. Formulas: docs/latents.md.

Knows tensors; no model, no data and no schedule. Targets never carry gradient.
"""

import itertools
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional

IGNORED = -100  # label of positions that predict nothing, PyTorch's own default


@dataclass(frozen=True)
class Weights:
    """Weights of the terms beside the cross-entropy."""

    alignment: float = 0.1
    diversity: float = 0.05


class Loss(NamedTuple):
    """The loss of a batch and its terms, each a scalar. A tuple, so that wrappers of modules find its tensors."""

    total: Tensor
    cross_entropy: Tensor
    alignment: Tensor
    diversity: Tensor


def targets(video_tokens: Tensor, question: Tensor | None, num_latents: int) -> Tensor:
    """Return what the latents of one sample are aligned with: a summary of each of L ordered parts of its video.

        t_k = sum_n softmax_n(<qbar, v_n> / sqrt(C)) v_n, over the tokens n of part k

    Args:
        video_tokens: [N, C], in order of time.
        question: [Q, C], embeddings of the question, whose mean is qbar; None: uniform weights.
        num_latents: L; the video is cut at tokens `floor(k N / L)`. Of fewer tokens than latents, each part has one,
            and neighbours may have the same.

    Returns:
        [L, C], without gradient.
    """
    num_tokens, width = video_tokens.shape
    video_tokens = video_tokens.detach()
    bounds = [k * num_tokens // num_latents for k in range(num_latents + 1)]
    parts = [video_tokens[a : max(b, a + 1)] for a, b in itertools.pairwise(bounds)]
    if question is None:
        return torch.stack([part.mean(0) for part in parts])
    mean_question = question.detach().mean(0)
    return torch.stack([(part @ mean_question / width**0.5).softmax(0) @ part for part in parts])


def alignment(latents: Tensor, aims: Tensor) -> Tensor:
    """`1 - mean_k cos(z_k, sg(t_k))`, over latents and aims [..., L, C]; 0 where they point the same way."""
    return 1 - functional.cosine_similarity(latents, aims.detach(), dim=-1).mean()


def diversity(latents: Tensor, aims: Tensor) -> Tensor:
    """`mean_{i != j} relu(cos(z_i, z_j) - max(0, cos(t_i, t_j)))^2`, over latents and aims [..., L, C].

    Latents may be as alike as their aims are, so that this term never pulls against the alignment. 0 for one latent.
    """
    count = latents.shape[-2]
    if count == 1:
        return latents.sum() * 0
    excess = (_cosines(latents) - _cosines(aims.detach()).clamp(min=0)).clamp(min=0) ** 2
    others = ~torch.eye(count, dtype=torch.bool, device=latents.device)
    return excess[..., others].mean()


def cross_entropy(logits: Tensor, labels: Tensor) -> Tensor:
    """Mean cross-entropy of logits [..., V] on labels [...] int64; IGNORED labels do not count."""
    return functional.cross_entropy(logits.flatten(0, -2).float(), labels.flatten(), ignore_index=IGNORED)


def combine(ce: Tensor, latents: Tensor | None, aims: Tensor | None, weights: Weights) -> Loss:
    """Add up `CE + alignment + diversity` with their weights; without latents the CE alone."""
    zero = ce.detach() * 0
    if latents is None or aims is None:
        return Loss(ce, ce, zero, zero)
    align = alignment(latents, aims) if weights.alignment else zero
    diverse = diversity(latents, aims) if weights.diversity else zero
    return Loss(ce + weights.alignment * align + weights.diversity * diverse, ce, align, diverse)


def _cosines(x: Tensor) -> Tensor:
    """Cosines between all rows of x [..., L, C]: [..., L, L]."""
    unit = functional.normalize(x, dim=-1)
    return unit @ unit.transpose(-1, -2)
