"""Writes untrained checkpoints: a Hugging Face directory of any shape, from a seed, without torch.

For tests, benches and the first steps of a new user: everything but the training is real. Each tensor has its own
random stream, so that it depends on the seed, its name and its shape alone, and is written in blocks: a 7B checkpoint
needs no more memory than a tiny one. The injection module starts as docs/latents.md says: it hands a rightly scaled
state on.
"""

import hashlib
import json
import math
import shutil
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import tokenizers
from tokenizers import AddedToken, decoders, normalizers, pre_tokenizers, processors, trainers
from tokenizers.models import BPE

from vlrt import config
from vlrt.checkpoint import INDEX, WEIGHTS, Shape, expected_tensors
from vlrt.errors import CheckpointError, ConfigError
from vlrt.hf_config import DType, Layout, hf_config, stored_name
from vlrt.tokenizer import CHAT_TEMPLATE

Floats = npt.NDArray[np.float32]
Merge = tuple[str, str]

_VISION = {"patch_size": 14, "temporal_patch_size": 2, "spatial_merge_size": 2, "in_channels": 3, "hidden_act": "silu"}
_VISION |= {"window_size": 112, "tokens_per_second": 2.0}
_LARGE_VISION: dict[str, Any] = {"depth": 32, "hidden_size": 1280, "intermediate_size": 3420, "num_heads": 16}
_LARGE_VISION |= {"full_attention_layers": [7, 15, 23, 31]}
_SMALL_VIDEO = {"min_pixels": 4 * 28 * 28}  # so that 224 x 224 frames stay as they are: 64 tokens per temporal patch


def _decoder(
    layers: int, width: int, inner: int, heads: tuple[int, int], vocab_size: int, **rest: Any
) -> dict[str, Any]:
    head_dim = width // heads[0]
    eighth = head_dim // 16  # Qwen's split of head_dim / 2 over time, height and width: 2 : 3 : 3
    sizes = {"num_layers": layers, "hidden_size": width, "intermediate_size": inner, "vocab_size": vocab_size}
    sizes |= {"num_heads": heads[0], "num_kv_heads": heads[1], "head_dim": head_dim}
    return {**sizes, "mrope_section": [2 * eighth, 3 * eighth, 3 * eighth], **rest}


# shape -> fields of config.Vision, Decoder and Video. 3b and 7b have the sizes of Qwen2.5-VL-3B and -7B.
SHAPES: dict[str, dict[str, dict[str, Any]]] = {
    "tiny": {
        "vision": {
            "depth": 4,
            "hidden_size": 64,
            "intermediate_size": 92,
            "num_heads": 4,
            "full_attention_layers": [1, 3],
        },
        "decoder": _decoder(3, 128, 224, (4, 2), 384),
        "video": _SMALL_VIDEO,
    },
    "small": {
        "vision": {
            "depth": 8,
            "hidden_size": 640,
            "intermediate_size": 1712,
            "num_heads": 8,
            "full_attention_layers": [3, 7],
        },
        "decoder": _decoder(24, 896, 4864, (14, 2), 151_936, tie_word_embeddings=True),
        "video": _SMALL_VIDEO,
    },
    "3b": {
        "vision": _LARGE_VISION,
        "decoder": _decoder(36, 2048, 11008, (16, 2), 151_936, tie_word_embeddings=True, max_positions=128_000),
        "video": {},
    },
    "7b": {
        "vision": _LARGE_VISION,
        "decoder": _decoder(28, 3584, 18944, (28, 4), 152_064, max_positions=128_000),
        "video": {},
    },
}

DEFAULT_LATENT: dict[str, Any] = {"num_latents": 4, "rollout": "recurrent", "injection": "mlp_xattn"}

