"""Asks one question about every video of a folder, and writes the answers to a CSV file.

Usage: python examples/folder_to_csv.py BUNDLE FOLDER QUESTION ANSWERS.csv [CHOICE CHOICE ...]

A row per video: file, answer, probability of it among the choices (where there are any), seconds, error. A video that
cannot be read costs its own row only. Rows are written as they come; a file that has some already is gone on with.
"""

import csv
import sys
from pathlib import Path

import vlrt

COLUMNS = ("file", "answer", "probability", "seconds", "error")
SUFFIXES = {".avi", ".gif", ".m4v", ".mkv", ".mov", ".mp4", ".mpg", ".ts", ".webm"}


def main(bundle: str, folder: str, question: str, out: str, *choices: str) -> None:
    videos = sorted(path for path in Path(folder).rglob("*") if path.suffix.lower() in SUFFIXES)
    if not videos:
        sys.exit(f"{folder} holds no video; looked for {', '.join(sorted(SUFFIXES))}")
    done = answered(Path(out))
    with open(out, "a", newline="", encoding="utf-8") as file, vlrt.Runtime.open(bundle) as runtime:
        rows = csv.DictWriter(file, COLUMNS)
        if not done and not file.tell():
            rows.writeheader()
        for number, video in enumerate(videos, 1):
            name = video.relative_to(folder).as_posix()
            if name in done:
                continue
            rows.writerow({"file": name, **ask(runtime, video, question, choices)})
            file.flush()
            print(f"{number} of {len(videos)}: {name}", file=sys.stderr)


def ask(runtime: vlrt.Runtime, video: Path, question: str, choices: tuple[str, ...]) -> dict[str, str]:
    try:
        answer = runtime.ask(video, question, choices=choices or None)
    except vlrt.VideoError as error:
        return {"error": str(error)}
    probability = f"{answer.scores[answer.choice]:.4f}" if answer.scores and answer.choice else ""
    return {"answer": answer.text, "probability": probability, "seconds": f"{answer.timings['total']:.3f}"}


def answered(out: Path) -> set[str]:
    """Return the files that have a row already."""
    if not out.exists():
        return set()
    with out.open(newline="", encoding="utf-8") as file:
        return {row["file"] for row in csv.DictReader(file)}


if __name__ == "__main__":
    if len(sys.argv) < 5:
        sys.exit(__doc__)
    try:
        main(*sys.argv[1:])
    except vlrt.VlrtError as error:
        sys.exit(f"error: {error}")
