"""Fresh checkpoints: deterministic, well scaled, of the exact published sizes, and readable by everybody."""

import errno
import json
import math
from pathlib import Path

import ml_dtypes
import numpy as np
import pytest
import safetensors.numpy
import torch
import transformers
from hypothesis import given, settings
from hypothesis import strategies as st

from vlrt import fresh
from vlrt.checkpoint import INDEX, WEIGHTS, Checkpoint, expected_tensors
from vlrt.errors import CheckpointError, ConfigError
from vlrt.tokenizer import Tokenizer


def weights(path: Path) -> dict[str, np.ndarray]:
    found: dict[str, np.ndarray] = {}
    for file in path.glob("*.safetensors"):
        found |= safetensors.numpy.load_file(file)
    return found


def same(a, b):
    return set(a) == set(b) and all(np.array_equal(a[name], b[name]) for name in a)


def test_weights_depend_on_seed_and_name_alone(tmp_path):
    """Catches a shared random stream: another layout, sharding or depth would change every later tensor."""
    whole = weights(fresh.write_checkpoint(tmp_path / "a"))
    shards = weights(fresh.write_checkpoint(tmp_path / "b", shard_bytes=300_000))
    assert same(whole, shards)
    shallow = weights(fresh.write_checkpoint(tmp_path / "c", overrides={"decoder.num_layers": 1, "vision.depth": 1}))
    assert same(shallow, {name: whole[name] for name in shallow})
    other = weights(fresh.write_checkpoint(tmp_path / "d", seed=1))
    assert not np.array_equal(other["lm_head.weight"], whole["lm_head.weight"])
    name = "model.layers.0.mlp.up_proj.weight"
    assert not np.array_equal(whole[name], whole[name.replace("up", "gate")])


def test_blocks_do_not_change_the_values(tmp_path, monkeypatch):
    """Catches a stream that restarts at each block: the rows of a large table would repeat."""
    whole = weights(fresh.write_checkpoint(tmp_path / "a"))
    monkeypatch.setattr(fresh, "_BLOCK_VALUES", 1001)
    assert same(whole, weights(fresh.write_checkpoint(tmp_path / "b")))


def test_a_fresh_injection_module_hands_a_scaled_state_on(tmp_path):
    """Catches a module that starts as anything but the identity at the embeddings' scale."""
    found = weights(fresh.write_checkpoint(tmp_path / "a"))
    assert not found["latent_injection.fc2.weight"].any()
    assert found["latent_injection.alpha"].item() == 0
    assert (found["latent_injection.norm_in.weight"] == 1).all()
    rms = np.sqrt(np.square(found["model.embed_tokens.weight"], dtype=np.float64).mean())
    assert found["latent_injection.rho"].item() == pytest.approx(rms, rel=1e-6)
    assert found["latent_injection.fc1.weight"].std() > 0.01


def test_randomize_all_leaves_nothing_at_its_start(tmp_path):
    """Catches parity tests that pass because a bias, a norm or a gate does nothing."""
    path = fresh.write_checkpoint(tmp_path / "a", randomize_all=True, latent={"num_latents": 3, "rollout": "parallel"})
    for name, value in weights(path).items():
        assert value.std() > 0.001 or value.size == 1, name
        assert value.any(), name
    opened = Checkpoint.open(path)
    assert opened.tensor("latent_injection.rho").item() != pytest.approx(opened.embedding_rms(), rel=0.1)


@pytest.mark.parametrize("family", ["qwen2_5_vl", "qwen2_vl"])
def test_activations_keep_their_scale(make_checkpoint, family):
    """Catches weights under which activations die or explode, so that parity says nothing."""
    path = make_checkpoint(family=family).path
    classes = {
        "qwen2_5_vl": transformers.Qwen2_5_VLForConditionalGeneration,
        "qwen2_vl": transformers.Qwen2VLForConditionalGeneration,
    }
    model = classes[family].from_pretrained(path).eval()
    with torch.no_grad():
        logits = model(input_ids=torch.arange(3, 60)[None]).logits[0]
        pixels = torch.randn(64, 1176)
        video = model.model.visual(pixels, grid_thw=torch.tensor([[1, 8, 8]])).pooler_output
    for values in (logits, video):
        assert 0.2 < values.std() < 5
    assert len(set(logits.argmax(-1).tolist())) > 20


