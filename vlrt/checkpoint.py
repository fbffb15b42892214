"""Reads a trained model: a Hugging Face checkpoint directory -> config and named tensors.

Everything is checked against the config before a tensor is handed out: names, shapes, dtypes. Weights are safetensors,
memory-mapped; nothing is ever unpickled and no code of the checkpoint is run. Torch is imported where a tensor is asked
for. Knows files and names, no graph: spellings are turned into ours by `aliases.py`.
"""

import json
import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import safetensors

from vlrt import aliases, config
from vlrt.errors import CheckpointError, ConfigError

if TYPE_CHECKING:
    import torch

Shape = tuple[int, ...]

WEIGHTS, INDEX = "model.safetensors", "model.safetensors.index.json"
DTYPES = {"F32": "float32", "BF16": "bfloat16", "F16": "float16"}  # safetensors' names -> ours
MAX_JSON_BYTES = 64 * 1024**2  # tokenizer.json of a large vocabulary has 12 MB
_EMBEDDING = "model.embed_tokens.weight"
_RHO = "latent_injection.rho"


@dataclass(frozen=True)
class Stored:
    """Where one tensor lies, and under which name."""

    file: Path
    name: str
    shape: Shape
    dtype: str


@dataclass(frozen=True)
class Checkpoint:
    """A checkpoint directory whose config and tensors fit each other. `dtype` is that of the embedding table."""

    path: Path
    name: str
    model: config.Model
    dtype: str  # "float32", "bfloat16", "float16"
    _stored: Mapping[str, Stored] = field(repr=False, compare=False)
    _handles: dict[Path, Any] = field(default_factory=dict, repr=False, compare=False)

    @classmethod
    def open(cls, path: str | Path) -> "Checkpoint":
        """Read the configs and the headers of a checkpoint directory, and check them against each other.

        Raises:
            CheckpointError: files or tensors are missing, damaged, or of a kind that vlrt does not run.
        """
        directory = Path(path)
        try:
            if not directory.is_dir():
                raise CheckpointError("is not a directory; accepted: a Hugging Face checkpoint directory")
            hf = _read_json(directory / "config.json", required=True)
            stored = _read_headers(directory)
            model = aliases.model_from_hf(
                hf,
                generation=_read_json(directory / "generation_config.json"),
                preprocessor=_preprocessor(directory),
                added_tokens=_added_tokens(directory),
                vocab_size=_vocab_size(stored),
                has_injection=any(name.startswith("latent_injection.") for name in stored),
            )
            if "lm_head.weight" not in stored and not aliases.says_whether_tied(hf):
                model = _tied(model)
            _check_tensors(model, stored)
        except (CheckpointError, ConfigError) as error:
            raise CheckpointError(f"{directory}: {error}") from error
        except OSError as error:  # no permission, or a name that is too long
            raise CheckpointError(f"{directory} cannot be read: {error.strerror}") from error
        return cls(directory, directory.resolve().name, model, stored[_EMBEDDING].dtype, stored)

    def names(self) -> tuple[str, ...]:
        """Return the canonical names of the tensors that the model reads, in model order."""
        return tuple(name for name in expected_tensors(self.model) if name in self._stored)

    def shape(self, name: str) -> Shape:
        """Return the shape of a tensor.

        Raises:
            CheckpointError: there is no such tensor.
        """
        return self._find(name).shape

    def tensor(self, name: str) -> "torch.Tensor":
        """Return a tensor in its stored dtype, on the CPU, memory-mapped where the platform allows.

        Raises:
            CheckpointError: there is no such tensor, or its file has gone or changed.
        """
        where = self._find(name)
        tensor: torch.Tensor = self._read(where, lambda handle: handle.get_tensor(where.name))
        return tensor

    def weight(self, name: str) -> "torch.Tensor":
        """Return the tensor of a model's parameter: as `tensor`, or what stands for one that is not stored.

        A tied head is the embedding table; a missing rho is the RMS of that table.

        Raises:
            CheckpointError: as `tensor`.
        """
        if name == "lm_head.weight" and self.model.decoder.tie_word_embeddings:
            return self.tensor(_EMBEDDING)
        if name == _RHO and name not in self._stored:
            import torch

            return torch.tensor(self.embedding_rms())
        return self.tensor(name)

    def embedding_rms(self, block_rows: int = 8192) -> float:
        """Return the RMS of the embedding table, read in blocks of rows: rho of a checkpoint that stores none."""
        where = self._find(_EMBEDDING)
        total = 0.0
        for start in range(0, where.shape[0], block_rows):
            rows = slice(start, start + block_rows)
            block = self._read(where, lambda handle, rows=rows: handle.get_slice(where.name)[rows])
            total += float(block.double().square().sum())
        return math.sqrt(total / math.prod(where.shape))

    def _find(self, name: str) -> Stored:
        if name not in self._stored:
            raise CheckpointError(f"{self.path} has no tensor {name!r}")
        return self._stored[name]

    def _read(self, where: Stored, read: Any) -> Any:
        """Apply `read` to the open file of a tensor."""
        try:
            if where.file not in self._handles:
                self._handles[where.file] = safetensors.safe_open(where.file, framework="pt")
            return read(self._handles[where.file])
        except (safetensors.SafetensorError, OSError) as error:
            raise CheckpointError(f"{where.file}: {where.name} cannot be read: {error}") from error


