"""Exports: every kind of checkpoint, graphs that keep their contract, the gate, refusals, determinism and memory.

That bundles answer as transformers and models/ do is held in test_runtime_parity.py, which has the other half of the
pairs of rollout and injection. Not covered: the published checkpoints themselves, and sizes beyond 300 MB.
"""

import errno
import json
import os
import platform
import resource
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import onnx
import onnx_ir as ir
import onnxruntime
import pytest
import safetensors.numpy
from hypothesis import example, given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as arrays

from tests.bundles import QUESTION, QUICK, plain_vision, square, torch_runtime
from vlrt import names, processor
from vlrt.backends.ort import EXACT_INT8, OrtBackend
from vlrt.backends.reference import ReferenceBackend
from vlrt.bundle import MANIFEST, Bundle
from vlrt.checkpoint import WEIGHTS, Checkpoint
from vlrt.errors import CheckpointError, ConfigError, ExportError
from vlrt.export import exporter, linear_functions, quantize, verify
from vlrt.export.exporter import export
from vlrt.export.onnx import write_graph
from vlrt.fresh import write_checkpoint
from vlrt.positions import mrope_cos_sin
from vlrt.runtime import Runtime

TINY = {"overrides": QUICK}
PLAIN = {"overrides": QUICK, "latent": None}
CASES = {
    "flat untied mlp_xattn": ("fp32", TINY),
    "nested tied bfloat16 shards mlp int8": (
        "int8",
        {
            "layout": "nested",
            "tie": True,
            "dtype": "bfloat16",
            "shard_bytes": 200_000,
            "overrides": QUICK,
            "latent": {"num_latents": 2, "injection": "mlp", "intermediate_size": 96},
        },
    ),
    "qwen2_vl bfloat16 odd vocabulary parallel mlp_xattn": (
        "fp32",
        {
            "family": "qwen2_vl",
            "dtype": "bfloat16",
            "overrides": plain_vision(**{"decoder.vocab_size": 391}),
            "latent": {"num_latents": 3, "rollout": "parallel", "rounds": 2, "num_heads": 2},
        },
    ),
    "qwen2_vl nested tied smallest vocabulary parallel identity": (
        "fp32",
        {
            "family": "qwen2_vl",
            "layout": "nested",
            "tie": True,
            "overrides": plain_vision(**{"decoder.vocab_size": 283}),
            "latent": {"num_latents": 1, "rollout": "parallel", "injection": "identity"},
        },
    ),
    "recurrent rms": ("fp32", {"overrides": QUICK, "latent": {"num_latents": 2, "injection": "rms"}}),
    "qwen2_vl plain int8": ("int8", {"family": "qwen2_vl", "overrides": plain_vision(), "latent": None}),
}


def contents(directory: Path) -> dict[str, int]:
    return {str(p.relative_to(directory)): p.stat().st_mtime_ns for p in directory.rglob("*")}


def contract(bundle: Bundle) -> Iterator[names.Graph]:
    """Yield the graphs that a bundle of its config must have."""
    cfg = bundle.model
    injection = cfg.latent.injection if cfg.latent else "identity"
    yield names.vision(windowed=cfg.vision.window_size > 0)
    yield names.decoder(cfg.decoder.num_layers)
    yield names.LM_HEAD
    if injection != "identity":
        yield names.latent(looks_at_video=injection == "mlp_xattn")
    if injection == "mlp_xattn":
        yield names.LATENT_MEMORY


@pytest.fixture
def place(tmp_path: Path) -> Path:
    """Return an empty directory to export into."""
    (tmp_path / "place").mkdir()
    return tmp_path / "place"


# What is exported


