"""The runtime as an application uses it: sources, settings, streams, threads, ablations, refusals.

That answers are right is held in test_runtime_parity.py; test_runtime_choices.py has choices and confidence.
Not covered: trained weights, several processes on one bundle.
"""

import json
import shutil
import subprocess
import sys
import threading
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from itertools import zip_longest
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

import vlrt
from tests.bundles import QUESTION, QUICK, square, torch_runtime
from tests.videos import busy, make, picture
from vlrt.answer import Answer
from vlrt.backends.ort import OrtBackend, num_usable_cores
from vlrt.bundle import Bundle
from vlrt.errors import BackendUnavailable, BundleError, ConfigError, VideoError
from vlrt.runtime import Runtime
from vlrt.video import Frames

MODEL = {"overrides": {**QUICK, "decoder.max_positions": 2048}}
PLAIN = {**MODEL, "latent": None}
FORCED = {"max_tokens": 12, "min_tokens": 12}
STAGES = ["decode", "preprocess", "vision", "prefill", "latents", "answer", "total"]


@pytest.fixture(scope="module")
def opened(make_bundle):
    with Runtime.open(make_bundle(**MODEL), video_cache_bytes=0) as opened:  # test_session.py has what is remembered
        yield opened


@pytest.fixture(scope="module")
def plain(make_checkpoint):
    with torch_runtime(make_checkpoint(**PLAIN)) as plain:
        yield plain


@pytest.fixture(scope="module")
def clip(tmp_path_factory) -> Path:
    return make(tmp_path_factory.mktemp("clip") / "clip.mp4", frames=90)


def same(first: Answer, second: Answer) -> bool:
    """Whether two answers are equal in all but the time they took."""
    keys = ("text", "token_ids", "choice", "scores", "reasoning", "thought", "warnings")
    equal = all(getattr(first, key) == getattr(second, key) for key in keys)
    if first.latents is None or second.latents is None:
        return equal and first.latents is second.latents
    return equal and np.array_equal(first.latents, second.latents)


# Answers


@pytest.mark.parametrize("reasoning", ["latent", "direct", "cot"])
def test_usage_timings_and_json_are_complete(opened, clip, reasoning):
    """Catches a stage that is not timed, counts that are not the model's, and fields that JSON does not take."""
    out = opened.ask(clip, QUESTION, reasoning=reasoning, num_frames=4, **FORCED)
    assert list(out.timings) == STAGES
    worked = [stage for stage in STAGES if stage != "latents" or reasoning == "latent"]
    assert all(out.timings[stage] > 0 for stage in worked)
    assert sum(out.timings[stage] for stage in STAGES[:-1]) <= out.timings["total"]
    usage = out.usage
    assert (usage.num_frames, usage.video_tokens, usage.answer_tokens) == (4, 2 * 3 * 6, 12)
    assert usage.prompt_tokens > usage.video_tokens + len(QUESTION) // 2
    assert usage.latents == (4 if reasoning == "latent" else 0)
    assert usage.peak_host_memory_bytes > 2**24
    assert (out.latents is not None) == (reasoning == "latent")
    assert (out.thought is not None) == (reasoning == "cot")
    values = json.loads(json.dumps(out.to_dict()))
    assert values["latents_shape"] == ([4, 128] if reasoning == "latent" else None)
    assert values["token_ids"] == list(out.token_ids)
    assert values["usage"]["video_tokens"] == usage.video_tokens
    assert values["timings"] == out.timings


def test_the_default_reasoning_is_the_model_s_own(opened, plain):
    """Catches latents asked of a model without any, and left out where there are some."""
    assert opened.ask(square(), QUESTION, max_tokens=1).reasoning == "latent"
    assert plain.ask(square(), QUESTION, max_tokens=1).reasoning == "direct"


