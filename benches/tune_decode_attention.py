"""Searches the decode kernel's sizes: python -m benches.tune_decode_attention --out DIR."""

from collections.abc import Iterator

import torch

from benches import tuning
from benches.bench_video_attention import HEAD_DIM, HEADS
from benches.inputs import Setting, Source


def problems(setting: Setting) -> Iterator[tuning.Problem]:
    """Yield one new position behind 8,192 tokens: what latents and answers ask for."""
    source = Source(setting.device, torch.bfloat16)
    heads = setting.pick(HEADS, (4, 2))
    checked = source.video_attention(setting.pick(777, 19), 9, heads=heads, head_dim=HEAD_DIM, spare=7)
    given = source.video_attention(setting.pick(8192, 70), 1, heads=heads, head_dim=HEAD_DIM, spare=64)
    sizes = tuning.grid(MAX_BLOCK_R=[64, 32], BLOCK_N=[32, 64, 128], num_warps=[2, 4, 8], num_stages=[2, 3, 4])
    candidates = setting.pick(sizes, sizes[:1])
    yield tuning.Problem("video_attention_", "decode_attention", HEAD_DIM, None, given, checked, candidates)


if __name__ == "__main__":
    tuning.main("decode_attention", problems)
