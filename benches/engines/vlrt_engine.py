"""vlrt itself, on a bundle. Loads no torch where the bundle needs none, so that peak memory is the runtime's own."""

import dataclasses
import time
from typing import Any

import numpy as np

import vlrt
from benches.engines.protocol import Request, rolled, timed
from vlrt import config, prompt
from vlrt.backends import select
from vlrt.bundle import Bundle
from vlrt.video import Frames

FPS = 2.0  # of frames that come as an array: a temporal patch lasts a second


class Engine:
    """See `protocol.Answering`. Replies also hold `stages` and `usage`, or the seconds of each question.

    Args:
        bundle: a directory.
        threads: of the engine.
        num_latents: in place of the bundle's own; the rollout has to be recurrent.
    """

    def __init__(self, bundle: str, threads: int, num_latents: int | None = None) -> None:
        opened = Bundle.open(bundle)
        backend = select.load(opened, threads=threads)
        if num_latents is not None:
            backend.model = with_latents(backend.model, num_latents)
        self._runtime = vlrt.Runtime(backend, prompt.Tokenizer.open(opened.path), video_cache_bytes=0)
        self._backend = backend
        weights = sum(record.num_bytes for name, record in opened.manifest.files.items() if name.endswith(".bin"))
        latent = backend.model.latent
        self._described = {
            "version": vlrt.__version__,
            "backend": opened.backend,
            "precision": opened.precision,
            "kernels": getattr(backend, "kernels", None),
            "weight_bytes": weights,
            "vision_chunk": backend.vision_chunk,
            "prefill_chunk": backend.prefill_chunk,
            "num_latents": latent.num_latents if latent else 0,
        }

    def describe(self) -> dict[str, Any]:
        """See `protocol.Answering`."""
        return self._described

    def answer(self, request: Request) -> dict[str, Any]:
        """See `protocol.Answering`."""
        frames = rolled(request)
        video = request.source if frames is None else Frames.from_array(frames, fps=FPS)
        forced = {"max_tokens": request.num_tokens, "min_tokens": request.num_tokens, "reasoning": request.reasoning}
        if request.logits_to is not None:
            return self._logits(request, video, request.logits_to)
        if request.questions > 1:
            return self._many(request, video, forced)
        sampling = {"num_frames": request.num_frames} if frames is None else {}
        seconds, answer = timed(lambda: self._runtime.ask(video, request.question, **sampling, **forced))
        return {
            "seconds": seconds,
            "token_ids": list(answer.token_ids),
            "stages": answer.timings,
            "usage": dict(vars(answer.usage)),
        }

    def _many(self, request: Request, video: Any, forced: dict[str, Any]) -> dict[str, Any]:
        """Open the video and ask about it, each time something else; `after` holds the seconds after each answer."""
        start, after = time.perf_counter(), []
        sampling = {} if isinstance(video, Frames) else {"num_frames": request.num_frames}
        with self._runtime.open_video(video, **sampling) as clip:
            opened = time.perf_counter() - start
            for number in range(request.questions):
                answer = clip.ask(f"{request.question} ({number})", **forced)
                after.append(time.perf_counter() - start)
        return {"seconds": after[-1], "token_ids": list(answer.token_ids), "opened": opened, "after": after}

    def _logits(self, request: Request, video: Any, path: str) -> dict[str, Any]:
        found: list[Any] = []
        logits = self._backend.logits
        self._backend.logits = lambda hidden: found.append(logits(hidden)) or found[-1]
        try:
            self._runtime.ask(video, request.question, reasoning="direct", max_tokens=1, min_tokens=1)
        finally:
            self._backend.logits = logits
        np.save(path, found[0][0])
        return {"seconds": 0.0, "token_ids": []}


def with_latents(model: config.Model, num_latents: int) -> config.Model:
    """Return the config with another number of latents; weights are the same where they come one by one."""
    latent = model.latent
    assert latent is not None, "the model has latents"
    assert latent.rollout == "recurrent", "the parallel rollout has a query per latent"
    return dataclasses.replace(model, latent=dataclasses.replace(latent, num_latents=num_latents))