def test_lengths_are_kept(opened):
    """Catches limits that are off by one, and a bar on end tokens that outlasts min_tokens."""
    free = opened.ask(square(), QUESTION, max_tokens=9)
    assert len(free.token_ids) <= 9
    assert opened.ask(square(), QUESTION, max_tokens=1, min_tokens=1).token_ids == free.token_ids[:1]
    eos = free.token_ids[2]
    tokens = replace(opened.model.tokens, eos_token_ids=(eos,))
    ending = Runtime(opened._backend, opened.tokenizer)
    ending.model = replace(opened.model, tokens=tokens)
    first = free.token_ids.index(eos)
    assert ending.ask(square(), QUESTION, max_tokens=9).token_ids == free.token_ids[:first]
    kept = ending.ask(square(), QUESTION, max_tokens=9, min_tokens=first + 1).token_ids
    assert len(kept) > first
    assert eos not in kept[: first + 1]


def test_an_int8_bundle_answers_and_carries_its_record(make_bundle):
    """Catches int8 graphs that do not run outside the gate, and an export whose loss is not on record."""
    path = make_bundle("int8", **MODEL)
    bundle = Bundle.open(path)
    assert bundle.precision == "int8"
    rows = {row.name: row for row in bundle.parity}
    assert all(row.ok for row in rows.values())
    assert 1e-4 < rows["hidden states: relative error"].value < rows["hidden states: relative error"].limit
    assert rows["greedy answer: tokens agreed"].at_least
    with Runtime.open(path) as opened:
        for reasoning in ("latent", "direct", "cot"):
            assert len(opened.ask(square(), QUESTION, reasoning=reasoning, **FORCED).token_ids) == 12
        assert sum(opened.ask(square(), QUESTION, choices=["left", "right"]).scores.values()) == pytest.approx(1)


# Streams


@pytest.mark.parametrize("reasoning", ["latent", "direct", "cot"])
def test_pieces_of_a_stream_join_to_the_text(opened, reasoning):
    """Catches characters lost or doubled between pieces, and a stream that answers otherwise than ask."""
    ref = opened.ask(square(), QUESTION, reasoning=reasoning, max_tokens=30, min_tokens=30)
    stream = opened.stream(square(), QUESTION, reasoning=reasoning, max_tokens=30, min_tokens=30)
    pieces = list(stream)
    assert len(pieces) > 5
    assert "".join(pieces) == opened.tokenizer.decode(ref.token_ids)
    assert same(stream.answer, ref)
    assert list(stream) == []
    assert same(stream.answer, ref), "a second look at a finished stream must not lose its answer"


def test_a_stream_has_no_answer_before_its_end(opened):
    """Catches half an answer handed out as a whole one."""
    stream = opened.stream(square(), QUESTION, **FORCED)
    pieces = iter(stream)
    for _ in range(2):
        with pytest.raises(ConfigError, match="iterate it to its end"):
            stream.answer  # noqa: B018  # reading it is the test
        next(pieces)
    stream.close()
    assert list(pieces) == []
    with pytest.raises(ConfigError, match="iterate it to its end"):
        stream.answer  # noqa: B018


def test_a_closed_stream_does_no_more_work(opened, monkeypatch):
    """Catches an answer that goes on being computed after its reader has left."""
    calls = []
    logits = OrtBackend.logits
    monkeypatch.setattr(OrtBackend, "logits", lambda self, hidden: calls.append(1) or logits(self, hidden))
    opened.stream(square(), QUESTION, **FORCED).close()
    assert calls == []
    for _ in opened.stream(square(), QUESTION, **FORCED):
        break
    assert 1 <= len(calls) < 12


# Threads


def test_threads_do_not_mix_answers(opened):
    """Catches a cache, a clock or a tokenizer that calls share."""
    jobs = []
    for i, reasoning in enumerate(["latent", "direct", "cot"] * 4):
        frames = square(4 + 2 * (i % 3), width=84 + 28 * (i % 2))
        jobs.append((frames, f"Question {i}: {QUESTION}", {"reasoning": reasoning, **FORCED}))
        jobs.append((frames, f"Question {i}", {"reasoning": reasoning, "choices": ["left", "right"], "max_tokens": 3}))
    want = [opened.ask(frames, question, **how) for frames, question, how in jobs]
    together = threading.Barrier(4)

    def ask(job):
        together.wait(60)
        return opened.ask(job[0], job[1], **job[2])

    with ThreadPoolExecutor(4) as pool:
        out = list(pool.map(ask, jobs))
    assert len({answer.token_ids for answer in want}) > len(want) // 3
    assert all(map(same, out, want))