@pytest.mark.parametrize("case", CASES)
def test_every_kind_of_checkpoint_passes_the_gate(make_checkpoint, make_bundle, case):
    """Catches a family, spelling, dtype, vocabulary, injection or rollout that exports to something else."""
    precision, kind = CASES[case]
    bundle, checkpoint = Bundle.open(make_bundle(precision, **kind)), make_checkpoint(**kind)
    assert bundle.model == checkpoint.model
    assert bundle.manifest.checkpoint == "tiny"
    rows = {row.name: row for row in bundle.parity}
    latent = bundle.model.latent is not None
    errors = ["video tokens", "hidden states", "logits", *["latents"] * latent]
    agreed = ["greedy answer", *["answer after latents"] * latent]
    assert set(rows) == {f"{e}: relative error" for e in errors} | {f"{a}: tokens agreed" for a in agreed}
    for row in rows.values():
        assert row.ok
        assert row.at_least == row.name.endswith("tokens agreed")
        if not row.at_least:
            # 0 would be a thing compared with itself; more than this is more than rounding accounts for.
            low, high = (1e-8, 1e-5) if precision == "fp32" else (1e-4, 0.25)
            assert low < row.value < min(high, row.limit)
    if precision == "fp32":
        assert all(rows[f"{a}: tokens agreed"].value == 1 for a in agreed)
        with Runtime.open(bundle.path) as opened, torch_runtime(checkpoint) as ref:
            asked = square(6, 56, 140), QUESTION
            out, want = (r.ask(*asked, max_tokens=16, min_tokens=16) for r in (opened, ref))
        assert out.token_ids == want.token_ids


@pytest.mark.parametrize("case", CASES)
def test_graphs_keep_the_contract_and_name_our_functions(make_bundle, case):
    """Catches a renamed or reordered tensor, an op that was inlined, and a placeholder that was left in."""
    bundle = Bundle.open(make_bundle(CASES[case][0], **CASES[case][1]))
    graphs = list(contract(bundle))
    assert set(bundle.manifest.graphs) == {graph.name for graph in graphs}
    calls = {"vision": "SegmentAttention", "decoder": "LaneAttention", "latent": "LatentInjection"}
    if bundle.model.latent is None or bundle.model.latent.injection != "mlp_xattn":
        del calls["latent"]
    for graph in graphs:
        model = onnx.load(bundle.path / f"{graph.name}.onnx", load_external_data=False)
        for have, want in ((model.graph.input, graph.inputs), (model.graph.output, graph.outputs)):
            kinds = [onnx.helper.tensor_dtype_to_np_dtype(v.type.tensor_type.elem_type).name for v in have]
            assert [(v.name, k) for v, k in zip(have, kinds, strict=True)] == [(t.name, t.dtype) for t in want]
            for value, tensor in zip(have, want, strict=True):
                dims = value.type.tensor_type.shape.dim
                assert len(dims) == len(tensor.shape)
                free = [d.dim_param for d in dims if not d.HasField("dim_value")]
                assert set(free) <= set(tensor.shape)
        wanted = {calls[graph.name]} if graph.name in calls else set()
        inner = {"VideoAttention"} if graph.name == "decoder" else set()  # called by a branch of LaneAttention
        inner |= {node.op_type for function in model.functions for node in function.node if node.domain == "vlrt"}
        called = {n.op_type for n in model.graph.node if n.domain == "vlrt"}
        assert {f.name for f in model.functions} == called | inner
        assert all(f.domain == "vlrt" for f in model.functions)
        linears = {v.name(weights) for weights in linear_functions.FORMATS for v in linear_functions.variants(weights)}
        assert called - linears - {"RMSNorm"} == wanted
        assert {n.domain for n in model.graph.node} <= {"", "com.microsoft", "vlrt"}
        assert str(Path.cwd()).encode() not in model.SerializeToString()


def test_tables_keep_the_dtype_that_they_can(make_bundle):
    """Catches int8 bundles whose embeddings take the space of float32, and a tied head stored twice."""
    precision, kind = CASES["nested tied bfloat16 shards mlp int8"]
    halves = Bundle.open(make_bundle(precision, **kind))
    assert (halves.manifest.embed.dtype, halves.manifest.head) == ("bfloat16", None)
    name = "qwen2_vl bfloat16 odd vocabulary parallel mlp_xattn"
    whole = Bundle.open(make_bundle("fp32", **CASES[name][1]))
    assert (whole.manifest.embed.dtype, whole.manifest.embed.rows) == ("float32", 391)
    assert whole.manifest.head is not None
    assert whole.manifest.queries.rows == 3
    assert whole.manifest.files["lm_head.bin"].num_bytes == 0


