"""What an engine must do to run a model: the stages, each on arrays whose meaning names.py states.

`Array` is the engine's own kind (NumPy, torch); callers only slice rows, and hand arrays back. Logits are NumPy.
"""

from collections.abc import Sequence
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from vlrt import config
from vlrt.kv_cache import KVCache
from vlrt.memory_plan import Plan, Shape

Array = Any
Floats = NDArray[np.float32]
Ids = NDArray[np.int64]
NO_NUMBER = -1  # in place of a token's id: the model computes NaN


class FrameUpload(Protocol):
    """Takes the frames of one video on their way from the decoder to the vision tower; a `video.Target`.

    A thread writes them while another asks for patches of those that were written.
    """

    def begin(self, shape: tuple[int, int, int, int]) -> NDArray[np.uint8]:
        """Return memory for the frames [T, H, W, 3]."""

    def written(self, count: int) -> None:
        """Learn that the first `count` frames are there."""

    def patches(self, data: NDArray[np.uint8], start: int, stop: int) -> Array:
        """Return what `encode` takes of temporal patches `start` to `stop` of frames [T, H, W, 3], its own or not."""


class Words(Protocol):
    """Chooses the words of one answer, greedily.

    Attributes:
        log_probability: of the word that was chosen last, among those that might have been.
    """

    log_probability: float

    def __call__(self, hidden: Array, banned: Sequence[int] = ()) -> int:
        """Return the likeliest token after a hidden state [1, C], none of the banned ones; or NO_NUMBER."""


class Backend(Protocol):
    """One loaded model. Safe to use from several threads, each with a cache of its own.

    Attributes:
        model: its config.
        prefill_chunk: positions of the longest decoder pass: bounds the attention scores that a pass holds.
        vision_chunk: patches per pass of the vision tower, rounded up to whole temporal patches.
        has_lanes: whether `decode` takes several sequences in one cache; its arrays are NumPy then.
        keeps_spare: whether the memory of the cache that was let go last is kept for the next one, where it can be.
    """

    model: config.Model
    prefill_chunk: int
    vision_chunk: int
    has_lanes: bool
    keeps_spare: bool

    def frame_upload(self) -> FrameUpload | None:
        """Return what takes a video's frames; None: `encode` wants pixels from `preprocess.cut`."""

    def encode(self, pixels: Floats | Array, grid_thw: tuple[int, int, int], *, last: bool = True) -> Array:
        """Map the patches [N, patch_dim] of whole temporal patches to video tokens [N_v, C].

        last: of the passes over a video; what others took of the host's memory is kept for the next one.
        """

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

    def words(self, seen: Sequence[int] = (), penalty: float = 1.0) -> Words:
        """Return what chooses an answer's words; `penalty` as in `Writer.answer`, for ids seen and chosen."""

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

    def plan_memory(self, shape: Shape) -> Plan | None:
        """Predict what a question takes in host memory; None: not known for this engine."""

    def give_back(self) -> None:
        """Give back host memory that is kept for questions to come."""

    def close(self) -> None:
        """Free what the engine holds."""
