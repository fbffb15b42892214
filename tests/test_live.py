"""Streams: answers equal those about the same frames opened at once, and only what is new is computed."""

import os
import re
import subprocess
import sys
import threading
import time
from pathlib import Path

import numpy as np
import pytest

from tests.bundles import QUESTION, QUICK
from tests.test_session import same
from tests.videos import make
from vlrt import preprocess
from vlrt.errors import ConfigError, Stopped, VideoError
from vlrt.export import exporter
from vlrt.live import Window
from vlrt.runtime import Runtime
from vlrt.video import Frames

# 25 steps per second, so that a time that is slightly wrong is another position.
MODEL = {"overrides": {**QUICK, "decoder.max_positions": 2048, "vision.tokens_per_second": 25.0}}
FORCED = {"max_tokens": 8, "min_tokens": 8}
ASKED = (
    {"question": QUESTION, **FORCED},
    {"question": "Why does it move, and where to?", "reasoning": "direct", **FORCED},
    {"question": "Left or right?", "choices": ["left", "right", "neither of the two"]},
)
FPS = 3.0
ROOT = Path(__file__).parent.parent


@pytest.fixture(scope="module", params=["ort", "torch", "torch qwen2_vl"])
def runtime(request, make_bundle, make_checkpoint, tmp_path_factory):
    if request.param == "ort":
        path = make_bundle(**MODEL)
    else:
        plain = {**QUICK, "vision.full_attention_layers": [], "decoder.max_positions": 2048}
        model = MODEL if request.param == "torch" else {"family": "qwen2_vl", "overrides": plain}
        out = tmp_path_factory.mktemp("torch") / "b.vlrt"
        path = exporter.export(make_checkpoint(**model).path, out, backend="torch")
    with Runtime.open(path, threads=1, video_cache_bytes=0) as opened:
        yield opened


@pytest.fixture(scope="module")
def one(make_bundle):
    with Runtime.open(make_bundle(**MODEL), threads=1, video_cache_bytes=0) as opened:
        yield opened


@pytest.fixture
def encoded(one, monkeypatch):
    """Temporal patches of each pass of the vision tower, and rows of each pass of the decoder."""
    passes = {"vision": [], "decoder": []}
    encode, decode = one._backend.encode, one._backend.decode
    monkeypatch.setattr(
        one._backend,
        "encode",
        lambda pixels, grid, **kw: passes["vision"].append(grid[0]) or encode(pixels, grid, **kw),
    )
    monkeypatch.setattr(
        one._backend,
        "decode",
        lambda cache, embeds, *tables: passes["decoder"].append(len(embeds)) or decode(cache, embeds, *tables),
    )
    return passes


def pictures(count, height=91, width=101):
    """A square that moves over noise which is another in each frame."""
    frames = np.random.default_rng(7).integers(0, 255, (count, height, width, 3), np.uint8)
    for step, frame in enumerate(frames):
        frame[20:48, 2 * step : 2 * step + 28] = (230, 30, 30)
    return frames


def opened_at_once(runtime, frames, asked):
    return runtime.ask(Frames.from_array(frames, fps=FPS), **asked)


@pytest.mark.parametrize("pieces", [[8], [2, 2, 4], [1, 1, 1, 1, 3, 1], [3, 4], [1]])
def test_answers_equal_those_of_the_same_frames_opened_at_once(runtime, pieces):
    """Catches positions that start anew, a vision end that stays between frames, and a half patch that stays."""
    frames, at = pictures(sum(pieces)), 0
    with runtime.open_stream(fps=FPS) as stream:
        for piece in pieces:
            stream.extend(frames[at : at + piece])
            at += piece
            for asked in ASKED[: 1 + (at == len(frames))]:
                ref = opened_at_once(runtime, frames[:at], asked)
                out = stream.ask(**asked)
                same(out, ref)
                assert out.usage.num_frames == at
                assert out.usage.video_tokens == ref.usage.video_tokens


