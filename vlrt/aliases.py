"""One model, many spellings: Hugging Face configs and tensor names of every vintage, turned into ours.

Knows the keys that transformers 4.x and 5.x write for Qwen2-VL and Qwen2.5-VL, and those of the latent reasoners that
build on them (docs/latents.md). Knows parsed JSON, not files: `checkpoint.py` reads them.
"""

import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, cast, get_args

from vlrt import config
from vlrt.config import Decoder, Latent, Model, Tokens, Video, Vision
from vlrt.errors import CheckpointError, ConfigError

Json = Mapping[str, Any]

MAX_LAYERS = 1024  # more is a damaged config: the largest published decoder has 80

# What transformers assumes where a config.json is silent: saved configs may leave defaults out.
_VISION_DEFAULTS = {"depth": 32, "hidden_size": 3584, "num_heads": 16, "in_channels": 3, "patch_size": 14}
_VISION_DEFAULTS |= {"spatial_merge_size": 2, "temporal_patch_size": 2}
_QWEN2_5_VISION = {"intermediate_size": 3420, "hidden_act": "silu", "tokens_per_second": 4, "window_size": 112}
_QWEN2_5_VISION |= {"out_hidden_size": 3584, "fullatt_block_indexes": [7, 15, 23, 31]}
_QWEN2_VISION = {"embed_dim": 1280, "mlp_ratio": 4, "hidden_act": "quick_gelu"}
_TEXT_DEFAULTS: dict[str, Any] = {
    "hidden_size": 8192,
    "intermediate_size": 29568,
    "num_hidden_layers": 80,
    "num_attention_heads": 64,
}
_TEXT_DEFAULTS |= {"num_key_value_heads": 8, "vocab_size": 152_064, "rms_norm_eps": 1e-5, "hidden_act": "silu"}
_TEXT_DEFAULTS |= {"max_position_embeddings": 32_768, "max_window_layers": 80}

_PREFIXES = (  # stored prefix -> canonical prefix, first match
    ("model.language_model.", "model."),  # transformers 5.x
    ("model.visual.", "visual."),
    ("model.latent_injection.", "latent_injection."),
    ("language_model.model.", "model."),  # transformers 4.52 in memory, and checkpoints saved from it
    ("language_model.lm_head.", "lm_head."),
)

_FOREIGN = (  # tensors of modules that change the output and that vlrt does not compute
    (re.compile(r"(^|\.)lvr_head\."), "LVR's projection head (lvr_head)"),
    (re.compile(r"(^|\.)lvr_latent_end_emb"), "LVR's learned end embedding (latent_end_token)"),
    (re.compile(r"(^|\.)latent_projection\."), "Mirage's linear latent projection (compress_strategy 'linear')"),
    (re.compile(r"\.lora_[AB]\."), "LoRA adapters; merge them into the weights first (peft: merge_and_unload)"),
    (
        re.compile(r"\.(qweight|qzeros|g_idx|weight_scale|weight_scale_inv|SCB)$"),
        "quantized weights; export quantizes itself",
    ),
)


@dataclass(frozen=True)
class LatentSystem:
    """How one published latent reasoner names what we call `Latent`."""

    name: str
    marks: tuple[str, ...]  # config keys that tell it; empty: its start token in the tokenizer does
    size_keys: tuple[str, ...]  # config keys of num_latents, first match
    default_size: int
    least_size: int  # a cap that the system's own decoding never goes below
    tokens: tuple[tuple[str, str], tuple[str, str], tuple[str, str]]  # pad, start, end: (config key, token string)
    stop: config.StopRule


LATENT_SYSTEMS = (
    LatentSystem(
        "LVR",
        ("lvr_id", "lvr_start_id", "lvr_end_id"),
        ("lvr_steps", "max_lvr_tokens"),
        8,
        1,
        (("lvr_id", "<|lvr|>"), ("lvr_start_id", "<|lvr_start|>"), ("lvr_end_id", "<|lvr_end|>")),
        "fixed",
    ),
    LatentSystem(
        "Mirage, 3DThinker, VideoLatent snapshot",
        ("latent_size", "latent_token_id", "latent_start_id", "latent_end_id"),
        ("latent_size",),
        8,
        8,
        (
            ("latent_token_id", "<|latent_pad|>"),
            ("latent_start_id", "<|latent_start|>"),
            ("latent_end_id", "<|latent_end|>"),
        ),
        "end_token",
    ),
    LatentSystem(
        "Monet",
        (),
        ("latent_size",),
        10,
        1,
        (
            ("abs_vis_token_pad_id", "<abs_vis_token_pad>"),
            ("abs_vis_token_id", "<abs_vis_token>"),
            ("abs_vis_token_end_id", "</abs_vis_token>"),
        ),
        "end_token",
    ),
)

