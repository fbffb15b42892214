"""Evaluations: what is asked, what is counted, and that a run that was stopped goes on."""

import json
from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pytest

from tests.closeness import assert_close
from vlrt import evaluate
from vlrt.errors import ConfigError, VideoError
from vlrt.reduction import Reduction
from vlrt.train.triplets import Triplet

SETTINGS = {"bundle": "b.vlrt", "ask": {"reasoning": "direct"}}


class Fake:
    """Answers "A", or what is right for free questions; says how it was asked; breaks on demand."""

    def __init__(self, dies_at=None):
        self.asked, self.dies_at = [], dies_at

    def ask(self, video, question, *, choices=None, **options):
        if len(self.asked) == self.dies_at:
            raise KeyboardInterrupt
        self.asked.append((str(video), question, choices, options))
        if "broken" in str(video):
            raise VideoError("it is damaged")
        usage = SimpleNamespace(answer_tokens=len(self.asked), latents=0)
        scores = None if choices is None else {choice: 0.75 - 0.5 * (i > 0) for i, choice in enumerate(choices)}
        text, confidence = (choices[0], 0.75) if choices else ("red", 0.9)
        return SimpleNamespace(text=text, scores=scores, confidence=confidence, usage=usage, timings={"total": 2.0})


def rows():
    made = [
        ("1.mp4", "Which way?", "left", ("left", "right"), "multiple choice", "direction"),
        ("2.mp4", "Which way?", "right", ("left", "right"), "multiple choice", "direction"),
        ("3.mp4", "What colour?", "red", (), "free-form", "colour"),
        ("broken.mp4", "What colour?", "red", (), "free-form", "colour"),
    ]
    return [
        Triplet(i, i, video, question, answer, choices, kind, family)
        for i, (video, question, answer, choices, kind, family) in enumerate(made, 1)
    ]


def test_what_is_asked_and_scored(tmp_path):
    """Catches options that are not shown, letters that are not offered, and a broken video that ends everything."""
    fake = Fake()
    found = evaluate.run(fake, rows(), tmp_path / "out" / "results.jsonl", SETTINGS)
    assert [row["score"] for row in found] == [1, 0, 1, 0]
    assert fake.asked[0] == ("1.mp4", "Which way?\nA. left\nB. right", ["A", "B"], {"reasoning": "direct"})
    assert fake.asked[2][2] is None
    assert found[3]["error"] == "it is damaged"


def test_means_per_type_and_family(tmp_path):
    """Catches a mean over the wrong rows."""
    found = evaluate.run(Fake(), rows(), tmp_path / "results.jsonl", SETTINGS)
    groups = {group.name: group for group in evaluate.summarise(found)}
    assert list(groups) == [
        "all",
        "problem_type: free-form",
        "problem_type: multiple choice",
        "family: colour",
        "family: direction",
    ]
    assert groups["all"].num_rows == 4
    for name in groups:
        assert_close(groups[name].score, 0.5)
    assert_close(groups["family: direction"].answer_tokens, 1.5)
    assert_close(groups["all"].seconds, 1.5)


def test_confidence_is_held_against_what_was_right(tmp_path):
    """Catches an error over rows that have no confidence, and one that counts wrong answers as right."""
    found = evaluate.run(Fake(), rows(), tmp_path / "results.jsonl", SETTINGS)
    groups = {group.name: group.calibration_error for group in evaluate.summarise(found)}
    assert_close(groups["problem_type: multiple choice"], 0.25)  # half right at 0.75
    assert_close(groups["family: colour"], 0.1)  # the broken video has none
    assert evaluate.summarise(found[3:])[0].calibration_error is None


def test_a_temperature_is_fitted_to_choices_alone(tmp_path):
    """Catches free answers among the choices, and a fit that starts from tempered scores as if they were not."""
    asked = [rows()[0], rows()[1], replace(rows()[0], number=5), *rows()[2:]]
    found = evaluate.run(Fake(), asked, tmp_path / "results.jsonl", SETTINGS)
    fit = evaluate.calibrate(found, 2.0)
    # Two of three right at odds of 3, which were 9 at temperature 1: odds of 2 need log 9 / log 2.
    assert fit.temperature == pytest.approx(np.log(9) / np.log(2))
    assert (fit.num_rows, fit.error_after) == (3, pytest.approx(0, abs=1e-9))
    assert fit.error_before == pytest.approx(0.75 - 2 / 3)
    with pytest.raises(ConfigError, match="no question with choices"):
        evaluate.calibrate(found[3:], 1.0)


def test_settings_reach_the_question(tmp_path):
    """Catches candidates that are not offered, a reduction that is dropped, and an early exit without choices."""
    named = replace(rows()[2], metadata={"candidates": ["red", "blue"]})
    settings = {"ask": {"early_exit": 0.9}, "reduce": {"keep": 0.5}, "candidates": True}
    fake = Fake()
    found = evaluate.run(fake, [named, replace(rows()[2], number=9)], tmp_path / "results.jsonl", settings)
    assert fake.asked[0][2:] == (["red", "blue"], {"early_exit": 0.9, "reduce": Reduction(keep=0.5)})
    assert fake.asked[1][2:] == (None, {"reduce": Reduction(keep=0.5)})
    assert found[0]["scores"] == {"red": 0.75, "blue": 0.25}


def test_a_run_that_was_stopped_goes_on(tmp_path):
    """Catches questions that are asked twice, and a line that was cut off in its middle."""
    file = tmp_path / "results.jsonl"
    with pytest.raises(KeyboardInterrupt):
        evaluate.run(Fake(dies_at=2), rows(), file, SETTINGS)
    with file.open("a") as out:
        out.write('{"number": 3, "sco')
    fake, seen = Fake(), []
    found = evaluate.run(fake, rows(), file, SETTINGS, progress=lambda done, total, mean: seen.append((done, total)))
    assert [video for video, *_ in fake.asked] == ["3.mp4", "broken.mp4"]
    assert [row["number"] for row in found] == [1, 2, 3, 4]
    assert seen[-1] == (4, 4)
    assert len([json.loads(line) for line in file.read_text().splitlines()]) == 5


@pytest.mark.parametrize("content", ["", "no json\n", '{"settings": {}}\n', '{"number": 1}\n'])
def test_results_of_something_else_are_refused_and_kept(tmp_path, content):
    """Catches results of two bundles in one mean, and a file of someone's that is written over."""
    file = tmp_path / "results.jsonl"
    file.write_text(content)
    with pytest.raises(ConfigError, match=r"results\.jsonl"):
        evaluate.run(Fake(), rows(), file, SETTINGS)
    assert file.read_text() == content
