"""libvlrt_ort: its kernels against the reference at every SIMD level, and bundles with and without it.

Where the library cannot be built (no CMake, compiler or headers of ONNX Runtime) its tests are skipped with that
reason; `pytest --require-ort-library` makes them fail instead. Not covered: arm64, where it has not been run.
"""

import ctypes

import numpy as np
import onnx
import pytest
import torch

from tests.bundles import QUESTION, QUICK, plain_vision, square
from tests.closeness import assert_close
from tests.ort_ops import ROOT, build, doubled, lane_bias, level, run, session, video_inputs
from vlrt import doctor, prompt
from vlrt.backends import ort_library
from vlrt.backends.ort import OrtBackend
from vlrt.bundle import Bundle
from vlrt.kernels import reference
from vlrt.positions import mrope_cos_sin
from vlrt.runtime import Runtime

__all__ = ["level"]
CANNOT_BE_BUILT = ("CMake was not found", "no C++ compiler was found", "the headers of ONNX Runtime were not found")


# The kernels


@pytest.mark.parametrize("past", [0, 5, 777])
@pytest.mark.parametrize("num_new", [1, 2, 63, 123])
@pytest.mark.parametrize(
    ("heads", "kv_heads", "dim", "batch"), [(2, 2, 16, 1), (4, 2, 80, 2), (14, 2, 64, 1), (7, 1, 128, 1), (3, 1, 18, 1)]
)
def test_video_attention_is_the_reference(library, level, num_new, past, heads, kv_heads, dim, batch):
    """Catches a slot that is read before it is filled, a mask that is off by one, rows and heads that are mixed up."""
    given = video_inputs(num_new, past, heads, kv_heads, dim, batch)
    exact = reference.video_attention(*doubled(given))
    plain = reference.video_attention(*given)
    out = run(session(library, "VideoAttention", level), *given)
    assert_close(out[0], exact[0], plain[0])
    used = slice(0, past + num_new)
    for cache, want, also in zip(out[1:], exact[1:], plain[1:], strict=True):
        assert_close(cache[:, :, used], want[:, :, used], also[:, :, used])
        assert cache[:, :, past + num_new :].isnan().all()


