"""What a training step computes: a batch in, the loss out, for each of the four systems.

One forward of `Trainee` is the whole step (rollout included), so that wrappers that shard or replicate a module see
every use of its weights. Knows the model and the objective; no files, no optimizer. Definitions: docs/latents.md.
"""

from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from vlrt import config, positions
from vlrt.models.decoder import FullAttention
from vlrt.models.registry import VideoLatent
from vlrt.train import objective, rollout
from vlrt.train.data import Batch
from vlrt.train.objective import Loss
from vlrt.train.settings import Settings


@dataclass(frozen=True)
class Draw:
    """What is drawn for one step: the rounds of a parallel rollout, and whether the answer may look at the video."""

    rounds: int
    hides_video: bool


@dataclass(frozen=True)
class Step:
    """What a forward pass found: the loss, and per sample [B] bool whether every token of its answer was likeliest."""

    loss: Loss
    right: Tensor


def draw(settings: Settings, plan: config.Latent | None, step: int) -> Draw:
    """Return what step `step` does; it depends on the seed and the step alone, so that a resumed run does the same."""
    if plan is None or settings.system != "latent":
        return Draw(1, False)
    random = np.random.default_rng([settings.seed, step])
    low = plan.rounds if settings.min_rounds is None else min(settings.min_rounds, plan.rounds)
    return Draw(int(random.integers(low, plan.rounds + 1)), bool(random.random() < settings.objective.bottleneck))


