"""Evaluations: what is asked, what is counted, and that a run that was stopped goes on."""

import json
from types import SimpleNamespace

import pytest

from tests.closeness import assert_close
from vlrt import evaluate
from vlrt.errors import ConfigError, VideoError
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
        return SimpleNamespace(text="A" if choices else "red", usage=usage, timings={"total": 2.0})


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