@pytest.mark.parametrize(("num_new", "past"), [(1, 5), (1, 777), (3, 777), (8, 2600), (63, 0), (123, 300)])
@pytest.mark.parametrize(("heads", "kv_heads", "dim"), [(14, 2, 64), (7, 1, 128), (3, 1, 18)])
def test_lane_attention_is_the_reference(library, level, num_new, past, heads, kv_heads, dim):
    """Catches a bias that goes to another row or key, hidden slots that count, and causality that a bias undoes."""
    given = video_inputs(num_new, past, heads, kv_heads, dim)
    bias = lane_bias(num_new, past, first=past // 2)
    exact = reference.video_attention(*doubled(given), bias.double())
    out = run(session(library, "LaneAttention", level), *given, bias)
    assert_close(out[0], exact[0], reference.video_attention(*given, bias)[0])


def test_without_a_bias_lane_attention_is_video_attention(library, level):
    given = video_inputs(70, 300, 4, 2, 64)
    lanes = run(session(library, "LaneAttention", level), *given, torch.zeros(1, 1, 0, 0))
    used = slice(0, 370)
    for mine, other in zip(lanes, run(session(library, "VideoAttention", level), *given), strict=True):
        assert torch.equal(*((x if x.shape[1] == 70 else x[:, :, used]) for x in (mine, other)))


@pytest.mark.parametrize("shape", [(1, 1, 3, 8), (1, 1, 4, 7), (1, 2, 3, 7)])
def test_a_bias_that_does_not_fit_is_refused_in_words(library, shape):
    """Catches a read behind the end of a bias."""
    with pytest.raises(Exception, match=r"bias is \[.*\], expected \[1, 1, 3, 7\]"):
        run(session(library, "LaneAttention"), *video_inputs(3, 4, 2, 2, 16), torch.zeros(shape))


@pytest.mark.parametrize("num_new", [1, 32])
def test_a_long_cache_is_divided_among_tasks(library, level, num_new):
    """Catches parts of a row that are merged without regard to their maxima, and a part that a row does not see."""
    given = list(video_inputs(num_new, 4999, 14, 2, 64))
    given[5][:, :, 3000:3010] *= 8  # one part has a maximum far above the others
    exact, plain = reference.video_attention(*doubled(tuple(given))), reference.video_attention(*given)
    assert_close(run(session(library, "VideoAttention", level), *given)[0], exact[0], plain[0])


@pytest.mark.parametrize(
    ("bounds", "heads", "dim"),
    [
        ([0, 1], 1, 16),
        ([0, 256, 512], 8, 80),
        ([0, 63, 63, 64, 187], 2, 64),
        ([0, 7, 777], 3, 128),
        ([0, 123], 2, 20),
        ([0, 5, 1099, 1100], 2, 16),
    ],
)
def test_segment_attention_is_the_reference(library, level, bounds, heads, dim):
    """Catches a look across a bound, an empty segment, and a head dim that leaves a remainder."""
    generator = torch.Generator().manual_seed(bounds[-1])
    q, k, v = (torch.randn(bounds[-1], heads, dim, generator=generator) for _ in range(3))
    angles = 3 * torch.randn(bounds[-1], dim // 2, generator=generator)
    given = (q, k, v, angles.cos(), angles.sin(), torch.tensor(bounds, dtype=torch.int32))
    distinct = (*given[:5], torch.unique(given[5]))
    exact, plain = reference.segment_attention(*doubled(distinct)), reference.segment_attention(*distinct)
    assert_close(run(session(library, "SegmentAttention", level), *given)[0], exact, plain)


@pytest.mark.parametrize("dim", [18, 64, 80])
def test_few_rows_are_the_same_to_the_bit(library, level, dim):
    """Catches outputs that depend on which of the two layouts the rows that share a key head are given."""
    given = video_inputs(1, 777, 18, 2, dim)
    for heads in range(1, 9):
        few = [given[0].unflatten(2, (2, 9))[:, :, :, :heads].flatten(2, 3).contiguous(), *given[1:]]
        many, out = (run(session(library, "VideoAttention", level), *x)[0].unflatten(2, (2, -1)) for x in (given, few))
        assert torch.equal(many[:, :, :, :heads], out)


def test_exp2_is_within_two_ulps(library, level):
    """Catches a polynomial of another range, and what should be nothing at the far end."""
    x = np.linspace(-126, 0, 1_000_003, dtype=np.float32)
    out = np.empty_like(x)
    where = [array.ctypes.data_as(ctypes.c_void_p) for array in (x, out)]
    call = ctypes.CDLL(str(library.path)).vlrt_exp2
    assert call(level.encode(), *where, ctypes.c_size_t(len(x))) == 0
    exact = np.exp2(x.astype(np.float64))
    assert (np.abs(out - exact) / np.spacing(exact.astype(np.float32))).max() <= 2
    x[:4] = -np.inf, -1e30, -128, np.nan
    assert call(level.encode(), *where, ctypes.c_size_t(len(x))) == 0
    assert not out[:3].any()
    assert np.isnan(out[3])


def test_what_is_no_number_stays_so(library, level):
    """Catches a NaN that a maximum swallows, after which the answer looks as if all were well."""
    given = list(video_inputs(5, 63, 2, 1, 64))
    given[5][0, 0, 7, 3] = torch.nan
    assert run(session(library, "VideoAttention", level), *given)[0].isnan().all()


def test_threads_change_nothing(library):
    """Catches a task that writes what another one reads."""
    given = video_inputs(123, 777, 14, 2, 64)
    ones, twos = (run(session(library, "VideoAttention", threads=n), *given) for n in (1, 4))
    assert all(torch.equal(a, b) for a, b in zip(ones, twos, strict=True) if not a.isnan().any())
    assert torch.equal(ones[0], twos[0])


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({7: torch.tensor(8, dtype=torch.int32)}, "past_length is 8 and 3 positions come, in a cache of 10 slots"),
        ({7: torch.tensor(-1, dtype=torch.int32)}, "past_length is -1"),
        ({2: torch.zeros(1, 3, 1, 16)}, r"v is \[1, 3, 1, 16\], expected \[1, 3, 2, 16\]"),
        ({3: torch.zeros(9, 8)}, r"cos is \[9, 8\], expected \[10, 8\]"),
        ({0: torch.zeros(1, 3, 5, 16)}, "5 heads are no multiple of 2"),
        ({0: torch.zeros(1, 3, 4, 300)}, "head dim is 300; accepted: even, 2 to 256"),
    ],
)
def test_inputs_that_do_not_fit_are_refused_in_words(library, change, words):
    """Catches a read behind the end of an array, and an exception that crosses the C boundary."""
    given = list(video_inputs(3, 2, 4, 2, 16))
    for index, tensor in change.items():
        given[index] = tensor
    with pytest.raises(Exception, match=words):
        run(session(library, "VideoAttention"), *given)


