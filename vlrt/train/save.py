"""A trained model as a Hugging Face directory: what transformers loads, and `vlrt export` takes.

Knows names and files; adapters are merged into the weights that they adapt. Nothing half-written stays: a directory is
made beside its place and renamed.
"""

import json
import os
import shutil
import tempfile
from collections.abc import Iterable, Mapping
from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from vlrt import config
from vlrt.checkpoint import INDEX, WEIGHTS
from vlrt.errors import CheckpointError
from vlrt.hf_config import DType, hf_config

SHARD_BYTES = 5 * 1000**3
# What a checkpoint directory holds beside weights and config.json, and its successor needs unchanged.
COMPANIONS = (
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.json",
    "merges.txt",
    "chat_template.jinja",
    "chat_template.json",
    "preprocessor_config.json",
    "video_preprocessor_config.json",
    "processor_config.json",
    "generation_config.json",
)


def write(
    out: Path,
    model: config.Model,
    tensors: Iterable[tuple[str, Tensor]],
    companions: Path,
    *,
    dtype: DType = "bfloat16",
    texts: Mapping[str, str] | None = None,
    shard_bytes: int = SHARD_BYTES,
) -> Path:
    """Write a checkpoint directory and return its path.

    Args:
        out: a directory that does not exist yet.
        model: its config.
        tensors: canonical name and value of every tensor, in order; a tied head is left out by the caller.
        companions: the directory from which tokenizer and preprocessor files are copied.
        dtype: of the stored tensors.
        texts: file name and content of companions that are new.
        shard_bytes: most bytes of a file.

    Raises:
        CheckpointError: `out` exists, or cannot be written.
    """
    if out.exists():
        raise CheckpointError(f"{out} exists; accepted: a new path")
    try:
        out.parent.mkdir(parents=True, exist_ok=True)
        directory = Path(tempfile.mkdtemp(prefix=f".{out.name}.", suffix=".partial", dir=out.parent))
    except OSError as error:
        raise CheckpointError(f"cannot write to {out.parent}: {error.strerror}") from error
    try:
        _write_weights(directory, tensors, getattr(torch, dtype), shard_bytes)
        text = json.dumps(hf_config(model, layout="flat", dtype=dtype), indent=2, sort_keys=True)
        (directory / "config.json").write_text(text + "\n", encoding="utf-8")
        for name in COMPANIONS:
            if (companions / name).is_file():
                shutil.copyfile(companions / name, directory / name)
        for name, content in (texts or {}).items():
            (directory / name).write_text(content, encoding="utf-8")
        directory.chmod(0o755)
        os.rename(directory, out)
    except OSError as error:
        raise CheckpointError(f"cannot write {out}: {error.strerror or error}") from error
    finally:
        shutil.rmtree(directory, ignore_errors=True)
    return out


def merged_state(module: nn.Module) -> dict[str, Tensor]:
    """Return a module's parameters by their names without adapters, each adapter's product added to its weight."""
    state: dict[str, Tensor] = {}
    for name, parameter in module.named_parameters():
        if ".lora_" not in name:
            state[name.replace(".base_layer.", ".")] = parameter.detach()
    for name, layer in module.named_modules():
        for adapter in getattr(layer, "active_adapters", ()):
            weight = f"{name}.weight"
            state[weight] = state[weight] + layer.get_delta_weight(adapter).detach().to(state[weight])
    return state


def _write_weights(
    directory: Path, tensors: Iterable[tuple[str, Tensor]], dtype: torch.dtype, shard_bytes: int
) -> None:
    """Write tensors in order, a new file wherever one would grow beyond `shard_bytes`."""
    shards: list[list[str]] = []
    pending: dict[str, Tensor] = {}
    total = 0

    def flush() -> None:
        if pending:
            save_file(pending, directory / f"shard-{len(shards)}", metadata={"format": "pt"})
            (directory / f"shard-{len(shards)}").chmod(0o644)  # safetensors lets nobody but the owner read
            shards.append(list(pending))
            pending.clear()

    for name, value in tensors:
        stored = value.to(dtype).contiguous().clone()
        size = stored.numel() * stored.element_size()
        if pending and sum(t.numel() * t.element_size() for t in pending.values()) + size > shard_bytes:
            flush()
        pending[name] = stored
        total += size
    flush()
    names = [f"model-{i + 1:05d}-of-{len(shards):05d}.safetensors" for i in range(len(shards))]
    if len(shards) == 1:
        names = [WEIGHTS]
    for i, file in enumerate(names):
        (directory / f"shard-{i}").rename(directory / file)
    if len(shards) > 1:
        weight_map = {name: file for file, members in zip(names, shards, strict=True) for name in members}
        index = {"metadata": {"total_size": total}, "weight_map": weight_map}
        (directory / INDEX).write_text(json.dumps(index, indent=2) + "\n", encoding="utf-8")
