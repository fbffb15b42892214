"""Videos that stay open: answers equal those of a fresh question in every order, and nothing outlives its use."""

import gc
import os
import shutil
import weakref
from concurrent.futures import ThreadPoolExecutor
from itertools import permutations

import numpy as np
import pytest

from tests.bundles import QUESTION, QUICK, square
from tests.videos import make
from vlrt.content import content_key
from vlrt.errors import ConfigError, VideoError
from vlrt.export import exporter
from vlrt.runtime import Runtime
from vlrt.session import Recent
from vlrt.video import Frames

MODEL = {"overrides": {**QUICK, "decoder.max_positions": 2048}}
FORCED = {"max_tokens": 8, "min_tokens": 8}
QUESTIONS = (
    {"question": QUESTION, **FORCED},
    {"question": "How many?", "reasoning": "direct", **FORCED},
    {"question": "Why does it move, and " + "where " * 40 + "to?", "reasoning": "cot", "max_tokens": 30},
    {"question": "Left or right?", "choices": ["left", "right", "neither of the two"]},
    {"question": "And now?", "latents": "dummy", **FORCED},
)


@pytest.fixture(scope="module", params=["ort", "torch"])
def runtimes(request, make_bundle, make_checkpoint, tmp_path_factory):
    """One that remembers videos, and one that does not."""
    path = make_bundle(**MODEL)
    if request.param == "torch":
        out = tmp_path_factory.mktemp("torch") / "b.vlrt"
        path = exporter.export(make_checkpoint(**MODEL).path, out, backend="torch")
    with Runtime.open(path, threads=1) as remembers, Runtime.open(path, threads=1, video_cache_bytes=0) as forgets:
        yield remembers, forgets


@pytest.fixture(scope="module")
def clip(tmp_path_factory):
    return make(tmp_path_factory.mktemp("clip") / "clip.mp4", frames=60)


def same(out, ref):
    assert (out.token_ids, out.text, out.thought, out.choice) == (ref.token_ids, ref.text, ref.thought, ref.choice)
    assert out.usage.prompt_tokens == ref.usage.prompt_tokens
    assert out.warnings == ref.warnings
    if ref.scores is not None:
        assert out.scores == pytest.approx(ref.scores, rel=1e-4)
    if ref.latents is not None:
        np.testing.assert_allclose(out.latents, ref.latents, rtol=1e-3, atol=1e-5)


def test_an_open_video_answers_as_fresh_questions_do_in_every_order(runtimes, clip):
    """Catches a rewind that frees too much or too little, and positions that go on from the question before."""
    _, fresh = runtimes
    refs = [fresh.ask(clip, num_frames=8, **asked) for asked in QUESTIONS]
    with fresh.open_video(clip, num_frames=8) as opened:
        for order in list(permutations(range(len(QUESTIONS))))[::17]:
            for i in order:
                out = opened.ask(**QUESTIONS[i])
                same(out, refs[i])
                assert refs[i].usage.reused_tokens == 0
                assert refs[i].usage.video_tokens < out.usage.reused_tokens < out.usage.prompt_tokens
                assert out.timings["vision"] == 0


def test_a_second_question_about_a_file_reuses_the_first_one_s_work(runtimes, clip, tmp_path):
    """Catches work that is done again, another sampling's or another video's frames, and a copy that is not known."""
    remembers, forgets = runtimes
    first = remembers.ask(clip, QUESTION, num_frames=6, **FORCED)
    same(first, forgets.ask(clip, QUESTION, num_frames=6, **FORCED))
    again = remembers.ask(shutil.copy(clip, tmp_path / "copy.mp4"), "How many?", num_frames=6, **FORCED)
    same(again, forgets.ask(clip, "How many?", num_frames=6, **FORCED))
    assert (first.usage.reused_tokens, again.timings["vision"]) == (0, 0)
    assert again.usage.reused_tokens > again.usage.video_tokens
    assert remembers.ask(clip, QUESTION, num_frames=4, **FORCED).usage.reused_tokens == 0
    other = make(tmp_path / "other.mp4", frames=61)
    assert remembers.ask(other, QUESTION, num_frames=6, **FORCED).usage.reused_tokens == 0
    assert forgets.ask(clip, QUESTION, num_frames=6, **FORCED).usage.reused_tokens == 0


def test_a_stream_that_is_left_leaves_the_video_as_it_was(runtimes, clip):
    """Catches an answer cut short whose tokens stay in the cache."""
    _, fresh = runtimes
    ref = fresh.ask(clip, QUESTION, num_frames=8, **FORCED)
    with fresh.open_video(clip, num_frames=8) as opened:
        stream = opened.stream("How many?", max_tokens=30, min_tokens=30)
        pieces = iter(stream)
        next(pieces)
        with pytest.raises(ConfigError, match="still open"):
            opened.ask(QUESTION, **FORCED)
        stream.close()
        same(opened.ask(QUESTION, **FORCED), ref)
        pieces = list(whole := opened.stream(QUESTION, **FORCED))
        assert "".join(pieces) == ref.text == whole.answer.text


def test_an_error_in_an_answer_leaves_the_video_usable(runtimes, clip, monkeypatch):
    """Catches a cache of which nobody knows what it holds."""
    _, fresh = runtimes
    ref = fresh.ask(clip, QUESTION, num_frames=8, **FORCED)
    with fresh.open_video(clip, num_frames=8) as opened:
        with monkeypatch.context() as patched:
            patched.setattr(fresh._backend, "words", lambda *given: 1 / 0)
            with pytest.raises(ZeroDivisionError):
                opened.ask(QUESTION, **FORCED)
        out = opened.ask(QUESTION, **FORCED)
        same(out, ref)
        assert out.usage.reused_tokens == 0  # read anew


