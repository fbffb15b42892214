"""How far probabilities can be believed: temperature, and the error that it is fitted to make small.

Knows probabilities and whether answers were right; no model.
"""

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from vlrt.errors import ConfigError

NUM_BINS = 15  # as in arXiv 1706.04599
COLDEST, HOTTEST = 0.05, 20.0  # temperatures that are fitted; beyond them a set of questions does not tell
_STEPS = 60  # of the bisection: to the last bit of a float64


def temper(log_scores: Sequence[float], temperature: float) -> list[float]:
    """Return probabilities of choices, `softmax(log_scores / temperature)`: above 1 less certain, below 1 more."""
    scaled = np.asarray(log_scores, np.float64) / temperature
    chances = np.exp(scaled - scaled.max())
    probabilities: list[float] = (chances / chances.sum()).tolist()
    return probabilities


def fit_temperature(log_scores: Sequence[Sequence[float]], right: Sequence[int]) -> float:
    """Return the temperature under which right choices are likeliest: the least mean negative log likelihood.

    Temperature scaling (arXiv 1706.04599). The likelihood has one peak, which is found by bisection of its slope. Which
    choice is the likeliest does not change.

    Args:
        log_scores: of each question, log probabilities of its choices at temperature 1.
        right: index of each question's right choice.

    Raises:
        ConfigError: there is no question, or none that tells: answers are nearly all right, or no better than guesses.
    """
    if not log_scores:
        raise ConfigError("there is no question with choices to fit a temperature to; accepted: one or more")
    rows = [(np.asarray(row, np.float64), index) for row, index in zip(log_scores, right, strict=True)]
    sharp, flat = 1 / COLDEST, 1 / HOTTEST
    if _slope(rows, sharp) <= 0 or _slope(rows, flat) > 0:
        found = "nearly all answers are right" if _slope(rows, sharp) <= 0 else "the answers are no better than guesses"
        raise ConfigError(f"no temperature from {COLDEST} to {HOTTEST} fits: {found}; calibrate with other questions")
    for _ in range(_STEPS):
        middle = (sharp + flat) / 2
        sharp, flat = (middle, flat) if _slope(rows, middle) > 0 else (sharp, middle)
    return 2 / (sharp + flat)


def expected_calibration_error(confidences: Sequence[float], scores: Sequence[float]) -> float:
    """Return by how much confidence and score differ, on average over answers, within bins of like confidence.

    `sum_b n_b / n * |mean score of b - mean confidence of b|` over NUM_BINS bins of equal width (arXiv 1706.04599).

    Args:
        confidences: 0 to 1, one or more.
        scores: of the same answers, 0 to 1.
    """
    bins = np.minimum((np.asarray(confidences) * NUM_BINS).astype(int), NUM_BINS - 1)
    gaps = np.asarray(scores, np.float64) - np.asarray(confidences, np.float64)
    return float(np.abs(np.bincount(bins, gaps)).sum() / len(gaps))


def _slope(rows: Sequence[tuple[NDArray[np.float64], int]], sharpness: float) -> float:
    """Derivative of the negative log likelihood by 1 / temperature; it grows with it."""
    return float(sum(np.dot(temper(row.tolist(), 1 / sharpness), row) - row[index] for row, index in rows))
