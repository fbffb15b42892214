"""The torch backend on the CPU, end to end, held against the PyTorch reference and ort."""

import gc

import numpy as np
import pytest
import torch

from tests.bundles import QUESTION, QUICK, square, torch_runtime
from tests.closeness import assert_close
from vlrt import fresh
from vlrt.backends.device_cache import SLOTS, Pool
from vlrt.backends.fp8 import fp8_linear, to_fp8
from vlrt.backends.fused_decoder import FusedDecoder, linear
from vlrt.backends.torch import longest_prefill, unfit
from vlrt.bundle import Bundle
from vlrt.errors import BackendUnavailable, BundleError, ConfigError, ExportError
from vlrt.export import exporter
from vlrt.models import registry
from vlrt.models.decoder import FullAttention
from vlrt.runtime import Runtime

MODEL = {"overrides": {**QUICK, "decoder.tie_word_embeddings": False}}
FORCED = {"min_tokens": 6, "max_tokens": 6}


@pytest.fixture(scope="module")
def checkpoint(make_checkpoint):
    return make_checkpoint(**MODEL)


@pytest.fixture(scope="module")
def bundles(checkpoint, tmp_path_factory):
    """A bundle of each precision."""
    folder = tmp_path_factory.mktemp("torch")
    return {
        precision: exporter.export(checkpoint.path, folder / precision, backend="torch", precision=precision)
        for precision in ("fp32", "bf16", "fp16", "fp8")
    }


def test_fp32_answers_as_the_reference_and_as_ort_do(bundles, checkpoint, make_bundle):
    """Catches fused layers, a static cache or an in-place op that compute something else."""
    ref = torch_runtime(checkpoint).ask(square(), QUESTION, **FORCED)
    with Runtime.open(bundles["fp32"]) as opened, Runtime.open(make_bundle(**MODEL)) as other:
        for reasoning in ("latent", "direct", "cot"):
            out = opened.ask(square(), QUESTION, reasoning=reasoning, **FORCED)
            assert out.token_ids == other.ask(square(), QUESTION, reasoning=reasoning, **FORCED).token_ids
        out = opened.ask(square(), QUESTION, **FORCED)
        assert out.token_ids == ref.token_ids
        assert_close(out.latents, ref.latents.astype(np.float64), ref.latents)
        choices = ["left", "to the right", "up"]
        scores = [runtime.ask(square(), QUESTION, choices=choices).scores for runtime in (opened, other)]
        assert scores[0] == pytest.approx(scores[1], rel=1e-3)


@pytest.mark.parametrize("precision", ["bf16", "fp16", "fp8"])
def test_other_precisions_answer_and_say_how_close_they_came(bundles, precision):
    """Catches a gate that is not asked, and activations that meet weights of another dtype."""
    bundle = Bundle.open(bundles[precision])
    assert bundle.precision == precision
    errors = {check.name: check.value for check in bundle.parity}
    assert 1e-5 < errors["hidden states: relative error"] < {"bf16": 0.1, "fp16": 0.02, "fp8": 0.25}[precision]
    with Runtime.open(bundles[precision]) as opened:
        assert opened.ask(square(), QUESTION, **FORCED).usage.answer_tokens == 6


def test_bundles_are_as_small_as_their_precision_says(bundles):
    """Catches weights that are stored wide, and tables that are stored twice."""
    sizes = {precision: Bundle.open(path).num_bytes for precision, path in bundles.items()}
    assert sizes["fp16"] == pytest.approx(sizes["bf16"], rel=0.01)
    assert sizes["fp8"] < sizes["bf16"] < 0.6 * sizes["fp32"]


