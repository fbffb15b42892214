"""A backend without a model: small enough to be redone by hand, yet wrong wherever a caller is wrong.

Its hidden state is a linear recurrence over everything that was fed, each row turned by its rotary row: a rewind that
frees one slot too many, a skipped token or a position off by one changes every state after it. All arithmetic is done
row by row, so that the same sequence gives the same bits however it was cut into pieces.
"""

import numpy as np

from vlrt import fresh, memory_plan
from vlrt.backends.greedy import HostWords
from vlrt.kv_cache import KVCache

WIDTH = 16


def fake_model(**settings):
    """Return a config.Model of the fake's sizes; `latent` and `overrides` as for `fresh.fresh_model`."""
    sizes = {"hidden_size": WIDTH, "num_heads": 2, "num_kv_heads": 2, "head_dim": WIDTH // 2, "num_layers": 1}
    overrides = {f"decoder.{name}": value for name, value in sizes.items()}
    overrides |= {"decoder.mrope_section": [1, 1, 2], "decoder.rope_theta": 100.0, "vision.out_hidden_size": WIDTH}
    return fresh.fresh_model("tiny", **{**settings, "overrides": {**overrides, **settings.get("overrides", {})}})


class FakeBackend:
    """See `vlrt.backends.base.Backend`. Arrays are NumPy float32.

    Attributes:
        decoded: rows of each `decode`.
        row_reads: ids of each `row_logits`.
        full_reads: rows of each `logits`.
    """

    prefill_chunk, vision_chunk, has_lanes, keeps_spare = 512, 4096, False, False

    def __init__(self, model=None):
        self.model = model or fake_model()
        random = np.random.default_rng(0)
        self.table = random.standard_normal((self.model.decoder.vocab_size, WIDTH)).astype(np.float32)
        self.head = random.standard_normal(self.table.shape).astype(np.float32)
        self.memory_of, self.injection = random.standard_normal((2, WIDTH, WIDTH)).astype(np.float32) / 4
        self.carry = np.linalg.qr(random.standard_normal((WIDTH, WIDTH)))[0].astype(np.float32) * np.float32(0.9)
        self.queries_of = random.standard_normal((64, WIDTH)).astype(np.float32)
        self.decoded, self.row_reads, self.full_reads = [], [], []

    def frame_upload(self):
        return None

    def encode(self, pixels, grid_thw, *, last=True):
        return pixels[: len(pixels) // self.model.vision.spatial_merge_size**2, :WIDTH]

    def embed(self, ids):
        return self.table[ids]

    def prepare(self, capacity):
        return KVCache(self.model.decoder, capacity)

    def decode(self, cache, inputs_embeds, cos, sin):
        assert len(inputs_embeds) == len(cos) == len(sin) > 0, "one rotary row per row that is fed"
        self.decoded.append(len(inputs_embeds))
        cache.place(cos, sin)
        states = cache.values[0][0]  # [heads, M, head_dim]: the state after each slot
        for row in inputs_embeds:
            at = cache.length
            before = states[:, at - 1].reshape(WIDTH) if at else np.zeros(WIDTH, np.float32)
            x1, x2 = row.reshape(2, 2, -1).transpose(1, 0, 2)
            c, s = cache.cos[at], cache.sin[at]
            turned = np.concatenate([x1 * c - x2 * s, x2 * c + x1 * s], axis=1).reshape(WIDTH)
            states[:, at] = (self.carry @ before + turned).reshape(2, -1)
            cache.advance(1)
        return states[:, cache.length - len(inputs_embeds) : cache.length].transpose(1, 0, 2).reshape(-1, WIDTH)

    def logits(self, hidden):
        self.full_reads.append(len(hidden))
        return self._logits(hidden)

    def words(self, seen=(), penalty=1.0):
        return HostWords(self.logits, seen, penalty)

    def row_logits(self, hidden, ids):
        assert hidden.shape == (1, WIDTH)
        self.row_reads.append(tuple(ids.tolist()))
        return self._logits(hidden)[0, ids]

    def remember(self, pooled):
        return pooled.mean(0) @ self.memory_of

    def inject(self, hidden, memory):
        return np.stack([np.tanh(self.injection @ row + memory) for row in hidden])

    def queries(self):
        plan = self.model.latent
        return self.queries_of[: plan.num_latents] if plan and plan.rollout == "parallel" else None

    def join(self, parts):
        return np.concatenate(parts)

    def lift(self, rows):
        return rows

    def lower(self, rows):
        return rows

    def plan_memory(self, shape):
        return memory_plan.predict(self.model, shape, int8=False, library=False)

    def give_back(self):
        pass

    def close(self):
        pass

    def _logits(self, hidden):
        return np.stack([self.head @ row for row in hidden])
