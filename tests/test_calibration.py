"""Temperatures and calibration errors against their definitions, computed otherwise."""

import numpy as np
import pytest

from tests.closeness import assert_close
from vlrt.calibration import expected_calibration_error, fit_temperature, temper
from vlrt.errors import ConfigError


@pytest.mark.parametrize("offset", [0.0, 1e4, -1e4])
def test_temperature_divides_log_odds(offset):
    """Catches a temperature that multiplies, and an exp that overflows."""
    scores = np.array([0.0, -1.0, -3.0]) + offset
    assert_close(temper(scores.tolist(), 1.0), np.exp([0.0, -1.0, -3.0]) / np.exp([0.0, -1.0, -3.0]).sum())
    cold, hot = temper(scores.tolist(), 0.5), temper(scores.tolist(), 4.0)
    np.testing.assert_allclose(np.log(cold[0] / cold[1]), 2.0)
    np.testing.assert_allclose(np.log(hot[0] / hot[2]), 0.75)
    assert_close(sum(hot), 1.0)


def draw(count, temperature, seed=0):
    """Log scores of four choices, and answers drawn at a temperature: a model that is too sure by that much."""
    rng = np.random.default_rng(seed)
    scores = rng.standard_normal((count, 4)) * 3
    scores -= np.log(np.exp(scores).sum(1, keepdims=True))
    return scores.tolist(), [int(rng.choice(4, p=temper(row.tolist(), temperature))) for row in scores]


@pytest.mark.parametrize("true", [0.5, 1.0, 3.0])
def test_the_fitted_temperature_has_the_least_loss(true):
    """Catches a slope of the wrong sign, and a search that ends at its border."""
    scores, right = draw(2000, true)
    fitted = fit_temperature(scores, right)

    def loss(temperature):
        return -sum(np.log(temper(row, temperature)[index]) for row, index in zip(scores, right, strict=True))

    assert fitted == pytest.approx(true, rel=0.15)
    assert loss(fitted) <= min(loss(fitted * 1.01), loss(fitted / 1.01))
    errors = [
        expected_calibration_error(
            [max(temper(row, at)) for row in scores],
            [float(np.argmax(row) == index) for row, index in zip(scores, right, strict=True)],
        )
        for at in (1.0, fitted)
    ]
    assert errors[1] <= (errors[0] if true == 1 else errors[0] / 2) + 0.005


@pytest.mark.parametrize(
    ("scores", "right", "reason"),
    [
        ([[-0.1, -2.4]] * 5, [0] * 5, "nearly all answers are right"),
        ([[-0.1, -2.4]] * 5, [1] * 5, "no better than guesses"),
        ([], [], "no question with choices"),
    ],
)
def test_questions_that_do_not_tell_are_refused(scores, right, reason):
    """Catches a temperature at the border of the search, which would claim certainty for ever."""
    with pytest.raises(ConfigError, match=reason):
        fit_temperature(scores, right)


def test_the_calibration_error_is_that_of_its_definition():
    """Catches bins weighted alike, an answer of confidence 1 without a bin, and signs that cancel between bins."""
    rng = np.random.default_rng(0)
    confidences, scores = [*rng.random(200), 1.0, 0.0], [*rng.integers(0, 2, 200), 1, 1]
    expected = 0.0
    for low in range(15):
        inside = [i for i, c in enumerate(confidences) if low <= c * 15 < low + 1 or (c == 1 and low == 14)]
        if inside:
            gap = np.mean([scores[i] for i in inside]) - np.mean([confidences[i] for i in inside])
            expected += len(inside) / 202 * abs(gap)
    assert_close(expected_calibration_error(confidences, scores), expected)