def test_streams_side_by_side_do_not_mix(opened):
    """Catches state kept in the Runtime between two pieces."""
    asked = [(square(), "One."), (square(6, height=112), "Another one.")]
    want = [opened.ask(*a, **FORCED) for a in asked]
    streams = [opened.stream(*a, **FORCED) for a in asked]
    for _ in zip_longest(*streams):
        pass
    assert all(same(stream.answer, ref) for stream, ref in zip(streams, want, strict=True))


# Sources


def test_every_kind_of_source_is_taken(opened, clip, tmp_path):
    """Catches a source that the runtime hands on wrongly: equal pictures must give equal answers."""
    ref = opened.ask(clip, QUESTION, num_frames=4, **FORCED)
    assert same(opened.ask(str(clip), QUESTION, num_frames=4, **FORCED), ref)
    assert same(opened.ask(clip.read_bytes(), QUESTION, num_frames=4, **FORCED), ref)
    files = [tmp_path / f"{i}.png" for i in range(4)]
    for i, file in enumerate(files):
        Image.fromarray(picture(i, 112, 168)).save(file)
    listed = opened.ask(files, QUESTION, fps=2.0, **FORCED)
    array = vlrt.Frames.from_array(np.stack([picture(i, 112, 168) for i in range(4)]), fps=2.0)
    assert same(opened.ask(array, QUESTION, **FORCED), listed)
    assert (listed.usage.num_frames, listed.usage.video_tokens) == (4, 2 * 4 * 6)


def test_an_image_is_one_temporal_patch(opened, tmp_path):
    """Catches a still picture without the second frame that a temporal patch has, or at another time than 0."""
    Image.fromarray(picture(5, 84, 140)).save(tmp_path / "still.png")
    out = opened.ask(tmp_path / "still.png", QUESTION, **FORCED)
    assert (out.usage.num_frames, out.usage.video_tokens) == (1, 3 * 5)
    assert opened.ask((tmp_path / "still.png").read_bytes(), QUESTION, **FORCED).token_ids == out.token_ids
    twice = vlrt.Frames.from_array(np.stack([picture(5, 84, 140)] * 2), fps=2.0)
    assert same(opened.ask(twice, QUESTION, **FORCED), out)


def test_sampling_can_be_overridden(opened, clip):
    """Catches an override that does not reach the sampler."""
    assert opened.ask(clip, QUESTION, max_tokens=1).usage.num_frames == 6  # 3 s at the setting's 2 per second
    assert opened.ask(clip, QUESTION, max_tokens=1, num_frames=10).usage.num_frames == 10
    assert opened.ask(clip, QUESTION, max_tokens=1, fps=4).usage.num_frames == 12
    stream = opened.stream(clip, QUESTION, max_tokens=1, num_frames=8)
    list(stream)
    assert stream.answer.usage.num_frames == 8
    with pytest.raises(VideoError, match="both given"):
        opened.ask(clip, QUESTION, num_frames=4, fps=1)


def test_odd_frames_fill_whole_temporal_patches(opened):
    """Catches an array whose last frame is left out."""
    usage = opened.ask(square(5), QUESTION, max_tokens=1).usage
    assert (usage.num_frames, usage.video_tokens) == (5, 3 * 3 * 4)


def test_warnings_reach_the_answer(opened, tmp_path):
    """Catches a truncated video answered as if it were whole."""
    path = make(tmp_path / "cut.mkv", pictures=busy(60))
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])
    out = opened.ask(path, QUESTION, num_frames=4, max_tokens=2)
    assert len(out.warnings) == 1
    assert "truncated" in out.warnings[0]
    assert out.to_dict()["warnings"] == out.warnings
    assert opened.ask(square(), QUESTION, max_tokens=2).warnings == ()


