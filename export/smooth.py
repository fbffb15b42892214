"""Smoothing: channels far larger than the others cost these their int8 precision, so weights take part of their size.

SmoothQuant (arXiv 2211.10438): what writes an activation divides a channel by s, what reads it multiplies that column
of its weight by s. Where a norm, the value projection or the up projection of a SwiGLU writes it, this is folded into
tensors of the checkpoint as they are read, and the model computes what it did. s is a power of two: nothing is rounded.
Knows which layers read what, and what they read in calibration (`calibrate.py`); no graphs, no files.
"""

import math
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray

from vlrt import config
from vlrt.checkpoint import Shape, expected_tensors
from vlrt.export import quantize, rounding, verify
from vlrt.export.calibrate import Seen

Floats = NDArray[np.float32]
Fetch = Callable[[str], Floats]

ALPHAS = (0.35, 0.5, 0.65, 0.8)  # how much of the difficulty goes to the weights
GAIN = 0.9  # of the error without it, below which smoothing is worth it
LARGEST_EXPONENT = 12  # of s: beyond, a channel that calibration hardly saw would decide
NUM_OUTPUTS = 64  # outputs of a layer that are simulated: each has its own scales, so they speak for the others
LIMITS: dict[rounding.Kind, float] = {  # of a layer's error: half of what the gate allows a whole model
    "int8": verify.ERROR_LIMITS["int8"] / 2,
    "int4": verify.ERROR_LIMITS["int4"] / 2,
}
KEPT_SHARE = 0.25  # of the weights at most: beyond, it is another precision that the model needs
NUM_NAMED = 8


@dataclass(frozen=True)
class Site:
    """An activation: the linear layers that read it, and what writes its channels where that can be scaled.

    Attributes:
        layers: names of the weights [out, in] that read it, all that do.
        source: tensors [rows, ...] whose rows write channels, a weight and perhaps its bias; (): none can be scaled.
        channels: [in], which row of the source writes each channel that is read; several may be written by one.
    """

    layers: tuple[str, ...]
    source: tuple[str, ...] = ()
    channels: NDArray[np.int64] = field(default_factory=lambda: np.zeros(0, np.int64))


@dataclass(frozen=True)
class Smoothing:
    """What calibration chose.

    Attributes:
        rows: what to divide the rows of a tensor by, by name; [rows].
        columns: what to multiply the columns of a weight by, by name; [in].
        kept: layers that are too bad to be rounded even so, the worst first, with their simulated relative errors.
    """

    rows: Mapping[str, Floats]
    columns: Mapping[str, Floats]
    kept: Mapping[str, float]

    def apply(self, fetch: Fetch) -> Fetch:
        """Return a `fetch` that hands out scaled tensors, one copy of what is asked for."""

        def scaled(name: str) -> Floats:
            tensor = fetch(name)
            if (rows := self.rows.get(name)) is not None:
                tensor = tensor / rows.reshape(-1, *[1] * (tensor.ndim - 1))
            if (columns := self.columns.get(name)) is not None:
                tensor = tensor * columns
            return tensor

        return scaled

    def describe(self) -> str:
        """Say which layers are kept."""
        named = [f"{name.removesuffix('.weight')} ({error:.2g})" for name, error in self.kept.items()]
        more = f" and {len(named) - NUM_NAMED} more" if len(named) > NUM_NAMED else ""
        return (
            f"layers that stay in fp32, since rounding would put their outputs off by these relative errors: "
            f"{', '.join(named[:NUM_NAMED])}{more}"
        )


NOTHING = Smoothing({}, {}, {})


def sites(cfg: config.Model) -> Iterator[Site]:
    """Yield every activation that quantised layers read."""
    yield from _vision_sites(cfg)
    yield from _decoder_sites(cfg)
    yield Site((quantize.HEAD,))  # of the final norm, which latents read too
    injection = cfg.latent.injection if cfg.latent is not None else "identity"
    if injection == "mlp":
        yield from (Site((f"latent_injection.{name}.weight",)) for name in ("fc1", "fc2"))
    elif injection == "mlp_xattn":
        yield Site(("latent_injection.k_proj.weight", "latent_injection.v_proj.weight"))


