"""One process under load: many threads ask a runtime all it can be asked, and what came of it is JSON.

    python -m tests.load BUNDLE DIRECTORY --seconds 10 [--threads 16]     answers, errors, memory and threads under load
    python -m tests.load BUNDLE DIRECTORY --asks 500                      memory over so many questions, one by one

DIRECTORY holds the videos that `write_videos` makes.
"""

import argparse
import asyncio
import ctypes
import gc
import json
import os
import random
import sys
import threading
import time
import traceback
from collections import Counter
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from tests.videos import make
from vlrt.aio import AsyncRuntime
from vlrt.answer import Answer
from vlrt.errors import Busy, Stopped, VideoError
from vlrt.runtime import Runtime

SOUND = ("a.mp4", "b.mp4", "c.mkv")
BROKEN = ("garbage.mp4", "empty.mp4", "none.mp4", "header.mp4")
FORCED = {"max_tokens": 5, "min_tokens": 5}
QUESTIONS: tuple[dict[str, Any], ...] = (
    {"question": "What moves?", **FORCED},
    {"question": "How many of them, and where to?", "reasoning": "direct", **FORCED},
    {"question": "Why?", "reasoning": "cot", "max_tokens": 8},
    {"question": "Left or right?", "choices": ["left", "right"]},
)


def write_videos(directory: Path) -> None:
    """Write the videos that are asked about."""
    for number, name in enumerate(SOUND):
        make(directory / name, frames=20 + 13 * number)
    (directory / "garbage.mp4").write_bytes(random.Random(0).randbytes(5000))
    (directory / "empty.mp4").write_bytes(b"")
    (directory / "header.mp4").write_bytes((directory / "a.mp4").read_bytes()[:200])


def rss() -> int:
    """Return the bytes of this process that are in memory."""
    return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")


class _Mallinfo(ctypes.Structure):
    """`struct mallinfo2` of glibc 2.33 and newer."""

    _fields_ = [
        (name, ctypes.c_size_t)
        for name in ("arena", "ordblks", "smblks", "hblks", "hblkhd", "_", "__", "uordblks", "fordblks", "keepcost")
    ]


def allocated() -> int:
    """Return the bytes that are allocated by glibc: unlike `rss`, without what is free but not given back."""
    mallinfo2 = ctypes.CDLL(None).mallinfo2
    mallinfo2.restype = _Mallinfo
    info = mallinfo2()
    return int(info.uordblks + info.hblkhd)


def num_files() -> int:
    """Return how many files this process has open."""
    return len(os.listdir("/proc/self/fd"))


