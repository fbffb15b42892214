"""The latent injection module: post-final-norm hidden states to the vectors injected at the latent slots.

Formula and modes: docs/latents.md. Knows neither rollouts nor positions (`latent.py`).
"""

import torch
from torch import Tensor, nn

from vlrt import config, ops


class LatentInjection(nn.Module):
    """`z = g(h, memory)` in the mode of the config.

    identity: z = h. rms: z = rho h / rms(h). mlp and mlp_xattn: see `kernels.reference.latent_injection`, the former
    without the look-up in the video. Parameters exist for the mode at hand only; `queries` for the parallel rollout.
    """

    def __init__(self, cfg: config.Latent, hidden_size: int, eps: float) -> None:
        super().__init__()
        self.cfg, self.eps = cfg, eps
        if cfg.injection != "identity":
            self.rho = nn.Parameter(torch.ones(()))
        if cfg.injection in ("mlp", "mlp_xattn"):
            inner = cfg.intermediate_size or hidden_size
            self.norm_in = _Weight(torch.ones(hidden_size))
            self.fc1 = nn.Linear(hidden_size, inner, bias=False)
            self.fc2 = nn.Linear(inner, hidden_size, bias=False)
            self.norm_out = _Weight(torch.ones(hidden_size))
            nn.init.zeros_(self.fc2.weight)
        if cfg.injection == "mlp_xattn":
            self.q_proj = nn.Linear(hidden_size, hidden_size, bias=False)
            self.k_proj = nn.Linear(hidden_size, hidden_size, bias=False)
            self.v_proj = nn.Linear(hidden_size, hidden_size, bias=False)
            self.alpha = nn.Parameter(torch.zeros(()))
        if cfg.rollout == "parallel":
            self.queries = nn.Parameter(torch.zeros(cfg.num_latents, hidden_size))

    @property
    def looks_at_video(self) -> bool:
        """Whether the module reads the video's pooled tokens."""
        return self.cfg.injection == "mlp_xattn"

    def memory(self, pooled: Tensor) -> tuple[Tensor, Tensor]:
        """Keys and values [B,T,C] of the video's tokens, mean-pooled over space: pooled [B,T,C]. Once per video."""
        return self.k_proj(pooled), self.v_proj(pooled)

    def forward(self, h: Tensor, memory: tuple[Tensor, Tensor] | None = None) -> Tensor:
        """Map h [B,L,C] to z [B,L,C]; memory as `memory` returns it, for mode mlp_xattn."""
        if self.cfg.injection == "identity":
            return h
        if self.cfg.injection == "rms":
            return self.rho * ops.rms_norm(h, torch.ones_like(h[0, 0]), self.eps)
        if self.cfg.injection == "mlp":
            u = ops.rms_norm(h, self.norm_in.weight, self.eps)
            u = u + self.fc2(nn.functional.silu(self.fc1(u)))
            return self.rho * ops.rms_norm(u, self.norm_out.weight, self.eps)
        assert memory is not None, "mode mlp_xattn needs the video's memory"
        out: Tensor = ops.latent_injection(
            h,
            self.norm_in.weight,
            self.fc1.weight,
            self.fc2.weight,
            self.q_proj.weight,
            *memory,
            self.alpha,
            self.norm_out.weight,
            self.rho,
            self.cfg.num_heads,
            self.eps,
        )
        return out


class _Weight(nn.Module):
    """A bare weight, so that its name in a checkpoint ends in `.weight` like every other norm's."""

    def __init__(self, value: Tensor) -> None:
        super().__init__()
        self.weight = nn.Parameter(value)
