"""What a training step computes: a batch in, the loss out, for each of the four systems.

One forward of `Trainee` is the whole step (rollout included), so that wrappers that shard or replicate a module see
every use of its weights. Knows the model and the objective; no files, no optimizer. Definitions: docs/latents.md.
"""

import contextlib
from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor, nn

from vlrt import config, positions
from vlrt.errors import ConfigError
from vlrt.models.decoder import FullAttention
from vlrt.models.registry import VideoLatent
from vlrt.train import objective, rollout
from vlrt.train.data import Batch
from vlrt.train.objective import Loss
from vlrt.train.settings import Settings


@dataclass(frozen=True)
class Draw:
    """What is drawn for one step.

    Attributes:
        rounds: R of a parallel rollout.
        hides_video: whether the answer may not look at the video.
        num_latents: L, which the batch is to have (`data.shorten`); None: as many as there are.
        rollout: how the latents come about; None: as the model's config says.
    """

    rounds: int
    hides_video: bool
    num_latents: int | None = None
    rollout: config.Rollout | None = None


class Step(NamedTuple):
    """What a forward pass found: the loss, and per sample [B] bool whether every token of its answer was likeliest."""

    loss: Loss
    right: Tensor


def draw(settings: Settings, plan: config.Latent | None, step: int) -> Draw:
    """Return what step `step` does; it depends on the seed and the step alone, so that a resumed run does the same."""
    if plan is None or settings.system != "latent":
        return Draw(1, False)
    random = np.random.default_rng([settings.seed, step])
    low = plan.rounds if settings.min_rounds is None else min(settings.min_rounds, plan.rounds)
    rounds = int(random.integers(low, plan.rounds + 1))
    hides_video = bool(random.random() < settings.objective.bottleneck)
    low = plan.num_latents if settings.min_latents is None else settings.min_latents
    num_latents = int(random.integers(low, plan.num_latents + 1))
    kinds = settings.rollouts or (plan.rollout,)
    return Draw(min(rounds, num_latents), hides_video, num_latents, kinds[int(random.integers(len(kinds)))])


def check(settings: Settings, plan: config.Latent | None) -> None:
    """Refuse ranges that the latents of a model do not have.

    Raises:
        ConfigError: more latents or rounds than the model's, or a parallel rollout without queries.
    """
    if plan is None or settings.system != "latent":
        return
    for name, most in (("min_latents", plan.num_latents), ("min_rounds", plan.rounds)):
        given = getattr(settings, name)
        if given is not None and given > most:
            raise ConfigError(f"{name} is {given}; accepted: at most the model's {most}")
    if "parallel" in (settings.rollouts or ()) and plan.rollout != "parallel":
        raise ConfigError("rollouts names 'parallel', but the model has no queries for it; accepted: 'recurrent'")