@pytest.mark.parametrize("window", [{"window_seconds": 8 / FPS}, {"window_tokens": 51}], ids=["seconds", "tokens"])
def test_answers_after_the_window_moved_equal_those_of_its_frames_opened_at_once(runtime, window):
    """Catches frames that are kept too long, and keys and values that have seen what was dropped."""
    frames = pictures(26)
    step = opened_at_once(runtime, frames[:2], ASKED[0]).usage.video_tokens
    most = 8 if "window_seconds" in window else 2 * (51 // step)
    assert most > 2
    with runtime.open_stream(fps=FPS, **window) as stream:
        at, first = 0, 0
        for number, piece in enumerate((3, 5, 1, 2, 4, 11)):
            stream.extend(frames[at : at + piece])
            at += piece
            while at + at % 2 - first > most:
                first += 2
            if number % 2 == 0 or number == 5:
                asked = ASKED[number % 3]
                same(stream.ask(**asked), opened_at_once(runtime, frames[first:at], asked))
        assert first > 0


def test_only_new_frames_are_encoded_and_read(one, encoded):
    """Catches work that is done again: what makes a stream worth having."""
    frames = pictures(12)
    with one.open_stream(fps=FPS) as stream:
        stream.extend(frames[:8])
        size = stream._memory._tokens_per_patch
        assert encoded["vision"] == [4]
        stream.ask(**ASKED[0])
        for found in encoded.values():
            found.clear()
        stream.extend(frames[8:10])
        assert encoded == {"vision": [1], "decoder": [size + 1]}  # and what ends the video
        stream.extend(frames[10:11])
        assert encoded == {"vision": [1], "decoder": [size + 1]}  # it waits
        out = stream.ask(**ASKED[0])
        assert encoded["vision"] == [1, 1]
        assert encoded["decoder"][1] == size + 1
        assert out.usage.reused_tokens > out.usage.video_tokens
        for found in encoded.values():
            found.clear()
        again = stream.ask(**ASKED[0])
        assert again.token_ids == out.token_ids
        assert encoded["vision"] == []
        assert encoded["decoder"][0] == again.usage.prompt_tokens - again.usage.reused_tokens


def test_a_window_that_moves_costs_reading_with_the_next_question_and_no_second_encoding(one, encoded):
    """Catches a tower that runs again, and a decoder that reads the window at each frame that nobody asks about."""
    frames = pictures(40)
    with one.open_stream(fps=FPS, window_seconds=8 / FPS) as stream:
        stream.extend(frames[:8])
        size = stream._memory._tokens_per_patch
        for found in encoded.values():
            found.clear()
        for at in range(8, 16, 2):
            stream.extend(frames[at : at + 2])
        assert encoded == {"vision": [1] * 4, "decoder": []}
        stream.ask(**ASKED[0])
        assert encoded["vision"] == [1] * 4
        assert encoded["decoder"][0] == 4 * size + 1
        stream.extend(frames[16:40])  # more than the window holds: the first of them are not looked at
        assert sum(encoded["vision"]) == 4 + 4
        same(stream.ask(**ASKED[1]), opened_at_once(one, frames[32:40], ASKED[1]))


def test_frames_may_be_overwritten_once_they_are_appended(one):
    """Catches a waiting frame that is a view of the caller's buffer."""
    for height, width in ((84, 112), (91, 101)):
        frames = pictures(4, height, width)
        resized = preprocess.resized(Frames.from_array(frames, fps=FPS), one.model.video, one.model.vision).data
        assert (resized.shape == frames.shape) == (height == 84)
        with one.open_stream(fps=FPS) as stream:
            for at, count in ((0, 1), (1, 2), (3, 1)):
                buffer = frames[at : at + count].copy()
                stream.extend(buffer)
                buffer[:] = 0
            same(stream.ask(**ASKED[0]), opened_at_once(one, frames, ASKED[0]))


def test_what_cannot_be_appended_is_refused_and_changes_nothing(one):
    frames = pictures(6)
    with one.open_stream(fps=FPS) as stream:
        with pytest.raises(ConfigError, match="no frame has come yet"):
            stream.ask(QUESTION)
        with pytest.raises(ConfigError, match=r"a stream of 4000 frames is too long.*window_seconds"):
            stream.extend(np.zeros((4000, 28, 28, 3), np.uint8))
        stream.extend(frames[:5])
        for wrong in (
            frames[:, :80],
            frames.astype(np.float32),
            frames[0],
            frames[:0],
            frames[..., :1],
            frames.transpose(0, 3, 1, 2),
        ):
            with pytest.raises(VideoError, match="accepted: "):
                stream.extend(wrong)
        with pytest.raises(ConfigError, match="too long"):
            stream.extend(np.repeat(frames, 500, axis=0))
        stream.extend(frames[5:])
        same(stream.ask(**ASKED[0]), opened_at_once(one, frames, ASKED[0]))
    with pytest.raises(ConfigError, match="closed"):
        stream.extend(frames)


def test_streams_that_cannot_be_are_refused(one):
    for settings, message in (
        ({"fps": 0}, "fps is 0"),
        ({"fps": float("nan")}, "fps is nan"),
        ({"fps": 2, "window_seconds": 0.5}, "window_seconds is 0.5; accepted: .* 1, or more"),
        ({"fps": 2, "window_seconds": 8, "window_tokens": 8}, "only one"),
        ({"fps": 2, "window_seconds": -1}, "window_seconds is -1"),
        ({"fps": 2, "window_tokens": 1.5}, "window_tokens is 1.5"),
        ({"fps": 2, "window_tokens": True}, "window_tokens is True"),
    ):
        with pytest.raises((ConfigError, VideoError), match=message):
            one.open_stream(**settings)
    stream = one.open_stream(fps=2, window_tokens=1)
    with pytest.raises(ConfigError, match="window_tokens is 1; accepted: "):
        stream.extend(pictures(2))
    stream = one.open_stream(fps=2, window_seconds=3600)
    with pytest.raises(ConfigError, match="too long"):  # at once, not when an hour has passed
        stream.extend(pictures(2))


def test_the_window_counts_whole_temporal_patches():
    """Catches a window one patch short for rates that floats do not hold."""
    assert Window.of(30, None).max_patches(2 / 29.97, 1) == 449
    assert Window.of(0.3, None).max_patches(0.1, 1) == 3
    assert Window.of(None, 2048).max_patches(1, 64) == 32
    assert Window.of(None, None).max_patches(1, 64) is None


def test_an_error_while_frames_are_read_loses_none_of_them(one, monkeypatch):
    """Catches a cache of which nobody knows what it holds."""
    frames = pictures(8)
    with one.open_stream(fps=FPS) as stream:
        stream.extend(frames[:4])
        with monkeypatch.context() as patched:
            patched.setattr(one._backend, "decode", lambda *_: 1 / 0)
            with pytest.raises(ZeroDivisionError):
                stream.extend(frames[4:6])
        same(stream.ask(**ASKED[0]), opened_at_once(one, frames[:6], ASKED[0]))
        with monkeypatch.context() as patched:
            patched.setattr(one._backend, "encode", lambda *_, **__: 1 / 0)
            with pytest.raises(ZeroDivisionError):
                stream.extend(frames[6:8])
        same(stream.ask(**ASKED[0]), opened_at_once(one, frames[:6], ASKED[0]))
        with monkeypatch.context() as patched:
            patched.setattr(one._backend, "logits", lambda *_: 1 / 0)
            with pytest.raises(ZeroDivisionError):
                stream.ask(**ASKED[0])
        stream.extend(frames[6:8])
        same(stream.ask(**ASKED[0]), opened_at_once(one, frames, ASKED[0]))


def test_a_question_that_is_stopped_while_the_window_is_read_leaves_the_stream_usable(one):
    frames, stop = pictures(12), threading.Event()
    stop.set()
    with one.open_stream(fps=FPS, window_seconds=8 / FPS) as stream:
        stream.extend(frames[:8])
        stream.extend(frames[8:])
        with pytest.raises(Stopped):
            stream.ask(**ASKED[0], stop=stop)
        same(stream.ask(**ASKED[0]), opened_at_once(one, frames[4:], ASKED[0]))


def test_frames_wait_for_the_question_under_way(one):
    """Catches frames that change what a question sees halfway, and a thread that waits for itself."""
    frames = pictures(6)
    refs = [opened_at_once(one, frames[:4], ASKED[1]), opened_at_once(one, frames, ASKED[1])]
    with one.open_stream(fps=FPS) as clip:
        clip.extend(frames[:4])
        written = clip.stream(QUESTION, **FORCED)
        pieces = iter(written)
        next(pieces)
        with pytest.raises(ConfigError, match="still open"):
            clip.extend(frames[4:])
        appended = threading.Thread(target=clip.extend, args=(frames[4:],))
        appended.start()
        time.sleep(0.05)
        assert clip._memory._num_patches == 2
        written.close()
        appended.join()
        same(clip.ask(**ASKED[1]), refs[1])
    with one.open_stream(fps=FPS) as clip:
        clip.extend(frames[:4])
        found = []
        threads = [threading.Thread(target=lambda: found.append(clip.ask(**ASKED[1]))) for _ in range(4)]
        threads.insert(2, threading.Thread(target=clip.extend, args=(frames[4:],)))
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        for out in found:
            same(out, refs[out.usage.num_frames == 6])
        assert len(found) == 4


def test_a_stream_grows_far_beyond_where_it_began(one):
    """Catches a cache that is full."""
    frames = pictures(120)
    with one.open_stream(fps=FPS) as stream:
        for at in range(0, len(frames), 40):
            stream.extend(frames[at : at + 40])
        assert stream._memory._cache.length > 512 + 40
        same(stream.ask(**ASKED[0]), opened_at_once(one, frames, ASKED[0]))


def test_the_example_asks_while_a_file_plays_and_at_its_end(make_bundle, tmp_path):
    """Catches an example that asks about nothing, stops early, or does not tell how late it is."""
    clip = make(tmp_path / "clip.mp4", frames=21, fps=10)
    command = [sys.executable, ROOT / "examples" / "live.py", make_bundle(**MODEL)]
    options = ["--fps", "4", "--every", "1", "--window", "1.5"]
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    done = subprocess.run([*command, clip, QUESTION, *options], capture_output=True, text=True, env=environment)
    assert done.returncode == 0, done.stderr
    answers = re.findall(r"(?:^|\n) +([0-9.]+) s  .*?\(([0-9.]+) s behind\)", done.stdout, re.DOTALL)
    times = [float(at) for at, _ in answers]
    assert times[-1] == 2.2  # 9 frames: at 0, 0.25 ... 2 s
    assert times == sorted(set(times))
    assert all(float(lag) > 0 for _, lag in answers)
    missing = subprocess.run([*command, tmp_path / "none.mp4", "?"], capture_output=True, text=True, env=environment)
    assert missing.returncode == 1
    assert re.fullmatch(r"live.py: .*No such file.*\n", missing.stderr)
