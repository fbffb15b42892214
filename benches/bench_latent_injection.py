"""latent_injection of one latent and of a parallel round: python -m benches.bench_latent_injection.

Options as in bench_video_attention. Rivals: the reference as it is, and by torch.compile.
"""

from collections.abc import Iterator

import torch

from benches import op_bench
from benches.inputs import Setting, Source
from vlrt.kernels import reference


def cases(setting: Setting) -> Iterator[op_bench.Case]:
    """Yield 1 and 8 latents that look at 32 and 128 temporal patches: videos of 2,048 and 8,192 tokens."""
    source = Source(setting.device, torch.bfloat16)
    width, num_heads = setting.pick((3584, 28), (64, 2))
    for length in (1, 8):
        for steps in setting.pick((32, 128), (5,)):
            given = source.latent_injection(length, width, steps, num_heads)
            moved = 3 * width * width + 2 * steps * width + 2 * length * width + 2 * width
            rivals = {"reference": lambda given=given: reference.latent_injection(*given)}
            yield op_bench.Case(
                f"L={length} T={steps}",
                "latent_injection",
                given,
                flops=6.0 * length * width * width + 4.0 * length * steps * width,
                num_bytes=2.0 * moved,
                rivals=rivals | (op_bench.compiled(reference.latent_injection, given, setting) if length == 1 else {}),
                seconds=0.05,
            )


if __name__ == "__main__":
    op_bench.main("latent_injection", cases)
