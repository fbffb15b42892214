"""video_attention over a whole prompt: python -m benches.bench_video_attention [--device cpu] [--tiny].

Rivals: PyTorch's attention, first alone (queries and keys rotated, cache in place), then with rotary and the write to
the cache counted, as ours counts them.
"""

from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor

from benches import op_bench
from benches.inputs import Arguments, Setting, Source
from vlrt.kernels import reference

HEADS, HEAD_DIM = (28, 4), 128  # of Qwen2.5-VL-7B


def cases(setting: Setting) -> Iterator[op_bench.Case]:
    """Yield prompts of 2,048 to 8,192 tokens, and a question behind a video that was read before."""
    source = Source(setting.device, torch.bfloat16)
    for past, num_new in setting.pick([(0, 2048), (0, 4096), (0, 8192), (8192, 64)], [(0, 33), (20, 40)]):
        given = source.video_attention(past, num_new, heads=setting.pick(HEADS, (4, 2)), head_dim=HEAD_DIM)
        rivals = _rivals(given, setting) if past == 0 else {}
        yield op_bench.Case(
            f"S={num_new} past={past}",
            "video_attention_",
            given,
            flops=flops(past, num_new, given[0].shape[2], HEAD_DIM),
            num_bytes=num_bytes(given),
            rivals=rivals,
            exactly=num_new <= setting.pick(4096, 1000),  # fp64 scores of all heads
        )


def flops(past: int, num_new: int, num_heads: int, head_dim: int) -> float:
    """Return the operations of causal attention: two products per pair of a query and a key that it sees."""
    return 4.0 * num_heads * head_dim * (num_new * past + num_new * (num_new + 1) / 2)


def num_bytes(given: Arguments) -> float:
    """Return bytes moved: q and out, the new keys and values read and written, older ones read."""
    q, k = given[0], given[1]
    past = int(given[7])
    row = k[0, 0].numel() * k.element_size()
    return 2.0 * q.numel() * q.element_size() + 2 * k.shape[0] * row * (2 * k.shape[1] + past)


def _rivals(given: Arguments, setting: Setting) -> dict[str, Callable[[], Any]]:
    q, k, v, cos, sin, k_cache, v_cache, _ = given
    cos, sin = cos.to(q.dtype), sin.to(q.dtype)  # as models keep them
    turned, keys = (reference.rotary(x, cos, sin).transpose(1, 2).contiguous() for x in (q, k))
    values = v.transpose(1, 2).contiguous()
    k_own, v_own = torch.empty_like(k_cache), torch.empty_like(v_cache)

    fast = op_bench.compile_once(rotate_and_store, setting)
    alone = op_bench.sdpa_rivals(turned, keys, values, setting, causal=True)
    return alone | op_bench.sdpa_rivals(
        turned, keys, values, setting, causal=True, prepare=lambda: fast(q, k, v, cos, sin, k_own, v_own)
    )


def rotate_and_store(
    q: Tensor, k: Tensor, v: Tensor, cos: Tensor, sin: Tensor, k_cache: Tensor, v_cache: Tensor
) -> Tensor:
    """Return rotated q, heads before positions, having written the caches: what SDPA leaves to others."""
    k_cache[:, :, : k.shape[1]] = reference.rotary(k, cos, sin).transpose(1, 2)
    v_cache[:, :, : v.shape[1]] = v.transpose(1, 2)
    return reference.rotary(q, cos, sin).transpose(1, 2).contiguous()


if __name__ == "__main__":
    op_bench.main("video_attention", cases)
