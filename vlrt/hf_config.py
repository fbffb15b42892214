"""A config.Model as a Hugging Face config.json, and vlrt's tensor names as stored ones: the inverse of `aliases.py`.

For whoever writes checkpoints: fresh ones, trained ones. Knows the keys of transformers 4.x and 5.x, no files.
"""

from typing import Any, Literal

from vlrt import config

Layout = Literal["flat", "nested"]  # of transformers 4.x, of 5.x
DType = Literal["float32", "bfloat16"]


def hf_config(model: config.Model, *, layout: Layout = "flat", dtype: DType = "float32") -> dict[str, Any]:
    """Return the config.json of a model: flat as transformers 4.x wrote it, or nested as 5.x does."""
    d, ids = model.decoder, model.tokens
    rope = {"mrope_section": list(d.mrope_section)}
    text: dict[str, Any] = {
        "hidden_act": "silu",
        "hidden_size": d.hidden_size,
        "intermediate_size": d.intermediate_size,
        "num_hidden_layers": d.num_layers,
        "num_attention_heads": d.num_heads,
        "num_key_value_heads": d.num_kv_heads,
        "vocab_size": d.vocab_size,
        "rms_norm_eps": d.rms_norm_eps,
        "max_position_embeddings": d.max_positions,
        "use_sliding_window": False,
        "tie_word_embeddings": d.tie_word_embeddings,
        "bos_token_id": None,
        "eos_token_id": ids.eos_token_ids[0],
    }
    top: dict[str, Any] = {"model_type": model.family, "tie_word_embeddings": d.tie_word_embeddings}
    names = {"qwen2_5_vl": "Qwen2_5_VLForConditionalGeneration", "qwen2_vl": "Qwen2VLForConditionalGeneration"}
    top |= {"architectures": [names[model.family]], "vision_config": _hf_vision(model, layout)}
    top |= {name: value for name, value in vars(ids).items() if name != "eos_token_ids"}
    top |= _hf_latent(model)
    if layout == "flat":
        return {
            **text,
            **top,
            "rope_theta": d.rope_theta,
            "rope_scaling": {"type": "mrope", **rope},
            "torch_dtype": dtype,
        }
    text |= {"model_type": f"{model.family}_text", "dtype": dtype}
    text |= {"rope_parameters": {"rope_type": "default", "rope_theta": d.rope_theta, **rope}}
    return {**top, "text_config": text, "dtype": dtype}


def _hf_vision(model: config.Model, layout: Layout) -> dict[str, Any]:
    v = model.vision
    same = (
        "depth",
        "num_heads",
        "patch_size",
        "temporal_patch_size",
        "spatial_merge_size",
        "hidden_act",
        "in_channels",
    )
    values = {name: getattr(v, name) for name in same}
    values |= {"model_type": f"{model.family}_vision" if layout == "nested" else model.family}
    if layout == "flat":
        values["in_chans"] = v.in_channels
    if model.family == "qwen2_vl":
        ratio = v.intermediate_size // v.hidden_size
        return values | {"embed_dim": v.hidden_size, "mlp_ratio": ratio, "hidden_size": v.out_hidden_size}
    sizes = ("hidden_size", "intermediate_size", "out_hidden_size", "window_size")
    values |= {name: getattr(v, name) for name in sizes}
    rate = v.tokens_per_second
    values |= {"tokens_per_second": int(rate) if rate is not None and rate.is_integer() else rate}
    return values | {"fullatt_block_indexes": list(v.full_attention_layers)}


def _hf_latent(model: config.Model) -> dict[str, Any]:
    """Return our own keys: sampling, text positions and the latent rollout."""
    defaults = config.to_dict(config.Video())
    sampling = {k: v for k, v in config.to_dict(model.video).items() if v != defaults[k]}
    values: dict[str, Any] = {"video_sampling": sampling} if sampling else {}
    if model.text_position_after_video != "largest":
        values["text_position_after_video"] = model.text_position_after_video
    if model.latent is None:
        return values
    renamed = {
        "num_latents": "size",
        "pad_token_id": "token_id",
        "start_token_id": "start_id",
        "end_token_id": "end_id",
    }
    return values | {f"latent_{renamed.get(k, k)}": v for k, v in config.to_dict(model.latent).items()}


def stored_name(name: str, layout: Layout) -> str:
    """Return the name under which a layout stores the tensor that vlrt calls `name`."""
    if layout == "flat" or name.startswith(("lm_head.", "latent_injection.")):
        return name
    return f"model.{name}" if name.startswith("visual.") else f"model.language_{name}"
