"""Asks a bundle the questions of a data set and scores its answers, going on after any interruption.

Each answer is a line of a results file as soon as it is there. Knows rows, answers and scores (`scoring.py`); opens no
graph and no video itself.
"""

import json
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import numpy as np

from vlrt import calibration, scoring
from vlrt.answer import Answer
from vlrt.errors import ConfigError, VideoError
from vlrt.reduction import Reduction
from vlrt.train.triplets import LETTERS, Triplet

Progress = Callable[[int, int, float], None]  # rows done, rows in all, mean score so far


class Asker(Protocol):
    """What an evaluation needs of a `Runtime`."""

    @property
    def ask(self) -> Callable[..., Answer]:
        """See `Runtime.ask`."""


@dataclass(frozen=True)
class Group:
    """The mean over the rows of one kind."""

    name: str
    num_rows: int
    score: float
    answer_tokens: float
    seconds: float
    reasoning_seconds: float  # of the stages latents and answer
    calibration_error: float | None  # `calibration.expected_calibration_error` of answers with a confidence


@dataclass(frozen=True)
class Fit:
    """A temperature of choices, fitted to answers; expected calibration errors of those, before and after."""

    temperature: float
    num_rows: int
    error_before: float
    error_after: float


def run(
    runtime: Asker,
    rows: Sequence[Triplet],
    results: Path,
    settings: dict[str, Any],
    *,
    progress: Progress | None = None,
) -> list[dict[str, Any]]:
    """Ask every row that has no result yet; return all results in the order of the rows.

    A multiple-choice question is answered by the likeliest letter; others freely, or by the likeliest of the candidates
    that their row names, where `settings` has "candidates". A video that cannot be used scores 0
    and its result says why.

    Args:
        runtime: what is asked.
        rows: the questions.
        results: a file of one JSON line per result, begun with a line of `settings`; made, or gone on with.
        settings: what the answers depend on: the bundle, "candidates", fields of a Reduction under "reduce", and
            options of `Runtime.ask` under "ask".
        progress: told after every row.

    Raises:
        ConfigError: `results` belongs to other settings, or cannot be read or written.
    """
    done = _resume(results, settings)
    try:
        with results.open("a", encoding="utf-8") as file:
            for row in rows:
                if row.number not in done:
                    done[row.number] = _ask(runtime, row, settings)
                    file.write(json.dumps(done[row.number]) + "\n")
                    file.flush()
                if progress is not None:
                    scores = [found["score"] for found in done.values()]
                    progress(len(done), len(rows), sum(scores) / len(scores))
    except OSError as error:
        raise ConfigError(f"{results} cannot be written: {error.strerror}") from error
    return [done[row.number] for row in rows]


def summarise(results: Iterable[dict[str, Any]]) -> list[Group]:
    """Return the means per problem type, per family where there are several, and over all."""
    results = list(results)
    groups = [_group("all", results)]
    for key in ("problem_type", "family"):
        names = sorted({found[key] for found in results})
        if len(names) > 1 or key == "problem_type":
            groups += [_group(f"{key}: {name}", [f for f in results if f[key] == name]) for name in names]
    return groups


def calibrate(results: Iterable[dict[str, Any]], temperature: float) -> Fit:
    """Return the `choice_temperature` that fits results best; rows without choices, or without the right one, aside.

    Args:
        results: of `run`.
        temperature: the one that they were made with.

    Raises:
        ConfigError: see `calibration.fit_temperature`.
    """
    rows = [found for found in results if found["right"] in (found.get("scores") or ())]
    chances = [np.maximum(list(found["scores"].values()), np.finfo(np.float64).tiny) for found in rows]
    log_scores = [(temperature * np.log(row)).tolist() for row in chances]
    right = [list(found["scores"]).index(found["right"]) for found in rows]
    fitted = calibration.fit_temperature(log_scores, right)
    exact = [float(np.argmax(row) == index) for row, index in zip(log_scores, right, strict=True)]
    before, after = (
        calibration.expected_calibration_error([max(calibration.temper(row, at)) for row in log_scores], exact)
        for at in (temperature, fitted)
    )
    return Fit(fitted, len(rows), before, after)


def _ask(runtime: Asker, row: Triplet, settings: dict[str, Any]) -> dict[str, Any]:
    choices = list(LETTERS[: len(row.choices)]) or None
    if choices is None and settings.get("candidates"):
        choices = list(row.metadata.get("candidates", ())) or None
    options = dict(settings.get("ask", {}))
    if "early_exit" in options and choices is None:  # which knows no choice that could be certain
        del options["early_exit"]
    if settings.get("reduce"):
        options["reduce"] = Reduction(**settings["reduce"])
    found: dict[str, Any] = {
        "number": row.number,
        "problem_type": row.problem_type,
        "family": row.family,
        "right": row.target,
    }
    try:
        answer = runtime.ask(row.video, row.asked, choices=choices, **options)
    except VideoError as error:
        return {**found, "answer": None, "error": str(error), "score": 0.0, "answer_tokens": 0, "seconds": 0.0}
    return {
        **found,
        "answer": answer.text,
        "score": scoring.score(row.problem_type, answer.text, row.target),
        "answer_tokens": answer.usage.answer_tokens,
        "latents": answer.usage.latents,
        "scores": answer.scores,
        "confidence": answer.confidence,
        "seconds": answer.timings["total"],
        "timings": answer.timings,
    }


def _group(name: str, results: list[dict[str, Any]]) -> Group:
    count = max(1, len(results))
    score, answer_tokens, seconds = (
        sum(found[key] for found in results) / count for key in ("score", "answer_tokens", "seconds")
    )
    stages = [found.get("timings", {}) for found in results]  # none where the video could not be used
    reasoning = sum(times.get("latents", 0.0) + times.get("answer", 0.0) for times in stages) / count
    told = [(found["confidence"], found["score"]) for found in results if found.get("confidence") is not None]
    error = calibration.expected_calibration_error(*zip(*told, strict=True)) if told else None
    return Group(name, len(results), score, answer_tokens, seconds, reasoning, error)


def _resume(results: Path, settings: dict[str, Any]) -> dict[int, dict[str, Any]]:
    """Return the results that a file has, by row; a last line that was cut off is removed."""
    head = json.dumps({"settings": settings}, sort_keys=True)
    try:
        if not results.exists():
            results.parent.mkdir(parents=True, exist_ok=True)
            results.write_text(head + "\n", encoding="utf-8")
            return {}
        lines = results.read_text(encoding="utf-8").splitlines(keepends=True)
        if not lines or lines[0].rstrip("\n") != head:
            raise ConfigError(f"{results} holds results of other settings; pass another file, or remove it")
        whole = [line for line in lines if line.endswith("\n")]
        found = [json.loads(line) for line in whole[1:]]
        results.write_text("".join(whole), encoding="utf-8")
        return {int(row["number"]): row for row in found}
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise ConfigError(f"{results} cannot be gone on with: {error}; remove it") from error
