"""What a question is predicted to take, what is refused for it, and that a process keeps to it."""

import json
import subprocess
import sys

import numpy as np
import pytest
from bundles import QUESTION, QUICK, square
from fakes import FakeBackend

from vlrt import fresh, memory_plan, prompt
from vlrt.admission import Admission
from vlrt.errors import ConfigError
from vlrt.memory_plan import MIB, Shape, most_frames, predict
from vlrt.preprocess import target_size
from vlrt.request import check
from vlrt.runtime import Runtime
from vlrt.video import Frames

SMALL = fresh.fresh_model("small")
SHAPE = Shape(64, 224, 224, text_tokens=92, room=133)


def plan(shape=SHAPE, *, model=SMALL, int8=True, library=False):
    return predict(model, shape, int8=int8, library=library)


def test_the_sizes_that_the_model_fixes():
    found = plan()
    assert (found.video_tokens, found.positions) == (2048, 2048 + 92 + 133)
    assert found.frames == 64 * 224 * 224 * 3
    assert found.tokens == 2048 * 896 * 4
    assert found.cache == found.positions * 4 * (2 * 24 * 2 * 64 + 64)  # keys and values, cos and sin
    assert found.fits_positions


def test_an_odd_number_of_frames_fills_its_last_step():
    assert plan(Shape(63, 224, 224, 92, 133)).video_tokens == plan().video_tokens


@pytest.mark.parametrize("frames", [24, 64, 256, 512])  # of which the shortest fills a pass
def test_what_a_pass_holds_does_not_grow_with_the_video(frames):
    long, longer = plan(Shape(frames, 224, 224, 92, 133)), plan(Shape(2 * frames, 224, 224, 92, 133))
    assert (longer.vision_pass, longer.pixels) == (long.vision_pass, long.pixels)
    grown = longer.peak_bytes - long.peak_bytes
    per_token = 4 * (2 * 24 * 2 * 64 + 64) + 2 * 4 * 896  # keys, values and rotary rows; video tokens twice
    assert grown == (longer.video_tokens - long.video_tokens) * per_token


def test_windows_that_the_frame_cuts_are_padded_without_the_library():
    even, cut = Shape(8, 224, 224, 92, 133), Shape(8, 280, 280, 92, 133)

    def per_patch(shape, library):
        found = plan(shape, library=library)
        return found.vision_pass / found.pixels

    assert per_patch(cut, library=True) == per_patch(even, library=True) < per_patch(even, library=False)
    assert per_patch(cut, library=False) > 1.1 * per_patch(even, library=False)


@pytest.mark.parametrize("size", [(223, 224), (224, 0)])
def test_a_size_that_the_tower_does_not_take_is_refused(size):
    with pytest.raises(ConfigError, match=r"multiples of 28"):
        plan(Shape(2, *size, 1, 1))


def test_the_most_frames_that_fit_do_and_two_more_do_not():
    budget = plan().peak_bytes
    asked = plan(Shape(500, 224, 224, 92, 133))
    assert most_frames(asked, budget, plan) == 64
    assert most_frames(asked, budget - 1, plan) == 62
    assert most_frames(asked, 10, plan) == 0


def test_the_most_frames_fit_the_positions_too():
    asked = plan(Shape(2000, 224, 224, 92, 133))
    fit = most_frames(asked, 10**15, plan)
    assert plan(Shape(fit, 224, 224, 92, 133)).fits_positions
    assert not plan(Shape(fit + 2, 224, 224, 92, 133)).fits_positions


class Bounded:
    """An Admission on the fake model, and how often it had memory freed."""

    def __init__(self, path, *, memory_bytes=None, available=None):
        backend, tokenizer = FakeBackend(), prompt.Tokenizer.open(path)
        self.freed, self.model = 0, backend.model
        self.asked = check(backend.model, tokenizer, QUESTION)
        self.plan = backend.plan_memory
        left = iter(available or [None])

        def let_go():
            self.freed += 1

        self.admission = Admission(
            backend.model, tokenizer, backend.plan_memory, memory_bytes, let_go, lambda: next(left)
        )

    def ask(self, num_frames=16, size=112):
        self.admission.check(self.asked, num_frames, size, size)

    def peak(self, num_frames=16, size=112):
        seen = []
        self.admission = Admission(
            self.model, self.admission.tokenizer, lambda shape: seen.append(self.plan(shape)), None, lambda: None
        )
        self.ask(num_frames, size)
        return seen[0].peak_bytes


def test_a_question_beyond_the_budget_is_refused_with_numbers_and_two_ways_out(tiny_path):
    needed = Bounded(tiny_path).peak()
    Bounded(tiny_path, memory_bytes=needed).ask()
    with pytest.raises(ConfigError) as caught:
        Bounded(tiny_path, memory_bytes=needed - 1).ask()
    said = str(caught.value)
    assert "16 frames of 112 x 112 pixels take 128 video tokens" in said
    assert f"memory_bytes allows {(needed - 1) / MIB:,.0f} MiB" in said
    assert "num_frames=14 fits" in said
    assert "smaller ones" in said


