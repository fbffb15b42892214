"""Video-R1's rules of scoring, by hand."""

import math

import pytest

from tests.closeness import assert_close
from vlrt import scoring


@pytest.mark.parametrize(
    ("kind", "answer", "right", "expected"),
    [
        ("multiple choice", "B", "B", 1),
        ("multiple choice", "B. left", "B", 1),
        ("multiple choice", "(C)", "C", 1),
        ("multiple choice", "Because of A", "B", 0),  # no letter inside of a word counts
        ("multiple choice", "BA", "B", 0),
        ("multiple choice", "", "B", 0),
        ("numerical", "3.141", "3.14", 1),
        ("numerical", "1,200", "1200", 1),
        ("numerical", "3.0", "3", 0),  # written with a fraction or without, as the right one
        ("numerical", "3.15", "3.14", 0),
        ("numerical", "three", "3", 0),
        ("numerical", "nan", "3", 0),
        ("regression", "10", "10", 1),
        ("regression", "8.1", "10", 0.7),  # off by 19 %: right at 0.50, 0.55 .. 0.80
        ("regression", "16", "10", 0),
        ("regression", "-10", "10", 0),
        ("regression", "ten", "10", 0),
        ("OCR", "stop at the gate", "stop at the gate", 1),
        ("OCR", "stop at gate", "stop at the gate", 0.75),
        ("OCR", "stop now at the old gate", "stop at the gate", 0.5),
        ("OCR", "a b c d e f g h i", "stop", 0),  # a rate above 1 is no negative score
        ("OCR", "", "", 1),
        ("free-form", "The red ball!", "the red ball", 1),
        ("free-form", "Red.", "red", 1),  # one word has no pairs
        ("free-form", "blue", "red", 0),
        ("free-form", "", "red", 0),
        # shared words 2 of 3 and 2: 0.8; shared pairs 1 of 2 and 1: 2/3; longest common 2: 0.8
        ("free-form", "a red ball", "red ball", (0.8 + 2 / 3 + 0.8) / 3),
        ("free-form", "ball red", "red ball", (1 + 0 + 0.5) / 3),  # order counts for pairs and the longest
        ("some other type", "red ball", "red ball", 1),
    ],
)
def test_scores(kind, answer, right, expected):
    """Catches a rule that gives too much or too little, each row its own way."""
    assert_close(1 + scoring.score(kind, answer, right), 1.0 + expected)


def test_words_count_as_often_as_in_both():
    """Catches an answer that repeats one right word until it scores."""
    assert scoring.free_form("red red red red", "red ball") < scoring.free_form("red", "red ball")


@pytest.mark.parametrize(
    ("text", "value"), [("50%", 50), (" 1,000.5 ", 1000.5), ("inf", None), ("", None), ("1e3", 1000)]
)
def test_numbers(text, value):
    found = scoring.number(text)
    assert found == value if value is not None else found is None


def test_thresholds_are_ten_from_a_half():
    assert len(scoring.THRESHOLDS) == 10
    assert math.isclose(scoring.THRESHOLDS[-1], 0.95)
