"""The decoder against transformers', its two attentions against each other, and the ways of giving it weights."""

import numpy as np
import pytest
import torch

from tests.closeness import assert_close
from tests.oracle import oracles
from vlrt import positions
from vlrt.backends.reference import ReferenceBackend
from vlrt.errors import CheckpointError
from vlrt.models import registry
from vlrt.models.decoder import CachedAttention, FullAttention

# what differs from the tiny shape of 3 layers, width 128, 4 heads on 2
DECODERS = {
    "tiny": {},
    "one head": {"num_heads": 1, "num_kv_heads": 1, "head_dim": 128, "mrope_section": [16, 24, 24]},
    "one key head": {"num_heads": 8, "num_kv_heads": 1, "head_dim": 16, "mrope_section": [2, 3, 3]},
    "a key head each": {"num_heads": 4, "num_kv_heads": 4, "rope_theta": 1e4, "rms_norm_eps": 1e-5},
    "odd sizes": {"intermediate_size": 63, "vocab_size": 501, "num_layers": 1, "mrope_section": [3, 1, 12]},
    "narrow": {"hidden_size": 48, "num_heads": 3, "num_kv_heads": 3, "head_dim": 16, "mrope_section": [2, 3, 3]},
}
HOW = {
    "nested": {"layout": "nested"},
    "tied, flat": {"layout": "flat", "tie": True},
    "tied, nested": {"layout": "nested", "tie": True},
}


def a_checkpoint(make_checkpoint, sizes, **settings):
    overrides = {f"decoder.{name}": value for name, value in sizes.items()} | {"vision.depth": 1}
    if "hidden_size" in sizes:
        overrides["vision.out_hidden_size"] = sizes["hidden_size"]
    return make_checkpoint(overrides=overrides, **settings)


def some_input(checkpoint, length):
    """Ids, and M-RoPE positions that differ on every axis."""
    random = np.random.default_rng(length)
    ids = random.integers(0, 250, length)  # below the special tokens: these are filled by a vision tower
    where = np.cumsum(random.integers(0, 3, (3, length)), axis=1)
    return ids, where


def cached(checkpoint, where, dtype=torch.float32):
    """Attention of inference, with room to spare."""
    length = where.shape[1]
    cos, sin = (torch.from_numpy(x).to(dtype) for x in positions.mrope_cos_sin(where, checkpoint.model.decoder))
    spare = torch.full((5, cos.shape[1]), torch.nan, dtype=dtype)
    cfg = checkpoint.model.decoder
    shape = (1, cfg.num_kv_heads, length + 5, cfg.head_dim)
    keys, values = ([torch.zeros(shape, dtype=dtype) for _ in range(cfg.num_layers)] for _ in range(2))
    return CachedAttention(
        torch.cat([cos, spare]), torch.cat([sin, spare]), torch.tensor(0, dtype=torch.int32), keys, values
    )


def full(checkpoint, where, dtype=torch.float32, mask=None):
    """Attention of training."""
    cos, sin = (torch.from_numpy(x).to(dtype) for x in positions.mrope_cos_sin(where, checkpoint.model.decoder))
    return FullAttention(cos, sin, mask)


def loaded(checkpoint, dtype=torch.float32):
    model = registry.build(checkpoint.model)
    registry.load(model, checkpoint.weight, dtype=dtype)
    return model


@pytest.mark.parametrize("length", [1, 63])
@pytest.mark.parametrize(("sizes", "how"), [*((sizes, "flat") for sizes in DECODERS), *(("tiny", how) for how in HOW)])
def test_states_and_logits_equal_transformers(make_checkpoint, sizes, how, length):
    """Catches any layer that differs: biases, groups, sections of M-RoPE, norms, a head that is (not) tied."""
    checkpoint = a_checkpoint(make_checkpoint, DECODERS[sizes], **HOW.get(how, {}))
    ids, where = some_input(checkpoint, length)
    plain, exact = (oracle.read(torch.from_numpy(ids), torch.from_numpy(where), ()) for oracle in oracles(checkpoint))
    backend = ReferenceBackend(checkpoint)
    tables = positions.mrope_cos_sin(where, checkpoint.model.decoder)
    hidden = backend.decode(backend.prepare(length), backend.embed(ids), *tables)
    assert_close(hidden, exact[0], plain[0])
    assert_close(backend.logits(hidden), exact[1], plain[1])
    rows = np.arange(380, 0, -1)
    assert_close(backend.row_logits(hidden[-1:], rows), exact[1][-1, rows], plain[1][-1, rows])