_OUR_KEYS = {  # config.json key -> field of config.Latent; any of them beyond the first marks the checkpoint as ours
    "latent_size": "num_latents",
    "latent_rollout": "rollout",
    "latent_rounds": "rounds",
    "latent_injection": "injection",
    "latent_stop": "stop",
    "latent_num_heads": "num_heads",
    "latent_intermediate_size": "intermediate_size",
}
_OUR_TOKENS = LATENT_SYSTEMS[1].tokens


def canonical_name(stored: str) -> str:
    """Return vlrt's name of a tensor: the flat one that transformers 4.x wrote."""
    for prefix, replacement in _PREFIXES:
        if stored.startswith(prefix):
            return replacement + stored[len(prefix) :]
    return stored


def foreign_module(stored: str) -> str | None:
    """Return what a tensor belongs to when vlrt would compute something else without it, else None."""
    return next((what for pattern, what in _FOREIGN if pattern.search(stored)), None)


def says_whether_tied(hf: Json) -> bool:
    """Return whether a config.json says, at either level, if the output layer is the embedding table."""
    return any("tie_word_embeddings" in part for part in (hf, _object(hf, "text_config")))


def model_from_hf(
    hf: Json,
    *,
    generation: Json,
    preprocessor: Json,
    added_tokens: Mapping[str, int],
    vocab_size: int | None,
    has_injection: bool,
) -> Model:
    """Return the `Model` that a config.json and its companions describe.

    Args:
        hf: config.json.
        generation: generation_config.json, {} where absent.
        preprocessor: preprocessor_config.json, {} where absent.
        added_tokens: the tokenizer's special tokens and their ids.
        vocab_size: rows of the embedding table, which decide against the config; None to trust the config.
        has_injection: whether tensors of our injection module are stored.

    Raises:
        CheckpointError: the model is of an unknown kind, or uses what vlrt does not compute.
        ConfigError: a value is of the wrong type or out of range.
    """
    family = hf.get("model_type")
    if family not in get_args(config.Family):
        accepted = ", ".join(get_args(config.Family))
        raise CheckpointError(f"config.json has model_type {family!r}; accepted: {accepted}")
    for key in ("quantization_config", "compression_config"):
        if hf.get(key):
            raise CheckpointError(
                f"config.json has a {key}: quantized checkpoints are not read; use the original weights"
            )
    text = _object(hf, "text_config")
    text = {**_TEXT_DEFAULTS, **{k: v for k, v in hf.items() if k != "text_config"}, **text}
    _check_text(text)
    decoder = _decoder(text, hf, vocab_size)
    vision = _vision(_object(hf, "vision_config"), cast(config.Family, family))
    _check_preprocessor(preprocessor, vision)
    position = (
        {"text_position_after_video": hf["text_position_after_video"]} if "text_position_after_video" in hf else {}
    )
    latent = _latent(hf, added_tokens, has_injection)
    if latent is not None and not _fits(latent, decoder):
        raise ConfigError(
            f"latent_num_heads is {latent.num_heads}, latent_intermediate_size {latent.intermediate_size}; accepted: a "
            f"divisor of the decoder's width {decoder.hidden_size}, and 0 (that width) or more"
        )
    parts = {"vision": vision, "decoder": decoder, "latent": latent, "video": _video(hf, preprocessor)}
    parts["tokens"] = _tokens(hf, text, generation, added_tokens)
    values = {name: config.to_dict(part) for name, part in parts.items() if part is not None}
    penalty = {k: v for k, v in generation.items() if k == "repetition_penalty" and v is not None}
    return config.from_dict(Model, {"family": family, **position, **penalty, **values})


def _check_text(text: Json) -> None:
    """Refuse decoders that compute what vlrt does not."""
    if text["hidden_act"] != "silu":
        raise CheckpointError(f"the decoder's hidden_act is {text['hidden_act']!r}; accepted: 'silu'")
    layers, windowed_from = _few(text["num_hidden_layers"], "num_hidden_layers"), text["max_window_layers"]
    kinds = text.get("layer_types")
    sliding = bool(text.get("use_sliding_window")) and (not isinstance(windowed_from, int) or windowed_from < layers)
    if sliding or (isinstance(kinds, list) and any(kind != "full_attention" for kind in kinds)):
        raise CheckpointError("the decoder uses sliding window attention; accepted: full attention in every layer")