def test_on_a_machine_only_what_cannot_fit_is_refused(tiny_path):
    needed = Bounded(tiny_path).peak()
    least = int(needed * (1 - memory_plan.MARGIN))
    bounded = Bounded(tiny_path, available=[least])
    bounded.ask()
    assert bounded.freed == 0
    with pytest.raises(ConfigError, match="this machine, or the control group of this process, has"):
        Bounded(tiny_path, available=[least - 1, least - 1]).ask()
    Bounded(tiny_path, available=[None]).ask()  # a system that does not tell


def test_kept_videos_are_let_go_before_a_question_is_refused(tiny_path):
    bounded = Bounded(tiny_path, available=[10, 10**12])
    bounded.ask()
    assert bounded.freed == 1


def test_what_a_runtime_keeps_is_let_go_too(make_bundle):
    """Catches memory for the next cache that stands in the way of a question."""
    with Runtime.open(make_bundle(overrides=QUICK), threads=1) as runtime:
        runtime.ask(square(), QUESTION, max_tokens=1)
        spare = runtime._backend._spare
        assert not spare._kept  # the video's memory holds its cache
        runtime._recent.clear()
        assert len(spare._kept) == 1
        runtime.ask(square(), QUESTION, max_tokens=1)
        runtime._admission.let_go()
        assert not runtime._recent._kept
        assert not spare._kept


def test_nothing_is_spared_where_memory_is_to_be_saved(make_bundle):
    """Catches keys and values in float32 that stay beside those in int8."""
    with Runtime.open(make_bundle(overrides=QUICK), threads=1, kv_cache="int8") as runtime:
        runtime.ask(square(), QUESTION, max_tokens=1)
        runtime._recent.clear()
        assert not runtime._backend._spare._kept


def test_refused_before_the_video_is_decoded_or_encoded(make_bundle, monkeypatch):
    def never(*_, **__):
        raise AssertionError("work was done for a question that cannot be answered")

    with Runtime.open(make_bundle(overrides=QUICK), threads=1, memory_bytes=1000) as runtime:
        monkeypatch.setattr(runtime._backend, "encode", never)
        monkeypatch.setattr("vlrt.preprocess.resized", never)
        for ask in (lambda: runtime.ask(square(), QUESTION), lambda: runtime.open_video(square())):
            with pytest.raises(ConfigError, match="memory_bytes allows"):
                ask()
        monkeypatch.undo()
        runtime._admission = Admission(runtime.model, runtime.tokenizer, lambda _: None, 1000, lambda: None)
        assert runtime.ask(square(), QUESTION, max_tokens=1).usage.answer_tokens <= 1


@pytest.mark.parametrize("given", [0, -1, 1.5, "1G"])
def test_a_budget_that_is_none_is_refused(given, make_bundle):
    with pytest.raises(ConfigError, match="memory_bytes"):
        Runtime.open(make_bundle(overrides=QUICK), memory_bytes=given)


def test_the_size_that_is_predicted_is_the_size_that_is_shown(tiny_checkpoint):
    cfg = tiny_checkpoint.model
    for size in ((84, 112), (90, 100), (1080, 1920)):
        frames = Frames.from_array(np.zeros((3, *size, 3), np.uint8), fps=2)
        from vlrt import preprocess

        assert preprocess.resized(frames, cfg.video, cfg.vision).data.shape[1:3] == target_size(
            frames, cfg.video, cfg.vision
        )


MEASURE = """
import json, sys
import numpy as np
import vlrt, av
from vlrt.video import Frames

def status(name):
    with open("/proc/self/status") as file:
        return next(int(line.split()[1]) * 1024 for line in file if line.startswith(name))

peaks = []
with vlrt.Runtime.open(sys.argv[1], threads=1, video_cache_bytes=0) as runtime:
    for count in map(int, sys.argv[2:]):
        video = Frames.from_array(np.zeros((count, 224, 224, 3), np.uint8), fps=2)
        before = status("VmRSS")
        with open("/proc/self/clear_refs", "w") as file:
            file.write("5")
        runtime.ask(video, "What moves?", max_tokens=1)
        peaks.append(status("VmHWM") - before)
print(json.dumps(peaks))
"""


@pytest.mark.skipif(sys.platform != "linux", reason="peaks are read from /proc")
def test_the_peak_of_a_long_video_grows_by_what_is_predicted_and_no_more(make_bundle):
    """Catches a pass over a whole video at once, and passes that keep what they took."""
    path = make_bundle(overrides=QUICK)
    done = subprocess.run([sys.executable, "-c", MEASURE, str(path), "32", "256"], capture_output=True, check=True)
    short, long = json.loads(done.stdout)
    model = fresh.fresh_model("tiny", overrides=QUICK)
    shapes = [Shape(count, 224, 224, text_tokens=60, room=133) for count in (32, 256)]
    predicted = [predict(model, shape, int8=False, library=False).peak_bytes for shape in shapes]
    assert long - short < predicted[1] - predicted[0] + 24 * MIB
    assert long < 1.3 * predicted[1]