def test_the_cache_is_written_in_place(make_bundle, make_checkpoint):
    """Catches a copy of the KV cache per step: past and present must be one buffer, and only new slots may change."""
    backend, ref = OrtBackend(Bundle.open(make_bundle(**TINY)), 1), ReferenceBackend(make_checkpoint(**TINY))
    cfg = backend.model.decoder
    embeds = np.random.default_rng(0).standard_normal((6, cfg.hidden_size)).astype(np.float32)
    cos, sin = mrope_cos_sin(np.tile(np.arange(6), (3, 1)), cfg)
    cache, other = backend.prepare(9), ref.prepare(9)
    addresses = [array.ctypes.data for array in (*cache.keys, *cache.values)]
    backend.decode(cache, embeds[:5], cos[:5], sin[:5])
    before = [array.copy() for array in (*cache.keys, *cache.values)]
    assert all(array[:, :, :5].all() and not array[:, :, 5:].any() for array in before)
    assert [value.data_ptr() for value in cache.binding.get_outputs()[: len(addresses)]] == addresses
    backend.decode(cache, embeds[5:], cos[5:], sin[5:])
    after = [*cache.keys, *cache.values]
    assert [array.ctypes.data for array in after] == addresses
    for was, now in zip(before, after, strict=True):
        assert np.array_equal(was[:, :, :5], now[:, :, :5])
        assert now[:, :, 5].all()
        assert not now[:, :, 6:].any()
    ref.decode(other, ref.lift(embeds), cos, sin)
    for now, want in zip(cache.values, other.values, strict=True):
        np.testing.assert_allclose(now, want, rtol=1e-4, atol=1e-4)


# Precision


weights = st.tuples(st.integers(1, 9), st.integers(1, 17)).flatmap(
    lambda shape: arrays.arrays(np.float32, shape, elements=st.floats(-1e4, 1e4, width=32))
)


@settings(max_examples=200, deadline=None)
@example(np.array([[4.348e-42, -1e-42]], np.float32))  # whose step is too coarse a number to divide by
@given(weights)
def test_quantised_columns_are_within_half_a_step(weight):
    """Catches scales of the wrong axis, rounding that drifts, -128, and a division by the maximum of a zero row."""
    q, scale = quantize.quantize_columns(weight)
    assert (q.dtype, q.shape, scale.dtype, scale.shape) == (np.int8, weight.shape[::-1], np.float32, weight.shape[:1])
    assert (scale > 0).all()
    assert q.min() >= -127
    back = q.T.astype(np.float64) * scale[:, None]
    assert (np.abs(weight - back) <= scale[:, None] * (0.5 + 1e-5)).all()
    for row, column in zip(weight, q.T, strict=True):
        assert not column.any() if not row.any() else np.abs(column).max() == 127 or np.abs(row).max() < 1e-30


def run_linear(tmp_path: Path, precision: str, x: np.ndarray, weight: np.ndarray, bias: np.ndarray) -> np.ndarray:
    """Run one lowered `vlrt::Linear` in ONNX Runtime, with the settings of the backend on this processor."""
    kind = ir.TensorType(ir.DataType.FLOAT)
    given = ir.Value(name="x", shape=ir.Shape(["S", x.shape[1]]), type=kind)
    stored = {"w": weight, "b": bias}
    held = [ir.Value(name=n, shape=ir.Shape(a.shape), type=kind, const_value=ir.tensor(a)) for n, a in stored.items()]
    node = ir.Node("vlrt", "Linear", [given, *held], num_outputs=1)
    node.outputs[0].name, node.outputs[0].type = "y", kind
    node.outputs[0].shape = ir.Shape(["S", len(weight)])
    opsets = {"": 18, "com.microsoft": 1, "vlrt": 1}
    graph = ir.Graph([given], node.outputs, nodes=[node], initializers=held, opset_imports=opsets, name="linear")
    model = ir.Model(graph, ir_version=10)
    recipes = quantize.lower_linears(model, precision)
    write_graph(model, tmp_path, recipes, stored.__getitem__, lambda num_bytes: None)
    options = onnxruntime.SessionOptions()
    if processor.may_saturate(platform.machine(), processor.describe()["features"]):
        options.add_session_config_entry(*EXACT_INT8)
    session = onnxruntime.InferenceSession(tmp_path / "linear.onnx", options, providers=["CPUExecutionProvider"])
    return session.run(None, {"x": x})[0]


