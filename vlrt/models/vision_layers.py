"""Layers that the towers of Qwen2-VL and Qwen2.5-VL share. Weight names are those of Hugging Face's checkpoints."""

from torch import Tensor, nn

from vlrt import config, ops


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
        q, k, v = self.qkv(x).unflatten(-1, (3, self.num_heads, -1)).unbind(-3)
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
    """Pre-norm segment attention and MLP with residuals."""

    def __init__(self, cfg: config.Vision, norm1: nn.Module, norm2: nn.Module, mlp: nn.Module) -> None:
        super().__init__()
        self.norm1, self.norm2 = norm1, norm2
        self.attn = SegmentAttention(cfg)
        self.mlp = mlp

    def forward(self, x: Tensor, cos: Tensor, sin: Tensor, cu_seqlens: Tensor) -> Tensor:
        """Map x [N, hidden_size] to [N, hidden_size]; cos and sin [N, D/2]; cu_seqlens [segments + 1] int32."""
        x = x + self.attn(self.norm1(x), cos, sin, cu_seqlens)
        out: Tensor = x + self.mlp(self.norm2(x))
        return out
