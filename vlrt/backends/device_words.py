"""The likeliest next word, chosen on the device: it and its probability come back, no logits. Knows ids; no text."""

from collections.abc import Sequence

import torch
from torch import Tensor

from vlrt.backends.base import NO_NUMBER


class DeviceWords:
    """See `base.Words`: the same choices as `greedy.HostWords` makes of the same logits, to the bit.

    Args:
        head: [V, C].
        seen: see `greedy.HostWords`.
        penalty: likewise.

    Attributes:
        log_probability: see `base.Words`.
    """

    def __init__(self, head: Tensor, seen: Sequence[int] = (), penalty: float = 1.0) -> None:
        self._head = head
        self.log_probability = 0.0
        self._seen: Tensor | None = None  # [V] bool
        self._kept: dict[tuple[int, ...], Tensor] = {}
        if penalty != 1:
            # A tensor: PyTorch multiplies by the reciprocal of a number, and rounds otherwise.
            self._penalty = torch.tensor(penalty, dtype=torch.float32, device=head.device)
            self._seen = torch.zeros(len(head), dtype=torch.bool, device=head.device)
            self._seen[list(set(seen))] = True

    @torch.inference_mode()
    def __call__(self, hidden: Tensor, banned: Sequence[int] = ()) -> int:
        """See `base.Words`."""
        logits = (hidden @ self._head.t())[0].float()  # [V]
        if self._seen is not None:
            lowered = torch.where(logits < 0, logits * self._penalty, logits / self._penalty)
            logits = torch.where(self._seen, lowered, logits)
        if banned:
            logits.index_fill_(0, self._ids(tuple(banned)), -torch.inf)
        best = logits.argmax(keepdim=True)  # of the first NaN, where there is one
        if self._seen is not None:
            self._seen.index_fill_(0, best, True)
        token_id, self.log_probability = torch.cat(
            [torch.where(logits[best].isnan(), NO_NUMBER, best), logits.double().log_softmax(0)[best]]
        ).tolist()
        return int(token_id)

    def _ids(self, ids: tuple[int, ...]) -> Tensor:
        if ids not in self._kept:
            self._kept[ids] = torch.tensor(ids, dtype=torch.int64, device=self._head.device)
        return self._kept[ids]
