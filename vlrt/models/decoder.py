"""The language model of Qwen2-VL and Qwen2.5-VL: embeddings in, post-final-norm hidden states out.

What differs between training, export and the torch backend is where keys and values live, so the attention itself is
given to `Decoder.forward` as an `Attend`. Knows no tokens, no positions (they come as cos/sin) and no latents.
"""

from typing import Protocol

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from vlrt import config, ops
from vlrt.models.layers import RMSNorm, SwiGLU


class Attend(Protocol):
    """Rotates q and k, finds older keys and values, attends."""

    def __call__(self, layer: int, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        """Map q [B,S,H,D], k and v [B,S,H_kv,D], not rotated, of one layer to [B,S,H,D]."""


class CachedAttention:
    """Causal attention over a KV cache: the one of inference.

    Args:
        cos: [M, D/2], row m for cache slot m.
        sin: [M, D/2].
        past_length: int32 scalar tensor, slots in use.
        keys: one [B, H_kv, M, D] per layer; replaced, layer by layer, by the caches with the new slots written.
        values: likewise.
        bias: [1, 1, S, past_length + S], added to the scores; None or without an element: nothing.
    """

    def __init__(
        self,
        cos: Tensor,
        sin: Tensor,
        past_length: Tensor,
        keys: list[Tensor],
        values: list[Tensor],
        bias: Tensor | None = None,
    ) -> None:
        self.cos, self.sin, self.past_length, self.bias = cos, sin, past_length, bias
        self.keys, self.values = list(keys), list(values)

    def __call__(self, layer: int, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        """See `Attend`."""
        out, self.keys[layer], self.values[layer] = ops.video_attention(
            q, k, v, self.cos, self.sin, self.keys[layer], self.values[layer], self.past_length, self.bias
        )
        return out


class FullAttention:
    """Differentiable attention over the sequence at hand, without a cache: the one of training.

    Args:
        cos: [S, D/2].
        sin: [S, D/2].
        mask: bool, broadcastable to [B, H, S, S], True where a query may look; None: causal.
    """

    def __init__(self, cos: Tensor, sin: Tensor, mask: Tensor | None = None) -> None:
        self.cos, self.sin, self.mask = cos, sin, mask

    def __call__(self, layer: int, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        """See `Attend`."""
        q, k = ops.rotary(q, self.cos, self.sin), ops.rotary(k, self.cos, self.sin)
        out = nn.functional.scaled_dot_product_attention(
            q.transpose(1, 2),
            k.transpose(1, 2),
            v.transpose(1, 2),
            attn_mask=self.mask,
            is_causal=self.mask is None,
            enable_gqa=True,
        )
        return out.transpose(1, 2)


class SelfAttention(nn.Module):
    """Projections around grouped-query attention; biases on q, k and v alone, as Qwen2 has them."""

    def __init__(self, cfg: config.Decoder, layer: int) -> None:
        super().__init__()
        self.layer, self.head_dim = layer, cfg.head_dim
        self.q_proj = nn.Linear(cfg.hidden_size, cfg.num_heads * cfg.head_dim, bias=True)
        self.k_proj = nn.Linear(cfg.hidden_size, cfg.num_kv_heads * cfg.head_dim, bias=True)
        self.v_proj = nn.Linear(cfg.hidden_size, cfg.num_kv_heads * cfg.head_dim, bias=True)
        self.o_proj = nn.Linear(cfg.num_heads * cfg.head_dim, cfg.hidden_size, bias=False)

    def forward(self, x: Tensor, attend: Attend) -> Tensor:
        """Map x [B,S,C] to [B,S,C]."""
        q, k, v = (proj(x).unflatten(-1, (-1, self.head_dim)) for proj in (self.q_proj, self.k_proj, self.v_proj))
        out: Tensor = self.o_proj(attend(self.layer, q, k, v).flatten(-2))
        return out


class DecoderLayer(nn.Module):
    """Pre-norm attention and MLP with residuals."""

    def __init__(self, cfg: config.Decoder, layer: int) -> None:
        super().__init__()
        self.input_layernorm = RMSNorm(cfg.hidden_size, cfg.rms_norm_eps)
        self.self_attn = SelfAttention(cfg, layer)
        self.post_attention_layernorm = RMSNorm(cfg.hidden_size, cfg.rms_norm_eps)
        self.mlp = SwiGLU(cfg.hidden_size, cfg.intermediate_size, bias=False)

    def forward(self, x: Tensor, attend: Attend) -> Tensor:
        """Map x [B,S,C] to [B,S,C]."""
        x = x + self.self_attn(self.input_layernorm(x), attend)
        out: Tensor = x + self.mlp(self.post_attention_layernorm(x))
        return out


class Decoder(nn.Module):
    """The stack of layers and the final norm; `embed_tokens` is the table that callers look their tokens up in."""

    def __init__(self, cfg: config.Decoder) -> None:
        super().__init__()
        self.embed_tokens = nn.Embedding(cfg.vocab_size, cfg.hidden_size)
        self.layers = nn.ModuleList(DecoderLayer(cfg, layer) for layer in range(cfg.num_layers))
        self.norm = RMSNorm(cfg.hidden_size, cfg.rms_norm_eps)
        self.checkpointing = False  # recompute each layer in the backward pass; `attend` must keep no state

    def forward(self, inputs_embeds: Tensor, attend: Attend) -> Tensor:
        """Map inputs_embeds [B,S,C] to post-final-norm hidden states [B,S,C]."""
        x = inputs_embeds
        for layer in self.layers:
            if self.checkpointing and torch.is_grad_enabled():
                x = checkpoint(layer, x, attend, use_reentrant=False)
            else:
                x = layer(x, attend)
        out: Tensor = self.norm(x)
        return out
