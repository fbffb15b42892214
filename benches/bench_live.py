"""A stream that is extended by two frames and asked, beside asking about all of its frames from scratch, in turn.

    python -m benches.bench_live [--shape small] [--precision int8] [--frames 64] [--rounds 5]

Reported: medians with p20 and p80, and ratios of the medians. Both ways are given frames as arrays, so that neither
decodes; answers are 4 tokens after latents, forced: the weights are untrained, and answers of both ways must be equal.
`moved` is the same with a window that drops two frames for the new ones, so that the decoder reads all of it again;
`saved` is saving the stream, `loaded` loading it and asking.
"""

import argparse
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
from rich.console import Console
from rich.progress import track

import vlrt
from benches import machine, material
from vlrt import video
from vlrt.answer import Answer
from vlrt.quantiles import quantiles

ANSWER = {"max_tokens": 4, "min_tokens": 4}
QUESTION = "What moves, and which way does it go?"
FPS = 2.0


def main(argv: Sequence[str] | None = None) -> None:
    """Measure, print ratios, write JSON."""
    parser = argparse.ArgumentParser(prog="benches.bench_live", description=__doc__.split("\n", 1)[0])
    parser.add_argument("--shape", default="small")
    parser.add_argument("--precision", default="int8")
    parser.add_argument("--frames", type=int, default=64)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--out", type=Path)
    args = parser.parse_args(argv)
    times: dict[str, list[float]] = {}
    with (
        vlrt.Runtime.open(material.bundle(args.shape, args.precision), video_cache_bytes=0) as runtime,
        tempfile.TemporaryDirectory() as folder,
    ):
        cfg = runtime.model
        frames = video.load(material.clip(), cfg.video, cfg.vision, num_frames=args.frames + 2).data
        for number in track(range(args.rounds + 1), "rounds", console=Console(stderr=True)):  # the first warms up
            took, answer, same = one_round(runtime, frames, Path(folder) / "a.clip")
            for name, seconds in took.items():
                times.setdefault(name, []).extend([seconds] if number else [])
    seconds = {name: quantiles(found) for name, found in times.items()}
    ratios = {name: seconds[name]["median"] / seconds["scratch"]["median"] for name in seconds if name != "scratch"}
    out = machine.write_result(
        "live",
        argv if argv is not None else sys.argv[1:],
        args.out,
        frames=args.frames,
        video_tokens=answer.usage.video_tokens,
        same_answers=same,
        seconds=seconds,
        times_scratch=ratios,
    )
    print(f"from scratch {seconds['scratch']['median']:.2f} s; after 2 more frames {ratios['extended']:.3f} of it,")
    print(f"{ratios['moved']:.3f} where the window moved; a saved clip {ratios['loaded']:.3f}\n{out}")


def one_round(runtime: vlrt.Runtime, frames: np.ndarray, path: Path) -> tuple[dict[str, float], Answer, bool]:
    """Return seconds of each way, the answer, and whether all ways gave the same ones."""
    count, took = len(frames) - 2, {}

    def timed(name: str, work: Callable[[], Answer]) -> Answer:
        start = time.perf_counter()
        answer = work()
        took[name] = time.perf_counter() - start
        return answer

    def scratch(data: np.ndarray) -> Answer:
        return runtime.ask(vlrt.Frames.from_array(data, fps=FPS), QUESTION, **ANSWER)

    def extended(stream: vlrt.LiveClip, data: np.ndarray) -> Answer:
        stream.extend(data)
        return stream.ask(QUESTION, **ANSWER)

    def loaded() -> Answer:
        with runtime.load_video(path) as clip:
            return clip.ask(QUESTION, **ANSWER)

    first = timed("scratch", lambda: scratch(frames[:count]))
    with runtime.open_stream(fps=FPS, window_seconds=count / FPS) as stream:
        stream.extend(frames[: count - 2])
        stream.ask(QUESTION, **ANSWER)
        second = timed("extended", lambda: extended(stream, frames[count - 2 : count]))
        timed("asked again", lambda: stream.ask(QUESTION, **ANSWER))
        start = time.perf_counter()
        stream.save(path)
        took["saved"] = time.perf_counter() - start
        moved = timed("moved", lambda: extended(stream, frames[count:]))
    third = timed("loaded", loaded)
    same = first.token_ids == second.token_ids == third.token_ids and moved.token_ids == scratch(frames[2:]).token_ids
    return took, first, same


if __name__ == "__main__":
    main()
