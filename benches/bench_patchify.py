"""patchify of uint8 frames: python -m benches.bench_patchify.

Options as in bench_video_attention. Rivals: the reference as it is, and by torch.compile.
"""

from collections.abc import Iterator

import torch

from benches import op_bench
from benches.inputs import Setting, Source
from vlrt.kernels import reference


def cases(setting: Setting) -> Iterator[op_bench.Case]:
    """Yield 64 and 256 frames of 224 x 224: 2,048 and 8,192 video tokens."""
    source = Source(setting.device, torch.bfloat16)
    for num_frames in setting.pick((64, 256), (2,)):
        given = source.patchify(num_frames, *setting.pick((224, 224), (28, 56)))
        rivals = {"reference": lambda given=given: reference.patchify(*given)}
        rivals |= op_bench.compiled(reference.patchify, given, setting)
        size = float(given[0].numel())
        yield op_bench.Case(f"frames={num_frames}", "patchify", given, 3 * size, 3 * size, rivals, seconds=0.05)


if __name__ == "__main__":
    op_bench.main("patchify", cases)
