"""What a question about a video will take in host memory, before anything of it is computed.

Counts what a model's sizes fix (frames, video tokens, keys and values) and what one pass of each graph holds at once on
ONNX Runtime's CPU provider. Knows sizes, no file and no engine; text is a number of tokens.
"""

from collections.abc import Callable
from dataclasses import dataclass, replace

import numpy as np

from vlrt import config, positions
from vlrt.errors import ConfigError
from vlrt.sampling import size_factor

VISION_CHUNK = 1024  # patches per pass of the vision tower, rounded up to whole temporal patches
PREFILL_CHUNK = 768  # positions per pass of the decoder
MARGIN = 0.15  # by which a prediction may be too high
MIB = 2**20
PARTS = ("frames", "pixels", "vision_pass", "tokens", "embeds", "cache", "decoder_pass", "logits", "fixed")

# Found by counting what a pass holds at once (each tensor a mapping of its own, onnxruntime 1.32), in units of the
# tower's width per patch; of bodies of the bundle with segments of unequal length, per patch of the padded segments.
TOWER, TOWER_INT8, BODY, BODY_UNEQUAL, BODY_PADDED = 19.25, 3.0, 3.0, -1.25, 8.0
# Measured: pages of FFmpeg and Pillow, then of the engine and of the embedding table, that a first question touches.
DECODING_BYTES, ENGINE_BYTES = 12 * MIB, 18 * MIB


