"""Checkpoint directories of every spelling, and each way in which one can be unfit."""

import json
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import safetensors.numpy
import torch
import transformers

from vlrt import checkpoint, fresh
from vlrt.checkpoint import Checkpoint
from vlrt.config import Latent
from vlrt.errors import CheckpointError

SMALL = {"overrides": {"decoder.num_layers": 1, "vision.depth": 2}}
CLASSES = {
    "qwen2_5_vl": transformers.Qwen2_5_VLForConditionalGeneration,
    "qwen2_vl": transformers.Qwen2VLForConditionalGeneration,
}
LATENT_KEYS = [key for key in fresh.hf_config(fresh.fresh_model()) if key.startswith("latent_")]
IDS = fresh.special_ids(384)


@pytest.fixture
def edited(make_checkpoint, tmp_path) -> Callable[..., Path]:
    """A copy of a tiny checkpoint with JSON files, tensors or their names changed."""

    def edit(
        files: dict[str, Callable[[dict], Any]] | None = None,
        tensors: Callable[[dict[str, np.ndarray]], Any] | None = None,
        **settings: Any,
    ) -> Path:
        path = tmp_path / "edited"
        shutil.copytree(make_checkpoint(**{**SMALL, **settings}).path, path)
        for name, change in (files or {}).items():
            values = json.loads((path / name).read_text()) if (path / name).exists() else {}
            changed = change(values)
            (path / name).write_text(json.dumps(values if changed is None else changed))
        if tensors is not None:
            stored = safetensors.numpy.load_file(path / checkpoint.WEIGHTS)
            changed = tensors(stored)
            safetensors.numpy.save_file(stored if changed is None else changed, path / checkpoint.WEIGHTS)
        return path

    return edit


def without_latents(values: dict, **rest: Any) -> None:
    for key in LATENT_KEYS:
        values.pop(key, None)
    values.update(rest)


def without(*keys: str) -> Callable[[dict], dict]:
    return lambda values: {key: value for key, value in values.items() if key not in keys}


def no_injection(stored: dict) -> dict:
    return {name: value for name, value in stored.items() if not name.startswith("latent_injection.")}


@pytest.mark.parametrize("family", ["qwen2_5_vl", "qwen2_vl"])
@pytest.mark.parametrize("layout", ["flat", "nested"])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_tensors_equal_transformers(make_checkpoint, family, layout, dtype):
    """Catches a name mapped to the wrong tensor, a tensor that transformers reads and we do not, and bad rounding."""
    shards = 500_000 if layout == "nested" else None
    opened = make_checkpoint(family=family, layout=layout, dtype=dtype, shard_bytes=shards)
    model, info = CLASSES[family].from_pretrained(opened.path, output_loading_info=True, dtype="auto")
    assert not info["missing_keys"]
    assert opened.dtype == dtype == str(model.dtype).removeprefix("torch.")
    theirs = {name.replace("model.visual.", "visual."): value for name, value in model.state_dict().items()}
    theirs = {name.replace("model.language_model.", "model."): value for name, value in theirs.items()}
    ours = [name for name in opened.names() if not name.startswith("latent_injection.")]
    assert set(ours) == set(theirs)
    for name in ours:
        assert torch.equal(opened.tensor(name), theirs[name]), name
        assert opened.shape(name) == tuple(theirs[name].shape)


@pytest.mark.parametrize("family", ["qwen2_5_vl", "qwen2_vl"])
@pytest.mark.parametrize("layout", ["flat", "nested"])
def test_config_equals_the_one_that_was_written(make_checkpoint, family, layout):
    """Catches a key that is read from the wrong level of the config."""
    settings = {"decoder.rope_theta": 5e5, "decoder.rms_norm_eps": 1e-5, "video.fps": 1.0, "decoder.max_positions": 777}
    settings |= {"text_position_after_video": "spatial"}
    latent = {"num_latents": 3, "rollout": "parallel", "rounds": 2, "injection": "mlp", "intermediate_size": 40}
    opened = make_checkpoint(family=family, layout=layout, overrides=settings, latent=latent)
    assert opened.model == fresh.fresh_model(family=family, overrides=settings, latent=latent)
    assert opened.name == "tiny"


