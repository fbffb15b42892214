"""A runtime for asyncio: questions are answered in threads, as many at a time as were asked for, the others wait.

What waits is bounded. A task that is cancelled, and a consumer that leaves, end the work. Knows no model.
"""

import asyncio
import threading
import time
from collections.abc import AsyncGenerator, Callable
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from types import TracebackType
from typing import Any

from vlrt.answer import Answer
from vlrt.content import Source
from vlrt.errors import Busy, ConfigError, Stopped
from vlrt.runtime import Runtime


class AsyncRuntime:
    """Wraps a Runtime, which stays usable beside it.

    Args:
        runtime: an opened one; it is closed by `close`.
        num_workers: questions that are answered at the same time. An engine uses all cores for each, so that more than
            one makes none of them sooner; it lets short questions pass long ones.
        max_waiting: questions that may wait beside those.

    Raises:
        ConfigError: num_workers is below 1, or max_waiting below 0.
    """

    def __init__(self, runtime: Runtime, *, num_workers: int = 1, max_waiting: int = 16) -> None:
        for name, value, low in (("num_workers", num_workers, 1), ("max_waiting", max_waiting, 0)):
            if not isinstance(value, int) or value < low:
                raise ConfigError(f"{name} is {value!r}; accepted: a whole number, {low} or more")
        self._runtime = runtime
        self._pool = ThreadPoolExecutor(num_workers, thread_name_prefix="vlrt")
        self._most, self._pending = num_workers + max_waiting, 0
        self._lock = threading.Lock()

    @classmethod
    async def open(
        cls, path: str | Path, *, num_workers: int = 1, max_waiting: int = 16, **options: Any
    ) -> "AsyncRuntime":
        """Load a bundle in a thread; the options, and the errors, are those of `Runtime.open`."""
        return cls(
            await asyncio.to_thread(Runtime.open, path, **options), num_workers=num_workers, max_waiting=max_waiting
        )

    async def ask(self, video: Source, question: str, **options: Any) -> Answer:
        """Answer as `Runtime.ask` does, with its options; time spent waiting counts towards `timeout_seconds`.

        A task that is cancelled is let go at once; the thread ends its work with the step it is in.

        Raises:
            Busy: too many are waiting.
        """
        stop, left = threading.Event(), _time_left(options)
        future = self._submit(lambda: self._runtime.ask(video, question, **left(), stop=stop))
        try:
            answer: Answer = await self._result(future)
            return answer
        finally:
            stop.set()

    async def stream(self, video: Source, question: str, **options: Any) -> AsyncGenerator[str, None]:
        """Yield the pieces of an answer as they are written, as `Runtime.stream` does, with its options.

        Raises:
            Busy: too many are waiting.
        """
        loop, stop, left = asyncio.get_running_loop(), threading.Event(), _time_left(options)
        pieces: asyncio.Queue[str | None] = asyncio.Queue()

        def put(piece: str | None) -> None:
            if not loop.is_closed():
                loop.call_soon_threadsafe(pieces.put_nowait, piece)

        def write() -> None:
            for piece in self._runtime.stream(video, question, **left(), stop=stop):
                put(piece)

        future = self._submit(write)
        future.add_done_callback(lambda _: put(None))
        try:
            while (piece := await pieces.get()) is not None:
                yield piece
            await self._result(future)
        finally:
            stop.set()
            future.cancel()

    async def close(self) -> None:
        """End once what is under way is answered; what waits is cancelled. Then close the runtime."""
        await asyncio.to_thread(self._pool.shutdown, wait=True, cancel_futures=True)
        self._runtime.close()

    async def __aenter__(self) -> "AsyncRuntime":
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        await self.close()

    async def _result(self, future: "Future[Any]") -> Any:
        try:
            return await asyncio.wrap_future(future)
        except asyncio.CancelledError:
            task = asyncio.current_task()
            if task is not None and task.cancelling():
                raise
            raise Stopped("the AsyncRuntime was closed before the answer was there") from None

    def _submit(self, work: Any) -> "Future[Any]":
        with self._lock:
            if self._pending >= self._most:
                raise Busy(
                    f"{self._pending} questions are being answered or waiting, as many as may; ask again later, or "
                    "open with a larger max_waiting"
                )
            try:
                future = self._pool.submit(work)
            except RuntimeError as error:  # shut down
                raise ConfigError("this AsyncRuntime is closed; open the bundle again") from error
            self._pending += 1
        future.add_done_callback(self._done)
        return future

    def _done(self, _: "Future[Any]") -> None:
        with self._lock:
            self._pending -= 1


def _time_left(options: dict[str, Any]) -> Callable[[], dict[str, Any]]:
    """Return what gives the options with the timeout that is left of theirs when it is called."""
    started, limit = time.perf_counter(), options.get("timeout_seconds")

    def left() -> dict[str, Any]:
        if not isinstance(limit, int | float):
            return options
        seconds = limit - (time.perf_counter() - started)
        if limit > 0 and seconds <= 0:
            raise Stopped(f"the question waited longer than its timeout_seconds = {limit:g}; give it more")
        return {**options, "timeout_seconds": min(seconds, limit)}

    return left
