"""Searches the prefill kernel's sizes: python -m benches.tune_video_attention --out DIR."""

from collections.abc import Iterator

import torch

from benches import tuning
from benches.bench_video_attention import HEAD_DIM, HEADS
from benches.inputs import Setting, Source


def problems(setting: Setting) -> Iterator[tuning.Problem]:
    """Yield prompts, and questions behind a video that was read before."""
    source = Source(setting.device, torch.bfloat16)
    heads = setting.pick(HEADS, (4, 2))
    checked = source.video_attention(*setting.pick((123, 777), (3, 35)), heads=heads, head_dim=HEAD_DIM)
    long = tuning.grid(TMA=[1, 0], BLOCK_M=[128], BLOCK_N=[128, 64], num_warps=[8, 4], num_stages=[2, 3, 4])
    short = tuning.grid(TMA=[1, 0], BLOCK_M=[64], BLOCK_N=[128, 64, 32], num_warps=[4, 8], num_stages=[2, 3])
    for length, past, num_new, candidates in setting.pick(
        ((None, 0, 4096, long), (127, 8192, 64, short)), ((None, 0, 33, short[:1]),)
    ):
        given = source.video_attention(past, num_new, heads=heads, head_dim=HEAD_DIM)
        yield tuning.Problem("video_attention_", "video_attention", HEAD_DIM, length, given, checked, candidates)


if __name__ == "__main__":
    tuning.main("video_attention", problems)
