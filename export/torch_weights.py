"""Writes the weights of a bundle for the torch backend: safetensors under Hugging Face's names, some tensors at a time.

Knows files and precisions; which tensors there are, the checkpoint says. The embedding table and the output head are
tables of the bundle (`exporter.py`), not among them.
"""

from collections.abc import Callable
from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import Tensor

from vlrt.backends.fp8 import SCALE, to_fp8
from vlrt.bundle import Precision
from vlrt.checkpoint import Checkpoint, expected_tensors

FILE_BYTES = 512 * 1024**2  # of weights that are in memory at once
TABLES = ("model.embed_tokens.weight", "lm_head.weight", "latent_injection.queries")
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16, "fp8": torch.bfloat16}


def write(checkpoint: Checkpoint, directory: Path, precision: Precision, progress: Callable[[int], None]) -> None:
    """Write every tensor that is in no table, in files `weights-<number>.safetensors`.

    Args:
        checkpoint: where they come from, one at a time.
        directory: where the files go.
        precision: fp8 stores the decoder's linear layers as float8_e4m3fn with a scale per output channel, the rest as
            bfloat16.
        progress: told the bytes written after each file.
    """
    pending: dict[str, Tensor] = {}
    size = number = 0
    names = [name for name in expected_tensors(checkpoint.model) if name not in TABLES]
    for name in names:
        for key, tensor in _stored(name, checkpoint.weight(name), precision).items():
            pending[key] = tensor
            size += tensor.numel() * tensor.element_size()
        if size >= FILE_BYTES or name == names[-1]:
            save_file(pending, directory / f"weights-{number:03d}.safetensors")
            progress(size)
            pending, size, number = {}, 0, number + 1


def _stored(name: str, tensor: Tensor, precision: Precision) -> dict[str, Tensor]:
    if precision == "fp8" and name.startswith("model.layers.") and tensor.dim() == 2:
        small, scale = to_fp8(tensor)
        return {name: small, name + SCALE: scale}
    return {name: tensor.to(DTYPES[precision]).contiguous()}
