"""The decoder at inference on one device: fewer, larger matrix products than `models.decoder`, same numbers.

q, k and v come of one product, gate and up of another, and each residual sum is normalised where it is made. A linear
layer's weights may be fp8. Training and export read `models.decoder`; tests hold this one against it.
"""

from collections.abc import Callable

import torch
from torch import Tensor
from torch.nn import functional

from vlrt import config, ops
from vlrt.backends.fp8 import FP8, SCALE, fp8_linear, unsupported
from vlrt.errors import ConfigError
from vlrt.models.decoder import Attend

Fetch = Callable[[str], Tensor]  # a weight by its Hugging Face name, in its stored dtype
Linear = Callable[[Tensor], Tensor]


class FusedDecoder:
    """The stack of layers and the final norm.

    Args:
        cfg: of the decoder.
        fetch: hands weights out; a fp8 weight's scales [N] float32 by its name and SCALE.
        dtype: of activations and of weights that are not fp8.
        device: where the weights go, layer by layer.
    """

    def __init__(self, cfg: config.Decoder, fetch: Fetch, dtype: torch.dtype, device: torch.device) -> None:
        self._cfg = cfg

        def norm(name: str) -> Tensor:
            return fetch(f"model.{name}.weight").to(device, dtype)

        names = [f"layers.{i}" for i in range(cfg.num_layers)]
        self._layers = [_Layer(f"model.{name}.", cfg, fetch, dtype, device) for name in names]
        self._norms = [norm(f"{names[0]}.input_layernorm")]  # the one before each block, and after the last
        for name, after in zip(names, [*(f"{name}.input_layernorm" for name in names[1:]), "norm"], strict=True):
            self._norms += [norm(f"{name}.post_attention_layernorm"), norm(after)]

    def __call__(self, inputs_embeds: Tensor, attend: Attend) -> Tensor:
        """Map inputs_embeds [B,S,C] to post-final-norm hidden states [B,S,C]."""
        norms, eps = iter(self._norms), self._cfg.rms_norm_eps
        residual, x = inputs_embeds, ops.rms_norm(inputs_embeds, next(norms), eps)
        for number, layer in enumerate(self._layers):
            residual, x = ops.add_rms_norm(layer.attention(x, number, attend), residual, next(norms), eps)
            residual, x = ops.add_rms_norm(layer.mlp(x), residual, next(norms), eps)
        return x


class _Layer:
    """The linear layers of one layer, and what is between them."""

    def __init__(
        self, prefix: str, cfg: config.Decoder, fetch: Fetch, dtype: torch.dtype, device: torch.device
    ) -> None:
        self._cfg = cfg

        def join(*names: str, has_bias: bool = False) -> Linear:
            return linear([f"{prefix}{name}" for name in names], fetch, dtype, device, has_bias=has_bias)

        self._qkv = join("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj", has_bias=True)
        self._o = join("self_attn.o_proj")
        self._gate_up = join("mlp.gate_proj", "mlp.up_proj")
        self._down = join("mlp.down_proj")

    def attention(self, x: Tensor, layer: int, attend: Attend) -> Tensor:
        """Map normalised x [B,S,C] to [B,S,C]."""
        cfg = self._cfg
        heads = self._qkv(x).unflatten(-1, (-1, cfg.head_dim))
        q, k, v = heads.split((cfg.num_heads, cfg.num_kv_heads, cfg.num_kv_heads), dim=-2)
        return self._o(attend(layer, q, k, v).flatten(-2))

    def mlp(self, x: Tensor) -> Tensor:
        """Map normalised x [B,S,C] to [B,S,C]."""
        return self._down(ops.swiglu(*self._gate_up(x).chunk(2, dim=-1)))


def linear(names: list[str], fetch: Fetch, dtype: torch.dtype, device: torch.device, *, has_bias: bool) -> Linear:
    """Return one linear map [..., K] -> [..., N] made of several that read the same input, one behind the other.

    Args:
        names: of the layers, without ".weight".
        fetch: hands weights out.
        dtype: of activations.
        device: of the weights.
        has_bias: whether the layers have one.

    Raises:
        ConfigError: the weights are fp8, and their widths no card multiplies.
    """
    weights = [fetch(f"{name}.weight") for name in names]
    bias = torch.cat([fetch(f"{name}.bias").to(device, dtype) for name in names]) if has_bias else None
    if weights[0].dtype != FP8:
        weight = torch.cat([part.to(device, dtype) for part in weights])
        return lambda x: functional.linear(x, weight, bias)
    weight = torch.cat([part.view(torch.uint8).to(device) for part in weights]).view(FP8)
    if reason := unsupported(*weight.shape):
        raise ConfigError(f"{' + '.join(names)}: {reason}; use another precision")
    scale = torch.cat([fetch(f"{name}.weight{SCALE}").to(device) for name in names])
    return lambda x: fp8_linear(x, weight, scale, bias)