@settings(max_examples=200, deadline=None)
@given(st.lists(st.floats(width=32, allow_nan=False, allow_infinity=False), min_size=1, max_size=64))
def test_bfloat16_rounds_to_nearest_even(values):
    """Catches truncation, and ties that all round up."""
    array = np.array(values, dtype=np.float32)
    np.testing.assert_array_equal(fresh._to_bfloat16(array), array.astype(ml_dtypes.bfloat16).view(np.uint16))


def test_bfloat16_is_the_rounded_float32(tmp_path):
    """Catches a second draw in place of a rounding."""
    full = weights(fresh.write_checkpoint(tmp_path / "a"))
    half = weights(fresh.write_checkpoint(tmp_path / "b", dtype="bfloat16"))
    for name, value in full.items():
        np.testing.assert_array_equal(half[name], value.astype(ml_dtypes.bfloat16), err_msg=name)


@pytest.mark.parametrize(("shape", "billions"), [("3b", 3.754_622_976), ("7b", 8.292_166_656)])
def test_large_shapes_have_the_published_number_of_parameters(shape, billions):
    """Catches a wrong size in the shapes that benches call 3B and 7B."""
    tensors = expected_tensors(fresh.fresh_model(shape, latent=None))
    assert sum(map(math.prod, tensors.values())) == round(billions * 1e9)


def test_small_has_the_head_dims_of_the_real_towers():
    """Catches a bench shape whose kernels are not those of the real models."""
    model = fresh.fresh_model("small")
    assert (model.decoder.head_dim, model.vision.head_dim) == (64, 80)
    assert model.vision.full_attention_layers == (3, 7)
    assert model.tokens.video_token_id == 151656
    assert (model.latent.pad_token_id, model.latent.start_token_id, model.latent.end_token_id) == (
        151665,
        151666,
        151667,
    )


@pytest.mark.parametrize("vocab_size", [384, 151_936])
def test_tokenizers_agree_with_transformers(tmp_path, vocab_size):
    """Catches special tokens at other ids, and another way of splitting text."""
    size = {"vocab_size": vocab_size, "hidden_size": 8, "head_dim": 8, "num_heads": 1, "num_kv_heads": 1}
    size |= {"num_layers": 1, "intermediate_size": 8, "mrope_section": [1, 1, 2]}
    overrides = {f"decoder.{key}": value for key, value in size.items()} | {
        "vision.out_hidden_size": 8,
        "vision.depth": 1,
    }
    path = fresh.write_checkpoint(tmp_path / "ck", overrides=overrides)
    theirs, ours = transformers.AutoTokenizer.from_pretrained(path), Tokenizer.open(path)
    for token, key in fresh.special_ids(vocab_size).items():
        assert theirs.convert_tokens_to_ids(token) == ours.token_id(token) == key
    text = "The others wander in 1234 rooms;\n\n  naïve ﬁ 日本語 🎬 you're<|vision_start|><|video_pad|>the end"
    assert ours.encode(text, control=True) == theirs.encode(text)
    assert ours.decode(theirs.encode(text)) == theirs.decode(theirs.encode(text), skip_special_tokens=True)
    assert ours.num_tokens == max(fresh.special_ids(vocab_size).values()) + 1 <= vocab_size
    assert theirs.eos_token == "<|im_end|>"


