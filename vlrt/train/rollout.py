"""The rollout of a batch during training: the inference code (`vlrt.latent`) over a model in torch.

Arrays that `latent.roll_out` sees as rows are [rows, B, C] here, so that it runs for a whole batch at once. Knows the
model and masks; no data, no loss.
"""

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor, nn

from vlrt import config, latent, ops, positions
from vlrt.models.registry import VideoLatent


class GrowingAttention:
    """Attention over all that was fed so far, differentiable; see `models.decoder.Attend`.

    Prompts of a batch are padded on the right, so a slot that is padding for one sample is masked for it for good.
    """

    def __init__(self, num_layers: int) -> None:
        self.keys: list[Tensor | None] = [None] * num_layers
        self.values: list[Tensor | None] = [None] * num_layers
        self.cos = self.sin = self.mask = torch.empty(0)

    def __call__(self, layer: int, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        """See `models.decoder.Attend`."""
        q, k = ops.rotary(q, self.cos, self.sin), ops.rotary(k, self.cos, self.sin)
        old_k, old_v = self.keys[layer], self.values[layer]
        if old_k is not None and old_v is not None:
            k, v = torch.cat([old_k, k], dim=1), torch.cat([old_v, v], dim=1)
        self.keys[layer], self.values[layer] = k, v
        out = nn.functional.scaled_dot_product_attention(
            q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2), attn_mask=self.mask, enable_gqa=True
        )
        return out.transpose(1, 2)

    def trim(self, count: int) -> None:
        """Forget the last `count` slots."""
        self.keys = [None if k is None else k[:, : k.shape[1] - count] for k in self.keys]
        self.values = [None if v is None else v[:, : v.shape[1] - count] for v in self.values]


class BatchSteps:
    """A batch of sequences under way; the `latent.Steps` of training.

    Args:
        model: the whole model.
        embeds: [B, S, C], embedded prompts, start token included, padded on the right.
        at: [B, 3, S] int64, M-RoPE positions.
        lengths: tokens of each prompt.
        next_positions: position of the text token after each prompt.
        pooled: per sample [T_v, C], the video tokens pooled over space; None where the injection does not look at them.
    """

    def __init__(
        self,
        model: VideoLatent,
        embeds: Tensor,
        at: Tensor,
        lengths: Sequence[int],
        next_positions: Sequence[int],
        pooled: Sequence[Tensor] | None,
    ) -> None:
        self._model = model
        self._decoder = model.cfg.decoder
        self._attend = GrowingAttention(self._decoder.num_layers)
        self._memories = None if pooled is None else memories(model, pooled)
        size = embeds.shape[1]
        steps = torch.arange(size, device=embeds.device)
        self._valid = steps < torch.tensor(lengths, device=embeds.device)[:, None]  # [B, slots]
        self._next = torch.tensor(next_positions, device=embeds.device)
        causal = steps <= steps[:, None]
        hidden = self._run(embeds, at, causal & self._valid[:, None])
        last = torch.tensor(lengths, device=embeds.device) - 1
        self.start_hidden = hidden[torch.arange(len(lengths), device=embeds.device), last][None]  # [1, B, C]

    def feed(self, embeds: Tensor, hidden_slots: Tensor | None = None) -> Tensor:
        """Append embeds [rows, B, C] at each sample's next text positions; return hidden states [rows, B, C].

        `hidden_slots` [B, S], S at most the prompts' length, are True where these rows may not look.
        """
        rows, batch = embeds.shape[:2]
        steps = torch.arange(rows, device=embeds.device)
        at = (self._next[:, None] + steps)[:, None].expand(batch, 3, rows)
        seen = self._valid
        if hidden_slots is not None:
            seen = seen.clone()
            seen[:, : hidden_slots.shape[1]] &= ~hidden_slots
        old = seen[:, None].expand(batch, rows, -1)
        new = (steps <= steps[:, None]).expand(batch, rows, rows)
        hidden = self._run(embeds.transpose(0, 1), at, torch.cat([old, new], dim=-1))
        self._valid = torch.cat([self._valid, self._valid.new_ones(batch, rows)], dim=1)
        self._next = self._next + rows
        return hidden.transpose(0, 1)

    def rewind(self, count: int) -> None:
        """Take the last `count` positions back."""
        self._attend.trim(count)
        self._valid = self._valid[:, : self._valid.shape[1] - count]
        self._next = self._next - count

    def inject(self, hidden: Tensor) -> Tensor:
        """Map hidden states [L, B, C] to latents [L, B, C]."""
        return inject(self._model, hidden.transpose(0, 1), self._memories).transpose(0, 1)

    def join(self, parts: list[Tensor]) -> Tensor:
        """Concatenate rows."""
        return torch.cat(parts)

    def _run(self, embeds: Tensor, at: Tensor, mask: Tensor) -> Tensor:
        self._attend.cos, self._attend.sin = cos_sin(at, self._decoder, embeds)
        self._attend.mask = mask[:, None]
        hidden: Tensor = self._model.model(embeds, self._attend)
        return hidden