def test_int8_is_per_token_and_per_channel(tmp_path):
    """Catches one scale for all tokens, which lets a loud token silence the others; and a bias that is quantised."""
    rng = np.random.default_rng(0)
    x = rng.standard_normal((7, 63)).astype(np.float32) * (10.0 ** np.arange(-3, 4))[:, None].astype(np.float32)
    x[3] = 0
    weight = rng.standard_normal((33, 63)).astype(np.float32) * (2.0 ** rng.integers(-8, 8, (33, 1))).astype(np.float32)
    bias = rng.standard_normal(33).astype(np.float32)
    out = run_linear(tmp_path, "int8", x, weight, bias)
    row_max = np.maximum(np.abs(x).max(axis=1, keepdims=True), np.float32(1e-20))
    rows = x / row_max
    step = (rows.max() - rows.min()) / np.float32(255)
    zero = np.rint(-rows.min() / step)
    codes = np.clip(np.rint(rows / step) + zero, 0, 255) - zero
    q, scale = quantize.quantize_columns(weight)
    ref = (codes.astype(np.float64) @ q.astype(np.float64)) * step * scale * row_max + bias
    size = np.abs(x).max(axis=1, keepdims=True) * np.abs(weight).max(axis=1) + np.abs(bias)
    np.testing.assert_allclose(out / size, ref / size, atol=1e-5)
    exact = x.astype(np.float64) @ weight.T + bias
    error = np.linalg.norm(out - exact, axis=1) / np.linalg.norm(exact, axis=1)
    assert error.max() < 0.03
    assert np.array_equal(out[3], bias)
    louder = x.copy()
    louder[6] *= 1e6
    np.testing.assert_allclose(run_linear(tmp_path, "int8", louder, weight, bias)[:6], out[:6], rtol=1e-6)


def test_fp32_is_the_plain_product(tmp_path):
    """Catches a weight that is transposed twice, or a bias that is lost."""
    rng = np.random.default_rng(0)
    x, weight, bias = (rng.standard_normal(s).astype(np.float32) for s in ((5, 63), (7, 63), (7,)))
    out = run_linear(tmp_path, "fp32", x, weight, bias)
    np.testing.assert_allclose(out, x @ weight.T + bias, rtol=1e-4, atol=1e-4)


# The gate


@pytest.mark.parametrize(
    ("model", "weight", "row"),
    [
        (PLAIN, "visual.blocks.1.attn.proj.weight", "video tokens"),
        (TINY, "latent_injection.fc1.weight", "latents"),
    ],
)
def test_a_wrong_graph_is_not_written(make_checkpoint, place, monkeypatch, model, weight, row):
    """Catches a gate that does not look, and one whose verdict comes after the bundle is in place."""
    lower = quantize.lower_linears

    def damaged(graph, precision, kept):
        recipes = lower(graph, precision, kept)
        for name, recipe in recipes.items():
            if recipe.source == weight:
                recipes[name] = quantize.Recipe(weight, recipe.dtype, lambda w, make=recipe.make: make(w)[::-1].copy())
        return recipes

    monkeypatch.setattr(quantize, "lower_linears", damaged)
    with pytest.raises(ExportError, match=f"differ from PyTorch, so no bundle was written: .*{row}: relative error"):
        export(make_checkpoint(**model).path, place / "x.vlrt")
    assert contents(place) == {}


# Refusals


def copied(checkpoint: Checkpoint, tmp_path: Path) -> Path:
    return shutil.copytree(checkpoint.path, tmp_path / "edited")


def without(path: Path, name: str) -> None:
    tensors = safetensors.numpy.load_file(path / WEIGHTS)
    del tensors[name]
    safetensors.numpy.save_file(tensors, path / WEIGHTS)


def misshapen(path: Path, name: str) -> None:
    tensors = safetensors.numpy.load_file(path / WEIGHTS)
    tensors[name] = tensors[name][:, :-1].copy()
    safetensors.numpy.save_file(tensors, path / WEIGHTS)


def of_type(path: Path, kind: str) -> None:
    values = json.loads((path / "config.json").read_text())
    (path / "config.json").write_text(json.dumps({**values, "model_type": kind}))


UP = "model.layers.1.mlp.up_proj.weight"


