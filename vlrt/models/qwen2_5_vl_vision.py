"""The vision tower of Qwen2.5-VL: RMSNorm, SwiGLU, window attention with a few full layers, patch merger.

Takes patches, rotary tables, windows and segment bounds as inputs; computes none of them. Source: arXiv 2502.13923.
"""

from torch import Tensor, nn

from vlrt import config, ops
from vlrt.models.layers import RMSNorm, SwiGLU


class PatchEmbed(nn.Module):
    """A linear map of flattened patches: Hugging Face's Conv3d whose kernel equals its stride."""

    def __init__(self, cfg: config.Vision) -> None:
        super().__init__()
        self.proj = nn.Linear(cfg.patch_dim, cfg.hidden_size, bias=False)

    def forward(self, pixels: Tensor) -> Tensor:
        """Map pixels [N, patch_dim] to [N, hidden_size]."""
        out: Tensor = self.proj(pixels)
        return out


class SegmentAttention(nn.Module):
    """Attention within segments (windows, or temporal patches), with 2-D rotary positions."""

    def __init__(self, cfg: config.Vision) -> None:
        super().__init__()
        self.num_heads = cfg.num_heads
        self.qkv = nn.Linear(cfg.hidden_size, 3 * cfg.hidden_size)
        self.proj = nn.Linear(cfg.hidden_size, cfg.hidden_size)

    def forward(self, x: Tensor, cos: Tensor, sin: Tensor, cu_seqlens: Tensor) -> Tensor:
        """Map x [N, hidden_size] to [N, hidden_size]; cos and sin [N, D/2]; cu_seqlens [segments + 1] int32."""
        q, k, v = (part.unflatten(-1, (self.num_heads, -1)) for part in self.qkv(x).chunk(3, dim=-1))
        out: Tensor = self.proj(ops.segment_attention(q, k, v, cos, sin, cu_seqlens).flatten(-2))
        return out


class PatchMerger(nn.Module):
    """Norm, then an MLP over each square of neighbouring patches: one video token per square."""

    def __init__(self, cfg: config.Vision, norm: nn.Module) -> None:
        super().__init__()
        self.width = cfg.hidden_size * cfg.spatial_merge_size**2
        self.ln_q = norm
        self.mlp = nn.Sequential(
            nn.Linear(self.width, self.width), nn.GELU(), nn.Linear(self.width, cfg.out_hidden_size)
        )

    def forward(self, x: Tensor) -> Tensor:
        """Map x [N, hidden_size] to [N / spatial_merge_size**2, out_hidden_size]."""
        out: Tensor = self.mlp(self.ln_q(x).reshape(-1, self.width))
        return out


class Block(nn.Module):
    """Pre-norm segment attention and SwiGLU with residuals."""

    def __init__(self, cfg: config.Vision) -> None:
        super().__init__()
        self.norm1 = RMSNorm(cfg.hidden_size, cfg.norm_eps)
        self.norm2 = RMSNorm(cfg.hidden_size, cfg.norm_eps)
        self.attn = SegmentAttention(cfg)
        self.mlp = SwiGLU(cfg.hidden_size, cfg.intermediate_size, bias=True)

    def forward(self, x: Tensor, cos: Tensor, sin: Tensor, cu_seqlens: Tensor) -> Tensor:
        """Map x [N, hidden_size] to [N, hidden_size]."""
        x = x + self.attn(self.norm1(x), cos, sin, cu_seqlens)
        out: Tensor = x + self.mlp(self.norm2(x))
        return out


class VisionTower(nn.Module):
    """Patches to video tokens. Whole temporal patches only: no token looks beyond its own."""

    def __init__(self, cfg: config.Vision) -> None:
        super().__init__()
        self.cfg = cfg
        self.merge_unit = cfg.spatial_merge_size**2
        self.patch_embed = PatchEmbed(cfg)
        self.blocks = nn.ModuleList(Block(cfg) for _ in range(cfg.depth))
        self.merger = PatchMerger(cfg, RMSNorm(cfg.hidden_size, cfg.norm_eps))

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

    def _reorder(self, x: Tensor, index: Tensor) -> Tensor:
        """Permute merge squares of x [N, ...] by index [N / merge_unit]."""
        return x.unflatten(0, (-1, self.merge_unit)).index_select(0, index).flatten(0, 1)