class Memory(NamedTuple):
    """What the injection looks up of the videos of equal length in a batch.

    Attributes:
        samples: [G] int64, which samples of the batch they are.
        keys: [G, T, C].
        values: [G, T, C].
    """

    samples: Tensor
    keys: Tensor
    values: Tensor


def memories(model: VideoLatent, pooled: Sequence[Tensor]) -> list[Memory]:
    """Return what the injection looks up of each sample's video, pooled over space [T_v, C], by length."""
    injection = model.latent_injection
    assert injection is not None
    by_length: dict[int, list[int]] = {}
    for sample, tokens in enumerate(pooled):
        by_length.setdefault(len(tokens), []).append(sample)
    with torch.autocast(pooled[0].device.type, enabled=False):
        return [
            Memory(
                torch.tensor(group, device=pooled[0].device), *injection.memory(torch.stack([pooled[i] for i in group]))
            )
            for group in by_length.values()
        ]


def inject(model: VideoLatent, hidden: Tensor, memories: Sequence[Memory] | None) -> Tensor:
    """Map hidden states [B, L, C] to latents [B, L, C].

    In the dtype of the weights, whatever the precision: the module is small, and its backward recomputes it.
    """
    injection = model.latent_injection
    assert injection is not None
    with torch.autocast(hidden.device.type, enabled=False):
        hidden = hidden.to(model.model.norm.weight.dtype)
        if memories is None:
            out: Tensor = injection(hidden)
            return out
        parts = [injection(hidden[memory.samples], (memory.keys, memory.values)) for memory in memories]
        return torch.cat(parts)[torch.cat([memory.samples for memory in memories]).argsort()]


def roll_out(model: VideoLatent, steps: BatchSteps, plan: config.Latent) -> tuple[Tensor, Tensor]:
    """Return the latents [B, L, C] that the model makes of its prompts, and the states of the end token [B, 1, C].

    Wrap in `torch.no_grad()` for targets of self-forcing. The stop rule is not followed: all samples have L slots.
    """
    queries = None
    if plan.rollout == "parallel":
        assert model.latent_injection is not None
        queries = model.latent_injection.queries[: plan.num_latents, None].expand(-1, len(steps.start_hidden[0]), -1)
    end = model.model.embed_tokens.weight[plan.end_token_id].expand(1, len(steps.start_hidden[0]), -1)
    latents, ended = latent.roll_out(plan, steps, steps.start_hidden, end, queries)
    return latents.transpose(0, 1), ended.transpose(0, 1)


def cos_sin(at: Tensor, decoder: config.Decoder, like: Tensor) -> tuple[Tensor, Tensor]:
    """Return rotary tables [B, S, D/2] for M-RoPE positions [B, 3, S], in the dtype and on the device of `like`."""
    batch, _, size = at.shape
    flat = np.ascontiguousarray(at.permute(1, 0, 2).reshape(3, -1).cpu().numpy())
    cos, sin = (torch.from_numpy(t).view(batch, size, -1).to(like) for t in positions.mrope_cos_sin(flat, decoder))
    return cos, sin