@pytest.mark.parametrize(
    ("edit", "words"),
    [
        (lambda path: of_type(path, "llama"), ["llama", "qwen2_5_vl"]),
        (lambda path: without(path, UP), ["missing", UP]),
        (lambda path: without(path, "latent_injection.fc1.weight"), ["missing", "latent_injection.fc1.weight"]),
        (lambda path: misshapen(path, UP), [UP, "[224, 127]", "[224, 128]"]),
        (lambda path: (path / "tokenizer.json").unlink(), ["tokenizer.json"]),
        (lambda path: (path / "tokenizer.json").write_text("{}"), ["tokenizer.json"]),
        (lambda path: (path / "chat_template.jinja").write_text("blind"), ["edited", "0 pads", "for 1 media"]),
        (lambda path: (path / "chat_template.jinja").write_text("{{ raise_exception('no') }}"), ["edited", "no"]),
    ],
)
def test_checkpoints_that_cannot_be_exported_are_refused_by_name(
    make_checkpoint, tmp_path, place, monkeypatch, edit, words
):
    """Catches weights left at random where a tensor is missing, an error that does not say which, and wasted work."""
    monkeypatch.setattr(exporter, "_write", lambda *_: pytest.fail("weights were written"))
    path = copied(make_checkpoint(**TINY), tmp_path)
    edit(path)
    with pytest.raises(CheckpointError) as caught:
        export(path, place / "x.vlrt")
    assert all(word in str(caught.value) for word in words), caught.value
    assert contents(place) == {}


@pytest.mark.parametrize(
    ("how", "words"),
    [
        ({"backend": "tensorrt"}, "'tensorrt'; accepted: ort"),
        ({"precision": "int2"}, "'int2'; accepted with the backend ort: fp32, int8, int4"),
    ],
)
def test_unknown_settings_are_refused(make_checkpoint, place, how, words):
    """Catches a precision that silently becomes another one."""
    with pytest.raises(ConfigError, match=words):
        export(make_checkpoint(**TINY).path, place / "x.vlrt", **how)
    assert contents(place) == {}


def test_head_dims_that_the_engine_lacks_are_refused_before_any_work(make_checkpoint, place):
    """Catches a graph that loads and then fails inside the engine."""
    odd = {"decoder.hidden_size": 96, "vision.out_hidden_size": 96, "decoder.head_dim": 24}
    odd |= {"decoder.mrope_section": [4, 4, 4]}
    with pytest.raises(ExportError, match=r"head_dim is 24; .* multiples of 16"):
        export(make_checkpoint(overrides={**QUICK, **odd}).path, place / "x.vlrt")
    assert contents(place) == {}


def test_an_output_directory_that_is_not_a_bundle_is_left_alone(make_checkpoint, place):
    """Catches somebody's files replaced by a bundle."""
    (place / "work").mkdir()
    (place / "work" / "notes.txt").write_text("x")
    was = contents(place)
    with pytest.raises(ExportError, match="exists and is not a bundle"):
        export(make_checkpoint(**TINY).path, place / "work")
    assert contents(place) == was


def test_a_disk_without_room_is_refused_before_anything_is_written(make_checkpoint, place, monkeypatch):
    """Catches an hour's export that ends on a full disk."""
    usage = shutil.disk_usage(place)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage._replace(free=1_000_000))
    with pytest.raises(ExportError, match=r"takes about 0\.0 GB, .*place has 0\.0 GB free; free space"):
        export(make_checkpoint(**TINY).path, place / "x.vlrt")
    assert contents(place) == {}


def test_a_disk_that_fills_up_leaves_nothing_half_written(make_checkpoint, place, monkeypatch):
    """Catches a bare OSError in mid-export, and gigabytes left on the full disk."""

    def full(*args):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr("vlrt.export.onnx._append", full)
    with pytest.raises(ExportError, match=r"cannot write .*x\.vlrt: No space left on device; free space"):
        export(make_checkpoint(**TINY).path, place / "x.vlrt")
    assert contents(place) == {}


def test_a_write_that_the_system_cuts_short_is_no_bundle(make_checkpoint, place):
    """Catches a short write that goes unnoticed: files of this process may not pass 100 kB for a while."""
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, limits[1]))
    try:
        with pytest.raises(ExportError, match=r"cannot write .*x\.vlrt: "):
            export(make_checkpoint(**TINY).path, place / "x.vlrt")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert contents(place) == {}


