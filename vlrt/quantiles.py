"""What a bench reports of repeated times. Imports no engine: processes whose memory is measured load it."""

import statistics
from collections.abc import Sequence


def quantiles(values: Sequence[float]) -> dict[str, float]:
    """Return median, p20 and p80."""
    ordered = sorted(values)
    last = len(ordered) - 1
    return {
        "median": statistics.median(ordered),
        "p20": ordered[round(0.2 * last)],
        "p80": ordered[round(0.8 * last)],
    }
