"""The latent plan: how the vectors at the latent slots come about, whatever runs the model.

Written once against `Steps`, for arrays of any library: the runtime and training's rollout both run this code.
Definitions: docs/latents.md. Knows no kernel, no token and no position.
"""

from collections.abc import Callable
from typing import Any, Literal, Protocol

import numpy as np
from numpy.typing import NDArray

from vlrt import config
from vlrt.errors import ConfigError

Array = Any  # NumPy or torch, [rows, C]
Floats = NDArray[np.float32]
Ablation = Literal["dummy", "noise", "shuffled"]
ABLATIONS: tuple[Ablation, ...] = ("dummy", "noise", "shuffled")


class Steps(Protocol):
    """What a rollout needs of a model that has read the prompt up to the start token."""

    def feed(self, embeds: Array) -> Array:
        """Append embeds [S, C] at the next text positions; return their hidden states [S, C]."""

    def rewind(self, count: int) -> None:
        """Take the last `count` positions back."""

    def inject(self, hidden: Array) -> Array:
        """Map hidden states [L, C] to latents [L, C]."""

    def join(self, parts: list[Array]) -> Array:
        """Concatenate rows."""


def roll_out(
    plan: config.Latent,
    steps: Steps,
    start_hidden: Array,
    end_embed: Array,
    queries: Array | None = None,
    ends: Callable[[Array], bool] | None = None,
    certain: Callable[[Array], bool] | None = None,
) -> tuple[Array, Array]:
    """Produce the latents and feed the end token after them.

    recurrent: z_1 = g(h_start), z_{k+1} = g(h_k); one pass per latent, the last pass feeding [z_L, E(end)].
    parallel: R times, feed all slots (at first the queries) on the same prefix, take them back, and set
    z_k = g(h_{k-1}), h_0 being h_start; then feed [z_1 .. z_L, E(end)]. After pass r the first r are exact, so that
    R = L equals recurrent.

    Args:
        plan: the rollout, L and R.
        steps: the model at hand.
        start_hidden: [1, C], hidden state of the start token.
        end_embed: [1, C], embedding of the end token.
        queries: [L, C], learned, for parallel.
        ends: for the stop rule "end_token": whether a hidden state [1, C] predicts the end token.
        certain: whether no more latents are needed, given the hidden state [1, C] that the end token would have now.
            It is asked after each latent, or round, but the last, at the price of one more row in the pass that feeds
            them, and leaves the sequence as it was. Stopping after k latents equals a plan of k latents, stopping after
            r rounds one of r rounds.

    Returns:
        latents [L, C] (fewer where the model ended early), and the hidden state [1, C] of the end token.
    """
    if plan.rollout == "parallel":
        if queries is None:
            raise ConfigError("the parallel rollout needs learned queries, and this checkpoint has none")
        latents = queries
        for done in range(plan.rounds):
            asks = certain is not None and done > 0
            hidden = steps.feed(steps.join([latents, end_embed]) if asks else latents)
            if certain is not None and asks and certain(hidden[-1:]):
                return latents, hidden[-1:]
            steps.rewind(len(hidden))
            hidden = hidden[: plan.num_latents]
            latents = steps.inject(steps.join([start_hidden, hidden[:-1]]))
        return latents, feed_given(steps, latents, end_embed)

    found: list[Array] = []
    hidden = start_hidden
    while True:
        found.append(steps.inject(hidden))
        if len(found) == plan.num_latents:
            return steps.join(found), steps.feed(steps.join([found[-1], end_embed]))[-1:]
        if certain is None:
            hidden = steps.feed(found[-1])
        else:
            hidden = steps.feed(steps.join([found[-1], end_embed]))
            if certain(hidden[-1:]):
                return steps.join(found), hidden[-1:]
            steps.rewind(1)
            hidden = hidden[:-1]
        if plan.stop == "end_token" and ends is not None and ends(hidden):
            return steps.join(found), steps.feed(end_embed)


def feed_given(steps: Steps, latents: Array, end_embed: Array) -> Array:
    """Feed latents [L, C], L >= 0, that are already known, and the end token; return its hidden state [1, C]."""
    return steps.feed(steps.join([latents, end_embed]))[-1:]


def ablate(
    kind: Ablation,
    own: Floats,
    *,
    pad_embed: Floats | None = None,
    other: Floats | None = None,
    seed: int = 0,
) -> Floats:
    """Return what an ablation puts in place of a sample's own latents, [L, C] float32.

    Args:
        kind: dummy (the pad token's embedding in every slot), noise (normal vectors with the norms of the own latents),
            shuffled (another sample's latents).
        own: [L, C], the sample's own latents.
        pad_embed: [1, C], for dummy.
        other: [L, C], for shuffled.
        seed: of the noise.

    Raises:
        ConfigError: the kind is unknown, or what it needs was not given or has another shape.
    """
    if kind == "noise":
        noise = np.random.default_rng(seed).standard_normal(own.shape).astype(np.float32)
        norms = np.linalg.norm(own, axis=-1, keepdims=True) / np.linalg.norm(noise, axis=-1, keepdims=True)
        scaled: Floats = noise * norms
        return scaled
    if kind == "dummy" and pad_embed is not None:
        return np.repeat(pad_embed, len(own), axis=0)
    if kind == "shuffled" and other is not None:
        if other.shape != own.shape:
            raise ConfigError(
                f"the other sample's latents are {other.shape}; accepted: {own.shape}, as the sample's own"
            )
        return other
    raise ConfigError(f"ablation {kind!r} is unknown or lacks what it needs; accepted: {', '.join(ABLATIONS)}")
