"""segment_attention of a vision tower, in windows and whole frames: python -m benches.bench_segment_attention.

Options as in bench_video_attention. Rivals: PyTorch's attention with the segments as a batch, which needs them equal;
first alone, then with rotary counted, as ours counts it.
"""

from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor

from benches import op_bench
from benches.inputs import Arguments, Setting, Source
from vlrt.kernels import reference

NUM_HEADS, HEAD_DIM = 16, 80  # of the towers of Qwen2.5-VL
WINDOW, FRAME = 64, 256  # patches: 112 x 112 pixels, and a temporal patch of 224 x 224


def cases(setting: Setting) -> Iterator[op_bench.Case]:
    """Yield the patches of 2,048 and 8,192 video tokens, cut into windows, frames, and larger frames."""
    source = Source(setting.device, torch.bfloat16)
    for total in setting.pick((8192, 32_768), (128,)):
        for size in setting.pick((WINDOW, FRAME, 1024), (WINDOW, 128)):
            num_heads = setting.pick(NUM_HEADS, 2)
            given = source.segment_attention([size] * (total // size), num_heads=num_heads, head_dim=HEAD_DIM)
            yield op_bench.Case(
                f"N={total} segment={size}",
                "segment_attention",
                given,
                flops=4.0 * num_heads * HEAD_DIM * total * size,
                num_bytes=4.0 * given[0].numel() * given[0].element_size(),
                rivals=_rivals(given, size, setting),
                seconds=0.1,
            )


def _rivals(given: Arguments, size: int, setting: Setting) -> dict[str, Callable[[], Any]]:
    q, k, v, cos, sin, _ = given
    cos, sin = cos.to(q.dtype), sin.to(q.dtype)
    turned = [reference.rotary(x, cos, sin) for x in (q, k)]
    batch = [x.unflatten(0, (-1, size)).transpose(1, 2).contiguous() for x in (*turned, v)]

    fast = op_bench.compile_once(rotate, setting)
    alone = op_bench.sdpa_rivals(*batch, setting, causal=False)
    return alone | op_bench.sdpa_rivals(*batch, setting, causal=False, prepare=lambda: fast(q, k, cos, sin))


def rotate(q: Tensor, k: Tensor, cos: Tensor, sin: Tensor) -> tuple[Tensor, Tensor]:
    """Return rotated queries and keys: what SDPA leaves to others."""
    return reference.rotary(q, cos, sin), reference.rotary(k, cos, sin)


if __name__ == "__main__":
    op_bench.main("segment_attention", cases)
