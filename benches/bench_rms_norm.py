"""rms_norm and add_rms_norm between the blocks of a decoder: python -m benches.bench_rms_norm.

Options as in bench_video_attention. Rivals: PyTorch's own rms_norm, and the reference by torch.compile.
"""

from collections.abc import Iterator

import torch
from torch.nn import functional

from benches import op_bench
from benches.inputs import Setting, Source
from vlrt.kernels import reference


def cases(setting: Setting) -> Iterator[op_bench.Case]:
    """Yield one row, and those of 2,048 and 8,192 tokens, of the 7B decoder."""
    source = Source(setting.device, torch.bfloat16)
    width = setting.pick(3584, 96)
    for rows in setting.pick((1, 2048, 8192), (3,)):
        x, weight, eps = given = source.rms_norm(rows, width)
        rivals = {
            "torch_rms_norm": lambda x=x, weight=weight, eps=eps: functional.rms_norm(x, weight.shape, weight, eps)
        }
        if rows > 1:  # one row would be compiled for itself
            rivals |= op_bench.compiled(reference.rms_norm, given, setting)
        moved = 4.0 * rows * width
        yield op_bench.Case(f"rows={rows}", "rms_norm", given, 4.0 * rows * width, moved, rivals, seconds=0.05)
        given = source.add_rms_norm(rows, width)
        rivals = {"reference": lambda given=given: reference.add_rms_norm(*given)}
        if rows > 1:
            rivals |= op_bench.compiled(reference.add_rms_norm, given, setting)
        yield op_bench.Case(f"rows={rows}", "add_rms_norm", given, 5.0 * rows * width, 2 * moved, rivals, seconds=0.05)


if __name__ == "__main__":
    op_bench.main("rms_norm", cases)