def _decoder(text: Json, hf: Json, vocab_size: int | None) -> Decoder:
    rope = _object(text, "rope_scaling") or _object(text, "rope_parameters")
    kind = rope.get("rope_type", rope.get("type", "default"))
    if kind not in ("default", "mrope"):
        raise CheckpointError(f"the decoder's rope type is {kind!r}; accepted: 'default', 'mrope'")
    heads = text["num_attention_heads"]
    width = text["hidden_size"]
    head_dim = text.get("head_dim")
    if head_dim is None:
        if not (_is_count(width) and _is_count(heads)) or width % heads:
            raise CheckpointError(
                f"hidden_size is {width!r}, num_attention_heads {heads!r}; accepted: a multiple, a divisor"
            )
        head_dim = width // heads
    tie = any(part.get("tie_word_embeddings") is True for part in (hf, _object(hf, "text_config")))  # as transformers
    kv_heads = text["num_key_value_heads"]
    values = {
        "hidden_size": width,
        "intermediate_size": text["intermediate_size"],
        "num_layers": text["num_hidden_layers"],
        "num_heads": heads,
        "num_kv_heads": heads if kv_heads is None else kv_heads,
        "head_dim": head_dim,
        "vocab_size": text["vocab_size"] if vocab_size is None else vocab_size,
        "mrope_section": rope.get("mrope_section", [16, 24, 24]),
        "rope_theta": rope.get("rope_theta", text.get("rope_theta", 1e6)),
        "rms_norm_eps": text["rms_norm_eps"],
        "max_positions": text["max_position_embeddings"],
        "tie_word_embeddings": tie,
    }
    decoder = config.from_dict(Decoder, values, path="decoder.")
    if min(decoder.mrope_section) < 0:
        raise ConfigError(f"mrope_section is {list(decoder.mrope_section)}; accepted: counts of frequencies, 0 or more")
    return decoder


def _vision(hf: Json, family: config.Family) -> Vision:
    hf = {"in_channels": hf["in_chans"], **hf} if "in_chans" in hf else hf
    hf = {**_VISION_DEFAULTS, **(_QWEN2_5_VISION if family == "qwen2_5_vl" else _QWEN2_VISION), **hf}
    same = ("num_heads", "in_channels", "spatial_merge_size", "hidden_act")
    values = {key: hf[key] for key in same}
    values["depth"] = _few(hf["depth"], "vision_config.depth")
    values |= {key: _square(hf[key]) for key in ("patch_size", "temporal_patch_size")}
    if family == "qwen2_vl":
        width, ratio = hf["embed_dim"], hf["mlp_ratio"]
        if not (_is_count(width) and isinstance(ratio, int | float) and 0 < ratio < MAX_LAYERS):
            raise CheckpointError(f"vision_config has embed_dim {width!r} and mlp_ratio {ratio!r}; accepted: above 0")
        sizes = {"hidden_size": width, "intermediate_size": int(width * ratio), "out_hidden_size": hf["hidden_size"]}
        return config.from_dict(Vision, {**values, **sizes}, path="vision.")
    if hf["hidden_act"] != "silu":  # SwiGLU: the tower has no other
        raise CheckpointError(f"vision_config has hidden_act {hf['hidden_act']!r}; accepted in Qwen2.5-VL: 'silu'")
    sizes = {key: hf[key] for key in ("hidden_size", "intermediate_size", "out_hidden_size", "window_size")}
    sizes |= {"tokens_per_second": hf["tokens_per_second"], "full_attention_layers": hf["fullatt_block_indexes"]}
    if not isinstance(hf["tokens_per_second"], int | float) or not hf["tokens_per_second"] > 0:
        raise CheckpointError(f"vision_config has tokens_per_second {hf['tokens_per_second']!r}; accepted: above 0")
    return config.from_dict(Vision, {**values, **sizes}, path="vision.")


def _check_preprocessor(preprocessor: Json, vision: Vision) -> None:
    """Refuse a preprocessor whose patches the vision tower could not read."""
    sizes = {"patch_size": vision.patch_size, "temporal_patch_size": vision.temporal_patch_size}
    sizes |= {"merge_size": vision.spatial_merge_size}
    for key, size in sizes.items():
        if _square(preprocessor.get(key, size)) != size:
            raise CheckpointError(f"preprocessor has {key} {preprocessor[key]!r}; accepted: {size}, as in config.json")
    for key in ("do_rescale", "do_normalize"):
        if preprocessor.get(key, True) is not True:
            raise CheckpointError(f"preprocessor has {key} {preprocessor[key]!r}; accepted: true")