class Trainee(nn.Module):
    """A model under training."""

    def __init__(self, model: VideoLatent, settings: Settings) -> None:
        super().__init__()
        self.model = model
        self.settings = settings
        self.cfg = model.cfg
        self._kept: dict[int, Tensor] = {}  # video tokens by row, where the tower is frozen

    def forward(self, batch: Batch, drawn: Draw, aims: Tensor | None = None) -> Step:
        """Return the loss of a batch, see `objective`, and which answers the model would have given.

        Args:
            batch: of the system that is trained.
            drawn: of this step.
            aims: [B, L, C], what the latents are aligned with; None: the parts of the video.
        """
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
        prompts = (batch.at, batch.prompt_lengths, batch.next_positions)
        with self._rolling_out(learns=self.settings.objective.bptt == "full"):
            latents = self._roll_out(embeds, *prompts, pooled, batch.slots.shape[1], drawn)
        hidden = self._run(embeds.index_put((rows, slots), latents.to(embeds.dtype)), attend)
        again = rollout.inject(self.model, hidden[rows, slots - 1], self._memories(pooled))
        if self.settings.objective.bptt == "1":
            hidden = self._run(embeds.index_put((rows, slots), again.to(embeds.dtype)), attend)
        if aims is None:
            aims = torch.stack([self._aims(batch, i, tokens[i]) for i in range(len(tokens))])
        ce, right = self._predict(batch, hidden)
        return Step(objective.combine(ce, again, aims, self._weights()), right)

    def roll_out_told(self, batch: Batch, drawn: Draw) -> Tensor:
        """Return the latents [B, L, C] of prompts that tell the answer: what a teacher with these weights aims at."""
        with self._rolling_out(learns=False):
            tokens = self._video_tokens(batch)
            embeds = self._embed(replace(batch, ids=batch.told_ids), tokens)  # the video stands where it stands untold
            prompts = (batch.told_at, batch.told_lengths, batch.told_next)
            return self._roll_out(embeds, *prompts, self._pooled(batch, tokens), batch.slots.shape[1], drawn)

    @contextlib.contextmanager
    def _rolling_out(self, *, learns: bool) -> Iterator[None]:
        """Do as at inference, without gradient and dropout; or, where it learns, as in the rest of the step."""
        training = self.training
        self.train(training and learns)
        try:
            with torch.set_grad_enabled(learns and torch.is_grad_enabled()):
                yield
        finally:
            self.train(training)

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
        sample, place = wanted.nonzero(as_tuple=True)
        wrong = wrong * (place + 1 >= batch.answer[sample, 0])  # the end of the latents is no part of the answer
        per_sample = torch.zeros(len(labels), device=wrong.device).index_add(0, sample, wrong)
        return objective.cross_entropy(logits, labels[wanted]), per_sample == 0

    def _embed(self, batch: Batch, tokens: list[Tensor]) -> Tensor:
        """Look ids up and put the video tokens in their places: [B, S, C]."""
        embeds: Tensor = self.model.model.embed_tokens(batch.ids)
        steps = torch.arange(batch.ids.shape[1], device=batch.ids.device)
        inside = (steps >= batch.video[:, :1]) & (steps < batch.video[:, 1:])
        return embeds.masked_scatter(inside[..., None], torch.cat(tokens).to(embeds.dtype))

    def _video_tokens(self, batch: Batch) -> list[Tensor]:
        """Return each sample's video tokens [N_v, C]; of a frozen tower they are computed once per row.

        A tower that learns runs once for the whole batch: where it is divided over processes, all must call it equally
        often, and the last batches of an evaluation differ in size.
        """
        pixels = batch.pixels.split(batch.grid_thw.prod(dim=1).tolist())
        grids = [(t, h, w) for t, h, w in batch.grid_thw.tolist()]
        if self.settings.train_vision:
            return self._encode(list(pixels), grids)
        for row, patches, grid in zip(batch.rows, pixels, grids, strict=True):
            if row.number not in self._kept:
                with torch.no_grad():
                    (self._kept[row.number],) = self._encode([patches], [grid])
        return [self._kept[row.number] for row in batch.rows]

    def _encode(self, pixels: list[Tensor], grids: list[tuple[int, int, int]]) -> list[Tensor]:
        """Run the tower over some videos at once; each attends to itself alone.

        In fp32 whatever the precision: tokens of a frozen tower are computed once and serve the whole run.
        """
        vision = self.cfg.vision
        rotary = [positions.vision_cos_sin(grid, vision) for grid in grids]
        inputs: list[Any] = [np.concatenate(part) for part in zip(*rotary, strict=True)]
        inputs.append(_chain([positions.frame_seqlens(grid) for grid in grids]))
        sizes = [len(patches) // vision.spatial_merge_size**2 for patches in pixels]
        if vision.window_size:
            found = [positions.window_index(grid, vision) for grid in grids]
            first = np.cumsum([0, *sizes[:-1]])
            order = np.concatenate([order + start for (order, _), start in zip(found, first, strict=True)])
            inputs += [order, np.argsort(order), _chain([bounds for _, bounds in found])]
        device = pixels[0].device
        with torch.autocast(device.type, enabled=False):
            tokens: Tensor = self.model.visual(torch.cat(pixels), *(torch.from_numpy(x).to(device) for x in inputs))
        return list(tokens.split(sizes))

    def _pooled(self, batch: Batch, tokens: list[Tensor]) -> list[Tensor] | None:
        """Return each sample's video tokens, mean-pooled over space [T, C], where the injection looks at them."""
        injection = self.model.latent_injection
        if injection is None or not injection.looks_at_video:
            return None
        lengths = batch.grid_thw[:, 0].tolist()
        return [t.view(length, -1, t.shape[-1]).mean(1) for t, length in zip(tokens, lengths, strict=True)]

    def _memories(self, pooled: list[Tensor] | None) -> list[tuple[Tensor, Tensor]] | None:
        return None if pooled is None else rollout.memories(self.model, pooled)

    def _roll_out(
        self,
        embeds: Tensor,
        at: Tensor,
        lengths: Tensor,
        next_positions: Tensor,
        pooled: list[Tensor] | None,
        num_latents: int,
        drawn: Draw,
    ) -> Tensor:
        """Return what inference would put into the slots after prompts of some lengths: [B, L, C]."""
        assert self.cfg.latent is not None
        longest = int(lengths.max())
        steps = rollout.BatchSteps(
            self.model, embeds[:, :longest], at[:, :, :longest], lengths.tolist(), next_positions.tolist(), pooled
        )
        kind = drawn.rollout or self.cfg.latent.rollout
        plan = replace(self.cfg.latent, num_latents=num_latents, rounds=drawn.rounds, rollout=kind)
        return rollout.roll_out(self.model, steps, plan)

    def _aims(self, batch: Batch, index: int, tokens: Tensor) -> Tensor:
        start, stop = batch.question[index].tolist()
        question = self.model.model.embed_tokens(batch.ids[index, start:stop])
        uniform = self.settings.objective.uniform_targets
        return objective.targets(tokens, None if uniform else question, batch.slots.shape[1])


def _chain(bounds: list[Any]) -> Any:
    """Join the bounds of segments [n + 1], each from 0 on, of arrays that stand one behind the other."""
    ends = np.cumsum([0, *(b[-1] for b in bounds)])
    parts = [b[1:] + start for b, start in zip(bounds, ends, strict=False)]
    return np.concatenate([bounds[0][:1], *parts]).astype(bounds[0].dtype)


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
