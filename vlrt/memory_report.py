"""What `vlrt info BUNDLE --frames N` says: tokens, bytes by part, and whether it fits here. Loads no weights."""

import contextlib
from pathlib import Path
from typing import Any

from vlrt import host_memory, memory_plan, prompt, request
from vlrt.backends import ort_library
from vlrt.bundle import Bundle
from vlrt.errors import ConfigError
from vlrt.sampling import frame_size
from vlrt.video import load


class _EnoughError(Exception):
    """A video's sizes are known."""


def report(
    path: Path,
    *,
    num_frames: int | None,
    size: tuple[int, int],
    video: Path | None,
    question_tokens: int,
    reasoning: prompt.Reasoning | None,
) -> dict[str, Any]:
    """Return the prediction as JSON values.

    Args:
        path: of a bundle.
        num_frames: sampled; None: as the bundle samples `video`.
        size: (width, height) of the source in pixels, without a video.
        video: whose size and number of frames count; its first frame is decoded.
        question_tokens: of the question.
        reasoning: as in `Runtime.ask`.

    Raises:
        ConfigError: a setting is out of range, or the bundle is of a backend whose memory is not predicted.
        VideoError: the video cannot be used.
    """
    bundle = Bundle.open(path)
    if bundle.backend != "ort":
        raise ConfigError(f"{path} is a bundle for {bundle.backend}; memory is predicted for those of ort alone")
    model, tokenizer = bundle.model, prompt.Tokenizer.open(bundle.path)
    if video is not None:
        count, height, width = _sizes(video, bundle, num_frames)
    else:
        assert num_frames is not None, "without a video the number of frames is given"
        count, (height, width) = num_frames, frame_size(size[1], size[0], num_frames, model.video, model.vision)
    asked = request.check(model, tokenizer, "?", reasoning=reasoning)
    merge = model.vision.spatial_merge_size
    built = prompt.build(
        tokenizer, model, "?", [prompt.Media(False, (1, merge, merge), 0.0)], reasoning=asked.reasoning
    )
    text_tokens = len(built.ids) - 1 - len(tokenizer.encode("?")) + question_tokens
    shape = memory_plan.Shape(count, height, width, text_tokens, asked.room(model, tokenizer))
    library = isinstance(ort_library.find(), ort_library.Library)
    plan = memory_plan.predict(model, shape, int8=bundle.precision != "fp32", library=library)
    available = host_memory.available_bytes()
    weights = _weights(bundle)
    return {
        "num_frames": count,
        "size": f"{width}x{height}",
        "video_tokens": plan.video_tokens,
        "text_tokens": text_tokens,
        "positions": plan.positions,
        "max_positions": plan.max_positions,
        "fits_positions": plan.fits_positions,
        "weights_bytes": weights,
        "parts_bytes": {name: getattr(plan, name) for name in memory_plan.PARTS},
        "vision_stage_bytes": plan.vision_bytes,
        "decoder_stage_bytes": plan.decoder_bytes,
        "peak_above_bundle_bytes": plan.peak_bytes,
        "available_bytes": available,
        "fits_memory": None if available is None else weights + plan.peak_bytes <= available,
    }


def _weights(bundle: Bundle) -> int:
    """Return the bytes of what is loaded: of tables, which are mapped, only the one that serves as head in fp32."""
    files, embed, head = bundle.manifest.files, bundle.manifest.embed.file, bundle.manifest.head
    tables = {embed, *([head.file] if head else [])}
    loaded = sum(record.num_bytes for name, record in files.items() if name not in tables)
    return loaded + (0 if "lm_head.bin" in files else files[head.file if head else embed].num_bytes)


def _sizes(video: Path, bundle: Bundle, num_frames: int | None) -> tuple[int, int, int]:
    """Return the number of frames, height and width at which a video is shown."""
    found: list[tuple[int, int, int]] = []

    def admit(*sizes: int) -> None:
        count, height, width = sizes
        found.append((count, height, width))
        raise _EnoughError

    with contextlib.suppress(_EnoughError):
        load(video, bundle.model.video, bundle.model.vision, num_frames=num_frames, admit=admit)
    return found[0]
