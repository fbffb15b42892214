"""The main job, from a trained checkpoint to answers: what `make demo` runs.

Exports the trained models that come with vlrt, makes clips that they have not seen, asks about them, draws what was
asked and answered on a contact sheet, and sets the times of latents beside those of a written chain of thought.

Usage: python examples/demo.py [--seed N]
"""

import argparse
import json
import secrets
import subprocess
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image, ImageDraw, ImageFont
from rich.console import Console
from rich.table import Table

import vlrt
from plans import CUPS, Part
from vlrt import config, pretrained, video
from vlrt.train import synthetic

HERE = Path("demo")
MODELS = {"latent": "shapes-latent", "cot": "shapes-cot"}
NUM_CLIPS = 6
ROUNDS = 5
STAGES = ("decode", "preprocess", "vision", "prefill", "latents", "answer", "total")
FRAME, GAP, TEXT = 84, 6, 22  # pixels of the contact sheet: a frame's side, between things, a line of text


@dataclass(frozen=True)
class Asked:
    """One question with its right answer and what each model said, by way of reasoning."""

    clip: Path
    question: str
    right: str
    said: dict[str, vlrt.Answer]

    def is_right(self, way: str) -> bool:
        return self.said[way].text == self.right


def make_questions(seed: int) -> list[dict[str, Any]]:
    """Make clips of swapped cups; return rows: one question about each, after one swap and more, and at the end."""
    folder = HERE / f"clips-{seed}"
    settings = Part("test", NUM_CLIPS, CUPS, seed=seed).settings
    path = synthetic.write(folder, settings, NUM_CLIPS, workers=1)
    last = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
    steps = [json.loads(line) for line in (folder / synthetic.STEPS).read_text(encoding="utf-8").splitlines()]
    rows = []
    for i, row in enumerate(last):
        earlier = [step for step in steps if step["video"] == row["video"]][:-1]
        asked = [*earlier, row][i % (len(earlier) + 1)]
        rows.append({**asked, "video": folder / row["video"]})
    return rows


def ask_all(
    runtimes: dict[str, vlrt.Runtime], rows: Sequence[dict[str, Any]], say: Callable[[str], None]
) -> list[Asked]:
    """Ask both models each question; print the answers as they come."""
    found = []
    for row in rows:
        said = {way: runtime.ask(row["video"], row["question"], reasoning=way) for way, runtime in runtimes.items()}
        one = Asked(row["video"], row["question"], row["answer"], said)
        found.append(one)
        say(f"{one.clip}\n  {one.question}  Right: {one.right}")
        for way, answer in said.items():
            length = f"{answer.usage.latents} latents" if way == "latent" else f"{answer.usage.answer_tokens} tokens"
            mark = "[green]right[/green]" if one.is_right(way) else "[red]wrong[/red]"
            say(f"  {MODELS[way]} ({length}): {answer.text}  {mark}")
    return found


def draw_sheet(found: Sequence[Asked], model: config.Model, path: Path) -> None:
    """Write a picture: per clip every second frame, and under them the question and the answers."""
    films = [video.load(one.clip, model.video, model.vision).data[::2] for one in found]
    width = GAP + max(len(film) for film in films) * (FRAME + GAP)
    height = GAP + len(films) * (FRAME + TEXT + 2 * GAP)
    sheet = Image.new("RGB", (width, height), "white")
    pen, font = ImageDraw.Draw(sheet), ImageFont.load_default(size=TEXT - 8)
    for i, (one, film) in enumerate(zip(found, films, strict=True)):
        top = GAP + i * (FRAME + TEXT + 2 * GAP)
        for k, frame in enumerate(film):
            sheet.paste(Image.fromarray(frame).resize((FRAME, FRAME)), (GAP + k * (FRAME + GAP), top))
        x: float = GAP
        pen.text((x, top + FRAME + 4), one.question, "black", font)
        x += pen.textlength(one.question, font) + 3 * GAP
        for way in one.said:
            text = f"{way}: {one.said[way].text}"
            pen.text((x, top + FRAME + 4), text, "green" if one.is_right(way) else "red", font)
            x += pen.textlength(text, font) + 3 * GAP
    sheet.save(path)