def test_questions_from_many_threads_wait_for_each_other(runtimes, clip):
    """Catches two questions in one cache."""
    remembers, forgets = runtimes
    refs = {asked["question"]: forgets.ask(clip, num_frames=8, **asked) for asked in QUESTIONS}
    with remembers.open_video(clip, num_frames=8) as opened, ThreadPoolExecutor(6) as pool:
        found = [pool.submit(opened.ask, **asked) for asked in QUESTIONS * 3]
        found += [pool.submit(remembers.ask, clip, num_frames=8, **asked) for asked in QUESTIONS * 3]
        for asked, future in zip(QUESTIONS * 6, found, strict=True):
            same(future.result(), refs[asked["question"]])


def test_what_cannot_be_opened_or_asked_is_refused(runtimes, clip, tmp_path):
    """Catches work for a video that cannot fit, and a closed video that answers."""
    remembers, _ = runtimes
    with pytest.raises(VideoError):
        remembers.open_video(tmp_path / "none.mp4")
    with pytest.raises(VideoError):
        remembers.ask(tmp_path / "none.mp4", QUESTION)
    with pytest.raises(ConfigError, match="frames of this size fit"):
        remembers.open_video(square(count=2000))
    with pytest.raises(ConfigError, match="video_cache_bytes is -1"):
        Runtime.open(tmp_path, video_cache_bytes=-1)
    opened = remembers.open_video(clip, num_frames=2)
    with pytest.raises(ConfigError, match="max_tokens"):
        opened.ask(QUESTION, max_tokens=0)
    opened.close()
    opened.close()
    with pytest.raises(ConfigError, match="closed"):
        opened.ask(QUESTION)


def test_what_is_remembered_keeps_to_its_bytes_and_goes_with_the_runtime(make_bundle, clip):
    """Catches memory that grows with every video, and memory that outlives its runtime."""
    with Runtime.open(make_bundle(**MODEL), threads=1, video_cache_bytes=150_000) as opened:
        for number in range(4):
            opened.ask(square(fps=1 + number), QUESTION, **FORCED)
        held = [memory for memory, _ in opened._recent._kept.values()]
        assert 1 <= len(held) < 4
        assert sum(memory.num_bytes for memory in held) <= 150_000
        assert opened.ask(square(fps=4), QUESTION, **FORCED).usage.reused_tokens > 0
        assert opened.ask(square(fps=1), QUESTION, **FORCED).usage.reused_tokens == 0
        watched = weakref.ref(held.pop())
        del held
    gc.collect()
    assert watched() is None


def test_recent_drops_what_was_used_longest_ago():
    """Catches a budget that counts what is gone, and one memory that pushes out all for nothing."""

    class Sized:
        def __init__(self, num_bytes):
            self.num_bytes = num_bytes

    recent, a, b, c = Recent(10), Sized(4), Sized(4), Sized(4)
    recent.put("a", a)
    recent.put("b", b)
    assert recent.take("a") is a
    recent.put("a", a)
    recent.put("c", c)
    assert recent.take("b") is None
    recent.put("huge", Sized(11))
    assert recent.take("huge") is None
    assert recent.take("a") is a
    assert recent.take("c") is c
    for _ in range(5):
        recent.put("a", a)
    recent.put("b", b)
    assert recent.take("a") is a


def test_large_files_are_not_read_whole_and_still_told_apart(tmp_path, monkeypatch):
    """Catches seconds of hashing before a long video, and one that was changed in its middle."""
    monkeypatch.setattr("vlrt.content.WHOLE_BYTES", 3 * 2**20)
    large = tmp_path / "large.mp4"
    large.write_bytes(bytes(4 * 2**20))
    first = content_key(large, 4, None)
    assert content_key(large, 4, None) == first
    with large.open("r+b") as file:
        file.seek(2 * 2**20)
        file.write(b"changed")
    os.utime(large, ns=(0, 1))
    assert content_key(large, 4, None) != first
    small = tmp_path / "small.mp4"
    small.write_bytes(bytes(2**20))
    assert content_key(small, 4, None) == content_key(shutil.copy(small, tmp_path / "copy.mp4"), 4, None)


def test_contents_are_named_by_what_is_in_them(clip, tmp_path):
    """Catches a name by path, and frames at other times taken for the same."""
    copied = shutil.copy(clip, tmp_path / "copy.mp4")
    assert content_key(clip, 4, None) == content_key(str(copied), 4, None)
    assert content_key(clip, 4, None) != content_key(clip, 5, None)
    assert content_key(clip, None, 4.0) != content_key(clip, 4, None)
    assert content_key(clip.read_bytes(), 4, None) != content_key(clip.read_bytes()[:-1], 4, None)
    pictures = np.zeros((4, 56, 56, 3), np.uint8)
    assert content_key(Frames.from_array(pictures, fps=1), None, None) == content_key(
        Frames.from_array(pictures.copy(), fps=1), None, None
    )
    assert content_key(Frames.from_array(pictures, fps=1), None, None) != content_key(
        Frames.from_array(pictures, fps=2), None, None
    )
    assert content_key(tmp_path / "none.mp4", None, None) is None
    assert content_key(7, None, None) is None
    assert content_key([clip, copied], None, None) == content_key([clip, clip], None, None)
    assert content_key([clip], None, None) != content_key(clip, None, None)


def test_a_video_that_fits_a_question_can_be_opened(runtimes):
    """Catches room for questions that is kept where the model's positions end before."""
    _, fresh = runtimes
    long = square(count=280, fps=200)
    ref = fresh.ask(long, QUESTION, **FORCED)
    assert 2048 - 512 < ref.usage.prompt_tokens < 2048 - 64
    with fresh.open_video(long) as opened:
        same(opened.ask(QUESTION, **FORCED), ref)
