"""libvlrt_ort: linear layers with fp32 weights against fp64, with no more error than fp32 sums have, and the bodies.

On processors without AMX there is no level: bundles run the bodies there, and these tests are skipped.
"""

import numpy as np
import pytest
import torch

from tests.ort_linear_ops import run, widths_of
from tests.ort_ops import linear_session
from vlrt.backends import ort_library
from vlrt.export import linear_functions
from vlrt.export.linear_functions import FLOAT, VARIANTS, Variant


@pytest.fixture(autouse=True)
def _level(library) -> None:
    if library.fp32 == "none":
        pytest.skip("this processor has no level of fp32 linear layers")


def session(library, variant, given, level="auto", threads=2):
    return linear_session(library, variant, FLOAT, given, {ort_library.FP32: level}, threads)


def make_inputs(variant: Variant, m: int, k: int, widths: tuple[int, ...]) -> dict[str, np.ndarray]:
    """Random inputs of a variant, of very different loudness. Weights are the same for every m."""
    rng, weights = np.random.default_rng(m + k), np.random.default_rng(k)
    given = {"x": rng.standard_normal((m, k)) * 10.0 ** rng.uniform(-3, 3, (m, k))}
    for i, n in enumerate(widths):
        given[f"weight_{i}"] = weights.standard_normal((k, n)) * 10.0 ** weights.uniform(-3, 3, (k, n))
        if variant.bias:
            given[f"bias_{i}"] = rng.standard_normal(n)
    if variant.residual:
        given["residual"] = rng.standard_normal((m, widths[0]))
    return {name: array.astype(np.float32) for name, array in given.items()}


def exact(variant: Variant, given: dict[str, np.ndarray]) -> tuple[list[np.ndarray], list[np.ndarray]]:
    """The op in fp64, and what its rounding errors go by: the same sums, of magnitudes."""
    wide = {name: array.astype(np.float64) for name, array in given.items()}
    outs, sizes = [], []
    for i in range(variant.num_parts):
        bias = wide[f"bias_{i}"] if variant.bias else np.zeros(1)
        outs.append(wide["x"] @ wide[f"weight_{i}"] + bias)
        sizes.append(np.abs(wide["x"]) @ np.abs(wide[f"weight_{i}"]) + np.abs(bias))
    if variant.gated:
        with np.errstate(over="ignore"):
            # silu is off by its own ulps and by 1.1 times the error of its argument
            outs, sizes = [outs[0] / (1 + np.exp(-outs[0])) * outs[1]], [1.1 * sizes[0] * sizes[1]]
    if variant.residual:
        outs, sizes = [outs[0] + wide["residual"]], [sizes[0] + np.abs(wide["residual"])]
    return outs, sizes


@pytest.mark.parametrize("variant", VARIANTS, ids=lambda v: v.suffix)
@pytest.mark.parametrize(("k", "n"), [(1, 1), (31, 33), (64, 64), (70, 2115), (777, 300), (1100, 70)])
def test_it_is_as_exact_as_sums_of_floats(library, variant, k, n):
    """Catches a plane that is left out (2^-16 of the whole), columns or slices of k that are lost or added twice."""
    made = session(library, variant, make_inputs(variant, 1, k, widths_of(variant, n)))
    for m in (1, 3, 8, 9, 16, 17, 33, 123):
        given = make_inputs(variant, m, k, widths_of(variant, n))
        for out, want, size in zip(run(made, given), *exact(variant, given), strict=True):
            # planes are off by 2^-22 of the whole, sums by half an ulp of it for each term, to this side or that
            assert (np.abs(out - want) <= (4 + 3 * np.sqrt(k)) * 2.0**-24 * size * (2 if variant.gated else 1)).all()


def test_it_is_as_near_as_pytorch(library):
    """Catches errors that a bound for any numbers lets pass: products in less than fp32 are some hundred times off."""
    variant = VARIANTS[0]
    rng = np.random.default_rng(0)
    given = {
        "x": rng.standard_normal((300, 896)).astype(np.float32),
        "weight_0": rng.standard_normal((896, 640)).astype(np.float32),
    }
    (out,) = run(session(library, variant, given), given)
    (want,), _ = exact(variant, given)
    ref = (torch.from_numpy(given["x"]) @ torch.from_numpy(given["weight_0"])).numpy()
    assert np.linalg.norm(out - want) <= 1.5 * np.linalg.norm(ref - want)
    assert np.linalg.norm(out - want) > 0


