"""Vision, prefill, latent and answer steps of the 7B model in vlrt's torch backend, at 2,048 and 8,192 video tokens.

Times are of the host's clock with the device's work in it, as a user sees them, the vision tower and the recorded step
also of the device alone. A latent step is its share of a whole rollout of L latents, end token included.
"""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from benches import counts, random_model, timing
from benches.inputs import Setting, Source
from vlrt import encoding, generate, positions
from vlrt.answer import Clock
from vlrt.backends.torch import TorchBackend
from vlrt.models import registry
from vlrt.video import Frames

SIDE = 16  # patches along a side of a frame of 224 x 224
RUNS = 7


def run(item: str, setting: Setting, expired: Callable[[], bool], out: Path) -> dict[str, Any]:
    """Return the stages at a number of video tokens; items are named `<tokens>` or `<tokens>_<precision>`."""
    tokens, _, precision = item.partition("_")
    num_tokens = setting.pick(int(tokens), 2 * SIDE * SIDE // 4)
    backend = random_model.loaded(setting, precision or "bf16")
    found: dict[str, Any] = {"num_tokens": num_tokens, "precision": precision or "bf16"}
    parts = {"prefill": prefill, "steps": steps} | ({} if precision else {"vision": vision})
    for name, measure in parts.items():
        found[name] = {"skipped": "out of time"} if expired() else measure(backend, setting, num_tokens)
    if setting.device == "cuda":
        found["peak_device_memory_bytes"] = torch.cuda.max_memory_allocated()
    return found


def vision(backend: TorchBackend, setting: Setting, num_tokens: int) -> dict[str, Any]:
    """Time the whole stage from patches, and from frames, in host memory on, and the tower alone on the device."""
    model, weights = random_model.model_and_weights(setting)
    grid = (num_tokens * 4 // SIDE**2, SIDE, SIDE)
    pixels = np.random.default_rng(0).standard_normal((num_tokens * 4, model.vision.patch_dim), np.float32)
    order, windows = positions.window_index(grid, model.vision)
    tables = (*positions.vision_cos_sin(grid, model.vision), positions.frame_seqlens(grid))
    arrays = (pixels, *tables, order, np.argsort(order), windows)
    given = [torch.from_numpy(np.ascontiguousarray(x)).to(setting.device) for x in arrays]
    given[0] = given[0].to(torch.bfloat16)
    tower = registry.build(model).visual
    registry.load(tower, weights.fetch, prefix="visual.", dtype=torch.bfloat16)
    with torch.inference_mode():
        alone = timing.measure(lambda: tower(*given), setting.device, cold=False, seconds=0.5)
    for _ in range(3):  # the second time a grid is seen it is recorded
        backend.encode(pixels, grid)
    stage = timing.wall(lambda: backend.encode(pixels, grid), setting.device, RUNS)
    side = SIDE * model.vision.patch_size
    noise = np.random.default_rng(0).integers(0, 256, (grid[0] * 2, side, side, 3), np.uint8)
    frames = Frames.from_array(noise, fps=2.0)
    sent = timing.wall(lambda: encoding.encode(backend, model, frames.data, Clock()), setting.device, RUNS)
    flops = counts.vision_flops(model.vision, grid, windows.tolist())
    found = {"seconds": stage, "from_frames": sent, "tower": alone, "flops": flops}
    return {**found, "tower_flops_per_second": flops / alone["median"]}


def prefill(backend: TorchBackend, setting: Setting, num_tokens: int) -> dict[str, Any]:
    """Time a decoder pass over so many new positions."""
    decoder = backend.model.decoder
    source = Source(setting.device, torch.bfloat16)
    embeds = source.normal(num_tokens, decoder.hidden_size, scale=random_model.EMBEDDING_RMS)
    at = np.tile(np.arange(num_tokens, dtype=np.int64), (3, 1))
    tables = positions.mrope_cos_sin(at, decoder)
    cache = backend.prepare(num_tokens)

    def run() -> None:
        backend.decode(cache, embeds, *tables)
        cache.rewind(num_tokens)

    run()
    seconds = timing.wall(run, setting.device, RUNS)
    flops = counts.prefill_flops(decoder, num_tokens)
    return {"seconds": seconds, "flops": flops, "flops_per_second": flops / seconds["median"]}


def steps(backend: TorchBackend, setting: Setting, num_tokens: int) -> dict[str, Any]:
    """Time latents of both rollouts, and answer steps with and without the output head, behind a read video."""
    model = backend.model
    plan = model.latent
    assert plan is not None
    length = plan.num_latents
    context = _context(backend, setting, num_tokens)
    writer = generate.Writer(backend, context, 4 * length)
    start = writer.last_hidden
    queries = backend.queries()
    assert queries is not None

    def latents() -> None:
        writer.last_hidden = start
        writer.reason(context)
        writer.rewind(length + 1)

    def tokens(with_head: bool, penalty: float = 1.0) -> None:
        words = backend.words([7], penalty)
        for _ in range(length):
            hidden = writer.feed_tokens([7])
            if with_head:
                words(hidden)
        writer.rewind(length)

    def one_round() -> None:
        hidden = writer.feed(queries)
        writer.rewind(length)
        writer.inject(writer.join([start, hidden[:-1]]))

    found: dict[str, Any] = {"num_latents": length}
    for rollout in ("recurrent", "parallel"):
        backend.model = random_model.with_rollout(model, rollout)
        found[f"{rollout}_rollout"] = _timed(latents, setting)
    backend.model = model
    found["answer_steps"] = _timed(lambda: tokens(True), setting)
    found["penalised_steps"] = _timed(lambda: tokens(True, 1.05), setting)
    found["steps_without_head"] = _timed(lambda: tokens(False), setting)
    found["parallel_round"] = _timed(one_round, setting)
    found["replayed_step"] = _replayed(backend, setting, num_tokens)
    weight_bytes = 1 if backend.precision == "fp8" else 2
    past = num_tokens + 47  # words of the prompt
    found["bytes"] = {
        "step": counts.step_bytes(model.decoder, past, weight_bytes=weight_bytes),
        "step_with_head": counts.step_bytes(model.decoder, past, weight_bytes=weight_bytes, with_head=True),
        "injection": counts.injection_bytes(model),
    }
    return found


def _timed(call: Callable[[], None], setting: Setting) -> dict[str, Any]:
    for _ in range(2):
        call()
    return timing.wall(call, setting.device, RUNS)


def _context(backend: TorchBackend, setting: Setting, num_tokens: int) -> generate.Context:
    """Return a prompt with random video tokens."""
    grid = (num_tokens * 4 // SIDE**2, SIDE, SIDE)
    built = random_model.built_prompt(backend.model, grid, 1.0, latent=True)
    source = Source(setting.device, torch.bfloat16)
    tokens = source.normal(num_tokens, backend.model.decoder.hidden_size, scale=random_model.EMBEDDING_RMS)
    return generate.read(backend, built, tokens)


def _replayed(backend: TorchBackend, setting: Setting, num_tokens: int) -> dict[str, Any] | None:
    """Time one decoder pass over one position on the device alone, as it is recorded; None on the CPU."""
    if setting.device != "cuda":
        return None
    decoder = backend.model.decoder
    cache = backend.prepare(num_tokens + 64)
    tables = positions.mrope_cos_sin(np.zeros((3, 1), np.int64), decoder)
    x: Tensor = Source(setting.device, torch.bfloat16).normal(1, decoder.hidden_size)
    with torch.inference_mode():
        for table in (cache.storage.cos, cache.storage.sin):
            table.zero_()
        cache.storage.past_length.fill_(num_tokens)
        backend.decode(cache, x, *tables)
        replay = cache.storage.graphs[1]
        return timing.measure(lambda: replay(x), setting.device, graph=False, cold=False, seconds=0.3)