def test_damaged_videos_raise_their_own_error(opened, tmp_path):
    """Catches a library's error passed on."""
    (tmp_path / "noise.mp4").write_bytes(bytes(range(256)) * 8)
    with pytest.raises(VideoError, match=r"noise\.mp4"):
        opened.ask(tmp_path / "noise.mp4", QUESTION)


# Latents given by the caller


def test_its_own_latents_given_back_change_nothing(opened):
    """Catches latents that are put back at other slots or positions."""
    own = opened.ask(square(), QUESTION, **FORCED)
    given = opened.ask(square(), QUESTION, latents=own.latents, **FORCED)
    assert given.token_ids == own.token_ids
    assert np.array_equal(given.latents, own.latents)


def test_ablations_put_something_else_in_place(opened):
    """Catches an ablation that leaves the model's own latents where they are."""
    own = opened.ask(square(), QUESTION, **FORCED)
    given = {
        "own": own.latents,
        "doubles": own.latents.astype(np.float64),
        "none": np.zeros((0, 128), np.float32),
        "longer": np.tile(own.latents, (2, 1)),
        "dummy": "dummy",
        "noise": "noise",
    }
    found, scores = {}, {}
    for name, latents in given.items():
        found[name] = opened.ask(square(), QUESTION, latents=latents, **FORCED)
        scores[name] = opened.ask(square(), QUESTION, latents=latents, choices=["A", "B"]).scores["A"]
    assert [found[name].usage.latents for name in given] == [4, 4, 0, 8, 4, 4]
    assert scores["doubles"] == scores["own"]
    others = [scores[name] for name in ("own", "none", "longer", "dummy", "noise")]
    assert np.diff(sorted(others)).min() > 1e-5
    pad = opened._backend.embed(np.array([opened.model.latent.pad_token_id]))
    assert np.array_equal(found["dummy"].latents, np.repeat(pad, 4, axis=0))
    norms = [np.linalg.norm(found[name].latents, axis=1) for name in ("own", "noise")]
    np.testing.assert_allclose(*norms, rtol=1e-5)
    assert same(opened.ask(square(), QUESTION, latents="noise", **FORCED), found["noise"])


def test_latents_of_another_video_change_the_answer_s_odds(opened):
    """Catches an array that is accepted and not used."""
    other = opened.ask(square(6, height=112), "Who sings?", max_tokens=1).latents
    own = opened.ask(square(), QUESTION, choices=["A", "B"])
    shuffled = opened.ask(square(), QUESTION, choices=["A", "B"], latents=other)
    assert own.scores != shuffled.scores


# Refusals


@pytest.mark.parametrize(
    ("how", "words"),
    [
        ({"reasoning": "think"}, "reasoning is 'think'; accepted: latent, direct, cot"),
        ({"max_tokens": 0}, "max_tokens is 0"),
        ({"max_tokens": 4, "min_tokens": 5}, "max_tokens is 4 and min_tokens 5"),
        ({"min_tokens": -1}, "min_tokens -1"),
        ({"choices": []}, "two or more"),
        ({"choices": ["A"]}, "two or more"),
        ({"choices": "AB"}, "a list of two or more"),
        ({"choices": ["A", "A"]}, "different answers"),
        ({"choices": ["A", ""]}, "none of them empty"),
        ({"choices": ["A", 5]}, "different answers"),
        ({"choices": ["caf\u00e9", "cafe\u0301"]}, "differ to the tokenizer"),
        ({"latents": "shuffled"}, "accepted with 'latent'"),
        ({"latents": "none"}, "accepted with 'latent'"),
        ({"latents": np.zeros((4, 127), np.float32)}, r"\(4, 127\)"),
        ({"latents": np.zeros(128, np.float32)}, r"array \[L, 128\]"),
        ({"latents": np.full((4, 128), np.nan, np.float32)}, "of finite numbers"),
        ({"latents": "noise", "reasoning": "direct"}, "with reasoning 'direct'"),
        ({"max_tokens": 5000}, "positions"),
        ({"latents": np.zeros((2000, 128), np.float32)}, "positions"),
    ],
)
def test_settings_out_of_range_are_refused(opened, how, words):
    """Catches a setting that is ignored, or that fails somewhere in the engine."""
    with pytest.raises(ConfigError, match=words):
        opened.ask(square(), QUESTION, **how)


