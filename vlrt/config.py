"""Frozen dataclasses of every setting that a model, a video or an answer has.

Knows ranges and names, not files: `checkpoint.py` fills them from Hugging Face directories, `bundle.py` from manifests.
"""

import dataclasses
import types
import typing
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal, TypeVar

from vlrt.errors import ConfigError

T = TypeVar("T")

MAX_LAYERS = 1024  # more is a damaged config: the largest published decoder has 80
MAX_FLOAT = 3e38  # of float32, in which models compute
MAX_INT = 2**63 - 1  # what arrays and files count with; beyond it float() and C extensions overflow

Family = Literal["qwen2_vl", "qwen2_5_vl"]
Rollout = Literal["recurrent", "parallel"]
Injection = Literal["identity", "rms", "mlp", "mlp_xattn"]
StopRule = Literal["fixed", "end_token"]
TextPosition = Literal["largest", "spatial"]


@dataclass(frozen=True)
class Vision:
    """The vision tower: patches of pixels to video tokens. Sizes are in channels or pixels."""

    depth: int
    hidden_size: int
    intermediate_size: int
    num_heads: int
    out_hidden_size: int
    hidden_act: Literal["silu", "quick_gelu", "gelu"]
    patch_size: int = 14
    temporal_patch_size: int = 2
    spatial_merge_size: int = 2
    in_channels: int = 3
    window_size: int = 0  # pixels; 0: every layer attends to its whole temporal patch
    full_attention_layers: tuple[int, ...] = ()  # with window_size: the layers that attend to the whole temporal patch
    tokens_per_second: float | None = None  # None: the temporal M-RoPE axis counts temporal patches, not time
    norm_eps: float = 1e-6

    def __post_init__(self) -> None:
        """Refuse sizes that no tower can have."""
        _positive(self, "depth", "hidden_size", "intermediate_size", "num_heads", "out_hidden_size", "patch_size")
        _positive(self, "temporal_patch_size", "spatial_merge_size", "in_channels", "norm_eps")
        _has_layers("vision.depth", self.depth)
        _divides("vision.hidden_size", self.hidden_size, "num_heads", self.num_heads)
        if self.head_dim % 4:
            raise ConfigError(f"vision head dim is {self.head_dim}; 2-D rotary needs a multiple of 4")
        if self.window_size and self.window_size % (self.patch_size * self.spatial_merge_size):
            raise ConfigError(
                f"vision.window_size is {self.window_size} pixels; accepted: 0 or a multiple of "
                f"patch_size * spatial_merge_size = {self.patch_size * self.spatial_merge_size}"
            )

    @property
    def head_dim(self) -> int:
        """Channels per attention head."""
        return self.hidden_size // self.num_heads

    @property
    def patch_dim(self) -> int:
        """Values per patch: in_channels * temporal_patch_size * patch_size**2."""
        return self.in_channels * self.temporal_patch_size * self.patch_size**2


@dataclass(frozen=True)
class Decoder:
    """The language model: GQA, M-RoPE, RMSNorm, SwiGLU."""

    hidden_size: int
    intermediate_size: int
    num_layers: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    vocab_size: int
    mrope_section: tuple[int, int, int]  # frequencies per axis (time, height, width); they add up to head_dim / 2
    rope_theta: float = 1_000_000.0
    rms_norm_eps: float = 1e-6
    max_positions: int = 32_768
    tie_word_embeddings: bool = False

    def __post_init__(self) -> None:
        """Refuse sizes that no decoder can have."""
        _positive(self, "hidden_size", "intermediate_size", "num_layers", "num_heads", "num_kv_heads", "head_dim")
        _positive(self, "vocab_size", "rope_theta", "rms_norm_eps", "max_positions")
        _has_layers("decoder.num_layers", self.num_layers)
        _divides("decoder.num_heads", self.num_heads, "num_kv_heads", self.num_kv_heads)
        if 2 * sum(self.mrope_section) != self.head_dim:
            raise ConfigError(
                f"decoder.mrope_section is {list(self.mrope_section)}; accepted: a sum of head_dim / 2 = "
                f"{self.head_dim / 2:g}"
            )


@dataclass(frozen=True)
class Latent:
    """How a checkpoint reasons in latents (L of them), see docs/latents.md."""

    num_latents: int
    pad_token_id: int
    start_token_id: int
    end_token_id: int
    rollout: Rollout = "recurrent"
    rounds: int = 1  # R, of the parallel rollout
    injection: Injection = "mlp_xattn"
    stop: StopRule = "fixed"  # end_token: a recurrent rollout ends early where the model predicts end_token_id
    num_heads: int = 1  # of the injection module's cross-attention
    intermediate_size: int = 0  # width of the injection module's MLP; 0: the decoder's hidden_size

    def __post_init__(self) -> None:
        """Refuse plans that cannot be run."""
        if not 1 <= self.num_latents <= 1024:
            raise ConfigError(f"latent.num_latents is {self.num_latents}; accepted: 1 to 1024")
        if self.rollout == "parallel" and not 1 <= self.rounds <= self.num_latents:
            raise ConfigError(f"latent.rounds is {self.rounds}; accepted: 1 to num_latents = {self.num_latents}")
        if self.rollout == "parallel" and self.stop != "fixed":
            raise ConfigError("latent.stop is 'end_token'; the parallel rollout accepts only 'fixed'")


