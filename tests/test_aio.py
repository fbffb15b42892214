"""Questions from asyncio, under a time limit, and many at once: what waits, what is refused, and what ends early."""

import asyncio
import threading
import time

import numpy as np
import pytest

import vlrt
from tests.bundles import QUESTION, QUICK, square
from vlrt.aio import AsyncRuntime
from vlrt.answer import Clock
from vlrt.errors import Busy, ConfigError, Stopped, VideoError
from vlrt.runtime import Runtime

MODEL = {"overrides": {**QUICK, "decoder.max_positions": 2048}}
FORCED = {"max_tokens": 6, "min_tokens": 6}


@pytest.fixture(scope="module")
def path(make_bundle):
    return make_bundle(**MODEL)


@pytest.fixture(scope="module")
def fresh(path):
    with Runtime.open(path, threads=1, video_cache_bytes=0) as fresh:
        yield fresh


class Gated:
    """A runtime that answers once its gate is open, or ends when it is told to."""

    def __init__(self):
        self.gate, self.begun, self.ended = threading.Event(), threading.Semaphore(0), threading.Semaphore(0)
        self.is_closed = False

    def ask(self, video, question, *, stop, **options):
        return "".join(self.stream(video, question, stop=stop, **options))

    def stream(self, video, question, *, stop, timeout_seconds=None):
        clock = Clock.of(timeout_seconds, stop)
        self.begun.release()
        try:
            yield "a"
            while not self.gate.wait(0.01):
                clock.check()
            yield question
        finally:
            self.ended.release()

    def close(self):
        self.is_closed = True


@pytest.fixture
def gated():
    runtime = Gated()
    yield runtime
    runtime.gate.set()


async def has(semaphore):
    assert await asyncio.to_thread(semaphore.acquire, timeout=60)


def test_answers_equal_those_of_ask(path, fresh):
    """Catches options that are lost on the way, and pieces of a stream out of order."""

    async def main():
        async with await AsyncRuntime.open(path, threads=1, num_workers=2) as runtime:
            asked = [runtime.ask(square(), f"{QUESTION} {i}", **FORCED) for i in range(4)]
            pieces = [piece async for piece in runtime.stream(square(), QUESTION, **FORCED)]
            return await asyncio.gather(*asked), pieces

    answers, pieces = asyncio.run(main())
    for i, answer in enumerate(answers):
        assert answer.token_ids == fresh.ask(square(), f"{QUESTION} {i}", **FORCED).token_ids
    assert "".join(pieces) == fresh.ask(square(), QUESTION, **FORCED).text
    assert vlrt.AsyncRuntime is AsyncRuntime


def test_errors_come_through_and_leave_it_usable(path):
    async def main():
        async with await AsyncRuntime.open(path, threads=1) as runtime:
            with pytest.raises(VideoError):
                await runtime.ask("none.mp4", QUESTION)
            with pytest.raises(VideoError):
                await anext(runtime.stream("none.mp4", QUESTION))
            with pytest.raises(ConfigError):
                await runtime.ask(square(), QUESTION, max_tokens=0)
            return await runtime.ask(square(), QUESTION, **FORCED)

    assert len(asyncio.run(main()).token_ids) == 6


def test_what_is_too_much_is_refused_and_what_waits_is_answered(gated):
    """Catches a queue without an end, and a place that is not given back."""

    async def main():
        async with AsyncRuntime(gated, max_waiting=1) as runtime:
            held = [asyncio.create_task(runtime.ask("v", str(i))) for i in range(2)]
            await has(gated.begun)
            with pytest.raises(Busy, match="2 questions"):
                await runtime.ask("v", "too much")
            with pytest.raises(Busy):
                await anext(runtime.stream("v", "too much"))
            gated.gate.set()
            assert await asyncio.gather(*held) == ["a0", "a1"]
            return await runtime.ask("v", "later")

    assert asyncio.run(main()) == "alater"
    assert gated.is_closed


def test_a_cancelled_question_ends_in_its_thread_too(gated):
    """Catches work that goes on for nobody."""

    async def main():
        async with AsyncRuntime(gated) as runtime:
            task = asyncio.create_task(runtime.ask("v", "cancelled"))
            waiting = asyncio.create_task(runtime.ask("v", "waits"))
            await has(gated.begun)
            waiting.cancel()
            task.cancel()
            for cancelled in (task, waiting):
                with pytest.raises(asyncio.CancelledError):
                    await cancelled
            await has(gated.ended)
            stream = runtime.stream("v", "left")
            assert await anext(stream) == "a"
            await stream.aclose()
            await has(gated.ended)
            gated.gate.set()
            return await runtime.ask("v", "last")

    assert asyncio.run(main()) == "alast"
    assert not [thread for thread in threading.enumerate() if thread.name.startswith("vlrt")]