@pytest.mark.parametrize("question", ["", "  \n", None, 5, "\ud800"])
def test_questions_must_be_text(opened, question):
    """Catches an empty question answered, and a TypeError from the template."""
    with pytest.raises(ConfigError, match="question"):
        opened.ask(square(), question)


def test_streams_refuse_before_the_first_piece(opened):
    """Catches a wrong setting that is told only when the stream is read."""
    with pytest.raises(ConfigError, match="reasoning is 'think'"):
        opened.stream(square(), QUESTION, reasoning="think")
    with pytest.raises(ConfigError, match="max_tokens is 0"):
        opened.stream(square(), QUESTION, max_tokens=0)


def test_a_video_beyond_the_model_s_positions_is_refused(opened, monkeypatch):
    """Catches positions that the model never saw, and a refusal that comes only after the vision tower has run."""
    monkeypatch.setattr(OrtBackend, "encode", lambda *_, **__: pytest.fail("the tower ran"))
    with pytest.raises(ConfigError, match="fewer or smaller frames"):
        opened.ask(square(64, 224, 224), QUESTION)


def test_a_model_without_latents_refuses_them(plain):
    """Catches an AttributeError where there is no plan."""
    with pytest.raises(ConfigError, match="has no latents"):
        plain.ask(square(), QUESTION, reasoning="latent")
    with pytest.raises(ConfigError, match="accepted with 'latent'"):
        plain.ask(square(), QUESTION, latents="noise")


def test_opening_refuses_what_it_does_not_know(make_bundle, make_checkpoint, tmp_path):
    """Catches a fallback to another backend, and a checkpoint taken for a bundle."""
    path = make_bundle(**MODEL)
    with pytest.raises(ConfigError, match="backend is 'tensorrt'; accepted: auto, ort, torch"):
        Runtime.open(path, backend="tensorrt")
    for threads in (0, 1025, 100_000, "2"):
        with pytest.raises(ConfigError, match=f"threads is {threads!r}; accepted: a whole number from 1 to 1024"):
            Runtime.open(path, threads=threads)
    with pytest.raises(BundleError, match="export it first"):
        Runtime.open(make_checkpoint(**MODEL).path)
    with pytest.raises(BundleError, match="is not a bundle"):
        Runtime.open(tmp_path / "nothing")


def test_a_machine_without_the_engine_is_told_so(make_bundle, monkeypatch):
    """Catches an ImportError in place of what to install."""
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(BackendUnavailable, match="pip install onnxruntime"):
        Runtime.open(make_bundle(**MODEL))


def test_what_the_engine_raises_is_our_own_error(opened):
    """Catches a class of onnxruntime's, which nobody who catches VlrtError expects."""
    with pytest.raises(BackendUnavailable, match=r"(?s)cannot run the graph .lm_head. here: .*; where memory ran out"):
        opened._backend.logits(np.zeros((1, 7), np.float32))


def test_threads_are_those_asked_for(make_bundle):
    """Catches a setting that does not reach the engine."""
    for asked, used in ((1, 1), (2, 2), (None, num_usable_cores())):
        with Runtime.open(make_bundle(**MODEL), backend="ort", threads=asked) as opened:
            assert opened._backend.threads == used
            assert opened._backend._decoder.get_session_options().intra_op_num_threads == used