@pytest.mark.parametrize("variant", VARIANTS, ids=lambda v: v.suffix)
@pytest.mark.parametrize(("m", "k", "n"), [(17, 1, 1), (33, 31, 33), (40, 70, 2115), (800, 1100, 70)])
def test_the_coarse_level_rounds_each_number_once(library, variant, m, k, n):
    """Catches bits that are cut off in place of rounded ones, and pairs of k that are out of order."""
    given = make_inputs(variant, m, k, widths_of(variant, n))
    rounded = {
        name: torch.from_numpy(array).bfloat16().float().numpy() if name.startswith(("x", "weight")) else array
        for name, array in given.items()
    }
    outs = run(session(library, variant, given, ort_library.AUTO_BF16), given)
    for out, want, size in zip(outs, *exact(variant, rounded), strict=True):
        assert (np.abs(out - want) <= (4 + 3 * np.sqrt(k)) * 2.0**-24 * size * (2 if variant.gated else 1)).all()


def test_few_rows_are_exact_at_the_coarse_level(library):
    """Catches rounding where memory bounds, and nothing is gained by it."""
    given = make_inputs(VARIANTS[0], 16, 777, (300,))
    fine, coarse = (run(session(library, VARIANTS[0], given, level), given)[0] for level in ("auto", "auto-bf16"))
    assert np.array_equal(fine, coarse)


def test_rows_beyond_a_chunk_are_exact_too(library):
    """Catches rows of the second chunk that are written where those of the first one belong."""
    variant = linear_functions.find(1, bias=True, residual=True)
    given = make_inputs(variant, 1100, 2100, (70,))
    (out,) = run(session(library, variant, given), given)
    (want,), (size,) = exact(variant, given)
    assert (np.abs(out - want) <= (4 + 3 * np.sqrt(2100)) * 2.0**-24 * size).all()


@pytest.mark.parametrize("variant", VARIANTS, ids=lambda v: v.suffix)
@pytest.mark.parametrize("m", [2, 40])
def test_the_body_is_the_same_function(library, variant, m):
    """Catches an op and a body that differ in an input or in their order."""
    given = make_inputs(variant, m, 96, widths_of(variant, 40))
    given = {name: np.random.default_rng(0).standard_normal(a.shape).astype(np.float32) for name, a in given.items()}
    for ours, body in zip(*(run(session(lib, variant, given), given) for lib in (library, None)), strict=True):
        np.testing.assert_allclose(ours, body, rtol=1e-4, atol=1e-3)


@pytest.mark.parametrize("m", [1, 40])
@pytest.mark.parametrize("bad", [np.nan, np.inf])
def test_what_is_no_number_stays_so(library, m, bad):
    """Catches a NaN whose upper half is a number, after which the answer looks well."""
    given = make_inputs(VARIANTS[0], m, 100, (70,))
    given["x"][0, 3] = bad
    (out,) = run(session(library, VARIANTS[0], given), given)
    assert not np.isfinite(out[0]).any()
    assert np.isfinite(out[1:]).all()


def test_gates_that_are_far_out(library):
    """Catches an exponential that overflows where a gate is large on either side."""
    variant = linear_functions.find(2, bias=True, gated=True)
    given = make_inputs(variant, 20, 8, (40, 40))
    given = {name: array * np.float32(1e-3) for name, array in given.items()}
    given["bias_0"] = np.linspace(-300, 300, 40, dtype=np.float32)
    (out,) = run(session(library, variant, given), given)
    np.testing.assert_allclose(out, exact(variant, given)[0][0], rtol=1e-4, atol=1e-30)


def test_threads_change_nothing(library):
    """Catches a task that writes what another one reads."""
    for variant in (VARIANTS[4], VARIANTS[6]):
        given = make_inputs(variant, 70, 1500, widths_of(variant, 333))
        one, four = (run(session(library, variant, given, threads=n), given) for n in (1, 4))
        assert all(np.array_equal(a, b) for a, b in zip(one, four, strict=True))


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"weight_0": np.zeros((5, 3), np.float32)}, r"a weight is \[5, 3\] where x is \[2, 4\]"),
        ({"bias_0": np.zeros(4, np.float32)}, r"bias is \[4\], expected \[3\]"),
        ({"residual": np.zeros((1, 3), np.float32)}, r"residual is \[1, 3\], expected \[2, 3\]"),
    ],
)
def test_inputs_that_do_not_fit_are_refused_in_words(library, change, words):
    """Catches a read behind the end of an array."""
    variant = linear_functions.find(1, bias=True, residual=True)
    given = make_inputs(variant, 2, 4, (3,)) | change
    with pytest.raises(Exception, match=words):
        run(session(library, variant, given), given)


def test_a_level_that_is_not_there_is_refused(library):
    """Catches another level in its place, without a word."""
    with pytest.raises(Exception, match=r"vlrt\.fp32 is 'mmx', which this processor does not have"):
        session(library, VARIANTS[0], make_inputs(VARIANTS[0], 1, 4, (3,)), "mmx")