def _vision_sites(cfg: config.Model) -> Iterator[Site]:
    vision, tensors = cfg.vision, expected_tensors(cfg)

    def source(name: str) -> tuple[str, ...]:
        return tuple(full for part in ("weight", "bias") if (full := f"visual.{name}.{part}") in tensors)

    def layers(*names: str) -> tuple[str, ...]:
        return tuple(f"visual.{name}.weight" for name in names)

    channels = np.arange(vision.hidden_size)
    for block in (f"blocks.{i}." for i in range(vision.depth)):
        yield Site(layers(block + "attn.qkv"), source(block + "norm1"), channels)
        yield Site(layers(block + "attn.proj"), source(block + "attn.qkv"), 2 * vision.hidden_size + channels)
        gated = f"visual.{block}mlp.up_proj.weight" in tensors
        yield Site(
            layers(*(f"{block}mlp.{name}" for name in (("gate_proj", "up_proj") if gated else ("fc1",)))),
            source(block + "norm2"),
            channels,
        )
        if gated:
            inner = np.arange(vision.intermediate_size)
            yield Site(layers(block + "mlp.down_proj"), source(block + "mlp.up_proj"), inner)
        else:
            yield Site(layers(block + "mlp.fc2"))
    yield Site(layers("merger.mlp.0"), source("merger.ln_q"), np.tile(channels, vision.spatial_merge_size**2))
    yield Site(layers("merger.mlp.2"))


def _decoder_sites(cfg: config.Model) -> Iterator[Site]:
    decoder = cfg.decoder
    channels, inner = np.arange(decoder.hidden_size), np.arange(decoder.intermediate_size)
    kv_heads = np.arange(decoder.num_heads) // (decoder.num_heads // decoder.num_kv_heads)
    values = (kv_heads[:, None] * decoder.head_dim + np.arange(decoder.head_dim)).ravel()
    for layer in (f"model.layers.{i}." for i in range(decoder.num_layers)):
        attention, mlp = layer + "self_attn.", layer + "mlp."
        projections = tuple(f"{attention}{name}_proj.weight" for name in "qkv")
        yield Site(projections, (layer + "input_layernorm.weight",), channels)
        yield Site((attention + "o_proj.weight",), (projections[2], attention + "v_proj.bias"), values)
        gated = mlp + "gate_proj.weight", mlp + "up_proj.weight"
        yield Site(gated, (layer + "post_attention_layernorm.weight",), channels)
        yield Site((mlp + "down_proj.weight",), gated[1:], inner)


def choose(
    cfg: config.Model, seen: Mapping[str, Seen], fetch: Fetch, *, int4: bool, progress: Callable[[float], None]
) -> Smoothing:
    """Choose scales by the simulated errors of rounding, one weight in memory at a time.

    Args:
        cfg: of the model.
        seen: what each site's first layer read.
        fetch: tensors of the checkpoint by name.
        int4: layers of the decoder will be in int4, the others in int8; else all in int8.
        progress: told fractions of the work.
    """
    rows: dict[str, Floats] = {}
    columns: dict[str, Floats] = {}
    errors: dict[str, float] = {}
    random, todo, tensors = np.random.default_rng(0), list(sites(cfg)), expected_tensors(cfg)
    for done, site in enumerate(todo, 1):
        if site.layers[0] in seen:
            kind = _kind(site.layers[0], int4=int4)
            num_rows = tensors[site.source[0]][0] if site.source else 0
            scale, found = _choose(site, num_rows, seen[site.layers[0]], fetch, kind, random)
            errors |= dict(zip(site.layers, found, strict=True))
            if scale is not None:
                rows |= dict.fromkeys(site.source, scale)
                columns |= dict.fromkeys(site.layers, scale[site.channels])
        progress(done / len(todo))
    return Smoothing(rows, columns, _kept(errors, tensors, int4=int4))


