"""libvlrt_ort: int8 linear layers against exact integer sums, at every level that this processor has, and the bodies.

On processors without VNNI there is no level: bundles run the bodies there, and the tests of levels are skipped.
"""

from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime
import pytest
from onnx import TensorProto, helper

from tests.bundles import QUICK
from tests.closeness import assert_close
from tests.ort_linear_ops import LEVELS, assert_exact, exact, has, largest_terms, level, quantised, run, widths_of
from tests.ort_ops import linear_session
from vlrt.backends import ort_library
from vlrt.backends.ort import OrtBackend
from vlrt.bundle import Bundle
from vlrt.export import linear_functions
from vlrt.export.linear_functions import INT8, VARIANTS, Variant

__all__ = ["level"]  # a fixture


def session(
    library: ort_library.Library | None,
    variant: Variant,
    given: dict[str, np.ndarray],
    level: str = "auto",
    threads: int = 2,
) -> Any:
    """A graph of one op in int8: see `linear_session`."""
    return linear_session(library, variant, INT8, given, {ort_library.INT8: level}, threads)


def make_inputs(variant: Variant, m: int, k: int, widths: tuple[int, ...]) -> dict[str, np.ndarray]:
    """Random inputs of a variant: rows of very different loudness, one of zeros. Weights are the same for every m."""
    rng, weights = np.random.default_rng(m + k), np.random.default_rng(k)
    x = rng.standard_normal((m, k)) * 10.0 ** rng.uniform(-3, 3, (m, 1))
    x[m // 2] = 0 if m > 1 else x[m // 2]
    given = {"x": x}
    for i, n in enumerate(widths):
        given[f"q_{i}"] = weights.integers(-127, 128, (k, n), dtype=np.int8)
        given[f"scale_{i}"] = rng.uniform(1e-4, 1e-2, n)
        if variant.bias:
            given[f"bias_{i}"] = rng.standard_normal(n)
    if variant.residual:
        given["residual"] = rng.standard_normal((m, widths[0]))
    return {name: a if a.dtype == np.int8 else a.astype(np.float32) for name, a in given.items()}


@pytest.mark.parametrize("variant", VARIANTS, ids=lambda v: v.suffix)
@pytest.mark.parametrize(("k", "n"), [(1, 1), (63, 123), (64, 64), (70, 4229), (777, 300)])
def test_it_is_exact_in_integers(library, level, variant, k, n):
    """Catches a column or row that is lost, mixed up or read behind the end, codes that saturate, one scale for all."""
    made = session(library, variant, make_inputs(variant, 1, k, widths_of(variant, n)), level)
    for m in (1, 3, 4, 7, 16, 17, 33, 123):
        assert_exact(made, variant, make_inputs(variant, m, k, widths_of(variant, n)))


def test_rows_beyond_a_cache_are_exact_too(library, level):
    """Catches rows of the second chunk that are written where those of the first one belong."""
    variant = linear_functions.find(1, bias=True, residual=True)
    given = make_inputs(variant, 700, 3000, (70,))
    made = session(library, variant, given, level)
    (out,), (want,) = run(made, given), exact(variant, given, quantised(given))
    sizes = largest_terms(variant, given, quantised(given))
    assert_close(out / sizes[:, None].astype(np.float32), want / sizes[:, None])


@pytest.mark.parametrize("variant", VARIANTS, ids=lambda v: v.suffix)
@pytest.mark.parametrize("m", [1, 40])
def test_it_is_as_near_as_the_body(library, level, variant, m):
    """Catches an op and a body that are not the same function."""
    given = make_inputs(variant, m, 256, widths_of(variant, 96))
    given["x"] = np.random.default_rng(0).standard_normal(given["x"].shape).astype(np.float32)
    wanted = exact(variant, given, given["x"].astype(np.float64))
    body, ours, want = (
        np.concatenate(outs, axis=1)
        for outs in (*(run(session(lib, variant, given, level), given) for lib in (None, library)), wanted)
    )
    assert np.linalg.norm(ours - want) <= 1.3 * np.linalg.norm(body - want) <= 0.05 * np.linalg.norm(want)


@pytest.mark.parametrize("m", [1, 40])
@pytest.mark.parametrize("bad", [np.nan, np.inf])
def test_what_is_no_number_stays_so(library, level, m, bad):
    """Catches a NaN that the search for the largest magnitude swallows, after which the answer looks well."""
    variant = VARIANTS[0]
    given = make_inputs(variant, m, 100, (70,))
    given["x"][0, 3] = bad
    (out,) = run(session(library, variant, given, level), given)
    assert np.isnan(out[0]).all()
    assert np.isfinite(out[1:]).all()


def test_gates_that_are_far_out(library, level):
    """Catches an exponential that overflows where a gate is large on either side."""
    variant = linear_functions.find(2, bias=True, gated=True)
    given = make_inputs(variant, 20, 8, (40, 40))
    given["bias_0"] = np.linspace(-300, 300, 40, dtype=np.float32)
    given["x"] *= 1e-6
    (out,) = run(session(library, variant, given, level), given)
    np.testing.assert_allclose(out, exact(variant, given, quantised(given))[0], rtol=1e-5, atol=1e-30)


def test_threads_and_levels_change_nothing(library):
    """Catches a task that writes what another one reads, and sums that saturate at one level."""
    if not (found := [level for level in LEVELS if has(library, level)]):
        pytest.skip("this processor has no level")
    variant = VARIANTS[1]
    given = make_inputs(variant, 70, 640, (999,))
    outs = [run(session(library, variant, given, level, n), given)[0] for level in found for n in (1, 4)]
    assert all(np.array_equal(outs[0], out) for out in outs[1:])


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"q_0": np.zeros((5, 3), np.int8)}, r"a weight is \[5, 3\] where x is \[2, 4\]"),
        ({"scale_0": np.zeros(2, np.float32)}, r"scale is \[2\], expected \[3\]"),
        ({"bias_0": np.zeros(4, np.float32)}, r"bias is \[4\], expected \[3\]"),
        ({"residual": np.zeros((1, 3), np.float32)}, r"residual is \[1, 3\], expected \[2, 3\]"),
    ],
)
def test_inputs_that_do_not_fit_are_refused_in_words(library, level, change, words):
    """Catches a read behind the end of an array."""
    variant = linear_functions.find(1, bias=True, residual=True)
    given = make_inputs(variant, 2, 4, (3,)) | change
    with pytest.raises(Exception, match=words):
        run(session(library, variant, given, level), given)


