"""How an answer is scored against the right one, by the type of its question.

The rules are Video-R1's (arXiv 2503.21776): the letter of a choice, numbers after rounding to two places, regression by
mean relative accuracy, text in pictures by word error rate, free text by ROUGE. Knows texts alone.
"""

import math
import re
from collections.abc import Callable, Mapping

MULTIPLE_CHOICE, NUMERICAL, REGRESSION, OCR, FREE_FORM = (
    "multiple choice",
    "numerical",
    "regression",
    "OCR",
    "free-form",
)
THRESHOLDS = tuple(0.5 + 0.05 * i for i in range(10))  # 0.50 .. 0.95, of mean relative accuracy


def score(problem_type: str, answer: str, right: str) -> float:
    """Return the score of an answer, 0 to 1; a type that has no rule is scored as free text."""
    return RULES.get(problem_type, free_form)(answer.strip(), right.strip())


def multiple_choice(answer: str, right: str) -> float:
    """1 for the right letter: the answer's first one that stands alone, else its whole text."""
    found = re.search(r"(?<![A-Za-z])([A-Z])(?![A-Za-z])", answer)
    return float((found[1] if found else answer) == right)


def numerical(answer: str, right: str) -> float:
    """1 for equal numbers after rounding to two places, if both are written with a fraction or both without."""
    given, wanted = number(answer), number(right)
    if given is None or wanted is None or ("." in answer) != ("." in right):
        return 0.0
    return float(round(given, 2) == round(wanted, 2))


def regression(answer: str, right: str) -> float:
    """Mean relative accuracy: the share of thresholds c in 0.50 .. 0.95 with `|answer - right| / |right| < 1 - c`."""
    given, wanted = number(answer), number(right)
    if given is None or wanted is None:
        return 0.0
    error = abs(given - wanted) / (abs(wanted) + 1e-8)
    return sum(error < 1 - threshold for threshold in THRESHOLDS) / len(THRESHOLDS)


def ocr(answer: str, right: str) -> float:
    """`1 - word error rate`, at least 0: word edits from the answer to the right one over the words of the latter."""
    given, wanted = answer.split(), right.split()
    if not wanted:
        return float(not given)
    row = list(range(len(given) + 1))
    for i, word in enumerate(wanted, 1):
        diagonal, row[0] = row[0], i
        for j, other in enumerate(given, 1):
            diagonal, row[j] = row[j], min(row[j] + 1, row[j - 1] + 1, diagonal + (word != other))
    return max(0.0, 1 - row[-1] / len(wanted))


def free_form(answer: str, right: str) -> float:
    """Mean F-measure of ROUGE-1, ROUGE-2 and ROUGE-L over lower-case words (no stemming); 1 for equal words.

    Video-R1's own code gives two thirds for a single word that is right, as it has no pairs.
    """
    given, wanted = (re.findall(r"\w+", text.lower()) for text in (answer, right))
    if given == wanted:
        return 1.0
    return (_overlap(given, wanted, 1) + _overlap(given, wanted, 2) + _longest(given, wanted)) / 3


def number(text: str) -> float | None:
    """Return the number that a text is, thousands separators and a percent sign aside; None where it is none."""
    try:
        value = float(text.replace(",", "").strip().rstrip("%"))
    except ValueError:
        return None
    return value if math.isfinite(value) else None


def _overlap(given: list[str], wanted: list[str], size: int) -> float:
    """F-measure of the n-grams that two texts share, each counted as often as in both."""
    counts: list[dict[tuple[str, ...], int]] = []
    for words in (given, wanted):
        found: dict[tuple[str, ...], int] = {}
        for i in range(len(words) - size + 1):
            gram = tuple(words[i : i + size])
            found[gram] = found.get(gram, 0) + 1
        counts.append(found)
    shared = sum(min(n, counts[1].get(gram, 0)) for gram, n in counts[0].items())
    return _f_measure(shared, sum(counts[0].values()), sum(counts[1].values()))


def _longest(given: list[str], wanted: list[str]) -> float:
    """F-measure of the longest common subsequence."""
    row = [0] * (len(wanted) + 1)
    for word in given:
        diagonal = 0
        for j, other in enumerate(wanted, 1):
            diagonal, row[j] = row[j], diagonal + 1 if word == other else max(row[j], row[j - 1])
    return _f_measure(row[-1], len(given), len(wanted))


def _f_measure(shared: int, given: int, wanted: int) -> float:
    return 2 * shared / (given + wanted) if shared else 0.0


RULES: Mapping[str, Callable[[str, str], float]] = {
    MULTIPLE_CHOICE: multiple_choice,
    NUMERICAL: numerical,
    REGRESSION: regression,
    OCR: ocr,
    FREE_FORM: free_form,
}