def test_interim_names_and_saved_levels(edited):
    """Catches checkpoints saved by transformers 4.52: `language_model.model.*`, and keys at both levels."""

    def rename(stored):
        names = {
            name: name.replace("model.", "language_model.model.", 1) for name in stored if name.startswith("model.")
        }
        names["lm_head.weight"] = "language_model.lm_head.weight"
        return {names.get(name, name): value for name, value in stored.items()}

    def both(values):
        values["text_config"] = {
            "num_hidden_layers": 1,
            "rope_scaling": {"type": "default", "mrope_section": [4, 6, 6]},
        }
        values["num_hidden_layers"] = 99

    opened = Checkpoint.open(edited({"config.json": both}, rename))
    assert opened.model.decoder.num_layers == 1
    assert opened.tensor("lm_head.weight").shape == (384, 128)


def test_the_published_3b_config_is_understood():
    """Catches a wrong default or key for the config.json that Qwen publishes (4.x, flat)."""
    model = fresh.fresh_model("3b", latent=None)
    published = {"model_type": "qwen2_5_vl", "hidden_size": 2048, "intermediate_size": 11008, "num_attention_heads": 16}
    published |= {
        "num_hidden_layers": 36,
        "num_key_value_heads": 2,
        "max_position_embeddings": 128000,
        "vocab_size": 151936,
    }
    published |= {"sliding_window": 32768, "use_sliding_window": False, "max_window_layers": 70, "rms_norm_eps": 1e-06}
    published |= {"tie_word_embeddings": True, "rope_theta": 1000000.0, "hidden_act": "silu", "eos_token_id": 151645}
    published |= {"rope_scaling": {"type": "mrope", "mrope_section": [16, 24, 24]}, "torch_dtype": "bfloat16"}
    vision = {"depth": 32, "hidden_act": "silu", "hidden_size": 1280, "intermediate_size": 3420, "num_heads": 16}
    vision |= {"in_chans": 3, "out_hidden_size": 2048, "patch_size": 14, "spatial_merge_size": 2, "window_size": 112}
    vision |= {"spatial_patch_size": 14, "fullatt_block_indexes": [7, 15, 23, 31], "tokens_per_second": 2}
    out = checkpoint.aliases.model_from_hf(
        {**published, "vision_config": vision},
        generation={"eos_token_id": [151645, 151643]},
        preprocessor={"min_pixels": 3136, "max_pixels": 12845056, "patch_size": 14},
        added_tokens={},
        vocab_size=None,
        has_injection=False,
    )
    assert out == model


@pytest.mark.parametrize("where", ["top", "text_config", "nowhere"])
def test_tied_embeddings_are_found_wherever_they_are_said(edited, where):
    """Catches lm_head asked for where there is none, in any vintage of the config."""

    def say(values):
        values.pop("tie_word_embeddings")
        values["text_config"].pop("tie_word_embeddings")
        if where != "nowhere":
            (values if where == "top" else values["text_config"])["tie_word_embeddings"] = True

    def drop(stored):
        return {name: value for name, value in stored.items() if name != "lm_head.weight"}

    opened = Checkpoint.open(edited({"config.json": say}, drop, layout="nested"))
    assert opened.model.decoder.tie_word_embeddings
    assert "lm_head.weight" not in opened.names()


def test_untied_embeddings_need_no_word_in_the_config(edited):
    """Catches lm_head left unread where an old config is silent."""
    opened = Checkpoint.open(edited({"config.json": without("tie_word_embeddings")}))
    assert "lm_head.weight" in opened.names()


def test_the_embedding_table_decides_the_vocabulary(edited):
    """Catches Mirage's shrunken vocabulary refused (its issue 4), and ids beyond the table accepted."""

    def shrink(rows):
        def change(stored):
            for name in ("model.embed_tokens.weight", "lm_head.weight"):
                stored[name] = stored[name][:rows].copy()

        return change

    assert Checkpoint.open(edited(tensors=shrink(300))).model.decoder.vocab_size == 300


def test_ids_beyond_the_embedding_table_are_refused(edited):
    """Catches a read past the table at run time."""

    def shrink(stored):
        for name in ("model.embed_tokens.weight", "lm_head.weight"):
            stored[name] = stored[name][:200].copy()

    with pytest.raises(CheckpointError, match="accepted: 0 to vocab_size - 1 = 199"):
        Checkpoint.open(edited(tensors=shrink))