def test_shards_and_index_are_whole(tmp_path):
    """Catches a shard beyond its size, and an index that disagrees with the files."""
    path = fresh.write_checkpoint(tmp_path / "ck", layout="nested", shard_bytes=400_000)
    index = json.loads((path / INDEX).read_text())
    assert not (path / WEIGHTS).exists()
    total = 0
    for file in set(index["weight_map"].values()):
        found = safetensors.numpy.load_file(path / file)
        assert set(found) == {name for name, where in index["weight_map"].items() if where == file}
        size = sum(value.nbytes for value in found.values())
        assert size <= 400_000 or len(found) == 1
        total += size
    assert total == index["metadata"]["total_size"]


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"shape": "huge"}, "shape is 'huge'; accepted: tiny, small, 3b, 7b"),
        ({"layout": "deep"}, "layout is 'deep'"),
        ({"dtype": "float16"}, "dtype 'float16'"),
        ({"family": "qwen3_vl"}, "'qwen2_vl', 'qwen2_5_vl'"),
        ({"overrides": {"decoder.layers": 3}}, r"unknown setting decoder\.layers"),
        ({"overrides": {"decoder.num_layers.x": 3}}, r"overrides name decoder\.num_layers\.x"),
        ({"latent": {"slots": 3}}, r"unknown setting latent\.slots"),
    ],
)
def test_unknown_settings_are_refused_before_anything_is_written(tmp_path, settings, message):
    """Catches a typo that gives the default checkpoint, and half a directory left behind."""
    with pytest.raises(ConfigError, match=message):
        fresh.write_checkpoint(tmp_path / "ck", **settings)
    assert not (tmp_path / "ck").exists()


def test_nothing_is_overwritten(tmp_path):
    """Catches a trained checkpoint replaced by an untrained one."""
    (tmp_path / "precious").write_text("weights")
    with pytest.raises(ConfigError, match="is not an empty directory"):
        fresh.write_checkpoint(tmp_path)
    with pytest.raises(ConfigError, match="is not an empty directory"):
        fresh.write_checkpoint(tmp_path / "precious")


def test_a_place_that_cannot_be_written_is_named(tmp_path):
    """Catches a bare OSError."""
    (tmp_path / "file").write_text("x")
    for path in (tmp_path / "file" / "below", tmp_path / ("x" * 300)):
        with pytest.raises(CheckpointError, match=r"cannot write .*; choose another place"):
            fresh.write_checkpoint(path)


@pytest.mark.parametrize("error", [OSError(errno.ENOSPC, "No space left on device"), KeyboardInterrupt()])
def test_a_checkpoint_is_written_whole_or_not_at_all(tmp_path, monkeypatch, error):
    """Catches a directory that looks like a checkpoint but ends in the middle of its weights."""

    def breaks_off(*_):
        yield b""
        raise error

    monkeypatch.setattr(fresh._Weights, "blocks", breaks_off)
    with pytest.raises((CheckpointError, KeyboardInterrupt)):
        fresh.write_checkpoint(tmp_path / "half")
    assert not any(tmp_path.iterdir())


def test_merges_that_were_learned_make_words_tokens(tmp_path):
    """Catches merges that the tokenizer does not apply, and special tokens that stand where merges do."""
    merges = fresh.learn_merges(["the ball is under the cup", "the cup"] * 5, 100)
    with_merges = {"shape": "tiny", "merges": merges, "overrides": {"decoder.vocab_size": 512}}
    checkpoint = Checkpoint.open(fresh.write_checkpoint(tmp_path / "a", **with_merges, chat_template="{{ 'hm' }}"))
    tokenizer = Tokenizer.open(checkpoint.path)
    assert len(tokenizer.encode("the ball is under the cup")) == 6
    assert tokenizer.decode(tokenizer.encode("héllo the cup")) == "héllo the cup"
    assert tokenizer.render([]) == "hm"
    for token, i in fresh.special_ids(512, len(merges)).items():
        assert tokenizer.token_id(token) == i >= 256 + len(merges)
    assert checkpoint.model.tokens.video_token_id == tokenizer.token_id("<|video_pad|>")
    assert checkpoint.model.latent.pad_token_id == tokenizer.token_id("<|latent_pad|>")


def test_more_merges_than_the_vocabulary_holds_are_refused(tmp_path):
    """Catches special tokens beyond the embedding table."""
    merges = [("a", "b")] * 120
    with pytest.raises(ConfigError, match="vocab_size"):
        fresh.write_checkpoint(tmp_path / "a", merges=merges)