# The whole


def test_progress_runs_from_start_to_end(make_checkpoint, place, monkeypatch):
    """Catches a bar that jumps back or stops short, and another default place than the working directory."""
    told = []
    monkeypatch.chdir(place)
    out = export(make_checkpoint(**PLAIN).path, progress=lambda label, done: told.append((label, done)))
    fractions = [done for _, done in told]
    assert fractions == sorted(fractions)
    assert fractions[0] >= 0
    assert fractions[-1] == 1
    assert len(set(fractions)) > 20
    labels = list(dict.fromkeys(label for label, _ in told))
    assert labels[0] == "writing weights"
    assert labels[-1] == "comparing with PyTorch"
    assert "writing graph decoder" in labels
    assert out == Path("tiny.vlrt")
    assert {p.name for p in place.iterdir()} == {"tiny.vlrt"}


MIDDLE = {
    **QUICK,
    "vision.out_hidden_size": 1024,
    "decoder.hidden_size": 1024,
    "decoder.intermediate_size": 4096,
    "decoder.num_layers": 4,
    "decoder.num_heads": 16,
    "decoder.num_kv_heads": 2,
    "decoder.head_dim": 64,
    "decoder.mrope_section": [8, 12, 12],
}

ELSEWHERE = """
import json, sys, threading, time
from vlrt.export.exporter import export

def anonymous_bytes():
    with open("/proc/self/status") as status:
        return next(1024 * int(line.split()[1]) for line in status if line.startswith("RssAnon"))

small, large, out = sys.argv[1:]
export(small, f"{out}/small.vlrt")  # also loads what every export loads
base, peaks = anonymous_bytes(), {"writing": 0, "in all": 0}

def note(stage):
    peaks[stage] = max(peaks[stage], anonymous_bytes() - base)

def watch():
    while True:
        note("in all")
        time.sleep(0.002)

threading.Thread(target=watch, daemon=True).start()
export(large, f"{out}/large.vlrt", progress=lambda label, done: label == "writing weights" and note("writing"))
print(json.dumps(peaks))
"""


def test_exports_elsewhere_are_equal_and_hold_one_copy_of_the_weights(make_checkpoint, make_bundle, tmp_path):
    """Catches names, orders or times that differ between processes, and weights held twice.

    Another process (its own hash seed) exports the same weights from shards in the other layout; then a checkpoint of
    240 MB. What is counted is memory of the process's own: pages of mapped files, which the system takes back when it
    needs them, are no copy. Measured on Linux: 0.15 of the weights while they are written, 1.1 while ONNX Runtime,
    which packs them anew, is asked.
    """
    same = make_checkpoint(**TINY, layout="nested", shard_bytes=300_000)
    large = write_checkpoint(tmp_path / "large", overrides=MIDDLE, latent=None, tie=True)
    command = [sys.executable, "-c", ELSEWHERE, str(same.path), str(large), str(tmp_path)]
    done = subprocess.run(command, capture_output=True, text=True, env={**os.environ, "PYTHONHASHSEED": "7"})
    assert done.returncode == 0, done.stderr
    first, second = Bundle.open(make_bundle(**TINY)), Bundle.open(tmp_path / "small.vlrt")
    assert first.manifest.files == second.manifest.files
    assert (first.path / MANIFEST).read_bytes() == (second.path / MANIFEST).read_bytes()
    peaks = json.loads(done.stdout.splitlines()[-1])
    weights = Bundle.open(tmp_path / "large.vlrt").num_bytes
    assert weights > 240e6
    assert peaks["writing"] < 0.3 * weights
    assert 0.5 * weights < peaks["in all"] < 1.4 * weights


def test_the_gate_lets_a_model_want_to_end_its_answer():
    """Catches a trained model that is refused because it would have ended where the gate made it go on."""
    logits = np.zeros((3, 8), np.float32)
    logits[:, 5], logits[:, 2] = 9, 4  # the end, and what is written where it may not end
    row = verify._agreement("answer", logits, (2, 2, 2), (5, 6), 1.0, 1e-4)
    assert row.ok
    assert row.value == 1
    assert not verify._agreement("answer", logits, (2, 3, 2), (5, 6), 1.0, 1e-4).ok