def test_a_closed_runtime_answers_no_more(make_bundle):
    """Catches a crash after close, and an error of the second close."""
    with Runtime.open(make_bundle(**MODEL)) as closed:
        stream = closed.stream(square(), QUESTION, **FORCED)
    closed.close()
    with pytest.raises(ConfigError, match="is closed"):
        closed.ask(square(), QUESTION)
    with pytest.raises(ConfigError, match="is closed"):
        list(stream)


def test_answers_under_way_outlast_a_close(make_bundle):
    """Catches graphs that vanish under another thread's feet."""
    closing = Runtime.open(make_bundle(**MODEL))
    ref = closing.ask(square(), QUESTION, **FORCED)
    stream = closing.stream(square(), QUESTION, **FORCED)
    pieces = iter(stream)
    next(pieces)
    closing.close()
    list(pieces)
    assert same(stream.answer, ref)


def test_answering_loads_neither_torch_nor_the_exporter(make_bundle, clip, tmp_path):
    """Catches an import that makes every user of a bundle pay for an exporter's gigabytes."""
    code = (
        "import sys, vlrt\n"
        f"with vlrt.Runtime.open({str(make_bundle(**MODEL))!r}) as opened:\n"
        f"    out = opened.ask({str(clip)!r}, 'What?', num_frames=2, max_tokens=3, min_tokens=3)\n"
        "assert len(out.token_ids) == 3\n"
        "print(*sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    loaded = {name.split(".")[0] for name in done.stdout.split()}
    assert loaded.isdisjoint({"torch", "triton", "transformers", "onnx", "onnxscript", "safetensors"})
    assert "onnxruntime" in loaded


def test_a_template_that_is_not_in_the_manifest_is_refused(make_bundle, tmp_path):
    """Catches prompts of a file that nobody vouches for."""
    copy = tmp_path / "copy.vlrt"
    shutil.copytree(make_bundle(), copy)
    (copy / "chat_template.jinja").write_text("{{ messages }}")
    with pytest.raises(BundleError, match=r"chat_template\.jinja"):
        Runtime.open(copy)


@pytest.mark.parametrize("settings", [{"question": " "}, {"max_tokens": 2.5}, {"min_tokens": 0.5}])
def test_what_cannot_be_asked_is_refused_before_any_video_is_read(opened, settings):
    """Catches a decode that ends in a complaint about the question."""
    settings = {"question": "What?", **settings}
    with pytest.raises(ConfigError):
        opened.ask("no-such-video.mp4", **settings)


def test_an_answer_that_was_cut_off_says_so(opened):
    """Catches a half answer that looks whole."""
    assert not opened.ask(square(), QUESTION, **FORCED).finished
    assert opened.ask(square(), QUESTION, choices=["left", "right"]).finished
    first = opened.ask(square(), QUESTION, reasoning="direct", **FORCED).token_ids
    tokens = replace(opened.model.tokens, eos_token_ids=(first[2],))
    with Runtime(opened._backend, opened.tokenizer) as other:
        other.model = replace(opened.model, tokens=tokens)
        out = other.ask(square(), QUESTION, reasoning="direct", max_tokens=12)
    assert out.finished
    assert len(out.token_ids) <= 2


def test_a_video_that_is_too_long_is_told_how_many_frames_fit(opened):
    """Catches advice that is wrong by one: so many frames fit, and two more do not."""
    long = Frames.from_array(np.zeros((1200, 56, 56, 3), np.uint8), fps=4)
    settings = {"reasoning": "direct", "max_tokens": 4}
    with pytest.raises(ConfigError, match="num_frames=") as caught:
        opened.ask(long, QUESTION, **settings)
    fits = int(str(caught.value).rpartition("num_frames=")[2].rstrip(")"))
    first = replace(long, data=long.data[:fits], pts_seconds=long.pts_seconds[:fits])
    assert opened.ask(first, QUESTION, **settings).usage.num_frames == fits
    more = replace(long, data=long.data[: fits + 2], pts_seconds=long.pts_seconds[: fits + 2])
    with pytest.raises(ConfigError, match="num_frames="):
        opened.ask(more, QUESTION, **settings)
