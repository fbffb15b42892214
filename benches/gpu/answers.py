"""Time to answer a question about 16 frames: latents, direct, a chain of 384 tokens; and the chain in transformers.

The clock starts at the path of a video where a decoder is installed, else at decoded frames (`from` says which), and
stops at the last token's id; the process is warm. Weights are random, so lengths are forced: answers of 4 tokens. Both
engines get the same frames; transformers gets patches that vlrt has cut on the host, in place of its own preprocessing.
"""

import itertools
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch

from benches import random_model, timing
from benches.gpu.peer import Peer, relative_error
from benches.inputs import Setting
from vlrt import encoding, generate, preprocess
from vlrt.answer import Clock
from vlrt.backends.base import FrameUpload
from vlrt.backends.torch import TorchBackend
from vlrt.quantiles import quantiles
from vlrt.video import Frames, load

NUM_FRAMES, SIZE = 16, 224
ANSWER_TOKENS, CHAIN_TOKENS, SHORT_CHAIN_TOKENS = 4, 384, 64


def run(item: str, setting: Setting, expired: Callable[[], bool], out: Path) -> dict[str, Any]:
    """Return the times of one engine."""
    return {"vlrt": _vlrt, "transformers": _transformers}[item](setting, expired)


class Clip:
    """Where frames come from: a file where it can be decoded, else memory."""

    def __init__(self, setting: Setting) -> None:
        self._setting = setting
        self._path = None if setting.tiny else _file()
        side = setting.pick(SIZE, 56)
        noise = np.random.default_rng(0).integers(0, 256, (NUM_FRAMES, side, side, 3), np.uint8)
        self._frames = Frames.from_array(noise, fps=2.0)
        self.source = "decoded frames" if self._path is None else "file"

    def frames(self, upload: FrameUpload | None = None) -> Frames:
        """Decode where there is a file, into the memory of an upload."""
        if self._path is None:
            return self._frames
        model, _ = random_model.model_and_weights(self._setting)
        return load(self._path, model.video, model.vision, num_frames=NUM_FRAMES, target=upload)

    def patches(self) -> preprocess.Patches:
        """Decode, and cut patches on the host."""
        model, _ = random_model.model_and_weights(self._setting)
        return preprocess.patchify(self.frames(), model.video, model.vision)


def _file() -> Path | None:
    try:
        from benches import material

        return material.clip()
    except (ImportError, ValueError, OSError):  # no PyAV, or one that does not encode
        return None


def _vlrt(setting: Setting, expired: Callable[[], bool]) -> dict[str, Any]:
    backend, clip = random_model.loaded(setting), Clip(setting)
    chain, runs = setting.pick((CHAIN_TOKENS, 9), (6, 3))
    ways = {"direct": ANSWER_TOKENS, "recurrent": ANSWER_TOKENS, "parallel": ANSWER_TOKENS}
    for _ in range(3):  # the vision tower is recorded when a grid is seen again
        for how, length in ways.items():
            answer(backend, clip, how, length)
    found: dict[str, Any] = {"from": clip.source, "num_frames": NUM_FRAMES, "answer_tokens": ANSWER_TOKENS}
    times: dict[str, list[float]] = {how: [] for how in ways}
    for _ in range(runs):  # in turn: what disturbs the machine disturbs all
        for how, length in ways.items():
            times[how].append(answer(backend, clip, how, length)["total"])
    found["seconds"] = {how: quantiles(values) | {"runs": runs} for how, values in times.items()}
    answer(backend, clip, "direct", 8)
    times["chain"] = [answer(backend, clip, "direct", chain + ANSWER_TOKENS)["total"] for _ in range(3)]
    found["seconds"]["chain"] = quantiles(times["chain"]) | {"runs": 3}
    found["chain_tokens"] = chain
    found["stages"] = {how: answer(backend, clip, how, ANSWER_TOKENS, apart=True) for how in ways}
    return found


def answer(backend: TorchBackend, clip: Clip, how: str, num_tokens: int, *, apart: bool = False) -> dict[str, float]:
    """Answer once as the runtime does, in ids; return seconds, by stage where `apart` waits for each to end."""
    model, latent = backend.model, how != "direct"
    marks = [("begin", time.perf_counter())]

    def mark(stage: str) -> None:
        if apart:
            timing.synchronize(backend.device.type)
        marks.append((stage, time.perf_counter()))

    upload = backend.frame_upload()
    frames = clip.frames(upload)
    mark("decode")
    tokens = encoding.encode(backend, model, frames.data, Clock(), upload)
    mark("vision")
    grid, seconds = (f(frames, model.vision) for f in (preprocess.grid_of, preprocess.seconds_per_temporal_patch))
    built = random_model.built_prompt(model, grid, seconds, latent=latent)
    context = generate.read(backend, built, tokens)
    room = num_tokens + random_model.NUM_LATENTS + 1
    writer = generate.Writer(backend, context, room)
    mark("prefill")
    if latent:
        backend.model = random_model.with_rollout(model, "recurrent" if how == "recurrent" else "parallel")
        backend.lower(writer.reason(context))
        backend.model = model
        mark("latents")
    ids = list(writer.answer(max_tokens=num_tokens, min_tokens=num_tokens, eos=model.tokens.eos_token_ids))
    assert len(ids) == num_tokens, "the length was to be forced"
    mark("answer")
    stages = {stage: stop - start for (_, start), (stage, stop) in itertools.pairwise(marks)}
    return {**(stages if apart else {}), "total": marks[-1][1] - marks[0][1]}


def _transformers(setting: Setting, expired: Callable[[], bool]) -> dict[str, Any]:
    """Hold the two engines' first logits against each other, then time transformers."""
    peer, clip = Peer(setting), Clip(setting)
    backend = random_model.loaded(setting)
    patches = clip.patches()
    built = random_model.built_prompt(peer.model, patches.grid_thw, patches.seconds_per_temporal_patch, latent=False)
    context = generate.read(backend, built, backend.encode(patches.pixels, patches.grid_thw))
    ours = torch.from_numpy(backend.logits(generate.Writer(backend, context, 8).last_hidden)[0])
    error = relative_error(ours, peer.logits(built, patches.pixels))

    def timed(num_tokens: int) -> float:
        start = time.perf_counter()
        pixels = clip.patches().pixels
        return time.perf_counter() - start + peer.write(built, pixels, num_tokens)

    short, chain = setting.pick((SHORT_CHAIN_TOKENS, CHAIN_TOKENS), (3, 6))
    timed(ANSWER_TOKENS)
    direct = [timed(ANSWER_TOKENS) for _ in range(3)]
    found: dict[str, Any] = {"from": clip.source, "attention": peer.attention, "relative_error_of_logits": error}
    found["seconds"] = {"direct": quantiles(direct) | {"runs": 3}, "short_chain": timed(short + ANSWER_TOKENS)}
    found |= {"short_chain_tokens": short, "chain_tokens": chain}
    per_token = (found["seconds"]["short_chain"] - statistics.median(direct)) / short
    found["seconds_per_token"] = per_token
    if expired():
        found["seconds"]["chain"] = statistics.median(direct) + chain * per_token
        found["chain_is"] = "extrapolated from the short chain: out of time"
    else:
        found["seconds"]["chain"] = timed(chain + ANSWER_TOKENS)
        found["chain_is"] = "measured once"
    return found
