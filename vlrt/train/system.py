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
from vlrt.train.token_cache import Encoded, TokenCache


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
    """A model under training.

    Args:
        model: the model.
        settings: of the run.
        tokens: keeps what a frozen vision tower makes of videos; None: nothing is kept.
    """

    def __init__(self, model: VideoLatent, settings: Settings, tokens: TokenCache | None = None) -> None:
        super().__init__()
        self.model = model
        self.settings = settings
        self.cfg = model.cfg
        self._tokens = tokens

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
            latents, ended, steps = self._roll_out(embeds, *prompts, pooled, batch.slots.shape[1], drawn)
        if aims is None:
            aims = torch.stack([self._aims(batch, i, tokens[i]) for i in range(len(tokens))])
        if self.settings.objective.bptt == "full" and self._foresees(drawn, batch.slots.shape[1]):
            again, hidden = latents, self._go_on(batch, embeds, ended, steps, hides_video=drawn.hides_video)
        else:
            hidden = self._run(embeds.index_put((rows, slots), latents.to(embeds.dtype)), attend)
            again = rollout.inject(self.model, hidden[rows, slots - 1], self._memories(pooled))
        if self.settings.objective.bptt == "1":
            hidden = self._run(embeds.index_put((rows, slots), again.to(embeds.dtype)), attend)
        ce, right = self._predict(batch, hidden)
        return Step(objective.combine(ce, again, aims, self._weights()), right)

    def roll_out_told(self, batch: Batch, drawn: Draw) -> Tensor:
        """Return the latents [B, L, C] of prompts that tell the answer: what a teacher with these weights aims at."""
        with self._rolling_out(learns=False):
            tokens = self._video_tokens(batch)
            embeds = self._embed(replace(batch, ids=batch.told_ids), tokens)  # the video stands where it stands untold
            prompts = (batch.told_at, batch.told_lengths, batch.told_next)
            return self._roll_out(embeds, *prompts, self._pooled(batch, tokens), batch.slots.shape[1], drawn)[0]

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
        """Return each sample's video tokens [N_v, C]; what a frozen tower makes of a video is kept.

        A tower that learns runs once for the whole batch: where it is divided over processes, all must call it equally
        often, and the last batches of an evaluation differ in size.
        """
        num_patches = batch.grid_thw.prod(dim=1)
        pixels = batch.pixels.split(num_patches[~batch.encoded].tolist())
        grids = [(t, h, w) for t, h, w in batch.grid_thw[~batch.encoded].tolist()]
        if self.settings.train_vision:
            return self._encode(list(pixels), grids)
        sizes = num_patches[batch.encoded] // self.cfg.vision.spatial_merge_size**2
        kept, encoded = iter(batch.tokens.split(sizes.tolist())), batch.encoded.tolist()
        with torch.no_grad():  # each by itself: what it becomes must not depend on what it is encoded beside
            new = iter([self._encode([pixels[i]], [grid])[0] for i, grid in enumerate(grids)])
        tokens = [next(kept if known else new) for known in encoded]
        if self._tokens is not None:
            for i, known in enumerate(encoded):
                if not known:
                    seconds, is_image = float(batch.seconds_per_temporal_patch[i]), bool(batch.is_image[i])
                    t, h, w = batch.grid_thw[i].tolist()
                    self._tokens.store(batch.rows[i].video, Encoded(tokens[i], (t, h, w), seconds, is_image))
        return tokens

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

    def _memories(self, pooled: list[Tensor] | None) -> list[rollout.Memory] | None:
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
    ) -> tuple[Tensor, Tensor, rollout.BatchSteps]:
        """Return what inference would put into the slots after prompts, [B, L, C], states of the end, the sequences."""
        assert self.cfg.latent is not None
        longest = int(lengths.max())
        steps = rollout.BatchSteps(
            self.model, embeds[:, :longest], at[:, :, :longest], lengths.tolist(), next_positions.tolist(), pooled
        )
        kind = drawn.rollout or self.cfg.latent.rollout
        plan = replace(self.cfg.latent, num_latents=num_latents, rounds=drawn.rounds, rollout=kind)
        return *rollout.roll_out(self.model, steps, plan), steps

    def _foresees(self, drawn: Draw, num_latents: int) -> bool:
        """Whether a pass over the whole sequence would predict, at each slot, the latent that is in it.

        Not after fewer rounds than latents: those of later slots are not exact yet. And a predicted end needs the pass.
        """
        plan = self.cfg.latent
        assert plan is not None
        is_exact = (drawn.rollout or plan.rollout) == "recurrent" or drawn.rounds >= num_latents
        return is_exact and plan.stop == "fixed"

    def _go_on(
        self, batch: Batch, embeds: Tensor, ended: Tensor, steps: rollout.BatchSteps, *, hides_video: bool
    ) -> Tensor:
        """Return the states [B, S, C] of what follows the latents, fed behind a rollout that carries gradient.

        What a pass over the whole sequence would repeat, latents included, is in the rollout's cache already. States of
        other positions are 0: none of them predicts.
        """
        start, size = batch.answer[:, :1] - 1, batch.ids.shape[1]
        at = start + torch.arange(int((batch.lengths[:, None] - 1 - start).max()), device=start.device)
        rows = torch.arange(len(at), device=at.device)[:, None]
        places = torch.arange(size, device=at.device)
        is_video = (places >= batch.video[:, :1]) & (places < batch.video[:, 1:]) if hides_video else None
        steps.rewind(1)  # the end token, which may see what the rest of the answer may see
        longest = int(batch.prompt_lengths.max())
        fed = embeds[rows, at.clamp(max=size - 1)].transpose(0, 1)
        found = steps.feed(fed, None if is_video is None else is_video[:, :longest]).transpose(0, 1)
        found = found + 0 * ended  # its keys are used: FSDP gathers weights where states have gradient
        inside = at < batch.lengths[:, None]
        return found.new_zeros(embeds.shape).index_put((rows.expand_as(at)[inside], at[inside]), found[inside])

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