def expected_tensors(model: config.Model) -> dict[str, Shape]:
    """Return canonical name -> shape of every tensor that a model reads, in the order it reads them.

    `lm_head.weight` is absent where it is tied to the embeddings. In injection mode "rms" `latent_injection.rho` is
    listed but may be absent from a checkpoint: `Checkpoint.embedding_rms` gives its value.
    """
    tensors = {f"visual.{name}": shape for name, shape in _vision_tensors(model)}
    tensors |= {f"model.{name}": shape for name, shape in _decoder_tensors(model.decoder)}
    if not model.decoder.tie_word_embeddings:
        tensors["lm_head.weight"] = (model.decoder.vocab_size, model.decoder.hidden_size)
    if model.latent is not None:
        injected = _injection_tensors(model.latent, model.decoder.hidden_size)
        tensors |= {f"latent_injection.{name}": shape for name, shape in injected.items()}
    return tensors


def _vision_tensors(model: config.Model) -> Iterator[tuple[str, Shape]]:
    v = model.vision
    width, merged = v.hidden_size, v.hidden_size * v.spatial_merge_size**2
    has_layer_norm = model.family == "qwen2_vl"  # Qwen2.5-VL: RMSNorm, no bias; and a gated MLP
    linears = {"attn.qkv": (3 * width, width), "attn.proj": (width, width)}
    if has_layer_norm:
        linears |= {"mlp.fc1": (v.intermediate_size, width), "mlp.fc2": (width, v.intermediate_size)}
    else:
        linears |= dict.fromkeys(("mlp.gate_proj", "mlp.up_proj"), (v.intermediate_size, width))
        linears |= {"mlp.down_proj": (width, v.intermediate_size)}
    yield "patch_embed.proj.weight", (width, v.in_channels, v.temporal_patch_size, v.patch_size, v.patch_size)
    for block in (f"blocks.{i}." for i in range(v.depth)):
        for norm in ("norm1", "norm2"):
            yield from _with_bias(block + norm, (width,), has_layer_norm)
        for name, shape in linears.items():
            yield from _with_bias(block + name, shape, True)
    yield from _with_bias("merger.ln_q", (width,), has_layer_norm)
    yield from _with_bias("merger.mlp.0", (merged, merged), True)
    yield from _with_bias("merger.mlp.2", (v.out_hidden_size, merged), True)


def _decoder_tensors(d: config.Decoder) -> Iterator[tuple[str, Shape]]:
    width, queries, keys = d.hidden_size, d.num_heads * d.head_dim, d.num_kv_heads * d.head_dim
    yield "embed_tokens.weight", (d.vocab_size, width)
    for layer in (f"layers.{i}." for i in range(d.num_layers)):
        yield f"{layer}input_layernorm.weight", (width,)
        yield from _with_bias(f"{layer}self_attn.q_proj", (queries, width), True)
        yield from _with_bias(f"{layer}self_attn.k_proj", (keys, width), True)
        yield from _with_bias(f"{layer}self_attn.v_proj", (keys, width), True)
        yield f"{layer}self_attn.o_proj.weight", (width, queries)
        yield f"{layer}post_attention_layernorm.weight", (width,)
        yield f"{layer}mlp.gate_proj.weight", (d.intermediate_size, width)
        yield f"{layer}mlp.up_proj.weight", (d.intermediate_size, width)
        yield f"{layer}mlp.down_proj.weight", (width, d.intermediate_size)
    yield "norm.weight", (width,)


