"""Layers that decoder and vision towers share. Weight names are those of Hugging Face's checkpoints."""

import torch
from torch import Tensor, nn

from vlrt import ops


class RMSNorm(nn.Module):
    """`x / rms(x) * weight` over the last axis, statistics in fp32 (arXiv 1910.07467)."""

    def __init__(self, size: int, eps: float) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(size))
        self.eps = eps

    def forward(self, x: Tensor) -> Tensor:
        """Normalise x [..., size]."""
        return ops.rms_norm(x, self.weight, self.eps)


class SwiGLU(nn.Module):
    """`down(silu(gate x) * up x)` (arXiv 2002.05202)."""

    def __init__(self, size: int, intermediate_size: int, *, bias: bool) -> None:
        super().__init__()
        self.gate_proj = nn.Linear(size, intermediate_size, bias=bias)
        self.up_proj = nn.Linear(size, intermediate_size, bias=bias)
        self.down_proj = nn.Linear(intermediate_size, size, bias=bias)

    def forward(self, x: Tensor) -> Tensor:
        """Map x [..., size] to [..., size]."""
        out: Tensor = self.down_proj(nn.functional.silu(self.gate_proj(x)) * self.up_proj(x))
        return out
