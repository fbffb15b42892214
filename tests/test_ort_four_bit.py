"""libvlrt_ort: linear layers with 4-bit weights against exact integer sums, at every level of int8, and the bodies."""

import re

import numpy as np
import pytest

from tests.ort_linear_ops import assert_exact, exact, level, run, widths_of
from tests.ort_ops import linear_session
from vlrt.backends import ort_library
from vlrt.export import int4
from vlrt.export.linear_functions import FOUR_BIT, VARIANTS, Variant

__all__ = ["level"]  # a fixture
PARTS = ("codes", "scales", "zeros", "scale")


def make_inputs(variant: Variant, m: int, k: int, widths: tuple[int, ...]) -> dict[str, np.ndarray]:
    """Random inputs of a variant; `q_i` [k, n] is what its codes are in int8. Weights are the same for every m."""
    rng, weights = np.random.default_rng(m + k), np.random.default_rng(k)
    given = {"x": (rng.standard_normal((m, k)) * 10.0 ** rng.uniform(-3, 3, (m, 1))).astype(np.float32)}
    for i, n in enumerate(widths):
        blocks = 10.0 ** weights.uniform(-1, 1, (n, -(-k // 32), 1)) * weights.standard_normal((n, -(-k // 32), 32))
        weight = (blocks + weights.uniform(-1, 1, (n, 1, 1))).reshape(n, -1)[:, :k].astype(np.float32)
        made = dict(zip(PARTS, int4.quantize_blocks(weight), strict=True))
        given |= {f"{name}_{i}": array for name, array in made.items()}
        back = int4.dequantize(*list(made.values())[:3], k) / made["scale"][:, None]
        given[f"q_{i}"] = np.rint(back).T.astype(np.int8)
        np.testing.assert_allclose(given[f"q_{i}"].T, back, rtol=1e-5)  # else it were no int8
        if variant.bias:
            given[f"bias_{i}"] = rng.standard_normal(n).astype(np.float32)
    if variant.residual:
        given["residual"] = rng.standard_normal((m, widths[0])).astype(np.float32)
    return given


def session(library, variant, given, level="auto", threads=2):
    return linear_session(library, variant, FOUR_BIT, given, {ort_library.INT8: level}, threads)


@pytest.mark.parametrize("variant", VARIANTS, ids=lambda v: v.suffix)
@pytest.mark.parametrize(("k", "n"), [(1, 1), (31, 65), (64, 64), (70, 4229), (777, 300)])
def test_it_is_exact_in_integers(library, level, variant, k, n):
    """Catches nibbles, blocks or columns in another order, a zero point of another block, bytes that carry over."""
    made = session(library, variant, make_inputs(variant, 1, k, widths_of(variant, n)), level)
    for m in (1, 3, 7, 16, 17, 33, 123):
        assert_exact(made, variant, make_inputs(variant, m, k, widths_of(variant, n)))


def test_every_code_and_zero_point_is_read(library, level):
    """Catches a code times its factor that leaves a byte: the largest factor of each zero point, all codes."""
    variant = VARIANTS[0]
    zeros, k = np.arange(16), 32
    factors = 127 // np.maximum(zeros, 15 - zeros)
    factors = np.minimum(factors, 15)
    codes = np.tile(np.arange(16), (16, 2)).astype(np.uint8)
    scale = np.full(16, 0.25, np.float32)
    given = {
        "x": np.eye(k, dtype=np.float32) * 127,
        "codes_0": int4._pairs(codes)[:, None],
        "scales_0": (factors * np.float32(0.25)).astype(np.float32)[:, None],
        "zeros_0": zeros[:, None].astype(np.uint8),
        "scale_0": scale,
    }
    (out,) = run(session(library, variant, given, level), given)
    np.testing.assert_array_equal(out, 127 * 0.25 * ((codes - zeros[:, None]) * factors[:, None]).T)


@pytest.mark.parametrize("variant", VARIANTS, ids=lambda v: v.suffix)
@pytest.mark.parametrize("m", [1, 40])
def test_it_is_as_near_as_the_body(library, level, variant, m):
    """Catches an op and a body that are not the same function; MatMulNBits rounds activations by blocks, we by rows."""
    given = make_inputs(variant, m, 256, widths_of(variant, 96))
    given["x"] = np.random.default_rng(0).standard_normal(given["x"].shape).astype(np.float32)
    wanted = exact(variant, given, given["x"].astype(np.float64))
    body, ours, want = (
        np.concatenate(outs, axis=1)
        for outs in (*(run(session(lib, variant, given, level), given) for lib in (None, library)), wanted)
    )
    assert np.linalg.norm(ours - want) <= 0.02 * np.linalg.norm(want)
    assert np.linalg.norm(body - want) <= 0.02 * np.linalg.norm(want)


@pytest.mark.parametrize("variant", [VARIANTS[1], VARIANTS[5]], ids=lambda v: v.suffix)
def test_threads_change_nothing(library, level, variant):
    """Catches memory of a thread that another task still reads."""
    given = make_inputs(variant, 70, 640, widths_of(variant, 999))
    one, four = (run(session(library, variant, given, level, n), given) for n in (1, 4))
    assert all(np.array_equal(a, b) for a, b in zip(one, four, strict=True))


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"codes_0": np.zeros((3, 2, 16), np.uint8)}, "codes is [3, 2, 16], expected [3, 1, 16]"),
        ({"scales_0": np.ones((3, 2), np.float32)}, "scales is [3, 2], expected [3, 1]"),
        ({"zeros_0": np.zeros((2, 1), np.uint8)}, "zeros is [2, 1], expected [3, 1]"),
        ({"scale_0": np.ones(2, np.float32)}, "scale is [2], expected [3]"),
        ({"scale_0": np.full(3, 0.3, np.float32)}, "4-bit scales are no multiples of their column's that int8 holds"),
        ({"scales_0": np.full((3, 1), 99, np.float32)}, "no multiples of their column's that int8 holds"),
    ],
)
def test_weights_that_do_not_fit_are_refused_in_words(library, level, change, words):
    """Catches a read behind the end of an array, and scales that are rounded away."""
    given = {
        "x": np.zeros((2, 4), np.float32),
        "codes_0": np.zeros((3, 1, 16), np.uint8),
        "scales_0": np.ones((3, 1), np.float32),
        "zeros_0": np.zeros((3, 1), np.uint8),
        "scale_0": np.ones(3, np.float32),
    }
    with pytest.raises(Exception, match=re.escape(words)):
        session(library, VARIANTS[0], given | change, level)
