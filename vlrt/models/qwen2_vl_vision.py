"""The vision tower of Qwen2-VL: LayerNorm, a plain MLP, full attention in each temporal patch, patch merger.

Takes patches, rotary tables and segment bounds as inputs; computes none of them. Source: arXiv 2409.12191.
"""

import torch
from torch import Tensor, nn

from vlrt import config
from vlrt.models.vision_layers import Block, PatchEmbed, PatchMerger


class Mlp(nn.Module):
    """`fc2(act(fc1 x))`, act being quick_gelu `x sigmoid(1.702 x)` in the published checkpoints."""

    def __init__(self, cfg: config.Vision) -> None:
        super().__init__()
        self.act = cfg.hidden_act
        self.fc1 = nn.Linear(cfg.hidden_size, cfg.intermediate_size)
        self.fc2 = nn.Linear(cfg.intermediate_size, cfg.hidden_size)

    def forward(self, x: Tensor) -> Tensor:
        """Map x [N, hidden_size] to [N, hidden_size]."""
        x = self.fc1(x)
        if self.act == "quick_gelu":
            x = x * torch.sigmoid(1.702 * x)
        else:
            x = nn.functional.gelu(x) if self.act == "gelu" else nn.functional.silu(x)
        out: Tensor = self.fc2(x)
        return out


class VisionTower(nn.Module):
    """Patches to video tokens. Whole temporal patches only: no token looks beyond its own."""

    def __init__(self, cfg: config.Vision) -> None:
        super().__init__()
        self.patch_embed = PatchEmbed(cfg)

        def norm() -> nn.Module:
            return nn.LayerNorm(cfg.hidden_size, cfg.norm_eps)

        self.blocks = nn.ModuleList(Block(cfg, norm(), norm(), Mlp(cfg)) for _ in range(cfg.depth))
        self.merger = PatchMerger(cfg, norm())

    def forward(self, pixels: Tensor, cos: Tensor, sin: Tensor, cu_seqlens: Tensor) -> Tensor:
        """Map patches to video tokens.

        Args:
            pixels: [N, patch_dim], merge squares contiguous.
            cos: [N, D/2].
            sin: [N, D/2].
            cu_seqlens: [T + 1] int32, bounds of the temporal patches.

        Returns:
            [N / spatial_merge_size**2, out_hidden_size].
        """
        x = self.patch_embed(pixels)
        for block in self.blocks:
            x = block(x, cos, sin, cu_seqlens)
        out: Tensor = self.merger(x)
        return out
