"""Searches the sizes of segment attention: python -m benches.tune_segment_attention --out DIR."""

from collections.abc import Iterator

import torch

from benches import tuning
from benches.bench_segment_attention import FRAME, HEAD_DIM, NUM_HEADS, WINDOW
from benches.inputs import Setting, Source


def problems(setting: Setting) -> Iterator[tuning.Problem]:
    """Yield windows and temporal patches of a vision tower."""
    source = Source(setting.device, torch.bfloat16)
    num_heads, total = setting.pick(NUM_HEADS, 2), setting.pick(32_768, 128)
    checked = source.segment_attention(setting.pick([63, 64, 1, 777, 123], [9, 7]), num_heads=2, head_dim=HEAD_DIM)
    keys = [{"ROTATE_KEYS_FIRST": False}, {"ROTATE_KEYS_FIRST": True}]
    sizes = tuning.grid(BLOCK_M=[64, 128], BLOCK_N=[64, 128], num_warps=[4, 8], num_stages=[1, 2, 3])
    candidates = [{**size, **how} for how in keys for size in sizes]
    for length, size in setting.pick(((128, WINDOW), (None, FRAME)), ((128, WINDOW),)):
        given = source.segment_attention([size] * (total // size), num_heads=num_heads, head_dim=HEAD_DIM)
        yield tuning.Problem(
            "segment_attention",
            "segment_attention",
            HEAD_DIM,
            length,
            given,
            checked,
            setting.pick(candidates, candidates[:1]),
        )


if __name__ == "__main__":
    tuning.main("segment_attention", problems)