def _injection_tensors(latent: config.Latent, width: int) -> dict[str, Shape]:
    inner = latent.intermediate_size or width
    tensors: dict[str, Shape] = {}
    if latent.injection in ("mlp", "mlp_xattn"):
        tensors |= {"norm_in.weight": (width,), "fc1.weight": (inner, width), "fc2.weight": (width, inner)}
        tensors |= {"norm_out.weight": (width,)}
    if latent.injection == "mlp_xattn":
        tensors |= dict.fromkeys(("q_proj.weight", "k_proj.weight", "v_proj.weight"), (width, width))
        tensors |= {"alpha": ()}
    if latent.injection != "identity":
        tensors |= {"rho": ()}
    if latent.rollout == "parallel":
        tensors |= {"queries": (latent.num_latents, width)}
    return tensors


def _with_bias(name: str, shape: Shape, bias: bool) -> Iterator[tuple[str, Shape]]:
    yield f"{name}.weight", shape
    if bias:
        yield f"{name}.bias", shape[:1]


def _check_tensors(model: config.Model, stored: Mapping[str, Stored]) -> None:
    """Refuse tensors that are missing, misshapen, of another dtype, or that the model would silently leave out."""
    expected = expected_tensors(model)
    optional = {_RHO} if model.latent is not None and model.latent.injection == "rms" else set()
    missing = [name for name in expected if name not in stored and name not in optional]
    if missing:
        raise CheckpointError(f"{len(missing)} of {len(expected)} tensors are missing: {_first(missing)}")
    for name in expected.keys() & stored.keys():
        if stored[name].shape != expected[name]:
            shapes = f"{list(stored[name].shape)}; accepted by its config: {list(expected[name])}"
            raise CheckpointError(f"tensor {name} has shape {shapes}")
        if stored[name].dtype not in DTYPES.values():
            raise CheckpointError(f"tensor {name} is {stored[name].dtype}; accepted: {', '.join(DTYPES.values())}")
    unread = [name for name in stored if name not in expected and name.startswith(("model.layers.", "visual."))]
    unread = [name for name in unread if "rotary" not in name and not name.endswith("inv_freq")]
    if unread:
        raise CheckpointError(
            f"{len(unread)} tensors have no place in a {model.family} of this config: {_first(unread)}"
        )


def _first(names: list[str], count: int = 3) -> str:
    return ", ".join(names[:count]) + (", ..." if len(names) > count else "")


def _read_headers(directory: Path) -> dict[str, Stored]:
    """Return canonical name -> place of every tensor in the directory's safetensors files."""
    stored: dict[str, Stored] = {}
    for file in _weight_files(directory):
        for found in _read_header(file):
            what = aliases.foreign_module(found.name)
            if what is not None:
                raise CheckpointError(f"{file.name}: tensor {found.name} belongs to {what}: not supported")
            name = aliases.canonical_name(found.name)
            if name in stored:
                raise CheckpointError(f"tensor {name} is stored twice: as {stored[name].name} and as {found.name}")
            stored[name] = found
    return stored


def _read_header(file: Path) -> list[Stored]:
    try:
        with safetensors.safe_open(file, framework="np") as handle:
            found = []
            for name in handle.keys():  # noqa: SIM118  # a safetensors handle is no mapping
                tensor = handle.get_slice(name)
                dtype = tensor.get_dtype()
                found.append(Stored(file, name, tuple(tensor.get_shape()), DTYPES.get(dtype, dtype)))
            return found
    except FileNotFoundError:  # what safetensors also says of a file that it may not read
        why = "cannot be read; check its permissions" if file.exists() else f"is missing; {INDEX} names it"
        raise CheckpointError(f"{file.name} {why}") from None
    except (safetensors.SafetensorError, OSError, ValueError, OverflowError) as error:
        raise CheckpointError(f"{file.name} is not a whole safetensors file: {error}") from error