class Load:
    """What the threads do, and what came of it."""

    def __init__(self, path: Path, directory: Path) -> None:
        self.runtime = Runtime.open(path, threads=1, video_cache_bytes=300_000)
        self.videos = [directory / name for name in SOUND]
        self.broken = [directory / name for name in BROKEN]
        self.clips = [self.runtime.open_video(video, num_frames=6) for video in self.videos]
        self.counts: Counter[str] = Counter()
        self.wrong: list[str] = []
        self.refs = {
            (v, q): self._tokens(self.runtime.ask(self.videos[v], num_frames=6, **QUESTIONS[q]))
            for v in range(len(SOUND))
            for q in range(len(QUESTIONS))
        }

    @staticmethod
    def _tokens(answer: Answer) -> tuple[Any, ...]:
        return answer.token_ids, answer.choice

    def judge(self, kind: str, v: int, q: int, answer: Any) -> None:
        """Hold an answer against the one that was given alone."""
        self.counts[kind] += 1
        if not isinstance(answer, Answer) or self._tokens(answer) != self.refs[v, q]:
            self.wrong.append(f"{kind} {v} {q}: {answer!r:.200}")

    def expect(self, kind: str, errors: tuple[type[Exception], ...], call: Callable[[], Any]) -> None:
        """Call what ends in one of the errors; an answer in time is none of them."""
        try:
            call()
        except errors as error:
            self.counts[f"{kind}: {type(error).__name__}"] += 1
        else:
            self.counts[f"{kind}: answered"] += 1
            if errors == (VideoError,):
                self.wrong.append(f"{kind} was answered")

    def once(self, rng: random.Random) -> None:
        """Do one thing, whichever."""
        v, q = rng.randrange(len(SOUND)), rng.randrange(len(QUESTIONS))
        asked, video = QUESTIONS[q], self.videos[v]
        what = rng.randrange(8)
        if what == 0:
            self.judge("ask", v, q, self.runtime.ask(video, num_frames=6, **asked))
        elif what == 1:
            self.judge("clip", v, q, self.clips[v].ask(**asked))
        elif what == 2:
            picks = [(rng.randrange(len(SOUND)), rng.randrange(len(QUESTIONS))) for _ in range(5)]
            many = [{"video": self.videos[i], "num_frames": 6, **QUESTIONS[j]} for i, j in picks]
            many.insert(2, {"video": rng.choice(self.broken), "question": "?"})
            found = self.runtime.ask_many(many, return_errors=True)
            if not isinstance(found.pop(2), VideoError):
                self.wrong.append("ask_many answered about a broken file")
            for (i, j), answer in zip(picks, found, strict=True):
                self.judge("ask_many", i, j, answer)
        elif what == 3:
            stream = self.runtime.stream(video, "What moves?", num_frames=6, max_tokens=30, min_tokens=30)
            next(iter(stream))
            stream.close()
            self.counts["stream left"] += 1
        elif what == 4:
            limit = rng.uniform(1e-4, 0.3)
            self.expect(
                "timeout", (Stopped,), lambda: self.runtime.ask(video, "What?", timeout_seconds=limit, max_tokens=500)
            )
        elif what == 5:
            stop = threading.Event()
            timer = threading.Timer(rng.uniform(0, 0.2), stop.set)
            timer.start()
            self.expect("cancel", (Stopped,), lambda: self.clips[v].ask("What?", stop=stop, max_tokens=500))
            timer.join()
        elif what == 6:
            self.expect("broken", (VideoError,), lambda: self.runtime.ask(rng.choice(self.broken), "?"))
        else:
            numbers = [(v, q), ((v + 1) % len(SOUND), q)]
            for (i, j), answer in zip(numbers, asyncio.run(self._async(numbers, rng)), strict=True):
                self.judge("asyncio", i, j, answer)

    async def _async(self, numbers: list[tuple[int, int]], rng: random.Random) -> list[Any]:
        """Ask beside a question that is cancelled and more than may wait."""
        wrapped = AsyncRuntime(self.runtime, num_workers=2, max_waiting=1)
        tasks = [asyncio.create_task(wrapped.ask(self.videos[i], num_frames=6, **QUESTIONS[j])) for i, j in numbers]
        gone = asyncio.create_task(wrapped.ask(self.videos[0], "What?", max_tokens=500))
        await asyncio.sleep(0)
        try:
            await wrapped.ask(self.videos[0], "What?", max_tokens=1)
            self.counts["let in"] += 1  # one of those before was answered already
        except Busy:
            self.counts["busy"] += 1
        await asyncio.sleep(rng.uniform(0, 0.1))
        gone.cancel()
        found = await asyncio.gather(*tasks)
        await asyncio.gather(gone, return_exceptions=True)
        await asyncio.to_thread(wrapped._pool.shutdown, wait=True)  # `close` would close the runtime of all threads
        return found


def under_load(load: Load, seconds: float, num_threads: int) -> dict[str, Any]:
    """Run the threads; return what came of it."""
    over, memory = time.monotonic() + seconds, list[int]()

    def work(seed: int) -> None:
        rng = random.Random(seed)
        while time.monotonic() < over:
            try:
                load.once(rng)
            except Exception:
                load.wrong.append(traceback.format_exc())

    threads = [threading.Thread(target=work, args=(seed,), name=f"load {seed}") for seed in range(num_threads)]
    for thread in threads:
        thread.start()
    while time.monotonic() < over:
        time.sleep(0.2)
        memory.append(rss())
    for thread in threads:
        thread.join(120)
    return {"rss_bytes": memory}


def one_by_one(load: Load, num_asks: int) -> dict[str, Any]:
    """Ask so many questions of all kinds in this thread; return memory after each tenth of them."""
    rng, memory, used = random.Random(0), [], []
    for number in range(num_asks):
        load.once(rng)
        if (number + 1) % max(num_asks // 10, 1) == 0:
            gc.collect()
            memory.append(rss())
            used.append(allocated())
    return {"rss_bytes": memory, "allocated_bytes": used}


def main(argv: Sequence[str] | None = None) -> None:
    """Print JSON."""
    parser = argparse.ArgumentParser(prog="tests.load")
    parser.add_argument("bundle", type=Path)
    parser.add_argument("directory", type=Path)
    parser.add_argument("--seconds", type=float)
    parser.add_argument("--threads", type=int, default=16)
    parser.add_argument("--asks", type=int, default=500)
    args = parser.parse_args(argv)
    load = Load(args.bundle, args.directory)
    before = num_files()
    result = under_load(load, args.seconds, args.threads) if args.seconds else one_by_one(load, args.asks)
    for clip in load.clips:
        clip.close()
    load.runtime.close()
    gc.collect()
    result |= {
        "counts": dict(sorted(load.counts.items())),
        "wrong": load.wrong[:5],
        "num_wrong": len(load.wrong),
        "threads_left": [thread.name for thread in threading.enumerate() if thread is not threading.main_thread()],
        "files_left": max(0, num_files() - before),
    }
    json.dump(result, sys.stdout)


if __name__ == "__main__":
    main()