# Token -> its place after Qwen2.5-VL's first special id; the gaps are tokens that vlrt does not use.
SPECIAL_TOKENS = {
    "<|endoftext|>": 0,
    "<|im_start|>": 1,
    "<|im_end|>": 2,
    "<|vision_start|>": 9,
    "<|vision_end|>": 10,
    "<|vision_pad|>": 11,
    "<|image_pad|>": 12,
    "<|video_pad|>": 13,
    "<|latent_pad|>": 22,
    "<|latent_start|>": 23,
    "<|latent_end|>": 24,
}
QWEN_FIRST_SPECIAL = 151_643

# A few merges, so that tokens and words are not single bytes everywhere; "Ġ" is the space of byte-level BPE.
MERGES: tuple[Merge, ...] = (
    ("t", "h"),
    ("th", "e"),
    ("i", "n"),
    ("e", "r"),
    ("o", "n"),
    ("a", "n"),
    ("an", "d"),
    ("Ġ", "the"),
    ("Ġ", "a"),
    ("Ġ", "t"),
    ("in", "g"),
    ("o", "u"),
    ("y", "ou"),
    ("Ġ", "s"),
    ("Ġ", "w"),
)
_PIECES = (  # how Qwen's tokenizer splits text before BPE: contractions, words, single digits, punctuation, space
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
_BLOCK_VALUES = 4_194_304  # random values drawn at a time


def write_checkpoint(
    path: str | Path,
    *,
    shape: str = "tiny",
    family: config.Family = "qwen2_5_vl",
    seed: int = 0,
    layout: Layout = "flat",
    latent: Mapping[str, Any] | None = DEFAULT_LATENT,
    tie: bool | None = None,
    dtype: DType = "float32",
    shard_bytes: int | None = None,
    overrides: Mapping[str, Any] | None = None,
    merges: Sequence[Merge] = MERGES,
    chat_template: str = CHAT_TEMPLATE,
    randomize_all: bool = False,
) -> Path:
    """Write an untrained checkpoint directory and return its path.

    Args:
        path: a directory that does not exist yet or is empty.
        shape: a key of SHAPES.
        family: "qwen2_vl" gives the same sizes the older vision tower: LayerNorm, plain MLP of 4 widths, no windows.
        seed: of all weights.
        layout: names and config of transformers 4.x ("flat") or 5.x ("nested").
        latent: fields of config.Latent without the token ids, DEFAULT_LATENT; None: a plain model.
        tie: whether lm_head is the embedding table; None: as the shape has it.
        dtype: of every tensor; bfloat16 is rounded to nearest even.
        shard_bytes: write shards of at most this size (one tensor at least) and an index; None: one file.
        overrides: dotted fields of config.Model, e.g. {"decoder.num_layers": 1, "video.max_frames": 8}.
        merges: of the byte-level BPE tokenizer, in order, e.g. of `learn_merges`.
        chat_template: jinja2, as transformers reads it.
        randomize_all: also draw what would start at 0 or 1 (norms, biases, fc2, alpha), and move rho: for parity tests.

    Raises:
        ConfigError: an unknown shape or setting, or a directory that is not empty.
        CheckpointError: the directory cannot be written; nothing is left of it.
    """
    if layout not in ("flat", "nested") or dtype not in ("float32", "bfloat16"):
        raise ConfigError(
            f"layout is {layout!r}, dtype {dtype!r}; accepted: 'flat' or 'nested', 'float32' or 'bfloat16'"
        )
    directory = Path(path)
    try:
        taken = directory.exists() and (not directory.is_dir() or any(directory.iterdir()))
    except OSError as error:  # no permission, or a name that is too long
        raise CheckpointError(f"cannot write {directory}: {error.strerror}; choose another place") from error
    if taken:
        raise ConfigError(f"{directory} exists and is not an empty directory; accepted: a new or an empty one")
    model = fresh_model(shape, family=family, latent=latent, tie=tie, overrides=overrides, num_merges=len(merges))
    try:
        directory.mkdir(parents=True, exist_ok=True)
        _write(directory, model, layout, dtype, shard_bytes, _Weights(seed, dtype, model, randomize_all))
        _write_companions(directory, model, merges, chat_template)
    except BaseException as error:
        shutil.rmtree(directory, ignore_errors=True)
        if isinstance(error, OSError):
            raise CheckpointError(f"cannot write {directory}: {error.strerror}; choose another place") from error
        raise
    return directory


def fresh_model(
    shape: str = "tiny",
    *,
    family: config.Family = "qwen2_5_vl",
    latent: Mapping[str, Any] | None = DEFAULT_LATENT,
    tie: bool | None = None,
    overrides: Mapping[str, Any] | None = None,
    num_merges: int | None = None,
) -> config.Model:
    """Return the config of a fresh checkpoint without writing one. Arguments and errors as `write_checkpoint`.

    `num_merges` of the tokenizer (None: of MERGES) decides where the special tokens stand in a small vocabulary.
    """
    if shape not in SHAPES:
        raise ConfigError(f"shape is {shape!r}; accepted: {', '.join(SHAPES)}")
    parts: dict[str, Any] = {name: dict(part) for name, part in SHAPES[shape].items()}
    parts["vision"] = {**_VISION, **parts["vision"], "out_hidden_size": parts["decoder"]["hidden_size"]}
    if family == "qwen2_vl":
        parts["vision"] |= {"hidden_act": "quick_gelu", "intermediate_size": 4 * parts["vision"]["hidden_size"]}
        parts["vision"] |= {"window_size": 0, "full_attention_layers": [], "tokens_per_second": None}
    if tie is not None:
        parts["decoder"]["tie_word_embeddings"] = tie
    vocab_size = (overrides or {}).get("decoder.vocab_size", parts["decoder"]["vocab_size"])
    ids = special_ids(vocab_size, num_merges)
    parts["tokens"] = {f"{kind}_token_id": ids[f"<|{kind}_pad|>"] for kind in ("image", "video")}
    parts["tokens"] |= {f"vision_{end}_token_id": ids[f"<|vision_{end}|>"] for end in ("start", "end")}
    parts["tokens"] |= {"eos_token_ids": [ids["<|im_end|>"], ids["<|endoftext|>"]]}
    if latent is not None:
        parts["latent"] = {f"{kind}_token_id": ids[f"<|latent_{kind}|>"] for kind in ("pad", "start", "end")} | dict(
            latent
        )
    for name, value in (overrides or {}).items():
        *outer, last = name.split(".")
        part = parts
        for key in outer:
            part = part.setdefault(key, {})
            if not isinstance(part, dict):
                raise ConfigError(
                    f"overrides name {name}, but {key} is a value; accepted: dotted fields of config.Model"
                )
        part[last] = value
    return config.from_dict(config.Model, {"family": family, **parts})


def special_ids(vocab_size: int, num_merges: int | None = None) -> dict[str, int]:
    """Return the ids of SPECIAL_TOKENS: Qwen2.5-VL's own where the vocabulary has them, else those after the merges."""
    if vocab_size > QWEN_FIRST_SPECIAL + max(SPECIAL_TOKENS.values()):
        return {token: QWEN_FIRST_SPECIAL + place for token, place in SPECIAL_TOKENS.items()}
    first = 256 + (len(MERGES) if num_merges is None else num_merges)
    return {token: first + i for i, token in enumerate(SPECIAL_TOKENS)}


def learn_merges(texts: Iterable[str], num_merges: int) -> list[Merge]:
    """Return the byte-pair merges (arXiv 1508.07909) that fit texts best, at most `num_merges`, in order."""
    core = tokenizers.Tokenizer(BPE())
    core.normalizer, core.pre_tokenizer = normalizers.NFC(), _splitter()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=256 + num_merges, initial_alphabet=alphabet, show_progress=False, min_frequency=1
    )
    core.train_from_iterator(texts, trainer)
    return [(left, right) for left, right in json.loads(core.to_str())["model"]["merges"]]


