"""The judge is judged: a closeness function that lets errors through makes every other test worthless."""

import numpy as np
import pytest
import torch

from tests.closeness import FEW_ULPS, assert_close

EXACT = torch.linspace(-1, 1, 123, dtype=torch.float64)


def off_by(error):
    return EXACT.float() + error * (torch.arange(123) == 7)


def test_the_error_of_plain_pytorch_is_allowed_twice():
    """Catches a rule looser than twice plain's error and a few ulps."""
    ulp = torch.finfo(torch.float32).eps
    assert_close(off_by(1.9e-5), EXACT, off_by(1e-5))
    with pytest.raises(AssertionError, match="errs by"):
        assert_close(off_by(2.1e-5), EXACT, off_by(1e-5))
    assert_close(off_by((FEW_ULPS - 2) * ulp), EXACT)
    with pytest.raises(AssertionError, match="errs by"):
        assert_close(off_by((FEW_ULPS + 2) * ulp), EXACT)


@pytest.mark.parametrize(
    ("out", "plain", "message"),
    [
        (off_by(float("nan")), None, "finite"),
        (off_by(0.5), off_by(0.5), "plain errs by"),  # both wrong alike, or `exact` is another function
        (EXACT.float(), EXACT, "two dtypes"),
        (EXACT.float()[None], None, "shape"),
        (np.zeros(123, np.float32), None, "errs by"),
    ],
)
def test_what_proves_nothing_fails(out, plain, message):
    """Catches NaNs that compare as equal, broadcasting, and a tolerance made vacuous by a wrong reference."""
    with pytest.raises(AssertionError, match=message):
        assert_close(out, EXACT, plain)


def test_nothing_is_close_to_nothing():
    """Catches the maximum of an empty tensor, which raises."""
    assert_close(np.zeros((0, 4), np.float32), np.zeros((0, 4)))