def set_to(**values):
    return lambda found: found.update(values)


def vision_set_to(**values):
    return lambda found: found["vision_config"].update(values)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (set_to(model_type="qwen3_vl"), "model_type 'qwen3_vl'; accepted: qwen2_vl, qwen2_5_vl"),
        (set_to(use_sliding_window=True, max_window_layers=0), "sliding window attention"),
        (set_to(layer_types=["sliding_attention"]), "sliding window attention"),
        (set_to(rope_scaling={"type": "yarn", "factor": 4.0}), "rope type is 'yarn'; accepted: 'default', 'mrope'"),
        (set_to(hidden_act="gelu"), "hidden_act is 'gelu'; accepted: 'silu'"),
        (vision_set_to(hidden_act="gelu"), "hidden_act 'gelu'; accepted in Qwen2.5-VL: 'silu'"),
        (set_to(quantization_config={"quant_method": "awq"}), "quantization_config"),
        (set_to(hidden_size="wide"), "hidden_size is 'wide'"),
        (set_to(num_hidden_layers=10**9), "num_hidden_layers is 1000000000; accepted: 1 to 1024"),
        (set_to(num_attention_heads=3, head_dim=None), "num_attention_heads 3"),
        (set_to(rope_scaling={"mrope_section": [1, 2, 3]}), "mrope_section"),
        (set_to(use_sliding_window=True, max_window_layers=3, num_hidden_layers="x"), "num_hidden_layers is 'x'"),
        (set_to(rope_scaling={"mrope_section": [-2, 9, 9]}), "accepted: counts of frequencies"),
        (set_to(video_sampling={"std": [0.5, 0, 0.5]}), "accepted: numbers above 0"),
        (set_to(latent_intermediate_size=-1), "latent_intermediate_size -1"),
        (vision_set_to(tokens_per_second=0), "tokens_per_second 0"),
        (set_to(rope_scaling=[1]), "rope_scaling is a list"),
        (set_to(video_sampling={"fsp": 2}), r"unknown setting video_sampling\.fsp"),
        (set_to(text_position_after_video="after"), "'largest', 'spatial'"),
        (set_to(latent_num_heads=3), "latent_num_heads is 3"),
        (set_to(latent_size=0), "num_latents is 0"),
        (set_to(latent_injection="mpl"), "injection is 'mpl'"),
        (without("latent_size"), "no latent_size"),
        (vision_set_to(patch_size=16, window_size=128), "preprocessor has patch_size 14; accepted: 16"),
        (vision_set_to(window_size=100), "window_size is 100"),
        (vision_set_to(depth=True), "vision_config.depth is True"),
        (vision_set_to(out_hidden_size=64), "out_hidden_size is 64"),
    ],
)
def test_configs_that_vlrt_cannot_run_are_refused(edited, change, message):
    """Catches a model that runs and answers nonsense, and errors that do not say what to do."""
    path = edited({"config.json": change})
    with pytest.raises(CheckpointError, match=message) as caught:
        Checkpoint.open(path)
    assert str(path) in str(caught.value)


def test_sliding_window_that_no_layer_uses_is_fine(edited):
    """Catches Qwen's own configs refused: they name a window and a first layer beyond the last."""
    Checkpoint.open(edited({"config.json": set_to(use_sliding_window=True, sliding_window=32, max_window_layers=70)}))


def add(name, like="model.norm.weight"):
    return lambda stored: stored.update({name: stored[like].copy()})


def drop(*names):
    return lambda stored: {name: value for name, value in stored.items() if not name.startswith(names)}


def replace(name, change):
    return lambda stored: stored.update({name: change(stored[name])})


