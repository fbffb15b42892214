"""Calibration and smoothing: int8 and int4 of checkpoints whose channels differ by far, and of those whose do not.

Outliers are made by hand, since no pretrained checkpoint can be had here: what one tensor multiplies, the next divides.
"""

import shutil
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import onnx
import pytest
import safetensors.numpy
import torch

from tests.bundles import QUICK, plain_vision
from tests.test_export import run_linear
from vlrt import cli, prompt
from vlrt.backends.reference import ReferenceBackend
from vlrt.bundle import Bundle
from vlrt.checkpoint import WEIGHTS, Checkpoint
from vlrt.errors import ExportError
from vlrt.export import calibrate, graphs, quantize, rounding, smooth, verify
from vlrt.export.exporter import export
from vlrt.models import registry

FAMILIES: dict[str, dict[str, Any]] = {
    "qwen2_5_vl": {"overrides": QUICK},
    "qwen2_vl": {"family": "qwen2_vl", "overrides": plain_vision()},
}
FACTOR = 60  # by which a few channels are larger than the others
EVERY = 29  # which: an odd step, so that heads, blocks and patches have them at different places


def edited(checkpoint: Checkpoint, path: Path, edit: Callable[[dict[str, np.ndarray]], None]) -> Checkpoint:
    shutil.copytree(checkpoint.path, path)
    tensors = {name: array.copy() for name, array in safetensors.numpy.load_file(path / WEIGHTS).items()}
    edit(tensors)
    safetensors.numpy.save_file(tensors, path / WEIGHTS)
    return Checkpoint.open(path)