def median_timings(runtimes: dict[str, vlrt.Runtime], rows: Sequence[dict[str, Any]]) -> dict[str, dict[str, float]]:
    """Return seconds per stage for each way of reasoning: medians over the rows, in rounds in which they take turns."""
    ways = {"direct": ("latent", "direct"), "latent": ("latent", "latent"), "cot": ("cot", "cot")}  # model, reasoning
    timings: dict[str, list[dict[str, float]]] = {name: [] for name in ways}
    for _ in range(ROUNDS):
        for row in rows:
            for name, (model, reasoning) in ways.items():
                timings[name].append(runtimes[model].ask(row["video"], row["question"], reasoning=reasoning).timings)
    return {
        name: {stage: float(np.median([t[stage] for t in found])) for stage in STAGES}
        for name, found in timings.items()
    }


def print_timings(console: Console, seconds: dict[str, dict[str, float]], found: Sequence[Asked]) -> None:
    """Print the stages side by side, and what the chain costs in latents."""
    latents = found[0].said["latent"].usage.latents
    written = float(np.median([one.said["cot"].usage.answer_tokens for one in found]))
    table = Table(title="milliseconds per stage", title_justify="left", show_edge=False)
    for name in ("stage", "direct", f"{latents} latents", f"chain of {written:.0f} tokens"):
        table.add_column(name, justify="left" if name == "stage" else "right")
    for stage in STAGES:
        row = (f"{timings[stage] * 1000:.1f}" for timings in seconds.values())
        table.add_row(stage, *row, end_section=stage == "answer")
    console.print(table)
    chain = seconds["cot"]["answer"] - seconds["latent"]["answer"]
    console.print(
        f"\nThe chain takes {chain / seconds['latent']['latents']:.1f} times as long as the latents, and "
        f"{seconds['cot']['total'] / seconds['latent']['total']:.1f} times from the video's path to the answer.\n"
        f"Medians of {ROUNDS} rounds. These chains are as short as the questions are easy; benches/ measures chains of "
        "384 tokens, and larger models.\n"
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n", 1)[0], allow_abbrev=False)
    parser.add_argument("--seed", type=int, help="of the clips (default: another one each time)")
    seed = parser.parse_args().seed
    seed = 1000 + secrets.randbelow(10**6) if seed is None else seed  # training and tests had seeds below 1000
    console = Console(soft_wrap=True, highlight=False)
    HERE.mkdir(exist_ok=True)
    bundles = {way: HERE / f"{name}.vlrt" for way, name in MODELS.items()}
    for way, name in MODELS.items():
        console.print(f"$ vlrt export {name} -o {bundles[way]}")
        command = [sys.executable, "-m", "vlrt", "export", str(pretrained.find(name)), "-o", str(bundles[way])]
        subprocess.run(command, check=True)
    rows = make_questions(seed)
    console.print(f"\nClips that the models have not seen (seed {seed}):")
    # Nothing is remembered from one question to the next: what is timed is a first question about a video.
    with (
        vlrt.Runtime.open(bundles["latent"], video_cache_bytes=0) as latent,
        vlrt.Runtime.open(bundles["cot"], video_cache_bytes=0) as cot,
    ):
        runtimes = {"latent": latent, "cot": cot}
        found = ask_all(runtimes, rows, console.print)
        for way, name in MODELS.items():
            console.print(f"{name}: {sum(one.is_right(way) for one in found)} of {len(found)} right")
        sheet = HERE / "answers.png"
        draw_sheet(found, latent.model, sheet)
        console.print(f"The clips with questions and answers: {sheet}\n")
        print_timings(console, median_timings(runtimes, rows), found)
    console.print(f"How well the models answer in general: {pretrained.find(MODELS['latent'])}/README.md\n\nNext:")
    for command in (
        f"vlrt info {bundles['latent']}",
        f"vlrt ask {bundles['latent']} {rows[0]['video']} {rows[0]['question']!r} --choices left middle right",
        "vlrt doctor",
    ):
        console.print(f"  .venv/bin/{command}")


if __name__ == "__main__":
    main()
