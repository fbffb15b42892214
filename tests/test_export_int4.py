"""int4 bundles: blocks of weights, the operator that reads them, the bundle, and the gate that refuses damage.

Not covered: sizes beyond a few layers, and how fast the operator is.
"""

from pathlib import Path

import numpy as np
import onnx
import onnx_ir as ir
import onnxruntime
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as arrays

from tests.bundles import QUESTION, QUICK, square
from vlrt.bundle import Bundle
from vlrt.errors import ConfigError, ExportError
from vlrt.export import int4, int4_check, quantize
from vlrt.export.exporter import export
from vlrt.export.onnx import write_graph
from vlrt.runtime import Runtime

TINY = {"overrides": QUICK}
WEIGHT = "model.layers.0.mlp.down_proj.weight"

weights = st.tuples(st.integers(1, 5), st.integers(1, 99)).flatmap(
    lambda shape: arrays.arrays(np.float32, shape, elements=st.floats(-1e4, 1e4, width=32))
)


@settings(max_examples=200, deadline=None)
@example(np.array([[4.348e-42, -1e-42]], np.float32))  # whose step is too coarse a number to divide by
@example(np.full((1, 33), -7, np.float32))  # one sign alone
@example(np.concatenate([np.full((1, 32), 1e4), np.linspace(-1, 1, 32)[None]], axis=1).astype(np.float32))
@given(weights)
def test_blocks_are_within_half_a_step(weight):
    """Catches steps of the wrong block, codes that clip at one end, nibbles in another order, padding that counts.

    The step that a block wants is its span / 15. A multiple of the column's step is at most one of these above that.
    """
    codes, scale, zero, column = int4.quantize_blocks(weight)
    assert (codes.shape, scale.shape, zero.shape, column.shape) == int4.shapes(*weight.shape)
    assert (codes.dtype, scale.dtype, zero.dtype, column.dtype) == (np.uint8, np.float32, np.uint8, np.float32)
    back = int4.dequantize(codes, scale, zero, weight.shape[1])
    for start in range(0, weight.shape[1], int4.BLOCK_SIZE):
        block, index = weight[:, start : start + int4.BLOCK_SIZE], start // int4.BLOCK_SIZE
        span = np.maximum(block.max(axis=1), 0) - np.minimum(block.min(axis=1), 0)
        most = np.where(column == 1, 1, span / 15 + column) * (0.5 + 1e-4)
        error = np.linalg.norm(block - back[:, start : start + int4.BLOCK_SIZE], axis=1)
        assert (error <= most * np.sqrt(block.shape[1]) + 1e-37).all()
        assert (scale[:, index] <= np.where(column == 1, 1, span / 15 + column) * (1 + 1e-4)).all()


@settings(max_examples=200, deadline=None)
@given(weights)
def test_weights_are_int8_times_the_scale_of_their_column(weight):
    """Catches factors that are no whole numbers, and codes whose product with one leaves a byte."""
    _, scale, zero, column = int4.quantize_blocks(weight)
    factors = scale / column[:, None]
    np.testing.assert_allclose(factors, np.rint(factors), rtol=1e-6)
    assert (factors >= 1 - 1e-6).all()
    zeros = int4._halves(zero)[:, : scale.shape[1]].astype(np.int64)
    assert (np.rint(factors) * np.maximum(zeros, 15 - zeros) <= 127).all()


def test_steps_cost_little_by_being_multiples():
    """Catches one step for a whole column: blocks that are ten times quieter would lose all but two of their codes."""
    rng = np.random.default_rng(0)
    loud = rng.standard_normal((64, 64)) * np.repeat([1.0, 0.2], 32)
    for weight, most in ((rng.standard_normal((64, 64)), 0.085), (loud, 0.095)):
        made = int4.quantize_blocks(weight.astype(np.float32))
        back = int4.dequantize(*made[:3], 64)
        for part in (slice(0, 32), slice(32, 64)):
            error = np.linalg.norm(back[:, part] - weight[:, part]) / np.linalg.norm(weight[:, part])
            assert error < most


@pytest.mark.parametrize(("num_inputs", "num_outputs"), [(64, 33), (63, 8), (17, 5), (96, 1)])
@pytest.mark.parametrize("biased", [False, True])
def test_the_operator_computes_with_these_weights(tmp_path: Path, num_inputs, num_outputs, biased):
    """Catches inputs, nibbles or zero points that ONNX Runtime reads otherwise, at widths of odd blocks too."""
    rng = np.random.default_rng(0)
    stored = {WEIGHT: rng.standard_normal((num_outputs, num_inputs)).astype(np.float32) + np.float32(0.5)}
    if biased:
        stored["b"] = rng.standard_normal(num_outputs).astype(np.float32)
    x = rng.standard_normal((7, num_inputs)).astype(np.float32) * (10.0 ** np.arange(-3, 4))[:, None].astype(np.float32)
    kind = ir.TensorType(ir.DataType.FLOAT)
    given = ir.Value(name="x", shape=ir.Shape(["S", num_inputs]), type=kind)
    held = [ir.Value(name=n, shape=ir.Shape(a.shape), type=kind, const_value=ir.tensor(a)) for n, a in stored.items()]
    node = ir.Node("vlrt", "Linear", [given, *held], num_outputs=1)
    node.outputs[0].name, node.outputs[0].type, node.outputs[0].shape = "y", kind, ir.Shape(["S", num_outputs])
    graph = ir.Graph([given], node.outputs, nodes=[node], initializers=held, opset_imports={"": 18}, name="linear")
    model = ir.Model(graph, ir_version=10)
    recipes = quantize.lower_linears(model, "int4")
    write_graph(model, tmp_path, recipes, stored.__getitem__, lambda num_bytes: None)
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = 1
    session = onnxruntime.InferenceSession(tmp_path / "linear.onnx", options, providers=["CPUExecutionProvider"])
    out = session.run(None, {"x": x})[0]
    back = int4.dequantize(*int4.quantize_blocks(stored[WEIGHT])[:3], num_inputs)
    ref = x.astype(np.float64) @ back.T + stored.get("b", 0)
    size = np.abs(x).max(axis=1, keepdims=True) * np.linalg.norm(back, axis=1) * np.sqrt(num_inputs) / 127
    assert (np.abs(out - ref) <= size + 1e-5 * np.abs(ref)).all()  # activations are rounded to 8 bits per token
    assert not np.allclose(out, ref, rtol=1e-6, atol=0)  # which level 4 asks for


