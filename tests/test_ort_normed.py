"""libvlrt_ort: integer layers that take in the norm before them, and whole MLPs, at every level, and the bodies."""

import numpy as np
import pytest

from tests.bundles import QUICK
from tests.ort_linear_ops import assert_exact, exact, level, quantised, run
from tests.ort_ops import EPS, linear_session
from vlrt.backends import ort_library
from vlrt.backends.ort import OrtBackend
from vlrt.bundle import Bundle
from vlrt.export import int4
from vlrt.export.linear_functions import FOUR_BIT, INT8, NORMED, Format, Variant, find

__all__ = ["level"]  # a fixture
PROJECTIONS, MLPS = NORMED[0], NORMED[1:]
PARTS = ("codes", "scales", "zeros", "scale")
formats = pytest.mark.parametrize("weights", [INT8, FOUR_BIT], ids=lambda w: w.prefix)


def make_inputs(variant: Variant, weights: Format, m: int, k: int, n: int) -> dict[str, np.ndarray]:
    """Random inputs of a variant, of n columns within, from rows that eps drowns to loud ones, and one of zeros.

    `q_i` [k, n] is what codes are in int8. Weights are the same for every m.
    """
    rng, of_weights = np.random.default_rng(m + k), np.random.default_rng(k)
    x = rng.standard_normal((m, k)) * 10.0 ** rng.uniform(-4, 3, (m, 1))
    x[m // 2] = 0 if m > 1 else x[m // 2]
    given = {"x": x, "norm": 1 + 0.3 * of_weights.standard_normal(k)}
    shapes = [(k, n), (k, n), (n, k)] if variant.down else [(k, n), (k, 2 * n + 1), (k, 1)]
    for i, (rows, columns) in enumerate(shapes):
        if weights is INT8:
            given[f"q_{i}"] = of_weights.integers(-127, 128, (rows, columns), dtype=np.int8)
            given[f"scale_{i}"] = of_weights.uniform(0.5, 1.5, columns) / (73 * rows**0.5)
        else:
            weight = of_weights.standard_normal((columns, rows)).astype(np.float32) / np.float32(rows**0.5)
            made = dict(zip(PARTS, int4.quantize_blocks(weight), strict=True))
            given |= {f"{name}_{i}": array for name, array in made.items()}
            back = int4.dequantize(*list(made.values())[:3], rows) / made["scale"][:, None]
            given[f"q_{i}"] = np.rint(back).T.astype(np.int8)
        if variant.bias:
            given[f"bias_{i}"] = rng.standard_normal(columns)
    return {name: a.astype(np.float32) if a.dtype == np.float64 else a for name, a in given.items()}


def session(library, variant, weights, given, level="auto", threads=2):
    return linear_session(library, variant, weights, given, {ort_library.INT8: level}, threads)


@formats
@pytest.mark.parametrize(("k", "n"), [(1, 1), (31, 65), (64, 64), (777, 300)])
def test_projections_are_exact_in_integers(library, level, weights, k, n):
    """Catches a norm that is left out or taken of another row, codes of x as it was, an eps that is lost."""
    made = session(library, PROJECTIONS, weights, make_inputs(PROJECTIONS, weights, 1, k, n), level)
    for m in (1, 3, 16, 17, 123):
        assert_exact(made, PROJECTIONS, make_inputs(PROJECTIONS, weights, m, k, n))


@formats
@pytest.mark.parametrize("variant", MLPS, ids=lambda v: v.suffix)
@pytest.mark.parametrize(("k", "n"), [(1, 1), (31, 65), (64, 128), (70, 2115), (896, 333)])
def test_an_mlp_is_that_of_its_integers(library, level, variant, weights, k, n):
    """Catches columns within that are lost, mixed up or read behind the end, and an input that is not added.

    A number within that lies between two of bf16, or two codes, may become either: hence a hundredth of the change.
    """
    made = session(library, variant, weights, make_inputs(variant, weights, 1, k, n), level)
    for m in (1, 3, 7, 16, 17, 33, 123):
        given = make_inputs(variant, weights, m, k, n)
        (out,), (want,) = run(made, given), exact(variant, given, quantised(given))
        x = given["x"].astype(np.float64)
        rounding = 2.0**-22 * (np.linalg.norm(x, axis=1) + np.linalg.norm(want, axis=1))
        allowed = 0.01 * np.linalg.norm(want - x, axis=1) + rounding
        assert (np.linalg.norm(out - want, axis=1) <= allowed).all()


def test_most_of_an_mlp_is_exact(library, level):
    """Catches what a hundredth lets through: numbers within are cut off, or rounded more than to bf16."""
    given = make_inputs(MLPS[0], INT8, 123, 896, 333)
    given["x"] /= np.maximum(np.abs(given["x"]).max(axis=1, keepdims=True), 1e-9)
    (out,) = run(session(library, MLPS[0], INT8, given, level), given)
    (want,) = exact(MLPS[0], given, quantised(given))
    x = given["x"].astype(np.float64)
    assert np.linalg.norm(out - want) <= 1e-3 * np.linalg.norm(want - x)


@formats
@pytest.mark.parametrize("variant", NORMED, ids=lambda v: v.suffix)
@pytest.mark.parametrize("m", [1, 40])
def test_it_is_as_near_as_the_body(library, level, variant, weights, m):
    """Catches an op and a body that are not the same function."""
    given = make_inputs(variant, weights, m, 256, 96)
    given["x"] = np.random.default_rng(0).standard_normal(given["x"].shape).astype(np.float32)
    normed = given["x"] * given["norm"] / np.sqrt((given["x"] ** 2).mean(axis=1, keepdims=True) + EPS)
    outs = (run(session(lib, variant, weights, given, level), given) for lib in (None, library))
    body, ours, want = (
        np.concatenate(found, axis=1) for found in (*outs, in_floats(variant, given, normed.astype(np.float64)))
    )
    for found in (ours, body):  # which quantise otherwise, so that their errors are chance
        assert np.linalg.norm(found - want) <= 0.03 * np.linalg.norm(want)


def in_floats(variant: Variant, given: dict[str, np.ndarray], normed: np.ndarray) -> list[np.ndarray]:
    """The op in fp64, with weights that are quantised and activations that are not."""
    if not variant.down:
        return exact(variant, given, normed)
    together = find(2, bias=variant.bias, gated=True)
    (between,) = exact(together, given, normed)
    out = between @ given["q_2"].astype(np.float64) * given["scale_2"] + given["x"]
    return [out + given["bias_2"] if variant.bias else out]


@pytest.mark.parametrize("variant", NORMED, ids=lambda v: v.suffix)
@pytest.mark.parametrize("m", [1, 40])
@pytest.mark.parametrize("bad", [np.nan, np.inf])
def test_what_is_no_number_stays_so(library, level, variant, m, bad):
    """Catches a NaN that rounding to bf16 makes a number of, and rows that suffer from another one's."""
    given = make_inputs(variant, INT8, m, 100, 70)
    given["x"][0, 3] = bad
    for out in run(session(library, variant, INT8, given, level), given):
        assert np.isnan(out[0]).all()
        assert np.isfinite(out[1:]).all()


@formats
def test_threads_change_nothing(library, weights):
    """Catches a task that writes what another one reads."""
    if library.int8 == "none":
        pytest.skip("this processor has no level")
    given = make_inputs(MLPS[1], weights, 700, 640, 999)
    one, four = (run(session(library, MLPS[1], weights, given, threads=n), given)[0] for n in (1, 4))
    assert np.array_equal(one, four)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"norm": np.zeros(5, np.float32)}, r"norm is \[5\], expected \[4\]"),
        ({"q_2": np.zeros((3, 5), np.int8)}, r"the third weight of an MLP is \[3, 5\], expected \[3, 4\]"),
        ({"q_2": np.zeros((4, 3), np.int8)}, r"the third weight of an MLP is \[4, 3\], expected \[3, 4\]"),
        ({"q_1": np.zeros((4, 5), np.int8)}, "a gated pair has widths 3 and 5"),
        ({"bias_2": np.zeros(3, np.float32)}, r"bias is \[3\], expected \[4\]"),
    ],
)
def test_inputs_that_do_not_fit_are_refused_in_words(library, level, change, words):
    """Catches a read behind the end of an array."""
    given = make_inputs(MLPS[1], INT8, 2, 4, 3) | change
    with pytest.raises(Exception, match=words):
        run(session(library, MLPS[1], INT8, given, level), given)


@pytest.mark.parametrize("precision", ["int8", "int4"])
def test_bundles_take_them(library, make_bundle, monkeypatch, precision):
    """Catches graphs in which no norm is found before its layers, and hidden states that the bodies have not."""
    monkeypatch.setattr(ort_library, "DIRECTORY", library.path.parent)
    bundle = Bundle.open(make_bundle(precision, overrides=QUICK))
    rng = np.random.default_rng(0)
    hidden = []
    for use in (True, False):
        backend = OrtBackend(bundle, 1, library=use)
        cfg, cache = backend.model.decoder, backend.prepare(24)
        rng = np.random.default_rng(0)
        embeds = rng.standard_normal((24, cfg.hidden_size)).astype(np.float32)
        tables = np.ones((24, cfg.head_dim // 2), np.float32), np.zeros((24, cfg.head_dim // 2), np.float32)
        hidden.append(backend.decode(cache, embeds, *tables))
    assert np.linalg.norm(hidden[0] - hidden[1]) <= 0.1 * np.linalg.norm(hidden[1])