Q = "model.layers.0.self_attn.q_proj.weight"


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (drop("model.norm.weight"), "1 of 54 tensors are missing: model.norm.weight"),
        (
            drop("model.layers.0.mlp", "visual.blocks.0"),
            "tensors are missing: visual.blocks.0.norm1.weight, .*, \\.\\.\\.",
        ),
        (drop("model.embed"), "missing: model.embed_tokens.weight"),
        (replace(Q, lambda t: t[:-1].copy()), rf"{Q} has shape \[127, 128\]; accepted by its config: \[128, 128\]"),
        (replace("model.embed_tokens.weight", lambda t: t.reshape(-1)), r"embed_tokens.weight has shape \[49152\]"),
        (replace(Q, lambda t: t.astype(np.float64)), f"{Q} is F64; accepted: float32, bfloat16, float16"),
        (replace(Q, lambda t: t.astype(np.int8)), f"{Q} is I8"),
        (replace("latent_injection.alpha", lambda t: t.reshape(1)), r"alpha has shape \[1\]; .*: \[\]"),
        (add("model.layers.1.input_layernorm.weight"), "1 tensors have no place"),
        (add("model.layers.0.self_attn.q_norm.weight"), "no place in a qwen2_5_vl"),
        (add("visual.pos_embed.weight"), "no place"),
        (add("lvr_head.fc1.weight"), "lvr_head.fc1.weight belongs to LVR's projection head"),
        (add("model.lvr_latent_end_emb"), "LVR's learned end embedding"),
        (add("latent_projection.weight"), "Mirage's linear latent projection"),
        (add("base_model.model.layers.0.q_proj.lora_A.weight"), "merge_and_unload"),
        (add("model.layers.0.mlp.up_proj.qweight"), "quantized weights"),
        (add("model.language_model.norm.weight"), "model.norm.weight is stored twice"),
    ],
)
def test_tensors_that_do_not_fit_are_refused(edited, change, message):
    """Catches weights that are silently left out, misread, or missed only when they are asked for."""
    with pytest.raises(CheckpointError, match=message):
        Checkpoint.open(edited(tensors=change))


def test_buffers_and_unknown_extras_are_ignored(edited):
    """Catches a checkpoint refused for rotary buffers or a value head that nothing reads."""

    def change(stored):
        for name in (
            "visual.rotary_pos_emb.inv_freq",
            "model.layers.0.self_attn.rotary_emb.inv_freq",
            "value_head.weight",
        ):
            stored[name] = np.ones(3, np.float32)

    opened = Checkpoint.open(edited(tensors=change))
    assert "value_head.weight" not in opened.names()
    with pytest.raises(CheckpointError, match="no tensor 'nothing'"):
        opened.tensor("nothing")


def test_rho_of_mode_rms_may_be_absent(edited):
    """Catches `rms` checkpoints refused for the one scalar that the embeddings give."""
    opened = Checkpoint.open(
        edited(tensors=drop("latent_injection.rho"), latent={"num_latents": 2, "injection": "rms"})
    )
    table = opened.tensor("model.embed_tokens.weight").double().numpy()
    assert opened.embedding_rms(block_rows=7) == pytest.approx(np.sqrt((table**2).mean()), rel=1e-12)
    assert opened.embedding_rms() == pytest.approx(opened.embedding_rms(block_rows=1), rel=1e-12)
    assert "latent_injection.rho" not in opened.names()


@pytest.mark.parametrize(
    ("injection", "rollout", "names"),
    [
        ("identity", "recurrent", set()),
        ("rms", "recurrent", {"rho"}),
        ("mlp", "recurrent", {"norm_in.weight", "fc1.weight", "fc2.weight", "norm_out.weight", "rho"}),
        ("identity", "parallel", {"queries"}),
        (
            "mlp_xattn",
            "parallel",
            {"norm_in.weight", "fc1.weight", "fc2.weight", "norm_out.weight", "rho", "queries", "alpha"}
            | {f"{p}_proj.weight" for p in "qkv"},
        ),
    ],
)
def test_each_mode_expects_its_own_tensors(injection, rollout, names):
    """Catches a mode that reads a weight which its checkpoints do not have."""
    latent = {"num_latents": 5, "injection": injection, "rollout": rollout, "intermediate_size": 24}
    tensors = checkpoint.expected_tensors(fresh.fresh_model(latent=latent))
    found = {name.removeprefix("latent_injection."): shape for name, shape in tensors.items() if "injection" in name}
    assert set(found) == names
    assert found.get("fc1.weight", (24, 128)) == (24, 128)
    assert found.get("fc2.weight", (128, 24)) == (128, 24)
    assert found.get("queries", (5, 128)) == (5, 128)


