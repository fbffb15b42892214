"""Decoding beside the vision tower: the same tokens, the same errors, no thread left; overlap is shown by events.

Not covered: how much time it saves, which benches measure; a GPU's own copies (tests/test_uploads.py).
"""

import contextlib
import gc
import threading
import time
import weakref
from dataclasses import replace

import numpy as np
import pytest
from PIL import Image

from tests.bundles import QUESTION, QUICK, square
from tests.fakes import FakeBackend, fake_model
from tests.videos import busy, make, picture
from vlrt import preprocess, reduction, seeing, video
from vlrt.answer import Clock
from vlrt.errors import BackendUnavailable, ConfigError, Stopped, VideoError
from vlrt.generate import pool
from vlrt.reduction import Reduction
from vlrt.runtime import Runtime
from vlrt.seeing import View, see
from vlrt.video import Frames

LIMIT = 20  # seconds until a test that waits for another thread gives up
SIZE = (56, 84)
PER_STEP = 4 * 6  # patches of a temporal patch of that size


def anything(*_):
    """Refuse nothing."""


class Tower(FakeBackend):
    """Tokens that tell every pixel; notes what it was given.

    Attributes:
        seen: patches of each pass.
        before: called at the start of each pass.
    """

    def __init__(self, steps_per_pass=1):
        super().__init__(fake_model(overrides={"video.min_pixels": 28 * 28}))
        self.seen, self.before, self.vision_chunk = [], anything, steps_per_pass * PER_STEP

    def encode(self, pixels, grid_thw, *, last=True):
        self.before()
        self.seen.append(len(pixels))
        each = pixels.reshape(len(pixels) // 4, -1).astype(np.float64)
        return np.stack([each.sum(1), (each * np.arange(each.shape[1])).sum(1)], axis=1).astype(np.float32)

    def see(self, view, clock=None, admit=anything, fits=anything):
        return see(self, self.model, view, clock or Clock(), admit, fits)


def wait_for(tower):
    """Return once the tower has run."""
    start = time.monotonic()
    while not tower.seen and time.monotonic() - start < LIMIT:
        time.sleep(0.001)


def threads():
    return [thread for thread in threading.enumerate() if thread.name.startswith("vlrt-decode")]


@pytest.fixture(autouse=True)
def no_thread_is_left():
    yield
    assert not threads()


@pytest.fixture(autouse=True)
def short_videos_too(monkeypatch):
    monkeypatch.setattr(seeing, "LEAST_PASSES", 1)


@pytest.fixture(scope="module")
def clip(tmp_path_factory):
    return make(tmp_path_factory.mktemp("clip") / "clip.mp4", frames=30, height=SIZE[0], width=SIZE[1])


@pytest.fixture(scope="module")
def pictures(tmp_path_factory):
    folder = tmp_path_factory.mktemp("pictures")
    for number in range(7):
        Image.fromarray(picture(number, *SIZE)).save(folder / f"{number}.png")
    return sorted(folder.iterdir())


@pytest.fixture(scope="module")
def damaged(tmp_path_factory):
    """A file whose packets from the middle of the last group on are zeros."""
    path = make(tmp_path_factory.mktemp("damaged") / "x.mp4", pictures=busy(60), frames=60, gop=12)
    content = bytearray(path.read_bytes())
    first = content.index(b"mdat") + 4
    start, stop = first + (len(content) - first) * 85 // 100, len(content) - 4000  # behind it is the index
    content[start:stop] = bytes(stop - start)
    path.write_bytes(content)
    return path


class Decoder:
    """A `video.load` that is told when to go on.

    Args:
        count: frames of the video.
        script: called before frame `i` is written, with `i` and `check`.
    """

    def __init__(self, count, script):
        self.count, self.script = count, script
        self.data = np.stack([picture(i, *SIZE) for i in range(count)])
        self.written = 0

    def __call__(self, source, settings, vision, *, target, check, admit, **_):
        admit(self.count, *SIZE)
        data = target.begin((self.count, *SIZE, 3))
        data[:] = 77
        for i in range(self.count):
            self.script(i, check)
            data[i] = self.data[i]
            target.written(i + 1)
            self.written = i + 1
        return Frames(data, np.arange(self.count) / 2, 2.0, self.count / 2, 2.0, 100, 100)


def ref(tower, view):
    """Return tokens and pooled tokens of a video that is decoded whole, and encoded in one pass."""
    model = tower.model
    frames = video.load(view.video, model.video, model.vision, num_frames=view.num_frames, fps=view.fps)
    sized = preprocess.resized(frames, model.video, model.vision)
    patches = preprocess.patchify(sized, model.video, model.vision)
    tokens = tower.encode(patches.pixels, patches.grid_thw)
    pooled = pool(tokens, patches.grid_thw[0])
    if view.reduce.unchanged is not None:
        kept = reduction.changed(sized, model.vision, view.reduce.unchanged)
        tokens = tokens[kept.reshape(-1)]
    return tokens, pooled, frames, patches


# Tokens


@pytest.mark.parametrize("steps_per_pass", [1, 3, 100])
@pytest.mark.parametrize(
    ("kind", "settings"),
    [
        ("clip", {"num_frames": 2}),
        ("clip", {"num_frames": 14}),
        ("clip", {"fps": 7.0}),
        ("clip", {"num_frames": 14, "reduce": Reduction(keep=0.5)}),
        ("clip", {"num_frames": 14, "reduce": Reduction(unchanged=0)}),
        ("bytes", {"num_frames": 6}),
        ("pictures", {}),
        ("pictures", {"num_frames": 4}),
        ("picture", {}),
        ("list of one", {}),
        ("frames", {}),
    ],
)
def test_tokens_are_those_of_a_video_that_is_decoded_first(clip, pictures, kind, settings, steps_per_pass):
    """Catches patches cut of frames that are not there yet, a last frame that is not repeated, times that are lost."""
    source = {
        "clip": clip,
        "bytes": clip.read_bytes(),
        "pictures": pictures,
        "picture": pictures[0],
        "list of one": pictures[:1],
        "frames": square(5),
    }[kind]
    tower, view = Tower(steps_per_pass), View(source, **settings)
    tokens, pooled, frames, patches = ref(tower, view)
    seen = tower.see(view)
    np.testing.assert_array_equal(seen.tokens, tokens)
    if view.reduce.unchanged is None:
        np.testing.assert_array_equal(seen.pooled, pooled)
    assert seen.shown.media.grid_thw == patches.grid_thw
    assert seen.shown.media.seconds_per_temporal_patch == patches.seconds_per_temporal_patch
    assert seen.shown.media.is_image == frames.is_image
    assert (seen.shown.num_frames, seen.shown.warnings) == (len(frames.data), frames.warnings)


def test_answers_are_those_of_the_same_frames_as_an_array(make_bundle, clip):
    """Catches an engine that sees other frames, or fewer, by this way than by the other."""
    with Runtime.open(make_bundle(overrides=QUICK), threads=1, video_cache_bytes=0) as opened:
        opened._backend.vision_chunk = PER_STEP
        cfg = opened.model
        frames = video.load(clip, cfg.video, cfg.vision, num_frames=8)
        array = replace(frames, data=frames.data.copy())
        out, other = (opened.ask(source, QUESTION, num_frames=8, max_tokens=6) for source in (clip, array))
        assert out.token_ids == other.token_ids
        np.testing.assert_array_equal(out.latents, other.latents)
        with opened.open_video(clip, num_frames=8) as held:
            assert held.ask(QUESTION, max_tokens=6).token_ids == out.token_ids


# Order


def test_the_tower_runs_while_later_frames_are_decoded(monkeypatch):
    """Catches a decoder that is waited for: this one goes on only once the tower has run over what is there."""
    tower, ran = Tower(), [threading.Semaphore(0) for _ in range(4)]
    tower.before = lambda: ran[len(tower.seen)].release()

    def script(i, check):
        if i and i % 2 == 0:
            assert ran[i // 2 - 1].acquire(timeout=LIMIT), "the tower waits for the last frame"

    decoder = Decoder(8, script)
    monkeypatch.setattr(video, "load", decoder)
    seen = tower.see(View("x.mp4"))
    assert tower.seen == [PER_STEP] * 4
    tower.before = anything
    whole = Frames.from_array(decoder.data, fps=2)
    pixels = preprocess.patchify(whole, tower.model.video, tower.model.vision).pixels
    np.testing.assert_array_equal(seen.tokens, tower.encode(pixels, (4, 4, 6)))


@pytest.mark.parametrize("least", [4, 5])
def test_a_video_of_few_passes_is_decoded_first(least, monkeypatch):
    """Catches a short video that takes longer, since decoder and tower share two cores."""
    tower, at = Tower(), []
    decoder = Decoder(8, lambda i, check: wait_for(tower) if least == 4 and i == 2 else None)
    tower.before = lambda: at.append(decoder.written)
    monkeypatch.setattr(seeing, "LEAST_PASSES", least)
    monkeypatch.setattr(video, "load", decoder)
    tower.see(View("x.mp4"))
    assert (at[0] < 8) == (least == 4)


@pytest.mark.parametrize("reduce", [Reduction(unchanged=1.0), Reduction(unchanged=0, keep=0.5)])
def test_what_depends_on_all_frames_is_encoded_when_they_are_there(clip, reduce):
    """Catches tokens that are encoded before it is known whether a question about what is left of them fits."""
    tower, order = Tower(), []
    tower.before = lambda: order.append("encode")
    tower.see(View(clip, num_frames=4, reduce=reduce), fits=lambda shown: order.append(len(shown.kept)))
    assert order[0] == 2 * PER_STEP // 4
    assert "encode" in order


@pytest.mark.parametrize("kind", ["clip", "pictures", "picture"])
def test_nothing_is_encoded_or_decoded_for_what_is_refused(kind, monkeypatch, request):
    """Catches a tower that begins before memory and positions were looked at."""
    source = request.getfixturevalue("pictures" if kind == "picture" else kind)
    tower = Tower()

    def refuse(*_):
        raise ConfigError("too long")

    monkeypatch.setattr(video.Memory, "begin", None)
    with pytest.raises(ConfigError, match="too long"):
        tower.see(View(source[0] if kind == "picture" else source), admit=refuse)
    assert not tower.seen


@pytest.mark.parametrize("reduce", [None, Reduction(keep=0.9), Reduction(unchanged=0)])
def test_a_question_that_does_not_fit_is_refused_before_the_tower_runs(make_bundle, clip, reduce, monkeypatch):
    """Catches positions that are counted too late where tokens are dropped."""
    path = make_bundle(overrides={**QUICK, "decoder.max_positions": 200})
    with Runtime.open(path, threads=1) as opened:
        monkeypatch.setattr(opened._backend, "encode", None)
        with pytest.raises(ConfigError, match="positions"):
            opened.ask(clip, QUESTION, num_frames=30, reduce=reduce, max_tokens=180)


# What goes wrong


def test_damage_behind_frames_that_were_encoded_is_the_same_error(damaged, make_bundle):
    """Catches an error that is lost in a thread, or told otherwise, and half a video that is remembered."""
    with Runtime.open(make_bundle(overrides=QUICK), threads=1) as opened:
        backend, passes = opened._backend, []
        encode, backend.vision_chunk = backend.encode, 1
        backend.encode = lambda *given, **kw: passes.append(1) or encode(*given, **kw)
        with pytest.raises(VideoError) as ref:
            video.load(damaged, opened.model.video, opened.model.vision, num_frames=30)
        for _ in range(2):
            with pytest.raises(VideoError) as out:
                opened.ask(damaged, QUESTION, num_frames=30)
            assert str(out.value) == str(ref.value)
            assert "does not decode" in str(out.value)
            assert type(out.value.__cause__) is type(ref.value.__cause__)
            assert not opened._recent._kept
        assert len(passes) > 2


def test_an_error_of_the_decoder_is_told_before_frames_that_are_there_are_encoded(monkeypatch):
    """Catches minutes of work for an answer that nobody gets."""
    tower, began, failed = Tower(), threading.Event(), threading.Event()

    def script(i, check):
        if i == 6:
            assert began.wait(LIMIT)
            failed.set()
            raise VideoError("damaged")

    monkeypatch.setattr(video, "load", Decoder(8, script))

    def before():
        began.set()
        assert failed.wait(LIMIT)
        for thread in threads():
            thread.join(LIMIT)

    tower.before = before
    with pytest.raises(VideoError, match="damaged"):
        tower.see(View("x.mp4"))
    assert len(tower.seen) == 1


@pytest.mark.parametrize("error", [BackendUnavailable("no memory"), KeyboardInterrupt()])
def test_an_error_of_the_tower_ends_the_decoder(error, monkeypatch):
    """Catches a thread that decodes on for nobody: this decoder ends only where it is told to."""
    tower = Tower()

    def fail():
        raise error

    def script(i, check):
        start = time.monotonic()
        while i == 4 and time.monotonic() - start < LIMIT:
            check()

    tower.before = fail
    decoder = Decoder(8, script)
    monkeypatch.setattr(video, "load", decoder)
    with pytest.raises(type(error)):
        tower.see(View("x.mp4"))
    assert decoder.written <= 4
    assert not threads()


@pytest.mark.parametrize("fails", ["decoder", "tower"])
def test_an_error_lets_go_of_the_frames(fails, monkeypatch):
    """Catches a video's frames that stay until the garbage is collected: the error would refer to itself."""
    tower, given = Tower(), []

    def fail(i=6, check=None):
        if i == 6:
            raise VideoError("damaged")

    class Noted(video.Memory):
        def begin(self, shape):
            data = super().begin(shape)
            given.append(weakref.ref(data))
            return data

    monkeypatch.setattr(video, "Memory", Noted)
    monkeypatch.setattr(video, "load", Decoder(8, fail if fails == "decoder" else anything))
    if fails == "tower":
        tower.before = fail
    gc.collect()
    gc.disable()
    try:
        with contextlib.suppress(VideoError):
            tower.see(View("x.mp4"))
            raise AssertionError("no error")
        assert given[0]() is None
    finally:
        gc.enable()


@pytest.mark.parametrize("at", [0, 4])
@pytest.mark.parametrize("way", ["stop", "timeout"])
def test_waiting_for_frames_ends_with_the_time(at, way, monkeypatch):
    """Catches a question that cannot be cancelled while its video is decoded."""
    tower, stop = Tower(), threading.Event()
    clock = Clock.of(0.3 if way == "timeout" else None, stop)

    def script(i, check):
        while i == at:
            if way == "stop":
                stop.set()
            check()

    monkeypatch.setattr(video, "load", Decoder(8, script))
    with pytest.raises(Stopped, match="cancelled" if way == "stop" else "timeout_seconds"):
        tower.see(View("x.mp4"), clock)
    assert len(tower.seen) <= at // 2


@pytest.mark.parametrize("kind", ["clip", "pictures"])
@pytest.mark.parametrize("reduce", [reduction.NONE, Reduction(unchanged=0)])
def test_decoding_asks_whether_to_go_on(kind, reduce, request):
    """Catches a file that is read to its end though nobody waits for it."""

    class Until(threading.Event):
        asked = 0

        def is_set(self):
            self.asked += 1
            return self.asked > 5

    stop, tower = Until(), Tower(100)
    with pytest.raises(Stopped):
        tower.see(View(request.getfixturevalue(kind), reduce=reduce), Clock(stop=stop))
    assert stop.asked < 10
    assert not tower.seen


def test_a_runtime_that_is_closed_meanwhile_ends_its_answer(make_bundle, clip, monkeypatch):
    """Catches a decoder whose frames nobody takes any more, and a memory that outlives its runtime."""
    opened = Runtime.open(make_bundle(overrides=QUICK), threads=1)
    load = video.load

    def closing(*given, **more):
        opened.close()
        return load(*given, **more)

    monkeypatch.setattr(video, "load", closing)
    assert opened.ask(clip, QUESTION, num_frames=8, max_tokens=2).usage.num_frames == 8
    assert not opened._recent._kept
    with pytest.raises(ConfigError, match="closed"):
        opened.ask(clip, QUESTION)


def test_times_are_those_that_the_caller_waited(monkeypatch):
    """Catches stages that are counted twice since they ran side by side: they add up to no more than the total."""
    tower, clock = Tower(), Clock()
    decoder = Decoder(8, lambda i, check: threading.Event().wait(0.02))
    monkeypatch.setattr(video, "load", decoder)
    tower.before = lambda: threading.Event().wait(0.02)
    tower.see(View("x.mp4"), clock)
    seconds = clock.timings()
    assert seconds["decode"] > 0 < seconds["vision"]
    assert sum(clock.seconds.values()) <= seconds["total"]