def loud(checkpoint: Checkpoint, path: Path) -> Checkpoint:
    """Return a checkpoint that computes the same in fp32, through channels that are FACTOR times as large."""
    cfg = checkpoint.model

    def raise_rows(tensors, name, rows):
        for part in ("weight", "bias"):
            if f"{name}.{part}" in tensors:
                tensors[f"{name}.{part}"][rows] *= FACTOR

    def edit(tensors):
        some = slice(3, cfg.decoder.hidden_size, EVERY)
        groups, width = cfg.decoder.num_heads // cfg.decoder.num_kv_heads, cfg.decoder.head_dim
        for layer in (f"model.layers.{i}." for i in range(cfg.decoder.num_layers)):
            for norm, readers in (
                ("input_layernorm", ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj")),
                ("post_attention_layernorm", ("mlp.gate_proj", "mlp.up_proj")),
            ):
                raise_rows(tensors, layer + norm, some)
                for reader in readers:
                    tensors[f"{layer}{reader}.weight"][:, some] /= FACTOR
            raise_rows(tensors, layer + "self_attn.v_proj", slice(5, None, EVERY))
            out = tensors[layer + "self_attn.o_proj.weight"].reshape(cfg.decoder.hidden_size, -1, groups, width)
            for row in range(5, out.shape[1] * width, EVERY):
                out[:, row // width, :, row % width] /= FACTOR
            raise_rows(tensors, layer + "mlp.up_proj", some)
            tensors[layer + "mlp.down_proj.weight"][:, some] /= FACTOR
        size = cfg.vision.hidden_size
        some = slice(2, size, EVERY)
        for block in (f"visual.blocks.{i}." for i in range(cfg.vision.depth)):
            for norm, readers in (("norm1", ("attn.qkv",)), ("norm2", ("mlp.gate_proj", "mlp.up_proj", "mlp.fc1"))):
                raise_rows(tensors, block + norm, some)
                for reader in readers:
                    if f"{block}{reader}.weight" in tensors:
                        tensors[f"{block}{reader}.weight"][:, some] /= FACTOR
            raise_rows(tensors, block + "attn.qkv", slice(2 * size + 2, None, EVERY))
            tensors[block + "attn.proj.weight"][:, some] /= FACTOR
            if block + "mlp.up_proj.weight" in tensors:
                raise_rows(tensors, block + "mlp.up_proj", some)
                tensors[block + "mlp.down_proj.weight"][:, some] /= FACTOR
        raise_rows(tensors, "visual.merger.ln_q", some)
        merged = tensors["visual.merger.mlp.0.weight"]
        merged.reshape(len(merged), -1, size)[:, :, some] /= FACTOR

    return edited(checkpoint, path, edit)


def floats(checkpoint: Checkpoint) -> smooth.Fetch:
    return lambda name: checkpoint.weight(name).float().numpy()


def observed(checkpoint: Checkpoint) -> dict[str, calibrate.Seen]:
    layers = [site.layers[0] for site in smooth.sites(checkpoint.model)]
    return calibrate.observe(checkpoint, prompt.Tokenizer.open(checkpoint.path), layers, lambda done: None)


def chosen(checkpoint: Checkpoint, *, int4: bool = False) -> smooth.Smoothing:
    return smooth.choose(
        checkpoint.model, observed(checkpoint), floats(checkpoint), int4=int4, progress=lambda done: None
    )


def uncalibrated(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(smooth, "choose", lambda *_, **__: smooth.NOTHING)


def errors(bundle: Path) -> dict[str, float]:
    return {row.name.split(":")[0]: row.value for row in Bundle.open(bundle).parity if "relative error" in row.name}


def near(out: dict[str, float], ref: dict[str, float], factor: float) -> None:
    """Fail unless errors are at most `factor` times others. Logits and latents are a few rows: half more is chance."""
    for name, error in ref.items():
        many = name in ("video tokens", "hidden states", "int4 weights")
        assert out[name] < (factor if many else 1.5) * error, name


def record(checkpoint: Any, tokenizer: prompt.Tokenizer) -> verify.Record:
    return verify._run(ReferenceBackend(checkpoint), tokenizer, *verify._clip(checkpoint.model))


# What is computed


@pytest.mark.parametrize("kind", FAMILIES)
def test_folding_changes_nothing(make_checkpoint, kind):
    """Catches a scale that one reader of an activation does not get, on the wrong rows of qkv, heads or merged patches.

    Every scale is a power of two and none is equal to its neighbours, so what is computed is the same to the last bit.
    """
    checkpoint = make_checkpoint(**FAMILIES[kind])
    random, rows, columns = np.random.default_rng(0), {}, {}
    for site in smooth.sites(checkpoint.model):
        if site.source:
            scale = np.ones(len(checkpoint.weight(site.source[0])), np.float32)
            written = np.unique(site.channels)
            scale[written] = np.exp2(random.integers(-6, 7, len(written)))
            rows |= dict.fromkeys(site.source, scale)
            columns |= dict.fromkeys(site.layers, scale[site.channels])
    decoder, vision = checkpoint.model.decoder.num_layers, checkpoint.model.vision.depth
    assert len(columns) == 7 * decoder + (5 if kind == "qwen2_5_vl" else 3) * vision + 1
    fetch = smooth.Smoothing(rows, columns, {}).apply(floats(checkpoint))
    folded = SimpleNamespace(model=checkpoint.model, weight=lambda name: torch.from_numpy(fetch(name)))
    tokenizer = prompt.Tokenizer.open(checkpoint.path)
    out, want = record(folded, tokenizer), record(checkpoint, tokenizer)
    assert not np.array_equal(
        fetch("model.layers.0.mlp.up_proj.weight"), floats(checkpoint)("model.layers.0.mlp.up_proj.weight")
    )
    for part in ("video_tokens", "hidden", "logits", "latents"):
        np.testing.assert_array_equal(getattr(out, part), getattr(want, part))


@pytest.mark.parametrize(
    "kind",
    [*FAMILIES.values(), {"overrides": QUICK, "latent": {"num_latents": 2, "injection": "mlp"}}],
    ids=["mlp_xattn", "qwen2_vl", "mlp"],
)
def test_every_layer_that_is_rounded_is_calibrated(make_checkpoint, kind):
    """Catches a layer that is quantised without anybody having looked at what it reads, and one that is never read."""
    checkpoint = make_checkpoint(**kind)
    rounded = set()
    for _, model in graphs.trace_all(registry.build(checkpoint.model)):
        rounded |= {r.source for n, r in quantize.lower_linears(model, "int8").items() if n.endswith(".q")}
    sites = list(smooth.sites(checkpoint.model))
    assert rounded == {layer for site in sites for layer in site.layers}
    assert set(observed(checkpoint)) == {site.layers[0] for site in sites}


def test_what_latents_read_counts(make_checkpoint, monkeypatch):
    """Catches a calibration that asks directly, with latents unseen, and one that takes a pass for each of 64."""
    layer, rows, watch = "model.layers.0.mlp.down_proj.weight", [], ReferenceBackend.watch

    def counted(backend, see):
        watch(backend, see)
        watch(backend, lambda name, x: rows.append(x.shape[:-1].numel()) if name == layer else None)

    monkeypatch.setattr(ReferenceBackend, "watch", counted)
    fed = []
    for latent in (
        None,
        {"num_latents": 3},
        {"num_latents": 64},
        {"num_latents": 3, "rollout": "parallel", "rounds": 2},
    ):
        checkpoint = make_checkpoint(overrides=QUICK, latent=latent)
        rows.clear()
        seen = calibrate.observe(checkpoint, prompt.Tokenizer.open(checkpoint.path), [layer], lambda done: None)
        fed.append(sum(rows))
        assert set(seen) == {layer}
        assert len(seen[layer].rows) == calibrate.NUM_ROWS < fed[-1]
    direct, *rest = fed
    # beside the start and end tokens: each latent; the first few; each of three in two rounds and once they are known
    assert [count - direct - 2 for count in rest] == [3, calibrate.MAX_STEPS, 9]


def test_calibration_is_reproducible_and_keeps_the_largest(make_checkpoint):
    """Catches a draw that differs from run to run, and maxima of the sample in place of those of all rows."""
    checkpoint = make_checkpoint(**FAMILIES["qwen2_5_vl"])
    first, second = observed(checkpoint), observed(checkpoint)
    for layer, seen in first.items():
        assert torch.equal(seen.rows, second[layer].rows)
        assert (seen.largest * (1 + 2**-8) >= seen.rows.float().abs().amax(dim=0)).all()
    wide = first["visual.blocks.0.attn.qkv.weight"]  # of more rows than are kept
    assert (wide.largest > 1.01 * wide.rows.float().abs().amax(dim=0)).any()


# What it is good for


@pytest.mark.parametrize("kind", FAMILIES)
def test_outliers_are_as_good_as_none(make_checkpoint, make_bundle, tmp_path, monkeypatch, kind):
    """Catches smoothing that does not reach one of the places where channels may stand out.

    Without calibration the gate refuses; with it errors are those of the quiet checkpoint, but for chance.
    """
    quiet = make_checkpoint(**FAMILIES[kind])
    checkpoint = loud(quiet, tmp_path / "loud")
    tokenizer = prompt.Tokenizer.open(checkpoint.path)
    np.testing.assert_allclose(record(checkpoint, tokenizer).logits, record(quiet, tokenizer).logits, atol=2e-4)
    noted: list[str] = []
    smoothed = errors(export(checkpoint.path, tmp_path / "x.vlrt", precision="int8", note=noted.append))
    assert not noted
    near(smoothed, errors(make_bundle("int8", **FAMILIES[kind])), 1.2)
    uncalibrated(monkeypatch)
    with pytest.raises(ExportError, match=r"video tokens: relative error .*hidden states: relative error"):
        export(checkpoint.path, tmp_path / "y.vlrt", precision="int8")


def test_outliers_in_int4(make_checkpoint, make_bundle, tmp_path):
    """Catches a check of int4 weights that compares with tensors that were not scaled, and scales that hurt int4."""
    checkpoint = loud(make_checkpoint(**FAMILIES["qwen2_5_vl"]), tmp_path / "loud")
    smoothed = errors(export(checkpoint.path, tmp_path / "x.vlrt", precision="int4"))
    near(smoothed, errors(make_bundle("int4", **FAMILIES["qwen2_5_vl"])), 1.2)


@pytest.mark.parametrize("kind", FAMILIES)
def test_what_is_well_is_left_alone(make_checkpoint, make_bundle, tmp_path, monkeypatch, kind):
    """Catches scales that are made of chance: where no channel stands out, nothing is gained and nothing lost."""
    checkpoint = make_checkpoint(**FAMILIES[kind])
    found = chosen(checkpoint)
    assert len(found.columns) <= 2
    assert not found.kept
    uncalibrated(monkeypatch)
    plain = errors(export(checkpoint.path, tmp_path / "x.vlrt", precision="int8"))
    near(errors(make_bundle("int8", **FAMILIES[kind])), plain, 1.05)


# What stays fp32


def saturated(checkpoint: Checkpoint, path: Path) -> Checkpoint:
    """Return a Qwen2-VL in which a channel between fc1 and fc2 is always large: no weight before it can be scaled."""

    def edit(tensors):
        tensors["visual.blocks.0.mlp.fc1.bias"][7] = 4000
        tensors["visual.blocks.0.mlp.fc2.weight"][:, 7] *= 1e-3

    return edited(checkpoint, path, edit)


def test_a_layer_beyond_rescue_stays_fp32_and_is_named(make_checkpoint, tmp_path, monkeypatch, capsys):
    """Catches a bundle that is refused for one layer, one that is silent about it, and one that keeps others too."""
    checkpoint = saturated(make_checkpoint(**FAMILIES["qwen2_vl"]), tmp_path / "saturated")
    out = tmp_path / "x.vlrt"
    assert cli.main(["export", str(checkpoint.path), "-o", str(out), "--precision", "int8"]) == 0
    assert "vlrt: note: layers that stay in fp32" in (said := capsys.readouterr().err)
    assert "visual.blocks.0.mlp.fc2 (" in said
    stored = {t.name: t.data_type for t in onnx.load(out / "vision.onnx", load_external_data=False).graph.initializer}
    assert stored["visual.blocks.0.mlp.fc2.weight.t"] == onnx.TensorProto.FLOAT
    assert sum(name.endswith("fc2.weight.q") for name in stored) == 1
    assert sum(name.endswith(".t") for name in stored) == 2  # that of the patches is the other
    uncalibrated(monkeypatch)
    with pytest.raises(ExportError, match="video tokens: relative error"):
        export(checkpoint.path, tmp_path / "y.vlrt", precision="int8")


@pytest.mark.parametrize(("tie", "dtype"), [(True, "float32"), (False, "bfloat16")])
def test_a_head_may_stay_fp32(make_checkpoint, tmp_path, monkeypatch, tie, dtype):
    """Catches a head that is read from a table of another dtype, and one that has no weights at all."""
    checkpoint = make_checkpoint(overrides=QUICK, latent=None, tie=tie, dtype=dtype)
    monkeypatch.setattr(smooth, "choose", lambda *_, **__: smooth.Smoothing({}, {}, {quantize.HEAD: 1.0}))
    out = export(checkpoint.path, tmp_path / "x.vlrt", precision="int8")
    model = onnx.load(out / "lm_head.onnx", load_external_data=False)
    assert [node.op_type for node in model.graph.node] == ["Gemm"]
    assert all(row.ok for row in Bundle.open(out).parity)


def test_parts_of_a_group_may_stay_fp32(make_checkpoint, tmp_path, monkeypatch):
    """Catches kernels that take in q, k and v, thirds of qkv, or gate and up projection, although one is kept."""
    names = ["visual.blocks.0.attn.qkv", "visual.blocks.1.mlp.gate_proj", "model.layers.0.self_attn.k_proj"]
    names += ["model.layers.1.mlp.up_proj", "latent_injection.v_proj"]
    kept = {f"{name}.weight": 1.0 for name in names}
    monkeypatch.setattr(smooth, "choose", lambda *_, **__: smooth.Smoothing({}, {}, kept))
    for precision in ("int8", "int4"):
        out = export(make_checkpoint(**FAMILIES["qwen2_5_vl"]).path, tmp_path / precision, precision=precision)
        stored = set()
        for graph in ("vision", "decoder", "latent_memory"):
            model = onnx.load(out / f"{graph}.onnx", load_external_data=False)
            stored |= {tensor.name for tensor in model.graph.initializer}
        thirds = [f"{names[0]}.weight.{i}" for i in range(3)]
        assert {name for name in stored if name.endswith(".t")} == {
            f"{name}.t" for name in (*thirds, *list(kept)[1:], "visual.patch_embed.proj.weight")
        }


def test_what_stays_fp32_is_bounded():
    """Catches an int8 bundle that is fp32 in truth, and a good layer kept in place of a bad one."""
    tensors = {f"model.layers.{i}.mlp.up_proj.weight": (64, 64) for i in range(10)}
    tensors |= {"model.embed_tokens.weight": (100, 64)}
    found = {name: 0.1 + 0.1 * i for i, name in enumerate(tensors) if name != "model.embed_tokens.weight"}
    worst = [f"model.layers.{i}.mlp.up_proj.weight" for i in (9, 8)]
    assert list(smooth._kept(found, tensors, int4=False)) == worst
    assert not smooth._kept({"lm_head.weight": 0.12, **dict.fromkeys(worst, 0.29)}, tensors, int4=True)
    said = smooth.Smoothing({}, {}, dict.fromkeys(map(str, range(20)), 0.25)).describe()
    assert said.endswith("7 (0.25) and 12 more")


# The simulation


@pytest.mark.parametrize("kind", ["int8", "int4"])
def test_the_simulation_errs_as_the_operators_do(tmp_path, monkeypatch, kind):
    """Catches a simulation of another rounding than the engine's, by which layers would be chosen wrongly."""
    monkeypatch.setattr(quantize, "INT4_PREFIX", "w")  # what `run_linear` calls its weight
    random = np.random.default_rng(0)
    x, weight = (random.standard_normal(shape).astype(np.float32) for shape in ((40, 96), (48, 96)))
    x[:, ::31] *= 30
    exact = x @ weight.T
    out = rounding.product(x, weight, kind) - exact
    ran = run_linear(tmp_path, kind, x, weight, np.zeros(48, np.float32)) - exact
    norms = np.linalg.norm(exact, axis=1)
    error = float(np.mean(np.linalg.norm(ran, axis=1) / norms))
    assert rounding.errors(x, [weight], kind)[0] == pytest.approx(float(np.mean(np.linalg.norm(out, axis=1) / norms)))
    assert rounding.errors(x, [weight], kind)[0] == pytest.approx(error, rel=0.1)


def test_scales_follow_the_formula_and_leave_zeros_alone():
    """Catches alpha the wrong way round, a division by a channel that is always zero, and copies scaled apart."""
    x, weight = np.array([64, 1, 0, 4, 256], np.float32), np.array([1, 1, 3, 0, 1], np.float32)
    out = smooth.scales(np.array([0, 1, 2, 3, 0]), 6, x, weight, 0.5)
    assert out.tolist() == [2**2, 2**-2, 1, 1, 1, 1]  # 16 and 1, around 4
    assert np.isfinite(
        smooth.scales(np.arange(2), 2, np.array([1e30, 1e-30], np.float32), np.ones(2, np.float32), 1)
    ).all()