def _write(
    directory: Path, model: config.Model, layout: Layout, dtype: DType, shard_bytes: int | None, draw: "_Weights"
) -> None:
    _write_json(directory / "config.json", hf_config(model, layout=layout, dtype=dtype))
    tensors = expected_tensors(model)
    shards = _shards(tensors, draw.value_bytes, shard_bytes)
    for file, names in shards.items():
        _write_safetensors(directory / file, {stored_name(n, layout): (n, tensors[n]) for n in names}, draw)
    if shard_bytes is not None:
        weight_map = {stored_name(name, layout): file for file, names in shards.items() for name in names}
        total = sum(math.prod(s) * draw.value_bytes for s in tensors.values())
        _write_json(directory / INDEX, {"metadata": {"total_size": total}, "weight_map": weight_map})


class _Weights:
    """Draws each tensor's values from its own stream."""

    def __init__(self, seed: int, dtype: DType, model: config.Model, randomize_all: bool) -> None:
        self._seed, self._dtype, self._all = seed, dtype, randomize_all
        self._embedding = ("model.embed_tokens.weight", (model.decoder.vocab_size, model.decoder.hidden_size))
        self.value_bytes = 4 if dtype == "float32" else 2
        self.name = "F32" if dtype == "float32" else "BF16"

    def blocks(self, name: str, shape: Shape) -> Iterator[bytes]:
        """Yield a tensor's bytes, little-endian, in blocks."""
        for values in self._values(name, shape):
            yield (values.astype("<f4") if self._dtype == "float32" else _to_bfloat16(values)).tobytes()

    def _values(self, name: str, shape: Shape) -> Iterator[Floats]:
        centre, spread = self._moments(name, shape)
        digest = hashlib.blake2b(f"{self._seed}/{name}".encode(), digest_size=16).digest()
        stream = np.random.Generator(np.random.PCG64(int.from_bytes(digest, "little")))
        left = math.prod(shape)
        while left > 0:
            size = min(left, _BLOCK_VALUES)
            drawn = stream.standard_normal(size, dtype=np.float32) if spread else np.zeros(size, dtype=np.float32)
            yield drawn * np.float32(spread) + np.float32(centre)
            left -= size

    def _moments(self, name: str, shape: Shape) -> tuple[float, float]:
        """Return mean and standard deviation: what keeps activations near 1, or the start that a module is given."""
        if name == "latent_injection.rho":
            return self._embedding_rms() * (1.25 if self._all else 1.0), 0.0
        if name == "latent_injection.alpha":
            return (0.7 if self._all else 0.0), 0.0
        if name == "latent_injection.queries":
            return 0.0, self._embedding_rms()
        if name.endswith(".bias"):
            return 0.0, (0.1 if self._all else 0.0)
        if len(shape) == 1:  # a norm
            return 1.0, (0.1 if self._all else 0.0)
        if name == "latent_injection.fc2.weight" and not self._all:
            return 0.0, 0.0
        return 0.0, 1.0 / math.sqrt(math.prod(shape[1:]))

    def _embedding_rms(self) -> float:
        total = sum(float(np.square(v, dtype=np.float64).sum()) for v in self._values(*self._embedding))
        return math.sqrt(total / math.prod(self._embedding[1]))


