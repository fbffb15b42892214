"""Reads video-question-answer triplets, the only supervision: JSON lines of ours, or Video-R1's json.

Bad rows are reported by line with the reason and skipped, up to a limit. Knows files and fields; opens no video and
knows no model.
"""

import json
import os
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NoReturn

from vlrt.errors import ConfigError

LETTERS = "ABCDEFGHIJKLMNOPQRSTUVWXYZ"
MULTIPLE_CHOICE, FREE_FORM = "multiple choice", "free-form"
NUM_SHOWN = 5  # bad rows that an error lists


@dataclass(frozen=True)
class Triplet:
    """One question about one video, with its answer.

    Attributes:
        line: of the file on which the row starts, from 1.
        number: of the row, from 1; a JSON list may have many on a line.
        video: path; exists.
        question: as written in the file.
        answer: text; of a multiple-choice question one of `choices`.
        choices: two or more different options, or none.
        problem_type: Video-R1's name of how answers are scored: "multiple choice", "free-form", "numerical", ...
        family: what results are grouped by; of Video-R1 the data source.
        cot: a chain of thought, for the cot baseline only; "" where there is none. Video-R1's is never read.
        metadata: whatever else was made known, e.g. num_swaps.
    """

    line: int
    number: int
    video: Path
    question: str
    answer: str
    choices: tuple[str, ...] = ()
    problem_type: str = FREE_FORM
    family: str = ""
    cot: str = ""
    metadata: Mapping[str, Any] = field(default_factory=dict)

    @property
    def asked(self) -> str:
        """The question as the model reads it: options follow, one per line, "A. left"."""
        options = (f"{LETTERS[i]}. {choice}" for i, choice in enumerate(self.choices))
        return "\n".join([self.question, *options])

    @property
    def target(self) -> str:
        """What the model is to answer: the option's letter, or the answer."""
        return LETTERS[self.choices.index(self.answer)] if self.choices else self.answer


@dataclass(frozen=True)
class BadRow:
    """A row that cannot be used."""

    line: int
    number: int
    reason: str

    def __str__(self) -> str:
        row = "" if self.number == self.line else f", row {self.number}"
        return f"line {self.line}{row}: {self.reason}"


@dataclass(frozen=True)
class Triplets:
    """The rows of a file that can be used, in order, and those that cannot."""

    rows: tuple[Triplet, ...]
    bad: tuple[BadRow, ...]


class BadRows:
    """Counts the bad rows of a file, each once, and refuses to go on beyond a limit."""

    def __init__(self, name: str | Path, limit: int) -> None:
        """Start without any; `name` is the file's, for messages."""
        self._name, self._limit = name, limit
        self._rows: dict[int, BadRow] = {}

    @property
    def rows(self) -> tuple[BadRow, ...]:
        """The bad rows so far, in the order of the file."""
        return tuple(self._rows[number] for number in sorted(self._rows))

    def add(self, rows: Iterable[BadRow]) -> None:
        """Count more rows.

        Raises:
            ConfigError: they are more than the limit; the message lists the first few.
        """
        for row in rows:
            self._rows.setdefault(row.number, row)
        if len(self._rows) > self._limit:
            raise ConfigError(
                f"{self._name} has {len(self._rows)} bad rows or more; accepted: max_bad_rows = {self._limit}. "
                f"{describe(self.rows)}"
            )


def describe(rows: Iterable[BadRow]) -> str:
    """Return the first few bad rows as one line of text."""
    rows = tuple(rows)
    more = [f"and {len(rows) - NUM_SHOWN} more"] if len(rows) > NUM_SHOWN else []
    return "; ".join([*map(str, rows[:NUM_SHOWN]), *more])


def read(path: str | Path, *, max_bad_rows: int = 100) -> Triplets:
    """Read a file of triplets.

    JSON lines have `video`, `question` and `answer`, and may have `choices`, `family`, `cot` and `metadata`. Video-R1's
    files are one JSON list (or lines) with `path`, `problem`, `solution` ("<answer>..</answer>"), `options`,
    `problem_type` and `data_source`; their reasoning (`process`) is ignored. Paths are relative to the file's
    directory. Whether a video decodes is found out when it is needed.

    Args:
        path: the file.
        max_bad_rows: rows that may be missing fields, answers or videos, or are no JSON.

    Raises:
        ConfigError: the file cannot be read, has no row that can be used, or more bad ones than the limit.
    """
    path = Path(path)
    rows: list[Triplet] = []
    bad = BadRows(path, max_bad_rows)
    try:
        for number, (line, value) in enumerate(_values(path), 1):
            if isinstance(value, _NotJson):
                bad.add([BadRow(line, number, f"is not JSON: {value}")])
                continue
            try:
                rows.append(_triplet(line, number, value, path.parent))
            except ConfigError as error:
                bad.add([BadRow(line, number, str(error))])
    except OSError as error:
        raise ConfigError(f"{path} cannot be read: {error}") from error
    if not rows:
        raise ConfigError(f"{path} has no row that can be used. {describe(bad.rows) or 'It is empty'}")
    return Triplets(tuple(rows), bad.rows)