def imported_latent(edited, change, tokens=()):
    """Open a checkpoint without our keys and module, with `change` made to its config and tokens added."""

    def add_tokens(values):
        values["added_tokens"] += [{"content": token, "id": key} for token, key in tokens]

    def rid(values):
        without_latents(values)
        change(values)

    return Checkpoint.open(edited({"config.json": rid, "tokenizer.json": add_tokens}, no_injection)).model.latent


OWN = (IDS["<|latent_pad|>"], IDS["<|latent_start|>"], IDS["<|latent_end|>"])
MONET = [("<abs_vis_token_pad>", 300), ("<abs_vis_token>", 301), ("</abs_vis_token>", 302)]
LVR = {"lvr_id": 311, "lvr_start_id": 310, "lvr_end_id": 313, "lvr_head": False, "latent_end_token": False}


@pytest.mark.parametrize(
    ("keys", "tokens", "latent"),
    [
        ({}, [], None),
        (
            {"latent_size": 4, "compress_strategy": "average"},
            [],
            Latent(8, *OWN, injection="identity", stop="end_token"),
        ),
        (
            {"latent_size": 12, "latent_token_id": 320, "latent_start_id": 321, "latent_end_id": 322},
            [],
            Latent(12, 320, 321, 322, injection="identity", stop="end_token"),
        ),
        (LVR, [], Latent(8, 311, 310, 313, injection="identity")),
        ({**LVR, "lvr_steps": 16}, [], Latent(16, 311, 310, 313, injection="identity")),
        (
            {"lvr_id": 311},
            [("<|lvr_start|>", 310), ("<|lvr_end|>", 313)],
            Latent(8, 311, 310, 313, injection="identity"),
        ),
        ({}, MONET, Latent(10, 300, 301, 302, injection="identity", stop="end_token")),
        ({"latent_size": 8}, MONET, Latent(8, *OWN, injection="identity", stop="end_token")),
        ({"latent_size": 2, "latent_injection": "identity"}, [], Latent(2, *OWN, injection="identity")),
    ],
)
def test_the_family_is_imported(edited, keys, tokens, latent):
    """Catches another system's checkpoint read with our defaults: other slots, another stop, a module it lacks."""
    assert imported_latent(edited, lambda values: values.update(keys), tokens) == latent


def test_our_module_marks_our_checkpoints(edited):
    """Catches trained injection weights ignored where the config names no mode."""

    def forget(values):
        for key in LATENT_KEYS:
            if key not in ("latent_size",):
                values.pop(key)

    latent = Checkpoint.open(edited({"config.json": forget})).model.latent
    assert latent == Latent(4, *OWN, injection="mlp_xattn")


def test_latent_tokens_that_nobody_names_are_refused(edited):
    """Catches a checkpoint opened with ids made up for it."""
    with pytest.raises(CheckpointError, match=r"no lvr_end_id and the tokenizer has no <\|lvr_end\|>"):
        imported_latent(edited, lambda values: values.update(lvr_id=311, lvr_start_id=310))


def test_preprocessor_gives_mean_and_std_but_not_pixels(edited):
    """Catches frames blown up to the processor's own bounds, and a fine-tune's own mean ignored."""

    def change(values):
        values.update(image_mean=[0.5, 0.5, 0.5], image_std=[0.25, 0.25, 0.25], min_pixels=1, max_pixels=2)

    path = edited({"preprocessor_config.json": change, "config.json": set_to(video_sampling={"max_pixels": 200 * 784})})
    video = Checkpoint.open(path).model.video
    assert (video.mean, video.std) == ((0.5, 0.5, 0.5), (0.25, 0.25, 0.25))
    assert (video.min_pixels, video.max_pixels) == (128 * 784, 200 * 784)


def test_processor_config_of_transformers_5_is_read(edited):
    """Catches the preprocessor missed where transformers 5.x nests it in processor_config.json."""
    path = edited({"processor_config.json": lambda _: {"image_processor": {"image_mean": [0.1, 0.2, 0.3]}}})
    (path / "preprocessor_config.json").unlink()
    assert Checkpoint.open(path).model.video.mean == (0.1, 0.2, 0.3)


@pytest.mark.parametrize(
    ("generation", "eos", "expected"),
    [
        ({"eos_token_id": [272, 271]}, 5, (272, 271)),
        ({"eos_token_id": 7}, 5, (7,)),
        ({}, 5, (5,)),
        ({}, None, (IDS["<|im_end|>"],)),
    ],
)
def test_end_of_the_answer_comes_from_the_nearest_source(edited, generation, eos, expected):
    """Catches answers that never end."""
    path = edited({"generation_config.json": lambda _: generation, "config.json": set_to(eos_token_id=eos)})
    assert Checkpoint.open(path).model.tokens.eos_token_ids == expected


