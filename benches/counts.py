"""Useful floating-point operations and bytes of each stage of a model: what measured times are set against.

A product of [M, K] by [K, N] is 2 M K N operations; norms, activations and softmax are left out, as is what masks hide.
"""

import itertools
from collections.abc import Sequence

from vlrt import config


def linear_parameters(decoder: config.Decoder) -> int:
    """Return the weights of all linear layers of a decoder, output head and embeddings aside."""
    width, heads = decoder.hidden_size, decoder.num_heads * decoder.head_dim
    attention = 2 * width * heads + 2 * width * decoder.num_kv_heads * decoder.head_dim
    return decoder.num_layers * (attention + 3 * width * decoder.intermediate_size)


def prefill_flops(decoder: config.Decoder, num_new: int, past: int = 0) -> float:
    """Return the operations of a decoder pass over num_new positions behind `past` older ones."""
    pairs = num_new * past + num_new * (num_new + 1) / 2
    attention = 4.0 * decoder.num_heads * decoder.head_dim * pairs * decoder.num_layers
    return 2.0 * num_new * linear_parameters(decoder) + attention


def step_bytes(
    decoder: config.Decoder,
    past: int,
    *,
    weight_bytes: float = 2,
    head_bytes: float = 2,
    value_bytes: int = 2,
    with_head: bool = False,
) -> dict[str, int]:
    """Return the bytes that a decoder pass over a few positions must read: weights, and the older keys and values.

    Args:
        decoder: its sizes.
        past: positions in the cache.
        weight_bytes: of a weight of a linear layer.
        head_bytes: of a weight of the output head.
        value_bytes: of a number in the cache.
        with_head: whether the output head runs.
    """
    weights = linear_parameters(decoder) * weight_bytes
    if with_head:
        weights += decoder.vocab_size * decoder.hidden_size * head_bytes
    return {"weights": int(weights), "cache": cache_bytes(decoder, past, value_bytes)}


def cache_bytes(decoder: config.Decoder, length: int, value_bytes: int = 4) -> int:
    """Return the bytes of keys and values of so many positions."""
    return 2 * decoder.num_layers * decoder.num_kv_heads * decoder.head_dim * length * value_bytes


def activation_bytes(
    model: config.Model, num_patches: int, length: int, *, vision_chunk: int, prefill_chunk: int
) -> int:
    """Return the bytes of the largest float32 activation: of a pass of the vision tower, or of the decoder.

    Args:
        model: its sizes.
        num_patches: of the video.
        length: of the prompt.
        vision_chunk: patches per pass of the tower.
        prefill_chunk: positions per pass of the decoder.
    """
    vision, decoder = model.vision, model.decoder
    per_patch = max(vision.intermediate_size, vision.patch_dim, vision.hidden_size)
    return 4 * max(
        min(num_patches, vision_chunk) * per_patch,
        min(length, prefill_chunk) * decoder.intermediate_size,
        length * decoder.hidden_size,
    )


def injection_bytes(model: config.Model) -> int:
    """Return the bytes of bf16 weights that the latent injection module reads for any number of latents."""
    assert model.latent is not None
    width = model.decoder.hidden_size
    inner = model.latent.intermediate_size or width
    return 2 * (2 * width * inner + width * width)


def vision_flops(vision: config.Vision, grid_thw: Sequence[int], windows: Sequence[int]) -> float:
    """Return the operations of a vision tower with a gated MLP.

    Args:
        vision: its sizes.
        grid_thw: patches per axis.
        windows: bounds of the windows, in patches.
    """
    time, rows, columns = grid_thw
    num_patches, width = time * rows * columns, vision.hidden_size
    per_patch = vision.depth * (4 * width * width + 3 * width * vision.intermediate_size) + vision.patch_dim * width
    merged = width * vision.spatial_merge_size**2
    merger = num_patches // vision.spatial_merge_size**2 * (merged * merged + merged * vision.out_hidden_size)
    full = sum(layer < vision.depth for layer in vision.full_attention_layers) if vision.window_size else vision.depth
    in_windows = sum((stop - start) ** 2 for start, stop in itertools.pairwise(windows))
    pairs = full * time * (rows * columns) ** 2 + (vision.depth - full) * in_windows
    return 2.0 * (num_patches * per_patch + merger) + 4.0 * width * pairs
