"""The stages of a checkpoint in PyTorch on the CPU: the reference that exports and tests are held against.

Runs models/ in fp32, either whole or layer by layer with one layer's weights in memory at a time.
"""

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from vlrt import positions
from vlrt.backends.base import Floats, Ids
from vlrt.backends.greedy import HostWords
from vlrt.checkpoint import Checkpoint
from vlrt.kv_cache import KVCache
from vlrt.memory_plan import Shape
from vlrt.models import registry
from vlrt.models.decoder import CachedAttention


class ReferenceBackend:
    """See `base.Backend`. Arrays are torch tensors.

    Args:
        checkpoint: an opened checkpoint.
        streamed: hold the weights of one layer at a time, fetched anew at every pass; else all of them, in fp32.
    """

    prefill_chunk, vision_chunk, has_lanes, keeps_spare = 512, 4096, False, False

    def __init__(self, checkpoint: Checkpoint, *, streamed: bool = False) -> None:
        self.model = checkpoint.model
        self._fetch = checkpoint.weight
        self._module = registry.build(self.model)
        if streamed:
            registry.stream(self._module, self._fetch)
        else:
            registry.load(self._module, self._fetch)
        self._table = self._fetch("model.embed_tokens.weight")

    def watch(self, see: Callable[[str, Tensor], None]) -> None:
        """From now on tell `see` what each linear layer reads: the name of its weight, and its input [..., C]."""
        for name, module in self._module.named_modules():
            if isinstance(module, nn.Linear):
                module.register_forward_pre_hook(lambda _, inputs, name=f"{name}.weight": see(name, inputs[0]))

    def frame_upload(self) -> None:
        """See `base.Backend`."""

    @torch.inference_mode()
    def encode(self, pixels: Floats, grid_thw: tuple[int, int, int], *, last: bool = True) -> Tensor:
        """See `base.Backend`."""
        vision = self.model.vision
        inputs: list[Any] = [pixels, *positions.vision_cos_sin(grid_thw, vision), positions.frame_seqlens(grid_thw)]
        if vision.window_size:
            order, bounds = positions.window_index(grid_thw, vision)
            inputs += [order, np.argsort(order), bounds]
        out: Tensor = self._module.visual(*(torch.from_numpy(x) for x in inputs))
        return out

    def embed(self, ids: Ids) -> Tensor:
        """See `base.Backend`."""
        return self._table[torch.from_numpy(ids)].float()

    def prepare(self, capacity: int) -> KVCache:
        """See `base.Backend`."""
        return KVCache(self.model.decoder, capacity)

    @torch.inference_mode()
    def decode(self, cache: KVCache, inputs_embeds: Tensor, cos: Floats, sin: Floats, lanes: Any = None) -> Tensor:
        """See `base.Backend`."""
        cache.place(cos, sin)
        keys, values = ([torch.from_numpy(x) for x in caches] for caches in (cache.keys, cache.values))
        tables = torch.from_numpy(cache.cos), torch.from_numpy(cache.sin)
        attend = CachedAttention(*tables, torch.from_numpy(cache.past_length), keys, values)
        out: Tensor = self._module.model(inputs_embeds[None], attend)[0]
        cache.keys = [x.numpy() for x in attend.keys]
        cache.values = [x.numpy() for x in attend.values]
        cache.advance(len(inputs_embeds))
        return out

    @torch.inference_mode()
    def logits(self, hidden: Tensor) -> Floats:
        """See `base.Backend`."""
        out: Floats = self._module.lm_head(hidden).numpy()
        return out

    def words(self, seen: Sequence[int] = (), penalty: float = 1.0) -> HostWords:
        """See `base.Backend`."""
        return HostWords(self.logits, seen, penalty)

    def row_logits(self, hidden: Tensor, ids: Ids) -> Floats:
        """See `base.Backend`."""
        head = self._table if self.model.decoder.tie_word_embeddings else self._fetch("lm_head.weight")
        out: Floats = (head[torch.from_numpy(ids)].float() @ hidden[0]).numpy()
        return out

    @torch.inference_mode()
    def remember(self, pooled: Tensor) -> Any:
        """See `base.Backend`."""
        injection = self._module.latent_injection
        if injection is None or not injection.looks_at_video:
            return None
        return injection.memory(pooled[None])

    @torch.inference_mode()
    def inject(self, hidden: Tensor, memory: Any) -> Tensor:
        """See `base.Backend`."""
        assert self._module.latent_injection is not None, "a checkpoint without latents injects none"
        out: Tensor = self._module.latent_injection(hidden[None], memory)[0]
        return out

    def queries(self) -> Tensor | None:
        """See `base.Backend`."""
        injection = self._module.latent_injection
        return injection.queries.detach() if injection is not None and hasattr(injection, "queries") else None

    def join(self, parts: list[Tensor]) -> Tensor:
        """See `base.Backend`."""
        return torch.cat(parts)

    def lift(self, rows: Floats) -> Tensor:
        """See `base.Backend`."""
        return torch.from_numpy(rows)

    def lower(self, rows: Tensor) -> Floats:
        """See `base.Backend`."""
        out: Floats = rows.numpy()
        return out

    def plan_memory(self, shape: Shape) -> None:
        """See `base.Backend`."""

    def give_back(self) -> None:
        """See `base.Backend`."""

    def close(self) -> None:
        """See `base.Backend`."""
        del self._module, self._table
