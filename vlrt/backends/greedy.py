"""The likeliest next word, from logits in host memory. Knows ids; no text and no engine."""

from collections.abc import Callable, Sequence

import numpy as np

from vlrt.backends.base import NO_NUMBER, Array, Floats


class HostWords:
    """See `base.Words`.

    Args:
        logits: maps a hidden state [1, C] to logits [1, V].
        seen: ids whose logits the penalty makes smaller; those that are chosen follow.
        penalty: their logits are divided by it, negative ones multiplied (arXiv 1909.05858, as transformers does).

    Attributes:
        log_probability: see `base.Words`.
    """

    def __init__(self, logits: Callable[[Array], Floats], seen: Sequence[int] = (), penalty: float = 1.0) -> None:
        self._logits, self._penalty = logits, np.float32(penalty)
        self._seen = set(seen)
        self.log_probability = 0.0
        self._ratios = np.empty(0, np.float32)  # of every word to the chosen one, made anew each time

    def __call__(self, hidden: Array, banned: Sequence[int] = ()) -> int:
        """See `base.Words`."""
        return self.pick(self._logits(hidden)[0], banned)

    def pick(self, logits: Floats, banned: Sequence[int] = ()) -> int:
        """Choose by logits [V]."""
        penalised = self._penalty != 1 and self._seen
        if penalised or banned:
            logits = logits.copy()
        if penalised:
            ids = np.array(sorted(self._seen), np.int64)
            values = logits[ids]
            logits[ids] = np.where(values < 0, values * self._penalty, values / self._penalty)
        logits[list(banned)] = -np.inf
        token_id = int(logits.argmax())  # of the first NaN, where there is one
        self._seen.add(token_id)
        if np.isnan(logits[token_id]):
            return NO_NUMBER
        if self._ratios.shape != logits.shape:
            self._ratios = np.empty_like(logits)
        ratios = np.subtract(logits, logits[token_id], out=self._ratios)
        self.log_probability = -float(np.log(np.exp(ratios, out=ratios).sum()))  # NumPy adds pairwise: to a few ulps
        return token_id
