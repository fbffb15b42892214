"""video_attention for a latent, an answer token or a parallel round: python -m benches.bench_decode_attention.

Options as in bench_video_attention. Rivals: PyTorch's attention over a cache that holds the new keys already.
"""

from collections.abc import Iterator

import torch

from benches import op_bench
from benches.bench_video_attention import HEAD_DIM, HEADS, flops, num_bytes
from benches.inputs import Setting, Source
from vlrt.kernels import reference


def cases(setting: Setting) -> Iterator[op_bench.Case]:
    """Yield 1, 2 and 9 new positions behind 2,048 and 8,192 tokens."""
    source = Source(setting.device, torch.bfloat16)
    for past in setting.pick((2048, 8192), (70,)):
        for num_new in (1, 2, 9):
            heads = setting.pick(HEADS, (4, 2))
            given = source.video_attention(past, num_new, heads=heads, head_dim=HEAD_DIM, spare=64)
            rivals = {}
            if num_new == 1:
                q, _, _, cos, sin, *caches, _ = given
                turned = reference.rotary(q, cos[past : past + 1], sin[past : past + 1]).transpose(1, 2).contiguous()
                keys, values = (torch.nan_to_num(cache[:, :, : past + 1]) for cache in caches)
                rivals = op_bench.sdpa_rivals(turned, keys, values, setting, causal=False)
            yield op_bench.Case(
                f"S={num_new} past={past}",
                "video_attention_",
                given,
                flops=flops(past, num_new, heads[0], HEAD_DIM),
                num_bytes=num_bytes(given),
                rivals=rivals,
                seconds=0.05,
            )


if __name__ == "__main__":
    op_bench.main("decode_attention", cases)