def _weight_files(directory: Path) -> list[Path]:
    if (directory / WEIGHTS).is_file():
        return [directory / WEIGHTS]
    if (directory / INDEX).is_file():
        files = _read_json(directory / INDEX).get("weight_map")
        if not isinstance(files, dict) or not files:
            raise CheckpointError(f"{INDEX} has no weight_map; accepted: an object of tensor name -> file name")
        for name in files.values():
            if not isinstance(name, str) or Path(name).name != name or not name.isprintable():
                raise CheckpointError(f"{INDEX} names the file {name!r}; accepted: names in the same directory")
        return [directory / name for name in sorted(set(files.values()))]
    if any(directory.glob("pytorch_model*.bin")):
        raise CheckpointError(
            "the weights are pickled (pytorch_model.bin), which vlrt never loads; convert them: "
            "save_pretrained(..., safe_serialization=True)"
        )
    if (directory / "adapter_config.json").is_file():
        raise CheckpointError(
            "this is a PEFT adapter, not a model; merge it into its base model first (merge_and_unload)"
        )
    raise CheckpointError(f"there are no weights; accepted: {WEIGHTS}, or shards with {INDEX}")


def _vocab_size(stored: Mapping[str, Stored]) -> int | None:
    shape = stored[_EMBEDDING].shape if _EMBEDDING in stored else ()
    return shape[0] if len(shape) == 2 else None


def _tied(model: config.Model) -> config.Model:
    """Return the model with tied embeddings: its config is silent and it stores no lm_head."""
    values = config.to_dict(model)
    values["decoder"]["tie_word_embeddings"] = True
    return config.from_dict(config.Model, {k: v for k, v in values.items() if v is not None})


def _preprocessor(directory: Path) -> Mapping[str, Any]:
    """Return the settings of the image preprocessor, from the file of whichever transformers wrote them."""
    found = _read_json(directory / "preprocessor_config.json")
    if not found:
        nested = _read_json(directory / "processor_config.json").get("image_processor", {})
        found = nested if isinstance(nested, dict) else {}
    return found


def _added_tokens(directory: Path) -> dict[str, int]:
    """Return the tokenizer's added tokens and their ids; later files win where both name one."""
    listed = _read_json(directory / "tokenizer.json").get("added_tokens")
    found = [(entry.get("content"), entry.get("id")) for entry in _objects(listed)]
    decoder = _read_json(directory / "tokenizer_config.json").get("added_tokens_decoder")
    if isinstance(decoder, dict):
        named = [(entry.get("content"), key) for key, entry in decoder.items() if isinstance(entry, dict)]
        found += [(token, int(key)) for token, key in named if key.isdecimal() and len(key) < 10]
    return {token: key for token, key in found if isinstance(token, str) and type(key) is int}


def _objects(values: Any) -> list[dict[str, Any]]:
    return [value for value in values if isinstance(value, dict)] if isinstance(values, list) else []


def _read_json(file: Path, *, required: bool = False) -> dict[str, Any]:
    """Return the object in a JSON file; {} where the file is absent and not required."""
    if not file.is_file():
        if required:
            raise CheckpointError(f"{file.name} is missing")
        return {}
    if file.stat().st_size > MAX_JSON_BYTES:
        raise CheckpointError(f"{file.name} has {file.stat().st_size} bytes; accepted: at most {MAX_JSON_BYTES}")
    try:
        found = json.loads(file.read_bytes(), parse_int=_integer, parse_float=_number, parse_constant=_number)
    except (ValueError, RecursionError, OSError) as error:  # bad JSON or UTF-8, absurd nesting, an unreadable file
        raise CheckpointError(f"{file.name} is not readable JSON: {error}") from error
    if not isinstance(found, dict):
        raise CheckpointError(f"{file.name} holds a {type(found).__name__}; accepted: an object")
    return found


def _integer(digits: str) -> int:
    if len(digits) > 18:
        raise ValueError(f"the number {digits[:18]}... is too large")
    return int(digits)


def _number(digits: str) -> float:
    value = float(digits)
    if not math.isfinite(value):
        raise ValueError(f"{digits} is not a finite number")
    return value