@dataclass(frozen=True)
class Shape:
    """What is asked, in sizes.

    Attributes:
        num_frames: that are sampled; 1: an image.
        height: of each at the model's size, in pixels.
        width: likewise.
        text_tokens: of the prompt beside the video's.
        room: positions that latents and answer may take.
    """

    num_frames: int
    height: int
    width: int
    text_tokens: int
    room: int

    def grid_thw(self, vision: config.Vision) -> tuple[int, int, int]:
        """Return patches (time, height, width).

        Raises:
            ConfigError: no frames, or of a size that the tower does not take.
        """
        factor = size_factor(vision)
        sides = (self.height, self.width)
        if min(self.num_frames, *sides) < 1 or any(side % factor for side in sides):
            raise ConfigError(
                f"{self.num_frames} frames of {self.width} x {self.height} pixels; accepted: 1 or more, of sides that "
                f"are multiples of {factor}"
            )
        steps = -(-self.num_frames // vision.temporal_patch_size)
        return steps, self.height // vision.patch_size, self.width // vision.patch_size


@dataclass(frozen=True)
class Plan:
    """Bytes that a question takes above the loaded bundle.

    Attributes:
        shape: what is asked.
        video_tokens: of the prompt.
        positions: that prompt, latents and answer take.
        max_positions: that the model was made for.
        frames: decoded, uint8; freed before the decoder runs.
        pixels: float32 patches of one pass of the vision tower.
        vision_pass: what one pass of the vision tower holds at once.
        tokens: video tokens.
        embeds: of the prompt.
        cache: keys, values and rotary rows.
        decoder_pass: what one pass of the decoder holds at once.
        logits: of one position.
        fixed: pages of libraries and of the engine.
    """

    shape: Shape
    video_tokens: int
    positions: int
    max_positions: int
    frames: int
    pixels: int
    vision_pass: int
    tokens: int
    embeds: int
    cache: int
    decoder_pass: int
    logits: int
    fixed: int

    @property
    def vision_bytes(self) -> int:
        """While the vision tower runs."""
        return DECODING_BYTES + self.frames + self.pixels + self.vision_pass + self.tokens

    @property
    def decoder_bytes(self) -> int:
        """While the prompt is read, which takes more than any later step."""
        return self.fixed + self.tokens + self.embeds + self.cache + max(self.decoder_pass, self.logits)

    @property
    def peak_bytes(self) -> int:
        """The most at any time."""
        return max(self.vision_bytes, self.decoder_bytes)

    @property
    def largest_activation(self) -> int:
        """What the largest single pass of a graph holds at once."""
        return max(self.pixels + self.vision_pass, self.decoder_pass)

    @property
    def fits_positions(self) -> bool:
        """Whether the model was made for so many positions."""
        return self.positions <= self.max_positions


def predict(model: config.Model, shape: Shape, *, int8: bool, library: bool) -> Plan:
    """Return what a question takes.

    Args:
        model: its sizes.
        shape: what is asked.
        int8: whether the tower is in int8, as in int8 and int4 bundles; else fp32.
        library: whether attention runs in `libvlrt_ort`.

    Raises:
        ConfigError: the tower does not take frames of that size.
    """
    vision, decoder = model.vision, model.decoder
    steps, rows, columns = shape.grid_thw(vision)
    per_step = rows * columns
    video_tokens = steps * per_step // vision.spatial_merge_size**2
    patches = per_step * min(steps, max(1, VISION_CHUNK // per_step))
    prompt_tokens = video_tokens + shape.text_tokens
    capacity = prompt_tokens + shape.room
    slot = 2 * decoder.num_layers * decoder.num_kv_heads * decoder.head_dim + decoder.head_dim
    feature = 4 * decoder.hidden_size
    at_once = min(prompt_tokens, PREFILL_CHUNK)
    packed = 4 * capacity * decoder.num_kv_heads * decoder.head_dim if int8 and library else 0  # a layer's, in bf16
    return Plan(
        shape=shape,
        video_tokens=video_tokens,
        positions=capacity,
        max_positions=decoder.max_positions,
        frames=steps * vision.temporal_patch_size * shape.height * shape.width * 3,
        pixels=4 * patches * vision.patch_dim,
        vision_pass=4 * patches * _tower_floats(vision, rows, columns, int8=int8, library=library),
        tokens=video_tokens * feature,
        embeds=prompt_tokens * feature,
        cache=4 * capacity * slot,
        decoder_pass=4 * at_once * _decoder_floats(decoder, fused=int8 and library) + packed,
        logits=4 * decoder.vocab_size,
        fixed=DECODING_BYTES + ENGINE_BYTES,
    )


def most_frames(plan: Plan, budget: int, predict: Callable[[Shape], Plan]) -> int:
    """Return how many frames of a plan's size, an even number, fit a budget in bytes and the model's positions; or 0.

    Args:
        plan: of more frames than fit.
        budget: bytes.
        predict: makes the plan of another number of frames.
    """
    low, high = 0, plan.shape.num_frames // 2
    while low < high:
        middle = (low + high + 1) // 2
        found = predict(replace(plan.shape, num_frames=2 * middle))
        low, high = (middle, high) if found.peak_bytes <= budget and found.fits_positions else (low, middle - 1)
    return 2 * low


def _decoder_floats(decoder: config.Decoder, *, fused: bool) -> int:
    """Return how many float32 a pass holds at once per position: of the MLP, whose gate stays in `libvlrt_ort`."""
    if fused:
        return decoder.intermediate_size + 2 * decoder.hidden_size
    return 4 * decoder.intermediate_size + decoder.hidden_size


def _tower_floats(vision: config.Vision, rows: int, columns: int, *, int8: bool, library: bool) -> int:
    """Return how many float32 a pass holds at once per patch: of attention, or of the MLP where that is wide."""
    widths = TOWER + TOWER_INT8 * int8
    scores = 0.0
    if not library:
        widths += BODY
        if vision.window_size:
            lengths = np.diff(positions.window_index((1, rows, columns), vision)[1])
            longest, padded = int(lengths.max()), float(lengths.max()) * len(lengths) / (rows * columns)
            if padded > 1:
                widths += BODY_UNEQUAL + BODY_PADDED * padded - BODY
                scores = vision.num_heads * longest * padded
    return max(round(widths * vision.hidden_size + scores), 4 * vision.intermediate_size + vision.hidden_size)