def _to_bfloat16(values: Floats) -> npt.NDArray[np.uint16]:
    """Return finite float32 values as the bits of bfloat16, rounded to nearest even."""
    bits = values.astype("<f4").view("<u4")
    rounded: npt.NDArray[np.uint16] = ((bits + 0x7FFF + ((bits >> 16) & 1)) >> 16).astype("<u2")
    return rounded


def _shards(tensors: Mapping[str, Shape], value_bytes: int, shard_bytes: int | None) -> dict[str, list[str]]:
    """Return file name -> tensor names, filled in order."""
    if shard_bytes is None:
        return {WEIGHTS: list(tensors)}
    shards: list[list[str]] = [[]]
    filled = 0
    for name, shape in tensors.items():
        size = math.prod(shape) * value_bytes
        if shards[-1] and filled + size > shard_bytes:
            shards.append([])
            filled = 0
        shards[-1].append(name)
        filled += size
    return {f"model-{i:05d}-of-{len(shards):05d}.safetensors": names for i, names in enumerate(shards, 1)}


def _write_safetensors(file: Path, tensors: Mapping[str, tuple[str, Shape]], draw: _Weights) -> None:
    """Write one safetensors file: header length (uint64), header (JSON, padded to 8 bytes), values."""
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    end = 0
    for stored, (_, shape) in tensors.items():
        start, end = end, end + math.prod(shape) * draw.value_bytes
        header[stored] = {"dtype": draw.name, "shape": list(shape), "data_offsets": [start, end]}
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    with file.open("wb") as out:
        out.write(len(text).to_bytes(8, "little") + text)
        for name, shape in tensors.values():
            for block in draw.blocks(name, shape):
                out.write(block)