@dataclass(frozen=True)
class Tokens:
    """Ids of the tokens that carry structure."""

    image_token_id: int
    video_token_id: int
    vision_start_token_id: int
    vision_end_token_id: int
    eos_token_ids: tuple[int, ...]

    def __post_init__(self) -> None:
        """Refuse a model that has no way to end an answer."""
        if not self.eos_token_ids:
            raise ConfigError("tokens.eos_token_ids is empty; accepted: one id or more")


@dataclass(frozen=True)
class Video:
    """How frames are sampled and resized (rules and defaults of qwen-vl-utils 0.0.14), and what is refused unread."""

    fps: float = 2.0
    num_frames: int | None = None  # set: uniform sampling of so many frames; None: sampling at fps
    min_frames: int = 4
    max_frames: int = 768
    min_pixels: int = 128 * 28 * 28  # per frame of a video
    max_pixels: int = 768 * 28 * 28
    total_pixels: int = int(128_000 * 28 * 28 * 0.9)  # over all frames of a video
    image_min_pixels: int = 4 * 28 * 28
    image_max_pixels: int = 16_384 * 28 * 28
    mean: tuple[float, float, float] = (0.48145466, 0.4578275, 0.40821073)
    std: tuple[float, float, float] = (0.26862954, 0.26130258, 0.27577711)
    max_file_bytes: int = 64 * 1024**3
    max_source_pixels: int = 8192 * 8192  # height * width of a stored frame
    max_source_frames: int = 10_000_000

    def __post_init__(self) -> None:
        """Refuse ranges that no video can satisfy."""
        _positive(self, "fps", "min_frames", "max_frames", "min_pixels", "max_pixels", "total_pixels")
        _positive(self, "image_min_pixels", "image_max_pixels", "max_file_bytes", "max_source_pixels")
        _positive(self, "max_source_frames")
        if not all(abs(value) < MAX_FLOAT for value in self.mean):
            raise ConfigError(f"video.mean is {list(self.mean)}; accepted: finite numbers")
        if not all(0 < value < MAX_FLOAT for value in self.std):
            raise ConfigError(f"video.std is {list(self.std)}; accepted: numbers above 0")
        for low, high in (
            ("min_frames", "max_frames"),
            ("min_pixels", "max_pixels"),
            ("image_min_pixels", "image_max_pixels"),
        ):
            if getattr(self, low) > getattr(self, high):
                raise ConfigError(
                    f"video.{low} is {getattr(self, low)}; accepted: at most {high} = {getattr(self, high)}"
                )
        if self.num_frames is not None and self.num_frames < 1:
            raise ConfigError(f"video.num_frames is {self.num_frames}; accepted: 1 or more")


@dataclass(frozen=True)
class Model:
    """Everything that defines a model and how it is asked."""

    family: Family
    vision: Vision
    decoder: Decoder
    tokens: Tokens
    latent: Latent | None = None
    video: Video = field(default_factory=Video)
    text_position_after_video: TextPosition = "largest"
    repetition_penalty: float = 1.0  # of tokens that the prompt or the answer already has (arXiv 1909.05858)
    choice_temperature: float = 1.0  # of the probabilities of choices; fitted by `vlrt eval --calibrate`

    def __post_init__(self) -> None:
        """Refuse parts that do not fit each other."""
        _positive(self, "repetition_penalty", "choice_temperature")
        if self.vision.out_hidden_size != self.decoder.hidden_size:
            raise ConfigError(
                f"vision.out_hidden_size is {self.vision.out_hidden_size}; accepted: decoder.hidden_size = "
                f"{self.decoder.hidden_size}"
            )
        for name, token_id in _token_ids(self):
            if not 0 <= token_id < self.decoder.vocab_size:
                raise ConfigError(
                    f"{name} is {token_id}; accepted: 0 to vocab_size - 1 = {self.decoder.vocab_size - 1}"
                )


def dimensions(model: Model) -> dict[str, int]:
    """Return the dimensions of names.py that a config fixes, by their letters there."""
    return {
        "patch_dim": model.vision.patch_dim,
        "D_vision/2": model.vision.head_dim // 2,
        "C": model.decoder.hidden_size,
        "D": model.decoder.head_dim,
        "D/2": model.decoder.head_dim // 2,
        "H_kv": model.decoder.num_kv_heads,
        "V": model.decoder.vocab_size,
    }


