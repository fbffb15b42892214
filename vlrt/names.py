"""Every graph of a bundle and every tensor that goes in or out of it: the contract between export and backends.

Dimensions: N patches, N_v video tokens, T temporal patches (bounds: T_1 = T + 1), W_1 window bounds, S new positions,
M cache slots, L latents, T_v temporal patches of the prompt, C width, D head dim, H_kv key-value heads, V vocabulary,
S_bias and T_bias: new positions and all that they may see, or 0 where nothing is hidden from them.
Other words stand for sizes that the config fixes. Knows nothing else.
"""

from dataclasses import dataclass


@dataclass(frozen=True)
class Tensor:
    """One graph input or output: name, symbolic shape, NumPy dtype name."""

    name: str
    shape: tuple[str | int, ...]
    dtype: str = "float32"


@dataclass(frozen=True)
class Graph:
    """One graph: its name (file `<name>.onnx`), inputs and outputs in order."""

    name: str
    inputs: tuple[Tensor, ...]
    outputs: tuple[Tensor, ...]


PIXELS = Tensor("pixels", ("N", "patch_dim"))
VISION_COS = Tensor("cos", ("N", "D_vision/2"))
VISION_SIN = Tensor("sin", ("N", "D_vision/2"))
CU_SEQLENS = Tensor("cu_seqlens", ("T_1",), "int32")
WINDOW_INDEX = Tensor("window_index", ("N_v",), "int64")
WINDOW_REVERSE = Tensor("window_reverse", ("N_v",), "int64")
CU_WINDOW_SEQLENS = Tensor("cu_window_seqlens", ("W_1",), "int32")
VIDEO_TOKENS = Tensor("video_tokens", ("N_v", "C"))

INPUTS_EMBEDS = Tensor("inputs_embeds", (1, "S", "C"))
COS = Tensor("cos", ("M", "D/2"))
SIN = Tensor("sin", ("M", "D/2"))
PAST_LENGTH = Tensor("past_length", (), "int32")
ATTENTION_BIAS = Tensor("attention_bias", (1, 1, "S_bias", "T_bias"))
LAST_HIDDEN_STATE = Tensor("last_hidden_state", (1, "S", "C"))

HIDDEN = Tensor("hidden", ("S", "C"))
LOGITS = Tensor("logits", ("S", "V"))

LATENT_HIDDEN = Tensor("hidden", (1, "L", "C"))
POOLED = Tensor("pooled", (1, "T_v", "C"))
MEMORY_K = Tensor("memory_k", (1, "T_v", "C"))
MEMORY_V = Tensor("memory_v", (1, "T_v", "C"))
LATENTS = Tensor("latents", (1, "L", "C"))

LM_HEAD = Graph("lm_head", (HIDDEN,), (LOGITS,))
LATENT_MEMORY = Graph("latent_memory", (POOLED,), (MEMORY_K, MEMORY_V))


def vision(*, windowed: bool) -> Graph:
    """The vision tower; `windowed` towers (Qwen2.5-VL) also take the order and bounds of their windows."""
    inputs: tuple[Tensor, ...] = (PIXELS, VISION_COS, VISION_SIN, CU_SEQLENS)
    if windowed:
        inputs += (WINDOW_INDEX, WINDOW_REVERSE, CU_WINDOW_SEQLENS)
    return Graph("vision", inputs, (VIDEO_TOKENS,))


def decoder(num_layers: int, *, biased: bool = True) -> Graph:
    """The decoder: each cache is given as `past_*` and returned as `present_*`, which may share memory with it.

    `biased`: it takes what is added to the attention's scores, which older bundles do not: with it, several sequences
    share one cache without seeing each other.
    """
    shape = (1, "H_kv", "M", "D")
    pasts = tuple(Tensor(f"past_{kind}.{i}", shape) for kind in ("key", "value") for i in range(num_layers))
    presents = tuple(Tensor(t.name.replace("past", "present", 1), shape) for t in pasts)
    more = (ATTENTION_BIAS,) if biased else ()
    return Graph("decoder", (INPUTS_EMBEDS, COS, SIN, PAST_LENGTH, *pasts, *more), (LAST_HIDDEN_STATE, *presents))


def latent(*, looks_at_video: bool) -> Graph:
    """The latent injection module; with a look at the video it takes what `latent_memory` made of it."""
    inputs = (LATENT_HIDDEN, MEMORY_K, MEMORY_V) if looks_at_video else (LATENT_HIDDEN,)
    return Graph("latent", inputs, (LATENTS,))