@pytest.mark.parametrize("bounds", [[0, 3], [1, 5], [0, 4, 3, 5], [0, 9]])
def test_bounds_that_do_not_fit_are_refused(library, bounds):
    """Catches segments that reach behind the tokens."""
    given = [torch.zeros(5, 1, 16)] * 3 + [torch.zeros(5, 8)] * 2 + [torch.tensor(bounds, dtype=torch.int32)]
    with pytest.raises(Exception, match="cu_seqlens does not grow from 0 to 5"):
        run(session(library, "SegmentAttention"), *given)


def test_a_level_that_is_not_there_is_refused(library):
    """Catches another level in its place, without a word."""
    with pytest.raises(Exception, match=r"vlrt\.simd is 'mmx', which this processor does not have"):
        session(library, "VideoAttention", "mmx")


# In the runtime


MODELS = [{"overrides": QUICK}, {"family": "qwen2_vl", "overrides": plain_vision()}]


@pytest.mark.parametrize("model", MODELS)
def test_answers_are_those_of_the_bodies(library, make_bundle, monkeypatch, model):
    """Catches a runtime that does not use the library although it is there, and one that answers otherwise with it."""
    monkeypatch.setattr(ort_library, "DIRECTORY", library.path.parent)
    bundle = Bundle.open(make_bundle("fp32", **model))
    answers = []
    for use in (True, False):
        backend = OrtBackend(bundle, 2, library=use)
        wanted = f"libvlrt_ort, {library.levels['auto']}" if use else "bodies of the bundle: it was not asked for"
        assert backend.kernels == wanted
        with Runtime(backend, prompt.Tokenizer.open(bundle.path)) as opened:
            answers.append(opened.ask(square(6, 56, 140), QUESTION, max_tokens=16, min_tokens=16).token_ids)
    assert answers[0] == answers[1]


@pytest.mark.parametrize("model", MODELS)
def test_int8_is_as_near_to_fp32_as_with_the_bodies(library, make_bundle, monkeypatch, model):
    """Catches kernels that int8 products upset; the last bit of an input decides how a value is quantised."""
    monkeypatch.setattr(ort_library, "DIRECTORY", library.path.parent)
    backends = [
        OrtBackend(Bundle.open(make_bundle(precision, **model)), 1, library=use)
        for precision, use in (("fp32", False), ("int8", False), ("int8", True))
    ]
    exact, body, ours = (hidden_states(backend) for backend in backends)
    assert backends[-1].kernels == f"libvlrt_ort, {library.levels['auto-bf16']}"
    assert np.linalg.norm(ours - exact) <= 2 * np.linalg.norm(body - exact) <= 0.5 * np.linalg.norm(exact)


