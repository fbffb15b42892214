"""The parity gate: a bundle is asked, and PyTorch is asked whether it would have said the same.

The bundle runs first and writes its answers; the reference then reads prompt, latents and answers at once, layer by
layer with one layer's weights in memory, and predicts at every position. So any size is checked in three passes.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from vlrt import config, positions, prompt
from vlrt.backends.base import Backend
from vlrt.bundle import Check, Precision
from vlrt.generate import Context, Writer, read

Floats = NDArray[np.float32]

NUM_ANSWER_TOKENS = 8
QUESTION = "What moves first, and which way does it go?"
GRID_MERGED = (2, 5, 3)  # temporal patches, rows, columns of video tokens: more than one window, none of them square
# Half precisions round after each of some hundred operations: the limits are 26 ulps of bf16 and 51 of fp16.
# int4 rounds weights by 8%. Measured: 0.05 to 0.20 (the trained demo), 0.27 to 0.33 (2 random layers), 0.38 to 0.43
# (24 layers); one matrix of 2 layers with its rows reversed: over 0.7. int4_check.py looks at every matrix by itself.
ERROR_LIMITS: dict[Precision, float] = {"fp32": 1e-4, "fp16": 0.05, "bf16": 0.1, "fp8": 0.25, "int8": 0.25, "int4": 0.6}
TOWER_LIMITS: dict[Precision, float] = {**ERROR_LIMITS, "int4": ERROR_LIMITS["int8"]}  # whose tower is int8's
# Others are refused for errors, not for words: with random weights the likeliest tokens lie within any error.
AGREEMENT_LIMITS: dict[Precision, float] = {"fp32": 1.0, "fp16": 0.0, "bf16": 0.0, "fp8": 0.0, "int8": 0.0, "int4": 0.0}


@dataclass(frozen=True)
class Record:
    """What one backend makes of the gate's video and question; rows are positions."""

    video_tokens: Floats
    hidden: Floats
    logits: Floats
    answer: tuple[int, ...]
    latents: Floats | None
    latent_answer: tuple[int, ...]


def check_prompts(tokenizer: prompt.Tokenizer, cfg: config.Model) -> None:
    """Build the gate's prompts, before any work is done for them.

    Raises:
        ConfigError: tokenizer, chat template and model do not fit each other.
    """
    media = prompt.Media(False, _grid(cfg), 1.0)
    _prompt(tokenizer, cfg, media, "direct")
    if cfg.latent is not None:
        _prompt(tokenizer, cfg, media, "latent")


def check(
    bundle: Backend,
    reference: Callable[[], Backend],
    tokenizer: prompt.Tokenizer,
    precision: Precision,
    progress: Callable[[float], None],
) -> tuple[Check, ...]:
    """Compare a loaded bundle with the reference.

    Args:
        bundle: closed before the reference is made, so that both are never in memory together.
        reference: makes the PyTorch reference.
        tokenizer: of both.
        precision: decides the limits.
        progress: told fractions of the work.

    Returns:
        One row per comparison: relative RMS errors of video tokens, hidden states, logits and latents, and the share of
        answer tokens that the reference would also have chosen.
    """
    cfg = bundle.model
    pixels, media = _clip(cfg)
    record = _run(bundle, tokenizer, pixels, media)
    bundle.close()
    progress(0.3)
    torch = reference()
    limit = ERROR_LIMITS[precision]
    video_tokens = torch.encode(pixels, media.grid_thw)
    rows = [_error("video tokens", record.video_tokens, torch.lower(video_tokens), TOWER_LIMITS[precision])]
    progress(0.5)

    context = read(torch, _prompt(tokenizer, cfg, media, "direct"), video_tokens)
    hidden = _follow(torch, context, [torch.embed(_ids(record.answer))])
    num_prompt = len(context.embeds)
    rows.append(_error("hidden states", record.hidden, torch.lower(hidden[:num_prompt]), limit))
    logits = torch.logits(hidden[num_prompt - 1 :])
    rows.append(_error("logits", record.logits, logits[0][None], limit))
    eos = cfg.tokens.eos_token_ids
    rows.append(_agreement("greedy answer", logits, record.answer, eos, AGREEMENT_LIMITS[precision], limit))
    progress(0.75)
    if record.latents is not None:
        rows += _check_latents(torch, tokenizer, media, video_tokens, record, precision)
    progress(1.0)
    return tuple(rows)


def _check_latents(
    torch: Backend,
    tokenizer: prompt.Tokenizer,
    media: prompt.Media,
    video_tokens: Any,
    record: Record,
    precision: Precision,
) -> list[Check]:
    """Let the reference read the bundle's latents: it must predict each from what stands before it."""
    plan = torch.model.latent
    assert plan is not None
    assert record.latents is not None
    context = read(torch, _prompt(tokenizer, torch.model, media, "latent"), video_tokens)
    latents, end = torch.lift(record.latents), torch.embed(_ids([plan.end_token_id]))
    hidden = _follow(torch, context, [latents, end, torch.embed(_ids(record.latent_answer))])
    start, limit = len(context.embeds) - 1, ERROR_LIMITS[precision]
    rows = []
    if plan.rollout == "recurrent":
        again = torch.inject(hidden[start : start + len(latents)], torch.remember(context.pooled))
        rows.append(_error("latents", record.latents, torch.lower(again), limit))
    else:
        writer = Writer(torch, context, 1 + plan.num_latents)
        rows.append(_error("latents", record.latents, torch.lower(writer.reason(context)), limit))
    logits = torch.logits(hidden[start + len(latents) + 1 :])
    eos = torch.model.tokens.eos_token_ids
    rows.append(
        _agreement("answer after latents", logits, record.latent_answer, eos, AGREEMENT_LIMITS[precision], limit)
    )
    return rows


