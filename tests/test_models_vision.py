"""Vision towers against transformers', on random weights of many shapes and grids."""

import numpy as np
import pytest
import torch

from tests.closeness import assert_close
from tests.oracle import oracles
from vlrt.backends.reference import ReferenceBackend
from vlrt.models import registry

# name -> family and what differs from the tiny shape; each row a layout that a tower could get wrong alone
TOWERS = {
    "windows": ("qwen2_5_vl", {}),
    "windows of one token": ("qwen2_5_vl", {"window_size": 28}),
    "every layer full": ("qwen2_5_vl", {"full_attention_layers": [0, 1, 2, 3]}),
    "no layer full": ("qwen2_5_vl", {"window_size": 56, "full_attention_layers": [], "depth": 1}),
    "first layer full": ("qwen2_5_vl", {"window_size": 84, "full_attention_layers": [0], "depth": 2}),
    "odd sizes": ("qwen2_5_vl", {"hidden_size": 60, "num_heads": 3, "intermediate_size": 63, "depth": 2}),
    "head dim 80": ("qwen2_5_vl", {"hidden_size": 160, "num_heads": 2, "depth": 2}),
    "squares of 3": ("qwen2_5_vl", {"spatial_merge_size": 3, "window_size": 84, "depth": 2}),
    "small patches": ("qwen2_5_vl", {"patch_size": 7, "temporal_patch_size": 1, "depth": 2}),
    "qwen2": ("qwen2_vl", {}),
    "qwen2, head dim 80": ("qwen2_vl", {"hidden_size": 160, "num_heads": 2, "intermediate_size": 320, "depth": 2}),
    "qwen2, gelu": ("qwen2_vl", {"hidden_act": "gelu", "hidden_size": 36, "num_heads": 1, "intermediate_size": 108}),
}
GRIDS = [(1, 1, 1), (3, 1, 7), (2, 5, 3), (1, 9, 11)]  # in tokens per axis: one alone, and windows ragged on both edges


def a_checkpoint(make_checkpoint, family, sizes):
    overrides = {f"vision.{name}": value for name, value in sizes.items()}
    return make_checkpoint(family=family, overrides={**overrides, "decoder.num_layers": 1})


def some_pixels(vision, grid_thw, seed=0):
    random = np.random.default_rng(seed)
    return random.standard_normal((int(np.prod(grid_thw)), vision.patch_dim)).astype(np.float32)


@pytest.mark.parametrize("tokens", GRIDS, ids=str)
@pytest.mark.parametrize("tower", TOWERS)
def test_video_tokens_equal_transformers(make_checkpoint, tower, tokens):
    """Catches a window, a rotary row, a norm, an activation or the order of tokens that differs from the original."""
    checkpoint = a_checkpoint(make_checkpoint, *TOWERS[tower])
    merge = checkpoint.model.vision.spatial_merge_size
    grid_thw = (tokens[0], tokens[1] * merge, tokens[2] * merge)
    pixels = some_pixels(checkpoint.model.vision, grid_thw)
    plain, exact = (oracle.vision(torch.from_numpy(pixels), grid_thw) for oracle in oracles(checkpoint))
    assert_close(ReferenceBackend(checkpoint).encode(pixels, grid_thw), exact, plain)


@pytest.mark.parametrize("family", ["qwen2_vl", "qwen2_5_vl"])
def test_temporal_patches_do_not_see_each_other(make_checkpoint, family):
    """Catches attention across time, which would make a video encoded in parts differ from one encoded whole."""
    checkpoint = a_checkpoint(make_checkpoint, family, {})
    backend = ReferenceBackend(checkpoint)
    pixels = some_pixels(checkpoint.model.vision, (5, 6, 10))
    whole = backend.encode(pixels, (5, 6, 10))
    parts = [(0, 1), (1, 3), (3, 5)]
    out = torch.cat([backend.encode(pixels[60 * a : 60 * b], (b - a, 6, 10)) for a, b in parts])
    plain, exact = (oracle.vision(torch.from_numpy(pixels), (5, 6, 10)) for oracle in oracles(checkpoint))
    assert_close(out, exact, plain)
    pixels[120:180] = np.nan
    poisoned = backend.encode(pixels, (5, 6, 10))
    assert poisoned[30:45].isnan().all()
    rest = [*range(30), *range(45, 75)]
    assert_close(poisoned[rest], whole[rest])


@pytest.mark.parametrize("family", ["qwen2_vl", "qwen2_5_vl"])
def test_a_conv3d_kernel_is_read_as_a_matrix(make_checkpoint, family):
    """Catches a kernel flattened in another order than the patches: [C, time, row, column]."""
    checkpoint = a_checkpoint(make_checkpoint, family, {})
    vision, kernel = checkpoint.model.vision, checkpoint.tensor("visual.patch_embed.proj.weight")
    assert kernel.ndim == 5
    module = registry.build(checkpoint.model).visual.patch_embed
    registry.load(module, checkpoint.weight, prefix="visual.patch_embed.")
    patches = torch.from_numpy(some_pixels(vision, (1, 6, 2)))
    shape = (vision.in_channels, vision.temporal_patch_size, vision.patch_size, vision.patch_size)
    plain, exact = (
        torch.nn.functional.conv3d(patches.unflatten(-1, shape).to(dtype), kernel.to(dtype), stride=kernel.shape[2:])
        for dtype in (torch.float32, torch.float64)
    )
    assert_close(module(patches), exact.flatten(1), plain.flatten(1))