def _video(hf: Json, preprocessor: Json) -> Video:
    """Sampling of the checkpoint: qwen-vl-utils' defaults, its own mean and std, then its `video_sampling`.

    The preprocessor's min_pixels and max_pixels are those of its second resize, a no-op after the first: not read.
    """
    values = {
        ours: preprocessor[theirs]
        for theirs, ours in (("image_mean", "mean"), ("image_std", "std"))
        if theirs in preprocessor
    }
    video = config.from_dict(Video, {**values, **_object(hf, "video_sampling")}, path="video_sampling.")
    if min(video.std) <= 0:
        raise ConfigError(f"the preprocessor's image_std is {list(video.std)}; accepted: numbers above 0")
    return video


def _tokens(hf: Json, text: Json, generation: Json, added_tokens: Mapping[str, int]) -> Tokens:
    defaults = {"image_token_id": 151655, "video_token_id": 151656}
    defaults |= {"vision_start_token_id": 151652, "vision_end_token_id": 151653}
    eos = generation.get("eos_token_id", text.get("eos_token_id"))
    if eos is None:
        eos = added_tokens.get("<|im_end|>")
    if eos is None or eos == []:
        raise CheckpointError(
            "no end of the answer: neither generation_config.json nor config.json has an eos_token_id, and the "
            "tokenizer has no <|im_end|>"
        )
    ids = {key: hf.get(key, default) for key, default in defaults.items()}
    return config.from_dict(Tokens, {**ids, "eos_token_ids": eos if isinstance(eos, list) else [eos]}, path="tokens.")


def _latent(hf: Json, added_tokens: Mapping[str, int], has_injection: bool) -> Latent | None:
    """Return how the checkpoint reasons in latents, None where it has no latents."""
    if has_injection or any(key in hf for key in list(_OUR_KEYS)[1:]):
        if "latent_size" not in hf:
            raise CheckpointError(
                "config.json has settings of a latent rollout but no latent_size (the number of latents)"
            )
        values = {field: hf[key] for key, field in _OUR_KEYS.items() if key in hf}
        return _with_tokens(values, "vlrt", _OUR_TOKENS, hf, added_tokens)
    for system in LATENT_SYSTEMS:
        marked = any(key in hf for key in system.marks)
        if marked or (not system.marks and system.tokens[1][1] in added_tokens):
            size = next((hf[key] for key in system.size_keys if hf.get(key) is not None), system.default_size)
            if not _is_count(size):
                raise CheckpointError(f"{system.name}: the number of latents is {size!r}; accepted: 1 to 1024")
            size = max(size, system.least_size)
            values = {"num_latents": size, "injection": "identity", "stop": system.stop}
            return _with_tokens(values, system.name, system.tokens, hf, added_tokens)
    return None


def _fits(latent: Latent, decoder: Decoder) -> bool:
    return latent.num_heads > 0 and decoder.hidden_size % latent.num_heads == 0 and latent.intermediate_size >= 0


def _with_tokens(
    values: dict[str, Any], system: str, tokens: tuple[tuple[str, str], ...], hf: Json, added_tokens: Mapping[str, int]
) -> Latent:
    """Add the ids of pad, start and end: by config key, else by token string."""
    for field, (key, token) in zip(("pad_token_id", "start_token_id", "end_token_id"), tokens, strict=True):
        values[field] = hf.get(key, added_tokens.get(token))
        if values[field] is None:
            raise CheckpointError(f"{system} checkpoint: config.json has no {key} and the tokenizer has no {token}")
    return config.from_dict(Latent, values, path="latent.")


def _object(values: Json, key: str) -> Json:
    """Return values[key] as an object, {} where absent or null."""
    found = values.get(key)
    if found is None:
        return {}
    if not isinstance(found, Mapping):
        raise CheckpointError(f"{key} is a {type(found).__name__}; accepted: an object")
    return found


def _few(value: Any, name: str) -> int:
    if not _is_count(value) or value > MAX_LAYERS:
        raise CheckpointError(f"{name} is {value!r}; accepted: 1 to {MAX_LAYERS}")
    return cast(int, value)


def _is_count(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value > 0


def _square(value: Any) -> Any:
    """Return one number for a size that transformers 5.x may write as a list of equal numbers."""
    return value[0] if isinstance(value, list) and value and all(v == value[0] for v in value) else value