def test_closing_ends_what_waits_with_a_word(gated):
    """Catches a task that waits forever, or is cancelled as if its owner had wanted it."""

    async def main():
        runtime = AsyncRuntime(gated)
        first = asyncio.create_task(runtime.ask("v", "first"))
        await has(gated.begun)
        waiting = asyncio.create_task(runtime.ask("v", "waits"))
        stream = asyncio.create_task(anext(runtime.stream("v", "waits too")))
        await asyncio.sleep(0)
        closing = asyncio.create_task(runtime.close())
        for task in (waiting, stream):
            with pytest.raises(Stopped):
                await task
        gated.gate.set()
        await closing
        with pytest.raises(ConfigError, match="closed"):
            await runtime.ask("v", "late")
        return await first

    assert asyncio.run(main()) == "afirst"


def test_waiting_counts_towards_the_time_limit(gated):
    """Catches a limit that begins when a thread is free."""

    async def main():
        async with AsyncRuntime(gated) as runtime:
            first = asyncio.create_task(runtime.ask("v", "first", timeout_seconds=0.3))
            await has(gated.begun)
            with pytest.raises(Stopped, match="waited longer"):
                await runtime.ask("v", "waits", timeout_seconds=1e-3)
            with pytest.raises(Stopped, match=r"timeout_seconds = 0\.[23]"):
                await first

    asyncio.run(main())


@pytest.mark.parametrize("wrong", [{"num_workers": 0}, {"max_waiting": -1}, {"num_workers": 1.5}])
def test_wrong_settings_are_refused(fresh, wrong):
    with pytest.raises(ConfigError, match="accepted: a whole number"):
        AsyncRuntime(fresh, **wrong)


def test_an_answer_ends_with_its_time_or_with_its_event(fresh, monkeypatch):
    """Catches a limit that is looked at once, and a video that is lost with an answer cut short."""
    ref = fresh.ask(square(), QUESTION, **FORCED)
    long, stop, logits = {"max_tokens": 1000, "min_tokens": 1000}, threading.Event(), fresh._backend.logits
    with fresh.open_video(square()) as clip:
        with monkeypatch.context() as patched:
            patched.setattr(fresh._backend, "logits", lambda hidden: time.sleep(0.05) or logits(hidden))
            with pytest.raises(Stopped, match=r"timeout_seconds = 0\.3"):
                clip.ask(QUESTION, timeout_seconds=0.3, **long)
        with monkeypatch.context() as patched:
            patched.setattr(fresh._backend, "logits", lambda hidden: stop.set() or logits(hidden))
            with pytest.raises(Stopped, match="cancelled"):
                clip.ask(QUESTION, stop=stop, **long)
        out = clip.ask(QUESTION, **FORCED)
        assert out.token_ids == ref.token_ids
        assert out.usage.reused_tokens > 0
    with pytest.raises(Stopped):
        fresh.ask(square(), QUESTION, timeout_seconds=1e-9)
    for wrong in (0, -1, float("nan"), "1"):
        with pytest.raises(ConfigError, match="timeout_seconds"):
            fresh.ask(square(), QUESTION, timeout_seconds=wrong)


def test_many_questions_read_each_video_once(fresh, monkeypatch):
    """Catches answers in another order than their questions, and a video that is encoded for each of them."""
    videos = [square(fps=1), square(fps=2)]
    asked = [{"video": videos[i % 2], "question": f"{QUESTION} {i}", **FORCED} for i in range(5)]
    asked.append({"video": videos[0], "question": "Left or right?", "choices": ["left", "right"]})
    refs = [fresh.ask(**one) for one in asked]
    encoded, encode = [], fresh._backend.encode
    monkeypatch.setattr(fresh._backend, "encode", lambda *given, **kw: encoded.append(given) or encode(*given, **kw))
    found = fresh.ask_many(asked)
    assert len(encoded) == 2
    for out, ref in zip(found, refs, strict=True):
        assert (out.token_ids, out.choice) == (ref.token_ids, ref.choice)
        if out.latents is not None:
            np.testing.assert_allclose(out.latents, ref.latents, rtol=1e-3, atol=1e-5)
    assert fresh.ask_many([]) == []


def test_errors_among_many_questions(fresh):
    """Catches one broken file that costs all other answers, and a misspelt argument that is found late."""
    asked = [{"video": "none.mp4", "question": "?"}, {"video": square(), "question": "?", **FORCED}]
    with pytest.raises(VideoError):
        fresh.ask_many(asked)
    error, answer = fresh.ask_many(asked, return_errors=True)
    assert isinstance(error, VideoError)
    assert len(answer.token_ids) == 6
    with pytest.raises(ConfigError, match="question 1 has wrong or missing arguments: chioces"):
        fresh.ask_many([asked[1], {**asked[1], "chioces": ["a", "b"]}])
    with pytest.raises(ConfigError, match="missing arguments: question"):
        fresh.ask_many([{"video": square()}])