def test_a_level_that_is_not_there_is_refused(library):
    """Catches another level in its place, without a word."""
    with pytest.raises(Exception, match=r"vlrt\.int8 is 'mmx', which this processor does not have"):
        session(library, VARIANTS[0], make_inputs(VARIANTS[0], 1, 4, (3,)), "mmx")


def test_weights_that_are_no_constants_are_refused_in_words(library, level):
    """Catches weights that are packed before they are there."""
    x, q, scale = (helper.make_tensor_value_info(n, t, None) for n, t in (("x", 1), ("q", TensorProto.INT8), ("s", 1)))
    node = helper.make_node("QuantizedLinear", ["x", "q", "s"], ["y"], domain="vlrt")
    graph = helper.make_graph([node], "linear", [x, q, scale], [helper.make_tensor_value_info("y", 1, None)])
    opsets = [helper.make_opsetid("", 18), helper.make_opsetid("vlrt", 1)]
    options = onnxruntime.SessionOptions()
    options.add_session_config_entry(ort_library.INT8, level)
    options.register_custom_ops_library(str(library.path))
    model = helper.make_model(graph, opset_imports=opsets, ir_version=10).SerializeToString()
    with pytest.raises(Exception, match="weights must be constants of the graph"):
        onnxruntime.InferenceSession(model, options, providers=["CPUExecutionProvider"])


@pytest.mark.skipif(not Path("/proc/self/statm").exists(), reason="this system does not tell what a process holds")
def test_packed_weights_go_with_their_session(library, level):
    """Catches memory that is packed into and never freed."""
    given = make_inputs(VARIANTS[0], 1, 1024, (10_000,))
    held = []
    for _ in range(24):
        session(library, VARIANTS[0], given, level)
        held.append(int(Path("/proc/self/statm").read_text().split()[1]) * 4096)
    assert held[-1] - held[7] < 8 * given["q_0"].nbytes  # of 16 sessions


@pytest.mark.parametrize(
    ("precision", "prefix", "of_decoder"),
    [
        ("fp32", "Float", "Float"),
        ("int8", "Quantized", "Quantized"),
        ("int4", "Quantized", "FourBit"),
    ],
)
def test_layers_of_a_bundle_are_grouped(make_bundle, precision, prefix, of_decoder):
    """Catches patterns that an exporter's other order of nodes leaves unmatched: more passes over memory."""
    bundle = Bundle.open(make_bundle(precision, overrides=QUICK))
    cfg = bundle.model
    called, found = {}, {}
    for graph in ("vision", "decoder", "lm_head"):
        model = onnx.load(bundle.path / f"{graph}.onnx", load_external_data=False)
        found[graph] = model.graph.node
        functions = {function.name for function in model.functions}
        names = [
            node.op_type for node in model.graph.node if node.op_type.startswith(("Float", "Quantized", "FourBit"))
        ]
        called[graph] = {name: names.count(name) for name in names}
        assert set(called[graph]) <= functions
    layers, depth = cfg.decoder.num_layers, cfg.vision.depth
    assert called["lm_head"] == ({} if precision == "fp32" else {"QuantizedLinear": 1})
    if precision == "fp32":
        decoder = {"Projections": layers, "LinearAdd": 2 * layers, "SwiGLU": layers}
        vision = {"Projections": depth, "LinearBias": 2, "LinearBiasAdd": 2 * depth, "SwiGLUBias": depth}
    else:
        decoder = {"NormProjections": layers, "LinearAdd": layers, "MLP": layers}
        vision = {"NormProjections": depth, "LinearBias": 2, "LinearBiasAdd": depth, "MLPBias": depth}
    assert called["decoder"] == {f"{of_decoder}{name}": count for name, count in decoder.items()}
    assert called["vision"] == {f"{prefix}{name}": count for name, count in vision.items()} | {"FloatLinear": 1}
    norms = [sum(node.op_type == "RMSNorm" for node in found[graph]) for graph in ("vision", "decoder")]
    assert norms == ([2 * depth + 1, 2 * layers + 1] if precision == "fp32" else [1, 1])


@pytest.mark.parametrize("precision", ["fp32", "int8", "int4"])
def test_a_bundle_takes_them(library, make_bundle, monkeypatch, precision):
    """Catches a runtime that runs the bodies although the library has kernels, without a word."""
    monkeypatch.setattr(ort_library, "DIRECTORY", library.path.parent)
    bundle = Bundle.open(make_bundle(precision, overrides=QUICK))
    before = ort_library.num_kernels(library)
    OrtBackend(bundle, 1)
    made = ort_library.num_kernels(library) - before
    attention = bundle.model.decoder.num_layers + bundle.model.vision.depth + 1 + (library.fp32 != "none")
    assert (made > attention) == library.packs(precision)