def _kept(errors: Mapping[str, float], tensors: Mapping[str, Shape], *, int4: bool) -> dict[str, float]:
    """Return the layers whose errors are beyond the limit, the worst first, as many as KEPT_SHARE allows."""
    excess = {name: error / LIMITS[_kind(name, int4=int4)] for name, error in errors.items()}
    sizes = {name: math.prod(tensors.get(name, tensors["model.embed_tokens.weight"])) for name in errors}  # a tied head
    room, kept = KEPT_SHARE * sum(sizes.values()), {}
    for name in sorted(errors, key=excess.__getitem__, reverse=True):
        if excess[name] > 1 and sizes[name] <= room:
            room -= sizes[name]
            kept[name] = errors[name]
    return kept


def _kind(layer: str, *, int4: bool) -> rounding.Kind:
    return "int4" if int4 and layer.startswith(quantize.INT4_PREFIX) else "int8"


def _choose(
    site: Site, num_rows: int, seen: Seen, fetch: Fetch, kind: rounding.Kind, random: np.random.Generator
) -> tuple[Floats | None, list[float]]:
    """Return the scale of each row of a site's source, None: leave it as it is; and the errors of its layers then."""
    x, largest = seen.sample(), np.zeros(len(seen.largest), np.float32)
    weights = []
    for name in site.layers:
        weight = fetch(name)
        np.maximum(largest, np.maximum(weight.max(axis=0), -weight.min(axis=0)), out=largest)
        picked = random.choice(len(weight), min(NUM_OUTPUTS, len(weight)), replace=False)
        weights.append(weight[np.sort(picked)])
    alpha = _alpha(site, num_rows, x, weights, largest, kind)
    scale = None if alpha is None else scales(site.channels, num_rows, seen.largest.numpy(), largest, alpha)
    columns = None if scale is None else scale[site.channels]
    return scale, rounding.errors(x, weights, kind, columns)


def _alpha(
    site: Site, num_rows: int, x: Floats, weights: list[Floats], largest: Floats, kind: rounding.Kind
) -> float | None:
    """Return the best alpha; None: smoothing gains nothing. Scales of one half of the rows are tried on the other half.

    Tried on the rows that they were made of, they would seem to help where what is large is chance.
    """
    fit, held = np.abs(x[::2]).max(axis=0), x[1::2]
    if not site.source or not len(held):
        return None
    best, least = None, GAIN * float(np.mean(rounding.errors(held, weights, kind)))
    for alpha in ALPHAS:
        columns = scales(site.channels, num_rows, fit, largest, alpha)[site.channels]
        found = float(np.mean(rounding.errors(held, weights, kind, columns)))
        if found < least:
            best, least = alpha, found
    return best


def scales(channels: NDArray[np.int64], num_rows: int, x: Floats, weight: Floats, alpha: float) -> Floats:
    """Return `max|x|^alpha / max|weight|^(1 - alpha)` per row of a source, as powers of two around 1.

    Args:
        channels: [in], the row that writes each channel.
        num_rows: of the source.
        x: [in], largest magnitude of each channel.
        weight: [in], of each column of the weights that read it.
        alpha: 0 to 1.

    Returns:
        [num_rows]; 1 where a row writes no channel, or a channel or its column is zero.
    """
    both = np.zeros((2, num_rows), np.float32)
    np.maximum.at(both[0], channels, x)
    np.maximum.at(both[1], channels, weight)
    used = (both > 0).all(axis=0)
    scale = np.zeros(num_rows, np.float32)
    exponents = alpha * np.log2(both[0, used]) - (1 - alpha) * np.log2(both[1, used])
    if exponents.size:
        scale[used] = np.clip(np.rint(exponents - np.median(exponents)), -LARGEST_EXPONENT, LARGEST_EXPONENT)
    out: Floats = np.exp2(scale)
    return out