def hidden_states(backend: OrtBackend) -> np.ndarray:
    """What the decoder makes of 40 random positions after 23 others."""
    cfg, cache = backend.model.decoder, backend.prepare(70)
    embeds = np.random.default_rng(0).standard_normal((63, cfg.hidden_size)).astype(np.float32)
    cos, sin = mrope_cos_sin(np.tile(np.arange(63), (3, 1)), cfg)
    backend.decode(cache, embeds[:23], cos[:23], sin[:23])
    return backend.decode(cache, embeds[23:], cos[23:], sin[23:])


def test_caches_are_written_in_place(library, make_bundle, monkeypatch):
    """Catches a copy of the KV cache per step, and a slot that is written twice."""
    monkeypatch.setattr(ort_library, "DIRECTORY", library.path.parent)
    bundle = Bundle.open(make_bundle("fp32", overrides=QUICK))
    ours, theirs = (OrtBackend(bundle, 1, library=use) for use in (True, False))
    cfg = ours.model.decoder
    embeds = np.random.default_rng(0).standard_normal((6, cfg.hidden_size)).astype(np.float32)
    cos, sin = mrope_cos_sin(np.tile(np.arange(6), (3, 1)), cfg)
    caches = [backend.prepare(9) for backend in (ours, theirs)]
    for start, stop in ((0, 5), (5, 6)):
        hidden = [
            backend.decode(cache, embeds[start:stop], cos[start:stop], sin[start:stop])
            for backend, cache in zip((ours, theirs), caches, strict=True)
        ]
        np.testing.assert_allclose(*hidden, rtol=1e-4, atol=1e-4)
    for mine, other in zip(caches[0].keys + caches[0].values, caches[1].keys + caches[1].values, strict=True):
        np.testing.assert_allclose(mine, other, rtol=1e-5, atol=1e-5)
        assert mine[:, :, :6].all()
        assert not mine[:, :, 6:].any()


# Where there is none


def test_it_is_built_where_it_can_be(tmp_path):
    """Catches sources that do not compile, which an installation only mentions: it goes on without the library."""
    if not (ROOT / "setup.py").exists():
        pytest.skip("holds for a checkout; this is an installed wheel")
    found = build(tmp_path)
    assert isinstance(found, ort_library.Library) or found.startswith(CANNOT_BE_BUILT), found


def test_the_reasons_reach_the_doctor(tmp_path, monkeypatch):
    """Catches a library that is missing or broken without a word."""
    monkeypatch.setattr(ort_library, "DIRECTORY", tmp_path)

    def told() -> tuple[bool, str]:
        (row,) = (row for row in doctor.abilities() if row.name == "libvlrt_ort")
        return row.available, row.reason

    assert told()[1].startswith("it was not built; ")
    (tmp_path / "not_built.txt").write_text("no C++ compiler was found\n")
    assert told() == (False, told()[1])
    assert told()[1].startswith("no C++ compiler was found; ")
    (tmp_path / ort_library.file_name()).write_bytes(b"no library")
    assert told()[1].startswith(f"{tmp_path / ort_library.file_name()} does not load here")


def test_a_bundle_opens_without_it(make_bundle, tmp_path, monkeypatch):
    """Catches a runtime that needs the library, and the wrong reason for its absence."""
    monkeypatch.setattr(ort_library, "DIRECTORY", tmp_path)
    backend = OrtBackend(Bundle.open(make_bundle("fp32", overrides=QUICK)), 1)
    assert backend.kernels.startswith("bodies of the bundle: it was not built; ")


def test_bundles_keep_their_bodies(make_bundle):
    """Catches an export on a machine with the library that no machine without it can run."""
    path = Bundle.open(make_bundle("fp32", overrides=QUICK)).path
    for graph, op in (("decoder", "VideoAttention"), ("vision", "SegmentAttention")):
        model = onnx.load(path / f"{graph}.onnx", load_external_data=False)
        assert op in {function.name for function in model.functions}
