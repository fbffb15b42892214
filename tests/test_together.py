"""Questions answered side by side: each answer is that of asking it alone, and one that fails leaves others alone."""

import dataclasses
import shutil
import threading

import numpy as np
import onnx
import pytest

from tests.bundles import QUESTION, QUICK, square
from vlrt import bundle, names, together
from vlrt.answer import Answer, Clock
from vlrt.bundle import Bundle
from vlrt.errors import BackendUnavailable, ConfigError, Stopped
from vlrt.export import exporter
from vlrt.fresh import DEFAULT_LATENT
from vlrt.kv_cache import TRUNK, KVCache
from vlrt.runtime import Runtime

MODEL = {"overrides": {**QUICK, "decoder.max_positions": 2048}}
FORCED = {"max_tokens": 6, "min_tokens": 6}
MIXED = (
    {"question": QUESTION, **FORCED},
    {"question": "How many?", "reasoning": "direct", "max_tokens": 9, "min_tokens": 2},
    {"question": "Why, and " + "where " * 40 + "to?", "reasoning": "cot", "max_tokens": 12},
    {"question": "Left or right?", "choices": ["left", "right", "neither of the two"]},
    {"question": "And now?", "latents": "dummy", **FORCED},
    {"question": "Which?", "reasoning": "cot", "choices": ["one", "two"], "max_tokens": 7},
    {"question": "One word?", "max_tokens": 1},
)


@pytest.fixture(scope="module")
def path(make_bundle):
    return make_bundle(**MODEL)


@pytest.fixture(scope="module")
def fresh(path):
    with Runtime.open(path, threads=1, video_cache_bytes=0) as fresh:
        yield fresh


def same(out, ref):
    assert (out.token_ids, out.text, out.thought, out.choice) == (ref.token_ids, ref.text, ref.thought, ref.choice)
    assert (out.finished, out.usage.prompt_tokens) == (ref.finished, ref.usage.prompt_tokens)
    if ref.scores is not None:
        assert out.scores == pytest.approx(ref.scores, rel=1e-4)
    assert (out.latents is None) == (ref.latents is None)
    if ref.latents is not None:
        np.testing.assert_allclose(out.latents, ref.latents, rtol=1e-3, atol=1e-5)


def passes(backend, monkeypatch):
    """Record the number of rows of each pass of the decoder."""
    rows, decode = [], backend.decode
    monkeypatch.setattr(backend, "decode", lambda *given: rows.append(len(given[1])) or decode(*given))
    return rows


def test_questions_of_every_kind_about_one_video(fresh, monkeypatch):
    """Catches a lane that sees another one, a position of another one, and steps that are not shared."""
    refs = [fresh.ask(square(), **asked) for asked in MIXED]
    with fresh.open_video(square()) as clip:
        rows = passes(fresh._backend, monkeypatch)
        for order in (range(len(MIXED)), reversed(range(len(MIXED)))):
            order = list(order)
            for i, out in zip(order, clip.ask_many([MIXED[i] for i in order]), strict=True):
                same(out, refs[i])
                assert out.usage.reused_tokens > out.usage.video_tokens
        monkeypatch.undo()
        same(clip.ask(**MIXED[0]), refs[0])  # the video is as it was
    assert len(rows) < 2 * 45
    assert max(rows) > 150  # prompts together


def test_steps_of_equal_questions_are_as_many_as_those_of_one(fresh, monkeypatch):
    """Catches lanes that are stepped one after the other, and a last token that is fed for nothing."""
    asked = [{"question": f"{QUESTION} {i}", **FORCED} for i in range(5)]
    with fresh.open_video(square()) as clip:
        rows = passes(fresh._backend, monkeypatch)
        clip.ask_many(asked)
        together_, rows[:] = list(rows), []
        clip.ask(**asked[0])
    assert [len(together_), together_[1:]] == [len(rows), [5 * count for count in rows[1:]]]


def test_questions_about_videos_of_different_lengths(fresh, monkeypatch):
    """Catches rotary tables and latents' memories of one video that serve another, and a video read twice."""
    videos = [square(), square(count=20, height=56), square(count=2, fps=9.0)]
    asked = [{"video": videos[i % 3], **MIXED[i]} for i in range(len(MIXED))]
    refs = [fresh.ask(**one) for one in asked]
    encoded, encode = [], fresh._backend.encode
    monkeypatch.setattr(fresh._backend, "encode", lambda *given, **kw: encoded.append(given) or encode(*given, **kw))
    found = fresh.ask_many(asked)
    assert len(encoded) == 3
    for out, ref in zip(found, refs, strict=True):
        same(out, ref)
    assert [out.usage.reused_tokens == 0 for out in found] == [True] * 3 + [False] * 4