@pytest.mark.parametrize("length", [1, 63, 123])
def test_training_and_inference_attend_alike(make_checkpoint, length):
    """Catches a model that is trained as one function and run as another."""
    checkpoint = make_checkpoint()
    ids, where = some_input(checkpoint, length)
    models = {dtype: loaded(checkpoint, dtype) for dtype in (torch.float32, torch.float64)}

    def run(dtype, attend):
        embeds = models[dtype].model.embed_tokens(torch.from_numpy(ids))
        return models[dtype].model(embeds[None], attend(checkpoint, where, dtype))

    assert_close(run(torch.float32, cached), run(torch.float64, full), run(torch.float32, full))


def test_a_mask_says_who_looks_where(make_checkpoint):
    """Catches a mask that is ignored, inverted, transposed or cut down to the causal one (the bottleneck mask)."""
    checkpoint = make_checkpoint()
    model = loaded(checkpoint, torch.float64)
    ids, where = some_input(checkpoint, 63)
    embeds = model.model.embed_tokens(torch.from_numpy(ids))[None]
    causal = torch.ones(63, 63, dtype=torch.bool).tril()
    assert_close(
        model.model(embeds, full(checkpoint, where, torch.float64, causal)),
        model.model(embeds, full(checkpoint, where, torch.float64)),
    )
    hidden = causal.clone()
    hidden[40:, 5:20] = False  # the answer may not look at the video, nor anything between them
    hidden[20:40, 5:20] = False
    attend = full(checkpoint, where, torch.float64, hidden)
    before = model.model(embeds, attend)
    other = embeds.clone()
    other[:, 5:20] += 1
    after = model.model(other, attend)
    torch.testing.assert_close(after[:, 20:], before[:, 20:], rtol=0, atol=0)
    assert not torch.allclose(after[:, 5:20], before[:, 5:20])
    everywhere = full(checkpoint, where, torch.float64, torch.ones(63, 63, dtype=torch.bool))
    assert not torch.allclose(model.model(other, everywhere)[:, :5], model.model(embeds, everywhere)[:, :5])


def test_gradients_equal_transformers(make_checkpoint):
    """Catches an op whose registered gradient is wrong in the place where training uses it."""
    checkpoint = make_checkpoint()
    ids, where = some_input(checkpoint, 63)
    found = []
    for oracle in oracles(checkpoint):
        embeds = oracle.model.model.get_input_embeddings()(torch.from_numpy(ids)).detach()[None].requires_grad_()
        with oracle.precisely():
            text = oracle.model.model.language_model
            hidden = text(inputs_embeds=embeds, position_ids=torch.from_numpy(where)[:, None]).last_hidden_state
            hidden[0, -1].square().sum().backward()
        found.append(embeds.grad)
    model = loaded(checkpoint)
    embeds = model.model.embed_tokens(torch.from_numpy(ids))[None].requires_grad_()
    model.model(embeds, full(checkpoint, where))[0, -1].square().sum().backward()
    assert_close(embeds.grad, found[1], found[0])


def test_the_head_reads_last_states_in_float(tiny_checkpoint):
    """Catches logits of another type than NumPy's float32, which callers promise to each other."""
    backend = ReferenceBackend(tiny_checkpoint)
    hidden = backend.embed(np.arange(3))
    assert (backend.logits(hidden).dtype, backend.logits(hidden).shape) == (np.float32, (3, 384))
    assert backend.row_logits(hidden[:1], np.array([5, 1])).dtype == np.float32


