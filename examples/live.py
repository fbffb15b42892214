"""Watches a file as if live, or a camera, and asks about it every few seconds; says how old the news in an answer is.

Usage: python examples/live.py BUNDLE SOURCE QUESTION [--fps 2] [--every 5] [--window 30]

SOURCE is a file, or the number of a camera (Linux: 0 is /dev/video0). It ends with the file, or with Ctrl-C.
"""

import argparse
import contextlib
import queue
import sys
import threading
import time
from collections.abc import Iterator

import av
import numpy as np

import vlrt


def frames(source: str, fps: float) -> Iterator[tuple[float, np.ndarray]]:
    """Yield (when it was there, RGB frame), fps of them per second of the source, none before its time."""
    is_camera = source.isdigit()
    opened = av.open(f"/dev/video{source}", format="v4l2") if is_camera else av.open(source)
    with opened as container:
        started, first, count = time.perf_counter(), None, 0
        for frame in container.decode(video=0):
            first = frame.time if first is None else first
            seconds = frame.time - first
            while count <= seconds * fps:  # a source with fewer frames per second shows some twice
                if not is_camera:
                    time.sleep(max(0.0, started + seconds - time.perf_counter()))
                yield time.perf_counter() if is_camera else started + seconds, frame.to_ndarray(format="rgb24")
                count += 1


def watch(source: str, fps: float, into: queue.SimpleQueue) -> None:
    """Put frames into a queue as they come, then what ended them."""
    ended: object = None
    try:
        for found in frames(source, fps):
            into.put(found)
    except Exception as error:  # to be raised by whoever reads the queue
        ended = error
    into.put(ended)


def arrived(waiting: queue.SimpleQueue) -> list:
    """Return all that is in a queue, one thing at least."""
    found = [waiting.get()]
    with contextlib.suppress(queue.Empty):
        while True:
            found.append(waiting.get_nowait())
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    for name in ("bundle", "source", "question"):
        parser.add_argument(name)
    parser.add_argument("--fps", type=float, default=2, help="frames per second that the model is shown")
    parser.add_argument("--every", type=float, default=5, help="seconds of video between two questions")
    parser.add_argument("--window", type=float, default=30, help="seconds of video that the model looks back on")
    args = parser.parse_args()
    waiting: queue.SimpleQueue = queue.SimpleQueue()
    with (
        vlrt.Runtime.open(args.bundle) as runtime,
        runtime.open_stream(fps=args.fps, window_seconds=args.window) as stream,
    ):
        threading.Thread(target=watch, args=(args.source, args.fps, waiting), daemon=True).start()
        shown, asked, ended = 0, 0, False  # counts of frames
        while not ended:
            found = arrived(waiting)
            ended = not isinstance(found[-1], tuple)
            if isinstance(found[-1], Exception):
                raise found[-1]
            new = found[:-1] if ended else found
            if new:
                stream.extend(np.stack([picture for _, picture in new]))
                shown, newest = shown + len(new), new[-1][0]
            if shown > asked and (ended or (shown - asked) / args.fps >= args.every):
                answer = stream.ask(args.question)
                lag = time.perf_counter() - newest
                print(f"{shown / args.fps:7.1f} s  {answer.text}  ({lag:.2f} s behind)", flush=True)
                asked = shown


if __name__ == "__main__":
    try:
        main()
    except KeyboardInterrupt:
        sys.exit(130)
    except (vlrt.VlrtError, av.FFmpegError) as error:
        sys.exit(f"live.py: {error}")
