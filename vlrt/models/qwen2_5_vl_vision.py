"""The vision tower of Qwen2.5-VL: RMSNorm, SwiGLU, window attention with a few full layers, patch merger.

Takes patches, rotary tables, windows and segment bounds as inputs; computes none of them. Source: arXiv 2502.13923.
"""

from torch import Tensor, nn

from vlrt import config
from vlrt.models.layers import RMSNorm, SwiGLU
from vlrt.models.vision_layers import Block, PatchEmbed, PatchMerger


class VisionTower(nn.Module):
    """Patches to video tokens. Whole temporal patches only: no token looks beyond its own."""

    def __init__(self, cfg: config.Vision) -> None:
        super().__init__()
        self.cfg = cfg
        self.merge_unit = cfg.spatial_merge_size**2
        self.patch_embed = PatchEmbed(cfg)
        self.blocks = nn.ModuleList(self._block() for _ in range(cfg.depth))
        self.merger = PatchMerger(cfg, self._norm())

    def forward(
        self,
        pixels: Tensor,
        cos: Tensor,
        sin: Tensor,
        cu_seqlens: Tensor,
        window_index: Tensor,
        window_reverse: Tensor,
        cu_window_seqlens: Tensor,
    ) -> Tensor:
        """Map patches to video tokens.

        Args:
            pixels: [N, patch_dim], merge squares contiguous.
            cos: [N, D/2], in the order of pixels.
            sin: [N, D/2].
            cu_seqlens: [T + 1] int32, bounds of the temporal patches.
            window_index: [N / merge_unit] int64: the order of merge squares in which windows are contiguous.
            window_reverse: [N / merge_unit] int64, its inverse.
            cu_window_seqlens: [windows + 1] int32, bounds of the windows in that order.

        Returns:
            [N / merge_unit, out_hidden_size].
        """
        x = self._reorder(self.patch_embed(pixels), window_index)
        cos, sin = self._reorder(cos, window_index), self._reorder(sin, window_index)
        for layer, block in enumerate(self.blocks):
            windowed = self.cfg.window_size and layer not in self.cfg.full_attention_layers
            x = block(x, cos, sin, cu_window_seqlens if windowed else cu_seqlens)
        out: Tensor = self.merger(x).index_select(0, window_reverse)
        return out

    def _norm(self) -> RMSNorm:
        return RMSNorm(self.cfg.hidden_size, self.cfg.norm_eps)

    def _block(self) -> Block:
        mlp = SwiGLU(self.cfg.hidden_size, self.cfg.intermediate_size, bias=True)
        return Block(self.cfg, self._norm(), self._norm(), mlp)

    def _reorder(self, x: Tensor, index: Tensor) -> Tensor:
        """Permute merge squares of x [N, ...] by index [N / merge_unit]."""
        return x.unflatten(0, (-1, self.merge_unit)).index_select(0, index).flatten(0, 1)
