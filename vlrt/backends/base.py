"""What an engine must do to run a model: the stages, each on arrays whose meaning names.py states.

`Array` is the engine's own kind (NumPy, torch); callers only slice rows, and hand arrays back. Logits are NumPy.
"""

from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from vlrt import config
from vlrt.kv_cache import KVCache

Array = Any
Floats = NDArray[np.float32]
Ids = NDArray[np.int64]


class Backend(Protocol):
    """One loaded model. Safe to use from several threads, each with a cache of its own.

    Attributes:
        model: its config.
        prefill_chunk: positions of the longest decoder pass: bounds the attention scores that a pass holds.
        vision_chunk: patches per pass of the vision tower, rounded up to whole temporal patches.
        has_lanes: whether `decode` takes several sequences in one cache; its arrays are NumPy then.
    """

    model: config.Model
    prefill_chunk: int
    vision_chunk: int
    has_lanes: bool

    def encode(self, pixels: Floats, grid_thw: tuple[int, int, int]) -> Array:
        """Map the patches [N, patch_dim] of whole temporal patches to video tokens [N_v, C]."""

    def embed(self, ids: Ids) -> Array:
        """Look up ids [S]; return [S, C]."""

    def prepare(self, capacity: int) -> KVCache:
        """Return an empty cache of `capacity` slots."""

    def decode(
        self, cache: KVCache, inputs_embeds: Array, cos: Floats, sin: Floats, lanes: NDArray[np.int32] | None = None
    ) -> Array:
        """Append inputs_embeds [S, C], with rotary rows [S, D/2], to the cache; return hidden states [S, C].

        lanes: [S], as in `KVCache`, where the backend has them; None: all slots are of one sequence.
        """

    def logits(self, hidden: Array) -> Floats:
        """Map hidden states [S, C] to logits [S, V]."""

    def row_logits(self, hidden: Array, ids: Ids) -> Floats:
        """Map one hidden state [1, C] to the logits [n] of the ids [n] alone."""

    def remember(self, pooled: Array) -> Any:
        """Prepare spatially pooled video tokens [T_v, C] for `inject`; once per prompt."""

    def inject(self, hidden: Array, memory: Any) -> Array:
        """Map hidden states [L, C] to latents [L, C]; memory as `remember` returned it."""

    def queries(self) -> Array | None:
        """Return the learned queries [L, C] of the parallel rollout, or None."""

    def join(self, parts: list[Array]) -> Array:
        """Concatenate rows."""

    def lift(self, rows: Floats) -> Array:
        """Make rows of NumPy an array of the engine's kind."""

    def lower(self, rows: Array) -> Floats:
        """Make an array of the engine's kind one of NumPy, float32."""

    def close(self) -> None:
        """Free what the engine holds."""