@pytest.mark.parametrize("tie", [True, False])
@pytest.mark.parametrize("family", ["qwen2_vl", "qwen2_5_vl"])
def test_streamed_equals_loaded(make_checkpoint, family, tie):
    """Catches a layer that streaming forgets, fills with another layer's weights, or keeps after use."""
    checkpoint = make_checkpoint(family=family, tie=tie)
    whole, streamed = ReferenceBackend(checkpoint), ReferenceBackend(checkpoint, streamed=True)
    ids, where = some_input(checkpoint, 63)
    tables = positions.mrope_cos_sin(where, checkpoint.model.decoder)
    pixels = np.random.default_rng(0).standard_normal((2 * 6 * 10, checkpoint.model.vision.patch_dim))
    outs = []
    for backend in (whole, streamed, streamed):  # twice: what was dropped must be fetched again
        hidden = backend.decode(backend.prepare(63), backend.embed(ids), *tables)
        memory = backend.remember(hidden)
        outs.append(
            [
                backend.encode(pixels.astype(np.float32), (2, 6, 10)).numpy(),
                hidden.numpy(),
                backend.logits(hidden),
                backend.row_logits(hidden[-1:], ids),
                backend.inject(hidden, memory).numpy(),
            ]
        )
    for again in outs[1:]:
        for out, ref in zip(again, outs[0], strict=True):
            np.testing.assert_array_equal(out, ref)
    held = {name for name, x in streamed._module.named_parameters() if not x.is_meta}
    assert {name.split(".")[0] for name in held} == {"latent_injection"}


def test_streaming_holds_one_layer_at_a_time(make_checkpoint):
    """Catches weights of layers that pile up: a 3B model would not fit the machine that it is exported on."""
    checkpoint = make_checkpoint()
    model = registry.build(checkpoint.model)
    registry.stream(model, checkpoint.weight)
    seen = []

    def look(*_):
        seen.append(sorted(i for i, layer in enumerate(model.model.layers) if not layer.mlp.up_proj.weight.is_meta))

    for layer in model.model.layers:
        layer.mlp.register_forward_hook(look)
    ids, where = some_input(checkpoint, 7)
    model.model(ReferenceBackend(checkpoint).embed(ids)[None], cached(checkpoint, where))
    assert seen == [[0], [1], [2]]


def test_a_model_on_meta_takes_no_memory(make_checkpoint):
    """Catches weights made only to be overwritten: twice the memory while a model loads."""
    model = registry.build(make_checkpoint().model)
    assert all(x.is_meta for x in [*model.parameters(), *model.buffers()])
    assert not model.training
    assert registry.build(make_checkpoint().model, device="cpu").lm_head.weight.device.type == "cpu"


@pytest.mark.parametrize("tie", [True, False])
def test_loading_fills_every_parameter(make_checkpoint, tie):
    """Catches a parameter left on meta, trainable, or in the checkpoint's dtype; a tied head that trains apart."""
    checkpoint = make_checkpoint(tie=tie, dtype="bfloat16")
    model = loaded(checkpoint)
    assert {(x.dtype, x.device.type, x.requires_grad) for x in model.parameters()} == {(torch.float32, "cpu", False)}
    assert (model.lm_head.weight is model.model.embed_tokens.weight) == tie
    for name in checkpoint.names():
        stored = checkpoint.tensor(name).float()
        assert torch.equal(model.get_parameter(name), stored.reshape(model.get_parameter(name).shape)), name


def test_names_and_shapes_that_do_not_match_fail(make_checkpoint):
    """Catches a model that runs with weights it was not given: silent garbage."""
    checkpoint = make_checkpoint()
    fetch = checkpoint.weight
    deeper = registry.build(make_checkpoint(overrides={"decoder.num_layers": 4}).model)
    with pytest.raises(CheckpointError, match=r"model\.layers\.3"):
        registry.load(deeper, fetch)
    wider = registry.build(make_checkpoint(overrides={"decoder.intermediate_size": 225}).model)
    with pytest.raises(RuntimeError, match="225"):
        registry.load(wider, fetch)
    with pytest.raises(CheckpointError, match=r"models\.norm"):
        registry.load(deeper.model.norm, fetch, prefix="models.norm.")