class Trainee(nn.Module):
    """A model under training."""

    def __init__(self, model: VideoLatent, settings: Settings) -> None:
        super().__init__()
        self.model = model
        self.settings = settings
        self.cfg = model.cfg
        self._kept: dict[int, Tensor] = {}  # video tokens by row, where the tower is frozen

    def forward(self, batch: Batch, drawn: Draw) -> Step:
        """Return the loss of a batch, see `objective`, and which answers the model would have given."""
        tokens = self._video_tokens(batch)
        embeds = self._embed(batch, tokens)
        attend = FullAttention(
            *rollout.cos_sin(batch.at, self.cfg.decoder, embeds), attention_mask(batch, hides_video=drawn.hides_video)
        )
        if self.settings.system != "latent":
            ce, right = self._predict(batch, self._run(embeds, attend))
            return Step(objective.combine(ce, None, None, self._weights()), right)
        pooled = self._pooled(batch, tokens)
        rows, slots = torch.arange(len(batch.ids))[:, None], batch.slots
        with torch.set_grad_enabled(self.settings.objective.bptt == "full"):
            latents = self._roll_out(batch, embeds, pooled, drawn)
        hidden = self._run(embeds.index_put((rows, slots), latents.to(embeds.dtype)), attend)
        again = rollout.inject(self.model, hidden[rows, slots - 1], self._memories(pooled))
        if self.settings.objective.bptt == "1":
            hidden = self._run(embeds.index_put((rows, slots), again.to(embeds.dtype)), attend)
        aims = torch.stack([self._aims(batch, i, tokens[i]) for i in range(len(tokens))])
        ce, right = self._predict(batch, hidden)
        return Step(objective.combine(ce, again, aims, self._weights()), right)

    def _weights(self) -> objective.Weights:
        return objective.Weights(self.settings.objective.alignment, self.settings.objective.diversity)

    def _run(self, embeds: Tensor, attend: FullAttention) -> Tensor:
        hidden: Tensor = self.model.model(embeds, attend)
        return hidden

    def _predict(self, batch: Batch, hidden: Tensor) -> tuple[Tensor, Tensor]:
        """The state before each labelled token predicts it, and the head runs for those alone: loss, right [B]."""
        labels = batch.labels[:, 1:]
        wanted = labels != objective.IGNORED
        logits = self.model.lm_head(hidden[:, :-1][wanted])
        wrong = (logits.argmax(-1) != labels[wanted]).float()
        per_sample = torch.zeros(len(labels), device=wrong.device).index_add(0, wanted.nonzero()[:, 0], wrong)
        return objective.cross_entropy(logits, labels[wanted]), per_sample == 0

    def _embed(self, batch: Batch, tokens: list[Tensor]) -> Tensor:
        """Look ids up and put the video tokens in their places: [B, S, C]."""
        embeds: Tensor = self.model.model.embed_tokens(batch.ids)
        steps = torch.arange(batch.ids.shape[1], device=batch.ids.device)
        inside = (steps >= batch.video[:, :1]) & (steps < batch.video[:, 1:])
        return embeds.masked_scatter(inside[..., None], torch.cat(tokens).to(embeds.dtype))

    def _video_tokens(self, batch: Batch) -> list[Tensor]:
        """Return each sample's video tokens [N_v, C]; of a frozen tower they are computed once per row."""
        sizes = batch.grid_thw.prod(dim=1).tolist()
        pixels = batch.pixels.split(sizes)
        return [self._encode(row.number, p, g) for row, p, g in zip(batch.rows, pixels, batch.grid_thw, strict=True)]

    def _encode(self, row: int, pixels: Tensor, grid_thw: Tensor) -> Tensor:
        if row in self._kept:
            return self._kept[row]
        vision, (t, h, w) = self.cfg.vision, (int(n) for n in grid_thw)
        grid = (t, h, w)
        inputs: list[Any] = [*positions.vision_cos_sin(grid, vision), positions.frame_seqlens(grid)]
        if vision.window_size:
            order, bounds = positions.window_index(grid, vision)
            inputs += [order, np.argsort(order), bounds]
        with torch.set_grad_enabled(self.settings.train_vision and torch.is_grad_enabled()):
            tokens: Tensor = self.model.visual(pixels, *(torch.from_numpy(x).to(pixels.device) for x in inputs))
        if not self.settings.train_vision:
            self._kept[row] = tokens
        return tokens

    def _pooled(self, batch: Batch, tokens: list[Tensor]) -> list[Tensor] | None:
        """Return each sample's video tokens, mean-pooled over space [T, C], where the injection looks at them."""
        injection = self.model.latent_injection
        if injection is None or not injection.looks_at_video:
            return None
        lengths = batch.grid_thw[:, 0].tolist()
        return [t.view(length, -1, t.shape[-1]).mean(1) for t, length in zip(tokens, lengths, strict=True)]

    def _memories(self, pooled: list[Tensor] | None) -> list[tuple[Tensor, Tensor]] | None:
        assert self.model.latent_injection is not None
        return None if pooled is None else [self.model.latent_injection.memory(p[None]) for p in pooled]

    def _roll_out(self, batch: Batch, embeds: Tensor, pooled: list[Tensor] | None, drawn: Draw) -> Tensor:
        """Return what inference would put into the slots: [B, L, C]."""
        assert self.cfg.latent is not None
        longest = int(batch.prompt_lengths.max())
        steps = rollout.BatchSteps(
            self.model,
            embeds[:, :longest],
            batch.at[:, :, :longest],
            batch.prompt_lengths.tolist(),
            batch.next_positions.tolist(),
            pooled,
        )
        return rollout.roll_out(self.model, steps, replace(self.cfg.latent, rounds=drawn.rounds))

    def _aims(self, batch: Batch, index: int, tokens: Tensor) -> Tensor:
        assert self.cfg.latent is not None
        start, stop = batch.question[index].tolist()
        question = self.model.model.embed_tokens(batch.ids[index, start:stop])
        uniform = self.settings.objective.uniform_targets
        return objective.targets(tokens, None if uniform else question, self.cfg.latent.num_latents)


def attention_mask(batch: Batch, *, hides_video: bool) -> Tensor:
    """Return who may look where, [B, 1, S, S] bool: backwards, not at padding; `hides_video` is the bottleneck.

    Under the bottleneck the tokens that predict the answer, from the one before its first on, do not see the video's
    tokens, so that what they need must come through latents and text. Nothing else changes.
    """
    size = batch.ids.shape[1]
    steps = torch.arange(size, device=batch.ids.device)
    mask = (steps <= steps[:, None]) & batch.valid[:, None]
    if hides_video:
        predicts = steps >= batch.answer[:, :1] - 1
        is_video = (steps >= batch.video[:, :1]) & (steps < batch.video[:, 1:])
        mask &= ~(predicts[:, :, None] & is_video[:, None])
    return mask[:, None]