@pytest.mark.parametrize("length", [1, 63])
def test_the_fused_decoder_is_the_decoder(checkpoint, length):
    """Catches a norm in another's place, and halves of a joined product that are swapped."""
    cfg = checkpoint.model.decoder
    plain = registry.build(checkpoint.model)
    registry.load(plain, checkpoint.weight, dtype=torch.float64)
    fused = FusedDecoder(cfg, checkpoint.weight, torch.float64, torch.device("cpu"))
    x = torch.randn(2, length, cfg.hidden_size, dtype=torch.float64)
    tables = torch.randn(2, length, cfg.head_dim // 2, dtype=torch.float64)
    with torch.inference_mode():
        assert_close(fused(x, FullAttention(*tables)), plain.model(x, FullAttention(*tables)))


@pytest.mark.parametrize("shape", [(1, 64), (2, 63, 64)])
def test_fp8_products_are_those_of_the_rounded_values(shape):
    """Catches a scale along the wrong axis, and a bias that is scaled."""
    x, weight, bias = torch.randn(shape), torch.randn(48, 64) * torch.logspace(-3, 3, 48)[:, None], torch.randn(48)
    small, scale = to_fp8(weight)
    per_row = x.abs().amax(-1, keepdim=True) / 448
    rounded = (x / per_row).to(torch.float8_e4m3fn).double() * per_row
    exact = rounded @ (small.double() * scale[:, None]).t() + bias
    assert_close(
        fp8_linear(x, small, scale, bias), exact, (rounded.float() @ (small.float() * scale[:, None]).t()) + bias
    )
    normal = weight.abs() > weight.abs().amax(-1, keepdim=True) / 448 * 2**-6  # below, steps are equal
    error = (small.double() * scale[:, None] - weight) / weight
    assert error[normal].abs().max() <= 2**-4 + 1e-6  # of 3 bits behind the first


def test_widths_that_no_card_multiplies_in_fp8_are_refused(make_checkpoint, tmp_path):
    """Catches a bundle that answers on the CPU, where it was checked, and fails on every card."""
    odd = make_checkpoint(overrides={**QUICK, "decoder.intermediate_size": 120})
    with pytest.raises(ExportError, match=r"multiples of 16, not 120; export with --precision bf16"):
        exporter.export(odd.path, tmp_path / "b", backend="torch", precision="fp8")
    assert not any(tmp_path.iterdir())
    small, scale = to_fp8(torch.ones(24, 32))
    weights = {"up.weight": small, "up.weight.scale": scale}
    with pytest.raises(ConfigError, match=r"up: fp8 products .* not 24"):
        linear(["up"], weights.get, torch.bfloat16, torch.device("cpu"), has_bias=False)


@pytest.mark.parametrize("precision", ["bf16", "fp8"])
@pytest.mark.parametrize(("shape", "least_gib"), [("3b", 16), ("7b", 24)])
def test_a_long_video_and_its_question_are_one_pass_where_there_is_memory(shape, least_gib, precision):
    """Catches weights that are read twice for a few words, and activations that take a small card's memory."""
    decoder = fresh.fresh_model(shape).decoder
    assert longest_prefill(decoder, precision, 2**40) == 16_384
    assert longest_prefill(decoder, precision, 2**30) == 2048
    assert longest_prefill(decoder, "bf16", least_gib * 2**30) > 8192 + 512
    sizes = [longest_prefill(decoder, precision, gib * 2**30) for gib in (4, 8, 16, 24, 80)]
    assert sizes == sorted(sizes)
    assert all(2 * size * 2 * decoder.intermediate_size < 4 * 2**30 for size in sizes)


def test_models_without_kernels_are_refused_by_name():
    """Catches a model that opens on a card, and fails at its first question."""
    assert unfit(fresh.fresh_model("7b"), torch.bfloat16) is None
    assert unfit(fresh.fresh_model("3b"), torch.float32) is None
    assert "video_attention_ has kernels for head dims 64, 72" in unfit(fresh.fresh_model("tiny"), torch.bfloat16)
    odd = fresh.fresh_model("tiny", overrides={"decoder.head_dim": 64, "decoder.mrope_section": [8, 12, 12]})
    assert "segment_attention has kernels" in unfit(odd, torch.bfloat16)


def test_storage_comes_back_and_nothing_of_it_is_read(checkpoint):
    """Catches memory that grows with every question, and what was asked before showing through."""
    pool = Pool(checkpoint.model.decoder, torch.float32, torch.device("cpu"))
    first = pool.lend(10)
    second = pool.lend(10)
    assert first.storage is not second.storage
    held = first.storage
    held.past_length.fill_(7)
    del first
    gc.collect()
    third = pool.lend(SLOTS)
    assert third.storage is held
    assert (third.length, int(held.past_length), third.capacity) == (0, 0, SLOTS)
    larger = pool.lend(SLOTS + 1)
    assert larger.storage.capacity == 2 * SLOTS
    with pytest.raises(ConfigError, match="a cache of 10"):
        second.place(np.zeros((11, checkpoint.model.decoder.head_dim // 2), np.float32), np.zeros((11, 1), np.float32))


def test_a_bundle_runs_in_its_own_backend_on_a_device_that_is_there(bundles, make_bundle, monkeypatch):
    """Catches a silent fallback, and an error that does not say what to do."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(BackendUnavailable, match="vlrt export --backend ort"):
        Runtime.open(bundles["fp32"], backend="ort")
    with pytest.raises(BackendUnavailable, match="vlrt export --backend torch"):
        Runtime.open(make_bundle(**MODEL), backend="torch")
    with pytest.raises(BackendUnavailable, match="accepted here: 'cpu'"):
        Runtime.open(bundles["fp32"], device="cuda")
    with pytest.raises(BackendUnavailable, match="CPU alone"):
        Runtime.open(make_bundle(**MODEL), device="cuda")
    with pytest.raises(ConfigError, match="device is 'tpu'"):
        Runtime.open(bundles["fp32"], device="tpu")


def test_precisions_are_those_of_the_backend(checkpoint, tmp_path):
    """Catches int8 of a backend that has none, and a bundle that is half written."""
    with pytest.raises(ConfigError, match="accepted with the backend torch: fp32, bf16, fp16, fp8"):
        exporter.export(checkpoint.path, tmp_path / "b", backend="torch", precision="int8")
    with pytest.raises(ConfigError, match="accepted with the backend ort: fp32, int8"):
        exporter.export(checkpoint.path, tmp_path / "b", precision="bf16")
    assert not any(tmp_path.iterdir())


def test_damaged_weights_are_refused(bundles, tmp_path):
    """Catches weights that are loaded unverified."""
    import shutil

    shutil.copytree(bundles["fp32"], tmp_path / "b")
    file = tmp_path / "b" / "weights-000.safetensors"
    content = bytearray(file.read_bytes())
    content[-1] ^= 1
    file.write_bytes(content)
    with pytest.raises(BundleError, match="is damaged"):
        Runtime.open(tmp_path / "b")