def to_dict(config: Any) -> dict[str, Any]:
    """Return a config dataclass as plain JSON values; `from_dict` is its inverse."""
    return dataclasses.asdict(config)


def from_dict(kind: type[T], values: Mapping[str, Any], *, path: str = "") -> T:
    """Build a config dataclass from plain JSON values.

    Raises:
        ConfigError: a key is unknown or missing (named), or a value is of the wrong type or out of range.
    """
    if not isinstance(values, Mapping):
        raise ConfigError(f"{path or kind.__name__} is a {type(values).__name__}; accepted: an object")
    fields = {f.name: f for f in dataclasses.fields(kind)}  # type: ignore[arg-type]  # kind is a dataclass by contract
    unknown = sorted(set(values) - set(fields))
    if unknown:
        raise ConfigError(f"unknown setting {path}{unknown[0]!s}; accepted: {', '.join(fields)}")
    hints = typing.get_type_hints(kind)
    built = {}
    for name, spec in fields.items():
        if name in values:
            built[name] = _convert(hints[name], values[name], f"{path}{name}")
        elif spec.default is dataclasses.MISSING and spec.default_factory is dataclasses.MISSING:
            raise ConfigError(f"setting {path}{name} is missing from {path or kind.__name__}")
    return kind(**built)


def _convert(hint: Any, value: Any, path: str) -> Any:
    """Check one value against its annotation; lists become tuples, objects become dataclasses."""
    origin = typing.get_origin(hint)
    if origin is types.UnionType:
        inner = [h for h in typing.get_args(hint) if h is not types.NoneType]
        if value is None and len(inner) < len(typing.get_args(hint)):
            return None
        if len(inner) == 1:
            return _convert(inner[0], value, path)
        if not isinstance(value, tuple(inner)) or isinstance(value, bool):
            raise ConfigError(f"{path} is {value!r}; accepted: {' or '.join(kind.__name__ for kind in inner)}")
        return value
    if origin is Literal:
        if value not in typing.get_args(hint):
            raise ConfigError(f"{path} is {value!r}; accepted: {', '.join(map(repr, typing.get_args(hint)))}")
        return value
    if origin is tuple:
        if not isinstance(value, list | tuple):
            raise ConfigError(f"{path} is {value!r}; accepted: a list")
        kinds = typing.get_args(hint)
        if kinds[-1] is Ellipsis:
            kinds = kinds[:1] * len(value)
        if len(kinds) != len(value):
            raise ConfigError(f"{path} has {len(value)} values; accepted: {len(kinds)}")
        return tuple(_convert(k, v, f"{path}[{i}]") for i, (k, v) in enumerate(zip(kinds, value, strict=True)))
    if origin is dict:
        if not isinstance(value, Mapping):
            raise ConfigError(f"{path} is {value!r}; accepted: an object")
        return {str(k): _convert(typing.get_args(hint)[1], v, f"{path}.{k}") for k, v in value.items()}
    if dataclasses.is_dataclass(hint):
        return from_dict(typing.cast(type, hint), value, path=f"{path}.")
    if isinstance(value, int) and abs(value) > MAX_INT:
        raise ConfigError(f"{path} is a number of {value.bit_length()} bits; accepted: at most 63")
    if hint is float and isinstance(value, int) and not isinstance(value, bool):
        return float(value)
    if not isinstance(value, hint) or (hint is int and isinstance(value, bool)):
        raise ConfigError(f"{path} is {value!r}; accepted: {hint.__name__}")
    return value


def _positive(config: Any, *names: str) -> None:
    for name in names:
        value = getattr(config, name)
        if not (isinstance(value, int | float) and 0 < value < MAX_FLOAT):
            raise ConfigError(f"{type(config).__name__.lower()}.{name} is {value!r}; accepted: a number above 0")


def _has_layers(name: str, count: int) -> None:
    if count > MAX_LAYERS:
        raise ConfigError(f"{name} is {count}; accepted: at most {MAX_LAYERS}")


def _divides(name: str, value: int, by_name: str, by: int) -> None:
    if value % by:
        raise ConfigError(f"{name} is {value}; it must be a multiple of {by_name} = {by}")


def _token_ids(model: Model) -> list[tuple[str, int]]:
    ids = [(f"tokens.{k}", v) for k, v in vars(model.tokens).items() if isinstance(v, int)]
    ids += [("tokens.eos_token_ids", v) for v in model.tokens.eos_token_ids]
    if model.latent is not None:
        ids += [(f"latent.{k}", getattr(model.latent, k)) for k in ("pad_token_id", "start_token_id", "end_token_id")]
    return ids