def test_an_int4_bundle_answers_and_says_what_it_is(make_bundle):
    """Catches layers left in another precision, a tower that lost bits too, and a record that does not say int4."""
    bundle = Bundle.open(make_bundle("int4", **TINY))
    assert bundle.precision == "int4"
    rows = {row.name: row for row in bundle.parity}
    weight = rows.pop("int4 weights: largest relative error")
    assert 0.06 < weight.value < 0.1
    assert weight.limit == 0.18
    assert rows["video tokens: relative error"].limit == 0.25
    assert rows["hidden states: relative error"].limit == rows["latents: relative error"].limit == 0.6
    assert 0.1 < rows["hidden states: relative error"].value < 0.5
    assert all(row.ok for row in bundle.parity)
    ops = {
        name: [node.op_type for node in onnx.load(bundle.path / f"{name}.onnx", load_external_data=False).graph.node]
        for name in ("decoder", "vision", "lm_head")
    }
    assert sum(op.startswith("FourBit") for op in ops["decoder"]) == 3 * bundle.model.decoder.num_layers
    assert not any(op.startswith(("Quantized", "Float")) or op in ("MatMul", "Linear") for op in ops["decoder"])
    for name in ("vision", "lm_head"):
        assert any(op.startswith("Quantized") for op in ops[name])
        assert not any(op.startswith("FourBit") for op in ops[name])
    with Runtime.open(bundle.path, threads=1) as runtime:
        for reasoning in ("direct", "latent"):
            answer = runtime.ask(square(6, 56, 140), QUESTION, reasoning=reasoning, max_tokens=4, min_tokens=4)
            assert len(answer.token_ids) == 4


def test_int4_takes_less_space_than_int8(make_checkpoint, tmp_path):
    """Catches codes of a byte each: a decoder that is all linear layers takes 5.1 of 8 bits."""
    wide = {**QUICK, "decoder.intermediate_size": 4096}
    path = make_checkpoint(overrides=wide, latent=None).path
    four, eight = (Bundle.open(export(path, tmp_path / f"{p}.vlrt", precision=p)) for p in ("int4", "int8"))
    size = [bundle.manifest.files["decoder.bin"].num_bytes for bundle in (four, eight)]
    assert size[0] < 0.75 * size[1]
    assert four.num_bytes < eight.num_bytes


def test_a_damaged_bundle_is_not_written(make_checkpoint, tmp_path, monkeypatch):
    """Catches limits so wide that garbage passes: one matrix whose rows are in the wrong order."""
    lower = quantize.lower_linears

    def damaged(graph, precision, kept):
        recipes = lower(graph, precision, kept)
        for name, recipe in recipes.items():
            if recipe.source == WEIGHT:
                recipes[name] = quantize.Recipe(WEIGHT, recipe.dtype, lambda w, make=recipe.make: make(w)[::-1].copy())
        return recipes

    monkeypatch.setattr(quantize, "lower_linears", damaged)
    with pytest.raises(
        ExportError, match=r"differ from PyTorch, so no bundle was written: .*hidden states.*int4 weights"
    ):
        export(make_checkpoint(**TINY).path, tmp_path / "x.vlrt", precision="int4")
    assert not (tmp_path / "x.vlrt").exists()


@pytest.mark.parametrize("suffix", ["", *int4.SUFFIXES])
def test_every_part_of_a_matrix_is_checked(make_checkpoint, make_bundle, tmp_path, suffix):
    """Catches a check that skips a part: codes, scales or zero points of one matrix, with their rows reversed."""
    bundle, checkpoint = Bundle.open(make_bundle("int4", **TINY)), make_checkpoint(**TINY)
    model = onnx.load(bundle.path / "decoder.onnx")
    for tensor in model.graph.initializer:
        if suffix and tensor.name == WEIGHT + suffix:
            tensor.CopyFrom(onnx.numpy_helper.from_array(onnx.numpy_helper.to_array(tensor)[::-1].copy(), tensor.name))
    onnx.save(model, tmp_path / "decoder.onnx")
    row = int4_check.check(tmp_path / "decoder.onnx", lambda name: checkpoint.weight(name).float().numpy())
    assert row.ok == (not suffix)
    assert row.value == bundle.parity[-1].value if not suffix else row.value > row.limit


def test_what_is_accepted_is_listed(make_checkpoint, tmp_path):
    """Catches a message that leaves int4 out, and int4 for the backend that has none."""
    path = make_checkpoint(**TINY).path
    with pytest.raises(ConfigError, match="precision is 'int2'; accepted with the backend ort: fp32, int8, int4"):
        export(path, tmp_path / "x.vlrt", precision="int2")
    with pytest.raises(
        ConfigError, match="precision is 'int4'; accepted with the backend torch: fp32, bf16, fp16, fp8"
    ):
        export(path, tmp_path / "x.vlrt", backend="torch", precision="int4")
