"""Gives a checkpoint without latents what it needs to learn them: tokens, an injection module that hands states on.

Knows checkpoints and tokenizers; trains nothing.
"""

import math
import zlib
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import tokenizers
import torch
from tokenizers import AddedToken
from torch import Tensor

from vlrt import config
from vlrt.checkpoint import Checkpoint, expected_tensors
from vlrt.errors import CheckpointError, ConfigError
from vlrt.hf_config import DType
from vlrt.train import save

TOKENS = {
    "pad_token_id": "<|latent_pad|>",
    "start_token_id": "<|latent_start|>",
    "end_token_id": "<|latent_end|>",
}
_TABLES = ("model.embed_tokens.weight", "lm_head.weight")


def add_latents(checkpoint: Checkpoint, out: Path, latent: Mapping[str, Any], *, seed: int = 0) -> Path:
    """Write a checkpoint that differs from one without latents in having them, untrained.

    The tokens take the next free ids; where the tables have no row for them, rows are added that are the mean of the
    others. The injection module starts as docs/latents.md says.

    Args:
        checkpoint: without latents.
        out: a directory that does not exist yet.
        latent: fields of config.Latent without the token ids.
        seed: of the module's matrices and of the queries.

    Raises:
        CheckpointError: it has latents already, it has no tokenizer.json, or `out` cannot be written.
        ConfigError: a field is unknown or out of range.
    """
    if checkpoint.model.latent is not None:
        raise CheckpointError(f"{checkpoint.path} has latents already; train it as it is")
    file = checkpoint.path / "tokenizer.json"
    try:
        core = tokenizers.Tokenizer.from_file(str(file))
    except Exception as error:  # the library raises bare Exception on damaged and missing files
        raise CheckpointError(f"{file} is not a tokenizer: {error}") from error
    core.add_special_tokens([AddedToken(token, special=True, normalized=False) for token in TOKENS.values()])
    ids = {name: core.token_to_id(token) or 0 for name, token in TOKENS.items()}  # just added: there is an id
    old = checkpoint.model
    values = config.to_dict(old)
    values["decoder"]["vocab_size"] = max(old.decoder.vocab_size, *(i + 1 for i in ids.values()))
    values["latent"] = {**latent, **ids}
    model = config.from_dict(config.Model, values)
    if old.decoder.hidden_size % (model.latent.num_heads if model.latent else 1):
        raise ConfigError(f"latent.num_heads must divide the width {old.decoder.hidden_size}")
    dtype: DType = "float32" if checkpoint.dtype == "float32" else "bfloat16"
    texts = {"tokenizer.json": core.to_str(pretty=True)}
    return save.write(out, model, _tensors(checkpoint, model, seed), checkpoint.path, dtype=dtype, texts=texts)


def _tensors(checkpoint: Checkpoint, model: config.Model, seed: int) -> Iterator[tuple[str, Tensor]]:
    """Yield every tensor of the new checkpoint."""
    stored = set(checkpoint.names())
    for name, shape in expected_tensors(model).items():
        if name not in stored:
            yield name, _fresh(name, shape, checkpoint, seed)
            continue
        tensor = checkpoint.tensor(name)
        if name in _TABLES and shape[0] > len(tensor):
            mean = tensor.float().mean(0, keepdim=True).to(tensor.dtype)
            tensor = torch.cat([tensor, mean.expand(shape[0] - len(tensor), -1)])
        yield name, tensor


def _fresh(name: str, shape: tuple[int, ...], checkpoint: Checkpoint, seed: int) -> Tensor:
    """Return a tensor of the injection module at its start."""
    generator = torch.Generator().manual_seed(zlib.crc32(f"{seed}/{name}".encode()))
    if name == "latent_injection.rho":
        return torch.tensor(checkpoint.embedding_rms())
    if name == "latent_injection.queries":
        return checkpoint.embedding_rms() * torch.randn(shape, generator=generator)
    if name in ("latent_injection.alpha", "latent_injection.fc2.weight"):
        return torch.zeros(shape)
    if len(shape) == 1:
        return torch.ones(shape)
    return torch.randn(shape, generator=generator) / math.sqrt(shape[1])