@pytest.mark.parametrize("limits", [{"MAX_LANES": 2}, {"MAX_BYTES": 1}, {"MAX_BYTES": 300_000}])
def test_batches_keep_to_their_limits(fresh, monkeypatch, limits):
    """Catches questions that are lost between batches, and a batch that is larger than it may be."""
    for name, value in limits.items():
        monkeypatch.setattr(together, name, value)
        monkeypatch.setattr("vlrt.runtime.MAX_BYTES", value if name == "MAX_BYTES" else together.MAX_BYTES)
    videos = [square(), square(count=4)]
    asked = [{"video": videos[i // 4], **MIXED[i]} for i in range(len(MIXED))]
    refs = [fresh.ask(**one) for one in asked]
    made, lanes = [], together._Batch._lanes
    monkeypatch.setattr(together._Batch, "_lanes", lambda *given: made.append(len(given[1])) or lanes(*given))
    for out, ref in zip(fresh.ask_many(asked), refs, strict=True):
        same(out, ref)
    assert max(made, default=0) <= limits.get("MAX_LANES", 4)
    assert (made == []) == (limits.get("MAX_BYTES") == 1)


@pytest.mark.parametrize("plan", [{"rollout": "parallel", "rounds": 2}, {"stop": "end_token"}, {"injection": "mlp"}])
def test_other_rollouts(make_bundle, plan):
    """Catches rounds that take back the slots of one lane alone, and lanes that end early together."""
    with Runtime.open(make_bundle(latent={**DEFAULT_LATENT, **plan}, **MODEL), threads=1, video_cache_bytes=0) as fresh:
        asked = [{"video": square(), "question": f"{QUESTION} {i}", **FORCED} for i in range(3)]
        for one, out in zip(asked, fresh.ask_many(asked), strict=True):
            same(out, fresh.ask(**one))


def test_a_model_without_latents(make_bundle):
    with Runtime.open(make_bundle(latent=None, **MODEL), threads=1, video_cache_bytes=0) as fresh:
        asked = [{"video": square(), "question": f"{QUESTION} {i}", **FORCED} for i in range(3)]
        for one, out in zip(asked, fresh.ask_many(asked), strict=True):
            same(out, fresh.ask(**one))


def test_int8_answers(make_bundle):
    """Rows of int8 are rounded with regard to those beside them: answers are near, and must at least be there."""
    with Runtime.open(make_bundle("int8", **MODEL), threads=1, video_cache_bytes=0) as fresh:
        asked = [{"video": square(), "question": f"{QUESTION} {i}", **FORCED} for i in range(4)]
        found = fresh.ask_many(asked)
        for one, out in zip(asked, found, strict=True):
            ref = fresh.ask(**one)
            gap = np.linalg.norm(out.latents - ref.latents) / np.linalg.norm(ref.latents)
            assert (len(out.token_ids), gap < 0.2) == (6, True)


def test_one_that_is_stopped_or_wrong_leaves_the_others_alone(fresh, monkeypatch):
    """Catches a batch that ends with its first error, and a clock of one that stops all."""
    stop, logits = threading.Event(), fresh._backend.logits
    asked = [{"question": f"{QUESTION} {i}", **FORCED} for i in range(3)]
    refs = [fresh.ask(square(), **one) for one in asked]
    set_ = threading.Event()
    set_.set()
    with fresh.open_video(square()) as clip:
        monkeypatch.setattr(fresh._backend, "logits", lambda hidden: stop.set() or logits(hidden))
        more = [
            {**asked[0], "stop": stop},
            {**asked[1], "stop": set_},
            {"question": "x" * 9000},
            {"question": "?", "max_tokens": 0},
        ]
        found = clip.ask_many([asked[0], *more, *asked[1:]], return_errors=True)
        kinds = [Answer, Stopped, Stopped, ConfigError, ConfigError, Answer, Answer]
        assert [type(one) for one in found] == kinds
        for out, ref in zip((found[0], *found[5:]), refs, strict=True):
            same(out, ref)
        with pytest.raises(Stopped):
            clip.ask_many([asked[0], more[1]])
        monkeypatch.undo()
        same(clip.ask(**asked[1]), refs[1])
        with pytest.raises(Stopped, match="timeout_seconds"):
            clip.ask_many([{**one, "timeout_seconds": 1e-9} for one in asked])
        with pytest.raises(ConfigError, match="question 0 has wrong or missing arguments: video"):
            clip.ask_many([{**asked[0], "video": "clip.mp4"}])
        assert clip.ask_many([]) == []
        same(clip.ask(**asked[1]), refs[1])


def test_an_engine_that_fails_is_an_error_for_each_and_the_video_is_read_anew(fresh, monkeypatch):
    """Catches a cache of which nobody knows what it holds."""

    def fails(*given):
        raise BackendUnavailable("no memory")

    asked = [{"question": f"{QUESTION} {i}", **FORCED} for i in range(3)]
    refs = [fresh.ask(square(), **one) for one in asked]
    with fresh.open_video(square()) as clip:
        for name in ("logits", "inject", "decode"):
            with monkeypatch.context() as patched:
                patched.setattr(fresh._backend, name, fails)
                found = clip.ask_many(asked, return_errors=True)
            assert [type(one) for one in found] == [BackendUnavailable] * 3
        for out, ref in zip(clip.ask_many(asked), refs, strict=True):
            same(out, ref)


def test_what_many_questions_read_is_remembered(path):
    with Runtime.open(path, threads=1) as remembers:
        asked = [{"video": square(), "question": f"{QUESTION} {i}", **FORCED} for i in range(3)]
        remembers.ask_many(asked)
        assert remembers.ask(**asked[0]).usage.reused_tokens > 0
        assert all(out.usage.reused_tokens > 0 for out in remembers.ask_many(asked))


def test_a_bundle_from_before_answers_one_by_one(path, fresh, tmp_path):
    """Catches older bundles that do not open any more; their decoder takes no bias."""
    older = shutil.copytree(path, tmp_path / "older.vlrt")
    model = onnx.load(older / "decoder.onnx", load_external_data=False)
    (given,) = [value for value in model.graph.input if value.name == names.ATTENTION_BIAS.name]
    model.graph.input.remove(given)
    model.graph.initializer.append(onnx.numpy_helper.from_array(np.zeros((1, 1, 0, 0), np.float32), given.name))
    (older / "decoder.onnx").write_bytes(model.SerializeToString())
    manifest = Bundle.open(path).manifest
    graphs = {**manifest.graphs, "decoder": names.decoder(2, biased=False)}
    bundle.save_manifest(older, dataclasses.replace(manifest, graphs=graphs, files=bundle.hash_files(older)))
    asked = [{"video": square(), "question": f"{QUESTION} {i}", **FORCED} for i in range(3)]
    with Runtime.open(older, threads=1, video_cache_bytes=0) as opened:
        assert not opened._backend.has_lanes
        for one, out in zip(asked, opened.ask_many(asked), strict=True):
            same(out, fresh.ask(**one))


def test_the_torch_backend_answers_one_by_one(make_checkpoint, fresh, tmp_path):
    path = exporter.export(make_checkpoint(**MODEL).path, tmp_path / "b.vlrt", backend="torch")
    asked = [{"video": square(), "question": f"{QUESTION} {i}", **FORCED} for i in range(3)]
    with Runtime.open(path, threads=1, video_cache_bytes=0) as opened:
        for one, out in zip(asked, opened.ask_many(asked), strict=True):
            same(out, fresh.ask(**one))


def test_lanes_see_their_trunk_and_themselves(fresh):
    cache = KVCache(fresh.model.decoder, 8)
    half = fresh.model.decoder.head_dim // 2
    lanes = np.array([0, 0, TRUNK, 1, TRUNK + 2, 1], np.int32)
    rows = np.zeros((6, half), np.float32)
    cache.place(rows, rows, lanes)
    cache.advance(3)
    assert np.isneginf(cache.bias(3)[0, 0]).tolist() == [
        [False, False, True, False, True, False],
        [True, True, False, True, False, True],
        [False, False, True, False, True, False],
    ]
    cache.rewind(3)
    cache.place(rows, rows)
    assert not cache.bias(6).any()


def test_a_clock_counts_the_time_of_a_batch(fresh):
    asked = [{"video": square(), "question": f"{QUESTION} {i}", **FORCED} for i in range(3)]
    for out in fresh.ask_many(asked):
        assert out.timings["prefill"] > 0
        assert out.timings["latents"] > 0
        assert out.timings["answer"] > 0
        assert set(out.timings) == {*Clock().seconds, "total"}