def _run(backend: Backend, tokenizer: prompt.Tokenizer, pixels: Floats, media: prompt.Media) -> Record:
    """Ask a backend directly and with latents, as the runtime does."""
    cfg = backend.model
    video_tokens = backend.encode(pixels, media.grid_thw)
    context = read(backend, _prompt(tokenizer, cfg, media, "direct"), video_tokens)
    hidden = _follow(backend, context, [])
    writer = Writer(backend, context, NUM_ANSWER_TOKENS)
    first = backend.logits(writer.last_hidden)
    answer = _answer(writer, cfg)
    latents: Floats | None = None
    latent_answer: tuple[int, ...] = ()
    if cfg.latent is not None:
        context = read(backend, _prompt(tokenizer, cfg, media, "latent"), video_tokens)
        writer = Writer(backend, context, 1 + cfg.latent.num_latents + NUM_ANSWER_TOKENS)
        latents, latent_answer = backend.lower(writer.reason(context)), _answer(writer, cfg)
    return Record(backend.lower(video_tokens), backend.lower(hidden), first, answer, latents, latent_answer)


def _follow(backend: Backend, context: Context, more: Sequence[Any]) -> Any:
    """Return the hidden states [S, C] of a context and what follows it, in one pass."""
    embeds = backend.join([context.embeds, *more])
    after = np.arange(len(embeds) - len(context.embeds)) + context.next_position
    at = np.concatenate([context.positions, np.stack([after] * 3)], axis=1)
    tables = positions.mrope_cos_sin(at, backend.model.decoder)
    return backend.decode(backend.prepare(len(embeds)), embeds, *tables)


def _answer(writer: Writer, cfg: config.Model) -> tuple[int, ...]:
    eos = cfg.tokens.eos_token_ids
    return tuple(writer.answer(max_tokens=NUM_ANSWER_TOKENS, min_tokens=NUM_ANSWER_TOKENS, eos=eos))


def _prompt(
    tokenizer: prompt.Tokenizer, cfg: config.Model, media: prompt.Media, reasoning: prompt.Reasoning
) -> prompt.Prompt:
    return prompt.build(tokenizer, cfg, QUESTION, [media], reasoning=reasoning)


def _clip(cfg: config.Model) -> tuple[Floats, prompt.Media]:
    """Make the patches of a small video: waves whose phase moves, and a little noise."""
    grid = _grid(cfg)
    shape = (grid[0] * grid[1] * grid[2], cfg.vision.patch_dim)
    noise = np.random.default_rng(0).standard_normal(shape)
    waves = np.sin(np.arange(shape[0])[:, None] * 0.7 + np.arange(shape[1])[None] * 0.05)
    return (waves + 0.3 * noise).astype(np.float32), prompt.Media(False, grid, 1.0)


def _grid(cfg: config.Model) -> tuple[int, int, int]:
    merge = cfg.vision.spatial_merge_size
    return GRID_MERGED[0], GRID_MERGED[1] * merge, GRID_MERGED[2] * merge


def _ids(ids: Sequence[int]) -> NDArray[np.int64]:
    return np.array(ids, np.int64)


def _error(name: str, out: Floats, ref: Floats, limit: float) -> Check:
    """Relative RMS error: `||out - ref|| / ||ref||`; not-a-number anywhere fails."""
    out, ref = out.astype(np.float64), ref.astype(np.float64)
    value = float("inf")
    if out.shape == ref.shape:
        value = float(np.linalg.norm(out - ref)) / max(float(np.linalg.norm(ref)), 1e-30)
    return Check(f"{name}: relative error", value if np.isfinite(value) else 1e30, limit, value <= limit)


def _agreement(
    name: str, logits: Floats, answer: Sequence[int], eos: Sequence[int], limit: float, error: float
) -> Check:
    """Share of tokens that are the reference's choice too, or tie with it within the error allowed to logits.

    The answer was not allowed to end, so the reference may not choose an end either.
    """
    rows = logits[: len(answer)].copy()
    rows[:, list(eos)] = rows.min()
    slack = 2 * error * rows.std(axis=-1) if error < 1e-2 else np.zeros(len(rows))  # a tie at fp32's precision
    chosen = rows[np.arange(len(answer)), list(answer)]
    masked = rows.max(axis=-1)
    value = float(np.mean(chosen >= masked - slack))
    return Check(f"{name}: tokens agreed", value, limit, value >= limit, at_least=True)
