"""swiglu between the products of a decoder's MLP: python -m benches.bench_swiglu.

Options as in bench_video_attention. Rivals: the reference as it is, and by torch.compile.
"""

from collections.abc import Iterator

import torch

from benches import op_bench
from benches.inputs import Setting, Source
from vlrt.kernels import reference


def cases(setting: Setting) -> Iterator[op_bench.Case]:
    """Yield one row, and those of 2,048 and 8,192 tokens, of the 7B decoder."""
    source = Source(setting.device, torch.bfloat16)
    width = setting.pick(18_944, 96)
    for rows in setting.pick((1, 2048, 8192), (3,)):
        given = source.swiglu(rows, width)
        rivals = {"reference": lambda given=given: reference.swiglu(*given)}
        if rows > 1:  # one row would be compiled for itself
            rivals |= op_bench.compiled(reference.swiglu, given, setting)
        size = float(rows * width)
        yield op_bench.Case(f"rows={rows}", "swiglu", given, 5 * size, 6 * size, rivals, seconds=0.05)


if __name__ == "__main__":
    op_bench.main("swiglu", cases)