def test_directories_without_usable_weights_say_so(tmp_path, make_checkpoint):
    """Catches a pickle that is loaded, and messages that leave one searching."""
    with pytest.raises(CheckpointError, match="is not a directory"):
        Checkpoint.open(tmp_path / "nowhere")
    with pytest.raises(CheckpointError, match="cannot be read: File name too long"):
        Checkpoint.open(tmp_path / ("x" * 300))
    path = tmp_path / "ck"
    shutil.copytree(make_checkpoint(**SMALL).path, path)
    (path / checkpoint.WEIGHTS).unlink()
    with pytest.raises(CheckpointError, match=r"there are no weights; accepted: model\.safetensors"):
        Checkpoint.open(path)
    (path / "adapter_config.json").write_text("{}")
    with pytest.raises(CheckpointError, match="PEFT adapter"):
        Checkpoint.open(path)
    (path / "pytorch_model.bin").write_bytes(b"never read")
    with pytest.raises(CheckpointError, match="convert them: save_pretrained"):
        Checkpoint.open(path)
    (path / "config.json").unlink()
    with pytest.raises(CheckpointError, match=r"config\.json is missing"):
        Checkpoint.open(path)


def test_a_missing_shard_is_named(tmp_path):
    """Catches half a download that fails only at export."""
    path = fresh.write_checkpoint(tmp_path / "ck", shard_bytes=1_000_000)
    gone = sorted(path.glob("model-*.safetensors"))[1]
    gone.unlink()
    with pytest.raises(CheckpointError, match=f"{gone.name} is missing; model.safetensors.index.json names it"):
        Checkpoint.open(path)


def test_weights_that_may_not_be_read_are_not_called_missing(make_checkpoint, monkeypatch):
    """Catches a search for a file that is there: safetensors raises FileNotFoundError without permission, too."""

    def refuses(*_, **__):
        raise FileNotFoundError("No such file or directory")

    path = make_checkpoint(**SMALL).path
    monkeypatch.setattr(checkpoint.safetensors, "safe_open", refuses)
    with pytest.raises(CheckpointError, match=r"model\.safetensors cannot be read; check its permissions"):
        Checkpoint.open(path)


@pytest.mark.parametrize("name", ["../evil.safetensors", "/etc/passwd", "a/b.safetensors", 3, "x\x00y", ".", ""])
def test_an_index_cannot_name_files_elsewhere(tmp_path, name):
    """Catches a downloaded index that reads files outside its directory."""
    path = fresh.write_checkpoint(tmp_path / "ck", shard_bytes=1_000_000)
    index = json.loads((path / checkpoint.INDEX).read_text())
    index["weight_map"]["model.norm.weight"] = name
    (path / checkpoint.INDEX).write_text(json.dumps(index))
    with pytest.raises(CheckpointError, match=r"names in the same directory|is missing|not a whole safetensors"):
        Checkpoint.open(path)


def test_opening_and_writing_load_no_torch(tmp_path):
    """Catches an import that makes every command wait for torch."""
    code = (
        "import sys; from vlrt import checkpoint, fresh\n"
        "checkpoint.Checkpoint.open(fresh.write_checkpoint(sys.argv[1], latent={'num_latents': 1}))\n"
        "assert not {'torch', 'transformers'} & set(sys.modules)"
    )
    subprocess.run([sys.executable, "-c", code, str(tmp_path / "ck")], check=True)


def test_the_repetition_penalty_is_read(tiny_path: Path, tmp_path: Path) -> None:
    """Catches answers of published checkpoints, which set 1.05, that are not those of transformers."""
    copy = tmp_path / "copy"
    shutil.copytree(tiny_path, copy)
    assert Checkpoint.open(copy).model.repetition_penalty == 1
    for given in (1.05, None):
        file = copy / "generation_config.json"
        file.write_text(json.dumps({**json.loads(file.read_text()), "repetition_penalty": given}))
        assert Checkpoint.open(copy).model.repetition_penalty == (given or 1)