class _NotJson(str):
    """Why a line is not JSON."""


def _values(path: Path) -> Iterator[tuple[int, Any]]:
    """Yield the line and the JSON value of each row, or a _NotJson for a line that is none."""
    with path.open("rb") as file:
        start = file.read(64).lstrip()
        file.seek(0)
        if start.startswith(b"["):
            yield from _list_values(path, file.read())
            return
        for line, content in enumerate(file, 1):
            if not content.strip():
                continue
            try:
                yield line, json.loads(content)
            except (ValueError, RecursionError) as error:
                yield line, _NotJson(str(error))


def _list_values(path: Path, content: bytes) -> Iterator[tuple[int, Any]]:
    """Yield the elements of a JSON list with the lines on which they start."""

    def refuse(error: object) -> NoReturn:
        raise ConfigError(f"{path} is not a JSON list, from line {line} on: {error}")

    line, at = 1, 0
    try:
        text = content.decode()
    except ValueError as error:
        refuse(error)
    decoder = json.JSONDecoder()
    end = text.index("[") + 1
    while True:
        start = _skip_space(text, end)
        line, at = line + text.count("\n", at, start), start
        if text[start : start + 1] == "]":
            return
        try:
            value, end = decoder.raw_decode(text, start)
        except (ValueError, RecursionError) as error:
            refuse(error)
        yield line, value
        end = _skip_space(text, end)
        if text[end : end + 1] not in (",", "]"):
            refuse("a comma or ] is missing")
        end += text[end] == ","


def _skip_space(text: str, at: int) -> int:
    while text[at : at + 1].isspace():
        at += 1
    return at


def _triplet(line: int, number: int, value: Any, folder: Path) -> Triplet:
    """Check one row.

    Raises:
        ConfigError: it cannot be used; the message is the reason.
    """
    if not isinstance(value, dict):
        raise ConfigError(f"is a {type(value).__name__}; accepted: an object")
    foreign = "problem" in value and "question" not in value
    names = ("path", "problem", "solution", "options") if foreign else ("video", "question", "answer", "choices")
    video, question = _text(value, names[0]), _text(value, names[1])
    answer, choices = _text(value, names[2]), _choices(value, names[3])
    metadata = value.get("metadata", {})
    problem_type = MULTIPLE_CHOICE if choices else FREE_FORM
    if foreign:
        answer = answer.removeprefix("<answer>").removesuffix("</answer>").strip()
        metadata = {name: value[name] for name in ("problem_id", "data_type") if name in value}
        problem_type = str(value.get("problem_type") or problem_type)
    if not answer:
        raise ConfigError(f"{names[2]} is empty")
    if not isinstance(metadata, dict):
        raise ConfigError(f"metadata is {metadata!r}; accepted: an object")
    if choices:
        answer = _chosen(answer, choices)
    file = folder / video
    if not os.path.isfile(file):
        raise ConfigError(f"the video {file} does not exist")
    family = str(value.get("data_source" if foreign else "family") or "")
    cot = "" if foreign else str(value.get("cot") or "").strip()
    return Triplet(line, number, file, question, answer, choices, problem_type, family, cot, metadata)


def _text(value: Mapping[str, Any], name: str) -> str:
    found = value.get(name)
    if isinstance(found, int | float) and not isinstance(found, bool):
        found = str(found)
    if found is None or (isinstance(found, str) and not found.strip()):
        raise ConfigError(f"{name} is {'missing' if name not in value else 'empty'}")
    if not isinstance(found, str):
        raise ConfigError(f"{name} is {found!r}; accepted: text")
    return found.strip()


def _choices(value: Mapping[str, Any], name: str) -> tuple[str, ...]:
    """Return the options, without the letters that Video-R1 puts before them."""
    found = value.get(name) or []
    if not isinstance(found, list) or not all(isinstance(choice, str) and choice.strip() for choice in found):
        raise ConfigError(f"{name} are {found!r}; accepted: a list of texts")
    choices = [choice.strip() for choice in found]
    if all(
        choice[:1] == letter and choice[1:2] in (".", ")", ":")
        for choice, letter in zip(choices, LETTERS, strict=False)
    ):
        choices = [choice[2:].strip() or choice for choice in choices]
    if choices and not 2 <= len(set(choices)) == len(choices) <= len(LETTERS):
        raise ConfigError(f"{name} are {choices!r}; accepted: 2 to {len(LETTERS)} different ones")
    return tuple(choices)


def _chosen(answer: str, choices: tuple[str, ...]) -> str:
    """Return the option that an answer names, by its text or by its letter."""
    if answer in choices:
        return answer
    letter = answer.rstrip(".):")
    place = LETTERS.find(letter) if len(letter) == 1 else -1
    if not 0 <= place < len(choices):
        raise ConfigError(f"the answer {answer!r} is none of the choices {list(choices)!r}, nor a letter of theirs")
    return choices[place]