def _write_companions(directory: Path, model: config.Model, merges: Sequence[Merge], chat_template: str) -> None:
    """Write tokenizer, chat template, preprocessor and generation settings."""
    v, ids = model.vision, special_ids(model.decoder.vocab_size, len(merges))
    (directory / "tokenizer.json").write_text(_tokenizer(ids, merges).to_str(pretty=True), encoding="utf-8")
    settings: dict[str, Any] = {"tokenizer_class": "Qwen2Tokenizer", "chat_template": chat_template}
    settings |= {"eos_token": "<|im_end|>", "pad_token": "<|endoftext|>", "bos_token": None, "unk_token": None}
    settings |= {"model_max_length": model.decoder.max_positions, "clean_up_tokenization_spaces": False}
    settings |= {"added_tokens_decoder": {str(i): {"content": t, "special": True} for t, i in ids.items()}}
    _write_json(directory / "tokenizer_config.json", settings)
    images: dict[str, Any] = {
        "image_processor_type": "Qwen2VLImageProcessor",
        "min_pixels": 3136,
        "max_pixels": 12845056,
    }
    images |= {"patch_size": v.patch_size, "temporal_patch_size": v.temporal_patch_size}
    images |= {"merge_size": v.spatial_merge_size, "image_mean": model.video.mean, "image_std": model.video.std}
    names = {"qwen2_5_vl": "Qwen2_5_VLProcessor", "qwen2_vl": "Qwen2VLProcessor"}
    _write_json(directory / "preprocessor_config.json", images | {"processor_class": names[model.family]})
    answer = {
        "eos_token_id": list(model.tokens.eos_token_ids),
        "pad_token_id": ids["<|endoftext|>"],
        "do_sample": False,
    }
    _write_json(directory / "generation_config.json", answer)


def _splitter() -> Any:
    """Return Qwen's rule of what merges never cross."""
    return pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(tokenizers.Regex(_PIECES), behavior="isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )


def _tokenizer(ids: Mapping[str, int], merges: Sequence[Merge]) -> tokenizers.Tokenizer:
    """Return a byte-level BPE tokenizer: Qwen's splitting rule, the merges, and the special tokens at their ids."""
    vocab = {character: i for i, character in enumerate(sorted(pre_tokenizers.ByteLevel.alphabet()))}
    vocab |= {left + right: 256 + i for i, (left, right) in enumerate(merges)}
    core = tokenizers.Tokenizer(BPE(vocab={**vocab, **ids}, merges=list(merges)))
    core.normalizer = normalizers.NFC()
    core.pre_tokenizer = _splitter()
    core.post_processor = processors.ByteLevel(trim_offsets=False)
    core.decoder = decoders.ByteLevel()
    core.add_special_tokens([AddedToken(token, special=True, normalized=False) for token in ids])
    return core


def _write_json(file: Path, values: Mapping[str, Any]) -> None:
    file.write_text(json.dumps(values, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
